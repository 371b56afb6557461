"""What a turn, a connection and a start cost, each beside its floor: python tests/benchmarks/run.py

Every figure is measured in the same run as its floor, in turns, and is the median of five repetitions. Client, server,
model and the bare openai client are processes of their own. The table is Markdown, on standard output:

    python tests/benchmarks/run.py                          everything, about five minutes
    python tests/benchmarks/run.py turn start --repeat 3    only these rows, quicker
    python tests/benchmarks/run.py --json new.json --compare old.json
"""

import argparse
import asyncio
import contextlib
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from commandline import PROGRAM, environment  # noqa: E402
from measure import Progress, described, machine, percentile, rows_of, texts  # noqa: E402
from websockets.asyncio.client import ClientConnection, connect  # noqa: E402

import memws  # noqa: E402

JSON = dict[str, Any]
TERMINALS = ('"agent_response_end"', '"agent_response_error"')
WINDOW = 200_000
"""Tokens of the context window of the agents here: none of them compacts by itself."""


# ======================================================================================================================
# Results
# ======================================================================================================================


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
    samples: list[float] = field(default_factory=list)
    "The figure in each repetition."

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.figure >= self.goal if self.higher else self.figure <= self.goal

    def cells(self, before: JSON | None) -> list[str]:
        goal = "" if self.goal is None else f"{'≥' if self.higher else '≤'} {self.goal:g}{self.unit}"
        mark = {None: "", True: " ✓", False: " ✗"}[self.reached]
        cells = [self.what, self.measured, self.floor, f"{self.figure:.3g}{self.unit}", goal + mark]
        if before is not None:
            earlier = before.get(self.name)
            cells.append("" if earlier is None else f"{earlier['figure']:.3g}{self.unit}")
        return cells


# ======================================================================================================================
# Processes
# ======================================================================================================================


def clean_environment(**variables: str) -> dict[str, str]:
    """An environment without settings of memws, in which imported modules keep their bytecode, as they usually do."""
    return {name: value for name, value in environment(variables).items() if name != "PYTHONDONTWRITEBYTECODE"}


class Peer:
    """A process of peers.py, while a `with` block lasts."""

    def __init__(self, *command: str, folder: Path) -> None:
        self._log = (folder / f"{command[0]}-{random.randrange(10**9)}.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peers.py"), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=clean_environment(),
            cwd=folder,
        )
        self.first = self._line()
        self.address = self.first.split()[-1] if self.first else ""

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self._process.args!r} ended:\n{self._log.read().decode()}")
        return line.rstrip("\n")

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._line())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()


class Bench:
    """What the rows share: a folder, the model's process, and agents to copy."""

    def __init__(self, folder: Path, repeat: int) -> None:
        self.folder = folder
        self.repeat = repeat
        self.rows: list[Row] = []
        self.model = Peer("model", folder=folder)
        self._template: JSON = {}
        self._databases = 0

    def close(self) -> None:
        self.model.__exit__()

    def add(
        self, name: str, what: str, measured: str, floor: str, samples: list[float], goal: float | None, **more: Any
    ) -> None:
        self.rows.append(Row(name, what, measured, floor, statistics.median(samples), goal, samples=samples, **more))

    # -- databases --

    def database(self) -> str:
        self._databases += 1
        return str(self.folder / f"bench-{self._databases}.db")

    def template(self) -> JSON:
        """An exported agent whose history is one turn, as a server has stored it."""
        if not self._template:
            path = self.database()
            with self.serve(path) as server:
                asyncio.run(self._two_turns(server.address))
            with contextlib.closing(memws.read_database(path)) as connection:
                self._template = memws.export_agent(connection, "template")
        return self._template

    async def _two_turns(self, url: str) -> None:
        async with client(url) as connection:
            await connection.create("template")
            for _ in range(2):
                await connection.turn("template", "Hello there, how are you today? <<template>>")

    def seed(self, path: str, name: str, messages: int, *, model: str = "now", window: int = 0) -> None:
        """Store an agent with about so many chat messages, the last `window` of them (0: all) in its window."""
        template = self.template()
        turn_id = template["turns"][-1]["turn_id"]
        one = {
            table: [row for row in template[table] if row["turn_id"] == turn_id]
            for table in ("messages", "turns", "events", "requests")
        }
        size = len(one["messages"])
        count = max(1, round(messages / size))
        first_message, first_seq = one["messages"][0]["id"], one["events"][0]["seq"]
        seqs = len(one["events"])
        data: JSON = {**template, **{table: [] for table in one}}
        for number in range(count):
            by, above = number * size + 1 - first_message, number * seqs + 1 - first_seq
            fresh = {"turn_id": f"old-{number}"}
            for row in one["messages"]:
                data["messages"].append(row | fresh | {"id": row["id"] + by, "seq": row["seq"] + above})
            for row in one["events"]:
                text = row["text"].replace(turn_id, fresh["turn_id"])
                data["events"].append(row | fresh | {"seq": row["seq"] + above, "text": text})
            data["requests"] += [row | fresh for row in one["requests"]]
            data["turns"] += [
                row | fresh | {"first_seq": row["first_seq"] + above, "last_seq": row["last_seq"] + above}
                for row in one["turns"]
            ]
        cut = count * size - round(window / size) * size + 1 if window else 0
        told = template["agent"]
        config = told["config"] | {"model": model}
        data["agent"] = told | {
            "name": name,
            "config": config,
            "state": told["state"] | {"cut": cut},
            "last_seq": count * seqs,
        }
        with contextlib.closing(memws.open_database(path, "normal")) as connection:
            memws.import_agent(connection, data, memws.MENDERS)

    # -- processes --

    def serve(self, path: str, *flags: str, part: str = "serve") -> Peer:
        flags = ("--port", "0", "--db", path, "--base-url", self.model.address, "--model", "now", *flags)
        server = Peer(part, *flags, "--rate-limit", "0", folder=self.folder)
        server._line()
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
        self.wrong = 0
        "Frames that belong to another agent or turn."

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


@contextlib.asynccontextmanager
async def client(url: str) -> Any:
    async with connect(url, compression=None, max_size=None, max_queue=None) as websocket:
        yield Client(websocket)


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.2f} ms" if value < 10 else f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


# ======================================================================================================================
# Rows
# ======================================================================================================================


def turns(bench: Bench) -> Iterator[str]:
    """A persisted, streaming turn of one step beside the openai client's own streaming call, and its CPU."""
    sizes = {10: (0.7, 20, 2), 100: (0.2, 10, 5), 500: (0.1, 10, 10)}
    "The goal, the turns of a repetition, and how many of them an agent takes, which makes its history longer."
    path = bench.database()
    for size, (_, calls, per_agent) in sizes.items():
        for number in range(bench.repeat * calls // per_agent):
            bench.seed(path, f"a{size}-{number}", size - 3)
        yield f"turns: {size} messages stored"
    bench.seed(path, "warm", 10)
    got: dict[int, list[JSON]] = {size: [] for size in sizes}

    async def run(url: str, names: list[str], per_agent: int) -> list[float]:
        async with client(url) as connection:
            for name in names:
                await connection.turn(name, "How are you?")  # the first one after a load is not counted
            return [await connection.turn(name, "And how is it now?") for name in names for _ in range(per_agent)]

    with bench.serve(path) as server, Peer("bare", bench.model.address, folder=bench.folder) as bare:
        asyncio.run(run(server.address, ["warm"], 30))
        bare.ask(calls=30, body=bench.last_body())
        for number in range(bench.repeat):
            for size, (_, calls, per_agent) in sizes.items():
                count = calls // per_agent
                names = [f"a{size}-{number * count + place}" for place in range(count)]
                before = server.ask()["cpu"]
                seconds = asyncio.run(run(server.address, names, per_agent))
                cpu = (server.ask()["cpu"] - before) / (len(seconds) + len(names))
                floor = bare.ask(calls=calls, body=bench.last_body())
                got[size].append(
                    {
                        "turn": statistics.median(seconds),
                        "cpu": cpu,
                        "bare": statistics.median(floor["seconds"]),
                        "bare_cpu": floor["cpu"],
                    }
                )
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
    most, least = got[500], got[10]
    plain = statistics.median(each["bare_cpu"] for each in most) / statistics.median(each["bare_cpu"] for each in least)
    bench.add(
        "turn-cpu",
        "CPU of a turn with 500 messages in the window / with 10",
        milliseconds(statistics.median(each["cpu"] for each in most)),
        f"{milliseconds(statistics.median(each['cpu'] for each in least))}; the plain client: {plain:.0f} times",
        [a["cpu"] / b["cpu"] for a, b in zip(most, least, strict=True)],
        2.5,
    )


def floors(bench: Bench) -> Iterator[str]:
    """The bare floors under every row: an echo and a commit."""
    import sqlite3

    path = bench.folder / "floor.db"
    echoes: list[float] = []
    commits: dict[str, list[float]] = {"FULL": [], "NORMAL": []}

    async def echo(url: str) -> float:
        waits = []
        async with connect(url, compression=None) as websocket:
            for _ in range(500):
                start = time.perf_counter()
                await websocket.send("x" * 100)
                await websocket.recv()
                waits.append(time.perf_counter() - start)
        return statistics.median(waits)

    with Peer("echo", folder=bench.folder) as server, contextlib.closing(sqlite3.connect(path)) as database:
        database.isolation_level = None
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, text TEXT)")
        for _ in range(bench.repeat):
            echoes.append(asyncio.run(echo(server.address)))
            for sync, found in commits.items():
                database.execute(f"PRAGMA synchronous = {sync}")
                waits = []
                for _ in range(100):
                    start = time.perf_counter()
                    database.execute("INSERT INTO rows (text) VALUES (?)", ("x" * 200,))
                    waits.append(time.perf_counter() - start)
                found.append(statistics.median(waits))
            yield "floors"
    middle = {sync: milliseconds(statistics.median(found)) for sync, found in commits.items()}
    bench.add(
        "floors",
        "floors: a bare `websockets` echo; a bare SQLite commit, WAL, synchronous FULL and NORMAL",
        f"commits {middle['FULL']}, {middle['NORMAL']}",
        f"echo {milliseconds(statistics.median(echoes))}",
        [1000 * value for value in echoes],
        None,
        unit=" ms",
    )


def throughput(bench: Bench) -> Iterator[str]:
    """Turns a second with a model that takes 200 ms, starts spread over these, of the ideal."""
    goals = {8: 0.97, 32: 0.95, 128: 0.88 if find_spec("aiohttp") else 0.78}
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
                before = server.ask()["cpu"]
                count, wrong = asyncio.run(run(server.address, clients, f"t{number}-{clients}"))
                cpu = (server.ask()["cpu"] - before) / max(1, count)
                plain = bare.ask(clients=clients, seconds=seconds, body=bench.last_body())["count"]
                ideal = clients / 0.2 * seconds
                got[clients].append({"share": count / ideal, "bare": plain / ideal, "wrong": wrong, "cpu": cpu})
                yield f"throughput: {clients} clients"
    for clients, goal in goals.items():
        middle = {key: statistics.median(each[key] for each in got[clients]) for key in got[clients][0]}
        wrong = sum(each["wrong"] for each in got[clients])
        bench.add(
            f"throughput-{clients}",
            f"turns a second, model at 200 ms, {clients} clients / ideal",
            f"{middle['share'] * clients / 0.2:.0f} of {clients / 0.2:.0f}, {wrong} wrong deliveries",
            f"`AsyncOpenAI` alone: {middle['bare']:.2f} of the ideal",
            [each["share"] if not each["wrong"] else 0.0 for each in got[clients]],
            goal,
            higher=True,
        )


def bystanders(bench: Bench) -> Iterator[str]:
    """The p99 of somebody's get_agent while others make work."""
    path = bench.database()
    bench.seed(path, "quiet", 10)
    for number in range(bench.repeat):
        bench.seed(path, f"long-{number}", 500)
    yield "bystander: agents stored"
    with contextlib.closing(memws.open_database(path, "normal")) as connection:
        for done in fill_archive(connection, "archive", 1_000_000):
            yield f"bystander: {done:,} rows indexed"
    got: dict[str, list[JSON]] = {}

    async def busy(url: str, work: Callable[[Client], Any], names: list[str], seconds: float, **config: Any) -> None:
        """Work on one connection for each name, again and again."""
        until = time.monotonic() + seconds

        async def one(name: str) -> None:
            async with client(url) as connection:
                if config:
                    await connection.create(name, **config)
                while time.monotonic() < until:
                    await work(connection, name)  # type: ignore[call-arg]

        await asyncio.gather(*map(one, names))

    async def never(url: str, name: str) -> None:
        async with client(url) as connection:
            await connection.create(name, model="never")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.turn(name, "Is anybody there?"), 1.5)
            await connection.command("cancel", agent_name=name)

    def scenes(url: str, number: int) -> dict[str, Callable[[], Any]]:
        def chat(connection: Client, name: str = "") -> Any:
            return connection.turn(name, "How are you?")

        def search(connection: Client, name: str = "") -> Any:
            return connection.command("search_memory", agent_name="archive", query="maru", store="archival")

        async def compact(connection: Client, name: str = "") -> None:
            await connection.command("compact", agent_name=name)
            await asyncio.sleep(2)

        return {
            "32 turns at once": lambda: busy(url, chat, [f"b{number}-{n}" for n in range(32)], 1.5, model="ms-200"),
            "a very common word searched in 1,000,000 rows": lambda: busy(url, search, ["archive"], 1.5),
            "an endpoint that never answers": lambda: never(url, f"never-{number}"),
            "a reply of 5 MB": lambda: busy(url, chat, [f"big-{number}"], 1.0, model="big"),
            "a compaction of 500 messages": lambda: busy(url, compact, [f"long-{number}"], 0.1),
        }

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

        async def computing(url: str, name: str) -> None:
            async with client(url) as connection:
                await connection.create(name, model="tool-compute", tools=["send_message", "compute"])
                await connection.turn(name, "Compute it, please. <<now>>")

        scene = "a tool that computes for 5 s, `python memws.py`"
        with bench.serve(path, part="serve-tool") as server:
            for number in range(bench.repeat):
                during(scene, server, watcher, lambda: computing(server.address, f"cli-{number}"))  # noqa: B023
                yield f"bystander: {scene}"
        scene = "a tool that computes for 5 s, in a notebook"
        with Peer("notebook", path, bench.model.address, folder=bench.folder) as server:
            server._line()
            for number in range(bench.repeat):
                during(scene, server, watcher, lambda: computing(server.address, f"cell-{number}"))  # noqa: B023
                yield f"bystander: {scene}"
    goals = dict.fromkeys(got, 10.0) | {"a tool that computes for 5 s, `python memws.py`": 15.0, scene: 40.0}
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
            goals[name],
            unit=" ms",
        )


def fill_archive(connection: Any, name: str, rows: int) -> Iterator[int]:
    """Store an agent with so many passages in archival memory; yields after each 50,000."""
    index, text = memws.SearchIndex(connection), texts()
    config = memws.AgentConfig({"name": name}, memws.MEMORY_TOOLS)
    agent = connection.execute(
        "INSERT INTO agents (name, config, state, created, last_active, last_seq, search_version)"
        " VALUES (?,?,?,?,?,0,?)",
        (name, memws.encode_json(config.values), "{}", *[memws.now_text()] * 2, index.version),
    ).lastrowid
    now = memws.now_text()
    connection.execute("PRAGMA synchronous = OFF")
    for start in range(0, rows, 50_000):
        connection.execute("BEGIN")
        for item in range(start + 1, min(rows, start + 50_000) + 1):
            passage = next(text)
            connection.execute("INSERT INTO passages VALUES (?,?,?,?)", (agent, item, passage, now))
            index.add(connection, agent, "archival", item, "", now, passage)
        connection.execute("COMMIT")
        yield min(rows, start + 50_000)


def idle(bench: Bench) -> Iterator[str]:
    """The memory of connections that do nothing, beside bare websockets with the same compression."""
    count = 1000
    got: list[tuple[float, float]] = []

    def grown(server: Peer, crowd: Peer) -> float:
        crowd.ask(url=server.address, count=20, frames=[])
        before = server.ask(collect=True)["memory"]
        crowd.ask(url=server.address, count=count, frames=[])
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
    bench.add("idle-kb", "the same in KB", f"{middle:.1f} KB", floors, [ours for ours, _ in got], 20, unit=" KB")


def start(bench: Bench) -> Iterator[str]:
    """From the call to the first accepted connection, beside importing websockets; imports."""
    samples: dict[str, list[float]] = {"script": [], "module": [], "websockets": [], "memws": []}
    held: dict[str, list[float]] = {"script": [], "module": []}
    ways = {"script": [str(PROGRAM)], "module": ["-m", PROGRAM.stem]}
    variables = clean_environment(PYTHONPYCACHEPREFIX=str(bench.folder / "bytecode"))

    def megabytes(pid: int) -> list[float]:
        """The memory of a process, where the system tells."""
        try:
            pages = Path(f"/proc/{pid}/statm").read_text("ascii").split()[1]
        except OSError:
            return []
        return [int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20]

    def until_accepted(way: str) -> float:
        """Start a server; seconds until it has accepted a connection."""
        begin = time.perf_counter()
        command = [sys.executable, *ways[way], "serve", "--port", "0", "--db", bench.database(), "--model", "offline"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables, cwd=PROGRAM.parent
        )
        assert process.stdout is not None
        url = process.stdout.readline().decode().split()[-1]

        async def accept() -> float:
            async with connect(url, compression=None):
                took = time.perf_counter() - begin
                held[way].extend(megabytes(process.pid))
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
            for way in ways:
                took[way].append(until_accepted(way))
            took["memws"].append(until_imported("memws"))
        for name, seconds in took.items():
            samples[name].append(statistics.median(seconds))
        yield "start"
    floor = samples["websockets"]
    shown = {name: milliseconds(statistics.median(seconds)) for name, seconds in samples.items()}
    bare = '`python -c "import websockets.asyncio.server"`'
    for way, called in {"script": "python memws.py", "module": "python -m memws"}.items():
        bench.add(
            f"start-{way}",
            f"`{called}` to the first accepted connection / {bare}",
            shown[way],
            shown["websockets"],
            [ours / other for ours, other in zip(samples[way], floor, strict=True)],
            1.8,
        )
        if held[way]:
            middle = f"{statistics.median(held[way]):.1f} MB"
            bench.add(f"start-{way}-memory", "memory then, with `offline`", middle, "", held[way], 45, unit=" MB")
    bench.add(
        "import",
        f'`python -c "import memws"` / {bare}',
        shown["memws"],
        shown["websockets"],
        [ours / other for ours, other in zip(samples["memws"], floor, strict=True)],
        1.5,
    )


def first_turn(bench: Bench) -> Iterator[str]:
    """The first turn of a process over a later one, less what importing openai takes."""
    firsts, laters, imports = [], [], []

    async def talk(url: str) -> tuple[float, float]:
        async with client(url) as connection:
            await connection.create("first")
            first = await connection.turn("first", "Hello")
            return first, statistics.median([await connection.turn("first", "Hello") for _ in range(5)])

    for _ in range(bench.repeat):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import openai"], env=clean_environment(), check=True)
        middle = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import websockets.asyncio.server"], env=clean_environment(), check=True)
        imports.append(2 * middle - begin - time.perf_counter())
        with bench.serve(bench.database()) as server:
            first, later = asyncio.run(talk(server.address))
        firsts.append(first)
        laters.append(later)
        yield "first turn"
    rest = [
        1000 * max(0.0, first - later - imported)
        for first, later, imported in zip(firsts, laters, imports, strict=True)
    ]
    bench.add(
        "first-turn",
        "the first turn of a process over a later one, less `import openai` (imported while nobody waits yet)",
        f"{milliseconds(statistics.median(firsts))}, later {milliseconds(statistics.median(laters))}",
        f"import {milliseconds(statistics.median(imports))}",
        rest,
        60,
        unit=" ms",
    )


def many_agents(bench: Bench) -> Iterator[str]:
    """Loading an agent with 10,000 stored, with few; creating one."""
    each = 11
    few, many = each * bench.repeat, 10_000
    paths = {count: bench.database() for count in (few, many)}

    async def store(path: str, count: int) -> None:
        opened = memws.SqliteStore(path, "normal", asyncio.get_running_loop())
        for begin in range(0, count, 500):
            names = [f"a{number}" for number in range(begin, min(count, begin + 500))]
            configs = [memws.AgentConfig({"name": name}, memws.MEMORY_TOOLS) for name in names]
            await asyncio.gather(*(opened.create_agent(one.name, one.values, one.blocks, None) for one in configs))
        await opened.close()

    for count, path in paths.items():
        asyncio.run(store(path, count))
        yield f"agents: {count:,} stored"

    async def run(url: str, number: int) -> tuple[float, float]:
        """Seconds to load an agent, to create one; the first of each opens the process's connections."""
        async with client(url) as connection:
            names = [f"a{number * each + place}" for place in range(each)]
            loads = [await timed(connection, "load_agent", name=name) for name in names]
            configs = [{"name": f"new-{number}-{place}"} for place in range(each)]
            creates = [await timed(connection, "create_agent", config=config) for config in configs]
            return statistics.median(loads[1:]), statistics.median(creates[1:])

    got: dict[int, list[tuple[float, float]]] = {count: [] for count in paths}
    for number in range(bench.repeat):
        for count, path in paths.items():
            with bench.serve(path, "--model", "offline") as server:
                got[count].append(asyncio.run(run(server.address, number)))
        yield "agents: loaded and created"
    loads = {count: statistics.median(load for load, _ in found) for count, found in got.items()}
    creates = {count: [1000 * create for _, create in found] for count, found in got.items()}
    bench.add(
        "load",
        f"loading an agent with {many:,} agents stored / with {few}",
        milliseconds(loads[many]),
        milliseconds(loads[few]),
        [a[0] / b[0] for a, b in zip(got[many], got[few], strict=True)],
        1.1,
    )
    bench.add(
        "create",
        f"creating an agent with {many:,} stored",
        f"{statistics.median(creates[many]):.2f} ms",
        f"with {few}: {statistics.median(creates[few]):.2f} ms",
        creates[many],
        2,
        unit=" ms",
    )


async def timed(connection: Client, command: str, **fields: Any) -> float:
    """Seconds that a command takes."""
    begin = time.perf_counter()
    await connection.command(command, **fields)
    return time.perf_counter() - begin


def long_history(bench: Bench) -> Iterator[str]:
    """A turn and a load with 100,000 messages of history, beside 10; the window is the same."""
    path, each = bench.database(), 9
    bench.seed(path, "warm", 10)
    for number in range(each * bench.repeat):
        bench.seed(path, f"short-{number}", 10)
    yield "history: stored"
    bench.seed(path, "long", 100_000, window=10)
    yield "history: 100,000 messages stored"
    got: dict[str, list[tuple[float, float]]] = {"long": [], "short": []}

    def window(size: int = 0) -> int:
        """How many messages the long one has in its window; make them `size` again, as its turns make it grow."""
        with contextlib.closing(memws.open_database(path, "normal")) as connection:
            where = "FROM agents WHERE name = 'long'"
            last = "(SELECT max(id) FROM messages WHERE agent = agents.id)"
            state, newest = connection.execute(f"SELECT state, {last} {where}").fetchone()
            if size:
                state = memws.encode_json(memws.decode_json(state) | {"cut": newest + 1 - size})
                connection.execute("UPDATE agents SET state = ? WHERE name = 'long'", (state,))
            return int(newest + 1 - memws.decode_json(state)["cut"])

    size = window()

    async def run(url: str, name: str) -> tuple[float, float]:
        async with client(url) as connection:
            await connection.command("load_agent", name="warm")
            await connection.turn("warm", "Hello")
            load = await timed(connection, "load_agent", name=name)
            return load, await connection.turn(name, "How are you?")

    for number in range(bench.repeat):
        found: dict[str, list[tuple[float, float]]] = {"long": [], "short": []}
        for place in range(each):  # a process loads an agent once
            window(size)
            for kind, name in (("long", "long"), ("short", f"short-{number * each + place}")):
                with bench.serve(path) as server:
                    found[kind].append(asyncio.run(run(server.address, name)))
        for kind, some in found.items():
            got[kind].append((statistics.median(a for a, _ in some), statistics.median(b for _, b in some)))
        yield "history: loaded and talked to"
    for place, what in enumerate(("load", "turn")):
        values = {kind: [one[place] for one in found] for kind, found in got.items()}
        bench.add(
            f"history-{what}",
            f"{what} with 100,000 messages of history / with 10, the window being the same",
            milliseconds(statistics.median(values["long"])),
            milliseconds(statistics.median(values["short"])),
            [a / b for a, b in zip(values["long"], values["short"], strict=True)],
            1.3,
        )


def counts(bench: Bench) -> Iterator[str]:
    """What is counted, not timed: commits, tokens that memws adds, the share of the prompt that stays."""
    alone, shared, stays = [], [], []
    sections: list[JSON] = []
    together = 20

    async def run(server: Peer) -> None:
        async with contextlib.AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(client(server.address)) for _ in range(together)]
            for number, connection in enumerate(connections):
                await connection.create(f"c{number}")
            context = await connections[0].command("get_context")
            sections[:] = context["sections"]
            await connections[0].turn("c0", "Hello")
            for _ in range(bench.repeat):
                before, prompt = server.ask()["commits"], prompt_of(bench.last_body())
                await connections[0].turn("c0", "How are you?")
                alone.append(server.ask()["commits"] - before)
                grown = prompt_of(bench.last_body())
                pairs = enumerate(zip(prompt, grown, strict=False))
                same = next((place for place, pair in pairs if pair[0] != pair[1]), len(prompt))
                stays.append(same / len(prompt))
                before = server.ask()["commits"]
                await asyncio.gather(
                    *(connection.turn(f"c{number}", "Hello") for number, connection in enumerate(connections))
                )
                shared.append((server.ask()["commits"] - before) / together)
                await connections[0].turn("c0", "Well")

    def prompt_of(body: JSON) -> str:
        """The prompt as a prefix cache sees it: tools first, then the messages."""
        return json.dumps([body["tools"], *body["messages"]])[:-1]

    with bench.serve(bench.database(), "--count") as server:
        asyncio.run(run(server))
    yield "counts"
    bench.add("commits", "commits of a one-step turn", f"{statistics.median(alone):g}", "", alone, 2)
    bench.add(
        "commits-shared",
        f"commits a turn where {together} turns arrive together",
        f"{statistics.median(shared):.2g}",
        "",
        shared,
        2,
    )
    tokens = {section["name"]: section["tokens"] for section in sections}
    added = {name: count for name, count in tokens.items() if name in ("system", "tools", "core_memory")}
    bench.add(
        "prompt",
        "tokens (estimated) that memws adds to every call: instructions, tools, core memory as it begins",
        " + ".join(f"{count} {name}" for name, count in added.items()),
        "",
        [float(sum(added.values()))],
        None,
    )
    what = "share of a prompt that is the next one's prefix"
    bench.add("prefix", what, f"{min(stays):.0%}", "", stays, 1, higher=True)


def fan_out(bench: Bench) -> Iterator[str]:
    """One agent's 600 tokens at 200 a second to 1,000 subscribers of everything."""
    subscribers = 1000
    got: list[JSON] = []

    async def run(server: Peer, crowd: Peer) -> JSON:
        async with client(server.address) as connection:
            await connection.create("star", model="pace-600")
            hello = {"type": "command", "command": "hello", "message_types": ["*"]}
            subscribe = {"type": "command", "command": "subscribe", "agent_name": "star"}
            await asyncio.to_thread(lambda: crowd.ask(url=server.address, count=subscribers, frames=[hello, subscribe]))
            before = server.ask(collect=True)["memory"]
            work = asyncio.create_task(connection.turn("star", "Tell me a long story"))
            most = before
            while not work.done():
                await asyncio.sleep(0.25)
                most = max(most, server.ask()["memory"])
            ends: list[float] = []
            while not ends or not all(ends):
                await asyncio.sleep(0.2)
                ends = crowd.ask(ended=True)
            return {
                "spread": max(ends) - min(ends),
                "took": await work,
                "memory": (most - before) / 1e6,
            }

    for _ in range(bench.repeat):
        with bench.serve(bench.database()) as server, Peer("crowd", folder=bench.folder) as crowd:
            got.append(asyncio.run(run(server, crowd)))
        yield f"fan-out: {subscribers} subscribers"
    middle = {key: statistics.median(each[key] for each in got) for key in got[0]}
    bench.add(
        "fan-out",
        f"{subscribers:,} subscribers, 600 tokens at 200 a second: last frame at the last after the first has it",
        f"turn {middle['took']:.2f} s, memory {middle['memory']:+.0f} MB",
        "model alone 3.0 s",
        [each["spread"] for each in got],
        1,
        unit=" s",
    )


# ======================================================================================================================
# The command
# ======================================================================================================================

BENCHES: dict[str, tuple[Callable[[Bench], Iterator[str]], Callable[[int], int]]] = {
    "floors": (floors, lambda repeat: repeat),
    "turn": (turns, lambda repeat: 3 + 3 * repeat),
    "throughput": (throughput, lambda repeat: 3 * repeat),
    "bystander": (bystanders, lambda repeat: 21 + 7 * repeat),
    "idle": (idle, lambda repeat: repeat),
    "start": (start, lambda repeat: repeat),
    "first": (first_turn, lambda repeat: repeat),
    "agents": (many_agents, lambda repeat: 2 + repeat),
    "history": (long_history, lambda repeat: 2 + repeat),
    "counts": (counts, lambda repeat: 1),
    "fan-out": (fan_out, lambda repeat: repeat),
}
"""What is measured, and in how many steps."""


def table(rows: list[Row], before: dict[str, JSON] | None) -> str:
    head = ["what", "memws", "floor, of the same run", "figure", "goal"] + (["before"] if before is not None else [])
    return rows_of([head, *(row.cells(before) for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"what to measure: {', '.join(BENCHES)}; all of them if none is named")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions, whose median counts (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--compare", metavar="FILE", help="show the figures of an earlier --json beside these")
    given = parser.parse_args()
    if unknown := [name for name in given.rows if name not in BENCHES]:
        parser.error(f"unknown rows: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    before = None
    if given.compare:
        before = {row["name"]: row for row in json.loads(Path(given.compare).read_text("utf-8"))["rows"]}

    facts = machine()
    chosen = given.rows or list(BENCHES)
    progress = Progress(sum(BENCHES[name][1](given.repeat) for name in chosen))
    folder = Path(tempfile.mkdtemp(prefix="memws-bench-"))
    bench = Bench(folder, given.repeat)
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
    print(table(bench.rows, before))
    if given.json:
        text = json.dumps({"machine": facts, "rows": [asdict(row) for row in bench.rows]}, indent=1)
        Path(given.json).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
