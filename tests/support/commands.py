"""Run `batchq` commands, in a directory of their own with an app to import."""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.command_server import CommandServer
from tests.support.waiting import allowed

TASKS = """
import batchq

app = batchq.App()

@app.handler("good")
def good(batch):
    return "fine"

@app.handler("bad")
def bad(batch):
    raise ValueError("bad batch")

@app.item_handler("items")
def item(item):
    if item == "bad":
        raise ValueError("bad item")
"""
MOST_SECONDS = 30


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Return its output as JSON."""
        return json.loads(self.out)

    @property
    def complaint(self) -> str:
        """Return its one line of error; fail if it wrote anything else, a traceback for example."""
        assert self.code in (1, 2), f"exit code {self.code}, {self.out}"
        assert self.err.startswith("batchq: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert len(self.err) < 2_000
        return self.err.removeprefix("batchq: ").rstrip("\n")


class CommandLine:
    """Runs commands in *directory*, where tasks.py has an app, on the database *dsn* (None: none is set)."""

    def __init__(self, dsn: str | None, directory: Path) -> None:
        self.directory = directory
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHQ_", "PG"))}
        self.environment = kept | ({} if dsn is None else {"BATCHQ_DSN": dsn}) | {"COLUMNS": "200"}
        (directory / "tasks.py").write_text(TASKS)

    def __call__(self, *arguments: str, stdin: str | bytes = b"", **environment: str) -> Ended:
        """Run one command to its end, forked by the command server; *environment* is added to its variables."""
        data = stdin.encode() if isinstance(stdin, str) else stdin
        variables = self.environment | environment
        code, out, err = server().run(list(arguments), self.directory, variables, data, allowed(MOST_SECONDS))
        return Ended(code, out.decode(), err.decode())

    def run_program(self, *arguments: str, stdin: bytes = b"", **environment: str) -> Ended:
        """Run one command to its end, started as a user starts it: half a second slower, for it imports all."""
        ended = subprocess.run(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment | environment,
            input=stdin,
            capture_output=True,
            timeout=allowed(MOST_SECONDS),
            check=False,
        )
        return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())

    @contextmanager
    def start(self, *arguments: str) -> "Iterator[subprocess.Popen[str]]":
        """Run one command while the block runs; its output and errors are to be read there."""
        with subprocess.Popen(
            self.command(*arguments),
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest
        ) as process:
            try:
                yield process
            finally:
                process.kill()  # one that has not ended would keep the test waiting

    def command(self, *arguments: str) -> list[str]:
        """Return the words of a command."""
        return [sys.executable, "-m", "batchq", *arguments]


@cache
def server() -> CommandServer:
    """Return the server of this process, started when the first command is run."""
    server = CommandServer()
    atexit.register(server.close)
    return server
