"""Search by vectors: what it finds that words do not, and that no fault of an embeddings endpoint is in the way."""

import asyncio
import functools
import itertools
import math
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import openai  # noqa: F401 (half a second, once, and not in the turn of some test)
import pytest
from agents import results
from commandline import Serving, run
from endpoint import Body, Endpoint, Reply, Vector, embedding
from wire import LIMIT, Wire, of_kind, wire

import memws

numpy = pytest.importorskip("numpy")

pytestmark = pytest.mark.anyio

Server = memws.WebSocketServer
Serve = Callable[..., Server]
KEY = "sk-no-log-and-no-frame-holds-this"
MODEL = "test-embedding"
ROUTE = "/v1/embeddings"
DIMENSION = 64
SYNONYMS = {"feline": "cat", "naps": "sleeps", "automobile": "car"}
PASSAGES = ["My cat sleeps on the sofa", "Rain fell on Paris", "The quarterly figures are due", "A red car is outside"]
QUERY, ANSWER = "feline naps", PASSAGES[0]
"A query that shares no word with the passage that answers it."


@pytest.fixture
def endpoint(endpoint: Endpoint) -> Endpoint:
    """The strict endpoint, whose embeddings know some synonyms."""
    endpoint.dimension, endpoint.synonyms = DIMENSION, SYNONYMS
    return endpoint


@pytest.fixture
def plain(serve: Serve, endpoint: Endpoint) -> Callable[..., Server]:
    """Starts a server of the endpoint, which names no embedding model unless told to."""

    def start(**options: Any) -> Server:
        return serve(base_url=endpoint.url, model="test-model", api_key=KEY, **options)

    return start


@pytest.fixture
def server(plain: Callable[..., Server]) -> Server:
    """A server whose agents are searched by vectors too."""
    return plain(embedding_model=MODEL)


@pytest.fixture
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is asked for again at once."""
    monkeypatch.setattr(memws, "EMBEDDING_PAUSE", 0.0)


@pytest.fixture
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches wait for no vector for long."""
    monkeypatch.setattr(memws, "EMBEDDING_PATIENCE", 0.05)


async def until(check: Callable[[], object]) -> None:
    """Wait for what happens in the background and is told to nobody."""
    deadline = time.monotonic() + LIMIT
    while not check():
        assert time.monotonic() < deadline, f"not within {LIMIT:g} s"
        await asyncio.sleep(0.005)


def query(database: str | Path, sql: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute(sql, values).fetchall()


def kept(database: str | Path) -> dict[str, tuple[str, int, bytes]]:
    """(model, dimension, vector) of the texts that have vectors."""
    sql = "SELECT text, model, dimension, vector FROM search_rows JOIN search_vectors USING (doc)"
    return {text: tuple(vector) for text, *vector in query(database, sql)}


def is_kept(database: str, text: str) -> bool:
    """Whether a text has a vector."""
    return text in kept(database)


def vectors_left_over(database: str | Path) -> int:
    """How many vectors there are of no text."""
    sql = "SELECT count(*) FROM search_vectors WHERE doc NOT IN (SELECT doc FROM search_rows)"
    return int(query(database, sql)[0][0])


async def embedded(database: str | Path, model: str = MODEL, dimension: int = DIMENSION) -> None:
    """Wait until every text of the memory has a vector, of that model and dimension."""
    sql = """SELECT count(*), sum(model = ? AND dimension = ?) FROM search_rows LEFT JOIN search_vectors USING (doc)"""

    def check() -> bool:
        texts, vectors = query(database, sql, model, dimension)[0]
        return bool(0 < texts == vectors)

    await until(check)
    for text, (_, _, vector) in kept(database).items():
        expected = numpy.array(embedding(text, dimension, SYNONYMS), numpy.float32)
        assert numpy.allclose(numpy.frombuffer(vector, numpy.float16), expected, atol=2e-3), text


async def fill(client: Wire, texts: Iterable[str] = PASSAGES) -> list[int]:
    """Insert passages; their ids."""
    return [(await client.ok("insert_passage", text=text))["id"] for text in texts]


async def found(client: Wire, text: str = QUERY, **more: Any) -> list[str]:
    """The texts that a search gives."""
    return [item["text"] for item in (await client.ok("search_memory", query=text, **more))["items"]]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log holds at warning and above of embeddings."""
    return [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def hold_inputs(*, most: int = 0) -> Callable[[Body], Reply | None]:
    """Hold requests of more texts than `most`: with 1, those of the background, while queries are answered."""
    return lambda body: Reply(hold=True) if len(body["input"]) > most else None


# ---- what is found ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["keyword", "config", "update_agent"])
async def test_what_shares_no_word_is_found(plain: Callable[..., Server], endpoint: Endpoint, named: str) -> None:
    """With an embedding model, named anywhere, a query finds the passage that shares no word with it."""
    server = plain(**({"embedding_model": MODEL} if named == "keyword" else {}))
    async with wire(server) as client:
        config = {"embedding": MODEL} if named == "config" else {}
        assert (await client.ok("create_agent", config={"name": "sam", **config}))["warnings"] == []
        await fill(client)
        if named == "update_agent":
            assert await found(client) == []
            updated = await client.ok("update_agent", config={"embedding": MODEL})
            assert (updated["settings"]["embedding"], updated["warnings"]) == (MODEL, [])
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER
        assert (await client.ok("search_memory", query=QUERY))["items"][0]["score"] > 0
    assert {body["model"] for body in endpoint.embedding_requests} == {MODEL}


async def test_the_flag_names_the_model(endpoint: Endpoint, tmp_path: Path) -> None:
    """--embedding-model gives vectors to every agent of the server, and the banner tells of it."""
    flags = ("--model", "test-model", "--base-url", endpoint.url, "--embedding-model", MODEL)
    with Serving(*flags, cwd=tmp_path, variables={"OPENAI_API_KEY": KEY}) as process:
        with memws.connect(process.url) as talk:
            talk.create_agent("sam")
            for text in PASSAGES:
                talk.command("insert_passage", text=text)
            await embedded(tmp_path / "memws.db")
            assert talk.command("search_memory", query=QUERY)["items"][0]["text"] == ANSWER
        process.end()
    assert MODEL in "\n".join(process.out)
    assert KEY not in "\n".join(process.out) + process.log


async def test_without_a_model_nothing_is_embedded(plain: Callable[..., Server], endpoint: Endpoint) -> None:
    """Embeddings are off unless named; MemGPT 0.2.7's `embedding_model` of a config is ignored with a warning."""
    server = plain()
    async with wire(server) as client:
        created = await client.ok("create_agent", config={"embedding_model": "openai", "embedding_dim": 1536})
        assert created["warnings"] == [
            "embedding_model is ignored: memws does not use it",
            "embedding_dim is ignored: memws does not use it",
        ]
        assert (await client.ok("get_agent"))["settings"]["embedding"] is None
        await fill(client)
        await client.turn("hi")
        assert await found(client) == []
        assert await found(client, "cat") == [ANSWER]
    assert endpoint.embedding_requests == []
    assert query(server.options.db, "SELECT count(*) FROM search_vectors") == [(0,)]


@pytest.mark.parametrize("embedding_model", ["", " ", 5, "x" * 201, ["e"]])
async def test_a_config_names_a_model_by_text(serve: Serve, embedding_model: Any) -> None:
    """What cannot be a model's name is a bad config."""
    async with wire(serve()) as client:
        assert (await client.refused("create_agent", config={"embedding": embedding_model}))["code"] == "bad_config"
        await client.ok("create_agent", config={})
        assert (await client.refused("update_agent", config={"embedding": embedding_model}))["code"] == "bad_config"


async def test_the_agents_tools_search_by_vectors(server: Server, endpoint: Endpoint) -> None:
    """The model's own searches find what shares no word, in both memories."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await client.turn("Yesterday my cat caught a mouse")
        await embedded(server.options.db)
        calls: list[tuple[str, Body]] = [
            ("archival_memory_search", {"query": QUERY}),
            ("conversation_search", {"query": "feline", "request_heartbeat": True}),
        ]
        endpoint.script(Reply(calls=calls))
        await client.turn("What do you know of it?")
    *_, archival, recall = results(endpoint.requests[-1])
    assert archival.index("cat sleeps") < archival.index("Rain")
    assert recall.index("caught a mouse") < recall.index("Hello!")


async def test_an_agent_of_an_endpoint_of_its_own(serve: Serve, endpoint: Endpoint) -> None:
    """An agent made in Python with an address and a key of its own is embedded there."""
    endpoint.api_key = KEY
    server = serve()
    config = {"name": "sam", "base_url": endpoint.url, "api_key": KEY, "model": "test-model", "embedding": MODEL}
    await asyncio.to_thread(server.create_new_agent, config)
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        await fill(client)
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER


async def test_filters_hold_for_what_vectors_find(server: Server, endpoint: Endpoint) -> None:
    """Store, roles and times narrow what vectors find as they narrow what words find."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await client.turn("My cat sleeps in the garden")
        await embedded(server.options.db)
        everything = await client.ok("search_memory", query=QUERY, limit=50)
        assert len(everything["items"]) == len(PASSAGES) + 2

        async def stores(**filters: Any) -> set[tuple[str, str | None]]:
            result = await client.ok("search_memory", query=QUERY, limit=50, **filters)
            assert result["total"] == len(result["items"])
            return {(item["store"], item["role"]) for item in result["items"]}

        assert await stores(store="archival") == {("archival", None)}
        assert await stores(store="recall") == {("recall", "user"), ("recall", "assistant")}
        assert await stores(roles=["user"]) == {("recall", "user")}
        assert await stores(roles=["nobody"]) == set()
        assert await stores(**{"from": "2999-01-01"}) == set()
        assert await stores(to="1999-01-01") == set()
        moment = min(item["time"] for item in everything["items"] if item["store"] == "archival")
        assert await stores(to=moment) == {("archival", None)}


async def test_names_are_off_the_query(server: Server, endpoint: Endpoint) -> None:
    """The agent's and the user's name are not part of what is embedded of a query, unless it is nothing else."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "Rex", "human": "First name: Zoe. She likes tea."})
        await found(client, "What did Zoe tell REX about Zoe's felines?")
        await found(client, "Zoe")
    asked, name = endpoint.embedded
    assert " ".join(asked.split()) == "What did tell about felines?"
    assert name == "Zoe"


async def test_a_query_is_embedded_once(server: Server, endpoint: Endpoint) -> None:
    """The next page and the same question again ask the endpoint for nothing; an empty query neither."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await embedded(server.options.db)
        before = len(endpoint.embedding_requests)
        pages = [await found(client, limit=2, page=page) for page in (1, 2, 3)]
        assert sorted(itertools.chain(*pages)) == sorted(PASSAGES)
        await found(client)
        await found(client, "   ")
        await found(client, "")
        assert len(endpoint.embedding_requests) == before + 1


# ---- in the background -----------------------------------------------------------------------------------------------


async def test_what_a_turn_says_gets_vectors(server: Server, endpoint: Endpoint) -> None:
    """After a turn the user's words and the agent's reply get vectors, each once."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await client.turn("My cat is called Tom")
        await embedded(server.options.db)
        assert kept(server.options.db).keys() == {"My cat is called Tom", "Hello!"}
        await client.turn("He likes milk")
        await embedded(server.options.db)
    assert Counter(endpoint.embedded) == {"My cat is called Tom": 1, "Hello!": 2, "He likes milk": 1}


async def test_a_restart_embeds_nothing_twice(plain: Callable[..., Server], endpoint: Endpoint) -> None:
    """After a restart the vectors are there: only what is new is embedded."""
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client)
        await embedded(server.options.db)
    await asyncio.to_thread(server.stop)
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        assert (await found(client))[0] == ANSWER
        await client.turn("Something new")
        await embedded(server.options.db)
    assert Counter(endpoint.embedded) == dict.fromkeys([*PASSAGES, QUERY, "Something new", "Hello!"], 1)


LONG = " ".join(f"w{number}" for number in range(memws.EMBEDDING_TOLD * memws.ROW_WORDS))
"A passage of as many slices, each with a vector of its own, as have to be embedded for the progress to be told."


@pytest.mark.parametrize("words", [0, memws.ROW_WORDS])
async def test_another_model_embeds_anew_and_tells(server: Server, endpoint: Endpoint, words: int) -> None:
    """Another model's vectors replace the old ones in the background; for many texts subscribers see the progress."""
    text = " ".join(LONG.split()[words:])
    total = memws.EMBEDDING_TOLD - (1 if words else 0)
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={"embedding": "first"})
        await client.ok("subscribe", after=0)
        await fill(client, [text])
        await embedded(server.options.db, "first")
        assert len(kept(server.options.db)) == total
        await client.ok("update_agent", config={"embedding": "second"})
        await embedded(server.options.db, "second")
        await client.turn("hi")
        told = [frame for frame in of_kind(client.frames, "agent_change") if frame["change"] == "embedding"]
        passes = [(frame["done"], frame["total"]) for frame in told if frame["done"] in (0, frame["total"])]
        assert passes == ([] if words else [(0, total), (total, total)] * 2)
        assert all(before["done"] <= after["done"] or after["done"] == 0 for before, after in itertools.pairwise(told))
        seqs = [frame["seq"] for frame in client.frames if "seq" in frame]
        assert seqs == list(range(1, len(seqs) + 1))
        stored = query(server.options.db, "SELECT count(*) FROM events")[0][0]
        assert stored == len(seqs)


@pytest.mark.parametrize("first", ["a search", "a turn", "a restart"])
async def test_another_dimension_embeds_anew(plain: Callable[..., Server], endpoint: Endpoint, first: str) -> None:
    """Where a model's vectors have another dimension than before, all are made anew, and none of two kinds compared."""
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client)
        await embedded(server.options.db)
    endpoint.dimension = 96
    if first == "a restart":
        await asyncio.to_thread(server.stop)
        server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        if first == "a search":
            assert await found(client, "feline cat") == [ANSWER]
        await client.turn("hi")
        await embedded(server.options.db, dimension=96)
        assert (await found(client))[0] == ANSWER


async def test_searches_answer_while_all_is_embedded_anew(server: Server, endpoint: Endpoint) -> None:
    """While another model's vectors are made, searches go by words and by those that are there already."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await embedded(server.options.db)
        endpoint.overrides[ROUTE] = hold_inputs(most=1)
        count = len(endpoint.embedding_requests)
        await client.ok("update_agent", config={"embedding": "other"})
        await asyncio.to_thread(endpoint.wait_embeddings, count + 1)
        assert await found(client, "cat") == [ANSWER]
        assert await found(client) == []
        del endpoint.overrides[ROUTE]
        endpoint.release()
        await embedded(server.options.db, "other")
        assert (await found(client))[0] == ANSWER


async def test_embeddings_switched_off_again(server: Server, endpoint: Endpoint, plain: Callable[..., Server]) -> None:
    """An agent whose config drops its model goes by the server's again; with none of both, by words alone."""
    await asyncio.to_thread(server.stop)
    server = plain()
    async with wire(server) as client:
        await client.ok("create_agent", config={"embedding": MODEL})
        await fill(client)
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER
        await client.ok("update_agent", config={"embedding": None})
        assert await found(client) == []
        await client.ok("update_agent", config={"embedding": MODEL})
        assert (await found(client))[0] == ANSWER
    assert Counter(endpoint.embedded) == dict.fromkeys([*PASSAGES, QUERY], 1)


@pytest.mark.usefixtures("_no_patience")
async def test_pages_stay_while_vectors_arrive(server: Server, endpoint: Endpoint) -> None:
    """The pages of a search hold each hit once although texts get their vectors between them."""
    endpoint.overrides[ROUTE] = hold_inputs(most=1)
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        ids = await fill(client, [f"My cat sleeps on sofa {number}" for number in range(30)])
        pages = [await found(client, "cat sofa", limit=10, page=1)]
        del endpoint.overrides[ROUTE]
        endpoint.release()
        await embedded(server.options.db)
        pages += [await found(client, "cat sofa", limit=10, page=page) for page in (2, 3)]
        assert len(set(itertools.chain(*pages))) == len(ids)


# ---- an endpoint that hangs ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_pause", "_no_patience")
async def test_turns_and_searches_go_on_while_embeddings_hang(server: Server, endpoint: Endpoint) -> None:
    """With an embeddings endpoint that never answers, turns end, tools search by words, searches answer by words."""
    endpoint.overrides[ROUTE] = Reply(hold=True)
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        endpoint.script(Reply(calls=[("archival_memory_search", {"query": "cat", "request_heartbeat": True})]))
        for message in ("Where is it?", "And now?"):
            frames = await client.turn(message)
            assert frames[-1]["stop_reason"] == "done"
        results = [message["content"] for body in endpoint.requests for message in body["messages"]]
        assert any(ANSWER in result for result in results if result)
        assert await found(client, "cat") == [ANSWER]
        assert await found(client, "xyzzy") == []
        del endpoint.overrides[ROUTE]
        endpoint.release()
        await embedded(server.options.db)


@pytest.mark.usefixtures("_no_pause")
async def test_stop_while_embeddings_hang(server: Server, endpoint: Endpoint) -> None:
    """stop() waits for no embedding, of the background or of a search, and leaves nothing behind."""
    endpoint.overrides[ROUTE] = Reply(hold=True)
    before = threading.active_count()
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await asyncio.to_thread(endpoint.wait_embeddings, 1)
        await client.request("search_memory", query="cat")
        async with asyncio.timeout(LIMIT):
            await asyncio.to_thread(server.stop)
        assert await client.closed() == 1001
    assert threading.active_count() < before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memws")]


@pytest.mark.usefixtures("_no_pause")
async def test_a_call_that_hangs_for_long_is_a_fault(
    plain: Callable[..., Server], endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that gets no answer within the idle timeout is given up, logged once, and made again."""
    endpoint.overrides[ROUTE] = Reply(hold=True)
    server = plain(embedding_model=MODEL, idle_timeout=0.1)
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await asyncio.to_thread(endpoint.wait_embeddings, 4)
        assert len(warnings_of(caplog)) == 1
        del endpoint.overrides[ROUTE]
        endpoint.release()
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER


MANY = [*PASSAGES, *(f"Kite number {number} flew" for number in range(2 * memws.EMBEDDING_BATCH))]


@pytest.mark.usefixtures("_no_pause")
@pytest.mark.parametrize("how", ["delete", "purge", "rename"])
async def test_agents_change_while_embeddings_hang(server: Server, endpoint: Endpoint, how: str) -> None:
    """An agent that is deleted while its vectors are made is embedded no further; a renamed one is."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        endpoint.overrides[ROUTE] = Reply(hold=True)
        await fill(client, MANY)
        await asyncio.to_thread(endpoint.wait_embeddings, 1)
        if how == "rename":
            await client.ok("rename_agent", agent_name="sam", new_name="max")
        else:
            await client.ok("delete_agent", agent_name="sam", purge=how == "purge")
        await client.ok("create_agent", config={"name": "ada"})
        del endpoint.overrides[ROUTE]
        endpoint.release()
        for text in ("Tea is ready", "Tea is cold"):
            await fill(client, [text])
            await until(functools.partial(is_kept, server.options.db, text))
        if how == "rename":
            await embedded(server.options.db)
            assert kept(server.options.db).keys() == {"Tea is ready", "Tea is cold", *MANY}
            return
        assert kept(server.options.db).keys() == {"Tea is ready", "Tea is cold"}
        assert not set(endpoint.embedded) & set(MANY[memws.EMBEDDING_BATCH :])
        if how == "delete":
            await client.ok("restore_agent", agent_name="sam")
            await embedded(server.options.db)
            assert kept(server.options.db).keys() == {"Tea is ready", "Tea is cold", *MANY}
        assert vectors_left_over(server.options.db) == 0


@pytest.mark.usefixtures("_no_pause")
@pytest.mark.parametrize("fault", [Reply(status=500), Reply(hold=True)], ids=["an error", "a hang"])
async def test_a_model_that_works_replaces_one_that_does_not(server: Server, endpoint: Endpoint, fault: Reply) -> None:
    """An agent that is given another embedding model goes by it at once, whatever its old one is at."""
    endpoint.overrides[ROUTE] = lambda body: fault if body["model"] == MODEL else None
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client)
        await asyncio.to_thread(endpoint.wait_embeddings, 1)
        await client.ok("update_agent", config={"embedding": "other"})
        await embedded(server.options.db, "other")
        assert (await found(client))[0] == ANSWER


async def test_a_vector_is_never_given_to_another_text(server: Server, endpoint: Endpoint) -> None:
    """A passage that is deleted and followed by another one while its vector is made leaves that vector to nobody."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        endpoint.overrides[ROUTE] = Reply(hold=True)
        (first,) = await fill(client, ["Rain fell on Paris"])
        await asyncio.to_thread(endpoint.wait_embeddings, 1)
        await client.ok("delete_passage", passage_id=first)
        await fill(client, [ANSWER])
        del endpoint.overrides[ROUTE]
        endpoint.release()
        await embedded(server.options.db)
        assert kept(server.options.db).keys() == {ANSWER}


# ---- an endpoint that fails ------------------------------------------------------------------------------------------

Spoil = Callable[[list[Vector]], Sequence[Any]]

REPLIES: dict[str, Reply] = {
    "a server error": Reply(status=500),
    "too many requests": Reply(status=429, headers={"Retry-After": "1"}),
    "a wrong key": Reply(status=401, body={"error": {"message": f"Incorrect API key provided: {KEY}", "code": None}}),
    "an unknown model": Reply(status=400, body={"error": {"message": "The model does not exist", "code": None}}),
    "no such route": Reply(status=404, body="<h1>Not found</h1>"),
    "a page of HTML": Reply(body="<html><body>Welcome to your new router</body></html>"),
    "an object without data": Reply(body={"object": "list"}),
    "data that is null": Reply(body={"object": "list", "data": None}),
    "data that holds null": Reply(body={"object": "list", "data": [None], "model": "m"}),
    "an embedding without its index": Reply(body={"data": [{"embedding": [1.0, 2.0]}] * 16}),
    "no reply at all": Reply(body=""),
}
SPOILS: dict[str, Spoil] = {
    "no vectors": lambda vectors: [],
    "one vector too few": lambda vectors: vectors[1:],
    "one vector too many": lambda vectors: [*vectors, vectors[0]],
    "NaN": lambda vectors: [[math.nan, *vector[1:]] for vector in vectors],
    "infinity": lambda vectors: [[math.inf, *vector[1:]] for vector in vectors],
    "numbers beyond 32 bits": lambda vectors: [[1e300, 1e39, 1] for _ in vectors],
    "null in a vector": lambda vectors: [[None, *vector[1:]] for vector in vectors],
    "nulls for vectors": lambda vectors: [None for _ in vectors],
    "texts for vectors": lambda vectors: ["no vector" for _ in vectors],
    "base64 of odd length": lambda vectors: ["AAAA" for _ in vectors],
    "texts in vectors": lambda vectors: [["x", "y"] for _ in vectors],
    "objects for vectors": lambda vectors: [{"values": vector} for vector in vectors],
    "numbers for vectors": lambda vectors: [7 for _ in vectors],
    "vectors in vectors": lambda vectors: [[vector] for vector in vectors],
    "empty vectors": lambda vectors: [[] for _ in vectors],
    "zeros": lambda vectors: [[0.0] * len(vector) for vector in vectors],
    "two dimensions": lambda vectors: [vectors[0], *(vector[:5] for vector in vectors[1:])],
}


@pytest.mark.usefixtures("_no_pause")
@pytest.mark.parametrize("fault", [*REPLIES, *SPOILS])
async def test_faults_are_logged_once_and_leave_the_words(
    plain: Callable[..., Server], endpoint: Endpoint, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """An endpoint that fails is logged once however often; words answer meanwhile; once well it is used again."""
    caplog.set_level("DEBUG", "memws")
    server = plain()
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        await client.ok("subscribe")
        await fill(client)
        if fault in REPLIES:
            endpoint.overrides[ROUTE] = REPLIES[fault]
        else:
            endpoint.spoil = lambda vectors: list(SPOILS[fault](vectors))
        await client.ok("update_agent", config={"embedding": MODEL})
        await asyncio.to_thread(endpoint.wait_embeddings, len(PASSAGES) + 3)  # refused texts are tried one by one first
        (warning,) = warnings_of(caplog)
        assert warning.startswith(f"embeddings of {MODEL}: the endpoint")
        assert warning.endswith("; searches go by words alone until it answers")
        assert len(warning) < 250
        assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
        assert (await found(client, "cat"))[0] == ANSWER
        endpoint.overrides.clear()
        endpoint.spoil = None
        await embedded(server.options.db)
        assert (await found(client))[0] == ANSWER
        assert f"embeddings of {MODEL}: the endpoint answers again" in caplog.text
        assert KEY not in caplog.text + str(client.frames)


async def test_a_refused_connection_is_a_fault_too(
    plain: Callable[..., Server], endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody listens at the endpoint any more, words answer, and no call is made before the pause is over."""
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        await embedded(server.options.db)
        with Endpoint() as other:
            port_of_nobody = other.url
        config = {"name": "lost", "base_url": port_of_nobody, "api_key": KEY, "embedding": MODEL}
        await asyncio.to_thread(server.create_new_agent, config)
        await client.ok("load_agent", name="lost")
        await fill(client)
        for _ in range(3):
            assert await found(client, "cat") == [ANSWER]
    assert len(warnings_of(caplog)) == 1


TOO_LONG = "poison " * 100


@pytest.mark.usefixtures("_no_pause")
async def test_a_text_that_the_endpoint_refuses_stops_no_other(
    plain: Callable[..., Server], endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    """A text that the endpoint will never take, being too long for it, is found by words and not asked for again."""
    refusal = Reply(status=400, body={"error": {"message": "input is too large to process", "code": None}})
    endpoint.overrides[ROUTE] = lambda body: refusal if any("poison" in text for text in body["input"]) else None
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client, PASSAGES)
        await embedded(server.options.db)
        await fill(client, [TOO_LONG, "Tea is ready"])
        await until(lambda: is_kept(server.options.db, "Tea is ready"))
        assert (await found(client))[0] == ANSWER
        assert TOO_LONG in await found(client, "poison tea", limit=2)
        assert await found(client, TOO_LONG, limit=1) == [TOO_LONG]
        assert warnings_of(caplog) == []
    await asyncio.to_thread(server.stop)
    asked = endpoint.embedded.count(TOO_LONG)
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        for text in ("Tea is hot", "Tea is cold"):
            await fill(client, [text])
            await until(functools.partial(is_kept, server.options.db, text))
    assert endpoint.embedded.count(TOO_LONG) == asked


async def test_any_query_can_be_embedded(server: Server, endpoint: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    """What a model may ask its search for, half characters and endless texts, is no fault of the endpoint."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await fill(client)
        for text in ("\ud800 feline", "a\0b", "x" * 100_000, " ".join(["cat"] * 50_000), "\u200b", "'\"%_"):
            endpoint.script(Reply(calls=[("archival_memory_search", {"query": text, "request_heartbeat": True})]))
            assert (await client.turn("Look it up"))[-1]["stop_reason"] == "done"
    assert warnings_of(caplog) == []
    assert max(map(len, endpoint.embedded)) <= memws.QUERY_CHARACTERS


# ---- no endpoint, no numpy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["server", "config"])
async def test_without_an_endpoint_the_agent_says_so(serve: Serve, named: str) -> None:
    """Where there is no endpoint an embedding model is kept, a warning tells it, and words find what there is."""
    server = serve(**({"embedding_model": MODEL} if named == "server" else {}))
    config = {"embedding": MODEL} if named == "config" else {}
    async with wire(server) as client:
        created = await client.ok("create_agent", config={"name": "sam", **config})
        expected = (
            f"embedding model '{MODEL}' is kept, but searches go by words alone: there is no endpoint; "
            "set OPENAI_API_KEY or --base-url"
        )
        assert created["warnings"] == [expected]
        assert (await client.ok("load_agent", name="sam"))["warnings"] == [expected]
        assert (await client.ok("update_agent", config={"max_steps": 5}))["warnings"] == [expected]
        await fill(client)
        assert await found(client, "cat") == [ANSWER]


@pytest.fixture
def no_numpy(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that lacks numpy."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text("import sys\nsys.modules['numpy'] = None\n", "utf-8")
    return {"PYTHONPATH": str(tmp_path / "blocked"), "OPENAI_API_KEY": KEY}


async def test_without_numpy_the_flag_is_refused(tmp_path: Path, no_numpy: dict[str, str]) -> None:
    """--embedding-model without numpy is one sentence that names the command to install it, and exit status 2."""
    done: subprocess.CompletedProcess[str] = await asyncio.to_thread(
        run, "--port", "0", "--embedding-model", "x", cwd=tmp_path, variables=no_numpy
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "memws: embeddings need the numpy package: pip install numpy\n"


async def test_without_numpy_a_config_gets_a_warning(
    tmp_path: Path, no_numpy: dict[str, str], endpoint: Endpoint
) -> None:
    """A config that names an embedding model where numpy is missing is kept with a warning, and words answer."""
    flags = ("--model", "test-model", "--base-url", endpoint.url)
    with Serving(*flags, cwd=tmp_path, variables=no_numpy) as process:
        with memws.connect(process.url) as talk:
            (warning,) = talk.command("create_agent", config={"name": "sam", "embedding": MODEL})["warnings"]
            assert warning.endswith("searches go by words alone: embeddings need the numpy package: pip install numpy")
            assert talk.command("load_agent", name="sam")["warnings"] == [warning]
            for text in PASSAGES:
                talk.command("insert_passage", text=text)
            assert talk.ask("hi") == "Hello!"
            assert [item["text"] for item in talk.command("search_memory", query="cat")["items"]] == [ANSWER]
        assert process.end() == 0
    assert "Traceback" not in process.log
    assert endpoint.embedding_requests == []


async def test_vectors_wait_where_numpy_is_missing(
    tmp_path: Path, no_numpy: dict[str, str], plain: Callable[..., Server], endpoint: Endpoint
) -> None:
    """A database with vectors serves a Python without numpy, and what is new there is embedded later."""
    server = plain()
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam", "embedding": MODEL})
        await fill(client)
        await embedded(server.options.db)
    await asyncio.to_thread(server.stop)
    flags = ("--model", "test-model", "--base-url", endpoint.url)
    with Serving(*flags, cwd=tmp_path, variables=no_numpy) as process, memws.connect(process.url) as talk:
        talk.load_agent("sam")
        talk.command("insert_passage", text="Tea is ready")
        assert [item["text"] for item in talk.command("search_memory", query="cat")["items"]] == [ANSWER]
        process.end()
    server = plain()
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        await embedded(server.options.db)
    assert Counter(endpoint.embedded) == dict.fromkeys([*PASSAGES, "Tea is ready"], 1)


# ---- keeping ---------------------------------------------------------------------------------------------------------


async def test_what_is_forgotten_leaves_no_vector(server: Server) -> None:
    """Deleting a passage deletes its vector, purging an agent deletes all of its vectors and no other agent's."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "other"})
        await fill(client, ["Tea is ready"])
        await client.ok("create_agent", config={"name": "sam"})
        first, *_ = await fill(client)
        await embedded(server.options.db)
        await client.ok("delete_passage", passage_id=first)
        assert kept(server.options.db).keys() == {"Tea is ready", *PASSAGES[1:]}
        assert ANSWER not in await found(client)
        await client.ok("delete_agent", agent_name="sam")
        assert len(kept(server.options.db)) == len(PASSAGES)
        await client.ok("restore_agent", agent_name="sam")
        assert len(await found(client, agent_name="sam")) == len(PASSAGES) - 1
        await client.ok("delete_agent", agent_name="sam", purge=True)
        assert kept(server.options.db).keys() == {"Tea is ready"}
        assert vectors_left_over(server.options.db) == 0


async def test_a_backup_holds_the_vectors(plain: Callable[..., Server], endpoint: Endpoint, tmp_path: Path) -> None:
    """A backup beside the running server has its vectors: what is served from it embeds nothing again."""
    server, copy = plain(embedding_model=MODEL), str(tmp_path / "copy.db")
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client)
        await embedded(server.options.db)
        assert await asyncio.to_thread(memws.main, ["backup", copy, "--db", server.options.db]) == 0
    assert kept(copy) == kept(server.options.db)
    async with wire(plain(embedding_model=MODEL, db=copy)) as client:
        await client.ok("load_agent", name="sam")
        assert (await found(client))[0] == ANSWER
        await fill(client, ["Tea is ready"])
        await embedded(copy)
    assert Counter(endpoint.embedded) == Counter([*PASSAGES, QUERY, "Tea is ready"])


async def test_an_imported_agent_is_embedded_anew(
    plain: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export holds texts, no vectors; they are made where the agent is imported, whose model may be another."""
    server, copy, file = plain(embedding_model=MODEL), str(tmp_path / "copy.db"), tmp_path / "sam.json"
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client)
        await embedded(server.options.db)
    assert memws.main(["export", "sam", "--db", server.options.db]) == 0
    file.write_text(capsys.readouterr().out, "utf-8")
    assert memws.main(["import", str(file), "--db", copy]) == 0
    assert kept(copy) == {}
    async with wire(plain(embedding_model="other", db=copy)) as client:
        await client.ok("load_agent", name="sam")
        await embedded(copy, "other")
        assert (await found(client))[0] == ANSWER


DAMAGE = {
    "a row": "DELETE FROM search_rows WHERE store = 'archival' AND item = 1",
    "another text": "UPDATE search_rows SET text = 'nothing' WHERE store = 'archival' AND item = 1",
    "the postings": "INSERT INTO search_text (search_text) VALUES ('delete-all')",
}


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_repair_of_the_index_keeps_vectors_right(
    plain: Callable[..., Server], endpoint: Endpoint, damage: str
) -> None:
    """A check has nothing against vectors; a repair that indexes anew leaves each with its own text, or with none."""
    server = plain(embedding_model=MODEL)
    database = server.options.db
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await fill(client)
        await embedded(database)
        assert await asyncio.to_thread(memws.main, ["check", "--db", database]) == 0
    await asyncio.to_thread(server.stop)
    with closing(sqlite3.connect(database)) as connection:
        connection.execute(DAMAGE[damage])
        connection.commit()
    assert memws.main(["check", "--db", database]) == 1
    memws.main(["check", "--repair", "--db", database])
    assert memws.main(["check", "--db", database]) == 0
    assert vectors_left_over(database) == 0
    server = plain(embedding_model=MODEL)
    async with wire(server) as client:
        await client.ok("load_agent", name="sam")
        await embedded(database)
        assert (await found(client))[0] == ANSWER
        assert await found(client, "cat") != []


# ---- memory_index ----------------------------------------------------------------------------------------------------

TURNS = [("Ann", f"day {number}", text) for number, text in enumerate(PASSAGES)]


def embed(texts: list[str]) -> list[Vector]:
    return [embedding(text, DIMENSION, SYNONYMS) for text in texts]


@pytest.mark.parametrize("kind", ["recall", "archival"])
@pytest.mark.parametrize("as_array", [False, True])
async def test_memory_index_by_vectors(kind: str, as_array: bool) -> None:
    """An index with a function that embeds finds what shares no word; lists and arrays are vectors alike."""
    index = memws.memory_index(TURNS, kind, (lambda texts: numpy.array(embed(texts))) if as_array else embed)
    assert index.search(QUERY)[0] == 0
    assert index.search("automobile outdoors")[0] == 3
    assert sorted(index.search(QUERY, limit=99)) == [0, 1, 2, 3]
    assert len(index.search(QUERY, limit=2)) == 2
    assert memws.memory_index(TURNS, kind).search(QUERY) == []
    assert memws.memory_index([], kind, embed).search(QUERY) == []


async def test_memory_index_embeds_slices_and_queries_without_speakers() -> None:
    """Texts are embedded slice by slice, queries without the names of the speakers."""
    asked: list[list[str]] = []

    def remember(texts: list[str]) -> list[Vector]:
        asked.append(texts)
        return embed(texts)

    long = "word " * (2 * memws.ROW_WORDS) + "My cat sleeps " * (memws.ROW_WORDS // 3)
    index = memws.memory_index([("Ann", "", long), ("Bob Lee", "", "Rain fell")], embed=remember)
    assert index.search("What did Ann tell Bob of a feline?")[0] == 0
    texts, question = asked
    assert "".join(texts[:-1]) == long
    assert [len(text.split()) <= memws.ROW_WORDS for text in texts] == [True] * 4
    assert " ".join(question[0].split()) == "What did tell of a feline?"


@pytest.mark.parametrize("spoil", ["no vectors", "one vector too few", "one vector too many", "zeros", "NaN"])
async def test_memory_index_refuses_what_are_no_vectors(spoil: str) -> None:
    """A function that does not give each text a vector is a ValueError."""
    with pytest.raises(ValueError, match=r"vector|shorter|longer"):
        memws.memory_index(TURNS, embed=lambda texts: list(SPOILS[spoil](embed(texts))))


async def test_fused_ranking_keeps_what_both_find_first() -> None:
    """What words and vectors both find comes before what only one of them finds."""
    turns = [("u", "1", "The cat eats"), ("u", "2", "A feline cat"), ("u", "3", "The feline runs"), ("u", "4", "Rain")]
    assert memws.memory_index(turns, "archival", embed).search("cat feline")[0] == 1
