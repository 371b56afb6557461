"""Tapes: what was recorded of a model is replayed without it, and nothing else is."""

import asyncio
import datetime
import itertools
import json
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from commandline import Main, sentence
from endpoint import Answer, Body, Endpoint, Reply, echo, say
from wire import wire

import memws

Serve = Callable[..., Any]
Patch = pytest.MonkeyPatch
KEY, PASSWORD, PASTED = "sk-of-the-endpoint", "of-the-address-7", "sk-pasted-by-a-user"
TIMES = ("time", "turn_id", "duration_ms")
README_TAPE = Path(__file__).with_name("readme.tape")

BAD: Body = {"message": f"no such key: {KEY}", "code": 503}
FAILED = Reply(body={"choices": [{"index": 0, "error": BAD}]})
TOOL = Reply(calls=[("core_memory_append", {"name": "human", "content": "Ada"}), ("celsius", {"fahrenheit": 50})])
SEARCH = Reply(calls=[("conversation_search", {"query": "otters"}), ("archival_memory_insert", {"content": "Tea"})])

FAULTS: dict[str, tuple[list[Answer], str]] = {  # what a model does before it answers; what has to be told of it
    "status": ([Reply(status=500), Reply(status=429), Reply("no", status=401, body=BAD)], "model_auth"),
    "cut": ([Reply("Half of", cut_after=2), Reply("Half of", cut_after=3)], "you said"),
    "cut for ever": ([Reply("Half of it all", cut_after=3)] * 3, "partial"),
    "silence": ([Reply("Half", stall_after=2), Reply(hold=True)], "model_timeout"),
    "refusal": ([Reply(refusal="I will not")], "I will not"),
    "error in the stream": ([Reply("Well", error_in_stream=BAD)], "you said"),
    "failed choice": ([FAILED, Reply("x", empty_choices="all")], "you said"),
    "bad output": ([Reply(calls=[("send_message", "{broken")]), Reply("")], "you said"),
    "an option": ([], "you said"),
    "tools": ([TOOL, SEARCH, Reply(calls=SEARCH.calls, call_ids=[None, None])], "celsius"),
    "surrogates": ([Reply("a\ud83d", chunk=1)], "\ufffd"),
}


def lasting(frames: Iterable[Body]) -> list[Body]:
    """Stored events without what no two runs have alike; made-up ids of calls by their order."""
    names: dict[str, int] = {}
    kept = [{name: value for name, value in frame.items() if name not in TIMES} for frame in frames if "seq" in frame]
    for frame in kept:
        if "tool_call_id" in frame:
            frame["tool_call_id"] = names.setdefault(frame["tool_call_id"], len(names))
        if frame.get("message_type") in ("tool_return", "function_message"):
            frame["message"] = memws._lasting(frame["message"])
    return kept


@pytest.fixture
def tape(tmp_path: Path) -> Path:
    return tmp_path / "a.tape"


@pytest.fixture
def record(serve: Serve, endpoint: Endpoint, tape: Path, monkeypatch: Patch) -> Serve:
    """Starts a server of the endpoint, which says what the user said, and records."""
    monkeypatch.setattr(memws, "RETRY_PAUSE", 0.0)
    monkeypatch.setattr(memws, "FIRST_TOKEN_TIMEOUT", 1.0)
    endpoint.default = echo
    address = endpoint.url.replace("//", f"//ada:{PASSWORD}@")
    options = {"base_url": address, "model": "test-model", "api_key": KEY, "record": tape, "db": ":memory:"}
    return lambda **more: serve(**options, **more)


@pytest.fixture
def replay(serve: Serve, endpoint: Endpoint, tape: Path) -> Iterable[Serve]:
    """Starts a server without an endpoint that replays; none is asked."""

    def start(**options: Any) -> Any:
        asked.append(len(endpoint.requests) + len(endpoint.embedding_requests))
        return serve(base_url=None, model=None, replay=tape, db=":memory:", **options)

    asked: list[int] = []
    yield start
    assert set(asked) <= {len(endpoint.requests) + len(endpoint.embedding_requests)}


def celsius(fahrenheit: float) -> float:
    return (fahrenheit - 32) / 1.8


def talk(server: Any, *texts: str, **config: Any) -> list[Body]:
    """The events of an agent's turns, at the end of which the server stops."""
    server.tool(celsius)
    server.create_new_agent({"name": "sam", "tools": ["celsius"], **config})
    events = [event for text in texts for event in server.run_step(text)]
    server.stop()
    return events


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, record: Serve, replay: Serve, endpoint: Endpoint) -> None:
    """Whatever a model does is done again by its tape, and what follows, too."""
    answers, sign = FAULTS[name]
    endpoint.refuse = {"stream_options"} if name == "an option" else set()
    endpoint.script(*answers)
    recorded = talk(record(idle_timeout=0.1 if name == "silence" else 20.0), "I love otters", "And now?")
    assert sign in json.dumps(recorded, ensure_ascii=False)
    assert lasting(talk(replay(), "I love otters", "And now?")) == lasting(recorded)


def test_compaction(record: Serve, replay: Serve, endpoint: Endpoint, monkeypatch: Patch) -> None:
    """Overflows, what an endpoint says of its window, and summaries are replayed; a summary must match as well."""
    endpoint.context_window = 2_700
    endpoint.default = lambda body: say("Oh!") if "tools" in body else Reply("They talked of it.")
    texts = [f"{number} and {'much more of it ' * 20}" for number in range(30)]
    recorded = talk(record(context_window=4_000), *texts)
    assert sum(event.get("message_type") == "compaction" for event in recorded) >= 2
    assert lasting(talk(replay(), *texts)) == lasting(recorded)
    monkeypatch.setattr(memws, "SUMMARY_SYSTEM", "Be short.")
    failed = [event["message"] for event in talk(replay(), *texts) if event["type"] == "agent_response_error"]
    assert "Be short." in failed[0]


def test_other_times(record: Serve, replay: Serve, endpoint: Endpoint, monkeypatch: Patch) -> None:
    """Another day, another timezone and other silences make no difference, in the texts of tools neither."""
    texts = ["I love otters", "Since 2026-01-31, 10:30 PM", "What do I love?"]
    endpoint.script(echo, echo, SEARCH)
    with monkeypatch.context() as patch:
        patch.setattr(memws, "LOGIN_SILENCE", -1.0)
        recorded = talk(record(), *texts, timezone="Asia/Tokyo")
    day, now = datetime.timedelta(days=40), memws.now_text
    monkeypatch.setattr(memws, "now_text", lambda: memws.utc_text(datetime.datetime.fromisoformat(now()) + day))
    replayed = talk(replay(), *texts, timezone="America/Caracas")
    assert [event.get("message_type") for event in replayed] == [event.get("message_type") for event in recorded]
    assert [event["stop_reason"] for event in replayed if "stop_reason" in event] == ["done"] * 3


CHANGES = {  # what is said instead, and what has to be quoted
    "a word": (["I live in Rome", "And now?"], ["Rome", "Paris"]),
    "later": (["I live in Paris", "And then?"], ["now?", "then?"]),
    "too much": (["I live in Paris", "And now?", "More?"], ["no more calls"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_prompts(name: str, record: Serve, replay: Serve) -> None:
    """A prompt that is not on the tape ends its turn in an error that quotes the first difference."""
    texts, quoted = CHANGES[name]
    talk(record(), "I live in Paris", "And now?")
    *_, end = talk(replay(), *texts)
    assert (end["type"], end["code"]) == ("agent_response_error", "model_refused")
    assert [text for text in quoted if text not in end["message"]] == []
    *_, end = talk(replay(), "I live in Paris", persona="I am Bob.")
    assert "I am Bob." in end["message"]
    assert "I am Sam." in end["message"]


@pytest.mark.anyio
async def test_agents_at_once(record: Serve, replay: Serve, endpoint: Endpoint) -> None:
    """Agents that say the same at the same time get what each of them got, whoever comes first, and count the same."""
    count = itertools.count(1)
    endpoint.default = lambda body: say(f"answer {next(count)}", usage={"prompt_tokens": 3_000, "completion_tokens": 9})

    async def told(server: Any, name: str) -> list[Body]:
        async with wire(server, "*", agent={"name": name}) as client:
            turns = [await client.turn(text) for text in ("Hello", f"I am {name}", "Hello")]
            return lasting(itertools.chain(*turns))

    async def all_told(server: Any, names: str) -> list[list[Body]]:
        return sorted(await asyncio.gather(*(told(server, name) for name in names)), key=str)

    assert await all_told(await asyncio.to_thread(record), "abcdef") == await all_told(replay(), "fedcba")


@pytest.mark.anyio
async def test_stopped_turns(record: Serve, replay: Serve, endpoint: Endpoint) -> None:
    """A turn that was stopped while its model spoke waits there until it is stopped again."""
    endpoint.script(Reply("I begin to tell", stall_after=3, chunk=4))

    async def stopped(server: Any) -> list[Body]:
        async with wire(server, "*", agent={"name": "sam"}) as client:
            await client.say("Hello")
            await client.until(lambda frame: frame.get("message_type") == "delta")
            await client.request("cancel")
            await client.ended()
            return lasting(client.frames)

    recorded = await stopped(await asyncio.to_thread(record))
    assert (await stopped(replay()), recorded[-1]["stop_reason"]) == (recorded, "cancelled")


def test_vectors(record: Serve, replay: Serve, endpoint: Endpoint, monkeypatch: Patch) -> None:
    """Searches by vectors find the same again, also while the endpoint of the embeddings failed."""
    pytest.importorskip("numpy")
    monkeypatch.setattr(memws, "EMBEDDING_PAUSE", 0.0)
    endpoint.synonyms = {"feline": "cat", "naps": "sleeps"}
    texts = ["My cat sleeps", "Keep these", "Any pets?", "Any pets?", "Any pets?"]
    find = Reply(calls=[(f"{store}_search", {"query": "feline naps"}) for store in ("conversation", "archival_memory")])
    keep = Reply(calls=[("archival_memory_insert", {"content": f"Cat {number} sleeps"}) for number in range(100)])
    failing = iter([Reply(status=500)] * 2)
    endpoint.script(echo, keep, echo, find, echo, find, echo, find)

    def embed(body: Body) -> Reply | None:
        return next(failing, None) if body["input"] == ["feline naps"] else None

    endpoint.overrides["/v1/embeddings"] = embed
    recorded = talk(record(embedding_model="test-embedding", context_window=99_000), *texts)
    found = [event["message"] for event in recorded if event.get("name") == "conversation_search" and "status" in event]
    assert ("My cat sleeps" in found[0], "My cat sleeps" in found[-1]) == (False, True)
    assert lasting(talk(replay(), *texts)) == lasting(recorded)


def test_secrets(record: Serve, endpoint: Endpoint, tape: Path) -> None:
    """A tape is its owner's, and holds no key and no password, whoever repeats them; one that is there goes on."""
    endpoint.script(*FAULTS["failed choice"][0], say(f"It is {KEY}, {PASSWORD}"), Reply(status=401, body=BAD))
    for text in ("before", "after"):
        talk(record(), f"My key is {PASTED}", text)
    assert stat.S_IMODE(tape.stat().st_mode) == 0o600
    text = tape.read_text("utf-8")
    assert [secret for secret in (KEY, PASSWORD, PASTED) if secret in text] == []
    assert text.count('"server":') == 2


def test_readme(serve: Serve) -> None:
    """README's first conversation comes from a tape; without it, it is recorded anew from the offline model."""
    mode = "replay" if README_TAPE.exists() else "record"
    server = serve(db=":memory:", **{mode: README_TAPE})
    server.create_new_agent()
    kinds = ("internal_monologue", "memory_change", "assistant_message")
    events = server.run_step("My name is Ada and I love otters")
    shown = [f"{event['message_type']}: {event['message']}" for event in events if event.get("message_type") in kinds]
    assert shown == [
        "internal_monologue: I look into my memory and keep what is new.",
        "memory_change: core memory: human changed",
        "internal_monologue: I know what to say.",
        "assistant_message: I noted in core memory: My name is Ada; I love otters.",
    ]


def test_hello_and_banner(record: Serve, replay: Serve, tape: Path) -> None:
    """Clients and the banner are told of a tape; a replayed server has its model, window and address."""
    servers = [record(context_window=5_000), replay()]
    recorded, replayed = (server.open().models.described for server in servers)
    assert replayed == recorded.replace(f"recorded on {tape}", f"replayed from {tape}") != recorded
    for server, word in zip(servers, ("recorded", "replayed"), strict=True):
        with memws.connect(server.url) as client:
            hello = client.hello()
            assert (hello["tape"], hello["model"], hello["offline"]) == (word, "test-model", False)
            client.create_agent()
            assert client.command("get_context")["window"] == 5_000


BROKEN = {  # what is in the file, and what the sentence says
    "missing": (None, "No such file"),
    "empty": ("", "no tape"),
    "text": ("What is this?", "no tape"),
    "other JSON": ("[1]\n", "no tape"),
    "other server": ('{"start": 1, "server": {"x": 1}}\n', "no tape"),
    "cut": ('{"start": 1, "server": {}}\n{"sta', "line 2"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files(name: str, tape: Path, main: Main) -> None:
    """What is no tape is refused with one sentence, for recording too, and is left alone; so are both flags at once."""
    text, sign = BROKEN[name]
    if text is not None:
        tape.write_text(text, "utf-8")

    def told(*words: object) -> str:
        return sentence(main("serve", "--port", "0", "--db", ":memory:", "--model", "offline", *words))

    assert sign in told("--replay", tape)
    if text:
        assert sign in told("--record", tape)
        assert tape.read_text("utf-8") == text
    assert "No such file" in told("--record", tape / "x") or "Not a directory" in told("--record", tape / "x")
    assert "leave out" in told("--record", tape, "--replay", tape)
