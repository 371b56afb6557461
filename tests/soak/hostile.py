"""Hostile frames and handshakes: python tests/soak/hostile.py [--seed N] [--count N]

Eight clients send, on one server, requests that are nearly right, JSON that is none, bytes that are no WebSocket and
handshakes that are no HTTP, while a healthy client talks to it. Then they knock with foreign Origins and Hosts, a tenth
as many of each, and with a fiftieth as many wrong tokens: those of test_gate.py, and what is made of them at random.
"""

import asyncio
import collections
import contextlib
import copy
import json
import random
import re
from pathlib import Path
from typing import Any

from soaking import GONE, Soak, handshake, healthy_client, knock, run, site, until

# isort: split
from commandline import Serving
from measure import memory
from test_gate import ADDRESSES, BAD_HOSTS, BAD_ORIGINS, BREACHES, FOREIGN, TOKEN, WRONG_TOKENS
from test_wire import COMMANDS, HOSTILE, candidates, frame_of, needed
from websockets.asyncio.client import ClientConnection, connect
from wire import JSON, MAX_ERROR_BYTES, TERMINALS, check_event

import memws

WHAT, COUNT = "hostile frames and handshakes", 100_000
KEY = "sk-canary-key-93ab"
LEAK = re.compile(rf'Traceback|File "|site-packages|/usr/lib|memws-soak-|memws\.py|\.py:\d|{TOKEN}|{KEY}')
BATCH = 25
WORKERS = 8
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
        self.rng, self.mark, self.number = rng, mark, 0

    def new_id(self) -> str:
        self.number += 1
        return f"{self.mark}-{self.number}"

    def value(self) -> Any:
        return self.rng.choice(TEXTS) if self.rng.random() < 0.5 else copy.deepcopy(self.rng.choice(VALUES))

    def request(self) -> JSON:
        """A request of which up to three fields are at, near or far beyond their bounds."""
        rng = self.rng
        (kind,) = rng.choices(KINDS, OFTEN)
        frame = frame_of(kind, id=self.new_id(), **needed(kind))
        names = {name: rng.choice(NAMES) for name in ("agent_name", "name", "new_name") if name in FIELDS[kind]}
        frame |= names if rng.random() < 0.8 else {}
        if "config" in frame:
            frame["config"] = {name: rng.choice([value, self.value()]) for name, value in CONFIG.items()}
        for name in rng.choices([*FIELDS[kind], rng.choice(TEXTS)], k=rng.choice([0, 1, 1, 1, 2, 3])):
            near = rng.choice(NEAR[kind].get(name, TEXTS))
            frame[name] = self.value() if rng.random() < 0.5 or len(str(near)) > 100_000 else near
        if kind == "user_message" and not isinstance(frame.get("turn_id"), str):
            frame.setdefault("turn_id", self.new_id())
        if isinstance(frame.get("config"), dict) and kind == "create_agent":
            frame["config"]["name"] = rng.choice([*NAMES, *TEXTS[:4]])
        return frame

    def frame(self) -> str | bytes:
        rng = self.rng
        request = self.request()
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
        nameless = '"type": "user_message"' in text and marks_of(text) == (None, None)
        return f"{text}x" if nameless else text  # an answer that nobody could tell from others is no case for us

    def spoil(self, text: str) -> Any:
        """A text with something put in or left out, mostly at its begin or end."""
        piece = self.rng.choice([*'\x00\n"",:\\{}[\x7f\u2028\ufeffx', "", "{}", "// c\n", " x", text])
        piece = self.rng.choice([piece, piece, piece, f', "id": "{self.new_id()}", "type": "command"}}'])
        start = self.rng.choice([0, len(text) - 1, len(text), self.rng.randrange(len(text))])
        return text[:start] + piece + text[self.rng.choice([start, start + 1, len(text)]) :]


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
EXTRA = {
    "Origin": BAD_ORIGINS,
    "Authorization": ["Bearer", "Bearer x", f"Bearer {TOKEN}x", "Basic \xff", "bearer " + "t" * 3_000],
    "Content-Length": ["5", "-1", "x", "9" * 30],
    "Transfer-Encoding": ["chunked"],
    "X": ["z" * size for size in (8_000, 9_000, 70_000)],
}


def wrong_handshake(rng: random.Random, port: int) -> bytes:
    """A request that is no handshake of ours: something in it is foreign, missing or broken."""
    lines = handshake(f"Host: 127.0.0.1:{port}").decode().split("\r\n")[:-2]
    place, kind = rng.randrange(1, len(lines)), rng.randrange(8)
    if kind == 0:
        lines[0] = rng.choice(LINES)
    elif kind == 1:
        lines[1] = f"Host: {rng.choice(BAD_HOSTS)}"
    elif kind == 2:
        lines.append(lines[place])
    elif kind == 3:
        del lines[place]
    elif kind == 4:
        lines[place] = lines[place].split(":")[0] + ": " + rng.choice(["", "x", "\x00", "\t", "é", "0", "a,b,c"])
    elif kind == 5:
        lines += ["X: y"] * rng.choice([130, 500])
    elif kind == 6:
        name = rng.choice(list(EXTRA))
        lines.append(f"{name}: {rng.choice(EXTRA[name])}")
    else:
        return rng.randbytes(rng.randrange(1, 2_000)) + b"\r\n\r\n"
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")


HOSTS = [*BAD_HOSTS, *ADDRESSES, "\x00", "\xff\xfe", "localhost%00.evil.example", "169.254.169.254", "a" * 7_000]


def foreign_host(rng: random.Random) -> str:
    """A Host that is not ours: one, or several joined."""
    return rng.choice("@,#:. ").join(rng.choices(HOSTS, k=rng.choice([1, 1, 2, 3])))


def foreign_origin(rng: random.Random) -> str:
    known = rng.random() < 0.4
    return rng.choice([*BAD_ORIGINS, *FOREIGN]) if known else f"{rng.choice(['http', 'https'])}://{foreign_host(rng)}"


def wrong_token(rng: random.Random) -> tuple[list[str], str]:
    """Headers and a path with a token that is not ours: one of the known, or ours with a character changed."""
    at = rng.randrange(len(TOKEN))
    token = TOKEN[:at] + rng.choice(["", "x", "%00", "\xff", '"']) + TOKEN[at + 1 :]
    changed = [([f"Authorization: Bearer {token}"], "/"), ([], f"/?token={token}")]
    return rng.choice([*changed, ([f"Sec-WebSocket-Protocol: memws, {token}"], "/"), rng.choice(WRONG_TOKENS)])


CLOSED, UNANSWERED = "connections closed for a frame, or with 1011", "unanswered, or answered twice"
NOT_JSON, INTERNAL = "replies that are no strict JSON of the protocol", "answers with the code internal"
LARGE, LEAKS = "replies over 4 KiB", "file paths, tracebacks, secrets in replies"
LET_IN, LOGGED = "handshakes let in", "file paths, secrets in the log"
ORIGINS, FOREIGN_HOSTS, TOKENS = (f"{what} upgraded" for what in ("foreign Origins", "foreign Hosts", "wrong tokens"))
FAILED = "handshakes not answered, or 5xx"


class Attack:
    """What all clients share."""

    def __init__(self, soak: Soak, server: Serving) -> None:
        self.soak, self.server = soak, server
        self.answers = 0

    def read(self, text: str | bytes) -> JSON:
        """A reply, looked at."""
        soak = self.soak
        self.answers += 1
        if not isinstance(text, str):
            soak.fault(NOT_JSON, "binary")
            return {}
        if found := LEAK.search(text):
            soak.fault(LEAKS, f"{found[0]!r} in {text[:300]}")
        try:
            frame: JSON = memws.decode_json(text)
            if self.answers % 20 == 0:
                check_event(text)
        except Exception as error:  # whatever it is, the frame is wrong
            soak.fault(NOT_JSON, f"{text[:300]} ({error!r:.200})")
            return {}
        codes = frame.get("code"), frame.get("error", {}).get("code")
        is_error = frame["type"] in ("server_error", "agent_response_error") or frame.get("ok") is False
        if is_error and "conflict" not in codes and len(text.encode()) > MAX_ERROR_BYTES:
            soak.fault(LARGE, text[:300])
        if "internal" in codes:
            soak.fault(INTERNAL, text[:300])
        return frame

    def connection(self) -> connect:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return connect(self.server.url, additional_headers=headers, compression=None, max_size=None, max_queue=None,
                       ping_interval=None, close_timeout=2)  # fmt: skip

    async def frames(self, maker: Maker, cases: int) -> None:
        """Send so many hostile frames on one connection, in batches; each is answered exactly once."""
        async with self.connection() as websocket:
            while cases > 0:
                batch = [maker.frame() for _ in range(min(cases, BATCH))]
                cases -= len(batch)
                if not await self.batch(websocket, batch, maker.new_id()):
                    return
                self.soak.step(len(batch))

    async def batch(self, websocket: ClientConnection, batch: list[str | bytes], mark: str) -> bool:
        """Send frames, and read until all are answered; whether the connection can go on."""
        soak = self.soak
        marks = [marks_of(text) for text in batch]
        ids = collections.Counter(known for known, _ in marks if known is not None)
        turns = {turn for known, turn in marks if turn is not None and known is None}
        sent = json.dumps({"type": "command", "command": "hello", "id": mark})
        answers: collections.Counter[Any] = collections.Counter()
        try:
            for text in batch:
                await websocket.send(text)
            await websocket.send(sent)
            marked = False
            async with asyncio.timeout(30):
                while not marked or answers.total() < len(batch):
                    frame = self.read(await websocket.recv())
                    known, kind = frame.get("id"), frame.get("type")
                    if known == mark:
                        marked = True
                    elif kind in ("server_error", "command_response") or (kind in TERMINALS and known in ids):
                        answers[known] += 1
                    elif kind in TERMINALS and known is None and frame.get("turn_id") in turns:
                        turns.discard(frame["turn_id"])
                        answers[None] += 1
        except TimeoutError:
            left = [text[:300] for text, (known, _) in zip(batch, marks, strict=True) if not answers[known]]
            soak.fault(UNANSWERED, f"{len(batch) - answers.total()} of {len(batch)}: {left[:3]}")
            return False
        except GONE as error:
            soak.fault(CLOSED, f"{websocket.close_code} {websocket.close_reason} {error!r}")
            return False
        if twice := {known for known, count in answers.items() if known is not None and count > ids[known]}:
            frames = [text[:200] for text, (known, _) in zip(batch, marks, strict=True) if known in twice]
            soak.fault(UNANSWERED, f"twice: {frames}")
        return True

    async def violations(self, rng: random.Random, cases: int) -> None:
        """Break the WebSocket protocol; each time the connection is closed with a code of the protocol's."""
        for _ in range(cases):
            data = violation(rng)
            async with self.connection() as websocket:
                websocket.transport.write(data)
                websocket.transport.write_eof()
                with contextlib.suppress(*GONE):
                    async with asyncio.timeout(15):
                        while True:
                            self.read(await websocket.recv())
            if websocket.close_code == 1011:
                self.soak.fault(CLOSED, data)
            self.soak.step()

    async def handshakes(self, rng: random.Random, cases: int) -> None:
        """Knock with requests that are wrong; none gets in, none is answered with a failure of the server's."""
        for _ in range(cases):
            reply = await knock_in_vain(self.soak, LET_IN, self.server.port, wrong_handshake(rng, self.server.port))
            is_refusal = not reply.startswith(b"HTTP/1.1 200")  # and neither the page nor /healthz
            if is_refusal and (len(reply) > MAX_ERROR_BYTES or LEAK.search(reply.decode("latin-1"))):
                self.soak.fault(LEAKS, reply[:300])

    async def work(self, rng: random.Random, mark: str, cases: int) -> None:
        """One client: frames for the most part, on a few connections, one after another."""
        maker = Maker(rng, mark)
        while cases > 0:
            part = min(cases, 1_000)
            cases -= part
            frames, broken = round(part * 0.9), round(part * 0.03)
            await self.frames(maker, frames)
            await self.violations(rng, broken)
            await self.handshakes(rng, part - frames - broken)


def marks_of(text: str | bytes) -> tuple[Any, str | None]:
    """The id and, of a user's message, the turn_id that an answer to this frame may have."""
    with contextlib.suppress(ValueError, RecursionError):
        frame = memws.clean_value(json.loads(text)) if isinstance(text, str) else None  # as an answer has its id
        if isinstance(frame, dict):
            request_id, turn_id = frame.get("id"), frame.get("turn_id")
            mine = frame.get("type") == "user_message" and isinstance(turn_id, str)
            return request_id if type(request_id) in (str, int) else None, turn_id if mine else None
    return None, None


async def knock_in_vain(soak: Soak, kind: str, port: int, data: bytes) -> bytes:
    """Send what must not open a WebSocket; the answer. It is a fault of this kind if it does."""
    status, reply = "", b""
    with contextlib.suppress(OSError):  # such as a TimeoutError
        status, reply = await knock(port, data)
    if status == "101":
        soak.fault(kind, data)
    elif status == "" or status.startswith("5"):
        soak.fault(FAILED, f"{status} {data!r}")
    soak.step()
    return reply


async def knock_rightly(soak: Soak, port: int, *headers: str) -> None:
    status, _ = await knock(port, handshake(f"Host: 127.0.0.1:{port}", *headers))
    if status != "101":
        soak.fault("the right ones refused", f"{status} {headers}")


async def origins_and_hosts(soak: Soak, port: int) -> None:
    """Clients with no token to know, half of the foreign Hosts with an Origin that agrees."""

    async def work(number: int) -> None:
        rng = random.Random(f"{soak.seed} foreign {number}")
        for case in range(number, soak.count // 10, WORKERS):
            data = handshake(f"Host: 127.0.0.1:{port}", f"Origin: {foreign_origin(rng)}")
            await knock_in_vain(soak, ORIGINS, port, data)
            host = foreign_host(rng)
            agreeing = [f"Origin: {rng.choice(['http', 'https'])}://{host}"] if case % 2 else []
            await knock_in_vain(soak, FOREIGN_HOSTS, port, handshake(f"Host: {host}", *agreeing))

    await asyncio.gather(*map(work, range(WORKERS)))
    await knock_rightly(soak, port, f"Origin: http://127.0.0.1:{port}")


async def tokens(soak: Soak, port: int) -> None:
    rng = random.Random(f"{soak.seed} tokens")
    for _ in range(soak.count // 50):
        headers, path = wrong_token(rng)
        data = handshake(f"Host: 127.0.0.1:{port}", *headers, line=f"GET {path} HTTP/1.1")
        await knock_in_vain(soak, TOKENS, port, data)
    await knock_rightly(soak, port, f"Authorization: Bearer {TOKEN}")


async def wave(attack: Attack, name: str, cases: int) -> None:
    """So many cases, by all clients at once."""
    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            share = cases // WORKERS + (number < cases % WORKERS)
            rng = random.Random(f"{attack.soak.seed} {name} {number}")
            group.create_task(attack.work(rng, f"{name}{number}", share))


def entries(pid: int, folder: str) -> int:
    """How many descriptors (fd) or threads (task) a process has."""
    return len(list(Path(f"/proc/{pid}/{folder}").iterdir()))


async def main(soak: Soak) -> None:
    soak.none(CLOSED, UNANSWERED, LARGE, NOT_JSON, INTERNAL, LET_IN, FAILED, LEAKS, LOGGED)
    soak.none(ORIGINS, FOREIGN_HOSTS, TOKENS, "the right ones refused")
    soak.progress.total = soak.count + 2 * (soak.count // 10) + soak.count // 50
    flags = ("--model", "offline", "--sync", "normal", "--log-level", "debug")
    variables = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}  # where nobody answers
    async with site(soak) as place:
        place.gapless = False
        with place.command_line(*flags, MEMWS_TOKEN=TOKEN, **variables) as server:
            pid = server.process.pid
            attack = Attack(soak, server)
            with healthy_client(soak, server.url, TOKEN):
                warm = max(soak.count // 10, min(1_000, soak.count // 2))
                await wave(attack, "w", warm)
                before, fds, threads = memory(pid), entries(pid, "fd"), entries(pid, "task")
                await wave(attack, "h", soak.count - warm)
                await until(lambda: entries(pid, "fd") <= fds and entries(pid, "task") <= threads, 5)
                # Readers are made when they are first needed, each with a connection.
                spare = max(0, 2 + memws.READERS - threads)
                soak.figure("memory growth, MiB", memory(pid) - before, 16)
                soak.figure("threads more than at the start", entries(pid, "task") - threads, spare)
                soak.figure("descriptors more than at the start", entries(pid, "fd") - fds, 3 * spare)
            await tokens(soak, server.port)
        for line in server.log.splitlines():
            if (found := LEAK.search(line)) and not line.startswith("    "):  # the lines of a traceback are indented
                soak.fault(LOGGED, f"{found[0]!r} in {line[:200]}")
        with place.command_line(*flags) as server:
            await origins_and_hosts(soak, server.port)


if __name__ == "__main__":
    run(main, WHAT, COUNT)
