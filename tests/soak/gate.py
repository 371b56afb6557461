"""Foreign Origins, foreign Hosts and wrong tokens: python tests/soak/gate.py [--seed N] [--count N]

The count is that of Origins and of Hosts; there is a fifth as many wrong tokens. All of them knock, none gets in: they
are those of test_gate.py, and what is made of them at random.
"""

import asyncio
import random

from soaking import Site, Soak, handshake, knock, knock_in_vain, run, site

# isort: split
from test_gate import ADDRESSES, BAD_HOSTS, BAD_ORIGINS, FOREIGN, TOKEN, WRONG_TOKENS

WHAT, COUNT = "foreign Origins, foreign Hosts, wrong tokens", 10_000
AT_ONCE = 8
FLAGS = ("--model", "offline", "--log-level", "debug")
HOSTS = [*BAD_HOSTS, *ADDRESSES, "\x00", "\xff\xfe", "localhost%00.evil.example", "169.254.169.254", "a" * 7_000]


def foreign_host(rng: random.Random) -> str:
    """A Host that is not ours: one, or several joined."""
    return rng.choice("@,#:. ").join(rng.choices(HOSTS, k=rng.choice([1, 1, 2, 3])))


def foreign_origin(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice([*BAD_ORIGINS, *FOREIGN])
    return f"{rng.choice(['http', 'https'])}://{foreign_host(rng)}"


def wrong_token(rng: random.Random) -> tuple[list[str], str]:
    """Headers and a path with a token that is not ours: one of the known, or ours with a character changed."""
    at = rng.randrange(len(TOKEN))
    token = TOKEN[:at] + rng.choice(["", "x", "%00", "\xff", '"']) + TOKEN[at + 1 :]
    changed = [([f"Authorization: Bearer {token}"], "/"), ([], f"/?token={token}")]
    return rng.choice([*changed, ([f"Sec-WebSocket-Protocol: memws, {token}"], "/"), rng.choice(WRONG_TOKENS)])


async def knock_rightly(soak: Soak, port: int, *headers: str) -> None:
    status, _ = await knock(port, handshake(f"Host: 127.0.0.1:{port}", *headers))
    if status != "101":
        soak.fault("the right ones refused", f"{status} {headers}")


async def origins_and_hosts(soak: Soak, place: Site) -> None:
    """Clients with no token to know, half of the foreign Hosts with an Origin that agrees."""
    with place.command_line(*FLAGS) as server:

        async def work(number: int) -> None:
            rng = random.Random(f"{soak.seed} {number}")
            for case in range(number, soak.count, AT_ONCE):
                data = handshake(f"Host: 127.0.0.1:{server.port}", f"Origin: {foreign_origin(rng)}")
                await knock_in_vain(soak, "foreign Origins upgraded", server.port, data)
                host = foreign_host(rng)
                agreeing = [f"Origin: {rng.choice(['http', 'https'])}://{host}"] if case % 2 else []
                data = handshake(f"Host: {host}", *agreeing)
                await knock_in_vain(soak, "foreign Hosts upgraded", server.port, data)

        await asyncio.gather(*map(work, range(AT_ONCE)))
        await knock_rightly(soak, server.port, f"Origin: http://127.0.0.1:{server.port}")


async def tokens(soak: Soak, place: Site) -> None:
    """Clients that do not know the token."""
    rng = random.Random(f"{soak.seed} tokens")
    with place.command_line(*FLAGS, MEMWS_TOKEN=TOKEN) as server:
        for _ in range(soak.part(2_000)):
            headers, path = wrong_token(rng)
            data = handshake(f"Host: 127.0.0.1:{server.port}", *headers, line=f"GET {path} HTTP/1.1")
            await knock_in_vain(soak, "wrong tokens upgraded", server.port, data)
        await knock_rightly(soak, server.port, f"Authorization: Bearer {TOKEN}")
    if TOKEN in server.log:
        soak.fault("tokens in the log", server.log.partition(TOKEN)[0][-300:])


async def main(soak: Soak) -> None:
    soak.total(2 * soak.count + soak.part(2_000))
    soak.none("foreign Origins upgraded", "foreign Hosts upgraded", "wrong tokens upgraded", "the right ones refused")
    soak.none("handshakes not answered, or 5xx", "tokens in the log")
    async with site(soak) as place:
        await origins_and_hosts(soak, place)
        await tokens(soak, place)


if __name__ == "__main__":
    run(main, WHAT, COUNT)
