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
from lab import CHROMIUM, ITEM, LOG, Lab, Notebook, wait_until

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


@pytest.mark.parametrize("by", ["click", "enter"])
def test_no_message_is_lost(notebook: Callable[..., Notebook], serve: Serve, by: str) -> None:
    """40 messages, each written as soon as the field is empty again, arrive in order and once each."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    page = notebook(f"sends-{by}", panel_of(server))
    page.await_status("connected")
    page.await_agent()
    texts = [f"message number {number} of forty" for number in range(40)]
    for text in texts:
        page.say(text, by)
        page.page.wait_for_function("document.querySelector('input[placeholder=Message]').value === ''")
    wait_until(lambda: len(said(server)) >= 40, 20)
    assert said(server) == texts


def test_typing(notebook: Callable[..., Notebook], serve: Serve) -> None:
    """Fast and slow typing send the full text; leaving the field sends nothing; Enter twice sends once."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    page = notebook("typing", panel_of(server))
    page.await_agent()
    page.field.press_sequentially("typed with no pause at all", delay=0)
    page.field.press("Enter")
    wait_until(lambda: said(server) == ["typed with no pause at all"])
    wait_until(lambda: page.field.input_value() == "")
    page.field.press_sequentially("slow", delay=120)
    page.field.press("Enter")
    page.field.press("Enter")
    wait_until(lambda: said(server)[1:] == ["slow"])
    page.field.fill("half a thou")
    page.field.blur()
    time.sleep(0.8)
    assert said(server)[2:] == []
    page.field.press("End")
    page.field.press_sequentially("ght")
    page.field.press("Enter")
    wait_until(lambda: said(server)[2:] == ["half a thought"])
    wait_until(lambda: page.field.input_value() == "")
    page.panel.get_by_label("multi-line").check()
    page.page.locator("textarea[placeholder=Message]").wait_for()
    page.field.fill("one\ntwo")
    page.button("Send").click()
    wait_until(lambda: said(server)[3:] == ["one\ntwo"])


def test_stop(notebook: Callable[..., Notebook], serve: Serve, endpoint: Endpoint) -> None:
    """Stop ends a running reply within half a second; what was said stays, and the agent answers the next message."""
    server = serve(model="m", base_url=endpoint.url)
    server.create_new_agent({"name": "sam"})
    page = notebook("stop", panel_of(server))
    page.await_agent()
    endpoint.script(Reply(calls=[("send_message", {"message": "This reply never comes to its end"})], stall_after=6))
    page.say("Tell me a long story")
    page.await_text("This reply")
    page.await_status("answering")
    before = time.monotonic()
    page.button("Stop").click()
    page.await_text("stopped")
    assert time.monotonic() - before < 1.0
    wait_until(page.button("Stop").is_disabled)
    page.say("And now?")
    page.await_text("Hello")
    endpoint.release()


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


def test_busy_kernel(notebook: Callable[..., Notebook]) -> None:
    """While a cell computes, other clients are answered at once and the panel goes on showing them."""
    port = free_port()
    page = notebook("busy", SERVER.format(port=port) + "\nserver.create_new_agent({'name': 'sam'})", "server.panel()",
                    "import time; time.sleep(5)")  # fmt: skip
    page.await_status("connected")
    page.run(2, wait=False)
    time.sleep(0.3)
    with memws.connect(f"ws://127.0.0.1:{port}") as client:
        client.load_agent("sam")
        before = time.monotonic()
        client.ask("Hi, my name is Ada")
        assert time.monotonic() - before < 0.5
        page.await_text("Hi, my name is Ada", 2)
        client.ask("I like tea")
        page.await_text("I like tea", 2)
        assert time.monotonic() - before < 4.5


def test_interrupt_and_restart(notebook: Callable[..., Notebook]) -> None:
    """An interrupt of another cell harms neither server nor panel; after a restart the cells give them back."""
    port = free_port()
    page = notebook("restart", SERVER.format(port=port) + "\nserver.create_new_agent({'name': 'sam'})",
                    "server.panel()", "import time; time.sleep(globals().get('pause', 0)); pause = 30")  # fmt: skip
    page.await_status("connected")
    page.run(2, wait=False)
    time.sleep(0.5)
    page.execute("notebook:interrupt-kernel")
    page.page.locator(".jp-Notebook-cell").nth(2).get_by_text("KeyboardInterrupt").first.wait_for()
    page.say("Hi, my name is Ada")
    page.await_text("I noted")
    page.page.evaluate(
        "async () => await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()"
    )
    time.sleep(1)
    page.run(0, 1)
    page.await_status("connected")
    page.say("Hi, my name is Bob")
    page.await_text("I noted")
    page.errors.clear()  # JupyterLab itself tells of widgets whose kernel went


def test_two_panels(notebook: Callable[..., Notebook], serve: Serve) -> None:
    """Two panels of one server are two conversations."""
    server = serve()
    for name in ("ada", "bob"):
        server.create_new_agent({"name": name})
    page = notebook("two", panel_of(server, agent="ada", compact=True), panel_of(server, agent="bob", compact=True))
    panels = page.page.locator(".memws-panel")
    panels.nth(1).wait_for()
    page.page.wait_for_function(
        "[...document.querySelectorAll('input[placeholder=Message]')].filter(field => !field.disabled).length === 2"
    )
    for place, word in ((0, "tea"), (1, "coffee")):
        panels.nth(place).get_by_placeholder("Message").fill(f"I like {word}")
        panels.nth(place).get_by_placeholder("Message").press("Enter")
        panels.nth(place).locator(LOG).get_by_text("I noted").wait_for()
    assert said(server, "ada") == ["I like tea"]
    assert said(server, "bob") == ["I like coffee"]
    assert panels.nth(0).locator(LOG).get_by_text("coffee").count() == 0


CONTRASTS = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const back = element => { if (!element) return [255, 255, 255, 1];
    const own = parse(getComputedStyle(element).backgroundColor);
    return own[3] === 1 ? own : over(own, back(element.parentElement)); };
  const linear = v => v <= 10 ? v / 255 / 12.92 : ((v / 255 + .055) / 1.055) ** 2.4;
  const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const found = [];
  const walker = document.createTreeWalker(document.querySelector('.memws-panel'), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest('[disabled], style')) continue;
    if (!element.offsetParent) continue;
    const under = back(element), text = over(parse(getComputedStyle(element).color), under);
    const [a, b] = [light(text), light(under)].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), element.className, walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found; }"""


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_contrast(lab: Lab, notebook: Callable[..., Notebook], serve: Serve, theme: str) -> None:
    """Every text of the panel has a contrast of 4.5 and more, in both themes."""
    lab.theme(theme)
    server = serve()
    server.create_new_agent({"name": "sam"})
    page = notebook(f"contrast-{theme[-4:]}".lower(), panel_of(server))
    page.await_agent()
    page.say("Hi, my name is Ada")
    page.await_text("I noted")
    for fold in page.panel.locator("details").all():
        fold.evaluate("fold => fold.open = true")
    page.button("new…").click()
    worst = min(page.page.evaluate(CONTRASTS))
    lab.theme("JupyterLab Light")
    assert worst[0] >= 4.5, worst


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


def test_scrolling(notebook: Callable[..., Notebook], serve: Serve, endpoint: Endpoint) -> None:
    """The end stays in view; who has scrolled up keeps the place, and what is opened stays open."""
    server = serve(model="m", base_url=endpoint.url)
    server.create_new_agent({"name": "sam"})
    page = notebook("scroll", panel_of(server, compact=True))
    page.await_agent()
    long = "\n".join(f"line {number}" for number in range(40))
    endpoint.script(Reply("I think", calls=[("send_message", {"message": long})]))
    page.say("First")
    page.await_text("line 39")
    scroll = page.panel.locator(LOG)
    assert scroll.evaluate("log => log.scrollTop") == 0
    fold = page.panel.locator("details.memws-monologue").first
    fold.evaluate("fold => fold.open = true")
    endpoint.script(Reply(calls=[("send_message", {"message": long})], stall_after=30))
    page.say("Second")
    page.panel.locator(f"{LOG} {ITEM}").get_by_text("line 1").nth(1).wait_for()
    scroll.evaluate("log => { log.scrollTop = -150 }")
    seen = """() => { const log = document.querySelector('.memws-log').getBoundingClientRect();
        return document.elementFromPoint(log.left + 60, log.top + 40).closest('.memws-item').innerText.length; }"""
    before = page.page.evaluate(seen)
    endpoint.release()
    page.await_status("connected")
    wait_until(page.button("Stop").is_disabled)
    assert page.page.evaluate(seen) >= before
    assert scroll.evaluate("log => log.scrollTop") < -150
    assert fold.evaluate("fold => fold.open")


def test_server_gone(notebook: Callable[..., Notebook], serve: Serve) -> None:
    """Within 2 s the panel says that the server is gone and takes no text; it comes back by itself."""
    port = free_port()
    server = serve(port=port)
    server.create_new_agent({"name": "sam"})
    page = notebook("gone", panel_of(server))
    page.await_agent()
    page.say("Hi, my name is Ada")
    page.await_text("I noted")
    server.stop()
    page.await_status("offline", 2)
    wait_until(page.field.is_disabled, 2)
    assert page.button("Send").is_visible()
    assert page.button("Stop").is_visible()
    serve(port=port)
    page.await_status("connected", 12)
    page.await_text("connection lost")
    wait_until(page.field.is_enabled)
    page.say("What is my name?")
    page.await_text("You told me")
    assert "Traceback" not in page.output(0)


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


def test_narrow_window(notebook: Callable[..., Notebook], serve: Serve) -> None:
    """In a narrow window the columns stand below each other, and nothing has to be scrolled sideways."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    page = notebook("narrow", panel_of(server), size=(700, 900))
    page.await_agent()
    page.say("Hi, my name is Ada and I like tea, and " + "a" * 300)
    page.await_text("I noted")
    left, right = (page.panel.locator(f".memws-{side}").bounding_box() for side in ("left", "right"))
    assert left is not None
    assert right is not None
    assert right["y"] > left["y"] + 100
    assert page.panel.evaluate("panel => panel.scrollWidth - panel.clientWidth") <= 1
    assert page.panel.locator(LOG).evaluate("log => log.scrollWidth - log.clientWidth") <= 1


def test_memory_edit(notebook: Callable[..., Notebook], serve: Serve) -> None:
    """A block is edited in place; a change that came meanwhile is shown as a conflict, and nothing is lost."""
    server = serve()
    server.create_new_agent({"name": "sam"})
    page = notebook("memory", panel_of(server))
    page.await_agent()
    side = page.panel.locator(".memws-side")
    side.get_by_role("button", name="edit").nth(1).click()
    area = side.locator("textarea:visible")
    area.fill("Name: Ada")
    side.locator("button:visible").get_by_text("save").click()
    page.await_text("changed by the client")
    side.get_by_role("button", name="edit").nth(1).click()
    area.fill("Name: Ada Lovelace")
    with memws.connect(server.url) as client:
        client.command("set_block", agent_name="sam", label="human", value="Name: Bob")
    side.get_by_text("Conflict").wait_for()
    assert side.get_by_text("Name: Bob").is_visible()
    assert area.input_value() == "Name: Ada Lovelace"
    side.locator("button:visible").get_by_text("save").click()
    area.wait_for(state="hidden")
    with memws.connect(server.url) as client:
        blocks = client.command("get_agent", agent_name="sam")["blocks"]
    assert blocks[1]["value"] == "Name: Ada Lovelace"

