"""Agents without a server, for tests: a store, the models of an endpoint, and turns whose every event is looked at.

    async with Lab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        turn = await lab.say(agent, "Hello")
        assert turn.texts("assistant_message") == ["Hello!"]

Each turn is checked: its start comes first, one terminal event last, seqs have no gap, memory is what is on disk.
"""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from endpoint import Answer, Body, Endpoint

import memws

LIMIT = 20  # seconds after which a turn that does not end fails its test
OnEvent, Tools = Callable[[Body], object], Iterable[Callable[..., Any]]


class Told:
    """The events of one turn, as frames without the agent's name."""

    def __init__(self, events: Iterable[Body]) -> None:
        self.events = list(events)

    def of(self, *kinds: str) -> list[Body]:
        return [event for event in self.events if event.get("message_type") in kinds]

    def texts(self, *kinds: str) -> list[str]:
        return [frame["message"] for frame in self.of(*kinds)]

    @property
    def kinds(self) -> list[str]:
        """The message types of the stored events between start and end, in order."""
        return [event["message_type"] for event in self.events if "message_type" in event and "seq" in event]

    @property
    def end(self) -> Body:
        return self.events[-1]

    @property
    def stop_reason(self) -> str:
        return str(self.end["stop_reason"])

    @property
    def replies(self) -> list[str]:
        return self.texts("assistant_message")

    @property
    def corrections(self) -> list[str]:
        """What had to be mended."""
        return [frame["what"] for frame in self.of("correction")]


class Lab:
    """A database and the models of one endpoint, or the offline model, while the `async with` block lasts."""

    def __init__(
        self, endpoint: Endpoint | None, path: Path | str = ":memory:", tools: Tools = (), **rules: Any
    ) -> None:
        self.endpoint, self.path = endpoint, str(path)
        own = [memws.make_tool(tool, **rules) for tool in tools]
        self.tools = memws.MEMORY_TOOLS | {tool.name: tool for tool in own}
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        self.models = memws.Models(*("test-model", self.endpoint.url, "sk-lab") if self.endpoint else ("offline",))
        self.store = memws.Store(memws.database_at(self.path, "normal"))
        self.models.recalled = self.store.settings
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.models.close()
        await self.store.close()

    async def create(self, name: str = "sam", **config: Any) -> memws.Agent:
        """A new agent; tools of the lab's own are offered to it."""
        own = [tool for tool in self.tools if tool not in memws.MEMORY_TOOLS]
        config = {**({"tools": own} if own else {}), **config}
        blocks = [asdict(block) for block in memws.apply(memws.core_memory, config)]
        record = memws.AgentRecord(name, memws.read_config(config, self.tools)[0], blocks)
        await self.store.write(memws.create_agent, record)
        return await self.open(name)

    async def open(self, name: str = "sam") -> memws.Agent:
        record = await self.store.read(memws.find_agent, name)
        return await memws.Agent(memws.Memory(self.store, record), self.models, self.tools).open()

    def turn(self, message: str | None, **options: Any) -> memws.Turn:
        return memws.Turn(f"turn-{next(self._numbers)}", message, **options)

    async def say(self, agent: memws.Agent, message: str | None, *answers: Answer, **options: Any) -> Told:
        """Run a turn, to which the model answers so, to its end."""
        if self.endpoint:
            self.endpoint.script(*answers)
        return await self.run(agent, self.turn(message, **options))

    async def run(self, agent: memws.Agent, turn: memws.Turn, on_event: OnEvent = lambda _: None) -> Told:
        """Run a turn in a task of its own, as the server does, and check what must be true of every turn."""
        before = agent.record.last_seq
        events: list[Body] = []

        def emit(*stored: Any) -> None:
            for event in stored:
                events.append(json.loads(event.text))
                on_event(events[-1])

        agent.memory.emit = emit
        await asyncio.wait_for(asyncio.create_task(agent.turn(turn)), LIMIT)
        assert events[0]["type"] == "agent_response_start"
        ends = [event["type"] in memws.TERMINAL_TYPES for event in events]
        assert ends == [False] * (len(events) - 1) + [True]
        stored = [event["seq"] for event in events if "seq" in event]
        assert stored == list(range(before + 1, agent.record.last_seq + 1))
        assert memws.history_faults(agent.memory.messages) == ([], {})
        await self.check_stored(agent)
        return Told(events)

    async def check_stored(self, agent: memws.Agent) -> None:
        """What the agent holds in memory is what opening it would read."""
        record, memory = await self.store.read(memws.find_agent, agent.name), agent.memory
        messages, counts = await self.store.read(memws.load_messages, record.id, record.state.get("cut", 0))
        assert (record.state, record.config) == (agent.record.state, agent.record.config)
        assert record.blocks == [asdict(block) for block in memory.blocks.values()]
        assert [message.body for message in messages] == [message.body for message in memory.messages]
        assert counts[:2] == (memory.last_message, memory.archival)
        assert record.state.get("turn") is None

    async def events(self, agent: memws.Agent, turn_id: str | None = None) -> list[Body]:
        found: list[Body] = []
        reading = memws.read_events, agent.record.id
        while page := await self.store.read(*reading, found[-1]["seq"] if found else 0, 1_000, turn_id):
            found += [json.loads(event.text) for event in page]
        return found


def request_of(head: str, messages: Iterable[str], tools: str = "") -> str:
    return memws.RequestRecord("", 1, head, "", "", tools, "", 1, 0).body(messages)


async def sent_for(agent: memws.Agent, turn_id: str, step: int) -> Body:
    """What get_request says of a step."""
    return await agent.memory.store.read(memws.find_request, agent.record.id, turn_id, step)


def sent(body: Body) -> list[Body]:
    """The messages of a request, what tools say unpacked from its JSON, and what users say too, an event each."""
    return [
        message | {"content": json.loads(line) if message["role"] in ("user", "tool") else line}
        for message in body["messages"]
        for line in (message["content"].split("\n") if message["role"] == "user" else [message["content"]])
    ]


def packed(body: Body, kind: str) -> list[Body]:
    """The events of one type that a request packs as user messages."""
    said = [message["content"] for message in sent(body) if message["role"] == "user"]
    return [event for event in said if event["type"] == kind]


def results(body: Body) -> list[str]:
    """What the tool messages of a request say, each with its status."""
    answers = [message["content"] for message in sent(body) if message["role"] == "tool"]
    return [f"{answer['status']}: {answer['message']}" for answer in answers]
