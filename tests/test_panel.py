"""The panel without a browser: ipywidgets work without a kernel."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("ipywidgets")

import ipywidgets

import memws

Serve = Callable[..., memws.WebSocketServer]
HOSTILE = '</div><img src=x onerror="window.X=1"><script>window.X=2</script>&amp;'


@pytest.fixture
def open_panel() -> Iterator[Callable[..., memws.Panel]]:
    """Panels that are ready and are closed after the test, with all their widgets and threads."""
    panels: list[memws.Panel] = []
    before = set(ipywidgets.widgets.widget._instances)

    def start(url: str, **options: Any) -> memws.Panel:
        panels.append(memws.Panel(url, **options))
        assert panels[-1]._ready.wait(5)
        return panels[-1]

    yield start
    for panel in panels:
        panel.close()
    assert set(ipywidgets.widgets.widget._instances) <= before
    assert [thread for thread in threading.enumerate() if thread.name.startswith("memws-panel")] == []


def until(check: Callable[[], Any], seconds: float = 10) -> None:
    """Wait for what the panel's thread does."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.01)


def texts(panel: memws.Panel, kind: str) -> list[str]:
    """What the transcript's items of this kind say."""
    return [item.text for item in panel.transcript.items if item.kind == kind]


def test_conversation(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A message is sent and its turn shown, hostile text as text; a lost server is shown and comes back by itself."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    panel = open_panel(server.url)
    panel._field.value = f"My name is Ada and I like {HOSTILE}"
    panel._send.click()
    until(lambda: texts(panel, "agent") and panel._stop.disabled)
    assert texts(panel, "user") == [f"My name is Ada and I like {HOSTILE}"]
    assert {"monologue", "tool", "change"} <= {item.kind for item in panel.transcript.items}
    assert "<img" not in "".join(piece for item in panel.transcript.items for piece in item.pieces())
    port = server.port
    server.stop()
    until(lambda: "offline" in panel._status.value and panel._field.disabled, 4)
    serve(port=port)
    until(lambda: "connected" in panel._status.value and not panel._field.disabled, 15)


def test_token(serve: Serve, open_panel: Callable[..., memws.Panel]) -> None:
    """A server that refuses is shown so; a token is in no widget; one of the same name replaces another."""
    server = serve(token="the-right-one")
    wrong = open_panel(server.url, token="marker-of-a-secret")
    until(lambda: "asks for its token" in wrong._status.value)
    right = open_panel(server.url, token="the-right-one")
    until(lambda: "connected" in right._status.value)
    assert not wrong._thread.is_alive()
    states = [json.dumps(each.get_state(), default=repr) for each in ipywidgets.widgets.widget._instances.values()]
    assert not [state for state in states if "marker-of-a-secret" in state or "the-right-one" in state]
    assert "the-right-one" not in right.static_html()
