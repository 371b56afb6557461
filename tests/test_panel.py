"""The panel without a browser: its page as the server gives it, its script, and the widget without a kernel."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("anywidget")

import ipywidgets
from endpoint import Endpoint, Reply, say

import memws

Log = pytest.LogCaptureFixture
Serve = Callable[..., memws.WebSocketServer]
JSON = dict[str, Any]
HOSTILE = '</div><img src=x onerror="window.X=1"><script>window.X=2</script>&amp;'
TOKEN = "Secret-token_1~"


@pytest.fixture
def open_panel() -> Iterator[Callable[..., memws.Panel]]:
    """Panels that are closed after the test, with all their widgets and threads."""
    panels: list[memws.Panel] = []
    before = set(ipywidgets.widgets.widget._instances)

    def start(url: str, *arguments: Any, **options: Any) -> memws.Panel:
        panels.append(memws.Panel(url, *arguments, **options))
        return panels[-1]

    yield start
    for panel in panels:
        panel.close()
    assert set(ipywidgets.widgets.widget._instances) <= before
    assert [thread for thread in threading.enumerate() if thread.name.startswith("memws-panel")] == []


def test_script(tmp_path: Path) -> None:
    """The script is JavaScript that makes no HTML and no code of texts; script and style fit their page."""
    script, style = memws.PANEL_SCRIPT, memws.PANEL_STYLE
    forbidden = (
        r"""(inner|outer)HTML|insertAdjacentHTML|document\.write|srcdoc|\beval\b|\bFunction\(|import\(|fetch\("http"""
    )
    assert re.search(forbidden, script) is None
    assert "</" not in script + style
    assert "http" not in style
    assert max(map(len, (script + style).splitlines())) <= 120
    assert len(memws.page("localhost")[0].encode()) <= 90_000
    assert script.count("\n") <= 930
    assert style.count("\n") <= 160
    playwright = pytest.importorskip("playwright")
    node = Path(playwright.__file__).parent / "driver" / "node"
    (tmp_path / "panel.mjs").write_text(script, "utf-8")
    subprocess.run([node, "--check", tmp_path / "panel.mjs"], check=True, timeout=60)


def test_page_address() -> None:
    """The page is where the WebSocket is, for a browser of this machine."""
    for url, address in {
        "ws://127.0.0.1:8282": "http://127.0.0.1:8282/",
        "ws://0.0.0.0:1": "http://127.0.0.1:1/",
        "ws://[::]:1": "http://127.0.0.1:1/",
        "wss://example.org/memws": "https://example.org/memws/",
    }.items():
        assert memws.page_address(url) == address


def test_said_from_python(serve: Serve, open_panel: Callable[..., memws.Panel], caplog: Log) -> None:
    """`send` and `wait` talk to the agent in order; the static copy shows all of it as text; what fails is raised."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url)
    for text in (f"My name is Ada and I like {HOSTILE}", "What do I like?", "three"):
        panel.send(text)
    panel.wait()
    copy = panel.static_html()
    places = [copy.index(text) for text in ("My name is Ada", "What do I like?", "You told me", "three")]
    assert places == sorted(places)
    assert "core_memory_append" in copy
    assert "<img" not in copy
    assert "memws-panel" not in copy
    unknown = open_panel(server.url, "nobody")
    unknown.send("hello")
    with pytest.raises(memws.MemwsError, match="nobody"):
        unknown.wait()
    assert "nobody" in unknown.static_html()
    assert "panel nobody: a message was not answered: unknown agent" in caplog.text


def test_copy_of_the_last_agent(online: Serve, endpoint: Endpoint, open_panel: Callable[..., memws.Panel]) -> None:
    """The copy is of the agent that was active last, and has all that was said, in plain text or several calls."""
    server = online()
    for number in range(101):
        server.create_new_agent({"name": f"sam{number:03}"})
    endpoint.script(Reply("plain", reasoning="why"), Reply("bare"), say("one", "two"))
    for text in ("hi", "go on", "hello"):
        server.run_step(text)
    copy = open_panel(server.url).static_html()
    said = re.findall(r"memws · sam\d+|(?<=</b> )[^<]*", copy)
    assert said == ["memws · sam100", "hi", "plain", "go on", "bare", "hello", "one\ntwo"]
    assert copy.count("<details>") == 1
    assert "why" in copy
    with memws.connect(server.url) as client:
        texts = [each["text"] for each in client.command("get_messages", agent_name="sam100")["messages"]]
    assert "bare" in texts


def test_token(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A token is in no state of a widget and in no copy; a server that refuses is told so."""
    server = serve(token=TOKEN)
    server.create_new_agent({"name": "sam"})
    right = open_panel(server.url, "sam", token=TOKEN)
    wrong = open_panel(server.url, token="wrong-marker", name="wrong")
    right.send("I like tea")
    right.wait()
    states = json.dumps([each.get_state() for each in (right.ui, wrong.ui)], default=repr)
    assert not any(secret in states + right.static_html() for secret in (TOKEN, "wrong-marker"))
    assert "a token is needed" in wrong.static_html()


def test_one_of_a_name(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A panel takes the place of an earlier one of its name, as in a cell that runs again."""
    server = serve()
    first, other = open_panel(server.url, "sam"), open_panel(server.url, "ada")
    second = server.panel("sam")
    alive = [panel._thread.thread.is_alive() for panel in (first, second, other)]
    second.close()
    assert alive == [False, True, True]


class View:
    """What a browser's half of a widget sends and gets, without a browser."""

    def __init__(self, panel: memws.Panel) -> None:
        self.panel, self.got = panel, list[JSON]()
        self._news = threading.Condition()
        panel.ui.send = self._take

    def _take(self, content: JSON) -> None:
        with self._news:
            self.got.append(content)
            self._news.notify_all()

    def send(self, **content: Any) -> None:
        self.panel.ui._handle_custom_msg({"session": "view", "first": 1, "frames": [], **content}, [])

    def until(self, check: Callable[[], Any]) -> None:
        with self._news:
            assert self._news.wait_for(check, 10)

    @property
    def last(self) -> JSON:
        return self.got[-1] if self.got else {"state": "", "ack": 0}

    def frames(self) -> list[JSON]:
        return [json.loads(frame) for content in self.got for frame in content.get("frames", ())]


def test_pipe(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """What a comm loses, doubles or mixes up reaches the server once and in order; a lost server comes back."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    view = View(open_panel(server.url, "sam"))
    view.send()
    view.until(lambda: view.last["state"] == "connected")
    commands = [json.dumps({"type": "command", "command": "hello", "id": number}) for number in range(1, 7)]
    for first, last in ((1, 3), (1, 1), (2, 2), (1, 6), (4, 6), (4, 5), (5, 5)):
        view.send(first=first, frames=commands[first - 1 : last])
    view.until(lambda: len(view.frames()) == 6 and view.last["ack"] == 6)
    assert [frame["id"] for frame in view.frames()] == [1, 2, 3, 4, 5, 6]
    sent = [content["sent"] for content in view.got if "frames" in content]
    assert sent == list(range(sent[0], sent[0] + len(sent)))
    port = server.port
    server.stop()
    view.until(lambda: view.last["state"] == "offline")
    serve(port=port)
    view.until(lambda: view.last["state"] == "connected" and view.last["sent"] > sent[-1] + 1)
    view.send(first=9, frames=commands[:1])  # a view that Python has forgotten begins where it is
    view.until(lambda: view.last["ack"] == 9)
    view.send(over=True)


def test_without_anywidget(
    serve: Serve, open_panel: Callable[..., memws.Panel], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without anywidget a cell shows the page in a frame, and the command that installs it."""
    monkeypatch.setitem(sys.modules, "anywidget", None)
    server = serve(token=TOKEN)
    panel = open_panel(server.url, "sam", token=TOKEN)
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda *objects, **options: shown.extend(objects))
    panel._ipython_display_()
    (frame,) = [each["text/html"] for each in shown]
    assert f'<iframe src="{memws.page_address(server.url)}"' in frame
    assert "pip install anywidget" in frame
    assert TOKEN not in frame
