"""Memory: how texts of every script are split and found, how results are ranked, what no query can break."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta

import pytest

import memws
from memws import MemoryIndex, memory_index, split_terms

HOSTILE = [  # what has broken full-text searches: operators, wildcards, quotes, controls, half characters, long words
    "", " ", "?", "'", '"', '""', '"a', 'a"b', "AND", "OR NOT", "NEAR(a b)", "NEAR", "a AND", "-a", "^a", "a*", "*",
    "(", ")", "terms:a", "postings:", "{a b}:c", "a + b", "%", "_", "\\", "%%%", "a%b", "'; DROP TABLE memory;--",
    "\0", "a\0b", "\ud800", "a\udfffb", "\ud83d", "\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\u200b",
    "\ufeff", "\u202e", "日本", "日", "ไทย", "हिन्दी", "العربية", "кириллица", "ελληνικά", "İstanbul ı",
    "ｆｕｌｌ　ｗｉｄｔｈ", "한국어", "ꙮ", "𝒳", "who are you", "what is it?", "a " * 9_999, "word " * 999, "x" * 9_999,
    "日" * 50_000, "ก" * 50_000, "'" * 50_000, "%" * 60_000, "\u0301" * 50_000, "\U0001f600" * 20_000,
    " ".join(f"w{number}" for number in range(20_000)), "\n\t\r", "1", "-1", "0x41", "NULL", "' OR 1=1", "a:b:c",
    "http://x.y/z?q=1&r=2", "C++", "c#", "$50", "don't", "John's", "\x7f\x1b[0m", "{}[]", "ﷺ", "ﬁ", "ß", "\U0010ffff",
    "(" * 20_000, "a" + "\u0301" * 10_000, "1_2_3", "1_x_u", "u_", "zz_z",
]  # fmt: skip


def said(*texts: str, kind: str = "recall") -> MemoryIndex:
    """An index over what one speaker said in one session."""
    return memory_index([("u", "", text) for text in texts], kind)


@contextmanager
def cost(index: MemoryIndex) -> Iterator[list[int]]:
    """Counts SQLite's work, in thousands of its machine's instructions: the same on every computer."""
    steps: list[int] = []
    index._connection.set_progress_handler(lambda: steps.append(1), 1_000)
    yield steps
    index._connection.set_progress_handler(None, 0)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("", []), ("the of and", []), ("Red RED red", ["red", "red", "red"]),
        ("café CAFÉ cafe\u0301", ["caf", "caf", "caf"]), ("adopting adopted adopts adopt", ["adopt"] * 4),
        ("puppies puppy", ["puppi"] * 2), ("running runs ran run", ["run"] * 4), ("went gone go", ["go"] * 3),
        ("children child", ["child"] * 2), ("made making wrote written", ["mak", "mak", "writ", "writ"]),
        ("studies studying missed", ["studi", "studi", "miss"]),
        ("kisses kiss missing miss bus", ["kiss", "kiss", "miss", "miss", "bus"]), ("John's cat", ["john", "cat"]),
        ("北京烤鸭", ["北京", "京烤", "烤鸭"]), ("鸭", ["鸭"]), ("我们的", []),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("서울에 살아요", ["서울", "울에", "살아", "아요"]), ("ข้าวผัด", ["ข้า", "้าว", "าวผ", "วผั", "ผัด"]),
        ("Ｆｕｌｌ", ["full"]), ("straße STRASSE", ["strass", "strass"]),
        ("ﬁne fine", ["fin", "fin"]), ("Санкт-Петербург", ["санкт", "петер"]),
        ("σκυλιά σκυλιού", ["σκυλι", "σκυλι"]), ("ıI", ["ii"]), ("🎉🎉 ok", ["🎉", "🎉", "ok"]),
        ("a\u200bb so\u00adft", ["ab", "soft"]), ("foo_bar-baz.qux", ["foo", "bar", "baz", "qux"]),
        ("v2 3.14 2026-01-31", ["v2", "3", "14", "2026", "01", "31"]), ("\ud800 \x00 \x1b", []),
    ],
)  # fmt: skip
def test_split_terms(text: str, terms: list[str]) -> None:
    """A text is split into folded stems without stop words; scripts without spaces into pairs and triples."""
    assert split_terms(text) == terms


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("我昨天在北京吃了烤鸭", "北京烤鸭"), ("저는 서울에 살아요", "서울"), ("ผมชอบกินข้าวผัด", "ข้าวผัด"),
        ("मुझे हिन्दी फ़िल्में पसंद हैं", "हिन्दी फिल्में"), ("எனக்கு தமிழ் பிடிக்கும்", "தமிழ்"),
        ("ذهبتُ إلى المدرسة أمس", "ذهبت المدرسة"), ("הלכתי לַשּׁוּק", "לשוק"),
        ("Мы ездили в Санкт-Петербург летом", "в Петербурге"), ("Το σκυλί μου λέγεται Ρεξ", "σκυλια"),
        ("ខ្ញុំរស់នៅភ្នំពេញ", "ភ្នំពេញ"), ("İstanbul'da ışık", "istanbul isik"), ("Tôi sống ở Hà Nội", "ha noi"),
        ("Die Straße ist groß", "strasse gross"), ("we adopted two puppies", "adopting a puppy"),
        ("We went to the zoo, the kids loved it", "go"), ("so happy 🎉🎉", "🎉"), ("ဗမာစာ ဖတ်တယ်", "ဗမာစာ"),
        ("def getUserName(x):", "serNam"), ("100% sure", "0%"), ("hm :-)", ":-)"),
    ],
)  # fmt: skip
def test_every_script_is_found(text: str, query: str) -> None:
    """A text is found by its words in every script, and by parts of them; its normal forms have the same terms."""
    assert said("something else entirely", text, "1234").search(query)[:1] == [1]
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    assert [split_terms(form) for form in forms] == [split_terms(text)] * 4


@pytest.mark.parametrize("kind", ["recall", "archival"])
def test_hostile_queries_over_hostile_texts(kind: str) -> None:
    """Any text is indexed, in terms without spaces, quotes and half characters, no query fails, and words find it."""
    index = said(*HOSTILE, kind=kind)
    for position, text in enumerate(HOSTILE):
        terms, found = split_terms(text), index.search(text, 100)
        assert all(term.encode() for term in terms)
        assert not set("".join(terms)) & set(" \t\n\"'\x00_")
        assert all(0 <= place < len(HOSTILE) for place in found)
        assert position in found or not terms or len(text) > 100, text
    assert len(index.search("", 1_000)) == len(HOSTILE)


def test_hostile_queries_cost_no_more_than_a_plain_one() -> None:
    """A query of any length does at most a bounded amount of SQLite's work, ten scans of the rows."""
    index = said(*(f"word a w{number} w{number * 7 % 900} cat" for number in range(1_000)))
    with cost(index) as steps:
        index.search("no such text anywhere %")
        scan = len(steps)
        for query in HOSTILE:
            before = len(steps)
            index.search(query)
            assert len(steps) - before <= 10 * scan, query[:20]


def test_a_bounded_number_of_postings_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rarest words are read first, then the newest texts, up to a bound; without words the newest come first."""
    monkeypatch.setattr(memws, "POSTINGS", 50)
    words = ["zebra" if number == 10 else "dog" if number % 3 == 0 else "cat" for number in range(500)]
    dogs = [position for position, word in enumerate(words) if word == "dog"]
    index = memory_index([("u", str(number), word) for number, word in enumerate(words)])
    assert index.search("cat zebra dog", 500) == [10, *reversed(dogs[-49:])]
    for query in ("", "   ", "who are you", "?"):
        assert index.search(query, 3) == [499, 498, 497], query
    assert index.search("xyzzy") == index.search(f"xyzzy {'a ' * memws.QUERY_CHARACTERS} cat") == []


ANSWER = "Marathon training in May: run well, rest well. " * 40
KITES = [f"{n} u: {'zeppelin' if n == 3 else 'kite'} over the hill" for n in range(6)]
LIKED = ["1 Ann: I like sushi with ginger.", "2 Ann: Do you like sushi with ginger?"]
ASKED = ["1 Ann: Where do you ski, Bob?", "1 Bob: In Davos!", "1 Ann: I ski in Zermatt."]
FOOD = ["1 A: What is your favourite food?", "1 B: Lasagna!", "2 A: Nice", "2 B: Hm"]
LONG = ["1 user: I want to run a marathon in May", f"2 assistant: {ANSWER}"]
SKIED = ["1 user: They ski in Davos", "2 assistant: They ski in Davos", "3 user: They ski in Davos"]
RANKED = {  # turns as "date speaker: text", the query, the positions in order
    "an answer is found by its question's words, within a session": (FOOD, "favourite food", [1, 0]),
    "a brief statement comes before a long answer": (LONG, "When do I run a marathon?", [0, 1]),
    "a statement comes before a question": (LIKED, "sushi ginger", [0, 1]),
    "what a named speaker said comes before what was asked": (ASKED, "Where does Bob ski?", [1, 2, 0]),
    "a named speaker's turns come first": (["1 Ann: I ski", "2 Bob: I ski"], "Where does Ann ski?", [0, 1]),
    "you are the assistant": (SKIED, "Where did you ski?", [1, 2, 0]),
    "what I tell you is not the assistant's": (SKIED, "Where did I tell you to ski?", [2, 1, 0]),
    "a speaker's name is a weak word": (["1 C: Ski today", "2 A: Hi Bob", "2 Bob: Hm"], "Does Bob ski?", [0, 1, 2]),
    "the first turn of a session comes first": (["1 u: Tea and cake", "1 u: Bread and cake"], "cake", [0, 1]),
    "who speaks of oneself comes first": (["1 u: I bake", "2 u: They bake"], "bake", [0, 1]),
    "words about a talk are weak": (["1 u: A pasta", "2 u: A list"], "list the pasta", [0, 1]),
    "what is said twice weighs more": (["1 u: Tea", "2 u: Cake"], "Tea or cake? Tea!", [0, 1]),
    "rare words weigh more than common ones": (KITES, "kite zeppelin", [3, 5, 4, 2, 1, 0]),
    "long turns lend nothing": (["1 u: cake " + "word " * 90, "1 u: tea"], "cake", [0]),
    "of equals the newest comes first": ([f"{n} u: the same" for n in range(4)], "same", [3, 2, 1, 0]),
}


@pytest.mark.parametrize("what", RANKED)
def test_ranking(what: str) -> None:
    """Each rule of the ranking, on the smallest example that shows it."""
    lines, query, order = RANKED[what]
    turns = [(line.split()[1][:-1], line.split()[0], line.partition(": ")[2]) for line in lines]
    assert memory_index(turns).search(query) == order


BAKED = ["2025-12-24", "2026-03-06", "2026-03-07", "2026-03-08", "2026-03-31", "2026-04-03"]


@pytest.mark.parametrize(
    ("days", "found"),
    [
        *((f"on {day}", [3, 2]) for day in ("2026-03-07", "2026/3/7", "7 March, 2026", "the 7th of mar 2026")),
        *((f"on {day}", [3, 2]) for day in ("March 7th, 2026", "Mar. 7 2026", "7 de Marzo de 2026", "2026年3月7日")),
        *((f"{day} bake", [3, 2]) for day in ("２０２６年０３月０７日", "2026년 3월 7일")),
        *((f"in {month}", [4, 3, 2, 1]) for month in ("2026-03", "March 2026", "marzo del 2026", "march, 2026")),
        ("in march 2026 or on 24 dec 2025", [0, 4, 3, 2, 1]),
        *((no_day, []) for no_day in ("31 February 2026", "2026/27", "may march", "march in 2026", "on 7 March 1026")),
    ],
)
@pytest.mark.parametrize("kind", ["recall", "archival"])
def test_days_are_found(days: str, found: list[int], kind: str) -> None:
    """What was told on a day or in a month that the query names, or on the day after, comes first."""
    order = [*found, *(place for place in reversed(range(len(BAKED))) if place not in found)]
    assert memory_index([("u", f"{day} 10:00", "We bake") for day in BAKED], kind).search(f"bake {days}") == order


def test_a_day_without_a_year_is_the_last_one() -> None:
    days = [datetime.now(UTC).date() - timedelta(days=ago) for ago in (665, 400, 40, 3)]
    index = memory_index([("u", str(day), "We bake") for day in days])
    assert index.search(f"bake on {days[2]:%d %B}")[0] == 2
    last = {"10 March": "2026-03-10", "11 march": "2025-03-11", "in March": "2026-03-01", "en abril": "2025-04-01"}
    for text, first in last.items():
        assert [str(day) for day, _ in memws.named_days(text, date(2026, 3, 10))] == [first]


@pytest.mark.parametrize("kind", ["recall", "archival"])
def test_positions_are_the_turns(kind: str) -> None:
    """A search gives positions of turns, best first, at most as many as asked; any part finds a long text once."""
    index = memory_index((("ann", f"day {number}", f"thing{number} and cake") for number in range(50)), kind)
    for number in (0, 7, 49):
        assert index.search(f"thing{number}")[0] == number
    assert [len(index.search("cake", limit)) for limit in (10, 99, 0, -1)] == [10, 50, 0, 0]
    assert sorted(index.search("cake", limit=99)) == list(range(50))
    alike = memory_index((("ann", f"day {number}", "cake") for number in range(300)), kind)
    assert alike.search("cake", 300) == list(range(299, -1, -1))
    long = said(" ".join(f"word{number}" for number in range(8000))[:65_536], "word9999", kind=kind)
    for query in ("word5 word4000 word6000", "word1", "word7000"):
        assert long.search(query) in ([0], [0, 1])


def test_any_turns_are_indexed() -> None:
    """Speakers and dates may be any texts, no turns at all are fine, and an unknown kind of memory is a ValueError."""
    assert memory_index([]).search("x") == []
    turns = [("", "", ""), ("\0", "\ud800", "héllo \udfff"), ("x", "yesterday", "héllo there")]
    index = memory_index(turns, "archival")
    assert set(index.search("hello")) == {1, 2}
    assert index.search("\ud800", 2)
    with pytest.raises(ValueError, match="unknown kind 'core'; expected 'recall' or 'archival'"):
        memory_index([], "core")
