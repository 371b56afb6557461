"""Tools: schemas from signatures and docstrings, arguments checked and mended, results bounded, failures as advice."""

import asyncio
import collections
import functools
import inspect
import itertools
import json
import math
import re
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from agents import Lab, Told, results
from endpoint import Body, Endpoint, Reply, check
from pydantic import BaseModel, Field, create_model, field_validator

import memws
from memws import MEMORY_TOOLS, Agent, ToolError, make_tool

pytestmark = pytest.mark.anyio

LIMIT = 20.0  # seconds after which a tool that does not end fails its test
MARKS = {"OK": "Success", "Failed": "Error"}
SAID = ("send_message", {"message": "Wait."})
HEARTBEAT = {"type": "boolean", "description": "run again right after this call"}


def book(
    city: str,
    nights: Annotated[int, 1, 30],
    room: Literal["single", "double"] = "single",
    guests: list[str] | None = None,
) -> str:
    """Book a room
    for a guest.

    Args:
        city: where to stay
    """
    return f"{city} {nights} {room} {guests}"


USAGES = [
    "send_message(message)", "core_memory_append(name, content)", "core_memory_replace(name, old_content, new_content)",
    "conversation_search(query, page?)", "conversation_search_date(start_date, end_date, page?)",
    "archival_memory_insert(content)", "archival_memory_search(query, page?)", "pause_heartbeats(minutes)",
]  # fmt: skip


def test_a_tool_is_its_function() -> None:
    tool = make_tool(book)
    assert (tool.name, tool.timeout) == ("book", memws.TOOL_TIMEOUT)
    properties = {
        "city": {"type": "string"},
        "nights": {"type": "integer", "minimum": 1, "maximum": 30},
        "room": {"enum": ["single", "double"], "default": "single"},
        "guests": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        "request_heartbeat": HEARTBEAT,
    }
    parameters = {"type": "object", "properties": properties, "required": ["city", "nights"]}
    about = {"name": "book", "description": inspect.getdoc(book), "parameters": parameters}
    assert json.loads(tool.spec) == {"type": "function", "function": about}
    bare, part = make_tool([].clear, "other-name", 3), make_tool(functools.partial(book, nights=2), "book_two")
    specs = [json.loads(each.spec) for each in (tool, bare, part, *MEMORY_TOOLS.values())]
    assert specs[1]["function"]["parameters"]["properties"] == {"request_heartbeat": HEARTBEAT}
    assert (bare.timeout, bare.usage) == (3, "other-name()")
    assert specs[2]["function"]["parameters"]["required"] == ["city"]
    check({"model": "m", "tools": specs, "messages": [{"role": "user", "content": "x"}]})
    assert [tool.usage for tool in MEMORY_TOOLS.values()] == USAGES
    for about in (spec["function"] for spec in specs[3:]):
        asks = "request_heartbeat" in about["parameters"]["properties"]
        assert (asks, bool(about["description"])) == (about["name"] not in ("send_message", "pause_heartbeats"), True)


def größe() -> None: ...


class Room(Enum):
    SMALL = "small"
    LARGE = "large"


class Size(Enum):
    """Its values are no JSON that could be read again."""

    KING = (180, 200)


@dataclass(slots=True)
class Guest:
    name: str
    born: date | None = None


@dataclass
class Party:
    room: Room
    guests: list[Guest]


class Place(NamedTuple):
    x: int
    y: str = "y"


class Note(NamedTuple):
    about: Any


@dataclass
class Notes:
    rest: Any
    title: str = "Notes"


class Stay(BaseModel):
    """A stay."""

    rooms: set[Room]
    nights: Annotated[int, Field(ge=1, description="how long")] = 1
    next: "Stay | None" = None

    @field_validator("nights")
    @classmethod
    def check_nights(cls, nights: int) -> int:
        if nights == 13:
            raise ValueError("13 brings bad luck")
        return nights


CAT, DOG = (create_model(kind, kind=(Literal[kind], ...)) for kind in ("cat", "dog"))
DAY, NULL, TEXT = date(2026, 1, 31), {"type": "null"}, {"type": "string"}
GUEST = {"name": TEXT, "born": {"anyOf": [TEXT | {"format": "date"}, NULL], "default": None}}
READ: list[tuple[Any, Body | None, list[tuple[Any, Any]]]] = [  # hint, schema, what a model sends and a tool gets
    (Room, TEXT | {"enum": ["small", "large"]}, [("large", Room.LARGE), ('"small"', Room.SMALL)]),
    (Annotated[Room, "which"], TEXT | {"enum": ["small", "large"], "description": "which"}, [("large", Room.LARGE)]),
    (date, TEXT | {"format": "date"}, [("2026-01-31", DAY)]), (Decimal, None, [("1.10", Decimal("1.10"))]),
    (datetime, TEXT | {"format": "date-time"}, [("2026-01-31T10:00:00Z", datetime(2026, 1, 31, 10, tzinfo=UTC))]),
    (list[Guest], {"type": "array", "items": {"type": "object", "properties": GUEST, "required": ["name"]}},
     [([{"name": "Zoe", "born": "2026-01-31"}], [Guest("Zoe", DAY)]), ('[{"name": "Zoe"}]', [Guest("Zoe")]),
      (['{"name": "Zoe"}'], [Guest("Zoe")])]), (list["Guest"], None, [([{"name": "Zoe"}], [Guest("Zoe")])]),
    (tuple[Party, Party], None, [([{"room": "small", "guests": []}] * 2, (Party(Room.SMALL, []),) * 2)]),
    (Stay, None, [({"rooms": ["small"], "next": '{"rooms": []}'}, Stay(rooms={Room.SMALL}, next=Stay(rooms=set())))]),
    (Annotated[CAT | DOG, Field(discriminator="kind")], None, [({"kind": "dog"}, DOG(kind="dog"))]),
    (list[Note], {"type": "array", "items": {"type": "array", "minItems": 1, "maxItems": 1,
     "items": {"anyOf": [memws.ANYTHING]}}}, [([["x"]], [Note("x")])]),
    (Notes, {"type": "object", "properties": {"rest": memws.ANYTHING, "title": TEXT | {"default": "Notes"}},
             "required": ["rest"]}, [({"rest": 1}, Notes(1)), ({"rest": 1, "title": None}, Notes(1))]),
    (Place, None, [([1], Place(1)), ({"x": 1, "y": "z"}, Place(1, "z"))]), (Path, None, [("a", Path("a"))]),
    (set[int], None, [([1, "2", 2], {1, 2}), ("[1]", {1})]), (tuple[int, str], None, [([1, "x"], (1, "x"))]),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}, [("[1, 2]", (1, 2))]),
    (UUID, None, [(str(UUID(int=5)), UUID(int=5))]), (dict[int, str], None, [({"1": "x"}, {1: "x"})]),
    (list[Room] | None, None, [(None, None), (["small"], [Room.SMALL])]),
    (Annotated[int, Field(gt=3, description="more")],
     {"type": "integer", "exclusiveMinimum": 3, "description": "more"}, [("4", 4)]),
    (Annotated[str, "a city"] | None, {"anyOf": [TEXT | {"description": "a city"}, NULL]}, [("Oslo", "Oslo")]),
    (Any, memws.ANYTHING, [("x", "x"), ([1], [1]), (None, None)]), (dict, {"type": "object"}, [('{"a": 1}', {"a": 1})]),
    (list[str], None, [('["tea"]', ["tea"]), ("['tea']", ["tea"])]), (bool, {"type": "boolean"}, [("True", True)]),
    (int, None, [("3", 3), (3.0, 3), ("3.0", 3)]), (float, None, [("1.5", 1.5)]),
    (Annotated[int, 1, 9, "n"], {"type": "integer", "minimum": 1, "maximum": 9, "description": "n"}, [("9", 9)]),
    (int | None, None, [("7", 7), ("None", None)]), (list, None, [(["x", 1], ["x", 1])]),
    (int | str, None, [("5", "5"), (5, 5)]), (list[int], None, [("[1]", [1]), (["1"], [1])]),
    (list[list[Any]], None, [([[1]], [[1]])]), (Literal[1, 2], None, [(2, 2)]),
]  # fmt: skip


def tool_of(hint: Any) -> memws.Tool:
    def tool(value: Any) -> None: ...

    tool.__annotations__["value"] = hint
    return make_tool(tool)


@pytest.mark.parametrize(("hint", "schema", "pairs"), READ, ids=lambda value: str(value)[:40])
def test_any_hint_is_a_schema_and_a_value(hint: Any, schema: Body | None, pairs: list[tuple[Any, Any]]) -> None:
    """A parameter's schema is one that endpoints take, and what a model sends becomes what the hint says."""
    made = tool_of(hint)
    spec = json.loads(made.spec)
    assert "$" not in made.spec
    check({"model": "m", "tools": [spec], "messages": [{"role": "user", "content": "x"}]})
    assert spec["function"]["parameters"]["properties"]["value"] == schema or schema is None
    for sent, meant in pairs:
        (value,) = made.bind({"value": sent}, lenient=True).values()
        assert (value, type(value)) == (meant, type(meant))


WRONG: list[tuple[Any, Any, str]] = [
    (Room, "huge", 'value: expected {"enum":["small","large"],"type":"string"}, but got \'huge\'; tool(value)'),
    (list[Guest], [{"name": "Zoe", "born": "soon"}], 'value: 0: born: expected {"anyOf":[{"format":"date",'),
    (list[Guest], [{}], 'value: 0: name: expected {"type":"string"}, but got [{}]; tool(value)'),
    (Stay, {"rooms": [], "nights": 13}, "value: nights: 13 brings bad luck, but got {"),
    (date, "tomorrow", 'value: expected {"format":"date","type":"string"}, but got \'tomorrow\''),
    (Annotated[int, Field(gt=3)], 3, 'value: expected {"exclusiveMinimum":3,"type":"integer"}, but got 3'),
    (list[int] | None, ["x"], "value: expected a list, each item an integer or null, but got ['x']"),
    (list[int], None, "value: expected a list, but got None"),
]  # fmt: skip


def test_a_wrong_argument_is_told_in_words() -> None:
    """A model reads which argument is wrong, what was expected there and what came, and nothing of pydantic's."""
    for hint, sent, words in WRONG:
        with pytest.raises(memws.InvalidRequest) as caught:
            tool_of(hint).bind({"value": sent}, lenient=True)
        assert str(caught.value).startswith(words)
        assert not re.search("http|pydantic|validation|Input should", str(caught.value))


def test_null_is_the_default() -> None:
    """null, also as text, is the default of a parameter that cannot be null, and null where it can."""

    def tool(a: int = 5, b: str = "x", c: int | None = 3, d: Room = Room.SMALL) -> None: ...

    assert make_tool(lambda a=math.inf: a, "endless").usage == "endless(a?)"  # and no JSON says that default
    bind = make_tool(tool).bind
    for sent in (None, "null", "None"):
        assert bind(dict.fromkeys("abd", sent), lenient=True) == {}
    assert bind({"c": None}, lenient=True) == bind({"c": "null"}, lenient=True) == {"c": None}


class Desk:
    """A desk that is called."""

    def __call__(self, guest: Guest) -> str:
        return guest.name

    def ring(self, times: int = 1) -> str:
        """Ring
        the bell.

        Rules: never at night.

        :param times: how often
        """
        return "ring" * times


def positional(a: int, /) -> None: ...
def many(*names: str) -> None: ...
def field(city: str = Field(description="a city")) -> None: ...
def lost(a: "Nowhere") -> None: ...  # type: ignore[name-defined] # noqa: F821
def sized(size: Size) -> None: ...
def fixed(size: Literal[Room.SMALL]) -> None: ...
def odd(call: Callable[[], None], agent: int = 5) -> None: ...


REFUSED: list[tuple[Any, str]] = [
    (Desk.ring, "'ring': no model can fill in 'self'"), (Desk, "Desk is a class; register a function, or an object"),
    (positional, "no model can fill in 'a: int'"), (many, r"no model can fill in '\*names: str'"),
    (len, "'len': no model can fill in"), (max, "cannot read the signature of 'max'"),
    (field, "put pydantic's Field into Annotated"), (lost, "cannot read the signature of 'lost': name 'Nowhere'"),
    (sized, "'sized': size: no model can write"), (fixed, "'fixed': size: no model can write"),
    (odd, "'odd': call: no model can write"), (größe, "'größe'"), (lambda c: c, "lambda"), (3, "expected a function"),
]  # fmt: skip


def test_objects_are_tools_and_what_no_model_can_call_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of objects and objects that are called work, with all that their authors wrote; the rest says why not."""
    tools = [make_tool(each) for each in (Desk(), Desk().ring, functools.partial(Desk().ring, times=2))]
    assert [tool.name for tool in tools] == ["Desk", "ring", "ring"]
    assert [tool.usage for tool in tools] == ["Desk(guest)", *["ring(times?)"] * 2]
    assert [tool.doc for tool in tools] == ["A desk that is called.", *[inspect.getdoc(Desk.ring)] * 2]
    for function, words in REFUSED:
        with pytest.raises(memws.UsageError, match=words):
            make_tool(function)
    größe.__doc__ = "\ud800"
    assert make_tool(größe, "size").spec.encode()
    for timeout in (0, -1, math.nan, "5", None):
        with pytest.raises(memws.UsageError, match="timeout: expected seconds, more than 0, but got"):
            make_tool(book, timeout=timeout)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert make_tool(book).parameters["required"] == ["city", "nights"]
    with pytest.raises(memws.UsageError, match=r"'sized': size: .*Size.* needs pydantic: pip install pydantic"):
        make_tool(sized)


async def outcome(function: Callable[..., Any], timeout: float = LIMIT, **arguments: Any) -> str:
    """What the model is told of a call, within a limit that only a fault reaches."""
    async with asyncio.timeout(2 * LIMIT):
        return await memws.call_tool(make_tool(function, name="tool", timeout=timeout), arguments)


async def failure(function: Callable[..., Any], timeout: float = LIMIT) -> str:
    with pytest.raises(ToolError) as caught:
        await outcome(function, timeout)
    return str(caught.value)


SLOTTED = type("Slotted", (), {"__slots__": ["_hidden", "x"]})()
SLOTTED.x = {1}
CYCLE: list[Any] = []
CYCLE.append(CYCLE)
WEB = [SimpleNamespace(web={}) for _ in range(30)]
for node in WEB:
    node.web = dict(enumerate(WEB))  # there are more ways through it than can be gone


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class Leaving(BaseException):
    def __str__(self) -> str:
        raise SystemExit


RESULTS: list[tuple[Any, str | None]] = [
    ("sunny", "sunny"), ("", ""), (None, "None"), (5, "5"), (True, "true"), ((1, 2), "[1,2]"), (b"raw\xff", "raw\\xff"),
    ({"a": [1, None], "é": "日"}, '{"a":[1,null],"é":"日"}'), ({1}, "[1]"), (float("nan"), "nan"),
    ({"x": float("inf")}, '{"x":"inf"}'), ({(1, 2): 3, 4: 5}, '{"[1,2]":3,"4":5}'), ("a\x00b\ud800", "a\ufffdb\ufffd"),
    (["\ud83d\ude00"], '["\U0001f600"]'), ("x" * 8_000, "x" * 8_000),
    (functools.reduce(lambda inner, _: [inner], range(100_000), list[Any]()), "[" * 65 + '"…"' + "]" * 65),
    (CYCLE, '["…"]'), ({Unprintable()}, None), ([Unprintable()], None), (DAY, "2026-01-31"), (Room.LARGE, "large"),
    ({"a": [Decimal("1.10"), UUID(int=1), Path("a/b"), Room.LARGE]}, f'{{"a":["1.10","{UUID(int=1)}","a/b","large"]}}'),
    ({DAY: {DAY}, "by": Guest("Zoe", DAY)}, '{"2026-01-31":["2026-01-31"],"by":{"name":"Zoe","born":"2026-01-31"}}'),
    ([Stay(rooms={Room.LARGE}), Place(1, "x")], '[{"rooms":["large"],"nights":1,"next":null},{"x":1,"y":"x"}]'),
    (range(3), "[0,1,2]"), (SLOTTED, '{"x":[1]}'),
    (array("d", [1.5]), "[1.5]"), (SimpleNamespace(a={1: b"x"}), '{"a":{"1":"x"}}'), (ValueError("no"), "no"),
]  # fmt: skip


async def one() -> Any:
    await asyncio.sleep(0)
    return 1


@functools.wraps(one)
def decorated() -> Any:
    return one()


def promised() -> Any:
    promise: Future[int] = Future()
    promise.set_result(1)
    return promise


def pieces() -> Iterator[Any]:
    yield from (1, DAY)


async def slow_pieces() -> AsyncIterator[Any]:
    for piece in pieces():
        await asyncio.sleep(0)
        yield piece


async def endless() -> AsyncIterator[str]:
    while True:
        yield "word"


class Waiting:
    def __await__(self) -> Iterator[None]:
        yield
        return 1  # type: ignore[return-value]

    async def __call__(self) -> Any:
        return Waiting()


PIECES = '[1,"2026-01-31"]'
LEFT_OUT = "characters left out here; they are not kept"
RESULTS += [  # of functions
    (decorated, "1"), (lambda: one(), "1"), (functools.partial(decorated), "1"), (promised, "1"),
    (Waiting(), "1"), (lambda: asyncio.sleep(0, one()), "1"), (pieces, PIECES), (slow_pieces, PIECES),
    (lambda: asyncio.sleep(0, pieces()), PIECES), (lambda: {"all": map(str, range(2))}, '{"all":["0","1"]}'),
]  # fmt: skip


async def later(result: object) -> object:
    return result


@pytest.mark.parametrize(("result", "text"), RESULTS, ids=range(len(RESULTS)))
async def test_results_become_text(result: Any, text: str | None) -> None:
    """A text stays, what has yet to run is run, all else is JSON as far as it can be; what has no text has failed."""
    functions = [result] if callable(result) else [lambda: result, functools.partial(later, result)]
    for function in functions:
        if text is None:
            assert await failure(function)
        else:
            assert await outcome(function) == text


async def test_what_hides_in_a_result_is_not_run() -> None:
    hidden = one()
    assert "the result holds a coroutine that was never awaited" in await failure(lambda: [hidden])
    hidden.close()


LONG: list[tuple[Callable[[], Any], str]] = [
    (itertools.count, "… and more"), (endless, "… and more"), (lambda: WEB, "… and more"),
    (lambda: "x" * 1_000_000, LEFT_OUT), (lambda: ["word"] * 200_000, LEFT_OUT), (lambda: "日" * 8_001, LEFT_OUT),
]  # fmt: skip


@pytest.mark.parametrize(("function", "sign"), LONG)
async def test_a_long_result_is_cut(function: Callable[[], Any], sign: str) -> None:
    """A result has up to 8,000 characters, and a note that there was more."""
    told = await outcome(lambda: function())
    assert (sign in told, 8_000 <= len(told) <= 8_200) == (True, True)


async def test_a_tool_that_blocks_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """An async tool that keeps the loop from running is named in the log with the seconds; one that waits is not."""

    async def blocks() -> None:
        await asyncio.sleep(0)
        time.sleep(memws.TOOL_STEP)  # noqa: ASYNC251

    await asyncio.gather(outcome(blocks), outcome(lambda: time.sleep(memws.TOOL_STEP)))
    (warning,) = (record.getMessage() for record in caplog.records)
    assert re.match(r"tool tool blocked the server for \d+\.\d s", warning)


ERRORS: list[tuple[BaseException, str]] = [
    (ValueError("no such city"), "ValueError: no such city"), (RuntimeError(), "RuntimeError"),
    (TimeoutError("the host did not answer"), "the host did not answer"), (memws.Refused("busy", "later"), "later"),
    (ToolError("try a smaller number"), "try a smaller number"), (SystemExit(3), "SystemExit"),
    (asyncio.CancelledError(), "ancelled"), (ExceptionGroup("two", [ValueError("a"), ValueError("b")]), "two"),
    (Unprintable(), "Unprintable"), (Leaving(), "Leaving"), (ValueError("x" * 100_000), "ValueError: xxx"),
    (ValueError("\ud800\x00\x1b"), "ValueError: "), (StopIteration(5), "StopIteration"),
    (KeyboardInterrupt(), "KeyboardInterrupt"), (GeneratorExit(), "GeneratorExit"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "words"), ERRORS, ids=lambda value: type(value).__name__)
async def test_whatever_a_tool_raises_is_advice(error: BaseException, words: str) -> None:
    """Whatever a sync or async tool raises, the model is told its name and text, in bounds, and nothing else ends."""

    def sync() -> None:
        raise error

    async def later() -> None:
        await asyncio.sleep(0)
        raise error

    of_threads = isinstance(error, (StopIteration, KeyboardInterrupt, GeneratorExit))
    for function in (sync,) if of_threads else (sync, later):
        text = await failure(function)
        assert (words in text, "took longer" in text, len(text) <= memws.MAX_ERROR + 10) == (True, False, True)
        assert memws.encode_json(text).encode()


async def test_tools_that_are_late_or_gone(endpoint: Endpoint) -> None:
    """A tool given up, or not registered any more, fails its call and no turn; a thread goes on, its result dropped."""
    release, threads, ended = threading.Event(), list[threading.Thread](), list[bool]()

    def blocking() -> str:
        threads.append(threading.current_thread())
        release.wait(LIMIT)
        return "too late"

    async def slow() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(True)

    async def stopping() -> None:
        waiting = asyncio.create_task(asyncio.Event().wait())
        waiting.cancel()
        await waiting

    async with Lab(endpoint, tools=[blocking, slow, stopping], timeout=0.05) as lab:
        agent = await lab.create()
        endpoint.script(Reply(calls=[("blocking", {}), ("slow", {}), SAID]), Reply(calls=[("stopping", {})]))
        assert (await lab.say(agent, "Hi")).replies == ["Wait.", "Hello!"]
        (thread,) = threads
        assert (ended, thread.name, thread.daemon, thread.is_alive()) == ([True], "memws-tool-blocking", True, True)
        release.set()
        late = [f"Failed: {name} took longer than 0.05 s and was given up" for name in ("blocking", "slow")]
        failed = "Failed: stopping was cancelled by something it called"
        assert results(endpoint.requests[2]) == [*late, "OK: None", failed]
        del lab.tools["slow"]
        agent = await lab.open()
        assert agent.warnings == ["tools that are not registered now are left out: slow"]
        assert (await lab.say(agent, "Again")).replies == ["Hello!"]
        assert "slow" not in [tool["function"]["name"] for tool in endpoint.requests[-1]["tools"]]
        assert "too late" not in endpoint.bodies[-1].decode()


def test_the_decorator_registers_and_replaces(online: Callable[..., Any], endpoint: Endpoint) -> None:
    """@server.tool leaves the function as it is; its results, and errors as advice, go to model and client.

    Wrong calls run none; agents in use call the newest tool of a name; memory tools stay.
    """
    server, ran = online(), list[Any]()

    @server.tool
    def add(a: int, b: int = 2) -> Body:
        """Add two numbers."""
        ran.append((a, b))
        return {"sum": a + b}

    @server.tool
    def broken(x: int) -> None:
        raise LookupError(f"no {x}")

    async def shout(text: str) -> str:
        await asyncio.to_thread(ran.append, text)
        return text.upper()

    assert server.tool(name="loud", timeout=5)(shout) is shout
    assert add(1) == {"sum": 3}
    with pytest.raises(memws.UsageError, match="'send_message' is a memory tool"):
        server.tool(add, name="send_message")
    expected: list[tuple[str, Body, str, str]] = [
        ("add", {"a": "40"}, "OK", '{"sum":42}'),
        ("add", {"a": "many"}, "Failed", "a: expected an integer, but got 'many'; add(a, b?)"),
        ("loud", {"text": "hey"}, "OK", "HEY"),
        ("broken", {"x": 5}, "Failed", "LookupError: no 5"),
        ("ad", {}, "Failed", f"unknown tool 'ad'; tools: {', '.join(MEMORY_TOOLS)}, add, broken, loud"),
    ]
    server.create_new_agent({"name": "sam", "tools": ["add", "broken", "loud"]})
    endpoint.script(Reply("I try.", calls=[row[:2] for row in expected]))
    turn = Told(server.run_step("Go"))
    words = [(f"Running {name}({given})", f"{MARKS[status]}: {text}") for name, given, status, text in expected]
    assert turn.texts("function_message")[:10] == list(itertools.chain(*words))
    returns = [(frame["status"], frame["message"]) for frame in turn.of("tool_return") if frame["duration_ms"] >= 0]
    assert returns[:5] == [row[2:] for row in expected]
    assert results(endpoint.requests[1]) == [f"{status}: {text}" for _, _, status, text in expected]
    assert (ran, turn.texts("heartbeat")) == ([(1, 2), (40, 2), "hey"], [memws.HEARTBEAT_FAILED])
    assert turn.replies == ["Hello!"]
    (function,) = (each["function"] for each in endpoint.requests[0]["tools"] if each["function"]["name"] == "add")
    assert (function["description"], function["parameters"]["required"]) == ("Add two numbers.", ["a"])
    server.tool(lambda text: "new", name="loud")
    endpoint.script(Reply(calls=[("loud", {"text": "hey"})]))
    server.run_step("Go on")
    assert results(endpoint.requests[-1])[-1] == "OK: new"


def test_a_tool_knows_its_agent(online: Callable[..., Any], endpoint: Endpoint) -> None:
    """A parameter for the agent is filled in and no model sees it: the to-do lists of two agents are two.

    A tool that begins a turn of its agent is refused; one that cancels its task ends its turn, and no other.
    """
    server, todo = online(), collections.defaultdict[str, list[str]](list)

    @server.tool
    def add(item: str, agent: memws.Agent) -> str:
        todo[agent.name].append(item)
        agent.blocks.clear()  # of a copy
        return f"{agent.name}: {todo[agent.name]}, {agent.blocks['human'].value}"

    @server.tool
    async def count(agent: "memws.Agent | None" = None) -> int:
        return len(todo[agent.name]) if agent else -1

    @server.tool
    async def nest(agent: memws.Agent) -> None:
        await agent.turn(memws.Turn("nested", "Hi"))

    @server.tool
    async def cancel() -> None:
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await asyncio.sleep(0)

    for name in ("ada", "bob"):
        server.create_new_agent({"name": name, "human": f"I am {name}", "tools": ["add", "count", "nest", "cancel"]})
        endpoint.script(Reply(calls=[("add", {"item": "tea", "agent": "eve"}), ("count", {})]))
        server.run_step("Go")
        assert results(endpoint.requests[-1]) == [f"OK: {name}: ['tea'], I am {name}", "OK: 1"]
    specs = {tool["function"]["name"]: tool["function"]["parameters"] for tool in endpoint.requests[0]["tools"]}
    assert (specs["add"]["required"], list(specs["count"]["properties"])) == (["item"], ["request_heartbeat"])
    endpoint.script(Reply(calls=[("nest", {})]), Reply(calls=[("cancel", {})]))
    assert Told(server.run_step("Go")).stop_reason == "interrupted"
    assert Told(server.run_step("Go on")).replies == ["Hello!"]
    nested = "Failed: Refused: agent 'bob' is in a turn; wait for its end"
    assert results(endpoint.requests[-1])[-2:] == [nested, "Failed: interrupted: result unknown"]


async def call(lab: Lab, agent: Agent, name: str, /, **arguments: Any) -> tuple[Told, str]:
    """A turn in which the model makes one call, and what the model then reads as its result."""
    turn = await lab.say(agent, "Go on", Reply(calls=[(name, arguments)]))
    return turn, results(lab.endpoint.requests[-1])[-1]


def listed(result: str) -> list[Body]:
    """The items of a page of results; none where there is no page."""
    return list(json.loads(result.split(": ", 2)[2])) if "Showing" in result else []


LINES = "Name: Zoe\nWife: Anna\nTown: Oslo"
EDITS: list[tuple[str, str | None, str, str]] = [  # a block, old_content (None: append), new_content; the block then,
    # or what is advised
    ("", None, "Name: Zoe", "Name: Zoe"), (LINES, None, "Pet: Rex", f"{LINES}\nPet: Rex"), (LINES, "Zoe", "Zoe", LINES),
    (LINES, "Oslo", "Bergen", "Name: Zoe\nWife: Anna\nTown: Bergen"), ("Name: Zoe", "Name: Zoe", "", ""),
    (LINES, "Wife: Anna", "", "Name: Zoe\nTown: Oslo"), (LINES, "\nTown: Oslo", "", "Name: Zoe\nWife: Anna"),
    (LINES, "Name: Zoe\n", "", "Wife: Anna\nTown: Oslo"), (LINES, "Zoe\n", "Ada", "Name: Ada\nWife: Anna\nTown: Oslo"),
    ("A  \n  B\n\nC", "B", " \n", "A  \n\nC"), ("tea, cake", ", cake", "", "tea"), ("a b", " b", "\nb", "a\nb"),
    ("It\u2019s\u00a0me  \r\nOslo\u2019s", "It's me\nOslo", "x", "x\u2019s"),
    ("Oslo \u2014 \u201chome\u201d", 'Oslo - "home"', "y", "y"), ("A\tB", " A  B \n", "C", "C"),
    ("Caf\u00e9 X", "Cafe\u0301", "Bar", "Bar X"), ("Cafe\u0301 X", "Caf\u00e9", "Bar", "Bar X"),
    ("\ufeffze\u200bro cups\u3000of tea", "zero cups of", "a cup of", "\ufeffa cup of tea"),
    ("\u6211\u4f4f\u5728\u5317\u4eac", "\u5317\u4eac", "\u4e0a\u6d77", "\u6211\u4f4f\u5728\u4e0a\u6d77"),
    ("Sister: Anna\nWife: Anna", "Anna", "Eva", "stands in the block 2 times; give more of the line"),
    ("Born 1993, 3 cats", "3", "4", "2 times"), ("Anna\u00a0B\nAnna B", "Anna  B", "C", "2 times"),
    ("Born 1993", "3", "4", "part of a word or number"), ("1,500 m", "500", "9", "part of"),
    ("3.5 m", "3", "4", "part of"), ("Bikes", "ikes", "x", "part of"), ("Ber\u00adgen", "Ber", "x", "part of"),
    ("\u0939\u093f\u0928\u094d", "\u0939\u093f", "x", "part of"), ("Cafe\u0301", "Cafe", "Bar", "not in"),
    (LINES, "City: Oslo", "x", "not in the block; .* the nearest line is: Town: Oslo"),
    (LINES, "Name: Zoe\nWife: Ana", "x", "the nearest line is: Wife: Anna"), ("Zoe's cat", "Zoe", "Ada", "Ada's cat"),
    (LINES, "\n", "x", "holds$"), ("a b", "  ", "x", "holds$"), ("", "", "y", "holds$"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "old", "new", "expected"), EDITS, ids=range(len(EDITS)))
async def test_core_memory_is_edited(lab: Lab, block: str, old: str | None, new: str, expected: str) -> None:
    """Appending adds a line; what old_content means is edited where it is in one place, as it looks to people.

    So it is in memory, on disk and told; else nothing is.
    """
    agent = await lab.create(human=block)
    if old is None:
        turn, result = await call(lab, agent, "core_memory_append", name="human", content=new)
    else:
        texts = {"old_content": old, "new_content": new}
        turn, result = await call(lab, agent, "core_memory_replace", name="human", **texts)
    assert result == "OK: None" or re.search(expected, result), result
    after = expected if result == "OK: None" else block
    told = [(change["before"], change["after"], change["diff"], change["by"]) for change in turn.of("memory_change")]
    was, is_now = block.splitlines(), after.splitlines()
    diff = [f"-{line}" for line in was if line not in is_now] + [f"+{line}" for line in is_now if line not in was]
    assert told == [(block, after, "\n".join(diff), "agent")] * (after != block)
    assert agent.blocks["human"] == memws.Block("human", after, version=1 + (after != block))
    assert (await lab.open()).blocks == agent.blocks


WRONG_CALLS = [
    ("core_memory_append", {"name": "dog", "content": "x"}, "no core memory block 'dog'; blocks: persona, human"),
    ("core_memory_append", {"name": "human", "content": "x" * 2_001}, "limited to 2,000 characters.* 2,001.*shorten"),
    ("archival_memory_insert", {"content": " "}, "content is empty"), ("archival_memory_insert", "[1]", "no JSON obj"),
    ("archival_memory_insert", {"content": "x" * 65_537}, "at most 65,536 characters, but got 65,537"),
    ("conversation_search_date", {"start_date": "soon", "end_date": ""}, "a day like 2026-01-31.*'soon'"),
    ("conversation_search_date", {"start_date": "", "end_date": "9999-12-31"}, "a day like 2026-01-31.*'9999-12-31'"),
    ("conversation_search", {}, r"conversation_search needs 'query': conversation_search\(query, page\?\)"),
    ("conversation_search", {"query": "x", "page": "one"}, "page: expected an integer, but got 'one'; conversation_"),
    ("conversation_search", {"q": "x", "limit": 5}, r"conversation_search needs 'query': conversation_search\("),
    ("send_message", {"message": 5}, "message: expected a string, but got 5; send_message"),
    ("pause_heartbeats", {"minutes": 1.5}, "minutes: expected an integer, but got 1.5"),
    ("archival_memory_insert", "no JSON", "the arguments are no JSON object: 'no JSON'"),
    ("archival_memory_insert", f'{{"content": {"[" * 900}1{"]" * 900}}}', "the arguments are no JSON object: "),
    ("send_email", {"to": "x"}, "unknown tool 'send_email'; tools: send_message, core_memory_append"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "advice"), WRONG_CALLS)
async def test_a_wrong_call_gets_advice_and_changes_nothing(lab: Lab, name: str, arguments: Any, advice: str) -> None:
    """Each wrong call of a memory tool fails with a sentence that tells how to call right; the user gets a reply."""
    agent = await lab.create(context_window=200_000)
    blocks = dict(agent.blocks)
    turn = await lab.say(agent, "Go on", Reply(calls=[(name, arguments)]))
    result = results(lab.endpoint.requests[-1])[-1]
    assert re.match("Failed: .*" + advice, result), result
    assert turn.of("tool_return")[0]["status"] == "Failed"
    assert turn.texts("function_message")[1] == result.replace("Failed", "Error", 1)
    assert (turn.texts("heartbeat"), turn.replies) == ([memws.HEARTBEAT_FAILED], ["Hello!"])
    assert (agent.blocks, agent.memory.archival, turn.of("memory_change")) == (blocks, 0, [])


async def test_archival_memory(lab: Lab, agent: Agent) -> None:
    """Passages kept in one step are all found in the next turn, with their day, by other forms of their words."""
    fact = "Zoe climbs the Galdhøpiggen every June."
    inserts = [("archival_memory_insert", {"content": text}) for text in (fact, "Fact 2", "x" * memws.MAX_TEXT)]
    lab.endpoint.script(Reply(calls=[*inserts, ("core_memory_append", {"name": "human", "content": "Name: Zoe"})]))
    turn = await lab.say(agent, "Go on")
    changes = [(change["what"], change.get("id"), change["before"]) for change in turn.of("memory_change")]
    assert changes == [("archival", 1, None), ("archival", 2, None), ("archival", 3, None), ("core", None, "")]
    assert (turn.of("memory_change")[0]["after"], agent.memory.archival) == (fact, 3)
    _, result = await call(lab, agent, "archival_memory_search", query="climbing Galdhøpiggen")
    assert result.startswith("OK: Showing 1 of 1 results (page 0 of 0): ")
    (item,) = listed(result)
    assert (item["text"], set(item)) == (fact, {"time", "text"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", item["time"])
    _, result = await call(lab, agent, "archival_memory_search", query="bicycle")
    assert result == "OK: No results found in archival memory for 'bicycle'."
    _, result = await call(lab, agent, "archival_memory_search", query="")
    assert max(len(item["text"]) for item in listed(result)) < memws.SEARCH_TEXT_LIMIT + 100


@pytest.mark.parametrize("tools", [[book]], ids=["book"])
async def test_what_tools_returned_is_no_recall_memory(lab: Lab, agent: Agent) -> None:
    """A search finds what was said, as the prompt says, and what a tool returned only where somebody said it."""
    await lab.say(agent, "Book it", Reply(calls=[("book", {"city": "Bergen", "nights": 2})]), Reply("Done!"))
    await lab.say(agent, "Where?", Reply("In Bergen."))
    _, result = await call(lab, agent, "conversation_search", query="Bergen")
    assert (listed(result)[0]["role"], listed(result)[0]["text"]) == ("assistant", "In Bergen.")
    assert {item["role"] for item in listed(result)} == {"assistant", "user"}
    assert "Recall memory is all that the user and you have said" in memws.SYSTEM_PROMPT


async def test_conversation_search_pages_through_the_past(lab: Lab, agent: Agent) -> None:
    """Recall memory finds what both said, page by page, but nothing of this turn or of another agent."""
    other = await lab.create("ada", human="Name: Ada")
    lab.endpoint.script(Reply(calls=[("archival_memory_insert", {"content": "The secret is 42"})]))
    await lab.say(other, "My secret locker is 42")
    for number in range(12):
        await lab.say(agent, f"My locker has the number {number}")
    texts: list[str] = []
    for page in (0, "1", 2):
        _, result = await call(lab, agent, "conversation_search", query="locker", page=page)
        found = re.match(r"OK: Showing (\d+) of \d+ results \(page (\d+) of 2\): ", result)
        assert found
        assert (len(listed(result)), int(page)) == (int(found[1]), int(found[2]))
        texts += [item["text"] for item in listed(result) if item["role"] == "user" and "locker" in item["text"]]
    assert sorted(texts) == sorted(f"My locker has the number {number}" for number in range(12))
    for name, query in (("conversation_search", "zeppelin"), ("archival_memory_search", "secret")):
        lab.endpoint.script(Reply(calls=[(name, {"query": query})]))
        await lab.say(agent, f"Where is my {query}?")
        assert query not in str([item["text"] for item in listed(results(lab.endpoint.requests[-1])[-1])])
    await call(lab, agent, "core_memory_append", name="human", content="Name: Zoe")
    assert (await lab.open("ada")).blocks["human"].value == "Name: Ada"


async def test_conversation_search_date_lists_days(lab: Lab, agent: Agent) -> None:
    """Messages are listed by day, both days inclusive, the newest first; the state says until when heartbeats rest."""
    when, words = "2024-05-06T23:59:00.000Z", "Old words"
    old = memws.ChatMessage(1, "user", when, words, '{"role":"user","content":"{}"}', said=words)
    await lab.store.write(memws.commit, agent.record.id, memws.Changes([], [old], columns={"state": {"cut": 2**53}}))
    agent = await lab.open()
    await lab.say(agent, "New words")
    for first, last, expected in (
        ("2020-01-01", "2099-12-31", ["New words", "Old words"]),
        ("2024-05-06", "2024/05/06", ["Old words"]),
        ("2024-05-07T01:59:00+02:00", "2024-05-06T23:59:00Z", ["Old words"]),
        ("2024-05-06T23:59:00.5Z", "2024-05-08", []),
        ("2024-05-08", "2024-05-06", []),
    ):
        _, result = await call(lab, agent, "conversation_search_date", start_date=first, end_date=last)
        assert [item["text"] for item in listed(result) if item["text"].endswith("words")] == expected
        assert expected or result == "OK: No results found in recall memory."
    for minutes, paused in ((30, 30), (-5, 0), (2**70, 360)):
        before = time.time()
        _, result = await call(lab, agent, "pause_heartbeats", minutes=minutes)
        assert result == f"OK: Pausing timed heartbeats for {paused} min"
        kept = (await lab.open()).memory
        assert kept.messages
        assert before + 60 * paused <= kept.record.state["paused_until"] <= time.time() + 60 * paused


DAYS = {  # timezone: a day, its first minute and its last in UTC
    "America/Los_Angeles": ("2026-03-08", "2026-03-08T08:00", "2026-03-09T06:59"),  # of 23 hours
    "America/Havana": ("2026-11-01", "2026-11-01T04:00", "2026-11-02T04:59"),  # which has midnight twice
    "Africa/Cairo": ("2026-04-24", "2026-04-23T22:00", "2026-04-24T20:59"),  # which has no midnight
    "Pacific/Kiritimati": ("2026-01-02", "2026-01-01T10:00", "2026-01-02T09:59"),
}


@pytest.fixture
def move(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts the machine into another timezone, until the test has ended."""

    def set_zone(zone: str) -> None:
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    yield set_zone
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("zone", DAYS)
async def test_days_are_the_agents(lab: Lab, zone: str, own: bool, move: Callable[[str], None]) -> None:
    """A day begins and ends by the clock of the agent's timezone, or the machine's; the model reads that clock."""
    if not own:
        move(zone)
    agent = await lab.create(timezone=zone if own else None)
    day, first, last = DAYS[zone]
    edges = [datetime.fromisoformat(f"{edge}Z") + timedelta(minutes=add) for edge, add in ((first, -1), (last, 1))]
    times = [edges[0], *(datetime.fromisoformat(f"{edge}Z") for edge in (first, last)), edges[1]]
    stored = [f"{when:%Y-%m-%dT%H:%M:00.000Z}" for when in times]
    documents = [memws.Document(number, "recall", "user", when, when) for number, when in enumerate(stored, -9)]
    event = memws.response("context", "")
    await lab.store.write(memws.commit, agent.record.id, memws.Changes([event], documents=documents))
    _, result = await call(lab, await lab.open(), "conversation_search_date", start_date=day, end_date=day)
    local = [f"{when.astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M}" for when in times]
    assert [(item["time"], item["text"]) for item in listed(result)] == list(zip(local, stored, strict=True))[2:0:-1]
    found = await call(lab, await lab.open(), "conversation_search", query=f"{datetime.fromisoformat(day):%d %B %Y}")
    assert listed(found[1])[-1]["text"] == stored[0]  # the day after counts as well
    now = json.loads(lab.endpoint.requests[-1]["messages"][-1]["content"])["time"]
    told = datetime.strptime(re.sub(" [^ ]+([+-]....)$", r"\1", now), "%Y-%m-%d %I:%M:%S %p%z")
    assert told.utcoffset() == datetime.now(ZoneInfo(zone)).utcoffset()
    assert abs(told - datetime.now(UTC)) < timedelta(minutes=1)
