"""How well and how fast memory search finds, for run.py: over files of JSON lines, one memory a line.

{set, kind: recall | archival, docs: [{id, date, speaker, text}], queries: [{q, cat, ev: [doc ids]}]}
"""

import itertools
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import memws

STEP = 20_000  # rows that are indexed in one transaction

Stores = list[dict[str, Any]]


def load(files: Iterable[str]) -> Stores:
    return [json.loads(line) for file in files for line in Path(file).read_text("utf-8").splitlines() if line.strip()]


def quality(stores: Stores) -> Iterator[tuple[str, str, int, float, float]]:
    """For each set and category ("" is all of a set): the number of questions, recall@10 and mean reciprocal rank."""
    scores: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for store in stores:
        index = memws.memory_index([(doc["speaker"], doc["date"], doc["text"]) for doc in store["docs"]], store["kind"])
        for query in store["queries"]:
            found = [store["docs"][position]["id"] for position in index.search(query["q"], 20)]
            recall = len(set(query["ev"]).intersection(found[:10])) / len(set(query["ev"]))
            rank = next((1 / rank for rank, doc in enumerate(found, 1) if doc in query["ev"]), 0.0)
            for category in ("", str(query["cat"])):
                scores[store["set"], category].append((recall, rank))
    categories = [name for name, category in scores if category]
    for (name, category), found in sorted(scores.items()):
        if not category or categories.count(name) > 1:  # a set of one category is told once
            recalls, ranks = zip(*found, strict=True)
            yield name, category, len(found), statistics.fmean(recalls), statistics.fmean(ranks)


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


def texts() -> Iterator[str]:
    """Endless texts of 20 made-up words, common and rare ones as in a language; "maru" is in about every second."""
    pick, syllables = random.Random(1), [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai", "on")]
    words = ["maru", *("".join(pick.choices(syllables, k=pick.randint(2, 4))) for _ in range(30_000))]
    weights = [0.2 + sum_ for sum_ in itertools.accumulate(1 / (rank + 2) ** 0.9 for rank in range(len(words)))]
    while True:
        yield " ".join(pick.choices(words, cum_weights=weights, k=20))


class Filled:
    """A database file with one agent's memory, filled up in steps, on the connection that writes."""

    def __init__(self, path: str, texts: Iterator[str], kind: str = "recall") -> None:
        self.rows, self.kind, self._texts = 0, kind, texts
        self._open(path)

    def _open(self, path: str) -> None:
        self.database = memws.database_at(path)
        self.connection = self.database.open()
        record = memws.AgentRecord("archive", memws.read_config({}, {})[0], [])
        self.agent = memws.create_agent(self.connection, record).id

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
            documents = [memws.Document(number, self.kind, *about) for number, *about in rows]
            docs = [memws.remember(self.connection, self.agent, document) for document in documents]
            memws.index(self.connection, "doc >= ?", docs[0])

    def search(self, query: str) -> float:
        """Seconds of a search of one page in both memories."""
        begin = time.perf_counter()
        memws.search(self.connection, self.agent, memws.Query(query))
        return time.perf_counter() - begin


class FormerFilled(Filled):
    """The same for memws as it was up to commit cd96516."""

    def _open(self, path: str) -> None:
        self.connection = memws.open_database(path, "full")
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
