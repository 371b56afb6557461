"""The laboratory: what enters a turn that runs, what waits until a person allows it, forks and rewinds."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from endpoint import Endpoint, Reply, say
from wire import JSON, Wire, beside, events_of, is_terminal, messages_of, of_kind, seqs, wire

import memws

pytestmark = pytest.mark.anyio
Serve = Callable[..., Any]

ANSWER = [("send_message", {"message": "done"})]


@pytest.fixture
def server(online: Serve) -> Any:
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


async def test_a_rule_decides_who_is_asked(
    buyer: Wire, endpoint: Endpoint, spent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule decides by the arguments; one that fails asks; what nobody allows in time is not run."""
    monkeypatch.setattr("memws.APPROVAL_TIMEOUT", 0.05)
    late = "not run: nobody allowed it within 0.05 s"
    for amount, requests, result in ((5, 0, "spent 5"), (6, 1, late), (50, 1, late)):
        endpoint.script(Reply(calls=[("spend", {"amount": amount})]), say("so be it"))
        frames = await buyer.turn("spend little")
        (told,) = [frame for frame in of_kind(frames, "tool_return") if frame["name"] == "spend"]
        assert (len(of_kind(frames, "approval_request")), told["message"], spent) == (requests, result, [5])


async def test_a_cancel_withdraws_a_request(buyer: Wire, endpoint: Endpoint, spent: list[int]) -> None:
    request = await asked(buyer, endpoint)
    await buyer.request("cancel")
    assert (await buyer.ended())["stop_reason"] == "cancelled"
    assert (await buyer.refused("approve", tool_call_id=request["tool_call_id"], allow=True))["code"] == "not_found"
    assert spent == []


async def test_a_restart_withdraws_a_request(
    online: Serve, server: Any, buyer: Wire, endpoint: Endpoint, spent: list[int]
) -> None:
    """The call gets a result that says so, and nothing runs."""
    await asked(buyer, endpoint)
    await asyncio.to_thread(server.stop)
    again = online()
    async with wire(again, "*") as client:
        await client.ok("load_agent", name="sam")
        assert (await client.ok("get_agent"))["turn"] is None
        assert ((await events_of(client))[-1]["stop_reason"], spent) == ("interrupted", [])


# ---- forks and rewinds: what a copy holds, and that it is its own, tests/soak/forks.py compares with a model ---------


HELD = Reply("Let me think.", hold=True)


async def talked(client: Wire, *texts: str, name: str = "sam") -> None:
    """An agent that was told these texts, in turns t0, t1, …"""
    await client.ok("create_agent", config={"name": name})
    for number, text in enumerate(texts):
        await client.turn(text, turn_id=f"t{number}")


async def about(client: Wire, name: str) -> JSON:
    seen = await client.ok("get_agent", agent_name=name)
    return {key: seen[key] for key in ("settings", "blocks", "counts")}


async def history(client: Wire, name: str = "sam") -> list[JSON]:
    """All stored events of an agent, whatever it is called; a rewind leaves a gap in their seqs."""
    last_seq = (await client.ok("subscribe", agent_name=name, after=0))["last_seq"]
    events = await client.until(lambda frame: frame.get("seq") == last_seq)
    await client.ok("unsubscribe", agent_name=name)
    return [{key: value for key, value in event.items() if key != "agent_name"} for event in events]


async def test_a_rewind_puts_aside_what_came_after(database: str, serve: Serve) -> None:
    """The name goes on from that turn, its seqs above; readers and sessions stay with it, and turn ids are free."""
    async with wire(serve(), "*") as client:
        await talked(client, "My name is Ada", "I love otters")
        await client.ok("subscribe")
        last = (await history(client))[-1]["seq"]
        await client.ok("subscribe")
        back = await client.ok("rewind_agent", turn_id="t0", keep_as="later")
        assert back == {"agent_name": "sam", "last_seq": last + 1, "kept_as": "later"}
        (event,) = client.before_answer
        assert (event["change"], event["kept_as"], event["seq"]) == ("rewound", "later", last + 1)
        assert (await client.refused("rewind_agent", turn_id="t1"))["code"] == "unknown_turn"
        turn = await client.turn("I love herons", turn_id="t1")
        assert (turn[0]["seq"], turn[-1]["stop_reason"]) == (last + 2, "done")
        assert await messages_of(client, "later") == ["My name is Ada", "I love otters"]
        assert await messages_of(client, "sam") == ["My name is Ada", "I love herons"]


async def test_what_cannot_be_copied(database: str, online: Serve, endpoint: Endpoint) -> None:
    """Each refusal has its code and leaves nothing behind; beside a turn that runs, a fork is as before it."""
    server = online()
    async with wire(server, "*") as client, wire(server, "*") as other:
        await talked(client, "Hello")
        await other.ok("set_block", agent_name="sam", label="human", value="Edited since")
        before = await about(other, "sam"), len(await history(other))
        endpoint.script(HELD, say("Well?"))
        await client.say("And now?", turn_id="t1")
        await client.started()
        cases: list[tuple[str, str, JSON]] = [
            ("fork_agent", "busy", {"turn_id": "t1"}),
            ("fork_agent", "unknown_turn", {"turn_id": "t9"}),
            ("fork_agent", "name_taken", {"new_name": "sam"}),
            ("fork_agent", "bad_config", {"new_name": "a b"}),
            ("rewind_agent", "busy", {"turn_id": "t0"}),
        ]
        for command, code, fields in cases:
            assert (await other.refused(command, agent_name="sam", **fields))["code"] == code
        fork = (await other.ok("fork_agent", agent_name="sam"))["agent_name"]
        assert (await about(other, fork), len(await history(other, fork))) == before
        await asyncio.to_thread(endpoint.wait_requests, 2)
        endpoint.release()
        await client.ended()
        fields = {"agent_name": "sam", "turn_id": "t0"}
        assert (await other.refused("rewind_agent", **fields, keep_as=fork))["code"] == "name_taken"
        with beside(database) as db:
            db.execute("DELETE FROM requests WHERE step = 0")
            assert (await other.refused("fork_agent", **fields))["code"] == "not_found"
            assert db.execute("SELECT count(*) FROM agents").fetchone() == (2,)
        await client.ok("delete_agent")
        assert (await other.refused("fork_agent", agent_name="sam"))["code"] == "unknown_agent"


async def test_a_long_copy(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subscribers hear how far it is; what is said meanwhile waits; a cancel ends it and leaves nothing behind."""
    monkeypatch.setattr(memws, "PROGRESS_DELAY", 0.0)
    server = serve()
    async with wire(server, "*") as client, wire(server) as other:
        await talked(client, *(f"I love thing number {number}" for number in range(5)))
        await client.ok("subscribe")
        await client.ok("fork_agent")
        done = [event["done"] for event in client.before_answer if event["message"].endswith(" events")]
        assert done == sorted(set(done)) != []
        with beside(server.options.db) as db:
            db.execute("BEGIN IMMEDIATE")  # now nothing is copied
            await client.request("rewind_agent", turn_id="t0")
            while await other.ok("cancel", agent_name="sam") != {"state": "cancelling"}:
                pass
            await other.say("And now?", agent_name="sam")
            db.execute("ROLLBACK")
            answer = (await client.until(lambda frame: frame["type"] == "command_response"))[-1]
            assert answer["error"]["code"] == "cancelled"
            assert (await other.ended())["stop_reason"] == "done"
            assert db.execute("SELECT count(*) FROM agents").fetchone() == (2,)
        assert len(await messages_of(other, "sam")) == 6


async def test_servers_that_share_a_database(postgres_address: str, online: Serve, endpoint: Endpoint) -> None:
    """A rewind that any of them is asked for reaches the clients of all; one that takes over goes on with the copy."""
    first, second = online(db=postgres_address), online(db=postgres_address)
    async with wire(first, "*") as owner, wire(second, "*") as other:
        await talked(owner, "One", "Two")
        await other.ok("load_agent", name="sam")
        await other.ok("subscribe")
        back = await other.ok("rewind_agent", turn_id="t0", keep_as="later")
        event = (other.before_answer or await other.until(lambda frame: frame.get("change") == "rewound"))[-1]
        assert (event["change"], event["seq"]) == ("rewound", back["last_seq"])
        assert [await history(each) for each in (owner, other)] == [await history(owner)] * 2
        assert await messages_of(other, "later") == ["One", "Two"]
        assert await messages_of(other, "sam") == ["One"]
        assert seqs(await other.turn("Three"))[0] == back["last_seq"] + 1
        assert (await owner.ok("fork_agent", new_name="kim", turn_id="t0"))["agent_name"] == "kim"
        await asyncio.to_thread(first.stop)
        assert is_terminal((await other.turn("Four"))[-1])
        assert await messages_of(other, "sam") == ["One", "Three", "Four"]
        assert await messages_of(other, "kim") == ["One"]


def test_what_a_crash_leaves_of_a_copy(database: str, serve: Serve) -> None:
    """A copy without a name is seen by nobody and goes at a start once it is old."""
    server = serve()
    with memws.connect(server.url) as client:
        client.create_agent("sam")
        client.ask("Hello")
    server.stop()
    with contextlib.closing(memws.database_at(database)) as opened:
        db = opened.open()
        record = memws.find_agent(db, "sam")
        copy = memws.create_agent(db, memws.replace(record, name="kim", last_active="2026"), is_copy=True).id
        columns = "id, role, time, text, body, turn_id, step, seq"
        db.execute(f"INSERT INTO messages SELECT ?, {columns} FROM messages", (copy,))  # noqa: S608
    with memws.connect(serve().url) as client:
        assert [each["agent_name"] for each in client.command("list_agents")["agents"]] == ["sam"]
        assert client.command("list_agents", deleted=True)["total"] == 0
        client.create_agent("kim")
    with beside(database) as db:
        assert db.execute("SELECT count(*) FROM agents").fetchone() == (2,)
        assert db.execute("SELECT count(*) FROM messages WHERE agent = ?", (copy,)).fetchone() == (0,)


def test_an_endpoint_of_its_own(database: str, serve: Serve, endpoint: Endpoint) -> None:
    """A fork, and what an agent was made by a rewind, have the endpoint and the key that Python gave it."""
    endpoint.api_key, server = "own", serve()
    server.create_new_agent({"name": "sam", "model": "m", "base_url": endpoint.url, "api_key": "own"})
    with memws.connect(server.url) as client:
        client.load_agent("sam")
        client.ask("Hello")
        turn_id = client.command("get_messages")["messages"][0]["turn_id"]
        client.command("fork_agent", new_name="kim")
        client.command("rewind_agent", turn_id=turn_id)
        for name in ("sam", "kim"):
            before = len(endpoint.requests)
            client.ask("Hello", name)
            assert len(endpoint.requests) == before + 1
