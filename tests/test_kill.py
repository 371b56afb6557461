"""Real servers, killed: what was acknowledged is there exactly once, and the agents go on as if nothing had been."""

import asyncio
import random
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agents import packed, results
from commandline import PROGRAM, Serving
from endpoint import Endpoint, Reply
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from wire import JSON, LIMIT, Wire, bare, events_of, is_terminal, messages_of, of_kind, wire

import memws

pytestmark = pytest.mark.anyio

MESSAGE = "Please do it, and mind the gap between ä and 日"
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
            flags = (str(self.path), self.endpoint.url, str(self.desk_port))
            return Serving(*flags, cwd=self.folder, variables={"PYTHONPATH": str(PROGRAM.parent)}, program=program)
        flags = ("--host", "127.0.0.1", "--db", str(self.path))
        if self.endpoint is None:
            return Serving(*flags, "--model", "offline", cwd=self.folder)
        flags += ("--model", "test-model", "--base-url", self.endpoint.url)
        return Serving(*flags, cwd=self.folder, variables={"OPENAI_API_KEY": "sk-x"})

    def check(self) -> None:
        """The database is whole, each turn in it has one start and at most one end, and no seq is missing."""
        with closing(sqlite3.connect(self.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
            sql = "SELECT count(*) FROM events WHERE kind LIKE ? GROUP BY agent, turn_id"
            for kind in ("agent_response_start", "agent_response_e%"):  # an end or an error
                assert {count for (count,) in connection.execute(sql, (kind,))} <= {1}
            for agent, last_seq in connection.execute("SELECT id, last_seq FROM agents").fetchall():
                rows = connection.execute("SELECT seq FROM events WHERE agent = ? ORDER BY seq", (agent,)).fetchall()
                assert [seq for (seq,) in rows] == list(range(1, last_seq + 1))


def stored(frames: list[JSON]) -> dict[int, JSON]:
    """The stored events among frames, by seq."""
    return {frame["seq"]: bare(frame) for frame in frames if "seq" in frame}


# ---- one kill at each stage of a turn --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """How far a turn has come when something happens to its server."""

    name: str
    script: Sequence[Reply]
    until: Callable[[JSON], bool]
    requests: int = 0  # model calls that have been made
    calls: int = 0  # calls of the user's tools that have been made; the last one waits
    ends: tuple[str, ...] = ("interrupted",)  # after a kill


def saw(kind: str, text: str = "") -> Callable[[JSON], bool]:
    return lambda frame: frame.get("message_type", frame["type"]) == kind and text in frame.get("message", "")


SAY = Reply(calls=[("send_message", {"message": "A long answer that is seen piece by piece. " * 20})], stall_after=20)
INSERT = ("archival_memory_insert", {"content": "The key is under the mat"})
EDITS = [("core_memory_append", {"name": "human", "content": "Name: Ada"}), INSERT]
EDITS += [("send_message", {"message": "Noted."}), ("conversation_search", {"query": "gap", "request_heartbeat": True})]
MAY_I, REALLY = ("ask", {"question": "May I?"}), {"question": "Really?"}
HELD, ASK, LATER = Reply("x", hold=True), "Running ask(", "Running ask_later("
START, MODEL, STREAM, STEPS, PAUSE, TOOL, ASYNC, BETWEEN, END = STAGES = [
    Stage("start", [], saw("agent_response_start"), ends=("interrupted", "done")),  # perhaps the model was asked
    Stage("model", [HELD], saw("agent_response_start"), requests=1),
    Stage("stream", [SAY], saw("delta")),
    Stage("steps", [Reply("I note it", calls=EDITS), HELD], saw("heartbeat"), requests=2),
    Stage("pause", [Reply(status=429, headers={"Retry-After": "20"})], saw("retry")),
    Stage("tool", [Reply("I ask", calls=[INSERT, MAY_I, ("ask", REALLY)])], saw("function_message", ASK), calls=1),
    Stage("async", [Reply(calls=[("ask_later", {"question": "May I?"})])], saw("function_message", LATER), calls=1),
    Stage("between", [Reply(calls=[MAY_I, ("ask_later", REALLY)])], saw("function_message", LATER), calls=2),
    Stage("end", [Reply(calls=[("send_message", {"message": "Done."})])], is_terminal, ends=("done",)),
]


@asynccontextmanager
async def at(stage: Stage, endpoint: Endpoint, folder: Path) -> AsyncIterator[tuple[Place, Serving, Wire, Desk]]:
    """A server whose agent sam has come to that stage of a turn, and the client that waits for it."""
    desk = Desk()
    async with await asyncio.start_server(desk, "127.0.0.1", 0) as server:
        place = Place(folder, endpoint, server.sockets[0].getsockname()[1] if stage.calls else None)
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                config = {"name": "sam", "tools": ["ask", "ask_later"]} if stage.calls else {"name": "sam"}
                await client.ok("create_agent", config=config)
                endpoint.script(*stage.script)
                await client.say(MESSAGE, turn_id="t1", agent_name="sam")
                for number in range(1, stage.calls):
                    await desk.called(number)
                    desk.answer("Yes")
                await client.until(stage.until)
                await desk.called(stage.calls)
                await asyncio.to_thread(endpoint.wait_requests, stage.requests)
                yield place, serving, client, desk


async def check_turn(client: Wire, before: list[JSON]) -> list[JSON]:
    """The turn t1 as it is stored: it holds all that was told of it `before`, is whole, and comes last."""
    events = await events_of(client)
    assert {seq: bare(events[seq - 1]) for seq in stored(before)} == stored(before)
    turn = [frame for frame in events if frame.get("turn_id") == "t1"]
    assert [frame["type"] == "agent_response_start" for frame in turn] == [True] + [False] * (len(turn) - 1)
    assert [is_terminal(frame) for frame in turn] == [False] * (len(turn) - 1) + [True]
    assert events[-1] == turn[-1]
    return turn


async def check_aftermath(place: Place, before: list[JSON], desk: Desk) -> list[JSON]:
    """Serve the database again, and look at everything that a client may rely on; the events of the turn t1."""
    endpoint = place.endpoint
    assert endpoint is not None
    place.check()
    endpoint.release()
    with place.serve() as serving:
        async with wire(serving, "*") as client:
            await client.ok("load_agent", name="sam")
            turn = await check_turn(client, before)
            calls, requests = list(desk.calls), len(endpoint.requests)
            again = await client.turn(MESSAGE, turn_id="t1", agent_name="sam", id="again")
            assert [bare(frame) for frame in again] == [bare(frame) for frame in turn]
            assert (again[0]["id"], again[-1]["id"]) == ("again", "again")
            other = await client.turn("Something else", turn_id="t1", agent_name="sam")
            assert [frame.get("code") for frame in other] == ["turn_id_reused"]
            assert (desk.calls, len(endpoint.requests)) == (calls, requests)

            following = await client.turn("And now?", agent_name="sam")
            assert (following[0]["seq"], following[-1]["stop_reason"]) == (turn[-1]["seq"] + 1, "done")
            assert [frame["message"] for frame in of_kind(following, "assistant_message")] == ["Hello!"]
            assert await messages_of(client, "sam") == [MESSAGE, "And now?"]
            texts = [event["message"] for event in packed(endpoint.requests[-1], "user_message")]
            assert texts == [MESSAGE, "And now?"]
        assert serving.end(place.end) == 0
    assert "Traceback" not in serving.log
    place.check()
    return turn


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
async def test_a_killed_turn_is_whole_and_never_runs_twice(stage: Stage, endpoint: Endpoint, tmp_path: Path) -> None:
    """After kill -9 at any stage all that was told is there once, the turn has its end, and sent again is replayed."""
    async with at(stage, endpoint, tmp_path) as (place, serving, client, desk):
        assert serving.end(signal.SIGKILL) == -signal.SIGKILL
        await client.closed()
        turn = await check_aftermath(place, client.frames, desk)
    assert (turn[-1]["type"], turn[-1]["stop_reason"] in stage.ends) == ("agent_response_end", True)
    told = [(answer["name"], answer["status"], answer["message"]) for answer in of_kind(turn, "tool_return")]
    unknown = ("Failed", "interrupted: result unknown")
    if stage is TOOL:
        assert told == [("archival_memory_insert", "OK", "None"), ("ask", *unknown), ("ask", *unknown)]
        assert desk.calls == ["May I?"]
        assert results(endpoint.requests[-1])[1:3] == [": ".join(unknown)] * 2
    if stage is BETWEEN:
        assert told == [("ask", "OK", "Yes"), ("ask_later", *unknown)]
        assert desk.calls == ["May I?", "Really?"]


SIGNALS = [(MODEL, "TERM"), (STREAM, "TERM"), (STREAM, "INT"), (STEPS, "INT"), (PAUSE, "TERM"), (END, "INT")]
SIGNALS += [(TOOL, "INT"), (ASYNC, "INT"), (BETWEEN, "INT")]


@pytest.mark.parametrize(("stage", "name"), SIGNALS, ids=[f"{stage.name}-{name}" for stage, name in SIGNALS])
async def test_a_signal_ends_turns_and_connections_cleanly(
    stage: Stage, name: str, endpoint: Endpoint, tmp_path: Path
) -> None:
    """A signal ends an open turn as interrupted, closes with 1001 and exits with 0; nothing is left to repair."""
    async with at(stage, endpoint, tmp_path) as (place, serving, client, _):
        serving.process.send_signal(signal.Signals[f"SIG{name}"])
        assert await client.closed() == 1001
        assert await asyncio.to_thread(serving.wait) == 0
        assert "Traceback" not in serving.log
        (end,) = filter(is_terminal, client.frames)
        assert end["stop_reason"] == stage.ends[0]
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


async def test_a_repair_is_made_once_and_before_all_else(endpoint: Endpoint, tmp_path: Path) -> None:
    """However often a server is killed while it repairs, an old turn has one end, before the start of a new one."""
    async with at(TOOL, endpoint, tmp_path) as (place, serving, client, _):
        serving.end(signal.SIGKILL)
        await client.closed()
        for answered in (False, True):
            with place.serve() as serving:
                async with wire(serving, "*") as again:
                    await again.send(type="command", command="load_agent", name="sam")
                    if answered:
                        await again.receive()
                    serving.end(signal.SIGKILL)
                    await again.closed()
        with place.serve() as serving:
            async with wire(serving, "*") as again:
                turn = await again.turn("And now?", agent_name="sam", turn_id="t2")
                events = await events_of(again)
                assert (await again.ok("load_agent", name="sam"))["repaired"] == []
    (ended,) = [frame for frame in events if is_terminal(frame) and frame["turn_id"] == "t1"]
    assert (ended["seq"] + 1, ended["stop_reason"]) == (turn[0]["seq"], "interrupted")
    assert {frame["turn_id"] for frame in turn} == {"t2"}
    place.check()


async def test_an_agent_goes_on_without_its_tool(endpoint: Endpoint, tmp_path: Path) -> None:
    """A server that does not know the tool in which its agent was killed loads it, says so, and goes on."""
    async with at(TOOL, endpoint, tmp_path) as (_, serving, client, _):
        serving.end(signal.SIGKILL)
        with Place(tmp_path, endpoint).serve() as serving:
            async with wire(serving, "*") as client:
                loaded = await client.ok("load_agent", name="sam")
                assert "tools that are not registered now are left out: ask, ask_later" in loaded["warnings"]
                assert loaded["repaired"][-1] == "turn t1 was interrupted and got its end"
                turn = await client.turn("And now?")
    assert turn[-1]["stop_reason"] == "done"
    assert results(endpoint.requests[-1])[1:] == ["Failed: interrupted: result unknown"] * 2


async def test_messages_that_waited_are_not_acknowledged(endpoint: Endpoint, tmp_path: Path) -> None:
    """Messages that wait when the server is killed got no start, are not in the history, and run when sent again."""
    async with at(MODEL, endpoint, tmp_path) as (place, serving, client, _):
        for number in (2, 3):
            await client.say(f"message {number}", turn_id=f"t{number}", agent_name="sam")
            await client.until(saw("queue"))
        serving.end(signal.SIGKILL)
        await client.closed()
        assert {frame["turn_id"] for frame in client.frames if frame["type"] == "agent_response_start"} == {"t1"}
        endpoint.release()
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                for number in (3, 2, 3):
                    turn = await client.turn(f"message {number}", turn_id=f"t{number}", agent_name="sam")
                    assert turn[-1]["stop_reason"] == "done"
                assert await messages_of(client, "sam") == [MESSAGE, "message 3", "message 2"]


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
            assert third.end() == 0
    assert Path(memws.__file__) == PROGRAM


# ---- a disk that is full ---------------------------------------------------------------------------------------------


# ---- many kills ------------------------------------------------------------------------------------------------------


class Talker:
    """A client that sends messages to its agent, one after another, again where it does not know what became of one."""

    def __init__(self, number: int, agent: str) -> None:
        self.number, self.agent = number, agent
        self.turns: dict[str, str] = {}  # text by turn_id, of all that was ever sent
        self.over: set[str] = set()
        self.kept: dict[str, bool] = {}  # passages that it handed over, and whether that was acknowledged
        self.told: dict[int, JSON] = {}  # every stored event that it was told of, by seq

    async def talk(self, client: Wire, on_frame: Callable[[], None]) -> None:
        """Send until the connection is gone."""
        with suppress(ConnectionClosed):
            while True:
                turn_id = next((each for each in self.turns if each not in self.over), None)
                if turn_id is None:
                    turn_id = f"{self.number}-{len(self.turns)}"
                    self.turns[turn_id] = f"My favourite number is {turn_id}, remember. What is my favourite number?"
                await self.finish(client, turn_id, on_frame)
                passage = f"passage{self.number}x{len(self.kept)}"
                self.kept[passage] = False
                await client.ok("insert_passage", agent_name=self.agent, text=passage)
                self.kept[passage] = True
                on_frame()

    async def finish(self, client: Wire, turn_id: str, on_frame: Callable[[], None]) -> None:
        """Send a message, for the first time or again, and read to its end."""
        await client.say(self.turns[turn_id], agent_name=self.agent, turn_id=turn_id)
        while turn_id not in self.over:
            frame = await client.receive()
            on_frame()
            if "seq" in frame:
                assert self.told.setdefault(frame["seq"], bare(frame)) == bare(frame)
            if is_terminal(frame):
                assert frame["turn_id"] == turn_id
                self.over.add(turn_id)

    async def check(self, client: Wire, events: dict[int, JSON]) -> None:
        """All that it was told is stored, and what it handed over is there once."""
        assert {seq: events[seq] for seq in self.told} == self.told
        for text, acknowledged in self.kept.items():
            query = {"query": text, "store": "archival", "limit": 50}
            found = (await client.ok("search_memory", agent_name=self.agent, **query))["items"]
            count = [item["text"] for item in found].count(text)
            assert count == 1 or (count == 0 and not acknowledged)


async def test_twenty_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    """Killed twenty times under four clients, a server has all that it told, each message once, each turn whole."""
    rng, place = random.Random(20261124), Place(tmp_path)
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
                for turn_id in talker.turns.keys() - talker.over:
                    await talker.finish(client, turn_id, lambda: None)
            for name in ("sam", "ada", "bob"):
                events = {frame["seq"]: bare(frame) for frame in await events_of(client, name)}
                turns = [item for talker in talkers if talker.agent == name for item in talker.turns.items()]
                starts = [frame["turn_id"] for frame in events.values() if frame["type"] == "agent_response_start"]
                assert sorted(starts) == sorted(turn_id for turn_id, _ in turns)
                assert [frame["turn_id"] for frame in events.values() if is_terminal(frame)] == starts
                assert sorted(await messages_of(client, name)) == sorted(text for _, text in turns)
                for talker in talkers:
                    if talker.agent == name:
                        await talker.check(client, events)
        assert serving.end(place.end) == 0
    place.check()
    assert sum(len(talker.over) for talker in talkers) > 10
