"""Real servers, killed: what was acknowledged is there exactly once, and the agents go on as if nothing had been."""

import asyncio
import random
import resource
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from agents import packed, results
from commandline import PROGRAM, Serving
from endpoint import Endpoint, Reply
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from wire import JSON, LIMIT, Wire, is_terminal, of_kind, wire

import memws

MESSAGE = "Please do it, and mind the gap between ä and 日"
LONG = "A long answer that the user sees piece by piece. " * 20

RUNNER = '''
import asyncio
import socket
import sys

import memws

server = memws.WebSocketServer("127.0.0.1", 0, db=sys.argv[2], model="test-model", base_url=sys.argv[3], api_key="sk-x")
desk = int(sys.argv[4])


@server.tool
def ask(question: str) -> str:
    """Ask the desk."""
    with socket.create_connection(("127.0.0.1", desk)) as line:
        line.sendall(question.encode() + b"\\n")
        return line.makefile().readline().strip()


@server.tool
async def ask_later(question: str) -> str:
    """Ask the desk without a thread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", desk)
    try:
        writer.write(question.encode() + b"\\n")
        return (await reader.readline()).decode().strip()
    finally:
        writer.close()


server.run()
'''
"A program of a user: a server with tools of its own, which a test answers through a socket."


class Desk:
    """Where the user's tools ask: counts their calls, and holds each until it is answered."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._called = asyncio.Condition()
        self._writers: list[asyncio.StreamWriter] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        question = (await reader.readline()).decode().strip()
        async with self._called:
            self.calls.append(question)
            self._called.notify_all()
        with suppress(ConnectionError):
            await reader.read()  # until the tool hangs up or its server dies
        writer.close()

    async def called(self, count: int) -> None:
        """Wait until so many calls have come in all."""
        async with asyncio.timeout(LIMIT), self._called:
            await self._called.wait_for(lambda: len(self.calls) >= count)

    def answer(self, text: str) -> None:
        self._writers[-1].write(f"{text}\n".encode())


@asynccontextmanager
async def desk() -> AsyncIterator[tuple[Desk, int]]:
    """A desk and the port where it listens."""
    opened = Desk()
    server = await asyncio.start_server(opened, "127.0.0.1", 0)
    async with server:
        yield opened, server.sockets[0].getsockname()[1]


class Place:
    """One database and whatever serves it, one server process after another."""

    def __init__(self, folder: Path, endpoint: Endpoint | None = None, desk_port: int | None = None) -> None:
        self.folder, self.endpoint, self.desk_port = folder, endpoint, desk_port
        self.path = folder / "memws.db"
        self.end = signal.SIGTERM if desk_port is None else signal.SIGINT
        "What ends its servers: run() is ended by an interrupt, the command line by both."

    @contextmanager
    def serve(self) -> Iterator[Serving]:
        """A server on the database; one that cannot start fails the test with what it said."""
        with self.serving() as serving:
            if not serving.url:
                serving.wait()
                pytest.fail(serving.log)
            yield serving

    def serving(self) -> Serving:
        if self.desk_port is not None:
            assert self.endpoint is not None
            program = self.folder / "runner.py"
            program.write_text(RUNNER, "utf-8")
            variables = {"PYTHONPATH": str(PROGRAM.parent)}
            flags = (str(self.path), self.endpoint.url, str(self.desk_port))
            return Serving(*flags, cwd=self.folder, variables=variables, program=program)
        flags = ("--host", "127.0.0.1", "--db", str(self.path))
        if self.endpoint is None:
            return Serving(*flags, "--model", "offline", "--rate-limit", "0", cwd=self.folder)
        flags += ("--model", "test-model", "--base-url", self.endpoint.url)
        return Serving(*flags, cwd=self.folder, variables={"OPENAI_API_KEY": "sk-x"})

    def check(self) -> None:
        """The database is whole, and each turn in it has one start and at most one end."""
        with closing(sqlite3.connect(self.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            sql = "SELECT count(*) FROM events WHERE text LIKE ? GROUP BY agent, turn_id"
            for kind in ("agent_response_start", "agent_response_e"):  # an end or an error
                assert {count for (count,) in connection.execute(sql, (f'{{"type":"{kind}%',))} <= {1}
            agents = connection.execute("SELECT id, last_seq FROM agents").fetchall()
            for agent, last_seq in agents:
                seqs = connection.execute("SELECT seq FROM events WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
                assert [seq for (seq,) in seqs] == list(range(1, last_seq + 1))


async def events_of(client: Wire, name: str = "sam") -> list[JSON]:
    """All stored events of an agent, through a subscription from the beginning."""
    last_seq = (await client.ok("subscribe", agent_name=name, after=0))["last_seq"]
    frames = await client.until(lambda frame: frame.get("seq") == last_seq) if last_seq else []
    await client.ok("unsubscribe", agent_name=name)
    assert [frame["seq"] for frame in frames] == list(range(1, last_seq + 1))
    return frames


def bare(frame: JSON) -> JSON:
    """A frame without the mark of whoever asked for it."""
    return {name: value for name, value in frame.items() if name != "id" or frame["type"] == "agent_response"}


def stored(frames: list[JSON]) -> dict[int, JSON]:
    """The stored events among frames, by seq."""
    return {frame["seq"]: bare(frame) for frame in frames if "seq" in frame}


async def until_closed(client: Wire) -> int | None:
    """Read what still comes; the close code, None where the peer just died."""
    with suppress(ConnectionClosed):
        while True:
            await client.receive()
    return client.websocket.close_code


# ---- one kill at each stage of a turn --------------------------------------------------------------------------------


async def stop_at_the_start(endpoint: Endpoint, client: Wire, _: Desk) -> None:
    """The user's message has just been acknowledged; whether the model was asked nobody knows."""
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await client.started()


async def hold_the_model(endpoint: Endpoint, client: Wire, _: Desk) -> None:
    """The user's message is acknowledged, and the model has not begun to answer."""
    endpoint.script(Reply("x", hold=True))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await client.started()
    await asyncio.to_thread(endpoint.wait_requests, 1)


async def stop_in_mid_stream(endpoint: Endpoint, client: Wire, _: Desk) -> None:
    """A part of the reply has been shown."""
    endpoint.script(Reply(calls=[("send_message", {"message": LONG})], stall_after=20))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await client.until(lambda frame: frame.get("message_type") == "delta")


async def stop_between_steps(endpoint: Endpoint, client: Wire, _: Desk) -> None:
    """A first step has changed both memories and said something, the second waits for the model."""
    calls = [
        ("core_memory_append", {"name": "human", "content": "Name: Ada"}),
        ("archival_memory_insert", {"content": "The key is under the mat"}),
        ("send_message", {"message": "Noted."}),
        ("conversation_search", {"query": "gap", "request_heartbeat": True}),
    ]
    endpoint.script(Reply("I note it", calls=calls), Reply("x", hold=True))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await client.until(lambda frame: frame.get("message_type") == "heartbeat")
    await asyncio.to_thread(endpoint.wait_requests, 2)


async def stop_in_a_pause(endpoint: Endpoint, client: Wire, _: Desk) -> None:
    """The endpoint has asked for a pause, in which the turn waits."""
    endpoint.script(Reply(status=429, headers={"Retry-After": "20"}))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await client.until(lambda frame: frame.get("message_type") == "retry")


async def stop_after_the_end(endpoint: Endpoint, client: Wire, _: Desk) -> None:
    """The turn is over."""
    endpoint.script(Reply(calls=[("send_message", {"message": "Done."})]))
    await client.turn(MESSAGE, turn_id="t1", agent_name="sam")


async def stop_in_a_tool(endpoint: Endpoint, client: Wire, desk: Desk) -> None:
    """A tool of the user has been called, after a memory tool of the same step, and works."""
    calls = [
        ("archival_memory_insert", {"content": "The key is under the mat"}),
        ("ask", {"question": "May I?"}),
        ("ask", {"question": "Really?"}),
    ]
    endpoint.script(Reply("I ask", calls=calls))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await desk.called(1)
    await client.until(lambda frame: str(frame.get("message", "")).startswith("Running ask("))


async def stop_in_an_async_tool(endpoint: Endpoint, client: Wire, desk: Desk) -> None:
    """An async tool of the user works."""
    endpoint.script(Reply(calls=[("ask_later", {"question": "May I?"})]))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await desk.called(1)
    await client.until(lambda frame: str(frame.get("message", "")).startswith("Running ask_later("))


async def stop_between_tools(endpoint: Endpoint, client: Wire, desk: Desk) -> None:
    """A first tool of the user has answered, and a second of the same step works."""
    endpoint.script(Reply(calls=[("ask", {"question": "May I?"}), ("ask_later", {"question": "Really?"})]))
    await client.say(MESSAGE, turn_id="t1", agent_name="sam")
    await desk.called(1)
    desk.answer("Yes")
    await desk.called(2)
    await client.until(lambda frame: str(frame.get("message", "")).startswith("Running ask_later("))


Stage = Callable[[Endpoint, Wire, Desk], Any]
STAGES: list[Stage] = [
    stop_at_the_start, hold_the_model, stop_in_mid_stream, stop_between_steps, stop_in_a_pause, stop_in_a_tool,
    stop_in_an_async_tool, stop_between_tools, stop_after_the_end,
]  # fmt: skip
SIGNALS: list[tuple[Stage, signal.Signals]] = [
    (hold_the_model, signal.SIGTERM), (stop_in_mid_stream, signal.SIGTERM), (stop_in_mid_stream, signal.SIGINT),
    (stop_between_steps, signal.SIGINT), (stop_in_a_pause, signal.SIGTERM), (stop_after_the_end, signal.SIGINT),
    (stop_in_a_tool, signal.SIGINT), (stop_in_an_async_tool, signal.SIGINT), (stop_between_tools, signal.SIGINT),
]  # fmt: skip
TOOLS = ("ask", "ask_later")


@asynccontextmanager
async def stage(reach: Stage, endpoint: Endpoint, folder: Path) -> AsyncIterator[tuple[Place, Serving, Wire, Desk]]:
    """A server whose agent sam has come to that stage of a turn, and the client that waits for it."""
    async with desk() as (opened, port):
        place = Place(folder, endpoint, port if "tool" in reach.__name__ else None)
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                config = {"name": "sam", "tools": list(TOOLS)} if place.desk_port else {"name": "sam"}
                await client.ok("create_agent", config=config)
                await reach(endpoint, client, opened)
                yield place, serving, client, opened


async def check_turn(client: Wire, before: list[JSON]) -> list[JSON]:
    """The turn t1 as it is stored: it holds all that was told of it `before`, is whole, and comes last."""
    events = await events_of(client)
    told = stored(before)
    assert {seq: bare(events[seq - 1]) for seq in told} == told
    turn = [frame for frame in events if frame.get("turn_id") == "t1"]
    assert [frame["type"] == "agent_response_start" for frame in turn] == [True] + [False] * (len(turn) - 1)
    assert [is_terminal(frame) for frame in turn] == [False] * (len(turn) - 1) + [True]
    assert events[-1] == turn[-1]
    return turn


async def check_aftermath(place: Place, before: list[JSON], opened: Desk) -> list[JSON]:
    """Serve the database again, and look at everything that a client may rely on; the events of the turn t1."""
    endpoint = place.endpoint
    assert endpoint is not None
    place.check()
    endpoint.release()
    with place.serve() as serving:
        async with wire(serving, "*") as client:
            await client.ok("load_agent", name="sam")
            turn = await check_turn(client, before)
            calls, requests = list(opened.calls), len(endpoint.requests)
            again = await client.turn(MESSAGE, turn_id="t1", agent_name="sam", id="again")
            assert [bare(frame) for frame in again] == [bare(frame) for frame in turn]
            assert (again[0]["id"], again[-1]["id"]) == ("again", "again")
            other = await client.turn("Something else", turn_id="t1", agent_name="sam")
            assert [frame.get("code") for frame in other] == ["turn_id_reused"]
            assert (opened.calls, len(endpoint.requests)) == (calls, requests)

            following = await client.turn("And now?", agent_name="sam")
            assert following[-1]["stop_reason"] == "done"
            assert [frame["message"] for frame in of_kind(following, "assistant_message")] == ["Hello!"]
            assert following[0]["seq"] == turn[-1]["seq"] + 1
            messages = (await client.ok("get_messages", agent_name="sam", limit=200))["messages"]
            assert [m["text"] for m in messages if m["role"] == "user"] == [MESSAGE, "And now?"]
            texts = [event["message"] for event in packed(endpoint.requests[-1], "user_message")]
            assert texts == [MESSAGE, "And now?"]
        assert serving.end(place.end) == 0
    assert "Traceback" not in serving.log
    place.check()
    return turn


@pytest.mark.anyio
@pytest.mark.parametrize("reach", STAGES, ids=lambda reach: reach.__name__)
async def test_a_killed_turn_is_whole_and_never_runs_twice(reach: Stage, endpoint: Endpoint, tmp_path: Path) -> None:
    """After kill -9 at any stage all that was told is there once, the turn has its end, and sent again is replayed."""
    async with stage(reach, endpoint, tmp_path) as (place, serving, client, opened):
        assert serving.end(signal.SIGKILL) == -signal.SIGKILL
        await until_closed(client)
        turn = await check_aftermath(place, client.frames, opened)
    ends = {stop_after_the_end: ["done"], stop_at_the_start: ["interrupted", "done"]}
    assert turn[-1]["type"] == "agent_response_end"
    assert turn[-1]["stop_reason"] in ends.get(reach, ["interrupted"])
    told = [(answer["name"], answer["status"], answer["message"]) for answer in of_kind(turn, "tool_return")]
    if reach is stop_in_a_tool:
        assert told == [
            ("archival_memory_insert", "OK", "None"),
            ("ask", "Failed", "interrupted: result unknown"),
            ("ask", "Failed", "interrupted: result unknown"),
        ]
        assert opened.calls == ["May I?"]
        assert results(endpoint.requests[-1])[1:3] == ["Failed: interrupted: result unknown"] * 2
    if reach is stop_between_tools:
        assert told == [("ask", "OK", "Yes"), ("ask_later", "Failed", "interrupted: result unknown")]
        assert opened.calls == ["May I?", "Really?"]


@pytest.mark.anyio
@pytest.mark.parametrize(("reach", "number"), SIGNALS, ids=[f"{reach.__name__}-{each.name}" for reach, each in SIGNALS])
async def test_a_signal_ends_turns_and_connections_cleanly(
    reach: Stage, number: signal.Signals, endpoint: Endpoint, tmp_path: Path
) -> None:
    """A signal ends an open turn as interrupted, closes with 1001 and exits with 0; nothing is left to repair."""
    async with stage(reach, endpoint, tmp_path) as (place, serving, client, _):
        serving.process.send_signal(number)
        assert await until_closed(client) == 1001
        assert await asyncio.to_thread(serving.wait) == 0
        assert "Traceback" not in serving.log
        (end,) = filter(is_terminal, client.frames)
        assert end["stop_reason"] == ("done" if reach is stop_after_the_end else "interrupted")
        place.check()
        endpoint.release()
        requests = len(endpoint.requests)
        with place.serve() as serving:
            async with wire(serving, "*") as again:
                assert (await again.ok("load_agent", name="sam"))["repaired"] == []
                turn = await check_turn(again, client.frames)
                assert bare(turn[-1]) == bare(end)
                replayed = await again.turn(MESSAGE, turn_id="t1", agent_name="sam")
                assert [bare(frame) for frame in replayed] == [bare(frame) for frame in turn]
        assert len(endpoint.requests) == requests


@pytest.mark.anyio
async def test_the_end_of_a_killed_turn_comes_before_a_new_one(endpoint: Endpoint, tmp_path: Path) -> None:
    """Where the first thing after a kill is a new message, the old turn's end still comes before its start."""
    async with stage(stop_in_a_tool, endpoint, tmp_path) as (place, serving, client, _):
        serving.end(signal.SIGKILL)
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                turn = await client.turn("And now?", agent_name="sam", turn_id="t2")
                events = await events_of(client)
    ended = next(frame for frame in events if is_terminal(frame) and frame["turn_id"] == "t1")
    assert ended["seq"] + 1 == turn[0]["seq"]
    assert {frame["turn_id"] for frame in turn} == {"t2"}


@pytest.mark.anyio
async def test_a_repair_is_made_once(endpoint: Endpoint, tmp_path: Path) -> None:
    """A server that is killed again while it repairs, or just after, leaves one end and then nothing to repair."""
    async with stage(stop_in_a_tool, endpoint, tmp_path) as (place, serving, client, _):
        serving.end(signal.SIGKILL)
        await until_closed(client)
        for answered in (False, True):
            with place.serve() as serving:
                async with wire(serving, "*") as again:
                    await again.send(type="command", command="load_agent", name="sam")
                    if answered:
                        await again.receive()
                    serving.end(signal.SIGKILL)
                    await until_closed(again)
        with place.serve() as serving:
            async with wire(serving, "*") as again:
                assert (await again.ok("load_agent", name="sam"))["repaired"] == []
                turn = await check_turn(again, client.frames)
    assert turn[-1]["stop_reason"] == "interrupted"
    place.check()


@pytest.mark.anyio
async def test_an_agent_goes_on_without_its_tool(endpoint: Endpoint, tmp_path: Path) -> None:
    """A server that does not know the tool in which its agent was killed loads it, says so, and goes on."""
    async with stage(stop_in_a_tool, endpoint, tmp_path) as (_, serving, client, _):
        serving.end(signal.SIGKILL)
        with Place(tmp_path, endpoint).serve() as serving:
            async with wire(serving, "*") as client:
                loaded = await client.ok("load_agent", name="sam")
                assert "tools that are not registered now are left out: ask, ask_later" in loaded["warnings"]
                assert loaded["repaired"][-1] == "turn t1 was interrupted and got its end"
                turn = await client.turn("And now?")
    assert turn[-1]["stop_reason"] == "done"
    assert results(endpoint.requests[-1])[1:] == ["Failed: interrupted: result unknown"] * 2


@pytest.mark.anyio
async def test_a_subscriber_goes_on_where_it_was(endpoint: Endpoint, tmp_path: Path) -> None:
    """A client that subscribes after a kill with its last seq gets the rest, each event once, in order."""
    async with stage(stop_between_steps, endpoint, tmp_path) as (place, serving, client, _):
        serving.end(signal.SIGKILL)
        await until_closed(client)
        cursor = max(stored(client.frames))
        endpoint.release()
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                last_seq = (await client.ok("subscribe", agent_name="sam", after=cursor))["last_seq"]
                rest = await client.until(lambda frame: frame.get("seq") == last_seq)
                await client.say("And now?", agent_name="sam")
                rest += [frame for frame in await client.until(is_terminal) if "seq" in frame]
    assert [frame["seq"] for frame in rest] == list(range(cursor + 1, cursor + len(rest) + 1))
    ends = [frame["stop_reason"] for frame in rest if is_terminal(frame)]
    assert ends == ["interrupted", "done"]


@pytest.mark.anyio
async def test_messages_that_waited_are_not_acknowledged(endpoint: Endpoint, tmp_path: Path) -> None:
    """Messages that wait when the server is killed got no start, are not in the history, and run when sent again."""
    async with stage(hold_the_model, endpoint, tmp_path) as (place, serving, client, _):
        for number in (2, 3):
            await client.say(f"message {number}", turn_id=f"t{number}", agent_name="sam")
            await client.until(lambda frame: frame.get("message_type") == "queue")
        serving.end(signal.SIGKILL)
        await until_closed(client)
        assert {frame["turn_id"] for frame in client.frames if frame["type"] == "agent_response_start"} == {"t1"}
        endpoint.release()
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                for number in (3, 2, 3):
                    turn = await client.turn(f"message {number}", turn_id=f"t{number}", agent_name="sam")
                    assert turn[-1]["stop_reason"] == "done"
                messages = (await client.ok("get_messages", agent_name="sam", limit=200))["messages"]
    assert [m["text"] for m in messages if m["role"] == "user"] == [MESSAGE, "message 3", "message 2"]


@pytest.mark.anyio
async def test_a_killed_server_leaves_no_lock(tmp_path: Path) -> None:
    """A second server on the file is refused while the first runs, and not once it was killed."""
    place = Place(tmp_path)
    with place.serve() as first:
        with place.serving() as second:
            assert second.wait() == 2
        assert second.log.startswith("memws: another memws server uses the database ")
        assert (second.out, second.log.count("\n")) == ([""], 1)
        first.end(signal.SIGKILL)
        with place.serve() as third:
            assert third.url
            assert third.end() == 0


# ---- a disk that is full ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_full_disk_refuses_messages_until_there_is_room(endpoint: Endpoint, tmp_path: Path) -> None:
    """While no file can grow, a message gets store_failed and reads are answered; then the agent goes on, unharmed."""
    place = Place(tmp_path, endpoint)
    with place.serve() as serving:
        async with wire(serving, "*") as client:
            await client.ok("create_agent", config={"name": "sam"})
            assert (await client.turn("First", agent_name="sam"))[-1]["stop_reason"] == "done"
            before = await events_of(client)
            process = serving.process.pid
            limits = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (wal_size(tmp_path), limits[1]))
            for number in range(3):
                refused = await client.turn(f"Refused {number}", agent_name="sam", turn_id=f"refused {number}")
                assert [(frame["type"], frame["code"]) for frame in refused] == [
                    ("agent_response_error", "store_failed")
                ]
                assert "seq" not in refused[0]
            assert (await client.refused("insert_passage", agent_name="sam", text="x"))["code"] == "store_failed"
            assert (await client.refused("create_agent", config={}))["code"] == "store_failed"
            assert await events_of(client) == before
            resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
            turn = await client.turn("Refused 1", agent_name="sam", turn_id="refused 1")
            assert (turn[0]["seq"], turn[-1]["stop_reason"]) == (before[-1]["seq"] + 1, "done")
            messages = (await client.ok("get_messages", agent_name="sam", limit=200))["messages"]
            assert [m["text"] for m in messages if m["role"] == "user"] == ["First", "Refused 1"]
        assert serving.end() == 0
    place.check()


def wal_size(folder: Path) -> int:
    return (folder / "memws.db-wal").stat().st_size


@pytest.mark.anyio
async def test_a_disk_that_fills_in_mid_turn_ends_it_once(endpoint: Endpoint, tmp_path: Path) -> None:
    """A turn whose step cannot be stored ends with store_failed; the message that was acknowledged is kept."""
    place = Place(tmp_path, endpoint)
    with place.serve() as serving:
        async with wire(serving, "*") as client:
            await client.ok("create_agent", config={"name": "sam"})
            endpoint.script(Reply(calls=[("send_message", {"message": "Lost."})], hold=True))
            await client.say(MESSAGE, agent_name="sam", turn_id="t1")
            await client.started()
            await asyncio.to_thread(endpoint.wait_requests, 1)
            process = serving.process.pid
            limits = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (wal_size(tmp_path), limits[1]))
            endpoint.release()
            end = await client.ended()
            assert (end["type"], end["code"], "seq" in end) == ("agent_response_error", "store_failed", False)
            resource.prlimit(process, resource.RLIMIT_FSIZE, limits)
            turn = await client.turn("And now?", agent_name="sam")
            assert turn[-1]["stop_reason"] == "done"
            again = await client.turn(MESSAGE, agent_name="sam", turn_id="t1")
            assert [is_terminal(frame) for frame in again] == [False] * (len(again) - 1) + [True]
            assert again[-1]["seq"] < turn[0]["seq"]
            events = await events_of(client)
            assert stored(client.frames) == {frame["seq"]: bare(frame) for frame in events}
            messages = (await client.ok("get_messages", agent_name="sam", limit=200))["messages"]
            assert [m["text"] for m in messages if m["role"] == "user"] == [MESSAGE, "And now?"]
        assert serving.end(place.end) == 0
    place.check()


# ---- many kills ------------------------------------------------------------------------------------------------------


class Talker:
    """A client that sends messages to its agent, one after another, again where it does not know what became of one."""

    def __init__(self, number: int, agent: str) -> None:
        self.number, self.agent = number, agent
        self.turns: dict[str, str] = {}
        "Text by turn_id, of all that was ever sent."
        self.over: set[str] = set()
        self.kept: dict[str, bool] = {}
        "Passages that it handed over, and whether that was acknowledged."
        self.told: dict[int, JSON] = {}
        "Every stored event that it was told of, by seq."

    async def talk(self, client: Wire, on_frame: Callable[[], None]) -> None:
        """Send until the connection is gone."""
        with suppress(ConnectionClosed):
            while True:
                turn_id = next((each for each in self.turns if each not in self.over), None)
                if turn_id is None:
                    turn_id = f"{self.number}-{len(self.turns)}"
                    self.turns[turn_id] = (
                        f"My favourite number is {turn_id}, remember that. What is my favourite number?"
                    )
                await self.finish(client, turn_id, on_frame)
                await self.keep(client, f"passage{self.number}x{len(self.kept)}", on_frame)

    async def keep(self, client: Wire, text: str, on_frame: Callable[[], None]) -> None:
        """Put a passage into archival memory."""
        self.kept[text] = False
        await client.ok("insert_passage", agent_name=self.agent, text=text)
        self.kept[text] = True
        on_frame()

    async def finish(self, client: Wire, turn_id: str, on_frame: Callable[[], None]) -> None:
        """Send a message, for the first time or again, and read to its end."""
        await client.say(self.turns[turn_id], agent_name=self.agent, turn_id=turn_id)
        while True:
            frame = await client.receive()
            on_frame()
            if "seq" in frame:
                assert self.told.setdefault(frame["seq"], bare(frame)) == bare(frame)
            if is_terminal(frame):
                assert frame["turn_id"] == turn_id
                self.over.add(turn_id)
                return


@pytest.mark.anyio
async def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """Killed twenty times under four clients, a server has all that it told, each message once, each turn whole."""
    rng = random.Random(20261124)
    place = Place(tmp_path)
    talkers = [Talker(number, agent) for number, agent in enumerate(("sam", "sam", "ada", "bob"))]
    for _ in range(20):
        left = rng.randrange(1, 60)
        with place.serve() as serving:

            def on_frame(serving: Serving = serving) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    serving.process.kill()

            async def session(talker: Talker, serving: Serving = serving, on_frame: Any = on_frame) -> None:
                with suppress(ConnectionClosed, InvalidHandshake, OSError):  # killed, before or while it connects
                    async with wire(serving, "*") as client:
                        await client.command("create_agent", config={"name": talker.agent})
                        await talker.talk(client, on_frame)

            await asyncio.gather(*map(session, talkers))
            assert await asyncio.to_thread(serving.wait) == -signal.SIGKILL
            assert "Traceback" not in serving.log
        place.check()

    with place.serve() as serving:
        async with wire(serving, "*") as client:
            for talker in talkers:
                for turn_id in talker.turns:
                    await talker.finish(client, turn_id, lambda: None)
            for name in ("sam", "ada", "bob"):
                mine = [talker for talker in talkers if talker.agent == name]
                events = {frame["seq"]: bare(frame) for frame in await events_of(client, name)}
                for talker in mine:
                    assert {seq: events[seq] for seq in talker.told} == talker.told
                starts = [frame["turn_id"] for frame in events.values() if frame["type"] == "agent_response_start"]
                ends = [frame["turn_id"] for frame in events.values() if is_terminal(frame)]
                sent_turns = [turn_id for talker in mine for turn_id in talker.turns]
                assert sorted(starts) == sorted(sent_turns)
                assert ends == starts
                texts = [text for talker in mine for text in talker.turns.values()]
                assert sorted(await users_messages(client, name)) == sorted(texts)
                for text, acknowledged in [item for talker in mine for item in talker.kept.items()]:
                    query = {"query": text, "store": "archival", "limit": 50}
                    found = (await client.ok("search_memory", agent_name=name, **query))["items"]
                    count = [item["text"] for item in found].count(text)
                    assert count == 1 or (count == 0 and not acknowledged)
        assert serving.end(place.end) == 0
    place.check()
    assert sum(len(talker.over) for talker in talkers) > 10


async def users_messages(client: Wire, name: str) -> list[str]:
    """The texts of all messages of an agent's users."""
    texts: list[str] = []
    before = None
    while True:
        page = await client.ok("get_messages", agent_name=name, limit=200, before=before)
        texts += [message["text"] for message in page["messages"] if message["role"] == "user"]
        if not page["more"]:
            return texts
        before = page["messages"][0]["id"]


def test_the_program_under_test_is_ours() -> None:
    """What these tests kill is the module that the others import."""
    assert Path(memws.__file__) == PROGRAM
