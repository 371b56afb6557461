"""The whole protocol as a state machine: whatever clients do in whatever order, a model of it knows what must come.

Each step is one request of one client, of which the next thing is known: its answer, its refusal, its code. After each
step an auditor reads what the agents have stored, and every client must have got exactly its share of it.
"""

import asyncio
import dataclasses
import itertools
import os
import shutil
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from endpoint import Body, Endpoint, Reply, greet
from websockets.asyncio.client import connect
from wire import JSON, LIMIT, Wire, is_terminal, messages_of

import memws

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

SEEDS = int(os.environ.get("MEMWS_TEST_SEEDS", "3"))
BOUNDED = settings(
    max_examples=10 * SEEDS, stateful_step_count=40, deadline=None, derandomize=SEEDS <= 3, database=None,
    report_multiple_bugs=False, suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip
NAMES = ("ada", "sam", "Zoë", "日本")
WATCHED: tuple[tuple[str, ...], ...] = ((), ("*",), ("queue", "memory_change"))
"What clients ask for in hello; nothing is the classic types."
HELD, BROKEN, REFUSED, TOOL, EDIT, PLAIN = "held", "broken", "refused", "tool", "edit", "plain"
KINDS = (HELD, PLAIN, HELD, EDIT, HELD, TOOL, PLAIN, BROKEN, REFUSED)
numbers = st.integers(0, 9)
OFTEN = {"say": 12, "resend": 6, "subscribe": 4, "cancel": 4, "go_on": 3, "delete": 3, "restart": 3, "rename": 2,
         "restore": 2, "create": 2, "connect": 2, "unsubscribe": 2}  # fmt: skip
ACTIONS = [action for action, times in OFTEN.items() for _ in range(times)]
ACTIONS += ["disconnect", "load", "set_block", "passage", "work"]
"What clients do, as often as they do it."


def note(number: int) -> int:
    """Note a number."""
    return number


class Mind:
    """The model behind the endpoint: the user's words say what it does."""

    def __init__(self) -> None:
        self.tried: set[str] = set()

    def __call__(self, body: Body) -> Reply:
        said = str(next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), ""))
        kind = next((word for word in set(KINDS) if f"{word} of" in said), PLAIN)
        if body["messages"][-1]["role"] == "tool" or "tools" not in body:
            return greet(body)
        if kind == BROKEN and said not in self.tried:
            self.tried.add(said)
            return Reply("Well, well, well.", cut_after=2)
        edit = ("core_memory_append", {"name": "human", "content": "x"})
        insert = ("archival_memory_insert", {"content": "A walrus."})
        replies = {
            HELD: Reply("Let me think about it for a long while.", stall_after=2),
            REFUSED: Reply(status=401),
            TOOL: Reply("Hm.", calls=[("note", {"number": 1}), ("note", {"number": 2, "request_heartbeat": True})]),
            EDIT: Reply(calls=[edit, insert, ("send_message", {"message": "Yes."})]),
        }
        return replies.get(kind) or greet(body)


@dataclasses.dataclass(eq=False)
class Sent:
    """A message of a client, or a turn that was asked for by wake (text None)."""

    turn_id: str
    text: str | None
    sender: "Person | None"
    request_id: Any = None


@dataclasses.dataclass(eq=False)
class Someone:
    """What is known of an agent."""

    name: str
    floor: int = 0  # its next events are above: the last seq that was given under its name when it took that
    events: list[JSON] = dataclasses.field(default_factory=list)  # what it has stored, as the auditor read it
    sent: dict[str, Sent] = dataclasses.field(default_factory=dict)  # every turn that was taken up and not lost
    running: Sent | None = None
    waiting: list[Sent] = dataclasses.field(default_factory=list)
    order: list[str] = dataclasses.field(default_factory=list)  # its turns as they had to begin
    passages: set[int] = dataclasses.field(default_factory=set)

    @property
    def last_seq(self) -> int:
        return max(self.floor, int(self.events[-1]["seq"]) if self.events else 0)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def lose(self) -> None:
        """Nobody was promised anything about what waits; what runs has had its end."""
        for item in self.waiting:
            del self.sent[item.turn_id]
        self.waiting.clear()
        self.running = None


class Person:
    """One connection and what it has been promised."""

    def __init__(self, wire: Wire, types: tuple[str, ...]) -> None:
        self.wire, self.types = wire, types
        self.current: Someone | None = None
        self.subscribed: set[Someone] = set()
        self.cursor: dict[Someone, int] = {}
        self.read = len(wire.frames)

    def wants(self, event: JSON) -> bool:
        if event["type"] != "agent_response" or self.types == ("*",):
            return True
        return event["message_type"] in (self.types or memws.CLASSIC_TYPES)

    def unread(self) -> list[JSON]:
        """The frames that have come since the last look."""
        frames, self.read = self.wire.frames[self.read :], len(self.wire.frames)
        return frames

    async def refused(self, command: str, code: str, **fields: Any) -> None:
        assert (await self.wire.refused(command, **fields))["code"] == code


def stored(frame: JSON) -> JSON:
    """An event as it is stored: whose name it goes out under and whose request it answers is not part of it."""
    return {key: value for key, value in frame.items() if key not in ("id", "agent_name")}


class World(RuleBasedStateMachine):
    """A server, its clients, and what must be true of them."""

    endpoint: ClassVar[Endpoint]
    folder: ClassVar[Path]
    runner: ClassVar[asyncio.Runner]
    worlds: ClassVar[Iterator[int]] = itertools.count(1)

    # -- the ground --

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, Someone] = {}
        self.aside: dict[str, list[Someone]] = {}  # deleted and not purged, oldest first
        self.floors: dict[str, int] = {}  # the highest seq of a deleted agent by name
        self.present: list[Person] = []
        self.count = itertools.count(1)
        self.steps = 0  # since the server was started
        self.crashed = False
        self.db = self.folder / f"world{next(self.worlds)}.db"
        World.endpoint.default = Mind()
        for record in (World.endpoint.requests, World.endpoint.bodies, World.endpoint.headers):
            record.clear()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        self.steps += 1
        return self.runner.run(asyncio.wait_for(work, LIMIT))

    @initialize(types=st.lists(st.sampled_from(WATCHED), min_size=2, max_size=3))
    def begin(self, types: list[tuple[str, ...]]) -> None:
        """A server, some clients, and an agent of each that has begun to talk."""
        self.start()
        for each, name in zip(types, NAMES, strict=False):
            person = self.do(self.enter(each))
            self.do(self.create(person, name))
            self.do(self.say(person, None, PLAIN, "queue"))
        self.do(self.check())

    def named(self, number: int, name: str) -> str:
        """The name of an agent, of one that is busy first of all; now and then of none."""
        waited_for = [agent.name for agent in self.live.values() if agent.waiting]
        busy = waited_for or [agent.name for agent in self.live.values() if agent.running]
        known = (busy if number % 2 == 0 else None) or sorted(self.live)
        return known[number % len(known)] if known and number < 8 else name

    def start(self) -> None:
        options = {"model": "test-model", "base_url": self.endpoint.url, "api_key": "sk-x", "sync": "normal"}
        self.server = memws.WebSocketServer("127.0.0.1", 0, db=str(self.db), **options)
        self.server.tool(note)
        self.server.start()
        self.auditor = self.do(self.enter(("*",), audit=True))

    async def enter(self, types: tuple[str, ...], audit: bool = False) -> Person:
        options: JSON = {"compression": None, "max_size": memws.MAX_FRAME, "max_queue": None, "proxy": None}
        wire = Wire(await connect(self.server.url, **options))
        if types:
            await wire.ok("hello", message_types=list(types))
        person = Person(wire, types)
        if not audit:
            self.present.append(person)
            person.cursor = {agent: agent.last_seq for agent in self.live.values()}
        return person

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        try:
            self.do(self.finish())
        finally:
            self.do(self.leave_all())
            self.server.stop()
            for path in self.folder.glob(f"{self.db.name.partition('.')[0]}.*"):
                path.unlink()

    async def finish(self) -> None:
        """All that was held goes on; each agent is whole, from its first event to its last."""
        await self.release()
        await self.check()
        for agent in self.live.values():
            assert [stored(frame) for frame in await self.replay(agent, 0)] == agent.events
            said = [event["message"] for event in agent.events if event.get("message_type") == "user_message"]
            assert await messages_of(self.auditor.wire, agent.name) == said
            mended = (await self.auditor.wire.ok("load_agent", name=agent.name))["repaired"]
            assert mended == [] or self.crashed
        assert self.endpoint.refusals == []

    async def leave_all(self) -> None:
        for person in [self.auditor, *self.present]:
            person.wire.websocket.transport.abort()
            await person.wire.websocket.wait_closed()
        self.present.clear()

    # -- what must be true --

    async def replay(self, agent: Someone, after: int) -> list[JSON]:
        """The stored events of an agent above a seq, through a subscription."""
        wire = self.auditor.wire
        last = (await wire.ok("subscribe", agent_name=agent.name, after=after))["last_seq"]
        if last == agent.last_seq:  # it may be a seq of an earlier agent of the name
            last = agent.events[-1]["seq"] if agent.events else 0
        frames = await wire.until(lambda frame: frame.get("seq") == last) if last > after else []
        await wire.ok("unsubscribe", agent_name=agent.name)
        return [frame for frame in frames if "seq" in frame]

    async def named_anew(self, agent: Someone, name: str) -> None:
        """An agent took a name: its seqs go on above all that were given under that by deleted ones."""
        agent.name = name
        self.live[name] = agent
        floor = (await self.auditor.wire.ok("get_agent", agent_name=name))["last_seq"]
        assert floor >= max(agent.last_seq, self.floors.get(name, 0))
        agent.floor = floor
        for person in self.present:
            person.cursor.setdefault(agent, agent.last_seq)

    async def check(self) -> None:
        """Read what agents have stored since the last step; every client has got its share of it, in order."""
        for agent in self.live.values():
            for frame in await self.replay(agent, agent.last_seq):
                assert frame["seq"] == agent.last_seq + 1
                agent.events.append(stored(frame))
            self.check_turns(agent)
        for person in self.present:
            await self.check_person(person)

    async def check_person(self, person: Person) -> None:
        await person.wire.ok("list_agents", limit=1)
        frames = person.unread()
        assert [frame for frame in frames if frame.get("code") == "internal"] == []
        assert {
            frame["id"] for frame in frames if "id" in frame and frame["type"] != "agent_response"
        } <= person.wire.ids
        for agent in self.live.values():
            due = [
                event
                for event in agent.events
                if event["seq"] > person.cursor.get(agent, 0) and person.wants(event)
                and (agent in person.subscribed or self.is_own(person, agent, event.get("turn_id")))
            ]  # fmt: skip
            assert [stored(frame) for frame in frames if "seq" in frame and self.is_of(agent, frame)] == due
            person.cursor[agent] = agent.last_seq

    def is_own(self, person: Person, agent: Someone, turn_id: str | None) -> bool:
        return turn_id in agent.sent and agent.sent[str(turn_id)].sender is person

    def is_of(self, agent: Someone, frame: JSON) -> bool:
        """Names may change hands between two steps: an event belongs to whom has stored it."""
        return any(event["seq"] == frame["seq"] and event == stored(frame) for event in reversed(agent.events))

    def check_turns(self, agent: Someone) -> None:
        """Turns begin in their order and end, once each and one after another, and each says its message once."""
        running, begun = None, []
        for event in agent.events:
            turn_id = event.get("turn_id")
            if event["type"] == "agent_response_start":
                assert running is None
                running = turn_id
                begun.append(event["turn_id"])
            elif turn_id is not None:
                assert turn_id == running
                running = None if is_terminal(event) else running
            if event.get("message_type") == "user_message":
                assert event["message"] == agent.sent[event["turn_id"]].text
        assert running == (agent.running and agent.running.turn_id)
        assert begun == agent.order

    async def settle(self, agent: Someone) -> None:
        """Wait until an agent whose turn is stopped or over has nothing to do; whoever waited has had their turn."""
        if any(str(item.text).startswith(HELD) for item in agent.waiting):
            await self.release()
        else:
            await self.idle(agent, release=False)

    async def release(self) -> None:
        """Let all models that think go on, also those of turns that wait, until every agent is idle."""
        for agent in self.live.values():
            if agent.busy:
                await self.idle(agent, release=True)

    async def idle(self, agent: Someone, release: bool) -> None:
        busy = True
        while busy:
            if release:
                self.endpoint.release()
            busy = (await self.auditor.wire.ok("get_agent", agent_name=agent.name))["turn"] is not None
        agent.order += [item.turn_id for item in agent.waiting]
        agent.running = None
        agent.waiting.clear()

    # -- steps --

    @rule(
        action=st.sampled_from(ACTIONS), who=numbers, agent=numbers, pick=st.integers(0, 60),
        name=st.sampled_from(NAMES), yes=st.booleans(), also=st.booleans(),
    )  # fmt: skip
    def step(self, action: str, who: int, agent: int, pick: int, name: str, yes: bool, also: bool) -> None:
        """One client does one thing; what else is drawn says whose agent it is about, and how."""
        person = self.present[who % len(self.present)]
        if (work := self.choose(action, person, self.named(agent, name), pick, name, yes, also)) is not None:
            self.do(work)
            self.do(self.check())
        if action == "restart" and self.steps > 8:
            self.restart("stop" if yes and also else "crash")

    def choose(
        self, action: str, person: Person, known: str, pick: int, name: str, yes: bool, also: bool
    ) -> Coroutine[Any, Any, Any] | None:
        """What an action means here and now; None: it means nothing."""
        agent = self.live.get(known)
        match action:
            case "connect" if len(self.present) < 4:
                return self.enter(WATCHED[pick % len(WATCHED)])
            case "disconnect" if len(self.present) > 1:
                return self.leave(person, abort=yes)
            case "create":
                return self.create(person, name)
            case "load":
                return self.load(person, known)
            case "delete":
                return self.delete(person, known, force=yes, purge=pick % 4 == 0, leave=also and len(self.present) > 1)
            case "restore" if self.aside:
                return self.restore(person, name, None if yes else NAMES[pick % len(NAMES)])
            case "rename":
                return self.rename(person, known, name)
            case "say":
                busy = "interrupt" if yes and (also or (agent and agent.waiting)) else "reject" if yes else "queue"
                return self.say(person, None if pick % 5 == 0 else known, KINDS[pick % 9], busy)
            case "resend" if agent:
                sent = [turn for turn in agent.sent.values() if turn.text and turn not in agent.waiting]
                return self.resend(agent, sent[-1 - pick % min(len(sent), 4)], same=yes or also) if sent else None
            case "go_on":
                return self.release()
            case "cancel":
                which = ("waiting" if yes else "running", "waiting", "over", "unknown", None)[pick % 5]
                return self.cancel(person, known, which)
            case "subscribe":
                return self.subscribe(person, known, pick if yes else None, beyond=pick % 7 == 0)
            case "unsubscribe" if person.subscribed:
                return self.unsubscribe(person, min(person.subscribed, key=lambda agent: agent.name))
            case "set_block" if agent:
                return self.set_block(person, agent, old=yes)
            case "passage" if agent:
                return self.passage(person, agent, remove=yes)
            case "work" if agent:
                return self.work(person, agent, "wake" if yes else "compact")
        return None

    # -- coming and going, agents --

    async def leave(self, person: Person, *, abort: bool) -> None:
        """A client leaves, properly or not; its turns go on without it."""
        await self.check_person(person)
        self.forget(person)
        if abort:
            person.wire.websocket.transport.abort()
        await person.wire.websocket.close()

    def everyone(self) -> Iterator[Someone]:
        return itertools.chain(self.live.values(), *self.aside.values())

    def forget(self, person: Person) -> None:
        self.present.remove(person)
        for sent in itertools.chain(*(agent.sent.values() for agent in self.everyone())):
            sent.sender = None if sent.sender is person else sent.sender

    async def create(self, person: Person, name: str) -> None:
        config = {"name": name, "tools": ["note"], "max_steps": 6}
        if name in self.live:
            return await person.refused("create_agent", "name_taken", config=config)
        assert (await person.wire.ok("create_agent", config=config))["agent_name"] == name
        person.current = Someone(name)
        return await self.named_anew(person.current, name)

    async def load(self, person: Person, name: str) -> None:
        if name not in self.live:
            await person.refused("load_agent", "unknown_agent", name=name)
        else:
            loaded = await person.wire.ok("load_agent", name=name)
            person.current = self.live[name]
            assert loaded["last_seq"] >= self.live[name].last_seq

    async def delete(self, person: Person, name: str, force: bool, purge: bool, leave: bool) -> None:
        agent, aside = self.live.get(name), self.aside.get(name, [])
        fields = {"agent_name": name, "force": force, "purge": purge}
        if agent is None and purge and aside:
            await person.wire.ok("delete_agent", **fields)
            aside.pop()
        elif agent is None:
            await person.refused("delete_agent", "unknown_agent", **fields)
        elif agent.busy and not force:
            await person.refused("delete_agent", "busy", **fields)
        elif leave and agent.running:
            turn_id = agent.running.turn_id
            await self.auditor.wire.ok("subscribe", agent_name=name)
            await person.wire.request("delete_agent", **fields)
            await self.auditor.wire.until(lambda frame: is_terminal(frame) and frame["turn_id"] == turn_id)
            self.forget(person)
            person.wire.websocket.transport.abort()
            await self.auditor.wire.until(lambda frame: frame.get("change") == "deleted")
            await person.wire.websocket.wait_closed()
            await self.gone(agent, purge)
        else:
            await person.wire.ok("delete_agent", **fields)
            await self.gone(agent, purge)

    async def gone(self, agent: Someone, purge: bool) -> None:
        """An agent was deleted: its turns have ended, its subscribers are told, nobody follows it any more."""
        del self.live[agent.name]
        top = agent.last_seq + 1
        for person in self.present:
            told = agent in person.subscribed and person.types == ("*",)
            await person.wire.ok("list_agents", limit=1)
            frames = person.unread()
            while told and not any(frame.get("change") == "deleted" for frame in frames):
                await person.wire.receive()
                frames += person.unread()
            top = max([top, *(f["seq"] for f in frames if f.get("agent_name") == agent.name and "seq" in f)])
            assert len([frame for frame in frames if frame.get("message_type") == "agent_change"]) == told
            for item in (agent.running, *agent.waiting):
                if item is not None and item.sender is person:
                    (end,) = [f for f in frames if is_terminal(f) and f["turn_id"] == item.turn_id]
                    assert ("seq" in end) == (item is agent.running)
                    assert end.get("code", end["stop_reason"]) == ("unknown_agent", "cancelled")[item is agent.running]
            person.subscribed.discard(agent)
            person.current = None if person.current is agent else person.current
        agent.lose()
        self.floors[agent.name] = max(self.floors.get(agent.name, 0), top)
        if not purge:
            self.aside.setdefault(agent.name, []).append(agent)

    async def restore(self, person: Person, name: str, new_name: str | None) -> None:
        to = new_name or name
        arguments = {"agent_name": name} | ({"new_name": new_name} if new_name else {})
        if not self.aside.get(name):
            return await person.refused("restore_agent", "unknown_agent", **arguments)
        if to in self.live:
            return await person.refused("restore_agent", "name_taken", **arguments)
        assert (await person.wire.ok("restore_agent", **arguments))["agent_name"] == to
        agent = self.aside[name].pop()
        await self.read_change(agent, to, "deleted")
        return await self.named_anew(agent, to)

    async def read_change(self, agent: Someone, name: str, change: str) -> None:
        """What an agent stored before it took another name, up to the event that tells of that."""
        wire = self.auditor.wire
        await wire.ok("subscribe", agent_name=name, after=agent.last_seq)
        frames = await wire.until(lambda frame: frame.get("change") == change and frame["seq"] > agent.last_seq)
        await wire.ok("unsubscribe", agent_name=name)
        for frame in frames:
            if "seq" in frame:
                assert frame["seq"] == agent.last_seq + 1
                agent.events.append(stored(frame))

    async def rename(self, person: Person, name: str, new_name: str) -> None:
        agent = self.live.get(name)
        arguments = {"agent_name": name, "new_name": new_name}
        if agent is None or agent.busy or new_name in self.live:
            code = "unknown_agent" if agent is None else "busy" if agent.busy else "name_taken"
            return await person.refused("rename_agent", code, **arguments)
        await self.check()
        await person.wire.ok("rename_agent", **arguments)
        await self.read_change(agent, new_name, "renamed")
        del self.live[name]
        await self.named_anew(agent, new_name)
        return await person.refused("get_agent", "unknown_agent", agent_name=name)

    # -- talk --

    async def say(self, person: Person, name: str | None, kind: str, busy: str) -> None:
        number = next(self.count)
        sent = Sent(f"turn-{number}", f"{kind} of {number}", person)
        agent = person.current if name is None else self.live.get(name)
        fields = {"turn_id": sent.turn_id, "when_busy": busy} | ({"agent_name": name} if name else {})
        asked = len(self.endpoint.requests)
        sent.request_id = await person.wire.say(str(sent.text), **fields)
        waits = sum(item.sender is person for other in self.live.values() for item in other.waiting)
        if agent is None:
            await self.refusal(person, sent, "unknown_agent" if name else "no_agent")
        elif agent.running and busy == "reject":
            await self.refusal(person, sent, "busy")
        elif agent.running and waits == memws.MAX_WAITING_SESSION:
            await self.refusal(person, sent, "queue_full")
        elif agent.running and busy == "queue":
            agent.sent[sent.turn_id] = sent
            agent.waiting.append(sent)
            await person.wire.ok("list_agents", limit=1)
        else:
            agent.running, agent.sent[sent.turn_id] = None, sent
            agent.order.append(sent.turn_id)
            if kind == HELD:
                agent.running = sent
                starts = "agent_response_start"
                await person.wire.until(lambda frame: frame["type"] == starts and frame.get("id") == sent.request_id)
                await asyncio.to_thread(self.endpoint.wait_requests, asked + 1)
            else:
                frames = await person.wire.until(lambda f: is_terminal(f) and f.get("id") == sent.request_id)
                reason, code = frames[-1]["stop_reason"], frames[-1].get("code")
                assert (reason, code) == (("error", "model_auth") if kind == REFUSED else ("done", None))
                await self.settle(agent)

    async def refusal(self, person: Person, sent: Sent, code: str) -> None:
        frame = (await person.wire.until(lambda frame: frame.get("id") == sent.request_id))[-1]
        assert (frame["type"], frame["code"], frame["turn_id"]) == ("agent_response_error", code, sent.turn_id)
        assert "seq" not in frame

    async def resend(self, agent: Someone, sent: Sent, same: bool) -> None:
        wire = (await self.enter(("*",), audit=True)).wire
        fields = {"agent_name": agent.name, "turn_id": sent.turn_id}
        request_id = await wire.say(str(sent.text) if same else "another text", **fields)
        told = [event for event in agent.events if event.get("turn_id") == sent.turn_id]
        if not same:
            (frame,) = await wire.until(is_terminal)
            assert (frame["code"], frame["id"]) == ("turn_id_reused", request_id)
        else:
            frames = await wire.until(lambda frame: frame.get("seq") == told[-1]["seq"])
            ends = 2 if is_terminal(told[-1]) else 1
            assert [stored(frame) for frame in frames if "seq" in frame] == told
            assert [frame["id"] for frame in frames if frame["type"] != "agent_response"] == [request_id] * ends
        wire.websocket.transport.abort()
        await wire.websocket.wait_closed()

    async def cancel(self, person: Person, name: str, which: str | None) -> None:
        agent = self.live.get(name)
        if agent is None:
            return await person.refused("cancel", "unknown_agent", agent_name=name)
        over = [event["turn_id"] for event in agent.events if is_terminal(event)]
        if which == "waiting" and agent.waiting:
            item = agent.waiting.pop()
            del agent.sent[item.turn_id]
            assert await person.wire.ok("cancel", agent_name=name, turn_id=item.turn_id) == {"state": "removed"}
            if item.sender is not None:
                await item.sender.wire.ok("list_agents", limit=1)
                frames = item.sender.wire.frames
                (refusal,) = [f for f in frames if f.get("turn_id") == item.turn_id and is_terminal(f)]
                assert (refusal["code"], refusal["id"]) == ("cancelled", item.request_id)
        elif which == "over" and over:
            assert await person.wire.ok("cancel", agent_name=name, turn_id=over[0]) == {"state": "over"}
        elif which == "unknown":
            await person.refused("cancel", "unknown_turn", agent_name=name, turn_id="never seen")
        elif agent.running is not None:
            chosen = {} if which is None else {"turn_id": agent.running.turn_id}
            assert await person.wire.ok("cancel", agent_name=name, **chosen) == {"state": "cancelling"}
            await self.settle(agent)
        elif which is None:
            assert await person.wire.ok("cancel", agent_name=name) == {"state": "over"}
        return None

    # -- following, memory --

    async def subscribe(self, person: Person, name: str, after: int | None, beyond: bool) -> None:
        agent = self.live.get(name)
        if agent is None:
            return await person.refused("subscribe", "unknown_agent", agent_name=name)
        if beyond:
            return await person.refused("subscribe", "unknown_seq", agent_name=name, after=10**9)
        await self.check()
        seq = None if after is None else min(after, agent.last_seq)
        answer = await person.wire.ok("subscribe", agent_name=name, **({} if seq is None else {"after": seq}))
        assert answer["last_seq"] >= agent.last_seq
        person.subscribed.add(agent)
        person.cursor[agent] = agent.last_seq if seq is None else seq
        due = [event for event in agent.events if event["seq"] > person.cursor[agent] and person.wants(event)]
        if due:
            await person.wire.until(lambda frame: frame.get("seq") == due[-1]["seq"])
        return None

    async def unsubscribe(self, person: Person, agent: Someone) -> None:
        await person.wire.ok("unsubscribe", agent_name=agent.name)
        person.subscribed.discard(agent)

    async def set_block(self, person: Person, agent: Someone, old: bool) -> None:
        version = (await person.wire.ok("get_agent", agent_name=agent.name))["blocks"][1]["version"]
        fields = {"agent_name": agent.name, "label": "human", "value": f"Number {next(self.count)}"}
        if old:
            return await person.refused("set_block", "conflict", **fields, version=version + 1)
        answer = await person.wire.ok("set_block", **fields, version=version)
        assert answer == {"label": "human", "version": version + 1}
        return None

    async def passage(self, person: Person, agent: Someone, remove: bool) -> None:
        if not remove:
            added = (await person.wire.ok("insert_passage", agent_name=agent.name, text="An otter."))["id"]
            assert added not in agent.passages
            agent.passages.add(added)
            return
        known = {"agent_name": agent.name, "passage_id": max(agent.passages, default=10**6)}
        answer = await person.wire.command("delete_passage", **known)
        assert answer["error"]["code"] == "not_found" if answer["ok"] is False else agent.passages
        await person.refused("delete_passage", "not_found", **known)

    async def work(self, person: Person, agent: Someone, command: str) -> None:
        if agent.running:
            await person.refused(command, "busy", agent_name=agent.name)
        elif command == "wake":
            turn_id = (await person.wire.ok("wake", agent_name=agent.name))["turn_id"]
            agent.sent[turn_id] = Sent(turn_id, None, person)
            agent.order.append(turn_id)
            await person.wire.until(lambda frame: is_terminal(frame) and frame["turn_id"] == turn_id)
            await self.settle(agent)
        else:
            answer = await person.wire.command("compact", agent_name=agent.name)
            assert answer["ok"] or answer["error"]["code"] == "not_found", answer

    # -- the server --

    def restart(self, how: str) -> None:
        """The server stops and starts, or is replaced by one on the file as a crash would leave it in this moment."""
        self.steps = 0
        types = [person.types for person in self.present]
        self.do(self.end(how))
        self.start()
        self.do(self.check())
        for each in types:
            self.do(self.enter(each))

    async def end(self, how: str) -> None:
        await self.check()
        stopping, stopped = list(self.present), self.server
        if how == "crash":
            self.crashed = True
            await self.leave_all()
            left, self.db = self.db, self.db.with_name(f"{self.db.name.partition('.')[0]}.{next(self.count)}.db")
            shutil.copy(left, self.db)
            shutil.copy(f"{left}-wal", f"{self.db}-wal")
        await asyncio.to_thread(stopped.stop)
        if how == "stop":
            for person in stopping:
                await self.told_of_the_stop(person)
            await self.leave_all()
        for person in stopping:
            for sent in itertools.chain(*(agent.sent.values() for agent in self.everyone())):
                sent.sender = None if sent.sender is person else sent.sender
        for agent in self.everyone():
            agent.lose()

    async def told_of_the_stop(self, person: Person) -> None:
        """Its running turn has its end, what waited is refused, and the connection is closed with 1001."""
        with suppress(AssertionError):
            await person.wire.closed()
        assert person.wire.websocket.close_code == 1001
        frames = person.unread()
        for agent in self.live.values():
            for item, code in [(agent.running, None), *((item, "cancelled") for item in agent.waiting)]:
                if item is not None and item.sender is person:
                    (end,) = [frame for frame in frames if is_terminal(frame) and frame["turn_id"] == item.turn_id]
                    assert (end.get("code"), "seq" in end) == (code, code is None)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[type[World]]:
    """The class of worlds, on an endpoint and a loop that all examples share."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(memws, "RETRY_PAUSE", 0.0)
        World.endpoint = stack.enter_context(Endpoint())
        World.runner = stack.enter_context(asyncio.Runner())
        World.folder = tmp_path
        yield World


def test_whatever_clients_do(world: type[World]) -> None:
    """Every request is answered as the protocol says, nothing is lost, doubled or out of order, across restarts too."""
    run_state_machine_as_test(world, settings=BOUNDED)
