"""Tools: schemas from signatures and docstrings, arguments checked and mended, results bounded, failures as advice."""

import asyncio
import functools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from agents import Lab, results
from endpoint import Endpoint, Reply, check

import memws
from memws import ToolError, call_tool, check_arguments, make_tool

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
jsonschema = pytest.importorskip("jsonschema")

JSON = dict[str, Any]
LIMIT = 20.0
"""Seconds after which a tool that does not end fails its test."""

HEARTBEAT = {"type": "boolean", "description": "run again right after this call"}


# ---- schemas ---------------------------------------------------------------------------------------------------------


def book(
    city: str,
    nights: int,
    budget: float,
    breakfast: bool,
    room: Literal["single", "double"],
    guests: list[str],
    ages: tuple[int, ...],
    pair: tuple[int, str],
    extras: dict[str, int],
    either: int | str,
    old_style: Union[int, None],  # noqa: UP007 (both spellings are understood)
    maybe: Optional[str] = None,  # noqa: UP045
    stars: "int | None" = None,
    note: Annotated[str, "free text"] = "none",
    rate: float = 1.5,
    late: bool = False,
    anything: object = (),
    bare=3,  # type: ignore[no-untyped-def]
) -> str:
    """Book a room
    for a guest.

    More that the model is not told.

    Args:
        city: where to stay,
            in any country
        nights (int): how many nights
    :param budget: at most so much
    """
    return ""


def test_schema_comes_from_signature_and_docstring() -> None:
    """A tool's schema holds each parameter's type, default and meaning, and what is needed."""
    tool = make_tool(book)
    assert (tool.name, tool.function, tool.builtin, tool.timeout) == ("book", book, False, memws.TOOL_TIMEOUT)
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where to stay, in any country"},
            "nights": {"type": "integer", "description": "how many nights"},
            "budget": {"type": "number", "description": "at most so much"},
            "breakfast": {"type": "boolean"},
            "room": {"enum": ["single", "double"]},
            "guests": {"type": "array", "items": {"type": "string"}},
            "ages": {"type": "array", "items": {"type": "integer"}},
            "pair": {"type": "array"},
            "extras": {"type": "object"},
            "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
            "old_style": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "stars": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "note": {"type": "string", "default": "none"},
            "rate": {"type": "number", "default": 1.5},
            "late": {"type": "boolean", "default": False},
            "anything": {},
            "bare": {"default": 3},
            "request_heartbeat": HEARTBEAT,
        },
        "required": [
            "city", "nights", "budget", "breakfast", "room", "guests", "ages", "pair", "extras", "either", "old_style",
        ],
    }  # fmt: skip
    assert json.loads(tool.spec) == {
        "type": "function",
        "function": {"name": "book", "description": "Book a room for a guest.", "parameters": tool.parameters},
    }
    jsonschema.Draft202012Validator.check_schema(tool.parameters)


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (None.__class__, {"type": "null"}),
        (list, {"type": "array"}),
        (set, {"type": "array"}),
        (dict, {"type": "object"}),
        (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
        (Sequence[float], {"type": "array", "items": {"type": "number"}}),
        (Iterable[bool], {"type": "array", "items": {"type": "boolean"}}),
        (Mapping[str, str], {"type": "object"}),
        (Literal[1, "a", None], {"enum": [1, "a", None]}),
        (Any, {}),
        (bytes, {}),
        (Endpoint, {}),
    ],
)
def test_schema_of(hint: Any, schema: JSON) -> None:
    """Each type that is understood has its schema; every other is unchecked."""
    assert memws.schema_of(hint) == schema


def test_a_function_without_words_is_a_tool() -> None:
    """A function without docstring, annotations or parameters has a schema that an endpoint takes."""

    def tick():  # type: ignore[no-untyped-def]
        pass

    tool = make_tool(tick, name="other-name", timeout=3)
    assert (tool.name, tool.timeout) == ("other-name", 3)
    assert tool.parameters == {"type": "object", "properties": {"request_heartbeat": HEARTBEAT}, "required": []}
    check({"model": "m", "tools": [json.loads(tool.spec)], "messages": [{"role": "user", "content": "x"}]})


def star(*names: str) -> None: ...
def stars(**names: str) -> None: ...
def positional(name: str, /) -> None: ...
def heartbeat(request_heartbeat: bool) -> None: ...
def unknown(name: "NoSuchType") -> None: ...  # type: ignore[name-defined]  # noqa: F821
def größe() -> None: ...
def plain(name: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "name", "sentence"),
    [
        (star, None, "tool 'star': the parameter 'names' cannot be passed by name"),
        (stars, None, "tool 'stars': the parameter 'names' cannot be passed by name"),
        (positional, None, "tool 'positional': the parameter 'name' cannot be passed by name"),
        (heartbeat, None, "tool 'heartbeat': request_heartbeat is added by memws itself"),
        (unknown, None, "cannot read the annotations of tool 'unknown'"),
        (größe, None, "a tool's name must match [a-zA-Z0-9_-]{1,64}, but got 'größe'"),
        (lambda: None, None, "a tool's name must match [a-zA-Z0-9_-]{1,64}, but got '<lambda>'"),
        (plain, "two words", "a tool's name must match [a-zA-Z0-9_-]{1,64}, but got 'two words'"),
        (plain, "x" * 65, "a tool's name must match [a-zA-Z0-9_-]{1,64}, but got 'xxx"),
        (functools.partial(plain, "a"), None, "a tool"),
        (len, None, "tool 'len': the parameter 'obj' cannot be passed by name"),
        (3, None, "a tool"),
    ],
)
def test_what_no_model_could_call_is_refused(function: Any, name: str | None, sentence: str) -> None:
    """A function that no model could call is refused with a sentence that names what is wrong."""
    with pytest.raises(memws.UsageError) as caught:
        make_tool(function, name=name)
    assert str(caught.value).startswith(sentence)


def test_callables_with_a_name_are_tools() -> None:
    """A partial function and a bound method are tools like any other."""

    class Desk:
        def ring(self, times: int) -> str:
            """Ring the bell."""
            return "ding " * times

    tool = make_tool(functools.partial(book, nights=2), name="book_two")
    assert "city" in tool.parameters["required"]
    ring = make_tool(Desk().ring)
    assert ring.parameters["required"] == ["times"]
    assert list(ring.parameters["properties"]) == ["times", "request_heartbeat"]


def test_memory_tools_keep_memgpts_names_and_parameters() -> None:
    """The memory tools have MemGPT 0.2.7's names and parameters, and request_heartbeat where it makes sense."""
    found = {
        name: (
            [key for key in tool.parameters["properties"] if key != "request_heartbeat"],
            tool.parameters["required"],
        )
        for name, tool in memws.MEMORY_TOOLS.items()
    }
    assert found == {
        "send_message": (["message"], ["message"]),
        "core_memory_append": (["name", "content"], ["name", "content"]),
        "core_memory_replace": (["name", "old_content", "new_content"], ["name", "old_content", "new_content"]),
        "conversation_search": (["query", "page"], ["query"]),
        "conversation_search_date": (["start_date", "end_date", "page"], ["start_date", "end_date"]),
        "archival_memory_insert": (["content"], ["content"]),
        "archival_memory_search": (["query", "page"], ["query"]),
        "pause_heartbeats": (["minutes"], ["minutes"]),
    }
    asks = {name for name, tool in memws.MEMORY_TOOLS.items() if "request_heartbeat" in tool.parameters["properties"]}
    assert memws.MEMORY_TOOLS.keys() - asks == {"send_message", "pause_heartbeats"}
    specs = [json.loads(tool.spec) for tool in memws.MEMORY_TOOLS.values()]
    assert all(spec["function"]["description"] for spec in specs)
    check({"model": "m", "tools": specs, "messages": [{"role": "user", "content": "x"}]})


# ---- arguments -------------------------------------------------------------------------------------------------------


def typed(hint: Any) -> memws.Tool:
    """A tool with one parameter `value` of that type."""

    def tool(value: Any) -> None: ...

    tool.__annotations__ = {"value": hint}
    return make_tool(tool)


@pytest.mark.parametrize(
    ("hint", "value", "taken"),
    [
        (str, "", ""),
        (str, "3", "3"),
        (int, 3, 3),
        (int, "3", 3),
        (int, " -3 ", -3),
        (int, 3.0, 3),
        (int, 2**53 + 1, 2**53 + 1),
        (int, 1234567890123456789, 1234567890123456789),
        (int, "1234567890123456789", 1234567890123456789),
        (float, 3, 3.0),
        (float, "3.5", 3.5),
        (float, -0.1, -0.1),
        (bool, True, True),
        (bool, "false", False),
        (Literal["a", "b"], "b", "b"),
        (list[int], [1, "2", 3.0], [1, 2, 3]),
        (list, ["a", 1, None], ["a", 1, None]),
        (tuple[int, str], [1, "a"], [1, "a"]),
        (dict, {"a": [1]}, {"a": [1]}),
        (int | None, None, None),
        (int | None, "5", 5),
        (str | None, "null", "null"),
        (int | str, "00501", "00501"),
        (int | str, 5, 5),
        (str | list[str], ["a"], ["a"]),
        (Any, {"any": ["thing"]}, {"any": ["thing"]}),
    ],
)
def test_arguments_that_fit_are_taken(hint: Any, value: Any, taken: Any) -> None:
    """A value of the type is taken as it is; numbers and booleans that a model wrote as text are read."""
    checked = check_arguments(typed(hint), {"value": value})
    assert checked == {"value": taken}
    assert type(checked["value"]) is type(taken)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (str, 3, "string"),
        (str, None, "string"),
        (str, ["a"], "string"),
        (int, 3.5, "integer"),
        (int, "three", "integer"),
        (int, "3.5", "integer"),
        (int, "", "integer"),
        (int, True, "integer"),
        (int, None, "integer"),
        (int, [3], "integer"),
        (int, 1e400, "integer"),
        (float, "much", "number"),
        (float, "nan", "number"),
        (float, "inf", "number"),
        (float, "-Infinity", "number"),
        (float, 10**400, "number"),
        (float, True, "number"),
        (bool, 1, "boolean"),
        (bool, "yes", "boolean"),
        (bool, None, "boolean"),
        (Literal["a", "b"], "c", "one of 'a', 'b'"),
        (Literal["a", "b"], ["a"], "one of 'a', 'b'"),
        (list[int], [1, "x"], "integer"),
        (list[int], 1, "array"),
        (list[int], "[1]", "array"),
        (dict, [], "object"),
        (dict, "{}", "object"),
        (int | None, "x", "integer or null"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(hint: Any, value: Any, expected: str) -> None:
    """A value of another type is refused with what was expected, what came and how to call."""
    with pytest.raises(ToolError) as caught:
        check_arguments(typed(hint), {"value": value})
    assert str(caught.value).startswith(
        f"argument value: expected {expected}, but got {memws.quote(value)}; call tool("
    )


def test_advice_names_the_call() -> None:
    """The model is told what is missing or unknown, and the whole call with types and defaults."""

    def weather(city: str, days: int = 3, unit: Literal["c", "f"] = "c") -> None: ...

    call = "call weather(city: string, days: integer = 3, unit: one of 'c', 'f' = c, request_heartbeat: boolean = …)"
    tool = make_tool(weather)
    for arguments, problem in (
        ({}, "missing argument 'city'"),
        ({"town": "Rome"}, "unknown argument 'town'"),
        ({"city": 5}, "argument city: expected string, but got 5"),
    ):
        with pytest.raises(ToolError) as caught:
            check_arguments(tool, arguments)
        assert str(caught.value) == f"{problem}; {call}"


def test_request_heartbeat_is_not_handed_on() -> None:
    """request_heartbeat, whatever its value, is the turn's and not the function's."""
    for value in (True, False, "true", None, 3):
        assert check_arguments(typed(int), {"value": 1, "request_heartbeat": value}) == {"value": 1}


def sample(
    text: str = "", number: int = 0, share: float = 0.0, flag: bool = False, kind: Literal["a", "b"] = "a",
    names: list[str] | None = None, table: dict[str, int] | None = None, grid: list[list[int]] = [],  # noqa: B006
    mixed: int | str = 0, maybe: bool | float | None = None,
) -> None:  # fmt: skip
    """Something of everything."""


SAMPLE = make_tool(sample)
WHOLE = st.integers(-(2**53), 2**53)
TEXTS = st.text(max_size=20) | st.sampled_from(["1", "true", "1e5", "nan", "a"])
VALUES = st.recursive(
    st.none() | st.booleans() | WHOLE | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.sampled_from(list(SAMPLE.parameters["properties"])), VALUES, max_size=4)


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True, database=None)
@hypothesis.given(ARGUMENTS | st.dictionaries(TEXTS, VALUES, max_size=2))
def test_checked_arguments_fit_the_schema(arguments: JSON) -> None:
    """Whatever a model sends, it is refused as advice, or what the function gets fits its schema."""
    validator = jsonschema.Draft202012Validator(SAMPLE.parameters)
    known = arguments.keys() <= SAMPLE.parameters["properties"].keys()
    given = {name: value for name, value in arguments.items() if name != "request_heartbeat"}
    try:
        checked = check_arguments(SAMPLE, arguments)
    except ToolError:
        assert not (known and validator.is_valid(given))
    else:
        validator.validate(checked)
        assert known
        if validator.is_valid(given):
            assert checked == given


# ---- calls -----------------------------------------------------------------------------------------------------------


async def outcome(function: Callable[..., Any], timeout: float = LIMIT, **arguments: Any) -> str:
    """What the model is told of a call, within a limit that only a fault reaches."""
    async with asyncio.timeout(2 * LIMIT):
        return await call_tool(make_tool(function, name="tool", timeout=timeout), arguments)


async def failure(function: Callable[..., Any], timeout: float = LIMIT) -> str:
    with pytest.raises(ToolError) as caught:
        await outcome(function, timeout)
    return str(caught.value)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("no repr")


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError("no str")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("sunny", "sunny"),
        ("", ""),
        (None, "None"),
        (5, "5"),
        (True, "true"),
        ({"a": [1, None], "é": "日"}, '{"a":[1,null],"é":"日"}'),
        ((1, 2), "[1,2]"),
        (b"raw", "b'raw'"),
        ({1, }, "{1}"),
        (float("nan"), "nan"),
        ({"x": float("inf")}, "{'x': inf}"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ("a\x00b\ud800", "a\ufffdb\ufffd"),
        (["\ud83d\ude00"], '["\U0001f600"]'),
    ],
)  # fmt: skip
async def test_results_become_text(result: object, text: str) -> None:
    """A text is the result as it is, anything else its JSON or repr, without what cannot be stored."""

    async def later() -> object:
        return result

    assert await outcome(lambda: result) == text
    assert await outcome(later) == text


@pytest.mark.anyio
@pytest.mark.parametrize("make", [lambda: "x" * 1_000_000, lambda: ["word"] * 200_000, lambda: "日" * 8_001])
async def test_long_results_are_cut(make: Callable[[], object]) -> None:
    """A result has at most 8,000 characters and a note of what is left out."""
    text = await outcome(make)
    assert memws.TOOL_RESULT_LIMIT <= len(text) <= memws.TOOL_RESULT_LIMIT + 100
    assert "characters left out here" in text
    assert await outcome(lambda: "x" * memws.TOOL_RESULT_LIMIT) == "x" * memws.TOOL_RESULT_LIMIT


@pytest.mark.anyio
@pytest.mark.parametrize("make", [lambda: nested(100_000), Unprintable, lambda: [Unprintable()]])
async def test_a_result_that_has_no_text_is_a_failure(make: Callable[[], object]) -> None:
    """A result that can be written neither as JSON nor as a repr is the tool's failure, not the server's."""
    assert await failure(make)


def raising(error: BaseException) -> tuple[Callable[[], None], Callable[[], Any]]:
    """A sync and an async tool that raise this."""

    def sync() -> None:
        raise error

    async def later() -> None:
        await asyncio.sleep(0)
        raise error

    return sync, later


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such city"), "ValueError: no such city"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
        (TimeoutError("the host did not answer"), "the host did not answer"),
        (memws.Refused("busy", "later"), "later"),
        (ToolError("try a smaller number"), "try a smaller number"),
        (SystemExit(3), "SystemExit"),
        (asyncio.CancelledError(), "ancelled"),
        (RecursionError("deep"), "deep"),
        (ExceptionGroup("two", [ValueError("a"), ValueError("b")]), "two"),
        (UnprintableError(), "UnprintableError"),
        (ValueError("x" * 100_000), "ValueError: xxx"),
        (ValueError("\ud800\x00\x1b"), "ValueError: "),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_whatever_a_tool_raises_is_advice(error: BaseException, words: str) -> None:
    """Whatever a sync or async tool raises, the model is told its name and text, in bounds, and nothing else ends."""
    for function in raising(error):
        text = await failure(function)
        assert words in text
        assert "took longer" not in text
        assert len(text) <= memws.MAX_ERROR + 10
        assert memws.encode_json(text).encode()


@pytest.mark.anyio
@pytest.mark.parametrize("error", [StopIteration(5), KeyboardInterrupt(), GeneratorExit()], ids=repr)
async def test_what_a_thread_raises_stays_in_it(error: BaseException) -> None:
    """An exception that would end a loop or a generator is a sync tool's failure like any other."""
    sync, _ = raising(error)
    assert type(error).__name__ in await failure(sync)


@pytest.mark.anyio
async def test_an_async_tool_ends_at_its_timeout() -> None:
    """An async tool that takes too long is cancelled, and the model is told so."""
    ended = []

    async def slow() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(True)

    assert await failure(slow, timeout=0.01) == "tool took longer than 0.01 s and was given up"
    assert ended == [True]


@pytest.mark.anyio
async def test_a_sync_tool_goes_on_alone_after_its_timeout() -> None:
    """A sync tool that takes too long goes on in a daemon thread of its own, and its result is dropped."""
    go_on, threads = threading.Event(), list[threading.Thread]()

    def slow() -> str:
        threads.append(threading.current_thread())
        go_on.wait(LIMIT)
        return "too late"

    assert await failure(slow, timeout=0.01) == "tool took longer than 0.01 s and was given up"
    (thread,) = threads
    assert (thread.name, thread.daemon, thread.is_alive()) == ("memws-tool-tool", True, True)
    go_on.set()
    await asyncio.to_thread(thread.join, LIMIT)
    assert not thread.is_alive()


@pytest.mark.anyio
async def test_a_cancel_reaches_an_async_tool() -> None:
    """Who waits for a tool and is cancelled hears of it, and so does the tool."""
    started, ended = asyncio.Event(), []

    async def slow() -> None:
        started.set()
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    task = asyncio.create_task(outcome(slow))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]


@pytest.mark.anyio
async def test_sync_tools_run_side_by_side_off_the_loop() -> None:
    """Sync tools block neither the loop nor each other."""
    meet = threading.Barrier(9)

    def wait() -> str:
        meet.wait(LIMIT)
        return threading.current_thread().name

    tasks = [asyncio.create_task(outcome(wait)) for _ in range(8)]
    await asyncio.to_thread(meet.wait, LIMIT)
    assert await asyncio.gather(*tasks) == ["memws-tool-tool"] * 8


@pytest.mark.anyio
async def test_tools_get_their_arguments_by_name() -> None:
    """A tool's function gets the checked arguments, and its own defaults for the others."""

    def sync(city: str, days: int = 3) -> str:
        return f"{city} {days}"

    async def later(city: str, days: int = 3) -> str:
        return f"{city} {days}"

    for function in (sync, later):
        assert await outcome(function, city="Rome") == "Rome 3"
        assert await outcome(function, days=1, city="Rome") == "Rome 1"


# ---- tools of the user, in a turn ------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_tools_result_goes_to_the_model_and_the_clients(endpoint: Endpoint) -> None:
    """A tool's result is the model's next message, and an event with its status and duration."""

    def weather(city: str) -> JSON:
        """Tell the weather."""
        return {"city": city, "sky": "clear"}

    async with Lab(endpoint, tools=[weather]) as lab:
        endpoint.script(Reply(calls=[("weather", {"city": "Rome", "request_heartbeat": True})]))
        agent = await lab.create()
        told = await lab.say(agent, "Weather?")
        assert told.stop_reason == "done"
        assert results(endpoint.requests[1]) == ['OK: {"city":"Rome","sky":"clear"}']
        assert told.texts("function_message")[:2] == [
            "Running weather({'city': 'Rome'})", 'Success: {"city":"Rome","sky":"clear"}',
        ]  # fmt: skip
        (answer, _) = told.of("tool_return")
        assert (answer["name"], answer["status"]) == ("weather", "OK")
        assert answer["duration_ms"] >= 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such city"), "ValueError: no such city"),
        (SystemExit(3), "SystemExit"),
        (asyncio.CancelledError(), "ancelled"),
        (TimeoutError("the host did not answer"), "the host did not answer"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_tools_failure_is_advice_and_an_event(endpoint: Endpoint, error: BaseException, words: str) -> None:
    """A tool that fails, however, costs its turn nothing: the model hears why and goes on."""
    for function in raising(error):
        async with Lab(endpoint, tools=[function]) as lab:
            endpoint.script(Reply(calls=[(function.__name__, {})]))
            agent = await lab.create()
            told = await lab.say(agent, "Go")
            assert (told.stop_reason, told.replies) == ("done", ["Hello!"])
            (answer,) = results(endpoint.requests[-1])
            assert answer.startswith("Failed: ")
            assert words in answer
            assert words in told.texts("function_message")[1]
            assert told.of("tool_return")[0]["status"] == "Failed"


@pytest.mark.anyio
async def test_bad_calls_never_reach_the_function(endpoint: Endpoint) -> None:
    """A call with wrong arguments or of an unknown tool is answered with advice; the function does not run."""
    ran = []

    def count(number: int) -> int:
        """Count."""
        ran.append(number)
        return number

    async with Lab(endpoint, tools=[count]) as lab:
        endpoint.script(
            Reply(calls=[("count", {"number": "many"}), ("cuont", {})]),
            Reply(calls=[("count", {"number": "3", "request_heartbeat": True})]),
        )
        told = await lab.say(await lab.create(), "Go")
        assert ran == [3]
        assert told.stop_reason == "done"
        first, second, third = results(endpoint.requests[2])
        assert first.startswith("Failed: argument number: expected integer, but got 'many'; call count(number: integer")
        assert second.startswith("Failed: unknown tool 'cuont'; tools: send_message, ")
        assert third == "OK: 3"


@pytest.mark.anyio
@pytest.mark.parametrize("letter", ["\U0001f600", "\x01", '"', "x"])
async def test_a_call_of_any_size_fits_its_frames(endpoint: Endpoint, letter: str) -> None:
    """Arguments and results of any length and weight are told in frames of at most 1 MiB, and none is lost."""

    def echo(text: str) -> str:
        """Give it back."""
        return text

    async with Lab(endpoint, tools=[echo], context_window=1_000_000) as lab:
        agent = await lab.create()
        for length in (60_000, memws.TEXT_PART - 13, memws.TEXT_PART, 3 * memws.TEXT_PART):
            text = letter * length
            endpoint.script(Reply(calls=[("echo", {"text": text})], chunk=50_000))
            told = await lab.say(agent, "Go")
            frames = [event.frame("é" * 64) for event in told.events]
            assert max(len(frame.encode()) for frame in frames) <= memws.MAX_FRAME - 1_000
            calls = [call for call in told.of("tool_call") if call["name"] == "echo"]
            assert json.loads("".join(call["message"] for call in calls)) == {"text": text}
            assert calls[0]["arguments"] in (None, {"text": text})


def test_the_decorator_registers_and_returns_the_function(endpoint: Endpoint) -> None:
    """@server.tool, bare or with a name and a time limit, registers a function and leaves it as it is."""
    server = memws.WebSocketServer(port=0, db=":memory:", model="test-model", base_url=endpoint.url, api_key="sk-test")

    @server.tool
    def double(number: int) -> int:
        """Double a number."""
        return 2 * number

    @server.tool(name="half", timeout=5)
    async def halve(number: int) -> float:
        """Halve a number."""
        return number / 2

    assert double(2) == 4
    assert asyncio.run(halve(2)) == 1
    try:
        endpoint.script(
            Reply(calls=[("double", {"number": 4}), ("half", {"number": 3})]), Reply("It is 8 and 1.5."),
        )  # fmt: skip
        server.create_new_agent({"name": "sam", "tools": ["double", "half"]})
        events = server.run_step("Go")
        assert results(endpoint.requests[1]) == ["OK: 8", "OK: 1.5"]
        assert [event["message"] for event in events if event.get("message_type") == "assistant_message"] == [
            "It is 8 and 1.5."
        ]
    finally:
        server.stop()


def test_a_tool_registered_again_replaces_the_former(endpoint: Endpoint) -> None:
    """A function of the same name, as a re-run cell registers it, is what agents in use call from then on."""
    server = memws.WebSocketServer(port=0, db=":memory:", model="test-model", base_url=endpoint.url, api_key="sk-test")

    def answer(text: str) -> Callable[[], str]:
        def tool() -> str:
            return text

        return tool

    try:
        server.tool(answer("old"), name="answer")
        server.create_new_agent({"name": "sam", "tools": ["answer"]})
        server.tool(answer("new"), name="answer")
        endpoint.script(Reply(calls=[("answer", {"request_heartbeat": True})]))
        server.run_step("Go")
        assert results(endpoint.requests[1]) == ["OK: new"]
    finally:
        server.stop()


def test_memory_tools_are_not_replaced() -> None:
    """A function may not take a memory tool's name."""
    server = memws.WebSocketServer(port=0, db=":memory:", model="offline")
    with pytest.raises(memws.UsageError, match="'send_message' is a memory tool; give your function another name"):
        server.tool(plain, name="send_message")


# ---- the memory tools ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def memory(**blocks: str) -> AsyncIterator[memws.AgentMemory]:
    """The memory of a new agent, with blocks of a hundred characters."""
    store = memws.SqliteStore(":memory:", "full", asyncio.get_running_loop())
    try:
        stored = [memws.Block(label, value, 100) for label, value in blocks.items()]
        record = await store.create_agent("sam", {}, stored, None)
        search = functools.partial(store.search, record.id)
        yield memws.AgentMemory(search, {block.label: block for block in stored}, 0, 10**6)
    finally:
        await store.close()


async def use(memory: memws.AgentMemory, name: str, /, **arguments: Any) -> str:
    """The result of a memory tool, called as a step does it."""
    tool = memws.MEMORY_TOOLS[name]
    result = tool.function(memory, **check_arguments(tool, arguments))
    return memws.result_text(await result if asyncio.iscoroutine(result) else result)


async def refusal(memory: memws.AgentMemory, name: str, /, **arguments: Any) -> str:
    with pytest.raises(ToolError) as caught:
        await use(memory, name, **arguments)
    return str(caught.value)


@pytest.mark.anyio
async def test_core_memory_is_edited_within_its_limits() -> None:
    """Blocks are appended to and replaced in, count their versions, and refuse what is too long or not there."""
    async with memory(human="Name: Ada", persona="") as mind:
        assert await use(mind, "core_memory_append", name="human", content="Likes tea") == "None"
        assert await use(mind, "core_memory_append", name="persona", content="I am Sam") == "None"
        assert await use(mind, "core_memory_replace", name="human", old_content="tea", new_content="mate") == "None"
        await use(mind, "core_memory_replace", name="persona", old_content="I am Sam", new_content="")
        assert (mind.blocks["human"].value, mind.blocks["human"].version) == ("Name: Ada\nLikes mate", 3)
        assert (mind.blocks["persona"].value, mind.blocks["persona"].version) == ("", 3)
        assert [(edit.what, edit.name, edit.before, edit.after) for edit in mind.edits] == [
            ("core", "human", "Name: Ada", "Name: Ada\nLikes tea"),
            ("core", "persona", "", "I am Sam"),
            ("core", "human", "Name: Ada\nLikes tea", "Name: Ada\nLikes mate"),
            ("core", "persona", "I am Sam", ""),
        ]
        kept = dict(mind.blocks)
        assert await refusal(mind, "core_memory_append", name="humann", content="x") == (
            "there is no core memory block 'humann'; blocks: human, persona"
        )
        assert await refusal(mind, "core_memory_replace", name="human", old_content="coffee", new_content="x") == (
            "old_content is not in the human block; copy it to the letter from what the block holds"
        )
        assert await refusal(mind, "core_memory_replace", name="human", old_content="", new_content="x")
        text = await refusal(mind, "core_memory_append", name="human", content="x" * 81)
        assert text.startswith("the human block is limited to 100 characters, and this would make 102; shorten")
        assert mind.blocks == kept
        assert len(mind.edits) == 4


@pytest.mark.anyio
async def test_an_edit_that_changes_nothing_is_none() -> None:
    """Replacing a text by itself leaves version and edits as they are."""
    async with memory(human="tea") as mind:
        await use(mind, "core_memory_replace", name="human", old_content="tea", new_content="tea")
        assert (mind.blocks["human"].version, mind.edits) == (1, [])


@pytest.mark.anyio
async def test_passages_are_gathered_until_they_are_stored() -> None:
    """Inserted passages get the next ids and wait for the transaction; empty and endless ones are refused."""
    async with memory() as mind:
        await use(mind, "archival_memory_insert", content="The key is under the mat")
        await use(mind, "archival_memory_insert", content="x" * memws.MAX_TEXT)
        assert [passage.id for passage in mind.passages] == [1, 2]
        assert [(edit.what, edit.name, edit.before) for edit in mind.edits] == [
            ("archival", 1, None), ("archival", 2, None),
        ]  # fmt: skip
        assert await refusal(mind, "archival_memory_insert", content=" \n") == "content is empty; say what to keep"
        text = await refusal(mind, "archival_memory_insert", content="x" * (memws.MAX_TEXT + 1))
        assert text == "a passage has at most 65,536 characters, but got 65,537; split it"


@asynccontextmanager
async def filled() -> AsyncIterator[memws.AgentMemory]:
    """The memory of an agent that holds 25 messages of as many days, and 12 passages."""
    store = memws.SqliteStore(":memory:", "full", asyncio.get_running_loop())
    try:
        record = await store.create_agent("sam", {}, [], None)
        messages = [
            memws.ChatMessage(number, "user", f"2026-01-{number:02}T12:00:00.000Z", f"cake number {number}", "{}",
                              said=f"cake number {number}")
            for number in range(1, 26)
        ]  # fmt: skip
        passages = [memws.Passage(number, f"pie {number}", "2026-02-01T00:00:00.000Z") for number in range(1, 13)]
        await store.commit(record.id, memws.Changes(messages=messages, passages=passages))
        yield memws.AgentMemory(functools.partial(store.search, record.id), {}, 12, 25)
    finally:
        await store.close()


def listed(text: str) -> list[JSON]:
    return list(json.loads(text.partition(": ")[2]))


@pytest.mark.anyio
async def test_searches_give_pages() -> None:
    """A search tells how many there are and on which page, from 0 as MemGPT counts, and what was said when by whom."""
    async with filled() as mind:
        first = await use(mind, "conversation_search", query="cake")
        last = await use(mind, "conversation_search", query="cake", page="2")
        assert first.startswith("Showing 10 of 25 results (page 0 of 2): ")
        assert last.startswith("Showing 5 of 25 results (page 2 of 2): ")
        assert {"time": "2026-01-25 12:00", "role": "user", "text": "cake number 25"} in listed(first)
        assert (await use(mind, "archival_memory_search", query="pie")).startswith("Showing 10 of 12 results")
        assert listed(await use(mind, "archival_memory_search", query="pie 7"))[0] == {
            "time": "2026-02-01 00:00", "text": "pie 7",
        }  # fmt: skip


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["conversation_search", "archival_memory_search"])
async def test_any_search_is_answered(name: str) -> None:
    """A search for nothing, for what is not there, on no page and with operators as words is answered."""
    async with filled() as mind:
        assert (await use(mind, name, query="")).startswith("Showing 10 of")
        store = name.partition("_")[0].replace("conversation", "recall")
        assert await use(mind, name, query="zeppelin") == f"No results found in {store} memory for 'zeppelin'."
        assert (await use(mind, name, query="cake pie", page=-3)).startswith("Showing 10 of")
        for page in (99, 2**31, 2**62, 2**63, 2**70, 10**30):
            assert (await use(mind, name, query="cake pie", page=page)).startswith("No results found")
            assert (await use(mind, name, query="", page=page)).startswith("No results found")
        for query in ('"', "NEAR(a b)", "a*", "'; DROP TABLE messages;--", "x" * 50_000):
            assert (await use(mind, name, query=query)).startswith(("No results found", "Showing"))


@pytest.mark.anyio
async def test_messages_of_some_days_are_listed() -> None:
    """Messages between two days, both included, are listed newest first; a day that is none is advice."""
    async with filled() as mind:
        text = await use(mind, "conversation_search_date", start_date="2026-01-03", end_date="2026-01-05")
        assert [item["text"] for item in listed(text)] == ["cake number 5", "cake number 4", "cake number 3"]
        single = await use(mind, "conversation_search_date", start_date="2026-01-03", end_date="2026-01-03")
        assert [item["text"] for item in listed(single)] == ["cake number 3"]
        none = await use(mind, "conversation_search_date", start_date="2026-01-05", end_date="2026-01-03")
        assert none == "No results found in recall memory."
        for day in ("yesterday", "2026-13-01", "01/31/2026", "9" * 5_000):
            text = await refusal(mind, "conversation_search_date", start_date=day, end_date="2026-01-03")
            assert text == f"expected a day like 2026-01-31, but got {memws.quote(day)}"


@pytest.mark.anyio
@pytest.mark.parametrize(("minutes", "paused"), [(30, 30), (0, 0), (-5, 0), (10_000, 360), (2**70, 360)])
async def test_heartbeats_pause_within_bounds(minutes: int, paused: int) -> None:
    """Timed heartbeats pause for at most six hours, and the model is told for how long."""
    async with memory() as mind:
        assert await use(mind, "pause_heartbeats", minutes=minutes) == f"Pausing timed heartbeats for {paused} min"
        assert mind.pause_minutes == paused


@pytest.mark.anyio
async def test_send_message_says_it() -> None:
    """What the agent says to the user is gathered in order."""
    async with memory() as mind:
        assert await use(mind, "send_message", message="Hello") == "None"
        await use(mind, "send_message", message="")
        assert mind.said == ["Hello", ""]


@pytest.mark.parametrize(
    ("start", "end", "range_"),
    [
        ("2026-01-31", "2026-01-31", ("2026-01-31T00:00:00.000Z", "2026-02-01T00:00:00.000Z")),
        (" 2026-01-31 ", None, ("2026-01-31T00:00:00.000Z", None)),
        (None, "2026-01-31T10:00:00", (None, "2026-01-31T10:00:00.001Z")),
        ("2026-01-31T10:00:00+02:00", "", ("2026-01-31T08:00:00.000Z", None)),
        ("2026-01-31T10:00:00Z", "2026-01-31T10:00:00.5Z", ("2026-01-31T10:00:00.000Z", "2026-01-31T10:00:00.501Z")),
        ("20260131", "", ("2026-01-31T00:00:00.000Z", None)),
    ],
)
def test_date_range(start: str | None, end: str | None, range_: tuple[str | None, str | None]) -> None:
    """A day lasts to its end, a time to its millisecond; zones become UTC."""
    assert memws.date_range(start, end) == range_


@pytest.mark.parametrize("day", ["x", "2026-02-30", "9999-12-31", "0001-01-01T00:00:00+23:59", "\x00", "2026"])
def test_impossible_days_are_advice(day: str) -> None:
    """A day that is none, or whose end has no name, is refused with what was expected."""
    with pytest.raises(ToolError, match="expected a day like 2026-01-31"):
        memws.date_range(day, day)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """A tool's thread ends with its test."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("memws-tool-"):
            thread.join(LIMIT)
            assert not thread.is_alive()
