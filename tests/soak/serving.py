"""The process of a server in a soak run: the command line of memws, with what SOAK in the environment adds as JSON.

{"constants": {…}, "desk": 0, "fail": false}: constants of memws, the port of the desk that its tools ask (0: it has
none), and whether writes fail as Faulty says.
"""

import asyncio
import functools
import json
import os
import socket
import sqlite3
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import memws

PLAN = Path("plan.json")
WRITES = ("INSERT", "UPDATE", "DELETE", "BEGIN IMMEDIATE", "COMMIT")


class Faulty(sqlite3.Connection):
    """A connection whose writes fail while plan.json is there: {"from": n, "to": m, "text": …, "undo": bool}."""

    writes = 0
    writer = False  # it has begun to write: a reader's COMMIT is no write

    def _count(self, sql: str) -> None:
        self.writer = self.writer or sql == "BEGIN IMMEDIATE"
        if not self.writer or not sql.lstrip().upper().startswith(WRITES):
            return
        if not PLAN.exists():
            Faulty.writes = 0
            return
        Faulty.writes += 1
        plan = json.loads(PLAN.read_text("utf-8"))
        if plan["from"] <= Faulty.writes < plan["to"]:
            if plan["undo"] and self.in_transaction:  # as SQLite does when the disk is full
                super().execute("ROLLBACK")
            raise sqlite3.OperationalError(plan["text"])

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self._count(sql)
        return super().execute(sql, *arguments)

    def executemany(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        self._count(sql)
        return super().executemany(sql, *arguments)


def ask(question: str) -> str:
    """Ask the desk."""
    with socket.create_connection(("127.0.0.1", SOAK["desk"])) as line:
        line.sendall(question.encode() + b"\n")
        return line.makefile().readline().strip()


async def ask_later(question: str) -> str:
    """Ask the desk without a thread."""
    reader, writer = await asyncio.open_connection("127.0.0.1", SOAK["desk"])
    try:
        writer.write(question.encode() + b"\n")
        return (await reader.readline()).decode().strip()
    finally:
        writer.close()


class Server(memws.WebSocketServer):
    """A server with the tools of the desk."""

    def open(self) -> Any:
        self.tools |= {tool.__name__: memws.make_tool(tool) for tool in (ask, ask_later)}
        return super().open()


if __name__ == "__main__":
    SOAK = {"constants": {}, "desk": 0, "fail": False, **json.loads(os.environ["SOAK"])}
    for name, value in SOAK["constants"].items():
        assert hasattr(memws, name), name
        setattr(memws, name, value)
    if SOAK["fail"]:
        sqlite3.connect = functools.partial(sqlite3.connect, factory=Faulty)  # type: ignore[assignment]
    if SOAK["desk"]:
        memws.WebSocketServer = Server  # type: ignore[misc]
    sys.exit(memws.main())
