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
from pathlib import Path

from soaking import GONE, JSON, Desk, Soak, check_file, client, desk, folder, run, soak_server

# isort: split
from commandline import Serving
from endpoint import Body, Endpoint, Reply
from resends import Model
from wire import Wire, bare, events_of, is_terminal, messages_of

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


class Log:
    """What one client sent and was told."""

    def __init__(self, number: int, agent: str) -> None:
        self.number, self.agent = number, agent
        self.turns: dict[str, str] = {}
        self.started: set[str] = set()  # acknowledged: their start came
        self.over: set[str] = set()
        self.kept: dict[str, bool] = {}
        self.told: dict[int, JSON] = {}
        self.again = 0  # times that a message was sent again
        self.streams = False  # the last frame was a piece of a reply

    def read(self, frame: JSON, soak: Soak) -> None:
        self.streams = frame.get("message_type") == "delta"
        if frame["type"] == "agent_response_start":
            self.started.add(frame["turn_id"])
        if is_terminal(frame) and "seq" in frame:
            self.over.add(frame["turn_id"])
        if "seq" in frame:
            known = self.told.setdefault(frame["seq"], bare(frame))
            if known != bare(frame):
                soak.fault("told otherwise", f"{known} {frame}")

    async def talk(self, wire: Wire, soak: Soak) -> None:
        """Send until the connection is gone."""
        while True:
            turn_id = next((each for each in self.turns if each not in self.over), None)
            self.again += turn_id is not None
            if turn_id is None:
                turn_id = f"{self.number}-{len(self.turns)}"
                self.turns[turn_id] = f"message {turn_id}"
            await self.finish(wire, turn_id, soak)
            text = f"passage{self.number}x{len(self.kept)}"
            self.kept[text] = False
            await wire.ok("insert_passage", agent_name=self.agent, text=text)
            self.kept[text] = True

    async def finish(self, wire: Wire, turn_id: str, soak: Soak) -> None:
        """Send a message, for the first time or again, and read to its end."""
        await wire.say(self.turns[turn_id], agent_name=self.agent, turn_id=turn_id)
        while True:
            frame = await wire.receive()
            self.read(frame, soak)
            if is_terminal(frame):
                return


def compare_file(soak: Soak, path: Path, logs: list[Log]) -> None:
    """Right after a kill, before any server repairs: each acknowledged message is there once, each passage too."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        if (line := connection.execute("PRAGMA integrity_check").fetchone()[0]) != "ok":
            soak.fault("integrity", line)
        sql = "SELECT a.name, m.turn_id, count(*) FROM messages m JOIN agents a ON a.id = m.agent WHERE m.role = 'user'"
        sql += " AND m.text LIKE 'message %' GROUP BY 1, 2"
        stored = {(name, turn_id): count for name, turn_id, count in connection.execute(sql)}
        sql = "SELECT text, count(*) FROM memory WHERE store = 'archival' AND text LIKE 'passage%' GROUP BY 1"
        passages = dict(connection.execute(sql).fetchall())
    for log in logs:
        for turn_id in log.started:
            if (log.agent, turn_id) not in stored:
                soak.fault("lost", f"{log.agent} {turn_id}")
        for text, acknowledged in log.kept.items():
            if acknowledged and text not in passages:
                soak.fault("lost", text)
    for what, count in [*stored.items(), *passages.items()]:
        if count != 1:
            soak.fault("doubled", f"{what}: {count}")


async def session(soak: Soak, log: Log, server: Serving) -> None:
    with contextlib.suppress(*GONE):
        async with client(server, "*") as wire:
            await log.talk(wire, soak)


async def compare(soak: Soak, server: Serving, logs: list[Log]) -> None:
    """At the end everything is finished, and all that was told is there."""
    async with client(server, "*") as wire:
        for log in logs:
            for turn_id in [each for each in log.turns if each not in log.over]:
                await log.finish(wire, turn_id, soak)
        for name in AGENTS:
            mine = [log for log in logs if log.agent == name]
            try:
                events = {frame["seq"]: bare(frame) for frame in await events_of(wire, name)}
            except AssertionError as error:
                soak.fault("doubled", f"gaps: {error!r:.300}")
                continue
            for log in mine:
                for seq, frame in log.told.items():
                    if events.get(seq) != frame:
                        soak.fault("told otherwise", f"{name} {seq}: {frame} {events.get(seq)}")
            sent = sorted(turn_id for log in mine for turn_id in log.turns)
            starts = sorted(frame["turn_id"] for frame in events.values() if frame["type"] == "agent_response_start")
            ends = sorted(frame["turn_id"] for frame in events.values() if is_terminal(frame))
            if not starts == ends == sent:
                soak.fault("doubled", f"{name}: {len(starts)} starts and {len(ends)} ends of {len(sent)} turns")
            texts = sorted(await messages_of(wire, name))
            if texts != sorted(text for log in mine for text in log.turns.values()):
                soak.fault("lost", f"{name}: {len(texts)} messages of {len(sent)}")


def command_line(where: Path, endpoint: Endpoint) -> Serving:
    """A server as `python memws.py serve` starts it."""
    flags = ["--host", "127.0.0.1", "--model", "test-model", "--base-url", endpoint.url]
    return Serving(*flags, cwd=where, variables={"OPENAI_API_KEY": "sk-x"})


class Rounds:
    """Servers on one database, one after another, each ended at a random point under the clients."""

    def __init__(self, soak: Soak, where: Path, endpoint: Endpoint, opened: Desk, port: int) -> None:
        self.soak, self.where, self.endpoint, self.opened = soak, where, endpoint, opened
        self.options: JSON = {"model": "test-model", "api_key": "sk-x", "base_url": endpoint.url, "desk": port}
        self.logs = [Log(number, AGENTS[number % len(AGENTS)]) for number in range(CLIENTS)]
        self.hit: collections.Counter[str] = collections.Counter()
        self.slowest = {"restart": 0.0, "end": 0.0}
        self.clean = True  # the server before ended cleanly: there is nothing to repair

    async def make_agents(self) -> None:
        with soak_server(self.where, **self.options) as server:
            async with client(server) as wire:
                for name in AGENTS:
                    config = {"name": name, "tools": ["ask", "ask_later"], "context_window": 16_000}
                    await wire.ok("create_agent", config=config)
            server.end()

    async def round(self, number: int) -> None:
        """Start a server, let the clients talk, end it: twice by a kill, then by a signal."""
        soak, begin, signalled = self.soak, time.monotonic(), number % 3 == 2
        own = soak_server(self.where, **self.options)
        with command_line(self.where, self.endpoint) if number % 12 < 6 and signalled else own as server:
            async with client(server) as wire:
                await wire.ok("list_agents")
                self.slowest["restart"] = max(self.slowest["restart"], time.monotonic() - begin)
                for name in AGENTS:
                    if not (loaded := await wire.command("load_agent", name=name))["ok"]:
                        soak.fault("not loaded", f"{name}: {loaded}")
                    elif self.clean and loaded["result"]["repaired"]:
                        soak.fault("left to repair", f"{name}: {loaded['result']['repaired']}")
            sessions = [asyncio.create_task(session(soak, log, server)) for log in self.logs]
            await asyncio.sleep(0.05 + soak.rng.random() * 0.8)
            self.hit["stream"] += not signalled and any(log.streams for log in self.logs)
            self.hit["tool"] += not signalled and self.opened.open > 0
            begin = time.monotonic()
            ends = [signal.SIGTERM, signal.SIGINT]
            server.process.send_signal(ends[number % 2] if signalled else signal.SIGKILL)
            status = await asyncio.to_thread(server.wait)
            if signalled:
                self.slowest["end"] = max(self.slowest["end"], time.monotonic() - begin)
                if status != 0:
                    soak.fault("exit status", status)
            await asyncio.gather(*sessions)
        self.clean = signalled
        if "Traceback" in server.log:
            soak.fault("crash", server.log.partition("Traceback")[2][-500:])
        compare_file(soak, self.where / "memws.db", self.logs)
        soak.step()


async def main(soak: Soak) -> None:
    count = soak.count + soak.count // 2
    soak.total(count)
    with folder() as where, Endpoint() as endpoint:
        endpoint.default = model = Stalling(soak.seed)
        async with desk() as (opened, port):
            opened.answers = lambda question: 0.3 * random.Random(question).random()
            rounds = Rounds(soak, where, endpoint, opened, port)
            await rounds.make_agents()
            for number in range(count):
                await rounds.round(number)
            model.stalls = False
            with soak_server(where, **rounds.options) as server:
                await compare(soak, server, rounds.logs)
                if server.end() != 0:
                    soak.fault("crash", server.log[-500:])
            for question, calls in opened.calls.items():
                if calls > 1:
                    soak.fault("a tool called twice", question)
        with soak.expect("integrity", "the database"):
            check_file(where / "memws.db")
        for refusal in endpoint.refusals:
            soak.fault("a poisoned request", refusal)
    soak.none("acknowledged messages and passages lost", "lost")
    soak.none("doubled", "doubled")
    soak.none("agents that do not load", "not loaded")
    soak.none("agents left to be repaired after a signal", "left to repair")
    soak.none("integrity_check", "integrity")
    soak.none("events told otherwise later", "told otherwise")
    soak.none("tools called twice, poisoned requests", "a tool called twice", "a poisoned request")
    soak.none("crashes and tracebacks, exit status other than 0", "crash", "exit status")
    soak.within("slowest restart, s, from the start of Python to an answer", rounds.slowest["restart"], 2.0)
    soak.within("slowest end by a signal, s: the grace period", rounds.slowest["end"], memws.STOP_GRACE)
    soak.least("kills in mid-stream", rounds.hit["stream"], soak.count // 10)
    soak.least("kills in mid-tool", rounds.hit["tool"], soak.count // 10)
    told = [frame for log in rounds.logs for frame in log.told.values()]
    cut = {frame["turn_id"] for frame in told if frame.get("stop_reason") == "interrupted"}
    turns, again = sum(len(log.turns) for log in rounds.logs), sum(log.again for log in rounds.logs)
    soak.told("turns", f"{turns:,}, interrupted {len(cut):,}, sent again {again:,}; tool calls {len(opened.calls):,}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
