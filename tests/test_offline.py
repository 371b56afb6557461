"""The offline model: what an agent that it drives keeps, finds and says, with its memory and search as they are."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from agents import Lab, request_of

import memws
from memws import HEARTBEAT_NO_REPLY, HEARTBEAT_TIMER, HEARTBEAT_WAKE

pytestmark = pytest.mark.anyio
TOOLS = ["send_message", "core_memory_append", "core_memory_replace"]
TOOLS += ["archival_memory_insert", "archival_memory_search", "conversation_search"]


def roll_dice(sides: int) -> str:
    if sides < 2:
        raise ValueError("no such dice")
    return "4"


class Talk:
    """A conversation with one agent."""

    day = "2026-11-24"

    def __init__(self, lab: Lab, agent: memws.Agent) -> None:
        self.lab, self.agent = lab, agent

    async def say(self, text: str) -> str:
        """The reply to a user's message."""
        self.turn = await self.lab.say(self.agent, memws.clean_value(text))
        self.calls = [(call["name"], call["arguments"]) for call in self.turn.of("tool_call")]
        plain = [] if "send_message" in self.agent.tools else ["plain_text"]
        assert (self.turn.corrections, self.turn.stop_reason) == (plain, "done")
        (reply,) = self.turn.replies
        return reply

    async def restart(self) -> None:
        """Forget the context window and core memory; recall and archival memory stay."""
        async with memws.Transaction(self.agent.memory) as change:
            change.write("human", "")
            change.state["cut"] = self.agent.memory.last_message + 1
        self.agent = await self.lab.open()

    @property
    def human(self) -> str:
        return self.agent.blocks["human"].value


Begin = Callable[..., Awaitable[Talk]]


@pytest.fixture
async def begin(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Begin]:
    """Begins a conversation with an agent whose clock stands at ten."""

    async def start(human: str = "", limit: int = 2_000, **config: Any) -> Talk:
        blocks = [{"label": "human", "value": human, "limit": limit}]
        talk = Talk(lab, await lab.create(blocks=blocks, timezone="UTC", **config))
        monkeypatch.setattr(memws, "now_text", lambda: f"{talk.day}T10:00:00.000Z")
        return talk

    async with Lab(None, tools=[roll_dice]) as lab:
        yield start


TOLD = [  # a statement, a question, and what is in the answer
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
    ("Ich heiße Ada", "Wie heiße ich?", "Ada"),
    ("我叫小明，住在上海", "我叫什么？", "小明"),
]
CHANGED = [  # a statement, one that changes it, a question, what was, and what is now in the answer
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
    ("I'm a nurse", "I'm a pilot now", "What is my job?", "nurse", "pilot"),
    ("Soy profesora", "Ahora soy médica", "¿En qué trabajo?", "profesora", "médica"),
]
CASES = [(first, "", question, "no such word", answer) for first, question, answer in TOLD] + CHANGED


@pytest.mark.parametrize(
    ("first", "then", "question", "old", "new"), CASES, ids=[f"{case[1]}{case[2]}" for case in CASES]
)
async def test_what_was_told_is_found_again(
    begin: Begin, first: str, then: str, question: str, old: str, new: str
) -> None:
    """What a person states last is in the answer, from core memory, and from recall memory once that has lost it.

    What one has one of is replaced in core memory; other facts stay.
    """
    talk = await begin("I have a dog called Rex")
    await talk.say(first)
    talk.day = "2026-11-25" if then else talk.day
    for text in [then] if then else ["It rains a lot here.", "Thanks!", "Tell me a joke."]:
        await talk.say(text)
    assert not then or [name for name, _ in talk.calls] == ["core_memory_replace", "send_message"]
    assert (old in talk.human, new in talk.human, "Rex" in talk.human) == (False, True, True)
    reply = await talk.say(question)
    assert (old in reply, new in reply) == (False, True)
    for _ in range(1 if then else 3):  # asked before: questions like this one are in recall memory
        await talk.restart()
        reply = await talk.say(question)
        assert (old in reply, new in reply, f'"{question}' in reply) == (False, True, False)
    assert f'{"Me lo dijiste el" if "¿" in question else "You told me on"} {talk.day}: "' in reply


async def test_facts_are_kept_and_found_as_in_the_readme(begin: Begin) -> None:
    """Facts of one message go to core memory in one call, a greeting is no fact, and an answer quotes with its day."""
    talk = await begin()
    reply = await talk.say("Hi, my name is Ada and I like green tea")
    assert reply == "I noted in core memory: my name is Ada; I like green tea."
    assert talk.human == "my name is Ada\nI like green tea"
    assert [name for name, _ in talk.calls] == ["core_memory_append", "send_message"]
    talk.day = "2026-11-25"
    await talk.say("I like green tea")
    assert talk.human == "my name is Ada\nI like green tea"
    assert await talk.say("What is my name?") == 'You told me on 2026-11-24: "my name is Ada".'
    assert [name for name, _ in talk.calls] == ["conversation_search", "archival_memory_search", "send_message"]
    assert all(arguments["request_heartbeat"] for _, arguments in talk.calls[:-1])
    assert "my name is Ada; I like green tea" in await talk.say("What is my shoe size?")
    assert "noted" not in await talk.say("What do I like?"), "its own words are no facts"
    await talk.say("My wife is Eva")
    assert await talk.say("What is my wife's name?") == 'You told me on 2026-11-25: "My wife is Eva".'
    await talk.say("/call nope my shoe size is 40")
    assert "40" not in await talk.say("What is my shoe size?")


BESIDE = [
    ("My wife is Anna", "My wife is a doctor"), ("My wife is Anna", "My wife is pregnant"),
    ("I work as a teacher", "I work at the hospital"), ("I live in Porto", "I live for jazz"),
    ("Tengo 41 años", "Tengo 2 gatos"), ("I am 34 years old", "I'm 20 minutes late"),
    ("I'm a nurse", "I'm a vegetarian"), ("My name is Ada", "My cat's name is Mia"),
    ("My sister is Ann", "My sister is Bea"),
]  # fmt: skip


@pytest.mark.parametrize(("first", "then"), BESIDE)
async def test_other_facts_stand_beside_each_other(begin: Begin, first: str, then: str) -> None:
    """What people may have several of, or what is another thing, takes no other fact's place."""
    talk = await begin()
    for text in (first, then):
        await talk.say(text)
    assert talk.human == f"{first}\n{then}"


IN_OTHER_WORDS = [
    ("I'm Ada, a marine biologist from Lisbon", "What is my job?"),
    ("I'm Ada, a marine biologist from Lisbon", "Where am I from?"),
    ("I'm Ada, a marine biologist from Lisbon", "Who am I?"),
    ("I have two cats", "Do I own any pets?"),
    ("My favourite dish is sushi", "What do I love to eat?"),
    ("Soy de Quito y juego al ajedrez", "¿Cuáles son mis aficiones?"),
]


@pytest.mark.parametrize(("statement", "question"), IN_OTHER_WORDS)
async def test_core_memory_may_have_it_in_other_words(begin: Begin, statement: str, question: str) -> None:
    """Where no words agree, a line of core memory that may be about anything is shown, before nothing is found."""
    talk = await begin()
    for text in ("My sister lives in Lagos" if "job" in question else "I work as a cook", statement):
        await talk.say(text)
    reply = await talk.say(question)
    assert (f'"{statement}"' in reply, "found nothing" in reply, "No encontré" in reply) == (True, False, False)


WHO_IT_IS = "I am memws's offline stand-in: rules, not a language model. For one see --model, --base-url"
NOTHING_TO_DO = ["What are you?", "who are you", "Are you an AI?", "hello", "It rains.", "Forget my name", ""]
REPLIES = [
    *((text, WHO_IT_IS) for text in [*NOTHING_TO_DO, "Bonjour !"]),
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
]


@pytest.mark.parametrize(("text", "reply"), REPLIES)
async def test_it_answers_in_the_language_it_was_spoken_to(begin: Begin, text: str, reply: str) -> None:
    """Sentences are Spanish to who speaks that, else English; facts stay in the words in which they were told.

    Asked what it is, and where it has nothing to keep or to look up, it says that it is no language model.
    """
    assert (await (await begin("I live in Rome")).say(text)).startswith(reply)


@pytest.mark.parametrize("question", ["What is my shoe size?", "Where does my brother live?", "¿Cuál es mi talla?"])
async def test_what_was_never_told_is_admitted(begin: Begin, question: str) -> None:
    """Nothing found is said so, and what core memory holds is shown; the question does not pass for an answer."""
    talk = await begin()
    core, nothing = "In core memory", f"I found nothing about {question.strip('¿?')!r}."
    if "¿" in question:
        core, nothing = "En la memoria central", nothing.replace("I found nothing about", "No encontré nada sobre")
    assert await talk.say(question) == nothing
    await talk.say("My name is Ada and I live in Porto")
    for _ in range(3):
        assert await talk.say(question) == f"{core}: My name is Ada; I live in Porto. {nothing}"


async def test_what_does_not_fit_goes_to_archival_memory(begin: Begin) -> None:
    """When the human block has no room, what is said becomes a passage, and is found there."""
    talk = await begin("x" * 95, limit=100)
    assert "in archival memory" in await talk.say("My sister plays the cello")
    assert talk.turn.of("memory_change")[0]["after"] == "My sister plays the cello"
    async with memws.Transaction(talk.agent.memory) as change:
        change.insert("My brother plays the oboe")
    reply = await talk.say("What does my brother play?")
    assert 'In archival memory since 2026-11-24: "My brother plays the oboe".' in reply


async def test_a_tool_is_called_by_name(begin: Begin) -> None:
    """A tool is called by /call NAME with JSON, and its result told; what fails is told why, and not called again."""
    talk = await begin()
    assert await talk.say('/call roll_dice {"sides": 6}') == "roll_dice returned: 4"
    assert talk.calls[0] == ("roll_dice", {"sides": 6, "request_heartbeat": True})
    for text, told in (
        ('roll_dice {"sides": 1}', "roll_dice failed: ValueError: no such dice"),
        ("nope", "nope failed: "),
    ):
        assert (await talk.say(f"/call {text}")).startswith(told)
        assert len(talk.calls) == 2


@pytest.mark.parametrize("missing", TOOLS)
async def test_a_tool_that_is_not_offered_is_not_called(begin: Begin, missing: str) -> None:
    """Each memory tool may be missing; a reply comes all the same, as plain text without send_message."""
    talk = await begin(tools=[tool for tool in TOOLS if tool != missing])
    for text in ("My name is Ada.", "No, my name is Bea.", "What is my name?", "Forget my name"):
        assert await talk.say(text)
        assert missing not in [name for name, _ in talk.calls]


async def answer(messages: list[tuple[str, str]], tools: list[str] = TOOLS) -> tuple[str, list[str]]:
    """The text of the answer to a request, and what it sends to the user."""
    model, reply = memws.Models("offline").get(None)[0], memws.Reply()
    body = [memws.encode_json({"role": role, "content": content}) for role, content in messages]
    specs = memws.encode_json([{"type": "function", "function": {"name": name}} for name in tools]) if tools else ""
    async for chunk in model.stream(request_of(model.head({}), body, specs)):
        reply.feed(chunk)
    memws.read_reply(reply, tools)
    return reply.text, [call.arguments["message"] for call in reply.calls]


def packed(kind: str, **fields: str) -> tuple[str, str]:
    """An event as the agent packs it."""
    return "user", memws.encode_json({"type": kind, **fields, "time": "2026-11-24 10:02"})


SYSTEM = ("system", 'You are an agent.\n<human characters="15/2000">\nI live in Porto\n</human>')
ASKED = packed("user_message", message="Where do I live?")
WAITS = packed("system_alert", message=f"Summary:\n- I like tea\n{memws.WAITING_NOTE}Where do I live?")
TIMED, WOKEN = (packed("heartbeat", reason=reason) for reason in (HEARTBEAT_TIMER, HEARTBEAT_WAKE))
HISTORIES: dict[str, tuple[list[tuple[str, str]], bool]] = {  # what stands before a reply, and whether one follows
    "a timed heartbeat": ([TIMED], False),
    "a wake": ([WOKEN], False),
    "a login": ([packed("login", last_login="2026-11-20")], False),
    "a timed heartbeat after a message": ([ASKED, TIMED], False),
    "a wake after a message": ([ASKED, WOKEN], False),
    "a thought": ([ASKED, ("assistant", "I think."), packed("heartbeat", reason=HEARTBEAT_NO_REPLY)], True),
    "a login with a message": ([("user", f'{{"type": "login", "last_login": "x"}}\n{ASKED[1]}')], True),
    "a summary of a message that waits": ([WAITS], True),
}


@pytest.mark.parametrize(("history", "replies"), HISTORIES.values(), ids=HISTORIES)
async def test_what_may_stand_before_a_reply(history: list[tuple[str, str]], replies: bool) -> None:
    """Timed heartbeats and logins get a monologue and no call; heartbeats in a turn and summaries lead to the reply."""
    text, sent = await answer([SYSTEM, *history], ["send_message"])
    assert (sent, text != "") == (['In core memory: "I live in Porto".'] * replies, True)


async def test_a_summary_keeps_the_facts() -> None:
    """A summary keeps within its limit what the user stated, the newest, and carries an earlier summary on."""

    async def summarize(transcript: str) -> str:
        text, sent = await answer([("system", memws.SUMMARY_SYSTEM + "."), ("user", transcript)], [])
        assert (sent, len(text) <= memws.SUMMARY_LIMIT) == ([], True)
        return text

    once = await summarize(
        "user (2026-11-24 10:00): My name is Ada and I live in Porto.\nassistant (2026-11-24 10:00): I like you.\n"
        "user (2026-11-24 10:01): What is up?\ntool: I am a tool"
    )
    assert once.split("\n") == ["The user stated:", "- My name is Ada", "- I live in Porto"]
    again = await summarize(f"Summary of what came before: {once}\nuser: I have a cat.")
    assert again.split("\n") == [*once.split("\n"), "- I have a cat"]
    assert "I own 499 herons" in await summarize("\n".join(f"user: I own {number} herons." for number in range(500)))
    assert await summarize("") == "The user stated:"


HOSTILE = ["\x00", "????" * 16_384, "I " * 32_768, "my " * 21_000, "(" * 65_536, "I like " * 9_000, "and i " * 10_000]
HOSTILE += [", " * 32_000, "¿" * 65_536, "hi, " * 16_000, "\n" * 65_536, ". " * 32_768, "{" * 65_536, "no, " * 16_000]
HOSTILE += ["/call x " + "{" * 60_000, "what is my name and " * 3_000, "你好" * 30_000, "forget that " * 5_000, "null"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
async def test_hostile_texts_get_a_reply(begin: Begin, text: str) -> None:
    assert await (await begin(context_window=200_000)).say(text)
