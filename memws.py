#!/usr/bin/env python3
# memws 0.1.0: a WebSocket server for AI agents with memory, its client, its page and notebook panel, in one file.
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "websockets>=17.0",
#     "openai>=2.16",
#     "ipywidgets>=8.1.4",
#     "anywidget>=0.11",
#     "json-repair>=0.40",
#     "nest-asyncio>=1.5.6; python_version < '3.14'",
#     "nest-asyncio2>=1.7; python_version >= '3.14'",
#     "tzdata; sys_platform == 'win32'",
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
    3. Wire: what is called from afar, frames, the table of events, the protocol
    4. Memory: chat messages, core memory blocks, passages; how texts are split and ranked for search
    5. Store: agents, chat messages, memory and events in a database; its search; one agent as a file
    6. LLM: what a model answers, OpenAI-compatible endpoints, the offline model
    7. Tools: what a model may call, memory and its transactions, the memory tools
    8. Agent: a turn is a loop of steps
    9. Client: send a request, iterate the events of a turn
    10. Panel: one page for browser and notebook, which is only a client
    11. Server: agents by name, one session per connection, the gate
    12. CLI: arguments, the terminal client, main

Glossary:

    agent             a named, persistent memory and a model that take turns
    core memory       labelled blocks of limited size that are always in the prompt (persona, human)
    recall memory     every past chat message; what was said is searchable
    archival memory   passages the agent chose to keep, searchable
    context window    what the model sees in one call, in tokens
    step              one model call and the tool calls it asks for
    turn              from a user's message until the agent yields control: one or more steps
    heartbeat         the reason a step starts without the user
    compaction        the oldest chat messages become a summary; recall memory keeps them
    session           one connection

Not covered: TLS (a proxy's job), users and permissions (whoever may connect may use every agent), running code
that comes over the wire (there is none).
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import collections.abc
import concurrent.futures
import contextlib
import datetime
import enum
import errno
import functools
import gc
import hashlib
import heapq
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
import shlex
import shutil
import signal
import socket
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import types
import typing
import unicodedata
import urllib.parse
import warnings
import weakref
import zlib
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, Concatenate, Final, Literal, NamedTuple, NoReturn, ParamSpec, TypeVar, cast

try:
    import websockets.asyncio.server
    from websockets import http11
    from websockets.asyncio.connection import Connection, broadcast
    from websockets.asyncio.server import ServerConnection
    from websockets.exceptions import ConnectionClosed, InvalidState, InvalidStatus, InvalidURI, WebSocketException
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"memws: {error}; install it: {sys.executable} -m pip install 'websockets>=17'", file=sys.stderr)
    sys.exit(2)

__all__ = [
    "DEFAULT_MODEL",  # 1. Constants
    "DEFAULT_PORT",
    "MemwsError",  # 2. Errors
    "memory_index",  # 4. and 5. Memory and its search
    "Agent",  # 8. Agent
    "BlockingClient",  # 9. Client
    "Client",
    "connect",
    "Panel",  # 10. Panel
    "WebSocketServer",  # 11. Server
]
__version__ = "0.1.0"

logger = logging.getLogger("memws")
# At DEBUG websockets logs headers and frames, that is tokens and what people say: never, whatever the program sets.
_ws_logger = logging.getLogger("memws.websockets")
_ws_logger.setLevel(logging.INFO)


# ======================================================================================================================
# 1. Constants: limits and defaults with their units, and what all sections share
# ======================================================================================================================

DEFAULT_HOST, DEFAULT_PORT, DEFAULT_DB = "localhost", 8282, "memws.db"
DEFAULT_MODEL = "gpt-5.4-mini"  # where a key is set and no model is named
OFFLINE = "offline"  # the embedded rule-based model, which needs no key and no network
PROTOCOL = 1

# Characters, unless said otherwise.
MAX_FRAME = 1024 * 1024  # bytes of one WebSocket frame, in either direction
MAX_TEXT = 65_536  # of one user message or passage
MAX_REPLY = 100_000  # of one answer of a model; in JSON at most six bytes each, so every event fits a frame
MAX_ID = 128
MAX_NAME = 64
MAX_MODEL_NAME = 200
MAX_QUERY = 10_000
MAX_DEPTH = 64  # levels of nested JSON in a request
MAX_ERROR = 1_400  # bytes of one error sentence: an answer holds it twice and stays under 4 KiB
MAX_QUOTE = 60  # of the input in an error sentence
MAX_REASON = 1_000  # of an endpoint's own words in an error sentence
BLOCK_LIMIT = 2_000  # of a core memory block by default (MemGPT 0.2.7, constants.py)
MAX_BLOCK_LIMIT = 20_000
MAX_BLOCKS = 20
MAX_BLOCKS_TOTAL = 100_000  # of all blocks of an agent together
TOOL_RESULT_LIMIT = 8_000  # of a tool's result that the model and the clients see
SEARCH_TEXT_LIMIT = 1_000  # of one search result in a tool return
SUMMARY_LIMIT = 1_500

# Queues and counts.
MAX_WAITING_SESSION = 8  # messages of one connection that may wait for their turn
MAX_WAITING_AGENT = 32
RING = 256  # an agent's newest events in memory; a reader that falls behind them reads the store
READERS = 4  # threads that read the database
WRITE_BATCH = 256  # write jobs that share one transaction at most

# Seconds.
STOP_GRACE = 2.0  # from a signal or stop() until open turns are closed by force
READER_PATIENCE, READER_LOOKS = 60.0, 12  # a reader that takes no byte for so long, at so many looks, is closed
PING_INTERVAL, PING_TIMEOUT = 20.0, 40.0  # a connection that answers no ping for so long is closed
OPEN_TIMEOUT = 10.0
BUSY_TIMEOUT = 5.0  # another program may hold the database for so long before a write or an opening fails
CONNECT_TIMEOUT = 5.0
LEASE_TIMEOUT = 3.0  # a server that is paused or cut off from PostgreSQL for so long may not run its agents any more
LEASE_PULSE = 0.5  # between two questions of a server for the leases of its agents
FIRST_TOKEN_TIMEOUT = 120.0  # local models read a long prompt slowly
IDLE_TIMEOUT = 30.0  # the longest silence inside a model's answer
END_PATIENCE = 1.0  # from an answer's last chunk to the end of its stream
TOOL_TIMEOUT = 60.0
APPROVAL_TIMEOUT = 600.0  # how long a call waits until somebody allows it
TOOL_STEP = 0.25  # an async tool that keeps the loop from running for longer is named in the log
RETRY_PAUSE = 0.5  # before the first retry of a failed model call; doubled for the next
LOADING_PATIENCE, LOADING_PAUSE = 60.0, 2.0  # how long an endpoint may load its model, and before it is asked again
MAX_RETRY_AFTER = 30.0  # the longest Retry-After that is waited for; a longer one ends the turn
LOGIN_SILENCE = 3600.0  # a message after so long a silence is preceded by a login event
SWITCH_INTERVAL = 0.001  # how long a thread that computes may keep the others waiting; Python's own is 0.005
DELTA_INTERVAL = 0.02  # pieces of text that arrive within this time become one delta

# The agent's loop.
MAX_STEPS = 20
TURN_TOKEN_BUDGET = 2_000_000  # tokens, in and out, of one turn
TRANSPORT_RETRIES = 2
MAX_FAILED_CALLS = 6  # failed model calls of one turn; with the last good ones a failing turn stays within eight
MAX_FAILED_TOOLS = 3  # in a row
MAX_REPEATED_CALLS = 3  # steps of one turn that make the same call
IDLE_HEARTBEATS = 10  # timed heartbeats without a user's message before they pause
WARNING_FRACTION = 0.75  # of the context window: above it the agent is warned once (MemGPT 0.2.7, constants.py)
KEEP_FRACTION = 0.3  # of the room for messages: what a compaction keeps of the newest ones
MIN_REPLY_TOKENS = 512  # a context window must leave this much beside the prompt and full blocks
MINUTES = "%Y-%m-%d %H:%M"  # how lists that a model reads tell a time
STORES = ("recall", "archival")  # of memory, in the order of their docs
SEARCH_PAGE = 10  # results of one page; MemGPT's five lose a tenth of the evidence

# Embeddings.
EMBEDDING_PATIENCE = 3.0  # seconds that a search waits for its query's vector before words alone decide
EMBEDDING_PAUSE = 60.0  # seconds without a call after one that failed
EMBEDDING_PULSE = 0.5  # between two looks for what has no vector yet
EMBEDDING_TEXT = 2_000  # characters of a query that is embedded

CONTEXT_WINDOWS = {  # tokens by the beginning of a model's name
    OFFLINE: 32_768,
    **dict.fromkeys(("gpt-4o", "gpt-4.1", "gpt-5", "gpt-6", "o1", "o3", "o4"), 128_000),
    "": 8_192,  # every other model (MemGPT 0.2.7, constants.py)
}

PERSONAS = {
    "sam_pov": (
        "I am Sam. I am curious, warm and honest, and I like to get to know people over time. I speak plainly, ask "
        "when I am unsure, and say so when I do not know. What people tell me I keep in my memory, so that our next "
        "conversation begins where this one ended."
    )
}
HUMANS = {"basic": "", "cs_phd": "Occupation: PhD student in computer science."}

SYSTEM_PROMPT = """\
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
- Recall memory is all that the user and you have said, also what has left this window: conversation_search and
  conversation_search_date find it. What tools returned is not in it: keep what matters of that.
- Archival memory is for everything else worth keeping: archival_memory_insert and archival_memory_search.
Before you say that you do not know something about the user or the past, search. Do not invent memories.

User messages arrive as JSON with their time. Never mention these mechanics unless you are asked about them.
"""

SUMMARY_SYSTEM = (
    "Summarize the conversation between a user and an AI agent that follows, for the agent's own later use. Keep "
    "names, facts, preferences, decisions, promises and open questions; leave out pleasantries. Write in the first "
    f"person as the agent, in the language of the conversation, at most {SUMMARY_LIMIT // 8} words, as plain text."
)

WAITING_NOTE = "The user's message that waits for an answer: "  # in a summary that is made while a user waits

_ALERT = "[This is an automated system message hidden from the user] "
PRESSURE_WARNING = (
    _ALERT + "The context window is nearly full: its oldest messages will soon be replaced by a summary. If something "
    "important is not in your memory yet, save it now with core_memory_append, core_memory_replace or "
    "archival_memory_insert. Do not tell the user about this."
)
REQUEST_HEARTBEAT = "request_heartbeat"  # the argument by which a tool call asks for another step
INTERRUPTED = "interrupted: result unknown"  # of a call that a crash or an error cut
HEARTBEAT_REQUESTED = _ALERT + "A tool was called with request_heartbeat true, returning control"
HEARTBEAT_FAILED = _ALERT + "A tool call failed, returning control"
HEARTBEAT_NO_REPLY = _ALERT + "The user is still waiting for a reply: answer with send_message"
HEARTBEAT_TIMER = _ALERT + "Automated timer"
HEARTBEAT_WAKE = _ALERT + "Woken without a new user message"
CORRECTIVE = _ALERT + "Your last answer could not be used ({problem}). Answer again, with well-formed tool calls"

# The client.
RECONNECT_DELAY, RECONNECT_DELAY_MAX = 0.5, 8.0  # seconds before the first attempt, and, doubled each time, at most
CLOSE_TIMEOUT = 2.0  # seconds that closing a client may take
PROGRESS_DELAY = 2.0  # seconds until a command line at work, or a fork, says so, and before it says it again


# ---- what all sections share -----------------------------------------------------------------------------------------

JSON = dict[str, Any]
T = TypeVar("T")
P = ParamSpec("P")


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


def utc_text(when: datetime.datetime) -> str:
    """A time of UTC as the wire has it: RFC 3339, milliseconds."""
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def now_text(later: float = 0.0) -> str:
    return utc_text(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=later))


def local_time(moment: str, zone: datetime.tzinfo | None = None, style: str = MINUTES) -> str:
    """A stored time as a clock in that zone shows it, by default as this machine's."""
    try:
        return datetime.datetime.fromisoformat(moment).astimezone(zone).strftime(style)
    except (ValueError, OverflowError):  # a time of an imported agent
        return moment


def process_wide(name: str, default: Any) -> Any:
    """Something that all copies of this module in a process share: it outlives a re-run cell and a reload."""
    module = sys.modules.setdefault("_memws_live", types.ModuleType("_memws_live"))
    return module.__dict__.setdefault(name, default)


async def in_thread(name: str, function: Callable[[], T]) -> T:
    """The result of `function`, run in a daemon thread of its own, which a cancel leaves to itself."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()
    done.set_running_or_notify_cancel()  # so that a cancel of whoever waits does not cancel it

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as error:  # SystemExit too belongs to whoever waits, not to this thread
            passable = isinstance(error, Exception) and not isinstance(error, StopIteration)
            done.set_exception(error if passable else RuntimeError(repr(error)))

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    result = await asyncio.wrap_future(done)
    thread.join()  # it has nothing left to do
    return result


# ======================================================================================================================
# 2. Errors: one root, one code for the wire each
# ======================================================================================================================


def quote(value: object) -> str:
    """`value` as an error sentence shows it: its repr, at most MAX_QUOTE characters of it."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > MAX_QUOTE:
        text = text[: MAX_QUOTE - 1] + "…"
    return repr(text) if isinstance(value, str) else text


def public_url(url: str) -> str:
    """An address without user, password and query, fit for logs and errors."""
    return re.sub(r"^(\w+://)?(?:.*@)?([^?#]*).*", r"\1\2", url, flags=re.DOTALL)


class MemwsError(Exception):
    """The root of all errors of this module.

    MemwsError
    ├── UsageError          wrong options, a port in use, a missing package: the command line exits with 2
    ├── Refused             a request that cannot be done as things stand; nothing was changed
    │   ├── InvalidRequest  it is no valid request
    │   └── Elsewhere       another server runs the agent
    ├── StoreFailed         the database refused a read or a write; nothing of the transaction was kept
    │   └── LeaseLost       for another server runs the agent by now
    ├── ModelError          a model call failed
    ├── ToolError           a tool call failed; its sentence tells the model how to call right
    ├── RemoteError         the server answered a client with an error
    ├── ConnectFailed       no connection came about
    └── ConnectionLost      a client's connection ended, or was never opened, while something waited for it

    `code` is the stable name on the wire, `details` go beside it; the text is one sentence for people.
    """

    code, most = "internal", MAX_ERROR  # bytes of the text in JSON

    def __init__(self, message: str, code: str | None = None, **details: Any) -> None:
        text = "".join(char if char.isprintable() else " " for char in message[: self.most + 1])
        sizes = itertools.accumulate(len(char.encode()) + (char in '"\\') for char in text)
        fitting = sum(size <= self.most for size in sizes)
        super().__init__(text if fitting == len(text) else text[:fitting] + "…")
        self.code, self.details = code or self.code, details


class UsageError(MemwsError):
    """The server cannot run as asked; the sentence says what to do next."""


class Refused(MemwsError):
    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message, code, **details)


class InvalidRequest(Refused):
    """A frame that is no valid request."""


class StoreFailed(MemwsError):
    code = "store_failed"


class LeaseLost(StoreFailed):
    """Another server runs the agent by now."""


class ModelError(MemwsError):
    """A model call failed: context_overflow, model_auth, model_rate_limit, model_timeout, model_unavailable,
    model_refused or bad_output."""

    most = 3_300  # its event holds it once
    retry = False  # whether the same call may succeed later
    retry_after: float | None = None  # seconds from now, where the endpoint said so
    learned = False  # whether the next call will differ, by what the endpoint has said of an option or of the history
    loading = False  # whether the endpoint loads its model
    generation = ""  # what the model wrote, where its endpoint could not read it

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message, code)
        vars(self).update(more)


class ToolError(MemwsError):
    """A tool call failed; the sentence tells the model how to call right."""


class RemoteError(MemwsError):
    """The server answered a client with an error."""


class ConnectFailed(MemwsError):
    """No connection came about; details: the HTTP `status` of a server that refused (None: nothing answered)."""

    code = "cannot_connect"


class ConnectionLost(MemwsError):
    code = "connection_lost"

    def __init__(self, url: str) -> None:
        super().__init__(f"no connection to {url}; connect again, and send a message again with its turn_id")


def needed(package: str, advice: str) -> Any:
    """A package that not everybody has. Raises UsageError with the advice where it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f"{advice} ({error})") from error


# ======================================================================================================================
# 3. Wire: what is called from afar, frames, the table of events, the protocol
# ======================================================================================================================


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {quote(text)} is too large, or none")
    return value


TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"
# A value as compact strict JSON; raises ValueError for NaN and infinities.
encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_DECODE = {s: json.JSONDecoder(strict=s, parse_constant=_finite, parse_float=_finite).decode for s in (True, False)}


def decode_json(text: str | bytes, strict: bool = True) -> Any:
    """The value of JSON; not strict: with line breaks inside strings, as models write. Raises ValueError."""
    try:
        return _DECODE[strict](text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def with_fields(text: str, **fields: Any) -> str:
    """The JSON object `text` with more fields: an event is encoded once, each copy only adds what differs."""
    return "".join([text[:-1], *(f',"{name}":{encode_json(value)}' for name, value in fields.items()), "}"])


def read_json(text: str) -> tuple[Any, str]:
    """(value, what had to be mended) of JSON as models write it; (None, why) where it is none."""
    text, value, mended = clean_text(text).strip(), None, ""
    try:
        value = decode_json(text, strict=False)
    except ValueError:
        value, mended = _repair_json(text), "broken JSON was mended"
    if isinstance(value, str) and value[:1] in ("{", "["):
        return read_json(value)[0], "it was encoded twice"
    if value is None or _is_deeper(value, MAX_DEPTH):
        return None, "it is no JSON" if value is None else TOO_DEEP
    return clean_value(value), mended


def _repair_json(text: str) -> Any:
    """What was meant by JSON with text around it, of another language, or with brackets missing; None: nothing."""
    value = None
    if text.count("{") + text.count("[") <= MAX_DEPTH * 16:  # its time grows with their square
        with contextlib.suppress(ValueError, RecursionError, ImportError):
            import json_repair

            value = json_repair.loads(text[:MAX_REPLY])
    return value if isinstance(value, (dict, list)) and value else None


# ---- functions that are called from afar: the signature is the JSON Schema, and the schema is the check --------------

_KINDS: dict[str, tuple[Any, str, str, str, str]] = {  # Python's types, in words, the bounds' names and their unit
    "string": (str, "a string", "minLength", "maxLength", " characters"),
    "array": ((list, tuple), "a list", "minItems", "maxItems", " items"),
    "integer": (int, "an integer", "minimum", "maximum", ""),
    "number": ((int, float), "a number", "minimum", "maximum", ""),
    "boolean": (bool, "true or false", "", "", ""),
    "null": (type(None), "null", "", "", ""),
    "object": (dict, "an object", "", "", ""),
}
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", dict: "object"}


def schema_of(hint: Any) -> JSON:
    """The JSON Schema of a type hint; {} where anything goes. Annotated[int, 1, 9] is from 1 to 9, Annotated[str, 1, 9]
    of so many characters, a text at the end the description. Raises LookupError for any other hint."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Annotated and isinstance(arguments[-1], str):
        schema = schema_of(Annotated[arguments[:-1]] if len(arguments) > 2 else arguments[0])
        return schema | {"description": arguments[-1]}
    if origin is Annotated and isinstance(arguments[1], (int, float)):
        schema = schema_of(arguments[0])
        _, _, low, high, _ = _KINDS[schema["type"]]
        return schema | {low: arguments[1], high: arguments[2]}
    if origin is Literal and all(type(each) in _NAMES for each in arguments):
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(argument) for argument in arguments]}
    if origin in (list, Sequence, Iterable):
        return {"type": "array"} | ({"items": schema_of(arguments[0])} if arguments else {})
    return {"type": _NAMES[hint if origin is dict and hint != JSON else origin]} if hint is not Any else {}


def check(value: Any, schema: JSON, problem: str = "expected ") -> Any:
    """`value`, if it fits. Raises ValueError: "expected …"."""
    expected = list[str]()
    for alternative in schema.get("anyOf", ()):
        try:
            return check(value, alternative)
        except ValueError as error:
            expected.append(str(error).removeprefix("expected "))
    if "enum" in schema and repr(value) not in map(repr, schema["enum"]):  # false is not 0
        expected.append(f"one of {', '.join(map(repr, schema['enum']))}")
    if "type" in schema:
        python, words, low, high, unit = _KINDS[schema["type"]]
        fits = isinstance(value, python) and isinstance(value, bool) == (python is bool)
        if not fits or (high in schema and not schema[low] <= (len(value) if unit else value) <= schema[high]):
            expected.append(f"{words} from {schema[low]:,} to {schema[high]:,}{unit}" if high in schema else words)
    if expected:
        raise ValueError(problem + " or ".join(expected))
    items = schema.get("items")
    return [check(item, items, "expected a list, each item ") for item in value] if items else value


def from_text(value: Any) -> Any:
    """What a model may have meant by a value, or what is inside of it, that does not fit: '5' and 5.0 are 5, 'True' is
    true, 'None' is null, "['tea']" is ["tea"], ['5'] is [5], {"a": null} is {}."""
    if isinstance(value, list):
        return [from_text(item) for item in value]
    if isinstance(value, dict):
        return {key: from_text(item) for key, item in value.items() if item is not None}
    if isinstance(value, str) and value[:1] in ("[", "{"):
        return read_json(value)[0] or value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return decode_json({"True": "true", "False": "false", "None": "null"}.get(value, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(eq=False, repr=False)  # here and below: what nothing needs would only make each start longer
class Function:
    """A function that may be called by name with JSON arguments: a command of clients, a tool of models."""

    name: str
    call: Callable[..., Any]
    doc: str  # the docstring
    parameters: JSON  # JSON Schema of the arguments
    readers: Mapping[str, Callable[[Any, JSON], Any]] = field(default_factory=dict)  # of what `check` cannot make
    filled: Collection[str] = ()  # parameters that whoever calls it fills in

    def bind(self, arguments: JSON, lenient: bool = False) -> JSON:
        """The arguments that the function takes, checked, without others. Raises InvalidRequest naming the field."""
        bound = {}
        for name, schema in self.parameters["properties"].items():
            is_null = lenient and arguments.get(name) in (None, "null", "None")
            is_default = is_null and "'null'" not in str(schema)
            if name in self.parameters["required"] or (name in arguments and not is_default):
                bound[f"{name}_" if name == "from" else name] = self.argument(arguments, name, lenient)
        return bound

    def argument(self, arguments: JSON, name: str, lenient: bool = False) -> Any:
        """One argument, checked; lenient: what a model wrote as text may be JSON. Raises InvalidRequest."""
        if name not in arguments:
            raise InvalidRequest("missing_field", f"{self.name} needs {name!r}: {self.usage}")
        value, schema = arguments[name], self.parameters["properties"][name]
        try:
            return self.readers.get(name, check)(value, schema)
        except Exception as error:  # a reader runs code of the hint too
            if lenient and repr(meant := from_text(value)) != repr(value):
                return self.argument({name: meant}, name, lenient)
            text = f"{name}: {error}, but got {quote(value)}; {self.usage}"
            raise InvalidRequest("bad_field", text) from None

    @property
    def usage(self) -> str:
        required = self.parameters["required"]
        names = (name if name in required else f"{name}?" for name in self.parameters["properties"])
        return f"{self.name}({', '.join(names)})"


def function_of(
    call: Callable[..., Any], name: str = "", skip: Collection[str] = (), other: Callable[..., Any] = schema_of
) -> Function:
    """The Function of a callable without the parameters to `skip`. `other` gives schema and reader for hints that
    schema_of does not know, or None for one to be filled in. Raises UsageError where nobody could call it."""
    written = getattr(call, "func", call)  # what a partial is made of
    name = str(name or getattr(written, "__name__", type(written).__name__))
    if not callable(call) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name):
        raise UsageError(f"expected a function with a name of 1 to 64 letters, digits, _ and -, but got {quote(name)}")
    doc = inspect.getdoc(written)
    if not inspect.isroutine(written) and not isinstance(written, type):
        written = type(written).__call__
        doc = written.__doc__ or doc
    try:
        hints = typing.get_type_hints(written, include_extras=True)
        signature = inspect.signature(call).parameters.values()
    except Exception as error:  # a hint may be any code
        raise UsageError(f"cannot read the signature of {name!r}: {error}") from error
    properties, required, readers, filled = {}, [], {}, []
    for parameter in (each for each in signature if each.name not in skip):
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if not is_named or parameter.name == "self" or hasattr(parameter.default, "is_required"):
            text = "give it a name (functools.wraps keeps it), a method its object; put pydantic's Field into Annotated"
            raise UsageError(f"{name!r}: no model can fill in '{parameter}': {text}")
        key = "from" if parameter.name == "from_" else parameter.name  # as it is called outside
        hint = hints.get(parameter.name, Any)
        try:
            properties[key] = schema_of(hint)
        except (LookupError, TypeError):
            if not (found := other(hint, f"{name!r}: {parameter.name}")):
                filled.append(parameter.name)
                continue
            properties[key], readers[key] = found
        default = parameter.default
        if default is parameter.empty:
            required.append(key)
        elif isinstance(default, (str, int)) or (isinstance(default, float) and math.isfinite(default)):
            properties[key]["default"] = default
    parameters = {"type": "object", "properties": properties, "required": required}
    return Function(name, call, inspect.cleandoc(doc or ""), parameters, readers, filled)


# ---- requests --------------------------------------------------------------------------------------------------------

Id = Annotated[str, 0, MAX_ID] | Annotated[int, -(2**53), 2**53] | None
_HEAD = {"type": schema_of(str), "command": schema_of(str), "id": schema_of(Id)}
_REQUEST = Function("request", dict, "what requests have in common", {"properties": _HEAD, "required": ["type"]})


def check_name(name: Any) -> str:
    """An agent's name in NFC. Raises Refused (bad_config)."""
    normal = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
    if not re.fullmatch(r"[^\W_][\w.-]{0,63}", normal):
        text = f"1 to {MAX_NAME} letters, digits, '_', '.' or '-', the first a letter or digit"
        raise Refused("bad_config", f"name: expected {text}, but got {quote(name)}")
    return normal


def decode_request(frame: str | bytes) -> JSON:
    """The JSON object of a frame, with texts that can be stored and sent, and an id. Raises InvalidRequest."""
    if isinstance(frame, bytes):
        raise InvalidRequest("not_json", "expected a text frame with JSON, but got a binary frame")
    try:
        request = decode_json(frame)
        if frame.count("[") + frame.count("{") > MAX_DEPTH and _is_deeper(request, MAX_DEPTH):
            raise ValueError(TOO_DEEP)
    except ValueError as error:
        code = "too_deep" if str(error) == TOO_DEEP else "not_json"
        raise InvalidRequest(code, f"expected a JSON object, but the frame is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise InvalidRequest("not_object", f"expected a JSON object, but got {quote(request)}")
    if "id" in request:
        _REQUEST.argument(request, "id")
    return clean_value(request) if "\\u" in frame else request


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than so many levels."""
    if not isinstance(value, (list, dict)):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def resolve(request: JSON, functions: Mapping[str, Function]) -> tuple[Function, JSON]:
    """The function that a request calls, and its arguments. Raises InvalidRequest."""
    name = kind = _REQUEST.argument(request, "type")
    if kind == "command":
        name = _REQUEST.argument(request, "command")
        if name not in functions or name == "user_message":
            names = ", ".join(sorted(functions.keys() - {"user_message"}))
            raise InvalidRequest("unknown_command", f"unknown command {quote(name)}; known: {names}")
    elif kind != "user_message":
        raise InvalidRequest("bad_type", f"type: expected user_message or command, but got {quote(kind)}")
    if request.get("agent_id") is not None:  # the word of MemGPT 0.3.25
        if request.get("agent_name") not in (None, request["agent_id"]):
            raise InvalidRequest("bad_field", "agent_name and agent_id name different agents")
        request["agent_name"] = request["agent_id"]
    return functions[name], functions[name].bind(request)


# ---- answers and events ----------------------------------------------------------------------------------------------

Event = JSON  # a frame without what its copies differ in (agent_name, id); its seq and time come with the transaction

CLASSIC_TYPES = ("internal_monologue", "assistant_message", "function_message")  # MemGPT 0.2.7's, and the default
LIVE_TYPES = ("delta", "retry", "queue", "progress")  # not stored, without seq, never replayed
TERMINAL_TYPES = ("agent_response_end", "agent_response_error")
# Of a turn that the server stops: cancelled, superseded, interrupted; the agent itself ends it with the others.
STOP_REASONS = ("done", "cancelled", "superseded", "interrupted", "max_steps", "budget", "repeated_call")

_CALL = {"tool_call_id": str, "name": str}
_TOKENS = dict.fromkeys(("messages_before", "messages_after", "tokens_before", "tokens_after"), int)
_EDIT = {"what": Literal["core", "archival"], "label": str, "id": int, "by": Literal["agent", "client"], "since": str}
_TEXTS = {"before": str | None, "after": str | None, "diff": str}
_SIZES = {"sections": list[JSON], "used": int, "window": int, "warning": str}
_SAID: JSON = {"from": str, "steered": str, "id": str | int}
_CHANGE = {"change": Literal["renamed", "updated", "deleted", "imported", "rewound"], "new_name": str, "kept_as": str}
EVENTS: dict[str, tuple[str, dict[str, Any]]] = {  # message type: what it tells, its further fields
    "internal_monologue": ("the model's private text beside its calls", {}),
    "assistant_message": ("what the agent says to the user; partial: it was cut", {"partial": bool}),
    "function_message": ("'Running name(args)', 'Success: result' or 'Error: reason'", {}),
    "user_message": ("what a client wrote; steered: its turn_id, within the turn of another", _SAID),
    "delta": ("the next piece of a text that is being made", {"of": Literal[CLASSIC_TYPES[:2]]}),
    "tool_call": ("a call as the model asked for it; message: its arguments as JSON", _CALL | {"arguments": dict}),
    "approval_request": ("a call waits until somebody allows it", _CALL | {"arguments": dict, "seconds": float}),
    "tool_return": ("the answer to a call", _CALL | {"status": Literal["OK", "Failed"], "duration_ms": int}),
    "memory_change": ("an edit of core or archival memory; since: when what goes was kept", _EDIT | _TEXTS),
    "context": ("how full the context window is, by section {name, tokens}", _SIZES),
    "compaction": ("the oldest messages became a summary", _TOKENS | {"summary": str}),
    "heartbeat": ("why the next step starts without the user", {"reason": str}),
    "retry": ("a model call failed and is made again", {"attempt": int, "of": int, "delay_ms": int, "code": str}),
    "correction": ("a model's output or a stored agent that had to be mended, and how", {"what": str}),
    "queue": ("a message waits for its turn", {"position": int}),
    "progress": ("how far a fork or rewind of a long history is", {"done": int, "total": int}),
    "agent_change": ("the agent was renamed, updated, deleted, imported or rewound", _CHANGE),
}


def response(message_type: str, message: str, turn_id: str | None = None, step: int = 0, **fields: Any) -> Event:
    """An agent_response."""
    event = {"type": "agent_response", "message_type": message_type, "message": message, **fields}
    return event | ({"turn_id": turn_id} if turn_id else {}) | ({"step": step} if step else {})


def kind_of(event: Event) -> str:
    """The message type; of starts and terminals, which have none, the type."""
    return str(event.get("message_type") or event["type"])


def own_turn_id(event: Event) -> str:
    """Of a message that entered the turn of another, its own."""
    return str(event.get("steered") or event.get("turn_id", ""))


def result_frame(request: JSON, result: JSON) -> str:
    """The good answer to a command."""
    command = request["command"]
    status = {"create_agent": "Agent initialized", "load_agent": f"Agent {result.get('agent_name')!r} loaded"}
    about = {"status": f"OK: {status.get(command, command)}", "ok": True, "command": command}
    return _with_id({"type": "command_response", **about, "result": result}, request)


def new_turn_id() -> str:
    return f"turn_{secrets.token_hex(12)}"


def error_frame(request: JSON | None, error: MemwsError) -> str:
    """The bad answer: to a frame that is no (valid) request, to a command, to a message that never became a turn."""
    problem = {"code": error.code, "message": str(error), **error.details}
    if request is None or isinstance(error, InvalidRequest):
        frame = {"type": "server_error", **({"id": None} if request is None else {}), **problem}
    elif request["type"] == "command":
        about = {"status": f"Error: {error}", "ok": False, "command": request["command"]}
        frame = {"type": "command_response", **about, "error": problem}
    else:
        names = {key: request[key] for key in ("turn_id", "agent_name") if 0 < len(request.get(key) or "") <= MAX_ID}
        about = {"stop_reason": "error", "time": now_text(), "turn_id": new_turn_id()}
        frame = {"type": "agent_response_error", **problem, **about, **names}
    return _with_id(frame, request or {})


def _with_id(frame: JSON, request: JSON) -> str:
    return encode_json(frame | ({"id": request["id"]} if request.get("id") is not None else {}))


# ---- the protocol as JSON Schema (draft 2020-12) ---------------------------------------------------------------------

# The fields of frames by name; a name that ends in ? is not always there.
_EVENT = {"message": str, "agent_name": str, "time": str, "turn_id?": str, "step?": int}
_START = {"agent_name": str, "turn_id": str, "seq": int, "time": str, "id?": Id}
_END = _START | {"stop_reason": Literal[STOP_REASONS], "usage": dict}
_ERROR = {"message": str, "code": str, "id?": Id}
_FAILED = _ERROR | {"agent_name?": str, "turn_id?": str, "seq?": int, "time": str, "usage?": dict}
_ANSWER = {"status": str, "ok": bool, "command": str, "result?": dict, "error?": dict, "id?": Id}
_FRAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "agent_response_start": ("a turn begins: the user's message is on disk", _START),
    "agent_response_end": ("a turn ended; all of it is on disk", _END),
    "agent_response_error": ("a turn failed, or never began", _FAILED | {"stop_reason": Literal["error"]}),
    "command_response": ("the answer to a command", _ANSWER),
    "server_error": ("a frame that is no valid request", _ERROR),
}


def protocol_schema(commands: Mapping[str, Function]) -> JSON:
    """A schema that every frame of the protocol validates against, in either direction."""
    definitions: JSON = {}
    for name, function in commands.items():
        kind = {"type": name} if name == "user_message" else {"type": "command", "command": name}
        definitions[name] = _object_schema(function.doc, kind, {"id?": Id})
        definitions[name]["properties"] |= function.parameters["properties"]
        definitions[name]["required"] += function.parameters["required"]
    for name, (doc, row) in _FRAMES.items():
        definitions[name] = _object_schema(doc, {"type": name}, row)
    for name, (doc, own) in EVENTS.items():
        row = _EVENT | {f"{field}?": hint for field, hint in own.items()} | ({} if name in LIVE_TYPES else {"seq": int})
        doc += " (live: not stored, no seq)" if name in LIVE_TYPES else ""
        definitions[f"event_{name}"] = _object_schema(doc, {"type": "agent_response", "message_type": name}, row)
    definitions |= {"request": _any_of(commands), "event": _any_of(definitions.keys() - commands.keys())}
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "memws protocol", "version": PROTOCOL}
    return about | _any_of(["request", "event"]) | {"$defs": definitions}


def _object_schema(doc: str, constants: dict[str, str], fields: dict[str, Any]) -> JSON:
    properties: JSON = {name: {"const": value} for name, value in constants.items()}
    properties |= {name.rstrip("?"): schema_of(hint) for name, hint in fields.items()}
    required = [*constants, *(name for name in fields if not name.endswith("?"))]
    return {"description": doc, "type": "object", "properties": properties, "required": required}


def _any_of(names: Iterable[str]) -> JSON:
    return {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in sorted(names)]}


# ======================================================================================================================
# 4. Memory: chat messages, core memory blocks, passages; how texts are split and ranked for search
# ======================================================================================================================


@dataclass(frozen=True)
class Block:
    """One labelled piece of core memory: always in the prompt, at most `limit` characters. Raises Refused."""

    label: str
    value: str = ""
    limit: Annotated[int, 1, MAX_BLOCK_LIMIT] = BLOCK_LIMIT
    version: int = 1  # counts the edits; an edit based on another version than the stored one is a conflict

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-zA-Z][\w-]{0,63}", self.label, re.ASCII):
            text = f"expected a label of 1 to {MAX_NAME} letters, digits, _ and -, but got {quote(self.label)}"
            raise Refused("bad_config", f"blocks: {text}")
        if len(self.value) > self.limit:
            text = f"block {self.label} is limited to {self.limit:,} characters, but got {len(self.value):,}"
            raise Refused("block_limit", f"{text}; shorten it, or keep part of it in archival memory")


@dataclass(slots=True, repr=False)
class ChatMessage:
    """One entry of the context window, never changed once stored."""

    id: int  # counts the agent's messages from 1
    role: str  # user, assistant, tool, or system for what is packed as a user's message but comes from memws
    time: str
    text: str  # the user's words, the inner monologue, the tool's answer, the event's reason
    body: str  # what a model gets: an encoded JSON object
    turn_id: str = ""
    step: int = 0
    seq: int = 0  # of the last event that was stored with it
    said: str = ""  # what recall memory has of it: the user's words, or what the agent said with send_message
    speaker: str = ""  # "user Ada" where a user gave a name, else the role

    tokens: int = field(init=False, compare=False)  # estimated

    def __post_init__(self) -> None:
        self.tokens = estimate_tokens(self.body)


class Document(NamedTuple):
    """What search finds, a chat message of recall memory or a passage of archival memory, and what it is ranked by."""

    id: int
    store: str
    role: str  # "user Ada" where a user gave a name; of a passage empty
    time: str
    text: str
    doc: int = 0  # messages that lend each other words have theirs side by side, see section 5
    terms: str = ""
    words: int = 0
    asking: float = 0.0  # the share of its sentences that are questions, less 1 where it says "I"
    asked: int = 0  # 1: the message before, of the same session, asks; -1: it is the first of its session
    score: float = 0.0


class Query(NamedTuple):
    """What is searched for. An empty text finds the newest; what the index does not know is looked for as it stands."""

    text: str
    stores: tuple[str, ...] = STORES
    since: str = ""  # a time as stored; `since` is included, `until` not
    until: str = "~"
    limit: int = 10
    offset: int = 0
    newest: int = 2**53  # the last chat message that may be found
    vector: bytes | None = None  # of the query, where an embedding model is used
    zone: datetime.tzinfo | None = datetime.UTC  # of the days that the text names; None: the machine's


def read_body(role: str, text: str) -> JSON | None:
    """What a model gets of a chat message, decoded; None where no endpoint would take it."""
    with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
        body: JSON = decode_json(text)
        calls = body.get("tool_calls", [])
        functions = {call["id"]: call["function"] for call in calls if call["type"] == "function"}
        texts = [*functions, *([body["tool_call_id"]] if role == "tool" else [])]
        texts += [body["content"]] if body.get("content") is not None or not calls else []
        checks = [body["role"] == (role if role in ("assistant", "tool") else "user"), len(functions) == len(calls)]
        checks += [isinstance(each, str) for each in texts]
        for call in functions.values():
            is_named = re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", call["name"]) is not None
            checks += [is_named, isinstance(decode_json(call["arguments"]), dict)]
        return body if all(checks) else None
    return None


def history_faults(messages: Sequence[ChatMessage]) -> tuple[list[tuple[int, str]], dict[str, str]]:
    """(place, fault) of those before which a prompt may not begin; of the calls at the end that are still open the
    ids, each with its tool."""
    faults: list[tuple[int, str]] = []
    waiting: dict[str, str] = {}
    for place, message in enumerate(messages):
        body = read_body(message.role, message.body)
        if body is None:
            faults.append((place + 1, f"chat message {message.id} is damaged"))
            waiting = {}
        elif message.role == "tool":
            if waiting.pop(body["tool_call_id"], None) is None:
                faults.append((place + 1, f"chat message {message.id} answers a call that is not there"))
        else:
            if waiting:
                faults.append((place, f"calls before chat message {message.id} have no result: {', '.join(waiting)}"))
            waiting = {call["id"]: call["function"]["name"] for call in body.get("tool_calls", ())}
    return faults, waiting


def estimate_tokens(text: str) -> int:
    """Tokens of `text`, roughly: a token per four bytes of UTF-8, and four around each message."""
    return 4 + (len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))) // 4


def excerpt(text: str, most: int, advice: str = "search finds them") -> str:
    """`text`, or its beginning and end with a note between them where it has more than `most` characters."""
    if len(text) <= most:
        return text
    head, tail = most * 2 // 3, most // 3
    return f"{text[:head]} […{len(text) - head - tail:,} characters left out here; {advice}…] {text[-tail:]}"


def seconds_between(earlier: str, later: str) -> float:
    """Seconds from one time to the other; 0 where one cannot be read."""
    try:
        return (datetime.datetime.fromisoformat(later) - datetime.datetime.fromisoformat(earlier)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


# ---- what an endpoint takes ------------------------------------------------------------------------------------------
# An assistant's message with fields that only its maker, a model at an endpoint, needs back begins with {"by":"MAKER".
# What an endpoint wants of a history is learned as rules: alternate, systemless, and for messages alone "tools as text"
# (where a template knows none), "calls alone", "short ids", "without FIELD", "with FIELD".

OWN_FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "extra_content")
_UNSIGNED = {"google": {"thought_signature": "skip_thought_signature_validator"}}  # as Google's manual says
_USER = '{"role":"user","content":"'
_BETWEEN = {  # (role, next role): what stands between them where roles alternate
    ("tool", "user"): ['{"role":"assistant","content":"(waiting)"}'],
    ("system", "assistant"): [_USER + r'{\"type\":\"system_alert\",\"message\":\"(go on)\"}"}'],
}


def adapt(body: str, maker: str, rules: Collection[str]) -> str:
    """An encoded chat message without what another model made, and by the rules for messages alone."""
    message = decode_json(body)
    is_own, calls = message.pop("by", maker) == maker, message.get("tool_calls", [])
    for part in (message, *calls):
        for name in OWN_FIELDS:
            if not is_own or f"without {name}" in rules:
                part.pop(name, None)
        for key in {"id", "tool_call_id"} & part.keys() if "short ids" in rules else ():
            part[key] = hashlib.sha256(part[key].encode()).hexdigest()[:9]
    if "tools as text" in rules:
        texts = [f"<tool_call>{encode_json(call['function'])}</tool_call>" for call in message.pop("tool_calls", ())]
        message["content"] = "\n".join(filter(None, [message["content"], *texts]))
        message["role"] = "user" if message.pop("tool_call_id", None) else message["role"]
    elif "calls alone" in rules and calls:
        message["content"] = None
    if "with reasoning_content" in rules and message["role"] == "assistant":
        message.setdefault("reasoning_content", "")
    for call in calls if "with extra_content" in rules else ():
        call.setdefault("extra_content", _UNSIGNED)
    return encode_json(message)


def shape(bodies: Iterable[str], maker: str, *rules: str) -> list[str]:
    """Encoded chat messages as a model takes them; consecutive user messages become one."""
    alone, shaped = [rule for rule in rules if " " in rule], list[str]()
    for body in bodies:
        if alone or body.startswith('{"by":'):
            body = adapt(body, maker, alone)
        if "systemless" in rules:
            body = body.replace('{"role":"system"', '{"role":"user"', 1)
        if body.startswith(_USER) and shaped and shaped[-1].startswith(_USER):
            body = f"{shaped.pop()[:-2]}\\n{body[len(_USER) :]}"
        elif "alternate" in rules and shaped:
            _, _, _, role, _ = shaped[-1].split('"', 4)  # a body begins with {"role":"ROLE"
            shaped += _BETWEEN.get((role, body.split('"', 4)[3]), ())
        shaped.append(body)
    return shaped


# ---- how texts are split for search ----------------------------------------------------------------------------------

# Gains are of recall@10, in points, on LoCoMo / MADial en / MADial zh / XQuAD es: with the constant against without it.

LETTERS, LETTERS_CUT = 7, 5  # Of a stem; of a Cyrillic or Greek word, which is only cut. All: -.4 / -.5 / 0 / -.5

_PAIRED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U000323af"
_TRIPLED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
_SILENT = (  # accents, points of Hebrew and Arabic, tatweel, nukta; soft hyphen, joiners, variation selectors
    "\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670\u06d6-\u06ed\u093c\u00ad\u200b-\u200d\ufe0e\ufe0f"
)
_DROPPED = f"[{_SILENT}]+|(?<=\\w)['\u2019]s\\b"
_WORD = f"[{_PAIRED}{_TRIPLED}]{{1,3}}|[^\\s{_PAIRED}{_TRIPLED}]{{1,40}}"  # without spaces three characters are one
_SENTENCE = r"[^.!?\u2026\u3002\uff01\uff1f\u061f\u0964\n]+[.!?\u2026\u3002\uff01\uff1f\u061f\u0964]*"
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
    ride rode ridden|rise rose risen|choose chose chosen|speak spoke spoken|break broke broken|wake woke woken
    steal stole stolen|fall fell fallen|grow grew grown|know knew known|throw threw thrown|draw drew drawn
    fly flew flown|wear wore worn|tear tore torn|get got gotten|forget forgot forgotten|forgive forgave forgiven
    hide hid hidden|bite bit bitten|lend lent|deal dealt|mean meant|feed fed|lead led|shoot shot|hang hung|stick stuck
    strike struck|dig dug|shake shook shaken|light lit|child children|man men|woman women|foot feet|tooth teeth
    mouse mice|person people|wife wives|life lives|knife knives
    """.replace("\n", "|").split("|")
    for form in forms.split()[1:]
}  # fmt: skip
_ENDINGS = re.findall(r"(\w+):(\w*)", "ingly: edly: ings: ing: ied:y ies:y ed: sses:ss ss:ss us:us es:e s: ly:")
_ARABIC = "^(?:[\u0648\u0641]?(?:[\u0628\u0643]?\u0627\u0644|\u0644\u0644)|\u0648)(?=...)"
_ARABIC_END = "(?<=...)(?:\u0647\u0627|[\u0627\u0648\u064a]\u0646|\u0627\u062a|\u064a?[\u0647\u0629]|[\u064a\u0649])$"


@functools.cache
def _term_pattern() -> re.Pattern[str]:
    """What is a term. Compiled when the first text comes: it would be 3 ms of every import."""
    marks = "".join(chr(code) for code in range(0x370, 0x1ABF) if unicodedata.category(chr(code))[0] == "M")
    emoji = "[\u2190-\u2bff\U0001f000-\U0001faff]"
    spaced = f"(?:[^\\W_{_PAIRED}{_TRIPLED}]|[{marks}])+"
    return re.compile(f"(?P<paired>[{_PAIRED}]+)|(?P<tripled>[{_TRIPLED}]+)|{spaced}|{emoji}")


@functools.lru_cache(maxsize=8_192)
def stem(word: str) -> str:
    """The word without its endings: English and Arabic ones, irregular English forms; then its first letters."""
    if "\u0370" <= word[0] <= "\u052f":
        return word[:LETTERS_CUT]
    if "\u0620" <= word[0] <= "\u064a":
        return re.sub(_ARABIC_END, "", re.sub(_ARABIC, "", word))
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
    folded = unicodedata.normalize("NFC", re.sub(_DROPPED, "", folded))
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
    sentences = re.findall(_SENTENCE, text[:4096])
    return sum(sentence[-1] in "?\uff1f\u061f" for sentence in sentences) / max(1, len(sentences))


# ---- how they are ranked ---------------------------------------------------------------------------------------------

SHORT_WORDS = 80  # Only messages of at most so many words lend words to those beside them; longer ones sink by PRIOR
SESSION_GAP = 3600.0  # Seconds of silence after which a session begins: no words are lent across it
QUERY_CHARACTERS, QUERY_TERMS = 20_000, 128  # What of a query is read. 128 terms against 64: 0 / 0 / +1.8 / 0
POSTINGS = 20_000  # Read for one query, the rarest terms first, the newest first: what bounds its time
COUNTED = 4 * POSTINGS  # Postings of one term that are counted to find out which are the rarest
LENDERS = 1_000  # Documents, the best by their own terms, whose terms count for the messages around them too
CANDIDATES = 200  # The best by the weights of their terms alone, which are ranked in full. 400: +.1 / 0 / 0 / 0
SCANNED = 100_000  # Documents, the newest, in which a text that the index does not know is looked for as it stands

# What a term counts that stands so many messages before (-) or after. +16.7 / 0 / 0 / 0; only -2 and -1: +13.3
CONTEXT = {-5: 0.15, -4: 0.2, -3: 0.25, -2: 0.35, -1: 0.5, 1: 0.4, 2: 0.2}
ASKED = 0.3  # What a term counts more in a question just before: answers seldom repeat it. +.3, MRR +2.3 / 0 / 0 / 0
# What a message loses that only asks, and gains that says "I": people look for what is told of oneself. +1.5, MRR +2.6
# / 0 / 0 / 0; own long-answer sets (LoCoMo asked by "I", by names; MADial): +.3 / 0 / -1.0
ASKING = 0.15
SPEAKER = 0.2  # What messages of a speaker gain whom the query names, "you": the assistant. +1.9, MRR +1.9 / 0 / 0 / 0
NAMED = 0.5  # What a speaker's name counts as a word: others address him by it. +.4, MRR +.3 / 0 / 0 / 0
OPENING = 0.2  # What the first message of a session gains: none before it lends it words. +.5, MRR +1.2 / 0 / 0 / 0
FAINT = 0.3  # What a word counts that says little. +.2 / -.2, MRR +1.4 / 0 / 0; own long-answer sets: +1.3 / +.5 / +2.5
AGAIN = 0.4  # What a word gains by being said twice (* log). 0 / +.9, MRR +2.4 / 0, MRR +1.4 / 0; long: 0 / 0 / +1.9
DATED, DAYS = 2.0, 4  # What a date counts of a word as rare; how many are read. +1.5, MRR +.9 / 0 / 0 / 0
PRIOR = 0.8  # Exponent of min(1, SHORT_WORDS / words), of recall. 0 / 0 / 0 / 0; own long-answer set: +3.3, MRR +23
K1, B = 1.2, 0.2  # BM25: how soon repeated terms count no more, how much length counts. B .75: -1.2 / -1.3 / -1.8 / -.1

# Reciprocal rank fusion (Cormack et al. 2009): what a place by vectors counts of one by words, how soon both fade.
# all-MiniLM-L6-v2, a small English model: +1.6 / +1.5 / -.7 / -.1; at .5 +1.4 / +2.2 / -.2 / 0, with MRR -1.8 / +7.5 /
# -7.6 / -7.2 for +.7 / +3.9 / -1.1 / -4.3 at .3. Vectors that are weaker than words (LSA) cost .6, at .5 1.5.
NEAR, NEAR_PLACE = 0.3, 20
NEAR_BESIDE = 0.2  # What the likeness of those beside counts for a message. With MiniLM +.2 / 0 / 0 / 0
VECTOR_BLOCK = 4_096  # Vectors that a search has in memory at once

_FAINT = """mention discuss conversation chat session describe explain list order aspect topic detail item thing
    something anything kind type part way really actually still also even well please thank sure right lot bit super
    always never ever often already much many great good nice""".split()  # noqa: SIM905
_ONESELF = r"(?i)\b(?:i|my|me|we|our|us)\b|\u6211"

_MONTHS = """january february march april may june july august september october november december
    enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre""".split()  # noqa: SIM905
_DATE = (  # 2026-03-07, 2026-03; 7 March, 2026, 7th of March, 7 de marzo de 2026, March 7th, 2026, in March
    r"(?<!\d)(\d{4})[-/\u5e74\ub144] ?(\d\d?)(?:[-/\u6708\uc6d4] ?(\d\d?))?(?!\d)|"
    r"\b(?:(\d\d?)(?:st|nd|rd|th)? (?:of |de )?|(in|during|en) )?"
    rf"({'|'.join([*_MONTHS, 'sept', *(name[:3] for name in _MONTHS)])})\b\.?"
    r"(?: (\d\d?)(?:st|nd|rd|th)?\b)?(?:,? (?:del? )?(\d{4})\b)?"
)


def named_days(text: str, today: datetime.date) -> Iterator[tuple[datetime.date, int]]:
    """Each date in the text, without a year the last: its first day, and how many days count: the next one as well."""
    for year, month, day, before, within, name, after, later in re.findall(_DATE, text[:2_000].casefold()):
        with contextlib.suppress(ValueError):  # no such day
            number = int(month or [form[:3] for form in _MONTHS].index(name[:3]) % 12 + 1)
            on = day or before or after
            first = datetime.date(int(year or later or today.year), number, int(on or 1))
            if not (year or later) and first > today:
                first = first.replace(year=first.year - 1)
            if 1970 < first.year < 9999 and (on or within or year or later):
                yield first, 2 if on else 32


def rough_scores(holders: dict[str, set[int]], weights: dict[str, float]) -> tuple[dict[int, float], dict[int, float]]:
    """The weights of the terms that each doc holds; the same with those that its neighbours lend, for the best LENDERS:
    also of docs that are not there, since only the rows tell where a session ends."""
    own: dict[int, float] = {}
    for term, docs in holders.items():
        for doc in docs:
            own[doc] = own.get(doc, 0.0) + weights[term]
    best = own if len(own) <= LENDERS else heapq.nlargest(LENDERS, own, key=lambda doc: (own[doc], doc))
    rough = {doc: own[doc] for doc in best}
    for doc in best:
        for step, share in CONTEXT.items():
            rough[doc - step] = rough.get(doc - step, own.get(doc - step, 0.0)) + share * own[doc]
    return own, rough


def score_row(row: Document, holders: dict[str, set[int]], weights: dict[str, float], length: float) -> float:
    """BM25 of the row's own terms and, lower, of the messages around it, times what its length and form say."""
    counts = collections.Counter(row.terms.split())
    norm = 1 - B + B * counts.total() / max(1.0, length)
    score = 0.0
    for term, docs in holders.items():
        count = counts[term] / norm or float(row.doc in docs)  # a day is no word of the row
        if row.store == "recall":
            for step, share in CONTEXT.items():
                if row.doc + step in docs:
                    count += share + (ASKED if step == -1 and row.asked > 0 else 0.0)
        score += weights[term] * count * (K1 + 1) / (count + K1)
    if row.store == "archival":
        return score
    score *= math.pow(min(1.0, SHORT_WORDS / max(1, row.words)), PRIOR) * (1 - ASKING * row.asking)
    return score * (1 + OPENING) if row.asked < 0 and row.asking < 1 else score


def fuse(by_words: list[tuple[int, float]], near: Sequence[int]) -> list[tuple[int, float]]:
    """(doc, score) by the places in both rankings; what vectors alone find comes in among the rest."""
    scores: dict[int, float] = {}
    for weight, ranking in ((1.0, [doc for doc, _ in by_words[:CANDIDATES]]), (NEAR, near)):
        for place, doc in enumerate(ranking, 1):
            scores[doc] = scores.get(doc, 0.0) + weight / (NEAR_PLACE + place)
    best = sorted(scores.items(), key=lambda item: item[1], reverse=True)
    return best + [item for item in by_words[CANDIDATES:] if item[0] not in scores]


def pack_vector(values: Sequence[float]) -> bytes:
    """A vector of length 1, as 16-bit floats. Raises ValueError for one without a direction."""
    length = math.hypot(*values)
    if not 0 < length < math.inf:
        raise ValueError("no vector")
    return struct.pack(f"{len(values)}e", *(value / length for value in values))


def unnamed(query: str, names: Iterable[str]) -> str:
    """The query without names: vectors draw a name to the messages that mention it, not to what its owner said."""
    parts = [re.escape(part) for name in names for part in name.split() if len(part) > 1]
    pattern = rf"\b(?:{'|'.join(parts)})(?:['\u2019]s)?\b" if parts else "(?!)"
    return re.sub(pattern, " ", query, flags=re.IGNORECASE).strip() or query


# ======================================================================================================================
# 5. Store: agents, chat messages, memory and events in a database; its search; one agent as a file
# ======================================================================================================================

_function_of = functools.cache(function_of)


def apply(call: Callable[..., T], values: JSON, place: str = "") -> T:
    """What `call` makes of values that somebody sent; null: the default. With a `place`, which errors then name, no
    others may be there. Raises Refused (bad_config)."""
    function = _function_of(call)
    if place and (unknown := values.keys() - function.parameters["properties"].keys()):
        raise Refused("bad_config", f"{place}: unknown {quote(min(unknown))}; expected {function.usage}")
    try:
        return call(**function.bind({key: value for key, value in values.items() if value is not None}))
    except InvalidRequest as error:
        raise Refused("bad_config", f"{place}: {error}" if place else str(error)) from None


@dataclass(eq=False, repr=False)
class Settings:
    """How a model samples; None: as it does by itself."""

    temperature: Annotated[float, 0, 2] | None = None
    top_p: Annotated[float, 0, 1] | None = None
    max_tokens: Annotated[int, 1, 10_000_000] | None = None
    seed: Annotated[int, -(2**53), 2**53] | None = None
    reasoning_effort: Annotated[str, 1, 20] | None = None


@dataclass(eq=False, repr=False)
class Config:
    """How an agent works, as it is stored; None: the default of its server, or of its model."""

    model: Annotated[str, 1, MAX_MODEL_NAME] | None = None
    context_window: Annotated[int, 1, 100_000_000] | None = None  # tokens
    tools: Annotated[list[str], 1, 1_000] | None = None  # None: the memory tools
    system: Annotated[str, 1, 20_000] | None = None
    max_steps: Annotated[int, 1, 1_000] | None = None
    heartbeat_interval: Annotated[int, 60, 10_000_000] | Literal[0] = 0  # seconds; 0: none
    timezone: Annotated[str, 1, MAX_NAME] | None = None  # an IANA name
    settings: dict[str, Any] = field(default_factory=dict)  # those of Settings that are not None

    def __post_init__(self) -> None:
        settings = apply(Settings, self.settings, "settings")
        self.settings = {name: value for name, value in vars(settings).items() if value is not None}


@dataclass(eq=False, repr=False)
class State:
    """What else an agent goes on from."""

    cut: Annotated[int, 0, 2**53] = 0  # the id of the first chat message in view
    last_passage: Annotated[int, 0, 10**15] = 0  # the id of the last passage that was ever kept
    last_user: str | None = None  # when a user spoke last
    summary: str | None = None  # of what has left the view, as a model gets it
    gist: str | None = None  # its words alone
    warned: bool = False  # whether the model was told that its window is nearly full
    paused_until: float = 0.0  # timed heartbeats rest until then
    turn: str | None = None  # the turn that runs
    input_tokens: int = 0  # of all model calls, also those of failed turns and compactions
    output_tokens: int = 0


@dataclass(repr=False)
class AgentRecord:
    """The agent's row: what is known of it beside its messages, memory and events."""

    name: str
    config: JSON
    blocks: list[JSON]  # of core memory, in order: the fields of Block
    base_url: str | None = None  # an endpoint of the agent's own; only Python sets it, never the wire or an import
    state: JSON = field(default_factory=dict)  # what changes from step to step: where the window begins, its summary, …
    created: str = field(default_factory=now_text)
    last_active: str = field(default_factory=now_text)
    last_seq: int = 0
    id: int = 0

    def decode(self) -> typing.Self:
        """A row's record, its JSON read. What is damaged becomes what no agent opens with: a backup is the way back."""
        damaged = {"damaged": True}
        for column, instead in (("config", damaged), ("state", damaged), ("blocks", [damaged])):
            value = None
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                value = decode_json(getattr(self, column))
            setattr(self, column, value if isinstance(value, type(instead)) else instead)
        return self

    def check(self) -> None:
        """Complete config, state and blocks. Raises Refused for what no agent can go on from."""
        self.config = vars(apply(Config, self.config, "agent.config"))
        self.state = vars(apply(State, self.state, "agent.state"))
        self.blocks = [vars(apply(Block, values, "agent.blocks")) for values in self.blocks]


class StoredEvent(NamedTuple):
    """An event as it is on disk."""

    seq: int
    kind: str
    turn_id: str  # of a message that entered the turn of another, its own
    text: str  # its frame with seq and time, but without agent_name: names change


@dataclass(eq=False, repr=False)
class RequestRecord:
    """One model call as sent, by reference to chat messages, which never change, and as answered."""

    turn_id: str
    step: int
    head: str  # JSON of everything but messages and tools
    system: str  # the encoded system message
    summary: str  # the encoded summary message, or empty
    tools: str
    extra: str  # an encoded message that was sent once and not kept (a request to correct), or empty
    first: int  # the ids of the chat messages between summary and extra
    last: int
    sent: str = ""  # the body, until its digest is stored
    response: JSON = field(default_factory=dict)
    usage: JSON = field(default_factory=dict)
    first_token_ms: int | None = None
    total_ms: int = 0
    shape: list[str] = field(default_factory=list)  # maker and rules, see shape; empty: as stored

    def body(self, messages: Iterable[str]) -> str:
        """What is sent: each chat message is encoded once, however often it is sent."""
        bodies: Iterable[str] = filter(None, (self.system, self.summary, *messages, self.extra))
        bodies = shape(bodies, *self.shape) if self.shape else bodies
        tools = f',"tools":{self.tools}' if self.tools else ""
        return f'{self.head[:-1]},"messages":[{",".join(bodies)}]{tools}}}'


@dataclass(eq=False, repr=False)
class Changes:
    """What one transaction stores for one agent: a step, a part of one, or an edit from outside."""

    events: list[Event] = field(default_factory=list)
    messages: list[ChatMessage] = field(default_factory=list)
    resaid: list[ChatMessage] = field(default_factory=list)  # stored before: since then other words belong to them
    documents: list[Document] = field(default_factory=list)  # what else becomes searchable: passages
    removed: list[int] = field(default_factory=list)  # the ids of passages that are deleted
    request: RequestRecord | None = None
    columns: JSON = field(default_factory=dict)  # config, state, blocks, where they have changed


# ---- the database ----------------------------------------------------------------------------------------------------
# SQL is what SQLite and PostgreSQL share; a class for each knows what they do not, and connections to either are spoken
# to as sqlite3's. What stands below are functions of a connection: the store runs them in its transactions, so does the
# command line.

SCHEMA_VERSION = 3  # 1 and 2: what earlier versions made
APPLICATION_ID = 0x6D656D77  # "memw" in the header of the file
SCHEMA = """
CREATE TABLE agents (  -- deleted: when; empty for a purged one, of which only the name and its last seq are left
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, config TEXT NOT NULL, state TEXT NOT NULL,
    blocks TEXT NOT NULL, created TEXT NOT NULL, last_active TEXT NOT NULL, last_seq INTEGER NOT NULL, base_url TEXT,
    deleted TEXT) STRICT;
CREATE UNIQUE INDEX agents_live ON agents (name) WHERE deleted IS NULL;
CREATE INDEX agents_name ON agents (name, deleted);
CREATE TABLE messages (
    agent INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE, id INTEGER NOT NULL,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant', 'tool', 'system')), time TEXT NOT NULL, text TEXT NOT NULL,
    body TEXT NOT NULL, turn_id TEXT NOT NULL, step INTEGER NOT NULL, seq INTEGER NOT NULL,
    PRIMARY KEY (agent, id)) STRICT;
CREATE TABLE memory (  -- doc: agent, store and place, see remember; terms: those of the text, in order
    doc INTEGER PRIMARY KEY, agent INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE,
    store TEXT NOT NULL CHECK (store IN ('recall', 'archival')), item INTEGER NOT NULL, role TEXT NOT NULL,
    time TEXT NOT NULL, text TEXT NOT NULL, terms TEXT NOT NULL, words INTEGER NOT NULL, asking REAL NOT NULL,
    asked INTEGER NOT NULL, vector BLOB, UNIQUE (agent, store, item)) STRICT;
CREATE INDEX memory_times ON memory (agent, store, time, doc);
CREATE INDEX memory_unembedded ON memory (doc) WHERE vector IS NULL;
CREATE TABLE postings (term TEXT NOT NULL, doc INTEGER NOT NULL, PRIMARY KEY (term, doc)) STRICT, WITHOUT ROWID;
CREATE TABLE events (  -- turn_id: of a message that entered the turn of another, its own
    agent INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE, seq INTEGER NOT NULL, turn_id TEXT NOT NULL,
    kind TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY (agent, seq)) STRICT;
CREATE INDEX events_turn ON events (agent, turn_id, seq);
CREATE UNIQUE INDEX events_start ON events (agent, turn_id) WHERE kind = 'agent_response_start';
CREATE TABLE requests (  -- pieces: a compressed JSON list of head, system, summary, tools, extra, shape; of step 0,
    -- which is the end of a turn: of the agent's config, state, blocks as of then
    agent INTEGER NOT NULL REFERENCES agents ON DELETE CASCADE, turn_id TEXT NOT NULL, step INTEGER NOT NULL,
    time TEXT NOT NULL, pieces BLOB NOT NULL, first INTEGER NOT NULL, last INTEGER NOT NULL, digest BLOB NOT NULL,
    response TEXT NOT NULL, usage TEXT NOT NULL, first_token_ms INTEGER, total_ms INTEGER NOT NULL,
    PRIMARY KEY (agent, turn_id, step)) STRICT;
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;  -- of the database as a whole
"""

SqlConnection = sqlite3.Connection
EACH_TERM = """json_each('["' || replace(terms, ' ', '","') || '"]')"""  # of a document, as `value`


class Sqlite:
    """An SQLite file in WAL mode, or memory for ":memory:"."""

    size = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    size_of = "coalesce(length(CAST({} AS BLOB)), 0)"
    advice = "stop the memws server that uses it, or name another file with --db"
    mark = f"""SELECT CASE application_id WHEN {APPLICATION_ID} THEN 'memws ' || user_version ELSE '' END
        FROM pragma_application_id, pragma_user_version WHERE EXISTS (SELECT 1 FROM sqlite_master)"""

    def __init__(self, path: str, sync: str = "full") -> None:
        self.path, self.memory = path, path == ":memory:"
        self._file = path if self.memory else os.path.realpath(path)  # a link must not get past the lock
        self._sync, self._connections = sync, contextlib.ExitStack()

    def open(self) -> SqlConnection:
        """A connection to write with, of the only server on this file. Raises UsageError where it cannot be used."""
        with usable(self.path, self.advice):
            connection = self.connect()
            is_new = not has_schema(self, connection)  # what is not ours is left as it is
            if not self.memory:  # a lock on a file beside it, which ends with the process, keeps other servers off
                self.connect(".lock").executescript("PRAGMA journal_mode = OFF; BEGIN EXCLUSIVE")
            if is_new:  # a power cut can take nothing yet: one wait for the disk is enough, at the switch to WAL
                marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION}"
                connection.executescript(f"PRAGMA synchronous = OFF; BEGIN; {SCHEMA}; {marks}; COMMIT")
                connection.execute("PRAGMA journal_mode = MEMORY")
            settings = f"PRAGMA synchronous = {self._sync}; PRAGMA journal_mode = WAL; PRAGMA foreign_keys = ON"
            connection.executescript(settings)
        return connection

    def connect(self, ending: str = "") -> SqlConnection:
        """A connection that leaves transactions to us and may be used and closed by any thread."""
        file, timeout = f"{self._file}{ending}", 0 if ending else BUSY_TIMEOUT
        if not (self.memory or pathlib.Path(file).exists()):
            pathlib.Path(file).touch(0o600)  # for its owner only
        connection = sqlite3.connect(file, timeout=timeout, isolation_level=None, check_same_thread=False)
        connection.text_factory = functools.partial(str, encoding="utf-8", errors="replace")  # a bad byte ends nothing
        return self._connections.enter_context(contextlib.closing(connection))

    def back_up(self, file: str) -> None:
        """Copy the database into an empty file, as of one moment, also while a server writes."""
        self.connect().execute("VACUUM INTO ?", (file,))

    def close(self) -> None:
        self._connections.close()


POSTGRES = "postgresql://", "postgres://"  # how its addresses begin
_POSTGRES_SCHEMA = {  # what the schema says otherwise there; times and names are compared as bytes
    "INTEGER PRIMARY KEY AUTOINCREMENT": "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY",
    "deleted TEXT": "deleted TEXT, owner TEXT NOT NULL DEFAULT ''",
    "STRICT(, WITHOUT ROWID)?": "",
    "INTEGER": "BIGINT",
    "REAL": "DOUBLE PRECISION",
    "BLOB": "BYTEA",
    "TEXT": 'TEXT COLLATE "C"',
}
_POSTGRES_BEGIN = {"BEGIN IMMEDIATE": "BEGIN", "BEGIN": "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"}


class Postgres:
    """A PostgreSQL database through psycopg 3. Its agents have an owner more: the lease of a server, see Leases."""

    memory = False
    size = "SELECT pg_database_size(current_database())"
    size_of = "coalesce(pg_column_size({}), 0)"
    advice = "check the address, and whether PostgreSQL runs there; or name another database with --db"
    mark = "SELECT coalesce(obj_description(oid, 'pg_class'), '') FROM pg_class WHERE oid = to_regclass('agents')"

    def __init__(self, address: str) -> None:
        self.driver = needed("psycopg", 'PostgreSQL needs psycopg: pip install "psycopg[binary]"')
        self.path = public_url(address)
        self._is_over = False
        self._lines: list[Any] = []  # psycopg's connections
        try:
            if re.search("%00|[@/?#].*@", address.partition("://")[2]):
                raise ValueError
            self._about = self.driver.conninfo.conninfo_to_dict(address)
        except (ValueError, self.driver.Error):  # what stands in a wrong place may be secret: nothing is quoted
            text = "expected postgresql://user:password@host/database, in a password %40 for @, %2F for / and %25 for %"
            raise UsageError(f"cannot read the address {self.path!r}; {text}") from None

    def open(self) -> SqlConnection:
        """A connection to write with; a new database gets its tables. Raises UsageError where it cannot be used."""
        with usable(self.path, self.advice):
            connection = self.connect("idle_in_transaction_session_timeout")
        if int(connection.execute("SHOW server_version_num").fetchone()[0]) < 140_000:
            raise UsageError(f"{self.path!r} is older than PostgreSQL 14, from which on idle sessions end in time")
        with transaction(connection), usable(self.path, "name another database with --db"):
            connection.execute("SELECT pg_advisory_xact_lock(?)", (APPLICATION_ID,))  # others may start as well
            if not has_schema(self, connection):
                schema = f"{SCHEMA}; COMMENT ON TABLE agents IS 'memws {SCHEMA_VERSION}'"
                for name, instead in _POSTGRES_SCHEMA.items():
                    schema = re.sub(rf"\b{name}\b", instead, schema)
                connection.execute(schema)
        return connection

    def connect(self, timeout: str = "") -> SqlConnection:
        """A connection for one thread, which that timeout of PostgreSQL's ends after LEASE_TIMEOUT."""
        return cast(SqlConnection, PostgresConnection(self, timeout))

    def dial(self, timeout: str) -> Any:
        """The same as psycopg has it."""
        if self._is_over:
            raise self.driver.OperationalError("this server stops")
        seconds = int(BUSY_TIMEOUT)
        about: JSON = {"application_name": "memws", "connect_timeout": seconds, "tcp_user_timeout": seconds * 1000}
        connection = self.driver.connect(**(about | self._about), autocommit=True)
        self._lines = [*(line for line in self._lines if not line.closed), connection]
        if timeout:
            connection.execute(f"SET {timeout} = '{LEASE_TIMEOUT:g}s'")
        return connection

    def dump_command(self, file: str) -> str:
        """What a shell is told to make a backup."""
        about = {name: value for name, value in self._about.items() if "password" not in name}
        return shlex.join(["pg_dump", "--format=custom", f"--file={file}", self.driver.conninfo.make_conninfo(**about)])

    def hang_up(self) -> None:
        """Let nobody wait any longer for a database that does not answer."""
        self._is_over = True
        for line in self._lines:
            with contextlib.suppress(OSError, self.driver.Error), socket.socket(fileno=os.dup(line.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for line in self._lines:
            line.close()


class PostgresConnection:
    """A connection that is spoken to as one of sqlite3, and raises its errors; a broken one is made anew at BEGIN."""

    def __init__(self, database: Postgres, timeout: str) -> None:
        self._database, self._timeout = database, timeout
        with self._translated():
            self._connection = database.dial(timeout)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._database.driver.Error as error:  # both have the names of the standard (PEP 249)
            kind = next(each.__name__ for each in type(error).__mro__ if hasattr(sqlite3, each.__name__))
            text = error.diag.message_primary or str(error)
            raise getattr(sqlite3, kind)(" ".join(text.split())) from error

    def execute(self, sql: str, values: Sequence[Any] = ()) -> Any:
        with self._translated():
            if sql in _POSTGRES_BEGIN:
                return self._begin(_POSTGRES_BEGIN[sql])
            sql = sql.replace("?", "%s").replace(EACH_TERM, "string_to_table(terms, ' ') AS each (value)")
            return self._connection.execute(sql, values or None)

    def _begin(self, sql: str) -> None:
        try:
            self._connection.execute(sql)
        except self._database.driver.OperationalError:
            self._connection.close()
            self._connection = self._database.dial(self._timeout)
            self._connection.execute(sql)

    def executemany(self, sql: str, rows: Iterable[Any]) -> None:
        """An INSERT of many rows, by COPY, which is several times as fast."""
        table = sql.removeprefix("INSERT INTO ").partition(" VALUES ")[0]
        with self._translated(), self._connection.cursor() as cursor, cursor.copy(f"COPY {table} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    def stream(self, sql: str, values: Sequence[Any]) -> Iterator[Any]:
        """The rows of a result that is never whole in memory."""
        with self._translated():
            yield from self._connection.cursor().stream(sql.replace("?", "%s"), values)

    def close(self) -> None:
        self._connection.close()


def database_at(address: str, sync: str = "full") -> Sqlite | Postgres:
    """The database of a file name, ":memory:" or a postgresql:// address. Raises UsageError without its driver."""
    return Postgres(address) if address.startswith(POSTGRES) else Sqlite(address, sync)


@contextlib.contextmanager
def usable(path: str, advice: str) -> Iterator[None]:
    """Raises UsageError where the database cannot be used by what is inside."""
    try:
        yield
    except (OSError, sqlite3.Error, ValueError) as error:  # ValueError: a damaged schema that is no UTF-8
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot use the database {path!r} ({reason}); {advice}") from error


def has_schema(database: Sqlite | Postgres, connection: SqlConnection) -> bool:
    """Whether there are tables; a new database has none. Raises UsageError for those of another program or version."""
    row = connection.execute(database.mark).fetchone()
    program, _, version = row[0].partition(" ") if row else ("memws", "", SCHEMA_VERSION)
    if program != "memws":
        raise UsageError(f"{database.path!r} is a database of another program; name another one with --db")
    if str(version) != str(SCHEMA_VERSION):
        found = f"was written by another memws (schema {version}, not {SCHEMA_VERSION}); name another one with --db"
        raise UsageError(f"{database.path!r} {found}; export with that memws and import with this one move agents")
    return row is not None


@contextlib.contextmanager
def transaction(connection: SqlConnection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """All of what is inside, or nothing; "BEGIN": what is read is of one moment. Raises StoreFailed."""
    try:
        connection.execute(begin)
        yield
        connection.execute("COMMIT")
    except Exception as error:  # whatever fails inside, nothing of it may stay
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise store_error(error) from error


def store_error(error: Exception) -> MemwsError:
    """The error as callers of the store know it."""
    if isinstance(error, MemwsError):
        return error
    if "agents_live" in str(error):  # another server was a little faster
        return Refused("name_taken", "another agent has got the name just now; choose another name or load it")
    if not isinstance(error, sqlite3.Error):  # what a damaged row reads like, or a fault of ours
        logger.error("a transaction failed", exc_info=error)
    return StoreFailed(f"the database refused: {error}")


def insert(db: SqlConnection, table: str, ending: str = "", /, **values: Any) -> Any:
    """Store a row, objects and lists as JSON; what `ending` is to return."""
    row = [encode_json(value) if isinstance(value, (dict, list)) else value for value in values.values()]
    return db.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(row))}) {ending}", row)


def insert_all(db: SqlConnection, table: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Store rows in one statement: a server that is paused leaves none half sent, which would hold locks."""
    if rows:
        marks = ", ".join([f"({', '.join('?' * len(rows[0]))})"] * len(rows))
        db.execute(f"INSERT INTO {table} VALUES {marks}", list(itertools.chain(*rows)))


def write_setting(db: SqlConnection, name: str, value: str) -> None:
    sql = "INSERT INTO settings VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
    db.execute(sql, (name, value))


# ---- memory, its search, its vectors ---------------------------------------------------------------------------------
# A doc is a number made of agent, store and place. Messages of a session that lend each other words have places side by
# side, others stand APART, farther than CONTEXT reaches: those around a message are found by arithmetic, and a range of
# docs is one agent's memory, whose terms a search reads and counts without those of others.

PLACES, APART = 1 << 32, 8
_DOCUMENT = "item, store, role, time, text, doc, terms, words, asking, asked"
Span = tuple[int, int]  # the first and the last doc


def remember(db: SqlConnection, agent: int, document: Document, joined: bool | None = None) -> int:
    """Store what a search is to find once it is indexed; its doc. joined: to the session before it, where known."""
    low = (agent * 2 + STORES.index(document.store)) * PLACES
    sql = "SELECT doc, time, words, text FROM memory WHERE doc BETWEEN ? AND ? AND item < ? ORDER BY doc DESC LIMIT 1"
    last = db.execute(sql, (low, low + PLACES - 1, document.id)).fetchone()
    text, moment = clean_text(document.text), clean_text(document.time)
    words, terms = len(re.findall(_WORD, text)), split_terms(text)
    doc, asked = low, -1
    if last is not None:
        joined = seconds_between(last[1], moment) <= SESSION_GAP if joined is None else joined
        beside = joined and document.store == "recall" and words <= SHORT_WORDS and last[2] <= SHORT_WORDS
        doc = last[0] + (1 if beside else APART)
        asked = int(beside and asking(last[3]) > 0) if joined else -1
        moment = max(moment, last[1])  # a clock may be set back; searches by time rely on the order of docs
    about = document.store, document.id, clean_text(document.role), moment, text
    row = (doc, agent, *about, " ".join(terms), words, asking(text) - bool(re.search(_ONESELF, text[:4096])), asked)
    db.execute("INSERT INTO memory VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)
    return doc


def index(db: SqlConnection, where: str, *values: object) -> None:
    """Store the postings of documents: sorted, so that those of many are stored several times as fast."""
    sql = f"SELECT DISTINCT value, doc FROM memory, {EACH_TERM} WHERE terms <> '' AND {where} ORDER BY value, doc"
    db.execute(f"INSERT INTO postings {sql}", values)


def forget(db: SqlConnection, where: str, *values: object) -> None:
    """Take one document or all of an agent out of memory: no other's doc lies between theirs."""
    sql = f"""WITH gone AS (SELECT doc, terms FROM memory WHERE {where}) DELETE FROM postings
        WHERE term IN (SELECT value FROM gone, {EACH_TERM})
        AND doc BETWEEN (SELECT min(doc) FROM gone) AND (SELECT max(doc) FROM gone)"""
    db.execute(sql, values)
    db.execute(f"DELETE FROM memory WHERE {where}", values)


def _span(db: SqlConnection, agent: int, store: str, query: Query) -> Span:
    """The first and the last doc that may be found: docs grow with times and items."""
    newest = query.newest if store == "recall" else 2**53
    sql = "SELECT doc FROM memory WHERE agent = ? AND store = ? AND time"
    first = db.execute(f"{sql} >= ? ORDER BY time, doc LIMIT 1", (agent, store, query.since)).fetchone()
    sql = f"{sql} < ? AND item <= ? ORDER BY time DESC, doc DESC LIMIT 1"
    last = db.execute(sql, (agent, store, query.until, newest)).fetchone()
    return (first[0], last[0]) if first and last else (0, -1)


def _holders(db: SqlConnection, terms: Iterable[str], spans: list[Span]) -> dict[str, set[int]]:
    """The docs of each term, the rarest term first, POSTINGS together, the newest first."""
    sql = "SELECT count(*) FROM (SELECT 1 FROM postings WHERE term = ? AND doc BETWEEN ? AND ? LIMIT ?) AS counted"
    counts = {term: sum(db.execute(sql, (term, *span, COUNTED)).fetchone()[0] for span in spans) for term in terms}
    sql = "SELECT doc FROM postings WHERE term = ? AND doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT ?"
    found: dict[str, set[int]] = {}
    room = POSTINGS
    for term in sorted((term for term in terms if counts[term]), key=lambda term: counts[term]):
        found[term] = {doc for span in spans for (doc,) in db.execute(sql, (term, *span, room))}
        room -= len(found[term])
        if room <= 0:
            break
    return found


def _dated(db: SqlConnection, agent: int, query: Query) -> dict[str, set[int]]:
    """The docs of each date that the query names, the newest first."""
    sql = "SELECT doc FROM memory WHERE doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT ?"
    found = {}
    for first, days in itertools.islice(named_days(query.text, datetime.datetime.now(query.zone).date()), DAYS):
        start = datetime.datetime.combine(first, datetime.time(), query.zone).timestamp()
        ends = (datetime.datetime.fromtimestamp(start + 86_400 * day, datetime.UTC) for day in (0, days))
        since, until = map(utc_text, ends)
        part = query._replace(since=max(query.since, since), until=min(query.until, until))
        spans = [_span(db, agent, store, part) for store in query.stores]
        found[since + until] = {doc for span in spans for (doc,) in db.execute(sql, (*span, POSTINGS // DAYS))}
    return found


def _rows(db: SqlConnection, docs: list[int]) -> dict[int, Document]:
    rows: dict[int, Document] = {}
    for start in range(0, len(docs), 500):
        some = docs[start : start + 500]
        sql = f"SELECT {_DOCUMENT} FROM memory WHERE doc IN ({', '.join('?' * len(some))})"
        rows |= {row.doc: row for row in itertools.starmap(Document, db.execute(sql, some))}
    return rows


def _ranked(db: SqlConnection, agent: int, query: Query, spans: list[Span]) -> list[tuple[int, float]]:
    """(doc, score) of the documents that hold a word of the query or are of its days, and of those beside the best. The
    best CANDIDATES are ranked in full; the others follow, with score 0, in order where the page reaches them."""
    terms = dict(itertools.islice(collections.Counter(split_terms(query.text)).items(), QUERY_TERMS))
    days = _dated(db, agent, query)
    holders = _holders(db, terms, spans) | days
    sql = "SELECT item FROM memory WHERE doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT 1"  # about their number
    size = max([sum(item for span in spans for (item,) in db.execute(sql, span)), *map(len, holders.values())])
    weights = {term: math.log(1 + (size - len(docs) + 0.5) / (len(docs) + 0.5)) for term, docs in holders.items()}
    weights = {term: weight * (1 + AGAIN * math.log(terms.get(term, 1))) for term, weight in weights.items()}
    weights |= {day: DATED * weights[day] for day in days}
    weights |= {term: FAINT * weights[term] for term in holders.keys() & map(stem, _FAINT)}
    own, rough = rough_scores(holders, weights)
    best = heapq.nlargest(CANDIDATES, rough, key=lambda doc: (rough[doc], doc))
    rows = _rows(db, [doc for doc in best if any(low <= doc <= high for low, high in spans)])
    length = sum(row.terms.count(" ") + 1 for row in rows.values()) / max(1, len(rows))
    names = {role: set(split_terms(role)) for role in {row.role for row in rows.values()}}
    weights |= {name: NAMED * weights[name] for name in holders.keys() & set[str]().union(*names.values())}
    you = "assistant" if re.search(r"(?i)\byour?\b", query.text) and not re.search(_ONESELF, query.text) else None
    named = {role: role == you or not parts.isdisjoint(terms) for role, parts in names.items()}
    scored: list[tuple[float, str, int]] = []
    for doc, row in rows.items():
        score = score_row(row, holders, weights, length) * (1 + SPEAKER * named[row.role])
        scored.append((score, row.time if len(spans) > 1 else "", doc))
    scored.sort(reverse=True)
    rest = [(own[doc], doc) for doc in own.keys() - rows.keys()]
    if query.offset + query.limit > len(scored):
        rest.sort(reverse=True)
    return [(doc, score) for score, _, doc in scored] + [(doc, 0.0) for _, doc in rest]


def _newest(db: SqlConnection, spans: list[Span], limit: int, part: str = "") -> list[tuple[int, float]]:
    """Those of the newest documents that hold `part` as it stands, the newest first."""
    sql = "SELECT time, doc, text FROM memory WHERE doc BETWEEN ? AND ? ORDER BY doc DESC LIMIT ?"
    found = [row[:2] for span in spans for row in db.execute(sql, (*span, limit)) if part in row[2].lower()]
    return [(doc, 0.0) for _, doc in sorted(found, reverse=True)]


def nearest(db: SqlConnection, spans: list[Span], vector: bytes) -> list[int]:
    """The CANDIDATES docs whose vectors are most like the query's, each with those of the messages beside it."""
    numpy: Any = importlib.import_module("numpy")  # the embedder needed it
    query = numpy.frombuffer(vector, numpy.float16).astype(numpy.float32)
    sql = "SELECT doc, vector FROM memory WHERE doc BETWEEN ? AND ? AND length(vector) = ? ORDER BY doc"
    docs: list[int] = []
    parts = [numpy.zeros(0, numpy.float32)]
    for span in sorted(spans):
        cursor = db.execute(sql, (*span, len(vector)))
        while rows := cursor.fetchmany(VECTOR_BLOCK):
            docs += [doc for doc, _ in rows]
            matrix = numpy.frombuffer(b"".join(vector for _, vector in rows), numpy.float16)
            parts.append(matrix.reshape(len(rows), -1).astype(numpy.float32) @ query)
    own = numpy.concatenate(parts)
    likeness, beside = own.copy(), numpy.diff(numpy.array(docs, numpy.int64)) == 1
    likeness[1:][beside] += NEAR_BESIDE * own[:-1][beside]
    likeness[:-1][beside] += NEAR_BESIDE * own[1:][beside]
    return [docs[place] for place in numpy.argsort(-likeness, kind="stable")[:CANDIDATES]]


def search(db: SqlConnection, agent: int, query: Query) -> tuple[list[Document], int]:
    """The hits from `offset` on, best first and newest first on ties, and the number of all."""
    query = query._replace(text=clean_text(query.text[:QUERY_CHARACTERS]).strip())
    spans = [_span(db, agent, store, query) for store in query.stores]
    ranking = _ranked(db, agent, query, spans)
    if not ranking and query.text:
        ranking = _newest(db, spans, SCANNED, query.text.lower())
    if query.vector and query.text:
        ranking = fuse(ranking, nearest(db, spans, query.vector))
    total, last = len(ranking), query.offset + query.limit
    if not ranking and not split_terms(query.text):
        ranking = _newest(db, spans, last)
        sql = "SELECT count(*) FROM memory WHERE agent = ? AND store = ? AND doc + 0 BETWEEN ? AND ?"  # by the index
        places = zip(query.stores, spans, strict=True)
        total = sum(db.execute(sql, (agent, store, *span)).fetchone()[0] for store, span in places)
    page = ranking[query.offset : last]
    rows = _rows(db, [doc for doc, _ in page])
    return [rows[doc]._replace(score=score) for doc, score in page], total


def read_setting(db: SqlConnection, name: str) -> str | None:
    return next((value for (value,) in db.execute("SELECT value FROM settings WHERE name = ?", (name,))), None)


def clear_vectors(db: SqlConnection, model: str, done: int) -> int | None:
    """Clear another model's vectors of a batch of documents above `done`; the last of them, None where none is left."""
    sql = "SELECT max(doc) FROM (SELECT doc FROM memory WHERE doc > ? ORDER BY doc LIMIT ?) AS batch"
    last: int | None = db.execute(sql, (done, VECTOR_BLOCK)).fetchone()[0]
    if last is None:
        write_setting(db, "embedding_model", model)
    sql = "UPDATE memory SET vector = NULL WHERE doc > ? AND doc <= ? AND vector IS NOT NULL"
    db.execute(sql, (done, last))  # None: of no document
    return last


def without_vector(db: SqlConnection, limit: int) -> list[tuple[int, str]]:
    """(doc, text) of memory that has no vector yet."""
    return db.execute("SELECT doc, text FROM memory WHERE vector IS NULL ORDER BY doc LIMIT ?", (limit,)).fetchall()


def keep_vectors(db: SqlConnection, rows: list[tuple[bytes, int, str]]) -> None:
    """Store (vector, doc, text), an empty vector for a text that the model refuses; what is gone gets none."""
    for row in rows:
        db.execute("UPDATE memory SET vector = ? WHERE doc = ? AND text = ?", row)


# ---- steps -----------------------------------------------------------------------------------------------------------

EVENT_PAGE = 262_144  # characters of stored events that are read at once; a reader is as fast as its client
_PIECES = ("head", "system", "summary", "tools", "extra", "shape")  # what requests repeat at every step
_packed = functools.lru_cache(64)(lambda text: zlib.compress(text.encode(), 1))  # they rarely change from turn to turn


def commit(db: SqlConnection, agent: int, changes: Changes, owner: str | None = None) -> list[StoredEvent]:
    """Store all of `changes`, only for that `owner` where several servers share the database; the events with their
    seq. Raises StoreFailed where the agent is gone, LeaseLost."""
    now, count = now_text(), len(changes.events)
    fence, owners = ("", ()) if owner is None else ("AND owner = ?", (owner,))
    columns = "".join(f"{name} = ?, " for name in changes.columns)
    sql = f"""UPDATE agents SET {columns} last_seq = last_seq + ?, last_active = ? WHERE id = ? AND deleted IS NULL
        {fence} RETURNING last_seq, config, state, blocks"""
    row = db.execute(sql, (*map(encode_json, changes.columns.values()), count, now, agent, *owners)).fetchone()
    if row is None:
        lost = LeaseLost("another server runs the agent by now; send it again")
        raise lost if owners else StoreFailed("the agent was deleted or rewound meanwhile")
    stored = [
        StoredEvent(seq, kind_of(event), own_turn_id(event), encode_json(event | {"seq": seq, "time": now}))
        for seq, event in enumerate(changes.events, row[0] - count + 1)
    ]
    insert_all(db, "events (agent, seq, kind, turn_id, text)", [(agent, *event) for event in stored])
    for message in changes.messages:
        message.seq = row[0]
    insert_all(db, "messages", [(agent, *astuple(message)[:8]) for message in changes.messages])
    gone = [*(("recall", message.id) for message in changes.resaid), *(("archival", item) for item in changes.removed)]
    for store, item in gone:
        forget(db, "agent = ? AND store = ? AND item = ?", agent, store, item)
    spoken = [each for each in [*changes.messages, *changes.resaid] if each.said]
    documents = [Document(each.id, "recall", each.speaker, each.time, each.said) for each in spoken]
    for document in documents + changes.documents:
        index(db, "doc = ?", remember(db, agent, document))
    if changes.request:
        request = vars(changes.request) | {"response": clean_value(changes.request.response)}
        pieces = _packed(encode_json([request.pop(name) for name in _PIECES]))
        digest = hashlib.sha256(request.pop("sent").encode()).digest()
        insert(db, "requests", agent=agent, time=now, pieces=pieces, digest=digest, **request)
    if stored and stored[-1].kind in TERMINAL_TYPES:
        pieces = zlib.compress(f"[{','.join(row[1:])}]".encode(), 1)
        end: JSON = {"turn_id": stored[-1].turn_id, "step": 0, "time": now, "pieces": pieces, "digest": b""}
        insert(db, "requests", agent=agent, **end, first=0, last=0, response={}, usage={}, total_ms=0)
    return stored


def read_messages(
    db: SqlConnection, agent: int, before: int | None = None, limit: int = 2**53, first: int = 0
) -> list[ChatMessage]:
    """The newest `limit` chat messages from id `first` on and before another, oldest first."""
    names = "id, messages.role, messages.time, messages.text, body, turn_id, step, seq"
    sql = f"""SELECT {names}, coalesce(memory.text, ''), coalesce(memory.role, messages.role) FROM messages
        LEFT JOIN memory ON memory.agent = messages.agent AND store = 'recall' AND item = messages.id
        WHERE messages.agent = ? AND id >= ? AND id < ? ORDER BY id DESC LIMIT ?"""
    rows = db.execute(sql, (agent, first, 2**53 if before is None else before, limit))
    return [ChatMessage(*row) for row in rows][::-1]


def load_messages(db: SqlConnection, agent: int, first: int) -> tuple[list[ChatMessage], tuple[int, int, int]]:
    """The chat messages from id `first` on; the id of the last one, the number of passages, the id of the last one."""
    sql = """SELECT (SELECT coalesce(max(id), 0) FROM messages WHERE agent = ?), count(*), coalesce(max(item), 0)
        FROM memory WHERE agent = ? AND store = 'archival'"""
    return read_messages(db, agent, first=first), db.execute(sql, (agent, agent)).fetchone()


def _whole(event: StoredEvent) -> StoredEvent:
    """The event, or what stands for one that is damaged on disk: an error where a turn ends, else a correction."""
    with contextlib.suppress(ValueError):
        decode_json(event.text)
        return event
    about = {"message": "this event is damaged on disk", "turn_id": event.turn_id, "seq": event.seq, "time": now_text()}
    instead = {"type": "agent_response", "message_type": "correction", "what": "damaged"} | about
    if event.kind in TERMINAL_TYPES:
        instead = {"type": "agent_response_error", "stop_reason": "error", "code": "store_failed"} | about
    return event._replace(kind=kind_of(instead), text=encode_json(instead))


def read_events(db: SqlConnection, agent: int, after: int, limit: int, turn_id: str | None = None) -> list[StoredEvent]:
    """Stored events above `after`, in order, or those of one turn: at most `limit`, and about EVENT_PAGE characters."""
    edge = "(SELECT {}(seq) FROM events WHERE agent = ? AND turn_id = ?)"
    span = f"turn_id <> '' AND seq BETWEEN {edge.format('min')} AND {edge.format('max')} AND"  # also what entered it
    turn, values = ("", ()) if turn_id is None else (span, (agent, turn_id) * 2)
    sql = f"SELECT seq, kind, turn_id, text FROM events WHERE {turn} agent = ? AND seq > ? ORDER BY seq LIMIT ?"
    rows, size = db.execute(sql, (*values, agent, after, limit)), 0
    events: list[StoredEvent] = []
    while size < EVENT_PAGE and (row := rows.fetchone()):
        events.append(_whole(StoredEvent(*row)))
        size += len(events[-1].text)
    return events


def find_turn(db: SqlConnection, agent: int, turn_id: str) -> dict[str, str]:
    """The start of a turn and its user's message, by kind, as stored: one that entered another's turn has no start."""
    sql = """SELECT kind, text FROM events WHERE agent = ? AND turn_id = ?
        AND kind IN ('agent_response_start', 'user_message')"""
    return dict(db.execute(sql, (agent, turn_id)).fetchall())


def find_request(db: SqlConnection, agent: int, turn_id: str, step: int) -> JSON:
    """What was sent to a model for a step, rebuilt byte by byte, and what came back: {request, response, usage,
    first_token_ms, total_ms}. Raises Refused (not_found), StoreFailed."""
    sql = """SELECT pieces, first, last, digest, response, usage, first_token_ms, total_ms FROM requests
        WHERE agent = ? AND turn_id = ? AND step = ?"""
    row = db.execute(sql, (agent, turn_id, step)).fetchone()
    if row is None:
        reason = "there was none, or vacuum --keep-requests has dropped it"
        raise Refused("not_found", f"no model call of turn {quote(turn_id)}, step {step} is kept: {reason}")
    pieces, first, last, digest, answered, usage, first_token_ms, total_ms = row
    texts = dict(zip(_PIECES, decode_json(zlib.decompress(pieces)), strict=False))  # the former format has no shape
    request = RequestRecord(turn_id, step, first=first, last=last, **texts)
    sql = "SELECT body FROM messages WHERE agent = ? AND id BETWEEN ? AND ? ORDER BY id"
    body = request.body(body for (body,) in db.execute(sql, (agent, first, last)))
    if hashlib.sha256(body.encode()).digest() != digest:
        raise StoreFailed("the stored request does not match the digest of what was sent; run memws.py check")
    times = {"first_token_ms": first_token_ms, "total_ms": total_ms}
    return {"request": decode_json(body), "response": decode_json(answered), "usage": decode_json(usage), **times}


def find_passage(db: SqlConnection, agent: int, item: int) -> Document | None:
    """One passage of archival memory."""
    sql = f"SELECT {_DOCUMENT} FROM memory WHERE agent = ? AND store = 'archival' AND item = ?"
    row = db.execute(sql, (agent, item)).fetchone()
    return Document(*row) if row else None


# ---- agents ----------------------------------------------------------------------------------------------------------

_AGENT_COLUMNS = ", ".join(column.name for column in fields(AgentRecord))
_LIVE, _DELETED = "deleted IS NULL", "deleted <> ''"


def find_agent(db: SqlConnection, name: str, deleted: bool = False) -> AgentRecord:
    """The agent of that name, or the one deleted last under it. Raises Refused (unknown_agent): with the nearest."""
    where, name = _DELETED if deleted else _LIVE, unicodedata.normalize("NFC", name)
    sql = f"SELECT {_AGENT_COLUMNS} FROM agents WHERE name = ? AND {where} ORDER BY deleted DESC, id DESC LIMIT 1"
    if row := db.execute(sql, (name,)).fetchone():
        return AgentRecord(*row).decode()
    names = [row[0] for row in db.execute(f"SELECT DISTINCT name FROM agents WHERE {where}")]
    import difflib  # which no start needs

    alike = [repr(each) for each in difflib.get_close_matches(name[:MAX_NAME], names[:5000], 10, 0.0)]
    alike += ["…"] if len(names) > len(alike) else []
    known = f"{len(names)} known: {', '.join(alike)}" if names else "there are none yet"
    raise Refused("unknown_agent", f"unknown agent {quote(name)}; {known}; send create_agent first")


def list_agents(db: SqlConnection, after: str, limit: int, deleted: bool = False) -> tuple[list[AgentRecord], int]:
    """Agents with names above `after`, in order, and how many in all; deleted ones: the last of each name."""
    where = _DELETED if deleted else _LIVE
    last = f"SELECT id FROM agents AS other WHERE name = agents.name AND {where} ORDER BY deleted DESC, id DESC LIMIT 1"
    sql = f"SELECT {_AGENT_COLUMNS} FROM agents WHERE {where} AND name > ? AND id = ({last}) ORDER BY name LIMIT ?"
    total = db.execute(f"SELECT count(DISTINCT name) FROM agents WHERE {where}").fetchone()[0]
    return [AgentRecord(*row).decode() for row in db.execute(sql, (after, limit))], total


def claim(db: SqlConnection, name: str) -> int:
    """The highest seq seen under a name that is to be given. Raises Refused (name_taken)."""
    sql = f"SELECT coalesce(max(last_seq), 0), count(CASE WHEN {_LIVE} THEN 1 END) FROM agents WHERE name = ?"
    last_seq, taken = db.execute(sql, (name,)).fetchone()
    if taken:
        raise Refused("name_taken", f"there is an agent {name!r} already; choose another name or load it")
    return int(last_seq)


def name_agent(db: SqlConnection, agent: int, name: str, least: int = 0) -> AgentRecord:
    """Give an agent, live or deleted, the name; its last seq is at least so much. Raises Refused (name_taken)."""
    last_seq = max(claim(db, name), least)
    db.execute("UPDATE agents SET name = ?, deleted = NULL WHERE id = ?", (name, agent))
    db.execute("UPDATE agents SET last_seq = ? WHERE id = ? AND last_seq < ?", (last_seq, agent, last_seq))
    return find_agent(db, name)


def _leave_name(db: SqlConnection, agent: int) -> None:
    """Keep the name and its last seq after the agent."""
    sql = """INSERT INTO agents (name, config, state, blocks, created, last_active, last_seq, deleted)
        SELECT name, '{}', '{}', '[]', created, last_active, last_seq, '' FROM agents WHERE id = ? AND name <> ''"""
    db.execute(sql, (agent,))


def create_agent(db: SqlConnection, record: AgentRecord, is_copy: bool = False) -> AgentRecord:
    """A new agent, its last seq at least its name's; a copy is named later. Raises Refused (name_taken)."""
    record = replace(record, last_seq=max(record.last_seq, claim(db, record.name)))
    row = vars(record) | ({"name": "", "deleted": ""} if is_copy else {})
    del row["id"]
    return replace(record, id=insert(db, "agents", "RETURNING id", **row).fetchone()[0])


def rename_agent(db: SqlConnection, agent: int, name: str, owner: str | None) -> tuple[list[StoredEvent], int]:
    """Give the agent another name; the event of it, stored, and its last seq. Raises Refused (name_taken)."""
    event = response("agent_change", f"the agent is now {name!r}", change="renamed", new_name=name)
    return commit(db, agent, Changes([event]), owner), name_agent(db, agent, name).last_seq


def delete_agent(
    db: SqlConnection, agent: int, event: Event | None, purge: bool, owner: str | None = None
) -> list[StoredEvent]:
    """Keep the agent aside, or forget all of it; its name is free at once. No event: it is aside already."""
    stored = commit(db, agent, Changes([event]), owner) if event else []
    if purge:
        _leave_name(db, agent)
        forget(db, "agent = ?", agent)
        db.execute("DELETE FROM agents WHERE id = ?", (agent,))  # and all that belongs to it
    else:
        db.execute("UPDATE agents SET deleted = ? WHERE id = ?", (now_text(), agent))
    return stored


def forget_copies(db: SqlConnection, agent: int | None = None) -> None:
    """Take away a copy of an agent that did not get its name; None: all that nobody can be making any more."""
    where, value = ("last_active < ?", now_text(-3_600)) if agent is None else ("id = ?", agent)
    sql = f"SELECT id FROM agents WHERE name = '' AND deleted = '' AND {where}"
    for (copy,) in db.execute(sql, (value,)).fetchall():
        delete_agent(db, copy, None, purge=True)


def restore_agent(db: SqlConnection, name: str, new_name: str | None) -> AgentRecord:
    """Bring back the agent deleted last under that name. Raises Refused (unknown_agent, name_taken)."""
    agent = find_agent(db, name, deleted=True)
    if new_name not in (None, agent.name):
        _leave_name(db, agent.id)
    return name_agent(db, agent.id, new_name or agent.name)


class MemoryIndex:
    """An index in memory over (speaker, date, text) turns in order of time, by the very code that agents search with.

    kind: "recall" or "archival"; a new date begins a new session.
    """

    def __init__(self, turns: Iterable[tuple[str, str, str]], kind: str = "recall") -> None:
        if kind not in STORES:
            raise ValueError(f"unknown kind {kind!r}; expected 'recall' or 'archival'")
        database = Sqlite(":memory:")
        self._connection, self._kind, before = database.open(), kind, None
        weakref.finalize(self, database.close)
        with transaction(self._connection):
            self._agent = create_agent(self._connection, AgentRecord("", {}, [])).id
            for item, (speaker, date, text) in enumerate(turns, 1):
                moment = next((f"{day}T12" for day, _ in named_days(date, datetime.date.min)), "")
                remember(self._connection, self._agent, Document(item, kind, speaker, moment, text), date == before)
                before = date
            index(self._connection, "agent = ?", self._agent)

    def search(self, query: str, limit: int = 10) -> list[int]:
        """The positions of the turns found, best first, at most `limit`."""
        found, _ = search(self._connection, self._agent, Query(query, (self._kind,), limit=max(0, limit)))
        return [document.id - 1 for document in found]


memory_index = MemoryIndex


# ---- the store -------------------------------------------------------------------------------------------------------

Job = Callable[Concatenate[SqlConnection, P], T]
WriteJob = tuple[Job[[], Any], asyncio.Future[Any]]


def _settle(futures: Iterable[asyncio.Future[Any]], outcomes: Iterable[Any]) -> None:
    """Give those who still wait their results or errors."""
    for done, outcome in zip(futures, outcomes, strict=True):
        if not done.done():
            tell = done.set_exception if isinstance(outcome, Exception) else done.set_result
            tell(outcome)


class Store:
    """A database for event loops: functions of a connection are run by its threads, in a transaction.

    One thread writes: all jobs that wait for it share one transaction, so that turns that arrive together pay for one
    fsync, and none of them on an event loop. Where one fails, the others are run again without it. Other threads read.
    """

    def __init__(self, database: Sqlite | Postgres) -> None:
        """Open the database. Raises UsageError where it cannot be used."""
        self._database = database
        try:
            self._connection = database.open()
        except BaseException:  # an interrupt too leaves no lock behind
            database.close()
            raise
        self.settings: dict[str, str] = dict(self._connection.execute("SELECT name, value FROM settings").fetchall())
        self._jobs: queue.SimpleQueue[WriteJob | None] = queue.SimpleQueue()  # None: there will be no more
        self._local = threading.local()  # .connection: of a reader's thread
        self._readers = concurrent.futures.ThreadPoolExecutor(READERS, "memws-reader")
        self._closed = False
        # No executor, which takes nothing while the interpreter ends: a turn that runs then would tell of an error.
        self._writer = threading.Thread(target=self._write_all, name="memws-writer", daemon=True)
        self._writer.start()

    async def read(self, job: Job[P, T], *values: P.args, **named: P.kwargs) -> T:
        """What the job finds, all as of one moment. Raises StoreFailed, and as the job does."""
        if self._closed or self._database.memory:  # memory has one connection only, so its thread reads too
            return await self.write(job, *values, **named)
        return await asyncio.wrap_future(self._readers.submit(self._read, lambda db: job(db, *values, **named)))

    async def write(self, job: Job[P, T], *values: P.args, **named: P.kwargs) -> T:
        """What the job gives, once all that it wrote is on disk. Raises StoreFailed, and as the job does."""
        if self._closed:
            raise StoreFailed("the database is closed")
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put((lambda db: job(db, *values, **named), done))
        return await done  # a caller that is cancelled does not take it back

    def _read(self, job: Job[[], T]) -> T:
        try:
            if not hasattr(self._local, "connection"):
                self._local.connection = self._database.connect()
            with transaction(self._local.connection, "BEGIN"):
                return job(self._local.connection)
        except sqlite3.Error as error:  # there is no connection to be had now
            raise store_error(error) from error

    def _write_all(self) -> None:
        """The writer's thread: take what waits, and store it together."""
        with contextlib.suppress(MemwsError), transaction(self._connection):
            forget_copies(self._connection)
        jobs: list[WriteJob | None] = []
        while None not in jobs:
            jobs = [self._jobs.get()]
            while len(jobs) < WRITE_BATCH and not self._jobs.empty():
                jobs.append(self._jobs.get())
            self._write_batch([job for job in jobs if job])

    def _write_batch(self, jobs: list[WriteJob]) -> None:
        """What fails with a job, fails that alone; what fails with the transaction, all."""
        while jobs:
            outcomes, running = list[Any](), jobs
            try:
                with transaction(self._connection):
                    for job in jobs:
                        running = [job]
                        outcomes.append(job[0](self._connection))
                    running = jobs
            except Exception as error:  # a fault of a job too is for whoever waits for it, not for this thread
                outcomes = [error] * len(running)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                jobs[0][1].get_loop().call_soon_threadsafe(_settle, [done for _, done in running], outcomes)
            jobs = [] if running is jobs else [job for job in jobs if job not in running]

    async def close(self) -> None:
        """Finish what is queued and let go of the files."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            await asyncio.get_running_loop().run_in_executor(self._readers, self._writer.join)
            self._readers.shutdown()
            self._database.close()


# ---- leases ----------------------------------------------------------------------------------------------------------

Owners = dict[int, str]  # of agents by their ids
_TAKE_FREE = "SELECT id FROM unnest(?::int[]) AS wanted (id) WHERE pg_try_advisory_lock('agents'::regclass::int, id)"
_WRITE_OWNER = """UPDATE agents SET owner = ? WHERE id IN (
    SELECT id FROM agents WHERE id = ANY(?) AND owner <> ? FOR NO KEY UPDATE SKIP LOCKED)"""


def find_name(db: SqlConnection, agent: int, name: str) -> tuple[int, str, int]:
    """(id, name, last seq) of an agent that another server may run; where it was rewound, of what took its name, which
    was created at the same time. Raises Refused (unknown_agent)."""
    sql = f"""SELECT id, name, last_seq FROM agents WHERE {_LIVE} AND (id = ? OR (name = ? AND
        created = (SELECT created FROM agents WHERE id = ?))) ORDER BY name = ? DESC LIMIT 1"""
    row: tuple[int, str, int] | None = db.execute(sql, (agent, name, agent, name)).fetchone()
    if row is None:
        raise Refused("unknown_agent", "the agent was deleted")
    return row


class Leases:
    """Which agents this server may run, of those on a database that it shares with other servers.

    A lease is an advisory lock of a connection that is used for nothing else. A server that ends gives it back; from
    one that is paused or cut off PostgreSQL takes it, since nothing was asked for LEASE_TIMEOUT. The owner is written
    down beside the agent: what a server commits without having the lease any more is refused.
    """

    def __init__(self, database: Postgres, wanted: Callable[[], set[int]], told: Callable[[Owners], None]) -> None:
        """wanted: the ids of agents, asked for on a thread; told: hears of their owners, "" where we no longer are."""
        self.address = ""  # under which the others reach this server
        self.lease = ""  # how this server is written down as an owner
        self.database, self._failure, self._seen = database, "", time.monotonic()
        self._wanted, self._told = wanted, told
        self._news, self._over = threading.Event(), False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._keep, name="memws-leases", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Look at once for what is wanted; from now on tell it on this loop."""
        self._loop = asyncio.get_running_loop()
        self._news.set()

    @property
    def problem(self) -> str:
        """Why the database is away, or nothing."""
        silence = time.monotonic() - self._seen
        return self._failure or (f"no answer for {silence:.0f} s" if silence > LEASE_TIMEOUT else "")

    def close(self) -> None:
        """Give all back."""
        self._over = True
        self._news.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._over:
            try:
                with contextlib.closing(self.database.connect("idle_session_timeout")) as connection:
                    self._hold(connection)
            except sqlite3.Error as error:
                if not self._failure:
                    logger.warning("the database is away: %s", error)
                self._failure = str(error)
                self._news.wait(LEASE_PULSE)

    def _hold(self, connection: SqlConnection) -> None:
        """Take and give back leases, for as long as the connection lasts. Raises sqlite3.Error."""
        address, held = self.address, set[int]()
        self.lease = lease = f"{address}#{secrets.token_hex(8)}"
        try:
            while address == self.address and not self._over:
                wanted = self._wanted()
                for agent in held - wanted:
                    connection.execute("SELECT pg_advisory_unlock('agents'::regclass::int, ?)", (agent,))
                    held.remove(agent)
                held.update(agent for (agent,) in connection.execute(_TAKE_FREE, (list(wanted - held),)))
                connection.execute(_WRITE_OWNER, (lease, list(held), lease))
                owners = connection.execute("SELECT id, owner FROM agents WHERE id = ANY(?)", (list(wanted),))
                self._tell(dict(owners.fetchall()) | dict.fromkeys(held & {0}, lease))
                self._failure, self._seen = "", time.monotonic()
                self._news.wait(LEASE_PULSE)
                self._news.clear()
        finally:
            self._tell(dict.fromkeys(held, ""))

    def _tell(self, owners: Owners) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            if self._loop:
                self._loop.call_soon_threadsafe(self._told, owners)


# ---- files -----------------------------------------------------------------------------------------------------------
# For the command line: on connections of their own, beside a running server where nothing is written.

EXPORT_FORMAT = 2
COPY_BLOCK = 500  # rows of a copy that are in memory at once
_EXPORTED = {  # table: its columns in a file
    "agents": "name, config, state, blocks, created, last_active, last_seq",
    "messages": "id, role, time, text, body, turn_id, step, seq",
    "memory": "store, item, role, time, text",
    "events": "seq, turn_id, kind, text",
    "requests": "turn_id, step, time, pieces, first, last, digest, response, usage, first_token_ms, total_ms",
}
_TABLES = list(_EXPORTED)[1:]  # whose rows belong to an agent
_REFUSED = sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.DataError  # not Operational: a full disk, a lock
_COUNTED = schema_of(Annotated[int, 0, 10**15])  # an import's ids and seqs, from which the agent counts on
_DAMAGE = *_REFUSED, ValueError, TypeError, LookupError, AttributeError, OverflowError
_SERVERS = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'memws'"


@contextlib.contextmanager
def read_database(path: str) -> Iterator[SqlConnection]:
    """A connection that only reads, as of one moment. Raises UsageError where there is no database of ours."""
    database = database_at(path)
    if isinstance(database, Sqlite) and not pathlib.Path(path).is_file():
        raise UsageError(f"there is no database {path!r}; name one with --db")
    with usable(database.path, database.advice), contextlib.closing(database):
        connection = database.connect()
        if not has_schema(database, connection):
            raise UsageError(f"{database.path!r} is no memws database; name one with --db")
        with transaction(connection, "BEGIN"):
            yield connection


def vacuum_database(path: str, keep_requests: float) -> int:
    """Give back the space of what was purged and of exact requests older than so many days; the bytes given back.
    Raises UsageError, also where a server uses the SQLite file; on PostgreSQL servers go on meanwhile."""
    with read_database(path):  # there is one
        database = database_at(path)
    with usable(database.path, database.advice), contextlib.closing(database):
        db = database.open()
        before = db.execute(database.size).fetchone()[0]
        db.execute("DELETE FROM requests WHERE time <= ?", (now_text(-86_400 * keep_requests),))
        db.execute("VACUUM")
        return max(0, int(before - db.execute(database.size).fetchone()[0]))


def table_sizes(path: str) -> Iterator[str]:
    """A line for each agent: by table its rows and the bytes of their values. Raises UsageError."""
    size_of = database_at(path).size_of
    sql = f"SELECT id, name, deleted FROM agents WHERE {_LIVE} OR {_DELETED} ORDER BY name, id"
    with read_database(path) as db:
        for agent, name, deleted in db.execute(sql).fetchall():
            sizes = []
            for table in _TABLES:
                columns = [column[0] for column in db.execute(f"SELECT * FROM {table} LIMIT 0").description]
                size = " + ".join(map(size_of.format, columns))
                sql = f"SELECT count(*), coalesce(sum({size}), 0) FROM {table} WHERE agent = ?"
                count, total = db.execute(sql, (agent,)).fetchone()
                sizes.append(f"{count:,} {table} ({total / 1000:,.1f} kB)")
            yield f"{name}{' (deleted)' if deleted else ''}: {', '.join(sizes)}"


def check_database(path: str) -> Iterator[str]:
    """What is damaged in a database, by its own checks and by opening every agent. Raises UsageError."""
    try:
        with read_database(path) as db:
            if not isinstance(db, PostgresConnection):  # which looks for damage by itself
                yield from (f"the file: {row[0]}" for row in db.execute("PRAGMA integrity_check(20)") if row[0] != "ok")
                for table, row, *_ in db.execute("PRAGMA foreign_key_check").fetchall():
                    yield f"the file: row {row} of {table} belongs to no agent"
            for record in list_agents(db, "", 2**53)[0]:
                try:
                    record.check()
                    messages = read_messages(db, record.id, first=record.state["cut"])
                    yield from (f"agent {record.name}: {fault}" for _, fault in history_faults(messages)[0])
                except (MemwsError, ValueError, TypeError, AttributeError) as error:
                    yield f"agent {record.name}: {error}"
    except StoreFailed as error:
        yield f"the file cannot be read: {error}"


def export_agent(db: SqlConnection, name: str) -> JSON:
    """One agent, memory and history, as JSON: its rows as they are, bytes in hexadecimal. Raises Refused."""
    agent, tables = find_agent(db, name).id, {}
    for table, columns in _EXPORTED.items():
        owner, order = "id" if table == "agents" else "agent", "doc" if table == "memory" else "1, 2"
        rows = db.execute(f"SELECT {columns} FROM {table} WHERE {owner} = ? ORDER BY {order}", (agent,))
        texts = ([value.hex() if isinstance(value, bytes) else value for value in row] for row in rows)
        tables[table] = [dict(zip(columns.split(", "), row, strict=True)) for row in texts]
    return {"memws_agent": EXPORT_FORMAT, "agent": tables.pop("agents")[0], **tables}


def _convert_export(data: JSON) -> None:
    """Make of what an earlier memws exported, in place, what this one would."""
    agent, memory = data["agent"], []
    agent["config"].pop("embedding", None)
    agent["state"]["turn"] = next((turn["turn_id"] for turn in data["turns"] if not turn["over"]), None)
    agent["blocks"] = sorted(data["blocks"], key=lambda block: block["position"])
    for block in agent["blocks"]:
        del block["position"]
    agent |= {name: encode_json(agent[name]) for name in ("config", "state", "blocks")}
    for row in data["messages"]:
        text = row["text"] if row["said"] is None and row["role"] == "user" else row["said"]
        memory += [row | {"store": "recall", "item": row["id"], "text": text}] if text else []
    memory += [row | {"store": "archival", "item": row["id"], "role": ""} for row in data["passages"]]
    data["memory"] = memory
    for row in [*data["messages"], *data["events"]]:
        row["turn_id"] = row["turn_id"] or ""
    parts = {part["digest"]: part["text"] for part in data["parts"]}
    for row in data["requests"]:
        texts = [row["head"], *(parts[row[name]] for name in ("system", "summary", "tools", "extra"))]
        row |= {"time": agent["last_active"], "pieces": zlib.compress(encode_json(texts).encode()).hex()}


def _import_row(db: SqlConnection, agent: int, table: str, row: JSON) -> None:
    """Store a row of an export, without the postings of memory."""
    for number in (value for value in row.values() if isinstance(value, (int, float))):
        check(number, _COUNTED)
    if table == "memory":
        remember(db, agent, Document(row["item"], row["store"], row["role"], row["time"], row["text"]))
        return
    if table == "messages":
        body = clean_value(decode_json(row["body"]))
        names = ("role", "content") if row["role"] in ("user", "system") else ("by", "role", *body)  # as shape wants it
        row["body"] = encode_json({name: body[name] for name in names if name in body})
        if read_body(row["role"], row["body"]) is None:
            raise ValueError(f"expected a chat message, but got {quote(row['body'])}")
    if table == "events":
        event = clean_value(decode_json(row["text"])) | {"seq": row["seq"]}
        for text in (event["type"], event.get("message_type", "")):
            check(text, schema_of(str))
        row |= {"kind": kind_of(event), "text": encode_json(event)}
    columns = {name: row[name] for name in _EXPORTED[table].split(", ")}
    blobs = {name: bytes.fromhex(row[name]) for name in ("pieces", "digest") if name in columns}
    insert(db, table, agent=agent, **columns | blobs)


def import_agent(db: SqlConnection, data: Any, name: str | None = None) -> str:
    """Store what export_agent gave, also that of an earlier memws, under its name or another one; the name. Raises
    UsageError with the place of what is damaged, Refused; then nothing is stored."""
    if not isinstance(data, dict) or data.get("memws_agent") not in (1, EXPORT_FORMAT):
        raise UsageError("the file is no agent that memws exported")
    data, place = clean_value(data), "the former format"
    with transaction(db):
        try:
            if data["memws_agent"] != EXPORT_FORMAT:
                _convert_export(data)
            place = "agent"
            record = AgentRecord(**{name: data["agent"][name] for name in _EXPORTED["agents"].split(", ")}).decode()
            record.config, record.state, record.blocks = clean_value([record.config, record.state, record.blocks])
            record.name = check_name(record.name if name is None else name)
            record.check()
            record.last_seq = max([check(record.last_seq, _COUNTED), *(event["seq"] for event in data["events"])])
            agent = create_agent(db, record).id
            for table in _TABLES:
                place = table
                for number, row in enumerate(check(data.get(table), schema_of(list[dict[str, Any]]))):
                    place = f"{table}[{number}]"
                    _import_row(db, agent, table, row)
                    if number == 500 and isinstance(db, PostgresConnection):
                        db.execute(f"ANALYZE {table}")  # else it plans by an empty table to the end
        except _DAMAGE as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UsageError(f"damaged: {place}: {reason}") from None
        index(db, "agent = ?", agent)
    return record.name


def copy_database(address: str, goal: str) -> Iterator[Mapping[str, int]]:
    """Copy settings and agents, also deleted ones, as of one moment, to an empty database or one that was copied from
    this earlier: what it has already is passed by, what is older there is replaced. A copy that was cut off goes on.

    Gives after each piece the counts of agents and rows so far and of all. Raises UsageError, StoreFailed.
    """
    sql = "SELECT id, name, created, last_seq, last_active, deleted FROM agents WHERE name <> '' ORDER BY id"
    with read_database(address) as source, contextlib.closing(database_at(goal)) as database:
        target = database.open()
        with transaction(target):
            ours, theirs = ({row[0]: row for row in db.execute(sql)} for db in (source, target))
            _refuse_loss(ours, theirs, database.path)
            if read_setting(target, "embedding_model") not in (None, read_setting(source, "embedding_model")):
                raise UsageError(f"{database.path!r} has vectors of another model; copy to an empty database")
            if isinstance(database, Postgres):
                target.execute("SET application_name = 'memws copy'")
                if target.execute(_SERVERS).fetchone():
                    raise UsageError(f"{database.path!r} is in use; stop the memws servers that use it, then copy")
                target.execute("SELECT setval('agents_id_seq', ?)", (max(ours, default=1),))
            for name, value in source.execute("SELECT name, value FROM settings").fetchall():
                write_setting(target, name, value)
            for agent, _ in theirs.items() - ours.items():
                forget(target, "agent = ?", agent)
                target.execute("DELETE FROM agents WHERE id = ?", (agent,))
        rows = collections.Counter(ours.keys())
        for table in _TABLES:
            rows.update(dict(source.execute(f"SELECT agent, count(*) FROM {table} GROUP BY agent").fetchall()))
        done = collections.Counter({"all agents": len(ours), "all rows": rows.total()})
        yield done
        for agent, row in ours.items():
            if row == theirs.get(agent):
                done["rows"] += rows[agent]
            else:
                with transaction(target):
                    for count in _copy_agent(source, target, agent):
                        done["rows"] += count
                        yield done
            done["agents"] += 1
        if isinstance(database, Postgres):
            with transaction(target):
                target.execute("ANALYZE")  # until it knows what is there, it reads tables where it has indexes


def _refuse_loss(ours: dict[int, Any], theirs: dict[int, Any], path: str) -> None:
    """Raises UsageError where a copy of our agents would lose some of theirs, or what these did since."""
    purged = {row[2]: row for row in ours.values() if row[5] == ""}
    for agent, (_, name, created, last_seq, last_active, deleted) in theirs.items():
        mine = ours.get(agent, None if deleted == "" else purged.get(created))
        if mine is None or mine[2] != created:
            raise UsageError(f"{path!r} has an agent {name!r} of its own; copy to an empty database")
        if last_seq > mine[3] or last_active > mine[4]:
            raise UsageError(f"agent {name!r} has gone on in {path!r}; copy to an empty database")


def _copy_agent(source: SqlConnection, target: SqlConnection, agent: int) -> Iterator[int]:
    read = source.stream if isinstance(source, PostgresConnection) else source.execute
    for table in _EXPORTED:
        names = [column[0] for column in source.execute(f"SELECT * FROM {table} LIMIT 0").description]
        columns, key = ", ".join(names).removesuffix(", owner"), "id" if table == "agents" else "agent"
        sql = f"INSERT INTO {table} ({columns}) VALUES ({', '.join('?' * len(columns.split(', ')))})"
        rows = read(f"SELECT {columns} FROM {table} WHERE {key} = ? ORDER BY 1, 2", (agent,))
        while block := list(itertools.islice(rows, COPY_BLOCK)):
            target.executemany(sql, block)
            yield len(block)
    index(target, "agent = ?", agent)


# ---- copies of agents ------------------------------------------------------------------------------------------------
# They are made piece by piece, so that others get in between, and are nobody's until they are given a name.

COPY_STEP, COPY_WORDS = 300, 3_000  # rows and words that are copied at once: so long others wait
_COPIED = _EXPORTED | {"memory": "doc, store, item, role, time, text, terms, words, asking, asked, vector"}


def find_turn_end(db: SqlConnection, record: AgentRecord, turn_id: str) -> AgentRecord:
    """An agent as it was at the end of a turn, its last seq then. Raises Refused (unknown_turn, busy, not_found)."""
    sql = """SELECT seq, kind, pieces FROM events LEFT JOIN requests ON requests.agent = events.agent
        AND requests.turn_id = events.turn_id AND step = 0 WHERE events.agent = ? AND events.turn_id = ?
        AND kind <> 'user_message' ORDER BY seq DESC LIMIT 1"""
    seq, kind, pieces = db.execute(sql, (record.id, turn_id)).fetchone() or (0, "", None)
    if not kind:
        raise Refused("unknown_turn", f"the agent never had a turn {quote(turn_id)}; get_messages shows their ids")
    if kind not in TERMINAL_TYPES:
        raise Refused("busy", f"turn {quote(turn_id)} is not over; wait for its end")
    if pieces is None:
        reason = "vacuum --keep-requests has dropped it, or an earlier memws did not keep it"
        raise Refused("not_found", f"what the agent was at the end of turn {quote(turn_id)} is gone: {reason}")
    config, state, blocks = decode_json(zlib.decompress(pieces))
    return replace(record, config=config, state=state, blocks=blocks, last_seq=seq)


def _put_back(db: SqlConnection, record: AgentRecord, copy: int) -> None:
    """Undo in the copy what passages were deleted after the record's last seq, by what the events of it tell."""
    sql = "SELECT text FROM events WHERE agent = ? AND seq > ? AND kind = 'memory_change' AND text LIKE ?"
    events = [decode_json(text) for (text,) in db.execute(sql, (record.id, record.last_seq, '%"after":null%'))]
    gone = [event for event in events if event["what"] == "archival" and event["id"] <= record.state["last_passage"]]
    for event in sorted(gone, key=lambda event: event["id"]):
        if find_passage(db, copy, event["id"]) is None:  # there is room for it among those that it has
            passage = Document(event["id"], "archival", "", event.get("since", ""), event["before"])
            index(db, "doc = ?", remember(db, copy, passage))


def _fetch(db: SqlConnection, sql: str, *values: object) -> list[Any]:
    return db.execute(sql, values).fetchall()


async def copy_steps(store: Store, record: AgentRecord, copy: int) -> AsyncGenerator[tuple[str, int, int], None]:
    """Copy what an agent had stored up to the record's last seq; gives (what, done, total). Raises StoreFailed."""
    agent, seq, shift = record.id, record.last_seq, f"doc + {(copy - record.id) * 2 * PLACES}"
    ((last,),) = await store.read(_fetch, "SELECT coalesce(max(id), 0) FROM messages WHERE agent = ?", agent)
    newest = f"(SELECT max(id) FROM messages WHERE agent = {copy})"
    docs = collections.defaultdict[str, list[int]](list)  # by term
    parts = [  # the table, its rows with the numbers that cut them into steps, the last of these
        ("messages", f"messages WHERE seq <= {seq} AND id", last),
        ("memory", f"memory WHERE store = 'recall' AND item <= {newest} AND item", last),
        ("memory", "memory WHERE store = 'archival' AND item", record.state["last_passage"]),
        ("events", "events WHERE seq", seq),
        ("requests", "events JOIN requests USING (agent, turn_id) WHERE kind = 'agent_response_start' AND seq", seq),
    ]
    for table, rows, last in parts:
        columns, found = _COPIED[table], "doc, terms" if table == "memory" else "0, ''"
        values = columns.replace("doc", shift)
        sql = f"""INSERT INTO {table} (agent, {columns}) SELECT {copy}, {values} FROM {rows} BETWEEN ? AND ?
            AND agent = {agent} RETURNING {found}"""
        for first in range(1, last + 1, COPY_STEP):
            done = min(first + COPY_STEP - 1, last)
            for doc, terms in await store.write(_fetch, sql, first, done):
                for term in set(terms.split()):
                    docs[term].append(doc)
            yield table, done, last
    postings = ((term, doc) for term in sorted(docs) for doc in docs[term])  # neighbours share a page
    total = sum(map(len, docs.values()))
    for first in range(1, total + 1, COPY_WORDS):
        await store.write(insert_all, "postings", list(itertools.islice(postings, COPY_WORDS)))
        yield "words", min(first + COPY_WORDS - 1, total), total
    await store.write(_put_back, record, copy)


def finish_rewind(
    db: SqlConnection, agent: int, copy: int, name: str, kept_as: str, owner: str | None
) -> list[StoredEvent]:
    """Give a whole copy the agent's name, and that another; the event of it, stored. Raises Refused (name_taken)."""
    (renamed,), _ = rename_agent(db, agent, kept_as, owner)
    name_agent(db, copy, name, renamed.seq - 1)
    if owner is not None:
        db.execute("UPDATE agents SET owner = ? WHERE id = ?", (owner, copy))
    text = f"the agent was taken back to an earlier turn; as it was then, it goes on as {kept_as!r}"
    return commit(db, copy, Changes([response("agent_change", text, change="rewound", kept_as=kept_as)]))


# ======================================================================================================================
# 6. LLM: what a model answers, OpenAI-compatible endpoints, the offline model
# ======================================================================================================================


@dataclass(repr=False)
class Learned:
    """What an endpoint has taught of a model, as it is stored; where more is learned, another takes its place."""

    shape: list[str]  # the model and its endpoint, who make its own fields; the rules of a history that they want
    options: list[list[Any]] = field(default_factory=list)  # a name, a value that it refuses, what is sent instead
    window: int = 0  # tokens of its context window; 0: it has not said


# ---- the markup of model families, which stays in the text where a server does not read it ---------------------------
# A text is read up to the first mark of a call (_IN_PROSE). From there on it becomes names and JSON, whatever the form:
# strings stay, parameters in XML and calls in Python turn into JSON, all else that is markup goes (_IN_MARKUP).

_VERBOSE = re.DOTALL | re.IGNORECASE | re.MULTILINE | re.VERBOSE
_THOUGHT = r"(?:\w{1,12}[:_]|ant)?(?:think|thinking|thoughts?|reasoning|reflection|analysis|monologue|scratch_?pad)"
_THOUGHT_END = rf"""(?:[<◁]\|?(?:/|(?=end_)){_THOUGHT}\|?[>▷] | <\|{_THOUGHT}_end\|> | (?-i:\[/THINK\])
    | <channel\|> | <\|close\|>think<\|sep\|> | (?<=\S)assistantfinal(?=\S) | \[BEGIN\ FINAL\ RESPONSE\])"""
_TURN = r"<[|｜]?(?:im_start|start|start_of_turn|start_header_id|start_of_role|turn)[|｜]?>"
_MADE_UP = rf"(?:{_TURN}(?:user|system|tool)\b|<[|｜](?:user|observation)[|｜]>).*"  # what another would say is made up
_AT_START = r"(?:^|(?<=[>▷\]])|(?<=:\ ))"  # of a line, or of what stands apart
_STRING = r""" "(?:[^"\\]|\\.)*+(?:"|\\?\Z) | (?<=[=(,\[:{\s])'(?:[^'\\]|\\.)*+' """
_SPELLINGS = (  # of Kimi K3 and MiniMax M3, as others write it
    (r"<\|open\|>([^<]*)<\|sep\|>", r"<\1>"),
    (r"<\|close\|>([^<]*)<\|sep\|>", r"</\1>"),
    (r"\]<\]minimax\[>\[</(?!tool_call|invoke)\w+>", "</parameter>"),
    (r"\]<\]minimax\[>\[<(?!tool_call|invoke|/)(\w+)>", r"<parameter=\1>"),
    (r"\]<\]minimax\[>\[", ""),
)
_NAMES_PARAMETER = r"(?:param(?:eter)?|arg(?:ument)?)(?:=|\s+(?:name|key)=)"
_PARAMETER = rf"""
    <[^<>\s=]{{0,20}}?(?:{_NAMES_PARAMETER}["']?|arg_key>)([\w.-]+)[^>]*>(?:\s*<\w*arg_value>|\n)?
    (.*?)\n?</[^<>\s]{{0,20}}?(?:param(?:eter)?|arg(?:ument|_value)?)>"""
# Compiled when they are first needed, and kept by re: that would be 8 ms of every import.
_IN_PROSE = rf"""
    (?=[^\w\s]|assistant|functools|to=|commentary|{_AT_START})  # else nothing of this begins here
    (?: (?P<quoted> `[^`\n]+` | (?<![\w\\])"(?:[^"\\\n]|\\.)*+" | (?<!\w)'[^'\n]*'(?!\w) | “[^“”\n]*” | ^>\ [^\n]*
        | ^```(?:(?!^```).)*+^```(?!\s*(?:```|<[|｜/]|\Z)))  # a block of code that other text follows
    | (?P<thought> (?:[<◁]\|?(?!end_){_THOUGHT}(?:_start)?\|?[>▷] | (?-i:\[THINK\]) | <\|channel>thought
        | <\|open\|>think<\|sep\|> | <\|channel\|>analysis<\|message\|>)
        (?P<inner>.*?) (?:{_THOUGHT_END} | <\|end\|> | (?=<\|channel\|>) | \Z))
    | (?P<end> {_THOUGHT_END})  # alone: the beginning stood in the prompt
    | (?P<call> <[|｜][^<>\s]{{0,60}}?(?:tool|function|call|python|action|plugin|invoke)  # <|python_tag|>, DeepSeek
        | <{{1,2}}(?:\w{{1,20}}[:_])?(?:tool|function|invoke)(?:s|_?calls?|_\w+)?[\s=>(/]  # <tool_call>
        | <\|open\|>(?:tools|call)\b | \]<\]\w+\[>\[ | <call:  # Kimi K3, MiniMax M3
        | \[(?:TOOL|FUNCTION)_\w+\] | \bfunctools(?=\[) | ✿\w+✿ | {_AT_START}```tool_  # Mistral, Phi, Qwen Agent, Gemma
        | {_AT_START}\[?(?:Calling\ tool:|(?:tool|function)[_ ]calls?:?)\s*
            (?=[\w.]*\(?\s*\[?\s*\{{\s*["'] | [\w.]+\(\w+=)  # LFM 2, where the next line is a call
        | {_AT_START}>>>(?!all\n)(?=\w+\n)  # Functionary
        | {_AT_START}Action:\s*(?:```|[\[{{]|\w+\s*$) | ^Action\ Input:  # Command R, ReAct
        | <\|channel\|>\w+\  | (?:commentary\ )?\bto=functions\. | assistantcommentary)  # gpt-oss, its tokens lost
    | (?P<bare> {_AT_START}(?:```\w*\s*)?[ ]*(?:\[\s*)?(?:print\(|await\ )?(?:  # a call without a mark:
        \{{\s*["'}}]  # JSON
        | [a-z_][\w.]*(?<!print)\(\s*(?:\w+\s*=|["'{{])  # Python
        | [a-z_][\w.]*(?::\d+)?(?:\]?:?|>|\[ARGS\])\s*\{{\s*["'}}]))  # a name before JSON
    | (?P<token> {_MADE_UP} | {_TURN}(?:assistant|model) | <\|(?:channel|open|close)\|>\w+<\|(?:message|sep)\|>
        | <[|｜][^<>|｜\s]{{1,60}}[|｜]> | \A\s*<s> | </s>(?=\s*\Z) | <[be]os> | <end_of_turn> | <turn\|> | ^>>>all\n
        | </[^<>\s]{{0,20}}(?:tool|function)(?:_?call)?s?> | </?(?:answer|response)> | <role>\w+</role>
        | \[END\ FINAL\ RESPONSE\] | </?[|｜\w:]*\Z))
"""
_UNSURE = rf"""(?mx)(?:  # what may become one of these, at the end of a text:
    (?:{_AT_START}|<\|channel\|>)(?:Action:.*|\[?(?:Calling|Tool|TOOL|Function)[_ ]\w*:?|(?:```|>>>)?[a-z_]*:?)\s*[!-~]*
    | {_TURN}\w*\s*[!-~]* | ^>.{{0,300}} | (?<![^\s(])`[^`\n]{{0,300}}(?:`[!-~]*)?  # a turn, a quotation
    | [!-~｜▁✿◁]*)\Z"""  # the last word
_IN_MARKUP = rf"""
    (?P<string> {_STRING})
    | (?P<quoted> (?P<quote><escape>|<\|"\|>)(?P<inner>.*?)(?P=quote))  # Gemma
    | (?P<parameters> (?:{_PARAMETER}\s*)+)
    | (?P<python> (?<![\w.])[\w.]++\((?!\s*\{{)(?:{_STRING}|[^"'()]++){{0,300}}+\))
    | (?P<cut> <[^<>\s=/]{{0,20}}(?:{_NAMES_PARAMETER}|arg_).* | <[^<>/]*\Z)
    | (?P<close> </[^<>\s]*(?:function|invoke|call)>(?!\s*<\w+>\s*\{{))  # after arguments, or where there are none
    | {_MADE_UP} | <function=(?=[\w.]+\()
    | <(?:function[(/]|call:|[^<>\s=]*(?:=|\s+(?:name|tool)=))["']?(?P<name>[\w.-]++)[^<>{{]*(?:>|(?=\{{))
    | (?:<\|tool_call:begin\|>|(?-i:\[CALL_ID\]))\w+ | <{{1,2}}/?[^<>]*(?:>{{1,2}}|\Z)
    | (?-i:\[/?[A-Z_]{{3,}}\]) | ✿\w+✿:? | ```\w* | ^>>> | ^Action(?:\ Input)?: | functools(?=\[)
    | assistant(?=commentary) | \[?Calling\ tool: | \b(?:tool|function)[_ ]calls?:?(?=\W)
    | (?P<arrow> =>) | ^\s*--(?P<flag>\w+)  # MiniMax 2
"""
_PLAIN = {"string": r"\g<0>", "name": r" to=\g<name> ", "cut": " to=unknown {", "close": " {} "}
_PLAIN |= {"arrow": ":", "flag": r'"\g<flag>":'}
_NAMED = (  # the name of a tool before its arguments, and what may stand beside it
    r"(?s)(?:.*\bto=|call:|function\s+)?(?:\w+\.)*?([\w-]+)(?:\.call|\()?(?::\d+)?[:>]?(?:\s+(?:commentary|json|code))*"
)
_NAME_KEYS = ("name", "function", "tool_name", "tool", "action", "function_name", "recipient_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "params", "args", "kwargs", "input", "action_input", "tool_input")


# ---- what a model answers --------------------------------------------------------------------------------------------

# Escapes that are cut wait for their rest, a high surrogate for its other half.
_SPOKEN = r'(?i)"message"\s*:\s*"((?:[^"\\]|\\[^u]|\\u[0-9a-f]{4})*)(?<!\\ud[89ab]..)'
_ESCAPE = r'(\\["\\/bfnrtu])|\\'  # a backslash that begins none stands for itself
_FAULTS = {  # of an answer, by words in its finish reason
    "broken": "err|fail|abort|cancel|time|load|resource|malform|unexp|other|crash|disconn|preempt|repet|many|lang",
    "filtered": "filter|safe|sensitive|guard|block|prohibit|recit|refus|spii|jailbreak|violat|moderat|censor",
    "length": "length|max|limit|window|trunc",
}
_ENDS = {"broken": ("model_unavailable", "broke off"), "filtered": ("model_refused", "was filtered")}


def without_heartbeat(arguments: JSON) -> JSON:
    """The arguments of a call as people see them."""
    return {name: value for name, value in arguments.items() if name != REQUEST_HEARTBEAT}


@dataclass(repr=False)
class ToolCall:
    """A tool call: its arguments as the model writes them, then what they were read as."""

    id: str = ""
    name: str = ""
    text: str = ""  # the arguments: JSON that may be cut anywhere
    arguments: JSON = field(default_factory=dict)
    problem: str = ""  # why it cannot run, as advice for the model
    own: JSON = field(default_factory=dict)  # fields that its maker needs back

    @property
    def spoken(self) -> str:
        """What send_message has said so far."""
        match = re.search(_SPOKEN, self.text) if self.name == "send_message" else None
        text = re.sub(_ESCAPE, lambda escape: escape[1] or r"\\", match[1]) if match else ""
        return clean_text(decode_json(f'"{text}"', strict=False))

    @property
    def line(self) -> str:
        """The call as MemGPT 0.2.7 shows it."""
        return f"Running {self.name}({without_heartbeat(self.arguments)!r})"


class Reply:
    """What a model has answered so far; `feed` takes the chunks of a chat-completions stream. It is whole, unless it
    has a `fault`; half of one is asked for again, until one is final: then it has to do."""

    def __init__(self) -> None:
        self.text = self.reasoning = self.refusal = ""
        self.calls: list[ToolCall] = []
        self.finish: str | None = None  # why it ended, in the endpoint's words
        self.usage: JSON | None = None  # {input_tokens, output_tokens}, where the endpoint counts
        self.corrections: list[tuple[str, str]] = []  # (what, how) of all that had to be mended to read it
        self.partial = ""  # what send_message said in a call that was cut
        self.final = False  # no better one will come: it has reached MAX_REPLY characters, or was the last try
        self.own: JSON = {}  # fields that its maker needs back
        self._size = 0
        self._shown, self._seen = "", 0  # what is shown of the text, and how much was looked at
        self._choice: Any = None  # the index of the choice that is read, of several
        self._streams = False  # whether any of it has come as a delta
        self._latest: dict[str | None, ToolCall] = {}  # the newest call of each index; None: the newest of all
        self._told = collections.Counter[int]()  # characters that news() has told: of the monologue, then of each call

    @property
    def monologue(self) -> str:
        return "\n".join(filter(None, (self.reasoning, self.text)))

    @property
    def fault(self) -> str:
        """Why it is not whole: one of _FAULTS, or "cut" by us; empty: it is."""
        finish = "" if self.finish in (None, "stop", "tool_calls") else str(self.finish)
        faults = (fault for fault, words in _FAULTS.items() if finish and re.search(words, finish, re.IGNORECASE))
        return next(faults, "cut" if self.final else "")

    def problem(self, text: str) -> ModelError:
        """The error for an answer that is not whole; for a whole one that `text`."""
        limit = "the endpoint's length limit" if self.fault == "length" else f"{MAX_REPLY:,} characters"
        code, end = _ENDS.get(self.fault, ("bad_output", f"was cut at {limit}"))
        return ModelError(code, f"the model's answer {end}" if self.fault else text, retry=code != "bad_output")

    def feed(self, chunk: JSON) -> None:
        """Take one chunk. Raises ModelError for what is none."""
        try:
            usage, choices = chunk.get("usage") or {}, chunk.get("choices") or []
            if type(usage.get("prompt_tokens")) is int:
                output = int(usage.get("completion_tokens") or 0)
                self.usage = {"input_tokens": usage["prompt_tokens"], "output_tokens": output}
            for choice in choices:  # some split one answer over several without an index
                self._choice = choice.get("index") if self._choice is None else self._choice
                if choice.get("index") in (None, self._choice):
                    self._feed_choice(choice)
            self.final = self._size > MAX_REPLY
        except (TypeError, AttributeError, LookupError, ValueError, RecursionError) as error:
            text = f"the endpoint's answer is no chat completion ({type(error).__name__})"
            raise ModelError("model_unavailable", text, retry=True) from None

    def _feed_choice(self, choice: JSON) -> None:
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta") or {}
        self._streams = self._streams or bool(delta.get("content") or delta.get("tool_calls"))
        if not self._streams:  # some end a stream with all of it again
            delta = delta | (choice.get("message") or {})
        content, thoughts = delta.get("content"), list[Any]()
        if isinstance(content, list):
            thoughts = [part for part in content if type(part) is dict and re.match(_THOUGHT, str(part.get("type")))]
            content = [part for part in content if part not in thoughts]
        self.text += self._take(content)
        self.reasoning += self._take(delta.get("reasoning_content") or delta.get("reasoning") or thoughts)
        self.refusal += self._take(delta.get("refusal"))
        self._keep(self.own, delta)
        for piece in filter(None, delta.get("tool_calls") or [delta.get("function_call")]):  # the older form
            self._feed_call(piece)

    def _feed_call(self, piece: JSON) -> None:
        """Take a piece of a call. Endpoints that number all calls 0, or none, are read by ids and names."""
        function, number = piece.get("function") or piece, piece.get("index")
        call_id, name, text = str(piece.get("id") or ""), function.get("name") or "", function.get("arguments") or ""
        text = text if isinstance(text, str) else encode_json(text)
        index = None if number is None else str(number)
        call = self._latest.get(index if name or call_id or index in self._latest else None)
        if call is None or (name and _is_other(call, index, call_id, name, text)):
            self.calls.append(call := ToolCall())
            self._size += 100  # so that the number of calls is bounded, too
        self._latest[index] = self._latest[None] = call
        call.id = call.id or self._take(call_id)
        self._keep(call.own, piece)
        if name.startswith(call.name):  # once more, or all that has come with it
            call.name = ""
        if text and (call.text == "{}" or (call.text[:1] == "{" and text.startswith(call.text))):
            self._size -= len(call.text)
            call.text = ""
        call.name += self._take(name)
        call.text += self._take(text)

    def _keep(self, own: JSON, part: JSON) -> None:
        """Keep what a maker needs back; texts and lists come in pieces."""
        for name in OWN_FIELDS if not self.final else ():
            if (piece := part.get(name)) is not None:
                goes_on = isinstance(piece, (str, list)) and type(own.get(name)) is type(piece)
                own[name] = own[name] + piece if goes_on else piece
                self._size += 0 if isinstance(piece, str) else len(encode_json(piece))

    def _take(self, value: Any) -> str:
        """A text of a chunk, which may come in parts: as much of it as there is room for."""
        if not value:
            return ""
        if isinstance(value, list):
            return "".join(map(self._take, value))
        if isinstance(value, dict):
            return self._take(value.get("text") or value.get("thinking") or value.get("summary"))
        text, room = str(value), max(0, MAX_REPLY - self._size)
        self._size += len(text)
        return text[:room]

    def news(self) -> Iterator[tuple[str, str]]:
        """(message type, text) that has come since the last call, for whoever watches it arrive."""
        unsure = None if self.finish else re.compile(_UNSURE).search(self.text, max(self._seen, len(self.text) - 1_000))
        end = unsure.start() if unsure else len(self.text)
        said, thoughts, self._seen, _ = _parts_of(self.text, self._seen, end)
        self._shown += "".join([*thoughts, said])
        shown = "\n".join(filter(None, (self.reasoning, self._shown)))
        for place, text in enumerate([clean_text(shown), *(call.spoken for call in self.calls)]):
            if new := text[self._told[place] :]:
                self._told[place] = len(text)
                yield "assistant_message" if place else "internal_monologue", new


def _parts_of(text: str, start: int, end: int) -> tuple[str, list[str], int, str]:
    """What a text says between two places, its thoughts, and where it ends: at a call with a mark, or at a bare one."""
    said, thoughts = "", list[str]()
    for match in re.compile(_IN_PROSE, _VERBOSE).finditer(text, start, end):
        kind = match.lastgroup or ""
        if kind == "quoted":
            continue
        said, start = said + text[start : match.start()], match.end()
        if kind in ("call", "bare"):
            return said, thoughts, match.start(), kind
        if kind == "thought":
            thoughts.append(match["inner"])
        if kind == "end":
            thoughts.append(said)
            said = ""
    return said + text[start:end], thoughts, max(start, end), ""


def _is_other(call: ToolCall, index: str | None, call_id: str, name: str, text: str) -> bool:
    """Whether a piece with a name begins another call: names come in pieces, and names and ids come again."""
    has_other_name, has_other_id = call.name not in ("", name), call_id not in ("", call.id or call_id)
    if not call.text and index is None:
        return has_other_id or (has_other_name and not call.id)
    if not call.text:
        return has_other_id and has_other_name
    if has_other_name or call.text[-1] != "}" or _is_cut(call.text):
        return has_other_name
    return has_other_id or (text != "" and (index is None or text != call.text))


# ---- the ladder: tool calls as such, tool calls written as text, plain text ------------------------------------------


def read_reply(reply: Reply, tools: Collection[str], others: Collection[str] = ()) -> None:
    """Read a reply's calls, mending what can be mended. A call that is cut never runs: of a final reply what it said
    becomes `partial`. Raises ModelError where no rung of the ladder holds, and for a cut call of any other reply."""
    if reply.refusal or (reply.fault == "filtered" and not reply.calls and not reply.text):
        reason = " ".join(clean_text(reply.refusal).split())[:80] or "its endpoint filtered the answer"
        raise ModelError("model_refused", f"the model refuses to answer: {reason}")
    reply.text, reply.reasoning = clean_text(reply.text).strip(), clean_text(reply.reasoning).strip()
    _read_text(reply, tools, others)
    cut = [call for call in reply.calls if (_is_cut(call.text) if call.text else reply.fault)]
    if cut and not reply.final:
        raise reply.problem("a tool call was cut off")
    reply.partial += "".join(call.spoken for call in cut)
    reply.calls = [call for call in reply.calls if call not in cut]
    ids = {""}
    for call in reply.calls:
        _read_call(call, reply, tools)
        if call.id in ids:
            reply.corrections += [("tool_call_id", "a call's id was used twice")] if call.id else []
            call.id = secrets.token_hex(5)[:9]  # Mistral takes nine letters or digits
        ids.add(call.id)
    if reply.fault:
        reply.corrections.append((reply.fault, str(reply.problem(""))))


def _read_call(call: ToolCall, reply: Reply, tools: Collection[str]) -> None:
    """Read and mend the name and the arguments of a call."""
    name = clean_text(call.name)
    call.id, call.name = clean_text(call.id), name.rpartition(".")[2]
    if name not in tools and call.name in tools:  # as in "functions.name"
        reply.corrections.append(("tool_name", f"{quote(name)} was read as {call.name!r}"))
    else:
        call.name = re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:64] or "unknown"  # as endpoints accept it in the history
    value, repair = read_json(call.text or "{}")
    if not isinstance(value, dict):
        call.problem = f"the arguments are no JSON object: {quote(call.text)}"
        return
    if repair:
        reply.corrections.append(("arguments", f"the arguments of {call.name}: {repair}"))
    texts = [key for key, item in value.items() if isinstance(item, str) and key != REQUEST_HEARTBEAT]
    if call.name == "send_message" and "message" not in value and len(texts) == 1:
        value["message"] = value.pop(texts[0])
        reply.corrections.append(("arguments", f"send_message takes message, not {quote(texts[0])}"))
    call.arguments = value


def _is_cut(text: str) -> bool:
    """Whether a JSON object ends before its closing brace: mended, it could do what nobody meant."""
    with contextlib.suppress(ValueError):
        inner = decode_json(text, strict=False)
        return isinstance(inner, str) and _is_cut(inner)
    first = text.find("{")
    return _end_of(text, first) == 0 if first >= 0 else text.count('"') % 2 == 1


def _end_of(text: str, start: int) -> int:
    """Where the brace closes that opens there; 0, where it does not."""
    depth = 0
    for match in re.compile(rf"(?sx){_STRING} | [{{}}]").finditer(text, start):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return match.end()
    return 0


def _read_text(reply: Reply, tools: Collection[str], others: Collection[str]) -> None:
    """Take thoughts, special tokens and tool calls out of a text. Raises ModelError for markup that is no call, and for
    a call of `others` where more stands beside it: it may be quoted from anywhere."""
    said, thoughts, end, kind = _parts_of(reply.text, 0, len(reply.text))
    markup = reply.text[end:]
    calls, words = _calls_in(markup, tools, kind == "call") if markup else ([], "")
    is_half = any(f"{name}(" in words or f"<{name}" in said for name in tools)
    if kind == "bare" and said.strip() and words and not is_half:  # an example in prose
        said, markup, calls = said + markup, "", []
    rest, own = f"{said.strip()}\n{words}".strip(), set(tools) - set(others)
    is_quoted = rest != "" and any(call.name.rpartition(".")[2] not in own for call in calls)
    is_unread = is_half or (not calls and (kind == "call" or any(f'"{name}"' in markup for name in tools)))
    if not reply.calls and (is_quoted or is_unread):
        raise reply.problem("the answer holds a tool call that cannot be read, or that stands among other text")
    reply.reasoning = "\n".join([reply.reasoning, *thoughts]).strip()
    reply.text = rest if calls else (said + markup).strip()
    if calls and not reply.calls:
        reply.calls = calls
        if not all(_is_cut(call.text) for call in calls):
            reply.corrections.append(("text_call", "a tool call written as text was read as a call"))


def _calls_in(markup: str, tools: Collection[str], is_marked: bool) -> tuple[list[ToolCall], str]:
    """The calls in markup, and the words that stand between them."""
    for pattern, plain in _SPELLINGS:
        markup = re.sub(pattern, plain, markup)
    if re.match(r"(?:<tool_call>\s*)?<function=(?!.*</parameter>)", markup, re.DOTALL):  # all lack their ends
        markup = re.sub(r"(?<!\s)\s*(?=</function|<parameter=)", "</parameter>", markup)
    text, start = re.sub(_IN_MARKUP, _plain, markup, flags=_VERBOSE), 0
    calls, words = list[ToolCall](), list[str]()
    while (begin := text.find("{", start)) >= 0 and len(words) < 200:  # more than that is no markup
        before, start = text[start:begin].strip("[], \n"), _end_of(text, begin) or len(text)
        piece, named = text[begin:start], re.fullmatch(_NAMED, before)
        name = named[1] if named and (is_marked or named[1] in tools) else ""
        mentioned = name or next((tool for tool in tools if tool in piece), "")
        found = [ToolCall("", mentioned, piece)] if mentioned else []
        if name not in tools and not (mentioned and _is_cut(piece)):
            found = [*_calls_of(read_json(piece)[0], tools)] or (found if name else [])
        calls += found
        if not found:
            words += [before, piece]
        elif found[0].name != name:
            words.append(before)
    return calls, " ".join(word for word in (*words, text[start:].strip()) if re.search(r"\w", word))


def _plain(match: re.Match[str]) -> str:
    """What a piece of markup stands for; a call in Python's syntax is parsed and never evaluated."""
    kind = match.lastgroup or ""
    if kind == "quoted":
        return encode_json(match["inner"])
    if kind == "parameters":
        return encode_json(dict(re.findall(_PARAMETER, match[0], _VERBOSE)))
    if kind != "python":
        return match.expand(_PLAIN.get(kind, " "))
    with contextlib.suppress(Exception), warnings.catch_warnings():  # of the parser, of values that are no literals
        warnings.simplefilter("ignore")  # of escapes that Python does not know
        call: Any = ast.parse(match[0], mode="eval").body
        given = [*enumerate(call.args), *((each.arg, each.value) for each in call.keywords)]
        arguments = {str(key): ast.literal_eval(each) for key, each in given}
        return f" to={ast.unparse(call.func)} {encode_json(arguments)}"
    return match[0]


def _calls_of(value: Any, tools: Collection[str]) -> Iterator[ToolCall]:
    """The calls in a JSON value, in the forms that models write."""
    fields = dict(enumerate(value)) if isinstance(value, list) else value
    if not isinstance(fields, dict):
        return
    name = next((fields[key] for key in _NAME_KEYS if isinstance(fields.get(key), str)), "")
    others = {key: item for key, item in fields.items() if key not in ("id", "type", *_NAME_KEYS)}
    arguments = next((fields[key] for key in _ARGUMENT_KEYS if isinstance(fields.get(key), (dict, str))), others)
    if name and (arguments is not others or (others and name in tools)):
        yield ToolCall("", name, arguments if isinstance(arguments, str) else encode_json(arguments))
        return
    for key, item in fields.items():
        if key in tools and isinstance(item, dict):
            yield ToolCall("", key, encode_json(item))
        else:
            yield from _calls_of(item, tools)


# ---- what an endpoint says when it refuses ---------------------------------------------------------------------------
# Each says the same in its own words. They are made plain, and phrases, divided by |, are looked for in them.

_REASONS = r"(?i)(?!finish)\w*(?:errors?|message|msg|detail|description|reason|title|cause|metadata|raw|resp|fault\w*)"
_PHRASES = {
    "loading": "^(?:5..|404|409|425|429) .*(?:loading|being loaded|loaded yet|initiali[sz]ing|cold start|warm|starting"
    "|scaled to|not (?:yet )?ready)",
    "unread": "(?:tool use|parse|tool call validation) failed|failed to (?:call a|parse (?:tool|input))|parsing tool",
    "used up": "^402|insufficient (?:quota|balance|credits)|credit balance is too low",
    "no key": "^401|(?:invalid|incorrect|expired) .{0,12}api key|api key .{0,30}(?:valid|expired)"
    "|^403(?!.*(?:quota|limit|country|region|location|page))"
    ".*(?:key|token|credential|authenticat|authori|permission|forbidden$|no reason given)",
    "no tools": r"support .{0,9}tool|(?:tools?|function)\b.{0,12} (?:not (?:support|enabl)|requires)",
    "prompt": "context|ctx|prompt|input|message|sequence|(?<!max )(?<!completion )token|conversation|string",
    "too long": r"too (?:long|large|many|big)|exceed|overflow|(?:longer|larger|greater) than|less than (?:\d|max)"
    r"|max(?:imum| is)|must be (?:<|smaller)|over the|reduce|shorter|truncate|length should be|at most \d{3}",
    "surely too long": r"^413|context .{0,20}(?:length|window|size|limit)|request (?:\w+ )?too (?:large|long)"
    r"|current length|only supports (?:up to )?[\d ]+tokens|超(?!时)|过长",
    "not the prompt": r"too many (?:\w+ )?(?:requests|connect)|timed? ?(?:out|limit)|call ids?"
    r"|\d (?:id|name|description)|^(?!.*token).*(?:tool|function|image|file).{0,60}(?:too |exceed|maximum)",
    "not taken": "unsupport|extra|unknown|unexpected|unrecogni|invalid|deprecated|must|should be|cannot|ca not|only"
    r"|not (?:\w+ )?(?:support|valid|permit|allow|available|accept|recogni|compatible|implement|one of)|at most|between"
    "|range|out of|too (?:large|big|high|small|low)|exceeds (?:the )?m|maximum allowed|expected a|than the maximum of",
    "lacks": "missing|required|must be (?:passed|sent|provided|included|present)|need",
}
_MEANINGS = (  # phrases; our code, a sentence, what may help: of the rows that fit the first
    ("(?:error|failed|while) loading", "model_unavailable", "the endpoint cannot load the model", "retry"),
    ("loading", "model_unavailable", "the endpoint is loading the model", "wait"),
    ("unread", "bad_output", "the endpoint could not read the model's tool call", ""),
    ("used up", "model_rate_limit", "the account at the endpoint is used up", ""),
    ("no key", "model_auth", "the endpoint refuses the key; set OPENAI_API_KEY", ""),
    ("^429|rate limit", "model_rate_limit", "the endpoint limits the rate", "retry"),
    ("no tools", "model_refused", "memws needs a model and an endpoint that take tools", ""),
    ("^(?!5|40[13]).*an html page", "model_unavailable", "check --base-url, does it end with /v1?", "retry"),
    ("^404", "model_unavailable", "the endpoint does not know the model or the address", ""),
    ("^4(?!08|09)..", "model_refused", "the endpoint refused the request", ""),
    ("", "model_unavailable", "the endpoint failed", "retry"),
)
_COUNT = r"(?<![\w.-])(\d++(?:[,._]\d++)*+)(?![\w>]|\s*(?:k\b|char|byte|[KM]B))"
_WINDOWS = (  # where the number of tokens stands that a prompt may have
    rf"(?:>|<=?|≤|\[\s*\d+\s*,)\s*{_COUNT}",
    rf"\b(?:maximum|max|at most|less than|up to|available|allowed|n_ctx|(?:can)?not exceed)\b[^\d>.]{{0,50}}{_COUNT}",
    rf"\b(?:limit|context (?:length|size|window)|max\w*)\b(?:(?!\b(?:by|exceeded)\b)[^\d>(]){{0,30}}\(?{_COUNT}(?!\))",
    rf"{_COUNT}(?: tokens?)? (?:maximum|max|limit|context|allowed)",
)
_OPTIONS = {  # those that a request may do without, and what endpoints call them
    "stream_options": "stream options|include usage",
    "reasoning_effort": "reasoning effort|think value|thinking(?! mode)|reasoning is|support reasoning",
    "max_tokens": "max tokens|max output tokens|maximum tokens you",
    **{name: name.replace("_", " ") for name in ("max_completion_tokens", "seed", "temperature", "top_p")},
    "stream": "stream(?! options)",
}
_OTHERS = r"""schema|properties['".[]|(?:tools|messages|functions?)[.[]+\d|polic
    |(?:tool|function)\ (?:['"`]|parameter|argument|definition|input)"""  # what else may have such names
_EFFORT = r"reasoning effort (?:(?:must|should) be )?(?:to |= |as )?(none|low|medium)\b"
_LESSONS = (  # phrases, others near them; the rule of shape that they ask for
    (r"alternat(?:e|ing)\b|(?:successive|consecutive) (?:user|mess|role)|in a row\b", "", "alternate"),
    (r"(?:after|follow) (?:a |role |messages with role )?(?:tool|user turn)\b", "", "alternate"),
    ("not support (?:the )?system|only user (?:and )?assistant (?:and tool )?roles", "", "systemless"),
    ("(?:system|developer) (?:role|message|instr|prompt)|role system", "(?:un|not )(?:supp|enab|allow)", "systemless"),
    (r"call ids?\b|calls \d+ id\b|tool use id\b", "length|too long|a z|pattern|alphanumeric", "short ids"),
    ("content or tool calls but not both", "", "calls alone"),
    ("reasoning content", "lacks", "with reasoning_content"),
    ("thought ?signature", "lacks", "with extra_content"),
)
_OWN_FIELD = r"\b(reasoning_(?:content|details)|extra_content|(?<=['\"`.])reasoning)\b"


def words_of(text: str) -> str:
    """A text as lower-case words with one space between them, without what joins or quotes them; "not" in full."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text.replace("n't", " not"))
    return " ".join(re.sub(r"[^\w<>=]|_", " ", apart).lower().split())


def says(text: str, phrases: str, others: str = "") -> bool:
    """Whether a plain text has one of the phrases; with `others`, one of these within 60 characters of it as well."""
    first, second = (rf"(?<![a-z0-9])(?:{_PHRASES.get(each, each)})" for each in (phrases, others))
    return bool(re.search(rf"{first}.{{0,60}}{second}|{second}.{{0,60}}{first}" if others else first, text))


def reason_of(body: Any) -> str:
    """The endpoint's own words in an error body of any shape: JSON, JSON inside JSON, a page, plain text."""
    if isinstance(body, list):
        return "; ".join(dict.fromkeys(filter(None, map(reason_of, body))))
    if isinstance(body, dict):
        place = ".".join(map(str, body["loc"])) if isinstance(body.get("loc"), list) else ""
        values = (value for key, value in body.items() if re.fullmatch(_REASONS, key))
        return ": ".join(dict.fromkeys(filter(None, (place, *map(reason_of, values)))))
    text = body.strip() if isinstance(body, str) else ""
    with contextlib.suppress(ValueError):
        return reason_of(decode_json(text)) or text
    if re.match(r"<(?:!|html|head|body)", text, re.IGNORECASE):
        import html  # a table of all entities, which no start needs

        title = re.search(r"<title[^>]*>([^<]*)", text[:5_000], re.IGNORECASE)
        return f"an HTML page {html.unescape(title[1]).strip() if title else ''!r}"
    return text


class Refusal:
    """What an endpoint answers where it refuses a request, or says inside an answer that it failed."""

    def __init__(self, answer: Any, status: int, hide: Callable[[Any, int], str]) -> None:
        with contextlib.suppress(ValueError, AttributeError):
            answer = decode_json(answer)
        self.reason = hide(reason_of(answer) or str(answer or "no reason given"), 2 * MAX_REASON)
        body = answer[0] if answer and isinstance(answer, list) else answer
        body = body if isinstance(body, dict) else {}
        self.fields: JSON = body | (body["error"] if isinstance(body.get("error"), dict) else {})
        codes = [str(self.fields[key]) for key in ("status_code", "status", "code", "type") if self.fields.get(key)]
        self.status = status or next((int(code) for code in codes if re.fullmatch(r"[45]\d\d", code)), 0)
        self.words = words_of(f"{self.status or ''} {' '.join(codes)} = {self.reason}")

    def window(self) -> int | None:
        """The window that it tells, or 0, where it finds the prompt too long; not: too much for now."""
        text, words = f"{self.reason} n_ctx {self.fields.get('n_ctx')}", self.words
        counts = [match[1] for each in _WINDOWS if (match := re.search(each, text, re.IGNORECASE))]
        window = int(re.sub(r"\D", "", counts[0])) if counts else 0
        if self.status == 429 or says(words, "rate limit"):
            requested = re.search(r"requested:? (\d[\d,]*)", text, re.IGNORECASE)
            is_long = int(requested[1].replace(",", "")) > window if requested else says(words, "too (?:large|long)")
        else:
            is_long = says(words, "prompt", "too long") and not says(words, "not the prompt")
            is_long = is_long or says(words, "surely too long")
        return window if is_long and self.status not in (401, 402, 403) else None

    def option(self, sent: JSON) -> list[Any]:
        """Which option that was sent it does not take: its name, its value, what is sent instead; none: []."""
        reason = f"{self.fields.get('param')}: {self.reason}"
        pieces = [words_of(each) for each in reason.split("; ") if not re.search(_OTHERS, each, _VERBOSE)]
        effort = re.search(_EFFORT, words_of(reason))
        is_about_it = self.status < 502 and self.status not in (401, 402, 403, 429)
        for name, names in _OPTIONS.items() if is_about_it else ():
            value, instead = sent.get(name), dict[str, Any]()
            if name == "reasoning_effort" and effort and effort[1] != value:
                instead = {name: effort[1]}
            elif name == "max_tokens" and value and "max_completion_tokens" in reason:
                instead = {"max_completion_tokens": value}
            if (name in sent or instead) and any(says(each, names, "not taken") for each in pieces):
                return [name, value, instead]
        return []

    def rules(self, sent: JSON) -> list[str]:
        """The rules of shape that it asks for; where roles have to alternate that which the request lacks."""
        words, roles = words_of(self.reason), [message["role"] for message in sent["messages"]]
        rules = [rule for phrases, others, rule in _LESSONS if says(words, phrases, others)]
        rules += [] if says(words, "lacks") else [f"without {name}" for name in re.findall(_OWN_FIELD, self.reason)]
        if "alternate" in rules and _BETWEEN.keys().isdisjoint(itertools.pairwise(roles)):
            return ["tools as text" if "tool" in roles else "systemless"]
        return rules


# ---- tapes: what models were asked and answered, on file -------------------------------------------------------------

_PRIVATE = (
    r"(?i)\b(?:sk[-_]|Bearer )[\w*.~+/=-]{6,}|\bAIza[\w-]{9,}"
    r"|(?<![a-z])(?:gsk|xai|hf|key|token)[-_\s:='\"]{1,3}(?=[\w*.-]*[\d*])(?=[\d_.-]*[a-z*])[\w*.-]{6,}"
)
_MADE = r"""(?x)  # ids that are made up, days and clock times, the login that a silence brings
    (?<=id":")(?:[^"\\]|\\.)* | (?:turn|call|agent)_[0-9a-f]{8,32}\b
    | \b[0-9a-f]{8}(?:-?[0-9a-f]{4}){3}-?[0-9a-f]{12}\b | \b\d{4}-\d\d-\d\d(?![\dT]|\ \d)
    | \b(?:\d{4}-\d\d-\d\d[T ])?\d\d?:\d\d(?::\d\d(?:\.\d+)?)?
        (?:\ ?[AP]M(?:\ [^"\\]{0,40}?[+-]\d{4})? | [+-]\d\d:\d\d | Z)?\b
    | \{\\"type\\":\\"login\\".*?\}\\n
"""
_SERVER = ("model", "base_url", "embedding_model", "context_window")  # what a tape tells of the server
_STOPPED: JSON = {"code": "model_timeout", "message": "on the tape the turn was stopped here"}


@functools.lru_cache(maxsize=1_000)
def _lasting(text: str) -> str:
    """A part of a request without secrets, and without what differs from run to run."""
    return re.sub(_MADE, "", re.sub(_PRIVATE, "", text))


class Tape:
    """Calls of models on file, a line of JSON each: recorded as they end, or replayed, each to the same prompt. Raises
    UsageError where the file cannot be used."""

    def __init__(self, path: str, replays: bool) -> None:
        self.path, self.replays = path, replays
        self.stream = self._replay if replays else self._record  # the chunks of a model's answer to parts of a request
        self.secrets: set[str] = set()  # what no line may hold
        self._lines: list[JSON] = []
        self._open = functools.partial(open, path, encoding="utf-8", errors="surrogatepass")
        try:
            if not replays:
                pathlib.Path(path).touch(0o600)
            with self._open() as file:
                for line in file:
                    self._lines.append(decode_json(line))
            server: JSON = self._lines[0]["server"] if replays or self._lines else dict.fromkeys(_SERVER)
            self.about = {name: server[name] for name in _SERVER}
        except (OSError, ValueError, LookupError, TypeError) as error:
            reason = getattr(error, "strerror", f"it is no tape, or damaged in line {len(self._lines) + 1}")
            flag = "--replay" if replays else "--record"
            raise UsageError(f"{flag}: cannot use the tape {path!r} ({reason}); name another file") from error

    def keep(self, start: float, **line: Any) -> None:
        text = encode_json({"start": start, "seconds": round(time.time() - start, 3), **line})
        for secret in (each for each in self.secrets if len(each) >= 8):
            text = text.replace(encode_json(secret)[1:-1], "")
        with self._open(mode="a") as file:
            file.write(f"{text}\n")

    async def _record(self, model: Model, body: str, parts: list[str], agent: str) -> AsyncGenerator[JSON, None]:
        start, chunks, end = time.time(), list[Any](), cast(Any, _STOPPED)
        try:
            async with contextlib.aclosing(model.stream(body)) as answer:
                async for chunk in answer:
                    chunks.append([round(time.time() - start, 3), chunk])
                    yield chunk
            end = None
        except ModelError as error:
            end = vars(error) | {"message": str(error)}
            raise
        finally:
            prompt, learned = "\n".join(map(_lasting, parts)), vars(model.learned)
            self.keep(start, agent=agent, prompt=prompt, chunks=chunks, end=end, learned=learned)

    async def _replay(self, model: Model, body: str, parts: list[str], agent: str) -> AsyncGenerator[JSON, None]:
        prompt, lines = "\n".join(map(_lasting, parts)), [line for line in self._lines if "prompt" in line]
        calls = [line for line in lines if line["agent"] == agent] or lines
        call = next((call for call in calls if call["prompt"] == prompt), None)
        if call is None:
            expected = calls[0]["prompt"] if calls else ""
            start = max(0, len(os.path.commonprefix([prompt, expected])) - 20)  # noqa: RUF071 (texts, no paths)
            ours, theirs = (quote(text[start:].replace("\\", "")) for text in (prompt, expected))
            text = f"the tape {self.path!r} has {theirs if calls else 'no more calls'} where this prompt has {ours}"
            raise MemwsError(f"{text}; record it anew", "model_refused")
        self._lines.remove(call)
        for _, chunk in call["chunks"]:
            yield chunk
        await asyncio.sleep(IDLE_TIMEOUT if call["end"] == _STOPPED else 0)
        model.learned = Learned(**call["learned"])
        if call["end"]:
            raise ModelError(**call["end"])

    def vector(self, text: str) -> bytes:
        """The next vector of a text, its last one again and again; b"": it had none."""
        found = [line for line in self._lines if line.get("text") == text]
        if len(found) > 1:
            self._lines.remove(found[0])
        return base64.b64decode(found[0]["vector"] if found else "")


# ---- OpenAI-compatible endpoints -------------------------------------------------------------------------------------

MISSING_OPENAI = "a model other than offline needs the openai package: pip install -U openai"
_IMPORT_THREAD = "memws-import"
_ADDRESS = r"(?i)https?://([^\s/?#@]*@)?(\[[\da-f:.]+\]|[^\s/?#\[\]:@]+)(:\d{1,5})?([/?#]\S*)?"
_DONE: JSON = {"choices": []}  # the last chunk: [DONE]


class Endpoint:
    """One OpenAI-compatible server and the clients for it, made when they are first needed."""

    def __init__(self, base_url: str | None, api_key: str | None, idle_timeout: float = IDLE_TIMEOUT) -> None:
        self.base_url, self.idle_timeout = base_url, idle_timeout
        self.key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not re.fullmatch(r"[ -~]*", self.key):  # it is in no error
            raise UsageError("OPENAI_API_KEY: expected a key of visible ASCII characters; copy it anew")
        self.is_chosen = bool(base_url or self.key)  # somebody has named one, or has a key for OpenAI's
        address = (base_url or "https://api.openai.com/v1").strip()
        if base_url and not re.fullmatch(_ADDRESS, address):
            raise UsageError(f"--base-url: expected one like http://localhost:11434/v1, but got {quote(address)}")
        parts = urllib.parse.urlsplit(address)
        path, query = parts.path.rstrip("/").removesuffix("/chat/completions"), urllib.parse.parse_qsl(parts.query)
        self.place = f"{parts.netloc.rpartition('@')[2]}{path}"  # its address without a scheme and a user
        self.secrets = {self.key, parts.password or ""}
        self.options: JSON = {"api_key": self.key or "none", "max_retries": 0, "default_query": dict(query)}
        self.options["base_url"] = f"{parts.scheme}://{parts.netloc}{path}"
        if "api-version" in dict(query):  # Azure
            self.options["default_headers"] = {"api-key": self.key}
        self._free = list[Any]()  # HTTP clients, one for each request at once: a pool looks at all its connections
        self._certificates: Any = None  # of all clients: to read them takes 15 ms
        self._making, self._order = asyncio.Lock(), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncGenerator[Any, None]:
        """The HTTP client for one request. Raises UsageError where the openai package is missing."""
        async with self._making:
            if not self._free:
                self._free.append(await in_thread(_IMPORT_THREAD, self._make))
            client = self._free.pop()
        try:
            yield client
        finally:
            self._free.append(client)

    def _make(self) -> Any:
        """What is inside of an openai client: what that does around it and to each chunk costs a fifth of a turn."""
        openai = needed("openai", MISSING_OPENAI)
        httpx = sys.modules[openai.DefaultAsyncHttpxClient.__base__.__module__]  # or httpx2, by the version of openai
        self._certificates = self._certificates or httpx.create_ssl_context()
        timeout = openai.Timeout(None, connect=CONNECT_TIMEOUT)
        http = openai.DefaultAsyncHttpxClient(timeout=timeout, verify=self._certificates)
        client = openai.AsyncOpenAI(**self.options, http_client=http)
        headers = {**client.auth_headers, **client.default_headers}.items()
        http.headers.update({name: value for name, value in headers if isinstance(value, str)})
        urls = (client.base_url.join(path) for path in ("chat/completions", "embeddings"))
        self.chat_url, self.embeddings_url = (url.copy_merge_params(client.default_query) for url in urls)
        return http

    async def step_aside(self) -> None:
        """Let others have the loop between two requests: of 32 turns at once nobody waits for all."""
        async with self._order:
            await asyncio.sleep(0)

    def only_model(self) -> str:
        """The one model that the endpoint serves, asked with a time limit. Raises UsageError where there is not one."""
        openai = needed("openai", MISSING_OPENAI)
        try:
            with openai.OpenAI(timeout=CONNECT_TIMEOUT, **self.options) as client:
                answer = client.get("/models", cast_to=object)
            models = [clean_text(each["id"])[:MAX_MODEL_NAME] for each in answer["data"]]
        except Exception as error:  # of the client, of its transport, of an answer that is no list
            raise UsageError(f"no list of models ({self.hide(error)}); check --base-url or give --model NAME") from None
        if len(models) != 1:
            names = ", ".join(models[:20]) or "none"
            raise UsageError(f"the endpoint serves {len(models)} models: choose one with --model; they are: {names}")
        return models[0]

    def hide(self, reason: Any, most: int = MAX_REASON) -> str:
        """A text or an error on one line, cut short, without the key or what looks like one."""
        text = (str(reason)[:MAX_TEXT] or type(reason).__name__).replace(self.key or "\0", "…")
        return " ".join(clean_text(re.sub(_PRIVATE, "…", text)).split())[:most]

    async def close(self) -> None:
        """Close the clients; an import that is under way is waited for, as threads outlive their loop."""
        for thread in (each for each in threading.enumerate() if each.name == _IMPORT_THREAD):
            thread.join()
        for client in self._free:
            await client.aclose()


class OpenAIModel:
    """A model behind the chat-completions API, streamed. Chunks stay dicts: types for 100 messages cost 15 ms."""

    def __init__(self, name: str, endpoint: Endpoint, recalled: Mapping[str, str]) -> None:
        self.name, self.endpoint = name, endpoint
        self.window = next(size for start, size in CONTEXT_WINDOWS.items() if name.startswith(start))
        maker = re.sub(r'[",\\]', "_", f"{name} at {endpoint.place}")
        self.learned = Learned([maker])
        with contextlib.suppress(LookupError, ValueError, TypeError, InvalidRequest):  # another memws may have told it
            self.learned = Learned(**function_of(Learned).bind(decode_json(recalled[f"learned {maker}"])))

    def head(self, settings: JSON) -> str:
        """The JSON of a request without messages and tools."""
        options: JSON = {"model": self.name, "stream": True, "stream_options": {"include_usage": True}, **settings}
        for name, refused, instead in self.learned.options:
            if options.get(name) == refused:
                options = {**options, name: None, **instead}
        unwanted = None if options.get("stream") else "stream_options"
        return encode_json({name: value for name, value in options.items() if value is not None and name != unwanted})

    async def stream(self, body: str) -> AsyncGenerator[JSON, None]:
        """Send a request; the chunks of its answer. Raises ModelError."""
        has_words, is_over, now = False, False, asyncio.get_running_loop().time
        try:
            async with (
                self.endpoint.client() as client,
                asyncio.timeout(FIRST_TOKEN_TIMEOUT) as limit,  # whoever takes the chunks awaits nothing else
                contextlib.aclosing(self._chunks(client, body)) as chunks,
            ):
                async for chunk in chunks:
                    if type(chunk) is not dict or chunk.get("error") or ("choices" not in chunk and reason_of(chunk)):
                        raise self._refusal(chunk, body)
                    if not has_words:
                        await self.endpoint.step_aside()
                    choices, ends = chunk.get("choices") or (), chunk is _DONE and has_words
                    for choice in choices:
                        if choice.get("error"):
                            yield chunk
                            raise self._refusal(choice, body)
                        ends = ends or choice.get("finish_reason") or "message" in choice
                    has_words, is_over = has_words or bool(choices), is_over or bool(ends)
                    patience = END_PATIENCE if is_over else self.endpoint.idle_timeout
                    if has_words and abs((limit.when() or 0.0) - now() - patience) > END_PATIENCE / 2:
                        limit.reschedule(now() + patience)
                    yield chunk
                if not is_over:
                    raise EOFError("it ended early")
        except Exception as error:  # transports raise errors of many libraries
            if is_over:  # all was said, and only the end of the stream is missing
                return
            failure = error if isinstance(error, ModelError) else self._failure(error, has_words)
            if not failure.generation:
                raise failure from None
            yield {"choices": [{"delta": {"content": failure.generation}, "finish_reason": "stop"}]}

    async def _chunks(self, client: Any, body: str) -> AsyncGenerator[Any, None]:
        """The chunks of the answer to a request, of which there is one where the endpoint does not stream."""
        await self.endpoint.step_aside()
        async with client.stream("POST", self.endpoint.chat_url, content=body.encode()) as incoming:
            if not incoming.is_success:
                await incoming.aread()
                raise self._refusal(incoming.text, body, incoming.status_code, incoming.headers)
            is_packed = "content-encoding" in incoming.headers
            pieces, data, rest, text = aiter(incoming.aiter_bytes() if is_packed else incoming.stream), b"\n", b"", b""
            page: bytes | None = b""  # what comes before the first event; None: there was one
            while data:
                data = await anext(pieces, b"")
                lines = (rest + (data or b"\n\n")).splitlines(keepends=True)
                rest = b"" if lines[-1].endswith(b"\n") else lines.pop()  # one after CR may still come
                for line in lines:
                    if line.startswith((b"data:", b"\xef\xbb\xbfdata:")):  # there may be a BOM
                        text += line.partition(b":")[2].strip()
                    elif text and not line.strip():
                        yield _DONE if text == b"[DONE]" else decode_json(text.decode())
                        text, page = b"", None
                    elif page is not None:
                        page += line
            if answer := (page or b"").strip():
                yield decode_json(answer) if answer.startswith(b"{") else answer.decode(errors="replace")

    def _failure(self, error: Exception, has_words: bool) -> ModelError:
        """What an error of the transport means for the turn."""
        if isinstance(error, TimeoutError):
            seconds = self.endpoint.idle_timeout if has_words else FIRST_TOKEN_TIMEOUT
            text = f"the model said nothing for {seconds:g} s; is the endpoint overloaded?"
            return ModelError("model_timeout", text, retry=has_words)
        reason = self.endpoint.hide(error.__cause__ or error)
        text = f"no answer from the model's endpoint ({reason}); is it running, and is --base-url right?"
        text = f"the model's answer broke off ({reason})" if has_words else text
        return ModelError("model_unavailable", text, retry=True)

    def _refusal(self, answer: Any, body: str, status: int = 0, headers: Mapping[str, str] | None = None) -> ModelError:
        """The ModelError for a refusal, by which the model learns; one inside an answer has no status."""
        refusal, sent, wait = Refusal(answer, status, self.endpoint.hide), decode_json(body), None
        learned, option, window = self.learned, refusal.option(sent), refusal.window()
        code, text, remedy = next(row[1:] for row in _MEANINGS if says(refusal.words, row[0]))
        if option and option not in learned.options:
            self.learned = replace(learned, options=[*learned.options, option])
            logger.info("%s does not take %s = %r; from now on it gets %s instead", self.name, *option)
            code, text, remedy = "model_refused", "the endpoint refused an option", ""
        elif window is not None:
            if 2 * MIN_REPLY_TOKENS <= window < (learned.window or sys.maxsize):
                self.learned = replace(learned, window=window)
            code, text, remedy = "context_overflow", "the endpoint finds the prompt too long", ""
        elif code in ("model_refused", "model_unavailable"):  # maybe of the history
            self.learned = replace(learned, shape=list(dict.fromkeys([*learned.shape, *refusal.rules(sent)])))
        with contextlib.suppress(ValueError, LookupError):
            wait = max(0.0, float((headers or {})["retry-after"]))
        text = f"{text} ({refusal.status or 'in its answer'}): {refusal.reason[:MAX_REASON]}"
        text += f"; it asks to wait {wait:g} s" if wait else ""
        remedy = remedy if (wait or 0) <= MAX_RETRY_AFTER else ""
        wait = wait or LOADING_PAUSE if remedy == "wait" else wait
        said = refusal.fields.get("failed_generation") or ""
        said = said if isinstance(said, str) else encode_json(said)
        return ModelError(code, text, retry=remedy != "", retry_after=wait, loading=remedy == "wait", generation=said)


class Embedder:
    """Vectors of texts; none for EMBEDDING_PAUSE after a failure. Raises UsageError where numpy is missing."""

    def __init__(self, name: str, endpoint: Endpoint, tape: Tape | None = None) -> None:
        needed("numpy", "embeddings need the numpy package: pip install numpy")
        self.name, self._endpoint, self._tape = name, endpoint, tape
        self.catch_up: Callable[[], Coroutine[Any, Any, None]] | None = None  # gives vectors to what has none yet
        self.paused_until = 0.0  # in monotonic time; 0: the last call went well
        self._recent: dict[str, bytes] = {}  # vectors of the last queries: their next page asks for them again

    async def vector(self, query: str) -> bytes | None:
        """The vector of a query; None where it cannot be had in time."""
        if query not in self._recent and (vectors := await self.vectors([query], EMBEDDING_PATIENCE)) and vectors[0]:
            self._recent = dict([*self._recent.items(), (query, vectors[0])][-100:])
        return self._recent.get(query)

    async def vectors(self, texts: Sequence[str], patience: float | None = None) -> list[bytes] | None:
        """The vectors of texts, b"" for one that the endpoint refuses; None where it fails or has just failed."""
        if self._tape and self._tape.replays:
            return list(map(self._tape.vector, texts))
        start, vectors = time.time(), None
        try:
            if self.paused_until <= time.monotonic():
                async with asyncio.timeout(patience or self._endpoint.idle_timeout):
                    vectors = await self._ask([text[:EMBEDDING_TEXT] or " " for text in texts])
                self.paused_until = 0.0
        except Exception as error:  # of the client, of the transport, of vectors that are none
            if not self.paused_until:
                logger.warning("embeddings of %s fail (%s): words alone decide", self.name, self._endpoint.hide(error))
            self.paused_until = time.monotonic() + EMBEDDING_PAUSE
        if self._tape and (vectors or patience):  # of queries also that they got none
            for text, vector in zip(texts, vectors or [b""], strict=True):
                self._tape.keep(start, text=text, vector=base64.b64encode(vector).decode())
        return vectors

    async def _ask(self, texts: list[str]) -> list[bytes]:
        """The vectors of texts; where they are refused together, of each half. Raises whatever fails."""
        body = encode_json({"model": self.name, "input": texts})
        async with self._endpoint.client() as client:
            answer = await client.post(self._endpoint.embeddings_url, content=body.encode())
        if answer.status_code in (400, 413, 422) and texts != ["text"]:
            if half := len(texts) // 2:
                return await self._ask(texts[:half]) + await self._ask(texts[half:])
            await self._ask(["text"])  # where this is refused as well, it is for no text's sake
            return [b""]
        if not answer.is_success:
            raise ValueError(f"{answer.status_code}: {reason_of(answer.text)}")
        items = sorted(decode_json(answer.content)["data"], key=lambda item: item.get("index") or 0)
        vectors = [pack_vector(item["embedding"]) for item in items]
        if len(vectors) != len(texts) or len({len(vector) for vector in vectors}) != 1:
            raise ValueError(f"{len(vectors)} vectors for {len(texts)} texts")
        return vectors


# ---- the offline model -----------------------------------------------------------------------------------------------
# Rules: it keeps what people say of themselves, in their own words, and answers a question with what shares most with
# it of what its searches find and of core memory.

_SENTENCES = {  # in English and Spanish
    "stand-in": (
        "I am memws's offline stand-in: rules, not a language model. For one see --model, --base-url, OPENAI_API_KEY.",
        "Soy el suplente de memws: reglas, no un modelo de lenguaje. Para uno: --model, --base-url, OPENAI_API_KEY.",
    ),
    "core": ("I noted in core memory: {}.", "Anoté en la memoria central: {}."),
    "archival": ("I noted in archival memory: {}.", "Anoté en la memoria de archivo: {}."),
    "user": ('You told me on {}: "{}".', 'Me lo dijiste el {}: "{}".'),
    "passage": ('In archival memory since {}: "{}".', 'En la memoria de archivo desde el {}: "{}".'),
    "holds": ("In core memory: {}.", "En la memoria central: {}."),
    "unknown": ("I found nothing about {}.", "No encontré nada sobre {}."),
}
_ENGLISH = r"\b(?:the|i|my|is|are|you|what|who|where|how|of|to|it|this|that|have|good|hi|hello|thanks)\b"
_SPANISH = r"[¿ñ]|\b(?:el|los|las|yo|soy|mi|mis|es|y|qué|quién|tengo|vivo|mudé|llamo|nombre|gusta|trabajo|hola)\b"
_IDEAS = {  # what people ask for in other words than they state it; "": no idea
    "name": "name named call called who nombre llamo llama quién",
    "live": "live lives lived home house city address moved vivo vive casa ciudad mudé",
    "work": "work works job profession living occupation trabajo trabaja profesión",
    "age": "age old edad años",
    "partner": "wife husband partner spouse married mujer esposa esposo marido pareja casado casada",
    "like": "like likes love loves enjoy prefer hobby hobbies favorite favourite gusta gustan encanta favorito",
    "color": "color colour",
    "": "tell know remember say said also a con de el en es la las lo los me mi mis para por que qué quiénes se son su"
    " sus un una y cuál cuántos cuántas dónde cómo tengo",
}
_IDEA_OF = {word: idea for idea, words in _IDEAS.items() for word in words.split()}
_JOB = r"(\w+ )?(\w+ologist|teacher|nurse|doctor|engineer|lawyer|pilot|profesora?|enfermer[oa]|médic[oa]|ingenier[oa])"
_OWN = {  # how people state what they have one of: a newer statement replaces the older
    "name": r"(my|mi)( \w+)? (name is|nombre es)|i'm called|(you can )?call me(?= (?-i:[A-Z]))|me llamo",
    "live": r"(i|we)('ve| have)?( now| just)* (live in|moved to)|i'm( now)? living in|vivo en|me (he )?mud(é|ado) a",
    "work": rf"i( now)? work as|my( new)? job is|trabajo (de|como)|(i'm|i am|soy)( now)?( an?| una?)? {_JOB}",
    "work at": r"i( now)? work (at|for|in)|trabajo (en|para)",
    "age": r"(i'm|i am)( now)? \d+(?= years| now|$)|i( just)? turned \d+|tengo( ya)? \d+ años|cumplí \d+",
    "partner": r"(my|mi) (wife|husband|partner|girlfriend|boyfriend|mujer|esposa|esposo|marido|pareja|novia|novio)"
    r"('s name is| is called| se llama|( is| es)( now)?(?= (?-i:[A-Z])))|(i'm|i am|i|estoy)( now)? (married|casad[oa])",
}
_I = r"i|i'm|i've|my|mine|me|we|our|yo|mi|mis|soy|estoy|vivo|trabajo|tengo|nací|cumplí|remember|recuerda"
_ASK = r"who|what|where|when(?! i)|which|why|how|do|does|did|is|are|am|can|tell me|qué|quién|dónde|cuándo|cuál|cómo"
_BREAK = (  # between sentences, unless one goes on about somebody, and before what somebody says or asks
    r"(?i)(?<=[.!?])\s+(?!(?:he|she|it|they|his|her|their|su)\b)|\n+|\s*(?=¿)"
    rf"|(?:[,;] | and | y |[,;] (?:and|but|y|pero) )(?=(?:{_I}|{_ASK})\b)"
)
# A fact is what people state of themselves; in other languages whatever they state in three words.
_FACT = rf"(?i)\b(?:{_I})\b|[我私]|^(?!.*(?:{_ENGLISH}|{_SPANISH}))\w+\W+\w+\W+\w"
_QUESTION = rf"(?i)[¿\s]*(?:{_ASK})\b|.*[?？؟]$"
_ABOUT_ITSELF = r"(?i)\b(?:are you|your name|eres|te llamas)\b|^forget"
_ORDER = r"(?s)\s*/call\s+([\w.-]+)\s*(.*)"


def _own_idea(text: str) -> str:
    """What somebody states of which people have one, such as a name; "" for any other."""
    start, text = r"((actually|now|well|no|but|ahora|bueno|pero)\b,? )*", text.replace("\u2019", "'")
    return next((idea for idea, opening in _OWN.items() if re.match(rf"(?i:{start}({opening}))\b", text)), "")


def _topic(text: str) -> set[str]:
    """What two texts about the same share: ideas, and terms of search for which there is none."""
    topic = {_own_idea(text)}
    for word in re.findall(r"\w+", text.lower()):
        topic.update([_IDEA_OF[word]] if word in _IDEA_OF else split_terms(word))
    return topic - {""}


def _split(text: str) -> tuple[list[str], list[str]]:
    """The statements and the questions of a text, but about the model itself; an order has none."""
    pieces = [] if re.match(_ORDER, text) else [piece.strip(" .!") for piece in re.split(_BREAK, text[:4_000])]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece and not re.search(_ABOUT_ITSELF, piece)]
    questions = [piece for piece in pieces if re.match(_QUESTION, piece)]
    return [piece for piece in pieces if piece not in questions], questions[:3]


def _offline_turn(messages: list[JSON]) -> tuple[str | None, list[tuple[str, JSON, JSON]]]:
    """What waits for an answer, if anything, and name, arguments and result of each call made since it came."""
    text, calls, done = None, dict[str, JSON](), list[tuple[str, JSON, JSON]]()
    for message in messages:
        for event in map(decode_json, message["content"].split("\n") if message["role"] == "user" else ()):
            said = event.get("message") or event.get("reason") or ""
            if event["type"] == "user_message" or WAITING_NOTE in said:
                text, done = said.rpartition(WAITING_NOTE)[2], []
            elif said in (HEARTBEAT_TIMER, HEARTBEAT_WAKE):
                text = None
        calls |= {call["id"]: call["function"] for call in message.get("tool_calls") or ()}
        if message["role"] == "tool":
            call, result = calls[message["tool_call_id"]], decode_json(message["content"])
            done.append((call["name"], decode_json(call["arguments"]), result))
            text = None if call["name"] == "send_message" and result["status"] == "OK" else text
    return text, done


def _offline_calls(text: str, core: list[str], room: int) -> Iterator[tuple[str, JSON]]:
    """What it keeps of a text and looks up for it, or what the text tells it to call."""
    if order := re.match(_ORDER, text):
        arguments = read_json(order[2])[0]
        yield order[1], arguments if isinstance(arguments, dict) else {}
    statements, questions = _split(text)
    facts = [statement for statement in statements if re.search(_FACT, statement) and statement not in core]
    lines = list[str]()
    for idea, fact in {_own_idea(fact) or fact: fact for fact in facts}.items():
        old = next((line for line in core if _own_idea(line) == idea), None)
        room -= len(fact) + 1
        if room < 0:
            yield "archival_memory_insert", {"content": fact}
        elif old is not None:
            yield "core_memory_replace", {"name": "human", "old_content": old, "new_content": fact}
        else:
            lines.append(fact)
    if lines:
        yield "core_memory_append", {"name": "human", "content": "\n".join(lines)}
    for question in questions:
        query = " ".join([question, *(words for idea, words in _IDEAS.items() if idea in _topic(question))])
        yield "conversation_search", {"query": query}
        yield "archival_memory_search", {"query": query}


def _answer(question: str, quotes: dict[str, str], core: list[str]) -> list[str]:
    """What shares most with a question, its own words among it; else what in core memory may be about it; at most 3."""
    aims = _topic(question)
    own_words = aims - _IDEAS.keys() or aims - {"name"} or aims
    newest = {_own_idea(text) or text: text for text in reversed(quotes)}.values()
    hits = {text: len(aims & _topic(text)) + (_own_idea(text) in aims) for text in newest if own_words & _topic(text)}
    hits = hits or {line: 0 for line in reversed(core) if not (_own_idea(line) or _topic(line) & _IDEAS.keys() - aims)}
    return [quotes[text] for text in reversed(hits) if hits[text] == max(hits.values())][:3]


def _offline_reply(text: str, core: list[str], done: list[tuple[str, JSON, JSON]]) -> str:
    """What it says to the user at the end of its turn, in Spanish where that was spoken, else in English."""
    english, spanish = (len(re.findall(words, text.lower())) for words in (_ENGLISH, _SPANISH))
    say = {name: texts[spanish > english] for name, texts in _SENTENCES.items()}
    parts, hits = list[str](), list[JSON]()
    for name, arguments, result in done:
        fact = arguments.get("content") or arguments.get("new_content")
        if result["status"] != "OK" or re.match(_ORDER, text):
            parts.append(f"{name} {'returned' if result['status'] == 'OK' else 'failed'}: {result['message']}")
        elif fact:
            parts.append(say[name.partition("_")[0]].format(fact.replace("\n", "; ")))
        elif name.endswith("_search"):
            items = read_json(str(result["message"]).partition("): ")[2])[0] or ()
            hits += [item for item in items if isinstance(item, dict) and {"time", "text"} <= item.keys()]
    quotes = {line: say["holds"].format(f'"{line}"') for line in core}  # statements, the newest first, and sentences
    for hit in sorted(hits, key=lambda hit: hit["time"], reverse=True):
        sentence = say.get(hit.get("role", "passage").partition(" ")[0], "")
        for statement in reversed(_split(hit["text"])[0]) if sentence else ():
            quotes[statement] = sentence.format(hit["time"][:10], statement)
    for question in _split(text)[1]:
        unknown = [say["holds"].format("; ".join(core))] if core else []
        unknown.append(say["unknown"].format(quote(question.strip("¿? "))))
        parts += _answer(question, quotes, core) or unknown
    return " ".join(parts) or say["stand-in"]


class OfflineModel:
    """The embedded model: rules, no network, the real agent loop. It says that it is no language model."""

    name, window, learned = OFFLINE, CONTEXT_WINDOWS[OFFLINE], Learned([OFFLINE])

    def head(self, settings: JSON) -> str:
        return encode_json({"model": OFFLINE, "stream": True})

    async def stream(self, body: str) -> AsyncGenerator[JSON, None]:
        request = decode_json(body)
        tools = [tool["function"]["name"] for tool in request.get("tools", ())]
        text, calls = self._respond(request["messages"], tools)
        functions = [{"name": name, "arguments": encode_json(arguments)} for name, arguments in calls]
        message = {"content": text, "tool_calls": [{"function": function} for function in functions]}
        yield {"choices": [{"message": message, "finish_reason": "tool_calls" if calls else "stop"}]}

    def _respond(self, messages: list[JSON], tools: list[str]) -> tuple[str, list[tuple[str, JSON]]]:
        """Its monologue and calls in answer to a request."""
        system = messages[0]["content"]
        if system.startswith(SUMMARY_SYSTEM):
            told = re.findall(r"^(?:user[^\n]*?(?: \([^)\n]*\))?: |- )(.*)", messages[-1]["content"], re.MULTILINE)
            statements = dict.fromkeys(f"- {statement}" for text in told for statement in _split(text)[0])
            return "The user stated:\n" + "\n".join(statements)[-SUMMARY_LIMIT // 2 :], []
        text, done = _offline_turn(messages)
        if text is None:
            return "Nothing waits for an answer.", []
        human = re.search(r'<human characters="(\d+)/(\d+)">\n(.*?)\n?</human>', system, re.DOTALL)
        size, limit, block = human.groups() if human else (0, 0, "")
        core = [line for line in block.split("\n") if line]
        wanted = [] if done else _offline_calls(text, core, int(limit) - int(size))
        again, order = {REQUEST_HEARTBEAT: True}, re.match(_ORDER, text)
        if calls := [(name, given | again) for name, given in wanted if name in tools or order]:
            return "I look into my memory and keep what is new.", calls
        reply = _offline_reply(text, core, done)
        if "send_message" in tools:
            return "I know what to say.", [("send_message", {"message": reply})]
        return reply, []


# ---- the models of a server ------------------------------------------------------------------------------------------


Model = OpenAIModel | OfflineModel


class Models:
    """The models of one server. Raises UsageError where a package is missing, or a default cannot be found out."""

    def __init__(
        self,
        model: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        context_window: int | None = None,
        idle_timeout: float = IDLE_TIMEOUT,
        embedding_model: str | None = None,
        tape: Tape | None = None,
    ) -> None:
        self.tape, self.replays = tape, tape is not None and tape.replays
        self.context_window = context_window  # where an agent's config says nothing; None: as its model's name says
        base_url = base_url or (None if self.replays else os.environ.get("OPENAI_BASE_URL"))
        self.endpoint = Endpoint(base_url, api_key, idle_timeout)
        fallback = DEFAULT_MODEL if self.endpoint.key else OFFLINE
        self.default = model or (self.endpoint.only_model() if base_url else fallback)
        self.offline = self.default == OFFLINE
        if (embedding_model or not self.offline) and not self.replays:
            if not self.endpoint.is_chosen:
                advice = "set OPENAI_API_KEY, or name its server with --base-url; --model offline needs none"
                raise UsageError(f"{quote(embedding_model or self.default)} needs an endpoint: {advice}")
            if importlib.util.find_spec("openai") is None:
                raise UsageError(MISSING_OPENAI)
        self.embedder = Embedder(embedding_model, self.endpoint, tape) if embedding_model else None
        self.recalled: Mapping[str, str] = {}  # settings of the database: what endpoints have taught before
        self._endpoints: dict[tuple[str | None, str | None], Endpoint] = {(None, None): self.endpoint}
        self._models: dict[tuple[Endpoint, str], OpenAIModel] = {}
        self.corrections = collections.defaultdict[str, collections.Counter[str]](collections.Counter)  # by name
        self.ratios: dict[tuple[int, str], float] = {}  # by agent and model, see Agent.ratio
        if tape and not tape.replays:
            address = f"http://{self.endpoint.place}" if self.endpoint.is_chosen else None
            values = (self.default, address, embedding_model, context_window)
            tape.keep(time.time(), server=dict(zip(_SERVER, values, strict=True)))

    @property
    def described(self) -> str:
        """The default model, for the banner."""
        tape = f", {'replayed from' if self.replays else 'recorded on'} {self.tape.path}" if self.tape else ""
        if self.offline:
            text = f"offline, a rule-based stand-in, not a language model{tape}"
            return f"{text}; for a real one set OPENAI_API_KEY, or --base-url and --model"
        vectors = f", embeddings by {self.embedder.name}" if self.embedder else ""
        return f"{self.default} at {self.endpoint.place}{vectors}{tape}"

    def get(self, name: str | None, base_url: str | None = None, api_key: str | None = None) -> tuple[Model, list[str]]:
        """The model of that name (None: the default) and warnings: without an endpoint `offline` stands in."""
        name = name or self.default
        if name == OFFLINE:
            return OfflineModel(), []
        own = Endpoint(base_url or self.endpoint.base_url, api_key, self.endpoint.idle_timeout)
        endpoint = self._endpoints.setdefault((base_url, api_key), own)
        if self.offline and not endpoint.is_chosen:
            text = f"model {quote(name)} is kept, but there is no endpoint: the offline stand-in answers"
            return OfflineModel(), [f"{text}; set OPENAI_API_KEY or --base-url"]
        if self.tape:
            self.tape.secrets |= endpoint.secrets
        return self._models.setdefault((endpoint, name), OpenAIModel(name, endpoint, self.recalled)), []

    async def close(self) -> None:
        for endpoint in self._endpoints.values():
            await endpoint.close()


# ======================================================================================================================
# 7. Tools: what a model may call, memory and its transactions, the memory tools
# ======================================================================================================================


Rule = bool | Callable[[JSON], bool]  # whether a call, by its arguments, waits until somebody allows it
ANYTHING = schema_of(str | float | bool | dict | list[str])  # some endpoints refuse {}


@dataclass(eq=False, repr=False)
class Tool(Function):
    """A function that a model may call."""

    spec: str = ""  # the encoded entry of a request's tools
    timeout: float = TOOL_TIMEOUT  # seconds
    approve: Rule = False


def _reader_of(hint: Any, place: str) -> tuple[JSON, Callable[[Any, JSON], Any]] | None:
    """Schema and reader by pydantic of a hint that schema_of does not know; None for an agent. Raises UsageError."""
    if any(getattr(each, "calls_tools", False) for each in (hint, *typing.get_args(hint))):
        return None
    pydantic = needed("pydantic", f"{place}: {hint} needs pydantic: pip install pydantic")
    try:
        adapter = pydantic.TypeAdapter(hint)
        schema = adapter.json_schema()
        for value in schema.get("enum", [schema["const"]] if "const" in schema else ()):
            adapter.validate_json(encode_json(value))  # those of some enumerations can only be read in Python
    except Exception as error:  # pydantic's, or of the type itself
        raise UsageError(f"{place}: no model can write a {hint}: {str(error).splitlines()[0]}") from error
    schema = _portable(schema, schema.pop("$defs", {}))
    if texts := [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, str)]:
        schema["description"] = texts[-1]

    def read(value: Any, part: JSON) -> Any:
        try:
            return adapter.validate_json(encode_json(value))
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
        for step in problem["loc"]:
            part = part.get("properties", {}).get(step) or part.get("items") or part
        reason = problem.get("ctx", {}).get("error")  # an exception: of the type's author; a text: of pydantic
        said = reason if isinstance(reason, Exception) else f"expected {encode_json(part)}"
        raise ValueError("".join(f"{step}: " for step in problem["loc"]) + str(said))

    return schema, read


def _portable(schema: Any, models: JSON, inside: tuple[str, ...] = ()) -> Any:
    """A schema as any endpoint takes it: without references and titles, nothing empty, with `items` in arrays."""
    if isinstance(schema, list):
        return [_portable(each, models, inside) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if not schema:
        return ANYTHING
    if name := schema.get("$ref", "").rpartition("/")[2]:
        within = {**models[name], **schema, "$ref": ""}
        return ANYTHING if name in inside else _portable(within, models, (*inside, name))
    whole: JSON = {}
    for key, part in schema.items():
        if key == "properties":
            whole[key] = {name: _portable(each, models, inside) for name, each in part.items()}
        elif key not in ("$ref", "title", "discriminator"):
            whole["anyOf" if key == "oneOf" else key] = part if key == "default" else _portable(part, models, inside)
    if whole.get("type") == "array" and not whole.get("items"):
        whole["items"] = {"anyOf": whole.pop("prefixItems")} if "prefixItems" in whole else ANYTHING
    return whole


def make_tool(call: Callable[..., Any], name: str = "", timeout: float = TOOL_TIMEOUT, approve: Rule = False) -> Tool:
    """The Tool of a function, by its signature and docstring. Raises UsageError for one that no model could call."""
    if isinstance(call, type):
        raise UsageError(f"{call.__name__} is a class; register a function, or an object that can be called")
    if not isinstance(timeout, (int, float)) or not timeout > 0:
        raise UsageError(f"timeout: expected seconds, more than 0, but got {quote(timeout)}")
    function = function_of(call, name, other=_reader_of)
    parameters = _portable(function.parameters, {})
    if function.name not in ("send_message", "pause_heartbeats"):
        parameters["properties"][REQUEST_HEARTBEAT] = schema_of(Annotated[bool, "run again right after this call"])
    about = {"name": function.name, "description": function.doc, "parameters": parameters}
    spec = clean_text(encode_json({"type": "function", "function": about}))
    return Tool(**vars(function), spec=spec, timeout=timeout, approve=approve)


def needs_approval(tool: Tool, arguments: JSON) -> bool:
    try:
        return bool(tool.approve(dict(arguments)) if callable(tool.approve) else tool.approve)
    except Exception:  # the rule is its author's code; where it fails nothing runs unasked
        logger.warning("the rule of %s on what has to be allowed failed", tool.name, exc_info=True)
        return True


NOT_KEPT = "they are not kept, ask for less"  # what a result leaves out
_PENDING = (collections.abc.Awaitable, collections.abc.AsyncIterable, concurrent.futures.Future)
# How objects of pydantic, collections, datetime, NumPy, pandas and polars say what they hold.
_EXPORTS = ("model_dump", "_asdict", "isoformat", "tolist", "to_list", "to_dicts", "to_dict")


async def call_tool(tool: Tool, arguments: JSON) -> str:
    """The result of a user's tool as text. Raises ToolError where it fails or takes too long. An async tool ends with a
    cancel; any other goes on in its daemon thread, its result dropped."""
    limit = asyncio.timeout(tool.timeout)
    try:
        async with limit:
            return await _watched(tool.name, _run_tool(tool, arguments))
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ToolError(f"{tool.name} was cancelled by something it called") from None
    except (KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # whatever else a tool raises, the model hears of it and the turn goes on
        if limit.expired():
            raise ToolError(f"{tool.name} took longer than {tool.timeout:g} s and was given up") from None
        logger.warning("tool %s failed", tool.name, exc_info=True)
        reason = type(error).__name__
        with contextlib.suppress(BaseException):  # its __str__ is the tool's code too
            reason = f"{reason}: {error}"
        raise ToolError(reason) from error


async def _run_tool(tool: Tool, arguments: JSON) -> str:
    call = functools.partial(tool.call, **arguments)
    is_async = inspect.iscoroutinefunction(call)  # others may run their code as soon as they are called
    result = call() if is_async else await in_thread(f"memws-tool-{tool.name}", lambda: result_text(call()))
    while not isinstance(result, str):
        if isinstance(result, concurrent.futures.Future):
            result = asyncio.wrap_future(result)
        if isinstance(result, collections.abc.AsyncIterable):
            pieces = []
            async for piece in result:
                pieces.append(piece)
                if len(pieces) > TOOL_RESULT_LIMIT:
                    break
            result = result_text(pieces)
        else:
            result = result_text(await result)
    return result


@types.coroutine
def _watched(name: str, coroutine: Coroutine[Any, Any, str]) -> collections.abc.Generator[Any, None, str]:
    """Run a coroutine; warn where one of its steps keeps everything else on the loop from running."""
    step: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        started = time.monotonic()
        try:
            awaited = step(value)
        except StopIteration as end:
            return str(end.value)
        finally:
            if (seconds := time.monotonic() - started) > TOOL_STEP:
                logger.warning("tool %s blocked the server for %.1f s: let it await, or not be async", name, seconds)
        try:
            value = yield awaited
            step = coroutine.send
        except BaseException as error:  # a cancel too is the tool's to see
            step, value = coroutine.throw, error


def result_text(result: Any) -> Any:
    """A result as text, at most TOOL_RESULT_LIMIT characters: what is none as JSON. What is to be awaited stays so."""
    if isinstance(result, _PENDING):
        return result
    value = "None" if result is None else plain(result, itertools.repeat(True, TOOL_RESULT_LIMIT))
    return excerpt(clean_text(value if isinstance(value, str) else encode_json(value)), TOOL_RESULT_LIMIT, NOT_KEPT)


def plain(value: Any, room: Iterator[bool], inside: tuple[int, ...] = ()) -> Any:
    """`value` as JSON, with `room` for what it holds: records are objects, collections and generators lists."""
    kind = cast(Any, type(value))
    if isinstance(value, enum.Enum):
        return plain(value.value, room, inside)
    if isinstance(value, _PENDING):
        raise ToolError(f"the result holds a {kind.__name__} that was never awaited; await it inside the tool")
    if value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (bytes, bytearray)):
        return value.decode(errors="backslashreplace")
    if id(value) in inside or len(inside) > MAX_DEPTH or not next(room, False):
        return "…"  # it holds itself, or there is no end to it
    below = functools.partial(plain, room=room, inside=(*inside, id(value)))
    if export := next((name for name in _EXPORTS if hasattr(kind, name)), None):
        return below(getattr(value, export)())
    if is_dataclass(kind):
        return {each.name: below(getattr(value, each.name)) for each in fields(kind)}
    if hasattr(kind, "keys"):
        return {result_text(key): below(item) for key, item in dict(value).items()}
    if isinstance(value, Iterable):
        pieces = [below(piece) for _, piece in zip(room, value, strict=False)]
        return pieces if next(room, False) else [*pieces, "… and more"]
    names: Iterable[str] = getattr(value, "__dict__", ()) or getattr(kind, "__slots__", ())
    own = {name: getattr(value, name, None) for name in names if name[0] != "_"}
    return str(value) if callable(value) or not own or kind.__str__ is not object.__str__ else below(own)


# ---- memory and its transactions -------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Memory:
    """An agent's memory as it is on disk; only a transaction changes it."""

    store: Store
    record: AgentRecord
    emit: Callable[..., None] = lambda *events: None  # gets events once they are stored
    hears: Callable[[str], bool] = lambda kind: True  # whether anybody wants a live event of that type
    owner: str | None = None  # the lease under which this server runs the agent, where several share the database
    edited: Callable[[], None] = lambda: None  # called when config or blocks have changed, or messages left the view
    blocks: dict[str, Block] = field(default_factory=dict)
    messages: list[ChatMessage] = field(default_factory=list)  # those in the context window
    last_message: int = 0  # the id of the last chat message
    archival: int = 0  # the number of passages
    tokens: dict[str, int] = field(default_factory=dict)  # of all model calls; the next transaction stores them
    stale: bool = False  # a transaction failed: what is here may differ from what is on disk
    zone: datetime.tzinfo | None = None  # of the times that the model sees, and of its days; None: the machine's
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held until a transaction's events are out, in order

    async def load(self) -> None:
        state = self.record.state
        self.messages, counts = await self.store.read(load_messages, self.record.id, state["cut"])
        self.last_message, self.archival, last_passage = counts
        self.blocks = {block["label"]: Block(**block) for block in self.record.blocks}
        state["last_passage"] = max(last_passage, state["last_passage"])
        state["cut"] = min(state["cut"], self.last_message + 1)  # that of an import may be anything
        self.tokens = {name: state[name] for name in ("input_tokens", "output_tokens")}

    def clock(self, moment: str = "", style: str = "%Y-%m-%d %I:%M:%S %p %Z%z") -> str:
        """A stored time, or now, as a model reads it; by default in the style of MemGPT 0.2.7 (utils.py)."""
        return local_time(moment or now_text(), self.zone, style)

    def pack(self, kind: str, **fields: Any) -> str:
        """An event for the model, as MemGPT 0.2.7 (system.py) packs it: user-role JSON with the time."""
        return encode_json({"type": kind, **fields, "time": self.clock()})


class Transaction:
    """A step, a part of one or an edit: stored, then told at the end of `async with Transaction(memory) as change:`, or
    after an exception not at all. Raises StoreFailed: then the memory is stale, the agent has to be opened anew."""

    def __init__(self, memory: Memory, turn_id: str = "", step: int = 0) -> None:
        self.memory, self.turn_id, self.step = memory, turn_id, step
        self.vectors: Mapping[str, bytes | None] = {}  # of the queries that will be searched for
        # What was told to the user, and the chat message that has it; these outlive apart().
        self.said: list[str] = []
        self.reply: ChatMessage | None = None
        self._open = False

    async def __aenter__(self) -> typing.Self:
        await self.memory.lock.acquire()
        record, self._open = self.memory.record, True
        self.changes, self.blocks = Changes(), dict(self.memory.blocks)
        self.config, self.state = record.config, dict(record.state)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                await self._store()
        except BaseException:  # a cancel too: whether it is on disk is not known
            self.memory.stale = True
            raise
        finally:
            if self._open:
                self._open = False
                self.memory.lock.release()

    @contextlib.asynccontextmanager
    async def apart(self) -> AsyncGenerator[None, None]:
        """Store and tell what there is so far, and begin anew after the block, which is part of no transaction."""
        await self.__aexit__(None)
        try:
            yield
        finally:
            await self.__aenter__()

    async def _store(self) -> None:
        memory, record, changes = self.memory, self.memory.record, self.changes
        blocks = [vars(block) for block in self.blocks.values()]
        columns = {"config": self.config, "state": self.state | memory.tokens, "blocks": blocks}
        changes.columns = {name: value for name, value in columns.items() if value != getattr(record, name)}
        is_edit = changes.columns.keys() & {"config", "blocks"} or self.state["cut"] != record.state["cut"]
        events = await memory.store.write(commit, record.id, changes, memory.owner)
        vars(record).update(changes.columns)
        memory.blocks = self.blocks
        record.last_seq = events[-1].seq if events else record.last_seq
        memory.last_message += len(changes.messages)
        memory.archival += len(changes.documents) - len(changes.removed)
        memory.messages += changes.messages
        if is_edit:
            memory.messages = [message for message in memory.messages if message.id >= self.state["cut"]]
            memory.edited()
        memory.emit(*events)

    # -- what it holds --

    def add_event(self, message_type: str, message: str, **fields: Any) -> None:
        self.changes.events.append(response(message_type, message, self.turn_id, self.step, **fields))

    def add_message(self, role: str, text: str, body: JSON, said: str = "", name: str | None = None) -> None:
        """One more chat message, searchable by what was `said`, and by the name of who said it."""
        number, step = self.memory.last_message + len(self.changes.messages) + 1, self.step or 1
        speaker = f"{role} {name}" if name else role
        message = ChatMessage(number, role, now_text(), text, encode_json(body), self.turn_id, step, 0, said, speaker)
        self.changes.messages.append(message)
        if role == "assistant":
            self.reply = message

    def add_notice(self, kind: str, text: str, **fields: Any) -> None:
        """A chat message by which the model hears of something, packed as a user's message."""
        self.add_message("system", text, {"role": "user", "content": self.memory.pack(kind, **fields)})

    def wake(self, reason: str) -> None:
        """The reason for which the next step starts without the user."""
        self.add_event("heartbeat", reason, reason=reason)
        self.add_notice("heartbeat", reason, reason=reason)

    # -- what memory tools do --

    def block(self, label: str) -> Block:
        """The block. Raises Refused (not_found) naming the labels there are."""
        if label not in self.blocks:
            raise Refused("not_found", f"no core memory block {quote(label)}; blocks: {', '.join(self.blocks)}")
        return self.blocks[label]

    def write(self, label: str, value: str, version: int | None = None, limit: int | None = None) -> None:
        """Give a block another text, with `version` only if that is its, and maybe another limit. Raises Refused."""
        old = self.block(label)
        if version not in (None, old.version):
            text = f"block {label} has version {old.version} by now; read its value, then send that version"
            raise Refused("conflict", text, version=old.version, value=old.value)
        block = replace(old, value=value, limit=limit or old.limit, version=old.version + (value != old.value))
        self.put_blocks({**self.blocks, label: block})
        if block.limit != old.limit and value == old.value:
            self.add_event("agent_change", f"block {label} has another limit", change="updated")

    def put_blocks(self, blocks: dict[str, Block]) -> None:
        """Take other blocks, and tell of texts that come, change or go."""
        for label in {**self.blocks, **blocks}:
            before, after = (each[label].value if label in each else None for each in (self.blocks, blocks))
            if (before or "") != (after or ""):
                self._add_change("core", label, before, after, label=label)
        self.blocks = blocks

    def insert(self, text: str) -> int:
        """Keep a passage; its id. Raises Refused (bad_field, text_too_long)."""
        if not text.strip():
            raise InvalidRequest("bad_field", "text: expected something to keep, but the content is empty")
        if len(text) > MAX_TEXT:
            raise Refused("text_too_long", f"a passage has at most {MAX_TEXT:,} characters, but got {len(text):,}")
        self.state["last_passage"] += 1
        number: int = self.state["last_passage"]
        self.changes.documents.append(Document(number, "archival", "", now_text(), text))
        self._add_change("archival", f"passage {number}", None, text, id=number)
        return number

    async def remove(self, passage_id: int) -> None:
        """Take a passage out; the event keeps its text. Raises Refused (not_found)."""
        passage = await self.memory.store.read(find_passage, self.memory.record.id, passage_id)
        if passage is None:
            raise Refused("not_found", f"no passage {passage_id}; search_memory lists passages with their ids")
        self.changes.removed.append(passage.id)
        self._add_change("archival", f"passage {passage.id}", passage.text, None, id=passage.id, since=passage.time)

    def say(self, message: str, *, partial: bool = False) -> None:
        """Tell the user something: what was really told is what search finds of a reply."""
        self.said.append(message)
        self.add_event("assistant_message", message, **({"partial": True} if partial else {}))
        if self.reply:
            self.reply.said = "\n".join(self.said)
            self.changes.resaid = [self.reply] if self.reply.id <= self.memory.last_message else []

    def _add_change(self, what: str, name: str, before: str | None, after: str | None, **fields: Any) -> None:
        """Tell of an edit, line by line, as a unified diff without its headers."""
        import difflib

        lines = difflib.unified_diff((before or "").splitlines(), (after or "").splitlines(), lineterm="", n=0)
        diff = "\n".join(line for line in [*lines][2:] if not line.startswith("@@"))
        fields |= {"before": before, "after": after, "diff": diff, "by": "agent" if self.turn_id else "client"}
        self.add_event("memory_change", f"{what} memory: {name} changed", what=what, **fields)

    async def search(self, store: str, query: str, page: int, since: str = "", until: str = "~") -> str:
        """A page of results as a model reads them; the newest first where nothing is searched for."""
        memory, page = self.memory, min(max(0, page), 1_000_000)
        own = (message.id for message in memory.messages if message.turn_id == self.turn_id)  # they are in view already
        span = (since, until, SEARCH_PAGE, page * SEARCH_PAGE, next(own, 2**53) - 1)
        wanted = Query(query, (store,), *span, self.vectors.get(query), memory.zone)
        documents, total = await memory.store.read(search, memory.record.id, wanted)
        if not documents:
            return f"No results found in {store} memory" + (f" for {quote(query)}." if query else ".")
        items = []
        for item in documents:
            role = {"role": item.role} if item.role else {}
            text = excerpt(item.text, SEARCH_TEXT_LIMIT)
            items.append({"time": memory.clock(item.time, MINUTES), **role, "text": text})
        pages = (total - 1) // SEARCH_PAGE
        return f"Showing {len(items)} of {total} results (page {page} of {pages}): {encode_json(items)}"


def machine_timezone() -> str | None:
    """The IANA name of the machine's timezone; None where none is known, as on Windows: there its clock decides."""
    name = os.environ.get("TZ", os.path.realpath("/etc/localtime")).removeprefix(":").rpartition("zoneinfo/")[2]
    return name if pathlib.Path(f"/usr/share/zoneinfo/{name}").is_file() else None


def find_zone(name: str | None) -> datetime.tzinfo | None:
    """The timezone of an IANA name; None: the machine's, by its own clock. Raises Refused (bad_config)."""
    if name in (None, machine_timezone()):
        return None
    try:
        import zoneinfo  # 3 ms, which a server in its own timezone does without

        return zoneinfo.ZoneInfo(str(name))
    except (LookupError, ValueError, OSError):
        text = f"timezone: expected an IANA name like Europe/Berlin, but got {quote(name)}; or pip install tzdata"
        raise Refused("bad_config", text) from None


def moment_of(text: str, zone: datetime.tzinfo | None, is_end: bool = False) -> str:
    """The UTC time at which a day or time begins, or has ended; of an empty text all time. Raises InvalidRequest."""
    if not text.strip():
        return "~" if is_end else ""
    try:
        when = datetime.datetime.fromisoformat(text.strip().replace("/", "-"))
        if is_end:
            when += datetime.timedelta(days=1) if len(text.strip()) <= 10 else datetime.timedelta(milliseconds=1)
        if when.tzinfo is None:
            when = when.replace(tzinfo=zone if 1970 < when.year < 9999 else datetime.UTC)  # no clock goes farther
        seconds = datetime.timedelta(seconds=when.timestamp())  # by the clock, also of a day without midnight
        return utc_text(datetime.datetime.fromtimestamp(0, datetime.UTC) + seconds)
    except (ValueError, OverflowError):
        raise InvalidRequest("bad_field", f"from, to: expected a day like 2026-01-31, but got {quote(text)}") from None


_ALIKE = str.maketrans("‘’‚‛“”„‟‐‑‒–—−", "''''\"\"\"\"------")
_SIGN = " *\n| +|[^\u00ad\u200b-\u200f\u2060\ufe0e\ufe0f\ufeff]"  # no soft hyphens, joiners and the like
_LETTER = f"[^\\W{_PAIRED}{_TRIPLED}]"  # in scripts without spaces no word goes on
_IN_WORD = f"(?<={_LETTER}){_LETTER}|(?<=\\d)[.,]\\d|(?<=\\d[.,])\\d"


def _signs(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` as people see it, whatever its spaces, line ends, quotes and dashes are; where each sign of it stands."""
    signs = list(re.finditer(_SIGN, re.sub(r"[^\S\n]", " ", text.translate(_ALIKE))))
    return "".join(sign[0][-1] for sign in signs), [sign.span() for sign in signs]


def edit_text(text: str, old: str, new: str) -> str:
    """`text` with `new` where `old` stands, as people see both. Raises ToolError where that is nowhere, more than once,
    or in the middle of a word or number."""
    if old != old.strip("\n"):
        old, new = old.strip("\n"), new.strip("\n")
    text = unicodedata.normalize("NFC", text)
    (signs, places), (old, _) = _signs(text), _signs(unicodedata.normalize("NFC", old))
    old = old if old in signs and old.strip() else old.strip()
    if not old or old not in signs:
        import difflib

        line = next((line for line in old.split("\n") if line not in signs), "")[:300]
        near = difflib.get_close_matches(line, [each[:300] for each in text.split("\n")], 1, 0.0)
        hint = f"; the nearest line is: {near[0]}" if old and text else ", from what the block holds"
        raise ToolError(f"old_content is not in the block; copy it to the letter{hint}")
    if (count := signs.count(old)) > 1:
        raise ToolError(f"old_content stands in the block {count} times; give more of the line, or the lines beside it")
    first = signs.index(old)
    last = first + len(old) - 1
    letters = "".join("a" if unicodedata.category(sign)[0] == "M" else sign for sign in signs)  # a vowel sign is one
    if any(re.compile(_IN_WORD).match(letters, place) for place in (first, last + 1)):
        raise ToolError("old_content is only part of a word or number in the block; give more of the line")
    head, tail = text[: places[first][0]], text[places[last][1] :]
    if not (head.rpartition("\n")[2] + new + tail.partition("\n")[0]).strip():
        head, new, tail = head.rpartition("\n")[0], "", "\n" + tail.partition("\n")[2]  # no blank line is left
    return (head + new + tail).strip("\n")


# ---- the memory tools (names and parameters are MemGPT 0.2.7's, functions/function_sets) -----------------------------

_Name = Annotated[str, "the block's label, like persona or human"]
_Old = Annotated[str, "what stands there, to the letter and only once"]
_New = Annotated[str, "empty to delete"]
_Day = Annotated[str, "YYYY-MM-DD, inclusive"]


class MemoryTools(Transaction):
    """A transaction of a turn with what a model may call in it: the docstrings are what the model reads."""

    async def send_message(self, message: str) -> None:
        """Say something to the user. This is the only way to reach them."""
        self.say(message)

    async def core_memory_append(self, name: _Name, content: str) -> None:
        """Add a line to a block of core memory."""
        before = self.block(name).value
        self.write(name, f"{before}\n{content}" if before else content)

    async def core_memory_replace(self, name: _Name, old_content: _Old, new_content: _New) -> None:
        """Replace text in a block of core memory."""
        self.write(name, edit_text(self.block(name).value, old_content, new_content))

    async def conversation_search(self, query: str, page: int = 0) -> str:
        """Search all that the user and you have said, by words."""
        return await self.search("recall", query, page)

    async def conversation_search_date(self, start_date: _Day, end_date: _Day, page: int = 0) -> str:
        """List what the user and you said between two days, the newest first."""
        zone = self.memory.zone
        start, end = moment_of(start_date, zone), moment_of(end_date, zone, is_end=True)
        return await self.search("recall", "", page, start, end)

    async def archival_memory_insert(self, content: str) -> None:
        """Keep a passage in archival memory, worded so that a search will find it."""
        self.insert(content)

    async def archival_memory_search(self, query: str, page: int = 0) -> str:
        """Search archival memory by words."""
        return await self.search("archival", query, page)

    async def pause_heartbeats(self, minutes: Annotated[int, "at most 360"]) -> str:
        """Ignore timed heartbeats for some minutes."""
        minutes = max(0, min(minutes, 360))  # MemGPT 0.2.7, constants.py: MAX_PAUSE_HEARTBEATS
        self.state["paused_until"] = time.time() + 60 * minutes
        return f"Pausing timed heartbeats for {minutes} min"


_METHODS = {tool: method for tool, method in vars(MemoryTools).items() if inspect.iscoroutinefunction(method)}
MEMORY_TOOLS = {tool: make_tool(functools.partial(method, None)) for tool, method in _METHODS.items()}


# ======================================================================================================================
# 8. Agent: a turn is a loop of steps
# ======================================================================================================================

# ---- configuration ---------------------------------------------------------------------------------------------------

BlockItems = Annotated[list[JSON], 1, MAX_BLOCKS] | None


def by_label(blocks: BlockItems = None) -> dict[str, JSON]:
    """Blocks as somebody sent them, by label; null says nothing. Raises Refused (bad_config) where one comes twice."""
    said = [{key: value for key, value in item.items() if value is not None} for item in blocks or ()]
    items = {str(item.get("label")): item for item in said}
    if len(items) < len(blocks or ()):
        raise Refused("bad_config", "blocks: a label comes twice; name each block once")
    return items


def core_memory(persona: str = "sam_pov", human: str = "basic", blocks: BlockItems = None) -> list[Block]:
    """A new agent's core memory: persona and human (texts, or bundled names) and further blocks. Raises Refused."""
    texts, items = {"persona": PERSONAS.get(persona, persona), "human": HUMANS.get(human, human)}, by_label(blocks)
    own = {label: {"label": label, "value": text, **items.pop(label, {})} for label, text in texts.items()}
    return list(reshape({}, own | items).values())


def reshape(blocks: dict[str, Block], items: dict[str, JSON]) -> dict[str, Block]:
    """Core memory with blocks added, with other limits, and without those to delete. Raises Refused."""
    made = dict(blocks)
    for label, item in items.items():
        old, delete = made.get(label), item.pop("delete", False)
        previous = vars(old) if old else {"version": 1}
        if delete is True and old:
            del made[label]
        elif delete or (old and item.get("value") not in (None, old.value)):
            text = "set_block changes a value, {label, delete: true} takes a block away that is there"
            raise Refused("bad_config", f"blocks: {text}; got {quote(item)}")
        else:
            made[label] = apply(Block, {**previous, **item, "version": previous["version"]}, "blocks")
    return made


def read_config(values: JSON, tools: Mapping[str, Tool], base: JSON | None = None) -> tuple[JSON, list[str]]:
    """A config to be stored, and warnings of what is ignored. `base`: what is stored by now; None for a new agent.
    Raises Refused (bad_config)."""
    known = [*_function_of(Config).parameters["properties"]]
    known += ["name", *_function_of(core_memory).parameters["properties"]] if base is None else ["blocks"]
    others = [key for key in values if key not in known][:20]
    warnings = [f"{quote(key)} is ignored; known: {', '.join(known)}" for key in others]
    stored = base or {}
    if isinstance(values.get("settings"), dict):
        values = values | {"settings": {**stored.get("settings", {}), **values["settings"]}}
    config = vars(apply(Config, {**stored, **values}))
    find_zone(values.get("timezone"))
    if unknown := set(values.get("tools") or ()) - tools.keys():
        raise Refused("bad_config", f"unknown tool {quote(min(unknown))}; known: {', '.join(sorted(tools))}")
    if config["tools"] and not MEMORY_TOOLS.keys() & set(config["tools"]):
        config["tools"][:0] = MEMORY_TOOLS  # whoever names only tools of their own means to add them
    return config, warnings


def check_window(config: JSON, default: int, tools: Mapping[str, Tool], blocks: Collection[Block]) -> None:
    """Raises Refused where there is too much of blocks, or no room for prompt, full blocks and a reply."""
    if len(blocks) > MAX_BLOCKS + 2 or sum(block.limit for block in blocks) > MAX_BLOCKS_TOTAL:
        text = f"expected at most {MAX_BLOCKS + 2}, with limits of {MAX_BLOCKS_TOTAL:,} characters together"
        raise Refused("bad_config", f"blocks: {text}")
    window = config["context_window"] or default
    specs = ",".join(tools[name].spec for name in config["tools"] or MEMORY_TOOLS if name in tools)
    tokens = estimate_tokens(config["system"] or SYSTEM_PROMPT) + estimate_tokens(specs) + MIN_REPLY_TOKENS
    tokens += sum(block.limit // 4 + 16 for block in blocks)
    if tokens > window:
        text = f"prompt, full blocks and {MIN_REPLY_TOKENS} tokens for a conversation need {tokens:,}"
        raise Refused("bad_config", f"context_window: {window:,} tokens are too few: {text}")


# ---- a turn ----------------------------------------------------------------------------------------------------------

_NO_USAGE = {"input_tokens": 0, "output_tokens": 0, "model_calls": 0, "estimated": False}


class Stopped(Exception):
    """A turn was asked to stop; its text is the turn's stop reason."""


@dataclass(eq=False, repr=False)
class Turn:
    """One turn while it waits and runs: what it may still do, and what it has done."""

    turn_id: str
    message: str | None  # the user's; None: a heartbeat turn, for this reason
    reason: str = HEARTBEAT_WAKE
    speaker: str | None = None  # who says the message, where several people share the agent
    verify: bool = False  # whether the first reply has to go through send_message
    step: int = 0  # counts from 1, once the start is stored
    unanswered: list[Turn] = field(default_factory=list)  # whose messages have got no reply yet
    over: bool = False
    stop_reason: str | None = None  # why it was asked to stop
    error: ModelError | None = None  # what it ends with, once half a reply has been taken
    failed_calls: int = 0  # model calls that failed
    failures: list[str] = field(default_factory=list)  # what the tool calls said that failed in a row
    compactions: int = 0  # within the step: each keeps half as much as the one before
    calls: collections.Counter[str] = field(default_factory=collections.Counter)  # in how many steps each call came
    usage: JSON = field(default_factory=_NO_USAGE.copy)
    request: RequestRecord | None = None  # the step's last model call and what came of it, until they are stored
    reply: Reply = field(default_factory=Reply)
    sender: object = None  # whose queue it counts against
    when_busy: str = "queue"  # what to do where another one runs
    steered: list[Turn] = field(default_factory=list)  # messages that enter this turn before its next step
    done: asyncio.Future[None] = field(default_factory=asyncio.Future)  # ends with it, or with why it will not be
    _task: asyncio.Task[Any] | None = None

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
            raise Stopped(self.stop_reason)
        self._task = task = asyncio.current_task()
        try:
            yield
        except asyncio.CancelledError:
            if self.stop_reason is None or task is None:
                raise
            task.uncancel()
            raise Stopped(self.stop_reason) from None
        finally:
            self._task = None


@dataclass(eq=False, repr=False)
class Agent:
    """A named, persistent memory and a model that take turns (MemGPT: Packer et al. 2023, arXiv 2310.08560), one at a
    time; edits from outside may come between. It knows a store and a model, never a socket: what happens is stored,
    then given to `emit`."""

    memory: Memory
    _models: Models
    _all_tools: Mapping[str, Tool]  # that are registered
    _max_steps: int = MAX_STEPS  # where the config has none
    _api_key: str | None = None
    _timezone: str | None = None  # where the config has none
    repairs: list[str] = field(default_factory=list)  # what the opening had to mend
    # Calls that wait until somebody allows them, by id: about them; their tool; arguments to take instead, a note.
    approvals: dict[str, tuple[JSON, Tool, asyncio.Future[tuple[JSON, str] | None]]] = field(default_factory=dict)
    before: AgentRecord | None = None  # what there was before the turn that runs
    _cut_prompts: int = 0  # model calls in a row whose endpoint counted far fewer tokens than were sent
    calls_tools = True  # a tool's parameter of this type is filled in

    def __post_init__(self) -> None:
        self.record, self.memory.edited = self.memory.record, self.configure

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def blocks(self) -> dict[str, Block]:
        """Core memory by label: a copy, so that a tool may read it from its thread."""
        return dict(self.memory.blocks)

    @property
    def ratio(self) -> float:
        """The endpoint's count of tokens over our estimate, within 0.5 to 2: agents and languages differ in it."""
        return self._models.ratios.get((self.record.id, self.model.name), 1.0)

    # -- opening, configuring --

    async def open(self) -> typing.Self:
        """Load the agent and repair what a crash left; itself. Raises StoreFailed."""
        try:
            self.record.check()
            await self.memory.load()
            self.configure()
            if told := self.model.learned.window:
                self.warnings.append(f"the endpoint's window is {told:,} tokens, it said; update_agent tries another")
            await self._repair()
        except (TypeError, ValueError, LookupError, AttributeError, Refused) as error:
            text = f"agent {self.name!r} is damaged ({error}); memws.py check says more, a backup brings it back"
            raise StoreFailed(text) from error
        return self

    async def _repair(self) -> None:
        """Close what a crash left open: calls get a result, the turn its end. Nothing that was said is dropped."""
        memory, turn_id = self.memory, self.record.state["turn"]
        faults, open_calls = history_faults(memory.messages)
        if not (faults or open_calls or turn_id):
            return
        turn = Turn(turn_id or "", None, step=memory.messages[-1].step if memory.messages else 0)
        async with self._change(turn) as change:
            if faults:
                text = "chat messages that are damaged or lack a tool's result left the context window"
                self.repairs.append(text)
                change.state["cut"] = memory.messages[faults[-1][0] - 1].id + 1
                change.add_event("correction", text, what="history")
            for call_id, name in open_calls.items():
                self.repairs.append(f"the call of {name} was interrupted and got a result")
                self._add_result(change, ToolCall(call_id, name), ToolError(INTERRUPTED))
            if turn_id:
                self.repairs.append(f"turn {turn_id} was interrupted and got its end")
                turn.usage["estimated"] = True
                self._end(change, turn, "interrupted")

    def configure(self) -> None:
        """Choose model and tools, build the system message: until the next call the prompt only grows at its end."""
        memory, config, summary = self.memory, self.record.config, self.record.state["summary"]
        self.model, self.warnings = self._models.get(config["model"], self.record.base_url, self._api_key)
        self._counts = self._models.corrections[self.model.name]
        try:
            memory.zone = find_zone(config["timezone"] or self._timezone)
        except Refused as error:  # the agent comes from a machine that knows more of them
            memory.zone = find_zone(self._timezone)
            self.warnings.append(f"{error}; the server's timezone is used")
        self.max_steps: int = config["max_steps"] or self._max_steps
        if missing := [name for name in config["tools"] or () if name not in self._all_tools]:
            self.warnings.append(f"tools that are not registered now are left out: {', '.join(missing)}")
        parts = [f"\n\nRecall memory: {memory.last_message} messages. Archival memory: {memory.archival} passages."]
        for block in memory.blocks.values():
            text = f"{block.value}\n" if block.value else ""
            parts.append(f'<{block.label} characters="{len(block.value)}/{block.limit}">\n{text}</{block.label}>')
        prompt, core = (config["system"] or SYSTEM_PROMPT).rstrip(), "\n".join(parts)
        summary = encode_json({"role": "user", "content": summary}) if summary else ""
        self._sections = {"system": prompt, "tools": "", "core_memory": core, "summary": summary}  # of a request
        self._take_tools()
        self._system_body = encode_json({"role": "system", "content": prompt + core})

    async def store_learned(self) -> None:
        learned = self.model.learned
        await self.memory.store.write(write_setting, f"learned {learned.shape[0]}", encode_json(vars(learned)))

    @property
    def window(self) -> int:
        """The context window in tokens; less where the endpoint has said so, if the prompt leaves room in that."""
        window: int = self.record.config["context_window"] or self._models.context_window or self.model.window
        told = self.model.learned.window
        fits = 0 < told < window and told >= sum(self._sizes([]).values()) + 2 * MIN_REPLY_TOKENS
        return told if fits else window

    def _take_tools(self) -> None:
        """Offer what is registered by now; the system message stays as it is."""
        names = self.record.config["tools"] or MEMORY_TOOLS
        self.tools = {name: self._all_tools[name] for name in names if name in self._all_tools}
        specs = ",".join(tool.spec for tool in self.tools.values())
        self._sections["tools"] = f"[{specs}]" if specs else ""

    def check_room(self, change: Transaction) -> None:
        """Raises Refused where the context window is too small for what a transaction makes of the agent."""
        model, _ = self._models.get(change.config["model"], self.record.base_url, self._api_key)
        window = self._models.context_window or model.window
        check_window(change.config, window, self._all_tools, change.blocks.values())

    def settings(self) -> JSON:
        """The config with what the defaults make of it."""
        effective = {"context_window": self.window, "max_steps": self.max_steps, "tools": list(self.tools)}
        effective["timezone"] = self.record.config["timezone"] or self._timezone
        return {**self.record.config, "model": self.record.config["model"] or self.model.name, **effective}

    # -- a turn --

    async def turn(self, turn: Turn) -> None:
        """Run a turn to its end: its start, its steps, exactly one terminal event. Raises MemwsError where its start
        (then nothing has happened) or its end could not be stored."""
        if self.record.state["turn"]:  # as where a tool calls this
            raise Refused("busy", f"agent {self.name!r} is in a turn; wait for its end")
        self._take_tools()
        try:
            async with Transaction(self.memory, turn.turn_id, 1) as change:  # the start is the message's receipt
                self.before = replace(self.record)
                change.changes.events.append({"type": "agent_response_start", "turn_id": turn.turn_id})
                change.state["turn"] = turn.turn_id
                if turn.message is not None:
                    self._add_user_message(change, turn, turn.message)
                    turn.unanswered = [turn]
                else:
                    change.wake(turn.reason)
            while not turn.over:
                try:
                    await self._step(turn)
                except (Stopped, MemwsError) as reason:
                    await self._break_off(turn, reason)
                except Exception:  # a fault of ours ends this turn, never the server or another agent's turn
                    logger.exception("agent %s: turn %s failed", self.name, turn.turn_id)
                    self.memory.stale = True
                    await self._break_off(turn, MemwsError("internal error; the server's log has it"))
        finally:
            self.memory.stale |= not turn.over  # its end was not stored, or a tool cancelled its own task
            turn.over, self.before = True, None

    def _add_user_message(self, change: Transaction, turn: Turn, message: str, **fields: Any) -> None:
        last, now = change.state["last_user"], now_text()
        speaker = {"from": turn.speaker} if turn.speaker else {}
        content = self.memory.pack("user_message", **speaker, message=self._fitting(message))
        if last is None or seconds_between(last, now) > LOGIN_SILENCE:
            login = self.memory.clock(last) if last else "Never (first login)"
            content = f"{self.memory.pack('login', last_login=login)}\n{content}"
        change.state["last_user"] = now
        change.add_message("user", message, {"role": "user", "content": content}, message, turn.speaker)
        change.add_event("user_message", message, **speaker, **fields)

    async def _step(self, turn: Turn) -> None:
        """One model call and the tool calls it asks for. Memory tools run inside the step's transaction, a user's tool
        between two: the first holds the step up to its call, the next begins with its result."""
        turn.step, turn.reply, turn.request, turn.compactions = turn.step + 1, Reply(), None, 0
        if turn.steered:
            async with self._change(turn) as change:
                heard = list(turn.steered)  # what was said meanwhile, and not taken back while this waited
                for item in heard:
                    self._add_user_message(change, item, item.message or "", steered=item.turn_id)
            turn.unanswered += heard
            for item in heard:
                if item in turn.steered:  # else it was refused, as where the agent is being deleted
                    turn.steered.remove(item)
                    item.done.set_result(None)
        if self.used() + MIN_REPLY_TOKENS > self.window:
            await self.compact(turn)
        await self._ask(turn)
        calls = [call.arguments for call in turn.reply.calls if call.name in MEMORY_TOOLS]
        queries = [str(arguments["query"]) for arguments in calls if "query" in arguments]
        with turn.interruptible():  # before the transaction: no network call happens inside of one
            vectors = {query: await self.query_vector(query) for query in queries}
        async with self._change(turn) as change:
            change.vectors = vectors
            succeeded = await self._take_reply(change, turn)
            turn.unanswered = [] if change.said else turn.unanswered
            self._finish(change, turn, succeeded)

    def _change(self, turn: Turn) -> Transaction:
        return MemoryTools(self.memory, turn.turn_id, turn.step)

    # -- asking the model --

    async def _ask(self, turn: Turn) -> None:
        """Call the model until its reply can be used, or half of one has to do. Raises ModelError, Stopped."""
        extra, failures, waited = "", 0, 0.0
        while True:
            messages, head = self.memory.messages, self.model.head(self.record.config["settings"])
            texts = head, self._system_body, self._sections["summary"], self._sections["tools"], extra
            request = RequestRecord(turn.turn_id, turn.step, *texts, messages[0].id, messages[-1].id)
            request.shape, turn.request, turn.reply = self.model.learned.shape, request, Reply()
            try:
                await self._call_model(turn, request, turn.reply, messages)
                return self._read(turn, has_to_send=turn.verify and not extra)
            except ModelError as error:
                attempt, of, pause = 1, 1, 0.0
                turn.failed_calls += 2 if error.code == "context_overflow" else 1  # with that of the summary
                if error.loading and waited < LOADING_PATIENCE:
                    turn.failed_calls -= 1  # it counts as no call
                    waited += error.retry_after or 0.0
                    attempt, of = round(waited), round(LOADING_PATIENCE)
                elif turn.failed_calls >= MAX_FAILED_CALLS:
                    return self._take_half(turn, error)
                elif error.code == "context_overflow":
                    await self.compact(turn, f"{error}; ")
                    continue
                elif error.code == "bad_output" and not extra:
                    self._counts["bad_output"] += 1
                    alert = self.memory.pack("system_alert", message=CORRECTIVE.format(problem=error))
                    extra = encode_json({"role": "user", "content": alert})
                elif error.retry and not error.learned and failures < TRANSPORT_RETRIES:
                    failures += 1
                    attempt, of, pause = failures, TRANSPORT_RETRIES, RETRY_PAUSE * 2 ** (failures - 1)
                elif not error.learned:
                    return self._take_half(turn, error)
                pause = pause if error.retry_after is None else error.retry_after
                about = {"attempt": attempt, "of": of, "delay_ms": round(pause * 1000), "code": error.code}
                self.emit_live(turn, "retry", f"{error}; trying again", **about)
                with turn.interruptible():
                    await asyncio.sleep(0 if self._models.replays else pause)

    def _take_half(self, turn: Turn, error: ModelError) -> None:
        """Take what there is of a reply that came no further. Raises the error where that tells a user nothing."""
        reply = turn.reply
        reply.finish = reply.finish or "aborted"
        reply.final = True
        with contextlib.suppress(ModelError):
            self._read(turn)
            if turn.unanswered and reply.fault != "cut" and (reply.partial or not reply.calls):
                turn.error = error if reply.fault == "broken" else None
                return
        raise error

    def _read(self, turn: Turn, *, has_to_send: bool = False) -> None:
        """Read the reply. Raises ModelError for one that says nothing, or only half of it, to a user who waits."""
        reply = turn.reply
        read_reply(reply, self.tools, self.tools.keys() - MEMORY_TOOLS)
        if reply.partial or not turn.unanswered:
            return
        if not (reply.calls or reply.text) and (reply.fault == "length" or (reply.reasoning and not reply.fault)):
            text = "the model only thought and said nothing; raise max_tokens or lower reasoning_effort"
            raise ModelError("bad_output", text)
        if not reply.calls and (not reply.text or (reply.fault and not reply.final)):
            raise reply.problem("the model's answer is empty")
        if has_to_send and not any(call.name == "send_message" for call in reply.calls):
            raise ModelError("bad_output", "the first reply has to go through send_message")

    def emit_live(self, turn: Turn, kind: str, text: str, **fields: Any) -> None:
        """Tell something that is not stored, at once."""
        event = response(kind, text, turn.turn_id, turn.step, **fields)
        self.memory.emit(StoredEvent(0, kind, turn.turn_id, encode_json(event | {"time": now_text()})))

    async def _call_model(self, turn: Turn, request: RequestRecord, reply: Reply, messages: list[ChatMessage]) -> None:
        """One model call; the text of the turn's reply is told while it arrives. Raises ModelError, Stopped."""
        bodies = [message.body for message in messages]
        request.sent = body = request.body(bodies)
        learned, loads = self.model.learned, False
        loop, timer = asyncio.get_running_loop(), None
        with turn.interruptible():
            self._counts["calls"] += 1
            started, tape, stream = time.monotonic(), self._models.tape, self.model.stream(body)
            if tape:
                head = encode_json({"model": self.model.name, **self.record.config["settings"]})
                parts = [head, request.system, request.summary, *bodies, request.extra, request.tools]
                stream = tape.stream(self.model, body, parts, self.name)
            try:
                async with contextlib.aclosing(stream) as chunks:
                    async for chunk in chunks:
                        reply.feed(chunk)
                        if request.first_token_ms is None:
                            request.first_token_ms = round((time.monotonic() - started) * 1000)
                        if timer is None or timer.when() <= loop.time():
                            timer = loop.call_later(DELTA_INTERVAL, self._emit_deltas, turn)
                        if reply.final:
                            break
            except ModelError as error:
                loads = error.loading
                if self.model.learned != learned:  # by what was learned here, or in another agent's turn
                    error.learned = True
                    await self.store_learned()
                raise
            finally:
                if timer is not None:
                    timer.cancel()
                self._emit_deltas(turn)
                request.total_ms = round((time.monotonic() - started) * 1000)
                if not loads:
                    self._count(turn, request, reply, estimate_tokens(body))

    def _emit_deltas(self, turn: Turn) -> None:
        for of, text in turn.reply.news() if self.memory.hears("delta") else ():
            self.emit_live(turn, "delta", text, of=of)

    def _count(self, turn: Turn, request: RequestRecord, reply: Reply, estimated: int) -> None:
        """Keep what came of a call and what it used, and calibrate the estimate by what the endpoint counted."""
        calls = [{"id": call.id, "name": call.name, "arguments": call.text} for call in reply.calls]
        request.response = {"reasoning": reply.reasoning, "content": reply.text, "tool_calls": calls}
        request.response["finish_reason"] = reply.finish
        usage = reply.usage
        if usage is None:
            output = estimate_tokens(reply.monologue) + sum(estimate_tokens(call.text) for call in reply.calls)
            usage = {"input_tokens": round(estimated * self.ratio), "output_tokens": output}
        elif usage["input_tokens"] and request.step:  # no summary, which has to save tokens
            counted = usage["input_tokens"] / estimated
            self._cut_prompts = self._cut_prompts + 1 if counted < 0.5 and estimated > 1000 else 0
            pulled = self.ratio + 0.3 * (min(2.0, max(0.5, counted)) - self.ratio)
            self._models.ratios[self.record.id, self.model.name] = pulled
        request.usage = {**usage, "estimated": reply.usage is None}
        turn.usage["model_calls"] += 1
        for totals in (turn.usage, self.memory.tokens):
            totals["input_tokens"] += usage["input_tokens"]
            totals["output_tokens"] += usage["output_tokens"]
        turn.usage["estimated"] |= reply.usage is None

    # -- doing what it says --

    async def query_vector(self, query: str) -> bytes | None:
        """The vector of a query without names; None without an embedding model, or where it does not answer in time."""
        embedder = self._models.embedder
        if embedder is None or embedder.catch_up is None:
            return None
        human = self.memory.blocks.get("human", Block("human"))
        names = re.findall(r"(?i)\bname\s*(?:is\s|:)\s*([^\W\d_][\w'\u2019-]*)", human.value)
        text = unnamed(clean_text(query[:EMBEDDING_TEXT]), [self.name, *names])
        if self._models.tape:  # what is found must not depend on how far the background is
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(embedder.catch_up(), EMBEDDING_PATIENCE)
        return await embedder.vector(text) if text.strip() else None

    async def _take_reply(self, change: Transaction, turn: Turn) -> bool:
        """Tell and keep what the model replied, and make its calls; whether all succeeded. Text alone is for the user
        who waits; what send_message said before it was cut is kept as a call whose result says so."""
        reply, words = turn.reply, ""
        calls, monologue = reply.calls.copy(), reply.monologue
        if reply.partial:
            calls.append(ToolCall(secrets.token_hex(5)[:9], "send_message", arguments={"message": reply.partial}))
        elif reply.text and turn.unanswered and not (calls or turn.stop_reason):
            words, monologue = reply.text, reply.reasoning
            reply.corrections.append(("plain_text", "plain text was taken as the reply"))
        self._counts.update(list(dict(reply.corrections)))
        for what, text in dict.fromkeys(reply.corrections):
            change.add_event("correction", text, what=what)
        if monologue:
            change.add_event("internal_monologue", monologue)
        if calls or reply.text:
            change.add_message("assistant", monologue, self._body_of(reply, calls))
        if words:
            change.say(words, partial=bool(reply.fault))
        results = [await self._call_tool(change, turn, call) for call in reply.calls]
        if reply.partial:
            reason = turn.stop_reason or dict(reply.corrections)[reply.fault]
            change.say(reply.partial, partial=True)
            self._add_result(change, calls[-1], ToolError(f"{reason}: the user has seen only this much"))
        return all(results)

    def _body_of(self, reply: Reply, calls: list[ToolCall]) -> JSON:
        """The assistant's chat message, with what its maker needs back."""
        maker, *rules = self.model.learned.shape
        own = {name: value for name, value in clean_value(reply.own).items() if f"without {name}" not in rules}
        body: JSON = {"role": "assistant", "content": reply.text or None, **own}
        for call in calls:
            function = {"name": call.name, "arguments": encode_json(call.arguments)}
            whole = {"id": call.id, "type": "function", "function": function, **clean_value(call.own)}
            body.setdefault("tool_calls", []).append(whole)
        return {"by": maker, **body} if own or any(call.own for call in calls) else body

    async def _call_tool(self, change: Transaction, turn: Turn, call: ToolCall) -> bool:
        """Make a tool call and tell of it; whether it succeeded."""
        started = time.monotonic()
        about = {"tool_call_id": call.id, "name": call.name, "arguments": call.arguments}
        change.add_event("tool_call", encode_json(call.arguments), **about)
        change.add_event("function_message", call.line)
        try:
            outcome: str | MemwsError = await self._run(change, turn, call)
        except Stopped:
            outcome = ToolError(f"{turn.stop_reason}: result unknown")
        except (ToolError, Refused) as error:
            outcome = error
        text = self._add_result(change, call, outcome, round((time.monotonic() - started) * 1000))
        turn.failures = [] if isinstance(outcome, str) else [*turn.failures, text]
        return not turn.failures

    async def _run(self, change: Transaction, turn: Turn, call: ToolCall) -> str:
        """A call's result. Raises ToolError, Refused, Stopped, StoreFailed."""
        stopped = f"{turn.stop_reason} before it ran" if turn.stop_reason else ""
        failed = "not run: the calls before it failed" if len(turn.failures) >= MAX_FAILED_TOOLS else ""
        if problem := stopped or failed or call.problem:
            raise ToolError(problem)
        if (tool := self.tools.get(call.name)) is None:
            raise ToolError(f"unknown tool {quote(call.name)}; tools: {', '.join(self.tools)}")
        arguments = tool.bind(call.arguments, lenient=True)
        if surplus := without_heartbeat(call.arguments).keys() - tool.parameters["properties"].keys():
            self._counts["arguments"] += 1
            text = f"{call.name} is called without {quote(', '.join(sorted(surplus)))}, which it does not take"
            change.add_event("correction", text, what="arguments")
        if call.name in MEMORY_TOOLS:
            return str(await getattr(change, call.name)(**arguments))
        waits, note = needs_approval(tool, arguments), ""
        about: JSON = {"tool_call_id": call.id, "name": call.name, "arguments": without_heartbeat(call.arguments)}
        if waits:
            change.add_event("approval_request", f"may {call.name} run?", **about, seconds=APPROVAL_TIMEOUT)
        async with change.apart():
            with turn.interruptible():
                if waits:
                    arguments, note = await self._allowed(tool, arguments, about)
                return note + await call_tool(tool, arguments | dict.fromkeys(tool.filled, self))

    async def _allowed(self, tool: Tool, arguments: JSON, about: JSON) -> tuple[JSON, str]:
        """Wait until a call may run; the arguments to take, and a note of them. Raises ToolError."""
        verdict = asyncio.get_running_loop().create_future()
        self.approvals[about["tool_call_id"]] = about | {"until": now_text(APPROVAL_TIMEOUT)}, tool, verdict
        try:
            return await asyncio.wait_for(verdict, APPROVAL_TIMEOUT) or (arguments, "")
        except TimeoutError:
            raise ToolError(f"not run: nobody allowed it within {APPROVAL_TIMEOUT:g} s") from None
        finally:
            del self.approvals[about["tool_call_id"]]

    def _add_result(self, change: Transaction, call: ToolCall, outcome: str | MemwsError, ms: int = 0) -> str:
        """Give a call its answer, for the clients and for the model, as MemGPT 0.2.7 (system.py) packs it; its text."""
        ok, text = isinstance(outcome, str), self._fitting(clean_text(str(outcome)), NOT_KEPT)
        status = "OK" if ok else "Failed"
        change.add_event("tool_return", text, tool_call_id=call.id, name=call.name, status=status, duration_ms=ms)
        change.add_event("function_message", f"{'Success' if ok else 'Error'}: {text}")
        content = encode_json({"status": status, "message": text, "time": self.memory.clock()})
        change.add_message("tool", text, {"role": "tool", "tool_call_id": call.id, "content": content})
        return text

    # -- ends: with the last step (_finish), within a step (_break_off), at the next opening (_repair); a turn that is
    # refused by the server never began --

    def _finish(self, change: Transaction, turn: Turn, succeeded: bool) -> None:
        """Decide whether another step follows, and why; otherwise end the turn in this same transaction."""
        change.changes.request, reply = turn.request, turn.reply
        turn.calls.update({call.line for call in reply.calls})
        sizes = self._sizes([*self.memory.messages, *change.changes.messages])
        is_full = sum(sizes.values()) > WARNING_FRACTION * self.window
        warn = is_full and not (change.state["warned"] or turn.compactions)
        change.state["warned"] = warn or (is_full and change.state["warned"])

        reason = HEARTBEAT_NO_REPLY if turn.unanswered else ""  # why another step follows (MemGPT 0.2.7, run_step)
        if not succeeded:
            reason = HEARTBEAT_FAILED
        elif any(call.arguments.get(REQUEST_HEARTBEAT) in (True, "true") for call in reply.calls):
            reason = HEARTBEAT_REQUESTED

        failed = turn.failures[:MAX_FAILED_TOOLS]  # what comes after these was not run
        problem = f"{MAX_FAILED_TOOLS} tool calls in a row failed; the last: {''.join(failed[-1:])}"
        tokens = turn.usage["input_tokens"] + turn.usage["output_tokens"]
        ends: list[tuple[str | MemwsError, bool]] = [  # why none does: the first that fits
            (ModelError("bad_output", problem), len(failed) == MAX_FAILED_TOOLS),
            ("done", not (reason or warn or turn.steered)),
            # From here on only turns that would go on.
            ("repeated_call", max(turn.calls.values(), default=0) >= MAX_REPEATED_CALLS),
            ("max_steps", turn.step >= self.max_steps),
            ("budget", tokens >= TURN_TOKEN_BUDGET),
        ]
        end = turn.stop_reason or turn.error or next((end for end, fits in ends if fits), None)

        if warn:
            change.add_notice("system_alert", PRESSURE_WARNING, message=PRESSURE_WARNING)
        if reason and end is None:
            change.wake(reason)
        self._add_context(change, sizes, warn)
        if isinstance(end, str) and turn.stop_reason is None and reply.text and turn.unanswered:
            self._counts["no_reply"] += 1
            change.add_event("correction", "the turn ended without send_message", what="no_reply")
            change.add_message("assistant", "", {"role": "assistant", "content": reply.text})
            change.say(reply.text, partial=bool(reply.fault))
        if end is not None:
            self._end(change, turn, end)

    async def _break_off(self, turn: Turn, reason: Stopped | MemwsError) -> None:
        """End a turn within a step: by a stop, which keeps what came of an answer, or an error, which closes calls."""
        reply, outcome = turn.reply, str(reason) if isinstance(reason, Stopped) else reason
        async with self._change(turn) as change:
            if isinstance(outcome, str):
                reply.text, reply.reasoning = clean_text(reply.text).strip(), clean_text(reply.reasoning).strip()
                reply.partial = reply.partial or "\n".join(filter(None, (call.spoken for call in reply.calls)))
                reply.calls = []
                await self._take_reply(change, turn)
            else:
                logger.warning("agent %s: turn %s: %s", self.name, turn.turn_id, outcome)
                for call_id, name in history_faults(self.memory.messages)[1].items():
                    self._add_result(change, ToolCall(call_id, name), ToolError(INTERRUPTED))
                if turn.request and isinstance(outcome, ModelError):
                    turn.request.response = {"error": {"code": outcome.code, "message": str(outcome)}}
            self._end(change, turn, outcome)

    def _end(self, change: Transaction, turn: Turn, outcome: str | MemwsError) -> None:
        """The terminal event: a stop reason, or an error."""
        end = {"type": "agent_response_end", "stop_reason": outcome, "turn_id": turn.turn_id, "usage": turn.usage}
        if isinstance(outcome, MemwsError):
            end |= {"type": "agent_response_error", "stop_reason": "error"}
            end |= {"message": str(outcome), "code": outcome.code}
        change.changes.events.append(end)
        change.changes.request, change.state["turn"] = turn.request, None
        turn.over = True

    # -- the context window --

    def _sizes(self, messages: Iterable[ChatMessage], **other: str) -> dict[str, int]:
        """Estimated tokens of the sections of a request with these chat messages, and with `other` texts."""
        texts, ratio = self._sections | other, self.ratio
        tokens = {name: estimate_tokens(text) if text else 0 for name, text in texts.items()}
        tokens["messages"] = sum(message.tokens for message in messages)
        return {name: round(count * ratio) for name, count in tokens.items()}

    def used(self) -> int:
        """Estimated tokens of the next request."""
        return sum(self._sizes(self.memory.messages).values())

    def context(self, messages: Iterable[ChatMessage]) -> list[JSON]:
        """The sections of the next request with their estimated tokens and texts, of the chat messages only these."""
        bodies = shape((message.body for message in messages), *self.model.learned.shape)
        texts = self._sections | {"messages": "\n".join(bodies)}
        tokens = self._sizes(self.memory.messages)
        return [{"name": name, "tokens": tokens[name], "text": text} for name, text in texts.items()]

    def _add_context(self, change: Transaction, sizes: dict[str, int], warn: bool) -> None:
        used, sections = sum(sizes.values()), [{"name": name, "tokens": tokens} for name, tokens in sizes.items()]
        fields: JSON = {"sections": sections, "used": used, "window": self.window}
        if warn:
            fields["warning"] = "the context window is nearly full: the agent was told to save what matters"
        elif self._cut_prompts >= 2:
            text = "the endpoint counts less than half of the tokens sent: it seems to cut prompts silently"
            fields["warning"] = f"{text}; set --context-window to the window it really has"
        change.add_event("context", f"{used:,} of {self.window:,} tokens", **fields)

    def _fitting(self, text: str, advice: str = "search finds them") -> str:
        """`text`, or an excerpt of it that leaves two thirds of the room for messages to others."""
        room = self.window - sum(self._sizes([]).values()) - MIN_REPLY_TOKENS
        tokens, most = estimate_tokens(text) * self.ratio, max(128, room // 3)
        return text if tokens <= most else excerpt(text, int(len(text) * most / tokens), advice)

    async def compact(self, turn: Turn, reason: str = "") -> JSON:
        """Replace the oldest chat messages by a summary: the prompt gets strictly smaller; else raises ModelError."""
        memory, sizes = self.memory, self._sizes(self.memory.messages)
        before = sum(sizes.values())
        text = ", ".join(f"{name} {tokens:,}" for name, tokens in sizes.items())
        text = f"{reason}the prompt needs {before:,} of {self.window:,} tokens and cannot be made smaller ({text})"
        room = (sizes["messages"] - max(0, before - self.window)) / self.ratio  # for messages, before calibration
        cut = self._cut_at(room * KEEP_FRACTION / 2**turn.compactions)
        if cut == 0:
            raise ModelError("context_overflow", text)
        turn.compactions += 1
        hidden, kept = memory.messages[:cut], memory.messages[cut:]
        gist = await self._summarize(turn, hidden)
        seen = [message.text for message in kept if message.turn_id == turn.turn_id and message.role == "user"]
        waiting = [item for item in turn.unanswered if item.message not in seen]
        for item in waiting:
            speaker = f"{item.speaker} speaks. " if item.speaker else ""
            gist += f"\n{speaker}{WAITING_NOTE}{excerpt(item.message or '', SUMMARY_LIMIT // 2 // len(waiting))}"
        async with self._change(turn) as change:
            note = f"Note: prior messages ({kept[0].id - 1} of {memory.last_message}) have left your view to make room"
            note += "; conversation_search finds what was said in them. Summary:\n"
            for words in (gist, excerpt(gist, 200), ""):  # they are left out until the summary saves something
                summary = memory.pack("system_alert", message=note + words)
                sizes = self._sizes(kept, summary=encode_json({"role": "user", "content": summary}))
                if (after := sum(sizes.values())) < before:
                    break
            else:
                raise ModelError("context_overflow", text)
            change.state |= {"cut": kept[0].id, "warned": False, "summary": summary, "gist": words}
            saved = {"tokens_before": before, "tokens_after": after}
            counts = {"messages_before": cut + len(kept), "messages_after": len(kept)}
            change.add_event("compaction", f"{cut} messages became a summary", **counts, **saved, summary=words)
        return saved

    def _cut_at(self, keep: float) -> int:
        """Where to cut: the index of the first message kept, never between a call and its result; 0: nowhere."""
        tokens, best, messages = 0, 0, self.memory.messages
        for place in range(len(messages) - 1, 0, -1):
            tokens += messages[place].tokens
            if tokens > keep and best:
                break
            if messages[place].role != "tool":
                best = place
        return best

    async def _summarize(self, turn: Turn, hidden: Sequence[ChatMessage]) -> str:
        """A summary of the messages by the model; without one, their last words, so that a compaction never waits."""
        lines, memory = [], self.memory
        for message in hidden:  # without what a model thought
            whole = message.role != "assistant"
            text = message.said or (message.text if whole else decode_json(message.body)["content"])
            about = f"{message.speaker} ({memory.clock(message.time, MINUTES)})"
            lines += [f"{about}: {excerpt(text, 1_000)}"] if text else []
        transcript = "\n".join(lines)[-max(400, round((self.window - 800) * 2 / self.ratio)) :]
        if gist := self.record.state["gist"]:
            transcript = f"Summary of what came before: {gist}\n{transcript}"
        system = encode_json({"role": "system", "content": SUMMARY_SYSTEM})
        user = encode_json({"role": "user", "content": transcript})
        request = RequestRecord("", 0, self.model.head({}), system, "", "", user, 1, 0, shape=self.model.learned.shape)
        reply = Reply()
        try:
            await self._call_model(turn, request, reply, [])
            read_reply(reply, ())
        except ModelError as error:
            logger.warning("agent %s: no summary by the model (%s)", self.name, error)
            reply.text = ""
        return excerpt(reply.text or transcript[-SUMMARY_LIMIT:], SUMMARY_LIMIT)


# ======================================================================================================================
# 9. Client: send a request, iterate the events of a turn
# ======================================================================================================================

Frame = JSON  # one object of the wire as a client sees it: unknown types and fields of later servers pass through
Listener = Callable[[Frame], None] | None
BOTH_ENDS: JSON = {"compression": None, "max_size": MAX_FRAME, "logger": _ws_logger}  # of a connection


def result_of(future: concurrent.futures.Future[T]) -> T:
    """The result of a future; an interrupt of the wait cancels it."""
    try:
        while os.name == "nt" and not concurrent.futures.wait([future], 0.2).done:
            pass  # Windows notices an interrupt only between two waits
        return future.result()
    finally:
        future.cancel()


class LoopThread:
    """An event loop in a daemon thread, and the blocking way into it."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._lock, self._over = threading.Lock(), False
        self.thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.get_loop().run_forever()

    def call(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a coroutine function that runs there; an interrupt of the wait cancels it. Raises UsageError on
        the loop's own thread, where it would never end, CancelledError where the loop ends first."""
        if threading.current_thread() is self.thread:
            raise UsageError(f"this would wait for its own thread for ever; there, await {function.__name__}")
        with self._lock:
            if self._over:
                raise concurrent.futures.CancelledError
            future = asyncio.run_coroutine_threadsafe(function(*args, **kwargs), self.loop)
        return result_of(future)

    def stop(self) -> None:
        """Cancel what runs there, and end loop and thread; nothing happens where they have ended."""
        with self._lock:
            if not self._over:  # a second stop would cut what the first one still closes
                self._over = True
                self.loop.call_soon_threadsafe(self.loop.stop)
        if threading.current_thread() is not self.thread:
            self.thread.join(CLOSE_TIMEOUT + 1.0)


def reply_text(events: Iterable[Frame]) -> str:
    """What a turn says to the user, a line for each message. Raises RemoteError where it failed."""
    lines: list[str] = []
    for event in events:
        if event["type"] == "agent_response_error":
            raise RemoteError(event["message"], event["code"])
        if event.get("message_type") == "assistant_message":
            lines.append(event["message"])
    return "\n".join(lines)


class Stream(collections.abc.AsyncIterator[Frame]):
    """The events of an agent, without end, or those of one turn, from its start or refusal to its terminal frame: in
    order, each stored one once, also after a broken connection (live events of that time are lost). Iteration raises
    RemoteError where the server refuses, ConnectionLost where the client gives up."""

    def __init__(self, client: Client, request: Frame, after: int | None, on_event: Listener = None) -> None:
        if not client.alive:
            raise ConnectionLost(client.url)
        self.agent_name: str | None = request["agent_name"]
        self.turn_id: str = request.get("turn_id", "")  # "": all turns
        self._client = client
        self._request = {"id": next(client._ids), **request}
        self._cursor = after  # the highest seq taken in; None: the agent's present end
        self._has_begun = False  # since the server was last asked
        self._events = client._new_queue()  # at last comes the error, or None, that ends the iteration
        self._deliver = on_event or self._events.put_nowait
        self._ask()
        client._streams.append(self)

    async def __anext__(self) -> Frame:
        return self._read(await self._events.get(), StopAsyncIteration)

    def _read(self, event: Frame | MemwsError | None, end: type[Exception]) -> Frame:
        """An event of the queue; the last one stays there and is raised."""
        if isinstance(event, dict):
            return event
        self._events.put_nowait(event)
        raise event or end

    async def cancel(self) -> Frame:
        """Ask the server to end this turn; its terminal frame still comes. Result as of the command `cancel`."""
        return await self._client.command("cancel", turn_id=self.turn_id, agent_name=self.agent_name)

    def _ask(self) -> None:
        """Ask for the events above the cursor; a message that comes again under its turn_id is not run again."""
        self._has_begun = False
        cursor = {} if self.turn_id else {"after": self._cursor}
        self._client._post({**self._request, "agent_name": self.agent_name, **cursor}, self._answer)

    def _answer(self, answer: Frame | MemwsError) -> None:
        if isinstance(answer, RemoteError):
            self._close(answer)
        elif not isinstance(answer, MemwsError):  # else the connection was lost, and it is asked again
            self._has_begun = True
            self._cursor = answer["last_seq"] if self._cursor is None else self._cursor

    def _is_ours(self, event: Frame) -> bool:
        is_same_agent = event.get("agent_name") == self.agent_name
        if not self.turn_id:  # a refusal is for its sender alone
            return is_same_agent and (event["type"] not in TERMINAL_TYPES or "seq" in event)
        is_answer = event.get("id") == self._request["id"]  # perhaps the server chose the agent
        return self.turn_id in (event.get("turn_id"), event.get("steered")) and (is_same_agent or is_answer)

    def _take(self, event: Frame) -> None:
        """Take in an event, if it is one of ours and new."""
        if not self._is_ours(event):
            return
        kind, seq = kind_of(event), event.get("seq")
        if self.turn_id and kind == "agent_response_start":
            self.agent_name, self._has_begun = event["agent_name"], True
        is_last = self.turn_id and (kind in TERMINAL_TYPES or event.get("steered") == self.turn_id)
        # A place in the queue, a refusal, and the receipt of what entered the turn of another come without a start.
        is_early = (self.turn_id and kind == "queue") or (is_last and (seq is None or kind == "user_message"))
        is_new = self._has_begun and (seq is None or seq > (self._cursor or 0))
        if is_early or is_new:
            self._cursor = seq or self._cursor
            self._deliver(event)
            if is_last:
                self._close()

    def _close(self, error: MemwsError | None = None) -> None:
        """Nothing more comes: the reader gets what waits, then `error` or the end."""
        if self in self._client._streams:
            self._client._streams.remove(self)
            self._client._pending.pop(self._request["id"], None)
            self._events.put_nowait(error)


class Client:
    """An async client of one server; use it with `async with`, or `connect` and `close`, on one loop.

    reconnect: True tries for ever after a loss, False never, a number for as many seconds; then all that waits ends in
    an error. On a new connection message types, current agent, subscriptions and turns are asked for again.
    on_state is called with "lost", "restored" and "failed".
    """

    def __init__(
        self,
        url: str = f"ws://localhost:{DEFAULT_PORT}",
        token: str | None = None,
        *,
        reconnect: bool | float = True,
        on_state: Callable[[str], None] = lambda state: None,
    ) -> None:
        if token is not None and not re.fullmatch("[!-~]+", token):
            raise UsageError("token: expected printable ASCII characters without spaces")
        self.url = public_url(url)
        self.agent_name: str | None = None  # the connection's current agent: the one created or loaded last
        self._address, self._token = url, token
        self._reconnect, self._on_state = reconnect, on_state
        self._message_types: list[str] | None = None
        self.alive = False  # whether there is a connection or one is being sought
        self._task: asyncio.Task[None] | None = None
        self._websocket: Connection | None = None  # None: no connection
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[Frame, Callable[[Frame | MemwsError], None]]] = {}
        self._streams: list[Stream] = []
        self._new_queue: Callable[[], Any] = asyncio.Queue  # for the events of a stream

    async def __aenter__(self) -> typing.Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Open the connection, in one attempt; nothing happens where it is open. Raises ConnectFailed."""
        if not self.alive:
            websocket = await self._dial()
            self.alive = True
            self._task = asyncio.create_task(self._keep_connection(websocket), name=f"memws client of {self.url}")
            await asyncio.sleep(0)  # it begins: what is asked for next finds the connection

    async def close(self) -> None:
        """Close the connection; whatever waits gets ConnectionLost."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def command(self, command: str, /, **arguments: Any) -> Frame:
        """Send one command and give its result. Raises RemoteError with the server's code and sentence,
        ConnectionLost where the connection breaks before the answer (it may have been done), Refused (too_large)."""
        result: asyncio.Future[Frame | MemwsError] = asyncio.get_running_loop().create_future()
        request = {**arguments, "type": "command", "command": command, "id": next(self._ids)}
        self._post(request, lambda answer: None if result.done() else result.set_result(answer))
        answer = await result
        if isinstance(answer, MemwsError):
            raise answer
        return answer

    async def hello(self, message_types: Iterable[str] | None = None) -> Frame:
        """Ask what the server is, and, with message_types, for these instead of the classic three ("*": all)."""
        return await self.command("hello", message_types=None if message_types is None else list(message_types))

    async def create_agent(self, /, config: str | Mapping[str, Any] | None = None, **more: Any) -> Frame:
        """Create an agent, which becomes the current one: from its name or its config, or keywords of the config."""
        named = config if isinstance(config, Mapping) else {"name": config}
        return await self.command("create_agent", config={**named, **more})

    async def load_agent(self, name: str) -> Frame:
        """Load an agent, which becomes the current one."""
        return await self.command("load_agent", name=name)

    def send(
        self, message: str, agent_name: str | None = None, turn_id: str = "", when_busy: str = "queue", from_: str = ""
    ) -> Stream:
        """Send a user message, without a connection once there is one, and give its turn, to be iterated once.
        agent_name: by default the current one. turn_id: an earlier one resumes that turn. from_: who speaks."""
        about = {"turn_id": turn_id or secrets.token_hex(16), "agent_name": self._named(agent_name)}
        for stream in self._streams:  # where it was sent already, as by a call that was interrupted
            if turn_id and (stream.turn_id, stream._request.get("message")) == (turn_id, message):
                return stream
        about |= {"message": message, "when_busy": when_busy, "from": from_ or None}
        return Stream(self, {"type": "user_message", **about}, 0)

    async def ask(self, message: str, agent_name: str | None = None, when_busy: str = "queue", **more: Any) -> str:
        """Send a user message and give the text of the reply; "" where it entered a turn that runs, whose sender gets
        the reply. Arguments as of `send`. Raises RemoteError."""
        return reply_text([event async for event in self.send(message, agent_name, when_busy=when_busy, **more)])

    def subscribe(self, agent_name: str | None = None, after: int | None = None, on_event: Listener = None) -> Stream:
        """Follow an agent (None: the current one): events stored above `after` (0: all, None: none), then live ones.
        It ends with the command `unsubscribe`, and where a second one of the same agent takes its place. on_event gets
        each event as it comes, on the loop's thread, in place of who iterates."""
        request = {"type": "command", "command": "subscribe", "agent_name": self._named(agent_name)}
        return Stream(self, request, after, on_event)

    def _named(self, agent_name: str | None) -> str | None:
        """The agent that a call means, spelled as the server spells it, so that its frames are recognised."""
        name = self.agent_name if agent_name is None else agent_name
        return name and unicodedata.normalize("NFC", name)

    async def _keep_connection(self, websocket: Connection) -> None:
        """Keep a connection until the client is closed or gives up; then whatever waits fails."""
        error: MemwsError = ConnectionLost(self.url)
        try:
            while True:
                await self._converse(websocket)
                self._report("lost")
                websocket = await self._redial()
                self._report("restored")
        except (ConnectFailed, ConnectionLost) as failure:
            error = failure
            self._report("failed")
        finally:
            self.alive = False
            for stream in list(self._streams):
                stream._close(error)

    def _report(self, state: str) -> None:
        logger.info("connection to %s %s", self.url, state)
        asyncio.get_running_loop().call_soon(self._on_state, state)  # what it raises must not end the connection

    async def _converse(self, websocket: Connection) -> None:
        """Make of a connection what the last one was, and route what comes, to its end; then what waits fails."""
        self._websocket = websocket
        if self._message_types is not None:
            self._post({"type": "command", "command": "hello", "message_types": self._message_types})
        if self.agent_name is not None:
            self._post({"type": "command", "command": "load_agent", "name": self.agent_name})
        # Subscriptions before turns: their replay must not find newer events already delivered.
        for stream in sorted(self._streams, key=lambda stream: bool(stream.turn_id)):
            stream._ask()
        try:
            with contextlib.suppress(ConnectionClosed):
                async for text in websocket:
                    self._route(text)
        finally:
            self._websocket = None
            pending, self._pending = self._pending, {}
            for _, answer in pending.values():
                answer(ConnectionLost(self.url))
            await websocket.close()

    async def _dial(self) -> Connection:
        """A new connection. Raises ConnectFailed, which shows nothing of the address but its public part."""
        from websockets.asyncio.client import connect  # 4 ms of every import otherwise

        status = None
        is_loopback = re.match(r"wss?://(localhost|127\.[\d.]+|\[::1\])([:/?]|$)", self._address)
        try:
            return await connect(
                self._address,
                additional_headers={"Authorization": f"Bearer {self._token}"} if self._token else None,
                open_timeout=OPEN_TIMEOUT,
                close_timeout=CLOSE_TIMEOUT,
                proxy=None if is_loopback else True,  # a proxy that the environment names cannot reach our loopback
                **BOTH_ENDS,
            )
        except InvalidStatus as refusal:
            status, reason = refusal.response.status_code, str(refusal.response.body or b"", "utf-8", "replace")
            advice = f"HTTP {status}, {reason[:200].strip() or 'no memws server'}; check the address"
        except (InvalidURI, ValueError):
            advice = "expected an address like ws://localhost:8282"
        except (OSError, WebSocketException) as error:
            advice = f"{error}; check the address"
            if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):  # at each address
                advice = "start the server with `python memws.py`"
        raise ConnectFailed(f"cannot connect to {self.url}: {advice}", status=status)

    async def _redial(self) -> Connection:
        """Connect again, later and later, until time is over (ConnectionLost) or we are refused (ConnectFailed)."""
        deadline = time.monotonic() + (math.inf if self._reconnect is True else self._reconnect)
        delay = RECONNECT_DELAY
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, delay * random.uniform(0.5, 1.0)))  # noqa: S311
            delay = min(2 * delay, RECONNECT_DELAY_MAX)
            try:
                return await self._dial()
            except ConnectFailed as failure:
                if failure.details["status"] in (401, 403):
                    raise
        raise ConnectionLost(self.url)

    def _post(self, request: Frame, answer: Callable[[Frame | MemwsError], None] = lambda answer: None) -> None:
        """Send a request; `answer` gets the result (of a message none) or the error, before the next frame is read."""
        request = {"id": next(self._ids), **request}
        text = encode_json(request)
        if (size := len(text.encode())) > MAX_FRAME:
            raise Refused("too_large", f"expected at most {MAX_FRAME} bytes, but got {size}; send a shorter text")
        if _is_deeper(request, MAX_DEPTH):
            raise InvalidRequest("too_deep", f"expected a request of at most {MAX_DEPTH} levels, but it is {TOO_DEEP}")
        if self._websocket is None:
            answer(ConnectionLost(self.url))
        else:
            broadcast([self._websocket], text)  # unlike send, at once: requests are few and small
            self._pending[request["id"]] = (request, answer)

    def _route(self, text: str | bytes) -> None:
        """Hand one frame to whoever waits for it."""
        try:
            frame = decode_json(text)
            if frame["type"] in ("command_response", "server_error"):
                self._settle(frame)
            elif frame["type"].startswith("agent_response"):
                for stream in list(self._streams):
                    stream._take(frame)
                if frame.get("change") in ("renamed", "deleted"):
                    self._rename(frame["agent_name"], frame.get("new_name"))
        except Exception:  # one odd frame must not end the connection
            logger.exception("frame ignored: %.80r", text)

    def _settle(self, frame: Frame) -> None:
        """Answer a request, and keep in mind what it changed about this connection."""
        request, answer = self._pending.pop(frame["id"])
        if not frame.get("ok"):
            return answer(RemoteError(**frame.get("error", frame)))
        result, command = frame["result"], request["command"]
        if command == "hello" and request.get("message_types") is not None:
            self._message_types = request["message_types"]
        elif command in ("create_agent", "load_agent"):
            self.agent_name = result["agent_name"]
        elif command in ("rename_agent", "delete_agent"):
            self._rename(request.get("agent_name") or self.agent_name, result.get("agent_name"))
        elif command in ("subscribe", "unsubscribe"):
            name = self._named(request.get("agent_name"))
            for stream in list(self._streams):
                if not stream.turn_id and stream.agent_name == name and stream._request["id"] < request["id"]:
                    stream._close()
        return answer(result)

    def _rename(self, old: str | None, new: str | None) -> None:
        """An agent has another name, or none any more: the current agent and its streams follow."""
        if old == self.agent_name:
            self.agent_name = new
        for stream in self._streams:
            if stream.agent_name == old and new is not None:
                stream.agent_name = new


def _blocking(method: Callable[Concatenate[Client, P], Any]) -> Callable[Concatenate[BlockingClient, P], Any]:
    """A method of Client for BlockingClient, with its signature and docstring."""

    @functools.wraps(method)
    def call(self: BlockingClient, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        @functools.wraps(method)
        async def run() -> Any:
            result = method(self.client, *args, **kwargs)
            return BlockingStream(self, result) if isinstance(result, Stream) else await result

        try:
            return self._thread.call(run)
        except concurrent.futures.CancelledError:
            raise ConnectionLost(self.client.url) from None

    return call


class BlockingClient:
    """A Client on a loop of its own daemon thread; its calls work from any other thread, also inside a running loop.
    Use it with `with`; it ends also when nothing refers to it any more. All is as in Client, but reconnect is 60 s, and
    turns and subscriptions are ordinary iterators."""

    def __init__(self, url: str = f"ws://localhost:{DEFAULT_PORT}", token: str | None = None, **options: Any) -> None:
        self.client = Client(url, token, **{"reconnect": 60.0, **options})  # it belongs to this object's thread
        self.client._new_queue = queue.SimpleQueue
        self._thread = LoopThread("memws client")
        self.close = weakref.finalize(self, self._thread.stop)  # within 3 s; whatever waits gets ConnectionLost
        try:
            self._thread.call(self.client.connect)
        except BaseException:  # also an interrupt
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

    command = _blocking(Client.command)
    hello = _blocking(Client.hello)
    create_agent = _blocking(Client.create_agent)
    load_agent = _blocking(Client.load_agent)
    send = _blocking(Client.send)
    subscribe = _blocking(Client.subscribe)

    def ask(self, message: str, *arguments: Any, **options: Any) -> str:
        return reply_text(self.send(message, *arguments, **options))


connect = BlockingClient  # for scripts and cells: with memws.connect(url) as client


class BlockingStream(Iterator[Frame]):
    """A Stream as an ordinary iterator; an interrupt (KeyboardInterrupt) that meets it waiting cancels its turn."""

    def __init__(self, client: BlockingClient, stream: Stream) -> None:
        self.turn_id = stream.turn_id
        self._client, self._stream = client, stream

    def __next__(self) -> Frame:
        try:
            while True:
                with contextlib.suppress(queue.Empty):  # one that comes as a wait begins is noticed at its end
                    return self._stream._read(self._stream._events.get(timeout=0.2), StopIteration)
        except KeyboardInterrupt:
            if self.turn_id:
                self.cancel()
            raise

    def cancel(self) -> None:
        """Ask the server to end this turn, without waiting for it: fit for any thread and for signal handlers."""
        about = {"command": "cancel", "turn_id": self.turn_id, "agent_name": self._stream.agent_name}
        with contextlib.suppress(RuntimeError):  # the client is closed
            self._client._thread.loop.call_soon_threadsafe(self._client.client._post, {"type": "command", **about})


# ======================================================================================================================
# 10. Panel: one page for browser and notebook, which is only a client
# ======================================================================================================================

PANEL_STYLE: Final = r"""
.memws-panel {
  color-scheme: light; container-type: inline-size;
  --paper: var(--jp-layout-color1, light-dark(#fbfaf8, #17181b)); --raised: light-dark(#fff, #1f2125);
  --ink: var(--jp-content-font-color1, light-dark(#201e1b, #e9e7e3)); --soft: light-dark(#68635b, #a09b92);
  --line: light-dark(#e5e1d9, #34363b); --wash: light-dark(#f3f0ea, #26282d);
  --accent: light-dark(#0b7560, #4fc3a1); --on-accent: light-dark(#fff, #10201b);
  --warn: light-dark(#805300, #e0b050); --bad: light-dark(#b3261e, #ff8a80);
  --plus: light-dark(#dcf3e8, #17382c); --minus: light-dark(#fbe3e0, #43211f);
  --mono: ui-monospace, "SF Mono", "Cascadia Code", Menlo, "DejaVu Sans Mono", monospace;
  box-sizing: border-box; height: 600px; min-height: 320px; resize: vertical; overflow: hidden;
  display: flex; flex-direction: column; background: var(--paper); color: var(--ink);
  border: 1px solid var(--line); border-radius: 12px; text-align: left; font-variant-numeric: tabular-nums;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  *, *::before, *::after { box-sizing: border-box; } [hidden], [role=alert]:empty { display: none !important; }
  button, input, select, textarea { font: inherit; color: inherit; margin: 0; }
  button { cursor: pointer; border: 0; background: none; border-radius: 8px; padding: 5px 12px; }
  button:disabled { cursor: default; opacity: .45; } textarea { max-height: 260px; }
  input, select, textarea { border-radius: 8px; padding: 6px 10px; min-width: 0; max-width: 100%; }
  ::placeholder { color: var(--soft); opacity: 1; }
  :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
  summary { cursor: pointer; list-style: none; &::-webkit-details-marker { display: none; } }
  pre { font: 12.5px/1.5 var(--mono); white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0; }
  h3 { font-size: 20px; line-height: 1.3; margin: 0 0 4px; } h4 { font-size: 14px; margin: 0; }
  mark { background: light-dark(#ffe9a8, #5c4a12); color: inherit; border-radius: 3px; }
  ins, del { display: block; text-decoration: none; border-radius: 4px; padding: 0 6px; background: var(--plus); }
  del { background: var(--minus); text-decoration: line-through; }
  /* What many things share: a raised surface, quiet words, one line that ends in dots, red where something failed. */
  input, select, textarea, .memws-entries, .memws-card, .memws-change, .memws-starter, .memws-newest, .memws-composer,
  .memws-dialog form { background: var(--raised); border: 1px solid var(--line); }
  .memws-mark, .memws-model, .memws-status, .memws-quiet, .memws-link, .memws-trace > summary,
  .memws-step, .memws-args, .memws-state, .memws-copy, .memws-note, .memws-used, .memws-tab, .memws-text:empty,
  .memws-empty p, .memws-opener, .memws-days summary, .memws-rows > .memws-prose { color: var(--soft); }
  .memws-mark, .memws-step, .memws-copy, .memws-used { font-size: 12.5px; }
  .memws-model, .memws-status, .memws-said, .memws-told, .memws-notice, .memws-quiet, .memws-trace > summary,
  .memws-note, .memws-change, .memws-days summary, .memws-fold summary { font-size: 13px; }
  .memws-model, .memws-told, .memws-live, .memws-why, .memws-args, .memws-fold summary {
    overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
  .memws-said, .memws-why, .memws-bad:is(.memws-note, .memws-mark, .memws-notice > *), .memws-refused .memws-mark,
  .memws-bad .memws-state { color: var(--bad); }
  .memws-remark, .memws-warn:is(.memws-note, .memws-model) { color: var(--warn); }
  .memws-main { background: var(--accent); color: var(--on-accent); font-weight: 600; }
  .memws-quiet:hover, .memws-entry:hover, .memws-opener:hover { background: var(--wash); color: var(--ink); }
  .memws-link { padding: 0 2px; font-size: inherit; text-decoration: underline; text-underline-offset: 2px; }
  .memws-actions { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin: 6px 0; }
  .memws-top { display: flex; align-items: center; gap: 10px; min-height: 48px; padding: 6px 14px; font-size: 14px;
    border-bottom: 1px solid var(--line); }
  .memws-top select { padding: 4px 8px; max-width: 40cqw; } .memws-top > button { padding: 2px 8px; }
  .memws-status { margin-left: auto; display: flex; align-items: center; gap: 7px; flex: none; max-width: 50cqw; }
  .memws-status i { flex: none; width: 8px; height: 8px; border-radius: 50%; background: var(--accent); }
  &[data-state=offline] .memws-status i { background: var(--bad); }
  &[data-state=running] .memws-status i { animation: memws-pulse 1.1s ease-in-out infinite; }
  .memws-opener { padding: 2px 8px; } .memws-entry { text-align: left; padding: 5px 24px 5px 10px; }
  .memws-entries:popover-open { display: grid; padding: 4px; border-radius: 10px; box-shadow: 0 6px 24px #0002;
    margin: 0; inset: auto; position-area: bottom span-right; position-try: flip-block, flip-inline; }
  &:not([data-agent]) :is(.memws-top select, .memws-menu, .memws-right), &.memws-compact .memws-right,
  &:not([data-state=running]) .memws-composer select, .memws-user:empty { display: none; }
  .memws-columns { flex: 1; min-height: 0; display: flex; } .memws-log, .memws-side { position: relative; }
  .memws-left { position: relative; flex: 1; overflow: hidden; display: flex; flex-flow: column; padding-bottom: 12px; }
  .memws-log { flex: 1; overflow: hidden auto; display: flex; flex-direction: column-reverse; padding: 16px 20px 8px;
    &:has(.memws-empty) { flex-direction: column; &::before { content: ""; flex: 0 1 8vh; } } }
  .memws-inner { flex: none; margin: 0 auto auto; width: 100%; max-width: 720px; }
  .memws-heard, :is(.memws-card form, .memws-find) > label > .memws-mark {
    position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .memws-turn { display: flex; flex-direction: column; gap: 8px; padding: 8px 0 14px; overflow-wrap: anywhere;
    contain: layout style; }
  .memws-user { align-self: flex-end; max-width: 85%; display: grid; justify-items: end; gap: 2px; }
  .memws-bubble { background: var(--wash); border-radius: 16px 16px 4px; padding: 8px 14px; white-space: pre-wrap; }
  .memws-refused .memws-bubble { opacity: .6; } .memws-trace > summary { display: flex; gap: 8px; min-width: 0; }
  .memws-trace > summary:hover { color: var(--ink); } .memws-notice button { margin: 0 4px; }
  .memws-trace > summary::before, .memws-fold summary::before { content: "▸ "; }
  .memws-trace[open] > summary::before, .memws-fold[open] summary::before { content: "▾ "; }
  .memws-live, .memws-why, .memws-args { flex: 1 1 0; &:empty { display: none; } }
  .memws-live { font-style: italic; opacity: .85; } .memws-trace:not(.memws-running) .memws-live { display: none; }
  .memws-running .memws-told { animation: memws-pulse 1.4s ease-in-out infinite; }
  .memws-rows { border-left: 2px solid var(--line); margin: 6px 0 2px 4px; padding-left: 14px; font-size: 13.5px;
    display: grid; grid-template-columns: minmax(0, 1fr); gap: 6px; }
  .memws-rows > .memws-prose { font-style: italic; } .memws-step { justify-self: start; padding: 0; }
  .memws-step:hover, .memws-chip:hover { text-decoration: underline; }
  .memws-tool summary { display: flex; gap: 8px; } .memws-tool b { font: 600 12.5px/1.7 var(--mono); }
  .memws-change { display: flex; flex-wrap: wrap; gap: 4px 10px; border-radius: 10px; padding: 6px 10px; }
  .memws-chip { align-self: start; color: var(--accent); font-weight: 600; padding: 0; }
  .memws-diff { flex: 1 1 240px; min-width: 0; white-space: pre-wrap; }
  .memws-foot { display: flex; gap: 8px; align-items: center; margin-top: 2px; .memws-copy { order: 1; } }
  .memws-copy { padding: 1px 6px; opacity: 0; transition: opacity .15s; }
  :is(.memws-agent, .memws-fence):hover .memws-copy, .memws-copy:focus-visible { opacity: 1; }
  .memws-prose { min-width: 0;
    > :first-child { margin-top: 0; } > :last-child { margin-bottom: 0; } p, blockquote { margin: .6em 0; }
    p { white-space: pre-wrap; } li > p { white-space: pre-line; margin: 0; } a { color: var(--accent); }
    h3, h4, h5, h6 { font-size: 1em; margin: 1em 0 .3em; } ul, ol { margin: .5em 0; padding-left: 1.6em; }
    code { font: 13px var(--mono); background: var(--wash); border-radius: 4px; padding: 1px 4px; }
    blockquote { padding-left: 12px; border-left: 3px solid var(--line); color: var(--soft); } hr { opacity: .3; }
    .memws-table { overflow-x: auto; margin: .6em 0; } table { border-collapse: collapse; font-size: 14px; }
    th, td { padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
  }
  .memws-fence { position: relative; background: var(--wash); border-radius: 8px; padding: 4px 12px; margin: .6em 0;
    pre { white-space: pre; overflow-x: auto; } code { padding: 0; background: none; }
    .memws-copy { position: absolute; top: 4px; right: 6px; background: var(--wash); } }
  .memws-empty { max-width: 460px; margin: 0 auto; text-align: center; display: grid; gap: 8px; justify-items: center; }
  .memws-starter { width: 100%; padding: 10px 14px; text-align: left; &:hover { border-color: var(--accent); } }
  .memws-over, .memws-composer { position: relative; width: calc(100% - 40px); max-width: 720px; margin: 0 auto; }
  .memws-empty p { margin: 0 0 10px; } .memws-newest { position: absolute; right: 0; bottom: calc(100% + 8px);
    border-radius: 16px; box-shadow: 0 1px 6px #0002; }
  .memws-composer { display: flex; gap: 6px; align-items: flex-end; padding: 6px; border-radius: 14px;
    &:focus-within { border-color: var(--accent); }
    textarea { flex: 1; border: 0; background: none; resize: none; outline: 0; padding: 5px 8px; max-height: 200px;
      field-sizing: content; } .memws-stop { border: 1px solid var(--line); }
    select { border: 0; background: none; color: var(--soft); font-size: 13px; align-self: center; }
  }
  .memws-dialog { position: absolute; z-index: 2; inset: 0; overflow: auto; &:empty { display: none; }
    background: color-mix(in srgb, var(--paper) 75%, #0000);
    form { width: min(560px, 100% - 40px); margin: 16px auto; padding: 16px 20px; border-radius: 12px;
      box-shadow: 0 6px 24px #0002; } label { display: grid; gap: 2px; margin: 8px 0; }
    label:not(:has(:is(input, textarea))) { grid-template-columns: 9em 1fr; align-items: baseline; font-size: 14px; } }
  .memws-right { flex: 0 0 clamp(300px, 33%, 440px); min-width: 0; min-height: 0; border-left: 1px solid var(--line);
    padding: 12px 16px; display: flex; flex-direction: column; gap: 6px; font-size: 14px; }
  .memws-bar { position: relative; flex: none; height: 10px; border-radius: 5px; overflow: hidden; display: flex;
    gap: 1px; background: var(--wash);
    button { padding: 0; border-radius: 0; min-width: 2px; transition: width .4s; }
    button:focus-visible { outline: 2px solid var(--ink); outline-offset: -2px; }
    i { position: absolute; left: 75%; height: 100%; width: 2px; background: var(--soft); } }
  .memws-used { padding: 4px 0 0; text-align: left; b { color: var(--ink); } }
  .memws-system { background: #7c8797; } .memws-tools { background: #9b7fd1; }
  .memws-core_memory, .memws-gauge i { background: #23a07a; } .memws-summary { background: #d8962f; }
  .memws-messages { background: #4f87d8; } nav { display: flex; gap: 2px; border-bottom: 1px solid var(--line); }
  .memws-tab { border-radius: 0; padding: 6px 8px; margin-bottom: -1px; border-bottom: 2px solid transparent;
    &[aria-current=true] { color: var(--ink); border-color: var(--accent); font-weight: 600; } }
  .memws-side { flex: 1; min-height: 0; overflow: hidden auto; padding: 4px 2px; overflow-wrap: anywhere; }
  .memws-cards, .memws-memory { display: grid; gap: 10px; } .memws-days { width: 100%; label { white-space: nowrap; } }
  .memws-card { border-radius: 10px; padding: 8px 12px 10px; header { display: flex; align-items: center; gap: 8px; }
    header button { margin-left: auto; padding: 2px 8px; } }
  .memws-gauge { background: var(--wash); margin: 4px 0 8px; }
  .memws-gauge i { display: block; height: 2px; transition: width .4s; }
  .memws-text { white-space: pre-wrap; ins, del { margin: 0 -6px; }
    &:empty::before { content: "nothing yet"; font-style: italic; } }
  .memws-card:has(.memws-ask) :is(.memws-text, h3, header button) { display: none; }
  .memws-card:has(.memws-request) { border-color: var(--warn); header .memws-mark { margin-left: auto; } }
  :is(.memws-ask, .memws-request, .memws-find, .memws-passage) > label > :is(input, textarea) { width: 100%; }
  .memws-card :is(.memws-ask, .memws-request) textarea { font: 13px/1.5 var(--mono); field-sizing: content; }
  .memws-find, .memws-passage { display: flex; flex-wrap: wrap; gap: 0 6px; align-items: center;
    > label { flex: 1 1 140px; } > div:has(> details) { display: contents; } label + label { margin-left: 8px; } }
  .memws-said pre { color: var(--ink); background: var(--wash); border-radius: 6px; padding: 6px 8px; }
  .memws-fold, .memws-found { border-bottom: 1px solid var(--line); } .memws-fold summary { padding: 4px 0; }
  .memws-found { padding: 6px 0; .memws-mark { display: flex; justify-content: space-between; } }
  @container (max-width: 720px) {
    .memws-top { flex-wrap: wrap; } .memws-model { display: none; }
    .memws-model.memws-warn { display: block; order: 1; flex: 0 0 100%; } .memws-columns { flex-direction: column; }
    .memws-right { flex: 0 0 42%; border-left: 0; border-top: 1px solid var(--line); }
    .memws-log { padding: 10px 14px 4px; } .memws-over, .memws-composer { width: calc(100% - 28px); }
    .memws-empty { gap: 4px; p { margin: 0; } } .memws-starter { padding: 6px 14px; }
  }
}
:is([data-jp-theme-light=false], .vscode-dark, html[theme=dark], .dark) .memws-panel { color-scheme: dark; }
:has(> .memws-panel + .memws-panel) { display: flex; flex-wrap: wrap; > * { flex: 1 1 420px; } } /* side by side */
body[data-memws=page] { margin: 0; }
body[data-memws=page] > .memws-panel { height: 100dvh; border: 0; border-radius: 0; resize: none;
  + .memws-panel { border-left: 1px solid var(--line); } }
@media (prefers-color-scheme: dark) { body[data-memws=page] > .memws-panel { color-scheme: dark; } }
@media (prefers-reduced-motion: reduce) { .memws-panel * { animation: none !important; transition: none !important; } }
@keyframes memws-pulse { 50% { opacity: .35; } }
"""

PANEL_SCRIPT: Final = r"""
// One module for the page at GET / and for the widget in a notebook: a client of the wire, and nothing else.
// Whatever anybody wrote is set as text: no string ever becomes HTML.

function node(tag, props = {}, ...kids) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), (event) => attempt(element, value, event));
    else if (value != null && value !== false) element.setAttribute(name, value);
  }
  element.append(...kids.filter((kid) => kid != null && kid !== false));
  return element;
}
async function attempt(element, work, event) { // a failure is told by the form, or else the panel, around the element
  const place = element.closest("form, .memws-panel") ?? element;
  try { await work(event); } catch (detail) { place.dispatchEvent(new CustomEvent("memws-fail", { detail })); }
}
const div = (kind, ...kids) => node("div", { class: `memws-${kind}` }, ...kids);
const span = (kind, ...kids) => node("span", { class: `memws-${kind}` }, ...kids);
const button = (label, kind, onclick, more) => // one without work of its own submits its form
  node("button", { type: onclick ? "button" : "submit", class: `memws-${kind}`, onclick, ...more }, label);
const fold = (title, text, open = false) =>
  node("details", { class: "memws-fold", open }, node("summary", {}, title), node("pre", {}, text));
const copyButton = (text) => button("copy", "copy", async ({ target }) => {
  if (!navigator.clipboard) throw new Error("this browser lets pages copy over https and on localhost only");
  await navigator.clipboard.writeText(text());
  target.textContent = "copied";
});

const inputs = (fields) => Object.entries(fields).map(([name, about]) => { // by name: attributes, or what is told there
  const isTold = typeof about === "string";
  const field = isTold ? about : node(about.rows ? "textarea" : "input", { name, ...about }, about.rows && about.value);
  return node("label", {}, span("mark", titleOf(name)), field);
});
function form(kind, work, fields, ...actions) { // `work` gets what is not empty, by name
  const said = node("div", { class: "memws-said", role: "alert" });
  const fail = ({ detail: { message, value } }) => said.replaceChildren(message, value ? node("pre", {}, value) : "");
  const onsubmit = ({ target }) => {
    said.replaceChildren();
    const values = Array.from(new FormData(target), ([name, text]) => [name, text.trim()]);
    return work(Object.fromEntries(values.filter(([, text]) => text)));
  };
  const about = { class: `memws-${kind}`, method: "dialog", onsubmit, "onmemws-fail": fail }; // it goes to no address
  return node("form", about, ...inputs(fields), said, div("actions", ...actions));
}
function ask(place, title, fields, verb, work) { // until it is done or left; then the focus is where it was
  const focused = document.activeElement;
  const exit = button(work ? "cancel" : "close", "quiet", null, { type: "reset" }); // as Esc does
  const made = form("ask", (given) => work(given).then(() => made.reset()), fields, work && button(verb, "main"), exit);
  made.prepend(node("h3", {}, title));
  made.onreset = () => {
    made.remove();
    if (document.activeElement === document.body) (focused.closest(".memws-menu")?.firstChild ?? focused).focus();
  };
  place.replaceChildren(made);
  made.querySelector("input, textarea, button").focus();
}
const buttons = (works, kind) => Object.entries(works).map(([name, work]) => button(name, kind, work));
function menu(label, works) { // the browser closes it at Esc, and at a click elsewhere
  const about = { class: "memws-entries", popover: "auto", onclick: () => entries.hidePopover() };
  const entries = node("div", about, ...buttons(works, "entry"));
  const opener = button("⋯", "opener", null, { type: "button", "aria-label": label });
  opener.popoverTargetElement = entries;
  return div("menu", opener, entries);
}

const { format: number } = new Intl.NumberFormat("en");
const counted = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const clock = (time) => new Date(time).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
const seconds = (ms, before) => (ms >= 100 ? `${before}${(ms / 1000).toFixed(1)} s` : "");
const titleOf = (name) => name.replace("_", " ");
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16)).join("-");
const oneLine = (text) => text.slice(0, 300).replace(/\s+/g, " "); // the style cuts it where its line ends
const rowsOf = (diff) => diff.map((row) => node({ "+": "ins", "-": "del" }[row[0]] ?? "div", {}, row.slice(1) || " "));
const isFull = (value) => value !== null && typeof value === "object" && Object.keys(value).length > 0;
function pretty(value, margin = "") { // as YAML, where texts keep their lines
  const text = typeof value === "string" ? value : JSON.stringify(value);
  if (!isFull(value)) return text.replaceAll("\n", "\n" + margin);
  const name = (key) => (Array.isArray(value) ? "-" : key + ":");
  const row = ([key, item]) => `${margin}${name(key)}${isFull(item) ? "\n" : " "}${pretty(item, margin + "  ")}`;
  return Object.entries(value).map(row).join("\n");
}

// ---- Markdown: a small part of it, as nodes. No HTML, no images, links to http(s) only; every pattern is bounded ----

const CODE = /(?<!`)(`{1,9})(?!`)([\s\S]{1,5000}?)(?<!`)\1(?!`)/.source;
const STRONG = /\*\*(?=\S)([\s\S]{0,2000}?\S)\*\*/.source;
const EMPHASIS = /(?<![\w*])[*_](?=\S)([^*_\n]{0,500}?\S)[*_](?![\w*])/.source;
const LINK = /\[([^\]\n]{1,300})\]\((https?:\/\/[^\s)]{1,2000})\)/.source;
const ADDRESS = /(https?:\/\/[^\s<>"')\]]{0,2000}[^\s<>"')\].,;:!?])/.source;
const INLINE = new RegExp([CODE, STRONG, EMPHASIS, LINK, ADDRESS].join("|"), "g");
// A block is a fence to its end, a heading, a rule, a quote, a table, a list up to an empty row, or rows up to these.
const FENCE = /^ {0,3}(?<fence>```+|~~~+)(?<language>.*)\n?(?<code>[^]*?)(?:(?<=\n) *\k<fence> *$|$(?![^]))/.source;
const HEADING = /^(?<level>#{1,6})[ \t](?<title>.*)/.source;
const RULE = /^ {0,3}(?<rule>(?:[-*_] *){3,})$/.source;
const QUOTE = /(?<quote>(?:^ {0,3}>.*\n?)+)/.source;
const TABLE = /(?<table>(?:^ {0,3}\|.*\n?)+)/.source;
const MARK = /(?:[-*+]|\d{1,9}[.)])[ \t]/.source;
const ROW = /(?:^(?! {0,3}(?:```|~~~)|#{1,6}[ \t]).*\S.*\n?)/.source;
const LIST = `(?<list>^[ \\t]*${MARK}.*\\n?${ROW}*)`;
const ROWS = `(?:(?!^ {0,3}[>|]|^[ \\t]*${MARK})${ROW})+`;
const BLOCK = new RegExp([FENCE, HEADING, RULE, QUOTE, TABLE, LIST, ROWS].join("|"), "gm");

const markdown = (text, depth) => // of what is nested deeper than anybody means it, the text
  (depth > 8 ? [text] : [...text.matchAll(BLOCK)].map((match) => block(match, depth)));

function inline(text) {
  const nodes = [];
  let place = 0;
  for (const match of text.matchAll(INLINE)) {
    const [all, , code, strong, emphasis, label, href, address] = match;
    const to = { href: href ?? address, target: "_blank", rel: "noopener noreferrer" };
    nodes.push(text.slice(place, match.index));
    if (code) nodes.push(node("code", {}, code.trim()));
    else if (strong) nodes.push(node("strong", {}, ...inline(strong)));
    else if (emphasis) nodes.push(node("em", {}, ...inline(emphasis)));
    else nodes.push(node("a", to, label ?? address));
    place = match.index + all.length;
  }
  return [...nodes, text.slice(place)];
}

function block({ 0: source, groups }, depth) {
  const { fence, language, code, level, title, rule, quote, table, list: items } = groups;
  const shown = () => code.replace(/\n$/, "");
  if (fence) return div("fence", copyButton(shown), span("mark", language), node("pre", {}, node("code", {}, shown())));
  if (level) return node("h" + Math.min(6, level.length + 2), {}, ...inline(title));
  if (rule) return node("hr");
  if (quote) return node("blockquote", {}, ...markdown(quote.replace(/^ {0,3}> ?/gm, ""), depth + 1));
  if (table) return div("table", grid(table));
  if (items) return list(items, depth);
  return node("p", {}, ...inline(source.trimEnd()));
}

function grid(source) { // the row of dashes only parts the head from the rest
  const rows = source.trimEnd().split("\n").filter((row) => !/^[\s|:-]*$/.test(row));
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/);
  const cell = (tag) => (text) => node(tag, {}, ...inline(text.trim().replaceAll("\\|", "|")));
  const line = (row, place) => node("tr", {}, ...cells(row).map(cell(place ? "td" : "th")));
  return node("table", {}, ...rows.map(line));
}

function list(source, depth) { // an item begins where the margin is about that of the first
  const [, margin, mark] = source.match(/^([ \t]*)(\S+)/);
  const texts = source.split(new RegExp(`^[ \\t]{0,${margin.length + 1}}${MARK}`, "m")).slice(1);
  const items = texts.map((text) => node("li", {}, ...markdown(text, depth + 1)));
  return /\d/.test(mark) ? node("ol", { start: parseInt(mark) }, ...items) : node("ul", {}, ...items);
}

// ---- transports: functions of the panel, which hears of state and frames, to {send, close} for frames as texts ------

const overSocket = (panel) => {
  let [delay, socket] = [500]; // milliseconds
  const connect = async ({ token = "" }) => {
    sessionStorage.setItem("memws-token", token);
    open();
  };
  const open = () => {
    const token = sessionStorage.getItem("memws-token") ?? "";
    const fits = /^[\w!#$%&'*+.^`|~-]*$/.test(token); // other characters are in no subprotocol
    const address = fits ? "." : `.?token=${encodeURIComponent(token)}`; // also below a proxy's prefix
    socket = new WebSocket(address, token && fits ? ["memws", token] : []);
    socket.onopen = () => panel.changed("connected");
    socket.onmessage = (event) => panel.hear(event.data);
    socket.onclose = async () => { // a browser does not tell a 401 from a server that is away, but /healthz does
      if (!panel.root.isConnected) return null; // nobody looks at it any more
      const wasOpen = panel.connection === "connected";
      panel.changed("offline");
      const health = await fetch("healthz").then((answer) => answer.json()).catch(() => ({}));
      const fields = { token: { type: "password" } };
      if (health.token && !wasOpen) return ask(panel.dialog, "The token of this server", fields, "connect", connect);
      delay = wasOpen ? 500 : Math.min(2 * delay, 8000);
      return setTimeout(open, delay);
    };
  };
  open();
  return { send: (text) => socket.send(text), close: () => socket.close() };
};

// In a notebook the kernel holds the WebSocket, which works wherever the notebook does. A comm loses messages, though:
// so each of ours holds all frames that are not acknowledged, and a gap in the kernel's is as a new connection.
const overComm = (model) => (panel) => {
  const [session, unheard] = [newId(), []];
  let [first, last, silent] = [1, 0, 0]; // the number of the first unheard, that of the kernel's last, seconds
  const post = (about, ...more) => {
    unheard.push(...more);
    try { model.send({ session, first, frames: [...unheard], ...about }); } catch { silent = 9; } // the kernel has gone
  };
  const receive = ({ ack, state, sent, frames = [], ...content }) => {
    if (content.session !== session) return;
    silent = 0;
    for (; first <= ack; first++) unheard.shift();
    if (sent - (frames.length > 0) > last) panel.changed("offline");
    panel.changed(state);
    if (sent > last) frames.forEach((frame) => panel.hear(frame));
    last = Math.max(last, sent);
  };
  const timer = setInterval(() => {
    if (++silent > 5) panel.changed("offline: the kernel does not answer; if it was restarted, run the cell again");
    post();
  }, 1000);
  const close = () => {
    clearInterval(timer);
    model.off("msg:custom", receive);
    post({ over: true });
  };
  model.on("msg:custom", receive);
  post();
  return { send: (frame) => post({}, frame), close };
};

// ---- the conversation: a turn is what was said, a trace of what it took, and what came back -------------------------

class Turn {
  streams = {}; // elements whose `text` is being made, by kind
  calls = new Map(); // {row, state, result, card} by id
  tools = new Set(); // names of what was called
  told = span("told");
  live = span("live");
  why = span("why");
  rows = div("rows"); // thoughts and calls, folded to one line
  user = div("item memws-user");
  element = Object.assign(node("article", { class: "memws-turn" }, this.user), { turn: this });
  constructor(panel, id) {
    Object.assign(this, { panel, id });
    const summary = node("summary", {}, this.told, this.live, this.why);
    this.trace = node("details", { class: "memws-item memws-trace" }, summary, this.rows);
  }
  take(event) {
    this.seq ??= event.seq;
    this["on_" + (event.message_type ?? event.type)]?.(event);
  }
  note(text, kind) { this.element.append(div(`item memws-note memws-${kind}`, text)); }
  said(text, ...state) { // by the user, and what has become of it
    this.text = text;
    this.user.replaceChildren(div("bubble", text), div("mark", ...state));
  }
  refused(why) {
    const again = () => { if (this.panel.submit(this.text)) this.element.remove(); };
    this.said(this.text, `not sent: ${why} · `, button("try again", "link", again));
    this.user.classList.add("memws-refused");
  }
  tell(isRunning) { // the line of the thoughts and calls
    const state = isRunning ? "thinking" : "thought" + seconds(this.to - this.from, " ");
    this.told.textContent = [state, ...this.tools].join(" · ");
    this.trace.classList.toggle("memws-running", isRunning);
  }
  row(kind, { step = this.step, time }, ...kids) {
    this.to = Date.parse(time);
    this.from ??= this.to;
    const show = () => this.panel.show("Context", { turn_id: this.id, step });
    if (step !== this.step) this.rows.append(button(`step ${step}: what the model got`, "step", show));
    this.step = step;
    this.tell(true);
    if (!this.trace.parentNode) this.element.append(this.trace);
    return this.rows.appendChild(div(kind, ...kids));
  }
  stream(event, of) {
    return this.streams[of] ??= of === "assistant_message" ? this.reply(event) : this.row("prose", event);
  }
  reply({ time }) {
    this.tell(false);
    const prose = div("prose");
    this.mark = div("mark", clock(time));
    this.foot = div("foot", this.mark, copyButton(() => prose.text));
    this.element.append(div("item memws-agent", prose, this.foot));
    return prose;
  }
  show(prose) { // only blocks that changed are drawn again, so that a selection further up stays
    const next = [...prose.text.matchAll(BLOCK)];
    let same = 0;
    while (same < next.length && prose.children[same]?.source === next[same][0]) same++;
    while (prose.children.length > same) prose.lastChild.remove();
    prose.append(...next.slice(same).map((match) => Object.assign(block(match, 0), { source: match[0] })));
    prose.frame = null;
    if (prose.parentNode === this.rows) this.live.textContent = "…" + oneLine(prose.text.slice(-72));
  }
  on_user_message({ message, from, time, steered }) {
    if (steered) this.user = this.element.appendChild(div("item memws-user")); // where it entered
    this.said(message, (from ? `${from} · ` : "") + clock(time));
  }
  on_internal_monologue(event) { this.on_assistant_message(event); }
  on_assistant_message(event) { // the whole text
    const prose = this.stream(event, event.message_type);
    this.show(Object.assign(prose, { text: event.message }));
    if (event.partial) this.mark?.append(" · cut short");
    delete this.streams[event.message_type];
  }
  on_context(event) { if (event.warning) this.note(event.warning, "warn"); }
  on_heartbeat() { if (!this.text && !this.step) this.note("a heartbeat woke the agent", ""); }
  on_correction(event) { this.row("remark", event, event.message); }
  on_queue({ position }) {
    const cancel = () => this.panel.command("cancel", { turn_id: this.id });
    this.said(this.text, `waits, number ${position} · `, button("take back", "link", cancel));
  }
  on_agent_response_start(event) { this.since = Date.parse(event.time); }
  on_delta(event) {
    const prose = this.stream(event, event.of);
    prose.text = (prose.text ?? "") + event.message;
    prose.frame ??= requestAnimationFrame(() => this.show(prose)); // once a frame of the screen
  }
  on_tool_call({ name, arguments: { request_heartbeat, ...given }, ...event }) {
    if (name === "send_message") return;
    const [state, result] = [span("state", "running"), node("pre")];
    const head = node("summary", {}, node("b", {}, name), span("args", oneLine(pretty(given))), state);
    this.tools.add(name);
    const row = this.row("tool", event, node("details", {}, head, node("pre", {}, pretty(given)), result));
    this.calls.set(event.tool_call_id, { row, state, result });
  }
  on_approval_request({ tool_call_id, name, arguments: given, seconds, time }) { // a card, until it is answered
    const call = this.calls.get(tool_call_id);
    const text = JSON.stringify(given, null, 2);
    const answer = async (more) => {
      await this.panel.command("approve", { tool_call_id, ...more });
      call.card.remove();
      this.panel.field.focus();
    };
    const allow = () => {
      const { value } = made.elements.arguments;
      return answer({ allow: true, arguments: value === text ? undefined : { ...JSON.parse(value) } });
    };
    const deny = ({ reason }) => answer({ allow: false, reason }); // also by Enter in the reason
    const fields = { arguments: { rows: 1, value: text }, reason: { placeholder: "why not, for the model" } };
    const made = form("request", deny, fields, button("Allow", "main", allow), button("Deny", "stop"));
    const until = span("mark", `until ${clock(Date.parse(time) + 1000 * seconds)}`);
    call.state.textContent = "waits to be allowed";
    call.card = card(`May ${name} run?`, until, "", made);
    this.element.append(call.card);
  }
  on_tool_return({ tool_call_id, name, status, duration_ms, message, time }) {
    const { row, state, result, card } = this.calls.get(tool_call_id) ?? {};
    if (!row) return; // of send_message
    const hasFailed = status === "Failed";
    card?.remove();
    if (card) this.note(`${name} · ${oneLine(message)}`, "");
    result.textContent = message;
    state.textContent = hasFailed ? "failed" : `${number(duration_ms)} ms`;
    row.classList.toggle("memws-bad", hasFailed);
    if (hasFailed) this.why.textContent = `failed: ${oneLine(message)}`;
    this.to = Date.parse(time);
  }
  on_memory_change(event) {
    const name = event.what === "core" ? event.label : "the archive";
    const did = event.after === null ? "forgot from" : "remembered in";
    const told = event.by === "client" ? `${name} was edited` : `${did} ${name}`;
    const rows = rowsOf(event.diff.split("\n").filter((row) => row.slice(1).trim()));
    const chip = button(told, "chip", () => this.panel.show("Memory", event));
    const reply = this.streams.assistant_message?.parentNode ?? null; // it comes after
    this.element.insertBefore(div("item memws-change", chip, div("diff", ...rows)), reply);
  }
  on_compaction({ message, summary }) { this.note(fold(message, summary), "warn"); }
  on_retry(event) { // a model call begins again: what came of it does not count
    for (const prose of Object.values(this.streams)) (prose.closest(".memws-agent") ?? prose).remove();
    this.streams = {};
    this.row("remark", event, event.message);
  }
  on_agent_response_end({ stop_reason, usage, time }) {
    if (stop_reason !== "done") this.note(`stopped: ${titleOf(stop_reason)}`, "warn");
    const spent = counted(usage.input_tokens + usage.output_tokens, "token");
    this.mark?.append(seconds(Date.parse(time) - this.since, " · "), ` · ${spent}`);
    this.ended();
  }
  on_agent_response_error(event) {
    if (event.seq == null && this.text) return this.refused(event.message);
    this.note(event.message, "bad");
    return this.ended();
  }
  ended() { // what can be done with it from now on
    const { panel, id: turn_id, step = 1 } = this;
    this.tell(false);
    this.foot ??= this.element.appendChild(div("foot"));
    this.foot.append(menu("This turn", {
      "fork here…": () => this.copy("fork", "Another agent, as this one was then", { new_name: CONFIG.name }),
      "rewind to here…": () => this.copy("rewind", `${panel.agent} will know nothing of what came after this turn`,
        { keep_as: { value: `${panel.agent}-later` } }),
      "what the model saw": () => panel.show("Context", { turn_id, step }) }));
  }
  copy(label, title, fields) {
    const { panel, id: turn_id } = this;
    ask(panel.dialog, title, fields, label, async (given) => {
      const { agent_name, kept_as: name = agent_name } = await panel.command(`${label}_agent`, { turn_id, ...given });
      await panel.open(panel.agent);
      const works = { "open it": () => panel.open(name), "show it beside": () => panel.beside(name) };
      panel.tell(`There is ${name} now.`, works);
    });
  }
}

const REPLAYED = 600; // stored events that are fetched at once
const MOST = 200; // turns that stay when the newest are looked at
const OF_NO_TURN = ["memory_change", "correction", "compaction"]; // or of one: a client may cause them too

class Log { // an element for each turn, whose property `turn` it is; older ones are fetched as somebody scrolls up
  inner = div("inner");
  heard = node("div", { class: "memws-heard", "aria-live": "polite" });
  newest = button("↓ newest", "newest", () => { this.element.scrollTop = 0; }, { hidden: true });
  element = node("div", { class: "memws-log", role: "log", tabindex: "0", "aria-label": "Conversation",
    "aria-live": "off", onscroll: () => this.scrolled() }, this.inner);
  constructor(panel) { this.panel = panel; }
  clear(agent, last, title, text, ...kids) { // its events up to this seq are to be fetched; the rest is shown till then
    // Turns are by id; all events above `asked` were asked for; `page` has older ones that come, or else is null.
    Object.assign(this, { agent, turns: new Map(), asked: last, page: [] });
    this.inner.replaceChildren(div("empty", node("h3", {}, title), node("p", {}, text), ...kids));
  }
  get first() { return this.inner.firstChild?.turn?.seq ?? this.panel.last + 1; } // what is below it is fetched
  turnOf({ turn_id, seq, message_type }, place = null) {
    const id = turn_id ?? (OF_NO_TURN.includes(message_type) ? `event ${seq}` : null);
    if (!id || this.turns.has(id)) return this.turns.get(id);
    const turn = this.panel.outbox.get(id) ?? new Turn(this.panel, id);
    if (!this.turns.size) this.inner.replaceChildren(); // the welcome goes
    this.turns.set(id, turn);
    this.inner.insertBefore(turn.element, place);
    this.trim();
    return turn;
  }
  drop(id) {
    this.turns.get(id)?.element.remove();
    this.turns.delete(id);
  }
  trim() { // where the newest are looked at; what goes is fetched again when somebody scrolls there
    while (!this.page && this.element.scrollTop > -40 && this.inner.children.length > MOST) {
      this.drop(this.inner.firstChild.turn.id);
      this.asked = this.first - 1;
    }
  }
  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.element; // scrollTop is 0 at the bottom, negative above
    this.newest.hidden = scrollTop > -200;
    this.trim();
    const isNear = clientHeight > 0 && scrollHeight - clientHeight + scrollTop < 400;
    return isNear && this.asked && !this.page ? this.follow(true) : null;
  }
  follow(isOlder = this.page !== null) { // what comes; or older events first, as when they were lost on their way
    this.page = isOlder ? [] : null;
    if (isOlder) this.asked = Math.max(0, this.asked - REPLAYED);
    return this.panel.command("subscribe", { after: isOlder ? this.asked : this.panel.last });
  }
  takeOlder(event) {
    if (event.seq < this.first) this.page?.push(event);
    if (event.seq >= this.first - 1 && this.page?.length) this.showOlder(); // or else it is more than was asked for
  }
  take(event) {
    if (event.seq) this.showOlder(); // no more of them will come
    this.turnOf(event)?.take(event);
  }
  showOlder() { // once all of them are here, so that a loss leaves no halves; of a turn without its beginning, later
    if (!this.page) return;
    while (this.asked && this.page.length && this.page[0].type !== "agent_response_start") this.page.shift();
    const place = this.inner.querySelector(".memws-turn");
    for (const each of this.page) this.turnOf(each, place)?.take(each);
    this.page = null;
    attempt(this.element, () => this.scrolled() ?? this.follow());
  }
}

// ---- the mind: memory, context, search, frames ----------------------------------------------------------------------

class View {
  out = div("folds");
  constructor(panel, title, ...kids) {
    Object.assign(this, { panel, title });
    this.tab = button(title, "tab", () => panel.show(title));
    const content = div(title.toLowerCase(), ...kids, this.out);
    this.side = node("section", { class: "memws-side", "aria-label": title }, content);
  }
}

const card = (title, size, action, ...kids) =>
  node("section", { class: "memws-card" }, node("header", {}, node("h4", {}, title), size, action), ...kids);
const GLOW = [0, 0.1, 0.3].map((offset) => ({ offset, boxShadow: `0 0 0 3px #23a07a${offset < 0.2 ? "66" : "00"}` }));

class Memory extends View {
  blocks = new Map(); // by label
  constructor(panel) {
    const [cards, passages] = [div("cards"), span("mark")];
    const add = (passage) => panel.command("insert_passage", passage).then(() => keep.reset());
    const list = button("list", "quiet", () => panel.show("Search", { store: "archival" }));
    const keep = form("passage", add, { text: { rows: 1, placeholder: "A passage to keep" } }, button("add", "quiet"));
    super(panel, "Memory", cards, card("archive", passages, list, keep));
    Object.assign(this, { cards, passages });
  }
  shown(change) { this.blocks.get(change?.label)?.flash(); }
  take({ blocks, counts }) {
    if (blocks.map(({ label }) => label).join() !== [...this.blocks.keys()].join()) {
      this.blocks = new Map(blocks.map((block) => [block.label, new Block(this.panel, block)]));
      this.cards.replaceChildren(...Array.from(this.blocks.values(), ({ element }) => element));
    }
    for (const block of blocks) this.blocks.get(block.label).set(block);
    this.passages.textContent = counted(counts.passages, "passage");
    const told = `${counted(counts.messages, "message")} in recall memory, ${number(counts.in_context)} in view`;
    this.out.replaceChildren(div("mark", told));
  }
}

class Block { // of core memory, edited in place
  text = div("text");
  size = span("mark");
  gauge = node("i");
  editor = node("div", { oninput: () => this.measure(), onreset: () => this.measure() });
  constructor(panel, block) {
    Object.assign(this, { panel, block });
    const edit = button("edit", "quiet", () => this.edit());
    this.element = card(block.label, this.size, edit, div("gauge", this.gauge), this.text, this.editor);
    this.text.append(block.value);
  }
  set(block) {
    const [before, after] = [this.block, block].map(({ value }) => (value ? value.split("\n") : []));
    const isSame = this.block.version === block.version;
    this.block = block;
    this.measure();
    if (isSame) return;
    const shown = after.map((row) => (before.includes(row) ? " " : "+") + row);
    const gone = before.filter((row) => row && !after.includes(row)).map((row) => "-" + row);
    this.text.replaceChildren(...rowsOf([...shown, ...gone]));
    this.flash();
  }
  flash() {
    this.element.scrollIntoView({ block: "nearest" });
    this.element.animate(GLOW, 6000);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { this.text.textContent = this.block.value; }, 6000);
  }
  measure() {
    const { limit } = this.block;
    const { value } = this.editor.querySelector("textarea") ?? this.block;
    const size = [...value].length; // in characters, as the server counts them
    this.size.textContent = `${number(size)} / ${number(limit)}`;
    this.size.classList.toggle("memws-bad", size > limit);
    this.gauge.style.width = `${Math.min(100, (100 * size) / limit)}%`;
  }
  edit() {
    let { label, value: text, version } = this.block;
    const save = ({ [label]: value = "" }) =>
      this.panel.command("set_block", { label, version, value }).catch((error) => {
        if (error.code === "conflict") error.message = "It was changed while you wrote. Save again to replace this:";
        version = error.version ?? version; // the next save is on top of this one
        throw error;
      });
    ask(this.editor, "", { [label]: { rows: 6, value: text } }, "save", save);
  }
}

class Context extends View { // the prompt as it is now, or the request of a step
  constructor(panel) { super(panel, "Context"); }
  async shown({ section, ...of } = {}) {
    this.out.replaceChildren(...await (of.step ? this.request(of) : this.now(section)));
  }
  async now(section) {
    const { sections, more } = await this.panel.command("get_context");
    const left = (name) => (more && name === "messages" ? ", the oldest left out here" : "");
    const row = ({ name, tokens, text }) =>
      fold(`${titleOf(name)} · ${counted(tokens, "token")}${left(name)}`, text.trim(), name === section);
    return [div("mark", "what the model sees now"), ...sections.filter((each) => each.tokens).map(row)];
  }
  async request(of) {
    const { request, response, ...about } = await this.panel.command("get_request", of);
    const { messages, ...settings } = request;
    const told = ({ role, content }) => `${role} · ${oneLine(String(content || "calls a tool"))}`;
    return [div("mark", `what the model got in step ${of.step}`), fold("answer", pretty(response), true),
      fold("tokens and times", pretty(about)), ...messages.map((each) => fold(told(each), pretty(each))),
      fold("tools and settings", pretty(settings))];
  }
}

class Search extends View {
  constructor(panel) {
    const days = node("details", { class: "memws-days" }, node("summary", {}, "more"),
      ...inputs({ from: { type: "date" }, to: { type: "date" } }));
    const fields = { query: { type: "search", placeholder: "Words to look for" } };
    super(panel, "Search", form("find", (wanted) => this.find(wanted), fields, button("find", "main"), days));
    this.out.append(div("mark", "All that was ever said, and what the agent chose to keep."));
  }
  shown(wanted) { return wanted ? this.find(wanted) : this.side.querySelector("input").focus(); }
  async find({ query = "", ...wanted }, page = 1) {
    const { items, total, pages } = await this.panel.command("search_memory", { query, ...wanted, page });
    const words = query.split(/[^\p{L}\p{N}]+/u).filter((word) => word.length > 1);
    const more = page < pages && button("more results", "quiet", () => this.find({ query, ...wanted }, page + 1));
    const earlier = page > 1 ? this.out.querySelectorAll(".memws-found") : [];
    const rows = items.map((item) => this.row(item, words));
    this.out.replaceChildren(div("mark", `${number(total)} found`), ...earlier, ...rows, div("actions", more));
  }
  row({ id, store, role, time, text }, words) {
    const parts = words.length ? text.split(new RegExp(`(${words.join("|")})`, "giu")) : [text];
    const marked = parts.map((part, place) => (place % 2 ? node("mark", {}, part) : part));
    const moment = new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    const erase = store === "archival" && button("delete", "quiet", async ({ target }) => {
      await this.panel.command("delete_passage", { passage_id: id });
      target.closest(".memws-found").remove();
      this.panel.tell("The passage was deleted.", { undo: () => this.panel.command("insert_passage", { text }) });
    });
    return div("found", div("mark", `${moment} · ${role ?? "passage"}`, erase), div("text", ...marked));
  }
}

class Frames extends View { // of the connection, so the same one for all agents; as lines of JSON
  constructor(panel) {
    const hold = button("pause", "quiet", () => this.hold(hold));
    super(panel, "Frames", div("actions", hold, button("save", "quiet", () => this.save())));
  }
  take(direction, text) { // the newest 150 rows; deltas one after another are one row
    const time = new Date();
    const [, kind] = text.match(/"(?:message_type|command)":"(\w+)"/) ?? text.match(/"type":"(\w+)"/);
    const frame = text.length > 20_000 ? JSON.stringify(text.slice(0, 20_000)) : text; // or its beginning
    let row = this.out.firstChild;
    if (kind !== "delta" || row?.kind !== kind) {
      row = fold(span("frame", `${direction} ${time.toLocaleTimeString()} `, node("b"), ` ${text.slice(0, 120)}`), "");
      this.out.prepend(Object.assign(row, { kind, count: 0, hidden: Boolean(this.isHeld) }));
      this.out.children[150]?.remove();
    }
    row.count += 1;
    row.querySelector("b").textContent = row.count > 1 ? `${kind} × ${row.count}` : kind;
    row.lastChild.append(`{"time":"${time.toISOString()}","direction":"${direction}","frame":${frame}}\n`);
  }
  hold(button) {
    this.isHeld = !this.isHeld;
    button.textContent = this.isHeld ? "go on" : "pause";
    for (const row of this.out.children) row.hidden = false;
  }
  save() {
    const rows = Array.from(this.out.children, (row) => row.lastChild.textContent).reverse();
    const href = URL.createObjectURL(new Blob(rows));
    node("a", { href, download: "memws-frames.jsonl" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  }
}

// ---- the whole ------------------------------------------------------------------------------------------------------

const STARTERS = ["Hi, my name is Ada and I like green tea", "Remember that my sister lives in Lisbon",
  "What do you remember about me?"];
const KEYS = { "Enter": "sends", "Shift+Enter": "breaks the line", "↑": "in an empty field: your last message again",
  "Esc": "stops the running turn", "Alt+1 to Alt+4": "memory, context, search, frames", "Ctrl+Enter": "saves a block" };
const CONFIG = { name: { placeholder: "made up when empty" }, model: { placeholder: "the server's" },
  persona: { rows: "3", placeholder: "who it is; empty: Sam, curious and warm" },
  human: { rows: "3", placeholder: "what it knows about you from the start" },
  tools: { placeholder: "names of your functions, to use beside those of its memory" } };
const IN_FLIGHT = 4; // messages that may wait at the server; the others wait here

class Panel {
  asked = new Map(); // commands without their answer, by id
  outbox = new Map(); // turns without their receipt, by id; each with its `frame`, and whether it `isSent`
  running = null; // the turn that runs
  log = new Log(this);
  frames = new Frames(this);
  pick = node("select", { "aria-label": "Agent", onchange: () => this.open(this.pick.value),
    onfocus: () => this.list(), onpointerenter: () => this.list() });
  model = span("model");
  word = node("span");
  field = node("textarea", { placeholder: "Message", rows: "2", "aria-label": "Message" });
  send = button("Send", "main", () => this.submit(this.field.value));
  busy = node("select", { "aria-label": "While a turn runs", title: "a message waits for its end, or enters it" },
    new Option("queue"), new Option("steer"));
  stop = button("Stop", "stop", () => this.command("cancel"));
  notice = node("div", { class: "memws-notice", role: "alert", onclick: () => this.notice.replaceChildren() });
  dialog = div("dialog");
  bar = div("bar");
  used = button("", "used", () => this.show("Context"));
  aside = node("aside", { class: "memws-right", "aria-label": "The agent's mind" });
  constructor(parent, transport, { agent, compact = false, widget }) {
    Object.assign(this, { transport, wanted: agent, widget });
    const about = { class: `memws-panel${compact ? " memws-compact" : ""}`,
      "data-lm-suppress-shortcuts": "true", // JupyterLab's keys are not ours
      onkeydown: (event) => this.pressed(event),
      "onmemws-fail": ({ detail }) => this.fail(detail) };
    const works = {
      "new agent…": () => ask(this.dialog, "A new agent", CONFIG, "create", (config) => this.create(config)),
      "rename…": () => ask(this.dialog, "Another name", { new_name: { value: this.agent } }, "rename",
        (given) => this.command("rename_agent", given)),
      "delete": () => this.remove(),
      "another beside": () => this.beside(),
      "keys": () => ask(this.dialog, "Keys", KEYS) };
    const top = node("header", { class: "memws-top" }, node("b", {}, "memws"), this.pick,
      menu("Agents and keys", works), this.model, span("status", node("i"), this.word));
    const over = div("over", this.log.newest, this.notice);
    const composer = div("composer", this.field, this.busy, this.stop, this.send);
    const left = node("main", { class: "memws-left" }, this.log.element, this.log.heard, over, composer, this.dialog);
    this.root = Object.assign(node("div", about, top, div("columns", left, this.aside)), { panel: this });
    parent.append(this.root);
    this.changed("connecting");
    this.carrier = transport(this);
  }
  mind() { // anew for each agent
    this.views = [new Memory(this), new Context(this), new Search(this), this.frames];
    const tabs = node("nav", {}, ...this.views.map(({ tab }) => tab));
    this.aside.replaceChildren(this.bar, this.used, tabs, this.views[0].side); // the view that is shown comes last
  }
  beside(agent) { // a second conversation, with a connection of its own; where there is no room, below
    const other = agent ?? Array.from(this.pick.options).find((each) => !each.selected)?.value;
    const { root } = new Panel(this.root.parentElement, this.transport, { agent: other });
    root.firstChild.append(button("close", "quiet", () => root.panel.close()));
  }
  close() {
    this.root.remove();
    this.carrier.close();
  }

  // -- keys, and what is told and asked --
  pressed(event) {
    event.stopPropagation(); // JupyterLab would prevent line breaks typed inside a cell
    const { key, target: { form } } = event;
    const view = event.altKey && this.views?.[Number(event.code.slice(-1)) - 1];
    const typed = event.target === this.field && !event.isComposing && !event.shiftKey ? key : "";
    if (view) this.show(view.title);
    else if (form && key === "Escape") form.reset();
    else if (form && key === "Enter" && (event.ctrlKey || event.metaKey)) form.querySelector("button").click();
    else if (typed === "Enter") this.send.click();
    else if (typed === "Escape") this.stop.click();
    else if (typed === "ArrowUp" && !this.field.value) this.field.value = this.latest ?? "";
    else return;
    event.preventDefault();
  }
  show(title, wanted) {
    const isLeft = this.view?.side.contains(document.activeElement); // the focus would be lost there
    this.view = this.views.find((view) => view.title === title);
    for (const { tab } of this.views) tab.setAttribute("aria-current", String(tab === this.view.tab));
    this.aside.lastChild.replaceWith(this.view.side);
    if (isLeft) this.view.tab.focus();
    if (wanted) this.root.classList.remove("memws-compact");
    attempt(this.root, () => this.view.shown?.(wanted));
  }
  fail({ code, message }) {
    if (code === "unknown_agent") return this.agentChanged({ change: "deleted" }); // and not yet heard of
    return ["lost", "no_agent"].includes(code) ? null : this.tell(message, {}, "bad"); // what went is shown already
  }
  tell(text, works = {}, kind = "news") { // with what can be done about it, for a quarter of a minute
    clearTimeout(this.timer);
    this.notice.replaceChildren(div(kind, text, ...buttons(works, "link")));
    this.timer = setTimeout(() => this.notice.replaceChildren(), 15_000);
  }

  // -- the connection --
  changed(connection) {
    if (connection === this.connection) return;
    const lost = Object.assign(new Error("the connection was lost"), { code: "lost" });
    for (const { reject } of this.asked.values()) reject(lost);
    this.asked.clear();
    for (const turn of this.outbox.values()) turn.isSent = false; // under its id none runs twice
    this.state({ connection, isReady: false });
    if (connection === "connected") attempt(this.root, () => this.greet());
  }
  async greet() {
    this.limits = (await this.command("hello", { message_types: ["*"] })).limits;
    await this.open(this.agent ?? this.wanted);
    this.flush();
  }
  post(frame) {
    const text = JSON.stringify(frame);
    if (new Blob([text]).size > this.limits?.max_frame) throw new Error("this is too long; send it in parts");
    this.frames.take("→", text);
    this.carrier.send(text);
  }
  async command(command, more) {
    if (this.connection !== "connected") throw new Error("no connection to the server; try again when it is back");
    const id = newId();
    this.post({ type: "command", command, id, agent_name: this.agent, ...more });
    return new Promise((resolve, reject) => this.asked.set(id, { resolve, reject }));
  }
  hear(text) {
    this.frames.take("←", text);
    const frame = JSON.parse(text);
    const asked = this.asked.get(frame.id);
    this.asked.delete(frame.id);
    if (asked && frame.ok) asked.resolve(frame.result);
    else if (asked) asked.reject(Object.assign(new Error(frame.message), frame, frame.error));
    else if (frame.type !== "command_response") this.take(frame);
  }

  // -- agents --
  async agents(after) { // all of them
    const { agents } = await this.command("list_agents", { after });
    return agents.length ? [...agents, ...await this.agents(agents.at(-1).agent_name)] : [];
  }
  async list() { // in the picker too, as they are now: others make some
    const agents = await this.agents();
    const names = agents.map((each) => each.agent_name);
    const isNews = String(names) !== String(Array.from(this.pick.options, (each) => each.value));
    if (isNews) this.pick.replaceChildren(...names.map((name) => new Option(name)));
    this.pick.value = this.agent;
    return agents;
  }
  open(name) { // one after another, so that the last one that was chosen stays
    return this.opening = Promise.allSettled([this.opening]).then(() => this.load(name));
  }
  async load(name) { // or else the agent that was active last; of one that is open, what was missed comes
    const agents = await this.list();
    agents.sort((one, other) => (other.last_active ?? "").localeCompare(one.last_active ?? ""));
    this.pick.value = name || agents[0]?.agent_name;
    const agent = this.pick.value; // "" where there is no such agent
    if (!agent) return this.none(name || "sam");
    const isNew = agent !== this.log.agent;
    if (isNew && this.agent) await this.command("unsubscribe");
    const { model, last_seq, repaired, warnings } = await this.command("load_agent", { agent_name: agent });
    Object.assign(this, { agent, last: isNew ? last_seq : Math.min(this.last, last_seq) });
    if (isNew) this.mind();
    const { blocks, turn } = await this.refresh();
    this.state({ running: turn?.turn_id, isReady: true }); // from now on the events tell
    if (isNew) {
      this.welcome(blocks, last_seq);
      this.model.classList.toggle("memws-warn", model === "offline");
      this.model.textContent = model === "offline" ? "rule-based stand-in, no language model" : model;
      if (repaired.length + warnings.length) this.tell([...repaired, ...warnings].join(" · "));
      this.widget?.set("agent", agent); // and kept with the notebook
      this.widget?.save_changes();
      this.show(this.view?.title ?? "Memory");
      if (this.root.parentElement === document.body) this.field.focus(); // in a notebook the cell keeps it
    }
    return this.log.follow();
  }
  welcome(blocks, last_seq) {
    const persona = blocks.find(({ label }) => label === "persona")?.value ?? "";
    const sentences = persona.split(/(?<=[.!?])\s/).slice(0, 2).join(" ");
    const starters = STARTERS.map((text) => button(text, "starter", () => this.submit(text)));
    this.log.clear(this.agent, last_seq, this.agent, sentences.slice(0, 300), ...starters);
  }
  none(name) { // one button makes the first agent
    const start = button(`Start with ${name}`, "main", () => this.create({ name }));
    this.log.clear(null, 0, "No agent yet", "An agent remembers what you tell it, and here you see how.", start);
    this.model.textContent = "";
    this.state({ agent: null, running: null, isReady: true });
  }
  create({ tools, ...config }) { // and open it, which tells its warnings
    if (tools) config.tools = tools.split(/[\s,]+/);
    return this.command("create_agent", { config }).then(({ agent_name }) => this.open(agent_name));
  }
  async remove() {
    const { agent } = this;
    const undo = () => this.command("restore_agent", { agent_name: agent }).then(() => this.open(agent));
    await this.command("delete_agent");
    this.tell(`${agent} was deleted.`, { undo });
  }
  async refresh() { // memory and the bar, as they are now
    const agent = await this.command("get_agent");
    this.views[0].take(agent);
    this.drawBar(await this.command("get_context", { limit: 1 }));
    return agent;
  }
  soon() { // once for all that comes in a moment
    clearTimeout(this.refreshing);
    this.refreshing = setTimeout(() => attempt(this.root, () => this.isReady && this.agent && this.refresh()), 100);
  }
  drawBar({ sections, used, window: total }) {
    const parts = sections.filter((each) => each.tokens).map(({ name, tokens }) => {
      const title = `${titleOf(name)}: ${counted(tokens, "token")}`;
      const made = button("", name, () => this.show("Context", { section: name }), { title, "aria-label": title });
      made.style.width = `${(100 * tokens) / Math.max(total, used)}%`;
      return made;
    });
    this.bar.replaceChildren(...parts, node("i", { title: "75 %: here the agent is told to save what matters" }));
    const share = node("b", {}, `${Math.round((100 * used) / total)} %`);
    this.used.replaceChildren(share, ` of the context window · ${number(used)} of ${counted(total, "token")}`);
  }

  // -- events --
  take(event) {
    const kind = event.message_type ?? event.type;
    const [begins, ends] = [kind === "agent_response_start", /^agent_response_e/.test(kind)];
    if (this.outbox.delete(begins || ends ? event.turn_id : event.steered)) this.flush();
    if (event.steered) this.log.drop(event.steered); // it has no turn of its own
    if (kind === "server_error") return this.fail(event);
    if (kind === "progress") return this.tell(event.message);
    if (event.agent_name !== this.agent) return null;
    if (event.seq <= this.last) return this.log.takeOlder(event);
    this.last = event.seq ?? this.last;
    if (begins) this.running = event.turn_id;
    if (ends && event.turn_id === this.running) this.running = null;
    if (kind === "context") this.drawBar(event);
    if (kind === "memory_change" || ends) this.soon();
    if (["assistant_message", "approval_request"].includes(kind)) this.log.heard.textContent = event.message;
    if (kind === "agent_change") attempt(this.root, () => this.agentChanged(event));
    this.log.take(event);
    return this.state();
  }
  agentChanged({ change, new_name = this.agent }) {
    this.agent = change === "deleted" ? null : new_name;
    this.log.agent = change === "rewound" ? null : this.agent; // then its conversation is shown anew
    return this.open(this.agent);
  }

  // -- messages --
  submit(text) { // whether there was something to send
    const { max_text: most } = this.limits;
    if (!text.trim()) return false;
    if (this.send.disabled) throw new Error("no connection to the server; try again when it is back");
    if (text.length > most) throw new Error(`a message has at most ${number(most)} characters; send it in parts`);
    const turn = this.log.turnOf({ turn_id: newId() });
    turn.said(text.trim(), "sending");
    turn.frame = { type: "user_message", agent_name: this.agent, message: turn.text, turn_id: turn.id,
      when_busy: this.running ? this.busy.value : "queue" };
    this.outbox.set(turn.id, turn);
    this.latest = turn.text;
    this.notice.replaceChildren();
    this.field.value = "";
    this.log.newest.click();
    this.flush();
    return true;
  }
  flush() { // as many as may wait at the server, in their order; what steers goes at once
    const isNext = ({ isSent, frame }, place) => !isSent && (place < IN_FLIGHT || frame.when_busy === "steer");
    for (const turn of [...this.outbox.values()].filter(isNext)) {
      turn.isSent = true;
      this.post(turn.frame);
    }
  }
  state(news) {
    Object.assign(this, news);
    const isRunning = Boolean(this.isReady && this.running);
    const state = this.connection === "connected" && !this.isReady ? "connecting" : this.connection;
    const word = isRunning ? "connected · thinking" : state;
    this.root.dataset.state = isRunning ? "running" : state.split(":")[0];
    if (this.word.textContent !== word) this.word.textContent = word;
    this.stop.disabled = !isRunning;
    this.send.disabled = !this.isReady || !this.agent;
    this.root.toggleAttribute("data-agent", Boolean(this.agent));
  }
}

function render({ model: widget, el }) { // anywidget's way in
  new Panel(el, overComm(widget), { agent: widget.get("agent"), compact: widget.get("compact"), widget });
  return () => [...el.children].forEach(({ panel }) => panel.close());
}
export default { render };

if (document.body?.dataset.memws === "page") {
  const given = new URLSearchParams(location.hash.slice(1));
  if (given.has("token")) {
    sessionStorage.setItem("memws-token", given.get("token"));
    history.replaceState(null, "", location.pathname); // it stays in no address
  }
  new Panel(document.body, overSocket, { agent: given.get("agent") });
}
"""


# ---- the page: GET / of the server -----------------------------------------------------------------------------------


def page(host: str) -> tuple[str, dict[str, str]]:
    """The page and its headers, for a request with this Host, which was checked; nothing in it is anybody's."""
    text = '<!doctype html><html lang="en"><meta charset="utf-8"><title>memws</title>'
    text += '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    text += f'<style>{PANEL_STYLE}</style><body data-memws="page"><script type="module">{PANEL_SCRIPT}</script>'
    digests = (hashlib.sha256(part.encode()).digest() for part in (PANEL_SCRIPT, PANEL_STYLE))
    script, style = (base64.b64encode(digest).decode() for digest in digests)
    # This script and this style alone may run. Whether TLS stands in front of the server is not known here.
    policy = f"default-src 'none'; script-src 'sha256-{script}'; img-src data:; form-action 'none'; "
    policy += f"style-src 'sha256-{style}'; connect-src 'self' ws://{host} wss://{host}; "
    policy += "base-uri 'none'; frame-ancestors http://localhost:* http://127.0.0.1:*; "
    policy += "require-trusted-types-for 'script'; trusted-types 'none'"
    return text, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
    }


def page_address(url: str) -> str:
    """Where the page of the server at a WebSocket address is, for a browser of the same machine."""
    local = re.sub(r"//(0\.0\.0\.0|\[::\])(?=[:/]|$)", "//127.0.0.1", url)
    return f"http{local.removeprefix('ws').rstrip('/')}/"


# ---- the notebook: the script in a widget, whose comm is a pipe to a WebSocket; a copy for where no kernel runs ------

BATCH = 0.04  # seconds in which frames for a browser are gathered into one message
STATIC_MESSAGES, STATIC_TEXT = 200, 4_000  # chat messages in the static copy, the newest, and characters of their texts
COPY_INTERVAL, COPY_PATIENCE = 1.0, 3.0  # seconds in which turns make one static copy; that it waits for the server
MAX_PIPES = 8  # browser views of one panel; the one that was silent for longest gives way
_numbers = itertools.count(2**32, 2**32)  # where each connection begins to number its messages
_HTML = str.maketrans({sign: f"&#{ord(sign)};" for sign in "&<>\"'"})  # of text inside of HTML


def static_row(message: Frame) -> str:
    """A chat message as HTML: what was said, before it what was thought and called."""
    calls = [call["name"] for call in message["tool_calls"] if call["name"] != "send_message"]
    title = " · ".join(("thought", *calls)).translate(_HTML)
    said, text = (message[name][:STATIC_TEXT].translate(_HTML) for name in ("said", "text"))
    thought = "" if not calls and text in ("", said) else f"<details><summary>{title}</summary>{text}</details>"
    who = "you" if message["role"] == "user" else "agent"
    return thought + (f'<p style="white-space: pre-wrap"><b>{who}</b> {said}</p>' if said else "")


def make_widget(agent: str, compact: bool, hidden: str) -> Any:
    """The widget that shows the page's script and hides a class of its own; None where anywidget is missing."""
    try:
        import anywidget
        import traitlets
    except ImportError:
        return None
    fields = {
        "_esm": PANEL_SCRIPT,
        "_css": f"{PANEL_STYLE}\n.{hidden} {{ display: none; }}",
        "agent": traitlets.Unicode(agent).tag(sync=True),
        "compact": traitlets.Bool(compact).tag(sync=True),
    }
    # The front end keeps one style for a class's name, so each panel's class has its own.
    return type(f"Panel_{secrets.token_hex(6)}", (anywidget.AnyWidget,), fields)()


class Pipe:
    """One browser view of a panel: its frames go to a WebSocket of their own, and what comes goes back.

    A comm loses messages. So each of the browser's holds all of its frames that are not acknowledged, and here doubles
    are dropped. Ours are numbered, higher with each connection, and the browser makes good for a gap.
    """

    def __init__(self, session: str, client: Client, post: Callable[[Frame], None], ended: Callable[[], None]) -> None:
        self._session, self._client, self._post, self._ended = session, client, post, ended
        self._websockets: list[Connection] = []  # the newest alone
        self._state, self._taken, self._sent = "connecting", 0, 0  # the last frame taken up, the last message sent
        self._frames: list[str] = []
        self.task = asyncio.create_task(self._run())

    def take(self, content: Frame) -> None:
        """Take up a message of the browser, {first, frames}: its frames from number `first` on, unacknowledged."""
        first, frames = content["first"], content["frames"]
        for frame in frames[max(0, self._taken + 1 - first) :]:
            broadcast(self._websockets, frame)  # not to one that is closed
        self._taken = max(self._taken, first + len(frames) - 1)
        self._tell()

    async def _run(self) -> None:
        """Keep a connection, as long as the server does not refuse it."""
        delay = RECONNECT_DELAY
        while True:
            try:
                await self._carry(await self._client._dial())
                delay = RECONNECT_DELAY
                self._tell("offline")
            except ConnectFailed as failure:
                self._tell(f"offline: {failure}")
                if failure.details["status"] in (401, 403):
                    return
            await asyncio.sleep(delay)
            delay = min(2 * delay, RECONNECT_DELAY_MAX)

    async def _carry(self, websocket: Connection) -> None:
        self._websockets, self._sent = [websocket], next(_numbers)
        self._tell("connected")
        with contextlib.suppress(ConnectionClosed):
            async with websocket:
                async for text in websocket:
                    self._gather(str(text))

    def _gather(self, text: str) -> None:
        if not self._frames:
            asyncio.get_running_loop().call_later(BATCH, self._flush)
        self._frames.append(text)
        if '"type":"agent_response_e' in text:
            self._ended()

    def _flush(self) -> None:
        frames, self._frames = self._frames, []
        self._sent += 1
        self._tell(frames=frames)

    def _tell(self, state: str | None = None, **more: Any) -> None:
        self._state = state or self._state
        self._post({"session": self._session, "ack": self._taken, "state": self._state, "sent": self._sent, **more})


class Panel:
    """An agent in a notebook: talk to it, see what it thinks, remembers and sends to the model.

    It is a client of the server at `url` and works with any; show it as the last line of a cell. agent: who to talk to
    (None: the one that was active last). compact: the conversation alone, until a link opens more. static: keep a plain
    copy of it in the notebook, to read without a kernel. A panel replaces an earlier one of the same `name` (by default
    the agent's). It shows the server's page: through anywidget, whose widget is `ui`, wherever the notebook works;
    without it (`ui` is None) in a frame, where the browser reaches the server. Raises UsageError for a bad token.
    """

    def __init__(
        self,
        url: str = f"ws://localhost:{DEFAULT_PORT}",
        agent: str | None = None,
        compact: bool = False,
        static: bool = True,
        token: str | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or agent or "main"
        self._client = Client(url, token)
        self._agent, self._static = agent, static
        self._pipes: dict[str, Pipe] = {}
        self._said: list[asyncio.Task[Any]] = []
        self._copies: list[Any] = []
        self._copying: asyncio.Task[None] | None = None
        self._mark = f"memws-static-{secrets.token_hex(6)}"
        self.ui = make_widget(agent or "", compact, self._mark)
        # The panels of this process: they outlive a re-run cell and a reloaded module.
        self._alive: dict[tuple[str, str], Any] = process_wide("panels", {})
        former = self._alive.pop((__name__, self.name), None)
        if former is not None:
            former.close()
        self._alive[__name__, self.name] = self
        self._lock = asyncio.Lock()
        self._thread = LoopThread(f"memws-panel-{self.name}")
        if self.ui is not None:
            self.ui.on_msg(lambda widget, content, buffers: self._call_soon(self._hear, content))
            # ipykernel 7.4 would send what comes where our thread's messages seem to come from: to the busy cell.
            self.ui.comm._reply_subshell_for = None
            self.ui.observe(lambda change: setattr(self, "_agent", change["new"]), "agent")

    def send(self, text: str) -> None:
        """Say something to the agent, as if it had been typed; returns at once. The log tells what is not answered."""
        self._call_soon(lambda: self._said.append(asyncio.create_task(self._say(text))))

    def wait(self, seconds: float = 10.0) -> None:
        """Wait until all that was said so far is answered and in the static copy, as at the end of a notebook that runs
        without a browser. Raises TimeoutError, and what hindered a message of `send` from being answered."""
        self._thread.call(self._settle, seconds)

    def close(self) -> None:
        """Close connections, thread and widget; the static copy stays."""
        if self._alive.get((__name__, self.name)) is self:
            del self._alive[__name__, self.name]
        self._thread.stop()
        for widget in (self.ui, self.ui.layout) if self.ui is not None else ():
            widget.close()

    def static_html(self) -> str:
        """The end of the conversation as HTML that needs no kernel, no style sheet and no script."""
        return self._thread.call(self._copy)

    def _ipython_display_(self, **options: Any) -> None:
        """Show the widget and, hidden by it, the static copy; called by the notebook."""
        import IPython.display as notebook

        if self.ui is None:
            address = page_address(self._client.url).translate(_HTML)
            style = "width: 100%; height: 600px; border: 1px solid #8886; border-radius: 12px"
            told = f'<a href="{address}">{address}</a>; <code>pip install anywidget</code> shows the panel itself.'
            frame = f'<p>This is {told}</p><iframe src="{address}" title="memws" style="{style}"></iframe>'
            notebook.display({"text/html": frame}, raw=True)
            return
        view = {"version_major": 2, "version_minor": 0, "model_id": self.ui.model_id}
        plain = "memws panel (needs a running kernel)"
        notebook.display({"application/vnd.jupyter.widget-view+json": view, "text/plain": plain}, raw=True)
        if self._static:
            copy = {"text/html": self.static_html()}
            self._copies.append(notebook.display(copy, raw=True, display_id=secrets.token_hex(8)))

    # -- on the panel's loop --

    def _call_soon(self, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the panel was closed
            self._thread.loop.call_soon_threadsafe(function, *arguments)

    def _hear(self, content: Frame) -> None:
        """A browser view says something."""
        session = content["session"]
        pipe = self._pipes.pop(session, None) or Pipe(session, self._client, self.ui.send, self._copy_soon)
        self._pipes[session] = pipe  # the last heard of comes last
        pipe.take(content)
        if content.get("over") or len(self._pipes) > MAX_PIPES:
            gone = session if content.get("over") else next(iter(self._pipes))
            self._pipes.pop(gone).task.cancel()

    async def _connected(self) -> str:
        """The agent that is shown, once there is a connection of our own. Raises ConnectFailed, RemoteError."""
        async with self._lock:
            await self._client.connect()
        if self._agent is None:
            agents: list[Frame] = [{"agent_name": "", "last_active": ""}]  # none, before the first
            while page := (await self._ask("list_agents", after=agents[-1]["agent_name"]))["agents"]:
                agents += page
            return str(max(agents, key=lambda each: each["last_active"] or "")["agent_name"])
        return self._agent

    async def _ask(self, command: str, **arguments: Any) -> Frame:
        """The answer to a command, after a reconnect where the connection breaks."""
        while True:
            with contextlib.suppress(ConnectionLost):
                return await self._client.command(command, **arguments)
            await asyncio.sleep(RECONNECT_DELAY)

    async def _say(self, text: str) -> str:
        try:
            return await self._client.ask(text, await self._connected())
        except MemwsError as error:  # nobody may wait for it
            logger.warning("panel %s: a message was not answered: %s", self.name, error)
            raise

    async def _settle(self, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            said, self._said = self._said, []
            await asyncio.gather(*said)
            if name := await self._connected():
                events = self._client.subscribe(name)  # before the look, so that no end is missed
                while (await self._ask("get_agent", agent_name=name))["turn"]:
                    while (await anext(events))["type"] not in TERMINAL_TYPES:
                        pass
                await self._ask("unsubscribe", agent_name=name)
            await self._update_copies()

    async def _copy(self) -> str:
        """The static copy, which says so where there is nothing to show."""
        try:
            async with asyncio.timeout(COPY_PATIENCE):
                name = await self._connected()
                found = await self._ask("get_messages", agent_name=name, limit=STATIC_MESSAGES)
            rows = [static_row(message) for message in found["messages"] if message["role"] in ("user", "assistant")]
            said = "".join(rows) or "<p>Nothing was said yet.</p>"
            text = f"<p><b>memws · {name.translate(_HTML)}</b>, as it was saved</p>{said}"
        except (MemwsError, TimeoutError) as error:
            text = f"<p>memws: {(str(error) or 'the server does not answer').translate(_HTML)}</p>"
        return f'<div class="memws-static {self._mark}">{text}</div>'

    def _copy_soon(self) -> None:
        """Once for all turns of a second."""
        if self._copies and (self._copying is None or self._copying.done()):
            self._copying = asyncio.create_task(self._update_copies(COPY_INTERVAL))

    async def _update_copies(self, delay: float = 0) -> None:
        await asyncio.sleep(delay)
        copy = {"text/html": await self._copy()}
        for handle in self._copies:
            handle.update(copy, raw=True)


# ======================================================================================================================
# 11. Server: agents by name, one session per connection, the gate
# ======================================================================================================================


def option(default: T, meaning: str, kind: type = str, word: str = "") -> T:
    """A field of Options: its default, what its flag's help says, what its flag's text is made into and is called."""
    return field(default=default, metadata={"help": meaning, "kind": kind, "word": word})


@dataclass(eq=False, repr=False)
class Options:
    """What a server can be told; the command line's flags are these fields. Raises UsageError, Refused (bad_config)."""

    host: str = option(DEFAULT_HOST, "address to listen on; anything but loopback needs a token")
    port: Annotated[int, 0, 65_535] = option(DEFAULT_PORT, "port to listen on; 0 picks a free one", int)
    db: str = option(DEFAULT_DB, "SQLite file with the agents, or postgresql:// address; :memory: keeps nothing")
    model: Annotated[str, 1, MAX_MODEL_NAME] | None = option(None, "model of agents that name none; offline: rules")
    base_url: Annotated[str, 1, 2_000] | None = option(None, "OpenAI-compatible endpoint: http://localhost:11434/v1")
    api_key: str | None = option(None, "the endpoint's key: only from Python, or as OPENAI_API_KEY")
    embedding_model: Annotated[str, 1, MAX_MODEL_NAME] | None = option(None, "model for search by vectors; needs numpy")
    context_window: Annotated[int, 1, 100_000_000] | None = option(None, "tokens of the model's context window", int)
    record: Annotated[str, 1, 4_096] | None = option(None, "file that keeps what models are asked and answer, a tape")
    replay: Annotated[str, 1, 4_096] | None = option(None, "tape that answers for the models, without key and network")
    max_steps: Annotated[int, 1, 1_000] = option(MAX_STEPS, "steps of one turn at most", int)
    timezone: str | None = option(None, "timezone of new agents' days, like Europe/Berlin (default the machine's)")
    token: str | None = option(None, "secret that clients have to show")
    allow_origin: Sequence[str] = option((), "web origin whose pages may connect: https://lab.example (repeatable)")
    allow_host: Sequence[str] = option((), "further host name under which clients reach the server (repeatable)")
    max_connections: Annotated[int, 1, 1_000_000] = option(4_096, "connections at once", int)
    sync: Literal["full", "normal"] = option("full", "of SQLite; full: survives a power cut; normal: a killed process")
    advertise: Annotated[str, 1, 2_000] | None = option(None, "URL by which other servers of the database reach this")
    idle_timeout: Annotated[float, 0.001, 86_400] = option(IDLE_TIMEOUT, "seconds a model's answer may pause", float)

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(Options, include_extras=True).items():
            value = getattr(self, name)
            if isinstance(value, str) and hint == Sequence[str]:
                value = value.split(",")
            elif isinstance(value, os.PathLike):
                value = os.fspath(value)
            try:
                setattr(self, name, check(value, schema_of(hint)))
            except ValueError as error:
                raise UsageError(f"{name}: {error}, but got {quote(value)}") from None
        if self.record and self.replay:
            raise UsageError("a tape is recorded or replayed: leave out --record or --replay")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]{1,512}", self.token):
            raise UsageError("token: expected 1 to 512 printable characters without spaces")
        if self.advertise is not None and not re.match(r"wss?://[^/\s]", self.advertise):
            raise UsageError(f"advertise: expected an address like ws://host:8282, but got {quote(self.advertise)}")
        address = _address(self.host)
        is_loopback = self.host.lower() == "localhost" or (address is not None and address.is_loopback)
        if not is_loopback and self.token is None:
            raise UsageError(f"listening on {self.host!r} lets others in: set --token SECRET, or use --host localhost")
        is_any = address is not None and address.is_unspecified
        self.own_name = socket.gethostname() if is_any else url_host(self.host)  # by which other machines know it
        find_zone(self.timezone)
        if self.context_window is not None:  # at least an agent without any words of its own has to fit into it
            check_window(vars(Config()), self.context_window, MEMORY_TOOLS, core_memory("", ""))


# ---- the gate --------------------------------------------------------------------------------------------------------

_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[^\s:/?#@*\[\]\\]{1,255})(?::(\d{1,5}))?")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    return None


def url_host(host: str) -> str:
    """A host as a URL has it: IPv6 addresses in brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def _host_of(value: str) -> str:
    """The host of `host` or `host:port`, in lower case; "" for what is neither."""
    match = _HOST.fullmatch(value.lower())
    return match[1] if match and int(match[2] or 0) <= 65_535 else ""


class Gate:
    """Who may open a connection: decided before the upgrade, by exact comparison, without a parser that can raise.

    A web page in some browser can reach a loopback port: Origin tells which page (cross-site WebSocket hijacking), Host
    which name it believes to talk to (DNS rebinding).
    """

    def __init__(self, options: Options) -> None:
        self._token = None if options.token is None else options.token.encode()
        self._origins = {origin.strip().rstrip("/").lower() for origin in options.allow_origin}
        names = {name: name.partition("://")[2] for name in self._origins - {"null"}}
        names |= {name: url_host(name.strip()) for name in options.allow_host}
        for name, host in names.items():
            if not _host_of(host):
                raise UsageError(f"expected --allow-host HOST or --allow-origin https://HOST, but got {quote(name)}")
        own = urllib.parse.urlsplit(options.advertise or f"ws://{options.own_name}").netloc
        hosts = ("localhost", "127.0.0.1", "[::1]", url_host(options.host), own, *names.values())
        self._hosts = {*map(_host_of, hosts)} - {""}

    def problem(self, request: http11.Request, *, public: bool) -> tuple[int, str] | None:
        """(HTTP status, reason) for a request that may not pass; what is public needs no token and no known Origin."""
        hosts, origins = request.headers.get_all("Host"), request.headers.get_all("Origin")
        if len(hosts) != 1:
            return 400, "expected exactly one Host header"
        if not self._may(hosts[0]):
            return 403, "this Host is not served here; add it with --allow-host"
        if request.method != "GET":
            return 405, "only GET is served here"
        if public:
            return None
        if len(origins) > 1 or not all(map(self._may_origin, origins)):
            return 403, "pages of this Origin may not connect; allow them with --allow-origin"
        token = self._token
        if token is not None and not any(secrets.compare_digest(secret, token) for secret in _secrets(request)):
            ways = "--token or MEMWS_TOKEN, Authorization: Bearer, subprotocol memws, or ?token="
            return 401, f"a token is needed: {ways}"
        return None

    def _may(self, value: str) -> bool:
        host = _host_of(value)
        return host in self._hosts or (self._token is not None and _address(host) is not None)

    def _may_origin(self, value: str) -> bool:
        scheme, _, host = value.lower().partition("://")
        return value.lower() in self._origins or (scheme in ("http", "https") and self._may(host))


def _secrets(request: http11.Request) -> list[bytes]:
    """All that a request shows as the token."""
    headers = request.headers
    texts = [value[7:].strip() for value in headers.get_all("Authorization") if value[:7].lower() == "bearer "]
    protocols = [name.strip() for name in ",".join(headers.get_all("Sec-WebSocket-Protocol")).split(",")]
    texts += protocols[1:] if protocols[0] == "memws" else []
    pairs = (pair.partition("=") for pair in request.path.partition("?")[2].split("&"))
    texts += (urllib.parse.unquote(value) for name, _, value in pairs if name == "token")
    return [text.encode("utf-8", "replace") for text in texts]


# ---- an agent in use -------------------------------------------------------------------------------------------------

BY_SERVER = "?server"  # ends the path of a connection that passes on what other connections ask for
# What is answered also while writes fail, and asked again where a server that it was passed on to is lost.
READING = "get_agent", "get_messages", "search_memory", "get_context", "get_request", "cancel"


def name_like(name: str) -> str:
    """A new name that tells where the agent comes from."""
    return f"{name[: MAX_NAME - 9]}_{secrets.token_hex(4)}"


class Elsewhere(Refused):
    """Another server runs the agent: `forward` gives what that one answers to a command; None: ask again."""

    def __init__(self, name: str, forward: Callable[[JSON], Coroutine[Any, Any, JSON | None]]) -> None:
        super().__init__("busy", f"another server runs agent {name!r}; talk to it through a client")
        self.forward = forward


def cancelled() -> Refused:
    """What a message gets that waits, or comes, when all is ended."""
    return Refused("cancelled", "cancelled before it ran; send the message again later")


class LiveAgent:
    """One agent in use: its turns one after another, its events for any number of readers, its timed heartbeats.

    A turn waits, in `waiting` or in `steered` of the one that it is to enter; then it is `current`; over it is with a
    result of its `done`, or, where its start or end was not stored, with an error. The newest events are in a ring, all
    stored ones in the store, too: who falls behind misses only what is live.

    Of several servers on a database one runs it, which has the lease; the others follow that one: a client of it feeds
    their readers, and is given the messages, whose turn_id keeps them from running twice. Once that server is gone, the
    one that gets the lease goes on with them.
    """

    def __init__(self, agents: Agents, record: AgentRecord) -> None:
        self.agents, self.name, self.id = agents, record.name, record.id
        self.agent: Agent  # as it is opened here
        self.here = False  # whether this server runs it
        self.lease: str | None = None  # by what lease; None: the database has no other server
        self.waiting: collections.deque[Turn] = collections.deque()
        self.current: Turn | None = None  # what runs: a turn, or a compaction that a client asked for
        self.end: Refused | None = None  # why there will be no more turns and events
        self.last_seq, self.count = record.last_seq, 0  # count: of the events ever published here
        self.news = asyncio.Event()  # set at the next event, when another takes its place
        self.ring: collections.deque[StoredEvent] = collections.deque(maxlen=RING)
        self.readers = weakref.WeakSet[Any]()  # what connections get of it
        self._timer: asyncio.TimerHandle | None = None
        self._beats = 0  # timed heartbeats since a user spoke
        self._owner: str | None = None  # the lease under which some server runs it, "": none does
        self._client: Client | None = None  # of that server, where it is followed
        self._sent = set[Turn]()  # what that one has been given of what waits
        self._problem: MemwsError | None = None  # why it is neither run nor followed
        self._work: asyncio.Task[None] | None = None  # runs or follows it
        self._settling = asyncio.Lock()  # of one such task at a time

    def take_name(self, name: str | None) -> None:
        """Be known under the name from now on; None: under none."""
        if self.agents.live.get(self.name) is self:
            del self.agents.live[self.name]
        if name is not None:
            self.agents.live[name], self.name = self, name

    async def run(self, record: AgentRecord) -> None:
        """Run it on this server from now on, with what waits. Raises StoreFailed."""
        self.ring.clear()  # it misses what other servers stored: readers find that in the store
        self.count, self.last_seq = self.count + 1, record.last_seq
        await self._open(record)
        for item in list(self.waiting):
            if await self.agents.store.read(find_turn, self.id, item.turn_id):
                self.dismiss(item)  # it has run elsewhere: its readers get its end as an event
        self.here, self._problem = True, None
        self.wake()
        self.go_on()

    async def _open(self, record: AgentRecord) -> None:
        """Load the agent, and repair what a crash left. Raises StoreFailed."""
        agents, memory = self.agents, Memory(self.agents.store, record, self.publish, self.hears, self.lease)
        options = (agents.options.max_steps, agents.api_keys.get(record.id), agents.timezone)
        self.agent = await Agent(memory, agents.models, agents.tools, *options).open()
        if self.agent.repairs:
            logger.warning("agent %s: %s", record.name, "; ".join(self.agent.repairs))

    async def _mend(self) -> None:
        """Open it anew after a failed transaction; once, whoever asks for it."""
        async with self.agent.memory.lock:
            if self.agent.memory.stale and self.here:
                await self._open(await self.agents.store.read(find_agent, self.name))

    async def ready(self, mend: bool = True) -> None:
        """Wait until some server runs it; here mend it, unless something runs. Raises StoreFailed, Refused."""
        if not self.here:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(10.0):  # until some server runs the agent
                    while not (self.here or self._client or self.end or isinstance(self._problem, StoreFailed)):
                        await self.news.wait()
        if mend and self.here and not (self.current or self.end):
            await self._mend()
        if self.end:
            raise self.end
        if not (self.here or self._client):
            reason = f" ({self._problem})" if self._problem else ""
            raise StoreFailed(f"no server runs agent {self.name!r} now{reason}; send it again later")

    async def fresh(self, mend: bool = True) -> Agent:
        """The agent, which this server runs. Raises StoreFailed, Refused, Elsewhere."""
        await self.ready(mend)
        if self._client:
            raise Elsewhere(self.name, functools.partial(self._forward, self._client))
        return self.agent

    # -- its events --

    def publish(self, *events: StoredEvent) -> None:
        for event in events:
            self.last_seq = event.seq or self.last_seq
            self.ring.append(event._replace(text=with_fields(event.text, agent_name=self.name)))
            self.count += 1
        self.wake()

    def wake(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def hears(self, kind: str) -> bool:  # whether anybody wants that live event
        return any(reader.session.types is None or kind in reader.session.types for reader in self.readers)

    async def events(self, after: int, until: int, turn_id: str | None = None) -> AsyncGenerator[StoredEvent, None]:
        """Stored events above a seq up to another, in order; those of one turn where one is named."""
        while after < until:
            page = await self.agents.store.read(read_events, self.id, after, RING, turn_id)
            for event in page:
                if event.seq <= until:
                    yield event._replace(text=with_fields(event.text, agent_name=self.name))
            after = page[-1].seq if page else until

    # -- its turns --

    @property
    def queued(self) -> list[Turn]:
        """What waits for its turn, or for the next step of the one that runs."""
        return [*(self.current.steered if self.current else ()), *self.waiting]

    def find(self, turn_id: str) -> Turn | None:
        return next((item for item in (self.current, *self.queued) if item and item.turn_id == turn_id), None)

    async def find_anywhere(self, turn_id: str) -> Turn | None:
        """The turn of that id as it waits or runs, or else as it is stored, which is `over`. Raises StoreFailed."""
        item = self.find(turn_id)
        stored = {} if item else await self.agents.store.read(find_turn, self.id, turn_id)
        item = item or self.find(turn_id)  # it may have been sent meanwhile
        if item or not stored:
            return item
        event = decode_json(stored.get("user_message", "{}"))
        return Turn(turn_id, event.get("message"), speaker=event.get("from"), over=True)

    def enqueue(self, item: Turn) -> None:
        """Let a turn wait for its time, which may be now. Raises Refused where it may not."""
        self._check(item)
        if item.message is not None:
            self._beats = 0
        if item.when_busy == "interrupt" and self.current is not None:
            self.current.stop("superseded")
        if item.when_busy == "steer" and self.current and self.current.turn_id and not self.current.over:
            self.current.steered.append(item)
            return
        self.waiting.insert(0 if item.when_busy == "interrupt" else len(self.waiting), item)
        self.go_on()

    def _check(self, item: Turn) -> None:
        if self.end or self.agents.stopping:
            raise self.end or cancelled()
        if (size := len(item.message or "")) > MAX_TEXT:
            raise Refused("text_too_long", f"a message has at most {MAX_TEXT:,} characters, but got {size:,}")
        if self.here and not self.current:
            return
        if item.when_busy == "reject" and self.here:
            raise Refused("busy", f"agent {self.name!r} is in a turn; wait for its end, or let the message queue")
        own = sum(other.sender is item.sender for live in self.agents.live.values() for other in live.counted)
        if own >= MAX_WAITING_SESSION and item.sender is not None:
            raise Refused("queue_full", f"{own} messages of this connection wait already; wait for their turns")
        if (count := len(self.counted)) >= MAX_WAITING_AGENT:
            raise Refused("queue_full", f"{count} messages wait for agent {self.name!r}; try again later")

    @property
    def counted(self) -> list[Turn]:
        """What waits for a turn to end: elsewhere the first of them runs, or will at once."""
        return self.queued[0 if self.here else 1 :]

    def go_on(self) -> None:
        """Begin what waits, or else set the timer of the next heartbeat; nothing of it while something runs."""
        if self._timer is not None:
            self._timer.cancel()
        if self._client:
            self._pass_on(self._client)
        if self.current or self.end or self.agents.stopping or not self.here:
            return
        record = self.agent.record
        interval = record.config["heartbeat_interval"]
        if self.waiting:
            self.current = self.waiting.popleft()
            self.agents.spawn(self._take_turn(self.current))
        elif interval and self._beats < IDLE_HEARTBEATS:
            pause = float(record.state.get("paused_until", 0)) - time.time()
            self._timer = asyncio.get_running_loop().call_later(max(interval, pause), self._beat)

    async def _take_turn(self, item: Turn) -> None:
        """One turn; where its start or its end cannot be stored, whoever waits for it gets a refusal."""
        try:
            await self._mend()
            await self.agent.turn(item)
        except LeaseLost:  # another server ends what was begun, and gets what was not
            self.here = False
            if item.step == 0:
                item.over, item.stop_reason = False, None
                self.waiting.appendleft(item)
        except (MemwsError, asyncio.CancelledError) as error:
            with contextlib.suppress(MemwsError):
                await self._mend()  # the end may be on disk by now, as that of an interrupted turn
            if item.step == 0 or self.agent.memory.stale:
                self.dismiss(item, error if isinstance(error, MemwsError) else cancelled())
        finally:
            self._leave(item)

    def _leave(self, item: Turn) -> None:
        if item not in self.waiting:
            self.dismiss(item)
        self.waiting.extendleft(reversed(item.steered))  # it ended before it took them in
        self.current = None
        self.wake()
        self.go_on()

    def dismiss(self, item: Turn, error: MemwsError | None = None) -> None:
        """Let nobody wait for a turn any longer: it is over, or will not be for this reason."""
        for line in (self.waiting, self.current.steered if self.current else []):
            if item in line:
                line.remove(item)
        if error:
            item.done.set_exception(error)
            item.done.exception()  # nobody may wait for it
        elif not item.done.done():
            item.done.set_result(None)

    async def stop_turns(self, reason: str, error: Refused | None = None) -> None:
        """Stop what runs, and with an error refuse what waits, until nothing runs."""
        while self.current:
            for item in self.queued if error else ():
                self.dismiss(item, error)
            self.current.stop(reason)
            await self.news.wait()

    @contextlib.asynccontextmanager
    async def occupied(self, what: str, force: Refused | None = None) -> AsyncGenerator[Turn, None]:
        """Around what goes on beside no turn, and is stopped as one. `force` ends all first, what waits with that."""
        if force:
            await self.stop_turns("cancelled", force)
        if self.current or self.end:
            raise self.end or Refused("busy", f"agent {self.name!r} is in a turn; wait for its end, or cancel it")
        item = self.current = Turn("", None)  # without an id: no turn
        try:
            yield item
        except Stopped:
            raise Refused("cancelled", f"the {what} was {item.stop_reason}") from None
        finally:
            self._leave(item)

    def _beat(self) -> None:
        with contextlib.suppress(Refused):  # it is busy
            self.enqueue(Turn(new_turn_id(), None, HEARTBEAT_TIMER, when_busy="reject"))
            self._beats += 1

    def close(self, error: Refused) -> None:
        """Refuse what waits and comes, let go of the timer, and of readers once they have read all."""
        self.end = error
        for item in self.queued:
            self.dismiss(item, error)
        self.wake()
        self.go_on()

    # -- run by one of several servers --

    def take_owner(self, owner: str, leases: Leases) -> None:
        """Be run by the server that has that lease, or has had it; "": by none."""
        if owner != self._owner:
            self._owner, self.lease = owner, owner if owner == leases.lease else ""
            self.here, self._problem = False, None
            if self._work:
                self._work.cancel()
            self._work = self.agents.spawn(self._settle(owner.rpartition("#")[0], leases))

    async def _settle(self, address: str, leases: Leases) -> None:
        """Run the agent where this server has the lease, else follow the server that has, until there is another."""
        async with self._settling:
            self.go_on()
            await self.stop_turns("interrupted")
            while True:
                try:
                    await self.look_up()
                    if self.lease:
                        return await self.run(await self.agents.store.read(find_agent, self.name))
                    if address not in ("", leases.address):
                        await self._follow(address)
                except Refused as error:
                    self.take_name(None)
                    return self.close(error)
                except MemwsError as error:
                    logger.info("agent %s: %s", self.name, error)
                    self._problem = error
                    self.wake()
                await asyncio.sleep(LEASE_PULSE)

    async def look_up(self) -> None:
        """Take id and name as the database has them. Raises StoreFailed, Refused."""
        self.id, name, _ = await self.agents.store.read(find_name, self.id, self.name)
        self.take_name(name)

    async def _follow(self, address: str) -> None:
        """Follow a server until the agent is deleted. Raises ConnectFailed, ConnectionLost, RemoteError."""
        async with Client(f"{address.rstrip('/')}/{BY_SERVER}", self.agents.options.token, reconnect=False) as client:
            try:
                await client.hello(["*"])
                events = client.subscribe(self.name, after=self.last_seq)
                self._client, self._problem, self._sent = client, None, set[Turn]()
                self.wake()
                self.go_on()
                async for event in events:
                    if event.get("change") == "rewound":
                        await self.look_up()  # first: whoever hears of it may ask at once
                    self._take_in(event)
                    if event.get("change") == "deleted":
                        await client.hello()  # what was asked for before has its answer
                        return
            finally:
                self._client = None
                if client._websocket:
                    client._websocket.transport.abort()  # a paused server would let the goodbye wait

    def _take_in(self, frame: Frame) -> None:
        """Tell an event of the other server here."""
        event = {name: value for name, value in frame.items() if name != "agent_name"}
        if frame["type"] != "agent_response" or "steered" in frame:  # else it is the id of a passage, not of a message
            event.pop("id", None)
        self.publish(StoredEvent(frame.get("seq", 0), kind_of(frame), own_turn_id(frame), encode_json(event)))
        if frame.get("change") == "renamed":
            self.take_name(frame["new_name"])

    def _pass_on(self, client: Client) -> None:
        """Give what waits to the server that runs the agent."""
        for item in [each for each in self.waiting if each not in self._sent]:
            self._sent.add(item)
            with contextlib.suppress(ConnectionLost):  # the next one gets it
                about = item.message or "", self.name, item.turn_id, item.when_busy, item.speaker or ""
                self.agents.spawn(self._wait_for_end(item, client.send(*about)))

    async def _wait_for_end(self, item: Turn, turn: Stream) -> None:
        """Wait for the end of a turn, or for why it will not be."""
        with contextlib.suppress(ConnectionLost):  # it is sent again
            async for event in turn:
                if event["type"] == "agent_response_error" and "seq" not in event and item in self.waiting:
                    self.dismiss(item, RemoteError(event["message"], event["code"]))
            self.dismiss(item)

    async def _forward(self, client: Client, request: JSON) -> JSON | None:
        """What the other server answers to a command; None: it was lost, and no harm is in asking again."""
        arguments = {name: value for name, value in request.items() if name not in ("type", "command", "id")}
        try:
            result = await client.command(request["command"], **arguments | {"agent_name": self.name})
        except ConnectionLost as error:
            self._client = None
            await self.ready()  # the agent may be gone, too
            if request["command"] in READING:
                return None
            raise StoreFailed("the server that ran the agent was lost; see what is stored, then ask again") from error
        if request["command"] == "rewind_agent":
            await self.look_up()  # whoever has the answer finds the agent as it is by now
        return result


class Agents:
    """The agents of one server by name, and what they share. Raises UsageError where models or database do not work."""

    def __init__(self, options: Options, tools: dict[str, Tool]) -> None:
        self.options, self.tools, self.stopping = options, tools, False
        self.timezone = options.timezone or machine_timezone()
        names = ("model", "base_url", "api_key", "context_window", "idle_timeout", "embedding_model")
        path = options.replay or options.record
        tape = Tape(path, bool(options.replay)) if path else None
        given = {name: getattr(options, name) for name in names} | (tape.about if tape and tape.replays else {})
        self.models = Models(**given, tape=tape)
        self.database = database_at(options.db, options.sync)
        self.store = Store(self.database)
        self.models.recalled = self.store.settings
        self.live: dict[str, LiveAgent] = {}
        self.api_keys: dict[int, str | None] = {}  # of agents that Python made with one; never stored
        self.lock = asyncio.Lock()  # held while a name changes hands
        self.leases = (
            Leases(self.database, self._in_use, self._take_owners) if isinstance(self.database, Postgres) else None
        )
        self._embeds = self.leases is None  # whether this server gives vectors, which one does for all
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is kept until it ends, or is cancelled at the close."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.leases:
            asyncio.get_running_loop().call_later(STOP_GRACE / 4, self.leases.database.hang_up)
            await in_thread("memws-leases-close", self.leases.close)
        await self.models.close()
        await self.store.close()

    async def get(self, name: str) -> LiveAgent:
        """The agent of that name, opened where it is not in use yet. Raises Refused (unknown_agent), StoreFailed."""
        name = unicodedata.normalize("NFC", name)
        if name in self.live:
            return self.live[name]
        async with self.lock:
            return self.live.get(name) or await self.use(await self.store.read(find_agent, name))

    async def use(self, record: AgentRecord) -> LiveAgent:
        """The agent, opened; to be called under the lock."""
        live = next((each for each in self.live.values() if each.id == record.id), None)
        if live:  # another server has renamed it, or taken it back
            await live.look_up()
        if live is None or live.id != record.id:
            live = LiveAgent(self, record)
            if self.leases:
                live.take_owner("", self.leases)
            else:
                await live.run(record)
        live.take_name(record.name)
        if self.leases:
            self.leases.ask()
        return live

    def _in_use(self) -> set[int]:
        """The agents to be run here, for any thread; 0: to embed."""
        return {live.id for live in list(self.live.values())} | ({0} if self.models.embedder else set())

    def _take_owners(self, owners: dict[int, str]) -> None:
        for live in list(self.live.values()):
            if self.leases and live.id in owners:
                live.take_owner(owners[live.id], self.leases)
        self._embeds = bool(owners.get(0, self._embeds))

    async def create(self, values: JSON, base_url: str | None, api_key: str | None) -> tuple[LiveAgent, list[str]]:
        """A new agent, and what of its config is ignored. Raises Refused."""
        values = clean_value(values)
        config, warnings = read_config(values, self.tools)
        config["timezone"] = config["timezone"] or self.timezone
        blocks: list[Block] = apply(core_memory, values)
        name = name_like("agent") if values.get("name") is None else check_name(values["name"])
        model, _ = self.models.get(config["model"], base_url, api_key)
        check_window(config, self.models.context_window or model.window, self.tools, blocks)
        async with self.lock:
            record = AgentRecord(name, config, [vars(block) for block in blocks], base_url)
            record = await self.store.write(create_agent, record)
            self.api_keys[record.id] = api_key
            live = await self.use(record)
        await live.ready()
        return live, [*warnings, *(live.agent.warnings if live.here else ())]

    @contextlib.asynccontextmanager
    async def copied(self, live: LiveAgent, record: AgentRecord, item: Turn) -> AsyncGenerator[int, None]:
        """The id of a copy of what the agent had stored up to the record's last seq; forgotten if it gets no name."""
        store, told = self.store, time.monotonic()
        copy = (await store.write(create_agent, replace(record, last_active=now_text()), is_copy=True)).id
        self.api_keys[copy] = self.api_keys.get(live.id)
        try:
            with item.interruptible():
                async for what, done, total in copy_steps(store, record, copy):
                    if live.end or self.stopping:
                        raise live.end or cancelled()
                    if time.monotonic() - told > PROGRESS_DELAY:
                        text = f"copied {done:,} of {total:,} {what}"
                        live.agent.emit_live(item, "progress", text, done=done, total=total)
                        told = time.monotonic()
            yield copy
        finally:
            with contextlib.suppress(MemwsError):
                await store.write(forget_copies, copy)

    async def embed(self) -> None:
        """Give vectors to what has none yet, in the background, for ever."""
        embedder = self.models.embedder
        while embedder:
            with contextlib.suppress(StoreFailed):
                is_made = await self.store.read(read_setting, "embedding_model") == embedder.name
                cleared = 0 if self._embeds and not is_made else None
                while cleared is not None:
                    cleared = await self.store.write(clear_vectors, embedder.name, cleared)
                if is_made or self._embeds:
                    embedder.catch_up = functools.partial(self._embed_all, embedder)
                if self._embeds:
                    await self._embed_all(embedder)
            await asyncio.sleep(EMBEDDING_PULSE)

    async def _embed_all(self, embedder: Embedder) -> None:
        while rows := await self.store.read(without_vector, 16):  # in one call of the model
            if (vectors := await embedder.vectors([text for _, text in rows])) is None:
                await asyncio.sleep(embedder.paused_until - time.monotonic())
            else:
                found = [(vector, *row) for vector, row in zip(vectors, rows, strict=True)]
                await self.store.write(keep_vectors, found)


# ---- what a connection gets of an agent ------------------------------------------------------------------------------


def has_entered(event: StoredEvent) -> bool:
    """Whether it is the receipt of a message that entered the turn of another, which is all there will be of it."""
    return event.kind == "user_message" and '"steered":' in event.text


class Reader:
    """What one connection gets of one agent: all events above a seq, or those of its own turns; one task sends them.

    websockets' backpressure sets the pace: while `send` waits for the client, no event is taken.
    """

    def __init__(self, session: Session, live: LiveAgent) -> None:
        self.session, self.live = session, live
        self.cursor = live.last_seq  # the seq up to which all was sent that is wanted
        self.place: int | None = live.count  # the number of the next event in the ring; None: the store comes first
        self.floor = math.inf  # a subscription gets all events above this seq
        self.turns: dict[str, Id] = {}  # own turns without their terminal frame, and the ids of their messages
        self._replays: set[str] = set()  # of them those that are to be sent from their start up to the cursor
        self._unwritten = 0  # characters of frames that wait to be written
        session.readers[live] = self
        live.readers.add(self)
        self.task = live.agents.spawn(self._send_to_end())

    def subscribe(self, floor: float) -> None:
        """Get all events above that seq; infinity ends the subscription."""
        self.floor = floor
        if floor < self.cursor:
            self.cursor, self.place = int(floor), None
        self.live.wake()

    def follow(self, turn_id: str, request_id: Id, item: Turn | None, *, replay: bool = False) -> None:
        """Get the frames of a turn of one's own, under the newest id; `replay`: also those before the cursor. Where it
        waits or runs, as `item`, it may be refused, which overtakes what else is to be sent."""
        if turn_id not in self.turns and replay:
            self._replays.add(turn_id)
        if turn_id not in self.turns and item is not None:
            item.done.add_done_callback(lambda done: self._refuse(turn_id, done.exception()))
        self.turns[turn_id] = request_id
        self.live.wake()

    def _refuse(self, turn_id: str, error: BaseException | None) -> None:
        """End a turn of one's own that will have no other terminal frame, where there is an error to tell."""
        if turn_id not in self.turns or not isinstance(error, MemwsError):
            return
        request = {"type": "user_message", "turn_id": turn_id, "agent_name": self.live.name}
        text = self.session.failure(request | {"id": self.turns.pop(turn_id)}, error)
        self.live.agents.spawn(self.session._reply(text))
        self.live.wake()

    async def _send_to_end(self) -> None:
        with contextlib.suppress(ConnectionClosed, InvalidState):
            try:
                await self._send_wanted()
                error: MemwsError | None = self.live.end
            except StoreFailed as failure:
                logger.error("agent %s cannot be replayed: %s", self.live.name, failure)
                error = failure
                if self.floor < math.inf:
                    self.turns[""] = None  # the subscription ends with an error of its own
            del self.session.readers[self.live]
            for turn_id in list(self.turns):
                self._refuse(turn_id, error)

    async def _send_wanted(self) -> None:
        """Send what is wanted until nothing is, or the agent is no longer in use. Raises StoreFailed."""
        live = self.live
        while self.floor < math.inf or self.turns:
            if self._replays:
                turn_id = self._replays.pop()
                async for event in live.events(0, self.cursor, turn_id):
                    if turn_id in self.turns:  # it may have been refused meanwhile
                        await self._send(event)
            elif self.place is None or live.count - self.place > len(live.ring):
                self.place = place = live.count
                async for event in live.events(self.cursor, live.last_seq):
                    if self._replays or self.place != place:  # something else is wanted by now
                        self.place = None
                        break
                    await self._deliver(event)
            elif self.place < live.count:
                event = live.ring[self.place - live.count]  # counted from the newest
                self.place += 1
                await self._deliver(event)
            elif self._unwritten:
                await self._write()
            elif live.end:
                return
            else:
                await live.news.wait()
        await self._write()

    async def _deliver(self, event: StoredEvent) -> None:
        """Send an event, if it is new and wanted here."""
        if event.seq and event.seq <= self.cursor:
            return
        self.cursor = event.seq or self.cursor
        if event.kind == "agent_change" and decode_json(event.text).get("change") == "rewound":
            for turn_id in list(self.turns):
                if not await self.live.find_anywhere(turn_id):  # the agent never had it, so there is no terminal frame
                    self._refuse(turn_id, Refused("cancelled", "the agent was rewound to before this turn"))
        turn_ids = {event.turn_id, decode_json(event.text)["turn_id"] if has_entered(event) else event.turn_id}
        if turn_ids & self.turns.keys() or (event.seq or self.cursor + 1) > self.floor:
            await self._send(event)

    async def _send(self, event: StoredEvent) -> None:
        """Send an event of a type that the client asked for; starts and terminals of its own turns with their id."""
        request_id: Id = None
        if event.kind in TERMINAL_TYPES or (event.turn_id in self.turns and has_entered(event)):
            request_id = self.turns.pop(event.turn_id, None)
        elif event.kind == "agent_response_start":
            request_id = self.turns.get(event.turn_id)
        elif self.session.types is not None and event.kind not in self.session.types:
            return
        text = event.text if request_id is None else with_fields(event.text, id=request_id)
        self.session.websocket.protocol.send_text(text.encode())
        self._unwritten += len(text)
        if self._unwritten > MAX_TEXT:
            await self._write()

    async def _write(self) -> None:
        """Write the frames of a step at once: each write costs as much as all else that is done to send a frame."""
        websocket, self._unwritten = self.session.websocket, 0
        async with websocket.send_context():
            websocket.transport.write(b"".join(websocket.protocol.data_to_send()))


# ---- sessions and their commands -------------------------------------------------------------------------------------

NewName = Annotated[str, 0, 1_000]
AgentName = NewName | None
Text = Annotated[str, 0, MAX_FRAME]
Label = Annotated[str, 1, MAX_NAME]
Limit = Annotated[int, 1, MAX_BLOCK_LIMIT] | None
TurnId = Annotated[str, 1, MAX_ID]
CallId = Annotated[str, 0, 10_000]
Reason = Annotated[str, 0, MAX_QUERY]
Count = Annotated[int, 1, 10_000]
MessageId = Annotated[int, 0, 2**53] | None
Moment = Annotated[str, 0, 40] | None


def fitting(items: list[Any], beside: Any = None) -> list[Any]:
    """The first items that fit one answer together with what stands beside them, at least one."""
    sizes = itertools.accumulate(len(encode_json(item).encode()) + 1 for item in (beside, *items))
    return items[: max(1, sum(size <= MAX_FRAME - 4_096 for size in sizes) - 1)]


def message_item(message: ChatMessage, first: int) -> JSON:
    """A chat message as get_messages lists it; `first` is the first one in view."""
    body = read_body(message.role, message.body) if message.role == "assistant" else None
    calls = []
    for call in (body or {}).get("tool_calls", ()):
        arguments = clean_value(decode_json(call["function"]["arguments"]))
        calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": arguments})
    about = {"id": message.id, "seq": message.seq, "role": message.role, "time": message.time, "step": message.step}
    text = message.text or ("" if calls else message.said)  # what was said without a call has no other place
    about |= {"from": message.speaker.partition(" ")[2] or None, "text": text, "said": message.said}
    return about | {"tool_calls": calls, "turn_id": message.turn_id or None, "in_context": message.id >= first}


class Session:
    """One connection's requests, one after another. Each public coroutine is a command: its signature is the check and
    the JSON Schema of the arguments, its docstring the description, what it returns the result (None: it is sent)."""

    def __init__(self, agents: Agents, websocket: ServerConnection) -> None:
        self.websocket = websocket
        is_server = websocket.request is not None and websocket.request.path.endswith(BY_SERVER)
        self.sender = None if is_server else self  # whose messages it sends: there those of others, which were counted
        self.readers: dict[LiveAgent, Reader] = {}  # one for each agent whose events it is to get
        self.types: frozenset[str] | None = frozenset(CLASSIC_TYPES)  # the message types it wants; None: all
        self._agents = agents
        self._current: LiveAgent | None = None  # the one that this connection created or loaded last
        self._request_id: Id = None  # of the request taken up last; those that run beside others read it not

    def failure(self, request: JSON, error: MemwsError) -> str:
        """What a request gets that fails; a server that passes it on asks the next one, where this one stops."""
        return "" if self.sender is None and self._agents.stopping else error_frame(request, error)

    async def _reply(self, text: str) -> None:
        """Send a frame, if there is one, to a client that may have left."""
        with contextlib.suppress(ConnectionClosed):
            if text:
                await self.websocket.send(text)

    async def _take_frame(self, frame: str | bytes) -> None:
        """Answer a request; what waits for a model is answered beside the others that follow."""
        try:
            request = decode_request(frame)
        except InvalidRequest as error:
            await self._reply(error_frame(None, error))
            return
        asks_model = request.get("command") == "search_memory" and self._agents.models.embedder is not None
        if request.get("command") == "compact" or asks_model:
            self._agents.spawn(self._answer(request))  # it is done wholly, also where the client leaves
            await asyncio.sleep(0)  # it begins before what follows is looked at
        else:
            await self._answer(request)

    async def _answer(self, request: JSON) -> None:
        """Do what a request asks, and answer it exactly once; a message's answer is its turn."""
        self._request_id = request.get("id")
        try:
            function, arguments = resolve(request, known_commands())
            result = await self._run_command(function, arguments, request)
            text = "" if result is None else result_frame(request, result)
            if len(text.encode()) > MAX_FRAME:
                raise Refused("too_large", f"the answer has more than {MAX_FRAME:,} bytes; ask for less at a time")
        except Exception as error:  # also a fault of ours is one request's trouble, not the connection's
            refusal = error if isinstance(error, MemwsError) else MemwsError("internal error; the server's log has it")
            if refusal is not error:
                logger.exception("connection %s: a request failed", self.websocket.id)
            text = self.failure(request, refusal)
        if text:
            await asyncio.sleep(0)  # what the request made an agent tell goes out first
            await self._reply(text)

    async def _run_command(self, function: Function, arguments: JSON, request: JSON) -> JSON | None:
        """Run a command, here or on the server that runs its agent."""
        live = await self._find_live(arguments.pop("agent_name", None)) if function.filled else None
        while True:
            try:
                if live and "live" in function.filled:
                    arguments["live"] = live
                if live and "agent" in function.filled:
                    arguments["agent"] = await live.fresh(function.name not in READING)
                result: JSON | None = await function.call(self, **arguments)
                break
            except Elsewhere as elsewhere:
                if (result := await elsewhere.forward(request)) is not None:
                    break
            except LeaseLost:  # nothing was stored: it is done where the agent will run, or under the lease that is new
                if live is None:
                    raise
                live.here &= live.agent is not arguments.get("agent")
            except StoreFailed as error:
                raise error if live is None else live.end or error from None
        if live and result and function.name == "wake":  # its turn is told as that of a message
            item, reader = live.find(result["turn_id"]), self._reader(live)
            reader.follow(result["turn_id"], None, item, replay=reader.floor == math.inf)
        return result

    async def _find_live(self, name: str | None) -> LiveAgent:
        """The agent that a request means. Raises Refused (no_agent, unknown_agent)."""
        live = self._current if name is None else await self._agents.get(name)
        if live is None or (name is None and live.end and not self._agents.stopping):
            raise Refused("no_agent", "no agent has been initialized; send create_agent or load_agent, or name one")
        return live

    def _reader(self, live: LiveAgent) -> Reader:
        return self.readers.get(live) or Reader(self, live)

    # -- messages --

    async def user_message(
        self,
        live: LiveAgent,
        message: Text,
        turn_id: TurnId | None = None,
        when_busy: Literal["queue", "reject", "interrupt", "steer"] = "queue",
        from_: Annotated[str, 1, MAX_NAME] | None = None,
    ) -> None:
        """Say something to an agent (`from`: who speaks); its receipt is agent_response_start, its end one terminal."""
        await live.ready()
        item = await live.find_anywhere(turn_id) if turn_id else None
        if item and (item.message, item.speaker) != (message, from_):
            raise Refused("turn_id_reused", f"turn {quote(turn_id)} was another message; use a new turn_id")
        is_new = item is None
        if item is None:
            item = Turn(turn_id or new_turn_id(), message, speaker=from_, sender=self.sender, when_busy=when_busy)
            live.enqueue(item)
        self._reader(live).follow(item.turn_id, self._request_id, item, replay=not is_new)
        if is_new and live.here and item in live.waiting and when_busy in ("queue", "steer"):
            live.agent.emit_live(item, "queue", "waits for its turn", position=len(live.waiting))

    async def cancel(self, live: LiveAgent, agent: Agent, turn_id: TurnId | None = None) -> JSON:
        """End the running turn, or take a waiting message back. Result: {state: cancelling | removed | over}."""
        item = await live.find_anywhere(turn_id) if turn_id else live.current
        if item is None and turn_id:
            raise Refused("unknown_turn", f"agent {live.name!r} never had a turn {quote(turn_id)}")
        if item is None:
            return {"state": "over"}
        if item is not live.current:
            async with agent.memory.lock:  # where it enters a turn just now, it has done so then
                if item in live.queued:
                    live.dismiss(item, Refused("cancelled", "cancelled before it ran"))
                    return {"state": "removed"}
        item.stop("cancelled")
        return {"state": "cancelling" if item is live.current else "over"}

    async def wake(self, live: LiveAgent) -> JSON:
        """Start a turn without a user's message, as a heartbeat would. Result: {turn_id}."""
        await live.fresh()
        item = Turn(new_turn_id(), None, sender=self.sender, when_busy="reject")
        live.enqueue(item)
        return {"turn_id": item.turn_id}

    async def subscribe(self, live: LiveAgent, after: Any = None) -> None:
        """Follow all events of an agent: stored ones above `after` (0: all, absent: none), then live ones.
        Result: {last_seq}."""
        await live.ready()
        _, _, stored = await self._agents.store.read(find_name, live.id, live.name)
        last_seq = max(live.last_seq, stored)  # other servers may be ahead of what is known here
        if after is not None and (type(after) is not int or not 0 <= after <= last_seq):
            text = f"after: expected a seq from 0 to {last_seq}, but got {quote(after)}"
            raise Refused("unknown_seq", text, last_seq=last_seq)
        await self._reply(result_frame({"command": "subscribe", "id": self._request_id}, {"last_seq": last_seq}))
        self._reader(live).subscribe(last_seq if after is None else after)

    async def unsubscribe(self, live: LiveAgent) -> JSON:
        """Follow an agent no longer. Result: {last_seq}."""
        if live in self.readers:
            self.readers[live].subscribe(math.inf)
        return {"last_seq": live.last_seq}

    # -- agents --

    async def create_agent(self, config: dict[str, Any]) -> JSON:
        """Make an agent and make it this connection's current one. Result: {agent_name, warnings}."""
        self._current, warnings = await self._agents.create(config, None, None)
        return {"agent_name": self._current.name, "warnings": warnings}

    async def load_agent(self, name: AgentName = None, agent_name: AgentName = None) -> JSON:
        """Open an agent, repair what a crash left, and make it this connection's current one.
        Result: {agent_name, model, last_seq, repaired, warnings}."""
        if name is None and agent_name is None:
            raise InvalidRequest("missing_field", "load_agent needs the field 'name'")
        live = self._current = await self._find_live(agent_name if name is None else name)
        agent = await live.fresh()
        repairs, agent.repairs = agent.repairs, []
        about = {"agent_name": live.name, "model": agent.settings()["model"], "last_seq": live.last_seq}
        return about | {"repaired": repairs, "warnings": agent.warnings}

    async def hello(self, message_types: list[str] | None = None) -> JSON:
        """Ask who answers, and choose the message types to receive ("*": all).
        Result: {version, protocol, model, models, offline, tape, limits, corrections, commands, message_types,
        unknown}; tape: recorded, replayed or null."""
        if message_types is not None:
            self.types = None if "*" in message_types else frozenset(message_types)
        models, options = self._agents.models, self._agents.options
        limits = {"max_frame": MAX_FRAME, "max_text": MAX_TEXT, "max_reply": MAX_REPLY, "max_query": MAX_QUERY}
        limits |= {"max_id": MAX_ID, "max_name": MAX_NAME, "max_depth": MAX_DEPTH}
        limits |= {"block_limit": BLOCK_LIMIT, "max_block_limit": MAX_BLOCK_LIMIT}
        limits |= {"max_waiting_session": MAX_WAITING_SESSION, "max_waiting_agent": MAX_WAITING_AGENT}
        limits |= {"max_connections": options.max_connections, "max_steps": options.max_steps}
        return {
            "version": __version__,
            "protocol": PROTOCOL,
            "model": models.default,
            "models": list(dict.fromkeys((models.default, OFFLINE))),
            "offline": models.offline,
            "tape": models.tape and ("replayed" if models.replays else "recorded"),
            "limits": limits,
            "corrections": {name: dict(counts) for name, counts in [*models.corrections.items()][:100] if counts},
            "commands": [name for name in known_commands() if name != "user_message"],
            "message_types": list(EVENTS),
            "unknown": [name[:MAX_NAME] for name in message_types or () if name != "*" and name not in EVENTS][:100],
        }

    async def list_agents(
        self, after: AgentName = None, limit: Annotated[int, 1, 100] = 100, deleted: bool = False
    ) -> JSON:
        """List the agents by name, those above `after`; with `deleted` those that restore_agent can bring back.
        Result: {agents: [{agent_name, model, last_active, last_seq, state}], total}."""
        records, total = await self._agents.store.read(list_agents, after or "", limit, deleted)
        agents: list[JSON] = []
        for record in records:
            live = self._agents.live.get(record.name)
            runs = (live and live.current) or (self._agents.leases and record.state.get("turn"))
            state = "running" if runs else "idle"
            about = {"agent_name": record.name, "model": record.config.get("model") or self._agents.models.default}
            about |= {"last_active": record.last_active, "last_seq": record.last_seq}
            agents.append(about | {"state": "deleted" if deleted else state})
        return {"agents": agents, "total": total}

    async def get_agent(self, live: LiveAgent, agent: Agent) -> JSON:
        """Read an agent's settings, memory blocks, counts and running turn.
        Result: {agent_name, settings, blocks: [{label, value, limit, version}], counts, last_seq, turn}."""
        memory, running, turn = agent.memory, live.current, None
        counts = {"messages": memory.last_message, "passages": memory.archival, "in_context": len(memory.messages)}
        if running and running.turn_id:
            approvals = [about for about, *_ in agent.approvals.values()]
            turn = {"turn_id": running.turn_id, "step": running.step, "approvals": approvals}
        about: JSON = {"agent_name": live.name, "settings": agent.settings(), "counts": counts | memory.tokens}
        return about | {"blocks": agent.record.blocks, "last_seq": live.last_seq, "turn": turn}

    async def update_agent(self, live: LiveAgent, agent: Agent, config: dict[str, Any]) -> JSON:
        """Change an agent's settings; its `blocks` add blocks and change limits, {label, delete: true} takes one away.
        Result: {settings, warnings}."""
        async with Transaction(agent.memory) as change:
            change.config, warnings = read_config(config, self._agents.tools, change.config)
            change.put_blocks(reshape(change.blocks, apply(by_label, config)))
            agent.check_room(change)
            change.add_event("agent_change", "the agent's settings changed", change="updated")
        agent.model.learned = Learned(agent.model.learned.shape)  # what was refused is tried anew
        await agent.store_learned()
        live.go_on()
        return {"settings": agent.settings(), "warnings": [*warnings, *agent.warnings]}

    async def rename_agent(self, live: LiveAgent, agent: Agent, new_name: NewName, force: bool = False) -> JSON:
        """Give an agent another name; its readers follow. force: cancel what waits or runs. Result: {agent_name}."""
        name, agents = check_name(new_name), self._agents
        if force:  # what it ends it ends for a name that can be had
            await agents.store.read(claim, name)
        async with live.occupied("rename", cancelled() if force else None), agents.lock, agent.memory.lock:
            events, last_seq = await agents.store.write(rename_agent, live.id, name, live.lease)
            live.publish(*events)
            live.take_name(name)
            agent.record.name = name
            live.last_seq = agent.record.last_seq = last_seq  # above that of whoever had the name before
        return {"agent_name": name}

    async def delete_agent(self, agent_name: AgentName = None, force: bool = False, purge: bool = False) -> JSON:
        """Put an agent aside until it is purged; its name is free at once. force: cancel what runs or waits first;
        purge: forget the agent for ever instead."""
        store = self._agents.store
        try:
            live = await self._find_live(agent_name)
        except Refused as error:
            if not purge or error.code != "unknown_agent":
                raise
            record = await store.read(find_agent, str(agent_name), deleted=True)
            await store.write(delete_agent, record.id, None, True)
            return {}
        agent, gone = await live.fresh(), Refused("unknown_agent", f"agent {live.name!r} was deleted")
        async with live.occupied("deletion", gone if force else None), self._agents.lock, agent.memory.lock:
            event = response("agent_change", "the agent was deleted", change="deleted")
            live.publish(*await store.write(delete_agent, live.id, event, purge, live.lease))
            live.take_name(None)
            live.close(gone)
        return {}

    async def restore_agent(self, agent_name: NewName, new_name: AgentName = None) -> JSON:
        """Bring back the agent that was deleted last under a name. Result: {agent_name, last_seq}."""
        agents = self._agents
        name = None if new_name is None else check_name(new_name)
        async with agents.lock:
            live = await agents.use(await agents.store.write(restore_agent, agent_name, name))
        return {"agent_name": live.name, "last_seq": live.last_seq}

    async def fork_agent(
        self, live: LiveAgent, agent: Agent, new_name: AgentName = None, turn_id: TurnId | None = None
    ) -> JSON:
        """Make another agent: a copy with all memory and history, as of now or of the end of a turn. A turn that runs
        is no part of it. Result: {agent_name, last_seq}."""
        name, agents = check_name(new_name or name_like(live.name)), self._agents
        now = agent.before or agent.record
        record = await agents.store.read(find_turn_end, agent.record, turn_id) if turn_id else now
        record = replace(record, name=name, created=now_text())
        async with agents.copied(live, record, Turn("", None)) as copy, agents.lock:
            fork = await agents.use(await agents.store.write(name_agent, copy, name))
        return {"agent_name": fork.name, "last_seq": fork.last_seq}

    async def rewind_agent(self, live: LiveAgent, agent: Agent, turn_id: TurnId, keep_as: AgentName = None) -> JSON:
        """Make an agent what it was at the end of a turn; as it is now it goes on under another name.
        Result: {agent_name, last_seq, kept_as}."""
        kept_as, agents = check_name(keep_as or name_like(live.name)), self._agents
        async with live.occupied("rewind") as item:
            record = replace(await agents.store.read(find_turn_end, agent.record, turn_id), name=kept_as)
            async with agents.copied(live, record, item) as copy, agents.lock:
                async with live.agent.memory.lock:
                    events = await agents.store.write(finish_rewind, live.id, copy, live.name, kept_as, live.lease)
                    live.agent.record.id, live.agent.memory.stale = 0, True  # who waits for the lock edits nothing
                    live.id = copy
                await live._mend()  # before it is told: who hears of it may ask at once
                live.publish(*events)
        return {"agent_name": live.name, "last_seq": live.last_seq, "kept_as": kept_as}

    # -- memory --

    async def get_messages(self, agent: Agent, before: MessageId = None, limit: Annotated[int, 1, 200] = 50) -> JSON:
        """The newest messages before an id, oldest first; `said`: what an agent told; `text`: what it thought. Result:
        {messages: [{id, seq, role, time, from, text, said, tool_calls, turn_id, step, in_context}], total, more}."""
        memory = agent.memory
        messages = await self._agents.store.read(read_messages, agent.record.id, before, limit)
        items = fitting([message_item(message, memory.record.state["cut"]) for message in messages[::-1]])[::-1]
        return {"messages": items, "total": memory.last_message, "more": bool(items) and items[0]["id"] > 1}

    async def search_memory(
        self,
        agent: Agent,
        query: Annotated[str, 0, MAX_QUERY],
        store: Literal["all", "recall", "archival"] = "all",
        from_: Moment = None,
        to: Moment = None,
        page: Count = 1,
        limit: Annotated[int, 1, 50] = SEARCH_PAGE,
    ) -> JSON:
        """Search recall and archival memory; an empty query lists the newest first. from, to: its days or times,
        inclusive. Result: {items: [{id, store, role, from, time, text, score}], total, page, pages, more}."""
        zone, vector = agent.memory.zone, await agent.query_vector(query)
        since, until = moment_of(from_ or "", zone), moment_of(to or "", zone, is_end=True)
        stores = STORES if store == "all" else (store,)
        wanted = Query(query, stores, since, until, limit, (page - 1) * limit, vector=vector, zone=zone)
        documents, total = await self._agents.store.read(search, agent.record.id, wanted)
        found = []
        for document in documents:
            role, _, name = document.role.partition(" ")
            about = {"id": document.id, "store": document.store, "role": role or None, "from": name or None}
            found.append(about | {"time": document.time, "text": document.text, "score": round(document.score, 4)})
        items = fitting(found)
        pages = {"total": total, "page": page, "pages": -(-total // limit)}
        return {"items": items, **pages, "more": len(items) < len(found)}

    async def get_context(self, agent: Agent, before: MessageId = None, limit: Count = 1_000) -> JSON:
        """Read what fills the context window, by section; of its chat messages the newest `limit` before an id.
        Result: {sections: [{name, tokens, text}], used, window, estimated, more, first}."""
        older = [message for message in agent.memory.messages if before is None or message.id < before]
        bodies = fitting([message.body for message in older[::-1][:limit]], agent.context([]))
        newest = older[len(older) - len(bodies) :]
        about = {"sections": agent.context(newest), "used": agent.used(), "window": agent.window, "estimated": True}
        return about | {"more": len(newest) < len(older), "first": newest[0].id if newest else None}

    async def get_request(
        self, agent: Agent, turn_id: TurnId, step: Count, before: MessageId = None, limit: Count = 1_000
    ) -> JSON:
        """Read what was really sent to the model for a step, and what came back; of its messages the newest `limit`
        before a place, from 0. Result: {request, response, usage, first_token_ms, total_ms, more, first}."""
        result = await self._agents.store.read(find_request, agent.record.id, turn_id, step)
        older = result["request"].pop("messages")[:before]
        messages = result["request"]["messages"] = fitting(older[::-1][:limit], result)[::-1]
        return result | {"more": len(messages) < len(older), "first": len(older) - len(messages)}

    async def set_block(
        self, agent: Agent, label: Label, value: Text, limit: Limit = None, version: int | None = None
    ) -> JSON:
        """Give a block of core memory another text, with `version` only if that is stored, and another limit.
        Result: {label, version}."""
        async with Transaction(agent.memory) as change:
            change.write(label, value, version, limit)
            if limit is not None:
                agent.check_room(change)
            return {"label": label, "version": change.block(label).version}

    async def insert_passage(self, agent: Agent, text: Text) -> JSON:
        """Keep a passage in archival memory. Result: {id}."""
        async with Transaction(agent.memory) as change:
            return {"id": change.insert(text)}

    async def delete_passage(self, agent: Agent, passage_id: Annotated[int, 0, 2**53]) -> JSON:
        """Take a passage out of archival memory. Result: {id}."""
        async with Transaction(agent.memory) as change:
            await change.remove(passage_id)
        return {"id": passage_id}

    async def compact(self, live: LiveAgent, agent: Agent) -> JSON:
        """Turn the oldest messages of the context window into a summary now. Result: {tokens_before, tokens_after}."""
        async with live.occupied("compaction") as item:
            try:
                return await agent.compact(item)
            except ModelError as error:
                raise Refused("not_found", f"there is nothing to compact: {error}") from error

    async def approve(
        self, agent: Agent, tool_call_id: CallId, allow: bool, arguments: JSON | None = None, reason: Reason = ""
    ) -> JSON:
        """Allow a call that waits for it, also with other `arguments` than the model's, or deny it; the model reads the
        `reason`."""
        waiting = agent.approvals.get(tool_call_id)
        if waiting is None or waiting[2].done():
            text = f"no call {quote(tool_call_id)} waits to be allowed: it was answered, withdrawn, or too late"
            raise Refused("not_found", text)
        _, tool, decision = waiting
        if not allow:
            why = f" ({reason})" if reason else ""
            decision.set_exception(ToolError(f"not run: a person denied it{why}"))
        elif arguments is None:
            decision.set_result(None)
        else:
            bound, edited = tool.bind(arguments, lenient=True), encode_json(without_heartbeat(arguments))
            decision.set_result((bound, f"a person had it run with {edited}: "))
        return {}


@functools.cache
def known_commands() -> dict[str, Function]:
    """What a client may ask for, by name."""
    calls = [call for name, call in vars(Session).items() if inspect.iscoroutinefunction(call) and name[0] != "_"]
    found = {call.__name__: function_of(call, skip=["self"], other=lambda *_: None) for call in calls}
    for function in found.values():
        if function.filled:  # with the agent that a request names
            function.parameters["properties"]["agent_name"] = schema_of(AgentName)
    return found


# ---- the server ------------------------------------------------------------------------------------------------------


def bind_sockets(host: str, port: int, stack: contextlib.ExitStack) -> list[socket.socket]:
    """Sockets on one port, which the stack closes; for localhost of both families, where there is IPv6."""
    sockets: list[socket.socket] = []
    try:
        for name in ("127.0.0.1", "::1") if host.lower() == "localhost" else (host.strip("[]"),):
            address = name, sockets[0].getsockname()[1] if sockets else port
            family = socket.AF_INET6 if ":" in name else socket.AF_INET
            sockets.append(stack.enter_context(socket.create_server(address, family=family, backlog=1024)))
            # Accepted sockets inherit it; asyncio leaves it out here, and a turn would wait 40 ms for a delayed ACK.
            sockets[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        text = f"cannot listen on {host}:{port} ({error.strerror or error}); choose another host or port"
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} on {host} is held by another program; stop it, or choose port=0 for a free one"
        if not sockets or (port and error.errno == errno.EADDRINUSE):
            raise UsageError(text) from None
    return sockets


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, if any."""
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


async def wait_until(end: float, works: Iterable[collections.abc.Awaitable[Any]]) -> None:
    """Wait for all of them, until that time of the loop; those that have not ended by then are cancelled."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(end):
            await asyncio.gather(*works, return_exceptions=True)


class WebSocketServer:
    """A memws server: `start()` in a notebook or script, `run()` in a program, `await start_server()` on your loop.

        server = memws.WebSocketServer(port=0).start()
        agent = server.create_new_agent({"name": "sam"})
        events = server.run_step("Hi, my name is Ada")

    Every option of the command line is a keyword; see Options. The blocking calls work from any thread but the
    server's own, also before `start()`. Raises UsageError for options that cannot be.
    """

    def __init__(self, host: str = DEFAULT_HOST, port: int = DEFAULT_PORT, **options: Any) -> None:
        if "JUPYTERHUB_API_TOKEN" in os.environ and options.get("token") is None:  # others' kernels may reach this one
            options["token"] = process_wide("token", secrets.token_urlsafe(32))
        self.options = Options(host, port, **options)
        self.tools: dict[str, Tool] = dict(MEMORY_TOOLS)
        self._gate = Gate(self.options)
        self._thread: LoopThread | None = None
        self.host, self.port = host, port
        self.interface = self  # where clients are registered; MemGPT 0.2.7 has an object of its own for that
        self._reset()

    def _reset(self) -> None:
        self.agent: Agent | None = None  # the one most recently created or loaded through this object
        self.clients: dict[ServerConnection, Session] = {}
        self._accepted = weakref.WeakSet[ServerConnection]()  # also those whose handshake is not over
        self.agents: Agents | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sockets: list[socket.socket] = []
        self._listeners: list[websockets.asyncio.server.Server] = []
        self._over: concurrent.futures.Future[None] = concurrent.futures.Future()  # done once the server is closed
        self._over.set_running_or_notify_cancel()  # one waiter's cancel is not the others'

    def __repr__(self) -> str:
        return f"<memws.WebSocketServer {self.url} {'listening' if self._listeners else 'not listening'}>"

    @property
    def url(self) -> str:
        """The address that clients connect to."""
        return f"ws://{url_host(self.host)}:{self.port}"

    @property
    def agent_name(self) -> str | None:
        return self.agent.name if self.agent else None

    def tool(
        self,
        function: Callable[..., Any] | None = None,
        *,
        name: str | None = None,
        timeout: float = TOOL_TIMEOUT,
        approve: Rule = False,
    ) -> Any:
        """Register a function as a tool, for agents whose config names it; also as a decorator with arguments.

        A sync function runs in a daemon thread of its own, an async one on the server's loop; `timeout` in seconds.
        approve: True, or a function of the arguments that says so: a call waits until a client allows it.
        The docstring is the description, Annotated[str, "…"] that of a parameter; one of type memws.Agent gets the
        agent. What a model sends is read loosely ("3" as 3, null as the default), also in lists and objects; types but
        Python's own are pydantic's. Raises UsageError for a function that no model could call.
        """
        if function is None:
            return lambda decorated: self.tool(decorated, name=name, timeout=timeout, approve=approve)
        tool = make_tool(function, name or "", timeout, approve)
        if tool.name in MEMORY_TOOLS:
            raise UsageError(f"{tool.name!r} is a memory tool; give your function another name")
        self.tools[tool.name] = tool
        return function

    def panel(self, agent: str | None = None, compact: bool = False, static: bool = True) -> Panel:
        """A panel in the notebook, which is a client of this server; see Panel. Needs a started server."""
        return Panel(self.url, agent, compact, static, self.options.token)

    # -- opening, listening, closing --

    def open(self) -> Agents:
        """Open store and models, where they are not; nothing listens yet. Raises UsageError."""
        if self.agents is None:
            self.agents = Agents(self.options, self.tools)
        return self.agents

    def _bind(self) -> None:
        """Bind, then open: a start that fails on its port makes no database. Raises UsageError."""
        self.claim()
        if self._sockets:
            return
        with contextlib.ExitStack() as stack:
            sockets = bind_sockets(self.options.host, self.options.port, stack)
            self.open()
            stack.pop_all()
        self._sockets, (self.host, self.port) = sockets, sockets[0].getsockname()[:2]

    def initialize_server(self) -> None:
        """Open the store, bind the address and print it. Raises UsageError."""
        self._bind()
        about = f"model: {self.open().models.described}; agents: {self.open().database.path}"
        print(f"memws {__version__} listening on {self.url}\nopen {page_address(self.url)}\n{about}", flush=True)

    async def listen(self) -> None:
        """Accept connections on the running loop. Raises UsageError."""
        self._bind()
        self._loop, agents = asyncio.get_running_loop(), self.open()
        if agents.leases:
            agents.leases.address = self.options.advertise or f"ws://{self.options.own_name}:{self.port}"
            agents.leases.ask()
        for bound in self._sockets:
            listener = await websockets.asyncio.server.serve(
                self.handle_client,
                sock=bound,
                create_connection=cast(Any, self._accept),
                process_request=self._process_request,
                select_subprotocol=lambda _, offered: cast(Any, "memws") if "memws" in offered else None,
                ping_interval=PING_INTERVAL,
                ping_timeout=PING_TIMEOUT,
                open_timeout=OPEN_TIMEOUT,
                close_timeout=STOP_GRACE,
                server_header=None,
                **BOTH_ENDS,
            )
            self._listeners.append(listener)
        for work in (self._warm_up(agents), self._close_stalled(agents), agents.embed()):
            agents.spawn(work)

    def _accept(self, *arguments: Any, **options: Any) -> ServerConnection:
        connection = ServerConnection(*arguments, **options)
        self._accepted.add(connection)
        return connection

    async def _warm_up(self, agents: Agents) -> None:
        """Import openai while nobody waits for it yet."""
        if not (agents.models.offline or agents.models.replays):
            with contextlib.suppress(UsageError):  # the first turn tells it
                async with agents.models.endpoint.client():
                    pass

    async def _close_stalled(self, agents: Agents) -> None:
        looks: dict[tuple[ServerConnection, int], int] = {}  # by client and kB that wait for it: how often seen
        while True:
            await asyncio.sleep(READER_PATIENCE / READER_LOOKS)
            sizes = [(each, each.transport.get_write_buffer_size() // 1024) for each in self.clients]  # pings are small
            looks = {each: looks.get(each, 0) + 1 for each in sizes if each[1]}
            for (websocket, _), count in looks.items():
                if count > READER_LOOKS:
                    logger.warning("connection %s takes nothing and is closed", websocket.id)
                    agents.spawn(websocket.close(1013, "this client takes nothing; connect again"))

    def _process_request(self, connection: ServerConnection, request: http11.Request) -> http11.Response | None:
        """The gate, before the upgrade, and what plain HTTP gets: the page and /healthz, which hold no secret."""
        path, upgrade = request.path.partition("?")[0], ",".join(request.headers.get_all("Upgrade"))
        is_page = path == "/" and "websocket" not in upgrade.lower()
        public = is_page or path == "/healthz"
        problem = self._gate.problem(request, public=public)
        if problem is None and not public and len(self.clients) >= self.options.max_connections:
            problem = 503, f"all {self.options.max_connections} connections are taken; try again later"
        if problem is not None:
            return connection.respond(problem[0], f"{problem[1]}\n")
        if not public:
            return None
        away = self.agents.leases.problem if self.agents and self.agents.leases else ""
        about: JSON = {"status": "the database is away", "reason": away} if away else {"status": "ok"}
        about |= {"version": __version__} | ({"token": True} if self.options.token else {})
        kind = {"Content-Type": "application/json"}
        body, headers = page(request.headers["Host"]) if is_page else (encode_json(about), kind)
        found = connection.respond(503 if away and not is_page else 200, body)
        del found.headers["Content-Type"]
        found.headers.update(headers)
        return found

    def register_client(self, websocket: ServerConnection) -> Session:
        return self.clients.setdefault(websocket, Session(self.open(), websocket))

    def unregister_client(self, websocket: ServerConnection) -> None:
        self.clients.pop(websocket, None)

    async def handle_client(self, websocket: ServerConnection, path: str | None = None) -> None:
        """One connection, from accept to close, also for a websockets server of your own."""
        self._loop = asyncio.get_running_loop()
        session = self.register_client(websocket)
        try:
            with contextlib.suppress(ConnectionClosed):
                async for frame in websocket:
                    await session._take_frame(frame)
        finally:
            for reader in session.readers.values():
                reader.task.cancel()
            self.unregister_client(websocket)

    async def close(self) -> None:
        """End turns cleanly, tell the clients, free the port, let go of everything; on the server's own loop."""
        over, agents = self._over, self.agents
        if agents is None:
            return
        if agents.stopping:
            await asyncio.wrap_future(over)
            return
        agents.stopping, end = True, asyncio.get_running_loop().time() + STOP_GRACE
        live = [each for each in agents.live.values() if each.here]
        await wait_until(end - STOP_GRACE / 2, (each.stop_turns("interrupted", cancelled()) for each in live))
        for each in live:
            each.close(cancelled())
        readers = [reader.task for session in self.clients.values() for reader in session.readers.values()]
        await wait_until(end - STOP_GRACE / 4, readers)
        for listener in self._listeners:
            listener.close(reason="the server is stopping")
        for websocket in (each for each in self._accepted if each.request is None):  # they have asked for nothing
            with contextlib.suppress(AttributeError):  # accepted just now
                websocket.transport.abort()
        await wait_until(end, (listener.wait_closed() for listener in self._listeners))
        for websocket in self.clients:
            websocket.transport.abort()
        for bound in self._sockets:
            bound.close()
        await agents.close()
        self._reset()
        over.set_result(None)

    # -- a server in a thread, in a program, on a loop of the caller's --

    def claim(self) -> None:
        """Stop the server of the same address that an earlier run of the cell left, in this copy of the module."""
        servers: Any = process_wide("servers", weakref.WeakValueDictionary())
        address = __name__, self.options.host.lower(), self.options.port
        previous, servers[address] = servers.get(address, self), self
        if previous is not self and self.options.port:
            previous.stop()

    def start(self) -> typing.Self:
        """Listen, on a loop of an own daemon thread, and return at once; a cell that is run again replaces its server.
        Raises UsageError where the port or the database is taken."""
        if not self._listeners:
            self._bind()
            self._run_on_loop(self.listen)
        return self

    def stop(self) -> None:
        """End turns cleanly, free the port, leave no thread or task but a tool that will not end, which is named."""
        if self.agents is not None:
            self._run_on_loop(self.close)
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        if tools := [each.name for each in threading.enumerate() if each.name.startswith("memws-tool-")]:
            logger.warning("still running: %s", ", ".join(tools))

    def run(self, block: bool = False) -> None:
        """Serve until interrupted. Inside a running loop (a notebook cell) start in a thread and return; with `block`
        keep the cell there through nest-asyncio until it is interrupted, which frees the port."""
        loop = running_loop()
        if loop and not block:
            self.start()
            print(f"memws {__version__} listening on {self.url} in a thread of its own; stop() ends it")
            return
        if loop:
            try:  # let it be run again inside
                is_new = sys.version_info >= (3, 14) or importlib.util.find_spec("nest_asyncio2")
                importlib.import_module("nest_asyncio2" if is_new else "nest_asyncio").apply(loop)
            except (ImportError, ValueError, RuntimeError) as error:
                text = f"run(block=True) cannot block here ({error}); use start(), which serves from a thread"
                raise UsageError(text) from error
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(self.start_server())

    async def start_server(self) -> None:
        """Serve until cancelled, on the caller's loop, or where blocking calls came before on their thread. Raises
        UsageError where the server listens already."""
        if self._listeners:
            raise UsageError(f"this server listens already on {self.url}; stop() it first")
        has_thread, over = self._thread is not None, asyncio.wrap_future(self._over)
        await in_thread("memws-bind", self.initialize_server)  # a server that it takes over from may be on this loop
        try:
            await (in_thread("memws-start", self.start) if has_thread else self.listen())
            await over
        finally:
            await (in_thread("memws-stop", self.stop) if has_thread else self.close())

    # -- for Python: each call in its blocking form, and the awaitable one --

    def create_new_agent(self, config: str | Mapping[str, Any] | None = None, **more: Any) -> Agent:
        """A new agent: a name, config or keywords as in create_agent, plus base_url and api_key. Raises Refused."""
        return self._run_on_loop(self.create_new_agent_async, config, **more)

    async def create_new_agent_async(self, config: str | Mapping[str, Any] | None = None, **more: Any) -> Agent:
        values = {**(config if isinstance(config, Mapping) else {"name": config}), **more}
        live, warnings = await self.open().create(values, values.pop("base_url", None), values.pop("api_key", None))
        for warning in warnings:
            logger.warning("agent %s: %s", live.name, warning)
        self.agent = await live.fresh()
        return self.agent

    def load_agent(self, agent_name: str) -> Agent:
        """The agent of that name. Raises Refused with the ten nearest names."""
        return self._run_on_loop(self.load_agent_async, agent_name)

    async def load_agent_async(self, agent_name: str) -> Agent:
        self.agent = await (await self.open().get(agent_name)).fresh()
        return self.agent

    def run_step(self, user_message: str, first_message: bool = False, no_verify: bool = False) -> list[JSON]:
        """One turn of `agent`: its stored events as wire dicts (MemGPT 0.2.7, websocket_server.py, run_step).

        first_message asks that the first reply goes through send_message, and tries again where it does not; no_verify
        skips that. Raises Refused (no_agent), or with the code of a message that never became a turn.
        """
        return self._run_on_loop(self.run_step_async, user_message, first_message, no_verify)

    async def run_step_async(
        self, user_message: str, first_message: bool = False, no_verify: bool = False
    ) -> list[JSON]:
        if self.agent is None:
            raise Refused("no_agent", "no agent has been initialized; create_new_agent or load_agent first")
        item = Turn(new_turn_id(), clean_text(user_message), verify=first_message and not no_verify)
        live = await self.open().get(self.agent.name)
        await live.ready()
        live.enqueue(item)
        await asyncio.shield(item.done)  # a caller that waits no longer does not end it
        return [decode_json(event.text) async for event in live.events(0, live.last_seq, item.turn_id)]

    def _run_on_loop(self, function: Callable[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a coroutine function on the server's loop, which is made where there is none yet."""
        if self._loop is None:
            self.claim()
            self.open()
            self._thread = LoopThread("memws")
            self._loop = self._thread.loop
        elif running_loop() is self._loop:
            raise UsageError(f"this call would block the server's own loop; there, await {function.__name__}")
        return result_of(asyncio.run_coroutine_threadsafe(function(*args, **kwargs), self._loop))


# ======================================================================================================================
# 12. CLI: arguments, the terminal client, main
# ======================================================================================================================

# ---- the terminal client ---------------------------------------------------------------------------------------------

# Input is read on the main thread, because only there an interrupt reaches a line being typed; what others make the
# agent do is shown by the connection's thread.

EDITORS = "sensible-editor", "nano", "vi", "notepad"
PASTE = "\x1b[200~", "\x1b[201~"  # what a terminal sets around what is pasted, where it is asked to
STYLES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
FORMS = {  # how events are shown: by message type, or type, the line and its style; {text} is the whole message
    "internal_monologue": ("~ {text}", "dim"),
    "assistant_message": ("{agent_name}: {text}", ""),
    "user_message": ("{from}: {text}", "cyan"),
    "tool_call": ("> {name}({message})", "dim"),
    "approval_request": ("? {name}({message})", "yellow"),
    "tool_return": ("< {message}", "dim"),
    "memory_change": ("[{label}, changed by the {by}]", "dim"),
    "context": ("[context: {warning}]", "yellow"),
    **dict.fromkeys(("compaction", "heartbeat", "retry", "correction"), ("[{kind}: {message}]", "dim")),
    **dict.fromkeys(("queue", "progress"), ("[{kind}: {message}]", "dim")),
    "agent_change": ("[{agent_name}: {message}]", "dim"),
    "agent_response_end": ("[{stop_reason}]", "yellow"),
    "agent_response_error": ("error: {text}", "red"),
}

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """A text of others as it may reach a terminal: control and direction characters are escaped, lines stay."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text).replace("\r\n", "\n"))


def clipped(text: object, length: int = 160) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


class Screen:
    """The terminal: streamed text, whole lines, and the prompt, which comes again below what others do."""

    def __init__(self, out: typing.TextIO) -> None:
        self._colour = out.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        if self._colour and os.name == "nt":
            os.system("")  # noqa: S605, S607 (a classic console shows colours once cmd.exe has run in it)
        self._out, self._prompt = out, ""
        self._line: object = None  # what the current line holds: the prompt, or a text by turn, step and kind
        self._streamed: dict[object, str] = {}  # texts so far: their stored events say them again

    def write(self, text: str, style: str = "") -> None:
        """Add to the current line; everything on the screen is made printable here."""
        text = printable(text)
        painted = f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and self._colour else text
        print(painted, end="", file=self._out, flush=True)

    def end_line(self) -> None:
        if self._line:
            self.write("\n")
        self._line = None

    def line(self, text: str, style: str = "") -> None:
        """Write a whole line, below streamed text or the prompt, which is repeated with what is typed behind it."""
        self.end_line()
        self.write(f"{text}\n", style)
        if self._prompt:
            typed = sys.modules["readline"].get_line_buffer() if "readline" in sys.modules else ""
            self.write(self._prompt + typed)
            self._line = self._prompt

    def ask(self, prompt: str) -> str:
        """Read a line from the user; what is pasted is one line. Raises EOFError and KeyboardInterrupt."""
        self.end_line()
        self._prompt = self._line = prompt = printable(prompt)
        try:
            text = input(prompt)
            # A console of Windows does not mark pastes, but holds what is left of one.
            console = importlib.import_module("msvcrt") if os.name == "nt" else None
            while text.count(PASTE[0]) > text.count(PASTE[1]) or (console and console.kbhit()):
                text += f"\n{input()}"
        finally:
            self._prompt = ""
        self._line = None
        return text.replace(PASTE[0], "").replace(PASTE[1], "")

    def show(self, event: Frame) -> None:
        """Show an event of the user's own turn as it comes: text while it is being made, all else a line each."""
        kind, text = event.get("of") or kind_of(event), str(event.get("message"))
        line = event.get("turn_id"), event.get("step"), kind
        if "of" in event:
            if line != self._line:
                self.end_line()
                self.write(FORMS[kind][0].format(agent_name=event.get("agent_name"), text=""), "bold")
            self.write(text, FORMS[kind][1])
            self._line = line
            self._streamed[line] = self._streamed.get(line, "") + text
        elif kind != "user_message" and text not in self._streamed.get(line, ""):
            self.show_line(event)

    def show_line(self, event: Frame) -> None:
        """Show an event as FORMS has it; of types that are not there, and of what goes without saying, nothing."""
        kind, has_failed = kind_of(event), event.get("status") == "Failed"
        is_reply = event.get("name") == "send_message" or (kind == "tool_return" and event.get("message") == "None")
        is_usual = event.get("stop_reason") == "done" or event.get("reason") == HEARTBEAT_REQUESTED
        is_silent = is_usual or (is_reply and not has_failed) or (kind == "context" and "warning" not in event)
        if kind not in FORMS or is_silent:
            return
        if isinstance(arguments := event.get("arguments"), dict):
            event = {**event, "message": encode_json(without_heartbeat(arguments))}
        form, style = FORMS[kind]
        texts = {"kind": kind, "label": "archival memory", "from": "someone", "text": event.get("message")}
        texts |= {key: clipped(value) for key, value in event.items()}
        self.line(form.format_map(collections.defaultdict(str, texts)), "red" if has_failed else style)
        for line in str(event.get("diff") or "").splitlines()[:8]:
            self.line(f"{line[:1]} {clipped(line[1:])}", "red" if line.startswith("-") else "green")


class Chat:
    """A conversation on the terminal: lines are sent, and `/name` is the method do_name, its docstring the help."""

    def __init__(self, client: BlockingClient, screen: Screen) -> None:
        self.client, self.screen = client, screen
        self._own_turns: set[str] = set()
        self._leaves = False  # at the next Ctrl-C

    def run(self, agent_name: str) -> None:
        """Talk until the user leaves, first with this agent; offer to create it where it is not there."""
        about = self.client.hello(["delta", *FORMS])
        server = f"memws {about['version']} at {self.client.client.url}"
        self.screen.line(f"{server}, model {about['model']}; /help lists the commands", "dim")
        if about.get("offline"):
            self.screen.line("the model is offline: a rule-based stand-in, not a language model", "yellow")
        if os.environ.get("TERM") != "dumb":
            edit_lines()
        with contextlib.suppress(EOFError):
            try:
                self.do_load(agent_name)
            except RemoteError as error:
                if error.code != "unknown_agent":
                    raise
                question = f"there is no agent {agent_name!r}; create it? [Y/n] "
                if self.screen.ask(question).strip().lower() in ("", "y", "yes"):
                    self.do_new(agent_name)
            while True:
                self._take_line()
        self.screen.end_line()

    def _take_line(self) -> None:
        """One line from the user, and what it asks for. Raises EOFError where it is to leave."""
        try:
            text = self.screen.ask(f"{self.client.agent_name or ''}> ").strip()
            self._leaves = False
            if re.fullmatch("/(?!/).*", text):  # one line
                name, _, rest = text[1:].partition(" ")
                if not (work := getattr(self, f"do_{name}", None)):
                    raise MemwsError(f"there is no /{name}; /help lists what there is")
                work(rest.strip())
            elif text and self.client.agent_name is None:
                self.screen.line("no agent yet: /new NAME creates one, /load NAME loads one", "yellow")
            elif text:
                self._talk(re.sub("^//(?=.*$)", "/", text))
        except KeyboardInterrupt:
            if self._leaves:
                raise EOFError from None
            self._leaves = True
            self.screen.line("[Ctrl-C again, or Ctrl-D, leaves]", "dim")
        except MemwsError as error:
            if not self.client.client.alive:  # it has given up
                raise
            self.screen.line(str(error), "red")

    def _talk(self, text: str) -> None:
        """Send a message and show its turn; Ctrl-C cancels it, a second one leaves."""
        turn_id = secrets.token_hex(16)
        self._own_turns.add(turn_id)
        turn: BlockingStream | None = None
        while True:
            try:
                turn = turn or self.client.send(text, turn_id=turn_id)  # again where an interrupt met it: it runs once
                if self._leaves:
                    turn.cancel()
                for event in turn:
                    self.screen.show(event)
                    if kind_of(event) == "approval_request":
                        self._answer_request(event)
                self._leaves = False
                return
            except KeyboardInterrupt:
                if self._leaves:
                    raise
                self._leaves = True

    def _answer_request(self, event: Frame) -> None:
        """Ask the user whether a call may run; any text but y or n is the reason why not."""
        said = self.screen.ask(f"may {event['name']} run? [y/N, or why not] ").strip()
        allow, reason = said.lower() in ("y", "yes"), "" if said.lower() in ("n", "no") else said
        with contextlib.suppress(RemoteError):  # somebody else has answered
            about = {"tool_call_id": event["tool_call_id"], "agent_name": event["agent_name"]}
            self.client.command("approve", allow=allow, reason=reason, **about)

    def _switch(self, command: str, **arguments: Any) -> None:
        """Enter an agent, and show from now on what others make it do."""
        previous, result = self.client.agent_name, self.client.command(command, **arguments)
        model = f", model {result['model']}" if "model" in result else " created"
        self.screen.line(f"[{clipped(result['agent_name'] + model)}]", "dim")
        for warning in result["warnings"]:
            self.screen.line(f"[warning: {clipped(warning, 400)}]", "yellow")
        if previous is not None:
            self.client.command("unsubscribe", agent_name=previous)
        # What a command makes the agent tell comes before its answer, and so above the next prompt.
        self.client.subscribe(on_event=self._show_others)

    def _show_others(self, event: Frame) -> None:
        if event.get("turn_id") not in self._own_turns:
            self.screen.show_line(event)

    def _block(self, label: str) -> Frame:
        """A block of core memory. Raises MemwsError with the labels."""
        blocks: dict[str, Frame] = {each["label"]: each for each in self.client.command("get_agent")["blocks"]}
        if label not in blocks:
            raise MemwsError(f"there is no block {quote(label)}; name one of {', '.join(blocks)}")
        return blocks[label]

    # -- the slash commands --

    def do_agents(self, rest: str) -> None:
        """the agents of this server"""
        for agent in all_agents(self.client):
            mark = "*" if agent["agent_name"] == self.client.agent_name else "-"
            about = f"{agent['model']}, {agent['state']}, last active {local_time(agent['last_active'])}"
            self.screen.line(clipped(f"{mark} {agent['agent_name']}  {about}"))

    def do_load(self, name: str) -> None:
        """NAME: talk to this agent"""
        self._switch("load_agent", name=name)

    def do_new(self, name: str) -> None:
        """[NAME]: create an agent and talk to it"""
        self._switch("create_agent", config={"name": name or None})

    def do_rename(self, name: str) -> None:
        """NAME: give the agent another name"""
        self.client.command("rename_agent", new_name=name)

    def do_delete(self, name: str) -> None:
        """[NAME]: delete an agent, once you have said yes"""
        name = self.client.command("get_agent", agent_name=name or None)["agent_name"]
        if self.screen.ask(f"delete {name}? [y/N] ").strip().lower() in ("y", "yes"):
            self.client.command("delete_agent", agent_name=name)
            self.screen.line(f"[/restore {name} brings it back]", "yellow")

    def do_restore(self, name: str) -> None:
        """NAME: bring back a deleted agent and talk to it"""
        self.do_load(self.client.command("restore_agent", agent_name=name)["agent_name"])

    def do_fork(self, name: str) -> None:
        """[NAME]: copy the agent with all that it knows, and talk to the copy"""
        self.do_load(self.client.command("fork_agent", new_name=name or None)["agent_name"])

    def do_rewind(self, count: str) -> None:
        """[COUNT]: take back so many turns; without a number, list the last ones"""
        messages = self.client.command("get_messages", limit=200)["messages"]
        turns = list({message["turn_id"]: message for message in messages[::-1]}.values())  # each by what it began with
        if count.isdecimal() and int(count) < len(turns):
            kept_as = self.client.command("rewind_agent", turn_id=turns[int(count)]["turn_id"])["kept_as"]
            self.screen.line(f"[/load {kept_as} goes on as it was]", "yellow")
            return
        for place, message in reversed(list(enumerate(turns[:10], 1))):
            self.screen.line(f"{place:7} {local_time(message['time'])} {clipped(message['text'], 80)}")

    def do_memory(self, label: str) -> None:
        """[LABEL]: what the agent keeps in core memory, or in one block of it"""
        for block in [self._block(label)] if label else self.client.command("get_agent")["blocks"]:
            self.screen.line(f"{block['label']} ({len(block['value'])} of {block['limit']} characters)", "bold")
            self.screen.line(block["value"])

    def do_edit(self, label: str) -> None:
        """LABEL: change a block of core memory in your editor ($VISUAL, $EDITOR)"""
        block = self._block(label)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt", delete=False) as file:
            file.write(f"{block['value']}\n")
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or next(filter(shutil.which, EDITORS), "vi")
        try:
            if os.system(f'{editor} "{file.name}"'):  # noqa: S605 (the user's own command, and a path of ours)
                raise MemwsError(f"{editor} failed; set EDITOR to another one")
            text = pathlib.Path(file.name).read_text("utf-8-sig").removesuffix("\n")
            self.client.command("set_block", label=label, value=text, version=block["version"])
        except (MemwsError, OSError, ValueError) as error:
            raise MemwsError(f"{error}; what you wrote is in {file.name}") from error
        pathlib.Path(file.name).unlink()

    def do_context(self, rest: str) -> None:
        """what fills its context window"""
        context = self.client.command("get_context")
        for section in context["sections"]:
            self.screen.line(f"{section['tokens']:7} {section['name']}")
        self.screen.line(f"{context['used']:7} of {context['window']} tokens", "bold")

    def do_search(self, words: str) -> None:
        """WORDS: search recall and archival memory"""
        zone = find_zone(self.client.command("get_agent")["settings"]["timezone"])
        result = self.client.command("search_memory", query=words)
        for item in result["items"]:
            origin = " ".join(filter(None, (item["store"], item["role"], local_time(item["time"], zone))))
            self.screen.line(f"[{origin}] {clipped(item['text'], 400)}")
        self.screen.line(f"[{len(result['items'])} of {result['total']}]", "dim")

    def do_help(self, rest: str) -> None:
        """this list"""
        for name in filter(re.compile("do_").match, dir(self)):
            self.screen.line(f"/{name[3:]:10}{getattr(self, name).__doc__}")
        self.screen.line("Ctrl-C cancels a running turn; twice leaves. A message that begins with a slash: write two.")

    def do_quit(self, rest: str) -> None:
        """leave (also Ctrl-D)"""
        raise EOFError


def all_agents(client: BlockingClient) -> list[Frame]:
    """The agents of the server, in its order."""
    agents: list[Frame] = []
    while page := client.command("list_agents", after=agents[-1]["agent_name"] if agents else None)["agents"]:
        agents += page
    return agents


def edit_lines() -> None:
    """Line editing, and a history from chat to chat, where Python has readline."""
    with contextlib.suppress(ImportError, OSError):  # Windows; no home that can be written
        import atexit
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # Python's default is off
        if "libedit" in str(readline.__doc__):  # as on macOS: let the marks be keys that type themselves
            for mark in PASTE:
                readline.parse_and_bind(f'bind -s "{mark}" "\x16{mark}"')
            print("\x1b[?2004h", end="", flush=True)
            atexit.register(print, "\x1b[?2004l", end="", flush=True)
        path = pathlib.Path(os.path.expanduser("~/.memws_history"))  # noqa: PTH111 (the other raises RuntimeError)
        path.touch(0o600)
        readline.set_history_length(1_000)
        atexit.register(readline.write_history_file, path)
        readline.read_history_file(path)


def chat_command(*, url: str, agent: str | None, token: str | None) -> None:
    """talk to an agent from this terminal; piped input is answered once"""
    is_terminal = sys.stdin.isatty()
    screen = Screen(sys.stdout if is_terminal else sys.stderr)
    logger.addHandler(logging.NullHandler())  # else Python prints our warnings over the conversation
    options: JSON = {"on_state": lambda state: screen.line(f"[connection {state}]", "dim")}
    with connect(url, token, reconnect=True if is_terminal else 60.0, **options) as client:
        if agent is None:  # the one that was active last
            agents = sorted(all_agents(client), key=lambda each: each["last_active"] or "")
            agent = str(agents[-1]["agent_name"]) if agents else "sam"
        if is_terminal:
            Chat(client, screen).run(agent)
            return
        if not (text := sys.stdin.read().strip()):
            raise MemwsError("nothing to send: standard input is empty; pipe a message in")
        try:
            client.load_agent(agent)
        except RemoteError as error:
            if error.code != "unknown_agent":
                raise
            client.create_agent(agent)
            print(f"there was no agent {printable(agent)!r}; it has been created", file=sys.stderr)
        print(printable(client.ask(text)))


# ---- the other commands ----------------------------------------------------------------------------------------------


class _LogFormatter(logging.Formatter):
    """Control characters escaped, further lines indented, and without what looks like a key or the token."""

    def __init__(self, token: str | None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._secrets = [secret for secret in (token, os.environ.get("OPENAI_API_KEY")) if secret]

    def format(self, record: logging.LogRecord) -> str:
        text = printable(super().format(record)).replace("\n", "\n    ")
        for secret in self._secrets:
            text = text.replace(secret, "…")
        return re.sub(_PRIVATE, "…", text)


def serve_command(*, log_level: str, **options: Any) -> None:
    """serve agents over WebSocket: the default, with the options below"""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise UsageError(f"log_level: expected debug, info, warning or error, but got {quote(log_level)}")
    handler = logging.StreamHandler()
    handler.setFormatter(_LogFormatter(options["token"]))
    logger.addHandler(handler)
    logger.setLevel(level)
    _ws_logger.setLevel(max(level, logging.INFO))
    with contextlib.suppress(ImportError, OSError, ValueError):  # a descriptor a connection, where the system allows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(options["max_connections"] + 256, hard)), hard))
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.set_threshold(2_000, 10, 100)  # by default all waits up to 0.1 s every few seconds, until it has seen all
    for name in ("allow_origin", "allow_host"):
        options[name] = options[name] or os.environ.get(f"MEMWS_{name.upper()}") or ()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what runs in the background
    for name in {"SIGTERM", "SIGBREAK"} & vars(signal).keys():  # Windows: Ctrl-Break, with which programs stop others
        signal.signal(getattr(signal, name), lambda *_: signal.raise_signal(signal.SIGINT))
    WebSocketServer(**options).run()


def check_command(*, db: str) -> int:
    """look for damage in the database and its agents"""
    faults = list(check_database(db))
    print(*map(printable, faults or ("no damage found", *table_sizes(db))), sep="\n")
    return 1 if faults else 0


def vacuum_command(*, keep_requests: float, db: str) -> None:
    """give disk space back: what was purged, and old exact requests"""
    if not 0 <= keep_requests <= 36_500:
        raise UsageError(f"--keep-requests: expected from 0 to 36,500 days, but got {keep_requests}")
    print(f"{database_at(db).path}: {vacuum_database(db, keep_requests) / 1000:,.1f} kB given back")


def export_command(name: str, file: str | None = None, *, db: str) -> None:
    """write one agent, memory and history, as one JSON file"""
    with read_database(db) as database:
        data = encode_json(export_agent(database, name)).encode() + b"\n"  # whatever the console's encoding
    if file is None:
        sys.stdout.buffer.write(data)
    else:
        with new_file(file) as path:
            path.write_bytes(data)


def import_command(file: str, *, name: str | None, db: str) -> None:
    """store an agent that export wrote; - is standard input"""
    try:
        data = decode_json(sys.stdin.buffer.read() if file == "-" else pathlib.Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {file!r} ({error}); give a file that export wrote") from None
    with contextlib.closing(database_at(db)) as database:
        name = import_agent(database.open(), data, name)
    print(f"agent {name!r} is in {database.path}")


def backup_command(file: str, *, db: str) -> None:
    """copy the database, also while a server runs"""
    database = database_at(db)
    if isinstance(database, Postgres):
        raise UsageError(f"a program of PostgreSQL makes its backups; run {database.dump_command(file)}")
    with new_file(file) as path, read_database(db), usable(file, "name another file"), contextlib.closing(database):
        database.back_up(str(path))
    print(f"{db} is copied to {file}", file=sys.stderr)


def copy_command(*, from_: str, to: str) -> None:
    """copy all agents from one database to another, a file or a postgresql:// address"""
    told = time.monotonic()
    try:
        for done in copy_database(from_, to):
            if time.monotonic() - told >= PROGRESS_DELAY:
                told = time.monotonic()
                counts = [f"{done[what]:,} of {done[f'all {what}']:,} {what}" for what in ("agents", "rows")]
                print(f"memws: copied {', '.join(counts)}", file=sys.stderr, flush=True)
    except UsageError as error:
        raise UsageError(str(error).replace("--db", "--from or --to")) from error
    except StoreFailed as error:
        raise UsageError(f"{error}; run the same copy again: it goes on from here") from error
    print(f"{done['agents']:,} agents with {done['rows']:,} rows are in {database_at(to).path}")


@contextlib.contextmanager
def new_file(path: str) -> Iterator[pathlib.Path]:
    """A file to be filled, for its owner only, which becomes `path` once it is whole. Raises UsageError."""
    target = pathlib.Path(path)
    try:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = pathlib.Path(folder, "part")
            part.touch(0o600)
            yield part
            part.rename(target)
    except OSError as error:
        raise UsageError(f"cannot write {path!r} ({error.strerror}); name a file that does not exist yet") from error


def protocol_command() -> None:
    """print the protocol as JSON Schema"""
    print(encode_json(protocol_schema(known_commands())))


def tell_progress(command: str, over: threading.Event) -> None:
    """Say every PROGRESS_DELAY how long a command has been at work."""
    begun = time.monotonic()
    while not over.wait(PROGRESS_DELAY):
        print(f"memws: {command}, {time.monotonic() - begun:.0f} s so far", file=sys.stderr, flush=True)


# ---- the command line ------------------------------------------------------------------------------------------------

# A command is a function: its docstring is the help, its parameters are words, and those by keyword alone are flags.

SERVING: dict[str, Any] = {each.name: each for each in fields(Options) if each.name != "api_key"}
FLAGS = SERVING | {
    "log_level": option("info", "debug, info, warning or error"),
    "url": option(f"ws://localhost:{DEFAULT_PORT}", "the server's address"),
    "agent": option(None, "the agent to talk to"),
    "name": option(None, "another name for the agent, where its own is taken"),
    "keep_requests": option(36_500, "how long exact requests are kept", float, "DAYS"),
    "from_": option("", "the database to copy", word="DB"),
    "to": option("", "where to: an empty one, or an earlier copy", word="DB"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"argument --([\w-]+)(.*)", message, re.DOTALL):
            message = f"--{match[1]} or MEMWS_{match[1].upper().replace('-', '_')}{match[2]}"
        raise UsageError(f"{message}; {self.prog} --help tells what there is")

    def add_flag(self, name: str) -> None:
        """A flag --some-name, or else MEMWS_SOME_NAME, which serve_command reads where the flag may be repeated."""
        word, default, about = name.rstrip("_"), FLAGS[name].default, FLAGS[name].metadata
        flag, variable = f"--{word.replace('_', '-')}", f"MEMWS_{word.upper()}"
        more: JSON = {"metavar": about["word"] or word.rpartition("_")[2].upper(), "type": about["kind"]}
        more |= {"action": "append"} if default == () else {"default": os.environ.get(variable) or default}
        more["required"] = more.get("default") == ""
        shown = f" (default {default})" if default else ""
        self.add_argument(flag, dest=name, help=f"{about['help']}{shown}; {variable}", **more)


def make_parser(first: str = "") -> Parser:
    """The command line, or just the command that is its first word; `run` of what it parses is that one's function."""
    about = (__doc__ or "").partition("\n")[0]
    parser = Parser(prog="memws.py", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"memws {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    keeping = check_command, export_command, import_command, backup_command, vacuum_command, copy_command
    every = serve_command, chat_command, *keeping, protocol_command
    for function in [each for each in every if each.__name__ == f"{first}_command"] or every:
        name, meaning = function.__name__.removesuffix("_command"), function.__doc__
        command = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        command.set_defaults(run=function)
        for word in inspect.signature(function).parameters.values():
            if word.kind is word.KEYWORD_ONLY:
                command.add_flag(word.name)
            elif word.kind is word.VAR_KEYWORD:
                for name in SERVING:
                    command.add_flag(name)
            else:
                command.add_argument(word.name, nargs=None if word.default is word.empty else "?")
    parser.epilog = "" if first in commands.choices else commands.choices["serve"].format_help()
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit status: 0, 1 for a failed chat or damage, 2 for what cannot be done as asked."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "serve")
    for stream in (sys.stdin, sys.stdout):  # a name or an answer may hold what the console's encoding does not
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    over = threading.Event()
    try:
        flags = vars(make_parser(words[0]).parse_args(words))
        if words[0] in ("check", "vacuum", "export", "import", "backup"):
            threading.Thread(target=tell_progress, args=[words[0], over], daemon=True).start()
        status: int | None = flags.pop("run")(**flags)
        print(end="", flush=True)  # standard output may be closed
        return status or 0
    except MemwsError as error:
        print(f"memws: {printable(error)}", file=sys.stderr)
        return 2 if isinstance(error, (UsageError, Refused, ConnectFailed)) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # of standard output: it is full, or its reader has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is to be flushed at exit
        print(f"memws: cannot write to standard output ({error.strerror}); send it elsewhere", file=sys.stderr)
        return 2
    finally:
        over.set()


if __name__ == "__main__":
    sys.exit(main())
