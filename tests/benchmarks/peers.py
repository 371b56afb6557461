"""The processes beside the one that measures, each with one part, so that no part's CPU counts as another's.

    python peers.py PART …   model | echo | serve FLAGS… | notebook FLAGS… | bare URL | bystander | crowd

A part prints its address, or an empty line, then answers each line of JSON on standard input with one on standard
output.
"""

import asyncio
import gc
import json
import os
import resource
import runpy
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).absolute().parents[2] / "memws.py"
sys.path[:0] = [str(PROGRAM.parent), str(Path(__file__).absolute().parent)]

JSON = dict[str, Any]


def answer_requests(answer: Callable[[JSON], object]) -> None:
    """Answer what comes on standard input until it ends; then the process ends, whatever else it does."""
    rest = b""
    while data := os.read(0, 1 << 20):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            sys.stdout.write(json.dumps(answer(json.loads(line))) + "\n")
            sys.stdout.flush()
    os._exit(0)


def say(address: str = "") -> None:
    print(address, flush=True)


def memory() -> float:
    """Bytes of memory that the process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * resource.getpagesize()
    except OSError:
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


commits = 0


def count_commits(statement: str) -> None:
    global commits
    commits += statement == "COMMIT"


def counting_connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
    """sqlite3.connect, and each commit is counted."""
    connection: sqlite3.Connection = _connect(*arguments, **options)
    connection.set_trace_callback(count_commits)
    return connection


_connect = sqlite3.connect


def look_inside(request: JSON) -> JSON:
    """What a server's process used so far: CPU seconds, bytes of memory, commits where they are counted."""
    if request.get("collect"):
        gc.collect()
    return {"cpu": time.process_time(), "memory": memory(), "commits": commits}


# ---- servers ---------------------------------------------------------------------------------------------------------


def serve_model() -> None:
    from model import Model

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Model, "127.0.0.1", 0, backlog=1024)
        say(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await server.serve_forever()

    threading.Thread(target=answer_requests, args=(look_inside,), daemon=True).start()
    asyncio.run(main())


def serve_echo() -> None:
    """Bare websockets, with memws's settings: without compression."""
    from websockets.asyncio.server import ServerConnection, serve

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def main() -> None:
        async with serve(echo, "127.0.0.1", 0, compression=None, backlog=1024) as server:
            say(f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}")
            await server.serve_forever()

    threading.Thread(target=answer_requests, args=(look_inside,), daemon=True).start()
    asyncio.run(main())


def compute() -> str:
    """Compute something for five seconds."""
    end, number = time.monotonic() + 5, 1
    while time.monotonic() < end:
        for _ in range(10_000):
            number = number * 3 % 1_000_003
    return str(number)


def serve_memws(*flags: str) -> None:
    """`python memws.py serve FLAGS…`, which also tells what it uses."""
    if "--count" in flags:
        sqlite3.connect = counting_connect  # type: ignore[assignment]
    threading.Thread(target=answer_requests, args=(look_inside,), daemon=True).start()
    sys.argv = [str(PROGRAM), "serve", *(flag for flag in flags if flag != "--count")]
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve_with_tool(*flags: str) -> None:
    """The same command line with a tool that computes, which only Python can register."""
    import memws

    threading.Thread(target=answer_requests, args=(look_inside,), daemon=True).start()
    memws.MEMORY_TOOLS["compute"] = memws.make_tool(compute)
    sys.exit(memws.main(["serve", *flags]))


def serve_notebook(db: str, base_url: str) -> None:
    """The thread form, with a tool that computes."""
    import memws

    server = memws.WebSocketServer(port=0, db=db, base_url=base_url, model="now", rate_limit=0)
    server.tool(compute)
    server.start()
    say(f"memws listening on {server.url}")
    say()
    answer_requests(look_inside)


# ---- clients ---------------------------------------------------------------------------------------------------------


def bare(url: str) -> None:
    """The openai client as its documentation shows it, streaming: {calls, body} or {clients, seconds, body}."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

    async def ask(body: JSON) -> float:
        start = time.perf_counter()
        stream: Any = await client.chat.completions.create(**body)
        async for _ in stream:
            pass
        return time.perf_counter() - start

    async def some(request: JSON) -> JSON:
        cpu = time.process_time()
        seconds = [await ask(request["body"]) for _ in range(request["calls"])]
        return {"seconds": seconds, "cpu": (time.process_time() - cpu) / len(seconds)}

    async def many(request: JSON) -> JSON:
        count, begin = 0, time.monotonic() + 1.0

        async def one(number: int) -> None:
            nonlocal count
            await asyncio.sleep(0.2 * number / request["clients"])
            while time.monotonic() < begin + request["seconds"]:
                await ask(request["body"])
                count += begin <= time.monotonic() < begin + request["seconds"]

        await asyncio.gather(*map(one, range(request["clients"])))
        return {"count": count}

    loop = asyncio.new_event_loop()
    say()
    answer_requests(lambda request: loop.run_until_complete((many if "clients" in request else some)(request)))


def bystander() -> None:
    """Two clients that ask every 5 ms, one memws for its agent, one an echo: {url, echo, agent} begins, {} ends."""
    from websockets.asyncio.client import connect

    over = threading.Event()
    waits: dict[str, list[float]] = {}
    opened = threading.Event()

    async def main(request: JSON) -> None:
        waits.update(command=[], echo=[])
        text = json.dumps({"type": "command", "command": "get_agent", "agent_name": request["agent"], "id": 1})
        options: JSON = {"compression": None, "max_size": None, "ping_interval": None}
        async with connect(request["url"], **options) as memws, connect(request["echo"], **options) as echo:
            await memws.send(text)
            await memws.recv()
            opened.set()
            while not over.is_set():
                for name, connection in (("command", memws), ("echo", echo)):
                    await asyncio.sleep(0.0025)
                    start = time.perf_counter()
                    await connection.send(text)
                    await connection.recv()
                    waits[name].append(time.perf_counter() - start)

    thread: threading.Thread | None = None

    def answer(request: JSON) -> object:
        nonlocal thread
        if request:
            over.clear()
            opened.clear()
            thread = threading.Thread(target=lambda: asyncio.run(main(request)), daemon=True)
            thread.start()
            return opened.wait(20)
        over.set()
        assert thread is not None
        thread.join()
        return waits

    say()
    answer_requests(answer)


class Listener(asyncio.Protocol):
    """A WebSocket client that only looks for the end of a turn: a thousand of these cost little."""

    END = b'"agent_response_end"'

    def __init__(self, host: str, frames: list[bytes]) -> None:
        self._host, self._frames = host, frames
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answers = 0
        self.ended = 0.0
        self.received = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        head = ["GET / HTTP/1.1", f"Host: {self._host}", "Upgrade: websocket", "Connection: Upgrade"]
        head += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", ""]
        transport.write("\r\n".join(head).encode())

    def data_received(self, data: bytes) -> None:
        if not self.received:
            assert b" 101 " in data, data
            for frame in self._frames:  # masked with zeros, which changes nothing
                self.transport.write(bytes([0x81, 0x80 | len(frame), 0, 0, 0, 0]) + frame)
            if not self._frames:
                self.opened.set_result(None)
        self.received += len(data)
        seen = self._tail + data
        if not self.opened.done():
            self.answers += data.count(b'"command_response"')
            if self.answers >= len(self._frames):
                self.opened.set_result(None)
        elif self.END in seen:
            self.ended = time.time()
        self._tail = seen[-len(self.END) :]


def crowd() -> None:
    """Many quiet connections.

    {url, count, frames} opens them, {ended: true} tells when each saw a turn end, {} closes them.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    listeners: list[Listener] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))

    async def fill(request: JSON) -> int:
        host = request["url"].removeprefix("ws://")
        name, _, port = host.rpartition(":")
        frames = [json.dumps(frame).encode() for frame in request["frames"]]
        for _ in range(request["count"]):
            _, listener = await loop.create_connection(lambda: Listener(host, frames), name, int(port))
            listeners.append(listener)
            if len(listeners) % 50 == 0:
                await asyncio.gather(*(each.opened for each in listeners))
        await asyncio.gather(*(each.opened for each in listeners))
        return len(listeners)

    async def leave() -> int:
        for listener in listeners:
            listener.transport.abort()
        listeners.clear()
        return 0

    async def ended() -> list[float]:
        return [each.ended for each in listeners]

    def answer(request: JSON) -> object:
        work: Coroutine[Any, Any, object] = fill(request) if "url" in request else ended() if request else leave()
        return asyncio.run_coroutine_threadsafe(work, loop).result()

    say()
    answer_requests(answer)


PARTS: dict[str, Callable[..., None]] = {
    "model": serve_model,
    "echo": serve_echo,
    "serve": serve_memws,
    "serve-tool": serve_with_tool,
    "notebook": serve_notebook,
    "bare": bare,
    "bystander": bystander,
    "crowd": crowd,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])
