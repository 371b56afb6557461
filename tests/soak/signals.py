"""Signals under load: python tests/soak/signals.py [--seed N] [--count N]

SIGTERM and SIGINT, in turn, at random points under eight clients; each server has to end cleanly, in time, and to have
all that it acknowledged. Half of the servers are the command line's, half are programs with tools of their own.
"""

import asyncio
import random
import signal
import time
from pathlib import Path

from kills import AGENTS, CLIENTS, Log, compare, compare_file, session
from soaking import JSON, Soak, client, desk, folder, run, soak_server

# isort: split
from commandline import Serving
from endpoint import Endpoint
from resends import Model
from test_kill import Place

import memws

WHAT, COUNT = "SIGTERM and SIGINT under load", 100


def command_line(where: Path, endpoint: Endpoint) -> Serving:
    """A server as `python memws.py serve` starts it."""
    flags = ["--host", "127.0.0.1", "--rate-limit", "0", "--model", "test-model", "--base-url", endpoint.url]
    return Serving(*flags, cwd=where, variables={"OPENAI_API_KEY": "sk-x"})


async def main(soak: Soak) -> None:
    slowest = 0.0
    logs = [Log(number, AGENTS[number % len(AGENTS)]) for number in range(CLIENTS)]
    with folder() as where, Endpoint() as endpoint:
        endpoint.default = Model(soak.seed)
        async with desk() as (opened, port):
            opened.answers = lambda question: 0.3 * random.Random(question).random()
            options: JSON = {"model": "test-model", "api_key": "sk-x", "base_url": endpoint.url, "desk": port}
            with soak_server(where, **options) as server:
                async with client(server) as wire:
                    for name in AGENTS:
                        config = {"name": name, "tools": ["ask", "ask_later"], "context_window": 16_000}
                        await wire.ok("create_agent", config=config)
                server.end()
            for number in range(soak.count):
                with soak_server(where, **options) if number % 4 > 1 else command_line(where, endpoint) as server:
                    async with client(server) as wire:
                        for name in AGENTS:
                            loaded = await wire.ok("load_agent", name=name)
                            if loaded["repaired"]:
                                soak.fault("left to repair", f"{name}: {loaded['repaired']}")
                    sessions = [asyncio.create_task(session(soak, log, server)) for log in logs]
                    await asyncio.sleep(0.05 + soak.rng.random() * 0.8)
                    begin = time.monotonic()
                    server.process.send_signal(signal.SIGINT if number % 2 else signal.SIGTERM)
                    status = await asyncio.to_thread(server.wait)
                    slowest = max(slowest, time.monotonic() - begin)
                    if status != 0:
                        soak.fault("exit status", status)
                    await asyncio.gather(*sessions)
                    if "Traceback" in server.log:
                        soak.fault("traceback", server.log.partition("Traceback")[2][-800:])
                compare_file(soak, where / "memws.db", logs)
                soak.step()
            with soak_server(where, **options) as server:
                await compare(soak, server, logs)
                server.end()
        with soak.expect("doubled", "the database"):
            Place(where).check()
        for refusal in endpoint.refusals:
            soak.fault("a poisoned request", refusal)
    soak.none("exit status other than 0", "exit status")
    soak.within("slowest end, s: the grace period", slowest, memws.STOP_GRACE)
    soak.none("acknowledged messages and passages lost", "lost")
    soak.none("doubled, or told otherwise later", "doubled", "told otherwise")
    soak.none("agents left to be repaired at the next load", "left to repair")
    soak.none("integrity_check", "integrity")
    soak.none("poisoned requests, tracebacks", "a poisoned request", "traceback")
    soak.told("turns", f"{sum(len(log.turns) for log in logs):,}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
