"""A strict stand-in for an OpenAI-compatible endpoint: real HTTP/1.1 on loopback, scripted replies, no sleeps.

It refuses with HTTP 400 what the real API refuses, and misbehaves on demand as real endpoints do:

    with Endpoint() as endpoint:
        endpoint.script(Reply("Hello", cut_after=2), Reply(status=429, headers={"Retry-After": "1"}), Reply("Hello"))

It runs on a thread of its own, so a test may block on it. Not covered: TLS, HTTP/2, chunked requests.
"""

import asyncio
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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, Self

from anyio.from_thread import start_blocking_portal
from pydantic import ConfigDict, Field, Json, ValidationError, create_model

Body = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """One answer of the model, and the ways in which its endpoint departs from OpenAI's."""

    text: str | None = None  # the content; None sends null
    calls: Sequence[tuple[str, Body | str]] = ()  # (name, arguments); a str goes out as it is, so it may be broken JSON
    call_ids: Sequence[str | None] | None = None  # None in the list leaves the field out; None: fresh ones
    reasoning: str = ""  # the model's private text
    reasoning_field: str = "reasoning_content"  # as DeepSeek and llama.cpp; "reasoning": as OpenRouter and Ollama
    signature: str = ""  # of the first tool call, as Gemini sends it in extra_content
    more: Body = field(default_factory=dict)  # more fields of the message; in a stream they come twice
    refusal: str = ""  # the refusal field, as OpenAI sends it in place of content
    finish: str | None = None  # the finish reason; None: tool_calls or stop, as the content asks
    usage: Body | Literal["auto"] | None = "auto"  # token counts; "auto": characters / 4; None: never sent
    usage_style: Literal["own", "last"] = "own"  # own: a chunk of its own, where stream_options asks; last: always
    chunk: int = 8  # characters of text or arguments in one delta

    status: int = 200  # the HTTP status; any other than 200 answers with `body` alone
    headers: Mapping[str, str] = field(default_factory=dict)  # more response headers, such as Retry-After
    # the whole body: a dict as JSON, a str or bytes as they are; None: the reply, or OpenAI's error JSON
    body: str | bytes | Body | None = None
    delay: float = 0  # seconds before the first byte; for benchmarks only
    hold: bool = False  # wait before the first byte until `Endpoint.release()`, or until the client leaves
    stall_after: int | None = None  # send so many chunks, then nothing until `release()`, or until the client leaves
    cut_after: int | None = None  # send so many chunks, then reset the connection
    endless: bool = False  # repeat the last delta until the client leaves
    error_in_stream: Body | None = None  # the second half of the stream is one chunk {"error": this}

    whole: bool = False  # one JSON answer in spite of stream=true
    done: bool = True  # end the stream with [DONE]
    first_without_delta: bool = False  # begin with a choice that has no delta
    empty_choices: Literal["none", "first", "all"] = "none"  # one at the start (Azure), or all of them
    calls_as_text: bool = False  # as <tool_call>{…}</tool_call> in the content (Hermes templates without a parser)
    whole_arguments: bool = False  # each tool call in one delta (Ollama)
    arguments_as_object: bool = False  # arguments as a JSON object instead of a string, in one delta
    call_index: bool = True  # tool call deltas carry their index; False: it is missing (Gemini)

    comments: bool = False  # a ": ping" comment before each event
    crlf: bool = False  # lines end with CR LF
    split: int | None = None  # bytes in one write, each a chunk of HTTP's; they fall inside lines and characters


Answer = Reply | Callable[[Body], Reply]  # a reply, or what makes one from the request's body
Vector = list[float]


def greet(body: Body) -> Reply:
    """Say hello: through `send_message` where the request offers that tool, else in plain text."""
    tools = {tool["function"]["name"] for tool in body.get("tools", [])}
    if "send_message" in tools and body.get("tool_choice") != "none":
        return Reply(calls=[("send_message", {"message": "Hello!"})])
    return Reply("Hello!")


def say(*texts: str, **more: Any) -> Reply:
    """A reply through `send_message`, once for each text."""
    return Reply(calls=[("send_message", {"message": text}) for text in texts], **more)


def echo(body: Body) -> Reply:
    packed = "\n".join(message["content"] for message in body["messages"] if message["role"] == "user")
    said = [event for event in map(json.loads, packed.splitlines()) if event["type"] == "user_message"]
    return say(f"you said {said[-1]['message']}")


def _message(reply: Reply, fresh_ids: Iterator[str]) -> Body:
    message: Body = {"role": "assistant", "content": reply.text, "refusal": reply.refusal or None, **reply.more}
    if reply.reasoning:
        message[reply.reasoning_field] = reply.reasoning
    if reply.calls_as_text:
        calls = [_encode({"name": name, "arguments": arguments}) for name, arguments in reply.calls]
        message["content"] = (reply.text or "") + "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    elif reply.calls:
        message["tool_calls"] = []
        for position, (name, arguments) in enumerate(reply.calls):
            is_sent_as_it_is = reply.arguments_as_object or isinstance(arguments, str)
            function = {"name": name, "arguments": arguments if is_sent_as_it_is else _encode(arguments)}
            call_id = next(fresh_ids) if reply.call_ids is None else reply.call_ids[position]
            call = {"type": "function", "function": function}
            message["tool_calls"].append(call if call_id is None else {"id": call_id, **call})
        if reply.signature:
            message["tool_calls"][0]["extra_content"] = {"google": {"thought_signature": reply.signature}}
    return message


def _deltas(reply: Reply, message: Body) -> list[Body]:
    """A message in pieces. Of a call the first has id and name, the others only more of the arguments."""
    deltas: list[Body] = [{"role": "assistant", "content": None if message["content"] is None else ""}]
    deltas += [reply.more] * 2 if reply.more else []
    for name in (reply.reasoning_field, "content", "refusal"):
        deltas += [{name: piece} for piece in _pieces(message.get(name) or "", reply.chunk)]
    for index, call in enumerate(message.get("tool_calls", ())):
        place: Body = {"index": index} if reply.call_index else {}
        if reply.whole_arguments or reply.arguments_as_object:
            deltas.append({"tool_calls": [place | call]})
            continue
        function = call["function"]
        deltas.append({"tool_calls": [place | call | {"function": function | {"arguments": ""}}]})
        for piece in _pieces(function["arguments"], reply.chunk):
            deltas.append({"tool_calls": [place | {"function": {"arguments": piece}}]})
    return deltas


def _answer(reply: Reply, body: Body, fresh_ids: Iterator[str]) -> Body | list[Body]:
    """The JSON of a reply: one completion, or the chunks of a stream."""
    message = _message(reply, fresh_ids)
    finish = reply.finish or ("tool_calls" if "tool_calls" in message else "stop")
    usage = _usage(reply, body, message["content"]) if reply.usage == "auto" else reply.usage
    common: Body = {"id": next(fresh_ids).replace("call_", "chatcmpl-"), "created": 1_700_000_000}
    common |= {"model": body["model"], "object": "chat.completion"}
    if reply.whole or not body.get("stream"):
        whole = [{"index": 0, "message": message, "finish_reason": finish}]
        common["choices"] = [] if reply.empty_choices == "all" else whole
        return common if usage is None else common | {"usage": usage}

    common["object"] = "chat.completion.chunk"
    choices: list[Body] = [{"delta": delta, "finish_reason": None} for delta in _deltas(reply, message)]
    choices.append({"delta": {}, "finish_reason": finish})
    choices[:0] = [{"finish_reason": None}] if reply.first_without_delta else []
    chunks = [common | {"choices": [{"index": 0, **choice}]} for choice in choices]
    if reply.empty_choices == "all":
        chunks = [common | {"choices": []} for _ in choices]
    chunks[:0] = [common | {"choices": []}] if reply.empty_choices == "first" else []
    if usage is not None and reply.usage_style == "last":
        chunks[-1]["usage"] = usage
    elif usage is not None and (body.get("stream_options") or {}).get("include_usage"):
        chunks = [*({**chunk, "usage": None} for chunk in chunks), common | {"choices": [], "usage": usage}]
    if reply.error_in_stream is not None:
        chunks[len(chunks) // 2 :] = [{"error": reply.error_in_stream}]
    return chunks


def _usage(reply: Reply, body: Body, text: str | None) -> Body:
    prompt = sum(prompt_tokens(body))
    completion = (len(text or "") + len(reply.reasoning) + sum(len(str(call)) for call in reply.calls)) // 4
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _events(reply: Reply, chunks: list[Body]) -> list[bytes]:
    end = "\r\n" if reply.crlf else "\n"
    texts = [_encode(chunk) for chunk in chunks]
    if reply.done and reply.error_in_stream is None:
        texts.append("[DONE]")
    comment = f": ping{end}{end}" if reply.comments else ""
    # A lone surrogate of the script becomes its JSON escape, which is what a careless endpoint sends.
    return [f"{comment}data: {text}{end}{end}".encode("utf-8", "backslashreplace") for text in texts]


def _encode(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


class Refusal(Exception):
    """A request that the API does not take: the HTTP status and OpenAI's error JSON."""

    def __init__(self, message: str, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


def parse(raw: bytes) -> Any:
    """The JSON of a request's body. Raises Refusal for anything a strict parser does not read."""
    try:
        body = json.loads(raw.decode(), parse_constant=int)  # which takes neither NaN nor Infinity
        _encode(body).encode()  # raises on a lone surrogate
    except ValueError as error:
        raise Refusal(f"We could not parse the JSON body of your request. ({error})") from None
    return body


# What OpenAI's API takes. Its own models forgive some more; vLLM's and Google's do not.


def shape(config: ConfigDict | None = None, **fields: Any) -> Any:
    """A type of objects with these fields: (type, default) of those that may be missing."""
    defined: dict[str, Any] = {name: kind if isinstance(kind, tuple) else (kind, ...) for name, kind in fields.items()}
    return create_model("Shape", __config__=ConfigDict(strict=True, **(config or {})), **defined)


def some(kind: Any, most: int | None = None) -> Any:
    return Annotated[list[kind], Field(min_length=1, max_length=most)]


TEXT = Annotated[str, Field(min_length=1)]
NAME, KIND = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")], Literal["function"]
CALL = shape(id=TEXT, type=KIND, function=shape(name=NAME, arguments=Json[dict[str, Any]]))
MESSAGE = shape(
    role=Literal["system", "assistant", "user", "tool", "developer"],
    content=(str | None, None),
    tool_calls=(some(CALL), []),
    tool_call_id=(str, ""),
)
PARAMETERS = shape(type=Literal["object"], properties=dict[str, dict[str, Any]], required=(list[str], []))
TOOL = shape(type=KIND, function=shape(name=NAME, parameters=(PARAMETERS, None)))
OPTIONS = """
    audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens metadata
    modalities n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_retention
    reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature
    tool_choice top_logprobs top_p user verbosity web_search_options
"""
ONLY = ConfigDict(extra="forbid")
ANY: dict[str, Any] = dict.fromkeys(OPTIONS.split(), (Any, None))
CHAT = shape(ONLY, model=TEXT, messages=some(MESSAGE), tools=(some(TOOL), []), **ANY)
EMBEDDING = shape(ONLY, model=TEXT, input=TEXT | some(TEXT, 2048))  # no lists of tokens
NEEDS = {"tool_choice": "tools", "parallel_tool_calls": "tools", "stream_options": "stream"}


def check(body: Body, kind: Any = CHAT) -> None:
    """Refuse what OpenAI refuses of a request of that kind. Raises Refusal."""
    try:
        read = kind.model_validate(body)
    except ValidationError as error:
        raise Refusal(str(error)) from None
    for name, needed in NEEDS.items():
        demand(name not in body or body.get(needed), f"The '{name}' parameter is only allowed with '{needed}'.")
    for function in [tool["function"] for tool in body.get("tools", ())]:
        schema = {"type": "object", **function.get("parameters", {})}
        whole = set(schema.get("required", ())) <= schema.get("properties", {}).keys() and _is_typed(schema)
        demand(whole, f"Invalid schema for function '{function['name']}': {schema!r}")
    waiting: list[str] = []  # every tool call is answered at once and exactly once; nothing else is answered
    for message in getattr(read, "messages", ()):
        demand(message.content is not None or message.tool_calls, "a message without content and tool_calls")
        if message.role == "tool":
            demand(message.tool_call_id in waiting, f"no call waits for the tool's answer {message.tool_call_id!r}")
            waiting.remove(message.tool_call_id)
            continue
        demand(not waiting, f"the tool_call_ids {waiting} did not have response messages")
        demand(message.role == "assistant" or not message.tool_calls, f"tool_calls of the role {message.role!r}")
        waiting = [call.id for call in message.tool_calls]
        demand(len(set(waiting)) == len(waiting), f"ids of tool calls are not unique: {waiting}")
    demand(not waiting, f"the tool_call_ids {waiting} did not have response messages")


def _is_typed(schema: Any) -> bool:
    """Whether a type is known at every place: no array lacks its items, and nothing is empty or a reference."""
    inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
    inner += [schema["items"]] if "items" in schema else []
    is_known = schema.keys() & {"type", "anyOf", "enum"} and (schema.get("type") == "array") == ("items" in schema)
    return bool(is_known) and all(map(_is_typed, inner))


def demand(right: object, message: str) -> None:
    if not right:
        raise Refusal(message, "invalid_value")


# What particular endpoints want of a history, for `Endpoint.quirks`.


def suits(messages: list[Body]) -> dict[str, bool]:
    roles = [message["role"] for message in messages]
    called = [message for message in messages if "tool_calls" in message]
    calls = [call for message in called for call in message["tool_calls"]]
    said = [role for role, each in zip(roles, messages, strict=True) if role in "user assistant" and each not in called]
    firsts = [message["tool_calls"][0].get("extra_content", {}).get("google", {}) for message in called]
    signatures = [first.get("thought_signature") for first in firsts]
    fields = {name for part in (*messages, *calls) for name in part}
    return {
        "alternation": _takes_turns(said),  # as the template of Mistral 7B counts: without tool calls and results
        "no tool role": _takes_turns(roles[1:]) and roles[-1] == "user",
        "two roles": _takes_turns(roles) and roles[-1] == "user",  # as the template of the first Mistral 7B has it
        "user after tool": ("tool", "user") not in itertools.pairwise(roles),
        "no system role": "system" not in roles,
        "content or calls": not any(message.get("content") for message in called),
        "nine-character ids": all(re.fullmatch("[a-zA-Z0-9]{9}", call["id"]) for call in calls),
        "reasoning": {message.get("reasoning_content") for message in called} <= {"", "I think it over."},
        "signatures": set(signatures) <= {"c2lnbmVk", "skip_thought_signature_validator"},
        "known fields": fields <= {"role", "content", "tool_calls", "tool_call_id", "id", "type", "function"},
    }


def _takes_turns(roles: list[str]) -> bool:
    return roles != [] and roles == (["user", "assistant"] * len(roles))[: len(roles)]


KNOWN = "for 'role:assistant' the following must be satisfied[('messages.2' : property 'reasoning' is unsupported)]"
THINKS: Body = {"reasoning": "I think it over."}
QUIRKS: dict[str, tuple[int, str, Body]] = {  # the status and words of a refusal, and what its own replies have
    "alternation": (500, "After the optional system message, conversation roles must alternate", {}),
    "no tool role": (500, "Conversation roles must alternate user/assistant/user/assistant/...", {}),
    "two roles": (400, "Conversation roles must alternate user/assistant/user/assistant/...", {}),
    "user after tool": (400, "Unexpected role 'user' after role 'tool'", {}),
    "no system role": (500, "System role not supported", {}),
    "content or calls": (400, "Assistant message must have either content or tool_calls, but not both.", {}),
    "nine-character ids": (400, "Tool call id was x but must be a-z, A-Z, 0-9, with a length of 9.", {}),
    "reasoning": (400, "The `reasoning_content` in the thinking mode must be passed back to the API.", THINKS),
    "signatures": (400, "Function call is missing a thought_signature.", {"signature": "c2lnbmVk"}),
    "known fields": (400, KNOWN, THINKS | {"reasoning_field": "reasoning"}),
}


def prompt_tokens(body: Body) -> tuple[int, int]:
    """Tokens of the messages and of the tools, as characters / 4."""
    characters = 0
    for message in body["messages"]:
        characters += len(message.get("content") or "")
        for call in message.get("tool_calls", ()):
            characters += len(call["function"]["name"]) + len(call["function"]["arguments"])
    return characters // 4, len(_encode(body["tools"])) // 4 if "tools" in body else 0


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    raw: bytes


class Loopback:
    """What serves a free loopback port on the loop of a thread of its own, while the `with` block lasts."""

    def __enter__(self) -> Self:
        self._news, self._stack = threading.Condition(), contextlib.ExitStack()
        portal = self._stack.enter_context(start_blocking_portal())
        self._loop = portal.call(asyncio.get_running_loop)
        server = self._stack.enter_context(portal.wrap_async_context_manager(self._listening()))
        self.port: int = server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Reset every connection and free the port."""
        self._stack.close()

    def _listening(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """A server of asyncio or websockets that listens on 127.0.0.1; at the end its connections are ended."""
        raise NotImplementedError

    def _wait(self, holds: Callable[[], object], told: Callable[[], str]) -> None:
        """Block until a condition holds that news may have changed. Raises TimeoutError, with what is told then."""
        with self._news:
            if not self._news.wait_for(holds, 10):
                raise TimeoutError(told())


class Endpoint(Loopback):
    """An OpenAI-compatible endpoint on a free loopback port, while the `with` block lasts."""

    def __init__(self, models: Sequence[str] = ("test-model",), api_key: str | None = None) -> None:
        self.models, self.api_key = [{"id": name, "object": "model"} for name in models], api_key  # None: any key
        # What endpoints with such limits refuse is no fault of the client, so it is not among the `refusals`.
        self.context_window: int | None = None  # approximate tokens; None: any
        self.refuse: set[str] = set()  # names of parameters, such as stream_options, max_tokens, tools
        self.quirks: tuple[str, ...] = ()  # names of QUIRKS: what it wants of a history
        self.lessons: list[str] = []  # the quirks by which it refused requests
        self.dimension, self.synonyms = 32, dict[str, str]()  # of its embeddings; {"feline": "cat"}
        self.spoil: Callable[[list[Vector]], list[Any]] | None = None  # changes the vectors of an answer
        self.default: Answer = greet  # what answers when the script is over
        # In place of a whole route: overrides["/v1/embeddings"] = Reply(status=500). What is held, or has no
        # status or body of its own, answers as ever; a function gets the request, and None from it is no reply.
        self.overrides: dict[str, Reply | Callable[[Body], Reply | None]] = {}
        # Told of each request as it comes, and once it is answered or its client has left; in the endpoint's thread.
        self.watch: Callable[[Request, bool], None] = lambda request, is_over: None
        self.requests: list[Body] = []  # of chat, as they arrived, refused ones too; {} where it is no JSON
        self.bodies: list[bytes] = []  # the same as raw bytes
        self.headers: list[dict[str, str]] = []  # their headers, names in lower case
        self.embedding_requests: list[Body] = []  # the same of embeddings
        self.refusals: list[str] = []  # why requests were refused by the strict checks; a good client leaves it empty
        self._script: deque[Answer] = deque()
        self._fresh_ids = (self._id(number) for number in itertools.count(1))
        self._gates: set[asyncio.Event] = set()
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    def _id(self, number: int) -> str:
        return f"{number:09}" if "nine-character ids" in self.quirks else f"call_{number:024}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def script(self, *answers: Answer) -> None:
        """Queue answers for the requests to come; a refused request uses none."""
        self._script.extend(answers)

    def release(self) -> None:
        """Let every reply go on that is held or stalled, or will be: of all requests that have arrived so far."""
        self._loop.call_soon_threadsafe(self._open_gates)

    @property
    def embedded(self) -> list[str]:
        """All texts that were to be embedded, in order of arrival."""
        return [text for body in self.embedding_requests for text in _texts(body)]

    def wait_requests(self, count: int, of: Literal["requests", "embedding_requests"] = "requests") -> None:
        """Block until `count` such requests have arrived; on a loop, call it in a thread. Raises TimeoutError."""
        requests = getattr(self, of)
        self._wait(lambda: len(requests) >= count, lambda: f"{len(requests)} of {count} requests arrived")

    def _open_gates(self) -> None:
        for gate in self._gates:
            gate.set()
        self._gates.clear()

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[asyncio.Server]:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024)
        yield server
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
        self.watch(request, False)
        gate = asyncio.Event()
        self._gates.add(gate)  # before the request is seen to have arrived, so that no release() is missed
        try:
            reply, answer = self._route(request)
        except Refusal as refusal:
            reply, answer = Reply(status=refusal.status, body=refusal.body), {}
        try:
            stays = await _send(reply, answer, gate, (reader, writer))
        finally:
            self._gates.discard(gate)
            self.watch(request, True)
        return stays and request.headers.get("connection", "").lower() != "close"

    def _route(self, request: Request) -> tuple[Reply, Body | list[Body]]:
        """The reply to a request and its JSON. Raises Refusal."""
        routes: dict[str, Callable[[Body], tuple[Reply, Body | list[Body]]]] = {
            "POST /v1/chat/completions": self._chat,
            "POST /v1/embeddings": self._embed,
            "GET /v1/models": lambda _: (
                Reply(),
                {"object": "list", "data": self.models},
            ),
        }
        route = f"{request.method} {request.path}"
        body = self._record(request) if request.method == "POST" and route in routes else {}
        if self.api_key is not None and request.headers.get("authorization") != f"Bearer {self.api_key}":
            raise Refusal("Incorrect API key provided.", code="invalid_api_key", status=401)
        override = self.overrides.get(request.path)
        if callable(override):
            override = override(body)
        if override is not None and (override.status != 200 or override.body is not None):
            return override, {}
        if route not in routes:
            raise Refusal(f"Invalid URL ({route})", status=404)
        reply, answer = routes[route](body)
        return override or reply, answer

    def _record(self, request: Request) -> Body:
        """The body of a request, which is listed, and so is what is wrong with it. Raises Refusal."""
        body: Body = {}
        is_chat = request.path == "/v1/chat/completions"
        try:
            body = parse(request.raw)
            check(body, CHAT if is_chat else EMBEDDING)
        except Refusal as refusal:
            self.refusals.append(str(refusal))
            raise
        finally:
            with self._news:
                if is_chat:
                    self.bodies.append(request.raw)
                    self.headers.append(request.headers)
                (self.requests if is_chat else self.embedding_requests).append(body)
                self._news.notify_all()
        return body

    def _chat(self, body: Body) -> tuple[Reply, Body | list[Body]]:
        self._check_limits(body)
        answer = self._script.popleft() if self._script else self.default
        try:
            reply = answer if isinstance(answer, Reply) else answer(body)
        except Exception as error:  # a fault of the test's own code: show it there, keep the connection's task alive
            self.refusals.append(f"the script raised {error!r}")
            raise Refusal(self.refusals[-1], status=500) from error
        for name in self.quirks:
            reply = replace(reply, **QUIRKS[name][2])
        return reply, _answer(reply, body, self._fresh_ids)

    def _check_limits(self, body: Body) -> None:
        """Refuse what this endpoint was asked to refuse, in OpenAI's words."""
        for name in sorted(self.refuse & body.keys()):
            if name == "stream_options":
                raise Refusal("Unrecognized request argument supplied: stream_options")
            instead = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
            text = f"Unsupported parameter: '{name}' is not supported with this model.{instead}"
            raise Refusal(text, "unsupported_parameter")
        for name in self.quirks:
            status, text, _ = QUIRKS[name]
            if not suits(body["messages"])[name]:
                self.lessons.append(name)
                raise Refusal(text, status=status)
        tokens = sum(prompt_tokens(body))
        if self.context_window is not None and tokens > self.context_window:
            text = f"This model's maximum context length is {self.context_window} tokens. However, your messages "
            raise Refusal(f"{text}resulted in {tokens} tokens.", "context_length_exceeded")

    def _embed(self, body: Body) -> tuple[Reply, Body]:
        texts = _texts(body)
        vectors: list[Any] = [embedding(text, self.dimension, self.synonyms) for text in texts]
        if self.spoil is not None:
            vectors = self.spoil(vectors)
        data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        tokens = sum(map(len, texts)) // 4
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return Reply(), {"object": "list", "data": data, "model": body["model"], "usage": usage}


def _texts(body: Body) -> list[str]:
    given = body.get("input", [])
    return given if isinstance(given, list) else [given]


def embedding(text: str, dimension: int, synonyms: Mapping[str, str] | None = None) -> Vector:
    """A unit vector of hashed triples of letters: texts alike in letters point the same way, in every process."""
    words = [(synonyms or {}).get(word, word) for word in re.findall(r"\w+", text.lower())] or [text]
    triples = [f" {word} "[start : start + 3] for word in words for start in range(len(word))]
    digests = [hashlib.shake_256(triple.encode("utf-8", "replace")).digest(dimension) for triple in triples]
    vector = [sum(column) - 127.5 * len(digests) for column in zip(*digests, strict=True)]
    length = math.hypot(*vector)
    return [value / length for value in vector]


async def _read_request(reader: asyncio.StreamReader) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = line.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (each.partition(":") for each in fields)}
    return Request(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _send(reply: Reply, answer: Body | list[Body], gate: asyncio.Event, streams: Streams) -> bool:
    """Write one response; whether the connection stays open."""
    reader, writer = streams
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
    if reply.endless:
        stop = next(place for place, chunk in enumerate(answer) if chunk["choices"][0]["finish_reason"])
    head = _head(reply, "text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")
    begin = head + _http_chunks(events[:stop], reply.split)
    if reply.cut_after is not None:
        await _send_and_reset(writer, begin)
        return False
    writer.write(begin)
    while reply.endless and not writer.is_closing():
        writer.write(_http_chunks(events[stop - 1 : stop] * 10, None))
        await writer.drain()
    if reply.stall_after is not None and await _leaves(reader, gate.wait()):
        return False
    writer.write(_http_chunks(events[stop:], reply.split) + b"0\r\n\r\n")
    await writer.drain()
    return True


def _plain_response(reply: Reply, answer: Body | list[Body]) -> bytes:
    content: Any = answer if reply.body is None else reply.body
    if reply.body is None and reply.status != 200:
        content = {"error": {"message": _phrase(reply.status), "type": "server_error", "param": None, "code": None}}
    text = content if isinstance(content, str | bytes) else _encode(content)
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "backslashreplace")
    kind = "text/html" if isinstance(reply.body, str) else "application/json"
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
