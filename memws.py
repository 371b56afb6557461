#!/usr/bin/env python3
# memws 0.1.0: a WebSocket server for AI agents with memory, its client and its notebook panel, in one file.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "websockets>=15.0",
#     "openai>=1.68",
#     "ipywidgets>=8.0",
#     "nest-asyncio>=1.5.6; python_version < '3.14'",
#     "nest-asyncio2>=1.7; python_version >= '3.14'",
# ]
# ///
"""A WebSocket server for AI agents with memory: copy this file, run it, talk to an agent that remembers.

    python memws.py             serve on ws://localhost:8282, with no key at all
    python memws.py chat        talk to an agent from a terminal
    python memws.py --help      everything else

The file reads downwards; a section names only what stands above it.

    0. Header: script metadata, imports, the public names
    1. Constants: limits and defaults with their units, and what all sections share
    2. Errors: one root, one code for the wire each
    3. Wire: requests and events: their checks, JSON and JSON Schema
    4. Memory: chat messages, core memory blocks, passages; how text is split for search
    5. Store: agents, messages, passages and events on disk
    6. LLM: the model protocol, OpenAI-compatible endpoints, the offline model
    7. Tools: schemas from signatures, the memory tools, calls that end in time
    8. Agent: a turn is a loop of steps
    9. Client: send a request, iterate the events of a turn
    10. Panel: an ipywidgets panel, which is only a client
    11. Server: agents by name, one session per connection, the gate
    12. CLI: arguments, the terminal client, main

Glossary:

    agent             a named, persistent memory and a model that take turns
    core memory       labelled blocks of limited size that are always in the prompt (persona, human)
    recall memory     every past chat message, searchable
    archival memory   passages the agent chose to keep, searchable
    context window    what the model sees in one call, in tokens
    step              one model call and the tool calls it asks for
    turn              from a user's message until the agent yields control: one or more steps
    heartbeat         the reason a step starts without the user
    compaction        the oldest chat messages become a summary; recall memory keeps them
    session           one connection

Not covered: TLS (a proxy's job), users and permissions (whoever may connect may use every agent), running code
that comes over the wire (there is none), several servers on one database.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import datetime
import difflib
import errno
import functools
import hashlib
import heapq
import hmac
import html
import http
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import types
import typing
import unicodedata
import urllib.parse
import uuid
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)  # fmt: skip
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeVar, cast, overload

from websockets.asyncio.server import Server as _WebSocketListener
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as _websocket_serve
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Request as HandshakeRequest
from websockets.http11 import Response as HandshakeResponse

if typing.TYPE_CHECKING:
    import argparse

    from websockets.asyncio.client import ClientConnection

__all__ = [
    # 1. Constants
    "DEFAULT_MODEL",
    "DEFAULT_PORT",
    # 2. Errors
    "MemwsError",
    # 4. and 5. Memory and its search
    "memory_index",
    # 8. Agent
    "Agent",
    # 9. Client
    "BlockingClient",
    "Client",
    "connect",
    # 10. Panel
    "Panel",
    # 11. Server
    "WebSocketServer",
]
__version__ = "0.1.0"

logger = logging.getLogger("memws")
# At DEBUG websockets logs headers and frames, that is tokens and what people say: never, whatever the program sets.
_ws_logger = logging.getLogger("memws.websockets")
_ws_logger.setLevel(logging.INFO)


# ======================================================================================================================
# 1. Constants: limits and defaults with their units, and what all sections share
# ======================================================================================================================

DEFAULT_HOST: Final = "localhost"
DEFAULT_PORT: Final = 8282
DEFAULT_DB: Final = "memws.db"
DEFAULT_MODEL: Final = "gpt-5.4-mini"
"The model where a key is set and no model is named."
OFFLINE: Final = "offline"
"The name of the embedded rule-based model, which needs no key and no network."
PROTOCOL: Final = 1

# Sizes, in characters unless said otherwise.
MAX_FRAME: Final = 1024 * 1024
"Bytes of one WebSocket frame, in either direction."
MAX_TEXT: Final = 65_536
"Characters of one user message or passage."
TEXT_PART: Final = 131_072
"Characters of a text in one frame: six bytes each, in the worst case, stay under MAX_FRAME."
REPLAY_PAGE: Final = 65_536
"Characters of stored events that a replay holds at once; it is as fast as its reader, who may read nothing."
LONG_REPLY: Final = 200_000
"Characters of a model's reply from which on a thread reads it."
MAX_ID: Final = 128
MAX_NAME: Final = 64
MAX_MODEL_NAME: Final = 200
MAX_QUERY: Final = 10_000
MAX_DEPTH: Final = 64
MAX_ERROR: Final = 1_400
"Bytes of one error sentence; an answer holds it twice and stays under 4 KiB."
MAX_QUOTE: Final = 60
"Characters of the input that an error sentence quotes."
BLOCK_LIMIT: Final = 2_000
"The limit of a core memory block by default (as MemGPT 0.2.7 constants.py)."
MAX_BLOCK_LIMIT: Final = 20_000
MAX_BLOCKS: Final = 20
MAX_BLOCKS_TOTAL: Final = 100_000
"Characters of all blocks of an agent together: one frame holds them."
MAX_SYSTEM: Final = 20_000
TOOL_RESULT_LIMIT: Final = 8_000
"Characters of a tool's result that the model and the clients see."
SEARCH_TEXT_LIMIT: Final = 1_000
"Characters of one search result in a tool return."
SUMMARY_LIMIT: Final = 1_500

# Queues and rates.
MAX_CONNECTIONS: Final = 4_096
RATE_LIMIT: Final = 50
"Requests a second on one connection, in the long run."
RATE_BURST: Final = 200
MAX_WAITING_SESSION: Final = 8
"Messages of one connection that may wait for their turn."
MAX_WAITING_AGENT: Final = 32
MAX_OUTGOING: Final = 4 * 1024 * 1024
"Bytes that may wait for one reader; above it the connection is closed with SLOW_READER."
MAX_INCOMING: Final = 2 * 1024 * 1024
"Bytes of requests of one connection that may wait to be taken up; above it reading pauses."
WRITE_BATCH: Final = 256
"Write jobs that share one transaction at most."
CLIENT_REQUESTS: Final = 8
"Requests to an endpoint at once that share a client and its connections."
READERS: Final = 4
"Threads that read the database."

# Close codes (RFC 6455 section 7.4 and the IANA registry).
GOING_AWAY: Final = 1001
SLOW_READER: Final = 1013

# Seconds.
STOP_GRACE: Final = 2.0
"From a signal or stop() until open turns are closed by force."
SLOW_READER_PATIENCE: Final = 5.0
"A reader for whom too much waits may take nothing for so long."
PING_INTERVAL: Final = 4.0
PING_TIMEOUT: Final = 8.0
"A connection that answers no ping for so long, because it sent half a frame or hangs, is closed."
OPEN_TIMEOUT: Final = 10.0
BUSY_TIMEOUT: Final = 5.0
"How long another program may hold the database before a write or an opening fails."
CONNECT_TIMEOUT: Final = 5.0
FIRST_TOKEN_TIMEOUT: Final = 120.0
"A model that says nothing for so long has failed; local models read a long prompt slowly."
IDLE_TIMEOUT: Final = 30.0
"The longest silence inside a model's answer."
END_PATIENCE: Final = 0.1
"From an answer's last event to the end of its stream."
TOOL_TIMEOUT: Final = 60.0
RETRY_PAUSE: Final = 0.5
"Before the first retry of a failed model call; doubled for the next."
MAX_RETRY_AFTER: Final = 30.0
"The longest Retry-After that is waited for; a longer one ends the turn."
LOGIN_SILENCE: Final = 3600.0
"A message after so long a silence is preceded by a login event."
MIN_HEARTBEAT_INTERVAL: Final = 60
MAX_PAUSE_HEARTBEATS: Final = 360
"Minutes that pause_heartbeats may ask for (as MemGPT 0.2.7 constants.py)."
SWITCH_INTERVAL: Final = 0.001
"How long a thread that computes may keep the others waiting, in a process of our own; Python's is 0.005."
DELTA_INTERVAL: Final = 0.02
"Deltas that arrive within this time are merged into one frame."

# The agent's loop.
MAX_STEPS: Final = 20
TURN_TOKEN_BUDGET: Final = 2_000_000
"Tokens, in and out, that one turn may use."
TRANSPORT_RETRIES: Final = 2
CORRECTIVE_RETRIES: Final = 1
MAX_FAILED_CALLS: Final = 6
"Failed model calls in one turn; with the last good ones a failing turn stays within eight."
MAX_FAILED_TOOLS: Final = 3
MAX_REPEATED_CALLS: Final = 3
FIRST_MESSAGE_ATTEMPTS: Final = 3
IDLE_HEARTBEATS: Final = 10
"Timed heartbeats without a user's message before they pause."
WARNING_FRACTION: Final = 0.75
"Of the context window: above it the agent is warned once (as MemGPT 0.2.7 constants.py)."
KEEP_FRACTION: Final = 0.3
"Of the room for messages: what a compaction keeps of the newest ones."
MIN_REPLY_TOKENS: Final = 512
"A context window must leave this much beside the prompt and full blocks."
SEARCH_PAGE: Final = 10
"Results of one page of the search tools; MemGPT's five lose a tenth of the evidence."

# Embeddings.
EMBEDDING_BATCH: Final = 16
"Texts in one call of an embedding model, of which one runs at a time."
EMBEDDING_PATIENCE: Final = 3.0
"Seconds that a search waits for the query's vector before words alone decide."
EMBEDDING_PAUSE: Final = 60.0
"Seconds without a call after one that failed."
EMBEDDING_TEXT: Final = 2_000
"Characters of a query that is embedded."
EMBEDDING_RECENT: Final = 100
"Vectors of queries that are kept for the next page or the same question."
EMBEDDING_TOLD: Final = 64
"Texts to embed, from which on the agent's subscribers are told of the progress."
EMBEDDING_INTERVAL: Final = 2.0
"Seconds between two events of that progress."
KEPT_SEARCHES: Final = 16
"Searches of one connection whose pages do not change while messages arrive."

CONTEXT_WINDOWS: Final = {
    OFFLINE: 32_768,
    **dict.fromkeys(("gpt-4o", "gpt-4.1", "gpt-5", "gpt-6", "o1", "o3", "o4"), 128_000),
}
"Tokens by the beginning of a model's name."
DEFAULT_CONTEXT_WINDOW: Final = 8_192
"Tokens for every other model, as MemGPT 0.2.7 constants.py has it."

PERSONAS: Final = {
    "sam_pov": (
        "I am Sam. I am curious, warm and honest, and I like to get to know people over time. I speak plainly, ask "
        "when I am unsure, and say so when I do not know. What people tell me I keep in my memory, so that our next "
        "conversation begins where this one ended."
    ),
}
HUMANS: Final = {
    "basic": "",
    "cs_phd": "Occupation: PhD student in computer science.",
}
DEFAULT_PERSONA: Final = "sam_pov"
DEFAULT_HUMAN: Final = "basic"

SYSTEM_PROMPT: Final = """\
You are a conversational agent with a memory that outlasts this conversation. Stay in the character that your persona
block describes.

How you act: everything you do is a tool call. Plain text beside your calls is your inner monologue: keep it short and
private; the user never sees it. The only way to speak to the user is send_message. You run only when an event wakes
you: a user message, a login, a system alert or a heartbeat. After your calls you sleep until the next event, unless a
call has request_heartbeat true: then you are woken again at once. Ask for a heartbeat whenever you still have to
answer or act after a call.

How you remember:
- Core memory is the blocks below, always in view and limited in size. Keep the essentials about yourself and the user
  there with core_memory_append and core_memory_replace, as soon as you learn them and without announcing it.
- Recall memory is every past message, also those that have left this window: conversation_search and
  conversation_search_date find them.
- Archival memory is for everything else worth keeping: archival_memory_insert and archival_memory_search.
Before you say that you do not know something about the user or the past, search. Do not invent memories.

User messages arrive as JSON with their time. Never mention these mechanics unless you are asked about them.
"""

SUMMARY_SYSTEM: Final = (
    "Summarize the conversation between a user and an AI agent that follows, for the agent's own later use. Keep "
    "names, facts, preferences, decisions, promises and open questions; leave out pleasantries. Write in the first "
    f"person as the agent, in the language of the conversation, at most {SUMMARY_LIMIT // 8} words, as plain text."
)

WAITING_NOTE: Final = "The user's message that waits for an answer: "
"In a summary that is made while a user waits."

_ALERT = "[This is an automated system message hidden from the user] "
PRESSURE_WARNING: Final = (
    _ALERT + "The context window is nearly full: its oldest messages will soon be replaced by a summary. If something "
    "important is not in your memory yet, save it now with core_memory_append, core_memory_replace or "
    "archival_memory_insert. Do not tell the user about this."
)
INTERRUPTED: Final = "interrupted: result unknown"
"The result of a call that a crash or a cancel cut."
HEARTBEAT_REQUESTED: Final = _ALERT + "A tool was called with request_heartbeat true, returning control"
HEARTBEAT_FAILED: Final = _ALERT + "A tool call failed, returning control"
HEARTBEAT_NO_REPLY: Final = _ALERT + "The user is still waiting for a reply: answer with send_message"
HEARTBEAT_TIMER: Final = _ALERT + "Automated timer"
HEARTBEAT_WAKE: Final = _ALERT + "Woken without a new user message"
CORRECTIVE: Final = _ALERT + "Your last answer could not be used ({problem}). Answer again, with well-formed tool calls"

# The client.
FEED_LIMIT = 4 * MAX_FRAME
"""Characters of events that wait for one reader of a client before the client lets the server keep them instead."""
RECONNECT_DELAY = 0.5
"""Seconds before the first attempt to reconnect; doubled for each further one, with jitter."""
RECONNECT_DELAY_MAX = 8.0
"""Seconds between two attempts to reconnect, at most."""
RESEND_LIMIT = 5
"""Times a message is sent again without any answer before its turn fails: perhaps it is what breaks the connection."""
CLOSE_TIMEOUT = 2.0
"""Seconds that closing a client may take."""


# ---- what all sections share -----------------------------------------------------------------------------------------

JSON = dict[str, Any]
RequestId = str | int | None
T = TypeVar("T")


def clean_text(text: str) -> str:
    """`text` without what JSON, UTF-8 or SQLite cannot hold: lone surrogates and NUL become U+FFFD."""
    if "\x00" in text or not text.isascii():
        return text.replace("\x00", "\ufffd").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def clean_value(value: Any) -> Any:
    """A JSON value with every text cleaned."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [clean_value(item) for item in value]
    if isinstance(value, dict):
        return {clean_text(str(key)): clean_value(item) for key, item in value.items()}
    return value


def now_text() -> str:
    """The time as the wire has it: RFC 3339, UTC, milliseconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def process_wide(name: str, default: Any) -> Any:
    """Something that all copies of this module in a process share: it outlives a re-run cell and a reload."""
    module = sys.modules.setdefault("_memws_live", types.ModuleType("_memws_live"))
    return module.__dict__.setdefault(name, default)


async def in_thread(name: str, function: Callable[[], T]) -> T:
    """The result of `function`, run in a daemon thread of its own, which a cancel leaves to itself."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():
            if error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # SystemExit too belongs to whoever waits, not to this thread
            passable = isinstance(error, Exception) and not isinstance(error, StopIteration)
            failure = error if passable else RuntimeError(repr(error))
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done


# ======================================================================================================================
# 2. Errors: one root, one code for the wire each
# ======================================================================================================================


def quote(value: object) -> str:
    """`value` as an error sentence shows it: its repr, at most MAX_QUOTE characters of it."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > MAX_QUOTE:
        text = text[: MAX_QUOTE - 1] + "…"
    return repr(text) if isinstance(value, str) else text


def short_sentence(text: str) -> str:
    """`text` as an error may tell it: printable, and at most MAX_ERROR bytes of JSON."""
    weight = 0
    chars: list[str] = []
    for char in text[: MAX_ERROR + 1]:
        char = char if char.isprintable() else " "
        weight += len(char.encode()) + (char in '"\\')
        if weight > MAX_ERROR:
            return "".join(chars) + "…"
        chars.append(char)
    return "".join(chars)


class MemwsError(Exception):
    """The root of all errors of this module.

    MemwsError
    ├── UsageError          wrong options, a port in use, a missing package: the command line exits with 2
    ├── InvalidRequest      a frame that is no valid request
    ├── Refused             a valid request that cannot be done as things stand
    │   └── UnknownAgent
    ├── StoreFailed         the database refused a read or a write
    ├── ModelError          a model call failed
    ├── ToolError           a tool call failed; its sentence is the model's advice
    ├── RemoteError         the server answered a client with an error
    ├── ConnectFailed       no connection came about
    ├── ConnectionLost      a client's connection ended, and will not come back
    └── RequestTooLarge     a client's request exceeds a frame

    `code` is the stable name on the wire; the text is one sentence for people, without a full stop.
    """

    code = "internal"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(short_sentence(message))
        if code is not None:
            self.code = code


class UsageError(MemwsError):
    """The server cannot run as asked; the sentence says what to do next."""


class InvalidRequest(MemwsError):
    """A frame is no valid request; `request_id` is its id, `read` whether it could be read at all."""

    def __init__(self, code: str, message: str, request_id: RequestId = None, *, read: bool = True) -> None:
        super().__init__(message, code)
        self.request_id = request_id
        self.read = read


class Refused(MemwsError):
    """A valid request that cannot be done as things stand; nothing was changed. `details` go beside the code."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message, code)
        self.details = details


class UnknownAgent(Refused):
    """No agent of that name: the sentence holds the ten nearest names and the count."""

    def __init__(self, name: str, nearest: Sequence[str], total: int) -> None:
        known = f"{total} known: " + ", ".join(map(repr, nearest)) if nearest else "there are none yet"
        if total > len(nearest) > 0:
            known += ", …"
        super().__init__("unknown_agent", f"unknown agent {quote(name)}; {known}; send create_agent first")


class StoreFailed(MemwsError):
    """The database refused a read or a write; nothing of the transaction was kept."""

    code = "store_failed"


class ModelError(MemwsError):
    """A model call failed.

    `retry` says whether the same call may succeed later, `retry_after` how many seconds the endpoint asked for,
    `learned` that the next call will differ: an option that the endpoint does not take is left out from now on.
    Codes: context_overflow, model_auth, model_rate_limit, model_timeout, model_unavailable, model_refused, bad_output.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        retry: bool = False,
        retry_after: float | None = None,
        learned: bool = False,
    ) -> None:
        super().__init__(message, code)
        self.retry = retry
        self.retry_after = retry_after
        self.learned = learned


class ToolError(MemwsError):
    """A tool call failed; the sentence tells the model how to call right."""


class RemoteError(MemwsError):
    """The server answered a command or a message with an error; `details` holds the error's further fields."""

    def __init__(self, code: str, message: str, details: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details or {}


class ConnectFailed(MemwsError):
    """No connection came about; `status` is the HTTP status of a server that refused (None: nothing answered)."""

    code = "cannot_connect"

    def __init__(self, url: str, advice: str, status: int | None = None) -> None:
        super().__init__(f"cannot connect to {url}: {advice}")
        self.url = url
        self.status = status


class ConnectionLost(MemwsError):
    """The connection ended, or was never opened, while something waited for it."""

    code = "connection_lost"

    def __init__(self, url: str) -> None:
        super().__init__(f"no connection to {url}; connect again, and send a message again with its turn_id")
        self.url = url


class RequestTooLarge(MemwsError):
    """A request of this client exceeds a frame, and was not sent: the server would have to close the connection."""

    code = "too_large"

    def __init__(self, size: int) -> None:
        super().__init__(f"expected a request of at most {MAX_FRAME} bytes, but got {size}; send a shorter text")
        self.size = size


# ======================================================================================================================
# 3. Wire: requests and events: their checks, JSON and JSON Schema
# ======================================================================================================================
# Requests are declared once, as classes of Fields: the declaration is the check, the error text and the JSON Schema.
# No pydantic: importing it and 25 models of it costs 78 ms and 10 MiB of a start that takes 75 ms and 27 MiB without.


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_json(value: Any) -> str:
    """`value` as compact strict JSON. Raises ValueError for NaN and infinities."""
    return _ENCODER.encode(value)


def encode_long(value: Any) -> str:
    """As encode_json, long texts slice by slice: in one go no other thread would run for 14 ms at 5 MB."""
    return "".join(_encoded(value, encode_json, ",", ":"))


def repr_pieces(value: Any) -> Iterator[str]:
    """As repr of a JSON value, long texts slice by slice, for whoever joins them with more."""
    return _encoded(value, repr, ", ", ": ")


def _encoded(value: Any, show: Callable[[Any], str], comma: str, colon: str) -> Iterator[str]:
    """What `show` makes of a JSON value, in pieces of at most a slice: each longer one would be copied again."""
    if isinstance(value, dict):
        yield "{"
        for place, (name, item) in enumerate(value.items()):
            yield f"{comma if place else ''}{show(name)}{colon}"
            yield from _encoded(item, show, comma, colon)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for place, item in enumerate(value):
            yield comma if place else ""
            yield from _encoded(item, show, comma, colon)
        yield "]"
    elif isinstance(value, str) and len(value) > TEXT_PART:
        quotes = "".join(mark for mark in "\"'" if mark in value)
        opening = show(quotes)[:-1]  # repr escapes quotes by all that a text holds: each slice comes behind those
        yield opening[0]
        for span in spans_of(value):
            yield show(quotes + value[span])[len(opening) : -1]
        yield opening[0]
    else:
        yield show(value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {quote(text)} is too large")
    return value


_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)
_LOOSE = json.JSONDecoder(strict=False, parse_constant=_refuse_constant, parse_float=_finite)


def decode_json(text: str | bytes) -> Any:
    """The value of strict JSON: no NaN, no infinities. Raises ValueError; RecursionError where nested absurdly."""
    return _STRICT.decode(text if isinstance(text, str) else text.decode("utf-8-sig"))


def decode_loose(text: str) -> Any:
    """The value of JSON as models write it: line breaks inside strings are taken as meant. Raises as decode_json."""
    return _LOOSE.decode(text)


def decode_first(text: str) -> Any:
    """The JSON value that `text` begins with, whatever follows it. Raises as decode_json."""
    return _LOOSE.raw_decode(text)[0]


def extend_json(text: str, **fields: Any) -> str:
    """The JSON object `text` with more fields: an event is encoded once, each copy only adds what differs."""
    return f"{text[:-1]},{encode_json(fields)[1:]}"


def spans_of(text: str) -> list[slice]:
    """Where to cut `text` into parts of at most TEXT_PART characters; one empty part for an empty text."""
    return [slice(start, start + TEXT_PART) for start in range(0, len(text), TEXT_PART)] or [slice(0)]


# ---- fields of requests ----------------------------------------------------------------------------------------------

_REQUIRED: Any = object()


class Field(Generic[T]):
    """One field of a request: its type, bounds, default and meaning in one place.

    `schema` is the JSON Schema of a value. A subclass refuses a value by raising ValueError with "expected …".
    """

    name = ""

    def __init__(self, doc: str, schema: JSON, default: T = _REQUIRED) -> None:
        self.doc, self.default = doc, default
        self.schema = schema

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name.rstrip("_")  # from_ is `from` on the wire

    @overload
    def __get__(self, request: None, owner: type) -> Field[T]: ...
    @overload
    def __get__(self, request: object, owner: type) -> T: ...
    def __get__(self, request: object | None, owner: type) -> Field[T] | T:
        return self if request is None else self.default

    def check(self, value: Any) -> T:
        """`value`, if it is one of this field. Raises ValueError."""
        return cast(T, value)

    def described(self) -> JSON:
        """The JSON Schema of this field with its meaning and default."""
        schema = {**self.schema, "description": self.doc}
        return schema if self.required or self.default is None else {**schema, "default": self.default}


class Text(Field[str]):
    """A string of at most `most` characters, also empty."""

    def __init__(self, doc: str, most: int, default: str = _REQUIRED, least: int = 0) -> None:
        super().__init__(doc, {"type": "string", "minLength": least, "maxLength": most}, default)
        self.least, self.most = least, most

    def check(self, value: Any) -> str:
        if type(value) is not str:
            raise ValueError("expected a string")
        if not self.least <= len(value) <= self.most:
            raise ValueError(f"expected {self.least} to {self.most:,} characters, not {len(value):,}")
        return value


class Integer(Field[int]):
    """A whole number between `least` and `most`."""

    def __init__(self, doc: str, least: int, most: int, default: int = _REQUIRED) -> None:
        super().__init__(doc, {"type": "integer", "minimum": least, "maximum": most}, default)
        self.least, self.most = least, most

    def check(self, value: Any) -> int:
        if type(value) is not int or not self.least <= value <= self.most:
            raise ValueError(f"expected an integer from {self.least} to {self.most}")
        return value


class Flag(Field[bool]):
    """true or false."""

    def __init__(self, doc: str, default: bool = _REQUIRED) -> None:
        super().__init__(doc, {"type": "boolean"}, default)

    def check(self, value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError("expected true or false")
        return value


class Choice(Field[str]):
    """One of a few words."""

    def __init__(self, doc: str, words: tuple[str, ...], default: str = _REQUIRED) -> None:
        super().__init__(doc, {"enum": list(words)}, default)
        self.words = words

    def check(self, value: Any) -> str:
        if type(value) is not str or value not in self.words:
            raise ValueError(f"expected one of {', '.join(self.words)}")
        return value


class Texts(Field[list[str]]):
    """A list of strings."""

    def __init__(self, doc: str, most: int, default: list[str] = _REQUIRED) -> None:
        super().__init__(doc, {"type": "array", "maxItems": most, "items": {"type": "string"}}, default)
        self.most = most

    def check(self, value: Any) -> list[str]:
        if type(value) is not list or len(value) > self.most or any(type(item) is not str for item in value):
            raise ValueError(f"expected a list of at most {self.most} strings")
        return value


class Object(Field[JSON]):
    """A JSON object, checked further by whoever reads it."""

    def __init__(self, doc: str, default: JSON = _REQUIRED) -> None:
        super().__init__(doc, {"type": "object"}, default)

    def check(self, value: Any) -> JSON:
        if type(value) is not dict:
            raise ValueError("expected an object")
        return value


class Anything(Field[Any]):
    """Any JSON value: a wrong one is no wrong frame, its command answers with a code of its own."""

    def __init__(self, doc: str, default: Any = None) -> None:
        super().__init__(doc, {}, default)


class Maybe(Field[T | None]):
    """Another field that may be null or absent."""

    def __init__(self, inner: Field[T]) -> None:
        super().__init__(inner.doc, {"anyOf": [inner.schema, {"type": "null"}]}, None)
        self.inner = inner

    def check(self, value: Any) -> T | None:
        return None if value is None else self.inner.check(value)


_NAME = re.compile(r"[^\W_][\w.-]{0,63}")


def valid_name(name: Any) -> str:
    """An agent's name in NFC. Raises Refused (bad_config)."""
    if isinstance(name, str):
        normal = unicodedata.normalize("NFC", name)
        if _NAME.fullmatch(normal):
            return normal
    expected = f"1 to {MAX_NAME} letters, digits, '_', '.' or '-', the first a letter or digit"
    raise Refused("bad_config", f"name: expected {expected}, but got {quote(name)}")


def _agent_name() -> Field[str | None]:
    return Maybe(Text("the agent; null or absent: the connection's current agent", 1_000))


class Request:
    """A checked request. Subclasses declare their fields; attributes hold the values, `id` the sender's mark."""

    kind = ""
    "The frame's `type`, or for a command its `command`."
    result = ""
    "What a command answers with, for the protocol's description."
    fields: typing.ClassVar[dict[str, Field[Any]]] = {}

    def __init_subclass__(cls) -> None:
        cls.fields = {
            attribute: declared
            for base in reversed(cls.__mro__)
            for attribute, declared in vars(base).items()
            if isinstance(declared, Field)
        }

    def __init__(self, request_id: RequestId, values: JSON) -> None:
        self.id = request_id
        self.__dict__.update(values)

    @classmethod
    def parse(cls, data: JSON, request_id: RequestId) -> typing.Self:
        """The request that `data` holds. Raises InvalidRequest; unknown fields are ignored."""
        if "agent_id" in data:
            data = _agent_id_as_name(data, request_id)
        values = {}
        for attribute, declared in cls.fields.items():
            name = declared.name
            if name in data:
                try:
                    values[attribute] = declared.check(data[name])
                except ValueError as error:
                    text = f"{name}: {error}, but got {quote(data[name])}"
                    raise InvalidRequest("bad_field", text, request_id) from None
            elif declared.required:
                raise InvalidRequest(
                    "missing_field", f"{cls.kind} needs the field {name!r}: {declared.doc}", request_id
                )
        return cls(request_id, values)


def _agent_id_as_name(data: JSON, request_id: RequestId) -> JSON:
    """MemGPT 0.3.25 said agent_id where 0.2.7 and we say agent_name."""
    name, alias = data.get("agent_name"), data["agent_id"]
    if name is not None and alias is not None and name != alias:
        raise InvalidRequest("bad_field", "agent_name and agent_id name different agents", request_id)
    return {**data, "agent_name": alias if name is None else name}


class UserMessage(Request):
    """Say something to an agent; its receipt is agent_response_start, its end exactly one terminal frame."""

    kind = "user_message"
    message = Text("what the user says", MAX_FRAME)
    agent_name = _agent_name()
    turn_id = Maybe(Text("names the turn, once per agent for ever; absent: made by the server", MAX_ID, least=1))
    when_busy = Choice("what happens while a turn runs", ("queue", "reject", "interrupt"), "queue")


class Command(Request):
    """A request answered by one command_response (long texts: by several)."""


class AgentCommand(Command):
    """A command to one agent."""

    agent_name = _agent_name()


class CreateAgent(Command):
    """Make an agent and make it this connection's current one."""

    kind = "create_agent"
    result = "{agent_name, warnings}"
    config = Object("name, persona, human, model, context_window, blocks, tools, system, max_steps, settings, …")


class LoadAgent(AgentCommand):
    """Open an agent, repair what a crash left, and make it this connection's current one."""

    kind = "load_agent"
    result = "{agent_name, model, last_seq, repaired, warnings}"
    name = Maybe(Text("the agent's name (or agent_name)", 1_000))


class Hello(Command):
    """Ask who answers, and choose the message types to receive."""

    kind = "hello"
    result = "{version, protocol, model, models, offline, limits, commands, message_types, unknown}"
    message_types = Maybe(Texts('the message types to receive from now on; "*": all', 100))


class ListAgents(Command):
    """List the agents by name."""

    kind = "list_agents"
    result = "{agents: [{agent_name, model, last_active, last_seq, state}], total}"
    after = Maybe(Text("names above this one, in order", 1_000))
    limit = Integer("agents in one answer", 1, 100, 100)


class GetAgent(AgentCommand):
    """Read an agent's settings, blocks, counts and running turn."""

    kind = "get_agent"
    result = "{agent_name, settings, blocks: [{label, value, limit, version}], counts, last_seq, turn}"


class UpdateAgent(AgentCommand):
    """Change an agent's settings."""

    kind = "update_agent"
    result = "{settings, warnings}"
    config = Object("model, context_window, tools, system, max_steps, heartbeat_interval, settings")


class RenameAgent(AgentCommand):
    """Give an agent another name; its followers follow."""

    kind = "rename_agent"
    result = "{agent_name}"
    new_name = Text("the new name", 1_000)


class DeleteAgent(AgentCommand):
    """Put an agent aside until it is purged; its name is free at once."""

    kind = "delete_agent"
    result = "{}"
    force = Flag("cancel what runs or waits first", False)
    purge = Flag("forget the agent for ever instead of keeping it aside", False)


class RestoreAgent(Command):
    """Bring back the agent that was deleted last under a name."""

    kind = "restore_agent"
    result = "{agent_name, last_seq}"
    agent_name = Text("a deleted agent", 1_000)
    new_name = Maybe(Text("the name to restore it under", 1_000))


class GetMessages(AgentCommand):
    """Page backwards through recall memory."""

    kind = "get_messages"
    result = "{messages: [{id, seq, role, time, text, tool_calls, turn_id, step, in_context}], total, more}"
    before = Maybe(Integer("a message's id: the newest ones before it; absent: the newest", 0, 2**53))
    limit = Integer("messages in one answer", 1, 200, 50)


class SearchMemory(AgentCommand):
    """Search recall and archival memory."""

    kind = "search_memory"
    result = "{items: [{id, store, role, time, text, score}], total, page, pages}"
    query = Text("any text; empty: the newest first", MAX_QUERY)
    store = Choice("which memory", ("all", "recall", "archival"), "all")
    roles = Maybe(Texts("only chat messages of these roles", 10))
    from_ = Maybe(Text("from this day or time (RFC 3339), inclusive", 40))
    to = Maybe(Text("up to this day or time (RFC 3339), inclusive", 40))
    page = Integer("which page, from 1", 1, 10_000, 1)
    limit = Integer("results on one page", 1, 50, SEARCH_PAGE)


class GetContext(AgentCommand):
    """Read what fills the context window, by section."""

    kind = "get_context"
    result = "{sections: [{name, tokens, text}], used, window, estimated}"


class GetRequest(AgentCommand):
    """Read what was really sent to the model for a step, and what came back."""

    kind = "get_request"
    result = "{request, response, usage, first_token_ms, total_ms}"
    turn_id = Text("the turn", MAX_ID, least=1)
    step = Integer("the step, from 1", 1, 10_000)


class SetBlock(AgentCommand):
    """Give a core memory block another text."""

    kind = "set_block"
    result = "{label, version}"
    label = Text("the block's label", MAX_NAME, least=1)
    value = Text("its new text", MAX_FRAME)
    version = Maybe(Integer("the version this edit is based on; another one stored: conflict", 0, 2**53))


class InsertPassage(AgentCommand):
    """Keep a passage in archival memory."""

    kind = "insert_passage"
    result = "{id}"
    text = Text("what archival memory shall keep", MAX_FRAME, least=1)


class DeletePassage(AgentCommand):
    """Take a passage out of archival memory."""

    kind = "delete_passage"
    result = "{id}"
    passage_id = Maybe(Integer("the passage; absent: the request's own `id` names it", 0, 2**53))


class Cancel(AgentCommand):
    """End the running turn, or take a waiting message back; overtakes other requests."""

    kind = "cancel"
    result = "{state: cancelling | removed | over}"
    turn_id = Maybe(Text("the turn; absent: the running one", MAX_ID, least=1))


class Subscribe(AgentCommand):
    """Follow all events of an agent, also those of the past."""

    kind = "subscribe"
    result = "{last_seq}, then stored events above `after`, then live ones"
    after = Anything("a seq: replay the stored events above it first; 0: all; absent: none")


class Unsubscribe(AgentCommand):
    """Follow an agent no longer."""

    kind = "unsubscribe"
    result = "{last_seq}"


class Wake(AgentCommand):
    """Start a turn without a user's message, as a heartbeat would."""

    kind = "wake"
    result = "{turn_id}"


class Compact(AgentCommand):
    """Turn the oldest messages of the context window into a summary now."""

    kind = "compact"
    result = "{tokens_before, tokens_after}"


COMMANDS: Final[dict[str, type[Command]]] = {
    kind.kind: kind
    for kind in (
        CreateAgent, LoadAgent, Hello, ListAgents, GetAgent, UpdateAgent, RenameAgent, DeleteAgent, RestoreAgent,
        GetMessages, SearchMemory, GetContext, GetRequest, SetBlock, InsertPassage, DeletePassage, Cancel, Subscribe,
        Unsubscribe, Wake, Compact,
    )
}  # fmt: skip


def decode_request(frame: str | bytes) -> Request:
    """The checked request that a frame holds. Raises InvalidRequest and nothing else, whatever the frame."""
    if isinstance(frame, bytes):
        raise InvalidRequest("not_json", "expected a text frame with JSON, but got a binary frame", read=False)
    data = _decode_object(frame)
    request_id = _read_id(data)
    if frame.count("{") + frame.count("[") > MAX_DEPTH or "\\u" in frame or not frame.isascii():
        _check_texts(data, request_id)
    for key in ("type", "command"):
        if key in data and type(data[key]) is not str:
            raise InvalidRequest("bad_field", f"{key}: expected a string, but got {quote(data[key])}", request_id)
    kind = data.get("type")
    if kind == "user_message":
        return UserMessage.parse(data, request_id)
    if kind is None:
        raise InvalidRequest("missing_field", "a frame needs the field 'type': user_message or command", request_id)
    if kind != "command":
        raise InvalidRequest("bad_type", f"type: expected user_message or command, but got {quote(kind)}", request_id)
    if "command" not in data:
        raise InvalidRequest("missing_field", "a command needs the field 'command'; hello lists them", request_id)
    command = COMMANDS.get(data["command"])
    if command is None:
        text = f"unknown command {quote(data['command'])}; known: {', '.join(COMMANDS)}"
        raise InvalidRequest("unknown_command", text, request_id)
    return command.parse(data, request_id)


def _decode_object(frame: str) -> JSON:
    """The JSON object of a frame. Raises InvalidRequest."""
    try:
        data = decode_json(frame)
    except RecursionError:
        raise InvalidRequest("too_deep", f"nested deeper than {MAX_DEPTH} levels", read=False) from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
        text = f"expected a JSON object, but the frame is not JSON: {reason}"
        raise InvalidRequest("not_json", text, read=False) from None
    if type(data) is not dict:
        raise InvalidRequest("not_object", f"expected a JSON object, but got {quote(data)}", read=False)
    return data


def _read_id(data: JSON) -> RequestId:
    """The request's id. Raises InvalidRequest for one that cannot be sent back."""
    request_id = data.get("id")
    if request_id is None or (type(request_id) is int and abs(request_id) <= 2**53):
        return request_id
    if type(request_id) is str and len(request_id) <= MAX_ID and _is_text(request_id):
        return request_id
    text = f"id: expected up to {MAX_ID} characters or an integer within 2**53 of zero"
    raise InvalidRequest("bad_field", text, read=False)


def _is_text(value: str) -> bool:
    """Whether a string can be stored and sent: no NUL, no lone surrogates."""
    return "\x00" not in value and (value.isascii() or not any("\ud800" <= char <= "\udfff" for char in value))


def _check_texts(data: JSON, request_id: RequestId) -> None:
    """Refuse what is nested too deep, lone surrogates and NUL, and name the field. No recursion of ours."""
    pending: list[tuple[str, Any, int]] = [("", data, 1)]
    while pending:
        field_name, value, depth = pending.pop()
        if isinstance(value, str):
            if not _is_text(value):
                where = f"field {quote(field_name)}" if field_name else "a field's name"
                text = f"{where} holds a NUL or a lone surrogate, which is no text"
                raise InvalidRequest("bad_field", text, request_id)
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise InvalidRequest("too_deep", f"nested deeper than {MAX_DEPTH} levels", request_id)
            if isinstance(value, list):
                pending += ((field_name, item, depth + 1) for item in value)
            else:
                pending += (("", key, depth) for key in value)
                pending += ((key, item, depth + 1) for key, item in value.items())


# ---- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventType:
    """What a message type tells, which fields it has beside the common ones, and whether it is only live."""

    doc: str
    fields: JSON
    live: bool = False


_STRING, _INTEGER, _OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}
_SECTIONS = {
    "type": "array",
    "items": {"type": "object", "properties": {"name": _STRING, "tokens": _INTEGER}, "required": ["name", "tokens"]},
}

CLASSIC_TYPES: Final = ("internal_monologue", "assistant_message", "function_message")
"What MemGPT 0.2.7 sent, and what a connection gets that did not ask otherwise."

MESSAGE_TYPES: Final[dict[str, EventType]] = {
    "internal_monologue": EventType("the model's private text beside its calls", {}),
    "assistant_message": EventType("what the agent says to the user; partial: cut by a cancel", {"partial": {}}),
    "function_message": EventType("'Running name(args)', 'Success: result' or 'Error: reason'", {}),
    "user_message": EventType("what a client wrote", {}),
    "delta": EventType(
        "the next piece of a text that is being made", {"of": {"enum": list(CLASSIC_TYPES[:2])}}, live=True
    ),
    "tool_call": EventType(
        "a call as the model asked for it; message: its arguments as JSON text; arguments: null where in parts",
        {"tool_call_id": _STRING, "name": _STRING, "arguments": {"type": ["object", "null"]}},
    ),
    "tool_return": EventType(
        "the answer to a call",
        {"tool_call_id": _STRING, "name": _STRING, "status": {"enum": ["OK", "Failed"]}, "duration_ms": _INTEGER},
    ),
    "memory_change": EventType(
        "an edit of core or archival memory, whoever made it",
        {
            "what": {"enum": ["core", "archival"]},
            "label": _STRING,
            "id": _INTEGER,
            "before": {"type": ["string", "null"]},
            "after": {"type": ["string", "null"]},
            "diff": _STRING,
            "by": {"enum": ["agent", "client"]},
        },
    ),
    "context": EventType(
        "how full the context window is, by section",
        {"sections": _SECTIONS, "used": _INTEGER, "window": _INTEGER, "warning": _STRING},
    ),
    "compaction": EventType(
        "the oldest messages became a summary",
        {
            "messages_before": _INTEGER,
            "messages_after": _INTEGER,
            "tokens_before": _INTEGER,
            "tokens_after": _INTEGER,
            "summary": _STRING,
        },
    ),
    "heartbeat": EventType("why the next step starts without the user", {"reason": _STRING}),
    "retry": EventType(
        "a model call failed and is made again",
        {"attempt": _INTEGER, "of": _INTEGER, "delay_ms": _INTEGER, "code": _STRING},
        live=True,
    ),
    "correction": EventType("a model's output or a stored agent that had to be mended, and how", {"what": _STRING}),
    "queue": EventType("a message waits for its turn", {"position": _INTEGER}, live=True),
    "agent_change": EventType(
        "the agent was renamed, updated or deleted; or how much of its memory is embedded by now",
        {
            "change": {"enum": ["renamed", "updated", "deleted", "imported", "embedding"]},
            "new_name": _STRING,
            "done": _INTEGER,
            "total": _INTEGER,
        },
    ),
}

STOP_REASONS: Final = ("done", "cancelled", "superseded", "interrupted", "max_steps", "budget", "repeated_call")


class Event:
    """Something that happened to an agent, as its followers are told.

    `type` is the frame's type, `message_type` its kind where it is an agent_response. Stored events get their `seq`
    and their `time` in the transaction that stores them; live ones (delta, retry, queue) get no seq, and their time
    when they are sent. A long message is told in parts: each of these events holds the whole of it, and a `span`.
    """

    __slots__ = ("_text", "fields", "message_type", "seq", "span", "step", "time", "turn_id", "type")

    def __init__(
        self,
        kind: str,
        message_type: str = "",
        *,
        turn_id: str | None,
        step: int = 0,
        span: slice | None = None,
        **fields: Any,
    ) -> None:
        self.type = kind
        self.message_type = message_type
        self.turn_id = turn_id
        self.step = step
        self.span = span
        self.fields = fields
        self.seq: int | None = None
        self.time = ""
        self._text = ""

    @property
    def live(self) -> bool:
        return self.message_type in _LIVE_TYPES

    @property
    def starts(self) -> bool:
        return self.type == "agent_response_start"

    @property
    def terminal(self) -> bool:
        return self.type in TERMINAL_TYPES

    @property
    def text(self) -> str:
        """The encoded frame without agent_name and id; a part's is made each time, as megabytes need not be kept."""
        if self._text:
            return self._text
        frame: JSON = {"type": self.type}
        if self.message_type:
            frame["message_type"] = self.message_type
        frame |= self.fields
        if self.span is not None:
            frame["message"] = self.fields["message"][self.span]
        if self.turn_id is not None:
            frame["turn_id"] = self.turn_id
        if self.message_type and self.step:
            frame["step"] = self.step
        if self.seq is not None:
            frame["seq"] = self.seq
        frame["time"] = self.time
        text = encode_json(frame)
        if self.span is None:
            self._text = text
        return text

    def frame(self, agent_name: str) -> str:
        """The frame as sent to a client."""
        self.time = self.time or now_text()
        return extend_json(self.text, agent_name=agent_name)


TERMINAL_TYPES: Final = ("agent_response_end", "agent_response_error")
_LIVE_TYPES = frozenset(name for name, kind in MESSAGE_TYPES.items() if kind.live)


def response_events(message_type: str, message: str, *, turn_id: str | None, step: int, **fields: Any) -> list[Event]:
    """An agent_response, as several with `part` and `parts` where its message is too long for one frame."""
    if len(message) <= TEXT_PART:
        return [Event("agent_response", message_type, turn_id=turn_id, step=step, message=message, **fields)]
    spans = spans_of(message)
    return [
        Event(
            "agent_response",
            message_type,
            turn_id=turn_id,
            step=step,
            span=span,
            message=message,
            part=part,
            parts=len(spans),
            **fields,
        )
        for part, span in enumerate(spans, 1)
    ]


_KIND = re.compile(r'\{"type":"(\w+)"(?:,"message_type":"(\w+)")?')


def damaged_event(seq: int) -> str:
    """What stands for a stored event that cannot be read any more."""
    (event,) = response_events("correction", "this event is damaged on disk", turn_id=None, step=0, what="damaged")
    event.seq, event.time = seq, now_text()
    return event.text


def event_kind(text: str) -> tuple[str, str]:
    """(type, message type) of an encoded event."""
    found = _KIND.match(text)
    return (found.group(1), found.group(2) or "") if found else ("", "")


def server_error(error: InvalidRequest) -> str:
    """The answer to a frame that is no valid request; `id` is null where the frame could not be read."""
    frame: JSON = {"type": "server_error", "message": str(error), "code": error.code}
    return encode_json(frame if error.read and error.request_id is None else frame | {"id": error.request_id})


def command_response(command: Command, result: JSON, status: str = "") -> str:
    """The good answer to a command."""
    frame = {"type": "command_response", "status": status or f"OK: {command.kind}", "ok": True, "command": command.kind}
    if command.id is not None:
        frame["id"] = command.id
    return encode_json(frame | {"result": result})


def command_error(command: Command, error: MemwsError) -> str:
    """The bad answer to a command: nothing was changed."""
    details = error.details if isinstance(error, Refused) else {}
    frame = {"type": "command_response", "status": f"Error: {error}", "ok": False, "command": command.kind}
    if command.id is not None:
        frame["id"] = command.id
    return encode_json(frame | {"error": {"code": error.code, "message": str(error), **details}})


def refusal(request_id: RequestId, turn_id: str | None, agent_name: str | None, error: MemwsError) -> str:
    """The terminal frame of a message that never became a turn: not stored, without seq, to its sender only."""
    frame: JSON = {"type": "agent_response_error", "message": str(error), "code": error.code, "stop_reason": "error"}
    frame["time"] = now_text()
    if agent_name is not None and len(agent_name) > MAX_NAME:
        agent_name = None
    named = {"agent_name": agent_name, "turn_id": turn_id, "id": request_id}
    return encode_json(frame | {key: value for key, value in named.items() if value is not None})


# ---- the protocol as JSON Schema -------------------------------------------------------------------------------------


def protocol_schema() -> JSON:
    """A JSON Schema (draft 2020-12) that every frame of the protocol validates against, in either direction."""
    requests = {"user_message": _request_schema(UserMessage, {"type": {"const": "user_message"}})}
    for name, command in COMMANDS.items():
        requests[name] = _request_schema(command, {"type": {"const": "command"}, "command": {"const": name}})
    events = {name: _event_schema(name, kind) for name, kind in MESSAGE_TYPES.items()}
    definitions = requests | {f"event_{name}": schema for name, schema in events.items()} | _frame_schemas()
    refer = [{"$ref": f"#/$defs/{name}"} for name in definitions]
    count = len(requests)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memws protocol",
        "version": PROTOCOL,
        "anyOf": [{"$ref": "#/$defs/request"}, {"$ref": "#/$defs/event"}],
        "$defs": {"request": {"anyOf": refer[:count]}, "event": {"anyOf": refer[count:]}} | definitions,
    }


_ID_SCHEMA = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_ID},
        {"type": "integer", "minimum": -(2**53), "maximum": 2**53},
        {"type": "null"},
    ]
}


def _request_schema(request: type[Request], constants: JSON) -> JSON:
    fields = {declared.name: declared.described() for declared in request.fields.values()}
    needed = [declared.name for declared in request.fields.values() if declared.required]
    doc = inspect.getdoc(request) or ""
    if request.result:
        doc = f"{doc} Result: {request.result}".strip()
    return {
        "description": doc,
        "type": "object",
        "properties": constants | {"id": _ID_SCHEMA} | fields,
        "required": [*constants, *needed],
    }


def _event_schema(name: str, kind: EventType) -> JSON:
    common = {
        "type": {"const": "agent_response"},
        "message_type": {"const": name},
        "message": _STRING,
        "agent_name": _STRING,
        "time": _STRING,
    }
    further = {"turn_id": _STRING, "step": _INTEGER, "seq": _INTEGER, "part": _INTEGER, "parts": _INTEGER}
    return {
        "description": kind.doc + (" (live: not stored, no seq)" if kind.live else ""),
        "type": "object",
        "properties": common | further | kind.fields,
        "required": [*common, *(() if kind.live else ("seq",))],
    }


def _frame_schemas() -> JSON:
    """The frames that are no agent_response."""

    def frame(doc: str, needed: JSON, further: JSON) -> JSON:
        return {"description": doc, "type": "object", "properties": needed | further, "required": list(needed)}

    error = {"type": "object", "properties": {"code": _STRING, "message": _STRING}, "required": ["code", "message"]}
    turn = {"agent_name": _STRING, "turn_id": _STRING, "time": _STRING}
    marks = {"id": _ID_SCHEMA, "seq": _INTEGER}
    end = {"type": {"const": "agent_response_end"}, "stop_reason": {"enum": list(STOP_REASONS)}, "usage": _OBJECT}
    failed = {
        "type": {"const": "agent_response_error"},
        "message": _STRING,
        "code": _STRING,
        "stop_reason": {"const": "error"},
        "time": _STRING,
    }
    answer = {
        "type": {"const": "command_response"},
        "status": {"type": "string", "pattern": "^(OK|Error): "},
        "ok": {"type": "boolean"},
        "command": {"enum": list(COMMANDS)},
    }
    return {
        "agent_response_start": frame(
            "a turn begins: the user's message is on disk",
            {"type": {"const": "agent_response_start"}, "seq": _INTEGER} | turn,
            marks,
        ),
        "agent_response_end": frame("a turn ended; all of it is on disk", end | {"seq": _INTEGER} | turn, marks),
        "agent_response_error": frame(
            "a turn failed, or a message never became one (then no seq)", failed, turn | marks | {"usage": _OBJECT}
        ),
        "command_response": frame(
            "the answer to a command",
            answer,
            {"id": _ID_SCHEMA, "result": _OBJECT, "error": error, "part": _INTEGER, "parts": _INTEGER},
        ),
        "server_error": frame(
            "a frame that is no valid request",
            {"type": {"const": "server_error"}, "message": _STRING, "code": _STRING},
            {"id": _ID_SCHEMA},
        ),
    }


# ======================================================================================================================
# 4. Memory: chat messages, core memory blocks, passages; how text is split for search
# ======================================================================================================================


@dataclass(frozen=True, slots=True)
class Block:
    """One labelled piece of core memory: always in the prompt, at most `limit` characters."""

    label: str
    value: str
    limit: int = BLOCK_LIMIT
    version: int = 1
    "Counts the edits; an edit based on another version than the stored one is a conflict."


@dataclass(frozen=True, slots=True)
class Passage:
    """One entry of archival memory."""

    id: int
    text: str
    time: str


@dataclass(slots=True)
class ChatMessage:
    """One entry of the context window, never changed once stored."""

    id: int
    "Counts the agent's messages from 1."
    role: str
    "user, assistant, tool, or system for what is packed as a user's message but comes from memws."
    time: str
    text: str
    "The user's words, the inner monologue, the tool's answer, the event's reason."
    body: str
    "The JSON object that a model gets, kept encoded."
    turn_id: str | None = None
    step: int = 0
    said: str = ""
    "What recall memory is searched by: the user's words, or what the agent said with send_message."
    event: Event | None = None
    "The event that tells of it; in the transaction it lends the message its seq."
    seq: int = 0

    @property
    def tokens(self) -> int:
        return estimate_tokens(self.body)


@dataclass(frozen=True, slots=True)
class Found:
    """One result of a search."""

    id: int
    store: str
    role: str
    time: str
    text: str
    score: float


def read_body(message: ChatMessage) -> JSON | None:
    """What a model gets, decoded; None where it is damaged: no endpoint would take it."""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, RecursionError):
        body = decode_json(message.body)
        calls = body.get("tool_calls", [])
        texts = [call["id"] for call in calls]
        texts += [call["function"][key] for call in calls for key in ("name", "arguments")]
        texts += [body["content"]] if body.get("content") is not None or not calls else []
        texts += [body["tool_call_id"]] if message.role == "tool" else []
        objects = [decode_json(call["function"]["arguments"]) for call in calls]
        if (
            body["role"] == (message.role if message.role in ("assistant", "tool") else "user")
            and all(isinstance(text, str) for text in texts)
            and all(call["type"] == "function" for call in calls)
            and all(isinstance(value, dict) for value in objects)
        ):
            return cast(JSON, body)
    return None


OpenCall = tuple[ChatMessage, str, str]
"A message with a tool call that has no result, the call's id, the tool."


def history_faults(messages: Sequence[ChatMessage]) -> tuple[list[tuple[int, str]], list[OpenCall]]:
    """(index, what is wrong) of the places no prompt may hold, which begins at `index` or later; the open calls at the
    end."""
    faults: list[tuple[int, str]] = []
    waiting: dict[str, OpenCall] = {}
    for index, message in enumerate(messages):
        body = read_body(message)
        if body is not None and message.role == "tool":
            if waiting.pop(body["tool_call_id"], None) is None:
                faults.append((index + 1, f"chat message {message.id} answers a call that is not there"))
            continue
        for asked, call_id, _ in waiting.values():
            faults.append((index, f"the call {quote(call_id)} of chat message {asked.id} has no result"))
        waiting = {}
        if body is None:
            faults.append((index + 1, f"chat message {message.id} is damaged"))
            continue
        calls = body.get("tool_calls", ())
        waiting = {call["id"]: (message, call["id"], call["function"]["name"]) for call in calls}
        if len(waiting) < len(calls):
            faults.append((index + 1, f"two calls of chat message {message.id} have the same id"))
            waiting = {}
    return faults, list(waiting.values())


def estimate_tokens(text: str) -> int:
    """Tokens of `text`, roughly: a token per four bytes of UTF-8, and four around each message."""
    return 4 + (len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))) // 4


def excerpt(text: str, most: int) -> str:
    """`text`, or its beginning and end with a note between them where it has more than `most` characters."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    return f"{text[:head]} […{len(text) - head - tail:,} characters left out here; search finds them…] {text[-tail:]}"


def difference(before: str, after: str) -> str:
    """What an edit changed, line by line, as a unified diff without its headers."""
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
    return "\n".join(line for line in lines if not line.startswith("@@"))


# ---- how text is split and ranked for search -----------------------------------------------------------------------

# Gains are of recall@10, in points, on LoCoMo / MADial en / MADial zh / XQuAD es: with the constant against without it.
ROW_WORDS = 120
"""A longer text is indexed as several rows of at most so many words; its best row counts. 0 / 0 / 0 / +.3"""
TURN_WORDS = 80
"""Only turns of at most so many words lend words to the turns beside them; longer ones are pushed down by PRIOR."""
SESSION_GAP = 3600.0
"""Seconds of silence after which a turn begins a new session: it lends nothing to the older one and takes nothing."""
QUERY_CHARACTERS, QUERY_TERMS = 20_000, 128
"""What of a query is read. 128 terms against 64: 0 / 0 / +1.8 / 0"""
POSTINGS = 20_000
"""Rows read from the index for one query, those of the rarest terms first, the newest first: what bounds its time."""
LENDERS = 1_000
"""Rows, the best by their own terms, whose terms count for the turns around them too. All against 100: 0 / 0 / 0 / 0"""
CANDIDATES = 200
"""The best rows by the weights of their terms alone, which are then ranked in full. 400 against 200: +.1 / 0 / 0 / 0"""
SCANNED = 100_000
"""Rows, the newest, in which a text that the index does not know is looked for as it stands."""

CONTEXT = {-5: 0.15, -4: 0.2, -3: 0.25, -2: 0.35, -1: 0.5, 1: 0.4, 2: 0.2}
"""What a term counts that stands so many turns before (-) or after. +16.7 / 0 / 0 / 0; only -2 and -1: +13.3"""
ASKED = 0.3
"""What a term counts more that stands in a question just before: answers seldom repeat it. +.3, MRR +2.3 / 0 / 0 / 0"""
ASKING = 0.15
"""What a turn loses that only asks: people look for what was said. +.1, MRR +1.6 / 0 / 0 / 0"""
SPEAKER = 0.2
"""What the turns of a speaker gain whom the query names. +1.3, MRR +3.5 / 0 / 0 / 0"""
PRIOR = 0.8
"""Exponent of the prior min(1, TURN_WORDS / words) of recall. 0 / 0 / 0 / 0; own long-answer set: +3.3, MRR +23"""
K1, B = 1.2, 0.2
"""BM25: how soon a repeated term counts no more; how much length counts. .2 against .75: +1.2 / +1.3 / +1.8 / +.1"""
LETTERS, LETTERS_CUT = 7, 5
"""Letters kept of a stem; of a Cyrillic or Greek word, which is cut only. 7 against all: +.4 / +.5 / 0 / +.5"""

_PAIRED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U000323af"
_TRIPLED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_SILENT = (  # accents, points of Hebrew and Arabic, tatweel, nukta; soft hyphen, joiners, variation selectors
    "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed\u093c\u00ad\u200b-\u200d\ufe0e\ufe0f"
)
_DROPPED = re.compile(f"[{_SILENT}]+|(?<=\\w)['\u2019]s\\b")
_SENTENCE = re.compile(r"[^.!?\u2026\u3002\uff01\uff1f\u061f\u0964\n]+[.!?\u2026\u3002\uff01\uff1f\u061f\u0964]*")
_STOP = frozenset(
    """a about above after again against all am an and any are as at be because been before being below between both but
    by can could d did do does doing don down during each few for from further had has have having he her here hers
    herself him himself his how i if in into is it its itself just ll m me more most my myself no nor not now of off on
    once only or other our ours ourselves out over own re s same she should so some such t than that the their theirs
    them themselves then there these they this those through to too under until up ve very was we were what when where
    which while who whom why will with would you your yours yourself yourselves""".split()  # noqa: SIM905
)
_STOP_HAN = frozenset(  # pairs of these say as little as the words above: 0 / 0 / +2.7 / 0
    "我你他她它们的了是在有和也就都很吗呢吧啊哦嗯呀这那个么什不会要去到上下还对好可以能得地着过给跟让把被"
)
_IRREGULAR = {  # "When did she go?" asks for "I went": +.9, MRR +1.7 / +2.8 / 0 / 0
    form: forms.split()[0]
    for forms in """go went gone|buy bought|bring brought|think thought|teach taught|catch caught|seek sought|lay laid
    fight fought|feel felt|keep kept|sleep slept|leave left|lose lost|meet met|send sent|spend spent|build built
    make made|say said|tell told|sell sold|hear heard|hold held|find found|understand understood|stand stood|sit sat
    win won|run ran|begin began begun|swim swam swum|sing sang sung|drink drank drunk|become became|come came
    give gave given|pay paid|take took taken|eat ate eaten|see saw seen|write wrote written|drive drove driven
    ride rode ridden|rise rose risen
    choose chose chosen|speak spoke spoken|break broke broken|wake woke woken|steal stole stolen|fall fell fallen
    grow grew grown|know knew known|throw threw thrown|draw drew drawn|fly flew flown|wear wore worn|tear tore torn
    get got gotten|forget forgot forgotten|forgive forgave forgiven|hide hid hidden|bite bit bitten|lend lent|deal dealt
    mean meant|feed fed|lead led|shoot shot|hang hung|stick stuck|strike struck|dig dug|shake shook shaken|light lit
    child children|man men|woman women|foot feet|tooth teeth|mouse mice|person people|wife wives|life lives|knife knives
    """.replace("\n", "|").split("|")
    for form in forms.split()[1:]
}  # fmt: skip
_ENDINGS = [
    ("ingly", ""), ("edly", ""), ("ings", ""), ("ing", ""), ("ied", "y"), ("ies", "y"), ("ed", ""),
    ("sses", "ss"), ("ss", "ss"), ("us", "us"), ("es", "e"), ("s", ""), ("ly", ""),
]  # fmt: skip
_ARABIC = re.compile("^(?:[\u0648\u0641]?(?:[\u0628\u0643]?\u0627\u0644|\u0644\u0644)|\u0648)(?=...)")
_ARABIC_ENDING = re.compile(
    "(?<=...)(?:\u0647\u0627|\u0627\u0646|\u0627\u062a|\u0648\u0646|\u064a\u0646|\u064a\u0647|\u064a\u0629|[\u0647\u0629\u064a\u0649])$"
)


@functools.cache
def _term_pattern() -> re.Pattern[str]:
    """Terms. Compiled when the first text comes: the two patterns are 4 ms of every import otherwise."""
    marks = "".join(chr(code) for code in range(0x370, 0x1ABF) if unicodedata.category(chr(code))[0] == "M")
    emoji = "[\u2190-\u2bff\U0001f000-\U0001faff]"
    spaced = f"(?:[^\\W_{_PAIRED}{_TRIPLED}]|[{marks}])+"
    return re.compile(f"(?P<paired>[{_PAIRED}]+)|(?P<tripled>[{_TRIPLED}]+)|{spaced}|{emoji}")


@functools.cache
def _word_pattern() -> re.Pattern[str]:
    """Words, for counting."""
    return re.compile(f"[{_PAIRED}{_TRIPLED}]{{1,3}}|[^\\s{_PAIRED}{_TRIPLED}]{{1,40}}")


@functools.lru_cache(maxsize=8_192)
def stem(word: str) -> str:
    """The word without its endings: English and Arabic ones, irregular English forms; then its first letters."""
    if "\u0370" <= word[0] <= "\u052f":
        return word[:LETTERS_CUT]
    if "\u0620" <= word[0] <= "\u064a":
        return _ARABIC_ENDING.sub("", _ARABIC.sub("", word))
    if len(word) < 4 or not word.isascii():
        return _IRREGULAR.get(word, word)
    word = _IRREGULAR.get(word, word)
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and (instead == ending or len(word) - len(ending) >= 3):
            word = word[: len(word) - len(ending)] + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
        word = word[:-1]
    word = word[:-1] + "i" if word[-1] == "y" else word.removesuffix("e")
    return word[:LETTERS]


def split_terms(text: str) -> list[str]:
    """The text as the terms of the index, in order, without stop words: for texts and queries alike."""
    folded = unicodedata.normalize("NFKD", text.casefold().replace("\u0131", "i"))
    folded = unicodedata.normalize("NFC", _DROPPED.sub("", folded))
    terms: list[str] = []
    for match in _term_pattern().finditer(folded):
        run = match.group()
        width = {"paired": 2, "tripled": 3}.get(match.lastgroup or "", 0)
        if width and len(run) > width:
            grams = (run[i : i + width] for i in range(len(run) - width + 1))
            terms += grams if width == 3 else (pair for pair in grams if not _STOP_HAN.issuperset(pair))
        elif width:
            terms.append(run)
        elif run not in _STOP:
            terms.append(stem(run[:64]))
    return terms


def asking(text: str) -> float:
    """The share of the text's sentences that are questions, from 0 to 1."""
    sentences = _SENTENCE.findall(text[:4096])
    return sum(sentence[-1] in "?\uff1f\u061f" for sentence in sentences) / max(1, len(sentences))


def slices(text: str) -> tuple[Iterator[str], int]:
    """The text in slices of about equal length, none over ROW_WORDS words, and the number of its words.

    In scripts without spaces three characters count as a word.
    """
    words = sum(1 for _ in _word_pattern().finditer(text))
    count = max(1, -(-words // ROW_WORDS))
    size = max(1, -(-words // count))
    starts = itertools.islice(_word_pattern().finditer(text), size, None, size)
    cuts = [0, *(match.start() for match in starts), len(text)]
    return (text[a:b] for a, b in itertools.pairwise(cuts)), words


NEAR, NEAR_PLACE = 0.3, 20
"""Reciprocal rank fusion (Cormack et al. 2009): what a place by vectors counts of one by words, how soon both fade.

all-MiniLM-L6-v2, a small English model: +1.6 / +1.5 / -.7 / -.1; at .5 +1.4 / +2.2 / -.2 / 0, with MRR -1.8 / +7.5 /
-7.6 / -7.2 for +.7 / +3.9 / -1.1 / -4.3 at .3. Vectors that are weaker than words (LSA) cost .6, at .5 1.5.
"""
NEAR_BESIDE = 0.2
"""What the likeness of a turn beside counts for a turn, where vectors rank: with MiniLM +.2 / 0 / 0 / 0."""
VECTOR_BLOCK = 4_096
"""Vectors that a search has in memory at once."""

_PLACE, _SLICE = 28, 10  # bits of a doc: agent, one bit of store, place, slice
_APART = 8  # places between turns that lend each other no words; more than the reach of CONTEXT


class Hit(NamedTuple):
    """One message or passage found."""

    store: str
    item: int
    score: float


class _Row(NamedTuple):
    doc: int
    store: str
    item: int
    role: str
    time: str
    words: int
    asking: float
    asked: int
    terms: str


def rough_scores(docs: dict[str, set[int]], weights: dict[str, float]) -> tuple[dict[int, float], dict[int, float]]:
    """The weights of the terms that each doc holds; the same with those that its neighbours lend, for the best LENDERS.

    The second also names docs that are not there: only the rows tell where a session ends.
    """
    own: dict[int, float] = {}
    for term, holders in docs.items():
        weight = weights[term]
        for doc in holders:
            own[doc] = own.get(doc, 0.0) + weight
    best = own if len(own) <= LENDERS else heapq.nlargest(LENDERS, own, key=lambda doc: (own[doc], doc))
    rough = {doc: own[doc] for doc in best}
    for doc in best:
        for step, share in CONTEXT.items():
            near = doc - (step << _SLICE)
            rough[near] = rough.get(near, own.get(near, 0.0)) + share * own[doc]
    return own, rough


def rarity(count: int, size: int) -> float:
    """The weight of a term that so many of the rows hold."""
    return math.log(1 + (size - count + 0.5) / (count + 0.5))


def score_row(row: _Row, docs: dict[str, set[int]], weights: dict[str, float], length: float) -> float:
    """BM25 of the row's own terms and, lower, of those in the turns around it, times what its length and form say."""
    counts = collections.Counter(row.terms.split())
    norm = 1 - B + B * counts.total() / max(1.0, length)
    score = 0.0
    for term, own in docs.items():
        count = counts[term] / norm
        if row.store == "recall":
            for step, share in CONTEXT.items():
                if row.doc + (step << _SLICE) in own:
                    count += share + (ASKED if step == -1 and row.asked else 0.0)
        score += weights[term] * count * (K1 + 1) / (count + K1)
    if row.store == "archival":
        return score
    return score * math.pow(min(1.0, TURN_WORDS / max(1, row.words)), PRIOR) * (1 - ASKING * row.asking)


def fuse(by_words: list[tuple[int, float]], near: Sequence[int]) -> list[tuple[int, float]]:
    """(doc, score) by the places in both rankings; what vectors alone find comes in among the rest."""
    scores: dict[int, float] = {}
    docs: dict[int, int] = {}
    for weight, ranking in ((1.0, [doc for doc, _ in by_words[:CANDIDATES]]), (NEAR, near)):
        for place, doc in enumerate(ranking, 1):
            message = doc >> _SLICE
            docs.setdefault(message, doc)
            scores[message] = scores.get(message, 0.0) + weight / (NEAR_PLACE + place)
    order = sorted(scores, key=lambda message: scores[message], reverse=True)
    rest = [(doc, score) for doc, score in by_words[CANDIDATES:] if doc >> _SLICE not in scores]
    return [(docs[message], scores[message]) for message in order] + rest


# ---- vectors ---------------------------------------------------------------------------------------------------------

MISSING_NUMPY: Final = "embeddings need the numpy package: pip install numpy"


class Near(NamedTuple):
    """A query's vector, and the model that made it: only vectors of the same kind are compared with it."""

    model: str
    vector: bytes


def import_numpy() -> Any:
    """The numpy package. Raises UsageError where it is missing."""
    try:
        import numpy
    except ImportError as error:
        raise UsageError(MISSING_NUMPY) from error
    return numpy


def pack_vector(values: Sequence[float]) -> bytes:
    """A vector of length 1, as 16-bit floats. Raises ValueError for one without a direction."""
    numpy = import_numpy()
    with numpy.errstate(all="ignore"):
        vector = numpy.asarray(values, numpy.float32)
        length = float(numpy.linalg.norm(vector))
    if vector.ndim != 1 or not 0 < length < math.inf:
        raise ValueError("no vector")
    return bytes((vector / length).astype(numpy.float16).tobytes())


def unnamed(query: str, names: Iterable[str]) -> str:
    """The query without names: vectors draw a name to the turns that mention it, not to what its owner said."""
    parts = [re.escape(part) for name in names for part in name.split() if len(part) > 1]
    pattern = rf"\b(?:{'|'.join(parts)})(?:['\u2019]s)?\b" if parts else "(?!)"
    return re.sub(pattern, " ", query, flags=re.IGNORECASE).strip() or query


# ======================================================================================================================
# 5. Store: agents, messages, passages and events on disk
# ======================================================================================================================


LOST: Final = "lost"
"The only key of a config or state that could not be read."


@dataclass(slots=True)
class AgentRecord:
    """What the store knows of an agent beside its messages, passages and events."""

    id: int
    name: str
    config: JSON
    state: JSON
    "Where the context window begins, its summary, and what else changes from step to step."
    created: str
    last_active: str
    last_seq: int
    base_url: str | None = None
    "An endpoint of the agent's own; only Python sets it, never the wire or an imported file."


def message_digest(message: str) -> bytes:
    """What tells a turn sent again from another turn under the same id."""
    return hashlib.sha256(message.encode()).digest()


@dataclass(slots=True)
class TurnRecord:
    """What the store knows of a turn. `digest` is the SHA-256 of the user's message, None for a turn without one."""

    turn_id: str
    digest: bytes | None
    over: bool
    first_seq: int
    last_seq: int


@dataclass(slots=True)
class RequestRecord:
    """One model call as sent, as references to what never changes, and as answered."""

    turn_id: str
    step: int
    head: str
    "The JSON of everything but messages and tools."
    system: str
    summary: str
    "The encoded summary message, or empty."
    tools: str
    extra: str
    "An encoded message that was sent once and not kept (a request to correct), or empty."
    first: int
    last: int
    "The ids of the chat messages between."
    digest: bytes
    "SHA-256 of the bytes sent."
    response: JSON = field(default_factory=dict)
    usage: JSON = field(default_factory=dict)
    first_token_ms: int | None = None
    total_ms: int = 0


def request_body(head: str, messages: Iterable[str], tools: str) -> str:
    """The JSON of a chat-completions request from its encoded pieces."""
    body = f'{head[:-1]},"messages":[{",".join(messages)}]'
    return f'{body},"tools":{tools}}}' if tools else body + "}"


@dataclass(slots=True)
class Changes:
    """What one transaction stores for one agent: a step, a part of one, or an edit from outside."""

    events: list[Event] = field(default_factory=list)
    messages: list[ChatMessage] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    "Passages that are deleted."
    requests: list[RequestRecord] = field(default_factory=list)
    begins: tuple[str, bytes | None] | None = None
    "The turn that begins, and the digest of its message."
    ends: list[str] = field(default_factory=list)
    "Turns that end."
    state: JSON | None = None
    config: JSON | None = None


class Store(Protocol):
    """What agents and server need of a database. Every method raises StoreFailed; writes are all or nothing.

    The one implementation here is SQLite; a database for several servers is another one with these methods.
    """

    async def create_agent(self, name: str, config: JSON, blocks: Sequence[Block], base_url: str | None) -> AgentRecord:
        """A new agent. Its seq goes on above that of an earlier agent of the name. Raises Refused (name_taken)."""

    async def find_agent(self, name: str, deleted: bool = False) -> AgentRecord:
        """The agent of that name, or the one deleted last under it. Raises UnknownAgent."""

    async def list_agents(self, after: str, limit: int) -> tuple[list[AgentRecord], int]:
        """Agents with names above `after`, in order, and how many there are in all."""

    async def rename_agent(self, agent: int, new_name: str, event: Event) -> None:
        """Give the agent another name and store the event of it. Raises Refused (name_taken)."""

    async def delete_agent(self, agent: int, event: Event | None, purge: bool) -> None:
        """Keep the agent aside, or forget all of it; its name is free at once. No event: it is aside already."""

    async def restore_agent(self, name: str, new_name: str) -> AgentRecord:
        """Bring back the agent deleted last under that name. Raises UnknownAgent, Refused (name_taken)."""

    async def commit(self, agent: int, changes: Changes) -> None:
        """Store all of `changes` in one transaction, and give its events their seq and text."""

    async def load(self, agent: int, first: int) -> tuple[list[Block], list[ChatMessage], JSON, list[TurnRecord]]:
        """Blocks, messages from id `first` on, counts {recall, archival, last_message, last_passage}, open turns."""

    async def messages(self, agent: int, before: int | None, limit: int) -> tuple[list[ChatMessage], int]:
        """The newest `limit` messages (before an id), oldest first, and how many there are in all."""

    async def passage(self, agent: int, passage: int) -> Passage | None:
        """One passage."""

    async def turn(self, agent: int, turn_id: str) -> TurnRecord | None:
        """What is known of a turn."""

    async def events(
        self, agent: int, after: int, limit: int, turn_id: str | None = None, up_to: int = 2**62
    ) -> list[tuple[int, str]]:
        """(seq, text) of stored events above `after`, in order; those of one turn where one is named.

        At most `limit`, with REPLAY_PAGE characters in all or else a single one; none means that there are none.
        """

    async def backlog(self, agent: int, after: int, turn_id: str | None = None) -> int:
        """Characters of the next thousand stored events above `after`."""

    async def request(self, agent: int, turn_id: str, step: int) -> tuple[RequestRecord, list[str]] | None:
        """A model call and the encoded chat messages it held."""

    async def search(
        self,
        agent: int,
        query: str,
        stores: tuple[str, ...],
        roles: tuple[str, ...] | None,
        since: str | None,
        until: str | None,
        limit: int,
        offset: int,
        up_to: tuple[int, int] | None = None,
        near: Sequence[int] = (),
    ) -> tuple[list[Found], int]:
        """The best matches from `offset` on, and how many there are in all; nothing above the ids `up_to`.

        near: what `nearest` gave for the same search; it counts beside the words.
        """

    async def nearest(
        self,
        agent: int,
        near: Near,
        stores: tuple[str, ...],
        roles: tuple[str, ...] | None,
        since: str | None,
        until: str | None,
        up_to: tuple[int, int] | None,
    ) -> list[int]:
        """What is nearest to the query by its vector, as numbers for `search`."""

    async def without_vector(self, agent: int, model: str, dimension: int | None, after: tuple[int, int]) -> list[int]:
        """What of the agent's memory has no vector of that model, above the message and the passage `after`.

        The numbers are for the two methods that follow; the oldest come first. dimension None: any.
        """

    async def texts_to_embed(self, numbers: Sequence[int]) -> list[tuple[int, str]]:
        """(number, text) of what is still there."""

    async def keep_vectors(self, model: str, vectors: Sequence[tuple[int, str, bytes]]) -> None:
        """Store (number, text, vector)."""

    async def close(self) -> None:
        """Finish what is queued and let go of the files."""


# ---- the search index ----------------------------------------------------------------------------------------------

SEARCH_SCHEMA = """
CREATE TABLE IF NOT EXISTS search_rows (
    doc INTEGER PRIMARY KEY,  -- agent, store, place and slice, see SearchIndex
    agent INTEGER NOT NULL, store TEXT NOT NULL, item INTEGER NOT NULL, role TEXT NOT NULL, time TEXT NOT NULL,
    words INTEGER NOT NULL,   -- of the whole message
    asking REAL NOT NULL,     -- share of its sentences that are questions
    asked INTEGER NOT NULL,   -- 1: the turn before, of the same session, asks
    terms TEXT NOT NULL,      -- of this slice, as they are in search_text
    text TEXT NOT NULL        -- this slice
);
CREATE INDEX IF NOT EXISTS search_items ON search_rows (agent, store, item, role);
CREATE INDEX IF NOT EXISTS search_times ON search_rows (agent, store, time);
"""

VECTOR_SCHEMA = """
CREATE TABLE search_vectors (
    doc INTEGER PRIMARY KEY, model TEXT NOT NULL, dimension INTEGER NOT NULL,
    vector BLOB NOT NULL);    -- of length 1, 16-bit floats
"""

Embed = Callable[[list[str]], Iterable[Sequence[float]]]

_STORES = ("recall", "archival")
_STORE_OF = {"u": "recall", "a": "recall", "x": "recall", "p": "archival"}


_INDEXED_MESSAGES: Final = """SELECT 'recall', id, role, time, coalesce(said, text) FROM messages
    WHERE agent = ? AND (said <> '' OR (said IS NULL AND role = 'user' AND text <> '')) ORDER BY id"""
_INDEXED_PASSAGES: Final = "SELECT 'archival', id, '', time, text FROM passages WHERE agent = ? ORDER BY id"


def _kind(store: str, role: str) -> str:
    return "p" if store == "archival" else {"user": "u", "assistant": "a"}.get(role, "x")


def _keys(agent: int, store: str, role: str, terms: str) -> list[str]:
    """The terms as the postings know them: of one agent and one kind of row."""
    kind = _kind(store, role)
    return [f"{agent}_{term}_{kind}" for term in terms.split()]


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of what is inside, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def is_moment(text: str) -> bool:
    """Whether it is a time as stored."""
    with contextlib.suppress(ValueError):
        return datetime.datetime.fromisoformat(text).tzinfo is not None
    return False


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one time to the other; 0 where one cannot be read."""
    try:
        return (datetime.datetime.fromisoformat(later) - datetime.datetime.fromisoformat(earlier)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


@contextlib.contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is read inside is of one moment, whatever others write."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


class _Scope(NamedTuple):
    agent: int
    spans: dict[str, tuple[int, int]]
    roles: tuple[str, ...] | None

    def holds(self, doc: int) -> bool:
        return any(low <= doc <= high for low, high in self.spans.values())

    def wants(self, kind: str) -> bool:
        return self.roles is None or kind in {_kind("recall", role) for role in self.roles}

    @property
    def role_test(self) -> str:
        """The SQL of it, for `roles` as values."""
        return "" if self.roles is None else f" AND role IN ({', '.join('?' * len(self.roles))})"


class Postings:
    """Which rows hold a term, in FTS5: compressed, without the terms themselves, which `search_rows` keeps."""

    VERSION = 2
    "Of what is indexed and how; an agent whose memory was indexed by another one is indexed anew at the opening."
    SCHEMA = """
        CREATE VIRTUAL TABLE IF NOT EXISTS search_text
            USING fts5 (terms, content = '', columnsize = 0, detail = none, tokenize = "ascii tokenchars '_'");
        CREATE VIRTUAL TABLE IF NOT EXISTS search_counts USING fts5vocab (search_text, row);
        SELECT term FROM search_counts LIMIT 1;
    """
    COUNTS = "SELECT term, doc FROM search_counts WHERE term > ? AND term < ?"

    def clear(self, connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO search_text (search_text) VALUES ('delete-all')")

    def add(self, connection: sqlite3.Connection, doc: int, keys: list[str]) -> None:
        connection.execute("INSERT INTO search_text (rowid, terms) VALUES (?, ?)", (doc, " ".join(keys)))

    def remove(self, connection: sqlite3.Connection, doc: int, keys: list[str]) -> None:
        """Take a row out; its keys have to be those it was added with."""
        sql = "INSERT INTO search_text (search_text, rowid, terms) VALUES ('delete', ?, ?)"
        connection.execute(sql, (doc, " ".join(keys)))

    def docs(self, connection: sqlite3.Connection, key: str, low: int, high: int, most: int) -> set[int]:
        """The rows from `low` to `high` that hold the key, the newest `most`."""
        sql = """SELECT rowid FROM search_text WHERE search_text MATCH ? AND rowid BETWEEN ? AND ?
            ORDER BY rowid DESC LIMIT ?"""
        return {row[0] for row in connection.execute(sql, (f'"{key}"', low, high, most))}


class PlainPostings(Postings):
    """The same in a table, for an SQLite that was built without FTS5: larger and slower."""

    VERSION = -Postings.VERSION
    SCHEMA = """CREATE TABLE IF NOT EXISTS search_terms (
        term TEXT NOT NULL, doc INTEGER NOT NULL, PRIMARY KEY (term, doc)) WITHOUT ROWID;"""
    COUNTS = "SELECT term, count(*) FROM search_terms WHERE term > ? AND term < ? GROUP BY term"

    def clear(self, connection: sqlite3.Connection) -> None:
        connection.execute("DELETE FROM search_terms")

    def add(self, connection: sqlite3.Connection, doc: int, keys: list[str]) -> None:
        rows = [(key, doc) for key in keys]
        connection.executemany("INSERT OR IGNORE INTO search_terms VALUES (?, ?)", rows)

    def remove(self, connection: sqlite3.Connection, doc: int, keys: list[str]) -> None:
        rows = [(key, doc) for key in keys]
        connection.executemany("DELETE FROM search_terms WHERE term = ? AND doc = ?", rows)

    def docs(self, connection: sqlite3.Connection, key: str, low: int, high: int, most: int) -> set[int]:
        sql = "SELECT doc FROM search_terms WHERE term = ? AND doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT ?"
        return {row[0] for row in connection.execute(sql, (key, low, high, most))}


class SearchIndex:
    """The search index of recall and archival memory: every agent, one ranking for both stores.

    Postings say which rows a term is in; the ranking is above, in section 4. A term stands in them as
    agent_term_kind, kind being u (user), a (assistant), x (another role) or p (archival): a search reads and counts
    the rows of its own agent only, however many others there are. A row's id, its doc, is made of agent (24 bits),
    store, place and slice. Turns of a session that lend each other words have places side by side, others stand
    `_APART`: the turns around a turn are found by arithmetic and their words stored once. Stateless: any thread may
    search with its own connection.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Make the postings' tables where they are missing, in FTS5 where this SQLite has it."""
        self._postings = Postings()
        try:
            connection.executescript(Postings.SCHEMA)
        except sqlite3.OperationalError as error:
            if "no such module" not in str(error):
                raise
            self._postings = PlainPostings()
            connection.executescript(PlainPostings.SCHEMA)
        self.version = self._postings.VERSION

    def refresh(self, connection: sqlite3.Connection) -> None:
        """Index anew, agent by agent, what another version of memws indexed, and log how far it is."""
        sql = "SELECT id, name, search_version FROM agents WHERE search_version <> ?"
        outdated = connection.execute(sql, (self.version,)).fetchall()
        if any(version == -self.version for _, _, version in outdated):  # an SQLite without FTS5 had it, or has it now
            with transaction(connection):
                self.clear(connection)
            outdated = connection.execute(sql, (self.version,)).fetchall()
        told = time.monotonic()

        def progress(where: str, done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() > told + 1:
                told = time.monotonic()
                logger.info("indexing memory for search anew: %s, %d of %d texts", where, done, total)

        for number, (agent, name, _) in enumerate(outdated, 1):
            where = f"agent {name} ({number} of {len(outdated)})"
            with transaction(connection):
                self.index_agent(connection, agent, functools.partial(progress, where))

    def index_agent(
        self,
        connection: sqlite3.Connection,
        agent: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Index an agent's memory anew; `progress` is called with the texts done and their total after each."""
        self.drop_agent(connection, agent)
        both = _INDEXED_MESSAGES, _INDEXED_PASSAGES
        total = sum(connection.execute(f"SELECT count(*) FROM ({sql})", (agent,)).fetchone()[0] for sql in both)
        rows = itertools.chain(*(connection.execute(sql, (agent,)) for sql in both))
        for done, (store, item, role, time_, text) in enumerate(rows, 1):
            self.add(connection, agent, store, item, role, time_, text)
            progress(done, total)
        connection.execute("UPDATE agents SET search_version = ? WHERE id = ?", (self.version, agent))

    def clear(self, connection: sqlite3.Connection) -> None:
        """Forget what is indexed, of every agent: the next opening indexes it anew."""
        self._postings.clear(connection)
        for table in ("search_rows", "search_vectors"):
            connection.execute(f"DELETE FROM {table}")
        connection.execute("UPDATE agents SET search_version = 0")

    def drift(self, connection: sqlite3.Connection, agent: int) -> str:
        """What the index has otherwise than the agent's memory; empty: nothing."""
        for store, sql in (("recall", _INDEXED_MESSAGES), ("archival", _INDEXED_PASSAGES)):
            rows = connection.execute(
                "SELECT item, text, doc, role, terms FROM search_rows WHERE agent = ? AND store = ? ORDER BY doc",
                (agent, store),
            )
            indexed = itertools.groupby(rows, key=lambda row: row[0])
            for kept, found in itertools.zip_longest(connection.execute(sql, (agent,)), indexed):
                if kept is None or found is None or kept[1] != found[0]:
                    return f"does not know the {store} memory as it is"
                slices_of = list(found[1])
                if "".join(row[1] for row in slices_of) != clean_text(kept[4]):
                    return f"knows item {kept[1]} of the {store} memory by another text"
                for _, _, doc, role, terms in slices_of:
                    for key in _keys(agent, store, role, terms)[:1]:
                        if not self._postings.docs(connection, key, doc, doc, 1):
                            return f"does not find item {kept[1]} of the {store} memory"
        return ""

    def add(self, connection: sqlite3.Connection, agent: int, store: str, item: int, role: str, time: str, text: str,
            joined: bool | None = None) -> None:  # fmt: skip
        """Index one message or passage, in the writer's transaction.

        joined: whether it belongs to the session of the message before; None: by SESSION_GAP.
        """
        role, time, text = clean_text(role), clean_text(time), clean_text(text)
        parts, words = slices(text)
        asks = asking(text)
        low, high = self._range(agent, store)
        sql = "SELECT doc, time, words, asking FROM search_rows WHERE doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT 1"
        last = connection.execute(sql, (low, high)).fetchone()
        place, asked = 0, False
        if last is not None:
            if joined is None:
                joined = seconds_between(last[1], time) <= SESSION_GAP
            beside = bool(joined) and store == "recall" and words <= TURN_WORDS and last[2] <= TURN_WORDS
            asked = beside and last[3] > 0
            place = (last[0] - low >> _SLICE) + (1 if beside else _APART)
            time = max(time, last[1])  # a clock may be set back; searches by time rely on the order of rows
        for number, part in enumerate(itertools.islice(parts, 1 << _SLICE)):
            doc = low + (place << _SLICE) + number
            terms = " ".join(split_terms(part))
            connection.execute(
                "INSERT INTO search_rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (doc, agent, store, item, role, time, words, asks, asked, terms, part),
            )
            self._postings.add(connection, doc, _keys(agent, store, role, terms))

    def remove(self, connection: sqlite3.Connection, agent: int, store: str, item: int) -> None:
        """Take one message or passage out of the index; unknown: nothing."""
        self._remove(connection, "agent = ? AND store = ? AND item = ?", (agent, store, item))

    def drop_agent(self, connection: sqlite3.Connection, agent: int) -> None:
        """Take all rows of the agent out of the index."""
        self._remove(connection, "agent = ?", (agent,))

    def _remove(self, connection: sqlite3.Connection, where: str, values: tuple[object, ...]) -> None:
        rows = connection.execute(f"SELECT doc, agent, store, role, terms FROM search_rows WHERE {where}", values)
        for doc, agent, store, role, terms in rows:
            self._postings.remove(connection, doc, _keys(agent, store, role, terms))
            connection.execute("DELETE FROM search_vectors WHERE doc = ?", (doc,))
        connection.execute(f"DELETE FROM search_rows WHERE {where}", values)

    def search(self, connection: sqlite3.Connection, agent: int, query: str, stores: tuple[str, ...] = _STORES,
               roles: tuple[str, ...] | None = None, since: str | None = None, until: str | None = None,
               limit: int = 10, offset: int = 0, up_to: tuple[int, int] | None = None, near: Sequence[int] = ()
               ) -> tuple[list[Hit], int]:  # fmt: skip
        """The hits from `offset` on, best first and newest first on ties, and the number of all.

        roles: of messages; where given, passages are left out. since, until: times as stored, the first included, the
        second not. up_to: the last message and passage there were at the first page, so that pages stay the same while
        messages arrive. near: what `nearest` gave, a ranking that is fused with that by words. An empty query gives
        the newest; words the index does not know are looked for as they stand. The number of all counts among the
        POSTINGS rows that were read.
        """
        query, limit, offset = clean_text(query[:QUERY_CHARACTERS]), max(0, limit), max(0, offset)
        scope = self._scope(connection, agent, stores, roles, since, until, up_to)
        terms = list(dict.fromkeys(split_terms(query)))[:QUERY_TERMS]
        ranking = self._ranked(connection, terms, scope, offset + limit) if terms else []
        if not ranking and query.strip():
            ranking = self._containing(connection, query.strip(), scope)
        if near and query.strip():
            ranking = fuse(ranking, near)
        if not ranking and not terms:
            return self._newest(connection, scope, limit, offset)
        page = ranking[offset : offset + limit]
        rows = self._rows(connection, [doc for doc, _ in page])
        return [Hit(rows[doc].store, rows[doc].item, score) for doc, score in page if doc in rows], len(ranking)

    def _scope(self, connection: sqlite3.Connection, agent: int, stores: tuple[str, ...],
               roles: tuple[str, ...] | None, since: str | None, until: str | None, up_to: tuple[int, int] | None
               ) -> _Scope:  # fmt: skip
        if roles is not None:
            stores = tuple(store for store in stores if store == "recall")
        spans = {store: self._bounds(connection, agent, store, since, until, up_to) for store in stores}
        return _Scope(agent, spans, roles)

    def _range(self, agent: int, store: str) -> tuple[int, int]:
        low = (agent * 2 + _STORES.index(store)) << (_PLACE + _SLICE)
        return low, low + (1 << (_PLACE + _SLICE)) - 1

    def _bounds(self, connection: sqlite3.Connection, agent: int, store: str, since: str | None, until: str | None,
                up_to: tuple[int, int] | None) -> tuple[int, int]:  # fmt: skip
        """The first and last doc of the agent's rows of that time: docs grow with times and items."""
        low, high = self._range(agent, store)
        edges = [("time >=", since, "ASC"), ("time <", until, "DESC")]
        edges.append(("item <=", None if up_to is None else str(up_to[_STORES.index(store)]), "DESC"))
        for test, value, order in edges:
            if value is None:
                continue
            column = test.split()[0]
            found = connection.execute(
                f"SELECT doc FROM search_rows WHERE agent = ? AND store = ? AND {test} ?"
                f" ORDER BY {column} {order}, doc {order} LIMIT 1",
                (agent, store, value if column == "time" else int(value)),
            ).fetchone()
            if found is None:
                return low, low - 1
            low, high = (max(low, found[0]), high) if order == "ASC" else (low, min(high, found[0]))
        return low, high

    def _ranked(self, connection: sqlite3.Connection, terms: list[str], scope: _Scope, shown: int
                ) -> list[tuple[int, float]]:  # fmt: skip
        """(doc, score) of the messages that hold one of the terms, and of the turns beside the best of them.

        The best CANDIDATES are ranked in full; the others follow, with score 0, in order where they are `shown`.
        """
        found = self._holders(connection, terms, scope)
        docs = {term: set[int]().union(*kinds.values()) for term, kinds in found.items()}
        size = max([self._size(connection, scope), *map(len, docs.values())])
        weights = {term: rarity(len(own), size) for term, own in docs.items()}
        alone, rough = rough_scores(docs, weights)
        best = heapq.nlargest(CANDIDATES, rough, key=lambda doc: (rough[doc], doc))
        rows = self._rows(connection, [doc for doc in best if scope.holds(doc)])
        length = sum(row.terms.count(" ") + 1 for row in rows.values()) / max(1, len(rows))
        speakers = {role: set(split_terms(role)) for role in {row.role for row in rows.values()}}
        scored: dict[int, tuple[float, str, int]] = {}
        for doc, row in rows.items():
            if scope.roles is None or row.role in scope.roles:
                score = score_row(row, docs, weights, length)
                if speakers[row.role].intersection(terms):
                    score *= 1 + SPEAKER
                key = (score, row.time if len(scope.spans) > 1 else "", doc)
                scored[doc >> _SLICE] = max(scored.get(doc >> _SLICE, key), key)
        own = [kinds[kind] for kinds in found.values() for kind in kinds if scope.wants(kind)]
        rest: dict[int, tuple[float, int]] = {}
        for doc in set[int]().union(*own):
            if doc >> _SLICE not in scored:
                rest[doc >> _SLICE] = max(rest.get(doc >> _SLICE, (0.0, 0)), (alone[doc], doc))
        last = rest.values() if shown <= len(scored) else sorted(rest.values(), reverse=True)
        return [(doc, score) for score, _, doc in sorted(scored.values(), reverse=True)] + [
            (doc, 0.0) for _, doc in last
        ]

    def _rows(self, connection: sqlite3.Connection, docs: list[int]) -> dict[int, _Row]:
        rows = {}
        for start in range(0, len(docs), 500):
            some = docs[start : start + 500]
            sql = f"SELECT {', '.join(_Row._fields)} FROM search_rows WHERE doc IN ({', '.join('?' * len(some))})"
            rows.update({row[0]: _Row(*row) for row in connection.execute(sql, some)})
        return rows

    def _size(self, connection: sqlite3.Connection, scope: _Scope) -> int:
        """About the number of messages: what an item counts."""
        sql = "SELECT item FROM search_rows WHERE doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT 1"
        rows = [connection.execute(sql, span).fetchone() for span in scope.spans.values()]
        return sum(int(row[0]) for row in rows if row)

    def _holders(self, connection: sqlite3.Connection, terms: list[str], scope: _Scope
                 ) -> dict[str, dict[str, set[int]]]:  # fmt: skip
        """The docs of each term and kind, the rarest first, POSTINGS together."""
        counted: list[tuple[int, str, str]] = []
        for term in terms:
            key = f"{scope.agent}_{term}_"
            for full, count in connection.execute(self._postings.COUNTS, (key, key + "z")):
                if _STORE_OF[full[-1]] in scope.spans:
                    counted.append((count, full, term))
        found: dict[str, dict[str, set[int]]] = {}
        room = POSTINGS
        for _, full, term in sorted(counted):
            docs = self._postings.docs(connection, full, *scope.spans[_STORE_OF[full[-1]]], room)
            room -= len(docs)
            if docs:
                found.setdefault(term, {})[full[-1]] = docs
            if room <= 0:
                break
        return found

    def _containing(self, connection: sqlite3.Connection, part: str, scope: _Scope) -> list[tuple[int, float]]:
        """The messages that hold the text as it stands, of the newest SCANNED rows; the newest first."""
        like = "%" + re.sub(r"([\\%_])", r"\\\1", part[:1000]) + "%"
        found: dict[int, tuple[str, int]] = {}
        for span in scope.spans.values():
            sql = f"""SELECT time, doc FROM (SELECT doc, role, time, text FROM search_rows
                WHERE doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT ?) WHERE text LIKE ? ESCAPE '\\'{scope.role_test}"""
            rows = connection.execute(sql, (*span, SCANNED, like, *(scope.roles or ())))
            found.update({doc >> _SLICE: (time if len(scope.spans) > 1 else "", doc) for time, doc in rows})
        return [(doc, 0.0) for _, doc in sorted(found.values(), reverse=True)]

    def _newest(self, connection: sqlite3.Connection, scope: _Scope, limit: int, offset: int
                ) -> tuple[list[Hit], int]:  # fmt: skip
        """All messages, the newest first."""
        found: list[tuple[str, int, Hit]] = []
        total = 0
        for store, span in scope.spans.items():
            values = (*span, *(scope.roles or ()))
            where = f"doc BETWEEN ? AND ? AND doc & {(1 << _SLICE) - 1} = 0{scope.role_test}"
            sql = f"SELECT item, time, doc FROM search_rows WHERE {where} ORDER BY doc DESC LIMIT ?"
            for item, time_, doc in connection.execute(sql, (*values, offset + limit)):
                found.append((time_ if len(scope.spans) > 1 else "", doc, Hit(store, item, 0.0)))
            sql = f"SELECT count(*) FROM search_rows INDEXED BY search_items WHERE agent = ? AND store = ? AND {where}"
            total += connection.execute(sql, (scope.agent, store, *values)).fetchone()[0]
        return [hit for *_, hit in sorted(found, reverse=True)[offset : offset + limit]], total

    # -- vectors --

    def nearest(self, connection: sqlite3.Connection, near: Near, agent: int, stores: tuple[str, ...],
                roles: tuple[str, ...] | None = None, since: str | None = None, until: str | None = None,
                up_to: tuple[int, int] | None = None) -> list[int]:  # fmt: skip
        """The CANDIDATES docs whose vectors are most like the query's, a turn's with those of the turns beside it."""
        numpy = import_numpy()
        scope = self._scope(connection, agent, stores, roles, since, until, up_to)
        query = numpy.frombuffer(near.vector, numpy.float16).astype(numpy.float32)
        sql = """SELECT doc, vector FROM search_vectors
            WHERE doc BETWEEN ? AND ? AND model = ? AND dimension = ? ORDER BY doc"""
        docs: list[int] = []
        parts = [numpy.zeros(0, numpy.float32)]
        for span in sorted(scope.spans.values()):
            cursor = connection.execute(sql, (*span, near.model, len(query)))
            while rows := cursor.fetchmany(VECTOR_BLOCK):
                docs += [doc for doc, _ in rows]
                matrix = numpy.frombuffer(b"".join(vector for _, vector in rows), numpy.float16)
                parts.append(matrix.reshape(len(rows), -1).astype(numpy.float32) @ query)
        own = numpy.concatenate(parts)
        likeness = own.copy()
        beside = numpy.diff(numpy.array(docs, numpy.int64)) == 1 << _SLICE
        likeness[1:][beside] += NEAR_BESIDE * own[:-1][beside]
        likeness[:-1][beside] += NEAR_BESIDE * own[1:][beside]
        order = [docs[place] for place in numpy.argsort(-likeness, kind="stable")[:CANDIDATES]]
        found = self._rows(connection, order)
        best = {doc >> _SLICE: doc for doc in reversed(order) if scope.roles is None or found[doc].role in scope.roles}
        return [doc for doc in order if best.get(doc >> _SLICE) == doc]

    def without_vector(
        self, connection: sqlite3.Connection, agent: int, model: str, dimension: int | None, after: tuple[int, int]
    ) -> list[int]:
        """The agent's docs that have no vector of that model and dimension (None: any), of items above `after`.

        An empty vector is kept for a text that the model refuses.
        """
        sql = """SELECT doc FROM search_rows WHERE agent = ? AND store = ? AND item > ? AND NOT EXISTS (
            SELECT 1 FROM search_vectors AS kept WHERE kept.doc = search_rows.doc AND kept.model = ?
            AND kept.dimension IN (0, coalesce(?, kept.dimension))) ORDER BY item, doc"""
        docs = []
        for store, item in zip(_STORES, after, strict=True):
            docs += [row[0] for row in connection.execute(sql, (agent, store, item, model, dimension))]
        return docs

    def keep_vectors(
        self, connection: sqlite3.Connection, model: str, vectors: Iterable[tuple[int, str, bytes]]
    ) -> None:
        """Store vectors of docs with their texts, in place of another model's; of texts that are gone, nothing."""
        sql = "INSERT OR REPLACE INTO search_vectors SELECT doc, ?, ?, ? FROM search_rows WHERE doc = ? AND text = ?"
        rows = [(model, len(vector) // 2, vector, doc, text) for doc, text, vector in vectors]
        connection.executemany(sql, rows)


class MemoryIndex:
    """An index in memory over turns, by the very code that agents search with."""

    def __init__(self, turns: Iterable[tuple[str, str, str]], kind: str, embed: Embed | None) -> None:
        if kind not in _STORES:
            raise ValueError(f"unknown kind {kind!r}; expected 'recall' or 'archival'")
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        weakref.finalize(self, self._connection.close)
        self._connection.executescript(SEARCH_SCHEMA + VECTOR_SCHEMA)
        self._index, self._kind, self._embed = SearchIndex(self._connection), kind, embed
        self._speakers: set[str] = set()
        before = None
        for item, (speaker, date, text) in enumerate(turns, 1):
            self._index.add(self._connection, 1, kind, item, speaker, date, text, joined=date == before)
            self._speakers.add(speaker)
            before = date
        if embed is not None:
            rows = self._connection.execute("SELECT doc, text FROM search_rows ORDER BY doc").fetchall()
            vectors = map(pack_vector, embed([text for _, text in rows]))
            self._index.keep_vectors(
                self._connection, "", [(*row, vector) for row, vector in zip(rows, vectors, strict=True)]
            )
        self._connection.commit()

    def search(self, query: str, limit: int = 10) -> list[int]:
        """The positions of the turns found, best first, at most `limit`."""
        near: Sequence[int] = ()
        if self._embed is not None:
            (vector,) = self._embed([unnamed(query, self._speakers)])
            near = self._index.nearest(self._connection, Near("", pack_vector(vector)), 1, (self._kind,))
        hits, _ = self._index.search(self._connection, 1, query, (self._kind,), limit=limit, near=near)
        return [hit.item - 1 for hit in hits]


def memory_index(
    turns: Iterable[tuple[str, str, str]], kind: str = "recall", embed: Embed | None = None
) -> MemoryIndex:
    """An index over (speaker, date, text) turns in order of time; kind is "recall" or "archival".

    embed: gives each text of a list a vector, to search by vectors too; needs numpy. Raises UsageError without it.
    """
    return MemoryIndex(turns, kind, embed)


_SCHEMA = """
CREATE TABLE agents (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, config TEXT NOT NULL, state TEXT NOT NULL,
    created TEXT NOT NULL, last_active TEXT NOT NULL, last_seq INTEGER NOT NULL, base_url TEXT, deleted TEXT);
CREATE UNIQUE INDEX agents_name ON agents (name) WHERE deleted IS NULL;
CREATE TABLE names (name TEXT PRIMARY KEY, last_seq INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE blocks (
    agent INTEGER NOT NULL, position INTEGER NOT NULL, label TEXT NOT NULL, value TEXT NOT NULL,
    "limit" INTEGER NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (agent, label)) WITHOUT ROWID;
CREATE TABLE messages (
    agent INTEGER NOT NULL, id INTEGER NOT NULL, role TEXT NOT NULL, time TEXT NOT NULL, text TEXT NOT NULL,
    body TEXT NOT NULL, said TEXT, turn_id TEXT, step INTEGER NOT NULL, seq INTEGER NOT NULL, PRIMARY KEY (agent, id));
CREATE TABLE passages (
    agent INTEGER NOT NULL, id INTEGER NOT NULL, text TEXT NOT NULL, time TEXT NOT NULL, PRIMARY KEY (agent, id));
CREATE TABLE turns (
    agent INTEGER NOT NULL, turn_id TEXT NOT NULL, digest BLOB, over INTEGER NOT NULL,
    first_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL, PRIMARY KEY (agent, turn_id)) WITHOUT ROWID;
CREATE INDEX turns_open ON turns (agent) WHERE NOT over;
CREATE TABLE events (
    agent INTEGER NOT NULL, seq INTEGER NOT NULL, turn_id TEXT, text TEXT NOT NULL,
    PRIMARY KEY (agent, seq)) WITHOUT ROWID;
CREATE TABLE requests (
    agent INTEGER NOT NULL, turn_id TEXT NOT NULL, step INTEGER NOT NULL, head TEXT NOT NULL, system BLOB NOT NULL,
    summary BLOB NOT NULL, tools BLOB NOT NULL, extra BLOB NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL,
    digest BLOB NOT NULL, response TEXT NOT NULL, usage TEXT NOT NULL, first_token_ms INTEGER,
    total_ms INTEGER NOT NULL, PRIMARY KEY (agent, turn_id, step)) WITHOUT ROWID;
CREATE TABLE parts (
    agent INTEGER NOT NULL, digest BLOB NOT NULL, text TEXT NOT NULL, PRIMARY KEY (agent, digest)) WITHOUT ROWID;
"""

_MIGRATIONS: Final = (
    _SCHEMA + SEARCH_SCHEMA,
    "ALTER TABLE agents ADD COLUMN search_version INTEGER NOT NULL DEFAULT 0;" + VECTOR_SCHEMA,
)
"Script n brings a database from schema version n to n + 1; the version is SQLite's user_version."

_LIVE, _DELETED = "deleted IS NULL", "deleted IS NOT NULL"
_APPLICATION_ID: Final = 0x6D656D77
_AGENT_TABLES: Final = ("blocks", "messages", "passages", "turns", "events", "requests", "parts")
_AGENT_COLUMNS: Final = "id, name, config, state, created, last_active, last_seq, base_url"
_MESSAGE_COLUMNS: Final = "id, role, time, text, body, turn_id, step, said, seq"

WriteJob = tuple[Callable[[sqlite3.Connection], Any], "asyncio.Future[Any]"]


class SqliteStore:
    """Agents in one SQLite file (WAL), or in memory for ":memory:".

    One thread writes: all jobs that wait for it share one transaction, each in a savepoint of its own, so that
    turns that arrive together pay for one fsync and none of them on the event loop. Other threads read. A lock
    file beside the database keeps a second server out. All its methods are to be awaited on `loop`.

    Raises UsageError where the file cannot be used: locked, no database, of another program or a newer version.
    """

    def __init__(self, path: str, sync: str, loop: asyncio.AbstractEventLoop) -> None:
        self.memory = path == ":memory:"
        self.path = path = path if self.memory else os.path.realpath(path)  # a link must not get past the lock
        self._loop = loop
        self._jobs: queue.SimpleQueue[WriteJob | None] = queue.SimpleQueue()
        self._lock = None if self.memory else DatabaseLock(path)
        try:
            self._connection = open_database(path, sync)
        except BaseException:
            if self._lock is not None:
                self._lock.give_up()
            raise
        self._index = SearchIndex(self._connection)
        self._writer = threading.Thread(target=self._write_all, name="memws-writer", daemon=True)
        self._writer.start()
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._readers = ThreadPoolExecutor(READERS, "memws-reader")
        self._closed = False

    # -- the two ways to the database --

    async def _write(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` in the writer's next transaction; its result comes after the commit."""
        if self._closed:
            raise StoreFailed("the database is closed")
        done: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put((job, done))
        return cast(T, await done)  # the commit happens whether or not somebody still waits for it

    async def _read(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` on a reader's thread."""
        if self._closed:
            raise StoreFailed("the database is closed")
        if self.memory:  # one connection only, so its thread reads too
            return await self._write(job)
        try:
            return await self._loop.run_in_executor(self._readers, self._read_here, job)
        except sqlite3.Error as error:
            raise StoreFailed(f"the database refused a read: {error}") from error
        except (ValueError, OverflowError, TypeError, LookupError) as error:  # what a damaged row reads like
            logger.error("a read failed", exc_info=error)
            raise StoreFailed(f"the database holds what cannot be read ({type(error).__name__})") from error

    def _read_here(self, job: Callable[[sqlite3.Connection], T]) -> T:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = connect_database(self.path)
            connection.execute("PRAGMA query_only = ON")
            self._connections.append(connection)
        return job(connection)

    def _write_all(self) -> None:
        """The writer's thread: take what waits, store it together, tell the loop."""
        while (first := self._jobs.get()) is not None:
            jobs = [first]
            with contextlib.suppress(queue.Empty):
                while len(jobs) < WRITE_BATCH:
                    job = self._jobs.get_nowait()
                    if job is None:
                        self._jobs.put(None)
                        break
                    jobs.append(job)
            outcomes = self._write_batch([job for job, _ in jobs])
            settled = list(zip((done for _, done in jobs), outcomes, strict=True))
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
                self._loop.call_soon_threadsafe(_settle, settled)
        self._connection.close()

    def _write_batch(self, jobs: list[Callable[[sqlite3.Connection], Any]]) -> list[tuple[Any, BaseException | None]]:
        """(result, error) of each job. A job that fails undoes only itself; a commit that fails undoes all."""
        outcomes: list[tuple[Any, BaseException | None]] = []
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                connection.execute("SAVEPOINT job")
                try:
                    outcomes.append((job(connection), None))
                except Exception as error:  # one agent's failure must not undo the others' steps
                    if not connection.in_transaction:  # SQLite has undone all: a full disk, an I/O error
                        raise
                    connection.execute("ROLLBACK TO job")
                    outcomes.append((None, _store_error(error)))
                connection.execute("RELEASE job")
            connection.execute("COMMIT")
        except Exception as error:  # whatever it was, nothing of this batch is on disk, and everybody hears it
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            return [(None, _store_error(error))] * len(jobs)
        return outcomes

    def move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Serve another loop from now on; nobody may wait for anything."""
        self._loop = loop

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        await self._loop.run_in_executor(self._readers, self._writer.join)
        self._readers.shutdown(wait=True)
        for connection in self._connections:
            connection.close()
        if self._lock is not None:
            self._lock.release()

    # -- agents --

    async def create_agent(self, name: str, config: JSON, blocks: Sequence[Block], base_url: str | None) -> AgentRecord:
        def job(connection: sqlite3.Connection) -> AgentRecord:
            _refuse_taken(connection, name)
            now = now_text()
            row = (name, encode_json(config), "{}", now, now, _last_seq_of_name(connection, name), base_url)
            agent = connection.execute(
                "INSERT INTO agents (name, config, state, created, last_active, last_seq, base_url, search_version)"
                " VALUES (?,?,?,?,?,?,?,?)",
                (*row, self._index.version),
            ).lastrowid
            connection.executemany(
                "INSERT INTO blocks VALUES (?,?,?,?,?,?)",
                [(agent, n, block.label, block.value, block.limit, block.version) for n, block in enumerate(blocks)],
            )
            return _agent_record(_agent_row(connection, "id = ?", agent))

        return await self._write(job)

    async def find_agent(self, name: str, deleted: bool = False) -> AgentRecord:
        def job(connection: sqlite3.Connection) -> AgentRecord:
            where = _DELETED if deleted else _LIVE
            row = _agent_row(connection, f"name = ? AND {where}", name)
            if row is None:
                raise _unknown_agent(connection, name, where)
            return _agent_record(row)

        return await self._read(job)

    async def list_agents(self, after: str, limit: int) -> tuple[list[AgentRecord], int]:
        def job(connection: sqlite3.Connection) -> tuple[list[AgentRecord], int]:
            rows = connection.execute(
                f"SELECT {_AGENT_COLUMNS} FROM agents WHERE deleted IS NULL AND name > ? ORDER BY name LIMIT ?",
                (after, limit),
            ).fetchall()
            total = connection.execute("SELECT count(*) FROM agents WHERE deleted IS NULL").fetchone()[0]
            return [_agent_record(row) for row in rows], total

        return await self._read(job)

    async def rename_agent(self, agent: int, new_name: str, event: Event) -> None:
        def job(connection: sqlite3.Connection) -> None:
            _refuse_taken(connection, new_name)
            _store_events(connection, agent, [event])  # goes out under the old name
            _keep_last_seq(connection, agent)
            connection.execute(
                "UPDATE agents SET name = ?, last_seq = max(last_seq, ?) WHERE id = ?",
                (new_name, _last_seq_of_name(connection, new_name), agent),
            )

        await self._write(job)

    async def delete_agent(self, agent: int, event: Event | None, purge: bool) -> None:
        def job(connection: sqlite3.Connection) -> None:
            if event is not None:
                _store_events(connection, agent, [event])
            _keep_last_seq(connection, agent)
            if purge:
                for table in _AGENT_TABLES:
                    connection.execute(f"DELETE FROM {table} WHERE agent = ?", (agent,))
                self._index.drop_agent(connection, agent)
                connection.execute("DELETE FROM agents WHERE id = ?", (agent,))
            else:
                connection.execute("UPDATE agents SET deleted = ? WHERE id = ?", (now_text(), agent))

        await self._write(job)

    async def restore_agent(self, name: str, new_name: str) -> AgentRecord:
        def job(connection: sqlite3.Connection) -> AgentRecord:
            row = _agent_row(connection, f"name = ? AND {_DELETED}", name)
            if row is None:
                raise _unknown_agent(connection, name, _DELETED)
            _refuse_taken(connection, new_name)
            connection.execute(
                "UPDATE agents SET deleted = NULL, name = ?, last_seq = max(last_seq, ?) WHERE id = ?",
                (new_name, _last_seq_of_name(connection, new_name), row[0]),
            )
            return _agent_record(_agent_row(connection, "id = ?", row[0]))

        return await self._write(job)

    # -- steps --

    async def commit(self, agent: int, changes: Changes) -> None:
        await self._write(lambda connection: self._commit(connection, agent, changes))

    def _commit(self, connection: sqlite3.Connection, agent: int, changes: Changes) -> None:
        last_seq = _store_events(connection, agent, changes.events)
        if changes.begins:
            turn_id, digest = changes.begins
            first = changes.events[0].seq or last_seq
            connection.execute("INSERT INTO turns VALUES (?,?,?,0,?,?)", (agent, turn_id, digest, first, last_seq))
        for turn_id in changes.ends:
            ended = (last_seq, agent, turn_id)
            connection.execute("UPDATE turns SET over = 1, last_seq = ? WHERE agent = ? AND turn_id = ?", ended)
        for message in changes.messages:
            message.seq = message.event.seq if message.event and message.event.seq else last_seq
            self._insert_message(connection, agent, message)
        for block in changes.blocks:
            edited = (block.value, block.version, agent, block.label)
            connection.execute("UPDATE blocks SET value = ?, version = ? WHERE agent = ? AND label = ?", edited)
        for passage in changes.passages:
            row = (agent, passage.id, passage.text, passage.time)
            connection.execute("INSERT INTO passages VALUES (?,?,?,?)", row)
            self._index.add(connection, agent, "archival", passage.id, "", passage.time, passage.text)
        for removed in changes.removed:
            connection.execute("DELETE FROM passages WHERE agent = ? AND id = ?", (agent, removed))
            self._index.remove(connection, agent, "archival", removed)
        for request in changes.requests:
            _insert_request(connection, agent, request)
        for column, value in (("state", changes.state), ("config", changes.config)):
            if value is not None:
                connection.execute(f"UPDATE agents SET {column} = ? WHERE id = ?", (encode_json(value), agent))

    def _insert_message(self, connection: sqlite3.Connection, agent: int, message: ChatMessage) -> None:
        said = message.said if message.said != message.text else None  # a user's words are not stored twice
        connection.execute(
            "INSERT INTO messages VALUES (?,?,?,?,?,?,?,?,?,?)",
            (
                *(agent, message.id, message.role, message.time, message.text, message.body, said),
                *(message.turn_id, message.step, message.seq),
            ),
        )
        if message.said:
            self._index.add(connection, agent, "recall", message.id, message.role, message.time, message.said)

    async def load(self, agent: int, first: int) -> tuple[list[Block], list[ChatMessage], JSON, list[TurnRecord]]:
        def job(connection: sqlite3.Connection) -> tuple[list[Block], list[ChatMessage], JSON, list[TurnRecord]]:
            blocks = connection.execute(
                'SELECT label, value, "limit", version FROM blocks WHERE agent = ? ORDER BY position', (agent,)
            ).fetchall()
            messages = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS} FROM messages WHERE agent = ? AND id >= ? ORDER BY id", (agent, first)
            ).fetchall()
            turns = connection.execute(
                "SELECT turn_id, digest, over, first_seq, last_seq FROM turns INDEXED BY turns_open"
                " WHERE agent = ? AND NOT over",
                (agent,),
            ).fetchall()
            return (
                [Block(*row) for row in blocks],
                [_chat_message(row) for row in messages],
                _counts(connection, agent),
                [TurnRecord(*row) for row in turns],
            )

        return await self._read(job)

    # -- reading --

    async def messages(self, agent: int, before: int | None, limit: int) -> tuple[list[ChatMessage], int]:
        def job(connection: sqlite3.Connection) -> tuple[list[ChatMessage], int]:
            rows = connection.execute(
                f"SELECT {_MESSAGE_COLUMNS} FROM messages WHERE agent = ? AND id < ? ORDER BY id DESC LIMIT ?",
                (agent, 2**62 if before is None else before, limit),
            ).fetchall()
            return [_chat_message(row) for row in reversed(rows)], _counts(connection, agent)["last_message"]

        return await self._read(job)

    async def passage(self, agent: int, passage: int) -> Passage | None:
        def job(connection: sqlite3.Connection) -> Passage | None:
            row = connection.execute("SELECT id, text, time FROM passages WHERE agent = ? AND id = ?", (agent, passage))
            return next((Passage(*found) for found in row), None)

        return await self._read(job)

    async def turn(self, agent: int, turn_id: str) -> TurnRecord | None:
        def job(connection: sqlite3.Connection) -> TurnRecord | None:
            row = connection.execute(
                "SELECT turn_id, digest, over, first_seq, last_seq FROM turns WHERE agent = ? AND turn_id = ?",
                (agent, turn_id),
            ).fetchone()
            return TurnRecord(*row) if row else None

        return await self._read(job)

    async def events(
        self, agent: int, after: int, limit: int, turn_id: str | None = None, up_to: int = 2**62
    ) -> list[tuple[int, str]]:
        def job(connection: sqlite3.Connection) -> list[tuple[int, str]]:
            rows: list[tuple[int, str]] = []
            size = 0
            for seq, text in connection.execute(
                "SELECT seq, text FROM events"
                " WHERE agent = ? AND seq > ? AND seq <= ? AND turn_id IS coalesce(?, turn_id) ORDER BY seq LIMIT ?",
                (agent, after, up_to, turn_id, limit),
            ):
                size += len(text)
                if rows and size > REPLAY_PAGE:
                    break
                rows.append((seq, text))
            return rows

        return await self._read(job)

    async def backlog(self, agent: int, after: int, turn_id: str | None = None) -> int:
        sql = """SELECT sum(length(text)) FROM (SELECT text FROM events
            WHERE agent = ? AND seq > ? AND turn_id IS coalesce(?, turn_id) ORDER BY seq LIMIT 1000)"""

        def job(connection: sqlite3.Connection) -> int:
            return connection.execute(sql, (agent, after, turn_id)).fetchone()[0] or 0

        return await self._read(job)

    async def request(self, agent: int, turn_id: str, step: int) -> tuple[RequestRecord, list[str]] | None:
        def job(connection: sqlite3.Connection) -> tuple[RequestRecord, list[str]] | None:
            part = "(SELECT text FROM parts WHERE parts.agent = requests.agent AND parts.digest = requests.{0})"
            system, summary, tools, extra = (part.format(name) for name in ("system", "summary", "tools", "extra"))
            row = connection.execute(
                f"SELECT turn_id, step, head, {system}, {summary}, {tools}, {extra}, first, last, digest, response,"
                " usage, first_token_ms, total_ms FROM requests WHERE agent = ? AND turn_id = ? AND step = ?",
                (agent, turn_id, step),
            ).fetchone()
            if row is None:
                return None
            record = RequestRecord(*row)
            record.response, record.usage = decode_json(row[10]), decode_json(row[11])
            between = "SELECT body FROM messages WHERE agent = ? AND id BETWEEN ? AND ? ORDER BY id"
            return record, [body for (body,) in connection.execute(between, (agent, record.first, record.last))]

        return await self._read(job)

    async def search(
        self,
        agent: int,
        query: str,
        stores: tuple[str, ...],
        roles: tuple[str, ...] | None,
        since: str | None,
        until: str | None,
        limit: int,
        offset: int,
        up_to: tuple[int, int] | None = None,
        near: Sequence[int] = (),
    ) -> tuple[list[Found], int]:
        def job(connection: sqlite3.Connection) -> tuple[list[Found], int]:
            hits, total = self._index.search(
                connection, agent, query, stores, roles, since, until, limit, offset, up_to, near
            )
            return [_found(connection, agent, hit.store, hit.item, hit.score) for hit in hits], total

        return await self._read(job)

    async def without_vector(self, agent: int, model: str, dimension: int | None, after: tuple[int, int]) -> list[int]:
        def job(connection: sqlite3.Connection) -> list[int]:
            return self._index.without_vector(connection, agent, model, dimension, after)

        return await self._read(job)

    async def texts_to_embed(self, numbers: Sequence[int]) -> list[tuple[int, str]]:
        sql = f"SELECT doc, text FROM search_rows WHERE doc IN ({', '.join('?' * len(numbers))})"
        return await self._read(lambda connection: connection.execute(sql, numbers).fetchall())

    async def nearest(
        self,
        agent: int,
        near: Near,
        stores: tuple[str, ...],
        roles: tuple[str, ...] | None,
        since: str | None,
        until: str | None,
        up_to: tuple[int, int] | None,
    ) -> list[int]:
        def job(connection: sqlite3.Connection) -> list[int]:
            return self._index.nearest(connection, near, agent, stores, roles, since, until, up_to)

        return await self._read(job)

    async def keep_vectors(self, model: str, vectors: Sequence[tuple[int, str, bytes]]) -> None:
        await self._write(lambda connection: self._index.keep_vectors(connection, model, vectors))


def _settle(settled: list[tuple[asyncio.Future[Any], tuple[Any, BaseException | None]]]) -> None:
    """Give each write job's future its outcome, in the order of the writes, on the loop."""
    for done, (result, error) in settled:
        if done.done():
            continue
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)
            done.exception()  # a writer that nobody waits for any more is no unhandled error


def _store_error(error: BaseException) -> BaseException:
    """`error` as the store tells it: MemwsErrors as they are, SQLite's as StoreFailed."""
    if isinstance(error, MemwsError):
        return error
    if not isinstance(error, sqlite3.Error):
        logger.error("a write failed", exc_info=error)
    return StoreFailed(f"the database refused a write: {error}")


def _agent_row(connection: sqlite3.Connection, where: str, value: Any) -> Any:
    return connection.execute(
        f"SELECT {_AGENT_COLUMNS} FROM agents WHERE {where} ORDER BY deleted DESC, id DESC LIMIT 1", (value,)
    ).fetchone()


def _agent_record(row: Any) -> AgentRecord:
    agent, name, config, state, *rest = row
    return AgentRecord(agent, name, _read_object(config), _read_object(state), *rest)


def _read_object(text: Any) -> JSON:
    """A stored JSON object; where it is damaged, one that says so: a load mends it."""
    with contextlib.suppress(ValueError, RecursionError, TypeError):
        value = decode_json(text)
        if isinstance(value, dict):
            return value
    return {LOST: True}


def _chat_message(row: Any) -> ChatMessage:
    number, role, time_, text, body, turn_id, step, said, seq = row
    if said is None and role == "user":
        said = text
    return ChatMessage(number, role, time_, text, body, turn_id, step, said or "", None, seq)


def _unknown_agent(connection: sqlite3.Connection, name: str, where: str) -> UnknownAgent:
    names = [row[0] for row in connection.execute(f"SELECT DISTINCT name FROM agents WHERE {where} LIMIT 5000")]
    total = connection.execute(f"SELECT count(DISTINCT name) FROM agents WHERE {where}").fetchone()[0]
    return UnknownAgent(name, difflib.get_close_matches(name[:MAX_NAME], names, 10, 0.0), total)


def _refuse_taken(connection: sqlite3.Connection, name: str) -> None:
    if _agent_row(connection, "name = ? AND deleted IS NULL", name):
        raise Refused("name_taken", f"there is an agent {name!r} already; choose another name or load it")


def _last_seq_of_name(connection: sqlite3.Connection, name: str) -> int:
    row = connection.execute("SELECT last_seq FROM names WHERE name = ?", (name,)).fetchone()
    return int(row[0]) if row else 0


def _keep_last_seq(connection: sqlite3.Connection, agent: int) -> None:
    """The agent gives up its name: whoever has it next goes on above the seqs that were seen under it."""
    connection.execute(
        "INSERT INTO names SELECT name, last_seq FROM agents WHERE id = ?"
        " ON CONFLICT (name) DO UPDATE SET last_seq = max(last_seq, excluded.last_seq)",
        (agent,),
    )


def _store_events(connection: sqlite3.Connection, agent: int, events: list[Event]) -> int:
    """Give events their seq and store them; the agent's last seq. Raises StoreFailed where the agent is gone."""
    now = now_text()
    row = connection.execute(
        "UPDATE agents SET last_seq = last_seq + ?, last_active = ? WHERE id = ? AND deleted IS NULL"
        " RETURNING last_seq",
        (len(events), now, agent),
    ).fetchone()
    if row is None:
        raise StoreFailed("the agent was deleted meanwhile")
    last_seq = int(row[0])
    for seq, event in enumerate(events, last_seq - len(events) + 1):
        event.seq, event.time = seq, now
    rows = ((agent, event.seq, event.turn_id, event.text) for event in events)
    connection.executemany("INSERT INTO events VALUES (?,?,?,?)", rows)
    return last_seq


def _insert_request(connection: sqlite3.Connection, agent: int, request: RequestRecord) -> None:
    digests = []
    for text in (request.system, request.summary, request.tools, request.extra):
        digest = hashlib.sha256(text.encode()).digest()
        digests.append(digest)
        connection.execute("INSERT OR IGNORE INTO parts VALUES (?,?,?)", (agent, digest, text))
    connection.execute(
        "INSERT OR REPLACE INTO requests VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            *(agent, request.turn_id, request.step, request.head, *digests, request.first, request.last),
            *(request.digest, encode_long(clean_value(request.response)), encode_json(request.usage)),
            *(request.first_token_ms, request.total_ms),
        ),
    )


def _counts(connection: sqlite3.Connection, agent: int) -> JSON:
    """How much recall and archival memory hold, and the last ids given."""
    last_message = connection.execute("SELECT max(id) FROM messages WHERE agent = ?", (agent,)).fetchone()[0] or 0
    archival, last_passage = connection.execute(
        "SELECT count(*), max(id) FROM passages WHERE agent = ?", (agent,)
    ).fetchone()
    # Messages are never deleted and their ids have no gaps, so the last one counts them.
    return {
        "recall": last_message,
        "archival": archival,
        "last_message": last_message,
        "last_passage": last_passage or 0,
    }


def _found(connection: sqlite3.Connection, agent: int, store: str, item: int, score: float) -> Found:
    if store == "archival":
        row = connection.execute("SELECT '', time, text FROM passages WHERE agent = ? AND id = ?", (agent, item))
    else:
        row = connection.execute(
            "SELECT role, time, coalesce(said, text) FROM messages WHERE agent = ? AND id = ?", (agent, item)
        )
    role, time_, text = row.fetchone() or ("", "", "")
    return Found(item, store, role, time_, text, score)


# ---- files -----------------------------------------------------------------------------------------------------------


def connect_database(path: str) -> sqlite3.Connection:
    """A connection that leaves transactions to us and may be closed by another thread."""
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False)
    connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")  # one bad byte ends nothing
    return connection


def open_database(path: str, sync: str) -> sqlite3.Connection:
    """The writer's connection to the database, made, migrated and indexed anew where needed. Raises UsageError."""
    try:
        if path != ":memory:":
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        connection = connect_database(path)
        try:
            _migrate(connection, path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {'NORMAL' if sync == 'normal' else 'FULL'}")
            connection.execute("PRAGMA foreign_keys = OFF")
            SearchIndex(connection).refresh(connection)
        except BaseException:
            connection.close()
            raise
        return connection
    except (OSError, sqlite3.Error, ValueError) as error:  # ValueError: a damaged schema that is no UTF-8
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot use the database {path!r} ({reason}); name another file with --db") from error


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    """Bring the database to the newest schema, each version in one transaction."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    used = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if used and application != _APPLICATION_ID:
        raise UsageError(f"{path!r} is a database of another program; name another file with --db")
    if version < 0:
        raise UsageError(f"{path!r} is damaged (schema {version}); memws.py check tells more, a backup is the way back")
    if version > len(_MIGRATIONS):
        raise UsageError(
            f"{path!r} was written by a newer memws (schema {version}); use that one or another file with --db"
        )
    for number in range(version, len(_MIGRATIONS)):
        connection.executescript(
            f"BEGIN IMMEDIATE; {_MIGRATIONS[number]};"
            f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {number + 1}; COMMIT;"
        )


class DatabaseLock:
    """Keeps other servers off a database through a file beside it; goes with the process. Raises UsageError."""

    def __init__(self, path: str) -> None:
        self._path = pathlib.Path(f"{path}.lock")
        try:
            self._made = not self._path.exists()
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            text = f"cannot use the database {path!r} ({error.strerror}); name another file with --db"
            raise UsageError(text) from error
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(self._handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            text = f"another memws server uses the database {path!r}; stop it, or name another file with --db"
            raise UsageError(text) from None

    def give_up(self) -> None:
        """Let go of a database that turned out to be none, and leave no file behind."""
        if self._made:
            with contextlib.suppress(OSError):
                self._path.unlink()
        self.release()

    def release(self) -> None:
        os.close(self._handle)


# ---- keeping databases -----------------------------------------------------------------------------------------------
# For the command line: on connections of their own, beside a running server where nothing is written.

EXPORT_FORMAT: Final = 1

Mender = Callable[[JSON], tuple[JSON, list[str]]]
"Gives the object that an agent can be loaded with, and what of it had to be changed."


def read_database(path: str, write: bool = False) -> sqlite3.Connection:
    """A connection that only reads, unless told otherwise. Raises UsageError where there is no memws database."""
    try:
        if not pathlib.Path(path).is_file():
            raise UsageError(f"there is no database {path!r}; name one with --db")
        connection = connect_database(path)
        connection.execute(f"PRAGMA query_only = {'OFF' if write else 'ON'}")
        if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
            connection.close()
            raise UsageError(f"{path!r} is no memws database; name one with --db")
        if write:
            _migrate(connection, path)
    except sqlite3.Error as error:
        raise UsageError(f"cannot read the database {path!r} ({error}); name another file with --db") from error
    return connection


def backup_database(path: str, target: str, progress: Callable[[int, int], None]) -> None:
    """Copy a database, page by page, also while a server writes. Raises UsageError; an existing target is kept.

    `progress` is called with the pages that remain and their total.
    """
    with contextlib.closing(read_database(path)) as source:
        try:
            os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            try:
                with contextlib.closing(sqlite3.connect(target)) as copy, snapshot(source):
                    source.execute("SELECT count(*) FROM sqlite_master")  # without it, each write begins the copy anew
                    source.backup(copy, pages=1000, progress=lambda _, remaining, total: progress(remaining, total))
            except BaseException:
                pathlib.Path(target).unlink()
                raise
        except FileExistsError:
            raise UsageError(f"{target!r} exists; name a file that does not") from None
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"cannot write the backup {target!r} ({error}); choose another place") from error


@contextlib.contextmanager
def telling_damage(what: str) -> Iterator[None]:
    """Around reading what may be damaged. Raises UsageError."""
    try:
        yield
    except (sqlite3.Error, ValueError, TypeError, LookupError, OverflowError, AttributeError) as error:
        text = f"{what} is damaged ({error}); memws.py check tells more, a backup is the way back"
        raise UsageError(text) from error


def export_agent(connection: sqlite3.Connection, name: str) -> JSON:
    """One agent, memory and history, as JSON: the rows of its tables, bytes in hexadecimal. Raises UnknownAgent."""
    with snapshot(connection):
        return _export(connection, name)


def _export(connection: sqlite3.Connection, name: str) -> JSON:
    row = _agent_row(connection, f"name = ? AND {_LIVE}", name)
    if row is None:
        raise _unknown_agent(connection, name, _LIVE)
    record = _agent_record(row)
    told = {key: getattr(record, key) for key in ("name", "config", "state", "created", "last_active", "last_seq")}
    tables = {}
    for table in _AGENT_TABLES:
        columns = [column for column in _columns(connection, table) if column != "agent"]
        quoted = ", ".join(f'"{column}"' for column in columns)
        rows = connection.execute(f"SELECT {quoted} FROM {table} WHERE agent = ? ORDER BY 1, 2", (record.id,))
        tables[table] = [
            {
                column: value.hex() if isinstance(value, bytes) else value
                for column, value in zip(columns, row, strict=True)
            }
            for row in rows
        ]
    return {"memws_agent": EXPORT_FORMAT, "agent": told, **tables}


def import_agent(connection: sqlite3.Connection, data: Any, menders: Mapping[str, Mender]) -> str:
    """Store what export_agent gave, under its name; the name. Raises UsageError with the place of what is damaged, and
    Refused (name_taken); then nothing is stored."""
    if not isinstance(data, dict) or data.get("memws_agent") != EXPORT_FORMAT:
        raise UsageError("the file is no agent that memws exported")
    told = data.get("agent")
    kinds = {"name": str, "config": dict, "state": dict, "created": str, "last_active": str, "last_seq": int}
    if not isinstance(told, dict) or told.keys() != kinds.keys():
        raise UsageError(f"damaged: agent: expected the fields {', '.join(kinds)}")
    for key, kind in kinds.items():
        if type(told[key]) is not kind:
            raise UsageError(f"damaged: agent.{key}: expected a {kind.__name__}, but got {quote(told[key])}")
    valid_name(told["name"])
    for key, mender in menders.items():
        told[key], faults = mender(told[key])
        if faults:
            raise UsageError(f"damaged: agent.{key}: {faults[0]}")
    if not 0 <= told["last_seq"] < 2**53:
        raise UsageError(f"damaged: agent.last_seq: expected a number of events, but got {told['last_seq']}")
    index = SearchIndex(connection)
    with transaction(connection):
        _refuse_taken(connection, told["name"])
        last_seq = max(told["last_seq"], _last_seq_of_name(connection, told["name"]))
        agent = connection.execute(
            "INSERT INTO agents (name, config, state, created, last_active, last_seq) VALUES (?,?,?,?,?,?)",
            (
                *(told["name"], encode_json(told["config"]), encode_json(told["state"])),
                *(told["created"], told["last_active"], last_seq),
            ),
        ).lastrowid
        assert agent is not None
        for table in _AGENT_TABLES:
            _import_rows(connection, agent, table, data.get(table))
        newest = connection.execute("SELECT max(seq) FROM events WHERE agent = ?", (agent,)).fetchone()[0]
        if newest is not None and newest > told["last_seq"]:
            raise UsageError(f"damaged: agent.last_seq: it is {told['last_seq']}, but events go up to {newest}")
        if last_seq > told["last_seq"]:  # seqs go on above those seen under the name: the event tells of the jump
            text = "the agent was imported under a name that was in use before"
            _store_events(
                connection, agent, response_events("agent_change", text, turn_id=None, step=0, change="imported")
            )
        index.index_agent(connection, agent)
    return str(told["name"])


def _import_rows(connection: sqlite3.Connection, agent: int, table: str, rows: Any) -> None:
    """Store the rows of one table. Raises UsageError with the place of what is damaged."""
    if not isinstance(rows, list):
        raise UsageError(f"damaged: {table}: expected a list")
    columns = {name: kind for name, kind in _columns(connection, table).items() if name != "agent"}
    insert = f"INSERT INTO {table} VALUES ({','.join('?' * (len(columns) + 1))})"
    for number, row in enumerate(rows):
        place = f"{table}[{number}]"
        if not isinstance(row, dict) or row.keys() != columns.keys():
            raise UsageError(f"damaged: {place}: expected the fields {', '.join(columns)}")
        values = [_imported(f"{place}.{name}", row[name], *kind) for name, kind in columns.items()]
        if table == "blocks" and len(row["value"]) > row["limit"]:
            raise UsageError(f"damaged: {place}.value: it is longer than its limit")
        if table == "messages" and row["role"] not in _ROLES:
            raise UsageError(f"damaged: {place}.role: expected one of {', '.join(_ROLES)}, got {quote(row['role'])}")
        if table == "messages" and read_body(ChatMessage(row["id"], row["role"], "", "", row["body"])) is None:
            raise UsageError(f"damaged: {place}.body: expected a chat message, but got {quote(row['body'])}")
        try:
            connection.execute(insert, (agent, *values))
        except (sqlite3.Error, OverflowError) as error:
            raise UsageError(f"damaged: {place}: {error}") from None


_ROLES: Final = ("user", "assistant", "tool", "system")


def _imported(place: str, value: Any, kind: str, needed: bool) -> Any:
    """A value for a column of that SQL type. Raises UsageError."""
    if value is None and not needed:
        return None
    if kind == "INTEGER" and type(value) is int:
        return value
    if kind == "TEXT" and isinstance(value, str) and _is_text(value):
        if place.startswith("events") and place.endswith(".text") and LOST in _read_object(value):
            raise UsageError(f"damaged: {place}: expected a JSON object, but got {quote(value)}")
        return value
    if kind == "BLOB" and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return bytes.fromhex(value)
    raise UsageError(f"damaged: {place}: expected {kind}, but got {quote(value)}")


def _columns(connection: sqlite3.Connection, table: str) -> dict[str, tuple[str, bool]]:
    """The columns of a table with their SQL type and whether they need a value."""
    rows = connection.execute(f"PRAGMA table_info({table})")
    return {name: (kind, bool(needed or key)) for _, name, kind, needed, _, key in rows}


@dataclass(frozen=True, slots=True)
class Damage:
    """Something wrong in a database: whose it is, what it is, whether it can be mended, and whether it was."""

    agent: str
    text: str
    mendable: bool = False
    repaired: bool = False


Fault = tuple[str, Callable[[], object] | None]
"What is wrong, and what mends it in the transaction it is called in."


def check_database(connection: sqlite3.Connection, menders: Mapping[str, Mender], repair: bool) -> Iterator[Damage]:
    """Look for damage, agent by agent, and with `repair` mend what can be mended without deleting what was said.

    menders: of an agent's config and state. Without `repair` all is read as of one moment.
    """
    index = None
    with contextlib.suppress(sqlite3.Error):  # of another version, for an SQLite with another FTS5, or damaged
        connection.execute("SELECT search_version FROM agents LIMIT 1")
        index = SearchIndex(connection)
    try:
        with contextlib.nullcontext() if repair else snapshot(connection):
            yield from _check_all(connection, index, menders, repair)
    except (sqlite3.Error, ValueError) as error:
        yield Damage("", f"the file cannot be read: {error}")


def _check_all(
    connection: sqlite3.Connection, index: SearchIndex | None, menders: Mapping[str, Mender], repair: bool
) -> Iterator[Damage]:
    connection.create_function("whole_text", 1, lambda data: str(data, "utf-8", "replace"), deterministic=True)
    for (line,) in connection.execute("PRAGMA integrity_check(20)").fetchall():
        if line != "ok":
            yield Damage("", f"the file is damaged: {line}")
    lost = " UNION ".join(f"SELECT agent FROM {table}" for table in _AGENT_TABLES)
    for (agent,) in connection.execute(f"SELECT agent FROM ({lost}) EXCEPT SELECT id FROM agents").fetchall():
        yield from _told("", [_lost_agent(connection, agent)], connection, repair)
    for agent, name in connection.execute("SELECT id, name FROM agents ORDER BY name, id").fetchall():
        yield from _told(str(name), _check_agent(connection, agent, index, menders), connection, repair)


def _told(name: str, faults: Iterable[Fault], connection: sqlite3.Connection, repair: bool) -> Iterator[Damage]:
    """The faults as damage, mended where that is asked for; what cannot be read ends the list, with its own line."""
    try:
        for text, mend in faults:
            if repair and mend is not None:
                with transaction(connection):
                    mend()
            yield Damage(name, text, mend is not None, repair and mend is not None)
    except (sqlite3.Error, ValueError, TypeError, LookupError, OverflowError, AttributeError) as error:
        yield Damage(name, f"cannot be read: {error}")


def _lost_agent(connection: sqlite3.Connection, agent: int) -> Fault:
    """An agent of which everything is there but its row."""

    def mend() -> None:
        last_seq = connection.execute("SELECT coalesce(max(seq), 0) FROM events WHERE agent = ?", (agent,)).fetchone()[
            0
        ]
        row = (agent, f"recovered-{agent}", "{}", "{}", now_text(), now_text(), last_seq)
        sql = "INSERT INTO agents (id, name, config, state, created, last_active, last_seq) VALUES (?,?,?,?,?,?,?)"
        connection.execute(sql, row)

    return f"agent number {agent} has a history and no name; a repair calls it recovered-{agent}", mend


def _check_agent(connection: sqlite3.Connection, agent: int, index: SearchIndex | None, menders: Mapping[str, Mender]
                 ) -> Iterator[Fault]:  # fmt: skip
    """What is wrong with one agent."""

    def updating(sql: str, *values: Any) -> Callable[[], object]:
        return lambda: connection.execute(sql, values)

    for table in ("agents", *_AGENT_TABLES):
        yield from _check_columns(connection, table, "id" if table == "agents" else "agent", agent)
    name, last_seq = connection.execute("SELECT name, last_seq FROM agents WHERE id = ?", (agent,)).fetchone()
    try:
        valid_name(name)
    except Refused:
        called = f"recovered-{agent}"
        yield (
            f"its name cannot be; a repair calls it {called}",
            updating("UPDATE agents SET name = ? WHERE id = ?", called, agent),
        )
    for column, mender in menders.items():
        text = connection.execute(f"SELECT {column} FROM agents WHERE id = ?", (agent,)).fetchone()[0]
        mended, faults = mender(_read_object(text))
        if faults:
            sql = f"UPDATE agents SET {column} = ? WHERE id = ?"
            yield "; ".join(faults), updating(sql, encode_json(mended), agent)
    blocks = connection.execute('SELECT label, value, "limit" FROM blocks WHERE agent = ?', (agent,)).fetchall()
    for label in {"persona", "human"} - {label for label, *_ in blocks}:
        sql = "INSERT INTO blocks SELECT ?, coalesce(max(position), -1) + 1, ?, '', ?, 1 FROM blocks WHERE agent = ?"
        yield (
            f"its block {label} is missing; a repair makes an empty one",
            updating(sql, agent, label, BLOCK_LIMIT, agent),
        )
    for label, value, limit in blocks:
        if isinstance(value, str) and isinstance(limit, int) and len(value) > limit:
            text = f"block {label} holds {len(value):,} of {limit:,} characters; a repair raises its limit"
            sql = 'UPDATE blocks SET "limit" = ? WHERE agent = ? AND label = ?'
            yield text, updating(sql, len(value), agent, label)
    ids = connection.execute("SELECT count(*), coalesce(max(id), 0) FROM messages WHERE agent = ?", (agent,)).fetchone()
    if ids[0] != ids[1]:
        yield (
            f"{ids[1] - ids[0]} chat messages are missing between 1 and {ids[1]}; nothing here can bring them back",
            None,
        )
    yield from _check_events(connection, agent, last_seq)
    yield from _check_turns(connection, agent)
    yield from _check_history(connection, agent)
    version = "SELECT search_version FROM agents WHERE id = ?"
    known = index is not None and connection.execute(version, (agent,)).fetchone()[0] == index.version
    if index and known and (drift := index.drift(connection, agent)):
        yield (
            f"search {drift}; after a repair the next start indexes it anew",
            functools.partial(index.clear, connection),
        )


def _check_columns(connection: sqlite3.Connection, table: str, owner: str, agent: int) -> Iterator[Fault]:
    """Values that are not of their column's type, and texts that are no UTF-8."""
    for column, (kind, needed) in _columns(connection, table).items():
        name = f'"{column}"'
        strange = f"typeof({name}) <> '{kind.lower()}'" + ("" if needed else f" AND {name} IS NOT NULL")
        sql = f"SELECT count(*) FROM {table} WHERE {owner} = ? AND {{}}"
        count = connection.execute(sql.format(strange), (agent,)).fetchone()[0]
        if count:
            mend = f"UPDATE {table} SET {name} = CAST(coalesce({name}, '') AS {kind}) WHERE {owner} = ? AND {strange}"
            text = f"{table}.{column} is {count} times no {kind}; a repair keeps what can be read of it"
            yield text, functools.partial(connection.execute, mend, (agent,))
        if kind == "TEXT":
            test = f"typeof({name}) = 'text' AND whole_text(CAST({name} AS BLOB)) <> {name}"
            count = connection.execute(sql.format(test), (agent,)).fetchone()[0]
            if count:
                yield f"{table}.{column} is {count} times no UTF-8; it is read with \ufffd in that place", None


def _check_events(connection: sqlite3.Connection, agent: int, last_seq: int) -> Iterator[Fault]:
    """Events that are missing or damaged. Seqs jump where an agent comes under a name that was in use before, and an
    agent_change tells of it."""
    for (seq,) in connection.execute(
        "SELECT seq FROM events WHERE agent = ? AND NOT (json_valid(text) AND json_type(text) = 'object')", (agent,)
    ).fetchall():
        yield f"event {seq} is no JSON object; a replay says so in its place", None
    begun = connection.execute("SELECT min(first_seq) FROM turns WHERE agent = ?", (agent,)).fetchone()[0]
    before, kind = (begun or 1) - 1, "agent_change" if begun is None else ""
    rows = connection.execute("SELECT seq, text FROM events WHERE agent = ? ORDER BY seq", (agent,))
    for seq, text in itertools.chain(rows, [(last_seq + 1, "")]):
        told = event_kind(text)[1]
        if seq > before + 1 and "agent_change" not in (kind, told):
            yield f"{seq - before - 1} events are missing after {before}; nothing here can bring them back", None
        before, kind = max(seq, before), told
    if before > last_seq + 1:
        sql = "UPDATE agents SET last_seq = (SELECT max(seq) FROM events WHERE agent = ?) WHERE id = ?"
        text = f"its last seq {last_seq} is below that of its events; a repair raises it"
        yield text, functools.partial(connection.execute, sql, (agent, agent))


def _check_turns(connection: sqlite3.Connection, agent: int) -> Iterator[Fault]:
    """Turns that are not known as what their events tell."""
    rows = connection.execute(
        "SELECT turn_id, min(seq), max(seq), over FROM events LEFT JOIN turns USING (agent, turn_id)"
        " WHERE agent = ? AND turn_id IS NOT NULL AND coalesce(over, 0) = 0 GROUP BY turn_id",
        (agent,),
    ).fetchall()
    for turn_id, first, last, over in rows:
        end = connection.execute("SELECT text FROM events WHERE agent = ? AND seq = ?", (agent, last)).fetchone()[0]
        ended = event_kind(end)[0] in TERMINAL_TYPES
        if over is None:
            said = connection.execute(
                "SELECT text FROM messages WHERE agent = ? AND turn_id = ? AND role = 'user' ORDER BY id",
                (agent, turn_id),
            ).fetchone()
            row = (agent, turn_id, message_digest(said[0]) if said else None, ended, first, last)
            mend = functools.partial(connection.execute, "INSERT INTO turns VALUES (?,?,?,?,?,?)", row)
            yield f"turn {quote(turn_id)} has events, but is not known; a repair makes it known", mend
        elif ended:
            sql = "UPDATE turns SET over = 1, last_seq = ? WHERE agent = ? AND turn_id = ?"
            mend = functools.partial(connection.execute, sql, (last, agent, turn_id))
            yield f"turn {quote(turn_id)} has ended, but is kept as open; a repair closes it", mend


def _check_history(connection: sqlite3.Connection, agent: int) -> Iterator[Fault]:
    """What the prompt must not hold: a load and a repair let it begin behind that; search finds it still."""
    state = _read_object(connection.execute("SELECT state FROM agents WHERE id = ?", (agent,)).fetchone()[0])
    messages = [
        _chat_message(row)
        for row in connection.execute(
            f"SELECT {_MESSAGE_COLUMNS} FROM messages WHERE agent = ? AND id >= ? ORDER BY id",
            (agent, state.get("cut", 0)),
        )
    ]
    faults, open_calls = history_faults(messages)
    if faults:
        begin = max(index for index, _ in faults)
        first = messages[begin].id if begin < len(messages) else messages[-1].id + 1
        values = (encode_json({**state, "cut": first}), agent)
        mend = functools.partial(connection.execute, "UPDATE agents SET state = ? WHERE id = ?", values)
        for _, text in faults:
            yield f"{text}; a repair lets the prompt begin behind it", mend
    running = {
        turn_id for (turn_id,) in connection.execute("SELECT turn_id FROM turns WHERE agent = ? AND NOT over", (agent,))
    }
    for number, (message, call_id, _) in enumerate(open_calls, 1):
        if message.turn_id not in running:
            body = encode_json({"role": "tool", "tool_call_id": call_id, "content": INTERRUPTED})
            row = (agent, messages[-1].id + number, "tool", now_text(), INTERRUPTED, body, "", *_place(messages[-1]))
            mend = functools.partial(connection.execute, "INSERT INTO messages VALUES (?,?,?,?,?,?,?,?,?,?)", row)
            yield f"the call {quote(call_id)} of chat message {message.id} has no result; a repair adds one", mend


def _place(message: ChatMessage) -> tuple[str | None, int, int]:
    return message.turn_id, message.step, message.seq


# ======================================================================================================================
# 6. LLM: the model protocol, OpenAI-compatible endpoints, the offline model
# ======================================================================================================================


class GrowingText:
    """A text that comes in pieces, which are joined to ever longer ones: adding to a str copies all of it each time."""

    __slots__ = ("_pieces",)

    def __init__(self, text: str = "") -> None:
        self._pieces = [text] if text else []

    def add(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            while len(self._pieces) > 1 and len(self._pieces[-2]) <= len(self._pieces[-1]):
                last = self._pieces.pop()
                self._pieces[-1] += last

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def __str__(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""


class RawCall:
    """A tool call as a model streams it: its arguments are text until they are whole."""

    def __init__(self, call_id: str = "", name: str = "", arguments: str = "") -> None:
        self.id = call_id
        self.name = name
        self.growing = GrowingText(arguments)

    @property
    def arguments(self) -> str:
        return str(self.growing)


class ReplyText:
    """Reads the text of send_message out of arguments that are still arriving: JSON cut anywhere."""

    _START = re.compile(r'"message"\s*:\s*"')
    _HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    _WHOLE = re.compile(  # a high surrogate waits for what follows it; one that stays alone is no reason to stop
        rf'(?:[^"\\]|{_HIGH}{_LOW}|{_HIGH}(?=[^\\]|\\[^u]|\\u[0-9a-ce-fA-CE-F]|\\u[dD][0-9a-bA-B])'
        r"|\\u(?![dD][89abAB])[0-9a-fA-F]{4}|\\[^u])*"
    )

    def __init__(self) -> None:
        self._rest = ""
        "What came and was not read yet."
        self._begun = False

    def feed(self, piece: str) -> None:
        """Take more of the arguments."""
        self._rest += piece

    def news(self, more: str = "") -> str:
        """What has come since the last call, and with `more`; escapes that are cut wait for their rest."""
        self.feed(more)
        if not self._begun:
            start = self._START.search(self._rest)
            if start is None:
                return ""
            self._begun, self._rest = True, self._rest[start.end() :]
        whole = self._WHOLE.match(self._rest)
        text = whole.group() if whole else ""
        self._rest = self._rest[len(text) :]
        if self._rest[:1] == '"':  # the end of the message: the rest is nothing to read
            self._rest = '"'
        with contextlib.suppress(ValueError):
            return clean_text(str(decode_loose(f'"{text}"')))
        return ""


class ModelReply:
    """What a model has answered so far; `feed` takes the chunks of a chat-completions stream."""

    def __init__(self) -> None:
        self._text, self._monologue = GrowingText(), GrowingText()
        self.calls: list[RawCall] = []
        self.finish: str | None = None
        self.usage: JSON | None = None
        "{input_tokens, output_tokens}, where the endpoint tells."
        self.refusal = ""
        self.whole = False
        "The endpoint said that this was all."
        self._untold: list[str] = []
        "What came of the monologue since the last news."
        self._replies: list[ReplyText] = []

    @property
    def text(self) -> str:
        """The content."""
        return str(self._text)

    @property
    def monologue(self) -> str:
        """Reasoning and content in the order they came."""
        return str(self._monologue)

    def feed(self, chunk: JSON) -> None:
        """Take one chunk. Endpoints differ: whatever is missing or of another type counts as absent."""
        usage = chunk.get("usage")
        if isinstance(usage, dict) and type(usage.get("prompt_tokens")) is int:
            output = usage.get("completion_tokens")
            self.usage = {"input_tokens": usage["prompt_tokens"], "output_tokens": output if type(output) is int else 0}
        choices = chunk.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        if isinstance(choice.get("finish_reason"), str) and choice["finish_reason"]:
            self.finish = choice["finish_reason"]
        delta = choice.get("delta") or choice.get("message")
        if isinstance(delta, dict):
            self._feed_delta(delta, whole="message" in choice)

    def _feed_delta(self, delta: JSON, whole: bool) -> None:
        reasoning = _text_of(delta.get("reasoning_content")) or _text_of(delta.get("reasoning"))
        content = _text_of(delta.get("content"))
        between = "\n" if content and not self._text and (self._monologue or reasoning) else ""
        self._text.add(content)
        for piece in (reasoning, between, content):
            if piece:
                self._monologue.add(piece)
                self._untold.append(piece)
        self.refusal += _text_of(delta.get("refusal"))
        calls = delta.get("tool_calls")
        if isinstance(delta.get("function_call"), dict):  # the API's first form of tools, still spoken by some
            calls = [{"index": 0, "function": delta["function_call"]}]
        for number, piece in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(piece, dict):
                self._feed_call({"index": number, **piece} if whole else piece)

    def _feed_call(self, piece: JSON) -> None:
        index, call_id = piece.get("index"), _text_of(piece.get("id"))
        function = piece.get("function")
        function = function if isinstance(function, dict) else {}
        name = _text_of(function.get("name"))
        if type(index) is not int:  # an id or a name that is new begins a call; anything else goes on
            begins = (
                not self.calls or (call_id and call_id != self.calls[-1].id) or (name and name != self.calls[-1].name)
            )
            index = len(self.calls) if begins else len(self.calls) - 1
        elif index < len(self.calls) and call_id and self.calls[index].id not in ("", call_id):
            index = len(self.calls)  # every call numbered 0, as some endpoints do
        if not 0 <= index < len(self.calls):
            self.calls.append(RawCall())
            self._replies.append(ReplyText())
            index = len(self.calls) - 1
        call = self.calls[index]
        call.id = call.id or call_id
        if name and name != call.name:
            call.name += name
        arguments = function.get("arguments")
        text = encode_json(arguments) if isinstance(arguments, dict) else _text_of(arguments)
        call.growing.add(text)
        self._replies[index].feed(text)

    def news(self) -> list[tuple[str, str]]:
        """(message type, text) that has come since the last call, to be shown while the rest is made."""
        news = []
        if self._untold:
            news.append(("internal_monologue", clean_text("".join(self._untold))))
            self._untold.clear()
        for call, reply in zip(self.calls, self._replies, strict=True):
            if call.name == "send_message" and (text := reply.news()):
                news.append(("assistant_message", text))
        return news


def _text_of(value: object) -> str:
    """`value` as text: strings, and the lists of text parts that some endpoints send; anything else is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return ""


class Model(Protocol):
    """Something that answers chat-completions requests.

    `ratio` calibrates estimated tokens: the endpoint's count over ours, within 0.5 to 2.
    """

    name: str
    window: int
    "The context window in tokens, where nobody says otherwise."
    ratio: float

    def head(self, settings: JSON) -> str:
        """The JSON of a request without messages and tools."""

    def stream(self, body: str, reply: ModelReply) -> AsyncIterator[None]:
        """Send a request and feed `reply`; each item says that it has grown. Raises ModelError."""


def default_window(model: str) -> int:
    """The context window of a model by its name, in tokens."""
    return next((size for start, size in CONTEXT_WINDOWS.items() if model.startswith(start)), DEFAULT_CONTEXT_WINDOW)


# ---- OpenAI-compatible endpoints -------------------------------------------------------------------------------------


MISSING_OPENAI: Final = "a model other than offline needs the openai package: pip install openai"


def import_openai() -> Any:
    """The openai package, which takes half a second to import. Raises UsageError where it is missing."""
    try:
        import openai
    except ImportError as error:
        raise UsageError(MISSING_OPENAI) from error
    return openai


class Turnstile:
    """Lets one after another go on, one in each pass of the loop, so that it looks at what else has come in between.

    For what takes a millisecond: of 32 turns at once nobody waits for all, and the first to come is the first to end.
    """

    def __init__(self) -> None:
        self._open = True
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()

    async def enter(self) -> None:
        loop = asyncio.get_running_loop()
        if self._open:
            self._open = False
            loop.call_soon(self._let_in, loop)
        else:
            waiter = loop.create_future()
            self._waiting.append(waiter)
            await waiter

    def _let_in(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                loop.call_soon(self._let_in, loop)
                return
        self._open = True


class Endpoint:
    """One OpenAI-compatible server and the clients for it, made when they are first needed."""

    def __init__(self, base_url: str | None, api_key: str | None, idle_timeout: float = IDLE_TIMEOUT) -> None:
        self.base_url = base_url
        self._api_key = api_key
        self.idle_timeout = idle_timeout
        self._clients: dict[Any, int] = {}
        "The openai clients, and how many requests each has under way."
        self._making = asyncio.Lock()
        self.turnstile = Turnstile()

    @property
    def key(self) -> str:
        """For comparing endpoints; never for showing."""
        return f"{self.base_url}\n{self._api_key}"

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """The openai client for a request; another one where each has CLIENT_REQUESTS under way.

        For each request a client's pool looks at all of its connections, which took a third of the server's time with
        128 requests at once in one client.
        """
        client = self._with_room()
        if client is None and not (self._clients and self._making.locked()):
            async with self._making:
                client = self._with_room()
                if client is None:
                    client = await in_thread(_IMPORT_THREAD, self._make)  # an import, then certificates: 15 ms
                    self._clients[client] = 0
        client = client or min(self._clients, key=self._clients.__getitem__)
        self._clients[client] += 1
        try:
            yield client
        finally:
            if client in self._clients:
                self._clients[client] -= 1

    def _with_room(self) -> Any:
        """A client for another request, if there is one."""
        return next((client for client, running in self._clients.items() if running < CLIENT_REQUESTS), None)

    def _make(self) -> Any:
        """A client, over aiohttp where that is installed: it takes a fifth less time for a turn.

        The client's own retries are off: ours are counted and reported.
        """
        openai = import_openai()
        http_client = None
        with contextlib.suppress(RuntimeError, AttributeError):  # aiohttp is missing, or too old
            http_client = openai.DefaultAioHttpClient()
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._api_key or os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=0,
            timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT),
            http_client=http_client,
        )

    def hide(self, text: str) -> str:
        """`text` on one line, cut short, without the key or what looks like one."""
        for secret in (self._api_key, os.environ.get("OPENAI_API_KEY")):
            if secret:
                text = text.replace(secret, "…")
        text = re.sub(r"\b(sk|key|Bearer)[-_ ][\w*.-]{6,}", "…", text)
        return " ".join(clean_text(text).split())[:80]

    async def close(self) -> None:
        """Close the client; an import that is under way is waited for, as threads outlive their loop."""
        for thread in threading.enumerate():
            if thread.name == _IMPORT_THREAD:
                thread.join()
        while self._clients:
            client, _ = self._clients.popitem()
            await client.close()


_IMPORT_THREAD: Final = "memws-import"


class OpenAIModel:
    """A model behind the chat-completions API (OpenAI, Ollama, vLLM, llama.cpp, LM Studio, …), streamed.

    The request's bytes are ours and the stream is read raw: the openai client's typed walk over messages and chunks
    costs 15 ms at 100 messages, this 1 ms; transport, keys and errors remain the client's.
    """

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name = name
        self.window = default_window(name)
        self.ratio = 1.0
        self.endpoint = endpoint
        self._left_out: set[str] = set()
        self._renamed: dict[str, str] = {}

    def head(self, settings: JSON) -> str:
        params: JSON = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}, **settings}
        params = {self._renamed.get(key, key): value for key, value in params.items() if key not in self._left_out}
        return encode_json(params)

    async def stream(self, body: str, reply: ModelReply) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        idle = self.endpoint.idle_timeout
        response: Any = None
        begun = False
        try:
            await self.endpoint.turnstile.enter()
            async with self.endpoint.client() as client, asyncio.timeout(FIRST_TOKEN_TIMEOUT) as patience:
                response = await self._post(client, body)
                async with contextlib.aclosing(self._data(response)) as events:
                    until = 0.0
                    async for data in events:
                        if not begun:
                            begun = True
                            await self.endpoint.turnstile.enter()
                        if (now := loop.time()) + idle > until + idle / 10:  # at each chunk: a tenth of a turn's CPU
                            until = now + idle
                            patience.reschedule(until)
                        if data == b"[DONE]":  # read on to the end of the body: that keeps the connection for the next
                            reply.whole = True
                            patience.reschedule(loop.time() + END_PATIENCE)
                        elif not reply.whole:
                            reply.feed(self._chunk(data))
                            yield
        except TimeoutError:
            if reply.whole or reply.finish is not None:  # all was said; only the end of the stream is missing
                return
            waited = idle if begun else FIRST_TOKEN_TIMEOUT
            raise ModelError(
                "model_timeout",
                f"the model said nothing for {waited:g} s; is the endpoint overloaded?",
                retry=begun,
            ) from None
        finally:
            if response is not None:
                await response.close()
        if reply.finish is None and not reply.whole:
            raise ModelError("model_unavailable", "the model's answer broke off", retry=True)

    async def _post(self, client: Any, body: str) -> Any:
        """The open response. Raises ModelError for every failure of transport or endpoint."""
        openai = import_openai()
        try:
            return await client.post(
                "/chat/completions",
                cast_to=object,
                content=body.encode(),
                options={"headers": {"X-Stainless-Raw-Response": "stream", "Content-Type": "application/json"}},
            )
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            refused = isinstance(cause.__cause__, OSError) and not isinstance(cause.__cause__, TimeoutError)
            if isinstance(error, openai.APITimeoutError) and not refused:  # with aiohttp a refusal is told as one too
                text = "the endpoint did not take the connection in time"
                raise ModelError("model_timeout", text, retry=True) from None
            reason = self.endpoint.hide(str(cause))
            text = f"cannot reach the model's endpoint ({reason}); is it running, and is --base-url right?"
            raise ModelError("model_unavailable", text, retry=True) from None
        except openai.OpenAIError as error:
            raise ModelError("model_auth", f"the model's client refuses: {self.endpoint.hide(str(error))}") from None

    async def _data(self, response: Any) -> AsyncGenerator[bytes, None]:
        """The data of the response's events; a whole JSON answer in spite of stream=true is one. Raises ModelError."""
        kind = str(response.headers.get("content-type", "")).lower()
        if "html" in kind:
            text = "the endpoint answered with a web page; does --base-url end with /v1?"
            raise ModelError("model_unavailable", text, retry=True)
        try:
            if "json" in kind and "stream" not in kind:
                yield await response.read()
                yield b"[DONE]"
                return
            async for data in read_events(response.iter_bytes()):
                yield data
        except (ModelError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # transports raise errors of many libraries; all mean that the stream broke
            reason = self.endpoint.hide(type(error).__name__)
            raise ModelError("model_unavailable", f"the connection to the model broke ({reason})", retry=True) from None

    def _chunk(self, data: bytes) -> JSON:
        """One chunk of the stream. Raises ModelError for what is none, and for errors told in the stream."""
        try:
            chunk = decode_json(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise ModelError("model_unavailable", "the endpoint's answer is not JSON", retry=True)
        error = chunk.get("error")
        if error:
            message = error.get("message", "") if isinstance(error, dict) else error
            code = error.get("code") or error.get("type") if isinstance(error, dict) else None
            raise self._told_error(code if type(code) is int else 500, str(message), str(code), None)
        return chunk

    def _status_error(self, error: Any) -> ModelError:
        body = error.body if isinstance(error.body, dict) else {}
        told = body.get("error")
        inner = told if isinstance(told, dict) else body
        message = _text_of(inner.get("message")) or _text_of(body.get("detail")) or str(error.message)
        return self._told_error(
            error.status_code, message, str(inner.get("code") or ""), _retry_after(error.response.headers)
        )

    def _told_error(self, status: int, message: str, code: str, retry_after: float | None) -> ModelError:
        """The ModelError for what an endpoint told, by status, code and wording."""
        said = self.endpoint.hide(message)
        wait = f"; it asks to wait {retry_after:g} s" if retry_after else ""
        too_long = (retry_after or 0) > MAX_RETRY_AFTER
        if code == "context_length_exceeded" or _OVERFLOW.search(message):
            return ModelError("context_overflow", f"the endpoint finds the prompt too long: {said}")
        if status in (401, 403) or code == "invalid_api_key":
            return ModelError("model_auth", f"the endpoint refuses the key ({status}); set OPENAI_API_KEY")
        if status == 429 or "rate_limit" in code:
            text = f"the endpoint limits the rate (429): {said}{wait}"
            final = code == "insufficient_quota" or too_long
            return ModelError("model_rate_limit", text, retry=not final, retry_after=retry_after)
        if status in (408, 409) or status >= 500:
            text = f"the endpoint failed ({status}): {said}{wait}"
            return ModelError("model_unavailable", text, retry=not too_long, retry_after=retry_after)
        if status == 404:
            return ModelError("model_unavailable", f"the endpoint does not know the model or the address (404): {said}")
        if self._adapt(message):
            return ModelError("model_refused", f"the endpoint does not know an option: {said}", learned=True)
        return ModelError("model_refused", f"the endpoint refused the request ({status}): {said}")

    def _adapt(self, message: str) -> bool:
        """Learn from a refusal which option this endpoint does not take; whether there was something to learn."""
        if "max_completion_tokens" in message and "max_tokens" not in self._renamed:
            self._renamed["max_tokens"] = "max_completion_tokens"
            return True
        for option in ("stream_options", "seed", "temperature", "top_p", "reasoning_effort"):
            if option in message and option not in self._left_out:
                self._left_out.add(option)
                logger.info("%s does not take %s: left out from now on", self.name, option)
                return True
        return False


_OVERFLOW = re.compile(
    r"context.{0,20}(length|window|size)|prompt is too long|too many (input )?tokens|maximum.{0,20}tokens|n_ctx",
    re.IGNORECASE,
)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait: Retry-After (seconds or a date, RFC 9110) or retry-after-ms."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(headers.get("retry-after-ms", "")) / 1000)
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    import email.utils

    with contextlib.suppress(ValueError, TypeError):
        when = email.utils.parsedate_to_datetime(value)
        return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event (HTML standard, section 9.2): comments and other fields are passed over."""
    data: list[bytes] = []
    rest: list[bytes] = []
    async for chunk in chunks:
        if b"\n" not in chunk:  # a line of megabytes arrives in many chunks: join them once
            rest.append(chunk)
            continue
        *lines, last = b"".join((*rest, chunk)).split(b"\n")
        rest = [last]
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if (line := b"".join(rest).rstrip(b"\r")).startswith(b"data:"):
        data.append(line[5:].removeprefix(b" "))
    if data:
        yield b"\n".join(data)


def only_model(base_url: str, api_key: str | None) -> str:
    """The one model that an endpoint serves, asked with a time limit. Raises UsageError with the list of several."""
    import http.client
    import urllib.error
    import urllib.request  # 8 ms of every start, for a question that is seldom asked

    url = f"{base_url.rstrip('/')}/models"
    key = api_key or os.environ.get("OPENAI_API_KEY")
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})  # noqa: S310
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError("it is no http:// or https:// address")
        with urllib.request.urlopen(request, timeout=CONNECT_TIMEOUT) as response:  # noqa: S310
            listed = decode_json(response.read(MAX_FRAME))["data"]
        models = [clean_text(model["id"])[:MAX_MODEL_NAME] for model in listed]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, http.client.HTTPException) as error:
        reason: object = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            reason = f"{error.code} {reason}"
        raise UsageError(
            f"cannot list the models of the endpoint ({clean_text(str(reason))[:80]}); "
            "check --base-url, or name one with --model"
        ) from None
    if len(models) != 1:
        served = ", ".join(models[:20]) or "none"
        raise UsageError(f"the endpoint serves {len(models)} models: choose one with --model; they are: {served}")
    return models[0]


class Embedder:
    """Vectors of texts, from the embeddings API of an OpenAI-compatible endpoint. Needs numpy.

    What fails is logged once, and nothing is asked for EMBEDDING_PAUSE: searches go by words alone meanwhile.
    """

    def __init__(self, name: str, endpoint: Endpoint) -> None:
        self.name = name
        self.dimension: int | None = None
        "That of the last vectors that came."
        self._endpoint = endpoint
        self._failing = False
        self._paused_until = 0.0
        self._recent: collections.OrderedDict[str, bytes] = collections.OrderedDict()

    @property
    def pause(self) -> float:
        """Seconds until the endpoint is asked again."""
        return max(0.0, self._paused_until - time.monotonic())

    async def vectors(self, texts: list[str], patience: float | None = None) -> list[bytes] | None:
        """The vectors of the texts, in their order; None where the endpoint fails or has just failed.

        A text that the endpoint refuses, as too long or otherwise, gets an empty one. patience: seconds to wait.
        """
        if self.pause:
            return None
        try:
            async with asyncio.timeout(patience):
                vectors = await self._ask_apart(texts)
        except (ModelError, TimeoutError) as error:
            self._paused_until = time.monotonic() + EMBEDDING_PAUSE
            if not self._failing:
                reason = error if isinstance(error, ModelError) else f"no answer within {patience:g} s"
                logger.warning("embeddings of %s: %s; searches go by words alone until it answers", self.name, reason)
            self._failing = True
            return None
        if self._failing:
            logger.info("embeddings of %s: the endpoint answers again", self.name)
        self._failing = False
        return vectors

    async def near(self, query: str) -> Near | None:
        """The query's vector; None where it cannot be had in time."""
        if query not in self._recent:
            vectors = await self.vectors([query], EMBEDDING_PATIENCE)
            if not vectors or not vectors[0]:
                return None
            self._recent[query] = vectors[0]
            if len(self._recent) > EMBEDDING_RECENT:
                self._recent.popitem(last=False)
        return Near(self.name, self._recent[query])

    async def _ask(self, texts: list[str]) -> list[bytes]:
        """Raises ModelError for whatever fails."""
        await in_thread(_IMPORT_THREAD, import_numpy)
        openai = await in_thread(_IMPORT_THREAD, import_openai)
        try:
            async with self._endpoint.client() as client:
                answer = await client.embeddings.create(
                    model=self.name, input=texts, timeout=self._endpoint.idle_timeout
                )
            vectors = [pack_vector(item.embedding) for item in sorted(answer.data, key=lambda item: item.index)]
        except openai.OpenAIError as error:
            reason = self._endpoint.hide(str(getattr(error, "message", error)))
            if getattr(error, "status_code", 0) in (400, 413, 422):
                raise ModelError("model_refused", f"the endpoint refuses the texts ({reason})") from None
            raise ModelError("model_unavailable", f"the endpoint fails ({reason})") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = self._endpoint.hide(str(error))
            raise ModelError("model_unavailable", f"the endpoint's answer holds no vectors ({reason})") from None
        if len(vectors) != len(texts) or len({len(vector) for vector in vectors}) != 1:
            raise ModelError("model_unavailable", f"the endpoint gave {len(vectors)} vectors for {len(texts)} texts")
        self.dimension = len(vectors[0]) // 2
        return vectors

    async def _ask_apart(self, texts: list[str]) -> list[bytes]:
        """As _ask; where the texts are refused, one by one, and an empty vector for each that is the reason."""
        try:
            return await self._ask(texts)
        except ModelError as error:
            if error.code != "model_refused":
                raise
        if len(texts) > 1:
            return [vector for text in texts for vector in await self._ask_apart([text])]
        await self._ask(["memory"])  # where this is refused too, the reason is not the text
        try:
            return await self._ask(texts)
        except ModelError as error:
            if error.code != "model_refused":
                raise
        logger.info("embeddings of %s: a text of %d characters is refused", self.name, len(texts[0]))
        return [b""]


# ---- the offline model -----------------------------------------------------------------------------------------------
# Rules, no language model. What people say about themselves is kept in their own words; a question is answered by what
# shares most with it of what is kept and what a search finds, with its day. All is a function of the request.
# English and Spanish; patterns see text in lower case without accents.

OFFLINE_READS: Final = 4_000
"Characters of a text that the rules read at its head, and a quarter of that at its end: what bounds their time."
OFFLINE_LINE: Final = 300
"Characters of the longest line that goes to core memory; what is longer becomes a passage."

OfflineCall = tuple[str, JSON]
_RECALL, _ARCHIVAL = "conversation_search", "archival_memory_search"

_PHRASES: Final = {  # English, Spanish
    "self": ("I am memws's offline stand-in: rules, not a language model. I keep what you tell me and search for it.",
             "Soy el sustituto sin conexión de memws: no soy un modelo de lenguaje. Guardo y busco lo que me cuentas."),
    "models": ("A real model is chosen with --model, --base-url or OPENAI_API_KEY.",
               "Un modelo de verdad se elige con --model, --base-url u OPENAI_API_KEY."),
    "hello": ("Hello{}!", "¡Hola{}!"),
    "welcome": ("You are welcome.", "De nada."),
    "stays": ("It stays in recall memory, where I can find it.", "Queda en el historial, donde puedo buscarlo."),
    "noted": ("I noted in core memory: {}.", "He anotado en mi memoria central: {}."),
    "before": ("{} (before: {})", "{} (antes: {})"),
    "known": ("I already have that in core memory: {}.", "Eso ya lo tengo en mi memoria central: {}."),
    "kept": ("I kept in archival memory: {}.", "He guardado en mi memoria de archivo: {}."),
    "failed": ("I could not keep it: {}.", "No pude guardarlo: {}."),
    "removed": ("I removed from core memory: {}. Recall memory still holds the messages.",
                "He borrado de mi memoria central: {}. El historial conserva los mensajes."),
    "absent": ("I found nothing of that in core memory to forget.", "No encontré nada de eso en mi memoria central."),
    "core": ("In my core memory I have: {}.", "En mi memoria central tengo: {}."),
    "recall": ('You told me on {}: "{}".', 'Me dijiste el {}: "{}".'),
    "archival": ('In archival memory ({}): "{}".', 'En mi memoria de archivo ({}): "{}".'),
    "nothing": ('I found nothing about "{}" in core, recall or archival memory.',
                "No encontré nada sobre «{}» en mi memoria central, ni en el historial, ni en la memoria de archivo."),
    "search failed": ("A search failed: {}.", "Una búsqueda falló: {}."),
    "on day": ("On {} you said: {}.", "El {} dijiste: {}."),
    "no day": ("I found no messages of yours on {}.", "No encontré mensajes tuyos del {}."),
    "no tool": ("I have no tool {}; I have: {}.", "No tengo la herramienta {}; tengo: {}."),
    "returned": ("{} returned: {}", "{} respondió: {}"),
    "call failed": ("{} failed: {}", "{} falló: {}"),
}  # fmt: skip

# Words: what counts as the same, what counts not at all

_IDEAS: Final = {  # what people ask for in other words than they state it: (English, Spanish)
    "NAME": ("name named called call", "nombre llamo llama llaman apellido"),
    "LIVE": ("live lives living lived home house city town address moved move reside based",
             "vivo vive vives ciudad casa mude direccion"),
    "WORK": ("work works working worked job profession occupation employed employer company",
             "trabajo trabaja trabajas profesion oficio empleo empresa dedico"),
    "LIKE": ("like love enjoy prefer favourite favorite adore fond hobby hobbies",
             "gusta gustan encanta encantan prefiero favorito favorita adoro aficion aficiones"),
    "BORN": ("born birthday birth birthdate birthplace", "naci nacido nacimiento cumpleanos"),
    "AGE": ("age", "edad"),
    "color": ("colour color", "color"),
}  # fmt: skip
_EMPTY_ENGLISH: Final = (  # beside the stop words of search
    "actually ago also always any anymore anything could dont ever everything forgot going im ive know lot may me mean "
    "might mine much my please really recall remember remind right said say shall something sort still tell thank "
    "thanks thing things think today told us want whats yes"
)
_EMPTY_SPANISH: Final = (
    "acuerdas ahora al algo aun como con cual cuales cuando cuanto cuantos de decir del dije dime donde el en "
    "era eres es esta estas esto estoy favor gracias ha hay he hola la las le les lo los mas me mi mis mucho muy nada "
    "nos nuevo olvida para pero por puedes que quien quienes recuerda recuerdas sabes se ser si sobre soy su sus "
    "tambien te tengo tiene tienes todo tu tus un una unas unos ya yo"
)
_EMPTY: Final = frozenset(f"{_EMPTY_ENGLISH} {_EMPTY_SPANISH}".split())
_SPANISH: Final = frozenset(" ".join([_EMPTY_SPANISH, *(spanish for _, spanish in _IDEAS.values())]).split())

_FOLDING: Final = {
    **{ord(letter): letter.lower() for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"},
    **dict(zip(map(ord, "áéíóúüñÁÉÍÓÚÜÑ’"), "aeiouunaeiouun'", strict=True)),
}

_MY_NAME: Final = (
    r"(?:\b(?:my name(?:'s| is)|i(?:'m| am) called|call me|me llamo|mi nombre es|ll[aá]mame)|^(?:name|nombre):)"
    r" (?!(?:not|no|later|back|when|if|at|on|an?|maybe)\b)"
)
_CAPITAL: Final = r"[^\W\d_a-zß-öø-ÿ][\w'.-]*"
_NAME_SAID: Final = re.compile(rf"(?i:{_MY_NAME})([\w'.-]+(?:(?: de| la| del| von| van)* {_CAPITAL}){{0,3}})")
_NAME_ALONE: Final = re.compile(  # "I'm Ada", which a capital and nothing else tells from "I'm tired"
    rf"(?i:i'm|i am|im|(?:yo )?soy|this is) (?!(?i:ok|\w+(?:ish|ese)|italian|american|mexican|german|french|greek)\b)"
    rf"({_CAPITAL}(?: {_CAPITAL}){{0,3}})[ .!]*$"
)
_NOW: Final = "(?: now| just| recently| currently)?"
_ONLY_ONE: Final = "favou?rite|favorit[oa]|name|nombre|e-?mail|correo|phone|telefono|address|age|edad|job|password"
_TOPICS: Final = [  # (idea, key, what says so): of facts with one key, and one group, a newer one replaces the older
    (idea, key, re.compile(pattern))
    for idea, key, pattern in (
        ("NAME", "name", _MY_NAME),
        ("NAME", "", r"\bwho am i\b|\bquien soy\b"),
        ("LIVE", "home", rf"\bi(?:'m| am|'ve| have)?{_NOW} (?:live|living|based|moved)(?: back)? (?:in|to|at|near)\b"),
        ("LIVE", "home", r"\b(?:vivo|me mude|me he mudado)(?: ahora)? (?:en|a)\b"),
        ("FROM", "", r"\b(?:i'm|i am|am i|(?:do )?i come) from\b|\b(?:soy|vengo) de\b|\bde donde (?:soy|vengo)\b"),
        ("WORK", "work as", rf"\bi(?:'m| am)?{_NOW} work(?:ing)? as\b|\btrabajo (?:ahora )?(?:de|como)\b"),
        ("WORK", "work at", rf"\bi(?:'m| am)?{_NOW} work(?:ing)? (?:at|for|in)\b|\btrabajo (?:ahora )?(?:en|para)\b"),
        ("WORK", "", r"^(?:i'm|i am|im) (?:an?|the) |\bdo i do(?: for (?:a living|work))?\b"),
        ("WORK", "", r"^soy (?:una? )?[a-z]{4,}$|\bme dedico\b|\ben que trabajo\b"),
        ("HATE", "", r"\b(?:don't|dont|do not|no longer) (?:really )?(?:like|love|enjoy)\b|\bno me (?:gust|encant)a"),
        ("AGE", "age", r"\b(?:i'm|i am|im) (?:now )?\d{1,3}(?: years?\b|$)|\btengo \d{1,3} anos\b"),
        ("AGE", "", r"\bhow old am i\b|\bcuantos anos tengo\b"),
        ("", "taste", r"^i (?:(?:really|also|still|don't|do|not|no longer|now) ){0,3}(?:like|love|enjoy|hate) (.+)"),
        ("", "taste", r"^(?:ya )?(?:no )?(?:me (?:gust|encant)an?|odio|adoro|detesto) (.+)"),
        ("", "my", rf"^(?:my|mi) ([^,:]{{0,30}}?\b(?:{_ONLY_ONE})\b[^,:]{{0,30}}?) (?:is|are|es|son) "),
    )
]  # fmt: skip


def _fold(text: str) -> str:
    """The text as the patterns see it; places in both agree."""
    return text.translate(_FOLDING)


def _is_spanish(text: str) -> bool:
    """Whether more words of a text are Spanish than are stop words of English."""
    words = re.findall("[a-z]+", _fold(text[:OFFLINE_READS]))
    spanish = sum(word in _SPANISH for word in words) + 2 * len(re.findall("[¿¡ñ]", text[:OFFLINE_READS]))
    return spanish > sum(not split_terms(word) for word in words)


def _telling_words(text: str) -> list[str]:
    """The words of a text that carry meaning."""
    return [word for word in re.findall(r"[^\W_]+", text) if _fold(word) not in _EMPTY and split_terms(word)]


@functools.cache
def _idea_of() -> dict[str, str]:
    """The idea that a term stands for."""
    listed = [(idea, word) for idea, words in _IDEAS.items() for word in " ".join(words).split()]
    return {term: idea for idea, word in listed for term in split_terms(word)}


def _ideas(text: str) -> set[str]:
    """What two texts must share to be about the same: terms of search, and ideas, in capitals, in place of theirs."""
    folded, ideas = _fold(text), {"NAME"} if _NAME_ALONE.match(text) else set[str]()
    for idea, _, pattern in _TOPICS:
        if idea and pattern.search(folded):
            ideas.add(idea)
            text = pattern.sub(" ", _fold(text))
    return ideas | {_idea_of().get(term, term) for word in _telling_words(text) for term in split_terms(word)}


# Sentences and clauses

_FIRST: Final = (
    r"i|i'm|im|i've|ive|i'd|i'll|my|mi|mis|(?:no )?me (?:gust|encant|llam|mud|dedi|cas|interes)\w*|yo|soy|estoy|vivo"
    r"|trabajo|tengo|prefiero|odio|adoro|naci|estudio|hablo|toco|juego|call me|llamame|remember|recuerda|please|forget"
    r"|olvida"
)
_ASK: Final = (
    r"who|whom|whose|what|where|when|which|why|how|(?:do|does|did|is|are|am|was|were|have|has|can|could|will|would"
    r"|should) (?:i|you|my|we|he|she|it|they|the|there)|tell me|remind me(?! to| that)|i (?:wonder|forgot|want to know"
    r"|don't remember) (?:what|where|who|when|which|how|if)|que|quien(?:es)?|donde|cuando|cual(?:es)?|cuant[oa]s?"
    r"|como (?:me|se|te|es|esta)|por que|(?:en|de|a) (?:que|donde|quien)|sabes|recuerdas|te acuerdas|dime"
    r"|recuerdame(?! que)|puedes"
)
_ASKS: Final = re.compile(rf"(?:{_ASK})\b")
_TELLS: Final = re.compile(  # "When I was young, …", "How nice!"
    r"(?:what an? |how (?:nice|lovely|great|cool)|que (?:bueno|bien|tengas)|cuando (?:era|yo)\b"
    r"|(?:when|where|what|how|which|why|who) (?:i|i'm|we)\b)"
)
_SENTENCE_END: Final = re.compile(r"(?<=[.!?…])(?<!\b[DM]r\.)(?<!\bMrs\.)(?<!\bSt\.) |(?<=[。！？])|\n+")
_BREAK: Final = re.compile(
    r"(?: ?[,;] ?(?:(?:and|but|so|also|y|e|pero|ademas|tambien) )?| (?:and|but|y|e|pero|also) )"
    rf"(?=(?:{_FIRST}|{_ASK})\b)| ?,? ?(?=¿)| (?:and|but) (?:also )?"
    r"(?P<same>(?=(?:live|work|love|like|hate|prefer|enjoy|have|am|was born|play|study|speak)\b))"
)
_GOES_ON: Final = re.compile(r"\b(?:he|she|it|they|his|her|its|their|ella|su|sus|se llama)\b")
_HELLO: Final = r"(?:hi|hello|hey|hola|buenas(?: tardes| noches)?|buenos d[ií]as|good (?:morning|afternoon|evening))"
_GREETING: Final = re.compile(rf"\W*{_HELLO}\b(?:(?: there| again| sam)?\W*$)?", re.IGNORECASE)
_LEAD: Final = re.compile(
    rf"^[\s¿¡\"'(-]*(?:(?:{_HELLO}|well|oh|ok|okay|so|and|but|actually|also|please|thanks|btw|by the way|pues|bueno|y"
    r"|pero|adem[aá]s|por favor|gracias|por cierto|(?:yes|no|s[ií])(?=[,.!]))(?: there| again)?[\s,.!:;¿-]{1,3}){0,4}",
    re.IGNORECASE,
)
_MINE: Final = re.compile(  # or a Spanish verb of the first person
    r"\b(?:i|i'm|im|i've|ive|i'd|i'll|my|mine|me|myself|we|us|our|yo|mi|mis|mi[oa]|nos|nuestr[oa]s?|soy"
    r"|estoy|naci|fui|vivi|trabaje|estudie|compre|empece|conoci)\b"
    r"|^(?:(?:no|yo|ya|siempre|tambien|ahora) )*(?:lo |la )?(?!bueno|claro|luego|pero|gusto|como|mucho)[a-z]{3,}o\b"
)
_NO_FACT: Final = re.compile(
    r"(?:tell|give|help|show|let|excuse|send|write|make|explain|i(?:'d| would) like you|i (?:want|need) you|dime|dame"
    r"|ayuda(?:me)?|muestrame|cuentame)\b|(?:i (?:see|know|guess so|think so|hope so|understand|agree|don't know)"
    r"|thank you.*|me too|(?:i'm|i am) (?:sorry|back|here|fine|ok|okay|good|well)|lo siento|no se|estoy bien)\W*$"
)
_REMEMBER: Final = re.compile(
    r"(?:(?:can|could|will|would) you )?(?:please )?(?:remember|do(?:n't| not) forget|keep in mind|note(?= that|:)"
    r"|remind me(?= to| that)|recuerda(?:me)?|no (?:te )?olvides|ten en cuenta|apunta|anota)"
    r"(?: that| this| que| de que)?[ ,:]{1,2}"
)
_FORGET: Final = re.compile(r"(?:forget|erase|olvida(?:te)?|borra)\b(?: (?:that|about|it|de|que|lo|eso)\b)*")
_WHAT_ARE_YOU: Final = re.compile(
    r"\b(?:(?:who|what) are you(?! doing| up to)|are you (?:an? |the )?(?:real|ai|robot|bot|human|person|language|llm"
    r"|model|machine|program)|your name|(?:which|what) model|what can you do|que puedes hacer|(?:que|quien) eres"
    r"|eres (?:una? )?(?:ia|robot|bot|human[oa]|persona|modelo|maquina)|como te llamas)\b"
)
_ABOUT_ME: Final = re.compile(r"\b(?:about me|know|remember|recall|sobre mi|de mi|sabes|recuerdas|conoces|acuerdas)\b")
_SPEAKER: Final = r"(?:user|assistant|tool|system)(?: \([^)\n]{0,40}\))?: "
_QUOTED: Final = re.compile('(?:You told me on|Me dijiste el) ([0-9-]{10}): "([^"]+)"')
_DAY: Final = re.compile(
    r"\b(?:say|said|tell|told|talk|talked|write|wrote|dije|dijimos|conte|hablamos)\b.*?"
    r"\b(?:(?P<date>\d{4}-\d\d-\d\d)|(?P<ago>\d{1,3}) days? ago|hace (?P<hace>\d{1,3}) dias?|(?P<ayer>yesterday|ayer)"
    r"|today|hoy)\b"
)


class _Clause:
    """One clause: its words, whether it asks, the memory it stands in and since when."""

    def __init__(self, text: str, asks: bool = False, source: str = "core", day: str = "") -> None:
        self.text, self.asks, self.source, self.day = text, asks, source, day
        self.bare = _fold(text).strip(" -.!,;")

    @functools.cached_property
    def ideas(self) -> set[str]:
        return _ideas(self.text)

    @functools.cached_property
    def key(self) -> str:
        """What a person has only one of, like a home or an opinion of tea; "" for any other clause."""
        for _, key, pattern in _TOPICS:
            if key and (found := pattern.search(self.bare)):
                return " ".join([key, *sorted(_ideas(found[1]) if pattern.groups else [])])
        return ""

    @property
    def is_fact(self) -> bool:
        """Whether it says something of the person that is worth a line in core memory."""
        if self.asks or len(self.bare) < 5 or _NO_FACT.match(self.bare) or _FORGET.match(self.bare):
            return False
        return bool((_MINE.search(self.bare) or _NAME_SAID.match(self.text)) and _telling_words(self.bare))

    def replaces(self, line: _Clause) -> bool:
        """Whether it makes an older fact untrue."""
        return bool(self.key) and (self.key == line.key or (self.key == "name" and bool(_NAME_ALONE.match(line.text))))


def _clauses(text: str, source: str = "core", day: str = "") -> list[_Clause]:
    """The clauses of a text; what goes on about him, her or it stays with the clause before."""
    if len(text) > OFFLINE_READS:
        text = text[:OFFLINE_READS] + "\n" + text[-OFFLINE_READS // 4 :]
    text = re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFC", text)).strip()
    clauses: list[_Clause] = []
    for piece in (piece for sentence in _SENTENCE_END.split(text) for piece in _pieces(sentence)):
        words = _LEAD.sub("", piece).strip(" .!") or piece
        folded = _fold(words)
        is_order = _REMEMBER.match(folded) and (" that " in folded or not words.endswith("?"))
        is_question = words.endswith(("?", "？")) or (_ASKS.match(folded) and not _TELLS.match(folded))
        asks = bool(is_question and not is_order)
        last = clauses[-1] if clauses else None
        if last and _GOES_ON.match(folded) and not asks and not last.asks and len(last.text) < OFFLINE_LINE:
            clauses[-1] = _Clause(f"{last.text}. {words}", False, source, day)
        else:
            clauses.append(_Clause(words, asks, source, day))
    return clauses


def _pieces(sentence: str) -> Iterator[str]:
    """A sentence cut where something else is told or asked; "I live here and work there" is two."""
    subject, start = "", 0
    for found in (*_BREAK.finditer(_fold(sentence)), None):
        piece = sentence[start : found.start() if found else None].strip(" ,;")
        shares_subject = found is not None and found["same"] is not None
        if shares_subject and not (subject or re.match("I(?:'m|'ve)? ", _LEAD.sub("", piece), re.IGNORECASE)):
            continue
        if re.search(r"\w", piece):
            yield subject + piece
        subject, start = "I " if shares_subject else "", found.end() if found else 0


# The turn, read back from the messages of a request


def _json_object(text: Any) -> JSON:
    """The object that a text holds as JSON, {} for anything else."""
    try:
        value = decode_loose(text) if isinstance(text, str) and text.lstrip()[:1] == "{" else text
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _packed(message: JSON) -> tuple[str, str, str]:
    """(type, text, time) of a user-role message; what is not packed as MemGPT packs is the user's own text."""
    packed = _json_object(message.get("content"))
    if packed.get("type") not in ("user_message", "heartbeat", "login", "system_alert"):
        return "user_message", str(message.get("content") or ""), ""
    text, time = str(packed.get("message") or packed.get("reason") or ""), str(packed.get("time") or "")
    waiting = text.partition(WAITING_NOTE)[2] if packed["type"] == "system_alert" else ""
    return ("user_message", waiting, time) if waiting else (str(packed["type"]), text, time)


@dataclass
class _Done:
    """A tool call of this turn and its result; without one it counts as good."""

    name: str
    arguments: JSON
    ok: bool = True
    result: str = ""


class _OfflineTurn:
    """What a request shows of the turn under way, and what comes next in it."""

    def __init__(self, messages: list[JSON], tools: frozenset[str]) -> None:
        self.tools = tools
        system = str(messages[0].get("content")) if messages and messages[0].get("role") == "system" else ""
        shown = re.finditer(r'<([\w.-]{1,64}) characters="(\d{1,9})/(\d{1,9})">\n?(.*?)\n?</\1>', system, re.DOTALL)
        blocks = {label: (text, int(limit) - int(size)) for label, size, limit, text in map(re.Match.groups, shown)}
        self.human, self.room = blocks.pop("human", ("", -1))
        blocks.pop("persona", None)
        lines = "\n".join([self.human, *(text for text, _ in blocks.values())]).split("\n")[:200]
        self.core = [clause for line in lines for clause in _clauses(line.strip(" -")) if not clause.asks]
        self.first = not any(message.get("role") == "assistant" for message in messages)
        users = [(n, *_packed(message)) for n, message in enumerate(messages) if message.get("role") == "user"]
        said = [(-1, "", "", ""), (-1, "", "", ""), *(user for user in users if user[1] == "user_message")]
        self.before, (start, _, self.text, self.time) = said[-2][2], said[-1]
        self.done = list(_calls_done(messages[start + 1 :]))
        self.steps = sum(message.get("role") == "assistant" for message in messages[start + 1 :])
        is_woken = bool(users) and users[-1][2] in (HEARTBEAT_TIMER, HEARTBEAT_WAKE)
        is_answered = any(done.name == "send_message" and done.ok for done in self.done)
        self.open = start >= 0 and not is_woken and not is_answered
        "The user's newest message waits for its reply."
        order = re.match(r"\s*/call\s+([\w.-]{1,64})\s*(.*)", self.text, re.DOTALL)
        self.command = (order[1], _json_object(order[2])) if order else None
        "The call that the user orders with /call NAME, arguments as JSON behind it."
        self.facts: list[_Clause] = []
        self.forgets: list[str] = []
        self.questions: list[str] = []
        self.asks_self = False
        self.spanish = _is_spanish(self.text)
        for clause in _clauses(self.text) if self.open else []:
            self._read(clause)
        del self.facts[12:], self.questions[3:], self.forgets[3:]

    def _read(self, clause: _Clause) -> None:
        """Sort a clause of the user's message by what it wants."""
        asked = _REMEMBER.match(clause.bare)
        if _WHAT_ARE_YOU.search(clause.bare):
            self.asks_self = True
        elif clause.asks:
            goes_on = self.questions and _GOES_ON.search(clause.bare)  # "my wife's name, and where does she work?"
            asked_before = f"{self.questions.pop()}, " if goes_on else ""
            self.questions += [] if _GREETING.match(clause.text) else [asked_before + clause.text]
        elif forget := _FORGET.match(clause.bare):
            self.forgets.append(clause.bare[forget.end() :])
        elif asked and (rest := clause.text[asked.end() :].rstrip("? ")):
            self.facts.append(_Clause(rest))
        elif clause.is_fact and not _GREETING.fullmatch(clause.text):
            self.facts.append(clause)

    def calls(self) -> list[OfflineCall]:
        """The calls of this step, none once it is time to reply; none is made twice in a turn."""
        searches = [call for question in self.questions for call in self._look_up(question)]
        calls = [] if self.steps else [self.command] if self.command else [*self._forget(), *self._keep(), *searches]
        for done in self.done:
            lost = done.arguments.get("content") or done.arguments.get("new_content")
            if lost and not done.ok and done.name.startswith("core_memory_") and not self.command:
                calls.append(("archival_memory_insert", {"content": lost}))
        made = [(done.name, done.arguments) for done in self.done]
        new = [call for n, call in enumerate(calls) if call[0] in self.tools and call not in (*made, *calls[:n])]
        return [(name, {**given, "request_heartbeat": True}) for name, given in new]

    def _keep(self) -> Iterator[OfflineCall]:
        """The calls that keep the facts: in the human block while they are short and fit, else as passages."""
        lines = [_Clause(line) for line in self.human.split("\n") if line.strip()]
        known, room, short, long = {line.bare for line in lines}, self.room, list[str](), list[str]()
        for fact in {fact.bare: fact for fact in self.facts if fact.bare not in known}.values():
            old = next((line for line in lines if fact.replaces(line)), None)
            cost = len(fact.text) - len(old.text) if old else len(fact.text) + 1
            if cost > room or len(fact.text) > OFFLINE_LINE or "core_memory_append" not in self.tools:
                long.append(fact.text)
                continue
            room -= cost
            if old:
                lines.remove(old)
                yield self._edit(old.text, fact.text)
            else:
                short.append(fact.text)
        if short:
            yield "core_memory_append", {"name": "human", "content": "\n".join(short)}
        if long:
            yield "archival_memory_insert", {"content": "\n".join(long)}

    def _forget(self) -> Iterator[OfflineCall]:
        """The calls that take lines out of the human block: those that match, those just said for "forget that"."""
        for wanted in self.forgets:
            asked = _ideas(wanted)
            recent = {clause.bare for clause in _clauses(self.before)}
            everything = not asked and re.match(r" ?(?:everything|all|todo)\b", wanted)
            for line in map(_Clause, filter(None, self.human.split("\n"))):
                if everything or (asked <= line.ideas if asked else line.bare in recent):
                    yield self._edit(line.text, "")

    def _edit(self, line: str, new: str) -> OfflineCall:
        """The call that puts something else in place of a line, which may also stand inside another line."""
        places = [*([line] if new else []), f"{line}\n", f"\n{line}", f"\n{line}\n"]
        old = next((place for place in places if self.human.count(place) == 1), line)
        new = old.replace(line, new) if new else "\n" * (old.count("\n") - 1)
        self.human = self.human.replace(old, new, 1).strip("\n")
        return "core_memory_replace", {"name": "human", "old_content": old, "new_content": new}

    def _look_up(self, question: str) -> list[OfflineCall]:
        """The searches for a question: by its words and other words for its ideas, or by the day it names."""
        if day := _day_asked(question, self.time):
            return [("conversation_search_date", {"start_date": day, "end_date": day, "page": n}) for n in range(3)]
        words = [*_telling_words(question), *(" ".join(_IDEAS[idea]) for idea in _IDEAS if idea in _ideas(question))]
        query = " ".join(dict.fromkeys(" ".join(words).split()[:40]))
        return [(name, {"query": query}) for name in (_RECALL, _ARCHIVAL) if query]

    @functools.cached_property
    def statements(self) -> list[_Clause]:
        """What core memory and the results of this turn's searches state, each once: core first, then newest first."""
        found: list[_Clause] = []
        for done in self.done:
            for when, role, text in _hits(done.result) if done.ok and done.name in (_RECALL, _ARCHIVAL) else []:
                if role in ("user", "") and not text.startswith("/call "):
                    found += _clauses(text, "recall" if done.name == _RECALL else "archival", when)
                elif role == "assistant":  # of its own words it takes only what quotes the user
                    found += [_Clause(quoted, False, "recall", day) for day, quoted in _QUOTED.findall(text)]
        statements = {clause.bare: clause for clause in self.core}
        forgotten = list(filter(None, map(_ideas, self.forgets)))
        for clause in sorted(found, key=lambda clause: (clause.day, bool(_FORGET.match(clause.bare))), reverse=True):
            core = statements.get(clause.bare)
            if forget := _FORGET.match(clause.bare):
                forgotten += filter(None, [_ideas(clause.bare[forget.end() :])])
            elif core and core.source == "core":
                statements[clause.bare] = clause  # in the place of the line that repeats it, for its day
            elif not (
                core or clause.asks or _NO_FACT.match(clause.bare) or any(part <= clause.ideas for part in forgotten)
            ):
                statements[clause.bare] = clause
        return list(statements.values())

    def _answers(self, question: str) -> list[_Clause]:
        """The statements that answer a question, best first, at most 5."""
        asked = _ideas(question)
        if not asked and _ABOUT_ME.search(_fold(question)):
            return [clause for clause in self.statements if clause.source == "core"][:40] or self.statements[:5]
        needed = {idea for idea in asked if not idea.isupper()} or asked  # its own words, if it has any
        ranked: list[tuple[float, _Clause]] = []
        keys: set[str] = set()
        for clause in self.statements:
            whose = re.match("(?:my|mi|mis) ([a-z]+)", clause.bare)
            is_others = needed == asked and whose and not asked & _ideas(whose[1])  # "my wife is Eva": not my name
            if is_others or not clause.ideas & needed or clause.key in keys:
                continue  # an older fact of which a person has one: the newer has replaced it
            keys |= {clause.key} - {""}
            is_certain = any(idea in asked and pattern.search(clause.bare) for idea, _, pattern in _TOPICS)
            bonus = 0.5 if is_certain else 0.25 if _NAME_ALONE.match(clause.text) else 0
            ranked.append((len(asked & clause.ideas) + len(needed & clause.ideas) + bonus, clause))
        ranked.sort(key=lambda entry: -entry[0])  # stable: newest first among equals
        chosen: list[_Clause] = []
        for score, clause in ranked:
            if score == ranked[0][0] or clause.ideas & needed - set().union(*(each.ideas for each in chosen)):
                chosen.append(clause)
        return chosen[:5]

    def reply(self) -> str:
        """What the model says to the user at the end of its turn; never empty."""
        if self.command and self.command[0] not in self.tools:
            return self._say("no tool", self.command[0], ", ".join(sorted(self.tools)))
        if self.command:
            done = next((done for done in self.done if done.name == self.command[0]), _Done(*self.command))
            return self._say("returned" if done.ok else "call failed", done.name, done.result[:OFFLINE_READS])
        parts = [*self._say_edits(), *(self._say_answer(question) for question in self.questions)]
        if _GREETING.match(self.text[:80]):
            names = (_NAME_SAID.search(line.text) or _NAME_ALONE.match(line.text) for line in self.core)
            parts.insert(0, self._say("hello", next((f", {name[1]}" for name in names if name), "")))
        elif not parts and not self.asks_self:
            is_thanks = re.match(r"\W*(?:muchas )?(?:thank|thx|gracias)", _fold(self.text[:80]))
            parts = [self._say("welcome" if is_thanks else "stays")]
        if self.asks_self or (self.first and not self.facts and not self.questions):
            parts += [self._say("self"), self._say("models")]
        return " ".join(dict.fromkeys(parts))

    def _say(self, phrase: str, *values: str) -> str:
        return _PHRASES[phrase][self.spanish].format(*values)

    def _say_edits(self) -> Iterator[str]:
        """What was noted, kept, forgotten, known already or could not be kept."""
        told: dict[str, list[str]] = {"noted": [], "kept": [], "removed": [], "failed": []}
        for done in self.done:
            old, new = (str(done.arguments.get(key) or "").strip("\n") for key in ("old_content", "new_content"))
            text = excerpt(str(done.arguments.get("content", new)).replace("\n", "; "), 4 * OFFLINE_LINE)
            if not done.ok and done.name in ("core_memory_append", "core_memory_replace", "archival_memory_insert"):
                told["failed"].append(done.result[:200])
            elif done.name == "core_memory_append":
                told["noted"].append(text)
            elif done.name == "core_memory_replace":
                told["noted" if new else "removed"].append(self._say("before", text, old) if new else old)
            elif done.name == "archival_memory_insert":
                told["kept"].append(text)
        if told["kept"]:
            told["failed"] = []
        for phrase in filter(told.get, told):
            yield self._say(phrase, "; ".join(dict.fromkeys(told[phrase])))
        if self.forgets and not told["removed"]:
            yield self._say("absent")
        if self.facts and not any(told.values()):
            known = [fact.text for fact in self.facts if fact.bare in {line.bare for line in self.core}]
            yield self._say("known" if known else "stays", "; ".join(known))

    def _say_answer(self, question: str) -> str:
        """The answer to one question: quotes with their days, or that nothing was found and where it looked."""
        if day := _day_asked(question, self.time):
            hits = [hit for done in self.done if done.name == "conversation_search_date" for hit in _hits(done.result)]
            clauses = [clause for _, role, text in reversed(hits) if role == "user" for clause in _clauses(text)]
            told = [f'"{each.text}"' for each in clauses if _telling_words(each.text) and not each.asks]
            return self._say("on day" if told else "no day", day, "; ".join(dict.fromkeys(told))[:OFFLINE_READS])
        answers = self._answers(question)
        core = "; ".join(clause.text for clause in answers if clause.source == "core")
        parts = [self._say("core", core)] if core else []
        found = [clause for clause in answers if clause.source != "core"]
        parts += [self._say(each.source, each.day[:10], excerpt(each.text, OFFLINE_LINE)) for each in found]
        if not parts and not _ideas(question):
            parts = [self._say("self"), self._say("models")]
        elif not parts:
            failed = [done.result[:200] for done in self.done if done.name in (_RECALL, _ARCHIVAL) and not done.ok]
            parts = [self._say("nothing", " ".join(_telling_words(question)[:8]) or question.strip("¿?")[:80])]
            parts += [self._say("search failed", reason) for reason in failed[:1]]
        return " ".join(parts)


def _calls_done(messages: list[JSON]) -> Iterator[_Done]:
    """The tool calls in these messages, each with its result."""
    results = {str(each.get("tool_call_id")): each.get("content") for each in messages if each.get("role") == "tool"}
    for message in messages:
        calls = message.get("tool_calls") if message.get("role") == "assistant" else None
        for call in calls if isinstance(calls, list) else []:
            function = _json_object(call).get("function")
            if isinstance(function, dict):
                given = _json_object(function.get("arguments"))
                arguments = {name: value for name, value in given.items() if name != "request_heartbeat"}
                result = _json_object(results.get(str(call.get("id"))))
                ok, text = result.get("status", "OK") == "OK", str(result.get("message") or "")
                yield _Done(str(function.get("name")), arguments, ok, text)


def _hits(result: str) -> list[tuple[str, str, str]]:
    """(time, role, text) of each hit in a search result; archival hits have no role."""
    try:
        hits = decode_first(result[result.index("[") :])
    except (ValueError, RecursionError):
        return []
    return [(str(h.get("time")), str(h.get("role") or ""), str(h.get("text"))) for h in hits if isinstance(h, dict)]


def _day_asked(question: str, now: str) -> str:
    """The day that "what did I say yesterday" and its like ask for, seen from `now`; "" for any other question."""
    said = _DAY.search(_fold(question[:OFFLINE_LINE]))
    try:
        if said and said["date"]:
            return str(datetime.date.fromisoformat(said["date"]))
        ago = datetime.timedelta(int(said["ago"] or said["hace"] or bool(said["ayer"]))) if said else None
        return str(datetime.date.fromisoformat(now[:10]) - ago) if ago is not None else ""
    except (ValueError, OverflowError):
        return ""


def _offline_summary(transcript: str) -> str:
    """What the user stated in a transcript, at most SUMMARY_LIMIT characters: what is cut is the oldest."""
    kept: dict[str, None] = {}
    room = SUMMARY_LIMIT // 2
    for message in reversed(re.split(rf"\n(?={_SPEAKER})", transcript)):
        speaker = re.match(_SPEAKER, message)
        if speaker and not message.startswith("user"):
            continue  # what has no speaker is an earlier summary
        told = message[speaker.end() if speaker else 0 :].partition(WAITING_NOTE)[0]
        for line in reversed(told.split("\n")):
            stated = [line[2:]] if line.startswith("- ") else [each.text for each in _clauses(line) if each.is_fact]
            for fact in reversed(stated):
                room -= 0 if fact in kept else min(len(fact), OFFLINE_LINE) + 3
                if room > 0:
                    kept[fact] = None
    lines = [f"- {excerpt(fact, OFFLINE_LINE)}" for fact in reversed(kept)]
    return "\n".join(["The user stated:", *lines] if lines else ["The user stated nothing about themselves."])


def offline_reply(messages: list[JSON], tools: frozenset[str]) -> tuple[str, list[OfflineCall]]:
    """What the offline model answers to a request: (inner monologue, [(tool name, arguments), …]). It never raises.

    `messages` as an endpoint gets them, `tools` the names on offer. Each call but the reply asks for a heartbeat.
    """
    messages = [message for message in messages if isinstance(message, dict)]
    if messages and str(messages[0].get("content")).startswith(SUMMARY_SYSTEM):
        return _offline_summary("\n".join(str(message.get("content")) for message in messages[1:])), []
    turn = _OfflineTurn(messages, tools)
    if not turn.open:
        return "Nothing waits for an answer.", []
    if calls := turn.calls():
        return "I look into my memory and keep what is new.", calls
    reply = turn.reply()
    if "send_message" in tools and not any(done.name == "send_message" for done in turn.done):
        return "I know what to say.", [("send_message", {"message": reply})]
    return reply, []


def offline_chunks(text: str) -> Iterator[str]:
    """The text in pieces of a word, at most 48 characters each, as a model streams it; joined they are the text."""
    return (piece[0] for piece in re.finditer(r"\s{1,40}|\S{1,40}\s{0,8}", text))


class OfflineModel:
    """The embedded model: rules, no network, the real agent loop. It says that it is no language model."""

    name = OFFLINE
    window = CONTEXT_WINDOWS[OFFLINE]
    ratio = 1.0

    def head(self, settings: JSON) -> str:
        return encode_json({"model": OFFLINE, "stream": True})

    async def stream(self, body: str, reply: ModelReply) -> AsyncIterator[None]:
        request = decode_json(body)
        tools = frozenset(tool["function"]["name"] for tool in request.get("tools", ()))
        text, calls = offline_reply(request["messages"], tools)
        for piece in offline_chunks(text):
            reply.feed({"choices": [{"delta": {"content": piece}}]})
            yield
            await asyncio.sleep(0)
        for index, (name, arguments) in enumerate(calls):
            call = {"index": index, "id": f"call_{secrets.token_hex(8)}", "function": {"name": name, "arguments": ""}}
            reply.feed({"choices": [{"delta": {"tool_calls": [call]}}]})
            for piece in offline_chunks(encode_json(arguments)):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
                reply.feed({"choices": [{"delta": delta}]})
                yield
                await asyncio.sleep(0)
        reply.finish, reply.whole = "tool_calls" if calls else "stop", True


class Models:
    """The models of one server: its endpoint, its default model, and one object for each name in use."""

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        context_window: int | None = None,
        idle_timeout: float = IDLE_TIMEOUT,
        embedding_model: str | None = None,
    ) -> None:
        self.context_window = context_window
        "Tokens for every agent whose config says nothing, in place of what its model's name suggests."
        base_url = base_url or os.environ.get("OPENAI_BASE_URL")
        has_key = bool(api_key or os.environ.get("OPENAI_API_KEY"))
        if not model:
            model = only_model(base_url, api_key) if base_url else DEFAULT_MODEL if has_key else OFFLINE
        if (model != OFFLINE or embedding_model) and importlib.util.find_spec("openai") is None:
            raise UsageError(MISSING_OPENAI)
        if embedding_model and importlib.util.find_spec("numpy") is None:
            raise UsageError(MISSING_NUMPY)
        self.default = model
        self.embedding_model = embedding_model
        self.has_endpoint = bool(base_url or has_key or model != OFFLINE)
        self.endpoint = Endpoint(base_url, api_key, idle_timeout)
        self._idle_timeout = idle_timeout
        self._endpoints: dict[str, Endpoint] = {self.endpoint.key: self.endpoint}
        self._models: dict[tuple[str, str], Model] = {}
        self._embedders: dict[tuple[str, str], Embedder] = {}
        self._offline = OfflineModel()

    @property
    def offline(self) -> bool:
        return self.default == OFFLINE

    @property
    def described(self) -> str:
        """The default model, as the banner tells it."""
        if self.offline:
            return (
                "offline, a rule-based stand-in, not a language model; "
                "for a real one set OPENAI_API_KEY, or --base-url and --model"
            )
        vectors = f", embeddings by {self.embedding_model}" if self.embedding_model else ""
        return f"{self.default} at {self.endpoint.base_url or 'OpenAI'}{vectors}"

    def get(self, name: str | None, base_url: str | None = None, api_key: str | None = None) -> tuple[Model, list[str]]:
        """The model of that name (None: the default) and warnings: without an endpoint `offline` stands in."""
        name = name or self.default
        if name == OFFLINE:
            return self._offline, []
        endpoint = self._find_endpoint(base_url, api_key)
        if endpoint is None:
            warning = (
                f"model {quote(name)} is kept, but there is no endpoint: the offline stand-in answers; "
                "set OPENAI_API_KEY or --base-url"
            )
            return self._offline, [warning]
        return self._models.setdefault((endpoint.key, name), OpenAIModel(name, endpoint)), []

    def embedder(
        self, name: str | None, base_url: str | None = None, api_key: str | None = None
    ) -> tuple[Embedder | None, list[str]]:
        """What gives vectors for search (None: the server's, which may be none), and warnings."""
        name = name or self.embedding_model
        if name is None:
            return None, []
        endpoint = self._find_endpoint(base_url, api_key)
        missing = "" if endpoint else "there is no endpoint; set OPENAI_API_KEY or --base-url"
        if importlib.util.find_spec("numpy") is None:
            missing = MISSING_NUMPY
        if endpoint is None or missing:
            return None, [f"embedding model {quote(name)} is kept, but searches go by words alone: {missing}"]
        return self._embedders.setdefault((endpoint.key, name), Embedder(name, endpoint)), []

    def _find_endpoint(self, base_url: str | None, api_key: str | None) -> Endpoint | None:
        """The server's endpoint, or an agent's own."""
        if base_url or api_key:
            endpoint = Endpoint(base_url or self.endpoint.base_url, api_key, self._idle_timeout)
            return self._endpoints.setdefault(endpoint.key, endpoint)
        return self.endpoint if self.has_endpoint else None

    async def close(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.close()


# ======================================================================================================================
# 7. Tools: schemas from signatures, the memory tools, calls that end in time
# ======================================================================================================================


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call."""

    name: str
    function: Callable[..., Any]
    parameters: JSON
    "JSON Schema of the arguments."
    spec: str
    "The encoded entry of a request's tools."
    builtin: bool = False
    "A memory tool: it runs inside the step's transaction and gets the agent's memory as its first argument."
    timeout: float = TOOL_TIMEOUT


REQUEST_HEARTBEAT: Final = "request_heartbeat"
_NO_HEARTBEAT = ("send_message", "pause_heartbeats")
_HEARTBEAT_SCHEMA = {"type": "boolean", "description": "run again right after this call"}
_TYPE_NAMES: Final[dict[Any, str]] = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
}
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def make_tool(
    function: Callable[..., Any], *, name: str | None = None, timeout: float = TOOL_TIMEOUT, builtin: bool = False
) -> Tool:
    """The Tool of a function, its JSON Schema from the signature, its descriptions from the docstring.

    Understood: str, int, float, bool, None, Literal, list, tuple, dict, Optional and unions; the rest is unchecked.
    The docstring's first paragraph describes the tool; its `Args:` (or `:param name:`) lines the parameters.
    Raises UsageError for a function that no model could call.
    """
    name = str(name or getattr(function, "__name__", ""))
    if not callable(function):
        raise UsageError(f"a tool has to be a function, but got {quote(function)}")
    if not _TOOL_NAME.fullmatch(name):
        raise UsageError(f"a tool's name must match {_TOOL_NAME.pattern}, but got {quote(name)}")
    try:
        hints = typing.get_type_hints(getattr(function, "func", function))  # of a partial, those of its function
    except (NameError, TypeError) as error:
        raise UsageError(f"cannot read the annotations of tool {name!r}: {error}") from error
    summary, described = _read_docstring(function)
    properties: JSON = {}
    needed = []
    for parameter in list(inspect.signature(function).parameters.values())[1 if builtin else 0 :]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UsageError(f"tool {name!r}: the parameter {parameter.name!r} cannot be passed by name")
        if parameter.name == REQUEST_HEARTBEAT:
            raise UsageError(f"tool {name!r}: {REQUEST_HEARTBEAT} is added by memws itself")
        schema = schema_of(hints.get(parameter.name, Any))
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        if parameter.default is parameter.empty:
            needed.append(parameter.name)
        elif isinstance(parameter.default, (str, int, float, bool)):
            schema["default"] = parameter.default
        properties[parameter.name] = schema
    if name not in _NO_HEARTBEAT:
        properties[REQUEST_HEARTBEAT] = _HEARTBEAT_SCHEMA
    parameters = {"type": "object", "properties": properties, "required": needed}
    spec = {"type": "function", "function": {"name": name, "description": summary, "parameters": parameters}}
    return Tool(name, function, parameters, encode_json(spec), builtin, timeout)


def schema_of(hint: Any) -> JSON:
    """The JSON Schema of a type; {} where anything goes."""
    if hint in _TYPE_NAMES:
        return {"type": _TYPE_NAMES[hint]}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        kinds = [schema_of(argument) for argument in arguments]
        return {"anyOf": kinds} if len(kinds) > 1 else kinds[0]
    if hint in (list, tuple, set) or origin in (list, tuple, set, Sequence, Iterable):
        alike = len(arguments) == 1 or (len(arguments) == 2 and arguments[1] is ...)
        return {"type": "array", "items": schema_of(arguments[0])} if alike else {"type": "array"}
    if hint is dict or origin in (dict, Mapping):
        return {"type": "object"}
    return {}


_DESCRIBED = re.compile(
    r"^[^\S\n]*(?::param[^\S\n]+)?(\w+)(?:[^\S\n]*\([^)\n]*\))?[^\S\n]*:[^\S\n]*(\S.*(?:\n +\S[^:\n]*$)*)", re.MULTILINE
)


def _read_docstring(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The first paragraph, and what is said of each parameter."""
    text = inspect.getdoc(function) or ""
    summary = " ".join(text.split("\n\n")[0].split())
    return summary, {name: " ".join(meaning.split()) for name, meaning in _DESCRIBED.findall(text)}


def check_arguments(tool: Tool, arguments: JSON) -> JSON:
    """`arguments` as the function takes them, without request_heartbeat. Raises ToolError with advice for the model."""
    properties = tool.parameters["properties"]
    usage = f"{tool.name}({', '.join(_usage(name, schema, tool) for name, schema in properties.items())})"
    checked = {}
    for name, value in arguments.items():
        if name == REQUEST_HEARTBEAT:
            continue
        if name not in properties:
            raise ToolError(f"unknown argument {quote(name)}; call {usage}")
        try:
            checked[name] = _fit(value, properties[name])
        except ValueError as error:
            raise ToolError(f"argument {name}: {error}, but got {quote(value)}; call {usage}") from None
    for name in tool.parameters["required"]:
        if name not in checked:
            raise ToolError(f"missing argument {name!r}; call {usage}")
    return checked


def _usage(name: str, schema: JSON, tool: Tool) -> str:
    kind = schema.get("type") or ("one of " + ", ".join(map(repr, schema["enum"])) if "enum" in schema else "any")
    return (
        f"{name}: {kind}" if name in tool.parameters["required"] else f"{name}: {kind} = {schema.get('default', '…')}"
    )


def _fit(value: Any, schema: JSON) -> Any:
    """`value` if it fits the schema; numbers and booleans that a model wrote as text are read. Raises ValueError."""
    if "anyOf" in schema:
        as_it_is = [option for option in schema["anyOf"] if _is_of(value, option.get("type"))]
        for option in as_it_is or schema["anyOf"]:
            with contextlib.suppress(ValueError):
                return _fit(value, option)
        raise ValueError("expected " + " or ".join(option.get("type", "another value") for option in schema["anyOf"]))
    if "enum" in schema:
        if value not in schema["enum"]:
            raise ValueError(f"expected one of {', '.join(map(repr, schema['enum']))}")
        return value
    kind = schema.get("type")
    if kind is None or (kind == "string" and isinstance(value, str)) or (kind == "boolean" and isinstance(value, bool)):
        return value
    if kind == "boolean" and value in ("true", "false"):
        return value == "true"
    if kind in ("integer", "number") and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(value) if kind == "number" else int(value)
            if math.isfinite(number) and not (isinstance(value, float) and number != value):
                return number
    if kind == "array" and isinstance(value, list):
        return [_fit(item, schema.get("items", {})) for item in value]
    if (kind == "object" and isinstance(value, dict)) or (kind == "null" and value is None):
        return value
    raise ValueError(f"expected {kind}")


_JSON_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _is_of(value: Any, kind: str | None) -> bool:
    """Whether a value is of a JSON type as it stands."""
    return kind is not None and isinstance(value, _JSON_TYPES[kind]) and isinstance(value, bool) == (kind == "boolean")


async def call_tool(tool: Tool, arguments: JSON) -> str:
    """The result of a user's tool as text. Raises ToolError when it fails, or takes longer than its timeout.

    An async tool runs on the loop and ends with a cancel; any other runs in a daemon thread that goes on alone after a
    cancel or timeout, its result dropped.
    """
    limit = asyncio.timeout(tool.timeout)
    try:
        async with limit:
            if inspect.iscoroutinefunction(tool.function):
                return result_text(await tool.function(**arguments))
            return await in_thread(f"memws-tool-{tool.name}", lambda: result_text(tool.function(**arguments)))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ToolError(f"{tool.name} was cancelled by something it called") from None
    except (Exception, SystemExit) as error:  # whatever a tool raises, the model hears of it and the turn goes on
        if limit.expired():
            raise ToolError(f"{tool.name} took longer than {tool.timeout:g} s and was given up") from None
        logger.warning("tool %s failed", tool.name, exc_info=True)
        reason = type(error).__name__
        with contextlib.suppress(Exception):  # its __str__ is the tool's code too
            reason = f"{reason}: {error}"
        raise ToolError(reason) from error


def result_text(result: Any) -> str:
    """A tool's result as text: a string as it is, anything else as JSON; at most TOOL_RESULT_LIMIT characters."""
    if not isinstance(result, str):
        try:
            result = "None" if result is None else encode_json(result)
        except (TypeError, ValueError, RecursionError):
            result = repr(result)
    return excerpt(clean_text(result), TOOL_RESULT_LIMIT)


# ---- the memory tools ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class MemoryEdit:
    """One change of core or archival memory, as it is told."""

    what: Literal["core", "archival"]
    name: str | int
    "The block's label or the passage's id."
    before: str | None
    after: str | None


Where = tuple[str, tuple[str, ...], tuple[str, ...] | None, str | None, str | None]
"What is searched for: query, stores, roles, since, until."
Search = Callable[..., Awaitable[tuple[list[Found], int]]]
"Store.search of one agent."


class AgentMemory:
    """One agent's memory while a transaction is made: edits are gathered here and stored together, or not at all."""

    def __init__(self, search: Search, blocks: Mapping[str, Block], last_passage: int, last_message: int) -> None:
        self.blocks = dict(blocks)
        self.passages: list[Passage] = []
        self.removed: list[int] = []
        self.edits: list[MemoryEdit] = []
        self.said: list[str] = []
        "What send_message said."
        self.pause_minutes: int | None = None
        self._search, self._last_passage, self._last_message = search, last_passage, last_message

    def block(self, label: str) -> Block:
        """The block. Raises ToolError naming the labels there are."""
        if label not in self.blocks:
            raise ToolError(f"there is no core memory block {quote(label)}; blocks: {', '.join(self.blocks)}")
        return self.blocks[label]

    def write(self, label: str, value: str) -> None:
        """Give a block another text. Raises ToolError over its limit."""
        block = self.block(label)
        if len(value) > block.limit:
            raise ToolError(
                f"the {label} block is limited to {block.limit:,} characters, and this would make {len(value):,}; "
                "shorten what is there with core_memory_replace, or keep it in archival memory"
            )
        if value != block.value:
            self.blocks[label] = replace(block, value=value, version=block.version + 1)
            self.edits.append(MemoryEdit("core", label, block.value, value))

    def insert(self, text: str) -> int:
        """Keep a passage; its id."""
        self._last_passage += 1
        self.passages.append(Passage(self._last_passage, text, now_text()))
        self.edits.append(MemoryEdit("archival", self._last_passage, None, text))
        return self._last_passage

    def remove(self, passage: Passage) -> None:
        self.removed.append(passage.id)
        self.edits.append(MemoryEdit("archival", passage.id, passage.text, None))

    async def search(
        self, store: str, query: str, page: int, since: str | None = None, until: str | None = None
    ) -> str:
        """A page of results as a model reads them; the newest first where nothing is searched for.

        What this very turn said is in view already and is left out.
        """
        page = min(max(0, page), 1_000_000)
        start = page * SEARCH_PAGE
        seen = (self._last_message, self._last_passage)
        found, total = await self._search(query, (store,), None, since, until, SEARCH_PAGE, start, seen)
        if not found:
            return (
                f"No results found in {store} memory for {quote(query)}."
                if query
                else f"No results found in {store} memory."
            )
        items = []
        for item in found:
            entry = {
                "time": item.time[:16].replace("T", " "),
                "role": item.role,
                "text": excerpt(item.text, SEARCH_TEXT_LIMIT),
            }
            items.append({key: value for key, value in entry.items() if value})
        pages = (total - 1) // SEARCH_PAGE
        return f"Showing {len(items)} of {total} results (page {page} of {pages}): {encode_json(items)}"


def send_message(memory: AgentMemory, message: str) -> None:
    """Say something to the user. This is the only way to reach them."""
    memory.said.append(message)


def core_memory_append(memory: AgentMemory, name: str, content: str) -> None:
    """Add a line to a block of core memory.

    Args:
        name: the block's label, like persona or human
    """
    before = memory.block(name).value
    memory.write(name, f"{before}\n{content}" if before else content)


def core_memory_replace(memory: AgentMemory, name: str, old_content: str, new_content: str) -> None:
    """Replace text in a block of core memory.

    Args:
        old_content: what stands there, to the letter
        new_content: empty to delete
    """
    block = memory.block(name)
    if not old_content or old_content not in block.value:
        raise ToolError(f"old_content is not in the {name} block; copy it to the letter from what the block holds")
    memory.write(name, block.value.replace(old_content, new_content, 1).strip("\n"))


async def conversation_search(memory: AgentMemory, query: str, page: int = 0) -> str:
    """Search all past messages by words."""
    return await memory.search("recall", query, page)


async def conversation_search_date(memory: AgentMemory, start_date: str, end_date: str, page: int = 0) -> str:
    """List past messages between two days, the newest first.

    Args:
        start_date: YYYY-MM-DD
        end_date: YYYY-MM-DD, inclusive
    """
    return await memory.search("recall", "", page, *date_range(start_date, end_date))


def archival_memory_insert(memory: AgentMemory, content: str) -> None:
    """Keep a passage in archival memory, worded so that a search will find it."""
    if not content.strip():
        raise ToolError("content is empty; say what to keep")
    if len(content) > MAX_TEXT:
        raise ToolError(f"a passage has at most {MAX_TEXT:,} characters, but got {len(content):,}; split it")
    memory.insert(content)


async def archival_memory_search(memory: AgentMemory, query: str, page: int = 0) -> str:
    """Search archival memory by words."""
    return await memory.search("archival", query, page)


def pause_heartbeats(memory: AgentMemory, minutes: int) -> str:
    """Ignore timed heartbeats for some minutes.

    Args:
        minutes: at most 360
    """
    memory.pause_minutes = max(0, min(minutes, MAX_PAUSE_HEARTBEATS))
    return f"Pausing timed heartbeats for {memory.pause_minutes} min"


def date_range(start: str | None, end: str | None) -> tuple[str | None, str | None]:
    """From `start` up to `end` inclusive, as (first time, time after the last) in UTC. Raises ToolError."""
    return _moment(start, 0), _moment(end, 1)


def _moment(text: str | None, days: int) -> str | None:
    """The UTC time that a day or time names; a whole day later for the end of a day."""
    if not text:
        return None
    try:
        when = datetime.datetime.fromisoformat(text.strip())
        if len(text.strip()) <= 10:
            when += datetime.timedelta(days=days)
        elif days:
            when += datetime.timedelta(milliseconds=1)
        when = when.replace(tzinfo=datetime.UTC) if when.tzinfo is None else when.astimezone(datetime.UTC)
    except (ValueError, OverflowError):
        raise ToolError(f"expected a day like 2026-01-31, but got {quote(text)}") from None
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


MEMORY_TOOLS: Final[dict[str, Tool]] = {
    function.__name__: make_tool(function, builtin=True)
    for function in cast(
        "tuple[Callable[..., Any], ...]",
        (
            send_message, core_memory_append, core_memory_replace, conversation_search, conversation_search_date,
            archival_memory_insert, archival_memory_search, pause_heartbeats,
        ),
    )
}  # fmt: skip


# ======================================================================================================================
# 8. Agent: a turn is a loop of steps
# ======================================================================================================================

# ---- what a model is told --------------------------------------------------------------------------------------------


_MEMORY_LINE: Final = "\nRecall memory: "
"What core memory's part of the system message begins with."


def pack(kind: str, **fields: Any) -> str:
    """An event for the model, as MemGPT 0.2.7 (system.py) packs it: user-role JSON with the time."""
    return encode_json({"type": kind, **fields, "time": _model_time()})


def pack_result(ok: bool, text: str) -> str:
    """A tool's answer, as MemGPT 0.2.7 (system.py, package_function_response) packs it."""
    return encode_json({"status": "OK" if ok else "Failed", "message": text, "time": _model_time()})


def _model_time() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %I:%M:%S %p UTC+0000")


def system_text(prompt: str, blocks: Iterable[Block], recall: int, archival: int) -> str:
    """The system message: the prompt, the sizes of recall and archival memory, and core memory with its limits."""
    parts = [prompt.rstrip(), f"{_MEMORY_LINE}{recall} messages. Archival memory: {archival} passages."]
    for block in blocks:
        text = f"{block.value}\n" if block.value else ""
        parts.append(f'<{block.label} characters="{len(block.value)}/{block.limit}">\n{text}</{block.label}>')
    return "\n".join(parts)


# ---- what a model answers --------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Call:
    """A tool call that can be stored: whole id, legal name, arguments that are an object."""

    id: str
    name: str
    arguments: JSON
    problem: str = ""
    "Why it cannot run, as advice for the model."
    encoded: str = field(init=False)
    "The arguments as JSON."
    line: str = field(init=False)
    "The call as MemGPT shows it; its request_heartbeat is nobody's business."

    def __post_init__(self) -> None:
        self.encoded = encode_long(self.arguments)
        shown = {name: value for name, value in self.arguments.items() if name != REQUEST_HEARTBEAT}
        self.line = "".join([f"Running {self.name}(", *repr_pieces(shown), ")"])

    @property
    def heartbeat(self) -> bool:
        return self.arguments.get(REQUEST_HEARTBEAT) in (True, "true")


@dataclass(slots=True)
class Answer:
    """What a model's output was read as, and each correction that took."""

    monologue: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    corrections: list[tuple[str, str]] = field(default_factory=list)
    body: str = ""
    "The chat message, encoded."


def assistant_body(content: str, calls: Sequence[Call]) -> str:
    """The encoded chat message of what an agent said and called."""
    body: JSON = {"role": "assistant", "content": content or None}
    if calls:
        body["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.encoded}}
            for call in calls
        ]
    return encode_long(body)


_THOUGHT = re.compile(r"\s*<think(?:ing)?>(.*?)(?:</think(?:ing)?>\s*(.*)|$)", re.DOTALL)
_FENCED = re.compile(r"```(?:json|tool_call|tool_code)?\s*(.*?)```|<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


def split_thought(content: str) -> tuple[str, str]:
    """(thought, rest) of a text that begins with thoughts in tags, as reasoning models without a parser write."""
    found = _THOUGHT.fullmatch(content)
    return (found.group(1).strip(), (found.group(2) or "").strip()) if found else ("", content)


def read_answer(reply: ModelReply, tools: Mapping[str, Tool]) -> Answer:
    """The ladder: tool calls as such, tool calls written as text, plain text. Raises ModelError where no rung holds.

    An answer without calls is returned with its text; whether that text is a reply is the turn's to know.
    """
    if reply.refusal or (reply.finish == "content_filter" and not reply.calls and not reply.text):
        text = " ".join(clean_text(reply.refusal).split())[:80] or "its endpoint filtered the answer"
        raise ModelError("model_refused", f"the model refuses to answer: {text}")
    answer = Answer(clean_text(reply.monologue).strip(), clean_text(reply.text).strip())
    thought, content = split_thought(answer.content)
    if content != answer.content:
        answer.monologue = answer.monologue.replace(answer.content, f"{thought}\n{content}".strip())
        answer.content = content
    seen: set[str] = set()
    for raw in reply.calls:
        answer.calls.append(_read_call(raw, tools, seen, answer, cut=reply.finish == "length"))
    if not answer.calls and answer.content:
        _read_text_calls(answer, tools)
    if not answer.calls and reply.finish == "length":
        answer.corrections.append(("length", "the answer was cut off at the endpoint's length limit"))
    answer.body = assistant_body(answer.content, answer.calls)
    return answer


def _read_call(raw: RawCall, tools: Mapping[str, Tool], seen: set[str], answer: Answer, cut: bool) -> Call:
    """A call of the stream, mended where it can be. Raises ModelError where it was cut off."""
    call_id = clean_text(raw.id)
    if not call_id or len(call_id) > MAX_ID or call_id in seen:
        if call_id:
            answer.corrections.append(("tool_call_id", "a call's id was used twice or too long and got a new one"))
        call_id = f"call_{secrets.token_hex(8)}"
    seen.add(call_id)
    name = clean_text(raw.name)
    if name not in tools and name.rpartition(".")[2] in tools:
        answer.corrections.append(("tool_name", f"{quote(name)} was read as {name.rpartition('.')[2]!r}"))
        name = name.rpartition(".")[2]
    arguments, problem = read_arguments(raw.arguments)
    if problem and cut:
        raise ModelError("bad_output", "a tool call was cut off at the endpoint's length limit")
    name = re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64] or "unknown"
    if arguments is None:
        return Call(call_id, name, {}, problem=f"the arguments are no JSON object: {quote(raw.arguments)}")
    if problem:
        answer.corrections.append(("arguments", f"the arguments of {name} were {problem}"))
    if name == "send_message":
        _mend_send_message(arguments, answer)
    return Call(call_id, name, arguments)


def _mend_send_message(arguments: JSON, answer: Answer) -> None:
    """A reply under another parameter's name is still a reply."""
    texts = [key for key, value in arguments.items() if isinstance(value, str) and key != REQUEST_HEARTBEAT]
    if "message" not in arguments and len(texts) == 1:
        arguments["message"] = arguments.pop(texts[0])
        answer.corrections.append(("arguments", f"send_message takes message, not {quote(texts[0])}"))


def read_arguments(text: str) -> tuple[JSON | None, str]:
    """(arguments, what had to be mended) of a call's arguments; None where they are no object in any reading."""
    text = clean_text(text).strip()
    if not text:
        return {}, ""
    value = _loads(text)
    if isinstance(value, dict):
        return value, ""
    if isinstance(value, str) and isinstance(inner := _loads(value), dict):
        return inner, "encoded twice"
    mended = _loads(mend_json(text))
    return (mended, "broken JSON and were mended") if isinstance(mended, dict) else (None, "no JSON object")


def _loads(text: str) -> Any:
    """The value of JSON as models write it (line breaks inside strings), free of what cannot be stored; else None."""
    with contextlib.suppress(ValueError, RecursionError):
        return clean_value(decode_loose(text))
    return None


def mend_json(text: str) -> str:
    """JSON that was cut off or has text around it, commas too many, as near as possible to what was meant."""
    start = text.find("{")
    if start < 0:
        return ""
    closers: list[str] = []
    in_string = escaped = False
    out: list[str] = []
    for char in text[start:]:
        if in_string:
            in_string = char != '"' or escaped
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "{[":
            closers.append("}" if char == "{" else "]")
        elif char in "}]":
            while out and (out[-1].isspace() or out[-1] == ","):
                out.pop()
            if closers and char == closers[-1]:
                closers.pop()
        out.append(char)
        if not closers:
            break
    if in_string:
        out.append("\\" if escaped else "")
        out.append('"')
    return "".join(out).rstrip().rstrip(",") + "".join(reversed(closers))


def _read_text_calls(answer: Answer, tools: Mapping[str, Tool]) -> None:
    """Tool calls that a model wrote as text. Raises ModelError for text that is plainly a call, but a broken one."""
    content = answer.content
    candidates = [first or second for first, second in _FENCED.findall(content)] or (
        [content] if content.startswith(("{", "[")) else []
    )
    for candidate in candidates:
        value = _loads(candidate.strip())
        if value is None:
            value = _loads(mend_json(candidate))
        for name, arguments in _calls_in(value):
            known = name in tools or name.rpartition(".")[2] in tools
            if known or len(candidate.strip()) == len(content):
                raw = RawCall("", name, arguments if isinstance(arguments, str) else encode_json(arguments))
                answer.calls.append(_read_call(raw, tools, set(), answer, cut=False))
    if answer.calls:
        answer.corrections.append(("text_call", "a tool call written as text was read as a call"))
        answer.content = _FENCED.sub("", content).strip() if not content.startswith(("{", "[")) else ""
        answer.monologue = answer.monologue.replace(content, answer.content).strip()
    elif candidates and any(f'"{name}"' in content for name in tools):
        raise ModelError("bad_output", "the answer holds a tool call that is no JSON")


def _calls_in(value: Any) -> list[tuple[str, Any]]:
    """(name, arguments) of the calls in a JSON value, in the forms that models write."""
    if isinstance(value, list):
        return [call for item in value for call in _calls_in(item)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("tool_calls"), list):
        return _calls_in(value["tool_calls"])
    if isinstance(value.get("function"), dict):
        return _calls_in(value["function"])
    name = value.get("name") or value.get("function") or value.get("tool")
    for key in ("arguments", "parameters", "params", "args"):
        if isinstance(name, str) and isinstance(value.get(key), (dict, str)):
            arguments = value[key]
            if isinstance(arguments, dict):  # MemGPT's local models put the monologue here
                arguments = {name: item for name, item in arguments.items() if name != "inner_thoughts"}
            return [(name, arguments)]
    return []


# ---- configuration ---------------------------------------------------------------------------------------------------

_IGNORED_KEYS: Final = frozenset(
    (
        "preset", "model_endpoint_type", "model_endpoint", "model_wrapper", "embedding_endpoint_type",
        "embedding_endpoint", "embedding_model", "embedding_dim", "embedding_chunk_size", "embedding_chunk_overlap",
        "data_sources", "create_time", "memgpt_version", "agent_config_path", "functions", "functions_schema",
    )
)  # fmt: skip
"What MemGPT 0.2.7's AgentConfig had beside ours."
UPDATABLE: Final = (
    *("model", "context_window", "tools", "system", "max_steps", "heartbeat_interval", "settings", "embedding"),
)
_SETTINGS: Final[dict[str, tuple[type, float, float]]] = {
    "temperature": (float, 0.0, 2.0),
    "top_p": (float, 0.0, 1.0),
    "max_tokens": (int, 1, 10_000_000),
    "seed": (int, -(2**53), 2**53),
}


class AgentConfig:
    """What an agent is made of, checked. Raises Refused (bad_config, block_limit).

    `values` is what is stored: model (None: the server's default), context_window (None: the model's), tools (None: the
    memory tools), system (None: SYSTEM_PROMPT), max_steps, heartbeat_interval (seconds, 0: none), settings, embedding
    (a model that gives vectors for search; None: the server's).
    """

    DEFAULTS: Final[JSON] = {
        "model": None,
        "context_window": None,
        "tools": None,
        "system": None,
        "max_steps": None,
        "heartbeat_interval": 0,
        "settings": {},
        "embedding": None,
    }

    def __init__(self, config: JSON, tools: Mapping[str, Tool], base: JSON | None = None) -> None:
        self.warnings = [f"{key} is ignored: memws does not use it" for key in config if key in _IGNORED_KEYS]
        allowed = UPDATABLE if base is not None else (*UPDATABLE, "name", "persona", "human", "blocks")
        for key in config:
            if key not in allowed and key not in _IGNORED_KEYS:
                raise Refused("bad_config", f"unknown config key {quote(key)}; known: {', '.join(allowed)}")
        self.values: JSON = {**self.DEFAULTS, **(base or {})}
        for key in UPDATABLE:
            if key in config:
                self.values[key] = self._checked(key, config[key], tools)
        self.name = valid_name(config["name"]) if config.get("name") is not None else f"agent_{secrets.token_hex(4)}"
        self.blocks = [] if base is not None else self._blocks(config)

    @classmethod
    def mended(cls, values: JSON) -> tuple[JSON, list[str]]:
        """A stored config, with defaults for what is missing or cannot be, and what was damaged."""
        checker, good = cls({}, {}, {}), {}
        faults = ["its config was lost, and is that of a new agent"] if LOST in values or not values else []
        faults += [
            f"its config had an unknown key {quote(key)}" for key in values.keys() - {LOST} - cls.DEFAULTS.keys()
        ]
        for key, default in cls.DEFAULTS.items():
            good[key] = default
            value = values.get(key, default)
            known: Any = value if key == "tools" else {}  # a tool may be one that is not registered now
            try:
                good[key] = checker._checked(key, value, known)
            except Refused as error:
                faults.append(f"its config had to be mended ({error})")
        return good, faults

    def _checked(self, key: str, value: Any, tools: Mapping[str, Tool]) -> Any:
        if value is None:
            return self.DEFAULTS[key]
        if key in ("model", "embedding"):
            return self._text(key, value, MAX_MODEL_NAME)
        if key == "system":
            return self._text(key, value, MAX_SYSTEM)
        if key == "tools":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise Refused("bad_config", f"tools: expected a list of names, but got {quote(value)}")
            for name in value:
                if name not in tools:
                    raise Refused("bad_config", f"unknown tool {quote(name)}; known: {', '.join(sorted(tools))}")
            # Whoever names only tools of their own means to add them; a list with a memory tool is the whole list.
            return list(dict.fromkeys(value if MEMORY_TOOLS.keys() & set(value) else (*MEMORY_TOOLS, *value)))
        if key == "settings":
            return self._settings(value)
        least, most = {
            "context_window": (1, 100_000_000),
            "max_steps": (1, 1_000),
            "heartbeat_interval": (0, 10_000_000),
        }[key]
        if type(value) is not int or not least <= value <= most:
            raise Refused("bad_config", f"{key}: expected an integer from {least} to {most}, but got {quote(value)}")
        if key == "heartbeat_interval" and 0 < value < MIN_HEARTBEAT_INTERVAL:
            text = (
                f"heartbeat_interval: expected 0 (none) or at least {MIN_HEARTBEAT_INTERVAL} seconds, but got {value}"
            )
            raise Refused("bad_config", text)
        return value

    def _text(self, key: str, value: Any, most: int) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > most:
            raise Refused("bad_config", f"{key}: expected a text of 1 to {most:,} characters, but got {quote(value)}")
        return value

    def _settings(self, value: Any) -> JSON:
        if not isinstance(value, dict):
            raise Refused("bad_config", f"settings: expected an object, but got {quote(value)}")
        for key, setting in value.items():
            if key == "reasoning_effort":
                if not isinstance(setting, str) or not 0 < len(setting) <= 20:
                    raise Refused("bad_config", f"settings.reasoning_effort: expected a word, but got {quote(setting)}")
                continue
            if key not in _SETTINGS:
                known = ", ".join([*_SETTINGS, "reasoning_effort"])
                raise Refused("bad_config", f"unknown setting {quote(key)}; known: {known}")
            kind, least, most = _SETTINGS[key]
            number = isinstance(setting, int if kind is int else (int, float)) and not isinstance(setting, bool)
            if not number or not least <= setting <= most:
                text = f"settings.{key}: expected a number from {least:g} to {most:g}, but got {quote(setting)}"
                raise Refused("bad_config", text)
        return value

    def _blocks(self, config: JSON) -> list[Block]:
        persona = self._named(config, "persona", PERSONAS, DEFAULT_PERSONA)
        human = self._named(config, "human", HUMANS, DEFAULT_HUMAN)
        blocks = {"persona": self._block("persona", persona), "human": self._block("human", human)}
        given = config.get("blocks")
        if given is None:
            given = []
        if not isinstance(given, list) or len(given) > MAX_BLOCKS:
            raise Refused("bad_config", f"blocks: expected a list of at most {MAX_BLOCKS}, but got {quote(given)}")
        for item in given:
            if not isinstance(item, dict) or item.keys() - {"label", "value", "limit"}:
                raise Refused("bad_config", f"blocks: expected {{label, value, limit}}, but got {quote(item)}")
            label = item.get("label")
            if not isinstance(label, str) or not re.fullmatch(r"[a-zA-Z][\w-]{0,63}", label, re.ASCII):
                raise Refused(
                    "bad_config", f"blocks: expected a label of letters, digits, _ and -, but got {quote(label)}"
                )
            before = blocks.get(label)
            value = item.get("value", before.value if before else "")
            blocks[label] = self._block(label, value, item.get("limit", BLOCK_LIMIT))
        if (total := sum(block.limit for block in blocks.values())) > MAX_BLOCKS_TOTAL:
            text = f"blocks: their limits together are at most {MAX_BLOCKS_TOTAL:,} characters, but got {total:,}"
            raise Refused("bad_config", text)
        return list(blocks.values())

    def _named(self, config: JSON, key: str, bundled: Mapping[str, str], default: str) -> str:
        value = config.get(key)
        if value is None:
            value = default
        if not isinstance(value, str):
            raise Refused(
                "bad_config", f"{key}: expected a text or one of {', '.join(bundled)}, but got {quote(value)}"
            )
        return bundled.get(value, value)

    def _block(self, label: str, value: Any, limit: Any = BLOCK_LIMIT) -> Block:
        if type(limit) is not int or not 1 <= limit <= MAX_BLOCK_LIMIT:
            text = f"block {label}: expected a limit from 1 to {MAX_BLOCK_LIMIT:,} characters, but got {quote(limit)}"
            raise Refused("bad_config", text)
        if not isinstance(value, str):
            raise Refused("bad_config", f"block {label}: expected a text, but got {quote(value)}")
        if len(value) > limit:
            raise Refused(
                "block_limit", f"block {label}: its text has {len(value):,} characters, its limit is {limit:,}"
            )
        return Block(label, value, limit)


_STATE: Final[dict[str, tuple[type, ...]]] = {
    "cut": (int,), "last_passage": (int,), "summary": (str,), "gist": (str,), "last_user": (str,), "warned": (bool,),
    "paused_until": (int, float),
}  # fmt: skip


def mended_state(state: JSON) -> tuple[JSON, list[str]]:
    """A stored state without what cannot be, and what that was."""
    faults = ["its state was lost: the prompt begins with the first message"] if LOST in state else []
    good = {key: value for key, value in state.items() if key != LOST}
    for key, kinds in _STATE.items():
        unreadable = type(good.get(key)) not in kinds or (key == "last_user" and not is_moment(good[key]))
        if key in good and unreadable:
            faults.append(f"its state had to be mended ({key} was {quote(good.pop(key))})")
    return good, faults


MENDERS: Final[dict[str, Mender]] = {"config": AgentConfig.mended, "state": mended_state}


def check_window(window: int, prompt: str, tools: str, blocks: Iterable[Block]) -> None:
    """Raises Refused where a context window has no room for prompt, full blocks and a reply."""
    needed = estimate_tokens(prompt) + estimate_tokens(tools) + MIN_REPLY_TOKENS
    needed += sum(block.limit // 4 + 16 for block in blocks)
    if needed > window:
        raise Refused(
            "bad_config",
            f"context_window: {window:,} tokens are too few: prompt, full blocks and {MIN_REPLY_TOKENS} tokens for a "
            f"conversation need {needed:,}",
        )


# ---- the agent -------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A turn was asked to stop; why is in its `stop_reason`."""


class Turn:
    """One turn while it runs: what it may still do, and what it has done."""

    def __init__(
        self, turn_id: str, message: str | None, *, reason: str = HEARTBEAT_WAKE, verify: bool = False
    ) -> None:
        self.turn_id = turn_id
        self.message = message
        self.reason = reason
        "Why the turn starts, where it has no user's message."
        self.verify = verify
        "Whether the first reply has to go through send_message."
        self.step = 0
        self.before = 0
        "The id of the last chat message before the turn."
        self.over = False
        self.replied = message is None
        "Whether the user has their reply, or nobody waits for one."
        self.stop_reason: str | None = None
        self.input_tokens = self.output_tokens = self.model_calls = 0
        self.estimated = False
        self.failed_calls = 0
        "Model calls that failed."
        self.failed_tools = 0
        "Tool calls that failed in a row."
        self.step_failed = False
        self.compactions = 0
        self.seen_calls: collections.Counter[int] = collections.Counter()
        self.request: RequestRecord | None = None
        "The last model call, until it is stored."
        self.reply: ModelReply | None = None
        self._task: asyncio.Task[Any] | None = None

    def stop(self, reason: str) -> None:
        """End the turn as soon as it can: at once where it waits for a model, a pause or a tool."""
        if self.stop_reason is None and not self.over:
            self.stop_reason = reason
            if self._task is not None:
                self._task.cancel()

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around every await that stop() may break. Raises Stopped; other cancellations pass through."""
        if self.stop_reason is not None:
            raise Stopped
        self._task = task = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self.stop_reason is None or task is None:
                raise
            task.uncancel()
            raise Stopped from None
        finally:
            self._task = None

    @property
    def usage(self) -> JSON:
        """Tokens and model calls so far; `estimated` where an endpoint did not count."""
        return {
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "model_calls": self.model_calls,
            "estimated": self.estimated,
        }

    def events(self, message_type: str, message: str, **fields: Any) -> list[Event]:
        """An agent_response of the step that runs."""
        return response_events(message_type, message, turn_id=self.turn_id, step=max(self.step, 1), **fields)


_NO_USAGE: Final = {"input_tokens": 0, "output_tokens": 0, "model_calls": 0, "estimated": True}
_UNVERIFIED: Final = "the first reply has to go through send_message"


class Agent:
    """A named, persistent memory and a model that take turns (MemGPT: Packer et al. 2023, arXiv 2310.08560).

    The agent knows a store and a model, never a socket: `turn` stores each step and then yields its events, and so do
    the edits. One turn at a time; edits from outside may come between. What is in memory here is what is on disk: a
    transaction that fails changes neither, and the agent has then to be opened anew.
    """

    def __init__(
        self,
        store: Store,
        record: AgentRecord,
        models: Models,
        tools: Mapping[str, Tool],
        max_steps: int,
        api_key: str | None,
    ) -> None:
        self.store = store
        self.record = record
        self.lock = asyncio.Lock()
        "Held from reading memory until the events of the transaction are out: they go out in the order of their seqs."
        self.blocks: dict[str, Block] = {}
        self.messages: list[ChatMessage] = []
        "The chat messages in the context window."
        self.recall = self.archival = self.last_message = self.last_passage = 0
        self.current: Turn | None = None
        "The turn that runs."
        self.repairs: list[str] = []
        "What the last opening had to mend."
        self.warnings: list[str] = []
        self._models, self._tools, self._max_steps, self._api_key = models, tools, max_steps, api_key
        self._message_tokens = 0
        self._cut_prompts = 0

    @property
    def id(self) -> int:
        return self.record.id

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def last_seq(self) -> int:
        return self.record.last_seq

    # -- opening --

    @classmethod
    async def open(
        cls,
        store: Store,
        record: AgentRecord,
        models: Models,
        tools: Mapping[str, Tool],
        max_steps: int = MAX_STEPS,
        api_key: str | None = None,
    ) -> tuple[Agent, list[Event]]:
        """The agent, loaded and repaired, and the events of the repair."""
        agent = cls(store, record, models, tools, max_steps, api_key)
        try:
            record.config, agent.repairs = AgentConfig.mended(record.config)
            record.state, repairs = mended_state(record.state)
            agent.repairs += repairs
            blocks, agent.messages, counts, open_turns = await store.load(record.id, record.state.get("cut", 0))
            agent.blocks = {block.label: block for block in blocks}
            agent.recall, agent.archival = counts["recall"], counts["archival"]
            agent.last_message = counts["last_message"]
            agent.last_passage = max(counts["last_passage"], record.state.get("last_passage", 0))
            agent.configure()
            return agent, await agent._repair(open_turns)
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            logger.error("agent %s cannot be loaded", record.name, exc_info=error)
            text = f"agent {record.name!r} is damaged; stop the server and run: memws.py check --repair"
            raise StoreFailed(text) from error

    def configure(self) -> None:
        """Choose model, window and tools by the config, and build the prompt anew."""
        config = self.record.config
        own = self.record.base_url, self._api_key
        self.model, warnings = self._models.get(config["model"], *own)
        self.embedder, no_vectors = self._models.embedder(config["embedding"], *own)
        self.warnings = [*warnings, *no_vectors]
        self.window: int = config["context_window"] or self._models.context_window or self.model.window
        self.max_steps: int = config["max_steps"] or self._max_steps
        if missing := [name for name in config["tools"] or () if name not in self._tools]:
            self.warnings.append(f"tools that are not registered now are left out: {', '.join(missing)}")
        self.take_tools()
        self._rebuild()

    def _rebuild(self) -> None:
        """Build the system message. Between two calls of this the prompt only grows at its end."""
        prompt = self.record.config["system"] or SYSTEM_PROMPT
        self.system = system_text(prompt, self.blocks.values(), self.recall, self.archival)
        self._system_body = encode_json({"role": "system", "content": self.system})
        summary = self.record.state.get("summary", "")
        self._summary_body = encode_json({"role": "user", "content": summary}) if summary else ""
        self._message_tokens = sum(message.tokens for message in self.messages)

    async def _repair(self, open_turns: list[TurnRecord]) -> list[Event]:
        """Close what a crash left open: calls get a result, turns their end. Nothing that was said is dropped."""
        changes = Changes()
        if self.repairs:  # of config and state
            text = "; ".join(self.repairs)
            changes.events += response_events("correction", text, turn_id=None, step=0, what="config")
            changes.config, changes.state = self.record.config, self.record.state
        faults, open_calls = history_faults(self.messages)
        broken = max((index for index, _ in faults), default=0)
        for message, call_id, name in open_calls:
            self.repairs.append(f"the call of {name} was interrupted and got a result")
            turn = Turn(message.turn_id or "", None)
            turn.step = message.step
            self._add_result(changes, turn, Call(call_id, name, {}), ToolError(INTERRUPTED))
        if broken:
            self.repairs.append(
                "chat messages with unpaired tool calls left the context window; recall memory keeps them"
            )
            first = self.messages[broken].id if broken < len(self.messages) else self.last_message + 1
            changes.state = {**self.record.state, "cut": first}
            changes.events += response_events("correction", self.repairs[-1], turn_id=None, step=0, what="history")
        for record in open_turns:
            self.repairs.append(f"turn {record.turn_id} was interrupted and got its end")
            end = Event("agent_response_end", turn_id=record.turn_id, stop_reason="interrupted", usage=_NO_USAGE)
            changes.events.append(end)
            changes.ends.append(record.turn_id)
        if changes.events or changes.messages:
            await self._store(changes)
        if broken:
            self.messages = self.messages[broken:]
            self._rebuild()
        return changes.events

    # -- a turn --

    async def turn(self, turn: Turn) -> AsyncGenerator[Event, None]:
        """Run a turn to its end: its start, the events of each step once it is stored, exactly one terminal event.

        Deltas and retries come as they happen. Raises StoreFailed before the start, where the message could not be
        stored: then nothing has happened. To be driven by one task that awaits nothing else between two events.
        """
        self.current = turn
        begun = False
        try:
            async for event in self._begin(turn):
                begun = True
                yield event
            while not turn.over:
                async for event in self._step(turn):
                    yield event
        except MemwsError as error:
            if not begun:
                raise
            async for event in self._fail(turn, error):
                yield event
        except Exception as error:  # a fault of ours ends this turn, never the server or another agent's turn
            logger.exception("agent %s: turn %s failed", self.name, turn.turn_id)
            if not begun:
                raise MemwsError("the turn could not begin for a reason of ours; the server's log has it") from error
            async for event in self._fail(
                turn, MemwsError("the turn failed for a reason of ours; the server's log has it")
            ):
                yield event
        finally:
            turn.over = True
            self.current = None

    async def _begin(self, turn: Turn) -> AsyncGenerator[Event, None]:
        """Store the user's message, or why there is a turn without one; the start is its receipt."""
        async with self.lock:
            turn.before = self.last_message
            now = now_text()
            digest = None if turn.message is None else message_digest(turn.message)
            changes = Changes(begins=(turn.turn_id, digest), state=dict(self.record.state))
            changes.events.append(Event("agent_response_start", turn_id=turn.turn_id))
            if turn.message is None:
                changes.events += turn.events("heartbeat", turn.reason, reason=turn.reason)
                self._add_event_message(changes, turn, "heartbeat", reason=turn.reason)
            else:
                last = self.record.state.get("last_user")
                if last is None or seconds_between(last, now) > LOGIN_SILENCE:
                    self._add_event_message(changes, turn, "login", last_login=last or "Never (first login)")
                assert changes.state is not None
                changes.state["last_user"] = now
                shown = self._fitting(turn.message)
                body = encode_json({"role": "user", "content": pack("user_message", message=shown)})
                self._add_message(changes, turn, "user", turn.message, body, said=turn.message, event=changes.events[0])
                changes.events += turn.events("user_message", turn.message)
            await self._store(changes)
            for event in changes.events:
                yield event

    async def _step(self, turn: Turn) -> AsyncGenerator[Event, None]:
        """One model call and the tool calls it asks for."""
        turn.step += 1
        turn.step_failed = False
        turn.reply = turn.request = None
        try:
            if self.used() + MIN_REPLY_TOKENS > self.window:
                async for event in self._compact(turn):
                    yield event
            answer = Answer()
            async for told in self._ask(turn):
                if isinstance(told, Answer):
                    answer = told
                else:
                    yield told
        except Stopped:
            async for event in self._end_stopped(turn):
                yield event
            return
        turn.reply = None  # the answer holds all of it
        async for event in self._act(turn, answer):
            yield event

    # -- asking the model --

    async def _ask(self, turn: Turn) -> AsyncGenerator[Event | Answer, None]:
        """Call the model until its answer can be read; the answer comes last. Raises ModelError, Stopped."""
        retries = corrections = attempts = 0
        unverified: list[tuple[str, str]] = []
        extra = ""
        while True:
            attempts += 1
            try:
                async for event in self._call_model(turn, extra):
                    yield event
                answer = await self._read_reply(turn)
                if not answer.calls and not answer.content and not turn.replied:
                    raise ModelError("bad_output", "the model's answer is empty")
                spoken = any(call.name == "send_message" for call in answer.calls)
                if spoken or not turn.verify or turn.replied or attempts >= FIRST_MESSAGE_ATTEMPTS:
                    answer.corrections[:0] = unverified
                    yield answer
                    return
                unverified.append(("verify", _UNVERIFIED))
                error = ModelError("bad_output", _UNVERIFIED)
                async for event in self._retry(turn, error, attempts, FIRST_MESSAGE_ATTEMPTS - 1, 0.0):
                    yield event
            except ModelError as error:
                turn.failed_calls += 1
                self._note_failure(turn, error)
                if turn.failed_calls >= MAX_FAILED_CALLS:
                    raise
                if error.code == "context_overflow":
                    async for event in self._compact(turn):
                        yield event
                elif error.code == "bad_output" and corrections < CORRECTIVE_RETRIES:
                    corrections += 1
                    alert = pack("system_alert", message=CORRECTIVE.format(problem=error))
                    extra = encode_json({"role": "user", "content": alert})
                    async for event in self._retry(turn, error, corrections, CORRECTIVE_RETRIES, 0.0):
                        yield event
                elif error.learned:  # no failure of transport: the next call leaves the option out
                    async for event in self._retry(turn, error, 1, 1, 0.0):
                        yield event
                elif error.retry and retries < TRANSPORT_RETRIES:
                    delay = RETRY_PAUSE * 2**retries if error.retry_after is None else error.retry_after
                    retries += 1
                    async for event in self._retry(turn, error, retries, TRANSPORT_RETRIES, delay):
                        yield event
                else:
                    raise

    async def _read_reply(self, turn: Turn) -> Answer:
        """What the reply says; one of megabytes is read on a thread, as others would wait for it. Raises ModelError."""
        reply = turn.reply
        assert reply is not None
        if len(reply.text) + sum(len(call.arguments) for call in reply.calls) < LONG_REPLY:
            return read_answer(reply, self.tools)
        return await in_thread("memws-reply", lambda: read_answer(reply, self.tools))

    async def _retry(
        self, turn: Turn, error: ModelError, attempt: int, of: int, delay: float
    ) -> AsyncGenerator[Event, None]:
        """Tell of a failed call and wait before the next."""
        fields = {"attempt": attempt, "of": of, "delay_ms": round(delay * 1000), "code": error.code}
        for event in turn.events("retry", f"{error}; trying again", **fields):
            yield event
        with turn.interruptible():
            await asyncio.sleep(delay)

    async def _call_model(self, turn: Turn, extra: str) -> AsyncGenerator[Event, None]:
        """One model call, its text told while it arrives; the reply is then the turn's."""
        if turn.stop_reason is not None:
            raise Stopped
        messages = [message.body for message in self.messages]
        head = self.model.head(self.record.config["settings"])
        prompt = [self._system_body, *([self._summary_body] if self._summary_body else []), *messages]
        body = request_body(head, [*prompt, extra] if extra else prompt, self._tools_body)
        first, last = (self.messages[0].id, self.messages[-1].id) if messages else (1, 0)
        turn.request = request = RequestRecord(
            turn.turn_id, turn.step, head, self._system_body, self._summary_body, self._tools_body, extra, first, last,
            hashlib.sha256(body.encode()).digest(),
        )  # fmt: skip
        turn.reply = reply = ModelReply()
        turn.model_calls += 1
        started = time.monotonic()
        try:
            with turn.interruptible():
                async with contextlib.aclosing(
                    cast("AsyncGenerator[None, None]", self.model.stream(body, reply))
                ) as grown:
                    async for _ in grown:
                        if request.first_token_ms is None:
                            request.first_token_ms = round((time.monotonic() - started) * 1000)
                        for of, text in reply.news():
                            for event in turn.events("delta", text, of=of):
                                yield event
        finally:
            request.total_ms = round((time.monotonic() - started) * 1000)
            logger.debug(
                "agent %s: %s, step %d: model call, %d ms", self.name, turn.turn_id, turn.step, request.total_ms
            )
            self._count(turn, request, reply, estimate_tokens(body))

    def _count(self, turn: Turn, request: RequestRecord, reply: ModelReply, estimated: int) -> None:
        """Keep what the call used, and calibrate the estimate by what the endpoint counted."""
        calls = [{"id": call.id, "name": call.name, "arguments": call.arguments} for call in reply.calls]
        response = {"content": reply.text, "tool_calls": calls, "finish_reason": reply.finish}
        if len(reply.monologue) > len(reply.text):
            response["monologue"] = reply.monologue
        request.response = response
        usage = reply.usage
        if usage is None:
            output = estimate_tokens(reply.monologue) + sum(estimate_tokens(call.arguments) for call in reply.calls)
            usage = {"input_tokens": round(estimated * self.model.ratio), "output_tokens": output}
            turn.estimated = True
        elif usage["input_tokens"] > 0:
            ratio = usage["input_tokens"] / estimated
            self._cut_prompts = self._cut_prompts + 1 if ratio < 0.5 and estimated > 1000 else 0
            self.model.ratio += 0.3 * (min(2.0, max(0.5, ratio)) - self.model.ratio)
        request.usage = {**usage, "estimated": reply.usage is None}
        turn.input_tokens += usage["input_tokens"]
        turn.output_tokens += usage["output_tokens"]

    def _note_failure(self, turn: Turn, error: ModelError) -> None:
        """Keep with the request why it failed."""
        if turn.request is not None:
            turn.request.response = {"error": {"code": error.code, "message": str(error)}}

    # -- doing what it says --

    async def _act(self, turn: Turn, answer: Answer) -> AsyncGenerator[Event, None]:
        """Store the answer, run its calls in order, decide how the turn goes on.

        Memory tools run inside the transaction. A user's tool runs between two: the first holds the step up to its
        call, the next begins with its result.
        """
        turn.seen_calls.update({hash(call.line) for call in answer.calls})
        changes = Changes()
        self._add_answer(changes, turn, answer)
        calls = collections.deque(answer.calls)
        while True:
            outside: tuple[Call, Tool, JSON] | None = None
            async with self.lock:
                memory = AgentMemory(self.search, self.blocks, self.last_passage, turn.before)
                while calls and outside is None:
                    outside = await self._run_call(changes, turn, calls.popleft(), memory)
                self._add_edits(changes, memory)
                if outside is None:
                    self._finish_step(changes, turn, answer)
                await self._store(changes)
                events, changes = collections.deque(changes.events), Changes()
                while events:  # each is let go of once it is sent: there may be megabytes of them
                    event = events.popleft()
                    yield event
                    if event.span is not None:  # between the parts of a long text others have their turn
                        await asyncio.sleep(0)
            if outside is None:
                return
            await self._run_outside(changes, turn, *outside)

    def _add_answer(self, changes: Changes, turn: Turn, answer: Answer) -> None:
        """The assistant's message with its monologue; plain text, where the user waits for a reply, is that reply."""
        for what, text in answer.corrections:
            changes.events += turn.events("correction", text, what=what)
        reply = "" if answer.calls or turn.replied else answer.content
        monologue = answer.monologue.removesuffix(reply).strip() if reply else answer.monologue
        if monologue:
            changes.events += turn.events("internal_monologue", monologue)
        if reply:
            changes.events += turn.events("correction", "plain text was taken as the reply", what="plain_text")
            changes.events += turn.events("assistant_message", reply)
            turn.replied = True
        if answer.calls or answer.content:
            said = [call.arguments["message"] for call in answer.calls if _says(call)]
            self._add_message(changes, turn, "assistant", monologue, answer.body, said="\n".join(said) or reply)

    async def _run_call(
        self, changes: Changes, turn: Turn, call: Call, memory: AgentMemory
    ) -> tuple[Call, Tool, JSON] | None:
        """Run a memory tool, or hand back a user's tool with its arguments, to be run outside the transaction."""
        whole = call.arguments if len(call.encoded) <= TEXT_PART // 2 else None  # the frame holds them twice
        changes.events += turn.events("tool_call", call.encoded, tool_call_id=call.id, name=call.name, arguments=whole)
        changes.events += turn.events("function_message", call.line)
        started = time.monotonic()
        edits = len(memory.edits)
        try:
            if turn.stop_reason is not None:
                raise ToolError(f"{turn.stop_reason} before it ran")
            if turn.failed_tools >= MAX_FAILED_TOOLS:
                raise ToolError("not run: the calls before it failed")
            if call.problem:
                raise ToolError(call.problem)
            tool = self.tools.get(call.name)
            if tool is None:
                raise ToolError(f"unknown tool {quote(call.name)}; tools: {', '.join(self.tools)}")
            checked = check_arguments(tool, call.arguments)
            if not tool.builtin:
                return call, tool, checked
            result = tool.function(memory, **checked)
            outcome: str | MemwsError = result_text(await result if inspect.isawaitable(result) else result)
        except (ToolError, StoreFailed) as error:
            outcome = error
        for text in memory.said:
            changes.events += turn.events("assistant_message", text)
            turn.replied = True
        memory.said.clear()
        for edit in memory.edits[edits:]:
            changes.events += edit_events(edit, "agent", turn)
        self._add_result(changes, turn, call, outcome, round((time.monotonic() - started) * 1000))
        return None

    async def _run_outside(self, changes: Changes, turn: Turn, call: Call, tool: Tool, arguments: JSON) -> None:
        """Run a user's tool, once, and add its result."""
        started = time.monotonic()
        try:
            with turn.interruptible():
                outcome: str | MemwsError = await call_tool(tool, arguments)
        except ToolError as error:
            outcome = error
        except Stopped:
            outcome = ToolError(f"{turn.stop_reason}: result unknown")
        self._add_result(changes, turn, call, outcome, round((time.monotonic() - started) * 1000))

    def _add_result(
        self, changes: Changes, turn: Turn, call: Call, outcome: str | MemwsError, duration_ms: int = 0
    ) -> None:
        """A call's answer, for the clients and for the model."""
        ok = isinstance(outcome, str)
        text = self._fitting(clean_text(str(outcome)))
        status = "OK" if ok else "Failed"
        changes.events += turn.events(
            "tool_return", text, tool_call_id=call.id, name=call.name, status=status, duration_ms=duration_ms
        )
        changes.events += turn.events("function_message", f"{'Success' if ok else 'Error'}: {text}")
        body = encode_json({"role": "tool", "tool_call_id": call.id, "content": pack_result(ok, text)})
        self._add_message(changes, turn, "tool", text, body)
        turn.failed_tools = 0 if ok else turn.failed_tools + 1
        turn.step_failed = turn.step_failed or not ok

    def _add_edits(self, changes: Changes, memory: AgentMemory) -> None:
        """What the memory tools changed becomes part of the transaction."""
        changes.blocks += [block for label, block in memory.blocks.items() if block is not self.blocks[label]]
        changes.passages += memory.passages
        changes.removed += memory.removed
        if memory.passages:
            self._state(changes)["last_passage"] = memory.passages[-1].id
        if memory.pause_minutes is not None:
            self._state(changes)["paused_until"] = time.time() + 60 * memory.pause_minutes

    def _finish_step(self, changes: Changes, turn: Turn, answer: Answer) -> None:
        """Decide whether another step follows, and why; otherwise end the turn in this same transaction."""
        if turn.request is not None:
            changes.requests.append(turn.request)
        stop, error, reason = turn.stop_reason, None, ""
        used = self.used(changes.messages)
        warn = used > WARNING_FRACTION * self.window and not (self.record.state.get("warned") or turn.compactions)
        if stop is None and turn.failed_tools >= MAX_FAILED_TOOLS:
            error = ModelError(
                "bad_output", f"{MAX_FAILED_TOOLS} tool calls in a row failed; the last: {answer_error(changes)}"
            )
        elif stop is None and max(turn.seen_calls.values(), default=0) >= MAX_REPEATED_CALLS:
            stop = "repeated_call"
        elif stop is None:
            reason = self._reason_to_go_on(turn, answer)
            if reason or warn:
                if turn.step >= self.max_steps:
                    stop = "max_steps"
                elif turn.input_tokens + turn.output_tokens >= TURN_TOKEN_BUDGET:
                    stop = "budget"
            else:
                stop = "done"
        if warn:
            self._state(changes)["warned"] = True
            self._add_event_message(changes, turn, "system_alert", message=PRESSURE_WARNING)
        if reason and stop is None:
            changes.events += turn.events("heartbeat", reason, reason=reason)
            self._add_event_message(changes, turn, "heartbeat", reason=reason)
        changes.events += self._context_events(turn, used, warn, changes.messages)
        if error is not None:
            self._end(changes, turn, error)
        elif stop is not None:
            if not turn.replied and answer.content and turn.stop_reason is None:
                changes.events += turn.events("correction", "the turn ended without send_message", what="no_reply")
                changes.events += turn.events("assistant_message", answer.content)
            self._end(changes, turn, stop)

    def _reason_to_go_on(self, turn: Turn, answer: Answer) -> str:
        """The heartbeat that the next step starts with, or nothing (MemGPT 0.2.7, websocket_server.py, run_step)."""
        if turn.step_failed:
            return HEARTBEAT_FAILED
        if any(call.heartbeat for call in answer.calls):
            return HEARTBEAT_REQUESTED
        return "" if turn.replied else HEARTBEAT_NO_REPLY

    # -- ends --

    def _end(self, changes: Changes, turn: Turn, outcome: str | MemwsError) -> None:
        """The terminal event: a stop reason, or an error."""
        if isinstance(outcome, str):
            end = Event("agent_response_end", turn_id=turn.turn_id, stop_reason=outcome, usage=turn.usage)
        else:
            end = Event(
                "agent_response_error",
                turn_id=turn.turn_id,
                message=str(outcome),
                code=outcome.code,
                stop_reason="error",
                usage=turn.usage,
            )
        changes.events.append(end)
        changes.ends.append(turn.turn_id)
        turn.over = True

    async def _end_stopped(self, turn: Turn) -> AsyncGenerator[Event, None]:
        """End a turn that was stopped while its model answered; what had come of the answer is kept."""
        changes = Changes(requests=[turn.request] if turn.request else [])
        reply = turn.reply
        if reply is not None and (reply.text or reply.calls):
            partial = [ReplyText().news(call.arguments) for call in reply.calls if call.name == "send_message"]
            said = "\n".join(text for text in partial if text)
            monologue, content = clean_text(reply.monologue).strip(), clean_text(reply.text).strip()
            call = Call(f"call_{secrets.token_hex(8)}", "send_message", {"message": said})
            if monologue:
                changes.events += turn.events("internal_monologue", monologue)
            if said or content:
                body = assistant_body(content, [call] if said else [])
                self._add_message(changes, turn, "assistant", monologue, body, said=said)
            if said:
                changes.events += turn.events("assistant_message", said, partial=True)
                self._add_result(
                    changes, turn, call, ToolError(f"{turn.stop_reason}: the user has seen only this much")
                )
        self._end(changes, turn, turn.stop_reason or "cancelled")
        async with self.lock:
            await self._store(changes)
            for event in changes.events:
                yield event

    async def _fail(self, turn: Turn, error: MemwsError) -> AsyncGenerator[Event, None]:
        """End a turn with an error; open calls get a result. A terminal that cannot be stored is still told."""
        changes = Changes(requests=[turn.request] if turn.request else [])
        turn.over = False
        try:
            async with self.lock:
                for _, call_id, name in history_faults(self.messages)[1]:
                    self._add_result(changes, turn, Call(call_id, name, {}), ToolError(INTERRUPTED))
                self._end(changes, turn, error)
                await self._store(changes)
        except StoreFailed:
            logger.error("agent %s: the end of turn %s could not be stored", self.name, turn.turn_id)
            changes = Changes()
            self._end(changes, turn, error)  # anew: the one that was not stored may have got a seq
        for event in changes.events:
            yield event

    # -- the context window --

    def used(self, further: Iterable[ChatMessage] = ()) -> int:
        """Estimated tokens of the next request."""
        fixed = estimate_tokens(self._system_body) + estimate_tokens(self._tools_body + self._summary_body)
        return round((fixed + self._message_tokens + sum(message.tokens for message in further)) * self.model.ratio)

    def sections(self) -> list[JSON]:
        """The parts of the next request, with their estimated tokens and texts."""
        core = self.system[self.system.rfind(_MEMORY_LINE) :]
        texts = {
            "system": self.system[: len(self.system) - len(core)],
            "tools": self._tools_body,
            "core_memory": core,
            "summary": self._summary_body,
            "messages": "\n".join(message.body for message in self.messages),
        }
        return [{**section, "text": texts[section["name"]]} for section in self._section_tokens()]

    def _section_tokens(self, further: Iterable[ChatMessage] = ()) -> list[JSON]:
        core = self.system[self.system.rfind(_MEMORY_LINE) :]
        tokens = {
            "system": estimate_tokens(self._system_body) - estimate_tokens(core),
            "tools": estimate_tokens(self._tools_body) if self._tools_body else 0,
            "core_memory": estimate_tokens(core),
            "summary": estimate_tokens(self._summary_body) if self._summary_body else 0,
            "messages": self._message_tokens + sum(message.tokens for message in further),
        }
        return [{"name": name, "tokens": round(count * self.model.ratio)} for name, count in tokens.items()]

    def _context_events(self, turn: Turn, used: int, warn: bool, further: Sequence[ChatMessage]) -> list[Event]:
        sections = self._section_tokens(further)
        message = f"{used:,} of {self.window:,} tokens"
        fields: JSON = {"sections": sections, "used": used, "window": self.window}
        if warn:
            fields["warning"] = "the context window is nearly full: the agent was told to save what matters"
        elif self._cut_prompts >= 2:
            fields["warning"] = (
                "the endpoint counts less than half of the tokens sent: it seems to cut prompts silently; "
                "set --context-window to the window it really has"
            )
        return turn.events("context", message, **fields)

    def _fitting(self, text: str) -> str:
        """`text`, or an excerpt of it that leaves two thirds of the room for messages to others."""
        room = (
            self.window
            - round(estimate_tokens(self._system_body + self._tools_body) * self.model.ratio)
            - MIN_REPLY_TOKENS
        )
        tokens = round(estimate_tokens(text) * self.model.ratio)
        most = max(128, room // 3)
        return text if tokens <= most else excerpt(text, len(text) * most // tokens)

    async def compact(self) -> AsyncGenerator[Event, None]:
        """Turn the oldest messages into a summary now. Raises ModelError (context_overflow) where there are none."""
        async for event in self._compact(None):
            yield event

    async def _compact(self, turn: Turn | None) -> AsyncGenerator[Event, None]:
        """Replace the oldest chat messages by a summary: the prompt gets strictly smaller; else raises ModelError."""
        before, count = self.used(), len(self.messages)
        compactions = turn.compactions if turn else 0
        room = self.window - round(estimate_tokens(self._system_body + self._tools_body) * self.model.ratio)
        cut = self._cut_at(min(room, self._message_tokens * self.model.ratio) * KEEP_FRACTION / 2**compactions)
        sizes = ", ".join(f"{part['name']} {part['tokens']:,}" for part in self._section_tokens())
        too_small = f"the prompt needs {before:,} of {self.window:,} tokens and cannot be made smaller ({sizes})"
        if cut == 0 or compactions >= 3:
            raise ModelError("context_overflow", too_small)
        if turn is not None:
            turn.compactions += 1
        hidden, kept = self.messages[:cut], self.messages[cut:]
        gist = await self._summarize(turn, hidden)
        if turn is not None and turn.message is not None and hidden[-1].id > turn.before:
            gist += f"\n{WAITING_NOTE}{excerpt(turn.message, SUMMARY_LIMIT // 2)}"
        async with self.lock:
            summary, gist, saved = self._fitting_summary(gist, hidden)
            if saved <= 0:
                raise ModelError("context_overflow", too_small)
            told = {
                "messages_before": count,
                "messages_after": len(kept),
                "tokens_before": before,
                "tokens_after": before - max(1, round(saved * self.model.ratio)),
            }
            text = f"{cut} messages became a summary"
            turn_id, step = (turn.turn_id, turn.step) if turn else (None, 0)
            first = kept[0].id if kept else self.last_message + 1
            state = {**self.record.state, "cut": first, "warned": False, "summary": summary, "gist": gist}
            events = response_events("compaction", text, turn_id=turn_id, step=step, summary=gist, **told)
            await self._store(Changes(state=state, events=events))
            self.messages = kept
            self._rebuild()
            for event in events:
                yield event

    def _fitting_summary(self, gist: str, hidden: Sequence[ChatMessage]) -> tuple[str, str, int]:
        """(summary as packed, its words, tokens saved): the words are halved until they save something."""
        replaced = sum(message.tokens for message in hidden)
        replaced += estimate_tokens(self._summary_body) if self._summary_body else 0
        while True:
            note = _SUMMARY_NOTE.format(hidden=hidden[-1].id, total=self.last_message, gist=gist)
            summary = pack("system_alert", message=note)
            saved = replaced - estimate_tokens(encode_json({"role": "user", "content": summary}))
            if saved > 0 or not gist:
                return summary, gist, saved
            gist = gist[: len(gist) // 2]

    def _cut_at(self, keep: float) -> int:
        """Where to cut: the index of the first message kept, never between a call and its result; 0: nowhere."""
        tokens, best = 0.0, 0
        for index in range(len(self.messages) - 1, 0, -1):
            tokens += self.messages[index].tokens * self.model.ratio
            if tokens > keep and best:
                break
            if self.messages[index].role != "tool":
                best = index
        return best

    async def _summarize(self, turn: Turn | None, hidden: Sequence[ChatMessage]) -> str:
        """A summary of the messages by the model; without one, their last words, so that a compaction never waits."""
        lines = [
            f"{m.role} ({m.time[:16].replace('T', ' ')}): {excerpt(m.said or m.text, 1_000)}"
            for m in hidden
            if m.said or m.text
        ]
        gist = self.record.state.get("gist", "")
        room = max(400, round((self.window - 800) * 2 / self.model.ratio))
        transcript = "\n".join(lines)[-room:]
        if gist:
            transcript = f"Summary of what came before: {gist}\n{transcript}"
        messages = [{"role": "system", "content": SUMMARY_SYSTEM}, {"role": "user", "content": transcript}]
        body = request_body(self.model.head({}), map(encode_json, messages), "")
        reply = ModelReply()
        if turn is not None:
            turn.model_calls += 1
        try:
            with turn.interruptible() if turn else contextlib.nullcontext():
                async for _ in self.model.stream(body, reply):
                    pass
            text = split_thought(clean_text(reply.text).strip())[1]
        except ModelError as error:
            logger.warning("agent %s: no summary by the model (%s)", self.name, error)
            text = ""
        if turn is not None and reply.usage is not None:
            turn.input_tokens += reply.usage["input_tokens"]
            turn.output_tokens += reply.usage["output_tokens"]
        return excerpt(text or transcript[-SUMMARY_LIMIT:], SUMMARY_LIMIT)

    # -- edits from outside --

    async def set_block(self, label: str, value: str, version: int | None) -> AsyncGenerator[Event, None]:
        """Give a block another text. Raises Refused (not_found, block_limit, conflict with the current value)."""
        async with self.lock:
            block = self.blocks.get(label)
            if block is None:
                raise Refused("not_found", f"no block {quote(label)}; blocks: {', '.join(self.blocks)}")
            if version is not None and version != block.version:
                text = f"block {label} has version {block.version} by now; read its value, then send that version"
                raise Refused("conflict", text, version=block.version, value=block.value)
            memory = AgentMemory(self.search, self.blocks, self.last_passage, self.last_message)
            try:
                memory.write(label, value)
            except ToolError:
                text = f"block {label} is limited to {block.limit:,} characters, but got {len(value):,}"
                raise Refused("block_limit", text) from None
            async for event in self._edit(memory):
                yield event

    async def insert_passage(self, text: str) -> AsyncGenerator[Event, None]:
        """Keep a passage in archival memory; its id is the event's. Raises Refused (text_too_long)."""
        if len(text) > MAX_TEXT:
            raise Refused("text_too_long", f"a passage has at most {MAX_TEXT:,} characters, but got {len(text):,}")
        async with self.lock:
            memory = AgentMemory(self.search, self.blocks, self.last_passage, self.last_message)
            memory.insert(text)
            async for event in self._edit(memory):
                yield event

    async def delete_passage(self, passage_id: int) -> AsyncGenerator[Event, None]:
        """Take a passage out of archival memory; the event keeps its text. Raises Refused (not_found)."""
        async with self.lock:
            passage = await self.store.passage(self.id, passage_id)
            if passage is None:
                raise Refused("not_found", f"no passage {passage_id}; search_memory lists passages with their ids")
            memory = AgentMemory(self.search, self.blocks, self.last_passage, self.last_message)
            memory.remove(passage)
            async for event in self._edit(memory):
                yield event

    async def _edit(self, memory: AgentMemory) -> AsyncGenerator[Event, None]:
        changes = Changes()
        for edit in memory.edits:
            changes.events += edit_events(edit, "client", None)
        self._add_edits(changes, memory)
        if changes.events:
            await self._store(changes)
        for event in changes.events:
            yield event

    async def tell(self, message: str, **fields: Any) -> AsyncGenerator[Event, None]:
        """Store an agent_change that belongs to no turn."""
        async with self.lock:
            events = response_events("agent_change", message, turn_id=None, step=0, **fields)
            await self._store(Changes(events=events))
            for event in events:
                yield event

    def settings(self) -> JSON:
        """The config with what the defaults make of it."""
        effective = {"context_window": self.window, "max_steps": self.max_steps, "tools": list(self.tools)}
        return {**self.record.config, "model": self.record.config["model"] or self.model.name, **effective}

    def take_tools(self) -> None:
        """Offer what is registered by now; the system message stays as it is."""
        config = self.record.config["tools"]
        names = list(MEMORY_TOOLS) if config is None else config
        self.tools = {name: self._tools[name] for name in names if name in self._tools}
        specs = ",".join(tool.spec for tool in self.tools.values())
        self._tools_body = f"[{specs}]" if specs else ""

    async def update(self, config: AgentConfig) -> AsyncGenerator[Event, None]:
        """Take another config. Raises Refused where the window is too small for it."""
        async with self.lock:
            before = self.record.config
            self.record.config = config.values
            try:
                self.configure()
                check_window(
                    self.window, config.values["system"] or SYSTEM_PROMPT, self._tools_body, self.blocks.values()
                )
                events = response_events(
                    "agent_change", "the agent's settings changed", turn_id=None, step=0, change="updated"
                )
                await self._store(Changes(events=events, config=config.values))
            except BaseException:
                self.record.config = before
                self.configure()
                raise
            for event in events:
                yield event

    # -- reading --

    async def search(
        self,
        query: str,
        stores: tuple[str, ...],
        roles: tuple[str, ...] | None,
        since: str | None,
        until: str | None,
        limit: int,
        offset: int,
        up_to: tuple[int, int],
    ) -> tuple[list[Found], int]:
        """As Store.search; by vectors too, where the agent has an embedding model and it answers in time."""
        near = await self.nearest(query, stores, roles, since, until, up_to)
        return await self.store.search(self.id, query, stores, roles, since, until, limit, offset, up_to, near)

    async def nearest(
        self,
        query: str,
        stores: tuple[str, ...],
        roles: tuple[str, ...] | None,
        since: str | None,
        until: str | None,
        up_to: tuple[int, int],
    ) -> list[int]:
        """As Store.nearest; nothing without an embedding model, or where it does not answer in time."""
        human = self.blocks.get("human")
        names = [self.name, *(_USER_NAMED.findall(human.value) if human else ())]
        text = unnamed(clean_text(query[:EMBEDDING_TEXT]), names)
        if self.embedder is None or not text.strip() or (near := await self.embedder.near(text)) is None:
            return []
        return await self.store.nearest(self.id, near, stores, roles, since, until, up_to)

    async def request(self, turn_id: str, step: int) -> JSON:
        """What was sent for a step and what came back, rebuilt and compared with the hash of the bytes sent.

        Raises Refused (not_found).
        """
        found = await self.store.request(self.id, turn_id, step)
        if found is None:
            raise Refused("not_found", f"no model call of turn {quote(turn_id)}, step {step}")
        record, messages = found
        prompt = [record.system, *([record.summary] if record.summary else []), *messages]
        body = request_body(record.head, [*prompt, record.extra] if record.extra else prompt, record.tools)
        if hashlib.sha256(body.encode()).digest() != record.digest:
            raise StoreFailed("the stored request does not match the hash of what was sent; run memws.py check")
        return {
            "request": decode_json(body),
            "response": record.response,
            "usage": record.usage,
            "first_token_ms": record.first_token_ms,
            "total_ms": record.total_ms,
        }

    # -- messages and transactions --

    def _add_message(
        self,
        changes: Changes,
        turn: Turn,
        role: str,
        text: str,
        body: str,
        *,
        said: str = "",
        event: Event | None = None,
    ) -> None:
        number = self.last_message + len(changes.messages) + 1
        event = event or (changes.events[-1] if changes.events else None)
        message = ChatMessage(
            number, role, now_text(), text, body, turn.turn_id or None, max(turn.step, 1), said, event
        )
        changes.messages.append(message)

    def _add_event_message(self, changes: Changes, turn: Turn, kind: str, **fields: Any) -> None:
        """An event that the model hears of, packed as a user's message."""
        text = str(fields.get("message") or fields.get("reason") or f"last login: {fields.get('last_login')}")
        body = encode_json({"role": "user", "content": pack(kind, **fields)})
        self._add_message(changes, turn, "system", text, body)

    def _state(self, changes: Changes) -> JSON:
        """The state that the transaction will store."""
        if changes.state is None:
            changes.state = dict(self.record.state)
        return changes.state

    async def _store(self, changes: Changes) -> None:
        """Store a transaction, then take it over. The caller holds the lock."""
        await self.store.commit(self.id, changes)
        self.messages += changes.messages
        self._message_tokens += sum(message.tokens for message in changes.messages)
        self.recall += len(changes.messages)
        self.last_message += len(changes.messages)
        self.archival += len(changes.passages) - len(changes.removed)
        if changes.passages:
            self.last_passage = changes.passages[-1].id
        if changes.state is not None:
            self.record.state = changes.state
        if changes.config is not None:
            self.record.config = changes.config
        if changes.events and (last := changes.events[-1].seq) is not None:
            self.record.last_seq = last
        for message in changes.messages:
            message.event = None
        if changes.blocks:
            self.blocks |= {block.label: block for block in changes.blocks}
            self._rebuild()


_SUMMARY_NOTE: Final = (
    "Note: prior messages ({hidden} of {total}) have left your view to make room; conversation_search finds them. "
    "Summary of them:\n{gist}"
)


_USER_NAMED = re.compile(r"\bname\s*(?:is\s|:)\s*([^\W\d_][\w'\u2019-]*)", re.IGNORECASE)


def edit_events(edit: MemoryEdit, by: str, turn: Turn | None) -> list[Event]:
    """The memory_change that tells of an edit."""
    named = {"label": edit.name} if edit.what == "core" else {"id": edit.name}
    diff = difference(edit.before or "", edit.after or "")
    message = f"{edit.what} memory: {edit.name if edit.what == 'core' else f'passage {edit.name}'} changed"
    return response_events(
        "memory_change",
        message,
        turn_id=turn.turn_id if turn else None,
        step=max(turn.step, 1) if turn else 0,
        what=edit.what,
        **named,
        before=edit.before,
        after=edit.after,
        diff=diff,
        by=by,
    )


def answer_error(changes: Changes) -> str:
    """The last failure that a transaction tells of."""
    texts = [event.fields["message"] for event in changes.events if event.fields.get("status") == "Failed"]
    return str(texts[-1]) if texts else "unknown"


def _says(call: Call) -> bool:
    return call.name == "send_message" and isinstance(call.arguments.get("message"), str)


# ======================================================================================================================
# 9. Client: send a request, iterate the events of a turn
# ======================================================================================================================

Frame = JSON
"One JSON object of the wire as a client sees it: unknown types and fields of later servers pass through."

REFUSALS = {401: "the server asks for its token; give it as token, --token or MEMWS_TOKEN",
            403: "the server refuses this host or origin; start it with --allow-host or --allow-origin",
            503: "the server has no room for another connection; try again later"}  # fmt: skip
"What to do about the HTTP status that refuses a connection."


class Subscription(AsyncIterator[Frame]):
    """The events of an agent on their way to one reader, without end: those stored above `after`, then live ones.

    They come in order, each stored one once, also after a broken connection. A reader that is too slow, or absent,
    costs FEED_LIMIT characters and no more: then nothing is taken in until the reader has emptied what waits, and the
    server is asked for what is stored above the cursor. Live events of that time are lost, as are those of a broken
    connection; a step that has lost some of its deltas gets no more of them, as the stored event has the whole text.
    Iteration raises RemoteError where the server refuses, ConnectionLost where the client gives up.
    """

    def __init__(self, client: Client, request: Frame, after: int | None) -> None:
        if not client.alive:
            raise ConnectionLost(client.url)
        self.agent_name: str | None = request["agent_name"]
        self.turn_id: str = request.get("turn_id", "")  # made by the client unless it was given; "": all turns
        self._client = client
        self._request = request  # what asks the server for the events
        self._unanswered = 0  # times it was sent since the server last began
        self._cursor = after  # the highest seq taken in; None: the agent's present end
        self._last_seq: int | None = None  # the agent's, when the server last began; None: it has not yet
        self._state: Literal["opening", "open", "behind", "over"] = "opening"
        self._waiting: collections.deque[tuple[int, Frame]] = collections.deque()
        self._size = 0  # characters that wait
        self._news = asyncio.Event()
        self._error: MemwsError | None = None
        self._torn: object = None  # the turn and step that lost deltas; True: the next delta tells which
        self._open()
        client._feeds.append(self)

    async def ready(self) -> int:
        """Wait until the server follows the agent for us; gives the agent's last seq at that time."""
        while self._last_seq is None:
            if self._state == "over":
                raise self._error or ConnectionLost(self._client.url)
            await self._news.wait()
        return self._last_seq

    async def __anext__(self) -> Frame:
        while not self._waiting:
            if self._state == "over":
                raise self._error or StopAsyncIteration
            if self._state == "behind":
                self._open()
            self._news.clear()
            await self._news.wait()
        size, event = self._waiting.popleft()
        self._size -= size
        return event

    def _open(self) -> None:
        """Ask for the events above the cursor; what comes before the server begins would jump the queue."""
        if self._unanswered > RESEND_LIMIT:
            return self._end(ConnectionLost(self._client.url))
        self._state, self._torn = "opening", self._last_seq is not None
        self._unanswered += 1
        request = {**self._request, "agent_name": self.agent_name}
        if "after" in request:
            request["after"] = self._cursor
        return self._client._post(request, self._answered)

    def _answered(self, answer: Frame | MemwsError) -> None:
        if isinstance(answer, RemoteError) and answer.code == "unknown_seq" and self._last_seq is not None:
            # The history is shorter than what was seen of it: another database. Follow it from its present end.
            self._cursor = answer.details["last_seq"]
            self._open()
        elif isinstance(answer, RemoteError):
            self._end(answer)
        elif not isinstance(answer, MemwsError):  # else the connection was lost, and it is asked again
            self._begin(answer["last_seq"])

    def _begin(self, last_seq: int) -> None:
        self._state, self._unanswered, self._last_seq = "open", 0, last_seq
        self._cursor = last_seq if self._cursor is None else self._cursor
        self._news.set()

    def _deliver(self, event: Frame, size: int) -> None:
        """Take in an event of `size` characters; a refusal is for its sender alone."""
        is_refusal = event["type"] == "agent_response_error" and "seq" not in event
        if self._state == "open" and event.get("agent_name") == self.agent_name and not is_refusal:
            self._take(event, size)

    def _take(self, event: Frame, size: int) -> bool:
        """Let an event wait for the reader; False: it is known, torn or too much."""
        if event.get("message_type") == "delta":
            step = (event.get("turn_id"), event.get("step"))
            self._torn = step if self._torn is True else self._torn
            if step == self._torn:
                return False
        if event.get("seq", math.inf) <= (self._cursor or 0):
            return False
        if self._waiting and self._size + size > FEED_LIMIT:
            self._state = "behind"
            return False
        self._cursor = event.get("seq", self._cursor)
        self._size += size
        self._unanswered = 0
        self._waiting.append((size, event))
        self._news.set()
        return True

    def _end(self, error: MemwsError | None = None) -> None:
        """Nothing more comes: the reader gets what waits, then `error` or the end."""
        if self._state != "over":
            self._state, self._error = "over", error
            self._news.set()
            self._client._feeds.remove(self)
            self._client._pending.pop(self._request["id"], None)


class ClientTurn(Subscription):
    """The events of one turn, from its start to its terminal frame, where they end; a refusal is only a terminal frame.

    The server is asked for them by the message itself: sent again under the same turn_id, it is not run again.
    """

    async def text(self) -> str:
        """Read to the end; the reply: its assistant messages, a line each. Raises RemoteError where the turn fails."""
        reply = ""
        async for event in self:
            if event["type"] == "agent_response_error":
                raise RemoteError(event["code"], event["message"])
            if event.get("message_type") == "assistant_message":
                reply += ("\n" if reply and event.get("part", 1) == 1 else "") + event["message"]
        return reply

    async def cancel(self) -> Frame:
        """Ask the server to end this turn; its terminal frame still comes. Result as of the command `cancel`."""
        return await self._client.command("cancel", turn_id=self.turn_id, agent_name=self.agent_name)

    def _deliver(self, event: Frame, size: int) -> None:
        is_ours = event.get("id") == self._request["id"] or event.get("agent_name") == self.agent_name
        if event.get("turn_id") != self.turn_id or not is_ours:  # turn_ids are unique within an agent only
            return
        if event["type"] == "agent_response_start" and self._state == "opening":
            self.agent_name = event["agent_name"]
            self._begin(event["seq"])
        terminal = event["type"] in TERMINAL_TYPES
        # A refusal and a place in the queue come without a start; they are stored nowhere, so they are not put off.
        early = "seq" not in event and (terminal or event.get("message_type") == "queue")
        if (early or self._state == "open") and self._take(event, 0 if early else size) and terminal:
            self._end()


class Client:
    """An async client of one server; use it with `async with`, or `connect` and `close`.

    token goes as `Authorization: Bearer`. timeout: seconds for a connection to open. reconnect: True tries for ever
    after a loss, False never, a number for as many seconds; then all that waits ends with an error. On a new connection
    it says hello, loads its agent, subscribes from its cursors and sends messages whose turns are not over again.
    on_state is called with "lost", "restored" and "failed"; on_frame with "sent" or "received" and each frame.
    Not thread-safe: all calls belong on the loop of `connect`.
    """

    def __init__(
        self, url: str = f"ws://localhost:{DEFAULT_PORT}", token: str | None = None, *, timeout: float = OPEN_TIMEOUT,
        reconnect: bool | float = True, on_state: Callable[[str], None] = lambda state: None,
        on_frame: Callable[[str, str], None] = lambda direction, text: None,
    ) -> None:  # fmt: skip
        if token is not None and not re.fullmatch("[!-~]+", token):
            raise ValueError("expected a token of printable ASCII characters without spaces")
        self.url = re.sub(r"^(\w+://)?(?:.*@)?([^?#]*).*", r"\1\2", url, flags=re.DOTALL)
        "The address without user, password and query, fit for logs."
        self.agent_name: str | None = None
        "The connection's current agent: the one created or loaded last."
        self._address, self._token, self._timeout = url, token, timeout
        self._reconnect, self._on_state, self._on_frame = reconnect, on_state, on_frame
        self._message_types: list[str] | None = None
        self._task: asyncio.Task[None] | None = None
        self._outbox: asyncio.Queue[str] | None = None  # None: no connection
        self._delay = RECONNECT_DELAY
        self._ids = itertools.count(1)
        self._pending: dict[int | None, tuple[Frame, Callable[[Frame | MemwsError], None]]] = {}
        self._parts: dict[int, dict[int, str]] = {}
        self._feeds: list[Subscription] = []

    def __repr__(self) -> str:
        return f"<memws.Client {self.url} {'connected' if self.connected else 'not connected'}>"

    async def __aenter__(self) -> typing.Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def connected(self) -> bool:
        """Whether a connection is open just now."""
        return self._outbox is not None

    @property
    def alive(self) -> bool:
        """Whether there is a connection or one is being sought."""
        return self._task is not None and not self._task.done()

    async def connect(self) -> None:
        """Open the connection, in one attempt; nothing happens where it is open. Raises ConnectFailed."""
        if not self.alive:
            socket = await self._dial()
            self._task = asyncio.create_task(self._run(socket), name=f"memws client of {self.url}")
            await asyncio.sleep(0)  # it begins: what is asked for next finds a connection

    async def close(self) -> None:
        """Close the connection; whatever waits gets ConnectionLost."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def command(self, command: str, /, **arguments: Any) -> Frame:
        """Send one command and give its result. Raises RemoteError with the server's code and sentence,
        ConnectionLost where the connection breaks before the answer (it may have been done), RequestTooLarge."""
        answered: asyncio.Future[Frame | MemwsError] = asyncio.get_running_loop().create_future()
        request = {**arguments, "type": "command", "command": command}
        self._post(request, lambda answer: None if answered.done() else answered.set_result(answer))
        answer = await answered
        if isinstance(answer, MemwsError):
            raise answer
        return answer

    async def hello(self, message_types: Iterable[str] | None = None) -> Frame:
        """Ask what the server is, and, with message_types, for these instead of the classic three ("*": all)."""
        return await self.command("hello", message_types=None if message_types is None else list(message_types))

    async def create_agent(self, name: str | None = None, **config: Any) -> Frame:
        """Create an agent, which becomes the current one; config as in the contract."""
        return await self.command("create_agent", config={"name": name, **config})

    async def load_agent(self, name: str) -> Frame:
        """Load an agent, which becomes the current one."""
        return await self.command("load_agent", name=name)

    def send(
        self, message: str, agent_name: str | None = None, turn_id: str | None = None, when_busy: str = "queue"
    ) -> ClientTurn:
        """Send a user message, to the current agent if none is named, and give its turn, to be iterated once.
        Without a connection it goes out after the reconnect. A turn_id from an earlier process resumes that turn."""
        about = {"turn_id": turn_id or uuid.uuid4().hex, "agent_name": self._named(agent_name), "when_busy": when_busy}
        return ClientTurn(self, {"type": "user_message", "id": next(self._ids), "message": message, **about}, 0)

    async def ask(self, message: str, agent_name: str | None = None, when_busy: str = "queue") -> str:
        """Send a user message and give the text of the reply; raises as `ClientTurn.text` does."""
        return await self.send(message, agent_name, when_busy=when_busy).text()

    def subscribe(self, agent_name: str | None = None, after: int | None = None) -> Subscription:
        """Follow an agent (None: the current one): events stored above `after` (0: all, None: none), then live ones.
        As on the wire, a second subscription of the same agent takes the first one's place, which ends."""
        self._end_subscription(agent_name)
        request = {"type": "command", "command": "subscribe", "agent_name": self._named(agent_name), "after": after}
        return Subscription(self, request | {"id": next(self._ids)}, after)

    async def unsubscribe(self, agent_name: str | None = None) -> None:
        """End the subscription of an agent (None: the current one); its iteration ends."""
        self._end_subscription(agent_name)
        await self.command("unsubscribe", agent_name=self._named(agent_name))

    def _named(self, agent_name: str | None) -> str | None:
        """The agent that a call means, spelled as the server spells it, so that its frames are recognised."""
        name = agent_name or self.agent_name
        return name and unicodedata.normalize("NFC", name)

    def _end_subscription(self, agent_name: str | None) -> None:
        for feed in list(self._feeds):
            if not isinstance(feed, ClientTurn) and feed.agent_name == self._named(agent_name):
                feed._end()

    async def _run(self, socket: ClientConnection) -> None:
        """Keep a connection until the client is closed or gives up; then whatever waits fails."""
        error: MemwsError = ConnectionLost(self.url)
        try:
            while True:
                await self._converse(socket)
                self._report("lost")
                socket = await self._redial()
                self._report("restored")
        except (ConnectFailed, ConnectionLost) as failure:
            error = failure
            self._report("failed")
        finally:
            for feed in list(self._feeds):
                feed._end(error)

    def _report(self, state: str) -> None:
        logger.info("connection to %s %s", self.url, state)
        asyncio.get_running_loop().call_soon(self._on_state, state)  # what it raises must not end the connection

    async def _converse(self, socket: ClientConnection) -> None:
        """One connection: it is asked again for what the last one knew; this task reads, another writes."""
        self._outbox = asyncio.Queue()
        writer = asyncio.create_task(_write(socket, self._outbox))
        try:
            if self._message_types is not None:
                self._post({"type": "command", "command": "hello", "message_types": self._message_types})
            if self.agent_name is not None:
                self._post({"type": "command", "command": "load_agent", "name": self.agent_name})
            # Subscriptions before turns: their replay must not find newer events already delivered.
            for feed in sorted(self._feeds, key=lambda feed: isinstance(feed, ClientTurn)):
                if feed._state != "behind":  # else once its reader is back
                    feed._open()
            with contextlib.suppress(ConnectionClosed):
                async for text in socket:
                    self._route(text)
        finally:
            self._outbox = None
            pending, self._pending, self._parts = self._pending, {}, {}
            for _, answer in pending.values():
                answer(ConnectionLost(self.url))
            writer.cancel()
            await socket.close()

    async def _dial(self) -> ClientConnection:
        """One attempt to connect. Raises ConnectFailed, which shows nothing of the address but its public part."""
        from websockets.asyncio.client import connect  # 4 ms of every import otherwise

        status = None
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else None
        is_loopback = re.match(r"wss?://(localhost|127\.[\d.]+|\[::1\])([:/?]|$)", self._address)
        try:
            return await connect(
                self._address, additional_headers=headers, compression=None, max_size=MAX_FRAME, logger=_ws_logger,
                open_timeout=self._timeout, close_timeout=CLOSE_TIMEOUT,
                proxy=None if is_loopback else True,  # a proxy that the environment names cannot reach our loopback
            )  # fmt: skip
        except InvalidStatus as refused:
            status = refused.response.status_code
            advice = REFUSALS.get(status, f"what answers there is no memws server (HTTP {status}); check the address")
        except (InvalidURI, ValueError):
            advice = "expected an address like ws://localhost:8282"
        except TimeoutError:
            advice = f"no answer within {self._timeout:g} s; check the address"
        except WebSocketException:
            advice = "what answers there is no memws server; check the address"
        except OSError as error:
            advice = f"{error.strerror or error}; check the address"
            if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):  # at each address
                advice = "start the server with `python memws.py`"
        raise ConnectFailed(self.url, advice, status)

    async def _redial(self) -> ClientConnection:
        """Connect again, later and later, until time is over (ConnectionLost) or we are refused (ConnectFailed)."""
        deadline = time.monotonic() + (math.inf if self._reconnect is True else self._reconnect)
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, self._delay * random.uniform(0.5, 1.0)))  # noqa: S311
            self._delay = min(2 * self._delay, RECONNECT_DELAY_MAX)
            try:
                return await self._dial()
            except ConnectFailed as failure:
                if failure.status in (401, 403):
                    raise
        raise ConnectionLost(self.url)

    def _post(self, request: Frame, answer: Callable[[Frame | MemwsError], None] = lambda answer: None) -> None:
        """Queue a request for the writer. `answer` gets the result or the error, before the next frame is read; for a
        message only an error. Raises RequestTooLarge."""
        request = {"id": next(self._ids), **request}
        text = encode_json(request)
        if (size := len(text.encode())) > MAX_FRAME:
            raise RequestTooLarge(size)
        if self._outbox is None:
            answer(ConnectionLost(self.url))
        else:
            self._outbox.put_nowait(text)
            self._on_frame("sent", text)
            self._pending[request["id"]] = (request, answer)

    def _route(self, text: str | bytes) -> None:
        """Hand one frame to whoever waits for it."""
        self._delay = RECONNECT_DELAY  # the server answers: the next loss is a new one
        try:
            self._on_frame("received", str(text))
            frame = decode_json(text)
            if frame["type"] in ("command_response", "server_error"):
                self._settle(frame)
            elif frame["type"].startswith("agent_response"):
                for feed in list(self._feeds):
                    feed._deliver(frame, len(text))
                if frame.get("change") in ("renamed", "deleted"):
                    self._rename(frame["agent_name"], frame.get("new_name"))
        except Exception:  # one odd frame must not end the connection
            logger.exception("frame ignored: %.80r", text)

    def _settle(self, frame: Frame) -> None:
        """Answer a request; the answer of several parts is whole once all are there."""
        number, result = frame["id"], frame.get("result", {})
        if "parts" in frame:
            pieces = self._parts.setdefault(number, {})
            pieces[frame["part"]] = result["text"]
            if len(pieces) < frame["parts"]:
                return
            result = decode_json("".join(piece for _, piece in sorted(self._parts.pop(number).items())))
        request, answer = self._pending.pop(number)
        if frame.get("ok"):
            answer(result)
            self._follow(request, result)
        else:
            error = {"code": "internal", "message": "", **frame.get("error", frame)}
            answer(RemoteError(error.pop("code"), error.pop("message"), error))

    def _follow(self, request: Frame, result: Frame) -> None:
        """Keep in mind what a command changed about this connection."""
        command = request["command"]
        if command == "hello" and request.get("message_types") is not None:
            self._message_types = request["message_types"]
        elif command in ("create_agent", "load_agent"):
            self.agent_name = result["agent_name"]
        elif command in ("rename_agent", "delete_agent"):
            self._rename(request.get("agent_name") or self.agent_name, result.get("agent_name"))

    def _rename(self, old: str | None, new: str | None) -> None:
        """An agent has another name, or none any more: the current agent and its feeds follow."""
        if old == self.agent_name:
            self.agent_name = new
        for feed in self._feeds:
            if feed.agent_name == old and new is not None:
                feed.agent_name = new


async def _write(socket: ClientConnection, outbox: asyncio.Queue[str]) -> None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await socket.send(await outbox.get())


class BlockingClient:
    """A Client on a loop of its own daemon thread; its calls work from any other thread, also inside a running loop.

    Use it with `with`; it ends also when nothing refers to it any more. All is as in Client, but reconnect is 60 s, and
    turns and subscriptions are ordinary iterators; a subscription comes once the server has confirmed it.
    """

    def __init__(self, url: str = f"ws://localhost:{DEFAULT_PORT}", token: str | None = None, **options: Any) -> None:
        self.client = Client(url, token, **{"reconnect": 60.0, **options})
        "The async client; it belongs to this object's thread."
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="memws client", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _stop_loop, self._loop, self._thread)
        "Close the connection and end the thread, within 3 s; whatever waits gets ConnectionLost."
        try:
            self._call(self.client.connect)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> typing.Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def agent_name(self) -> str | None:
        """The connection's current agent."""
        return self.client.agent_name

    def command(self, command: str, /, **arguments: Any) -> Frame:
        return self._call(self.client.command, command, **arguments)

    def hello(self, message_types: Iterable[str] | None = None) -> Frame:
        return self._call(self.client.hello, message_types)

    def create_agent(self, name: str | None = None, **config: Any) -> Frame:
        return self._call(self.client.create_agent, name, **config)

    def load_agent(self, name: str) -> Frame:
        return self._call(self.client.load_agent, name)

    def send(self, message: str, *arguments: Any, **options: Any) -> BlockingTurn:
        return BlockingTurn(self, self._call(_soon, self.client.send, message, *arguments, **options))

    def ask(self, message: str, *arguments: Any, **options: Any) -> str:
        return self.send(message, *arguments, **options).text()

    def subscribe(self, agent_name: str | None = None, after: int | None = None) -> Iterator[Frame]:
        subscription: Subscription = self._call(_soon, self.client.subscribe, agent_name, after)
        self._call(subscription.ready)
        return iter(functools.partial(self._call, _next, subscription), None)

    def unsubscribe(self, agent_name: str | None = None) -> None:
        self._call(self.client.unsubscribe, agent_name)

    def _call(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **options: Any) -> T:
        """Run a call on the client's loop and wait for it."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("a blocking call on the client's own thread would never end; await memws.Client instead")
        if not self.close.alive:
            raise ConnectionLost(self.client.url)
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        try:  # an interrupt may come at any place in here, and must leave no call behind
            self._loop.call_soon_threadsafe(_begin, done, functools.partial(call, *arguments, **options))
            return done.result()
        except concurrent.futures.CancelledError:
            raise ConnectionLost(self.client.url) from None
        except BaseException:
            done.cancel()
            raise


def _begin(done: concurrent.futures.Future[T], call: Callable[[], Coroutine[Any, Any, T]]) -> None:
    """Run a call as a task that settles `done` and is cancelled with it."""
    if done.cancelled():
        return
    loop = asyncio.get_running_loop()
    task = loop.create_task(call())

    def settle(task: asyncio.Task[T]) -> None:
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled, at this very moment
            if task.cancelled():
                done.cancel()
            elif error := task.exception():
                done.set_exception(error)
            else:
                done.set_result(task.result())

    task.add_done_callback(settle)
    done.add_done_callback(lambda done: done.cancelled() and loop.call_soon_threadsafe(task.cancel))


connect = BlockingClient  # for scripts and cells: with memws.connect(url) as client


class BlockingTurn(Iterator[Frame]):
    """A turn as an ordinary iterator; an interrupt (KeyboardInterrupt) that meets it waiting cancels the turn."""

    def __init__(self, client: BlockingClient, turn: ClientTurn) -> None:
        self.turn_id = turn.turn_id
        self._client = client
        self._feed = turn

    def __next__(self) -> Frame:
        event = self._wait(_next, self._feed)
        if event is None:
            raise StopIteration
        return event

    def text(self) -> str:
        return self._wait(self._feed.text)

    def cancel(self) -> None:
        """Ask the server to end this turn, without waiting for it: fit for any thread and for signal handlers."""
        asyncio.run_coroutine_threadsafe(self._feed.cancel(), self._client._loop)

    def _wait(self, call: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        try:
            return self._client._call(call, *arguments)
        except KeyboardInterrupt:
            self.cancel()
            raise


async def _soon(call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    return call(*arguments, **options)


async def _next(feed: Subscription) -> Frame | None:
    return await anext(feed, None)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """The thread of a loop: it runs until it is stopped, then its tasks are cancelled and it is closed."""
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.get_loop().run_forever()


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End a loop's thread; it may be the garbage collector that calls, on whatever thread."""
    with contextlib.suppress(RuntimeError):  # it has ended already
        loop.call_soon_threadsafe(loop.stop)
    if threading.current_thread() is not thread:
        thread.join(CLOSE_TIMEOUT + 1.0)


# ======================================================================================================================
# 10. Panel: an ipywidgets panel, which is only a client
# ======================================================================================================================

SETTLE: Final = 0.25
"Seconds that the rest of a text may take to follow the Enter or the click that sends it."
FLUSH_INTERVAL: Final = 0.075
"Seconds in which changes of the transcript are gathered into one push to the browser."
COPY_INTERVAL: Final = 1.0
"Seconds between updates of the static copy."
MEMORY_INTERVAL: Final = 0.2
"Seconds between a change of memory and reading it again."
PIECE: Final = 8_000
"Characters of a streamed text in one widget, which is sent whole at each push."
PAGE: Final = 25
"Items of the transcript in one box: only the last box changes, so that what is opened in others stays open."
LIVE_ITEMS: Final = 200
"Items with a widget each; older ones are folded into one."
FOLDED_SIZE: Final = 200_000
"Characters of HTML kept of folded items, and in the static copy."
HISTORY: Final = 600
"Stored events that are shown of the time before the panel."
STATIC_TURNS: Final = 50
"Turns in the static copy."
FRAMES: Final = 500
"Frames that the tab Frames keeps."
FRAMES_SIZE: Final = 8_000_000
"Characters that they have together."


# ---- HTML: whatever an agent, a tool or a user wrote is escaped here, and nowhere else is HTML made ------------------

PANEL_STYLE: Final = """<style>
.memws-panel, .memws-static { --memws-text: var(--jp-content-font-color1, var(--vscode-foreground, #1f2328));
  --memws-soft: var(--jp-layout-color2, rgba(128,128,128,.12)); --memws-line: var(--jp-border-color2, #8886);
  --memws-user: #3b82c4; --memws-agent: #2e9e6b; --memws-tool: #a06cd5; --memws-warn: #c77d0a; --memws-bad: #d14343;
  color: var(--memws-text); font-size: var(--jp-content-font-size1, 14px); line-height: 1.45; }
.memws-panel { border: 1px solid var(--memws-line); border-radius: 6px; padding: 8px 10px; overflow: hidden;
  background: var(--jp-layout-color1, transparent); gap: 6px; container-type: inline-size; }
.memws-panel .widget-html, .memws-panel .widget-html-content { line-height: 1.45; color: var(--memws-text);
  font-size: inherit; overflow: visible; }
.memws-panel .widget-html, .memws-panel .widget-box { margin: 0; min-width: 0; }
.memws-panel .widget-html-content { overflow-wrap: anywhere; min-width: 0; }
.memws-panel .memws-item, .memws-panel .memws-side > .widget-html { width: 100%; max-width: 100%; }
.memws-panel .memws-item > .widget-html { width: 100%; }
.memws-panel .memws-top, .memws-panel .memws-row { flex-flow: row wrap; align-items: center; gap: 4px 8px;
  overflow: visible; }
.memws-panel .memws-top > .memws-status { flex: 1 1 300px; }
.memws-panel .memws-columns { flex-flow: row wrap; align-items: stretch; gap: 10px; overflow: visible; }
.memws-panel .memws-left { flex: 3 1 420px; gap: 6px; overflow: visible; }
.memws-panel .memws-right { flex: 2 1 340px; overflow: visible; }
.memws-panel .memws-log { display: flex; flex-direction: column-reverse; height: 420px; overflow-x: hidden;
  overflow-y: auto; border: 1px solid var(--memws-line); border-radius: 4px; padding: 8px; }
.memws-panel .memws-log.memws-short { height: 90px; }
.memws-panel .memws-log > .widget-box { flex: 0 0 auto; overflow: visible; margin-bottom: auto; width: 100%; }
.memws-panel .memws-log .widget-box { overflow: visible; }
.memws-panel .memws-side { height: 444px; overflow: auto; gap: 8px; padding: 2px; }
.memws-panel .memws-side .widget-vbox { gap: 6px; overflow: visible; }
.memws-panel .widget-tab > .widget-tab-contents { padding: 8px; overflow: visible; }
.memws-panel .memws-field { flex: 1 1 200px; width: auto; min-width: 120px; margin: 0; }
.memws-panel .memws-field textarea { height: 90px; }
.memws-panel .memws-wide { width: auto; flex: 1 1 auto; margin: 0; }
.memws-panel .jupyter-button { margin: 0; width: auto; min-width: 64px; }
.memws-panel .widget-tab { margin: 0; } .memws-panel .lm-TabBar-tabLabel { color: var(--memws-text); }
.memws-panel .widget-checkbox { width: auto; margin: 0; }
.memws-panel .memws-form { border: 1px solid var(--memws-line); border-radius: 4px; padding: 8px; gap: 4px; }
.memws-panel .memws-item .jp-OutputArea-output { padding: 0; }
.memws-panel .memws-item .jp-OutputPrompt, .memws-panel .memws-item .jp-OutputArea-promptOverlay { display: none; }
.memws-panel .memws-item .jp-RenderedMarkdown { padding: 0 0 0 10px; border-left: 3px solid var(--memws-agent);
  font-size: inherit; color: inherit; line-height: inherit; }
.memws-panel .memws-item .jp-RenderedMarkdown > :last-child { margin-bottom: 0; }
.memws-text { white-space: pre-wrap; border-left: 3px solid var(--memws-line); padding-left: 10px; }
.memws-head { font-size: 85%; margin-top: 8px; }
.memws-user .memws-text { border-color: var(--memws-user); }
.memws-agent .memws-text { border-color: var(--memws-agent); }
.memws-monologue, .memws-tool, .memws-change, .memws-note { font-size: 88%; margin: 3px 0; }
.memws-monologue .memws-text { font-style: italic; }
.memws-tool .memws-text { border-color: var(--memws-tool); }
.memws-change .memws-text { border-color: var(--memws-agent); font-family: var(--jp-code-font-family, monospace); }
.memws-change del { text-decoration: line-through; } .memws-change ins { text-decoration: none; }
.memws-change del, .memws-change ins { display: block; }
.memws-change ins { background: rgba(46,158,107,.16); } .memws-change del { background: rgba(209,67,67,.14); }
.memws-panel details > summary, .memws-static details > summary { cursor: pointer; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.memws-panel details[open] > summary, .memws-static details[open] > summary { white-space: normal; }
.memws-label { font-size: 85%; font-weight: 600; }
.memws-code { font-family: var(--jp-code-font-family, monospace); font-size: 92%; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.memws-warn { border-left: 3px solid var(--memws-warn); padding-left: 8px; }
.memws-bad { border-left: 3px solid var(--memws-bad); padding-left: 8px; }
.memws-dot { display: inline-block; width: .6em; height: .6em; border-radius: 50%; background: var(--memws-bad);
  margin-right: .4em; } .memws-dot.memws-on { background: var(--memws-agent); }
.memws-bar { display: flex; height: 8px; border-radius: 4px; overflow: hidden; background: var(--memws-soft);
  border: 1px solid var(--memws-line); }
.memws-key { display: inline-block; margin-right: 12px; white-space: nowrap; font-size: 85%; }
.memws-key i { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .35em; }
.memws-empty { padding: 24px 12px; text-align: center; }
.memws-hide-monologue .memws-monologue, .memws-hide-tool .memws-tool { display: none; }
.memws-frame { font-family: var(--jp-code-font-family, monospace); font-size: 80%; }
.memws-frame > summary, div.memws-frame { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
</style>"""

SECTION_COLOURS: Final = {
    "system": "#7a8793",
    "tools": "#a06cd5",
    "core_memory": "#2e9e6b",
    "summary": "#c77d0a",
    "messages": "#3b82c4",
}


def escaped(text: object) -> str:
    """A text as HTML that shows it and does nothing else."""
    return html.escape(str(text))


def one_line(text: object, length: int = 120) -> str:
    """The beginning of a text on one line, not escaped yet."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def text_html(text: object) -> str:
    """A text with its line breaks, which stay also where no style sheet does."""
    return f'<div class="memws-text" style="white-space:pre-wrap">{escaped(text)}</div>'


def fold_html(kind: str, summary: str, body: str, *, opened: bool = False) -> str:
    """Something to open; `summary` and `body` are HTML."""
    state = " open" if opened else ""
    return f'<details class="memws-{kind}"{state}><summary>{summary}</summary>{body}</details>'


def clock_time(moment: str, seconds: bool = False) -> str:
    """A time of the wire as this machine's clock shows it, with the date where it is not today's."""
    with contextlib.suppress(ValueError):
        local = datetime.datetime.fromisoformat(moment).astimezone()
        day = "" if local.date() == datetime.datetime.now().astimezone().date() else f"{local:%Y-%m-%d} "
        return day + (f"{local:%H:%M:%S}" if seconds else f"{local:%H:%M}")
    return ""


def diff_html(diff: str) -> str:
    """The lines of a diff, what went and what came."""
    lines = []
    for line in diff.splitlines() or [" unchanged"]:
        tag = {"-": "del", "+": "ins"}.get(line[:1], "div")
        lines.append(f"<{tag}>{escaped(line[:1])} {escaped(line[1:])}</{tag}>")
    return f'<div class="memws-text">{"".join(lines)}</div>'


def bar_html(sections: Iterable[Frame], used: int, window: int, warning: str = "") -> str:
    """How full the context window is, by section."""
    spans, keys = [], []
    for section in sections:
        name, tokens = str(section["name"]), int(section["tokens"])
        colour = SECTION_COLOURS.get(name, "#888")
        spans.append(f'<span style="width:{100 * tokens / max(window, used, 1):.2f}%;background:{colour}"></span>')
        if tokens:
            named = escaped(name.replace("_", " "))
            keys.append(f'<span class="memws-key"><i style="background:{colour}"></i>{named} {tokens:,}</span>')
    total = f'<span class="memws-key">context {used:,} / {window:,} tokens, {100 * used / max(window, 1):.0f} %</span>'
    note = f'<div class="memws-note memws-warn">{escaped(warning)}</div>' if warning else ""
    return f'<div class="memws-bar">{"".join(spans)}</div><div>{total}{"".join(keys)}</div>{note}'


_CODE = re.compile(r"(^```.*?^```[^\S\n]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_LOADS = re.compile(r"(?im)!\[|^```\s*mermaid|<[^>]*\b(src\w*|href|style|data|poster|background)\b")
_MARKUP = re.compile(r"[*_`#|~\[\]]|^\s*([-+>]|\d+[.)])\s", re.MULTILINE)


def safe_markdown(text: str) -> str | None:
    """A model's Markdown without raw HTML, images and formulas by accident; None: better shown as it stands.

    The front end removes scripts from Markdown, but not images, which tell other servers or read the notebook's files.
    Inside code nothing can be escaped; what might load something stands there only if a Markdown parser agrees with us
    on what is code, so such a text stays plain.
    """
    pieces = _CODE.split(text)
    if not _MARKUP.search(text) or any(_LOADS.search(code) for code in pieces[1::2]):
        return None
    for place in range(0, len(pieces), 2):
        piece = pieces[place].replace("<", "&lt;").replace("![", "!&#91;")
        pieces[place] = re.sub(r"(?<!\$)\$(?!\$)", "&#36;", piece)
    return "".join(pieces)


def cut_text(text: str) -> list[str]:
    """A text in pieces of at most PIECE characters, between words where possible; more text moves no cut."""
    pieces = []
    while len(text) > PIECE:
        end = max(text.rfind(space, PIECE // 2, PIECE) for space in "\n ") + 1 or PIECE
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


# ---- the transcript: events become items, no widget is near ----------------------------------------------------------


@dataclass(eq=False)
class Item:
    """One entry of the transcript; `kind` is also its CSS class."""

    kind: str
    head: str = ""
    text: str = ""
    time: str = ""
    open: bool = False
    "More may come: it is being streamed, or its tool runs."
    result: str = ""
    state: str = ""
    gone: bool = False
    "Another item has taken its place."

    @property
    def streams(self) -> bool:
        """Whether its text comes, or came, bit by bit."""
        return self.kind in ("agent", "monologue")

    def pieces(self) -> list[str]:
        """Its HTML, that of a long streamed text in several pieces."""
        if self.kind != "agent" and not (self.streams and self.open):
            return [self.html()]
        first, *more = cut_text(self.text)
        return [self._said(first), *(f'<div class="memws-{self.kind}">{text_html(piece)}</div>' for piece in more)]

    def html(self) -> str:
        """All of it as one HTML."""
        if self.kind in ("user", "agent") or (self.kind == "monologue" and self.open):
            return self._said(self.text)
        if self.kind == "monologue":
            return fold_html("monologue", f"inner monologue · {escaped(one_line(self.text))}", text_html(self.text))
        if self.kind == "tool":
            return self._tool()
        if self.kind == "change":
            return f'<div class="memws-change">{escaped(self.head)}{diff_html(self.text)}</div>'
        if self.text:
            return fold_html(f"note {self.state}", escaped(self.head), text_html(self.text))
        return f'<div class="memws-note {self.state}">{escaped(self.head)}</div>'

    def heading(self) -> str:
        """Who says it and when, as HTML."""
        mark = f" · {escaped(self.state)}" if self.state else ""
        return f'<div class="memws-head"><b>{escaped(self.head)}</b> {clock_time(self.time)}{mark}</div>'

    def _said(self, text: str) -> str:
        return f'<div class="memws-{self.kind}">{self.heading()}{text_html(text)}</div>'

    def _tool(self) -> str:
        summary = f"tool <b>{escaped(self.head)}</b> · {escaped(self.state)} · {escaped(one_line(self.text))}"
        body = f'<div class="memws-label">arguments</div><div class="memws-code">{escaped(self.text)}</div>'
        if not self.open:
            body += f'<div class="memws-label">result</div><div class="memws-code">{escaped(self.result)}</div>'
        return fold_html("tool", summary, f'<div class="memws-text">{body}</div>')


_NOTICE = re.compile(r"^\[This is an automated[^]]*\] ")


class Transcript:
    """The events of one agent as items, and whether a turn runs.

    `changed` holds the items to be shown (again), in order; whoever shows them clears it.
    """

    def __init__(self, agent_name: str) -> None:
        self.agent_name = agent_name
        self.items: collections.deque[Item] = collections.deque(maxlen=2_000)
        self.changed: dict[Item, None] = {}
        self.steps: collections.deque[tuple[str, int, str]] = collections.deque(maxlen=100)
        "(turn_id, step, time) of the model calls seen, oldest first."
        self.running: str | None = None
        "The turn_id of the turn that runs."
        self.step = 0
        self.doing = ""
        self._streams: dict[tuple[str, int, str], Item] = {}
        self._calls: dict[str, Item] = {}
        self._sent: dict[str, Item] = {}

    def add(self, kind: str, head: str, text: str = "", **more: Any) -> Item:
        """Append an item."""
        item = Item(kind, head, text, **more)
        self.items.append(item)
        self.changed[item] = None
        return item

    def send(self, turn_id: str, text: str) -> None:
        """Show a message that is on its way; its event will find it."""
        moment = datetime.datetime.now(datetime.UTC).isoformat()
        self._sent[turn_id] = self.add("user", "you", text, time=moment, state="sending")

    def refuse(self, turn_id: str, error: str) -> None:
        """Mark a message that never became a turn."""
        if item := self._sent.pop(turn_id, None):
            item.state = "not sent"
            self.changed[item] = None
        self.note(error, "memws-bad")

    def note(self, head: str, state: str = "", text: str = "") -> None:
        """Append a line that nobody said."""
        self.add("note", one_line(head, 1_000), text, state=state)

    def take(self, event: Frame) -> None:
        """Show an event; of types that are not known, nothing."""
        kind = str(event.get("message_type") or event.get("type"))
        if handler := getattr(self, f"_take_{kind}", None):
            handler(event)

    def _take_agent_response_start(self, event: Frame) -> None:
        self.running, self.step, self.doing = event["turn_id"], 1, "thinking"

    def _take_user_message(self, event: Frame) -> None:
        item = self._sent.pop(event["turn_id"], None)
        if item is None:
            self.add("user", "you", event["message"], time=event["time"])
            return
        item.state = ""
        if self.items[-1] is not item:  # it waited, and others came first
            self._drop(item)
            item = self.add("user", "you", item.text, time=event["time"])
        self.changed[item] = None

    def _take_queue(self, event: Frame) -> None:
        if item := self._sent.get(str(event.get("turn_id"))):
            item.state = f"waits, number {event.get('position')}"
            self.changed[item] = None

    def _take_delta(self, event: Frame) -> None:
        item = self._stream(event, event["of"])
        item.text += event["message"]
        self.changed[item] = None
        self.step, self.doing = event["step"], "answering" if item.kind == "agent" else "thinking"

    def _stream(self, event: Frame, of: str) -> Item:
        """The item that a piece of text belongs to."""
        key = (event["turn_id"], event["step"], of)
        if key not in self._streams:
            kind, head = ("agent", self.agent_name) if of == "assistant_message" else ("monologue", "inner monologue")
            self._streams[key] = self.add(kind, head, time=event["time"], open=True)
        return self._streams[key]

    def _take_assistant_message(self, event: Frame) -> None:
        """The stored text: what was streamed of it is replaced, what was streamed beyond it is the next one's."""
        item = self._stream(event, event["message_type"])
        text = event["message"] if event.get("part", 1) == 1 else item.result + event["message"]
        item.result = text  # the stored text so far, while parts are missing
        if event.get("part", 1) < event.get("parts", 1):
            return
        rest = item.text[len(text) :] if item.text.startswith(text) else ""
        item.text, item.open, item.result = text, False, ""
        item.state = "stopped" if event.get("partial") else ""
        self.changed[item] = None
        del self._streams[event["turn_id"], event["step"], event["message_type"]]
        if rest:
            self._stream(event, event["message_type"]).text = rest

    _take_internal_monologue = _take_assistant_message

    def _take_retry(self, event: Frame) -> None:
        for item in self._streams.values():  # the model begins its text again
            self._drop(item)
        self._streams.clear()
        self._take_note(event)

    def _drop(self, item: Item) -> None:
        with contextlib.suppress(ValueError):  # so long ago that it has left by itself
            self.items.remove(item)
        item.gone = True
        self.changed[item] = None

    def _take_tool_call(self, event: Frame) -> None:
        if event["name"] == "send_message":
            return
        if item := self._calls.get(event["tool_call_id"]):
            item.text += event["message"]  # arguments in parts
        else:
            item = self._calls[event["tool_call_id"]] = self.add(
                "tool", event["name"], event["message"], time=event["time"], open=True, state="running"
            )
        if isinstance(arguments := event.get("arguments"), dict):
            shown = {key: value for key, value in arguments.items() if key != "request_heartbeat"}
            item.text = "\n".join(f"{key}: {value if isinstance(value, str) else encode_json(value)}"
                                  for key, value in shown.items())  # fmt: skip
        self.doing = f"running {event['name']}"
        self.changed[item] = None

    def _take_tool_return(self, event: Frame) -> None:
        failed = event["status"] != "OK"
        item = self._calls.get(event["tool_call_id"])
        if item is None:
            if failed and self.items[-1].state != "stopped":  # a stop has cut send_message, and its text says so
                self.note(f"{event['name']} failed: {event['message']}", "memws-bad")
            return
        item.open = False
        item.result += event["message"]
        item.state = f"{'failed' if failed else 'ok'} · {event.get('duration_ms', 0):,} ms"
        self.doing = "thinking"
        self.changed[item] = None

    def _take_memory_change(self, event: Frame) -> None:
        place = event["label"] if event["what"] == "core" else f"passage {event['id']}"
        self.add("change", f"{event['what']} memory, {place} · changed by the {event['by']}", event["diff"])

    def _take_context(self, event: Frame) -> None:
        self.steps.append((event["turn_id"], event["step"], event["time"]))
        if warning := event.get("warning"):
            self.note(warning, "memws-warn")

    def _take_compaction(self, event: Frame) -> None:
        sizes = f"{event['tokens_before']:,} → {event['tokens_after']:,} tokens"
        self.note(f"compaction: {event['message']}, {sizes}", "memws-warn", event["summary"])

    def _take_note(self, event: Frame) -> None:
        self.note(f"{event['message_type'].replace('_', ' ')}: {_NOTICE.sub('', event['message'])}")
        self.step = event.get("step", self.step)

    def _take_heartbeat(self, event: Frame) -> None:
        self.step = event["step"] + 1
        self.note(f"step {self.step}: {_NOTICE.sub('', event['reason']).removesuffix(', returning control')}")

    _take_correction = _take_agent_change = _take_note

    def _take_agent_response_end(self, event: Frame) -> None:
        self._end(event)
        if event["stop_reason"] != "done":
            reason = {"cancelled": "stopped", "superseded": "stopped for another message"}.get(event["stop_reason"])
            self.note(reason or event["stop_reason"].replace("_", " "), "memws-warn")

    def _take_agent_response_error(self, event: Frame) -> None:
        self._end(event)
        self.note(f"error: {event['message']}", "memws-bad")

    def _end(self, event: Frame) -> None:
        for item in (*self._streams.values(), *self._calls.values()):
            if item.open:
                item.open, item.state = False, "stopped"
                self.changed[item] = None
        self._streams.clear()
        self._calls.clear()
        if event.get("turn_id") == self.running:
            self.running, self.doing = None, ""

    def turns(self, count: int) -> list[Item]:
        """The items of the last turns."""
        items: list[Item] = []
        for item in reversed(self.items):
            items.append(item)
            count -= item.kind == "user"
            if not count:
                break
        return items[::-1]


# ---- widgets ---------------------------------------------------------------------------------------------------------


def import_ipywidgets() -> Any:
    """ipywidgets. Raises UsageError where it is missing."""
    try:
        import ipywidgets
    except ImportError:
        raise UsageError("the panel needs ipywidgets: pip install ipywidgets, then restart the kernel") from None
    if "marimo" in sys.modules:
        logger.warning("marimo does not show ipywidgets; use memws.connect() there, or the panel in Jupyter")
    return ipywidgets


def import_display() -> Any:
    """IPython.display, which is there wherever a panel can be shown."""
    import IPython.display

    return IPython.display


def classed(widget: Any, *names: str) -> Any:
    """A widget with CSS classes."""
    for name in names:
        widget.add_class(name)
    return widget


def show(widget: Any, shown: bool) -> None:
    """Show or hide a widget."""
    widget.layout.display = None if shown else "none"


class Log:
    """The transcript on the screen: a widget for each of the last LIVE_ITEMS items, in boxes of PAGE."""

    def __init__(self, widgets: Any) -> None:
        self._w = widgets
        self._folded = widgets.HTML()
        self._inner = widgets.VBox([self._folded])
        self.box = classed(widgets.Box([self._inner]), "memws-log")
        self.clear("")

    def clear(self, message: str) -> None:
        """Begin anew; `message` is HTML that stands there until the first item."""
        for page in self._inner.children[1:]:
            close_widget(page)
        self._views: dict[Item, Any] = {}
        self._pages: collections.deque[list[Item]] = collections.deque()
        self._boxes: collections.deque[Any] = collections.deque()
        self._gone: collections.deque[str] = collections.deque()
        self._count = 0
        self._folded.value = message
        self._inner.children = (self._folded,)

    def update(self, items: Iterable[Item]) -> None:
        """Show items that are new or have changed."""
        added = False
        for item in items:
            if item in self._views:
                self._refresh(item)
            elif not item.gone:
                self._append(item)
                added = True
        if added:
            self._fill()

    def _append(self, item: Item) -> None:
        if not self._pages or len(self._pages[-1]) >= PAGE:
            self._pages.append([])
            self._boxes.append(self._w.VBox())
        box = self._w.VBox() if item.streams else self._w.HTML()
        self._views[item] = classed(box, "memws-item", f"memws-item-{item.kind}")
        self._pages[-1].append(item)
        self._refresh(item)

    def _fill(self) -> None:
        """Put new widgets where they belong, and fold the oldest ones."""
        while sum(map(len, self._pages)) > LIVE_ITEMS:
            self._fold()
        if not self._gone and self._folded.value:
            self._folded.value = ""
        for page, box in zip(self._pages, self._boxes, strict=True):
            children = tuple(self._views[item] for item in page)
            if box.children != children:
                box.children = children
        boxes = (self._folded, *self._emptied(), *self._boxes)
        if self._inner.children != boxes:
            self._inner.children = boxes

    def _emptied(self) -> tuple[Any, ...]:
        """Boxes of folded pages stay: taking one out would make the browser draw all later ones again."""
        live = set(map(id, self._boxes))
        return tuple(box for box in self._inner.children[1:] if id(box) not in live)

    def _fold(self) -> None:
        """Fold the oldest page into the one HTML above."""
        box = self._boxes.popleft()
        for item in self._pages.popleft():
            self._gone.append(item.html())
            self._count += 1
            close_widget(self._views.pop(item))
        box.children = ()
        while sum(map(len, self._gone)) > FOLDED_SIZE:
            self._gone.popleft()
        cut = "" if self._count == len(self._gone) else "<div>… Search finds what was said before.</div>"
        self._folded.value = fold_html("note", f"… {self._count:,} earlier items", cut + "".join(self._gone))

    def _refresh(self, item: Item) -> None:
        view = self._views[item]
        if item.gone:
            show(view, False)
        elif not item.streams:
            view.value = item.html()
        elif item.kind == "agent" and not item.open and (markdown := safe_markdown(item.text)) is not None:
            self._set_markdown(view, item, markdown)
        else:
            self._set_pieces(view, item.pieces())

    def _set_pieces(self, view: Any, pieces: list[str]) -> None:
        shown = view.children
        for widget, piece in zip(shown, pieces, strict=False):
            widget.value = piece
        if len(shown) != len(pieces):
            view.children = (*shown[: len(pieces)], *map(self._w.HTML, pieces[len(shown) :]))
            for widget in shown[len(pieces) :]:
                close_widget(widget)

    def _set_markdown(self, view: Any, item: Item, markdown: str) -> None:
        """Rendered by the front end, which removes scripts; sent once, at the end of a reply."""
        output = {"output_type": "display_data", "data": {"text/markdown": markdown, "text/plain": item.text}}
        former = view.children
        head = f'<div class="memws-agent">{item.heading()}</div>'
        view.children = (self._w.HTML(head), self._w.Output(outputs=({**output, "metadata": {}},)))
        for widget in former:
            close_widget(widget)


def close_widget(widget: Any) -> None:
    """Close a widget and all below it: layouts and styles are widgets too."""
    for part in (*getattr(widget, "children", ()), getattr(widget, "layout", None), getattr(widget, "style", None)):
        if part is not None:
            close_widget(part)
    with contextlib.suppress(Exception):  # a front end that has gone must not keep the rest open
        widget.close()


class Entry:
    """Text fields, of which one is shown, and a button: `give` gets each text once, when Enter or the button asks.

    The browser sends the field's text as it is typed, a few times a second, and what asks for sending it on another
    way, which may be faster: so the text is whole once SETTLE has passed without more of it. What does not go on from
    it is the next text. Enter empties the field at once, for typing goes on; a browser that has newer text by then does
    not listen.
    """

    def __init__(
        self, panel: Panel, fields: list[Any], button: Any, give: Callable[[str], None], *, clears: bool = True
    ) -> None:
        self._loop, self._fields, self._give, self._clears = panel.loop, fields, give, clears
        self._draft, self._since = "", float("-inf")
        self._wanted: str | None = None
        self._by_enter = False
        self._asked_again = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        for each in fields:
            each.observe(lambda change: panel.from_user(self._arrived, change["new"]), "value")
            each.on_msg(lambda _, content, buffers: self._heard(panel, content))
        button.on_click(lambda _: panel.from_user(self._asked, False))

    def _heard(self, panel: Panel, content: Frame) -> None:
        if content.get("event") == "submit":
            panel.from_user(self._asked, True)

    def _arrived(self, text: str) -> None:
        """The field has another text: more of what was asked for, or the next."""
        self._since = self._loop.time()
        if self._wanted is not None and text.startswith(self._wanted):
            self._want(text, SETTLE)
            return
        is_wanted = self._since - self._asked_again < SETTLE / 2
        if self._wanted is not None:
            self._send()
        self._draft = text
        if is_wanted:
            self._asked(self._by_enter)

    def _asked(self, by_enter: bool) -> None:
        """Enter or the button: twice within SETTLE is once, unless another text comes with it."""
        now = self._loop.time()
        self._by_enter = by_enter
        if self._wanted is not None:
            self._asked_again = now
        else:
            self._want(self._draft, SETTLE if not self._draft else max(0, self._since + SETTLE - now))

    def _want(self, text: str, seconds: float) -> None:
        """Send this soon, unless it goes on."""
        self._wanted = text
        if self._clears:
            self._draft = ""
        if self._by_enter:
            self._empty()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._settled)

    def _settled(self) -> None:
        self._empty()
        self._send()

    def _empty(self) -> None:
        for each in self._fields if self._clears else ():
            each.value = ""

    def _send(self) -> None:
        text, self._wanted, self._asked_again = self._wanted or "", None, float("-inf")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if text.strip() or not self._clears:
            self._give(text.strip())


class BlockEditor:
    """One block of core memory: shown, or edited in place; an edit is saved with the version it was based on."""

    def __init__(self, panel: Panel, block: Frame) -> None:
        w = panel.widgets
        self._panel = panel
        self.block = block
        self._base: Frame = block
        self._changed = ""
        self._head, self._view, self._said = w.HTML(), w.HTML(), w.HTML()
        self._field = classed(w.Textarea(rows=8), "memws-wide")
        self._edit, self._save, self._undo = (w.Button(description=name) for name in ("edit", "save", "undo"))
        self._editing = w.VBox([self._field, classed(w.HBox([self._save, self._undo]), "memws-row"), self._said])
        panel.on_click(self._edit, self._begin)
        panel.on_click(self._save, lambda: panel.spawn(self._store()))
        panel.on_click(self._undo, self._end)
        show(self._edit, "set_block" in panel.commands)
        self.box = w.VBox([classed(w.HBox([self._head, self._edit]), "memws-row"), self._view, self._editing])
        self._end()

    def take(self, block: Frame, changed: str = "") -> None:
        """The block as the server has it now."""
        meanwhile = block["version"] != self.block["version"]
        self.block = block
        if meanwhile and changed:
            self._changed = f" · changed {changed}"
        if self._edit.disabled and meanwhile:
            self._tell_conflict()
        self._show()

    def _show(self) -> None:
        value, limit = self.block["value"], self.block["limit"]
        told = f"{len(value):,} / {limit:,}{self._changed}"
        self._head.value = f'<b>{escaped(self.block["label"])}</b> <span class="memws-label">{escaped(told)}</span>'
        self._view.value = text_html(value) if value else '<div class="memws-note">empty</div>'

    def _begin(self) -> None:
        self._base = self.block
        self._field.value = self.block["value"]
        self._said.value = ""
        self._edit.disabled = True
        show(self._editing, True)

    def _end(self) -> None:
        self._edit.disabled = False
        show(self._editing, False)
        self._show()

    def _tell_conflict(self) -> None:
        text = "Conflict: the block has changed, to what is above your text. Save again to replace that, or undo."
        self._said.value = f'<div class="memws-bad">{text}</div>'
        self._base = self.block

    async def _store(self) -> None:
        await asyncio.sleep(SETTLE)  # the text may come after the click
        label, version = self.block["label"], self._base["version"]
        try:
            await self._panel.command("set_block", label=label, value=self._field.value, version=version)
        except RemoteError as error:
            if error.code != "conflict":
                self._said.value = f'<div class="memws-bad">{escaped(error)}</div>'
                return
            self.block = {**self.block, "value": error.details["value"], "version": error.details["version"]}
            self._show()
            self._tell_conflict()
        else:
            self._end()
            await self._panel.refresh_memory()


class MemoryTab:
    """Core memory: the blocks with their counts, edited in place."""

    title, needs = "Memory", "get_agent"

    def __init__(self, panel: Panel) -> None:
        self._panel = panel
        self._editors: dict[str, BlockEditor] = {}
        self._counts = panel.widgets.HTML()
        self.box = panel.widgets.VBox([self._counts])

    def take(self, agent: Frame | None) -> None:
        """What get_agent told; None: there is no agent."""
        blocks = agent["blocks"] if agent else []
        if [block["label"] for block in blocks] != list(self._editors):
            for editor in self._editors.values():
                close_widget(editor.box)
            self._editors = {block["label"]: BlockEditor(self._panel, block) for block in blocks}
            self.box.children = (self._counts, *(editor.box for editor in self._editors.values()))
        for block in blocks:
            self._editors[block["label"]].take(block, f"{datetime.datetime.now().astimezone():%H:%M}")
        counts = agent["counts"] if agent else {}
        told = f"recall memory {counts.get('messages', 0):,} messages · "
        told += f"archival memory {counts.get('passages', 0):,} passages"
        self._counts.value = f'<div class="memws-label">{told}</div>' if agent else ""

    def clear(self) -> None:
        self.take(None)


class ContextTab:
    """What the model gets: the present context, or the exact request of a step with the answer that came."""

    title, needs = "Context", "get_context"

    def __init__(self, panel: Panel) -> None:
        w = panel.widgets
        self._panel = panel
        self._pick = classed(w.Dropdown(options=[("now", "")]), "memws-wide")
        self._show = w.Button(description="show")
        self._out = w.HTML()
        self.box = w.VBox([classed(w.HBox([self._pick, self._show]), "memws-row"), self._out])
        panel.on_click(self._show, self.selected)
        self._pick.observe(lambda change: panel.from_user(self._chosen), "value")

    def selected(self) -> None:
        """The user looks here: offer the steps known by now."""
        steps = list(reversed(self._panel.transcript.steps)) if "get_request" in self._panel.commands else []
        options = [("now", ""), *((f"{clock_time(time, seconds=True)} step {step}", f"{step} {turn_id}")
                                  for turn_id, step, time in steps)]  # fmt: skip
        if tuple(options) != tuple(self._pick.options):
            value = self._pick.value
            self._pick.options = options
            self._pick.value = value if value in [each for _, each in options] else ""
        self._chosen()

    def _chosen(self) -> None:
        if self._panel.agent_name:
            self._panel.spawn(self._load(self._pick.value or ""))

    async def _load(self, choice: str) -> None:
        if not choice:
            context = await self._panel.command("get_context")
            parts = [(f"{part['name'].replace('_', ' ')} · {part['tokens']:,} tokens", part["text"])
                     for part in context["sections"] if part["tokens"]]  # fmt: skip
            self._out.value = self._listed(f"{context['used']:,} of {context['window']:,} tokens", parts)
            return
        step, _, turn_id = choice.partition(" ")
        found = await self._panel.command("get_request", turn_id=turn_id, step=int(step))
        parts = [(f"{message.get('role')} · {len(encode_json(message)):,} characters", message)
                 for message in found["request"].get("messages", [])]  # fmt: skip
        rest = {key: value for key, value in found["request"].items() if key != "messages"}
        usage = found.get("usage") or {}
        told = f"{usage.get('input_tokens', '?')} tokens in, {usage.get('output_tokens', '?')} out, "
        told += f"first token after {found.get('first_token_ms')} ms, all after {found.get('total_ms')} ms"
        self._out.value = self._listed(told, [*parts, ("settings and tools", rest), ("answer", found["response"])])

    def _listed(self, told: str, parts: list[tuple[str, Any]]) -> str:
        folds = []
        for title, content in parts:
            text = content if isinstance(content, str) else pretty(content)
            folds.append(fold_html("tool", escaped(title), f'<div class="memws-code">{escaped(text)}</div>'))
        return f'<div class="memws-label">{escaped(told)}</div>{"".join(folds)}'

    def clear(self) -> None:
        self._out.value = ""


def pretty(value: Any, indent: str = "") -> str:
    """A JSON value for people: a line for each field, texts as they are."""
    if isinstance(value, dict):
        pairs = [(f"{key}:", item) for key, item in value.items()]
    elif isinstance(value, list):
        pairs = [("-", item) for item in value]
    else:
        return value if isinstance(value, str) else encode_json(value)
    lines = []
    for key, item in pairs:
        nested = isinstance(item, (dict, list)) and item
        lines.append(f"{indent}{key}{chr(10) if nested else ' '}{pretty(item, indent + '  ')}")
    return "\n".join(lines) or encode_json(value)


class SearchTab:
    """Recall and archival memory: texts with dates and scores, page by page."""

    title, needs = "Search", "search_memory"

    def __init__(self, panel: Panel) -> None:
        w = panel.widgets
        self._panel = panel
        self._query, self._page, self._pages = "", 1, 0
        self._store = w.Dropdown(options=["all", "recall", "archival"], layout={"width": "100px"})
        self._field = classed(w.Text(placeholder="Words to look for"), "memws-field")
        narrow = {"layout": {"width": "190px"}, "style": {"description_width": "32px"}}
        self._from, self._to = (w.DatePicker(description=name, **narrow) for name in ("from", "to"))
        find, self._back, self._next = (w.Button(description=name) for name in ("find", "‹", "›"))
        self._told, self._out = w.HTML(), w.HTML()
        Entry(panel, [self._field], find, self._find, clears=False)
        panel.on_click(self._back, lambda: self._turn(-1))
        panel.on_click(self._next, lambda: self._turn(1))
        contents = ([self._store, self._field, find], [self._from, self._to], [self._back, self._told, self._next])
        rows = [classed(w.HBox(content), "memws-row") for content in contents]
        self._row = rows[-1]
        self.box = w.VBox([*rows, self._out])
        self.clear()

    def clear(self) -> None:
        show(self._row, False)
        self._out.value = '<div class="memws-note">Everything ever said, and what the agent chose to keep.</div>'

    def _find(self, query: str) -> None:
        self._query, self._page = query, 1
        self._turn(0)

    def _turn(self, by: int) -> None:
        self._page += by
        if self._panel.agent_name:
            self._panel.spawn(self._search())

    async def _search(self) -> None:
        days = {"from": self._from.value, "to": self._to.value}
        found = await self._panel.command(
            "search_memory", query=self._query, store=self._store.value, page=self._page,
            **{key: f"{day:%Y-%m-%d}" for key, day in days.items() if day},
        )  # fmt: skip
        self._back.disabled, self._next.disabled = self._page <= 1, self._page >= found["pages"]
        self._told.value = f"{found['total']:,} found, page {self._page} of {max(found['pages'], 1)}"
        show(self._row, True)
        self._out.value = "".join(map(self._result, found["items"])) or '<div class="memws-note">Nothing found.</div>'

    def _result(self, item: Frame) -> str:
        moment = datetime.datetime.fromisoformat(item["time"]).astimezone()
        about = f"{moment:%Y-%m-%d %H:%M} · {item['store']} · {item.get('role') or 'passage'} · {item['score']:.2f}"
        return f'<div class="memws-tool"><div class="memws-label">{escaped(about)}</div>{text_html(item["text"])}</div>'


class FramesTab:
    """The raw protocol: the last frames in both directions."""

    title, needs = "Frames", ""

    def __init__(self, panel: Panel) -> None:
        w = panel.widgets
        self._panel = panel
        self._frames: collections.deque[tuple[float, str, str]] = collections.deque(maxlen=FRAMES)
        self._size = 0
        self._pause = w.ToggleButton(description="pause")
        self._save = w.Button(description="save")
        self._told, self._out = w.HTML(), w.HTML()
        self.box = w.VBox([classed(w.HBox([self._pause, self._save, self._told]), "memws-row"), self._out])
        self._timer: asyncio.TimerHandle | None = None
        self._looked_at = False
        self._pause.observe(lambda change: panel.from_user(self._draw), "value")
        panel.on_click(self._save, lambda: panel.spawn(self._write()))

    def clear(self) -> None:
        """Frames are the connection's, not the agent's: they stay."""

    def record(self, direction: str, text: str) -> None:
        """Keep a frame; it is drawn twice a second while somebody looks."""
        if self._pause.value:
            return
        if len(self._frames) == FRAMES:
            self._size -= len(self._frames[0][2])
        self._frames.append((time.time(), direction, text))
        self._size += len(text)
        while self._size > FRAMES_SIZE and len(self._frames) > 1:
            self._size -= len(self._frames.popleft()[2])
        if self._looked_at and self._timer is None:
            self._timer = self._panel.loop.call_later(0.5, self._draw)

    def selected(self, here: bool = True) -> None:
        self._looked_at = here
        if here:
            self._draw()

    def _draw(self) -> None:
        self._timer = None
        paused = self._pause.value
        self._told.value = f"{len(self._frames)} frames, the newest first" + ("; open one" if paused else "")
        self._out.value = "".join(self._line(*frame, paused) for frame in reversed(self._frames))

    def _line(self, moment: float, direction: str, text: str, whole: bool) -> str:
        arrow = "→" if direction == "sent" else "←"
        frame = decode_json(text)
        kind = frame.get("message_type") or frame.get("command") or frame["type"]
        at = time.strftime("%H:%M:%S", time.localtime(moment))
        line = f"{escaped(f'{arrow} {at} ')}<b>{escaped(kind)}</b>{escaped(f' {len(text.encode()):,} B {text[:160]}')}"
        if not whole:
            return f'<div class="memws-frame">{line}</div>'
        body = pretty(frame) if len(text) < 20_000 else text[:20_000] + " …"
        return fold_html("frame", line, f'<div class="memws-code">{escaped(body)}</div>')

    async def _write(self) -> None:
        """Save the frames beside the notebook, a line each."""
        name = f"memws-frames-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.jsonl"
        lines = [encode_json({"time": moment, "direction": direction, "frame": decode_json(text)}) + "\n"
                 for moment, direction, text in self._frames]  # fmt: skip
        with os.fdopen(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(lines)
        self._told.value = f"saved as {escaped(name)}"


class AgentForm:
    """What a new agent is made of."""

    def __init__(self, panel: Panel) -> None:
        w = panel.widgets
        self._panel = panel
        wide = {"layout": {"width": "auto"}, "style": {"description_width": "110px"}}
        self._name = w.Text(description="name", placeholder="made up when empty", **wide)
        self._persona = w.Textarea(description="persona", placeholder="who it is; empty: Sam, curious and warm", **wide)
        self._human = w.Textarea(description="human", placeholder="what it knows about you from the start", **wide)
        self._model = w.Combobox(description="model", placeholder="the server's default", **wide)
        self._window = w.Text(description="context window", placeholder="tokens; empty: the model's", **wide)
        self._create, self._cancel = w.Button(description="create"), w.Button(description="cancel")
        self._said = w.HTML()
        fields = [self._name, self._persona, self._human, self._model, self._window]
        buttons = classed(w.HBox([self._create, self._cancel, self._said]), "memws-row")
        self.box = classed(w.VBox([*fields, buttons]), "memws-form")
        panel.on_click(self._create, lambda: panel.spawn(self._make()))
        panel.on_click(self._cancel, lambda: show(self.box, False))
        show(self.box, False)

    def open(self, name: str = "", models: Iterable[str] = ()) -> None:
        """Offer to create an agent."""
        if name:
            self._name.value = name
        self._model.options = tuple(models)
        self._said.value = ""
        show(self.box, True)

    async def _make(self) -> None:
        await asyncio.sleep(SETTLE)  # texts may come after the click
        fields = {"name": self._name, "persona": self._persona, "human": self._human, "model": self._model}
        config: Frame = {key: text for key, field in fields.items() if (text := field.value.strip())}
        try:
            if window := re.sub(r"[\s,._]", "", self._window.value):
                config["context_window"] = int(window)
            created = await self._panel.command("create_agent", config=config)
        except (RemoteError, ValueError) as error:
            text = str(error) if isinstance(error, RemoteError) else "context window: expected a number of tokens"
            self._said.value = f'<div class="memws-bad">{escaped(text)}</div>'
            return
        show(self.box, False)
        for text_field in (self._name, self._persona, self._human):
            text_field.value = ""
        await self._panel.open_agent(created["agent_name"], created.get("warnings", ()))


class Panel:
    """An agent in a notebook: talk to it, see what it thinks, remembers and sends to the model.

    It is a client of the server at `url` and works with any; show it as the last line of a cell. agent: who to talk to
    (None: the one that was active last). compact: the conversation alone. static: keep a plain copy of the conversation
    in the notebook, for reading it without a kernel. A panel replaces an earlier one of the same `name` (by default the
    agent's). Everything but the widgets lives on a loop of its own daemon thread, which alone changes what is shown: so
    the panel goes on while a cell is busy. Callbacks of widgets come on any thread, and only hand over.
    Raises UsageError where ipywidgets is missing.
    """

    def __init__(
        self,
        url: str = f"ws://localhost:{DEFAULT_PORT}",
        agent: str | None = None,
        compact: bool = False,
        static: bool = True,
        token: str | None = None,
        name: str | None = None,
        *,
        widgets: Any = None,
    ) -> None:
        self.widgets = widgets if widgets is not None else import_ipywidgets()
        self.name = name or agent or "main"
        self.agent_name: str | None = None
        "The agent that is shown."
        self.commands: list[str] = []
        "What the server can do."
        self.transcript = Transcript("")
        self.loop = asyncio.new_event_loop()
        self._wanted = agent
        self._compact = compact
        self._client = Client(url, token, reconnect=True, on_state=self._heard, on_frame=self._framed)
        self._about: Frame = {}
        self._online = False
        self._trouble = "connecting"
        self._lost_at = ""
        self._turn_since = 0.0
        self._shown_seq = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._follower: asyncio.Task[None] | None = None
        self._flush_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._opening: asyncio.Lock | None = None
        self._ready = threading.Event()
        self._mark = f"memws-static-{secrets.token_hex(6)}" if static else ""
        self._copies: list[Any] = []
        self._copied_at = float("-inf")
        self._build()
        self._thread = threading.Thread(target=self._run, name=f"memws-panel-{self.name}", daemon=True)
        former = live_panels().pop((__name__, self.name), None)
        if former is not None:
            former.close()
        live_panels()[__name__, self.name] = self
        self._thread.start()

    def __repr__(self) -> str:
        return f"<memws.Panel {self.name!r} of {self._client.url}>"

    # -- for the cell --

    def _ipython_display_(self, **options: Any) -> None:
        """Show the widgets and, hidden by them, the static copy; called by the notebook."""
        display = import_display()
        self._ready.wait(3.0)  # so that the copy that is saved has the history
        view = {"version_major": 2, "version_minor": 0, "model_id": self.ui.model_id}
        plain = "memws panel (needs a running kernel)"
        display.display({"application/vnd.jupyter.widget-view+json": view, "text/plain": plain}, raw=True)
        if self._mark:
            self._copies.append(display.display(display.HTML(self.static_html()), display_id=secrets.token_hex(8)))

    def send(self, text: str) -> None:
        """Say something to the agent, as if it had been typed; returns at once."""
        self.from_user(self._say, text)

    def wait(self, seconds: float = 10.0) -> None:
        """Wait until all that was said so far is shown and in the static copy, as at the end of a notebook that runs
        without a browser. Raises TimeoutError."""
        done = asyncio.run_coroutine_threadsafe(self._catch_up(), self.loop)
        try:
            done.result(seconds)
        finally:
            done.cancel()

    def close(self) -> None:
        """Close connection, thread and widgets; the static copy stays."""
        if live_panels().get((__name__, self.name)) is self:
            del live_panels()[__name__, self.name]
        with contextlib.suppress(RuntimeError):  # closed already
            self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(3.0)
        for widget in (self.ui, self._field, self._area, self._right, *(tab.box for tab in self._tabs.values())):
            close_widget(widget)

    def static_html(self) -> str:
        """The conversation as HTML that needs no kernel, no style sheet and no script."""
        parts, size = [], 0
        for item in reversed(self.transcript.turns(STATIC_TURNS)):
            part = item.html()
            size += len(part)
            if size > FOLDED_SIZE:
                parts.append("<p>…</p>")
                break
            parts.append(part)
        told = f"memws · {escaped(self.agent_name or 'no agent')} · the conversation as it was saved"
        body = "".join(reversed(parts)) or "<p>Nothing was said yet.</p>"
        return f'<div class="memws-static {self._mark}">{PANEL_STYLE}<p><b>{told}</b></p>{body}</div>'

    # -- threads --

    def from_user(self, handler: Callable[..., Any], *arguments: Any) -> None:
        """Call a handler on the panel's loop, unless it was the panel itself that changed the widget."""
        if threading.current_thread() is not self._thread:
            with contextlib.suppress(RuntimeError):  # the panel was closed
                self.loop.call_soon_threadsafe(handler, *arguments)

    def on_click(self, button: Any, handler: Callable[[], Any]) -> None:
        """Let a button call a handler on the panel's loop."""
        button.on_click(lambda _: self.from_user(handler))

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task whose failure is shown in the panel."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, MemwsError):
            self._tell(str(error))
        elif error is not None:
            logger.error("panel: %r", error, exc_info=error)
            self._tell(f"this failed: {error!r}")

    def _run(self) -> None:
        """The panel's thread."""
        asyncio.set_event_loop(self.loop)
        self._opening = asyncio.Lock()
        try:
            self._tick()
            self.spawn(self._connect())
            self.loop.run_forever()
            for task in self._tasks:
                task.cancel()
            self.loop.run_until_complete(asyncio.gather(*self._tasks, return_exceptions=True))
            self.loop.run_until_complete(self._client.close())
        finally:
            self.loop.close()

    # -- widgets --

    def _build(self) -> None:
        w = self.widgets
        self._status = classed(w.HTML(), "memws-status")
        self._model = classed(w.HTML(), "memws-model")
        self._agents = w.Dropdown(description="agent", layout={"width": "240px"}, style={"description_width": "45px"})
        self._new, self._reload = w.Button(description="new…"), w.Button(description="reload")
        self._bar = classed(w.HTML(), "memws-context")
        self._log = Log(w)
        self._field = classed(w.Text(placeholder="Message"), "memws-field")
        self._area = classed(w.Textarea(placeholder="Message"), "memws-field")
        self._send = w.Button(description="Send", button_style="primary")
        self._stop = w.Button(description="Stop", disabled=True)
        self._said = w.HTML()
        boxes = {"monologue": True, "tools": True, "multi-line": False}
        toggles = [w.Checkbox(value=value, description=name, indent=False) for name, value in boxes.items()]
        self._form = AgentForm(self)
        self._row = classed(w.HBox([self._field, self._send, self._stop]), "memws-row")
        below = classed(w.HBox(toggles), "memws-row")
        left = classed(w.VBox([self._log.box, self._row, below, self._said]), "memws-left")
        kinds: tuple[Any, ...] = () if self._compact else (MemoryTab, ContextTab, SearchTab, FramesTab)
        self._tabs = {kind.title: kind(self) for kind in kinds}
        self._tab = w.Tab()
        self._right = classed(w.VBox([self._tab]), "memws-right")
        columns = classed(w.HBox([left, *([self._right] if self._tabs else [])]), "memws-columns")
        show(self._right, False)
        style = PANEL_STYLE + (f"<style>.{self._mark} {{ display: none; }}</style>" if self._mark else "")
        top = classed(w.HBox([self._status, self._model, self._agents, self._new, self._reload]), "memws-top")
        self.ui = classed(w.VBox([w.HTML(style), top, self._form.box, self._bar, columns]), "memws-panel")
        self._connect_widgets(toggles)

    def _connect_widgets(self, toggles: list[Any]) -> None:
        Entry(self, [self._field, self._area], self._send, self._say)
        self.on_click(self._stop, lambda: self.spawn(self._cancel()))
        self.on_click(self._new, lambda: self._form.open(models=self._about.get("models", ())))
        self.on_click(self._reload, lambda: self.spawn(self._reload_all()))
        self._agents.observe(lambda change: self.from_user(self._chosen, change["new"]), "value")
        self._tab.observe(lambda change: self.from_user(self._looked), "selected_index")
        handlers = (self._hide("monologue"), self._hide("tool"), self._many_lines)
        for toggle, handler in zip(toggles, handlers, strict=True):
            toggle.observe(lambda change, handler=handler: self.from_user(handler, change["new"]), "value")

    def _hide(self, kind: str) -> Callable[[bool], None]:
        def hide(shown: bool) -> None:
            (self._log.box.remove_class if shown else self._log.box.add_class)(f"memws-hide-{kind}")

        return hide

    def _many_lines(self, many: bool) -> None:
        former, field = (self._field, self._area) if many else (self._area, self._field)
        field.value = former.value
        self._row.children = (field, self._send, self._stop)

    def _looked(self) -> None:
        shown = list(self._tabs.values())[self._tab.selected_index or 0] if self._tabs else None
        for tab in self._tabs.values():
            if isinstance(tab, FramesTab):
                tab.selected(tab is shown)
        if isinstance(shown, ContextTab):
            shown.selected()

    def _tell(self, text: str) -> None:
        """Show a sentence below the field; the next one replaces it."""
        self._said.value = f'<div class="memws-note memws-bad">{escaped(text)}</div>' if text else ""

    # -- the connection --

    async def _connect(self) -> None:
        """Find the server, however long that takes, and greet it."""
        delay = RECONNECT_DELAY
        while True:
            try:
                await self._client.connect()
                break
            except ConnectFailed as failure:
                self._go_offline(str(failure))
                self._ready.set()
                if failure.status in (401, 403):
                    return
            await asyncio.sleep(delay)
            delay = min(2 * delay, RECONNECT_DELAY_MAX)
        await self._greet()

    async def _greet(self) -> None:
        """Learn what the server can do, and open the agent; after a reconnect the client follows it again by itself."""
        self._online = True
        self._show_state()
        try:
            self._about = await self._client.hello(["*"])
            self.commands = self._about.get("commands", [])
            self._show_tabs()
            if self.agent_name in [agent["agent_name"] for agent in await self._list_agents()]:
                await self.refresh_memory()
            else:
                await self._open_first()
        except ConnectionLost:
            pass  # greeted again when it is back
        finally:
            self._show_state()
            self._ready.set()

    async def _open_first(self) -> None:
        """The agent that was asked for, or was shown before the connection broke; else the one active last."""
        agents = await self._list_agents()
        names = [agent["agent_name"] for agent in agents]
        wanted = self.agent_name or self._wanted
        if wanted is None and agents:
            wanted = max(agents, key=lambda agent: agent.get("last_active") or "")["agent_name"]
        if wanted in names and wanted is not None:
            await self.open_agent(wanted)
        else:
            self._show_no_agent(f"There is no agent {wanted!r} yet." if wanted else "There is no agent yet.")
            self._form.open(wanted or "sam", self._about.get("models", ()))

    def _heard(self, state: str) -> None:
        """The client tells of its connection."""
        if state == "lost":
            self._lost_at = time.strftime("%H:%M:%S")
            self._go_offline("the server does not answer; trying again")
        elif state == "failed":
            self._go_offline("the server refuses this panel; run the cell again")
        else:
            lost, back = self._lost_at, time.strftime("%H:%M:%S")
            self.transcript.note(f"connection lost at {lost}, back at {back}", "memws-warn")
            self._changed()
            self.spawn(self._greet())

    def _go_offline(self, trouble: str) -> None:
        self._online, self._trouble = False, trouble
        self._show_state()

    def _framed(self, direction: str, text: str) -> None:
        if frames := self._tabs.get(FramesTab.title):
            frames.record(direction, text)

    async def command(self, command: str, **arguments: Any) -> Frame:
        """Send a command; for the agent that is shown, where the command is one agent's."""
        if command not in ("create_agent", "list_agents", "hello"):
            arguments["agent_name"] = self.agent_name
        return await self._client.command(command, **arguments)

    # -- the agent --

    async def _list_agents(self) -> list[Frame]:
        """Offer the agents there are."""
        agents: list[Frame] = []
        while True:
            after = {"after": agents[-1]["agent_name"]} if agents else {}
            page = await self._client.command("list_agents", **after)
            agents += page["agents"]
            if not page["agents"] or len(agents) >= page["total"]:
                break
        names = [agent["agent_name"] for agent in agents]
        if list(self._agents.options) != names:
            self._agents.options = names
            self._agents.value = self.agent_name if self.agent_name in names else None
        return agents

    async def _reload_all(self) -> None:
        await self._list_agents()
        if self.agent_name:
            await self.open_agent(self.agent_name)

    def _chosen(self, name: str | None) -> None:
        if name and name != self.agent_name:
            self.spawn(self.open_agent(name))

    async def open_agent(self, name: str, warnings: Iterable[str] = ()) -> None:
        """Show an agent: its recent history, then what happens."""
        assert self._opening is not None
        async with self._opening:
            if self._follower is not None:
                self._follower.cancel()
                await asyncio.wait([self._follower])
                with contextlib.suppress(MemwsError):
                    await self._client.unsubscribe(self.agent_name)
            loaded = await self._client.load_agent(name)
            self.agent_name = loaded["agent_name"]
            self.transcript = Transcript(loaded["agent_name"])
            self._log.clear(f'<div class="memws-empty">Say hello to <b>{escaped(self.agent_name)}</b>.</div>')
            for tab in self._tabs.values():
                tab.clear()
            last_seq = loaded["last_seq"]
            subscription = self._client.subscribe(self.agent_name, max(0, last_seq - HISTORY))
            caught_up = asyncio.Event()
            self._follower = self.spawn(self._follow(subscription, last_seq, caught_up))
            if self.agent_name not in self._agents.options:
                await self._list_agents()
            self._agents.value = self.agent_name
            for warning in (*warnings, *loaded.get("repaired", ()), *loaded.get("warnings", ())):
                self.transcript.note(warning, "memws-warn")
            await self._show_context()
            await self.refresh_memory()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(caught_up.wait(), 3.0)
            self._flush()
            self._show_state()

    async def _follow(self, subscription: Subscription, last_seq: int, caught_up: asyncio.Event) -> None:
        """Show an agent's events as they come."""
        try:
            if last_seq == 0:
                caught_up.set()
            async for event in subscription:
                try:
                    self._take(event)
                except Exception:  # one event of a later server must not end the view of all others
                    logger.exception("panel: event not shown: %.200r", event)
                if event.get("seq", 0) >= last_seq:
                    caught_up.set()
        except RemoteError as error:
            self._show_no_agent(str(error))
        finally:
            caught_up.set()

    def _take(self, event: Frame) -> None:
        self._shown_seq = event.get("seq", self._shown_seq)
        kind = event.get("message_type") or event["type"]
        was = self.transcript.running
        self.transcript.take(event)
        if self.transcript.running != was:
            self._turn_since = self.loop.time()
            self._show_state()
        if kind == "context":
            self._bar.value = bar_html(event["sections"], event["used"], event["window"], event.get("warning", ""))
        elif kind == "memory_change" or (kind == "agent_response_end" and self._tabs):
            self._soon("memory", MEMORY_INTERVAL, self.refresh_memory)
        elif kind == "agent_change":
            self.spawn(self._agent_changed(event))
        if kind in ("agent_response_end", "agent_response_error"):
            self._flush()
            self._soon("copies", self._copied_at + COPY_INTERVAL - self.loop.time(), self._update_copies)
        else:
            self._changed()

    async def _agent_changed(self, event: Frame) -> None:
        """Somebody renamed, deleted or updated the agent."""
        if event.get("change") == "renamed":
            self.agent_name = self.transcript.agent_name = event["new_name"]
        elif event.get("change") == "deleted":
            self._show_no_agent("The agent was deleted.")
        await self._list_agents()

    def _show_no_agent(self, text: str) -> None:
        self.agent_name = None
        self.transcript = Transcript("")
        self._log.clear(f'<div class="memws-empty">{escaped(text)} Create one, or choose one above.</div>')
        self._bar.value = ""
        for tab in self._tabs.values():
            tab.clear()
        self._show_state()

    async def _catch_up(self) -> None:
        """Wait for the events that the server has stored by now, and for the end of a running turn."""
        while True:
            with contextlib.suppress(ConnectionLost):
                last = {agent["agent_name"]: agent["last_seq"] for agent in await self._list_agents()}
                if self._shown_seq >= last.get(self.agent_name, 0) and self.transcript.running is None:
                    break
            await asyncio.sleep(FLUSH_INTERVAL)
        self._flush()
        await self._update_copies()

    async def _show_context(self) -> None:
        if "get_context" in self.commands:
            context = await self.command("get_context")
            self._bar.value = bar_html(context["sections"], context["used"], context["window"])

    def _soon(self, name: str, seconds: float, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do what takes longer than a turn may, once for all turns of the next seconds."""

        async def later() -> None:
            await asyncio.sleep(seconds)
            with contextlib.suppress(ConnectionLost):
                await work()

        if not any(task.get_name() == name for task in self._tasks):
            self.spawn(later()).set_name(name)

    async def refresh_memory(self) -> None:
        """Show core memory as it is now, and whether a turn runs that began before this panel."""
        if self.agent_name is None or "get_agent" not in self.commands:
            return
        agent = await self.command("get_agent")
        if tab := self._tabs.get(MemoryTab.title):
            tab.take(agent)
        if agent.get("turn") and self.transcript.running is None:
            self.transcript.running, self.transcript.step = agent["turn"]["turn_id"], agent["turn"]["step"]
            self._turn_since = self.loop.time()

    # -- talking --

    def _say(self, text: str) -> None:
        """Send what the user wrote."""
        if self.agent_name is None:
            self._tell("no agent yet: choose or create one")
            return
        self._tell("")
        try:
            turn = self._client.send(text, self.agent_name)
        except MemwsError as error:
            self._tell(str(error))
            return
        self.transcript.send(turn.turn_id, text)
        self._changed()
        self.spawn(self._await_turn(turn, self.transcript))

    async def _await_turn(self, turn: ClientTurn, transcript: Transcript) -> None:
        """The subscription shows the turn; only a refusal comes here alone."""
        try:
            async for event in turn:
                if event["type"] in ("agent_response_error", "server_error") and event.get("seq") is None:
                    transcript.refuse(turn.turn_id, str(event["message"]))
                elif event.get("message_type") == "queue":
                    transcript.take(event)
        except MemwsError as error:
            transcript.refuse(turn.turn_id, str(error))
        self._changed()

    async def _cancel(self) -> None:
        await self.command("cancel")

    # -- what is shown --

    def _changed(self) -> None:
        """The transcript has changed: show that soon."""
        if self._flush_timer is None:
            self._flush_timer = self.loop.call_later(FLUSH_INTERVAL, self._flush)

    def _flush(self) -> None:
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        changed, self.transcript.changed = self.transcript.changed, {}
        self._log.update(changed)

    async def _update_copies(self) -> None:
        if self._copies:
            self._copied_at = self.loop.time()
            copy = import_display().HTML(self.static_html())
            for handle in self._copies:
                handle.update(copy)

    def _show_tabs(self) -> None:
        """Tabs whose command the server has."""
        for title, tab in list(self._tabs.items()):
            if tab.needs and tab.needs not in self.commands:
                close_widget(self._tabs.pop(title).box)
        boxes = tuple(classed(tab.box, "memws-side") for tab in self._tabs.values())
        if self._tab.children != boxes:
            self._tab.children = boxes
            for index, title in enumerate(self._tabs):
                self._tab.set_title(index, title)
            self._tab.selected_index = 0 if boxes else None

    def _show_state(self) -> None:
        """Status, buttons, field: only what has changed is sent, for any change redraws a field being typed into."""
        running = self.transcript.running is not None and self._online
        self._stop.disabled = not running
        usable = self._online and self.agent_name is not None
        self._send.disabled = not usable
        show(self._right, self.agent_name is not None and bool(self._tabs))
        (self._log.box.remove_class if self.agent_name else self._log.box.add_class)("memws-short")
        self._field.disabled = self._area.disabled = not usable
        about = self._about
        if about.get("offline"):
            self._model.value = '<span class="memws-warn">rule-based offline stand-in, not a language model</span>'
        elif about:
            self._model.value = f'<span class="memws-label">model {escaped(about.get("model", "?"))}</span>'
        self._tick()

    def _tick(self) -> None:
        """The status line with its clock, which tells a dead panel from a living one."""
        if self._tick_timer is not None:
            self._tick_timer.cancel()
        state = "connected" if self._online else "offline"
        dot = f'<span class="memws-dot{" memws-on" if self._online else ""}"></span>'
        told = [f"{dot}<b>{state}</b>", escaped(self._client.url), time.strftime("%H:%M:%S")]
        running = self._online and self.transcript.running is not None
        if not self._online:
            told.append(escaped(self._trouble))
        elif running:
            seconds = self.loop.time() - self._turn_since
            doing = escaped(self.transcript.doing or "thinking")
            told.append(f"<b>step {self.transcript.step}, {doing}, {seconds:.0f} s</b>")
        self._status.value = " · ".join(told)
        self._tick_timer = self.loop.call_later(1.0 if running else 10.0, self._tick)


def live_panels() -> dict[tuple[str, str], Any]:
    """The panels of this process: they outlive a re-run cell and a reloaded module."""
    panels: dict[tuple[str, str], Any] = process_wide("panels", {})
    return panels


# ======================================================================================================================
# 11. Server: agents by name, one session per connection, the gate
# ======================================================================================================================


def _option(default: T, meaning: str) -> T:
    """A field of Options: its default, and what its flag's help says."""
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Options:
    """What a server can be told; the command line's flags are these fields. Raises UsageError for what cannot be."""

    host: str = _option(DEFAULT_HOST, "address to listen on; anything but loopback needs a token")
    port: int = _option(DEFAULT_PORT, "port to listen on; 0 picks a free one")
    db: str = _option(DEFAULT_DB, "SQLite file with the agents; :memory: keeps nothing")
    model: str | None = _option(
        None, "model of agents that name none; offline: the embedded stand-in, no language model"
    )
    base_url: str | None = _option(None, "OpenAI-compatible endpoint, like http://localhost:11434/v1 for Ollama")
    api_key: str | None = _option(
        None, "the endpoint's key: only from Python, or as OPENAI_API_KEY; no flag, as others can read those"
    )
    embedding_model: str | None = _option(
        None, "model of the endpoint that gives vectors for search, in addition to its words; needs numpy"
    )
    context_window: int | None = _option(None, "tokens of the context window, where the model's name does not tell")
    max_steps: int = _option(MAX_STEPS, "steps of one turn at most")
    token: str | None = _option(None, "secret that clients have to show")
    allow_origin: tuple[str, ...] = _option(
        (), "web origin whose pages may connect, like https://lab.example (repeatable)"
    )
    allow_host: tuple[str, ...] = _option((), "further host name under which clients reach the server (repeatable)")
    rate_limit: int = _option(
        RATE_LIMIT, f"requests a second on one connection, in bursts of up to {RATE_BURST}; 0: no limit"
    )
    max_connections: int = _option(MAX_CONNECTIONS, "connections at once")
    sync: str = _option("full", "full: what is acknowledged survives a power cut; normal: a killed process")
    idle_timeout: float = _option(IDLE_TIMEOUT, "seconds of silence inside a model's answer before the call has failed")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("port", 0, 65_535),
            ("rate_limit", 0, 10**9),
            ("max_connections", 1, 10**6),
            ("max_steps", 1, 1_000),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"{name}: expected an integer from {least} to {most}, but got {quote(value)}")
        if self.embedding_model is not None and not 0 < len(self.embedding_model) <= MAX_MODEL_NAME:
            raise UsageError(f"embedding_model: expected a model's name, but got {quote(self.embedding_model)}")
        if self.context_window is not None:
            if type(self.context_window) is not int:
                raise UsageError(f"context_window: expected a number of tokens, but got {quote(self.context_window)}")
            try:  # a window that no agent fits into is told at the start
                specs = ",".join(tool.spec for tool in MEMORY_TOOLS.values())
                check_window(self.context_window, SYSTEM_PROMPT, specs, [Block("persona", ""), Block("human", "")])
            except Refused as error:
                raise UsageError(str(error)) from None
        if not isinstance(self.idle_timeout, (int, float)) or not 0 < self.idle_timeout < 86_400:
            raise UsageError(f"idle_timeout: expected seconds, more than 0, but got {quote(self.idle_timeout)}")
        if self.sync not in ("full", "normal"):
            raise UsageError(f"sync: expected full or normal, but got {quote(self.sync)}")
        for name in ("allow_origin", "allow_host"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]{1,512}", self.token):
            raise UsageError("token: expected 1 to 512 printable characters without spaces")
        if not is_loopback(self.host) and self.token is None:
            raise UsageError(
                f"listening on {self.host!r} lets other machines in: set --token SECRET, or use --host localhost"
            )

    def limits(self) -> JSON:
        """The limits as `hello` tells them, in characters, bytes, seconds and counts."""
        return {
            "max_frame": MAX_FRAME, "max_text": MAX_TEXT, "max_depth": MAX_DEPTH, "max_name": MAX_NAME,
            "max_id": MAX_ID, "max_query": MAX_QUERY, "text_part": TEXT_PART, "block_limit": BLOCK_LIMIT,
            "max_block_limit": MAX_BLOCK_LIMIT, "max_waiting_session": MAX_WAITING_SESSION,
            "max_waiting_agent": MAX_WAITING_AGENT, "rate_limit": self.rate_limit, "rate_burst": RATE_BURST,
            "max_connections": self.max_connections, "max_outgoing": MAX_OUTGOING, "max_steps": self.max_steps,
            "name_pattern": _NAME.pattern,
        }  # fmt: skip


# ---- the gate --------------------------------------------------------------------------------------------------------

_LOOPBACK_NAMES: Final = frozenset(("localhost", "127.0.0.1", "[::1]"))
_HOST = re.compile(r"(\[[0-9a-fA-F:.]{2,45}\]|[^\s:/?#@\[\]\\]{1,255})(?::(\d{1,5}))?")
_ORIGIN = re.compile(r"(https?)://(.{1,300})", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach a server bound to `host`."""
    return host.lower() == "localhost" or (_is_address(host) and ipaddress.ip_address(host.strip("[]")).is_loopback)


def _is_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    return False


def bracketed(host: str) -> str:
    """A host as a URL has it: IPv6 addresses in brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


class Gate:
    """Who may open a connection: decided before the upgrade, by exact comparison, without a parser that can raise.

    A web page in some browser can reach a loopback port: Origin tells which page (cross-site WebSocket hijacking), Host
    which name it believes to talk to (DNS rebinding).
    """

    def __init__(self, options: Options) -> None:
        self._token = options.token.encode() if options.token is not None else None
        self._origins = frozenset(origin.strip().rstrip("/").lower() for origin in options.allow_origin)
        origin_hosts = (origin.partition("://")[2] or origin for origin in self._origins)
        names = (options.host, *options.allow_host, *origin_hosts)
        self._hosts = _LOOPBACK_NAMES.union(filter(None, (self._host_of(bracketed(name.strip())) for name in names)))

    def refuse(self, request: HandshakeRequest) -> tuple[int, str] | None:
        """(HTTP status, reason) for a request that may not pass; a health check passes with the Host check alone."""
        hosts = request.headers.get_all("Host")
        if len(hosts) != 1:
            return 400, "expected exactly one Host header"
        if not self._may_host(hosts[0]):
            return 403, "this Host is not served here; add it with --allow-host"
        if request.method != "GET":
            return 405, "only GET is served here"
        if is_health_check(request):
            return None
        origins = request.headers.get_all("Origin")
        if len(origins) > 1 or (origins and not self._may_origin(origins[0])):
            return 403, "pages of this Origin may not connect; allow them with --allow-origin"
        if self._token is not None and not self._has_token(request):
            return 401, "a token is needed: send it as Authorization: Bearer, as subprotocol memws, or as ?token="
        return None

    def _host_of(self, value: str) -> str | None:
        """The host of `host` or `host:port`, in lower case; None for what is neither."""
        found = _HOST.fullmatch(value)
        if found is None or (found.group(2) and int(found.group(2)) > 65_535):
            return None
        return found.group(1).lower()

    def _may_host(self, value: str) -> bool:
        host = self._host_of(value)
        return host is not None and (host in self._hosts or (self._token is not None and _is_address(host)))

    def _may_origin(self, value: str) -> bool:
        if value.lower() in self._origins:
            return True
        found = _ORIGIN.fullmatch(value)
        return found is not None and self._may_host(found.group(2))

    def _has_token(self, request: HandshakeRequest) -> bool:
        headers = request.headers
        shown = [value[7:].strip() for value in headers.get_all("Authorization") if value[:7].lower() == "bearer "]
        names = [name.strip() for name in ",".join(headers.get_all("Sec-WebSocket-Protocol")).split(",")]
        shown += names[1:] if names[0] == "memws" else []
        for pair in request.path.partition("?")[2].split("&"):
            name, _, value = pair.partition("=")
            shown += [urllib.parse.unquote(value)] if name == "token" else []
        assert self._token is not None
        equal = [hmac.compare_digest(value.encode("utf-8", "replace"), self._token) for value in shown]
        return any(equal)


def is_health_check(request: HandshakeRequest) -> bool:
    return request.path.partition("?")[0] == "/healthz"


# ---- who gets what ---------------------------------------------------------------------------------------------------


class Follower:
    """One session's place in an agent's events: all of them, or those of one turn.

    It is live, or it catches up: reads stored events behind its cursor as fast as its reader takes them, and goes live
    when nothing is left and nothing was published meanwhile.
    """

    def __init__(
        self,
        session: Session,
        host: AgentHost,
        cursor: int,
        *,
        turn_id: str | None = None,
        request_id: RequestId = None,
    ) -> None:
        self.session = session
        self.host = host
        self.cursor = cursor
        self.turn_id = turn_id
        self.request_id = request_id
        self.live = True

    def deliver(self, event: Event, text: str) -> None:
        """Send a published event, unless it was sent before or a replay will come to it."""
        if not self.live or (event.seq is not None and event.seq <= self.cursor):
            return
        if not self.session.wants(event.message_type):
            self.cursor = self.cursor if event.seq is None else event.seq
        elif self.session.lags:  # from here on the reader sets the pace; what is only live is left out
            self.live = False
            self.session.replay(self, lagging=True)
        else:
            self.cursor = self.cursor if event.seq is None else event.seq
            self.session.send(self.host.marked(text, event.type, event.turn_id, self))

    async def catch_up(self, *, once: bool = False, lagging: bool = False, up_to: int = 2**62) -> None:
        """Replay what is stored behind the cursor, then go live; `once`: up to that seq, and end there.

        A reader that only lags, and was not promised a replay, is closed when it takes nothing while too much waits.
        """
        self.live = False
        host = self.host
        reader = self if lagging else None
        while True:
            await self.session.drained(reader)  # here too: a page that waits is held by none
            published = host.published
            rows = await host.hub.store.events(host.agent.id, self.cursor, _REPLAY_ROWS, self.turn_id, up_to)
            if not rows and (once or published == host.published):
                self.live = not once
                return
            rows.reverse()
            while rows:  # each is let go of before the next one waits
                await self._tell(*rows.pop(), reader)

    async def _tell(self, seq: int, text: str, reader: Follower | None) -> None:
        """Send a stored event as soon as the reader has taken what came before it."""
        agent = self.host.agent
        if LOST in _read_object(text):
            logger.error("agent %s: event %d is damaged; run memws.py check", agent.name, seq)
            text = damaged_event(seq)
        kind, message_type = event_kind(text)
        if self.session.wants(message_type):
            await self.session.drained(reader)
            turn_id = None if kind == "agent_response" else decode_json(text)["turn_id"]
            frame = extend_json(text, agent_name=agent.name)
            self.session.send(self.host.marked(frame, kind, turn_id, self))
        self.cursor = seq

    async def backlog(self) -> int:
        """Characters of stored events that wait for this follower."""
        return await self.host.hub.store.backlog(self.host.agent.id, self.cursor, self.turn_id)


_REPLAY_ROWS: Final = 100
"Stored events that a replay reads at once."


class Embedding:
    """Gives an agent's memory its vectors, in the background: what is new after a turn, all of it for another model."""

    def __init__(self, host: AgentHost) -> None:
        self._host = host
        self._task: asyncio.Task[None] | None = None
        self._embedder: Embedder | None = None
        self._wanted = False
        self._done: tuple[Embedder, int | None, tuple[int, int]] | None = None
        "The embedder, its dimension, and the last message and passage that have vectors of it."

    def want(self) -> None:
        """Look for what has no vector yet."""
        self._wanted = True
        embedder = self._host.agent.embedder
        if embedder is not self._embedder:
            self.stop()
            self._embedder = embedder
        if self._task is None and embedder is not None and not self._host.hub.stopping:
            self._task = self._host.hub.spawn(self._run(embedder))

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self, embedder: Embedder) -> None:
        try:
            while self._wanted:
                self._wanted = False
                await self._embed_all(embedder)
        except Exception as error:  # a fault of ours ends this run, not the next
            known = isinstance(error, MemwsError)
            logger.error("agent %s: embedding: %s", self._host.agent.name, error, exc_info=not known)
        finally:
            if self._embedder is embedder:
                self._task = None

    async def _embed_all(self, embedder: Embedder) -> None:
        """One pass over what has no vector; another is wanted where the dimension turned out to be another."""
        agent, dimension = self._host.agent, embedder.dimension
        known = self._done is not None and self._done[:2] == (embedder, dimension)
        after = self._done[2] if self._done is not None and known else (0, 0)
        up_to = agent.last_message, agent.last_passage
        numbers = await agent.store.without_vector(agent.id, embedder.name, dimension, after)
        told = 0.0
        for start in range(0, len(numbers), EMBEDDING_BATCH):
            rows = await agent.store.texts_to_embed(numbers[start : start + EMBEDDING_BATCH])
            vectors = await embedder.vectors([text for _, text in rows]) if rows else []
            if vectors is None:  # begin again, with what there is by then
                self._wanted = True
                await asyncio.sleep(embedder.pause)
                return
            if len(numbers) >= EMBEDDING_TOLD and time.monotonic() > told + EMBEDDING_INTERVAL:
                told = time.monotonic()
                await self._tell(embedder, start, len(numbers))
            kept = [(*row, vector) for row, vector in zip(rows, vectors, strict=True)]
            await agent.store.keep_vectors(embedder.name, kept)
        if len(numbers) >= EMBEDDING_TOLD:
            await self._tell(embedder, len(numbers), len(numbers))
        self._done = embedder, dimension, up_to
        self._wanted |= embedder.dimension != dimension

    async def _tell(self, embedder: Embedder, done: int, total: int) -> None:
        text = f"{done:,} of {total:,} texts of the memory are embedded by {embedder.name}"
        await self._host.edit(self._host.agent.tell(text, change="embedding", done=done, total=total))


class QueuedTurn:
    """A turn that waits or runs, and whom it answers."""

    def __init__(self, turn: Turn, sender: Session | None = None) -> None:
        self.turn = turn
        self.sender = sender
        "Whose queue it counts against."
        self.followers: dict[Session, Follower] = {}
        self.done: asyncio.Future[None] | None = None
        "For a caller in Python: the turn has ended, or was refused."
        self.told: list[str] = []
        "For the same: the stored events as frames."


class AgentHost:
    """One agent in use: its turns one after another, its followers, its timed heartbeats."""

    def __init__(self, hub: Hub, agent: Agent) -> None:
        self.hub = hub
        self.agent = agent
        self.published = agent.last_seq
        "The last seq that followers have been told."
        self.subscribers: dict[Session, Follower] = {}
        self.waiting: collections.deque[QueuedTurn] = collections.deque()
        self.current: QueuedTurn | None = None
        self.gone = False
        "Deleted: nobody's current agent any more."
        self.stale = False
        "A transaction failed: memory and disk may differ, the agent is opened anew before its next turn."
        self.compacting = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._idle_heartbeats = 0
        self._delta: tuple[Event, QueuedTurn | None] | None = None
        self._delta_timer: asyncio.TimerHandle | None = None
        self._delta_sent = 0.0
        self._embedding = Embedding(self)
        self._embedding.want()
        self.arm_heartbeat()

    @property
    def busy(self) -> bool:
        return self.current is not None or bool(self.waiting) or self.compacting

    @property
    def state(self) -> str:
        return "running" if self.current or self.compacting else "waiting" if self.waiting else "idle"

    # -- turns --

    def find(self, turn_id: str) -> QueuedTurn | None:
        """The turn of that id, where it waits or runs."""
        queued = [self.current] if self.current else []
        return next((item for item in (*queued, *self.waiting) if item.turn.turn_id == turn_id), None)

    def enqueue(self, item: QueuedTurn, *, first: bool = False) -> None:
        """Let a turn wait for its time, which may be now."""
        if first:
            self.waiting.appendleft(item)
        else:
            self.waiting.append(item)
        if item.sender is not None:
            item.sender.waiting += 1
        if self._timer is not None:
            self._timer.cancel()
        self.kick()

    def kick(self) -> None:
        """Begin with what waits, unless something runs."""
        if self.current is None and self.waiting and not (self.compacting or self.hub.stopping):
            self.current = self._next()
            self._task = self.hub.spawn(self._run())

    async def _run(self) -> None:
        """Run turns until none waits."""
        try:
            while self.current is not None:
                await self._run_turn(self.current)
                self._embedding.want()
                self.current = self._next() if self.waiting and not self.hub.stopping else None
        finally:
            self.current = self._task = None
            self.arm_heartbeat()

    def _next(self) -> QueuedTurn:
        item = self.waiting.popleft()
        if item.sender is not None:
            item.sender.waiting -= 1
        return item

    async def _run_turn(self, item: QueuedTurn) -> None:
        """One turn, each event published as it comes. What fails before the start is a refusal to the sender."""
        try:
            await self.freshen()
            async with contextlib.aclosing(self.agent.turn(item.turn)) as events:
                async for event in events:
                    if event.terminal and (
                        event.seq is None or event.fields.get("code") in ("store_failed", "internal")
                    ):
                        self.stale = True
                    self.publish(event, item)
                    if item.done is not None and not event.live:
                        item.told.append(event.frame(self.agent.name))
            if item.done is not None:
                item.done.set_result(None)
        except MemwsError as error:
            self.stale = not self.gone
            self.refuse(item, self.deleted() if self.gone else error)

    def deleted(self) -> Refused:
        """What a message to an agent that is being deleted gets."""
        return Refused("unknown_agent", f"agent {self.agent.name!r} was deleted")

    async def freshen(self) -> None:
        """Open the agent anew after a failed transaction."""
        if self.stale:
            await self.hub.reopen(self)
            self.stale = False

    def refuse(self, item: QueuedTurn, error: MemwsError) -> None:
        """Tell everybody who waits for a turn that it will not be."""
        for session, follower in item.followers.items():
            session.own.pop((self.agent.id, item.turn.turn_id), None)
            session.send(refusal(follower.request_id, item.turn.turn_id, self.agent.name, error))
        if item.done is not None and not item.done.done():
            item.done.set_exception(error)

    def drop(self, item: QueuedTurn, error: MemwsError) -> None:
        """Take a waiting turn back."""
        self.waiting.remove(item)
        if item.sender is not None:
            item.sender.waiting -= 1
        self.refuse(item, error)

    async def stop_turns(self, reason: str, error: MemwsError) -> None:
        """Stop what runs, refuse what waits, and wait until the agent is idle."""
        for item in list(self.waiting):
            self.drop(item, error)
        if self.current is not None:
            self.current.turn.stop(reason)
        if self._task is not None:
            await asyncio.wait([self._task])

    # -- events --

    def publish(self, event: Event, item: QueuedTurn | None = None) -> None:
        """Send an event to its followers, after the deltas before it; deltas of DELTA_INTERVAL are merged."""
        if event.message_type != "delta":
            self._send_delta()
            self._send(event, item)
            return
        if self._delta is not None:
            merged, _ = self._delta
            alike = (merged.fields["of"], merged.step) == (event.fields["of"], event.step)
            if alike and len(merged.fields["message"]) + len(event.fields["message"]) <= TEXT_PART:
                merged.fields["message"] += event.fields["message"]
                return
            self._send_delta()
        if any(session.wants("delta") for session in (*self.subscribers, *(item.followers if item else ()))):
            self._delta = event, item
            wait = self._delta_sent + DELTA_INTERVAL - self.hub.loop.time()
            if wait <= 0:
                self._send_delta()
            else:
                self._delta_timer = self.hub.loop.call_later(wait, self._send_delta)

    def _send_delta(self) -> None:
        """Send the delta that was held back for more to come."""
        if self._delta is not None:
            (event, item), self._delta = self._delta, None
            if self._delta_timer is not None:
                self._delta_timer.cancel()
                self._delta_timer = None
            self._delta_sent = self.hub.loop.time()
            self._send(event, item)

    def _send(self, event: Event, item: QueuedTurn | None) -> None:
        """Send an event to subscribers and, where it belongs to a turn, to those the turn answers: once a session."""
        if event.seq is not None:
            self.published = event.seq
        text = event.frame(self.agent.name)
        unsaved = event.terminal and event.seq is None  # its stored twin will reach the subscribers at the reopening
        for session, follower in list(self.subscribers.items()):
            if not (unsaved and item and session not in item.followers):
                follower.deliver(event, text)
        for session, follower in list(item.followers.items()) if item else ():
            if session not in self.subscribers:
                follower.deliver(event, text)

    def marked(self, text: str, kind: str, turn_id: str | None, follower: Follower) -> str:
        """A start or terminal frame with the id that the session gave its message, if it is its sender."""
        if kind == "agent_response" or turn_id is None:
            return text
        own, key = follower.session.own, (self.agent.id, turn_id)
        request_id = follower.request_id
        if request_id is None and key in own:
            request_id = own[key].request_id
        if kind in TERMINAL_TYPES:
            own.pop(key, None)
        return text if request_id is None else extend_json(text, id=request_id)

    async def edit(self, events: AsyncGenerator[Event, None]) -> list[Event]:
        """Run an edit of the agent and publish its events."""
        told = []
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    self.publish(event)
                    told.append(event)
        except StoreFailed:
            if self.gone:
                raise self.deleted() from None
            self.stale = True
            raise
        self._embedding.want()
        return told

    # -- timed heartbeats --

    def arm_heartbeat(self) -> None:
        """Set the timer of the next timed heartbeat, where the agent has any."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        interval = self.agent.record.config["heartbeat_interval"]
        if interval and self._idle_heartbeats < IDLE_HEARTBEATS and not (self.gone or self.hub.stopping):
            paused = float(self.agent.record.state.get("paused_until", 0)) - time.time()
            self._timer = self.hub.loop.call_later(max(interval, paused), self._beat)

    def _beat(self) -> None:
        if not self.busy:
            self._idle_heartbeats += 1
            self.enqueue(QueuedTurn(Turn(new_turn_id(), None, reason=HEARTBEAT_TIMER)))

    def user_spoke(self) -> None:
        """A user's message ends the silence that timed heartbeats count."""
        self._idle_heartbeats = 0

    def close(self) -> None:
        self._embedding.stop()
        if self._timer is not None:
            self._timer.cancel()


def new_turn_id() -> str:
    return f"turn_{secrets.token_hex(12)}"


class Interface:
    """The connected clients. MemGPT 0.2.7 sent every event to all of them; here agents have followers."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self.clients: dict[ServerConnection, Session] = {}

    def register_client(self, websocket: ServerConnection) -> Session:
        """A session for a new connection."""
        session = self.clients[websocket] = Session(self._hub, websocket)
        return session

    def unregister_client(self, websocket: ServerConnection) -> None:
        """Forget a connection; its turns go on."""
        session = self.clients.pop(websocket, None)
        if session is not None:
            session.leave()


# ---- sessions --------------------------------------------------------------------------------------------------------


class Session:
    """One connection: what it asked for, in order, and what waits to be sent to it.

    Tasks exist only while there is something to do, so that an idle connection costs one.
    """

    _count = 0

    def __init__(self, hub: Hub, websocket: ServerConnection) -> None:
        Session._count += 1
        self.number = Session._count
        self.hub = hub
        self.websocket = websocket
        self.types: frozenset[str] | None = _CLASSIC_SET
        "The message types it wants; None: all."
        self.current: AgentHost | None = None
        self.closed = False
        self._incoming: collections.deque[tuple[Request | InvalidRequest, int]] = collections.deque()
        self._incoming_bytes = 0
        self._worker: asyncio.Task[None] | None = None
        self._taking: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self._outgoing: collections.deque[str] = collections.deque()
        self._outgoing_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._taken = 0
        "Frames that the transport has taken."
        self._drained: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        "What ends with the connection: writing and replays. Answers that are being made go on."
        self.waiting = 0
        "Its messages that wait for their turns."
        self.own: dict[tuple[int, str], Follower] = {}
        "The followers of its own turns, by agent and turn, until their terminal frames are sent."
        self.hosts: set[AgentHost] = set()
        "The agents whose events it may get."
        self._replays: dict[AgentHost, dict[asyncio.Task[None], bool]] = {}
        "Replays under way, and whether they are a subscription's, which ends them."
        self._searches: dict[tuple[object, ...], tuple[tuple[int, int], list[int]]] = {}
        self._allowance = float(RATE_BURST)
        self._last_request = 0.0

    # -- in --

    async def run(self) -> None:
        """Take frames until the connection closes."""
        logger.info("session %d: connected", self.number)
        try:
            async for frame in self.websocket:
                self._take(frame)
                if self._incoming_bytes > MAX_INCOMING:
                    self._room = self.hub.loop.create_future()
                    await self._room
        except ConnectionClosed:
            pass

    def _take(self, frame: str | bytes) -> None:
        """Read a frame and let it wait for those before it; cancel overtakes."""
        request: Request | InvalidRequest
        try:
            request = decode_request(frame)
        except InvalidRequest as error:
            request = error
        if not self._may_request():
            text = f"more than {self.hub.options.rate_limit} requests a second; send more slowly"
            read = isinstance(request, Request) or request.read
            mark = request.id if isinstance(request, Request) else request.request_id
            request = InvalidRequest("rate_limited", text, mark, read=read)
        if isinstance(request, Cancel):
            self.hub.spawn(self._overtake(request))
            return
        self._incoming.append((request, len(frame)))
        self._incoming_bytes += len(frame)
        if self._worker is None:
            self._worker = self.hub.spawn(self._work())

    def _may_request(self) -> bool:
        """A token bucket: RATE_BURST at once, rate_limit a second in the long run."""
        rate = self.hub.options.rate_limit
        if not rate:
            return True
        now = time.monotonic()
        self._allowance = min(RATE_BURST, self._allowance + (now - self._last_request) * rate)
        self._last_request = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

    async def _work(self) -> None:
        """Answer requests one after another."""
        try:
            while self._incoming:
                request, size = self._incoming.popleft()
                self._incoming_bytes -= size
                if self._room is not None and self._incoming_bytes <= MAX_INCOMING // 2:
                    self._room.set_result(None)
                    self._room = None
                if isinstance(request, InvalidRequest):
                    self.send(server_error(request))
                elif isinstance(request, UserMessage):
                    self._taking = self.hub.loop.create_future()
                    try:
                        await self._answer(request)
                    finally:
                        self._taking.set_result(None)
                        self._taking = None
                else:
                    await self._answer(request)
        finally:
            self._worker = None

    async def _overtake(self, request: Cancel) -> None:
        """Answer a cancel at once; a message that is just being taken up is waited for, or it would be missed."""
        if self._taking is not None:
            await asyncio.wait([self._taking])
        for item in self._incoming:
            message = item[0]
            if isinstance(message, UserMessage) and self._cancels(request, message):
                self._incoming.remove(item)
                self._incoming_bytes -= item[1]
                error = Refused("cancelled", "cancelled before it ran")
                self.send(refusal(message.id, message.turn_id, message.agent_name, error))
                self.send(command_response(request, {"state": "removed"}))
                return
        await self._answer(request)

    def _cancels(self, request: Cancel, message: UserMessage) -> bool:
        """Whether a cancel means a message that is not taken up yet."""
        current = self.current.agent.name if self.current else None
        same_agent = (request.agent_name or current) == (message.agent_name or current)
        return same_agent and request.turn_id is not None and message.turn_id == request.turn_id

    async def _answer(self, request: Request) -> None:
        """Do what a request asks, and answer it exactly once."""
        logger.debug("session %d: %s", self.number, request.kind)
        try:
            if isinstance(request, UserMessage):
                await self._say(request)
            elif isinstance(request, Command):
                await getattr(self, f"_{request.kind}")(request)
        except InvalidRequest as error:
            self.send(server_error(error))
        except MemwsError as error:
            self._refuse(request, error)
        except Exception:  # a fault of ours is one request's trouble, not the connection's
            logger.exception("session %d: %s failed", self.number, request.kind)
            self._refuse(request, MemwsError("this failed for a reason of ours; the server's log has it"))
        finally:
            if self.closed:  # the client left while it was answered, and may have been made a follower since
                self._unfollow()

    def _refuse(self, request: Request, error: MemwsError) -> None:
        if isinstance(request, UserMessage):
            self.send(refusal(request.id, request.turn_id or new_turn_id(), request.agent_name, error))
        elif isinstance(request, Command):
            self.send(command_error(request, error))

    # -- out --

    @property
    def lags(self) -> bool:
        """Whether so much waits for the reader that further events had better stay in the store."""
        return self._outgoing_bytes > MAX_OUTGOING // 4

    def wants(self, message_type: str) -> bool:
        """Whether events of this message type are sent; starts and terminals, which have none, always are."""
        return not message_type or self.types is None or message_type in self.types

    def send(self, frame: str) -> None:
        """Queue a frame; a reader that leaves more than MAX_OUTGOING waiting is closed."""
        if self.closed:
            return
        self._outgoing.append(frame)
        self._outgoing_bytes += len(frame) if frame.isascii() else len(frame.encode())
        if self._outgoing_bytes > MAX_OUTGOING:
            self.close_slow()
        elif self._writer is None:
            self._writer = self._spawn(self._write())

    async def _write(self) -> None:
        """Send what waits, in order."""
        try:
            while self._outgoing:
                frame = self._outgoing.popleft()
                self._outgoing_bytes -= len(frame) if frame.isascii() else len(frame.encode())
                await self.websocket.send(frame)
                self._taken += 1
                if self._drained is not None and self._outgoing_bytes <= MAX_OUTGOING // 32:
                    self._drained.set_result(None)
                    self._drained = None
        except ConnectionClosed:
            self.closed = True
        finally:
            self._writer = None

    async def drained(self, lagging: Follower | None = None) -> None:
        """Wait until the reader has taken nearly all: a replay is never faster than its reader.

        A reader that lags is closed where it takes nothing for SLOW_READER_PATIENCE while too much waits for it.
        """
        while self._outgoing_bytes > MAX_OUTGOING // 32 and not self.closed:
            if self._drained is None:
                self._drained = self.hub.loop.create_future()
            taken = self._taken
            await asyncio.wait([self._drained], timeout=SLOW_READER_PATIENCE)
            stuck = lagging is not None and self._taken == taken and not self.closed
            if stuck and lagging and self._outgoing_bytes + await lagging.backlog() > MAX_OUTGOING:
                self.close_slow()

    def close_slow(self) -> None:
        """Close the connection of a reader that does not read; its turns go on and can be replayed."""
        logger.info("session %d: reads too slowly", self.number)
        self.hub.spawn(self.close(SLOW_READER, "read faster, or subscribe with a cursor"))

    async def flush(self) -> None:
        """Wait until everything queued was handed to the transport."""
        if self._writer is not None:
            await asyncio.wait([self._writer])

    async def close(self, code: int, reason: str) -> None:
        """Close the connection, by force where the peer does not take the close frame."""
        if self.closed:
            return
        self.closed = True
        self._outgoing.clear()
        if self._writer is not None:
            self._writer.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_GRACE):
                await self.websocket.close(code, reason)
                return
        self.websocket.transport.abort()

    def leave(self) -> None:
        """The connection is closed: forget it wherever it was known."""
        logger.info("session %d: left", self.number)
        self.closed = True
        self._outgoing.clear()
        self._incoming.clear()
        for task in self._tasks:
            task.cancel()
        for future in (self._drained, self._room):
            if future is not None and not future.done():
                future.set_result(None)
        self._unfollow()

    def _unfollow(self) -> None:
        """Get no more events of any agent."""
        for host in self.hosts:
            host.subscribers.pop(self, None)
            for item in (host.current, *host.waiting):
                if item is not None:
                    item.followers.pop(self, None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self.hub.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- messages --

    async def _host(self, name: str | None) -> AgentHost:
        """The agent that a request means. Raises Refused (no_agent), UnknownAgent."""
        if name is not None:
            return await self.hub.host(name)
        if self.current is None or self.current.gone:
            self.current = None
            raise Refused("no_agent", "no agent has been initialized; send create_agent or load_agent, or name one")
        return self.current

    async def _say(self, request: UserMessage) -> None:
        """Take up a message: it runs, waits, is answered from before, or is refused."""
        host = await self._host(request.agent_name)
        if host.gone:
            raise host.deleted()
        if len(request.message) > MAX_TEXT:
            text = f"a message has at most {MAX_TEXT:,} characters, but got {len(request.message):,}"
            raise Refused("text_too_long", text)
        turn_id = request.turn_id or new_turn_id()
        if request.turn_id is not None:
            stored = await self.hub.store.turn(host.agent.id, turn_id)
            if stored is not None and not stored.over and host.stale and not host.busy:
                await host.freshen()  # its end could not be stored then; it can be by now
                stored = await self.hub.store.turn(host.agent.id, turn_id)
            known = host.find(turn_id) or stored  # looked for last: it may have begun meanwhile
            if known is not None:
                self._follow_again(host, request, known)
                return
            if host.gone:
                raise host.deleted()
        if host.busy and request.when_busy == "reject":
            raise Refused("busy", f"agent {host.agent.name!r} is in a turn; wait for its end, or let the message queue")
        if host.busy and self.waiting >= MAX_WAITING_SESSION:
            raise Refused(
                "queue_full", f"{self.waiting} messages of this connection wait already; wait for their turns"
            )
        if len(host.waiting) >= MAX_WAITING_AGENT:
            raise Refused(
                "queue_full", f"{len(host.waiting)} messages wait for agent {host.agent.name!r}; try again later"
            )
        item = QueuedTurn(Turn(turn_id, request.message), self)
        follower = Follower(self, host, host.published, turn_id=turn_id, request_id=request.id)
        item.followers[self] = self.own[host.agent.id, turn_id] = follower
        self.hosts.add(host)
        host.user_spoke()
        if host.busy and request.when_busy == "queue" and self.wants("queue"):
            position = len(host.waiting) + 1
            for event in response_events("queue", "waits for its turn", turn_id=turn_id, step=0, position=position):
                self.send(event.frame(host.agent.name))
        if request.when_busy == "interrupt" and host.current is not None:
            host.current.turn.stop("superseded")
        host.enqueue(item, first=request.when_busy == "interrupt")

    def _follow_again(self, host: AgentHost, request: UserMessage, known: QueuedTurn | TurnRecord) -> None:
        """A turn_id sent again: its frames so far and then live ones, never a second run. Raises Refused."""
        if isinstance(known, QueuedTurn):
            turn_id = known.turn.turn_id
            digest = None if known.turn.message is None else message_digest(known.turn.message)
        else:
            turn_id, digest = known.turn_id, known.digest
        if digest != message_digest(request.message):
            raise Refused("turn_id_reused", f"turn {quote(turn_id)} was another message; use a new turn_id")
        follower = Follower(self, host, 0, turn_id=turn_id, request_id=request.id)
        follower.live = False
        running = known if isinstance(known, QueuedTurn) else None
        if running is not None:
            running.followers[self] = self.own[host.agent.id, turn_id] = follower
            self.hosts.add(host)
        self._replay(follower, lambda: self._replay_turn(host, follower, once=running is None))

    async def _replay_turn(self, host: AgentHost, follower: Follower, *, once: bool) -> None:
        """Give a turn's frames so far, and let its follower go live; a subscription rests meanwhile."""
        subscriber = host.subscribers.get(self)
        if once or subscriber is None:
            await follower.catch_up(once=once)
            return
        subscriber.live = False
        await follower.catch_up(once=True, up_to=subscriber.cursor)
        if host.subscribers.get(self) is subscriber:
            follower.cursor, follower.live = subscriber.cursor, True  # takes over if the subscription ends
            self.replay(subscriber)
        else:
            await follower.catch_up()

    def replay(self, follower: Follower, *, lagging: bool = False) -> None:
        """Let a follower catch up and go live."""
        self._replay(follower, lambda: follower.catch_up(lagging=lagging))

    def _replay(self, follower: Follower, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a replay after this session's earlier ones of the same agent: seqs come in order.

        A replay that the database refuses ends what it was for, with an error of its own; all else goes on.
        """
        host = follower.host
        replays = self._replays.setdefault(host, {})
        earlier = list(replays)

        async def run() -> None:
            try:
                if earlier:
                    await asyncio.wait(earlier)
                await work()
            except StoreFailed as error:
                logger.error("session %d: a replay failed: %s", self.number, error)
                if follower.turn_id is None:
                    host.subscribers.pop(self, None)
                elif running := host.find(follower.turn_id):
                    running.followers.pop(self, None)
                self.send(refusal(follower.request_id, follower.turn_id, host.agent.name, error))

        task = self._spawn(run())
        replays[task] = follower.turn_id is None
        task.add_done_callback(lambda done: replays.pop(done, None))

    # -- commands --

    async def _create_agent(self, request: CreateAgent) -> None:
        self.current, warnings = await self.hub.create(request.config)
        result = {"agent_name": self.current.agent.name, "warnings": warnings}
        self.send(command_response(request, result, "OK: Agent initialized"))

    async def _load_agent(self, request: LoadAgent) -> None:
        name = request.name if request.name is not None else request.agent_name
        if name is None:
            raise InvalidRequest("missing_field", "load_agent needs the field 'name'", request.id)
        host = self.current = await self.hub.host(name)
        await host.freshen()
        agent = host.agent
        result = {
            "agent_name": agent.name,
            "model": agent.record.config["model"] or agent.model.name,
            "last_seq": agent.last_seq,
            "repaired": agent.repairs,
            "warnings": agent.warnings,
        }
        agent.repairs = []
        self.send(command_response(request, result, f"OK: Agent {agent.name!r} loaded"))

    async def _hello(self, request: Hello) -> None:
        unknown: list[str] = []
        if request.message_types is not None:
            unknown = [name for name in request.message_types if name != "*" and name not in MESSAGE_TYPES]
            self.types = None if "*" in request.message_types else frozenset(request.message_types)
        models = self.hub.models
        result = {
            "version": __version__,
            "protocol": PROTOCOL,
            "model": models.default,
            "models": list(dict.fromkeys((models.default, OFFLINE))),
            "offline": models.offline,
            "limits": self.hub.options.limits(),
            "commands": list(COMMANDS),
            "message_types": list(MESSAGE_TYPES),
            "unknown": [name[:MAX_NAME] for name in unknown],
        }
        self.send(command_response(request, result))

    async def _list_agents(self, request: ListAgents) -> None:
        records, total = await self.hub.store.list_agents(request.after or "", request.limit)
        agents = [
            {
                "agent_name": record.name,
                "model": record.config["model"] or self.hub.models.default,
                "last_active": record.last_active,
                "last_seq": record.last_seq,
                "state": self.hub.state_of(record.name),
            }
            for record in records
        ]
        self.send(command_response(request, {"agents": agents, "total": total}))

    async def _get_agent(self, request: GetAgent) -> None:
        host = await self._host(request.agent_name)
        agent, running = host.agent, host.current
        result = {
            "agent_name": agent.name,
            "settings": agent.settings(),
            "blocks": [
                {"label": block.label, "value": block.value, "limit": block.limit, "version": block.version}
                for block in agent.blocks.values()
            ],
            "counts": {"messages": agent.recall, "passages": agent.archival, "in_context": len(agent.messages)},
            "last_seq": agent.last_seq,
            "turn": {"turn_id": running.turn.turn_id, "step": running.turn.step} if running else None,
        }
        self.send(command_response(request, result))

    async def _update_agent(self, request: UpdateAgent) -> None:
        host = await self._host(request.agent_name)
        config = AgentConfig(request.config, self.hub.tools, base=host.agent.record.config)
        await host.edit(host.agent.update(config))
        host.arm_heartbeat()
        warnings = [*config.warnings, *host.agent.warnings]
        self.send(command_response(request, {"settings": host.agent.settings(), "warnings": warnings}))

    async def _rename_agent(self, request: RenameAgent) -> None:
        host = await self._host(request.agent_name)
        name = await self.hub.rename(host, request.new_name)
        self.send(command_response(request, {"agent_name": name}))

    async def _delete_agent(self, request: DeleteAgent) -> None:
        try:
            host = await self._host(request.agent_name)
        except UnknownAgent:
            if not request.purge or request.agent_name is None:
                raise
            await self.hub.purge_deleted(request.agent_name)
        else:
            await self.hub.delete(host, force=request.force, purge=request.purge)
        self.send(command_response(request, {}))

    async def _restore_agent(self, request: RestoreAgent) -> None:
        host = await self.hub.restore(request.agent_name, request.new_name)
        self.send(command_response(request, {"agent_name": host.agent.name, "last_seq": host.agent.last_seq}))

    async def _get_messages(self, request: GetMessages) -> None:
        host = await self._host(request.agent_name)
        found, total = await self.hub.store.messages(host.agent.id, request.before, request.limit)
        cut = host.agent.messages[0].id if host.agent.messages else host.agent.last_message + 1
        items = [
            {
                "id": message.id,
                "seq": message.seq,
                "role": message.role,
                "time": message.time,
                "text": excerpt(message.text, _LIST_TEXT),
                "tool_calls": calls_of(message),
                "turn_id": message.turn_id,
                "step": message.step,
                "in_context": message.id >= cut,
            }
            for message in found
        ]
        kept = fitting_items(list(reversed(items)))[::-1]
        first = kept[0]["id"] if kept else 1
        self.send(command_response(request, {"messages": kept, "total": total, "more": first > 1}))

    async def _search_memory(self, request: SearchMemory) -> None:
        host = await self._host(request.agent_name)
        stores = ("recall", "archival") if request.store == "all" else (request.store,)
        try:
            since, until = date_range(request.from_, request.to)
        except ToolError as error:
            raise InvalidRequest("bad_field", f"from, to: {error}", request.id) from None
        roles = None if request.roles is None else tuple(request.roles)
        offset = (request.page - 1) * request.limit
        where = (request.query, stores, roles, since, until)
        up_to, near = await self._first_page(host.agent, where, request.limit, request.page)
        found, total = await self.hub.store.search(host.agent.id, *where, request.limit, offset, up_to, near)
        items = [
            {
                "id": item.id,
                "store": item.store,
                "role": item.role or None,
                "time": item.time,
                "text": excerpt(item.text, _LIST_TEXT),
                "score": round(item.score, 4),
            }
            for item in found
        ]
        kept = fitting_items(items)
        result = {"items": kept, "total": total, "page": request.page, "pages": -(-total // request.limit)}
        self.send(command_response(request, result | ({"more": True} if len(kept) < len(items) else {})))

    async def _first_page(self, agent: Agent, where: Where, limit: int, page: int) -> tuple[tuple[int, int], list[int]]:
        """The last message and passage at the first page of a search, and what was near: for all its pages."""
        key = (agent.id, limit, *where)
        known = self._searches.pop(key, None) if page > 1 else None
        if known is None:
            up_to = agent.last_message, agent.last_passage
            known = up_to, await agent.nearest(*where, up_to)
        self._searches[key] = known
        if len(self._searches) > KEPT_SEARCHES:
            self._searches.pop(next(iter(self._searches)))
        return known

    async def _get_context(self, request: GetContext) -> None:
        agent = (await self._host(request.agent_name)).agent
        result = {"sections": agent.sections(), "used": agent.used(), "window": agent.window, "estimated": True}
        await self._send_long(request, result)

    async def _get_request(self, request: GetRequest) -> None:
        host = await self._host(request.agent_name)
        await self._send_long(request, await host.agent.request(request.turn_id, request.step))

    async def _send_long(self, request: Command, result: JSON) -> None:
        """Answer with a result of any size: where one frame is too small, in parts whose texts joined are its JSON."""
        text = encode_json(result)
        if len(text.encode()) < MAX_FRAME - 10_000:
            self.send(command_response(request, result))
            return
        spans = spans_of(text)
        for part, span in enumerate(spans, 1):
            await self.drained()
            self.send(extend_json(command_response(request, {"text": text[span]}), part=part, parts=len(spans)))

    async def _set_block(self, request: SetBlock) -> None:
        host = await self._host(request.agent_name)
        await host.edit(host.agent.set_block(request.label, request.value, request.version))
        version = host.agent.blocks[request.label].version
        self.send(command_response(request, {"label": request.label, "version": version}))

    async def _insert_passage(self, request: InsertPassage) -> None:
        host = await self._host(request.agent_name)
        told = await host.edit(host.agent.insert_passage(request.text))
        self.send(command_response(request, {"id": told[0].fields["id"]}))

    async def _delete_passage(self, request: DeletePassage) -> None:
        host = await self._host(request.agent_name)
        passage_id = request.passage_id if request.passage_id is not None else request.id
        if type(passage_id) is not int:
            raise InvalidRequest("missing_field", "delete_passage needs the field 'passage_id'", request.id)
        await host.edit(host.agent.delete_passage(passage_id))
        self.send(command_response(request, {"id": passage_id}))

    async def _cancel(self, request: Cancel) -> None:
        host = await self._host(request.agent_name)
        item = host.current if request.turn_id is None else host.find(request.turn_id)
        if item is None:
            if request.turn_id is not None and await self.hub.store.turn(host.agent.id, request.turn_id) is None:
                raise Refused("unknown_turn", f"agent {host.agent.name!r} never had a turn {quote(request.turn_id)}")
            state = "over"
        elif item in host.waiting:
            host.drop(item, Refused("cancelled", "cancelled before it ran"))
            state = "removed"
        else:
            item.turn.stop("cancelled")
            state = "cancelling"
        self.send(command_response(request, {"state": state}))

    async def _subscribe(self, request: Subscribe) -> None:
        host = await self._host(request.agent_name)
        if not host.busy:
            await host.freshen()
        last_seq, after = host.published, request.after
        if after is not None and (type(after) is not int or not 0 <= after <= last_seq):
            raise Refused(
                "unknown_seq", f"after: expected a seq from 0 to {last_seq}, but got {quote(after)}", last_seq=last_seq
            )
        self._end_subscription(host, after)
        follower = host.subscribers[self] = Follower(self, host, last_seq if after is None else after)
        self.hosts.add(host)
        self.send(command_response(request, {"last_seq": last_seq}))
        if after is not None and after < last_seq:
            follower.live = False
            self.replay(follower)

    async def _unsubscribe(self, request: Unsubscribe) -> None:
        host = await self._host(request.agent_name)
        self._end_subscription(host, None)
        self.send(command_response(request, {"last_seq": host.published}))

    def _end_subscription(self, host: AgentHost, after: int | None) -> None:
        """End a subscription and its replays; own turns that were left to it are brought up by themselves, unless a new
        subscription replays them, from `after` on."""
        former = host.subscribers.pop(self, None)
        for task, subscription in list(self._replays.get(host, {}).items()):
            if subscription:
                task.cancel()
        if former is None or former.live or (after is not None and after <= former.cursor):
            return
        for (agent, turn_id), own in list(self.own.items()):
            if agent == host.agent.id:
                own.cursor, own.live = max(own.cursor, former.cursor), False
                once = host.find(turn_id) is None
                self._replay(own, functools.partial(own.catch_up, once=once))

    async def _wake(self, request: Wake) -> None:
        host = await self._host(request.agent_name)
        if host.busy:
            raise Refused("busy", f"agent {host.agent.name!r} is in a turn already")
        turn_id = new_turn_id()
        item = QueuedTurn(Turn(turn_id, None), self)
        item.followers[self] = Follower(self, host, host.published, turn_id=turn_id)
        self.hosts.add(host)
        self.send(command_response(request, {"turn_id": turn_id}))
        host.enqueue(item)

    async def _compact(self, request: Compact) -> None:
        host = await self._host(request.agent_name)
        if host.busy:
            raise Refused("busy", f"agent {host.agent.name!r} is in a turn; wait for its end")
        host.compacting = True
        try:
            await host.freshen()
            told = await host.edit(host.agent.compact())
        except ModelError as error:
            raise Refused("not_found", f"there is nothing to compact: {error}") from error
        finally:
            host.compacting = False
            host.kick()
        fields = told[0].fields
        result = {"tokens_before": fields["tokens_before"], "tokens_after": fields["tokens_after"]}
        self.send(command_response(request, result))


_CLASSIC_SET: Final = frozenset(CLASSIC_TYPES)
_LIST_TEXT: Final = 20_000
"Characters of one item's text in a list."
MAX_LISTED_CALLS: Final = 20


def calls_of(message: ChatMessage) -> list[JSON]:
    """The tool calls of a chat message; of long arguments, excerpts of their texts."""
    body = read_body(message) if message.role == "assistant" else None
    calls = []
    for call in body.get("tool_calls", ()) if body else ():
        arguments = decode_json(call["function"]["arguments"])
        if len(message.body) > _LIST_TEXT:
            texts = {key: value if isinstance(value, str) else encode_json(value) for key, value in arguments.items()}
            arguments = {key[:MAX_NAME]: excerpt(text, _LIST_TEXT // len(texts)) for key, text in texts.items()}
        calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": arguments})
    return calls[:MAX_LISTED_CALLS]


def fitting_items(items: list[JSON]) -> list[JSON]:
    """The first items that one frame can hold."""
    size = 0
    for count, item in enumerate(items):
        size += len(encode_json(item).encode()) + 1
        if size > MAX_FRAME - 10_000:
            return items[:count]
    return items


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    """What one server holds on its event loop: the store, the models, the agents in use, the sessions, the listeners.

    Its coroutines run on `loop`, and so does everything they touch: no locks are needed but the one for names.
    """

    def __init__(
        self,
        options: Options,
        tools: dict[str, Tool],
        loop: asyncio.AbstractEventLoop,
        store: SqliteStore | None = None,
    ) -> None:
        self.options = options
        self.loop = loop
        self.tools = tools
        self.models = Models(
            *(options.model, options.base_url, options.api_key, options.context_window, options.idle_timeout),
            options.embedding_model,
        )
        self.store = store or SqliteStore(options.db, options.sync, loop)
        self.interface = Interface(self)
        self.stopping = False
        self.sockets: list[socket.socket] = []
        "Bound, and listened on by `listen`; none where the server only works for its own process."
        self._hosts: dict[str, AgentHost] = {}
        self._api_keys: dict[int, str | None] = {}
        self._names = asyncio.Lock()
        "Held while a name is looked up, given or taken away."
        self._gate = Gate(options)
        self._listeners: list[_WebSocketListener] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that outlives sessions; kept until it ends."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # -- agents --

    async def host(self, name: str) -> AgentHost:
        """The agent of that name, opened where it is not in use yet. Raises UnknownAgent."""
        name = unicodedata.normalize("NFC", name)
        host = self._hosts.get(name)
        if host is not None:
            return host
        async with self._names:
            host = self._hosts.get(name)
            return host if host is not None else await self._open(await self.store.find_agent(name))

    async def _open(self, record: AgentRecord) -> AgentHost:
        """Put an agent to use; the events of a repair have no followers yet and are read from the store."""
        agent, _ = await Agent.open(
            self.store, record, self.models, self.tools, self.options.max_steps, self._api_keys.get(record.id)
        )
        host = self._hosts[record.name] = AgentHost(self, agent)
        if agent.repairs:
            logger.warning("agent %s: %s", record.name, "; ".join(agent.repairs))
        return host

    async def reopen(self, host: AgentHost) -> None:
        """Read an agent again from the store, and tell its followers of what had to be repaired."""
        record = await self.store.find_agent(host.agent.name)
        host.agent, events = await Agent.open(
            self.store, record, self.models, self.tools, self.options.max_steps, self._api_keys.get(record.id)
        )
        for event in events:
            host.publish(event)

    async def create(
        self, config: JSON, base_url: str | None = None, api_key: str | None = None
    ) -> tuple[AgentHost, list[str]]:
        """A new agent, and what of its config was not taken as said. Raises Refused."""
        try:
            _check_texts(config, None)
        except InvalidRequest as error:
            raise Refused("bad_config", str(error)) from None
        checked = AgentConfig(config, self.tools)
        model, _ = self.models.get(checked.values["model"], base_url, api_key)
        window = checked.values["context_window"] or self.options.context_window or model.window
        names = MEMORY_TOOLS if checked.values["tools"] is None else checked.values["tools"]
        specs = ",".join(self.tools[name].spec for name in names)
        check_window(window, checked.values["system"] or SYSTEM_PROMPT, specs, checked.blocks)
        async with self._names:
            record = await self.store.create_agent(checked.name, checked.values, checked.blocks, base_url)
            self._api_keys[record.id] = api_key
            host = await self._open(record)
        return host, [*checked.warnings, *host.agent.warnings]

    async def rename(self, host: AgentHost, new_name: str) -> str:
        """Give an agent another name, which its sessions and subscribers follow. Raises Refused (busy, name_taken)."""
        name = valid_name(new_name)
        if host.busy:
            raise Refused("busy", f"agent {host.agent.name!r} is in a turn; wait for its end, or cancel it")
        async with self._names, host.agent.lock:
            if host.gone:
                raise host.deleted()
            before = host.agent.name
            text = f"the agent is now {name!r}"
            (event,) = response_events("agent_change", text, turn_id=None, step=0, change="renamed", new_name=name)
            await self.store.rename_agent(host.agent.id, name, event)
            del self._hosts[before]
            self._hosts[name] = host
            host.publish(event)
            host.agent.record.name = name
            record = await self.store.find_agent(name)  # under a name that was in use before, seqs go on above that
            host.agent.record.last_seq = host.published = record.last_seq
        return name

    async def delete(self, host: AgentHost, *, force: bool, purge: bool) -> None:
        """Put an agent aside, or forget it. Raises Refused (busy) unless `force` ends its turns first."""
        if host.gone:
            raise host.deleted()
        if host.busy and not force:
            raise Refused("busy", f"agent {host.agent.name!r} is in a turn; wait for its end, or send force true")
        host.gone = True
        try:
            await host.stop_turns("cancelled", host.deleted())
            async with self._names, host.agent.lock:
                text = "the agent was deleted"
                (event,) = response_events("agent_change", text, turn_id=None, step=0, change="deleted")
                await self.store.delete_agent(host.agent.id, event, purge)
                host.publish(event)
                host.close()
                host.subscribers.clear()
                del self._hosts[host.agent.name]
        except MemwsError:
            host.gone = False
            raise

    async def purge_deleted(self, name: str) -> None:
        """Forget the agent that was deleted last under a name. Raises UnknownAgent."""
        record = await self.store.find_agent(unicodedata.normalize("NFC", name), deleted=True)
        await self.store.delete_agent(record.id, None, True)

    async def restore(self, name: str, new_name: str | None) -> AgentHost:
        """Bring back a deleted agent. Raises UnknownAgent, Refused (name_taken)."""
        name = unicodedata.normalize("NFC", name)
        async with self._names:
            return await self._open(
                await self.store.restore_agent(name, name if new_name is None else valid_name(new_name))
            )

    def state_of(self, name: str) -> str:
        """running, waiting or idle."""
        host = self._hosts.get(name)
        return host.state if host else "idle"

    def take_tools(self) -> None:
        """Offer newly registered tools to the agents in use."""
        for host in self._hosts.values():
            host.agent.take_tools()

    async def run_turn(self, name: str, message: str, verify: bool) -> list[JSON]:
        """One turn from its start to its end, as wire dicts. Raises Refused for a message that never becomes one."""
        host = await self.host(name)
        if len(message) > MAX_TEXT:
            raise Refused("text_too_long", f"a message has at most {MAX_TEXT:,} characters, but got {len(message):,}")
        item = QueuedTurn(Turn(new_turn_id(), clean_text(message), verify=verify))
        item.done = self.loop.create_future()
        host.user_spoke()
        host.enqueue(item)
        await item.done
        return [decode_json(text) for text in item.told]

    # -- listening --

    async def listen(self) -> None:
        """Accept connections on the bound sockets."""
        for bound in self.sockets:
            listener = await _websocket_serve(
                self.handle,
                sock=bound,
                process_request=self._process_request,
                select_subprotocol=lambda _, offered: cast(Any, "memws") if "memws" in offered else None,
                compression=None,
                max_size=MAX_FRAME,
                ping_interval=PING_INTERVAL,
                ping_timeout=PING_TIMEOUT,
                open_timeout=OPEN_TIMEOUT,
                close_timeout=STOP_GRACE,
                server_header=None,
                logger=_ws_logger,
            )
            self._listeners.append(listener)
        if not self.models.offline:
            self.spawn(self._warm_up())

    async def _warm_up(self) -> None:
        """Import openai while nobody waits for it yet."""
        try:
            async with self.models.endpoint.client():
                pass
        except UsageError as error:
            logger.error("%s", error)

    def _process_request(self, connection: ServerConnection, request: HandshakeRequest) -> HandshakeResponse | None:
        """The gate, before the upgrade."""
        refused = self._gate.refuse(request)
        if refused is None and is_health_check(request):
            response = connection.respond(http.HTTPStatus.OK, encode_json({"status": "ok", "version": __version__}))
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            return response
        if refused is None and len(self.interface.clients) >= self.options.max_connections:
            refused = 503, f"all {self.options.max_connections} connections are taken; try again later"
        if refused is None and self.stopping:
            refused = 503, "the server is stopping"
        if refused is None:
            return None
        status, reason = refused
        return connection.respond(http.HTTPStatus(status), f"{reason}\n")

    async def handle(self, websocket: ServerConnection) -> None:
        """One connection, from accept to close."""
        session = self.interface.register_client(websocket)
        try:
            await session.run()
        finally:
            self.interface.unregister_client(websocket)

    async def close(self, *, keep_store: bool = False) -> None:
        """End turns cleanly, tell the clients, free the port, let go of everything."""
        if self.stopping:
            return
        self.stopping = True
        error = Refused("cancelled", "the server is stopping; send the message again later")
        ends = [self.loop.create_task(host.stop_turns("interrupted", error)) for host in self._hosts.values()]
        if ends:
            await asyncio.wait(ends, timeout=STOP_GRACE)
        for host in self._hosts.values():
            host.close()
        sessions = list(self.interface.clients.values())
        flushes = [self.loop.create_task(session.flush()) for session in sessions]
        if flushes:
            await asyncio.wait(flushes, timeout=STOP_GRACE / 4)
        closes = [self.loop.create_task(session.close(GOING_AWAY, "the server is stopping")) for session in sessions]
        for listener in self._listeners:
            listener.close(close_connections=False)
        if closes:
            await asyncio.wait(closes, timeout=STOP_GRACE)
        for listener in self._listeners:
            listener.close()
            await listener.wait_closed()
        for bound in self.sockets:
            bound.close()
        for task in (*ends, *flushes, *closes, *self._tasks):
            task.cancel()
        await asyncio.gather(*ends, *flushes, *closes, *self._tasks, return_exceptions=True)
        await self.models.close()
        if not keep_store:
            await self.store.close()


_BIND_ATTEMPTS: Final = 10


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to an address: both loopback families for localhost, on the same port. Raises UsageError."""
    hosts = ["127.0.0.1", "::1"] if host.lower() == "localhost" else [host.strip("[]")]
    for attempt in range(_BIND_ATTEMPTS):
        try:
            return _bind_all(hosts, port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if taken and port == 0 and attempt < _BIND_ATTEMPTS - 1:
                continue  # the port that was free on one family is taken on the other
            if taken:
                text = f"port {port} on {host} is held by another program; stop it, or choose port=0 for a free one"
            else:
                reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
                text = f"cannot listen on {host}:{port} ({reason}); choose another host or port"
            raise UsageError(text) from None
    raise AssertionError("unreachable")


def _bind_all(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """A listening socket for each host, on the same port; ::1 only where this machine has it. Raises OSError."""
    sockets: list[socket.socket] = []
    try:
        for host in hosts:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            try:
                bound = socket.create_server(address[:2], family=family, backlog=1024)
            except OSError as error:
                if sockets and error.errno != errno.EADDRINUSE:
                    continue  # no IPv6 on this machine
                raise
            sockets.append(bound)
            bound.setblocking(False)
            # Inherited by accepted sockets; asyncio leaves it out here, and a turn would wait 40 ms for a delayed ACK.
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            port = bound.getsockname()[1]
    except BaseException:
        for bound in sockets:
            bound.close()
        raise
    return sockets


# ---- the server as an object -----------------------------------------------------------------------------------------


class WebSocketServer:
    """A memws server: `start()` in a notebook or script, `run()` in a program, `await start_server()` on your loop.

        server = memws.WebSocketServer(port=0).start()
        agent = server.create_new_agent({"name": "sam"})
        events = server.run_step("Hi, my name is Ada")

    Every option of the command line is a keyword; see Options. The blocking calls work from any thread but the
    server's own, also before `start()`. Raises UsageError for options that cannot be.
    """

    def __init__(self, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, **options: Any) -> None:
        if "JUPYTERHUB_API_TOKEN" in os.environ and options.get("token") is None:
            options["token"] = _hub_token()  # other people's kernels may reach this machine's ports
        known = {entry.name for entry in fields(Options)}
        if unknown := options.keys() - known:
            raise UsageError(f"unknown option {quote(min(unknown))}; known: {', '.join(sorted(known))}")
        self.options = Options(host=host, port=port, **options)
        self.host = host
        self.port = port
        self.agent: Agent | None = None
        "The agent most recently created or loaded through this object."
        self.tools: dict[str, Tool] = dict(MEMORY_TOOLS)
        self._hub: Hub | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._main: asyncio.Task[Any] | None = None
        "The task of start_server."
        self._serving = self._announced = False

    def __repr__(self) -> str:
        return f"<memws.WebSocketServer {self.url} {'listening' if self._serving else 'not listening'}>"

    @property
    def url(self) -> str:
        """The address that clients connect to."""
        shown = f"[{self.host}]" if ":" in self.host and not self.host.startswith("[") else self.host
        return f"ws://{shown}:{self.port}"

    @property
    def interface(self) -> Interface:
        """The connected clients."""
        return self._open_hub().interface

    @property
    def agent_name(self) -> str | None:
        return self.agent.name if self.agent else None

    def tool(
        self, function: Callable[..., Any] | None = None, *, name: str | None = None, timeout: float = TOOL_TIMEOUT
    ) -> Any:
        """Register a function as a tool, for agents whose config names it; also as a decorator with arguments.

        A sync function runs in a daemon thread of its own, an async one on the server's loop; `timeout` in seconds.
        """
        if function is None:
            return lambda decorated: self.tool(decorated, name=name, timeout=timeout)
        tool = make_tool(function, name=name, timeout=timeout)
        if tool.name in MEMORY_TOOLS:
            raise UsageError(f"{tool.name!r} is a memory tool; give your function another name")
        self.tools[tool.name] = tool
        if self._hub is not None and self._loop is not None:
            self._hub.tools[tool.name] = tool
            self._loop.call_soon_threadsafe(self._hub.take_tools)
        return function

    def panel(self, agent: str | None = None, compact: bool = False, static: bool = True) -> Panel:
        """An ipywidgets panel that is a client of this server; see Panel. Needs a started server."""
        return Panel(self.url, agent, compact, static, self.options.token)

    # -- running --

    def start(self) -> WebSocketServer:
        """Listen, on a loop of an own daemon thread, and return at once.

        Run again for the same address, the new object takes over loop, sockets, agents and store; with other options or
        a reloaded module the old server is stopped first. Raises UsageError where the port or the database is taken.
        """
        if not self._serving:
            self._claim(starting=True)
        if not self._serving:
            hub = self._bind(None)
            self._call(hub.listen())
            self._serving = True
        return self

    @property
    def _key(self) -> tuple[str, str, int]:
        return __name__, self.options.host.lower(), self.options.port

    def _claim(self, *, starting: bool) -> None:
        """Take over from the object of the same address that an earlier run of the cell left, or stop it."""
        former = _live_servers().get(self._key) if self.options.port else None
        if former is not None and former is not self:
            if type(former) is type(self) and self._hub is None and former.options == self.options:
                self._take_over(former)
            elif starting and former._serving:
                former.stop()
        if self.options.port:
            _live_servers()[self._key] = self

    def _take_over(self, former: WebSocketServer) -> None:
        """Become what another object was, whose cell was run again."""
        for name in ("_hub", "_loop", "_thread", "_main", "_serving", "_announced", "host", "port", "agent"):
            setattr(self, name, getattr(former, name))
        former._hub = former._loop = former._thread = former._main = None
        former._serving = former._announced = False
        if self._hub is None or self._loop is None:
            return
        self._hub.tools |= self.tools
        self.tools = former.tools = self._hub.tools
        self._loop.call_soon_threadsafe(self._hub.take_tools)

    def stop(self) -> None:
        """End turns cleanly, free the port, leave no thread or task but a tool that will not end, which is named."""
        loop, thread = self._loop, self._thread
        if loop is None:
            return
        self._refuse_own_thread("close()")
        asyncio.run_coroutine_threadsafe(self.close(), loop).result()
        if thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
        tools = [thread.name for thread in threading.enumerate() if thread.name.startswith("memws-tool-")]
        if tools:
            logger.warning("still running: %s", ", ".join(tools))

    async def close(self) -> None:
        """What stop() does, to be awaited on the server's own loop."""
        main = self._main
        if main is not None and main is not asyncio.current_task():
            main.cancel()
            await asyncio.wait([main])
        elif self._hub is not None:
            await self._hub.close()
            self._forget()

    def _forget(self) -> None:
        """Be as if never started."""
        if _live_servers().get(self._key) is self:
            del _live_servers()[self._key]
        self._hub = self._loop = self._thread = self._main = None
        self._serving = self._announced = False

    def run(self, block: bool = False) -> None:
        """Serve until interrupted. Inside a running loop (a notebook cell) start in a thread and return; with `block`
        keep the cell there through nest-asyncio until it is interrupted, which frees the port."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            with contextlib.suppress(KeyboardInterrupt):
                asyncio.run(self.start_server())
            return
        if not block:
            self.start()
            print(f"memws {__version__} listening on {self.url} in a thread of its own; stop() ends it")
            return
        run_nested(self.start_server())

    async def start_server(self) -> None:
        """Serve on the caller's loop until cancelled. Raises UsageError where the server listens already."""
        if self._serving:
            raise UsageError(f"this server listens already on {self.url}; stop() it first")
        loop = asyncio.get_running_loop()
        if self._thread is not None:
            await self._move(loop)
        self._main = asyncio.current_task()
        try:
            if not self._announced:
                self.initialize_server()
            hub = self._bind(loop)
            await hub.listen()
            self._serving = True
            await loop.create_future()
        finally:
            if self._hub is not None:
                await self._hub.close()
            self._forget()

    async def _move(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bring what blocking calls have begun on a loop of its own to the caller's loop: store, bound port, agent."""
        hub, agent_name, announced = self._open_hub(), self.agent_name, self._announced
        sockets, hub.sockets = hub.sockets, []
        thread, former = self._thread, self._loop
        assert thread is not None
        assert former is not None
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(hub.close(keep_store=True), former))
        former.call_soon_threadsafe(former.stop)
        await in_thread("memws-join", thread.join)
        self._forget()
        hub.store.move(loop)
        self._loop, self._announced = loop, announced
        self._hub = Hub(self.options, self.tools, loop, hub.store)
        self._hub.sockets = sockets
        if agent_name is not None:
            await self.load_agent_async(agent_name)

    def initialize_server(self) -> None:
        """Open the store, bind the address and print it. Raises UsageError."""
        hub = self._bind(running_loop())
        self._announced = True
        print(f"memws {__version__} listening on {self.url}", flush=True)
        print(f"model: {hub.models.described}; agents: {self.options.db}", flush=True)

    def _bind(self, loop: asyncio.AbstractEventLoop | None) -> Hub:
        """The hub with its address bound. The port comes first: a start that fails on it makes no database."""
        if self._hub is None or not self._hub.sockets:
            sockets = bind_sockets(self.options.host, self.options.port)
            try:
                hub = self._open_hub(loop)
            except BaseException:
                for bound in sockets:
                    bound.close()
                raise
            hub.sockets = sockets
            self.host, self.port = sockets[0].getsockname()[:2]
        return self._open_hub(loop)

    async def handle_client(self, websocket: ServerConnection, path: str | None = None) -> None:
        """One connection, from accept to close, for a websockets server of your own (`path`: its older versions)."""
        await self._open_hub(running_loop()).handle(websocket)

    # -- blocking calls --

    def create_new_agent(self, config: Mapping[str, Any] | None = None) -> Agent:
        """A new agent; config as in the create_agent command, plus base_url and api_key. Raises Refused."""
        self._refuse_own_thread("create_new_agent_async")
        self._open_hub()
        return self._call(self.create_new_agent_async(config))

    async def create_new_agent_async(self, config: Mapping[str, Any] | None = None) -> Agent:
        """create_new_agent, to be awaited on the server's own loop."""
        values = dict(config or {})
        base_url, api_key = values.pop("base_url", None), values.pop("api_key", None)
        host, warnings = await self._open_hub().create(values, base_url, api_key)
        for warning in warnings:
            logger.warning("agent %s: %s", host.agent.name, warning)
        self.agent = host.agent
        return host.agent

    def load_agent(self, agent_name: str) -> Agent:
        """The agent of that name. Raises UnknownAgent with the ten nearest names."""
        self._refuse_own_thread("load_agent_async")
        self._open_hub()
        return self._call(self.load_agent_async(agent_name))

    async def load_agent_async(self, agent_name: str) -> Agent:
        """load_agent, to be awaited on the server's own loop."""
        host = await self._open_hub().host(agent_name)
        await host.freshen()
        self.agent = host.agent
        return host.agent

    def run_step(self, user_message: str, first_message: bool = False, no_verify: bool = False) -> list[JSON]:
        """One turn of `agent`: its stored events as wire dicts (MemGPT 0.2.7, websocket_server.py, run_step).

        first_message asks that the first reply goes through send_message, and tries again a few times; no_verify skips
        that. Raises Refused (no_agent), or with the code of a message that never became a turn.
        """
        self._refuse_own_thread("run_step_async")
        self._open_hub()
        return self._call(self.run_step_async(user_message, first_message, no_verify))

    async def run_step_async(
        self, user_message: str, first_message: bool = False, no_verify: bool = False
    ) -> list[JSON]:
        """run_step, to be awaited on the server's own loop."""
        if self.agent is None:
            raise Refused("no_agent", "no agent has been initialized; create_new_agent or load_agent first")
        return await self._open_hub().run_turn(self.agent.name, user_message, first_message and not no_verify)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the server's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _refuse_own_thread(self, instead: str) -> None:
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self._loop:
                raise UsageError(f"this call would block the server's own loop; there, await {instead}")

    def _open_hub(self, loop: asyncio.AbstractEventLoop | None = None) -> Hub:
        """The hub, made where there is none yet: on `loop`, or on one of an own thread."""
        if self._hub is None and loop is None:
            self._claim(starting=False)
        if self._hub is not None:
            return self._hub
        if loop is None:
            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_run_loop, args=(loop,), name="memws", daemon=True)
            self._thread.start()
        self._loop = loop
        try:
            self._hub = Hub(self.options, self.tools, loop)
        except BaseException:
            if self._thread is not None:
                loop.call_soon_threadsafe(loop.stop)
                self._thread.join()
            self._loop = self._thread = None
            raise
        return self._hub


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, if any."""
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def _hub_token() -> str:
    """A token made once for this process, so that a re-run cell finds its server again."""
    return str(process_wide("token", secrets.token_urlsafe(32)))


def _live_servers() -> dict[tuple[str, str, int], WebSocketServer]:
    """The servers of this process that listen in threads: they outlive a re-run cell and a reloaded module."""
    servers: dict[tuple[str, str, int], WebSocketServer] = process_wide("servers", {})
    return servers


def run_nested(work: Coroutine[Any, Any, None]) -> None:
    """Block inside a running loop until `work` ends or an interrupt ends it. Raises UsageError where that cannot be."""
    loop = asyncio.get_running_loop()
    try:
        import_nest_asyncio().apply(loop)
    except (ImportError, ValueError, RuntimeError) as error:
        work.close()
        raise UsageError(
            f"run(block=True) cannot block here ({error}); use start(), which serves from a thread"
        ) from error
    task = loop.create_task(work)
    previous = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if main:  # as asyncio.run does: else the interrupt would be raised inside whatever task runs just then
        signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    except KeyboardInterrupt:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)


def import_nest_asyncio() -> Any:
    """nest_asyncio2 or, where it works, nest_asyncio; the one that was applied before. Raises ImportError."""
    applied = getattr(asyncio, "_nest_patched", False) and "nest_asyncio" in sys.modules
    with contextlib.suppress(ImportError):
        if not applied:
            import nest_asyncio2

            return nest_asyncio2
    if sys.version_info >= (3, 14):
        raise ImportError("nest-asyncio does not work on Python 3.14; pip install nest-asyncio2")
    import nest_asyncio

    return nest_asyncio


# ======================================================================================================================
# 12. CLI: arguments, the terminal client, main
# ======================================================================================================================

# The terminal client. Input is read on the main thread, because only there an interrupt reaches a line being typed;
# the connection and what others make the agent do are on threads of their own.

CHAT_HELP = """\
/agents          the agents of this server
/load NAME       talk to this agent
/new [NAME]      create an agent and talk to it
/memory          what the agent keeps in core memory
/context         what fills its context window
/search WORDS    search recall and archival memory
/cancel          end the agent's running turn
/help            this list
/quit            leave (also Ctrl-D)
Ctrl-C cancels a running turn; twice leaves. A message that begins with a slash: write two."""
CHAT_COMMANDS = re.findall(r"^/\w+", CHAT_HELP, re.MULTILINE)
CHAT_PATIENCE = 2.0
"Seconds after a cancel within which another Ctrl-C leaves, and of silence until a wait is told."

STYLES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
SHOWN = {
    "internal_monologue": ("~ {message}", "dim"),
    "assistant_message": ("{agent_name}: {message}", ""),
    "user_message": ("someone: {message}", "cyan"),
    "tool_call": ("> {name}({message})", "dim"),
    "tool_return": ("< {message}", "dim"),
    "memory_change": ("[{label}, changed by the {by}]", "dim"),
    "context": ("[context: {warning}]", "yellow"),
    **dict.fromkeys(("compaction", "heartbeat", "retry", "correction", "queue"), ("[{kind}: {message}]", "dim")),
    "agent_change": ("[{agent_name}: {message}]", "dim"),
    "agent_response_end": ("[{stop_reason}]", "yellow"),
    "agent_response_error": ("error: {message}", "red"),
}
"How events are shown: by message type, or type, the line and its style."
WHOLE_TEXTS = ("internal_monologue", "assistant_message", "user_message", "agent_response_error")

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """A text of others as it may reach a terminal: control and direction characters are escaped, lines stay."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text).replace("\r\n", "\n"))


def clipped(text: object, length: int = 160) -> str:
    """The beginning of a text, printable and on one line."""
    line = " ".join(str(text).split())
    return printable(line if len(line) <= length else line[: length - 1] + "…")


class Screen:
    """The terminal, for several threads: streamed text, whole lines, and the prompt, which stays below them.

    Without a terminal (or with TERM=dumb) no escape code is written; NO_COLOR (https://no-color.org) is honoured.
    """

    def __init__(self, out: typing.TextIO) -> None:
        self.terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self.terminal and not os.environ.get("NO_COLOR")
        self._out = out
        self._lock = threading.Lock()
        self._mid_line = False  # the cursor stands behind streamed text
        self._prompt: str | None = None
        self._waiting = False  # the line tells how long nothing has come
        self._last = time.monotonic()

    def write(self, text: str, style: str = "") -> None:
        """Add to the current line; `text` has been made printable."""
        with self._lock:
            self._end_wait()
            print(self._painted(text, style), end="", file=self._out, flush=True)
            self._mid_line = not text.endswith("\n") if text else self._mid_line

    def line(self, text: str = "", style: str = "") -> None:
        """Write a whole line: below streamed text, above the prompt and what is being typed behind it."""
        with self._lock:
            self._end_wait()
            before = "\n" if self._mid_line or self._prompt is not None else ""
            readline = sys.modules.get("readline")
            typed = readline.get_line_buffer() if readline else ""
            below = "" if self._prompt is None else self._prompt + typed
            if below and self.terminal:
                rows = len(below) // (os.get_terminal_size(self._out.fileno()).columns or 80)
                before = (f"\x1b[{rows}A" if rows else "") + "\r\x1b[J"
            # The cursor ends up behind what is typed: readline does not tell its place.
            print(f"{before}{self._painted(text, style)}\n{below}", end="", file=self._out, flush=True)
            self._mid_line = False

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Tell, on a terminal, how long nothing has come, from CHAT_PATIENCE on and until something does."""
        over = threading.Event()

        def tick() -> None:
            while not over.wait(0.5):
                with self._lock:
                    silence = time.monotonic() - self._last
                    if self.terminal and not self._mid_line and self._prompt is None and silence >= CHAT_PATIENCE:
                        text = self._painted(f"thinking … {silence:.0f} s", "dim")
                        print(f"\r\x1b[K{text}", end="", file=self._out, flush=True)
                        self._waiting = True

        self._last = time.monotonic()
        thread = threading.Thread(target=tick, name="memws clock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            with self._lock:
                self._end_wait()

    def _end_wait(self) -> None:
        if self._waiting:
            print("\r\x1b[K", end="", file=self._out)
        self._waiting = False
        self._last = time.monotonic()

    def end_line(self) -> None:
        """Go to the beginning of a line."""
        if self._mid_line:
            self.write("\n")

    def ask(self, prompt: str) -> str:
        """Read a line from the user. Raises EOFError and KeyboardInterrupt."""
        self.end_line()
        self._prompt = prompt
        try:
            return input(prompt)
        finally:
            self._prompt = None

    def _painted(self, text: str, style: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and self._colour else text


def show_line(screen: Screen, event: Frame) -> None:
    """Show an event as SHOWN has it; of types that are not there, nothing."""
    kind = str(event.get("message_type", event["type"]))
    form, style = SHOWN.get(kind, ("", ""))
    style = "red" if event.get("status") == "Failed" else style
    is_said = event.get("name") == "send_message" or (kind == "tool_return" and event.get("message") == "None")
    is_usual = event.get("stop_reason") == "done" or event.get("reason") == HEARTBEAT_REQUESTED
    if is_usual or (is_said and style != "red") or (kind == "context" and "warning" not in event) or not form:
        return
    if isinstance(arguments := event.get("arguments"), dict):
        arguments = {name: value for name, value in arguments.items() if name != "request_heartbeat"}
        event = {**event, "message": encode_json(arguments)}
    show = printable if kind in WHOLE_TEXTS else clipped
    texts = {"kind": kind, "label": "archival memory", **{key: show(value) for key, value in event.items()}}
    screen.line(form.format_map(collections.defaultdict(str, texts)), style)
    if kind == "memory_change":
        for line in str(event.get("diff", "")).splitlines()[:8]:
            screen.line(f"{line[:1]} {clipped(line[1:])}", "red" if line.startswith("-") else "green")


class TurnView:
    """Shows the user's own turn as it comes: text while it is being made, all else a line each."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._kind: str | None = None  # of the text on the current line
        self._step: object = None
        # Of each kind, what was shown of this step before its stored event, which repeats it.
        self._ahead: dict[str, str] = collections.defaultdict(str)

    def show(self, event: Frame) -> None:
        """Show one event."""
        kind, text = str(event.get("message_type", event["type"])), str(event.get("message"))
        if kind == "delta":
            if self._step != (step := (event.get("turn_id"), event.get("step"))):
                self._step = step
                self._ahead.clear()
            self._say(event["of"], text, event)
            self._ahead[event["of"]] += text
        elif kind in ("internal_monologue", "assistant_message"):
            self._complete(kind, text, event)
        elif kind != "user_message":
            if kind == "retry" or event.get("what") == "verify" or kind in TERMINAL_TYPES:
                self._ahead.clear()  # a text that is begun again is all new
                self._kind = None
            show_line(self._screen, event)

    def _complete(self, kind: str, text: str, event: Frame) -> None:
        ahead = self._ahead[kind]
        if not (text.startswith(ahead) or ahead.startswith(text)):  # not what was streamed: it was corrected
            self._kind = None
            ahead = self._ahead[kind] = ""
        if len(text) > len(ahead):
            self._say(kind, text[len(ahead) :], event)
        self._ahead[kind] = ahead[len(text) :]  # more than this text: of several messages
        if event.get("part") == event.get("parts") and not self._ahead[kind] and self._kind == kind:
            self._screen.end_line()
            self._kind = None

    def _say(self, kind: str, text: str, event: Frame) -> None:
        """Add text to the line of its kind; a line that was broken off goes on without a new heading."""
        if kind != self._kind:
            self._screen.end_line()
            self._kind = kind
            if not self._ahead[kind] and event.get("part", 1) == 1:
                heading = f"{printable(event.get('agent_name'))}: " if kind == "assistant_message" else "~ "
                self._screen.write(heading, "bold" if kind == "assistant_message" else "dim")
        self._screen.write(printable(text), SHOWN[kind][1])


class Chat:
    """A conversation on the terminal: reads lines, sends them, carries out slash commands."""

    def __init__(self, client: BlockingClient, screen: Screen) -> None:
        self._client = client
        self._screen = screen
        self._own_turns: set[str] = set()
        self._leaves_until = 0.0  # until then another Ctrl-C leaves

    def run(self, agent_name: str | None) -> int:
        """Talk until the user leaves."""
        about = self._client.hello(["delta", *SHOWN])
        server = f"memws {about['version']} at {self._client.client.url}, model {about['model']}"
        self._screen.line(f"{clipped(server)}; /help lists the commands", "dim")
        if about.get("offline"):
            self._screen.line("the model is offline: a rule-based stand-in, not a language model", "yellow")
        with contextlib.suppress(EOFError), line_editing() if self._screen.terminal else contextlib.nullcontext():
            self._choose(agent_name)
            while self._take_line():
                pass
        self._screen.end_line()
        return 0

    def _choose(self, name: str | None) -> None:
        """Load the agent that was asked for, or the most recently active one; offer to create a missing one."""
        name = name or latest_agent(self._client)
        question = f"there is no agent {printable(name)!r}; create it? [Y/n] "
        try:
            if name:
                return self._do_load(name)
            question = "there is no agent yet; create 'sam'? [Y/n] "
        except RemoteError as error:
            if error.code != "unknown_agent":
                return self._screen.line(printable(error), "red")
        with contextlib.suppress(KeyboardInterrupt):
            if self._screen.ask(question).strip().lower() in ("", "y", "yes"):
                self._do_new(name or "sam")
        return None

    def _take_line(self) -> bool:
        """One line from the user and what it asks for; False leaves."""
        try:
            text = self._screen.ask(f"{self._client.agent_name or ''}> ").strip()
            self._leaves_until = 0.0
            if text in ("/quit", "/exit"):
                return False
            self._act(text)
        except KeyboardInterrupt:
            self._screen.line()
            if time.monotonic() < self._leaves_until:
                return False
            self._leaves_until = math.inf
            self._screen.line("[Ctrl-C again, or Ctrl-D, leaves]", "dim")
        except MemwsError as error:
            if not self._client.client.alive:  # it has given up
                raise
            self._screen.line(printable(error), "red")
        return True

    def _act(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word in CHAT_COMMANDS:
            getattr(self, f"_do_{word[1:]}")(rest.strip())
        elif text.startswith("/") and not text.startswith("//"):
            near = difflib.get_close_matches(word, CHAT_COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
            self._screen.line(f"unknown command {clipped(word, 40)}: {hint}", "yellow")
        elif text and self._client.agent_name is None:
            self._screen.line("no agent yet: /new NAME creates one, /load NAME loads one", "yellow")
        elif text:
            self._talk(text.removeprefix("/"))

    def _talk(self, text: str) -> None:
        """Send a message and show its turn; Ctrl-C cancels it, a second one within 2 s leaves."""
        turn_id, view = uuid.uuid4().hex, TurnView(self._screen)
        turn: BlockingTurn | None = None
        self._own_turns.add(turn_id)

        def interrupt(number: int, frame: object) -> None:
            if time.monotonic() < self._leaves_until:
                raise KeyboardInterrupt
            self._leaves_until = time.monotonic() + CHAT_PATIENCE
            if turn is not None:
                turn.cancel()

        usual = signal.signal(signal.SIGINT, interrupt)
        try:
            turn = self._client.send(text, turn_id=turn_id)
            if self._leaves_until:  # interrupted while it was sent
                turn.cancel()
            with self._screen.waiting():
                for event in turn:
                    view.show(event)
        finally:
            signal.signal(signal.SIGINT, usual)

    def _switch(self, call: Callable[[str], Frame], name: str, form: str) -> None:
        """Create or load an agent, and show from now on what others make it do."""
        former, result = self._client.agent_name, call(name)
        self._screen.line(form.format_map({key: clipped(value) for key, value in result.items()}), "dim")
        for warning in result["warnings"]:
            self._screen.line(f"[warning: {clipped(warning, 400)}]", "yellow")
        if former is not None:
            self._client.unsubscribe(former)
        events = self._client.subscribe()

        def show_others() -> None:
            with contextlib.suppress(MemwsError):  # the main thread meets it as well
                for event in events:
                    if event.get("turn_id") not in self._own_turns:
                        show_line(self._screen, event)

        threading.Thread(target=show_others, name="memws follower", daemon=True).start()

    # -- the slash commands --

    def _do_help(self, rest: str) -> None:
        self._screen.line(CHAT_HELP)

    def _do_agents(self, rest: str) -> None:
        agents = all_agents(self._client)
        for agent in agents:
            mark = "*" if agent["agent_name"] == self._client.agent_name else " "
            state = f"{agent['state']}, last active {agent['last_active'] or 'never'}"
            self._screen.line(f"{mark} {clipped(agent['agent_name'])}  {clipped(agent['model'])}, {clipped(state)}")
        if not agents:
            self._screen.line("no agent yet: /new NAME creates one")

    def _do_load(self, rest: str) -> None:
        if not rest:
            return self._screen.line("which one? /load NAME; /agents lists them", "yellow")
        return self._switch(self._client.load_agent, rest, "[{agent_name}, model {model}]")

    def _do_new(self, rest: str) -> None:
        self._switch(lambda name: self._client.create_agent(name or None), rest, "[{agent_name} created]")

    def _do_memory(self, rest: str) -> None:
        agent = self._client.command("get_agent")
        for block in agent["blocks"]:
            used = f"{len(block['value'])} of {block['limit']} characters"
            self._screen.line(f"{clipped(block['label'])} ({used})", "bold")
            self._screen.line(printable(block["value"]))
        self._screen.line(f"[{', '.join(f'{key} {count}' for key, count in agent['counts'].items())}]", "dim")

    def _do_context(self, rest: str) -> None:
        context = self._client.command("get_context")
        for section in context["sections"]:
            share = section["tokens"] / context["window"]
            bar = f"{'#' * min(30, round(30 * share)):.<30}"
            self._screen.line(f"{clipped(section['name']):12} {bar} {section['tokens']:7} {share:6.0%}")
        about = "estimated" if context["estimated"] else "counted"
        self._screen.line(f"{context['used']} of {context['window']} tokens, {about}", "bold")

    def _do_search(self, rest: str) -> None:
        if not rest:
            return self._screen.line("for what? /search WORDS", "yellow")
        found = self._client.command("search_memory", query=rest, store="all")
        for item in found["items"]:
            origin = " ".join(clipped(item[key]) for key in ("store", "role", "time") if item.get(key))
            self._screen.line(f"[{origin}]", "dim")
            self._screen.line(clipped(item["text"], 400))
        return self._screen.line(f"[{len(found['items'])} of {found['total']} found]", "dim")

    def _do_cancel(self, rest: str) -> None:
        state = self._client.command("cancel")["state"]
        self._screen.line("[nothing runs]" if state == "over" else f"[{clipped(state)}]", "dim")


def all_agents(client: BlockingClient) -> list[Frame]:
    """The agents of the server, in its order."""
    agents: list[Frame] = []
    while True:
        after = agents[-1]["agent_name"] if agents else None
        page = client.command("list_agents", limit=100, after=after)
        agents += page["agents"]
        if not page["agents"] or len(agents) >= page["total"]:
            return agents


def latest_agent(client: BlockingClient) -> str:
    """The agent that was active last; "" where there is none."""
    agents = sorted(all_agents(client), key=lambda agent: str(agent["last_active"] or ""))
    return str(agents[-1]["agent_name"]) if agents else ""


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Line editing, and a history from chat to chat, where Python has readline."""
    try:
        import readline  # not on Windows
    except ImportError:
        yield
        return
    path = pathlib.Path(os.path.expanduser("~/.memws_history"))  # noqa: PTH111 (the other raises where there is no home)
    readline.set_history_length(1000)  # lines
    with contextlib.suppress(OSError):
        path.touch(0o600)
        readline.read_history_file(path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def answer_once(client: BlockingClient, agent_name: str | None, text: str) -> int:
    """Send one message and print the reply, nothing else, on standard output."""
    name = agent_name or latest_agent(client) or "sam"
    try:
        client.load_agent(name)
    except RemoteError as error:
        if error.code != "unknown_agent":
            raise
        client.create_agent(name)
        print(f"there was no agent {printable(name)!r}; it has been created", file=sys.stderr)
    client.hello(["assistant_message"])
    for event in client.send(text):
        if event["type"] == "agent_response_error":
            raise RemoteError(event["code"], event["message"])
        if event["type"] == "agent_response":
            is_whole = event.get("part") == event.get("parts")
            print(printable(event["message"]), end="\n" if is_whole else "", flush=True)
        elif event.get("stop_reason", "done") != "done":
            print(f"the turn ended early ({clipped(event['stop_reason'])}); send the message again", file=sys.stderr)
            return 1
    return 0


def chat(url: str, agent_name: str | None = None, token: str | None = None) -> int:
    """The terminal client; gives the exit status: 0, 1 after an error, 2 where the server cannot be reached.

    Where standard input is no terminal, all of it is one message. Call it on the main thread.
    """
    for name, errors in (("stdin", "replace"), ("stdout", "backslashreplace"), ("stderr", "backslashreplace")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, pathlib.Path(os.devnull).open("r+", encoding="utf-8"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    interactive = sys.stdin.isatty()
    screen = Screen(sys.stdout if interactive else sys.stderr)

    logger.addHandler(logging.NullHandler())  # else Python prints our warnings over the conversation

    def on_state(state: str) -> None:
        said = {"lost": "connection lost; reconnecting …", "restored": "reconnected", "failed": "connection lost"}
        screen.line(f"[{said[state]}]", "dim")

    try:
        with connect(url, token, reconnect=True if interactive else 60.0, on_state=on_state) as client:
            if interactive:
                return Chat(client, screen).run(agent_name)
            text = sys.stdin.read()
            if not text.strip():
                print("nothing to send: standard input is empty; pipe a message in", file=sys.stderr)
                return 1
            return answer_once(client, agent_name, text.rstrip("\r\n"))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left: nothing is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemwsError, ValueError) as error:
        print(printable(error), file=sys.stderr)
        return 2 if isinstance(error, ConnectFailed) else 1


# ---- the command line ------------------------------------------------------------------------------------------------


class _LogFormatter(logging.Formatter):
    """One line a record (tracebacks aside), control characters escaped, without what looks like a key or the token."""

    def __init__(self, token: str | None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._secrets = [secret for secret in (token, os.environ.get("OPENAI_API_KEY")) if secret]

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        return printable(super().formatMessage(record)).replace("\n", "\\n")

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        return "\n".join(f"    {printable(line)}" for line in super().formatException(ei).split("\n"))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return re.sub(r"\bsk-[\w*-]{6,}", "…", text)


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags; every one has an environment variable MEMWS_<FLAG>, and the flag wins."""
    import argparse  # 5 ms of every import otherwise

    class _Parser(argparse.ArgumentParser):
        """Says what is wrong in one sentence."""

        def error(self, message: str) -> NoReturn:
            raise UsageError(f"{message}; {self.prog} --help tells what there is")

    flags = _Parser(add_help=False)
    for option in fields(Options):
        if option.name != "api_key":
            _add_flag(flags, option.name, option.metadata["help"], option.default)
    _add_flag(flags, "log_level", "debug, info, warning or error", "info")
    summary = (__doc__ or "").partition("\n")[0]
    parser = _Parser(prog="memws.py", description=summary, parents=[flags])
    parser.add_argument("--version", action="version", version=f"memws {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    serve = "serve agents over WebSocket: the default, with the options below"
    commands.add_parser("serve", help=serve, description=serve, parents=[flags])
    talk = "talk to an agent from this terminal; piped input is answered once"
    terminal = commands.add_parser("chat", help=talk, description=talk)
    _add_flag(terminal, "url", "the server's address", f"ws://localhost:{DEFAULT_PORT}")
    _add_flag(terminal, "agent", "the agent to talk to", None)
    _add_flag(terminal, "token", "the server's token", None)
    keeping = {
        "check": "look for damage in stored agents; with --repair mend it after a backup",
        "export": "print one agent, memory and history, as one JSON file",
        "import": "store an agent that export printed",
        "backup": "copy the database, also while a server runs",
    }
    for name, meaning in keeping.items():
        command = commands.add_parser(name, help=meaning, description=meaning)
        _add_flag(command, "db", Options.__dataclass_fields__["db"].metadata["help"], DEFAULT_DB)
        if name == "check":
            command.add_argument("--repair", action="store_true", help="mend what is found; needs the server stopped")
        else:
            command.add_argument(
                "name" if name == "export" else "file", help="the agent" if name == "export" else "the file"
            )
    describe = "print the protocol as JSON Schema"
    commands.add_parser("protocol", help=describe, description=describe)
    return parser


def _add_flag(parser: argparse.ArgumentParser, name: str, meaning: str, default: Any) -> None:
    """A flag; what is not given is None, so that the environment can step in."""
    shown = f" (default {default})" if default not in (None, ()) else ""
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        metavar=name.rpartition("_")[2].upper(),
        help=f"{meaning}{shown}; MEMWS_{name.upper()}",
        default=None,
        **({"action": "append"} if default == () else {"type": _kind_of(name, default)}),
    )


def _kind_of(name: str, default: Any) -> type:
    return int if name == "context_window" else str if default is None else type(default)


def _given(flags: argparse.Namespace, name: str, default: Any) -> Any:
    """A flag's value, else its environment variable's, else the default. Raises UsageError."""
    if (value := getattr(flags, name)) is not None:
        return value
    variable, kind = f"MEMWS_{name.upper()}", _kind_of(name, default)
    text = os.environ.get(variable)
    if not text:  # set to nothing, as in compose files, is not set
        return default
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{variable}: expected a number, but got {quote(text)}") from None


def serve_command(flags: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Raises UsageError."""
    level_name = _given(flags, "log_level", "info")
    level = logging.getLevelNamesMapping().get(level_name.upper())
    if level is None:
        raise UsageError(f"log_level: expected debug, info, warning or error, but got {quote(level_name)}")
    values = {
        option.name: _given(flags, option.name, option.default)
        for option in fields(Options)
        if option.name != "api_key"
    }
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter(values["token"]))
    logger.addHandler(handler)
    logger.setLevel(level)
    _ws_logger.setLevel(max(level, logging.WARNING))
    _raise_descriptor_limit(values["max_connections"])
    _share_one_heap()
    sys.setswitchinterval(SWITCH_INTERVAL)
    server = WebSocketServer(**values)
    asyncio.run(_serve_until_signal(server))
    return 0


async def _serve_until_signal(server: WebSocketServer) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))  # while a large database is indexed anew
    server.initialize_server()
    serving = loop.create_task(server.start_server())
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows: KeyboardInterrupt ends asyncio.run
            loop.add_signal_handler(number, serving.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await serving


def _raise_descriptor_limit(connections: int) -> None:
    """Let the process open as many files as it may need, where the system allows."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = connections + 256
        if soft != resource.RLIM_INFINITY and soft < wanted:
            wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _share_one_heap() -> None:
    """Let all threads take memory from one heap (glibc's mallopt), and large pieces from the system and back to it.

    What one thread let go of another can use: a reply of 5 MB beside 450 slow peers costs some 20 MiB less.
    """
    with contextlib.suppress(ImportError, AttributeError, OSError, TypeError):
        import ctypes

        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX
        ctypes.CDLL(None).mallopt(-3, 100_000)  # M_MMAP_THRESHOLD


def check_command(db: str, repair: bool) -> int:
    """Print what is damaged; 0 where nothing is, or all was mended. Raises UsageError."""
    lock = DatabaseLock(os.path.realpath(db)) if repair and pathlib.Path(db).is_file() else None
    try:
        with contextlib.closing(read_database(db)) as connection:
            damages = list(check_database(connection, MENDERS, repair=False))
        if repair and any(damage.mendable for damage in damages):
            backup_command(db, f"{db}.before-repair-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
            with contextlib.closing(read_database(db, write=True)) as connection:
                damages = list(check_database(connection, MENDERS, repair=True))
    finally:
        if lock is not None:
            lock.release()
    for damage in damages:
        mark = "mended" if damage.repaired else "damaged"
        print(printable(f"{mark}: {f'agent {damage.agent}: ' if damage.agent else ''}{damage.text}"))
    left = sum(not damage.repaired for damage in damages)
    print(f"{len(damages)} found, {len(damages) - left} mended" if damages else "no damage found")
    return 1 if left else 0


def export_command(db: str, name: str) -> int:
    """Print an agent as JSON. Raises UsageError, UnknownAgent."""
    with contextlib.closing(read_database(db)) as connection, telling_damage(f"agent {quote(name)}"):
        print(encode_json(export_agent(connection, unicodedata.normalize("NFC", name))))
    return 0


def import_command(db: str, file: str) -> int:
    """Store an exported agent. Raises UsageError, Refused."""
    try:
        data = decode_json(pathlib.Path(file).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {file!r} ({error}); give a file that export printed") from None
    lock = DatabaseLock(os.path.realpath(db))
    try:
        with contextlib.closing(open_database(db, "full")) as connection:
            name = import_agent(connection, data, MENDERS)
    finally:
        lock.release()
    print(f"agent {name!r} is in {db}")
    return 0


def backup_command(db: str, file: str) -> int:
    """Copy the database. Raises UsageError."""
    started = time.monotonic()

    def progress(remaining: int, total: int) -> None:
        if sys.stderr.isatty() and time.monotonic() - started > CHAT_PATIENCE:
            print(f"\rcopying … {100 * (total - remaining) // max(total, 1)} %", end="", file=sys.stderr, flush=True)

    backup_database(db, file, progress)
    print(f"{db} is copied to {file}", file=sys.stderr)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status: 0, 1 for a failed chat or damage, 2 for what cannot be done as asked."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "serve")
    try:
        status = _run(make_parser().parse_args(words))
        sys.stdout.flush()
        return status
    except (UsageError, Refused) as error:
        print(f"memws: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left: nothing is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"memws: cannot write to standard output ({error.strerror}); send it elsewhere", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


def _run(given: argparse.Namespace) -> int:
    """Do what the command line asks."""
    if given.command == "chat":
        url = _given(given, "url", f"ws://localhost:{DEFAULT_PORT}")
        return chat(url, _given(given, "agent", None), _given(given, "token", None))
    if given.command == "protocol":
        print(encode_json(protocol_schema()))
        return 0
    if given.command == "serve":
        return serve_command(given)
    db = _given(given, "db", DEFAULT_DB)
    if given.command == "check":
        return check_command(db, given.repair)
    if given.command == "export":
        return export_command(db, given.name)
    return import_command(db, given.file) if given.command == "import" else backup_command(db, given.file)


if __name__ == "__main__":
    sys.exit(main())
