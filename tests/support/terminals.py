"""Run a command on a real terminal, and return what the terminal was sent."""

import os
import pty
import subprocess

from tests.support.commands import CommandLine

SECONDS = 60


def on_terminal(command: CommandLine, *arguments: str, typed: str = "", **environment: str) -> tuple[int, str]:
    """Return the exit code of a command, and all that it wrote on a terminal of 120 columns; *typed*: the answers."""
    screen, terminal = pty.openpty()
    os.write(screen, typed.encode())
    with subprocess.Popen(
        command.command(*arguments),
        cwd=command.directory,
        env=command.environment | {"TERM": "xterm", "COLUMNS": "120"} | environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        try:
            seen = read_all(screen)
            return process.wait(SECONDS), seen
        finally:
            process.kill()
            os.close(screen)


def read_all(screen: int) -> str:
    """Return what comes to a terminal until its last writer has closed it."""
    parts = []
    try:
        while part := os.read(screen, 65_536):
            parts.append(part)
    except OSError:  # how Linux tells that nobody writes any more
        pass
    return b"".join(parts).decode()
