"""Models, endpoints and processes misbehave at random: no history is poisoned, every turn ends once, talk goes on."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from agents import LIMIT, Lab, Told, sent_for
from endpoint import Body, Endpoint, Reply, greet

import memws

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

BOUNDED: Body = {"deadline": None, "database": None}

FIELDS = (
    "choices", "delta", "message", "content", "tool_calls", "function", "name", "arguments", "index", "id", "usage",
    "prompt_tokens", "completion_tokens", "finish_reason", "refusal", "reasoning", "function_call", "text",
)  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text(max_size=3)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, derandomize=True, **BOUNDED)
@given(st.lists(junk | junk.map(lambda value: {"choices": [{"delta": value}], "usage": value}), max_size=4))
def test_a_chunk_of_any_shape_is_taken_or_named(chunks: list[Any]) -> None:
    """Chunks with fields of any type are read, or are a ModelError, and what was read can be stored."""
    reply = memws.Reply()
    with contextlib.suppress(memws.ModelError):
        for chunk in chunks:
            if isinstance(chunk, dict):
                reply.feed(chunk)
            for _, text in reply.news():
                text.encode()
    with contextlib.suppress(memws.ModelError):
        memws.read_reply(reply, memws.MEMORY_TOOLS)
        for call in reply.calls:
            assert isinstance(json.loads(memws.encode_json(call.arguments)), dict)
            assert 0 < len(call.id) <= 128
        assert len({call.id for call in reply.calls}) == len(reply.calls)


ran: list[int] = []


def note(number: int) -> int:
    ran.append(number)
    return number


async def fail(text: str = "") -> str:
    await asyncio.sleep(0)
    raise RuntimeError(text)


TOOLS: list[tuple[str, Body]] = [
    ("send_message", {"message": "Well."}), ("send_message", {"text": "Well."}), ("send_message", {}),
    ("core_memory_append", {"name": "human", "content": "Name: Zoe"}), ("note", {"number": 1}),
    ("core_memory_append", {"name": "human", "content": "xxxxx" * 300}), ("fail", {"text": "no"}), ("", {}),
    ("core_memory_append", {"name": "dog", "content": "x"}), ("pause_heartbeats", {"minutes": 5}),
    ("core_memory_replace", {"name": "human", "old_content": "Name", "new_content": "Nom"}),
    ("archival_memory_insert", {"content": "Fact " * 50}), ("archival_memory_search", {"query": "passage"}),
    ("conversation_search", {"query": "word", "page": -1}), ("note", {"number": "x"}), ("no such tool!", {}),
    ("conversation_search_date", {"start_date": "x", "end_date": "y"}),
]  # fmt: skip
BROKEN_ARGUMENTS = ["", "{", "[]", "null", '"{}"', "{}{}", '{"message": "Well', "Sure! {}", "\ud83d", "\x00"]
BROKEN_ARGUMENTS += ["[" * 5_000]
TEXTS = [
    "Well.", "", " ", "<think>Hm.</think>Well.", "<think>Hm.", '{"a": 1}', "word " * 400, "\ud83d\x00",
    '{"name": "send_message", "arguments": {"message": "Well."}}',
    '<tool_call>{"name": "send_message", "arguments": {"message": "We',
    '<tool_call>{"name": "send_message", "arguments": nonsense',
    '```json\n[{"function": {"name": "note", "arguments": "{}"}}]\n```',
]  # fmt: skip
OVERFLOW = {"error": {"message": "too long", "code": "context_length_exceeded"}}

arguments = st.sampled_from(BROKEN_ARGUMENTS) | st.text(alphabet='{}[]",:\\ \nabtrue1\ud800\x00', max_size=30)
calls = st.sampled_from(TOOLS).flatmap(
    lambda tool: st.tuples(
        st.just(tool[0]),
        arguments | st.sampled_from([tool[1], *(tool[1] | {"request_heartbeat": beat} for beat in (True, "yes"))]),
    )
)
SWITCHES = ("whole", "first_without_delta", "calls_as_text", "whole_arguments", "call_index")
answers = st.builds(
    lambda text, calls, ids, **more: Reply(text, calls, None if ids is None else ids[: len(calls)], **more),
    st.none() | st.sampled_from(TEXTS),
    st.lists(calls, max_size=4),
    st.none() | st.lists(st.sampled_from(["a", "b", "", None, "x" * 300]), min_size=4, max_size=4),
    reasoning=st.sampled_from(["", "Hm.", "\ud83d"]),
    finish=st.sampled_from([None, None, None, "stop", "length", "content_filter", "function_call", ""]),
    usage=st.sampled_from(["auto", None, {"prompt_tokens": 1}, {"prompt_tokens": 10**12}, {"prompt_tokens": "x"}, {}]),
    chunk=st.sampled_from([3, 8, 1_000]),
    empty_choices=st.sampled_from(["none", "none", "none", "first", "all"]),
    **dict.fromkeys(SWITCHES, st.booleans()),
)
zero, calm = {"Retry-After": "0"}, [("send_message", {"message": "Well, well."})]
failures = st.sampled_from([
    Reply(status=503, headers=zero), Reply(status=429, headers=zero), Reply(status=429, headers={"Retry-After": "999"}),
    Reply(status=429), Reply(status=429, headers={"Retry-After": "nan"}), Reply(status=502, body="<html>"),
    Reply(status=401), Reply(status=400), Reply(status=400, body=OVERFLOW), Reply(body="<html>"), Reply(),
    Reply("Well, well.", cut_after=2), Reply(calls=calm, cut_after=4), Reply(refusal="I won't."),
    Reply("Well, well.", error_in_stream={"message": "crash"}), Reply("Well, well.", done=False, empty_choices="all"),
])  # fmt: skip
slow = st.sampled_from([Reply(hold=True), Reply("Well, well.", stall_after=2), Reply(calls=calm, stall_after=4)])


@dataclass(frozen=True)
class Trial:
    """One turn that goes wrong: what the model answers, and after which event it is stopped or its process killed."""

    message: str | None
    script: list[Reply]
    verify: bool
    stop_at: int | None
    kill_at: int | None


events = st.integers(0, 30)
messages = st.sampled_from(["Hi", "word " * 150, "word " * 4_000, None])


def wrongs(replies: Any) -> Any:
    """Up to three trials, in which some of these come, or one of them for ever."""
    scripts = st.lists(replies, min_size=1, max_size=8) | replies.map(lambda reply: [reply] * 60)
    trials = st.builds(Trial, messages, scripts, st.booleans(), st.none() | events, st.none() | st.none() | events)
    return st.lists(trials, min_size=1, max_size=3)


windows = st.sampled_from([3_000, 3_500, 8_192, 100_000])


class Bench:
    """One lab on one loop for all examples; each gets an agent of its own."""

    def __init__(self, endpoint: Endpoint, runner: asyncio.Runner, database: str, patience: float) -> None:
        self.endpoint, self.runner, self.patience = endpoint, runner, patience
        self.lab = Lab(endpoint, database, tools=[note, fail])
        self.count = 0

    def wait_for_models(self, seconds: float) -> None:
        """How long a model may be silent from now on."""
        memws.FIRST_TOKEN_TIMEOUT = self.lab.models.endpoint.idle_timeout = seconds

    async def example(self, window: int, wrong: list[Trial]) -> None:
        """Every trial ends as it should, and after each of them a plain turn works."""
        self.count += 1
        name = f"agent{self.count}"
        agent = await self.lab.create(name, context_window=window, max_steps=6)
        for trial in wrong:
            script = iter(trial.script)
            self.endpoint.default = lambda body, script=script: next(script, None) or greet(body)
            turn = self.lab.turn(trial.message, verify=trial.verify)
            self.wait_for_models(self.patience)
            if trial.kill_at is not None:
                agent = await self.kill(agent, turn, trial.kill_at)
            else:
                self.check_end(await self.stopped(agent, turn, trial.stop_at))
            ran.clear()
            self.endpoint.default = greet
            self.wait_for_models(LIMIT)
            told = await self.lab.say(agent, "And now?")
            assert (told.replies[:1], told.stop_reason) == (["Hello!"], "done"), told.end
            last = max(frame["step"] for frame in told.of("context"))
            request = (await sent_for(agent, str(told.end["turn_id"]), last))["request"]
            assert memws.encode_json(request).encode() == self.endpoint.bodies[-1]  # rebuilt as it was sent
            reopened = await self.lab.open(name)
            assert reopened.repairs == []
            assert reopened.record.state == agent.record.state
        assert self.endpoint.refusals == []

    async def kill(self, agent: memws.Agent, turn: memws.Turn, after: int) -> memws.Agent:
        """Abandon a turn after so many events, as a killed process does; the agent, opened anew."""
        running, count = asyncio.create_task(agent.turn(turn)), itertools.count()
        agent.memory.emit = lambda *events: after in [next(count) for _ in events] and running.cancel()
        await asyncio.wait([running])
        await self.lab.store.write(lambda _: None)  # after what it was writing
        agent = await self.lab.open(agent.name)
        stored = await self.lab.events(agent, turn.turn_id)
        ends = [frame["type"] in memws.TERMINAL_TYPES for frame in stored]
        assert ends == [False] * (len(stored) - 1) + [True]
        assert stored[-1]["stop_reason"] == "interrupted" or agent.repairs == []
        return agent

    async def stopped(self, agent: memws.Agent, turn: memws.Turn, after: int | None) -> Told:
        """Run a turn, which is stopped after so many events."""
        loop, count = asyncio.get_running_loop(), itertools.count()
        stop = lambda _: loop.call_soon(turn.stop, "cancelled") if next(count) == after else None  # noqa: E731
        return await self.lab.run(agent, turn, stop)

    def check_end(self, told: Told) -> None:
        """The turn did not end by a fault of ours, and each call of a tool ran once."""
        assert (told.end["type"] == "agent_response_error") == (told.stop_reason == "error")
        assert told.end.get("code") != "internal"
        notes = [frame for frame in told.of("tool_return") if frame["name"] == "note"]
        done = sum(frame["status"] == "OK" for frame in notes)
        unknown = sum("result unknown" in frame["message"] for frame in notes)
        assert done <= len(ran) <= done + unknown


@contextlib.contextmanager
def bench_on(database: str, patience: float = LIMIT) -> Iterator[Bench]:
    """The lab that all examples share."""
    with Endpoint() as endpoint, asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(memws, "RETRY_PAUSE", 0.0)
        patch.setattr(memws, "FIRST_TOKEN_TIMEOUT", LIMIT)
        bench = Bench(endpoint, runner, database, patience)
        runner.run(bench.lab.__aenter__())
        yield bench
        runner.run(bench.lab.__aexit__())


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    in_memory = request.param == "sqlite"
    with bench_on(":memory:" if in_memory else request.getfixturevalue("postgres").database()) as bench:
        yield bench


@settings(max_examples=75, derandomize=True, **BOUNDED)
@given(windows, wrongs(answers | failures))
def test_whatever_happens_talk_goes_on(bench: Bench, window: int, wrong: list[Trial]) -> None:
    """Random answers, failures, stops and kills: one end for each turn, nothing refused, and the next turn works."""
    bench.runner.run(bench.example(window, wrong))
