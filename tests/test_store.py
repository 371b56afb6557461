"""The store: what is committed is there whole, once and in order, whatever fails around it; search; export and import.

Every test of what a store keeps runs on a file, in memory and in PostgreSQL.
"""

import asyncio
import json
import os
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

import memws
from memws import AgentRecord, Changes, Query, Store, commit, create_agent, find_agent, read_events, read_messages

pytestmark = pytest.mark.anyio
LIMIT = 20.0  # seconds after which a store that does not answer fails its test
NOW = "2026-11-24T10:00:00.000Z"
BLOCKS = [{"label": label, "value": "", "limit": 200, "version": 1} for label in ("persona", "human")]
FORMER = Path(__file__).with_name("former_agent.json")
"""An agent as memws before 0.2 exported it: a turn of two steps, an edited block, a passage."""


@asynccontextmanager
async def opened(path: str | Path, sync: str = "full") -> AsyncIterator[Store]:
    store = Store(memws.database_at(str(path), sync))
    try:
        async with asyncio.timeout(LIMIT):
            yield store
    finally:
        await store.close()


@pytest.fixture(params=["file", "memory", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """A new store, on disk, in memory and in PostgreSQL."""
    address = {"file": tmp_path / "memws.db", "memory": ":memory:"}.get(request.param)
    async with opened(address or request.getfixturevalue("postgres_address")) as new:
        yield new
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("memws-")] == []


CHANGE = memws.response("agent_change", "changed")


def start(turn_id: str = "t1", kind: str = "start") -> dict[str, Any]:
    return {"type": f"agent_response_{kind}", "turn_id": turn_id}


def tell(text: str = "x", turn_id: str = "t1", **fields: Any) -> dict[str, Any]:
    return memws.response("internal_monologue", text, turn_id, 1, **fields)


def say(number: int, text: str, role: str = "user", turn_id: str = "t1") -> memws.ChatMessage:
    body = memws.encode_json({"role": "user", "content": text})
    return memws.ChatMessage(number, role, NOW, text, body, turn_id, 1)


def words(number: int, text: str, time: str = NOW, role: str = "user") -> memws.Document:
    return memws.Document(number, "recall", role, time, text)


def passage(number: int, text: str, time: str = NOW) -> memws.Document:
    return memws.Document(number, "archival", "", time, text)


def asked(turn_id: str = "t1", step: int = 1, first: int = 1, last: int = 1, **texts: str) -> memws.RequestRecord:
    """A model call over the messages `first` to `last`."""
    pieces: Any = {"head": '{"model":"m"}', "system": '{"s":1}', "summary": "", "tools": "[]", "extra": ""} | texts
    return memws.RequestRecord(turn_id, step, **pieces, first=first, last=last, sent="?", response={"r": 1})


async def new_agent(store: Store, name: str = "sam") -> AgentRecord:
    return await store.write(create_agent, AgentRecord(name, {"model": None, "settings": {"seed": 1}}, BLOCKS))


def step(number: int = 1, turn_id: str = "t1") -> Changes:
    """Something of everything."""
    blocks = [BLOCKS[0], BLOCKS[1] | {"value": f"Name: Ada {number}", "version": number + 1}]
    return Changes(
        events=[start(turn_id), tell(f"told {number}", turn_id)],
        messages=[say(number, f"said {number}", turn_id=turn_id)],
        documents=[words(number, f"said {number}"), passage(number, f"kept {number}")],
        request=asked(turn_id, 1, 1, number),
        columns={"state": {"cut": number}, "config": {"model": f"model {number}"}, "blocks": blocks},
    )


async def everything(store: Store, agent: int) -> list[Any]:
    """All that can be read of an agent."""
    listed, total = await store.read(memws.list_agents, "", 100)
    return [
        [record for record in listed if record.id == agent],
        total,
        await store.read(memws.load_messages, agent, 0),
        await store.read(read_messages, agent),
        await store.read(read_events, agent, 0, 1000),
        [await store.read(memws.find_passage, agent, number) for number in range(1, 20)],
        [await store.read(memws.find_turn, agent, turn_id) for turn_id in ("t1", "t2", "t3")],
        await store.read(lambda db: db.execute("SELECT * FROM requests WHERE agent = ?", (agent,)).fetchall()),
        await store.read(memws.search, agent, Query("", limit=50)),
        await store.read(memws.search, agent, Query("said kept broken", limit=50)),
    ]


async def find(store: Store, agent: AgentRecord, text: str = "", *stores: str, **by: Any) -> list[str]:
    query = Query(text, stores or ("recall", "archival"), **({"limit": 50} | by))
    return [document.text for document in (await store.read(memws.search, agent.id, query))[0]]


@asynccontextmanager
async def held_writer(store: Store) -> AsyncIterator[None]:
    """The writer is busy with another job until the block ends: what is committed meanwhile waits together."""
    busy, go_on = threading.Event(), threading.Event()
    holding = asyncio.ensure_future(store.write(lambda _: [event() for event in (busy.set, go_on.wait)]))
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


class Recorder:
    """A connection that notes what it is told to do."""

    def __init__(self, connection: Any) -> None:
        self.connection, self.ran = connection, list[str]()

    def execute(self, sql: str, *values: Any) -> Any:
        self.ran.append(sql)
        return self.connection.execute(sql, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


async def test_what_arrives_together_shares_a_transaction(store: Store) -> None:
    """All that waits is stored by one transaction, up to a bound, without gaps; a job that fails leaves no trace."""
    agents = [await new_agent(store, f"agent{number}") for number in range(4)]
    steps = [(agent, [tell(f"{n} {m}") for m in range(n % 4 + 1)]) for n in range(150) for agent in agents]
    recorder: Any = Recorder(store._connection)
    store._connection, ran = recorder, recorder.ran
    async with held_writer(store):
        tasks = await queued(*(store.write(commit, agent.id, Changes(events)) for agent, events in steps))
        ran.clear()
    stored = await asyncio.gather(*tasks)
    batches = -(-600 // memws.WRITE_BATCH)
    assert (ran.count("BEGIN IMMEDIATE"), ran.count("COMMIT")) == (batches, batches + 1)  # one is the held job's
    for agent in agents:
        mine = [event for (owner, _), events in zip(steps, stored, strict=True) if owner is agent for event in events]
        assert [event.seq for event in mine] == list(range(1, len(mine) + 1))
        assert await store.read(read_events, agent.id, 0, 1000) == mine
    before = await everything(store, agents[1].id)
    async with held_writer(store):
        jobs: list[Any] = [store.write(commit, agents[0].id, step()), new_agent(store, "agent2")]
        wrong = [(agents[1].id, Changes([tell("first")], removed=[1], columns={"state": 1e999})), (10**6, step())]
        jobs += [store.write(commit, *each) for each in (*wrong, (agents[2].id, step()))]
        tasks = await queued(*jobs)
        ran.clear()
    told = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in told] == [list, memws.Refused, memws.StoreFailed, memws.StoreFailed, list]
    assert ran.count("BEGIN IMMEDIATE") == 4  # once more without each that has failed
    assert await everything(store, agents[1].id) == before
    assert [len(await store.read(read_messages, agent.id)) for agent in agents] == [1, 0, 1, 0]


@pytest.mark.parametrize("text", ["", "{", '{"type":"agent'])
async def test_a_damaged_event_breaks_no_replay(store: Store, text: str) -> None:
    """In its place stands a correction, in that of a turn's end an end that says so."""
    agent = await new_agent(store)
    before = await store.write(commit, agent.id, Changes([start(), tell(), tell("whole"), start("t1", "end")]))
    await store.write(lambda db: db.execute("UPDATE events SET text = ? WHERE seq IN (2, 4)", (text,)))
    events = await store.read(read_events, agent.id, 0, 10)
    assert events[::2] == before[::2]
    assert [event[:3] for event in events[1::2]] == [(2, "correction", "t1"), (4, "agent_response_error", "t1")]
    assert all("this event is damaged on disk" in event.text for event in events[1::2])


async def test_times_of_turns(store: Store) -> None:
    """Times are found although the clock was set back; a turn over an hour after another takes no words from it."""
    agent = await new_agent(store)
    times = [f"2026-11-24T{at}:00.000Z" for at in ("10:00", "10:30", "09:50", "10:10", "11:00", "12:30")]
    texts = ["cake 1", "cake 2", "cake 3", "cake 4", "pancakes", "later"]
    documents = [words(n, text, time) for n, (text, time) in enumerate(zip(texts, times, strict=True), 1)]
    await store.write(commit, agent.id, Changes(documents=documents))
    for text in ("cake", "", "ake"):
        found = await find(store, agent, text, since="2026-11-24T10:05:00.000Z", until="2026-11-24T10:40:00.000Z")
        assert {"cake 2", "cake 4"} <= set(found) <= {"cake 2", "cake 3", "cake 4"}
    found = await find(store, agent, "pancakes")
    assert (found[0], "cake 4" in found, "later" in found) == ("pancakes", True, False)


@pytest.mark.parametrize("aside", [False, True])
async def test_a_purged_agent_is_gone(store: Store, aside: bool) -> None:
    """A purge leaves nothing of the agent but its name and last seq, and touches no other agent."""
    agent, other = await new_agent(store), await new_agent(store, "ada")
    for one in (agent, other):
        await store.write(commit, one.id, step())
    before = await everything(store, other.id)
    postings = "SELECT count(*) FROM postings"
    held = store._connection.execute(postings).fetchone()[0]
    if aside:
        await store.write(memws.delete_agent, agent.id, CHANGE, purge=False)
    await store.write(memws.delete_agent, agent.id, None if aside else CHANGE, purge=True)
    for table in ("messages", "memory", "events", "requests"):
        sql = f"SELECT count(*) FROM {table} WHERE agent = ?"  # noqa: S608
        assert store._connection.execute(sql, (agent.id,)).fetchone() == (0,), table
    assert store._connection.execute(postings).fetchone()[0] == held / 2
    sql = "SELECT name, last_seq, config, blocks FROM agents WHERE id <> ?"
    assert store._connection.execute(sql, (other.id,)).fetchall() == [("sam", 3, "{}", "[]")]
    with pytest.raises(memws.Refused, match="unknown agent"):
        await store.write(memws.restore_agent, "sam", "sam")
    assert await everything(store, other.id) == [before[0], 1, *before[2:]]
    assert (await new_agent(store)).last_seq == 3


def modes_in(folder: Path) -> dict[str, int]:
    """The files of a folder, in order of their names, with their modes."""
    return {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in sorted(folder.iterdir())}


def open_and_fail(path: object) -> str:
    """The sentence of a database that cannot be opened."""
    with pytest.raises(memws.UsageError) as caught:
        Store(memws.Sqlite(str(path)))
    return str(caught.value)


@pytest.mark.parametrize(("sync", "level"), [("full", 2), ("normal", 1)])
async def test_a_store_survives_being_opened_again(tmp_path: Path, sync: str, level: int) -> None:
    """All is read from the file as it was stored, as durable as asked for; every file is its owner's only."""
    path, mask = tmp_path / "memws.db", os.umask(0)
    try:
        async with opened(path, sync) as store:
            assert store._connection.execute("PRAGMA synchronous").fetchone() == (level,)
            agent = await new_agent(store)
            await store.write(commit, agent.id, step())
            before, modes = await everything(store, agent.id), modes_in(tmp_path)
    finally:
        os.umask(mask)
    assert modes == dict.fromkeys(("memws.db", "memws.db-shm", "memws.db-wal", "memws.db.lock"), 0o600)
    assert list(modes_in(tmp_path)) == ["memws.db", "memws.db.lock"]
    async with opened(path) as store:
        assert await everything(store, agent.id) == before
        assert [event.seq for event in await store.write(commit, agent.id, step(2, "t2"))] == [3, 4]


async def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name is a file; what cannot be, is open by any path, or is held by another program is refused."""
    monkeypatch.chdir(tmp_path)
    names = ["file:x.db?mode=memory", "a b'c\"d.db", "日本.db", "-x.db", ":memory:.db", "empty.db"]
    await asyncio.to_thread(Path("empty.db").touch)
    for name in names:
        async with opened(name) as store:
            await new_agent(store)
    assert list(modes_in(tmp_path)) == sorted([*names, *(f"{name}.lock" for name in names)])
    refused = dict.fromkeys(("missing/memws.db", "empty.db/memws.db", "x" * 300), "cannot use the database ")
    (tmp_path / "link.db").symlink_to(tmp_path / "memws.db")
    (tmp_path / "folder").symlink_to(tmp_path)
    paths: list[Any] = ["link.db", "./memws.db", tmp_path / "memws.db", "folder/memws.db"]
    for first in ("memws.db", "link.db"):
        with closing(memws.Sqlite(first)) as base:
            base.open()
            for path, start in (refused | dict.fromkeys(paths, "(database is locked); stop the memws server ")).items():
                sentence = open_and_fail(path)
                assert (start in sentence, "name another file with --db" in sentence) == (True, True)
    monkeypatch.setattr(memws, "BUSY_TIMEOUT", 0.05)
    with closing(sqlite3.connect("empty.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert "(database is locked); stop " in open_and_fail("empty.db")


def bring(path: str | Path, data: Any) -> str:
    with closing(memws.database_at(str(path), "normal")) as base:
        return memws.import_agent(base.open(), data)


def take(path: Path, name: str = "sam") -> Any:
    with memws.read_database(str(path)) as connection:
        return json.loads(json.dumps(memws.export_agent(connection, name)))


async def test_a_former_export_is_read(database: str, tmp_path: Path) -> None:
    """An agent of memws before 0.2 comes with all it said, kept and was told, and with the bytes that were sent."""
    data = json.loads(FORMER.read_text("utf-8"))
    data["turns"].append(data["turns"][0] | {"turn_id": "open", "over": 0})
    assert bring(database, data) == "sam"
    async with opened(database) as store:
        agent = await store.read(find_agent, "sam")
        assert agent.state.items() >= (data["agent"]["state"] | {"turn": "open"}).items()
        assert agent.config | {"embedding": None} == data["agent"]["config"] | {"timezone": None}
        assert [block["value"] for block in agent.blocks] == [block["value"] for block in data["blocks"]]
        messages, counts = await store.read(memws.load_messages, agent.id, 0)
        assert [(each.id, each.body) for each in messages] == [(row["id"], row["body"]) for row in data["messages"]]
        assert counts == (len(messages), 1, 1)
        assert memws.history_faults(messages) == ([], {})
        assert [row["text"] for row in data["events"]] == [
            event.text for event in await store.read(read_events, agent.id, 0, 100)
        ]
        turn_id = data["turns"][0]["turn_id"]
        stored = await store.read(memws.find_turn, agent.id, turn_id)
        assert json.loads(stored["user_message"])["message"] == "My name is Ada and I keep otters."
        assert len(await find(store, agent, "otters")) == 3
        for number in (1, 2):
            await store.read(memws.find_request, agent.id, turn_id, number)  # which compares it with its digest
    assert list(memws.check_database(database)) == []
    for damage in ({"passages": [{}]}, {"parts": []}):
        with pytest.raises(memws.MemwsError, match="damaged: the former format: '"):
            bring(tmp_path / "other.db", data | damage)


async def test_an_import_is_whole_and_text(tmp_path: Path) -> None:
    """On a full disk it is refused and stores nothing; what no text can hold is read as U+FFFD."""
    path, other = tmp_path / "memws.db", tmp_path / "other.db"
    async with opened(path) as store:
        await store.write(commit, (await new_agent(store)).id, step())
    data = take(path)
    row = data["messages"][0]
    with closing(memws.Sqlite(str(other), "normal")) as base:
        connection = base.open()
        connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(memws.StoreFailed, match="the database refused: database or disk is full"):
            memws.import_agent(connection, data | {"messages": [row | {"text": "x" * 99_999}]})
        assert connection.execute("SELECT count(*) FROM agents").fetchone() == (0,)
    odd = data["agent"] | {"name": "\u0065\u0301mile", "config": '{"model":"\\ud800"}'}
    row |= {"body": '{"role":"user","content":"\\ud800"}'}
    assert bring(other, data | {"agent": odd, "messages": [row]}) == "émile"
    took = take(other, "émile")
    assert json.loads(took["agent"]["config"])["model"] == "\ufffd"
    assert took["messages"][0]["body"] == '{"role":"user","content":"\ufffd"}'
