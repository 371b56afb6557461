"""Section 9, Client: against the real server, mostly through a proxy that breaks what a network breaks."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import queue
import signal
import socket
import threading
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from agents import packed
from endpoint import Endpoint, Reply, echo, say
from proxy import Proxy
from wire import seqs

import memws

pytestmark = pytest.mark.anyio
Frame = dict[str, Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnects do not wait half a second."""
    monkeypatch.setattr(memws, "RECONNECT_DELAY", 0.02)


@pytest.fixture
def server(online: Callable[..., memws.WebSocketServer], endpoint: Endpoint) -> memws.WebSocketServer:
    """A real server whose model says what the user said, unless the test scripts it."""
    endpoint.default = echo
    return online(context_window=1_000_000)


@pytest.fixture
def proxy(server: memws.WebSocketServer) -> Iterator[Proxy]:
    """The way to the server, which the test can break."""
    with Proxy(server.url) as proxy:
        yield proxy


class States(asyncio.Queue[str]):
    """What a client reports of its connection."""

    async def reach(self, state: str) -> None:
        async with asyncio.timeout(10):
            while await self.get() != state:
                pass


async def within(work: Awaitable[Any]) -> Any:
    """The result of something that is bound to end."""
    return await asyncio.wait_for(work, 15)


def texts(events: list[Frame], kind: str) -> str:
    return "".join(event["message"] for event in events if event.get("message_type") == kind)


def sent(proxy: Proxy) -> list[str]:
    return [str(frame.get("command", frame["type"])) for frame in proxy.sent]


async def collected(turn: AsyncIterator[Frame]) -> list[Frame]:
    async with asyncio.timeout(15):
        return [event async for event in turn]


async def whole(subscription: memws.Stream) -> list[Frame]:
    """The events up to the end of the turn."""
    events: list[Frame] = []
    while not events or not events[-1]["type"].startswith("agent_response_e"):
        events.append(await within(anext(subscription)))
    return events


@contextlib.asynccontextmanager
async def talking(url: str, **options: Any) -> AsyncIterator[memws.Client]:
    """A client that gets messages of all types and has made the agent sam."""
    async with memws.Client(url, **options) as client:
        await client.hello(["*"])
        await client.create_agent("sam")
        yield client


async def test_ask(server: memws.WebSocketServer, endpoint: Endpoint) -> None:
    """The answer to a message is the text of its assistant messages, a line each; a closed client leaves no task."""
    client, before = memws.Client(server.url), asyncio.all_tasks()
    async with client:
        assert (await client.create_agent("sam"))["agent_name"] == "sam"
        assert await client.ask("hi") == "you said hi"
        endpoint.script(say("one", "two"))
        assert await client.ask("hi", from_="Ada") == "one\ntwo"
        assert packed(endpoint.requests[-1], "user_message")[-1]["from"] == "Ada"
        assert client.alive
    assert (client.alive, asyncio.all_tasks()) == (False, before)


WAYS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [  # to say that an agent is to be called ada
    (("ada",), {}), (({"name": "ada"},), {}), ((), {"name": "ada"}), ((), {"config": {"name": "ada"}}),
    (({"name": "bob", "max_steps": 9},), {"name": "ada"}), ((types.MappingProxyType({"name": "ada"}),), {}),
]  # fmt: skip


async def test_ways_to_create_an_agent(server: memws.WebSocketServer) -> None:
    """An agent is made from its name, its config or keywords, which win: by both clients and by the server alike."""
    async with memws.Client(server.url) as client:
        with memws.connect(server.url) as other:
            for create in (client.create_agent, other.create_agent, server.create_new_agent):
                for words, more in WAYS:
                    made = create(*words, max_steps=3, **more)
                    await made if asyncio.iscoroutine(made) else None
                    about = await client.command("get_agent", agent_name="ada")
                    assert about["settings"]["max_steps"] == 3, (create, words, more)
                    await client.command("delete_agent", agent_name="ada", purge=True)
        with pytest.raises(memws.RemoteError, match="name"):
            await client.create_agent(cast(Any, 5))


async def test_turn_and_subscription(server: memws.WebSocketServer) -> None:
    """A turn goes from its start to its terminal frame, each event once, also beside a subscription of its agent."""
    async with talking(server.url) as client:
        subscription = client.subscribe()
        await client.hello()  # it is confirmed
        events = await collected(client.send("hi"))
        assert (events[0]["type"], events[-1]["type"]) == ("agent_response_start", "agent_response_end")
        assert seqs(events) == list(range(1, len(seqs(events)) + 1))
        assert seqs(await whole(subscription)) == seqs(events)
        replay = client.subscribe("sam", after=0)  # takes the first one's place
        assert seqs(await whole(replay)) == seqs(events)
        assert await collected(subscription) == []
        await client.command("unsubscribe")
        assert await collected(replay) == []


async def test_errors(server: memws.WebSocketServer, endpoint: Endpoint) -> None:
    """An error of the server has its code, its sentence and its details; the connection goes on."""
    async with memws.Client(server.url) as client:
        refusals = await collected(client.send("to nobody"))  # a message that never becomes a turn has one frame
        assert [(event["type"], event["code"]) for event in refusals] == [("agent_response_error", "no_agent")]
        await client.create_agent("sam")
        endpoint.script(Reply(status=401))
        calls: list[tuple[Callable[[], Awaitable[Any]], str, str]] = [
            (lambda: client.load_agent("nobody"), "unknown_agent", "send create_agent first"),
            (lambda: client.ask("hi", agent_name=""), "unknown_agent", "unknown agent ''"),
            (lambda: client.ask("hi"), "model_auth", "."),
            (lambda: client.ask("hi", when_busy="whenever"), "bad_field", "when_busy"),
            (lambda: anext(client.subscribe("sam", after=99)), "unknown_seq", "after"),
        ]
        for call, code, sentence in calls:
            with pytest.raises(memws.RemoteError, match=sentence) as caught:
                await within(call())
            assert caught.value.code == code
        assert caught.value.details == {"last_seq": (await client.command("get_agent"))["last_seq"]}
        with pytest.raises(memws.Refused, match="send a shorter text"):
            client.send("é" * memws.MAX_FRAME)
        with pytest.raises(memws.Refused):
            await within(client.command("insert_passage", text="é" * memws.MAX_FRAME))
        with pytest.raises(memws.Refused, match="deeper"):
            await within(client.command("create_agent", config=json.loads("[" * 70 + "]" * 70)))
        assert await client.ask("again") == "you said again"


async def test_cancel(server: memws.WebSocketServer, endpoint: Endpoint) -> None:
    """A message that waits tells its place; taken back, it alone is refused; a running turn, which the same client may
    send again, as where an interrupt has met the first call, ends as cancelled."""
    endpoint.script(say("a long story", stall_after=2))
    async with talking(server.url) as client:
        subscription = client.subscribe()
        running = client.send("hi")
        await within(anext(running))
        assert client.send("hi", turn_id=running.turn_id) is running
        waiting = client.send("ho")
        assert (await within(anext(waiting)))["position"] == 1
        assert await waiting.cancel() == {"state": "removed"}
        assert [event["code"] for event in await collected(waiting)] == ["cancelled"]
        assert await running.cancel() == {"state": "cancelling"}
        assert (await collected(running))[-1]["stop_reason"] == "cancelled"
        assert await running.cancel() == {"state": "over"}
        assert "code" not in (await whole(subscription))[-1]  # a refusal is for its sender alone


async def test_same_turn_id_of_two_agents(server: memws.WebSocketServer) -> None:
    """A turn takes no frame of another agent's turn of the same id."""
    async with memws.Client(server.url) as client:
        await client.hello(["*"])
        for name in ("ada", "bob"):
            await client.create_agent(name)
        assert {event["agent_name"] for event in await collected(client.send("hi", "ada", turn_id="1"))} == {"ada"}
        turn = client.send("ho", "bob", turn_id="1")
        assert {event["agent_name"] for event in await whole(client.subscribe("ada", after=0))} == {"ada"}
        assert {event["agent_name"] for event in await collected(turn)} == {"bob"}
        again = await collected(client.send("hi", "ada", turn_id="1"))  # an old turn is replayed
        assert texts(again, "user_message") == "hi"


async def test_rename_and_delete(server: memws.WebSocketServer) -> None:
    """The current agent and its subscription follow a rename, whoever made it; after a delete there is none."""
    async with memws.Client(server.url) as client, memws.Client(server.url) as other:
        await client.hello(["*"])
        await client.create_agent("Zoë")
        subscription = client.subscribe("Zoe\u0308")  # another Unicode form of the same name
        await client.hello()  # it is confirmed
        await client.command("rename_agent", new_name="max")
        assert client.agent_name == subscription.agent_name == "max"
        assert (await within(anext(subscription)))["new_name"] == "max"
        await other.command("rename_agent", agent_name="max", new_name="kim")
        assert (await within(anext(subscription)))["new_name"] == "kim"
        assert client.agent_name == subscription.agent_name == "kim"
        assert await client.ask("hi") == "you said hi"
        await client.command("delete_agent")
        assert client.agent_name is None


async def test_unknown_frames(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """Frames that are no JSON, no object, binary or of unknown types end neither a turn nor the connection."""
    caplog.set_level(logging.CRITICAL)
    odd: list[str | bytes] = ["not json", '["a list"]', b"\x00", "{}", '{"type":5}', '{"type":"from_the_future"}']
    odd.append('{"type":"agent_response","message_type":"from_the_future","message":"?"}')
    odd.append('{"type":"command_response","id":{"a":1}}')
    proxy.on_received = lambda frame: [*odd, json.dumps(frame)]
    async with talking(proxy.url) as client:
        assert await within(client.ask("hi")) == "you said hi"
    assert proxy.connected == 1


async def test_reconnect_resumes(proxy: Proxy, endpoint: Endpoint) -> None:
    """After a loss, turn and subscription go on where they were: each stored event once, no text twice, none lost."""
    endpoint.script(say("a reply that is cut in its middle", stall_after=7))
    states = States()
    async with talking(proxy.url, on_state=states.put_nowait) as client:
        subscription = client.subscribe()
        await client.hello()  # it is confirmed
        turn = client.send("hi")
        first: list[Frame] = []
        while not texts(first, "delta"):
            first.append(await within(anext(turn)))
        proxy.sent.clear()
        proxy.received.clear()
        await asyncio.to_thread(proxy.cut)
        await states.reach("restored")
        await asyncio.to_thread(proxy.wait, lambda: "user_message" in sent(proxy))
        assert sent(proxy) == ["hello", "load_agent", "subscribe", "user_message"]
        assert (proxy.sent[0]["message_types"], proxy.sent[2]["after"]) == (["*"], max(seqs(first)))
        endpoint.release()
        rest = await collected(turn)
        assert seqs(first + rest) == list(range(1, len(seqs(first + rest)) + 1))
        assert texts(first + rest, "assistant_message") == "a reply that is cut in its middle"
        assert seqs(await whole(subscription)) == seqs(first + rest)
        assert await client.ask("again") == "you said again"


async def test_many_cuts(proxy: Proxy, endpoint: Endpoint) -> None:
    """A turn whose connection is cut at each of its stored events is still whole, and runs once."""
    searches = [("archival_memory_search", {"query": f"tea {n}", "request_heartbeat": True}) for n in range(3)]
    endpoint.script(*(Reply(f"thought {n}", calls=[call]) for n, call in enumerate(searches)), say("done"))
    seen: set[int] = set()

    def cut(frame: Frame) -> list[str | bytes] | None:
        if frame.get("seq") in seen | {None}:
            return None
        seen.add(frame["seq"])
        proxy.abort()
        return []

    proxy.on_received = cut
    async with talking(proxy.url) as client:
        events = [event for event in await collected(client.send("hi")) if "seq" in event]
        assert seqs(events) == list(range(1, len(events) + 1))
        assert events[-1]["stop_reason"] == "done"
        assert texts(events, "internal_monologue") == "thought 0thought 1thought 2"
        assert texts(events, "assistant_message") == "done"
    assert len(endpoint.requests) == 4
    assert proxy.connected == len(events) + 1


async def test_message_without_a_connection(proxy: Proxy) -> None:
    """A message sent while there is no connection goes out after the reconnect; a command fails at once."""
    states = States()
    async with talking(proxy.url, on_state=states.put_nowait) as client:
        proxy.refuses = 503
        await asyncio.to_thread(proxy.cut)
        await states.reach("lost")
        with pytest.raises(memws.ConnectionLost, match="connect again"):
            await client.command("list_agents")
        turn = client.send("hi")
        proxy.refuses = None
        assert texts(await collected(turn), "assistant_message") == "you said hi"


@pytest.mark.parametrize(("reconnect", "status"), [(False, 503), (0.1, 503), (True, 401)])
async def test_nobody_hangs(proxy: Proxy, endpoint: Endpoint, reconnect: bool | float, status: int) -> None:
    """When the client gives up, commands, turns and subscriptions all fail; it can be connected once more."""
    endpoint.script(say("slow", hold=True))
    states = States()
    client = memws.Client(proxy.url, reconnect=reconnect, on_state=states.put_nowait)
    await client.connect()
    await client.create_agent("idle")
    await client.create_agent("sam")
    proxy.on_sent = lambda frame: frame.get("command") != "list_agents"
    calls = (client.command("list_agents"), client.ask("hi"), anext(client.subscribe("idle")))
    waiting = [asyncio.ensure_future(call) for call in calls]
    await asyncio.to_thread(proxy.wait, lambda: "list_agents" in sent(proxy))
    await asyncio.to_thread(endpoint.wait_requests, 1)
    proxy.refuses = status
    proxy.cut()
    results = await within(asyncio.gather(*waiting, return_exceptions=True))
    assert [isinstance(result, memws.ConnectionLost | memws.ConnectFailed) for result in results] == [True] * 3
    await states.reach("failed" if reconnect else "lost")
    with pytest.raises(memws.ConnectionLost):
        client.send("hi")
    proxy.refuses = None
    endpoint.release()
    await client.connect()
    assert await within(client.ask("ho", "sam")) == "you said ho"
    await client.close()
    await client.close()


ADDRESSES = {
    "ws://127.0.0.1:1": "start the server with `python memws.py`",
    "ws://nowhere.invalid": "check the address",
    "an HTTP server": "HTTP 4",
    "a mute server": "check the address",
}
WRONG = ("http://x", "ws://[", "ws://localhost:99999")
ADDRESSES |= dict.fromkeys(WRONG, "expected an address like ws://localhost:8282")


@pytest.mark.parametrize(("url", "words"), ADDRESSES.items())
async def test_cannot_connect(url: str, words: str, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be made is one sentence with the next move."""
    monkeypatch.setattr(memws, "OPEN_TIMEOUT", 0.2 if "mute" in url else 10)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        special = {"an HTTP server": endpoint.url.replace("http", "ws")}
        special["a mute server"] = f"ws://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(memws.ConnectFailed) as caught:
            await memws.Client(special.get(url, url)).connect()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_secrets(serve: Callable[..., memws.WebSocketServer], caplog: pytest.LogCaptureFixture) -> None:
    """Neither token nor query nor password gets into repr, errors and logs."""
    caplog.set_level(logging.DEBUG)
    assert memws.Client("ws://user:s3cret@host:1/x?token=s3cret#s3cret").url == "ws://host:1/x"
    server = serve(token="s3cret")
    for url, *token in ((server.url, "s3cret"), (f"{server.url}/?token=s3cret",)):
        async with memws.Client(url, *token) as client:
            await client.hello()
    refused = memws.Client(f"{server.url}/?token=s3cre", "s3cre")
    with pytest.raises(memws.ConnectFailed, match="MEMWS_TOKEN") as caught:
        await refused.connect()
    assert caught.value.details == {"status": 401}
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("memws")]
    assert lines
    assert "s3cre" not in str(caught.value) + repr(refused) + repr(client) + "".join(lines)


@pytest.mark.parametrize("token", ["a\r\nX: y", "with space", "", "é"])
def test_token_that_is_no_header(token: str) -> None:
    """A token that cannot be a header's value is refused before anything is sent."""
    with pytest.raises(memws.UsageError, match="printable ASCII"):
        memws.Client(token=token)


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "memws client"]


async def test_blocking(server: memws.WebSocketServer) -> None:
    """The blocking client gives the same, also where a loop runs, as in a notebook; closed, it leaves no thread."""
    with memws.connect(server.url) as client:
        for types in (set[str](), {"*"}):
            client.hello(types)
        assert client.create_agent("sam")["agent_name"] == client.agent_name == "sam"
        assert client.ask("hi") == "you said hi"
        subscription = client.subscribe(after=0)
        turn = client.send("you")
        types = [event["type"] for event in turn] + list(turn)
        assert (types[0], types[-1]) == ("agent_response_start", "agent_response_end")
        assert next(subscription)["seq"] == 1
        client.command("unsubscribe")
        with pytest.raises(memws.RemoteError, match="unknown agent 'nobody'"):
            client.load_agent("nobody")
    with pytest.raises(memws.ConnectionLost):
        client.hello()
    assert client_threads() == []


def test_blocking_ends_with_its_last_reference(server: memws.WebSocketServer) -> None:
    """A client that nothing refers to any more leaves no thread; one that cannot connect neither."""
    client = memws.connect(server.url)
    (thread,) = client_threads()
    del client
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(memws.ConnectFailed):
        memws.connect("ws://127.0.0.1:1")
    assert client_threads() == []


def test_interrupt_cancels(server: memws.WebSocketServer, endpoint: Endpoint) -> None:
    """An interrupt that meets a turn being waited for cancels it."""
    endpoint.script(say("slow", hold=True))
    with memws.connect(server.url) as client, ThreadPoolExecutor(1) as threads:
        client.create_agent("sam")
        turn = client.send("hi")
        assert next(turn)["type"] == "agent_response_start"
        waits, stream, events = threading.Event(), turn._stream, turn._stream._events
        stream._events = types.SimpleNamespace(get=lambda **to: waits.set() or events.get(**to), put_nowait=events.put)

        def interrupt() -> None:
            endpoint.wait_requests(1)
            assert waits.wait(10)
            os.kill(os.getpid(), signal.SIGINT)

        interrupting = threads.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(turn)
        interrupting.result()
        assert list(turn)[-1]["stop_reason"] == "cancelled"


def test_close_from_another_thread(server: memws.WebSocketServer, endpoint: Endpoint) -> None:
    """close in one thread ends the wait of another."""
    endpoint.script(say("slow", hold=True))
    client = memws.connect(server.url)
    client.create_agent("sam")
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(client.ask, "hi")
        endpoint.wait_requests(1)
        client.close()
        assert isinstance(asking.exception(5), memws.ConnectionLost)


def test_no_call_on_its_own_thread(proxy: Proxy) -> None:
    """A blocking call from the client's own thread is an error that names the awaitable one, not a deadlock."""
    told: queue.Queue[str] = queue.Queue()

    def call(state: str) -> None:
        for ask in (client.hello, lambda: client.send("hi")):
            with pytest.raises(memws.UsageError) as caught:
                ask()
            told.put(str(caught.value).rpartition(" ")[2])

    with memws.connect(proxy.url, on_state=call) as client:
        proxy.cut()
        assert [told.get(timeout=10), told.get(timeout=10)] == ["hello", "send"]
