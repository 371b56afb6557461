"""Section 11, the server as an object: threads, notebooks, loops of one's own, tools, and what is left behind."""

import asyncio
import contextlib
import gc
import importlib
import json
import shutil
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai  # noqa: F401 (half a second, once, and not in the turn of some test)
import pytest
from agents import packed
from commandline import Main, Serving
from endpoint import Endpoint, Reply, say
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import InvalidStatus
from wire import JSON, LIMIT, is_terminal, of_kind, shape, wire

import memws

pytestmark = pytest.mark.anyio
Server = memws.WebSocketServer
Serve = Callable[..., Server]
Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
MODULE = Path(memws.__file__)


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def said(events: list[JSON]) -> list[str]:
    return [event["message"] for event in of_kind(events, "assistant_message")]


def is_free(port: int) -> bool:
    socket.create_server(("127.0.0.1", port)).close()
    return True


def left_behind() -> tuple[set[threading.Thread], int]:
    """The threads of memws and the number of open descriptors."""
    gc.collect()
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("memws")}
    return threads, len(list(Path("/dev/fd").iterdir()))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Serve]:
    """Makes servers that the test starts and stops itself; in the end no thread and no descriptor more is there."""
    made: list[Server] = []
    before = left_behind()

    def server(module: Any = memws, **options: Any) -> Server:
        defaults = {"host": "127.0.0.1", "port": 0, "db": str(tmp_path / "own.db"), "sync": "normal"}
        made.append(module.WebSocketServer(**(defaults | {"model": "offline"} | options)))
        return made[-1]

    yield server
    for each in made:
        each.stop()
    assert left_behind() == before


async def test_start_and_stop(make: Serve) -> None:
    """start returns with the real port and url; stop frees them, and both may be called again."""
    server = make()
    assert (server.port, server.url) == (0, "ws://127.0.0.1:0")
    server.stop()
    for _ in range(2):
        assert server.start() is server.start() is server
        port = server.port
        assert (server.host, port > 0, server.url) == ("127.0.0.1", True, f"ws://127.0.0.1:{port}")
        assert repr(server) == f"<memws.WebSocketServer {server.url} listening>"
        async with wire(server) as client:
            assert (await client.ok("hello"))["offline"] is True
        server.stop()
        server.stop()
        assert is_free(port)
        assert repr(server) == f"<memws.WebSocketServer {server.url} not listening>"


async def test_stop_leaves_nothing_of_a_busy_server(make: Serve, endpoint: Endpoint) -> None:
    """stop leaves no thread and no descriptor of a server with connections, open turns, waiting messages, tools."""
    endpoint.script(say("held", hold=True))
    server = make(model="test-model", base_url=endpoint.url, api_key="key").start()
    silent = socket.create_connection((server.host, server.port), LIMIT)

    @server.tool
    async def wait() -> str:
        await asyncio.get_running_loop().create_future()
        return ""

    async with wire(server, agent={"name": "held"}) as client, wire(server) as other:
        await other.ok("create_agent", config={"name": "tool", "tools": ["wait"]})
        await other.ok("subscribe")
        await client.say("hi")
        await asyncio.to_thread(endpoint.wait_requests, 1)
        endpoint.script(Reply(calls=[("wait", {})]))
        await other.say("hi")
        await other.until(lambda frame: "wait" in frame.get("message", ""))
        await client.say("waits")
        await asyncio.to_thread(server.stop)
        assert [await client.closed(), await other.closed()] == [1001, 1001]
    with silent, contextlib.suppress(ConnectionResetError):
        assert silent.recv(1) == b""


def test_stop_names_a_tool_that_will_not_end(online: Serve, endpoint: Endpoint, caplog: Log) -> None:
    """stop does not wait for a sync tool that blocks: it names it in a warning, and its result is dropped."""
    server = online()
    entered, leave = threading.Event(), threading.Event()

    @server.tool
    def stubborn() -> str:
        entered.set()
        leave.wait(LIMIT)
        return "late"

    endpoint.script(Reply(calls=[("stubborn", {})]))
    server.create_new_agent({"tools": ["stubborn"]})
    with ThreadPoolExecutor(1) as caller:
        step = caller.submit(server.run_step, "hi")
        assert entered.wait(LIMIT)
        (blocked,) = [thread for thread in threading.enumerate() if thread.name == "memws-tool-stubborn"]
        server.stop()
        events = step.result(LIMIT)
    assert "memws-tool-stubborn" in caplog.text
    leave.set()
    blocked.join(LIMIT)
    assert (events[-1]["stop_reason"], "late" in json.dumps(events)) == ("interrupted", False)


@pytest.mark.parametrize("form", ["start", "start_server"])
def test_what_is_held_is_named(make: Serve, tmp_path: Path, form: str) -> None:
    """A port held by another program is named, and port=0; a database is one server's; what fails leaves nothing."""

    def start(server: Server) -> None:
        asyncio.run(server.start_server()) if form == "start_server" else server.start()

    with socket.create_server(("127.0.0.1", 0)) as holder:
        server = make(port=holder.getsockname()[1])
        with pytest.raises(memws.MemwsError, match=f"{server.options.port}.*port=0"):
            start(server)
        assert list(tmp_path.glob("own*")) == []
    server = make().start()
    with pytest.raises(memws.MemwsError, match="stop the memws server that uses it"):
        start(make())
    server.stop()
    make().start()


def test_wrong_options_are_named() -> None:
    """An option that cannot be, or that there is not, is refused by its name (test_cli.py has more)."""
    for wrong in ({"port": "8282"}, {"max_steps": True}, {"idle_timeout": float("nan")}, {"colour": "red"}):
        with pytest.raises((memws.MemwsError, TypeError), match=next(iter(wrong))):
            memws.WebSocketServer(**wrong)


async def test_run_step_gives_the_turns_events(serve: Serve) -> None:
    """run_step gives all stored events of its turn as wire dicts, those that a subscriber of all gets."""
    server = serve()
    agent = server.create_new_agent({"name": "sam"})
    assert (agent.name, server.agent, server.agent_name) == ("sam", agent, "sam")
    async with wire(server, "*") as client:
        await client.ok("subscribe", agent_name="sam")
        events = await asyncio.to_thread(server.run_step, "My name is Ada")
        assert events == [frame for frame in await client.until(is_terminal) if "seq" in frame]
    assert shape(events)[:2] == [("agent_response_start", ""), ("user_message", "My name is Ada")]
    assert (events[-1]["type"], events[-1]["stop_reason"], len(said(events))) == ("agent_response_end", "done", 1)


@contextlib.asynccontextmanager
async def running(server: Server, form: str = "start_server") -> AsyncIterator["asyncio.Task[None]"]:
    """start_server on this loop, or the thread form, cancelled or stopped at the end unless it has ended."""
    task = asyncio.create_task(server.start_server() if form == "start_server" else asyncio.to_thread(server.start))
    try:
        async with asyncio.timeout(LIMIT):
            while not server._listeners and not task.done():  # noqa: ASYNC110 (the server has no event for it)
                await asyncio.sleep(0)
        if task.done():
            task.result()
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("form", ["start", "start_server"])
def test_blocking_calls_work_before_start(make: Serve, form: str) -> None:
    """Agents are made, loaded and talked to before start, on a loop that does not listen, and are there after it."""
    server = make()
    server.create_new_agent({"name": "sam"})
    first = server.run_step("hi")
    server.load_agent("sam")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port or 1), timeout=LIMIT)

    async def go_on() -> None:
        async with running(server, form), wire(server) as client:
            assert (await client.ok("load_agent", name="sam"))["last_seq"] == first[-1]["seq"]
            assert (await asyncio.to_thread(server.run_step, "again"))[0]["seq"] == first[-1]["seq"] + 1

    asyncio.run(go_on())


def test_blocking_calls_work_from_any_thread(online: Serve, endpoint: Endpoint) -> None:
    """Threads that call run_step at the same time get the events of their own turn each."""
    server = online()
    endpoint.default = lambda body: say(packed(body, "user_message")[-1]["message"])
    server.create_new_agent({"name": "sam"})
    texts = [f"I am {number}" for number in range(8)]
    with ThreadPoolExecutor(len(texts)) as threads:
        for text, events in zip(texts, threads.map(server.run_step, texts), strict=True):
            assert (said(events), len({event["turn_id"] for event in events})) == ([text], 1)


def test_blocking_calls_are_refused_on_the_servers_own_loop(online: Serve, endpoint: Endpoint) -> None:
    """On the server's own thread a blocking call raises at once and names the one to await there."""
    server = online()
    told: list[str] = []
    calls: dict[str, Callable[[], Any]] = {
        "run_step_async": lambda: server.run_step("x"),
        "load_agent_async": lambda: server.load_agent("sam"),
        "create_new_agent_async": lambda: server.create_new_agent({}),
        "close": server.stop,
    }

    @server.tool
    async def ask() -> str:
        for blocking in calls.values():
            with pytest.raises(memws.MemwsError) as caught:
                blocking()
            told.append(str(caught.value))
        return (await server.load_agent_async("sam")).name

    endpoint.script(Reply(calls=[("ask", {"request_heartbeat": True})]))
    server.create_new_agent({"name": "sam", "tools": ["ask"]})
    events = server.run_step("hi")
    assert [text.rpartition("await ")[2].removesuffix("()") for text in told] == list(calls)
    assert of_kind(events, "tool_return")[0]["message"] == "sam"


async def test_the_agent_of_the_object_is_its_own(serve: Serve) -> None:
    """server.agent is what this object made or loaded last, whatever connections do; without one run_step says so."""
    server = serve()
    with pytest.raises(memws.MemwsError, match="create_new_agent or load_agent first") as caught:
        server.run_step("hi")
    assert (caught.value.code, server.agent, server.agent_name) == ("no_agent", None, None)
    server.create_new_agent({"name": "sam"})
    with pytest.raises(memws.MemwsError, match=r"1 known: 'sam'") as caught:
        server.load_agent("sammy")
    assert (caught.value.code, server.agent_name) == ("unknown_agent", "sam")
    async with wire(server, agent={"name": "ada"}) as client:
        assert server.agent_name == "sam"
        server.load_agent("ada")
        await client.ok("load_agent", name="sam")
        assert {event["agent_name"] for event in server.run_step("hi")} == {"ada"}
        await client.ok("rename_agent", agent_name="ada", new_name="eve")
        assert server.agent_name == "eve"
        assert {event["agent_name"] for event in server.run_step("hi")} == {"eve"}


async def test_python_calls_refuse_what_the_wire_refuses(serve: Serve) -> None:
    """Texts that are too long and bad configs raise and change nothing; what cannot be stored becomes U+FFFD."""
    server = serve()
    for config in ({"name": "_"}, {"model": 5}, {"blocks": 1}, {"name": 7}):
        with pytest.raises(memws.MemwsError, match=next(iter(config)).removesuffix("s")) as caught:
            server.create_new_agent(config)
        assert caught.value.code == "bad_config"
    server.create_new_agent({"name": "sam", "human": "a\x00b\ud800c"})
    with pytest.raises(memws.MemwsError) as caught:
        server.run_step("x" * 65_537)
    assert caught.value.code == "text_too_long"
    events = server.run_step("a\x00b\ud800c")
    assert (events[0]["seq"], of_kind(events, "user_message")[0]["message"]) == (1, "a\ufffdb\ufffdc")
    async with wire(server) as client:
        assert (await client.ok("list_agents"))["total"] == 1
        assert (await client.ok("get_agent", agent_name="sam"))["blocks"][1]["value"] == "a\ufffdb\ufffdc"


def test_only_python_names_an_endpoint(serve: Serve, endpoint: Endpoint, tmp_path: Path, main: Main) -> None:
    """create_new_agent takes base_url and api_key for this agent; no key or token is stored, told or exported, and the
    address is neither told nor exported."""
    server = serve(base_url=endpoint.url, model="test-model", api_key="secret-server", token="secret-token")
    config = {"name": "sam", "model": "test-model", "base_url": endpoint.url, "api_key": "secret-key"}
    server.create_new_agent(config)
    assert said(server.run_step("What is your key?")) == ["Hello!"]
    assert endpoint.headers[0]["authorization"] == "Bearer secret-key"
    assert config["api_key"] == "secret-key"
    with memws.connect(server.url, "secret-token") as client:
        told = json.dumps(client.command("get_agent", agent_name="sam"))
    server.stop()
    exported = main("export", "sam", "--db", tmp_path / "memws.db").stdout
    assert "What is your key?" in exported
    for secret in ("secret-", endpoint.url, endpoint.url.split("/")[2]):
        assert secret not in told + exported
    assert all(b"secret-" not in path.read_bytes() for path in tmp_path.glob("memws.db*"))
    server = serve()
    server.load_agent("sam")
    assert said(server.run_step("hi")) == ["Hello!"]
    assert "secret-key" not in endpoint.headers[-1]["authorization"]


@pytest.mark.parametrize("way", ["start", "a blocking call", "a reload"])
async def test_a_cell_that_runs_again_takes_over(
    make: Serve, port: int, way: str, monkeypatch: Patch, tmp_path: Path
) -> None:
    """A new object for the same address, also after importlib.reload, at its first call, stops the old server; clients
    find the same agents."""
    shutil.copy(MODULE, tmp_path / "memws_reloaded.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("memws_reloaded") if way == "a reload" else memws
    first = make(module, port=port).start()
    first.create_new_agent({"name": "sam"})
    async with wire(first) as client:
        await client.ok("load_agent", name="sam")
        if way == "a reload":
            importlib.reload(module)
        second = make(module, port=port, max_steps=3)
        if way == "a blocking call":
            await asyncio.to_thread(second.load_agent, "sam")
            assert second.run_step("hi")[-1]["stop_reason"] == "done"
        await asyncio.to_thread(second.start)
        assert await client.closed() == 1001
    assert (second.port, type(second) is type(first)) == (port, way != "a reload")
    assert [thread.name for thread in threading.enumerate()].count("memws") == 1
    first.stop()
    async with wire(second) as client:
        assert (await client.ok("get_agent", agent_name="sam"))["settings"]["max_steps"] == 3
    second.stop()
    assert is_free(port)


async def test_start_server_serves_until_cancelled(make: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """start_server serves on the caller's loop and says where; a cancel frees the port and leaves no task."""
    server = make()
    tasks = asyncio.all_tasks()
    for _ in range(2):
        async with running(server):
            port = server.port
            assert capsys.readouterr().out.startswith(f"memws {memws.__version__} listening on {server.url}\n")
            async with wire(server, "*", agent={}) as client:
                assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
                assert len(server.interface.clients) == 1  # the one before is gone
                assert [thread for thread in left_behind()[0] if thread.name == "memws"] == []
                await server.create_new_agent_async({})
                assert (await server.run_step_async("hi"))[-1]["stop_reason"] == "done"
        assert (asyncio.all_tasks(), is_free(port)) == (tasks, True)


def test_what_came_before_start_server(make: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """start_server serves on the port that initialize_server has bound and told."""
    server = make()
    server.initialize_server()
    port = server.port
    assert f"listening on ws://127.0.0.1:{port}\n" in capsys.readouterr().out

    async def serve_on() -> None:
        async with running(server), wire(server, agent={}) as client:
            assert ((await client.turn("hi"))[-1]["stop_reason"], server.port) == ("done", port)

    asyncio.run(serve_on())
    assert is_free(port)


@pytest.mark.parametrize("path", [(), ("/chat",)])
async def test_handle_client_of_a_websockets_server_of_ones_own(make: Serve, path: Any) -> None:
    """handle_client serves a connection of any websockets server, with the old second argument too; close ends it."""
    server = make()
    async with serve_websockets(lambda websocket: server.handle_client(websocket, *path), "127.0.0.1", 0) as own:
        server.port = own.sockets[0].getsockname()[1]
        async with wire(server, agent={"name": "sam"}) as client:
            assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
            assert len(server.interface.clients) == 1
            await server.close()
            assert await client.closed() in (1001, 1006)


async def test_close_on_ones_own_loop(make: Serve) -> None:
    """On the loop that the server runs on, close is awaited instead of stop; it listens once, and then returns."""
    server = make()
    async with running(server) as task, wire(server) as client:
        with pytest.raises(memws.MemwsError, match="listens already"):
            await server.start_server()
        await client.ok("hello")
        with pytest.raises(memws.MemwsError, match="await close"):
            server.stop()
        await server.close()
        assert await client.closed() == 1001
        await asyncio.wait_for(task, LIMIT)


async def test_run_inside_a_running_loop(make: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: Patch) -> None:
    """In a cell run starts the thread form and says so in a line; run(block=True) names the package that it needs."""
    server = make()
    server.run()
    out = capsys.readouterr().out
    assert (out.count("\n"), server.url in out, "thread" in out) == (1, True, True)
    async with wire(server) as client:
        await client.ok("hello")
    await asyncio.to_thread(server.stop)
    for name in ("nest_asyncio", "nest_asyncio2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(memws.MemwsError, match=r"nest_asyncio.*start\(\)"):
        server.run(block=True)


SERVING = 'import asyncio, memws, socket, threading\nserver = memws.WebSocketServer("127.0.0.1", 0, db=":memory:")\n'
FREED = """
print("freed", [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])
"""
RUN_FORMS = {
    "run": "server.run()",
    "run after blocking calls": "server.create_new_agent({'name': 'sam'}); server.run()",
    "run(block=True) in a cell": """
async def cell():
    server.run(block=True)
    await asyncio.sleep(0)
loop = asyncio.new_event_loop()
loop.run_until_complete(cell())
loop.close()
""",
    "run(block=True) without a loop": "server.run(block=True)",
}


@pytest.mark.parametrize("form", RUN_FORMS)
async def test_run_blocks_until_interrupted(tmp_path: Path, form: str) -> None:
    """run, and run(block=True) in a cell, tell the address first, serve until SIGINT, and then free the port."""
    program = tmp_path / "own.py"
    program.write_text(SERVING + RUN_FORMS[form] + FREED, "utf-8")
    with Serving(cwd=tmp_path, program=program, variables={"PYTHONPATH": str(MODULE.parent)}) as process:
        assert process.out[0].startswith(f"memws {memws.__version__} listening on ws://127.0.0.1:")
        process.url = process.out[0].split("listening on ")[1].split()[0]
        async with wire(process, agent={}) as client:
            await client.turn("hi")
            process.process.send_signal(signal.SIGINT)
            assert await client.closed() == 1001
        assert (await asyncio.to_thread(process.wait), process.log) == (0, "")
        assert ("freed []" in process.out, is_free(process.port)) == (True, True)


async def test_on_a_jupyterhub_a_token_is_made(monkeypatch: Patch, make: Serve, port: int) -> None:
    """On a JupyterHub, where others reach the port, a server makes a token, and keeps it when its cell re-runs."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "hub")
    first = make(port=port).start()
    token = first.options.token
    assert token is not None
    assert len(token) >= 32
    with pytest.raises(InvalidStatus) as refused:
        async with wire(first):
            pass
    assert refused.value.response.status_code == 401
    second = make(port=port).start()
    assert second.options.token == token
    async with wire(second, additional_headers={"Authorization": f"Bearer {token}"}) as client:
        await client.ok("hello")
    assert make(port=port, token="mine").options.token == "mine"
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN")
    assert make(port=port).options.token is None
