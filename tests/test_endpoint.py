"""The endpoint is as strict as the API it stands for, and openai's own client reads what it sends."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import math
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from endpoint import Body, Endpoint, Reply

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "Hi"}
SEND = {"type": "function", "function": {"name": "send_message", "parameters": {"type": "object", "properties": {}}}}


def call(call_id: Any = "a", name: Any = "f", arguments: Any = "{}") -> Body:
    """A tool call, right unless told otherwise."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*tool_calls: Body, answered: tuple[str, ...] = (), content: Any = None) -> list[Body]:
    """A history with one assistant message of tool calls and its tool messages."""
    answers = [{"role": "tool", "tool_call_id": call_id, "content": "ok"} for call_id in answered]
    return [USER, {"role": "assistant", "content": content, "tool_calls": list(tool_calls)}, *answers]


def tool(**function: Any) -> Body:
    """A request that offers one tool."""
    return {"tools": [{"type": "function", "function": function}]}


@pytest.fixture
async def client(endpoint: Endpoint) -> AsyncIterator[Any]:
    """A client of the `endpoint` that retries nothing."""
    async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="key", max_retries=0) as running:
        yield running


async def create(client: Any, **body: Any) -> Any:
    """Send a chat request as memws does: the whole of it as extra_body."""
    body = {"model": "test-model", "messages": [USER], **body}
    return await client.chat.completions.create(
        model=body["model"], messages=[], stream=body.get("stream", False), extra_body=body
    )


async def stream(client: Any, **body: Any) -> list[Any]:
    """The chunks of a streamed reply."""
    return [chunk async for chunk in await create(client, stream=True, **body)]


def content(chunks: list[Any]) -> str:
    """The text of a streamed reply."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


FAULTS: dict[str, tuple[Body, str]] = {
    "no message": ({"messages": []}, "empty array"),
    "messages that are no list": ({"messages": "Hi"}, "expected an array"),
    "a message that is no object": ({"messages": ["Hi"]}, "expected an object"),
    "an unknown role": ({"messages": [{"role": "bot", "content": ""}]}, "Supported values"),
    "no content": ({"messages": [{"role": "user"}]}, "expected a string, got null"),
    "content that is no string": ({"messages": [{"role": "user", "content": 5}]}, "expected a string, got int"),
    "null content without calls": ({"messages": [{"role": "assistant", "content": None}]}, "expected a string"),
    "a call without its result": ({"messages": calls(call())}, "did not have response messages: a"),
    "one of two results": ({"messages": calls(call("a"), call("b"), answered=("b",))}, "response messages: a"),
    "a user message between": ({"messages": [*calls(call()), USER]}, "did not have response messages: a"),
    "a result without its call": ({"messages": calls(call(), answered=("a",))[::2]}, "preceeding message"),
    "a result twice": ({"messages": calls(call(), answered=("a", "a"))}, "preceeding message"),
    "an empty list of calls": ({"messages": calls()}, "empty array"),
    "an empty id": ({"messages": calls(call(""), answered=("",))}, "unique non-empty string"),
    "no id": ({"messages": calls(call(None))}, "unique non-empty string"),
    "the same id twice": ({"messages": calls(call(), call(), answered=("a", "a"))}, "unique non-empty string"),
    "calls of the user": ({"messages": [{**USER, "tool_calls": [call()]}]}, "not allowed"),
    "a bad function name": ({"messages": calls(call(name="a b"), answered=("a",))}, "does not match pattern"),
    "broken arguments": ({"messages": calls(call(arguments='{"a'), answered=("a",))}, "holds a JSON object"),
    "arguments that are a list": ({"messages": calls(call(arguments="[]"), answered=("a",))}, "holds a JSON object"),
    "arguments as an object": ({"messages": calls(call(arguments={}), answered=("a",))}, "holds a JSON object"),
    "no tool": ({"tools": []}, "empty array"),
    "a tool of no type": ({"tools": [{"function": {"name": "f"}}]}, "type 'function'"),
    "a tool without a name": (tool(), "does not match pattern"),
    "a long tool name": (tool(name="f" * 65), "does not match pattern"),
    "parameters of no object": (tool(name="f", parameters={"type": "string"}), "Invalid schema for function 'f'"),
    "a required parameter that is not there": (
        tool(name="f", parameters={"type": "object", "properties": {}, "required": ["a"]}),
        "Invalid schema for function 'f'",
    ),
    "tool_choice without tools": ({"tool_choice": "auto"}, "only allowed when 'tools'"),
    "parallel_tool_calls without tools": ({"parallel_tool_calls": True}, "only allowed when 'tools'"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "only allowed when 'stream'"),
    "an unknown parameter": ({"context_window": 5}, "Unrecognized request argument supplied: context_window"),
    "no model": ({"model": ""}, "provide a model"),
}
EMBEDDING_FAULTS: dict[str, tuple[Body, str]] = {
    "no input": ({}, "input' is invalid"),
    "no texts": ({"input": []}, "input' is invalid"),
    "an empty text": ({"input": ["a", ""]}, "input' is invalid"),
    "a text that is none": ({"input": ["a", 5]}, "input' is invalid"),
    "too many texts": ({"input": ["a"] * 2049}, "1 to 2048"),
    "no model": ({"input": "a", "model": ""}, "provide a model"),
    "an unknown encoding": ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "dimensions"),
    "an unknown parameter": ({"input": "a", "messages": []}, "Unrecognized request argument supplied: messages"),
}
RIGHT: dict[str, Body] = {"/chat/completions": {"messages": [USER]}, "/embeddings": {}}
CASES = [("/chat/completions", *fault) for fault in FAULTS.values()]
CASES += [("/embeddings", *fault) for fault in EMBEDDING_FAULTS.values()]


@pytest.mark.parametrize(("route", "body", "reason"), CASES, ids=[*FAULTS, *EMBEDDING_FAULTS])
async def test_refuses(client: Any, endpoint: Endpoint, route: str, body: Body, reason: str) -> None:
    """What the API refuses is answered with 400 and listed with its reason; the script is not used up."""
    endpoint.script(Reply("next"))
    with pytest.raises(openai.BadRequestError, match="Error code: 400"):
        await client.post(route, body={"model": "test-model", **RIGHT[route], **body}, cast_to=object)
    assert content(await stream(client)) == "next"
    [refusal] = endpoint.refusals
    assert reason in refusal
    endpoint.refusals.clear()


def post(endpoint: Endpoint, raw: bytes) -> tuple[int, Body]:
    """Status and JSON of a chat request of raw bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/chat/completions", raw)
        response = connection.getresponse()
        return response.status, json.load(response)


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'{"temperature": NaN}', b'{"user": "\\ud800"}', b'{"user": "\xff"}'],
    ids=["empty", "cut", "no object", "NaN", "lone surrogate", "no UTF-8"],
)
def test_refuses_what_is_not_strict_json(raw: bytes) -> None:
    """A body that a strict parser does not read is refused, and kept as it came."""
    with Endpoint() as endpoint:
        status, answer = post(endpoint, raw)
        assert status == 400
        assert answer["error"]["message"].startswith("We could not parse the JSON body of your request.")
        assert (endpoint.bodies, endpoint.requests, len(endpoint.refusals)) == ([raw], [{}], 1)


LIMITS: dict[str, tuple[Body, Body, str, str | None]] = {
    "window": ({"context_window": 9}, {"messages": [{**USER, "content": "x" * 40}]}, "resulted in 10 tokens", "length"),
    "max_tokens": ({"refuse": ["max_tokens"]}, {"max_tokens": 5}, "Use 'max_completion_tokens'", "unsupported"),
    "parallel": (
        {"refuse": ["parallel_tool_calls"]},
        {"tools": [SEND], "parallel_tool_calls": True},
        "not supported",
        "unsupported",
    ),
    "stream_options": ({"refuse": ["stream_options"]}, {"stream": True, "stream_options": {}}, "Unrecognized", None),
    "api_key": ({"api_key": "right"}, {}, "Incorrect API key", "invalid_api_key"),
}


@pytest.mark.parametrize(("options", "body", "words", "code"), LIMITS.values(), ids=LIMITS)
async def test_limits(options: Body, body: Body, words: str, code: str | None) -> None:
    """An endpoint with a limit says so in OpenAI's words, and does not count it as a fault of the client."""
    with Endpoint(**options) as endpoint:
        async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="key", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError, match=words) as caught:
                await create(client, **body)
        assert (code or "") in (caught.value.code or "")
        assert endpoint.refusals == []


async def test_default(client: Any, endpoint: Endpoint) -> None:
    """Without a script it calls send_message where that is offered, else sends text, or what a function makes of it."""
    assert content(await stream(client)) == "Hello!"
    completion = await create(client, tools=[SEND])
    [function] = [tool_call.function for tool_call in completion.choices[0].message.tool_calls]
    assert (function.name, function.arguments) == ("send_message", '{"message": "Hello!"}')
    assert completion.choices[0].finish_reason == "tool_calls"
    endpoint.default = lambda body: Reply(body["messages"][-1]["content"].upper())
    assert content(await stream(client, messages=[{**USER, "content": "echo"}])) == "ECHO"


DEPARTURES = [Reply(), Reply(reasoning="Hmm.", crlf=True, comments=True, multiline=True, split=3, done=False)]


@pytest.mark.parametrize("departure", DEPARTURES, ids=["as OpenAI", "otherwise"])
async def test_streams(client: Any, endpoint: Endpoint, departure: Reply) -> None:
    """Text, two tool calls and usage come whole through openai's client, whatever the form of the stream."""
    asked = [("first", {"word": "¡Olé! 🎉"}), ("second", {})]
    endpoint.script(dataclasses.replace(departure, text="¿Qué tal, 世界?", calls=asked))
    chunks = await stream(client, stream_options={"include_usage": True})

    assert content(chunks) == "¿Qué tal, 世界?"
    deltas = [delta for chunk in chunks if chunk.choices for delta in chunk.choices[0].delta.tool_calls or ()]
    names = [delta.function.name for delta in deltas if delta.function.name]
    arguments = ["".join(delta.function.arguments for delta in deltas if delta.index == index) for index in (0, 1)]
    assert list(zip(names, map(json.loads, arguments), strict=True)) == asked
    assert len({delta.id for delta in deltas if delta.id}) == 2
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 0
    assert chunks[-1].usage.completion_tokens > 0


async def test_hold_and_stall(client: Any, endpoint: Endpoint) -> None:
    """A held and a stalled reply wait for release(), which frees every request that has arrived."""
    endpoint.script(Reply("held", hold=True), Reply("stalled", stall_after=1))
    tasks = [asyncio.create_task(stream(client)) for _ in range(2)]
    await asyncio.to_thread(endpoint.wait_requests, 2)
    endpoint.release()
    assert sorted(map(content, await asyncio.gather(*tasks))) == ["held", "stalled"]


@pytest.mark.parametrize(
    "reply", [Reply(hold=True), Reply("", stall_after=1), Reply(delay=60), Reply("Hi", endless=True)]
)
async def test_client_leaves(client: Any, endpoint: Endpoint, reply: Reply) -> None:
    """A client that goes away while it waits, or while words come without end, ends the exchange; others are served."""
    endpoint.script(reply)
    with pytest.raises(TimeoutError, match=r"^0 of 1 requests arrived in 0 s$"):
        endpoint.wait_requests(1, timeout=0)
    task = asyncio.create_task(stream(client))
    await asyncio.to_thread(endpoint.wait_requests, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert content(await stream(client)) == "Hello!"


def test_the_end_resets_connections() -> None:
    """At its end thread and port are free, also beside a request that waits."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1")) as client:
        with Endpoint() as endpoint:
            endpoint.script(Reply(hold=True))
            client.port = endpoint.port
            client.request("POST", "/v1/chat/completions", json.dumps({"model": "m", "messages": [USER]}))
            endpoint.wait_requests(1)
        with pytest.raises(ConnectionError):
            client.getresponse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", endpoint.port))


async def test_models_and_embeddings(client: Any, endpoint: Endpoint) -> None:
    """Models are listed; embeddings are unit vectors, alike for texts that share words; both routes can fail."""
    assert [model.id async for model in client.models.list()] == ["test-model"]
    encodings: list[Body] = [{}, {"encoding_format": "float"}]
    for encoding in encodings:
        texts = ["the cat sleeps", "the cats sleep", "quarterly figures"]
        answer = await client.embeddings.create(model="e", input=texts, **encoding)
        cat, other_cat, figures = (item.embedding for item in answer.data)
        assert len(cat) == endpoint.dimension
        assert math.isclose(math.hypot(*cat), 1, rel_tol=1e-6)
        assert math.dist(cat, other_cat) < math.dist(cat, figures)
    endpoint.overrides["/v1/embeddings"] = endpoint.overrides["/v1/models"] = Reply(status=500)
    for request in (client.embeddings.create(model="e", input="x"), client.models.list()):
        with pytest.raises(openai.InternalServerError):
            await request
    assert len(endpoint.embedding_requests) == 3
    assert endpoint.embedded == [*texts, *texts, "x"]


async def test_embeddings_as_a_test_wants_them(client: Any, endpoint: Endpoint) -> None:
    """Synonyms, dimension and spoiled vectors change while the endpoint runs; a held answer comes when released."""

    async def embed(*texts: str, **more: Any) -> list[Any]:
        answer = await client.embeddings.create(model="e", input=list(texts), **more)
        return [item.embedding for item in answer.data]

    endpoint.synonyms["feline"] = "cat"
    cat, feline, dog = await embed("a cat", "a feline", "a dog")
    assert cat == feline != dog
    assert math.dist(cat, endpoint.vector("a cat")) < 1e-6
    endpoint.dimension = 8
    assert [len(vector) for vector in await embed("a cat") + await embed("a cat", dimensions=5)] == [8, 5]
    endpoint.spoil = lambda vectors: [*vectors[1:], None, "text"]
    spoiled = await embed("a", "b", encoding_format="float")
    assert [type(vector) for vector in spoiled] == [list, type(None), str]
    endpoint.spoil = lambda vectors: [[math.nan] for _ in vectors]
    assert math.isnan((await embed("a"))[0][0])

    endpoint.spoil = None
    endpoint.overrides["/v1/embeddings"] = lambda body: Reply(hold=True) if body["input"] == ["held"] else None
    held = asyncio.create_task(embed("held"))
    await asyncio.to_thread(endpoint.wait_embeddings, 6)
    assert len(await embed("not held")) == 1
    assert not held.done()
    endpoint.release()
    assert len(await held) == 1
