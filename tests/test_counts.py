"""What speed rests on, counted instead of timed: commits, frames, model calls, imports, tasks and allocations."""

import asyncio
import contextlib
import gc
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from agents import Lab
from commandline import PROGRAM, environment
from endpoint import Endpoint, Reply
from test_python_api import running
from wire import wire

import memws

SAY_HELLO = Reply("They greet me.", calls=[("send_message", {"message": "Hello!"})])
pytestmark = pytest.mark.anyio


FACTS: list[Any] = [("core_memory_append", {"name": "human", "content": f"fact {number}"}) for number in range(3)]
FACTS += [("archival_memory_insert", {"content": f"passage {number}"}) for number in range(3)]
TEA = {"query": "tea", "request_heartbeat": True}
SEARCHES = [("conversation_search", TEA), ("archival_memory_search", TEA)]
TURNS: list[tuple[list[Reply], int]] = [
    ([SAY_HELLO], 2),  # one for the user's message, one for the step with the turn's end
    ([Reply(calls=[*FACTS, *SAY_HELLO.calls])], 2),  # however many memory tools a step calls
    ([*(Reply(calls=[search]) for search in SEARCHES), SAY_HELLO], 4),  # each step more is one more
]


async def test_commits_of_a_turn(endpoint: Endpoint, tmp_path: Path) -> None:
    """A turn costs one commit for the user's message and one a step; reading costs none."""
    ran: list[str] = []
    async with Lab(endpoint, tmp_path / "a.db") as lab:
        agent = await lab.create()
        lab.store._connection.set_trace_callback(ran.append)
        for script, commits in TURNS:
            assert (await lab.say(agent, "Hello", *script)).stop_reason == "done"
            assert ran.count("COMMIT") == commits
            ran.clear()
        opened = await lab.open()
        await lab.store.read(memws.read_messages, opened.record.id, None, 10)
        await lab.store.read(memws.search, opened.record.id, memws.Query("hello"))
        assert ran == []


SERVE = """
import os, sys, threading
before, files = set(sys.modules), len(os.listdir("/dev/fd"))
import memws
print(threading.active_count(), len(os.listdir("/dev/fd")) - files, *set(sys.modules) - before)
server = memws.WebSocketServer("127.0.0.1", 0, db=":memory:", model="offline").start()
server.create_new_agent({"name": "sam"})
server.run_step("Hello, my name is Ada")
with memws.connect(server.url) as client:
    client.load_agent("sam")
server.stop()
print(*set(sys.modules) - before)
"""
UNNEEDED = {"multiprocessing", "unittest", "xml", "tkinter", "http.server", "readline", "pdb"}


def test_importing_and_serving_needs_websockets_alone(tmp_path: Path) -> None:
    """`import memws` and the offline model need websockets alone; an import prints, opens and starts nothing."""
    variables = environment({"PYTHONPATH": str(PROGRAM.parent), "PYTHONDONTWRITEBYTECODE": "1"})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SERVE],
        cwd=tmp_path, env=variables, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    (threads, files, *imported), served = (line.split() for line in done.stdout.splitlines())
    allowed = {"memws", "websockets", "_memws_live", *sys.stdlib_module_names}
    for names in (imported, served):
        assert {name.partition(".")[0] for name in names} <= allowed
        assert UNNEEDED.intersection(names) == set()
    assert (threads, files, done.stderr, list(tmp_path.iterdir())) == ("1", "0", "", [])


async def test_an_idle_connection_has_no_task_of_ours() -> None:
    """Idle connections, also those that talked and followed, have the tasks of websockets alone; a lost one leaves
    no session."""
    server = memws.WebSocketServer(host="127.0.0.1", port=0, db=":memory:", model="offline")

    def ours() -> Counter[str]:
        coroutines: list[Any] = [task.get_coro() for task in asyncio.all_tasks()]
        return Counter(each.__qualname__ for each in coroutines if each.cr_code.co_filename == memws.__file__)

    async with running(server):
        before = ours()
        async with wire(server, agent={"name": "sam"}) as client, contextlib.AsyncExitStack() as others:
            await client.turn("Hello")
            await client.ok("subscribe", after=0)
            await client.until(lambda frame: frame["type"] == "agent_response_end")
            await client.ok("unsubscribe")
            for _ in range(20):
                await others.enter_async_context(wire(server))
            await client.ok("get_agent")
            assert ours() <= before
            await others.aclose()
            await client.ok("get_agent")
            gc.collect()
            assert len([each for each in gc.get_objects() if type(each) is memws.Session]) == len(server.clients) == 1
