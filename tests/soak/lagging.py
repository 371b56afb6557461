"""A reader that lags behind at every kind of event: python tests/soak/lagging.py [--seed N] [--count N]

A client sends messages and stops to read; another one makes --count events, more than the server's memory has room for,
and at that moment a turn starts, is refused, cancelled, deleted with its agent, purged, stopped with the server, or
cannot be stored. Then the client reads on: each of its messages has exactly one terminal frame, and each stored event
comes once. Each case twice: a client that subscribed, and one that is only the sender.
"""

import asyncio
import collections
import contextlib
import json
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from soaking import GONE, JSON, Soak, client, folder, narrow_socket, run, soak_server, until

# isort: split
from commandline import Serving
from endpoint import Body, Endpoint, Reply, greet
from wire import Wire, is_terminal, seqs

WHAT, COUNT = "a reader that lags behind at every kind of event", 300
FILLING = 3_500_000  # bytes that are more than the system takes for a client that does not read
HELD = "Please wait"


def answer(body: Body) -> Reply:
    """Greet; where it is asked to wait, only once released."""
    if "tools" in body and HELD in json.dumps(body["messages"][-1]):
        return Reply("I wait.", calls=[("send_message", {"message": "Here I am."})], hold=True)
    return greet(body)


class Lag:
    """One case: the server, a client that lags behind, another one that makes events; the messages of the first."""

    def __init__(
        self, soak: Soak, server: Serving, endpoint: Endpoint, where: Path, late: Wire, other: Wire, subscribed: bool
    ) -> None:
        self.soak, self.server, self.endpoint, self.where = soak, server, endpoint, where
        self.late, self.other, self.subscribed = late, other, subscribed
        self.sent: dict[str, str] = {}
        self.seq = 0

    async def say(self, text: str) -> str:
        """Send a message from the client that lags; its turn_id."""
        turn_id = f"turn {len(self.sent)}"
        self.sent[turn_id] = await self.late.say(text, agent_name="sam", turn_id=turn_id)
        return turn_id

    async def hold(self) -> None:
        """A turn that runs until it is released, and one that waits behind it."""
        asked = len(self.endpoint.requests)
        await self.say(HELD)
        await asyncio.to_thread(self.endpoint.wait_requests, asked + 1)
        await self.say("And then?")

    async def fill(self) -> None:
        """Let so much wait for the client that nothing more fits."""
        await self.other.ok("create_agent", config={"name": "filler"})
        await self.other.ok("insert_passage", agent_name="filler", text="x" * 20_000)
        for _ in range(FILLING // 20_000):
            await self.late.request("search_memory", agent_name="filler", query="")

    async def events(self) -> None:
        """So many events more, by another client."""
        for number in range(self.soak.count):
            await self.other.ok("set_block", agent_name="sam", label="human", value=f"Number {self.seq} {number}")
        self.seq += 1

    async def release(self) -> None:
        """Let the model answer, until no turn runs or waits."""
        self.endpoint.release()
        async with asyncio.timeout(20):
            while "running" in str(await self.other.ok("list_agents")):
                await self.other.ok("get_agent", agent_name="sam")


async def start(lag: Lag) -> None:
    """Turns start and end while it lags, and all of that is far back when it reads."""
    await lag.hold()
    await lag.fill()
    await lag.events()
    await lag.release()
    await lag.events()


async def refusal(lag: Lag) -> None:
    """Of the messages that wait too many are refused."""
    await lag.hold()
    for number in range(10):
        await lag.say(f"More {number}")
    await lag.fill()
    await lag.events()
    await lag.release()
    await lag.events()


async def cancel(lag: Lag) -> None:
    """Somebody else cancels a message that waits, and a turn that runs."""
    await lag.hold()
    await lag.fill()
    await lag.events()
    for turn_id in reversed(lag.sent):
        await lag.other.ok("cancel", agent_name="sam", turn_id=turn_id)
    await lag.events()


async def delete(lag: Lag, *, purge: bool = False) -> None:
    """Somebody else deletes the agent."""
    await lag.hold()
    await lag.fill()
    await lag.events()
    await lag.other.ok("delete_agent", agent_name="sam", force=True, purge=purge)


async def purge(lag: Lag) -> None:
    """Somebody else deletes the agent, and nothing of it is left on disk."""
    await delete(lag, purge=True)


async def stop(lag: Lag) -> None:
    """The server stops, and has two seconds for whoever reads again."""
    await lag.hold()
    await lag.fill()
    await lag.events()
    lag.server.process.send_signal(signal.SIGTERM)


async def failed_store(lag: Lag) -> None:
    """The end of a turn cannot be stored, nor anything else for a while."""
    await lag.hold()
    await lag.fill()
    await lag.events()
    plan = lag.where / "plan.json"
    plan.write_text(json.dumps({"from": 1, "to": 10**9, "text": "disk I/O error", "undo": True}), "utf-8")
    await lag.release()
    plan.unlink()
    await lag.events()


KINDS: list[Callable[[Lag], Awaitable[None]]] = [start, refusal, cancel, delete, purge, stop, failed_store]


async def case(soak: Soak, kind: Callable[[Lag], Awaitable[None]], subscribed: bool) -> None:
    """Lag behind, read on, and look at what came."""
    name = f"{kind.__name__}, {'subscribed' if subscribed else 'sender only'}"
    with folder() as where, Endpoint() as endpoint:
        endpoint.default = answer
        plan = {"plan": str(where / "plan.json")}
        constants: JSON = {"READER_PATIENCE": 600.0, "PING_TIMEOUT": 600.0, "RING": min(256, soak.count - 20)}
        options: JSON = {"model": "test-model", "api_key": "sk-x", "base_url": endpoint.url, "sync": "normal"}
        with soak_server(where, constants=constants, fail=plan, **options) as server:
            async with contextlib.AsyncExitStack() as stack:
                line = await narrow_socket(server.port)
                late = await stack.enter_async_context(client(server, "*", sock=line, max_queue=1))
                other = await stack.enter_async_context(client(server, "*"))
                await other.ok("create_agent", config={"name": "sam"})
                await other.ok("subscribe", agent_name="sam")
                if subscribed:
                    await late.ok("subscribe", agent_name="sam", after=0)
                lag = Lag(soak, server, endpoint, where, late, other, subscribed)
                try:
                    await kind(lag)
                    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
                    await read_on(lag, stopped=kind is stop)
                except (TimeoutError, AssertionError) as error:
                    soak.fault("no end", f"{name}: {error!r}")
                look(soak, name, lag, late.frames, other.frames)
            if server.process.poll() is None and server.end() != 0:
                soak.fault("crash", server.log[-500:])
            server.wait()
        if kind is stop:
            with soak_server(where, **options) as server:
                await send_again(soak, name, server, lag)
        if "Traceback" in server.log:
            soak.fault("crash", server.log.partition("Traceback")[2][-800:])
    soak.step()


async def read_on(lag: Lag, *, stopped: bool) -> None:
    """Read all that waits for the client, up to what is asked now; of a server that stops, up to its end."""
    if stopped:
        with contextlib.suppress(*GONE):
            while True:
                await lag.late.receive()
        return
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


def look(soak: Soak, name: str, lag: Lag, frames: list[JSON], others: list[JSON]) -> None:
    """Exactly one terminal frame a message, at most one start before it, no event twice."""
    stopped = name.startswith("stop")
    for turn_id, request_id in lag.sent.items():
        mine = [frame for frame in frames if frame.get("turn_id") == turn_id]
        ends = [frame for frame in mine if is_terminal(frame)]
        if len(ends) != 1 and not (stopped and not ends):
            soak.fault("not exactly one terminal frame", f"{name} {turn_id}: {ends or 'none'}")
        if ends and (mine[-1] is not ends[-1] or ends[0].get("id") != request_id):
            soak.fault("not exactly one terminal frame", f"{name} {turn_id}: {mine[-1]}, without its id or not last")
        if sum(frame["type"] == "agent_response_start" for frame in mine) > 1:
            soak.fault("event twice or missing", f"{name} {turn_id}: two starts")
    if twice := [seq for seq, times in collections.Counter(seqs(frames)).items() if times > 1]:
        soak.fault("event twice or missing", f"{name}: {len(twice)} twice, such as {twice[:3]}")
    got = seqs(frames)
    # A turn whose end could not be stored was refused to its sender; what ends it on disk later is not for them.
    refused = {frame["turn_id"] for frame in frames if is_terminal(frame) and "seq" not in frame}
    left_out = {
        frame["seq"] for frame in others if is_terminal(frame) and frame["turn_id"] in refused & lag.sent.keys()
    }
    if got != sorted(got) or (lag.subscribed and set(range(1, max(got) + 1)) - set(got) - left_out):
        soak.fault("event twice or missing", f"{name}: {len(got)} events up to {got[-1]}, not all or not in order")
    told = collections.Counter(frame["turn_id"] for frame in others if is_terminal(frame))
    if twice := [turn_id for turn_id, times in told.items() if times > 1]:
        soak.fault("not exactly one terminal frame", f"{name}: who kept up was told twice of {twice}")


async def send_again(soak: Soak, name: str, server: Serving, lag: Lag) -> None:
    """After a stop the same messages again: each has exactly one terminal frame, also those that had one before."""
    async with client(server, "*") as wire:
        for turn_id in lag.sent:
            text = HELD if turn_id == "turn 0" else "And then?"
            ends = [frame for frame in await wire.turn(text, agent_name="sam", turn_id=turn_id) if is_terminal(frame)]
            before = [frame for frame in lag.late.frames if frame.get("turn_id") == turn_id and is_terminal(frame)]
            if len(ends) != 1 or (before and "seq" in before[0] and before[0]["seq"] != ends[0].get("seq")):
                soak.fault("not exactly one terminal frame", f"{name} {turn_id}, sent again: {before} {ends}")
    server.end()


async def main(soak: Soak) -> None:
    soak.total(2 * len(KINDS))
    for kind in KINDS:
        for subscribed in (True, False):
            await case(soak, kind, subscribed)
    soak.none("messages without exactly one terminal frame", "not exactly one terminal frame", "no end")
    soak.none("events twice, missing, or not in order", "event twice or missing")
    soak.none("crashes, tracebacks", "crash")
    soak.told("cases", f"{2 * len(KINDS)}, each {soak.count} events behind")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
