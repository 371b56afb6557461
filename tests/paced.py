"""A server of the protocol, of websockets alone, that plays events at a given pace: for tests of clients."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterable
from typing import Any, Self

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

Frame = dict[str, Any]


class Paced:
    """One agent, `sam`, whose replies are texts in deltas, so many a second; use it with `with`."""

    def __init__(self, commands: Iterable[str] = ("subscribe", "get_agent")) -> None:
        self.commands = list(commands)
        self.url = ""
        self.said: list[str] = []
        "The user's messages, in order."
        self.ended_at = 0.0
        "time.time() when the last turn's end was sent."
        self._seq = 0
        self._history: list[Frame] = []
        self._connections: set[ServerConnection] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="paced", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(5)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(5)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with serve(self._handle, "127.0.0.1", 0) as server:
            self.url = f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}"
            self._ready.set()
            await self._over.wait()

    def remember(self, turns: int) -> None:
        """Have so many turns in the history, of two items each."""
        for number in range(turns):
            self._history += self._turn(f"old{number}", f"question {number}", f"answer {number}, " * 5)

    def _turn(self, turn_id: str, question: str, answer: str) -> list[Frame]:
        return [
            self._frame(turn_id, type="agent_response_start"),
            self._event(turn_id, "user_message", question),
            self._event(turn_id, "assistant_message", answer),
            self._frame(turn_id, type="agent_response_end", stop_reason="done", usage={}),
        ]

    def play(self, text: str, rate: float, size: int = 4) -> None:
        """Stream a reply of one turn in deltas of `size` characters, `rate` a second, and return at its end."""
        asyncio.run_coroutine_threadsafe(self._play(text, rate, size), self._loop).result()

    async def _play(self, text: str, rate: float, size: int) -> None:
        start, user, said, end = self._turn(f"t{self._seq}", "go on", text)
        await self._send(start, user)
        begin = time.monotonic()
        for number, place in enumerate(range(0, len(text), size)):
            await asyncio.sleep(max(0, begin + number / rate - time.monotonic()))
            delta = self._event(start["turn_id"], "delta", text[place : place + size], of="assistant_message")
            del delta["seq"]
            await self._send(delta)
        await self._send(said, end)
        self.ended_at = time.time()

    async def _send(self, *frames: Frame) -> None:
        for frame in frames:
            for connection in list(self._connections):
                with contextlib.suppress(ConnectionClosed):
                    await connection.send(json.dumps(frame))

    def _frame(self, turn_id: str, **fields: Any) -> Frame:
        self._seq += 1
        return {"agent_name": "sam", "turn_id": turn_id, "seq": self._seq, "time": "2026-01-02T03:04:05.678Z"} | fields

    def _event(self, turn_id: str, message_type: str, message: str, **fields: Any) -> Frame:
        return self._frame(turn_id, type="agent_response", message_type=message_type, message=message, step=1) | fields

    async def _handle(self, connection: ServerConnection) -> None:
        try:
            async for text in connection:
                request = json.loads(text)
                if request["type"] == "user_message":
                    self.said.append(request["message"])
                    frames = self._turn(request["turn_id"], request["message"], "noted")
                    for frame in (frames[0], frames[-1]):
                        frame["id"] = request["id"]
                    await self._send(*frames)
                    continue
                command = request["command"]
                answer = {"type": "command_response", "status": "OK", "ok": True, "command": command}
                answer |= {"id": request["id"], "result": self._result(command)}
                await connection.send(json.dumps(answer))
                if command == "subscribe":
                    self._connections.add(connection)
                    for frame in self._history:
                        if frame["seq"] > request.get("after", 10**9):
                            await connection.send(json.dumps(frame))
        except ConnectionClosed:
            pass
        finally:
            self._connections.discard(connection)

    def _result(self, command: str) -> Frame:
        block = {"label": "human", "value": "Name: Ada", "limit": 2000, "version": 1}
        counts = {"messages": 0, "passages": 0, "in_context": 0}
        about = {"version": "9", "protocol": 1, "model": "paced", "models": ["paced"], "offline": False, "limits": {}}
        agent = {"agent_name": "sam", "model": "paced", "last_active": "", "last_seq": self._seq, "state": "idle"}
        results: dict[str, Frame] = {
            "hello": {**about, "commands": self.commands, "message_types": [], "unknown": []},
            "list_agents": {"agents": [agent], "total": 1},
            "load_agent": {**agent, "repaired": [], "warnings": []},
            "get_agent": {"agent_name": "sam", "blocks": [block], "counts": counts, "turn": None},
            "subscribe": {"last_seq": self._seq},
        }
        return results.get(command, {})
