"""Chromium in front of the page and of a real JupyterLab, with no network but loopback, for test_browser.py."""

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
from typing import Any

import nbformat
from playwright.sync_api import Browser, Locator, Page, Route

import memws

ROOT = Path(memws.__file__).resolve().parent
CHROMIUM = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
"""Debian's; Playwright's own browsers are never downloaded."""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
LOOPBACK = "127.0.0.1", "localhost"
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
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as server:
        lines, late = list[bytes](), threading.Timer(60, server.kill)
        late.start()
        for line in server.stderr:
            lines.append(line)
            if f"{url}/lab".encode() in line:
                break
        else:
            raise RuntimeError(b"".join(lines).decode())
        late.cancel()
        reader = threading.Thread(target=server.stderr.read, daemon=True)
        reader.start()
        try:
            yield url
        finally:
            server.terminate()
            reader.join(20)
            server.kill()


class Window:
    """A browser window that asks for nothing beyond loopback; in it a panel, on the page or in a notebook."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.faults: list[str] = []  # requests to strangers, errors, and what the page's own policy forbids
        self.context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}, **options})
        self.context.route(lambda url: urllib.parse.urlsplit(url).hostname not in LOOPBACK, self._block)
        self.page: Page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", lambda told: self._hear(told.text))
        self.page.set_default_timeout(20_000)

    def _block(self, route: Route) -> None:
        if route.request.url.startswith(("data:", "blob:")):
            route.continue_()
        else:
            self.faults.append(route.request.url)
            route.abort()

    def _hear(self, text: str) -> None:
        if "Content Security Policy" in text or "Trusted" in text:
            self.faults.append(text)

    def close(self) -> None:
        self.context.close()
        # JupyterLab itself complains so of what a kernel that ends has not answered.
        assert [fault for fault in self.faults if "Canceled future for" not in fault] == []

    def open(self, url: str, fragment: str = "", status: str = "connected") -> None:
        self.page.goto(memws.page_address(url) + fragment)
        self.await_status(status)

    def open_notebook(self, folder: Path, jupyter: str) -> None:
        cells = [nbformat.v4.new_code_cell("")]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        content = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(content, folder / "notebook.ipynb")
        self.page.goto(f"{jupyter}/lab/tree/notebook.ipynb")
        loaded = "window.jupyterapp?.shell?.currentWidget?.content?.widgets?.length > 0"
        self.page.wait_for_function(loaded, timeout=60_000)
        self.page.evaluate("window.jupyterapp.shell.collapseLeft()")
        self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.ready")

    def run(self, source: str, wait: bool = True) -> None:
        """Run this in the notebook's cell, in place of what was there, and wait for its end."""
        script = "source => { jupyterapp.shell.currentWidget.content.widgets[0].model.sharedModel.setSource(source);"
        script += f"{'return' if wait else 'void'} jupyterapp.commands.execute('notebook:run-all-cells'); }}"
        self.page.evaluate(script, source)

    @property
    def panel(self) -> Locator:
        return self.page.locator(".memws-panel").first

    @property
    def log(self) -> Locator:
        return self.panel.locator(".memws-log")

    @property
    def mind(self) -> Locator:
        return self.panel.get_by_role("complementary")

    @property
    def field(self) -> Locator:
        return self.panel.get_by_placeholder("Message", exact=True)

    def button(self, name: str) -> Locator:
        return self.panel.get_by_role("button", name=name, exact=True)

    def button_like(self, name: str) -> Locator:
        return self.panel.get_by_role("button", name=name)

    def tab(self, name: str) -> Locator:
        return self.mind.get_by_role("button", name=name, exact=True)

    def choose(self, entry: str) -> None:
        self.panel.get_by_label("Agents and keys").click()
        self.button(entry).click()

    def fill(self, **fields: str) -> None:
        for name, value in fields.items():
            self.panel.get_by_label(name, exact=True).fill(value)

    def await_status(self, word: str) -> None:
        self.panel.locator(".memws-status").get_by_text(word, exact=True).wait_for()

    def sees(self, *texts: str) -> None:
        for text in texts:
            self.log.get_by_text(text).last.wait_for()

    def await_turns(self, count: int) -> None:
        """Wait until so many turns have a reply, and none runs."""
        self.log.locator(".memws-agent").nth(count - 1).wait_for()
        self.await_status("connected")

    def say(self, text: str) -> None:
        self.field.fill(text)
        self.field.press("Enter")
