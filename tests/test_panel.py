"""The panel without a browser: ipywidgets work without a kernel, and so does all that the panel decides by itself."""

import asyncio
import html.parser
import json
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


def test_server_gone(serve: Serve, tmp_path: Path, open_panel: Callable[..., memws.Panel]) -> None:
    """The status tells within 2 s that the server is gone, both buttons stay, and it comes back by itself."""
    server = serve(db=str(tmp_path / "a.db"))
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url)
    assert "connected" in panel._status.value
    assert "offline" not in panel._status.value
    port = server.port
    server.stop()
    until(lambda: "offline" in panel._status.value, 2)
    assert "connected" not in panel._status.value
    until(lambda: panel._field.disabled, 2)
    again = serve(port=port, db=str(tmp_path / "a.db"))
    until(lambda: "connected" in panel._status.value, 12)
    until(lambda: not panel._field.disabled)
    assert "connection lost" in "".join(texts(panel, "note"))
    panel.send("Hi, my name is Ada")
    until(lambda: texts(panel, "agent"))
    assert again.port == port


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


def test_retry() -> None:
    """A retried text begins again; a second reply of a step is an item of its own."""
    transcript = memws.Transcript("sam")
    common = {"type": "agent_response", "turn_id": "t", "step": 1, "time": NOW}

    def take(kind: str, text: str, **more: Any) -> None:
        transcript.take({**common, "message_type": kind, "message": text, **more})

    take("delta", "Hel", of="assistant_message")
    take("retry", "the model failed; trying again", attempt=1)
    take("delta", "Hello! And", of="assistant_message")
    take("delta", " you?", of="assistant_message")
    take("assistant_message", "Hello!")
    take("assistant_message", " And you?")
    said = [(item.text, item.open, item.state) for item in transcript.items if item.kind == "agent"]
    assert said == [("Hello!", False, ""), (" And you?", False, "")]
