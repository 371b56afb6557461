"""Several servers on one PostgreSQL database, killed and paused: python tests/soak/servers.py [--seed N] [--count N]

Clients follow the agents that they talk to, cancel some turns, and come back to any server, as behind a proxy, when
they lose theirs. The count is that of kill -9 of servers, which are started again at once; some are stopped for longer
than their leases last and go on then; and the database is restarted without warning.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import random
import re
import signal
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import soaking
from commandline import Serving
from endpoint import Body, Reply, Request
from measure import percentile
from postgres import Cluster
from soaking import GONE, Log, Site, Soak, client, site, until
from wire import EVENTS, JSON, Wire, beside, is_terminal

WHAT, COUNT = "kill -9 of servers that share a database, pauses, restarts of the database", 40
SERVERS, CLIENTS, AGENTS, PAUSES, RESTARTS = (3, 2), (24, 4), (60, 6), (4, 1), (2, 1)
"""How many of each a full run has, and any at least."""
OPTIONS = ("--context-window", "12000", "--max-steps", "6")
LEASE = 3.0  # seconds after which a server that is paused has lost its agents
PATIENCE = 4.0, 30.0  # seconds without an end after which clients try another server; longer nobody need wait
TAKEOVER = 5.0
GRACE = 0.1  # seconds in which the endpoint hears that a client has left

AGENTS_SQL = "SELECT name, owner, last_seq FROM agents WHERE deleted IS NULL"
PASSAGES_SQL = "SELECT text, count(*) FROM memory WHERE store = 'archival' AND text LIKE 'passage%' GROUP BY text"


class Model:
    """Answers at random after a while, sometimes with tools first; sees which requests are open, by agent.

    tools: of which it calls up to three at once; delays: seconds; stalls: how often an answer stops for good.
    """

    def __init__(self, soak: Soak, tools: Sequence[str], delays: Sequence[float], stalls: float = 0) -> None:
        self.soak, self.tools, self.delays, self.stalls = soak, tools, delays, stalls
        self.rng = random.Random(f"model {soak.seed}")
        self.fresh = itertools.count(1)
        self.open: dict[str, dict[int, tuple[str, float]]] = collections.defaultdict(dict)  # whose, and since when
        self.paused: dict[str, float] = {}  # by the key of a server: when it was stopped last

    def __call__(self, body: Body) -> Reply:
        more: JSON = {"delay": self.rng.choice(self.delays), "chunk": 4}
        if "tools" not in body:
            return Reply("They talked.", **more)
        if self.rng.random() < self.stalls:
            more["stall_after"] = self.rng.randrange(4, 40)
        asks = self.rng.choice([0, 0, 1, 1, 2, 3]) if body["messages"][-1]["role"] == "user" else 0
        calls: list[Any] = []
        for tool in self.rng.choices(self.tools, k=asks):
            name = "content" if tool == "archival_memory_insert" else "question"
            calls.append((tool, {name: f"q{next(self.fresh)}", "request_heartbeat": True}))
        message = "A reply that comes piece by piece, so that a client may leave. " * self.rng.randrange(1, 8)
        return Reply("I see.", calls=calls or [("send_message", {"message": message})], **more)

    def watch(self, request: Request, is_over: bool) -> None:
        """Two servers ask for one agent at once only where one was paused, which goes on with what it had begun."""
        named = re.findall(rb"of (agent-\d+)", request.raw)
        open_ones, key, now = self.open[str(named[-1:])], request.headers["authorization"], time.monotonic()
        if is_over or not named:
            open_ones.pop(id(request), None)
            return
        for number, (other, since) in open_ones.items():
            if self.paused.get(other, 0.0) <= since:
                asyncio.get_running_loop().call_later(GRACE, self._judge, open_ones, {number, id(request)}, key, other)
        open_ones[id(request)] = key, now

    def _judge(self, open_ones: dict[int, tuple[str, float]], both: set[int], *keys: str) -> None:
        if both <= open_ones.keys():
            self.soak.fault("model requests of one agent at once", f"of the servers {keys}")


class Takeover(NamedTuple):
    """An agent that lost its server while a client waits for it at another one."""

    victim: Serving
    begin: float
    floor: int  # the last seq that the victim has stored


class Fleet:
    """Servers of one database, the clients that talk to its agents, and what was said.

    How a server is started, `start`, and what befalls it, `besiege`, those say that derive from it.
    """

    restless, longest_pause, follows = 0.1, 1.0, 5
    """How often a client cancels or leaves while it waits; its longest pause; how many more agents it follows."""

    def __init__(self, soak: Soak, place: Site, servers: int, clients: int, agents: int) -> None:
        self.soak, self.place, self.rng, self.size = soak, place, soak.rng, servers
        soak.none("clients that wait too long", "commands that are refused", "passages lost or doubled")
        self.logs = [Log(soak, f"agent-{number}") for number in range(agents)]
        self.clients = [Client(self, number, clients) for number in range(clients)]
        self.servers: list[Serving] = []
        self.config: JSON = {}  # of all agents
        self.refusals = {"store_failed"}  # why a message may become no turn, and a command fail
        self.ends = self.refusals | {"done", "interrupted", "superseded", "max_steps"}
        self.counts: collections.Counter[str] = collections.Counter()
        self.cancels: list[float] = []  # seconds until a cancelled turn had its end
        self.over = False  # there will be no more messages

    def hear(self, told: Client, name: str, seq: int) -> None:
        """A client was told an event."""

    async def query(self, sql: str) -> list[Any]:
        def ask() -> list[Any]:
            with beside(self.place.path) as database:
                return list(database.execute(sql).fetchall())

        return await asyncio.to_thread(ask)

    async def run(self) -> None:
        """Make the agents, let the clients talk to them while servers come and go, and look at what is left."""
        self.servers = [await self.start() for _ in range(self.size)]
        async with client(self.servers[0]) as wire:
            for log in self.logs:
                await wire.ok("create_agent", config={"name": log.name, **self.config})
        working = [asyncio.create_task(each.work()) for each in self.clients]
        await self.besiege()
        self.over = True
        _, late = await asyncio.wait(working, timeout=3 * max(PATIENCE))
        for task in late:
            task.cancel()
        for each in self.clients:
            self.soak.demand(not each.open, "messages without an end", *each.open, each.frame)
        await asyncio.gather(*working, return_exceptions=bool(late))
        await self.compare()
        events = [event for log in self.logs for event in log.events.values()]
        cut = sum(event.get("stop_reason") == "interrupted" for event in events)
        turns = sum(len(log.sent) for log in self.logs)
        self.soak.notes.append(f"turns: {turns:,}, interrupted {cut:,}; events {len(events):,}; {dict(self.counts)}")

    async def compare(self) -> None:
        """What is stored is what each client was told; turns do not overlap; what was acknowledged is there once."""
        async with client(self.servers[-1], "*") as wire:
            for log in self.logs:
                running = ""
                for seq, event in (await log.compare(wire)).items():
                    is_start = event["type"] == "agent_response_start"
                    overlaps = is_start and running
                    self.soak.demand(not overlaps, "turns of one agent that overlap", log.name, seq, running, event)
                    if is_start or is_terminal(event):
                        running = event["turn_id"] if is_start else ""
        found = dict(await self.query(PASSAGES_SQL))
        for text, is_acknowledged in [item for each in self.clients for item in each.passages.items()]:
            is_right = found.get(text, 0) in ({1} if is_acknowledged else {0, 1})
            self.soak.demand(is_right, "passages lost or doubled", text, found.get(text, 0), is_acknowledged)


class Sharing(Fleet):
    """Servers of a PostgreSQL database, which are killed and paused; now and then the database is restarted."""

    def __init__(self, soak: Soak, place: Site, model: Model, cluster: Cluster) -> None:
        super().__init__(soak, place, soak.part(*SERVERS), soak.part(*CLIENTS), soak.part(*AGENTS))
        self.model, self.cluster = model, cluster
        self.keys: dict[Serving, str] = {}
        self.pending: dict[tuple[Client, str], Takeover] = {}  # by agent and who waits for it
        self.takeovers: list[float] = []
        self.stopped: set[Serving] = set()  # those that are paused now
        self._resuming: set[asyncio.Task[None]] = set()

    async def start(self) -> Serving:
        key = f"sk-{len(self.keys)}"
        server = await self.place.start(*OPTIONS, desk=0, variables={"OPENAI_API_KEY": key})
        self.keys[server] = f"Bearer {key}"
        return server

    async def besiege(self) -> None:
        """Let everything happen, in any order, now and then before the last is over."""
        pauses, restarts = self.soak.part(*PAUSES), self.soak.part(*RESTARTS)
        faults = [self.kill] * self.soak.count + [self.pause] * pauses + [self.restart] * restarts
        self.rng.shuffle(faults)
        self.soak.progress.total = len(faults)
        for fault in faults:
            if self.rng.random() < 0.7:
                await until(lambda: not self.pending, 2 * TAKEOVER)
            await asyncio.sleep(self.rng.uniform(0.2, 2.0))
            await fault()
            self.soak.step()
        await until(lambda: not self.pending, 2 * TAKEOVER)
        self.forget()
        await asyncio.gather(*self._resuming)

    async def kill(self) -> None:
        """Kill a server, which may be paused, and start another in its place."""
        place = self.rng.randrange(len(self.servers))
        await self.strike(self.servers[place], signal.SIGKILL)
        await self.place.end(self.servers[place], killed=True)
        self.servers[place] = await self.start()

    async def pause(self) -> None:
        server = self.rng.choice(self.servers)
        self.model.paused[self.keys[server]] = time.monotonic()
        self.stopped.add(server)
        await self.strike(server, signal.SIGSTOP)

        async def resume() -> None:
            await asyncio.sleep(LEASE + self.rng.uniform(0.5, 3.0))
            server.process.send_signal(signal.SIGCONT)
            self.stopped.discard(server)

        self._resuming.add(asyncio.create_task(resume()))

    async def restart(self) -> None:
        self.forget()
        await asyncio.to_thread(self.cluster.stop)
        await asyncio.to_thread(self.cluster.start)
        self.forget()

    async def strike(self, server: Serving, number: signal.Signals) -> None:
        """Send a signal, and note which agents others have to take over because somebody waits for them."""
        self.forget()
        owned = {name for name, owner, _ in await self.query(AGENTS_SQL) if owner.startswith(f"{server.url}#")}
        begin = time.monotonic()
        server.process.send_signal(number)
        if number == signal.SIGKILL:
            await asyncio.to_thread(server.wait)
        for name, _, last_seq in await self.query(AGENTS_SQL):
            for each in self.clients if name in owned else ():
                if each.server not in {server, *self.stopped} and name in each.waits():
                    self.pending[each, name] = Takeover(server, begin, last_seq)

    def hear(self, told: Client, name: str, seq: int) -> None:
        """A client was told an event: of the new server, or one that the victim had stored."""
        if takeover := self.pending.get((told, name)):
            is_taken = seq > takeover.floor and told.server is not takeover.victim
            if is_taken:
                self.takeovers.append(time.monotonic() - takeover.begin)
            if is_taken or name not in told.waits():
                del self.pending[told, name]

    def forget(self) -> None:
        """What comes now may hold up a takeover that is not late yet."""
        waited = [time.monotonic() - takeover.begin for takeover in self.pending.values()]
        self.takeovers += [seconds for seconds in waited if seconds > TAKEOVER]
        self.pending.clear()


class Client:
    """One client, which follows its agents and talks to them, at one server after another."""

    def __init__(self, fleet: Fleet, number: int, clients: int) -> None:
        self.fleet, self.soak, self.number = fleet, fleet.soak, number
        self.rng = random.Random(f"{fleet.soak.seed} client {number}")
        own = set(fleet.logs[number::clients])
        own.update(self.rng.sample(fleet.logs, min(fleet.follows, len(fleet.logs))))
        self.logs = {log.name: log for log in sorted(own, key=lambda log: log.name)}
        self.last = dict.fromkeys(self.logs, 0)  # the newest seq that it was told
        self.fresh = itertools.count(1)
        self.open: dict[str, Log] = {}  # by turn_id: messages whose end it was not told
        self.cancelled: set[str] = set()
        self.cancels: dict[str, float] = {}  # when each was cancelled on this connection
        self.frame: JSON = {}  # what it was told last
        self.passages: dict[str, bool] = {}  # whether each was acknowledged
        self.server: Serving | None = None
        self.marks: dict[str, str] = {}  # of what it waits for on this connection: the turn_id by the id

    def waits(self) -> set[str]:
        return {self.open[turn_id].name for turn_id in self.marks.values()}

    async def work(self) -> None:
        """Go on until all is said and has its end."""
        while self.open or not self.fleet.over:
            self.server, patience = self.rng.choice(self.fleet.servers), self.rng.choice(PATIENCE)
            with contextlib.suppress(*GONE):
                async with asyncio.timeout(patience) as limit:
                    async with client(self.server, "*", open_timeout=PATIENCE[0], close_timeout=1) as wire:
                        for name in self.logs:
                            await self.ask(wire, "subscribe", agent_name=name, after=self.last[name])
                        while self.open or not self.fleet.over:
                            limit.reschedule(asyncio.get_running_loop().time() + patience)
                            await self.talk(wire)
            if limit.expired() and patience == max(PATIENCE):
                self.soak.fault("clients that wait too long", f"{self.number}: {self.marks}")
            self.marks.clear()
            self.cancels.clear()
            await asyncio.sleep(self.rng.random() / 4)

    async def ask(self, wire: Wire, command: str, **fields: Any) -> None:
        """Send a command that works. Raises ConnectionError where the database is away."""
        mark = await wire.request(command, **fields)
        while (frame := await wire.receive()).get("id") != mark:
            self.hear(frame)
        self.hear(frame)
        if not frame["ok"]:
            raise ConnectionError(frame["status"])

    async def talk(self, wire: Wire) -> None:
        """Say what has no end yet, and more, and wait for all of it; now and then cancel, or keep a passage."""
        wire.frames.clear()
        self.fleet.counts["messages sent again"] += len(self.open)
        if self.rng.random() < 0.1:
            text = f"passage{self.number}x{len(self.passages)}"
            self.passages[text] = False
            await self.ask(wire, "insert_passage", agent_name=self.rng.choice([*self.logs]), text=text)
            self.passages[text] = True
        fresh = 0 if self.fleet.over or len(self.open) > 2 else self.rng.choice([1, 1, 2, 3])
        for log in self.rng.choices([*self.logs.values()], k=fresh):
            self.open[log.message(f"{self.number}-{next(self.fresh)}")[0]] = log
        for turn_id, log in self.open.items():
            way = self.rng.choice(["queue"] * 9 + ["interrupt"])
            mark = await wire.say(log.sent[turn_id], agent_name=log.name, turn_id=turn_id, when_busy=way)
            self.marks[mark] = turn_id
        if self.marks and self.rng.random() < self.fleet.restless:
            turn_id = self.rng.choice([*self.open])
            self.cancelled.add(turn_id)
            await asyncio.sleep(self.rng.random() / 2)
            self.cancels[turn_id] = time.monotonic()
            await wire.request("cancel", agent_name=self.open[turn_id].name, turn_id=turn_id)
            self.fleet.counts["cancels"] += 1
        if self.marks and self.rng.random() < self.fleet.restless:
            for _ in range(self.rng.randrange(100)):
                if self.marks:
                    self.hear(await wire.receive())
            wire.websocket.transport.abort()
            self.fleet.counts["disconnects"] += 1
        while self.marks:
            self.hear(await wire.receive())
        await asyncio.sleep(self.fleet.longest_pause * self.rng.random())

    def hear(self, frame: JSON) -> None:
        """Take note of a frame. Raises ConnectionError for a subscription that ends because the database is away.

        Stored events come one after another; those of a turn that was said again may come again.
        """
        self.frame, is_stored = frame, frame["type"] in EVENTS and "seq" in frame
        if is_stored:
            name, seq = frame["agent_name"], frame["seq"]
            is_next = seq <= self.last[name] + 1
            self.soak.demand(is_next, "gaps in what is told or stored", name, "after", self.last[name], frame)
            self.last[name] = max(seq, self.last[name])
            self.logs[name].keep(frame)
        elif not frame.get("ok", True):
            is_known = frame["error"]["code"] in {"unknown_turn", *self.fleet.refusals}
            self.soak.demand(is_known, "commands that are refused", frame)
        if is_terminal(frame) and "id" in frame:
            self.end(frame)
        elif is_terminal(frame) and not is_stored:
            raise ConnectionError(frame["message"])
        if is_stored:
            self.fleet.hear(self, name, seq)

    def end(self, frame: JSON) -> None:
        """Exactly one frame ends what was said, or says why it was not taken."""
        turn_id = self.marks.pop(frame["id"], "")
        self.soak.demand(turn_id, "ends told twice", frame)
        if turn_id in self.cancels:
            self.fleet.cancels.append(time.monotonic() - self.cancels.pop(turn_id))
        expected = self.fleet.ends if "seq" in frame else self.fleet.refusals
        expected = expected | ({"cancelled"} if turn_id in self.cancelled else set())
        reason = frame.get("code") or frame["stop_reason"]
        self.soak.demand(reason in expected or not turn_id, "turns that end for no reason", frame)
        if "seq" in frame and reason in expected:
            self.open.pop(turn_id, None)


async def main(soak: Soak) -> None:
    soak.none("model requests of one agent at once")
    model = Model(soak, ["archival_memory_insert"], [0.0, 0.1, 0.3, 1.0, 2.0])
    with Cluster() as cluster:
        async with site(soak, model) as place:
            place.endpoint.watch, place.path = model.watch, cluster.database()
            fleet = Sharing(soak, place, model, cluster)
            await fleet.run()
    soak.figure("slowest takeover, s", max(fleet.takeovers, default=0.0), TAKEOVER, is_time=True)
    soak.notes.append(f"takeovers: {len(fleet.takeovers)}, half within {percentile(fleet.takeovers, 0.5):.2f} s")


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
