"""Peers that are slow: python tests/soak/readers.py [--seed N] [--count N]

While a model streams without end, turn after turn, peers follow it that never read, that read late, that never finish
their handshake, and that never finish a frame. Every answer is cut, late readers get all that is stored, those that
take no byte are closed. The count is that of each kind of readers; there are four times as many of each other kind.
"""

import asyncio
import contextlib
import json
import random
import re
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from soaking import JSON, Probe, Soak, client, folder, memory, narrow_socket, run, soak_server, until

# isort: split
from commandline import Serving
from endpoint import Body, Endpoint, Reply, greet
from wire import Wire, is_terminal, of_kind, seqs

import memws

WHAT, COUNT = "readers that never read, late readers, half handshakes, half frames", 50
TURNS = 30
CHUNK = 1_000
ASKED = 40
"Questions of a reader at once, with answers of 100 KB: more than the system takes for it, some three megabytes."
ARRIVAL = 2.0  # seconds within which all slow peers come
WATCH = 60  # seconds after which a slow peer that is still there stays
FULL: JSON = {"READER_PATIENCE": 8.0, "PING_INTERVAL": 10.0, "PING_TIMEOUT": 20.0}
HASTE: JSON = {"READER_PATIENCE": 2.0, "PING_INTERVAL": 4.0, "PING_TIMEOUT": 5.0, "OPEN_TIMEOUT": 1.0}
"Constants of the server in a full and in a small run: 60 and 20 + 40 s, as they are, would be most of the run."
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
        self.socket: socket.socket | None = None
        self.since = 0.0
        self.held: float | None = None

    async def begin(self) -> None:
        await asyncio.sleep(ARRIVAL * self.rng.random())
        self.socket = await narrow_socket(self.port)
        self.name = self.socket.getsockname()[1]
        self.since = time.monotonic()
        loop = asyncio.get_running_loop()
        kinds = {"reader": self._reader, "handshake": self._handshake, "half": self._half}
        await kinds[self.kind](loop, self.socket)

    async def _open(self, loop: asyncio.AbstractEventLoop, line: socket.socket) -> None:
        await loop.sock_sendall(line, HANDSHAKE.format(port=self.port).encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += await loop.sock_recv(line, 1)
        self.since = time.monotonic()

    async def _reader(self, loop: asyncio.AbstractEventLoop, line: socket.socket) -> None:
        """Follow the agent, half of them from its first event on, ask more and more; never read."""
        await self._open(loop, line)
        asked: JSON = {
            "type": "command",
            "agent_name": "long",
            "message_types": ["*"],
            "query": "",
            "store": "archival",
        }
        asked |= {"after": 0} if self.rng.random() < 0.5 else {}
        hello, subscribe, ask = (
            frame(json.dumps({**asked, "command": command})) for command in ("hello", "subscribe", "search_memory")
        )
        await loop.sock_sendall(line, hello + subscribe + ask * ASKED)
        await self._drip(loop, line, ask)

    async def _handshake(self, loop: asyncio.AbstractEventLoop, line: socket.socket) -> None:
        """Send a part of a handshake, half of them a byte a second."""
        text = HANDSHAKE.format(port=self.port).encode()
        await loop.sock_sendall(line, text[: self.rng.randrange(len(text) - 60)])
        if self.rng.random() < 0.5:
            await self._drip(loop, line, b"x")

    async def _half(self, loop: asyncio.AbstractEventLoop, line: socket.socket) -> None:
        """Send a part of a frame, of any size, half of them a byte a second."""
        await self._open(loop, line)
        whole = frame("x" * round(100 * 10 ** (4 * self.rng.random())))
        await loop.sock_sendall(line, whole[: self.rng.randrange(1, len(whole) // 2)])
        if self.rng.random() < 0.5:
            await self._drip(loop, line, b"x")

    async def _drip(self, loop: asyncio.AbstractEventLoop, line: socket.socket, data: bytes) -> None:
        """Send some more every second, until the connection is gone."""
        with contextlib.suppress(OSError):
            for _ in range(WATCH):
                await asyncio.sleep(1)
                await loop.sock_sendall(line, data)


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
        return await until(lambda: all(each.held is not None for each in self.slow), WATCH)


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


async def read_late(soak: Soak, server: Serving, last: Callable[[JSON], bool], rng: random.Random) -> None:
    """Follow the agent from its first event on, read nothing for a while, and then all: each stored event, once."""
    await asyncio.sleep(ARRIVAL * rng.random())
    line = await narrow_socket(server.port)
    async with client(server, "*", sock=line, max_queue=1) as wire:
        await wire.ok("subscribe", agent_name="long", after=0)
        await asyncio.sleep(0.4 * (HASTE if soak.count < soak.full else FULL)["READER_PATIENCE"])
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
        while not wire.frames or not last(wire.frames[-1]):
            await wire.receive()
        got = seqs(wire.frames)
    if got != list(range(1, got[-1] + 1)):
        soak.fault("late", f"{len(got)} stored events up to {got[-1]}")


async def main(soak: Soak) -> None:
    text = story(soak.rng)
    constants = HASTE if soak.count < soak.full else FULL
    with folder() as where, Endpoint() as endpoint:
        endpoint.default = write_on(text)
        options: JSON = {"model": "test-model", "api_key": "sk-x", "base_url": endpoint.url, "constants": constants}
        with soak_server(where, **options, context_window=200_000) as server:
            async with client(server, "*") as wire:
                await wire.ok("create_agent", config={"name": "long"})
                for _ in range(5):
                    await wire.ok("insert_passage", text="x" * 20_000)
                await wire.turn("Hello")
                with Probe(server.url) as probe:
                    growth = await besiege(soak, server, endpoint, wire, text)
            probe.judge(soak)
            await read_afterwards(soak, server, text)
            if server.end() != 0:
                soak.fault("crash", server.log[-500:])
        if "Traceback" in server.log:
            soak.fault("crash", server.log.partition("Traceback")[2][-800:])
        for refusal in endpoint.refusals:
            soak.fault("crash", refusal)
    soak.most("memory growth, MiB", growth, 64)
    soak.none("answers without end that are not cut as they should", "reply")
    soak.none("late readers that miss something", "late")
    soak.none("slow peers that are never let go", "stays")
    soak.none("crashes, tracebacks, poisoned requests", "crash")
    closed = len(set(re.findall(r"session (\d+) takes nothing", server.log)))
    soak.least("readers closed because they took nothing", closed, soak.count)


async def besiege(soak: Soak, server: Serving, endpoint: Endpoint, wire: Wire, text: str) -> float:
    """Let slow peers come while the model streams, and wait until they are gone; by how much the memory grew."""
    rng, turns = soak.rng, max(4, soak.part(TURNS))
    before = memory(server.process.pid)
    kinds = {"reader": soak.count, "handshake": soak.part(200), "half": soak.part(200)}
    soak.total(turns + sum(kinds.values()))

    def last(told: JSON) -> bool:
        return is_terminal(told) and told["turn_id"] == f"a lot {turns}"

    async with watched(server) as watch:
        asked = len(endpoint.requests)
        mark = await wire.say("Write a lot", turn_id="a lot 1")
        await asyncio.to_thread(endpoint.wait_requests, asked + 1)
        order = [kind for kind, count in kinds.items() for _ in range(count)]
        rng.shuffle(order)
        watch.slow = [Slow(kind, server.port, random.Random(f"{soak.seed} {n}")) for n, kind in enumerate(order)]
        begun = [asyncio.create_task(each.begin()) for each in watch.slow]
        rngs = [random.Random(f"{soak.seed} late {number}") for number in range(soak.count)]
        late = [asyncio.create_task(read_late(soak, server, last, each)) for each in rngs]
        await asyncio.wait(begun, timeout=ARRIVAL + 1)
        endpoint.release()
        judge(soak, text, await wire.until(lambda told: told.get("id") == mark and is_terminal(told)))
        for number in range(2, turns + 1):
            judge(soak, text, await wire.turn("Write a lot", turn_id=f"a lot {number}"))
            wire.frames.clear()
            soak.step()
        if not await watch.gone():
            soak.fault(
                "stays", {kind: sum(each.kind == kind and each.held is None for each in watch.slow) for kind in kinds}
            )
        for task in begun:
            task.cancel()
        for result in await asyncio.gather(*begun, *late, return_exceptions=True):
            if isinstance(result, Exception):
                soak.fault("crash", f"a slow peer: {result!r}")
    limits = HASTE if soak.count < soak.full else FULL
    let_go = {"reader": ARRIVAL + 1.2 * limits["READER_PATIENCE"]}  # nothing is streamed before all have come
    let_go["half"] = limits["PING_INTERVAL"] + limits["PING_TIMEOUT"]
    for kind, count in kinds.items():
        soak.step(count)
        held = [WATCH if each.held is None else each.held for each in watch.slow if each.kind == kind]
        most = let_go.get(kind, limits.get("OPEN_TIMEOUT", memws.OPEN_TIMEOUT)) + memws.STOP_GRACE + 5
        soak.within(f"{kind}s, {count}: the last is gone after, s", max(held, default=0.0), most)
    return watch.most - before


def judge(soak: Soak, text: str, frames: list[JSON]) -> None:
    """A turn whose answer had no end: cut, told as a part, and over."""
    if frames[-1].get("stop_reason") != "done":
        soak.fault("reply", frames[-1])
    said = [told["message"] for told in of_kind(frames, "assistant_message") if told.get("partial") is True]
    if len(said) != 1 or not is_cut(text, said[0]):  # beside it may stand what a warning of the window brings
        soak.fault("reply", [len(message) for message in said])
    if not any("100,000" in told["message"] for told in of_kind(frames, "correction")):
        soak.fault("reply", "no correction says that it was cut")


def is_cut(text: str, message: str) -> bool:
    """Whether this is what was said up to the limit."""
    whole = text * (1 + memws.MAX_REPLY // CHUNK)
    return memws.MAX_REPLY - 2 * CHUNK < len(message) <= memws.MAX_REPLY and whole.startswith(message.lstrip())


async def read_afterwards(soak: Soak, server: Serving, text: str) -> None:
    """Whoever comes later finds all turns, and the agent goes on."""
    async with client(server, "*") as wire:
        last_seq = (await wire.ok("subscribe", agent_name="long", after=0))["last_seq"]
        frames = [*wire.before_answer, *await wire.until(lambda told: told.get("seq") == last_seq)]
        if seqs(frames) != list(range(1, last_seq + 1)):
            soak.fault("late", f"afterwards: {len(seqs(frames))} of {last_seq} events")
        if not all(is_cut(text, told["message"]) for told in of_kind(frames, "assistant_message") if "partial" in told):
            soak.fault("reply", "another one was stored")
        turn = await wire.turn("Hello", agent_name="long")
        if turn[-1].get("stop_reason") != "done":
            soak.fault("reply", f"the next turn: {turn[-1]}")


if __name__ == "__main__":
    run(main, WHAT, COUNT)
