"""The laboratory: what enters a turn that runs, and what waits until a person allows it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from endpoint import Endpoint, Reply, say
from wire import JSON, Wire, events_of, is_terminal, messages_of, of_kind, wire

pytestmark = pytest.mark.anyio

ANSWER = [("send_message", {"message": "done"})]


@pytest.fixture
def server(online: Callable[..., Any]) -> Any:
    return online(max_steps=4)


@pytest.fixture
async def client(server: Any) -> AsyncIterator[Wire]:
    async with wire(server, "*", agent={"name": "sam"}) as client:
        yield client


async def held(client: Wire, endpoint: Endpoint, *then: Reply, text: str = "go", **reply: Any) -> str:
    """Start a turn whose model is asked and does not answer yet; its turn_id."""
    before = len(endpoint.requests)
    endpoint.script(Reply(hold=True, **(reply or {"calls": ANSWER})), *then)
    await client.say(text)
    turn_id: str = (await client.started())["turn_id"]
    await asyncio.to_thread(endpoint.wait_requests, before + 1)
    return turn_id


# ---- steering --------------------------------------------------------------------------------------------------------


async def test_a_text_enters_a_running_turn(client: Wire, server: Any, endpoint: Endpoint) -> None:
    """It is in the next request; its receipt is a user_message with its id, also for a client that asked for no such
    type; it has no turn; sent again it gives the receipt again, with another text an error; the turn goes on for it."""
    turn_id = await held(client, endpoint, say("and tea"))
    async with wire(server) as other:
        await other.ok("hello", message_types=[])
        await other.say("tea, please", id="s", agent_name="sam", turn_id="steer", when_busy="steer", **{"from": "Bob"})
        await other.nothing_more()
        endpoint.release()
        receipt = await other.receive()
        about = {name: receipt[name] for name in ("id", "turn_id", "steered", "message", "from", "step")}
        wanted = {"id": "s", "turn_id": turn_id, "steered": "steer", "message": "tea, please", "from": "Bob", "step": 2}
        assert about == wanted
        await other.say("tea, please", id="again", agent_name="sam", turn_id="steer", **{"from": "Bob"})
        assert await other.receive() == receipt | {"id": "again"}
        refusal = (await other.turn("coffee", agent_name="sam", turn_id="steer"))[-1]
        assert refusal["code"] == "turn_id_reused"
        assert (await other.ok("cancel", agent_name="sam", turn_id="steer")) == {"state": "over"}
        await other.nothing_more()
    frames = await client.until(is_terminal)
    assert frames[-1]["stop_reason"] == "done"
    assert [frame["message"] for frame in of_kind(frames, "assistant_message")] == ["done", "and tea"]
    for whole in (frames, await client.turn("go", turn_id=turn_id)):
        assert of_kind(whole, "user_message")[-1]["steered"] == "steer"
    assert "tea, please" in endpoint.requests[1]["messages"][-1]["content"]
    assert await messages_of(client, "sam") == ["go", "tea, please"]
    assert len([frame for frame in await events_of(client) if frame["type"] == "agent_response_start"]) == 1


@pytest.mark.parametrize("how", ["cancel", "max_steps", "error", "idle"])
async def test_a_turn_that_ends_first_makes_it_the_next(client: Wire, endpoint: Endpoint, how: str) -> None:
    """A text that no step of the turn has read becomes the next turn, as where nothing ran."""
    if how != "idle":
        if how == "max_steps":
            await client.ok("update_agent", config={"max_steps": 1})
        await held(client, endpoint, **({"status": 401} if how == "error" else {}))
        await client.say("tea", id="s", turn_id="steer", when_busy="steer")
        assert (await client.ok("get_agent"))["turn"]["step"] == 1
        if how == "cancel":
            await client.ok("cancel")
        endpoint.release()
        assert (await client.ended())["stop_reason"] == {"error": "error", "cancel": "cancelled"}.get(how, how)
    else:
        await client.say("tea", id="s", turn_id="steer", when_busy="steer")
    start = await client.started()
    assert (start["turn_id"], start["id"]) == ("steer", "s")
    end = await client.ended()
    assert (end["id"], end["stop_reason"]) == ("s", "done")
    assert (await messages_of(client, "sam"))[-1] == "tea"


async def test_a_text_is_taken_back(client: Wire, endpoint: Endpoint) -> None:
    """What has not entered yet can be cancelled by its turn_id; eight may wait, as for turns."""
    await held(client, endpoint)
    for number in range(9):
        await client.say(f"text {number}", id=number, turn_id=f"t{number}", when_busy="steer")
    full = await client.ended()
    assert (full["id"], full["code"]) == (8, "queue_full")
    assert await client.ok("cancel", turn_id="t3") == {"state": "removed"}
    codes = [frame["code"] for frame in (*client.before_answer, await client.receive()) if "code" in frame]
    assert codes == ["cancelled"]
    endpoint.release()
    await client.ended()
    texts = [f"text {number}" for number in range(8) if number != 3]
    assert await messages_of(client, "sam") == ["go", *texts]


async def test_a_text_is_taken_back_while_it_enters(client: Wire, endpoint: Endpoint) -> None:
    """It was removed, or it is in the history, and the turn goes on."""
    endpoint.default, texts = say("and?"), []
    for number in range(10):
        await held(client, endpoint)
        texts.append("go")
        await client.say(f"text {number}", turn_id=f"t{number}", when_busy="steer")
        await client.ok("get_agent")  # by then it waits
        endpoint.release()
        await client.until(lambda frame: frame.get("message_type") == "context")
        state = await client.ok("cancel", turn_id=f"t{number}")
        texts += [f"text {number}"] if state == {"state": "over"} else []
        if not any("usage" in frame for frame in client.before_answer):
            assert (await client.until(lambda frame: "usage" in frame))[-1]["stop_reason"] == "done"
    assert await messages_of(client, "sam") == texts


# ---- approvals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def spent(server: Any) -> list[int]:
    """What a tool has spent, each call of which has to be allowed, but for small sums."""
    sums: list[int] = []

    @server.tool(approve=lambda arguments: {5: False, 50: True}[arguments["amount"]])
    def spend(amount: int) -> str:
        sums.append(amount)
        return f"spent {amount}"

    return sums


SPENDS = Reply(calls=[("spend", {"amount": 50, "request_heartbeat": True})])


async def asked(client: Wire, endpoint: Endpoint, *then: Reply) -> JSON:
    """Let the model ask for a call that has to be allowed; the request for that."""
    endpoint.script(SPENDS, *then)
    await client.say("spend it")
    frames = await client.until(lambda frame: frame.get("message_type") == "approval_request")
    assert [frame["message_type"] for frame in frames[-3:-1]] == ["tool_call", "function_message"]
    return frames[-1]


@pytest.fixture
async def buyer(server: Any, spent: list[int]) -> AsyncIterator[Wire]:
    async with wire(server, "*", agent={"name": "sam", "tools": ["spend"]}) as client:
        yield client


ANSWERS: dict[str, tuple[JSON, list[int], str]] = {
    "allowed": ({"allow": True}, [50], "spent 50"),
    "with other arguments": (
        {"allow": True, "arguments": {"amount": 20, "request_heartbeat": True}}, [20],
        'a person had it run with {"amount":20}: spent 20',
    ),
    "denied": ({"allow": False}, [], "not run: a person denied it"),
    "denied, and why": ({"allow": False, "reason": "too dear"}, [], "not run: a person denied it (too dear)"),
}  # fmt: skip


@pytest.mark.parametrize(("answer", "sums", "result"), ANSWERS.values(), ids=ANSWERS.keys())
async def test_a_call_waits_for_a_person(
    server: Any, buyer: Wire, endpoint: Endpoint, spent: list[int], answer: JSON, sums: list[int], result: str
) -> None:
    """It is stored and told, shown by get_agent, answered once by anybody, and the model reads what came of it."""
    request = await asked(buyer, endpoint, say("so be it"))
    call_id = request["tool_call_id"]
    about = {"tool_call_id": call_id, "name": "spend", "arguments": {"amount": 50}}
    assert about.items() <= request.items()
    (waits,) = (await buyer.ok("get_agent"))["turn"]["approvals"]
    assert about.items() <= waits.items()
    assert waits["until"] > request["time"]
    async with wire(server) as other:
        bad = {"tool_call_id": call_id, "allow": True, "arguments": {"amount": "much"}, "agent_name": "sam"}
        assert (await other.command("approve", **bad))["code"] == "bad_field"
        assert (await other.refused("approve", tool_call_id="x", allow=True, agent_name="sam"))["code"] == "not_found"
        assert await other.ok("approve", tool_call_id=call_id, agent_name="sam", **answer) == {}
    frames = await buyer.until(is_terminal)
    assert (await buyer.refused("approve", tool_call_id=call_id, allow=True))["code"] == "not_found"
    (told,) = [frame for frame in of_kind(frames, "tool_return") if frame["name"] == "spend"]
    assert (told["message"], spent) == (result, sums)
    assert result in endpoint.requests[1]["messages"][-2]["content"].replace('\\"', '"')
    assert frames[-1]["stop_reason"] == "done"


async def test_what_needs_nobody(
    buyer: Wire, endpoint: Endpoint, spent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule decides by the arguments; a rule that fails asks."""
    monkeypatch.setattr("memws.APPROVAL_TIMEOUT", 0.05)
    for amount in (5, 6):
        endpoint.script(Reply(calls=[("spend", {"amount": amount})]), say("so be it"))
        frames = await buyer.turn("spend little")
        assert (len(of_kind(frames, "approval_request")), spent) == (amount - 5, [5])


async def test_a_request_is_withdrawn(
    buyer: Wire, endpoint: Endpoint, spent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancel withdraws it, so does time, with a sentence for the model; a client that leaves does not."""
    request = await asked(buyer, endpoint)
    await buyer.request("cancel")
    assert (await buyer.ended())["stop_reason"] == "cancelled"
    assert (await buyer.refused("approve", tool_call_id=request["tool_call_id"], allow=True))["code"] == "not_found"
    monkeypatch.setattr("memws.APPROVAL_TIMEOUT", 0.05)
    endpoint.script(SPENDS, say("so be it"))
    frames = await buyer.turn("again")
    (told,) = [frame for frame in of_kind(frames, "tool_return") if frame["name"] == "spend"]
    assert (told["message"], spent) == ("not run: nobody allowed it within 0.05 s", [])


async def test_a_restart_withdraws_a_request(
    online: Callable[..., Any], server: Any, buyer: Wire, endpoint: Endpoint, spent: list[int]
) -> None:
    """The call gets a result that says so, and nothing runs."""
    await asked(buyer, endpoint)
    await asyncio.to_thread(server.stop)
    again = online()
    async with wire(again, "*") as client:
        await client.ok("load_agent", name="sam")
        assert (await client.ok("get_agent"))["turn"] is None
        assert ((await events_of(client))[-1]["stop_reason"], spent) == ("interrupted", [])
