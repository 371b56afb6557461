"""Copying all agents from one database to another, of either kind."""

import contextlib
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commandline import Main, sentence
from postgres import find_programs
from wire import beside

import memws

Serve = Callable[..., memws.WebSocketServer]
TABLES = ("agents", "messages", "memory", "postings", "events", "requests", "settings")


def rows(address: str) -> dict[str, list[Any]]:
    """All that a database holds, but for who runs an agent."""
    found = {}
    with beside(address) as db:
        for table in TABLES:
            names = [column[0] for column in db.execute(f"SELECT * FROM {table} LIMIT 0").description]  # noqa: S608
            columns = ", ".join(name for name in names if name != "owner")
            found[table] = sorted(db.execute(f"SELECT {columns} FROM {table}").fetchall())  # noqa: S608
    return found


def change(address: str, *statements: str) -> None:
    with beside(address) as db:
        for sql in statements:
            db.execute(sql)


@pytest.fixture
def source(tmp_path: Path, serve: Serve) -> str:
    """A database of agents that live, one that was deleted and one that was purged, whose memory has vectors."""
    path = str(tmp_path / "source.db")
    server = serve(db=path)
    with memws.connect(server.url) as client:
        for name in ("Zoë", "sam", "purged", "deleted"):
            client.create_agent(name)
            client.command("insert_passage", agent_name=name, text=f"{name} keeps otters. Żółw 日本 🦊")
            client.ask("My name is Ada, I like walruses. " + "x" * 5_000, name)
        client.command("delete_agent", agent_name="purged", purge=True)
        client.command("delete_agent", agent_name="deleted")
    server.stop()
    vector = "UPDATE memory SET vector = zeroblob(8) WHERE doc % 2 = 0"
    change(path, vector, "INSERT INTO settings VALUES ('embedding_model', 'm'), ('learned x', '{}')")
    return path


def copy(main: Main, source: str, target: str) -> None:
    """Copy, and see that all has come; and that to copy again changes nothing."""
    expected = rows(source)
    count = sum(len(expected[table]) for table in TABLES if table not in ("postings", "settings"))
    agents = len(expected["agents"])
    for _ in range(2):
        done = main("copy", "--from", source, "--to", target)
        assert done == (0, f"{agents} agents with {count:,} rows are in {memws.public_url(target)}\n", "")
        assert rows(target) == expected


def test_there_and_back(source: str, postgres_address: str, tmp_path: Path, main: Main) -> None:
    """A copy of a copy is the first database row by row, and an export of its agents byte by byte."""
    back = str(tmp_path / "back.db")
    copy(main, source, postgres_address)
    with beside(postgres_address) as db:  # it knows how much is there: its plans for an empty table are slow
        assert db.execute("SELECT reltuples FROM pg_class WHERE relname = 'memory'").fetchone()[0] > 0
    copy(main, postgres_address, back)
    for name in ("Zoë", "sam"):
        texts = {main("export", name, "--db", db).stdout for db in (source, postgres_address, back)}
        assert len(texts) == 1
    assert all(main("check", "--db", db).stdout.startswith("no damage found\n") for db in (postgres_address, back))
    for _ in range(2):  # PostgreSQL takes more for its maps at first, which is not told as less than nothing
        assert re.search(r": [\d,.]+ kB given back\n$", main("vacuum", "--db", postgres_address).stdout)
    assert not any(rows(back)[table] == [] for table in TABLES)


def test_a_copy_serves(source: str, database: str, main: Main, serve: Serve) -> None:
    """Agents of a copy answer and find as before, one can be brought back; a new one has an id and a seq of its own.

    A database that a server uses may be copied, but not be copied to.
    """
    serve(db=source)
    copy(main, source, database)
    with memws.connect(serve(db=database).url) as client:
        assert "stop the memws server" in sentence(main("copy", "--from", source, "--to", database))
        seen = client.command("search_memory", agent_name="sam", query="otters")
        assert (seen["total"], seen["items"][0]["text"][:9]) == (1, "sam keeps")
        assert client.ask("What do I like?", "sam")
        client.command("restore_agent", agent_name="deleted")
        client.create_agent("purged")
        assert client.ask("Who are you?", "purged")
        last_seq = max(row[7] for row in rows(source)["agents"] if row[1] == "purged")
        assert client.command("get_agent", agent_name="purged")["last_seq"] > last_seq > 0


def test_a_later_copy(source: str, database: str, main: Main, serve: Serve) -> None:
    """What has gone on is copied anew, also where names have changed hands or it was purged; the rest is passed by."""
    copy(main, source, database)
    server = serve(db=source)
    with memws.connect(server.url) as client:
        client.command("restore_agent", agent_name="deleted")
        client.ask("One thing more.", "deleted")
        for name, new_name in (("sam", "x"), ("Zoë", "sam"), ("x", "Zoë")):
            client.command("rename_agent", agent_name=name, new_name=new_name)
        client.command("delete_agent", agent_name="deleted", purge=True)
    server.stop()
    copy(main, source, database)
    change(database, "UPDATE events SET text = 'kept' WHERE agent = 1")
    main("copy", "--from", source, "--to", database)
    assert {row[-1] for row in rows(database)["events"] if row[0] == 1} == {"kept"}


LOSSES = {
    "UPDATE agents SET last_seq = last_seq + 1 WHERE id = 2": "agent 'sam' has gone on in",
    "UPDATE agents SET last_active = '2999' WHERE id = 2": "agent 'sam' has gone on in",
    "UPDATE agents SET created = '2001' WHERE id = 2": "has an agent 'sam' of its own",
    "UPDATE agents SET id = 77 WHERE name = 'purged'": "has an agent 'purged' of its own",
    "UPDATE settings SET value = 'other' WHERE name = 'embedding_model'": "has vectors of another model",
}


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_is_lost(source: str, database: str, main: Main, loss: str) -> None:
    """A target that has what the source has not is refused and left as it is."""
    copy(main, source, database)
    change(database, loss)
    change(source, "UPDATE agents SET last_seq = last_seq + 5 WHERE id = 1")
    before = rows(database)
    assert LOSSES[loss] in sentence(main("copy", "--from", source, "--to", database))
    assert rows(database) == before


def test_a_name_is_given_meanwhile(
    source: str, postgres_address: str, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another program makes while agents are copied is not copied over."""
    index, values = memws.index, "('sam', '{}', '{}', '[]', '2026', '2026', 7)"
    columns = "name, config, state, blocks, created, last_active, last_seq"

    def make(db: Any, where: str, agent: int) -> None:
        index(db, where, agent)
        if agent == 1:
            change(postgres_address, f"INSERT INTO agents ({columns}) VALUES {values}")  # noqa: S608

    monkeypatch.setattr(memws, "index", make)
    words = ("copy", "--from", source, "--to", postgres_address)
    for told in ("another agent has got the name just now", "has an agent 'sam' of its own"):
        assert told in sentence(main(*words))
    assert [row[7] for row in rows(postgres_address)["agents"] if row[1] == "sam"] == [7]


def test_cut_short(source: str, database: str, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is ended in the middle of an agent leaves those before it, and goes on with it."""
    index, calls = memws.index, itertools.count(1)

    def stop(*values: Any) -> None:
        index(*values)
        if next(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(memws, "index", stop)
        main("copy", "--from", source, "--to", database)
    assert [row[0] for row in rows(database)["agents"]] == [row[0] for row in rows(source)["agents"]][:2]
    copy(main, source, database)


def test_progress(source: str, tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes long says how much is done, on standard error."""
    monkeypatch.setattr(memws, "PROGRESS_DELAY", 0)
    told = re.findall(
        r"^memws: copied (.+)$", main("copy", "--from", source, "--to", tmp_path / "copy.db").stderr, re.MULTILINE
    )
    total = sum(len(rows(source)[table]) for table in ("agents", "messages", "memory", "events", "requests"))
    assert told[0] == f"0 of 4 agents, 0 of {total:,} rows"
    assert re.fullmatch(rf"3 of 4 agents, \d+ of {total:,} rows", told[-1])


def test_no_password_is_told(source: str, postgres_address: str, tmp_path: Path, main: Main) -> None:
    """Neither of an address that works nor of one that cannot be read."""
    password = postgres_address.split(":")[2].partition("@")[0]
    told = [main("copy", "--from", source, "--to", postgres_address), main("check", "--db", postgres_address)]
    told += [main("vacuum", "--db", postgres_address), main("export", "none", "--db", postgres_address)]
    for wrong in (f"{password}x", f"%zz{password}", f"x@{password}", f"1/{password}", f"%00{password}"):
        address = postgres_address.replace(password, wrong)
        told += [main("copy", "--from", address, "--to", tmp_path / "copy.db"), main("backup", "file", "--db", address)]
        assert "address" in sentence(told[-2])
    assert password not in "".join(done.stdout + done.stderr for done in told)


def test_backup(source: str, postgres_address: str, tmp_path: Path, main: Main) -> None:
    """Of PostgreSQL it tells the command that makes one."""
    copy(main, source, postgres_address)
    target = tmp_path / "my backup"
    told = sentence(main("backup", target, "--db", postgres_address)).strip().partition("pg_dump")
    programs, password = find_programs(), postgres_address.split(":")[2].partition("@")[0]
    words = [str(programs / "pg_dump"), *shlex.split(told[2])]  # type: ignore[operator]
    subprocess.run(words, env={**os.environ, "PGPASSWORD": password}, check=True)
    assert target.read_bytes()[:5] == b"PGDMP"
