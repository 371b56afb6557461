"""PostgreSQL: what is refused at the start, how it sorts, two who write at once, a database that goes away."""

import asyncio
import http.client
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from commandline import Main, sentence
from endpoint import Endpoint, say
from postgres import Cluster
from test_store import LIMIT, commit, everything, new_agent, opened, passage, queued, step, tell, words
from wire import events_of, is_terminal, messages_of, wire

import memws
from memws import Changes, Query

pytestmark = pytest.mark.anyio
Online = Callable[..., memws.WebSocketServer]


@pytest.fixture
def name(postgres_address: str) -> str:
    """The name of an empty database."""
    return postgres_address.rpartition("/")[2]


REFUSED = {  # what is written in the place of what, and what is said of it
    "a wrong password": ("{password}", "{password}x", 'password authentication failed for user "memws"'),
    "an unknown user": ("memws:", "nobody:", 'password authentication failed for user "nobody"'),
    "an unknown database": ("/{name}", "/{name}x", "does not exist"),
    "a database of others": ("/{name}", "/postgres", "permission denied for schema public"),
    "a port where nobody listens": (":{port}", ":1", "Connection refused"),
    "a port that is no number": (":{port}", ":x", 'invalid integer value "x"'),
    "a host that is none": ("127.0.0.1", "[::1", "expected postgresql://user:password@host/database"),
    "a password that is not encoded": ("{password}", "{password}%zz", "expected postgresql://user:password@host/"),
    "a password with an @": ("{password}", "x@{password}", "expected postgresql://user:password@host/"),
    "a password with a /": ("{password}", "x/{password}", "expected postgresql://user:password@host/"),
    "an option that there is not": ("/{name}", "/{name}?colour=red", "expected postgresql://user:password@host/"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_address_that_leads_nowhere(
    what: str, postgres: Cluster, postgres_address: str, name: str, main: Main
) -> None:
    """One sentence says what is wrong, exit status 2, and never the password."""
    parts = {"password": postgres.password, "port": postgres.port, "name": name}
    old, new, told = (text.format(**parts) for text in REFUSED[what])
    address = postgres_address.replace(old, new)
    for command in (["serve", "--port", "0", "--model", "offline"], ["check"], ["export", "sam"]):
        if what != "a database of others" or command[0] == "serve":
            said = sentence(main(*command, "--db", address))
            assert told in said
            assert postgres.password not in said


def test_a_database_that_is_not_ours(postgres: Cluster, postgres_address: str, name: str, main: Main) -> None:
    """Tables of another program or of another version are refused and left alone, by a check an empty database too."""
    commands = ["serve", "--port", "0", "--model", "offline"], ["check"]
    assert "is no memws database" in sentence(main("check", "--db", postgres_address))
    postgres.run("CREATE TABLE agents (x int)", name)
    for command in commands:
        assert "is a database of another program" in sentence(main(*command, "--db", postgres_address))
    postgres.run("COMMENT ON TABLE agents IS 'memws 99'", name)
    for command in commands:
        said = sentence(main(*command, "--db", postgres_address))
        assert f"was written by another memws (schema 99, not {memws.SCHEMA_VERSION})" in said
    assert postgres.run("SELECT relname FROM pg_class WHERE relname IN ('agents', 'messages')", name) == [("agents",)]
    postgres.run("DROP TABLE agents", name)


async def test_both_find_and_sort_alike(postgres: Cluster, postgres_address: str, name: str, tmp_path: Path) -> None:
    """Names and times are in the order of bytes though the database sorts by a language; hits and scores are equal."""
    assert postgres.run("SELECT 'a' < 'B', '_' < '1'", name) == [(True, True)]  # as bytes: neither
    rng = random.Random(1)
    vocabulary = ["".join(rng.choices("abdeiklmnorstu", k=rng.randint(3, 7))) for _ in range(150)]
    vocabulary += ["日本", "Zoë", "naïve"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 30))) for _ in range(300)]
    times = [f"2026-11-{rng.randint(1, 28):02}T{rng.randint(0, 23):02}:00:00.000Z" for _ in texts]
    pairs = enumerate(zip(texts, times, strict=True), 1)
    spoken = [words(number, *pair, rng.choice(["user", "assistant"])) for number, pair in pairs]
    kept = [passage(n, " ".join(rng.choices(vocabulary, k=40))) for n in range(1, 31)]
    queries = [Query(" ".join(rng.choices(vocabulary, k=rng.randint(1, 4))), limit=20) for _ in range(40)]
    queries += [Query(vocabulary[n][:2], since=f"2026-11-{n:02}", until=f"2026-11-{2 * n:02}") for n in range(1, 15)]
    queries += [Query("", ("recall",), limit=300), Query("", since="2026-11-10T12", limit=300)]
    found = []
    for address in (str(tmp_path / "memws.db"), postgres_address):
        async with opened(address) as store:
            agents = [
                await new_agent(store, name) for name in ("b", "A", "a", "_", "B", "1", "Zoë", "Z", "日", "é", "-")
            ]
            await store.write(commit, agents[0].id, Changes(documents=[*spoken, *kept]))
            pages = [await store.read(memws.list_agents, after, 4) for after in ("", "A", "Z", "a", "é")]
            names = [[record.name for record in records] for records, _ in pages]
            found.append((names, [await store.read(memws.search, agents[0].id, query) for query in queries]))
    assert found[0] == found[1]
    assert sum(total for _, total in found[0][1]) > 1_000


async def test_a_name_is_taken_once(postgres_address: str) -> None:
    """Of two that give a name at the same moment one is refused, and nothing else of its transaction is lost."""
    async with opened(postgres_address) as store:
        agent = await new_agent(store, "other")
        with closing(memws.database_at(postgres_address)) as database:
            connection = database.open()
            connection.execute("BEGIN IMMEDIATE")
            memws.create_agent(connection, memws.AgentRecord("sam", {}, []))
            holding, go_on = threading.Event(), threading.Event()
            held = asyncio.ensure_future(store.write(lambda _: [event() for event in (holding.set, go_on.wait)]))
            await asyncio.to_thread(holding.wait, LIMIT)
            jobs = [new_agent(store), store.write(commit, agent.id, step()), new_agent(store, "third")]
            tasks = await queued(store.write(commit, agent.id, Changes([tell()])), *jobs)
            go_on.set()
            await held
            while connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
                pass  # the store has not come to the name yet
            connection.execute("COMMIT")
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(each, "code", "") for each in told] == ["", "name_taken", "", ""]
        assert (await everything(store, agent.id))[1] == 3
        assert (await store.read(memws.find_agent, "other")).last_seq == 3


def health(server: memws.WebSocketServer) -> tuple[int, str]:
    """The status of /healthz, and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)
    with closing(connection):
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


async def until_health(server: memws.WebSocketServer, status: int, words: str) -> str:
    """Ask for the health until it is that, and says so; what it says."""
    async with asyncio.timeout(LIMIT):
        while (told := await asyncio.to_thread(health, server))[0] != status or words not in told[1]:
            pass
    return told[1]


async def refusal(server: memws.WebSocketServer) -> str:
    async with wire(server) as client:
        return str((await client.refused("list_agents"))["code"])


@contextmanager
def restarted(postgres: Cluster, _: str) -> Iterator[str]:
    """It is stopped, without an end to what it does, and started."""
    postgres.stop()
    try:
        yield "Connection refused"
    finally:
        postgres.start()


@contextmanager
def full(postgres: Cluster, name: str) -> Iterator[str]:
    """All connections are taken, those of the server among them."""
    postgres.run(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
    postgres.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")  # noqa: S608
    try:
        yield "too many connections"
    finally:
        postgres.run(f"ALTER DATABASE {name} CONNECTION LIMIT -1")


@pytest.mark.parametrize("away", [restarted, full])
async def test_a_database_that_goes_away_in_mid_turn(
    away: Any, postgres: Cluster, postgres_address: str, name: str, online: Online, endpoint: Endpoint
) -> None:
    """The turn ends as store_failed, messages do, /healthz says why, and all goes on once the database is back."""
    server = online(db=postgres_address, sync="full")
    async with wire(server, "*", agent={"name": "sam"}) as client:
        await client.turn("before")
        endpoint.script(say("held", hold=True))
        await client.say("in the middle", turn_id="t1")
        await client.started()
        await asyncio.to_thread(endpoint.wait_requests, 2)
        with away(postgres, name) as reason:
            assert postgres.password not in await until_health(server, 503, reason)
            assert (await client.ended())["code"] == "store_failed"
            assert set(await asyncio.gather(*(refusal(server) for _ in range(8)))) == {"store_failed"}
            endpoint.release()
            assert (await client.turn("while it is away"))[-1]["code"] == "store_failed"
        await until_health(server, 200, '"status":"ok"')
        again = await client.turn("in the middle", turn_id="t1")
        assert (again[0]["turn_id"], again[-1]["stop_reason"]) == ("t1", "interrupted")
        assert await messages_of(client, "sam") == ["before", "in the middle"]
        told = [event for event in await events_of(client, "sam") if event.get("turn_id")]
        starts = [event["turn_id"] for event in told if event["type"] == "agent_response_start"]
        assert starts == [event["turn_id"] for event in told if is_terminal(event)]
        assert len(starts) == len(set(starts))
