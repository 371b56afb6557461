"""A raw client: every frame it sends and receives is checked against the protocol's JSON Schema and its limits."""

import asyncio
import contextlib
import functools
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

import memws

JSON = dict[str, Any]
LIMIT = 10.0  # seconds after which a frame that does not come has failed the test
MAX_ERROR_BYTES = 4096
UPGRADE = ["Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
UPGRADE += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
TERMINALS = ("agent_response_end", "agent_response_error")

SCHEMA = memws.protocol_schema(memws.known_commands())
_DEFINITIONS = SCHEMA["$defs"]


@functools.cache
def validator(name: str) -> Any:
    return pytest.importorskip("jsonschema").Draft202012Validator(_DEFINITIONS[name])


def _check(frame: JSON, direction: str, name: str) -> None:
    assert {"$ref": f"#/$defs/{name}"} in _DEFINITIONS[direction]["anyOf"]
    validator(name).validate(frame)
    undescribed = frame.keys() - _DEFINITIONS[name]["properties"].keys()
    assert not undescribed, f"{name} has fields that the protocol does not describe: {undescribed}"


def check_event(text: str) -> JSON:
    """The frame of the server, if the protocol describes it, it fits, and its errors are small."""
    frame: JSON = json.loads(text, parse_constant=int)  # which takes neither NaN nor Infinity
    assert len(text.encode()) <= memws.MAX_FRAME
    assert is_small(frame, text)
    named = f"event_{frame.get('message_type')}" if frame["type"] == "agent_response" else frame["type"]
    _check(frame, "event", named)
    return frame


def is_small(frame: JSON, text: str) -> bool:
    """Whether a frame that tells of an error is small: but a conflict shows the stored value, which is no input."""
    is_error = frame["type"] in ("server_error", "agent_response_error") or frame.get("ok") is False
    is_conflict = frame.get("error", {}).get("code") == "conflict"
    return not is_error or is_conflict or len(text.encode()) <= MAX_ERROR_BYTES


def is_terminal(frame: JSON) -> bool:
    return frame["type"] in TERMINALS


class Wire:
    """One connection. What is read is returned by the call that reads it, and kept in `frames`."""

    def __init__(self, websocket: ClientConnection, checks: bool) -> None:
        self.websocket, self.checks = websocket, checks
        self.frames: list[JSON] = []
        self.ids: set[Any] = set()  # of the requests sent
        self._ids = itertools.count(1)

    async def send(self, **frame: Any) -> None:
        if self.checks:
            _check(frame, "request", frame["command"] if frame["type"] == "command" else frame["type"])
        self.ids.add(frame.get("id"))
        await self.send_raw(frame)

    async def send_raw(self, frame: Any) -> None:
        """Send what need not be a request of the protocol: text and bytes as they are, anything else as JSON."""
        await self.websocket.send(frame if isinstance(frame, (str, bytes)) else json.dumps(frame))

    async def receive(self) -> JSON:
        async with asyncio.timeout(LIMIT if self.checks else 3 * LIMIT):
            text = await self.websocket.recv()
        assert isinstance(text, str)
        frame: JSON = check_event(text) if self.checks else json.loads(text)
        self.frames.append(frame)
        return frame

    async def until(self, last: Callable[[JSON], bool]) -> list[JSON]:
        """The next frames, up to the first that is `last`."""
        frames = [await self.receive()]
        while not last(frames[-1]):
            frames.append(await self.receive())
        return frames

    async def nothing_more(self) -> None:
        """Fail if any frame comes before the answer to a command that is sent now: answers keep their order."""
        await self.ok("list_agents", limit=1)
        assert self.before_answer == []

    def new_id(self, what: str) -> str:
        """An id that no request of this connection has had."""
        return f"{what} {next(self._ids)}"

    async def request(self, command: str, **fields: Any) -> str:
        """Send a command; its id."""
        request_id = self.new_id(command)
        await self.send(type="command", command=command, id=request_id, **fields)
        return request_id

    async def command(self, command: str, **fields: Any) -> JSON:
        """Send a command; its answer. What came before the answer is in `before_answer`."""
        request_id = await self.request(command, **fields)
        *self.before_answer, response = await self.until(lambda frame: frame.get("id") == request_id)
        return response

    async def ok(self, command: str, **fields: Any) -> JSON:
        """The result of a command that works."""
        response = await self.command(command, **fields)
        assert (response["type"], response["command"]) == ("command_response", command)
        assert (response["ok"], response["status"][:4], "error" in response) == (True, "OK: ", False), response
        return dict(response["result"])

    async def edit(self, command: str, **fields: Any) -> tuple[JSON, JSON]:
        """The result of a command that works, and the one stored event of it, which comes just before or after."""
        result = await self.ok(command, **fields)
        (event,) = self.before_answer or [await self.receive()]
        return result, event

    async def refused(self, command: str, **fields: Any) -> JSON:
        """The error of a command that cannot be done."""
        response = await self.command(command, **fields)
        assert (response["type"], response["command"]) == ("command_response", command)
        assert (response["ok"], "result" in response) == (False, False), response
        assert response["status"] == f"Error: {response['error']['message']}"
        return dict(response["error"])

    async def misread(self, frame: Any) -> JSON:
        """The server_error that a frame gets which is no request, and the only one."""
        await self.send_raw(frame)
        answer = await self.receive()
        assert answer["type"] == "server_error", answer
        await self.nothing_more()
        return answer

    async def say(self, message: str, **fields: Any) -> Any:
        """Send a user's message; its id."""
        request_id = fields.pop("id") if "id" in fields else self.new_id("message")
        await self.send(type="user_message", message=message, id=request_id, **fields)
        return request_id

    async def turn(self, message: str, **fields: Any) -> list[JSON]:
        """Send a user's message; the frames up to the terminal one that answers it."""
        request_id = await self.say(message, **fields)
        return await self.until(lambda frame: is_terminal(frame) and frame.get("id") == request_id)

    async def started(self) -> JSON:
        return (await self.until(lambda frame: frame["type"] == "agent_response_start"))[-1]

    async def ended(self) -> JSON:
        return (await self.until(is_terminal))[-1]

    async def closed(self) -> int | None:
        """Read until the connection is closed; its close code, None where the peer just died."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self.receive()
        return self.websocket.close_code


@contextlib.asynccontextmanager
async def wire(
    server: Any, *types: str, checks: bool = True, agent: JSON | None = None, **options: Any
) -> AsyncIterator[Wire]:
    """A connection that asks for `types` of messages, makes an agent, and reads; checks cost more than the server."""
    settings: JSON = {"compression": None, "max_size": memws.MAX_FRAME, "max_queue": None}
    async with connect(server.url, **(settings | options)) as websocket:
        opened = Wire(websocket, checks)
        if types:
            await opened.ok("hello", message_types=list(types))
        if agent is not None:
            await opened.ok("create_agent", config=agent)
        yield opened


@contextlib.contextmanager
def beside(database: str) -> Iterator[Any]:
    """A connection of another program to a server's database."""
    with contextlib.closing(memws.database_at(database)) as opened:
        yield opened.connect()


def shape(frames: Iterable[JSON]) -> list[tuple[str, str]]:
    """(kind, message) of frames, to be compared as a whole."""
    return [(frame.get("message_type") or frame["type"], frame.get("message", "")) for frame in frames]


def of_kind(frames: Iterable[JSON], *kinds: str) -> list[JSON]:
    return [frame for frame in frames if frame.get("message_type") in kinds]


def seqs(frames: Iterable[JSON]) -> list[int]:
    """The seqs of the stored events among frames, as they came."""
    return [frame["seq"] for frame in frames if frame["type"] in EVENTS and "seq" in frame]


EVENTS = ("agent_response", "agent_response_start", *TERMINALS)


def bare(frame: JSON) -> JSON:
    """A frame without the mark of whoever asked for it."""
    return {name: value for name, value in frame.items() if name != "id" or frame["type"] == "agent_response"}


async def events_of(client: Wire, name: str = "sam") -> list[JSON]:
    """All stored events of an agent, through a subscription from the beginning."""
    last_seq = (await client.ok("subscribe", agent_name=name, after=0))["last_seq"]
    frames = await client.until(lambda frame: frame.get("seq") == last_seq) if last_seq else []
    await client.ok("unsubscribe", agent_name=name)
    assert seqs(frames) == list(range(1, last_seq + 1))
    return frames


async def message_pages(client: Wire, **fields: Any) -> list[list[JSON]]:
    """All messages of an agent, oldest first, in the pages that get_messages gives."""
    pages: list[list[JSON]] = []
    before = None
    while True:
        page = await client.ok("get_messages", before=before, **fields)
        pages.insert(0, page["messages"])
        if not page["more"]:
            return pages
        before = page["messages"][0]["id"]


async def messages_of(client: Wire, name: str) -> list[str]:
    """What an agent's users have said, oldest first."""
    pages = await message_pages(client, agent_name=name, limit=200)
    return [message["text"] for page in pages for message in page if message["role"] == "user"]
