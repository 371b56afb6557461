"""A real JupyterLab on loopback with a headless Chromium in front of it, for test_browser.py.

Requests to anything but loopback are blocked and counted; `Lab.strangers` must stay empty.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import nbformat
from playwright.sync_api import Locator, Page, Route, sync_playwright

import memws

ROOT = Path(memws.__file__).resolve().parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
"""Debian's; Playwright's own browsers are never downloaded."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}


class Lab:
    """A JupyterLab server and the browser; `open` gives a notebook in a window of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.strangers: list[str] = []
        "Addresses beyond loopback that a page asked for."
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        (folder / "work").mkdir()
        news = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text(json.dumps(NO_NEWS), "utf-8")
        places = {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "RUNTIME")}
        environment = os.environ | places | {"IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
        environment |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "HOME": str(folder)}
        options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root", "--expose-app-in-browser",
                   "--IdentityProvider.token=", f"--ServerApp.root_dir={folder / 'work'}"]  # fmt: skip
        command = [sys.executable, "-m", "jupyterlab", *options]
        self._server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            self._await_server()
            self._playwright = sync_playwright().start()
            self._browser = self._playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        except BaseException:
            self._end_server()
            raise

    def _await_server(self) -> None:
        """Wait for the line of the log that names the address."""
        self._log: list[bytes] = []
        listens = threading.Event()
        threading.Thread(target=self._read, args=(listens,), daemon=True).start()
        if not listens.wait(60) or self._server.poll() is not None:
            raise RuntimeError(b"".join(self._log).decode())

    def _read(self, listens: threading.Event) -> None:
        assert self._server.stderr is not None
        with self._server.stderr as log:
            for line in log:
                self._log.append(line)
                if f"{self.url}/lab".encode() in line:
                    listens.set()
        listens.set()  # it has ended

    def close(self) -> None:
        """End browser, server and kernels."""
        self._browser.close()
        self._playwright.stop()
        self._end_server()

    def _end_server(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def open(self, name: str, *cells: str) -> "Notebook":
        """A new notebook with these cells, nothing run yet."""
        path = self.folder / "work" / f"{name}.ipynb"
        content = nbformat.v4.new_notebook(  # type: ignore[no-untyped-call]
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],  # type: ignore[no-untyped-call]
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        nbformat.write(content, path)  # type: ignore[no-untyped-call]
        context = self._browser.new_context(viewport={"width": 1400, "height": 1000})
        context.route(lambda url: urllib.parse.urlsplit(url).hostname not in ("127.0.0.1", "localhost"), self._block)
        return Notebook(self, context.new_page(), path)

    def _block(self, route: Route) -> None:
        if not route.request.url.startswith(("data:", "blob:")):
            self.strangers.append(route.request.url)
            route.abort()
        else:
            route.continue_()


class Notebook:
    """A notebook in a browser window."""

    def __init__(self, lab: Lab, page: Page, path: Path) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(20_000)
        page.goto(f"{lab.url}/lab/workspaces/{path.stem}-{time.time_ns()}/tree/{path.name}?reset")
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 0", timeout=60_000)
        page.evaluate("window.jupyterapp.shell.collapseLeft()")

    def run(self) -> None:
        """Run all cells, as the menu would, and wait until the kernel has done them."""
        self.page.evaluate(
            "async () => { await window.jupyterapp.shell.currentWidget.sessionContext.ready;"
            "await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
        )

    # -- the panel --

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

    def close(self) -> None:
        """Shut the kernel down and close the window."""
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget?.sessionContext?.shutdown(); }")
        self.page.context.close()
