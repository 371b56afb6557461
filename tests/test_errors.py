"""The errors: one tree, sentences that say what happened and what to do next, codes that the contract lists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import memws


def words(text: str) -> set[str]:
    return set(text.split())


# The lists of the contract.
REQUEST_CODES = words(
    "not_json not_object bad_type bad_field missing_field too_deep too_large unknown_command rate_limited"
)
COMMAND_CODES = words(
    "no_agent unknown_agent name_taken bad_config block_limit text_too_long busy conflict not_found unknown_turn "
    "unknown_seq store_failed internal"
)
TURN_CODES = words(
    "no_agent unknown_agent busy queue_full cancelled turn_id_reused text_too_long context_overflow model_auth "
    "model_rate_limit model_timeout model_unavailable model_refused bad_output store_failed internal"
)

SOURCE = ast.parse(Path(memws.__file__).read_text("utf-8"))


def errors() -> list[type[memws.MemwsError]]:
    """MemwsError and all that derives from it."""
    found = [memws.MemwsError]
    for kind in found:
        found += kind.__subclasses__()
    return found


NAMES = {kind.__name__ for kind in errors()}


def raised() -> Iterator[tuple[str, list[ast.expr]]]:
    """(class, positional arguments) of every error that the module makes."""
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield node.func.id, node.args


def constants(expression: ast.expr) -> list[str]:
    """The texts that an expression is one of; a conditional expression has two."""
    if isinstance(expression, ast.IfExp):
        return constants(expression.body) + constants(expression.orelse)
    return [expression.value] if isinstance(expression, ast.Constant) and isinstance(expression.value, str) else []


def test_the_docstring_draws_the_tree() -> None:
    """The docstring of the root names every error below it, each under the one that it derives from."""
    drawn = {}
    path = ["MemwsError"]
    for indent, name in re.findall(r"^ *((?:│   |    )*)[├└]── (\w+)", memws.MemwsError.__doc__ or "", re.MULTILINE):
        path = [*path[: 1 + len(indent.lstrip()) // 4], name]
        drawn[name] = path[-2]
    assert drawn == {kind.__name__: kind.__base__.__name__ for kind in errors()[1:] if kind.__base__}


def test_codes_are_those_of_the_contract() -> None:
    """Every code that an error is made with is one that the contract lists for what it answers."""
    allowed = {
        "InvalidRequest": REQUEST_CODES,
        "Refused": COMMAND_CODES | TURN_CODES,
        "ModelError": TURN_CODES,
    }
    found = {name: set[str]() for name in allowed}
    for name, arguments in raised():
        if name in allowed:
            found[name].update(constants(arguments[0]))
    for name, codes in found.items():
        assert codes <= allowed[name], name
    assert REQUEST_CODES - found["InvalidRequest"] <= {"too_large"}  # a frame over 1 MiB closes the connection
    assert {kind.code for kind in errors()} - COMMAND_CODES - TURN_CODES <= {
        "cannot_connect", "connection_lost", "too_large",
    }  # fmt: skip


def test_sentences_have_no_full_stop_and_begin_small() -> None:
    """An error's sentence begins in lower case (or with a name) and ends without a full stop."""
    place = {"MemwsError": 0, "UsageError": 0, "StoreFailed": 0, "ToolError": 0}
    seen = 0
    for name, arguments in raised():
        position = place.get(name, 1)
        if len(arguments) <= position:
            continue
        text = arguments[position]
        parts = text.values if isinstance(text, ast.JoinedStr) else [text]
        first, last = constants(parts[0]), constants(parts[-1])
        seen += len(first)
        assert not any(re.match(r"[A-Z][a-z]", each) for each in first), first
        assert not any(each.endswith(".") for each in last), last
    assert seen > 50


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (memws.UnknownAgent("sam", [], 0), "unknown agent 'sam'; there are none yet; send create_agent first"),
        (memws.UnknownAgent("sam", ["ada"], 1), "unknown agent 'sam'; 1 known: 'ada'; send create_agent first"),
        (
            memws.UnknownAgent("sam", ["ada", "bob"], 200),
            "unknown agent 'sam'; 200 known: 'ada', 'bob', …; send create_agent first",
        ),
        (
            memws.ConnectFailed("ws://localhost:1", "start one with: python memws.py", 401),
            "cannot connect to ws://localhost:1: start one with: python memws.py",
        ),
        (
            memws.ConnectionLost("ws://localhost:1"),
            "no connection to ws://localhost:1; connect again, and send a message again with its turn_id",
        ),
        (
            memws.RequestTooLarge(2_000_000),
            "expected a request of at most 1048576 bytes, but got 2000000; send a shorter text",
        ),
    ],
)
def test_errors_write_their_own_sentence(error: memws.MemwsError, sentence: str) -> None:
    """An error that takes data writes the whole sentence from it."""
    assert str(error) == sentence


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (memws.MemwsError("x"), "internal"),
        (memws.UsageError("x"), "internal"),
        (memws.InvalidRequest("bad_field", "x"), "bad_field"),
        (memws.Refused("busy", "x"), "busy"),
        (memws.UnknownAgent("x", [], 0), "unknown_agent"),
        (memws.StoreFailed("x"), "store_failed"),
        (memws.ModelError("model_auth", "x"), "model_auth"),
        (memws.RemoteError("busy", "x"), "busy"),
    ],
)
def test_code_belongs_to_the_error_alone(error: memws.MemwsError, code: str) -> None:
    """Each error has the code of its kind or the one it was made with, and leaves its class's as it is."""
    assert error.code == code
    assert [kind.code for kind in (memws.MemwsError, memws.Refused, memws.StoreFailed)] == [
        "internal", "internal", "store_failed",
    ]  # fmt: skip


def test_errors_carry_their_data() -> None:
    """The data that an error was made with is there to be read, not only in its sentence."""
    invalid = memws.InvalidRequest("bad_field", "x", "id 1")
    refused = memws.Refused("conflict", "x", version=3, value="old")
    failed = memws.ModelError("model_rate_limit", "x", retry=True, retry_after=1.5)
    remote = memws.RemoteError("unknown_seq", "x" * 2_000, {"last_seq": 7})
    assert invalid.request_id == "id 1"
    assert refused.details == {"version": 3, "value": "old"}
    assert (failed.retry, failed.retry_after) == (True, 1.5)
    assert (remote.details, remote.message) == ({"last_seq": 7}, "x" * 2_000)
    assert memws.ConnectFailed("ws://localhost:1", "x", 503).status == 503


def test_a_long_sentence_is_cut() -> None:
    """A sentence that fits stays as it is; a longer one loses its end, and shows it."""
    assert str(memws.MemwsError("x" * 1_000)) == "x" * 1_000
    text = str(memws.MemwsError("x" * 2_000 + "y"))
    assert len(text) < 2_000
    assert text.endswith("x…")


@pytest.mark.parametrize("letter", ["x", "é", "日", "\U0001f600", "\U0001d4b3", "\x1b", '"', "\\", "\u2028"])
def test_an_answer_to_any_error_fits_in_4_kib(letter: str) -> None:
    """The frames that tell of the longest error stay within 4 KiB, whatever its characters weigh."""
    error = memws.MemwsError(letter * 5_000)
    unknown = memws.UnknownAgent(letter * 1_000, [letter * memws.MAX_NAME] * 10, 5_000)
    long_id = letter * memws.MAX_ID
    for each in (error, unknown):
        frames = [
            memws.command_error(memws.GetAgent(long_id, {}), each),
            memws.refusal(long_id, long_id, letter * memws.MAX_NAME, each),
            memws.server_error(memws.InvalidRequest("bad_field", str(each), long_id)),
        ]
        assert max(len(frame.encode()) for frame in frames) <= 4096


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("sam", "'sam'"),
        ("", "''"),
        ("a\nb\x00\x1b[0m", r"'a\nb\x00\x1b[0m'"),
        (None, "None"),
        (1.5, "1.5"),
        (["a"], "['a']"),
        ("x" * 60, repr("x" * 60)),
        ("x" * 61, repr("x" * 59 + "…")),
        ([0] * 1000, "[" + "0, " * 19 + "0…"),
        (10**100, "1" + "0" * 58 + "…"),
    ],
)
def test_quote(value: object, shown: str) -> None:
    """A value is quoted as its repr, at most sixty characters of it, control characters escaped."""
    assert memws.quote(value) == shown
