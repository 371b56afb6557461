"""The panel in a real JupyterLab, used through Debian's Chromium as a person would, with no network but loopback."""

from pathlib import Path

import pytest

pytest.importorskip("jupyterlab")
pytest.importorskip("playwright")

from lab import CHROMIUM, notebook

if CHROMIUM is None:
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)

SERVER = """\
import memws
server = memws.WebSocketServer("127.0.0.1", 0, db=":memory:", model="offline").start()"""


def test_first_conversation(tmp_path: Path) -> None:
    """Somebody new creates an agent, tells it something, and finds it in its memory."""
    with notebook(tmp_path, SERVER, "server.panel()") as page:
        page.await_status("connected")
        assert page.button("Send").is_disabled()
        assert page.button("Stop").is_disabled()
        page.button("create").click()
        page.await_text("Say hello to")
        page.say("Hi, my name is Ada and I like tea")
        page.await_text("I noted")
        page.say("What do I like?", by="enter")
        page.await_text("You told me")
        assert page.field.input_value() == ""
        page.panel.locator(".memws-side").get_by_text("name is Ada").wait_for()
