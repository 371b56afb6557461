"""The endpoint is as strict as the API it stands for, and openai's own client reads what it sends."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from endpoint import Body, Endpoint, Reply

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.anyio

CHAT, EMBEDDINGS = "/chat/completions", "/embeddings"
USER = {"role": "user", "content": "Hi"}
SEND = {"type": "function", "function": {"name": "send_message", "parameters": {"type": "object", "properties": {}}}}
NO_PARAMETERS: Body = {"type": "object", "properties": {}, "required": ["a"]}


def history(*calls: Body, answered: str = "") -> Body:
    """A request whose history has one assistant message of tool calls, right unless told otherwise, and its answers."""
    right = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    made = [right | call | {"function": right["function"] | call.get("function", {})} for call in calls]
    answers = [{"role": "tool", "tool_call_id": call_id, "content": "ok"} for call_id in answered]
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": made}, *answers]}


def tool(**function: Any) -> Body:
    """A request that offers one tool."""
    return {"tools": [{"type": "function", "function": function}]}


@pytest.fixture
async def client(endpoint: Endpoint) -> AsyncIterator[Any]:
    """A client of the `endpoint` that retries nothing."""
    async with openai.AsyncOpenAI(base_url=endpoint.url, api_key="key", max_retries=0) as running:
        yield running


async def stream(client: Any, **body: Any) -> list[Any]:
    """The chunks of a streamed reply to a request that is sent as memws does: the whole of it as extra_body."""
    body = {"model": "test-model", "messages": [USER], "stream": True, **body}
    answer = await client.chat.completions.create(model="test-model", messages=[], stream=True, extra_body=body)
    return [chunk async for chunk in answer]


def content(chunks: list[Any]) -> str:
    """The text of a streamed reply."""
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


FAULTS: list[tuple[Body, str]] = [
    ({"messages": []}, "empty array"),
    ({"messages": ["Hi"]}, "expected an object"),
    ({"messages": [{"role": "bot", "content": ""}]}, "Supported values"),
    ({"messages": [{"role": "user"}]}, "expected a string, got null"),
    (history({}), "did not have response messages: a"),
    (history({}, {"id": "b"}, answered="b"), "response messages: a"),
    ({"messages": [*history({})["messages"], USER]}, "did not have response messages: a"),
    ({"messages": history({}, answered="a")["messages"][::2]}, "preceeding message"),
    (history({}, answered="aa"), "preceeding message"),
    (history({"id": ""}), "unique non-empty string"),
    (history({}, {}, answered="aa"), "unique non-empty string"),
    ({"messages": [{**USER, "tool_calls": [SEND]}]}, "not allowed"),
    (history({"function": {"name": "a b"}}, answered="a"), "does not match pattern"),
    (history({"function": {"arguments": '{"a'}}, answered="a"), "holds a JSON object"),
    (history({"function": {"arguments": {}}}, answered="a"), "holds a JSON object"),
    ({"tools": [{"function": {"name": "f"}}]}, "type 'function'"),
    (tool(name="f" * 65), "does not match pattern"),
    (tool(name="f", parameters={"type": "string"}), "Invalid schema for function 'f'"),
    (tool(name="f", parameters=NO_PARAMETERS), "Invalid schema for function 'f'"),
    ({"tool_choice": "auto"}, "only allowed when 'tools'"),
    ({"stream_options": {"include_usage": True}}, "only allowed when 'stream'"),
    ({"context_window": 5}, "Unrecognized request argument supplied: context_window"),
    ({"model": ""}, "provide a model"),
]
INPUTS: list[Any] = [None, [], ["a", ""], ["a", 5], ["a"] * 2049]
EMBEDDING_FAULTS: list[tuple[Body, str]] = [({"input": each}, "expected a non-empty string") for each in INPUTS]
EMBEDDING_FAULTS += [({"input": "a", "messages": []}, "Unrecognized request argument supplied: messages")]
CASES = [(CHAT, {"messages": [USER], **body}, reason) for body, reason in FAULTS]
CASES += [(EMBEDDINGS, *fault) for fault in EMBEDDING_FAULTS]
CASES += [(CHAT, {"user": value}, "could not parse the JSON body") for value in (float("nan"), "\ud800")]


@pytest.mark.parametrize(("route", "body", "reason"), CASES, ids=range(len(CASES)))
async def test_refuses(client: Any, endpoint: Endpoint, route: str, body: Body, reason: str) -> None:
    """What the API refuses is answered with 400 and listed with its reason; the script is not used up."""
    endpoint.script(Reply("next"))
    raw = json.dumps({"model": "test-model", **body}).encode()
    with pytest.raises(openai.BadRequestError, match="Error code: 400"):
        await client.post(route, content=raw, cast_to=object, options={"headers": {"Content-Type": "application/json"}})
    assert content(await stream(client)) == "next"
    (refusal,) = endpoint.refusals
    assert reason in refusal
    endpoint.refusals.clear()
