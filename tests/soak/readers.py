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
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from soaking import Soak, client, handshake, healthy_client, narrow_socket, run, site, until

# isort: split
from commandline import Serving
from endpoint import Body, Endpoint, Reply, greet
from measure import memory
from websockets.frames import Frame, Opcode
from wire import JSON, Wire, events_of, is_terminal, of_kind

import memws

WHAT, COUNT = "readers that never read, half handshakes, half frames", 50
TURNS = 30
CHUNK = 1_000
ASKED = 40  # questions at once, with answers of 100 KB: more than the system takes for a reader, some three megabytes
ARRIVAL = 0.004  # seconds from one peer to the next: many at once would be the system's to refuse, not the server's
WATCH = 60  # seconds after which a slow peer that is still there stays
FULL: JSON = {"READER_PATIENCE": 8.0, "PING_INTERVAL": 10.0, "PING_TIMEOUT": 20.0, "OPEN_TIMEOUT": memws.OPEN_TIMEOUT}
HASTE: JSON = {"READER_PATIENCE": 2.0, "PING_INTERVAL": 1.0, "PING_TIMEOUT": 2.0, "OPEN_TIMEOUT": 1.0}
"""Constants of the server in a full and in a small run: 60 and 20 + 40 s, as they are, would be most of the run."""
CUT = "answers without end that are not cut as they should"


def frame(text: str) -> bytes:
    return Frame(Opcode.TEXT, text.encode()).serialize(mask=True)


class Slow:
    """A peer of one kind, and how long the server held it."""

    def __init__(self, kind: str, port: int, rng: random.Random) -> None:
        self.kind, self.port, self.rng = kind, port, rng
        self.socket: socket.socket | None = None
        self.since = 0.0
        self.held: float | None = None
        self.arrived = asyncio.Event()

    async def begin(self) -> None:
        """Connect, send what this kind sends, half of them more of it every second until the connection is gone."""
        self.socket = line = await narrow_socket(self.port)
        self.name = line.getsockname()[1]
        self.since = time.monotonic()
        loop = asyncio.get_running_loop()
        opening = handshake(f"Host: 127.0.0.1:{self.port}")
        if self.kind == "half handshake":
            await loop.sock_sendall(line, opening[: self.rng.randrange(len(opening) - 60)])
            more = b"x"
        else:
            await loop.sock_sendall(line, opening)
            head = b""
            while b"\r\n\r\n" not in head:
                head += await loop.sock_recv(line, 1)
            self.since = time.monotonic()
            data, more = self._questions() if self.kind == "reader" else self._half_frame()
            await loop.sock_sendall(line, data)
        self.arrived.set()
        if self.kind == "reader" or self.rng.random() < 0.5:
            with contextlib.suppress(OSError):
                for _ in range(WATCH):
                    await asyncio.sleep(1)  # the pace of somebody slow
                    await loop.sock_sendall(line, more)

    def _questions(self) -> tuple[bytes, bytes]:
        """Follow the agent, half of them from its first event on, and ask more and more; it never reads."""
        asked: JSON = {"type": "command", "agent_name": "long", "message_types": ["*"]}
        asked |= {"query": "", "store": "archival"} | ({"after": 0} if self.rng.random() < 0.5 else {})
        commands = ("hello", "subscribe", "search_memory")
        hello, subscribe, ask = (frame(json.dumps({**asked, "command": command})) for command in commands)
        return hello + subscribe + ask * ASKED, ask

    def _half_frame(self) -> tuple[bytes, bytes]:
        whole = frame("x" * round(100 * 10 ** (4 * self.rng.random())))
        return whole[: self.rng.randrange(1, len(whole) // 2)], b"x"


def peers(port: int) -> set[int]:
    """The ports of the peers whose connections a server holds open."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    return {int(row[2].split(":")[1], 16) for row in rows if row[1].endswith(f":{port:04X}") and row[9] != "0"}


@contextlib.asynccontextmanager
async def watched(server: Serving, slow: list[Slow]) -> AsyncIterator[list[float]]:
    """Look at a server all the time: how much memory it holds, and when each slow peer is gone."""
    sizes = [memory(server.process.pid)]

    async def watch() -> None:
        while True:
            sizes.append(memory(server.process.pid))
            there = peers(server.port)
            for each in slow:
                if each.held is None and each.since and each.name not in there:
                    each.held = time.monotonic() - each.since
            await asyncio.sleep(0.1)  # nothing in /proc tells when it changes

    task = asyncio.create_task(watch())
    try:
        yield sizes
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for each in slow:
            if each.socket is not None:
                each.socket.close()


def story(rng: random.Random) -> str:
    """A thousand characters of made-up words."""
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(2, 10))) for _ in range(400)]
    return " ".join(words)[:CHUNK]


def write_on(text: str) -> Callable[[Body], Reply]:
    """Where it is asked to write, say `text` again and again, without end; the first time only once released."""
    asked: list[Body] = []

    def reply(body: Body) -> Reply:
        if "tools" not in body:
            return Reply("They talked.")
        if "Write a lot" not in json.dumps(body["messages"][-1]):
            return greet(body)
        asked.append(body)
        calls = [("send_message", '{"message": "' + text.rjust(2 * CHUNK - 13))]
        return Reply("I write.", calls=calls, chunk=CHUNK, endless=True, hold=len(asked) == 1)

    return reply


def constants(soak: Soak) -> JSON:
    return HASTE if soak.count < soak.full else FULL


async def besiege(soak: Soak, server: Serving, endpoint: Endpoint, wire: Wire, text: str) -> None:
    """Let slow peers come while the model streams, and wait until they are gone."""
    turns = max(4, soak.part(TURNS))
    kinds = {"reader": soak.count, "half handshake": soak.part(200), "half frame": soak.part(200)}
    soak.progress.total = turns + sum(kinds.values())
    order = [kind for kind, count in kinds.items() for _ in range(count)]
    soak.rng.shuffle(order)
    slow = [Slow(kind, server.port, random.Random(f"{soak.seed} {n}")) for n, kind in enumerate(order)]
    async with watched(server, slow) as sizes:
        asked = len(endpoint.requests)
        mark = await wire.say("Write a lot", turn_id="a lot 1")
        await asyncio.to_thread(endpoint.wait_requests, asked + 1)
        begun = []
        for each in slow:
            begun.append(asyncio.create_task(each.begin()))
            await asyncio.sleep(ARRIVAL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(each.arrived.wait() for each in slow)), WATCH)
        endpoint.release()
        judge(soak, text, await wire.until(lambda told: told.get("id") == mark and is_terminal(told)))
        for number in range(2, turns + 1):
            judge(soak, text, await wire.turn("Write a lot", turn_id=f"a lot {number}"))
            wire.frames.clear()
            soak.step()
        if not await until(lambda: all(each.held is not None for each in slow), WATCH):
            stay = [each.kind for each in slow if each.held is None]
            soak.fault("slow peers that are never let go", {kind: stay.count(kind) for kind in kinds})
        for task in begun:
            task.cancel()
        for result in await asyncio.gather(*begun, return_exceptions=True):
            if isinstance(result, Exception):
                soak.fault("slow peers that fail", repr(result))
    soak.figure("memory growth, MiB", max(sizes) - sizes[0], 64)
    limits = constants(soak)
    let_go = {"half handshake": limits["OPEN_TIMEOUT"], "half frame": limits["PING_INTERVAL"] + limits["PING_TIMEOUT"]}
    let_go["reader"] = len(slow) * ARRIVAL + 1.2 * limits["READER_PATIENCE"]  # nothing is streamed before all came
    for kind, count in kinds.items():
        soak.step(count)
        held = [WATCH if each.held is None else each.held for each in slow if each.kind == kind]
        most = let_go[kind] + memws.STOP_GRACE + 5
        soak.figure(f"{kind}s, {count}: the last is gone after, s", max(held, default=0.0), most, is_time=True)


def judge(soak: Soak, text: str, frames: list[JSON]) -> None:
    """A turn whose answer had no end: cut, told as a part, and over."""
    if frames[-1].get("stop_reason") != "done":
        soak.fault(CUT, frames[-1])
    said = [told["message"] for told in of_kind(frames, "assistant_message") if told.get("partial") is True]
    if len(said) != 1 or not is_cut(text, said[0]):  # beside it may stand what a warning of the window brings
        soak.fault(CUT, [len(message) for message in said])
    if not any("100,000" in told["message"] for told in of_kind(frames, "correction")):
        soak.fault(CUT, "no correction says that it was cut")


def is_cut(text: str, message: str) -> bool:
    """Whether this is what was said up to the limit."""
    whole = text * (1 + memws.MAX_REPLY // CHUNK)
    return memws.MAX_REPLY - 2 * CHUNK < len(message) <= memws.MAX_REPLY and whole.startswith(message.lstrip())


async def read_afterwards(soak: Soak, server: Serving, text: str) -> None:
    """Whoever comes later finds all turns, and the agent goes on."""
    async with client(server, "*") as wire:
        frames = await events_of(wire, "long")
        if not all(is_cut(text, told["message"]) for told in of_kind(frames, "assistant_message") if "partial" in told):
            soak.fault(CUT, "another one was stored")
        turn = await wire.turn("Hello", agent_name="long")
        if turn[-1].get("stop_reason") != "done":
            soak.fault(CUT, f"the next turn: {turn[-1]}")


async def main(soak: Soak) -> None:
    soak.none(CUT, "slow peers that are never let go", "slow peers that fail")
    text = story(soak.rng)
    async with site(soak, write_on(text)) as place:
        with place.serve(constants=constants(soak), context_window=200_000) as server:
            async with client(server, "*", agent={"name": "long"}) as wire:
                for _ in range(5):
                    await wire.ok("insert_passage", text="x" * 20_000)
                await wire.turn("Hello")
                with healthy_client(soak, server.url):
                    await besiege(soak, server, place.endpoint, wire, text)
            await read_afterwards(soak, server, text)
    closed = len(set(re.findall(r"connection (\S+) takes nothing", server.log)))
    soak.figure("readers closed because they took nothing", closed, soak.count, least=True)


if __name__ == "__main__":
    run(main, WHAT, COUNT)
