"""Section 11, Server: every command, event and refusal of the wire, over real sockets."""

import asyncio
import json
import threading
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import openai  # noqa: F401 (half a second, once, and not in the turn of some test)
import pytest
from agents import packed, results
from endpoint import Endpoint, Reply, say
from test_wire import needed
from wire import JSON, LIMIT, Wire, bare, beside, is_terminal, message_pages, messages_of, of_kind, seqs, shape, wire

import memws

pytestmark = pytest.mark.anyio
on_both = pytest.mark.usefixtures("database")  # what the database has a part in, on SQLite and on PostgreSQL

Server = memws.WebSocketServer
Serve = Callable[..., Server]


@pytest.fixture
def server(request: pytest.FixtureRequest, serve: Serve) -> Server:
    """A server whose model is the scripted endpoint where the test asks for one, else the offline model."""
    started: Server = request.getfixturevalue("online")() if "endpoint" in request.fixturenames else serve()
    return started


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Wire]:
    """A connection that gets messages of all types and has made the agent sam."""
    async with wire(server, "*", agent={"name": "sam"}) as opened:
        yield opened


HELD = say("held", hold=True)


async def asked(endpoint: Endpoint, count: int) -> None:
    """Wait until the model has been asked `count` times in all."""
    await asyncio.to_thread(endpoint.wait_requests, count)


async def hold(client: Wire, endpoint: Endpoint, message: str = "runs", **fields: Any) -> JSON:
    """Begin a turn whose model waits for endpoint.release(); its start."""
    endpoint.script(HELD)
    count = len(endpoint.requests)
    await client.say(message, **fields)
    start = await client.started()
    await asked(endpoint, count + 1)
    return start


@on_both
async def test_create_agent(server: Server) -> None:
    """create_agent makes up what the config leaves out, get_agent tells it all, and the agent is the current one."""
    config = {
        "name": "sam", "persona": "sam_pov", "human": "Likes tea.", "model": "offline", "context_window": 9_000,
        "blocks": [{"label": "plan", "value": "rest", "limit": 100}], "tools": ["send_message"], "system": "Be brief.",
        "max_steps": 3, "heartbeat_interval": 60, "timezone": "Asia/Tokyo",
        "settings": {"temperature": 0, "top_p": 1, "max_tokens": 9, "seed": -1, "reasoning_effort": "low"},
    }  # fmt: skip
    async with wire(server) as client:
        response = await client.command("create_agent", config={})
        name = response["result"]["agent_name"]
        assert response["status"] == "OK: Agent initialized"
        assert response["result"] == {"agent_name": name, "warnings": []}
        assert (await client.ok("get_agent"))["agent_name"] == name
        assert (await client.ok("create_agent", config=config))["agent_name"] == "sam"
        agent = await client.ok("get_agent", agent_name="sam")
    blocks = {"persona": (memws.PERSONAS["sam_pov"], 2000), "human": ("Likes tea.", 2000), "plan": ("rest", 100)}
    told = [(block["label"], block["value"], block["limit"], block["version"]) for block in agent["blocks"]]
    assert told == [(label, *values, 1) for label, values in blocks.items()]
    chosen = config.keys() - {"name", "persona", "human", "blocks"}
    assert {key: agent["settings"][key] for key in chosen} == {key: config[key] for key in chosen}
    names = ("messages", "passages", "in_context", "input_tokens", "output_tokens")
    assert agent["counts"] == dict.fromkeys(names, 0)
    assert (agent["agent_name"], agent["last_seq"], agent["turn"]) == ("sam", 0, None)


async def test_create_agent_warns_of_what_it_ignores(serve: Serve, endpoint: Endpoint) -> None:
    """Unknown keys, an endpoint's address and key among them, are ignored with a warning that lists the known ones."""
    config = {"preset": "memgpt_chat", "nmae": "x", "base_url": endpoint.url, "api_key": "key", "model": "gpt-4"}
    async with wire(serve()) as client:
        warnings = (await client.ok("create_agent", config=config))["warnings"]
        for key in ("preset", "nmae", "base_url", "api_key"):
            (warning,) = [text for text in warnings if key in text]
            assert "heartbeat_interval" in warning
        assert ("offline" in warnings[-1], len(warnings)) == (True, 5)  # the model needs an endpoint
        assert (await client.ok("get_agent"))["settings"]["model"] == "gpt-4"
        assert (await client.turn("hi"))[-1]["stop_reason"] == "done"
    assert endpoint.requests == []


@on_both
async def test_names_are_words(server: Server) -> None:
    """A name begins with a letter or digit of any script, is kept and found in NFC, and is taken once."""
    async with wire(server) as client:
        for name in ("a", "Zoe\u0301", "agent_1", "1.2-3", "名前", "x" * 64):
            created = await client.ok("create_agent", config={"name": name})
            assert created["agent_name"] == unicodedata.normalize("NFC", name)
            await client.ok("get_agent", agent_name=name)
        assert (await client.refused("create_agent", config={"name": "Zo\u00e9"}))["code"] == "name_taken"
        assert (await client.ok("list_agents"))["total"] == 6


async def test_an_agent_keeps_its_timezone(serve: Serve) -> None:
    """An agent is made with the server's timezone and keeps it under a server with another, until it gets null."""
    found = []
    for zone in ("Asia/Tokyo", "Europe/Berlin"):
        server = serve(timezone=zone)
        async with wire(server) as client:
            await client.ok("create_agent", config={"name": zone.partition("/")[2]})
            found.append((await client.ok("get_agent", agent_name="Tokyo"))["settings"]["timezone"])
            if zone == "Europe/Berlin":
                updated = await client.ok("update_agent", agent_name="Tokyo", config={"timezone": None})
                found.append(updated["settings"]["timezone"])
        server.stop()
    assert found == ["Asia/Tokyo", "Asia/Tokyo", "Europe/Berlin"]


@on_both
async def test_what_is_learned_outlives_a_restart(online: Serve, endpoint: Endpoint) -> None:
    """Options that are refused and the window are known after a restart; update_agent has them tried anew."""
    endpoint.refuse, settings = {"stream_options", "top_p", "seed"}, {"top_p": 0.5, "seed": 1, "temperature": 0.5}
    tried: list[set[str]] = []
    for start in range(3):
        server = online()
        async with wire(server, "*") as client:
            if start == 0:
                await client.ok("create_agent", config={"name": "sam", "settings": settings})
                endpoint.script(Reply(status=400, body={"error": "prompt is too long: 9999 > 7000 maximum"}))
                await client.turn("Hi")
            else:
                assert "7,000 tokens" in str((await client.ok("load_agent", name="sam"))["warnings"])
            if start == 2:
                endpoint.refuse = set()
                await client.ok("update_agent", config={"max_steps": 7})
            frames = await client.turn("Hi")
            tried.append(settings.keys() & endpoint.requests[-1].keys())
            window = of_kind(frames, "context")[-1]["window"]
            assert (of_kind(frames, "retry"), window) == ([], 8_192 if start == 2 else 7_000)
        server.stop()
    assert tried == [{"temperature"}, {"temperature"}, settings.keys()]


BAD_CONFIGS: list[JSON] = [{"name": name} for name in ("", "_x", ".x", "a b", "../x", "a\n", "x" * 65, 7)]
BAD_CONFIGS += [
    {"model": 5}, {"model": ""}, {"model": "m" * 201}, {"context_window": 700}, {"context_window": "9000"},
    {"context_window": True}, {"tools": ["nope"]}, {"tools": "send_message"}, {"system": "x" * 20_001},
    {"tools": []}, {"blocks": []}, {"max_steps": 0}, {"heartbeat_interval": 59}, {"heartbeat_interval": False},
    {"timezone": "Mars"}, {"timezone": "../UTC"}, {"settings": []}, {"settings": {"temperature": 2.1}},
    {"settings": {"temperature": True}}, {"settings": {"seed": 0.5}}, {"settings": {"reasoning_effort": 5}},
    {"persona": 5}, {"blocks": {}}, {"blocks": [{"label": "1"}]}, {"blocks": [{"value": "x"}]},
    {"blocks": [{"label": "a"}, {"label": "a"}]}, {"blocks": [{"label": "a", "value": 5}]},
    {"blocks": [{"label": "a", "limit": 0}]}, {"blocks": [{"label": f"b{number}"} for number in range(21)]},
    {"blocks": [{"label": f"b{number}", "limit": 20_000} for number in range(5)]},
]  # fmt: skip
OVER_LIMIT: list[JSON] = [{"persona": "x" * 2_001}, {"human": "x" * 2_001}]
OVER_LIMIT += [{"blocks": [{"label": "a", "value": "xx", "limit": 1}]}]


async def test_bad_configs_change_nothing(server: Server) -> None:
    """A config that cannot be is answered with a code, names what is wrong, and makes no agent."""
    async with wire(server) as client:
        for code, configs in (("bad_config", BAD_CONFIGS), ("block_limit", OVER_LIMIT)):
            for config in configs:
                error = await client.refused("create_agent", config=config)
                assert (error["code"], next(iter(config)).removesuffix("s") in error["message"]) == (code, True), config
        assert (await client.ok("list_agents"))["total"] == 0


OF_NO_AGENT = {"user_message", "hello", "list_agents", "create_agent", "load_agent", "restore_agent"}
OF_AN_AGENT = sorted(memws.known_commands().keys() - OF_NO_AGENT)


async def test_an_unknown_agent_is_told_with_the_nearest(server: Server) -> None:
    """The refusal of an unknown name lists the ten nearest and the count, and the current agent stays."""
    async with wire(server) as client:
        assert "there are none yet" in (await client.refused("load_agent", name="sam"))["message"]
        for number in range(12):
            await client.ok("create_agent", config={"name": f"agent-{number:02}"})
        error = await client.refused("load_agent", name="agent-05x")
        assert (error["code"], "12 known: 'agent-05'" in error["message"]) == ("unknown_agent", True)
        assert error["message"].count("'agent-") == 11
        assert (await client.ok("get_agent"))["agent_name"] == "agent-11"


@pytest.mark.parametrize("named", [{}, {"agent_name": None}, {"agent_name": "nobody"}])
async def test_without_an_agent_nothing_is_current(client: Wire, server: Server, named: JSON) -> None:
    """A connection that has created and loaded nothing has no agent, whatever others have; nor has an unknown name."""
    code = "unknown_agent" if named.get("agent_name") else "no_agent"
    async with wire(server) as other:
        for command in OF_AN_AGENT:
            assert (await other.refused(command, **needed(command), **named))["code"] == code
        (refusal,) = await other.turn("hi", turn_id="t", **named)
        assert (refusal["type"], refusal["code"], refusal["turn_id"]) == ("agent_response_error", code, "t")


@on_both
async def test_naming_an_agent_does_not_switch(client: Wire) -> None:
    """Loading an agent, by either field, switches to it, naming one does not; agent_id must agree with agent_name."""
    await client.ok("create_agent", config={"name": "ada"})
    await client.ok("load_agent", agent_name="sam")
    assert (await client.ok("get_agent"))["agent_name"] == "sam"
    await client.ok("load_agent", name="ada")
    assert (await client.misread({"type": "command", "command": "load_agent"}))["code"] == "missing_field"
    expected = {"agent_name": "sam", "model": "offline", "last_seq": 0, "repaired": [], "warnings": []}
    assert await client.ok("load_agent", name="sam") == expected
    for fields, name in (
        ({"agent_name": "ada"}, "ada"), ({"agent_id": "ada"}, "ada"), ({"agent_name": None}, "sam"), ({}, "sam"),
        ({"agent_id": "ada", "agent_name": None}, "ada"), ({"agent_id": None}, "sam"),
    ):  # fmt: skip
        await client.send_raw({"type": "user_message", "message": "hi", **fields})
        assert {frame["agent_name"] for frame in await client.until(is_terminal)} == {name}
        await client.send_raw({"type": "command", "command": "get_agent", **fields})
        assert (await client.receive())["result"]["agent_name"] == name
    for head in ({"type": "user_message", "message": "hi"}, {"type": "command", "command": "get_agent"}):
        assert (await client.misread(head | {"agent_id": "ada", "agent_name": "sam"}))["code"] == "bad_field"


async def test_hello_and_the_message_types(server: Server) -> None:
    """hello tells what the server is; each list of message types replaces the one before; unknown ones are told."""
    async with wire(server, agent={}) as client:
        told = await client.ok("hello")
        assert (told["version"], told["protocol"], told["model"]) == (memws.__version__, 1, "offline")
        assert (told["offline"], told["unknown"], "offline" in told["models"]) == (True, [], True)
        assert set(told["commands"]) == memws.known_commands().keys() - {"user_message"}
        assert told["message_types"] == list(memws.EVENTS)
        limits = {"max_frame": 1024 * 1024, "max_waiting_session": 8, "max_waiting_agent": 32}
        assert told["limits"].items() >= limits.items()
        calls, said, classic = {"tool_call", "tool_return"}, {"user_message"}, {*memws.CLASSIC_TYPES}
        for asks, unknown, least, most in (
            ({}, [], {"assistant_message"}, classic),
            ({"message_types": [*calls]}, [], calls, calls),
            ({"message_types": [*said, "smell"]}, ["smell"], said, said),
            ({}, [], said, said),
            ({"message_types": []}, [], set[str](), set[str]()),
            ({"message_types": ["*", "smell"]}, ["smell"], {*classic, *calls, *said, "context"}, {*memws.EVENTS}),
        ):
            assert (await client.ok("hello", **asks))["unknown"] == unknown
            kinds = {frame["message_type"] for frame in await client.turn("My name is Ada") if "message_type" in frame}
            assert least <= kinds <= most


async def test_hello_counts_what_each_model_needed(client: Wire, endpoint: Endpoint) -> None:
    """hello tells for each model how many calls were made and how many answers needed which correction."""
    assert (await client.ok("hello"))["corrections"] == {}
    mended = [("core_memory_append", f'{{"name": "human", "content": "{text}",}}') for text in "ab"]
    endpoint.script(Reply(calls=mended), Reply("Hello!"), Reply(), Reply("Hello again!"), say("Bye"))
    for text in ("One", "Two", "Three"):
        await client.turn(text)
    counts = {"calls": 5, "arguments": 1, "plain_text": 2, "bad_output": 1}
    assert (await client.ok("hello"))["corrections"] == {"test-model": counts}


async def test_list_agents_and_get_agent_tell_what_runs(server: Server, endpoint: Endpoint) -> None:
    """list_agents pages by name with what each agent is doing; get_agent names the turn that runs and its step."""
    async with wire(server) as client:
        for name in ("cat", "ant", "bee"):
            await client.ok("create_agent", config={"name": name})
        await hold(client, endpoint, agent_name="bee", turn_id="t")
        listed = (await client.ok("list_agents"))["agents"]
        states = [(agent["agent_name"], agent["state"], agent["last_seq"]) for agent in listed]
        assert states == [("ant", "idle", 0), ("bee", "running", 2), ("cat", "idle", 0)]
        assert {agent["model"] for agent in listed} == {"test-model"}
        page = await client.ok("list_agents", after="ant", limit=1)
        assert ([agent["agent_name"] for agent in page["agents"]], page["total"]) == (["bee"], 3)
        assert (await client.ok("list_agents", after="cat"))["agents"] == []
        assert (await client.ok("get_agent", agent_name="bee"))["turn"] == {"turn_id": "t", "step": 1, "approvals": []}
        endpoint.release()
        end = await client.ended()
        agent = await client.ok("get_agent", agent_name="bee")
        assert (agent["turn"], agent["last_seq"]) == (None, end["seq"])
        assert agent["counts"]["messages"] == agent["counts"]["in_context"] > 0


@on_both
async def test_get_agent_counts_the_tokens_of_all_turns(serve: Serve, server: Server, endpoint: Endpoint) -> None:
    """Counted are steps once they are stored, failed and cancelled turns, compactions; a restart keeps the sums."""

    async def totals(client: Wire) -> list[int]:
        counts = (await client.ok("get_agent", agent_name="sam"))["counts"]
        return [counts["input_tokens"], counts["output_tokens"]]

    usage = {"usage": {"prompt_tokens": 5_000, "completion_tokens": 7}}
    note = Reply(calls=[("core_memory_append", {"name": "human", "content": "x", "request_heartbeat": True})], **usage)
    expected = [0, 0]
    async with wire(server, "*", agent={"name": "sam"}) as client:
        for answers in ([note, say("Yes.", **usage)], [Reply(status=401)], [note, HELD]):
            endpoint.script(*answers)
            before, count = await totals(client), len(endpoint.requests)
            await client.say("tell me a story " * 100, id=0)
            if HELD in answers:
                await asked(endpoint, count + 2)
                assert await totals(client) == [before[0] + 5_000, before[1] + 7]
                with beside(server.options.db) as connection:  # where a crash leaves it
                    state = json.loads(connection.execute("SELECT state FROM agents").fetchone()[0])
                assert [state["input_tokens"], state["output_tokens"]] == await totals(client)
                await client.request("cancel")
            end = await client.ended()
            expected = [before[0] + end["usage"]["input_tokens"], before[1] + end["usage"]["output_tokens"]]
            assert (await totals(client), expected[0] > before[0]) == (expected, True)
        endpoint.script(Reply("A summary.", **usage))
        await client.ok("compact")
        expected = [expected[0] + 5_000, expected[1] + 7]
        assert await totals(client) == expected
    server.stop()
    async with wire(serve()) as client:
        assert await totals(client) == expected


@on_both
async def test_update_agent(server: Server, endpoint: Endpoint) -> None:
    """update_agent changes the next model call, merges settings, tells subscribers, and refuses what create refuses."""
    async with wire(server, "*", agent={"max_steps": 5, "settings": {"seed": 1, "top_p": 1}}) as client:
        await client.ok("subscribe")
        config = {"settings": {"temperature": 0.5, "seed": None}, "system": "Be brief.", "smell": 1}
        updated, change = await client.edit("update_agent", config=config)
        assert (change["message_type"], change["change"], change["seq"]) == ("agent_change", "updated", 1)
        assert updated["settings"]["max_steps"] == 5
        assert updated["settings"]["settings"] == {"temperature": 0.5, "top_p": 1}
        assert "smell" in updated["warnings"][0]
        await client.turn("hi")
        request = endpoint.requests[-1]
        assert (request["temperature"], request["top_p"], "seed" in request) == (0.5, 1, False)
        assert request["messages"][0]["content"].startswith("Be brief.")
        wrong_ones: list[JSON] = [{"context_window": 99}, {"tools": ["x"]}, {"tools": []}, {"blocks": []}]
        for wrong in [*wrong_ones, {"max_steps": 0}, {"settings": {"top_p": 2}}]:
            assert (await client.refused("update_agent", config=wrong))["code"] == "bad_config"
        assert (await client.ok("get_agent"))["settings"] == updated["settings"]


@on_both
async def test_blocks_are_reshaped(server: Server, endpoint: Endpoint) -> None:
    """update_agent adds blocks, changes limits and takes blocks away, all or nothing, told and in the next prompt."""
    made = [{"label": "plan", "value": "rest"}, {"label": "human", "value": None}]
    async with wire(server, "*", agent={"human": "Likes tea", "blocks": made}) as client:
        await client.ok("subscribe")
        items: list[JSON] = [
            {"label": "human", "value": None, "limit": 9}, {"label": "plan", "delete": True},
            {"label": "pets", "value": "Rex", "limit": 99}, {"label": "mood", "limit": None, "delete": False},
        ]  # fmt: skip
        await client.ok("update_agent", config={"blocks": items, "max_steps": 7})
        told = client.before_answer or await client.until(lambda frame: frame.get("change") == "updated")
        edits = [(event["label"], event["before"], event["after"]) for event in of_kind(told, "memory_change")]
        assert edits == [("plan", "rest", None), ("pets", None, "Rex")]
        assert [event["message_type"] for event in told] == ["memory_change", "memory_change", "agent_change"]
        agent = await client.ok("get_agent")
        shapes = [tuple(block.values()) for block in agent["blocks"][1:]]
        assert shapes == [("human", "Likes tea", 9, 1), ("pets", "Rex", 99, 1), ("mood", "", 2000, 1)]
        assert agent["settings"]["max_steps"] == 7
        for code, *wrong in (
            ("bad_config", {"label": "new"}, {"label": "new"}),
            ("bad_config", {"label": "human", "value": "Likes cake"}),
            ("bad_config", {"label": "plan", "delete": True}), ("bad_config", {"label": "pets", "delete": "yes"}),
            ("bad_config", {"limit": 9}), ("bad_config", {"label": "pets", "size": 9}), ("bad_config", 5),
            ("block_limit", {"label": "pets", "delete": True}, {"label": "human", "limit": 8}),
            ("bad_config", *({"label": f"b{number}"} for number in range(19))),
            ("bad_config", *({"label": f"b{number}", "limit": 20_000} for number in range(5))),
        ):  # fmt: skip
            assert (await client.refused("update_agent", config={"blocks": wrong}))["code"] == code, wrong
        wide = {"context_window": 3_000, "blocks": [{"label": "b", "limit": 9_000}]}
        assert "context_window" in (await client.refused("update_agent", config=wide))["message"]
        assert (await client.ok("get_agent"))["blocks"] == agent["blocks"]
        assert (await client.edit("set_block", label="human", value="Likes tea", limit=50))[1]["change"] == "updated"
        result, change = await client.edit("set_block", label="human", value="Likes green tea", limit=60, version=1)
        assert (result["version"], change["after"]) == (2, "Likes green tea")
        for limit, code in ((5, "block_limit"), (20_000, "bad_config")):
            await client.command("update_agent", config={"context_window": 4_000})
            assert (await client.refused("set_block", label="human", value="Likes tea", limit=limit))["code"] == code
        await client.turn("hi")
        prompt = endpoint.requests[-1]["messages"][0]["content"]
        assert '<human characters="15/60">\nLikes green tea\n</human>\n<pets characters="3/99">' in prompt
        assert "plan" not in prompt
        gone = [{"label": block["label"], "delete": True} for block in agent["blocks"]]
        await client.ok("update_agent", config={"blocks": gone})
        assert "characters=" not in str(await client.ok("get_context"))


@on_both
async def test_list_agents_tells_what_can_be_restored(server: Server) -> None:
    """Of each name the agent deleted last is listed, page by page, as live ones are; no purged and no living one."""
    async with wire(server) as client:
        for name in ("cat", "ant", "bee", "ant", "gone", "dog", "ant"):
            await client.ok("create_agent", config={"name": name})
            await client.turn("hi")
            last_seq = (await client.ok("get_agent"))["last_seq"]
            if name != "dog":
                await client.ok("delete_agent", purge=name == "gone")
        await client.ok("create_agent", config={"name": "cat"})
        names = [""]
        while page := (await client.ok("list_agents", deleted=True, limit=1, after=names[-1]))["agents"]:
            names += [agent["agent_name"] for agent in page]
        assert names == ["", "ant", "bee", "cat"]
        listed = await client.ok("list_agents", deleted=True)
        assert (listed["total"], {agent["state"] for agent in listed["agents"]}) == (3, {"deleted"})
        living = (await client.ok("list_agents"))["agents"]
        assert [agent["agent_name"] for agent in living] == ["cat", "dog"]
        assert listed["agents"][0].keys() == living[0].keys()
        assert listed["agents"][0]["last_seq"] == last_seq + 1
        for name in names[1:]:
            await client.ok("restore_agent", agent_name=name, new_name=f"{name}-back")
        left = (await client.ok("list_agents", deleted=True))["agents"]
        assert [agent["agent_name"] for agent in left] == ["ant"]  # two more were deleted under this name


@on_both
async def test_get_messages_pages_backwards(client: Wire) -> None:
    """get_messages gives the newest messages, oldest first, and with `before` those before a message."""
    starts = [(await client.turn(f"note {number}", turn_id=f"t{number}"))[0]["seq"] for number in range(3)]
    whole = await client.ok("get_messages", limit=200)
    messages = whole["messages"]
    assert (len(messages), whole["more"]) == (whole["total"], False)
    assert [message["id"] for message in messages] == list(range(1, whole["total"] + 1))
    assert [message for page in await message_pages(client, limit=2) for message in page] == messages
    assert (await client.ok("get_messages", before=1))["messages"] == []
    keys = ("text", "turn_id", "step", "seq")  # a message has the seq of the last event that was stored with it
    said = [tuple(message[key] for key in keys) for message in messages if message["role"] == "user"]
    assert said == [(f"note {number}", f"t{number}", 1, starts[number] + 1) for number in range(3)]
    assert all(message["in_context"] for message in messages)
    assert "send_message" in {call["name"] for message in messages for call in message["tool_calls"]}


async def test_a_message_says_who_speaks(server: Server, endpoint: Endpoint) -> None:
    """`from` is on the event, also of a message that waited, and in what model and clients read of the past."""
    async with wire(server, "*", agent={"name": "sam"}) as client:
        await hold(client, endpoint, "The night train is late", **{"from": "Ada"})
        for when_busy, name in (("queue", "Zoë 日本"), ("queue", None), ("interrupt", "Bob")):
            await client.say(f"The night train of {when_busy}", when_busy=when_busy, **{"from": name})
        while len([frame for frame in client.frames if is_terminal(frame)]) < 4:
            await client.receive()
        events = of_kind(client.frames, "user_message")
        assert [event.get("from", "-") for event in events] == ["Ada", "Bob", "Zoë 日本", "-"]
        seen = packed(endpoint.requests[-1], "user_message")
        assert [message.get("from", "-") for message in seen] == ["Ada", "Bob", "Zoë 日本", "-"]
        assert [*seen[-1]] == ["type", "message", "time"]
        messages = (await client.ok("get_messages"))["messages"]
        said = [(message["role"], message["from"]) for message in messages if message["text"].startswith("The night")]
        assert said == [("user", name) for name in ("Ada", "Bob", "Zoë 日本", None)]
        for name in ("Ada", "Bob"):
            found = (await client.ok("search_memory", query=f"What did {name} say about the night train?"))["items"]
            assert (found[0]["from"], found[0]["role"]) == (name, "user")
        call = ("conversation_search", {"query": "night train", "request_heartbeat": True})
        endpoint.script(Reply(calls=[call]))
        await client.turn("Who knows?")
        assert '"role":"user Ada"' in results(endpoint.requests[-1])[-1]
        await client.say("Mine", turn_id="t", **{"from": "Ada"})
        await client.ended()
        for name, code in (("Bob", "turn_id_reused"), (None, "turn_id_reused"), ("Ada", None)):
            assert (await client.turn("Mine", turn_id="t", **{"from": name}))[-1].get("code") == code


@on_both
@pytest.mark.parametrize("words", ["walrus", "", "alrus ", "walrus of 7 November, 2026"])
async def test_search_memory(client: Wire, server: Server, words: str) -> None:
    """A search for words, a part of one, a day or nothing is narrowed by store, days and page, best first; what another
    agent has, or was deleted, changes neither hits nor scores."""
    for number in range(6):
        await client.ok("insert_passage", text=f"The walrus number {number} swims")
    await client.turn("Yesterday I saw a walrus")

    async def search(**fields: Any) -> JSON:
        return await client.ok("search_memory", **({"query": words, "limit": 50} | fields))

    await client.ok("delete_passage", passage_id=6)
    everything = await search()
    found = everything["items"]
    assert (everything["total"], everything["page"], everything["pages"]) == (len(found), 1, 1)
    scores = [item["score"] for item in found]
    assert scores == sorted(scores, reverse=True)
    async with wire(server, agent={}) as other:
        for number in range(9):
            await other.ok("insert_passage", text=f"The walrus number {number} of another")
    assert await search() == everything
    archival, recall = [(await search(store=store))["items"] for store in ("archival", "recall")]
    texts = {f"The walrus number {number} swims" for number in range(5)}
    assert {(item["store"], item["role"], item["text"]) for item in archival} == {
        ("archival", None, text) for text in texts
    }
    assert ("user", "Yesterday I saw a walrus") in [(item["role"], item["text"]) for item in recall]
    assert sorted(item["id"] for item in archival + recall) == sorted(item["id"] for item in found)
    pages = [await search(limit=2, page=page) for page in range(1, len(found) + 1)]
    assert [item for page in pages for item in page["items"]] == found
    assert {page["pages"] for page in pages} == {-(-len(found) // 2)}
    day, moment = archival[0]["time"][:10], archival[0]["time"]
    spans: list[JSON] = [{"from": day, "to": day}, {"from": moment, "to": moment}, {"to": "1999-12-31"}]
    totals = [(await search(store="archival", **when))["total"] for when in spans]
    assert [min(2, total) for total in totals] in ([2, 1, 0], [2, 2, 0])
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):  # the day of one of them is not UTC's
        await client.ok("update_agent", config={"timezone": zone})
        local = datetime.fromisoformat(moment).astimezone(ZoneInfo(zone)).date()
        days = [str(local + timedelta(days=days)) for days in (-1, 0, 1)]
        assert [bool((await search(**{"from": day, "to": day}))["total"]) for day in days] == [False, True, False]
        assert [bool((await search(query=day))["total"]) for day in days] == [True, True, False]  # and the day after
    for wrong in ({"from": "today"}, {"to": "2026-02-30"}):
        answer = await client.misread({"type": "command", "command": "search_memory", "query": "x", **wrong})
        assert (answer["code"], next(iter(wrong)) in answer["message"]) == ("bad_field", True)
    assert (await search(query="zebra"))["items"] == []


@on_both
async def test_edits_of_memory(server: Server) -> None:
    """Blocks are set by a version, or refused with the value stored; passages come and go; subscribers are told."""
    async with wire(server, "*", agent={"blocks": [{"label": "plan", "limit": 5}]}) as client:
        await client.ok("subscribe")
        result, change = await client.edit("set_block", label="plan", value="rest", version=1)
        assert result == {"label": "plan", "version": 2}
        told = {"what": "core", "label": "plan", "before": "", "after": "rest", "by": "client", "seq": 1}
        assert {key: change[key] for key in told} == told
        error = await client.refused("set_block", label="plan", value="run", version=1)
        assert (error["code"], error["value"], error["version"]) == ("conflict", "rest", 2)
        assert (await client.refused("set_block", label="plan", value="longer"))["code"] == "block_limit"
        assert (await client.refused("set_block", label="plans", value=""))["code"] == "not_found"
        result, _ = await client.edit("set_block", label="plan", value="run")
        assert result == {"label": "plan", "version": 3}
        assert (await client.ok("get_agent"))["blocks"][2]["value"] == "run"

        result, change = await client.edit("insert_passage", text="walrus")
        assert (result, change["what"], change["before"], change["after"]) == ({"id": 1}, "archival", None, "walrus")
        result, change = await client.edit("delete_passage", passage_id=1)
        assert (result, change["id"], change["before"], change["after"]) == ({"id": 1}, 1, "walrus", None)
        assert (await client.edit("insert_passage", text="seal"))[0] == {"id": 2}  # an id is never used again
        assert (await client.refused("delete_passage", passage_id=1))["code"] == "not_found"
        assert (await client.refused("insert_passage", text="x" * 65_537))["code"] == "text_too_long"
        empty = await client.misread({"type": "command", "command": "insert_passage", "text": " "})
        assert (empty["code"], "text: expected" in empty["message"]) == ("bad_field", True)


@on_both
async def test_get_context_and_get_request_page_their_messages(server: Server, endpoint: Endpoint) -> None:
    """get_context shows the next request, get_request what was really sent and received, page by page of messages."""
    search = ("conversation_search", {"query": "tea", "request_heartbeat": True})
    endpoint.script(say("Noted."), Reply("I look it up", calls=[search]), say("Nothing."))
    async with wire(server, agent={"human": "Likes tea."}) as client:
        await client.turn("My cat is called Tom")
        await client.turn("Do I like tea?", turn_id="t")
        context = await client.ok("get_context")
        sections = {section["name"]: section for section in context["sections"]}
        assert list(sections) == ["system", "tools", "core_memory", "summary", "messages"]
        assert (context["window"], context["more"], context["estimated"]) == (8_192, False, True)
        assert abs(context["used"] - sum(section["tokens"] for section in context["sections"])) <= 5
        assert 0 < context["used"] < context["window"]
        whole, core = sections["messages"], sections["core_memory"]["text"]
        assert ("My cat is called Tom" in whole["text"], "Likes tea." in core) == (True, True)
        sent = endpoint.requests[-1]["messages"][0]["content"]
        assert (sent.startswith(sections["system"]["text"]), sent.endswith(core)) == (True, True)
        oldest = (await client.ok("get_messages", limit=200))["messages"][1]["id"]
        for more, fields in ((True, {"limit": 1}), (False, {"before": oldest})):
            context = await client.ok("get_context", **fields)
            page = context["sections"][-1]
            assert (context["more"], page["tokens"], page["text"] in whole["text"]) == (more, whole["tokens"], True)
            assert len(page["text"]) < len(whole["text"]) / 2

        for step in (2, 1):
            told = await client.ok("get_request", turn_id="t", step=step)
            assert told["request"] == endpoint.requests[step]
            assert told["usage"]["input_tokens"] > 0
            assert 0 <= told["first_token_ms"] <= told["total_ms"]
        assert told["response"]["content"] == "I look it up"
        assert [call["name"] for call in told["response"]["tool_calls"]] == ["conversation_search"]
        page = await client.ok("get_request", turn_id="t", step=2, limit=2)
        messages = endpoint.requests[2]["messages"]
        assert (page["request"]["messages"][-2:], page["more"]) == (messages[-2:], True)
        assert len(page["request"]["messages"]) < len(messages)
        for turn_id, step in (("t", 3), ("x", 1)):
            assert (await client.refused("get_request", turn_id=turn_id, step=step))["code"] == "not_found"


@on_both
async def test_compact(client: Wire, endpoint: Endpoint) -> None:
    """compact makes the prompt smaller beside the session, excludes turns, and is ended by a cancel."""
    assert (await client.refused("compact"))["code"] == "not_found"  # there is nothing to compact yet
    await client.ok("subscribe")
    for number in range(6):
        await client.turn(f"{number} " + "long story " * 100)
    endpoint.script(Reply("x", hold=True), Reply("A summary.", hold=True))
    count = len(endpoint.requests)
    for end in ("cancelled", "ok"):
        request_id = await client.request("compact")
        await asked(endpoint, count := count + 1)
        for command in ("compact", "wake"):
            assert (await client.refused(command))["code"] == "busy"
        assert (await client.ok("list_agents"))["agents"][0]["state"] == "running"
        if end == "cancelled":
            assert await client.ok("cancel") == {"state": "cancelling"}
        else:
            await client.say("waits", id="waits")
            endpoint.release()
        while not (answers := [frame for frame in client.frames if frame.get("id") == request_id]):
            await client.receive()
        (answer,) = answers
        assert answer.get("error", {"code": "ok"})["code"] == end
    assert 0 < answer["result"]["tokens_after"] < answer["result"]["tokens_before"]
    await client.until(lambda frame: is_terminal(frame) and frame["id"] == "waits")
    (event,) = of_kind(client.frames, "compaction")
    assert (event["messages_after"] < event["messages_before"], event["summary"]) == (True, "A summary.")
    await hold(client, endpoint)
    assert (await client.refused("compact"))["code"] == "busy"


async def test_timed_heartbeats(server: Server, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent with an interval wakes by itself, for subscribers only, and rests after IDLE_HEARTBEATS."""
    schemas = memws._function_of(memws.Config).parameters["properties"]
    monkeypatch.setitem(schemas, "heartbeat_interval", {"type": "integer"})
    monkeypatch.setattr(memws, "IDLE_HEARTBEATS", 1)
    endpoint.default = Reply("nothing to do")
    async with wire(server, "*", agent={"name": "sam", "heartbeat_interval": 1}) as owner, wire(server, "*") as watcher:
        await watcher.ok("subscribe", agent_name="sam")
        frames = await watcher.until(is_terminal)
        assert [event["reason"] for event in of_kind(frames, "heartbeat")] == [memws.HEARTBEAT_TIMER]
        assert ("id" in frames[0], frames[-1]["stop_reason"]) == (False, "done")
        assert of_kind(frames, "user_message") + of_kind(frames, "assistant_message") == []
        await owner.nothing_more()
        timer = vars(server.agents)["live"]["sam"]._timer
        assert timer is None or timer.cancelled()  # it rests until a user speaks


ANSWERED: list[tuple[JSON, list[str]]] = [  # a request, and the frames that carry its id
    ({"type": "command", "command": "create_agent", "config": {}}, ["command_response"]),
    ({"type": "command", "command": "sudo"}, ["server_error"]),
    ({"type": "user_message", "message": "hi"}, ["agent_response_start", "agent_response_end"]),
    ({"type": "user_message", "message": "hi", "agent_name": "nobody"}, ["agent_response_error"]),
    ({"type": "command", "command": "load_agent", "name": "nobody"}, ["command_response"]),
]


@pytest.mark.parametrize("request_id", ["", "x" * 128, "\u20ac" * 128, 0, -(2**53), 2**53, None])
async def test_an_id_is_on_answers_starts_terminals_and_refusals(server: Server, request_id: Any) -> None:
    """An id comes back as it was sent on everything that answers its request, and on nothing else; null is none."""
    async with wire(server, "*") as client:
        for request, kinds in ANSWERED:
            await client.send_raw(request | {"id": request_id})
            frames = await client.until(lambda frame, last=kinds[-1]: frame["type"] == last)  # type: ignore[misc]
            marks = [(frame["type"], frame["id"]) for frame in frames if "id" in frame]
            assert marks == [(kind, request_id) for kind in kinds if request_id is not None]
        for text in ("", "{", "[]"):
            assert (await client.misread(text))["id"] is None


async def test_a_flood_is_answered_and_others_are_served_in_between(server: Server) -> None:
    """Commands, refused messages and what is no request, thousands sent at once, are answered in the order sent, and
    another client gets its answers meanwhile."""
    sent: list[JSON] = [{"command": "create_agent", "config": {}, "colour": "red"}, {"command": "sudo"}]
    sent += [{"type": "user_message", "message": "hi", "agent_name": "nobody"}, {"command": "get_context"}]
    sent += [{"command": "insert_passage", "text": "x"}, {"command": "set_block", "label": "human"}]
    sent += [{"command": "cancel"}, {"command": "delete_agent"}, {"type": "user_message", "message": "hi"}]
    sent += [{"command": "hello"}] * 2_000
    async with wire(server) as client, wire(server, agent={}) as other:
        for number, frame in enumerate(sent):
            await client.send_raw({"type": "command", **frame, "id": number})
        assert (await other.turn("hi"))[-1]["stop_reason"] == "done"
        assert [(await client.receive())["id"] for _ in sent] == list(range(len(sent)))
        assert (await client.ok("list_agents"))["total"] == 1


async def test_frames_in_fragments_and_of_the_largest_size(client: Wire) -> None:
    """A frame may come in fragments and have 1 MiB; a byte more closes with 1009."""
    await client.websocket.send(iter(['{"type": "command", ', '"command": "hel', 'lo", "id": 7}']))
    assert (await client.receive())["id"] == 7
    frame = json.dumps({"type": "user_message", "message": ""})
    await client.send_raw(frame[:-2] + "x" * (1024 * 1024 - len(frame)) + '"}')
    assert (await client.receive())["code"] == "text_too_long"
    await client.send_raw(frame[:-2] + "x" * (1024 * 1024 - len(frame) + 1) + '"}')
    assert await client.closed() == 1009


async def test_the_flow_of_memgpt_0_2_7(server: Server, endpoint: Endpoint) -> None:
    """MemGPT 0.2.7's own frames work unchanged: create, then messages with agent_name null, answered in its order."""
    append = ("core_memory_append", {"name": "human", "content": "Ada's", "request_heartbeat": True})
    wrong = ("core_memory_append", {"name": "humans", "content": "x"})
    endpoint.script(Reply("I keep that.", calls=[append, wrong]), say("Hi!", "Ada!"))
    config = {"name": "agent_1", "persona": "sam_pov", "human": "cs_phd", "model": "test-model", "preset": "chat"}
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
            ("function_message", "Error: no core memory block 'humans'; blocks: persona, human"),
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


async def test_deltas_are_live(client: Wire, endpoint: Endpoint) -> None:
    """delta frames spell out what comes, few for chunks that arrive at once; they have no seq, and no replay."""
    said = 'Hi "Ada"! \u20ac\n' + "word " * 1_000
    endpoint.script(Reply("So they ask. ", calls=[("send_message", {"message": said})], chunk=3))
    frames = await client.turn("hi")
    deltas = of_kind(frames, "delta")
    assert len(deltas) < 400  # of 1,700 chunks
    for of, whole in (("internal_monologue", "So they ask. "), ("assistant_message", said)):
        assert "".join(delta["message"] for delta in deltas if delta["of"] == of) == whole
    assert all("seq" not in delta and delta["step"] == 1 for delta in deltas)
    await client.ok("subscribe", after=0)
    assert await client.until(is_terminal) == [bare(frame) for frame in frames if "seq" in frame]


REFUSE = "CREATE TRIGGER broken BEFORE INSERT ON {} BEGIN SELECT RAISE(ABORT, 'refused'); END", "DROP TRIGGER broken"
IN_POSTGRES = "ALTER TABLE {} ADD CONSTRAINT broken CHECK (false) NOT VALID", "ALTER TABLE {} DROP CONSTRAINT broken"


@on_both
@pytest.mark.parametrize("table", ["messages", "events"])
async def test_a_message_that_cannot_be_stored_is_refused(
    client: Wire, server: Server, endpoint: Endpoint, table: str
) -> None:
    """When the database refuses a user's message it is refused as store_failed, and works once the database does."""
    await client.ok("subscribe")
    refuse, take = IN_POSTGRES if server.options.db.startswith(memws.POSTGRES) else REFUSE
    with beside(server.options.db) as connection:
        connection.execute(refuse.format(table))
        (refusal,) = await client.turn("hi", turn_id="t")
        assert (refusal["code"], "seq" in refusal, refusal["turn_id"]) == ("store_failed", False, "t")
        if table == "events":
            assert (await client.refused("insert_passage", text="x"))["code"] == "store_failed"
        connection.execute(take.format(table))
    assert endpoint.requests == []
    last = (await client.ok("get_agent"))["last_seq"]
    frames = await client.turn("hi", turn_id="t")
    assert seqs(frames) == list(range(last + 1, frames[-1]["seq"] + 1))
    assert await messages_of(client, "sam") == ["hi"]


@on_both
async def test_what_cannot_be_read_is_read_later(client: Wire, server: Server) -> None:
    """A turn, and a subscription, that the database cannot serve end alone with an error; once it can, all goes on."""
    with beside(server.options.db) as connection:
        connection.execute("ALTER TABLE messages RENAME TO lost")
        assert (await client.turn("hi", turn_id="t"))[-1]["code"] == "store_failed"
        assert (await client.ok("get_agent"))["counts"]["messages"] == 0
        connection.execute("ALTER TABLE lost RENAME TO messages")
        assert (await client.turn("hi", turn_id="t"))[-1]["stop_reason"] == "done"
        connection.execute("ALTER TABLE events RENAME TO lost")
        await client.ok("subscribe", after=0)
        error = await client.receive()
        assert (error["type"], error["code"]) == ("agent_response_error", "store_failed")
        assert (error["agent_name"], "seq" in error) == ("sam", False)
        await client.ok("hello")
        connection.execute("ALTER TABLE lost RENAME TO events")
    assert (await client.turn("Hello again"))[-1]["stop_reason"] == "done"
    await client.ok("subscribe", after=0)
    assert (await client.receive())["seq"] == 1


@on_both
@pytest.mark.parametrize("subscribed", [False, True])
async def test_a_running_turn_sent_again(server: Server, endpoint: Endpoint, subscribed: bool) -> None:
    """A message sent again while it runs gets its frames so far and then the live ones, once each, to the newest id."""
    edit = ("core_memory_append", {"name": "human", "content": "x", "request_heartbeat": True})
    endpoint.script(Reply(calls=[edit]), HELD)
    types = (*memws.CLASSIC_TYPES, "user_message")
    async with wire(server, *types, agent={"name": "sam"}) as client, wire(server) as other:
        if subscribed:
            await other.ok("subscribe", agent_name="sam")
        await client.say("hi", turn_id="t", id="one")
        await asked(endpoint, 2)
        mine = await client.until(lambda frame: frame.get("message") == "Success: None")
        assert (await other.turn("different", turn_id="t", agent_name="sam"))[-1]["code"] == "turn_id_reused"
        before = len(other.frames)
        await other.say("hi", turn_id="t", id="two", agent_name="sam")
        await client.say("hi", turn_id="t", id="three")
        await other.until(lambda frame: frame.get("message") == "Success: None")
        await client.nothing_more()  # a connection gets no frame of a turn twice
        endpoint.release()
        await other.until(is_terminal)
        mine += await client.until(is_terminal)
        again = other.frames[before:]
        assert (again[0]["type"], again[0]["seq"]) == ("agent_response_start", 1)
        for frames, ids in ((again, ["two", "two"]), (mine, ["one", "three"])):
            assert seqs(frames) == sorted(set(seqs(frames)))
            assert [frames[0].get("id"), frames[-1].get("id")] == ids
        assert (len(endpoint.requests), await messages_of(client, "sam")) == (2, ["hi"])


LEAVING: list[tuple[str, JSON, Any]] = [  # command, arguments, what is seen of it
    ("rename_agent", {"new_name": "new"}, lambda agent: agent["agent_name"] == "new"),
    ("set_block", {"label": "human", "value": "tea"}, lambda agent: agent["blocks"][1]["value"] == "tea"),
    ("insert_passage", {"text": "walrus"}, lambda agent: agent["counts"]["passages"] == 1),
    ("update_agent", {"config": {"max_steps": 3}}, lambda agent: agent["settings"]["max_steps"] == 3),
    ("compact", {}, lambda agent: True),  # a compaction beside the session ends with it, or is stored wholly
    ("delete_agent", {}, None),
]


@contextmanager
def locked(server: Server) -> Iterator[None]:
    """Another program holds a lock while the block lasts: edits wait for it."""
    with beside(server.options.db) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE agents SET name = name")
        yield
        connection.execute("ROLLBACK")


@on_both
async def test_an_edit_that_waits_for_a_deletion_is_told_of_it(client: Wire, server: Server) -> None:
    async with wire(server) as other:
        with locked(server):
            await other.request("delete_agent", agent_name="sam")
            await asyncio.wait_for(await other.websocket.ping(), LIMIT)
            await client.request("insert_passage", text="tea")
            await asyncio.wait_for(await client.websocket.ping(), LIMIT)
        assert (await client.receive())["error"]["code"] == "unknown_agent"


@on_both
@pytest.mark.parametrize(("command", "more", "is_done"), LEAVING)
async def test_a_command_of_a_client_that_leaves_is_done_wholly(
    client: Wire, serve: Serve, server: Server, command: str, more: JSON, is_done: Any
) -> None:
    """When a client leaves while its command is being stored, memory, disk and subscribers agree on the outcome."""
    for number in range(6 if command == "compact" else 0):
        await client.turn(f"{number} " + "long story " * 100)
    last = (await client.ok("subscribe"))["last_seq"]
    async with wire(server) as leaving:
        with locked(server):
            await leaving.send(type="command", command=command, agent_name="sam", **more)
            await asyncio.wait_for(await leaving.websocket.ping(), LIMIT)
            for _ in range(20):
                await client.ok("hello")
            leaving.websocket.transport.abort()
            await leaving.closed()
            await client.ok("hello")
    if command != "compact":
        event = await client.receive()
        assert (event["seq"], event["message_type"] in ("memory_change", "agent_change")) == (last + 1, True)
    names = [agent["agent_name"] for agent in (await client.ok("list_agents"))["agents"]]
    assert names == {"rename_agent": ["new"], "delete_agent": []}.get(command, ["sam"])
    for name in {"sam", "new"} - set(names):
        assert (await client.refused("get_agent", agent_name=name))["code"] == "unknown_agent"
    if names:
        await client.turn("hi")
        told = seqs(client.frames)
        assert told == list(range(told[0], told[0] + len(told)))
        agent = await client.ok("get_agent")
        assert (is_done(agent), agent["last_seq"]) == (True, told[-1])
        await asyncio.to_thread(server.stop)
        async with wire(serve()) as again:
            assert await again.ok("get_agent", agent_name=names[0]) == agent


async def test_a_blocking_tool_stops_nobody(server: Server, endpoint: Endpoint) -> None:
    """While a sync tool blocks, pings are answered, other agents take turns, and its own agent answers commands."""
    entered, leave = threading.Event(), threading.Event()

    @server.tool
    def wait() -> str:
        entered.set()
        assert leave.wait(LIMIT)
        return "it is time"

    endpoint.script(Reply(calls=[("wait", {"request_heartbeat": True})]))
    async with wire(server, "*", ping_interval=0.2, ping_timeout=LIMIT) as client, wire(server) as other:
        await client.ok("create_agent", config={"name": "sam", "tools": ["wait"]})
        await client.say("hi")
        await asyncio.to_thread(entered.wait, LIMIT)
        await asyncio.wait_for(await client.websocket.ping(), LIMIT)
        await other.ok("create_agent", config={"name": "ada"})
        assert (await other.turn("hi"))[-1]["stop_reason"] == "done"
        assert (await client.ok("get_agent"))["turn"]["step"] == 1
        told = of_kind(client.frames, "tool_call", "tool_return")
        assert [(event["message_type"], event["name"]) for event in told] == [("tool_call", "wait")]
        leave.set()
        frames = await client.until(is_terminal)
        assert of_kind(frames, "tool_return")[0]["message"] == "it is time"
        assert frames[-1]["stop_reason"] == "done"


@pytest.mark.parametrize("character", ["\U0001f600", "\x01", '"', "\\", "\ud83d"])
async def test_a_long_reply_is_cut(online: Serve, endpoint: Endpoint, character: str) -> None:
    """Of a reply of over 100,000 characters as much is told, as partial, with a correction; every frame fits."""
    server = online(context_window=10_000_000)
    shown = character.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    edit = ("core_memory_append", {"name": "human", "content": "x"})
    calls = [("send_message", {"message": character * 150_000}), edit]
    endpoint.script(Reply("Well.", calls=calls, chunk=9_000))
    async with wire(server, "*", agent={}) as client:
        await client.ok("subscribe")
        frames = await client.turn("hi" + shown * 65_534, turn_id="t")
        (said,) = of_kind(frames, "assistant_message")
        assert (said["partial"], set(said["message"]), frames[-1]["stop_reason"]) == (True, {shown}, "done")
        assert len(said["message"]) <= memws.MAX_REPLY
        assert len(json.dumps(character * 150_000, ensure_ascii=False)) > len(said["message"]) > 15_000
        deltas = [frame["message"] for frame in of_kind(frames, "delta") if frame["of"] == "assistant_message"]
        assert "".join(deltas) == said["message"]
        assert any("100,000" in correction["message"] for correction in of_kind(frames, "correction"))
        assert {call["name"] for call in of_kind(frames, "tool_call")} <= {"send_message"}  # a cut call is never run
        assert (await client.ok("get_agent"))["blocks"][1]["value"] == ""
        await client.ok("insert_passage", text=shown * 65_536)
        await client.ok("get_messages")
        await client.ok("search_memory", query="")
        assert (await client.turn("And then?"))[-1]["stop_reason"] == "done"
        assert bare(frames[-1]) == bare((await client.turn("hi" + shown * 65_534, turn_id="t"))[-1])


async def test_lists_hold_what_a_frame_can_hold(online: Serve, endpoint: Endpoint) -> None:
    """Lists, contexts and requests of long messages come in pages that fit a frame and lead to the next."""
    server = online(context_window=10_000_000)
    endpoint.default = say("\u20ac" * 20_000, chunk=20_000)
    async with wire(server, agent={}) as client:
        for number in range(20):
            await client.turn(f"{number}" + "\u20ac" * 20_000, turn_id=f"t{number}")
        pages = await message_pages(client, limit=200)
        assert len(pages) > 1
        assert sum(map(len, pages)) == (await client.ok("get_messages"))["total"]
        found = await client.ok("search_memory", query="", limit=50)
        assert (found["more"], 0 < len(found["items"]) < 50) == (True, True)
        context = await client.ok("get_context")
        assert (context["more"], "\u20ac" * 20_000 in context["sections"][-1]["text"]) == (True, True)
        request = await client.ok("get_request", turn_id="t19", step=1)
        sent = endpoint.requests[-1]["messages"]
        kept = request["request"]["messages"]
        assert (request["more"], 1 < len(kept) < len(sent), kept[-1]) == (True, True, sent[-1])


async def test_an_answer_over_a_frame_is_too_large(online: Serve, endpoint: Endpoint) -> None:
    """An answer that no paging makes small enough for a frame is the error too_large, and the connection stays."""
    blocks = [{"label": f"b{size}", "value": "\x01" * size, "limit": size} for size in range(18_996, 19_001)]
    async with wire(online(context_window=10_000_000), agent={"blocks": blocks, "system": "\x01" * 20_000}) as client:
        await client.turn("\x01" * 65_536)
        user = next(m for m in (await client.ok("get_messages"))["messages"] if m["role"] == "user")
        assert (await client.ok("get_context"))["more"] is True
        error = await client.refused("get_context", before=user["id"] + 1, limit=1)
        assert error["code"] == "too_large"
        assert len((await client.ok("get_agent"))["blocks"]) == 7
