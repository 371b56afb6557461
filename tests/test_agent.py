"""A turn ends well whatever model, endpoint, tools and crashes do: what it says, stores, sends and tells."""

import asyncio
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from agents import Lab, Told, packed, results, sent
from endpoint import Answer, Body, Endpoint, Reply, greet, prompt_tokens

import memws

pytestmark = pytest.mark.anyio

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (AM|PM) UTC\+0000"
RFC_3339 = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
APPEND = ("core_memory_append", {"name": "human", "content": "Name: Zoe"})
HELLO = ("send_message", {"message": "Hello!"})


@pytest.fixture
async def lab(endpoint: Endpoint) -> AsyncIterator[Lab]:
    """A database in memory and the models of the endpoint."""
    async with Lab(endpoint) as lab:
        yield lab


@pytest.fixture
async def agent(lab: Lab) -> memws.Agent:
    """An agent of the lab."""
    return await lab.create()


@pytest.fixture
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once."""
    monkeypatch.setattr(memws, "RETRY_PAUSE", 0.0)


def beat(name: str, /, **arguments: Any) -> tuple[str, Body]:
    """A call that asks for a heartbeat."""
    return name, {**arguments, "request_heartbeat": True}


def is_summary(body: Body) -> bool:
    """Whether a request asks for a summary."""
    return bool(body["messages"][0]["content"] == memws.SUMMARY_SYSTEM)


def summaries(answer: Answer) -> Callable[[Body], Reply]:
    """Answer requests for a summary so, and all others with a greeting."""

    def reply(body: Body) -> Reply:
        if not is_summary(body):
            return greet(body)
        return answer if isinstance(answer, Reply) else answer(body)

    return reply


# ---- the prompt ------------------------------------------------------------------------------------------------------


async def test_create_and_load_call_no_model(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Creating and opening an agent sends nothing to its endpoint."""
    assert (await lab.open()).name == agent.name == "sam"
    assert endpoint.requests == []


async def test_what_the_prompt_costs(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """System prompt and tools together cost at most 1,400 tokens, by our estimate and by the endpoint's."""
    tools = ",".join(tool.spec for tool in memws.MEMORY_TOOLS.values())
    assert memws.estimate_tokens(memws.SYSTEM_PROMPT) + memws.estimate_tokens(tools) <= 1_400
    await lab.say(agent, "Hi")
    (request,) = endpoint.requests
    assert len(request["messages"][0]["content"]) // 4 + prompt_tokens(request)[1] <= 1_400


def test_a_window_of_3000_is_accepted_and_a_smaller_one_is_refused() -> None:
    """Prompt, tools, full default blocks and a reply fit into 3,000 tokens; below that both numbers are named."""
    tools = ",".join(tool.spec for tool in memws.MEMORY_TOOLS.values())
    blocks = memws.AgentConfig({}, memws.MEMORY_TOOLS).blocks
    assert [block.limit for block in blocks] == [2_000, 2_000]
    memws.check_window(3_000, memws.SYSTEM_PROMPT, tools, blocks)
    with pytest.raises(memws.Refused, match=r"2,000 tokens are too few.* need 2,\d\d\d") as caught:
        memws.check_window(2_000, memws.SYSTEM_PROMPT, tools, blocks)
    assert caught.value.code == "bad_config"


async def test_a_window_of_3000_works_with_full_blocks(endpoint: Endpoint, lab: Lab) -> None:
    """With full blocks and a window of 3,000 a turn needs no compaction."""
    endpoint.context_window = 3_000
    agent = await lab.create(context_window=3_000, persona="p" * 2_000, human="h" * 2_000)
    turn = await lab.say(agent, "Hi")
    assert turn.replies[0] == "Hello!"
    assert "compaction" not in turn.kinds


async def test_core_memory_and_the_sizes_of_the_others_are_in_the_prompt(endpoint: Endpoint, lab: Lab) -> None:
    """The system message shows each block with its count and limit, and the sizes of recall and archival memory."""
    agent = await lab.create(human="Name: Zoe", blocks=[{"label": "plan", "value": "rest", "limit": 50}])
    await lab.say(agent, "Hi")
    system = endpoint.requests[0]["messages"][0]
    assert system["role"] == "system"
    assert system["content"].startswith(memws.SYSTEM_PROMPT.rstrip())
    assert '<human characters="9/2000">\nName: Zoe\n</human>' in system["content"]
    assert '<plan characters="4/50">\nrest\n</plan>' in system["content"]
    assert "Recall memory: 0 messages. Archival memory: 0 passages." in system["content"]


async def test_messages_are_packed_as_0_2_7_packed_them(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Events go to the model as user-role JSON with type and time, results as JSON with status and time."""
    endpoint.script(Reply(calls=[beat("core_memory_append", **APPEND[1])]))
    await lab.say(agent, 'Hi "you"')
    system, login, user, call, result, heartbeat = sent(endpoint.requests[1])
    assert system["role"] == "system"
    assert [message["role"] for message in (login, user, call, result, heartbeat)] == [
        "user", "user", "assistant", "tool", "user"
    ]  # fmt: skip
    assert login["content"] | {"time": ""} == {"type": "login", "last_login": "Never (first login)", "time": ""}
    assert user["content"] | {"time": ""} == {"type": "user_message", "message": 'Hi "you"', "time": ""}
    assert result["content"] | {"time": ""} == {"status": "OK", "message": "None", "time": ""}
    reason = memws.HEARTBEAT_REQUESTED
    assert heartbeat["content"] | {"time": ""} == {"type": "heartbeat", "reason": reason, "time": ""}
    for message in (login, user, result, heartbeat):
        assert re.fullmatch(TIME, message["content"]["time"])


async def test_a_login_precedes_a_message_after_an_hour_of_silence(endpoint: Endpoint, lab: Lab) -> None:
    """The first message ever, and one after an hour without the user, are preceded by a login; others are not."""
    agent = await lab.create()
    logins = []
    for last in (None, None, "2020-01-02T03:04:05.678Z", None):
        if last is not None:
            await lab.store.commit(agent.id, memws.Changes(state={**agent.record.state, "last_user": last}))
            agent = await lab.open()
        await lab.say(agent, "Hi")
        logins.append([login["last_login"] for login in packed(endpoint.requests[-1], "login")])
        assert [message["content"]["type"] for message in sent(endpoint.requests[-1]) if message["role"] == "user"][
            -1
        ] == "user_message"
    first = "Never (first login)"
    assert logins == [[first], [first], [first, "2020-01-02T03:04:05.678Z"], [first, "2020-01-02T03:04:05.678Z"]]


async def test_the_prompt_only_grows_at_its_end(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
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
    tools = b'],"tools":' + agent._tools_body.encode() + b"}"
    assert len(endpoint.bodies) == 6
    for before, after in zip(endpoint.bodies, endpoint.bodies[1:], strict=False):
        assert before.endswith(tools)
        assert after.startswith(before.removesuffix(tools) + b",{")
        assert after.endswith(tools)


async def test_the_system_message_is_rebuilt_by_an_edit_a_load_and_a_compaction(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent
) -> None:
    """Core memory edits, loads and compactions renew the system message with the sizes as of then; nothing else."""
    endpoint.script(
        Reply(calls=[beat("archival_memory_insert", content="a fact")]),
        Reply(calls=[beat("core_memory_append", **APPEND[1])]),
    )
    await lab.say(agent, "Hi")  # messages: login, user, (call, result, heartbeat) twice, call, result
    first, second, third = (request["messages"][0]["content"] for request in endpoint.requests)
    assert first == second
    assert "Recall memory: 8 messages. Archival memory: 1 passages." in third
    assert "Name: Zoe" in third
    await lab.say(agent, "Hi")
    assert endpoint.requests[-1]["messages"][0]["content"] == third
    agent = await lab.open()
    await lab.say(agent, "Hi")
    loaded = endpoint.requests[-1]["messages"][0]["content"]
    assert "Recall memory: 13 messages. Archival memory: 1 passages." in loaded
    _ = [event async for event in agent.compact()]
    await lab.say(agent, "Hi")
    compacted = endpoint.requests[-1]["messages"][0]["content"]
    assert "Recall memory: 16 messages. Archival memory: 1 passages." in compacted


async def test_an_edit_by_a_client_renews_the_system_message(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A block set from outside is in the next request, and told as a client's edit."""
    events = [event async for event in agent.set_block("human", "Name: Ada", 1)]
    assert [(event.message_type, event.fields["by"], event.fields["after"]) for event in events] == [
        ("memory_change", "client", "Name: Ada")
    ]
    await lab.say(agent, "Hi")
    assert "Name: Ada" in endpoint.requests[0]["messages"][0]["content"]
    with pytest.raises(memws.Refused) as caught:
        _ = [event async for event in agent.set_block("human", "Name: Eve", 1)]
    assert (caught.value.code, caught.value.details) == ("conflict", {"version": 2, "value": "Name: Ada"})


# ---- a turn and its events -------------------------------------------------------------------------------------------


async def test_the_events_of_a_step_are_in_the_order_of_0_2_7(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Monologue; per call the call, "Running …", its effects, its return, "Success: …"; then how full the window is."""
    endpoint.script(Reply("I greet Zoe.", calls=[beat("core_memory_append", **APPEND[1]), HELLO]))
    turn = await lab.say(agent, "I am Zoe")
    call = ["tool_call", "function_message"]
    answer = ["tool_return", "function_message"]
    step = ["internal_monologue", *call, "memory_change", *answer, *call, "assistant_message", *answer]
    assert turn.kinds == ["user_message", *step, "heartbeat", "context", *call, "assistant_message", *answer, "context"]
    assert turn.texts("function_message") == [
        "Running core_memory_append({'name': 'human', 'content': 'Name: Zoe'})",
        "Success: None",
        "Running send_message({'message': 'Hello!'})",
        "Success: None",
        "Running send_message({'message': 'Hello!'})",
        "Success: None",
    ]
    assert turn.texts("internal_monologue") == ["I greet Zoe."]
    assert turn.texts("user_message") == ["I am Zoe"]


async def test_what_events_carry(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Every event has turn_id and time; those of steps their step; the terminal stop reason and usage."""
    usage = {"prompt_tokens": 1_000, "completion_tokens": 10}
    endpoint.script(
        Reply(calls=[beat("conversation_search", query="x")], usage=usage), Reply(calls=[HELLO], usage=usage)
    )
    turn = await lab.say(agent, "Hi")
    frames = [json.loads(event.frame("")) for event in turn.events]
    assert {frame["turn_id"] for frame in frames} == {"turn-1"}
    assert all(re.fullmatch(RFC_3339, frame["time"]) for frame in frames)
    assert [frame["step"] for frame in frames[1:-1]] == sorted(frame["step"] for frame in frames[1:-1])
    assert {frame["step"] for frame in frames[1:-1]} == {1, 2}
    assert turn.stop_reason == "done"
    assert turn.end["usage"] == {"input_tokens": 2_000, "output_tokens": 20, "model_calls": 2, "estimated": False}
    (call, _), (answer, _) = turn.of("tool_call"), turn.of("tool_return")
    assert (call["name"], call["arguments"]) == ("conversation_search", {"query": "x", "request_heartbeat": True})
    assert (answer["tool_call_id"], answer["status"]) == (call["tool_call_id"], "OK")
    assert answer["message"] == "No results found in recall memory for 'x'."


async def test_deltas_join_to_what_is_said(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """The live pieces of monologue and reply come before the stored whole, and join to it."""
    endpoint.script(Reply("I think. " * 20, calls=[("send_message", {"message": "Grüße 👋 " * 20})], split=7))
    turn = await lab.say(agent, "Hi")
    pieces: dict[str, str] = {"internal_monologue": "", "assistant_message": ""}
    for frame in turn.of("delta"):
        pieces[frame["of"]] += frame["message"]
        assert "seq" not in frame
    assert pieces["internal_monologue"].strip() == turn.texts("internal_monologue")[0]
    assert pieces["assistant_message"] == turn.replies[0]
    kinds = [event.message_type for event in turn.events]
    assert max(index for index, kind in enumerate(kinds) if kind == "delta") < kinds.index("internal_monologue")


async def test_absent_usage_is_estimated(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Where an endpoint does not count, the terminal's usage is an estimate and says so."""
    endpoint.script(Reply(calls=[HELLO], usage=None))
    usage = (await lab.say(agent, "Hi")).end["usage"]
    real = sum(prompt_tokens(endpoint.requests[0]))
    assert usage["estimated"] is True
    assert real / 2 < usage["input_tokens"] < real * 2
    assert usage["output_tokens"] > 0


async def test_a_requested_heartbeat_wakes_the_agent_again(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """After a call with request_heartbeat, also as text, the model is called again with the reason."""
    for wish in (True, "true"):
        endpoint.script(Reply(calls=[HELLO, ("conversation_search", {"query": "x", "request_heartbeat": wish})]))
        turn = await lab.say(agent, "Hi")
        assert turn.texts("heartbeat") == [memws.HEARTBEAT_REQUESTED]
        assert packed(endpoint.requests[-1], "heartbeat")[-1]["reason"] == memws.HEARTBEAT_REQUESTED
        assert turn.replies == ["Hello!", "Hello!"]


async def test_without_a_heartbeat_a_turn_ends_with_its_reply(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A step that said something and asks for nothing more is the last."""
    endpoint.script(Reply(calls=[APPEND, HELLO, ("conversation_search", {"query": "x", "request_heartbeat": False})]))
    turn = await lab.say(agent, "Hi")
    assert (turn.stop_reason, len(endpoint.requests)) == ("done", 1)


async def test_a_failed_call_wakes_the_agent_again(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A call that failed starts another step without being asked to, also after a reply."""
    endpoint.script(Reply(calls=[HELLO, ("core_memory_append", {"name": "dog", "content": "x"})]))
    turn = await lab.say(agent, "Hi")
    assert turn.texts("heartbeat") == [memws.HEARTBEAT_FAILED]
    assert packed(endpoint.requests[1], "heartbeat")[-1]["reason"] == memws.HEARTBEAT_FAILED
    assert results(endpoint.requests[1])[-1].startswith("Failed: there is no core memory block 'dog'")
    assert turn.stop_reason == "done"


async def test_a_step_without_a_reply_is_followed_by_another(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Where the user has no reply yet and no heartbeat was asked for, the agent is woken to answer."""
    endpoint.script(Reply(calls=[APPEND]))
    turn = await lab.say(agent, "I am Zoe")
    assert turn.texts("heartbeat") == [memws.HEARTBEAT_NO_REPLY]
    assert packed(endpoint.requests[1], "heartbeat")[-1]["reason"] == memws.HEARTBEAT_NO_REPLY
    assert turn.replies == ["Hello!"]


@pytest.mark.parametrize("reason", [memws.HEARTBEAT_TIMER, memws.HEARTBEAT_WAKE])
async def test_a_turn_without_a_message(endpoint: Endpoint, lab: Lab, agent: memws.Agent, reason: str) -> None:
    """A timed heartbeat and a wake start with a heartbeat; nobody waits for a reply, so plain text is monologue."""
    endpoint.script(Reply("Nothing to do."))
    turn = await lab.say(agent, None, reason=reason)
    assert turn.kinds[0] == "heartbeat"
    assert packed(endpoint.requests[0], "heartbeat") == [
        {"type": "heartbeat", "reason": reason, "time": packed(endpoint.requests[0], "heartbeat")[0]["time"]}
    ]
    assert packed(endpoint.requests[0], "login") == []
    assert (turn.replies, turn.texts("internal_monologue")) == ([], ["Nothing to do."])
    assert (turn.stop_reason, len(endpoint.requests)) == ("done", 1)
    assert (await lab.say(agent, None, reason=reason)).replies == ["Hello!"]


async def test_the_agent_sees_its_own_words_again(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A plain reply and a sent one are both in the next request and in recall memory."""
    endpoint.script(Reply("Plain words"), Reply(calls=[("send_message", {"message": "Sent words"})]))
    await lab.say(agent, "One")
    await lab.say(agent, "Two")
    await lab.say(agent, "Three")
    body = json.dumps(endpoint.requests[-1])
    assert "Plain words" in body
    assert "Sent words" in body
    found, _ = await lab.store.search(agent.id, "words", ("recall",), ("assistant",), None, None, 10, 0)
    assert {item.text for item in found[:2]} == {"Plain words", "Sent words"}


# ---- memory tools ----------------------------------------------------------------------------------------------------


async def call(lab: Lab, agent: memws.Agent, name: str, /, **arguments: Any) -> tuple[Told, str]:
    """A turn in which the model makes one call, and what the model then reads as its result."""
    lab.endpoint.script(Reply(calls=[(name, arguments)]))
    turn = await lab.say(agent, "Go on")
    return turn, results(lab.endpoint.requests[-1])[-1]


async def test_core_memory_append(lab: Lab, agent: memws.Agent) -> None:
    """Appending adds a line to a block, in memory, on disk and in the prompt, and tells the difference."""
    for line in ("Name: Zoe", "Town: Oslo"):
        turn, result = await call(lab, agent, "core_memory_append", name="human", content=line)
        assert result == "OK: None"
    assert agent.blocks["human"].value == "Name: Zoe\nTown: Oslo"
    assert agent.blocks["human"].version == 3
    (change,) = turn.of("memory_change")
    expected = {"what": "core", "label": "human", "before": "Name: Zoe", "after": "Name: Zoe\nTown: Oslo"}
    assert change | expected | {"by": "agent", "diff": "+Town: Oslo"} == change
    assert (await lab.open()).blocks == agent.blocks


async def test_core_memory_replace(lab: Lab, agent: memws.Agent) -> None:
    """Replacing changes what stands there to the letter; an empty text deletes it."""
    await call(lab, agent, "core_memory_append", name="human", content="Name: Zoe\nTown: Oslo")
    turn, result = await call(lab, agent, "core_memory_replace", name="human", old_content="Oslo", new_content="Bergen")
    assert (result, agent.blocks["human"].value) == ("OK: None", "Name: Zoe\nTown: Bergen")
    assert turn.of("memory_change")[0]["diff"] == "-Town: Oslo\n+Town: Bergen"
    await call(lab, agent, "core_memory_replace", name="human", old_content="Town: Bergen", new_content="")
    assert agent.blocks["human"].value == "Name: Zoe"


@pytest.mark.parametrize(
    ("name", "arguments", "advice"),
    [
        ("core_memory_append", {"name": "dog", "content": "x"}, "no core memory block 'dog'; blocks: persona, human"),
        ("core_memory_append", {"name": "human", "content": "x" * 2_001}, "limited to 2,000 characters.* 2,001"),
        ("core_memory_replace", {"name": "human", "old_content": "y", "new_content": ""}, "old_content is not in the"),
        ("core_memory_replace", {"name": "human", "old_content": "", "new_content": "z"}, "old_content is not in the"),
        ("archival_memory_insert", {"content": " "}, "content is empty"),
        ("archival_memory_insert", {"content": "x" * 65_537}, "at most 65,536 characters, but got 65,537"),
        ("conversation_search_date", {"start_date": "soon", "end_date": "2026-01-01"}, "a day like 2026-01-31.*'soon'"),
        ("conversation_search_date", {"start_date": "2026-02-30", "end_date": "2026-03-01"}, "expected a day like"),
        ("conversation_search", {}, r"missing argument 'query'; call conversation_search\(query: string, "),
        ("conversation_search", {"query": "x", "page": "one"}, "argument page: expected integer, but got 'one'; call"),
        ("conversation_search", {"query": ["x"]}, "argument query: expected string, but got"),
        ("conversation_search", {"query": "x", "limit": 5}, "unknown argument 'limit'; call conversation_search"),
        ("send_message", {}, r"missing argument 'message'; call send_message\(message: string\)"),
        ("send_message", {"message": 5}, "argument message: expected string, but got 5; call"),
        ("pause_heartbeats", {"minutes": 1.5}, "argument minutes: expected integer, but got 1.5"),
        ("send_email", {"to": "x"}, "unknown tool 'send_email'; tools: send_message, core_memory_append"),
    ],
)
async def test_a_wrong_call_gets_advice_and_changes_nothing(lab: Lab, name: str, arguments: Body, advice: str) -> None:
    """Each wrong call of a memory tool fails with a sentence that tells how to call right; the user gets a reply."""
    agent = await lab.create(context_window=100_000)
    blocks = dict(agent.blocks)
    turn, result = await call(lab, agent, name, **arguments)
    assert re.match("Failed: .*" + advice, result)
    assert turn.of("tool_return")[0]["status"] == "Failed"
    assert turn.texts("function_message")[1] == result.replace("Failed", "Error", 1)
    assert turn.texts("heartbeat") == [memws.HEARTBEAT_FAILED]
    assert turn.replies == ["Hello!"]
    assert (agent.blocks, agent.archival, turn.of("memory_change")) == (blocks, 0, [])


async def test_numbers_as_text_are_numbers(lab: Lab, agent: memws.Agent) -> None:
    """A page that a model wrote as text is read as a number."""
    _, result = await call(lab, agent, "conversation_search", query="x", page="0")
    assert result.startswith("OK: ")


async def test_archival_memory(lab: Lab, agent: memws.Agent) -> None:
    """A passage kept in one turn is found in the next, with its day, by other forms of its words."""
    turn, result = await call(lab, agent, "archival_memory_insert", content="Zoe climbs the Galdhøpiggen every June.")
    assert (result, agent.archival) == ("OK: None", 1)
    (change,) = turn.of("memory_change")
    assert (change["what"], change["id"], change["before"]) == ("archival", 1, None)
    assert change["after"] == "Zoe climbs the Galdhøpiggen every June."
    _, result = await call(lab, agent, "archival_memory_search", query="climbing Galdhøpiggen")
    assert result.startswith("OK: Showing 1 of 1 results (page 0 of 0): ")
    (item,) = json.loads(result.split(": ", 2)[2])
    assert item["text"] == "Zoe climbs the Galdhøpiggen every June."
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", item["time"])
    assert "No results" in (await call(lab, agent, "archival_memory_search", query="bicycle"))[1]


async def test_archival_memory_of_the_same_step_is_not_lost(lab: Lab, agent: memws.Agent) -> None:
    """Several passages and edits of one step are all kept, in order."""
    lab.endpoint.script(
        Reply(
            calls=[("archival_memory_insert", {"content": f"Fact {number}"}) for number in range(3)] + [APPEND, HELLO]
        )
    )
    turn = await lab.say(agent, "Go on")
    assert [change.get("id", change.get("label")) for change in turn.of("memory_change")] == [1, 2, 3, "human"]
    assert (agent.archival, agent.blocks["human"].value) == (3, "Name: Zoe")


async def test_conversation_search_pages_through_the_past(lab: Lab, agent: memws.Agent) -> None:
    """Recall memory finds the user's and the agent's words page by page, and not what this turn says."""
    for number in range(12):
        await lab.say(agent, f"My locker has the number {number}")
    texts: list[str] = []
    for page in range(3):
        _, result = await call(lab, agent, "conversation_search", query="locker", page=page)
        told = re.match(r"OK: Showing (\d+) of (\d+) results \(page (\d+) of (\d+)\): ", result)
        assert told
        items = json.loads(result[told.end() :])
        assert (len(items), page) == (int(told[1]), int(told[3]))
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", item["time"]) for item in items)
        texts += [item["text"] for item in items if "locker" in item["text"]]
    assert sorted(texts) == sorted(f"My locker has the number {number}" for number in range(12))
    assert "No results" in (await call(lab, agent, "conversation_search", query="locker", page=50))[1]


async def test_conversation_search_date_lists_days(lab: Lab, agent: memws.Agent) -> None:
    """Messages are listed by day, both days inclusive, the newest first."""
    old = memws.ChatMessage(1, "user", "2024-05-06T23:59:00.000Z", "Old words", '{"role":"user","content":"{}"}')
    old.said = old.text
    await lab.store.commit(agent.id, memws.Changes(messages=[old]))
    agent = await lab.open()
    await lab.say(agent, "New words")
    for start, end, expected in (
        ("2024-05-06", "2024-05-06", ["Old words"]),
        ("2024-05-07", "2024-05-08", []),
        ("2020-01-01", "2099-12-31", ["New words", "Old words"]),
    ):
        _, result = await call(lab, agent, "conversation_search_date", start_date=start, end_date=end)
        found = json.loads(result.split(": ", 2)[2]) if "Showing" in result else []
        assert [item["text"] for item in found if item["text"].endswith("words")] == expected


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conversation_search", {"query": "locker"}),
        ("conversation_search", {"query": "%"}),
        ("conversation_search", {"query": ""}),
        ("conversation_search_date", {"start_date": "2020-01-01", "end_date": "2099-01-01"}),
        ("archival_memory_search", {"query": "locker"}),
    ],
)
@pytest.mark.parametrize("page", [-1, 10**9, 10**30])
async def test_any_page_is_answered(lab: Lab, agent: memws.Agent, name: str, arguments: Body, page: int) -> None:
    """A page far beyond the results, or before them, gives a result like any other."""
    await lab.say(agent, "My locker has the number 7")
    turn, result = await call(lab, agent, name, **arguments, page=page)
    assert result.startswith("OK: ")
    assert turn.stop_reason == "done"


@pytest.mark.parametrize("query", ['"', "a AND", "nope:x", "*", "a" * 5_000, "NEAR(", "'; DROP TABLE messages; --"])
async def test_any_query_is_answered(lab: Lab, agent: memws.Agent, query: str) -> None:
    """Queries with the syntax of search engines and databases are words like any other."""
    await lab.say(agent, "My locker has the number 7")
    for name in ("conversation_search", "archival_memory_search"):
        turn, result = await call(lab, agent, name, query=query)
        assert result.startswith("OK: ")
        assert turn.stop_reason == "done"


@pytest.mark.parametrize(("minutes", "paused"), [(30, 30), (10_000, 360), (-5, 0)])
async def test_pause_heartbeats(lab: Lab, agent: memws.Agent, minutes: int, paused: int) -> None:
    """Timed heartbeats are paused for at most 360 minutes; the state says until when."""
    before = time.time()
    _, result = await call(lab, agent, "pause_heartbeats", minutes=minutes)
    assert result == f"OK: Pausing timed heartbeats for {paused} min"
    until = (await lab.open()).record.state["paused_until"]
    assert before + 60 * paused <= until <= time.time() + 60 * paused


async def test_a_tool_sees_its_own_agent_only(lab: Lab, agent: memws.Agent) -> None:
    """Memory tools of one agent neither find nor change what another agent keeps."""
    other = await lab.create("ada", human="Name: Ada")
    lab.endpoint.script(Reply(calls=[("archival_memory_insert", {"content": "The secret is 42"}), HELLO]))
    await lab.say(other, "My secret is 42")
    for name in ("conversation_search", "archival_memory_search"):
        assert "No results" in (await call(lab, agent, name, query="secret"))[1]
    await call(lab, agent, "core_memory_append", name="human", content="Name: Zoe")
    assert (await lab.open("ada")).blocks["human"].value == "Name: Ada"


# ---- the ladder of corrections ---------------------------------------------------------------------------------------

HERMES = '<tool_call>\n{"name": "send_message", "arguments": {"message": "Hello!"}}\n</tool_call>'
LADDER: dict[str, tuple[Reply, list[str]]] = {
    "as it should be": (Reply(calls=[HELLO]), []),
    "plain text": (Reply("Hello!"), ["plain_text"]),
    "plain text after thoughts in tags": (Reply("<think>A greeting.</think>\n\nHello!"), ["plain_text"]),
    "plain text after no thoughts in tags": (Reply("<think>\n\n</think>\n\nHello!"), ["plain_text"]),
    "plain text after reasoning": (Reply("Hello!", reasoning="A greeting."), ["plain_text"]),
    "plain text cut at the length limit": (Reply("Hello!", finish="length"), ["length", "plain_text"]),
    "a call as text": (Reply(calls=[HELLO], calls_as_text=True), ["text_call"]),
    "a call as text after words": (Reply("I greet.\n", calls=[HELLO], calls_as_text=True), ["text_call"]),
    "a call as text without its end": (Reply(HERMES.removesuffix("\n</tool_call>")), ["text_call"]),
    "a call as text, cut": (Reply(HERMES[: HERMES.index("}}")]), ["text_call"]),
    "a call in a code block": (
        Reply('```json\n{"name": "send_message", "arguments": {"message": "Hello!"}}\n```'),
        ["text_call"],
    ),
    "a call as bare JSON": (Reply('{"name": "send_message", "arguments": {"message": "Hello!"}}'), ["text_call"]),
    "a call as MemGPT's local models wrote it": (
        Reply('{"function": "send_message", "params": {"inner_thoughts": "I greet.", "message": "Hello!"}}'),
        ["text_call"],
    ),
    "calls as a list": (Reply('[{"name": "send_message", "parameters": {"message": "Hello!"}}]'), ["text_call"]),
    "calls as OpenAI's JSON": (
        Reply(
            json.dumps({"tool_calls": [{"function": {"name": "send_message", "arguments": '{"message":"Hello!"}'}}]})
        ),
        ["text_call"],
    ),
    "JSON without its end": (Reply(calls=[("send_message", '{"message": "Hello!"')]), ["arguments"]),
    "JSON cut inside the text": (Reply(calls=[("send_message", '{"message": "Hello!')]), ["arguments"]),
    "JSON with a comma too many": (Reply(calls=[("send_message", '{"message": "Hello!",}')]), ["arguments"]),
    "JSON with words around it": (Reply(calls=[("send_message", 'OK: {"message": "Hello!"} done')]), ["arguments"]),
    "JSON encoded twice": (Reply(calls=[("send_message", json.dumps('{"message": "Hello!"}'))]), ["arguments"]),
    "another parameter's name": (Reply(calls=[("send_message", {"text": "Hello!"})]), ["arguments"]),
    "a name with a prefix": (Reply(calls=[("functions.send_message", {"message": "Hello!"})]), ["tool_name"]),
    "an id that is too long": (Reply(calls=[HELLO], call_ids=["x" * 200]), ["tool_call_id"]),
    "no id": (Reply(calls=[HELLO], call_ids=[None]), []),
}


@pytest.mark.parametrize(("answer", "corrections"), LADDER.values(), ids=LADDER.keys())
async def test_a_reply_that_can_be_read_reaches_the_user(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent, answer: Reply, corrections: list[str]
) -> None:
    """Whatever rung of the ladder reads an answer, the user gets it once, each correction is told, and all goes on."""
    endpoint.script(answer)
    turn = await lab.say(agent, "Hi")
    assert turn.replies == ["Hello!"]
    assert turn.corrections == corrections
    assert (turn.stop_reason, len(endpoint.requests)) == ("done", 1)
    monologues = turn.texts("internal_monologue")
    assert not any("Hello!" in text or "think>" in text for text in monologues)
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]
    found, _ = await lab.store.search(agent.id, "Hello", ("recall",), ("assistant",), None, None, 10, 0)
    assert [item.text for item in found] == ["Hello!"] * 2


async def test_line_breaks_inside_json_are_meant(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A raw line break or tab inside an argument, which JSON forbids, is part of the text."""
    endpoint.script(Reply(calls=[("send_message", '{"message": "One\n\tTwo"}')]))
    assert (await lab.say(agent, "Hi")).replies == ["One\n\tTwo"]


async def test_calls_with_the_same_id(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Two calls under one id are two calls, each with its result."""
    endpoint.script(Reply(calls=[APPEND, HELLO], call_ids=["a", "a"]))
    turn = await lab.say(agent, "Hi")
    assert (turn.replies, turn.corrections) == (["Hello!"], ["tool_call_id"])
    await lab.say(agent, "Again")
    assert results(endpoint.requests[-1])[:2] == ["OK: None", "OK: None"]


@pytest.mark.parametrize(
    "answer",
    [
        Reply(),
        Reply(""),
        Reply("Hello!", empty_choices="all"),
        Reply('<tool_call>{"name": "send_message", "arguments": nonsense</tool_call>'),
        Reply(calls=[("send_message", '{"message": "Hel')], finish="length"),
        Reply(finish="length"),
    ],
    ids=["null", "empty", "empty choices", "a broken call as text", "a call cut at the limit", "nothing at the limit"],
)
async def test_an_unreadable_answer_is_asked_for_again_once(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent, answer: Reply
) -> None:
    """What no rung can read is sent back once with the problem; that request is not kept in the history."""
    endpoint.script(answer)
    turn = await lab.say(agent, "Hi")
    assert turn.replies == ["Hello!"]
    (retry,) = turn.of("retry")
    assert (retry["code"], retry["attempt"], retry["of"], retry["delay_ms"]) == ("bad_output", 1, 1, 0)
    (alert,) = packed(endpoint.requests[1], "system_alert")
    assert "Your last answer could not be used" in alert["message"]
    await lab.say(agent, "Again")
    assert packed(endpoint.requests[2], "system_alert") == []

    endpoint.script(answer, answer)
    turn = await lab.say(agent, "Once more")
    assert (turn.end["type"], turn.end["code"]) == ("agent_response_error", "bad_output")
    assert (turn.stop_reason, turn.replies, len(endpoint.requests)) == ("error", [], 5)
    assert (await lab.say(agent, "And now?")).replies == ["Hello!"]


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", "5", '"text"', "null", "{]", "\x00\ud800"])
async def test_arguments_that_are_no_object_are_a_failed_call(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent, arguments: str
) -> None:
    """Such a call is stored with {} and gets its raw text back as advice; it never runs."""
    endpoint.script(Reply(calls=[("archival_memory_insert", arguments)]))
    turn = await lab.say(agent, "Hi")
    (assistant,) = (message for message in endpoint.requests[1]["messages"] if "tool_calls" in message)
    assert assistant["tool_calls"][0]["function"]["arguments"] == "{}"
    assert re.match("Failed: the arguments are no JSON object|Failed: missing", results(endpoint.requests[1])[0])
    assert (turn.replies, agent.archival) == (["Hello!"], 0)


async def test_names_that_no_api_takes_are_stored_as_such_that_it_does(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent
) -> None:
    """A tool name with spaces, too long or empty is an unknown tool, and the history stays acceptable."""
    endpoint.script(Reply(calls=[("send a message!", {})]), Reply(calls=[("x" * 300, {})]))
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]
    endpoint.script(Reply(calls=[("", {})]))
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]


async def test_lone_surrogates_and_nul_of_a_model(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Text that UTF-8 or SQLite cannot hold is mended before it is stored, said and sent."""
    endpoint.script(
        Reply("Think \ud800\x00", calls=[beat("archival_memory_insert", content="A\ud800\x00B"), HELLO]),
        Reply("Plain \udfff\x00 text", usage=None),
    )
    turn = await lab.say(agent, "Hi")
    assert turn.texts("internal_monologue")[0] == "Think \ufffd\ufffd"
    assert turn.of("memory_change")[0]["after"] == "A\ufffd\ufffdB"
    assert (await lab.say(agent, "Hi")).stop_reason == "done"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Reply(refusal="I can't help with that."), "model_refused"),
        (Reply(finish="content_filter"), "model_refused"),
        (Reply(status=401), "model_auth"),
        (Reply(status=403), "model_auth"),
        (Reply(status=400), "model_refused"),
        (Reply(status=429, headers={"Retry-After": "100"}), "model_rate_limit"),
        (Reply(status=503, headers={"Retry-After": "100"}), "model_unavailable"),
    ],
    ids=["refusal", "content_filter", "401", "403", "400", "429", "503"],
)
async def test_a_failure_that_is_final_ends_the_turn(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent, answer: Reply, code: str
) -> None:
    """A failure that no second attempt can mend ends the turn with its code after one call; the next turn works."""
    endpoint.script(answer)
    turn = await lab.say(agent, "Hi")
    assert (turn.end["type"], turn.end["code"], turn.stop_reason) == ("agent_response_error", code, "error")
    assert turn.end["usage"]["model_calls"] == len(endpoint.requests) == 1
    assert turn.of("retry") == []
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]
    assert [message["message"] for message in packed(endpoint.requests[-1], "user_message")] == ["Hi", "Again"]


# ---- first-message verification --------------------------------------------------------------------------------------


async def test_a_first_message_is_asked_for_until_it_is_sent(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """With verification an answer without send_message is asked for again, told each time."""
    endpoint.script(Reply("Hello?"), Reply(calls=[APPEND]))
    turn = await lab.say(agent, "Hi", verify=True)
    assert (turn.replies, turn.corrections, len(endpoint.requests)) == (["Hello!"], ["verify", "verify"], 3)
    assert agent.blocks["human"].value == ""


async def test_verification_is_bounded(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """After three attempts the turn goes on with what came."""
    endpoint.script(*[Reply("Hello?")] * 3)
    turn = await lab.say(agent, "Hi", verify=True)
    assert (turn.replies, turn.stop_reason) == (["Hello?"], "done")
    assert turn.corrections == ["verify", "verify", "plain_text"]
    assert len(endpoint.requests) == 3


# ---- how a turn ends -------------------------------------------------------------------------------------------------


async def test_three_failed_calls_in_a_row_end_the_turn(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """The third failed call in a row ends the turn with bad_output and the last failure."""
    endpoint.default = lambda body: Reply(calls=[("no_such_tool", {"n": len(body["messages"])})])
    turn = await lab.say(agent, "Hi")
    assert (turn.end["code"], turn.stop_reason) == ("bad_output", "error")
    assert "unknown tool 'no_such_tool'" in turn.end["message"]
    assert len(endpoint.requests) == 3
    endpoint.default = greet
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_failed_calls_in_one_step_count(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """After three failures in one step its further calls do not run, and all have their results."""
    endpoint.script(Reply(calls=[("no_such_tool", {"n": 1}), ("no_such_tool", {"n": 2}), ("x", {}), APPEND, HELLO]))
    turn = await lab.say(agent, "Hi")
    assert (turn.end["code"], turn.replies, agent.blocks["human"].value) == ("bad_output", [], "")
    await lab.say(agent, "Again")
    assert [result[:7] for result in results(endpoint.requests[-1])] == ["Failed:"] * 5


async def test_a_success_between_failures_counts_anew(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Two failures, a success and two failures do not end a turn."""
    wrong = [Reply(calls=[("no_such_tool", {"n": number})]) for number in range(4)]
    endpoint.script(*wrong[:2], Reply(calls=[beat("core_memory_append", **APPEND[1])]), *wrong[2:])
    turn = await lab.say(agent, "Hi")
    assert (turn.replies, turn.stop_reason, len(endpoint.requests)) == (["Hello!"], "done", 6)


async def test_the_same_call_three_times_ends_the_turn(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A model that repeats a call with the same arguments is stopped at the third time: repeated_call."""
    endpoint.default = Reply(calls=[beat("conversation_search", query="x")])
    turn = await lab.say(agent, "Hi")
    assert (turn.stop_reason, len(endpoint.requests)) == ("repeated_call", 3)
    assert turn.end["type"] == "agent_response_end"
    endpoint.default = greet
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_a_turn_has_at_most_max_steps(endpoint: Endpoint, lab: Lab) -> None:
    """A model that goes on for ever is stopped at max_steps, and each of its searches was another."""
    agent = await lab.create(max_steps=5)
    endpoint.default = lambda body: Reply(calls=[beat("conversation_search", query=str(len(body["messages"])))])
    turn = await lab.say(agent, "Hi")
    assert (turn.stop_reason, len(endpoint.requests)) == ("max_steps", 5)
    assert max(frame["step"] for frame in turn.of("tool_call")) == 5
    endpoint.default = greet
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_the_default_step_limit_is_20(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Without max_steps a turn has at most 20 steps."""
    endpoint.default = lambda body: Reply(calls=[beat("conversation_search", query=str(len(body["messages"])))])
    assert (await lab.say(agent, "Hi")).stop_reason == "max_steps"
    assert len([body for body in endpoint.requests if not is_summary(body)]) == 20


async def test_a_turn_has_a_token_budget(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A turn that has used its tokens ends with budget instead of another step."""
    half = {"prompt_tokens": memws.TURN_TOKEN_BUDGET // 2, "completion_tokens": 0}
    endpoint.default = lambda body: Reply(
        calls=[beat("conversation_search", query=str(len(body["messages"])))], usage=half
    )
    turn = await lab.say(agent, "Hi")
    assert turn.stop_reason == "budget"
    assert turn.end["usage"]["input_tokens"] >= memws.TURN_TOKEN_BUDGET
    endpoint.default = greet
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_a_turn_that_ends_without_send_message_gives_the_user_its_text(endpoint: Endpoint, lab: Lab) -> None:
    """Where the last step has words but no reply, the words are the reply, told as a correction."""
    agent = await lab.create(max_steps=1)
    endpoint.script(Reply("I noted your name.", calls=[APPEND]))
    turn = await lab.say(agent, "I am Zoe")
    assert (turn.replies, turn.corrections) == (["I noted your name."], ["no_reply"])
    assert turn.stop_reason == "max_steps"


# ---- failures of transport -------------------------------------------------------------------------------------------


async def test_a_failed_call_is_made_again_twice(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A transport failure is told and tried again, twice; the third ends the turn with its code."""
    busy = Reply(status=503, headers={"Retry-After": "0"})
    endpoint.script(busy, busy)
    turn = await lab.say(agent, "Hi")
    assert turn.replies == ["Hello!"]
    told = [(frame["code"], frame["attempt"], frame["of"], frame["delay_ms"]) for frame in turn.of("retry")]
    assert told == [("model_unavailable", 1, 2, 0), ("model_unavailable", 2, 2, 0)]
    assert all("seq" not in frame for frame in turn.of("retry"))
    assert (turn.end["usage"]["model_calls"], len(endpoint.requests)) == (3, 3)

    endpoint.script(busy, busy, busy)
    turn = await lab.say(agent, "Hi")
    assert (turn.end["code"], len(endpoint.requests)) == ("model_unavailable", 6)
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_retry_after_is_honoured(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """The pause before the next attempt is the one that the endpoint asks for."""
    endpoint.script(
        Reply(status=429, headers={"Retry-After-Ms": "30"}), Reply(status=429, headers={"Retry-After": "0.02"})
    )
    turn = await lab.say(agent, "Hi")
    assert [frame["delay_ms"] for frame in turn.of("retry")] == [30, 20]
    assert turn.replies == ["Hello!"]


@pytest.mark.usefixtures("_no_pauses")
async def test_a_stream_that_is_reset_is_made_again(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A reply that breaks off in the middle is made anew, and said and stored once."""
    endpoint.script(Reply("I say", calls=[("send_message", {"message": "Hello, my friend!"})], cut_after=5))
    turn = await lab.say(agent, "Hi")
    assert turn.replies == ["Hello!"]
    (retry,) = turn.of("retry")
    assert (retry["code"], retry["attempt"]) == ("model_unavailable", 1)
    assert "I say" in "".join(turn.texts("delta"))
    assert "my friend" not in endpoint.bodies[-1].decode()


@pytest.mark.usefixtures("_no_pauses")
async def test_a_model_that_stalls_ends_the_turn(endpoint: Endpoint) -> None:
    """Silence beyond the idle timeout is tried again twice and then ends the turn with model_timeout."""
    async with Lab(endpoint, idle_timeout=0.05) as lab:
        agent = await lab.create()
        endpoint.script(*[Reply("Hello", stall_after=2)] * 3)
        turn = await lab.say(agent, "Hi")
        assert (turn.end["code"], len(endpoint.requests)) == ("model_timeout", 3)
        assert [frame["code"] for frame in turn.of("retry")] == ["model_timeout"] * 2
        endpoint.release()
        assert (await lab.say(agent, "Again")).replies == ["Hello!"]


@pytest.mark.usefixtures("_no_pauses")
@pytest.mark.parametrize(
    "answer",
    [
        Reply("Hello", error_in_stream={"message": "The server had an error"}),
        Reply(body="<html>Starting up</html>"),
        Reply("Hello", done=False, empty_choices="all"),
        Reply(status=502, body="<html>Bad gateway</html>"),
        Reply(status=409),
    ],
    ids=["an error in the stream", "HTML with 200", "no end", "502 with HTML", "409"],
)
async def test_any_passing_failure_is_tried_again(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent, answer: Reply
) -> None:
    """Whatever way an endpoint fails for a moment, the third attempt answers."""
    endpoint.script(answer, answer)
    turn = await lab.say(agent, "Hi")
    assert (turn.replies, turn.stop_reason) == (["Hello!"], "done")
    assert [frame["code"] for frame in turn.of("retry")] == ["model_unavailable"] * 2


async def test_unknown_options_are_learned_within_the_turn(endpoint: Endpoint, lab: Lab) -> None:
    """An endpoint that takes none of the options still answers the first turn; later ones do not send them at all."""
    endpoint.refuse = {"stream_options", "temperature", "top_p", "seed"}
    agent = await lab.create(settings={"temperature": 0.5, "top_p": 0.5, "seed": 1})
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]
    count = len(endpoint.requests)
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]
    assert len(endpoint.requests) == count + 1


async def test_a_failing_turn_makes_at_most_eight_calls(endpoint: Endpoint, lab: Lab) -> None:
    """Overflows, broken connections and unreadable answers together never make more than eight calls in a turn."""
    agent = await lab.create(context_window=3_000)
    await lab.say(agent, "word " * 200)
    while agent.used() + memws.MIN_REPLY_TOKENS <= agent.window:
        await lab.say(agent, "word " * 60)
    count = len(endpoint.requests)
    busy = Reply(status=503, headers={"Retry-After": "0"})
    overflow = Reply(status=400, body={"error": {"message": "too long", "code": "context_length_exceeded"}})
    failures = iter([busy, busy, overflow, overflow, Reply(), *[busy] * 20])
    endpoint.default = lambda body: Reply("A summary.") if is_summary(body) else next(failures)
    turn = await lab.say(agent, "Hi")
    assert turn.stop_reason == "error"
    assert len(endpoint.requests) - count <= 8
    endpoint.default = greet
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


# ---- tools of the user -----------------------------------------------------------------------------------------------


def add(a: int, b: int = 2) -> int:
    """Add two numbers."""
    return a + b


async def shout(text: str) -> dict[str, str]:
    """Say it louder."""
    await asyncio.to_thread(text.upper)
    return {"loud": text.upper()}


def broken(x: int) -> None:
    """Fail."""
    raise LookupError(f"no {x}")


async def test_tools_of_the_user_run_between_transactions(endpoint: Endpoint) -> None:
    """Sync and async tools get checked arguments; results, and errors as advice, go to the model and the client."""
    async with Lab(endpoint, tools=[add, shout, broken]) as lab:
        agent = await lab.create()
        endpoint.script(
            Reply("I try.", calls=[("add", {"a": "40"}), ("shout", {"text": "hey"}), ("broken", {"x": 5}), HELLO])
        )
        turn = await lab.say(agent, "Hi")
        assert results(endpoint.requests[1]) == [
            "OK: 42", 'OK: {"loud":"HEY"}', "Failed: LookupError: no 5", "OK: None"
        ]  # fmt: skip
        assert turn.texts("function_message")[:6] == [
            "Running add({'a': '40'})",
            "Success: 42",
            "Running shout({'text': 'hey'})",
            'Success: {"loud":"HEY"}',
            "Running broken({'x': 5})",
            "Error: LookupError: no 5",
        ]
        assert turn.texts("heartbeat") == [memws.HEARTBEAT_FAILED]
        (function,) = (each["function"] for each in endpoint.requests[0]["tools"] if each["function"]["name"] == "add")
        assert function["description"] == "Add two numbers."
        assert function["parameters"]["required"] == ["a"]


async def test_a_tool_runs_once_for_one_call(endpoint: Endpoint) -> None:
    """However the endpoint fails around a tool call, the tool runs once for it."""
    ran: list[int] = []

    def count(number: int) -> int:
        """Count."""
        ran.append(number)
        return number

    async with Lab(endpoint, tools=[count]) as lab:
        agent = await lab.create()
        busy = Reply(status=503, headers={"Retry-After": "0"})
        endpoint.script(busy, Reply(calls=[("count", {"number": 1}), ("count", {"number": 2})]), busy, Reply())
        assert (await lab.say(agent, "Hi")).replies == ["Hello!"]
        await lab.say(await lab.open(), "Again")
    assert ran == [1, 2]


async def test_a_tool_that_takes_too_long_is_given_up(endpoint: Endpoint) -> None:
    """A tool over its time limit fails, sync or async, and the turn goes on; the thread's late result is dropped."""
    release, ended = threading.Event(), threading.Event()

    def slow() -> str:
        """Wait in a thread."""
        release.wait(20)
        ended.set()
        return "late"

    async def slow_async() -> str:
        """Wait on the loop."""
        await asyncio.Event().wait()
        return "late"

    async with Lab(endpoint, tools=[slow, slow_async], timeout=0.05) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[("slow", {}), ("slow_async", {})]))
        turn = await lab.say(agent, "Hi")
        release.set()
        await asyncio.to_thread(ended.wait, 10)
        assert results(endpoint.requests[1]) == [
            "Failed: slow took longer than 0.05 s and was given up",
            "Failed: slow_async took longer than 0.05 s and was given up",
        ]
        assert turn.replies == ["Hello!"]
        await lab.say(agent, "Again")
        assert "late" not in endpoint.bodies[-1].decode()


async def stopping() -> None:
    """Raise what a cancelled task raises."""
    waiting = asyncio.create_task(asyncio.Event().wait())
    waiting.cancel()
    await waiting


def exiting() -> None:
    """Leave the interpreter."""
    raise SystemExit(1)


def iterating() -> None:
    """Raise what no future takes."""
    raise StopIteration


@pytest.mark.parametrize("tool", [stopping, exiting, iterating])
async def test_whatever_a_tool_raises_is_its_failure(endpoint: Endpoint, tool: Callable[..., Any]) -> None:
    """Exceptions that would end a task, a loop or a process end only the call."""
    async with Lab(endpoint, tools=[tool]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[(tool.__name__, {})]))
        turn = await lab.say(agent, "Hi")
        assert results(endpoint.requests[1])[0].startswith("Failed: ")
        assert (turn.replies, turn.stop_reason) == (["Hello!"], "done")


async def test_a_long_result_is_cut(endpoint: Endpoint) -> None:
    """A result of megabytes reaches model and client as its beginning and end, and the turn goes on."""

    def flood() -> str:
        """Return much."""
        return "a" * 3_000_000 + "z"

    async with Lab(endpoint, tools=[flood]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[("flood", {})]))
        turn = await lab.say(agent, "Hi")
        (told,) = turn.texts("tool_return")[:1]
        assert len(told) < 9_000
        assert told.startswith("aaa")
        assert told.endswith("z")
        assert results(endpoint.requests[1]) == [f"OK: {told}"]
        assert "compaction" not in turn.kinds


async def test_a_result_of_any_kind_is_text(endpoint: Endpoint) -> None:
    """What is no JSON is shown by its repr; lone surrogates and NUL are mended."""

    def odd() -> object:
        """Return a set."""
        return {1j}

    def dirty() -> str:
        """Return what SQLite cannot hold."""
        return "a\ud800\x00b"

    async with Lab(endpoint, tools=[odd, dirty]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[("odd", {}), ("dirty", {}), HELLO]))
        await lab.say(agent, "Hi")
        await lab.say(agent, "Again")
        assert results(endpoint.requests[-1])[:2] == ["OK: {1j}", "OK: a\ufffd\ufffdb"]


async def test_the_step_up_to_a_tool_is_stored_before_it_runs(endpoint: Endpoint, tmp_path: Path) -> None:
    """When a user's tool starts, its call and "Running …" are stored and told, and earlier memory edits too."""
    seen: list[Body] = []

    async def look() -> str:
        """Read the database."""
        agent_id = (await home.store.find_agent("sam")).id
        seen.extend(json.loads(text) for _, text in await home.store.events(agent_id, 0, 100))
        blocks, *_ = await home.store.load(agent_id, 0)
        return next(block.value for block in blocks if block.label == "human")

    async with Lab(endpoint, tmp_path / "memws.db", tools=[look]) as home:
        agent = await home.create()
        endpoint.script(Reply("I look.", calls=[APPEND, ("look", {}), HELLO]))
        turn = await home.say(agent, "Hi")
        assert seen[-1]["message"] == "Running look({})"
        assert [event.text for event in turn.events if event.seq is not None][: len(seen)] == [
            memws.encode_json(frame) for frame in seen
        ]
        assert turn.texts("tool_return")[1] == "Name: Zoe"


# ---- the context window ----------------------------------------------------------------------------------------------


async def test_the_agent_is_warned_once_before_the_window_is_full(endpoint: Endpoint, lab: Lab) -> None:
    """At 75 % of the window the model is told once to save what matters, gets a step to do so, and clients see it."""
    agent = await lab.create(context_window=3_000)
    warned: list[int] = []
    share = 0.0
    for number in range(100):
        turn = await lab.say(agent, f"Message {number}. " + "word " * 20)
        assert turn.replies[0] == "Hello!"
        for frame in turn.of("context"):
            before, share = share, frame["used"] / frame["window"]
            if "warning" in frame:
                warned.append(number)
                assert before <= 0.75 < share
                (alert,) = packed(endpoint.requests[-1], "system_alert")
                assert alert["message"] == memws.PRESSURE_WARNING
        if turn.of("compaction"):
            break
    assert len(warned) == 1
    assert number > warned[0]
    assert turn.stop_reason == "done"
    assert agent.record.state["warned"] is False, "after a compaction it may be warned again"


async def test_no_turn_is_warned_twice(endpoint: Endpoint, lab: Lab) -> None:
    """Where the blocks alone nearly fill the window, a turn still has one warning at most and ends with its reply."""
    agent = await lab.create(context_window=3_000, persona="p" * 2_000, human="h" * 2_000)
    for number in range(30):
        turn = await lab.say(agent, f"Message {number}. " + "word " * (number * 7 % 60))
        assert sum("warning" in frame for frame in turn.of("context")) <= 1
        assert (turn.replies[0], turn.stop_reason) == ("Hello!", "done")


async def test_the_context_event_adds_up(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """The sections of a context event add up to what is used, and that is what the endpoint counts, roughly."""
    await lab.say(agent, "Hi")
    for text in ("One", "Two", "Three"):
        turn = await lab.say(agent, text)
    (frame,) = turn.of("context")
    assert [section["name"] for section in frame["sections"]] == [
        "system", "tools", "core_memory", "summary", "messages"
    ]  # fmt: skip
    assert abs(sum(section["tokens"] for section in frame["sections"]) - frame["used"]) <= 10
    assert frame["window"] == 8_192
    await lab.say(agent, "Four")
    real = sum(prompt_tokens(endpoint.requests[-1]))
    assert 0.8 * real < frame["used"] < 1.25 * real


async def test_a_long_conversation_in_a_small_window(endpoint: Endpoint, lab: Lab) -> None:
    """Over 200 messages in 3,000 tokens every compaction makes the prompt smaller, and old facts stay findable."""
    endpoint.context_window = 3_000
    agent = await lab.create(context_window=3_000)
    compactions: list[Body] = []
    for number in range(200):
        sizes = len(endpoint.requests)
        turn = await lab.say(agent, f"The code of locker {number} is {number * 7919 % 10_000:04}. " + "Really. " * 8)
        assert turn.replies[0] == "Hello!"
        assert turn.stop_reason == "done"
        compactions += turn.of("compaction")
        if turn.of("compaction"):
            asked = [sum(prompt_tokens(body)) for body in endpoint.requests[sizes - 1 :] if not is_summary(body)]
            assert min(asked[1:]) < asked[0], "the real prompt is smaller than the last one"
    assert len(compactions) >= 5
    for frame in compactions:
        assert frame["tokens_after"] < frame["tokens_before"]
        assert frame["messages_after"] < frame["messages_before"]
        assert frame["summary"] == "Hello!"
    assert endpoint.refusals == []
    assert max(sum(prompt_tokens(body)) for body in endpoint.requests) <= 3_000
    _, result = await call(lab, agent, "conversation_search", query="code of locker 3")
    assert "The code of locker 3 is 3757." in result


async def test_the_summary_takes_the_place_of_the_oldest_messages(endpoint: Endpoint, lab: Lab) -> None:
    """After a compaction the summary stands first, names what is hidden, survives a load and enters the next one."""
    endpoint.default = summaries(lambda body: Reply(f"Summary {sum(map(is_summary, endpoint.requests))}"))
    agent = await lab.create(context_window=3_000)
    for number in range(60):
        await lab.say(agent, f"Message {number}. " + "word " * 30)
    asked = [body for body in endpoint.requests if is_summary(body)]
    assert len(asked) >= 2
    assert "Message 0. " in asked[0]["messages"][1]["content"]
    assert "tools" not in asked[0]
    for number, body in enumerate(asked[1:], 1):
        assert f"Summary of what came before: Summary {number}" in body["messages"][1]["content"]
    agent = await lab.open()
    await lab.say(agent, "Hi")
    (alert,) = packed({"messages": endpoint.requests[-1]["messages"][:2]}, "system_alert")
    told = r"prior messages \((\d+) of (\d+)\).*conversation_search finds them.*Summary (\d+)$"
    found = re.search(told, alert["message"], re.DOTALL)
    assert found
    assert int(found[3]) == len(asked)
    assert int(found[1]) == agent.messages[0].id - 1
    assert endpoint.requests[-1]["messages"][2]["role"] in ("user", "assistant")


@pytest.mark.parametrize(
    "answer",
    [
        Reply(status=500),
        Reply(status=400, body={"error": {"message": "too long", "code": "context_length_exceeded"}}),
        Reply(),
        Reply("x", cut_after=1),
        Reply(refusal="I won't."),
        Reply(calls=[HELLO]),
    ],
    ids=["500", "overflow", "empty", "reset", "refusal", "a call"],
)
async def test_without_a_summary_by_the_model_there_is_still_a_compaction(
    endpoint: Endpoint, lab: Lab, answer: Reply
) -> None:
    """Where the model gives no summary the last words of what is hidden stand in, and the turn goes on."""
    endpoint.default = summaries(answer)
    agent = await lab.create(context_window=3_000)
    for number in range(40):
        turn = await lab.say(agent, f"Message {number}. " + "word " * 30)
        assert turn.replies[:1] == ["Hello!"]
        if turn.of("compaction"):
            break
    (frame,) = turn.of("compaction")
    assert frame["tokens_after"] < frame["tokens_before"]
    assert "Message" in frame["summary"]
    assert turn.stop_reason == "done"


async def test_a_summary_is_the_words_and_not_the_thoughts(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Thoughts in tags, as reasoning models without a parser write them, do not fill the summary."""
    for number in range(5):
        await lab.say(agent, f"Message {number}. " + "word " * 100)
    endpoint.script(Reply(f"<think>{'Hm. ' * 900}</think>\n\nZoe counts messages."))
    (event,) = [event async for event in agent.compact()]
    assert event.fields["summary"] == "Zoe counts messages."


async def test_a_summary_that_is_too_long_is_cut(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A summary longer than what it replaces is cut until the prompt is smaller."""
    for number in range(3):
        await lab.say(agent, f"Message {number}")
    before = agent.used()
    endpoint.script(Reply("long " * 5_000))
    (event,) = [event async for event in agent.compact()]
    assert event.fields["tokens_after"] < event.fields["tokens_before"] == before
    assert agent.used() < before
    await lab.check_stored(agent)


async def test_an_overflow_that_only_the_endpoint_sees(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Where the endpoint's window is smaller than ours its refusal leads to a compaction, and the turn succeeds."""
    while sum(prompt_tokens(endpoint.requests[-1])) < 2_000 if endpoint.requests else True:
        await lab.say(agent, "word " * 40)
    endpoint.context_window = 1_700
    for text in ("One", "Two", "Three"):
        turn = await lab.say(agent, text)
        assert (turn.replies, turn.stop_reason) == (["Hello!"], "done")
        for frame in turn.of("compaction"):
            assert frame["tokens_after"] < frame["tokens_before"]
    last = sent(endpoint.requests[-1])
    assert sum(prompt_tokens(endpoint.requests[-1])) <= 1_700
    assert last[-1]["content"]["message"] == "Three"


async def test_an_overflow_that_cannot_be_helped(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Where nothing is left to cut the turn ends with context_overflow; the next may work again."""
    endpoint.context_window = 100
    turn = await lab.say(agent, "Hi")
    assert (turn.end["code"], turn.stop_reason) == ("context_overflow", "error")
    assert len(endpoint.requests) <= 8
    endpoint.context_window = None
    assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_a_message_that_fills_the_window(endpoint: Endpoint, lab: Lab) -> None:
    """A user's message or a tool's result longer than the window is shown in part and kept whole."""
    endpoint.context_window = 3_000
    agent = await lab.create(context_window=3_000)
    text = "start " + "word " * 12_000 + "end"
    for _ in range(3):
        turn = await lab.say(agent, text)
        assert turn.replies[0] == "Hello!"
    stored, _ = await lab.store.messages(agent.id, None, 200)
    assert [message.text for message in stored if message.role == "user"] == [text] * 3
    shown = packed(endpoint.requests[-1], "user_message")[-1]["message"]
    assert shown.startswith("start ")
    assert shown.endswith("end")
    assert "characters left out here" in shown


async def test_a_reply_that_fills_the_window(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A reply longer than the window and than a frame reaches the user in parts, whole, and the next turn works."""
    endpoint.context_window = 8_192
    reply = "".join(f"{number} words; " for number in range(30_000))
    endpoint.script(Reply(calls=[("send_message", {"message": reply})], chunk=50_000))
    turn = await lab.say(agent, "Hi")
    said = [frame for frame in turn.of("assistant_message") if frame["step"] == 1]
    assert "".join(frame["message"] for frame in said) == reply
    assert [(frame["part"], frame["parts"]) for frame in said] == [(n, len(said)) for n in range(1, len(said) + 1)]
    assert all(len(event.frame("sam").encode()) < memws.MAX_FRAME for event in turn.events)
    whole = "".join(frame["message"] for frame in turn.of("tool_call") if frame["step"] == 1)
    assert json.loads(whole) == {"message": reply}
    assert turn.of("tool_call")[0]["arguments"] is None
    assert (await lab.say(agent, "Again")).replies[:1] == ["Hello!"]


async def test_results_that_together_fill_the_window(endpoint: Endpoint) -> None:
    """Many long results of one step are more than the window: they leave together with their calls."""

    def flood(number: int) -> str:
        """Return much."""
        return f"{number} words; " * 3_000

    async with Lab(endpoint, tools=[flood]) as lab:
        endpoint.context_window = 8_192
        agent = await lab.create()
        endpoint.script(Reply(calls=[("flood", {"number": number}) for number in range(8)]))
        turn = await lab.say(agent, "Hi")
        assert (turn.replies[:1], turn.stop_reason) == (["Hello!"], "done")
        assert turn.of("compaction")


async def test_a_compaction_keeps_the_message_that_waits(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """When a compaction inside a turn hides the user's message, the summary quotes it."""
    endpoint.context_window = 1_800
    endpoint.script(*[Reply(calls=[beat("archival_memory_insert", content=f"{n} " + "word " * 60)]) for n in range(10)])
    turn = await lab.say(agent, "What is the magic word?")
    assert turn.stop_reason == "done"
    assert turn.of("compaction")
    assert "What is the magic word?" in endpoint.bodies[-1].decode()


async def test_a_compaction_by_request(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """compact() makes the prompt smaller between turns; where there is nothing to cut it is context_overflow."""
    with pytest.raises(memws.ModelError) as caught:
        _ = [event async for event in agent.compact()]
    assert caught.value.code == "context_overflow"
    await lab.say(agent, "word " * 300)
    await lab.say(agent, "word " * 300)
    before, seq = agent.used(), agent.last_seq
    (event,) = [event async for event in agent.compact()]
    assert (event.message_type, event.seq, event.turn_id) == ("compaction", seq + 1, None)
    assert event.fields["tokens_before"] == before
    assert abs(event.fields["tokens_after"] - agent.used()) <= 5
    assert agent.used() < before
    await lab.check_stored(agent)
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]


async def test_an_endpoint_that_cuts_prompts_silently_is_noticed(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent
) -> None:
    """Usage far under what was sent, twice, gives a warning that names --context-window; an honest count ends it."""
    cut = {"prompt_tokens": 300, "completion_tokens": 5}
    warnings = []
    for usage in (cut, cut, cut, "auto"):
        endpoint.script(Reply(calls=[HELLO], usage=usage))
        (frame,) = (await lab.say(agent, "Hi")).of("context")
        warnings.append(frame.get("warning", ""))
    assert ["--context-window" in warning for warning in warnings] == [False, True, True, False]


@pytest.mark.parametrize(("counted", "low", "high"), [(10, 0.5, 0.75), (1_000_000, 1.5, 2.0)])
async def test_estimates_are_calibrated_within_bounds(
    endpoint: Endpoint, lab: Lab, agent: memws.Agent, counted: int, low: float, high: float
) -> None:
    """The endpoint's counts pull the estimate towards them, but never below half or above twice."""
    endpoint.default = Reply(calls=[HELLO], usage={"prompt_tokens": counted, "completion_tokens": 1})
    for _ in range(8):
        await lab.say(agent, "Hi")
    assert low <= agent.model.ratio <= high


# ---- requests as they were sent --------------------------------------------------------------------------------------


async def test_requests_are_rebuilt_byte_by_byte(endpoint: Endpoint, tmp_path: Path) -> None:
    """What was sent for any step comes back exactly, also after edits, compactions, retries and a load."""
    async with Lab(endpoint, tmp_path / "memws.db", tools=[add]) as lab:
        agent = await lab.create(context_window=3_500, settings={"temperature": 0.5})
        expected: dict[tuple[str, int], bytes] = {}

        async def say(text: str, *answers: Answer) -> None:
            endpoint.script(*answers)
            start = len(endpoint.bodies)
            turn = lab.turn(text)
            told = await lab.run(agent, turn)
            asked = [
                body
                for body, request in zip(endpoint.bodies[start:], endpoint.requests[start:], strict=True)
                if not is_summary(request)
            ]
            # The last call of each step is the one that is kept.
            repeated = len(told.of("retry"))
            steps = max(frame["step"] for frame in told.of("context"))
            assert len(asked) == steps + repeated
            for step, body in enumerate(asked[repeated:], 1):
                expected[turn.turn_id, step] = body

        await say("One", Reply("Ü", calls=[beat("core_memory_append", **APPEND[1]), ("add", {"a": 1})]))
        await say("Two", Reply(status=503, headers={"Retry-After": "0"}))
        await say("Three", Reply())
        for number in range(12):
            await say(f"{number} " + "word 世界 " * 40)
        assert agent.record.state["summary"]
        for opened in (agent, await lab.open()):
            for (turn_id, step), body in expected.items():
                got = await opened.request(turn_id, step)
                assert memws.encode_json(got["request"]).encode() == body
                assert got["usage"]["input_tokens"] > 0
                assert got["total_ms"] >= got["first_token_ms"] >= 0
                assert got["response"]["finish_reason"] == "tool_calls"
        with pytest.raises(memws.Refused) as caught:
            await agent.request("turn-1", 99)
        assert caught.value.code == "not_found"


async def test_a_failed_request_keeps_its_error(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """get_request of a call that failed tells why."""
    endpoint.script(Reply(status=401))
    await lab.say(agent, "Hi")
    got = await agent.request("turn-1", 1)
    assert got["response"]["error"]["code"] == "model_auth"
    assert memws.encode_json(got["request"]).encode() == endpoint.bodies[0]


# ---- cancel ----------------------------------------------------------------------------------------------------------


async def cancel_when(lab: Lab, agent: memws.Agent, happens: Callable[[memws.Event], bool], text: str = "Hi") -> Told:
    """Run a turn and stop it from another task, as a session does, once such an event was told."""
    turn, told = lab.turn(text), asyncio.Event()

    async def stop() -> None:
        await told.wait()
        turn.stop("cancelled")

    stopping = asyncio.create_task(stop())
    result = await lab.run(agent, turn, lambda event: told.set() if happens(event) else None)
    await stopping
    return result


async def cancel_after_request(lab: Lab, agent: memws.Agent, count: int, text: str = "Hi") -> Told:
    """Run a turn and stop it once so many requests have arrived at the endpoint in all."""
    turn = lab.turn(text)

    async def stop() -> None:
        await asyncio.to_thread(lab.endpoint.wait_requests, count)
        turn.stop("cancelled")

    stopping = asyncio.create_task(stop())
    result = await lab.run(agent, turn)
    await stopping
    return result


async def check_goes_on(lab: Lab, agent: memws.Agent, first: str = "Hi") -> None:
    """The next plain turn works, here and for a server that has just started, and knows what was said."""
    assert (await lab.say(agent, "And now?")).replies == ["Hello!"]
    texts = [message["message"] for message in packed(lab.endpoint.requests[-1], "user_message")]
    assert texts == [first, "And now?"]
    reopened = await lab.open()
    assert reopened.repairs == []
    assert (await lab.say(reopened, "Still there?")).replies == ["Hello!"]


async def test_a_turn_cancelled_before_it_starts(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A turn that is stopped before its first call keeps the message and calls no model."""
    turn = lab.turn("Hi")
    turn.stop("superseded")
    assert (await lab.run(agent, turn)).stop_reason == "superseded"
    assert endpoint.requests == []
    await check_goes_on(lab, agent)


async def test_cancel_while_the_model_is_awaited(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A turn whose model has not begun to answer ends at once, with the message kept."""
    endpoint.script(Reply(hold=True))
    turn = await cancel_after_request(lab, agent, 1)
    assert (turn.end["type"], turn.stop_reason) == ("agent_response_end", "cancelled")
    assert turn.kinds == ["user_message"]
    await check_goes_on(lab, agent)


async def test_cancel_in_mid_stream_keeps_the_partial_reply(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """What the user has seen of a reply is kept, marked as partial, and the model learns where it was cut."""
    endpoint.script(Reply("I think.", calls=[("send_message", {"message": "Once upon a time"})], stall_after=7))
    turn = await cancel_when(lab, agent, lambda event: event.fields.get("of") == "assistant_message")
    assert turn.stop_reason == "cancelled"
    (reply,) = turn.of("assistant_message")
    assert reply["partial"] is True
    assert reply["message"]
    assert "Once upon a time".startswith(reply["message"])
    assert turn.texts("internal_monologue") == ["I think."]
    await check_goes_on(lab, agent)
    (said,) = (call for message in endpoint.requests[1]["messages"] for call in message.get("tool_calls", ()))
    assert json.loads(said["function"]["arguments"]) == {"message": reply["message"]}
    assert results(endpoint.requests[1]) == ["Failed: cancelled: the user has seen only this much"]
    found, _ = await lab.store.search(agent.id, "upon", ("recall",), ("assistant",), None, None, 10, 0)
    assert found[0].text == reply["message"]


async def test_cancel_in_mid_stream_of_plain_text(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Plain text that was cut is kept too."""
    endpoint.script(Reply("Once upon a time", stall_after=2))
    turn = await cancel_when(lab, agent, lambda event: event.message_type == "delta")
    assert turn.stop_reason == "cancelled"
    await check_goes_on(lab, agent)
    assert "Once upo" in endpoint.bodies[1].decode()


async def test_cancel_in_mid_stream_of_another_call(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A call that was cut does not run."""
    endpoint.script(Reply("I note it.", calls=[APPEND], stall_after=6))
    turn = await cancel_when(lab, agent, lambda event: event.message_type == "delta")
    assert (turn.stop_reason, turn.of("tool_call"), agent.blocks["human"].value) == ("cancelled", [], "")
    await check_goes_on(lab, agent)


async def test_cancel_in_the_pause_before_a_retry(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A pause of half a minute ends at once."""
    endpoint.script(Reply(status=429, headers={"Retry-After": "29"}))
    turn = await cancel_when(lab, agent, lambda event: event.message_type == "retry")
    assert (turn.stop_reason, len(endpoint.requests)) == ("cancelled", 1)
    await check_goes_on(lab, agent)


async def test_cancel_in_an_async_tool(endpoint: Endpoint) -> None:
    """An async tool is cancelled; its call, and those after it, have results that say so; those before it are done."""
    ended: list[str] = []

    async def wait() -> None:
        """Wait for ever."""
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    async with Lab(endpoint, tools=[wait]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[APPEND, ("wait", {}), HELLO]))
        turn = await cancel_when(lab, agent, lambda event: event.fields.get("message") == "Running wait({})")
        assert (turn.stop_reason, ended, turn.replies) == ("cancelled", ["cancelled"], [])
        assert turn.texts("tool_return") == ["None", "cancelled: result unknown", "cancelled before it ran"]
        assert agent.blocks["human"].value == "Name: Zoe"
        await check_goes_on(lab, agent)


async def test_cancel_in_a_sync_tool(endpoint: Endpoint) -> None:
    """The turn ends while the tool's thread goes on; its result is dropped, and it does not run again."""
    release, ended, ran = threading.Event(), threading.Event(), []

    def work() -> str:
        """Work for long."""
        ran.append(1)
        release.wait(20)
        ended.set()
        return "too late"

    async with Lab(endpoint, tools=[work]) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[("work", {})]))
        turn = await cancel_when(lab, agent, lambda event: event.fields.get("message") == "Running work({})")
        assert not ended.is_set()
        assert (turn.stop_reason, turn.texts("tool_return")) == ("cancelled", ["cancelled: result unknown"])
        release.set()
        await asyncio.to_thread(ended.wait, 10)
        await check_goes_on(lab, agent)
        assert len(ran) == 1
        assert "too late" not in endpoint.bodies[-1].decode()


async def test_cancel_while_the_summary_is_made(endpoint: Endpoint, lab: Lab) -> None:
    """A turn that is stopped inside its compaction ends without it; the next one compacts."""
    endpoint.default = summaries(Reply(hold=True))
    agent = await lab.create(context_window=3_000)
    while agent.used() + memws.MIN_REPLY_TOKENS <= agent.window - 30:
        await lab.say(agent, "word " * 30)
    turn = await cancel_after_request(lab, agent, len(endpoint.requests) + 1, "word " * 60)
    assert is_summary(endpoint.requests[-1])
    assert (turn.stop_reason, turn.of("compaction")) == ("cancelled", [])
    endpoint.default = greet
    turn = await lab.say(agent, "And now?")
    assert (turn.replies, len(turn.of("compaction"))) == (["Hello!"], 1)


async def test_cancel_between_two_steps(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """What a step did stays done; the next step's model call is broken off."""
    endpoint.script(Reply(calls=[beat("core_memory_append", **APPEND[1])]), Reply(hold=True))
    turn = await cancel_after_request(lab, agent, 2)
    assert (turn.stop_reason, agent.blocks["human"].value) == ("cancelled", "Name: Zoe")
    assert turn.kinds[-1] == "context"
    await check_goes_on(lab, agent)


@pytest.mark.parametrize("kind", ["user_message", "tool_call", "tool_return", "assistant_message", "context"])
async def test_cancel_at_any_event(endpoint: Endpoint, lab: Lab, agent: memws.Agent, kind: str) -> None:
    """A stop that comes between two events, at whichever, ends the turn in good order."""
    endpoint.script(Reply("I note it.", calls=[beat("core_memory_append", **APPEND[1]), HELLO]))
    endpoint.default = lambda body: Reply(hold=True)
    turn = await cancel_when(lab, agent, lambda event: event.message_type == kind)
    assert turn.stop_reason == "cancelled"
    endpoint.default = greet
    assert (await lab.say(agent, "And now?")).replies[-1:] == ["Hello!"]


async def test_a_cancelled_step_is_over_for_good(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A second stop changes nothing, nor does one after the end."""
    endpoint.script(Reply(hold=True))
    turn = lab.turn("Hi")

    async def stop() -> None:
        await asyncio.to_thread(endpoint.wait_requests, 1)
        turn.stop("superseded")
        turn.stop("cancelled")

    stopping = asyncio.create_task(stop())
    assert (await lab.run(agent, turn)).stop_reason == "superseded"
    await stopping
    turn.stop("cancelled")
    await check_goes_on(lab, agent)


# ---- crashes ---------------------------------------------------------------------------------------------------------


def photograph(path: Path, copy: Path) -> None:
    """Copy a database as a killed process would leave it: what is in the file and its log."""
    for suffix in ("", "-wal"):
        if path.with_name(path.name + suffix).exists():
            shutil.copy(path.with_name(path.name + suffix), copy.with_name(copy.name + suffix))


async def check_after_crash(
    endpoint: Endpoint, path: Path, tools: list[Callable[..., Any]], told: list[str]
) -> list[Body]:
    """Open the agent as a restarted server does: it repairs once, says so, and talks on; the events of the repair.

    `told` are the texts of the events that a client had already got before the crash: they stay the same.
    """
    async with Lab(endpoint, path, tools=tools) as lab:
        record = await lab.store.find_agent("sam")
        before = [text for _, text in await lab.store.events(record.id, 0, 1_000)]
        assert before[: len(told)] == told
        agent = await lab.open()
        assert any("interrupted" in repair for repair in agent.repairs)
        after = [text for _, text in await lab.store.events(record.id, 0, 1_000)]
        assert after[: len(before)] == before
        assert [json.loads(text)["seq"] for text in after] == list(range(1, len(after) + 1))
        await lab.check_stored(agent)
        assert (await lab.open()).repairs == []
        turn = await lab.run(agent, memws.Turn("after-the-crash", "And now?"))
        assert turn.replies == ["Hello!"]
        texts = [message["message"] for message in packed(endpoint.requests[-1], "user_message")]
        assert texts == ["Hi", "And now?"]
        return [json.loads(text) for text in after[len(before) :]]


@pytest.mark.parametrize("crash", range(3))
async def test_a_crash_while_the_model_is_awaited(endpoint: Endpoint, tmp_path: Path, crash: int) -> None:
    """Killed while the model answers step 1, 2 or 3: the turn gets its end, what was stored is there once."""
    path, copy = tmp_path / "memws.db", tmp_path / "copy.db"
    answers = [
        Reply(calls=[beat("core_memory_append", **APPEND[1])]),
        Reply(calls=[beat("archival_memory_insert", content="x")]),
    ]
    told: list[str] = []
    seen: list[memws.Event] = []

    def killed(body: Body) -> Reply:
        told.extend(event.text for event in seen if event.seq is not None)
        photograph(path, copy)
        return [*answers, Reply(calls=[HELLO])][crash]

    async with Lab(endpoint, path) as lab:
        agent = await lab.create()
        endpoint.script(*answers[:crash], killed)
        await lab.run(agent, lab.turn("Hi"), seen.append)
    (end,) = await check_after_crash(endpoint, copy, [], told)
    assert (end["type"], end["stop_reason"], end["turn_id"]) == ("agent_response_end", "interrupted", "turn-1")
    assert [end["usage"][name] for name in ("input_tokens", "model_calls")] == [0, 0]
    async with Lab(endpoint, copy) as lab:
        agent = await lab.open()
        assert agent.blocks["human"].value == ("Name: Zoe" if crash >= 1 else "")
        assert agent.archival == (1 if crash >= 2 else 0)


@pytest.mark.parametrize(
    "calls", [["work"], [APPEND, "work"], ["work", HELLO], [APPEND, "work", "work", HELLO]], ids=str
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_crash_while_a_tool_runs(endpoint: Endpoint, tmp_path: Path, calls: list[Any], is_async: bool) -> None:
    """Killed inside a user's tool: open calls get "interrupted: result unknown", and the tool does not run again."""
    path, copy = tmp_path / "memws.db", tmp_path / "copy.db"
    ran: list[str] = []
    told: list[str] = []
    seen: list[memws.Event] = []

    def work_in_thread(number: int) -> str:
        """Work."""
        if not ran:
            told.extend(event.text for event in seen if event.seq is not None)
            photograph(path, copy)
        ran.append(f"work {number}")
        return "done"

    async def work_on_loop(number: int) -> str:
        """Work."""
        return work_in_thread(number)

    tool = work_on_loop if is_async else work_in_thread
    numbered = [(tool.__name__, {"number": n}) if call == "work" else call for n, call in enumerate(calls)]
    async with Lab(endpoint, path, tools=[tool]) as lab:
        agent = await lab.create()
        endpoint.script(Reply("I work.", calls=numbered))
        await lab.run(agent, lab.turn("Hi"), seen.append)
    count = len(ran)
    assert json.loads(told[-1])["message"].startswith(f"Running {tool.__name__}(")
    *mended, end = await check_after_crash(endpoint, copy, [tool], told)
    assert len(ran) == count
    assert end["stop_reason"] == "interrupted"
    returns = [frame for frame in mended if frame["message_type"] == "tool_return"]
    open_calls = len(calls) - calls.index("work")
    assert [frame["message"] for frame in returns] == ["interrupted: result unknown"] * open_calls
    assert {frame["turn_id"] for frame in mended} == {"turn-1"}
    done = ["OK: None"] * calls.index("work")
    assert results(endpoint.requests[-1]) == done + ["Failed: interrupted: result unknown"] * open_calls


async def test_a_broken_history_is_mended_and_told(endpoint: Endpoint, lab: Lab) -> None:
    """A history that no endpoint would take, of whatever origin, is cut where it is broken; recall keeps it all."""
    agent = await lab.create()
    await lab.say(agent, "My dog is called Rex")
    unpaired = {"id": "a", "type": "function", "function": {"name": "x", "arguments": "{}"}}
    bodies: list[Body] = [
        {"role": "assistant", "content": None, "tool_calls": [unpaired]},
        {"role": "user", "content": memws.pack("user_message", message="Rex barks")},
        {"role": "tool", "tool_call_id": "b", "content": memws.pack_result(True, "x")},
    ]
    messages = [
        memws.ChatMessage(agent.last_message + n, body["role"], memws.now_text(), "", memws.encode_json(body))
        for n, body in enumerate(bodies, 1)
    ]
    await lab.store.commit(agent.id, memws.Changes(messages=messages))
    agent = await lab.open()
    assert agent.repairs
    events = [json.loads(text) for _, text in await lab.store.events(agent.id, 0, 100)]
    assert (events[-1]["message_type"], events[-1]["what"]) == ("correction", "history")
    assert (await lab.say(agent, "Hi")).replies == ["Hello!"]
    _, result = await call(lab, agent, "conversation_search", query="dog")
    assert "My dog is called Rex" in result


# ---- edits from outside ----------------------------------------------------------------------------------------------


async def test_passages_come_and_go(lab: Lab, agent: memws.Agent) -> None:
    """Passages put in and taken out from outside are told, found, and their ids are never used again."""
    for text in ("One", "Two"):
        (event,) = [event async for event in agent.insert_passage(text)]
        assert (event.fields["what"], event.fields["after"], event.fields["by"]) == ("archival", text, "client")
    (event,) = [event async for event in agent.delete_passage(2)]
    assert (event.fields["id"], event.fields["before"], event.fields["after"]) == (2, "Two", None)
    assert agent.archival == 1
    with pytest.raises(memws.Refused, match="no passage 2") as caught:
        _ = [event async for event in agent.delete_passage(2)]
    assert caught.value.code == "not_found"
    agent = await lab.open()
    (event,) = [event async for event in agent.insert_passage("Three")]
    assert event.fields["id"] == 3
    _, result = await call(lab, agent, "archival_memory_search", query="")
    assert [item["text"] for item in json.loads(result.split(": ", 2)[2])] == ["Three", "One"]


async def test_an_edit_while_the_model_answers(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """A block set while a step's answer is awaited is not lost: the step's own edit goes on top of it."""
    endpoint.script(Reply(calls=[APPEND, ("archival_memory_insert", {"content": "Mine"}), HELLO], hold=True))
    events: list[memws.Event] = []

    async def drive() -> None:
        events.extend([event async for event in agent.turn(lab.turn("Hi"))])

    driving = asyncio.create_task(drive())
    await asyncio.to_thread(endpoint.wait_requests, 1)
    events += [event async for event in agent.set_block("human", "Town: Oslo", None)]
    events += [event async for event in agent.insert_passage("Yours")]
    endpoint.release()
    await asyncio.wait_for(driving, 10)
    assert agent.blocks["human"].value == "Town: Oslo\nName: Zoe"
    assert agent.archival == 2
    assert [event.fields["id"] for event in events if event.fields.get("what") == "archival"] == [1, 2]
    seqs = sorted(event.seq for event in events if event.seq is not None)
    assert seqs == list(range(1, agent.last_seq + 1))
    await lab.check_stored(agent)
    got = await agent.request("turn-1", 1)
    assert memws.encode_json(got["request"]).encode() == endpoint.bodies[0]


async def test_an_edit_while_a_tool_runs(endpoint: Endpoint) -> None:
    """What is edited while a user's tool runs stays, and later calls of the step build on it."""

    async def meddle() -> None:
        """Edit from outside."""
        edits.extend([event async for event in agent.insert_passage("Yours")])
        edits.extend([event async for event in agent.set_block("human", "Town: Oslo", None)])

    edits: list[memws.Event] = []
    async with Lab(endpoint, tools=[meddle]) as lab:
        agent = await lab.create()
        calls = [APPEND, ("meddle", {}), ("archival_memory_insert", {"content": "Mine"}), APPEND, HELLO]
        endpoint.script(Reply(calls=calls))
        told = [event async for event in agent.turn(lab.turn("Hi"))]
        assert agent.blocks["human"].value == "Town: Oslo\nName: Zoe"
        assert agent.archival == 2
        seqs = [event.seq for event in [*told, *edits] if event.seq is not None]
        assert sorted(seqs) == list(range(1, agent.last_seq + 1))
        await lab.check_stored(agent)
        assert (await lab.say(agent, "Again")).replies == ["Hello!"]


async def test_another_config(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """An agent takes another config at once; one that leaves no room is refused and changes nothing."""

    async def update(**config: Any) -> list[memws.Event]:
        checked = memws.AgentConfig(config, lab.tools, agent.record.config)
        return [event async for event in agent.update(checked)]

    before = agent.settings()
    with pytest.raises(memws.Refused, match="1,000 tokens are too few"):
        await update(context_window=1_000, max_steps=3)
    assert agent.settings() == before
    (event,) = await update(max_steps=3, system="Be brief.", tools=["send_message"], settings={"temperature": 0.1})
    assert (event.message_type, event.fields["change"]) == ("agent_change", "updated")
    for _ in range(2):
        assert (await lab.say(agent, "Hi")).replies == ["Hello!"]
        request = endpoint.requests[-1]
        assert request["messages"][0]["content"].startswith("Be brief.\n")
        assert [tool["function"]["name"] for tool in request["tools"]] == ["send_message"]
        assert request["temperature"] == 0.1
        assert agent.max_steps == 3
        agent = await lab.open()


async def test_a_tool_that_is_gone_is_left_out(endpoint: Endpoint, tmp_path: Path) -> None:
    """An agent whose tool is not registered any more opens with a warning, and its old calls stay in the history."""
    async with Lab(endpoint, tmp_path / "memws.db", tools=[add]) as lab:
        endpoint.script(Reply(calls=[("add", {"a": 1}), HELLO]))
        await lab.say(await lab.create(), "Hi")
    async with Lab(endpoint, tmp_path / "memws.db") as lab:
        agent = await lab.open()
        assert agent.warnings == ["tools that are not registered now are left out: add"]
        assert (await lab.run(agent, memws.Turn("t", "Again"))).replies == ["Hello!"]
        assert "add" not in [tool["function"]["name"] for tool in endpoint.requests[-1]["tools"]]


# ---- a database that fails -------------------------------------------------------------------------------------------


async def test_a_step_that_cannot_be_stored_leaves_nothing(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """When the database refuses a step its edits are not kept, and one terminal error without a seq says so."""
    endpoint.script(Reply(calls=[APPEND, ("archival_memory_insert", {"content": "x"}), HELLO], hold=True))
    events: list[memws.Event] = []

    async def drive() -> None:
        events.extend([event async for event in agent.turn(lab.turn("Hi"))])

    driving = asyncio.create_task(drive())
    await asyncio.to_thread(endpoint.wait_requests, 1)
    await lab.store.delete_agent(agent.id, None, False)
    endpoint.release()
    await asyncio.wait_for(driving, 10)
    stored = [event for event in events if not event.live]
    assert [event.type for event in stored] == ["agent_response_start", "agent_response", "agent_response_error"]
    assert (stored[-1].seq, json.loads(stored[-1].frame("sam"))["code"]) == (None, "store_failed")
    assert (agent.blocks["human"].value, agent.archival) == ("", 0)
    await lab.store.restore_agent("sam", "sam")
    agent = await lab.open()
    assert (agent.blocks["human"].value, agent.archival) == ("", 0)
    assert agent.repairs == ["turn turn-1 was interrupted and got its end"]
    assert (await lab.say(agent, "And now?")).replies == ["Hello!"]


async def test_a_message_that_cannot_be_stored_starts_nothing(endpoint: Endpoint, lab: Lab, agent: memws.Agent) -> None:
    """Where the user's message cannot be stored there is no start: store_failed is raised and nothing has happened."""
    await lab.store.delete_agent(agent.id, None, False)
    with pytest.raises(memws.StoreFailed):
        _ = [event async for event in agent.turn(lab.turn("Hi"))]
    assert endpoint.requests == []
    await lab.store.restore_agent("sam", "sam")
    assert (await lab.open()).last_message == 0


async def test_a_turn_is_kept_with_the_digest_of_its_message(lab: Lab, agent: memws.Agent) -> None:
    """The store knows every turn, where its events are, and by a digest which message it was."""
    turn = await lab.say(agent, "Hi")
    record = await lab.store.turn(agent.id, "turn-1")
    assert record is not None
    assert (record.over, record.digest) == (True, hashlib.sha256(b"Hi").digest())
    assert (record.first_seq, record.last_seq) == (turn.events[0].seq, turn.events[-1].seq)
