"""The panel without a browser: ipywidgets work without a kernel, and so does all that the panel decides by itself."""

import asyncio
import html.parser
import importlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipywidgets")
pytest.importorskip("hypothesis")

import ipywidgets
from endpoint import Endpoint, Reply
from hypothesis import given, settings
from hypothesis import strategies as st
from paced import Paced

import memws

Serve = Callable[..., memws.WebSocketServer]
HOSTILE = '</div><img src=x onerror="window.X=1"><script>window.X=2</script>&amp;'
NOW = "2026-01-02T03:04:05.678Z"


@pytest.fixture
def open_panel() -> Iterator[Callable[..., memws.Panel]]:
    """Panels that are ready and are closed after the test, with all their widgets and threads."""
    opened: list[memws.Panel] = []
    before = set(ipywidgets.widgets.widget._instances)

    def start(url: str, *arguments: Any, **options: Any) -> memws.Panel:
        opened.append(memws.Panel(url, *arguments, **options))
        assert opened[-1]._ready.wait(5)
        return opened[-1]

    yield start
    for panel in opened:
        panel.close()
    assert set(ipywidgets.widgets.widget._instances) <= before
    assert [thread for thread in threading.enumerate() if thread.name.startswith("memws-panel")] == []


@pytest.fixture
def talk(serve: Serve, open_panel: Callable[..., memws.Panel]) -> tuple[memws.WebSocketServer, memws.Panel]:
    """A server with the agent sam and a panel of it."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    return server, open_panel(server.url)


def until(check: Callable[[], Any], seconds: float = 5) -> None:
    """Wait for what the panel's thread does."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


def texts(panel: memws.Panel, *kinds: str) -> list[str]:
    """What the transcript's items of these kinds say."""
    return [item.text or item.head for item in panel.transcript.items if item.kind in kinds]


def shown(widget: Any) -> str:
    """All HTML of a widget and those below it."""
    own = widget.value if isinstance(widget, ipywidgets.HTML) else ""
    outputs = "".join(each["data"]["text/plain"] for each in getattr(widget, "outputs", ()))
    return own + outputs + "".join(map(shown, getattr(widget, "children", ())))


def submit(field: Any) -> None:
    """Press Enter in a field."""
    field._handle_custom_msg({"event": "submit"}, [])


# ---- talking ---------------------------------------------------------------------------------------------------------


def test_conversation(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """A message is sent, its turn is shown with monologue, tool call and memory change, and the field is empty."""
    _, panel = talk
    panel._field.value = "Hi, my name is Ada and I like tea"
    panel._send.click()
    until(lambda: texts(panel, "agent"))
    assert texts(panel, "user") == ["Hi, my name is Ada and I like tea"]
    assert panel._field.value == ""
    assert {"monologue", "tool", "change"} <= {item.kind for item in panel.transcript.items}
    until(lambda: panel._stop.disabled)
    until(lambda: texts(panel, "agent")[0] in shown(panel._log.box).replace("&quot;", '"'))
    assert "core memory" in panel._bar.value
    until(lambda: "Ada" in shown(panel._tabs["Memory"].box))


def test_callbacks_on_any_thread(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """Handlers work on a bare thread and on one with another running loop."""
    _, panel = talk

    def say(text: str) -> None:
        panel._field.value = text
        panel._send.click()

    async def say_in_loop() -> None:
        say("I like coffee")

    for run in (lambda: say("I like tea"), lambda: asyncio.run(say_in_loop())):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        time.sleep(0.3)
    until(lambda: texts(panel, "user") == ["I like tea", "I like coffee"])


Step = tuple[str, str] | float
SENDING: dict[str, tuple[list[Step], list[str]]] = {
    "text, then click": ([("text", "a b"), ("click", "")], ["a b"]),
    "click overtakes text": ([("click", ""), ("text", "a b")], ["a b"]),
    "Enter overtakes the end of a text": ([("text", "sec"), ("enter", ""), ("text", "second <b>")], ["second <b>"]),
    "Enter overtakes all of it": ([("enter", ""), ("text", "s"), ("text", "second")], ["second"]),
    "Enter twice": ([("text", "once"), ("enter", ""), ("enter", "")], ["once"]),
    "Enter twice, slowly": ([("text", "once"), ("enter", ""), 0.35, ("enter", "")], ["once"]),
    "no Enter": ([("text", "half a thou"), 0.4], []),
    "Enter after a while": ([("text", "a"), 0.4, ("text", "a b"), 0.4, ("enter", "")], ["a b"]),
    "two at once": ([("text", "one"), ("click", ""), ("text", "two"), ("click", "")], ["one", "two"]),
    "the second's click first": ([("text", "one"), ("click", ""), ("click", ""), ("text", "two")], ["one", "two"]),
    "the same again": ([("text", "yes"), ("click", ""), 0.35, ("text", "yes"), ("click", "")], ["yes", "yes"]),
    "nothing": ([("text", "  "), ("click", ""), 0.3, ("click", "")], []),
    "lines": ([("text", " a\n b "), ("click", "")], ["a\n b"]),
}


@pytest.mark.parametrize("case", SENDING)
def test_sending(case: str) -> None:
    """Each text is sent once and whole, in whatever order text and Enter reach the kernel; otherwise nothing is."""
    steps, expected = SENDING[case]
    field, button = ipywidgets.Text(), ipywidgets.Button()
    sent: list[str] = []

    class Around:
        """The part of a panel that an Entry needs."""

        loop = asyncio.new_event_loop()

        def from_user(self, handler: Callable[..., Any], *arguments: Any) -> None:
            handler(*arguments)

    def arrive(text: str) -> None:
        entry._arrived(text)

    around = Around()
    entry = memws.Entry(around, [field], button, sent.append)  # type: ignore[arg-type]

    async def play() -> None:
        for step in steps:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif step[0] == "text":
                arrive(step[1])
            else:
                entry._asked(step[0] == "enter")
            await asyncio.sleep(0)
        await asyncio.sleep(0.6)

    around.loop.run_until_complete(play())
    around.loop.close()
    for widget in (field, button):
        memws.close_widget(widget)
    assert sent == expected


def test_many_messages(open_panel: Callable[..., memws.Panel]) -> None:
    """40 messages in quick succession arrive in order, once each."""
    with Paced() as server:
        panel = open_panel(server.url)
        sent = [f"message {number}" for number in range(40)]
        for text in sent:
            panel._field.value = text
            panel._send.click()
            time.sleep(0.02)
        until(lambda: len(server.said) == 40)
        assert server.said == sent


def test_refused_message(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A message that never becomes a turn stays in the transcript, marked, with the reason."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url)
    panel.send("a" * 70_000)
    until(lambda: texts(panel, "note"))
    (item,) = (item for item in panel.transcript.items if item.kind == "user")
    assert item.state == "not sent"
    assert "65,536" in texts(panel, "note")[0]


def test_stop(serve: Serve, open_panel: Callable[..., memws.Panel], endpoint: Endpoint) -> None:
    """Stop is enabled while a turn runs and ends it; a message sent meanwhile says that it waits."""
    server = serve(model="m", base_url=endpoint.url)
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url)
    assert panel._stop.disabled
    endpoint.script(Reply(calls=[("send_message", {"message": "never comes to its end"})], stall_after=6))
    panel.send("Tell me")
    until(lambda: "never" in "".join(texts(panel, "agent")))
    until(lambda: "answering" in panel._status.value)
    panel.send("And me")
    until(lambda: any("waits" in item.state for item in panel.transcript.items))
    before = time.monotonic()
    panel._stop.click()
    until(lambda: "stopped" in texts(panel, "note"))
    assert time.monotonic() - before < 0.5
    until(lambda: "Hello" in "".join(texts(panel, "agent")))
    assert texts(panel, "user") == ["Tell me", "And me"]
    until(lambda: panel._stop.disabled)


# ---- showing ---------------------------------------------------------------------------------------------------------


class Counted(ipywidgets.HTML):  # type: ignore[misc]
    """An HTML widget that counts what it would send to a browser."""

    pushes: list[tuple[float, int]] = []  # noqa: RUF012 (all of them together)

    def send_state(self, key: Any = None) -> None:
        if key is not None:
            Counted.pushes.append((time.monotonic(), len(self.value.encode())))
        super().send_state(key)


def test_rate(open_panel: Callable[..., memws.Panel]) -> None:
    """200 tokens a second after 200 old items: at most 25 pushes a second and 3 MB, and no token is lost."""
    Counted.pushes.clear()
    widgets = type("Widgets", (), {**vars(ipywidgets), "HTML": Counted})
    text = "".join(f"w{number:03} " for number in range(600))
    with Paced() as server:
        server.remember(100)
        panel = open_panel(server.url, widgets=widgets)
        Counted.pushes.clear()
        began = time.monotonic()
        server.play(text, rate=200, size=5)
        until(lambda: not panel.transcript.running, 2)
        until(lambda: text.strip() in shown(panel._log.box), 0.3)
    took = time.monotonic() - began
    assert len(Counted.pushes) / took <= 25
    assert sum(size for _, size in Counted.pushes) < 3_000_000 * 600 / 1500


def test_long_transcript(open_panel: Callable[..., memws.Panel]) -> None:
    """At most 200 items have widgets; older ones are folded into one, and none is lost."""
    with Paced() as server:
        panel = open_panel(server.url)
        for number in range(170):
            panel.send(f"message {number}")
        until(lambda: len(server.said) == 170, 15)
        until(lambda: len(texts(panel, "agent")) == 170, 15)
        until(lambda: not panel.transcript.changed and panel._flush_timer is None)
        assert len(panel._log._views) <= memws.LIVE_ITEMS
        everything = shown(panel._log.box)
        assert [number for number in range(170) if f"message {number}<" not in everything] == []
        assert "earlier items" in everything


def test_long_reply(open_panel: Callable[..., memws.Panel]) -> None:
    """A reply of 100 kB is shown in pieces, of which only the last is sent again while it grows."""
    text = "\n".join(f"line {number} of a very long reply" for number in range(3_000))
    with Paced() as server:
        panel = open_panel(server.url)
        server.play(text, rate=400, size=1_000)
        until(lambda: not panel.transcript.running)
        until(lambda: "line 2999" in shown(panel._log.box))
        pieces = next(view for item, view in panel._log._views.items() if item.kind == "agent").children
        assert len(pieces) > 10
        assert max(len(piece.value) for piece in pieces) < memws.PIECE * 1.2
        assert texts(panel, "agent") == [text]


@given(st.text(max_size=30_000), st.text(max_size=9_000))
@settings(max_examples=60, deadline=None)
def test_cuts(text: str, more: str) -> None:
    """The pieces of a text are the text, each within bounds; more text moves no cut."""
    pieces = memws.cut_text(text)
    assert "".join(pieces) == text
    assert all(len(piece) <= memws.PIECE for piece in pieces)
    assert memws.cut_text(text + more)[: len(pieces) - 1] == pieces[:-1]


def test_history(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A panel shows what was said before it, and what other clients say now."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    server.run_step("Hi, my name is Ada")
    panel = open_panel(server.url)
    assert texts(panel, "user") == ["Hi, my name is Ada"]
    assert "my name is Ada" in panel.static_html()
    server.run_step("I like tea")
    until(lambda: texts(panel, "user")[1:] == ["I like tea"])


def test_agents(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """Without an agent the form is open; what is created can be talked to; a rename and a delete are followed."""
    server = serve()
    panel = open_panel(server.url)
    until(lambda: panel._form.box.layout.display is None)
    assert panel._send.disabled
    assert panel._field.disabled
    panel._form._window.value = "many"
    panel._form._create.click()
    until(lambda: "expected a number" in panel._form._said.value)
    panel._form._window.value = "8,192"
    panel._form._name.value = "no such name!"
    panel._form._create.click()
    until(lambda: "no such name" in panel._form._said.value)
    panel._form._name.value = "sam"
    panel._form._human.value = "Name: Ada"
    panel._form._create.click()
    until(lambda: panel.agent_name == "sam" and not panel._send.disabled)
    assert "8,192" in panel._bar.value
    server.create_new_agent({"name": "bob"})
    panel._reload.click()
    until(lambda: panel._agents.options == ("bob", "sam"))
    panel._agents.value = "bob"
    until(lambda: panel.agent_name == "bob" and not panel._send.disabled)
    with memws.connect(server.url) as client:
        client.command("rename_agent", agent_name="bob", new_name="eve")
        until(lambda: panel.agent_name == "eve")
        client.command("delete_agent", agent_name="eve")
    until(lambda: panel.agent_name is None)
    assert panel._send.disabled
    until(lambda: panel._agents.options == ("sam",))


def test_unknown_agent(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """An agent that does not exist yet is offered to be created."""
    server = serve()
    panel = open_panel(server.url, "carol")
    assert panel.agent_name is None
    assert panel._form._name.value == "carol"


def test_server_gone(serve: Serve, tmp_path: Path, open_panel: Callable[..., memws.Panel]) -> None:
    """The status tells within 2 s that the server is gone, both buttons stay, and it comes back by itself."""
    server = serve(db=str(tmp_path / "a.db"))
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url)
    assert "connected" in panel._status.value
    assert "offline" not in panel._status.value
    server.stop()
    until(lambda: "offline" in panel._status.value, 2)
    assert "connected" not in panel._status.value
    until(lambda: panel._field.disabled, 2)
    again = serve(port=server.port, db=str(tmp_path / "a.db"))
    until(lambda: "connected" in panel._status.value, 12)
    until(lambda: not panel._field.disabled)
    assert "connection lost" in "".join(texts(panel, "note"))
    panel.send("Hi, my name is Ada")
    until(lambda: texts(panel, "agent"))
    assert again.port == server.port


def test_server_not_there_yet(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A panel that comes before its server says what to do, and finds it later."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    url, port = server.url, server.port
    server.stop()
    panel = open_panel(url)
    until(lambda: "offline" in panel._status.value)
    assert "python memws.py" in panel._status.value
    serve(port=port)
    until(lambda: "connected" in panel._status.value, 12)


def test_wrong_token(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A server that refuses is told so once; the token is in no widget."""
    server = serve(token="the-right-one")
    panel = open_panel(server.url, token="marker-of-a-secret")
    until(lambda: "asks for its token" in panel._status.value)
    right = server.panel()
    until(lambda: "connected" in right._status.value)
    try:
        for widget in ipywidgets.widgets.widget._instances.values():
            state = json.dumps(widget.get_state(), default=repr)
            assert "marker-of-a-secret" not in state
            assert "the-right-one" not in state
        assert "the-right-one" not in right.static_html()
        assert not any("the-right-one" in frame for _, _, frame in right._tabs["Frames"]._frames)
    finally:
        right.close()


def test_only_listed_commands(open_panel: Callable[..., memws.Panel]) -> None:
    """A tab whose command hello does not list stays away."""
    with Paced(commands=["get_agent", "subscribe"]) as server:
        panel = open_panel(server.url)
        assert list(panel._tabs) == ["Memory", "Frames"]
        assert panel._tabs["Memory"]._editors["human"]._edit.layout.display == "none"
        panel.send("hello")
        until(lambda: texts(panel, "agent") == ["noted"])


def widgets_of(widget: Any, kind: type) -> list[Any]:
    """The widgets of a kind, in order."""
    own = [widget] if isinstance(widget, kind) else []
    return own + [each for child in getattr(widget, "children", ()) for each in widgets_of(child, kind)]


def test_compact(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A compact panel is the conversation alone."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url, compact=True)
    assert widgets_of(panel.ui, ipywidgets.Tab) == []
    panel.send("Hi, my name is Ada")
    until(lambda: texts(panel, "agent"))


# ---- tabs ------------------------------------------------------------------------------------------------------------


def test_memory_edit(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """An edit is saved with the version it was based on; of a conflict both texts are shown, and neither is lost."""
    server, panel = talk
    tab = panel._tabs["Memory"]
    editor = tab._editors["human"]
    editor._edit.click()
    until(lambda: editor._editing.layout.display is None)
    editor._field.value = "Name: Ada"
    editor._save.click()
    until(lambda: editor._editing.layout.display == "none")
    until(lambda: editor.block["value"] == "Name: Ada")
    until(lambda: "changed by the client" in "".join(item.head for item in panel.transcript.items))
    editor._edit.click()
    until(lambda: editor._editing.layout.display is None)
    editor._field.value = "Name: Ada Lovelace"
    with memws.connect(server.url) as client:
        client.command("set_block", agent_name="sam", label="human", value="Name: <b>Bob</b>")
    until(lambda: "Conflict" in editor._said.value)
    assert "&lt;b&gt;Bob" in editor._view.value
    assert editor._field.value == "Name: Ada Lovelace"
    editor._field.value = "a" * 2_001
    editor._save.click()
    until(lambda: "limited to 2,000" in editor._said.value)
    editor._undo.click()
    until(lambda: editor._editing.layout.display == "none")


def test_conflict_on_save(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """A conflict that the server tells of is shown like one seen before, and saving again replaces."""
    server, panel = talk
    editor = panel._tabs["Memory"]._editors["human"]
    editor._edit.click()
    until(lambda: editor._editing.layout.display is None)
    editor._field.value = "mine"
    editor._save.click()  # the save waits for the text: the other change is faster
    with memws.connect(server.url) as client:
        client.command("set_block", agent_name="sam", label="human", value="theirs")
    until(lambda: "Conflict" in editor._said.value)
    editor._save.click()
    until(lambda: editor._editing.layout.display == "none")
    with memws.connect(server.url) as client:
        assert client.command("get_agent", agent_name="sam")["blocks"][1]["value"] == "mine"


def test_context(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """The tab shows the present context, and of a step exactly what the model got and answered."""
    _, panel = talk
    panel.send("Hi, my name is Ada and I like tea")
    until(lambda: texts(panel, "agent") and panel._stop.disabled)
    tab = panel._tabs["Context"]
    panel._tab.selected_index = list(panel._tabs).index("Context")
    until(lambda: "of 32,768 tokens" in tab._out.value)
    assert len(tab._pick.options) == 3
    tab._pick.value = tab._pick.options[-1][1]
    until(lambda: "first token after" in tab._out.value)
    for part in ("You are a conversational agent", "my name is Ada", "settings and tools", "core_memory_append"):
        assert part in tab._out.value


def test_search(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """Results come with date, store and score, page by page."""
    server, panel = talk
    for number in range(12):
        server.run_step(f"tea number {number}")
    tab = panel._tabs["Search"]
    tab._store.value = "recall"
    tab._field.value = "tea"
    submit(tab._field)
    until(lambda: "page 1 of" in tab._told.value)
    assert tab._back.disabled
    first = tab._out.value
    assert "recall" in first
    tab._next.click()
    until(lambda: "page 2 of" in tab._told.value)
    assert tab._out.value != first
    tab._field.value = "no such words at all, xyzzy"
    submit(tab._field)
    until(lambda: "page 1 of" in tab._told.value)


def test_frames(
    talk: tuple[memws.WebSocketServer, memws.Panel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The raw frames of both directions are shown while looked at, can be paused, and are saved as JSON lines."""
    _, panel = talk
    tab = panel._tabs["Frames"]
    monkeypatch.chdir(tmp_path)
    panel.send("Hi, my name is Ada")
    until(lambda: texts(panel, "agent") and panel._stop.disabled)
    assert tab._out.value == ""
    panel._tab.selected_index = list(panel._tabs).index("Frames")
    until(lambda: "agent_response_end" in tab._out.value)
    tab._pause.value = True
    until(lambda: "<details" in tab._out.value)
    count = len(tab._frames)
    panel.send("I like tea")
    until(lambda: len(texts(panel, "agent")) == 2)
    assert len(tab._frames) == count
    tab._save.click()
    until(lambda: "saved as" in tab._told.value)
    (path,) = tmp_path.glob("memws-frames-*.jsonl")
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert {line["direction"] for line in lines} == {"sent", "received"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_toggles(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """Monologue and tool calls can be hidden; several lines can be written in a larger field."""
    _, panel = talk
    monologue, tools, lines = widgets_of(panel.ui, ipywidgets.Checkbox)
    monologue.value = tools.value = False
    until(lambda: {"memws-hide-monologue", "memws-hide-tool"} <= set(panel._log.box._dom_classes))
    monologue.value = True
    until(lambda: "memws-hide-monologue" not in panel._log.box._dom_classes)
    lines.value = True
    until(lambda: panel._area in panel._row.children)
    panel._area.value = "one\ntwo"
    panel._send.click()
    until(lambda: texts(panel, "user") == ["one\ntwo"])


# ---- lifecycle -------------------------------------------------------------------------------------------------------


def test_same_name_replaces(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A panel of the same name replaces the former one, of another name it does not."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    first = open_panel(server.url)
    other = open_panel(server.url, name="other")
    second = open_panel(server.url)
    assert not first._thread.is_alive()
    assert other._thread.is_alive()
    assert second._thread.is_alive()
    until(lambda: len(server.interface.clients) == 2)
    first.close()
    assert memws.live_panels()["memws", "main"] is second


def test_names() -> None:
    """The classes and words that tests and themes rely on are there."""
    for word in ("memws-panel", "memws-static", "memws-log", "column-reverse"):
        assert word in memws.PANEL_STYLE
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ipywidgets", None)
        with pytest.raises(memws.UsageError, match="pip install ipywidgets"):
            memws.Panel()


def test_static_copy(talk: tuple[memws.WebSocketServer, memws.Panel]) -> None:
    """The copy is bounded, has a class of its own that the live panel hides, and never the live panel's."""
    _, panel = talk
    for number in range(60):
        panel.transcript.add("user", "you", f"{number:05}" * 2_000)
    copy = panel.static_html()
    assert len(copy) < memws.FOLDED_SIZE * 1.2
    assert f'class="memws-static {panel._mark}"' in copy
    assert f".{panel._mark} {{ display: none; }}" in shown(panel.ui)
    assert 'class="memws-panel"' not in copy


# ---- what others say is text -----------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Collects elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attributes)}


OURS = {"div", "details", "summary", "b", "span", "i", "ins", "del", "p", "style", "class", "open"}


def events(text: str) -> list[memws.Frame]:
    """Events of every kind that say a text wherever they can."""
    common = {"turn_id": text, "step": 1, "time": NOW, "message": text}
    call = {"tool_call_id": text, "name": text}
    fields: dict[str, memws.Frame] = {
        "user_message": {}, "delta": {"of": "internal_monologue"}, "internal_monologue": {},
        "assistant_message": {}, "tool_call": {**call, "arguments": {text: text}},
        "memory_change": {"what": "core", "label": text, "diff": f"-{text}\n+{text}", "by": text},
        "tool_return": {**call, "status": text, "duration_ms": 1},
        "context": {"sections": [{"name": text, "tokens": 1}], "used": 1, "window": 2, "warning": text},
        "compaction": {"tokens_before": 2, "tokens_after": 1, "summary": text}, "heartbeat": {"reason": text},
        "retry": {}, "correction": {"what": text}, "queue": {"position": 1}, "agent_change": {"change": "updated"},
        "something_new": {},
    }  # fmt: skip
    turn = [{"type": "agent_response", "message_type": kind, **common, **more} for kind, more in fields.items()]
    end = {"type": "agent_response_error", **common, "code": text, "stop_reason": "error"}
    return [{"type": "agent_response_start", **common}, *turn, end]


@given(st.one_of(st.just(HOSTILE), st.text(max_size=200)))
@settings(max_examples=100, deadline=None)
def test_texts_are_escaped(text: str) -> None:
    """Whatever events say, the HTML has no elements and attributes but ours."""
    transcript = memws.Transcript(text)
    for event in events(text):
        transcript.take(event)
        found = Tags("".join(piece for item in transcript.items for piece in item.pieces()))
        assert found.found <= OURS
    assert Tags(memws.bar_html([{"name": text, "tokens": 1}], 1, 2, text)).found <= OURS
    assert Tags(memws.diff_html(text)).found <= OURS


MARKDOWN = {
    "plain text": None,
    "**bold** and <b>": "**bold** and &lt;b>",
    "- it costs $5 and $6": "- it costs &#36;5 and &#36;6",
    "# a formula $$x$$": "# a formula $$x$$",
    "a `List<int>` here": "a `List<int>` here",
    "![x](http://192.0.2.1/a.png) *a*": "!&#91;x](http://192.0.2.1/a.png) *a*",
    "*a* <img src=//192.0.2.1>": "*a* &lt;img src=//192.0.2.1>",
    "```\n<a href=x>\n```": None,
    r"*a* \`<img src=//192.0.2.1>\`": None,
    "~~~\n```\n~~~\n<img src=//192.0.2.1>\n```\n": None,
    "`![x](y)`": None,
}


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown(text: str) -> None:
    """Markdown of a model has no HTML and no images; where that cannot be had, the text stays plain."""
    assert memws.safe_markdown(text) == MARKDOWN[text]


def test_retry_and_parts() -> None:
    """A retried text begins again; a text in parts is one item; a second reply of a step is an item of its own."""
    transcript = memws.Transcript("sam")
    common = {"type": "agent_response", "turn_id": "t", "step": 1, "time": NOW}
    counter = itertools.count()

    def take(kind: str, text: str, **more: Any) -> None:
        transcript.take({**common, "message_type": kind, "message": text, "seq": next(counter), **more})

    take("delta", "Hel", of="assistant_message")
    take("retry", "the model failed; trying again", attempt=1)
    take("delta", "Hello! And", of="assistant_message")
    take("delta", " you?", of="assistant_message")
    take("assistant_message", "Hello!")
    take("assistant_message", " And", part=1, parts=2)
    take("assistant_message", " you?", part=2, parts=2)
    said = [(item.text, item.open, item.state) for item in transcript.items if item.kind == "agent"]
    assert said == [("Hello!", False, ""), (" And you?", False, "")]


def test_reload(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """After a reload of the module a new panel still replaces the old one."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    first = open_panel(server.url)
    names = dict(vars(memws))
    try:
        again = importlib.reload(memws)
        second = again.Panel(server.url)
        assert not first._thread.is_alive()
        second.close()
    finally:
        vars(memws).update(names)
