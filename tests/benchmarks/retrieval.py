"""How well and how fast memory search finds: python tests/benchmarks/retrieval.py DATA…

DATA are files of JSON lines, one memory a line: {set, kind: recall | archival, docs: [{id, date, speaker, text}],
queries: [{q, cat, ev: [doc ids]}]}. Printed are, per set and category, recall@k (the share of `ev` among the first k)
and the mean reciprocal rank of the first of them; then what indexing and searching cost, over the same texts with a
fifth of their words replaced by rarer ones. All as Markdown.

    python tests/benchmarks/retrieval.py data/*.jsonl            quality, and speed at 10,000 and 100,000 rows
    python tests/benchmarks/retrieval.py data/*.jsonl --large    and at 1,000,000
    python tests/benchmarks/retrieval.py data/*.jsonl --large --baseline old/memws.py    beside a former memws.py
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

HERE = Path(__file__).absolute().parent
sys.path[len(sys.path) :] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]

from measure import Peer, Progress, described, machine, percentile, rows_of  # noqa: E402

import memws  # noqa: E402

DEPTHS = (1, 5, 10, 20)
SINGLES, QUERIES = 300, 200
"""Rows that are inserted with a commit each, and queries that are timed, for each size."""
STEP = 20_000  # rows that are indexed in one transaction

Stores = list[dict[str, Any]]


def load(files: Iterable[str]) -> Stores:
    return [json.loads(line) for file in files for line in Path(file).read_text("utf-8").splitlines() if line.strip()]


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
    """A database file with one agent's memory, filled up in steps, on the connection that writes."""

    kind = "recall"

    def __init__(self, path: str, texts: Iterator[str]) -> None:
        self.database = memws.Sqlite(path)
        self.connection = self.database.open()
        self.path, self.rows = path, 0
        self._texts = texts
        self.agent = memws.create_agent(self.connection, "archive", memws.read_config({}, {})[0], []).id

    def insert(self, count: int) -> float:
        """Index so many, STEP in one transaction; the seconds this took."""
        took = 0.0
        for start in range(0, count, STEP):
            some = [self._row(text) for text in itertools.islice(self._texts, min(STEP, count - start))]
            begin = time.perf_counter()
            self._store(some)
            took += time.perf_counter() - begin
        return took

    def _row(self, text: str) -> tuple[int, str, str, str]:
        """A message: its number, who said it, when, in sessions of 20 turns."""
        self.rows += 1
        minutes = self.rows // 20 * 200 + self.rows % 20 * 3
        moment = datetime(2000, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes / 10)
        return self.rows, "user" if self.rows % 2 else "assistant", moment.isoformat(), text

    def _store(self, rows: Sequence[tuple[int, str, str, str]]) -> None:
        with memws.transaction(self.connection):
            postings: list[tuple[str, int]] = []
            for number, *about in rows:
                postings += memws.remember(self.connection, self.agent, memws.Document(number, self.kind, *about))
            memws.insert_postings(self.connection, sorted(postings))

    def search(self, query: str) -> float:
        """Seconds of a search of one page in both memories."""
        begin = time.perf_counter()
        memws.search(self.connection, self.agent, memws.Query(query))
        return time.perf_counter() - begin


class FormerFilled(Filled):
    """The same for memws as it was up to commit cd96516."""

    def __init__(self, path: str, texts: Iterator[str]) -> None:
        self.connection = memws.open_database(path, "full")
        self.path, self.rows = path, 0
        self._texts = texts
        self._index = memws.SearchIndex(self.connection)

    def _store(self, rows: Sequence[tuple[int, str, str, str]]) -> None:
        self.connection.execute("BEGIN")
        for number, *about in rows:
            self._index.add(self.connection, 1, self.kind, number, *about)
        self.connection.execute("COMMIT")

    def search(self, query: str) -> float:
        begin = time.perf_counter()
        self._index.search(self.connection, 1, query)
        return time.perf_counter() - begin


if hasattr(memws, "SearchIndex"):
    Filled = FormerFilled  # type: ignore[misc]


def milliseconds(seconds: list[float]) -> list[str]:
    """p50 and p95."""
    return [f"{1000 * percentile(seconds, share):.2f}" for share in (0.5, 0.95)]


def questions(stores: Stores) -> list[str]:
    """The queries that are timed."""
    found = [query["q"] for store in stores for query in store["queries"]]
    random.Random(4).shuffle(found)
    return found[:QUERIES]


def speed(data: list[str], sizes: list[int], files: dict[str, str], progress: Progress) -> Iterator[dict[str, Any]]:
    """What each size costs in each memws.py, {name: file}, each a process of its own, asked in turns."""
    asked = questions(load(data))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peers = {name: Peer("search", file, *data, folder=folder) for name, file in files.items()}
        try:
            for name, peer in peers.items():
                peer.ask(path=str(folder / f"{name}.db"), query=[])
            built = dict.fromkeys(peers, 0.0)
            for size in sizes:
                took: dict[str, dict[str, list[float]]] = {name: {"insert": [], "query": []} for name in peers}
                for name, peer in peers.items():
                    built[name] += peer.ask(rows=size)[0]
                    progress.step(f"speed: {size:,} rows, {name}")
                for part in range(10):
                    for name, peer in peers.items():
                        took[name]["insert"] += peer.ask(insert=SINGLES // 10)
                        took[name]["query"] += peer.ask(query=asked[part::10])
                for name, found in took.items():
                    megabytes = (folder / f"{name}.db").stat().st_size / 1e6
                    yield {"rows": size, "memws": name, "seconds": built[name], "megabytes": megabytes, **found}
        finally:
            for peer in peers.values():
                peer.__exit__()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="DATA", help="files of JSON lines")
    parser.add_argument("--large", action="store_true", help="measure the speed at 1,000,000 rows too")
    parser.add_argument("--no-speed", action="store_true", help="measure only what is found")
    parser.add_argument("--baseline", metavar="FILE", help="another memws.py, whose speed is measured beside")
    given = parser.parse_args()
    stores = load(given.data)
    sizes = [] if given.no_speed else [10_000, 100_000, *([1_000_000] if given.large else [])]
    files = {"memws": memws.__file__} | ({"baseline": given.baseline} if given.baseline else {})
    progress = Progress(len(stores) + len(sizes) * len(files))
    progress.step("quality", 0)
    found, seconds = quality(stores, progress)
    speeds = [
        [f"{row['rows']:,}", row["memws"], f"{row['seconds']:.1f}", f"{row['megabytes']:.0f}"]
        + [text for part in ("insert", "query") for text in milliseconds(row[part])]
        for row in speed([str(Path(file).absolute()) for file in given.data], sizes, files, progress)
    ]
    progress.end()
    print(described(machine()))
    print(f"\n{rows_of([['set', 'category', 'questions', *(f'recall@{depth}' for depth in DEPTHS), 'MRR'], *found])}")
    if speeds:
        heads = ["rows", "of", "index s", "file MB", "insert p50 ms", "p95", "query p50 ms", "p95"]
        print(f"\n{rows_of([heads, *speeds])}")
    p50, p95 = milliseconds(seconds)
    print(f"\nQueries over the sets themselves: p50 {p50} ms, p95 {p95} ms. An insert has its own commit, FULL.")


if __name__ == "__main__":
    main()
