"""Agents without a server, for tests: a store, the models of an endpoint, and turns whose every event is looked at.

    async with Lab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        turn = await lab.say(agent, "Hello")
        assert turn.texts("assistant_message") == ["Hello!"]

Each turn is checked as a client would: its start comes first, exactly one terminal event last, stored events count on
without gaps, and what the agent holds in memory is what its database holds.
"""

import asyncio
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from endpoint import Body, Endpoint

import memws

LIMIT = 20
"""Seconds after which a turn that does not end fails its test."""


class Told:
    """The events of one turn."""

    def __init__(self, events: Iterable[memws.Event]) -> None:
        self.events = list(events)

    def of(self, *kinds: str) -> list[Body]:
        """The frames of these message types."""
        return [json.loads(event.frame("")) for event in self.events if event.message_type in kinds]

    def texts(self, *kinds: str) -> list[str]:
        """What the events of these message types say."""
        return [frame["message"] for frame in self.of(*kinds)]

    @property
    def kinds(self) -> list[str]:
        """The message types of the stored events between start and end, in order."""
        return [event.message_type for event in self.events if event.message_type and event.seq is not None]

    @property
    def end(self) -> Body:
        """The terminal frame."""
        return dict(json.loads(self.events[-1].frame("")))

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
    """A database and the models of one endpoint, while the `async with` block lasts."""

    def __init__(
        self,
        endpoint: Endpoint,
        path: Path | str = ":memory:",
        *,
        tools: Iterable[Callable[..., Any]] = (),
        timeout: float = memws.TOOL_TIMEOUT,
        **models: Any,
    ) -> None:
        self.endpoint = endpoint
        self.path = str(path)
        own = [memws.make_tool(tool, timeout=timeout) for tool in tools]
        self.tools = memws.MEMORY_TOOLS | {tool.name: tool for tool in own}
        self._models_options = {"model": "test-model", "base_url": endpoint.url, "api_key": "sk-lab", **models}
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        self.models = memws.Models(**self._models_options)
        self.store = memws.SqliteStore(self.path, "normal", asyncio.get_running_loop())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.models.close()
        await self.store.close()

    async def create(self, name: str = "sam", **config: Any) -> memws.Agent:
        """A new agent; tools of the lab's own are offered to it."""
        own = [tool for tool in self.tools if tool not in memws.MEMORY_TOOLS]
        checked = memws.AgentConfig({"name": name, **({"tools": own} if own else {}), **config}, self.tools)
        await self.store.create_agent(checked.name, checked.values, checked.blocks, None)
        return await self.open(name)

    async def open(self, name: str = "sam") -> memws.Agent:
        """The agent as its database has it."""
        agent, _ = await memws.Agent.open(self.store, await self.store.find_agent(name), self.models, self.tools)
        return agent

    def turn(self, message: str | None, **options: Any) -> memws.Turn:
        return memws.Turn(f"turn-{next(self._numbers)}", message, **options)

    async def say(self, agent: memws.Agent, message: str | None, **options: Any) -> Told:
        """Run a turn to its end."""
        return await self.run(agent, self.turn(message, **options))

    async def run(
        self, agent: memws.Agent, turn: memws.Turn, on_event: Callable[[memws.Event], object] | None = None
    ) -> Told:
        """Run a turn in a task of its own, as the server does, and check what must be true of every turn."""
        before = agent.last_seq
        events: list[memws.Event] = []

        async def drive() -> None:
            async for event in agent.turn(turn):
                events.append(event)
                if on_event is not None:
                    on_event(event)

        await asyncio.wait_for(asyncio.create_task(drive()), LIMIT)
        assert events[0].starts
        assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]
        assert [event.seq for event in events if not event.live] == list(range(before + 1, agent.last_seq + 1))
        assert memws.history_faults(agent.messages) == ([], [])
        await self.check_stored(agent)
        return Told(events)

    async def check_stored(self, agent: memws.Agent) -> None:
        """What the agent holds in memory is what opening it would read."""
        blocks, messages, counts, open_turns = await self.store.load(agent.id, int(agent.record.state.get("cut", 0)))
        assert {block.label: block for block in blocks} == agent.blocks
        assert [message.body for message in messages] == [message.body for message in agent.messages]
        assert counts["recall"] == agent.recall
        assert counts["archival"] == agent.archival
        assert open_turns == []


def sent(body: Body) -> list[Body]:
    """The messages of a request, user messages unpacked from their JSON."""
    return [
        message | {"content": json.loads(message["content"])} if message["role"] in ("user", "tool") else message
        for message in body["messages"]
    ]


def packed(body: Body, kind: str) -> list[Body]:
    """The events of one type that a request packs as user messages."""
    return [
        message["content"] for message in sent(body) if message["role"] == "user" and message["content"]["type"] == kind
    ]


def results(body: Body) -> list[str]:
    """What the tool messages of a request say, each with its status."""
    answers = [message["content"] for message in sent(body) if message["role"] == "tool"]
    return [f"{answer['status']}: {answer['message']}" for answer in answers]
