"""A WebSocket proxy in front of a real server: it records both directions, cuts, refuses, swallows and replaces frames.

A test may block on it; in async tests, call `wait` through `asyncio.to_thread`.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from endpoint import Loopback
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

Frame = dict[str, Any]
Pass = list[str | bytes] | None  # what a hook makes of a frame: None lets it pass, a list takes its place


class Proxy(Loopback):
    """A proxy to `upstream` (a ws:// address), while the `with` block lasts."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.refuses: int | None = None  # the HTTP status for new connections; None: they pass
        self.sent: list[Frame] = []  # frames of clients, in order of arrival
        self.received: list[Frame] = []  # frames of the server, in order of arrival
        self.connected = 0  # connections so far
        self.on_sent: Callable[[Frame], bool] = lambda frame: True  # whether a client's frame goes on to the server
        self.on_received: Callable[[Frame], Pass] = lambda frame: None  # what the client gets in place of a frame
        self._pairs: dict[ServerConnection, ClientConnection] = {}

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Break the connection off, without a closing handshake, once there is one; on a loop, through `to_thread`."""
        self.wait(lambda: self._pairs)
        self._loop.call_soon_threadsafe(self.abort)

    def abort(self) -> None:
        """The same for hooks, which run on the proxy's own loop."""
        for client in list(self._pairs):
            client.transport.abort()

    def wait(self, condition: Callable[[], object]) -> None:
        """Block until a condition on `sent`, `received` and `connected` holds. Raises TimeoutError."""
        self._wait(condition, lambda: f"sent: {self.sent[-3:]}, received: {self.received[-3:]}")

    @contextlib.asynccontextmanager
    async def _listening(self) -> AsyncIterator[Server]:
        options: dict[str, Any] = {"compression": None, "max_size": None, "close_timeout": 0.2}
        server = await serve(self._connection, "127.0.0.1", 0, process_request=self._gate, **options)
        yield server
        server.close()
        self.abort()
        await server.wait_closed()

    def _gate(self, connection: ServerConnection, request: Request) -> Response | None:
        if self.refuses is None:
            return None
        return Response(self.refuses, "Refused", Headers([("Content-Length", "0"), ("Connection", "close")]))

    async def _connection(self, client: ServerConnection) -> None:
        try:
            server = await connect(self.upstream, compression=None, max_size=None, close_timeout=0.2)
        except (OSError, ConnectionClosed):
            client.transport.abort()
            return
        self._pairs[client] = server
        with self._news:
            self.connected += 1
            self._news.notify_all()
        forth = self._pump(client, server, self.sent, lambda frame: None if self.on_sent(frame) else [])
        back = self._pump(server, client, self.received, lambda frame: self.on_received(frame))
        pumps = [asyncio.create_task(forth), asyncio.create_task(back)]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        code = server.close_code or client.close_code or 1000
        self._pairs.pop(client, None)
        await asyncio.gather(client.close(code if code in range(1000, 1004) or code == 1013 else 1000), server.close())
        await asyncio.gather(*pumps)

    async def _pump(self, source: Any, sink: Any, frames: list[Frame], hook: Callable[[Frame], Pass]) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for text in source:
                frame = json.loads(text)
                instead = hook(frame)
                if sink.transport.is_closing():
                    return  # cut by the hook
                for each in [text] if instead is None else instead:
                    await sink.send(each)
                with self._news:
                    frames.append(frame)
                    self._news.notify_all()
