"""What the soak scripts share: a run and its figures, servers, what those ask, clients, and what these were told.

Linux only: memory, descriptors and threads are read in /proc. `python soaking.py serve` and `python soaking.py probe`
are the processes that the scripts start.
"""
# ruff: noqa: E402 (scripts find the module and the helpers of the tests by the path that is set first)

import argparse
import asyncio
import collections
import contextlib
import functools
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from commandline import Serving
from endpoint import Answer, Endpoint
from measure import Progress, machine, percentile
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from wire import JSON, UPGRADE, Wire, bare, beside, events_of, is_terminal, messages_of, wire

import memws

GONE = (ConnectionClosed, InvalidHandshake, OSError)  # what a client meets when its server has died


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

    def fault(self, kind: str, detail: object) -> None:
        """Note that a figure is missed, and by what."""
        self.faults[kind].append(str(detail)[:2_000])

    def none(self, *kinds: str) -> None:
        """Figures: no fault of each of these kinds."""
        for kind in kinds:
            self.faults.setdefault(kind, [])

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


def soak_server(
    where: Path,
    *,
    constants: JSON | None = None,
    desk: int = 0,
    fail: bool = False,
    debug: bool = False,
    **options: Any,
) -> Serving:
    """A server process with `constants` of memws set, the tools of a desk, and writes that `fail` as Faulty says."""
    options = {"host": "127.0.0.1", "port": 0, "db": str(where / "memws.db"), **options}
    settings = {"options": options, "constants": constants or {}, "desk": desk, "fail": fail, "debug": debug}
    return Serving(cwd=where, program=Path(__file__), variables={"SOAK": json.dumps(settings)})


def check_database(address: str | Path, *, gapless: bool = True) -> None:
    """The database is whole, each turn in it has one start and at most one end, and no seq is missing."""
    assert list(memws.check_database(str(address), memws.check_record)) == []
    with beside(str(address)) as connection:
        for kinds in (("agent_response_start",) * 2, ("agent_response_end", "agent_response_error")):
            sql = "SELECT count(*) FROM events WHERE kind IN (?, ?) GROUP BY agent, turn_id"
            assert {count for (count,) in connection.execute(sql, kinds)} <= {1}
        sql = "SELECT id, last_seq FROM agents WHERE deleted IS NULL OR deleted <> ''"
        for agent, last_seq in connection.execute(sql).fetchall():
            seqs = connection.execute("SELECT seq FROM events WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
            assert [seq for (seq,) in seqs] == list(range(1, last_seq + 1)) or not gapless


class Desk:
    """Where the tools `ask` and `ask_later` of soak servers ask: counts the calls, answers each when told to."""

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
            pause = self.answers(question)
            leaving = asyncio.ensure_future(reader.read())
            self.open += 1
            await asyncio.wait({leaving}, timeout=pause)
            self.open -= 1
            if not leaving.done():
                writer.write(f"{self.says(question)}\n".encode())
            leaving.cancel()

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Self]:
        async with await asyncio.start_server(self, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield self


class Site:
    """A folder with a database that servers of a run serve, one after another, and what those ask: models and tools."""

    def __init__(self, soak: Soak, where: Path, endpoint: Endpoint, desk: Desk) -> None:
        self.soak, self.where, self.endpoint, self.desk = soak, where, endpoint, desk
        self.path: Path | str = where / "memws.db"
        self.gapless = True  # names are not used again, whose seqs would go on
        self.model: JSON = {"model": "test-model", "api_key": "sk-x", "base_url": endpoint.url}

    @contextlib.contextmanager
    def serve(self, *, killed: bool = False, **options: Any) -> Iterator[Serving]:
        """A server process, see soak_server; `killed`: it is not expected to end by itself."""
        with soak_server(self.where, desk=self.desk.port, **(self.model | options)) as server:
            if not server.url:
                server.wait()
                raise RuntimeError(f"the server did not start: {server.log}")
            yield server
            self.end(server, killed=killed)

    @contextlib.contextmanager
    def command_line(self, *flags: str, **variables: str) -> Iterator[Serving]:
        """A server process as `python memws.py serve` starts it."""
        with Serving("--host", "127.0.0.1", *flags, cwd=self.where, variables=variables) as server:
            yield server
            self.end(server)

    def end(self, server: Serving, *, killed: bool = False) -> None:
        """End a server if it still runs; it ends cleanly and has logged no traceback."""
        status = server.end() if server.process.poll() is None else server.wait()
        if status != (-signal.SIGKILL if killed else 0):
            self.soak.fault("servers that crash", f"exit status {status}: {server.log[-500:]}")
        for part in server.log.split("Traceback")[1:]:
            self.soak.fault("tracebacks in logs", part[:1_500])

    def check(self) -> None:
        """What must be true when all servers have ended."""
        for refusal in self.endpoint.refusals:
            self.soak.fault("requests that a strict endpoint refuses", refusal)
        for question, calls in self.desk.calls.items():
            if calls > 1:
                self.soak.fault("tools called twice for one call", question)
        try:
            check_database(self.path, gapless=self.gapless)
        except (AssertionError, sqlite3.Error) as error:
            self.soak.fault("damage in databases", repr(error))


@contextlib.asynccontextmanager
async def site(soak: Soak, model: Answer | None = None, **options: Any) -> AsyncIterator[Site]:
    """A site whose endpoint answers as `model` does; at the end all of it is as it should be."""
    soak.none("servers that crash", "tracebacks in logs", "requests that a strict endpoint refuses")
    soak.none("tools called twice for one call", "damage in databases")
    with tempfile.TemporaryDirectory(prefix="memws-soak-") as name, Endpoint(**options) as endpoint:
        endpoint.default = model or endpoint.default
        async with Desk().opened() as desk:
            place = Site(soak, Path(name), endpoint, desk)
            yield place
            place.check()


def client(server: Any, *types: str, **options: Any) -> contextlib.AbstractAsyncContextManager[Wire]:
    """A connection whose frames are not checked."""
    return wire(server, *types, checks=False, **({"ping_interval": None} | options))


async def narrow_socket(port: int) -> socket.socket:
    """A connected socket into which next to nothing fits that is not read."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    line.setblocking(False)
    await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", port))
    return line


def handshake(*headers: str, line: str = "GET / HTTP/1.1") -> bytes:
    """A request that opens a WebSocket, if these headers are right."""
    return "\r\n".join([line, *headers, *UPGRADE, "", ""]).encode("latin-1", "replace")


async def knock(port: int, data: bytes) -> tuple[str, bytes]:
    """Send this on a connection of its own; the HTTP status and the head of the answer. Raises TimeoutError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    reply = b""
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        async with asyncio.timeout(20):
            while b"\r\n\r\n" not in reply and (more := await reader.read(65_536)):
                reply += more
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return reply.split(b" ", 2)[1].decode() if reply.startswith(b"HTTP/1.1 ") else "closed", reply


def stored(frames: list[JSON]) -> dict[int, JSON]:
    """The stored events among frames, by seq."""
    return {frame["seq"]: bare(frame) for frame in frames if "seq" in frame}


class Log:
    """What clients sent to an agent and were told by it, to be compared with what it has stored."""

    def __init__(self, soak: Soak, name: str) -> None:
        soak.none("messages lost", "messages doubled", "events told otherwise later", "gaps in what is told or stored")
        soak.none("turns without exactly one start and terminal frame")
        self.soak, self.name = soak, name
        self.sent: dict[str, str] = {}  # texts by turn_id
        self.events: dict[int, JSON] = {}  # stored ones by seq

    def message(self, turn_id: str, text: str = "message") -> tuple[str, str]:
        """A message to be sent: its turn_id and its text."""
        self.sent[turn_id] = f"{text} {turn_id} of {self.name}"
        return turn_id, self.sent[turn_id]

    def keep(self, *frames: JSON) -> None:
        """Note what a client was told; the same seq is never told otherwise."""
        for seq, event in stored([frame for frame in frames if frame.get("agent_name") == self.name]).items():
            if (known := self.events.setdefault(seq, event)) != event:
                self.soak.fault("events told otherwise later", f"{known} {event}")

    async def compare(self, wire: Wire) -> dict[int, JSON]:
        """What is stored: all that was told, each message once, each turn with one start and one end, nothing else."""
        try:
            events = stored(await events_of(wire, self.name))
        except AssertionError as error:
            self.soak.fault("gaps in what is told or stored", f"{self.name}: {error!r:.300}")
            return {}
        for seq, event in self.events.items():
            if events.get(seq) != event:
                self.soak.fault("events told otherwise later", f"{self.name} {seq}: {event} {events.get(seq)}")
        texts, sent = collections.Counter(await messages_of(wire, self.name)), collections.Counter(self.sent.values())
        for kind, difference in (("messages lost", sent - texts), ("messages doubled", texts - sent)):
            for text in difference:
                self.soak.fault(kind, f"{self.name}: {text}")
        starts = sorted(event["turn_id"] for event in events.values() if event["type"] == "agent_response_start")
        ends = sorted(event["turn_id"] for event in events.values() if is_terminal(event))
        if not starts == ends == sorted(self.sent):
            text = f"{self.name}: {len(starts)} starts and {len(ends)} ends of {len(self.sent)}"
            self.soak.fault("turns without exactly one start and terminal frame", text)
        return events


@contextlib.contextmanager
def healthy_client(soak: Soak, url: str, token: str = "") -> Iterator[None]:
    """A healthy client in a process of its own, which asks all the time; how long its answers took are figures."""
    soak.none("healthy clients that fail")
    command = [sys.executable, __file__, "probe", url, token]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it is connected
        try:
            yield
        finally:
            out, _ = process.communicate("", timeout=60)
    times, error = json.loads(out or '[[], "it died"]')
    if error:
        soak.fault("healthy clients that fail", error)
    soak.figure("healthy client's p99, ms", 1000 * percentile(times, 0.99), 100, is_time=True)
    soak.figure("healthy client's slowest answer, ms", 1000 * max(times, default=9.0), 1000, is_time=True)
    soak.notes.append(f"healthy client's answers: {len(times):,}")


async def probe(url: str, token: str) -> None:
    """The process of a healthy client: it prints a line once it is connected, and its times when its input ends."""
    times: list[float] = []
    error = ""
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
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
    except Exception as failure:  # what happened to a healthy client is the result
        error = repr(failure)
    print(json.dumps([times, error]))


WRITES = ("INSERT", "UPDATE", "DELETE", "BEGIN IMMEDIATE", "COMMIT")


class Faulty(sqlite3.Connection):
    """A connection whose writes fail while plan.json is there: {"from": n, "to": m, "text": …, "undo": bool}."""

    plan = Path("plan.json")
    writes = 0
    writer = False  # it has begun to write: a reader's COMMIT is no write

    def _count(self, sql: str) -> None:
        self.writer = self.writer or sql == "BEGIN IMMEDIATE"
        if not self.writer or not sql.lstrip().upper().startswith(WRITES):
            return
        if not self.plan.exists():
            Faulty.writes = 0
            return
        Faulty.writes += 1
        plan = json.loads(self.plan.read_text("utf-8"))
        if plan["from"] <= Faulty.writes < plan["to"]:
            if plan["undo"] and self.in_transaction:  # as SQLite does when the disk is full
                super().execute("ROLLBACK")
            raise sqlite3.OperationalError(plan["text"])

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self._count(sql)
        return super().execute(sql, *arguments)

    def executemany(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self._count(sql)
        return super().executemany(sql, *arguments)


async def serve(settings: JSON) -> None:
    """The process of a server, see soak_server."""
    for name, value in settings["constants"].items():
        assert hasattr(memws, name), name
        setattr(memws, name, value)
    if settings["debug"]:
        logging.getLogger("memws").setLevel(logging.DEBUG)
    if settings["fail"]:
        sqlite3.connect = functools.partial(sqlite3.connect, factory=Faulty)  # type: ignore[assignment]
    sys.setswitchinterval(memws.SWITCH_INTERVAL)  # as the command line does
    server = memws.WebSocketServer(**settings["options"])
    port = settings["desk"]
    if port:

        @server.tool
        def ask(question: str) -> str:
            """Ask the desk."""
            with socket.create_connection(("127.0.0.1", port)) as line:
                line.sendall(question.encode() + b"\n")
                return line.makefile().readline().strip()

        @server.tool
        async def ask_later(question: str) -> str:
            """Ask the desk without a thread."""
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(question.encode() + b"\n")
                return (await reader.readline()).decode().strip()
            finally:
                writer.close()

    serving = asyncio.create_task(server.start_server())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving


if __name__ == "__main__":
    if sys.argv[1] == "probe":
        asyncio.run(probe(*sys.argv[2:]))
    else:
        logging.basicConfig(level=logging.INFO)
        asyncio.run(serve(json.loads(os.environ["SOAK"])))
