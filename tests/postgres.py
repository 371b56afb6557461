"""A PostgreSQL cluster of its own, on a free loopback port, while a `with` block lasts.

    with Cluster() as cluster:
        server = memws.WebSocketServer(db=cluster.database())
        cluster.stop()
        cluster.start()

Names and times are sorted by the rules of a language, as a database is found in practice, and not by bytes. PostgreSQL
serves no root: for root it runs as the user postgres, whom Debian's package brings.
"""

import itertools
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Self

READY = "database system is ready to accept connections"
ICU = ("--encoding=UTF8", "--locale=C", "--locale-provider=icu", "--icu-locale=en")
SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
"""What a process that is killed has written is kept by the kernel: only the machine's end needs fsync."""


def find_programs() -> Path | None:
    """The folder of PostgreSQL's server programs: on the PATH, else of Debian's newest; None where there are none."""
    on_path = shutil.which("initdb")
    debian = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    found = [Path(on_path)] if on_path else sorted(debian, key=lambda path: int(path.parts[-3]))
    return found[-1].resolve().parent if found else None


def free_port() -> int:
    """A port that no connection is given as its own: one that is cannot be had again after a restart."""
    for port in random.sample(range(20_000, 32_000), 1_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise RuntimeError("no free port")


class Cluster:
    """A cluster and its process. Connections need a password; the user memws owns its databases and is no superuser.

    settings: of postgresql.conf, such as fsync="on" or max_connections=10.
    """

    def __init__(self, **settings: object) -> None:
        self.settings = {**SETTINGS, **settings}
        self.password = secrets.token_hex()
        self._numbers = itertools.count(1)
        self._free: list[str] = []

    def __enter__(self) -> Self:
        programs = find_programs()
        if programs is None:
            raise FileNotFoundError("PostgreSQL is missing; apt-get install postgresql")
        self._programs, self._home, self.port = programs, Path(tempfile.mkdtemp(prefix="memws-postgres-")), free_port()
        secret = self._home / "password"
        secret.write_text(self.password)
        self._options: Any = {"cwd": self._home, "env": {"PATH": os.defpath, "LC_ALL": "C"}, "encoding": "utf-8"}
        if os.getuid() == 0:
            self._options |= {"user": "postgres", "group": "postgres", "extra_groups": []}
            for path in (self._home, secret):
                shutil.chown(path, "postgres", "postgres")
        try:
            words = ["-D", "data", "-U", "postgres", "-A", "scram-sha-256", "--pwfile=password", "--no-sync", *ICU]
            done = subprocess.run([programs / "initdb", *words], **self._options, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            self.start()
            self.run(f"CREATE ROLE memws LOGIN PASSWORD '{self.password}'")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        shutil.rmtree(self._home)

    def start(self) -> None:
        settings = {**self.settings, "port": self.port}
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", "data", *words]
        self.process: Any = subprocess.Popen(command, **self._options, stderr=subprocess.PIPE)
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if READY in line:
                break
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._reader.start()
        assert READY in "".join(lines), "".join(lines)

    def stop(self) -> None:
        """End all of its processes, whatever they do, and leave the rest to the next start."""
        if hasattr(self, "process"):
            self.process.send_signal(signal.SIGQUIT)
            self._reader.join(30)  # the log ends with the last of them
            assert not self._reader.is_alive()
            self.process.wait()
            self.process.stderr.close()

    def run(self, sql: str, database: str = "postgres") -> list[Any]:
        """Run a statement as the superuser, outside transactions; its rows."""
        import psycopg

        address = f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"
        with psycopg.connect(address, autocommit=True) as connection:
            cursor = connection.execute(sql.encode())
            return cursor.fetchall() if cursor.description else []

    def database(self) -> str:
        """The address of an empty database that nobody else uses."""
        if self._free:
            return self._free.pop()
        name = f"memws{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name} OWNER memws")
        return f"postgresql://memws:{self.password}@127.0.0.1:{self.port}/{name}"

    def give_back(self, address: str) -> None:
        """Empty a database, whoever uses it, to be given again: that takes a third of the time of a new one."""
        name = address.rpartition("/")[2]
        self.run(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")  # noqa: S608
        self.run("DROP OWNED BY memws", name)
        self._free.append(address)
