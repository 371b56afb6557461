"""What the soak scripts share: a run and its figures, servers, what those ask, clients, and what these were told.

Linux only: memory, descriptors and threads are read in /proc.
"""
# ruff: noqa: E402 (scripts find the module and the helpers of the tests by the path that is set first)

import argparse
import asyncio
import collections
import contextlib
import json
import random
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from commandline import Process, Serving, environment
from endpoint import Answer, Endpoint
from measure import Progress, machine, percentile
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from wire import JSON, UPGRADE, Wire, bare, beside, events_of, is_terminal, messages_of, wire

import memws

GONE = (ConnectionClosed, InvalidHandshake, OSError)  # what a client meets when its server has died
SERVER = Path(__file__).with_name("serving.py")


class Soak:
    """One run: its seed and count, its progress on standard error, its figures on standard output."""

    def __init__(self, what: str, full: int, count: int | None = None, seed: int = 1) -> None:
        self.what, self.seed, self.full = what, seed, full
        self.count = full if count is None else count
        self.rng = random.Random(seed)
        self.faults: dict[str, list[str]] = collections.defaultdict(list)  # by kind; of each kind there must be none
        self.missed: list[str] = []  # figures that are missed, but for times, which depend on what else runs
        self.notes: list[str] = []  # lines of the summary that ask for nothing
        self.progress = Progress(self.count)
        self._figures: list[tuple[str, str, str, bool]] = []
        self._started = time.monotonic()

    def part(self, whole: int, least: int = 1) -> int:
        """A number of the table, in proportion to --count."""
        return max(least, round(whole * self.count / self.full))

    def step(self, steps: float = 1) -> None:
        self.progress.step("with faults" if any(self.faults.values()) else "no faults", steps)

    def none(self, *kinds: str) -> None:
        """Figures: no fault of each of these kinds."""
        for kind in kinds:
            self.faults.setdefault(kind, [])

    def fault(self, kind: str, detail: object) -> None:
        self.faults[kind].append(str(detail)[:2_000])

    def demand(self, right: object, kind: str, *details: object) -> None:
        """A figure: nothing of this kind is not right."""
        self.none(kind)
        if not right:
            self.fault(kind, " ".join(map(str, details)))

    def figure(self, what: str, value: float, limit: float, *, least: bool = False, is_time: bool = False) -> None:
        """A figure: a value that is at most, or at `least`, the limit."""
        good, wanted = value >= limit if least else value <= limit, f"{'>=' if least else '<='} {limit:,.4g}"
        self._figures.append((what, f"{value:,.4g}", wanted, good))
        if not good and not is_time:
            self.missed.append(f"{what}: {value:,.4g}, wanted {wanted}")

    def finish(self) -> int:
        """Print the summary; the exit status, 1 when a figure is missed."""
        self.progress.end()
        for kind, faults in self.faults.items():
            self.figure(kind, len(faults), 0)
            examples = collections.Counter(faults).most_common(3)
            self.notes += [f"{kind} ({times} x): {detail}" for detail, times in examples]
        passed = all(good for *_, good in self._figures)
        small = "" if self.count >= self.full else f" (a small run: the figure asks for {self.full:,})"
        print(f"{self.what}: {'passed' if passed else 'MISSED'}\n  {machine()}")
        print(f"  seed {self.seed}, count {self.count:,}{small}, {time.monotonic() - self._started:.1f} s")
        for what, value, wanted, good in self._figures:
            print(f"  {what:58} {value:>9}  {wanted:9} {'ok' if good else 'MISSED'}")
        for note in self.notes:
            print(f"  {note}")
        return 0 if passed else 1


def run(main: Callable[[Soak], Coroutine[Any, Any, None]], what: str, full: int) -> None:
    """Run a script; its exit status is 1 when a figure is missed."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seed", type=int, default=1, help="what the run draws at random from (1)")
    parser.add_argument("--count", type=int, default=full, help=f"how many cases; the figure asks for {full:,}")
    given = parser.parse_args()
    soak = Soak(what, full, given.count, given.seed)

    async def until_ended() -> None:
        """What a run has started is ended also where it is told to end itself."""
        task = asyncio.ensure_future(main(soak))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await task

    asyncio.run(until_ended())
    sys.exit(soak.finish())


async def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait for what no event tells; whether it came about in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def check_database(address: str | Path, *, gapless: bool = True) -> None:
    """The database is whole, each turn in it has one start and at most one end, and no seq is missing."""
    assert list(memws.check_database(str(address))) == []
    with beside(str(address)) as connection:
        for kinds in (("agent_response_start",) * 2, ("agent_response_end", "agent_response_error")):
            sql = "SELECT count(*) FROM events WHERE kind IN (?, ?) GROUP BY agent, turn_id"
            assert {count for (count,) in connection.execute(sql, kinds)} <= {1}
        sql = "SELECT id, last_seq FROM agents WHERE deleted IS NULL OR deleted <> ''"
        for agent, last_seq in connection.execute(sql).fetchall():
            seqs = connection.execute("SELECT seq FROM events WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
            assert [seq for (seq,) in seqs] == list(range(1, last_seq + 1)) or not gapless


class Desk:
    """Where the tools `ask` and `ask_later` of servers ask: counts the calls, answers each when told to."""

    def __init__(self) -> None:
        self.port = 0
        self.calls: collections.Counter[str] = collections.Counter()
        self.open = 0  # calls that wait for their answer
        self.answers: Callable[[str], float | None] = lambda question: 0.0  # seconds until the answer; None: never
        self.says: Callable[[str], str] = "asked {}".format
        self.came = asyncio.Condition()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            question = (await reader.readline()).decode().strip()
            if not question:  # cancelled before it had asked
                return
            async with self.came:
                self.calls[question] += 1
                self.came.notify_all()
            leaving = asyncio.ensure_future(reader.read())
            self.open += 1
            await asyncio.wait({leaving}, timeout=self.answers(question))
            self.open -= 1
            if not leaving.done():
                writer.write(f"{self.says(question)}\n".encode())
            leaving.cancel()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        async with await asyncio.start_server(self, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self


def process(where: Path, *flags: str, variables: Mapping[str, str] | None = None, **added: Any) -> Serving:
    """A server process in this folder, with what is `added`; see serving.py."""
    variables = {"OPENAI_API_KEY": "sk-x", "SOAK": json.dumps(added), **(variables or {})}
    return Serving("--host", "127.0.0.1", *flags, cwd=where, program=SERVER, variables=variables)


class Site:
    """A folder with a database that servers of a run serve, one after another, and what those ask: models and tools."""

    def __init__(self, soak: Soak, where: Path, endpoint: Endpoint, desk: Desk, *flags: str) -> None:
        self.soak, self.where, self.endpoint, self.desk, self.flags = soak, where, endpoint, desk, flags
        self.path = str(where / "memws.db")
        self.gapless = True  # names are not used again, whose seqs would go on
        self.running: list[Serving] = []
        self.processes = contextlib.ExitStack()

    async def start(self, *flags: str, **options: Any) -> Serving:
        """A server process, see above, which goes on until `end` or until the site's end."""
        server = process(self.where, "--db", self.path, *self.flags, *flags, **({"desk": self.desk.port} | options))
        await asyncio.to_thread(self.processes.enter_context, server)
        if not server.url:
            server.wait()
            raise RuntimeError(f"the server did not start: {server.log}")
        self.running.append(server)
        return server

    async def end(self, server: Serving, *, killed: bool = False) -> None:
        """End a server if it still runs; it ends cleanly, unless it was killed, and has logged no traceback."""
        self.running.remove(server)
        status = await asyncio.to_thread(server.end if server.process.poll() is None else server.wait)
        is_clean = status == (-signal.SIGKILL if killed else 0)
        self.soak.demand(is_clean, "servers that crash", f"exit status {status}: {server.log[-500:]}")
        for part in server.log.split("Traceback")[1:]:
            self.soak.fault("tracebacks in logs", part[:1_500])

    async def check(self) -> None:
        """End all servers; then all of it is as it should be."""
        for server in list(self.running):
            await self.end(server)
        for refusal in self.endpoint.refusals:
            self.soak.fault("requests that a strict endpoint refuses", refusal)
        for question, calls in self.desk.calls.items():
            self.soak.demand(calls == 1, "tools called twice for one call", question)
        try:
            check_database(self.path, gapless=self.gapless)
        except (AssertionError, sqlite3.Error) as error:
            self.soak.fault("damage in databases", repr(error))


@contextlib.asynccontextmanager
async def site(soak: Soak, model: Answer | None = None, **options: Any) -> AsyncIterator[Site]:
    """A site whose endpoint answers as `model` does, or whose servers are offline; at its end it is checked."""
    soak.none("servers that crash", "tracebacks in logs", "requests that a strict endpoint refuses")
    soak.none("tools called twice for one call", "damage in databases")
    with tempfile.TemporaryDirectory(prefix="memws-soak-") as name, Endpoint(**options) as endpoint:
        endpoint.default = model or endpoint.default
        flags = ("--model", "test-model", "--base-url", endpoint.url) if model else ("--model", "offline")
        async with Desk().opened() as desk:
            place = Site(soak, Path(name), endpoint, desk, *flags)
            with place.processes:
                yield place
                await place.check()


def client(server: Any, *types: str, **options: Any) -> contextlib.AbstractAsyncContextManager[Wire]:
    return wire(server, *types, checks=False, **({"ping_interval": None} | options))


async def narrow_socket(port: int) -> socket.socket:
    """A connected socket into which next to nothing fits that is not read."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    line.setblocking(False)
    await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", port))
    return line


def handshake(*headers: str, line: str = "GET / HTTP/1.1") -> bytes:
    return "\r\n".join([line, *headers, *UPGRADE, "", ""]).encode("latin-1", "replace")


READS: list[tuple[str, JSON]] = [
    ("get_agent", {}), ("get_context", {}), ("get_messages", {"limit": 200}), ("list_agents", {}),
    ("search_memory", {"query": "secret canary otters", "limit": 50}),
    ("search_memory", {"query": "canary", "store": "archival", "limit": 50}),
    ("subscribe", {"after": 0}), ("unsubscribe", {}),
]  # fmt: skip


async def read_all(wire: Wire, agent: str) -> None:
    """Ask for all that a client can ask of an agent; what comes is in `frames`."""
    for command, fields in READS:
        await wire.command(command, agent_name=agent, **fields)
    steps = dict.fromkeys((frame.get("turn_id"), frame.get("step")) for frame in wire.frames)
    for turn_id, step in [each for each in steps if all(each)][:200]:
        await wire.command("get_request", agent_name=agent, turn_id=turn_id, step=step)


def stored(frames: list[JSON]) -> dict[int, JSON]:
    return {frame["seq"]: bare(frame) for frame in frames if "seq" in frame}


class Log:
    """What clients sent to an agent and were told by it, to be compared with what it has stored."""

    def __init__(self, soak: Soak, name: str) -> None:
        soak.none("gaps in what is told or stored")
        self.soak, self.name = soak, name
        self.sent: dict[str, str] = {}  # texts by turn_id
        self.events: dict[int, JSON] = {}  # stored ones by seq

    def message(self, turn_id: str, text: str = "message") -> tuple[str, str]:
        self.sent[turn_id] = f"{text} {turn_id} of {self.name}"
        return turn_id, self.sent[turn_id]

    def keep(self, *frames: JSON) -> None:
        """Note what a client was told; the same seq is never told otherwise."""
        for seq, event in stored([frame for frame in frames if frame.get("agent_name") == self.name]).items():
            known = self.events.setdefault(seq, event)
            self.soak.demand(known == event, "events told otherwise later", known, event)

    async def compare(self, wire: Wire) -> dict[int, JSON]:
        """What is stored: all that was told, each message once, each turn with one start and one end, nothing else."""
        try:
            events = stored(await events_of(wire, self.name))
        except AssertionError as error:
            self.soak.fault("gaps in what is told or stored", f"{self.name}: {error!r:.300}")
            return {}
        for seq, event in self.events.items():
            found = events.get(seq)
            self.soak.demand(found == event, "events told otherwise later", self.name, seq, event, found)
        texts, sent = collections.Counter(await messages_of(wire, self.name)), collections.Counter(self.sent.values())
        for kind, difference in (("messages lost", sent - texts), ("messages doubled", texts - sent)):
            self.soak.demand(not difference, kind, self.name, *difference)
        starts = sorted(event["turn_id"] for event in events.values() if event["type"] == "agent_response_start")
        ends = sorted(event["turn_id"] for event in events.values() if is_terminal(event))
        counts = f"{self.name}: {len(starts)} starts and {len(ends)} ends of {len(self.sent)}"
        is_whole = starts == ends == sorted(self.sent)
        self.soak.demand(is_whole, "turns without exactly one start and terminal frame", counts)
        return events


@contextlib.contextmanager
def healthy_client(place: Site, server: Serving, token: str = "") -> Iterator[None]:
    """A healthy client in a process of its own, which asks all the time; how long its answers took are figures."""
    words = sys.executable, __file__, server.url, token
    with Process(*words, cwd=place.where, variables=environment()) as process:  # its first line: it is connected
        yield
        times = json.loads(process.ask() or "[]")
    place.soak.demand(times, "healthy clients that fail", process.log)
    place.soak.figure("healthy client's p99, ms", 1000 * percentile(times, 0.99), 100, is_time=True)
    place.soak.figure("healthy client's slowest answer, ms", 1000 * max(times, default=9.0), 1000, is_time=True)
    place.soak.notes.append(f"healthy client's answers: {len(times):,}")


async def probe(url: str, token: str) -> None:
    """The process of a healthy client: it prints a line once it is connected, and its times when it is asked."""
    times, over = list[float](), asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with client(SimpleNamespace(url=url), additional_headers=headers) as asking:
        await asking.ok("create_agent", config={"name": "healthy-probe"})
        print(flush=True)
        while not over.is_set():
            for command in ("get_agent", "hello", "list_agents", "get_agent", "get_messages"):
                begin = time.monotonic()
                await asking.ok(command, **({"limit": 5} if command in ("list_agents", "get_messages") else {}))
                times.append(time.monotonic() - begin)
                await asyncio.sleep(0.02)
            asking.frames.clear()
    print(json.dumps(times))


if __name__ == "__main__":
    asyncio.run(probe(*sys.argv[1:]))
