"""Hostile frames and handshakes: python tests/soak/hostile.py [--seed N] [--count N]

Eight clients send, on one server, requests that are nearly right, JSON that is none, bytes that are no WebSocket and
handshakes that are no HTTP, while a healthy client talks to it. Then they knock with foreign Origins and Hosts, a tenth
as many of each, and with a fiftieth as many wrong tokens: those of test_gate.py, and what is made of them at random.
"""

import asyncio
import collections
import contextlib
import copy
import itertools
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import soaking
from commandline import Serving
from measure import memory
from soaking import GONE, Soak, client, handshake, healthy_client, site, until
from test_gate import ADDRESSES, BAD_HOSTS, BAD_ORIGINS, BREACHES, FOREIGN, TOKEN, WRONG_TOKENS
from test_wire import COMMANDS, HOSTILE, candidates, frame_of, needed
from websockets.asyncio.client import ClientConnection
from wire import JSON, MAX_ERROR_BYTES, TERMINALS, Wire, check_event, is_small

import memws

WHAT, COUNT = "hostile frames and handshakes", 100_000
KEY = "sk-canary-key-93ab"
LEAK = re.compile(rf'Traceback|File "|site-packages|/usr/lib|memws-soak-|memws\.py|\.py:\d|{TOKEN}|{KEY}')
BATCH, WORKERS = 25, 8
NAMES = [f"agent{number}" for number in range(12)]
TEXTS = [
    "", " ", "x", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "../../etc/passwd", "/etc/passwd", "C:\\con", "sam.json",
    "'; DROP TABLE agents; --", '" OR 1=1', "foo AND", "nope:x", "*", "NEAR(", "a\"b", "-", "^", "()", "{{7*7}}",
    "${jndi:ldap://127.0.0.1/}", "%s%n%x", "\x1b[31m\x1b]0;x\x07", "\r\nERROR forged", "<script>alert(1)</script>",
    "\u202e\u2066", "\ufeff", "日本語", "e\u0301", "🦦" * 50, "null", "true", "NaN", "1e999", "__proto__",
    "constructor", "__class__", "None", "a" * 129, "b" * 2_001, "c" * 65_537,
]  # fmt: skip
VALUES: list[Any] = [
    -0.0, 1e308, 2**53 + 1, 2**64, -(2**63) - 1, 10**400, [None], [[]], {"": ""}, [1] * 500, [{}] * 20, {"$gt": ""},
    dict.fromkeys(map(str, range(300))), {"__class__": {"__init__": {}}}, json.loads("[" * 60 + "]" * 60),
    json.loads('{"a":' * 70 + "1" + "}" * 70),
]  # fmt: skip
CONFIG: JSON = {
    "name": "x", "persona": "sam_pov", "human": "basic", "model": None, "context_window": 8000, "max_steps": 5,
    "blocks": [{"label": "x", "value": "y", "limit": 50}], "settings": {"temperature": 1}, "tools": ["send_message"],
}  # fmt: skip
# What makes an agent with a made-up name each time would fill the memory by right; what costs more comes less often.
KINDS = [kind for kind in COMMANDS if kind not in ("fork_agent", "rewind_agent")]
OFTEN = [1 if kind in ("user_message", "create_agent", "compact", "wake") else 4 for kind in KINDS]
FIELDS = {kind: COMMANDS[kind].parameters["properties"] for kind in KINDS}
NEAR = {kind: {name: candidates(schema) for name, schema in fields.items()} for kind, fields in FIELDS.items()}


class Maker:
    """Draws frames; each holds a fresh id, unless it is spoiled."""

    def __init__(self, rng: random.Random, mark: str) -> None:
        self.rng, self.ids = rng, map(f"{mark}-{{}}".format, itertools.count())

    def value(self) -> Any:
        return self.rng.choice(TEXTS) if self.rng.random() < 0.5 else copy.deepcopy(self.rng.choice(VALUES))

    def request(self) -> JSON:
        """A request of which up to three fields are at, near or far beyond their bounds."""
        rng = self.rng
        (kind,) = rng.choices(KINDS, OFTEN)
        frame = frame_of(kind, id=next(self.ids), **needed(kind))
        if rng.random() < 0.8:
            frame |= {name: rng.choice(NAMES) for name in FIELDS[kind].keys() & {"agent_name", "name", "new_name"}}
        if "config" in frame:
            frame["config"] = {name: rng.choice([value, self.value()]) for name, value in CONFIG.items()}
        for name in rng.choices([*FIELDS[kind], rng.choice(TEXTS)], k=rng.choice([0, 1, 1, 1, 2, 3])):
            near = rng.choice(NEAR[kind].get(name, TEXTS))
            frame[name] = self.value() if rng.random() < 0.5 or len(str(near)) > 100_000 else near
        if kind == "user_message" and not isinstance(frame.get("turn_id"), str):
            frame.setdefault("turn_id", next(self.ids))
        if isinstance(frame.get("config"), dict) and kind == "create_agent":
            frame["config"]["name"] = rng.choice([*NAMES, *TEXTS[:4]])
        return frame

    def frame(self) -> str | bytes:
        rng, request = self.rng, self.request()
        text = json.dumps(request)
        kind = rng.randrange(20)
        if kind < 5:
            text = self.spoil(text)
        elif kind < 8:
            return rng.choice(HOSTILE)[0]
        elif kind == 8:
            return rng.choice([text.encode(), text.encode("utf-16"), rng.randbytes(rng.randrange(200)), b""])
        elif kind == 9:
            return json.dumps(self.value())
        elif kind == 10 and rng.random() < 0.03:
            text = json.dumps(request | {"pad": "p" * 900_000})
        nameless = '"type": "user_message"' in text and mark_of(text) is None
        return f"{text}x" if nameless else text  # an answer that nobody could tell from others is no case for us

    def spoil(self, text: str) -> str:
        """A text with something put in or left out, mostly at its begin or end."""
        piece = self.rng.choice([*'\x00\n"",:\\{}[\x7f\u2028\ufeffx', "", "{}", "// c\n", " x", text])
        piece = self.rng.choice([piece, piece, piece, f', "id": "{next(self.ids)}", "type": "command"}}'])
        start = self.rng.choice([0, len(text) - 1, len(text), self.rng.randrange(len(text))])
        return text[:start] + piece + text[self.rng.choice([start, start + 1, len(text)]) :]


def mark_of(text: str | bytes) -> Any:
    """By what the answer to a frame is known: its id, else the turn_id of a user's message; None: by nothing."""
    with contextlib.suppress(ValueError, RecursionError):
        frame = memws.clean_value(json.loads(text)) if isinstance(text, str) else None  # as an answer has its id
        if isinstance(frame, dict):
            turn_id = frame.get("turn_id") if frame.get("type") == "user_message" else None
            is_named = type(frame.get("id")) in (str, int)
            return frame["id"] if is_named else turn_id if isinstance(turn_id, str) else None
    return None


def violation(rng: random.Random) -> bytes:
    """Bytes after the handshake that RFC 6455 does not allow."""
    payload = rng.randbytes(rng.randrange(100))
    head = bytes([rng.randrange(256), rng.choice([len(payload), 0x80 | len(payload)])])
    known = [data for data, code in BREACHES if code]
    return rng.choice([*known, *MORE_BREACHES, head + payload, rng.randbytes(rng.randrange(1, 300))])


MORE_BREACHES = [
    b"\x81\xff" + (2**63).to_bytes(8) + b"\0\0\0\0",  # a size with a sign
    b"\x89\xfe\x00\x7e\0\0\0\0" + b"p" * 126,  # a ping that is too long
    b"\x88\x81\0\0\0\0\x03",  # a close with half a code
    b"\x88\x82\0\0\0\0\x03\xed",  # a close with a code of nobody's
]
LINES = [
    "GET", "GET /", "GET / HTTP/9.9", "\x00", "POST / HTTP/1.1", "G" * 9_000, "GET /" + "a" * 9_000 + " HTTP/1.1",
    "GET http://[::1 HTTP/1.1", "PRI * HTTP/2.0", "GET / HTTP/1.1 x", " GET / HTTP/1.1", "OPTIONS * HTTP/1.1",
]  # fmt: skip
HEADERS = [f"Origin: {origin}" for origin in BAD_ORIGINS] + [f"Content-Length: {size}" for size in ("5", "-1", "x")]
HEADERS += [
    f"Authorization: {token}" for token in ("Bearer", f"Bearer {TOKEN}x", "Basic \xff", "bearer " + "t" * 3_000)
]
HEADERS += ["Transfer-Encoding: chunked", *(f"X: {'z' * size}" for size in (8_000, 9_000, 70_000))]
HOSTS = [*BAD_HOSTS, *ADDRESSES, "\x00", "\xff\xfe", "localhost%00.evil.example", "169.254.169.254", "a" * 7_000]


def wrong_handshake(rng: random.Random, port: int) -> bytes:
    """A request that is no handshake of ours: something in it is foreign, missing or broken."""
    lines = handshake(f"Host: 127.0.0.1:{port}").decode().split("\r\n")[:-2]
    place = rng.randrange(1, len(lines))
    head, broken = lines[place].split(":")[0], rng.choice(["", "x", "\x00", "\t", "é", "0", "a,b,c"])
    changed = [
        [rng.choice(LINES), *lines[1:]],
        [lines[0], f"Host: {rng.choice(BAD_HOSTS)}", *lines[2:]],
        [*lines, lines[place]],
        [*lines[:place], *lines[place + 1 :]],
        [*lines[:place], f"{head}: {broken}", *lines[place + 1 :]],
        [*lines, *["X: y"] * rng.choice([130, 500])],
        [*lines, rng.choice(HEADERS)],
        [rng.randbytes(rng.randrange(1, 2_000)).decode("latin-1")],
    ]
    return "\r\n".join([*rng.choice(changed), "", ""]).encode("latin-1", "replace")


def foreign_host(rng: random.Random, port: int) -> bytes:
    """A Host that is not ours: one, or several joined; half of them with an Origin that agrees."""
    host = rng.choice("@,#:. ").join(rng.choices(HOSTS, k=rng.choice([1, 1, 2, 3])))
    return handshake(f"Host: {host}", *rng.choice([[], [f"Origin: {rng.choice(['http', 'https'])}://{host}"]]))


def foreign_origin(rng: random.Random, port: int) -> bytes:
    made = f"{rng.choice(['http', 'https'])}://{rng.choice('@,#:. ').join(rng.choices(HOSTS, k=rng.choice([1, 1, 2])))}"
    origin = rng.choice([*BAD_ORIGINS, *FOREIGN]) if rng.random() < 0.4 else made
    return handshake(f"Host: 127.0.0.1:{port}", f"Origin: {origin}")


def wrong_token(rng: random.Random, port: int) -> bytes:
    """A token that is not ours: one of the known, or ours with a character changed."""
    at = rng.randrange(len(TOKEN))
    token = TOKEN[:at] + rng.choice(["", "x", "%00", "\xff", '"']) + TOKEN[at + 1 :]
    changed = [([f"Authorization: Bearer {token}"], "/"), ([], f"/?token={token}")]
    headers, path = rng.choice([*changed, ([f"Sec-WebSocket-Protocol: memws, {token}"], "/"), rng.choice(WRONG_TOKENS)])
    return handshake(f"Host: 127.0.0.1:{port}", *headers, line=f"GET {path} HTTP/1.1")


CLOSED, UNANSWERED = "connections closed for a frame, or with 1011", "unanswered, or answered twice"
NOT_JSON, INTERNAL = "replies that are no strict JSON of the protocol", "answers with the code internal"
LARGE, LEAKS = "replies over 4 KiB", "file paths, tracebacks, secrets in replies"
LET_IN, LOGGED = "handshakes let in", "file paths, secrets in the log"
FAILED, RIGHT = "handshakes not answered, or 5xx", "the right ones refused"
KNOCKS: dict[str, Callable[[random.Random, int], bytes]] = {
    LET_IN: wrong_handshake,
    "foreign Origins upgraded": foreign_origin,
    "foreign Hosts upgraded": foreign_host,
    "wrong tokens upgraded": wrong_token,
}


class Attack:
    """Clients that work at once on one server, with all that they draw."""

    def __init__(self, soak: Soak, server: Serving) -> None:
        self.soak, self.server = soak, server
        self.answers = 0

    async def work(self, name: str, cases: int, part: Callable[[random.Random, str, int], Any]) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(WORKERS):
                share = cases // WORKERS + (number < cases % WORKERS)
                group.create_task(part(random.Random(f"{self.soak.seed} {name} {number}"), f"{name}{number}", share))

    async def mixed(self, rng: random.Random, mark: str, cases: int) -> None:
        maker = Maker(rng, mark)
        for start in range(0, cases, 1_000):
            part = min(cases - start, 1_000)
            frames, broken = round(part * 0.9), round(part * 0.03)
            async with self.connection() as wire:
                for first in range(0, frames, BATCH):
                    batch = [maker.frame() for _ in range(min(BATCH, frames - first))]
                    if not await self.is_answered(wire.websocket, batch, next(maker.ids)):
                        break
                    self.soak.step(len(batch))
            for _ in range(broken):
                await self.violate(violation(rng))
            await self.knock(LET_IN, rng, part - frames - broken)

    def connection(self) -> contextlib.AbstractAsyncContextManager[Wire]:
        return client(self.server, additional_headers={"Authorization": f"Bearer {TOKEN}"}, close_timeout=2)

    def read(self, text: str | bytes) -> JSON:
        self.answers += 1
        demand, begin = self.soak.demand, text[:300]
        try:
            frame: JSON = memws.decode_json(text)
            if self.answers % 20 == 0:
                check_event(str(text))
        except Exception as error:  # whatever it is, the frame is wrong
            self.soak.fault(NOT_JSON, f"{begin!r} ({error!r:.200})")
            return {}
        found = LEAK.search(str(text))
        demand(not found, LEAKS, found, begin)
        codes = frame.get("code"), frame.get("error", {}).get("code")
        demand("internal" not in codes, INTERNAL, begin)
        demand(is_small(frame, str(text)), LARGE, begin)
        return frame

    async def is_answered(self, websocket: ClientConnection, batch: list[str | bytes], hello: str) -> bool:
        """Send frames, each of which is answered exactly once; whether the connection can go on."""
        marks = collections.Counter([hello, *map(mark_of, batch)])
        answers: collections.Counter[Any] = collections.Counter()
        try:
            for text in [*batch, json.dumps({"type": "command", "command": "hello", "id": hello})]:
                await websocket.send(text)
            async with asyncio.timeout(30):
                while answers.total() < marks.total():
                    frame = self.read(await websocket.recv())
                    is_end = frame.get("type") in TERMINALS
                    mark = frame["turn_id"] if is_end and "id" not in frame else frame.get("id")
                    if frame.get("type") in ("server_error", "command_response") or (is_end and mark in marks):
                        answers[mark] += 1
        except TimeoutError:
            left = [text[:300] for text in batch if not answers[mark_of(text)]]
            self.soak.fault(UNANSWERED, f"{marks.total() - answers.total()} of {len(batch)}: {left[:3]}")
            return False
        except GONE as error:
            self.soak.fault(CLOSED, f"{websocket.close_code} {websocket.close_reason} {error!r}")
            return False
        twice = answers - marks  # where the server cannot know an id, it may be one more without
        self.soak.demand(not twice.keys() - {None}, UNANSWERED, "twice:", twice)
        return True

    async def violate(self, data: bytes) -> None:
        """Break the WebSocket protocol; the connection is closed with a code of the protocol's."""
        async with self.connection() as wire:
            wire.websocket.transport.write(data)
            wire.websocket.transport.write_eof()
            with contextlib.suppress(*GONE):
                while True:
                    self.read(await asyncio.wait_for(wire.websocket.recv(), 15))
        self.soak.demand(wire.websocket.close_code != 1011, CLOSED, data)
        self.soak.step()

    async def knock(self, kind: str, rng: random.Random, cases: int) -> None:
        """Send what must not open a WebSocket; none gets in, none is answered with a failure of the server's."""
        for _ in range(cases):
            data = KNOCKS[kind](rng, self.server.port)
            status, reply = await self.answer(data)
            self.soak.demand(status != "101", kind, data)
            self.soak.demand(status and not status.startswith("5"), FAILED, status, data)
            is_small = status == "200" or len(reply) <= MAX_ERROR_BYTES  # which is the page or /healthz
            leaks = status != "200" and LEAK.search(reply.decode("latin-1"))
            self.soak.demand(is_small and not leaks, LEAKS, reply[:300])
            self.soak.step()

    async def answer(self, data: bytes) -> tuple[str, bytes]:
        """Send this on a connection of its own; the HTTP status, "" where nothing came, and the head of the answer."""
        reply = b""
        try:
            async with asyncio.timeout(20):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
                with contextlib.suppress(ConnectionError), contextlib.closing(writer):
                    writer.write(data)
                    while b"\r\n\r\n" not in reply and (more := await reader.read(65_536)):
                        reply += more
        except OSError:  # such as a TimeoutError
            return "", b""
        return reply.split(b" ", 2)[1].decode() if reply.startswith(b"HTTP/1.1 ") else "closed", reply

    async def let_in(self, *headers: str) -> None:
        status, _ = await self.answer(handshake(f"Host: 127.0.0.1:{self.server.port}", *headers))
        self.soak.demand(status == "101", RIGHT, status, headers)


def entries(pid: int, folder: str) -> int:
    """How many descriptors (fd) or threads (task) a process has."""
    return len(list(Path(f"/proc/{pid}/{folder}").iterdir()))


async def main(soak: Soak) -> None:
    soak.none(NOT_JSON)
    soak.progress.total = soak.count + 2 * (soak.count // 10) + soak.count // 50
    flags = ("--sync", "normal", "--log-level", "debug")
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}  # where nobody answers
    async with site(soak) as place:
        place.gapless = False
        server = await place.start(*flags, desk=0, variables={**variables, "MEMWS_TOKEN": TOKEN})
        pid, attack = server.process.pid, Attack(soak, server)
        with healthy_client(place, server, TOKEN):
            warm = max(soak.count // 10, min(1_000, soak.count // 2))
            await attack.work("w", warm, attack.mixed)
            before, fds, threads = memory(pid), entries(pid, "fd"), entries(pid, "task")
            await attack.work("h", soak.count - warm, attack.mixed)
            await until(lambda: entries(pid, "fd") <= fds and entries(pid, "task") <= threads, 5)
            # Readers are made when they are first needed, each with a connection.
            spare = max(0, 2 + memws.READERS - threads)
            soak.figure("memory growth, MiB", memory(pid) - before, 16)
            soak.figure("threads more than at the start", entries(pid, "task") - threads, spare)
            soak.figure("descriptors more than at the start", entries(pid, "fd") - fds, 3 * spare)
        origins, hosts, tokens = list(KNOCKS)[1:]
        await attack.work("tokens", soak.count // 50, lambda rng, _, cases: attack.knock(tokens, rng, cases))
        await attack.let_in(f"Authorization: Bearer {TOKEN}")
        await place.end(server)
        for line in server.log.splitlines():
            found = not line.startswith("    ") and LEAK.search(line)  # the lines of a traceback are indented
            soak.demand(not found, LOGGED, found, line[:200])
        attack = Attack(soak, await place.start(*flags, desk=0, variables=variables))
        for kind in (origins, hosts):
            await attack.work(kind, soak.count // 10, lambda rng, _, cases, kind=kind: attack.knock(kind, rng, cases))
        await attack.let_in(f"Origin: http://127.0.0.1:{attack.server.port}")


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
