"""What the soak scripts share: a run with its arguments, progress and figures; servers of our own; a healthy client.

    async def main(soak: Soak) -> None:
        ...  soak.step(), soak.fault("lost", "what was lost"), soak.rng
        soak.none("messages lost", "lost")
        soak.within("slowest answer, s", slowest, 1.0)

    if __name__ == "__main__":
        run(main, "what is measured", 1_000)

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
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from commandline import Serving
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from wire import JSON, Wire, bare

import memws

GONE = (ConnectionClosed, InvalidHandshake, OSError)  # what a client meets when its server has died


# ---- a run -----------------------------------------------------------------------------------------------------------


class Soak:
    """One run: its seed and count, its progress on standard error, its figures on standard output."""

    def __init__(self, what: str, full: int, count: int | None = None, seed: int = 1) -> None:
        self.what, self.seed, self.full = what, seed, full
        self.count = full if count is None else count
        self.rng = random.Random(seed)
        self.faults: dict[str, list[str]] = collections.defaultdict(list)
        self.notes: list[str] = []
        self.missed: list[str] = []
        "Figures that are missed, but for times, which depend on what else the machine does."
        self._figures: list[tuple[str, str, str, bool]] = []
        self._started = time.monotonic()
        self._done = self._shown = 0.0
        self._total = float(self.count)

    def part(self, whole: int) -> int:
        """A number of the table, in proportion to --count; at least 1."""
        return max(1, round(whole * self.count / self.full))

    def total(self, total: float) -> None:
        """How many steps the whole run has, where it is not the count."""
        self._total = float(total)

    def step(self, steps: float = 1) -> None:
        """Move the progress bar."""
        self._done += steps
        if self._shown == 1:
            return
        share = min(1.0, self._done / self._total)
        terminal = sys.stderr.isatty()
        if share - self._shown < (0.005 if terminal else 0.1) and share < 1:
            return
        self._shown = share
        bar = "#" * round(30 * share)
        seconds = time.monotonic() - self._started
        line = f"[{bar:30}] {100 * share:3.0f} %  {seconds:.0f} s, {sum(map(len, self.faults.values()))} faults"
        print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def fault(self, kind: str, detail: object) -> None:
        """Note that a figure is missed, and by what."""
        self.faults[kind].append(str(detail)[:2_000])

    @contextlib.contextmanager
    def expect(self, kind: str, case: object) -> Iterator[None]:
        """A failed check inside is a fault."""
        try:
            yield
        except AssertionError as error:
            self.fault(kind, f"{case}: {error!r}")

    def none(self, what: str, *kinds: str) -> None:
        """A figure: no fault of these kinds."""
        faults = [f"{kind}: {fault}" for kind in kinds for fault in self.faults[kind]]
        self._figures.append((what, f"{len(faults):,}", "0", not faults))
        if faults:
            self.missed.append(f"{what}: {len(faults)}, such as {faults[0]}")

    def most(self, what: str, value: float, limit: float) -> None:
        """A figure: a value that is at most `limit`."""
        self.within(what, value, limit)
        if value > limit:
            self.missed.append(f"{what}: {value:,.4g}, at most {limit:,.4g}")

    def within(self, what: str, value: float, limit: float) -> None:
        """A figure: a time that is at most `limit`."""
        self._figures.append((what, f"{value:,.4g}", f"<= {limit:,.4g}", value <= limit))

    def least(self, what: str, value: float, limit: float) -> None:
        """A figure: a value that is at least `limit`."""
        self._figures.append((what, f"{value:,.4g}", f">= {limit:,.4g}", value >= limit))
        if value < limit:
            self.missed.append(f"{what}: {value:,.4g}, at least {limit:,.4g}")

    def told(self, what: str, value: object) -> None:
        """A line of the summary that asks for nothing."""
        self.notes.append(f"  {what}: {value}")

    def finish(self) -> int:
        """Print the summary; the exit status, 1 when a figure is missed."""
        shown = {kind for kind, faults in self.faults.items() if faults}
        passed = all(good for *_, good in self._figures)
        if sys.stderr.isatty():
            print(file=sys.stderr)
        small = "" if self.count >= self.full else f" (a small run: the figure asks for {self.full:,})"
        print(f"{self.what}: {'passed' if passed else 'MISSED'}")
        seconds = time.monotonic() - self._started
        print(f"  seed {self.seed}, count {self.count:,}{small}, {seconds:.1f} s, commit {commit()}")
        for what, value, wanted, good in self._figures:
            print(f"  {what:58} {value:>9}  {wanted:9} {'ok' if good else 'MISSED'}")
        for note in self.notes:
            print(note)
        for kind in sorted(shown):
            for detail, times in collections.Counter(self.faults[kind]).most_common(3):
                print(f"  {kind} ({times} x): {detail}")
        return 0 if passed else 1


def commit() -> str:
    """The commit that is measured; a + where memws.py differs from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
        name = run([git, "rev-parse", "--short", "HEAD"]).stdout.strip()
        dirty = run([git, "status", "--porcelain", "memws.py"]).stdout.strip()
        return f"{name or 'unknown'}{'+' if dirty else ''}"
    return "unknown"


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """An empty folder that goes with the run."""
    with tempfile.TemporaryDirectory(prefix="memws-soak-") as path:
        yield Path(path)


def run(main: Callable[[Soak], Coroutine[Any, Any, None]], what: str, full: int) -> None:
    """Run a script; its exit status is 1 when a figure is missed."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--seed", type=int, default=1, help="what the run draws at random from (1)")
    parser.add_argument("--count", type=int, default=full, help=f"how many cases; the figure asks for {full:,}")
    given = parser.parse_args()
    soak = Soak(what, full, given.count, given.seed)
    asyncio.run(main(soak))
    sys.exit(soak.finish())


async def every(jobs: list[Coroutine[Any, Any, None]], at_once: int) -> None:
    """Run jobs, so many at once."""
    places = asyncio.Semaphore(at_once)

    async def job_in_place(job: Coroutine[Any, Any, None]) -> None:
        async with places:
            await job

    await asyncio.gather(*map(job_in_place, jobs))


async def until(holds: Callable[[], bool], seconds: float) -> bool:
    """Wait for what no event tells; whether it came about in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def percentile(values: list[float], share: float) -> float:
    """The value that so many do not exceed; 0 where there are none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


# ---- processes -------------------------------------------------------------------------------------------------------


def memory(pid: int) -> float:
    """Resident memory of a process, MiB."""
    status = Path(f"/proc/{pid}/status").read_text("ascii")
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def descriptors(pid: int) -> int:
    """Open descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    """Threads of a process."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


class SoakServer(Serving):
    """A server process; one that does not start says why."""

    def __enter__(self) -> "SoakServer":
        super().__enter__()
        if not self.url:
            self.wait()
            raise RuntimeError(f"the server did not start: {self.log}")
        return self


def soak_server(
    where: Path,
    *,
    constants: JSON | None = None,
    desk: int | None = None,
    fail: JSON | None = None,
    debug: bool = False,
    **options: Any,
) -> SoakServer:
    """A server process with `constants` of memws set, the tools of a desk, and writes that fail as `fail` says."""
    options = {"host": "127.0.0.1", "port": 0, "db": str(where / "memws.db"), **options}
    told = {"options": options, "constants": constants or {}, "desk": desk, "fail": fail, "debug": debug}
    return SoakServer(cwd=where, program=Path(__file__), variables={"SOAK": json.dumps(told)})


@contextlib.asynccontextmanager
async def client(server: Any, *types: str, **options: Any) -> AsyncIterator[Wire]:
    """A connection whose frames are read, but not checked against the schema: that costs more than the server."""
    settings: JSON = {"compression": None, "max_size": memws.MAX_FRAME, "max_queue": None, "ping_interval": None}
    async with connect(server.url, **(settings | options)) as websocket:
        opened = Quick(websocket)
        if types:
            await opened.ok("hello", message_types=list(types))
        yield opened


async def narrow_socket(port: int) -> socket.socket:
    """A connected socket into which next to nothing fits that is not read."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    line.setblocking(False)
    await asyncio.get_running_loop().sock_connect(line, ("127.0.0.1", port))
    return line


class Quick(Wire):
    """A raw client that reads frames as they come."""

    async def send(self, **frame: Any) -> None:
        await self.websocket.send(json.dumps(frame))

    async def receive(self) -> JSON:
        async with asyncio.timeout(30):
            frame: JSON = json.loads(await self.websocket.recv())
        self.frames.append(frame)
        return frame


class Desk:
    """Where the tools `ask` and `ask_later` of soak servers ask: counts the calls, answers each when told to."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.open = 0  # calls that wait for their answer
        self.answers: Callable[[str], float | None] = lambda question: 0.0
        "Seconds until the answer to a question; None: never."
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
async def desk() -> AsyncIterator[tuple[Desk, int]]:
    """A desk and the port where it listens."""
    opened = Desk()
    async with await asyncio.start_server(opened, "127.0.0.1", 0) as server:
        yield opened, server.sockets[0].getsockname()[1]


def stored(frames: list[JSON]) -> dict[int, JSON]:
    """The stored events among frames, by seq."""
    return {frame["seq"]: bare(frame) for frame in frames if "seq" in frame}


def check_file(path: Path) -> None:
    """The database is whole, each turn in it has one start and at most one end, and no seq is missing."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("PRAGMA foreign_key_check").fetchone() is None
        for kind in ("agent_response_start", "agent_response_e*"):  # an end or an error
            sql = "SELECT count(*) FROM events WHERE kind GLOB ? GROUP BY agent, turn_id"
            assert {count for (count,) in connection.execute(sql, (kind,))} <= {1}
        for agent, last_seq in connection.execute("SELECT id, last_seq FROM agents WHERE deleted IS NOT ''").fetchall():
            seqs = connection.execute("SELECT seq FROM events WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
            assert [seq for (seq,) in seqs] == list(range(1, last_seq + 1))


# ---- the healthy client ----------------------------------------------------------------------------------------------


class Probe:
    """A healthy client in a process of its own, which asks and talks all the time and measures every answer."""

    def __init__(self, url: str, *, pause: float = 0.02, token: str = "") -> None:
        arguments = [sys.executable, __file__, "probe", url, str(pause), token]
        self._process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it is connected
        self.times: list[float] = []  # seconds, once it is over
        self.error = ""

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *exc_info: object) -> None:
        out, _ = self._process.communicate("", timeout=60)
        told = json.loads(out or '{"times": [], "error": "the probe died"}')
        self.times, self.error = told["times"], told["error"]

    def judge(self, soak: Soak) -> None:
        """The figures of the healthy client."""
        if self.error:
            soak.fault("healthy client failed", self.error)
        soak.none("healthy client failed", "healthy client failed")
        soak.within("healthy client's p99, ms", 1000 * percentile(self.times, 0.99), 100)
        soak.within("healthy client's slowest answer, ms", 1000 * max(self.times, default=9.0), 1000)
        soak.told("healthy client's answers", f"{len(self.times):,}")


async def _probe(url: str, pause: float, token: str) -> None:
    times: list[float] = []
    error = ""
    over = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, over.set)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        async with connect(url, additional_headers=headers, compression=None) as websocket:

            async def answer(last: str, **frame: Any) -> JSON:
                begin = time.monotonic()
                frame["id"] = len(times)
                await websocket.send(json.dumps(frame))
                while True:
                    told: JSON = json.loads(await asyncio.wait_for(websocket.recv(), 30))
                    if told.get("id") == frame["id"] and told["type"] == last:
                        times.append(time.monotonic() - begin)
                        return told

            await answer("command_response", type="command", command="create_agent", config={"name": "healthy-probe"})
            print(flush=True)
            times.clear()
            while not over.is_set():
                for command in ("get_agent", "hello", "list_agents", "get_agent", "get_messages"):
                    more = {"limit": 5} if command in ("list_agents", "get_messages") else {}
                    await answer("command_response", type="command", command=command, **more)
                    await asyncio.sleep(pause)
    except Exception as failure:  # what happened to a healthy client is the result
        error = repr(failure)
    print(json.dumps({"times": times, "error": error}))


# ---- the server ------------------------------------------------------------------------------------------------------


WRITES = ("INSERT", "UPDATE", "DELETE", "BEGIN IMMEDIATE", "COMMIT")


class Faulty(sqlite3.Connection):
    """A connection whose writes fail as the file `plan` says, {"from": n, "to": m, "text": …, "undo": bool}."""

    plan: Path | None = None
    writes = 0
    writer = False  # it has begun to write: a reader's COMMIT is no write

    def _count(self, sql: str) -> None:
        self.writer = self.writer or sql == "BEGIN IMMEDIATE"
        if Faulty.plan is None or not self.writer or not sql.lstrip().upper().startswith(WRITES):
            return
        if not Faulty.plan.exists():
            Faulty.writes = 0
            return
        Faulty.writes += 1
        told = json.loads(Faulty.plan.read_text("utf-8"))
        if told["from"] <= Faulty.writes < told["to"]:
            if told["undo"] and self.in_transaction:  # as SQLite does when the disk is full
                super().execute("ROLLBACK")
            raise sqlite3.OperationalError(told["text"])

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self._count(sql)
        return super().execute(sql, *arguments)

    def executemany(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self._count(sql)
        return super().executemany(sql, *arguments)


async def _serve(told: JSON) -> None:
    for name, value in told["constants"].items():
        assert hasattr(memws, name), name
        setattr(memws, name, value)
    if told["debug"]:
        logging.getLogger("memws").setLevel(logging.DEBUG)
    if told["fail"]:
        Faulty.plan = Path(told["fail"]["plan"])
        sqlite3.connect = functools.partial(sqlite3.connect, factory=Faulty)  # type: ignore[assignment]
    sys.setswitchinterval(memws.SWITCH_INTERVAL)  # as the command line does
    server = memws.WebSocketServer(**told["options"])
    port = told["desk"]
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
        asyncio.run(_probe(sys.argv[2], float(sys.argv[3]), sys.argv[4]))
    else:
        logging.basicConfig(level=logging.INFO)
        asyncio.run(_serve(json.loads(os.environ["SOAK"])))
