"""What the benchmarks share: a progress bar, percentiles, the machine, and texts that look like people's."""

import contextlib
import os
import platform
import random
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from typing import Any

import memws


class Progress:
    """A bar on standard error, one line that is written over; where nobody looks at it, a line for each new step."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._started = time.monotonic()
        self._said = ""

    def step(self, what: str, done: int = 1) -> None:
        """Say that so much more is done, and what comes now."""
        self.done += done
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


def texts(seed: int = 1, words: int = 20) -> Iterator[str]:
    """Endless texts of made-up words, common and rare ones as in a language; about every second has "maru" in it."""
    pick = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai", "on")]
    vocabulary = list(dict.fromkeys("".join(pick.choices(syllables, k=pick.randint(2, 4))) for _ in range(30_000)))
    vocabulary = ["maru", *(word for word in vocabulary if word != "maru")]
    weights = list(accumulate(1 / (rank + 2) ** 0.9 for rank in range(len(vocabulary))))
    weights = [weight + 0.2 for weight in weights]
    while True:
        yield " ".join(pick.choices(vocabulary, cum_weights=weights, k=words))


def rows_of(table: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; its first row is the head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])
