"""The panel in a real JupyterLab, used through Debian's Chromium as a person would, with no network but loopback."""

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("jupyterlab")
pytest.importorskip("playwright")

from lab import CHROMIUM, Lab, Notebook

if CHROMIUM is None:
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)

SERVER = """\
import memws
server = memws.WebSocketServer("127.0.0.1", {port}, db=":memory:", model="offline").start()"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """One JupyterLab for all tests; pages that asked for anything but loopback fail them."""
    running = Lab(tmp_path_factory.mktemp("lab"))
    yield running
    running.close()
    assert running.strangers == []


@pytest.fixture
def notebook(lab: Lab) -> Iterator[Callable[..., Notebook]]:
    """Notebooks that are closed after the test; a page with an error of its own fails it."""
    opened: list[Notebook] = []

    def start(name: str, *cells: str) -> Notebook:
        opened.append(lab.open(name, *cells))
        opened[-1].run()
        return opened[-1]

    yield start
    for each in opened:
        each.close()
    assert [error for each in opened for error in each.errors] == []


def test_first_conversation(notebook: Callable[..., Notebook]) -> None:
    """Somebody new creates an agent, tells it something, and finds it in its memory."""
    page = notebook("first", SERVER.format(port=0), "server.panel()")
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
