"""The protocol as a game: whatever clients do in whatever order, a model of it knows what must come.

Each move is one request of one client, of which the next thing is known: its answer, its refusal, its code. After each
move an auditor reads what the agents have stored, and every client must have got exactly its share of it.
"""

import asyncio
import contextlib
import itertools
import os
import random
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai  # noqa: F401 (half a second, once, and not in some move)
import pytest
from endpoint import Body, Endpoint, Reply, greet
from wire import JSON, LIMIT, Wire, is_terminal, messages_of, of_kind, wire

import memws

SEEDS = int(os.environ.get("MEMWS_TEST_SEEDS", "8"))
MOVES = 150
NAMES = ("ada", "sam", "Zoë", "日本")
WATCHED: tuple[tuple[str, ...], ...] = ((), ("*",), ("queue", "memory_change"))  # in hello; none: the classic types
HELD, REFUSED, TOOLS, PLAIN = "held", "refused", "tools", "plain"
KINDS = (HELD, HELD, HELD, HELD, PLAIN, PLAIN, TOOLS, REFUSED)
OFTEN = {
    "say": 16, "resend": 6, "subscribe": 4, "cancel": 4, "release": 2, "delete": 4, "restart": 4, "rename": 2,
    "restore": 2, "create": 2, "connect": 2, "unsubscribe": 2, "edit": 2, "work": 2, "disconnect": 1,
}  # fmt: skip


def note(number: int) -> int:
    return number


def answer(body: Body) -> Reply:
    """What the model says: the user's words tell it what to do."""
    if body["messages"][-1]["role"] == "tool" or "tools" not in body:
        return greet(body)
    edit = ("core_memory_append", {"name": "human", "content": "x"})
    insert = ("archival_memory_insert", {"content": "A walrus."})
    replies = {
        HELD: Reply("Let me think about it for a long while.", stall_after=2),
        REFUSED: Reply(status=401),
        TOOLS: Reply("Hm.", calls=[edit, insert, ("note", {"number": 2, "request_heartbeat": True})]),
    }
    said = str(next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")).rpartition("\n")[2]
    return next((reply for kind, reply in replies.items() if f"{kind} of" in said), greet(body))


@dataclass(eq=False)
class Sent:
    """A message of a client, or a turn that was asked for by wake (text None)."""

    turn_id: str
    text: str | None
    sender: "Person | None"
    request_id: Any = None
    followers: set["Person"] = field(default_factory=set)  # who has sent it again while it waited


@dataclass(eq=False)
class Someone:
    """What is known of an agent."""

    name: str
    floor: int = 0  # its next events are above: the last seq that was given under its name when it took that
    events: list[JSON] = field(default_factory=list)  # what it has stored, as the auditor read it
    sent: dict[str, Sent] = field(default_factory=dict)  # every turn that was taken up and not lost
    running: Sent | None = None
    waiting: list[Sent] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # its turns as they had to begin
    superseded: set[str] = field(default_factory=set)  # those that another message has ended

    @property
    def last_seq(self) -> int:
        return max(self.floor, int(self.events[-1]["seq"]) if self.events else 0)

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

    async def unread(self) -> list[JSON]:
        """The frames that have come since the last look."""
        await self.wire.ok("list_agents", limit=1)
        frames, self.read = self.wire.frames[self.read :], len(self.wire.frames)
        return frames

    async def refused(self, command: str, code: str, **fields: Any) -> None:
        assert (await self.wire.refused(command, **fields))["code"] == code


def stored(frame: JSON) -> JSON:
    """An event as it is stored: whose name it goes out under and whose request it answers is not part of it."""
    return {key: value for key, value in frame.items() if key not in ("id", "agent_name")}


class World:
    """A server, its clients, and what must be true of them."""

    def __init__(self, endpoint: Endpoint, folder: Path, seed: int) -> None:
        self.endpoint, self.db, self.rng = endpoint, folder / "world.db", random.Random(seed)
        self.live: dict[str, Someone] = {}
        self.aside: dict[str, list[Someone]] = {}  # deleted and not purged, oldest first
        self.floors: dict[str, dict[Someone, int]] = defaultdict(dict)  # the highest seq of deleted agents by name
        self.present: list[Person] = []
        self.connections = contextlib.AsyncExitStack()
        self.count = itertools.count(1)
        self.moves = 0  # since the server was started
        self.crashed = False

    async def play(self) -> None:
        """Some clients and an agent of each that has begun to talk; then they do this and that."""
        await self.start()
        try:
            for types, name in zip(WATCHED, NAMES, strict=False):
                person = await self.enter(types)
                await self.create_as(person, name)
                await self.say_as(person, None, PLAIN, "queue")
            await self.check()
            for move in self.rng.choices(list(OFTEN), list(OFTEN.values()), k=MOVES):
                self.moves += 1
                await asyncio.wait_for(getattr(self, move)(), 2 * LIMIT)
                await self.check()
            await self.finish()
        finally:
            await self.connections.aclose()
            self.server.stop()

    async def start(self) -> None:
        options = {"model": "test-model", "base_url": self.endpoint.url, "api_key": "sk-x", "sync": "normal"}
        self.server = memws.WebSocketServer("127.0.0.1", 0, db=str(self.db), **options)
        self.server.tool(note)
        self.server.start()
        self.auditor = await self.enter(("*",), audit=True)

    async def enter(self, types: tuple[str, ...], audit: bool = False) -> Person:
        person = Person(await self.connections.enter_async_context(wire(self.server, *types)), types)
        if not audit:
            self.present.append(person)
            person.cursor = {agent: agent.last_seq for agent in self.live.values()}
        return person

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

    async def replay(self, agent: Someone, after: int) -> list[JSON]:
        """The stored events of an agent above a seq, through a subscription."""
        wire = self.auditor.wire
        last = (await wire.ok("subscribe", agent_name=agent.name, after=after))["last_seq"]
        if last == agent.last_seq:  # it may be a seq of an earlier agent of the name
            last = agent.events[-1]["seq"] if agent.events else 0
        frames = await wire.until(lambda frame: frame.get("seq") == last) if last > after else []
        await wire.ok("unsubscribe", agent_name=agent.name)
        return [frame for frame in frames if "seq" in frame]

    def keep(self, agent: Someone, frames: list[JSON]) -> None:
        """What an agent has stored since the last look follows what it had, without a gap."""
        for frame in frames:
            if "seq" in frame:
                assert frame["seq"] == agent.last_seq + 1
                agent.events.append(stored(frame))

    async def check(self) -> None:
        """Read what agents have stored since the last move; every client has got its share of it, in order."""
        for agent in self.live.values():
            self.keep(agent, await self.replay(agent, agent.last_seq))
            self.check_turns(agent)
        for person in self.present:
            await self.check_person(person)

    async def check_person(self, person: Person) -> None:
        frames = await person.unread()
        assert [frame for frame in frames if frame.get("code") == "internal"] == []
        marked = {frame["id"] for frame in frames if "id" in frame and frame["type"] != "agent_response"}
        assert marked <= person.wire.ids
        for agent in self.live.values():
            followed = {turn_id for turn_id, sent in agent.sent.items() if person in sent.followers}
            ends = [frame for frame in frames if frame.get("turn_id") in followed and frame["type"] != "agent_response"]
            assert all("id" in frame for frame in ends)
            own = followed | {turn_id for turn_id, sent in agent.sent.items() if sent.sender is person}
            new = [event for event in agent.events if event["seq"] > person.cursor.get(agent, 0)]
            mine = new if agent in person.subscribed else [event for event in new if event.get("turn_id") in own]
            due = [event for event in mine if person.wants(event)]
            assert [stored(frame) for frame in frames if "seq" in frame and self.is_of(agent, frame)] == due
            person.cursor[agent] = agent.last_seq

    def is_of(self, agent: Someone, frame: JSON) -> bool:
        """Names may change hands between two moves: an event belongs to whom has stored it."""
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
        assert {each["turn_id"] for each in agent.events if each.get("stop_reason") == "superseded"} == agent.superseded

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
        busy = True
        while busy:
            if release:
                self.endpoint.release()
            busy = (await self.auditor.wire.ok("get_agent", agent_name=agent.name))["turn"] is not None
        agent.order += [item.turn_id for item in agent.waiting]
        agent.running = None
        agent.waiting.clear()

    def chance(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    def somebody(self) -> Person:
        return self.rng.choice(self.present)

    def named(self) -> str:
        """The name of an agent, of one that is busy first of all; now and then of none."""
        waited_for = [agent.name for agent in self.live.values() if agent.waiting]
        busy = waited_for or [agent.name for agent in self.live.values() if agent.running]
        known = (busy if self.chance() else None) or sorted(self.live)
        return self.rng.choice(known if known and self.chance(0.8) else NAMES)

    async def connect(self) -> None:
        if len(self.present) < 4:
            await self.enter(self.rng.choice(WATCHED))

    async def disconnect(self) -> None:
        """A client leaves, properly or not; its turns go on without it."""
        if len(self.present) > 1:
            person = self.somebody()
            await self.check_person(person)
            self.forget(person)
            if self.chance():
                person.wire.websocket.transport.abort()
            await person.wire.websocket.close()

    def everyone(self) -> Iterator[Someone]:
        return itertools.chain(self.live.values(), *self.aside.values())

    def forget(self, *people: Person) -> None:
        self.present = [person for person in self.present if person not in people]
        for sent in itertools.chain(*(agent.sent.values() for agent in self.everyone())):
            sent.sender = None if sent.sender in people else sent.sender

    async def named_anew(self, agent: Someone, name: str) -> None:
        """An agent took a name: its seqs go on above all that were given under that by deleted ones."""
        agent.name = name
        self.live[name] = agent
        floor = (await self.auditor.wire.ok("get_agent", agent_name=name))["last_seq"]
        assert floor >= max([agent.last_seq, *self.floors[name].values()])
        agent.floor = floor
        for person in self.present:
            person.cursor.setdefault(agent, agent.last_seq)

    async def create(self) -> None:
        await self.create_as(self.somebody(), self.rng.choice(NAMES))

    async def create_as(self, person: Person, name: str) -> None:
        config = {"name": name, "tools": ["note"], "max_steps": 6}
        if name in self.live:
            return await person.refused("create_agent", "name_taken", config=config)
        assert (await person.wire.ok("create_agent", config=config))["agent_name"] == name
        person.current = Someone(name)
        return await self.named_anew(person.current, name)

    async def delete(self) -> None:
        person, name = self.somebody(), self.named()
        agent, aside = self.live.get(name), self.aside.get(name, [])
        fields = {"agent_name": name, "force": self.chance(0.7), "purge": self.chance(0.25)}
        if agent is None and fields["purge"] and aside:
            await person.wire.ok("delete_agent", **fields)
            aside.pop()
        elif agent is None or (agent.running and not fields["force"]):
            await person.refused("delete_agent", "busy" if agent else "unknown_agent", **fields)
        else:
            await person.wire.ok("delete_agent", **fields)
            await self.gone(agent, bool(fields["purge"]))

    async def gone(self, agent: Someone, purge: bool) -> None:
        """An agent was deleted: its turns have ended, its subscribers are told, nobody follows it any more."""
        del self.live[agent.name]
        top = agent.last_seq + 1
        for person in self.present:
            told = agent in person.subscribed and person.types == ("*",)
            frames = await person.unread()
            while told and not any(frame.get("change") == "deleted" for frame in frames):
                frames += await person.unread()
            top = max([top, *(f["seq"] for f in frames if f.get("agent_name") == agent.name and "seq" in f)])
            assert len([frame for frame in frames if frame.get("message_type") == "agent_change"]) == told
            self.check_ends(agent, person, frames, "cancelled", "unknown_agent")
            person.subscribed.discard(agent)
            person.current = None if person.current is agent else person.current
        agent.lose()
        self.floors[agent.name][agent] = top
        if not purge:
            self.aside.setdefault(agent.name, []).append(agent)

    def check_ends(self, agent: Someone, person: Person, frames: list[JSON], reason: str, code: str) -> None:
        """A client is told how its turns end when an agent or server goes: what ran is stored, what waited refused."""
        for item in (agent.running, *agent.waiting):
            if item is not None and item.sender is person:
                (end,) = [frame for frame in frames if is_terminal(frame) and frame["turn_id"] == item.turn_id]
                assert ("seq" in end) == (item is agent.running)
                assert end.get("code", end["stop_reason"]) == (reason if item is agent.running else code)

    async def restore(self) -> None:
        person, name = self.somebody(), self.rng.choice([*self.aside, self.named()])
        new_name = self.rng.choice(NAMES) if self.chance() else None
        to = new_name or name
        arguments = {"agent_name": name} | ({"new_name": new_name} if new_name else {})
        if not self.aside.get(name):
            return await person.refused("restore_agent", "unknown_agent", **arguments)
        if to in self.live:
            return await person.refused("restore_agent", "name_taken", **arguments)
        assert (await person.wire.ok("restore_agent", **arguments))["agent_name"] == to
        agent = self.aside[name].pop()
        del self.floors[name][agent]
        await self.read_change(agent, to, "deleted")
        for each in self.present:
            each.cursor[agent] = agent.last_seq  # what it stored before was looked at when it went
        return await self.named_anew(agent, to)

    async def read_change(self, agent: Someone, name: str, change: str) -> None:
        """What an agent stored before it took another name, up to the event that tells of that."""
        wire = self.auditor.wire
        await wire.ok("subscribe", agent_name=name, after=agent.last_seq)
        self.keep(agent, await wire.until(lambda f: f.get("change") == change and f["seq"] > agent.last_seq))
        await wire.ok("unsubscribe", agent_name=name)

    async def rename(self) -> None:
        person, name, new_name, force = self.somebody(), self.named(), self.rng.choice(NAMES), self.chance()
        agent = self.live.get(name)
        arguments = {"agent_name": name, "new_name": new_name, "force": force}
        if agent is None or (agent.running and not force) or new_name in self.live:
            code = "unknown_agent" if agent is None else "busy" if agent.running and not force else "name_taken"
            return await person.refused("rename_agent", code, **arguments)
        await person.wire.ok("rename_agent", **arguments)
        for each in self.present:
            await each.wire.ok("list_agents", limit=1)
            self.check_ends(agent, each, each.wire.frames[each.read :], "cancelled", "cancelled")
        agent.lose()
        await self.read_change(agent, new_name, "renamed")
        del self.live[name]
        await self.named_anew(agent, new_name)
        return await person.refused("get_agent", "unknown_agent", agent_name=name)

    async def say(self) -> None:
        name = None if self.chance(0.2) else self.named()
        waits = name in self.live and self.live[str(name)].waiting
        busy = self.rng.choice(["queue", "queue", "queue", "interrupt", "queue" if waits else "reject"])
        await self.say_as(self.somebody(), name, self.rng.choice(KINDS), busy)

    async def say_as(self, person: Person, name: str | None, kind: str, busy: str) -> None:
        number = next(self.count)
        sent = Sent(f"turn-{number}", f"{kind} of {number}", person)
        agent = person.current if name is None else self.live.get(name)
        fields = {"turn_id": sent.turn_id, "when_busy": busy} | ({"agent_name": name} if name else {})
        asked = len(self.endpoint.requests)
        sent.request_id = await person.wire.say(str(sent.text), **fields)
        waits = sum(item.sender is person for other in self.live.values() for item in other.waiting)
        code = None
        if agent is None:
            code = "unknown_agent" if name else "no_agent"
        elif agent.running:
            is_full = waits == memws.MAX_WAITING_SESSION or len(agent.waiting) == memws.MAX_WAITING_AGENT
            code = "busy" if busy == "reject" else "queue_full" if is_full else None
        if agent is None or code:
            frame = (await person.wire.until(lambda frame: frame.get("id") == sent.request_id))[-1]
            assert (frame["type"], frame["code"], frame["turn_id"]) == ("agent_response_error", code, sent.turn_id)
            assert "seq" not in frame
        elif agent.running and busy == "queue":
            agent.sent[sent.turn_id] = sent
            agent.waiting.append(sent)
            await person.wire.ok("list_agents", limit=1)
            told = [frame["position"] for frame in of_kind(person.wire.before_answer, "queue")]
            assert told == [len(agent.waiting)] * bool(person.types)
        else:
            agent.superseded |= {agent.running.turn_id} if agent.running else set()
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

    async def resend(self) -> None:
        agent = self.live.get(self.named())
        if agent and agent.waiting and self.chance():
            person, chosen = self.somebody(), self.rng.choice(agent.waiting)
            chosen.followers.add(person)
            await person.wire.say(str(chosen.text), agent_name=agent.name, turn_id=chosen.turn_id)
            await person.wire.nothing_more()
            return
        sent = [turn for turn in agent.sent.values() if turn.text and turn not in agent.waiting] if agent else []
        if agent is None or not sent:
            return
        chosen, same = self.rng.choice(sent[-4:]), self.chance(0.75)
        fields = {"agent_name": agent.name, "turn_id": chosen.turn_id}
        told = [event for event in agent.events if event.get("turn_id") == chosen.turn_id]
        async with wire(self.server, "*") as client:
            request_id = await client.say(str(chosen.text) if same else "another text", **fields)
            if not same:
                (frame,) = await client.until(is_terminal)
                assert (frame["code"], frame["id"]) == ("turn_id_reused", request_id)
                return
            frames = await client.until(lambda frame: frame.get("seq") == told[-1]["seq"])
            assert [stored(frame) for frame in frames if "seq" in frame] == told
            ends = [frame["id"] for frame in frames if frame["type"] != "agent_response"]
            assert ends == [request_id] * (2 if is_terminal(told[-1]) else 1)

    async def cancel(self) -> None:
        person, name = self.somebody(), self.named()
        agent = self.live.get(name)
        if agent is None:
            return await person.refused("cancel", "unknown_agent", agent_name=name)
        over = [event["turn_id"] for event in agent.events if is_terminal(event)]
        ways = [("cancelling", agent.running.turn_id)] * 2 if agent.running else [("over", None)]
        ways += [("removed", item.turn_id) for item in agent.waiting[-1:]] * 3 + [("over", each) for each in over[:1]]
        state, turn_id = self.rng.choice([*ways, ("cancelling" if agent.running else "over", None), ("", "never seen")])
        chosen = {"turn_id": turn_id} if turn_id else {}
        if not state:
            return await person.refused("cancel", "unknown_turn", agent_name=name, **chosen)
        assert await person.wire.ok("cancel", agent_name=name, **chosen) == {"state": state}
        if state == "cancelling":
            await self.settle(agent)
        if state == "removed":
            item = agent.waiting.pop()
            del agent.sent[item.turn_id]
            if item.sender is not None:
                await item.sender.wire.ok("list_agents", limit=1)
                ends = [f for f in item.sender.wire.frames if f.get("turn_id") == item.turn_id and is_terminal(f)]
                assert [(end["code"], end["id"]) for end in ends] == [("cancelled", item.request_id)]
        return None

    async def subscribe(self) -> None:
        person, name = self.somebody(), self.named()
        agent = self.live.get(name)
        if agent is None:
            return await person.refused("subscribe", "unknown_agent", agent_name=name)
        for after in (-1, 10**9, 2**60, "0", 1.5, True, [], {}) if self.chance(0.15) else ():
            error = await person.wire.refused("subscribe", agent_name=name, after=after)
            assert (error["code"], error["last_seq"] >= agent.last_seq) == ("unknown_seq", True)
        seq = self.rng.choice([None, self.rng.randint(0, agent.last_seq)])
        answer = await person.wire.ok("subscribe", agent_name=name, **({} if seq is None else {"after": seq}))
        assert answer["last_seq"] >= agent.last_seq
        person.subscribed.add(agent)
        person.cursor[agent] = agent.last_seq if seq is None else seq
        due = [event for event in agent.events if event["seq"] > person.cursor[agent] and person.wants(event)]
        if due:
            await person.wire.until(lambda frame: frame.get("seq") == due[-1]["seq"])
        return None

    async def unsubscribe(self) -> None:
        person = self.somebody()
        if person.subscribed:
            agent = min(person.subscribed, key=lambda agent: agent.name)
            await person.wire.ok("unsubscribe", agent_name=agent.name)
            person.subscribed.discard(agent)

    async def edit(self) -> None:
        person, name, old = self.somebody(), self.named(), self.chance()
        if name in self.live:
            version = (await person.wire.ok("get_agent", agent_name=name))["blocks"][1]["version"]
            fields = {"agent_name": name, "label": "human", "value": f"Number {next(self.count)}"}
            answer = await person.wire.command("set_block", **fields, version=version + old)
            assert answer["error"]["code"] == "conflict" if old else answer["result"]["version"] == version + 1

    async def work(self) -> None:
        person, command, agent = self.somebody(), self.rng.choice(["wake", "compact"]), self.live.get(self.named())
        if agent is None:
            return
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

    async def restart(self) -> None:
        """The server stops and starts, or is replaced by one on the file as a crash would leave it in this moment."""
        if self.moves <= 8:
            return
        self.moves = 0
        people, stopped, crash = list(self.present), self.server, self.chance(0.6)
        if crash:
            self.crashed = True
            await self.connections.aclose()
            left, self.db = self.db, self.db.with_name(f"{next(self.count)}.db")
            shutil.copy(left, self.db)
            shutil.copy(f"{left}-wal", f"{self.db}-wal")
        await asyncio.to_thread(stopped.stop)
        if not crash:
            for person in people:
                await self.told_of_the_stop(person)
            await self.connections.aclose()
        self.forget(*people)
        for agent in self.everyone():
            agent.lose()
        await self.start()
        await self.check()
        for person in people:
            await self.enter(person.types)

    async def told_of_the_stop(self, person: Person) -> None:
        """Its running turn has its end, what waited is refused, and the connection is closed with 1001."""
        with contextlib.suppress(AssertionError):
            await person.wire.closed()
        assert person.wire.websocket.close_code == 1001
        for agent in self.live.values():
            self.check_ends(agent, person, person.wire.frames[person.read :], "interrupted", "cancelled")


@pytest.mark.anyio
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whatever_clients_do(
    seed: int, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request is answered as the protocol says, nothing is lost, doubled or out of order, across restarts too."""
    endpoint.default = answer
    monkeypatch.setattr(memws, "MAX_WAITING_SESSION", 2)
    monkeypatch.setattr(memws, "MAX_WAITING_AGENT", 3)
    await World(endpoint, tmp_path, seed).play()
