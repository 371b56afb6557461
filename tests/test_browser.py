"""The panel in a real JupyterLab, used through Debian's Chromium as a person would, with no network but loopback."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("jupyterlab")
pytest.importorskip("playwright")
pytest.importorskip("nbconvert")

from endpoint import Endpoint, Reply
from lab import CHROMIUM, LOG, Lab, Notebook, wait_until

import memws

if CHROMIUM is None:
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)

Serve = Callable[..., memws.WebSocketServer]
SERVER = """\
import memws
server = memws.WebSocketServer("127.0.0.1", {port}, db=":memory:", model="offline").start()"""
HOSTILE = '<img src=x onerror="window.X=1"><script>window.X=2</script>&amp; ![i](http://192.0.2.1/x.png)'


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

    def start(name: str, *cells: str, **options: tuple[int, int]) -> Notebook:
        opened.append(lab.open(name, *cells, **options))
        opened[-1].run()
        return opened[-1]

    yield start
    for each in opened:
        each.close()
    assert [error for each in opened for error in each.errors] == []


def panel_of(server: memws.WebSocketServer, **arguments: object) -> str:
    """A cell that shows a panel of a server of this process."""
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    return f"import memws\nmemws.Panel({server.url!r}{given})"


def said(server: memws.WebSocketServer, agent: str = "sam") -> list[str]:
    """The user's messages as the server has them."""
    with memws.connect(server.url) as client:
        found = client.command("get_messages", agent_name=agent, limit=200)["messages"]
    return [message["text"] for message in found if message["role"] == "user"]


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
    page.panel.get_by_role("tab", name="Context").click()
    page.panel.get_by_text(re.compile("core memory · .* tokens")).wait_for()
    page.panel.get_by_role("tab", name="Search").click()
    page.panel.get_by_placeholder("Words to look for").fill("tea")
    page.button("find").click()
    page.panel.get_by_text(re.compile("found, page 1 of")).wait_for()
    page.panel.get_by_role("tab", name="Frames").click()
    page.panel.locator(".memws-frame").first.wait_for()


COUNT = """\
import asyncio, threading, ipywidgets
threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("memws")]
print(len(threads), "threads,", len(server.interface.clients), "client,",
      len(ipywidgets.widgets.widget._instances), "widgets,", asyncio.Task.__module__)"""


def test_run_again(notebook: Callable[..., Notebook]) -> None:
    """Running all cells again, with a reload of the module, leaves one server, one panel and their threads, and asyncio
    is never patched."""
    cell = "import importlib, memws\nimportlib.reload(memws)\n" + SERVER.format(port=free_port())
    page = notebook("again", cell + "\nserver.create_new_agent({'name': 'sam'})", "server.panel()", COUNT)
    page.await_agent()
    page.run(2)
    first = page.output(2)
    for _ in range(2):
        page.run()
        page.await_agent()
        wait_until(lambda: page.panel.get_by_role("button", name="edit").count() == 2)
        page.run(2)
    assert page.page.locator(".memws-panel").count() == 1
    assert page.output(2) == first
    assert first.startswith("3 threads, 1 client, ")
    assert first.strip().endswith("widgets, _asyncio")
    page.say("Hi, my name is Ada")
    page.await_text("I noted")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_hostile_texts(notebook: Callable[..., Notebook], serve: Serve, endpoint: Endpoint) -> None:
    """What a model, a tool, a user or a memory block says is text: it runs nothing and loads nothing."""
    server = serve(model="m", base_url=endpoint.url)

    @server.tool
    def echo(text: str) -> str:
        """Give back a text.

        text: any text
        """
        return text

    tools = ["send_message", "core_memory_append", "echo"]
    server.create_new_agent({"name": "sam", "persona": HOSTILE, "tools": tools})
    page = notebook("hostile", panel_of(server))
    page.await_agent()
    endpoint.script(
        Reply(HOSTILE, calls=[("echo", {"text": HOSTILE})]),
        Reply(HOSTILE, calls=[("core_memory_append", {"name": "human", "content": HOSTILE})]),
        Reply(calls=[("send_message", {"message": "**bold** and `code`\n\n- a list\n\n" + HOSTILE})]),
        Reply(calls=[("echo", {"text": HOSTILE, HOSTILE: HOSTILE})]),
        Reply(calls=[(re.sub(r"\W", "", HOSTILE), {})]),
        Reply(calls=[("send_message", {"message": "plain " + HOSTILE})]),
        Reply(status=400, body={"error": {"message": HOSTILE, "type": "invalid_request_error"}}),
    )
    page.say(HOSTILE)
    page.panel.locator(f"{LOG} .jp-RenderedMarkdown strong").get_by_text("bold").wait_for()
    page.say("again " + HOSTILE, "enter")
    page.await_text("plain <img")
    page.say("fail")
    page.panel.locator(".memws-bad").get_by_text("<img src=x").first.wait_for()
    for tab in ("Context", "Search", "Frames", "Memory"):
        page.panel.get_by_role("tab", name=tab).click()
        if tab == "Search":
            page.panel.get_by_placeholder("Words to look for").fill(HOSTILE)
            page.button("find").click()
        time.sleep(0.4)
    page.save()
    assert page.page.evaluate("window.X") is None
    assert page.panel.locator("img, script, iframe").count() == 0
    assert page.page.locator(".memws-static img, .memws-static script").count() == 0


def test_saved_copy(lab: Lab, notebook: Callable[..., Notebook], serve: Serve) -> None:
    """Reopened without a kernel and in exported HTML, the conversation is readable; no secret is in the file."""
    token = "marker-of-the-token"
    server = serve(token=token)
    server.create_new_agent({"name": "sam"})
    page = notebook("saved", f"import memws\nmemws.Panel({server.url!r}, token={token[:6]!r} + {token[6:]!r})")
    page.await_agent()
    page.say("Hi, my name is Ada")
    page.await_text("I noted")
    assert not page.page.locator(".memws-static").first.is_visible()
    time.sleep(0.5)
    page.save()
    text = page.path.read_text("utf-8")
    assert token not in text
    assert "my name is Ada" in text
    page.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")
    again = lab.reopen(page.path)
    try:
        again.page.locator(".memws-static").get_by_text("I noted in core memory").wait_for()
        assert again.page.locator(".memws-panel").count() == 0
    finally:
        again.page.context.close()
    command = [sys.executable, "-m", "nbconvert", "--to", "html", page.path.name]
    subprocess.run(command, cwd=page.path.parent, check=True, capture_output=True)
    exported = page.path.with_suffix(".html").read_text("utf-8")
    assert "I noted in core memory" in exported
    assert token not in exported


def test_blocking_cell(notebook: Callable[..., Notebook]) -> None:
    """run() returns at once; run(block=True) blocks until its interrupt, which frees the port for the next one."""
    port = free_port()
    cell = f"""\
import memws
server = memws.WebSocketServer("127.0.0.1", {port}, db=":memory:", model="offline")
server.run(%s)"""
    check = f"""\
import socket, asyncio
with socket.create_server(("127.0.0.1", {port})): print("port is free")
print([task for task in asyncio.all_tasks() if "memws" in repr(task)])"""
    page = notebook("block", cell % "", "server.stop()", check)
    page.run(0, 1, 2)
    assert "in a thread of its own" in page.output(0)
    assert "port is free" in page.output(2)
    page.page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets[0].model.sharedModel.setSource"
                       f"({json.dumps(cell % 'block=True')})")  # fmt: skip
    for _ in range(2):
        page.run(0, wait=False)
        wait_until(lambda: listens(port))
        with memws.connect(f"ws://127.0.0.1:{port}") as client:
            client.create_agent("sam")
            assert "noted" in client.ask("Hi, my name is Ada")
        page.execute("notebook:interrupt-kernel")
        wait_until(lambda: not listens(port))
    page.run(2)
    assert "port is free\n[]" in page.output(2)


def listens(port: int) -> bool:
    """Whether somebody listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
