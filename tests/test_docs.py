"""What the documentation says is true: README's commands and code run, its tables and the header are the module's."""

import ast
import asyncio
import inspect
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import PROGRAM, Serving, command, environment, run
from endpoint import Endpoint
from terminal import Terminal
from test_errors import COMMAND_CODES, REQUEST_CODES, TURN_CODES

import memws

Patch = pytest.MonkeyPatch
ROOT = PROGRAM.parent
README = (ROOT / "README.md").read_text("utf-8")
SOURCE = PROGRAM.read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def rows(*headings: str) -> list[list[str]]:
    """The cells of README's table with these headings, row by row."""
    head = re.escape("| " + " | ".join(headings) + " |\n")
    table = re.search(rf"^{head}\|[-|]+\|\n((?:\|.*\|\n)+)", README, re.MULTILINE)
    assert table is not None, headings
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def code(cell: str) -> list[str]:
    """What stands in a cell as code."""
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.anyio
async def test_python_blocks(tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    """README's Python blocks run one after the other, as cells of a notebook, and print what stands below them."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = re.findall(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", README, re.MULTILINE | re.DOTALL)
    assert len(found) == len(blocks("python"))
    assert sum(1 for _, expected in found if expected) == len(blocks("text"))
    try:
        for text, expected in [found[0], *found]:  # the first one twice: a cell can be run again
            cell = compile(text.replace("8282", port), "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            result = eval(cell, namespace)  # noqa: S307
            if inspect.iscoroutine(result):
                await asyncio.wait_for(result, 30)
            printed = capsys.readouterr().out
            assert not expected or printed == expected
            assert printed or "print" not in text
    finally:
        if "server" in namespace:
            namespace["server"].stop()


def test_conversation(tmp_path: Path) -> None:
    """README's first block is what a terminal shows, to the letter; the piped message that it shows is answered."""
    (session,) = blocks("console")
    (piped,) = re.findall(r'`echo "([^"]+)" \| python memws\.py chat --agent sam`', README)
    typed = re.findall(r"^sam> (.*)$", session, re.MULTILINE)
    assert session.startswith("$ python memws.py chat\n")
    variables = environment({"HOME": str(tmp_path), "NO_COLOR": "1"})
    with Serving(cwd=tmp_path) as server:
        words = command("chat", "--url", server.url)
        with Terminal(words, cwd=tmp_path, variables=variables) as chat:
            chat.expect("[Y/n] ")
            chat.line("y")
            for line in typed:
                chat.expect("sam> ")
                chat.line(line)
            assert chat.wait() == 0
        assert "otters" in run("chat", "--url", server.url, "--agent", "sam", cwd=tmp_path, text=piped).stdout
        shown = re.sub(r"\x1b\[\?2004(h|l\r)", "", chat.seen)  # asks for pastes in one piece
        shown = shown.replace("\r\n", "\n").replace(server.url, "ws://localhost:8282")
    assert shown == session.partition("\n")[2]


def test_javascript_block(tmp_path: Path) -> None:
    """README's JavaScript has at most fifteen lines, asks for events that there are, and talks in Playwright's Node."""
    (script,) = blocks("js")
    assert len(script.splitlines()) <= 15
    assert {"assistant_message", "delta"} <= set(re.findall(r'"(\w+)"', script)) & set(memws.EVENTS)
    words = [Path(pytest.importorskip("playwright").__file__).parent / "driver" / "node", "-e"]
    with Serving(cwd=tmp_path) as server:
        words.append(script.replace("ws://localhost:8282", server.url))
        done = subprocess.run(words, capture_output=True, cwd=tmp_path, encoding="utf-8", timeout=30, check=False)
    assert (done.returncode, done.stderr, "Ada" in done.stdout) == (0, "", True)


INSTALL = ["pip", "install", "-r", "requirements.txt"]
# .ci/run does the first two; the browser tests open the notebook of the last.
OTHER_COMMANDS = [INSTALL, ["python", "-m", "pytest"], [*INSTALL, "jupyterlab"]]
OTHER_COMMANDS += [["python3", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]]  # the suite runs in such a one
OTHER_COMMANDS += [["jupyter", "lab", "notebooks/01_quickstart.ipynb"]]
OTHER_COMMANDS += [["pip", "install", "psycopg[binary]"]]


def commands() -> Iterator[tuple[dict[str, str], list[str]]]:
    """(variables exported so far in its block, words behind `python memws.py`) of README's command lines."""
    for block in blocks("sh"):
        variables = {}
        for line in filter(None, (line.partition("#")[0] for line in block.splitlines())):
            for words in map(shlex.split, line.split("&&")):
                if words[0] == "export":
                    variables = dict(word.split("=", 1) for word in words[1:])
                elif words[:2] == ["python", "memws.py"]:
                    yield variables, words[2:]
                else:
                    assert words in OTHER_COMMANDS, line


SHARED = [words for _, words in commands() if any(word.startswith(memws.POSTGRES) for word in words)]
SERVES = [(variables, words) for variables, words in commands() if words[:1] != ["chat"] and words not in SHARED]


@pytest.mark.parametrize(("variables", "words"), SERVES, ids=[" ".join(words) or "serve" for _, words in SERVES])
def test_serve_commands(variables: dict[str, str], words: list[str], tmp_path: Path) -> None:
    """Each of README's commands that serve does serve, with the model that it names."""
    with Endpoint(models=["only"]) as endpoint:
        flags = [endpoint.url if word.startswith("http") else word for word in words]
        keys = {name: value.replace("…", "0") for name, value in variables.items()}
        with Serving(*flags, cwd=tmp_path, variables=keys) as server, memws.connect(server.url) as client:
            about = client.hello()
            default = "only" if "--base-url" in words else memws.DEFAULT_MODEL if variables else "offline"
            assert about["model"] == (words[words.index("--model") + 1] if "--model" in words else default)
            if "--context-window" in words:
                client.create_agent()
                assert str(client.command("get_context")["window"]) == words[words.index("--context-window") + 1]


@pytest.mark.parametrize("words", SHARED, ids=" ".join)
def test_commands_of_several_servers(words: list[str]) -> None:
    """Each has the flags that README gives it."""
    assert memws.make_parser().parse_args(words if words[0] == "copy" else ["serve", *words])


ADDRESSES = [word for _, words in SERVES for word in words if word.startswith("https://")]


def test_commands_are_complete() -> None:
    """README has the commands to install and serve, to chat and to test, and one for each endpoint that people use."""
    for name in ("azure", "anthropic", "googleapis", "openrouter", "groq", "mistral", "deepseek"):
        assert any(name in address for address in ADDRESSES), name
    for port in (11434, 8000, 8080, 1234, 4000):
        assert any(f"http://localhost:{port}" in word for _, words in SERVES for word in words), port
    text = "".join(blocks("sh"))
    venv, activate = "python3 -m venv .venv", ". .venv/bin/activate"  # Debian has no `python`, and its pip refuses
    install = f"{venv} && {activate} && pip install -r requirements.txt && python memws.py\n"
    assert text.startswith(f"{install}# and in another terminal:\n{activate} && python memws.py chat\n")
    windows = ["py -m venv .venv", r".venv\Scripts\pip install -r requirements.txt", r".venv\Scripts\python memws.py"]
    assert all(f"`{words}`" in README.partition("```python")[0] for words in windows)
    assert "pip install -r requirements.txt && python -m pytest\n" in text
    assert {"OPENAI_API_KEY"} == {name for variables, _ in SERVES for name in variables}


def test_events_table() -> None:
    """README's table of events names each message type, which are live, and the fields of each."""
    table = rows("message_type", "tells", "fields of its own")
    assert [code(name)[0] for name, _, _ in table] == list(memws.EVENTS)
    for name, _, own in table:
        assert ("(live)" in name) == (code(name)[0] in memws.LIVE_TYPES), name
        assert set(code(own)) == set(memws.EVENTS[code(name)[0]][1]), name
    assert [code(name)[0] for name, _, _ in table[:3]] == list(memws.CLASSIC_TYPES)


def test_requests_table() -> None:
    """README's table of commands names each command, its arguments, and what its result holds."""
    table = rows("command", "arguments", "result")
    assert {code(name)[0] for name, _, _ in table} | {"user_message"} == set(memws.known_commands())
    for name, arguments, result in table:
        function = memws.known_commands()[code(name)[0]]
        assert set(code(arguments)) | {"agent_name"} >= set(function.parameters["properties"]), name
        assert set(code(arguments)) <= set(function.parameters["properties"]), name
        told = re.search(r"Result: \{(.*)\}", " ".join((inspect.getdoc(function.call) or "").split()))
        for key in re.sub(r": \[\{.*?\}\]|:.*", "", told[1]).split(", ") if told else ():
            assert re.search(rf"\b{key}\b", result), (name, key)


def test_fields_and_codes() -> None:
    """README names the fields of a message, what a busy agent does, all codes (test_errors.py) and all corrections."""
    about = README[README.index("A message is `") : README.index("| command | arguments")]
    properties = memws.known_commands()["user_message"].parameters["properties"]
    assert set(properties) <= set(re.findall(r"\w+", about))
    assert set(properties["when_busy"]["enum"]) <= set(code(about))
    listed = [set(code(cells)) for _, cells in rows("where", "codes")]
    assert listed == [REQUEST_CODES, {*COMMAND_CODES, "cancelled"}, set(TURN_CODES)]
    listed = {name for cells in rows("`what`", "an answer with", "becomes") for name in code(cells[0])}
    made = set(re.findall(r'corrections[^\n]*?\("(\w+)",|"correction", .*what(?:=|": )"(\w+)"', SOURCE))
    assert listed == {*map("".join, made), *memws._FAULTS, "cut", "bad_output"}


def test_command_line_table(tmp_path: Path) -> None:
    """README's table of the command line names each command that --help lists."""
    words = [code(line)[0].removeprefix("python memws.py").split() for line, _ in rows("command", "does")]
    listed = re.search(r"^commands:\n(.*?)^\S", run("--help", cwd=tmp_path).stdout + "\n.", re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = [line.split()[0] for line in listed[1].splitlines() if re.match(r"    \w", line)]
    assert {word[0] for word in words if word} | {"serve"} == set(found)
    assert [word[1] for word in words if len(word) > 1] == ["NAME", "FILE", "FILE", "--from"]
    assert README.count("\n") <= 400


def test_numbers() -> None:
    """The stop reasons, close codes and numbers in README's sentences are the module's."""
    (reasons,) = re.findall(r"The `stop_reason` of a turn that did not fail: ((?:`\w+`[,.]\s*)+)", README)
    assert code(reasons) == list(memws.STOP_REASONS)
    listed = {int(number) for number, _ in rows("close code", "when") for number in re.findall(r"\d+", number)}
    assert listed == {1001, 1002, 1007, 1009, 1013}
    assert memws.MAX_FRAME == 2**20
    assert set(re.findall(r"(\d+) MiB", README)) == {"1"}
    assert f"`DEFAULT_PORT` | the same, {memws.DEFAULT_PORT} |" in README
    assert f"Python {'.'.join(re.findall(r'requires-python = .>=([0-9.]+)', SOURCE))} or newer" in README
    assert f"### {memws.__version__}\n" in README
    (text,) = re.findall(r"^`config`, all of it optional: (.*?)\n\n", README, re.MULTILINE | re.DOTALL)
    bundled = set(memws.PERSONAS) | set(memws.HUMANS)
    functions = [memws.function_of(each) for each in (memws.Config, memws.core_memory, memws.Settings)]
    keys = {"name"}.union(*(function.parameters["properties"] for function in functions))
    assert set(code(text)) == keys | bundled


ANCESTOR = set(  # the names of MemGPT 0.2.7's websocket server, interface, protocol and constants
    """
    WebSocketServer run_step handle_client create_new_agent load_agent initialize_server start_server run
    host port interface agent agent_name DEFAULT_PORT CLIENT_TIMEOUT
    SyncWebSocketInterface register_client unregister_client user_message internal_monologue assistant_message
    function_message close
    server_error server_command_response server_agent_response_error server_agent_response_start
    server_agent_response_end server_agent_internal_monologue server_agent_assistant_message
    server_agent_function_message client_user_message client_command_create client_command_load
    """.split()  # noqa: SIM905 (a list of words reads better as words)
)


def test_crosswalk() -> None:
    """README's crosswalk has each name of MemGPT 0.2.7, and what it calls the same is there."""
    table = rows("MemGPT 0.2.7", "here")
    server = inspect.getsource(memws.WebSocketServer)
    listed = {name for left, _ in table for each in code(left) for name in re.findall(r"\w+", each.partition("(")[0])}
    assert listed - {"websocket_server"} == ANCESTOR
    for left, right in table:
        for name in (each.partition("(")[0] for each in code(left)) if right.startswith("the same") else ():
            holders = [memws.WebSocketServer, memws]
            assert re.search(rf"self\.{name}\b", server) or any(hasattr(each, name) for each in holders), name
        for name in re.findall(r"`client\.(\w+)\(", right):
            assert hasattr(memws.Client, name)
        for name in re.findall(r"`server\.(\w+)", right):
            assert re.search(rf"self\.{name}\b", server) or hasattr(memws.WebSocketServer, name)


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return [line.replace('"', "'") for line in lines if line and not line.startswith("#")]


def test_script_metadata() -> None:
    """The file's packages are requirements.txt less pytest, its public names are told of, README names no machine."""
    head = SOURCE.partition('"""')[0]
    listed = re.search(r"^# dependencies = \[\n(.*?)^# \]$", head, re.MULTILINE | re.DOTALL)
    assert listed is not None
    found = [line.strip('# ,\n"') for line in listed[1].splitlines()]
    assert found == [line for line in requirements("requirements.txt") if not line.startswith("pytest")]
    assert "# /// script\n" in head
    assert head.rstrip().endswith("# ///")
    assert f"memws {memws.__version__}" in head
    names = [re.match(r"[\w-]+", line)[0] for line in requirements("requirements.txt")]  # type: ignore[index]
    wanted = "anywidget ipywidgets json-repair nest-asyncio nest-asyncio2 openai pytest tzdata websockets"
    assert " ".join(sorted(names)) == wanted
    assert memws.__doc__ is not None
    shown = re.findall(r"^    python memws\.py(.*?)  ", memws.__doc__, re.MULTILINE)
    words = [word for line in shown for word in line.split()]
    assert words == ["chat", "--help"]
    assert [name for name in memws.__all__ if inspect.getdoc(getattr(memws, name)) is None] == []
    addresses = re.findall(r"https?://(?!localhost|memws;)\S+", README)
    assert [*re.findall(r"/(?:home|root|work|tmp|Users)/", README), *addresses] == ADDRESSES
