"""Disks that fail and files that are damaged: python tests/soak/disk_faults.py [--seed N] [--count N]

The count is that of byte flips, each in a fresh copy of a database, which is then served, talked to and checked. Before
them each of the first 200 writes of a server fails once. What a load does not mend, `check` has to find.
"""

import asyncio
import contextlib
import io
import json
import logging
import random
import re
import resource
import shutil
import sqlite3
import traceback
from collections.abc import Iterator
from pathlib import Path

import soaking
from soaking import GONE, Log, Site, Soak, client, read_all, site
from wire import JSON, is_terminal

import memws

WHAT, COUNT = "disks that fail and damaged files", 500
LEAK = re.compile(r'Traceback|File "|memws\.py(?! check)|site-packages')
TALK = "My name is Ada and I like otters. What is my name?"
ERRORS = ["disk I/O error", "database or disk is full", "attempt to write a readonly database", "database is locked"]
HANGS, CLOSED, LEAKS = "hangs", "connections closed", "tracebacks to a client"
UNCLEAR, STUCK = "failures without a clear error", "agents that do not go on after a failed write"
SILENT, FALLS_OVER = "reads refused while the disk is full or locked", "check and export that fall over"
NOT_FOUND, NO_WAY = "damage that stops an agent, and check does not find", "backups that are no way back"


def look(soak: Soak, case: str, *frames: JSON) -> None:
    """Frames that a client got: no traceback, no failure that nobody foresaw."""
    for frame in frames:
        text = json.dumps(frame)
        soak.demand(not LEAK.search(text), LEAKS, case, text[:500])
        is_internal = "internal" in (frame.get("code"), frame.get("error", {}).get("code"))
        soak.demand(not is_internal, UNCLEAR, case, text[:500])


@contextlib.contextmanager
def failing_write(place: Site, number: int) -> Iterator[None]:
    """The write of this number from now on fails."""
    plan, rng = place.where / "plan.json", place.soak.rng
    fault = {"from": number, "to": number + 1, "text": rng.choice(ERRORS), "undo": rng.random() < 0.5}
    plan.write_text(json.dumps(fault), "utf-8")
    yield
    plan.unlink()


@contextlib.contextmanager
def full_disk(place: Site) -> Iterator[None]:
    """No file of the server can grow."""
    pid = place.running[0].process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, ((place.where / "memws.db-wal").stat().st_size, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def locked_file(place: Site) -> Iterator[None]:
    """Another program is writing."""
    with contextlib.closing(sqlite3.connect(place.path, isolation_level=None, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


async def bad_writes(place: Site) -> None:
    """Each of the first writes fails once; the disk is full, or somebody else holds the database, at random moments.

    What was refused can be sent again, what was told is kept.
    """
    soak, log = place.soak, Log(place.soak, "sam")
    server = await place.start("--sync", "normal", constants={"BUSY_TIMEOUT": 0.3}, fail=True, desk=0)
    cases = [(1 + number % 40, None) for number in range(soak.part(200))]
    cases += [(0, (locked_file, full_disk)[number % 2]) for number in range(soak.part(40))]
    async with client(server, "*") as wire:
        for name in ("sam", "ada"):
            await wire.ok("create_agent", config={"name": name})
        for number, (first, later) in enumerate(cases):
            turn_id, message = log.message(f"turn {number}", TALK)
            case = f"{turn_id}, write {first} fails, {later}"
            try:
                with failing_write(place, first):
                    mark = await wire.say(message, agent_name="sam", turn_id=turn_id)
                    await asyncio.sleep(soak.rng.random() * 0.02 if later else 0)
                    with later(place) if later else contextlib.nullcontext():
                        frames = await wire.until(lambda told, mark=mark: told.get("id") == mark and is_terminal(told))
                        for name in ("sam", "ada"):
                            frames.append(await wire.command("insert_passage", agent_name=name, text="x"))
                        frames.append(await wire.command("set_block", agent_name="sam", label="human", value=case))
                        reading = await wire.command("get_messages", agent_name="sam", limit=3)
                frames += await wire.turn(message, agent_name="sam", turn_id=turn_id)
                other = await wire.turn("Hello", agent_name="ada")
            except TimeoutError:
                soak.fault(HANGS, f"{case}: {wire.frames[-3:]}")
                break
            soak.demand(reading.get("ok") is True, SILENT, case, reading)
            look(soak, case, *frames)
            log.keep(*frames)
            goes_on = "seq" in frames[-1] and other[-1].get("stop_reason") == "done"
            soak.demand(goes_on, STUCK, case, frames[-1], other[-1])
            soak.step(0 if later else 0.5)
        await log.compare(wire)


async def make_database(place: Site) -> None:
    """Three agents that have talked; one is deleted."""
    server = await place.start("--sync", "normal", desk=0)
    async with client(server) as wire:
        for name in ("sam", "ada", "gone"):
            await wire.ok("create_agent", config={"name": name})
            for number in range(6):
                await wire.turn(f"{TALK} I have {number} cats.", agent_name=name)
                await wire.ok("insert_passage", agent_name=name, text=f"passage {number} of {name}")
        await wire.ok("delete_agent", agent_name="gone")
    await place.end(server)
    with contextlib.closing(sqlite3.connect(place.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def use(soak: Soak, case: str, server: memws.WebSocketServer) -> list[bool]:
    """Ask for everything that two agents have, and talk to them; whether each went on."""
    went_on = []
    async with client(server, "*") as wire:
        for name in ("sam", "ada"):
            await wire.command("load_agent", name=name)
            await read_all(wire, name)
            await wire.command("insert_passage", agent_name=name, text="new")
            await wire.command("set_block", agent_name=name, label="human", value="Ada")
            await wire.command("compact", agent_name=name)
            went_on.append((await wire.turn(TALK, agent_name=name))[-1].get("stop_reason") == "done")
        await wire.command("restore_agent", agent_name="gone")
        await wire.command("create_agent", config={})
    look(soak, case, *wire.frames)
    return went_on


def check(soak: Soak, case: str, path: Path) -> bool:
    """Whatever was damaged, check and export say so and do not fall over; whether check found anything."""
    found = False
    for words in (["export", "sam"], ["check"]):
        out, err = io.TextIOWrapper(io.BytesIO()), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = memws.main([*words, "--db", str(path)])
            except Exception:  # a traceback of the command line is what is looked for
                soak.fault(FALLS_OVER, f"{words}: {traceback.format_exc(limit=-2)}")
                continue
        is_told = status in (0, 1, 2) and "Traceback" not in err.getvalue()
        soak.demand(is_told, FALLS_OVER, case, words, status, err.getvalue()[-300:])
        found = status != 0
    return found


def damage(rng: random.Random, original: Path, path: Path) -> list[int]:
    """Make a copy with a few bytes flipped, one in ten of them in the header and the schema; where."""
    for left in path.parent.glob(f"{path.name}*"):
        left.unlink()
    shutil.copy(original, path)
    data = bytearray(path.read_bytes())
    count = rng.choice([1, 1, 1, 2, 8])
    places = [rng.randrange(4096 if rng.random() < 0.1 else len(data)) for _ in range(count)]
    for place in places:
        data[place] ^= 1 << rng.randrange(8) if rng.random() < 0.5 else rng.randrange(1, 256)
    path.write_bytes(data)
    return places


async def serve(soak: Soak, case: str, path: Path) -> list[bool]:
    """Serve a file and use it; whether each of the two agents went on, nothing where it is not served."""
    server = memws.WebSocketServer("127.0.0.1", 0, db=str(path), model="offline")
    try:
        async with asyncio.timeout(30):
            await asyncio.to_thread(server.start)
            return await use(soak, case, server)
    except memws.UsageError:
        pass  # it is refused, with a sentence
    except TimeoutError:
        soak.fault(HANGS, case)
    except GONE as error:
        soak.fault(CLOSED, f"{case}: {error!r}")
    except Exception:  # start, stop and check raise UsageError and nothing else
        soak.fault(UNCLEAR, f"{case}: {traceback.format_exc(limit=-2)}")
    finally:
        await asyncio.to_thread(server.stop)
    return []


async def flips(place: Site) -> None:
    """Flip bytes of a copy, check it, serve it, use it; what check did not find did no harm, and a backup has all."""
    soak = place.soak
    await make_database(place)
    backup, path = place.where / "backup.db", place.where / "copy.db"
    with contextlib.redirect_stderr(io.StringIO()):
        memws.main(["backup", str(backup), "--db", place.path])
    for number in range(soak.count):
        places = damage(random.Random(f"{soak.seed} flip {number}"), Path(place.path), path)
        case = f"flip {number} at {places[:4]}"
        found, went_on = check(soak, case, path), await serve(soak, case, path)
        soak.demand(found or went_on == [True, True], NOT_FOUND, case, went_on)
        soak.step()
    went_on = await serve(soak, "the backup", backup)
    soak.demand(went_on == [True, True], NO_WAY, went_on)


async def main(soak: Soak) -> None:
    soak.progress.total = soak.count + soak.part(200) / 2
    soak.none(HANGS, CLOSED)
    async with site(soak) as place:
        await bad_writes(place)
    logging.disable()  # of what servers in this process say of damage
    async with site(soak) as place:
        await flips(place)
    logging.disable(logging.NOTSET)


if __name__ == "__main__":
    soaking.run(main, WHAT, COUNT)
