"""Servers killed and stopped: python tests/soak/kills.py [--seed N] [--count N]

kill -9 at random points under eight clients that talk, keep passages and send again what they do not know to be done;
replies stream and tools work meanwhile. Half as often SIGTERM or SIGINT, to the command line and to a program with
tools: those servers end cleanly and in time. What was acknowledged is compared with what the next server has.
"""

import asyncio
import collections
import contextlib
import random
import signal
import sqlite3
import time
from dataclasses import replace

from soaking import GONE, Log, Site, Soak, client, run, site

# isort: split
from commandline import Serving
from endpoint import Body, Reply
from resends import CONFIG, Model
from wire import JSON, Wire, is_terminal

import memws

WHAT, COUNT = "kill -9, SIGTERM and SIGINT under eight clients", 200
AGENTS = ["sam", "ada", "bob", "eve"]
CLIENTS = 8


class Stalling(Model):
    """Stops in the middle of some answers, for good."""

    stalls = True

    def __call__(self, body: Body) -> Reply:
        reply = super().__call__(body)
        if self.stalls and self.rng.random() < 0.1:
            return replace(reply, stall_after=self.rng.randrange(4, 40))
        return reply


class Talker:
    """One client, which talks to an agent across servers, and what it was acknowledged."""

    def __init__(self, number: int, log: Log) -> None:
        self.number, self.log = number, log
        self.turns: list[str] = []
        self.started: set[str] = set()  # acknowledged: their start came
        self.over: set[str] = set()
        self.passages: dict[str, bool] = {}  # whether each was acknowledged
        self.again = 0  # times that a message was sent again
        self.streams = False  # the last frame was a piece of a reply

    def read(self, frame: JSON) -> None:
        self.streams = frame.get("message_type") == "delta"
        if frame["type"] == "agent_response_start":
            self.started.add(frame["turn_id"])
        if is_terminal(frame) and "seq" in frame:
            self.over.add(frame["turn_id"])
        self.log.keep(frame)

    async def talk(self, server: Serving) -> None:
        """Send until the connection is gone."""
        with contextlib.suppress(*GONE):
            async with client(server, "*") as wire:
                while True:
                    self.again += len(self.turns) > len(self.over)
                    await self.finish(wire)
                    self.turns.append(f"{self.number}-{len(self.turns)}")
                    self.log.message(self.turns[-1])
                    await self.finish(wire)
                    text = f"passage{self.number}x{len(self.passages)}"
                    self.passages[text] = False
                    await wire.ok("insert_passage", agent_name=self.log.name, text=text)
                    self.passages[text] = True

    async def finish(self, wire: Wire) -> None:
        """Send a message whose end did not come, for the first time or again, and read to its end."""
        for turn_id in [each for each in self.turns if each not in self.over]:
            await wire.say(self.log.sent[turn_id], agent_name=self.log.name, turn_id=turn_id)
            while turn_id not in self.over:
                self.read(await wire.receive())


def compare_file(place: Site, talkers: list[Talker]) -> None:
    """Right after a kill, before any server repairs: each acknowledged message is there once, each passage too."""
    with contextlib.closing(sqlite3.connect(place.path)) as connection:
        if (line := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            place.soak.fault("damage in databases", line)
        sql = "SELECT turn_id, count(*) FROM messages WHERE role = 'user' AND text LIKE 'message %' GROUP BY 1"
        turns = dict(connection.execute(sql).fetchall())
        sql = "SELECT text, count(*) FROM memory WHERE store = 'archival' AND text LIKE 'passage%' GROUP BY 1"
        passages = dict(connection.execute(sql).fetchall())
    for talker in talkers:
        acknowledged = {text for text, is_stored in talker.passages.items() if is_stored}
        for what in (talker.started - turns.keys()) | (acknowledged - passages.keys()):
            place.soak.fault("acknowledged, and lost by a kill", what)
    for what, count in [*turns.items(), *passages.items()]:
        if count != 1:
            place.soak.fault("messages doubled", f"{what}: {count}")


class Rounds:
    """Servers on one database, one after another, each ended at a random point under the clients."""

    def __init__(self, soak: Soak, place: Site) -> None:
        self.soak, self.place = soak, place
        self.logs = [Log(soak, name) for name in AGENTS]
        self.talkers = [Talker(number, self.logs[number % len(AGENTS)]) for number in range(CLIENTS)]
        self.hit: collections.Counter[str] = collections.Counter()
        self.slowest = {"restart": 0.0, "end": 0.0}
        self.clean = True  # the server before ended cleanly: there is nothing to repair

    async def make_agents(self) -> None:
        with self.place.serve() as server:
            async with client(server) as wire:
                for name in AGENTS:
                    await wire.ok("create_agent", config=CONFIG | {"name": name})

    def start(self, number: int, is_signal: bool) -> contextlib.AbstractContextManager[Serving]:
        """A program with tools, or the command line."""
        if is_signal and number % 12 < 6:
            flags = ("--model", "test-model", "--base-url", self.place.endpoint.url)
            return self.place.command_line(*flags, OPENAI_API_KEY="sk-x")
        return self.place.serve(killed=not is_signal)

    async def round(self, number: int) -> None:
        """Start a server, let the clients talk, end it: twice by a kill, then by a signal."""
        begin, is_signal = time.monotonic(), number % 3 == 2
        with self.start(number, is_signal) as server:
            await self.load_agents(server, begin)
            sessions = [asyncio.create_task(talker.talk(server)) for talker in self.talkers]
            await asyncio.sleep(0.05 + self.soak.rng.random() * 0.8)
            self.hit["stream"] += not is_signal and any(talker.streams for talker in self.talkers)
            self.hit["tool"] += not is_signal and self.place.desk.open > 0
            begin = time.monotonic()
            ends = [signal.SIGTERM, signal.SIGINT]
            server.process.send_signal(ends[number % 2] if is_signal else signal.SIGKILL)
            await asyncio.to_thread(server.wait)
            if is_signal:
                self.note("end", begin)
            await asyncio.gather(*sessions)
        self.clean = is_signal
        compare_file(self.place, self.talkers)
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

    async def finish(self) -> None:
        """At the end everything is finished, and all that was told is there."""
        with self.place.serve() as server:
            async with client(server, "*") as wire:
                for talker in self.talkers:
                    await talker.finish(wire)
                for log in self.logs:
                    await log.compare(wire)


async def main(soak: Soak) -> None:
    count = soak.count + soak.count // 2
    soak.total(count)
    soak.none(
        "acknowledged, and lost by a kill", "agents that do not load", "agents left to be repaired after a signal"
    )
    model = Stalling(soak.seed)
    async with site(soak, model) as place:
        place.desk.answers = lambda question: 0.3 * random.Random(question).random()
        rounds = Rounds(soak, place)
        await rounds.make_agents()
        for number in range(count):
            await rounds.round(number)
        model.stalls = False
        await rounds.finish()
    soak.within("slowest restart, s, from the start of Python to an answer", rounds.slowest["restart"], 2.0)
    soak.within("slowest end by a signal, s: the grace period", rounds.slowest["end"], memws.STOP_GRACE)
    soak.least("kills in mid-stream", rounds.hit["stream"], soak.count // 10)
    soak.least("kills in mid-tool", rounds.hit["tool"], soak.count // 10)
    events = [event for log in rounds.logs for event in log.events.values()]
    cut = {event["turn_id"] for event in events if event.get("stop_reason") == "interrupted"}
    turns, again = sum(len(log.sent) for log in rounds.logs), sum(talker.again for talker in rounds.talkers)
    soak.told("turns", f"{turns:,}, interrupted {len(cut):,}, again {again:,}; tool calls {len(place.desk.calls):,}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
