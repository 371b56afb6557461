"""Whatever way an endpoint answers or fails, its reply is read whole, or its failure has a code and a sentence."""

import asyncio
import collections
import contextlib
import datetime
import email.utils
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from endpoint import Body, Endpoint, Reply

import memws

KEY = "canary-0123456789abcdef"
TEXT = 'Grüße, 世界 👋! It is "1,5 °C"\nin Oslo \\ today.'
CALLS = [("send_message", {"message": TEXT}), ("core_memory_append", {"name": "human", "content": "Name: Zoë"})]
USER = '{"role":"user","content":"Hi"}'


@pytest.fixture
async def models(endpoint: Endpoint) -> AsyncIterator[memws.Models]:
    """The models behind the endpoint."""
    models = memws.Models("test-model", endpoint.url, KEY)
    yield models
    await models.close()


@pytest.fixture
def model(models: memws.Models) -> memws.Model:
    """The model behind the endpoint."""
    return models.get(None)[0]


async def ask(model: memws.Model, **settings: Any) -> memws.ModelReply:
    """Send one request with all memory tools and read its whole answer."""
    reply = memws.ModelReply()
    tools = ",".join(tool.spec for tool in memws.MEMORY_TOOLS.values())
    async for _ in model.stream(memws.request_body(model.head(settings), [USER], f"[{tools}]"), reply):
        pass
    return reply


async def fail(model: memws.Model, **settings: Any) -> memws.ModelError:
    """The error that a request ends in."""
    with pytest.raises(memws.ModelError) as caught:
        await ask(model, **settings)
    return caught.value


def calls_of(reply: memws.ModelReply) -> list[tuple[str, Body]]:
    """The calls of a reply as a script has them."""
    return [(call.name, json.loads(call.arguments)) for call in reply.calls]


def told(message: str, code: str | int | None = None) -> Body:
    """OpenAI's error JSON."""
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


# ---- server-sent events ----------------------------------------------------------------------------------------------

STREAMS = {
    "plain": (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    "CR LF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    "comments": (b": ping\n\ndata: a\n: in between\n\n:\n\ndata: b\n\n", [b"a", b"b"]),
    "several data lines": (b"data: {\ndata:  1\ndata: }\n\n", [b"{\n 1\n}"]),
    "no space after the colon": (b"data:a\n\ndata:  b\n\n", [b"a", b" b"]),
    "other fields": (b"event: x\nid: 1\ndata: a\nretry: 5\n\nevent: y\n\n", [b"a"]),
    "an end without an empty line": (b"data: a\n\ndata: b", [b"a", b"b"]),
    "an end with half an empty line": (b"data: a\n\ndata: b\r\n", [b"a", b"b"]),
    "many empty lines": (b"\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [b"a", b"b"]),
    "characters of several bytes": ("data: ü世👋\n\n".encode(), ["ü世👋".encode()]),
    "nothing": (b"", []),
}


@pytest.mark.anyio
@pytest.mark.parametrize(("stream", "expected"), STREAMS.values(), ids=STREAMS.keys())
async def test_events_are_read_wherever_the_stream_is_cut(stream: bytes, expected: list[bytes]) -> None:
    """The data of server-sent events is the same for every cut of the bytes in two, and byte by byte."""

    async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece

    for cut in range(len(stream) + 1):
        assert [data async for data in memws.read_events(chunks(stream[:cut], stream[cut:]))] == expected
    bytewise = chunks(*(bytes([byte]) for byte in stream))
    assert [data async for data in memws.read_events(bytewise)] == expected


# ---- every manner of answering ---------------------------------------------------------------------------------------

MANNERS: dict[str, Body] = {
    "as OpenAI does": {},
    "comments": {"comments": True},
    "CR LF": {"crlf": True},
    "several data lines": {"multiline": True},
    "several data lines, CR LF and comments": {"multiline": True, "crlf": True, "comments": True},
    "one byte at a time": {"split": 1},
    "three bytes at a time": {"split": 3},
    "seven bytes at a time with CR LF": {"split": 7, "crlf": True},
    "one character in a delta": {"chunk": 1},
    "no [DONE]": {"done": False},
    "one whole JSON answer": {"whole": True},
    "a first chunk with empty choices": {"empty_choices": "first"},
    "a first choice without a delta": {"first_without_delta": True},
    "usage in the last chunk": {"usage_style": "last"},
    "no usage": {"usage": None},
    "another finish reason": {"finish": "eos_token"},
    "reasoning_content": {"reasoning": "Hm. Let me think."},
    "reasoning": {"reasoning": "Hm. Let me think.", "reasoning_field": "reasoning"},
}
CALL_MANNERS: dict[str, Body] = {
    **MANNERS,
    "whole arguments": {"whole_arguments": True},
    "arguments as an object": {"arguments_as_object": True},
    "no index": {"call_index": False},
    "no index, whole arguments": {"call_index": False, "whole_arguments": True},
    "no index, arguments as an object": {"call_index": False, "arguments_as_object": True},
    "no ids": {"call_ids": [None, None]},
    "no ids, no index": {"call_ids": [None, None], "call_index": False},
    "no ids, no index, whole arguments": {"call_ids": [None, None], "call_index": False, "whole_arguments": True},
    "the same id twice": {"call_ids": ["a", "a"]},
    "the same id twice, whole arguments": {"call_ids": ["a", "a"], "whole_arguments": True},
    "the same id twice in one whole JSON answer": {"call_ids": ["a", "a"], "whole": True},
    "no ids in one whole JSON answer": {"call_ids": [None, None], "whole": True},
    "text beside the calls": {"text": TEXT},
    "finish stop in spite of calls": {"finish": "stop"},
}


@pytest.mark.anyio
@pytest.mark.parametrize("manner", MANNERS.values(), ids=MANNERS.keys())
async def test_text_is_read_whole(endpoint: Endpoint, model: memws.Model, manner: Body) -> None:
    """The text of an answer arrives to the letter, and the reasoning is kept apart from it."""
    endpoint.script(Reply(TEXT, **manner))
    reply = await ask(model)
    assert (reply.text, reply.calls) == (TEXT, [])
    assert reply.monologue == "\n".join(filter(None, (manner.get("reasoning"), TEXT)))
    assert reply.finish == manner.get("finish", "stop")


@pytest.mark.anyio
@pytest.mark.parametrize("manner", CALL_MANNERS.values(), ids=CALL_MANNERS.keys())
async def test_calls_are_read_whole(endpoint: Endpoint, model: memws.Model, manner: Body) -> None:
    """Two tool calls arrive in order with their names and arguments."""
    endpoint.script(Reply(calls=CALLS, **manner))
    reply = await ask(model)
    assert calls_of(reply) == CALLS
    assert reply.text == manner.get("text", "")


@pytest.mark.anyio
@pytest.mark.parametrize("manner", CALL_MANNERS.values(), ids=CALL_MANNERS.keys())
async def test_stored_calls_have_ids_of_their_own(endpoint: Endpoint, model: memws.Model, manner: Body) -> None:
    """Every call that will be stored has an id of its own, whatever ids came."""
    endpoint.script(Reply(calls=CALLS, **manner))
    answer = memws.read_answer(await ask(model), memws.MEMORY_TOOLS)
    assert [(call.name, call.arguments) for call in answer.calls] == CALLS
    assert len({call.id for call in answer.calls} - {""}) == 2


@pytest.mark.anyio
async def test_calls_that_all_have_index_0_are_told_apart_by_their_ids() -> None:
    """Two calls with the same index and different ids are two calls."""
    reply = memws.ModelReply()
    for call_id, (name, arguments) in zip("ab", CALLS, strict=True):
        call = {"index": 0, "id": call_id, "function": {"name": name, "arguments": json.dumps(arguments)}}
        reply.feed({"choices": [{"delta": {"tool_calls": [call]}}]})
    assert calls_of(reply) == CALLS


def test_calls_whose_deltas_repeat_id_and_name_are_one_call() -> None:
    """Deltas that repeat the call's id and name go on with its arguments."""
    for place in ({"index": 0}, {}):
        reply = memws.ModelReply()
        for piece in ('{"message":', ' "Hi"}'):
            call = {**place, "id": "a", "function": {"name": "send_message", "arguments": piece}}
            reply.feed({"choices": [{"delta": {"tool_calls": [call]}}]})
        assert calls_of(reply) == [("send_message", {"message": "Hi"})]


def test_the_first_form_of_tools_is_read() -> None:
    """A function_call, as the API had it before tools, is a tool call."""
    reply = memws.ModelReply()
    for function in ({"name": "send_message", "arguments": ""}, {"arguments": '{"message":'}, {"arguments": '"Hi"}'}):
        reply.feed({"choices": [{"delta": {"function_call": function}}]})
    assert calls_of(reply) == [("send_message", {"message": "Hi"})]


def test_content_in_parts_is_text() -> None:
    """Content that comes as a list of parts is their text."""
    reply = memws.ModelReply()
    reply.feed({"choices": [{"delta": {"content": [{"type": "text", "text": "Hel"}, {"type": "image"}]}}]})
    reply.feed({"choices": [{"delta": {"content": [{"type": "text", "text": "lo"}]}}]})
    assert reply.text == "Hello"


# ---- usage and settings ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("style", ["own", "last"])
async def test_usage_is_read(endpoint: Endpoint, model: memws.Model, style: Any) -> None:
    """Token counts are read from a chunk of their own and from the last chunk."""
    usage = {"prompt_tokens": 123, "completion_tokens": 45, "total_tokens": 168, "prompt_tokens_details": {"x": 1}}
    endpoint.script(Reply("Hi", usage=usage, usage_style=style))
    assert (await ask(model)).usage == {"input_tokens": 123, "output_tokens": 45}


@pytest.mark.anyio
async def test_absent_usage_is_none(endpoint: Endpoint, model: memws.Model) -> None:
    """Without token counts the reply has none, and nothing is made up."""
    endpoint.script(Reply("Hi", usage=None))
    assert (await ask(model)).usage is None


@pytest.mark.anyio
async def test_settings_are_sent(endpoint: Endpoint, model: memws.Model) -> None:
    """An agent's settings stand in the request beside model, messages, tools and streaming."""
    given_settings = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 99, "seed": 7, "reasoning_effort": "low"}
    await ask(model, **given_settings)
    (request,) = endpoint.requests
    assert {key: request[key] for key in given_settings} == given_settings
    assert request["stream"] is True
    assert request["model"] == "test-model"
    assert [tool["function"]["name"] for tool in request["tools"]] == list(memws.MEMORY_TOOLS)
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
    assert endpoint.headers[0]["content-type"] == "application/json"


# ---- failures told by status -----------------------------------------------------------------------------------------

STATUSES: dict[str, tuple[Reply, str, bool]] = {
    "401": (Reply(status=401), "model_auth", False),
    "403": (Reply(status=403), "model_auth", False),
    "429": (Reply(status=429), "model_rate_limit", True),
    "429 for want of money": (
        Reply(status=429, body=told("You exceeded your current quota", "insufficient_quota")),
        "model_rate_limit",
        False,
    ),
    "408": (Reply(status=408), "model_unavailable", True),
    "409": (Reply(status=409), "model_unavailable", True),
    "500": (Reply(status=500), "model_unavailable", True),
    "502 with a page": (Reply(status=502, body="<html>Bad gateway</html>"), "model_unavailable", True),
    "503": (Reply(status=503), "model_unavailable", True),
    "529": (Reply(status=529), "model_unavailable", True),
    "400": (Reply(status=400, body=told("Invalid value")), "model_refused", False),
    "404": (Reply(status=404, body=told("The model does not exist", "model_not_found")), "model_unavailable", False),
    "400 with the error as a text": (Reply(status=400, body={"error": "bad"}), "model_refused", False),
    "422 with a detail": (Reply(status=422, body={"detail": "bad"}), "model_refused", False),
    "400 for length, by its code": (
        Reply(status=400, body=told("Too much", "context_length_exceeded")),
        "context_overflow",
        False,
    ),
    "400 for length, vLLM": (
        Reply(status=400, body=told("This model's maximum context length is 4096 tokens. However, you requested")),
        "context_overflow",
        False,
    ),
    "400 for length, llama.cpp": (
        Reply(status=400, body=told("the request exceeds the available context size. try increasing n_ctx", 400)),
        "context_overflow",
        False,
    ),
    "400 for length, Anthropic": (
        Reply(status=400, body=told("prompt is too long: 214315 tokens > 200000 maximum")),
        "context_overflow",
        False,
    ),
    "413 for length": (
        Reply(status=413, body=told("input exceeds the context window of this model")),
        "context_overflow",
        False,
    ),
}


@pytest.mark.anyio
@pytest.mark.parametrize(("answer", "code", "retry"), STATUSES.values(), ids=STATUSES.keys())
async def test_a_status_has_its_code(
    endpoint: Endpoint, model: memws.Model, answer: Reply, code: str, retry: bool
) -> None:
    """Each HTTP failure has a code, says whether trying again may help, and costs one request."""
    endpoint.script(answer)
    error = await fail(model)
    assert (error.code, error.retry) == (code, retry)
    assert len(endpoint.requests) == 1, "the openai client's own retries are off"
    assert (await ask(model)).calls, "the next request is none the worse"


def http_date(seconds: float) -> str:
    """The date so many seconds from now, as HTTP writes it."""
    return email.utils.format_datetime(
        datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds), usegmt=True
    )


@pytest.mark.anyio
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "0"}, 0, 0),
        ({"Retry-After": "1.5"}, 1.5, 1.5),
        ({"Retry-After": "-3"}, 0, 0),
        ({"Retry-After": "nan"}, 0, 0),
        ({"Retry-After-Ms": "250"}, 0.25, 0.25),
        ({"Retry-After-Ms": "250", "Retry-After": "9"}, 0.25, 0.25),
        ({"Retry-After": 20}, 1, 20),
        ({"Retry-After": -20}, 0, 0),
    ],
)
async def test_retry_after_is_read(
    endpoint: Endpoint, model: memws.Model, status: int, headers: dict[str, str | int], least: float, most: float
) -> None:
    """The endpoint's wish to wait is read from seconds, from milliseconds and from a date (here: an int from now)."""
    texts = {name: http_date(value) if isinstance(value, int) else value for name, value in headers.items()}
    endpoint.script(Reply(status=status, headers=texts))
    error = await fail(model)
    assert error.retry
    assert error.retry_after is not None
    assert least <= error.retry_after <= most


@pytest.mark.anyio
@pytest.mark.parametrize("headers", [{}, {"Retry-After": "soon"}, {"Retry-After": ""}, {"Retry-After-Ms": "x"}])
async def test_an_unreadable_retry_after_is_absent(
    endpoint: Endpoint, model: memws.Model, headers: dict[str, str]
) -> None:
    """Without a readable wish to wait the pause is ours to choose."""
    endpoint.script(Reply(status=429, headers=headers))
    error = await fail(model)
    assert error.retry
    assert error.retry_after is None


@pytest.mark.anyio
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("wish", ["31", "3600", "1e9", "inf", "a date"])
async def test_a_long_retry_after_is_not_waited_for(
    endpoint: Endpoint, model: memws.Model, status: int, wish: str
) -> None:
    """A wish to wait beyond the bound ends the call for good, and the sentence names the wait."""
    endpoint.script(Reply(status=status, headers={"Retry-After": http_date(3600) if wish == "a date" else wish}))
    error = await fail(model)
    assert not error.retry
    assert "wait" in str(error)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("option", "given_settings"),
    [
        ("stream_options", {}),
        ("seed", {"seed": 1}),
        ("temperature", {"temperature": 0.5}),
        ("top_p", {"top_p": 0.5}),
        ("reasoning_effort", {"reasoning_effort": "low"}),
    ],
)
async def test_an_unknown_option_is_learned_once(
    endpoint: Endpoint, model: memws.Model, option: str, given_settings: Body
) -> None:
    """An option that the endpoint refuses is left out from then on; the others stay."""
    endpoint.refuse = {option}
    error = await fail(model, **given_settings)
    assert (error.code, error.learned) == ("model_refused", True)
    for _ in range(2):
        assert (await ask(model, **given_settings)).calls
    assert [option in request for request in endpoint.requests] == [True, False, False]


@pytest.mark.anyio
async def test_max_tokens_goes_by_its_other_name(endpoint: Endpoint, model: memws.Model) -> None:
    """Where max_tokens is refused for max_completion_tokens, that name is used from then on."""
    endpoint.refuse = {"max_tokens"}
    assert (await fail(model, max_tokens=50)).learned
    for _ in range(2):
        assert (await ask(model, max_tokens=50)).calls
    assert [request.get("max_completion_tokens") for request in endpoint.requests] == [None, 50, 50]


@pytest.mark.anyio
async def test_an_option_is_not_learned_twice(endpoint: Endpoint, model: memws.Model) -> None:
    """A refusal that goes on naming an option that is left out already is final."""
    complaint = Reply(status=400, body=told("Unsupported parameter: 'seed'"))
    endpoint.script(complaint, complaint)
    assert [(await fail(model, seed=1)).learned for _ in range(2)] == [True, False]


# ---- failures inside an answer ---------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Reply, str, bool]] = {
    "an error in the stream": (
        Reply(TEXT, error_in_stream={"message": "The server had an error", "code": None}),
        "model_unavailable",
        True,
    ),
    "an error that is a text": (Reply(TEXT, body={"error": "CUDA out of memory"}), "model_unavailable", True),
    "a rate limit in the stream": (
        Reply(TEXT, error_in_stream={"message": "Slow down", "code": "rate_limit_exceeded"}),
        "model_rate_limit",
        True,
    ),
    "a 429 in the stream": (
        Reply(TEXT, error_in_stream={"message": "Slow down", "code": 429}),
        "model_rate_limit",
        True,
    ),
    "an overflow in the stream": (
        Reply(TEXT, error_in_stream={"message": "Too long", "code": "context_length_exceeded"}),
        "context_overflow",
        False,
    ),
    "a bad key in the stream": (
        Reply(TEXT, error_in_stream={"message": "Bad key", "code": "invalid_api_key"}),
        "model_auth",
        False,
    ),
    "HTML with 200": (Reply(body="<!doctype html><title>Proxy</title>"), "model_unavailable", True),
    "an empty HTML page with 200": (Reply(body=""), "model_unavailable", True),
    "no end and no [DONE]": (Reply(TEXT, empty_choices="all", done=False), "model_unavailable", True),
}


@pytest.mark.anyio
@pytest.mark.parametrize(("answer", "code", "retry"), BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_answer_has_its_code(
    endpoint: Endpoint, model: memws.Model, answer: Reply, code: str, retry: bool
) -> None:
    """Errors told inside an answer with status 200, and answers that are none, have a code."""
    endpoint.script(answer)
    error = await fail(model)
    assert (error.code, error.retry) == (code, retry)


def test_an_event_that_is_no_json_object_is_an_error() -> None:
    """Data that is no JSON object, or JSON that only Python reads, is a failed call, not a crash."""
    model = memws.OpenAIModel("m", memws.Endpoint("http://127.0.0.1:9/v1", KEY))
    for data in (b"", b"[1]", b"null", b'{"a": NaN}', b'{"a":', b"\xff\xfe", b"[" * 100_000, b"9" * 5_000):
        with pytest.raises(memws.ModelError, match="is not JSON"):
            model._chunk(data)


@pytest.mark.anyio
async def test_an_answer_with_empty_choices_holds_nothing(endpoint: Endpoint, model: memws.Model) -> None:
    """A stream whose choices are all empty is an answer without text and calls."""
    endpoint.script(Reply(TEXT, empty_choices="all"), Reply(TEXT, empty_choices="all", whole=True))
    for _ in range(2):
        reply = await ask(model)
        assert (reply.text, reply.calls, reply.whole) == ("", [], True)


@pytest.mark.anyio
async def test_a_reset_anywhere_is_a_failure_or_a_whole_answer(endpoint: Endpoint, model: memws.Model) -> None:
    """A connection that is reset after any number of chunks never leaves a part that passes for the whole."""
    whole = 4 + len(TEXT) // 16  # at least so many chunks
    outcomes = []
    for chunks in range(whole):
        endpoint.script(Reply(TEXT, chunk=16, cut_after=chunks))
        try:
            text = (await ask(model)).text
        except memws.ModelError as error:
            outcomes.append((error.code, error.retry))
        else:
            assert text == TEXT
            outcomes.append(("whole", False))
    assert set(outcomes[:-2]) == {("model_unavailable", True)}
    assert set(outcomes[-2:]) <= {("model_unavailable", True), ("whole", False)}


@pytest.mark.anyio
async def test_a_refusal_is_a_typed_error(endpoint: Endpoint, model: memws.Model) -> None:
    """A refusal in its own field is model_refused and quotes what the model says."""
    endpoint.script(Reply(refusal="I can't help with that.", finish="stop"))
    with pytest.raises(memws.ModelError, match=r"I can't help with that\.") as caught:
        memws.read_answer(await ask(model), memws.MEMORY_TOOLS)
    assert caught.value.code == "model_refused"


@pytest.mark.anyio
async def test_a_filtered_answer_is_a_typed_error(endpoint: Endpoint, model: memws.Model) -> None:
    """An answer that the endpoint's filter left empty is model_refused; what is left of one is kept."""
    endpoint.script(Reply(finish="content_filter"), Reply("As far as", finish="content_filter"))
    with pytest.raises(memws.ModelError, match="filtered") as caught:
        memws.read_answer(await ask(model), memws.MEMORY_TOOLS)
    assert caught.value.code == "model_refused"
    assert memws.read_answer(await ask(model), memws.MEMORY_TOOLS).content == "As far as"


@pytest.mark.anyio
async def test_an_answer_cut_at_the_length_limit(endpoint: Endpoint, model: memws.Model) -> None:
    """A text that was cut is kept and told; a call that was cut is bad_output, for half of it must not run."""
    endpoint.script(Reply("Half of", finish="length"))
    answer = memws.read_answer(await ask(model), memws.MEMORY_TOOLS)
    assert (answer.content, [what for what, _ in answer.corrections]) == ("Half of", ["length"])
    endpoint.script(Reply(calls=[("send_message", '{"message": "Half o')], finish="length"))
    with pytest.raises(memws.ModelError, match="length limit") as caught:
        memws.read_answer(await ask(model), memws.MEMORY_TOOLS)
    assert caught.value.code == "bad_output"


# ---- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize("chunks", [1, 3])
async def test_silence_inside_an_answer_ends_it(endpoint: Endpoint, chunks: int) -> None:
    """A stream that stalls longer than the idle timeout is model_timeout, which may be tried again."""
    models = memws.Models("test-model", endpoint.url, KEY, idle_timeout=0.1)
    endpoint.script(Reply(TEXT, stall_after=chunks))
    error = await fail(models.get(None)[0])
    await models.close()
    assert (error.code, error.retry) == ("model_timeout", True)
    assert "0.1 s" in str(error)


@pytest.mark.anyio
async def test_silence_after_the_last_word_loses_nothing(endpoint: Endpoint) -> None:
    """A stream that stalls once the model has finished is a whole answer."""
    models = memws.Models("test-model", endpoint.url, KEY, idle_timeout=0.1)
    endpoint.script(Reply("Hi", stall_after=3, usage=None))
    assert (await ask(models.get(None)[0])).text == "Hi"
    await models.close()


@pytest.mark.anyio
@pytest.mark.parametrize("silence", [{"hold": True}, {"stall_after": 0}])
async def test_silence_from_the_start_ends_the_call(
    endpoint: Endpoint, model: memws.Model, monkeypatch: pytest.MonkeyPatch, silence: Body
) -> None:
    """A model that says nothing at all within the first timeout is model_timeout, and the sentence names that time."""
    monkeypatch.setattr(memws, "FIRST_TOKEN_TIMEOUT", 0.15)
    endpoint.script(Reply(TEXT, **silence))
    error = await fail(model)
    assert error.code == "model_timeout"
    assert "0.15 s" in str(error)


@pytest.mark.anyio
async def test_comments_do_not_count_as_words(endpoint: Endpoint) -> None:
    """An endpoint that is slow to begin may take longer than the idle timeout for its first word."""
    models = memws.Models("test-model", endpoint.url, KEY, idle_timeout=0.01)
    endpoint.script(Reply("Hi", delay=0.2))
    assert (await ask(models.get(None)[0])).text == "Hi"
    await models.close()


@pytest.mark.anyio
async def test_nobody_listens(endpoint: Endpoint) -> None:
    """An endpoint that is not there is model_unavailable and named by the option that is probably wrong."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        models = memws.Models("test-model", f"http://127.0.0.1:{taken.getsockname()[1]}/v1", KEY)
        error = await fail(models.get(None)[0])
        await models.close()
    assert (error.code, error.retry) == ("model_unavailable", True)
    assert "--base-url" in str(error)


@pytest.mark.anyio
async def test_a_client_has_few_requests_at_once(endpoint: Endpoint) -> None:
    """Requests at once are spread over clients with CLIENT_REQUESTS each at most; later ones take those again."""
    shared, most = memws.Endpoint(endpoint.url, KEY), memws.CLIENT_REQUESTS
    async with contextlib.AsyncExitStack() as stack:
        used = collections.Counter([await stack.enter_async_context(shared.client()) for _ in range(2 * most + 4)])
        assert sorted(used.values()) == [4, most, most]
    async with shared.client() as again:
        assert again in used
    await shared.close()


@pytest.mark.anyio
async def test_a_turnstile_lets_one_in_at_each_pass() -> None:
    """Of many at once one goes on in each pass of the loop, in their order; who is cancelled holds up nobody."""
    stile, passes, entered = memws.Turnstile(), 0, list[tuple[int, int]]()

    async def count() -> None:
        nonlocal passes
        while len(entered) < 5:
            passes += 1
            await asyncio.sleep(0)

    async def one(number: int) -> None:
        await stile.enter()
        entered.append((number, passes))

    counting = asyncio.create_task(count())
    tasks = [asyncio.create_task(one(number)) for number in range(6)]
    await asyncio.sleep(0)
    tasks[3].cancel()
    await asyncio.wait([counting, *tasks], timeout=5)
    assert [number for number, _ in entered] == [0, 1, 2, 4, 5]
    assert len({at for _, at in entered}) == 5


@pytest.mark.anyio
async def test_a_cancelled_call_leaves_the_client_usable(endpoint: Endpoint, model: memws.Model) -> None:
    """A call that is cancelled while it waits or streams lets go of its connection, and the next one works."""
    for answer in (Reply(TEXT, hold=True), Reply(TEXT, stall_after=2)):
        endpoint.script(answer)
        count = len(endpoint.requests)
        call = asyncio.create_task(ask(model))
        await asyncio.to_thread(endpoint.wait_requests, count + 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert (await ask(model)).calls


# ---- secrets ---------------------------------------------------------------------------------------------------------

LEAKS = [
    Reply(status=401, body=told(f"Incorrect API key provided: {KEY}.", "invalid_api_key")),
    Reply(status=403, body=told(f"{KEY} may not do this")),
    Reply(status=429, body=told(f"Rate limit for {KEY}"), headers={"Retry-After": "99"}),
    Reply(status=500, body=told(f"Crash near Authorization: Bearer {KEY}")),
    Reply(status=500, body=f"<html>Bearer {KEY}</html>"),
    Reply(status=400, body=told(f"bad header {KEY}")),
    Reply(status=400, body=told("another key: sk-proj-SECRET0123456789 and Bearer SECRETtoken")),
    Reply(status=400, body=told(f"unsupported seed for {KEY}")),
    Reply(status=400, body=told("x" * 70 + KEY)),
    Reply(status=422, body={"detail": KEY}),
    Reply(TEXT, error_in_stream={"message": f"key {KEY} expired", "code": KEY}),
    Reply(body=f"<html>{KEY}</html>"),
]


@pytest.mark.anyio
async def test_no_key_is_in_any_message(
    endpoint: Endpoint, model: memws.Model, caplog: pytest.LogCaptureFixture
) -> None:
    """An endpoint that repeats the key in its errors does not get it into ours, nor into the log."""
    caplog.set_level(logging.DEBUG, "memws")
    for leak in LEAKS:
        endpoint.script(leak)
        error = await fail(model, seed=1)
        for secret in (KEY, KEY[:14], "SECRET"):
            assert secret not in str(error)
            assert secret not in caplog.text
        assert "\n" not in str(error)
        assert len(str(error)) < 400


@pytest.mark.anyio
async def test_a_key_of_the_environment_is_used_and_hidden(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENAI_API_KEY and OPENAI_BASE_URL work as the openai package has them, and stay out of messages."""
    monkeypatch.setenv("OPENAI_API_KEY", "canary-of-the-environment")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
    models = memws.Models("test-model")
    assert (await ask(models.get(None)[0])).calls
    assert endpoint.headers[0]["authorization"] == "Bearer canary-of-the-environment"
    endpoint.script(Reply(status=400, body=told("no canary-of-the-environment")))
    assert "canary" not in str(await fail(models.get(None)[0]))
    await models.close()


# ---- which model -----------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key and no endpoint in the environment."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_environment")
def test_without_key_and_endpoint_the_offline_model_answers() -> None:
    """Nothing configured: the offline model; a model that an agent names is kept, and a warning says who answers."""
    models = memws.Models()
    assert models.offline
    assert models.get(None)[0].name == memws.OFFLINE
    model, (warning,) = models.get("gpt-4o")
    assert model.name == memws.OFFLINE
    assert "'gpt-4o' is kept" in warning
    assert "--base-url" in warning


@pytest.mark.usefixtures("_no_environment")
def test_offline_can_be_chosen_beside_a_key() -> None:
    """`offline` by name is the offline model, also where there is an endpoint."""
    models = memws.Models("offline", api_key=KEY)
    assert models.offline
    assert models.get(None)[0].name == memws.OFFLINE
    assert models.get("gpt-4o")[0].name == "gpt-4o"
    assert memws.Models(api_key=KEY).get("offline")[0].name == memws.OFFLINE


@pytest.mark.usefixtures("_no_environment")
def test_the_default_model() -> None:
    """A key and no model: DEFAULT_MODEL; a model that is named is the default."""
    assert memws.Models(api_key=KEY).default == memws.DEFAULT_MODEL
    assert memws.Models("m", api_key=KEY).default == "m"


@pytest.mark.usefixtures("_no_environment")
def test_the_only_model_of_an_endpoint_is_the_default(endpoint: Endpoint) -> None:
    """An endpoint and no model: the one that it serves; of several or none the sentence has the list."""
    assert memws.Models(base_url=endpoint.url, api_key=KEY).default == "test-model"
    endpoint.models = ["a", "b"]
    with pytest.raises(memws.UsageError, match="--model; they are: a, b"):
        memws.Models(base_url=endpoint.url)
    endpoint.models = []
    with pytest.raises(memws.UsageError, match="0 models"):
        memws.Models(base_url=endpoint.url)


@pytest.mark.usefixtures("_no_environment")
@pytest.mark.parametrize(
    "answer",
    [
        Reply(status=401),
        Reply(status=500),
        Reply(body="<html>"),
        Reply(body={"data": 5}),
        Reply(body={"data": [{}]}),
        Reply(body={"data": [{"id": 5}]}),
    ],
    ids=["401", "500", "HTML", "no list", "no id", "an id that is no text"],
)
def test_an_endpoint_that_cannot_list_its_models(endpoint: Endpoint, answer: Reply) -> None:
    """An endpoint whose list of models cannot be read is one sentence that names --model, without the key."""
    endpoint.overrides["/v1/models"] = answer
    with pytest.raises(memws.UsageError, match="--model") as caught:
        memws.Models(base_url=endpoint.url, api_key=KEY)
    assert KEY not in str(caught.value)


@pytest.mark.usefixtures("_no_environment")
def test_one_model_object_per_name_and_endpoint() -> None:
    """What is learned of a model is shared by all agents that use it at the same endpoint, and by no other."""
    models = memws.Models("a", "http://127.0.0.1:9/v1", KEY)
    assert models.get("a")[0] is models.get(None)[0]
    assert models.get("b")[0] is not models.get("a")[0]
    other = models.get("a", "http://127.0.0.1:8/v1", "other")[0]
    assert other is not models.get("a")[0]
    assert other is models.get("a", "http://127.0.0.1:8/v1", "other")[0]


def test_context_windows_by_name() -> None:
    """Known model families have their window; any other has the one of MemGPT 0.2.7."""
    sizes = [memws.default_window(name) for name in ("gpt-4o-mini", "gpt-5.4-mini", "offline", "llama3", "")]
    assert sizes == [128_000, 128_000, 32_768, 8_192, 8_192]


# ---- the reply while it arrives --------------------------------------------------------------------------------------

MESSAGES = [
    "Hello!",
    "",
    TEXT,
    'quotes " and \\ and \\" and / and \t\r\n\b\f',
    "emoji 👋🏽 and 👩‍👩‍👧 at the end 🎉",
    'the word "message": "inside" the message',
    "ü" * 50,
]


def cuts(text: str) -> Iterator[str]:
    """Every beginning of a text, from the empty one to all of it."""
    return (text[:end] for end in range(len(text) + 1))


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize(
    "template", ['{"message":%s}', '{ "message" : %s , "request_heartbeat": true}', '{"a":"message","message":\n%s}']
)
@pytest.mark.parametrize("message", MESSAGES)
def test_the_reply_is_read_from_json_cut_at_every_position(message: str, template: str, ascii_only: bool) -> None:
    """What has come of a reply is always its beginning, joined it is the reply, and no escape is told in halves."""
    arguments = template % json.dumps(message, ensure_ascii=ascii_only)
    reply, so_far, before = memws.ReplyText(), "", ""
    for cut in cuts(arguments):
        so_far, before = so_far + reply.news(cut.removeprefix(before)), cut
        assert message.startswith(so_far)
        assert memws.ReplyText().news(cut) == so_far, "read at once or bit by bit, it is the same"
    assert so_far == message


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_lone_surrogate_does_not_hold_up_the_reply(ascii_only: bool) -> None:
    """Half of a surrogate pair becomes U+FFFD, and what comes after it is told."""
    for half in ("\ud83d", "\udc4b"):
        arguments = json.dumps({"message": f"a{half}b"}, ensure_ascii=ascii_only)
        reply = memws.ReplyText()
        assert "".join(reply.news(character) for character in arguments) == "a\ufffdb"


@pytest.mark.anyio
async def test_news_of_a_streamed_answer(endpoint: Endpoint, model: memws.Model) -> None:
    """While an answer arrives its monologue and its reply are told in pieces that join to the whole."""
    endpoint.script(Reply("I greet.", calls=CALLS, reasoning="Hm.", split=2))
    reply, told_texts, count = memws.ModelReply(), {"internal_monologue": "", "assistant_message": ""}, 0
    async for _ in model.stream(memws.request_body(model.head({}), [USER], ""), reply):
        for kind, text in reply.news():
            told_texts[kind] += text
            count += 1
    assert told_texts == {"internal_monologue": "Hm.\nI greet.", "assistant_message": TEXT}
    assert count > 5
