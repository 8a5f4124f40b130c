"""A process that has imported once what batchq imports, and forks for each command: 0.1 s instead of half a second.

Each command has a process of its own, with its own arguments, directory, variables and files. It imports `batchq.cli`
anew, runs as `python -m batchq` does, and ends as an interpreter ends. What differs: its files are no pipes, nobody
reads PYTHON* variables, and at the end nothing is collected that was there before the fork.
"""

import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from signal import SIGKILL
from threading import Lock
from typing import IO


class CommandServer:
    """The server as its client has it; it ends when its client does."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for pytest
            )

    def close(self) -> None:
        """End it."""
        self.socket.close()
        self.process.wait()

    def run(
        self, arguments: list[str], directory: Path, environment: dict[str, str], data: bytes, seconds: float
    ) -> tuple[int, bytes, bytes]:
        """Run one command to its end; return its exit code, output and errors. Raises TimeoutError when killed."""
        with (
            tempfile.TemporaryFile() as request,
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
        ):
            fill(request, json.dumps([arguments, str(directory), environment]).encode())
            fill(stdin, data)
            files = [file.fileno() for file in (request, stdin, stdout, stderr)]
            with self.lock:
                code = self.ask(files, seconds)
            return code, content(stdout), content(stderr)

    def ask(self, files: list[int], seconds: float) -> int:
        """Have the server run one command; return its exit code, or minus the signal that ended it."""
        self.socket.settimeout(seconds)
        socket.send_fds(self.socket, [b"run"], files)
        pid = int(self.socket.recv(100))
        try:
            return int(self.socket.recv(100))
        except BaseException:
            os.kill(pid, SIGKILL)
            self.socket.settimeout(None)
            self.socket.recv(100)
            raise


def fill(file: IO[bytes], data: bytes) -> None:
    """Write what a command will read."""
    file.write(data)
    file.seek(0)


def content(file: IO[bytes]) -> bytes:
    """Return what a command wrote."""
    file.seek(0)
    return file.read()


def serve(asked: socket.socket) -> None:
    """Fork for each request, and tell its pid and its exit code. Returns in each of the forks only."""
    while True:
        message, files, _, _ = socket.recv_fds(asked, 100, 4)
        if not message:
            sys.exit()
        pid = os.fork()
        if pid == 0:
            asked.close()
            return become(files)
        for file in files:
            os.close(file)
        asked.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        asked.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(files: list[int]) -> None:
    """Take over the files, arguments, directory and variables of a command."""
    for number, file in enumerate(files[1:]):
        os.dup2(file, number)
    with open(files[0]) as request:
        arguments, directory, environment = json.load(request)
    for file in files[1:]:
        os.close(file)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    sys.path[0] = directory


def prepare() -> None:
    """Import all that the command line imports, and forget the command line: it looks at its environment."""
    import batchq.cli

    for name in [
        name for name in sys.modules if name.startswith(("batchq.cli", "batchq.demo", "batchq.common.terminal"))
    ]:
        del sys.modules[name]
    del batchq.common.terminal  # else "from batchq.common import terminal" would find it
    gc.freeze()


if __name__ == "__main__":
    prepare()
    serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("batchq", run_name="__main__", alter_sys=True)
