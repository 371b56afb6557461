"""Section 12, CLI: the command line as the processes that people start; its terminal client is in test_chat.py."""

import json
import logging
import os
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commandline import PROGRAM, Serving, command, environment, run
from endpoint import Endpoint, Reply
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import memws

BLOCK = """
import sys
for name in {names}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""
PACKAGES = ["openai", "httpx", "pydantic", "pydantic_core", "anyio", "ipywidgets", "nest_asyncio", "nest_asyncio2"]


def without(folder: Path, *names: str) -> dict[str, str]:
    """The environment of a Python that lacks these packages."""
    (folder / "blocked").mkdir()
    (folder / "blocked" / "sitecustomize.py").write_text(BLOCK.format(names=list(names)), "utf-8")
    return {"PYTHONPATH": str(folder / "blocked")}


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What was refused with exit status 2 and one sentence, and nothing else."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"memws: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


def hello(url: str, **options: Any) -> dict[str, Any]:
    return requested(url, {"type": "command", "command": "hello"}, **options)["result"]


def requested(url: str, request: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The answer to one request."""
    with connect(url, proxy=None, **options) as socket:
        socket.send(json.dumps(request))
        return json.loads(socket.recv(timeout=10))


def refused(url: str, **options: Any) -> int:
    """The HTTP status of a connection that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        hello(url, **options)
    return caught.value.response.status_code


# ---- help and flags --------------------------------------------------------------------------------------------------


def test_version(tmp_path: Path) -> None:
    """--version names the version."""
    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"memws {memws.__version__}\n", "")


COMMANDS = {"serve": None, "chat": ["--url", "--agent", "--token"], "protocol": [], "check": ["--db", "--repair"]}
COMMANDS |= {name: ["--db"] for name in ("export", "import", "backup")}
"""The commands and their flags; of serve, the table FLAGS."""


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help(name: str | None, tmp_path: Path) -> None:
    """Each command's help names each of its flags with its environment variable, and makes no file."""
    done = run(*([name] if name else []), "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    flags = (COMMANDS[name] if name else None) or list(FLAGS if name in (None, "serve") else [])
    assert set(re.findall(r"^  (--[\w-]+)", done.stdout, re.MULTILINE)) - {"--version"} == set(flags)
    assert [flag for flag in flags if flag != "--repair" and not re.search(rf"\b{variable(flag)}\b", done.stdout)] == []
    if name is None:
        assert [word for word in COMMANDS if f"\n    {word} " not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []


FLAGS = {
    "--host": ("127.0.0.1", "0.0.0.0"),  # noqa: S104
    "--port": ("0", "70000"),
    "--db": (":memory:", "missing/x.db"),
    "--model": ("offline", "gpt-5.4-mini"),
    "--base-url": ("http://127.0.0.1:1/v1", "nonsense"),
    "--embedding-model": ("test-embedding", "x" * 201),
    "--context-window": ("9000", "-1"),
    "--max-steps": ("7", "0"),
    "--token": ("right", "a b"),
    "--allow-origin": ("https://lab.example", "https://other.example"),
    "--allow-host": ("lab.example", "other.example"),
    "--rate-limit": ("11", "-1"),
    "--max-connections": ("12", "0"),
    "--sync": ("normal", "never"),
    "--idle-timeout": ("3.5", "-1"),
    "--log-level": ("error", "loud"),
}
"""For each flag of serve a value that shows, and one that is bad or would show as well."""


def variable(flag: str) -> str:
    return "MEMWS_" + flag[2:].upper().replace("-", "_")


@pytest.fixture(params=["flags", "variables"])
def configured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Serving]:
    """A server with every flag given; once as flags over contrary variables, once as variables."""
    flags = {flag: values for flag, values in FLAGS.items() if flag != "--embedding-model"}  # needs numpy
    if request.param == "flags":
        words = [word for flag, (value, _) in flags.items() for word in (flag, value)]
        server = Serving(*words, cwd=tmp_path, variables={variable(flag): bad for flag, (_, bad) in flags.items()})
    else:
        server = Serving(cwd=tmp_path, variables={variable(flag): value for flag, (value, _) in flags.items()})
    with server:
        yield server


def test_flags_and_variables(configured: Serving) -> None:
    """Every flag of serve has a variable MEMWS_<FLAG>, does what it says, and wins over its variable."""
    right = {"Authorization": "Bearer right"}
    about = hello(configured.url, additional_headers=right)
    limits = {"max_steps": 7, "rate_limit": 11, "max_connections": 12}
    assert {name: about["limits"][name] for name in limits} == limits
    assert (about["model"], about["offline"]) == ("offline", True)
    assert configured.url.startswith("ws://127.0.0.1:")
    assert refused(configured.url) == 401
    assert hello(configured.url, additional_headers=right, origin="https://lab.example")
    assert refused(configured.url, additional_headers=right, origin="https://other.example") == 403
    with socket.create_connection(("127.0.0.1", configured.port)) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\nHost: lab.example:1\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 200")
    with connect(configured.url, proxy=None, additional_headers=right) as client:
        client.send(json.dumps({"type": "command", "command": "create_agent", "config": {}}))
        client.send(json.dumps({"type": "command", "command": "get_context"}))
        client.recv(timeout=10)
        assert json.loads(client.recv(timeout=10))["result"]["window"] == 9000
    assert list(configured.cwd.glob("*.db*")) == []
    assert configured.end() == 0
    assert configured.log == ""


def test_table_of_flags_is_whole() -> None:
    """The table that the test above goes by names every flag."""
    options = {f"--{option.name.replace('_', '-')}" for option in fields(memws.Options)} - {"--api-key"}
    assert set(FLAGS) == options | {"--log-level"}


def test_bad_values(tmp_path: Path) -> None:
    """A bad value is refused alike as a flag and as a variable; the sentence names what it came from."""
    bad = {
        flag: value for flag, (_, value) in FLAGS.items() if flag not in ("--model", "--allow-origin", "--allow-host")
    }
    ways = [((flag, value), {}) for flag, value in bad.items()]
    ways += [((), {variable(flag): value}) for flag, value in bad.items()]
    rest = {"MEMWS_PORT": "0", "MEMWS_DB": ":memory:"}
    runs = together([partial(run, *words, cwd=tmp_path, variables=rest | given) for words, given in ways])
    for flag, done in zip([*bad, *bad], runs, strict=True):
        said = sentence(done)
        if flag != "--host":  # there, what is missing is the token
            assert re.search(flag[2:].replace("-", "[-_ ]"), said, re.IGNORECASE), (flag, said)


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that mostly wait for processes."""
    with ThreadPoolExecutor(4) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_numbers_in_variables(tmp_path: Path) -> None:
    """A variable that should hold a number and does not is named; one set to nothing counts as not set."""
    assert "MEMWS_PORT" in sentence(run(cwd=tmp_path, variables={"MEMWS_PORT": "http"}))
    with Serving("--port", "0", cwd=tmp_path, variables={"MEMWS_MAX_STEPS": "", "MEMWS_TOKEN": ""}) as server:
        assert hello(server.url)["limits"]["max_steps"] == memws.MAX_STEPS


def test_repeatable_flags(tmp_path: Path) -> None:
    """--allow-origin and --allow-host may be given several times, in the environment with commas."""
    origins = ("https://a.example", "https://b.example")
    flags = ("--allow-origin", origins[0], "--allow-origin", origins[1])
    for given, variables in ((flags, {}), ((), {"MEMWS_ALLOW_ORIGIN": ", ".join(origins)})):
        with Serving(*given, "--db", ":memory:", cwd=tmp_path, variables=variables) as server:
            for origin in origins:
                assert hello(server.url, origin=origin)


# ---- serving ---------------------------------------------------------------------------------------------------------


def test_first_line(tmp_path: Path) -> None:
    """The first line names the address that was really bound, and the next ones that the model is no language model."""
    with Serving(cwd=tmp_path) as server:
        assert re.fullmatch(rf"memws {memws.__version__} listening on ws://127\.0\.0\.1:[1-9]\d*", server.out[0])
        assert hello(server.url)["version"] == memws.__version__
        server.end()
    assert "not a language model" in "\n".join(server.out)
    assert server.log.count("Traceback") == 0


def test_localhost_on_both_families(tmp_path: Path) -> None:
    """localhost listens on 127.0.0.1 and, where this machine has it, on ::1, on the same port."""
    addresses = ["127.0.0.1"]
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
            addresses.append("[::1]")
        except OSError:
            pass  # no IPv6 here
    with Serving(cwd=tmp_path) as server:
        for address in addresses:
            assert hello(f"ws://{address}:{server.port}")["protocol"] == memws.PROTOCOL


def test_health(tmp_path: Path) -> None:
    """/healthz answers on the same port without a token."""
    with Serving("--token", "secret", cwd=tmp_path) as server:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{server.port}/healthz", timeout=10) as response:
            assert json.load(response) == {"status": "ok", "version": memws.__version__}


def test_file_modes(tmp_path: Path) -> None:
    """The database, its journal and its lock can be read by their owner only."""
    with Serving(cwd=tmp_path) as server:
        requested(server.url, {"type": "command", "command": "create_agent", "config": {}})
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("memws.db*")}
        assert set(modes) >= {"memws.db", "memws.db-wal", "memws.db.lock"}
        assert set(modes.values()) == {0o600}


def test_memory_database(tmp_path: Path) -> None:
    """:memory: keeps nothing and makes no file."""
    with Serving("--db", ":memory:", cwd=tmp_path) as server:
        requested(server.url, {"type": "command", "command": "create_agent", "config": {}})
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("stderr")] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(number: int, tmp_path: Path, endpoint: Endpoint) -> None:
    """SIGINT and SIGTERM end a running turn as interrupted, close with 1001 and exit with 0, within two seconds."""
    endpoint.script(Reply("never told", hold=True))
    model = ("--base-url", endpoint.url, "--model", "test-model", "--context-window", "9000")
    key = {"OPENAI_API_KEY": "k"}
    with Serving(*model, cwd=tmp_path, variables=key) as server, connect(server.url, proxy=None) as client:
        client.send(json.dumps({"type": "command", "command": "create_agent", "config": {"name": "sam"}}))
        client.send(json.dumps({"type": "user_message", "message": "hi"}))
        endpoint.wait_requests(1)
        assert server.end(number, timeout=4) == 0
        frames = [json.loads(frame) for frame in client]  # until it is closed
        assert frames[-1]["stop_reason"] == "interrupted"
        assert client.close_code == memws.GOING_AWAY
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log
    with Serving(*model, cwd=tmp_path, variables=key) as server, memws.connect(server.url) as talk:
        talk.load_agent("sam")
        assert talk.ask("again") == "Hello!"
        ends = [event["stop_reason"] for event in until_idle(talk) if "stop_reason" in event]
        assert ends == ["interrupted", "done"]


def until_idle(talk: memws.BlockingClient) -> Iterator[dict[str, Any]]:
    """All stored events of the current agent."""
    last_seq = talk.command("get_agent")["last_seq"]
    for event in talk.subscribe(after=0):
        yield event
        if event["seq"] == last_seq:
            break


def test_remembered_after_kill(tmp_path: Path) -> None:
    """The main job, without a key: talk, kill -9 the server, start it again, and the agent still knows you."""
    with Serving(cwd=tmp_path) as server:
        assert run("chat", "--url", server.url, "--agent", "sam", cwd=tmp_path, text="My name is Ada\n").returncode == 0
        server.end(signal.SIGKILL)
    with Serving(cwd=tmp_path) as server:
        done = run("chat", "--url", server.url, cwd=tmp_path, text="What is my name?\n")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Ada" in done.stdout


def test_remembered_after_kill_with_an_endpoint(tmp_path: Path, endpoint: Endpoint) -> None:
    """The main job with an OpenAI-compatible endpoint: what was said before a kill -9 is in the next prompt."""
    flags = ("--base-url", endpoint.url, "--context-window", "9000")
    key = {"OPENAI_API_KEY": "sk-test-key"}
    for text in ("My name is Ada", "What is my name?"):
        with Serving(*flags, cwd=tmp_path, variables=key) as server:
            done = run("chat", "--url", server.url, "--agent", "sam", cwd=tmp_path, text=text)
            assert (done.returncode, done.stdout) == (0, "Hello!\n")
            server.end(signal.SIGKILL)
    assert "My name is Ada" in json.dumps(endpoint.requests[-1]["messages"])
    assert endpoint.requests[-1]["model"] == "test-model"  # the only one of its GET /models
    assert {headers["authorization"] for headers in endpoint.headers} == {"Bearer sk-test-key"}


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frobnicate"], "--frobnicate"),
        (["serve", "--frobnicate"], "--frobnicate"),
        (["chat", "--frobnicate"], "--frobnicate"),
        (["frobnicate"], "frobnicate"),
        (["protocol", "frobnicate"], "frobnicate"),
        (["--port"], "--port"),
        (["--port", "http"], "http"),
        (["--port", "0", "--db", "."], "--db"),
        (["--port", "0", "--db", "missing/x.db"], "No such file or directory"),
        (["--port", "0", "--db", "text.db"], "file is not a database"),
        (["--port", "0", "--db", "other.db"], "other.db' is a database of another program"),
        (["--port", "0", "--db", "text.db/x"], "--db"),
        (["--port", "0", "--host", "nowhere.invalid", "--token", "x"], "choose another host or port"),
        (["--port", "0", "--host", "192.0.2.1", "--token", "x"], "choose another host or port"),
    ],
)
def test_refused(words: list[str], said: str, tmp_path: Path) -> None:
    """What cannot be is one sentence that says what to do next, with exit status 2 and without a traceback."""
    (tmp_path / "text.db").write_text("this is a diary and no database\n" * 40, "utf-8")
    with closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE diary (day TEXT)")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert said in sentence(run(*words, cwd=tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # nothing made, nothing changed


def test_open_bind_without_a_token(tmp_path: Path) -> None:
    """A bind that lets other machines in needs a token, however it is spelled."""
    spelled = ["0.0.0.0", "::", "[::]", "0", "0.0", "00.0.0.0", "", "*", "::ffff:0.0.0.0", "lab.example"]  # noqa: S104
    for done in together([partial(run, "--host", host, "--port", "0", cwd=tmp_path) for host in spelled]):
        assert "--token" in sentence(done)
    assert list(tmp_path.iterdir()) == []


def test_open_bind_with_a_token(tmp_path: Path) -> None:
    """With a token a bind beyond loopback serves."""
    with Serving("--host", "0.0.0.0", "--token", "secret", cwd=tmp_path) as server:  # noqa: S104
        address = f"ws://127.0.0.1:{server.port}"
        assert refused(address) == 401
        assert hello(address, additional_headers={"Authorization": "Bearer secret"})


def test_port_in_use(tmp_path: Path) -> None:
    """A port held by another program is named, with the way out."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        said = sentence(run("--port", port, cwd=tmp_path))
    assert f"port {port} on localhost is held by another program" in said
    assert list(tmp_path.iterdir()) == []


def test_second_server_on_the_same_file(tmp_path: Path) -> None:
    """A second server on the same database is refused, also through a link, and the first one goes on."""
    (tmp_path / "link.db").symlink_to(tmp_path / "memws.db")
    with Serving(cwd=tmp_path) as server:
        for name in ("memws.db", "link.db", str(tmp_path / "memws.db")):
            assert "another" in sentence(run("--port", "0", "--db", name, cwd=tmp_path))
        assert hello(server.url)


def test_locked_database(tmp_path: Path) -> None:
    """A database that another program holds locked is one sentence."""
    with Serving(cwd=tmp_path) as server:
        server.end()
    with closing(sqlite3.connect(tmp_path / "memws.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in sentence(run("--port", "0", cwd=tmp_path))


def test_damaged_database(tmp_path: Path) -> None:
    """A database with a damaged first page is one sentence."""
    with Serving(cwd=tmp_path) as server:
        server.end()
    with (tmp_path / "memws.db").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 900)
    for left in tmp_path.glob("memws.db-*"):
        left.unlink()
    assert "memws.db" in sentence(run("--port", "0", cwd=tmp_path))


def test_database_of_a_later_version(tmp_path: Path) -> None:
    """A database that a later memws has written is left alone."""
    with Serving(cwd=tmp_path) as server:
        server.end()
    with closing(sqlite3.connect(tmp_path / "memws.db")) as later:
        later.execute("PRAGMA user_version = 999")
    assert "newer" in sentence(run("--port", "0", cwd=tmp_path))


@pytest.mark.parametrize("flags", [["--model", "gpt-5.4-mini"], []])
def test_missing_package(flags: list[str], tmp_path: Path) -> None:
    """A model other than offline without the openai package is refused with the command that installs it."""
    variables = {**without(tmp_path, "openai"), "OPENAI_API_KEY": "k"}
    said = sentence(run("--port", "0", *flags, cwd=tmp_path, variables=variables))
    assert "pip install openai" in said


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ((), "serves 0 models"),
        (("a", "b"), "choose one with --model; they are: a, b"),
        (tuple(f"model-{n}" for n in range(200)), "serves 200 models"),
        (("evil\x1b[2J\nname", "b"), "b"),
    ],
)
def test_endpoint_without_a_choice(models: tuple[str, ...], said: str, tmp_path: Path) -> None:
    """A base URL and no model: where the endpoint serves not exactly one, the sentence lists them."""
    with Endpoint(models=models) as endpoint:
        done = run("--port", "0", "--base-url", endpoint.url, cwd=tmp_path)
    assert said in sentence(done)
    assert "\x1b" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "reply",
    [
        Reply(status=401),
        Reply(status=500, body="<html>"),
        Reply(body="<html>"),
        Reply(body={"data": "x"}),
        Reply(body={"data": [{}]}),
        Reply(body={"data": [{"id": 5}]}),
        Reply(body="[" * 100_000),
    ],
)
def test_endpoint_that_does_not_list(reply: Reply, tmp_path: Path) -> None:
    """An endpoint that cannot list its models is one sentence with the next move."""
    with Endpoint() as endpoint:
        endpoint.overrides["/v1/models"] = reply
        assert "--model" in sentence(run("--port", "0", "--base-url", endpoint.url, cwd=tmp_path))


def test_endpoint_that_is_not_there(tmp_path: Path) -> None:
    """A base URL where nothing answers is one sentence with the next move."""
    urls = [
        "nonsense",
        "file:///etc/passwd",
        "http://",
        "http://127.0.0.1:1/v1",
        "http://[::1",
        "ws://x",
        "http://x y/",
    ]
    for done in together([partial(run, "--port", "0", "--base-url", url, cwd=tmp_path) for url in urls]):
        assert "--base-url" in sentence(done)


def test_mute_endpoint(tmp_path: Path) -> None:
    """An endpoint that accepts and says nothing is given up."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/v1"
        assert "--base-url" in sentence(run("--port", "0", "--base-url", url, cwd=tmp_path, timeout=20))


def test_key_decides_the_model(tmp_path: Path) -> None:
    """A key and no model gives DEFAULT_MODEL; --model offline stays offline beside a key."""
    key = {"OPENAI_API_KEY": "sk-test-key"}
    for flags, model in (((), memws.DEFAULT_MODEL), (("--model", "offline"), "offline")):
        with Serving(*flags, "--db", ":memory:", cwd=tmp_path, variables=key) as server:
            about = hello(server.url)
            assert (about["model"], about["offline"]) == (model, model == "offline")


def test_base_url_of_openai(tmp_path: Path, endpoint: Endpoint) -> None:
    """OPENAI_BASE_URL names the endpoint as --base-url does, which wins."""
    for flags, url in (((), endpoint.url), (("--base-url", endpoint.url), "http://127.0.0.1:1/v1")):
        with Serving(*flags, "--db", ":memory:", cwd=tmp_path, variables={"OPENAI_BASE_URL": url}) as server:
            assert hello(server.url)["model"] == "test-model"


# ---- the file alone --------------------------------------------------------------------------------------------------


def test_copied_alone(tmp_path: Path) -> None:
    """The file alone, renamed, in an empty folder, without any package but websockets: serves, chats and imports."""
    folder = tmp_path / "empty"
    folder.mkdir()
    program = Path(shutil.copy(PROGRAM, folder / "agentd.py"))
    bare = without(tmp_path, *PACKAGES)
    with Serving(cwd=folder, program=program, variables=bare) as server:
        done = run(
            "chat",
            "--url",
            server.url,
            "--agent",
            "ada",
            cwd=folder,
            text="I love otters",
            program=program,
            variables=bare,
        )
        assert done.returncode == 0
        assert "otters" in done.stdout
        assert server.end() == 0
    code = (
        "import agentd\n"
        "server = agentd.WebSocketServer(port=0, db='memws.db').start()\n"
        "with agentd.connect(server.url) as client:\n"
        "    client.load_agent('ada')\n"
        "    print(client.ask('What do I love?'))\n"
        "server.stop()\n"
    )
    done = python(code, folder, bare)
    assert done.returncode == 0, done.stderr
    assert "otters" in done.stdout


def python(code: str, cwd: Path, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment(variables),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )


def test_import(tmp_path: Path) -> None:
    """Importing the module prints nothing, opens nothing, starts nothing, and needs websockets alone."""
    shutil.copy(PROGRAM, tmp_path)
    code = (
        "import os, sys, threading\n"
        "sys.dont_write_bytecode = True\n"
        "before = set(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else set()\n"
        "import memws\n"
        "after = set(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else set()\n"
        "assert len(after) <= len(before), after - before\n"
        "assert threading.active_count() == 1\n"
        "loaded = {name for name, module in sys.modules.items() if module}\n"
        "assert not {'openai', 'ipywidgets', 'nest_asyncio', 'pydantic', 'IPython'} & loaded\n"
    )
    (tmp_path / "work").mkdir()
    done = python(
        code, tmp_path / "work", without(tmp_path, *PACKAGES) | {"PYTHONPATH": f"{tmp_path}/blocked:{tmp_path}"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "work").iterdir()) == []


def test_two_copies_in_one_process(tmp_path: Path) -> None:
    """Two copies of the file in one process serve side by side and do not meet."""
    for name in ("one.py", "two.py"):
        shutil.copy(PROGRAM, tmp_path / name)
    code = (
        "import one, two\n"
        "first = one.WebSocketServer(port=0, db='one.db').start()\n"
        "second = two.WebSocketServer(port=0, db='two.db').start()\n"
        "first.create_new_agent({'name': 'ada'})\n"
        "second.create_new_agent({'name': 'bob'})\n"
        "for module, server in ((two, first), (one, second)):\n"
        "    with module.connect(server.url) as client:\n"
        "        print([agent['agent_name'] for agent in client.command('list_agents')['agents']])\n"
        "first.stop()\n"
        "with one.connect(second.url) as client:\n"
        "    client.load_agent('bob')\n"
        "    print(bool(client.ask('hi')))\n"
        "second.stop()\n"
    )
    done = python(code, tmp_path)
    assert done.stdout.splitlines() == ["['ada']", "['bob']", "True"], done.stderr


# ---- check, export, import, backup -----------------------------------------------------------------------------------


def talked(folder: Path) -> Path:
    """A database in which the agent sam knows Ada."""
    with Serving(cwd=folder) as server:
        done = run("chat", "--url", server.url, "--agent", "sam", cwd=folder, text="My name is Ada and I love otters")
        assert done.returncode == 0
        server.end()
    return folder / "memws.db"


def answer(folder: Path, db: str, text: str) -> str:
    """What the agent sam of a database says."""
    with Serving("--db", db, cwd=folder) as server:
        return run("chat", "--url", server.url, "--agent", "sam", cwd=folder, text=text).stdout


def test_export_and_import(tmp_path: Path) -> None:
    """An exported agent is one JSON file; imported elsewhere it remembers, and its next export says the same."""
    talked(tmp_path)
    first = run("export", "sam", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "sam.json").write_text(first.stdout, "utf-8")
    done = run("import", "sam.json", "--db", "other.db", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((tmp_path / "other.db").stat().st_mode) == 0o600
    second = run("export", "sam", cwd=tmp_path, variables={"MEMWS_DB": "other.db"})
    assert json.loads(second.stdout) == json.loads(first.stdout)
    assert "Ada" in answer(tmp_path, "other.db", "What is my name?")
    assert "sam" in sentence(run("import", "sam.json", "--db", "other.db", cwd=tmp_path))  # the name is taken


def test_backup_beside_a_server(tmp_path: Path) -> None:
    """backup, check and export work while a server runs; import and check --repair say that it has to be stopped."""
    talked(tmp_path)
    with Serving(cwd=tmp_path) as server:
        for words in (("backup", "copy.db"), ("check",), ("export", "sam")):
            done = run(*words, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        (tmp_path / "sam.json").write_text(done.stdout, "utf-8")
        for words in (("import", "sam.json"), ("check", "--repair")):
            assert "stop" in sentence(run(*words, cwd=tmp_path))
        assert hello(server.url)
    assert stat.S_IMODE((tmp_path / "copy.db").stat().st_mode) == 0o600
    assert "otters" in answer(tmp_path, "copy.db", "What do I love?")
    assert "copy.db" in sentence(run("backup", "copy.db", cwd=tmp_path))  # nothing is written over


def test_check_and_repair(tmp_path: Path) -> None:
    """check names the damage and the agent; --repair mends it after a backup, and then nothing is found."""
    db = talked(tmp_path)
    assert run("check", cwd=tmp_path).stdout == "no damage found\n"
    with closing(sqlite3.connect(db)) as connection, connection:
        assert connection.execute('UPDATE blocks SET "limit" = 1').rowcount > 0
        assert connection.execute("UPDATE agents SET last_seq = 1").rowcount == 1
    broken = db.read_bytes()
    found = run("check", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (1, "")
    assert "agent sam" in found.stdout
    assert db.read_bytes() == broken
    mended = run("check", "--repair", cwd=tmp_path)
    assert mended.returncode == 0, mended.stdout
    (copy,) = tmp_path.glob("memws.db.before-repair-*")
    assert run("check", "--db", copy.name, cwd=tmp_path).returncode == 1
    assert run("check", cwd=tmp_path).stdout == "no damage found\n"
    assert answer(tmp_path, "memws.db", "hi")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "nobody"], "unknown agent 'nobody'"),
        (["export"], "name"),
        (["export", "sam", "--db", "missing.db"], "missing.db"),
        (["check", "--db", "missing.db"], "missing.db"),
        (["check", "--repair", "--db", "missing.db"], "missing.db"),
        (["check", "--db", "text.db"], "text.db"),
        (["backup", "copy.db", "--db", "missing.db"], "missing.db"),
        (["backup", "missing/copy.db"], "missing"),
        (["backup", "memws.db"], "memws.db"),
        (["import", "missing.json"], "missing.json"),
        (["import", "text.db"], "text.db"),
        (["import", "list.json"], "exported"),
        (["import", "deep.json"], "deep.json"),
        (["import", "cut.json"], "cut.json"),
    ],
)
def test_keeping_refused(words: list[str], said: str, tmp_path: Path) -> None:
    """What these commands cannot do is one sentence, and no file is made or changed."""
    (tmp_path / "text.db").write_text("this is a diary and no database\n" * 40, "utf-8")
    (tmp_path / "list.json").write_text("[1]", "utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000, "utf-8")
    (tmp_path / "cut.json").write_text('{"agent": {"name": "sam"', "utf-8")
    assert run("import", "none.json", cwd=tmp_path).returncode == 2
    memws.WebSocketServer(port=0, db=str(tmp_path / "memws.db")).start().stop()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert said in sentence(run(*words, cwd=tmp_path))
    after = {
        path: path.read_bytes() for path in tmp_path.iterdir() if not path.name.endswith((".lock", "-shm", "-wal"))
    }
    assert {path: data for path, data in before.items() if path in after} == after


# ---- protocol and logs -----------------------------------------------------------------------------------------------


def test_protocol(tmp_path: Path) -> None:
    """protocol prints a valid JSON Schema, by which the frames of a real turn are valid and broken ones are not."""
    jsonschema = pytest.importorskip("jsonschema")
    done = run("protocol", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    schema = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    requests = [
        {"type": "command", "command": "hello", "message_types": ["*"]},
        {"type": "command", "command": "create_agent", "config": {}},
        {"type": "user_message", "message": "My name is Ada", "id": 1},
    ]
    frames: list[dict[str, Any]] = []
    with Serving(cwd=tmp_path) as server, connect(server.url, proxy=None) as client:
        for request in requests:
            client.send(json.dumps(request))
        while not frames or frames[-1]["type"] != "agent_response_end":
            frames.append(json.loads(client.recv(timeout=10)))
    assert [error.message for frame in requests + frames for error in validator.iter_errors(frame)] == []
    for broken in ({}, {"type": "user_message"}, {"type": "agent_response"}, {"type": "command", "command": "nothing"}):
        assert not validator.is_valid(broken)


def test_logs(tmp_path: Path) -> None:
    """At any log level no line holds the token, the key or a bare control character, whatever an endpoint sends."""
    echo = {
        "error": {"message": "Incorrect API key: canary-key-0123 (sk-canary-other-0123456789). \x1b[2J\r\nforged line"}
    }
    flags = ("--log-level", "debug", "--token", "canary-token", "--db", ":memory:")
    with ExitStack() as stack:
        endpoint = stack.enter_context(Endpoint())
        endpoint.script(
            Reply(status=400, body=echo), Reply(error_in_stream=echo["error"]), *[Reply(status=500, body=echo)] * 9
        )
        key = {"OPENAI_API_KEY": "canary-key-0123"}
        server = stack.enter_context(Serving(*flags, "--base-url", endpoint.url, cwd=tmp_path, variables=key))
        frames: list[str] = []
        for path, headers in (("/?token=canary-token", {}), ("/", {"Authorization": "Bearer canary-token"})):
            with connect(server.url + path, proxy=None, additional_headers=headers) as client:
                client.send("\x1b[2Jno json canary\nforged")
                client.send(
                    json.dumps({"type": "command", "command": "create_agent", "config": {"context_window": 9000}})
                )
                client.send(json.dumps({"type": "user_message", "message": "hi \x1b[31m\u202e"}))
                while not frames or '"agent_response_error"' not in frames[-1]:
                    frames.append(str(client.recv(timeout=20)))
                frames.append("")
        assert refused(server.url + "/?token=canary-tokem\x1b".replace("\x1b", "%1b")) == 401
        assert server.end() == 0
    assert server.log
    assert [line for line in server.log.splitlines() if not re.match(r"\d{4}-\d\d-\d\d [\d:,]+ [A-Z]+ ", line)] == []
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", server.log) is None
    for secret in ("canary-toke", "canary-key", "sk-canary"):
        assert secret not in server.log
        assert secret not in "".join(frames)
        assert secret not in "\n".join(server.out)


def test_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token, key, what looks like one, and control characters are kept out of messages and of tracebacks alike."""
    monkeypatch.setenv("OPENAI_API_KEY", "canary-key")
    told = "canary-token canary-key sk-canary-0123456789 \x1b[2J\u202e\x9b2J\rforged"
    try:
        raise ValueError(told + "\n2026-01-01 00:00:00,000 INFO forged")
    except ValueError:
        record = logging.LogRecord("memws", logging.ERROR, "", 0, "%s\nforged", (told,), sys.exc_info())
    text = memws._LogFormatter("canary-token").format(record)
    assert "ValueError" in text
    assert "canary" not in text
    assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text) is None
    assert re.findall(r"^(?:\d{4}-|forged).*", text, re.MULTILINE) == [text.splitlines()[0]]


# ---- chat in a pipe --------------------------------------------------------------------------------------------------


@pytest.fixture
def piped(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Pipe a text into chat, of a server without a key."""
    with Serving(cwd=tmp_path) as server:
        yield lambda text, *flags: run("chat", "--url", server.url, *flags, cwd=tmp_path, text=text)


def test_pipe_answers_once(piped: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Piped input is one message and its reply the only output; an unknown agent is created, and that is said."""
    done = piped("My name is Ada\nand I live in Oslo\n", "--agent", "ana")
    assert done.returncode == 0
    assert done.stderr == "there was no agent 'ana'; it has been created\n"
    assert "Ada" in done.stdout
    again = piped("Where do I live?")  # no agent named: the one that was active last
    assert (again.returncode, again.stderr) == (0, "")
    assert "Oslo" in again.stdout


def test_pipe_without_any_agent(piped: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The first agent is sam."""
    assert piped("hi").stderr == "there was no agent 'sam'; it has been created\n"


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_pipe_without_a_message(text: str, piped: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Nothing to send is said and fails."""
    done = piped(text)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "nothing to send: standard input is empty; pipe a message in\n"


def test_pipe_of_odd_text(piped: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A bad agent name and a text that is too long are one sentence each, and fail."""
    for text, flags in (("hi", ("--agent", "../etc")), ("x" * (memws.MAX_TEXT + 1), ("--agent", "sam"))):
        done = piped(text, *flags)
        assert (done.returncode, done.stdout) == (1, "")
        assert "Traceback" not in done.stderr


def test_pipe_of_an_error(tmp_path: Path, endpoint: Endpoint) -> None:
    """A turn that fails is one sentence on standard error, with control characters escaped."""
    endpoint.script(Reply(status=401, body={"error": {"message": "\x1b[2Jno", "code": "invalid_api_key"}}))
    with Serving("--base-url", endpoint.url, "--db", ":memory:", cwd=tmp_path) as server:
        done = run("chat", "--url", server.url, "--agent", "sam", cwd=tmp_path, text="hi")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 2  # the agent was created; the error
    assert "\x1b" not in done.stderr


def test_chat_without_a_server(tmp_path: Path) -> None:
    """Without a server, chat says how to start one and exits with 2."""
    done = run("chat", "--url", "ws://127.0.0.1:1", cwd=tmp_path, text="hi")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "cannot connect to ws://127.0.0.1:1: start the server with `python memws.py`\n"


def test_chat_flags_and_variables(tmp_path: Path) -> None:
    """Every flag of chat has a variable, and wins over it."""
    with Serving("--token", "right", cwd=tmp_path) as server:
        good = {"--url": server.url, "--agent": "ada", "--token": "right"}
        bad = {"--url": "ws://127.0.0.1:1", "--agent": "bob", "--token": "wrong"}
        first = run("chat", cwd=tmp_path, text="hi", variables={variable(flag): value for flag, value in good.items()})
        assert first.stderr == "there was no agent 'ada'; it has been created\n"
        words = [word for flag, value in good.items() for word in (flag, value)]
        second = run(
            "chat", *words, cwd=tmp_path, text="hi", variables={variable(flag): value for flag, value in bad.items()}
        )
        assert (second.returncode, second.stderr) == (0, "")
        third = run("chat", "--url", server.url, cwd=tmp_path, text="hi", variables={"MEMWS_TOKEN": "wrong"})
        assert third.returncode == 2
        assert "--token or MEMWS_TOKEN" in third.stderr


def test_closed_output(tmp_path: Path) -> None:
    """A reader of the output that has left is no traceback."""
    with Serving(cwd=tmp_path) as server:
        words = [sys.executable, str(PROGRAM), "chat", "--url", server.url, "--agent", "sam"]
        read, write = os.pipe()
        os.close(read)
        try:
            done = subprocess.run(
                words, cwd=tmp_path, env=environment(), input="hi", stdout=write, stderr=subprocess.PIPE,
                encoding="utf-8", timeout=30, check=False,
            )  # fmt: skip
        finally:
            os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """chat with a closed standard stream ends without a traceback, and still sends what it was given."""
    with Serving(cwd=tmp_path) as server:
        words = shlex.join(command("chat", "--url", server.url, "--agent", "sam"))
        done = subprocess.run(
            ["/bin/sh", "-c", f"{words} {closed}"], cwd=tmp_path, env=environment(), input="I love otters",
            capture_output=True, encoding="utf-8", timeout=30, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert done.returncode == (1 if closed == "<&-" else 0)
        assert "otters" in done.stdout or closed != "2>&-"


@pytest.mark.parametrize("words", [["protocol"], ["export", "sam"], ["--port", "0", "--db", ":memory:"]])
def test_full_output(words: list[str], tmp_path: Path) -> None:
    """A standard output that takes nothing more is one sentence, not a traceback."""
    talked(tmp_path)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*words), cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, encoding="utf-8",
            timeout=30, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert re.fullmatch(r"memws: [^\n]+No space left on device[^\n]*\n", done.stderr), done.stderr
