"""The offline model, through its replies to requests: a small harness has the agent's loop and memory, no server."""

import asyncio
import json
import math
import re
from collections import Counter
from typing import Any

import pytest
from agents import request_of

import memws
from memws import HEARTBEAT_NO_REPLY, HEARTBEAT_REQUESTED, HEARTBEAT_TIMER, HEARTBEAT_WAKE

JSON = dict[str, Any]
TOOLS = ["send_message", "core_memory_append", "core_memory_replace"]
TOOLS += ["archival_memory_insert", "archival_memory_search", "conversation_search"]


def ask(messages: list[JSON], tools: list[str]) -> tuple[str, list[tuple[str, JSON]]]:
    """(monologue, calls) of the answer to a request, read from its stream as an agent reads it."""

    async def read() -> memws.Reply:
        model, reply = memws.Models("offline").get(None)[0], memws.Reply()
        specs = json.dumps([{"type": "function", "function": {"name": name}} for name in tools]) if tools else ""
        async for chunk in model.stream(request_of(model.head({}), map(json.dumps, messages), specs)):
            reply.feed(chunk)
        return reply

    reply = asyncio.run(read())
    memws.read_reply(reply, tools)
    assert (reply.corrections, reply.finish) == ([], "tool_calls" if reply.calls else "stop")
    return reply.text, [(call.name, call.arguments) for call in reply.calls]


class Harness:
    """An agent in memory: a block, recall and archival memory, and their search."""

    def __init__(self, human: str = "", limit: int = 2000, tools: list[str] = TOOLS) -> None:
        self.human, self.limit, self.tools = human, limit, tools
        self.stores: dict[str, list[JSON]] = {"recall": [], "archival": []}
        self.messages: list[JSON] = []
        self.day = "2026-11-24"
        self.calls: list[tuple[str, JSON]] = []
        self.results: dict[str, tuple[bool, Any]] = {}

    def restart(self) -> None:
        """Forget the context window and core memory; recall and archival memory stay."""
        self.messages, self.human = [], ""

    def pack(self, kind: str, **fields: str) -> None:
        """An event as the agent packs it."""
        event = {"type": kind, **fields, "time": f"{self.day} 10:02"}
        self.messages.append({"role": "user", "content": json.dumps(event)})

    def say(self, text: str) -> str:
        """The reply to a user's message."""
        self.stores["recall"].append({"time": f"{self.day} 10:00", "role": "user", "text": text})
        self.pack("user_message", message=text)
        (sent,) = self.run()
        self.stores["recall"].append({"time": f"{self.day} 10:00", "role": "assistant", "text": sent})
        return sent

    def run(self) -> list[str]:
        """Steps until no heartbeat is asked for; what was sent to the user."""
        self.calls = []
        while True:
            block = f'<human characters="{len(self.human)}/{self.limit}">\n{self.human}\n</human>'
            system = {"role": "system", "content": f"You are an agent.\n{block}"}
            monologue, calls = ask([system, *self.messages], self.tools)
            if "send_message" not in self.tools and not calls:
                return [monologue]
            functions = [{"name": name, "arguments": json.dumps(arguments)} for name, arguments in calls]
            named = [{"id": f"c{len(self.messages)}.{n}", "function": each} for n, each in enumerate(functions)]
            self.messages.append({"role": "assistant", "content": monologue, "tool_calls": named})
            for call, (name, arguments) in zip(named, calls, strict=True):
                assert (name, arguments) not in self.calls, "the same call twice"
                self.calls.append((name, arguments))
                ok, result = self.results.get(name) or self.run_tool(name, **arguments)
                content = json.dumps({"status": "OK" if ok else "Failed", "message": result})
                self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
            if not any(arguments.get("request_heartbeat") for _, arguments in calls):
                return [arguments["message"] for name, arguments in calls if name == "send_message"]
            self.pack("heartbeat", reason=HEARTBEAT_REQUESTED)

    def run_tool(self, name: str, /, content: str = "", query: str = "", **arguments: Any) -> tuple[bool, Any]:
        """Whether a memory tool worked, and its result."""
        if name == "core_memory_append":
            self.human = f"{self.human}\n{content}".strip("\n")
        elif name == "core_memory_replace":
            assert arguments["old_content"] in self.human
            self.human = self.human.replace(arguments["old_content"], arguments["new_content"])
        elif name == "archival_memory_insert":
            self.stores["archival"].append({"time": f"{self.day} 10:00", "text": content})
        elif name != "send_message":
            return True, self.search(self.stores["recall" if name == "conversation_search" else "archival"], query)
        assert len(self.human) <= self.limit
        return True, None

    def search(self, rows: list[JSON], query: str) -> str:
        """The ten rows that share the rarest words with the query."""
        bags = [set(re.findall(r"\w+", row["text"].lower())) for row in rows]
        counts, wanted = Counter(word for bag in bags for word in bag), set(re.findall(r"\w+", query.lower()))
        scores = [sum(math.log(1 + len(rows) / counts[word]) for word in wanted & bag) / (4 + len(bag)) for bag in bags]
        ranked = sorted(zip(scores, range(len(rows)), strict=True), reverse=True)
        hits = [rows[place] for score, place in ranked if score]
        return f"Showing {len(hits[:10])} of {len(hits)} results (page 0 of {len(hits) // 10}): {json.dumps(hits[:10])}"


CASES = [
    ("I love hiking.", "What do I love?", "hiking"),
    ("I really enjoy chess!", "what are my hobbies?", "chess"),
    ("I work as a nurse.", "What is my job?", "nurse"),
    ("I work as a nurse.", "What do I do for a living?", "nurse"),
    ("I moved to Porto last year", "Tell me where I live.", "Porto"),
    ("you can call me Jean-Luc", "who am I?", "Jean-Luc"),
    ("My name is Zoë and I live in São Paulo.", "What is my name and where do I live?", "Zoë"),
    ("I live in Porto, but I hate jazz.", "Where do I live?", "Porto"),
    ("I have a cat. Her name is Mia.", "What is the name of my cat?", "Mia"),
    ("My favourite colour is teal.", "What's my favorite color?", "teal"),
    ("remember that the wifi password is ochre7", "what is the wifi password?", "ochre7"),
    ("My birthday is on the 3rd of May. I like tea.", "When is my birthday?", "3rd of May"),
    ("I am 34 years old", "How old am I?", "34"),
    ("My sister lives in Lagos.", "Where does my sister live?", "Lagos"),
    ("hola, mi nombre es Ana y vivo en Bogotá", "¿cuál es mi nombre y dónde vivo?", "Bogotá"),
    ("Me gusta el té verde.", "¿Qué me gusta?", "té verde"),
    ("Me llamo Ana.", "¿Cómo me llamo?", "Ana"),
    ("Trabajo de carpintero.", "¿Cuál es mi profesión?", "carpintero"),
    ("Mi color favorito es el azul.", "¿Cuál es mi color favorito?", "azul"),
    ("Recuerda que la clave es azul99.", "¿Cuál es la clave?", "azul99"),
    ("Tengo 41 años.", "¿Cuántos años tengo?", "41"),
]


@pytest.mark.parametrize(("statement", "question", "answer"), CASES, ids=[case[1] for case in CASES])
def test_what_was_told_is_found_again(statement: str, question: str, answer: str) -> None:
    """What a person states is in the answer, from core memory, and from recall memory once core memory has lost it."""
    harness = Harness()
    for text in (statement, "It rains a lot here.", "Thanks!", "Tell me a joke."):
        harness.say(text)
    assert answer in harness.human
    assert answer in harness.say(question)
    for _ in range(4):  # asked before: questions like this one are in recall memory
        harness.restart()
        reply = harness.say(question)
    assert answer in reply
    assert f'"{question}' not in reply
    assert f'{"Me lo dijiste el" if "¿" in question else "You told me on"} 2026-11-24: "' in reply


def test_facts_are_kept_and_found_as_in_the_readme() -> None:
    """Facts of one message go to core memory in one call, a greeting is no fact, and an answer quotes with its day."""
    harness = Harness()
    reply = harness.say("Hi, my name is Ada and I like green tea")
    assert reply == "I noted in core memory: my name is Ada; I like green tea."
    assert harness.human == "my name is Ada\nI like green tea"
    assert [name for name, _ in harness.calls] == ["core_memory_append", "send_message"]
    harness.day = "2026-11-25"
    harness.say("I like green tea")
    assert harness.human == "my name is Ada\nI like green tea"
    assert harness.say("What is my name?") == 'You told me on 2026-11-24: "my name is Ada".'
    assert [name for name, _ in harness.calls] == ["conversation_search", "archival_memory_search", "send_message"]
    assert all(arguments["request_heartbeat"] for _, arguments in harness.calls[:-1])
    assert "my name is Ada; I like green tea" in harness.say("What is my shoe size?")
    assert "noted" not in harness.say("What do I like?"), "its own words are no facts"
    harness.say("My wife is Eva")
    assert harness.say("What is my wife's name?") == 'You told me on 2026-11-25: "My wife is Eva".'
    harness.say("/call nope my shoe size is 40")
    assert "40" not in harness.say("What is my shoe size?")


CHANGES = [
    ("I live in Porto.", "Actually, I moved to Oslo.", "Where do I live?", "Porto", "Oslo"),
    ("My name is Ada.", "No, my name is Bea", "What is my name?", "Ada", "Bea"),
    ("I work as a nurse", "I now work as a pilot", "What is my job?", "nurse", "pilot"),
    ("I am 34 years old", "I'm 35 years old", "How old am I?", "34", "35"),
    ("I'm 34", "Actually I turned 35 today!", "How old am I?", "34", "35"),
    ("We live in Rome", "I've just moved to Oslo with my cat", "Where do I live?", "Rome", "Oslo"),
    ("My wife is Anna.", "My wife’s name is Bea", "What is my wife's name?", "Anna", "Bea"),
    ("My name is Ada. My husband is Bob.", "My husband is called Tom", "Who is my husband?", "Bob", "Tom"),
    ("I'm married to Anna", "My wife is now Bea", "Who is my wife?", "Anna", "Bea"),
    ("Vivo en Porto.", "Ahora vivo en Oslo", "¿Dónde vivo?", "Porto", "Oslo"),
    ("Vivo en Porto.", "Me mudé a Lima", "¿Dónde vivo?", "Porto", "Lima"),
    ("Tengo 30 años.", "Cumplí 31 años", "¿Cuántos años tengo?", "30", "31"),
    ("Mi esposa es Ana.", "Mi esposa se llama Eva", "¿Quién es mi esposa?", "Ana", "Eva"),
    ("Me llamo Ana.", "Mi nombre es Eva", "¿Cómo me llamo?", "Ana", "Eva"),
    ("Soy de Lima. Mi mujer se llama Ana.", "Mi mujer es Eva", "¿Cómo se llama mi mujer?", "Ana", "Eva"),
]


@pytest.mark.parametrize(("first", "then", "question", "old", "new"), CHANGES, ids=[change[1] for change in CHANGES])
def test_a_changed_fact_replaces_the_old_one(first: str, then: str, question: str, old: str, new: str) -> None:
    """What a person has one of is replaced in core memory, and the answer is the new one; other facts stay."""
    harness = Harness("I have a dog called Rex")
    harness.say(first)
    harness.day = "2026-11-25"
    harness.say(then)
    assert [name for name, _ in harness.calls] == ["core_memory_replace", "send_message"]
    assert (old in harness.human, new in harness.human, "Rex" in harness.human) == (False, True, True)
    for _ in range(2):
        reply = harness.say(question)
        assert (old in reply, new in reply) == (False, True)
        harness.restart()


JOBS = [
    ("I'm a nurse", "I'm a pilot now", "What is my job?"),
    ("Soy profesora", "Ahora soy médica", "¿En qué trabajo?"),
]


@pytest.mark.parametrize(("first", "then", "question"), JOBS)
def test_who_says_what_they_are_states_their_job(first: str, then: str, question: str) -> None:
    """A newer job takes the older one's place also where no word of work is said."""
    harness = Harness("I have a dog called Rex")
    harness.say(first)
    harness.say(then)
    assert (harness.human, first in harness.say(question)) == (f"I have a dog called Rex\n{then}", False)
    assert then in harness.say(question)


BESIDE = [
    ("My wife is Anna", "My wife is a doctor"), ("My wife is Anna", "My wife is pregnant"),
    ("I work as a teacher", "I work at the hospital"), ("I live in Porto", "I live for jazz"),
    ("Tengo 41 años", "Tengo 2 gatos"), ("I am 34 years old", "I'm 20 minutes late"),
    ("I'm a nurse", "I'm a vegetarian"), ("My name is Ada", "My cat's name is Mia"),
    ("My sister is Ann", "My sister is Bea"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "then"), BESIDE)
def test_other_facts_stand_beside_each_other(first: str, then: str) -> None:
    """What people may have several of, or what is another thing, takes no other fact's place."""
    harness = Harness()
    for text in (first, then):
        harness.say(text)
    assert harness.human == f"{first}\n{then}"


IN_OTHER_WORDS = [
    ("I'm Ada, a marine biologist from Lisbon", "What is my job?"),
    ("I'm Ada, a marine biologist from Lisbon", "Where am I from?"),
    ("I'm Ada, a marine biologist from Lisbon", "Who am I?"),
    ("I have two cats", "Do I own any pets?"),
    ("My favourite dish is sushi", "What do I love to eat?"),
    ("Soy de Quito y juego al ajedrez", "¿Cuáles son mis aficiones?"),
]


@pytest.mark.parametrize(("statement", "question"), IN_OTHER_WORDS)
def test_core_memory_may_have_it_in_other_words(statement: str, question: str) -> None:
    """Where no words agree, a line of core memory that may be about anything is shown, before nothing is found."""
    harness = Harness()
    for text in ("My sister lives in Lagos" if "job" in question else "I work as a cook", statement):
        harness.say(text)
    reply = harness.say(question)
    assert (f'"{statement}"' in reply, "found nothing" in reply, "No encontré" in reply) == (True, False, False)


LANGUAGES = [
    ("Mi color favorito es el azul", "Anoté en la memoria central: Mi color favorito es el azul."),
    ("¿Cuál es mi talla?", "En la memoria central: I live in Rome. No encontré nada sobre 'Cuál es mi talla'."),
    ("¿Dónde vivo?", 'En la memoria central: "I live in Rome".'),
    ("¿Quién eres?", "Soy el suplente"),
    ("Hola", "Soy el suplente"),
    ("My friend Luis and I went to Los Angeles", "I noted in core memory"),
    ("Ich heiße Ada und wohne in Berlin", "I noted in core memory: Ich heiße Ada und wohne in Berlin."),
    ("Je m'appelle Luc et j'habite à Lyon.", "I noted in core memory: Je m'appelle Luc et j'habite à Lyon."),
    ("Меня зовут Ада", "I noted in core memory: Меня зовут Ада."),
    ("我叫小明，住在上海", "I noted in core memory: 我叫小明，住在上海."),
    ("Bonjour !", "I am memws's offline stand-in"),
]


@pytest.mark.parametrize(("text", "reply"), LANGUAGES)
def test_it_answers_in_the_language_it_was_spoken_to(text: str, reply: str) -> None:
    """Sentences are Spanish to who speaks that, else English; facts stay in the words in which they were told."""
    harness = Harness("I live in Rome")
    assert harness.say(text).startswith(reply)


def test_facts_of_other_languages_are_found_again() -> None:
    """What was said in another language answers a question in it."""
    harness = Harness()
    for statement, question in (("Ich heiße Ada", "Wie heiße ich?"), ("我叫小明，住在上海", "我叫什么？")):
        harness.say(statement)
        assert f'"{statement}"' in harness.say(question)


@pytest.mark.parametrize("question", ["What is my shoe size?", "Where does my brother live?", "¿Cuál es mi talla?"])
def test_what_was_never_told_is_admitted(question: str) -> None:
    """Nothing found is said so, and what core memory holds is shown; the question does not pass for an answer."""
    harness = Harness()
    core, nothing = "In core memory", f"I found nothing about {question.strip('¿?')!r}."
    if "¿" in question:
        core, nothing = "En la memoria central", nothing.replace("I found nothing about", "No encontré nada sobre")
    assert harness.say(question) == nothing
    harness.say("My name is Ada and I live in Porto")
    for _ in range(3):
        assert harness.say(question) == f"{core}: My name is Ada; I live in Porto. {nothing}"


def test_what_does_not_fit_goes_to_archival_memory() -> None:
    """When the human block has no room, what is said becomes a passage, and is found there."""
    harness = Harness("x" * 95, limit=100)
    assert "in archival memory" in harness.say("My sister plays the cello")
    assert harness.stores["archival"][-1]["text"] == "My sister plays the cello"
    harness.stores["recall"] = []
    reply = harness.say("What does my sister play?")
    assert 'In archival memory since 2026-11-24: "My sister plays the cello".' in reply


NOTHING_TO_DO = ["What are you?", "who are you", "Are you an AI?", "hello", "It rains.", "Forget my name", ""]


@pytest.mark.parametrize("text", NOTHING_TO_DO)
def test_it_says_what_it_is(text: str) -> None:
    """Asked what it is, and where it has nothing to keep or to look up, it says that it is no language model."""
    reply = Harness().say(text)
    assert ("not a language model" in reply, "--base-url" in reply) == (True, True)


def test_a_tool_is_called_by_name() -> None:
    """A tool is called by /call NAME with JSON, and its result told; what fails is told why, and not called again."""
    harness = Harness(tools=[*TOOLS, "roll_dice"])
    harness.results = {"roll_dice": (True, "4")}
    assert harness.say('/call roll_dice {"sides": 6}') == "roll_dice returned: 4"
    assert harness.calls[0] == ("roll_dice", {"sides": 6, "request_heartbeat": True})
    harness.results = dict.fromkeys(("roll_dice", "nope", "core_memory_append"), (False, "no such luck"))
    for name in ("roll_dice", "nope"):
        assert harness.say(f"/call {name}") == f"{name} failed: no such luck"
    assert harness.say("I play the oboe") == "core_memory_append failed: no such luck"


@pytest.mark.parametrize("missing", TOOLS)
def test_a_tool_that_is_not_offered_is_not_called(missing: str) -> None:
    """Each memory tool may be missing; a reply comes all the same, as plain text without send_message."""
    harness = Harness(tools=[tool for tool in TOOLS if tool != missing])
    for text in ("My name is Ada.", "No, my name is Bea.", "What is my name?", "Forget my name"):
        assert harness.say(text)
        assert missing not in [name for name, _ in harness.calls]


def test_what_may_stand_before_a_reply() -> None:
    """Timed heartbeats and logins get a monologue and no call; heartbeats in a turn and summaries lead to the reply."""
    harness = Harness()
    harness.say("I like tea")
    for reason in (HEARTBEAT_TIMER, HEARTBEAT_WAKE):
        for kind, fields in (("heartbeat", {"reason": reason}), ("login", {"last_login": "2026-11-20"})):
            harness.pack(kind, **fields)
            assert (harness.run(), harness.calls) == ([], [])
        harness.pack("user_message", message="I like jazz")
        harness.pack("heartbeat", reason=reason)
        assert harness.run() == []
    harness = Harness("I live in Porto")
    harness.pack("user_message", message="Where do I live?")
    harness.messages.append({"role": "assistant", "content": "I think."})
    harness.pack("heartbeat", reason=HEARTBEAT_NO_REPLY)
    assert harness.run() == ['In core memory: "I live in Porto".']
    events = '{"type": "login", "last_login": "x"}\n{"type": "user_message", "message": "I sing"}'
    harness.messages = [{"role": "user", "content": events}]
    assert harness.run() == ["I noted in core memory: I sing."]
    harness.messages = []
    harness.pack("system_alert", message=f"Summary:\n- I like tea\n{memws.WAITING_NOTE}Where do I live?")
    assert harness.run() == ['In core memory: "I live in Porto".']


def test_a_summary_keeps_the_facts() -> None:
    """A summary keeps within its limit what the user stated, the newest, and carries an earlier summary on."""

    def summarize(transcript: str) -> str:
        messages = [{"role": "system", "content": memws.SUMMARY_SYSTEM + "."}, {"role": "user", "content": transcript}]
        text, calls = ask(messages, [])
        assert (calls, len(text) <= memws.SUMMARY_LIMIT) == ([], True)
        return text

    once = summarize(
        "user (2026-11-24 10:00): My name is Ada and I live in Porto.\nassistant (2026-11-24 10:00): I like you.\n"
        "user (2026-11-24 10:01): What is up?\ntool: I am a tool"
    )
    assert once.split("\n") == ["The user stated:", "- My name is Ada", "- I live in Porto"]
    again = summarize(f"Summary of what came before: {once}\nuser: I have a cat.")
    assert again.split("\n") == [*once.split("\n"), "- I have a cat"]
    assert "I own 499 herons" in summarize("\n".join(f"user: I own {number} herons." for number in range(500)))
    assert summarize("") == "The user stated:"


HOSTILE = ["\x00", "????" * 16_384, "I " * 32_768, "my " * 21_000, "(" * 65_536, "I like " * 9_000, "and i " * 10_000]
HOSTILE += [", " * 32_000, "¿" * 65_536, "hi, " * 16_000, "\n" * 65_536, ". " * 32_768, "{" * 65_536, "no, " * 16_000]
HOSTILE += ["/call x " + "{" * 60_000, "what is my name and " * 3_000, "你好" * 30_000, "forget that " * 5_000, "null"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_texts_get_a_reply(text: str) -> None:
    """Any text, up to 65,536 characters, gets its one reply."""
    assert Harness().say(text)
