"""fork_agent and rewind_agent on both databases: who follows a copy, what cannot be copied, and what a kill leaves.

What a copy holds, and that it is its own from then on, tests/soak/forks.py compares with a model in memory.
"""

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from endpoint import Endpoint, Reply, say
from wire import JSON, Wire, beside, is_terminal, messages_of, seqs, wire

import memws

pytestmark = pytest.mark.anyio
Serve = Callable[..., memws.WebSocketServer]
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
