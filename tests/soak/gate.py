"""Foreign Origins, foreign Hosts and wrong tokens: python tests/soak/gate.py [--seed N] [--count N]

The count is that of Origins and of Hosts; there is a fifth as many wrong tokens. All of them knock, none gets in: they
are those of test_gate.py, and what is made of them at random.
"""

import asyncio
import random

from soaking import Site, Soak, handshake, knock, run, site

# isort: split
from test_gate import ADDRESSES, BAD_HOSTS, BAD_ORIGINS, FOREIGN, TOKEN, WRONG_TOKENS

WHAT, COUNT = "foreign Origins, foreign Hosts, wrong tokens", 10_000
AT_ONCE = 8
HOSTS = [*BAD_HOSTS, *ADDRESSES, "\x00", "\xff\xfe", "localhost%00.evil.example", "169.254.169.254", "a" * 7_000]


def foreign_host(rng: random.Random) -> str:
    """A Host that is not ours: one, or several joined."""
    return rng.choice("@,#:. ").join(rng.choices(HOSTS, k=rng.choice([1, 1, 2, 3])))


def foreign_origin(rng: random.Random) -> str:
    """An Origin that is not ours."""
    if rng.random() < 0.4:
        return rng.choice([*BAD_ORIGINS, *FOREIGN])
    return f"{rng.choice(['http', 'https'])}://{foreign_host(rng)}"


def wrong_token(rng: random.Random) -> tuple[list[str], str]:
    """Headers and a path with a token that is not ours: one of the known, or ours with a character changed."""
    at = rng.randrange(len(TOKEN))
    token = TOKEN[:at] + rng.choice(["", "x", "%00", "\xff", '"']) + TOKEN[at + 1 :]
    changed = [([f"Authorization: Bearer {token}"], "/"), ([], f"/?token={token}")]
    return rng.choice([*changed, ([f"Sec-WebSocket-Protocol: memws, {token}"], "/"), rng.choice(WRONG_TOKENS)])


class Door:
    """A server to knock at."""

    def __init__(self, soak: Soak, port: int) -> None:
        self.soak, self.port = soak, port

    async def refused(self, kind: str, *headers: str, path: str = "/") -> None:
        """Knock with what must not get in."""
        try:
            status, _ = await knock(self.port, handshake(*headers, line=f"GET {path} HTTP/1.1"))
        except (OSError, TimeoutError) as error:
            self.soak.fault("not answered, or the right ones refused", f"{headers} {path}: {error!r}")
            return
        if status == "101":
            self.soak.fault(kind, f"{headers} {path}")
        elif status.startswith("5"):
            self.soak.fault("answered 5xx", f"{status} {headers} {path}")
        self.soak.step()

    async def opened(self, *headers: str) -> None:
        """Knock with what is right."""
        status, _ = await knock(self.port, handshake(f"Host: 127.0.0.1:{self.port}", *headers))
        if status != "101":
            self.soak.fault("not answered, or the right ones refused", f"{status} {headers}")


async def origins_and_hosts(soak: Soak, place: Site, flags: tuple[str, ...]) -> None:
    """Clients with no token to know, half of the foreign Hosts with an Origin that agrees."""
    with place.command_line(*flags) as server:
        door = Door(soak, server.port)

        async def work(number: int) -> None:
            rng = random.Random(f"{soak.seed} {number}")
            for case in range(number, soak.count, AT_ONCE):
                own = f"Host: 127.0.0.1:{server.port}"
                await door.refused("foreign Origins upgraded", own, f"Origin: {foreign_origin(rng)}")
                host = foreign_host(rng)
                agreeing = [f"Origin: {rng.choice(['http', 'https'])}://{host}"] if case % 2 else []
                await door.refused("foreign Hosts upgraded", f"Host: {host}", *agreeing)

        await asyncio.gather(*map(work, range(AT_ONCE)))
        await door.opened(f"Origin: http://127.0.0.1:{server.port}")


async def tokens(soak: Soak, place: Site, flags: tuple[str, ...]) -> None:
    """Clients that do not know the token."""
    with place.command_line(*flags, MEMWS_TOKEN=TOKEN) as server:
        door, rng = Door(soak, server.port), random.Random(f"{soak.seed} tokens")
        for _ in range(soak.part(2_000)):
            headers, path = wrong_token(rng)
            await door.refused("wrong tokens upgraded", f"Host: 127.0.0.1:{server.port}", *headers, path=path)
        await door.opened(f"Authorization: Bearer {TOKEN}")
    if TOKEN in server.log:
        soak.fault("tokens in the log", server.log.partition(TOKEN)[0][-300:])


async def main(soak: Soak) -> None:
    soak.total(2 * soak.count + soak.part(2_000))
    soak.none("foreign Origins upgraded", "foreign Hosts upgraded", "wrong tokens upgraded", "answered 5xx")
    soak.none("not answered, or the right ones refused", "tokens in the log")
    flags = ("--model", "offline", "--log-level", "debug")
    async with site(soak) as place:
        await origins_and_hosts(soak, place, flags)
        await tokens(soak, place, flags)


if __name__ == "__main__":
    run(main, WHAT, COUNT)
