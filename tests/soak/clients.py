"""Clients cancel, leave and send again, servers are killed: python tests/soak/clients.py [--seed N] [--count N]

The clients of servers.py talk to agents of one database file, cancel, disconnect, send the same again, and go on with
the next server. The count is that of kill -9, at random points or while a tool is at work; half as often a signal ends
a server cleanly.
"""

import asyncio
import collections
import itertools
import random
import signal
import time

import soaking
from commandline import Serving
from measure import percentile
from servers import Fleet, Model
from soaking import Site, Soak, client, site, until

import memws

WHAT, COUNT = "cancels, disconnects and messages sent again under kill -9, SIGTERM and SIGINT", 200
CASES = {"cancels": 500, "disconnects": 500, "messages sent again": 1_000}  # of a full run
LOADS = "agents that do not load, or need a repair after a signal"


class Rounds(Fleet):
    """One server after another on one file, each ended at a random point; most have tools."""

    restless, longest_pause, follows = 0.3, 0.2, 1

    def __init__(self, soak: Soak, place: Site, model: Model) -> None:
        super().__init__(soak, place, servers=1, clients=10, agents=5)
        self.model, self.config = model, {"tools": ["ask", "ask_later"], "context_window": 16_000}
        self.ends |= {"bad_output"}  # some servers have not got the tools
        self.refusals |= {"cancelled"}  # by a server that stops
        self.hit: collections.Counter[str] = collections.Counter()
        self.slowest, self.numbers = {"restart": 0.0, "end": 0.0}, itertools.count()

    async def start(self) -> Serving:
        has_tools = next(self.numbers) % 12 not in (2, 5)
        return await self.place.start("--max-steps", "6", **({} if has_tools else {"desk": 0}))

    async def besiege(self) -> None:
        """Two servers of three are killed, the first of them in a tool; then all goes on until enough was tried."""
        count = self.soak.count + self.soak.count // 2
        self.soak.progress.total = count
        for number in range(count):
            await self.round(is_signal=number % 3 == 2, in_tool=number % 3 == 0)
            self.soak.step()
        self.model.stalls = 0
        self.place.desk.answers = lambda question: 0.05 * random.Random(question).random()
        await until(lambda: all(self.counts[what] >= self.soak.part(whole) for what, whole in CASES.items()), 600)

    async def round(self, is_signal: bool, in_tool: bool) -> None:
        (server,) = self.servers
        await asyncio.sleep(0.05 + self.rng.random() * 0.8)
        if in_tool:
            await until(lambda: self.place.desk.open > 0, 5)
        if not is_signal:
            self.hit["stream"] += any(each.frame.get("message_type") == "delta" for each in self.clients)
            self.hit["tool"] += self.place.desk.open > 0
        begin = time.monotonic()
        server.process.send_signal(self.rng.choice([signal.SIGTERM, signal.SIGINT]) if is_signal else signal.SIGKILL)
        await asyncio.to_thread(server.wait)
        self.note("end", begin if is_signal else time.monotonic())
        await self.place.end(server, killed=not is_signal)
        begin = time.monotonic()
        server = await self.start()
        async with client(server) as wire:
            await wire.ok("list_agents")
            self.note("restart", begin)
            for log in self.logs:
                loaded = await wire.command("load_agent", name=log.name)
                is_well = loaded["ok"] and not (is_signal and loaded["result"]["repaired"])
                self.soak.demand(is_well, LOADS, log.name, loaded)
        self.servers = [server]

    def note(self, what: str, begin: float) -> None:
        self.slowest[what] = max(self.slowest[what], time.monotonic() - begin)


async def main(soak: Soak) -> None:
    soak.none(LOADS)
    model = Model(soak, ["ask", "ask_later", "ask_later", "archival_memory_insert"], [0, 0, 0.02], stalls=0.1)
    async with site(soak, model) as place:
        place.desk.answers = lambda question: 0.3 * random.Random(question).random()
        rounds = Rounds(soak, place, model)
        await rounds.run()
    soak.figure("slowest cancel, s", max(rounds.cancels, default=0.0), 1.0, is_time=True)
    soak.figure("slowest restart, s, from Python's start to an answer", rounds.slowest["restart"], 2.0, is_time=True)
    soak.figure("slowest end by a signal, s: the grace period", rounds.slowest["end"], memws.STOP_GRACE, is_time=True)
    soak.figure("kills in mid-stream", rounds.hit["stream"], soak.count // 10, least=True)
    soak.figure("kills in mid-tool", rounds.hit["tool"], soak.count // 2, least=True)
    for what, whole in CASES.items():
        soak.figure(what, rounds.counts[what], soak.part(whole), least=True)
    half = 1000 * percentile(rounds.cancels, 0.5)
    soak.notes.append(f"cancels: half in time within {half:.0f} ms; tool calls: {len(place.desk.calls):,}")


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
