"""Keeping agents: export and import, check and --repair, backup; its sentences are in test_cli.py."""

import asyncio
import contextlib
import copy
import functools
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from agents import Lab
from endpoint import Body, Endpoint, Reply, greet
from wire import JSON, Wire, is_terminal, wire

import memws

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.anyio

BOUNDED: JSON = {"deadline": None, "derandomize": True, "database": None}
EXAMPLES = 20 * int(os.environ.get("MEMWS_TEST_SEEDS", "3"))
TABLES = ("blocks", "messages", "passages", "turns", "events", "requests", "parts")
RICH, PLAIN, CUT = "Zoë-日本", "sam", "cut"
"Agents 1, 2 and 3: an agent with a long life, one that talks a little, and one whose process was killed in mid-tool."
ODD = "Zażółć 🦊‍🔥 שלום \u202e \x7f \t\r\n 日本 \U0010ffff <b>&amp;</b> '); DROP TABLE agents; --"


def note(number: int) -> int:
    """Note a number."""
    return number


# ---- agents with a past ----------------------------------------------------------------------------------------------


async def live(lab: Lab, name: str) -> memws.Agent:
    """An agent that has been through everything an agent can go through."""
    agent = await lab.create(
        name, human=ODD, context_window=9_000, max_steps=7, settings={"temperature": 0.5, "seed": 3},
        blocks=[{"label": "plans", "value": ODD, "limit": 400}],
    )  # fmt: skip
    script = lab.endpoint.script
    script(Reply(ODD, calls=[("note", {"number": 1, "request_heartbeat": True})], reasoning="Hm."))
    await lab.say(agent, ODD)
    script(
        Reply(
            calls=[
                ("archival_memory_insert", {"content": "The walrus sleeps on ice. " + ODD}),
                ("archival_memory_insert", {"content": "A passage to forget."}),
                ("core_memory_append", {"name": "human", "content": "\nLikes: walruses"}),
                ("no_such_tool", {}),
                ("note", "{broken"),
                ("send_message", {"message": "Noted, 日本."}),
            ]
        )
    )
    await lab.say(agent, "Remember the walrus.")
    assert [event async for event in agent.delete_passage(2)]
    assert [event async for event in agent.set_block("plans", "Sail. " + ODD, None)]
    script(Reply(status=401))
    assert (await lab.say(agent, "This fails.")).stop_reason == "error"
    script(Reply("Long ago, far away", stall_after=2))
    turn = lab.turn("This is cancelled.")

    def stop(event: memws.Event) -> None:
        if event.message_type == "delta":
            asyncio.get_running_loop().call_soon(turn.stop, "cancelled")

    assert (await lab.run(agent, turn, stop)).stop_reason == "cancelled"
    await lab.say(agent, None)
    for number in range(8):
        await lab.say(agent, f"Filler {number}: " + "word " * 200)
    assert [event async for event in agent.compact()]
    assert agent.record.state["cut"] > 1
    assert [event async for event in agent.update(memws.AgentConfig({"max_steps": 9}, lab.tools, agent.record.config))]
    await lab.say(agent, "And after all that?")
    return agent


async def kill(lab: Lab, agent: memws.Agent, message: str, kind: str) -> None:
    """Abandon a turn at its first event of a kind, as a killed process does."""
    lab.endpoint.script(Reply("Let me see.", calls=[("note", {"number": 2})]))
    async with contextlib.aclosing(agent.turn(lab.turn(message))) as events:
        async for event in events:
            if event.message_type == kind:
                return
    pytest.fail(f"no {kind} came")


async def people(path: Path, endpoint: Endpoint) -> None:
    async with Lab(endpoint, path, tools=[note]) as lab:
        await live(lab, RICH)
        plain = await lab.create(PLAIN)
        lab.endpoint.script(Reply(calls=[("note", {"number": 1, "request_heartbeat": True})]))
        await lab.say(plain, "My name is Ada.")
        lab.endpoint.script(Reply(calls=[("archival_memory_insert", {"content": "Otters hold hands."})]))
        await lab.say(plain, "Keep something about otters.")
        await lab.say(plain, "Thanks!")
        await kill(lab, await lab.create(CUT), "Do it.", "tool_call")


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of three agents, to be copied."""
    path = tmp_path_factory.mktemp("past") / "memws.db"
    with Endpoint() as endpoint:
        asyncio.run(people(path, endpoint))
        assert endpoint.refusals == []
    return path


@pytest.fixture
def db(past: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may break."""
    return Path(shutil.copy(past, tmp_path / "memws.db"))


def rows(path: Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.text_factory = bytes
        return connection.execute(sql, values).fetchall()


def content(path: Path) -> bytes:
    return path.read_bytes()


def break_it(path: Path, sql: str) -> None:
    """Change stored rows behind memws's back."""
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        assert connection.execute(sql).rowcount != 0, "nothing was broken"


def stored(path: Path, name: str, without: str = "") -> JSON:
    """Every row of an agent as it is on disk, without its number there."""
    ((number, *told),) = rows(
        path,
        "SELECT id, config, state, created, last_active, last_seq FROM agents WHERE name = ?",
        name.encode().decode(),
    )
    kept: JSON = {"agent": told}
    for table in TABLES:
        found = rows(path, f"SELECT * FROM {table} WHERE agent = ?", number)  # noqa: S608
        kept[table] = sorted((row[1:] for row in found), key=repr)
        assert bool(kept[table]) == (table not in without), f"{name} and {table}"
    return kept


def said(path: Path, name: str) -> list[tuple[Any, ...]]:
    """What the user and the model said, and what the agent keeps, of one agent."""
    kept = []
    for sql in (
        "SELECT 'message', messages.id, role, text, said FROM messages JOIN agents ON agents.id = agent WHERE name = ?",
        "SELECT 'passage', passages.id, text FROM passages JOIN agents ON agents.id = agent WHERE name = ?",
        "SELECT 'block', label, value FROM blocks JOIN agents ON agents.id = agent WHERE name = ?",
    ):
        kept += rows(path, sql, name)
    return kept


# ---- the command line, in this process -------------------------------------------------------------------------------


class Done(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command of memws.py; nothing it does is a traceback."""

    def command(*words: object) -> Done:
        capsys.readouterr()
        status = memws.main([str(word) for word in words])
        done = Done(status, *capsys.readouterr())
        assert "Traceback" not in done.err
        return done

    return command


def sentence(done: Done) -> str:
    """What was refused with exit status 2 and one sentence."""
    assert (done.status, done.out) == (2, ""), done
    assert done.err.startswith("memws: ")
    assert done.err.count("\n") == 1
    return done.err


def export(run: Run, path: Path, name: str) -> str:
    done = run("export", name, "--db", path)
    assert (done.status, done.err) == (0, "")
    return done.out


def bring(run: Run, text: str, path: Path) -> Done:
    """Import a file with this text."""
    file = path.with_name("exported.json")
    file.write_text(text, "utf-8")
    return run("import", file, "--db", path)


async def everything(client: Wire, name: str) -> JSON:
    """All that a client can ask about an agent, before anything new is said."""
    told: JSON = {"loaded": await client.ok("load_agent", name=name)}
    for command in ("get_agent", "get_context", "get_messages"):
        told[command] = await client.ok(command, **({"limit": 200} if command == "get_messages" else {}))
    for query in ("walrus", "日本", "passage", "otters", "word"):
        told[f"search {query}"] = await client.ok("search_memory", query=query, limit=50)
    last_seq = (await client.ok("subscribe", after=0))["last_seq"]
    told["events"] = await client.until(lambda frame: frame.get("seq") == last_seq)
    told["turns"] = list(dict.fromkeys(frame["turn_id"] for frame in told["events"] if frame.get("turn_id")))
    await client.ok("unsubscribe")
    for turn_id in told["turns"]:
        answer = await client.command("get_request", turn_id=turn_id, step=1)
        told[f"request {turn_id}"] = answer.get("result") or answer["error"]["code"]
    return told


def without_age(told: JSON) -> JSON:
    """Without what depends on the moment of asking."""
    return json.loads(json.dumps({key: value for key, value in told.items() if key != "loaded"}))  # type: ignore[no-any-return]


Serve = Callable[..., memws.WebSocketServer]


def is_at(seq: int, frame: JSON) -> bool:
    return frame.get("seq") == seq


async def talk(serve: Serve, path: Path, *names: str) -> dict[str, JSON]:
    """A server opens the agents and takes a turn with each, with whatever came before; what load_agent said."""
    server = serve(db=str(path), rate_limit=0)
    loads = {}
    async with wire(server, "*") as client:
        for name in names:
            loads[name] = await client.ok("load_agent", name=name)
            end = (await client.turn("Do you remember me?"))[-1]
            assert (end["type"], end["stop_reason"]) == ("agent_response_end", "done"), end
            await client.ok("get_messages", limit=200)
            await client.ok("get_context")
            last_seq = (await client.ok("subscribe", after=0))["last_seq"]
            frames = await client.until(functools.partial(is_at, last_seq))
            ends = [frame["turn_id"] for frame in frames if is_terminal(frame)]
            assert len(ends) == len(set(ends)), "a turn with two ends"
            await client.ok("unsubscribe")
    server.stop()
    return loads


# ---- export and import -----------------------------------------------------------------------------------------------


async def test_an_imported_agent_is_the_exported_one(db: Path, tmp_path: Path, run: Run, serve: Serve) -> None:
    """Every row is the same, the next export too, and over the wire nobody can tell the two apart."""
    text = export(run, db, RICH)
    other = tmp_path / "other.db"
    assert bring(run, export(run, db, PLAIN), other).status == 0  # so that its number is another one
    assert bring(run, text, other) == (0, f"agent {RICH!r} is in {other}\n", "")
    assert stored(other, RICH) == stored(db, RICH)
    assert export(run, other, RICH) == text
    told = []
    for path in (db, other):
        server = serve(db=str(path), rate_limit=0)
        async with wire(server, "*") as client:
            told.append(await everything(client, RICH))
        server.stop()
    assert told[0]["loaded"] == told[1]["loaded"]
    assert without_age(told[0]) == without_age(told[1])
    assert len(told[0]["turns"]) > 10


async def test_an_imported_agent_goes_on(db: Path, tmp_path: Path, run: Run, serve: Serve) -> None:
    """Its turn ids stay taken, its seq goes on, and nothing that was said before is run again."""
    other = tmp_path / "other.db"
    assert bring(run, export(run, db, PLAIN), other).status == 0
    server = serve(db=str(other))
    async with wire(server, "*") as client:
        last_seq = (await client.ok("load_agent", name=PLAIN))["last_seq"]
        (turn_id,) = {turn for (turn,) in rows(db, "SELECT turn_id FROM messages WHERE text = 'Thanks!'")}
        frames = await client.turn("Thanks!", turn_id=turn_id.decode())
        assert [frame["seq"] for frame in frames][-1] == last_seq
        assert (await client.turn("Another text", turn_id=turn_id.decode()))[-1]["code"] == "turn_id_reused"
        assert (await client.turn("Now something new"))[0]["seq"] == last_seq + 1
    server.stop()
    assert run("check", "--db", other) == (0, "no damage found\n", "")


async def test_a_turn_cut_by_a_kill_goes_along(db: Path, tmp_path: Path, run: Run, serve: Serve) -> None:
    """An agent whose process was killed in mid-tool is exported as it is, and closed where it is opened."""
    other = tmp_path / "other.db"
    assert bring(run, export(run, db, CUT), other).status == 0
    assert stored(other, CUT, "passages requests parts") == stored(db, CUT, "passages requests parts")
    loads = await talk(serve, other, CUT)
    assert len(loads[CUT]["repaired"]) == 2  # the call and the turn
    assert run("check", "--db", other) == (0, "no damage found\n", "")


async def test_deleted_agents_stay_where_they_are(db: Path, run: Run, serve: Serve) -> None:
    """A deleted agent is not exported; its name is free for an import, whose seq goes on above, and it comes back."""
    text = export(run, db, PLAIN)
    server = serve(db=str(db))
    async with wire(server) as client:
        await client.ok("load_agent", name=PLAIN)
        await client.turn("One more")
        await client.ok("delete_agent", agent_name=PLAIN)
    server.stop()
    assert "unknown agent 'sam'" in sentence(run("export", PLAIN, "--db", db))
    assert bring(run, text, db).status == 0
    server = serve(db=str(db))
    async with wire(server) as client:
        deleted = rows(db, "SELECT last_seq FROM names WHERE name = ?", PLAIN)[0][0]
        assert (await client.turn("Hello again", agent_name=PLAIN))[0]["seq"] == deleted + 2  # after "imported"
        await client.ok("restore_agent", agent_name=PLAIN, new_name="old-sam")
        await client.turn("Welcome back", agent_name="old-sam")
    server.stop()
    assert run("check", "--db", db) == (0, "no damage found\n", "")


async def test_a_name_in_use_is_refused(db: Path, run: Run) -> None:
    """Importing an agent whose name is taken changes nothing."""
    text = export(run, db, PLAIN)
    before = stored(db, PLAIN)
    assert "there is an agent 'sam' already" in sentence(bring(run, text, db))
    assert stored(db, PLAIN) == before
    assert rows(db, "SELECT count(*) FROM agents") == [(3,)]


async def test_an_export_holds_no_secret(tmp_path: Path, run: Run, serve: Serve, endpoint: Endpoint) -> None:
    """Neither keys nor the token nor an endpoint's address leave with an agent."""
    db = tmp_path / "memws.db"
    address = endpoint.url
    server = serve(base_url=address, api_key="sk-canary-server", token="canary-token", model="test-model")
    own = {"name": "own", "base_url": address, "api_key": "sk-canary-agent"}
    for config in ({"name": "sam"}, own):
        await asyncio.to_thread(server.create_new_agent, config)
        await asyncio.to_thread(server.run_step, "What is your key?")
    server.stop()
    assert endpoint.requests
    for name in ("sam", "own"):
        text = export(run, db, name)
        assert "What is your key?" in text
        for secret in ("canary", address, address.split("/")[2]):
            assert secret not in text


def put(data: JSON, place: str, value: Any) -> str:
    """An export with another value at a place like events[3].text; ... takes the place out."""
    data = copy.deepcopy(data)
    *path, last = [
        int(part) if part.isdecimal() else part for part in place.replace("]", "").replace("[", ".").split(".")
    ]
    holder: Any = data
    for part in path:
        holder = holder[part]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    return json.dumps(data)


DAMAGES: list[tuple[str, Any, str]] = [
    ("memws_agent", 2, "exported"),
    ("memws_agent", ..., "exported"),
    ("agent", [], "agent"),
    ("agent.name", ..., "name"),
    ("agent.name", "../../etc", "name"),
    ("agent.name", 5, "name"),
    ("agent.config", "{}", "agent.config"),
    ("agent.config.model", 5, "model"),
    ("agent.config.max_steps", -1, "max_steps"),
    ("agent.config.tools", "note", "tools"),
    ("agent.config.base_url", "http://evil.example/v1", "base_url"),
    ("agent.config.settings", {"temperature": "hot"}, "temperature"),
    ("agent.state", None, "agent.state"),
    ("agent.state.cut", "x", "agent.state"),
    ("agent.state.last_user", "x", "agent.state"),
    ("agent.state.summary", ["x"], "agent.state"),
    ("agent.created", 5, "agent.created"),
    ("agent.last_seq", "5", "agent.last_seq"),
    ("agent.last_seq", -5, "agent.last_seq"),
    ("agent.last_seq", 1, "agent.last_seq"),
    ("agent.last_seq", 2**70, "agent.last_seq"),
    ("blocks", ..., "blocks"),
    ("blocks", {}, "blocks"),
    ("blocks[0]", [], "blocks[0]"),
    ("blocks[0].label", ..., "blocks[0]"),
    ("blocks[0].extra", 1, "blocks[0]"),
    ("blocks[0].limit", "2000", "blocks[0].limit"),
    ("blocks[1].label", "persona", "blocks[1]"),
    ("blocks[0].value", "x\ud800", "blocks[0].value"),
    ("blocks[0].value", "x\x00", "blocks[0].value"),
    ("blocks[0].limit", 1, "blocks[0]"),
    ("messages[2].body", "{", "messages[2].body"),
    ("messages[2].body", "[]", "messages[2].body"),
    ("messages[2].body", '{"role": "assistant", "tool_calls": 5}', "messages[2].body"),
    ("messages[2].body", "{}", "messages[2].body"),
    (
        "messages[2].body",
        '{"role":"assistant","content":null,"tool_calls":[{"id":"a","function":{"name":"note","arguments":"{}"}}]}',
        "messages[2].body",
    ),
    ("messages[1].id", 1, "messages[1]"),
    ("messages[0].id", True, "messages[0].id"),
    ("messages[0].role", "dog", "messages[0].role"),
    ("events[3].text", "{", "events[3].text"),
    ("events[3].text", "5", "events[3].text"),
    ("events[3].seq", 3, "events[3]"),
    ("events[3].seq", 2**65, "events[3]"),
    ("turns[0].digest", "xyz", "turns[0].digest"),
    ("turns[0].over", None, "turns[0].over"),
    ("requests[0].usage", 5, "requests[0].usage"),
    ("requests[0].first", 1.5, "requests[0].first"),
    ("parts[0].digest", 5, "parts[0].digest"),
    ("passages[0].text", None, "passages[0].text"),
]


@pytest.mark.parametrize(
    ("place", "value", "told"), DAMAGES, ids=[f"{place}={value!r}"[:60] for place, value, _ in DAMAGES]
)
async def test_a_damaged_export_is_refused(
    place: str, value: Any, told: str, past: Path, tmp_path: Path, run: Run
) -> None:
    """One sentence names the place of the damage, and nothing is half imported."""
    db = tmp_path / "memws.db"
    assert told in sentence(bring(run, put(json.loads(export(run, past, PLAIN)), place, value), db))
    if db.exists():
        for table in ("agents", "names", "search_rows", *TABLES):
            assert rows(db, f"SELECT count(*) FROM {table}") == [(0,)]  # noqa: S608


async def test_an_export_cut_anywhere_is_refused(past: Path, tmp_path: Path, run: Run) -> None:
    """A file that was not written to its end is refused with the place where it ends."""
    text = export(run, past, PLAIN).rstrip()
    for place in range(0, len(text), len(text) // 40):
        told = sentence(bring(run, text[:place], tmp_path / "memws.db"))
        assert "exported.json" in told
        assert f"char {place}" in told or "char" in told
    assert not (tmp_path / "memws.db").exists()


junk = st.sampled_from(
    [None, True, 0, -1, 7, 2**40, 2**70, 1.5, "", "x", "\x00", "\ud800", "{}", "{", "[]", [], [1], {}, {"a": 1}, "00"]
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of an export that can be damaged, JSON inside strings too."""
    if path:
        yield path
    inner = data
    if isinstance(data, str):
        with contextlib.suppress(ValueError):
            inner, path = json.loads(data), (*path, "json")
    if isinstance(inner, dict):
        for key in inner:
            yield from places(inner[key], (*path, key))
    elif isinstance(inner, list):
        for index in range(min(len(inner), 12)):
            yield from places(inner[index], (*path, index))


def damaged(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    if path[0] == "json":
        return json.dumps(damaged(json.loads(data), path[1:], value))
    changed = copy.copy(data)
    if value is ... and len(path) == 1:
        del changed[path[0]]
    else:
        changed[path[0]] = damaged(data[path[0]], path[1:], value)
    return changed


class Bench:
    """One export and one loop for all examples."""

    def __init__(self, path: Path, endpoint: Endpoint, runner: asyncio.Runner) -> None:
        self.folder, self.endpoint, self.runner = path.parent, endpoint, runner
        with contextlib.closing(memws.read_database(str(path))) as connection:
            self.data = json.loads(json.dumps(memws.export_agent(connection, PLAIN)))
        self.places = list(places(self.data))
        self.count = 0

    async def example(self, text: str) -> None:
        """Import; what is not refused opens and takes a turn."""
        self.count += 1
        self.endpoint.refusals.clear()
        db = self.folder / f"example-{self.count}.db"
        file = self.folder / "example.json"
        file.write_text(text, "utf-8")
        if memws.main(["import", str(file), "--db", str(db)]) == 0:
            async with Lab(self.endpoint, db, tools=[note]) as lab:
                (name,) = [record.name for record in (await lab.store.list_agents("", 9))[0]]
                self.endpoint.default = greet
                agent = await lab.open(name)
                end = (await lab.say(agent, "And now?")).end
                assert end["type"] == "agent_response_end", end
                await lab.store.messages(agent.id, None, 200)
        else:
            assert not db.exists() or rows(db, "SELECT count(*) FROM agents") == [(0,)]
        for left in self.folder.glob(f"{db.name}*"):
            left.unlink()


@pytest.fixture(scope="module")
def bench(past: Path) -> Iterator[Bench]:
    with Endpoint() as endpoint, asyncio.Runner() as runner:
        yield Bench(past, endpoint, runner)


@settings(max_examples=EXAMPLES, **BOUNDED)
@given(st.data())
def test_what_an_import_takes_works(bench: Bench, data: st.DataObject) -> None:
    """An export with junk anywhere is refused, or its agent opens, talks, and sends nothing that endpoints refuse."""
    path = data.draw(st.sampled_from(bench.places))
    value = data.draw(junk | st.just(...))
    bench.runner.run(bench.example(json.dumps(damaged(bench.data, path, value))))
    assert bench.endpoint.refusals == []


# ---- check -----------------------------------------------------------------------------------------------------------


async def test_healthy_agents_are_found_healthy(db: Path, run: Run, serve: Serve) -> None:
    """Long lives, failures, cancels, renames, deletions, a killed process: none is damage, before a load or after."""
    before = content(db)
    assert run("check", "--db", db) == (0, "no damage found\n", "")
    assert content(db) == before
    await talk(serve, db, RICH, PLAIN, CUT)
    server = serve(db=str(db))
    async with wire(server) as client:
        await client.ok("delete_agent", agent_name=RICH)
        await client.ok("rename_agent", agent_name=PLAIN, new_name=RICH)
        await client.turn("A new name", agent_name=RICH)
        await client.ok("create_agent", config={"name": PLAIN})
        await client.turn("A new agent", agent_name=PLAIN)
        await client.ok("restore_agent", agent_name=RICH, new_name="back")
        await client.turn("A restored agent", agent_name="back")
        await client.ok("delete_agent", agent_name=PLAIN, purge=True)
    server.stop()
    assert run("check", "--db", db) == (0, "no damage found\n", "")


async def test_ids_that_an_endpoint_repeats_are_no_damage(tmp_path: Path, endpoint: Endpoint, run: Run) -> None:
    """Endpoints that count their calls from 0 in each answer make agents that are whole."""
    db = tmp_path / "memws.db"
    async with Lab(endpoint, db) as lab:
        agent = await lab.create()
        for _ in range(2):
            endpoint.script(Reply(calls=[("send_message", {"message": "Yes."})], call_ids=["call_0"]))
            assert (await lab.say(agent, "Hi")).replies == ["Yes."]
    assert run("check", "--db", db) == (0, "no damage found\n", "")


class Damage(NamedTuple):
    """What is broken in one agent, by which SQL, and what check says of it."""

    sql: str
    told: str
    mended: bool | None = True
    "None: it may be mended, or told for ever."


FOUND: dict[str, Damage] = {
    "a block over its limit": Damage('UPDATE blocks SET "limit" = 3 WHERE agent = 2', "block persona"),
    "a last seq too low": Damage("UPDATE agents SET last_seq = 3 WHERE id = 2", "last seq"),
    "a state that is no JSON": Damage("UPDATE agents SET state = '{\"cut' WHERE id = 2", "state"),
    "a state of wrong types": Damage("""UPDATE agents SET state = '{"cut":"x"}' WHERE id = 2""", "state"),
    "a config that is no object": Damage("UPDATE agents SET config = '[]' WHERE id = 2", "config"),
    "a config without its keys": Damage("UPDATE agents SET config = '{}' WHERE id = 2", "config"),
    "a config of wrong types": Damage(
        """UPDATE agents SET config = json_set(config, '$.max_steps', 'x') WHERE id = 2""", "config"
    ),
    "a call without its result": Damage("DELETE FROM messages WHERE agent = 2 AND id = 4", "no result", None),
    "the last call without its result": Damage(
        "DELETE FROM messages WHERE agent = 2 AND id = (SELECT max(id) FROM messages WHERE agent = 2)", "no result"
    ),
    "a result without its call": Damage("DELETE FROM messages WHERE agent = 2 AND id = 3", "call", None),
    "an id of two calls": Damage(
        """UPDATE messages SET body = json_set(body, '$.tool_calls[1]', json_extract(body, '$.tool_calls[0]'))
            WHERE agent = 2 AND id = 3""",
        "two calls",
        None,
    ),
    "a user's message that is no JSON": Damage(
        "UPDATE messages SET body = substr(body, 1, 9) WHERE agent = 2 AND role = 'user' AND id < 4",
        "chat message",
        None,
    ),
    "a call that is no JSON": Damage("UPDATE messages SET body = 'x' WHERE agent = 2 AND id = 3", "chat message", None),
    "a call that is no call": Damage(
        """UPDATE messages SET body = '{"role":"assistant","tool_calls":5}' WHERE agent = 2 AND id = 3""",
        "chat message",
        None,
    ),
    "a message that is an empty object": Damage(
        "UPDATE messages SET body = '{}' WHERE agent = 2 AND id = 4", "chat message", None
    ),
    "a message that is missing": Damage(
        "DELETE FROM messages WHERE agent = 2 AND role = 'user' AND id < 4", "missing", False
    ),
    "an event that is missing": Damage("DELETE FROM events WHERE agent = 2 AND seq = 4", "missing", False),
    "the last event missing": Damage(
        "DELETE FROM events WHERE agent = 2 AND seq = (SELECT last_seq FROM agents WHERE id = 2)",
        "missing",
        False,
    ),
    "the first event missing": Damage("DELETE FROM events WHERE agent = 2 AND seq = 1", "missing", False),
    "an event that is no JSON": Damage(
        "UPDATE events SET text = substr(text, 1, 9) WHERE agent = 2 AND seq = 4", "event 4", None
    ),
    "an event that is no object": Damage("UPDATE events SET text = '5' WHERE agent = 2 AND seq = 4", "event 4", None),
    "a passage that search does not know": Damage(
        "DELETE FROM search_rows WHERE agent = 2 AND store = 'archival'", "search"
    ),
    "a message that search does not know": Damage("DELETE FROM search_rows WHERE agent = 2 AND item = 2", "search"),
    "a passage under another's id": Damage(
        "UPDATE search_rows SET item = 77 WHERE agent = 2 AND store = 'archival'", "search"
    ),
    "another text under a passage": Damage("UPDATE passages SET text = 'Seals sing.' WHERE agent = 2", "search"),
    "postings that are lost": Damage("INSERT INTO search_text (search_text) VALUES ('delete-all')", "search"),
    "text that is no UTF-8": Damage(
        "UPDATE messages SET text = CAST(x'ff41' AS TEXT) WHERE agent = 2 AND id = 2", "UTF-8", None
    ),
    "a block that is no UTF-8": Damage(
        "UPDATE blocks SET value = CAST(x'ff41' AS TEXT) WHERE agent = 2 AND label = 'human'", "UTF-8", None
    ),
    "a limit that is no number": Damage(
        "UPDATE blocks SET \"limit\" = 'x' WHERE agent = 2 AND label = 'human'", "blocks.limit"
    ),
    "a turn marked open": Damage("UPDATE turns SET over = 0 WHERE agent = 2", "turn"),
    "a turn that is missing": Damage("DELETE FROM turns WHERE agent = 2", "turn", None),
}


@pytest.mark.parametrize("what", FOUND)
async def test_check_repair_and_go_on(what: str, db: Path, run: Run, serve: Serve) -> None:
    """check names agent and damage and changes nothing; a repair, after a backup, loses no word; then talk goes on."""
    damage = FOUND[what]
    break_it(db, damage.sql)
    broken, kept = content(db), said(db, PLAIN)
    others = [stored(db, name) for name in (RICH,)]
    found = run("check", "--db", db)
    assert (found.status, found.err) == (1, ""), "nothing was found"
    assert f"damaged: agent {PLAIN}: " in found.out
    assert damage.told in found.out
    assert what == "postings that are lost" or not {RICH, CUT} & set(re.findall(r"agent (\S+):", found.out))
    assert content(db) == broken
    repaired = run("check", "--repair", "--db", db)
    backups = list(db.parent.glob("memws.db.before-repair-*"))
    assert [said(backup, PLAIN) for backup in backups] == [kept] * ("mended: " in repaired.out)
    assert [row for row in kept if row not in said(db, PLAIN)] == []
    assert [stored(db, name) for name in (RICH,)] == others
    again = run("check", "--db", db)
    assert (repaired.status, again.status) in [(0, 0)] * (damage.mended is not False) + [(1, 1)] * (not damage.mended)
    assert (again.out == "no damage found\n") == (again.status == 0)
    if damage.told != "UTF-8":  # what cannot be read is told by name, and others go on
        await talk(serve, db, PLAIN, RICH)
    else:
        await talk(serve, db, RICH)
    assert run("check", "--db", db).status == again.status


@pytest.mark.parametrize("what", FOUND)
async def test_damage_is_no_fault_of_ours(what: str, db: Path, serve: Serve) -> None:
    """Without any repair the agent answers or says store_failed, never internal, and the others go on as before."""
    break_it(db, FOUND[what].sql)
    server = serve(db=str(db), rate_limit=0)
    async with wire(server, "*") as client:
        answers = [
            await client.command("load_agent", name=PLAIN),
            (await client.turn("Do you remember me?", agent_name=PLAIN))[-1],
            await client.command("get_messages", agent_name=PLAIN, limit=200),
            await client.command("get_context", agent_name=PLAIN),
            await client.command("get_agent", agent_name=PLAIN),
            await client.command("search_memory", agent_name=PLAIN, query="otters"),
            await client.command("set_block", agent_name=PLAIN, label="persona", value="Calm."),
        ]
        codes = [answer.get("code") or answer.get("error", {}).get("code") for answer in answers]
        assert [code for code in codes if code not in (None, "store_failed", "not_found", "block_limit")] == []
        await client.ok("load_agent", name=RICH)
        assert (await client.turn("And you?"))[-1]["stop_reason"] == "done"


async def test_a_load_says_what_it_mended(db: Path, serve: Serve) -> None:
    """A call that lost its result leaves the prompt: load_agent says so, and a stored event tells every subscriber."""
    break_it(db, FOUND["a call without its result"].sql)
    server = serve(db=str(db))
    async with wire(server, "*") as client:
        last_seq = rows(db, "SELECT last_seq FROM agents WHERE name = ?", PLAIN)[0][0]
        (mended,) = (await client.ok("load_agent", name=PLAIN))["repaired"]
        await client.ok("subscribe", after=last_seq)
        event = await client.receive()
        assert (event["message_type"], event["message"], event["seq"]) == ("correction", mended, last_seq + 1)
        assert (await client.ok("load_agent", name=PLAIN))["repaired"] == []


async def test_a_replay_tells_of_a_damaged_event(db: Path, serve: Serve) -> None:
    """In the place of an event that cannot be read any more a replay sends a correction that says so, and goes on."""
    seqs = [seq for (seq,) in rows(db, "SELECT seq FROM events JOIN agents ON id = agent WHERE name = ?", PLAIN)]
    break_it(db, "UPDATE events SET text = '{' WHERE seq = 3")
    server = serve(db=str(db))
    async with wire(server, "*") as client:
        last_seq = (await client.ok("subscribe", agent_name=PLAIN, after=0))["last_seq"]
        frames = [*client.before_answer, *await client.until(lambda told: told.get("seq") == last_seq)]
        assert [frame["seq"] for frame in frames] == seqs
        damaged = [(frame["seq"], frame["message_type"]) for frame in frames if frame.get("what") == "damaged"]
        assert damaged == [(3, "correction")]


async def test_a_repair_needs_no_damage(db: Path, run: Run) -> None:
    """--repair of a whole database finds nothing, changes nothing and leaves no copy behind."""
    before = content(db)
    assert run("check", "--repair", "--db", db)[:2] == (0, "no damage found\n")
    assert content(db) == before
    assert list(db.parent.glob("*before-repair*")) == []


# ---- beside a running server -----------------------------------------------------------------------------------------


class Meanwhile:
    """Another process that commits an event of an agent whenever it is called."""

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, timeout=0, check_same_thread=False)
        self.count = 0

    def __call__(self, *_: object) -> None:
        self.count += 1
        assert self.count < 1_000, "it begins again and again"
        event = json.dumps({"type": "agent_response", "message_type": "correction", "message": "x" * 50})
        with memws.transaction(self.connection):
            self.connection.execute("UPDATE agents SET last_seq = last_seq + 1 WHERE name = ?", (PLAIN,))
            self.connection.execute(
                "INSERT INTO events SELECT id, last_seq, NULL, ? FROM agents WHERE name = ?", (event, PLAIN)
            )


@pytest.fixture
def meanwhile(db: Path) -> Iterator[Meanwhile]:
    other = Meanwhile(db)
    other()
    yield other
    other.connection.close()


async def test_an_export_is_of_one_moment(db: Path, meanwhile: Meanwhile) -> None:
    """What is stored while an agent is exported is in the file as a whole or not at all."""
    with contextlib.closing(memws.read_database(str(db))) as connection:
        connection.set_trace_callback(meanwhile)
        data = memws.export_agent(connection, PLAIN)
    assert meanwhile.count > 3
    assert data["agent"]["last_seq"] == data["events"][-1]["seq"] == len(data["events"])


async def test_a_check_is_of_one_moment(db: Path, meanwhile: Meanwhile) -> None:
    """A server that works while its database is checked is not taken for damage."""
    with contextlib.closing(memws.read_database(str(db))) as connection:
        connection.set_trace_callback(meanwhile)
        assert list(memws.check_database(connection, memws.MENDERS, repair=False)) == []
    assert meanwhile.count > 3


async def test_a_backup_ends_however_much_is_written(db: Path, tmp_path: Path, run: Run, meanwhile: Meanwhile) -> None:
    """A copy of many pages is of one moment, though something is stored after each of its pieces."""
    filler = [(f"{number} " + "x" * 3_000,) for number in range(5_000)]
    with memws.transaction(meanwhile.connection):
        meanwhile.connection.execute("CREATE TABLE filler (text TEXT)")
        meanwhile.connection.executemany("INSERT INTO filler VALUES (?)", filler)
    calls = meanwhile.count
    memws.backup_database(str(db), str(tmp_path / "copy.db"), meanwhile)
    assert calls + 1 < meanwhile.count
    assert rows(tmp_path / "copy.db", "PRAGMA integrity_check") == [(b"ok",)]
    assert run("check", "--db", tmp_path / "copy.db") == (0, "no damage found\n", "")


async def test_a_backup_made_while_turns_run_is_whole(
    tmp_path: Path, run: Run, serve: Serve, endpoint: Endpoint
) -> None:
    """Copies made under eight agents that talk hold all that was acknowledged before, and the agents in them go on."""
    names = [f"agent{number}" for number in range(8)]

    def model(body: Body) -> Reply:
        if len(body["messages"]) % 3:
            return Reply(
                "Well.", calls=[("archival_memory_insert", {"content": "Fact", "request_heartbeat": True})], chunk=4
            )
        return greet(body)

    endpoint.default = model
    server = serve(base_url=endpoint.url, model="test-model", api_key="sk-x", rate_limit=0)
    acknowledged: list[tuple[str, str]] = []
    more = asyncio.Condition()
    over = asyncio.Event()

    async def chatter(name: str) -> None:
        async with wire(server) as client:
            await client.ok("create_agent", config={"name": name})
            number = 0
            while not over.is_set() or number < 3:
                number += 1
                text = f"{name} says {number}"
                await client.say(text)
                await client.started()
                acknowledged.append((name, text))
                async with more:
                    more.notify_all()
                await client.ended()

    tasks = [asyncio.create_task(chatter(name)) for name in names]
    copies: list[tuple[Path, list[tuple[str, str]]]] = []
    with ThreadPoolExecutor(1) as pool:
        for number in range(5):
            async with asyncio.timeout(20), more:
                while len(acknowledged) < 16 * (number + 1):
                    await more.wait()
            copy_ = tmp_path / f"copy{number}.db"
            copies.append((copy_, list(acknowledged)))
            arguments = ["backup", str(copy_), "--db", str(tmp_path / "memws.db")]
            assert await asyncio.get_running_loop().run_in_executor(pool, memws.main, arguments) == 0
    over.set()
    await asyncio.gather(*tasks)
    server.stop()
    for copy_, known in copies:
        assert run("check", "--db", copy_) == (0, "no damage found\n", "")
        query = "SELECT name, text FROM messages JOIN agents ON agents.id = agent WHERE role = 'user'"
        kept = [(name.decode(), text.decode()) for name, text in rows(copy_, query)]
        assert len(kept) == len(set(kept))
        assert [pair for pair in known if pair not in kept] == []
    await talk(serve, copies[-1][0], *names)
