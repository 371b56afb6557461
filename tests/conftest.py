"""What all tests share: the endpoint, the loop that async tests run on, and the rule that in CI a skip is a failure."""

import functools
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import Lab, Tools
from commandline import Main, call
from endpoint import Endpoint
from postgres import Cluster, find_programs

import memws

CI = bool(os.environ.get("CI"))
# A run with requirements.txt alone, as a newcomer's: tests may skip for want of tests/requirements.txt.
BARE = bool(os.environ.get("MEMWS_BARE"))
# Nothing here speaks TLS: openai need not read all certificates for each of a thousand clients.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.curdir


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, through the pytest plugin of anyio, which comes with openai."""
    return "asyncio"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """A strict endpoint; a request that it had to refuse fails the test."""
    with Endpoint() as running:
        yield running
    assert running.refusals == []


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Main:
    monkeypatch.chdir(tmp_path)
    return functools.partial(call, capsys)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """PostgreSQL, started by the first test that asks for it."""
    pytest.importorskip("psycopg")
    if find_programs() is None:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def postgres_address(postgres: Cluster) -> Iterator[str]:
    address = postgres.database()
    yield address
    postgres.give_back(address)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of either kind, as --db names it; servers of the same test use it."""
    in_file = request.param == "sqlite"
    return str(tmp_path / "database.db" if in_file else request.getfixturevalue("postgres_address"))


@pytest.fixture
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start servers that answer from the offline model, on free ports; at the end no thread of theirs is left."""
    used = "database" in request.fixturenames
    db = request.getfixturevalue("database") if used else str(tmp_path / "memws.db")
    started: list[Any] = []
    before = set(threading.enumerate())

    def start(**options: object) -> Any:
        defaults = {"host": "127.0.0.1", "port": 0, "db": db, "sync": "normal"}
        if "base_url" not in options:
            defaults["model"] = "offline"
        server = memws.WebSocketServer(**(defaults | options))
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()
    assert [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("memws")] == []


@pytest.fixture
def online(serve: Callable[..., Any], endpoint: Endpoint) -> Callable[..., Any]:
    """Starts servers whose model is the scripted endpoint."""
    return lambda **options: serve(base_url=endpoint.url, model="test-model", api_key="key", **options)


@pytest.fixture
def tools() -> Tools:
    """A user's tools, which agents of the lab are offered: none, unless a test is parametrized with some."""
    return ()


@pytest.fixture
async def lab(endpoint: Endpoint, tools: Tools) -> AsyncIterator[Lab]:
    async with Lab(endpoint, tools=tools) as lab:
        yield lab


@pytest.fixture
async def agent(lab: Lab) -> memws.Agent:
    return await lab.create()


def pytest_collection_finish() -> None:
    """What is there before the first test is looked at by no collection of garbage later: those are quick then."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    skips = [str(report.longrepr) for report in reporter.stats.get("skipped", ())]
    if CI and not all(BARE and "could not import" in reason for reason in skips):
        reporter.write_line(f"in CI a skip is a failure: {len(skips)}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
