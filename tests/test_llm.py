"""Whatever way an endpoint answers or fails, its reply is read whole, or its failure has a code and a sentence."""

import collections
import contextlib
import itertools
import json
import logging
import math
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from agents import request_of
from endpoint import Body, Endpoint, Reply, prompt_tokens

import memws

pytestmark = pytest.mark.anyio

Log = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch
Model = memws.Model
KEY = "canary-0123456789abcdef"
TEXT = 'Grüße, 世界 👋! It is "1,5 °C"\nin Oslo \\ today.'
CALLS = [("send_message", {"message": TEXT}), ("core_memory_append", {"name": "human", "content": "Name: Zoë"})]
TOOLS = ("send_message", "core_memory_append")
SPECS = json.dumps([{"type": "function", "function": {"name": name}} for name in TOOLS])
USER = '{"role":"user","content":"Hi"}'


@pytest.fixture
async def model(endpoint: Endpoint) -> AsyncIterator[Model]:
    async with closing(memws.Models("test-model", endpoint.url, KEY)) as models:
        yield models.get(None)[0]


@contextlib.asynccontextmanager
async def closing(models: memws.Models) -> AsyncIterator[memws.Models]:
    try:
        yield models
    finally:
        await models.close()


async def ask(model: Model, **settings: Any) -> memws.Reply:
    """Send one request with two tools, and take in its whole answer as an agent does."""
    reply = memws.Reply()
    async with contextlib.aclosing(model.stream(request_of(model.head(settings), [USER], SPECS))) as chunks:
        async for chunk in chunks:
            reply.feed(chunk)
            if reply.final:
                break
    return reply


async def fail(model: Model, **settings: Any) -> memws.ModelError:
    with pytest.raises(memws.ModelError) as caught:
        await ask(model, **settings)
    return caught.value


def refusal(message: str, code: str | int | None = None, status: int = 400) -> Reply:
    """An HTTP error with OpenAI's error JSON."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return Reply(status=status, body={"error": error})


def in_stream(message: str, code: str | int | None) -> Reply:
    """An answer whose stream goes on with an error."""
    return Reply(TEXT, error_in_stream={"message": message, "code": code})


MANNERS: dict[str, Body] = {
    "as OpenAI does": {}, "CR LF and comments": {"crlf": True, "comments": True},
    "one byte at a time": {"split": 1}, "seven bytes at a time with CR LF": {"split": 7, "crlf": True},
    "one character in a delta": {"chunk": 1}, "no [DONE]": {"done": False}, "one whole JSON answer": {"whole": True},
    "a first chunk with empty choices": {"empty_choices": "first"},
    "a first choice without a delta": {"first_without_delta": True}, "usage in the last chunk": {"usage_style": "last"},
    "no usage": {"usage": None}, "another finish reason": {"finish": "eos_token"},
    "reasoning_content": {"reasoning": "Hm. Let me think."},
    "reasoning": {"reasoning": "Hm. Let me think.", "reasoning_field": "reasoning"},
}  # fmt: skip
CALL_MANNERS = MANNERS | {"text beside the calls": {"text": TEXT}, "finish stop in spite of calls": {"finish": "stop"}}
FORMS: list[Body] = [{}, {"whole_arguments": True}, {"arguments_as_object": True}, {"whole": True}]
IDS: list[Body] = [{}, {"call_ids": [None, None]}, {"call_ids": ["a", "a"]}]
for each in itertools.product(FORMS, IDS, [{}, {"call_index": False}]):
    CALL_MANNERS[str(each)] = dict(collections.ChainMap(*each))


@pytest.mark.parametrize("manner", CALL_MANNERS.values(), ids=CALL_MANNERS.keys())
async def test_an_answer_is_read_whole(endpoint: Endpoint, model: Model, manner: Body) -> None:
    """Text arrives to the letter, reasoning apart, calls in order, each with its arguments and an id of its own."""
    if manner in MANNERS.values():
        endpoint.script(Reply(TEXT, **manner))
        reply = await ask(model)
        assert (reply.text, reply.calls, reply.finish) == (TEXT, [], manner.get("finish", "stop"))
        assert reply.monologue == "\n".join(filter(None, (manner.get("reasoning"), TEXT)))
        sizes = sum(prompt_tokens(endpoint.requests[0])), len(TEXT + manner.get("reasoning", "")) // 4
        assert tuple((reply.usage or {}).values()) == (sizes if "usage" not in manner else ())
    endpoint.script(Reply(calls=CALLS, **manner))
    reply = await ask(model)
    assert [(call.name, json.loads(call.text)) for call in reply.calls] == CALLS
    assert reply.text == manner.get("text", "")
    memws.read_reply(reply, TOOLS)
    assert [(call.name, call.arguments, call.problem) for call in reply.calls] == [(*call, "") for call in CALLS]
    assert len({call.id for call in reply.calls} - {""}) == 2


def piece(index: Any = None, call_id: str | None = None, name: str | None = None, text: Any = None) -> Body:
    """A delta with a piece of a tool call."""
    fields = {"index": index, "id": call_id, "function": {"name": name, "arguments": text}}
    return {"choices": [{"delta": {"tool_calls": [fields]}}]}


def delta(**fields: Any) -> Body:
    return {"choices": [{"index": 0, "delta": fields}]}


END, EMPTY = [piece(0, None, None, "}")], {"name": "a", "arguments": "{}"}
PARTS = [[{"type": "text", "text": "Hel"}, {"type": "image"}], [{"type": "text", "text": "lo"}]]
PIECES: dict[str, tuple[list[Body], str]] = {
    "content in parts": ([{"choices": [{"delta": {"content": parts}}]} for parts in PARTS], "Hello"),
    "all numbered 0, told apart by ids": ([piece(0, "x", "a", "{"), *END, piece(0, "y", "a", "{"), *END], "a{} a{}"),
    "all numbered 0, told apart by names": ([piece(0, None, "a", "{}"), piece(0, None, "b", "{}")], "a{} b{}"),
    "not numbered, the same name twice": ([piece(name="a", text="{}"), piece(name="a", text="{}")], "a{} a{}"),
    "id and name in every piece": ([piece(0, "x", "a", "{"), piece(0, "x", "a", "}")], "a{}"),
    "the same, not numbered": ([piece(None, "x", "a", "{"), piece(None, "x", "a", "}")], "a{}"),
    "a name in pieces": ([piece(0, "x", "send_"), piece(0, None, "message{"), *END], "send_message{}"),
    "numbered from 3": ([piece(3, "x", "a", "{"), piece(3, None, None, "}")], "a{}"),
    "all numbered 0, one name": ([piece(0, "x", "a", "{}"), piece(0, "y", "a", ""), piece(0, text="{}")], "a{} a{}"),
    "a name that grows": ([piece(0, "x", "send_"), piece(0, "x", "send_message"), *END], "send_message}"),
    "a name in pieces, no number": ([piece(None, "x", "send_"), piece(name="message", text="{}")], "send_message{}"),
    "ever another id": ([piece(0, "x", "a", '{"b"'), piece(0, "y", "a", ": {"), piece(0, "z")], 'a{"b": {'),
    "all that has come, in every piece": ([piece(1, "x", "a", '{"b'), piece(1, "x", "a", '{"b": 1}')], 'a{"b": 1}'),
    "all that has come, once more": ([piece("0", "x", "a", "{}"), piece("0", "x", "a", "{}")], "a{}"),
    "an empty object first": ([piece(1, "x", "a", "{}"), piece(1, text='{"b'), piece(1, text='": 1}')], 'a{"b": 1}'),
    "numbered otherwise after the first": ([piece(-1, "x", "a", "{"), *END], "a{}"),
    "without a function": ([delta(tool_calls=[{"name": "a", "arguments": {"b": 1}}])], 'a{"b":1}'),
    "a function, as before there were tools": ([delta(function_call={"name": "a", "arguments": "{}"})], "a{}"),
    "all of it again": ([delta(content="Hello"), {"choices": [{"message": {"content": "Hello"}}]}], "Hello"),
    "another choice": ([delta(content="Hello"), {"choices": [{"index": 1, "delta": {"content": "Bye"}}]}], "Hello"),
    "two choices without an index": ([{"choices": [{"delta": {"content": each}} for each in ("Hel", "lo")]}], "Hello"),
    "as a function too": ([delta(tool_calls=[EMPTY], function_call=EMPTY)], "a{}"),
    "thoughts in parts": ([delta(content=[{"type": "thinking", "thinking": [{"text": "Hm."}]}, "Hello"])], "Hello"),
    "no texts, told apart by ids": ([piece(None, "x", "a"), piece(None, "y", "a"), piece(text="{}")], "a a{}"),
    "no texts, told apart by names": ([piece(name="a"), piece(name="b")], "a b"),
    "no texts, names and ids": ([piece(0, "x", "a"), piece(0, "y", "b")], "a b"),
    "in turns": ([piece(0, "x", "a", "{"), piece(1, "y", "b", "[]"), *END], "a{} b[]"),
}


@pytest.mark.parametrize(("chunks", "calls"), PIECES.values(), ids=PIECES)
def test_pieces_are_put_together(chunks: list[Body], calls: str) -> None:
    """However endpoints number and name the pieces of calls, each goes to its call; parts of content are text."""
    reply = memws.Reply()
    for chunk in chunks:
        reply.feed(chunk)
    assert reply.text + " ".join(call.name + call.text for call in reply.calls) == calls


FIRST, LAST = (json.dumps({"choices": [{"delta": {"content": text}}]}) for text in ("Hel", "lo"))
STOP = '{"choices": [{"delta": {}, "finish_reason": "eos"}]}'
STREAMS = {
    "lone CR": f"data: {FIRST}\r\rdata: {LAST}\r\rdata: {STOP}\r\r",
    "a byte order mark": f"\ufeffdata: {FIRST}\n\ndata: {LAST}\n\ndata: {STOP}\n\n",
    "other fields": f"event: message\nid: 1\ndata:{FIRST}\nretry: 5\n\n: x\n\ndata: {LAST}\n\ndata: {STOP}\n\n",
    "several data lines": f"data: {FIRST[:9]}\r\ndata: {FIRST[9:]}\r\n\r\ndata: {LAST}\r\n\r\ndata: {STOP}\r\n\r\n",
    "[DONE] without a finish reason": f"data: {FIRST}\n\ndata: {LAST}\n\ndata: [DONE]\n\n",
    "the last line without an end": f"data: {FIRST}\n\ndata: {LAST}\n\ndata: [DONE]",
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
async def test_any_stream_of_events_is_read(endpoint: Endpoint, model: Model, stream: str) -> None:
    """Whatever ends its lines, and whatever else its events hold, a stream is read to its end."""
    endpoint.script(Reply(body=stream))
    assert (await ask(model)).text == "Hello"


FAILURES: dict[str, tuple[Reply, str, bool]] = {
    "401": (Reply(status=401), "model_auth", False),
    "403": (Reply(status=403), "model_auth", False),
    "429": (Reply(status=429), "model_rate_limit", True),
    "no money": (refusal("You exceeded your current quota", "insufficient_quota", 429), "model_rate_limit", False),
    "408": (Reply(status=408), "model_unavailable", True),
    "409": (Reply(status=409), "model_unavailable", True),
    "502 with a page": (Reply(status=502, body="<html>Bad gateway</html>"), "model_unavailable", True),
    "529": (Reply(status=529), "model_unavailable", True),
    "400": (refusal("Invalid value"), "model_refused", False),
    "404": (refusal("The model does not exist", "model_not_found", 404), "model_unavailable", False),
    "400 with the error as a text": (Reply(status=400, body={"error": "bad"}), "model_refused", False),
    "422 with a detail": (Reply(status=422, body={"detail": "bad"}), "model_refused", False),
    "length, by its code": (refusal("Too much", "context_length_exceeded"), "context_overflow", False),
    "length, vLLM": (refusal("This model's maximum context length is 4096 tokens."), "context_overflow", False),
    "length, llama.cpp": (refusal("the request exceeds the available context size", 400), "context_overflow", False),
    "length, Anthropic": (refusal("prompt is too long: 214315 tokens > 200000 maximum"), "context_overflow", False),
    "an error in the stream": (Reply(TEXT, error_in_stream={"message": "error"}), "model_unavailable", True),
    "an error that is a text": (Reply(TEXT, body={"error": "CUDA out of memory"}), "model_unavailable", True),
    "a rate limit in the stream": (in_stream("Slow down", "rate_limit_exceeded"), "model_rate_limit", True),
    "a 429 in the stream": (in_stream("Slow down", 429), "model_rate_limit", True),
    "an overflow in the stream": (in_stream("Too long", "context_length_exceeded"), "context_overflow", False),
    "a bad key in the stream": (in_stream("Bad key", "invalid_api_key"), "model_auth", False),
    "nested deep": (Reply(status=400, body='{"error":' * 90_000 + "1" + "}" * 90_000), "model_refused", False),
    "HTML with 200": (Reply(body="<!doctype html><title>Proxy</title>"), "model_unavailable", True),
    "an empty HTML page with 200": (Reply(body=""), "model_unavailable", True),
    "no finish": (Reply(TEXT, empty_choices="all"), "model_unavailable", True),
    "no finish in one whole JSON answer": (Reply(TEXT, empty_choices="all", whole=True), "model_unavailable", True),
}
CHUNKS = [b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"5", b'{"choices": 5}', b'{"choices": [{"delta": [[]]}]}']
CHUNKS += [b"data: " + raw + b"\n\n" for raw in CHUNKS]
FAILURES |= {f"no chunk: {raw[:30]!a}": (Reply(body=raw), "model_unavailable", True) for raw in CHUNKS}


@pytest.mark.parametrize(("answer", "code", "retry"), FAILURES.values(), ids=FAILURES.keys())
async def test_a_failure_has_its_code(endpoint: Endpoint, model: Model, answer: Reply, code: str, retry: bool) -> None:
    """Each failure has a code, says whether trying again may help, costs one request, and leaves the next alone."""
    endpoint.script(answer)
    error = await fail(model)
    assert (error.code, error.retry) == (code, retry)
    assert len(endpoint.requests) == 1, "the openai client's own retries are off"
    assert (await ask(model)).calls


OWN = "messages[3].content: expected a string, but got null (code 17)"
BODIES: list[str | Body | list[Any]] = [
    {"error": {"message": OWN, "code": None}}, {"error": OWN, "error_type": "validation"}, {"message": OWN},
    {"object": "error", "message": OWN}, {"detail": OWN}, {"detail": [{"loc": ["body", 3], "msg": OWN}]}, OWN,
    {"message": {"detail": [{"msg": OWN}]}}, [{"error": {"code": 400, "message": OWN}}], {"errors": [{"message": OWN}]},
    {"error": {"message": "Provider returned error", "metadata": {"raw": json.dumps({"error": {"message": OWN}})}}},
    {"error": "Bad Request", "message": OWN, "status": 400}, {"title": "Bad Request", "detail": OWN},
    {"type": "error", "error": {"type": "x", "message": OWN}}, {"error": "invalid", "error_description": OWN},
    f"<!DOCTYPE html><html><head><title>{OWN}</title></head></html>",
    {"error": {"message": f"{OWN} {'超x' * 450}end"}},
    {"choices": [{"delta": {"content": ""}, "error": {"message": OWN}, "finish_reason": "error"}]},
    {"message": json.dumps([{"error": {"message": OWN}}])}, {"error": {"message": f"{OWN}\n{'x ' * 400}end"}},
    {"base_resp": {"status_code": 1004, "status_msg": OWN}}, {"error_code": 17, "error_msg": OWN}, {"Message": OWN},
    {"fault": {"faultstring": OWN}}, {"status": "failed", "failure_reason": OWN},
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: json.dumps(body)[:40])
async def test_the_own_words_of_an_endpoint(endpoint: Endpoint, model: Model, body: Any) -> None:
    """They stand in the error whole, whatever the shape of its body, refused at once or inside an answer."""
    end = "end" if "x" * 9 in re.sub("[^x]", "", str(body)) else ""
    for answer in (Reply(status=400, body=body), Reply(body=body)):
        endpoint.script(answer)
        error = str(await fail(model))
        assert (OWN in error, end in error, len(error) < 1_100) == (True, True, True)


TOO_LONG = {  # what real endpoints say, and the window that stands there
    "This model's maximum prompt length is 131072 but the request contains 537812 tokens.": 131_072,
    "Invalid request: Your request exceeded model token limit: 8192": 8_192,
    "Prompt exceeds max length": 0,
    "This model only supports up to 4,096 tokens": 4_096,
    "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000, decrease input length": 200_000,
    "`inputs` tokens + `max_new_tokens` must be <= 8193. Given: 9000 `inputs` tokens": 8_193,
    "`inputs` must have less than 4,096 tokens. Given: 5,000": 4_096,
    "Input is too long for requested model.": 0,
    "Range of input length should be [1, 98304]": 98_304,
    "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 4292.": 4_081,
    "The input (36000 tokens) is longer than the model's context length (32768 tokens).": 32_768,
    "invalid params, context window exceeds limit (2013)": 0,
    "输入长度超过限制": 0,
    "Cannot truncate prompt with n_keep (11378) >= n_ctx (4096)": 4_096,
    "Token limit exceeded: the prompt has 5000 tokens, the limit is 4096": 4_096,
    "prompt_too_long": 0,
    "Prompt has 9,000 tokens, but the max is 8,192": 8_192,
    "length of prompt_tokens (163280) must be less than max_seq_len (32768).": 32_768,
    "The number of tokens in messages and tools (9000) exceeds the maximum of 8192": 8_192,
    "Your tokens exceed the maximum number of input tokens. Number of tokens: 33000, limit: 32000": 32_000,
    "Your messages take 9000 tokens; this model allows at most 8192 tokens.": 8_192,
    "413 Request Entity Too Large": 0,
    "413 Request body too large for gpt-4o model. Max size: 8000 tokens.": 8_000,
    "429 Request too large on tokens per min (TPM): Limit 30000, Requested 132819. It must be reduced.": 30_000,
    "429 Rate limit reached on tokens per minute (TPM): Limit 6000, Used 0, Requested 7000. Try again in 9s.": 6_000,
}


async def test_an_endpoint_that_finds_the_prompt_too_long(endpoint: Endpoint, model: Model) -> None:
    """In whatever words, it is context_overflow, and a window in them is learned, only downwards."""
    for words, window in TOO_LONG.items():
        status, words = (int(words[:3]), words[4:]) if words[:3].isdigit() else (400, words)
        for answer in (refusal(words, status=status), in_stream(words, status)):
            for known, told in ((0, window), (10_000_000, window or 10_000_000), (2_000, 2_000)):
                model.learned = memws.Learned(["m"], window=known)
                endpoint.script(answer)
                error = await fail(model)
                assert (error.code, model.learned.window) == ("context_overflow", told)
                assert words in str(error)


REFUSALS = {  # what else endpoints say, after a status that is not 400, and what it is
    "429 Rate limit reached on TPM: Limit 30000, Used 29000, Requested 1500. Try again in 1s.": "model_rate_limit",
    "429 Too many tokens, please wait before trying again.": "model_rate_limit",
    "429 This request would exceed your organization's rate limit of 30,000 input tokens": "model_rate_limit",
    "402 You requested up to 4096 tokens, but can only afford 100": "model_rate_limit",
    "too many concurrent requests (limit 5)": "model_refused",
    "tools: array too long. Expected an array with maximum length 128": "model_refused",
    "messages[1].content[1].image_url: image exceeds 5 MB maximum: 7340032 bytes > 5242880": "model_refused",
    "messages[3].tool_calls[0].id: string too long. Expected maximum length 40": "model_refused",
    "max_tokens is too large: 100000. This model supports at most 16384": "model_refused",
    "tools[0].function.description: string too long. Expected maximum length 1024": "model_refused",
    "400 Your credit balance is too low to access the API.": "model_rate_limit",
    "request timed out: exceeded 60s waiting for the first token": "model_refused",
    "gemma3:latest does not support tools": "model_refused",
    "404 No endpoints found that support tool use": "model_refused",
    "500 tools param requires --jinja flag": "model_refused",
    "401 token expired": "model_auth",
    "API key not valid. Please pass a valid API key.": "model_auth",
    "Failed to call a function. See 'failed_generation' for more.": "bad_output",
    "500 tool_use_failed": "bad_output",
    "500 error parsing tool call: raw='{' err=unexpected end": "bad_output",
    "500 Failed to parse input at 0": "bad_output",
    "503 error loading model: no such file": "model_unavailable",
}
LOADING = ["Model x is being loaded", "The worker is still initializing", "Loading model", "The model is warming up"]
LOADING += ["Model x is currently loading", "model not ready, try later", "warm-up in progress", "scaled to 0"]
KEYLESS = ["Country, region, or territory not supported", "Key limit exceeded (total limit)", "Quota exceeded"]
KEYLESS += ["<!DOCTYPE html><html><title>Just a moment...</title></html>", "The model is not open in your location"]
REFUSALS |= dict.fromkeys((f"503 {words}" for words in LOADING), "loading")
REFUSALS |= dict.fromkeys((f"403 {words}" for words in KEYLESS), "model_refused")


@pytest.mark.parametrize(("words", "code"), REFUSALS.items())
async def test_what_a_refusal_means(endpoint: Endpoint, model: Model, words: str, code: str) -> None:
    """No window is learned of it, what is not about the key does not say it is, and a model that loads is known."""
    status, words = (int(words[:3]), words[4:]) if words[:3].isdigit() else (400, words)
    endpoint.script(Reply(status=403, body=words) if status == 403 else refusal(words, status=status))
    error, loads = await fail(model), code == "loading"
    assert (error.code, error.loading) == ("model_unavailable" if loads else code, loads)
    assert error.retry or status != 503
    assert (model.learned.window, "OPENAI_API_KEY" in str(error)) == (0, code == "model_auth")


@pytest.mark.parametrize("status", [200, 404])
async def test_a_page_says_what_to_check(endpoint: Endpoint, model: Model, status: int) -> None:
    endpoint.script(Reply(status=status, body="<html><head><title>Sign in &amp; go</title></head></html>"))
    error = str(await fail(model))
    assert ("end with /v1?" in error, "Sign in & go" in error) == (True, True)


SCHEMA = "Invalid schema for function 'f': In context=('properties', 'temperature'), schema must have a 'type' key."
GPT = "Function tools with reasoning_effort are not supported. Use /v1/responses or set reasoning_effort to 'none'."
OPTIONS: list[tuple[Body, str | Body, Body | None]] = [  # settings; what the endpoint says; what is sent then
    ({"temperature": 0.3}, "'temperature' does not support 0.3. Only the default (1) value is supported.", {}),
    ({"temperature": 0.3}, "`temperature` is deprecated for this model.", {}),
    ({"reasoning_effort": "low"}, "The `reasoning_content` in the thinking mode must be passed back", None),
    ({"temperature": 2}, "invalid temperature: only 1 is allowed for this model", {}),
    ({"temperature": 0.3}, SCHEMA, None),
    ({"seed": 3}, {"param": "tools[3].function", "message": "Invalid value: seed is unknown"}, None),
    ({"seed": 3}, "tools[3].function.parameters.seed: Extra inputs are not permitted", None),
    ({"seed": 3}, "Invalid value for tool parameter seed", None),
    ({"seed": 3}, {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, {}),
    ({"seed": 3}, {"detail": [{"loc": ["body", "tools", 3, "seed"], "msg": "Extra inputs are not permitted"}]}, None),
    ({"seed": 3}, "Your message has a seed phrase, which is not allowed by our policy", None),
    ({"top_p": 0.5}, "it has a topP value of 0.5 but the supported range is from 0.9 to 1", {}),
    ({"max_tokens": 99}, "The maximum tokens you requested exceeds the model limit of 64. Try a lower value", {}),
    ({"max_tokens": 99}, "max_tokens: 99 > 64, which is the maximum allowed number of output tokens", {}),
    ({"max_tokens": 99}, "max_tokens (99) exceeds maximum output tokens 64", {}),
    ({"seed": 3}, "the word seed stands in the text of a message", None),
    ({"seed": 3}, "does not support parameters: ['seed'], for model=x. To drop these, set `drop_params=True`", {}),
    ({"seed": 3}, 'Invalid JSON payload received. Unknown name "seed": Cannot find field.', {}),
    ({"seed": 3, "top_p": 1}, {"param": "seed", "message": "Unrecognized request argument supplied"}, {"top_p": 1}),
    ({"max_tokens": 9}, "'max_tokens' is not supported. Use 'max_completion_tokens'.", {"max_completion_tokens": 9}),
    ({"max_tokens": 99}, "max_tokens is too large: 99. This model supports at most 64 completion tokens", {}),
    ({"reasoning_effort": "low"}, '"llama3" does not support thinking', {}),
    ({"reasoning_effort": "low"}, GPT, {"reasoning_effort": "none"}),
    ({}, GPT, {"reasoning_effort": "none"}),
    ({}, "body.stream_options: Extra inputs are not permitted", {"stream_options": None}),
    ({}, "streaming is not supported with tools", {"stream": None, "stream_options": None}),
    ({}, "streaming with tools is not implemented yet", {"stream": None, "stream_options": None}),
    ({}, "Stream options are not supported by this server", {"stream_options": None}),
    ({}, "Additional properties are not allowed ('stream_options' was unexpected)", {"stream_options": None}),
    ({"reasoning_effort": "low"}, "Model grok does not support parameter reasoningEffort.", {}),
    ({"temperature": 2}, "2 is greater than the maximum of 1 - 'temperature'", {}),
]  # fmt: skip
NAMES: Body = {"seed": 1, "temperature": 1, "top_p": 1, "reasoning_effort": "low"}
OPTIONS += [({name: NAMES[name]}, f"Unsupported parameter: '{name}' is not supported.", {}) for name in NAMES]


@pytest.mark.parametrize(("given", "words", "then"), OPTIONS, ids=[str(row[1])[:50] for row in OPTIONS])
async def test_an_option_that_is_refused(endpoint: Endpoint, model: Model, given: Body, words: Any, then: Any) -> None:
    """It is left out, or set as the endpoint says, for the value that was refused, once, also by who was under way."""
    answer = Reply(status=400, body={"error": {"message": words} if isinstance(words, str) else words})
    body = request_of(model.head(given), [USER], SPECS)
    for _ in range(2):
        endpoint.script(answer)
        with pytest.raises(memws.ModelError):
            await anext(model.stream(body))
        assert len(model.learned.options) == (then is not None)
    reply = await ask(model, **given)
    assert [call.name for call in reply.calls] == ["send_message"]
    expected = {"stream": True, "stream_options": {"include_usage": True}, **(given if then is None else then)}
    sent = {name: value for name, value in endpoint.requests[-1].items() if name not in ("model", "messages", "tools")}
    assert sent == {name: value for name, value in expected.items() if value is not None}
    if then in ({}, {"stream_options": None}):
        endpoint.script(answer)
        await fail(model, **given)
        assert len(model.learned.options) == 1, "once only"
    for name, value in given.items():
        await ask(model, **{name: "high" if isinstance(value, str) else 0})
        assert name in endpoint.requests[-1]


FAILED = {"message": "Failed to call a function.", "code": "tool_use_failed"}
GENERATIONS = ['{"name": "send_message", "arguments": {"message": "Hi"}}', [{"name": "send_message", "parameters": {}}]]
GENERATIONS += ['<tool_call>{"name": "send_message", "arguments": {"message": "Hi"}}</tool_call>', "Hi", {"name": "x"}]


async def test_a_generation_that_the_endpoint_could_not_read(endpoint: Endpoint, model: Model) -> None:
    """It is an answer, from an error's body as from inside a stream."""
    for written in GENERATIONS:
        for answer in ({"status": 400, "body": {"error": {**FAILED, "failed_generation": written}}},
                       {"error_in_stream": {**FAILED, "failed_generation": written}}):  # fmt: skip
            endpoint.script(Reply("", **answer))
            assert (await ask(model)).text == (written if isinstance(written, str) else memws.encode_json(written))


ADDRESSES = {  # a base URL, and the path of its requests
    "/v1/": "/v1/chat/completions",
    "/v1/chat/completions": "/v1/chat/completions",
    "/v1/chat/completions/?api-version=1": "/v1/chat/completions?api-version=1",
    "/openai/deployments/x?api-version=2024-10-21": "/openai/deployments/x/chat/completions?api-version=2024-10-21",
    "": "/chat/completions",
    "/a?b=c&d=%2F": "/a/chat/completions?b=c&d=%2F",
}


async def test_addresses(endpoint: Endpoint) -> None:
    """A query stays a query, a whole path is a base URL, too; what is no address is refused, with an example."""
    message = {"content": "Hi", "role": "assistant"}
    for given, path in ADDRESSES.items():
        endpoint.overrides = {path: Reply(body={"choices": [{"message": message, "finish_reason": "stop"}]})}
        url = endpoint.url.removesuffix("/v1") + given
        async with closing(memws.Models("m", url, KEY)) as models:
            for model in (models.get(None)[0], models.get(None, None, "another key")[0]):
                assert (await ask(model)).text == "Hi"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens there
        async with closing(memws.Models("m", f"http://127.0.0.1:{taken.getsockname()[1]}/v1", KEY)) as models:
            error = await fail(models.get(None)[0])
    assert (error.code, error.retry, "--base-url" in str(error)) == ("model_unavailable", True, True)
    for wrong in ("localhost:11434/v1", "example.com", "ftp://localhost/v1", "http:///v1", "/v1", "http://[::1/v1"):
        with pytest.raises(memws.UsageError, match="like http://localhost:11434/v1"):
            memws.Models("m", wrong, KEY)


WAITS = {"7": 7, "1.5": 1.5, "30": 30, "-3": 0, "nan": 0, None: None, "soon": None, "": None, "31": 31, "inf": math.inf}


@pytest.mark.parametrize(("header", "seconds"), WAITS.items())
async def test_retry_after_is_read(endpoint: Endpoint, model: Model, header: str | None, seconds: float | None) -> None:
    """The endpoint's wish to wait is read; one beyond the bound ends the call, and is named."""
    for status in (429, 503):
        endpoint.script(Reply(status=status, headers={} if header is None else {"Retry-After": header}))
        error = await fail(model)
        assert (error.retry, error.retry_after) == ((seconds or 0) <= 30, seconds)
        assert error.retry or "wait" in str(error)


SILENCES: dict[str, tuple[Reply, dict[str, float], str]] = {
    "inside an answer": (Reply(TEXT, stall_after=3), {"idle_timeout": 0.1}, "0.1 s, again"),
    "after its first chunk": (Reply(TEXT, stall_after=1), {"idle_timeout": 0.1}, "0.1 s, again"),
    "before the answer": (Reply(TEXT, hold=True), {"FIRST_TOKEN_TIMEOUT": 0.15}, "0.15 s"),
    "before its first chunk": (Reply(TEXT, stall_after=0), {"FIRST_TOKEN_TIMEOUT": 0.15}, "0.15 s"),
    "after the last word": (Reply(TEXT, stall_after=3, chunk=64, usage=None), {"END_PATIENCE": 0.1}, ""),
    "longer than the idle timeout before the first": (Reply(TEXT, delay=0.2), {"idle_timeout": 0.01}, ""),
}


@pytest.mark.parametrize(("answer", "times", "words"), SILENCES.values(), ids=SILENCES)
async def test_silence(endpoint: Endpoint, monkeypatch: Patch, answer: Reply, times: Body, words: str) -> None:
    """A model that goes silent is model_timeout with its seconds; inside an answer that may be tried again."""
    for name in times.keys() - {"idle_timeout"}:
        monkeypatch.setattr(memws, name, times[name])
    idle_timeout = times.get("idle_timeout", memws.IDLE_TIMEOUT)
    async with closing(memws.Models("test-model", endpoint.url, KEY, idle_timeout=idle_timeout)) as models:
        endpoint.script(answer)
        if not words:
            assert (await ask(models.get(None)[0])).text == TEXT
            return
        error = await fail(models.get(None)[0])
    assert (error.code, error.retry) == ("model_timeout", "again" in words)
    assert words.partition(",")[0] in str(error)


LEAKS = [
    refusal(f"Incorrect API key provided: {KEY}.", "invalid_api_key", 401),
    refusal(f"{KEY} may not do this", status=403), refusal(f"Rate limit for {KEY}", status=429),
    refusal(f"Crash near Authorization: Bearer {KEY}", status=500),
    Reply(status=500, body=f"<html>Bearer {KEY}</html>"),
    refusal("another key: sk-proj-SECRET0123456789 and Bearer SECRETtoken"), refusal(f"unsupported seed\nfor {KEY}"),
    refusal("x" * 70 + KEY + "x" * 900), Reply(status=422, body={"detail": KEY}), in_stream(f"key {KEY} expired", KEY),
    Reply(body=f"<html>{KEY}</html>"), refusal("bad api_key: SECRET9f8e7d6c and token='SECRET.9f8e7d'"),
]  # fmt: skip


async def test_no_key_is_in_any_message(endpoint: Endpoint, monkeypatch: Patch, caplog: Log) -> None:
    """A key that an endpoint repeats, also one of the environment's, is in no error and in no log."""
    caplog.set_level(logging.DEBUG, "memws")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    for options in ((), ("test-model", endpoint.url, KEY)):
        async with closing(memws.Models(*options)) as models:
            assert models.default == "test-model", "the only one that the endpoint serves"
            model = models.get(None)[0]
            assert (await ask(model)).calls
            assert endpoint.headers[-1]["authorization"] == f"Bearer {KEY}"
            for leak in LEAKS:
                endpoint.script(leak)
                error = str(await fail(model, seed=1))
                assert not [secret for secret in (KEY, KEY[:14], "SECRET") if secret in error + caplog.text]
                assert ("\n" in error, len(error) < 1_200) == (False, True)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: Patch) -> None:
    """No key and no endpoint in the environment."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def test_the_default_model(endpoint: Endpoint) -> None:
    """What is named, else DEFAULT_MODEL with a key, an endpoint's only one, or offline, with a warning for others."""
    url = endpoint.url
    chosen: list[tuple[Body, str]] = [({}, "offline"), ({"api_key": KEY}, memws.DEFAULT_MODEL)]
    chosen += [({"base_url": url}, "test-model"), ({"model": "m", "base_url": url, "api_key": KEY}, "m")]
    chosen += [({"model": "offline", "api_key": KEY}, "offline")]
    for options, name in chosen:
        models = memws.Models(**options)
        assert (models.default, models.get(None)[0].name, models.offline) == (name, name, name == "offline")
        assert name in models.described
        assert ("not a language model" in models.described) == models.offline
    model, (warning,) = memws.Models().get("gpt-4o")
    assert (model.name, "'gpt-4o' is kept" in warning, "--base-url" in warning) == (memws.OFFLINE, True, True)
    assert memws.Models("offline", api_key=KEY).get("gpt-4o")[0].name == "gpt-4o"
    assert isinstance(memws.Models(api_key=KEY).get("offline")[0], memws.OfflineModel)
    endpoint.overrides["/v1/models"] = refusal(f"bad key {KEY}", status=401)
    with pytest.raises(memws.UsageError, match="--model") as caught:
        memws.Models(base_url=url, api_key=KEY)
    assert KEY not in str(caught.value)


def test_one_model_object_per_name_and_endpoint() -> None:
    """What is learned is shared by all agents with that model at that endpoint; model families have their window."""
    models = memws.Models("a", "http://127.0.0.1:9/v1", KEY)
    own = {"base_url": "http://127.0.0.1:8/v1", "api_key": "other"}
    assert models.get("a")[0] is models.get(None)[0] is not models.get("b")[0]
    assert models.get("a")[0] is not models.get("a", **own)[0] is models.get("a", **own)[0]
    assert models.get("a", **own)[0].endpoint is models.get("b", **own)[0].endpoint  # type: ignore[attr-defined]
    models = memws.Models(api_key=KEY)
    sizes = [models.get(name)[0].window for name in ("gpt-4o-mini", "gpt-5.4-mini", "offline", "llama3", "x")]
    assert sizes == [128_000, 128_000, 32_768, 8_192, 8_192]
    for text, window in (('{"shape":["x"],"later":1,"window":9}', 9), ("5", 0), ("[", 0), ('{"shape":5}', 0)):
        models = memws.Models("a", "http://127.0.0.1:9/v1", KEY)
        models.recalled = {"learned a at 127.0.0.1:9/v1": text}
        assert models.get("a")[0].learned.window == window, "what another memws noted is read, or learned anew"


MESSAGES = [("", ""), (json.dumps('quotes " and \\ and \\" and / and \t\r\n\b\f')[1:-1], None), ("emoji 👋🏽 🎉", None)]
MESSAGES += [(json.dumps(text)[1:-1], None) for text in ("emoji 👋🏽 and 👩‍👩‍👧 🎉", 'the word "message": "inside" it')]
MESSAGES += [(f"a{half}b", "a\ufffdb") for half in (r"\ud83d", "\ud83d", r"\udc4b", "\udc4b")]
MESSAGES += [(r"a\n\\( \(x^2\) \"b", 'a\n\\( \\(x^2\\) "b')]
"What stands in the JSON, and what is told of it, where that is not what JSON says."


@pytest.mark.parametrize(
    "form", ['{"message":"%s"}', '{"message" : "%s" , "b": 1}', '{"a":"message","message":\n"%s"}']
)
@pytest.mark.parametrize(("written", "told"), MESSAGES, ids=ascii)
def test_the_reply_is_heard_while_it_arrives(written: str, told: str | None, form: str) -> None:
    """What has come is always the reply's beginning, no escape is told in halves, and what is no escape stands."""
    arguments, message = form % written, json.loads(f'"{written}"') if told is None else told
    for size in (1, 2, 7):
        reply, heard = memws.Reply(), ""
        reply.feed(piece(0, "a", "send_message"))
        for start in range(0, len(arguments), size):
            reply.feed(piece(0, None, None, arguments[start : start + size]))
            heard += "".join(text for _, text in reply.news())
            assert message.startswith(heard)
            assert reply.calls[0].spoken == heard, "read at once or bit by bit, it is the same"
        assert heard == message


HELLO = {"message": "Hello!"}
WRITTEN = '{"name": "send_message", "arguments": {"message": "Hello!"}}'
TAGGED = f"<tool_call>\n{WRITTEN}\n</tool_call>"


def reply_of(text: str = "", *calls: str, name: str = "send_message", finish: str = "stop", **more: Any) -> memws.Reply:
    """A reply with a text and a call of a tool for each of the arguments."""
    reply = memws.Reply()
    reply.feed({"choices": [{"delta": {"content": text, **more}, "finish_reason": finish}]})
    for index, each in enumerate(calls):
        reply.feed(piece(index, f"id-{index}", name, each))
    return reply


TOKENS = (
    " Hello! ", "<|im_start|>assistant\nHello!<|im_end|>", "Hello!</s>", "Hello!<|eot_id|>", "Hello!<end_of_turn>\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!", "Hello!<｜end▁of▁sentence｜>", "Hello!</tool_call>",
    "<|channel|>final<|message|>Hello!<|return|>", "<|START_RESPONSE|>Hello!<|END_RESPONSE|>",
    "Hello!<|im_end|>\n<|im_start|>user\nAnd you?",
)  # fmt: skip
THOUGHTS = (
    "<think>Hm.</think>", "Hm.\n</think>\n", "<thinking>Hm.</thinking>", "<thought>Hm.</thought>", "[THINK]Hm.[/THINK]",
    "<|START_THINKING|>Hm.<|END_THINKING|>", "◁think▷Hm.◁/think▷", "<seed:think>Hm.</seed:think>", "Hm.◁/think▷", "",
    "<|channel|>analysis<|message|>Hm.<|end|>", "Hm.[/THINK]", "Hm.</thought>", "<scratch_pad>Hm.</scratch_pad>",
    "<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>", "<longcat_think>Hm.</longcat_think>",
    "<|begin_of_thought|>Hm.<|end_of_thought|>", "<antThinking>Hm.</antThinking>", "Hm.[BEGIN FINAL RESPONSE]",
)  # fmt: skip
FINISHES = {  # what an answer is that ends so
    "": "stop STOP tool_calls function_call end_turn eos_token stop_sequence COMPLETE tool_use normal pause_turn",
    "length": "length max_tokens MAX_TOKENS model_length model_context_window_exceeded TOKEN_LIMIT truncated",
    "filtered": "content_filter SAFETY BLOCKLIST sensitive refusal guardrail_intervened RECITATION jailbreak censored",
    "broken": "error network_error abort cancelled TIMEOUT insufficient_system_resource ERROR_TOXIC OTHER preempted"
    " function_call_filter:_MALFORMED_FUNCTION_CALL TOO_MANY_TOOL_CALLS repetition interrupted LANGUAGE",
}
SENT = "Running send_message({'message': 'Hello!'"


def said(text: str, thoughts: str = "", **different: Any) -> Body:
    """What is read of a reply without calls."""
    monologue = "\n".join(filter(None, (thoughts, text)))
    return {"calls": [], "text": text, "monologue": monologue, "corrections": []} | different


def called(*corrections: str, line: str = SENT) -> Body:
    return {"calls": [line], "text": "", "monologue": "", "corrections": list(corrections)}


READ: dict[str, tuple[memws.Reply, Body]] = {
    "as it should be": (reply_of("", json.dumps(HELLO)), called()),
    "line breaks in a text": (reply_of("", '{"message": "Hello!", "a": "\n\t"}'), called()),
    "a call as text without its end": (reply_of(TAGGED.removesuffix("\n</tool_call>")), called("text_call")),
    "a comma too many": (reply_of("", '{"message": "Hello!",}'), called("arguments")),
    "a comma too many, a quoted brace": (reply_of("", '{"message": "Hello!", "a": "\\" {",}'), called("arguments")),
    "words around it": (reply_of("", 'OK: {"message": "Hello!"} done'), called("arguments")),
    "Python's quotes": (reply_of("", "{'message': 'Hello!', 'request_heartbeat': False}"), called("arguments")),
    "encoded twice": (reply_of("", json.dumps(json.dumps(HELLO))), called("arguments")),
    "another parameter's name": (reply_of("", '{"text": "Hello!"}'), called("arguments")),
    "a name with a prefix": (reply_of("", json.dumps(HELLO), name="functions.send_message"), called("tool_name")),
    "no arguments": (reply_of("<function=look>\n</function>"), called("text_call", line="Running look({})")),
    "no parameters": (reply_of('<invoke name="look"></invoke>'), called("text_call", line="Running look({})")),
    "a name alone": (reply_of("<tool_call>look</tool_call>"), called("text_call", line="Running look({})")),
    "thoughts without an end": (reply_of("<think>Hm. I"), said("", "Hm. I")),
    "a reply before thoughts": (reply_of("Hi.<|open|>think<|sep|>Hm."), said("Hi.", "Hm.")),
    "Functionary's channel": (reply_of(">>>all\nHello!"), said("Hello!")),
    "what no text can hold": (reply_of("a\ud800\x00"), said("a\ufffd\ufffd")),
}  # fmt: skip
for thought, token in itertools.product(THOUGHTS, TOKENS):
    READ[thought + token] = reply_of(thought + token), said("Hello!", "Hm." * bool(thought))
for fault, finishes in FINISHES.items():
    half: Body = {"corrections": [fault] * bool(fault), "fault": fault}
    READ |= {finish: (reply_of("Hel", finish=finish), said("Hel", **half)) for finish in finishes.split()}


@pytest.mark.parametrize(("reply", "expected"), READ.values(), ids=READ)
def test_what_is_read_of_a_reply(reply: memws.Reply, expected: Body) -> None:
    """A call in any form is one; thoughts and special tokens are no reply; half an answer is known as such."""
    memws.read_reply(reply, (*TOOLS, "look"))
    seen = {"calls": [call.line[: len(SENT)] for call in reply.calls], "text": reply.text, "fault": reply.fault}
    seen |= {"monologue": reply.monologue, "corrections": [what for what, _ in reply.corrections]}
    assert seen == {"fault": ""} | expected
    assert ([call.problem for call in reply.calls if call.problem], reply.partial) == ([], "")


ARGUMENTS = '{"message": "Hello!"}'
XML = "<function=send_message>\n<parameter=message>\nHello!\n</parameter>\n<parameter=a>\nb\n</parameter>\n</function>"
DSML = """<｜DSML｜function_calls>
<｜DSML｜invoke name="send_message">
<｜DSML｜parameter name="message" string="true">Hello!</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>"""
K3 = 'call tool="send_message"<|sep|><|open|>argument key="message" type="string"<|sep|>Hello!<|close|>argument<|sep|>'
MARKUP = {
    "Hermes": f"<tool_call>\n{WRITTEN}\n</tool_call><|im_end|>", "Qwen3 Coder": f"<tool_call>\n{XML}\n</tool_call>",
    "Qwen3 Coder, its end": f"{XML}\n</tool_call>", "Seed": f"<seed:tool_call>\n{XML}\n</seed:tool_call>",
    "Llama 3": f"<|python_tag|>{WRITTEN}<|eom_id|>",
    "Llama 3, a function": f"<function=send_message>{ARGUMENTS}</function>",
    "Llama 3, Python": '<|python_tag|>send_message.call(message="Hello!")',
    "Llama 4": "<|python_start|>[send_message(message='Hello!')]<|python_end|>",
    "Qwen3 Coder, no ends": XML.replace("</parameter>\n", ""),
    "DeepSeek 4, no beginning": DSML.partition("\n")[2].replace("｜", "|"),
    "Kimi K3": f"<|open|>tools<|sep|><|open|>{K3}<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>",
    "MiniMax 3": "]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name=\"send_message\">\n]<]minimax[>[<message>Hello!"
    "]<]minimax[>[</message>\n]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>", "LFM 2":
    f"[Calling tool: send_message({ARGUMENTS})]", "a line before it": f"TOOL_CALL: {WRITTEN}", "MiniMax 2, arrows":
    '[TOOL_CALL]\n{tool => "send_message", args => {\n  --message "Hello!"\n}}\n[/TOOL_CALL]', "Solar":
    f"<|tool_calls|><|tool_call:begin|>abc123<|tool_call:name|>send_message<|tool_call:args|>{ARGUMENTS}",
    "parts of a use": f"<tool_use>\n  <name>send_message</name>\n  <arguments>{ARGUMENTS}</arguments>\n</tool_use>",
    "Python": 'send_message(message="Hello!", request_heartbeat=False)', "Python, by place": "[send_message('Hello!')]",
    "Mistral": f"[TOOL_CALLS][{WRITTEN}]</s>", "Mistral 11": f"[TOOL_CALLS]send_message{ARGUMENTS}",
    "Mistral 13": f"[TOOL_CALLS]send_message[CALL_ID]abcdefgh1[ARGS]{ARGUMENTS}",
    "DeepSeek 3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>send_message\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>", "DeepSeek 3.2": DSML,
    "Kimi": "<|tool_calls_section_begin|><|tool_call_begin|>functions.send_message:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
    "GLM": "<tool_call>send_message\n<arg_key>message</arg_key>\n<arg_value>Hello!</arg_value>\n</tool_call>",
    "harmony": f"<|channel|>commentary to=functions.send_message <|constrain|>json<|message|>{ARGUMENTS}<|call|>",
    "harmony, after thoughts": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.send_message"
    f"<|channel|>commentary json<|message|>{ARGUMENTS}",
    "harmony, its tokens lost": f"assistantcommentary to=functions.send_message json{ARGUMENTS}",
    "Gemma 3": '```tool_code\nprint(default_api.send_message(message="Hello!"))\n```',
    "Gemma 4": '<|tool_call>call:send_message{message:<|"|>Hello!<|"|>}<tool_call|>',
    "Granite": f"<|tool_call|>[{WRITTEN}]", "Phi 4": f"functools[{WRITTEN}]",
    "MiniMax": f"<tool_calls>\n{WRITTEN}\n</tool_calls>",
    "MiniMax 2": '<minimax:tool_call>\n<invoke name="send_message">\n<parameter name="message">Hello!</parameter>'
    "\n</invoke>\n</minimax:tool_call>",
    "Command R": f"Action: ```json\n[{WRITTEN}]\n```", "Command R7B": f"<|START_ACTION|>[{WRITTEN}]<|END_ACTION|>",
    "Nemotron": f"<TOOLCALL>[{WRITTEN}]</TOOLCALL>", "Functionary": f">>>send_message\n{ARGUMENTS}",
    "Apertus": '<|tools_prefix|>[{"send_message": {"message": "Hello!"}}]<|tools_suffix|>',
    "Qwen Agent": f"✿FUNCTION✿: send_message\n✿ARGS✿: {ARGUMENTS}\n✿RETURN✿",
    "Mistral 11, its token lost": f"send_message{ARGUMENTS}", "Qwen2.5, its tools": f"<tools>\n{WRITTEN}\n</tools>",
    "a name as attribute": f'<tool_call name="send_message">{ARGUMENTS}</tool_call>',
    "ReAct": f"Action: send_message\nAction Input: {ARGUMENTS}",
    "bare JSON": WRITTEN, "a code block": f"```json\n{WRITTEN}\n```", "a list": f"[{WRITTEN}]",
    "MemGPT": '{"function": "send_message", "params": {"message": "Hello!", "inner_thoughts": "I greet."}}',
    "OpenAI": json.dumps({"tool_calls": [{"function": {"name": "send_message", "arguments": ARGUMENTS}}]}),
    "LangChain": '{"action": "send_message", "action_input": {"message": "Hello!"}}',
    "a turn that is made up": f"{TAGGED}<|im_end|>\n<|im_start|>user\n{TAGGED}",
    "LM Studio": f"[TOOL_REQUEST]{WRITTEN}[END_TOOL_REQUEST]", "a tag": f"<function>{WRITTEN}</function>",
    "Gemini": '<tool_code>\nprint(default_api.send_message(message="Hello!"))\n</tool_code>',
    "parts as tags": f"<tool_call><name>send_message</name><arguments>{ARGUMENTS}</arguments></tool_call>",
    "OpenAI, before there were tools": f'{{"function_call": {WRITTEN}}}', "gpt-oss, one token lost":
    f"to=functions.send_message <|constrain|>json<|message|>{ARGUMENTS}", "a name": f"send_message\n{ARGUMENTS}",
    "Groq": f"<function=send_message{ARGUMENTS}></function>", "Groq, with brackets":
    f"<function(send_message){ARGUMENTS}></function>", "Groq, Python":
    '<function=send_message(message="Hello!")></function>', "Gorilla": f"<<function>>send_message({ARGUMENTS})",
    "Mistral, tokens lost": f"send_message[ARGS]{ARGUMENTS}", "flat": '{"name": "send_message", "message": "Hello!"}',
    "in parallel": f'{{"tool_uses": [{{"recipient_name": "functions.send_message", "parameters": {ARGUMENTS}}}]}}',
    "tags cut short": '<tool_call name="send_message"><param name="message">Hello!</param></tool_call>',
}  # fmt: skip


def heard(text: str, size: int) -> str:
    """What is told of a text that arrives in pieces."""
    reply, told = memws.Reply(), ""
    for start in range(0, len(text), size):
        reply.feed(delta(content=text[start : start + size]))
        told += "".join(news for _, news in reply.news())
    return told


@pytest.mark.parametrize("markup", MARKUP.values(), ids=MARKUP)
def test_the_markup_of_any_model_is_a_call(markup: str) -> None:
    """It is a call, after words only where the tool is no user's; cut anywhere it is never run, shown or told."""
    for before in ("", "<think>Hm.</think>\n", "I greet.\n"):
        reply = reply_of(before + markup)
        memws.read_reply(reply, TOOLS)
        assert ([call.name for call in reply.calls], reply.text) == (["send_message"], before[:8] * ("I" in before))
        assert reply.calls[0].line.startswith("Running send_message({'message': 'Hello!'")
        assert (reply.corrections[0][0], reply.partial) == ("text_call", "")
        assert not re.search("Hello!|<|```", reply.text + reply.monologue)
        assert heard(before + markup, 3).replace("Hm.", "").strip() in ("", "I greet.")
        theirs = reply_of(before + markup)
        with pytest.raises(memws.ModelError, match="among") if "I" in before else contextlib.nullcontext():
            memws.read_reply(theirs, TOOLS, ["send_message"])
            assert len(theirs.calls) == 1
    for end in range(len(markup) // 2, len(markup)):
        reply = reply_of(markup[:end])
        with contextlib.suppress(memws.ModelError):
            memws.read_reply(reply, TOOLS)
            assert "Hello" not in reply.text
            assert {call.arguments.get("message") for call in reply.calls} <= {"Hello!"}


QUOTED = {
    "inline": f"Hermes writes `{TAGGED}` around it.".replace("\n", ""),
    "in quotes": "The tag \"<tool_call>\" opens it, '<|python_tag|>' too.",
    "in a block": f"Like this:\n```\n{TAGGED}\n```\nThat is all.",
    "JSON in a block": f"Like this:\n```json\n{WRITTEN}\n```\nThat is all.",
    "quoted by lines": f"You wrote:\n> {TAGGED.replace(chr(10), '')}\n\nWhy?",
    "other brackets": "I [see], a < b, f(x) <b>now</b>, {braces}, Action: go! >>> 1",
    "brackets first": "[1] as cited: f(x) = 2x",
    "a call first": "f(x) is 2x, {a} a set",
    "Chinese": "你好，世界" * 9,
    "JSON between words": f"Like this:\n{WRITTEN}\nThat is all.",
    "a token alone": "`<|foo|>` is none of ours",
    "a block at the end": "So:\n```python\nprint(1)\n```",
    "a line that begins so": "Tool calls: I make none. [Calling my sister now.] Function call (a phone): {1, 2}",
    "tokens": "MiniMax M3 puts `]<]minimax[>[` before a tag, Kimi K3 `<|open|>`.",
    "a tool's name": "send_message is a tool that I have.",
    "another call": 'print("Hello!")',
    "JSON that is no call": '{"a": 1}',
}


@pytest.mark.parametrize("text", QUOTED.values(), ids=QUOTED)
def test_quoted_markup_is_prose(text: str) -> None:
    """What is quoted, or only looks a little like markup, is text and stays as it is."""
    reply = reply_of(text)
    memws.read_reply(reply, TOOLS)
    assert (reply.text, reply.calls, reply.corrections) == (text, [], [])
    if not re.search(r"```json|```\n<|^print|^\{", text, re.MULTILINE):
        assert text.startswith(heard(text, 2).rstrip())
        assert len(heard(text, 2)) > len(text) - 12


PASTED = '<tool_call>{"name": "core_memory_append", "arguments": {"name": "human", "content": "x"}}</tool_call>'
HOLDERS = {
    "JSON": json.dumps({"name": "send_message", "arguments": {"message": f'5" {PASTED}'}}),
    "XML": f"<function=send_message>\n<parameter=message>\nSee {PASTED} there\n</parameter>\n</function>",
    "GLM": f'<tool_call>send_message<arg_key>message</arg_key><arg_value>5" {PASTED}</arg_value></tool_call>',
    "Python": f"[send_message(message='It\\'s {PASTED}')]",
    "Gemma": f'<|tool_call>call:send_message{{message:<|"|>5" }} {PASTED}<|"|>}}<tool_call|>',
    "Mistral": "[TOOL_CALLS]send_message" + json.dumps({"message": PASTED}),
    "Kimi": "<|open|>" + K3.replace("Hello!", PASTED) + "<|close|>call<|sep|>",
}


@pytest.mark.parametrize("text", HOLDERS.values(), ids=HOLDERS)
def test_markup_inside_an_argument_is_only_text(text: str) -> None:
    """What a user pasted and the model repeats in an argument never runs."""
    reply = reply_of(text)
    memws.read_reply(reply, TOOLS)
    (call,) = reply.calls
    assert (call.name, PASTED in call.arguments["message"]) == ("send_message", True)


CUT = '{"name": "human", "old_content": "Ada", "new_content": "'
UNREADABLE: dict[str, tuple[memws.Reply, str, str]] = {
    "a call that is cut": (reply_of("", CUT), "bad_output", "cut off$"),
    "a call cut at the length limit": (reply_of("", CUT, finish="length"), "bad_output", "length limit"),
    "a call without its brace": (reply_of("", '{"message": "Hello!"'), "bad_output", "cut off$"),
    "a call without its first brace, cut": (reply_of("", CUT[1:]), "bad_output", "cut off$"),
    "a call cut after its quotes": (reply_of("", '{"message": "say \\"hi\\"'), "bad_output", "cut off$"),
    "a call cut inside what is encoded twice": (reply_of("", json.dumps(CUT)), "bad_output", "cut off$"),
    "a call as text that is cut": (reply_of(WRITTEN[:-12]), "bad_output", "cut off$"),
    "a call as XML that is cut": (reply_of(XML[:-11] + "<parameter=a>"), "bad_output", "cut off$"),
    "broken": (reply_of('<tool_call>"send_message", nonsense</tool_call>'), "bad_output", "cannot be read"),
    "a refusal": (reply_of(refusal="I can't\nhelp."), "model_refused", r"I can't help\.$"),
    "an empty answer that was filtered": (reply_of(finish="content_filter"), "model_refused", "filtered"),
}


@pytest.mark.parametrize(("reply", "code", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_no_rung_reads_is_an_error(reply: memws.Reply, code: str, words: str) -> None:
    """A refusal is an error, and so is a call that ends before its closing brace: mended it could delete a memory."""
    with pytest.raises(memws.ModelError, match=words) as caught:
        memws.read_reply(reply, TOOLS)
    assert caught.value.code == code


def test_names_and_ids_that_no_api_takes_are_changed() -> None:
    """Tool names become such as endpoints take; an id that came before becomes nine letters, any other stays."""
    reply = memws.Reply()
    names, ids = ("send a message!", "x" * 300, "", "send_message"), ("a", "a", "x" * 2_000, "b")
    for index, (name, call_id) in enumerate(zip(names, ids, strict=True)):
        reply.feed(piece(index, call_id, name, "{}"))
    memws.read_reply(reply, TOOLS)
    assert [call.name for call in reply.calls] == ["send_a_message_", "x" * 64, "unknown", "send_message"]
    assert [reply.calls[place].id for place in (0, 2, 3)] == ["a", "x" * 2_000, "b"]
    assert len(reply.calls[1].id) == 9
    assert reply.calls[1].id.isalnum()
    assert [what for what, _ in reply.corrections].count("tool_call_id") == 1
