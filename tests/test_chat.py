"""Section 12, CLI: the terminal client on a real terminal, with the real server behind a proxy that can break."""

import contextlib
import datetime
import io
import re
import shlex
import stat
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from commandline import command, environment, run
from endpoint import Endpoint, Reply, echo, say
from proxy import Proxy
from terminal import Terminal

import memws

Start = Callable[..., Terminal]
CTRL_C, CTRL_D = "\x03", "\x04"
PASTE, PASTE_END = "\x1b[200~", "\x1b[201~"  # what a terminal sets around a paste
PASTES, PASTES_NO_MORE = "\x1b[?2004h", "\x1b[?2004l"  # by which a program asks for it


@pytest.fixture
def proxy(online: Callable[..., memws.WebSocketServer], endpoint: Endpoint) -> Iterator[Proxy]:
    """A breakable way to a server whose model says what the user said, unless the test scripts it."""
    endpoint.default = echo
    with Proxy(online(context_window=30_000).url) as proxy:
        yield proxy


@pytest.fixture
def start(tmp_path: Path, proxy: Proxy) -> Iterator[Start]:
    """Starts chat on a terminal, and answers whether to create the agent sam; at its prompt Ctrl-D leaves."""
    chats: list[Terminal] = []
    with contextlib.ExitStack() as stack:

        def begin(answer: str = "y", **variables: str) -> Terminal:
            settings = environment({"HOME": str(tmp_path), **variables})
            chat = Terminal(command("chat", "--url", proxy.url), cwd=tmp_path, variables=settings)
            chats.append(stack.enter_context(chat))
            chat.expect("there is no agent 'sam'; create it? [Y/n] ")
            chat.line(answer, "> ")
            return chat

        yield begin
        for chat in chats:
            chat.type(CTRL_D)
            assert chat.wait() == 0


@pytest.fixture
def chat(start: Start) -> Terminal:
    """A chat with a new agent sam."""
    return start()


def frame(kind: str, text: Any = "", **more: Any) -> dict[str, Any]:
    event = {"type": "agent_response", "message_type": kind, "message": text, "agent_name": "sam", "turn_id": "t"}
    return {**event, "step": 1, **more}


BANNER = f"memws {memws.__version__} at ws://127.0.0.1:\\d+.*model test-model; /help lists the commands"


def test_conversation(start: Start, endpoint: Endpoint, tmp_path: Path) -> None:
    """Banner, an offer to create, the streamed reply, what lies behind it dimmed, memory as a diff, history kept."""
    remember = {"name": "human", "content": "Name: Ana\x1b[2J", "request_heartbeat": True}
    endpoint.script(Reply("I think\x1b[2J", calls=[("core_memory_append", remember)]), say("Hello, Ana"))
    chat = start("n")
    assert re.search(BANNER, chat.seen)
    chat.line("hi", "no agent yet: /new NAME creates one, /load NAME loads one", "> ")
    chat = start("")
    chat.line("hi", "\x1b[1m~ \x1b[0m\x1b[2mI think\\x1b", "\x1b[2m> core_memory_append(")
    chat.expect("human, changed by the agent", "\x1b[32m+ Name: Ana\\x1b[2J", "\x1b[1msam: \x1b[0mHello, ", "sam> ")
    chat.line("/quit")
    assert chat.wait() == 0
    assert "\x1b[2J" not in chat.seen
    history = tmp_path / ".memws_history"
    assert "hi\n" in history.read_text("utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.parametrize(("variables", "mark"), [({"NO_COLOR": "1"}, "\x1b[2m"), ({"TERM": "dumb"}, "\x1b[2")])
def test_no_colour(variables: dict[str, str], mark: str, start: Start) -> None:
    """NO_COLOR takes the colours, and so does a dumb terminal."""
    chat = start(**variables)
    chat.line("hi", "sam: you said hi", "sam> ")
    assert mark not in chat.seen


def test_slash_commands(chat: Terminal, endpoint: Endpoint) -> None:
    """Each command of the help answers; what is no command gets the help."""
    endpoint.script(say("noted"), Reply(status=401))
    for line, answer in [
        ("otters are fine", "noted"),
        ("hi", "error: "),
        ("/agents", "* sam test-model, idle"),
        ("/memory", "human (0 of 2000 characters)"),
        ("/memory human", "human (0 of 2000 characters)"),
        ("/memory nothing", "there is no block 'nothing'; name one of persona, human"),
        ("/context", " of 30000 tokens"),
        ("/search otters", "otters are fine"),
        ("/zzz", "there is no /zzz; /help lists what there is"),
        ("/help", "/quit"),
        ("/load nobody", "send create_agent first"),
        ("/new sam", "sam"),
        ("/new a/b", "name"),
        ("//x", "you said /x"),
        ("/", "sam> "),
        ("", "sam> "),
        ("/new bob", "bob> "),
        ("/load sam", "sam> "),
    ]:
        chat.line(line, answer)
        if not answer.endswith("> "):
            chat.expect("sam> ")
    helped = re.findall(r"^/(\w+) +\S", chat.seen.replace(f"{PASTES_NO_MORE}\r", ""), re.MULTILINE)
    assert sorted(set(helped)) == sorted(name[3:] for name in dir(memws.Chat) if name.startswith("do_"))


def test_interrupts_of_turns(chat: Terminal, endpoint: Endpoint, proxy: Proxy) -> None:
    """Ctrl-C cancels a running turn, and talk goes on; where cancelling does not help, a second one leaves."""
    endpoint.script(say("a long story", hold=True), say("hello"), say("a longer story", hold=True))
    chat.line("tell")
    endpoint.wait_requests(1)
    chat.type(CTRL_C)
    chat.expect("[cancelled]", "sam> ")
    chat.line("hi", "hello", "sam> ")
    proxy.on_sent = lambda sent: sent.get("command") != "cancel"  # it never arrives
    proxy.sent.clear()
    chat.line("tell")
    endpoint.wait_requests(3)
    chat.type(CTRL_C)
    proxy.wait(lambda: [sent for sent in proxy.sent if sent.get("command") == "cancel"])
    chat.type(CTRL_C)
    assert chat.wait() == 0


LIBEDIT = '''"""An input editor that takes no pastes, like libedit."""
def parse_and_bind(text): pass
set_history_length = write_history_file = read_history_file = parse_and_bind
def get_line_buffer(): return ""
'''


@pytest.mark.parametrize("library", ["GNU readline", "libedit"])
def test_paste(library: str, start: Start, proxy: Proxy, tmp_path: Path) -> None:
    """Pasted lines are one message, sent with the Enter that follows, also where they look like commands."""
    (tmp_path / "stand-in").mkdir()
    if library == "libedit":
        (tmp_path / "stand-in" / "readline.py").write_text(LIBEDIT)
    home = {"HOME": "/dev/null"} if library == "libedit" else {}  # no history can be kept there
    chat = start(PYTHONPATH=str(tmp_path / "stand-in"), **home)
    assert PASTES in chat.seen
    pastes = ["one\rtwo\rthree", "/quit\r/memory", "//x\ny", "one line"]
    for text in pastes:
        chat.line(f"{PASTE}{text}{PASTE_END}", f"you said {text[:3]}", "sam> ")
    chat.line(f"So: {PASTE}a\rb{PASTE_END} and {PASTE}c\rd{PASTE_END}.", "you said So: a", "sam> ")
    chat.line("//typed", "you said /typed", "sam> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0
    assert chat.seen.rindex(PASTES_NO_MORE) > chat.seen.rindex(PASTES)
    told = [sent["message"] for sent in proxy.sent if sent["type"] == "user_message"]
    assert told == [*(text.replace("\r", "\n") for text in pastes), "So: a\nb and c\nd.", "/typed"]


ADA, ADVICE = "Name: Ada\nZo\u00eb", "set EDITOR to another one"
FILE = f"{ADA}\n".encode()
EDITORS = {  # what $EDITOR does to a block's file: the block then, what is shown, the files that are kept
    "sed -i s/Ada/Eve/": ("Name: Eve\nZo\u00eb", "+ Name: Eve", []),
    "true": (ADA, "", []),
    "false": (ADA, f"{ADVICE}; what you wrote is in ", [FILE]),
    "no-such-editor": (ADA, ADVICE, [FILE]),
    "truncate -s 0": ("", "- Name: Ada", []),
    "truncate -s 9000": (ADA, "2,000", [FILE.ljust(9_000, b"\0")]),
    "cp latin": (ADA, "what you wrote is in ", [b"Zo\xeb"]),
    "sh meddler": ("Theirs", "what you wrote is in ", [b"Mine"]),  # somebody else changes the block meanwhile
}


@pytest.mark.parametrize("editor", EDITORS)
def test_edit(editor: str, start: Start, proxy: Proxy, tmp_path: Path) -> None:
    """/edit opens a block in an editor and stores what it left; where that cannot be, nothing is lost."""
    meddling = f"memws.connect({proxy.url!r}).command('set_block', agent_name='sam', label='human', value='Theirs')"
    code = f"import pathlib, sys, memws; {meddling}; pathlib.Path(sys.argv[1]).write_text('Mine')"
    (tmp_path / "meddler").write_text(f'{sys.executable} -c {shlex.quote(code)} "$1"')
    (tmp_path / "latin").write_bytes(b"Zo\xeb")
    value, shown, kept = EDITORS[editor]
    folder = tmp_path / "a folder"
    folder.mkdir()
    both = {"VISUAL": editor, "EDITOR": "false"} if editor == "sh meddler" else {"EDITOR": editor}
    chat = start(TMPDIR=str(folder), **both)
    chat.line("/edit nothing", "there is no block 'nothing'; name one of persona, human", "sam> ")  # so it listens
    with memws.connect(proxy.url) as other:
        other.command("set_block", agent_name="sam", label="human", value=ADA)
        chat.expect("human, changed by the client", "sam> ")
        chat.line("/edit human", shown, "sam> ")
        chat.line("/memory human", "human (", "sam> ")  # the prompt before may have been an earlier one's
        blocks = {each["label"]: each["value"] for each in other.command("get_agent", agent_name="sam")["blocks"]}
    assert (blocks["human"], [path.read_bytes() for path in folder.iterdir()]) == (value, kept)
    assert chat.seen.count("persona (") == 0


def test_names(chat: Terminal) -> None:
    """/rename and /delete ask what they must and say how to go back; /restore goes back."""
    chat.line("/rename bob", "bob> ")
    chat.line("/rename a/b", "name", "bob> ")
    chat.line("/delete", "delete bob? [y/N] ")
    chat.line("", "bob> ")
    chat.line("hi", "you said hi", "bob> ")
    chat.line("/delete", "delete bob? [y/N] ")
    chat.line("y", "[/restore bob brings it back]", "> ")
    chat.line("hi", "no agent yet", "> ")
    chat.line("/delete", "no agent has been initialized", "> ")
    chat.line("/delete nobody", "unknown agent 'nobody'", "> ")
    chat.line("/restore", "bob", "> ")
    chat.line("/restore bob", "[bob, model test-model]", "bob> ")
    chat.line("hi", "you said hi", "bob> ")


def test_forks(chat: Terminal) -> None:
    """/fork goes on with a copy; /rewind lists turns, takes some back, and says where they are."""
    for text in ("one", "two", "three"):
        chat.line(text, f"you said {text}", "sam> ")
    chat.line("/fork kim", "[kim, model test-model]", "kim> ")
    chat.line("/rewind", " 3 ", "one", " 2 ", "two", " 1 ", "three", "kim> ")
    chat.line("/rewind 2", "the agent was taken back", "[/load kim_", " goes on as it was]", "kim> ")
    chat.line("/rewind 1", " 1 ", "one", "kim> ")
    chat.line("/load sam", "[sam, model test-model]", "sam> ")
    chat.line("/rewind", " 3 ", "one", "sam> ")


def test_local_times(start: Start, proxy: Proxy) -> None:
    """Times are those of the agent's zone, those of no agent the machine's."""
    chat = start("n", TZ="Asia/Kolkata")
    with memws.connect(proxy.url) as other:
        other.create_agent("sam", timezone="Pacific/Kiritimati")
        other.command("insert_passage", text="Otters")
        (item,) = other.command("search_memory", query="Otters")["items"]
        moment = datetime.datetime.fromisoformat(item["time"])
    chat.line("/load sam", "sam> ")
    chat.line("/search Otters", f"[archival {moment.astimezone(ZoneInfo('Pacific/Kiritimati')):%Y-%m-%d %H:%M}] Otters")
    chat.line("/agents", f"{moment.astimezone(ZoneInfo('Asia/Kolkata')):%Y-%m-%d %H}:", "sam> ")


def test_windows(serve: Callable[..., memws.WebSocketServer]) -> None:
    """On Windows a console gets colours, pastes are what it still holds, and waits end so that interrupts are seen."""
    calls, typed = list[str](), ["hi", "one", "two", "three"]
    console = types.SimpleNamespace(kbhit=lambda: typed and typed != ["one", "two", "three"])

    class Console(io.StringIO):
        def isatty(self) -> bool:
            return True

    with memws.connect(serve().url) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(memws.os, "system", calls.append)
        patch.setattr("builtins.input", lambda prompt="": typed.pop(0))
        patch.setitem(sys.modules, "msvcrt", console)
        patch.delenv("NO_COLOR", raising=False)
        patch.setenv("TERM", "xterm")
        client.create_agent("sam")
        memws.Screen(Console())
        patch.setattr(memws.os, "name", "nt")
        memws.Screen(io.StringIO())
        assert calls == []
        screen = memws.Screen(Console())
        assert calls == [""]
        assert [screen.ask("> "), screen.ask("> ")] == ["hi", "one\ntwo\nthree"]
        assert client.ask("hi")


def interrupt(chat: Terminal, answer: str) -> None:
    """Press Ctrl-C until it is noticed: one that comes as readline begins to wait is seen with the next key only."""
    for _ in range(5):
        chat.type(CTRL_C)
        with contextlib.suppress(AssertionError):
            chat.expect(answer, timeout=3)
            return
    chat.expect(answer)


def test_interrupts_at_the_prompt(chat: Terminal, proxy: Proxy) -> None:
    """At the prompt Ctrl-C drops the line and says how to leave; a line in between starts over; a second one leaves."""
    chat.type("half a line")
    chat.expect("half a line")
    interrupt(chat, "[Ctrl-C again, or Ctrl-D, leaves]")
    chat.expect("sam> ")
    chat.line("hi", "you said hi", "sam> ")
    interrupt(chat, "[Ctrl-C again, or Ctrl-D, leaves]")
    chat.expect("sam> ")
    chat.type(CTRL_C)
    with contextlib.suppress(subprocess.TimeoutExpired):
        chat.wait(3)
    if chat.process.poll() is None:
        chat.type(CTRL_C)
    assert chat.wait() == 0
    assert [sent["message"] for sent in proxy.sent if sent["type"] == "user_message"] == ["hi"]


def test_reconnect(chat: Terminal, endpoint: Endpoint, proxy: Proxy) -> None:
    """A lost connection is shown, and the whole reply follows."""
    endpoint.script(say("a reply that is cut in its middle", stall_after=7))
    chat.line("go on", "sam: \x1b[0ma ")
    proxy.cut()
    chat.expect("[connection lost]", "[connection restored]")
    endpoint.release()
    chat.expect("middle\r\n", "sam> ")
    chat.line("again", "you said again", "sam> ")


def test_others_at_the_prompt(chat: Terminal, proxy: Proxy, tmp_path: Path) -> None:
    """What others say to the agent appears, and the prompt comes again with the line being typed."""
    chat.type("half a li")
    chat.expect("half a li")
    assert run("chat", "--url", proxy.url, "--agent", "sam", cwd=tmp_path, text="from afar").returncode == 0
    chat.expect("someone: from afar", "sam> half a li\r\nsam: you said from afar", "sam> half a li")
    with memws.connect(proxy.url) as other:
        other.ask("by name", "sam", from_="Ada")
    chat.expect("Ada: by name", "sam> half a li")
    chat.line("ne", "you said half a line", "sam> ")


MONOLOGUE = {"of": "internal_monologue"}
THOUGHT = frame("internal_monologue", "hm")
said, delta = partial(frame, "assistant_message"), partial(frame, "delta", of="assistant_message")
VIEWS: list[tuple[list[dict[str, Any]], str]] = [
    ([delta("Hel"), delta("lo"), said("Hello")], "sam: Hello\n"),
    ([delta("Hel"), said("Hello")], "sam: Hel\nsam: Hello\n"),
    ([delta("HelloBye"), said("Hello"), said("Bye")], "sam: HelloBye\n"),
    ([delta("Hexx"), said("Hello")], "sam: Hexx\nsam: Hello\n"),
    ([delta("Hel"), frame("retry", "cut"), delta("Hello"), said("Hello")], "sam: Hel\n[retry: cut]\nsam: Hello\n"),
    ([frame("delta", "hm", **MONOLOGUE), delta("Hello"), THOUGHT, said("Hello")], "~ hm\nsam: Hello\n"),
    ([said("Hello"), frame("unheard_of", "?"), said("\x1b]0;x\x07\u202e")], "sam: Hello\nsam: \\x1b]0;x\\x07\\u202e\n"),
    ([frame("user_message", "hi"), frame("context", "full"), frame("queue", "second")], "[queue: second]\n"),
    ([frame("tool_return", "no such tool", name="x", status="Failed")], "< no such tool\n"),
    ([{"type": "agent_response_end", "stop_reason": "done"}], ""),
    ([{"type": "agent_response_end", "stop_reason": "max_steps"}], "[max_steps]\n"),
]


@pytest.mark.parametrize(("events", "shown"), VIEWS)
def test_view(events: list[dict[str, Any]], shown: str) -> None:
    """Text that was streamed is not shown again, and none is lost; a turn that ends early says why."""
    out = io.StringIO()
    screen = memws.Screen(out)
    for event in events:
        screen.show(event)
    screen.end_line()
    assert out.getvalue() == shown
