"""The wire: what a frame is read as, what bad ones get, what the protocol's schema says, how events are written."""

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

import memws

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
jsonschema = pytest.importorskip("jsonschema")

JSON = dict[str, Any]

SCHEMA = memws.protocol_schema()
REQUESTS: dict[str, type[memws.Request]] = {"user_message": memws.UserMessage, **memws.COMMANDS}
CODES = {"not_json", "not_object", "bad_type", "bad_field", "missing_field", "too_deep", "unknown_command"}
"What decoding may answer with; too_large and rate_limited are the session's."

# One draw for all runs: a test that fails here fails everywhere.
SETTINGS = hypothesis.settings(max_examples=400, deadline=None, derandomize=True, database=None)


def validator(name: str) -> Any:
    """What checks a frame against one definition of the protocol."""
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]})


VALIDATORS = {name: validator(name) for name in SCHEMA["$defs"]}


def frame_of(kind: str, **fields: Any) -> JSON:
    """A request of that kind, with these fields only."""
    head = {"type": "user_message"} if kind == "user_message" else {"type": "command", "command": kind}
    return {**head, **fields}


def needed(kind: str) -> JSON:
    """Good values for the fields that a request of that kind must have."""
    fields = REQUESTS[kind].fields.values()
    return {declared.name: good_values(declared)[0] for declared in fields if declared.required}


def good_values(declared: memws.Field[Any]) -> list[Any]:
    """Values that a field takes, at its bounds where it has any."""
    match declared:
        case memws.Maybe():
            return [*good_values(declared.inner), None]
        case memws.Text():
            return ["x" * max(1, declared.least), "é\n\t", "x" * declared.least, "\U0001f600" * min(declared.most, 900)]
        case memws.Integer():
            return [declared.least, declared.most]
        case memws.Flag():
            return [True, False]
        case memws.Choice():
            return list(declared.words)
        case memws.Texts():
            return [[], ["*"], [""] * declared.most]
        case memws.Object():
            return [{}, {"any": [1, None, {"thing": True}]}]
        case _:
            return [0, -1, "x", None, [], {}]


def bad_values(declared: memws.Field[Any]) -> list[Any]:
    """Values that a field refuses: of every other type, and just beyond its bounds."""
    any_type: list[Any] = [None, True, 3, 1.5, "x", [], {}]
    match declared:
        case memws.Maybe():
            return [value for value in bad_values(declared.inner) if value is not None]
        case memws.Text():
            wrong = [value for value in any_type if not isinstance(value, str)]
            beyond = ["x" * (declared.most + 1)] if declared.most < 20_000 else []
            return wrong + beyond + [""] * (declared.least > 0)
        case memws.Integer():
            return [None, True, 1.5, "3", [], {}, declared.least - 1, declared.most + 1, 10**30]
        case memws.Flag():
            return [None, 0, 1, "true", [], {}]
        case memws.Choice():
            return [*any_type, declared.words[0].upper(), f"{declared.words[0]} "]
        case memws.Texts():
            return [None, True, 3, "x", {}, [1], ["x", None], ["x"] * (declared.most + 1)]
        case memws.Object():
            return [value for value in any_type if not isinstance(value, dict)]
        case _:
            return []


FIELDS = [(kind, declared) for kind, request in REQUESTS.items() for declared in request.fields.values()]


def refused(frame: str | bytes) -> JSON:
    """The server_error that a frame gets, if it gets a good one: strict JSON, small, of a known code, in the schema."""
    with pytest.raises(memws.InvalidRequest) as caught:
        memws.decode_request(frame)
    return answer(caught.value)


def answer(error: memws.InvalidRequest) -> JSON:
    text = memws.server_error(error)
    assert len(text.encode()) <= 4096
    frame: JSON = memws.decode_json(text)
    assert frame["type"] == "server_error"
    assert frame["code"] in CODES
    assert frame["message"]
    VALIDATORS["server_error"].validate(frame)
    return frame


# ---- good frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_with_its_needed_fields_is_read(kind: str) -> None:
    """A frame with only what it needs becomes the request of its kind, every other field at its default."""
    frame = frame_of(kind, **needed(kind))
    VALIDATORS[kind].validate(frame)
    request = memws.decode_request(json.dumps(frame))
    assert type(request) is REQUESTS[kind]
    assert request.id is None
    for attribute, declared in REQUESTS[kind].fields.items():
        expected = needed(kind).get(declared.name, declared.default)
        assert getattr(request, attribute) == expected, attribute


@pytest.mark.parametrize(("kind", "declared"), FIELDS, ids=[f"{kind}.{field.name}" for kind, field in FIELDS])
def test_schema_and_check_agree_on_every_field(kind: str, declared: memws.Field[Any]) -> None:
    """What the check of a field takes or refuses, the JSON Schema takes or refuses too, bounds included."""
    for value in good_values(declared):
        frame = frame_of(kind, **needed(kind)) | {declared.name: value}
        assert VALIDATORS[kind].is_valid(frame), value
        request = memws.decode_request(json.dumps(frame))
        attribute = next(name for name, field in type(request).fields.items() if field is declared)
        assert getattr(request, attribute) == value
    for value in bad_values(declared):
        frame = frame_of(kind, **needed(kind)) | {declared.name: value}
        assert not VALIDATORS[kind].is_valid(frame), value
        error = refused(json.dumps(frame))
        assert error["code"] == "bad_field"
        assert error["message"].startswith(f"{declared.name}: expected ")
    if declared.required:
        frame = frame_of(kind, **needed(kind))
        del frame[declared.name]
        assert not VALIDATORS[kind].is_valid(frame)
        error = refused(json.dumps(frame))
        assert error["code"] == "missing_field"
        assert repr(declared.name) in error["message"]


def test_unknown_fields_are_ignored() -> None:
    """Fields that a request does not have change nothing, whatever they hold."""
    frame = {"type": "user_message", "message": "Hi", "stream": True, "from": 5, "": None, "agentname": {"x": []}}
    VALIDATORS["request"].validate(frame)
    request = memws.decode_request(json.dumps(frame))
    assert isinstance(request, memws.UserMessage)
    assert (request.message, request.agent_name, request.when_busy) == ("Hi", None, "queue")


def test_a_client_of_memgpt_is_understood() -> None:
    """The frames of MemGPT 0.2.7's own client are read as they were meant."""
    said = memws.decode_request('{"type": "user_message", "message": "Hi", "agent_name": "agent_1"}')
    created = memws.decode_request('{"type": "command", "command": "create_agent", "config": {"name": "a"}}')
    loaded = memws.decode_request('{"type": "command", "command": "load_agent", "name": "a"}')
    assert (vars(said)["message"], vars(said)["agent_name"]) == ("Hi", "agent_1")
    assert (type(created), vars(created)["config"]) == (memws.CreateAgent, {"name": "a"})
    assert (type(loaded), vars(loaded)["name"]) == (memws.LoadAgent, "a")


@pytest.mark.parametrize("escape", [True, False])
def test_texts_of_every_script_arrive_whole(escape: bool) -> None:
    """A text comes through as it was sent, escaped or not: every plane, controls, no normalization."""
    text = "a\u0301 Å ñ 日本 العربية עברית हिन्दी ไทย 😀👨‍👩‍👧 \U0010ffff \ufffe \u2028\x01\x7f \\u0000 \\ud800 \r\n\t"
    frame = json.dumps({"type": "user_message", "message": text}, ensure_ascii=escape)
    assert vars(memws.decode_request(frame))["message"] == text


# ---- marks: id, agent_id ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["", "a", "x" * 128, "é" * 128, 0, -1, 2**53, -(2**53)])
def test_an_id_is_kept_as_it_came(mark: str | int) -> None:
    """A request's id comes back as it was sent, on answers and on errors."""
    good = memws.decode_request(json.dumps({"type": "command", "command": "hello", "id": mark}))
    assert good.id == mark
    assert type(good.id) is type(mark)
    assert refused(json.dumps({"type": "command", "command": "bogus", "id": mark}))["id"] == mark
    assert refused(json.dumps({"type": "user_message", "id": mark}))["id"] == mark
    assert refused(json.dumps({"type": "user_message", "message": 1, "id": mark}))["id"] == mark
    assert isinstance(good, memws.Command)
    done = memws.decode_json(memws.command_response(good, {}))
    failed = memws.decode_json(memws.command_error(good, memws.StoreFailed("x")))
    turned_away = memws.decode_json(memws.refusal(mark, None, None, memws.StoreFailed("x")))
    assert [frame["id"] for frame in (done, failed, turned_away)] == [mark, mark, mark]


@pytest.mark.parametrize("mark", ["x" * 129, 2**53 + 1, -(2**53) - 1, 10**400, 1.5, True, [], {}])
def test_a_bad_id_is_refused(mark: Any) -> None:
    """An id of another type or beyond its bounds is a bad field, and is not sent back."""
    error = refused(json.dumps({"type": "command", "command": "hello", "id": mark}))
    assert (error["code"], error["id"]) == ("bad_field", None)
    assert error["message"].startswith("id: expected ")
    assert not VALIDATORS["hello"].is_valid({"type": "command", "command": "hello", "id": mark})


def test_no_id_is_no_field() -> None:
    """Where a request had no id, no answer has one; only for a frame that could not be read is it null."""
    request = memws.decode_request('{"type": "command", "command": "wake"}')
    assert isinstance(request, memws.Command)
    answers = [
        memws.command_response(request, {}),
        memws.command_error(request, memws.Refused("busy", "x")),
        memws.refusal(None, "turn 1", "sam", memws.Refused("busy", "x")),
        json.dumps(refused('{"type": "command", "command": "bogus"}')),
        json.dumps(refused('{"type": "user_message"}')),
        json.dumps(refused('{"type": "user_message", "message": 1, "id": null}')),
    ]
    assert not any('"id"' in text for text in answers)
    assert [refused(frame)["id"] for frame in ("", "[]", "{")] == [None, None, None]


@pytest.mark.parametrize("bad", ['"\\u0000"', '"\\ud800"', '{"\\u0000": 1}', "[" * 70 + "]" * 70])
def test_a_frame_with_bad_text_keeps_its_id(bad: str) -> None:
    """A frame that was read up to a bad text or nesting is answered under its id."""
    assert refused(f'{{"type": "user_message", "message": "a", "extra": {bad}, "id": 5}}')["id"] == 5


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"agent_id": "sam"}, "sam"),
        ({"agent_id": "sam", "agent_name": "sam"}, "sam"),
        ({"agent_id": "sam", "agent_name": None}, "sam"),
        ({"agent_id": None, "agent_name": "sam"}, "sam"),
        ({"agent_id": None}, None),
    ],
)
def test_agent_id_is_read_as_agent_name(fields: JSON, name: str | None) -> None:
    """MemGPT 0.3.25's agent_id names the agent where agent_name does not, in messages and commands."""
    for head in ({"type": "user_message", "message": "Hi"}, {"type": "command", "command": "get_agent"}):
        assert vars(memws.decode_request(json.dumps(head | fields)))["agent_name"] == name


@pytest.mark.parametrize("fields", [{"agent_id": "a", "agent_name": "b"}, {"agent_id": 5}, {"agent_id": ["a"]}])
def test_a_wrong_agent_id_is_a_bad_field(fields: JSON) -> None:
    """An agent_id that differs from agent_name, or is no text, is a bad field."""
    error = refused(json.dumps({"type": "user_message", "message": "Hi", "id": 1} | fields))
    assert (error["code"], error["id"]) == ("bad_field", 1)


# ---- bad frames ------------------------------------------------------------------------------------------------------

DEEP = 100_000
HOSTILE: list[tuple[str, str | bytes, str, str]] = [
    ("empty", "", "not_json", "not JSON"),
    ("space", " \n\t", "not_json", "not JSON"),
    ("words", "hello", "not_json", "not JSON"),
    ("cut", '{"type": "user_mess', "not_json", "not JSON"),
    ("two", "{} {}", "not_json", "not JSON"),
    ("trailing comma", '{"type": "command",}', "not_json", "not JSON"),
    ("single quotes", "{'type': 'command'}", "not_json", "not JSON"),
    ("comment", '{"type": "command"} // x', "not_json", "not JSON"),
    ("byte order mark", '\ufeff{"type": "command"}', "not_json", "not JSON"),
    ("raw control", '{"type": "user_message", "message": "a\nb"}', "not_json", "not JSON"),
    ("raw NUL", '{"type": "user_message", "message": "a\x00b"}', "not_json", "not JSON"),
    ("NUL between", '{"type": "command",\x00 "command": "hello"}', "not_json", "not JSON"),
    ("bad escape", '{"type": "\\x41"}', "not_json", "not JSON"),
    ("NaN", '{"type": "command", "command": "hello", "x": NaN}', "not_json", "NaN"),
    ("Infinity", '{"type": "command", "command": "hello", "x": Infinity}', "not_json", "Infinity"),
    ("-Infinity", '{"type": "command", "command": "hello", "x": [-Infinity]}', "not_json", "-Infinity"),
    ("huge float", '{"type": "command", "command": "hello", "x": 1e999}', "not_json", "1e999"),
    ("huge integer", f'{{"type": "command", "command": "hello", "x": {"9" * 5000}}}', "not_json", "4300 digits"),
    ("number", "3", "not_object", "object"),
    ("null", "null", "not_object", "object"),
    ("true", "true", "not_object", "object"),
    ("string", '"command"', "not_object", "'command'"),
    ("list", '[{"type": "command"}]', "not_object", "object"),
    ("no type", "{}", "missing_field", "'type'"),
    ("null type", '{"type": null}', "bad_field", "type"),
    ("number type", '{"type": 5}', "bad_field", "type"),
    ("list type", '{"type": ["command"]}', "bad_field", "type"),
    ("unknown type", '{"type": "user_massage"}', "bad_type", "'user_massage'"),
    ("upper type", '{"type": "COMMAND"}', "bad_type", "'COMMAND'"),
    ("empty type", '{"type": ""}', "bad_type", "''"),
    ("server's type", '{"type": "agent_response"}', "bad_type", "'agent_response'"),
    ("no command", '{"type": "command"}', "missing_field", "'command'"),
    ("null command", '{"type": "command", "command": null}', "bad_field", "command"),
    ("object command", '{"type": "command", "command": {}}', "bad_field", "command"),
    ("unknown command", '{"type": "command", "command": "drop"}', "unknown_command", "'drop'"),
    ("dunder command", '{"type": "command", "command": "__class__"}', "unknown_command", "'__class__'"),
    ("no message", '{"type": "user_message"}', "missing_field", "'message'"),
    ("null message", '{"type": "user_message", "message": null}', "bad_field", "message"),
    ("config list", '{"type": "command", "command": "create_agent", "config": []}', "bad_field", "config"),
    ("no config", '{"type": "command", "command": "create_agent"}', "missing_field", "'config'"),
    ("surrogate", '{"type": "user_message", "message": "a\\ud800"}', "bad_field", "'message'"),
    ("low surrogate", '{"type": "user_message", "message": "\\udc00\\ud800"}', "bad_field", "'message'"),
    ("NUL", '{"type": "user_message", "message": "a\\u0000"}', "bad_field", "'message'"),
    ("NUL inside", '{"type": "x", "config": {"blocks": [{"value": "\\u0000"}]}}', "bad_field", "'value'"),
    ("surrogate name", '{"type": "x", "\\ud83d": 1}', "bad_field", "field's name"),
    ("NUL name", '{"type": "x", "a": {"b\\u0000": 1}}', "bad_field", "field's name"),
    ("binary", b'{"type": "command", "command": "hello"}', "not_json", "binary"),
    ("binary junk", b"\xff\xfe\x00", "not_json", "binary"),
    ("deep lists", "[" * DEEP + "]" * DEEP, "too_deep", "64 levels"),
    ("deep open", "[" * DEEP, "too_deep", "64 levels"),
    ("deep objects", '{"a":' * DEEP + "1" + "}" * DEEP, "too_deep", "64 levels"),
    ("deep field", f'{{"type": "command", "x": {"[" * 900 + "]" * 900}}}', "too_deep", "64 levels"),
]  # fmt: skip


@pytest.mark.parametrize(("frame", "code", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_frames_get_one_named_error(frame: str | bytes, code: str, words: str) -> None:
    """A frame that is no request gets its code and a sentence that names what is wrong."""
    error = refused(frame)
    assert (error["code"], words in error["message"]) == (code, True), error


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_counted_exactly(opening: str, closing: str) -> None:
    """Sixty-four levels are read, one more is refused, however few brackets the rest has."""

    def nested(levels: int) -> str:
        inner = opening * (levels - 1) + "1" + closing * (levels - 1)
        return f'{{"type": "command", "command": "hello", "x": {inner}}}'

    assert memws.MAX_DEPTH == 64
    assert isinstance(memws.decode_request(nested(64)), memws.Hello)
    assert refused(nested(65))["code"] == "too_deep"


def test_many_brackets_side_by_side_are_not_deep() -> None:
    """A wide frame with thousands of flat lists is read."""
    frame = '{"type": "command", "command": "create_agent", "config": {"blocks": [' + ",".join(["[]"] * 20_000) + "]}}"
    assert isinstance(memws.decode_request(frame), memws.CreateAgent)


def test_brackets_in_text_are_text() -> None:
    """Brackets and escapes inside a message count as its characters only."""
    text = "[" * 500 + '{"' * 500 + "\\u0000 \\ud800"
    request = memws.decode_request(json.dumps({"type": "user_message", "message": text}))
    assert vars(request)["message"] == text


MARK = "Q" * 5_000
QUOTING = [
    MARK,
    f'"{MARK}"',
    f'["{MARK}"]',
    f'{{"type": "{MARK}"}}',
    f'{{"type": {{"{MARK}": "{MARK}"}}}}',
    f'{{"type": "command", "command": "{MARK}"}}',
    f'{{"type": "command", "command": ["{MARK}", "{MARK}"]}}',
    f'{{"type": "command", "command": "hello", "id": "{MARK}"}}',
    f'{{"type": "user_message", "message": {{"{MARK}": "{MARK}"}}}}',
    f'{{"type": "user_message", "message": "a", "agent_id": "{MARK}", "agent_name": "a{MARK}"}}',
    f'{{"type": "user_message", "message": "a", "{MARK}": {{"{MARK}": "{MARK}\\u0000"}}}}',
    f'{{"type": "user_message", "message": "a", "{MARK}\\u0000": 1}}',
    f'{{"type": "user_message", "message": "a", "x": 1{"0" * 400}e{"9" * 300}, "y": "{MARK}"}}',
    f'{{"type": "user_message", "message": "\\{MARK}"}}',
]
QUOTING += [
    json.dumps(frame_of(kind, **needed(kind)) | {declared.name: value})
    for kind, declared in FIELDS
    for value in (MARK, [MARK], {MARK: MARK}, {"x": [MARK] * 50})
    if not isinstance(declared, memws.Anything)
]


def test_no_error_quotes_more_than_80_characters() -> None:
    """Wherever a long input stands in a bad frame, at most eighty characters of it come back."""
    told = 0
    for frame in QUOTING:
        try:
            memws.decode_request(frame)
        except memws.InvalidRequest as error:
            message = answer(error)["message"]
            assert message.count("Q") + message.count("0") + message.count("9") <= 80, frame[:100]
            told += 1
    assert told > 100


def test_a_wide_frame_under_a_long_name_costs_little_memory() -> None:
    """A frame of 1 MiB is checked within sixteen times its size, also where one long name holds very many values."""
    name = "k" * 20_000
    values = ",".join(["1"] * 20_000)
    frame = f'{{"type": "user_message", "message": "\\u0041", "{name}": [{values}]}}'
    tracemalloc.start()
    try:
        assert isinstance(memws.decode_request(frame), memws.UserMessage)
        assert tracemalloc.get_traced_memory()[1] < 16 * memws.MAX_FRAME
    finally:
        tracemalloc.stop()


# ---- any frame -------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec=None), max_size=30)  # lone surrogates too
NUMBERS = st.integers() | st.floats() | st.integers(-3, 130)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(["queue", "all", "*", "hello", "2026-01-31"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from(sorted({declared.name for _, declared in FIELDS} | {"type", "command", "id", "agent_id"}))


@st.composite
def near_requests(draw: Any) -> JSON:
    """A frame of a known kind whose fields hold good values, bad ones and junk."""
    kind = draw(st.sampled_from(list(REQUESTS)))
    frame = frame_of(kind)
    for declared in REQUESTS[kind].fields.values():
        if declared.required or draw(st.booleans()):
            known = st.sampled_from([*good_values(declared), *bad_values(declared)])
            frame[declared.name] = draw(st.one_of(st.sampled_from(good_values(declared)), known, VALUES))
    frame.update(draw(st.dictionaries(WORDS | TEXTS, VALUES, max_size=1)))
    return frame


FRAMES = st.one_of(
    st.text(st.characters(codec=None)),
    st.binary(),
    VALUES.map(json.dumps),
    st.builds(lambda value: json.dumps(value, ensure_ascii=False), VALUES),
    st.dictionaries(WORDS, VALUES).map(json.dumps),
    near_requests().map(json.dumps),
)


@SETTINGS
@hypothesis.given(FRAMES)
def test_any_frame_is_a_request_or_a_named_error(frame: str | bytes) -> None:
    """Whatever a frame holds, it becomes a checked request or an InvalidRequest whose answer is small strict JSON."""
    try:
        request = memws.decode_request(frame)
    except memws.InvalidRequest as error:
        answer(error)
    else:
        assert type(request) in REQUESTS.values()
        assert isinstance(frame, str)
        VALIDATORS["request"].validate(json.loads(frame))


@SETTINGS
@hypothesis.given(near_requests(), st.data())
def test_a_cut_or_changed_frame_is_read_or_refused(frame: JSON, data: Any) -> None:
    """A frame with a piece cut out, doubled or replaced is read or refused, never more."""
    text = json.dumps(frame)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 20)))
    text = text[:start] + data.draw(st.sampled_from(["", text[start:end] * 2]) | TEXTS) + text[end:]
    try:
        memws.decode_request(text)
    except memws.InvalidRequest as error:
        answer(error)


def plain(value: Any) -> Iterator[Any]:
    """A JSON value and all values and names inside it."""
    yield value
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from plain(item)
    elif isinstance(value, list):
        for item in value:
            yield from plain(item)


def beyond_schema(frame: JSON) -> bool:
    """Whether a frame has what JSON Schema cannot tell: texts that are none, 3.0 (an integer to it), an alias."""
    return "agent_id" in frame or any(
        (isinstance(item, str) and ("\x00" in item or any("\ud800" <= char <= "\udfff" for char in item)))
        or isinstance(item, float)
        for item in plain(frame)
    )


@SETTINGS
@hypothesis.given(near_requests().filter(lambda frame: not beyond_schema(frame)))
def test_schema_and_decoder_agree(frame: JSON) -> None:
    """The decoder reads exactly the frames that the protocol's schema describes."""
    try:
        memws.decode_request(json.dumps(frame))
    except memws.InvalidRequest:
        read = False
    else:
        read = True
    assert VALIDATORS["request"].is_valid(frame) is read


# ---- the schema ------------------------------------------------------------------------------------------------------


def test_schema_is_valid_and_whole() -> None:
    """The protocol is a valid JSON Schema that describes every request, event and field of the module."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    definitions = SCHEMA["$defs"]
    assert REQUESTS.keys() <= definitions.keys()
    assert {f"event_{name}" for name in memws.MESSAGE_TYPES} <= definitions.keys()
    for kind, request in REQUESTS.items():
        properties = definitions[kind]["properties"]
        assert {declared.name for declared in request.fields.values()} <= properties.keys()
        assert all(properties[declared.name]["description"] for declared in request.fields.values())
    references = {each["$ref"] for side in ("request", "event") for each in definitions[side]["anyOf"]}
    assert references == {f"#/$defs/{name}" for name in definitions if name not in ("request", "event")}


def test_commands_are_those_of_the_contract() -> None:
    """Every command of the contract that is not for later is there, and no other."""
    listed = """create_agent load_agent hello list_agents get_agent update_agent rename_agent delete_agent restore_agent
    get_messages search_memory get_context get_request set_block insert_passage delete_passage cancel subscribe
    unsubscribe wake compact"""
    assert sorted(memws.COMMANDS) == sorted(listed.split())


def test_message_types_are_those_of_the_contract() -> None:
    """Every message type of the contract that is not for later is there; three are classic, three only live."""
    listed = """internal_monologue assistant_message function_message user_message delta tool_call tool_return
    memory_change context compaction heartbeat retry correction queue agent_change"""
    assert sorted(memws.MESSAGE_TYPES) == sorted(listed.split())
    assert set(memws.CLASSIC_TYPES) == {"internal_monologue", "assistant_message", "function_message"}
    assert {name for name, kind in memws.MESSAGE_TYPES.items() if kind.live} == {"delta", "retry", "queue"}


# ---- events ----------------------------------------------------------------------------------------------------------

WORST = ["x", '"', "\\", "\x01", "\x7f", "é", "日", "\U0001f600", "\ufffd"]


@pytest.mark.parametrize("message_type", memws.MESSAGE_TYPES)
def test_an_event_is_encoded_once_and_then_extended(message_type: str) -> None:
    """An encoded event holds type, message type, fields, seq and time, and each copy only gets more fields."""
    (event,) = memws.response_events(message_type, "hi", turn_id="t1", step=2)
    seq = None if event.live else 7
    event.seq, event.time = seq, "2026-11-24T10:00:00.000Z"
    expected = {"type": "agent_response", "message_type": message_type, "message": "hi", "turn_id": "t1", "step": 2}
    expected |= {} if seq is None else {"seq": seq}
    expected |= {"time": "2026-11-24T10:00:00.000Z"}
    assert memws.decode_json(event.text) == expected
    assert memws.event_kind(event.text) == ("agent_response", message_type)
    sent = event.frame("sam")
    assert memws.decode_json(sent) == expected | {"agent_name": "sam"}
    VALIDATORS[f"event_{message_type}"].validate(memws.decode_json(sent))
    assert event.live is (message_type in ("delta", "retry", "queue"))


def test_starts_and_terminals_are_encoded() -> None:
    """Starts and terminal frames have no message type and no step, and fit the schema."""
    start = memws.Event("agent_response_start", turn_id="t1")
    end = memws.Event("agent_response_end", turn_id="t1", step=3, stop_reason="done", usage={"input_tokens": 1})
    failed = memws.Event(
        "agent_response_error", turn_id="t1", message="no", code="model_auth", stop_reason="error", usage={}
    )
    for seq, event in enumerate((start, end, failed), 1):
        event.seq, event.time = seq, memws.now_text()
        frame = memws.decode_json(event.frame("sam"))
        VALIDATORS[event.type].validate(frame)
        assert (frame["seq"], frame["turn_id"], frame["agent_name"]) == (seq, "t1", "sam")
        assert "step" not in frame
        assert "message_type" not in frame
        assert memws.event_kind(event.text) == (event.type, "")
    assert [event.starts for event in (start, end, failed)] == [True, False, False]
    assert [event.terminal for event in (start, end, failed)] == [False, True, True]


def test_every_stop_reason_is_in_the_schema() -> None:
    """The end of a turn may give each stop reason of the contract and no other."""
    listed = ["done", "cancelled", "superseded", "interrupted", "max_steps", "budget", "repeated_call"]
    assert sorted(memws.STOP_REASONS) == sorted(listed)
    frame = {"type": "agent_response_end", "agent_name": "a", "turn_id": "t", "seq": 1, "time": "x", "usage": {}}
    for reason in listed:
        assert VALIDATORS["agent_response_end"].is_valid(frame | {"stop_reason": reason})
    assert not VALIDATORS["agent_response_end"].is_valid(frame | {"stop_reason": "finished"})


@pytest.mark.parametrize("letter", WORST)
@pytest.mark.parametrize("length", [0, 1, memws.TEXT_PART, memws.TEXT_PART + 1, 3 * memws.TEXT_PART])
def test_long_texts_become_parts(letter: str, length: int) -> None:
    """A text is one event, or several numbered parts that join to it; no frame exceeds 1 MiB."""
    text = letter * length
    events = memws.response_events("assistant_message", text, turn_id="x" * 128, step=1)
    frames = []
    for seq, event in enumerate(events, 1):
        event.seq, event.time = seq, memws.now_text()
        sent = memws.extend_json(event.frame("é" * 64), id="\x01" * 128)
        assert len(sent.encode()) <= memws.MAX_FRAME
        frames.append(memws.decode_json(sent))
        VALIDATORS["event_assistant_message"].validate(frames[-1])
    assert "".join(frame["message"] for frame in frames) == text
    count = max(1, -(-length // memws.TEXT_PART))
    if count == 1:
        assert "part" not in frames[0]
        assert "parts" not in frames[0]
    else:
        assert [(frame["part"], frame["parts"]) for frame in frames] == [(n, count) for n in range(1, count + 1)]


def test_fields_of_a_long_text_stand_on_every_part() -> None:
    """Each part of a long text carries the fields of the whole."""
    events = memws.response_events("tool_return", "x" * 300_000, turn_id="t", step=1, status="OK", name="f")
    assert [event.fields["status"] + event.fields["name"] for event in events] == ["OKf"] * 3


@SETTINGS
@hypothesis.given(
    st.text(st.characters(codec="utf-8")), st.integers(1, 2**53), st.text(st.characters(codec="utf-8"), max_size=64)
)
def test_any_text_survives_the_wire(text: str, seq: int, name: str) -> None:
    """A message, a seq and a name are the same after encoding, extending and decoding."""
    (event,) = memws.response_events("assistant_message", text, turn_id=None, step=0)
    event.seq, event.time = seq, "now"
    frame = memws.decode_json(event.frame(name))
    assert (frame["message"], frame["seq"], frame["agent_name"]) == (text, seq, name)


def test_a_text_of_nothing_is_one_empty_part() -> None:
    """A text is cut into full parts and a rest, and is never without a part."""
    part = memws.TEXT_PART
    for text, sizes in (("", [0]), ("x" * part, [part]), ("x" * (2 * part + 1), [part, part, 1])):
        assert [len(text[span]) for span in memws.spans_of(text)] == sizes


@SETTINGS
@hypothesis.given(
    st.recursive(st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)),
    st.integers(1, 4),
)
def test_long_texts_are_encoded_slice_by_slice(value: Any, part: int) -> None:
    """The JSON and the repr of a value are the same, however short the slices are in which its texts are encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memws, "TEXT_PART", part)
        assert memws.encode_long(value) == memws.encode_json(value)
        assert "".join(memws.repr_pieces(value)) == repr(value)


@pytest.mark.parametrize("first", ["", "'", '"', "'x\"", "\\'\n\x00\ud800é"])
@pytest.mark.parametrize("last", ["", "'", '"', "'x\""])
def test_long_texts_keep_their_quotes(first: str, last: str) -> None:
    """Quotes are chosen and escaped by all that a text holds, also where a slice holds none or others."""
    text = first + "x" * memws.TEXT_PART + last
    assert "".join(memws.repr_pieces({"message": [text, 1]})) == repr({"message": [text, 1]})
    assert memws.encode_long({"message": [text, 1]}) == memws.encode_json({"message": [text, 1]})


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_command_answers_fit_the_schema() -> None:
    """Good and bad answers to a command say which one, whether it went well, and what came of it."""
    request = memws.decode_request('{"type": "command", "command": "get_agent", "id": 1}')
    assert isinstance(request, memws.Command)
    done = memws.decode_json(memws.command_response(request, {"agent_name": "sam"}))
    named = memws.decode_json(memws.command_response(request, {}, "OK: Agent 'sam' loaded"))
    failed = memws.decode_json(memws.command_error(request, memws.Refused("unknown_seq", "too high", last_seq=4)))
    for frame in (done, named, failed):
        VALIDATORS["command_response"].validate(frame)
        assert (frame["type"], frame["command"], frame["id"]) == ("command_response", "get_agent", 1)
    assert (done["ok"], done["status"][:4], done["result"]) == (True, "OK: ", {"agent_name": "sam"})
    assert named["status"] == "OK: Agent 'sam' loaded"
    assert (failed["ok"], failed["status"]) == (False, "Error: too high")
    assert failed["error"] == {"code": "unknown_seq", "message": "too high", "last_seq": 4}


def test_a_refused_message_has_no_seq() -> None:
    """A message that never becomes a turn gets id, turn_id, code and a time, and nothing that is stored."""
    frame = memws.decode_json(memws.refusal(5, "t1", "sam", memws.Refused("queue_full", "wait")))
    VALIDATORS["agent_response_error"].validate(frame)
    assert "seq" not in frame
    told = [frame[name] for name in ("type", "message", "code", "stop_reason", "id", "turn_id", "agent_name")]
    assert told == ["agent_response_error", "wait", "queue_full", "error", 5, "t1", "sam"]
    bare = memws.decode_json(memws.refusal(None, None, "x" * 1_000, memws.Refused("unknown_agent", "no")))
    assert bare.keys() == {"type", "message", "code", "stop_reason", "time"}


# ---- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")], {"x": {"y": float("nan")}}])
def test_nothing_that_is_no_json_is_written(value: Any) -> None:
    """NaN and infinities are refused before they reach a client whose parser would fail."""
    with pytest.raises(ValueError, match="JSON"):
        memws.encode_json(value)


@SETTINGS
@hypothesis.given(VALUES)
def test_json_is_strict_in_both_directions(value: Any) -> None:
    """What is read is what was written; NaN, infinities and numbers beyond a double are not read at all."""
    text = json.dumps(value)
    odd = any(isinstance(item, float) and item - item != 0 for item in plain(value))
    if odd:
        with pytest.raises(ValueError, match="not JSON"):
            memws.decode_json(text)
    else:
        assert memws.decode_json(text) == value
        assert memws.decode_json(memws.encode_json(value)) == value
