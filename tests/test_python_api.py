"""Section 11, the server as an object: threads, notebooks, loops of one's own, tools, and what is left behind."""

import asyncio
import contextlib
import gc
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import openai  # noqa: F401 (half a second, once, and not in the turn of some test)
import pytest
from endpoint import Endpoint, Reply
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from wire import JSON, LIMIT, check_event, check_request, is_terminal, of_kind, shape, wire

import memws

Serve = Callable[..., memws.WebSocketServer]
MODULE = Path(memws.__file__)


@pytest.fixture
def online(serve: Serve, endpoint: Endpoint) -> Callable[..., memws.WebSocketServer]:
    """Starts a server whose model is the scripted endpoint."""

    def start(**options: Any) -> memws.WebSocketServer:
        return serve(base_url=endpoint.url, model="test-model", api_key="key", **options)

    return start


@pytest.fixture
def options(tmp_path: Path) -> JSON:
    """Options of a server that the test makes itself."""
    return {"host": "127.0.0.1", "port": 0, "db": str(tmp_path / "own.db"), "sync": "normal", "model": "offline"}


@pytest.fixture
def address(options: JSON) -> JSON:
    """Options with a fixed port that nobody holds."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return {**options, "port": probe.getsockname()[1]}


def reply(*texts: str, **more: Any) -> Reply:
    """An answer through send_message."""
    return Reply(calls=[("send_message", {"message": text}) for text in texts], **more)


def command(client: ClientConnection, name: str, /, **fields: Any) -> JSON:
    """The result of a command on a blocking connection that has nothing else to read."""
    frame = {"type": "command", "command": name, **fields}
    check_request(frame)
    client.send(json.dumps(frame))
    answer = check_event(str(client.recv(timeout=LIMIT)))
    assert answer["ok"] is True, answer
    result: JSON = answer["result"]
    return result


def close_code(client: ClientConnection) -> int | None:
    """Read until the server has closed the connection; its close code."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            check_event(str(client.recv(timeout=LIMIT)))
    return client.close_code


def left_behind() -> tuple[set[threading.Thread], int]:
    """The threads of memws and the number of open descriptors."""
    gc.collect()
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("memws")}
    return threads, len(list(Path("/dev/fd").iterdir()))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """At the end of the test there are no more threads and descriptors than at its beginning."""
    before = left_behind()
    yield
    assert left_behind() == before


@pytest.fixture
def make(nothing_left: None) -> Iterator[Callable[..., memws.WebSocketServer]]:
    """Makes servers that the test starts and stops itself; one that a failing test leaves is stopped."""
    made: list[memws.WebSocketServer] = []

    def server(options: JSON, module: Any = memws, **more: Any) -> memws.WebSocketServer:
        made.append(module.WebSocketServer(**(options | more)))
        return made[-1]

    yield server
    for each in made:
        each.stop()


# ---- start and stop --------------------------------------------------------------------------------------------------


def test_start_and_stop(make: Serve, options: JSON) -> None:
    """start returns with the real port and url; stop frees them, and both may be called again."""
    server = make(options)
    assert (server.port, server.url) == (0, "ws://127.0.0.1:0")
    server.stop()
    for _ in range(2):
        assert server.start() is server
        assert server.start() is server
        assert server.port > 0
        assert server.url == f"ws://127.0.0.1:{server.port}"
        assert server.host == "127.0.0.1"
        with connect(server.url) as client:
            assert command(client, "hello")["offline"] is True
        server.stop()
        server.stop()
        socket.create_server(("127.0.0.1", server.port)).close()


def test_stop_leaves_nothing_of_a_busy_server(make: Serve, options: JSON, endpoint: Endpoint) -> None:
    """stop leaves no thread and no descriptor of a server with connections, open turns, waiting messages, tools."""
    endpoint.script(reply("held", hold=True))
    server = make(options, model="test-model", base_url=endpoint.url, api_key="key").start()

    @server.tool
    async def wait() -> str:
        """Wait for ever."""
        await asyncio.get_running_loop().create_future()
        return ""

    with connect(server.url) as client, connect(server.url) as other:
        command(client, "create_agent", config={"name": "held"})
        command(other, "create_agent", config={"name": "tool", "tools": ["wait"]})
        command(other, "subscribe")
        client.send(json.dumps({"type": "user_message", "message": "hi"}))
        endpoint.wait_requests(1)
        endpoint.script(Reply(calls=[("wait", {})]))
        other.send(json.dumps({"type": "user_message", "message": "hi"}))
        while "wait" not in check_event(str(other.recv(timeout=LIMIT))).get("message", ""):
            pass
        client.send(json.dumps({"type": "user_message", "message": "waits"}))
        server.stop()
        assert [close_code(client), close_code(other)] == [1001, 1001]


def test_stop_soon_after_start_leaves_nothing(tmp_path: Path) -> None:
    """A server that is stopped while it still imports openai leaves no thread either."""
    told = python(
        """
        import memws, threading
        for _ in range(2):
            server = memws.WebSocketServer("127.0.0.1", 0, db=":memory:", base_url="http://127.0.0.1:9/v1", model="m")
            server.start().stop()
            print([thread.name for thread in threading.enumerate() if thread is not threading.main_thread()])
        """,
        tmp_path,
    )
    assert told == "[]\n[]\n"


def test_stop_names_a_tool_that_will_not_end(
    online: Serve, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """stop does not wait for a sync tool that blocks: it names it in a warning, and its result is dropped."""
    server = online()
    entered, leave, threads = threading.Event(), threading.Event(), []

    @server.tool
    def stubborn() -> str:
        """Block."""
        threads.append(threading.current_thread())
        entered.set()
        leave.wait(LIMIT)
        return "late"

    endpoint.script(Reply(calls=[("stubborn", {})]))
    server.create_new_agent({"tools": ["stubborn"]})
    events: list[JSON] = []
    caller = threading.Thread(target=lambda: events.extend(server.run_step("hi")))
    caller.start()
    assert entered.wait(LIMIT)
    server.stop()
    caller.join(LIMIT)
    assert "memws-tool-stubborn" in caplog.text
    leave.set()
    threads[0].join(LIMIT)
    assert events[-1]["stop_reason"] == "interrupted"
    assert "late" not in json.dumps(events)


def test_a_port_that_is_held_is_named(make: Serve, options: JSON, tmp_path: Path) -> None:
    """A port held by another program raises a sentence that names it and port=0, and no database is made."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        server = make(options, port=port)
        with pytest.raises(memws.MemwsError) as caught:
            server.start()
        assert str(port) in str(caught.value)
        assert "port=0" in str(caught.value)
        assert list(tmp_path.glob("own*")) == []
    server.start().stop()


def test_a_database_is_one_servers(serve: Serve) -> None:
    """A second server on the same database is refused while the first one runs."""
    server = serve()
    with pytest.raises(memws.MemwsError, match="another memws server uses the database"):
        memws.WebSocketServer("127.0.0.1", 0, db=server.options.db, model="offline").start()
    server.stop()
    serve()


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 65_536},
        {"port": -1},
        {"port": "8282"},
        {"port": True},
        {"rate_limit": -1},
        {"max_connections": 0},
        {"max_steps": 0},
        {"context_window": 0},
        {"sync": "sometimes"},
        {"idle_timeout": 0},
        {"idle_timeout": float("nan")},
        {"colour": "red"},
    ],
)
def test_wrong_options_are_named(wrong: JSON) -> None:
    """An option that cannot be, or that there is not, is refused by its name when the server is made."""
    with pytest.raises(memws.MemwsError) as caught:
        memws.WebSocketServer(**wrong)
    assert next(iter(wrong)) in str(caught.value)


def test_memory_keeps_nothing(make: Serve, options: JSON, tmp_path: Path) -> None:
    """A server on :memory: works and leaves no file."""
    server = make(options, db=":memory:").start()
    server.create_new_agent({"name": "sam"})
    assert server.run_step("My name is Ada")[-1]["stop_reason"] == "done"
    server.stop()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(memws.MemwsError):
        server.load_agent("sam")
    server.stop()


# ---- agents and steps ------------------------------------------------------------------------------------------------


def test_run_step_gives_the_turns_events(serve: Serve) -> None:
    """run_step gives all stored events of its turn as wire dicts, those that a subscriber of all gets."""
    server = serve()
    agent = server.create_new_agent({"name": "sam"})
    assert (agent.name, server.agent, server.agent_name) == ("sam", agent, "sam")
    with connect(server.url) as client:
        command(client, "hello", message_types=["*"])
        command(client, "subscribe", agent_name="sam")
        events = server.run_step("My name is Ada")
        seen: list[JSON] = []
        while not seen or not is_terminal(seen[-1]):
            seen.append(check_event(str(client.recv(timeout=LIMIT))))
    assert events == [frame for frame in seen if "seq" in frame]
    assert [check_event(json.dumps(event)) for event in events] == events
    assert shape(events)[:2] == [("agent_response_start", ""), ("user_message", "My name is Ada")]
    assert (events[-1]["type"], events[-1]["stop_reason"]) == ("agent_response_end", "done")
    assert of_kind(events, "assistant_message")


def test_blocking_calls_work_before_start(make: Serve, options: JSON) -> None:
    """Agents are made, loaded and talked to before start, on a loop that does not listen, and are there after it."""
    server = make(options)
    server.create_new_agent({"name": "sam"})
    first = server.run_step("hi")
    server.load_agent("sam")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port or 1), timeout=LIMIT)
    server.start()
    with connect(server.url) as client:
        assert command(client, "load_agent", name="sam")["last_seq"] == first[-1]["seq"]
    assert server.run_step("again")[0]["seq"] == first[-1]["seq"] + 1
    server.stop()


def test_blocking_calls_work_from_any_thread(online: Serve, endpoint: Endpoint) -> None:
    """Threads that call run_step at the same time get the events of their own turn each."""
    server = online()
    endpoint.default = lambda body: reply(json.loads(body["messages"][-1]["content"])["message"])
    server.create_new_agent({"name": "sam"})
    events: dict[int, list[JSON]] = {}

    def talk(number: int) -> None:
        events[number] = server.run_step(f"I am {number}")

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    for number in range(8):
        assert [said["message"] for said in of_kind(events[number], "assistant_message")] == [f"I am {number}"]
        assert len({event["turn_id"] for event in events[number]}) == 1


def test_blocking_calls_are_refused_on_the_servers_own_loop(online: Serve, endpoint: Endpoint) -> None:
    """On the server's own thread a blocking call raises at once and names the one to await there."""
    server = online()
    told: list[str] = []

    @server.tool
    async def ask() -> str:
        """Call what blocks."""
        for call in (
            lambda: server.run_step("x"),
            lambda: server.load_agent("sam"),
            lambda: server.create_new_agent({}),
            server.stop,
        ):
            with pytest.raises(memws.MemwsError) as caught:
                call()
            told.append(str(caught.value))
        return (await server.load_agent_async("sam")).name

    endpoint.script(Reply(calls=[("ask", {"request_heartbeat": True})]))
    server.create_new_agent({"name": "sam", "tools": ["ask"]})
    events = server.run_step("hi")
    assert [text.rpartition("await ")[2] for text in told] == [
        "run_step_async",
        "load_agent_async",
        "create_new_agent_async",
        "close()",
    ]
    assert {text.count("await") for text in told} == {1}
    assert of_kind(events, "tool_return")[0]["message"] == "sam"


def test_run_step_without_an_agent(serve: Serve) -> None:
    """run_step without an agent, and load_agent of an unknown one, say what to do; the agent stays."""
    server = serve()
    with pytest.raises(memws.MemwsError, match="create_new_agent or load_agent first") as caught:
        server.run_step("hi")
    assert caught.value.code == "no_agent"
    assert (server.agent, server.agent_name) == (None, None)
    for number in range(12):
        server.create_new_agent({"name": f"agent-{number:02}"})
    with pytest.raises(memws.MemwsError, match=r"12 known: .*'agent-05'") as caught:
        server.load_agent("agent-05x")
    assert caught.value.code == "unknown_agent"
    assert str(caught.value).count("'agent-") == 11
    assert server.agent_name == "agent-11"


def test_the_agent_of_the_object_is_its_own(serve: Serve) -> None:
    """server.agent is what this object made or loaded last, whatever connections do."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    with connect(server.url) as client:
        command(client, "create_agent", config={"name": "ada"})
        assert server.agent_name == "sam"
        server.load_agent("ada")
        command(client, "load_agent", name="sam")
        assert {event["agent_name"] for event in server.run_step("hi")} == {"ada"}
        command(client, "rename_agent", agent_name="ada", new_name="eve")
        assert server.agent_name == "eve"
        assert {event["agent_name"] for event in server.run_step("hi")} == {"eve"}


def test_run_step_refuses_what_the_wire_refuses(serve: Serve) -> None:
    """A text that is too long raises and stores nothing; characters that cannot be stored are replaced."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    with pytest.raises(memws.MemwsError) as caught:
        server.run_step("x" * 65_537)
    assert caught.value.code == "text_too_long"
    events = server.run_step("a\x00b\ud800c")
    assert of_kind(events, "user_message")[0]["message"] == "a\ufffdb\ufffdc"
    assert events[0]["seq"] == 1


@pytest.mark.parametrize(
    "config", [{"name": "_"}, {"persona": "\ud800"}, {"model": "\x00"}, {"colour": 1}, {"blocks": 1}]
)
def test_a_bad_config_raises(serve: Serve, config: JSON) -> None:
    """create_new_agent raises what create_agent answers, also for texts that no frame could hold; nothing is made."""
    server = serve()
    with pytest.raises(memws.MemwsError) as caught:
        server.create_new_agent(config)
    assert caught.value.code == "bad_config"
    with connect(server.url) as client:
        assert command(client, "list_agents")["total"] == 0
    assert server.agent is None


def test_only_python_names_an_endpoint(serve: Serve, endpoint: Endpoint, tmp_path: Path) -> None:
    """create_new_agent takes base_url and api_key for this agent; the key is neither stored nor told."""
    server = serve()
    config = {"name": "sam", "model": "test-model", "base_url": endpoint.url, "api_key": "secret-key"}
    server.create_new_agent(config)
    assert [said["message"] for said in of_kind(server.run_step("hi"), "assistant_message")] == ["Hello!"]
    assert endpoint.headers[0]["authorization"] == "Bearer secret-key"
    assert config["api_key"] == "secret-key"
    with connect(server.url) as client:
        assert "secret-key" not in json.dumps(command(client, "get_agent", agent_name="sam"))
        assert endpoint.url not in json.dumps(command(client, "get_agent", agent_name="sam"))
    server.stop()
    assert all(b"secret-key" not in path.read_bytes() for path in tmp_path.glob("memws.db*"))
    server = serve()
    server.load_agent("sam")
    assert of_kind(server.run_step("hi"), "assistant_message")[0]["message"] == "Hello!"
    assert "secret-key" not in endpoint.headers[-1]["authorization"]


def test_first_message_is_verified(online: Serve, endpoint: Endpoint) -> None:
    """first_message asks again until the reply goes through send_message; no_verify and the wire never do."""
    server = online()
    server.create_new_agent({"name": "sam"})

    def said(**how: bool) -> tuple[list[str], int]:
        count = len(endpoint.requests)
        events = server.run_step("hi", **how)
        assert events[-1]["stop_reason"] == "done"
        return [event["message"] for event in of_kind(events, "assistant_message")], len(endpoint.requests) - count

    endpoint.script(Reply("plain"), reply("said"))
    assert said(first_message=True) == (["said"], 2)
    endpoint.script(Reply("plain"))
    assert said(first_message=True, no_verify=True) == (["plain"], 1)
    endpoint.script(Reply("plain"))
    assert said() == (["plain"], 1)
    endpoint.default = Reply("plain")
    texts, calls = said(first_message=True)
    assert texts == ["plain"]
    assert 2 <= calls <= 5


def test_run_step_of_a_cancelled_turn(online: Serve, endpoint: Endpoint) -> None:
    """A run_step whose turn is cancelled by a client returns its events up to that end."""
    server = online()
    server.create_new_agent({"name": "sam"})
    endpoint.script(reply("held", hold=True))
    events: list[JSON] = []
    caller = threading.Thread(target=lambda: events.extend(server.run_step("hi")))
    caller.start()
    endpoint.wait_requests(1)
    with connect(server.url) as client:
        assert command(client, "cancel", agent_name="sam")["state"] == "cancelling"
    caller.join(LIMIT)
    assert [event.get("stop_reason") for event in events] == [None, None, "cancelled"]


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_tools_of_the_user(online: Serve, endpoint: Endpoint) -> None:
    """A registered function, sync or async, is offered with its schema, called with checked arguments, and answers."""
    server = online()

    @server.tool
    def add(a: int, b: int = 2) -> int:
        """Add numbers.

        Args:
            a: the first
        """
        return a + b

    @server.tool(name="greet", timeout=5)
    async def hello(name: str) -> dict[str, str]:
        """Greet."""
        await asyncio.sleep(0)
        return {"greeting": f"Hi {name}"}

    assert add(1) == 3
    endpoint.script(
        Reply(calls=[("add", {"a": 1, "b": 4}), ("greet", {"name": "Ada", "request_heartbeat": True})]), reply("done")
    )
    server.create_new_agent({"tools": ["add", "greet"]})
    events = server.run_step("hi")
    assert [event["message"] for event in of_kind(events, "tool_return")][:2] == ["5", '{"greeting":"Hi Ada"}']
    assert "Running add({'a': 1, 'b': 4})" in [event["message"] for event in events if "message" in event]
    offered = {tool["function"]["name"]: tool["function"] for tool in endpoint.requests[0]["tools"]}
    parameters = offered["add"]["parameters"]
    assert offered["add"]["description"] == "Add numbers."
    assert parameters["properties"]["a"] == {"type": "integer", "description": "the first"}
    assert parameters["required"] == ["a"]
    assert offered["greet"]["parameters"]["required"] == ["name"]


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({}, "missing argument 'city'"),
        ({"city": 5}, "argument city: expected string"),
        ({"city": "Oslo", "zip": 1}, "unknown argument 'zip'"),
        ({"city": "boom"}, "ValueError: no such city"),
        ({"city": "slow"}, "took longer than 0.01 s"),
    ],
)
def test_a_tools_failure_is_advice(online: Serve, endpoint: Endpoint, arguments: JSON, advice: str) -> None:
    """Bad arguments, exceptions and timeouts are advice to the model and events to clients; the turn goes on."""
    server = online()

    @server.tool(timeout=0.01)
    async def weather(city: str) -> str:
        """Look out of the window."""
        if city == "slow":
            await asyncio.get_running_loop().create_future()
        raise ValueError("no such city")

    endpoint.script(Reply(calls=[("weather", arguments)]), reply("Sorry."))
    server.create_new_agent({"tools": ["weather"]})
    events = server.run_step("hi")
    (failed, _) = of_kind(events, "tool_return")
    assert (failed["status"], advice in failed["message"]) == ("Failed", True)
    assert advice in endpoint.requests[1]["messages"][-2]["content"]
    assert [event["message"] for event in of_kind(events, "assistant_message")] == ["Sorry."]


def test_a_memory_tools_name_is_taken(serve: Serve) -> None:
    """A function with the name of a memory tool, or one that no model could call, is refused."""
    server = serve()
    with pytest.raises(memws.MemwsError, match="memory tool"):
        server.tool(lambda message: message, name="send_message")
    with pytest.raises(memws.MemwsError):
        server.tool(lambda: None)
    with pytest.raises(memws.MemwsError):
        server.tool(lambda *rest: rest, name="rest")


def test_a_tool_may_be_registered_later_and_again(online: Serve, endpoint: Endpoint) -> None:
    """A tool that is registered while its agent is in use replaces the one of that name for the next model call."""
    server = online()
    results = []
    for number in range(3):

        def tool(number: int = number) -> int:
            return number

        server.tool(tool, name="number")
        if number == 0:
            server.create_new_agent({"name": "sam", "tools": ["number"]})
        endpoint.script(Reply(calls=[("number", {"request_heartbeat": True})]), reply("ok"))
        results.append(of_kind(server.run_step("hi"), "tool_return")[0]["message"])
    assert results == ["0", "1", "2"]


def test_an_agent_whose_tool_is_gone_says_so(online: Serve, endpoint: Endpoint) -> None:
    """An agent is loaded with a warning where its tool is not registered any more, and the tool may come back."""
    server = online()
    server.tool(lambda: "here", name="lost")
    server.create_new_agent({"name": "sam", "tools": ["lost"]})
    server.stop()
    server = online()
    with connect(server.url) as client:
        (warning,) = command(client, "load_agent", name="sam")["warnings"]
        assert "lost" in warning
    server.load_agent("sam")
    server.tool(lambda: "back", name="lost")
    endpoint.script(Reply(calls=[("lost", {"request_heartbeat": True})]))
    assert of_kind(server.run_step("hi"), "tool_return")[0]["message"] == "back"


# ---- cells that run again --------------------------------------------------------------------------------------------


def test_a_cell_that_runs_again_takes_over(make: Serve, address: JSON) -> None:
    """A new object for the same address takes over connections, agents and tools; the old one is nothing any more."""
    first = make(address).start()
    first.tool(lambda: "first", name="tool")
    first.create_new_agent({"name": "sam"})
    with connect(first.url) as client:
        command(client, "load_agent", name="sam")
        threads = threading.active_count()
        second = make(address)
        second.tool(lambda: "second", name="tool")
        second.start()
        assert threading.active_count() == threads
        assert (second.port, second.agent_name) == (first.options.port, "sam")
        assert second.tools["tool"].function() == "second"
        first.stop()
        assert command(client, "get_agent")["agent_name"] == "sam"
        assert "not listening" in repr(first)
        assert second.run_step("hi")[-1]["stop_reason"] == "done"
        second.stop()
        assert close_code(client) == 1001
    socket.create_server(("127.0.0.1", address["port"])).close()


def test_a_cell_with_blocking_calls_runs_again(make: Serve, address: JSON) -> None:
    """A cell that makes or loads an agent before start may run again: it takes over at its first call."""
    for number in range(3):
        server = make(address)
        if number:
            server.load_agent("sam")
        else:
            server.create_new_agent({"name": "sam"})
        server.run_step(f"message {number}")
        server.start()
        with connect(server.url) as client:
            messages = command(client, "get_messages", agent_name="sam")["messages"]
            assert [text["text"] for text in messages if text["role"] == "user"][-1] == f"message {number}"
    server.stop()


def test_other_options_stop_the_old_server(make: Serve, address: JSON) -> None:
    """A new object for the same address with other options stops the old server first."""
    first = make(address).start()
    first.create_new_agent({"name": "sam"})
    with connect(first.url) as client:
        second = make(address, max_steps=3).start()
        assert close_code(client) == 1001
    with connect(second.url) as client:
        assert command(client, "get_agent", agent_name="sam")["settings"]["max_steps"] == 3
    first.stop()
    with connect(second.url) as client:
        command(client, "hello")
    second.stop()


def test_any_free_port_takes_nothing_over(serve: Serve) -> None:
    """Objects with port 0 are servers of their own."""
    first, second = serve(), serve(db=":memory:")
    assert first.port != second.port
    second.stop()
    with connect(first.url) as client:
        command(client, "hello")


@pytest.fixture
def copies(tmp_path: Path) -> Iterator[Callable[[str], ModuleType]]:
    """Imports copies of the file under names of their own."""
    names = []

    def load(name: str) -> ModuleType:
        path = tmp_path / f"{name}.py"
        shutil.copy(MODULE, path)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        names.append(name)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in names:
        del sys.modules[name]


def test_a_reloaded_module_takes_over(
    copies: Callable[[str], ModuleType],
    make: Serve,
    address: JSON,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """After importlib.reload a new object for the same address ends the old server and serves the same agents."""
    monkeypatch.syspath_prepend(str(tmp_path))
    module = copies("memws_reloaded")
    first = make(address, module).start()
    first.create_new_agent({"name": "sam"})
    importlib.reload(module)
    second = make(address, module).start()
    assert [thread.name for thread in threading.enumerate()].count("memws") == 1
    assert type(second) is not type(first)
    assert second.load_agent("sam").name == "sam"
    with connect(second.url) as client:
        assert command(client, "list_agents")["total"] == 1
    first.stop()
    with connect(second.url) as client:
        command(client, "hello")
    second.stop()


def test_two_copies_do_not_meet(copies: Callable[[str], ModuleType], make: Serve, address: JSON) -> None:
    """Two copies of the file in one process are strangers: neither takes over the other's address, agents or tools."""
    one, two = copies("memws_one"), copies("memws_two")
    first = make(address, one).start()
    first.tool(lambda: "first", name="tool")
    first.create_new_agent({"name": "sam"})
    with pytest.raises(two.MemwsError, match="is held by another program"):
        make(address, two, db=":memory:").start()
    second = make(address, two, db=":memory:", port=0).start()
    assert "tool" not in second.tools
    with pytest.raises(two.MemwsError):
        second.load_agent("sam")
    second.stop()
    with connect(first.url) as client:
        assert command(client, "list_agents")["total"] == 1
    first.stop()


# ---- loops of one's own ----------------------------------------------------------------------------------------------


async def bound(server: memws.WebSocketServer, task: "asyncio.Task[None]") -> None:
    """Wait until start_server has bound its port; what connects from then on is served."""
    async with asyncio.timeout(LIMIT):
        while not server.port and not task.done():  # noqa: ASYNC110 (the server has no event for it)
            await asyncio.sleep(0)
    if task.done():
        task.result()


@contextlib.asynccontextmanager
async def running(server: memws.WebSocketServer) -> Any:
    """start_server on this loop, cancelled at the end."""
    task = asyncio.create_task(server.start_server())
    try:
        await bound(server, task)
        yield
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.anyio
async def test_start_server_serves_until_cancelled(
    make: Serve, options: JSON, capsys: pytest.CaptureFixture[str]
) -> None:
    """start_server serves on the caller's loop and says where; a cancel frees the port and leaves no task."""
    server = make(options)
    tasks = asyncio.all_tasks()
    for _ in range(2):
        async with running(server):
            assert capsys.readouterr().out.startswith(f"memws {memws.__version__} listening on {server.url}\n")
            async with wire(server, "*") as client:
                await client.ok("create_agent", config={})
                assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
                assert [name for name in left_behind()[0] if name == "memws"] == []
                await server.create_new_agent_async({})
                assert (await server.run_step_async("hi"))[-1]["stop_reason"] == "done"
        assert asyncio.all_tasks() == tasks
        socket.create_server(("127.0.0.1", server.port)).close()
        server.port = 0


@pytest.mark.anyio
async def test_start_server_closes_open_turns(make: Serve, options: JSON, endpoint: Endpoint) -> None:
    """A cancel of start_server ends open turns as interrupted and closes its clients with 1001."""
    endpoint.script(reply("held", hold=True))
    server = make(options, model="test-model", base_url=endpoint.url, api_key="key")
    async with contextlib.AsyncExitStack() as clients:
        async with running(server):
            client = await clients.enter_async_context(wire(server))
            await client.ok("create_agent", config={})
            await client.say("hi")
            await asyncio.to_thread(endpoint.wait_requests, 1)
        assert await client.closed() == 1001
        assert client.frames[-1]["stop_reason"] == "interrupted"


@pytest.mark.anyio
async def test_steps_that_a_stop_cuts_short(make: Serve, options: JSON, endpoint: Endpoint) -> None:
    """When the server stops, a step that runs gives its events up to `interrupted`, and one that waits is refused."""
    endpoint.script(reply("held", hold=True))
    server = make(options, model="test-model", base_url=endpoint.url, api_key="key")
    async with running(server):
        await server.create_new_agent_async({})
        runs = asyncio.create_task(server.run_step_async("runs"))
        await asyncio.to_thread(endpoint.wait_requests, 1)
        waits = asyncio.create_task(server.run_step_async("waits"))
        await asyncio.sleep(0)
    assert [event.get("stop_reason") for event in await runs] == [None, None, "interrupted"]
    with pytest.raises(memws.MemwsError) as caught:
        await waits
    assert caught.value.code == "cancelled"


@pytest.mark.anyio
async def test_blocking_calls_before_start_server(make: Serve, options: JSON) -> None:
    """What was made by blocking calls, or by initialize_server, is served by start_server on the caller's loop."""
    server = make(options)
    await asyncio.to_thread(server.create_new_agent, {"name": "sam"})
    await asyncio.to_thread(server.run_step, "before")
    async with running(server), wire(server) as client:
        assert (await client.ok("load_agent", name="sam"))["last_seq"] > 0
        assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
        assert (await server.run_step_async("after"))[-1]["agent_name"] == "sam"
        assert (await asyncio.to_thread(server.run_step, "from a thread"))[-1]["stop_reason"] == "done"


def test_initialize_server_before_start_server(make: Serve, options: JSON, capsys: pytest.CaptureFixture[str]) -> None:
    """initialize_server binds and says where, once; start_server then serves on that port."""
    server = make(options)
    server.initialize_server()
    port = server.port
    assert f"listening on ws://127.0.0.1:{port}\n" in capsys.readouterr().out

    async def serve_on() -> None:
        async with running(server), wire(server) as client:
            assert server.port == port
            await client.ok("hello")

    asyncio.run(serve_on())
    assert capsys.readouterr().out == ""
    socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.anyio
async def test_start_server_on_a_held_port(make: Serve, options: JSON) -> None:
    """start_server raises for a port that is held, and lets go of everything."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        server = make(options, port=holder.getsockname()[1])
        with pytest.raises(memws.MemwsError, match="port=0"):
            await server.start_server()


@pytest.mark.anyio
async def test_start_server_beside_start(serve: Serve) -> None:
    """start_server of a server that runs in a thread is refused, and the server goes on."""
    server = serve()
    with pytest.raises(memws.MemwsError, match="listens already"):
        await server.start_server()
    async with wire(server) as client:
        await client.ok("hello")


@pytest.mark.anyio
@pytest.mark.parametrize("path", [(), ("/chat",)])
async def test_handle_client_of_a_websockets_server_of_ones_own(make: Serve, options: JSON, path: Any) -> None:
    """handle_client serves a connection of any websockets server, with the old second argument too; stop ends it."""
    server = make(options)
    async with serve_websockets(lambda websocket: server.handle_client(websocket, *path), "127.0.0.1", 0) as own:
        server.port = own.sockets[0].getsockname()[1]
        async with wire(server) as client:
            await client.ok("create_agent", config={"name": "sam"})
            assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
            assert len(server.interface.clients) == 1
            await asyncio.to_thread(server.stop)
            assert await client.closed() == 1001


@pytest.mark.anyio
async def test_close_on_ones_own_loop(make: Serve, options: JSON) -> None:
    """On the loop that the server runs on, close is awaited instead of stop, and start_server then returns."""
    server = make(options)
    task = asyncio.create_task(server.start_server())
    await bound(server, task)
    async with wire(server) as client:
        await client.ok("hello")
        with pytest.raises(memws.MemwsError, match=r"await close\(\)"):
            server.stop()
        await server.close()
        assert await client.closed() == 1001
    async with asyncio.timeout(LIMIT):
        await asyncio.wait([task])


@pytest.mark.anyio
async def test_clients_are_registered(serve: Serve) -> None:
    """The interface knows the connections: one more after a connect, one less after a close."""
    server = serve()
    async with wire(server) as client:
        await client.ok("hello")
        assert len(server.interface.clients) == 1
        async with wire(server) as other:
            await other.ok("hello")
            assert len(server.interface.clients) == 2
        async with asyncio.timeout(LIMIT):
            while len(server.interface.clients) > 1:
                await client.ok("hello")


@pytest.mark.anyio
async def test_run_inside_a_running_loop(make: Serve, options: JSON, capsys: pytest.CaptureFixture[str]) -> None:
    """run in a notebook cell starts the thread form, says so in one line and returns."""
    server = make(options)
    server.run()
    out = capsys.readouterr().out
    assert (out.count("\n"), server.url in out, "thread" in out) == (1, True, True)
    async with wire(server) as client:
        await client.ok("hello")
    await asyncio.to_thread(server.stop)


# ---- processes -------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what would point memws elsewhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMWS_", "OPENAI_", "JUPYTER"))}
    return {**kept, "PYTHONPATH": str(MODULE.parent), "PYTHONUNBUFFERED": "1", **more}


def python(script: str, folder: Path, **more: str) -> str:
    """What a script prints that runs in another process, in a folder of its own; it has to end well."""
    arguments = [sys.executable, "-W", "error", "-c", textwrap.dedent(script)]
    done = subprocess.run(
        arguments, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_needs_only_websockets(tmp_path: Path) -> None:
    """import memws prints, opens and starts nothing, and needs websockets and the standard library only."""
    told = python(
        """
        import sys, threading
        before = set(sys.modules)
        import memws
        loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
        print(sorted(loaded - sys.stdlib_module_names - {"memws"}), threading.active_count())
        """,
        tmp_path,
    )
    assert told == "['websockets'] 1\n"
    assert list(tmp_path.iterdir()) == []


def test_offline_needs_only_websockets(tmp_path: Path) -> None:
    """Without openai, ipywidgets and nest-asyncio an offline server serves, and what needs them names the package."""
    told = python(
        """
        import sys
        for name in ("openai", "ipywidgets", "nest_asyncio", "nest_asyncio2", "anyio", "httpx", "pydantic"):
            sys.modules[name] = None
        import asyncio, memws
        server = memws.WebSocketServer("127.0.0.1", 0, db=":memory:").start()
        server.create_new_agent({"name": "sam"})
        print(server.run_step("My name is Ada")[-1]["stop_reason"])
        server.stop()

        async def cell():
            try:
                server.run(block=True)
            except memws.MemwsError as error:
                print(error)

        asyncio.run(cell())
        try:
            memws.WebSocketServer("127.0.0.1", 0, db=":memory:", model="gpt-4o", api_key="key").start()
        except memws.MemwsError as error:
            print(error)
        """,
        tmp_path,
    )
    done, nested, missing = told.splitlines()
    assert done == "done"
    assert "start()" in nested
    assert "nest" in nested
    assert "pip install openai" in missing
    assert list(tmp_path.iterdir()) == []


def test_the_file_alone_serves(tmp_path: Path) -> None:
    """The file, renamed and alone in an empty folder, is imported and serves; its database is the owner's alone."""
    shutil.copy(MODULE, tmp_path / "renamed.py")
    told = python(
        """
        import renamed
        server = renamed.WebSocketServer("127.0.0.1", 0).start()
        server.create_new_agent({"name": "sam"})
        print(server.run_step("hi")[-1]["stop_reason"])
        server.stop()
        """,
        tmp_path,
        PYTHONPATH=str(tmp_path),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert told == "done\n"
    files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.name != "renamed.py"}
    assert files.pop("memws.db") == 0o600
    assert set(files.values()) <= {0o600}


SERVING = """
import asyncio, memws, socket, sys, threading
server = memws.WebSocketServer("127.0.0.1", 0, db=":memory:")
"""
FREED = """
socket.create_server(("127.0.0.1", server.port)).close()
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
def test_run_blocks_until_interrupted(tmp_path: Path, form: str) -> None:
    """run, and run(block=True) in a cell, tell the address first, serve until SIGINT, and then free the port."""
    script = SERVING + RUN_FORMS[form] + FREED
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith(f"memws {memws.__version__} listening on ws://127.0.0.1:"), first
        with connect(first.split()[-1]) as client:
            command(client, "create_agent", config={})
            client.send(json.dumps({"type": "user_message", "message": "hi"}))
            while not is_terminal(check_event(str(client.recv(timeout=LIMIT)))):
                pass
            process.send_signal(signal.SIGINT)
            assert close_code(client) == 1001
        out, err = process.communicate(timeout=LIMIT)
        assert (process.returncode, err) == (0, "")
        assert out.splitlines()[-1] == "freed []"
    finally:
        process.kill()
        process.communicate()


def test_nest_asyncio_is_not_applied_by_others(tmp_path: Path) -> None:
    """Neither import nor the thread form applies nest-asyncio."""
    told = python(
        """
        import asyncio, sys, memws

        async def cell():
            server = memws.WebSocketServer("127.0.0.1", 0, db=":memory:")
            server.run()
            server.stop()

        asyncio.run(cell())
        print(hasattr(asyncio, "_nest_patched"), "nest_asyncio" in sys.modules, "nest_asyncio2" in sys.modules)
        """,
        tmp_path,
    )
    assert told.splitlines()[-1] == "False False False"


# ---- JupyterHub ------------------------------------------------------------------------------------------------------


def test_on_a_jupyterhub_a_token_is_made(monkeypatch: pytest.MonkeyPatch, make: Serve, address: JSON) -> None:
    """On a JupyterHub, where others reach the port, a server makes a token, and keeps it when its cell re-runs."""
    monkeypatch.setenv("JUPYTERHUB_API_TOKEN", "hub")
    first = make(address).start()
    token = first.options.token
    assert token is not None
    assert len(token) >= 32
    with pytest.raises(InvalidStatus) as refused:
        connect(first.url)
    assert refused.value.response.status_code == 401
    with connect(first.url, additional_headers={"Authorization": f"Bearer {token}"}) as client:
        command(client, "create_agent", config={"name": "sam"})
        second = make(address).start()
        assert second.options.token == token
        assert command(client, "get_agent")["agent_name"] == "sam"
        second.stop()
    assert make(address, token="mine").options.token == "mine"
    monkeypatch.delenv("JUPYTERHUB_API_TOKEN")
    assert make(address).options.token is None


def test_logs_tell_of_connections(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Connections are logged with the number of their session."""
    caplog.set_level(logging.INFO, "memws")
    server = serve()
    with connect(server.url) as client:
        command(client, "hello")
    server.stop()
    sessions = [record.getMessage() for record in caplog.records if record.name == "memws" and "session" in record.msg]
    assert [text.split(": ")[1] for text in sessions] == ["connected", "left"]
    assert len({text.split(":")[0] for text in sessions}) == 1
