"""What benchmarks and soak scripts share: a progress bar, percentiles, the memory of a process, the machine, tables."""

import asyncio
import math
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]


class Progress:
    """A bar on standard error: one line that is written over, or a line for each tenth where nobody looks at it."""

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0
        self._started = time.monotonic()
        self._shown: tuple[str, int] | None = None

    def step(self, what: str, done: float = 1) -> None:
        """Say that so much more is done, and what comes now."""
        self.done += done
        share = min(1.0, self.done / max(1.0, self.total))
        terminal = sys.stderr.isatty()
        shown = what, int(share * (200 if terminal else 10))
        if shown == self._shown:
            return
        self._shown = shown
        line = f"[{'#' * round(30 * share):30}] {100 * share:3.0f} % {time.monotonic() - self._started:4.0f} s  {what}"
        print(f"\r\x1b[K{line[:118]}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def finished(clients: int, seconds: float, one: Callable[[int], Awaitable[Any]]) -> int:
    """How much so many clients, begun over 200 ms, each one thing after another, finish within seconds, from 1 s on."""
    count, begin = 0, time.monotonic() + 1.0

    async def client(number: int) -> None:
        nonlocal count
        await asyncio.sleep(0.2 * number / clients)
        while time.monotonic() < begin + seconds:
            await one(number)
            count += begin <= time.monotonic() < begin + seconds

    await asyncio.gather(*map(client, range(clients)))
    return count


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of the values does not exceed; 0 where there are none."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def memory(process: int | str = "self") -> float:
    """The memory that a process holds now, in MiB, as Linux tells it; elsewhere it is not known."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text("ascii").split()[1]
    except OSError:
        return math.nan
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def machine() -> str:
    """What figures depend on, in one line; a + follows the commit where files differ from it."""
    commit = subprocess.run([shutil.which("git") or "true", "describe", "--always", "--dirty=+"], cwd=FOLDER,
                            capture_output=True, text=True, check=False).stdout.strip()  # fmt: skip
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [f"{datetime.now(UTC):%Y-%m-%d}", f"commit {commit or 'unknown'}"]
    facts += [f"{platform.system()} {platform.machine()}", f"{cores} cores", f"load {os.getloadavg()[0]:.1f}"]
    facts += [f"Python {platform.python_version()}", f"SQLite {sqlite3.sqlite_version}"]
    return ", ".join([*facts, *(f"{package} {version(package)}" for package in ("websockets", "openai"))])


def rows_of(table: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
