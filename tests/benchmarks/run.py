"""What a turn, a connection, a search and a start cost, each beside its floor: python tests/benchmarks/run.py

Every figure is measured in the same run as its floor, in turns, and is the median of five repetitions. Client, server,
model and the bare openai client are processes of their own. The table is Markdown, on standard output:

    python tests/benchmarks/run.py                          everything but search, about eight minutes
    python tests/benchmarks/run.py turn start --repeat 3    only these rows, quicker
    python tests/benchmarks/run.py search --data data/*.jsonl --baseline old/memws.py
                                                            what a search finds, and what it costs beside a former one
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from commandline import PROGRAM, Process, environment  # noqa: E402
from measure import Progress, finished, machine, memory, percentile, rows_of  # noqa: E402
from postgres import Cluster  # noqa: E402
from retrieval import STEP, Filled, load, quality, texts  # noqa: E402
from websockets.asyncio.client import connect  # noqa: E402
from wire import JSON, TERMINALS, Wire, events_of, wire  # noqa: E402

WINDOW = 200_000  # tokens of the context window of the agents here: none of them compacts by itself


class Peer(Process):
    def __init__(self, *command: str, folder: Path) -> None:
        super().__init__(sys.executable, str(HERE / "peers.py"), *command, cwd=folder, variables=environment())

    def get(self, **request: Any) -> Any:
        if not (answer := self.ask(json.dumps(request))):
            self.wait()
            raise SystemExit(f"{self.arguments} ended:\n{self.log}")
        return json.loads(answer)


class Bench:
    """What the rows share: a folder, the model's process, databases, and the table."""

    def __init__(self, folder: Path, model: Peer, given: argparse.Namespace) -> None:
        self.folder, self.model, self.given, self.repeat = folder, model, given, given.repeat
        self.rows: list[list[str]] = [["what", "memws", "floor, of the same run", "figure", "goal"]]
        self._numbers = itertools.count(1)

    def add(self, what: str, told: str, floor: str, samples: Sequence[float], goal: str = "", unit: str = "") -> None:
        """A line: the median of the samples, and whether it is as the goal says, such as "≤ 1.2"."""
        figure, wanted = median(samples), ""
        if goal:
            sign, limit = goal[0], float(goal[1:])
            is_reached = figure <= limit if sign == "≤" else figure >= limit
            wanted = f"{goal}{unit} {'✓' if is_reached else '✗'}"
        self.rows.append([what, told, floor, f"{figure:.3g}{unit}", wanted])

    def compare(self, what: str, ours: Sequence[float], floors: Sequence[float], goal: str = "", of: str = "") -> None:
        """A line: how many times as long as the floor of the same repetition something took, in seconds."""
        shares = [mine / floor for mine, floor in zip(ours, floors, strict=True)]
        self.add(what, milliseconds(median(ours)), f"{of}{milliseconds(median(floors))}", shares, goal)

    def database(self) -> str:
        return str(self.folder / f"bench-{next(self._numbers)}.db")

    @contextlib.contextmanager
    def serve(self, path: str = "", *flags: str, part: str = "serve") -> Iterator[Peer]:
        flags = ("--port", "0", "--db", path or self.database(), "--base-url", self.model.url, "--model", "now", *flags)
        with Peer(part, *flags, folder=self.folder) as server:
            for _ in ("page", "model"):
                server.line()
            yield server

    def peer(self, *command: str) -> Peer:
        return Peer(*command, folder=self.folder)


def client(server: Peer) -> contextlib.AbstractAsyncContextManager[Wire]:
    """One connection, read as fast as its server sends."""
    return wire(server, checks=False, max_size=None)


async def create(connection: Wire, name: str, **config: Any) -> None:
    await connection.ok("create_agent", config={"name": name, "context_window": WINDOW, "model": "now", **config})


async def turn(connection: Wire, agent: str, text: str, mark: str = "") -> float:
    """Seconds from sending a message to the end of its turn; frames of another agent or turn fail."""
    start = time.perf_counter()
    frame = json.dumps({"type": "user_message", "agent_name": agent, "message": text, "id": 1})
    await connection.websocket.send(frame)
    while True:
        told = str(await connection.websocket.recv())
        assert f'"agent_name":"{agent}"' in told, told
        assert mark in told or '"assistant_message"' not in told, told
        if any(kind in told[:100] for kind in TERMINALS):
            took = time.perf_counter() - start
            assert TERMINALS[0] in told[:100], told
            return took


async def seed(server: Peer, agents: dict[str, int]) -> None:
    """Make agents and talk to them, until each has so many chat messages: three a turn."""
    async with client(server) as connection:
        for agent, messages in agents.items():
            await create(connection, agent)
            for _ in range(max(1, round(messages / 3))):
                await turn(connection, agent, "Hello there, how are you today?")


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


async def talk(server: Peer, names: list[str], per_agent: int) -> list[float]:
    async with client(server) as connection:
        return [await turn(connection, name, "And how is it now?") for name in names for _ in range(per_agent)]


def turns(bench: Bench) -> Iterator[str]:
    """A persisted, streaming turn of one step beside the openai client's own streaming call, and its CPU."""
    sizes = {10: ("≤ 0.7", 20, 2), 100: ("≤ 0.2", 10, 5), 500: ("≤ 0.1", 10, 10)}
    "The goal, the turns of a repetition, and how many of them an agent takes, which makes its history longer."
    got: dict[int, list[tuple[float, ...]]] = {size: [] for size in sizes}
    with bench.serve() as server, bench.peer("bare", bench.model.url) as bare:
        for size, (_, calls, per_agent) in sizes.items():
            asyncio.run(seed(server, {f"a{size}-{n}": size for n in range(bench.repeat * calls // per_agent)}))
            yield f"turns: {size} messages stored"
        bare.get(calls=30, body=bench.model.get())
        for number in range(bench.repeat):
            for size, (_, calls, per_agent) in sizes.items():
                count = calls // per_agent
                before = server.get()["cpu"]
                names = [f"a{size}-{number * count + place}" for place in range(count)]
                seconds = asyncio.run(talk(server, names, per_agent))
                cpu = (server.get()["cpu"] - before) / len(seconds)
                floor = bare.get(calls=calls, body=bench.model.get())
                got[size].append((median(seconds), cpu, median(floor["seconds"]), floor["cpu"]))
                yield f"turns: {size} messages"
    for size, (goal, _, _) in sizes.items():
        took, cpu, bare_took, bare_cpu = (milliseconds(median(column)) for column in zip(*got[size], strict=True))
        what = f"turn of one step with {size} messages in the window / bare `AsyncOpenAI` streaming call"
        shares = [each[0] / each[2] for each in got[size]]
        bench.add(what, f"{took} ({cpu} CPU)", f"{bare_took} ({bare_cpu} CPU)", shares, goal)
    short, long = ([1000 * each[1] for each in got[size]] for size in (10, 500))
    longest = f"with 500: {median(long):.2f} ms"
    bench.add("CPU of a turn, 10 messages in the window", f"{median(short):.2f} ms", longest, short, "≤ 3", " ms")


async def turns_a_second(servers: Sequence[Peer], clients: int, prefix: str, seconds: float) -> int:
    """How many turns so many clients, spread over servers, finish within so many seconds, a second after they began."""
    async with contextlib.AsyncExitStack() as stack:
        places = itertools.islice(itertools.cycle(servers), clients)
        connections = [await stack.enter_async_context(client(server)) for server in places]
        for number, connection in enumerate(connections):
            await create(connection, f"{prefix}-{number}", model="ms-200")
        fresh = itertools.count()

        async def one(number: int) -> None:
            mark = f"<<{prefix} {next(fresh)}>>"
            await turn(connections[number], f"{prefix}-{number}", f"How are you? {mark}", mark)

        return await finished(clients, seconds, one)


def throughput(bench: Bench) -> Iterator[str]:
    """Turns a second with a model that takes 200 ms, starts spread over these, of the ideal and of the bare client."""
    goals, seconds = {8: "≥ 0.97", 32: "≥ 0.95", 128: ""}, 2.0
    got: dict[int, list[tuple[float, float]]] = {clients: [] for clients in goals}
    with bench.serve() as server, bench.peer("bare", bench.model.url) as bare:
        for number in range(bench.repeat):
            for clients in goals:
                count = asyncio.run(turns_a_second([server], clients, f"t{number}-{clients}", seconds))
                plain = bare.get(clients=clients, seconds=seconds, body=bench.model.get())["count"]
                ideal = clients / 0.2 * seconds
                got[clients].append((count / ideal, plain / ideal))
                yield f"throughput: {clients} clients"
    for clients, goal in goals.items():
        shares, plain = zip(*got[clients], strict=True)
        what = f"turns a second, model at 200 ms, {clients} clients / ideal"
        told = f"{median(shares) * clients / 0.2:.0f} of {clients / 0.2:.0f}, each delivered to its client"
        bench.add(what, told, f"`AsyncOpenAI` alone: {median(plain):.2f} of the ideal", shares, goal)
    what = "the same with 128 clients / `AsyncOpenAI` alone with 128, in the same run"
    told, floor = f"{median(shares):.2f} of the ideal", f"{median(plain):.2f} of the ideal"
    bench.add(what, told, floor, [ours / other for ours, other in got[128]], "≥ 2.9")


async def converse(server: Peer) -> tuple[float, list[JSON]]:
    """Seconds of 100 turns of one agent, and its events without times and made-up ids."""
    async with client(server) as connection:
        await create(connection, "taped", model="ms-200")
        seconds = [await turn(connection, "taped", f"How are you for the {number}th time?") for number in range(100)]
        await connection.ok("hello", message_types=["*"])
        events = await events_of(connection, "taped")
    varying = {"time", "turn_id", "duration_ms"}
    return sum(seconds), [{name: value for name, value in each.items() if name not in varying} for each in events]


def tape(bench: Bench) -> Iterator[str]:
    """100 turns with a model of 200 ms, recorded, and their replays."""
    path, got = str(bench.folder / "bench.tape"), []
    with bench.serve("", "--record", path) as server:
        recorded, events = asyncio.run(converse(server))
    yield "tape: recorded"
    for _ in range(bench.repeat):
        with bench.serve("", "--replay", path) as server:
            seconds, replayed = asyncio.run(converse(server))
        assert replayed == events
        got.append(seconds)
        yield "tape: replayed"
    what, told = "100 turns recorded with a model of 200 ms / replayed: the same events", f"{median(got):.2f} s"
    bench.add(what, told, f"recorded in {recorded:.1f} s", [recorded / each for each in got], "≥ 20")


async def many_turns(server: Peer, _: Wire, number: int) -> None:
    async def one(name: str) -> None:
        async with client(server) as connection:
            await create(connection, name, model="ms-200")
            for _ in range(7):
                await turn(connection, name, "How are you?")

    await asyncio.gather(*(one(f"busy-{number}-{place}") for place in range(32)))


async def common_word(_: Peer, connection: Wire, number: int) -> None:
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        await connection.ok("search_memory", agent_name="archive", query="maru", store="archival")


async def never(_: Peer, connection: Wire, number: int) -> None:
    await create(connection, f"never-{number}", model="never")
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(turn(connection, f"never-{number}", "Is anybody there?"), 1.5)
    await connection.ok("cancel", agent_name=f"never-{number}")


async def compact(_: Peer, connection: Wire, number: int) -> None:
    await connection.ok("compact", agent_name=f"long-{number}")
    await asyncio.sleep(2)


async def compute(_: Peer, connection: Wire, number: int) -> None:
    await create(connection, f"computes-{number}", model="tool-compute", tools=["send_message", "compute"])
    await turn(connection, f"computes-{number}", "Compute it, please. <<now>>")


SCENES = {  # what others do meanwhile, and the p99 to be reached, in ms
    "32 turns at once": (many_turns, "≤ 10"),
    "a very common word searched in 1,000,000 rows": (common_word, "≤ 10"),
    "an endpoint that never answers": (never, "≤ 10"),
    "a compaction of 500 messages": (compact, "≤ 10"),
    "a tool that computes for 5 s": (compute, "≤ 15"),
}


def bystanders(bench: Bench) -> Iterator[str]:
    """The p99 of somebody's get_agent while others make work."""
    path = bench.database()
    with bench.serve(path) as server:
        asyncio.run(seed(server, {"quiet": 10} | {f"long-{number}": 500 for number in range(bench.repeat)}))
    yield "bystander: agents stored"
    archive = Filled(path, texts(), "archival")
    for _ in range(1_000_000 // STEP):
        archive.insert(STEP)
        yield f"bystander: {archive.rows:,} rows indexed"
    archive.database.close()
    got: dict[str, list[JSON]] = {name: [] for name in SCENES}
    with bench.peer("echo") as echo, bench.serve(path, part="serve-tool") as server:

        async def play(work: Callable[[Peer, Wire, int], Any], number: int) -> None:
            async with client(server) as connection:
                await work(server, connection, number)

        for number in range(bench.repeat):
            for name, (work, _) in SCENES.items():
                with bench.peer("bystander", server.url, echo.url, "quiet") as watcher:
                    asyncio.run(play(work, number))
                    got[name].append(watcher.get())
                yield f"bystander: {name}"
    for name, found in got.items():
        p99, echoes = ([1000 * percentile(each[who], 0.99) for each in found] for who in ("command", "echo"))
        middle = median(percentile(each["command"], 0.5) for each in found)
        measured = f"{median(p99):.1f} ms (p50 {milliseconds(middle)})"
        floor = f"echo beside it: p99 {median(echoes):.1f} ms"
        bench.add(f"p99 of somebody's command during {name}", measured, floor, p99, SCENES[name][1], " ms")


async def grown(server: Peer, count: int) -> float:
    """The KB of memory that each of so many quiet connections takes, after some others."""
    async with contextlib.AsyncExitStack() as stack:
        sizes = []
        for more in (20, count):
            for _ in range(0, more, 20):
                some = [connect(server.url, compression=None, ping_interval=None) for _ in range(20)]
                await asyncio.gather(*map(stack.enter_async_context, some))
            sizes.append(server.get(collect=True)["memory"])
    return float((sizes[1] - sizes[0]) / count * 2**20 / 1000)


def idle(bench: Bench) -> Iterator[str]:
    """The memory of connections that do nothing, beside bare websockets with the same compression."""
    count, got = 1000, []
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    for _ in range(bench.repeat):
        with bench.peer("echo") as echo, bench.serve(":memory:", "--model", "offline") as server:
            got.append([asyncio.run(grown(each, count)) for each in (server, echo)])
        yield f"idle: {count} connections"
    ours, floors = (f"{median(column):.1f} KB" for column in zip(*got, strict=True))
    shares = [mine / floor for mine, floor in got]
    bench.add("memory of an idle connection / of bare `websockets`", ours, floors, shares, "≤ 1.2")


def start(bench: Bench) -> Iterator[str]:
    """From the call to the first accepted connection, beside importing websockets; imports."""
    samples: dict[str, list[float]] = {"script": [], "websockets.asyncio.server": [], "memws": []}
    held: list[float] = []
    variables = environment({"PYTHONPYCACHEPREFIX": str(bench.folder / "bytecode")})

    def until_imported(module: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {module}"], cwd=PROGRAM.parent, env=variables, check=True)
        return time.perf_counter() - begin

    async def accepted(server: Process) -> tuple[float, float]:
        async with connect(server.url, compression=None):
            return time.perf_counter(), memory(server.process.pid)

    def until_accepted() -> float:
        flags = "--port", "0", "--db", bench.database(), "--model", "offline"
        begin = time.perf_counter()
        with Process(sys.executable, str(PROGRAM), *flags, cwd=bench.folder, variables=variables) as server:
            end, size = asyncio.run(accepted(server))
        held.append(size)
        return end - begin

    until_imported("memws")  # from now on its bytecode is there, as for everybody's second import
    for _ in range(3 * bench.repeat):
        for name, found in samples.items():
            found.append(until_accepted() if name == "script" else until_imported(name))
        yield "start"
    bare = '`python -c "import websockets.asyncio.server"`'
    script, floor, imported = samples.values()
    bench.compare(f"`python memws.py` to the first accepted connection / {bare}", script, floor, "≤ 2.1")
    bench.compare(f'`python -c "import memws"` / {bare}', imported, floor, "≤ 1.4")
    bench.add("memory of `python memws.py` then, with `offline`", f"{median(held):.1f} MB", "", held, "≤ 50", " MB")


SINGLES, QUERIES = 300, 200  # rows that are inserted with a commit each, and queries that are timed, for each size
DEVELOPMENT = {  # recall@10 and MRR in the development sets, as the README has them
    "locomo": (0.846, 0.638), "madial-en": (0.576, 0.502), "madial-zh": (0.533, 0.466), "xquad-es": (0.987, 0.935),
}  # fmt: skip


def search(bench: Bench) -> Iterator[str]:
    """What a search finds in the sets of --data, and what it costs with so many --rows, beside the --baseline."""
    data = [str(Path(file).absolute()) for file in bench.given.data]
    stores = load(data)
    for name, category, count, *values in quality(stores):
        known = DEVELOPMENT.get(name, ()) if not category else ()
        goals = [f"≥ {value - 0.005:.3f}" for value in known] or ["", ""]
        for what, value, goal in zip(("recall@10", "MRR"), values, goals, strict=True):
            told = f"{what} of a search, {name}{category and f', {category}'}, {count} questions"
            bench.add(told, f"{value:.3f}", "", [value], goal)
    yield "search: quality"
    queries = [query["q"] for store in stores for query in store["queries"]]
    random.Random(4).shuffle(queries)
    files = {"memws": str(PROGRAM)} | ({"baseline": bench.given.baseline} if bench.given.baseline else {})
    with contextlib.ExitStack() as stack:
        peers = {name: bench.peer("search", file, *data) for name, file in files.items()}
        for name, peer in peers.items():
            stack.enter_context(peer).get(path=str(bench.folder / f"{name}.db"))
        for size in bench.given.rows:
            for name, peer in peers.items():
                peer.get(rows=size)
                yield f"search: {size:,} rows, {name}"
            costs: dict[str, dict[str, list[float]]] = {name: {"insert": [], "query": []} for name in peers}
            for tenth in range(10):
                for name, peer in peers.items():
                    costs[name]["insert"] += peer.get(insert=SINGLES // 10)
                    costs[name]["query"] += peer.get(query=queries[:QUERIES][tenth::10])
            for part, goal, goal_beside in (("insert", "≤ 2.5", ""), ("query", "", "≤ 1.2")):
                p95 = {name: 1000 * percentile(cost[part], 0.95) for name, cost in costs.items()}
                told = f"p95 {p95['memws']:.2f} ms, p50 {1000 * percentile(costs['memws'][part], 0.5):.2f} ms"
                floor = f"baseline: p95 {p95['baseline']:.2f} ms" if "baseline" in p95 else ""
                what = f"{part} with {size:,} rows, p95"
                bench.add(what, told, floor, [p95["memws"]], goal, " ms")
                if floor:
                    share = [p95["memws"] / p95["baseline"]]
                    bench.add(f"{what} / the baseline's", told, floor, share, goal_beside)


SHARED_ROWS = 100_000  # for searches on PostgreSQL


def postgres(bench: Bench) -> Iterator[str]:
    """What a turn and a search cost on PostgreSQL beside SQLite, and what more servers on one database bring."""
    with Cluster(fsync="on") as cluster:
        yield from shared_turns(bench, cluster.database())
        for count in (1, 2, 3):
            yield from shared_throughput(bench, cluster.database(), count)
        yield from shared_search(bench, cluster.database())


def shared_turns(bench: Bench, address: str) -> Iterator[str]:
    """Turns with the server that runs the agents, and with one that forwards them."""
    got: list[list[float]] = [[], [], []]
    with bench.serve() as alone, bench.serve(address) as owner, bench.serve(address) as other:
        for server in (alone, owner):
            asyncio.run(seed(server, {f"a{number}": 10 for number in range(bench.repeat)}))
        for number in range(bench.repeat):
            for server, seconds in zip((alone, owner, other), got, strict=True):
                seconds.append(median(asyncio.run(talk(server, [f"a{number}"], 20))))
            yield "postgres: turns"
    file, owned, forwarded = got
    bench.compare("turn of one step on PostgreSQL / on SQLite", owned, file, "≤ 2", of="SQLite: ")
    bench.compare("turn of one step on PostgreSQL through another server / on SQLite", forwarded, file, of="SQLite: ")


def shared_throughput(bench: Bench, address: str, count: int) -> Iterator[str]:
    clients, seconds, got = 128, 2.0, []
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(bench.serve(address)) for _ in range(count)]
        for number in range(bench.repeat):
            got.append(asyncio.run(turns_a_second(servers, clients, f"s{number}", seconds)) / seconds)
            yield f"postgres: {count} servers"
    what = f"turns a second, model at 200 ms, {clients} clients, on PostgreSQL with {count} servers"
    bench.add(what, f"{median(got):.0f} of {clients / 0.2:.0f}", "", got)


def shared_search(bench: Bench, address: str) -> Iterator[str]:
    """Searches of one agent's memory for two words."""
    p95 = []
    for path in (address, bench.database()):
        archive = Filled(path, texts())
        for _ in range(SHARED_ROWS // STEP):
            archive.insert(STEP)
            yield f"postgres: {archive.rows:,} rows indexed"
        asked = [" ".join(text.split()[:2]) for text in itertools.islice(texts(), QUERIES)]
        p95.append(1000 * percentile([archive.search(query) for query in asked], 0.95))
        archive.database.close()
    told, floor = f"{p95[0]:.1f} ms", f"SQLite: {p95[1]:.1f} ms"
    bench.add(f"query with {SHARED_ROWS:,} rows on PostgreSQL, p95", told, floor, p95[:1], "≤ 100", " ms")


BENCHES: dict[str, tuple[Callable[[Bench], Iterator[str]], int, int]] = {
    "turn": (turns, 3, 3),
    "throughput": (throughput, 0, 3),
    "bystander": (bystanders, 1 + 1_000_000 // STEP, 5),
    "tape": (tape, 1, 1),
    "idle": (idle, 0, 1),
    "start": (start, 0, 3),
    "search": (search, 2, 0),
    "postgres": (postgres, 2 * SHARED_ROWS // STEP, 4),
}
"""What is measured, in how many steps, and in how many more for each repetition."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows_named", nargs="*", metavar="row", help=f"what to measure: {', '.join(BENCHES)}")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, whose median counts (default: 5)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="for search: memories with questions, as JSON lines")
    parser.add_argument("--baseline", metavar="FILE", help="for search: a former memws.py, measured beside this one")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="for search: rows, one size or more")
    given = parser.parse_args()
    chosen = given.rows_named or [name for name in BENCHES if name != "search" or given.data]
    if unknown := [name for name in chosen if name not in BENCHES]:
        parser.error(f"unknown rows: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if "search" in chosen and not given.data:
        parser.error("search needs --data FILE…")
    progress, facts = Progress(sum(BENCHES[name][1] + given.repeat * BENCHES[name][2] for name in chosen)), machine()
    with tempfile.TemporaryDirectory(prefix="memws-bench-") as path, Peer("model", folder=Path(path)) as model:
        bench = Bench(Path(path), model, given)
        for name in chosen:
            progress.step(name, 0)
            for what in BENCHES[name][0](bench):
                progress.step(what)
    progress.end()
    print(f"{facts}; medians of {given.repeat}\n\n{rows_of(bench.rows)}")


if __name__ == "__main__":
    main()
