"""The panel in Chromium, used as a person would: each test on the page and in a real JupyterLab, but for what is one's.

Whatever is asked for beyond loopback fails the test, and so do errors of scripts and what the page's policy forbids.
"""

import random
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("anywidget")
pytest.importorskip("jupyterlab")
pytest.importorskip("playwright")

from endpoint import Endpoint, Reply, say
from lab import CHROMIUM, FLAGS, Window, jupyterlab
from playwright.sync_api import Browser, expect, sync_playwright

import memws

if CHROMIUM is None:
    pytest.skip("no chromium here: apt-get install chromium", allow_module_level=True)

Serve = Callable[..., memws.WebSocketServer]
Show = Callable[..., Window]
TOKEN = "Secret-token_1~"
AGAIN = {"request_heartbeat": True}
NOTED = ("core_memory_append", {"name": "human", "content": "Name: Ada\nLikes: tea", **AGAIN})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@pytest.fixture(scope="module")
def notebook(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """A notebook with one cell, for all tests of this file."""
    folder = tmp_path_factory.mktemp("jupyter")
    with jupyterlab(folder) as url:
        window = Window(browser)
        window.open_notebook(folder, url)
        yield window
        window.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        window.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Window]:
    """A window of its own, for the page."""
    window = Window(browser)
    yield window
    window.close()


@pytest.fixture(params=["page", "notebook"])
def show(request: pytest.FixtureRequest) -> Show:
    """Shows the panel of a server, once on the page and once in the notebook."""

    def start(server: memws.WebSocketServer, agent: str = "sam") -> Window:
        window: Window = request.getfixturevalue(request.param)
        if agent:
            server.create_new_agent({"name": agent})
        if request.param == "page":
            window.open(server.url, f"#agent={agent}")
        else:
            window.run(f"import memws\nmemws.Panel({server.url!r}, {agent or None!r}, name='test')")
            window.await_status("connected")
        return window

    return start


def with_sam(server: memws.WebSocketServer, **config: Any) -> memws.WebSocketServer:
    server.create_new_agent({"name": "sam", **config})
    return server


def test_first_conversation(serve: Serve, show: Show) -> None:
    """Somebody new starts with sam by one button, tells it something, sees it enter its memory, and copies a reply."""
    window = show(serve(), agent="")
    expect(window.button("Send")).to_be_disabled()
    expect(window.button("Stop")).to_be_disabled()
    window.button("Start with sam").click()
    window.button("Hi, my name is Ada and I like green tea").click()
    window.sees("I noted in core memory", "thought · core_memory_append", "remembered in human")
    expect(window.mind.locator("ins")).to_have_text(["my name is Ada", "I like green tea"])
    window.field.fill("What do")
    window.field.press("Shift+Enter")
    window.page.keyboard.type("I like?")
    expect(window.field).to_have_value("What do\nI like?")
    window.field.press("Enter")
    window.sees("You told me")
    expect(window.field).to_have_value("")
    expect(window.log.locator(".memws-bubble").last).to_have_text("What do\nI like?")
    window.field.press("ArrowUp")
    expect(window.field).to_have_value("What do\nI like?")
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    window.button("copy").last.click()
    window.button("copied").wait_for()
    assert "You told me" in window.page.evaluate("navigator.clipboard.readText()")


def test_what_is_new_glows(serve: Serve, page: Window) -> None:
    """For six seconds, and stands there then."""
    page.page.clock.install()
    page.open(with_sam(serve()).url)
    page.say("I like tea")
    page.await_turns(1)
    expect(page.mind.locator("ins")).to_have_text("I like tea")
    page.page.clock.fast_forward(6_000)
    expect(page.mind.locator("ins")).to_have_count(0)
    expect(page.mind.get_by_text("I like tea")).to_be_visible()


def test_nothing_typed_is_lost(serve: Serve, show: Show) -> None:
    """Two hundred messages, each sent with Enter as fast as the browser goes, are each answered, in their order."""
    server = serve()
    window = show(server)
    texts = [f"message {number}" for number in range(200)]
    window.field.focus()
    for text in texts:
        window.page.keyboard.insert_text(text)
        window.page.keyboard.press("Enter")
    expect(window.log.locator(".memws-bubble")).to_have_text(texts)
    answered = window.log.locator(".memws-turn", has=window.page.locator(".memws-agent"))
    expect(answered).to_have_count(200, timeout=60_000)
    with memws.connect(server.url) as client:
        messages = client.command("get_messages", agent_name="sam", limit=200)["messages"]
    said = [message["text"] for message in messages if message["role"] == "user"]
    assert said == texts[-len(said) :]


def test_stop_and_those_that_wait(online: Serve, endpoint: Endpoint, show: Show) -> None:
    """A turn streams until it is stopped; messages wait with their place, one is taken back and sent again."""
    window = show(online())
    endpoint.script(Reply("I think about the rain, and about the sea.", stall_after=5))
    window.say("first")
    window.sees("…I think about")
    window.await_status("connected · thinking")
    for number in range(2, 9):
        window.say(f"number {number}")
    window.sees("waits, number 4", "sending")
    window.button("take back").first.click()
    window.sees("not sent: cancelled before it ran")
    window.field.press("Escape")
    window.sees("stopped")
    expect(window.log.get_by_text("Hello!")).to_have_count(6)
    window.field.fill("x" * 70_000)
    window.field.press("Enter")
    expect(window.panel.get_by_role("alert")).to_contain_text("at most 65,536 characters")
    window.field.fill("")
    window.button("try again").click()
    expect(window.log.get_by_text("Hello!")).to_have_count(7)
    expect(window.log.locator(".memws-bubble").last).to_have_text("number 2")
    expect(window.button("Stop")).to_be_disabled()


def test_a_turn_is_told(online: Serve, endpoint: Endpoint, show: Show) -> None:
    """Calls are folded into the line of thoughts, failures say why, what a retry takes back goes, errors are shown."""
    server = online()
    window = show(server)
    bad = ("core_memory_replace", {"name": "human", "old_content": "x", "new_content": "y", **AGAIN})
    endpoint.script(
        Reply("I try.", [bad]), Reply("a half of a thought that streams", cut_after=4), say("So be it.", text="I see.")
    )
    window.say("go")
    window.sees("So be it.", "failed: ")
    window.log.locator(".memws-trace > summary").click()
    window.sees("I try.", "I see.")
    expect(window.log.get_by_text("a half")).to_have_count(0)
    window.log.locator(".memws-tool summary").click()
    window.sees("old_content: x")
    window.button("step 1: what the model got").click()
    expect(window.mind.get_by_text("Words to look for")).to_be_hidden()
    expect(window.mind.get_by_text("I try.")).to_be_visible()
    endpoint.script(Reply(status=401))
    window.say("again")
    expect(window.log.locator(".memws-bad").last).to_contain_text("key")
    endpoint.script(say("Hello, Bob."))
    with memws.connect(server.url) as client:
        client.ask("It is me.", "sam", from_="Bob")
        window.sees("Bob · ", "Hello, Bob.")


def test_calls_are_allowed(online: Serve, endpoint: Endpoint, show: Show) -> None:
    """A call that waits is a card: allowed as it is or with other arguments, denied with a reason, and gone when
    another client answers or the turn is stopped; the conversation says what came of it."""
    server = online()
    spent: list[tuple[int, str]] = []

    @server.tool(approve=True)
    def spend(amount: int, what: str) -> str:
        spent.append((amount, what))
        return f"spent {amount} on {what}"

    window = show(with_sam(server, tools=["spend"]), agent="")
    card = window.log.locator(".memws-card", has_text="May spend run?")

    def ask(**then: bool) -> None:
        expect(card).to_have_count(0)
        endpoint.script(Reply(calls=[("spend", {"amount": 50, "what": "<b>tea"})]), Reply("So be it.", **then))
        window.say("spend it")
        expect(card).to_be_visible()

    ask()
    field = card.get_by_label("arguments")
    expect(field).to_have_value('{\n  "amount": 50,\n  "what": "<b>tea"\n}')
    for wrong, told in {"{": "JSON", "null": "amount", '{"amount": "much"}': "amount"}.items():
        field.fill(wrong)
        card.get_by_role("button", name="Allow").click()
        expect(card.get_by_role("alert")).to_contain_text(told)
    field.fill('{"amount": 20, "what": "tea"}')
    card.get_by_role("button", name="Allow").click()
    window.sees('spend · a person had it run with {"amount":20,"what":"tea"}: spent 20 on tea')
    ask()
    card.get_by_label("reason").fill("too dear")
    card.get_by_label("reason").press("Enter")
    window.sees("spend · not run: a person denied it (too dear)")
    expect(window.field).to_be_focused()
    ask(hold=True)
    with memws.connect(server.url) as client:
        (waits,) = client.command("get_agent", agent_name="sam")["turn"]["approvals"]
        client.command("approve", agent_name="sam", tool_call_id=waits["tool_call_id"], allow=True)
    window.sees("spend · spent 50 on <b>tea")
    expect(card).to_have_count(0)
    endpoint.wait_requests(6)
    endpoint.release()
    window.await_status("connected")
    ask()
    window.button("Stop").click()
    window.sees("stopped: cancelled")
    expect(card).to_have_count(0)
    assert spent == [(20, "tea"), (50, "<b>tea")]


def test_steering(online: Serve, endpoint: Endpoint, show: Show) -> None:
    """While a turn runs a message waits for its end, or enters it before its next step and stands there; where the turn
    ends first it is the next."""
    window = show(online())
    busy, turns = window.panel.get_by_label("While a turn runs"), window.log.locator(".memws-turn")
    expect(busy).to_be_hidden()
    endpoint.script(Reply("I keep that.", [NOTED], hold=True), Reply(text="With tea."))
    window.say("first")
    window.await_status("connected · thinking")
    for number in range(5):
        window.say(f"later {number}")
    window.sees("waits, number 4")
    busy.select_option("steer")
    window.say("tea, <b>please")
    expect(turns.last.locator(".memws-mark")).to_have_text("sending")
    window.button("list").click()
    window.mind.get_by_text("0 found").wait_for()  # this was asked after it
    endpoint.wait_requests(1)
    endpoint.release()
    window.sees("With tea.")
    expect(turns).to_have_count(6)
    expect(turns.first.locator(".memws-bubble")).to_have_text(["first", "tea, <b>please"])
    items = ["first", "core_memory_append", "remembered in human", "tea, <b>please", "With tea."]
    expect(turns.first.locator(".memws-item")).to_contain_text(items)
    expect(turns.locator(".memws-agent")).to_have_count(6)
    window.await_status("connected")
    expect(busy).to_be_hidden()
    endpoint.script(Reply(status=401, hold=True))
    window.say("again")
    expect(busy).to_have_value("steer")
    window.say("too late")
    expect(turns.last.locator(".memws-mark")).to_have_text("sending")
    endpoint.release()
    expect(turns.last.locator(".memws-agent")).to_be_visible()
    expect(turns.last.locator(".memws-bubble")).to_have_text(["too late"])


def test_a_request_after_a_reload(online: Serve, endpoint: Endpoint, page: Window) -> None:
    """A call that waits stands there again, and runs as it was asked."""
    server = online()
    server.tool(lambda amount: f"spent {amount}", name="spend", approve=True)
    page.open(with_sam(server, tools=["spend"]).url)
    endpoint.script(Reply(calls=[("spend", {"amount": 50})]), say("So be it."))
    page.say("spend it")
    page.button("Allow").wait_for()
    page.page.reload()
    page.button("Allow").click()
    page.sees("spend · spent 50", "So be it.")


TELLINGS = """(place) => new MutationObserver((changes) => {
  for (const { addedNodes: [node] } of changes) place.told = [...place.told ?? [], node?.textContent];
}).observe(place, { childList: true, subtree: true })"""


def test_a_turns_menu(serve: Serve, show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a turn another agent is made, told of as it goes on, which talks beside its parent; the agent goes back
    there and what it was goes on under another name; and what the model saw is shown."""
    monkeypatch.setattr(memws, "PROGRESS_DELAY", 0.0)
    window = show(serve())
    notices = window.panel.locator(".memws-over")
    notices.evaluate(TELLINGS)
    agents, bubbles = window.panel.get_by_label("Agent", exact=True), window.log.locator(".memws-bubble")

    def choose(entry: str) -> None:
        window.log.get_by_label("This turn").first.click()
        window.button(entry).click()

    for number, text in enumerate(("My name is Ada", "I like tea"), 1):
        window.say(text)
        window.await_turns(number)
    choose("fork here…")
    window.fill(**{"new name": "no/name"})
    window.button("fork").click()
    expect(window.panel.locator(".memws-dialog .memws-said")).to_contain_text("no/name")
    window.fill(**{"new name": "kim"})
    window.button("fork").click()
    window.button("show it beside").click()
    assert any(re.match(r"copied \d+ of \d+ ", told or "") for told in notices.evaluate("place => place.told"))
    kim = window.page.locator(".memws-panel").nth(1)
    expect(kim.locator(".memws-status")).to_have_text("connected")
    kim.get_by_placeholder("Message", exact=True).fill("I like rain")
    kim.get_by_placeholder("Message", exact=True).press("Enter")
    expect(kim.locator(".memws-bubble")).to_have_text(["My name is Ada", "I like rain"])
    expect(bubbles).to_have_text(["My name is Ada", "I like tea"])
    kim.get_by_role("button", name="close").click()
    expect(kim).to_have_count(0)
    choose("rewind to here…")
    expect(window.panel.get_by_text("sam will know nothing")).to_be_visible()
    expect(window.panel.get_by_label("keep as")).to_have_value("sam-later")
    window.button("rewind").click()
    expect(bubbles).to_have_text(["My name is Ada"])
    expect(window.mind.get_by_text("I like tea")).to_have_count(0)
    window.button("open it").click()
    expect(bubbles).to_have_text(["My name is Ada", "I like tea"])
    expect(agents).to_have_value("sam-later")
    choose("what the model saw")
    expect(window.mind.get_by_text("what the model got in step 2")).to_be_visible()


def test_memory_is_edited(serve: Serve, show: Show) -> None:
    """A block is edited in place with its own keys; where it changed meanwhile both texts are shown."""
    server = serve()
    window = show(server)
    card = window.mind.locator(".memws-card", has=window.page.get_by_role("heading", name="human"))
    card.get_by_role("button", name="edit").click()
    field = card.get_by_role("textbox")
    field.fill("x" * 2_001)
    field.press("Control+Enter")
    expect(card.get_by_text("2,001 / 2,000")).to_be_visible()
    expect(card.locator(".memws-said")).to_contain_text("2,000")
    with memws.connect(server.url) as client:
        client.command("set_block", agent_name="sam", label="human", value="theirs")
        window.sees("human was edited")
        expect(card.locator("ins")).to_have_text("theirs")
        field.fill("mine")
        field.press("Control+Enter")
        expect(card.get_by_text("It was changed while you wrote")).to_be_visible()
        expect(card.locator("pre")).to_have_text("theirs")
        expect(field).to_have_value("mine")
        card.get_by_role("button", name="save").click()
        expect(card.locator("ins")).to_have_text("mine")
        expect(card.locator("del")).to_have_text("theirs")
        assert client.command("get_agent", agent_name="sam")["blocks"][1]["value"] == "mine"
    card.get_by_role("button", name="edit").click()
    field.press("Escape")
    expect(field).to_be_hidden()
    window.tab("Search").click()
    window.log.get_by_role("button", name="human was edited").last.click()
    expect(card).to_be_visible()


def test_search_and_archive(serve: Serve, show: Show) -> None:
    """Passages are added, listed, deleted and brought back; a search marks its words, and days narrow it."""
    server = serve()
    window = show(server)
    window.say("I like tea")
    window.sees("I noted")
    with memws.connect(server.url) as client:
        for number in range(11):
            client.command("insert_passage", agent_name="sam", text=f"Tea number {number}")
    window.mind.get_by_placeholder("A passage to keep").fill("Tea number 11")
    window.button("add").click()
    window.mind.get_by_text("12 passages").wait_for()
    window.button("list").click()
    found = window.mind.locator(".memws-found")
    expect(found).to_have_count(10)
    window.button("more results").click()
    expect(found).to_have_count(12)
    window.button("delete").last.click()
    expect(found).to_have_count(11)
    window.button("undo").click()
    window.mind.get_by_placeholder("Words to look for").fill("tea")
    window.button("find").click()
    expect(window.mind.locator("mark").first).to_have_text(re.compile("tea", re.IGNORECASE))
    expect(window.mind.get_by_text("14 found")).to_be_visible()
    window.mind.get_by_text("more", exact=True).click()
    window.mind.get_by_label("to", exact=True).fill("2001-01-01")
    window.button("find").click()
    expect(window.mind.get_by_text("0 found")).to_be_visible()


def test_context_and_frames(serve: Serve, show: Show) -> None:
    """The bar and the steps open what the model sees; frames come as they are, can be held and saved."""
    window = show(serve())
    window.say("I like tea")
    window.sees("I noted")
    window.button_like("core memory: ").click()
    expect(window.mind.locator("details[open] pre")).to_contain_text("I like tea")
    window.log.locator(".memws-trace > summary").click()
    window.button("step 2: what the model got").click()
    expect(window.mind.get_by_text("answer", exact=True)).to_be_visible()
    window.tab("Frames").click()
    rows = window.mind.locator(".memws-frames .memws-fold").filter(visible=True)
    rows.locator("b").get_by_text("user_message").first.wait_for()
    window.button("pause").click()
    held = rows.count()
    window.say("What do I like?")
    window.sees("You told me")
    assert rows.count() == held
    rows.first.click()
    expect(rows.first.locator("pre")).to_contain_text('"type"')
    with window.page.expect_download() as download:
        window.button("save").click()
    saved = download.value.path().read_text("utf-8")
    assert "You told me" in saved
    assert '"direction":"→"' in saved
    window.button("go on").click()
    window.mind.get_by_text("delta × ").first.wait_for()
    expect(window.panel.get_by_role("alert")).to_have_count(0)


def test_agents(serve: Serve, show: Show) -> None:
    """Agents are made, chosen, renamed, deleted and brought back; what others do to them is followed."""
    server = serve()

    @server.tool
    def count(words: str) -> int:
        return len(words.split())

    window = show(server)
    window.choose("new agent…")
    window.fill(name="no/name")
    window.button("create").click()
    expect(window.panel.locator(".memws-dialog .memws-said")).to_contain_text("name")
    window.fill(name="ada", persona="I am Ada. I count.", tools="count")
    window.button("create").click()
    window.sees("I am Ada. I count.")
    agents = window.panel.get_by_label("Agent", exact=True)
    window.choose("rename…")
    window.fill(**{"new name": "eve"})
    window.button("rename").click()
    expect(agents.locator("option")).to_have_text(["eve", "sam"])
    window.choose("delete")
    window.button("undo").click()
    window.sees("eve")
    agents.select_option("sam")
    window.sees("I am Sam.")
    with memws.connect(server.url) as client:
        client.command("rename_agent", agent_name="sam", new_name="tom")
        expect(agents.locator("option")).to_have_text(["eve", "tom"])
        window.say("Hello")
        window.await_turns(1)
        assert client.command("get_agent", agent_name="eve")["settings"]["tools"][-1] == "count"
        client.create_agent("kim")
        agents.focus()
        expect(agents.locator("option")).to_have_text(["eve", "kim", "tom"])
        for name in ("tom", "kim", "eve"):
            client.command("delete_agent", agent_name=name)
    window.sees("No agent yet")


def test_offline_and_back(serve: Serve, show: Show) -> None:
    """A lost server is told; what is written meanwhile stays; what was missed comes, and what was taken back goes."""
    server = serve()
    window = show(server)
    window.say("My name is Ada")
    window.sees("I noted")
    port = server.port
    server.stop()
    window.await_status("offline")
    window.say("I like tea")
    expect(window.field).to_have_value("I like tea")
    window.button("add").click()
    expect(window.panel.get_by_role("alert")).to_contain_text("no connection")
    server = serve(port=port)
    server.load_agent("sam")
    turn_id = server.run_step("I have a cat")[0]["turn_id"]
    window.await_status("connected")
    window.sees("I have a cat")
    window.field.press("Enter")
    expect(window.log.locator(".memws-bubble")).to_have_text(["My name is Ada", "I have a cat", "I like tea"])
    window.await_turns(3)
    server.stop()
    elsewhere = serve()
    with memws.connect(elsewhere.url) as client:
        client.command("rewind_agent", agent_name="sam", turn_id=turn_id)
    elsewhere.stop()
    serve(port=port)
    expect(window.log.locator(".memws-bubble")).to_have_text(["My name is Ada", "I have a cat"])
    window.await_status("connected")


def lose(page: Window, word: str) -> list[str]:
    """Let the first frame with this word be lost with its connection; it stands in the list then."""
    lost: list[str] = []

    def pass_on(socket: Any) -> None:
        server = socket.connect_to_server()

        def send(frame: str) -> None:
            if word in frame and not lost:
                lost.append(frame)
                socket.close()
            else:
                server.send(frame)

        socket.on_message(send)

    page.page.route_web_socket(re.compile("^ws"), pass_on)
    return lost


@pytest.mark.parametrize("word", ["load_agent", "get_agent", "subscribe", "user_message"])
def test_what_was_on_its_way(serve: Serve, page: Window, word: str) -> None:
    """What is lost with its connection, of opening an agent or of a message, is sent again with the next one, once."""
    server = with_sam(serve())
    server.run_step("I like tea")
    lost = lose(page, f'"{word}"')
    page.open(server.url)
    page.sees("I like tea")
    expect(page.mind.get_by_role("region")).to_have_count(1)
    page.say("I like cake")
    page.await_turns(2)
    expect(page.log.locator(".memws-bubble")).to_have_text(["I like tea", "I like cake"])
    assert len(lost) == 1


def test_long_history(serve: Serve, page: Window) -> None:
    """Of a long history the end is shown; older turns come as somebody scrolls up, each once and above what is in view,
    also where the connection is lost while they are asked for, and go at the bottom."""
    server = serve(db=":memory:")
    server.create_new_agent({"name": "old"})
    with memws.connect(server.url) as client:
        client.command("set_block", agent_name="old", label="human", value="edited before all turns")
    for number in range(220):
        server.run_step(f"turn {number} of many")
    lost = lose(page, '"after":0')
    page.open(server.url, "#agent=old")
    page.sees("turn 219 of many")
    bubbles = page.log.locator(".memws-bubble")
    assert bubbles.count() < 100
    while (before := bubbles.count()) < 220:
        page.log.evaluate("element => { element.scrollTop = -element.scrollHeight; }")
        expect(bubbles.nth(before)).to_be_attached(timeout=20_000)
        expect(bubbles.nth(bubbles.count() - before)).to_be_in_viewport()
    expect(bubbles).to_have_text([f"turn {number} of many" for number in range(220)])
    assert len(lost) == 1
    expect(page.log.get_by_role("button", name="human was edited")).to_have_count(1)
    page.button("↓ newest").click()
    expect(bubbles).to_have_count(200)
    expect(bubbles.last).to_be_in_viewport()


HOSTILE = """</script></style></textarea><img src=x onerror="window.hurt=1"><script>window.hurt=1</script>"""
HOSTILE += '[a](javascript:hurt=1) ![b](https://evil.example/x.png) <a href="javascript:hurt=1">c</a> {{7*7}}'
PLAIN = "a, blockquote, button, code, div, em, h3, h4, h5, h6, hr, li, ol, p, pre, span, strong, table, td, th, tr, ul"


def is_harmless(window: Window) -> bool:
    """Whether no text became an element of its own, or ran."""
    links = "[...document.querySelectorAll('.memws-panel a')].every((a) => /^https?:/.test(a.href))"
    strangers = "document.querySelector('.memws-panel :is(img, script, style, iframe)') === null"
    return bool(window.page.evaluate(f"{links} && {strangers} && window.hurt === undefined"))


def test_texts_stay_texts(online: Serve, endpoint: Endpoint, show: Show) -> None:
    """Whatever anybody writes is shown and does nothing: messages, replies, calls, blocks, passages, hits, errors."""
    server = online()
    window = show(server)
    keep = ("core_memory_append", {"name": "human", "content": HOSTILE, **AGAIN})
    store = ("archival_memory_insert", {"content": HOSTILE, **AGAIN})
    endpoint.script(
        Reply(HOSTILE, [keep, store]), say(HOSTILE, text=HOSTILE), Reply(status=400, body={"error": HOSTILE})
    )
    window.say(HOSTILE)
    window.sees("c</a>")
    window.say("again")
    window.log.locator(".memws-bad").last.wait_for()
    for summary in window.log.locator("summary").all():
        summary.click()
    for tab in ("Frames", "Context", "Search"):
        window.tab(tab).click()
        assert is_harmless(window)
    window.mind.get_by_placeholder("Words to look for").fill("script textarea")
    window.button("find").click()
    window.mind.locator("mark").first.wait_for()
    server.create_new_agent({"name": "x", "blocks": [{"label": "more", "value": HOSTILE}], "persona": HOSTILE})
    window.choose("new agent…")
    window.fill(name="y", human=HOSTILE, persona=HOSTILE, model=HOSTILE)
    window.button("create").click()
    assert is_harmless(window)


TABLE = "Prices:\n\n| What | *Cost* |\n|---|---:|\n| tea \\| milk | 2 |\n| cake | **3** |\n\nThat is the end."


def test_markdown_of_any_kind(online: Serve, endpoint: Endpoint, page: Window) -> None:
    """A table is one; any mixture of Markdown's signs becomes nothing but plain elements, with all its words."""
    draw = random.Random(7)
    signs = ["`", "```", "**", "*", "_", "# ", "> ", "- ", "1. ", "| ", "|-|-|", "\n", "\n\n", "    ", "[x](", ")", "]"]
    signs += ["\\", "~~~", "\n\n---\n", "https://a.example/b", "javascript:x", "<b>", "&amp;"]
    signs += ["\u202e", "word ", "é", "漢字 ", HOSTILE]
    texts = ["".join(draw.choices(signs, k=draw.randrange(1, 60))) + " end" for _ in range(36)]
    alone = ("[", "**a ", "`", "> ", ">", "- ", "_a", "|", "https://", "![](", "  - a\n")
    replies = [[TABLE], *(texts[start : start + 12] for start in range(0, len(texts), 12))]
    replies += [[sign * 2_000 + " end"] for sign in alone]
    page.open(with_sam(online(), context_window=1_000_000).url)
    for number, reply in enumerate(replies, 1):
        endpoint.script(say(*reply))
        page.say(f"number {number}")
        page.await_turns(sum(map(len, replies[:number])))
    cells = page.log.locator("table").first.locator("th, td")
    expect(cells).to_have_text(["What", "Cost", "tea | milk", "2", "cake", "3"])
    expect(cells.last.locator("strong")).to_have_count(1)
    prose = page.log.locator(".memws-agent .memws-prose")
    expect(prose.locator(f"*:not({PLAIN})")).to_have_count(0)
    assert [text for text in prose.all_text_contents() if "end" not in text] == []
    assert is_harmless(page)


def test_the_page_asks_for_the_token(serve: Serve, page: Window) -> None:
    """Where a token is set the page asks for it, again if it was wrong; one in the address stays in no address, and
    only one that is no subprotocol goes as part of one."""
    addresses: list[str] = []
    page.page.on("websocket", lambda socket: addresses.append(socket.url))
    server = with_sam(serve(token=TOKEN))
    page.open(server.url, status="offline")
    for token in ("wrong", TOKEN):
        page.await_status("offline")
        page.fill(token=token)
        page.button("connect").click()
    page.await_status("connected")
    page.page.reload()  # it is kept as long as the tab is open
    page.await_status("connected")
    page.context.clear_cookies()
    page.page.evaluate("sessionStorage.clear()")
    page.page.goto("about:blank")
    page.open(server.url, f"#token={TOKEN}&agent=sam")
    assert TOKEN not in page.page.url
    assert not any(TOKEN in address for address in addresses)
    page.open(serve(token="a/b=c", db=":memory:").url, "#token=a/b%3Dc")


LUMINANCE = """(colour) => {
  const parts = colour.match(/[\\d.]+/g).map(Number).slice(0, 3).map((part) => part / 255);
  const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
CONTRASTS = f"""(root) => {{
  const luminance = {LUMINANCE};
  const solid = (element) => {{
    const colour = getComputedStyle(element).backgroundColor;
    return /, 0\\)$|transparent/.test(colour) ? solid(element.parentElement) : colour; }};
  const isText = (node) => node.nodeType === 3 && node.data.trim();
  const shown = [...root.querySelectorAll('*')].filter((each) => [...each.childNodes].some(isText)
    && each.checkVisibility({{ opacityProperty: true }}) && !each.closest(':disabled, .memws-live, .memws-refused'));
  return shown.map((each) => {{
    const [one, other] = [luminance(getComputedStyle(each).color), luminance(solid(each))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    return [Math.round(ratio * 100) / 100, each.className || each.tagName, each.textContent.slice(0, 40)]; }}); }}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(online: Serve, endpoint: Endpoint, browser: Browser, theme: Any) -> None:
    """All that can be read stands out from its ground by 4.5 at least, in every view."""
    window = Window(browser, color_scheme=theme, reduced_motion="reduce")
    window.open(with_sam(online()).url)
    bad = ("core_memory_replace", {"name": "human", "old_content": "x", "new_content": "y", **AGAIN})
    endpoint.script(
        Reply("I keep that.", [NOTED, bad]), say("# Ada\n\n> `tea` and [more](https://a.example)\n\n|a|\n|-|\n|b|")
    )
    for text in ("one", "two"):
        window.say(text)
    window.await_turns(2)
    for summary in window.log.locator("summary").all():
        summary.click()
    for tab in ("Memory", "Context", "Search", "Frames"):
        window.tab(tab).click()
        low = [found for found in window.panel.evaluate(CONTRASTS) if found[0] < 4.5]
        assert low == []
    window.choose("new agent…")
    assert [found for found in window.panel.evaluate(CONTRASTS) if found[0] < 4.5] == []
    window.close()


def test_keyboard_alone(serve: Serve, page: Window) -> None:
    """Without a mouse: to write, to walk the views, to edit a block and to make an agent."""
    page.open(serve().url)
    keys = page.page.keyboard

    def reach(name: str) -> None:
        for _ in range(40):
            if page.page.evaluate(f"document.activeElement.matches('{name}')"):
                return
            keys.press("Tab")
        pytest.fail(f"Tab never reaches {name}")

    reach(".memws-empty .memws-main")
    keys.press("Enter")
    page.sees("What do you remember")
    reach("textarea[placeholder=Message]")
    keys.type("I like tea")
    keys.press("Enter")
    page.sees("I noted")
    reach("nav button + button")
    keys.press("Enter")
    expect(page.tab("Context")).to_be_focused()
    expect(page.mind.get_by_text("what the model sees now")).to_be_visible()
    keys.press("Alt+1")
    reach(".memws-card button")
    keys.press("Enter")
    keys.type("I am Tom.")
    keys.press("Control+Enter")
    expect(page.mind.locator(".memws-card").first).to_contain_text("I am Tom.")
    keys.press("Alt+3")
    expect(page.mind.get_by_placeholder("Words to look for")).to_be_focused()
    keys.press("Alt+1")
    expect(page.tab("Memory")).to_be_focused()
    page.field.focus()
    keys.press("Shift+Tab")
    reach(".memws-opener")
    keys.press("Enter")
    reach(".memws-entry:last-child")
    keys.press("Enter")
    expect(page.panel.get_by_text("breaks the line")).to_be_visible()
    keys.press("Escape")
    expect(page.panel.get_by_text("breaks the line")).to_have_count(0)
    expect(page.panel.get_by_label("Agents and keys")).to_be_focused()


def test_narrow(serve: Serve, browser: Browser) -> None:
    """In a narrow window the mind stands below the conversation, and nothing is wider than the window."""
    window = Window(browser, viewport={"width": 400, "height": 800})
    window.open(with_sam(serve()).url)
    window.say("a word of " + "w" * 300)
    window.await_turns(1)
    entry = window.button("what the model saw")
    window.log.get_by_label("This turn").click()
    expect(entry).to_be_in_viewport(ratio=1)
    window.page.keyboard.press("Escape")
    expect(entry).to_be_hidden()
    window.log.get_by_label("This turn").click()
    window.field.click()
    expect(entry).to_be_hidden()
    above, below = window.field.bounding_box(), window.mind.bounding_box()
    assert above
    assert below
    assert above["y"] + above["height"] <= below["y"]
    assert below["y"] + below["height"] <= 800
    for tab in ("Memory", "Context", "Search", "Frames"):
        window.tab(tab).click()
        size = window.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]")
        assert size == [400, 800]
    window.log.get_by_label("This turn").click()
    window.button("fork here…").click()
    window.fill(**{"new name": "k" * 40})
    window.button("fork").click()
    expect(window.button("show it beside")).to_be_in_viewport(ratio=1)
    window.close()


def test_in_a_notebook(serve: Serve, notebook: Window) -> None:
    """Two panels of a notebook live side by side while a cell is busy; their copies hide; a dead kernel is told."""
    server = with_sam(serve())
    server.create_new_agent({"name": "ada"})
    with socket.create_server(("127.0.0.1", 0)) as gate:
        shown = f"for name in ('sam', 'ada'): display(memws.Panel({server.url!r}, name, compact=name == 'ada'))"
        busy = f"socket.create_connection({gate.getsockname()!r}).recv(1)"
        notebook.run(f"import memws, socket\n{shown}\n{busy}", wait=False)
        connection, _ = gate.accept()
        panels = notebook.page.locator(".memws-panel")
        expect(panels).to_have_count(2)
        for panel, name in zip(panels.all(), ("sam", "ada"), strict=True):
            expect(panel.locator(".memws-status")).to_have_text("connected")
            panel.get_by_placeholder("Message", exact=True).fill(f"I am the friend of {name}")
            panel.get_by_placeholder("Message", exact=True).press("Enter")
            panel.locator(".memws-agent").wait_for()
        expect(panels.first.get_by_role("complementary")).to_be_visible()
        expect(panels.last.get_by_role("complementary")).to_have_count(0)  # compact: the conversation alone
        connection.close()
    expect(notebook.page.locator(".memws-static").first).to_be_hidden()
    notebook.page.evaluate("void jupyterapp.shell.currentWidget.sessionContext.restartKernel()")
    expect(panels.first.locator(".memws-status")).to_contain_text("the kernel does not answer", timeout=30_000)
