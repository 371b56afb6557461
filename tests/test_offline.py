"""The rules of the offline model, against a small harness of the agent's tools; no server, no store."""

import json
import math
import random
import re
import string
import time
import unicodedata
from collections import Counter
from typing import Any

import pytest

import memws
from memws import (
    HEARTBEAT_FAILED,
    HEARTBEAT_NO_REPLY,
    HEARTBEAT_REQUESTED,
    HEARTBEAT_TIMER,
    HEARTBEAT_WAKE,
    SUMMARY_LIMIT,
    SUMMARY_SYSTEM,
    offline_chunks,
    offline_reply,
)

SEED = 20261124
MEMORY_TOOLS = frozenset(memws.MEMORY_TOOLS)
NAMES = ["Ada", "Bruno", "Chidi", "Zoë", "Ana María", "Jean-Luc", "O'Neill", "Søren", "Yuki", "Dmitri", "Imani", "Ryan"]
CITIES = ["Porto", "Lagos", "Kyoto", "São Paulo", "New York", "Reykjavík", "Bogotá", "Tbilisi", "Hanoi", "Oslo"]
JOBS = ["nurse", "carpenter", "marine biologist", "pilot", "teacher", "locksmith", "beekeeper", "translator"]
LIKES = ["green tea", "hiking", "old jazz records", "chess", "sourdough bread", "rainy mornings", "science fiction"]
PETS = ["dog", "cat", "parrot", "tortoise", "hamster"]
COLOURS = ["blue", "crimson", "teal", "ochre", "violet"]


def words_of(text: str) -> set[str]:
    """The words of a text without accents, as the store's search has them."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return set(re.findall(r"\w+", bare))


class Harness:
    """The agent's loop and memory tools in memory: blocks, recall, archival, a search ranked by rare shared words."""

    def __init__(self, human: str = "", limit: int = 2000, tools: frozenset[str] = MEMORY_TOOLS) -> None:
        self.blocks = {"persona": "I am a helpful agent.", "human": human}
        self.limit, self.tools = limit, tools
        self.recall: list[dict[str, str]] = []
        self.archival: list[dict[str, str]] = []
        self.messages: list[dict[str, Any]] = []
        self.day = "2026-11-24"
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: set[str] = set()
        self.results: dict[str, Any] = {}

    def system(self) -> dict[str, Any]:
        blocks = "\n".join(
            f'<{label} characters="{len(text)}/{self.limit}">\n{text}\n</{label}>'
            for label, text in self.blocks.items()
        )
        sizes = f"Recall memory: {len(self.recall)} messages. Archival memory: {len(self.archival)} passages."
        return {"role": "system", "content": f"You are an agent.\n{sizes}\n{blocks}"}

    def pack(self, kind: str, **fields: str) -> None:
        packed = {"type": kind, **fields, "time": f"{self.day} 10:02:03 AM UTC+0000"}
        self.messages.append({"role": "user", "content": json.dumps(packed)})

    def restart(self) -> None:
        """Forget the context window and core memory; recall and archival memory stay."""
        self.messages, self.blocks["human"] = [], ""

    def say(self, text: str) -> str:
        self.recall.append({"time": f"{self.day} 10:00", "role": "user", "text": text})
        self.pack("user_message", message=text)
        sent = self.run()
        assert len(sent) == 1, sent
        return sent[0]

    def run(self) -> list[str]:
        """Steps until no heartbeat is asked for; what was sent to the user."""
        sent: list[str] = []
        self.calls = []
        for _ in range(8):
            monologue, calls = offline_reply([self.system(), *self.messages], self.tools)
            named = [
                {"id": f"call_{len(self.messages)}_{n}", "type": "function",
                 "function": {"name": name, "arguments": json.dumps(arguments)}}
                for n, (name, arguments) in enumerate(calls)
            ]  # fmt: skip
            self.messages.append(
                {"role": "assistant", "content": monologue, **({"tool_calls": named} if named else {})}
            )
            for call, (name, arguments) in zip(named, calls, strict=True):
                assert name in self.tools, f"{name} is not offered"
                assert (name, arguments) not in self.calls, "the same call twice"
                self.calls.append((name, arguments))
                ok, result = self.call(name, {k: v for k, v in arguments.items() if k != "request_heartbeat"})
                content = json.dumps({"status": "OK" if ok else "Failed", "message": result, "time": self.day})
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
                if name == "send_message" and ok:
                    sent.append(arguments["message"])
                    self.recall.append({"time": f"{self.day} 10:00", "role": "assistant", "text": arguments["message"]})
            if "send_message" not in self.tools and not calls:
                return [monologue]
            if not any(arguments.get("request_heartbeat") for _, arguments in calls):
                return sent
            self.pack("heartbeat", reason=HEARTBEAT_REQUESTED)
        raise AssertionError("the turn does not end")

    def call(self, name: str, arguments: dict[str, Any]) -> tuple[bool, Any]:
        if name in self.fails:
            return False, "no such luck"
        if name in self.results:
            return True, self.results[name]
        match name:
            case "core_memory_append":
                return self.edit(
                    arguments["name"], (self.blocks[arguments["name"]] + "\n" + arguments["content"]).strip("\n")
                )
            case "core_memory_replace":
                text = self.blocks[arguments["name"]]
                if arguments["old_content"] not in text:
                    return False, "old content not found"
                return self.edit(arguments["name"], text.replace(arguments["old_content"], arguments["new_content"]))
            case "archival_memory_insert":
                self.archival.append({"time": f"{self.day} 10:00", "text": arguments["content"]})
                return True, None
            case "conversation_search":
                return True, self.search(self.recall, arguments["query"], arguments.get("page", 0), "recall")
            case "archival_memory_search":
                return True, self.search(self.archival, arguments["query"], arguments.get("page", 0), "archival")
            case "conversation_search_date":
                days = arguments["start_date"], arguments["end_date"]
                return True, self.show(
                    [hit for hit in self.recall if days[0] <= hit["time"][:10] <= days[1]], 0, "recall", ""
                )
        return True, None

    def edit(self, label: str, text: str) -> tuple[bool, str | None]:
        if len(text) > self.limit:
            return False, f"block {label!r} is full"
        self.blocks[label] = text
        return True, None

    def search(self, rows: list[dict[str, str]], query: str, page: int, where: str) -> str:
        bags = [words_of(row["text"]) for row in rows]
        counts = Counter(word for bag in bags for word in bag)
        wanted = words_of(query)
        scores = [sum(math.log(1 + len(rows) / counts[word]) for word in wanted & bag) / (4 + len(bag)) for bag in bags]
        hits = [
            row for score, _, row in sorted(zip(scores, range(len(rows)), rows, strict=True), reverse=True) if score
        ]
        return self.show(hits, page, where, query)

    def show(self, hits: list[dict[str, str]], page: int, where: str, query: str) -> str:
        if not hits:
            return f"No results found in {where} memory for {query!r}."
        shown = hits[page * 10 : page * 10 + 10]
        head = f"Showing {len(shown)} of {len(hits)} results (page {page} of {(len(hits) - 1) // 10}): "
        return head + json.dumps(shown, ensure_ascii=False)


CASES: list[tuple[list[str], str, list[str]]] = [
    # what is told, what is asked, what the answer holds
    (["I love {like}."], "What do I love?", ["{like}"]),
    (["i like {like}"], "What do I like", ["{like}"]),
    (["I really enjoy {like}!"], "what are my hobbies?", ["{like}"]),
    (["I work as a {job}."], "What is my job?", ["{job}"]),
    (["I work as a {job}."], "What do I do for a living?", ["{job}"]),
    (["I live in {city}."], "Where do I live?", ["{city}"]),
    (["I moved to {city} last year"], "Tell me where I live.", ["{city}"]),
    (["My name is {name}."], "What's my name?", ["{name}"]),
    (["you can call me {name}"], "who am I?", ["{name}"]),
    (["My name is {name} and I live in {city}."], "What is my name and where do I live?", ["{name}", "{city}"]),
    (["I live in {city} and work as a {job}, but I hate {like}."], "Where do I live?", ["{city}"]),
    (["I have a {pet}.", "My {pet}'s name is {name}."], "What is the name of my {pet}?", ["{name}"]),
    (["My favourite colour is {colour}."], "What's my favorite color?", ["{colour}"]),
    (["remember that my wifi password is {colour}{job}"], "what is the wifi password?", ["{colour}{job}"]),
    (["I was born in {city}.", "I have a {pet}."], "Where was I born?", ["{city}"]),
    (["My birthday is on the 3rd of May. I like {like}."], "When is my birthday?", ["3rd of May"]),
    (["I am 34 years old"], "How old am I?", ["34"]),
    (["I'm allergic to {like}"], "What am I allergic to?", ["{like}"]),
    (["My sister lives in {city}."], "Where does my sister live?", ["{city}"]),
    (["I speak Swahili and play the oboe."], "Which languages do I speak, and what do I play?", ["Swahili", "oboe"]),
    (["I have a {pet}. His name is {name}."], "What is the name of my {pet}?", ["{name}"]),
    (["When I was young I lived in {city}."], "Where did I live when I was young?", ["{city}"]),
    (["We got married in {city}."], "Where did we get married?", ["{city}"]),
    (["I drive a red Volvo", "I adopted a {pet} in {city}"], "Where did I adopt my {pet}?", ["{city}"]),
    (["The launch code of the project is {colour}-77."], "What's the launch code?", ["{colour}-77"]),
    (["Me llamo {name}."], "¿Cómo me llamo?", ["{name}"]),
    (["hola, mi nombre es {name} y vivo en {city}"], "¿cuál es mi nombre y dónde vivo?", ["{name}", "{city}"]),
    (["Vivo en {city}."], "donde vivo?", ["{city}"]),
    (["Me gusta el té verde."], "¿Qué me gusta?", ["té verde"]),
    (["me encantan los gatos negros"], "que me gusta?", ["gatos negros"]),
    (["Trabajo de carpintero."], "¿En qué trabajo?", ["carpintero"]),
    (["Trabajo como enfermera en {city}"], "¿Cuál es mi profesión?", ["enfermera"]),
    (["Mi color favorito es el {colour}."], "¿Cuál es mi color favorito?", ["{colour}"]),
    (["Recuerda que la clave es {colour}99."], "¿Cuál es la clave?", ["{colour}99"]),
    (["Tengo dos perros.", "Odio el ruido."], "¿Cuántos perros tengo?", ["dos perros"]),
    (["Tengo 41 años."], "¿Cuántos años tengo?", ["41"]),
    (["Nací en {city}."], "¿Dónde nací?", ["{city}"]),
    (["Toco la guitarra."], "¿Qué instrumento toco?", ["guitarra"]),
]


def drawn(draw: random.Random) -> dict[str, str]:
    pools = {"name": NAMES, "city": CITIES, "job": JOBS, "like": LIKES, "pet": PETS, "colour": COLOURS}
    return {key: draw.choice(pool) for key, pool in pools.items()}


NOISE = ["It rains a lot here.", "ok", "What can you do?", "Thanks!", "How are you?", "Tell me a joke.", "I see."]


CORE_CASES: list[tuple[list[str], str, list[str]]] = [
    # no word of the question is in what is told, so that no search finds it
    (["I'm a {job}, by the way."], "what do I do for work?", ["{job}"]),
    (["Hello! I'm from {city}"], "Where am I from?", ["{city}"]),
    (["Hi, I'm {name}!"], "Do you remember my name?", ["{name}"]),
    (["Soy de {city}."], "¿De dónde soy?", ["{city}"]),
]


@pytest.mark.parametrize(("told", "asked", "expected"), CASES + CORE_CASES, ids=[c[1] for c in CASES + CORE_CASES])
def test_what_was_told_is_found_again(told: list[str], asked: str, expected: list[str]) -> None:
    """What a person states, in drawn words among noise, is in the answer."""
    find_again(told, asked, expected, restart=False)


@pytest.mark.parametrize(("told", "asked", "expected"), CASES, ids=[case[1] for case in CASES])
def test_what_only_recall_memory_has_is_found_again(told: list[str], asked: str, expected: list[str]) -> None:
    """What a person states is in the answer also when core memory and the window have lost it."""
    find_again(told, asked, expected, restart=True)


def find_again(told: list[str], asked: str, expected: list[str], restart: bool) -> None:
    draw = random.Random(f"{SEED} {asked}")
    for _ in range(4):
        words = drawn(draw)
        harness = Harness()
        for sentence in told:
            harness.say(sentence.format(**words))
            harness.say(draw.choice(NOISE))
        for _ in range(8 if restart else 1):  # asked before: questions and answers like this one are in recall memory
            if restart:
                harness.restart()
            answer = harness.say(asked.format(**words))
        for want in expected:
            assert want.format(**words) in answer, f"{told} / {asked}: {answer} / {harness.blocks['human']}"
        assert f'"{asked}' not in answer


def test_two_answers_are_quoted_with_their_dates() -> None:
    """Each part of a question is searched for in both memories and answered by a dated quote."""
    harness = Harness()
    harness.say("My name is Ada. I live in Porto.")
    harness.day = "2026-11-25"
    harness.say("I like green tea")
    answer = harness.say("What is my name, where do I live and what do I like?")
    assert [name for name, _ in harness.calls].count("conversation_search") == 3
    assert [name for name, _ in harness.calls].count("archival_memory_search") == 3
    assert 'You told me on 2026-11-24: "My name is Ada' in answer
    assert 'You told me on 2026-11-24: "I live in Porto' in answer
    assert 'You told me on 2026-11-25: "I like green tea"' in answer


def test_facts_go_to_the_human_block_in_their_own_words() -> None:
    """Several facts of one message are kept in one step, once."""
    harness = Harness()
    answer = harness.say(
        "Hi! My name is Ada, I live in Porto and work as a nurse, and I love green tea. My dog is called Rex."
    )
    lines = ["My name is Ada", "I live in Porto", "I work as a nurse", "I love green tea", "My dog is called Rex"]
    assert harness.blocks["human"].split("\n") == lines
    assert "Ada" in answer
    assert "green tea" in answer
    assert "already" in harness.say("I love green tea!")
    assert harness.blocks["human"].split("\n") == lines


@pytest.mark.parametrize(
    ("first", "then", "asked", "gone", "line"),
    [
        ("I live in Porto.", "Actually, I moved to Oslo.", "Where do I live?", "Porto", "I moved to Oslo"),
        ("My name is Ada.", "No, my name is Bea", "What is my name?", "Ada", "my name is Bea"),
        ("I work as a nurse", "I now work as a pilot", "What is my job?", "nurse", "I now work as a pilot"),
        ("My favourite colour is blue", "My favourite colour is teal now", "What is my favourite colour?", "blue", ""),
        (
            "I like olives",
            "I don't like olives any more",
            "Do I like olives?",
            "I like olives",
            "I don't like olives any more",
        ),
        ("Vivo en Porto.", "Ahora vivo en Oslo", "¿Dónde vivo?", "Porto", "Ahora vivo en Oslo"),
        ("Me llamo Ana.", "Me llamo Bea.", "¿Cómo me llamo?", "Ana", "Me llamo Bea"),
    ],
)
def test_a_changed_fact_replaces_the_old_one(first: str, then: str, asked: str, gone: str, line: str) -> None:
    """What a person has one of is replaced in core memory, and the answer is the new one."""
    harness = Harness("I have a dog")
    harness.say(first)
    harness.day = "2026-11-25"
    harness.say(then)
    assert "core_memory_replace" in [name for name, _ in harness.calls]
    assert gone not in harness.blocks["human"]
    assert line in harness.blocks["human"]
    assert "dog" in harness.blocks["human"]
    answer = harness.say(asked)
    assert gone not in answer
    assert "2026-11-25" in answer
    harness.restart()
    answer = harness.say(asked)
    assert gone not in answer
    assert "2026-11-25" in answer


@pytest.mark.parametrize(
    ("asked", "admits"),
    [
        ("What is my shoe size?", "I found nothing"),
        ("Where does my brother live?", "I found nothing"),
        ("When is the meeting", "I found nothing"),
        ("¿Cuál es mi número de zapato?", "No encontré nada"),
        ("Tell me a joke", "I found nothing"),
    ],
)
def test_what_was_never_told_is_admitted(asked: str, admits: str) -> None:
    """Nothing found is said so, naming the memories; neither the question nor another fact passes for an answer."""
    harness = Harness()
    harness.say("My name is Ada and I live in Porto")
    for _ in range(3):
        answer = harness.say(asked)
        assert admits in answer
        assert "arch" in answer
        assert "You told" not in answer
        assert "Me dijiste" not in answer


def test_half_an_answer_admits_the_other_half() -> None:
    """Of two parts, one found and one not, both are answered."""
    harness = Harness()
    harness.say("I live in Porto.")
    answer = harness.say("Where do I live and what is my blood type?")
    assert '"I live in Porto"' in answer
    assert "I found nothing" in answer
    assert "blood" in answer


def test_a_full_block_sends_facts_to_archival_memory() -> None:
    """When the human block has no room, or the append fails, the fact becomes a passage and is found there."""
    harness = Harness("x" * 95, limit=100)
    assert "archival" in harness.say("I like green tea")
    assert harness.archival[0]["text"] == "I like green tea"
    harness = Harness()
    harness.fails = {"core_memory_append"}
    assert "archival" in harness.say("I play the oboe")
    assert [name for name, _ in harness.calls] == ["core_memory_append", "archival_memory_insert", "send_message"]
    harness.recall = []
    assert "oboe" in harness.say("What do I play?")


def test_failures_are_told_plainly() -> None:
    """When nothing can be kept or searched, the reply says so, and no failing call is made twice."""
    harness = Harness()
    harness.fails = {"core_memory_append", "archival_memory_insert"}
    assert "could not keep it: no such luck" in harness.say("I play the oboe")
    harness.fails = {"conversation_search", "archival_memory_search"}
    assert "search failed: no such luck" in harness.say("What is my shoe size?")


@pytest.mark.parametrize("missing", sorted(MEMORY_TOOLS))
def test_a_tool_that_is_not_offered_is_not_called(missing: str) -> None:
    """Each memory tool may be missing; a reply comes all the same, as plain text without send_message."""
    harness = Harness(tools=MEMORY_TOOLS - {missing})
    for text in ("My name is Ada.", "What is my name?", "Forget my name", "What did I say yesterday?"):
        assert harness.say(text)
    assert offline_reply([{"role": "user", "content": "I like tea. What do I like?"}], frozenset())[1] == []


def test_it_says_what_it_is() -> None:
    """Asked what it is, and once at a first greeting, it says that it is no language model."""
    for asked in ("What are you?", "who are you", "Are you an AI?", "hello, are you a real person?"):
        answer = Harness().say(asked)
        assert "offline stand-in" in answer
        assert "not a language model" in answer
        assert "--base-url" in answer
    assert "no soy un modelo de lenguaje" in Harness().say("¿Qué eres?")
    harness = Harness("Name: Ada")
    assert "Hello, Ada!" in (first := harness.say("hi there!"))
    assert "stand-in" in first
    assert "Hello, Ada!" in (again := harness.say("Hello"))
    assert "stand-in" not in again
    assert harness.say("hola") == "¡Hola, Ada!"


def test_what_it_knows_about_me_is_the_whole_block() -> None:
    """The question for everything lists the human block."""
    harness = Harness()
    harness.say("My name is Ada. I like green tea. I have two cats.")
    for asked in ("What do you know about me?", "What do you remember?", "¿Qué sabes de mí?"):
        answer = harness.say(asked)
        assert "My name is Ada" in answer
        assert "green tea" in answer
        assert "two cats" in answer


@pytest.mark.parametrize(
    ("asked", "days"),
    [
        ("What did I say yesterday?", ("2026-11-23", "2026-11-23")),
        ("what did i tell you on 2026-11-20", ("2026-11-20", "2026-11-20")),
        ("¿Qué dije ayer?", ("2026-11-23", "2026-11-23")),
        ("What did I say 3 days ago?", ("2026-11-21", "2026-11-21")),
        ("What did I say on 2026-99-99?", None),
    ],
)
def test_what_was_said_on_a_day(asked: str, days: tuple[str, str] | None) -> None:
    """A question for a day is a search by date."""
    harness = Harness()
    for day in ("20", "21", "23"):
        harness.day = f"2026-11-{day}"
        harness.say(f"I counted {day} herons.")
    harness.day = "2026-11-24"
    answer = harness.say(asked)
    made = [given for name, given in harness.calls if name == "conversation_search_date"]
    if days is None:
        assert not made
        return
    assert {(given["start_date"], given["end_date"]) for given in made} == {days}
    assert f"I counted {days[1][-2:]} herons" in answer


def test_forgetting() -> None:
    """Lines that match are cut from the human block; what was not there is said."""
    harness = Harness()
    harness.say("My name is Ada. I like green tea. I like jazz. I have two cats.")
    assert "green tea" in harness.say("Please forget that I like green tea.")
    assert harness.blocks["human"].split("\n") == ["My name is Ada", "I like jazz", "I have two cats"]
    assert "found nothing" in harness.say("Forget my shoe size")
    harness.say("I drive a red Volvo")
    assert "Volvo" in harness.say("forget that")
    assert "Volvo" not in harness.blocks["human"]
    harness.say("Forget everything about me.")
    assert harness.blocks["human"].strip() == ""


def test_a_statement_and_a_question_in_one_message() -> None:
    """Both are served in one step and one reply."""
    harness = Harness("Name: Ada")
    answer = harness.say("I have a dog named Rex. What is my name?")
    assert len(harness.calls) == 4
    assert "I have a dog named Rex" in answer
    assert "Name: Ada" in answer
    assert "Bea" in Harness().say("I'm Bea, what's my name?")


def test_a_users_tool_is_called_by_name() -> None:
    """A user's tool is called by /call NAME with JSON, and its result told."""
    harness = Harness(tools=MEMORY_TOOLS | {"roll_dice"})
    harness.results = {"roll_dice": "4"}
    assert harness.say('/call roll_dice {"sides": 6}') == "roll_dice returned: 4"
    assert harness.calls[0] == ("roll_dice", {"sides": 6, "request_heartbeat": True})
    harness.fails = {"roll_dice"}
    assert harness.say("/call roll_dice") == "roll_dice failed: no such luck"
    assert "I have no tool nope" in harness.say("/call nope {}")


@pytest.mark.parametrize("reason", [HEARTBEAT_TIMER, HEARTBEAT_WAKE])
def test_no_user_message_no_reply(reason: str) -> None:
    """A timed heartbeat, a login or a request without messages gets a monologue and no call."""
    harness = Harness()
    harness.say("I like tea")
    for kind, fields in (("heartbeat", {"reason": reason}), ("login", {"last_login": "2026-11-20"})):
        harness.pack(kind, **fields)
        assert harness.run() == []
        assert harness.calls == []
    harness.pack("user_message", message="I like jazz")
    harness.pack("heartbeat", reason=reason)
    assert harness.run() == []
    assert offline_reply([], MEMORY_TOOLS)[1] == []


@pytest.mark.parametrize("reason", [HEARTBEAT_NO_REPLY, HEARTBEAT_REQUESTED, HEARTBEAT_FAILED])
def test_a_heartbeat_within_a_turn_leads_to_a_reply(reason: str) -> None:
    """While the user waits, heartbeats of every reason but the timed ones lead on to the reply."""
    harness = Harness()
    harness.pack("user_message", message="I like jazz")
    harness.messages.append({"role": "assistant", "content": "I think."})
    harness.pack("heartbeat", reason=reason)
    assert len(harness.run()) == 1


def test_a_message_that_waits_in_a_summary_is_answered() -> None:
    """A compaction within a turn hides the user's message; the summary quotes it, and it gets its reply."""
    harness = Harness("I live in Porto")
    harness.pack("system_alert", message=f"Summary:\n- I like tea\n{memws.WAITING_NOTE}Where do I live?")
    harness.pack("heartbeat", reason=HEARTBEAT_REQUESTED)
    assert harness.run() == ["In my core memory I have: I live in Porto."]


def test_a_summary_keeps_the_facts() -> None:
    """A summary keeps within its limit the newest facts, and carries an earlier summary on."""

    def summary(transcript: str) -> str:
        messages = [{"role": "system", "content": SUMMARY_SYSTEM + "."}, {"role": "user", "content": transcript}]
        text, calls = offline_reply(messages, MEMORY_TOOLS)
        assert calls == []
        assert 0 < len(text) <= SUMMARY_LIMIT
        return text

    once = summary(
        "user (2026-11-24 10:00): My name is Ada and I live in Porto.\nI play the oboe.\n"
        "assistant (2026-11-24 10:00): I like you.\nuser (2026-11-24 10:01): What is up?\ntool: I am a tool"
    )
    assert "Ada" in once
    assert "I live in Porto" in once
    assert "oboe" in once
    assert "tool" not in once
    assert "like you" not in once
    again = summary(f"Summary of what came before: {once}\nuser: I have a cat.")
    assert again.split("\n") == [*once.split("\n"), "- I have a cat"]
    many = summary("\n".join(f"user: I own {n} herons." for n in range(500)))
    assert "499" in many
    assert "I own 0 " not in many
    summary("")
    summary("user: " + "I am " * 20_000)


def test_chunks_join_to_the_text() -> None:
    """Streamed pieces are small and lose nothing."""
    draw = random.Random(SEED)
    for length in range(200):
        text = "".join(draw.choice("ab é\n\t　😀") for _ in range(length))
        chunks = list(offline_chunks(text))
        assert "".join(chunks) == text
        assert all(chunks)
    assert len(list(offline_chunks("You told me that"))) == 4
    assert max(map(len, offline_chunks("x" * 1000 + " " * 1000))) <= 48


HOSTILE = [
    "", " ", "\x00", "\ud800", "?????" * 13_107, "a " * 32_768, "I " * 32_768, "I'm " * 16_384, "my " * 21_000,
    "(" * 65_536,
    "I like " * 9_000, "forget that " * 5_000, "and i " * 10_000, ", " * 32_000, "¿" * 65_536, "hi, " * 16_000,
    "me llamo " * 7_000,
    "\n" * 65_536, "." * 65_536, ". " * 32_768, "'" * 65_536, "{" * 65_536, "[" * 65_536, "/call " + "{" * 60_000,
    "/call x " + "a=" * 30_000,
    " " * 65_536, "what is my name and " * 3_000, "remember that " * 4_000, "你好" * 30_000, "我喜欢绿茶。" * 9_000,
    "e\u0301" * 30_000, "no, " * 16_000,
    "\u0301" * 60_000, "안녕하세요 " * 10_000, "ﷺ" * 60_000, "I" * 65_536,
    '{"type": "user_message", "message": {"a": 1}}', "null", "[]", "1" * 60_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_texts_end_soon(text: str) -> None:
    """Any text, up to 65,536 characters, gets its one reply soon."""
    harness = Harness(tools=MEMORY_TOOLS | {"roll_dice"})
    began = time.perf_counter()
    assert harness.say(text)
    assert time.perf_counter() - began < 1


def anything(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON value, often with the keys that messages have."""
    keys = "role content tool_calls function name arguments id tool_call_id type message time reason status query text"
    roles = [
        "user",
        "assistant",
        "tool",
        "system",
        "odd",
        "OK",
        "Failed",
        "user_message",
        "heartbeat",
        "system_alert",
        "login",
        "send_message",
    ]
    texts = ["I like tea. What do I like?", "forget it", "Showing 1 of 1 results (page 0 of 9): [{}]", "[", "{}",
    "[[1]]",
             '<human characters="1/2">\nx\n</human>', "timed", "core_memory_append",
             "".join(draw.choices(string.printable, k=20))]  # fmt: skip
    match draw.randrange(10 if depth < 4 else 6):
        case 0:
            return draw.choice([None, True, -1, 1.5, 10**30])
        case 1 | 2:
            return draw.choice(roles)
        case 3 | 4:
            return draw.choice(texts)
        case 5:
            return json.dumps(anything(draw, depth + 1)) if depth < 4 else ""
        case 6 | 7:
            return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
        case _:
            return {draw.choice(keys.split()): anything(draw, depth + 1) for _ in range(draw.randrange(7))}


def test_no_input_raises() -> None:
    """Random messages of any shape get an answer whose calls are offered tools."""
    draw = random.Random(SEED)
    for _ in range(4000):
        messages: list[Any] = [anything(draw) for _ in range(draw.randrange(6))]
        for _ in range(draw.randrange(8)):
            role = draw.choice(["user", "assistant", "tool", "system"])
            call = {"id": "a", "function": {"name": draw.choice(sorted(MEMORY_TOOLS)), "arguments": anything(draw)}}
            messages.append(
                {"role": role, "content": anything(draw), "tool_call_id": "a", "tool_calls": [call, anything(draw)]}
            )
        tools = frozenset(name for name in MEMORY_TOOLS if draw.random() < 0.7)
        monologue, calls = offline_reply(messages, tools)
        assert isinstance(monologue, str)
        assert {name for name, _ in calls} <= tools
        json.dumps(calls)


def test_a_typical_step_is_quick() -> None:
    """A step in a window of 100 messages, the search results at hand, stays within a few milliseconds."""
    harness = Harness()
    for n in range(20):
        harness.say(f"I own {n} herons and I like number {n}.")
    harness.say("What is my name and how many herons do I own?")
    began = time.perf_counter()
    for _ in range(20):
        offline_reply([harness.system(), *harness.messages], MEMORY_TOOLS)
    assert (time.perf_counter() - began) / 20 < 0.02


@pytest.mark.parametrize("greeting", ["Hello!", "Hi there,", "Hola,", "Good morning!"])
def test_a_greeting_is_no_fact(greeting: str) -> None:
    """What stands beside a greeting is kept, the greeting is not."""
    said = json.dumps({"type": "user_message", "message": f"{greeting} My name is Marta"})
    system = 'x\nRecall memory: 0 messages.\n<human characters="0/2000">\n</human>'
    messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
    _, calls = memws.offline_reply(messages, frozenset(memws.MEMORY_TOOLS))
    assert [arguments["content"] for _, arguments in calls] == ["My name is Marta"]
