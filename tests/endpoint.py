"""A strict stand-in for an OpenAI-compatible endpoint: real HTTP/1.1 on loopback, scripted replies, no sleeps.

It refuses with HTTP 400 what the real API refuses (unpaired tool calls, broken arguments, unknown parameters), and
misbehaves on demand in the ways that real endpoints do:

    with Endpoint() as endpoint:
        endpoint.script(Reply("Hello", cut_after=2), Reply(status=429, headers={"Retry-After": "1"}), Reply("Hello"))
        ...  # point a client at endpoint.url
        assert endpoint.refusals == []

It runs on the loop of its own daemon thread, so a test may block on it. Not covered: TLS, HTTP/2, chunked and pipelined
requests.
"""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import math
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, Self

Body = dict[str, Any]

PARAMETERS = set(
    """
    audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages
    metadata modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention
    reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature
    tool_choice tools top_logprobs top_p user verbosity web_search_options
    """.split()  # noqa: SIM905 (a list of words reads better as words)
)
EMBEDDING_PARAMETERS = {"dimensions", "encoding_format", "input", "model", "user"}
MAX_INPUTS = 2048
"""Texts in one request for embeddings."""
ROLES = ("system", "assistant", "user", "tool", "developer")
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


# ======================================================================================================================
# Replies
# ======================================================================================================================


@dataclass(frozen=True)
class Reply:
    """One answer of the model, and the ways in which its endpoint departs from OpenAI's."""

    text: str | None = None
    """The content; None sends null."""
    calls: Sequence[tuple[str, Body | str]] = ()
    """Tool calls as (name, arguments); a str goes out as it is, so it may be broken JSON."""
    call_ids: Sequence[str | None] | None = None
    """The calls' ids, which may repeat or be empty; None in the list leaves the field out; None: fresh ones."""
    reasoning: str = ""
    """The model's private text."""
    reasoning_field: Literal["reasoning_content", "reasoning"] = "reasoning_content"
    """The delta's field for it: reasoning_content (DeepSeek, llama.cpp) or reasoning (OpenRouter, Ollama)."""
    refusal: str = ""
    """The refusal field, as OpenAI sends it in place of content."""
    finish: str | None = None
    """The finish reason; None: tool_calls or stop, as the content asks."""
    usage: Body | Literal["auto"] | None = "auto"
    """Token counts; "auto": characters / 4; None: never sent."""
    usage_style: Literal["own", "last"] = "own"
    """own: a chunk with empty choices, where stream_options asks (OpenAI); last: always, in the chunk that finishes."""
    chunk: int = 8
    """Characters of text or arguments in one delta."""

    status: int = 200
    """The HTTP status; any other than 200 answers with `body` alone."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """More response headers, such as Retry-After."""
    body: str | Body | None = None
    """The whole body: a dict as JSON, a str as HTML (with any status); None: the reply, or OpenAI's error JSON."""
    delay: float = 0
    """Seconds before the first byte; for benchmarks only."""
    hold: bool = False
    """Wait before the first byte until `Endpoint.release()`, or until the client leaves."""
    stall_after: int | None = None
    """Send so many chunks, then nothing until `Endpoint.release()`, or until the client leaves."""
    cut_after: int | None = None
    """Send so many chunks, then reset the connection."""
    error_in_stream: Body | None = None
    """The second half of the stream is one chunk {"error": this}."""

    whole: bool = False
    """One JSON answer in spite of stream=true."""
    done: bool = True
    """End the stream with [DONE]."""
    first_without_delta: bool = False
    """Begin with a choice that has no delta."""
    empty_choices: Literal["none", "first", "all"] = "none"
    """Chunks whose choices are empty: none, one at the start (Azure), all of them."""
    calls_as_text: bool = False
    """Tool calls in the content, as <tool_call>{…}</tool_call> (Hermes templates without a parser)."""
    whole_arguments: bool = False
    """Each tool call in one delta (Ollama)."""
    arguments_as_object: bool = False
    """Arguments as a JSON object instead of a string, in one delta."""
    call_index: bool = True
    """Tool call deltas carry their index; False: it is missing (Gemini)."""

    comments: bool = False
    """A ": ping" comment before each event."""
    crlf: bool = False
    """Lines end with CR LF."""
    multiline: bool = False
    """Each event's JSON over several data lines."""
    split: int | None = None
    """Bytes in one write, each a chunk of HTTP's; small values fall inside lines and UTF-8 characters."""


Answer = Reply | Callable[[Body], Reply]
"""A reply, or what makes one from the request's body."""
Vector = list[float]


def greet(body: Body) -> Reply:
    """Say hello: through `send_message` where the request offers that tool, else in plain text."""
    tools = {tool["function"]["name"] for tool in body.get("tools", [])}
    if "send_message" in tools and body.get("tool_choice") != "none":
        return Reply(calls=[("send_message", {"message": "Hello!"})])
    return Reply("Hello!")


def _tool_calls(reply: Reply, fresh_ids: Iterator[str]) -> list[Body]:
    calls = []
    for position, (name, arguments) in enumerate(reply.calls):
        if not reply.arguments_as_object and not isinstance(arguments, str):
            arguments = _encode(arguments)
        call: Body = {"type": "function", "function": {"name": name, "arguments": arguments}}
        call_id = next(fresh_ids) if reply.call_ids is None else reply.call_ids[position]
        calls.append(call if call_id is None else {"id": call_id, **call})
    return calls


def _call_deltas(reply: Reply, index: int, call: Body) -> list[Body]:
    """One tool call in pieces: the first has id and name, the others only more of the arguments."""
    place: Body = {"index": index} if reply.call_index else {}
    if reply.whole_arguments or reply.arguments_as_object:
        return [{"tool_calls": [place | call]}]
    function = call["function"]
    deltas: list[Body] = [{"tool_calls": [place | call | {"function": function | {"arguments": ""}}]}]
    pieces = _pieces(function["arguments"], reply.chunk)
    return deltas + [{"tool_calls": [place | {"function": {"arguments": piece}}]} for piece in pieces]


def _text_and_calls(reply: Reply, fresh_ids: Iterator[str]) -> tuple[str | None, list[Body]]:
    calls = _tool_calls(reply, fresh_ids)
    if not reply.calls_as_text:
        return reply.text, calls
    objects = [_encode({"name": name, "arguments": arguments}) for name, arguments in reply.calls]
    return (reply.text or "") + "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects), []


def _completion(reply: Reply, text: str | None, calls: list[Body], finish: str) -> Body:
    """The answer to stream=false."""
    message: Body = {"role": "assistant", "content": text, "refusal": reply.refusal or None}
    if reply.reasoning:
        message[reply.reasoning_field] = reply.reasoning
    if calls:
        message["tool_calls"] = calls
    choices = [] if reply.empty_choices == "all" else [{"index": 0, "message": message, "finish_reason": finish}]
    return {"object": "chat.completion", "choices": choices}


def _chunks(reply: Reply, text: str | None, calls: list[Body], finish: str) -> list[Body]:
    """The answer to stream=true, as chunks without their common fields."""
    deltas: list[Body] = [{"role": "assistant", "content": None if text is None else ""}]
    deltas += [{reply.reasoning_field: piece} for piece in _pieces(reply.reasoning, reply.chunk)]
    deltas += [{"content": piece} for piece in _pieces(text or "", reply.chunk)]
    deltas += [{"refusal": piece} for piece in _pieces(reply.refusal, reply.chunk)]
    for index, call in enumerate(calls):
        deltas += _call_deltas(reply, index, call)
    choices: list[list[Body]] = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in deltas]
    choices.append([{"index": 0, "delta": {}, "finish_reason": finish}])
    if reply.first_without_delta:
        choices.insert(0, [{"index": 0, "finish_reason": None}])
    if reply.empty_choices == "first":
        choices.insert(0, [])
    if reply.empty_choices == "all":
        choices = [[] for _ in choices]
    return [{"object": "chat.completion.chunk", "choices": each} for each in choices]


def _answer(reply: Reply, body: Body, fresh_ids: Iterator[str]) -> Body | list[Body]:
    """The JSON of a reply: one completion, or the chunks of a stream."""
    text, calls = _text_and_calls(reply, fresh_ids)
    finish = reply.finish or ("tool_calls" if calls else "stop")
    completion_id = next(fresh_ids).replace("call_", "chatcmpl-")
    common: Body = {"id": completion_id, "created": 1_700_000_000, "model": body["model"]}
    usage = _usage(reply, body, text) if reply.usage == "auto" else reply.usage
    if reply.whole or not body.get("stream"):
        return common | _completion(reply, text, calls, finish) | ({"usage": usage} if usage is not None else {})

    chunks = [common | chunk for chunk in _chunks(reply, text, calls, finish)]
    asked = (body.get("stream_options") or {}).get("include_usage", False)
    if usage is not None and reply.usage_style == "last":
        chunks[-1]["usage"] = usage
    elif usage is not None and asked:
        chunks = [{**chunk, "usage": None} for chunk in chunks]
        chunks.append(common | {"object": "chat.completion.chunk", "choices": [], "usage": usage})
    if reply.error_in_stream is not None:
        chunks[len(chunks) // 2 :] = [{"error": reply.error_in_stream}]
    return chunks


def _usage(reply: Reply, body: Body, text: str | None) -> Body:
    prompt = sum(prompt_tokens(body))
    completion = (len(text or "") + len(reply.reasoning) + sum(len(str(call)) for call in reply.calls)) // 4
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _events(reply: Reply, chunks: list[Body]) -> list[bytes]:
    """The chunks as server-sent events."""
    end = "\r\n" if reply.crlf else "\n"
    texts = [_encode(chunk, indent=1 if reply.multiline else None) for chunk in chunks]
    if reply.done and reply.error_in_stream is None:
        texts.append("[DONE]")
    comment = f": ping{end}{end}" if reply.comments else ""
    events = [comment + "".join(f"data: {line}{end}" for line in text.split("\n")) + end for text in texts]
    # A lone surrogate of the script becomes its JSON escape, which is what a careless endpoint sends.
    return [event.encode("utf-8", "backslashreplace") for event in events]


def _encode(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


# ======================================================================================================================
# Strictness
# ======================================================================================================================


class Refusal(Exception):
    """A request that the API does not take: the HTTP status and the fields of OpenAI's error JSON."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def parse(raw: bytes) -> Body:
    """The JSON object of a request's body. Raises Refusal for anything a strict parser does not read."""

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(raw.decode(), parse_constant=no_constant)
        if not isinstance(body, dict):
            raise ValueError("not an object")
        if re.search(rb"\\u[dD][89a-fA-F]", raw):
            _encode(body).encode()  # raises on a lone surrogate
    except ValueError as error:
        raise Refusal(f"We could not parse the JSON body of your request. ({error})") from None
    return body


def check(body: Body) -> None:
    """Refuse what OpenAI's chat completions refuse. Raises Refusal."""
    if unknown := sorted(body.keys() - PARAMETERS):
        raise Refusal(f"Unrecognized request argument supplied: {', '.join(unknown)}")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise Refusal("you must provide a model parameter")
    for name in ("tool_choice", "parallel_tool_calls"):
        if name in body and "tools" not in body:
            raise Refusal(f"Invalid value for '{name}': '{name}' is only allowed when 'tools' are specified.", name)
    if "stream_options" in body and not body.get("stream"):
        raise Refusal("The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options")
    if "tools" in body:
        for index, tool in enumerate(_array(body, "tools")):
            _check_tool(tool, f"tools[{index}]")
    messages = _array(body, "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    _check_pairs(messages)


def _array(body: Body, name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        text = f"Invalid type for '{name}': expected an array of objects, but got {value!r} instead."
        raise Refusal(text, name, "invalid_type")
    if not value:
        text = f"Invalid '{name}': empty array. Expected an array with minimum length 1, "
        text += "but got an empty array instead."
        raise Refusal(text, name, "empty_array")
    return value


def _check_tool(tool: Any, path: str) -> None:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise Refusal(f"Invalid value for '{path}': expected a tool of type 'function'.", path, "invalid_value")
    function = tool["function"]
    _check_function_name(function, f"{path}.function")
    schema = function.get("parameters", {"type": "object", "properties": {}})
    well_formed = (
        isinstance(schema, dict)
        and schema.get("type") == "object"
        and isinstance(schema.get("properties"), dict)
        and set(schema.get("required", ())) <= schema["properties"].keys()
    )
    if not well_formed:
        text = f"Invalid schema for function '{function['name']}': "
        text += "schema must be a JSON Schema of 'type: \"object\"', with its required properties."
        raise Refusal(text, f"{path}.function.parameters", "invalid_function_parameters")


def _check_function_name(function: Body, path: str) -> None:
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        text = f"Invalid '{path}.name': string does not match pattern. "
        text += "Expected a string that matches the pattern '^[a-zA-Z0-9_-]{1,64}$'."
        raise Refusal(text, f"{path}.name", "invalid_value")


def _check_message(message: Any, path: str) -> None:
    if not isinstance(message, dict):
        text = f"Invalid type for '{path}': expected an object, but got {message!r} instead."
        raise Refusal(text, path, "invalid_type")
    role = message.get("role")
    if role not in ROLES:
        supported = ", ".join(map(repr, ROLES))
        raise Refusal(f"Invalid value: {role!r}. Supported values are: {supported}.", f"{path}.role", "invalid_value")
    if "tool_calls" in message:
        if role != "assistant":
            raise Refusal(f"'tool_calls' is not allowed in a message of role {role!r}.", f"{path}.tool_calls")
        _check_calls(_array(message, "tool_calls"), f"{path}.tool_calls")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and "tool_calls" in message):
        got = "null" if content is None else type(content).__name__
        raise Refusal(f"Invalid value for 'content': expected a string, got {got}.", f"{path}.content")


def _check_calls(calls: list[Any], path: str) -> None:
    seen = set()
    for index, call in enumerate(calls):
        place = f"{path}[{index}]"
        if not isinstance(call, dict) or call.get("type") != "function" or not isinstance(call.get("function"), dict):
            raise Refusal(f"Invalid value for '{place}': expected a call of type 'function'.", place, "invalid_value")
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id or call_id in seen:
            text = f"Invalid '{place}.id': expected a unique non-empty string, got {call_id!r}."
            raise Refusal(text, f"{place}.id", "invalid_value")
        seen.add(call_id)
        _check_function_name(call["function"], f"{place}.function")
        _check_arguments(call["function"].get("arguments"), f"{place}.function.arguments")


def _check_arguments(arguments: Any, path: str) -> None:
    """OpenAI's own models forgive some of this; vLLM, Anthropic's and Google's endpoints do not."""
    try:
        if isinstance(arguments, str) and isinstance(json.loads(arguments), dict):
            return
    except ValueError:
        pass
    raise Refusal(f"Invalid '{path}': expected a string that holds a JSON object.", path, "invalid_value")


def _check_pairs(messages: list[Body]) -> None:
    """Every tool call is answered at once and exactly once; nothing else is answered."""
    waiting: list[str] = []
    for index, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "tool":
            if message.get("tool_call_id") not in waiting:
                text = "Invalid parameter: messages with role 'tool' must be a response to a preceeding message "
                text += "with 'tool_calls'."
                raise Refusal(text, f"messages.[{index}].role")
            waiting.remove(message["tool_call_id"])
        elif waiting:
            text = "An assistant message with 'tool_calls' must be followed by tool messages responding to each "
            text += f"'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(waiting)}"
            raise Refusal(text, f"messages.[{index}].role")
        else:
            waiting = [call["id"] for call in message.get("tool_calls", ())]


def check_embedding(body: Body) -> list[str]:
    """The texts of a request for embeddings; lists of tokens are not covered. Raises Refusal as OpenAI refuses."""
    if unknown := sorted(body.keys() - EMBEDDING_PARAMETERS):
        raise Refusal(f"Unrecognized request argument supplied: {', '.join(unknown)}")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise Refusal("you must provide a model parameter")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        text = "Invalid value for 'encoding_format'. Supported values are: 'float', 'base64'."
        raise Refusal(text, "encoding_format")
    dimensions = body.get("dimensions", 1)
    if type(dimensions) is not int or dimensions < 1:
        raise Refusal(f"Invalid 'dimensions': expected a positive integer, but got {dimensions!r}.", "dimensions")
    given = body.get("input")
    texts: list[Any] = given if isinstance(given, list) else [given]
    if not texts or len(texts) > MAX_INPUTS or not all(isinstance(text, str) and text for text in texts):
        text = f"'$.input' is invalid: expected a non-empty string, or 1 to {MAX_INPUTS} of them."
        raise Refusal(text, "input", "invalid_type")
    return texts


def prompt_tokens(body: Body) -> tuple[int, int]:
    """Tokens of the messages and of the tools, as characters / 4."""
    characters = 0
    for message in body["messages"]:
        characters += len(message.get("content") or "")
        for call in message.get("tool_calls", ()):
            characters += len(call["function"]["name"]) + len(call["function"]["arguments"])
    return characters // 4, len(_encode(body["tools"])) // 4 if "tools" in body else 0


# ======================================================================================================================
# HTTP
# ======================================================================================================================


class Request(NamedTuple):
    """One HTTP request."""

    method: str
    path: str
    headers: dict[str, str]
    raw: bytes


class Endpoint:
    """An OpenAI-compatible endpoint on a free loopback port, while the `with` block lasts.

    `context_window` (approximate tokens; None: any), `api_key` (None: any) and `refuse` (names of parameters, such as
    stream_options, max_tokens, parallel_tool_calls, tools) ask for the answers of endpoints with such limits. These are
    no faults of the client, so they are not among the `refusals`.
    """

    def __init__(
        self,
        *,
        models: Sequence[str] = ("test-model",),
        context_window: int | None = None,
        api_key: str | None = None,
        refuse: Sequence[str] = (),
        dimension: int = 32,
        synonyms: Mapping[str, str] | None = None,
    ) -> None:
        self.models = list(models)
        self.context_window = context_window
        self.api_key = api_key
        self.refuse = set(refuse)
        self.dimension = dimension
        """Of its embeddings, where a request names none."""
        self.synonyms = dict(synonyms or {})
        """Words that embeddings take for another: {"feline": "cat"}."""
        self.spoil: Callable[[list[Vector]], list[Any]] | None = None
        """What makes of the vectors of an answer something else, of which there may be more or fewer."""
        self.default: Answer = greet
        """What answers when the script is over."""
        self.overrides: dict[str, Reply | Callable[[Body], Reply | None]] = {}
        """Replies in place of a whole route: overrides["/v1/embeddings"] = Reply(status=500); what is held, or has
        neither status nor body of its own, answers as ever. A function gets the request; None is no reply."""
        self.requests: list[Body] = []
        """Bodies of POST /v1/chat/completions, in order of arrival; refused ones too, {} where it is no JSON."""
        self.bodies: list[bytes] = []
        """The same as raw bytes."""
        self.headers: list[dict[str, str]] = []
        """Their headers, names in lower case."""
        self.embedding_requests: list[Body] = []
        """Bodies of POST /v1/embeddings, in order of arrival, those that failed too."""
        self.refusals: list[str] = []
        """Why requests were refused by the strict checks; a good client leaves it empty."""
        self.port = 0
        self._script: deque[Answer] = deque()
        self._fresh_ids = (f"call_{number:024}" for number in itertools.count(1))
        self._gates: set[asyncio.Event] = set()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._arrived = threading.Condition()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="endpoint", daemon=True)

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; returns once the port is known."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """Reset every connection and free the port."""
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def script(self, *answers: Answer) -> None:
        """Queue answers for the requests to come; a refused request uses none."""
        self._script.extend(answers)

    def release(self) -> None:
        """Let every reply go on that is held or stalled, or will be: of all requests that have arrived so far."""
        self._loop.call_soon_threadsafe(self._open_gates)

    @property
    def embedded(self) -> list[str]:
        """All texts that were to be embedded, in order of arrival."""
        given = [body.get("input", []) for body in self.embedding_requests]
        return [text for each in given for text in (each if isinstance(each, list) else [each])]

    def wait_embeddings(self, count: int, timeout: float = 10) -> None:
        """Block until `count` requests for embeddings have arrived in all. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.embedding_requests) >= count, timeout):
                raise TimeoutError(f"{len(self.embedding_requests)} of {count} requests arrived in {timeout} s")

    def wait_requests(self, count: int, timeout: float = 10) -> None:
        """Block until `count` chat requests have arrived in all; on a loop, call it through `asyncio.to_thread`.

        Raises TimeoutError after `timeout` seconds.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.requests) >= count, timeout):
                raise TimeoutError(f"{len(self.requests)} of {count} requests arrived in {timeout} s")

    def _open_gates(self) -> None:
        for gate in self._gates:
            gate.set()
        self._gates.clear()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stopping.wait()
        server.close()
        for _ in range(5):  # what was accepted just now gets its task
            await asyncio.sleep(0)
        while self._connections:
            for writer in self._connections.values():
                writer.transport.abort()
            await asyncio.wait(self._connections)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has left
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()  # else the loop could end before its transport does
            del self._connections[task]

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection stays open."""
        request = await _read_request(reader)
        gate = asyncio.Event()
        self._gates.add(gate)  # before the request is seen to have arrived, so that no release() is missed
        try:
            reply, answer = self._route(request)
        except Refusal as refusal:
            reply, answer = Reply(status=refusal.status, body=refusal.body), {}
        try:
            stays = await _send(reply, answer, gate, reader, writer)
        finally:
            self._gates.discard(gate)
        return stays and request.headers.get("connection", "").lower() != "close"

    def _route(self, request: Request) -> tuple[Reply, Body | list[Body]]:
        """The reply to a request and its JSON. Raises Refusal."""
        route = (request.method, request.path)
        is_chat = route == ("POST", "/v1/chat/completions")
        is_embedding = route == ("POST", "/v1/embeddings")
        body = self._record(request, is_chat) if is_chat or is_embedding else {}
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise Refusal("Incorrect API key provided.", code="invalid_api_key", status=401)
        override = self.overrides.get(request.path)
        if callable(override):
            override = override(body if isinstance(body, dict) else {})
        if override is not None and (override.status != 200 or override.body is not None):
            return override, {}
        if is_chat:
            reply, answer = self._chat(body)
            return override or reply, answer
        if is_embedding:
            return override or Reply(), self._embed(body)
        if route == ("GET", "/v1/models"):
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "test"} for name in self.models]
            return override or Reply(), {"object": "list", "data": models}
        raise Refusal(f"Invalid URL ({request.method} {request.path})", status=404)

    def _record(self, request: Request, is_chat: bool) -> Body | Refusal:
        body: Body | Refusal
        try:
            body = parse(request.raw)
        except Refusal as refusal:
            body = refusal
        known = body if isinstance(body, dict) else {}
        with self._arrived:
            if is_chat:
                self.bodies.append(request.raw)
                self.headers.append(request.headers)
                self.requests.append(known)
            else:
                self.embedding_requests.append(known)
            self._arrived.notify_all()
        return body

    def _chat(self, body: Body | Refusal) -> tuple[Reply, Body | list[Body]]:
        try:
            if isinstance(body, Refusal):
                raise body
            check(body)
        except Refusal as refusal:
            self.refusals.append(str(refusal))
            raise
        self._check_limits(body)
        answer = self._script.popleft() if self._script else self.default
        try:
            reply = answer if isinstance(answer, Reply) else answer(body)
        except Exception as error:  # a fault of the test's own code: show it there, keep the connection's task alive
            self.refusals.append(f"the script raised {error!r}")
            raise Refusal(f"the script raised {error!r}", status=500) from error
        return reply, _answer(reply, body, self._fresh_ids)

    def _check_limits(self, body: Body) -> None:
        """Refuse what this endpoint was asked to refuse, in OpenAI's words."""
        for name in sorted(self.refuse & body.keys()):
            if name == "stream_options":
                raise Refusal("Unrecognized request argument supplied: stream_options")
            instead = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            text = f"Unsupported parameter: '{name}' is not supported with this model.{instead}"
            raise Refusal(text, name, "unsupported_parameter")
        messages, functions = prompt_tokens(body)
        if self.context_window is not None and messages + functions > self.context_window:
            text = f"This model's maximum context length is {self.context_window} tokens. However, your messages "
            text += f"resulted in {messages + functions} tokens ({messages} in the messages, {functions} in the "
            text += "functions). Please reduce the length of the messages or functions."
            raise Refusal(text, "messages", "context_length_exceeded")

    def _embed(self, body: Body | Refusal) -> Body:
        try:
            if isinstance(body, Refusal):
                raise body
            texts = check_embedding(body)
        except Refusal as refusal:
            self.refusals.append(str(refusal))
            raise
        vectors: list[Any] = [self.vector(text, body.get("dimensions")) for text in texts]
        if self.spoil is not None:
            vectors = self.spoil(vectors)
        if body.get("encoding_format") == "base64":
            vectors = [_base64(vector) for vector in vectors]
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        tokens = sum(map(len, texts)) // 4
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": body["model"], "usage": usage}

    def vector(self, text: str, dimension: int | None = None) -> Vector:
        """The embedding of a text, as a request for it is answered now."""
        return embedding(text, dimension or self.dimension, self.synonyms)


def embedding(text: str, dimension: int, synonyms: Mapping[str, str] | None = None) -> Vector:
    """A unit vector of hashed triples of letters: texts alike in letters point the same way, in every process."""
    words = [(synonyms or {}).get(word, word) for word in re.findall(r"\w+", text.lower())] or [text]
    triples = [f" {word} "[start : start + 3] for word in words for start in range(len(word))]
    digests = [hashlib.shake_256(triple.encode("utf-8", "replace")).digest(dimension) for triple in triples]
    vector = [sum(column) - 127.5 * len(digests) for column in zip(*digests, strict=True)]
    length = math.hypot(*vector)
    return [value / length for value in vector]


def _base64(vector: Any) -> Any:
    """A vector as base64 of 32-bit floats; what is none, as it is."""
    if not isinstance(vector, list) or not all(isinstance(value, float) for value in vector):
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


async def _read_request(reader: asyncio.StreamReader) -> Request:
    """Raises IncompleteReadError when the client has left."""
    head = await reader.readuntil(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = line.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


async def _send(
    reply: Reply,
    answer: Body | list[Body],
    gate: asyncio.Event,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> bool:
    """Write one response; whether the connection stays open."""
    if reply.delay and await _leaves(reader, asyncio.sleep(reply.delay)):
        return False
    if reply.hold and await _leaves(reader, gate.wait()):
        return False
    if reply.status != 200 or reply.body is not None or isinstance(answer, dict):
        writer.write(_plain_response(reply, answer))
        await writer.drain()
        return True

    events = _events(reply, answer)
    stop = next((count for count in (reply.cut_after, reply.stall_after) if count is not None), len(events))
    head = _head(reply, "text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")
    begin = head + _http_chunks(events[:stop], reply.split)
    end = _http_chunks(events[stop:], reply.split) + b"0\r\n\r\n"
    if reply.cut_after is not None:
        await _send_and_reset(writer, begin)
        return False
    if reply.stall_after is not None:
        writer.write(begin)
        begin = b""
        if await _leaves(reader, gate.wait()):
            return False
    writer.write(begin + end)
    await writer.drain()
    return True


def _plain_response(reply: Reply, answer: Body | list[Body]) -> bytes:
    content = reply.body
    if content is None and reply.status == 200:
        content = _encode(answer)
    elif content is None:
        content = {"error": {"message": _phrase(reply.status), "type": "server_error", "param": None, "code": None}}
    kind = "text/html" if isinstance(reply.body, str) else "application/json"
    raw = (content if isinstance(content, str) else _encode(content)).encode("utf-8", "backslashreplace")
    return _head(reply, kind, f"Content-Length: {len(raw)}") + raw


async def _send_and_reset(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.transport.set_write_buffer_limits(0)
    writer.write(data)
    await writer.drain()  # all of it is the kernel's now, and on loopback that is the reader's
    # Without lingering, closing is a reset.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _head(reply: Reply, kind: str, framing: str) -> bytes:
    more = [f"{name}: {value}" for name, value in reply.headers.items()]
    line = f"HTTP/1.1 {reply.status} {_phrase(reply.status)}"
    return "\r\n".join([line, f"Content-Type: {kind}", framing, *more, "", ""]).encode("latin-1")


def _phrase(status: int) -> str:
    return http.client.responses.get(status, "Error")


def _http_chunks(events: list[bytes], split: int | None) -> bytes:
    if split is not None:
        whole = b"".join(events)
        events = [whole[start : start + split] for start in range(0, len(whole), split)]
    return b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


async def _leaves(reader: asyncio.StreamReader, wait: Coroutine[Any, Any, object]) -> bool:
    """Whether the client leaves before `wait` is over."""
    leaving = asyncio.ensure_future(reader.read(1))
    waiting = asyncio.ensure_future(wait)
    done, pending = await asyncio.wait({leaving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(leaving, waiting, return_exceptions=True)  # a read that is over, before the next one begins
    return leaving in done
