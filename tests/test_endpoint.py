"""The endpoint is as strict as the API it stands for."""

import contextlib
import json
import re
from http.client import HTTPConnection
from typing import Any

import pytest
from endpoint import Body, Endpoint, Refusal, check, check_embedding, parse

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
CASES = [({"messages": [USER], **body}, reason) for body, reason in FAULTS] + EMBEDDING_FAULTS
CASES += [({"user": value}, "could not parse the JSON body") for value in (float("nan"), "\ud800")]


@pytest.mark.parametrize(("body", "reason"), CASES, ids=range(len(CASES)))
def test_refuses(body: Body, reason: str) -> None:
    """What the API refuses is refused, with its reason."""
    raw = json.dumps({"model": "test-model", **body}).encode()
    with pytest.raises(Refusal, match=re.escape(reason)):
        (check_embedding if "input" in body else check)(parse(raw))


def test_a_refusal_is_told_and_listed() -> None:
    """It is answered with 400, and the test can see it."""
    with Endpoint() as endpoint, contextlib.closing(HTTPConnection("127.0.0.1", endpoint.port)) as connection:
        connection.request("POST", "/v1/chat/completions", "{}")
        assert connection.getresponse().status == 400
        (refusal,) = endpoint.refusals
    assert "provide a model" in refusal
