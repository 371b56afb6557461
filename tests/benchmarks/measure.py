"""What the benchmarks share: a progress bar, percentiles, the machine, processes."""

import contextlib
import json
import os
import platform
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from commandline import environment

import memws


class Progress:
    """A bar on standard error, one line that is written over; where nobody looks at it, a line for each new step."""

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total, self.quiet = total, quiet
        self.done = 0
        self._started = time.monotonic()
        self._said = ""

    def step(self, what: str, done: int = 1) -> None:
        """Say that so much more is done, and what comes now."""
        self.done += done
        if self.quiet:
            return
        seconds = time.monotonic() - self._started
        filled = round(30 * self.done / max(1, self.total))
        line = f"[{'#' * filled}{'-' * (30 - filled)}] {self.done}/{self.total} {seconds:4.0f} s  {what}"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line[:118]}")
        elif what != self._said:
            sys.stderr.write(f"{line}\n")
        self._said = what
        sys.stderr.flush()

    def end(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def machine() -> dict[str, str]:
    """What the figures depend on beside the code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "memws": memws.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {cores} cores",
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
    }
    if hasattr(os, "getloadavg"):
        facts["load"] = f"{os.getloadavg()[0]:.1f}"
    for package in ("websockets", "openai", "aiohttp"):
        with contextlib.suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def described(facts: dict[str, str]) -> str:
    """One line of prose above a table."""
    return ", ".join(f"{name} {value}" if name not in ("machine", "date") else value for name, value in facts.items())


def rows_of(table: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; its first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


def clean_environment(**variables: str) -> dict[str, str]:
    """An environment without settings of memws, in which imported modules keep their bytecode, as they usually do."""
    return {name: value for name, value in environment(variables).items() if name != "PYTHONDONTWRITEBYTECODE"}


class Peer:
    """A process of peers.py, while a `with` block lasts."""

    def __init__(self, *command: str, folder: Path) -> None:
        self._log = (folder / f"{command[0]}-{random.randrange(10**9)}.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).absolute().with_name("peers.py")), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=clean_environment(),
            cwd=folder,
        )
        first = self.line()
        self.address = first.split()[-1] if first else ""

    def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        if not line:
            self._log.seek(0)
            raise SystemExit(f"{self._process.args!r} ended:\n{self._log.read().decode()}")
        return line.rstrip("\n")

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self.line())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()
