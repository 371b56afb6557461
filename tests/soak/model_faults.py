"""Faults of the model's side: python tests/soak/model_faults.py [--seed N] [--count N]

A strict endpoint, which refuses what OpenAI's refuses, fails in more than twenty ways at any step of a turn. After each
fault the agent must take a plain turn. Then servers are killed while their agents' tools work.
"""

import asyncio
import collections
import itertools
import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from soaking import GONE, JSON, Desk, Soak, client, desk, folder, run, soak_server

# isort: split
from agents import packed
from endpoint import Body, Endpoint, Reply, greet
from wire import Wire, is_terminal

WHAT, COUNT = "faults of the model, and kills in mid-tool", 1_000
AGENTS = 12
KILLED_AGENTS = 4
MAX_STEPS = 8
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
        "broken arguments beside good ones": lambda: [
            Reply(calls=[ask(next(fresh)), ("ask_later", rng.choice(broken))])
        ],
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
    replies = [frame["message"] for frame in turn if frame.get("message_type") == "assistant_message"]
    if turn[-1].get("stop_reason") != "done" or set(replies) != {"Hello!"}:  # twice beside a warning of the window
        soak.fault("the next plain turn failed", f"{case}: {turn[-1]}, {replies}")


async def check_fault(
    soak: Soak, wire: Wire, model: Model, agent: str, case: str, told: collections.Counter[str]
) -> None:
    """A turn in which the endpoint fails ends in exactly one terminal frame."""
    turn = await wire.turn(case, agent_name=agent, turn_id=case)
    end = turn[-1]
    told[end.get("code") or end["stop_reason"]] += 1
    await wire.ok("list_agents", limit=1)
    terminals = [frame for frame in [*turn, *wire.before_answer] if is_terminal(frame)]
    starts = [frame for frame in turn if frame["type"] == "agent_response_start"]
    if len(terminals) != 1 or len(starts) != 1:
        soak.fault("not exactly one start and terminal frame", f"{case}: {starts} {terminals}")
    if end.get("code") == "internal":
        soak.fault("internal error", f"{case}: {end}")
    if model.asked[case] > MAX_STEPS + 8:
        soak.fault("a turn that goes on", f"{case}: {model.asked[case]} model calls")
    model.left.pop(case, None)


async def faults(soak: Soak, endpoint: Endpoint, where: Path, told: collections.Counter[str]) -> int:
    """Each kind of fault in turn, on twelve agents side by side; how many kinds there are."""
    model = Model()
    endpoint.default = model
    fresh = itertools.count(1)
    names = list(kinds(soak.rng, fresh))
    cases: Iterator[int] = iter(range(soak.count))
    async with desk() as (_, port):
        options: JSON = {"model": "test-model", "base_url": endpoint.url, "api_key": "sk-x", "sync": "normal"}
        options |= {"idle_timeout": 0.4, "max_steps": MAX_STEPS}
        with soak_server(where, constants=CONSTANTS, desk=port, **options) as server:

            async def work(number: int) -> None:
                rng = random.Random(f"{soak.seed} {number}")
                table = kinds(rng, fresh)
                agent = f"agent{number}"
                async with client(server, "*") as wire:
                    await wire.ok("create_agent", config={"name": agent, "tools": ["ask", "ask_later"]})
                    for case_number in cases:
                        kind = names[case_number % len(names)]
                        case = f"case {case_number}: {kind}"
                        steps = range(rng.choice([0, 0, 1, 2]))
                        before = [Reply("Let me see.", calls=[ask(next(fresh))]) for _ in steps]
                        model.left[case] = before + table[kind]()
                        try:
                            await check_fault(soak, wire, model, agent, case, told)
                            await check_plain_turn(soak, wire, agent, case)
                        except TimeoutError:
                            soak.fault("no end", f"{case}: {wire.frames[-3:]}")
                            return
                        wire.frames.clear()
                        soak.step()

            async with asyncio.TaskGroup() as group:
                for number in range(AGENTS):
                    group.create_task(work(number))
            if server.end() != 0:
                soak.fault("crash", server.log[-500:])
        check_log(soak, server.log)
    return len(names)


def check_log(soak: Soak, log: str) -> None:
    for part in log.split("Traceback")[1:]:
        soak.fault("a traceback in the log", part[-400:])


async def kills(soak: Soak, endpoint: Endpoint, where: Path) -> None:
    """Kill servers while tools work; then every agent takes a plain turn, and no call is made again."""
    model = Model()
    endpoint.default = model
    fresh = itertools.count(10**6)
    names = [f"killed{number}" for number in range(KILLED_AGENTS)]
    options = {"model": "test-model", "base_url": endpoint.url, "api_key": "sk-x"}
    async with desk() as (opened, port):
        with soak_server(where, desk=port, **options) as server:
            async with client(server) as wire:
                for name in names:
                    await wire.ok("create_agent", config={"name": name, "tools": ["ask", "ask_later"]})
            server.end()
        stuck: set[str] = set()
        opened.answers = lambda question: None if question in stuck else 0.0
        for number in range(soak.part(100)):
            stuck.clear()
            started = {}
            with soak_server(where, desk=port, **options) as server:
                async with client(server, "*") as wire:
                    for name in names:
                        case = f"kill {number} of {name}"
                        calls = [ask(next(fresh)) for _ in range(soak.rng.randrange(1, 5))]
                        calls = [(soak.rng.choice(["ask", "ask_later"]), arguments) for _, arguments in calls]
                        stuck.add(soak.rng.choice(calls)[1]["question"])
                        model.left[case] = [Reply("I ask.", calls=calls)]
                        started[name] = case
                        await wire.say(case, agent_name=name, turn_id=case)
                    await reached(opened, stuck)
                    server.process.send_signal(signal.SIGKILL)
                    try:
                        while True:
                            await wire.receive()
                    except GONE:
                        server.wait()
            with soak_server(where, desk=port, **options) as server:
                async with client(server, "*") as wire:
                    for name in names:
                        case = started[name]
                        try:
                            again = await wire.turn(case, agent_name=name, turn_id=case)
                            ends = [frame for frame in again if is_terminal(frame)]
                            if [end["stop_reason"] for end in ends] != ["interrupted"]:
                                soak.fault("a killed turn without its end", f"{case}: {ends}")
                            await check_plain_turn(soak, wire, name, case)
                        except TimeoutError:
                            soak.fault("no end", case)
                server.end()
                check_log(soak, server.log)
            soak.step(10 * soak.full / 1_000)
        for question, calls in opened.calls.items():
            if calls > 1:
                soak.fault("a tool called twice", question)


async def reached(opened: Desk, questions: set[str]) -> None:
    """Wait until these questions are asked."""
    async with asyncio.timeout(30), opened.came:
        await opened.came.wait_for(lambda: all(opened.calls[question] for question in questions))


async def main(soak: Soak) -> None:
    soak.total(soak.count + 10 * soak.part(100))
    told: collections.Counter[str] = collections.Counter()
    with folder() as where, Endpoint() as endpoint:
        count = await faults(soak, endpoint, where, told)
        await kills(soak, endpoint, where)
        for refusal in endpoint.refusals:
            soak.fault("a poisoned request", refusal)
        requests = len(endpoint.requests)
    soak.least("kinds of faults", min(count, soak.count), min(10, soak.count))
    soak.none("requests that a strict endpoint refuses", "a poisoned request")
    soak.none("turns without exactly one terminal frame", "not exactly one start and terminal frame", "no end")
    soak.none("plain turns after a fault that fail", "the next plain turn failed")
    soak.none("turns beyond their limits, or that end as internal", "a turn that goes on", "internal error")
    soak.none("killed turns without their end", "a killed turn without its end")
    soak.none("tools called twice for one call", "a tool called twice")
    soak.none("crashes and tracebacks", "crash", "a traceback in the log")
    soak.told("kills in mid-tool", f"{soak.part(100)} servers, {KILLED_AGENTS * soak.part(100)} turns")
    soak.told("model calls", f"{requests:,}; ends {json.dumps(dict(told.most_common()))}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
