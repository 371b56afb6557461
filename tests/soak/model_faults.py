"""Faults of the model's side: python tests/soak/model_faults.py [--seed N] [--count N]

A strict endpoint, which refuses what OpenAI's refuses, fails in more than twenty ways at any step of a turn. After each
fault the agent must take a plain turn.
"""

import asyncio
import collections
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from soaking import Site, Soak, client, run, site

# isort: split
from agents import packed
from commandline import Serving
from endpoint import Body, Reply, greet
from wire import JSON, Wire, is_terminal, of_kind

WHAT, COUNT = "faults of the model", 1_000
AGENTS = 12
MAX_STEPS = 8
ENDS = "turns without exactly one start and terminal frame"
OVERFLOW = {"error": {"message": "maximum context length exceeded", "code": "context_length_exceeded"}}
LONG = "A long answer that is streamed piece by piece. " * 10
CONSTANTS = {"RETRY_PAUSE": 0.02, "FIRST_TOKEN_TIMEOUT": 1.5, "MAX_STEPS": MAX_STEPS}

say = ("send_message", {"message": LONG})


def ask(number: int, **more: Any) -> tuple[str, JSON]:
    return "ask_later", {"question": f"q{number}", "request_heartbeat": True, **more}


def kinds(rng: random.Random, fresh: Iterator[int]) -> dict[str, Callable[[], list[Reply]]]:
    """What goes wrong, by name: the answers of the endpoint to one turn; after them it says hello."""
    some = lambda reply: [reply] * rng.choice([1, 2, 3, 9])  # noqa: E731 (a shape that the table below repeats)
    place = lambda: rng.randrange(1, 40)  # noqa: E731
    broken = ["", "{", "[]", "null", '"x"', '{"message": "We', '{"message": 5}', "{}{}", "\x00", "Sure! {}", "[" * 3000]
    failing = ("ask_later", {"wrong": 1})
    return {
        "429": lambda: some(Reply(status=429)),
        "429 with Retry-After 0": lambda: some(Reply(status=429, headers={"Retry-After": "0"})),
        "429 with a long Retry-After": lambda: some(Reply(status=429, headers={"Retry-After": "999"})),
        "429 with a strange Retry-After": lambda: some(
            Reply(status=429, headers={"Retry-After": rng.choice(["-1", "x", "nan", "Wed, 21 Oct 2015 07:28:00 GMT"])})
        ),
        "5xx": lambda: some(Reply(status=rng.choice([500, 502, 503, 504, 529]))),
        "4xx": lambda: some(Reply(status=rng.choice([400, 401, 403, 404, 408, 409, 413, 422]))),
        "HTML with a 5xx": lambda: some(Reply(status=502, body="<html>Bad gateway</html>")),
        "timeout": lambda: [Reply("x", hold=True)] * rng.choice([1, 3]),
        "stall": lambda: [Reply(calls=[say], stall_after=place())] * rng.choice([1, 3]),
        "reset": lambda: some(Reply("Hm, " * 9, calls=[say], cut_after=place())),
        "reset in plain text": lambda: some(Reply(LONG, cut_after=place())),
        "an error in the stream": lambda: some(Reply(LONG, error_in_stream={"message": "overloaded", "code": 500})),
        "HTML with 200": lambda: some(Reply(body="<html><h1>Sign in</h1></html>")),
        "JSON that is none, with 200": lambda: some(Reply(body={"object": rng.choice(["error", None, 5])})),
        "empty choices": lambda: some(Reply("Hello", empty_choices="all")),
        "nothing": lambda: some(Reply()),
        "broken arguments": lambda: some(Reply(calls=[("send_message", rng.choice(broken))])),
        "broken arguments by good ones": lambda: [Reply(calls=[ask(next(fresh)), ("ask_later", rng.choice(broken))])],
        "missing and wrong arguments": lambda: some(Reply(calls=[failing])),
        "unknown tool": lambda: some(Reply(calls=[(rng.choice(["nobody", "", "rm -rf", "x" * 300, "é"]), {"a": 1})])),
        "repeated ids": lambda: [
            Reply(calls=[ask(next(fresh)), ask(next(fresh)), say], call_ids=[rng.choice(["a", "", None])] * 3),
            Reply(calls=[ask(next(fresh))], call_ids=["a"]),
        ],
        "refusal": lambda: some(Reply(refusal="I cannot help with that.")),
        "length": lambda: some(Reply(calls=[("send_message", '{"message": "It was cut')], finish="length")),
        "length in plain text": lambda: some(Reply("It was cut", finish="length")),
        "content filter": lambda: some(Reply("", finish="content_filter")),
        "endless heartbeats": lambda: [Reply(calls=[ask(next(fresh))]) for _ in range(60)],
        "the same call for ever": lambda: [Reply(calls=[ask(next(fresh))])] * 60,
        "context overflow": lambda: some(Reply(status=400, body=OVERFLOW)),
        "many calls, failures among them": lambda: [
            Reply(calls=[rng.choice([ask(next(fresh)), failing, ("nobody", {})]) for _ in range(rng.randrange(2, 9))])
        ],
        "a lone surrogate": lambda: some(Reply(calls=[("send_message", {"message": "\ud83d x \x00"})])),
        "calls as text": lambda: [Reply("Hm", calls=[ask(next(fresh))], calls_as_text=True)],
        "no usage": lambda: some(Reply("Hello", usage={"prompt_tokens": rng.choice([-5, 10**15, "x", None])})),
    }  # fmt: skip


class Model:
    """What the endpoint answers: each user's message names a case, whose answers come one after another."""

    def __init__(self) -> None:
        self.left: dict[str, list[Reply]] = {}
        self.asked: collections.Counter[str] = collections.Counter()

    def __call__(self, body: Body) -> Reply:
        if "tools" not in body:
            return Reply("They talked.")
        messages = packed(body, "user_message")
        case = messages[-1]["message"] if messages else ""
        self.asked[case] += 1
        left = self.left.get(case)
        return left.pop(0) if left else greet(body)


async def check_plain_turn(soak: Soak, wire: Wire, agent: str, case: str) -> None:
    """The agent takes a turn without a fault, and answers."""
    turn = await wire.turn(f"plain {case}", agent_name=agent)
    replies = {frame["message"] for frame in of_kind(turn, "assistant_message")}
    if turn[-1].get("stop_reason") != "done" or replies != {"Hello!"}:  # twice beside a warning of the window
        soak.fault("plain turns after a fault that fail", f"{case}: {turn[-1]}, {replies}")


class Faults:
    """Each kind of fault in turn, on agents side by side."""

    def __init__(self, soak: Soak, model: Model) -> None:
        self.soak, self.model = soak, model
        self.fresh = itertools.count(1)
        self.names = list(kinds(soak.rng, self.fresh))
        self.cases = iter(range(soak.count))

    async def run(self, place: Site) -> None:
        options = {"sync": "normal", "idle_timeout": 0.4, "max_steps": MAX_STEPS, "constants": CONSTANTS}
        with place.serve(**options) as server:
            await asyncio.gather(*(self.work(server, number) for number in range(AGENTS)))
        place.desk.calls.clear()  # some models here ask the same on purpose

    async def work(self, server: Serving, number: int) -> None:
        """One agent, which takes cases while there are any."""
        rng, agent = random.Random(f"{self.soak.seed} {number}"), f"agent{number}"
        table = kinds(rng, self.fresh)
        async with client(server, "*", agent={"name": agent, "tools": ["ask", "ask_later"]}) as wire:
            for case_number in self.cases:
                kind = self.names[case_number % len(self.names)]
                case = f"case {case_number}: {kind}"
                steps = range(rng.choice([0, 0, 1, 2]))
                before = [Reply("Let me see.", calls=[ask(next(self.fresh))]) for _ in steps]
                self.model.left[case] = before + table[kind]()
                try:
                    await self.check(wire, agent, case)
                    await check_plain_turn(self.soak, wire, agent, case)
                except TimeoutError:
                    self.soak.fault(ENDS, f"{case}: {wire.frames[-3:]}")
                    return
                wire.frames.clear()
                self.soak.step()

    async def check(self, wire: Wire, agent: str, case: str) -> None:
        """A turn in which the endpoint fails ends in exactly one terminal frame, and within its limits."""
        turn = await wire.turn(case, agent_name=agent, turn_id=case)
        await wire.ok("list_agents", limit=1)
        end, frames = turn[-1], [*turn, *wire.before_answer]
        starts = sum(frame["type"] == "agent_response_start" for frame in frames)
        if (starts, sum(map(is_terminal, frames))) != (1, 1):
            self.soak.fault(ENDS, f"{case}: {frames}")
        if end.get("code") == "internal" or self.model.asked[case] > MAX_STEPS + 8:
            text = f"{case}: {self.model.asked[case]} model calls, {end}"
            self.soak.fault("turns beyond their limits, or that end as internal", text)
        self.model.left.pop(case, None)


async def main(soak: Soak) -> None:
    soak.none(ENDS, "plain turns after a fault that fail", "turns beyond their limits, or that end as internal")
    model = Model()
    faults = Faults(soak, model)
    async with site(soak, model) as place:
        await faults.run(place)
    soak.least("kinds of faults", min(len(faults.names), soak.count), min(10, soak.count))


if __name__ == "__main__":
    run(main, WHAT, COUNT)
