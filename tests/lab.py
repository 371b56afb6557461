"""A real JupyterLab on loopback with a headless Chromium in front of it, for test_browser.py."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import nbformat
from playwright.sync_api import Browser, Locator, Page, Route, sync_playwright

import memws

ROOT = Path(memws.__file__).resolve().parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
"""Debian's; Playwright's own browsers are never downloaded."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """A JupyterLab server with the notebooks of a folder, which fetches no news; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    news = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps(NO_NEWS), "utf-8")
    places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME")}
    environment = os.environ | places | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "HOME": str(folder)}
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", "--expose-app-in-browser",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *options]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert server.stderr is not None
    lines: list[bytes] = []
    listens = threading.Event()

    def read(log: IO[bytes]) -> None:
        with log:
            for line in log:
                lines.append(line)
                if f"{url}/lab".encode() in line:
                    listens.set()
        listens.set()  # it has ended

    threading.Thread(target=read, args=(server.stderr,), daemon=True).start()
    try:
        if not listens.wait(60) or server.poll() is not None:
            raise RuntimeError(b"".join(lines).decode())
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextlib.contextmanager
def notebook(folder: Path, *cells: str) -> Iterator["Notebook"]:
    """A notebook with these cells, all run, which asks for nothing beyond loopback and has no error of its own."""
    content = nbformat.v4.new_notebook(  # type: ignore[no-untyped-call]
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],  # type: ignore[no-untyped-call]
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(content, folder / "notebook.ipynb")  # type: ignore[no-untyped-call]
    with jupyterlab(folder) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        opened = Notebook(browser, f"{url}/lab/tree/notebook.ipynb")
        yield opened
        opened.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        browser.close()
    assert (opened.strangers, opened.errors) == ([], [])


class Notebook:
    """A notebook in a browser window, all cells run."""

    def __init__(self, browser: Browser, address: str) -> None:
        self.strangers: list[str] = []  # addresses beyond loopback that the page asked for
        self.errors: list[str] = []  # of the page
        context = browser.new_context(viewport={"width": 1400, "height": 1000})
        context.route(lambda url: urllib.parse.urlsplit(url).hostname not in ("127.0.0.1", "localhost"), self._block)
        self.page: Page = context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(20_000)
        self.page.goto(address)
        loaded = "window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 0"
        self.page.wait_for_function(loaded, timeout=60_000)
        self.page.evaluate("window.jupyterapp.shell.collapseLeft()")
        self.page.evaluate(
            "async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready;"
            "await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
        )

    def _block(self, route: Route) -> None:
        if not route.request.url.startswith(("data:", "blob:")):
            self.strangers.append(route.request.url)
            route.abort()
        else:
            route.continue_()

    @property
    def panel(self) -> Locator:
        return self.page.locator(".memws-panel").first

    @property
    def field(self) -> Locator:
        return self.panel.get_by_placeholder("Message", exact=True)

    def button(self, name: str) -> Locator:
        return self.panel.get_by_role("button", name=name, exact=True)

    def await_status(self, word: str) -> None:
        """Wait until the status line says a word."""
        self.panel.locator(".memws-status").get_by_text(word).first.wait_for()

    def await_text(self, text: str) -> None:
        """Wait until the transcript shows a text."""
        self.panel.locator(".memws-log").get_by_text(text).first.wait_for()

    def say(self, text: str, by: str = "click") -> None:
        """Write a message and send it."""
        self.field.fill(text)
        if by == "click":
            self.button("Send").click()
        else:
            self.field.press("Enter")
