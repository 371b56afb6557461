"""Clients cancel, leave and send again, servers are killed: python tests/soak/clients.py [--seed N] [--count N]

Ten clients talk to five agents, cancel, disconnect and send the same again, and go on with the next server. The count
is that of kill -9, at random points or while a tool is at work; half as often a signal ends a server cleanly.
"""

import asyncio
import collections
import contextlib
import itertools
import random
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Any

from soaking import GONE, Log, Site, Soak, client, run, site, until

# isort: split
from commandline import Serving
from endpoint import Body, Reply
from measure import percentile
from wire import JSON, Wire, is_terminal, seqs

import memws

WHAT, COUNT = "cancels, disconnects and messages sent again under kill -9, SIGTERM and SIGINT", 200
AGENTS = ["sam", "ada", "bob", "eve", "kim"]
CLIENTS = 10
CASES = {"cancel": 500, "leave": 500, "resend": 1_000}  # of a full run; a resend is one to three messages again
TEXT = "A reply that comes piece by piece, so that a client may leave in the middle of it. "


class Model:
    """Answers at random: memory tools, tools that take their time, streams of many pieces; some stop for good."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"model {seed}")
        self.fresh = itertools.count(1)
        self.stalls = True

    def __call__(self, body: Body) -> Reply:
        if "tools" not in body:
            return Reply("They talked.")
        asks = self.rng.choice([0, 0, 1, 1, 2, 3]) if body["messages"][-1]["role"] == "user" else 0
        calls = [self.call() for _ in range(asks)]
        more: JSON = {"delay": self.rng.choice([0, 0, 0.02])}
        if self.stalls and self.rng.random() < 0.1:
            more["stall_after"] = self.rng.randrange(4, 40)
        if calls:
            calls[-1][1]["request_heartbeat"] = True
            return Reply("I look into it.", calls=calls, chunk=4, **more)
        message = TEXT * self.rng.randrange(1, 8)
        return Reply("I answer.", [("send_message", {"message": message})], chunk=3, **more)

    def call(self) -> tuple[str, Any]:
        tool = self.rng.choice(["ask", "ask_later", "ask_later", "archival_memory_insert"])
        return tool, {"content" if tool == "archival_memory_insert" else "question": f"q{next(self.fresh)}"}


class Client:
    """One client, which does one thing after another on each server until that is gone."""

    def __init__(self, soak: Soak, number: int, log: Log) -> None:
        self.soak, self.log, self.number = soak, log, number
        self.rng = random.Random(f"{soak.seed} client {number}")
        self.cases: list[str] = []  # what it still has to do, apart from talking
        self.open: list[str] = []  # turn_ids whose end did not come
        self.cancelled: set[str] = set()  # turn_ids that it asked to cancel
        self.passages: dict[str, bool] = {}  # whether each was acknowledged
        self.views: list[tuple[str, list[int]]] = []  # turns that were read from start to end, and the seqs of each
        self.cancels: list[float] = []  # seconds until a cancelled turn had its end
        self.wires: list[Wire] = []
        self.again = 0
        self.is_ending = lambda: False  # whether the server has been told to end

    async def work(self, server: Serving, ending: asyncio.Event | None) -> None:
        """Go on until the server is gone; where it is not to end, until all is done."""
        self.is_ending = lambda: ending is not None and ending.is_set()
        while self.cases or self.open or ending is not None:
            case = self.cases.pop() if self.cases and self.rng.random() < 0.7 else "talk"
            try:
                await self.finish(server)
                await getattr(self, case)(server)
                self.soak.step(case != "talk")
            except TimeoutError:
                self.soak.fault("senders without an answer, or without its id", f"{case} {self.open}")
                return
            except GONE as error:
                self.cases += [case] * (case != "talk")
                if not self.is_ending():
                    self.soak.fault("connections that break off", repr(error))
                return
            finally:
                for wire in self.wires:
                    self.log.keep(*wire.frames)
                self.wires.clear()

    @contextlib.asynccontextmanager
    async def connect(self, server: Serving) -> AsyncIterator[Wire]:
        async with client(server, "*") as wire:
            self.wires.append(wire)
            yield wire

    def message(self) -> str:
        turn_id = f"{self.number}-{len(self.log.sent)}"
        self.log.message(turn_id)
        self.open.append(turn_id)
        return turn_id

    async def say(self, wire: Wire, turn_id: str) -> Any:
        return await wire.say(self.log.sent[turn_id], agent_name=self.log.name, turn_id=turn_id)

    async def turn(self, wire: Wire, turn_id: str, **fields: Any) -> list[JSON]:
        """Send a message, for the first time or again, and read its turn from its start to its end."""
        frames = await wire.turn(self.log.sent[turn_id], agent_name=self.log.name, turn_id=turn_id, **fields)
        self.end(frames[-1])
        self.views.append((turn_id, seqs(frame for frame in frames if frame.get("turn_id") == turn_id)))
        return frames

    def end(self, end: JSON) -> None:
        """Note the terminal frame of a turn."""
        turn_id, reason = end["turn_id"], end.get("stop_reason")
        if "seq" not in end:
            raise ConnectionError(f"refused by a server that stops: {end}")
        expected = {"done", "max_steps", "interrupted", "cancelled" if turn_id in self.cancelled else "done"}
        if reason not in expected and end.get("code") != "bad_output":  # the command line has not got the tools
            self.soak.fault("turns that end for no reason", end)
        self.open = [each for each in self.open if each != turn_id]

    async def some_frames(self, wire: Wire) -> list[JSON]:
        """Read up to a random moment."""
        frames: list[JSON] = []
        count = self.rng.choice([0, 0, 1, 2, self.rng.randrange(60), self.rng.randrange(200)])
        while len(frames) < count and not (frames and is_terminal(frames[-1])):
            frames.append(await wire.receive())
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.random() * 0.2)
        return frames

    async def finish(self, server: Serving) -> None:
        """Send again what is not known to be done."""
        for turn_id in list(self.open):
            self.again += 1
            async with self.connect(server) as wire:
                await self.turn(wire, turn_id)

    async def talk(self, server: Serving) -> None:
        async with self.connect(server) as wire:
            await self.turn(wire, self.message())
            text = f"passage{self.number}x{len(self.passages)}"
            self.passages[text] = False
            await wire.ok("insert_passage", agent_name=self.log.name, text=text)
            self.passages[text] = True

    async def cancel(self, server: Serving) -> None:
        """Cancel at a random moment: the turn ends within a second, in one way or the other."""
        turn_id = self.message()
        async with self.connect(server) as wire:
            await self.say(wire, turn_id)
            frames = await self.some_frames(wire)
            self.cancelled.add(turn_id)
            begin = time.monotonic()
            answer: JSON = {}
            mark = await wire.request("cancel", agent_name=self.log.name, turn_id=turn_id)
            while not (answer and any(map(is_terminal, frames))):
                frame = await wire.receive()
                if frame.get("id") == mark:
                    answer = frame
                else:
                    frames.append(frame)
                    if is_terminal(frame):
                        self.cancels.append(time.monotonic() - begin)
            is_understood = answer.get("result", {}).get("state") in ("cancelling", "removed", "over")
            if not is_understood and not self.is_ending():
                self.soak.fault("cancels not understood", f"{answer} {frames[-1]}")
            if "seq" in frames[-1]:
                self.views.append((turn_id, seqs(frames)))
            await self.turn(wire, turn_id)  # one that never became a turn does so now

    async def leave(self, server: Serving) -> None:
        """Leave at a random moment, come back, and go on from the last seq: what came before and the rest are all."""
        turn_id = self.message()
        async with self.connect(server) as wire:
            after = await self.subscribe(wire)
            await self.say(wire, turn_id)
            await self.some_frames(wire)
            before = seqs(wire.frames)
            wire.websocket.transport.abort()
        async with self.connect(server) as wire:
            await self.subscribe(wire, after=max(before, default=after))
            await self.say(wire, turn_id)  # it may not have arrived
            self.end((await wire.until(lambda frame: is_terminal(frame) and "id" in frame))[-1])
            await wire.command("list_agents", limit=1)
            found = before + seqs(wire.frames)
        if sorted(set(found)) != list(range(after + 1, max(found) + 1)):
            self.soak.fault("gaps in what is told or stored", f"{turn_id}: after {after}, {found}")

    async def subscribe(self, wire: Wire, **fields: Any) -> int:
        """Follow the agent; its last seq. What that brings comes after the answer."""
        last_seq: int = (await wire.ok("subscribe", agent_name=self.log.name, **fields))["last_seq"]
        if wire.before_answer:
            self.soak.fault("events before the answer to subscribe", str(wire.before_answer))
        return last_seq

    async def resend(self, server: Serving) -> None:
        """The same message from several connections, at random moments: each gets the whole turn, which runs once."""
        turn_id = self.message()

        async def sender(number: int, pause: float) -> None:
            await asyncio.sleep(pause)
            async with self.connect(server) as wire:
                frames = await self.turn(wire, turn_id, id=f"sender {number}")
                if [frame.get("id") for frame in frames if is_terminal(frame)] != [f"sender {number}"]:
                    self.soak.fault("senders without an answer, or without its id", frames[-1])

        count = self.rng.randrange(2, 5)
        pauses = [0.0] + [self.rng.choice([0.0, self.rng.random() * 0.3]) for _ in range(count - 1)]
        done = await asyncio.gather(*map(sender, range(count), pauses), return_exceptions=True)
        for error in done:
            if error is not None:
                raise error


class Rounds:
    """Servers on one database, one after another, each ended at a random point under the clients."""

    def __init__(self, soak: Soak, place: Site) -> None:
        self.soak, self.place = soak, place
        self.logs = [Log(soak, name) for name in AGENTS]
        self.clients = [Client(soak, number, self.logs[number % len(AGENTS)]) for number in range(CLIENTS)]
        cases = [case for case, count in CASES.items() for _ in range(soak.part(count))]
        soak.rng.shuffle(cases)
        for number, each in enumerate(self.clients):
            each.cases = cases[number::CLIENTS]
        self.hit: collections.Counter[str] = collections.Counter()
        self.slowest = {"restart": 0.0, "end": 0.0}
        self.clean = True  # the server before ended cleanly: there is nothing to repair

    async def make_agents(self) -> None:
        with self.place.serve() as server:
            async with client(server) as wire:
                for name in AGENTS:
                    config = {"name": name, "tools": ["ask", "ask_later"], "context_window": 16_000}
                    await wire.ok("create_agent", config=config)

    def start(self, number: int, is_signal: bool) -> contextlib.AbstractContextManager[Serving]:
        """A program with tools, or the command line."""
        if is_signal and number % 12 < 6:
            flags = ("--model", "test-model", "--base-url", self.place.endpoint.url, "--max-steps", "6")
            return self.place.command_line(*flags, OPENAI_API_KEY="sk-x")
        return self.place.serve(killed=not is_signal, max_steps=6)

    async def round(self, number: int) -> None:
        """Start a server, let the clients work, end it: twice by a kill, then by a signal."""
        begin, is_signal, ending = time.monotonic(), number % 3 == 2, asyncio.Event()
        with self.start(number, is_signal) as server:
            await self.load_agents(server, begin)
            working = [asyncio.create_task(each.work(server, ending)) for each in self.clients]
            await asyncio.sleep(0.05 + self.soak.rng.random() * 0.8)
            if number % 3 == 0:
                await until(lambda: self.place.desk.open > 0, 5)
            if not is_signal:
                last = [wire.frames[-1] for each in self.clients for wire in each.wires if wire.frames]
                self.hit["stream"] += any(frame.get("message_type") == "delta" for frame in last)
                self.hit["tool"] += self.place.desk.open > 0
            begin = time.monotonic()
            ending.set()
            ends = [signal.SIGTERM, signal.SIGINT]
            server.process.send_signal(ends[number % 2] if is_signal else signal.SIGKILL)
            await asyncio.to_thread(server.wait)
            if is_signal:
                self.note("end", begin)
            await asyncio.gather(*working)
        self.clean = is_signal
        self.compare_file()
        self.soak.step()

    def note(self, what: str, begin: float) -> None:
        self.slowest[what] = max(self.slowest[what], time.monotonic() - begin)

    async def load_agents(self, server: Serving, begin: float) -> None:
        async with client(server) as wire:
            await wire.ok("list_agents")
            self.note("restart", begin)
            for name in AGENTS:
                loaded = await wire.command("load_agent", name=name)
                if not loaded["ok"]:
                    self.soak.fault("agents that do not load", f"{name}: {loaded}")
                elif self.clean and loaded["result"]["repaired"]:
                    self.soak.fault("agents left to be repaired after a signal", f"{name}: {loaded}")

    def compare_file(self) -> None:
        """Right after a kill, before any server repairs: each acknowledged message is there once, each passage too."""
        with contextlib.closing(sqlite3.connect(self.place.path)) as connection:
            if (line := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
                self.soak.fault("damage in databases", line)
            sql = "SELECT turn_id, count(*) FROM messages WHERE role = 'user' AND text LIKE 'message %' GROUP BY 1"
            turns = dict(connection.execute(sql).fetchall())
            sql = "SELECT text, count(*) FROM memory WHERE store = 'archival' AND text LIKE 'passage%' GROUP BY 1"
            passages = dict(connection.execute(sql).fetchall())
        events = [event for log in self.logs for event in log.events.values()]
        starts = [event for event in events if event["type"] == "agent_response_start"]
        kept = {text for each in self.clients for text, is_acknowledged in each.passages.items() if is_acknowledged}
        for what in ({start["turn_id"] for start in starts} - turns.keys()) | (kept - passages.keys()):
            self.soak.fault("acknowledged, and lost by a kill", what)
        for what, count in [*turns.items(), *passages.items()]:
            if count != 1:
                self.soak.fault("messages doubled", f"{what}: {count}")

    async def finish(self) -> None:
        """At the end everything is done, and what is stored is what each client saw."""
        with self.place.serve(max_steps=6) as server:
            await asyncio.gather(*(each.work(server, None) for each in self.clients))
        with self.place.serve() as server:
            async with client(server, "*") as wire:
                for log in self.logs:
                    turns: dict[str, list[int]] = collections.defaultdict(list)
                    for seq, event in (await log.compare(wire)).items():
                        turns[event.get("turn_id", "")].append(seq)
                    for turn_id, view in [view for each in self.clients if each.log is log for view in each.views]:
                        if view != turns[turn_id]:
                            self.soak.fault("gaps in what is told or stored", f"{turn_id}: {view} of {turns[turn_id]}")


async def main(soak: Soak) -> None:
    count = soak.count + soak.count // 2
    soak.progress.total = count + sum(map(soak.part, CASES.values()))
    soak.none("acknowledged, and lost by a kill", "agents that do not load", "turns that end for no reason")
    soak.none("agents left to be repaired after a signal", "connections that break off", "cancels not understood")
    soak.none("senders without an answer, or without its id")
    model = Model(soak.seed)
    async with site(soak, model) as place:
        place.desk.answers = lambda question: 0.3 * random.Random(question).random()
        rounds = Rounds(soak, place)
        await rounds.make_agents()
        for number in range(count):
            await rounds.round(number)
        model.stalls = False
        place.desk.answers = lambda question: 0.05 * random.Random(question).random()
        await rounds.finish()
    cancels = [seconds for each in rounds.clients for seconds in each.cancels]
    soak.figure("slowest cancel, s", max(cancels, default=0.0), 1.0, is_time=True)
    soak.figure(
        "slowest restart, s, from the start of Python to an answer", rounds.slowest["restart"], 2.0, is_time=True
    )
    soak.figure("slowest end by a signal, s: the grace period", rounds.slowest["end"], memws.STOP_GRACE, is_time=True)
    soak.figure("kills in mid-stream", rounds.hit["stream"], soak.count // 10, least=True)
    soak.figure("kills in mid-tool", rounds.hit["tool"], soak.count // 2, least=True)
    events = [event for log in rounds.logs for event in log.events.values()]
    cut = sum(event.get("stop_reason") == "interrupted" for event in events)
    again = sum(each.again for each in rounds.clients)
    turns = sum(len(log.sent) for log in rounds.logs)
    soak.notes.append(f"turns: {turns:,}, interrupted {cut:,}, again {again:,}; tool calls {len(place.desk.calls):,}")
    soak.notes.append(
        f"cancels that came in time: {len(cancels):,}, half within {1000 * percentile(cancels, 0.5):.0f} ms"
    )


if __name__ == "__main__":
    run(main, WHAT, COUNT)
