"""Search by vectors: what it finds that words do not, and that no fault of an embeddings endpoint is in the way."""

import asyncio
import itertools
import logging
import queue
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from agents import results
from endpoint import Body, Endpoint, Reply, embedding
from wire import LIMIT, Wire, of_kind, wire

import memws

numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.anyio

Serve = Callable[..., memws.WebSocketServer]
Log, Patch = pytest.LogCaptureFixture, pytest.MonkeyPatch
KEY = "sk-no-log-and-no-frame-holds-this"
MODEL = "test-embedding"
ROUTE = "/v1/embeddings"
DIMENSION = 64
SYNONYMS = {"feline": "cat", "naps": "sleeps", "automobile": "car"}
PASSAGES = ["My cat sleeps on the sofa", "Rain fell on Paris", "The quarterly figures are due", "A red car is outside"]
QUERY, ANSWER = "feline naps", PASSAGES[0]  # they share no word


@pytest.fixture
def endpoint(endpoint: Endpoint) -> Endpoint:
    """The strict endpoint, whose embeddings know some synonyms."""
    endpoint.dimension, endpoint.synonyms = DIMENSION, SYNONYMS
    return endpoint


@pytest.fixture
def start(serve: Serve, endpoint: Endpoint, monkeypatch: Patch) -> Serve:
    """Starts a server of the endpoint with an embedding model; what failed is asked for again soon."""
    for name in ("EMBEDDING_PAUSE", "EMBEDDING_PULSE"):
        monkeypatch.setattr(memws, name, 0.01)
    defaults = {"base_url": endpoint.url, "model": "test-model", "api_key": KEY, "embedding_model": MODEL}
    return lambda **options: serve(**(defaults | options))


def query(database: str | Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql).fetchall()


def kept(database: str | Path) -> dict[str, bytes]:
    return dict(query(database, "SELECT text, vector FROM memory WHERE length(vector) > 0"))


async def until(check: Callable[[], object]) -> None:
    """Look again and again for what happens in the background and is told to nobody."""
    deadline = time.monotonic() + LIMIT
    while not await asyncio.to_thread(check):
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s"


async def embedded(database: str | Path) -> None:
    """Wait until every text of the memory has its vector."""
    await until(lambda: query(database, "SELECT count(*) > 0 AND count(*) = count(vector) FROM memory") == [(1,)])
    for text, vector in kept(database).items():
        expected = numpy.array(embedding(text, DIMENSION, SYNONYMS), numpy.float32)
        assert numpy.allclose(numpy.frombuffer(vector, numpy.float16), expected, atol=2e-3), text


async def fill(client: Wire, texts: Iterable[str] = PASSAGES) -> list[int]:
    """Insert passages; their ids."""
    return [(await client.ok("insert_passage", text=text))["id"] for text in texts]


async def found(client: Wire, text: str = QUERY, **more: Any) -> list[str]:
    return [item["text"] for item in (await client.ok("search_memory", query=text, **more))["items"]]


async def test_what_shares_no_word_is_found(start: Serve, endpoint: Endpoint) -> None:
    """Clients and the agent's own tools find what shares no word, in both memories, within the filters; all once."""
    server = start()
    async with wire(server, agent={}) as client:
        await fill(client)
        await client.turn("Yesterday my cat caught a mouse")
        await embedded(server.options.db)
        texts = {*PASSAGES, "Yesterday my cat caught a mouse", "Hello!"}
        assert Counter(endpoint.embedded) == dict.fromkeys(kept(server.options.db), 1) == dict.fromkeys(texts, 1)
        assert {body["model"] for body in endpoint.embedding_requests} == {MODEL}
        before = len(endpoint.embedding_requests)
        best = (await client.ok("search_memory", query=QUERY))["items"][0]
        assert (best["text"], best["store"], best["score"] > 0) == (ANSWER, "archival", True)
        pages = [await found(client, limit=2, page=page) for page in (1, 2, 3)]
        assert sorted(itertools.chain(*pages)) == sorted(texts)
        assert set(await found(client, store="archival")) == set(PASSAGES)
        assert set(await found(client, store="recall")) == texts - set(PASSAGES)
        assert await found(client, **{"from": "2999-01-01"}) == await found(client, to="1999-01-01") == []
        assert set(await found(client, "  ")) == set(await found(client, "")) == texts
        assert len(endpoint.embedding_requests) == before + 1, "a query is embedded once"
        calls: list[tuple[str, Body]] = [
            ("archival_memory_search", {"query": QUERY}),
            ("conversation_search", {"query": "feline", "request_heartbeat": True}),
        ]
        endpoint.script(Reply(calls=calls))
        await client.turn("What do you know of it?")
        archival, recall = results(endpoint.requests[-1])[-2:]
        assert archival.index("cat sleeps") < archival.index("Rain")
        assert recall.index("caught a mouse") < recall.index("Hello!")
        await embedded(server.options.db)
        await client.ok("create_agent", config={"name": "Rex", "human": "First name: Zoe. She likes tea."})
        await found(client, "What did Zoe tell REX about Zoe's felines?")
        await found(client, "Zoe")
        asked, name = endpoint.embedded[-2:]
        assert (" ".join(asked.split()), name) == ("What did tell about felines?", "Zoe"), "names are off the query"


async def test_a_search_waits_beside_its_session(start: Serve, endpoint: Endpoint, monkeypatch: Patch) -> None:
    """While a query's vector is awaited commands, turns and edits go on; a turn that waits for one can be stopped."""
    monkeypatch.setattr(memws, "EMBEDDING_PATIENCE", 60.0)
    server = start()
    async with wire(server, agent={"name": "sam"}) as client:
        await fill(client)
        await embedded(server.options.db)
        held = queue.SimpleQueue[Body]()

        def hold(body: Body) -> Reply | None:
            if QUERY not in body["input"]:  # of the background
                return None
            held.put(body)
            return Reply(hold=True)

        endpoint.overrides[ROUTE] = hold
        request_id = await client.request("search_memory", query=QUERY)
        said = ("send_message", {"message": "Let me see."})
        search = ("archival_memory_search", {"query": QUERY, "request_heartbeat": True})
        endpoint.script(Reply(calls=[said, search]), Reply(calls=[search]))
        await client.say("Where is it?")
        for _ in range(2):
            await asyncio.to_thread(held.get, timeout=20)
        assert (await client.ok("set_block", label="human", value="Name: Zoe"))["version"] == 2
        await client.ok("cancel")
        assert (await client.ended())["stop_reason"] == "cancelled"
        (shown,) = of_kind(client.frames, "assistant_message")
        assert (shown["message"], shown["partial"]) == ("Let me see.", True)
        await client.say("And now?")
        await asyncio.to_thread(held.get, timeout=20)
        assert [frame for frame in client.frames if frame.get("id") == request_id] == []
        endpoint.release()
        assert (await client.ended())["stop_reason"] == "done"
        while not (answers := [frame for frame in client.frames if frame.get("id") == request_id]):
            await client.receive()
        assert answers[0]["result"]["items"][0]["text"] == ANSWER
        assert results(endpoint.requests[-1])[-1].index(ANSWER) > 0


async def test_a_restart_embeds_nothing_twice_and_another_model_all(start: Serve, endpoint: Endpoint) -> None:
    """Vectors outlive a restart; those of another model are made anew, while searches answer by words."""

    def background(body: Body) -> Reply | None:
        return Reply(hold=True) if len(body["input"]) > 1 else None

    server = start()
    async with wire(server, agent={"name": "sam"}) as client:
        await fill(client)
        await embedded(server.options.db)
    await asyncio.to_thread(server.stop)
    server = start()
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        assert (await found(client))[0] == ANSWER
        await client.turn("Something new")
        await embedded(server.options.db)
    texts = [*PASSAGES, "Something new", "Hello!"]
    assert Counter(endpoint.embedded) == dict.fromkeys([*texts, QUERY], 1)
    await asyncio.to_thread(server.stop)
    count, endpoint.overrides[ROUTE] = len(endpoint.embedding_requests), background
    server = start(embedding_model="other")
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        await asyncio.to_thread(endpoint.wait_requests, count + 1, "embedding_requests")
        assert kept(server.options.db) == {}
        assert await found(client, "cat") == [ANSWER]
        assert await found(client) == []
        del endpoint.overrides[ROUTE]
        endpoint.release()
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER
    again = [text for body in endpoint.embedding_requests if body["model"] == "other" for text in body["input"]]
    assert Counter(text for text in again if text not in (QUERY, "cat")) == dict.fromkeys(texts, 1)


FAULTS: dict[str, Any] = {  # what an endpoint answers, or makes of its vectors
    "a hang": Reply(hold=True), "500": Reply(status=500), "404": Reply(status=404), "400 for all": Reply(status=400),
    "a wrong key": Reply(status=401, body={"error": {"message": f"Incorrect API key provided: {KEY}", "code": None}}),
    "HTML": Reply(body="<html>"), "too few": lambda vectors: vectors[1:],
    "no numbers": lambda vectors: ["a"] * len(vectors),
    "no direction": lambda vectors: [[0.0, 0.0]] * len(vectors),
    "unequal lengths": lambda vectors: [each * (1 + place) for place, each in enumerate(vectors)] * (len(vectors) > 1),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_turns_and_searches_go_on_without_vectors(
    start: Serve, endpoint: Endpoint, caplog: Log, monkeypatch: Patch, fault: Any
) -> None:
    """Where embeddings fail, words answer clients and tools, it is logged once, and once well they are used again."""
    monkeypatch.setattr(memws, "EMBEDDING_PATIENCE", 0.05)
    caplog.set_level("INFO", "memws")
    endpoint.overrides[ROUTE], endpoint.spoil = (fault, None) if isinstance(fault, Reply) else (Reply(), fault)
    server = start(idle_timeout=1.0)
    async with wire(server, "*", agent={}) as client:
        await fill(client)
        endpoint.script(Reply(calls=[("archival_memory_search", {"query": "cat", "request_heartbeat": True})]))
        for message in ("Where is it?", "And now?"):
            assert (await client.turn(message))[-1]["stop_reason"] == "done"
        assert ANSWER in results(endpoint.requests[1])[0]
        assert (await found(client, "cat"), await found(client, "xyzzy")) == ([ANSWER], [])
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
        assert (warning.startswith(f"embeddings of {MODEL} fail ("), len(warning) < 250) == (True, True)
        endpoint.overrides, endpoint.spoil = {}, None
        endpoint.release()
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER
        assert KEY not in caplog.text + str(client.frames)


async def test_stop_while_embeddings_hang(start: Serve, endpoint: Endpoint) -> None:
    """stop() waits for no embedding, of the background or of a search, and leaves nothing behind."""
    endpoint.overrides[ROUTE] = Reply(hold=True)
    server = start()
    async with wire(server, agent={}) as client:
        await fill(client)
        await asyncio.to_thread(endpoint.wait_requests, 1, "embedding_requests")
        await client.request("search_memory", query="cat")
        async with asyncio.timeout(LIMIT):
            await asyncio.to_thread(server.stop)
        assert await client.closed() == 1001


async def test_a_text_that_the_endpoint_refuses_stops_no_other(start: Serve, endpoint: Endpoint, caplog: Log) -> None:
    """A text that is too long for the endpoint is found by words, and not asked for again, also after a restart."""
    poison = "poison " * 100
    refusal = Reply(status=400, body={"error": {"message": "input is too large to process", "code": None}})
    endpoint.overrides[ROUTE] = lambda body: refusal if any("poison" in text for text in body["input"]) else None
    server = start()
    async with wire(server, agent={"name": "sam"}) as client:
        for texts in (PASSAGES, [poison], ["Tea is ready", poison, "Tea is hot"]):  # alone, and beside others
            await fill(client, texts)
            await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER
        assert poison in await found(client, "poison tea", limit=2)
    await asyncio.to_thread(server.stop)
    server, asked = start(), endpoint.embedded.count(poison)
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        await fill(client, ["Tea is cold"])
        await embedded(server.options.db)
    assert kept(server.options.db).keys() == {*PASSAGES, "Tea is ready", "Tea is hot", "Tea is cold"}
    warned = [record.getMessage() for record in caplog.records if record.levelno > logging.INFO]
    assert (endpoint.embedded.count(poison), warned) == (asked, [])


async def test_any_query_can_be_embedded(start: Serve, endpoint: Endpoint, caplog: Log) -> None:
    """What a model may ask its search for, half characters and endless texts, is no fault of the endpoint."""
    async with wire(start(context_window=1_000_000), agent={}) as client:
        await fill(client)
        texts = ("\ud800 feline", "a\0b", "x" * 90_000, " ".join(["cat"] * 20_000), "\u200b", "'\"%_")
        for text in texts:
            search = ("archival_memory_search", {"query": text, "request_heartbeat": True})
            endpoint.script(Reply(calls=[search], chunk=9_000))
            assert (await client.turn("Look it up"))[-1]["stop_reason"] == "done"
    assert {result[:3] for result in results(endpoint.requests[-1])} == {"OK:"}
    assert len(endpoint.requests) == 2 * len(texts)
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == []
    assert max(map(len, endpoint.embedded)) <= memws.EMBEDDING_TEXT


async def test_each_of_several_servers_searches_by_vectors(start: Serve, postgres_address: str) -> None:
    """One of them makes the vectors of all."""
    for name in "first", "second":
        async with wire(start(db=postgres_address), agent={"name": name}) as client:
            await fill(client)
            async with asyncio.timeout(LIMIT):
                while ANSWER not in [item["text"] for item in (await client.ok("search_memory", query=QUERY))["items"]]:
                    pass


async def test_without_a_model_nothing_is_embedded(start: Serve, endpoint: Endpoint) -> None:
    """Embeddings are off unless the server names a model; a config that names one is told that this is ignored."""
    server = start(embedding_model=None)
    async with wire(server) as client:
        created = await client.ok("create_agent", config={"embedding_model": "openai", "embedding": MODEL})
        told = [warning.split(";")[0] for warning in created["warnings"]]
        assert told == ["'embedding_model' is ignored", "'embedding' is ignored"]
        await fill(client)
        await client.turn("hi")
        assert (await found(client), await found(client, "cat")) == ([], [ANSWER])
    assert (endpoint.embedding_requests, kept(server.options.db)) == ([], {})
