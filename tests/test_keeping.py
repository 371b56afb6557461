"""Keeping agents on the command line: export and import, check, backup."""

import asyncio
import contextlib
import copy
import json
import os
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import Done, Main, Serving, environment, run, sentence
from endpoint import Endpoint, Reply

import memws

JSON = dict[str, Any]
RICH, PLAIN, CUT = "Zoë-日本", "sam", "cut"  # a long life, a little talk, a process that was killed in mid-tool
ODD = "Zażółć 🦊‍🔥 שלום \u202e \x7f \t\r\n 日本 \U0010ffff <b>&amp;</b> '); DROP TABLE agents; --"


def live(client: memws.BlockingClient, endpoint: Endpoint) -> None:
    """An agent that has been through much of what an agent can go through."""
    blocks = [{"label": "plans", "value": ODD, "limit": 400}]
    client.create_agent(RICH, human=ODD, context_window=9_000, max_steps=7, settings={"seed": 3}, blocks=blocks)
    remember = {"name": "human", "content": "\nLikes: walruses", "request_heartbeat": True}
    calls: list[tuple[str, Any]] = [
        ("archival_memory_insert", {"content": "The walrus sleeps on ice. " + ODD}),
        ("archival_memory_insert", {"content": "A passage to forget."}),
        ("core_memory_append", remember),
        ("no_such_tool", {}),
        ("send_message", {"message": "Noted, 日本."}),
    ]
    endpoint.script(Reply(ODD, calls=calls, reasoning="Hm."), Reply(calls=[("send_message", {"message": "Done."})]))
    client.ask("Remember the walrus. " + ODD, from_=ODD[:64])
    client.command("delete_passage", passage_id=2)
    client.command("set_block", label="plans", value="Sail. " + ODD)
    endpoint.script(Reply(status=401))
    with contextlib.suppress(memws.RemoteError):
        client.ask("This fails.")
    for number in range(8):
        client.ask(f"Filler {number}: " + "word " * 200)
    client.command("compact")
    client.command("update_agent", config={"max_steps": 9})
    client.ask("And after all that?")


def die(client: memws.BlockingClient, endpoint: Endpoint, process: Serving) -> None:
    """Kill the process while it waits for what comes after a tool call."""
    endpoint.script(Reply(calls=[("core_memory_append", {"name": "human", "content": "x", "request_heartbeat": True})]))
    endpoint.script(Reply("never told", hold=True))
    count = len(endpoint.requests)
    client.create_agent(CUT)
    client.send("Do it.")
    endpoint.wait_requests(count + 2)
    process.process.kill()
    process.wait()


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of three agents, to be copied."""
    folder = tmp_path_factory.mktemp("past")
    with Endpoint() as endpoint:
        flags = ("--base-url", endpoint.url, "--context-window", "30000")
        process = Serving(*flags, cwd=folder, variables={"OPENAI_API_KEY": "k"})
        with process, memws.connect(process.url, reconnect=False) as client:
            live(client, endpoint)
            client.create_agent(PLAIN)
            endpoint.script(Reply(calls=[("archival_memory_insert", {"content": "Otters hold hands."})]))
            for text in ("My name is Ada, keep something about otters.", "Thanks!"):
                client.ask(text)
            die(client, endpoint, process)
        assert endpoint.refusals == []
    with contextlib.closing(sqlite3.connect(folder / "memws.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return folder / "memws.db"


@pytest.fixture
def db(past: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may break."""
    return Path(shutil.copy(past, tmp_path / "memws.db"))


def rows(database: str | Path, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    with memws.read_database(str(database)) as connection:
        return connection.execute(sql, values).fetchall()


Serve = Callable[..., memws.WebSocketServer]


def export(main: Main, database: str | Path, name: str) -> str:
    done = main("export", name, "--db", database)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def bring(main: Main, text: str, database: str | Path) -> Done:
    """Import a file with this text."""
    file = Path("exported.json")
    file.write_text(text, "utf-8")
    return main("import", file, "--db", database)


def healthy(main: Main, database: str | Path) -> bool:
    done = main("check", "--db", database)
    return done.returncode == 0 and done.stdout.startswith("no damage found\n")


def everything(server: memws.WebSocketServer, name: str) -> JSON:
    """All that a client can ask about an agent."""
    with memws.connect(server.url) as client:
        client.hello(["*"])
        told: JSON = {"loaded": client.load_agent(name)}
        for command in ("get_agent", "get_context", "get_messages"):
            told[command] = client.command(command)
        for query in ("walrus", "日本", "passage", "otters", "word"):
            told[f"search {query}"] = client.command("search_memory", query=query, limit=50)
        told["events"] = []
        for event in client.subscribe(after=0):
            told["events"].append(event)
            if event["seq"] == told["get_agent"]["last_seq"]:
                break
        for turn_id in {event["turn_id"] for event in told["events"] if event.get("turn_id")}:
            with contextlib.suppress(memws.RemoteError):  # a turn that made no request
                told[f"request {turn_id}"] = client.command("get_request", turn_id=turn_id, step=1)
    return json.loads(json.dumps(told))  # type: ignore[no-any-return]


def test_an_imported_agent_is_the_exported_one(db: Path, database: str, main: Main, serve: Serve) -> None:
    """Its next export says the same, and over the wire nobody can tell the two apart."""
    text = export(main, db, RICH)
    assert bring(main, export(main, db, PLAIN), database).returncode == 0  # so that its number is another one
    assert bring(main, text, database) == (0, f"agent {RICH!r} is in {memws.public_url(database)}\n", "")
    assert not Path(database).is_file() or stat.S_IMODE(Path(database).stat().st_mode) == 0o600
    assert export(main, database, RICH) == text
    told = [everything(serve(db=str(each)), RICH) for each in (db, database)]
    assert told[0] == told[1]
    assert len([key for key in told[0] if key.startswith("request")]) > 10
    assert told[0]["search walrus"]["total"] > 0


def test_an_imported_agent_goes_on(db: Path, database: str, main: Main, serve: Serve) -> None:
    """Its turn ids stay taken, its seq goes on; a turn that a kill has cut is closed where the agent is opened."""
    for name in (PLAIN, CUT):
        assert bring(main, export(main, db, name), database).returncode == 0
    server = serve()
    with memws.connect(server.url) as client:
        last_seq = client.load_agent(PLAIN)["last_seq"]
        ((turn_id,),) = rows(db, "SELECT DISTINCT turn_id FROM messages WHERE text = 'Thanks!'")
        assert list(client.send("Thanks!", turn_id=turn_id))[-1]["seq"] == last_seq
        assert list(client.send("Another text", turn_id=turn_id))[-1]["code"] == "turn_id_reused"
        assert next(client.send("Now something new"))["seq"] == last_seq + 1
        assert client.load_agent(CUT)["repaired"]
        ends = (event["stop_reason"] for event in client.subscribe(after=0) if "stop_reason" in event)
        assert next(ends) == "interrupted"
        assert client.ask("Are you there?")
    server.stop()
    assert healthy(main, database)


def test_names(db: Path, database: str, main: Main, serve: Serve) -> None:
    """A name in use is refused, a deleted agent's is free; its seq goes on above, and that agent can come back."""
    text = export(main, db, PLAIN)
    assert bring(main, text, database).returncode == 0
    assert "there is an agent 'sam' already" in sentence(bring(main, text, database))
    assert export(main, database, PLAIN) == text
    into = ("exported.json", "--db", database)
    assert main("import", *into, "--name", "Ama\u0301").stdout.startswith("agent 'Amá' is in ")
    assert json.loads(export(main, database, "Amá")) == put(json.loads(text), ("agent", "name"), "Amá")
    for name in ("a/b", ""):
        assert "name: expected 1 to 64 letters" in sentence(main("import", *into, "--name", name))
    server = serve()
    with memws.connect(server.url) as client:
        client.load_agent(PLAIN)
        client.ask("One more")
        last_seq = client.command("get_agent")["last_seq"]
        client.command("delete_agent", agent_name=PLAIN)
    server.stop()
    assert "unknown agent 'sam'" in sentence(main("export", PLAIN, "--db", database))
    assert bring(main, text, database).returncode == 0
    with memws.connect(serve().url) as client:
        assert next(client.send("Hello again", PLAIN))["seq"] > last_seq + 1
        client.command("restore_agent", agent_name=PLAIN, new_name="old-sam")
        assert client.ask("Welcome back", "old-sam")


def test_files(db: Path, tmp_path: Path, main: Main) -> None:
    """An export is its owner's and takes no file's place; an import takes a BOM, UTF-16 and a pipe, too."""
    file = tmp_path / "zoe.json"
    assert main("export", RICH, file, "--db", db) == (0, "", "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text("utf-8")
    assert json.loads(text)["agent"]["name"] == RICH
    assert "cannot write" in sentence(main("export", RICH, file, "--db", db))
    assert file.read_text("utf-8") == text
    assert sorted(path.name for path in tmp_path.glob("*[!lmk]")) == ["memws.db", "zoe.json"]  # nothing half written
    latin = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = run("export", RICH, cwd=tmp_path, variables=latin)
    assert (done.returncode, done.stdout) == (0, text)
    narrow = {"PYTHONIOENCODING": "ascii", "MEMWS_DB": "narrow.db"}
    assert "\\u65e5" in run("import", str(file), cwd=tmp_path, variables=narrow).stdout
    assert "\\u65e5" in run("check", cwd=tmp_path, variables=narrow).stdout
    for encoding in ("utf-8-sig", "utf-16-le", "utf-16"):
        file.write_bytes(text.encode(encoding))
        assert main("import", file, "--db", tmp_path / f"{encoding}.db").returncode == 0
    assert run("import", "-", "--db", "piped.db", cwd=tmp_path, text=text).returncode == 0
    assert json.loads(export(main, tmp_path / "utf-16.db", RICH)) == json.loads(text)
    assert json.loads(export(main, tmp_path / "piped.db", RICH)) == json.loads(text)


def test_a_killed_export_leaves_no_half_file(
    db: Path, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its name only once it is whole; what fails in the middle leaves nothing."""
    folder = tmp_path / "files"
    folder.mkdir()

    def fail(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:100])
        assert not (folder / "zoe.json").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    assert "No space left" in sentence(main("export", RICH, folder / "zoe.json", "--db", db))
    assert list(folder.iterdir()) == []


def test_vacuum(db: Path, tmp_path: Path, main: Main, serve: Serve) -> None:
    """What was purged and, where asked for, old exact requests give their space back; nothing else changes."""
    server = serve(db=str(db))
    with memws.connect(server.url) as client:
        client.create_agent("gone")
        for _ in range(40):
            client.command("insert_passage", text="".join(map(str, range(9_000))))
        client.command("delete_agent", purge=True)
        sql = "SELECT turn_id, max(step) FROM requests JOIN agents ON id = agent AND name = 'sam'"
        ((turn_id, step),) = rows(db, sql)
        before = client.command("get_request", agent_name=PLAIN, turn_id=turn_id, step=step)
        assert "stop the memws server" in sentence(main("vacuum", "--db", db))
    server.stop()
    text, size = export(main, db, PLAIN), db.stat().st_size
    done = main("vacuum", "--db", db)
    freed = size - db.stat().st_size
    assert freed > 1_000_000
    assert done == (0, f"{db}: {freed / 1000:,.1f} kB given back\n", "")
    assert main("vacuum", "--db", db, "--keep-requests", "1").stdout == f"{db}: 0.0 kB given back\n"
    assert export(main, db, PLAIN) == text
    assert main("vacuum", "--db", db, "--keep-requests", "0").stdout > f"{db}: 1"
    assert rows(db, "SELECT count(*) FROM requests") == [(0,)]
    assert bring(main, export(main, db, PLAIN), tmp_path / "other.db").returncode == 0
    for path in (db, tmp_path / "other.db"):
        assert healthy(main, path)
        with memws.connect(serve(db=str(path)).url) as client:
            with pytest.raises(memws.RemoteError, match="vacuum --keep-requests has dropped it") as caught:
                client.command("get_request", agent_name=PLAIN, turn_id=turn_id, step=step)
            assert caught.value.code == "not_found"
            assert client.ask("Do you remember me?", PLAIN)
            assert list(client.send("Thanks!", PLAIN))[-1]["stop_reason"] == "done"
    assert before["request"]


def test_what_takes_long_says_so(tmp_path: Path) -> None:
    """Every PROGRESS_DELAY, on standard error."""
    code = "import sys, memws; memws.PROGRESS_DELAY = 0.05; sys.exit(memws.main())"
    words = [sys.executable, "-c", code, "import", "-"]
    with subprocess.Popen(words, stdin=-1, stderr=-1, text=True, cwd=tmp_path, env=environment()) as process:
        assert process.stderr
        assert process.stderr.readline() == "memws: import, 0 s so far\n"
        process.communicate("{}")
    assert process.returncode == 2


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """An export with another value at a place, also inside texts of JSON; ... takes it out."""
    if not path:
        return value
    if isinstance(data, str):
        return json.dumps(put(json.loads(data), path, value))
    changed = copy.copy(data)
    changed[path[0]] = put(data[path[0]], path[1:], value) if path[1:] else value
    if changed[path[0]] is ...:
        del changed[path[0]]
    return changed


DAMAGES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("memws_agent",), ..., "exported"),
    (("agent", "name"), "../../etc", "name"),
    (("agent", "config", "max_steps"), -1, "max_steps"),
    (("agent", "config", "base_url"), "http://evil.example/v1", "base_url"),
    (("agent", "config", "settings"), {"temperature": "hot"}, "temperature"),
    (("agent", "config"), "{", "agent.config: unknown 'damaged'"),
    (("agent", "blocks", 0, "value"), 1, "agent.blocks: value: expected a string"),
    (("messages", 2, "body"), "{", "messages[2]: "),
    (("messages", 0, "body"), "{}", "messages[0]: expected a chat message, but got '{}'"),
    (("messages", 1, "id"), 1, "messages[1]: "),
    (("memory", 1, "item"), 1, "memory[1]: "),
    (("requests",), {}, "requests: expected a list"),
    (("events", 3, "seq"), 3, "events[3]"),
    (("events", 2, "text"), "[]", "events[2]"),
    (("events", 2, "text", "type"), 5, "events[2]: expected a string"),
    (("memory", 1, "item"), 2**62, "memory[1]: expected an integer from 0 to 1,000,000,000,000,000"),
    (("agent", "last_seq"), 2**62, "agent: expected an integer"),
]


def test_a_damaged_export_is_refused(past: Path, database: str, tmp_path: Path, main: Main) -> None:
    """One sentence names the place of the damage, or where the file ends, and nothing is half imported."""
    text = export(main, past, PLAIN)
    for path, value, told in DAMAGES:
        assert told in sentence(bring(main, json.dumps(put(json.loads(text), path, value)), database)), (path, value)
    for table in ("agents", "messages"):
        assert rows(database, f"SELECT count(*) FROM {table}") == [(0,)]  # noqa: S608
    for place in range(0, len(text) - 1, len(text) // 40):
        assert "exported.json" in sentence(bring(main, text[:place], tmp_path / "none.db"))
    assert not (tmp_path / "none.db").exists()


JUNK = [None, True, 0, -1, 2**70, 1.5, "", "x", "\x00", "\ud800", "{}", "{", "[]", [], [1], {}, {"a": 1}, "00", ...]


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of an export that can be damaged, JSON inside texts too."""
    if path:
        yield path
    with contextlib.suppress(ValueError):
        data = json.loads(data) if isinstance(data, str) and data[:1] in ("{", "[") else data
    items = data.items() if isinstance(data, dict) else enumerate(data[:6]) if isinstance(data, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def test_what_an_import_takes_works(past: Path, database: str, main: Main, serve: Serve, endpoint: Endpoint) -> None:
    """An export with junk anywhere is refused, or its agent opens, talks, and sends nothing that endpoints refuse."""
    data = json.loads(export(main, past, PLAIN))
    every = list(places(data))
    share = 15 if database.startswith(memws.POSTGRES) else 40
    step = max(1, len(every) // (share * int(os.environ.get("MEMWS_TEST_SEEDS", "3"))))
    taken, count = [], len(every[::step])
    for number, path in enumerate(every[::step]):
        name = f"agent-{number}"
        junk = put(put(data, ("agent", "name"), name), path, JUNK[number % len(JUNK)])
        done = bring(main, json.dumps(junk), database)
        taken += [name] if done.returncode == 0 and path != ("agent", "name") else []
        assert done.returncode in (0, 2)
    assert 0 < len(taken) < count
    with memws.connect(serve(base_url=endpoint.url, model="m", api_key="k", context_window=30_000).url) as client:
        for name in taken:
            client.load_agent(name)
            end = list(client.send("And now?", name))[-1]
            assert end["type"] == "agent_response_end", (name, end)
            client.command("get_messages", agent_name=name)


def test_healthy_agents_are_found_healthy(db: Path, main: Main) -> None:
    """No long life, failure or kill is damage; check changes nothing and tells all sizes."""
    before = db.read_bytes()
    told = main("check", "--db", db).stdout.splitlines()
    assert told[0] == "no damage found"
    assert [line.partition(": ")[0] for line in told[1:]] == sorted([RICH, PLAIN, CUT])
    assert re.search(r": \d+ messages \([\d,.]+ kB\), \d+ memory \([\d,.]+ kB\), \d+ events", told[1])
    assert db.read_bytes() == before


SAM = "UPDATE agents SET {} WHERE id = :sam"
FOUND: dict[str, tuple[str, str]] = {  # what is broken, by which SQL, and what check says of it
    "a config of wrong types": (SAM.format("config = json_set(config, '$.max_steps', 'x')"), "max_steps"),
    "a config of later keys": (SAM.format("config = json_set(config, '$.later', 'x')"), "later"),
    "a config that is no JSON": (SAM.format("config = '{'"), "agent.config: unknown 'damaged'"),
    "blocks that are no list": (SAM.format("blocks = '5'"), "agent sam"),
    "blocks that are none": (SAM.format("""blocks = '["x"]'"""), "agent sam"),
    "a state of wrong types": (SAM.format("""state = '{"cut":[]}'"""), "agent.state: cut: expected an integer"),
    "a state out of bounds": (SAM.format("""state = '{"cut":1e99}'"""), "agent.state: cut: expected an integer from 0"),
    "a damaged message": ("UPDATE messages SET body = '{' WHERE agent = :sam AND id = 2", "chat message 2 is damaged"),
    "a call without its result": ("DELETE FROM messages WHERE agent = :sam AND role = 'tool' AND id < 6", "agent sam"),
    "rows of no agent": ("DELETE FROM agents WHERE id = :sam", "messages"),
    "a page of the file": ("", "the file"),
}


@pytest.mark.parametrize("what", FOUND)
def test_damage(what: str, db: Path, main: Main, serve: Serve) -> None:
    """check tells it in a line, exit status 1, and changes nothing; no answer is internal, and others go on."""
    sql, told = FOUND[what]
    with contextlib.closing(sqlite3.connect(db)) as connection, connection:
        if sql:
            ((sam,),) = connection.execute("SELECT id FROM agents WHERE name = 'sam'").fetchall()
            connection.execute(sql, {"sam": sam})
        page = connection.execute("PRAGMA page_count").fetchone()[0] - 2
    if not sql:
        with db.open("r+b") as file:
            file.seek(page * 4096)
            file.write(b"\xff" * 4096)
    broken = db.read_bytes()
    done = main("check", "--db", db)
    assert (done.returncode, done.stderr) == (1, "")
    assert told in done.stdout
    assert db.read_bytes() == broken
    if not sql:
        return
    with memws.connect(serve(db=str(db)).url) as client:
        codes: set[str | None] = set()
        for command, arguments in (("load_agent", {"name": PLAIN}), ("get_messages", {}), ("get_context", {})):
            try:
                client.command(command, **arguments, agent_name=PLAIN)
            except memws.RemoteError as error:
                codes.add(error.code)
        codes.add(list(client.send("Do you remember me?", PLAIN))[-1].get("code"))
        assert codes <= {None, "store_failed", "unknown_agent"}
        assert client.ask("And you?", RICH)


@pytest.mark.anyio
async def test_beside_turns(tmp_path: Path, main: Main, serve: Serve, endpoint: Endpoint) -> None:
    """Copies and exports under turns are of one moment, hold all that was acknowledged, and are no damage."""
    names = [f"agent{number}" for number in range(8)]
    server = serve(base_url=endpoint.url, model="test-model", api_key="sk-x", context_window=200_000)
    db = tmp_path / "memws.db"
    acknowledged: list[tuple[str, str]] = []
    more, over = asyncio.Condition(), asyncio.Event()

    async def chatter(name: str) -> None:
        async with memws.Client(server.url) as client:
            await client.create_agent(name)
            number = 0
            while not over.is_set() or number < 3:
                number += 1
                turn = client.send(f"{name} says {number}")
                await anext(turn)
                acknowledged.append((name, f"{name} says {number}"))
                async with more:
                    more.notify_all()
                assert "code" not in [event async for event in turn][-1]

    tasks = [asyncio.create_task(chatter(name)) for name in names]
    copies: list[tuple[Path, list[tuple[str, str]]]] = []
    for number in range(4):
        async with asyncio.timeout(20), more:
            while len(acknowledged) < 16 * (number + 1):
                await more.wait()
        copies.append((tmp_path / f"copy{number}.db", list(acknowledged)))
        assert (await asyncio.to_thread(main, "backup", copies[-1][0], "--db", db)).returncode == 0
        assert await asyncio.to_thread(healthy, main, db)
        text = await asyncio.to_thread(export, main, db, "agent0")
        assert "stop" in sentence(await asyncio.to_thread(bring, main, text, db))
        data = json.loads(text)
        assert [event["seq"] for event in data["events"]] == list(range(1, data["agent"]["last_seq"] + 1))
    over.set()
    await asyncio.gather(*tasks)
    await asyncio.to_thread(server.stop)
    for path, known in copies:
        assert (healthy(main, path), stat.S_IMODE(path.stat().st_mode)) == (True, 0o600)
        sql = "SELECT name, text FROM messages JOIN agents ON agents.id = agent WHERE role = 'user'"
        assert [pair for pair in known if pair not in rows(path, sql)] == []
