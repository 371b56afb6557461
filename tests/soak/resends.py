"""Cancels, disconnects and messages sent again: python tests/soak/resends.py [--seed N] [--count N]

Each agent has a log of what its clients were told, with which what the database says afterwards is compared. The count
is that of cancels and of disconnects; there are twice as many resends (those across a kill are in kills.py).
"""

import asyncio
import itertools
import random
import time
from typing import Any

from soaking import GONE, Log, Soak, client, run, site

# isort: split
from commandline import Serving
from endpoint import Body, Reply
from measure import percentile
from wire import JSON, Wire, is_terminal, seqs

WHAT, COUNT = "cancels, disconnects and messages sent again", 500
AGENTS = 10
TEXT = "A reply that comes piece by piece, so that a client may leave in the middle of it. "
CONFIG: JSON = {"tools": ["ask", "ask_later"], "context_window": 16_000}


class Model:
    """Answers at random: memory tools, tools that take their time, streams of many pieces."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"model {seed}")
        self.fresh = itertools.count(1)

    def __call__(self, body: Body) -> Reply:
        if "tools" not in body:
            return Reply("They talked.")
        asks = self.rng.choice([0, 0, 1, 1, 2, 3]) if body["messages"][-1]["role"] == "user" else 0
        calls = [self.call() for _ in range(asks)]
        delay = self.rng.choice([0, 0, 0.02])
        if calls:
            calls[-1][1]["request_heartbeat"] = True
            return Reply("I look into it.", calls=calls, chunk=4, delay=delay)
        message = TEXT * self.rng.randrange(1, 8)
        return Reply("I answer.", [("send_message", {"message": message})], chunk=3, delay=delay)

    def call(self) -> tuple[str, Any]:
        tool, text = (
            self.rng.choice(["ask", "ask_later", "ask_later", "archival_memory_insert"]),
            f"q{next(self.fresh)}",
        )
        return tool, {"content" if tool == "archival_memory_insert" else "question": text}


class Agent(Log):
    """One agent, whose clients cancel, leave, and send again."""

    def __init__(self, soak: Soak, name: str, server: Serving) -> None:
        super().__init__(soak, name)
        self.server = server
        self.rng = random.Random(f"{soak.seed} {name}")
        self.cancels: list[float] = []  # seconds until a cancelled turn had its end

    def whole(self, case: str, frames: list[JSON]) -> None:
        """The frames of a turn: one start, gapless, one terminal frame."""
        events = [frame for frame in frames if "seq" in frame]
        first = events[0]["seq"] if events else 0
        if not events or seqs(events) != list(range(first, first + len(events))):
            self.soak.fault("gaps in what is told or stored", f"{case}: {seqs(events)}")
        elif events[0]["type"] != "agent_response_start" or sum(map(is_terminal, events)) != 1:
            text = f"{case}: {events[0]} {events[-1]}"
            self.soak.fault("turns without exactly one start and terminal frame", text)

    async def some_frames(self, wire: Wire) -> list[JSON]:
        """Read up to a random moment."""
        frames: list[JSON] = []
        count = self.rng.choice([0, 0, 1, 2, self.rng.randrange(60), self.rng.randrange(200)])
        while len(frames) < count and not (frames and is_terminal(frames[-1])):
            frames.append(await wire.receive())
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.random() * 0.2)
        return frames

    async def cancel(self) -> None:
        """Cancel at a random moment: the turn ends within a second, in one way or the other."""
        turn_id, text = self.message(f"cancel {len(self.sent)}")
        async with client(self.server, "*") as wire:
            await wire.say(text, agent_name=self.name, turn_id=turn_id)
            frames = await self.some_frames(wire)
            begin = time.monotonic()
            mark = await wire.request("cancel", agent_name=self.name, turn_id=turn_id)
            answer: JSON = {}
            while not (answer and any(map(is_terminal, frames))):
                frame = await wire.receive()
                if frame.get("id") == mark:
                    answer = frame
                else:
                    frames.append(frame)
                    if is_terminal(frame):
                        self.cancels.append(time.monotonic() - begin)
            end = next(frame for frame in frames if is_terminal(frame))
            is_right = end.get("stop_reason") in ("cancelled", "done", "max_steps") or end.get("code") == "cancelled"
            if not is_right or answer.get("result", {}).get("state") not in ("cancelling", "removed", "over"):
                self.soak.fault("cancels not understood", f"{answer} {end}")
            self.keep(*frames)
            if "seq" in end:
                self.whole(turn_id, [frame for frame in frames if frame.get("turn_id") == turn_id])
            else:  # it never became a turn: sent again, it does
                self.keep(*await wire.turn(text, agent_name=self.name, turn_id=turn_id))

    async def disconnect(self) -> None:
        """Leave at a random moment, come back, and go on from the last seq: what came before and the rest are all."""
        turn_id, text = self.message(f"disconnect {len(self.sent)}")
        async with client(self.server, "*") as wire:
            after = (await wire.ok("subscribe", agent_name=self.name))["last_seq"]
            await wire.say(text, agent_name=self.name, turn_id=turn_id)
            before = await self.some_frames(wire)
            wire.websocket.transport.abort()
        async with client(self.server, "*") as wire:
            await wire.ok("subscribe", agent_name=self.name, after=max(seqs(before), default=after))
            rest = await wire.turn(text, agent_name=self.name, turn_id=turn_id)  # it may never have arrived
            await wire.command("list_agents", limit=1)
            rest += wire.before_answer
        found = seqs(before + rest)
        if sorted(set(found)) != list(range(after + 1, max(found) + 1)):
            self.soak.fault("gaps in what is told or stored", f"{turn_id}: after {after}, {found}")
        self.keep(*before, *rest)

    async def resend(self) -> None:
        """The same message from several connections, at random moments: each gets the whole turn, which runs once."""
        turn_id, text = self.message(f"resend {len(self.sent)}")

        async def sender(number: int, pause: float) -> list[JSON]:
            await asyncio.sleep(pause)
            async with client(self.server, "*") as wire:
                return await wire.turn(text, agent_name=self.name, turn_id=turn_id, id=f"sender {number}")

        count = self.rng.randrange(2, 5)
        pauses = [0.0] + [self.rng.choice([0.0, self.rng.random() * 0.3]) for _ in range(count - 1)]
        for number, frames in enumerate(await asyncio.gather(*map(sender, range(count), pauses))):
            self.keep(*frames)
            mine = [frame for frame in frames if frame.get("turn_id") == turn_id]
            self.whole(turn_id, mine)
            if [frame.get("id") for frame in mine if is_terminal(frame)] != [f"sender {number}"]:
                self.soak.fault("senders without an answer, or without its id", mine[-1])
        self.soak.step(count - 2)

    async def work(self, cases: list[str]) -> None:
        """All cases of this agent, one after another."""
        self.rng.shuffle(cases)
        for case in cases:
            try:
                await getattr(self, case)()
            except (TimeoutError, *GONE) as error:
                self.soak.fault("senders without an answer, or without its id", f"{list(self.sent)[-1]}: {error!r}")
            self.soak.step()


async def main(soak: Soak) -> None:
    soak.total(2 * soak.count + soak.part(2_000))
    soak.none("cancels not understood", "senders without an answer, or without its id")
    resends = soak.part(2_000) // 2  # each case sends a message again one to three times, two on average
    cases = ["cancel"] * soak.count + ["disconnect"] * soak.count + ["resend"] * resends
    async with site(soak, Model(soak.seed)) as place:
        place.desk.answers = lambda question: 0.05 * random.Random(question).random()
        with place.serve(max_steps=6) as server:
            agents = [Agent(soak, f"agent{number}", server) for number in range(AGENTS)]
            async with client(server) as wire:
                for agent in agents:
                    await wire.ok("create_agent", config=CONFIG | {"name": agent.name})
            await asyncio.gather(*(agent.work(cases[number::AGENTS]) for number, agent in enumerate(agents)))
        with place.serve() as server:
            async with client(server, "*") as wire:
                for agent in agents:
                    await agent.compare(wire)
    cancels = [seconds for agent in agents for seconds in agent.cancels]
    soak.within("slowest cancel, s", max(cancels, default=0.0), 1.0)
    soak.told("cancels that came in time", f"{len(cancels):,}, half within {1000 * percentile(cancels, 0.5):.0f} ms")
    turns, events = sum(len(agent.sent) for agent in agents), sum(len(agent.events) for agent in agents)
    soak.told("turns", f"{turns:,}, events {events:,}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
