"""Peers that are slow: python tests/soak/readers.py [--seed N] [--count N]

While a model streams without end, peers follow it that never read, or never finish their handshake or a frame.
The count is that of each kind of readers; there are four times as many of each other kind.
"""

import asyncio
import contextlib
import json
import random
import re
import socket
import time
from pathlib import Path

import soaking
from commandline import Serving
from endpoint import Body, Reply, greet
from measure import memory
from soaking import Site, Soak, client, handshake, healthy_client, narrow_socket, site, until
from websockets.frames import Frame, Opcode
from wire import JSON, Wire, events_of, is_terminal, of_kind

import memws

WHAT, COUNT = "readers that never read, half handshakes, half frames", 50
TURNS = 30
CHUNK = 1_000
ASKED = 40  # questions at once, with answers of 100 KB: more than the system takes for a reader, some three megabytes
WATCH = 60  # seconds after which a slow peer that is still there stays
FULL: JSON = {"READER_PATIENCE": 8.0, "PING_INTERVAL": 10.0, "PING_TIMEOUT": 20.0, "OPEN_TIMEOUT": memws.OPEN_TIMEOUT}
HASTE: JSON = {"READER_PATIENCE": 2.0, "PING_INTERVAL": 1.0, "PING_TIMEOUT": 2.0, "OPEN_TIMEOUT": 1.0}
"""Constants of the server in a full and in a small run: 60 and 20 + 40 s, as they are, would be most of the run."""
CUT, STAY = "answers without end that are not cut as they should", "slow peers that are never let go"
FAILED = "slow peers that fail"


def frame(text: str) -> bytes:
    return Frame(Opcode.TEXT, text.encode()).serialize(mask=True)


class Slow:
    """A peer of one kind, and how long the server held it."""

    def __init__(self, kind: str, line: socket.socket, rng: random.Random) -> None:
        self.kind, self.line, self.rng = kind, line, rng
        self.is_patient = kind == "reader" or rng.random() < 0.5
        self.since = time.monotonic()
        self.held: float | None = None

    async def begin(self) -> None:
        loop, opening = asyncio.get_running_loop(), handshake(f"Host: 127.0.0.1:{self.line.getpeername()[1]}")
        if self.kind == "half handshake":
            await loop.sock_sendall(self.line, opening[: self.rng.randrange(len(opening) - 60)])
            return
        await loop.sock_sendall(self.line, opening)
        head = b""
        while b"\r\n\r\n" not in head:
            head += await loop.sock_recv(self.line, 1)
        self.since = time.monotonic()
        await loop.sock_sendall(self.line, self.questions() if self.kind == "reader" else self.half_frame())

    async def go_on(self) -> None:
        """Readers, and half of the others, send more every second until the connection is gone."""
        more = frame(json.dumps(ASK)) if self.kind == "reader" else b"x"
        with contextlib.suppress(OSError):
            while self.is_patient:
                await asyncio.sleep(1)  # the pace of somebody slow
                await asyncio.get_running_loop().sock_sendall(self.line, more)

    def questions(self) -> bytes:
        """Follow the agent, half of them from its first event on, and ask; it never reads."""
        hello = {"type": "command", "command": "hello", "message_types": ["*"]}
        subscribe = {"type": "command", "command": "subscribe", "agent_name": "long"}
        subscribe |= self.rng.choice([{}, {"after": 0}])
        return b"".join(frame(json.dumps(each)) for each in (hello, subscribe, *[ASK] * ASKED))

    def half_frame(self) -> bytes:
        whole = frame("x" * round(100 * 10 ** (4 * self.rng.random())))
        return whole[: self.rng.randrange(1, len(whole) // 2)]


ASK = {"type": "command", "command": "search_memory", "agent_name": "long", "query": "", "store": "archival"}


def peers(port: int) -> set[int]:
    """The ports of the peers whose connections a server holds open."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    return {int(row[2].split(":")[1], 16) for row in rows if row[1].endswith(f":{port:04X}") and row[9] != "0"}


async def watch(server: Serving, slow: list[Slow], sizes: list[float]) -> None:
    """Look at a server all the time: how much memory it holds, and when each slow peer is gone."""
    while True:
        sizes.append(memory(server.process.pid))
        there = peers(server.port)
        for each in slow:
            if each.held is None and each.line.getsockname()[1] not in there:
                each.held = time.monotonic() - each.since
        await asyncio.sleep(0.1)  # nothing in /proc tells when it changes


class Writer:
    """The model: asked to write, it says a text again and again, without end; the first time only once released."""

    def __init__(self, rng: random.Random) -> None:
        words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(2, 10))) for _ in range(400)]
        self.text, self.asked = " ".join(words)[:CHUNK], 0

    def __call__(self, body: Body) -> Reply:
        if "tools" not in body or "Write a lot" not in json.dumps(body["messages"][-1]):
            return greet(body)
        self.asked += 1
        calls = [("send_message", '{"message": "' + self.text.rjust(2 * CHUNK - 13))]
        return Reply("I write.", calls=calls, chunk=CHUNK, endless=True, hold=self.asked == 1)

    def is_cut(self, message: str) -> bool:
        """Whether this is what was said up to the limit."""
        whole = self.text * (1 + memws.MAX_REPLY // CHUNK)
        return memws.MAX_REPLY - 2 * CHUNK < len(message) <= memws.MAX_REPLY and whole.startswith(message.lstrip())


async def besiege(place: Site, server: Serving, wire: Wire, model: Writer, limits: JSON) -> None:
    """Let slow peers come while the model streams, and wait until they are gone."""
    soak = place.soak
    turns = max(4, soak.part(TURNS))
    kinds = {"reader": soak.count, "half handshake": soak.part(200), "half frame": soak.part(200)}
    soak.progress.total = turns + sum(kinds.values())
    order = [kind for kind, count in kinds.items() for _ in range(count)]
    soak.rng.shuffle(order)
    slow, sizes, begin = list[Slow](), [memory(server.process.pid)], time.monotonic()
    asked = len(place.endpoint.requests)
    mark = await wire.say("Write a lot")
    await asyncio.to_thread(place.endpoint.wait_requests, asked + 1)
    tasks = [asyncio.create_task(watch(server, slow, sizes))]
    async with contextlib.AsyncExitStack() as lines:
        for number, kind in enumerate(order):
            line = lines.enter_context(await narrow_socket(server.port))
            each = Slow(kind, line, random.Random(f"{soak.seed} {number}"))
            await asyncio.wait_for(each.begin(), WATCH)
            slow.append(each)
            tasks.append(asyncio.create_task(each.go_on()))
        arrival = time.monotonic() - begin  # nothing is streamed before all came
        place.endpoint.release()
        judge(soak, model, await wire.until(lambda told: told.get("id") == mark and is_terminal(told)))
        for _ in range(turns - 1):
            judge(soak, model, await wire.turn("Write a lot"))
            wire.frames.clear()
            soak.step()
        await until(lambda: all(each.held is not None for each in slow), WATCH)
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            soak.demand(not isinstance(result, Exception), FAILED, repr(result))
    soak.figure("memory growth, MiB", max(sizes) - sizes[0], 64)
    let_go = {"half handshake": limits["OPEN_TIMEOUT"], "half frame": limits["PING_INTERVAL"] + limits["PING_TIMEOUT"]}
    let_go["reader"] = arrival + 1.2 * limits["READER_PATIENCE"]
    for kind, count in kinds.items():
        soak.step(count)
        held = [each.held for each in slow if each.kind == kind]
        soak.demand(None not in held, STAY, kind, held.count(None))
        longest = max((WATCH if each is None else each for each in held), default=0.0)
        most = let_go[kind] + memws.STOP_GRACE + 5
        soak.figure(f"{kind}s, {count}: the last is gone after, s", longest, most, is_time=True)


def judge(soak: Soak, model: Writer, frames: list[JSON]) -> None:
    soak.demand(frames[-1].get("stop_reason") == "done", CUT, frames[-1])
    said = [told["message"] for told in of_kind(frames, "assistant_message") if told.get("partial") is True]
    is_cut = len(said) == 1 and model.is_cut(said[0])  # beside it may stand what a warning of the window brings
    soak.demand(is_cut, CUT, [len(message) for message in said])
    is_told = any("100,000" in told["message"] for told in of_kind(frames, "correction"))
    soak.demand(is_told, CUT, "no correction says that it was cut")


async def main(soak: Soak) -> None:
    model, limits = Writer(soak.rng), HASTE if soak.count < soak.full else FULL
    async with site(soak, model) as place:
        server = await place.start("--context-window", "200000", constants=limits)
        async with client(server, "*", agent={"name": "long"}) as wire:
            for _ in range(5):
                await wire.ok("insert_passage", text="x" * 20_000)
            await wire.turn("Hello")
            with healthy_client(place, server):
                await besiege(place, server, wire, model, limits)
        async with client(server, "*") as wire:  # whoever comes later finds all turns, and the agent goes on
            parts = [told for told in of_kind(await events_of(wire, "long"), "assistant_message") if "partial" in told]
            soak.demand(all(model.is_cut(told["message"]) for told in parts), CUT, "another one was stored")
            turn = await wire.turn("Hello", agent_name="long")
            soak.demand(turn[-1].get("stop_reason") == "done", CUT, "the next turn:", turn[-1])
        await place.end(server)
    closed = len(set(re.findall(r"connection (\S+) takes nothing", server.log)))
    soak.figure("readers closed because they took nothing", closed, soak.count, least=True)


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
