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
from dataclasses import dataclass, field
from typing import Any

from soaking import Site, Soak, client, run, site

# isort: split
from postgres import Cluster, find_programs
from wire import JSON, Wire, beside

import memws

WHAT, COUNT, MOVES = "agents that are forked, rewound, put away, moved and killed, against a model in memory", 500, 40
OFTEN = {"talk": 12, "keep": 5, "drop": 4, "edit": 3, "fork": 6, "rewind": 5, "rename": 2, "put_away": 3}
OFTEN |= {"restore": 3, "purge": 1, "restart": 1, "cut": 1, "move": 1}
WORDS = "otter", "walrus", "heron", "badger"


@dataclass
class Known:
    """What a client has seen of an agent: now, and at the end of each of its turns that it had."""

    now: JSON
    ends: dict[str, JSON] = field(default_factory=dict)


def then(known: Known, turn_id: str) -> Known:
    """An agent as it was at the end of a turn."""
    turns = list(known.ends)
    return Known(known.ends[turn_id], {each: known.ends[each] for each in turns[: turns.index(turn_id) + 1]})


class World:
    """One run: a server process, a client, and what it should see."""

    def __init__(self, place: Site, rng: random.Random) -> None:
        self.place, self.rng = place, rng
        self.live: dict[str, Known] = {}
        self.away: dict[str, list[Known]] = collections.defaultdict(list)
        self.number = itertools.count(1)
        self.moves: list[str] = []  # for whoever looks for a difference
        self.connection = contextlib.AsyncExitStack()
        self.wire: Wire

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
            seen[f"{store} {query}"] = found["items"], found["total"]
        last = seen["messages"][-1] if seen["messages"] else None
        seen["request"] = last and await ask("get_request", agent_name=name, turn_id=last["turn_id"], step=1)
        sql = "SELECT seq, text FROM events JOIN agents ON id = agent WHERE name = ? AND deleted IS NULL ORDER BY seq"
        with beside(self.place.path) as database:
            seen["events"] = [tuple(row) for row in database.execute(sql, (name,)).fetchall()]
        return seen

    async def expect(self, name: str, known: Known, told: str = "") -> None:
        """The agent of that name is as it should be, but for one event more where it was `told` of a change."""
        seen, should = await self.see(name), known.now
        more = [text for _, text in seen["events"][len(should["events"]) :]]
        assert [f'"change":"{told}"' in text for text in more] == [True] * bool(told), (self.moves, more)
        before = {**seen, "events": seen["events"][: len(should["events"])]}
        wrong = {key: (before[key], should[key]) for key in before if before[key] != should[key]}
        assert wrong == {}, (self.moves, name, wrong)
        self.live[name] = Known(seen, dict(known.ends))

    def new_name(self) -> str:
        return f"agent{next(self.number)}"

    async def ask(self, command: str, name: str, **fields: Any) -> JSON:
        self.moves.append(f"{command} {name} {fields}")
        return await self.wire.ok(command, agent_name=name, **fields)

    async def create(self) -> None:
        name = self.new_name()
        await self.wire.ok("create_agent", config={"name": name})
        self.live[name] = Known(await self.see(name))
        await self.talk(name)

    # -- moves --

    async def talk(self, name: str) -> None:
        number = next(self.number)
        self.moves.append(f"talk {name} t{number}")
        text = f"I like the {self.rng.choice(WORDS)} number {number}"
        await self.wire.turn(text, agent_name=name, turn_id=f"t{number}")
        self.live[name].now = self.live[name].ends[f"t{number}"] = await self.see(name)

    async def keep(self, name: str) -> None:
        text = f"{self.rng.choice(WORDS)} and {self.rng.choice(WORDS)}"
        await self.ask("insert_passage", name, text=text)
        self.live[name].now = await self.see(name)

    async def drop(self, name: str) -> None:
        passages = self.live[name].now["archival "][0]
        for passage in self.rng.sample(passages, self.rng.randint(0, len(passages))):
            await self.ask("delete_passage", name, passage_id=passage["id"])
        self.live[name].now = await self.see(name)

    async def edit(self, name: str) -> None:
        await self.ask("set_block", name, label="human", value=f"Number {next(self.number)}")
        await self.ask("update_agent", name, config={"max_steps": self.rng.randint(1, 9)})
        self.live[name].now = await self.see(name)

    async def fork(self, name: str) -> None:
        known, other = self.live[name], self.new_name()
        turn_id = self.rng.choice([None, *known.ends])
        await self.ask("fork_agent", name, new_name=other, **({"turn_id": turn_id} if turn_id else {}))
        await self.expect(other, then(known, turn_id) if turn_id else known)
        await self.expect(name, known)

    async def rewind(self, name: str) -> None:
        known, other = self.live[name], self.new_name()
        turn_id = self.rng.choice(list(known.ends))
        answer = await self.ask("rewind_agent", name, turn_id=turn_id, keep_as=other)
        assert answer["kept_as"] == other
        await self.expect(name, then(known, turn_id), "rewound")
        await self.expect(other, known, "renamed")
        assert answer["last_seq"] == self.live[name].now["events"][-1][0] > known.now["events"][-1][0]

    async def rename(self, name: str) -> None:
        other = self.new_name()
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
            for other in sorted(self.live):
                await self.expect(other, self.live[other])

    async def restart(self, _: str = "") -> None:
        """The server is killed; all is as it was."""
        self.moves.append("kill")
        self.server.process.kill()
        await self.connection.aclose()
        await self.place.end(self.server, killed=True)
        await self.start()
        for name in sorted(self.live):
            await self.expect(name, self.live[name])

    async def cut(self, name: str) -> None:
        """The server is killed in the middle of a fork, which is whole then, or nowhere."""
        other = self.new_name()
        await self.wire.request("fork_agent", agent_name=name, new_name=other)
        await asyncio.sleep(self.rng.random() / 50)
        await self.restart()
        if other in [each["agent_name"] for each in (await self.wire.ok("list_agents"))["agents"]]:
            await self.expect(other, self.live[name])

    async def move(self, name: str) -> None:
        """An agent goes through a file to another name."""
        other = self.new_name()
        file, database = str(self.place.where / f"{other}.json"), ("--db", self.place.path)
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
    run(main, WHAT, COUNT)
