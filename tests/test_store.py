"""The store: what is committed is there whole, once and in order, whatever fails around it.

Every test of what a store keeps runs on a file and in memory.
"""

import asyncio
import hashlib
import os
import random
import shutil
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import pytest

import memws
from memws import AgentRecord, Block, Changes, ChatMessage, Event, Passage, Refused, SqliteStore, StoreFailed

LIMIT = 20.0
"""Seconds after which a store that does not answer fails its test."""
NOW = "2026-11-24T10:00:00.000Z"
EVERYTHING = 2**62


@asynccontextmanager
async def opened(path: str | Path, sync: str = "full") -> AsyncIterator[SqliteStore]:
    store = SqliteStore(str(path), sync, asyncio.get_running_loop())
    try:
        async with asyncio.timeout(LIMIT):
            yield store
    finally:
        await store.close()


@pytest.fixture(params=["file", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[SqliteStore]:
    """A new store, on disk and in memory."""
    async with opened(tmp_path / "memws.db" if request.param == "file" else ":memory:") as new:
        yield new


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """A closed store has no thread."""
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("memws-")] == []


def say(number: int, text: str, *, role: str = "user", event: Event | None = None, **fields: Any) -> ChatMessage:
    """A chat message that recall memory finds by its text."""
    body = memws.encode_json({"role": "user", "content": text})
    return ChatMessage(number, role, NOW, text, body, fields.pop("turn_id", "t1"), 1, text, event, **fields)


def tell(text: str = "x", turn_id: str | None = "t1", **fields: Any) -> Event:
    (event,) = memws.response_events("internal_monologue", text, turn_id=turn_id, step=1, **fields)
    return event


def asked(turn_id: str = "t1", step: int = 1, first: int = 1, last: int = 1, **texts: str) -> memws.RequestRecord:
    """A model call over the messages `first` to `last`, with the hash of what would have been sent."""
    pieces = {"head": '{"model":"m"}', "system": '{"s":1}', "summary": "", "tools": "[]", "extra": ""} | texts
    return memws.RequestRecord(turn_id, step, **pieces, first=first, last=last, digest=b"?", response={"r": 1})


async def new_agent(store: SqliteStore, name: str = "sam") -> AgentRecord:
    blocks = [Block("persona", "I am Sam", 200), Block("human", "", 300)]
    return await store.create_agent(name, {"model": None, "settings": {"seed": 1}}, blocks, None)


async def whole_step(store: SqliteStore, agent: int, number: int = 1, turn_id: str = "t1") -> Changes:
    """Store something of everything."""
    event = tell(f"told {number}", turn_id)
    changes = Changes(
        events=[Event("agent_response_start", turn_id=turn_id), event],
        messages=[say(number, f"said {number}", event=event, turn_id=turn_id)],
        blocks=[Block("human", f"Name: Ada {number}", 300, number + 1)],
        passages=[Passage(number, f"kept {number}", NOW)],
        requests=[asked(turn_id, 1, 1, number)],
        begins=(turn_id, b"digest"),
        state={"cut": number},
        config={"model": f"model {number}"},
    )
    await store.commit(agent, changes)
    return changes


async def seen(store: SqliteStore, agent: AgentRecord) -> list[Any]:
    """All that can be read of an agent."""
    listed, total = await store.list_agents("", 100)
    turns = sorted({event[1] for event in await store.events(agent.id, 0, 1000)})
    return [
        next((record for record in listed if record.id == agent.id), None),
        total,
        await store.load(agent.id, 0),
        await store.messages(agent.id, None, 1000),
        await store.events(agent.id, 0, 1000),
        [await store.passage(agent.id, number) for number in range(1, 20)],
        [await store.turn(agent.id, turn_id) for turn_id in ("t1", "t2", "t3")],
        [await store.request(agent.id, turn_id, 1) for turn_id in ("t1", "t2", "t3")],
        await store.search(agent.id, "", ("recall", "archival"), None, None, None, 50, 0),
        await store.search(agent.id, "said kept broken", ("recall", "archival"), None, None, None, 50, 0),
        turns,
    ]


def statements(store: SqliteStore) -> list[str]:
    """From now on, every statement that the writer runs."""
    seen: list[str] = []
    store._connection.set_trace_callback(seen.append)
    return seen


@asynccontextmanager
async def held_writer(store: SqliteStore) -> AsyncIterator[None]:
    """The writer is busy with another job until the block ends: what is committed meanwhile waits together."""
    busy, go_on = threading.Event(), threading.Event()

    def job(_: sqlite3.Connection) -> None:
        busy.set()
        go_on.wait(LIMIT)

    holding = asyncio.ensure_future(store._write(job))
    await asyncio.to_thread(busy.wait, LIMIT)
    try:
        yield
    finally:
        go_on.set()
        await holding


async def queued(*jobs: Any) -> list[asyncio.Future[Any]]:
    """The jobs as tasks that have reached the writer's queue, in this order."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    await asyncio.sleep(0)  # each runs up to its queue: nothing before it waits
    return tasks


async def fails(job: Any, words: str = "the database refused") -> str:
    with pytest.raises(StoreFailed) as caught:
        await job
    assert words in str(caught.value)
    return str(caught.value)


# ---- agents ----------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_agent_is_found_as_it_was_made(store: SqliteStore) -> None:
    """A new agent is there with its config, its blocks in order and nothing else."""
    config = {"model": None, "settings": {"temperature": 0.5}, "system": "ä 日 \U0001f600 \x1b"}
    blocks = [Block("zeta", "z", 10), Block("alpha", "", 20, 3), Block("mid", "ä\n日", 30)]
    made = await store.create_agent("sam", config, blocks, "http://localhost:1/v1")
    found = await store.find_agent("sam")
    assert found == made
    assert (found.config, found.state, found.last_seq, found.base_url) == (config, {}, 0, "http://localhost:1/v1")
    assert found.created == found.last_active
    stored, messages, counts, turns = await store.load(made.id, 0)
    assert stored == blocks
    assert (messages, turns) == ([], [])
    assert counts == {"recall": 0, "archival": 0, "last_message": 0, "last_passage": 0}


@pytest.mark.anyio
async def test_an_unknown_agent_is_told_with_the_nearest_names(store: SqliteStore) -> None:
    """A name that nobody has is refused with the ten nearest ones and the count."""
    with pytest.raises(memws.UnknownAgent, match="unknown agent 'sam'; there are none yet"):
        await store.find_agent("sam")
    for number in range(12):
        await new_agent(store, f"agent{number:02}")
    await new_agent(store, "samuel")
    with pytest.raises(memws.UnknownAgent) as caught:
        await store.find_agent("sam")
    assert str(caught.value).startswith("unknown agent 'sam'; 13 known: 'samuel', ")
    assert str(caught.value).count("'agent") == 9
    with pytest.raises(memws.UnknownAgent):
        await store.find_agent("sam'; DROP TABLE agents;--" + "x" * 900)


@pytest.mark.anyio
async def test_a_taken_name_is_refused(store: SqliteStore) -> None:
    """A second agent of a name is refused, by create, rename and restore, and nothing is changed."""
    first = await new_agent(store)
    second = await new_agent(store, "ada")
    gone = await new_agent(store, "gone")
    await store.delete_agent(gone.id, tell(turn_id=None), purge=False)
    before = [await seen(store, agent) for agent in (first, second)]
    for job in (
        store.create_agent("sam", {}, [], None),
        store.rename_agent(second.id, "sam", tell(turn_id=None)),
        store.restore_agent("gone", "sam"),
    ):
        with pytest.raises(Refused, match="there is an agent 'sam' already") as caught:
            await job
        assert caught.value.code == "name_taken"
    assert [await seen(store, agent) for agent in (first, second)] == before


@pytest.mark.anyio
async def test_agents_are_listed_in_order_of_name(store: SqliteStore) -> None:
    """Agents come in pages, in order of their names, with the number of all; deleted ones are not listed."""
    for name in ("bob", "ada", "Zoe", "émile", "日本", "carl"):
        agent = await new_agent(store, name)
    await store.delete_agent(agent.id, None, purge=False)
    names = sorted(["bob", "ada", "Zoe", "émile", "日本"])
    pages = [(await store.list_agents(after, 2)) for after in ("", names[1], names[3], names[4])]
    assert [[record.name for record in page] for page, _ in pages] == [names[:2], names[2:4], names[4:], []]
    assert {total for _, total in pages} == {5}


# ---- commits ---------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_commit_stores_everything(store: SqliteStore) -> None:
    """A transaction holds events, messages, blocks, passages, requests, turn, state and config, and gives the seqs."""
    agent = await new_agent(store)
    changes = await whole_step(store, agent.id)
    assert [event.seq for event in changes.events] == [1, 2]
    assert all(memws.decode_json(event.text)["seq"] == event.seq for event in changes.events)
    record = await store.find_agent("sam")
    assert (record.config, record.state, record.last_seq) == ({"model": "model 1"}, {"cut": 1}, 2)
    blocks, messages, counts, turns = await store.load(agent.id, 0)
    assert blocks == [Block("persona", "I am Sam", 200), Block("human", "Name: Ada 1", 300, 2)]
    (message,) = messages
    assert message == say(1, "said 1", seq=2)
    assert counts == {"recall": 1, "archival": 1, "last_message": 1, "last_passage": 1}
    assert turns == [memws.TurnRecord("t1", b"digest", 0, 1, 2)]  # type: ignore[arg-type]
    assert await store.passage(agent.id, 1) == Passage(1, "kept 1", NOW)
    assert await store.events(agent.id, 0, 10) == [(1, changes.events[0].text), (2, changes.events[1].text)]
    found, total = await store.search(agent.id, "said kept", ("recall", "archival"), None, None, None, 10, 0)
    assert total == 2
    assert {(item.store, item.id, item.text) for item in found} == {("recall", 1, "said 1"), ("archival", 1, "kept 1")}


BROKEN = {
    "an event that is no JSON": Changes(events=[tell("first"), tell("x", odd=float("nan"))]),
    "an event that is no text": Changes(events=[tell("first"), tell("\ud800")]),
    "a turn for the second time": Changes(events=[tell("first")], begins=("t1", None)),
    "a message's id for the second time": Changes(events=[tell("first")], messages=[say(2, "broken"), say(1, "x")]),
    "a message that is no text": Changes(events=[tell("first")], messages=[say(2, "broken"), say(3, "\ud800")]),
    "a passage's id for the second time": Changes(
        events=[tell("first")], messages=[say(2, "broken")], passages=[Passage(2, "broken", NOW), Passage(1, "x", NOW)]
    ),
    "a request that is no text": Changes(passages=[Passage(2, "broken", NOW)], requests=[asked("t2", extra="\ud800")]),
    "a state that is no JSON": Changes(
        events=[tell("first")], blocks=[Block("human", "broken", 300, 9)], ends=["t1"], removed=[1],
        requests=[asked("t2", system='{"broken":1}')], state={"x": float("inf")},
    ),
    "a config that is no JSON": Changes(events=[tell("first")], state={"broken": True}, config={"x": object()}),
    "a number too large": Changes(events=[tell("first")], messages=[say(2**63, "broken")]),
}  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("what", BROKEN)
async def test_a_commit_that_fails_stores_nothing(store: SqliteStore, what: str) -> None:
    """A transaction that fails in its middle leaves everything as it was, search and seqs included; the next works."""
    agent = await new_agent(store)
    await whole_step(store, agent.id)
    before = await seen(store, agent)
    rows = store._connection.execute("SELECT count(*) FROM parts").fetchone()
    await fails(store.commit(agent.id, BROKEN[what]))
    assert await seen(store, agent) == before
    assert store._connection.execute("SELECT count(*) FROM parts").fetchone() == rows
    changes = await whole_step(store, agent.id, 2, "t2")
    assert [event.seq for event in changes.events] == [3, 4]


@pytest.mark.anyio
async def test_seqs_have_no_gaps(store: SqliteStore) -> None:
    """Steps of many agents that arrive together get each agent's seqs in the order they came, without a gap."""
    agents = [await new_agent(store, f"agent{number}") for number in range(4)]
    steps = [
        (agent, [tell(f"{agent.name} {step} {number}") for number in range(step % 4 + 1)])
        for step in range(25)
        for agent in agents
    ]
    await asyncio.gather(*(store.commit(agent.id, Changes(events=events)) for agent, events in steps))
    for agent in agents:
        mine = [event for owner, events in steps if owner is agent for event in events]
        assert [event.seq for event in mine] == list(range(1, len(mine) + 1))
        assert await store.events(agent.id, 0, 1000) == [(event.seq, event.text) for event in mine]
        assert (await store.find_agent(agent.name)).last_seq == len(mine)


@pytest.mark.anyio
async def test_turns_that_arrive_together_share_one_transaction(store: SqliteStore) -> None:
    """All that waits for the writer is stored by one transaction, and so by one fsync."""
    agents = [await new_agent(store, f"agent{number}") for number in range(40)]
    ran = statements(store)
    async with held_writer(store):
        tasks = await queued(*(whole_step(store, agent.id) for agent in agents))
        ran.clear()
    await asyncio.gather(*tasks)
    assert (ran.count("BEGIN IMMEDIATE"), ran.count("COMMIT")) == (1, 2)  # the second commit is the held job's
    assert [(await store.find_agent(agent.name)).last_seq for agent in agents] == [2] * 40


@pytest.mark.anyio
async def test_a_transaction_holds_a_bounded_number_of_jobs(store: SqliteStore) -> None:
    """However much waits, nobody waits for more than one batch of others."""
    agent = await new_agent(store)
    ran = statements(store)
    async with held_writer(store):
        tasks = await queued(*(store.commit(agent.id, Changes(events=[tell()])) for _ in range(600)))
        ran.clear()
    await asyncio.gather(*tasks)
    assert ran.count("BEGIN IMMEDIATE") == -(-600 // memws.WRITE_BATCH)
    assert (await store.find_agent("sam")).last_seq == 600


@pytest.mark.anyio
async def test_a_failing_job_undoes_only_itself(store: SqliteStore) -> None:
    """Of the jobs in one transaction, those that fail leave no trace, and the others are stored."""
    agents = [await new_agent(store, f"agent{number}") for number in range(3)]
    for agent in agents:
        await whole_step(store, agent.id)
    before = await seen(store, agents[1])
    ran = statements(store)
    async with held_writer(store):
        tasks = await queued(
            whole_step(store, agents[0].id, 2, "t2"),
            store.commit(agents[1].id, BROKEN["a state that is no JSON"]),
            store.commit(agents[1].id, BROKEN["a message that is no text"]),
            store.create_agent("agent2", {}, [], None),
            store.commit(10**6, Changes(events=[tell()])),
            whole_step(store, agents[2].id, 2, "t2"),
        )
        ran.clear()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in told] == [Changes, StoreFailed, StoreFailed, Refused, StoreFailed, Changes]
    assert ran.count("BEGIN IMMEDIATE") == 1
    assert (await seen(store, agents[1]))[2:] == before[2:]
    for agent in (agents[0], agents[2]):
        assert (await store.messages(agent.id, None, 10))[1] == 2
        assert (await store.find_agent(agent.name)).last_seq == 4


@pytest.mark.anyio
async def test_a_cancelled_caller_loses_no_step(store: SqliteStore) -> None:
    """A step that was handed over is stored, whether or not somebody still waits for it."""
    agent = await new_agent(store)
    async with held_writer(store):
        (task,) = await queued(store.commit(agent.id, Changes(events=[tell("kept")])))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await store.commit(agent.id, Changes())  # stored after it
    assert len(await store.events(agent.id, 0, 10)) == 1


@pytest.mark.anyio
async def test_what_was_committed_is_read(store: SqliteStore) -> None:
    """A read that begins after a commit sees it, also from several readers at once."""
    agent = await new_agent(store)
    for number in range(1, 30):
        await store.commit(agent.id, Changes(events=[tell()], messages=[say(number, f"message {number}")]))
        reads = await asyncio.gather(*(store.messages(agent.id, None, 1) for _ in range(6)))
        assert {(messages[0].id, total) for messages, total in reads} == {(number, number)}


@pytest.mark.anyio
async def test_texts_come_back_as_they_were(store: SqliteStore) -> None:
    """A text of any script, with controls and line ends, is read as it was stored."""
    agent = await new_agent(store)
    texts = [
        "",
        " ",
        "ä\u0301\r\n\t\x1b\x7f",
        "日本 العربية 😀\U0010ffff\ufffd",
        "'; DROP TABLE agents;--",
        "x" * 65_536,
    ]
    messages = [say(number, text) for number, text in enumerate(texts, 1)]
    passages = [Passage(number, text, NOW) for number, text in enumerate(texts, 1)]
    await store.commit(agent.id, Changes(events=[tell()], messages=messages, passages=passages))
    stored, _ = await store.messages(agent.id, None, 10)
    assert [(message.text, message.said) for message in stored] == [(text, text) for text in texts]
    assert [await store.passage(agent.id, passage.id) for passage in passages] == passages


# ---- messages, passages, events --------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_messages_come_in_pages(store: SqliteStore) -> None:
    """The newest messages come first, or those before one of them, each page oldest first."""
    agent = await new_agent(store)
    await store.commit(agent.id, Changes(events=[tell()], messages=[say(n, f"message {n}") for n in range(1, 31)]))
    pages = [await store.messages(agent.id, before, 10) for before in (None, 21, 11, 1, 5)]
    assert [[message.id for message in page] for page, _ in pages] == [
        list(range(21, 31)), list(range(11, 21)), list(range(1, 11)), [], [1, 2, 3, 4],
    ]  # fmt: skip
    assert {total for _, total in pages} == {30}
    _, messages, _, _ = await store.load(agent.id, 28)
    assert [message.id for message in messages] == [28, 29, 30]


@pytest.mark.anyio
async def test_what_was_said_is_kept_beside_the_text(store: SqliteStore) -> None:
    """The words that recall memory is searched by are read as they were stored, for each role."""
    agent = await new_agent(store)
    spoken = [
        ChatMessage(1, "user", NOW, "Hi", "{}", said="Hi"),
        ChatMessage(2, "assistant", NOW, "thinking", "{}", said="Hello"),
        ChatMessage(3, "tool", NOW, "None", "{}"),
        ChatMessage(4, "system", NOW, "last login", "{}"),
        ChatMessage(5, "assistant", NOW, "", "{}", said="pancakes"),
    ]
    await store.commit(agent.id, Changes(events=[tell()], messages=spoken))
    read, _ = await store.messages(agent.id, None, 10)
    assert [(message.role, message.text, message.said) for message in read] == [
        (message.role, message.text, message.said) for message in spoken
    ]
    found, total = await store.search(agent.id, "pancakes", ("recall",), None, None, None, 10, 0)
    assert [(item.id, item.role, item.text) for item in found if item.id == 5] == [(5, "assistant", "pancakes")]
    assert (await store.search(agent.id, "thinking", ("recall",), None, None, None, 10, 0))[1] == 0
    assert (await store.search(agent.id, "", ("recall",), None, None, None, 10, 0))[1] == 3
    assert total >= 1


@pytest.mark.anyio
async def test_messages_never_change(store: SqliteStore) -> None:
    """Nothing that an agent goes through touches a stored message: no statement changes one but a purge."""
    agent = await new_agent(store)
    await whole_step(store, agent.id)
    rows = store._connection.execute("SELECT * FROM messages").fetchall()
    ran = statements(store)
    await whole_step(store, agent.id, 2, "t2")
    await store.commit(agent.id, Changes(events=[tell()], ends=["t1", "t2"], removed=[1], state={"cut": 2}))
    await store.rename_agent(agent.id, "ada", tell(turn_id=None))
    await store.delete_agent(agent.id, tell(turn_id=None), purge=False)
    await store.restore_agent("ada", "sam")
    assert store._connection.execute("SELECT * FROM messages WHERE id = 1").fetchall() == rows
    touching = [sql for sql in ran if "messages" in sql and not sql.lstrip().startswith(("SELECT", "INSERT INTO"))]
    assert touching == []
    await store.delete_agent(agent.id, None, purge=True)
    assert [sql for sql in ran if sql.startswith("DELETE FROM messages")]


@pytest.mark.anyio
async def test_events_are_read_by_seq_and_turn(store: SqliteStore) -> None:
    """Events come in order, above a seq, up to another, of one turn, so many at a time."""
    agent = await new_agent(store)
    for number in range(1, 21):
        await store.commit(
            agent.id, Changes(events=[tell(f"event {number}", None if number % 5 == 0 else f"t{number % 3}")])
        )
    every = await store.events(agent.id, 0, 100)
    assert [seq for seq, _ in every] == list(range(1, 21))
    assert await store.events(agent.id, 7, 5) == every[7:12]
    assert await store.events(agent.id, 7, 100, up_to=9) == every[7:9]
    assert [seq for seq, _ in await store.events(agent.id, 4, 100, "t1")] == [7, 13, 16, 19]
    assert [seq for seq, _ in await store.events(agent.id, 0, 2, "t1", 12)] == [1, 4]
    assert await store.events(agent.id, 20, 100) == []
    assert await store.events(agent.id, 0, 100, "t9") == []
    assert await store.events(agent.id + 1, 0, 100) == []


@pytest.mark.anyio
async def test_a_turn_has_a_record(store: SqliteStore) -> None:
    """A turn is known from its begin, by the digest of its message, and open until its end."""
    agent, other = await new_agent(store), await new_agent(store, "ada")
    await store.commit(agent.id, Changes(events=[tell("a"), tell("b")], begins=("t1", b"one")))
    await store.commit(agent.id, Changes(events=[tell("c")], begins=("t2", None)))
    await store.commit(other.id, Changes(events=[tell("d")], begins=("t1", b"other")))
    (_, _, _, turns) = await store.load(agent.id, 0)
    assert [(turn.turn_id, turn.digest, turn.first_seq) for turn in turns] == [("t1", b"one", 1), ("t2", None, 3)]
    await store.commit(agent.id, Changes(events=[tell("e")], ends=["t1"]))
    over = await store.turn(agent.id, "t1")
    assert over == memws.TurnRecord("t1", b"one", 1, 1, 4)  # type: ignore[arg-type]
    (_, _, _, turns) = await store.load(agent.id, 0)
    assert [turn.turn_id for turn in turns] == ["t2"]
    assert await store.turn(agent.id, "t3") is None
    still = await store.turn(other.id, "t1")
    assert still is not None
    assert (still.digest, bool(still.over)) == (b"other", False)


@pytest.mark.anyio
async def test_a_request_is_rebuilt_from_its_parts(store: SqliteStore) -> None:
    """A model call is kept as references, and rebuilt to the very bytes that were sent; equal parts are kept once."""
    agent = await new_agent(store)
    messages = [say(number, f"message {number} ä日") for number in range(1, 6)]
    system, tools, summary, extra = '{"role":"system"}', '[{"type":"function"}]', '{"role":"user"}', '{"x":1}'
    sent = []
    for step, (first, last, more) in enumerate([(1, 3, ""), (1, 5, ""), (4, 5, extra)], 1):
        between = [message.body for message in messages[first - 1 : last]]
        pieces = [system, *([summary] if step == 3 else []), *between, *([more] if more else [])]
        body = memws.request_body('{"model":"m","stream":true}', pieces, tools)
        record = asked("t1", step, first, last, head='{"model":"m","stream":true}', system=system, tools=tools)
        record.summary, record.extra = summary if step == 3 else "", more
        record.digest, record.usage, record.total_ms = hashlib.sha256(body.encode()).digest(), '{"u":1}', 7
        sent.append((record, body))
    await store.commit(agent.id, Changes(events=[tell()], messages=messages, requests=[record for record, _ in sent]))
    for step, (record, body) in enumerate(sent, 1):
        found = await store.request(agent.id, "t1", step)
        assert found is not None
        assert found[0] == record
        pieces = [found[0].system, *([found[0].summary] if found[0].summary else []), *found[1]]
        pieces += [found[0].extra] if found[0].extra else []
        assert memws.request_body(found[0].head, pieces, found[0].tools) == body
        assert hashlib.sha256(body.encode()).digest() == found[0].digest
    assert await store.request(agent.id, "t1", 4) is None
    assert await store.request(agent.id, "t2", 1) is None
    assert await store.request(agent.id + 1, "t1", 1) is None
    parts = store._connection.execute("SELECT text FROM parts ORDER BY text").fetchall()
    assert [text for (text,) in parts] == sorted(["", system, tools, summary, extra])


@pytest.mark.anyio
async def test_search_is_filtered(store: SqliteStore) -> None:
    """Role, time, store and page narrow a search; deleted passages and other agents' memory are not found."""
    agent, other = await new_agent(store), await new_agent(store, "ada")
    messages = [
        ChatMessage(n, "user" if n % 2 else "assistant", f"2026-11-{n:02}T12:00:00.000Z", f"cake {n}", "{}",
                    said=f"cake {n}")
        for n in range(1, 21)
    ]  # fmt: skip
    passages = [Passage(n, f"cake passage {n}", "2026-12-01T00:00:00.000Z") for n in (1, 2, 3)]
    await store.commit(agent.id, Changes(events=[tell()], messages=messages, passages=passages))
    await store.commit(other.id, Changes(events=[tell()], messages=[say(1, "cake of another")]))

    async def find(query: str = "cake", stores: tuple[str, ...] = ("recall", "archival"), **by: Any) -> list[str]:
        given = {"roles": None, "since": None, "until": None, "limit": 50, "offset": 0} | by
        found, total = await store.search(agent.id, query, stores, **given)
        assert total >= len(found)
        return sorted(item.text for item in found)

    assert len(await find()) == 23
    assert await find(stores=("archival",)) == [passage.text for passage in passages]
    assert await find(roles=("assistant",)) == sorted(f"cake {n}" for n in range(2, 21, 2))
    between = {"since": "2026-11-05T00:00:00.000Z", "until": "2026-11-08T00:00:00.000Z"}
    assert await find(**between) == ["cake 5", "cake 6", "cake 7"]
    assert await find(query="", **between) == ["cake 5", "cake 6", "cake 7"]
    assert len(await find(limit=5)) == 5
    assert len(await find(limit=50, offset=20)) == 3
    assert sorted([text for offset in range(0, 30, 7) for text in await find(limit=7, offset=offset)]) == await find()
    assert len(await find(up_to=(10, 1))) == 11
    await store.commit(agent.id, Changes(events=[tell()], removed=[2]))
    assert await find(stores=("archival",)) == ["cake passage 1", "cake passage 3"]
    assert await store.passage(agent.id, 2) is None
    assert await find("zeppelin") == []


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_deleted_agent_is_kept_aside(store: SqliteStore) -> None:
    """A deleted agent leaves its name free at once, takes no more steps, and comes back whole."""
    agent = await new_agent(store)
    await whole_step(store, agent.id)
    before = await seen(store, agent)
    farewell = tell("deleted", None)
    await store.delete_agent(agent.id, farewell, purge=False)
    assert farewell.seq == 3
    with pytest.raises(memws.UnknownAgent):
        await store.find_agent("sam")
    assert (await store.find_agent("sam", deleted=True)).id == agent.id
    await fails(store.commit(agent.id, Changes(events=[tell()])), "the agent was deleted meanwhile")
    await fails(store.commit(agent.id, Changes(messages=[say(2, "broken")])), "the agent was deleted meanwhile")
    second = await new_agent(store)
    assert (second.id != agent.id, second.last_seq) == (True, 3)
    back = await store.restore_agent("sam", "sam2")
    assert (back.id, back.name, back.last_seq) == (agent.id, "sam2", 3)
    after = await seen(store, agent)
    assert after[2:4] == before[2:4]
    assert after[4] == [*before[4], (3, farewell.text)]
    assert after[5:] == [*before[5:-1], sorted({*before[-1], farewell.text})]


@pytest.mark.anyio
async def test_the_agent_deleted_last_comes_back_first(store: SqliteStore) -> None:
    """Of several agents deleted under a name, restore brings back the last; what nobody deleted is unknown."""
    for number in range(3):
        agent = await new_agent(store)
        await store.commit(agent.id, Changes(state={"number": number}))
        await store.delete_agent(agent.id, None, purge=False)
    back = [(await store.restore_agent("sam", f"sam{number}")).state["number"] for number in range(3)]
    assert back == [2, 1, 0]
    with pytest.raises(memws.UnknownAgent):
        await store.restore_agent("sam", "sam9")
    with pytest.raises(memws.UnknownAgent):
        await store.find_agent("sam", deleted=True)


@pytest.mark.anyio
@pytest.mark.parametrize("aside", [False, True])
async def test_a_purged_agent_is_gone(store: SqliteStore, aside: bool) -> None:
    """A purge leaves no row of the agent anywhere, none of its terms, and touches no other agent."""
    agent, other = await new_agent(store), await new_agent(store, "ada")
    await whole_step(store, agent.id)
    await whole_step(store, other.id)
    before = await seen(store, other)
    if aside:
        await store.delete_agent(agent.id, tell(), purge=False)
    await store.delete_agent(agent.id, None if aside else tell(), purge=True)
    connection = store._connection
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
        if "agent" in columns:
            sql = f"SELECT count(*) FROM {table} WHERE agent = {agent.id}"  # noqa: S608 (names from the schema itself)
            assert connection.execute(sql).fetchone() == (0,), table
    terms = connection.execute("SELECT term FROM search_counts WHERE term LIKE ?", (f"{agent.id}\\_%",)).fetchall()
    assert terms == []
    with pytest.raises(memws.UnknownAgent):
        await store.restore_agent("sam", "sam")
    after = await seen(store, other)
    assert after[2:] == before[2:]
    again = await new_agent(store)
    assert again.id not in (agent.id, other.id)
    assert again.last_seq == 3


@pytest.mark.anyio
async def test_no_seq_is_used_twice_under_a_name(store: SqliteStore) -> None:
    """Whoever gets a name goes on above every seq that was told under it, whatever came between."""
    told: dict[str, list[int]] = {}

    def note(name: str, *events: Event) -> None:
        told.setdefault(name, []).extend(event.seq or 0 for event in events)

    rng = random.Random(7)
    agents: dict[str, int] = {}
    names = ["sam", "ada", "bob"]
    for step in range(300):
        name = rng.choice(names)
        if name not in agents:
            agents[name] = (await new_agent(store, name)).id
        events = [tell(f"{step}"), tell("more")]
        await store.commit(agents[name], Changes(events=events))
        note(name, *events)
        free = [other for other in names if other not in agents]
        event = tell("change", None)
        match rng.randrange(5):
            case 0:
                await store.delete_agent(agents.pop(name), event, purge=rng.random() < 0.5)
                note(name, event)
            case 1 if free:
                agent = agents.pop(name)
                await store.rename_agent(agent, free[0], event)
                note(name, event)  # its subscribers hear of it under the name they know
                agents[free[0]] = agent
            case 2 if free:
                with suppress(memws.UnknownAgent):
                    agents[free[0]] = (await store.restore_agent(rng.choice(names), free[0])).id
    for name, seqs in told.items():
        assert seqs == sorted(set(seqs)), name
    assert min(map(len, told.values())) > 50


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_full_disk_fails_the_step_and_not_the_store(store: SqliteStore) -> None:
    """While the disk is full every write is refused whole and reads go on; once there is room the store goes on."""
    agent, other = await new_agent(store), await new_agent(store, "ada")
    await whole_step(store, agent.id)
    before = await seen(store, agent)
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    huge = Changes(events=[tell("first")], messages=[say(2, "broken " + "x" * 60_000)], begins=("t2", None))
    for _ in range(5):
        await fails(store.commit(agent.id, huge), "full")
        assert await seen(store, agent) == before
    async with held_writer(store):
        tasks = await queued(
            store.commit(agent.id, huge), store.commit(other.id, Changes(passages=[Passage(1, "x" * 99_999, NOW)]))
        )
    assert [type(told) for told in await asyncio.gather(*tasks, return_exceptions=True)] == [StoreFailed] * 2
    assert await seen(store, agent) == before
    store._connection.execute("PRAGMA max_page_count = 1000000")
    changes = await whole_step(store, agent.id, 2, "t2")
    assert [event.seq for event in changes.events] == [3, 4]
    assert store._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.anyio
async def test_a_store_that_may_not_write_reads_on(tmp_path: Path) -> None:
    """A database that has become read-only refuses each write with a reason and still answers."""
    async with opened(tmp_path / "memws.db") as store:
        agent = await new_agent(store)
        await whole_step(store, agent.id)
        before = await seen(store, agent)
        store._connection.execute("PRAGMA query_only = ON")
        await fails(store.commit(agent.id, Changes(events=[tell()])), "readonly")
        await fails(store.create_agent("ada", {}, [], None), "readonly")
        assert await seen(store, agent) == before
        store._connection.execute("PRAGMA query_only = OFF")
        await whole_step(store, agent.id, 2, "t2")


@pytest.mark.anyio
@pytest.mark.parametrize("config", ["{", "NaN", "", "\x00", '{"model": 1', "[]"])
async def test_a_damaged_row_hides_no_agent(store: SqliteStore, config: str) -> None:
    """An agent whose stored JSON is damaged is found as one that lost it; a search that fails says so."""
    agent, other = await new_agent(store), await new_agent(store, "ada")
    await whole_step(store, agent.id)
    store._connection.execute("UPDATE agents SET config = ? WHERE id = ?", (config, agent.id))
    assert (await store.find_agent("sam")).config == {memws.LOST: True}
    assert await store.find_agent("ada") == other
    assert [found.name for found in (await store.list_agents("", 10))[0]] == ["ada", "sam"]
    store._connection.execute("UPDATE agents SET state = x'ff', config = '{}' WHERE id = ?", (agent.id,))
    assert (await store.find_agent("sam")).state == {memws.LOST: True}
    await fails(store.search(agent.id, "", ("recall",), None, None, None, 10, 2**70), "the database")


@pytest.mark.anyio
async def test_a_locked_database_fails_the_step_and_not_the_store(tmp_path: Path) -> None:
    """While another program holds the write lock for too long, writes are refused and reads go on; then all is well."""
    path = tmp_path / "memws.db"
    async with opened(path) as store:
        agent = await new_agent(store)
        await whole_step(store, agent.id)
        before = await seen(store, agent)
        store._connection.execute("PRAGMA busy_timeout = 10")
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await fails(store.commit(agent.id, Changes(events=[tell()])), "locked")
            await fails(store.delete_agent(agent.id, None, purge=True), "locked")
            assert await seen(store, agent) == before
            other.execute("ROLLBACK")
        changes = await whole_step(store, agent.id, 2, "t2")
        assert [event.seq for event in changes.events] == [3, 4]


@pytest.mark.anyio
async def test_a_lock_that_is_given_up_in_time_is_waited_for(tmp_path: Path) -> None:
    """A backup that holds the lock briefly delays a step, which is stored then."""
    path = tmp_path / "memws.db"
    async with opened(path) as store:
        agent = await new_agent(store)
        ran = statements(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            tasks = await queued(*(store.commit(agent.id, Changes(events=[tell()])) for _ in range(30)))
            assert await store.events(agent.id, 0, 100) == []
            other.execute("COMMIT")
        await asyncio.gather(*tasks)
        assert len(await store.events(agent.id, 0, 100)) == 30
        assert ran.count("COMMIT") <= 2


@pytest.mark.anyio
async def test_a_closed_store_has_stored_what_was_handed_over(tmp_path: Path) -> None:
    """Closing stores what waits, may be done twice, and leaves one whole file; after it every call is refused."""
    path = tmp_path / "memws.db"
    async with opened(path) as store:
        agent = await new_agent(store)
        await store.find_agent("sam")
        tasks = await queued(*(store.commit(agent.id, Changes(events=[tell()])) for _ in range(50)))
        await store.close()
        assert await asyncio.gather(*tasks) == [None] * 50
        await store.close()
        for job in (
            store.commit(agent.id, Changes(events=[tell()])),
            store.find_agent("sam"),
            store.events(agent.id, 0, 10),
            store.search(agent.id, "x", ("recall",), None, None, None, 10, 0),
        ):
            await fails(job, "the database is closed")
    assert list(modes_in(tmp_path)) == ["memws.db", "memws.db.lock"]
    async with opened(path) as store:
        assert len(await store.events(agent.id, 0, 100)) == 50


@pytest.mark.anyio
async def test_a_closed_store_in_memory_refuses_too() -> None:
    """After its end a store in memory refuses reads and writes by the same error."""
    async with opened(":memory:") as store:
        agent = await new_agent(store)
    await fails(store.find_agent("sam"), "the database is closed")
    await fails(store.commit(agent.id, Changes(events=[tell()])), "the database is closed")


# ---- files -----------------------------------------------------------------------------------------------------------


def modes_in(folder: Path) -> dict[str, int]:
    """The files of a folder, in order of their names, with their modes."""
    return {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in sorted(folder.iterdir())}


def open_and_fail(path: str | Path) -> str:
    """The sentence of a database that cannot be opened."""
    with pytest.raises(memws.UsageError) as caught:
        SqliteStore(str(path), "full", asyncio.get_running_loop())
    return str(caught.value)


@pytest.mark.anyio
async def test_a_store_survives_being_opened_again(tmp_path: Path) -> None:
    """Everything is read from the file as it was stored."""
    path = tmp_path / "memws.db"
    async with opened(path) as store:
        agent = await new_agent(store)
        await whole_step(store, agent.id)
        before = await seen(store, agent)
    async with opened(path) as store:
        assert await seen(store, agent) == before
        assert [event.seq for event in (await whole_step(store, agent.id, 2, "t2")).events] == [3, 4]


@pytest.mark.anyio
@pytest.mark.parametrize(("sync", "level"), [("full", 2), ("normal", 1)])
async def test_durability_is_as_asked(tmp_path: Path, sync: str, level: int) -> None:
    """The write-ahead log is synced at every commit by default, and left to the system with sync normal."""
    async with opened(tmp_path / "memws.db", sync) as store:
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (level,)
        assert store._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.anyio
async def test_files_are_private(tmp_path: Path) -> None:
    """Every file of a new database can be read by its owner only, whatever the process's mask."""
    path = tmp_path / "memws.db"
    mask = os.umask(0)
    try:
        async with opened(path) as store:
            agent = await new_agent(store)
            await whole_step(store, agent.id)
            await seen(store, agent)
            modes = modes_in(tmp_path)
    finally:
        os.umask(mask)
    assert modes == dict.fromkeys(("memws.db", "memws.db-shm", "memws.db-wal", "memws.db.lock"), 0o600)


@pytest.mark.anyio
async def test_a_second_server_on_the_same_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a store is open the same file is refused under every path that leads to it, and free afterwards."""
    path, link, folder = tmp_path / "memws.db", tmp_path / "link.db", tmp_path / "folder"
    async with opened(path) as store:
        agent = await new_agent(store)
        before = await seen(store, agent)
        link.symlink_to(path)
        folder.symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        for other in (
            path,
            link,
            folder / "memws.db",
            "memws.db",
            "./memws.db",
            tmp_path / ".." / tmp_path.name / "memws.db",
        ):
            sentence = open_and_fail(other)
            assert sentence.startswith("another memws server uses the database ")
            assert sentence.endswith("stop it, or name another file with --db")
        assert await seen(store, agent) == before
    async with opened(link) as store:
        assert (await seen(store, agent)) == before


@pytest.mark.anyio
@pytest.mark.parametrize("make", ["nothing", "empty", "database without tables"])
async def test_version_0_is_brought_to_the_newest(tmp_path: Path, make: str) -> None:
    """A file that is not there, an empty one and a database without tables become one of the newest schema."""
    path = tmp_path / "memws.db"
    if make == "empty":
        path.touch()
    elif make == "database without tables":
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("CREATE TABLE x (y); DROP TABLE x;")
    async with opened(path) as store:
        agent = await new_agent(store)
        await whole_step(store, agent.id)
        assert store._connection.execute("PRAGMA user_version").fetchone() == (len(memws._MIGRATIONS),)
        assert store._connection.execute("PRAGMA application_id").fetchone() == (int.from_bytes(b"memw"),)


@pytest.mark.anyio
async def test_the_next_version_migrates_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database of the version before is migrated in one transaction, or not at all where a step fails."""
    path = tmp_path / "memws.db"
    async with opened(path) as store:
        agent = await new_agent(store)
        await whole_step(store, agent.id)
        before = await seen(store, agent)
    version = len(memws._MIGRATIONS)
    with monkeypatch.context() as patch:
        patch.setattr(
            memws, "_MIGRATIONS", (*memws._MIGRATIONS, "CREATE TABLE later (x); INSERT INTO nowhere VALUES (1)")
        )
        assert open_and_fail(path).startswith(f"cannot use the database {str(path)!r} (no such table: nowhere)")
    async with opened(path) as store:
        assert store._connection.execute("PRAGMA user_version").fetchone() == (version,)
        assert store._connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'later'").fetchone() == (0,)
        assert await seen(store, agent) == before
    monkeypatch.setattr(memws, "_MIGRATIONS", (*memws._MIGRATIONS, "CREATE TABLE later (x)"))
    async with opened(path) as store:
        assert store._connection.execute("PRAGMA user_version").fetchone() == (version + 1,)
        assert await seen(store, agent) == before


def other_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE agents (id, name); INSERT INTO agents VALUES (1, 'theirs');")


def newer_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        memws._migrate(connection, str(path))
        connection.executescript("PRAGMA user_version = 99; CREATE TABLE future (x);")


def cut_header(path: Path) -> None:
    newer_version(path)
    path.write_bytes(path.read_bytes()[:90])


REFUSED = [
    (other_program, "{path!r} is a database of another program; name another file with --db"),
    (newer_version, "{path!r} was written by a newer memws (schema 99); use that one or another file with --db"),
    (lambda path: path.write_text("notes\n" * 1000), "cannot use the database {path!r} (file is not a database); name"),
    (
        lambda path: path.write_bytes(random.Random(1).randbytes(50_000)),
        "cannot use the database {path!r} (file is not",
    ),
    (lambda path: path.write_text("xyz"), "cannot use the database {path!r} (file is not a database); name another"),
    (cut_header, "cannot use the database {path!r} ("),
    (Path.mkdir, "cannot use the database {path!r} (Is a directory); name another file with --db"),
]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("make", "sentence"), REFUSED, ids=["other", "newer", "text", "noise", "short", "cut", "folder"]
)
async def test_what_is_no_database_of_ours_is_left_alone(tmp_path: Path, make: Any, sentence: str) -> None:
    """A file of another program, of a newer memws or of no database is refused by a sentence, and stays as it is."""
    path = tmp_path / "memws.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    assert open_and_fail(path).startswith(sentence.format(path=str(path)))
    assert (path.read_bytes() if path.is_file() else None) == before
    assert list(modes_in(tmp_path)) == ["memws.db"]


@pytest.mark.anyio
async def test_a_database_held_by_another_program_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that another program keeps locked is refused by a sentence, and works once it is free."""
    monkeypatch.setattr(memws, "BUSY_TIMEOUT", 0.05)
    path = tmp_path / "memws.db"
    async with opened(path) as store:
        await new_agent(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        sentence = open_and_fail(path)
    assert sentence == f"cannot use the database {str(path)!r} (database is locked); name another file with --db"
    async with opened(path) as store:
        assert (await store.find_agent("sam")).name == "sam"


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["missing/memws.db", "memws.db/memws.db", "x" * 300])
async def test_an_impossible_path_is_refused(tmp_path: Path, name: str) -> None:
    """A path that cannot be made is refused by a sentence that names it."""
    (tmp_path / "memws.db").touch()
    path = tmp_path / name
    sentence = open_and_fail(path)
    assert sentence.startswith(f"cannot use the database {str(path)!r} (")
    assert sentence.endswith("; name another file with --db")


@pytest.mark.anyio
async def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that SQLite would read as something else, or a shell, are files like any other."""
    monkeypatch.chdir(tmp_path)
    names = ["file:x.db?mode=memory", "a b'c\"d.db", "日本.db", "-x.db", ":memory:.db"]
    for name in names:
        async with opened(name) as store:
            await new_agent(store)
    assert list(modes_in(tmp_path)) == sorted([*names, *(f"{name}.lock" for name in names)])


# ---- damage ----------------------------------------------------------------------------------------------------------


async def read_all(path: Path, names: Sequence[str]) -> int:
    """Do everything with a database that may be damaged; how many calls it refused. Raises what no caller expects."""
    refused = 0
    try:
        store = SqliteStore(str(path), "normal", asyncio.get_running_loop())
    except memws.UsageError:
        return 1
    try:
        jobs: list[Any] = [store.list_agents("", 100)]
        for number, name in enumerate(names, 1):
            jobs += [
                store.find_agent(name),
                store.load(number, 0),
                store.messages(number, None, 50),
                store.events(number, 0, 1000),
                store.turn(number, "t1"),
                store.request(number, "t1", 1),
                store.search(number, "said kept cake", ("recall", "archival"), None, None, None, 20, 0),
                store.search(number, "", ("recall", "archival"), ("user",), NOW, None, 20, 0),
                store.commit(number, Changes(events=[tell()], messages=[say(10_000, "new words")], ends=["t1"])),
            ]
        jobs += [store.create_agent("fresh", {}, [], None), store.delete_agent(1, None, purge=True)]
        for job in jobs:
            try:
                async with asyncio.timeout(LIMIT):
                    await job
            except memws.MemwsError:
                refused += 1
    finally:
        async with asyncio.timeout(LIMIT):
            await store.close()
    return refused


def replace_file(path: Path, content: bytes) -> None:
    """Another database in place of one, without what was left of its log."""
    for leftover in path.parent.glob(f"{path.name}-*"):
        leftover.unlink()
    path.write_bytes(content)


@pytest.mark.anyio
async def test_a_damaged_file_is_refused_or_read(tmp_path: Path) -> None:
    """A file with flipped bytes never hangs or crashes the store: each call is answered or refused by our errors."""
    whole, path = tmp_path / "whole.db", tmp_path / "memws.db"
    names = ["sam", "ada", "bob"]
    async with opened(whole, "normal") as store:
        for name in names:
            agent = await new_agent(store, name)
            for number in range(1, 8):
                await whole_step(store, agent.id, number, f"t{number}")
    assert await read_all(shutil.copyfile(whole, path), names) == 0
    content = whole.read_bytes()
    rng = random.Random(20261124)
    refused = 0
    for case in range(150):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 8, 200])):
            damaged[rng.randrange(100 if case % 10 == 0 else len(damaged))] ^= 1 << rng.randrange(8)
        if case % 15 == 14:
            del damaged[rng.randrange(len(damaged)) :]
        replace_file(path, bytes(damaged))
        refused += await read_all(path, names) > 0
    assert refused > 20
