"""Foreign Origins, foreign Hosts and wrong tokens: python tests/soak/gate.py [--seed N] [--count N]

The count is that of Origins and of Hosts; there is a fifth as many wrong tokens. All of them knock, none gets in.
"""

import asyncio
import contextlib
import random

from soaking import Soak, folder, run

# isort: split
from commandline import Serving

WHAT, COUNT = "foreign Origins, foreign Hosts, wrong tokens", 10_000
TOKEN = "canary-token-7d1f"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
AT_ONCE = 8
WORDS = "evil localhost 127.0.0.1 example memws 0 [::1] [::1 xn--80ak6aa92e local.host ö".split()  # noqa: SIM905 (words)
ENDS = ["com", "example", "localhost", "local", "nip.io", "127.0.0.1", "invalid", ""]


def foreign_host(rng: random.Random, port: int) -> str:
    """A Host that is not ours."""
    name = ".".join([rng.choice(WORDS) for _ in range(rng.randrange(1, 4))] + [rng.choice(ENDS) + "x"])
    strange = rng.choice(
        [
            f"127.0.0.1@{name}", f"{name}@127.0.0.1", f"127.0.0.1 {name}", f"127.0.0.1,{name}", f"127.0.0.1#{name}",
            f"localhost:{port}:{port}", "127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:port", "[::1", "[::1]]", "::1",
            "0.0.0.0", "127.1", "2130706433", "0x7f000001", "127.0.0.2.nip.io", "localhost.", "[::ffff:127.0.0.1]",  # noqa: S104
            f"169.254.169.254:{port}", f"192.168.1.{rng.randrange(256)}", f"[fe80::{rng.randrange(9)}]", "", " ",
            "\x00", "\xff\xfe", "a" * rng.randrange(300, 7_000), f"LOCALHOST.{name}", "localhost%00.evil.example",
        ]
    )  # fmt: skip
    return rng.choice([name, f"{name}:{port}", strange])


def foreign_origin(rng: random.Random, port: int) -> str:
    """An Origin that is not ours."""
    host = foreign_host(rng, port)
    scheme = rng.choice(["http", "https"])
    strange = [
        "null", "NULL", "file://", "about:blank", "data:", "javascript://127.0.0.1", f"ws://127.0.0.1:{port}", "",
        "chrome-extension://abcdefghijklmnop", f"http:127.0.0.1:{port}", f"http:///127.0.0.1:{port}", "http://",
        f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{port}/x", f"http://127.0.0.1:{port} http://evil.example",
        f"http://127.0.0.1:{port}@evil.example", f"http://evil.example#127.0.0.1:{port}", f"blob:http://127.0.0.1:{port}",
    ]  # fmt: skip
    return rng.choice([f"{scheme}://{host}", f"{scheme}://{host}", rng.choice(strange)])


def wrong_token(rng: random.Random) -> list[tuple[str, str]]:
    """Headers, or a path, with a token that is not ours."""
    token = rng.choice(
        [
            TOKEN[:-1], TOKEN + "x", TOKEN.upper(), TOKEN[::-1], "", " ", "x" * rng.randrange(1, 4_000), "null",
            "\xff", "\x01", "%00" + TOKEN, TOKEN + "%00", TOKEN.replace("-", "%2d%2d"), f'"{TOKEN}"', f"{TOKEN};x",
            f"x {TOKEN}",
        ]
    )  # fmt: skip
    return rng.choice(
        [
            [], [("Authorization", f"Bearer {token}")], [("Authorization", f"Basic {TOKEN}")],
            [("Authorization", f"bearer\t{token}x")], [("Sec-WebSocket-Protocol", f"memws, {token}x")],
            [("Sec-WebSocket-Protocol", TOKEN)], [("Sec-WebSocket-Protocol", f"x, {TOKEN}")],
            [("Cookie", f"token={TOKEN}")], [("path", f"/?token={token}x")], [("path", f"/?TOKEN={TOKEN}")],
            [("path", f"/{TOKEN}")],
            [("path", f"/?token=x&tokens={TOKEN}")], [("path", f"/#token={TOKEN}")],
        ]
    )  # fmt: skip


class Door:
    """A server to knock at."""

    def __init__(self, soak: Soak, port: int) -> None:
        self.soak, self.port = soak, port
        self.statuses: dict[str, int] = {}

    async def knock(self, headers: list[tuple[str, str]], *, path: str = "/") -> str:
        """Ask for an upgrade; the status."""
        named = {name for name, _ in headers}
        whole = [("Host", f"127.0.0.1:{self.port}")] if "Host" not in named else []
        whole += [("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Key", KEY)]
        whole += [("Sec-WebSocket-Version", "13"), *headers]
        text = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in whole) + "\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        reply = b""
        with contextlib.suppress(ConnectionError):
            writer.write(text.encode("latin-1", "replace"))
            async with asyncio.timeout(20):
                while b"\r\n\r\n" not in reply and (more := await reader.read(65_536)):
                    reply += more
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return reply.split(b" ", 2)[1].decode() if reply.startswith(b"HTTP/1.1 ") else "closed"

    async def refused(self, what: str, headers: list[tuple[str, str]], **options: str) -> None:
        """Knock with what must not get in."""
        try:
            status = await self.knock(headers, **options)
        except (OSError, TimeoutError) as error:
            self.soak.fault("no answer", f"{headers} {options}: {error!r}")
            return
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == "101":
            self.soak.fault(f"{what} upgraded", f"{headers} {options}")
        elif status.startswith("5"):
            self.soak.fault("answered 5xx", f"{status} {headers} {options}")
        self.soak.step()


async def main(soak: Soak) -> None:
    tokens = soak.part(2_000)
    soak.total(2 * soak.count + tokens)
    flags = ("--host", "127.0.0.1", "--model", "offline", "--db", ":memory:", "--log-level", "debug")
    logs = ""
    statuses = {}
    with folder() as where:
        with Serving(*flags, cwd=where) as server:
            door = Door(soak, server.port)

            async def work(number: int) -> None:
                rng = random.Random(f"{soak.seed} {number}")
                for case in range(number, soak.count, AT_ONCE):
                    await door.refused("Origin", [("Origin", foreign_origin(rng, server.port))])
                    host = foreign_host(rng, server.port)
                    agreeing = [("Origin", f"{rng.choice(['http', 'https'])}://{host}")] if case % 2 else []
                    await door.refused("Host", [("Host", host), *agreeing])

            await asyncio.gather(*map(work, range(AT_ONCE)))
            if await door.knock([("Origin", f"http://127.0.0.1:{server.port}")]) != "101":
                soak.fault("no answer", "our own page is refused at the end")
            statuses["Origins and Hosts"] = dict(sorted(door.statuses.items()))
            if server.end() != 0:
                soak.fault("crash", server.log[-500:])
            logs += server.log
        with Serving(*flags, cwd=where, variables={"MEMWS_TOKEN": TOKEN}) as server:
            door = Door(soak, server.port)
            rng = random.Random(f"{soak.seed} tokens")
            for _ in range(tokens):
                headers = wrong_token(rng)
                path = next((value for name, value in headers if name == "path"), "/")
                await door.refused("token", [each for each in headers if each[0] != "path"], path=path)
            if await door.knock([("Authorization", f"Bearer {TOKEN}")]) != "101":
                soak.fault("no answer", "the right token is refused at the end")
            statuses["tokens"] = dict(sorted(door.statuses.items()))
            if server.end() != 0:
                soak.fault("crash", server.log[-500:])
            logs += server.log
    for word in (TOKEN, "Traceback"):
        if word in logs:
            soak.fault("in the log", f"{word}: {logs.partition(word)[2][:300]}")
    soak.none("foreign Origins upgraded", "Origin upgraded")
    soak.none("foreign Hosts upgraded", "Host upgraded")
    soak.none("wrong tokens upgraded", "token upgraded")
    soak.none("answered 5xx", "answered 5xx")
    soak.none("not answered, or the right ones refused", "no answer")
    soak.none("crashes, tracebacks, tokens in the log", "crash", "in the log")
    soak.told("knocks", f"{soak.count:,} Origins, {soak.count:,} Hosts, half with an Origin; {tokens:,} tokens")
    soak.told("statuses", statuses)


if __name__ == "__main__":
    run(main, WHAT, COUNT)
