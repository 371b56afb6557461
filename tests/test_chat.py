"""Section 12, CLI: the terminal client on a real terminal, with the real server behind a proxy that can break."""

import contextlib
import io
import json
import re
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import command, environment, run
from endpoint import Body, Endpoint, Reply
from proxy import Proxy
from terminal import Terminal

import memws

CTRL_C, CTRL_D = "\x03", "\x04"


def say(text: str, **more: Any) -> Reply:
    return Reply(calls=[("send_message", {"message": text})], **more)


def echo(body: Body) -> Reply:
    """A model that says what the user said."""
    said = [json.loads(message["content"]) for message in body["messages"] if message["role"] == "user"]
    return say("you said " + [message["message"] for message in said if message["type"] == "user_message"][-1])


@pytest.fixture
def proxy(tmp_path: Path, endpoint: Endpoint) -> Iterator[Proxy]:
    """A breakable way to a server whose model says what the user said, unless the test scripts it."""
    endpoint.default = echo
    server = memws.WebSocketServer(
        port=0,
        db=str(tmp_path / "memws.db"),
        base_url=endpoint.url,
        model="test-model",
        api_key="k",
        context_window=30_000,
    )
    with Proxy(server.start().url) as proxy:
        yield proxy
    server.stop()


@pytest.fixture
def terminal(proxy: Proxy, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start chat on a terminal."""
    terminals: list[Terminal] = []

    def start(*flags: str, **variables: str) -> Terminal:
        words = command("chat", "--url", proxy.url, *flags)
        terminals.append(Terminal(words, cwd=tmp_path, variables=environment({"HOME": str(tmp_path), **variables})))
        return terminals[-1].__enter__()

    yield start
    for each in terminals:
        each.__exit__()


def with_sam(start: Callable[..., Terminal], **variables: str) -> Terminal:
    """A terminal that talks to a new agent sam."""
    terminal = start("--agent", "sam", **variables)
    terminal.expect("create it? [Y/n] ")
    terminal.line("y")
    terminal.expect("sam> ")
    return terminal


def frame(kind: str, text: str = "", **more: Any) -> dict[str, Any]:
    event = {"type": "agent_response", "message_type": kind, "message": text, "agent_name": "sam", "turn_id": "t"}
    return {**event, "step": 1, **more}


# ---- on a terminal ---------------------------------------------------------------------------------------------------


def test_conversation(terminal: Callable[..., Terminal], endpoint: Endpoint, tmp_path: Path) -> None:
    """Banner, an offer to create, the streamed reply, what lies behind it dimmed, memory as a diff, history kept."""
    remember = {"name": "human", "content": "Name: Ana\x1b[2J", "request_heartbeat": True}
    endpoint.script(Reply("I think\x1b[2J", calls=[("core_memory_append", remember)]), say("Hello, Ana"))
    chat = terminal()
    chat.expect(f"memws {memws.__version__} at ws://127.0.0.1:")
    chat.expect("model test-model; /help lists the commands")
    chat.expect("create 'sam'? [Y/n] ")
    chat.line()
    chat.expect("sam> ")
    chat.line("hi")
    chat.expect("\x1b[2m~ \x1b[0m\x1b[2mI think\\x1b")
    chat.expect("\x1b[2m> core_memory_append(")
    chat.expect("human, changed by the agent")
    chat.expect("\x1b[32m+ Name: Ana\\x1b[2J")
    chat.expect("\x1b[1msam: \x1b[0mHello, ")
    chat.expect("sam> ")
    chat.line("/quit")
    assert chat.wait() == 0
    assert "\x1b[2J" not in chat.seen
    history = tmp_path / ".memws_history"
    assert "hi\n" in history.read_text("utf-8")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_offline_is_said(tmp_path: Path) -> None:
    """The banner says that the offline model is no language model."""
    server = memws.WebSocketServer(port=0, db=":memory:").start()
    try:
        variables = environment({"HOME": str(tmp_path)})
        with Terminal(command("chat", "--url", server.url), cwd=tmp_path, variables=variables) as chat:
            chat.expect("the model is offline: a rule-based stand-in, not a language model")
            chat.expect("[Y/n] ")
            chat.line("n")
            chat.expect("> ")
            chat.line("hi")
            chat.expect("no agent yet: /new NAME creates one, /load NAME loads one")
            chat.expect("> ")  # a Ctrl-D before readline waits would be lost
            chat.type(CTRL_D)
            assert chat.wait() == 0
    finally:
        server.stop()


@pytest.mark.parametrize(("variables", "mark"), [({"NO_COLOR": "1"}, "\x1b[2m"), ({"TERM": "dumb"}, "\x1b[2")])
def test_no_colour(variables: dict[str, str], mark: str, terminal: Callable[..., Terminal]) -> None:
    """NO_COLOR takes the colours, and so does a dumb terminal."""
    chat = with_sam(terminal, **variables)
    chat.line("hi")
    chat.expect("sam: you said hi")
    chat.expect("sam> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0
    assert mark not in chat.seen


def test_slash_commands(terminal: Callable[..., Terminal], endpoint: Endpoint) -> None:
    """Each command of the help answers; what is no command gets a hint."""
    endpoint.script(say("noted"), Reply(status=401))
    chat = with_sam(terminal)
    for line, answer in [
        ("otters are fine", "noted"),
        ("hi", "error: "),
        ("/agents", "* sam  test-model, idle"),
        ("/memory", "human (0 of 2000 characters)"),
        ("/context", " of 30000 tokens"),
        ("/search otters", "otters are fine"),
        ("/search", "for what? /search WORDS"),
        ("/cancel", "[nothing runs]"),
        ("/serach x", "did you mean /search?"),
        ("/zzz", "/help lists the commands"),
        ("/help", "/quit"),
        ("/load nobody", "send create_agent first"),
        ("/load", "which one? /load NAME"),
        ("/new sam", "sam"),
        ("/new a/b", "name"),
        ("//x", "you said /x"),
        ("", "sam> "),
    ]:
        chat.line(line)
        chat.expect(answer)
        if line:
            chat.expect("sam> ")
    assert {words.split()[0] for words in memws.CHAT_HELP.splitlines() if words.startswith("/")} == set(
        memws.CHAT_COMMANDS
    )
    chat.line("/new bob")
    chat.expect("bob> ")
    chat.line("/load sam")
    chat.expect("sam> ")
    chat.type(CTRL_D)
    assert chat.wait() == 0


def test_interrupt_of_a_turn(terminal: Callable[..., Terminal], endpoint: Endpoint) -> None:
    """Ctrl-C cancels a running turn, and the conversation goes on."""
    endpoint.script(say("a long story", hold=True))
    chat = with_sam(terminal)
    chat.line("tell")
    endpoint.wait_requests(1)
    chat.type(CTRL_C)
    chat.expect("[cancelled]")
    chat.expect("sam> ")
    chat.line("hi")
    chat.expect("you said hi")


def test_second_interrupt_of_a_turn(terminal: Callable[..., Terminal], endpoint: Endpoint, proxy: Proxy) -> None:
    """Where cancelling does not help, a second Ctrl-C leaves."""
    endpoint.script(say("a long story", hold=True))
    proxy.on_sent = lambda sent: sent.get("command") != "cancel"  # it never arrives
    chat = with_sam(terminal)
    chat.line("tell")
    endpoint.wait_requests(1)
    chat.type(CTRL_C)
    proxy.wait(lambda: [sent for sent in proxy.sent if sent.get("command") == "cancel"])
    chat.type(CTRL_C)
    assert chat.wait() == 0


def interrupt(chat: Terminal, answer: str) -> None:
    """Press Ctrl-C until it is noticed: one that comes as readline begins to wait is seen with the next key only."""
    for _ in range(5):
        chat.type(CTRL_C)
        try:
            chat.expect(answer, timeout=3)
        except AssertionError:
            continue
        return
    chat.expect(answer)


def test_interrupts_at_the_prompt(terminal: Callable[..., Terminal], proxy: Proxy) -> None:
    """At the prompt Ctrl-C drops the line and says how to leave; a line in between starts over; a second one leaves."""
    chat = with_sam(terminal)
    chat.type("half a line")
    chat.expect("half a line")
    interrupt(chat, "[Ctrl-C again, or Ctrl-D, leaves]")
    chat.expect("sam> ")
    chat.line("hi")
    chat.expect("you said hi")
    chat.expect("sam> ")
    interrupt(chat, "[Ctrl-C again, or Ctrl-D, leaves]")
    chat.expect("sam> ")
    chat.type(CTRL_C)
    with contextlib.suppress(subprocess.TimeoutExpired):
        chat.wait(3)
    if chat.process.poll() is None:
        chat.type(CTRL_C)
    assert chat.wait() == 0
    assert [sent["message"] for sent in proxy.sent if sent["type"] == "user_message"] == ["hi"]


def test_clock_and_reconnect(terminal: Callable[..., Terminal], endpoint: Endpoint, proxy: Proxy) -> None:
    """A long wait shows a clock; a lost connection is told, and the reply goes on without a gap or a repetition."""
    endpoint.script(say("a reply that is cut in its middle", stall_after=7))
    chat = with_sam(terminal)
    chat.line("hi")
    chat.expect("sam: \x1b[0ma ")
    proxy.cut()
    chat.expect("connection lost; reconnecting …")
    chat.expect("reconnected")
    chat.expect("thinking … 2 s", "thinking … 3 s")
    endpoint.release()
    chat.expect("middle\r\n")
    chat.expect("sam> ")
    shown = re.sub(r"\x1b\[\d*[mKJ]|\[(connection lost|reconnected).*?\]|thinking … \d s|[\r\n]", "", chat.seen)
    assert "sam: a reply that is cut in its middlesam> " in shown
    chat.line("again")
    chat.expect("you said again")


def test_server_that_ends(tmp_path: Path, endpoint: Endpoint) -> None:
    """A server that stops and starts again is waited for, and the conversation goes on."""
    endpoint.default = echo
    options = {"db": str(tmp_path / "memws.db"), "base_url": endpoint.url, "api_key": "k", "context_window": 30_000}
    server = memws.WebSocketServer(port=0, model="test-model", **options).start()
    variables = environment({"HOME": str(tmp_path)})
    with Terminal(command("chat", "--url", server.url), cwd=tmp_path, variables=variables) as chat:
        chat.expect("[Y/n] ")
        chat.line("y")
        chat.expect("sam> ")
        server.stop()
        chat.expect("connection lost; reconnecting …")
        later = memws.WebSocketServer(port=server.port, model="test-model", **options).start()
        try:
            chat.expect("reconnected")
            chat.line("hi")
            chat.expect("you said hi")
        finally:
            later.stop()


def test_others_above_the_prompt(terminal: Callable[..., Terminal], proxy: Proxy, tmp_path: Path) -> None:
    """What others say to the agent appears above the prompt, and the line being typed stays."""
    chat = with_sam(terminal)
    chat.type("half a li")
    chat.expect("half a li")
    assert run("chat", "--url", proxy.url, "--agent", "sam", cwd=tmp_path, text="from afar").returncode == 0
    chat.expect("someone: from afar")
    chat.expect("you said from afar")
    chat.expect("sam> half a li")
    chat.line("ne")
    chat.expect("you said half a line")


def test_frames_it_does_not_know(terminal: Callable[..., Terminal], proxy: Proxy) -> None:
    """Frames of a later server, and broken ones, are passed over."""
    odd: list[str | bytes] = ["no json", "[1]", b"\x00", '{"type":"from_the_future"}']
    odd.append(json.dumps(frame("from_the_future", "?", seq=99, turn_id="?")))
    odd.append(json.dumps(frame("memory_change", None, before=5, after=[], label={})))  # type: ignore[arg-type]
    chat = with_sam(terminal)
    proxy.inject(*odd)
    chat.line("hi")
    chat.expect("you said hi")
    chat.expect("sam> ")
    assert "Traceback" not in chat.seen


def test_a_refused_token(proxy: Proxy, terminal: Callable[..., Terminal]) -> None:
    """A server that asks for a token is one sentence and exit status 2."""
    proxy.refuses = 401
    chat = terminal()
    chat.expect("the server asks for its token; give it as token, --token or MEMWS_TOKEN\r\n")
    assert chat.wait() == 2


# ---- what is shown of events -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "shown"),
    [
        ([("delta", "Hel"), ("delta", "lo"), ("assistant_message", "Hello")], "sam: Hello\n"),
        ([("delta", "Hel"), ("assistant_message", "Hello")], "sam: Hello\n"),
        ([("delta", "HelloBye"), ("assistant_message", "Hello"), ("assistant_message", "Bye")], "sam: HelloBye\n"),
        ([("delta", "Hexx"), ("assistant_message", "Hello")], "sam: Hexx\nsam: Hello\n"),
        (
            [("delta", "Hel"), ("retry", "cut"), ("delta", "Hello"), ("assistant_message", "Hello")],
            "sam: Hel\n[retry: cut]\nsam: Hello\n",
        ),
        (
            [("assistant_message", "Hello"), ("unheard_of", "?"), ("assistant_message", "\x1b]0;x\x07\u202e")],
            "sam: Hello\nsam: \\x1b]0;x\\x07\\u202e\n",
        ),
        ([("user_message", "hi"), ("context", "full"), ("queue", "second")], "[queue: second]\n"),
    ],
)
def test_view(events: list[tuple[str, str]], shown: str) -> None:
    """Text that was streamed is not shown again, and none is lost."""
    out = io.StringIO()
    view = memws.TurnView(memws.Screen(out))
    for kind, text in events:
        view.show(frame(kind, text, **({"of": "assistant_message"} if kind == "delta" else {})))
    assert out.getvalue() == shown


@pytest.mark.parametrize("reason", ["cancelled", "superseded", "interrupted", "max_steps", "budget", "repeated_call"])
def test_view_of_an_early_end(reason: str) -> None:
    """A turn that did not end well says why; one that did says nothing."""
    out = io.StringIO()
    view = memws.TurnView(memws.Screen(out))
    view.show({"type": "agent_response_end", "stop_reason": "done"})
    assert out.getvalue() == ""
    view.show({"type": "agent_response_end", "stop_reason": reason})
    assert out.getvalue() == f"[{reason}]\n"


def test_view_of_parts_and_kinds() -> None:
    """Deltas of both kinds come before their stored events; a long text in parts is one line."""
    out = io.StringIO()
    view = memws.TurnView(memws.Screen(out))
    view.show(frame("delta", "hm", of="internal_monologue"))
    view.show(frame("delta", "Hell", of="assistant_message"))
    view.show(frame("internal_monologue", "hm"))
    view.show(frame("assistant_message", "Hel", part=1, parts=2))
    view.show(frame("assistant_message", "lo", part=2, parts=2))
    assert out.getvalue() == "~ hm\nsam: Hello\n"
