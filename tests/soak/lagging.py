"""A reader that lags behind at every kind of event: python tests/soak/lagging.py [--seed N] [--count N]

A client sends messages and stops to read; another one makes --count events, more than the server's memory has room for.
When it reads on, each of its messages has one terminal frame, and each stored event comes once, subscribed or not.
"""

import asyncio
import collections
import itertools
import json
import signal
import socket

import soaking
from commandline import Serving
from endpoint import Body, Reply, greet
from soaking import Site, Soak, client, narrow_socket, site, until
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

    def __init__(self, place: Site, server: Serving, late: Wire, other: Wire, name: str, subscribed: bool) -> None:
        self.place, self.server, self.late, self.other, self.name = place, server, late, other, name
        self.subscribed = subscribed
        self.sent: dict[str, tuple[str, str]] = {}  # by turn_id: the text, the request's id

    def demand(self, right: object, kind: str, *details: object) -> None:
        self.place.soak.demand(right, kind, self.name, *details)

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
        for number in range(self.place.soak.count):
            value = f"Number {len(self.other.frames)} {number}"
            await self.other.ok("set_block", agent_name=self.agent, label="human", value=value)

    async def release(self) -> None:
        """Let the model answer, until no turn runs or waits."""
        self.place.endpoint.release()
        async with asyncio.timeout(20):
            while "running" in str(await self.other.ok("list_agents")):
                await self.other.ok("get_agent", agent_name=self.agent)

    # -- what happens --

    async def go_on(self) -> None:
        """Turns end while it lags, and others start and end, and all of that is far back when it reads."""
        await self.release()
        await self.events()

    async def cancel(self) -> None:
        """Somebody else cancels a message that waits, and a turn that runs."""
        for turn_id in reversed(self.sent):
            await self.other.ok("cancel", agent_name=self.agent, turn_id=turn_id)
        await self.events()

    async def leave(self) -> None:
        """It sends its messages once more and unsubscribes, far behind; then all goes on."""
        for turn_id, (text, _) in self.sent.items():
            await self.say(text, turn_id)
        await self.late.command("unsubscribe", agent_name=self.agent)
        self.subscribed = False
        await self.go_on()

    async def delete(self, purge: bool = False) -> None:
        await self.other.ok("delete_agent", agent_name=self.agent, force=True, purge=purge)

    async def purge(self) -> None:
        await self.delete(purge=True)

    async def stop(self) -> None:
        """The server stops, and has two seconds for whoever reads again."""
        self.server.process.send_signal(signal.SIGTERM)

    async def fail_to_store(self) -> None:
        """The end of a turn cannot be stored, nor anything else for a while."""
        plan = self.place.where / "plan.json"
        plan.write_text(json.dumps({"from": 1, "to": 10**9, "text": "disk I/O error", "undo": True}), "utf-8")
        await self.release()
        plan.unlink()
        await self.events()

    async def rewind(self) -> None:
        """Somebody else takes the agent back to the first of its turns, when all are over."""
        await self.release()
        await self.other.ok("rewind_agent", agent_name=self.agent, turn_id="turn 0")
        self.subscribed = self.place.gapless = False  # it goes on above what there was
        await self.events()

    # -- what came --

    async def read_on(self) -> None:
        """Read all that waits for the client, up to what is asked now."""
        open_turns = set(self.sent)
        mark = await self.late.request("hello")
        answered = False
        while open_turns or not answered:
            frame = await self.late.receive()
            answered = answered or frame.get("id") == mark
            if is_terminal(frame):
                open_turns.discard(frame["turn_id"])
        last_seq = max(seqs(self.other.frames), default=0)
        if self.subscribed and any(frame["type"] == "agent_response_end" for frame in self.late.frames):
            await until(lambda: last_seq in seqs(self.late.frames), 0.1)
        await self.late.command("list_agents")

    def ends(self, turn_id: str) -> list[JSON]:
        return [frame for frame in self.late.frames if frame.get("turn_id") == turn_id and is_terminal(frame)]

    def look_at_ends(self) -> None:
        """Exactly one terminal frame a message, as its last, at most one start before it."""
        for turn_id, (_, request_id) in self.sent.items():
            mine = [frame for frame in self.late.frames if frame.get("turn_id") == turn_id]
            ends = self.ends(turn_id)
            if self.subscribed and len(ends) == 2 and "seq" not in ends[0] and "id" not in ends[1]:
                mine.remove(ends.pop())  # how a turn that was refused ended on disk: who subscribed sees it
            self.demand(len(ends) == 1 or (self.name.startswith("stop") and not ends), ENDS, turn_id, ends or "none")
            is_last = not ends or (mine[-1] is ends[-1] and ends[0].get("id") == request_id)
            self.demand(is_last, ENDS, turn_id, "without its id or not last:", mine[-1:])
            starts = sum(frame["type"] == "agent_response_start" for frame in mine)
            self.demand(starts <= 1, TWICE, turn_id, "two starts")
        ends_of = collections.Counter(frame["turn_id"] for frame in self.other.frames if is_terminal(frame))
        self.demand(set(ends_of.values()) <= {1}, ENDS, "who kept up was told twice:", ends_of)

    def look_at_events(self) -> None:
        """No event twice, all in order; and for who subscribed none is missing."""
        found = seqs(self.late.frames)
        expected = range(1, max(found, default=0) + 1) if self.subscribed else sorted(set(found))
        self.demand(found == list(expected), TWICE, len(found), "events", len(expected), "expected", found[-5:])

    async def send_again(self) -> None:
        """After a stop the same messages again: each has exactly one terminal frame, also those that had one before."""
        await asyncio.to_thread(self.server.wait)
        await self.place.end(self.server)
        async with client(await self.place.start(), "*") as wire:
            for turn_id, (text, _) in self.sent.items():
                ends = list(filter(is_terminal, await wire.turn(text, agent_name=self.agent, turn_id=turn_id)))
                before = [frame["seq"] for frame in self.ends(turn_id) if "seq" in frame]
                is_same = len(ends) == 1 and before in ([], [ends[0].get("seq")])
                self.demand(is_same, ENDS, turn_id, "sent again:", before, ends)


# How many messages wait behind the turn that runs, of which eight may, and what happens then.
KINDS = {"start": (1, Lag.go_on), "refusal": (11, Lag.go_on), "cancel": (1, Lag.cancel), "leave": (1, Lag.leave)}
KINDS |= {"delete": (1, Lag.delete), "purge": (1, Lag.purge), "rewind": (1, Lag.rewind), "stop": (1, Lag.stop)}
KINDS |= {"failed store": (1, Lag.fail_to_store)}
ENDS, TWICE = "messages without exactly one terminal frame", "events twice, missing, or not in order"


async def case(soak: Soak, kind: str, subscribed: bool) -> None:
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
            lag = Lag(place, server, late, other, name, subscribed)
            try:
                await lag.fall_behind(waiting)
                await happens(lag)
                line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
                await (late.closed() if kind == "stop" else lag.read_on())
            except (TimeoutError, AssertionError) as error:
                lag.demand(False, ENDS, repr(error))
            lag.look_at_ends()
            lag.look_at_events()
        if kind == "stop":
            await lag.send_again()


async def main(soak: Soak) -> None:
    cases = list(itertools.product(KINDS, (True, False)))
    if soak.count < soak.full:  # in turn subscribed and not
        cases = [each for number, each in enumerate(cases) if number % 4 in (0, 3)]
    soak.progress.total = len(cases)
    for kind, subscribed in cases:
        await case(soak, kind, subscribed)
        soak.step()


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
