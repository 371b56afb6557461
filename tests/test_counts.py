"""What speed rests on, counted instead of timed: commits, frames, model calls, imports, tasks and allocations."""

import asyncio
import contextlib
import gc
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from agents import Lab, packed
from commandline import PROGRAM, Serving, environment
from endpoint import Endpoint, Reply
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websocket_serve
from wire import shape, wire

import memws

LIMIT = 10.0
"""Seconds after which what does not happen has failed its test."""
SAY_HELLO = Reply("They greet me.", calls=[("send_message", {"message": "Hello!"})])


# ---- commits ---------------------------------------------------------------------------------------------------------


class Commits:
    """Counts the writer's transactions, and holds them up while its gate is closed."""

    def __init__(self) -> None:
        self.count = 0
        self.gate = threading.Event()
        self.gate.set()

    def watch(self, connection: sqlite3.Connection) -> None:
        connection.set_trace_callback(self._see)

    def _see(self, statement: str) -> None:
        if statement == "BEGIN IMMEDIATE":
            assert self.gate.wait(LIMIT)
        self.count += statement == "COMMIT"


class WatchedStore(memws.SqliteStore):
    """A store that says how many transactions it was asked for, and how many it made of them."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "normal", asyncio.get_running_loop())
        self.commits = Commits()
        self.commits.watch(self._connection)
        self.asked = 0
        self._waiting: list[tuple[int, asyncio.Event]] = []

    async def commit(self, agent: int, changes: memws.Changes) -> None:
        self.asked += 1
        for count, reached in self._waiting:
            if self.asked >= count:
                reached.set()
        await super().commit(agent, changes)

    async def until_asked(self, count: int) -> None:
        reached = asyncio.Event()
        self._waiting.append((count, reached))
        if self.asked < count:
            await asyncio.wait_for(reached.wait(), LIMIT)


class WatchedLab(Lab):
    async def __aenter__(self) -> "WatchedLab":
        self.models = memws.Models(**self._models_options)
        self.store: WatchedStore = WatchedStore(self.path)
        return self


@pytest.mark.anyio
async def test_a_turn_of_one_step_is_two_commits(endpoint: Endpoint, tmp_path: Path) -> None:
    """A turn of one step costs two commits, one for the user's message and one for the step with the turn's end."""
    endpoint.script(SAY_HELLO, SAY_HELLO)
    async with WatchedLab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        for _ in range(2):
            before = lab.store.commits.count
            assert (await lab.say(agent, "Hello")).stop_reason == "done"
            assert lab.store.commits.count - before == 2


@pytest.mark.anyio
async def test_a_step_that_edits_memory_is_one_commit(endpoint: Endpoint, tmp_path: Path) -> None:
    """However many memory tools a step calls, it is one commit."""
    calls = [("core_memory_append", {"name": "human", "content": f"fact {number}"}) for number in range(3)]
    calls += [("archival_memory_insert", {"content": f"passage {number}"}) for number in range(3)]
    endpoint.script(Reply(calls=[*calls, ("send_message", {"message": "Noted."})]))
    async with WatchedLab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        before = lab.store.commits.count
        told = await lab.say(agent, "Keep six things")
        assert len(told.of("memory_change")) == 6
        assert lab.store.commits.count - before == 2


@pytest.mark.anyio
async def test_each_step_more_is_one_commit_more(endpoint: Endpoint, tmp_path: Path) -> None:
    """A turn of three steps costs four commits."""
    search: tuple[str, dict[str, Any]] = ("conversation_search", {"query": "tea", "request_heartbeat": True})
    again = ("archival_memory_search", {"query": "tea", "request_heartbeat": True})
    endpoint.script(Reply(calls=[search]), Reply(calls=[again]), SAY_HELLO)
    async with WatchedLab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        before = lab.store.commits.count
        await lab.say(agent, "What did I say about tea?")
        assert lab.store.commits.count - before == 4


@pytest.mark.anyio
async def test_turns_that_arrive_together_share_their_commits(endpoint: Endpoint, tmp_path: Path) -> None:
    """Of eight agents' turns at once the beginnings share their commits, and so do the ends."""
    together = 8
    endpoint.default = Reply("They greet me.", calls=SAY_HELLO.calls, hold=True)
    async with WatchedLab(endpoint, tmp_path / "a.db") as lab:
        agents = [await lab.create(f"agent{number}") for number in range(together)]
        store, begun = lab.store, lab.store.commits.count
        store.commits.gate.clear()
        turns = [asyncio.create_task(_drive(agent, lab.turn("Hello"))) for agent in agents]
        await store.until_asked(together)
        store.commits.gate.set()
        await asyncio.to_thread(endpoint.wait_requests, together)
        # The writer took what was there, one or more, and then the rest at once.
        assert store.commits.count - begun <= 2
        store.commits.gate.clear()
        endpoint.release()
        await store.until_asked(2 * together)
        store.commits.gate.set()
        await asyncio.wait_for(asyncio.gather(*turns), LIMIT)
        assert store.commits.count - begun <= 4


async def _drive(agent: memws.Agent, turn: memws.Turn) -> None:
    async for _ in agent.turn(turn):
        pass


@pytest.mark.anyio
async def test_reading_commits_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    """Opening an agent that is whole, reading its history and searching it write nothing."""
    endpoint.script(SAY_HELLO)
    async with WatchedLab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        await lab.say(agent, "Hello")
        before = lab.store.commits.count
        opened = await lab.open()
        assert opened.sections()
        await lab.store.messages(agent.id, None, 10)
        await lab.store.search(agent.id, "hello", ("recall",), None, None, None, 10, 0)
        assert lab.store.commits.count == before


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_frames_of_a_classic_turn(endpoint: Endpoint, serve: Callable[..., memws.WebSocketServer]) -> None:
    """A classic client gets six frames for a turn of one step, and nothing after them."""
    endpoint.script(SAY_HELLO)
    server = serve(base_url=endpoint.url, model="test-model")
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        assert shape(await client.turn("Hello")) == [
            ("agent_response_start", ""),
            ("internal_monologue", "They greet me."),
            ("function_message", "Running send_message({'message': 'Hello!'})"),
            ("assistant_message", "Hello!"),
            ("function_message", "Success: None"),
            ("agent_response_end", ""),
        ]
        await client.nothing_more()


@pytest.mark.anyio
async def test_frames_of_a_turn_that_everybody_sees(
    endpoint: Endpoint, serve: Callable[..., memws.WebSocketServer]
) -> None:
    """A sender who is subscribed too gets each of a turn's ten stored events once, and no more deltas than chunks."""
    endpoint.script(SAY_HELLO)
    server = serve(base_url=endpoint.url, model="test-model")
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.ok("subscribe", after=0)
        frames = await client.turn("Hello")
        stored = [
            frame["message_type"] if "message_type" in frame else frame["type"] for frame in frames if "seq" in frame
        ]
        assert stored == [
            "agent_response_start",
            "user_message",
            "internal_monologue",
            "tool_call",
            "function_message",
            "assistant_message",
            "tool_return",
            "function_message",
            "context",
            "agent_response_end",
        ]
        # 14 characters of monologue and 22 of arguments, 8 to a chunk
        assert 0 < len(frames) - len(stored) <= 5


@pytest.mark.anyio
async def test_chunks_that_arrive_together_are_one_delta(
    endpoint: Endpoint, serve: Callable[..., memws.WebSocketServer]
) -> None:
    """A thousand chunks that arrive at once reach the client as a few deltas that say the same."""
    text = "word " * 1_000
    endpoint.script(Reply(calls=[("send_message", {"message": text})], chunk=5))
    server = serve(base_url=endpoint.url, model="test-model")
    async with wire(server, "delta") as client:
        await client.ok("create_agent", config={"name": "sam"})
        deltas = [frame["message"] for frame in await client.turn("Hello") if frame.get("message_type") == "delta"]
        assert "".join(deltas) == text
        assert len(deltas) < 250


# ---- model calls -----------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_model_calls_of_a_turn(endpoint: Endpoint, serve: Callable[..., memws.WebSocketServer]) -> None:
    """Creating, loading and reading an agent calls no model, a turn calls it once a step, a compaction once."""
    search = ("conversation_search", {"query": "tea", "request_heartbeat": True})
    server = serve(base_url=endpoint.url, model="test-model")
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.ok("load_agent", name="sam")
        await client.ok("get_agent")
        await client.ok("get_context")
        await client.ok("search_memory", query="tea")
        assert endpoint.requests == []
        endpoint.script(SAY_HELLO)
        end = (await client.turn("Hello"))[-1]
        assert (len(endpoint.requests), end["usage"]["model_calls"]) == (1, 1)
        endpoint.script(Reply(calls=[search]), SAY_HELLO)
        end = (await client.turn("What of tea?"))[-1]
        assert (len(endpoint.requests), end["usage"]["model_calls"]) == (3, 2)
        assert [each["reason"] for each in packed(endpoint.requests[-1], "heartbeat")] == [memws.HEARTBEAT_REQUESTED]
        assert endpoint.embedding_requests == []


# ---- what a start imports --------------------------------------------------------------------------------------------


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROGRAM.parent,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_importing_memws_needs_websockets_alone() -> None:
    """`import memws` brings nothing but websockets and the standard library, also not what others import for it."""
    brought = modules_after("import memws") - modules_after("pass") - set(sys.stdlib_module_names)
    assert brought == {"memws", "websockets"}


HEAVY = ("openai", "httpx", "httpx2", "pydantic", "anyio", "ipywidgets", "IPython", "nest_asyncio", "nest_asyncio2")
UNNEEDED = ("multiprocessing", "unittest", "xml", "tkinter", "http.server", "readline", "pdb")


@pytest.mark.anyio
async def test_a_server_of_the_offline_model_imports_no_heavy_package(tmp_path: Path) -> None:
    """With `offline` a server starts, listens and answers without openai, ipywidgets and nest_asyncio."""
    running = Serving("--model", "offline", cwd=tmp_path, variables={"PYTHONPROFILEIMPORTTIME": "1"})
    with running:
        async with wire(_Address(running.url)) as client:  # type: ignore[arg-type]
            await client.ok("create_agent", config={"name": "sam"})
            assert (await client.turn("Hello, my name is Ada"))[-1]["stop_reason"] == "done"
        assert running.end() == 0
    imported = {line.rpartition("|")[2].strip() for line in running.log.splitlines() if line.startswith("import time:")}
    assert "websockets" in {name.partition(".")[0] for name in imported}
    assert sorted(imported.intersection((*HEAVY, *UNNEEDED))) == []


class _Address:
    """What `wire` needs of a server in another process."""

    def __init__(self, url: str) -> None:
        self.url = url


# ---- idle connections ------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def bare_server() -> AsyncIterator[str]:
    """Websockets alone, waiting for messages."""

    async def listen(connection: ServerConnection) -> None:
        async for _ in connection:
            pass

    async with websocket_serve(listen, "127.0.0.1", 0, compression=None) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"


@contextlib.asynccontextmanager
async def memws_server() -> AsyncIterator[str]:
    """A server on this very loop."""
    server = memws.WebSocketServer(host="127.0.0.1", port=0, db=":memory:", model="offline")
    server.initialize_server()
    serving = asyncio.create_task(server.start_server())
    try:
        yield server.url
    finally:
        serving.cancel()
        await asyncio.wait([serving])


@contextlib.asynccontextmanager
async def connections(url: str, count: int) -> AsyncIterator[list[Any]]:
    """So many clients that are connected, and whose server has nothing left to do for them."""
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            websocket = await stack.enter_async_context(connect(url, compression=None, max_queue=None))
            await (await websocket.ping())
            opened.append(websocket)
        yield opened


async def tasks_of(server: Callable[[], Any], count: int) -> int:
    """The tasks that connections bring, on both sides."""
    async with server() as url:
        before = len(asyncio.all_tasks())
        async with connections(url, count):
            return len(asyncio.all_tasks()) - before


@pytest.mark.anyio
async def test_an_idle_connection_has_no_task_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty idle connections have as many tasks as on bare websockets."""
    assert await tasks_of(memws_server, 20) == await tasks_of(bare_server, 20)


@pytest.mark.anyio
async def test_a_connection_is_idle_again_after_its_turns() -> None:
    """A connection that has chatted and subscribed keeps no task when all is answered."""
    async with memws_server() as url, wire(_Address(url)) as client:  # type: ignore[arg-type]
        await client.ok("create_agent", config={"name": "sam"})
        before = len(asyncio.all_tasks())
        await client.ok("subscribe", after=0)
        await client.turn("Hello")
        await client.ok("get_agent")
        await (await client.websocket.ping())
        assert len(asyncio.all_tasks()) == before


@pytest.mark.anyio
async def test_allocations_of_an_idle_connection() -> None:
    """An idle connection costs memws at most 25 allocations and 3 KB beside those of websockets."""
    count = 100
    async with memws_server() as url, connections(url, 1):
        tracemalloc.start()
        try:
            async with connections(url, count):
                blocks, size = ours(tracemalloc.take_snapshot())
        finally:
            tracemalloc.stop()
    assert 0 < blocks / count <= 25
    assert size / count <= 3_000


def ours(snapshot: tracemalloc.Snapshot) -> tuple[int, int]:
    """The live allocations that memws made, and their bytes."""
    mine = snapshot.filter_traces([tracemalloc.Filter(True, str(memws.__file__))])
    statistics: Iterable[tracemalloc.Statistic] = mine.statistics("filename")
    return sum(each.count for each in statistics), sum(each.size for each in statistics)


@pytest.mark.anyio
async def test_a_connection_that_left_is_forgotten() -> None:
    """Nothing keeps the sessions of closed connections alive."""
    async with memws_server() as url, connections(url, 1) as first:
        async with connections(url, 20):
            pass
        await (await first[0].ping())
        gc.collect()
        sessions = [each for each in gc.get_objects() if type(each) is memws.Session]
        assert [session.closed for session in sessions] == [False]
