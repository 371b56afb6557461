"""The command line as a process of its own (`run` to its end, `Serving` while a `with` block lasts), or a call."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import memws

PROGRAM = Path(memws.__file__)
Variables = Mapping[str, str] | None


def environment(variables: Variables = None) -> dict[str, str]:
    """This process's environment without settings of memws, OpenAI and proxies, and with `variables`.

    memws can be imported, and Python keeps what it has compiled, as it usually does.
    """
    foreign = re.compile(r"(MEMWS|OPENAI)_.*|(?i:.*_proxy)|NO_COLOR|PYTHONDONTWRITEBYTECODE")
    rest = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
    more = dict(variables or {})
    paths = filter(None, (more.pop("PYTHONPATH", ""), str(PROGRAM.parent)))
    return {**rest, "PYTHONIOENCODING": "utf-8", "COLUMNS": "120", "PYTHONPATH": os.pathsep.join(paths), **more}


def command(*flags: str, program: Path = PROGRAM) -> list[str]:
    """memws itself as a module: Python compiles a script anew at each start, which takes as long as all the rest."""
    return [sys.executable, *(["-m", "memws"] if program == PROGRAM else [str(program)]), *flags]


def run(
    *flags: str, cwd: Path, variables: Variables = None, text: str = "", program: Path = PROGRAM, timeout: float = 30
) -> subprocess.CompletedProcess[str]:
    """Run `python -m memws FLAGS…` with `text` as its standard input, to its end."""
    options: dict[str, Any] = {"cwd": cwd, "env": environment(variables), "encoding": "utf-8", "timeout": timeout}
    return subprocess.run(command(*flags, program=program), input=text, capture_output=True, check=False, **options)


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Main = Callable[..., Done]


def call(capsys: Any, *words: object, variables: Variables = None) -> Done:
    """Call memws.main in this process, where no process needs to be seen; its logging is taken back."""
    logger, handlers, level = memws.logger, list(memws.logger.handlers), memws.logger.level
    capsys.readouterr()
    with mock.patch.dict(os.environ, {"COLUMNS": "120", **(variables or {})}):
        try:
            status = memws.main([str(word) for word in words])
        except SystemExit as leaving:  # of --help
            status = int(leaving.code or 0)
        finally:
            logger.handlers[:] = handlers
            logger.setLevel(level)
    return Done(status, *capsys.readouterr())


def sentence(done: Done | subprocess.CompletedProcess[str]) -> str:
    """What was refused with exit status 2 and one sentence, and nothing else."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(r"memws: [^\n]+\n", done.stderr), done.stderr
    return done.stderr


class Process:
    """A process in the folder `cwd` that prints lines, at first one with its address, while the `with` block lasts."""

    def __init__(self, *arguments: str, cwd: Path, variables: Mapping[str, str]) -> None:
        self.arguments, self.cwd, self.variables = arguments, cwd, variables
        self.out: list[str] = []  # the lines of its standard output so far
        self.log = ""  # its standard error, once it has ended
        self.url = ""

    def __enter__(self) -> Self:
        self._log = (self.cwd / f"stderr-{os.urandom(4).hex()}.txt").open("w+", encoding="utf-8")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self.process = subprocess.Popen(self.arguments, cwd=self.cwd, env=self.variables, encoding="utf-8", **pipes)
        self.url = (self.line().split() or [""])[-1]
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()

    def line(self) -> str:
        self.out.append(self.process.stdout.readline().rstrip("\n"))  # type: ignore[union-attr]
        return self.out[-1]

    def ask(self, text: str = "") -> str:
        """Write a line to it; the line that it prints then, an empty one where it has ended."""
        with contextlib.suppress(BrokenPipeError):
            print(text, file=self.process.stdin, flush=True)
        return self.line()

    def wait(self, timeout: float = 20) -> int:
        status = self.process.wait(timeout)
        if not self._log.closed:
            self.out += self.process.stdout.read().splitlines()  # type: ignore[union-attr]
            self.process.communicate()  # closes the pipes; what was read ahead it does not have
            self._log.seek(0)
            self.log = self._log.read()
            self._log.close()
        return status


class Serving(Process):
    """A server process, on a free port unless the flags name one."""

    def __init__(self, *flags: str, cwd: Path, variables: Variables = None, program: Path = PROGRAM) -> None:
        is_named = "--port" in flags or "MEMWS_PORT" in (variables or {})
        words = command("serve", *flags, *([] if is_named else ["--port", "0"]), program=program)
        super().__init__(*words, cwd=cwd, variables=environment(variables))

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def end(self, number: int = signal.SIGTERM, timeout: float = 20) -> int:
        self.process.send_signal(number)
        return self.wait(timeout)
