"""The errors: one tree, sentences that say what happened and what to do next, codes that the contract lists."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import memws

# The lists of the contract.
REQUEST_CODES = set("not_json not_object bad_type bad_field missing_field too_deep unknown_command".split())  # noqa: SIM905
COMMAND_CODES = """no_agent unknown_agent name_taken bad_config block_limit text_too_long too_large busy conflict
not_found unknown_turn unknown_seq store_failed internal""".split()  # noqa: SIM905
TURN_CODES = """no_agent unknown_agent busy queue_full cancelled turn_id_reused text_too_long context_overflow
model_auth model_rate_limit model_timeout model_unavailable model_refused bad_output store_failed internal""".split()  # noqa: SIM905
MODEL_CODES = set(TURN_CODES[7:14])
REFUSALS = {*COMMAND_CODES, *TURN_CODES} - MODEL_CODES
SOURCE = ast.parse(Path(memws.__file__).read_text("utf-8"))
ALLOWED = {"InvalidRequest": REQUEST_CODES, "Refused": REFUSALS, "ModelError": MODEL_CODES}


def errors() -> list[type[memws.MemwsError]]:
    """MemwsError and all that derives from it."""
    found = [memws.MemwsError]
    for kind in found:
        found += kind.__subclasses__()
    return found


def raised() -> Iterator[tuple[str, list[ast.expr]]]:
    """(class, positional arguments) of every error that the module makes."""
    names = {kind.__name__ for kind in errors()}
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
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


def test_codes_and_sentences_are_those_of_the_contract() -> None:
    """Errors have the contract's codes, each of which is used, and sentences in lower case without a full stop."""
    place = {"MemwsError": 0, "UsageError": 0, "StoreFailed": 0, "ToolError": 0}
    seen = 0
    for name, arguments in raised():
        if name in ALLOWED and arguments:
            assert set(constants(arguments[0])) <= ALLOWED[name], name
        if len(arguments) > (position := place.get(name, 1)):
            text = arguments[position]
            pieces = text.values if isinstance(text, ast.JoinedStr) else [text]
            first, last = constants(pieces[0]), constants(pieces[-1])
            seen += len(first)
            assert not any(re.match(r"[A-Z][a-z]", each) for each in first), first
            assert not any(each.endswith(".") for each in last), last
    assert seen > 30
    own = {kind.code for kind in errors()}
    assert own - {"cannot_connect", "connection_lost"} <= REFUSALS  # these two are the client's
    everywhere = {node.value for node in ast.walk(SOURCE) if isinstance(node, ast.Constant) and node.value}
    assert {*REQUEST_CODES, *REFUSALS, *MODEL_CODES} <= everywhere


@pytest.mark.parametrize("letter", ["x", "é", "日", "\U0001f600", "\U0001d4b3", "\x1b", '"', "\\", "\u2028"])
def test_an_answer_to_any_error_fits_in_4_kib(letter: str) -> None:
    """The frames that tell of the longest error stay within 4 KiB, whatever its characters weigh, and show the cut."""
    long_id = letter * memws.MAX_ID
    message = {"type": "user_message", "turn_id": long_id, "agent_name": letter * memws.MAX_NAME, "id": long_id}
    command = {"type": "command", "command": "get_agent", "id": long_id}
    error = memws.MemwsError(letter * 5_000)
    frames = [memws.error_frame(command, error), memws.error_frame(message, error)]
    frames.append(memws.error_frame(command, memws.InvalidRequest("bad_field", str(error))))
    assert max(len(frame.encode()) for frame in frames) <= 4096
    assert str(error).endswith("…")
    assert str(memws.MemwsError("x" * 1_000)) == "x" * 1_000
