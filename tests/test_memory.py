"""Memory: how texts of every script are split and found, how results are ranked, what no query can break."""

import functools
import os
import re
import signal
import sqlite3
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from wire import wire

import memws
from memws import SearchIndex, memory_index, slices, split_terms, stem

HOSTILE = [
    "", " ", "?", "'", '"', '""', '"a', 'a"b', "AND", "OR NOT", "NEAR(a b)", "NEAR", "a AND", "-a", "^a", "a*", "*",
    "(", ")", "terms:a", "search_text:", "{a b}:c", "a + b", "%", "_", "\\", "%%%", "a%b", "'; DROP TABLE x;--",
    "\0", "a\0b", "\ud800", "a\udfffb", "\ud83d", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u200b",
    "\ufeff", "\u202e", "日本", "日", "ไทย", "हिन्दी", "العربية", "кириллица", "ελληνικά", "İstanbul ı",
    "ｆｕｌｌ　ｗｉｄｔｈ", "한국어", "ꙮ", "𝒳", "who are you", "what is it?", "a " * 9_999, "word " * 999, "x" * 9_999,
    "日" * 50_000, "ก" * 50_000, "'" * 50_000, "%" * 60_000, "\u0301" * 50_000, "\U0001f600" * 20_000,
    " ".join(f"w{number}" for number in range(20_000)), "\n\t\r", "1", "-1", "0x41", "NULL", "' OR 1=1", "a:b:c",
    "http://x.y/z?q=1&r=2", "C++", "c#", "$50", "don't", "John's", "\x7f\x1b[0m", "{}[]", "ﷺ", "ﬁ", "ß", "\U0010ffff",
    "(" * 20_000, "a" + "\u0301" * 10_000, "1_2_3", "1_x_u", "u_", "zz_z",
]  # fmt: skip
"What has broken full-text searches: operators, wildcards, quotes, controls, halves of characters, endless words."


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:")
    connection.executescript(memws.SEARCH_SCHEMA + memws.VECTOR_SCHEMA)
    yield connection
    connection.close()


def stamp(minute: int) -> str:
    return f"2026-11-{1 + minute // 1440:02}T{minute // 60 % 24:02}:{minute % 60:02}:00.000Z"


def fill(connection: sqlite3.Connection, rows: Sequence[tuple[str, str]], agent: int = 1) -> SearchIndex:
    """An index over (role, text) messages, a minute apart, their items counted from 1."""
    index = SearchIndex(connection)
    for item, (role, text) in enumerate(rows, 1):
        index.add(connection, agent, "recall", item, role, stamp(item), text)
    return index


def items(found: tuple[list[memws.Hit], int]) -> list[int]:
    return [hit.item for hit in found[0]]


class Cost:
    """Counts SQLite's work, in thousands of its machine's instructions: the same on every computer."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.steps = 0
        connection.set_progress_handler(self._count, 1_000)

    def _count(self) -> int:
        self.steps += 1
        return 0


# ---- the splitter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []),
        ("the of and", []),
        ("Red RED red", ["red", "red", "red"]),
        ("café CAFÉ cafe\u0301", ["caf", "caf", "caf"]),
        ("adopting adopted adopts adopt", ["adopt"] * 4),
        ("puppies puppy", ["puppi"] * 2),
        ("running runs ran run", ["run"] * 4),
        ("went gone go", ["go"] * 3),
        ("children child", ["child"] * 2),
        ("kisses kiss missing miss bus", ["kiss", "kiss", "miss", "miss", "bus"]),
        ("John's cat", ["john", "cat"]),
        ("北京烤鸭", ["北京", "京烤", "烤鸭"]),
        ("鸭", ["鸭"]),
        ("我们的", []),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("서울에 살아요", ["서울", "울에", "살아", "아요"]),
        ("ข้าวผัด", ["ข้า", "้าว", "าวผ", "วผั", "ผัด"]),
        ("Ｆｕｌｌ", ["full"]),
        ("straße STRASSE", ["strass", "strass"]),
        ("ﬁne fine", ["fin", "fin"]),
        ("Санкт-Петербург", ["санкт", "петер"]),
        ("σκυλιά σκυλιού", ["σκυλι", "σκυλι"]),
        ("ıI", ["ii"]),
        ("🎉🎉 ok", ["🎉", "🎉", "ok"]),
        ("a\u200bb so\u00adft", ["ab", "soft"]),
        ("foo_bar-baz.qux", ["foo", "bar", "baz", "qux"]),
        ("v2 3.14 2026-01-31", ["v2", "3", "14", "2026", "01", "31"]),
        ("\ud800 \x00 \x1b", []),
    ],
)
def test_split_terms(text: str, terms: list[str]) -> None:
    """A text is split into folded stems without stop words; scripts without spaces into pairs and triples."""
    assert split_terms(text) == terms


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("我昨天在北京吃了烤鸭", "北京烤鸭"),
        ("猫が好きです", "猫が"),
        ("저는 서울에 살아요", "서울"),
        ("ผมชอบกินข้าวผัด", "ข้าวผัด"),
        ("मुझे हिन्दी फ़िल्में पसंद हैं", "हिन्दी फिल्में"),
        ("আমি ঢাকায় থাকি", "ঢাকায়"),
        ("எனக்கு தமிழ் பிடிக்கும்", "தமிழ்"),
        ("ذهبتُ إلى المدرسة أمس", "ذهبت المدرسة"),
        ("הלכתי לַשּׁוּק", "לשוק"),
        ("Мы ездили в Санкт-Петербург летом", "в Петербурге"),
        ("Το σκυλί μου λέγεται Ρεξ", "σκυλια"),
        ("Ես ապրում եմ Երևանում", "Երևանում"),
        ("მე ვცხოვრობ თბილისში", "თბილისში"),
        ("አዲስ አበባ እኖራለሁ", "አዲስ"),
        ("ខ្ញុំរស់នៅភ្នំពេញ", "ភ្នំពេញ"),
        ("İstanbul'da ışık", "istanbul isik"),
        ("Ｆｕｌｌ ｗｉｄｔｈ", "full width"),
        ("Ça va très bien, élève", "eleve tres"),
        ("Tôi sống ở Hà Nội", "ha noi"),
        ("Die Straße ist groß", "strasse gross"),
        ("we adopted two puppies", "adopting a puppy"),
        ("so happy 🎉🎉", "🎉"),
        ("my cat's name is Tom", "cats"),
        ("ဗမာစာ ဖတ်တယ်", "ဗမာစာ"),
        ("vivo en Córdoba", "cordoba"),
    ],
)
def test_every_script_is_found(connection: sqlite3.Connection, text: str, query: str) -> None:
    """A text is found by its words in every script, whatever their accents, width and endings."""
    index = fill(connection, [("user", "something else entirely"), ("user", text), ("user", "1234")])
    found = items(index.search(connection, 1, query))
    assert found[:1] == [2]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_splitting_never_fails_and_gives_legal_terms(text: str) -> None:
    """Every text gives terms that the index can hold: no spaces, no quotes, no halves of characters."""
    for term in split_terms(text):
        assert term
        assert not set(term) & set(" \t\n\"'\x00_")
        assert term.encode()


def test_text_and_query_are_split_alike() -> None:
    """A text in upper case or in another normal form gives the same terms."""
    for text in ("Große Vögel singen früh", "Ｆｕｌｌ ｗｉｄｔｈ", "हिन्दी", "résumés naïfs"):
        assert split_terms(text.upper()) == split_terms(text.lower())
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            assert split_terms(unicodedata.normalize(form, text)) == split_terms(text)


@pytest.mark.parametrize(
    ("first", "second"), [("made", "making"), ("wrote", "written"), ("studies", "studying"), ("miss", "missed")]
)
def test_forms_of_a_word_have_one_stem(first: str, second: str) -> None:
    """Regular and irregular forms of an English word meet in one stem."""
    assert stem(first) == stem(second)


@pytest.mark.parametrize("text", ["", "one", "word " * 500, "日本語" * 1000, "x" * 65_536, "a b\n" * 10_000, " " * 999])
def test_slices_join_to_the_text(text: str) -> None:
    """A long text becomes slices of at most 120 words that join to it."""
    found, words = slices(text)
    parts = list(found)
    assert "".join(parts) == text
    assert [slices(part)[1] <= memws.ROW_WORDS for part in parts] == [True] * len(parts)
    assert words == sum(slices(part)[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("Yes.", 0),
        ("Where?", 1),
        ("Hello. Where is it?", 0.5),
        ("どこですか？", 1),
        ("أين؟", 1),
        ("no end", 0),
    ],
)
def test_asking_is_the_share_of_questions(text: str, share: float) -> None:
    """The share of a text's sentences that end in a question mark of any script."""
    assert memws.asking(text) == share


# ---- searching -------------------------------------------------------------------------------------------------------


def test_hostile_queries_are_answered(connection: sqlite3.Connection) -> None:
    """No query fails over a filled index, whatever stores, roles and pages it asks for."""
    rows = [("user", f"word a w{number} cat {'日本語' if number % 3 else 'ไทย'}") for number in range(300)]
    index = fill(connection, rows)
    index.add(connection, 1, "archival", 1, "", stamp(400), "word a passage")
    for query in HOSTILE:
        for options in (
            {},
            {"roles": ("user", memws.clean_text(query[:9]))},
            {"stores": ("archival",)},
            {"limit": 0},
            {"offset": 10**6},
        ):
            found, total = index.search(connection, 1, query, **options)
            assert 0 <= len(found) <= min(10, total), query[:20]


def test_hostile_queries_cost_no_more_than_a_plain_one(connection: sqlite3.Connection) -> None:
    """A query of any length does at most a bounded amount of SQLite's work, ten scans of the rows."""
    rows = [("user", f"word a w{number} w{number * 7 % 900} cat") for number in range(1_000)]
    index = fill(connection, rows)
    cost = Cost(connection)
    index.search(connection, 1, "no such text anywhere %")
    scan = cost.steps
    for query in HOSTILE:
        before = cost.steps
        index.search(connection, 1, query)
        assert cost.steps - before <= 10 * scan, query[:20]


def test_hostile_texts_are_kept(connection: sqlite3.Connection) -> None:
    """No text fails to be indexed, and those with words are found by them."""
    index = fill(connection, [("user", text) for text in HOSTILE])
    assert index.search(connection, 1, "", limit=1)[1] == len(HOSTILE)
    for item, text in enumerate(HOSTILE, 1):
        if split_terms(text) and len(text) < 100:
            assert item in items(index.search(connection, 1, text, limit=100)), text


def test_filters(connection: sqlite3.Connection) -> None:
    """Store, role and time narrow the hits; the end of a time is not included."""
    index = fill(
        connection, [("user" if number % 2 else "assistant", f"apple number {number}") for number in range(60)]
    )
    index.add(connection, 1, "archival", 1, "", stamp(100), "an apple a day")
    assert index.search(connection, 1, "apple")[1] == 61
    assert index.search(connection, 1, "apple", ("archival",))[0][0][:2] == ("archival", 1)
    assert index.search(connection, 1, "apple", ("recall",), ("user",))[1] == 30
    assert index.search(connection, 1, "apple", roles=("assistant",))[1] == 30
    assert index.search(connection, 1, "", roles=("assistant",))[1] == 30
    assert index.search(connection, 1, "pple num", roles=("user",))[1] == 30
    assert index.search(connection, 1, "apple", roles=())[1] == 0
    found, total = index.search(connection, 1, "apple", ("recall",), None, stamp(10), stamp(20), limit=50)
    assert total == 10
    assert sorted(hit.item for hit in found) == list(range(10, 20))
    assert index.search(connection, 1, "apple", since="2027")[1] == 0
    assert index.search(connection, 1, "apple", until="2026")[1] == 0


@pytest.mark.parametrize("query", ["cake", "", "ake"])
def test_a_clock_set_back_hides_nothing(connection: sqlite3.Connection, query: str) -> None:
    """Messages between two times are found although the clock was set back between them."""
    index = SearchIndex(connection)
    for item, at in enumerate(("10:00", "10:30", "09:50", "10:10", "11:00"), 1):
        index.add(connection, 1, "recall", item, "user", f"2026-11-24T{at}:00.000Z", f"cake {item}")
    between = {"since": "2026-11-24T10:05:00.000Z", "until": "2026-11-24T10:40:00.000Z"}
    found = set(items(index.search(connection, 1, query, **between)))
    assert {2, 4} <= found <= {2, 3, 4}


def test_pages_follow_each_other(connection: sqlite3.Connection) -> None:
    """Pages hold every hit once, and stay the same while messages arrive."""
    index = fill(connection, [("user", f"apple number {number}") for number in range(61)])
    cursor = (61, 0)

    def pages() -> list[list[int]]:
        starts = range(0, 70, 10)
        return [items(index.search(connection, 1, "apple", offset=start, up_to=cursor)) for start in starts]

    first = pages()
    index.add(connection, 1, "recall", 62, "user", stamp(101), "apple apple apple")
    assert pages() == first
    assert sorted(item for page in first for item in page) == list(range(1, 62))
    assert items(index.search(connection, 1, "", limit=1)) == [62]


def test_the_newest_come_first_for_no_query(connection: sqlite3.Connection) -> None:
    """An empty query, and one of stop words alone, gives the newest messages first."""
    index = fill(connection, [("user", f"apple {number}") for number in range(30)])
    for query in ("", "   ", "who are you", "?"):
        assert items(index.search(connection, 1, query, limit=3)) == [30, 29, 28], query


def test_removed_rows_are_gone(connection: sqlite3.Connection) -> None:
    """A removed message and a dropped agent are found no more, down to the last term; other agents stay."""
    index = fill(connection, [("user", "a red kite"), ("user", "a blue kite")])
    fill(connection, [("user", "a kite of another agent")], agent=2)
    index.remove(connection, 1, "recall", 1)
    index.remove(connection, 1, "recall", 99)
    assert items(index.search(connection, 1, "kite")) == [2]
    index.drop_agent(connection, 1)
    assert index.search(connection, 1, "kite") == ([], 0)
    assert index.search(connection, 2, "kite")[1] == 1
    assert connection.execute("SELECT term FROM search_counts WHERE term LIKE '1%'").fetchall() == []


def test_parts_of_words_are_found(connection: sqlite3.Connection) -> None:
    """Parts of words and punctuation are found as they stand, the newest first."""
    index = fill(connection, [("user", "def getUserName(x):"), ("user", "100% sure"), ("user", ":-)")])
    assert items(index.search(connection, 1, "serNam")) == [1]
    assert items(index.search(connection, 1, ":-)")) == [3]
    assert items(index.search(connection, 1, "0%")) == [2]
    assert index.search(connection, 1, "xyzzy") == ([], 0)


def test_a_long_message_is_one_hit(connection: sqlite3.Connection) -> None:
    """A text of many slices is found once, by words of its beginning, middle and end."""
    text = " ".join(f"word{number}" for number in range(8000))[:65_536]
    index = fill(connection, [("user", text), ("user", "word9999")])
    for query in ("word5 word4000 word6000", "word1", "word7000"):
        assert items(index.search(connection, 1, query)) == [1]


def test_agents_do_not_see_each_other(connection: sqlite3.Connection) -> None:
    """Rows of another agent, however many, change neither hits nor scores nor the work of a search."""
    index = fill(connection, [("user", f"the red kite {number} flew") for number in range(20)])
    cost = Cost(connection)
    before = index.search(connection, 1, "red kite", limit=20)
    alone, cost.steps = cost.steps, 0
    for agent in (2, 11, 12):
        fill(connection, [("user", f"a red kite and a blue kite {number}") for number in range(1_000)], agent)
    cost.steps = 0
    assert index.search(connection, 1, "red kite", limit=20) == before
    assert cost.steps <= alone + 2
    assert index.search(connection, 3, "red kite") == ([], 0)


# ---- ranking ---------------------------------------------------------------------------------------------------------


def test_the_turns_around_a_hit_are_found() -> None:
    """The answer to a question is found by the question's words, within a session only."""
    turns = [
        ("A", "d1", "What is your favourite food?"), ("B", "d1", "Lasagna!"),
        ("A", "d2", "Nice weather"), ("B", "d2", "Hm"),
    ]  # fmt: skip
    assert sorted(memory_index(turns).search("favourite food")) == [0, 1]


def test_an_hour_of_silence_ends_a_session(connection: sqlite3.Connection) -> None:
    """A turn more than an hour after another takes no words from it."""
    index = SearchIndex(connection)
    for item, at in enumerate(("10:00", "10:59", "12:30"), 1):
        text = "pancakes" if item == 1 else f"reply {item}"
        index.add(connection, 1, "recall", item, "user", f"2026-11-24T{at}:00.000Z", text)
    assert items(index.search(connection, 1, "pancakes")) == [1, 2]


def test_a_brief_statement_comes_before_a_long_answer() -> None:
    """What a person said briefly comes before a long answer that says the same words again and again."""
    answer = "Marathon training in May: run well, rest well. " * 40
    turns = [("user", "d1", "I want to run a marathon in May"), ("assistant", "d2", answer)]
    assert memory_index(turns).search("When do I run a marathon?") == [0, 1]


def test_a_statement_comes_before_a_question() -> None:
    """Of two turns with the same words, the one that says something comes before the one that only asks."""
    turns = [("Ann", "d1", "I like sushi with ginger."), ("Ann", "d2", "Do you like sushi with ginger?")]
    assert memory_index(turns).search("sushi ginger") == [0, 1]


def test_an_answer_comes_before_the_question() -> None:
    """What a speaker said comes before what was asked, and a named speaker's turns before another's."""
    turns = [("Ann", "", "Where do you ski, Bob?"), ("Bob", "", "In Davos!"), ("Ann", "", "I ski in Zermatt myself.")]
    index = memory_index(turns)
    assert index.search("Where does Bob ski?")[0] == 1
    assert index.search("Where does Ann ski?")[0] == 2


def test_rare_words_weigh_more_than_common_ones() -> None:
    """A text with the query's rare word comes before those with its common one."""
    turns = [("u", str(number), "the kite flew over the hill") for number in range(20)]
    turns[11] = ("u", "11", "a zeppelin flew over the hill")
    assert memory_index(turns).search("kite zeppelin")[0] == 11


def test_a_bounded_number_of_rows_is_read(connection: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a query's words stand in more rows than are read, the rarest words are read first, then the newest rows."""
    monkeypatch.setattr(memws, "POSTINGS", 50)
    index = SearchIndex(connection)
    words = ["zebra" if number == 10 else "dog" if number % 3 == 0 else "cat" for number in range(500)]
    for item, word in enumerate(words, 1):
        index.add(connection, 1, "recall", item, "user", stamp(item), word, joined=False)
    dogs = [item for item, word in enumerate(words, 1) if word == "dog"]
    assert items(index.search(connection, 1, "cat zebra dog", limit=500)) == [11, *reversed(dogs[-49:])]


def test_the_past_of_a_verb_is_found() -> None:
    """A question's verb finds its irregular past."""
    turns = [("a", "", "nothing here"), ("a", "", "We went to the zoo, the kids loved it")]
    assert memory_index(turns).search("go")[:1] == [1]


# ---- an SQLite without FTS5 ------------------------------------------------------------------------------------------

TOPICS = (
    "red kite",
    "blue whale",
    "日本の天気",
    "Мы ездили летом",
    "ran home",
    "the walrus sang",
    "kite? why?",
    "x_1 C++",
)


class PlainConnection(sqlite3.Connection):
    """A connection of an SQLite that was built without FTS5: it refuses as that one does."""

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        self._refuse(sql)
        return super().execute(sql, *values)

    def executemany(self, sql: str, values: Any) -> sqlite3.Cursor:
        self._refuse(sql)
        return super().executemany(sql, values)

    def executescript(self, sql: str) -> sqlite3.Cursor:
        self._refuse(sql)
        return super().executescript(sql)

    def _refuse(self, sql: str) -> None:
        if re.search(r"USING fts5|(FROM|INTO) search_(text|counts)", sql):
            raise sqlite3.OperationalError("no such module: fts5")


@contextmanager
def without_fts5(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every connection that is made meanwhile lacks FTS5."""
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=PlainConnection))
        yield


def texts(count: int) -> list[tuple[str, str]]:
    """Messages of two roles, alike and unlike."""
    return [
        ("user" if number % 2 else "assistant", f"{TOPICS[number % 8]} {TOPICS[number % 5]} and {number} more")
        for number in range(count)
    ]


def test_without_fts5_searches_find_the_same(connection: sqlite3.Connection) -> None:
    """The index of an SQLite without FTS5 gives the same hits, scores and totals, also after rows are removed."""
    with closing(sqlite3.connect(":memory:", factory=PlainConnection)) as plain_connection:
        plain_connection.executescript(memws.SEARCH_SCHEMA + memws.VECTOR_SCHEMA)
        index, plain = fill(connection, texts(300)), fill(plain_connection, texts(300))
        assert (index.version, plain.version) == (memws.Postings.VERSION, -memws.Postings.VERSION)

        def compare() -> None:
            for query in (*TOPICS, *HOSTILE, "kite 17 more", "wal", ""):
                for options in (
                    {"limit": 50},
                    {"roles": ("user",), "offset": 5},
                    {"since": stamp(20), "until": stamp(90)},
                ):
                    expected = index.search(connection, 1, query, **options)
                    assert plain.search(plain_connection, 1, query, **options) == expected, (query[:20], options)

        assert index.search(connection, 1, "walrus kite")[1] > 100
        compare()
        for item in range(1, 300, 3):
            index.remove(connection, 1, "recall", item)
            plain.remove(plain_connection, 1, "recall", item)
        compare()
        plain.drop_agent(plain_connection, 1)
        assert plain_connection.execute("SELECT count(*) FROM search_terms").fetchone() == (0,)


def test_memory_index_without_fts5(monkeypatch: pytest.MonkeyPatch) -> None:
    """memory_index gives the same positions without FTS5."""
    turns = [(role, str(number // 20), text) for number, (role, text) in enumerate(texts(200))]
    with without_fts5(monkeypatch):
        plain = memory_index(turns)
    index = memory_index(turns)
    for query in (*TOPICS, *HOSTILE):
        assert plain.search(query, 30) == index.search(query, 30), query[:20]


Serve = Callable[..., memws.WebSocketServer]


def test_a_database_moves_between_both_kinds(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that meets an SQLite without FTS5, and then one with it, is indexed anew and finds everything."""

    def visit(*passages: str, forget: int | None = None) -> list[list[Any]]:
        """Serve the database, change something, and search."""
        server = serve()
        with memws.connect(server.url) as talk:
            for name in ("ada", "bob"):
                if name not in [agent["agent_name"] for agent in talk.command("list_agents")["agents"]]:
                    talk.create_agent(name)
                talk.load_agent(name)
                for passage in passages:
                    talk.command("insert_passage", text=f"{passage} of {name}")
                if forget is not None:
                    talk.command("delete_passage", passage_id=forget)
            talk.ask(f"I saw {' and '.join(passages)} today")
            pages = [talk.command("search_memory", query=query, limit=50)["items"] for query in ("walrus", "kite", "")]
        server.stop()
        return [[(item["store"], item["id"], item["text"]) for item in page] for page in pages]

    first = visit("walrus", "kite")
    with without_fts5(monkeypatch):
        second = visit("walrus two", "kite two")
        third = visit("walrus three", "kite three", forget=1)
    fourth = visit("walrus four", "kite four")
    for before, after in ((first, second), (third, fourth)):
        for old, new in zip(before, after, strict=True):
            assert set(old) < set(new)
    gone = ("archival", 1, "walrus of bob")
    assert gone in second[0]
    assert gone not in third[0]
    assert [item for item in second[0] if item not in third[0]] == [gone]
    walruses = {text for _, _, text in fourth[0]}
    assert walruses >= {f"walrus{number} of bob" for number in (" two", " three", " four")}
    assert memws.main(["check", "--db", serve().options.db]) == 0


# ---- a database written before ---------------------------------------------------------------------------------------


def old_database(path: Path, agents: int, messages: int) -> None:
    """A database of schema version 1, nothing of which is in its index."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(memws._MIGRATIONS[0] + memws.Postings.SCHEMA)
        config = {key: value for key, value in memws.AgentConfig.DEFAULTS.items() if key != "embedding"}
        for agent in range(1, agents + 1):
            row = (agent, f"agent{agent}", memws.encode_json(config), "{}", stamp(0), stamp(0), 0)
            connection.execute(
                "INSERT INTO agents (id, name, config, state, created, last_active, last_seq) VALUES (?,?,?,?,?,?,?)",
                row,
            )
            for place, label in enumerate(("persona", "human")):
                connection.execute("INSERT INTO blocks VALUES (?,?,?,'',2000,1)", (agent, place, label))
            rows = []
            for number in range(1, messages + 1):
                role, text = ("user", f"kite {number} of {agent}") if number % 2 else ("assistant", "hm")
                body = {"role": role, "content": text}
                said = None if role == "user" else f"whale {number} of {agent}"
                rows.append((agent, number, role, stamp(number), text, memws.encode_json(body), said, None, 0, 0))
            connection.executemany("INSERT INTO messages VALUES (?,?,?,?,?,?,?,?,?,?)", rows)
            connection.execute("INSERT INTO passages VALUES (?,?,?,?)", (agent, 1, f"walrus of {agent}", stamp(9)))
        connection.executescript(f"PRAGMA application_id = {memws._APPLICATION_ID}; PRAGMA user_version = 1;")
        connection.commit()


DYING = """
import os, signal, sqlite3, sys
import memws

class Connection(sqlite3.Connection):
    left = int(sys.argv[2])

    def execute(self, sql, *values):
        if "INTO search_rows" in sql:
            Connection.left -= 1
            if not Connection.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(sql, *values)

connect = sqlite3.connect
sqlite3.connect = lambda *values, **options: connect(*values, factory=Connection, **options)
memws.open_database(sys.argv[1], "normal")
"""
"A program that opens a database and is killed when it has indexed so many texts."


def check_found(connection: sqlite3.Connection, agents: int, messages: int) -> None:
    """Every text of every agent is found, once."""
    index = SearchIndex(connection)
    for agent in range(1, agents + 1):
        assert index.search(connection, agent, "", limit=1)[1] == messages + 1
        assert index.search(connection, agent, "kite", roles=("user",))[1] == (messages + 1) // 2
        assert index.search(connection, agent, "whale", roles=("assistant",))[1] == messages // 2
        assert index.search(connection, agent, "walrus", limit=1)[0][0][:2] == ("archival", 1)
        assert items(index.search(connection, agent, f"kite {messages - 1}", limit=1)) == [messages - 1]


def test_an_old_database_is_indexed_on_opening(tmp_path: Path) -> None:
    """A database written before there were versions of the index is indexed on its first opening, and only then."""
    path = tmp_path / "old.db"
    old_database(path, agents=3, messages=60)
    assert memws.main(["export", "agent1", "--db", str(path)]) == 0
    with closing(memws.open_database(str(path), "normal")) as connection:
        assert connection.total_changes > 0
        check_found(connection, 3, 60)
        kept = connection.execute("SELECT count(*), sum(length(text)), sum(length(body)) FROM messages").fetchone()
    with closing(memws.open_database(str(path), "normal")) as connection:
        assert connection.total_changes == 0
        check_found(connection, 3, 60)
        assert (
            connection.execute("SELECT count(*), sum(length(text)), sum(length(body)) FROM messages").fetchone() == kept
        )
    assert memws.main(["check", "--db", str(path)]) == 0


def test_an_old_database_is_served(tmp_path: Path, serve: Serve) -> None:
    """The agents of such a database load, search what they had and go on."""
    path = tmp_path / "old.db"
    old_database(path, agents=2, messages=40)
    with memws.connect(serve(db=str(path)).url) as talk:
        talk.load_agent("agent2")
        assert talk.command("get_agent")["settings"]["embedding"] is None
        assert talk.command("search_memory", query="walrus")["items"][0]["text"] == "walrus of 2"
        assert (
            talk.command("search_memory", query="whale 40", roles=["assistant"])["items"][0]["text"] == "whale 40 of 2"
        )
        talk.ask("A kite again")
        assert talk.command("search_memory", query="again")["items"][0]["text"] == "A kite again"
        assert talk.command("search_memory", query="", store="recall", roles=["user"])["total"] == 21


@pytest.mark.parametrize("repair", [[], ["--repair"]])
@pytest.mark.parametrize("kind", ["old", "without FTS5", "made without FTS5"])
def test_a_check_leaves_an_index_of_another_kind_to_the_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, repair: list[str]
) -> None:
    """A check finds no damage where the next opening indexes anew anyway, and a repair does not harm it."""
    path, agents = tmp_path / "old.db", 0 if kind == "made without FTS5" else 2
    if agents:
        old_database(path, agents, 20)
    if kind != "old":
        with without_fts5(monkeypatch):
            memws.open_database(str(path), "normal").close()
    assert memws.main(["check", *repair, "--db", str(path)]) == 0
    with closing(memws.open_database(str(path), "normal")) as connection:
        check_found(connection, agents, 20)
    assert memws.main(["check", "--db", str(path)]) == 0


@pytest.mark.parametrize("kind", ["old", "without FTS5"])
def test_an_interrupted_indexing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A process killed while it indexes loses nothing: the next opening goes on with the agents that are left."""
    path, agents, messages = tmp_path / "old.db", 4, 100
    old_database(path, agents, messages)
    if kind == "without FTS5":
        with without_fts5(monkeypatch):
            memws.open_database(str(path), "normal").close()
    environment = {**os.environ, "PYTHONPATH": str(Path(memws.__file__).parent)}
    arguments = [sys.executable, "-c", DYING, str(path), str(messages * 5 // 2)]
    assert subprocess.run(arguments, env=environment, check=False).returncode == -signal.SIGKILL
    with closing(sqlite3.connect(path)) as connection:  # a mark that indexing anew would wipe out
        sql = "SELECT id FROM agents WHERE search_version = ?"
        ready = [row[0] for row in connection.execute(sql, (memws.Postings.VERSION,))]
        assert ready == [1, 2]
        connection.executemany("UPDATE search_rows SET asked = 7 WHERE agent = ?", [(agent,) for agent in ready])
        connection.commit()
    with closing(memws.open_database(str(path), "normal")) as connection:
        marked = [row[0] for row in connection.execute("SELECT DISTINCT agent FROM search_rows WHERE asked = 7")]
        assert marked == ready
        check_found(connection, agents, messages)


# ---- pages over the wire ---------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(("query", "limit"), [("kite", 3), ("kite", 7), ("", 4), ("ite num", 5)])
async def test_pages_over_the_wire_stay_while_messages_arrive(serve: Serve, query: str, limit: int) -> None:
    """Pages of search_memory hold each hit once although turns and passages that fit arrive between them."""
    async with wire(serve()) as client:
        await client.ok("create_agent", config={})
        for number in range(12):
            await client.ok("insert_passage", text=f"kite number {number}")
        for number in range(4):
            await client.turn(f"I saw the kite number {number} fly")
        before = await client.ok("search_memory", query=query, limit=50)
        expected = [(item["store"], item["id"]) for item in before["items"]]
        pages = -(-len(expected) // limit)
        seen = []
        for page in range(1, pages + 1):
            result = await client.ok("search_memory", query=query, limit=limit, page=page)
            assert (result["total"], result["pages"], result["page"]) == (len(expected), pages, page)
            seen += [(item["store"], item["id"]) for item in result["items"]]
            await client.turn(f"kite kite kite number kite {page}")
            await client.ok("insert_passage", text=f"kite number kite {page}")
            await client.ok("search_memory", query="another", limit=limit)
        assert seen == expected
        assert (await client.ok("search_memory", query=query, limit=limit))["total"] > len(expected)


# ---- memory_index ----------------------------------------------------------------------------------------------------


def test_any_turns_are_indexed() -> None:
    """Speakers and dates may be any texts, and no turns at all are fine."""
    assert memory_index([]).search("x") == []
    index = memory_index(
        [("", "", ""), ("\0", "\ud800", "héllo \udfff"), ("x", "yesterday", "héllo there")], "archival"
    )
    assert set(index.search("hello")) == {1, 2}
    assert index.search("\ud800", 2)


@pytest.mark.parametrize("kind", ["recall", "archival"])
def test_positions_are_the_turns(kind: str) -> None:
    """A search gives positions of the turns that were handed in, best first, at most as many as asked."""
    index = memory_index((("ann", f"day {number}", f"thing{number} and cake") for number in range(50)), kind)
    for number in (0, 7, 49):
        assert index.search(f"thing{number}")[0] == number
    assert len(index.search("cake")) == 10
    assert sorted(index.search("cake", limit=99)) == list(range(50))
    assert index.search("cake", limit=0) == []


def test_an_unknown_kind_is_refused() -> None:
    """A kind of memory that there is not is a ValueError that names the two."""
    with pytest.raises(ValueError, match="unknown kind 'core'; expected 'recall' or 'archival'"):
        memory_index([], "core")


def test_any_query_is_answered() -> None:
    """Every hostile query gets positions within the turns."""
    index = memory_index([("u", "", text) for text in HOSTILE])
    for query in HOSTILE:
        assert all(0 <= position < len(HOSTILE) for position in index.search(query)), query[:20]


# ---- plain data ------------------------------------------------------------------------------------------------------


def test_excerpt_keeps_both_ends() -> None:
    """A text that is too long keeps its beginning and end, and says how much is left out."""
    assert memws.excerpt("x" * 100, 100) == "x" * 100
    shown = memws.excerpt("a" * 1_000 + "b" * 1_000, 300)
    assert shown == "a" * 200 + " […1,700 characters left out here; search finds them…] " + "b" * 100


def test_difference_shows_lines() -> None:
    """An edit is told as the lines that went and came."""
    assert memws.difference("a\nb\nc", "a\nB\nc\nd") == "-b\n+B\n+d"
    assert memws.difference("", "new") == "+new"
    assert memws.difference("same", "same") == ""


def test_estimate_grows_with_the_bytes() -> None:
    """Tokens are estimated by bytes, so that scripts of several bytes a letter count more."""
    assert memws.estimate_tokens("") == 4
    assert memws.estimate_tokens("x" * 400) == 104
    assert memws.estimate_tokens("日" * 400) == 304


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("plain", "plain"),
        ("a\x00b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("\udc00\ud800", "\ufffd\ufffd"),
        ("a\ud83d\ude00b", "a\U0001f600b"),
        ("日本\U0001f600\x1b", "日本\U0001f600\x1b"),
    ],
)
def test_clean_text(text: str, clean: str) -> None:
    """NUL and lone surrogates become U+FFFD, split pairs one character; everything else stays."""
    assert memws.clean_text(text) == clean
