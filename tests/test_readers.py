"""Section 11, Server: readers far behind, or that do not read at all, get all that is stored, and every end once."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import openai  # noqa: F401 (half a second, once, and not in the turn of some test)
import pytest
from endpoint import Endpoint
from test_server import database, hold, refusing, reply
from wire import JSON, Wire, events_of, is_terminal, of_kind, seqs, wire

import memws

pytestmark = pytest.mark.anyio

Serve = Callable[..., memws.WebSocketServer]
BEHIND = 300  # events, more than the ring holds
NUMBERS = itertools.count()
BIG = 4  # edits whose events are more than lies between a server and a client that does not read


@pytest.fixture
def server(serve: Serve, endpoint: Endpoint) -> memws.WebSocketServer:
    """A server whose model is the scripted endpoint."""
    return serve(base_url=endpoint.url, model="test-model", api_key="key", context_window=1_000_000)


@contextlib.asynccontextmanager
async def slow_wire(server: memws.WebSocketServer) -> AsyncIterator[Wire]:
    """A connection on which hardly anything is under way while its client does not read."""
    with socket.socket() as narrow:
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        narrow.connect((server.host, server.port))
        narrow.setblocking(False)
        async with wire(server, "*", sock=narrow, max_queue=1, close_timeout=0.2) as client:
            transport = list(server.clients)[-1].transport
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
            yield client


async def edits(client: Wire, count: int, size: int = 1) -> None:
    """So many events of an agent, each of so many characters twice."""
    ids = [
        await client.request("set_block", agent_name="sam", label="big", value=f"{next(NUMBERS)} " + "\u20ac" * size)
        for _ in range(count)
    ]
    await client.until(lambda frame: frame.get("id") == ids[-1])


async def create(client: Wire) -> None:
    await client.ok("create_agent", config={"name": "sam", "blocks": [{"label": "big", "limit": 20_000}]})


async def fall_behind(client: Wire, slow: Wire) -> None:
    """Have a subscriber fall so far behind that it is sent stored events, and let it be stuck again amidst them.

    Meanwhile it sends a message that is refused.
    """
    await edits(client, BIG, 19_000)
    await edits(client, BEHIND)
    await slow.say("x", agent_name="sam", turn_id="refused", when_busy="reject", id="refused")
    await edits(client, BIG, 19_000)
    await slow.until(lambda frame: len(str(frame.get("after"))) > 10_000)
    for _ in range(BIG + 20):
        await slow.receive()


async def nothing(client: Wire, slow: Wire, endpoint: Endpoint) -> None:
    """The held model answers."""
    endpoint.release()


async def cancel(client: Wire, slow: Wire, endpoint: Endpoint) -> None:
    await client.ok("cancel", agent_name="sam", turn_id="mine")
    endpoint.release()


async def delete(client: Wire, slow: Wire, endpoint: Endpoint) -> None:
    await client.ok("delete_agent", agent_name="sam", force=True)


async def purge(client: Wire, slow: Wire, endpoint: Endpoint) -> None:
    await client.ok("delete_agent", agent_name="sam", force=True, purge=True)


Action = Callable[[Wire, Wire, Endpoint], Any]
CASES: list[tuple[Action, str, str]] = [  # what happens, how a turn ends that waited, and one that ran
    (nothing, "done", "done"),
    (cancel, "cancelled", "cancelled"),
    (delete, "unknown_agent", "cancelled"),
    (purge, "unknown_agent", "cancelled unknown_agent"),
]


def ends_of_mine(frames: list[JSON]) -> list[tuple[str, str]]:
    """(id, why) of the ends of the turn `mine`; a refusal tells its code."""
    ends = [frame for frame in frames if is_terminal(frame) and frame["turn_id"] == "mine"]
    return [(frame.get("id", ""), frame.get("code", frame["stop_reason"])) for frame in ends]


@contextlib.asynccontextmanager
async def far_behind(server: memws.WebSocketServer, endpoint: Endpoint, runs: bool) -> AsyncIterator[tuple[Wire, Wire]]:
    """A client, and a subscriber 300 events behind whose turn `mine` runs, its model held, or waits for such a one."""
    async with wire(server) as client, slow_wire(server) as slow:
        await create(client)
        await slow.ok("subscribe", agent_name="sam")
        await hold(slow if runs else client, endpoint, agent_name="sam", turn_id="mine" if runs else "other", id="runs")
        if not runs:
            await slow.say("waits", agent_name="sam", turn_id="mine", id="waits")
            await slow.until(lambda frame: frame.get("message_type") == "queue")
        await fall_behind(client, slow)
        yield client, slow


async def idle(client: Wire) -> None:
    """Wait until the agent has no turn, and have it fill the ring."""
    while (await client.ok("get_agent", agent_name="sam"))["turn"] is not None:
        pass
    await edits(client, BEHIND)


async def read_on(slow: Wire) -> None:
    """Read up to the end of the turn, and all that is stored by then."""
    await slow.until(lambda frame: is_terminal(frame) and frame["turn_id"] == "mine")
    (agent,) = (await slow.ok("list_agents"))["agents"] or ({"last_seq": 0},)
    while max(seqs(slow.frames)) < agent["last_seq"]:
        await slow.receive()


@pytest.mark.parametrize("runs", [False, True])
@pytest.mark.parametrize(("action", "waited", "ran"), CASES, ids=[case[0].__name__ for case in CASES])
async def test_a_reader_far_behind_gets_each_end_once(
    server: memws.WebSocketServer, endpoint: Endpoint, action: Action, waited: str, ran: str, runs: bool
) -> None:
    """Whatever befalls the turn of a subscriber 300 events behind, it gets one terminal frame, and all seqs."""
    async with far_behind(server, endpoint, runs) as (client, slow):
        await action(client, slow, endpoint)
        if action in (nothing, cancel):
            await idle(client)
        await read_on(slow)
        ((request_id, why),) = ends_of_mine(slow.frames)
        assert (request_id, why in (ran if runs else waited).split()) == ("runs" if runs else "waits", True)
        (refusal,) = [frame for frame in slow.frames if frame.get("id") == "refused"]
        assert refusal["code"] == "busy"
        if action is not purge:
            assert seqs(slow.frames) == list(range(1, len(seqs(slow.frames)) + 1))


@pytest.mark.parametrize("runs", [False, True])
async def test_a_reader_far_behind_hears_of_a_failed_store(
    server: memws.WebSocketServer, endpoint: Endpoint, runs: bool
) -> None:
    """The end of a turn that could not be stored reaches a subscriber 300 events behind, once."""
    async with far_behind(server, endpoint, runs) as (client, slow):
        with refusing(server, "events"):
            endpoint.release()
            while (await client.ok("get_agent", agent_name="sam"))["turn"] is not None:
                pass
        await idle(client)
        await read_on(slow)
        assert ends_of_mine(slow.frames) == [("runs" if runs else "waits", "store_failed")]
        await client.ok("hello", message_types=["*"])
        events = {frame["seq"]: frame for frame in await events_of(client)}
        # What was refused has its end already: the one that a repair stores later is not told again.
        missing = [events[seq] for seq in events.keys() - set(seqs(slow.frames))]
        assert [(frame["turn_id"], frame["stop_reason"]) for frame in missing] == [("mine", "interrupted")] * runs
        assert seqs(slow.frames) == sorted(set(seqs(slow.frames)))


@pytest.mark.parametrize("runs", [False, True])
async def test_a_reader_far_behind_hears_of_a_stop(
    server: memws.WebSocketServer, endpoint: Endpoint, runs: bool
) -> None:
    """A subscriber 300 events behind that reads while the server stops gets the end of its turn once, then 1001."""
    async with far_behind(server, endpoint, runs) as (_, slow):
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        assert await slow.closed() == 1001
        await stopping
        assert ends_of_mine(slow.frames) == [("runs", "interrupted") if runs else ("waits", "cancelled")]
        assert seqs(slow.frames) == list(range(1, len(seqs(slow.frames)) + 1))


async def test_a_reader_that_does_not_read_for_a_while_gets_all_stored_events(
    server: memws.WebSocketServer, endpoint: Endpoint
) -> None:
    """A subscriber that reads nothing costs nobody else's time, and once it reads it gets all stored events."""
    endpoint.default = reply("said", chunk=1)
    async with wire(server) as client, slow_wire(server) as slow:
        await create(client)
        await slow.ok("subscribe", agent_name="sam", after=0)
        for number in range(20):
            await edits(client, 1, 19_000)
            assert (await client.turn(f"{number}", agent_name="sam"))[-1]["stop_reason"] == "done"
        await edits(client, BEHIND)
        await client.ok("hello", message_types=["*"])
        events = await events_of(client)
        await slow.until(lambda frame: frame.get("seq") == events[-1]["seq"])
        assert [frame for frame in slow.frames if "seq" in frame] == events
        assert len(of_kind(slow.frames, "delta")) < 20 * 5


async def test_a_turn_of_its_own_reaches_who_subscribes_and_unsubscribes_far_behind(
    server: memws.WebSocketServer, endpoint: Endpoint
) -> None:
    """A turn sent, or sent again, by who replays a long history reaches it once, also where the replay is ended."""
    async with wire(server) as client, slow_wire(server) as slow:
        await create(client)
        await edits(client, BIG, 19_000)
        await edits(client, BEHIND)
        await hold(client, endpoint, "hi", turn_id="mine", id="other")
        await slow.ok("subscribe", agent_name="sam", after=0)
        await slow.say("hi", agent_name="sam", turn_id="mine", id="again")
        await slow.say("hi", agent_name="sam", turn_id="mine", id="newest")
        await slow.send(type="command", command="unsubscribe", agent_name="sam", id="unsubscribe")
        await client.nothing_more()
        await slow.until(lambda frame: frame.get("id") == "unsubscribe")
        endpoint.release()
        await slow.until(is_terminal)
        turn = [frame for frame in slow.frames if frame.get("turn_id") == "mine"]
        assert (turn[0]["type"], turn[-1]["id"], turn[-1]["stop_reason"]) == ("agent_response_start", "newest", "done")
        assert turn[0]["id"] in ("again", "newest")
        assert seqs(turn) == sorted(set(seqs(turn)))
        await slow.nothing_more()


async def test_a_replay_that_cannot_be_read_ends_alone(server: memws.WebSocketServer) -> None:
    """A subscription whose events the database cannot read ends with an error of its own; all else goes on."""
    async with wire(server) as client:
        await create(client)
        await client.turn("Hello")
        with database(server) as other:
            other.execute("ALTER TABLE events RENAME TO lost")
            await client.ok("subscribe", after=0)
            error = await client.receive()
            assert (error["type"], error["code"]) == ("agent_response_error", "store_failed")
            assert (error["agent_name"], "seq" in error) == ("sam", False)
            await client.ok("hello")
            other.execute("ALTER TABLE lost RENAME TO events")
        assert (await client.turn("Hello again"))[-1]["stop_reason"] == "done"
        await client.ok("subscribe", after=0)
        assert (await client.receive())["seq"] == 1


async def test_a_reader_that_takes_no_byte_is_closed(
    serve: Serve, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that takes no byte for READER_PATIENCE is closed with 1013; it finds all when it is back."""
    monkeypatch.setattr(memws, "READER_PATIENCE", 0.3)
    monkeypatch.setattr(memws, "STOP_GRACE", 0.3)
    server = serve(base_url=endpoint.url, model="test-model", context_window=1_000_000, db=":memory:")
    async with wire(server) as client:
        await create(client)
        async with slow_wire(server) as slow:
            await slow.ok("subscribe", agent_name="sam")
            await edits(client, 2 * BIG, 19_000)
            while len(server.clients) > 1:
                await client.ok("hello")
            assert await slow.closed() in (1013, 1006)
        assert (await client.turn("on"))[-1]["stop_reason"] == "done"
        async with wire(server, "*") as back:
            after = len(seqs(slow.frames))
            last = (await back.ok("subscribe", agent_name="sam", after=after))["last_seq"]
            frames = await back.until(lambda frame: frame.get("seq") == last)
            assert seqs(slow.frames) + seqs(frames) == list(range(1, last + 1))
