"""Real servers, killed: what was acknowledged is there exactly once, and the agents go on as if nothing had been."""

import asyncio
import importlib
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from agents import packed, results
from commandline import Serving
from endpoint import Endpoint, Reply
from wire import JSON, LIMIT, Wire, bare, events_of, is_terminal, messages_of, of_kind, wire

sys.path.append(str(Path(__file__).with_name("soak")))
soaking: Any = importlib.import_module("soaking")
pytestmark = pytest.mark.anyio

Online = Callable[..., Any]
MESSAGE = "Please do it, and mind the gap between ä and 日"


class Place:
    """One database and whatever serves it, one server after another; with a desk, a program with tools."""

    def __init__(self, folder: Path, database: str, endpoint: Endpoint, desk_port: int) -> None:
        self.folder, self.database, self.endpoint, self.desk_port = folder, database, endpoint, desk_port

    def serve(self) -> Serving:
        flags = "--db", self.database, "--model", "test-model", "--base-url", self.endpoint.url
        server: Serving = soaking.process(self.folder, *flags, desk=self.desk_port)
        return server

    def check(self) -> None:
        soaking.check_database(self.database)

    @asynccontextmanager
    async def again(self, online: Online) -> AsyncIterator[Wire]:
        """A client of a server that serves the database again, in this process, which has openai imported by now."""
        server = online(db=self.database)
        async with wire(server, "*") as client:
            yield client
        await asyncio.to_thread(server.stop)


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
EDITS: list[Any] = [("core_memory_append", {"name": "human", "content": "Name: Ada"}), INSERT]
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
async def at(
    stage: Stage, endpoint: Endpoint, folder: Path, database: str
) -> AsyncIterator[tuple[Place, Serving, Wire, Any]]:
    """A server whose agent sam has come to that stage of a turn, the client that waits for it, and the tools' desk."""
    async with soaking.Desk().opened() as desk:
        desk.says = lambda _: "Yes"
        desk.answers = lambda _: 0.0 if desk.calls.total() < stage.calls else None
        place = Place(folder, database, endpoint, desk.port if stage.calls else 0)
        with place.serve() as serving:
            async with wire(serving, "*") as client:
                config = {"name": "sam", "tools": ["ask", "ask_later"]} if stage.calls else {"name": "sam"}
                await client.ok("create_agent", config=config)
                endpoint.script(*stage.script)
                await client.say(MESSAGE, turn_id="t1", agent_name="sam")
                await client.until(stage.until)
                async with asyncio.timeout(LIMIT), desk.came:
                    await desk.came.wait_for(lambda: desk.calls.total() >= stage.calls)
                await asyncio.to_thread(endpoint.wait_requests, stage.requests)
                yield place, serving, client, desk


async def check_turn(client: Wire, before: list[JSON]) -> list[JSON]:
    """The turn t1 as it is stored: it holds all that was told of it `before`, is whole, and comes last."""
    events = await events_of(client)
    told = soaking.stored(before)
    assert {seq: bare(events[seq - 1]) for seq in told} == told
    turn = [frame for frame in events if frame.get("turn_id") == "t1"]
    assert [frame["type"] == "agent_response_start" for frame in turn] == [True] + [False] * (len(turn) - 1)
    assert [is_terminal(frame) for frame in turn] == [False] * (len(turn) - 1) + [True]
    assert events[-1] == turn[-1]
    return turn


async def check_aftermath(place: Place, before: list[JSON], desk: Any, clean: bool, online: Online) -> list[JSON]:
    """Serve the database again, and look at everything that a client may rely on; the events of the turn t1."""
    endpoint = place.endpoint
    place.check()
    endpoint.release()
    async with place.again(online) as client:
        assert (await client.ok("load_agent", name="sam"))["repaired"] == [] or not clean
        turn = await check_turn(client, before)
        calls, requests = desk.calls.copy(), len(endpoint.requests)
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
    place.check()
    return turn


ENDINGS = [(stage, "KILL") for stage in STAGES]
ENDINGS += [(MODEL, "TERM"), (STREAM, "TERM"), (PAUSE, "TERM")]
ENDINGS += [(STEPS, "INT"), (TOOL, "INT"), (ASYNC, "INT"), (END, "INT")]
CASES = [(*ending, "sqlite") for ending in ENDINGS]
CASES += [(stage, "KILL", "postgresql") for stage in (STREAM, STEPS, TOOL)]
CASES += [(BETWEEN, "INT", "postgresql")]
NAMES = ["-".join((stage.name, *rest)) for stage, *rest in CASES]


@pytest.mark.parametrize(("stage", "name", "database"), CASES, ids=NAMES, indirect=["database"])
async def test_whatever_ends_a_server_a_turn_is_whole_and_never_runs_twice(
    stage: Stage, name: str, database: str, endpoint: Endpoint, tmp_path: Path, online: Online, caplog: Any
) -> None:
    """All that was told is there once, the turn has its end, and sent again is replayed; a signal leaves no repair."""
    async with at(stage, endpoint, tmp_path, database) as (place, serving, client, desk):
        serving.process.send_signal(signal.Signals[f"SIG{name}"])
        code = await client.closed()
        status = await asyncio.to_thread(serving.wait, 4)
        turn = await check_aftermath(place, client.frames, desk, name != "KILL", online)
    assert ("Traceback" in serving.log, "ERROR" in serving.log) == (False, False)
    assert [record for record in caplog.records if record.exc_info] == []
    if name != "KILL":
        (end,) = filter(is_terminal, client.frames)
        assert (code, status, end["stop_reason"], bare(end)) == (1001, 0, stage.ends[0], bare(turn[-1]))
        return
    assert (status, turn[-1]["type"]) == (-signal.SIGKILL, "agent_response_end")
    assert turn[-1]["stop_reason"] in stage.ends
    told = [(answer["name"], answer["status"], answer["message"]) for answer in of_kind(turn, "tool_return")]
    unknown = ("Failed", "interrupted: result unknown")
    if stage is TOOL:
        assert told == [("archival_memory_insert", "OK", "None"), ("ask", *unknown), ("ask", *unknown)]
        assert list(desk.calls.elements()) == ["May I?"]
        assert results(endpoint.requests[-1])[1:3] == [": ".join(unknown)] * 2
    if stage is BETWEEN:
        assert told == [("ask", "OK", "Yes"), ("ask_later", *unknown)]
        assert list(desk.calls.elements()) == ["May I?", "Really?"]


async def test_a_repair_is_made_once_and_before_all_else(
    database: str, endpoint: Endpoint, tmp_path: Path, online: Online
) -> None:
    """However often a server is killed while it repairs, an old turn has one end, before the start of a new one."""
    async with at(TOOL, endpoint, tmp_path, database) as (place, serving, client, _):
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
        async with place.again(online) as again:
            turn = await again.turn("And now?", agent_name="sam", turn_id="t2")
            events = await events_of(again)
            assert (await again.ok("load_agent", name="sam"))["repaired"] == []
    (ended,) = [frame for frame in events if is_terminal(frame) and frame["turn_id"] == "t1"]
    assert (ended["seq"] + 1, ended["stop_reason"]) == (turn[0]["seq"], "interrupted")
    assert {frame["turn_id"] for frame in turn} == {"t2"}
    place.check()
