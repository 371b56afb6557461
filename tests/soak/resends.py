"""Cancels, disconnects and messages sent again: python tests/soak/resends.py [--seed N] [--count N]

Each client keeps a log of what it was told, and what the database says afterwards is compared with it. The count is
that of cancels and of disconnects; there are twice as many resends (those across a kill are in kills.py).
"""

import asyncio
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

from soaking import GONE, JSON, Soak, check_file, client, desk, every, folder, percentile, run, soak_server

# isort: split
from commandline import Serving
from endpoint import Body, Endpoint, Reply
from wire import Wire, bare, events_of, is_terminal, messages_of

WHAT, COUNT = "cancels, disconnects and messages sent again", 500
AGENTS = 10
TEXT = "A reply that comes piece by piece, so that a client may leave in the middle of it. "
OPTIONS: JSON = {"model": "test-model", "api_key": "sk-x", "max_steps": 6}


class Model:
    """Answers at random: memory tools, tools that take their time, streams of many pieces."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"model {seed}")
        self.fresh = itertools.count(1)

    def __call__(self, body: Body) -> Reply:
        rng = self.rng
        if "tools" not in body:
            return Reply("They talked.")
        calls: list[tuple[str, Any]] = []
        if body["messages"][-1]["role"] == "user":
            for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
                question = {"question": f"q{next(self.fresh)}"}
                calls.append(
                    rng.choice(
                        [
                            ("ask", question),
                            ("ask_later", question),
                            ("ask_later", question),
                            ("archival_memory_insert", {"content": question["question"]}),
                        ]
                    )
                )
            if calls:
                calls[-1][1]["request_heartbeat"] = True
                return Reply("I look into it.", calls=calls, chunk=4, delay=rng.choice([0, 0, 0.02]))
        message = TEXT * rng.randrange(1, 8)
        return Reply("I answer.", [("send_message", {"message": message})], chunk=3, delay=rng.choice([0, 0, 0.02]))


class Agent:
    """One agent, the texts that were sent to it, and every stored event that a client was told of."""

    def __init__(self, name: str, soak: Soak) -> None:
        self.name, self.soak = name, soak
        self.rng = random.Random(f"{soak.seed} {name}")
        self.sent: dict[str, str] = {}
        self.told: dict[int, JSON] = {}
        self.slowest: list[float] = []

    def message(self, kind: str) -> tuple[str, str]:
        """A fresh turn_id and its text."""
        turn_id = f"{kind} {len(self.sent)}"
        self.sent[turn_id] = f"{self.name}: {turn_id}"
        return turn_id, self.sent[turn_id]

    def keep(self, frames: list[JSON]) -> None:
        """What a client was told is never told otherwise."""
        for frame in frames:
            if "seq" in frame and frame.get("agent_name") == self.name:
                known = self.told.setdefault(frame["seq"], bare(frame))
                if known != bare(frame):
                    self.soak.fault("told otherwise", f"{known} {frame}")

    def whole(self, case: str, frames: list[JSON]) -> None:
        """The frames of a turn: one start, gapless, one terminal frame."""
        stored = [frame for frame in frames if "seq" in frame]
        seqs = [frame["seq"] for frame in stored]
        if not stored or seqs != list(range(seqs[0], seqs[0] + len(seqs))):
            self.soak.fault("gap or double", f"{case}: {seqs}")
        elif stored[0]["type"] != "agent_response_start" or [is_terminal(f) for f in stored].count(True) != 1:
            self.soak.fault("gap or double", f"{case}: {stored[0]} {stored[-1]}")

    async def some_frames(self, wire: Wire) -> list[JSON]:
        """Read up to a random moment."""
        frames: list[JSON] = []
        count = self.rng.choice([0, 0, 1, 2, self.rng.randrange(60), self.rng.randrange(200)])
        while len(frames) < count and not (frames and is_terminal(frames[-1])):
            frames.append(await wire.receive())
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.random() * 0.2)
        return frames

    async def cancel(self, server: Serving) -> None:
        """Cancel at a random moment: the turn ends within a second, in one way or the other."""
        turn_id, text = self.message("cancel")
        async with client(server, "*") as wire:
            await wire.say(text, agent_name=self.name, turn_id=turn_id)
            frames = await self.some_frames(wire)
            begin = time.monotonic()
            mark = await wire.request("cancel", agent_name=self.name, turn_id=turn_id)
            over = bool(frames) and is_terminal(frames[-1])
            answered = False
            while not over or not answered:
                frame = await wire.receive()
                if frame.get("id") == mark:
                    answered = True
                    state = frame.get("result", {}).get("state")
                    if state not in ("cancelling", "removed", "over"):
                        self.soak.fault("cancel not understood", frame)
                else:
                    frames.append(frame)
                    if is_terminal(frame):
                        over = True
                        self.slowest.append(time.monotonic() - begin)
            end = next(frame for frame in frames if is_terminal(frame))
            if end.get("stop_reason") not in ("cancelled", "done", "max_steps") and end.get("code") != "cancelled":
                self.soak.fault("cancel not understood", end)
            self.keep(frames)
            if "seq" in end:
                self.whole(turn_id, [frame for frame in frames if frame.get("turn_id") == turn_id])
            else:  # it never became a turn: sent again, it does
                frames = await wire.turn(text, agent_name=self.name, turn_id=turn_id)
                self.keep(frames)
        self.soak.step()

    async def disconnect(self, server: Serving) -> None:
        """Leave at a random moment, come back, and go on from the last seq: what came before and the rest are all."""
        turn_id, text = self.message("disconnect")
        async with client(server, "*") as wire:
            after = (await wire.ok("subscribe", agent_name=self.name))["last_seq"]
            await wire.say(text, agent_name=self.name, turn_id=turn_id)
            before = await self.some_frames(wire)
            wire.websocket.transport.abort()
        seen = max((frame["seq"] for frame in before if "seq" in frame), default=after)
        async with client(server, "*") as wire:
            await wire.ok("subscribe", agent_name=self.name, after=seen)
            rest = await wire.turn(text, agent_name=self.name, turn_id=turn_id)  # it may never have arrived
            rest += await wire.until(lambda frame: frame.get("id") == "end") if await self.ask_end(wire) else []
        seqs = [frame["seq"] for frame in before + rest if "seq" in frame]
        if sorted(set(seqs)) != list(range(after + 1, max(seqs) + 1)):
            self.soak.fault("gap or double", f"{turn_id}: after {after}, {seqs}")
        self.keep(before + rest)
        self.soak.step()

    async def ask_end(self, wire: Wire) -> bool:
        await wire.send(type="command", command="list_agents", limit=1, id="end")
        return True

    async def resend(self, server: Serving) -> None:
        """The same message from several connections, at random moments: each gets the whole turn, which runs once."""
        turn_id, text = self.message("resend")

        async def sender(number: int, pause: float) -> list[JSON]:
            await asyncio.sleep(pause)
            async with client(server, "*") as wire:
                return await wire.turn(text, agent_name=self.name, turn_id=turn_id, id=f"sender {number}")

        count = self.rng.randrange(2, 5)
        pauses = [0.0] + [self.rng.choice([0.0, self.rng.random() * 0.3]) for _ in range(count - 1)]
        answers = await asyncio.gather(*(sender(number, pause) for number, pause in enumerate(pauses)))
        for number, frames in enumerate(answers):
            self.keep(frames)
            mine = [frame for frame in frames if frame.get("turn_id") == turn_id]
            self.whole(turn_id, mine)
            if [frame.get("id") for frame in mine if is_terminal(frame)] != [f"sender {number}"]:
                self.soak.fault("terminal frame without its id", mine[-1])
        self.soak.step(count - 1)

    async def check(self, server: Serving) -> None:
        """What is stored is what was told; each message is in the history once."""
        async with client(server, "*") as wire:
            try:
                stored = {frame["seq"]: bare(frame) for frame in await events_of(wire, self.name)}
            except AssertionError as error:
                self.soak.fault("gap or double", f"{self.name}: {error!r}")
                return
            for seq, frame in self.told.items():
                if stored.get(seq) != frame:
                    self.soak.fault("told otherwise", f"{self.name} {seq}: {frame} {stored.get(seq)}")
            texts = await messages_of(wire, self.name)
        for turn_id, text in self.sent.items():
            if texts.count(text) != 1:
                self.soak.fault("lost" if text not in texts else "doubled", f"{self.name} {turn_id}")
            ends = [f for f in stored.values() if f.get("turn_id") == turn_id and is_terminal(f)]
            if len(ends) != 1:
                self.soak.fault("not exactly one terminal frame", f"{self.name} {turn_id}: {ends}")


async def guarded(soak: Soak, agent: Agent, case: Any) -> None:
    try:
        await case
    except (TimeoutError, *GONE) as error:
        soak.fault("no answer", f"{agent.name} {list(agent.sent)[-1]}: {error!r}")


async def side_by_side(soak: Soak, agents: list[Agent], server: Serving) -> None:
    """All cases but kills, shuffled, one after another on each agent."""
    resends = soak.part(2_000)  # each case sends a message again one to three times, two on average

    def cases(agent: Agent, number: int) -> Iterator[str]:
        kinds = ["cancel"] * soak.count + ["disconnect"] * soak.count + ["resend"] * (resends // 2)
        mine = kinds[number::AGENTS]
        agent.rng.shuffle(mine)
        yield from mine

    async def work(agent: Agent, number: int) -> None:
        for kind in cases(agent, number):
            await guarded(soak, agent, getattr(agent, kind)(server))

    await every([work(agent, number) for number, agent in enumerate(agents)], AGENTS)


def end(soak: Soak, server: Serving) -> None:
    if server.end() != 0:
        soak.fault("crash", server.log[-500:])
    if "Traceback" in server.log:
        soak.fault("crash", server.log.partition("Traceback")[2][-500:])


async def main(soak: Soak) -> None:
    soak.total(2 * soak.count + soak.part(2_000))
    with folder() as where, Endpoint() as endpoint:
        endpoint.default = Model(soak.seed)
        agents = [Agent(f"agent{number}", soak) for number in range(AGENTS)]
        async with desk() as (opened, port):
            opened.answers = lambda question: 0.05 * random.Random(question).random()
            options = OPTIONS | {"base_url": endpoint.url, "desk": port}
            with soak_server(where, **options) as server:
                async with client(server) as wire:
                    for agent in agents:
                        config = {"name": agent.name, "tools": ["ask", "ask_later"], "context_window": 16_000}
                        await wire.ok("create_agent", config=config)
                await side_by_side(soak, agents, server)
                end(soak, server)
            with soak.expect("damage", "the database"):
                check_file(where / "memws.db")
            with soak_server(where, **options) as server:
                await every([agent.check(server) for agent in agents], AGENTS)
                end(soak, server)
            for question, calls in opened.calls.items():
                if calls > 1:
                    soak.fault("a tool called twice", question)
        for refusal in endpoint.refusals:
            soak.fault("a poisoned request", refusal)
    slowest = [seconds for agent in agents for seconds in agent.slowest]
    soak.none("messages lost", "lost")
    soak.none("messages or events doubled, gaps in seq", "doubled", "gap or double")
    soak.none("turns without exactly one terminal frame", "not exactly one terminal frame")
    soak.none("events told otherwise later", "told otherwise")
    soak.none("senders without an answer, or without its id", "no answer", "terminal frame without its id")
    soak.none("cancels not understood", "cancel not understood")
    soak.within("slowest cancel, s", max(slowest, default=0.0), 1.0)
    soak.none("tools called twice, poisoned requests", "a tool called twice", "a poisoned request")
    soak.none("crashes, tracebacks, damage", "crash", "damage")
    soak.told("cancels that came in time", f"{len(slowest):,}, half within {1000 * percentile(slowest, 0.5):.0f} ms")
    soak.told("turns", f"{sum(len(agent.sent) for agent in agents):,}, events {sum(len(a.told) for a in agents):,}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
