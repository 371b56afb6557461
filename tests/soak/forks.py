"""Agents forked, rewound, put away and moved, at random: python tests/soak/forks.py [--seed N] [--count N]

The count is that of runs, each of some moves on one database, in turn SQLite and PostgreSQL where there is any. What a
client sees of an agent is noted at the end of each of its turns: that is what a fork or rewind has to give again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import io
import itertools
import random
from typing import Any, NamedTuple

import soaking
from postgres import Cluster, find_programs
from soaking import Site, Soak, client, site
from wire import JSON, beside

import memws

WHAT, COUNT, MOVES = "agents that are forked, rewound, put away, moved and killed, against a model in memory", 500, 40
OFTEN = {"talk": 12, "edit": 12, "fork": 6, "rewind": 5, "rename": 2, "put_away": 3}
OFTEN |= {"restore": 3, "purge": 1, "restart": 1, "cut": 1, "move": 1}
WORDS = "otter", "walrus", "heron", "badger"
EVENTS_SQL = "SELECT seq, text FROM events JOIN agents ON id = agent WHERE name = ? AND deleted IS NULL ORDER BY seq"


class Known(NamedTuple):
    """What a client has seen of an agent: now, and at the end of each of its turns that it had."""

    now: JSON
    ends: dict[str, JSON]

    def then(self, turn_id: str) -> Known:
        turns = list(self.ends)
        return Known(self.ends[turn_id], {each: self.ends[each] for each in turns[: turns.index(turn_id) + 1]})


class World:
    """One run: a server process, a client, and what it should see."""

    def __init__(self, place: Site, rng: random.Random) -> None:
        self.place, self.rng = place, rng
        self.live: dict[str, Known] = {}
        self.away: dict[str, list[Known]] = collections.defaultdict(list)
        self.names, self.turns = map("agent{}".format, itertools.count()), map("t{}".format, itertools.count())
        self.moves: list[str] = []  # for whoever looks for a difference
        self.connection = contextlib.AsyncExitStack()

    async def play(self, count: int) -> None:
        await self.start()
        async with self.connection:
            await self.create()
            for move in self.rng.choices(list(OFTEN), list(OFTEN.values()), k=count):
                await getattr(self, move)(self.rng.choice(sorted(self.live)))
            await self.restart()

    async def start(self) -> None:
        self.server = await self.place.start("--sync", "normal", desk=0)
        self.wire = await self.connection.enter_async_context(client(self.server, "*"))

    async def see(self, name: str) -> JSON:
        """All that a client can ask of an agent, but for its name and its last seq, which a name may have raised."""
        ask = self.wire.ok
        about = await ask("get_agent", agent_name=name)
        seen: JSON = {key: about[key] for key in ("settings", "blocks", "counts")}
        seen["messages"] = (await ask("get_messages", agent_name=name, limit=200))["messages"]
        for store, query in (("archival", ""), ("all", "otter badger")):
            found = await ask("search_memory", agent_name=name, query=query, store=store, limit=50)
            seen[store] = found["items"], found["total"]
        for last in seen["messages"][-1:]:
            seen["request"] = await ask("get_request", agent_name=name, turn_id=last["turn_id"], step=1)
        with beside(self.place.path) as database:
            seen["events"] = [tuple(row) for row in database.execute(EVENTS_SQL, (name,)).fetchall()]
        return seen

    async def expect(self, name: str, known: Known, told: str = "") -> None:
        """The agent of that name is as it should be, but for one event more where it was `told` of a change."""
        seen, count = await self.see(name), len(known.now["events"])
        more = [f'"change":"{told}"' in text for _, text in seen["events"][count:]]
        assert more == [True] * bool(told), (self.moves, seen["events"][count:])
        before = {**seen, "events": seen["events"][:count]}
        wrong = {key: (before[key], known.now.get(key)) for key in before if before[key] != known.now.get(key)}
        assert wrong == {}, (self.moves, name, wrong)
        self.live[name] = Known(seen, dict(known.ends))

    async def ask(self, command: str, name: str, **fields: Any) -> JSON:
        self.moves.append(f"{command} {name} {fields}")
        return await self.wire.ok(command, agent_name=name, **fields)

    async def create(self) -> None:
        name = next(self.names)
        await self.wire.ok("create_agent", config={"name": name})
        self.live[name] = Known({}, {})
        await self.talk(name)

    # -- moves --

    async def talk(self, name: str) -> None:
        turn_id = next(self.turns)
        self.moves.append(f"talk {name} {turn_id}")
        await self.wire.turn(f"I like the {self.rng.choice(WORDS)} of {turn_id}", agent_name=name, turn_id=turn_id)
        seen = await self.see(name)
        self.live[name] = Known(seen, {**self.live[name].ends, turn_id: seen})

    async def edit(self, name: str) -> None:
        """A passage or two more, some less, or a block and a setting."""
        passages = [item["id"] for item in self.live[name].now["archival"][0]]
        kind = self.rng.randrange(3)
        if kind == 0:
            await self.ask("insert_passage", name, text=" and ".join(self.rng.choices(WORDS, k=2)))
        for passage in self.rng.sample(passages, self.rng.randint(0, len(passages))) if kind == 1 else ():
            await self.ask("delete_passage", name, passage_id=passage)
        if kind == 2:
            await self.ask("set_block", name, label="human", value=f"Number {len(self.moves)}")
            await self.ask("update_agent", name, config={"max_steps": self.rng.randint(1, 9)})
        self.live[name] = self.live[name]._replace(now=await self.see(name))

    async def fork(self, name: str) -> None:
        known, other = self.live[name], next(self.names)
        turn_id = self.rng.choice([None, *known.ends])
        await self.ask("fork_agent", name, new_name=other, **({"turn_id": turn_id} if turn_id else {}))
        await self.expect(other, known.then(turn_id) if turn_id else known)
        await self.expect(name, known)

    async def rewind(self, name: str) -> None:
        known, other = self.live[name], next(self.names)
        turn_id = self.rng.choice(list(known.ends))
        answer = await self.ask("rewind_agent", name, turn_id=turn_id, keep_as=other)
        assert answer["kept_as"] == other
        await self.expect(name, known.then(turn_id), "rewound")
        await self.expect(other, known, "renamed")
        assert answer["last_seq"] == self.live[name].now["events"][-1][0] > known.now["events"][-1][0]

    async def rename(self, name: str) -> None:
        other = next(self.names)
        await self.ask("rename_agent", name, new_name=other)
        await self.expect(other, self.live.pop(name), "renamed")

    async def put_away(self, name: str) -> None:
        await self.ask("delete_agent", name)
        self.away[name].append(self.live.pop(name))
        if not self.live:
            await self.create()

    async def restore(self, _: str) -> None:
        for name in [name for name, known in self.away.items() if known and name not in self.live][:1]:
            await self.ask("restore_agent", name)
            await self.expect(name, self.away[name].pop(), "deleted")

    async def purge(self, name: str) -> None:
        if len(self.live) > 1:
            await self.ask("delete_agent", name, purge=True)
            del self.live[name]
            await self.expect_all()

    async def expect_all(self) -> None:
        for name in sorted(self.live):
            await self.expect(name, self.live[name])

    async def restart(self, _: str = "") -> None:
        self.moves.append("kill")
        self.server.process.kill()
        await self.connection.aclose()
        await self.place.end(self.server, killed=True)
        await self.start()
        await self.expect_all()

    async def cut(self, name: str) -> None:
        """The server is killed in the middle of a fork, which is whole then, or nowhere."""
        other = next(self.names)
        await self.wire.request("fork_agent", agent_name=name, new_name=other)
        await asyncio.sleep(self.rng.random() / 50)
        await self.restart()
        if other in [each["agent_name"] for each in (await self.wire.ok("list_agents"))["agents"]]:
            await self.expect(other, self.live[name])

    async def move(self, name: str) -> None:
        """An agent goes through a file to another name."""
        other, database = next(self.names), ("--db", self.place.path)
        file = str(self.place.where / f"{other}.json")
        with contextlib.redirect_stdout(io.StringIO()):
            assert memws.main(["export", name, file, *database]) == 0
            self.server.process.kill()
            self.server.wait()
            assert memws.main(["import", file, "--name", other, *database]) == 0
        await self.restart()
        await self.expect(other, self.live[name])


async def main(soak: Soak) -> None:
    soak.none("runs with a difference")
    with Cluster() if find_programs() else contextlib.nullcontext() as cluster:
        for number in range(soak.count):
            try:
                async with site(soak) as place:
                    place.gapless = False
                    if cluster and number % 2:
                        place.path = cluster.database()
                    world = World(place, random.Random(f"{soak.seed} {number}"))
                    await world.play(MOVES if soak.count > 9 else MOVES // 2)
            except (AssertionError, TimeoutError) as error:
                soak.fault("runs with a difference", f"run {number}: {error!r}")
            soak.step()


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
