"""What a turn, a connection, a search and a start cost, each beside its floor: python tests/benchmarks/run.py

Every figure is measured in the same run as its floor, in turns, and is the median of five repetitions. Client, server,
model and the bare openai client are processes of their own. The table is Markdown, on standard output:

    python tests/benchmarks/run.py                          everything but search, about five minutes
    python tests/benchmarks/run.py turn start --repeat 3    only these rows, quicker
    python tests/benchmarks/run.py search --data data/*.jsonl --baseline old/memws.py
                                                            what a search finds, and what it costs beside a former one
"""

import argparse
import ast
import asyncio
import contextlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from commandline import PROGRAM  # noqa: E402
from measure import Peer, Progress, clean_environment, described, machine, percentile, rows_of  # noqa: E402
from retrieval import STEP, Filled, load, quality, speed  # noqa: E402
from websockets.asyncio.client import ClientConnection, connect  # noqa: E402

JSON = dict[str, Any]
TERMINALS = ('"agent_response_end"', '"agent_response_error"')
WINDOW = 200_000  # tokens of the context window of the agents here: none of them compacts by itself


# ---- Results ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table. `figure` is what the goal is about; lower is better, unless `higher`."""

    name: str
    what: str
    measured: str
    floor: str
    figure: float
    goal: float | None = None
    higher: bool = False
    unit: str = ""
    samples: list[float] = field(default_factory=list)  # the figure in each repetition

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.figure >= self.goal if self.higher else self.figure <= self.goal

    def cells(self) -> list[str]:
        goal = "" if self.goal is None else f"{'≥' if self.higher else '≤'} {self.goal:g}{self.unit}"
        mark = {None: "", True: " ✓", False: " ✗"}[self.reached]
        return [self.what, self.measured, self.floor, f"{self.figure:.3g}{self.unit}", goal + mark]


# ---- Processes -------------------------------------------------------------------------------------------------------


class Bench:
    """What the rows share: a folder, the model's process, and agents to copy."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given, self.repeat = folder, given, given.repeat
        self.rows: list[Row] = []
        self.model = Peer("model", folder=folder)
        self._databases = 0

    def close(self) -> None:
        self.model.__exit__()

    def add(
        self, name: str, what: str, measured: str, floor: str, samples: list[float], goal: float | None, **more: Any
    ) -> None:
        self.rows.append(Row(name, what, measured, floor, statistics.median(samples), goal, samples=samples, **more))

    def database(self) -> str:
        self._databases += 1
        return str(self.folder / f"bench-{self._databases}.db")

    def serve(self, path: str, *flags: str, part: str = "serve") -> Peer:
        flags = ("--port", "0", "--db", path, "--base-url", self.model.address, "--model", "now", *flags)
        server = Peer(part, *flags, folder=self.folder)
        server.line()
        return server

    def last_body(self) -> JSON:
        """The request that the model got last."""
        host, _, port = self.model.address.removeprefix("http://").removesuffix("/v1").partition(":")
        connection = HTTPConnection(host, int(port))
        connection.request("GET", "/last")
        body: JSON = json.loads(connection.getresponse().read())
        connection.close()
        return body


class Client:
    """One connection, read as fast as its server sends."""

    def __init__(self, websocket: ClientConnection) -> None:
        self._websocket = websocket
        self.wrong = 0  # frames that belong to another agent or turn

    async def command(self, command: str, **fields: Any) -> JSON:
        """The result of a command."""
        await self._websocket.send(json.dumps({"type": "command", "command": command, "id": 1, **fields}))
        while True:
            frame: JSON = json.loads(await self._websocket.recv())
            if frame["type"] == "command_response":
                assert frame["ok"], frame
                return dict(frame["result"])

    async def create(self, name: str, **config: Any) -> None:
        config = {"name": name, "context_window": WINDOW, "model": "now", **config}
        await self.command("create_agent", config=config)

    async def turn(self, agent: str, text: str, mark: str = "") -> float:
        """Seconds from sending a message to the end of its turn."""
        start = time.perf_counter()
        frame = json.dumps({"type": "user_message", "agent_name": agent, "message": text, "id": 1})
        await self._websocket.send(frame)
        while True:
            told = await self._websocket.recv()
            assert isinstance(told, str)
            if f'"agent_name":"{agent}"' not in told or ('"assistant_message"' in told and mark not in told):
                self.wrong += 1
            if any(kind in told[:100] for kind in TERMINALS):
                took = time.perf_counter() - start
                assert TERMINALS[0] in told[:100], told
                return took

    async def seed(self, agent: str, messages: int) -> None:
        """Make an agent and talk to it, until it has so many chat messages: three a turn."""
        await self.create(agent)
        for _ in range(max(1, round(messages / 3))):
            await self.turn(agent, "Hello there, how are you today?")


@contextlib.asynccontextmanager
async def client(url: str) -> Any:
    async with connect(url, compression=None, max_size=None, max_queue=None) as websocket:
        yield Client(websocket)


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


# ---- Rows ------------------------------------------------------------------------------------------------------------


def size(bench: Bench) -> Iterator[str]:
    """How long the file and its functions are."""
    text = PROGRAM.read_text("utf-8")
    lines = text.splitlines()
    begin, end = (lines.index(next(line for line in lines if line.startswith(f"# {n}. "))) for n in (10, 11))
    functions = sorted(
        node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    )
    whole = f"{len(lines):,} with it"
    bench.add("lines", "lines of `memws.py` without section 10", whole, "", [len(lines) - end + begin], 5_600)
    middle, nine, most = statistics.median(functions), percentile(functions, 0.9), functions[-1]
    measured = f"nine in ten {nine:.0f} or fewer, the longest {most}"
    bench.add("functions", f"median lines of its {len(functions)} functions", measured, "", [middle], 8)
    yield "size"


def turns(bench: Bench) -> Iterator[str]:
    """A persisted, streaming turn of one step beside the openai client's own streaming call, and its CPU."""
    sizes = {10: (0.7, 20, 2), 100: (0.2, 10, 5), 500: (0.1, 10, 10)}
    "The goal, the turns of a repetition, and how many of them an agent takes, which makes its history longer."
    got: dict[int, list[JSON]] = {size: [] for size in sizes}

    async def seed(url: str, size: int, names: list[str]) -> None:
        async with client(url) as connection:
            for name in names:
                await connection.seed(name, size)

    async def run(url: str, names: list[str], per_agent: int) -> list[float]:
        async with client(url) as connection:
            return [await connection.turn(name, "And how is it now?") for name in names for _ in range(per_agent)]

    with bench.serve(bench.database()) as server, Peer("bare", bench.model.address, folder=bench.folder) as bare:
        for size, (_, calls, per_agent) in sizes.items():
            names = [f"a{size}-{number}" for number in range(bench.repeat * calls // per_agent)]
            asyncio.run(seed(server.address, size, names))
            yield f"turns: {size} messages stored"
        bare.ask(calls=30, body=bench.last_body())
        for number in range(bench.repeat):
            for size, (_, calls, per_agent) in sizes.items():
                count = calls // per_agent
                names = [f"a{size}-{number * count + place}" for place in range(count)]
                before = server.ask()["cpu"]
                seconds = asyncio.run(run(server.address, names, per_agent))
                cpu = (server.ask()["cpu"] - before) / len(seconds)
                floor = bare.ask(calls=calls, body=bench.last_body())
                middle = {"turn": statistics.median(seconds), "bare": statistics.median(floor["seconds"])}
                got[size].append({**middle, "cpu": cpu, "bare_cpu": floor["cpu"]})
                yield f"turns: {size} messages"
    for size, (goal, _, _) in sizes.items():
        middle = {key: statistics.median(each[key] for each in got[size]) for key in got[size][0]}
        bench.add(
            f"turn-{size}",
            f"turn of one step with {size} messages in the window / bare `AsyncOpenAI` streaming call",
            f"{milliseconds(middle['turn'])} ({milliseconds(middle['cpu'])} CPU)",
            f"{milliseconds(middle['bare'])} ({milliseconds(middle['bare_cpu'])} CPU)",
            [each["turn"] / each["bare"] for each in got[size]],
            goal,
        )
    cpus = {size: [1000 * each["cpu"] for each in found] for size, found in got.items()}
    longest = f"with 500: {statistics.median(cpus[500]):.2f} ms"
    what = "CPU of a turn, 10 messages in the window"
    bench.add("turn-cpu", what, f"{statistics.median(cpus[10]):.2f} ms", longest, cpus[10], 3, unit=" ms")


def throughput(bench: Bench) -> Iterator[str]:
    """Turns a second with a model that takes 200 ms, starts spread over these, of the ideal and of the bare client."""
    goals = {8: 0.97, 32: 0.95, 128: None}
    seconds = 2.0
    got: dict[int, list[JSON]] = {clients: [] for clients in goals}

    async def run(url: str, clients: int, prefix: str) -> tuple[int, int]:
        async with contextlib.AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(client(url)) for _ in range(clients)]
            for number, connection in enumerate(connections):
                await connection.create(f"{prefix}-{number}", model="ms-200")
            count, begin = 0, time.monotonic() + 1.0

            async def one(number: int, connection: Client) -> None:
                nonlocal count
                await asyncio.sleep(0.2 * number / clients)
                turn, name = 0, f"{prefix}-{number}"
                while time.monotonic() < begin + seconds:
                    turn += 1
                    mark = f"<<{name} {turn}>>"
                    await connection.turn(name, f"How are you? {mark}", mark)
                    count += begin <= time.monotonic() < begin + seconds

            await asyncio.gather(*(one(number, connection) for number, connection in enumerate(connections)))
            return count, sum(connection.wrong for connection in connections)

    with bench.serve(bench.database()) as server, Peer("bare", bench.model.address, folder=bench.folder) as bare:
        for number in range(bench.repeat):
            for clients in goals:
                count, wrong = asyncio.run(run(server.address, clients, f"t{number}-{clients}"))
                plain = bare.ask(clients=clients, seconds=seconds, body=bench.last_body())["count"]
                ideal = clients / 0.2 * seconds
                got[clients].append({"share": count / ideal, "bare": plain / ideal, "wrong": wrong})
                yield f"throughput: {clients} clients"
    for clients, goal in goals.items():
        share, bare_share = (statistics.median(each[key] for each in got[clients]) for key in ("share", "bare"))
        wrong = sum(each["wrong"] for each in got[clients])
        bench.add(
            f"throughput-{clients}",
            f"turns a second, model at 200 ms, {clients} clients / ideal",
            f"{share * clients / 0.2:.0f} of {clients / 0.2:.0f}, {wrong} wrong deliveries",
            f"`AsyncOpenAI` alone: {bare_share:.2f} of the ideal",
            [each["share"] if not each["wrong"] else 0.0 for each in got[clients]],
            goal,
            higher=True,
        )
    bench.add(
        "throughput-bare",
        "the same with 128 clients / `AsyncOpenAI` alone with 128, in the same run",
        f"{statistics.median(each['share'] for each in got[128]):.2f} of the ideal",
        f"{statistics.median(each['bare'] for each in got[128]):.2f} of the ideal",
        [each["share"] / each["bare"] for each in got[128]],
        2.9,
        higher=True,
    )


def bystanders(bench: Bench) -> Iterator[str]:
    """The p99 of somebody's get_agent while others make work."""
    path = bench.database()

    async def seed(url: str) -> None:
        async with client(url) as connection:
            await connection.seed("quiet", 10)
            for number in range(bench.repeat):
                await connection.seed(f"long-{number}", 500)

    with bench.serve(path) as server:
        asyncio.run(seed(server.address))
    yield "bystander: agents stored"
    archive = Archive(path, texts())
    for _ in range(1_000_000 // STEP):
        archive.insert(STEP)
        yield f"bystander: {archive.rows:,} rows indexed"
    archive.database.close()
    got: dict[str, list[JSON]] = {}

    async def busy(url: str, work: Callable[[Client, str], Any], names: list[str], seconds: float) -> None:
        """Work on one connection for each name, again and again."""
        until = time.monotonic() + seconds

        async def one(name: str) -> None:
            async with client(url) as connection:
                if name != "archive":
                    await connection.create(name, model="ms-200")
                while time.monotonic() < until:
                    await work(connection, name)

        await asyncio.gather(*map(one, names))

    async def never(url: str, name: str) -> None:
        async with client(url) as connection:
            await connection.create(name, model="never")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.turn(name, "Is anybody there?"), 1.5)
            await connection.command("cancel", agent_name=name)

    async def compact(url: str, name: str) -> None:
        async with client(url) as connection:
            await connection.command("compact", agent_name=name)
            await asyncio.sleep(2)

    def chat(connection: Client, name: str) -> Any:
        return connection.turn(name, "How are you?")

    def search(connection: Client, name: str) -> Any:
        return connection.command("search_memory", agent_name=name, query="maru", store="archival")

    def scenes(url: str, number: int) -> dict[str, Callable[[], Any]]:
        return {
            "32 turns at once": lambda: busy(url, chat, [f"b{number}-{n}" for n in range(32)], 1.5),
            "a very common word searched in 1,000,000 rows": lambda: busy(url, search, ["archive"], 1.5),
            "an endpoint that never answers": lambda: never(url, f"never-{number}"),
            "a compaction of 500 messages": lambda: compact(url, f"long-{number}"),
        }

    async def computing(url: str, name: str) -> None:
        async with client(url) as connection:
            await connection.create(name, model="tool-compute", tools=["send_message", "compute"])
            await connection.turn(name, "Compute it, please. <<now>>")

    def during(scene: str, server: Peer, watcher: Peer, work: Callable[[], Any]) -> None:
        watcher.ask(url=server.address, echo=echo.address, agent="quiet")
        asyncio.run(work())
        got.setdefault(scene, []).append(watcher.ask())

    with Peer("echo", folder=bench.folder) as echo, Peer("bystander", folder=bench.folder) as watcher:
        with bench.serve(path) as server:
            for number in range(bench.repeat):
                for scene, work in scenes(server.address, number).items():
                    during(scene, server, watcher, work)
                    yield f"bystander: {scene}"
        computed = "a tool that computes for 5 s"
        with bench.serve(path, part="serve-tool") as server:
            for number in range(bench.repeat):
                during(computed, server, watcher, lambda: computing(server.address, f"cli-{number}"))  # noqa: B023
                yield f"bystander: {computed}"
    for place, (name, found) in enumerate(got.items(), 1):
        p99 = [1000 * percentile(each["command"], 0.99) for each in found]
        echoes = [1000 * percentile(each["echo"], 0.99) for each in found]
        middle = statistics.median(percentile(each["command"], 0.5) for each in found)
        bench.add(
            f"bystander-{place}",
            f"p99 of somebody's command during {name}",
            f"{statistics.median(p99):.1f} ms (p50 {milliseconds(middle)})",
            f"echo beside it: p99 {statistics.median(echoes):.1f} ms",
            p99,
            15 if name == computed else 10,
            unit=" ms",
        )


class Archive(Filled):
    """An agent with many passages."""

    kind = "archival"


def texts() -> Iterator[str]:
    """Endless texts of 20 made-up words, common and rare ones as in a language; "maru" is in about every second."""
    pick, syllables = random.Random(1), [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai", "on")]
    words = ["maru", *("".join(pick.choices(syllables, k=pick.randint(2, 4))) for _ in range(30_000))]
    weights = [0.2 + sum_ for sum_ in itertools.accumulate(1 / (rank + 2) ** 0.9 for rank in range(len(words)))]
    while True:
        yield " ".join(pick.choices(words, cum_weights=weights, k=20))


def idle(bench: Bench) -> Iterator[str]:
    """The memory of connections that do nothing, beside bare websockets with the same compression."""
    count = 1000
    got: list[tuple[float, float]] = []

    def grown(server: Peer, crowd: Peer) -> float:
        crowd.ask(url=server.address, count=20)
        before = server.ask(collect=True)["memory"]
        crowd.ask(url=server.address, count=count)
        after = server.ask(collect=True)["memory"]
        crowd.ask()
        return float((after - before) / count / 1000)

    for _ in range(bench.repeat):
        with Peer("crowd", folder=bench.folder) as crowd, Peer("echo", folder=bench.folder) as echo:
            floor = grown(echo, crowd)
        with Peer("crowd", folder=bench.folder) as crowd, bench.serve(":memory:", "--model", "offline") as server:
            got.append((grown(server, crowd), floor))
        yield f"idle: {count} connections"
    middle = statistics.median(ours for ours, _ in got)
    floors = f"{statistics.median(floor for _, floor in got):.1f} KB"
    shares = [ours / floor for ours, floor in got]
    bench.add("idle", "memory of an idle connection / of bare `websockets`", f"{middle:.1f} KB", floors, shares, 1.2)


def start(bench: Bench) -> Iterator[str]:
    """From the call to the first accepted connection, beside importing websockets; imports."""
    samples: dict[str, list[float]] = {"script": [], "websockets": [], "memws": []}
    held: list[float] = []
    variables = clean_environment(PYTHONPYCACHEPREFIX=str(bench.folder / "bytecode"))

    def megabytes(pid: int) -> Iterator[float]:
        """The memory of a process, where the system tells."""
        with contextlib.suppress(OSError):
            yield int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def until_accepted() -> float:
        """Start a server; seconds until it has accepted a connection, whose memory then is kept."""
        begin = time.perf_counter()
        command = [sys.executable, str(PROGRAM), "--port", "0", "--db", bench.database(), "--model", "offline"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables)
        assert process.stdout is not None
        url = process.stdout.readline().decode().split()[-1]

        async def accept() -> float:
            async with connect(url, compression=None):
                took = time.perf_counter() - begin
                held.extend(megabytes(process.pid))
                return took

        took = asyncio.run(accept())
        process.terminate()
        process.communicate()
        return took

    def until_imported(module: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], cwd=PROGRAM.parent, env=variables, check=True)
        return time.perf_counter() - begin

    until_imported("memws")  # from now on its bytecode is there, as for everybody's second import
    for _ in range(bench.repeat):
        took: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(3):
            took["websockets"].append(until_imported("websockets.asyncio.server"))
            took["script"].append(until_accepted())
            took["memws"].append(until_imported("memws"))
        for name, seconds in took.items():
            samples[name].append(statistics.median(seconds))
        yield "start"
    shown = {name: milliseconds(statistics.median(seconds)) for name, seconds in samples.items()}
    bare = '`python -c "import websockets.asyncio.server"`'
    ways = {"script": ("`python memws.py` to the first accepted connection", 2.1)}
    ways["memws"] = ('`python -c "import memws"`', 1.4)
    for way, (called, goal) in ways.items():
        ratios = [ours / other for ours, other in zip(samples[way], samples["websockets"], strict=True)]
        bench.add(f"start-{way}", f"{called} / {bare}", shown[way], shown["websockets"], ratios, goal)
    if held:
        middle = f"{statistics.median(held):.1f} MB"
        bench.add("start-memory", "memory of `python memws.py` then, with `offline`", middle, "", held, 50, unit=" MB")


def search(bench: Bench) -> Iterator[str]:
    """What a search finds in the sets of --data, and what it costs in 1,000,000 rows, beside the --baseline."""
    data = [str(Path(file).absolute()) for file in bench.given.data]
    found, _ = quality(load(data), Progress(0, quiet=True))
    yield "search: quality"
    for name, category, questions, *_, recall, _, mrr in found:
        if category == "all":
            goals = DEVELOPMENT.get(name, (None, None))
            for what, value, goal in (("recall@10", recall, goals[0]), ("MRR", mrr, goals[1])):
                goal = goal and round(goal - 0.005, 4)
                told = f"{what} of a search, {name}, {questions} questions"
                bench.add(f"{what}-{name}", told, value, "", [float(value)], goal, higher=True)
    files = {"memws": str(PROGRAM)} | ({"baseline": bench.given.baseline} if bench.given.baseline else {})
    rows = {row["memws"]: row for row in speed(data, [bench.given.rows], files, Progress(0, quiet=True))}
    yield "search: speed"
    p95 = {(name, part): 1000 * percentile(row[part], 0.95) for name, row in rows.items() for part in PARTS}
    for part, goal in PARTS.items():
        ours, other = p95["memws", part], p95.get(("baseline", part))
        middle = 1000 * percentile(rows["memws"][part], 0.5)
        floor = "" if other is None else f"baseline: p95 {other:.2f} ms"
        what, told = f"{part} with {bench.given.rows:,} rows", f"p95 {ours:.2f} ms, p50 {middle:.2f} ms"
        bench.add(f"search-{part}", f"{what}, p95", told, floor, [ours], 2.5 if part == "insert" else None, unit=" ms")
        if other is not None:
            bench.add(f"search-{part}-baseline", f"{what}, p95 / the baseline's", told, floor, [ours / other], goal)


PARTS = {"query": 1.2, "insert": None}  # what is timed in a search index, and the goal beside the baseline
DEVELOPMENT = {
    "locomo": (0.810, 0.599), "madial-en": (0.573, 0.461), "madial-zh": (0.533, 0.452), "xquad-es": (0.990, 0.927),
}  # fmt: skip
"""Recall@10 and MRR of commit cd96516 in the development sets."""


# ======================================================================================================================
# The command
# ======================================================================================================================

BENCHES: dict[str, tuple[Callable[[Bench], Iterator[str]], Callable[[int], int]]] = {
    "size": (size, lambda repeat: 1),
    "turn": (turns, lambda repeat: 3 + 3 * repeat),
    "throughput": (throughput, lambda repeat: 3 * repeat),
    "bystander": (bystanders, lambda repeat: 1 + 1_000_000 // STEP + 5 * repeat),
    "idle": (idle, lambda repeat: repeat),
    "start": (start, lambda repeat: repeat),
    "search": (search, lambda repeat: 2),
}
"""What is measured, and in how many steps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows_named", nargs="*", metavar="row", help=f"what to measure: {', '.join(BENCHES)}")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, whose median counts (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="for search: memories with questions, as JSON lines")
    parser.add_argument("--baseline", metavar="FILE", help="for search: a former memws.py, measured beside this one")
    parser.add_argument("--rows", type=int, default=1_000_000, help="for search: rows whose cost is measured")
    given = parser.parse_args()
    chosen = given.rows_named or [name for name in BENCHES if name != "search" or given.data]
    if unknown := [name for name in chosen if name not in BENCHES]:
        parser.error(f"unknown rows: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if "search" in chosen and not given.data:
        parser.error("search needs --data FILE…")

    facts = machine()
    progress = Progress(sum(BENCHES[name][1](given.repeat) for name in chosen))
    folder = Path(tempfile.mkdtemp(prefix="memws-bench-"))
    bench = Bench(folder, given)
    try:
        for name in chosen:
            progress.step(name, 0)
            for what in BENCHES[name][0](bench):
                progress.step(what)
    finally:
        progress.end()
        bench.close()
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{described(facts)}; medians of {given.repeat}\n")
    print(
        rows_of([["what", "memws", "floor, of the same run", "figure", "goal"], *(row.cells() for row in bench.rows)])
    )
    if given.json:
        text = json.dumps({"machine": facts, "rows": [asdict(row) for row in bench.rows]}, indent=1)
        Path(given.json).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
