"""The processes beside the one that measures, each with one part, so that no part's CPU counts as another's.

    python peers.py model | echo | serve FLAGS… | serve-tool FLAGS…
                    bare URL | search FILE DATA… | bystander URL ECHO AGENT

A part prints its address, or an empty line, then answers each line of JSON on standard input with one on standard
output.
"""

import asyncio
import gc
import json
import os
import runpy
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from measure import finished, memory  # noqa: E402

JSON = dict[str, Any]


def answer_requests(answer: Callable[[JSON], object]) -> None:
    """Answer what comes on standard input until it ends; then the process ends, whatever else it does."""
    for line in sys.stdin:
        say(json.dumps(answer(json.loads(line))))
    os._exit(0)


def say(text: str = "") -> None:
    print(text, flush=True)


def look_inside(request: JSON) -> JSON:
    """What a server's process used so far: CPU seconds, MiB of memory."""
    if request.get("collect"):
        gc.collect()
    return {"cpu": time.process_time(), "memory": memory()}


def serve_part(listen: Callable[[], Awaitable[Any]], address: str, answer: Callable[[JSON], object]) -> None:
    """Serve what `listen` gives, say where, and answer requests."""

    async def main() -> None:
        async with await listen() as server:
            say(address.format(next(iter(server.sockets)).getsockname()[1]))
            await server.serve_forever()

    threading.Thread(target=answer_requests, args=(answer,), daemon=True).start()
    asyncio.run(main())


def serve_model() -> None:
    """The model, which also gives the last request that it got."""
    from model import Model

    async def listen() -> asyncio.Server:
        return await asyncio.get_running_loop().create_server(Model, "127.0.0.1", 0, backlog=1024)

    serve_part(listen, "http://127.0.0.1:{}/v1", lambda request: json.loads(Model.last))


def serve_echo() -> None:
    """Bare websockets, with memws's settings: without compression."""
    from websockets.asyncio.server import Server, ServerConnection, serve

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async def listen() -> Server:
        return await serve(echo, "127.0.0.1", 0, compression=None, backlog=1024)

    serve_part(listen, "ws://127.0.0.1:{}", look_inside)


def compute() -> str:
    end, number = time.monotonic() + 5, 1
    while time.monotonic() < end:
        for _ in range(10_000):
            number = number * 3 % 1_000_003
    return str(number)


def serve_memws(*flags: str) -> None:
    """`python memws.py serve FLAGS…`, a script that is compiled anew, which also tells what it uses."""
    threading.Thread(target=answer_requests, args=(look_inside,), daemon=True).start()
    sys.argv = [str(HERE.parents[1] / "memws.py"), "serve", *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def serve_with_tool(*flags: str) -> None:
    """The same command line with a tool that computes, which only Python can register."""
    import memws

    threading.Thread(target=answer_requests, args=(look_inside,), daemon=True).start()
    opened = memws.WebSocketServer.open
    memws.WebSocketServer.open = lambda self: self.tool(compute) and opened(self)
    sys.exit(memws.main(["serve", *flags]))


def serve_search(file: str, *data: str) -> None:
    """The search of any memws.py, this one's or a former one's, over one agent's growing memory.

    {path} makes the database, {rows} fills it up to so many, {insert} stores so many, each with its own commit, {query}
    asks a list of queries; each answer is how many seconds every one of them took.
    """
    sys.path.insert(0, str(Path(file).absolute().parent))
    from retrieval import Filled, grown, load

    say()
    filled = Filled(json.loads(sys.stdin.readline())["path"], grown(load(data)))
    say("[]")

    def answer(request: JSON) -> list[float]:
        if "rows" in request:
            return [filled.insert(request["rows"] - filled.rows)]
        if "insert" in request:
            return [filled.insert(1) for _ in range(request["insert"])]
        return [filled.search(query) for query in request["query"]]

    answer_requests(answer)


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

    async def some(calls: int, body: JSON) -> JSON:
        cpu = time.process_time()
        seconds = [await ask(body) for _ in range(calls)]
        return {"seconds": seconds, "cpu": (time.process_time() - cpu) / len(seconds)}

    async def many(clients: int, seconds: float, body: JSON) -> JSON:
        return {"count": await finished(clients, seconds, lambda _: ask(body))}

    loop = asyncio.new_event_loop()
    say()
    answer_requests(lambda request: loop.run_until_complete((many if "clients" in request else some)(**request)))


def bystander(url: str, echo_url: str, agent: str) -> None:
    """Two clients that ask every 5 ms, one memws for an agent, one an echo, until anything is asked of this process."""
    from websockets.asyncio.client import connect

    async def main() -> None:
        waits: dict[str, list[float]] = {"command": [], "echo": []}
        text = json.dumps({"type": "command", "command": "get_agent", "agent_name": agent, "id": 1})
        options: JSON = {"compression": None, "max_size": None, "ping_interval": None}
        over = asyncio.Event()
        asyncio.get_running_loop().add_reader(0, over.set)
        async with connect(url, **options) as memws, connect(echo_url, **options) as echo:
            await memws.send(text)
            await memws.recv()
            say()
            while not over.is_set():
                for name, connection in (("command", memws), ("echo", echo)):
                    await asyncio.sleep(0.0025)
                    start = time.perf_counter()
                    await connection.send(text)
                    await connection.recv()
                    waits[name].append(time.perf_counter() - start)
        say(json.dumps(waits))

    asyncio.run(main())


PARTS: dict[str, Callable[..., None]] = {"model": serve_model, "echo": serve_echo, "serve": serve_memws, "bare": bare}
PARTS |= {"serve-tool": serve_with_tool, "bystander": bystander, "search": serve_search}

if __name__ == "__main__":
    PARTS[sys.argv[1]](*sys.argv[2:])
