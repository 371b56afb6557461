"""The wire: signatures as schemas and checks, what a frame is read as, what bad ones get, how events are written."""

import contextlib
import json
from typing import Any

import pytest
from commandline import Main
from wire import JSON, SCHEMA, check_event, validator

import memws

jsonschema = pytest.importorskip("jsonschema")

COMMANDS = memws.known_commands()
CODES = {"not_json", "not_object", "bad_type", "bad_field", "missing_field", "too_deep", "unknown_command"}


def read(frame: str | bytes) -> tuple[str, JSON]:
    """What a frame asks for, and the arguments that it is called with. Raises InvalidRequest."""
    function, arguments = memws.resolve(memws.decode_request(frame), COMMANDS)
    return function.name, arguments


def answer(frame: str | bytes, error: memws.InvalidRequest) -> JSON:
    """The server_error of an error, if it is a good one: strict JSON, small, of a known code, in the schema."""
    request = None
    with contextlib.suppress(memws.InvalidRequest):
        request = memws.decode_request(frame)
    told = check_event(memws.error_frame(request, error))
    assert (told["type"], told["code"] in CODES, told["message"] != "") == ("server_error", True, True)
    return told


def refused(frame: str | bytes) -> JSON:
    with pytest.raises(memws.InvalidRequest) as caught:
        read(frame)
    return answer(frame, caught.value)


def frame_of(kind: str, **fields: Any) -> JSON:
    head = {"type": kind} if kind == "user_message" else {"type": "command", "command": kind}
    return head | fields


def candidates(schema: JSON) -> list[Any]:
    """Values of every type, and those at and just beyond the bounds of a schema."""
    found: list[Any] = [None, True, False, 0, 1, 3, 1.5, 10**30, "", "x", [], {}, ["x"], [1], [None], {"any": [1]}]
    for part in (schema, *schema.get("anyOf", ())):
        found += part.get("enum", [])
        for key, step in (("minimum", -1), ("maximum", 1)):
            found += [part[key], part[key] + step] if key in part else []
        for key, step in (("minLength", -1), ("maxLength", 1)):
            found += ["x" * size for size in (part[key], part[key] + step) if size >= 0] if key in part else []
        found += [["x"] * part["maxItems"], ["x"] * (part["maxItems"] + 1)] if "maxItems" in part else []
    return found


def fits(schema: JSON, value: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


def needed(kind: str) -> JSON:
    """Good values for the fields that a request of that kind must have."""
    parameters = COMMANDS[kind].parameters
    schemas = {name: parameters["properties"][name] for name in parameters["required"]}
    return {name: next(v for v in candidates(schema) if fits(schema, v)) for name, schema in schemas.items()}


@pytest.mark.parametrize("kind", COMMANDS)
def test_schema_and_check_agree_on_every_field(kind: str) -> None:
    """What the check of a field takes or refuses, the JSON Schema takes or refuses too, bounds included."""
    whole = frame_of(kind, **needed(kind))
    validator(kind).validate(whole)
    assert read(json.dumps(whole)) == (kind, needed(kind))
    for name, schema in COMMANDS[kind].parameters["properties"].items():
        for value in candidates(schema):
            frame = whole | {name: value}
            good = validator(kind).is_valid(frame)
            if good and not (name == "agent_id" or "agent_id" in frame):
                assert read(json.dumps(frame))[1] == needed(kind) | {f"{name}_" if name == "from" else name: value}
            elif not good:
                error = refused(json.dumps(frame))
                assert (error["code"], error["message"].startswith(f"{name}: expected ")) == ("bad_field", True)
    for name in COMMANDS[kind].parameters["required"]:
        frame = {key: value for key, value in whole.items() if key != name}
        assert not validator(kind).is_valid(frame)
        error = refused(json.dumps(frame))
        assert (error["code"], repr(name) in error["message"]) == ("missing_field", True)


def test_a_refusal_says_what_fits() -> None:
    """The sentence names the values or the bounds that a field has."""
    for kind, name, words in (
        ("user_message", "when_busy", "one of 'queue', 'reject', 'interrupt'"), ("hello", "message_types", "a list "),
        ("user_message", "message", "a string from 0 to "), ("user_message", "from", "a string from 1 to 64 "),
        ("list_agents", "limit", "an integer from 1 to 100,"), ("search_memory", "limit", "an integer from 1 to 50,"),
        ("search_memory", "page", "an integer from 1 to "), ("create_agent", "config", "an object,"),
        ("search_memory", "store", "one of 'all', 'recall', 'archival', but"),
    ):  # fmt: skip
        told = refused(json.dumps(frame_of(kind, **needed(kind)) | {name: -1}))["message"]
        assert told.startswith(f"{name}: expected {words}"), told


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize(
    ("sent", "read_as"),
    [
        ("a\\ud800b", "a\ufffdb"), ("\\udc00\\ud83d", "\ufffd\ufffd"), ("\\ud83d\\ude00", "\U0001f600"),
        ("a\\u0000", "a\ufffd"), ("\\u0000\\u0000", "\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_what_no_text_can_hold_is_read_as_u_fffd(sent: str, read_as: str, escape: bool) -> None:
    """Lone surrogates and NUL become U+FFFD wherever they stand; any other text comes as it was, escaped or not."""
    text = "a\u0301 Å ñ 日本 العربية עברית हिन्दी ไทย 😀👨‍👩‍👧 \U0010ffff \ufffe \u2028\x01\x7f \\u0000 \\ud800 \r\n\t"
    text += "[" * 500 + '{"' * 500
    written = json.dumps(text, ensure_ascii=escape)
    for more in ("", f', "{sent}": {{"x": ["{sent}"]}}', f', "turn_id": "{sent}"'):
        frame = f'{{"type": "user_message", "message": "{sent}", "agent_name": {written}{more}}}'
        request = memws.decode_request(frame)
        assert (request["message"], request["agent_name"]) == (read_as, text)
        assert "\x00" not in str(request)
        json.dumps(request, ensure_ascii=False).encode()


@pytest.mark.parametrize("mark", ["x" * 129, 2**53 + 1, -(2**53) - 1, 10**400, 1.5, True, [], {}])
def test_a_bad_id_is_refused(mark: Any) -> None:
    """An id of another type or beyond its bounds is a bad field, and is not sent back."""
    error = refused(json.dumps({"type": "command", "command": "hello", "id": mark}))
    assert (error["code"], error["id"], error["message"][:14]) == ("bad_field", None, "id: expected a")
    assert not validator("hello").is_valid({"type": "command", "command": "hello", "id": mark})


DEEP = 100_000
HOSTILE: list[tuple[str | bytes, str, str]] = [
    ("", "not_json", "not JSON"), (" \n\t", "not_json", "not JSON"), ("hello", "not_json", "not JSON"),
    ('{"type": "user_mess', "not_json", "not JSON"), ("{} {}", "not_json", "not JSON"),
    ('{"type": "command",}', "not_json", "not JSON"), ("{'type': 'command'}", "not_json", "not JSON"),
    ('{"type": "command"} // x', "not_json", "not JSON"), ('\ufeff{"type": "command"}', "not_json", "not JSON"),
    ('{"type": "user_message", "message": "a\nb"}', "not_json", "not JSON"),
    ('{"type": "user_message", "message": "a\x00b"}', "not_json", "not JSON"),
    ('{"type": "command",\x00 "command": "hello"}', "not_json", "not JSON"),
    ('{"type": "\\x41"}', "not_json", "not JSON"),
    ('{"type": "command", "command": "hello", "x": NaN}', "not_json", "NaN"),
    ('{"type": "command", "command": "hello", "x": [-Infinity]}', "not_json", "-Infinity"),
    ('{"type": "command", "command": "hello", "x": 1e999}', "not_json", "1e999"),
    (f'{{"type": "command", "command": "hello", "x": {"9" * 5000}}}', "not_json", "4300 digits"),
    ("3", "not_object", "object"), ("null", "not_object", "object"), ('"command"', "not_object", "'command'"),
    ('[{"type": "command"}]', "not_object", "object"), ("{}", "missing_field", "type"),
    ('{"type": null}', "bad_field", "type"), ('{"type": ["command"]}', "bad_field", "type"),
    ('{"type": "user_massage"}', "bad_type", "'user_massage'"), ('{"type": "COMMAND"}', "bad_type", "'COMMAND'"),
    ('{"type": "agent_response"}', "bad_type", "'agent_response'"), ('{"type": "command"}', "missing_field", "command"),
    ('{"type": "command", "command": {}}', "bad_field", "command"),
    (b'{"type": "command", "command": "hello"}', "not_json", "binary"), (b"\xff\xfe\x00", "not_json", "binary"),
    ("[" * DEEP + "]" * DEEP, "too_deep", "deep"), ("[" * DEEP, "too_deep", "deep"),
    ('{"a":' * DEEP + "1" + "}" * DEEP, "too_deep", "deep"),
    (f'{{"type": "command", "x": {"[" * 900 + "]" * 900}}}', "too_deep", "64 levels"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "code", "words"), HOSTILE, ids=[str(row[0])[:30] for row in HOSTILE])
def test_hostile_frames_get_one_named_error(frame: str | bytes, code: str, words: str) -> None:
    """A frame that is no request gets its code and a sentence that names what is wrong."""
    error = refused(frame)
    assert (error["code"], words in error["message"]) == (code, True), error


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_counted_exactly(opening: str, closing: str) -> None:
    """Sixty-four levels are read, one more is refused, and thousands of flat lists side by side are not deep."""

    def nested(levels: int, beside: str = "") -> str:
        inner = opening * (levels - 1) + "1" + closing * (levels - 1)
        return f'{{"type": "command", "command": "hello", {beside}"x": {inner}}}'

    assert read(nested(64, '"y": [' + ",".join(["[]"] * 20_000) + "], "))[0] == "hello"
    assert refused(nested(65))["code"] == "too_deep"


MARK = "Q" * 5_000
QUOTING = [
    MARK, f'"{MARK}"', f'["{MARK}"]', f'{{"type": "{MARK}"}}', f'{{"type": {{"{MARK}": "{MARK}"}}}}',
    f'{{"type": "command", "command": ["{MARK}", "{MARK}"]}}', f'{{"type": "command", "id": "{MARK}"}}',
    f'{{"type": "user_message", "message": "a", "agent_id": "{MARK}", "agent_name": "a{MARK}"}}',
    f'{{"type": "user_message", "x": 1{"0" * 400}e{"9" * 300}, "y": "{MARK}"}}', f'{{"message": "\\{MARK}"}}',
]  # fmt: skip
LONG: list[Any] = [MARK, [MARK], {MARK: MARK}, {"x": [MARK] * 50}]
FIELDS = [(kind, name) for kind, command in COMMANDS.items() for name in command.parameters["properties"]]
QUOTING += [json.dumps(frame_of(kind, **needed(kind)) | {name: value}) for kind, name in FIELDS for value in LONG]


def test_no_error_quotes_more_than_80_characters() -> None:
    """Wherever a long input stands in a bad frame, at most eighty characters of it come back."""
    errors = 0
    for frame in QUOTING:
        try:
            read(frame)
        except memws.InvalidRequest as error:
            message = answer(frame, error)["message"]
            assert message.count("Q") + message.count("0") + message.count("9") <= 80, frame[:100]
            errors += 1
    assert errors > 100


LISTED_COMMANDS = """user_message create_agent load_agent hello list_agents get_agent update_agent rename_agent
delete_agent restore_agent get_messages search_memory get_context get_request set_block insert_passage delete_passage
cancel subscribe unsubscribe wake compact approve fork_agent rewind_agent"""
LISTED_TYPES = """internal_monologue assistant_message function_message user_message delta tool_call tool_return
memory_change context compaction heartbeat retry correction queue agent_change approval_request
progress"""
LISTED_REASONS = "done cancelled superseded interrupted max_steps budget repeated_call"


def test_the_protocol_is_that_of_the_contract(main: Main) -> None:
    """Commands, types and stop reasons are exactly the contract's; `protocol` prints a JSON Schema of each of them."""
    assert json.loads(main("protocol").stdout) == SCHEMA
    assert sorted(COMMANDS) == sorted(LISTED_COMMANDS.split())
    assert sorted(memws.EVENTS) == sorted(LISTED_TYPES.split())
    assert memws.CLASSIC_TYPES == ("internal_monologue", "assistant_message", "function_message")
    assert set(memws.LIVE_TYPES) == {"delta", "retry", "queue", "progress"}
    assert sorted(memws.STOP_REASONS) == sorted(LISTED_REASONS.split())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    definitions = SCHEMA["$defs"]
    sides = {side: {each["$ref"] for each in definitions[side]["anyOf"]} for side in ("request", "event")}
    assert sides["request"] == {f"#/$defs/{name}" for name in COMMANDS}
    others = definitions.keys() - COMMANDS.keys() - {"request", "event"}
    assert sides["event"] == {f"#/$defs/{name}" for name in others}
    assert others >= {f"event_{name}" for name in memws.EVENTS}
    assert all(definitions[name]["description"] for name in definitions.keys() - {"request", "event"})
    frame = {"type": "agent_response_end", "agent_name": "a", "turn_id": "t", "seq": 1, "time": "x", "usage": {}}
    for reason in (*memws.STOP_REASONS, "finished"):
        assert validator("agent_response_end").is_valid(frame | {"stop_reason": reason}) is (reason != "finished")


@pytest.mark.parametrize("message_type", memws.EVENTS)
def test_an_event_is_its_frame(message_type: str) -> None:
    """An event holds its fields, each copy what differs; a reply of MAX_REPLY fits a frame in any characters."""
    event = memws.response(message_type, "hi", "t1", 2)
    expected = {"type": "agent_response", "message_type": message_type, "message": "hi", "turn_id": "t1", "step": 2}
    assert (event, memws.kind_of(event)) == (expected, message_type)
    more: JSON = {"time": "2026-11-24T10:00:00.000Z", "agent_name": "sam"}
    more |= {} if message_type in memws.LIVE_TYPES else {"seq": 7}
    assert check_event(memws.with_fields(memws.encode_json(event), **more)) == expected | more
    assert memws.response(message_type, "hi") == {key: expected[key] for key in ("type", "message_type", "message")}
    for letter in ("x", '"', "\\", "\x01", "\x7f", "日", "\U0001f600"):
        event = memws.response(message_type, letter * memws.MAX_REPLY, "\x01" * 128, 1, seq=2**53, time="x" * 24)
        text = memws.with_fields(memws.encode_json(event), agent_name="名" * 64, id="\x01" * 128)
        assert len(text.encode()) <= memws.MAX_FRAME
    with pytest.raises(ValueError, match="JSON"):
        memws.encode_json(event | {"step": float("nan")})
