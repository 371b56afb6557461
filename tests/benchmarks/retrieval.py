"""How well and how fast memory search finds: python tests/benchmarks/retrieval.py DATA…

DATA are files of JSON lines, one memory a line: {set, kind: recall | archival, docs: [{id, date, speaker, text}],
queries: [{q, cat, ev: [doc ids]}]}. Printed are, per set and category, recall@k (the share of `ev` among the first k)
and the mean reciprocal rank of the first of them; then what indexing and searching cost, over the same texts with a
fifth of their words replaced by rarer ones; then the slowest hostile queries. All as Markdown.

    python tests/benchmarks/retrieval.py data/*.jsonl            quality, and speed at 10,000 and 100,000 rows
    python tests/benchmarks/retrieval.py data/*.jsonl --large    and at 1,000,000
"""

import argparse
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from measure import Progress, described, machine, percentile, rows_of  # noqa: E402
from test_memory import HOSTILE  # noqa: E402

import memws  # noqa: E402

DEPTHS = (1, 5, 10, 20)
SINGLES, QUERIES = 300, 200
"""Rows that are inserted with a commit each, and queries that are timed, for each size."""
STEP = 1000

Stores = list[dict[str, Any]]


def load(files: list[str]) -> Stores:
    return [json.loads(line) for file in files for line in Path(file).read_text("utf-8").splitlines() if line.strip()]


# ---- quality ---------------------------------------------------------------------------------------------------------


def quality(stores: Stores, progress: Progress) -> tuple[list[list[Any]], list[float]]:
    """Rows of set, category, questions, recall at each depth and MRR; the seconds of each query."""
    scores: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    seconds: list[float] = []
    for store in stores:
        index = memws.memory_index([(doc["speaker"], doc["date"], doc["text"]) for doc in store["docs"]], store["kind"])
        ids = [doc["id"] for doc in store["docs"]]
        for query in store["queries"]:
            begin = time.perf_counter()
            positions = index.search(query["q"], max(DEPTHS))
            seconds.append(time.perf_counter() - begin)
            found, evidence = [ids[position] for position in positions], set(query["ev"])
            score = [len(evidence.intersection(found[:depth])) / len(evidence) for depth in DEPTHS]
            score.append(next((1 / rank for rank, doc in enumerate(found, 1) if doc in evidence), 0.0))
            for category in ("", str(query["cat"])):
                scores[store["set"], category].append(score)
        progress.step(f"quality: {store['set']}")
    rows = []
    for (name, category), some in sorted(scores.items()):
        if category and len({other for other_set, other in scores if other_set == name}) == 2:
            continue  # a set of one category is told once
        means = [f"{statistics.fmean(column):.3f}" for column in zip(*some, strict=True)]
        rows.append([name, category or "all", len(some), *means])
    return rows, seconds


# ---- speed -----------------------------------------------------------------------------------------------------------


def grown(stores: Stores, seed: int = 3) -> Iterator[str]:
    """Endless texts: those of the data, a fifth of their words made up so that the vocabulary grows."""
    pick = random.Random(seed)
    texts = [doc["text"] for store in stores for doc in store["docs"]]
    starts = [a + b for a in "bcdfglmnprst" for b in ("a", "e", "i", "o", "ou")]
    ends = "nter lda mik rro sten bble cket ding vor zeph".split()  # noqa: SIM905
    rare = [a + b + c for a, b, c in itertools.product(starts, ends, starts)]
    while True:
        words = pick.choice(texts).split()
        yield " ".join(word if pick.random() < 0.8 else pick.choice(rare) for word in words)


class Filled:
    """A database file with one agent's recall memory, filled up in steps."""

    def __init__(self, path: str, stores: Stores) -> None:
        self.connection = memws.open_database(path, "full")
        self.path = path
        self.rows = 0
        self.seconds = 0.0
        self._index = memws.SearchIndex(self.connection)
        self._texts = grown(stores)

    def insert(self, count: int) -> None:
        """Index so many messages in one transaction."""
        some = list(itertools.islice(self._texts, count))
        begin = time.perf_counter()
        self.connection.execute("BEGIN")
        for text in some:
            self.rows += 1
            minutes = self.rows // 20 * 200 + self.rows % 20 * 3  # sessions of 20 turns
            moment = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes / 10)
            role = "user" if self.rows % 2 else "assistant"
            self._index.add(self.connection, 1, "recall", self.rows, role, moment.isoformat(), text)
        self.connection.execute("COMMIT")
        self.seconds += time.perf_counter() - begin

    def search(self, query: str) -> float:
        """Seconds of a search of one page in both memories."""
        begin = time.perf_counter()
        self._index.search(self.connection, 1, query)
        return time.perf_counter() - begin


def milliseconds(seconds: list[float]) -> list[str]:
    """p50 and p95."""
    return [f"{1000 * percentile(seconds, share):.2f}" for share in (0.5, 0.95)]


def speed(stores: Stores, sizes: list[int], progress: Progress) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of size, seconds to index, file, insert p50/p95, query p50/p95; the slowest hostile queries at the first."""
    questions = [query["q"] for store in stores for query in store["queries"]]
    random.Random(4).shuffle(questions)
    rows, hostile = [], []
    with tempfile.TemporaryDirectory() as folder:
        filled = Filled(str(Path(folder) / "search.db"), stores)
        with contextlib.closing(filled.connection):
            for size in sizes:
                while filled.rows < size:
                    filled.insert(min(STEP, size - filled.rows))
                    progress.step(f"speed: {size:,} rows are indexed")
                built, megabytes = filled.seconds, Path(filled.path).stat().st_size / 1e6
                singles = []
                for _ in range(SINGLES):
                    before = filled.seconds
                    filled.insert(1)
                    singles.append(filled.seconds - before)
                queries = [filled.search(query) for query in questions[:QUERIES]]
                rows.append(
                    [f"{size:,}", f"{built:.1f}", f"{megabytes:.0f}", *milliseconds(singles), *milliseconds(queries)]
                )
                if size == sizes[0]:
                    hostile = slowest(filled)
    return rows, hostile


def slowest(filled: Filled) -> list[list[Any]]:
    """The five slowest hostile queries: each the best of three, so that only its own cost counts."""
    endless = ["love " * 20_000, " ".join(str(number) for number in range(20_000)), "?" * 20_000]
    took = [(min(filled.search(query) for _ in range(3)), query) for query in (*HOSTILE, *endless)]
    top = sorted(took, reverse=True)[:5]
    return [[f"`{ascii(query[:30])[1:31]}`", f"{len(query):,}", f"{1000 * seconds:.1f}"] for seconds, query in top]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="DATA", help="files of JSON lines")
    parser.add_argument("--large", action="store_true", help="measure the speed at 1,000,000 rows too")
    parser.add_argument("--no-speed", action="store_true", help="measure only what is found")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    given = parser.parse_args()
    stores = load(given.data)
    sizes = [10_000, 100_000, *([1_000_000] if given.large else [])]
    facts = machine()
    progress = Progress(len(stores) + (0 if given.no_speed else -(-sizes[-1] // STEP)))
    progress.step("quality", 0)
    found, seconds = quality(stores, progress)
    speeds, hostile = ([], []) if given.no_speed else speed(stores, sizes, progress)
    progress.end()

    heads = {
        "found": ["set", "category", "questions", *(f"recall@{depth}" for depth in DEPTHS), "MRR"],
        "speeds": ["rows", "index s", "file MB", "insert p50 ms", "p95", "query p50 ms", "p95"],
        "hostile": ["the slowest hostile queries, 10,000 rows", "characters", "ms"],
    }
    print(described(facts))
    for name, rows in (("found", found), ("speeds", speeds), ("hostile", hostile)):
        if rows:
            print(f"\n{rows_of([heads[name], *rows])}")
    p50, p95 = milliseconds(seconds)
    print(f"\nQueries over the sets themselves: p50 {p50} ms, p95 {p95} ms. An insert has its own commit, FULL.")
    if given.json:
        figures = {name: [heads[name], *rows] for name, rows in (("found", found), ("speeds", speeds))}
        text = json.dumps({"machine": facts, **figures, "hostile": hostile}, indent=1)
        Path(given.json).write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
