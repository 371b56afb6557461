"""Section 12, CLI: the command line as the processes that people start; its terminal client is in test_chat.py."""

import json
import logging
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from commandline import PROGRAM, Main, Serving, command, environment, run, sentence
from endpoint import Endpoint, Reply
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import memws

Patch = pytest.MonkeyPatch
TALK: list[dict[str, Any]] = [{"type": "command", "command": "create_agent", "config": {}}]
TALK += [{"type": "user_message", "message": "hi \x1b[31m\u202e"}]
BLOCK = """
import sys
for name in {names}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""
PACKAGES = ["openai", "httpx", "pydantic", "pydantic_core", "anyio", "json_repair", "ipywidgets", "nest_asyncio"]


def customized(folder: Path, code: str) -> dict[str, str]:
    """The environment of a Python that begins with this code."""
    (folder / "customized").mkdir()
    (folder / "customized" / "sitecustomize.py").write_text(code, "utf-8")
    return {"PYTHONPATH": str(folder / "customized")}


def requested(url: str, command: str, **fields: Any) -> Any:
    options = {name: fields.pop(name) for name in ("additional_headers", "origin") if name in fields}
    with connect(url, proxy=None, **options) as client:
        client.send(json.dumps({"type": "command", "command": command, **fields}))
        return json.loads(client.recv(timeout=10))["result"]


def hello(url: str, **options: Any) -> Any:
    return requested(url, "hello", **options)


def refused(url: str, **options: Any) -> int:
    """The HTTP status of a connection that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        hello(url, **options)
    return caught.value.response.status_code


FLAGS = {  # for each flag of serve a value that shows, and one that is bad or would show as well
    "--host": ("127.0.0.1", "0.0.0.0"),  # noqa: S104
    "--port": ("0", "70000"),
    "--db": (":memory:", "missing/x.db"),
    "--model": ("offline", "gpt-5.4-mini"),
    "--base-url": ("http://127.0.0.1:1/v1", "nonsense"),
    "--embedding-model": ("test-embedding", "x" * 201),
    "--context-window": ("9000", "-1"),
    "--max-steps": ("7", "0"),
    "--timezone": ("Asia/Tokyo", "Mars"),
    "--record": ("run.tape", "missing/run.tape"),
    "--replay": ("run.tape", "missing/run.tape"),
    "--token": ("right", "a b"),
    "--allow-origin": ("https://a.example, https://b.example", "https://other.example"),
    "--allow-host": ("lab.example", "other.example"),
    "--max-connections": ("12", "0"),
    "--sync": ("normal", "never"),
    "--idle-timeout": ("3.5", "-1"),
    "--advertise": ("ws://lab.example:8282", "lab.example"),
    "--log-level": ("error", "loud"),
}
COMMANDS: dict[str, list[str]] = {"serve": list(FLAGS), "chat": ["--url", "--agent", "--token"], "protocol": []}
COMMANDS |= {name: ["--db"] for name in ("check", "export", "backup")}
COMMANDS |= {"import": ["--name", "--db"], "vacuum": ["--keep-requests", "--db"], "copy": ["--from", "--to"]}


def variable(flag: str) -> str:
    return "MEMWS_" + flag[2:].upper().replace("-", "_")


def test_help(tmp_path: Path, main: Main) -> None:
    """Each command's help names each of its flags with its environment variable, and makes no file."""
    assert run("--version", cwd=tmp_path).stdout == f"memws {memws.__version__}\n"
    helps = [main(*words, "--help") for words in [(), *((name,) for name in COMMANDS)]]
    for done, flags in zip(helps, [list(FLAGS), *COMMANDS.values()], strict=True):
        assert (done.returncode, done.stderr) == (0, "")
        assert set(re.findall(r"^  (--[\w-]+)", done.stdout, re.MULTILINE)) - {"--version"} == set(flags)
        assert [flag for flag in flags if not re.search(rf"\b{variable(flag)}\b", done.stdout)] == []
    assert [word for word in COMMANDS if f"\n    {word} " not in helps[0].stdout] == []
    assert list(tmp_path.iterdir()) == []
    options = {f"--{option.name.replace('_', '-')}" for option in fields(memws.Options)} - {"--api-key"}
    assert set(FLAGS) == options | {"--log-level"}  # the table is whole


@pytest.mark.parametrize("way", ["flags", "variables"])
def test_flags_and_variables(way: str, tmp_path: Path) -> None:
    """Each flag of serve does what it says, has a variable MEMWS_<FLAG>, which may be a list, and wins over it."""
    others = ("--embedding-model", "--replay")  # which need an endpoint, and a tape
    flags = {flag: values for flag, values in FLAGS.items() if flag not in others}
    if way == "flags":
        words = [word for flag, (value, _) in flags.items() for each in value.split(", ") for word in (flag, each)]
        server = Serving(*words, cwd=tmp_path, variables={variable(flag): bad for flag, (_, bad) in flags.items()})
    else:
        server = Serving(cwd=tmp_path, variables={variable(flag): value for flag, (value, _) in flags.items()})
    right = {"Authorization": "Bearer right"}
    with server:
        about = hello(server.url, additional_headers=right)
        limits = {"max_steps": 7, "max_connections": 12}
        assert {name: about["limits"][name] for name in limits} == limits
        assert (about["model"], about["offline"]) == ("offline", True)
        assert server.url.startswith("ws://127.0.0.1:")
        assert refused(server.url) == 401
        for origin in ("https://a.example", "https://b.example"):
            assert hello(server.url, additional_headers=right, origin=origin)
        assert refused(server.url, additional_headers=right, origin="https://other.example") == 403
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: lab.example:1\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
        with memws.connect(server.url, "right") as client:
            client.create_agent()
            assert client.command("get_context")["window"] == 9000
            assert client.command("get_agent")["settings"]["timezone"] == "Asia/Tokyo"
        assert list(tmp_path.glob("*.db*")) == []  # :memory: keeps nothing
        assert server.end() == 0
    assert server.log == ""


def test_bad_values(main: Main) -> None:
    """A bad value is refused alike as a flag and as a variable; the sentence names what it came from."""
    free = ("--model", "--allow-origin", "--allow-host")
    bad = {flag: value for flag, (_, value) in FLAGS.items() if flag not in free} | {"--port": "http"}
    rest = {"MEMWS_PORT": "0", "MEMWS_DB": ":memory:"}
    for flag, value in bad.items():
        for words, variables in (((flag, value), {}), ((), {variable(flag): value})):
            text = sentence(main("serve", *words, variables=rest | variables))
            if flag != "--host":  # there, what is missing is the token
                assert re.search(flag[2:].replace("-", "[-_ ]"), text, re.IGNORECASE), (flag, text)
            assert flag != "--port" or "MEMWS_PORT" in text


def test_serving(tmp_path: Path) -> None:
    """The first lines tell address, model and database; localhost and /healthz answer; files are their owner's only."""
    addresses = ["127.0.0.1"]
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        addresses.append("[::1]")  # where there is IPv6
    with Serving(cwd=tmp_path, variables={"MEMWS_MAX_STEPS": "", "MEMWS_TOKEN": ""}) as server:
        assert re.fullmatch(rf"memws {memws.__version__} listening on ws://127\.0\.0\.1:[1-9]\d*", server.out[0])
        for address in addresses:
            assert hello(f"ws://{address}:{server.port}")["limits"]["max_steps"] == memws.MAX_STEPS
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{server.port}/healthz", timeout=10) as response:
            assert json.load(response) == {"status": "ok", "version": memws.__version__}
        requested(server.url, "create_agent", config={})
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("memws.db*")}
        assert set(modes) >= {"memws.db", "memws.db-wal", "memws.db.lock"}
        assert set(modes.values()) == {0o600}
        server.end()
    assert server.out[1] == f"open http://127.0.0.1:{server.port}/"
    assert "not a language model" in server.out[2]
    assert "memws.db" in server.out[2]
    assert server.log.count("Traceback") == 0


REFUSALS = [
    *(([*words, "--frobnicate"], "--frobnicate") for words in ([], ["serve"], ["chat"])),
    *(([*words, "frobnicate"], "frobnicate") for words in ([], ["protocol"])),
    (["--port"], "--port"),
    (["--port", "0", "--db", "missing/x.db"], "No such file or directory"),
    (["--port", "0", "--db", "."], "cannot use the database '.' (unable to open database file); stop the memws server"),
    (["--port", "0", "--host", "nowhere.invalid", "--token", "x"], "choose another host or port"),
    (["--port", "0", "--host", "192.0.2.1", "--token", "x"], "choose another host or port"),
    *((["--port", "0", "--model", name], "--base-url") for name in ("gpt-5.4-mini", "claude-opus-5-5", "qwen3:8b")),
    (["--port", "0", "--embedding-model", "x"], "--base-url"),
    *((["--port", "0", flag, ""], f"{flag[2:]}: expected") for flag in ("--model", "--token")),
    (["--port", "0", "--base-url", ""], "base_url: expected"),
    (["export", "nobody"], "unknown agent 'nobody'"),
    (["export"], "name"),
    (["copy"], "--from, --to"),
    (["copy", "--from", "memws.db"], "required: --to"),
    (["copy", "--to", "memws.db"], "required: --from"),
    (["export", "sam", "missing/x"], "missing"),
    *(([*word.split(), "--db", "missing.db"], "missing.db") for word in ("export sam", "check", "vacuum", "backup x")),
    (["vacuum", "--db", "text.db"], "text.db"),
    *((["vacuum", "--keep-requests", days], "--keep-requests") for days in ("-1", "nan", "1e9", "inf", "many", "")),
    (["backup", "missing/copy.db"], "missing"),
    (["backup", "memws.db"], "memws.db"),
    (["import", "list.json"], "exported"),
    *((["import", name], name) for name in ("missing.json", "text.db", "deep.json", "cut.json")),
]
WRONG = {
    "--allow-origin": ["nonsense", "", ",", "*", "https://", "https://*", "https://lab.example/app", "lab.example"],
    "--allow-host": ["", "http://lab.example", "*", "a b", "a/b"],
    "--base-url": ["localhost:1/v1", "file:///etc/passwd", "http://", "http://127.0.0.1:1/v1", "http://[::1"],
    "--db": ["text.db/x", ""],
}
NOT_OURS = {
    "text.db": "cannot use the database 'text.db' (file is not a database",
    "junk.db": "cannot use the database 'junk.db' (",
    "foreign.db": "'foreign.db' is a database of another program; name another",
    "v2.db": "'v2.db' was written by another memws (schema 2, not 3); name another one",
    "v99.db": "'v99.db' was written by another memws (schema 99, not 3); name another one",
}
REFUSALS += [([command, "--db", name], text) for name, text in NOT_OURS.items() for command in ("serve", "check")]
REFUSALS += [(["--port", "0", flag, value], flag) for flag, values in WRONG.items() for value in values]


def test_refusals(tmp_path: Path, main: Main, monkeypatch: Patch) -> None:
    """What cannot be is one sentence that says what to do next, with exit status 2, and nothing is made or changed."""
    texts = {"text.db": "this is a diary and no database\n" * 40, "list.json": "[1]", "deep.json": "[" * 100_000}
    for name, text in (texts | {"cut.json": '{"agent": {"name": "sam"'}).items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "junk.db").write_bytes(random.Random(1).randbytes(50_000))
    ours = "PRAGMA application_id = 0x6D656D77; PRAGMA user_version = "
    for name, sql in {"foreign.db": "", "v2.db": f"{ours} 2;", "v99.db": f"{ours} 99;"}.items():
        with closing(sqlite3.connect(name)) as connection:
            connection.executescript(f"{sql} CREATE TABLE agents (x)")
    with closing(memws.Sqlite("memws.db")) as database:
        memws.create_agent(database.open(), memws.AgentRecord("sam", {}, []))

    def content() -> dict[str, bytes]:
        paths = [path for path in tmp_path.iterdir() if not path.name.startswith(("memws.db-", "memws.db."))]
        return {path.name: path.read_bytes() for path in paths}

    before = content()
    for words, text in REFUSALS:
        assert text in sentence(main(*words, variables={"MEMWS_PORT": "0"})), words
    for key in ("sk-ab\rcd", "sk-schlüssel"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        text = sentence(main("--port", "0"))
        assert "OPENAI_API_KEY: expected" in text
        assert "sk" not in text
    assert content() == before
    assert "--frobnicate" in sentence(run("--frobnicate", cwd=tmp_path))  # so does a process


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ("--model gpt-5.4-mini", "openai"), ("", "openai"), ("--embedding-model x", "numpy"), ("", "websockets"),
        ("--db postgresql://ada:secret@127.0.0.1/x", "psycopg"),
    ],
)  # fmt: skip
def test_missing_package(flags: str, package: str, tmp_path: Path) -> None:
    """What needs a package that is not there names the command that installs it."""
    variables = {**customized(tmp_path, BLOCK.format(names=[package])), "OPENAI_API_KEY": "k"}
    said = sentence(run("--port", "0", *flags.split(), cwd=tmp_path, variables=variables))
    assert (bool(re.search(rf"pip install .*{package}", said)), "secret" in said) == (True, False)


CHOICES: list[tuple[Any, str]] = [  # the models of an endpoint, or what it answers instead
    ((), "serves 0 models"), (("a", "b"), "choose one with --model; they are: a, b"),
    (tuple(f"model-{n}" for n in range(200)), "serves 200 models"), (("evil\x1b[2J\nname", "b"), "b"),
    (Reply(status=401), "--model"), (Reply(status=500, body="<html>"), "--model"), (Reply(hold=True), "--base-url"),
    (Reply(body={"data": [{"id": 5}]}), "--model"), (Reply(body="[" * 100_000), "--model"),
]  # fmt: skip


@pytest.mark.parametrize(("models", "text"), CHOICES)
def test_endpoint_without_a_choice(models: Any, text: str, tmp_path: Path, main: Main, monkeypatch: Patch) -> None:
    """Where a base URL does not serve exactly one model, or nothing, the sentence has the list or the way."""
    monkeypatch.setattr(memws, "CONNECT_TIMEOUT", 0.3 if text == "--base-url" else 5.0)
    with Endpoint(models=() if isinstance(models, Reply) else models) as endpoint:
        if isinstance(models, Reply):
            endpoint.overrides["/v1/models"] = models
        done = main("--port", "0", "--base-url", endpoint.url)
    assert text in sentence(done)
    assert "\x1b" not in done.stderr
    assert list(tmp_path.iterdir()) == []


COPIES = """
import one, two
first = one.WebSocketServer(port=0, db='memws.db').start()
second = two.WebSocketServer(port=0, db='two.db').start()
second.create_new_agent({'name': 'bob'})
for module, server in ((two, first), (one, second)):
    with module.connect(server.url) as client:
        (agent,) = client.command('list_agents')['agents']
        client.load_agent(agent['agent_name'])
        print(agent['agent_name'], client.ask('What do I love?'))
    server.stop()
"""


def test_copied_alone(tmp_path: Path) -> None:
    """The file alone, renamed, in an empty folder, without any package but websockets: serves, chats and imports; two
    copies in one process serve side by side and do not meet."""
    folder, alone = tmp_path / "empty", customized(tmp_path, BLOCK.format(names=PACKAGES))
    folder.mkdir()
    program, _ = (Path(shutil.copy(PROGRAM, folder / name)) for name in ("one.py", "two.py"))
    with Serving(cwd=folder, program=program, variables=alone) as server:
        words = ("chat", "--url", server.url, "--agent", "ada")
        done = run(*words, cwd=folder, text="I love otters", program=program, variables=alone)
        assert (done.returncode, "otters" in done.stdout, server.end()) == (0, True, 0)
    done = run(COPIES, program=Path("-c"), cwd=folder, variables=alone, timeout=60)
    assert done.returncode == 0, done.stderr
    ada, bob = done.stdout.splitlines()
    assert (ada[:4], "otters" in ada, bob[:4], "otters" in bob) == ("ada ", True, "bob ", False)


def test_logs(tmp_path: Path) -> None:
    """At any log level no line holds the token, the key or a bare control character, whatever an endpoint sends."""
    text = "Incorrect API key: canary-key-0123 (sk-canary-other-0123456789). \x1b[2J\r\nforged line"
    echo = {"error": {"message": text}}
    flags = ("--log-level", "debug", "--token", "canary-token", "--db", ":memory:", "--context-window", "9000")
    frames: list[str] = []
    with Endpoint() as endpoint:
        bad = [Reply(status=400, body=echo), Reply(error_in_stream=echo["error"]), *[Reply(status=500, body=echo)] * 9]
        endpoint.script(*bad)
        key = {"OPENAI_API_KEY": "canary-key-0123"}
        with Serving(*flags, "--base-url", endpoint.url, cwd=tmp_path, variables=key) as server:
            for path, headers in (("/?token=canary-token", {}), ("/", {"Authorization": "Bearer canary-token"})):
                with connect(server.url + path, proxy=None, additional_headers=headers) as client:
                    client.send("\x1b[2Jno json canary\nforged")
                    for frame in TALK:
                        client.send(json.dumps(frame))
                    while not frames or '"agent_response_error"' not in frames[-1]:
                        frames.append(str(client.recv(timeout=20)))
                    frames.append("")
            assert refused(server.url + "/?token=canary-tokem%1b") == 401
            assert server.end() == 0
    assert server.log
    assert [line for line in server.log.splitlines() if not re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ ", line)] == []
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", server.log) is None
    for secret in ("canary-toke", "canary-key", "sk-canary"):
        assert secret not in server.log + "".join(frames) + "\n".join(server.out)


def test_log_lines(monkeypatch: Patch) -> None:
    """Token, key, what looks like one, and control characters are kept out of messages and of tracebacks alike."""
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
    words = "canary-token canary-key sk-canary-0123456789 gsk_0canary123 \x1b[2J\u202e\x9b2J\rforged"
    try:
        raise ValueError(words + "\n2026-01-01 00:00:00,000 INFO forged")
    except ValueError:
        record = logging.LogRecord("memws", logging.ERROR, "", 0, "%s\nforged", (words,), sys.exc_info())
    text = memws._LogFormatter("canary-token").format(record)
    assert "ValueError" in text
    assert "canary" not in text
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text) is None
    assert re.findall(r"^(?:\d{4}-|forged).*", text, re.MULTILINE) == [text.splitlines()[0]]


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Pipe a text into chat, of a server without a key."""
    with Serving(cwd=tmp_path) as server:
        yield lambda text, *flags: run("chat", "--url", server.url, *flags, cwd=tmp_path, text=text)


def test_pipe(piped: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Piped input is one message and its reply the only output; an unknown agent is created, and that is said."""
    assert piped("hi").stderr == "there was no agent 'sam'; it has been created\n"  # where none is named or there
    done = piped("My name is Ada\nand I live in Oslo\n", "--agent", "ana")
    assert done.returncode == 0
    assert done.stderr == "there was no agent 'ana'; it has been created\n"
    assert "Ada" in done.stdout
    again = piped("Where do I live?")  # no agent named: the one that was active last
    assert (again.returncode, again.stderr) == (0, "")
    assert "Oslo" in again.stdout
    too_long = "x" * (memws.MAX_TEXT + 1)
    for text, flags in (("", ()), (" \n\n", ()), ("hi", ("--agent", "../etc")), (too_long, ("--agent", "sam"))):
        failed = piped(text, *flags)
        assert (failed.returncode, failed.stdout) == (1, "")
        assert re.fullmatch(r"memws: [^\n]+\n", failed.stderr)


def test_pipe_of_an_error(tmp_path: Path, endpoint: Endpoint) -> None:
    """A turn that fails is one sentence on standard error, with control characters escaped."""
    endpoint.script(Reply(status=401, body={"error": {"message": "\x1b[2Jno", "code": "invalid_api_key"}}))
    with Serving("--base-url", endpoint.url, "--db", ":memory:", cwd=tmp_path) as server:
        done = run("chat", "--url", server.url, "--agent", "sam", cwd=tmp_path, text="hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 2  # the agent was created; the error
    assert "\x1b" not in done.stderr


def test_chat_flags_and_variables(tmp_path: Path) -> None:
    """Every flag of chat has a variable, and wins over it; without a server or the token it says what to do."""
    nowhere = "ws://127.0.0.1:1"
    with Serving("--token", "right", cwd=tmp_path) as server:

        def chat(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
            return run("chat", *flags, cwd=tmp_path, text="hi", variables=variables)

        first = chat(MEMWS_URL=server.url, MEMWS_AGENT="ada", MEMWS_TOKEN="right")
        assert first.stderr == "there was no agent 'ada'; it has been created\n"
        flags = ("--url", server.url, "--agent", "ada", "--token", "right")
        second = chat(*flags, MEMWS_URL=nowhere, MEMWS_AGENT="bob", MEMWS_TOKEN="wrong")
        assert (second.returncode, second.stderr) == (0, "")
        wrong = chat("--url", server.url, MEMWS_TOKEN="wrong")
        assert "--token or MEMWS_TOKEN" in sentence(wrong)
        assert "start the server with `python memws.py`" in sentence(chat("--url", nowhere))


def shell(words: list[str], then: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command line with something behind it, which gets `hi` to read."""
    options: dict[str, Any] = {"env": environment({"PYTHONUNBUFFERED": ""}), "encoding": "utf-8", "timeout": 30}
    line = f"{shlex.join(command(*words))} {then}"
    return subprocess.run(["/bin/sh", "-c", line], cwd=cwd, input="hi", capture_output=True, check=False, **options)


def test_reader_that_left(tmp_path: Path, serve: Callable[..., Any]) -> None:
    """chat whose reader has left ends without a traceback, and has sent what it was given."""
    server = serve()
    assert "Traceback" not in shell(["chat", "--url", server.url, "--agent", "sam"], "| true", tmp_path).stderr
    with memws.connect(server.url) as client:
        assert client.command("get_messages", agent_name="sam")["total"] > 1


@pytest.mark.parametrize("words", [["protocol"], ["check"], ["--port", "0", "--db", ":memory:"]])
def test_full_output(words: list[str], tmp_path: Path, serve: Callable[..., Any]) -> None:
    """A standard output that takes nothing more is one sentence, not a traceback."""
    server = serve()
    for number in range(80 if words == ["check"] else 0):  # more than a buffer holds
        server.create_new_agent({"name": f"{number:x>64}"})
    assert "No space left on device" in sentence(shell(words, "> /dev/full", tmp_path))


# What Windows has not, and Ctrl-Break, with which programs stop others there.
WINDOWS = """
import asyncio.unix_events, signal, sys
def refuse(*_): raise NotImplementedError
asyncio.unix_events._UnixSelectorEventLoop.add_signal_handler = refuse
signal.SIGBREAK = signal.SIGUSR1
for name in ("fcntl", "readline", "resource", "termios"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_stop_as_on_windows(number: int, tmp_path: Path, endpoint: Endpoint) -> None:
    """Without Unix' modules and signal handlers a stop, too, interrupts turns, closes with 1001 and frees the files."""
    endpoint.script(Reply("never told", hold=True))
    serving = Serving("--base-url", endpoint.url, cwd=tmp_path, variables=customized(tmp_path, WINDOWS))
    with serving as server, connect(server.url, proxy=None) as client:
        for frame in TALK:
            client.send(json.dumps(frame))
        endpoint.wait_requests(1)
        assert server.end(number) == 0
        assert json.loads(list(client)[-1])["stop_reason"] == "interrupted"
        assert client.close_code == 1001
    with closing(memws.Sqlite(str(tmp_path / "memws.db"))) as database:
        database.open()  # nobody holds the lock


# Runs started in the background of a shell ignore SIGINT, and so would their children.
HEED = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"


def test_interrupted_chat(tmp_path: Path, endpoint: Endpoint) -> None:
    """Ctrl-C ends a waiting chat with status 130 and cancels its turn."""
    endpoint.script(Reply("never told", hold=True))
    with Serving("--base-url", endpoint.url, "--db", ":memory:", cwd=tmp_path) as server:
        words = [sys.executable, "-c", HEED, *command("chat", "--url", server.url, "--agent", "sam")]
        with subprocess.Popen(words, cwd=tmp_path, env=environment(), stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            process.stdin.write(b"hi")
            process.stdin.close()
            endpoint.wait_requests(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
        with memws.connect(server.url) as client:
            ends = (event for event in client.subscribe("sam", after=0) if "stop_reason" in event)
            assert next(ends)["stop_reason"] == "cancelled"
