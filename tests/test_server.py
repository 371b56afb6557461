"""Section 11, Server: every command, event and refusal of the wire, over real sockets."""

import asyncio
import json
import os
import random
import sqlite3
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from typing import Any

import openai  # noqa: F401 (half a second, once, and not in the turn of some test)
import pytest
from endpoint import Endpoint, Reply
from wire import JSON, LIMIT, Wire, is_terminal, of_kind, shape, wire

import memws

pytestmark = pytest.mark.anyio

SEEDS = int(os.environ.get("MEMWS_TEST_SEEDS", "3"))
Serve = Callable[..., memws.WebSocketServer]
Server = memws.WebSocketServer


@pytest.fixture
def offline(serve: Serve) -> Server:
    """A server whose agents answer from the offline model."""
    return serve()


@pytest.fixture
def online(serve: Serve, endpoint: Endpoint) -> Callable[..., Server]:
    """Starts a server whose model is the scripted endpoint."""

    def start(**options: Any) -> Server:
        return serve(base_url=endpoint.url, model="test-model", api_key="key", **options)

    return start


@pytest.fixture
def server(online: Callable[..., Server]) -> Server:
    """A server whose model is the scripted endpoint."""
    return online()


def reply(*texts: str, **more: Any) -> Reply:
    """An answer through send_message."""
    return Reply(calls=[("send_message", {"message": text}) for text in texts], **more)


HELD = reply("held", hold=True)


async def asked(endpoint: Endpoint, count: int) -> None:
    """Wait until the model has been asked `count` times in all."""
    await asyncio.to_thread(endpoint.wait_requests, count, LIMIT)


async def hold(client: Wire, endpoint: Endpoint, message: str = "runs", **fields: Any) -> JSON:
    """Begin a turn whose model waits for endpoint.release(); its start."""
    endpoint.script(HELD)
    count = len(endpoint.requests)
    await client.say(message, **fields)
    start = await client.started()
    await asked(endpoint, count + 1)
    return start


@contextmanager
def locked(server: Server) -> Iterator[None]:
    """Another program holds the database's write lock: whatever the server writes waits."""
    connection = sqlite3.connect(server.options.db, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


@contextmanager
def refusing(server: Server, table: str, rows: str = "1") -> Iterator[None]:
    """The database refuses new rows of a table, those for which `rows` is true."""
    connection = sqlite3.connect(server.options.db, isolation_level=None)
    connection.execute(
        f"CREATE TRIGGER broken BEFORE INSERT ON {table} WHEN {rows} BEGIN SELECT RAISE(ABORT, 'refused'); END"
    )
    try:
        yield
    finally:
        connection.execute("DROP TRIGGER broken")
        connection.close()


def ends_of(frames: list[JSON]) -> dict[Any, str]:
    """Why each message that has an id ended: a stop reason, or the code of an error."""
    ends = [frame for frame in frames if is_terminal(frame)]
    assert len(ends) == len({frame.get("id") for frame in ends}), "a message has two terminal frames"
    return {frame.get("id"): frame.get("code", frame["stop_reason"]) for frame in ends}


# ---- agents ----------------------------------------------------------------------------------------------------------


async def test_create_agent_needs_no_config(offline: Server) -> None:
    """create_agent with an empty config makes up a name, and the agent becomes the connection's current one."""
    async with wire(offline) as client:
        response = await client.command("create_agent", config={})
        name = response["result"]["agent_name"]
        assert response["status"] == "OK: Agent initialized"
        assert response["result"] == {"agent_name": name, "warnings": []}
        assert (await client.ok("get_agent"))["agent_name"] == name


async def test_create_agent_takes_its_config(offline: Server) -> None:
    """Everything that a config names is what get_agent tells, bundled personas and humans by their text."""
    config = {
        "name": "sam",
        "persona": "sam_pov",
        "human": "Likes tea.",
        "model": "offline",
        "context_window": 9_000,
        "blocks": [{"label": "plan", "value": "rest", "limit": 100}],
        "tools": ["send_message"],
        "system": "Be brief.",
        "max_steps": 3,
        "heartbeat_interval": 60,
        "settings": {"temperature": 0, "top_p": 1, "max_tokens": 9, "seed": -1, "reasoning_effort": "low"},
    }
    async with wire(offline) as client:
        assert (await client.ok("create_agent", config=config))["agent_name"] == "sam"
        agent = await client.ok("get_agent", agent_name="sam")
    assert agent["agent_name"] == "sam"
    assert agent["blocks"] == [
        {"label": "persona", "value": memws.PERSONAS["sam_pov"], "limit": 2000, "version": 1},
        {"label": "human", "value": "Likes tea.", "limit": 2000, "version": 1},
        {"label": "plan", "value": "rest", "limit": 100, "version": 1},
    ]
    told = ("model", "context_window", "tools", "system", "max_steps", "heartbeat_interval", "settings")
    assert {key: agent["settings"][key] for key in told} == {key: config[key] for key in told}
    assert agent["counts"] == {"messages": 0, "passages": 0, "in_context": 0}
    assert (agent["last_seq"], agent["turn"]) == (0, None)


async def test_create_agent_warns_of_what_it_ignores(offline: Server) -> None:
    """Keys that only MemGPT 0.2.7 knew are ignored with a warning each, and a model that needs an endpoint too."""
    config = {"preset": "memgpt_chat", "model_endpoint_type": "openai", "model": "gpt-4"}
    async with wire(offline) as client:
        warnings = (await client.ok("create_agent", config=config))["warnings"]
        assert [warning.split()[0] for warning in warnings[:2]] == ["preset", "model_endpoint_type"]
        assert len(warnings) == 3
        assert "offline" in warnings[2]
        assert (await client.ok("get_agent"))["settings"]["model"] == "gpt-4"


@pytest.mark.parametrize("name", ["a", "Zoe\u0301", "agent_1", "1.2-3", "名前", "x" * 64])
async def test_names_are_words(offline: Server, name: str) -> None:
    """A name begins with a letter or digit of any script, and is kept and found in NFC."""
    async with wire(offline) as client:
        assert (await client.ok("create_agent", config={"name": name}))["agent_name"] == unicodedata.normalize(
            "NFC", name
        )
        await client.ok("get_agent", agent_name=name)


BAD_CONFIGS: list[tuple[JSON, str]] = [
    ({"name": ""}, "bad_config"),
    ({"name": "_x"}, "bad_config"),
    ({"name": ".x"}, "bad_config"),
    ({"name": "a b"}, "bad_config"),
    ({"name": "../x"}, "bad_config"),
    ({"name": "a\n"}, "bad_config"),
    ({"name": "x" * 65}, "bad_config"),
    ({"name": 7}, "bad_config"),
    ({"nmae": "sam"}, "bad_config"),
    ({"base_url": "http://127.0.0.1"}, "bad_config"),
    ({"api_key": "key"}, "bad_config"),
    ({"model": 5}, "bad_config"),
    ({"model": ""}, "bad_config"),
    ({"model": "m" * 201}, "bad_config"),
    ({"context_window": 700}, "bad_config"),
    ({"context_window": "9000"}, "bad_config"),
    ({"context_window": True}, "bad_config"),
    ({"tools": ["nope"]}, "bad_config"),
    ({"tools": "send_message"}, "bad_config"),
    ({"system": "x" * 20_001}, "bad_config"),
    ({"max_steps": 0}, "bad_config"),
    ({"heartbeat_interval": 59}, "bad_config"),
    ({"settings": []}, "bad_config"),
    ({"settings": {"n": 2}}, "bad_config"),
    ({"settings": {"temperature": 2.1}}, "bad_config"),
    ({"settings": {"temperature": True}}, "bad_config"),
    ({"settings": {"seed": 0.5}}, "bad_config"),
    ({"settings": {"reasoning_effort": 5}}, "bad_config"),
    ({"persona": 5}, "bad_config"),
    ({"blocks": {}}, "bad_config"),
    ({"blocks": [{"label": "1"}]}, "bad_config"),
    ({"blocks": [{"label": "a", "colour": "red"}]}, "bad_config"),
    ({"blocks": [{"label": "a", "value": 5}]}, "bad_config"),
    ({"blocks": [{"label": "a", "limit": 0}]}, "bad_config"),
    ({"blocks": [{"label": f"b{number}"} for number in range(21)]}, "bad_config"),
    ({"persona": "x" * 2_001}, "block_limit"),
    ({"human": "x" * 2_001}, "block_limit"),
    ({"blocks": [{"label": "a", "value": "xx", "limit": 1}]}, "block_limit"),
]


async def test_bad_configs_change_nothing(offline: Server) -> None:
    """A config that cannot be is answered with a code, names what is wrong, and makes no agent."""
    async with wire(offline) as client:
        for config, code in BAD_CONFIGS:
            error = await client.refused("create_agent", config=config)
            assert error["code"] == code, config
            assert next(iter(config)).removesuffix("s") in error["message"]
        assert (await client.ok("list_agents"))["total"] == 0


async def test_a_window_too_small_is_refused_with_both_numbers(offline: Server) -> None:
    """The refusal of a small window tells the window and what it would have to hold; 3,000 tokens are enough."""
    async with wire(offline) as client:
        error = await client.refused("create_agent", config={"context_window": 1_999})
        assert "1,999" in error["message"]
        needed = int(error["message"].split()[-1].replace(",", ""))
        assert needed <= 3_000
        assert (await client.refused("create_agent", config={"context_window": needed - 1}))["code"] == "bad_config"
        await client.ok("create_agent", config={"context_window": needed})


async def test_a_config_that_is_no_object_is_a_bad_field(offline: Server) -> None:
    """A config that is no object, or is missing, is no valid request."""
    async with wire(offline) as client:
        create = {"type": "command", "command": "create_agent", "id": 1}
        for config in (None, [], "sam", 1):
            answer = await client.misread({**create, "config": config})
            assert (answer["code"], answer["id"]) == ("bad_field", 1)
            assert "config" in answer["message"]
        assert (await client.misread(create))["code"] == "missing_field"


async def test_a_name_is_taken_once(offline: Server) -> None:
    """Of two agents with the same name, also in another normal form, the second is refused."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={"name": "Zo\u00eb"})
        assert (await client.refused("create_agent", config={"name": "Zoe\u0308"}))["code"] == "name_taken"
        assert (await client.ok("list_agents"))["total"] == 1


async def test_load_agent(offline: Server) -> None:
    """load_agent answers with what the agent is, takes the name from either field, and makes it the current one."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.ok("create_agent", config={"name": "ada"})
        response = await client.command("load_agent", name="sam")
        assert response["status"] == "OK: Agent 'sam' loaded"
        expected = {"agent_name": "sam", "model": "offline", "last_seq": 0, "repaired": [], "warnings": []}
        assert response["result"] == expected
        assert (await client.ok("get_agent"))["agent_name"] == "sam"
        assert (await client.ok("load_agent", agent_name="ada"))["agent_name"] == "ada"
        assert (await client.ok("get_agent"))["agent_name"] == "ada"
        answer = await client.misread({"type": "command", "command": "load_agent"})
        assert answer["code"] == "missing_field"


async def test_create_and_load_call_no_model(server: Server, endpoint: Endpoint) -> None:
    """No model is asked before the first message."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.ok("load_agent", name="sam")
        await client.ok("get_context")
        assert endpoint.requests == []


async def test_an_unknown_agent_is_told_with_the_nearest(offline: Server) -> None:
    """The refusal of an unknown name lists the ten nearest and the count, and the current agent stays."""
    async with wire(offline) as client:
        assert (await client.refused("load_agent", name="sam"))["code"] == "unknown_agent"
        for number in range(12):
            await client.ok("create_agent", config={"name": f"agent-{number:02}"})
        error = await client.refused("load_agent", name="agent-05x")
        assert error["code"] == "unknown_agent"
        assert "12 known" in error["message"]
        assert "'agent-05'" in error["message"]
        assert error["message"].count("'agent-") == 11
        assert (await client.ok("get_agent"))["agent_name"] == "agent-11"
        for command, more in AGENT_COMMANDS:
            assert (await client.refused(command, agent_name="nobody", **more))["code"] == "unknown_agent"


AGENT_COMMANDS: list[tuple[str, JSON]] = [
    ("get_agent", {}),
    ("update_agent", {"config": {}}),
    ("rename_agent", {"new_name": "b"}),
    ("delete_agent", {}),
    ("get_messages", {}),
    ("search_memory", {"query": "tea"}),
    ("get_context", {}),
    ("get_request", {"turn_id": "t", "step": 1}),
    ("set_block", {"label": "human", "value": "x"}),
    ("insert_passage", {"text": "x"}),
    ("delete_passage", {"passage_id": 1}),
    ("cancel", {}),
    ("subscribe", {}),
    ("unsubscribe", {}),
    ("wake", {}),
    ("compact", {}),
]


async def test_without_an_agent_nothing_is_current(offline: Server) -> None:
    """A connection that has created and loaded nothing has no agent, whatever other connections have."""
    async with wire(offline) as other, wire(offline) as client:
        await other.ok("create_agent", config={"name": "sam"})
        for command, more in AGENT_COMMANDS:
            assert (await client.refused(command, **more))["code"] == "no_agent"
            assert (await client.refused(command, agent_name=None, **more))["code"] == "no_agent"
        (refusal,) = await client.turn("hi", turn_id="t")
        assert (refusal["type"], refusal["code"], refusal["turn_id"]) == ("agent_response_error", "no_agent", "t")


async def test_naming_an_agent_does_not_switch(offline: Server) -> None:
    """A command or message to another agent leaves the current one as it is."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={"name": "ada"})
        await client.ok("create_agent", config={"name": "sam"})
        assert (await client.ok("get_agent", agent_name="ada"))["agent_name"] == "ada"
        assert {frame["agent_name"] for frame in await client.turn("hi", agent_name="ada")} == {"ada"}
        assert {frame["agent_name"] for frame in await client.turn("hi", agent_name=None)} == {"sam"}
        assert {frame["agent_name"] for frame in await client.turn("hi")} == {"sam"}


async def test_agent_id_is_read_as_agent_name(offline: Server) -> None:
    """MemGPT 0.3.25's agent_id names the agent; beside a different agent_name it is a bad field."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={"name": "ada"})
        await client.ok("create_agent", config={"name": "sam"})
        message = {"type": "user_message", "message": "hi"}
        await client.send_raw({**message, "agent_id": "ada"})
        assert (await client.ended())["agent_name"] == "ada"
        await client.send_raw({**message, "agent_id": "ada", "agent_name": None})
        assert (await client.ended())["agent_name"] == "ada"
        await client.send_raw({**message, "agent_id": None})
        assert (await client.ended())["agent_name"] == "sam"
        assert (await client.misread({**message, "agent_id": "ada", "agent_name": "sam"}))["code"] == "bad_field"


async def test_hello(offline: Server) -> None:
    """hello tells version, protocol, models, limits, commands and message types, and by itself changes nothing."""
    async with wire(offline) as client:
        told = await client.ok("hello")
        assert told["version"] == memws.__version__
        assert (told["protocol"], told["model"], told["offline"], told["unknown"]) == (1, "offline", True, [])
        assert "offline" in told["models"]
        assert told["commands"] == list(memws.COMMANDS)
        assert told["message_types"] == list(memws.MESSAGE_TYPES)
        assert told["limits"]["max_frame"] == 1024 * 1024
        await client.ok("create_agent", config={})
        kinds = {frame.get("message_type") for frame in await client.turn("My name is Ada")}
        assert kinds <= {None, *memws.CLASSIC_TYPES}


async def test_message_types_are_those_asked_for_last(offline: Server) -> None:
    """Each list of message types replaces the one before; none leaves starts and terminals; unknown ones are told."""
    async with wire(offline, "tool_call", "tool_return") as client:
        await client.ok("create_agent", config={})

        async def kinds() -> set[str | None]:
            return {frame.get("message_type") for frame in await client.turn("My name is Ada")}

        assert await kinds() == {None, "tool_call", "tool_return"}
        assert (await client.ok("hello", message_types=["user_message", "smell"]))["unknown"] == ["smell"]
        assert await kinds() == {None, "user_message"}
        await client.ok("hello")
        assert await kinds() == {None, "user_message"}
        await client.ok("hello", message_types=[])
        assert await kinds() == {None}
        await client.ok("hello", message_types=["*", "smell"])
        assert await kinds() >= {None, *memws.CLASSIC_TYPES, "user_message", "tool_call", "tool_return", "context"}


async def test_list_agents_pages(server: Server, endpoint: Endpoint) -> None:
    """list_agents gives agents in order of their names, above `after`, with what each is doing."""
    async with wire(server) as client:
        for name in ("cat", "ant", "bee"):
            await client.ok("create_agent", config={"name": name})
        await hold(client, endpoint, agent_name="bee")
        listed = await client.ok("list_agents")
        assert [(agent["agent_name"], agent["state"]) for agent in listed["agents"]] == [
            ("ant", "idle"),
            ("bee", "running"),
            ("cat", "idle"),
        ]
        assert [agent["last_seq"] for agent in listed["agents"]] == [0, 2, 0]
        assert {agent["model"] for agent in listed["agents"]} == {"test-model"}
        page = await client.ok("list_agents", after="ant", limit=1)
        assert ([agent["agent_name"] for agent in page["agents"]], page["total"]) == (["bee"], 3)
        assert (await client.ok("list_agents", after="cat"))["agents"] == []
        for limit in (0, 101, "5", None, 1.0):
            answer = await client.misread({"type": "command", "command": "list_agents", "limit": limit})
            assert answer["code"] == "bad_field"


async def test_get_agent_tells_the_running_turn(server: Server, endpoint: Endpoint) -> None:
    """get_agent names the turn that runs and its step, and null when none does."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await hold(client, endpoint, turn_id="t")
        assert (await client.ok("get_agent"))["turn"] == {"turn_id": "t", "step": 1}
        endpoint.release()
        await client.until(is_terminal)
        agent = await client.ok("get_agent")
        assert (agent["turn"], agent["last_seq"]) == (None, client.frames[-2]["seq"])
        assert agent["counts"]["messages"] == agent["counts"]["in_context"] > 0


async def test_update_agent(server: Server, endpoint: Endpoint) -> None:
    """update_agent changes settings for the next model call, tells subscribers, and refuses what create refuses."""
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={"max_steps": 5})
        await client.ok("subscribe")
        updated = await client.ok("update_agent", config={"settings": {"temperature": 0.5}, "system": "Be brief."})
        (change,) = client.before_answer
        assert (change["message_type"], change["change"], change["seq"]) == ("agent_change", "updated", 1)
        assert (updated["settings"]["max_steps"], updated["warnings"]) == (5, [])
        await client.turn("hi")
        assert endpoint.requests[-1]["temperature"] == 0.5
        assert endpoint.requests[-1]["messages"][0]["content"].startswith("Be brief.")
        for config in ({"name": "x"}, {"persona": "x"}, {"max_steps": 0}, {"context_window": 99}, {"tools": ["x"]}):
            assert (await client.refused("update_agent", config=config))["code"] == "bad_config"
        assert (await client.ok("get_agent"))["settings"] == updated["settings"]


async def test_rename_agent(offline: Server) -> None:
    """A rename is told to subscribers; current agents follow it, the old name is free, the agent is the same."""
    async with wire(offline, "*") as client, wire(offline, "*") as other:
        await client.ok("create_agent", config={"name": "old"})
        await client.ok("create_agent", config={"name": "taken"})
        await client.ok("load_agent", name="old")
        await other.ok("load_agent", name="old")
        await other.ok("subscribe")
        await client.turn("My name is Ada", turn_id="t")
        await other.until(is_terminal)
        assert (await client.refused("rename_agent", new_name="taken"))["code"] == "name_taken"
        assert (await client.refused("rename_agent", new_name="a b"))["code"] == "bad_config"
        assert await client.ok("rename_agent", new_name="new") == {"agent_name": "new"}
        change = await other.receive()
        assert (change["agent_name"], change["change"], change["new_name"]) == ("old", "renamed", "new")
        assert (await client.ok("get_agent"))["agent_name"] == "new"
        assert {frame["agent_name"] for frame in await client.turn("hi")} == {"new"}
        assert {frame["agent_name"] for frame in await other.until(is_terminal)} == {"new"}
        assert (await client.refused("get_agent", agent_name="old"))["code"] == "unknown_agent"
        assert {frame["agent_name"] for frame in await client.turn("My name is Ada", turn_id="t")} == {"new"}
        await client.ok("create_agent", config={"name": "old"})


async def test_delete_and_restore_an_agent(offline: Server) -> None:
    """A deleted agent is gone for all, its name is free at once, and restore_agent brings it back as it was."""
    async with wire(offline, "*") as client, wire(offline, "*") as other:
        await client.ok("create_agent", config={"name": "sam"})
        await other.ok("load_agent", name="sam")
        await other.ok("subscribe")
        await client.turn("My name is Ada")
        last = await other.ended()
        assert await client.ok("delete_agent") == {}
        change = await other.receive()
        assert (change["message_type"], change["change"]) == ("agent_change", "deleted")
        assert change["seq"] == last["seq"] + 1
        assert (await client.refused("get_agent"))["code"] == "no_agent"
        assert (await other.refused("get_agent"))["code"] == "no_agent"
        (refusal,) = await other.turn("hi")
        assert refusal["code"] == "no_agent"
        assert (await client.ok("list_agents"))["total"] == 0
        assert (await client.refused("delete_agent", agent_name="sam"))["code"] == "unknown_agent"

        await client.ok("create_agent", config={"name": "sam"})
        await client.turn("hi")
        await other.nothing_more()  # its subscription was the old agent's
        assert (await client.refused("restore_agent", agent_name="sam"))["code"] == "name_taken"
        restored = await client.ok("restore_agent", agent_name="sam", new_name="ada")
        assert restored == {"agent_name": "ada", "last_seq": change["seq"]}
        assert (await client.ok("get_messages", agent_name="ada"))["total"] > 0
        assert "My name is Ada" not in [
            message["text"] for message in (await client.ok("get_messages", agent_name="sam"))["messages"]
        ]
        assert (await client.refused("restore_agent", agent_name="sam"))["code"] == "unknown_agent"
        assert (await client.refused("restore_agent", agent_name="never"))["code"] == "unknown_agent"


async def test_purge_forgets_for_ever(offline: Server) -> None:
    """A purged agent cannot be restored, whether it was purged at once or after it had been deleted."""
    async with wire(offline) as client:
        for at_once in (True, False):
            await client.ok("create_agent", config={"name": "sam"})
            await client.turn("The code word is xylophone")
            if at_once:
                await client.ok("delete_agent", purge=True)
            else:
                await client.ok("delete_agent")
                await client.ok("delete_agent", agent_name="sam", purge=True)
            assert (await client.refused("restore_agent", agent_name="sam"))["code"] == "unknown_agent"
    for table in ("events", "messages", "search_rows"):
        with sqlite3.connect(offline.options.db) as connection:
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)  # noqa: S608
        connection.close()


async def test_a_busy_agent_is_deleted_by_force_only(server: Server, endpoint: Endpoint) -> None:
    """delete and rename of an agent in a turn are refused as busy; force cancels what runs and what waits first."""
    async with wire(server) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint, id="runs")
        await other.say("waits", id="waits", turn_id="w", agent_name="sam")
        assert (await other.refused("delete_agent", agent_name="sam"))["code"] == "busy"
        assert (await other.refused("rename_agent", agent_name="sam", new_name="x"))["code"] == "busy"
        await other.ok("delete_agent", agent_name="sam", force=True)
        (refusal,) = other.before_answer
        assert (refusal["id"], refusal["turn_id"], refusal["code"]) == ("waits", "w", "unknown_agent")
        end = await client.ended()
        assert (end["id"], end["stop_reason"]) == ("runs", "cancelled")
        assert (await client.refused("get_agent"))["code"] == "no_agent"


async def test_a_message_beside_a_delete_is_a_turn_before_it_or_refused(offline: Server) -> None:
    """Messages that arrive while their agent is deleted are refused as to an unknown agent, or were turns before."""
    async with wire(offline) as client, wire(offline) as other:
        for number in range(10):
            name = f"agent{number}"
            await client.ok("create_agent", config={"name": name})
            await other.ok("load_agent", name=name)
            await client.send(type="command", command="delete_agent", force=True, id="delete")
            for message in range(3):
                await other.say("hi", id=message, agent_name=name)
            await client.until(lambda frame: frame.get("id") == "delete")
            frames = await other.until(lambda frame: is_terminal(frame) and frame["id"] == 2)
            assert set(ends_of(frames).values()) <= {"unknown_agent", "done", "cancelled"}
            assert (await client.ok("list_agents"))["total"] == 0


@pytest.mark.parametrize("restart", [False, True])
async def test_seq_goes_on_above_under_an_old_name(serve: Serve, restart: bool) -> None:
    """A new agent under the name of a deleted, purged or renamed one counts on above it: no seq is used twice."""
    server = serve()
    seen: list[int] = []
    for end in ("delete", "purge", "rename", "last"):
        async with wire(server, "*") as client:
            result = await client.ok("create_agent", config={"name": "sam"})
            await client.ok("subscribe")
            seen += [frame["seq"] for frame in await client.turn("hi") if "seq" in frame]
            if end == "rename":
                await client.ok("rename_agent", new_name="old")
            else:
                await client.ok("delete_agent", purge=end == "purge")
            seen += [frame["seq"] for frame in client.before_answer]
            assert result["agent_name"] == "sam"
        if restart:
            server.stop()
            server = serve()
    assert seen == list(range(1, len(seen) + 1))


# ---- memory and history ----------------------------------------------------------------------------------------------


async def test_get_messages_pages_backwards(offline: Server) -> None:
    """get_messages gives the newest messages, oldest first, and with `before` those before a message."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        for number in range(3):
            await client.turn(f"note {number}", turn_id=f"t{number}")
        whole = await client.ok("get_messages", limit=200)
        assert (len(whole["messages"]), whole["more"]) == (whole["total"], False)
        assert [message["id"] for message in whole["messages"]] == list(range(1, whole["total"] + 1))
        pages, before = [], None
        while True:
            page = await client.ok("get_messages", limit=2, before=before)
            pages.insert(0, page["messages"])
            before = page["messages"][0]["id"]
            if not page["more"]:
                break
        assert [message for page in pages for message in page] == whole["messages"]
        assert (await client.ok("get_messages", before=1))["messages"] == []
        said = [message for message in whole["messages"] if message["role"] == "user"]
        assert [(message["text"], message["turn_id"], message["step"]) for message in said] == [
            (f"note {number}", f"t{number}", 1) for number in range(3)
        ]
        assert all(message["in_context"] for message in whole["messages"])
        calls = [message["tool_calls"] for message in whole["messages"] if message["role"] == "assistant"]
        assert {call["name"] for step in calls for call in step} >= {"send_message"}


async def test_a_message_has_the_seq_of_its_event(offline: Server) -> None:
    """The seq of a user's message in the history is that of the turn's start."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        start = (await client.turn("hi"))[0]
        messages = (await client.ok("get_messages"))["messages"]
        assert [message["seq"] for message in messages if message["role"] == "user"] == [start["seq"]]


async def test_lists_hold_what_a_frame_can_hold(online: Callable[..., Server], endpoint: Endpoint) -> None:
    """Lists of long items hold fewer of them and say `more`; long texts are cut, and every page comes to an end."""
    server = online(context_window=10_000_000)
    endpoint.script(
        Reply(calls=[("send_message", {"message": "x", "more": ["\u20ac" * 500_000]})], whole_arguments=True),
        *[reply("\u20ac" * 20_000, chunk=20_000) for _ in range(12)],
    )
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        for number in range(12):
            await client.turn(f"{number}" + "\u20ac" * 20_000)
        seen, before, pages = 0, None, 0
        while True:
            page = await client.ok("get_messages", limit=200, before=before)
            assert page["messages"]
            seen, pages = seen + len(page["messages"]), pages + 1
            before = page["messages"][0]["id"]
            if not page["more"]:
                break
        assert (seen, pages > 1) == (page["total"], True)
        found = await client.ok("search_memory", query="", limit=50)
        assert found["more"] is True
        assert 0 < len(found["items"]) < 50


async def test_search_memory(offline: Server) -> None:
    """search_memory finds words in recall and archival memory, by store, role and time, in pages."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        for number in range(5):
            await client.ok("insert_passage", text=f"The walrus number {number} swims")
        await client.turn("Yesterday I saw a walrus")
        everything = await client.ok("search_memory", query="walrus", limit=50)
        assert everything["total"] == len(everything["items"])
        assert (everything["page"], everything["pages"]) == (1, 1)
        scores = [item["score"] for item in everything["items"]]
        assert scores == sorted(scores, reverse=True)
        archival = await client.ok("search_memory", query="walrus", store="archival")
        assert {(item["store"], item["role"]) for item in archival["items"]} == {("archival", None)}
        assert len(archival["items"]) == 5
        recall = await client.ok("search_memory", query="walrus", store="recall", roles=["user"])
        assert [(item["role"], item["text"]) for item in recall["items"]] == [("user", "Yesterday I saw a walrus")]
        pages = [await client.ok("search_memory", query="walrus", limit=2, page=page) for page in (1, 2, 3, 4)]
        ids = [(item["store"], item["id"]) for page in pages for item in page["items"]]
        assert ids == [(item["store"], item["id"]) for item in everything["items"]][: len(ids)]
        assert {page["pages"] for page in pages} == {-(-everything["total"] // 2)}
        assert (await client.ok("search_memory", query="zebra"))["items"] == []


async def test_search_memory_by_time(offline: Server) -> None:
    """`from` and `to` name days or times, both inclusive; what is no time is a bad field."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        await client.ok("insert_passage", text="walrus")
        (item,) = (await client.ok("search_memory", query="walrus"))["items"]
        day, moment = item["time"][:10], item["time"]

        async def found(**when: str) -> int:
            return int((await client.ok("search_memory", query="walrus", **when))["total"])

        assert await found(**{"from": day, "to": day}) == 1
        assert await found(**{"from": moment, "to": moment}) == 1
        assert await found(**{"from": "2999-01-01"}) == 0
        assert await found(to="1999-12-31") == 0
        for wrong in (
            {"from": "today"},
            {"to": "2026-02-30"},
            {"from": 5},
            {"store": "core"},
            {"limit": 51},
            {"page": 0},
        ):
            answer = await client.misread({"type": "command", "command": "search_memory", "query": "x", **wrong})
            assert answer["code"] == "bad_field"
            assert next(iter(wrong)) in answer["message"]


async def test_set_block(offline: Server) -> None:
    """set_block changes core memory by a version; an edit based on another version is refused with the value stored."""
    async with wire(offline, "*") as client:
        await client.ok("create_agent", config={"blocks": [{"label": "plan", "limit": 5}]})
        await client.ok("subscribe")
        assert await client.ok("set_block", label="plan", value="rest", version=1) == {"label": "plan", "version": 2}
        (change,) = client.before_answer
        told = {"what": "core", "label": "plan", "before": "", "after": "rest", "by": "client", "seq": 1}
        assert {key: change[key] for key in told} == told
        error = await client.refused("set_block", label="plan", value="run", version=1)
        assert (error["code"], error["value"], error["version"]) == ("conflict", "rest", 2)
        assert (await client.refused("set_block", label="plan", value="longer"))["code"] == "block_limit"
        assert (await client.refused("set_block", label="plans", value=""))["code"] == "not_found"
        assert await client.ok("set_block", label="plan", value="run") == {"label": "plan", "version": 3}
        assert (await client.ok("get_agent"))["blocks"][2]["value"] == "run"


async def test_passages(offline: Server) -> None:
    """Passages are inserted and deleted by their ids, which are never used again; subscribers are told."""
    async with wire(offline, "*") as client:
        await client.ok("create_agent", config={})
        await client.ok("subscribe")
        assert await client.ok("insert_passage", text="walrus") == {"id": 1}
        (change,) = client.before_answer
        assert (change["what"], change["id"], change["before"], change["after"]) == ("archival", 1, None, "walrus")
        assert await client.ok("delete_passage", passage_id=1) == {"id": 1}
        (change,) = client.before_answer
        assert (change["id"], change["before"], change["after"]) == (1, "walrus", None)
        assert (await client.ok("search_memory", query="walrus"))["total"] == 0
        assert await client.ok("insert_passage", text="seal") == {"id": 2}
        assert (await client.refused("delete_passage", passage_id=1))["code"] == "not_found"
        assert (await client.refused("insert_passage", text="x" * 65_537))["code"] == "text_too_long"
        await client.send_raw({"type": "command", "command": "delete_passage", "id": 2})
        assert (await client.until(lambda frame: frame["type"] == "command_response"))[-1]["result"] == {"id": 2}
        assert (await client.ok("get_agent"))["counts"]["passages"] == 0


async def test_get_context(server: Server, endpoint: Endpoint) -> None:
    """get_context shows the parts of the next request with their sizes and texts, within the window."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"human": "Likes tea."})
        await client.turn("My cat is called Tom")
        context = await client.ok("get_context")
        sections = {section["name"]: section for section in context["sections"]}
        assert list(sections) == ["system", "tools", "core_memory", "summary", "messages"]
        assert context["window"] == 8_192
        assert 0 < context["used"] < context["window"]
        assert abs(context["used"] - sum(section["tokens"] for section in context["sections"])) <= 5
        assert "Likes tea." in sections["core_memory"]["text"]
        assert "My cat is called Tom" in sections["messages"]["text"]
        sent = endpoint.requests[-1]["messages"][0]["content"]
        assert sections["system"]["text"] + sections["core_memory"]["text"] == sent


async def test_get_request(server: Server, endpoint: Endpoint) -> None:
    """get_request gives what was really sent for a step, and what came back, with usage and times."""
    endpoint.script(
        Reply("I look it up", calls=[("conversation_search", {"query": "tea", "request_heartbeat": True})]),
        reply("Nothing."),
    )
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await client.turn("Do I like tea?", turn_id="t")
        for step in (1, 2):
            told = await client.ok("get_request", turn_id="t", step=step)
            assert told["request"] == endpoint.requests[step - 1]
            assert 0 <= told["first_token_ms"] <= told["total_ms"]
            assert told["usage"]["input_tokens"] > 0
        first = await client.ok("get_request", turn_id="t", step=1)
        assert first["response"]["content"] == "I look it up"
        assert [call["name"] for call in first["response"]["tool_calls"]] == ["conversation_search"]
        for turn_id, step in (("t", 3), ("x", 1)):
            assert (await client.refused("get_request", turn_id=turn_id, step=step))["code"] == "not_found"


async def test_compact(server: Server, endpoint: Endpoint) -> None:
    """compact makes the prompt smaller at once, is refused while a turn runs, and where nothing is left to compact."""
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        await client.ok("subscribe")
        for number in range(6):
            await client.turn(f"{number} " + "long story " * 100)
        result = await client.ok("compact")
        assert 0 < result["tokens_after"] < result["tokens_before"]
        (event,) = of_kind(client.before_answer, "compaction")
        assert event["seq"] == client.frames[-len(client.before_answer) - 2]["seq"] + 1
        assert event["messages_after"] < event["messages_before"]
        assert event["summary"]
        await hold(client, endpoint)
        assert (await client.refused("compact"))["code"] == "busy"
        await client.ok("create_agent", config={})
        assert (await client.refused("compact"))["code"] == "not_found"


async def test_wake(server: Server, endpoint: Endpoint) -> None:
    """wake runs a turn without a new user message, and is refused as busy while one runs."""
    endpoint.script(HELD)
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        await client.ok("subscribe")
        turn_id = (await client.ok("wake"))["turn_id"]
        await asked(endpoint, 1)
        assert (await client.refused("wake"))["code"] == "busy"
        endpoint.release()
        frames = [frame for frame in client.frames if frame.get("turn_id") == turn_id]
        frames += await client.until(is_terminal)
        assert {frame["turn_id"] for frame in frames} == {turn_id}
        assert [frame["type"] for frame in frames].count("agent_response_start") == 1
        assert of_kind(frames, "heartbeat")[0]["seq"] == 2
        assert of_kind(frames, "user_message") == []
        assert frames[-1]["stop_reason"] == "done"
        assert (await client.ok("get_messages"))["messages"][0]["role"] == "system"


async def test_timed_heartbeats_go_to_subscribers_only(
    server: Server, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn that a timer starts is told to subscribers, without an id, and not to who merely loaded the agent."""
    monkeypatch.setattr(memws, "MIN_HEARTBEAT_INTERVAL", 1)
    async with wire(server, "*") as client, wire(server, "*") as other:
        await client.ok("create_agent", config={"name": "sam", "heartbeat_interval": 1})
        await client.turn("hi")
        await other.ok("subscribe", agent_name="sam")
        frames = await other.until(is_terminal)
        assert frames[0]["type"] == "agent_response_start"
        assert of_kind(frames, "heartbeat")
        assert of_kind(frames, "user_message") == []
        assert [frame for frame in frames if "id" in frame] == []
        await client.nothing_more()


# ---- frames ----------------------------------------------------------------------------------------------------------


BAD_FRAMES: list[tuple[Any, str, str]] = [
    ("", "not_json", ""),
    ("{", "not_json", ""),
    ("{'type': 'command'}", "not_json", ""),
    ('{"type": "user_message", "message": NaN}', "not_json", "NaN"),
    ('{"type": "user_message", "message": 1e999}', "not_json", ""),
    ("9" * 5_000, "not_json", ""),
    (b'{"type": "command", "command": "hello"}', "not_json", "binary"),
    ("[]", "not_object", ""),
    ("null", "not_object", ""),
    ('"hello"', "not_object", ""),
    ("7", "not_object", ""),
    ("[" * 100_000, "too_deep", "64"),
    ('{"a":' * 70 + "1" + "}" * 70, "too_deep", "64"),
    ("{}", "missing_field", "type"),
    ({"type": "smell"}, "bad_type", "smell"),
    ({"type": 5}, "bad_field", "type"),
    ({"type": ["command"]}, "bad_field", "type"),
    ({"type": "command"}, "missing_field", "command"),
    ({"type": "command", "command": {}}, "bad_field", "command"),
    ({"type": "command", "command": "sudo"}, "unknown_command", "sudo"),
    ({"type": "command", "command": "__init__"}, "unknown_command", "__init__"),
    ({"type": "user_message"}, "missing_field", "message"),
    ({"type": "user_message", "message": 5}, "bad_field", "message"),
    ({"type": "user_message", "message": None}, "bad_field", "message"),
    ({"type": "user_message", "message": "x", "agent_name": 5}, "bad_field", "agent_name"),
    ({"type": "user_message", "message": "x", "turn_id": ""}, "bad_field", "turn_id"),
    ({"type": "user_message", "message": "x", "turn_id": "t" * 129}, "bad_field", "turn_id"),
    ({"type": "user_message", "message": "x", "when_busy": "maybe"}, "bad_field", "when_busy"),
    ('{"type": "user_message", "message": "\\ud800"}', "bad_field", "message"),
    ('{"type": "user_message", "message": "a\\u0000b"}', "bad_field", "message"),
    ({"type": "command", "command": "hello", "message_types": "*"}, "bad_field", "message_types"),
    ({"type": "command", "command": "hello", "id": 1.5}, "bad_field", "id"),
    ({"type": "command", "command": "hello", "id": True}, "bad_field", "id"),
    ({"type": "command", "command": "hello", "id": "x" * 129}, "bad_field", "id"),
    ({"type": "command", "command": "hello", "id": 2**53 + 1}, "bad_field", "id"),
    ({"type": "command", "command": "get_messages", "limit": 10**400}, "bad_field", "limit"),
    ({"type": "command", "command": "get_messages", "limit": 201}, "bad_field", "limit"),
    ({"type": "command", "command": "get_request", "turn_id": "t"}, "missing_field", "step"),
    ({"type": "command", "command": "delete_agent", "force": 1}, "bad_field", "force"),
    ({"type": "smell" * 50_000}, "bad_type", "smell"),
]


async def test_bad_frames_get_one_sentence_and_the_connection_stays(offline: Server) -> None:
    """Each frame that is no request gets exactly one server_error, whose sentence names the field."""
    async with wire(offline) as client:
        for frame, code, named in BAD_FRAMES:
            answer = await client.misread(frame)
            assert answer["code"] == code, frame
            assert named in answer["message"]
            assert "\n" not in answer["message"]
            quoted = [part for part in answer["message"].split("'") if len(part) > 80]
            assert all(len(part) < 400 and "smell" not in part for part in quoted)
        await client.nothing_more()


@pytest.mark.parametrize("request_id", ["", "x" * 128, "\u20ac", 0, -(2**53), 2**53])
async def test_an_id_is_on_answers_starts_terminals_and_refusals(offline: Server, request_id: Any) -> None:
    """An id comes back as it was sent on everything that answers its request, and on nothing else."""
    async with wire(offline, "*") as client:
        await client.send(type="command", command="create_agent", config={}, id=request_id)
        assert (await client.receive())["id"] == request_id
        answer = await client.misread({"type": "command", "command": "sudo", "id": request_id})
        assert answer["id"] == request_id
        frames = await client.turn("hi", id=request_id)
        marked = [frame["type"] for frame in frames if "id" in frame]
        assert marked == ["agent_response_start", "agent_response_end"]
        assert {frame["id"] for frame in frames if "id" in frame} == {request_id}
        (refusal,) = await client.turn("hi", agent_name="nobody", id=request_id)
        assert refusal["id"] == request_id


@pytest.mark.parametrize("null", [False, True])
async def test_without_an_id_answers_have_none(offline: Server, null: bool) -> None:
    """What answers a request without an id, or with null, has no id; only an unreadable frame gets null."""
    more: JSON = {"id": None} if null else {}
    async with wire(offline) as client:
        await client.send(type="command", command="create_agent", config={}, **more)
        assert "id" not in await client.receive()
        await client.send(type="command", command="load_agent", name="nobody", **more)
        assert "id" not in await client.receive()
        await client.send(type="user_message", message="hi", **more)
        assert [frame for frame in await client.until(is_terminal) if "id" in frame] == []
        await client.send(type="user_message", message="hi", agent_name="nobody", **more)
        assert "id" not in await client.receive()
        assert "id" not in await client.misread({"type": "command", "command": "sudo", **more})
        assert (await client.misread("{"))["id"] is None


async def test_unknown_fields_are_ignored(offline: Server) -> None:
    """A request with fields of a later protocol is answered as if it had none."""
    async with wire(offline) as client:
        await client.send_raw({"type": "command", "command": "create_agent", "config": {}, "colour": "red"})
        assert (await client.receive())["ok"] is True
        await client.send_raw({"type": "user_message", "message": "hi", "mood": {"deep": [1, 2]}})
        assert (await client.ended())["stop_reason"] == "done"


async def test_answers_come_in_the_order_sent(offline: Server) -> None:
    """Commands, messages that are refused, and frames that are no requests are all answered in the order sent."""
    async with wire(offline) as client:
        sent: list[JSON] = [
            {"type": "command", "command": "create_agent", "config": {"name": "sam"}},
            {"type": "command", "command": "sudo"},
            {"type": "command", "command": "insert_passage", "text": "x"},
            {"type": "user_message", "message": "hi", "agent_name": "nobody"},
            {"type": "command", "command": "get_context"},
            {"type": "command", "command": "set_block", "label": "human"},
            {"type": "command", "command": "delete_agent"},
            {"type": "user_message", "message": "hi"},
            {"type": "command", "command": "list_agents"},
        ]
        for number, frame in enumerate(sent):
            await client.send_raw({**frame, "id": number})
        answers = [await client.receive() for _ in sent]
        assert [answer["id"] for answer in answers] == list(range(len(sent)))
        assert answers[-1]["result"]["total"] == 0


async def test_cancel_overtakes(server: Server, endpoint: Endpoint) -> None:
    """A cancel is answered before commands that were sent earlier and wait for the database."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await hold(client, endpoint, id="turn")
        with locked(server):
            await client.send(type="command", command="insert_passage", text="x", id="edit")
            await client.send(type="command", command="cancel", id="cancel")
            answer = (await client.until(lambda frame: "id" in frame and frame["id"] != "turn"))[-1]
            assert (answer["id"], answer["result"]) == ("cancel", {"state": "cancelling"})
        rest = [frame["id"] for frame in [await client.receive(), await client.receive()]]
        assert sorted(rest) == ["edit", "turn"]
        assert ends_of(client.frames) == {"turn": "cancelled"}


async def test_a_frame_may_come_in_fragments(offline: Server) -> None:
    """A request whose frame is sent in fragments is one request."""
    async with wire(offline) as client:
        await client.websocket.send(iter(['{"type": "command", ', '"command": "hel', 'lo", "id": 7}']))
        assert (await client.receive())["id"] == 7


async def test_a_frame_over_the_limit_closes_with_1009(offline: Server) -> None:
    """A frame of 1 MiB is read; one byte more closes the connection with 1009."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        frame = json.dumps({"type": "user_message", "message": ""})
        await client.send_raw(frame[:-2] + "x" * (1024 * 1024 - len(frame)) + '"}')
        assert (await client.receive())["code"] == "text_too_long"
        await client.send_raw(frame[:-2] + "x" * (1024 * 1024 - len(frame) + 1) + '"}')
        assert await client.closed() == 1009


async def test_text_that_is_not_utf_8_closes_with_1007(offline: Server) -> None:
    """A text frame that is not UTF-8 closes the connection with 1007."""
    async with wire(offline) as client:
        await client.websocket.send(b'{"type": "\xff"}', text=True)
        assert await client.closed() == 1007


async def test_the_rate_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests over the limit are answered as rate_limited and not done; another connection has a limit of its own."""
    monkeypatch.setattr(memws, "RATE_BURST", 3)
    server = serve(rate_limit=1)
    async with wire(server) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        for number in range(20):
            await client.send(type="command", command="insert_passage", text=f"{number}", id=number)
        answers = [await client.receive() for _ in range(20)]
        assert [answer["id"] for answer in answers] == list(range(20))
        limited = [answer for answer in answers if answer["type"] == "server_error"]
        assert {answer["code"] for answer in limited} == {"rate_limited"}
        assert 0 < len(limited) < 20
        counts = (await other.ok("get_agent", agent_name="sam"))["counts"]
        assert counts["passages"] == 20 - len(limited)


async def test_no_rate_limit(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate limit of 0 nothing is limited."""
    monkeypatch.setattr(memws, "RATE_BURST", 3)
    async with wire(serve(rate_limit=0)) as client:
        for _ in range(50):
            await client.send(type="command", command="hello")
        assert {(await client.receive())["type"] for _ in range(50)} == {"command_response"}


async def test_the_largest_errors_are_small(offline: Server) -> None:
    """Errors that quote the longest names and texts of the input stay under 4 KiB, as every error does."""
    async with wire(offline) as client:
        for number in range(10):
            await client.ok("create_agent", config={"name": "\U00020000" * 62 + f"{number:02}"})
        for name in ("\U00020000" * 64, "\x01" * 999, '"' * 999, "\\" * 999):
            assert (await client.refused("load_agent", name=name))["code"] == "unknown_agent"
            assert (await client.refused("rename_agent", new_name=name + "x"))["code"] == "bad_config"
            assert (await client.refused("create_agent", config={name: 1}))["code"] == "bad_config"
            assert (await client.refused("subscribe", after=name))["code"] == "unknown_seq"
            (refusal,) = await client.turn("x", agent_name=name, turn_id="\x01" * 128)
            assert refusal["code"] == "unknown_agent"
            assert (await client.misread({"type": name}))["code"] == "bad_type"


# ---- turns -----------------------------------------------------------------------------------------------------------


async def test_the_flow_of_memgpt_0_2_7(server: Server, endpoint: Endpoint) -> None:
    """MemGPT 0.2.7's own frames work unchanged: create, then messages with agent_name null, answered in its order."""
    endpoint.script(
        Reply(
            "I keep that.",
            calls=[
                ("core_memory_append", {"name": "human", "content": "Ada's", "request_heartbeat": True}),
                ("core_memory_append", {"name": "humans", "content": "x"}),
            ],
        ),
        reply("Hi!", "Ada!"),
    )
    config = {
        "name": "agent_1",
        "persona": "sam_pov",
        "human": "cs_phd",
        "model": "test-model",
        "preset": "memgpt_chat",
    }
    async with wire(server) as client:
        await client.send_raw({"type": "command", "command": "create_agent", "config": config})
        assert (await client.receive())["status"] == "OK: Agent initialized"
        await client.send_raw({"type": "user_message", "message": "I am Ada", "agent_name": None})
        frames = await client.until(is_terminal)
        assert shape(frames) == [
            ("agent_response_start", ""),
            ("internal_monologue", "I keep that."),
            ("function_message", "Running core_memory_append({'name': 'human', 'content': \"Ada's\"})"),
            ("function_message", "Success: None"),
            ("function_message", "Running core_memory_append({'name': 'humans', 'content': 'x'})"),
            ("function_message", "Error: there is no core memory block 'humans'; blocks: persona, human"),
            ("function_message", "Running send_message({'message': 'Hi!'})"),
            ("assistant_message", "Hi!"),
            ("function_message", "Success: None"),
            ("function_message", "Running send_message({'message': 'Ada!'})"),
            ("assistant_message", "Ada!"),
            ("function_message", "Success: None"),
            ("agent_response_end", ""),
        ]
        assert [frame.get("step") for frame in frames] == [None, *[1] * 5, *[2] * 6, None]
        assert {frame["agent_name"] for frame in frames} == {"agent_1"}
    async with wire(server) as client:
        await client.send_raw({"type": "command", "command": "load_agent", "name": "agent_1"})
        assert (await client.receive())["status"] == "OK: Agent 'agent_1' loaded"
        await client.send_raw({"type": "user_message", "message": "hi", "agent_id": None})
        assert shape(await client.until(is_terminal))[2] == ("assistant_message", "Hello!")


async def test_a_turn_begins_and_ends_once(server: Server, endpoint: Endpoint) -> None:
    """A turn has its start first and one terminal frame last, with seq, time, usage, and step from 1 in between."""
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={"name": "sam"})
        frames = await client.turn("hi", turn_id="t")
        start, user, *_, end = frames
        assert (start["type"], user["message_type"], user["message"]) == ("agent_response_start", "user_message", "hi")
        assert (end["type"], end["stop_reason"]) == ("agent_response_end", "done")
        assert end["usage"].keys() == {"input_tokens", "output_tokens", "model_calls", "estimated"}
        assert [frame["type"] for frame in frames[1:-1]] == ["agent_response"] * (len(frames) - 2)
        stored = [frame for frame in frames if "seq" in frame]
        assert [frame["seq"] for frame in stored] == list(range(1, len(stored) + 1))
        assert {frame["turn_id"] for frame in frames} == {"t"}
        times = [frame["time"] for frame in stored]
        assert times == sorted(times)
        assert all(len(time) == 24 and time.endswith("Z") for time in times)
        assert {frame["step"] for frame in frames[1:-1]} == {1}
        await client.nothing_more()


async def test_the_start_is_the_receipt(server: Server, endpoint: Endpoint) -> None:
    """When the start is sent the user's message is on disk, once; while a message waits there is no start."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await hold(client, endpoint, "first")
        assert said_on_disk(server) == ["first"]
        await client.say("second")
        await client.nothing_more()
        assert said_on_disk(server) == ["first"]
        endpoint.release()
        await client.ended()
        await client.started()
        assert said_on_disk(server) == ["first", "second"]


def said_on_disk(server: Server) -> list[str]:
    connection = sqlite3.connect(server.options.db)
    rows = connection.execute("SELECT text FROM messages WHERE role = 'user' ORDER BY id").fetchall()
    connection.close()
    return [text for (text,) in rows]


async def test_at_the_terminal_frame_all_is_on_disk(server: Server, endpoint: Endpoint) -> None:
    """When the terminal frame arrives a second reader of the file finds the whole turn."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        end = (await client.turn("hi", turn_id="t"))[-1]
        connection = sqlite3.connect(server.options.db)
        seqs = [seq for (seq,) in connection.execute("SELECT seq FROM events ORDER BY seq")]
        connection.close()
        assert seqs == list(range(1, end["seq"] + 1))


async def test_deltas_are_live(server: Server, endpoint: Endpoint) -> None:
    """delta frames spell out the monologue and the reply as they come; they have no seq and are never replayed."""
    endpoint.script(Reply("So they ask. ", calls=[("send_message", {"message": 'Hi "Ada"! \u20ac\n'})], chunk=3))
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        frames = await client.turn("hi")
        deltas = of_kind(frames, "delta")
        for of, whole in (("internal_monologue", "So they ask. "), ("assistant_message", 'Hi "Ada"! \u20ac\n')):
            assert "".join(delta["message"] for delta in deltas if delta["of"] == of) == whole
        assert all("seq" not in delta and delta["step"] == 1 for delta in deltas)
        await client.ok("subscribe", after=0)
        replayed = await client.until(is_terminal)
        assert of_kind(replayed, "delta") == []
        assert [frame["seq"] for frame in replayed] == [frame["seq"] for frame in frames if "seq" in frame]


async def test_tool_calls_and_returns(server: Server, endpoint: Endpoint) -> None:
    """tool_call has the arguments as the model gave them, tool_return its status, and both the id of the call."""
    endpoint.script(
        Reply(calls=[("core_memory_append", {"name": "humans", "content": "x"})], call_ids=["call_a"]), reply("Sorry.")
    )
    async with wire(server, "tool_call", "tool_return", "heartbeat") as client:
        await client.ok("create_agent", config={})
        frames = (await client.turn("hi"))[1:-1]
        call, back, beat, *_ = frames
        assert (call["tool_call_id"], call["name"]) == ("call_a", "core_memory_append")
        assert call["arguments"] == json.loads(call["message"]) == {"name": "humans", "content": "x"}
        assert (back["tool_call_id"], back["name"], back["status"]) == ("call_a", "core_memory_append", "Failed")
        assert beat["message_type"] == "heartbeat"
        assert [frame["step"] for frame in frames] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Reply(status=401), "model_auth"),
        (Reply(refusal="I will not"), "model_refused"),
    ],
)
async def test_a_failed_turn_has_one_error(server: Server, endpoint: Endpoint, answer: Reply, code: str) -> None:
    """A turn whose model fails ends with agent_response_error, a code and a seq, and the next message works."""
    endpoint.script(answer)
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        frames = await client.turn("hi", turn_id="t")
        error = frames[-1]
        assert (error["type"], error["code"], error["stop_reason"]) == ("agent_response_error", code, "error")
        assert error["seq"] == len([frame for frame in frames if "seq" in frame])
        assert [frame for frame in await client.turn("hi", turn_id="t") if "seq" in frame][-1]["code"] == code
        assert (await client.turn("again"))[-1]["stop_reason"] == "done"


async def test_what_never_becomes_a_turn_is_refused_once(server: Server, endpoint: Endpoint) -> None:
    """Each message that is refused gets one agent_response_error with id, turn_id and code, and nothing is stored."""
    async with wire(server, "*") as client, wire(server, "*") as follower:
        await client.ok("create_agent", config={"name": "sam"})
        await client.turn("hello", turn_id="used")
        last = (await follower.ok("subscribe", agent_name="sam"))["last_seq"]
        endpoint.script(HELD)
        cases: list[tuple[str, JSON]] = [
            ("unknown_agent", {"agent_name": "nobody"}),
            ("text_too_long", {"message": "x" * 65_537}),
            ("turn_id_reused", {"turn_id": "used"}),
            ("turn_id_reused", {"turn_id": "used", "message": "hello "}),
        ]
        for code, more in cases:
            fields = {"message": "hi", "turn_id": "t", **more}
            (refusal,) = await client.turn(fields.pop("message"), **fields)
            assert (refusal["type"], refusal["code"], refusal["stop_reason"]) == ("agent_response_error", code, "error")
            assert refusal["turn_id"] == fields["turn_id"]
            assert "seq" not in refusal
        assert (await follower.ok("get_agent", agent_name="sam"))["last_seq"] == last
        await follower.nothing_more()


@pytest.mark.parametrize("table", ["turns", "messages", "events"])
async def test_a_message_that_cannot_be_stored_is_refused(server: Server, endpoint: Endpoint, table: str) -> None:
    """When the database refuses a user's message it is refused as store_failed, and works once the database does."""
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        await client.ok("subscribe")
        with refusing(server, table):
            (refusal,) = await client.turn("hi", turn_id="t")
            assert (refusal["code"], "seq" in refusal, refusal["turn_id"]) == ("store_failed", False, "t")
        assert endpoint.requests == []
        frames = await client.turn("hi", turn_id="t")
        assert [frame["seq"] for frame in frames if "seq" in frame] == list(
            range(1, len([frame for frame in frames if "seq" in frame]) + 1)
        )
        assert len([text for text in said_on_disk(server) if text == "hi"]) == 1


async def test_a_step_that_cannot_be_stored_ends_its_turn(server: Server, endpoint: Endpoint) -> None:
    """When the database refuses a step the turn ends with store_failed, and the agent goes on without a gap."""
    endpoint.script(reply("lost", hold=True), reply("kept"))
    async with wire(server, "*") as client, wire(server, "*") as follower:
        await client.ok("create_agent", config={"name": "sam"})
        await follower.ok("subscribe", agent_name="sam")
        await client.say("hi", turn_id="t")
        await asked(endpoint, 1)
        with refusing(server, "messages", "new.role = 'assistant'"):
            endpoint.release()
            assert (await client.ended())["code"] == "store_failed"
        frames = await client.turn("again")
        assert [frame["message"] for frame in of_kind(frames, "assistant_message")] == ["kept"]
        seen = await follower.until(lambda frame: is_terminal(frame) and frame["turn_id"] != "t")
        assert [frame["seq"] for frame in seen if stored(frame)] == list(range(1, frames[-1]["seq"] + 1))


async def test_messages_wait_their_turn(server: Server, endpoint: Endpoint) -> None:
    """Messages of several connections run one after another, in the order sent; who asks is told the place."""
    async with wire(server, "queue", "assistant_message") as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint, "first", id=1)
        await other.say("second", id=2, agent_name="sam")
        await other.nothing_more()
        await client.say("third", id=3, turn_id="t3")
        queued = await client.receive()
        assert (queued["message_type"], queued["position"], queued["turn_id"]) == ("queue", 2, "t3")
        assert "seq" not in queued
        endpoint.release()
        await client.until(lambda frame: is_terminal(frame) and frame["id"] == 3)
        await other.until(is_terminal)
        seqs = {frame["id"]: frame["seq"] for frame in client.frames + other.frames if is_terminal(frame)}
        assert seqs[1] < seqs[2] < seqs[3]
        spoken = [
            message["text"] for message in (await client.ok("get_messages"))["messages"] if message["role"] == "user"
        ]
        assert spoken == ["first", "second", "third"]
        for earlier, later in pairwise(endpoint.requests):
            assert later["messages"][: len(earlier["messages"])] == earlier["messages"]


async def test_when_busy_reject(server: Server, endpoint: Endpoint) -> None:
    """With when_busy reject a message to a busy agent is refused as busy, and to an idle one it runs."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await hold(client, endpoint, "first", when_busy="reject", id="first")
        (refusal,) = await client.turn("second", when_busy="reject", turn_id="t")
        assert (refusal["code"], refusal["turn_id"]) == ("busy", "t")
        endpoint.release()
        assert (await client.ended())["id"] == "first"
        assert said_on_disk(server) == ["first"]


async def test_when_busy_interrupt(server: Server, endpoint: Endpoint) -> None:
    """With when_busy interrupt a message ends the running turn as superseded and goes before those that wait."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await hold(client, endpoint, id="runs")
        await client.say("waits", id="waits")
        await client.say("interrupts", id="interrupts", when_busy="interrupt")
        frames = await client.until(lambda frame: is_terminal(frame) and frame["id"] == "waits")
        assert list(ends_of(frames).items()) == [("runs", "superseded"), ("interrupts", "done"), ("waits", "done")]
        assert said_on_disk(server) == ["runs", "interrupts", "waits"]
        assert (await client.turn("idle now", when_busy="interrupt"))[-1]["stop_reason"] == "done"


async def test_eight_messages_of_a_connection_wait(server: Server, endpoint: Endpoint) -> None:
    """One message of a connection runs and eight wait, also when they arrive at once; a cancelled one makes room."""
    endpoint.script(HELD)
    async with wire(server) as client:
        await client.send(type="command", command="create_agent", config={})
        for number in range(10):
            await client.say(f"{number}", id=number, turn_id=f"t{number}")
        refusal = (await client.until(is_terminal))[-1]
        assert (refusal["id"], refusal["code"]) == (9, "queue_full")
        assert await client.ok("cancel", turn_id="t5") == {"state": "removed"}
        await client.say("5", id="again", turn_id="t5")
        await client.say("10", id=10)
        await client.until(lambda frame: is_terminal(frame) and frame["id"] == 10)
        await asked(endpoint, 1)
        endpoint.release()
        await client.until(lambda frame: is_terminal(frame) and frame["id"] == "again")
        refused = {9: "queue_full", 5: "cancelled", 10: "queue_full"}
        assert ends_of(client.frames) == dict.fromkeys([*range(9), "again"], "done") | refused
        assert said_on_disk(server) == ["0", "1", "2", "3", "4", "6", "7", "8", "5"]


async def test_the_eight_are_counted_over_all_agents(server: Server, endpoint: Endpoint) -> None:
    """A connection whose eight messages wait for one agent may still speak to another that is idle, and no more."""
    endpoint.script(HELD, HELD)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "idle"})
        await client.ok("create_agent", config={"name": "busy"})
        for number in range(9):
            await client.say("x", id=number)
        await client.started()
        await client.say("x", agent_name="idle", id="runs")
        assert (await client.started())["id"] == "runs"
        (refusal,) = await client.turn("x", agent_name="idle", id="no room")
        assert refusal["code"] == "queue_full"


async def test_thirty_two_messages_wait_for_an_agent(server: Server, endpoint: Endpoint) -> None:
    """For one agent 32 messages of all connections wait; the next one is refused, whoever sends it."""
    async with wire(server) as a, wire(server) as b, wire(server) as c, wire(server) as d, wire(server) as e:
        await a.ok("create_agent", config={"name": "sam"})
        await hold(a, endpoint)
        for client in (a, b, c, d):
            for number in range(8):
                await client.say("waits", id=number, agent_name="sam")
            await client.nothing_more()
        (refusal,) = await e.turn("one too many", agent_name="sam")
        assert refusal["code"] == "queue_full"
        listed = (await e.ok("list_agents"))["agents"][0]
        assert listed["state"] == "running"
        endpoint.release()
        for client in (a, b, c, d):
            await client.until(lambda frame: is_terminal(frame) and frame["id"] == 7)
        assert (await e.turn("now", agent_name="sam"))[-1]["stop_reason"] == "done"


async def test_cancel_a_running_turn(server: Server, endpoint: Endpoint) -> None:
    """cancel ends the running turn, by its id or without one; what was said so far is kept and the next turn works."""
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        for more in ({}, {"turn_id": "t"}):
            endpoint.script(reply("Hello there, dear friend", chunk=4, stall_after=6))
            await client.say("hi", **more)
            await client.until(lambda frame: frame.get("message_type") == "delta")
            assert await client.ok("cancel", **more) == {"state": "cancelling"}
            if not any(map(is_terminal, client.before_answer)):
                await client.ended()
            assert [frame["stop_reason"] for frame in client.frames if is_terminal(frame)][-1] == "cancelled"
        (said, *_) = of_kind(client.frames, "assistant_message")
        assert said["partial"] is True
        assert "Hello there, dear friend".startswith(said["message"])
        assert (await client.turn("again"))[-1]["stop_reason"] == "done"


async def test_cancel_a_waiting_message(server: Server, endpoint: Endpoint) -> None:
    """cancel removes a message that waits, which is refused as cancelled to its sender, whoever cancels."""
    async with wire(server) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint, id="runs")
        await client.say("waits", id="waits", turn_id="t")
        await client.nothing_more()
        assert await other.ok("cancel", agent_name="sam", turn_id="t") == {"state": "removed"}
        assert other.before_answer == []
        refusal = await client.receive()
        assert (refusal["id"], refusal["turn_id"], refusal["code"]) == ("waits", "t", "cancelled")
        assert "seq" not in refusal
        endpoint.release()
        assert (await client.ended())["id"] == "runs"
        assert said_on_disk(server) == ["runs"]
        assert (await other.refused("cancel", agent_name="sam", turn_id="t"))["code"] == "unknown_turn"


async def test_cancel_what_is_over(offline: Server) -> None:
    """cancel of a turn that is over, or where nothing runs, says so; of one never seen it is unknown_turn."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        assert await client.ok("cancel") == {"state": "over"}
        await client.turn("hi", turn_id="t")
        assert await client.ok("cancel", turn_id="t") == {"state": "over"}
        assert await client.ok("cancel") == {"state": "over"}
        assert (await client.refused("cancel", turn_id="never"))["code"] == "unknown_turn"


async def test_cancel_finds_a_message_sent_just_before(offline: Server, serve: Serve) -> None:
    """A cancel right behind its message, in one go, cancels that message or finds its turn over; never unknown."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        for number in range(20):
            turn_id = f"t{number}"
            await client.say("hi", id="message", turn_id=turn_id)
            await client.send(type="command", command="cancel", turn_id=turn_id, id="cancel")
            frames = await client.until(lambda frame: frame.get("id") == "cancel")
            if "message" not in ends_of(frames):
                frames += await client.until(is_terminal)
            state = next(frame["result"]["state"] for frame in frames if frame.get("id") == "cancel")
            expected = {"removed": {"cancelled"}, "cancelling": {"cancelled", "done"}, "over": {"done"}}
            assert ends_of(frames)["message"] in expected[state]


async def test_a_cancel_is_for_its_own_agent(server: Server, endpoint: Endpoint) -> None:
    """A cancel finds the turn of its own agent, also where another agent's message has the same turn_id."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "ada"})
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint, agent_name="sam", turn_id="t", id="sam")
        with locked(server):
            await client.send(type="command", command="insert_passage", text="x", agent_name="ada", id="edit")
            await client.say("other", agent_name="ada", turn_id="t", id="ada")
            await client.send(type="command", command="cancel", agent_name="sam", turn_id="t", id="cancel")
            answer = (await client.until(lambda frame: frame.get("id") in ("cancel", "ada")))[-1]
            assert (answer["id"], answer.get("result")) == ("cancel", {"state": "cancelling"})
        frames = await client.until(lambda frame: is_terminal(frame) and frame["id"] == "ada")
        assert ends_of(frames)["ada"] == "done"


# ---- a turn_id sent again --------------------------------------------------------------------------------------------


async def test_a_waiting_turn_sent_again(server: Server, endpoint: Endpoint) -> None:
    """A message sent again while it waits, from another connection too, runs once and answers both."""
    async with wire(server) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint)
        await client.say("again", turn_id="t", id="one")
        await other.say("again", turn_id="t", id="two", agent_name="sam")
        await other.nothing_more()
        (refusal,) = await other.turn("different", turn_id="t", agent_name="sam")
        assert refusal["code"] == "turn_id_reused"
        endpoint.release()
        mine = await client.until(lambda frame: is_terminal(frame) and frame["turn_id"] == "t")
        mine = [frame for frame in mine if frame["turn_id"] == "t"]
        theirs = await other.until(is_terminal)
        assert [frame["seq"] for frame in mine] == [frame["seq"] for frame in theirs]
        assert [frame.get("id") for frame in (mine[0], mine[-1])] == ["one", "one"]
        assert [frame.get("id") for frame in (theirs[0], theirs[-1])] == ["two", "two"]
        assert said_on_disk(server) == ["runs", "again"]
        assert len(endpoint.requests) == 2


@pytest.mark.parametrize("subscribed", [False, True])
async def test_a_running_turn_sent_again(server: Server, endpoint: Endpoint, subscribed: bool) -> None:
    """A message sent again while it runs gets its frames so far and then the live ones, once each."""
    endpoint.script(
        Reply(calls=[("core_memory_append", {"name": "human", "content": "x", "request_heartbeat": True})]), HELD
    )
    async with wire(server, *memws.CLASSIC_TYPES, "user_message") as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        if subscribed:
            await other.ok("subscribe", agent_name="sam")
        await client.say("hi", turn_id="t", id="one")
        await asked(endpoint, 2)
        refusal = (await other.turn("different", turn_id="t", agent_name="sam"))[-1]
        assert refusal["code"] == "turn_id_reused"
        before = len(other.frames)
        await other.say("hi", turn_id="t", id="two", agent_name="sam")
        await client.say("hi", turn_id="t", id="three")
        again = await other.until(lambda frame: frame.get("message") == "Success: None")
        mine = await client.until(lambda frame: frame.get("id") == "three")
        mine += await client.until(lambda frame: frame.get("message") == "Success: None")
        endpoint.release()
        again += await other.until(is_terminal)
        mine += await client.until(is_terminal)
        assert other.frames[before:] == again
        assert [frame["type"] for frame in again].count("agent_response_start") == 1
        assert [frame["seq"] for frame in again] == sorted({frame["seq"] for frame in again})
        assert (again[0]["type"], again[0]["seq"]) == ("agent_response_start", 1)
        assert [again[0].get("id"), again[-1].get("id")] == ["two", "two"]
        assert mine[-1]["id"] == "three"
        assert [frame["seq"] for frame in mine[-4:]] == [frame["seq"] for frame in again[-4:]]
        assert len(endpoint.requests) == 2
        assert said_on_disk(server) == ["hi"]


async def test_a_resent_turn_outlives_its_subscription(server: Server, endpoint: Endpoint) -> None:
    """A client that sends a running turn again and then subscribes or unsubscribes still gets all of it, once."""
    for commands in (["subscribe", "unsubscribe"], ["subscribe"], []):
        async with wire(server) as client, wire(server) as other:
            name = (await client.ok("create_agent", config={}))["agent_name"]
            await hold(client, endpoint, "hi", turn_id="t")
            await other.ok("load_agent", name=name)
            if commands == ["subscribe", "unsubscribe"]:
                await other.ok("subscribe")
            await other.say("hi", turn_id="t", id="again")
            await other.started()
            for command in commands[-1:]:
                await other.ok(command)
            endpoint.release()
            frames = await other.until(is_terminal)
            assert (frames[-1]["id"], frames[-1]["stop_reason"]) == ("again", "done")
            seqs = [frame["seq"] for frame in frames]
            assert seqs == sorted(set(seqs))


@pytest.mark.parametrize("subscribed", [False, True])
@pytest.mark.parametrize("restart", [False, True])
async def test_a_turn_that_is_over_sent_again(
    online: Callable[..., Server], endpoint: Endpoint, subscribed: bool, restart: bool
) -> None:
    """A message sent again after its end gets its stored frames with their first seq, across a restart too."""
    server = online()
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.turn("before")
        first = [frame for frame in await client.turn("hi", turn_id="t", id="one") if "seq" in frame]
        await client.turn("after")
    if restart:
        server.stop()
        server = online()
    async with wire(server, "*") as client:
        await client.ok("load_agent", name="sam")
        if subscribed:
            await client.ok("subscribe")
        again = await client.turn("hi", turn_id="t", id="two")
        assert [{**frame, "id": 0} for frame in again] == [{**frame, "id": 0} for frame in first]
        assert [frame["id"] for frame in again if "id" in frame] == ["two", "two"]
        await client.nothing_more()
        (refusal,) = await client.turn("different", turn_id="t")
        assert refusal["code"] == "turn_id_reused"
    assert len(endpoint.requests) == 3
    assert said_on_disk(server) == ["before", "hi", "after"]


async def test_a_turn_id_sent_twice_at_once_runs_once(server: Server, endpoint: Endpoint) -> None:
    """Of two connections that send the same message in the same moment both are answered, by one turn."""
    async with wire(server) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam"})
        for number in range(20):
            for each in (client, other):
                await each.say("hi", turn_id=f"t{number}", agent_name="sam")
            mine, theirs = await client.until(is_terminal), await other.until(is_terminal)
            assert [frame["seq"] for frame in mine] == [frame["seq"] for frame in theirs]
        assert len(endpoint.requests) == 20
        assert len(said_on_disk(server)) == 20


async def test_a_turn_id_is_one_agents(offline: Server) -> None:
    """The same turn_id with two agents is two turns."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={"name": "ada"})
        await client.turn("to ada", turn_id="t")
        await client.ok("create_agent", config={"name": "sam"})
        assert (await client.turn("to sam", turn_id="t"))[-1]["stop_reason"] == "done"


# ---- who gets what ---------------------------------------------------------------------------------------------------


async def test_no_frame_crosses_between_agents(server: Server, endpoint: Endpoint) -> None:
    """Two clients with an agent each, talking at the same time, see no frame of the other."""
    async with wire(server, "*") as client, wire(server, "*") as other:
        await client.ok("create_agent", config={"name": "ada"})
        await client.ok("subscribe")
        await other.ok("create_agent", config={"name": "sam"})
        await other.ok("subscribe")
        for _ in range(5):
            await client.say("hi")
            await other.say("hi")
        for each, name in ((client, "ada"), (other, "sam")):
            for _ in range(5):
                await each.until(is_terminal)
            await each.nothing_more()
            assert {frame["agent_name"] for frame in each.frames if frame["type"] != "command_response"} == {name}


async def test_sender_and_subscribers_get_each_frame_once(server: Server, endpoint: Endpoint) -> None:
    """A turn's frames go once to its sender, subscribed or not, and to subscribers; the id only to the sender."""
    async with (
        wire(server, "*") as sender,
        wire(server, "*") as both,
        wire(server, "*") as subscriber,
        wire(server, "*") as stranger,
    ):
        await sender.ok("create_agent", config={"name": "sam"})
        await stranger.ok("load_agent", name="sam")
        for each in (both, subscriber):
            await each.ok("subscribe", agent_name="sam")
        await sender.say("one", id="a", turn_id="t1")
        mine = await sender.until(is_terminal)
        await both.say("two", id="b", agent_name="sam", turn_id="t2")
        theirs = await both.until(lambda frame: is_terminal(frame) and frame["turn_id"] == "t2")
        seen = await subscriber.until(lambda frame: is_terminal(frame) and frame["turn_id"] == "t2")
        assert [frame for frame in seen if "id" in frame] == []
        assert [without_id(frame) for frame in theirs if stored(frame)] == [frame for frame in seen if stored(frame)]
        assert [without_id(frame) for frame in mine if stored(frame)] == [
            frame for frame in seen if frame["turn_id"] == "t1" and stored(frame)
        ]
        assert [frame["seq"] for frame in seen if stored(frame)] == list(range(1, seen[-1]["seq"] + 1))
        assert [(frame["turn_id"], frame["id"]) for frame in theirs if "id" in frame] == [("t2", "b"), ("t2", "b")]
        await sender.nothing_more()
        await stranger.nothing_more()


def stored(frame: JSON) -> bool:
    return "seq" in frame


def without_id(frame: JSON) -> JSON:
    return {key: value for key, value in frame.items() if key != "id"}


@pytest.mark.parametrize("turn_id", ['"', "\\", "a\nb", "\u20ac\U0001f600", "\x7f", "seq", "t" * 128])
async def test_any_turn_id_is_matched_as_a_whole(server: Server, endpoint: Endpoint, turn_id: str) -> None:
    """The id is on the frames of its own turn only, whatever characters the turn_id has, live and replayed."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        await client.ok("subscribe")
        await client.turn("one", id="first", turn_id=f"before {turn_id}"[:128])
        assert (await hold(client, endpoint, id="second", turn_id=turn_id))["id"] == "second"
        await client.ok("subscribe", after=0)
        old = await client.until(is_terminal)
        assert [frame for frame in old if frame.get("id") == "second"] == []
        await client.started()
        endpoint.release()
        end = await client.ended()
        assert (end["turn_id"], end["id"]) == (turn_id, "second")


async def test_a_turn_goes_on_when_its_sender_leaves(server: Server, endpoint: Endpoint) -> None:
    """The running turn of a client that leaves ends as always, and is answered when it comes back."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint, "hi", turn_id="t")
        client.websocket.transport.abort()
    async with wire(server) as client:
        await client.say("hi", turn_id="t", agent_name="sam")
        await client.started()
        endpoint.release()
        assert (await client.ended())["stop_reason"] == "done"
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("rename_agent", {"new_name": "new"}),
        ("set_block", {"label": "human", "value": "Likes tea."}),
        ("insert_passage", {"text": "walrus"}),
        ("update_agent", {"config": {"max_steps": 3}}),
        ("delete_agent", {}),
    ],
)
async def test_a_command_of_a_client_that_leaves_is_done_wholly(offline: Server, command: str, more: JSON) -> None:
    """When a client leaves while its command is being stored, memory, disk and subscribers agree on the outcome."""
    async with wire(offline, "*") as watcher:
        await watcher.ok("create_agent", config={"name": "sam"})
        await watcher.ok("subscribe")
        async with wire(offline) as client:
            with locked(offline):
                await client.send(type="command", command=command, agent_name="sam", **more)
                await client.send(type="command", command="cancel", agent_name="sam", id="cancel")
                await client.until(lambda frame: frame.get("id") == "cancel")  # overtakes: the other was taken up
                client.websocket.transport.abort()
                await client.closed()
                while len((await watcher.ok("hello"))["commands"]) and len(offline.interface.clients) > 1:
                    pass
        event = await watcher.receive()
        assert event["seq"] == 1
        assert event["message_type"] in ("memory_change", "agent_change")
        names = [agent["agent_name"] for agent in (await watcher.ok("list_agents"))["agents"]]
        assert names == {"rename_agent": ["new"], "delete_agent": []}.get(command, ["sam"])
        for name in {"sam", "new"} - set(names):
            assert (await watcher.refused("get_agent", agent_name=name))["code"] == "unknown_agent"
        if names:
            agent = await watcher.ok("get_agent")
            assert (agent["agent_name"], agent["last_seq"]) == (names[0], 1)
            assert (agent["blocks"][1]["value"], agent["counts"]["passages"], agent["settings"]["max_steps"]) == (
                "Likes tea." if command == "set_block" else "",
                1 if command == "insert_passage" else 0,
                3 if command == "update_agent" else 20,
            )
            frames = await watcher.turn("hi")
            assert frames[0]["seq"] == 2


async def test_agents_never_wait_for_each_other(server: Server, endpoint: Endpoint) -> None:
    """While one agent waits for its model another one answers."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "slow"})
        await hold(client, endpoint, id="slow")
        await client.ok("create_agent", config={"name": "fast"})
        for _ in range(3):
            assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
        endpoint.release()
        assert (await client.ended())["id"] == "slow"


async def test_a_blocking_tool_stops_nobody(server: Server, endpoint: Endpoint) -> None:
    """While a sync tool blocks, pings are answered, other agents take turns, and its own agent answers commands."""
    entered, leave = threading.Event(), threading.Event()

    @server.tool
    def wait() -> str:
        """Wait until it is time."""
        entered.set()
        assert leave.wait(LIMIT)
        return "it is time"

    endpoint.script(Reply(calls=[("wait", {"request_heartbeat": True})]))
    async with wire(server, "*", ping_interval=0.2, ping_timeout=LIMIT) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam", "tools": ["wait"]})
        await client.say("hi")
        await asyncio.to_thread(entered.wait, LIMIT)
        for _ in range(10):
            await asyncio.wait_for(await client.websocket.ping(), LIMIT)
        await other.ok("create_agent", config={"name": "ada"})
        assert (await other.turn("hi"))[-1]["stop_reason"] == "done"
        assert (await client.ok("get_agent"))["turn"]["step"] == 1
        assert of_kind(client.frames, "tool_call")[-1]["name"] == "wait"  # told before the tool has ended
        assert of_kind(client.frames, "tool_return") == []
        leave.set()
        frames = await client.until(is_terminal)
        assert of_kind(frames, "tool_return")[0]["message"] == "it is time"
        assert frames[-1]["stop_reason"] == "done"


# ---- subscriptions ---------------------------------------------------------------------------------------------------


async def test_subscribe_replays_and_goes_live(offline: Server) -> None:
    """subscribe gives the stored events above `after`, once and in order, and then the live ones without a gap."""
    async with wire(offline, "*") as client, wire(offline, "*") as other:
        await client.ok("create_agent", config={"name": "sam"})
        for number in range(3):
            await client.turn(f"{number}")
        last = client.frames[-1]["seq"]
        for after in (0, 1, last - 1, last, None):
            await client.say("more")
            begun = (await other.ok("subscribe", agent_name="sam", after=after))["last_seq"]
            assert other.before_answer == []
            end = await client.ended()
            expected = list(range((begun if after is None else after) + 1, end["seq"] + 1))
            seqs: list[int] = []
            while len(seqs) < len(expected):
                frame = await other.receive()
                seqs += [frame["seq"]] if stored(frame) else []
            assert seqs == expected
            await other.ok("unsubscribe", agent_name="sam")
            last = end["seq"]


async def test_replays_are_told_by_the_message_types(offline: Server) -> None:
    """A replay holds the message types that its connection wants."""
    async with wire(offline) as client:
        await client.ok("create_agent", config={})
        classic = await client.turn("My name is Ada")
        await client.ok("subscribe", after=0)
        assert await client.until(is_terminal) == [without_id(frame) for frame in classic]


async def test_seq_is_gapless_over_everything(offline: Server) -> None:
    """Turns, edits, renames, compactions and settings of an agent count on without a gap for a subscriber of all."""
    async with wire(offline, "*") as client, wire(offline, "*") as other:
        await client.ok("create_agent", config={"name": "sam"})
        await other.ok("subscribe", agent_name="sam")
        for number in range(4):
            await client.turn(f"My friend number {number} is called Tom " + "and so on " * 50)
        await client.ok("set_block", label="human", value="x")
        await client.ok("insert_passage", text="x")
        await client.ok("delete_passage", passage_id=1)
        await client.ok("update_agent", config={"max_steps": 3})
        await client.ok("compact")
        await client.ok("rename_agent", new_name="new")
        await client.turn("hi")
        await client.ok("delete_agent")
        frames = await other.until(lambda frame: frame.get("change") == "deleted")
        seqs = [frame["seq"] for frame in frames if "seq" in frame]
        assert seqs == list(range(1, len(seqs) + 1))
        kinds = {frame.get("message_type") for frame in frames}
        assert kinds >= {"memory_change", "agent_change", "compaction", "context", "tool_call"}


@pytest.mark.parametrize("after", [-1, 99, "0", 1.5, True, [], {}, 2**60])
async def test_an_unknown_seq_subscribes_nothing(offline: Server, after: Any) -> None:
    """An `after` above the last seq, negative or no integer is unknown_seq with the last seq; nothing is subscribed."""
    async with wire(offline) as client, wire(offline, "*") as other:
        await client.ok("create_agent", config={"name": "sam"})
        last = (await client.turn("hi"))[-1]["seq"]
        error = await other.refused("subscribe", agent_name="sam", after=after)
        assert (error["code"], error["last_seq"]) == ("unknown_seq", last)
        await client.turn("hi")
        await other.nothing_more()
        await other.ok("subscribe", agent_name="sam")
        await other.refused("subscribe", agent_name="sam", after=after)
        await client.turn("the earlier subscription stays")
        await other.until(is_terminal)


async def test_subscribing_again_replaces(offline: Server) -> None:
    """A second subscription takes the place of the first: no frame comes twice; unsubscribe ends it."""
    async with wire(offline) as client, wire(offline, "*") as other:
        await client.ok("create_agent", config={"name": "sam"})
        last = (await client.turn("hi"))[-1]["seq"]
        for _ in range(3):
            await other.ok("subscribe", agent_name="sam", after=0)
        await other.until(lambda frame: frame.get("seq") == last)
        await other.ok("subscribe", agent_name="sam")
        end = (await client.turn("hi"))[-1]["seq"]
        seqs = [frame["seq"] for frame in await other.until(lambda frame: frame.get("seq") == end) if stored(frame)]
        assert seqs == list(range(last + 1, end + 1))
        assert (await other.ok("unsubscribe", agent_name="sam"))["last_seq"] == end
        await client.turn("hi")
        await other.nothing_more()
        assert (await other.ok("unsubscribe", agent_name="sam"))["last_seq"] > end


async def test_a_sender_that_unsubscribes_keeps_its_turn(server: Server, endpoint: Endpoint) -> None:
    """A sender that subscribes and unsubscribes in mid-turn gets each frame of its turn once."""
    async with wire(server) as client:
        await client.ok("create_agent", config={})
        start = await hold(client, endpoint, id="mine")
        await client.ok("subscribe")
        await client.ok("unsubscribe")
        endpoint.release()
        frames = [start, *await client.until(is_terminal)]
        assert [frame["seq"] for frame in frames] == sorted({frame["seq"] for frame in frames})
        assert of_kind(frames, "assistant_message")
        assert frames[-1]["id"] == "mine"


# ---- long texts, slow readers ----------------------------------------------------------------------------------------

LONG = "".join(f"{number:07} \u20ac" for number in range(520_000))
"""Five million characters that no cut and no swap leaves as they are."""


def joined(frames: list[JSON]) -> str:
    """The text of the parts, which are numbered from 1."""
    assert [(frame["part"], frame["parts"]) for frame in frames] == [
        (number, len(frames)) for number in range(1, len(frames) + 1)
    ]
    return "".join(frame["message"] for frame in frames)


async def test_long_texts_come_in_parts(online: Callable[..., Server], endpoint: Endpoint) -> None:
    """A reply of five million characters reaches its sender in parts, live and replayed, and so do long answers."""
    server = online(context_window=100_000_000)
    endpoint.script(reply(LONG, chunk=500_000))
    async with wire(server, "*") as client:
        await client.ok("create_agent", config={})
        live = await client.turn("Tell me all", turn_id="t")
        assert "".join(delta["message"] for delta in of_kind(live, "delta")) == LONG
        replayed = await client.turn("Tell me all", turn_id="t")
        for frames in (live, replayed):
            assert joined(of_kind(frames, "assistant_message")) == LONG
            call = of_kind(frames, "tool_call")
            assert json.loads(joined(call)) == {"message": LONG}
            assert {part["arguments"] for part in call} == {None}
            running = [frame for frame in of_kind(frames, "function_message") if "parts" in frame]
            assert joined(running) == f"Running send_message({ {'message': LONG}!r})"
        await client.turn("And then?", turn_id="next")
        for command, more in (("get_context", {}), ("get_request", {"turn_id": "next", "step": 1})):
            await client.send(type="command", command=command, id=command, **more)
            answers = [await client.receive()]
            while answers[-1]["part"] < answers[-1]["parts"]:
                answers.append(await client.receive())
            assert {answer["id"] for answer in answers} == {command}
            assert [answer["part"] for answer in answers] == list(range(1, answers[0]["parts"] + 1))
            result = json.loads("".join(answer["result"]["text"] for answer in answers))
            if command == "get_request":
                assert result["request"] == endpoint.requests[-1]
            else:
                assert LONG in result["sections"][-1]["text"]
        await client.nothing_more()


@pytest.mark.parametrize("character", ["\U0001f600", "\x01", '"', "\\", "\ud83d"])
async def test_no_character_makes_a_frame_too_long(
    online: Callable[..., Server], endpoint: Endpoint, character: str
) -> None:
    """However many bytes its characters need, no frame of a long text exceeds 1 MiB, and the text arrives."""
    server = online(context_window=100_000_000)
    shown = character.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    for length in (65_500, 131_050):
        endpoint.script(reply(character * length, chunk=50_000))
        async with wire(server, "*") as client:
            await client.ok("create_agent", config={})
            await client.ok("subscribe")
            frames = await client.turn("hi" + shown * 65_534)
            assert "".join(frame["message"] for frame in of_kind(frames, "assistant_message")) == shown * length
            await client.ok("insert_passage", text=shown * 65_536)
            await client.ok("get_messages")
            await client.ok("search_memory", query="")


async def test_unsubscribing_ends_a_replay_and_nothing_else(online: Callable[..., Server], endpoint: Endpoint) -> None:
    """A client that subscribes, sends a running turn again and unsubscribes in mid-replay gets only that turn."""
    server = online(context_window=100_000_000)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        endpoint.script(reply(LONG[:2_000_000], chunk=2_000_000, whole_arguments=True))
        await client.turn("long")
        await hold(client, endpoint, "hi", turn_id="t")
        async with wire(server, max_queue=1) as slow:
            await slow.send(type="command", command="subscribe", agent_name="sam", after=0)
            await slow.say("hi", agent_name="sam", turn_id="t", id="again")
            await slow.send(type="command", command="unsubscribe", agent_name="sam", id="unsubscribe")
            await client.nothing_more()
            await slow.until(lambda frame: frame.get("id") == "unsubscribe")
            endpoint.release()
            frames = await slow.until(is_terminal)
            turn = [frame for frame in slow.frames if frame.get("turn_id") == "t"]
            assert {frame["turn_id"] for frame in frames} == {"t"}
            assert (turn[0]["type"], turn[0]["id"]) == ("agent_response_start", "again")
            assert (frames[-1]["id"], frames[-1]["stop_reason"]) == ("again", "done")
            assert [frame["seq"] for frame in turn] == sorted({frame["seq"] for frame in turn})


async def test_a_replay_that_cannot_be_read_ends_alone(server: Server) -> None:
    """A subscription whose events the database cannot read ends with an error of its own; all else goes on."""
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.turn("Hello")
        with closing(sqlite3.connect(server.options.db, isolation_level=None)) as other:
            other.execute("ALTER TABLE events RENAME TO lost")
            await client.ok("subscribe", after=0)
            error = await client.receive()
            assert (error["type"], error["code"]) == ("agent_response_error", "store_failed")
            assert (error["agent_name"], "seq" in error) == ("sam", False)
            await client.ok("hello")
            other.execute("ALTER TABLE lost RENAME TO events")
        assert (await client.turn("Hello again"))[-1]["stop_reason"] == "done"
        await client.ok("subscribe", after=0)
        assert (await client.receive())["seq"] == 1


@pytest.mark.parametrize("command", ["subscribe", "unsubscribe"])
async def test_a_sender_gets_its_turn_whatever_it_subscribes(
    online: Callable[..., Server], endpoint: Endpoint, command: str
) -> None:
    """A turn that ends during its sender's replay reaches the sender, also where that replay is replaced or ended."""
    server = online(context_window=100_000_000)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await client.ok("subscribe")
        endpoint.script(reply(LONG[:2_000_000], chunk=2_000_000, whole_arguments=True))
        await client.turn("long")
        async with wire(server, max_queue=1) as slow:
            await slow.ok("load_agent", name="sam")
            await hold(slow, endpoint, "hi", turn_id="t", id="mine")
            await slow.send(type="command", command="subscribe", after=0)
            await client.started()
            await client.nothing_more()
            endpoint.release()
            await client.ended()
            await slow.send(type="command", command=command, id="then")
            frames = await slow.until(lambda frame: is_terminal(frame) and frame["turn_id"] == "t")
            assert (frames[-1]["id"], frames[-1]["stop_reason"]) == ("mine", "done")
            mine = [frame for frame in slow.frames if frame.get("turn_id") == "t"]
            assert [said["message"] for said in of_kind(mine, "assistant_message")] == ["held"]
            assert [frame["seq"] for frame in mine] == sorted({frame["seq"] for frame in mine})


async def test_a_slow_replay_is_not_a_slow_reader(online: Callable[..., Server], endpoint: Endpoint) -> None:
    """A replay of far more than may wait goes at its reader's pace, and live events follow without a gap."""
    server = online(context_window=100_000_000)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        endpoint.default = reply(LONG[:2_000_000], chunk=2_000_000, whole_arguments=True)
        for _ in range(2):
            await client.turn("more")
        async with wire(server, "*", max_queue=1) as slow:
            await slow.send(type="command", command="subscribe", agent_name="sam", after=0)
            for number in range(50):
                await client.ok("set_block", label="human", value=f"meanwhile {number}")
            last = (await client.ok("get_agent"))["last_seq"]
            frames = await slow.until(lambda frame: frame.get("seq") == last)
            assert [frame["seq"] for frame in frames if stored(frame)] == list(range(1, last + 1))
            assert (await slow.ok("list_agents"))["total"] == 1


async def test_a_reader_that_never_reads_is_closed(
    online: Callable[..., Server], endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscriber that reads nothing is closed with 1013; others and the turns go on; it finds all when it is back."""
    monkeypatch.setattr(memws, "SLOW_READER_PATIENCE", 0.05)
    server = online(context_window=100_000_000)
    endpoint.default = reply(LONG[:2_000_000], chunk=2_000_000, whole_arguments=True)
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        async with wire(server, "*", max_queue=1) as slow:
            await slow.ok("subscribe", agent_name="sam")
            async with asyncio.timeout(2 * LIMIT):
                while not any(session.closed for session in server.interface.clients.values()):
                    assert (await client.turn("more"))[-1]["stop_reason"] == "done"
            assert await slow.closed() == 1013
            seen = [frame["seq"] for frame in slow.frames if stored(frame)]
        assert (await client.turn("on"))[-1]["stop_reason"] == "done"
        last = client.frames[-1]["seq"]
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) < last
        async with wire(server, "*") as back:
            await back.ok("subscribe", agent_name="sam", after=len(seen))
            frames = await back.until(lambda frame: frame.get("seq") == last)
            assert [frame["seq"] for frame in frames] == list(range(len(seen) + 1, last + 1))


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_stop_ends_turns_cleanly(online: Callable[..., Server], endpoint: Endpoint) -> None:
    """stop() ends the running turn as interrupted, refuses what waits, closes with 1001, and the agent loads whole."""
    server = online()
    async with wire(server) as client:
        await client.ok("create_agent", config={"name": "sam"})
        await hold(client, endpoint, id="runs")
        await client.say("waits", id="waits")
        await client.nothing_more()
        await asyncio.to_thread(server.stop)
        assert await client.closed() == 1001
        assert ends_of(client.frames) == {"runs": "interrupted", "waits": "cancelled"}
        last = max(frame.get("seq", 0) for frame in client.frames)
    async with wire(online()) as client:
        loaded = await client.ok("load_agent", name="sam")
        assert (loaded["repaired"], loaded["last_seq"]) == ([], last)
        assert (await client.turn("hi"))[-1]["stop_reason"] == "done"


# ---- all at once -----------------------------------------------------------------------------------------------------


class Visitor:
    """A client that does whatever comes to its mind, and waits until all of it is answered."""

    def __init__(self, server: Server, seed: str, agents: list[str], turns: dict[tuple[str, str], str]) -> None:
        self.server = server
        self.pick = random.Random(seed)
        self.agents = agents
        self.turns = turns
        """The text of each (agent, turn_id) that any visitor has sent."""

    async def visit(self, actions: int) -> None:
        """Come several times, for a few requests each; leave without a word now and then."""
        while actions > 0:
            stay = self.pick.randint(1, 12)
            actions -= stay
            async with wire(self.server, *self.pick.choice([(), ("*",), ("queue", "delta")])) as client:
                waits: dict[Any, bool] = {}
                mine: set[tuple[str, str]] = set()
                for _ in range(stay):
                    await self.act(client, waits, mine)
                if self.pick.random() < 0.2:
                    client.websocket.transport.abort()
                    continue
                while waits:
                    frame = await client.receive()
                    if frame["type"] != "agent_response_start" and waits.get(frame.get("id")) == is_terminal(frame):
                        del waits[frame["id"]]

    async def act(self, client: Wire, waits: dict[Any, bool], mine: set[tuple[str, str]]) -> None:
        """Send one request; `waits` gets its id and whether a terminal frame answers it."""
        agent = self.pick.choice(self.agents)
        kind = self.pick.choice(["say"] * 6 + ["again"] * 3 + ["cancel"] * 3 + ["command"] * 4 + ["bad"])
        if kind == "say":
            turn_id, text = f"{self.pick.getrandbits(64):x}", f"{self.pick.random()}"
            self.turns[agent, turn_id] = text
            mine.add((agent, turn_id))
            busy = self.pick.choice(["queue", "queue", "queue", "reject", "interrupt"])
            waits[await client.say(text, agent_name=agent, turn_id=turn_id, when_busy=busy)] = True
        elif kind == "again" and (known := sorted(self.turns.keys() - mine)):
            agent, turn_id = self.pick.choice(known)
            mine.add((agent, turn_id))
            waits[await client.say(self.turns[agent, turn_id], agent_name=agent, turn_id=turn_id)] = True
        elif kind == "cancel":
            ids = sorted(turn_id for name, turn_id in self.turns if name == agent)
            waits[await client.request("cancel", agent_name=agent, turn_id=self.pick.choice([None, *ids]))] = False
        elif kind == "bad":
            await client.send_raw({"type": "command", "command": "sudo", "id": (request_id := client.new_id("bad"))})
            waits[request_id] = False
        else:
            command, more = self.pick.choice(
                [
                    ("subscribe", {"after": self.pick.choice([None, 0, 5])}),
                    ("unsubscribe", {}),
                    ("set_block", {"label": "human", "value": f"{self.pick.random()}"}),
                    ("insert_passage", {"text": "walrus"}),
                    ("wake", {}),
                    ("compact", {}),
                    ("get_agent", {}),
                    ("get_messages", {}),
                    ("update_agent", {"config": {"max_steps": 5}}),
                ]
            )
            waits[await client.request(command, agent_name=agent, **more)] = False


async def observe(client: Wire) -> list[JSON]:
    """All stored events of an agent as they happen, up to the passage that says so."""
    return [frame for frame in await client.until(lambda frame: frame.get("after") == "the end") if stored(frame)]


def begun_turns(events: list[JSON]) -> set[str]:
    """The turns of an agent's events, which never overlap, and begin and end once each; the last may run on."""
    running, begun = None, set()
    for event in events:
        turn_id = event.get("turn_id")
        if event["type"] == "agent_response_start":
            assert running is None
            assert turn_id not in begun
            running = turn_id
            begun.add(turn_id)
        else:
            assert turn_id in (None, running)
            running = None if is_terminal(event) else running
    return begun


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_many_clients_at_random(online: Callable[..., Server], endpoint: Endpoint, seed: int) -> None:
    """Whatever many clients do at once, every request is answered, turns never overlap, and seq has no gap."""

    def model(body: JSON) -> Reply:
        number = len(body["messages"]) % 3
        edit = ("core_memory_append", {"name": "persona", "content": "x", "request_heartbeat": True})
        return Reply("Well. ", calls=[edit] if number == 0 else [("send_message", {"message": "Hi"})], chunk=2 + number)

    endpoint.default = model
    server = online(rate_limit=0)
    agents, turns = ["ada", "sam"], dict[tuple[str, str], str]()
    async with wire(server) as client, wire(server, "*") as ada, wire(server, "*") as sam:
        for observer, agent in zip((ada, sam), agents, strict=True):
            await observer.ok("create_agent", config={"name": agent})
            await observer.ok("subscribe")
        watching = asyncio.gather(observe(ada), observe(sam))
        visitors = [Visitor(server, f"{seed} {number}", agents, turns) for number in range(4)]
        await asyncio.gather(*(visitor.visit(40) for visitor in visitors))
        while any(agent["state"] != "idle" for agent in (await client.ok("list_agents"))["agents"]):
            pass
        for agent in agents:
            await client.ok("insert_passage", agent_name=agent, text="the end")
        seen = dict(zip(agents, await watching, strict=True))
    server.stop()
    server = online()
    async with wire(server, "*") as client:
        for agent, events in seen.items():
            assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
            begun = begun_turns(events)
            assert len(begun) > 10
            assert (await client.ok("load_agent", name=agent))["repaired"] == []
            await client.ok("subscribe", after=0)
            assert await client.until(lambda frame: frame.get("after") == "the end") == events
            said = [text for (name, turn_id), text in turns.items() if name == agent and turn_id in begun]
            assert sorted(said_to(server, agent)) == sorted(said)


def said_to(server: Server, agent: str) -> list[str]:
    """What users said to an agent, as it is on disk."""
    connection = sqlite3.connect(server.options.db)
    query = "SELECT text FROM messages WHERE role = 'user' AND agent = (SELECT id FROM agents WHERE name = ?)"
    rows = connection.execute(query, (agent,)).fetchall()
    connection.close()
    return [text for (text,) in rows]
