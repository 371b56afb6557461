"""A reader that lags behind at every kind of event: python tests/soak/lagging.py [--seed N] [--count N]

A client sends messages and stops to read; another one makes --count events, more than the server's memory has room for.
When it reads on, each of its messages has one terminal frame, and each stored event comes once, subscribed or not.
"""

import asyncio
import collections
import functools
import itertools
import json
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from soaking import Site, Soak, client, narrow_socket, run, site, until

# isort: split
from commandline import Serving
from endpoint import Body, Reply, greet
from wire import JSON, Wire, is_terminal, seqs

WHAT, COUNT = "a reader that lags behind at every kind of event", 300
FILLING = 3_500_000  # bytes that are more than the system takes for a client that does not read
HELD = "Please wait"


def answer(body: Body) -> Reply:
    """Greet; where it is asked to wait, only once released."""
    if "tools" in body and HELD in str(body["messages"][-1]["content"]).rpartition("\n")[2]:
        return Reply("I wait.", calls=[("send_message", {"message": "Here I am."})], hold=True)
    return greet(body)


class Lag:
    """A client that lags behind, another one that makes events, an agent, and the messages of the first."""

    agent = "sam"

    def __init__(self, place: Site, server: Serving, late: Wire, other: Wire, subscribed: bool) -> None:
        self.place, self.server, self.late, self.other, self.subscribed = place, server, late, other, subscribed
        self.sent: dict[str, tuple[str, str]] = {}  # by turn_id: the text, the request's id

    async def say(self, text: str, turn_id: str = "") -> None:
        turn_id = turn_id or f"turn {len(self.sent)}"
        self.sent[turn_id] = text, await self.late.say(text, agent_name=self.agent, turn_id=turn_id)

    async def fall_behind(self, waiting: int) -> None:
        """A turn runs until it is released, others wait behind it; then nothing more fits, and events come."""
        await self.say(HELD)
        await asyncio.to_thread(self.place.endpoint.wait_requests, 1)
        for number in range(waiting):
            await self.say(f"And then {number}?")
        for _ in range(FILLING // 60_000):
            await self.late.request("search_memory", agent_name="filler", query="")
        await self.events()

    async def events(self) -> None:
        """So many events more, by another client."""
        for number in range(self.place.soak.count):
            value = f"Number {len(self.other.frames)} {number}"
            await self.other.ok("set_block", agent_name=self.agent, label="human", value=value)

    async def release(self) -> None:
        """Let the model answer, until no turn runs or waits."""
        self.place.endpoint.release()
        async with asyncio.timeout(20):
            while "running" in str(await self.other.ok("list_agents")):
                await self.other.ok("get_agent", agent_name=self.agent)


async def go_on(lag: Lag) -> None:
    """Turns end while it lags, and others start and end, and all of that is far back when it reads."""
    await lag.release()
    await lag.events()


async def cancel(lag: Lag) -> None:
    """Somebody else cancels a message that waits, and a turn that runs."""
    for turn_id in reversed(lag.sent):
        await lag.other.ok("cancel", agent_name=lag.agent, turn_id=turn_id)
    await lag.events()


async def leave(lag: Lag) -> None:
    """It sends its messages once more and unsubscribes, far behind; then all goes on."""
    for turn_id, (text, _) in lag.sent.items():
        await lag.say(text, turn_id)
    await lag.late.command("unsubscribe", agent_name=lag.agent)
    lag.subscribed = False
    await go_on(lag)


async def delete(lag: Lag, *, purge: bool = False) -> None:
    """Somebody else deletes the agent; purged, nothing of it is left on disk."""
    await lag.other.ok("delete_agent", agent_name=lag.agent, force=True, purge=purge)


async def stop(lag: Lag) -> None:
    """The server stops, and has two seconds for whoever reads again."""
    lag.server.process.send_signal(signal.SIGTERM)


async def fail_to_store(lag: Lag) -> None:
    """The end of a turn cannot be stored, nor anything else for a while."""
    plan = lag.place.where / "plan.json"
    plan.write_text(json.dumps({"from": 1, "to": 10**9, "text": "disk I/O error", "undo": True}), "utf-8")
    await lag.release()
    plan.unlink()
    await lag.events()


async def rewind(lag: Lag) -> None:
    """Somebody else takes the agent back to the first of its turns, when all are over."""
    await lag.release()
    await lag.other.ok("rewind_agent", agent_name=lag.agent, turn_id="turn 0")
    lag.subscribed = lag.place.gapless = False  # it goes on above what there was
    await lag.events()


Kind = Callable[[Lag], Coroutine[Any, Any, None]]
# How many messages wait behind the turn that runs, of which eight may, and what happens then.
KINDS: dict[str, tuple[int, Kind]] = {"start": (1, go_on), "refusal": (11, go_on), "cancel": (1, cancel)}
KINDS |= {"leave": (1, leave), "delete": (1, delete), "purge": (1, functools.partial(delete, purge=True))}
KINDS |= {"rewind": (1, rewind), "stop": (1, stop), "failed store": (1, fail_to_store)}
ENDS, TWICE = "messages without exactly one terminal frame", "events twice, missing, or not in order"


async def case(soak: Soak, kind: str, subscribed: bool) -> None:
    """Lag behind, read on, and look at what came."""
    name, (waiting, happens) = f"{kind}, {'subscribed' if subscribed else 'sender only'}", KINDS[kind]
    constants: JSON = {"READER_PATIENCE": 600.0, "PING_TIMEOUT": 600.0, "RING": min(256, soak.count - 20)}
    async with site(soak, answer) as place:
        server = await place.start("--sync", "normal", constants=constants, fail=True)
        line = await narrow_socket(server.port)
        late_one, other_one = (
            client(server, "*", sock=line, max_queue=1),
            client(server, "*", agent={"name": Lag.agent}),
        )
        async with late_one as late, other_one as other:
            await other.ok("create_agent", config={"name": "filler"})
            await other.ok("insert_passage", agent_name="filler", text="x" * 60_000)  # fills what the system takes
            await other.ok("subscribe", agent_name=Lag.agent)
            if subscribed:
                await late.ok("subscribe", agent_name=Lag.agent, after=0)
            lag = Lag(place, server, late, other, subscribed)
            try:
                await lag.fall_behind(waiting)
                await happens(lag)
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
                await (late.closed() if happens is stop else read_on(lag))
            except (TimeoutError, AssertionError) as error:
                soak.fault(ENDS, f"{name}: {error!r}")
            look_at_ends(soak, name, lag)
            look_at_events(soak, name, lag)
        if happens is stop:
            await asyncio.to_thread(server.wait)
            await place.end(server)
            await send_again(soak, name, await place.start(), lag)


async def read_on(lag: Lag) -> None:
    """Read all that waits for the client, up to what is asked now."""
    open_turns = set(lag.sent)
    mark = await lag.late.request("hello")
    answered = False
    while open_turns or not answered:
        frame = await lag.late.receive()
        answered = answered or frame.get("id") == mark
        if is_terminal(frame):
            open_turns.discard(frame["turn_id"])
    last_seq = max(seqs(lag.other.frames), default=0)
    if lag.subscribed and any(frame["type"] == "agent_response_end" for frame in lag.late.frames):
        await until(lambda: last_seq in seqs(lag.late.frames), 0.1)
    await lag.late.command("list_agents")


def look_at_ends(soak: Soak, name: str, lag: Lag) -> None:
    """Exactly one terminal frame a message, as its last, at most one start before it."""
    for turn_id, (_, request_id) in lag.sent.items():
        mine = [frame for frame in lag.late.frames if frame.get("turn_id") == turn_id]
        ends = [frame for frame in mine if is_terminal(frame)]
        if lag.subscribed and len(ends) == 2 and "seq" not in ends[0] and "id" not in ends[1]:
            mine.remove(ends.pop())  # how a turn that was refused ended on disk: who subscribed sees it
        soak.demand(len(ends) == 1 or (name.startswith("stop") and not ends), ENDS, name, turn_id, ends or "none")
        is_last = not ends or (mine[-1] is ends[-1] and ends[0].get("id") == request_id)
        soak.demand(is_last, ENDS, name, turn_id, "without its id or not last:", mine[-1:])
        starts = sum(frame["type"] == "agent_response_start" for frame in mine)
        soak.demand(starts <= 1, TWICE, name, turn_id, "two starts")
    ends_of = collections.Counter(frame["turn_id"] for frame in lag.other.frames if is_terminal(frame))
    twice = [turn_id for turn_id, times in ends_of.items() if times > 1]
    soak.demand(not twice, ENDS, name, "who kept up was told twice of", twice)


def look_at_events(soak: Soak, name: str, lag: Lag) -> None:
    """No event twice, all in order; and for who subscribed none is missing."""
    found = seqs(lag.late.frames)
    expected = range(1, max(found, default=0) + 1) if lag.subscribed else sorted(set(found))
    soak.demand(found == list(expected), TWICE, name, len(found), "events", len(expected), "expected", found[-5:])


async def send_again(soak: Soak, name: str, server: Serving, lag: Lag) -> None:
    """After a stop the same messages again: each has exactly one terminal frame, also those that had one before."""
    async with client(server, "*") as wire:
        for turn_id, (text, _) in lag.sent.items():
            ends = list(filter(is_terminal, await wire.turn(text, agent_name=lag.agent, turn_id=turn_id)))
            before = [frame for frame in lag.late.frames if frame.get("turn_id") == turn_id and is_terminal(frame)]
            is_same = not before or "seq" not in before[0] or before[0]["seq"] == ends[0].get("seq")
            soak.demand(len(ends) == 1 and is_same, ENDS, name, turn_id, "sent again:", before, ends)


async def main(soak: Soak) -> None:
    soak.none(ENDS, TWICE)
    cases = list(itertools.product(KINDS, (True, False)))
    if soak.count < soak.full:  # in turn subscribed and not
        cases = [each for number, each in enumerate(cases) if number % 4 in (0, 3)]
    soak.progress.total = len(cases)
    for kind, subscribed in cases:
        await case(soak, kind, subscribed)
        soak.step()


if __name__ == "__main__":
    run(main, WHAT, COUNT)
