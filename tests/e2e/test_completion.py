"""Shells complete batchq's commands, options, choices and files when somebody presses Tab."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchq.cli import make_parser
from batchq.cli.commands.completion import script
from batchq.errors import ConfigError
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.programs import path_of
from tests.support.steps import step
from tests.support.waiting import allowed

SECONDS = 20
READY = "ready-"
# What is typed before Tab, and what the line then is.
TYPED = {
    "batchq sched": "batchq schedule ",
    "batchq enqueue mail --max-f": "batchq enqueue mail --max-failed-items ",
    "batchq enqueue mail --on-failure wa": "batchq enqueue mail --on-failure wait ",
    "batchq enqueue mail --items cont": "batchq enqueue mail --items contacts.jsonl ",
}
STARTS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], 'eval "$(batchq completion bash)"'),
    "zsh": (
        ["zsh", "-f", "-i"],
        "fpath=($PWD $fpath); batchq completion zsh > _batchq; autoload -Uz compinit; compinit -u -D",
    ),
}
CONTROLS = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>]|\][^\a]*\a)|[\a\r]|.\x08")


class Shell:
    """An interactive shell on a terminal."""

    def __init__(self, screen: int) -> None:
        self._screen = screen
        self._seen = ""

    def type(self, text: str) -> None:
        """Press keys."""
        self._seen = ""
        os.write(self._screen, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until the terminal shows *text*."""
        end = time.monotonic() + allowed(SECONDS)
        while text not in CONTROLS.sub("", self._seen):
            assert time.monotonic() < end, f"no {text!r} in {self._seen!r}"
            if select.select([self._screen], [], [], 0.1)[0]:
                self._seen += os.read(self._screen, 65_536).decode(errors="replace")


@contextmanager
def shell(name: str, directory: Path) -> Iterator[Shell]:
    """Start a shell that has loaded the completion as the help says."""
    words, loads = STARTS[name]
    screen, terminal = pty.openpty()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with subprocess.Popen(
        [path_of(words[0]), *words[1:]],
        cwd=directory,
        env=os.environ | {"PATH": path, "TERM": "dumb", "COLUMNS": "160", "PS1": "$ "},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    ) as process:
        os.close(terminal)
        try:
            shell = Shell(screen)
            shell.type(f"{loads}; echo {READY}$((40 + 2))\n")
            shell.wait_for(f"{READY}42")
            yield shell
        finally:
            process.kill()
            os.close(screen)


@pytest.mark.parametrize("name", STARTS)
def test_a_shell_completes_what_is_typed(name: str, tmp_path: Path) -> None:
    (tmp_path / "contacts.jsonl").touch()
    with shell(name, tmp_path) as started:
        for typed, completed in TYPED.items():
            step("%s: %s", name, typed)
            started.type(f"{typed}\t")
            started.wait_for(completed.removeprefix(typed))
            started.type("\x15")  # empties the line


def test_fish_completes_what_is_typed(tmp_path: Path) -> None:
    (tmp_path / "contacts.jsonl").touch()
    (tmp_path / "batchq.fish").write_text(script(make_parser(), "fish"))
    for typed, completed in TYPED.items():
        step(typed)
        command = f"source batchq.fish; complete -C '{typed}'"
        fish = [path_of("fish"), "-c", command]
        said = subprocess.run(
            fish, cwd=tmp_path, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, check=True
        )
        assert [line.split("\t")[0] for line in said.stdout.splitlines()] == [completed.split()[-1]], said


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(ConfigError, match=r"pip install 'pgbatchq\[completion\]'"):
        script(make_parser(), "bash")


def test_another_shell_is_refused(dsn: str, tmp_path: Path) -> None:
    assert CommandLine(dsn, tmp_path)("completion", "csh").code == 2


if __name__ == "__main__":
    run_alone(__file__)
