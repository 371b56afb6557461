"""Several servers on one PostgreSQL database: what clients of any of them see of an agent that one of them runs."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, closing
from pathlib import Path

import pytest
from commandline import Serving
from endpoint import Endpoint, Reply, say
from postgres import Cluster
from wire import Wire, events_of, is_terminal, messages_of, of_kind, wire

import memws

pytestmark = pytest.mark.anyio
Online = Callable[..., memws.WebSocketServer]
END_LEASES = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT id, owner FROM%'"


@pytest.fixture
async def pair(postgres_address: str, online: Online) -> AsyncIterator[tuple[Wire, Wire]]:
    """Clients of the server that runs agent sam, and of another one that has the agent in use."""
    servers = online(db=postgres_address), online(db=postgres_address)
    async with wire(servers[0], "*", agent={"name": "sam"}) as owner, wire(servers[1], "*") as other:
        await owner.turn("Hello")
        await other.ok("load_agent", name="sam")
        yield owner, other


async def test_a_paused_server_is_followed_no_longer(postgres_address: str, endpoint: Endpoint, tmp_path: Path) -> None:
    """Clients of all other servers get the end of its turn and go on; once it goes on, it follows as they do."""
    flags = ("--host", "127.0.0.1", "--db", postgres_address, "--model", "test-model", "--base-url", endpoint.url)
    async with AsyncExitStack() as stack:
        with ExitStack() as started:
            start = (Serving(*flags, cwd=tmp_path, variables={"OPENAI_API_KEY": "sk-x"}) for _ in range(3))
            servers = [started.enter_context(each) for each in start]
            owner, *others = [await stack.enter_async_context(wire(each, "*")) for each in servers]
            await owner.ok("create_agent", config={"name": "sam"})
            endpoint.script(say("held", hold=True), say("held", hold=True))
            await others[0].say("Wait", agent_name="sam", turn_id="t0")
            await others[0].started()
            await others[1].say("Wait", agent_name="sam", turn_id="t1")
            await others[1].until(lambda frame: frame.get("message_type") == "queue")
            await asyncio.to_thread(endpoint.wait_requests, 1)
            servers[0].process.send_signal(signal.SIGSTOP)
            assert (await others[0].ended())["stop_reason"] == "interrupted"
            assert (await others[1].started())["turn_id"] == "t1"
            servers[0].process.send_signal(signal.SIGCONT)
            await asyncio.to_thread(endpoint.wait_requests, 2)
            endpoint.release()
            assert (await others[1].ended())["stop_reason"] == "done"
            assert (await owner.turn("And now?", agent_name="sam"))[-1]["stop_reason"] == "done"
            assert await messages_of(owner, "sam") == ["Wait", "Wait", "And now?"]
            assert [event["turn_id"] for event in await events_of(owner) if is_terminal(event)][:2] == ["t0", "t1"]


async def test_a_server_without_the_lease_stores_nothing(pair: tuple[Wire, Wire], postgres_address: str) -> None:
    """Neither one that has another lease nor one that has none."""
    last_seq = (await pair[0].ok("get_agent", agent_name="sam"))["last_seq"]
    with closing(memws.database_at(postgres_address)) as database:
        connection = database.open()
        agent = memws.find_agent(connection, "sam").id
        for owner in ("", "ws://127.0.0.1:1#former"):
            with pytest.raises(memws.LeaseLost), memws.transaction(connection):
                memws.commit(connection, agent, memws.Changes([memws.response("correction", "late")]), owner)
    assert (await pair[1].ok("get_agent", agent_name="sam"))["last_seq"] == last_seq


async def test_as_many_wait_elsewhere_as_here(pair: tuple[Wire, Wire], endpoint: Endpoint) -> None:
    """Beside the turn that runs eight messages of a connection may wait, with any server, and be taken back."""
    for client in pair:
        before = len(endpoint.requests)
        endpoint.script(say("held", hold=True))
        for number in range(11):
            await client.say(f"message {number}", agent_name="sam", id=number, turn_id=f"{before}-{number}")
        refused = [await client.until(is_terminal) for _ in range(2)]
        assert [(frames[-1]["id"], frames[-1]["code"]) for frames in refused] == [(9, "queue_full"), (10, "queue_full")]
        await asyncio.to_thread(endpoint.wait_requests, before + 1)
        await client.request("cancel", agent_name="sam", turn_id=f"{before}-8")
        assert (await client.until(is_terminal))[-1]["code"] == "cancelled"
        endpoint.release()
        await client.until(lambda frame: is_terminal(frame) and frame.get("id") == 7)


async def test_what_one_makes_an_agent_do_is_told_alike_by_all(pair: tuple[Wire, Wire]) -> None:
    """A turn that it wakes is told to it once, whether it subscribes or not; the event of a passage has its id."""
    for subscribes in (False, True):
        for client in pair:
            if subscribes:
                await client.ok("subscribe", agent_name="sam")
            turn_id = (await client.ok("wake", agent_name="sam"))["turn_id"]
            frames = [*client.before_answer, *await client.until(is_terminal)]
            assert (frames[-1]["turn_id"], len(of_kind(frames, "heartbeat"))) == (turn_id, 1)
    await pair[0].ended()  # it follows what the other one has begun
    for client, other in (pair, pair[::-1]):
        result, event = await client.edit("insert_passage", agent_name="sam", text="Tea")
        assert event["id"] == (await other.receive())["id"] == result["id"]


async def test_what_waits_at_a_server_that_stops_goes_on_at_the_next(
    postgres_address: str, online: Online, endpoint: Endpoint
) -> None:
    """Its turn is interrupted; a message that another server has passed on is answered by that one, and once."""
    stopping, staying = online(db=postgres_address), online(db=postgres_address)
    async with wire(stopping, "*", agent={"name": "sam"}), wire(staying, "*") as client:
        endpoint.script(say("held", hold=True))
        await client.say("Wait", agent_name="sam", turn_id="t1")
        await client.started()
        await client.say("And then?", agent_name="sam", turn_id="t2")
        await client.until(lambda frame: frame.get("message_type") == "queue")
        await asyncio.to_thread(stopping.stop)
        ends = [await client.ended(), await client.ended()]
        assert [(end["turn_id"], end["stop_reason"]) for end in ends] == [("t1", "interrupted"), ("t2", "done")]
        assert await messages_of(client, "sam") == ["Wait", "And then?"]


async def test_a_text_enters_a_turn_that_runs_elsewhere(pair: tuple[Wire, Wire], endpoint: Endpoint) -> None:
    """Its receipt is the only frame that its sender gets of the turn, once; sent again it gives that again."""
    owner, other = pair
    endpoint.script(say("held", hold=True), say("tea it is"))
    count = len(endpoint.requests)
    await owner.say("go", turn_id="t")
    await asyncio.to_thread(endpoint.wait_requests, count + 1)
    for request_id in ("first", "second"):
        await other.say("tea", id=request_id, turn_id="steer", when_busy="steer")
    await other.ok("get_agent")  # it is done where the agent runs, after what was sent before
    endpoint.release()
    receipt = await other.receive()
    about = {"id": "second", "turn_id": "t", "steered": "steer", "message_type": "user_message"}
    assert about.items() <= receipt.items()
    await owner.ended()
    await other.say("tea", id="third", turn_id="steer")
    assert await other.receive() == receipt | {"id": "third"}
    assert await messages_of(other, "sam") == ["Hello", "go", "tea"]


@pytest.mark.parametrize("edits", [False, True])
async def test_a_message_to_a_server_that_has_lost_the_lease(
    pair: tuple[Wire, Wire], postgres: Cluster, postgres_address: str, edits: bool
) -> None:
    """It waits for the next owner, also where the server hears of the loss from the message, or an edit, alone."""
    postgres.run("UPDATE agents SET owner = 'ws://127.0.0.1:1#another'", postgres_address.rpartition("/")[2])
    if edits:
        await pair[0].request("insert_passage", text="Tea")
    await pair[0].say("Still there?", turn_id="t1")
    if not edits:
        await pair[0].ok("list_agents")  # the turn has begun
    postgres.run(END_LEASES)
    frames = await pair[0].until(is_terminal)
    assert [frame["ok"] for frame in frames if "ok" in frame] == [True] * edits
    assert frames[-1]["stop_reason"] == "done"


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_what_a_lost_server_was_asked_is_asked_again(
    postgres: Cluster, postgres_address: str, online: Online, endpoint: Endpoint, is_deleted: bool
) -> None:
    """A search that waits there is done by the next owner, unless the agent was deleted."""
    servers = online(db=postgres_address, embedding_model="m"), online(db=postgres_address)
    async with wire(servers[0], agent={"name": "sam"}) as owner, wire(servers[1]) as other:
        await owner.ok("insert_passage", text="Tea")
        await other.ok("load_agent", name="sam")
        await asyncio.to_thread(endpoint.wait_requests, 1, "embedding_requests")
        endpoint.overrides["/v1/embeddings"] = Reply(hold=True)
        await other.request("search_memory", query="drinks")
        await asyncio.to_thread(endpoint.wait_requests, 2, "embedding_requests")
        endpoint.overrides.clear()
        if is_deleted:
            await owner.ok("delete_agent")
        else:
            postgres.run(END_LEASES)
        error = (await other.receive()).get("error", {})
        assert error.get("code") == ("unknown_agent" if is_deleted else None)


async def test_what_a_paused_server_has_half_written_holds_up_nobody(postgres_address: str, online: Online) -> None:
    """Its transaction ends with its lease."""
    paused = online(db=postgres_address)
    async with wire(paused, agent={"name": "sam"}):
        await asyncio.to_thread(paused.stop)
    with closing(memws.database_at(postgres_address)) as database:
        writing = database.open()
        writing.execute("BEGIN IMMEDIATE")
        writing.execute("UPDATE agents SET owner = 'ws://127.0.0.1:1#paused' RETURNING id").fetchone()
        async with wire(online(db=postgres_address), agent={"name": "other"}) as client:
            assert (await client.turn("Hello", agent_name="sam"))[-1]["stop_reason"] == "done"


async def test_an_edit_whose_lease_has_ended_meanwhile(
    postgres: Cluster, postgres_address: str, online: Online
) -> None:
    """It is made under the next lease, also where the agent is in use under that one already, and stays so."""
    server, sql = online(db=postgres_address), "SELECT owner FROM agents ORDER BY name"
    async with wire(server, agent={"name": "sam"}) as client, wire(server, agent={"name": "tom"}) as other:
        with closing(memws.database_at(postgres_address)) as database:
            beside = database.open()
            (before,), _ = beside.execute(sql).fetchall()
            beside.execute("BEGIN IMMEDIATE")
            beside.execute("LOCK TABLE settings")  # which the last part of an update writes
            await other.request("update_agent", config={"max_steps": 5})
            while not beside.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall():
                pass
            await client.request("insert_passage", text="Tea")
            async with wire(server) as third:
                await third.ok("get_agent", agent_name="sam")
                postgres.run(END_LEASES)
                while before in {owner for (owner,) in beside.execute(sql).fetchall()}:
                    pass
                await third.ok("get_agent", agent_name="sam")
            beside.execute("ROLLBACK")
        assert (await client.receive())["ok"]
        assert (await client.turn("Hello"))[-1]["stop_reason"] == "done"
