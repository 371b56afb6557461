"""Peers that are slow: python tests/soak/readers.py [--seed N] [--count N]

While a reply of 5 MB streams, peers follow it that never read, peers that never finish their handshake, and peers that
never finish a frame. The count is that of the readers; there are four times as many of each other kind.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from soaking import JSON, Probe, Soak, client, folder, memory, run, soak_server, until

# isort: split
from commandline import Serving
from endpoint import Body, Endpoint, Reply, greet
from wire import is_terminal, of_kind

import memws

WHAT, COUNT = "readers that never read, half handshakes, half frames", 50
SIZE = 5_000_000
CHUNK = 1_000
ARRIVAL = 2.0
"Seconds within which all slow peers come."
PATIENCE = 60
HASTE: JSON = {"OPEN_TIMEOUT": 1.0, "PING_INTERVAL": 1.0, "PING_TIMEOUT": 1.0, "SLOW_READER_PATIENCE": 0.5}
"Constants of a small run, which would wait for most of its time."
HANDSHAKE = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(text: str) -> bytes:
    """A masked text frame, as a client sends it; the mask is zeros."""
    data = text.encode()
    size = len(data)
    if size < 126:
        head = struct.pack("!BB", 0x81, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", 0x81, 0xFE, size)
    else:
        head = struct.pack("!BBQ", 0x81, 0xFF, size)
    return head + bytes(4) + data


class Slow:
    """A peer of one kind, and how long the server held it."""

    def __init__(self, kind: str, port: int, rng: random.Random) -> None:
        self.kind, self.port, self.rng = kind, port, rng
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        self.socket.setblocking(False)
        self.since = 0.0
        self.held: float | None = None

    async def begin(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(ARRIVAL * self.rng.random())
        await loop.sock_connect(self.socket, ("127.0.0.1", self.port))
        self.name = self.socket.getsockname()[1]
        self.since = time.monotonic()
        await getattr(self, self.kind)(loop)

    async def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        await loop.sock_sendall(self.socket, HANDSHAKE.format(port=self.port).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += await loop.sock_recv(self.socket, 1)
        self.since = time.monotonic()

    async def reader(self, loop: asyncio.AbstractEventLoop) -> None:
        """Follow the agent, half of them from its first event on, and ask as much as one may; never read."""
        await self._open(loop)
        asked: JSON = {"type": "command", "agent_name": "long", "message_types": ["*"]}
        asked |= {"after": 0} if self.rng.random() < 0.5 else {}
        hello, subscribe, ask = (
            frame(json.dumps({**asked, "command": command})) for command in ("hello", "subscribe", "get_agent")
        )
        await loop.sock_sendall(self.socket, hello + subscribe + ask * (memws.RATE_BURST - memws.RATE_LIMIT))
        await self._drip(loop, ask * memws.RATE_LIMIT)

    async def handshake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send a part of a handshake, half of them a byte a second."""
        text = HANDSHAKE.format(port=self.port).encode()
        await loop.sock_sendall(self.socket, text[: self.rng.randrange(len(text) - 60)])
        if self.rng.random() < 0.5:
            await self._drip(loop, b"x")

    async def half(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send a part of a frame, of any size, half of them a byte a second."""
        await self._open(loop)
        whole = frame("x" * round(100 * 10 ** (4 * self.rng.random())))
        await loop.sock_sendall(self.socket, whole[: self.rng.randrange(1, len(whole) // 2)])
        if self.rng.random() < 0.5:
            await self._drip(loop, b"x")

    async def _drip(self, loop: asyncio.AbstractEventLoop, data: bytes) -> None:
        """Send some more every second, until the connection is gone."""
        with contextlib.suppress(OSError):
            for _ in range(PATIENCE):
                await asyncio.sleep(1)
                await loop.sock_sendall(self.socket, data)


def story(rng: random.Random, size: int) -> str:
    """So many characters of made-up words, of which no two hundred are alike."""
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randrange(2, 10))) for _ in range(20_000)]
    return " ".join(rng.choices(words, k=size // 5))[:size]


def peers(port: int) -> set[int]:
    """The ports of the peers whose connections a server holds open."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]]
    return {int(row[2].split(":")[1], 16) for row in rows if row[1].endswith(f":{port:04X}") and row[9] != "0"}


class Watch:
    """Looks at a server all the time: the most memory, and when each slow peer is gone."""

    def __init__(self, server: Serving) -> None:
        self.server = server
        self.most = 0.0
        self.slow: list[Slow] = []

    async def __call__(self) -> None:
        while True:
            self.most = max(self.most, memory(self.server.process.pid))
            there = peers(self.server.port)
            for each in self.slow:
                if each.held is None and each.since and each.name not in there:
                    each.held = time.monotonic() - each.since
            await asyncio.sleep(0.1)

    async def gone(self) -> bool:
        """Wait until the server holds none of them any more."""
        return await until(lambda: all(each.held is not None for each in self.slow), PATIENCE)


@contextlib.asynccontextmanager
async def watched(server: Serving) -> AsyncIterator[Watch]:
    watch = Watch(server)
    task = asyncio.create_task(watch())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for each in watch.slow:
            each.socket.close()


def answer(text: str) -> Any:
    """Say `text` once, in a stream that stops in the middle until it is released."""
    left = [Reply("I write.", calls=[("send_message", {"message": text})], chunk=CHUNK, stall_after=SIZE // CHUNK // 4)]

    def reply(body: Body) -> Reply:
        if "tools" not in body:
            return Reply("They talked.")
        return left.pop() if left and "Write a lot" in json.dumps(body["messages"][-1]) else greet(body)

    return reply


def started(soak: Soak, where: Path, endpoint: Endpoint) -> Serving:
    """The command line, as users start it; in a small run a server that waits less."""
    if soak.count < soak.full:
        options: JSON = {"model": "test-model", "api_key": "sk-x", "base_url": endpoint.url}
        return soak_server(where, constants=HASTE, **options, rate_limit=memws.RATE_LIMIT)
    flags = ("--host", "127.0.0.1", "--model", "test-model", "--base-url", endpoint.url)
    return Serving(*flags, cwd=where, variables={"OPENAI_API_KEY": "sk-x"})


async def main(soak: Soak) -> None:
    text = story(soak.rng, SIZE)
    with folder() as where, Endpoint() as endpoint:
        endpoint.default = answer(text)
        with started(soak, where, endpoint) as server:
            async with client(server, "*") as wire:
                await wire.ok("create_agent", config={"name": "long"})
                await wire.turn("Hello")
                with Probe(server.url, pause=1.5 / memws.RATE_LIMIT) as probe:
                    growth = await besiege(soak, server, endpoint, wire)
            probe.judge(soak)
            await read_afterwards(soak, server, text)
            if server.end() != 0:
                soak.fault("crash", server.log[-500:])
        if "Traceback" in server.log:
            soak.fault("crash", server.log.partition("Traceback")[2][-800:])
        for refusal in endpoint.refusals:
            soak.fault("crash", refusal)
    soak.most("memory growth, MiB", growth, 64)
    soak.none("the turn's reader and those after it miss something", "reply")
    soak.none("slow peers that are never let go", "stays")
    soak.none("crashes, tracebacks, poisoned requests", "crash")


async def besiege(soak: Soak, server: Serving, endpoint: Endpoint, wire: Any) -> float:
    """Let slow peers come while the reply streams, and wait until they are gone; by how much the memory grew."""
    rng = soak.rng
    before = memory(server.process.pid)
    kinds = {"reader": soak.count, "handshake": soak.part(200), "half": soak.part(200)}
    soak.total(sum(kinds.values()))
    async with watched(server) as watch:
        asked = len(endpoint.requests)
        mark = await wire.say("Write a lot", turn_id="a lot")
        await asyncio.to_thread(endpoint.wait_requests, asked + 1)
        order = [kind for kind, count in kinds.items() for _ in range(count)]
        rng.shuffle(order)
        watch.slow = [Slow(kind, server.port, random.Random(f"{soak.seed} {n}")) for n, kind in enumerate(order)]
        begun = [asyncio.create_task(each.begin()) for each in watch.slow]
        await asyncio.wait(begun, timeout=ARRIVAL + 1)
        endpoint.release()
        reading = asyncio.create_task(wire.until(lambda told: told.get("id") == mark and is_terminal(told)))
        if not await watch.gone():
            soak.fault(
                "stays", {kind: sum(each.kind == kind and each.held is None for each in watch.slow) for kind in kinds}
            )
        frames = await reading
        if frames[-1].get("stop_reason") != "done":
            soak.fault("reply", frames[-1])
        deltas = [told["message"] for told in of_kind(frames, "delta") if told.get("of") == "assistant_message"]
        soak.told("the healthy reader", f"{len(frames):,} frames, {len(deltas):,} of them deltas")
        for task in begun:
            task.cancel()
        for result in await asyncio.gather(*begun, return_exceptions=True):
            if isinstance(result, Exception):
                soak.fault("crash", f"a slow peer: {result!r}")
    for kind, count in kinds.items():
        soak.step(count)
        held = [PATIENCE if each.held is None else each.held for each in watch.slow if each.kind == kind]
        soak.within(f"{kind}s, {count}: the last is gone after, s", max(held, default=0.0), 15)
    return watch.most - before


async def read_afterwards(soak: Soak, server: Serving, text: str) -> None:
    """Whoever comes later finds the whole turn, and the agent goes on."""
    async with client(server, "*") as wire:
        last_seq = (await wire.ok("subscribe", agent_name="long", after=0))["last_seq"]
        frames = [*wire.before_answer, *await wire.until(lambda told: told.get("seq") == last_seq)]
        said = "".join(told["message"] for told in of_kind(frames, "assistant_message") if told.get("parts", 1) > 1)
        if said != text:
            soak.fault("reply", f"{len(said):,} of {len(text):,} characters")
        turn = await wire.turn("Hello", agent_name="long")
        if turn[-1].get("stop_reason") != "done":
            soak.fault("reply", f"the next turn: {turn[-1]}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
