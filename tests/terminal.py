"""A program on a real terminal (pty): what a person sees and types."""

import codecs
import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

# A child that leads a session takes the terminal as its own, so that Ctrl-C reaches it; then it becomes the program.
# What a shell starts in the background ignores SIGINT, and so would all that it starts.
_LEAD = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A program on a terminal of 120 columns, while the `with` block lasts."""

    def __init__(self, words: Sequence[str], *, cwd: Path, variables: Mapping[str, str]) -> None:
        self.words, self.cwd, self.variables = words, cwd, {"TERM": "xterm", **variables}
        self.seen = ""  # all that the program has written
        self._read_to = 0
        self._news, self._over = threading.Condition(), False

    def __enter__(self) -> Self:
        self._master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
        words, ends = [sys.executable, "-c", _LEAD, *self.words], dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        self.process = subprocess.Popen(words, cwd=self.cwd, env=self.variables, start_new_session=True, **ends)
        os.close(terminal)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        os.close(self._master)

    def expect(self, *texts: str, timeout: float = 15) -> None:
        """Wait until the program has written each of these, one behind the other."""
        for text in texts:
            with self._news:
                self._news.wait_for(lambda text=text: self._over or text in self.seen[self._read_to :], timeout)
                place = self.seen.find(text, self._read_to)
                assert place >= 0, f"expected {text!r}, but got {self.seen[self._read_to :]!r}"
                self._read_to = place + len(text)

    def line(self, text: str = "", *answers: str) -> None:
        """Type a line, and wait for what the program writes then."""
        self.type(text + "\r")
        self.expect(*answers)

    def type(self, keys: str) -> None:
        """Press keys; \\x03 is Ctrl-C, \\x04 is Ctrl-D."""
        os.write(self._master, keys.encode())

    def wait(self, timeout: float = 15) -> int:
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with contextlib.suppress(OSError):  # EIO: nobody holds the other side any more
            while data := os.read(self._master, 4096):
                with self._news:
                    self.seen += decoder.decode(data)
                    self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()
