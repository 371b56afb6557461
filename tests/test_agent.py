"""A turn ends well whatever model, endpoint, tools and crashes do: what it says, stores, sends and tells."""

import asyncio
import contextlib
import itertools
import json
import re
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agents import Lab, Told, packed, results, sent, sent_for
from endpoint import Answer, Body, Endpoint, Reply, greet, prompt_tokens

import memws
from memws import Agent

pytestmark = pytest.mark.anyio

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (AM|PM) UTC\+0000"
RFC_3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
APPEND: tuple[str, Body] = ("core_memory_append", {"name": "human", "content": "Name: Zoe"})
HELLO: tuple[str, Body] = ("send_message", {"message": "Hello!"})
BUSY = Reply(status=503, headers={"Retry-After": "0"})
OVERFLOW = Reply(status=400, body={"error": {"message": "too long", "code": "context_length_exceeded"}})


def beat(name: str, /, **arguments: Any) -> tuple[str, Body]:
    """A call that asks for a heartbeat."""
    return name, {**arguments, "request_heartbeat": True}


NOTE = beat("core_memory_append", **APPEND[1])


ran: list[int] = []


def count(number: int) -> str:
    ran.append(number)
    return f"{number} done"


def is_summary(body: Body) -> bool:
    return bool(body["messages"][0]["content"] == memws.SUMMARY_SYSTEM)


async def edit(agent: Agent, work: Awaitable[Any]) -> tuple[Any, list[Body]]:
    """The result of an edit from outside, and the events of it."""
    events: list[Body] = []
    agent.memory.emit = lambda *stored: events.extend(json.loads(event.text) for event in stored)
    return await work, events


async def compact(agent: Agent) -> Body:
    """The event of a compaction by request."""
    sizes, (event,) = await edit(agent, agent.compact(memws.Turn("", None)))
    assert sizes == {name: event[name] for name in ("tokens_before", "tokens_after")}
    return event


async def recalled(lab: Lab, agent: Agent, text: str, role: str = "assistant") -> list[str]:
    """What a search of recall memory finds of one speaker."""
    found, _ = await lab.store.read(memws.search, agent.record.id, memws.Query(text, ("recall",)))
    return [document.text for document in found if document.role == role]


async def test_messages_are_packed_as_0_2_7_packed_them(endpoint: Endpoint, lab: Lab) -> None:
    """The system message shows core memory and sizes; events and results are JSON with type or status, and time.

    Creating and loading send nothing; system prompt and tools cost at most 1,400 tokens by any estimate.
    """
    await lab.create(human="Name: Zoe", blocks=[{"label": "plan", "value": "rest", "limit": 50}])
    agent = await lab.open()
    assert endpoint.requests == []
    endpoint.script(Reply(calls=[beat("core_memory_append", name="plan", content="run")]))
    await lab.say(agent, 'Hi "you"')
    tools = ",".join(tool.spec for tool in memws.MEMORY_TOOLS.values())
    assert memws.estimate_tokens(memws.SYSTEM_PROMPT) + memws.estimate_tokens(tools) <= 1_400
    prompt = endpoint.requests[0]["messages"][0]
    assert len(prompt["content"]) // 4 + prompt_tokens(endpoint.requests[0])[1] <= 1_400
    assert (prompt["role"], prompt["content"].startswith(memws.SYSTEM_PROMPT.rstrip())) == ("system", True)
    core = '<human characters="9/2000">\nName: Zoe\n</human>\n<plan characters="4/50">\nrest\n</plan>'
    assert core in prompt["content"]
    assert "Recall memory: 0 messages. Archival memory: 0 passages." in prompt["content"]
    (login,), (user,) = (packed(endpoint.requests[1], kind) for kind in ("login", "user_message"))
    *_, result, heartbeat = sent(endpoint.requests[1])
    roles = [message["role"] for message in endpoint.requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "user"], "login and message are one chat message"
    reason = memws.HEARTBEAT_REQUESTED
    for content, expected in (
        (login, {"type": "login", "last_login": "Never (first login)"}),
        (user, {"type": "user_message", "message": 'Hi "you"'}),
        (result["content"], {"status": "OK", "message": "None"}),
        (heartbeat["content"], {"type": "heartbeat", "reason": reason}),
    ):
        assert content == expected | {"time": content["time"]}
        assert re.fullmatch(TIME, content["time"])


async def test_a_login_precedes_a_message_after_an_hour_of_silence(endpoint: Endpoint, lab: Lab) -> None:
    """The first message ever, and one after an hour without the user, are preceded by a login; others are not."""
    agent = await lab.create()
    logins = []
    for last in (None, None, "2020-01-02T03:04:05.678Z", None):
        if last is not None:
            changes = memws.Changes(columns={"state": {**agent.record.state, "last_user": last}})
            await lab.store.write(memws.commit, agent.record.id, changes)
            agent = await lab.open()
        await lab.say(agent, "Hi")
        logins.append([login["last_login"] for login in packed(endpoint.requests[-1], "login")])
        contents = [message["content"] for message in sent(endpoint.requests[-1]) if message["role"] == "user"]
        assert contents[-1]["type"] == "user_message"
    first, later = ["Never (first login)"], ["2020-01-02 03:04:05 AM UTC+0000"]
    assert logins == [first, first, first + later, first + later]


async def test_a_timezone_that_this_machine_does_not_know(lab: Lab, agent: Agent) -> None:
    """An agent from a machine that knows more timezones opens, says so, and reads the server's clock."""
    config = agent.record.config | {"timezone": "Mars/Base"}
    await lab.store.write(memws.commit, agent.record.id, memws.Changes(columns={"config": config}))
    agent = await lab.open()
    assert ["Mars/Base" in warning for warning in agent.warnings] == [True]
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]


async def test_the_prompt_only_grows_at_its_end(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """Between edits each request begins, byte for byte, with the whole of the one before it."""
    endpoint.script(
        Reply("I search.", calls=[beat("conversation_search", query="x"), beat("archival_memory_insert", content="y")]),
        Reply(calls=[("no_such_tool", {})]),
        Reply(calls=[HELLO]),
        Reply("Plain text"),
        Reply(calls=[beat("archival_memory_search", query="y")]),
    )
    for text in ("One", "Two", "Three"):
        await lab.say(agent, text)
    end = b'],"tools":' + endpoint.bodies[0].partition(b'],"tools":')[2]
    assert len(endpoint.bodies) == 6
    for before, after in zip(endpoint.bodies, endpoint.bodies[1:], strict=False):
        assert before.endswith(end)
        assert after.startswith(before.removesuffix(end) + b",{")
        assert after.endswith(end)


async def test_the_system_message_is_rebuilt_by_an_edit_a_load_and_a_compaction(lab: Lab, agent: Agent) -> None:
    """Edits of core memory, loads and compactions renew the system message, with the sizes as of then; nothing else."""
    insert = Reply(calls=[beat("archival_memory_insert", content="a fact")])
    lab.endpoint.script(insert, Reply(calls=[NOTE]))

    async def say() -> tuple[str, tuple[str, str]]:
        """The system message of a turn's last request, and the sizes that it tells."""
        await lab.say(agent, "Hi")
        system = lab.endpoint.requests[-1]["messages"][0]["content"]
        found = re.search(r"Recall memory: (\d+) messages\. Archival memory: (\d+) passages\.", system)
        assert found
        return system, (found[1], found[2])

    edited, sizes = await say()
    first, second, _ = (request["messages"][0]["content"] for request in lab.endpoint.requests)
    assert (first, "Name: Zoe" in edited, sizes[1]) == (second, True, "1")
    assert 0 < int(sizes[0]) < agent.memory.last_message
    lab.endpoint.script(insert)
    assert await say() == (edited, sizes)
    for what in ("load", "compaction", "edit"):
        recall = str(agent.memory.last_message)
        if what == "load":
            agent = await lab.open()
        elif what == "compaction":
            await compact(agent)
        else:
            async with memws.Transaction(agent.memory) as change:
                change.write("human", "Name: Ada", 2)
        system, sizes = await say()
        assert (sizes, "Name: Ada" in system) == ((recall, "2"), what == "edit")


async def test_the_events_of_a_step_are_in_the_order_of_0_2_7(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """Monologue; per call the call, "Running …", its effects, its return, "Success: …"; then how full the window is."""
    usage = {"prompt_tokens": 1_000, "completion_tokens": 10}
    endpoint.script(Reply("I greet Zoe.", calls=[NOTE, HELLO], usage=usage), Reply(calls=[HELLO], usage=usage))
    turn = await lab.say(agent, "I am Zoe")
    call, answer = ["tool_call", "function_message"], ["tool_return", "function_message"]
    step = ["internal_monologue", *call, "memory_change", *answer, *call, "assistant_message", *answer]
    assert turn.kinds == ["user_message", *step, "heartbeat", "context", *call, "assistant_message", *answer, "context"]
    said = ["Running send_message({'message': 'Hello!'})", "Success: None"]
    assert turn.texts("function_message") == [
        "Running core_memory_append({'name': 'human', 'content': 'Name: Zoe'})", "Success: None", *said, *said,
    ]  # fmt: skip
    assert turn.texts("internal_monologue", "user_message") == ["I am Zoe", "I greet Zoe."]
    assert {frame["turn_id"] for frame in turn.events} == {"turn-1"}
    assert all(re.fullmatch(RFC_3339, frame["time"]) for frame in turn.events)
    steps = [frame["step"] for frame in turn.events[1:-1]]
    assert (steps, set(steps)) == (sorted(steps), {1, 2})
    assert turn.stop_reason == "done"
    assert turn.end["usage"] == {"input_tokens": 2_000, "output_tokens": 20, "model_calls": 2, "estimated": False}
    called, returned = turn.of("tool_call")[0], turn.of("tool_return")[0]
    assert (called["name"], called["arguments"]) == NOTE
    assert (returned["tool_call_id"], returned["status"]) == (called["tool_call_id"], "OK")
    assert await lab.events(agent) == [frame for frame in turn.events if "seq" in frame]


"""What is seen of a turn that has an answer at once. The table names what is different."""


CUT = '{"name": "human", "old_content": "Zoe", "new_content": "'
COUNT = '<tool_call>{"name": "count", "arguments": {"number": 3}}</tool_call>'
GREETING = '<tool_call>{"name": "send_message", "arguments": {"message": "Hello!"}}</tool_call>'
SEARCH = ("conversation_search", {"query": "x"})
SEARCH_ON = Reply(calls=[beat(SEARCH[0], **SEARCH[1])])
OPTIONS: Body = {"temperature": 0.5, "top_p": 0.5, "seed": 1}
HALF_BUDGET = {"prompt_tokens": memws.TURN_TOKEN_BUDGET // 2, "completion_tokens": 0}
WRONG = [("no_such_tool", {"n": number}) for number in range(4)]
MENDED: Body = {"asked": 2, "retries": [("bad_output", 1, 1, 0)]}
FAILED: Body = {"end": "bad_output", "replies": []}
THOUGHT_ONLY: Body = FAILED | MENDED | {"says": "only thought .*; raise max_tokens or lower reasoning_effort$"}
TWICE = [("model_unavailable", 1, 2, 0), ("model_unavailable", 2, 2, 0)]
PAUSES = [Reply(status=429, headers={"Retry-After": "0.03"}), Reply(status=503, headers={"Retry-After": "0.02"})]
PAUSED = [("model_rate_limit", 1, 2, 30), ("model_unavailable", 2, 2, 20)]
WORDS, LONG = "Jinja Exception: roles must not be like this; see line 25", "prompt is too long: 9000 > 8000 maximum"
ASKED_FOR, AFTER_FAILURE, NO_REPLY = memws.HEARTBEAT_REQUESTED, memws.HEARTBEAT_FAILED, memws.HEARTBEAT_NO_REPLY
TIMER, WAKE, BOTH = memws.HEARTBEAT_TIMER, memws.HEARTBEAT_WAKE, ["Hello!", "Hello!"]
AS_TEXT = (SEARCH[0], SEARCH[1] | {"request_heartbeat": "true"})
UNKNOWN = "unknown tool 'no_such_tool'"


def another_search(body: Body) -> Reply:
    """A search that was not made before, and a wish for the next one."""
    return Reply(calls=[beat("conversation_search", query=str(len(body["messages"])))])


def dear_search(body: Body) -> Reply:
    return replace(another_search(body), usage=HALF_BUDGET, usage_style="last")


def outcome(*answers: Answer, **different: Any) -> tuple[Sequence[Answer], Body]:
    """What a model answers, after which it greets, and what is different then from a turn with an answer at once."""
    at_once = {"end": "done", "asked": 1, "replies": ["Hello!"], "partial": [], "corrections": [], "retries": []}
    return answers, at_once | {"ran": [], "human": "Zoe"} | different


WIDE = {"context_window": 100_000}
FLOOD, HELLO_ON = "Words" * 1_000, Reply(calls=[HELLO, *SEARCH_ON.calls])
FLOODED: Body = {"asked": 2, "config": {"context_window": 200_000}, "corrections": ["cut"], "thoughts": [FLOOD * 20]}
FINISHES = {"length": "length", "error": "broken", "content_filter": "filtered"}
LAST_STEP: Body = {"config": {"max_steps": 1}, "end": "max_steps", "human": "Zoe\nName: Zoe"}
ONCE, LATER = "Once upon a", "Once upon a time"
HALF_CALL = ("send_message", f'{{"message": "{ONCE}')
HALF_TEXT = f'{{"name": "send_message", "arguments": {HALF_CALL[1]}'
PLAIN, DOWN = "broken plain_text", "model_unavailable"
HALVES: dict[str, tuple[str, str, Reply]] = {  # corrections, the code of a retry, and the answer that breaks off
    "text, length": ("length plain_text", "bad_output", Reply(ONCE, finish="length")),
    "text, filtered": ("filtered plain_text", "model_refused", Reply(ONCE, finish="content_filter")),
    "text, error": (PLAIN, DOWN, Reply(ONCE, finish="error")),
    "text, a reset": (PLAIN, DOWN, Reply(f"<think>Hm.</think>{LATER}", chunk=29, cut_after=2)),
    "text, an error": (PLAIN, DOWN, Reply(LATER, chunk=11, error_in_stream={"message": "oh"})),
    "text, a stall": (PLAIN, "model_timeout", Reply(LATER, chunk=11, stall_after=2)),
    "a call, a reset": ("broken", DOWN, Reply(calls=[HALF_CALL], chunk=99, cut_after=3)),
    "a call, MAX_TOKENS": ("length", "bad_output", Reply(calls=[HALF_CALL], finish="MAX_TOKENS")),
    "a call as text": ("length", "bad_output", Reply(HALF_TEXT, finish="length")),
    "a call after a whole one": ("length", "bad_output", Reply(calls=[APPEND, HALF_CALL], finish="length")),
}
OUTCOMES = {
    "as it should be, and not counted": outcome(Reply(calls=[HELLO], usage=None)),
    "thoughts in tags": outcome(Reply("<think>A greeting.</think>\n\nHello!"), corrections=["plain_text"]),
    "reasoning": outcome(Reply("Hello!", reasoning="A greeting."), corrections=["plain_text"]),
    "a call as text": outcome(Reply("I greet.\n", calls=[HELLO], calls_as_text=True), corrections=["text_call"]),
    "a name with a prefix": outcome(Reply(calls=[("functions.send_message", HELLO[1])]), corrections=["tool_name"]),
    "too many arguments": outcome(Reply(calls=[(HELLO[0], HELLO[1] | {"mood": 1})]), corrections=["arguments"]),
    "a long id": outcome(Reply(calls=[HELLO], call_ids=["x" * 2_000])),
    "no id": outcome(Reply(calls=[HELLO], call_ids=[None])),
    "words without end": outcome(HELLO_ON, Reply(FLOOD, endless=True, chunk=5_000), **FLOODED),
    "thoughts without end": outcome(HELLO_ON, Reply(reasoning=FLOOD, endless=True, chunk=5_000), **FLOODED),
    "refused options": outcome(config={"settings": OPTIONS}, refuse={"stream_options", *OPTIONS}, asked=5,
                               retries=[("model_refused", 1, 1, 0)] * 4),
    # A heartbeat that was asked for, a failed call and a missing reply wake the agent again, with the reason.
    "a heartbeat": outcome(HELLO_ON, asked=2, replies=BOTH, heartbeats=[ASKED_FOR]),
    "a heartbeat as text": outcome(Reply(calls=[HELLO, AS_TEXT]), asked=2, replies=BOTH, heartbeats=[ASKED_FOR]),
    "a failed call": outcome(Reply(calls=[HELLO, WRONG[0]]), asked=2, replies=BOTH, heartbeats=[AFTER_FAILURE]),
    "no reply yet": outcome(Reply(calls=[APPEND]), asked=2, human="Zoe\nName: Zoe", heartbeats=[NO_REPLY]),
    "a reply, and none asked for": outcome(Reply(calls=[SEARCH, APPEND, HELLO]), human="Zoe\nName: Zoe", heartbeats=[]),
    # Where nobody waits for a reply, plain text is monologue.
    "a timer": outcome(Reply("Hm."), reason=TIMER, replies=[], heartbeats=[TIMER], thoughts=["Hm."]),
    "a wake": outcome(Reply("Hm."), reason=WAKE, replies=[], heartbeats=[WAKE], thoughts=["Hm."]),
    "a wake and a reply": outcome(reason=WAKE, heartbeats=[WAKE]),
    # What somebody pasted and the model repeats among words runs nothing.
    "markup alone": outcome(Reply(f"<think>3?</think>{COUNT}<|im_end|>"), asked=2, ran=[3], corrections=["text_call"]),
    "markup after words": outcome(Reply(f"You wrote {COUNT}"), **MENDED),
    "markup before words": outcome(Reply(f"{COUNT}\nThat is what you wrote."), **MENDED),
    "JSON before words": outcome(Reply(f"{COUNT[11:-12]} is what you wrote."), **MENDED),
    "markup beside a memory tool's": outcome(Reply(f"Look: {GREETING}{COUNT}"), **MENDED),
    "quoted markup": outcome(Reply(f"Say `{COUNT}`."), replies=[f"Say `{COUNT}`."], corrections=["plain_text"]),
    # What cannot be read is asked for once more.
    "nothing": outcome(Reply(), **MENDED),
    "an edit that is cut": outcome(Reply(calls=[("core_memory_replace", CUT)]), **MENDED),
    "a call before one that is cut": outcome(Reply(calls=[APPEND, ("count", '{"number": 1')], finish="stop"), **MENDED),
    "a call as text that is cut": outcome(Reply(GREETING[11:-15]), **MENDED),
    "nothing, twice": outcome(Reply(), Reply(), **FAILED, **MENDED),
    "an edit that is cut, twice": outcome(*[Reply(calls=[("core_memory_replace", CUT)])] * 2, **FAILED, **MENDED),
    "an edit alone, at first": outcome(Reply(calls=[NOTE]), verify=True, **MENDED),
    "an edit and a reply, at first": outcome(Reply(calls=[HELLO, NOTE]), Reply("Noted."), verify=True, asked=2,
                                             human="Zoe\nName: Zoe"),
    "thoughts up to max_tokens": outcome(*[Reply(reasoning="Hm.", finish="length")] * 2, **THOUGHT_ONLY),
    "thoughts in tags up to max_tokens": outcome(*[Reply("<think>Hm.", finish="max_tokens")] * 2, **THOUGHT_ONLY),
    "unseen thoughts": outcome(*[Reply(finish="length", usage={"completion_tokens": 99})] * 2, **THOUGHT_ONLY),
    "thoughts to their own end": outcome(*[Reply(reasoning="Hm.")] * 2, **THOUGHT_ONLY),
    # What a second attempt may mend gets two more, after the pause that was asked for; what none can mend gets none.
    "429 and 503": outcome(*PAUSES, asked=3, retries=PAUSED),
    "503 three times": outcome(BUSY, BUSY, BUSY, end="model_unavailable", asked=3, replies=[], retries=TWICE),
    "429 for long": outcome(Reply(status=429, headers={"Retry-After": "100"}), end="model_rate_limit", replies=[]),
    "503 for long": outcome(Reply(status=503, headers={"Retry-After": "100"}), end="model_unavailable", replies=[]),
    "401": outcome(Reply(status=401), end="model_auth", replies=[]),
    "a refusal": outcome(Reply(refusal="I can't help."), end="model_refused", replies=[], says="I can't help"),
    "its words": outcome(Reply(status=400, body={"error": WORDS}), end="model_refused", replies=[], says=WORDS),
    "nothing to cut": outcome(Reply(status=400, body={"error": LONG}), end="context_overflow", replies=[], says=LONG),
    # Limits of a turn; what is done is done, also by a call that is made for the third time.
    "repeated_call": outcome(*[SEARCH_ON] * 3, end="repeated_call", asked=3, replies=[]),
    "repeated, and a reply": outcome(SEARCH_ON, SEARCH_ON, Reply(calls=[SEARCH, HELLO]), asked=3),
    "max_steps": outcome(*[another_search] * 5, config={"max_steps": 5}, end="max_steps", asked=5, replies=[]),
    "max_steps by default": outcome(*[another_search] * 20, config=WIDE, end="max_steps", asked=20, replies=[]),
    "words of the last step": outcome(Reply("I noted it.", calls=[APPEND]), replies=["I noted it."],
                                      corrections=["no_reply"], **LAST_STEP),
    "budget": outcome(dear_search, dear_search, end="budget", asked=2, replies=[]),
    "three failures": outcome(*(Reply(calls=[call]) for call in WRONG[:3]), **FAILED, asked=3, says=UNKNOWN),
    "three failures in a step": outcome(Reply(calls=[*WRONG[:3], APPEND, HELLO]), **FAILED, says=UNKNOWN),
    "two failures, twice": outcome(*(Reply(calls=[call]) for call in (*WRONG[:2], NOTE, *WRONG[2:])),
                                   asked=6, human="Zoe\nName: Zoe"),
}  # fmt: skip
for name, (mended, code, answer) in HALVES.items():
    # It is asked for again; where no try brings more, what was said is told as partial, and why.
    of = 1 if code == "bad_output" else 2
    again = [(code, attempt, of, 0) for attempt in range(1, of + 1)]
    half: Body = {"replies": [ONCE], "partial": [ONCE], "corrections": mended.split(), "retries": again}
    half |= {"end": code if "broken" in mended else "done", "human": "Zoe" + "\nName: Zoe" * (APPEND in answer.calls)}
    OUTCOMES[f"half of {name}"] = outcome(answer, asked=2, retries=again[:1])
    OUTCOMES[f"half of {name}, ever"] = outcome(*[answer] * (of + 1), asked=of + 1, **half)
for finish, fault in FINISHES.items():
    # A call that is whole before an answer breaks off says all that it says; text that stands in for one is partial.
    half = {"replies": [ONCE], "partial": [ONCE], "corrections": [fault, "no_reply"]}
    OUTCOMES[f"a whole call, {finish}"] = outcome(Reply(calls=[HELLO], finish=finish), corrections=[fault])
    OUTCOMES[f"no reply, {finish}"] = outcome(Reply(ONCE, calls=[NOTE], finish=finish), **LAST_STEP, **half)


@pytest.mark.parametrize("tools", [[count]], ids=[""])
@pytest.mark.parametrize(("answers", "expected"), OUTCOMES.values(), ids=OUTCOMES)
async def test_what_comes_of_an_answer(
    lab: Lab, caplog: Log, monkeypatch: Patch, answers: Sequence[Answer], expected: Body
) -> None:
    """What can be read reaches the user, once; what cannot runs nothing; each correction is told, and talk goes on."""
    ran.clear()
    monkeypatch.setattr(memws, "RETRY_PAUSE", 0.0)
    expected, endpoint = dict(expected), lab.endpoint
    endpoint.refuse, words = expected.pop("refuse", set()), expected.pop("says", "")
    agent = await lab.create(human="Zoe", **expected.pop("config", {}))
    lab.models.endpoint.idle_timeout = 0.05 if "stall_after=2" in str(answers) else 30.0
    reason, verify = expected.pop("reason", ""), expected.pop("verify", False)
    turn = await lab.say(agent, None if reason else "Hi", *answers, reason=reason, verify=verify)
    said, retries, failure = turn.of("assistant_message"), turn.of("retry"), turn.end.get("message", "")
    seen = {
        "end": turn.end.get("code", turn.stop_reason), "asked": len(endpoint.requests), "replies": turn.replies,
        "partial": [frame["message"] for frame in said if frame.get("partial")], "corrections": turn.corrections,
        "retries": [(frame["code"], frame["attempt"], frame["of"], frame["delay_ms"]) for frame in retries],
        "ran": ran, "human": agent.blocks["human"].value, "heartbeats": turn.texts("heartbeat"),
        "thoughts": turn.texts("internal_monologue"),
    }  # fmt: skip
    assert seen == {"heartbeats": seen["heartbeats"], "thoughts": seen["thoughts"]} | expected
    assert re.search(words, failure)
    assert turn.end["type"] == ("agent_response_error" if failure else "agent_response_end")
    assert turn.end["usage"]["model_calls"] == seen["asked"]
    alerts = str(packed(endpoint.requests[-1], "system_alert"))
    assert alerts.count("last answer could not be used") == str(retries).count("bad_output")
    assert [event["reason"] for event in packed(endpoint.requests[-1], "heartbeat")] == seen["heartbeats"]
    assert bool(packed(endpoint.requests[-1], "login")) == (reason == "")
    got = await sent_for(agent, "turn-1", max(event.get("step", 1) for event in turn.events))
    assert memws.encode_json(got["request"]).encode() == endpoint.bodies[-1]
    assert ONCE not in endpoint.bodies[-1].decode(), "what was broken leaves no trace"
    if failure and not (turn.replies or turn.of("tool_return")):
        assert (got["response"]["error"], failure in caplog.text) == ({"code": seen["end"], "message": failure}, True)
    assert not re.search("Hello!|think>|tool_call>", str(seen["thoughts"]))
    assert ("tool_call>" in "".join(turn.texts("delta"))) == ("tool_call>" in str(turn.replies))
    assert await recalled(lab, agent, str(turn.replies or "Hello!")) == turn.replies
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]
    texts = [message["message"] for message in packed(endpoint.requests[-1], "user_message")]
    assert texts == ["Hi", "Again"][bool(reason) :]
    assert all(reply.split("`")[0] in str(endpoint.requests[-1]) for reply in turn.replies), "it knows its words"
    assert packed(endpoint.requests[-1], "system_alert") == []


async def test_a_fault_of_ours_ends_its_turn_alone(lab: Lab, agent: Agent, monkeypatch: Patch, caplog: Log) -> None:
    """What nobody foresaw is logged with its traceback and ends the turn as internal; the next turn works."""
    with monkeypatch.context() as patch:
        patch.setattr(agent.model, "stream", lambda body: {}["a fault"])
        turn = await lab.say(agent, "Hi")
    assert (turn.end["code"], turn.stop_reason, "a fault" in str(turn.end)) == ("internal", "error", False)
    assert "KeyError: 'a fault'" in caplog.text
    assert (await lab.say(await lab.open(), "Again")).replies == ["Hello!"]


FLOODS: dict[str, tuple[Reply, int, int]] = {
    "plain text": (Reply(FLOOD), 100_000, 0),
    "a message": (Reply("Hi.", calls=[("send_message", '{"message": "' + FLOOD)]), 95_000, 0),
    "a message as text": (Reply('{"name": "send_message", "arguments": {"message": "' + FLOOD), 95_000, 0),
    "a message after a call": (Reply(calls=[APPEND, ("send_message", '{"message": "' + FLOOD)]), 95_000, 1),
    "an edit after words": (Reply("Hi.", calls=[("core_memory_append", CUT.replace("new_c", "c") + FLOOD)]), 3, 0),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "least", "edits"), FLOODS.values(), ids=FLOODS)
async def test_a_reply_without_end_is_cut(endpoint: Endpoint, lab: Lab, answer: Reply, least: int, edits: int) -> None:
    """At 100,000 characters the stream is closed, what was said is partial, a cut call never runs, talk goes on."""
    endless = Reply(**vars(answer) | {"endless": True, "chunk": 5_000})
    for window in (200_000, 8_192):
        agent = await lab.create(f"sam{window}", context_window=window)
        endpoint.context_window, count = window, len(endpoint.requests)
        turn = await lab.say(agent, "Tell me everything", endless)
        (said,) = turn.of("assistant_message")[:1]
        assert (said["partial"], turn.stop_reason) == (True, "done")
        assert least <= len(said["message"]) <= 100_000
        assert "cut" in turn.corrections
        assert (agent.blocks["human"].value, turn.texts("retry")) == ("Name: Zoe" * edits, [])
        asked = len(endpoint.requests) - count, [frame["name"] for frame in turn.of("tool_call")]
        assert window == 8_192 or asked == (1, ["core_memory_append"] * edits)
        assert all(len(memws.encode_json(frame).encode()) < memws.MAX_FRAME for frame in turn.events)
        assert (await lab.say(agent, "Go on")).replies[:1] == ["Hello!"]
        if "send_message" in dict(answer.calls) and window == 200_000:
            cut = "Failed: the model's answer was cut at 100,000 characters: "
            assert results(endpoint.requests[-1])[-1].startswith(cut)


def test_a_first_message_has_to_be_sent(online: Callable[..., Any], endpoint: Endpoint) -> None:
    """run_step's first_message asks again once where send_message is not called; no_verify and other turns do not."""
    server, first = online(), {"first_message": True}
    server.create_new_agent({"name": "sam"})
    for options, calls in (({}, 1), (first, 2), (first | {"no_verify": True}, 1)):
        endpoint.script(*[Reply("Hello?")] * calls)
        count, told = len(endpoint.requests), Told(server.run_step("Hi", **options))
        assert (told.replies, told.corrections, len(endpoint.requests) - count) == (["Hello?"], ["plain_text"], calls)


async def test_a_failing_turn_makes_at_most_eight_calls(endpoint: Endpoint, lab: Lab) -> None:
    """Overflows, broken connections and unreadable answers together never make more than eight calls in a turn."""
    for failures in ([OVERFLOW] * 3 + [BUSY, BUSY, Reply()], [BUSY, BUSY, OVERFLOW, OVERFLOW, Reply()], [OVERFLOW] * 9):
        agent = await lab.create(f"sam{len(endpoint.requests)}")
        for _ in range(40):
            await lab.say(agent, "word " * 10)
        count, answers = len(endpoint.requests), iter([*failures, *[BUSY] * 20])
        endpoint.default = lambda body, answers=answers: Reply("A summary.") if is_summary(body) else next(answers)
        turn = await lab.say(agent, "Hi")
        assert turn.stop_reason == "error"
        assert turn.end["usage"]["model_calls"] == len(endpoint.requests) - count <= 8
        endpoint.default = greet
        assert (await lab.say(agent, "Again")).replies == ["Hello!"]


@pytest.mark.parametrize("size", [0, 2_000])
async def test_the_agent_is_warned_once_before_the_window_is_full(endpoint: Endpoint, lab: Lab, size: int) -> None:
    """At 75 % of the window the model is told once to save what matters; a window that is too small is refused."""
    endpoint.context_window = 3_000
    agent = await lab.create(context_window=3_000, persona="p" * size, human="h" * size)
    config, tools = agent.record.config, agent.tools
    memws.check_window(config, 0, tools, agent.blocks.values())
    with pytest.raises(memws.Refused, match=r"1,000 .* too few.* \d,\d{3}$"):
        memws.check_window(config | {"context_window": 1_000}, 0, tools, agent.blocks.values())
    warned, compacted, share = list[int](), list[int](), 0.0
    for number in range(40 if size else 100):
        turn = await lab.say(agent, f"Message {number}. " + "word " * 20)
        assert (turn.replies[0], turn.stop_reason) == ("Hello!", "done")
        compacted += [number] * bool(turn.of("compaction"))
        for frame in turn.of("context"):
            before, share = share, frame["used"] / frame["window"]
            if "warning" in frame:
                warned.append(number)
                alerts = [alert["message"] for alert in packed(endpoint.requests[-1], "system_alert")]
                assert (share > 0.75, memws.PRESSURE_WARNING in alerts, size > 0 or before <= 0.75) == (True,) * 3
        if compacted and not size:
            break
    assert (len(warned), compacted[0] > warned[0]) == (len(set(warned)), True)
    assert (len(warned), agent.record.state["warned"]) == (1, False) or size, "then it may be warned again"


async def test_a_larger_window_is_warned_of_anew(lab: Lab) -> None:
    """The agent is warned again where the window was less full in between."""
    agent, warned = await lab.create(context_window=3_000), 0
    for window in (3_000, 5_000):
        async with memws.Transaction(agent.memory) as change:
            change.config = change.config | {"context_window": window}
        for _ in range(60):
            if agent.used() < 0.76 * window:
                warned += sum("warning" in frame for frame in (await lab.say(agent, "word " * 40)).of("context"))
    assert warned == 2


async def test_a_long_conversation_in_a_small_window(endpoint: Endpoint, lab: Lab) -> None:
    """Over 150 turns in 3,000 tokens each compaction makes the real prompt smaller; summaries carry on, facts stay."""
    endpoint.context_window = 3_000
    count = itertools.count(1)
    endpoint.default = lambda body: Reply(f"Summary {next(count)}") if is_summary(body) else greet(body)
    agent = await lab.create(context_window=3_000)
    compactions: list[Body] = []
    for number in range(150):
        sizes = len(endpoint.requests)
        turn = await lab.say(agent, f"The code of locker {number} is {number * 7919 % 10_000:04}. " + "Really. " * 8)
        assert (turn.replies[0], turn.stop_reason) == ("Hello!", "done")
        compactions += turn.of("compaction")
        if turn.of("compaction"):
            tokens = [sum(prompt_tokens(body)) for body in endpoint.requests[sizes - 1 :] if not is_summary(body)]
            assert min(tokens[1:]) < tokens[0], "the real prompt is smaller than the last one"
    assert len(compactions) >= 4
    for number, frame in enumerate(compactions, 1):
        assert frame["tokens_after"] < frame["tokens_before"]
        assert frame["messages_after"] < frame["messages_before"]
        assert frame["summary"] == f"Summary {number}"
    asked = [body for body in endpoint.requests if is_summary(body)]
    assert "The code of locker 0 is 0000." in asked[0]["messages"][1]["content"]
    for number, body in enumerate(asked[1:], 1):
        assert ("tools" in body, len(body["messages"])) == (False, 2)
        assert f"Summary of what came before: Summary {number}" in body["messages"][1]["content"]
    assert max(sum(prompt_tokens(body)) for body in endpoint.requests) <= 3_000
    agent = await lab.open()
    await lab.say(agent, "What was it?", Reply(calls=[("conversation_search", {"query": "code of locker 3"})]))
    assert "The code of locker 3 is 3757." in results(endpoint.requests[-1])[-1]
    (alert, *_) = packed(endpoint.requests[-1], "system_alert")
    told = r"prior messages \((\d+) of (\d+)\).*conversation_search finds what was said in them.*Summary (\d+)$"
    found = re.search(told, alert["message"], re.DOTALL)
    assert found
    assert (int(found[1]), int(found[3])) == (agent.memory.messages[0].id - 1, len(compactions))


async def test_a_compaction_by_request(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """It makes the prompt smaller or is context_overflow; a summary is bounded, the last words stand in for none."""
    with pytest.raises(memws.ModelError) as caught:
        await compact(agent)
    assert caught.value.code == "context_overflow"
    thoughts, long = f"<think>{'Hm. ' * 900}</think>\n\nZoe counts messages.", "long " * 5_000
    searches = [("conversation_search", {"query": f"{number}"}) for number in range(9)]
    answers = [(Reply(long), "long"), (Reply(thoughts), "Zoe counts messages."), (OVERFLOW, "Message")]
    answers += [(Reply(FLOOD, endless=True, chunk=5_000), "WordsWords")]
    failed = [Reply(), Reply("x", cut_after=1), Reply(refusal="I won't."), Reply(calls=[HELLO])]
    answers += [(answer, "Message") for answer in failed]
    for answer, summary in answers:
        for number in range(3):
            endpoint.script(*[Reply(calls=searches)] * (number > 1))
            await lab.say(agent, f"Message {number}. " + "word " * 100, speaker="Ada")
        before, seq = agent.used(), agent.record.last_seq
        endpoint.script(answer)
        event = await compact(agent)
        assert (event["message_type"], event["seq"], event.get("turn_id")) == ("compaction", seq + 1, None)
        assert event["tokens_before"] == before > event["tokens_after"] == agent.used()
        assert (summary in event["summary"], len(event["summary"]) < 2 * memws.SUMMARY_LIMIT) == (True, True)
        asked = [body["messages"][1]["content"] for body in endpoint.requests if is_summary(body)]
        assert re.search(r"user Ada \(\S+ \S+\): Message 2\.", asked[-1])
        await lab.check_stored(agent)
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]


async def test_an_overflow_that_only_the_endpoint_sees(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """A refusal by an endpoint with a smaller window leads to compactions; where nothing is left to cut to an error."""
    while sum(prompt_tokens(endpoint.requests[-1])) < 2_000 if endpoint.requests else True:
        await lab.say(agent, "word " * 40)
    endpoint.context_window = 1_700
    for text in ("One", "Two", "Three"):
        turn = await lab.say(agent, text)
        assert (turn.replies, turn.stop_reason) == (["Hello!"], "done")
        assert all(frame["tokens_after"] < frame["tokens_before"] for frame in turn.of("compaction"))
    assert sum(prompt_tokens(endpoint.requests[-1])) <= 1_700
    assert sent(endpoint.requests[-1])[-1]["content"]["message"] == "Three"
    endpoint.context_window, count = 100, len(endpoint.requests)
    turn = await lab.say(agent, "Hi")
    assert (turn.end["code"], turn.stop_reason) == ("context_overflow", "error")
    assert len(endpoint.requests) - count <= 8
    endpoint.context_window = None
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_a_window_that_the_endpoint_tells(endpoint: Endpoint, lab: Lab) -> None:
    """It is learned for all agents of the model with a larger one; no prompt that was too long is sent again."""
    windows = {"a": 16_000, "b": 3_900, "c": None}
    agents = [await lab.create(name, context_window=window) for name, window in windows.items()]
    for number in range(4):
        await lab.say(agents[0], f"{number} " + "word " * 99)
    answer = Reply(error_in_stream={"code": 400, "message": "This model's maximum context length is 4096 tokens."})
    turn = await lab.say(agents[0], "Hi", answer, Reply("They talked."))
    assert (turn.replies, len(turn.of("compaction")), turn.of("context")[-1]["window"]) == (["Hello!"], 1, 4_096)
    assert len(set(endpoint.bodies)) == len(endpoint.bodies)
    assert [each.window for each in agents] == [4_096, 3_900, 4_096]
    await lab.say(agents[1], "Hi", Reply(status=400, body={"error": "prompt is too long: 5 tokens > 1500 maximum"}))
    assert [each.window for each in agents] == [16_000, 3_900, 8_192], "what the prompt does not fit into is no window"


@pytest.mark.parametrize("seconds", [6.0, 60.0, 70.0])
async def test_a_model_that_loads_is_waited_for(
    endpoint: Endpoint, lab: Lab, agent: Agent, monkeypatch: Patch, seconds: float
) -> None:
    """Up to a minute, each pause told as a retry; that counts as no call; then the endpoint's words end the turn."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(delay: float) -> None:
        pauses.append(delay)
        await sleep(0)

    def answer(body: Body) -> Reply:
        loading = {"error": {"message": "Loading model", "code": 503}}
        return Reply(status=503, body=loading) if sum(pauses) < seconds else greet(body)

    monkeypatch.setattr(memws.asyncio, "sleep", pause)
    endpoint.default = answer
    turn = await lab.say(agent, "Hi")
    assert [frame["delay_ms"] for frame in turn.of("retry")] == [pause * 1000 for pause in pauses if pause]
    if seconds > memws.LOADING_PATIENCE:
        assert ("Loading model" in turn.end["message"], turn.end["code"]) == (True, "model_unavailable")
    else:
        assert (turn.replies, turn.end["usage"]["model_calls"]) == (["Hello!"], 1)
        assert turn.end["usage"].items() >= agent.memory.tokens.items(), "nor in the agent's totals"


async def test_what_fills_the_window_alone(endpoint: Endpoint) -> None:
    """What is longer than the window is shown in part, kept whole, and quoted by the summary where it waits."""

    def flood(number: int) -> str:
        return f"{number} words; " * 100

    async with Lab(endpoint, tools=[flood]) as lab:
        endpoint.context_window = 3_000
        agent, text = await lab.create(context_window=3_000), "start " + "word " * 12_000 + "end"
        for _ in range(2):
            assert (await lab.say(agent, text)).replies[0] == "Hello!"
        stored = await lab.store.read(memws.read_messages, agent.record.id)
        assert [message.text for message in stored if message.role == "user"] == [text] * 2
        shown = packed(endpoint.requests[-1], "user_message")[-1]["message"]
        assert (shown[:6], shown[-3:], "characters left out here" in shown) == ("start ", "end", True)
        for first in (0, 9):
            endpoint.script(Reply(calls=[("flood", {"number": first + number}) for number in range(8)]))
        turn = await lab.say(agent, "What is the magic word?", speaker="Ada")
        assert (turn.replies[:1], turn.stop_reason, bool(turn.of("compaction"))) == (["Hello!"], "done", True)
        assert f"Ada speaks. {memws.WAITING_NOTE}What is the magic word?" in endpoint.bodies[-1].decode()


async def test_a_compaction_names_what_waits(endpoint: Endpoint, lab: Lab) -> None:
    """Of what was said in a turn, that which left the view and has no answer yet."""
    agent, turn, asked = await lab.create(context_window=3_000), lab.turn("First?"), itertools.count()

    def answer(body: Body) -> Reply:
        number = next(asked)
        if number == 0:
            turn.steered.append(memws.Turn("steered", "Second?", speaker="Ada"))
            return Reply(calls=[HELLO])
        long = beat("conversation_search", query=f"{number}" + " word" * 150)
        if is_summary(body):
            return Reply("They met.")
        return greet(body) if agent.record.state["summary"] else Reply(calls=[long])

    endpoint.default = answer
    (frame, *_) = (await lab.run(agent, turn)).of("compaction")
    assert frame["summary"] == f"They met.\nAda speaks. {memws.WAITING_NOTE}Second?"


async def test_an_endpoint_that_cuts_prompts_silently_is_noticed(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """Usage far under what was sent, twice, gives a warning that names --context-window; an honest count ends it."""
    cut = {"prompt_tokens": 300, "completion_tokens": 5}
    warnings = []
    for usage in (cut, cut, cut, "auto"):
        (frame,) = (await lab.say(agent, "Hi", Reply(calls=[HELLO], usage=usage))).of("context")
        warnings.append("--context-window" in frame.get("warning", ""))
    assert warnings == [False, True, True, False]


async def test_estimates_are_calibrated_within_bounds(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """Sections add up to what is used; the endpoint's counts pull the estimate, from half to twice at most."""
    for _ in range(3):
        (frame,) = (await lab.say(agent, "Hi")).of("context")
    usage = (await lab.say(agent, "Hi", Reply(calls=[HELLO], usage=None))).end["usage"]
    assert (usage["estimated"], usage["output_tokens"] > 0) == (True, True)
    assert 0.5 < usage["input_tokens"] / sum(prompt_tokens(endpoint.requests[-1])) < 2
    names = ["system", "tools", "core_memory", "summary", "messages"]
    assert ([section["name"] for section in frame["sections"]], frame["window"]) == (names, 8_192)
    assert abs(sum(section["tokens"] for section in frame["sections"]) - frame["used"]) <= 10
    await lab.say(agent, "Hi")
    assert 0.8 < frame["used"] / sum(prompt_tokens(endpoint.requests[-1])) < 1.25
    for counted, low, high in ((10, 0.5, 0.75), (1_000_000, 1.5, 2.0)):
        endpoint.default = Reply(calls=[HELLO], usage={"prompt_tokens": counted, "completion_tokens": 1})
        for _ in range(10):
            await lab.say(agent, "Hi")
        tools = next(section["tokens"] for section in agent.context([]) if section["name"] == "tools")
        specs = sum(memws.estimate_tokens(tool.spec) for tool in agent.tools.values())
        assert low <= agent.ratio <= high
        assert low - 0.01 <= tools / specs <= high + 0.01, "the sizes told are calibrated"


async def test_what_is_taken_back_does_not_enter(lab: Lab, agent: Agent) -> None:
    """A text that was to enter a turn is taken back while a step is stored: nobody hears of it."""
    turn, tasks = lab.turn("Hi"), list[asyncio.Task[None]]()
    turn.steered.append(memws.Turn("steered", "Forget this"))

    async def take_back() -> None:
        async with agent.memory.lock:
            turn.steered.clear()

    def hear(event: Body) -> None:
        if event.get("message_type") == "delta":  # then the step waits for the store only, and has the lock
            turn.steered[:] = [memws.Turn("late", "Forget this, too")]
            tasks.append(asyncio.create_task(take_back()))

    told = await lab.run(agent, turn, hear)
    await asyncio.gather(*tasks)
    assert (told.texts("user_message"), bool(tasks)) == (["Hi", "Forget this"], True)


async def cancel(lab: Lab, agent: Agent, when: int | Callable[[Body], bool], text: str = "Hi") -> Told:
    """Run a turn and stop it from another task, as a session does: at such an event, or when a request has arrived."""
    turn, told = lab.turn(text), asyncio.Event()

    async def stop() -> None:
        await (asyncio.to_thread(lab.endpoint.wait_requests, when) if isinstance(when, int) else told.wait())
        for reason in ("cancelled", "superseded"):
            turn.stop(reason)  # the first one counts

    stopping = asyncio.create_task(stop())
    happens = (lambda event: False) if isinstance(when, int) else when
    result = await lab.run(agent, turn, lambda event: told.set() if happens(event) else None)
    await stopping
    turn.stop("too late")
    return result


async def check_goes_on(lab: Lab, agent: Agent) -> None:
    """The next plain turn works, here and for a server that has just started, and knows what was said."""
    assert (await lab.say(agent, "And now?")).replies == ["Hello!"]
    texts = [message["message"] for message in packed(lab.endpoint.requests[-1], "user_message")]
    assert texts == ["Hi", "And now?"]
    reopened = await lab.open()
    assert reopened.repairs == []
    assert (await lab.say(reopened, "Still there?")).replies == ["Hello!"]


def at(**fields: Any) -> Callable[[Body], bool]:
    return lambda event: event | fields == event


STORY = ("send_message", {"message": "Once upon a time"})
PARTIAL = ["internal_monologue", "assistant_message", "tool_return", "function_message"]
BREAKS: dict[str, tuple[Reply, int | Callable[[Body], bool], list[str]]] = {
    "before the first word": (Reply(hold=True), 1, []),
    "in a message": (Reply("I think.", calls=[STORY], stall_after=7), at(of="assistant_message"), PARTIAL),
    "in plain text": (Reply("Once upon a time", stall_after=2), at(message_type="delta"), PARTIAL[:1]),
    "in an edit": (Reply("I note it.", calls=[APPEND], stall_after=6), at(message_type="delta"), PARTIAL[:1]),
    "in a pause": (Reply(status=429, headers={"Retry-After": "29"}), at(message_type="retry"), []),
}


@pytest.mark.parametrize(("answer", "when", "kinds"), BREAKS.values(), ids=BREAKS)
async def test_cancel_while_the_model_answers(
    endpoint: Endpoint, lab: Lab, agent: Agent, answer: Reply, when: Any, kinds: list[str]
) -> None:
    """A turn ends at once wherever its model is; what the user has seen is kept as partial, a cut call never runs."""
    endpoint.script(answer)
    turn = await cancel(lab, agent, when)
    assert (turn.end["type"], turn.stop_reason) == ("agent_response_end", "cancelled")
    assert turn.kinds == ["user_message", *kinds]
    assert (agent.blocks["human"].value, len(endpoint.requests)) == ("", 1)
    await check_goes_on(lab, agent)
    for reply in turn.of("assistant_message"):
        assert (reply["partial"], STORY[1]["message"].startswith(reply["message"])) == (True, True)
        (said,) = (call for message in endpoint.requests[1]["messages"] for call in message.get("tool_calls", ()))
        assert json.loads(said["function"]["arguments"]) == {"message": reply["message"]}
        assert results(endpoint.requests[1]) == ["Failed: cancelled: the user has seen only this much"]
        assert await recalled(lab, agent, reply["message"]) == [reply["message"], "Hello!", "Hello!"]
    assert ("Once upo" in endpoint.bodies[1].decode()) == ("Once" in str(answer))


@pytest.mark.parametrize("blocking", [False, True])
async def test_cancel_in_a_tool(endpoint: Endpoint, blocking: bool) -> None:
    """An async tool is cancelled, a sync one goes on and its result is dropped; what came before it is done."""
    release, ended, calls = threading.Event(), threading.Event(), []

    async def wait() -> None:
        calls.append(1)
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    def work() -> str:
        calls.append(1)
        release.wait(20)
        ended.set()
        return "too late"

    tool: Callable[..., Any] = work if blocking else wait
    async with Lab(endpoint, tools=[tool]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[APPEND, (tool.__name__, {}), HELLO]))
        turn = await cancel(lab, agent, at(message=f"Running {tool.__name__}({{}})"))
        assert (turn.stop_reason, turn.replies, ended.is_set()) == ("cancelled", [], not blocking)
        assert turn.texts("tool_return") == ["None", "cancelled: result unknown", "cancelled before it ran"]
        release.set()
        assert await asyncio.to_thread(ended.wait, 10)
        await check_goes_on(lab, agent)
        assert (calls, agent.blocks["human"].value) == ([1], "Name: Zoe")
        assert "too late" not in endpoint.bodies[-1].decode()


async def test_cancel_while_the_summary_is_made(endpoint: Endpoint, lab: Lab) -> None:
    """A turn or a compaction by request that is stopped in its summary ends without it; the next one compacts."""
    endpoint.default = lambda body: Reply(hold=True) if is_summary(body) else greet(body)
    agent = await lab.create(context_window=4_000)
    while agent.used() + memws.MIN_REPLY_TOKENS <= agent.window - 150:
        await lab.say(agent, "word " * 30)
    before, request, events = agent.used(), memws.Turn("", None), list[str]()
    agent.memory.emit = lambda *stored: events.extend(event.text for event in stored)
    compacting = asyncio.create_task(agent.compact(request))
    await asyncio.to_thread(endpoint.wait_requests, len(endpoint.requests) + 1)
    request.stop("cancelled")
    with pytest.raises(memws.Stopped):
        await compacting
    assert (agent.used(), events) == (before, [])
    await lab.check_stored(agent)
    turn = await cancel(lab, agent, len(endpoint.requests) + 1, "word " * 200)
    assert is_summary(endpoint.requests[-1])
    assert (turn.stop_reason, turn.of("compaction")) == ("cancelled", [])
    endpoint.default = greet
    turn = await lab.say(agent, "And now?")
    assert (turn.replies, len(turn.of("compaction"))) == (["Hello!"], 1)


@pytest.mark.parametrize("kind", ["user_message", "context"])
async def test_cancel_between_two_waits(endpoint: Endpoint, lab: Lab, agent: Agent, kind: str) -> None:
    """A stop that meets the turn at no wait ends it before the next model call; what a step did stays done."""
    endpoint.script(Reply("I note it.", calls=[NOTE, HELLO]))
    turn = lab.turn("Hi")
    told = await lab.run(agent, turn, lambda event: turn.stop("cancelled") if at(message_type=kind)(event) else None)
    assert (told.stop_reason, len(endpoint.requests)) == ("cancelled", kind == "context")
    assert (agent.blocks["human"].value == "Name: Zoe") == bool(told.of("memory_change")) == (kind == "context")
    assert (await lab.say(agent, "And now?")).replies[-1:] == ["Hello!"]


async def test_a_broken_history_is_mended_and_told(endpoint: Endpoint, lab: Lab, agent: Agent) -> None:
    """A history that no endpoint would take, of whatever origin, is cut where it is broken; recall keeps it all."""
    await lab.say(agent, "My dog is called Rex")
    unpaired = {"id": "a", "type": "function", "function": {"name": "x", "arguments": "{}"}}
    bodies: list[Body] = [
        {"role": "assistant", "content": None, "tool_calls": [unpaired]},
        {"role": "user", "content": agent.memory.pack("user_message", message="Rex barks")},
        {"role": "tool", "tool_call_id": "b", "content": '{"status": "OK", "message": "x", "time": ""}'},
    ]
    first, message = agent.memory.last_message + 1, memws.ChatMessage
    made = [(number, body["role"], memws.now_text(), "", json.dumps(body)) for number, body in enumerate(bodies, first)]
    messages = [message(*values) for values in made]
    changes = memws.Changes(events=[memws.response("context", "")], messages=messages)
    await lab.store.write(memws.commit, agent.record.id, changes)
    agent = await lab.open()
    told = (await lab.events(agent))[-1]
    assert (told["message_type"], told["what"], bool(agent.repairs)) == ("correction", "history", True)
    assert (await lab.open()).repairs == []
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]
    assert (await recalled(lab, agent, "dog", "user"))[0] == "My dog is called Rex"


@pytest.mark.parametrize("where", ["model", "tool"])
async def test_an_edit_in_mid_turn(endpoint: Endpoint, where: str) -> None:
    """What is edited while a model answers or a user's tool runs stays, and the step's own edits go on top of it."""

    agent: Agent

    async def meddle() -> None:
        async with memws.Transaction(agent.memory) as change:
            change.insert("Yours")
            change.write("human", "Town: Oslo")

    async with Lab(endpoint, tools=[meddle]) as lab:
        agent = await lab.create()
        calls = [("archival_memory_insert", {"content": "Mine"}), APPEND, HELLO]
        calls = [APPEND, ("meddle", {}), *calls] if where == "tool" else calls
        endpoint.script(Reply(calls=calls, hold=where == "model"))
        turn = asyncio.create_task(lab.say(agent, "Hi"))
        await asyncio.to_thread(endpoint.wait_requests, 1)
        if where == "model":
            await meddle()
            endpoint.release()
        told = await turn
        assert (agent.blocks["human"].value, agent.memory.archival) == ("Town: Oslo\nName: Zoe", 2)
        changes = [(change["by"], change.get("id", change.get("label"))) for change in told.of("memory_change")]
        assert changes[-4:] == [("client", 1), ("client", "human"), ("agent", 2), ("agent", "human")]
        got = await sent_for(agent, "turn-1", 1)
        assert memws.encode_json(got["request"]).encode() == endpoint.bodies[0]
        assert (await lab.say(agent, "Again")).replies == ["Hello!"]


@contextlib.contextmanager
def refusing(path: Path, rows: str) -> Iterator[None]:
    """The database refuses new events of which `rows` is true, until the block ends."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        refusal = "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        database.execute(f"CREATE TRIGGER broken BEFORE INSERT ON events WHEN {rows} {refusal}")
        try:
            yield
        finally:
            database.execute("DROP TRIGGER broken")


FAILURES: dict[str, tuple[str, int, bool]] = {
    "before the tool": ("NEW.text LIKE '%Running count%'", 0, True),
    "before the tool, and for good": ("NEW.seq > 2", 0, False),
    "after the tool": ("NEW.text LIKE '%Success: 1 done%'", 1, True),
    "after the tool, and for good": ("NEW.text LIKE '%tool_return%' OR NEW.kind LIKE '%error'", 1, False),
    "at the end of the step": ("NEW.kind = 'context'", 1, True),
}


@pytest.mark.parametrize(("rows", "runs", "ends"), FAILURES.values(), ids=FAILURES)
async def test_a_store_that_fails_around_a_tool(
    endpoint: Endpoint, tmp_path: Path, rows: str, runs: int, ends: bool
) -> None:
    """A tool runs once at most, never before its call is stored; what could not be stored has not happened."""
    path = tmp_path / "memws.db"
    ran.clear()
    async with Lab(endpoint, path, tools=[count]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[("count", {"number": 1}), APPEND, HELLO]))
        work = edit(agent, asyncio.wait_for(agent.turn(turn := lab.turn("Hi")), 20))
        with refusing(path, rows), contextlib.suppress(*[] if ends else [memws.StoreFailed]):
            _, events = await work
            assert (events[-1]["code"], "seq" in events[-1], ends) == ("store_failed", True, True)
        assert (ran, turn.over, agent.memory.stale) == ([1] * runs, True, True)
        agent = await lab.open()
        assert (agent.blocks["human"].value, bool(agent.repairs)) == ("", not ends)
        assert (await lab.say(agent, "And now?")).replies == ["Hello!"]
        assert (ran, await recalled(lab, agent, "Hello!")) == ([1] * runs, ["Hello!"]), "what never ran was not said"
        assert results(endpoint.requests[-1]) == ["Failed: interrupted: result unknown"] * (3 if runs else 0)
        stored = await lab.events(agent)
        assert [event["seq"] for event in stored] == list(range(1, len(stored) + 1))
        assert sum(event["turn_id"] == "turn-1" and event["type"] in memws.TERMINAL_TYPES for event in stored) == 1


WRONG = beat("core_memory_replace", name="human", old_content="x", new_content="y")
SCENES: dict[str, tuple[Answer, str]] = {  # what the model answers, and what happens
    "a compaction": (Reply("They talked."), "compaction"),
    "a turn": (greet, "turn"),
    "a heartbeat": (greet, "heartbeat"),
    "parallel calls": (Reply("I note it.", calls=[APPEND, NOTE]), "turn"),
    "plain text": (Reply("Hello!"), "turn"),
    "a failed tool": (Reply(calls=[WRONG]), "turn"),
    "a cancel": (Reply(calls=[STORY], stall_after=6), "cancel"),
    "a crash": (Reply(hold=True), "crash"),
}
WANTS = ["alternation", "no tool role", "user after tool", "no system role", "nine-character ids", "content or calls"]
WANTS += ["two roles", "reasoning", "signatures", "known fields"]
WANTS += ["user after tool and nine-character ids and known fields"]


async def play(lab: Lab, agent: Agent, scene: str) -> None:
    answer, what = SCENES[scene]
    lab.endpoint.script(answer)
    if what == "cancel":
        await cancel(lab, agent, at(of="assistant_message"))
    elif what == "compaction":
        await compact(agent)
    elif what == "crash":  # a turn is left while its model answers, as by a server that is killed
        running, count = asyncio.create_task(agent.turn(lab.turn("Hi"))), len(lab.endpoint.requests) + 1
        await asyncio.to_thread(lab.endpoint.wait_requests, count)
        running.cancel()
        await asyncio.wait([running])
    else:
        await lab.say(agent, "Hi" if what == "turn" else None)


@pytest.mark.parametrize("moved", [False, True], ids=["its own", "another's"])
@pytest.mark.parametrize("wanted", WANTS)
async def test_what_an_endpoint_wants_is_learned_once(
    endpoint: Endpoint, tmp_path: Path, wanted: str, moved: bool
) -> None:
    """What an endpoint wants of a history, its own or another's, it refuses once at most, and all turns end well."""
    wants = tuple(wanted.split(" and "))
    endpoint.quirks = () if moved else wants
    async with Lab(endpoint, tmp_path / "memws.db") as lab:
        agent = await lab.create()
        for text in ("One", "Two"):
            assert (await lab.say(agent, text)).replies == ["Hello!"]
        for scene in SCENES:
            await play(lab, agent, scene)
            agent = await lab.open() if scene == "a crash" else agent
            assert (await lab.say(agent, "And now?")).replies == ["Hello!"], scene
        endpoint.quirks = wants
        assert (await lab.say(agent, "And here?")).replies == ["Hello!"]
        other = await lab.create("eve")
        for text in ("One", "Two"):
            assert (await lab.say(other, text)).replies == ["Hello!"]
    async with Lab(endpoint, tmp_path / "memws.db") as lab:
        agent = await lab.open()
        told = await lab.run(agent, turn := memws.Turn("last", "Still there?"))
        assert (told.replies, told.of("retry")) == (["Hello!"], [])
        got = await sent_for(agent, turn.turn_id, 1)
        assert memws.encode_json(got["request"]).encode() == endpoint.bodies[-1]
        assert ("reasoning" in agent.memory.messages[-2].body) == ("reasoning" in wants), "what is refused is not kept"
    assert len(endpoint.lessons) == len(agent.model.learned.shape) - 1, "each refusal teaches"
    assert not endpoint.lessons or moved or wants != ("nine-character ids",)
    roles = [message["role"] for message in endpoint.requests[-1]["messages"]]
    assert ("user", "user") not in itertools.pairwise(roles)


REFUSALS = {
    'messages: roles must alternate between "user" and "assistant"': "alternate",
    "Please ensure that function call turn comes immediately after a user turn": "alternate",
    "does not support successive user or assistant messages": "alternate",
    "Expected 'assistant' role after 'tool' role, got 'user'": "alternate",
    "'messages[0].role' does not support 'system' with this model": "systemless",
    "Only user, assistant and tool roles are supported, got system.": "systemless",
    "Unsupported message role: system": "systemless",
    "Messages with role 'user' must not directly follow messages with role 'tool'": "alternate",
    "Developer instruction is not enabled for models/gemma-3-27b-it": "systemless",
    "Invalid 'messages[3].tool_calls[0].id': string too long. Expected a maximum length of 40": "short ids",
    "Unable to generate parser: Tool call IDs should be alphanumeric strings with length 9!": "short ids",
    "messages.1.content.0.tool_use.id: String should match pattern '^[a-zA-Z0-9_-]+$'": "short ids",
    '["body","messages",2,"assistant","reasoning_content"] Extra inputs are not permitted': "without reasoning_content",
    "Unknown name \"extra_content\" at 'messages[2].tool_calls[0]': Cannot find field.": "without extra_content",
    "Unrecognized request argument supplied: reasoning_details": "without reasoning_details",
    "thinking is enabled but reasoning_content is missing in message 2": "with reasoning_content",
    "Gemini models require a thought_signature, which is required for tools": "with extra_content",
    "An assistant message with 'tool_calls' must be followed by tool messages": None,
    "tool_use ids were found without tool_result blocks immediately after: toolu_01": None,
    "The field `reasoning_content` has no place in the input of this model": "without reasoning_content",
    "Field required: messages.2.assistant.reasoning_content": "with reasoning_content",
    "this model's reasoning is mandatory": None,
    "after 5 consecutive failures: use an alternative model": None,
}


@pytest.mark.parametrize(("words", "rule"), REFUSALS.items(), ids=range(len(REFUSALS)))
async def test_what_a_refusal_teaches(endpoint: Endpoint, lab: Lab, agent: Agent, words: str, rule: str | None) -> None:
    """A refusal of the history is understood in the words of many endpoints, of any status; others teach nothing."""
    await lab.say(agent, "Hi")
    endpoint.script(Reply(status=500 if rule and len(rule) < 15 else 400, body={"error": {"message": words}}))
    turn = await lab.say(agent, "Hi")
    assert (agent.model.learned.shape[1:], bool(turn.replies)) == ([rule] if rule else [], bool(rule))
    assert len(endpoint.requests) == 2 + bool(rule)


MORE: Body = {"reasoning_details": [{"type": "reasoning.encrypted", "data": "walrus"}], "extra_content": None}
MADE: Body = {"reasoning": "I think it over, twice.", "signature": "c2lnbmVk", "more": MORE}
THOUGHT = Reply(calls=[NOTE, APPEND], call_ids=["x" * 3_000, "b"], **MADE)


@pytest.mark.parametrize("whole", [False, True], ids=["in pieces", "whole"])
async def test_only_its_maker_gets_back_what_it_made(endpoint: Endpoint, tmp_path: Path, whole: bool) -> None:
    """What came with an answer goes back to its model as it came, to no other, and into no summary; it is counted."""
    details = THOUGHT.more["reasoning_details"]
    made = {"reasoning_content": THOUGHT.reasoning, "reasoning_details": details if whole else details * 2}
    signed = {"google": {"thought_signature": THOUGHT.signature}}

    async def check(lab: Lab, agent: Agent, is_maker: bool) -> None:
        turn = await lab.run(agent, memws.Turn(f"turn at {len(endpoint.requests)}", "And now?"))
        assert turn.replies == ["Hello!"]
        message = endpoint.requests[-1]["messages"][2]
        calls = message["tool_calls"]
        assert message.keys() - {"role", "content", "tool_calls"} == (made.keys() if is_maker else set())
        assert message | (made if is_maker else {}) == message
        assert [call.get("extra_content") for call in calls] == [signed if is_maker else None, None]
        assert [call["id"] for call in calls] == THOUGHT.call_ids
        (*_, section) = agent.context(agent.memory.messages)
        assert (THOUGHT.signature in section["text"], '"by"' in section["text"]) == (is_maker, False)

    async with Lab(endpoint, tmp_path / "memws.db") as lab:
        agent = await lab.create()
        await lab.say(agent, "Hi", replace(THOUGHT, whole=whole))
        assert agent.used() - (await lab.create("eve")).used() > 1_000
        await check(lab, agent, is_maker=True)
        for model, is_maker in (("other", False), (None, True)):
            async with memws.Transaction(agent.memory) as change:
                change.config = change.config | {"model": model}
            await check(lab, agent, is_maker)
        data = await lab.store.read(memws.export_agent, agent.name)
    with contextlib.closing(memws.Sqlite(str(tmp_path / "other.db"))) as database:
        memws.import_agent(database.open(), data)
    async with Lab(endpoint, tmp_path / "other.db") as lab:
        await check(lab, agent := await lab.open(), is_maker=True)
        ratio = agent.ratio
        await compact(agent)
        assert agent.ratio == ratio, "a summary calibrates nothing"
    (summary,) = filter(is_summary, endpoint.requests)
    assert not re.search("I think it over|walrus|c2lnbmVk", str(summary))


async def test_turns_at_once_learn_together(endpoint: Endpoint, lab: Lab) -> None:
    """A turn that was refused for what another one learned meanwhile goes on by that, and nothing more is learned."""
    agents = [await lab.create(name) for name in ("ada", "bob", "eve", "joe")]
    for wants in ((), ("user after tool",), ("user after tool",)):
        endpoint.quirks = wants
        turns = await asyncio.gather(*(lab.say(agent, "Hi") for agent in agents))
        assert [turn.replies for turn in turns] == [["Hello!"]] * len(agents)
    learned, calls = agents[0].model.learned.shape[1:], len(endpoint.requests)
    assert (learned, calls) == (["alternate"], 3 * len(agents) + len(endpoint.lessons))
