"""The whole protocol as a state machine: whatever clients do in whatever order, a model of it knows what must come.

Each step is one request of one client, of which the next thing is known: its answer, its refusal, its code. After each
step an auditor reads what the touched agents have stored, and every client must have got exactly its share of it.
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
from wire import JSON, LIMIT, Wire, is_terminal

import memws

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

SEEDS = int(os.environ.get("MEMWS_TEST_SEEDS", "3"))
BOUNDED = settings(
    max_examples=10 * SEEDS,
    stateful_step_count=40,
    deadline=None,
    derandomize=SEEDS <= 3,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
NAMES = ("ada", "sam", "Zoë", "日本")
WATCHED: tuple[tuple[str, ...], ...] = ((), ("*",), ("queue", "memory_change"))
"What clients ask for in hello; nothing is the classic types."
HELD, BROKEN, REFUSED, TOOL, EDIT, PLAIN = "held", "broken", "refused", "tool", "edit", "plain"


numbers = st.integers(0, 9)
ACTIONS = (
    ["say"] * 12 + ["resend"] * 6 + ["subscribe"] * 4 + ["cancel"] * 4 + ["go_on"] * 3 + ["delete"] * 3 + ["rename"] * 2
    + ["restore"] * 2 + ["create"] * 2 + ["connect", "connect", "disconnect", "load"] + ["unsubscribe"] * 2
    + ["set_block", "passage", "work", "restart", "restart", "restart"]
)  # fmt: skip
"What clients do, as often as they do it."


def note(number: int) -> int:
    """Note a number."""
    return number


class Mind:
    """The model behind the endpoint: the user's words say what it does."""

    def __init__(self) -> None:
        self.tries: dict[str, int] = {}

    def __call__(self, body: Body) -> Reply:
        said = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
        kind = next((word for word in (HELD, BROKEN, REFUSED, TOOL, EDIT) if f"{word} of" in str(said)), PLAIN)
        if body["messages"][-1]["role"] == "tool" or "tools" not in body:
            return greet(body)
        if kind == HELD:
            return Reply("Let me think about it for a long while.", stall_after=2)
        if kind == BROKEN and self.tries.setdefault(said, 0) == 0:
            self.tries[said] += 1
            return Reply("Well, well, well.", cut_after=2)
        if kind == REFUSED:
            return Reply(status=401)
        if kind == TOOL:
            return Reply("Hm.", calls=[("note", {"number": 1}), ("note", {"number": 2, "request_heartbeat": True})])
        if kind == EDIT:
            edit = ("core_memory_append", {"name": "human", "content": "x"})
            return Reply(
                calls=[
                    edit,
                    ("archival_memory_insert", {"content": "A walrus."}),
                    ("send_message", {"message": "Yes."}),
                ]
            )
        return greet(body)


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
    floor: int = 0
    "Its next events are above: the last seq that was given under its name when it took that."
    events: list[JSON] = dataclasses.field(default_factory=list)
    "What it has stored, as the auditor read it."
    sent: dict[str, Sent] = dataclasses.field(default_factory=dict)
    "Every turn that was taken up."
    running: Sent | None = None
    waiting: list[Sent] = dataclasses.field(default_factory=list)
    order: list[str] = dataclasses.field(default_factory=list)
    "Its turns in the order in which they had to begin."
    lost: set[str] = dataclasses.field(default_factory=set)
    "Turns that waited when their sender or their server left: nobody was promised anything."
    passages: set[int] = dataclasses.field(default_factory=set)

    @property
    def last_seq(self) -> int:
        return max(self.floor, int(self.events[-1]["seq"]) if self.events else 0)


class Person:
    """One connection and what it has been promised."""

    def __init__(self, wire: Wire, types: tuple[str, ...]) -> None:
        self.wire, self.types = wire, types
        self.current: Someone | None = None
        self.subscribed: set[Someone] = set()
        self.cursor: dict[Someone, int] = {}
        self.read = 0

    def wants(self, event: JSON) -> bool:
        if event["type"] != "agent_response" or self.types == ("*",):
            return True
        return event["message_type"] in (self.types or memws.CLASSIC_TYPES)


def bare(frame: JSON) -> JSON:
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
        self.aside: dict[str, list[Someone]] = {}
        "Deleted and not purged, oldest first."
        self.floors: dict[str, int] = {}
        "The highest seq seen under each name that was given up."
        self.present: list[Person] = []
        self.count = itertools.count(1)
        self.steps = 0
        "Steps since the server was started."
        self.crashed = False
        self.db = self.folder / f"world{next(self.worlds)}.db"
        World.endpoint.default = Mind()
        World.endpoint.requests.clear()
        World.endpoint.bodies.clear()
        World.endpoint.headers.clear()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        self.steps += 1

        async def limited() -> Any:
            async with asyncio.timeout(2 * LIMIT):
                return await work

        return self.runner.run(limited())

    @initialize(types=st.lists(st.sampled_from(WATCHED), min_size=2, max_size=3))
    def begin(self, types: list[tuple[str, ...]]) -> None:
        """A server, some clients, and an agent of each that has begun to talk."""
        self.start()
        self.auditor = self.do(self.enter(("*",), audit=True))
        for each, name in zip(types, NAMES, strict=False):
            person = self.do(self.enter(each))
            self.do(self.create(person, name))
            self.do(self.say(person, None, PLAIN, "queue"))

    def person(self, number: int) -> Person:
        """One of those who are there."""
        return self.present[number % len(self.present)]

    def named(self, number: int, name: str) -> str:
        """The name of an agent, of one that is busy first of all; now and then of none."""
        waited_for = [agent.name for agent in self.live.values() if agent.waiting]
        busy = waited_for or [agent.name for agent in self.live.values() if agent.running]
        known = (busy if number % 2 == 0 else None) or sorted(self.live)
        return known[number % len(known)] if known and number < 8 else name

    def start(self) -> None:
        self.server = memws.WebSocketServer(
            "127.0.0.1", 0, db=str(self.db), model="test-model", base_url=self.endpoint.url, api_key="sk-x",
            sync="normal", rate_limit=0,
        )  # fmt: skip
        self.server.tool(note)
        self.server.start()

    async def enter(self, types: tuple[str, ...], audit: bool = False) -> Person:
        websocket = await connect(
            self.server.url, compression=None, max_size=memws.MAX_FRAME, max_queue=None, proxy=None
        )
        person = Person(Wire(websocket), types)
        if types:
            await person.wire.ok("hello", message_types=list(types))
        person.read = len(person.wire.frames)
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
            replay = await self.replay(agent, 0)
            assert [bare(frame) for frame in replay] == agent.events
            self.check_turns(agent)
            texts = [item["text"] for item in await self.messages(agent) if item["role"] == "user"]
            assert texts == [event["message"] for event in agent.events if event.get("message_type") == "user_message"]
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
        last_seq = (await wire.ok("subscribe", agent_name=agent.name, after=after))["last_seq"]
        frames = []
        if last_seq > agent.last_seq or (agent.events and after < agent.events[-1]["seq"]):
            last = last_seq if last_seq > agent.last_seq else agent.events[-1]["seq"]
            frames = [frame for frame in await wire.until(lambda frame: frame.get("seq") == last) if "seq" in frame]
        await wire.ok("unsubscribe", agent_name=agent.name)
        return frames

    async def found(self, agent: Someone) -> None:
        """An agent took a name: its seqs go on above all that were given under that."""
        floor = (await self.auditor.wire.ok("get_agent", agent_name=agent.name))["last_seq"]
        assert floor >= max(agent.last_seq, self.floors.get(agent.name, 0))
        agent.floor = floor
        for person in self.present:
            person.cursor.setdefault(agent, agent.last_seq)

    async def messages(self, agent: Someone) -> list[JSON]:
        found: list[JSON] = []
        before = None
        while True:
            page = await self.auditor.wire.ok("get_messages", agent_name=agent.name, before=before, limit=200)
            found[:0] = page["messages"]
            if not page["more"]:
                return found
            before = found[0]["id"]

    async def check(self) -> None:
        """Read what agents have stored since the last step; every client has got its share of it, in order."""
        for agent in self.live.values():
            for frame in await self.replay(agent, agent.last_seq):
                event = bare(frame)
                assert event["seq"] == agent.last_seq + 1
                agent.events.append(event)
            self.check_turns(agent)
        for person in self.present:
            await self.check_person(person)

    async def check_person(self, person: Person) -> None:
        await person.wire.ok("list_agents", limit=1)
        frames, person.read = person.wire.frames[person.read :], len(person.wire.frames)
        assert [frame for frame in frames if frame.get("code") == "internal"] == []
        for agent in self.live.values():
            cursor = person.cursor.get(agent, 0)
            due = [
                event
                for event in agent.events
                if event["seq"] > cursor and person.wants(event)
                and (agent in person.subscribed or self.is_own(person, agent, event.get("turn_id")))
            ]  # fmt: skip
            got = [bare(frame) for frame in frames if "seq" in frame and self.is_of(agent, frame)]
            assert got == due
            person.cursor[agent] = agent.last_seq

    def is_own(self, person: Person, agent: Someone, turn_id: str | None) -> bool:
        return turn_id is not None and turn_id in agent.sent and agent.sent[turn_id].sender is person

    def is_of(self, agent: Someone, frame: JSON) -> bool:
        """Names may change hands between two steps: an event belongs to whom has stored it."""
        return any(event["seq"] == frame["seq"] and event == bare(frame) for event in reversed(agent.events))

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
            if agent.running or agent.waiting:
                await self.idle(agent, release=True)

    async def idle(self, agent: Someone, release: bool) -> None:
        if release:
            self.endpoint.release()
        while (await self.auditor.wire.ok("get_agent", agent_name=agent.name))["turn"] is not None:
            if release:
                self.endpoint.release()
        agent.order += [item.turn_id for item in agent.waiting]
        agent.running = None
        agent.waiting.clear()

    # -- steps --

    @rule(
        action=st.sampled_from(ACTIONS),
        who=numbers,
        agent=numbers,
        pick=st.integers(0, 60),
        name=st.sampled_from(NAMES),
        yes=st.booleans(),
        also=st.booleans(),
    )
    def step(self, action: str, who: int, agent: int, pick: int, name: str, yes: bool, also: bool) -> None:
        """One client does one thing; what else is drawn says whose agent it is about, and how."""
        if (work := self.choose(action, self.person(who), self.named(agent, name), pick, name, yes, also)) is not None:
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
                kind = (HELD, PLAIN, HELD, EDIT, HELD, TOOL, PLAIN, BROKEN, REFUSED)[pick % 9]
                busy = "interrupt" if yes and (also or (agent and agent.waiting)) else "reject" if yes else "queue"
                return self.say(person, None if pick % 5 == 0 else known, kind, busy)
            case "resend" if agent:
                sent = [turn for turn in agent.sent.values() if turn.text and turn.turn_id not in agent.lost]
                sent = [turn for turn in sent if turn not in agent.waiting]
                return self.resend(agent, sent[-1 - pick % min(len(sent), 4)], same=yes or also) if sent else None
            case "go_on":
                return self.release()
            case "cancel":
                return self.cancel(
                    person, known, ("waiting" if yes else "running", "waiting", "over", "unknown", None)[pick % 5]
                )
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

    # -- coming and going --

    async def leave(self, person: Person, *, abort: bool) -> None:
        """A client leaves, properly or not; its turn goes on without it."""
        await self.check_person(person)
        self.present.remove(person)
        self.forget(person)
        if abort:
            person.wire.websocket.transport.abort()
        await person.wire.websocket.close()

    def forget(self, person: Person) -> None:
        for agent in [*self.live.values(), *itertools.chain(*self.aside.values())]:
            for sent in agent.sent.values():
                if sent.sender is person:
                    sent.sender = None

    # -- agents --

    async def create(self, person: Person, name: str) -> None:
        config = {"name": name, "tools": ["note"], "max_steps": 6}
        if name in self.live:
            assert (await person.wire.refused("create_agent", config=config))["code"] == "name_taken"
        else:
            assert (await person.wire.ok("create_agent", config=config))["agent_name"] == name
            agent = self.live[name] = person.current = Someone(name)
            await self.found(agent)
        await self.check()

    async def load(self, person: Person, name: str) -> None:
        if name not in self.live:
            assert (await person.wire.refused("load_agent", name=name))["code"] == "unknown_agent"
        else:
            loaded = await person.wire.ok("load_agent", name=name)
            person.current = self.live[name]
            assert loaded["last_seq"] >= self.live[name].last_seq
        await self.check()

    async def delete(self, person: Person, name: str, force: bool, purge: bool, leave: bool) -> None:
        agent = self.live.get(name)
        aside = self.aside.get(name, [])
        if agent is None:
            if purge and aside:
                await person.wire.ok("delete_agent", agent_name=name, purge=True)
                aside.pop()
            else:
                assert (await person.wire.refused("delete_agent", agent_name=name))["code"] == "unknown_agent"
        elif (agent.running or agent.waiting) and not force:
            assert (await person.wire.refused("delete_agent", agent_name=name, purge=purge))["code"] == "busy"
        elif leave and agent.running:
            turn_id = agent.running.turn_id
            await self.auditor.wire.ok("subscribe", agent_name=name)
            await person.wire.request("delete_agent", agent_name=name, force=True, purge=purge)
            await self.auditor.wire.until(lambda frame: is_terminal(frame) and frame["turn_id"] == turn_id)
            self.present.remove(person)
            self.forget(person)
            person.wire.websocket.transport.abort()
            await self.auditor.wire.until(lambda frame: frame.get("change") == "deleted")
            await person.wire.websocket.wait_closed()
            await self.gone(agent, purge)
        else:
            await person.wire.ok("delete_agent", agent_name=name, force=force, purge=purge)
            await self.gone(agent, purge)
        await self.check()

    async def gone(self, agent: Someone, purge: bool) -> None:
        """An agent was deleted: its turns have ended, its subscribers are told, nobody follows it any more."""
        del self.live[agent.name]
        agent.lost |= {item.turn_id for item in agent.waiting}
        top = agent.last_seq + 1
        for person in self.present:
            await person.wire.ok("list_agents", limit=1)
            frames, person.read = person.wire.frames[person.read :], len(person.wire.frames)
            seqs = [frame["seq"] for frame in frames if frame.get("agent_name") == agent.name and "seq" in frame]
            top = max([top, *seqs])
            told = [frame for frame in frames if frame.get("message_type") == "agent_change"]
            assert len(told) == (agent in person.subscribed and person.types == ("*",))
            if agent.running is not None and agent.running.sender is person:
                (end,) = [f for f in frames if is_terminal(f) and f["turn_id"] == agent.running.turn_id]
                assert end["stop_reason"] == "cancelled"
            for item in agent.waiting:
                if item.sender is person:
                    (refusal,) = [f for f in frames if is_terminal(f) and f["turn_id"] == item.turn_id]
                    assert "seq" not in refusal
            person.subscribed.discard(agent)
            person.current = None if person.current is agent else person.current
        agent.running = None
        agent.waiting.clear()
        self.floors[agent.name] = max(self.floors.get(agent.name, 0), top)
        if not purge:
            self.aside.setdefault(agent.name, []).append(agent)

    async def restore(self, person: Person, name: str, new_name: str | None) -> None:
        to = new_name or name
        arguments = {"agent_name": name} | ({"new_name": new_name} if new_name else {})
        if not self.aside.get(name):
            assert (await person.wire.refused("restore_agent", **arguments))["code"] == "unknown_agent"
        elif to in self.live:
            assert (await person.wire.refused("restore_agent", **arguments))["code"] == "name_taken"
        else:
            assert (await person.wire.ok("restore_agent", **arguments))["agent_name"] == to
            agent = self.aside[name].pop()
            agent.name = to
            self.live[to] = agent
            for frame in await self.stored_since(agent):
                assert frame["seq"] == agent.last_seq + 1
                agent.events.append(bare(frame))
            await self.found(agent)
        await self.check()

    async def stored_since(self, agent: Someone) -> list[JSON]:
        """What a deleted agent stored last: up to the event that tells of its deletion."""
        wire = self.auditor.wire
        await wire.ok("subscribe", agent_name=agent.name, after=agent.last_seq)
        frames = await wire.until(lambda frame: frame.get("change") == "deleted" and frame["seq"] > agent.last_seq)
        await wire.ok("unsubscribe", agent_name=agent.name)
        return [frame for frame in frames if "seq" in frame]

    async def rename(self, person: Person, name: str, new_name: str) -> None:
        agent = self.live.get(name)
        arguments = {"agent_name": name, "new_name": new_name}
        if agent is None:
            assert (await person.wire.refused("rename_agent", **arguments))["code"] == "unknown_agent"
        elif agent.running or agent.waiting:
            assert (await person.wire.refused("rename_agent", **arguments))["code"] == "busy"
        elif new_name in self.live:
            assert (await person.wire.refused("rename_agent", **arguments))["code"] == "name_taken"
        else:
            await self.check()
            await person.wire.ok("rename_agent", **arguments)
            agent.name = new_name
            del self.live[name]
            self.live[new_name] = agent
            wire = self.auditor.wire
            await wire.ok("subscribe", agent_name=new_name, after=agent.last_seq)
            event = bare((await wire.until(lambda frame: frame.get("change") == "renamed"))[-1])
            await wire.ok("unsubscribe", agent_name=new_name)
            assert event["seq"] == agent.last_seq + 1
            agent.events.append(event)
            self.floors[name] = max(self.floors.get(name, 0), event["seq"])
            await self.found(agent)
            assert (await person.wire.refused("get_agent", agent_name=name))["code"] == "unknown_agent"
        await self.check()

    # -- talk --

    async def say(self, person: Person, name: str | None, kind: str, busy: str) -> None:
        number = next(self.count)
        sent = Sent(f"turn-{number}", f"{kind} of {number}", person)
        agent = person.current if name is None else self.live.get(name)
        fields = {"turn_id": sent.turn_id, "when_busy": busy} | ({"agent_name": name} if name else {})
        asked = len(self.endpoint.requests)
        sent.request_id = await person.wire.say(str(sent.text), **fields)
        if agent is None:
            await self.refusal(person, sent, "unknown_agent" if name else "no_agent")
        elif agent.running and busy == "reject":
            await self.refusal(person, sent, "busy")
        elif agent.running and self.queued(person) == memws.MAX_WAITING_SESSION:
            await self.refusal(person, sent, "queue_full")
        elif agent.running and busy == "queue":
            agent.sent[sent.turn_id] = sent
            agent.waiting.append(sent)
            await person.wire.ok("list_agents", limit=1)
        else:
            agent.running, agent.sent[sent.turn_id] = None, sent
            agent.order.append(sent.turn_id)
            if kind == HELD:
                await self.begin_held(person, agent, sent, asked)
            else:
                frames = await person.wire.until(lambda f: is_terminal(f) and f.get("id") == sent.request_id)
                assert frames[-1]["stop_reason"] == ("error" if kind == REFUSED else "done"), frames[-1]
                assert frames[-1].get("code") == ("model_auth" if kind == REFUSED else None)
                await self.settle(agent)
        await self.check()

    def queued(self, person: Person) -> int:
        """How many of a client's messages wait."""
        return sum(item.sender is person for agent in self.live.values() for item in agent.waiting)

    async def begin_held(self, person: Person, agent: Someone, sent: Sent, asked: int) -> None:
        """The turn has begun, and its model thinks."""
        agent.running = sent
        await person.wire.until(
            lambda frame: frame["type"] == "agent_response_start" and frame["id"] == sent.request_id
        )
        await asyncio.to_thread(self.endpoint.wait_requests, asked + 1)

    async def refusal(self, person: Person, sent: Sent, code: str) -> None:
        frames = await person.wire.until(lambda frame: frame.get("id") == sent.request_id)
        assert (frames[-1]["type"], frames[-1]["code"]) == ("agent_response_error", code)
        assert frames[-1]["turn_id"] == sent.turn_id
        assert "seq" not in frames[-1]

    async def resend(self, agent: Someone, sent: Sent, same: bool) -> None:
        stranger = await self.enter(("*",), audit=True)
        wire = stranger.wire
        request_id = await wire.say(
            str(sent.text) if same else "another text", agent_name=agent.name, turn_id=sent.turn_id
        )
        told = [event for event in agent.events if event.get("turn_id") == sent.turn_id]
        if not same:
            (frame,) = await wire.until(is_terminal)
            assert (frame["code"], frame["id"]) == ("turn_id_reused", request_id)
        else:
            frames = await wire.until(lambda frame: frame.get("seq") == told[-1]["seq"])
            ends = 2 if is_terminal(told[-1]) else 1
            assert [bare(frame) for frame in frames if "seq" in frame] == told
            assert [frame["id"] for frame in frames if frame["type"] != "agent_response"] == [request_id] * ends
        wire.websocket.transport.abort()
        await wire.websocket.wait_closed()
        await self.check()

    async def cancel(self, person: Person, name: str, which: str | None) -> None:
        agent = self.live.get(name)
        if agent is None:
            assert (await person.wire.refused("cancel", agent_name=name))["code"] == "unknown_agent"
            return
        over = [event["turn_id"] for event in agent.events if is_terminal(event)]
        if which == "waiting" and agent.waiting:
            item = agent.waiting.pop()
            answer = await person.wire.ok("cancel", agent_name=name, turn_id=item.turn_id)
            assert answer == {"state": "removed"}
            del agent.sent[item.turn_id]
            if item.sender is not None:
                await item.sender.wire.ok("list_agents", limit=1)
                frames = item.sender.wire.frames
                (refusal,) = [f for f in frames if f.get("turn_id") == item.turn_id and is_terminal(f)]
                assert (refusal["code"], refusal["id"]) == ("cancelled", item.request_id)
        elif which == "over" and over:
            assert await person.wire.ok("cancel", agent_name=name, turn_id=over[0]) == {"state": "over"}
        elif which == "unknown":
            code = (await person.wire.refused("cancel", agent_name=name, turn_id="never seen"))["code"]
            assert code == "unknown_turn"
        elif agent.running is not None:
            chosen = {} if which is None else {"turn_id": agent.running.turn_id}
            assert await person.wire.ok("cancel", agent_name=name, **chosen) == {"state": "cancelling"}
            await self.settle(agent)
        elif which is None:
            assert await person.wire.ok("cancel", agent_name=name) == {"state": "over"}
        await self.check()

    # -- following --

    async def subscribe(self, person: Person, name: str, after: int | None, beyond: bool) -> None:
        agent = self.live.get(name)
        if agent is None:
            assert (await person.wire.refused("subscribe", agent_name=name))["code"] == "unknown_agent"
            return
        await self.check()
        if beyond:
            error = await person.wire.refused("subscribe", agent_name=name, after=10**9)
            assert error["code"] == "unknown_seq"
        else:
            seq = None if after is None else min(after, agent.last_seq)
            answer = await person.wire.ok("subscribe", agent_name=name, **({} if seq is None else {"after": seq}))
            assert answer["last_seq"] >= agent.last_seq
            person.subscribed.add(agent)
            person.cursor[agent] = agent.last_seq if seq is None else seq
            due = [event for event in agent.events if event["seq"] > person.cursor[agent] and person.wants(event)]
            if due:
                await person.wire.until(lambda frame: frame.get("seq") == due[-1]["seq"])
        await self.check()

    async def unsubscribe(self, person: Person, agent: Someone) -> None:
        await person.wire.ok("unsubscribe", agent_name=agent.name)
        person.subscribed.discard(agent)
        await self.check()

    # -- memory --

    async def set_block(self, person: Person, agent: Someone, old: bool) -> None:
        (block,) = [
            b for b in (await person.wire.ok("get_agent", agent_name=agent.name))["blocks"] if b["label"] == "human"
        ]
        arguments = {"agent_name": agent.name, "label": "human", "value": f"Number {next(self.count)}"}
        if old:
            error = await person.wire.refused("set_block", **arguments, version=block["version"] + 1)
            assert error["code"] == "conflict"
        else:
            answer = await person.wire.ok("set_block", **arguments, version=block["version"])
            assert answer == {"label": "human", "version": block["version"] + 1}
        await self.check()

    async def passage(self, person: Person, agent: Someone, remove: bool) -> None:
        if not remove:
            added = (await person.wire.ok("insert_passage", agent_name=agent.name, text="An otter."))["id"]
            assert added not in agent.passages
            agent.passages.add(added)
        elif agent.passages:
            known = max(agent.passages)
            answer = await person.wire.command("delete_passage", agent_name=agent.name, passage_id=known)
            assert answer["ok"] or answer["error"]["code"] == "not_found"
            assert (await person.wire.refused("delete_passage", agent_name=agent.name, passage_id=known))[
                "code"
            ] == "not_found"
        else:
            assert (await person.wire.refused("delete_passage", agent_name=agent.name, passage_id=10**6))[
                "code"
            ] == "not_found"
        await self.check()

    async def work(self, person: Person, agent: Someone, command: str) -> None:
        if agent.running:
            assert (await person.wire.refused(command, agent_name=agent.name))["code"] == "busy"
        elif command == "wake":
            turn_id = (await person.wire.ok("wake", agent_name=agent.name))["turn_id"]
            agent.sent[turn_id] = Sent(turn_id, None, person)
            agent.order.append(turn_id)
            await person.wire.until(lambda frame: is_terminal(frame) and frame["turn_id"] == turn_id)
            await self.settle(agent)
        else:
            answer = await person.wire.command("compact", agent_name=agent.name)
            assert answer["ok"] or answer["error"]["code"] == "not_found", answer
        await self.check()

    # -- the server --

    def restart(self, how: str) -> None:
        """The server stops and starts, or is replaced by one on the file as a crash would leave it in this moment."""
        self.steps = 0
        types = [person.types for person in self.present]
        self.do(self._stop_or_crash(how))
        self.start()
        self.auditor = self.do(self.enter(("*",), audit=True))
        self.do(self.check())
        for each in types:
            self.do(self.enter(each))

    async def _stop_or_crash(self, how: str) -> None:
        await self.check()
        stopping, stopped = list(self.present), self.server
        if how == "crash":
            self.crashed = True
            await self.leave_all()
            left, self.db = self.db, self.db.with_name(f"{self.db.name.partition('.')[0]}.{next(self.count)}.db")
            shutil.copy(left, self.db)
            shutil.copy(f"{left}-wal", f"{self.db}-wal")
        await asyncio.to_thread(stopped.stop)
        for person in stopping if how == "stop" else ():
            await self.told_of_the_stop(person)
        if how == "stop":
            await self.leave_all()
        for agent in [*self.live.values(), *itertools.chain(*self.aside.values())]:
            for sent in agent.sent.values():
                sent.sender = None
            agent.lost |= {item.turn_id for item in agent.waiting}
            agent.waiting.clear()
            agent.running = None

    async def told_of_the_stop(self, person: Person) -> None:
        """Its running turn has its end, what waited is refused, and the connection is closed with 1001."""
        with suppress(AssertionError):
            await person.wire.closed()
        assert person.wire.websocket.close_code == 1001
        frames = person.wire.frames[person.read :]
        for agent in self.live.values():
            for item, code in [(agent.running, None), *((item, "cancelled") for item in agent.waiting)]:
                if item is not None and item.sender is person:
                    (end,) = [frame for frame in frames if is_terminal(frame) and frame["turn_id"] == item.turn_id]
                    assert end.get("code") == code
                    assert ("seq" in end) == (code is None)


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
