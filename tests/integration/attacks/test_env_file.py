"""Attacks by a `.env` in the directory where somebody starts batchq: it sets database, address and token."""

import grp
import os
import pwd
import socket
from pathlib import Path

import pytest

from batchq.common import env_file
from batchq.errors import ConfigError
from batchq.settings import Settings
from batchq.web.settings import WebSettings
from tests.support.alone import run_alone
from tests.support.commands import CommandLine

INTRUDER = "BATCHQ_DSN=postgresql://intruder@192.0.2.1/x\nBATCHQ_WEB_HOST=0.0.0.0\nBATCHQ_WEB_TOKEN=intruders-token\n"
NOBODY = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The intruder's file, in the directory where somebody else works."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ".env"
    path.write_text(INTRUDER)
    path.chmod(0o600)
    return path


def refused(why: str) -> None:
    """Check that no settings are loaded, and that the error tells why."""
    for load in (Settings.load, WebSettings.load):
        with pytest.raises(ConfigError, match=why):
            load()


@as_root
def test_a_file_of_somebody_else(file: Path) -> None:
    """As a neighbour who owns the directory, and waits for somebody to start batchq there."""
    os.chown(file, NOBODY, NOBODY)
    refused(rf"{file}' has batchq settings and belongs to user {NOBODY}, not to you or root; start batchq in a ")


@as_root
def test_a_link_of_somebody_else_to_a_file_of_ones_own(file: Path, tmp_path: Path) -> None:
    """As a neighbour who has another project's settings read: a link to a file of the victim's."""
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert WebSettings.load().host == "0.0.0.0", "a link of one's own is followed"
    os.chown(file, NOBODY, NOBODY, follow_symlinks=False)
    refused(f"belongs to user {NOBODY}")


@as_root
def test_a_file_of_root_is_read_by_others(file: Path) -> None:
    """As nobody: the fence lets the machine's owner through."""
    file.chmod(0o644)
    file.parent.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        assert WebSettings.load().host == "0.0.0.0"
    finally:
        os.seteuid(0)


@as_root
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666, 0o664])
def test_a_file_that_others_may_write(file: Path, mode: int) -> None:
    """As a neighbour who adds a line to a file that he may write."""
    os.chown(file, -1, NOBODY)
    file.chmod(mode)
    refused(rf"can be written by its group or by others \(mode {mode:o}\); run: chmod go-w \.env")


@as_root
def test_the_group_of_one_user_alone_may_write(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody whose system gives each user a group, and lets it write what that user makes (umask 002)."""
    user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(os.getegid())
    os.chown(file, -1, NOBODY)
    file.chmod(0o664)
    for name, members, number, is_read in (
        (user.pw_name, [], user.pw_gid, True),
        (user.pw_name, [user.pw_name], user.pw_gid, True),
        (user.pw_name, ["neighbour"], user.pw_gid, False),
        ("staff", [], user.pw_gid, False),
        (user.pw_name, [], user.pw_gid + 1, False),
    ):
        found = grp.struct_group((name, group.gr_passwd, number, members))
        monkeypatch.setattr(grp, "getgrgid", lambda _, found=found: found)
        if is_read:
            assert WebSettings.load().host == "0.0.0.0"
        else:
            refused("can be written by its group")


@as_root
def test_a_file_of_somebody_else_that_sets_nothing_of_ours_is_no_harm(file: Path) -> None:
    """As a neighbour whose `.env` is of another program; or a project that is mounted into a container."""
    file.write_text("DJANGO_SECRET=1\n")
    os.chown(file, NOBODY, NOBODY)
    file.chmod(0o666)
    assert WebSettings.load().host == "127.0.0.1"


@as_root
def test_a_file_that_the_environment_names_is_read_whoever_wrote_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nobody: only who starts batchq sets its environment."""
    os.chown(file, NOBODY, NOBODY)
    refused(r"BATCHQ_ENV_FILE=\.env")
    monkeypatch.setenv("BATCHQ_ENV_FILE", ".env")
    assert WebSettings.load().host == "0.0.0.0"
    monkeypatch.setenv("BATCHQ_ENV_FILE", "")
    assert WebSettings.load().host == "127.0.0.1"
    monkeypatch.setenv("BATCHQ_ENV_FILE", "nowhere")
    refused("BATCHQ_ENV_FILE names .*nowhere', which cannot be read")


@as_root
def test_who_became_root_by_sudo_is_no_stranger(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a developer who runs `sudo batchq migrate` in a project of his own."""
    os.chown(file, NOBODY, NOBODY)
    monkeypatch.setenv("SUDO_UID", str(NOBODY))
    assert WebSettings.load().host == "0.0.0.0"


@as_root
def test_a_file_that_cannot_be_read_sets_nothing(file: Path) -> None:
    """As a service whose settings come from its environment, by a file that root alone reads."""
    file.parent.chmod(0o755)
    os.seteuid(NOBODY)
    try:
        assert WebSettings.load().host == "127.0.0.1"
    finally:
        os.seteuid(0)


def test_what_is_no_file_is_not_read(file: Path) -> None:
    """As a neighbour who leaves a named pipe there, on which a program would wait until somebody writes."""
    file.unlink()
    os.mkfifo(file, 0o600)
    assert Settings.load().dsn.get_secret_value() == ""
    file.unlink()
    file.mkdir()
    assert Settings.load().dsn.get_secret_value() == ""
    file.rmdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(".env")
        refused("cannot be read")
    file.unlink()
    file.symlink_to("nowhere")
    assert Settings.load().dsn.get_secret_value() == ""


def test_a_file_that_is_exchanged_after_it_was_checked(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a neighbour who is quick: what was checked is what is read, whatever stands there a moment later."""
    other = tmp_path / "other"
    other.write_text("BATCHQ_WEB_TOKEN=exchanged-token\n")
    check = env_file.check

    def check_and_lose(path: Path, status: os.stat_result) -> None:
        check(path, status)
        if other.exists():
            other.rename(path)

    monkeypatch.setattr(env_file, "check", check_and_lose)
    assert WebSettings.load().token.get_secret_value() == "intruders-token"


def test_a_file_that_is_no_text(file: Path) -> None:
    """As a neighbour who leaves garbage there: an error in one line, and no traceback."""
    file.write_bytes(b"BATCHQ_DSN=\xff\xfe")
    refused("is not UTF-8 text")


def test_commands_refuse_it_and_the_web_ui_does_not_listen(dsn: str, tmp_path: Path) -> None:
    """As a neighbour whose file everybody may write."""
    batchq = CommandLine(dsn, tmp_path)
    (tmp_path / ".env").write_text(INTRUDER)
    (tmp_path / ".env").chmod(0o666)
    for command in (
        ["web"],
        ["status"],
        ["worker", "tasks:app", "--drain"],
        ["workers", "1", "tasks:app"],
        ["migrate"],
    ):
        ended = batchq(*command)
        assert (ended.code, "chmod go-w .env" in ended.complaint) == (2, True), command


def test_a_command_says_which_file_it_has_read(dsn: str, tmp_path: Path) -> None:
    """As somebody who starts batchq in a strange directory, and wants to know."""
    batchq = CommandLine(dsn, tmp_path)
    assert batchq("status").err == ""
    file = tmp_path / ".env"
    file.write_text("DJANGO_SETTINGS_MODULE=shop\n")
    file.chmod(0o600)
    assert batchq("status").err == "", "nothing of batchq's is in it"
    file.write_text("BATCHQ_LEASE_SECONDS=61\n")
    assert batchq("status").err == f"batchq: settings read from {str(file)!r}\n"
    for arguments in (["worker", "tasks:app"], ["workers", "1", "tasks:app"]):
        lines = batchq(*arguments, "--drain", "--log-format", "json").err.splitlines()
        assert f'"file": "{file}"' in lines[0]
        assert '"event": "settings read"' in lines[0]


def test_the_name_of_a_directory_sends_nothing_to_the_terminal(dsn: str, tmp_path: Path) -> None:
    """As a neighbour whose directory's name clears the screen."""
    hostile = tmp_path / "\x1b[2J\x1b]52;c;aGk=\x07"
    hostile.mkdir()
    batchq = CommandLine(dsn, hostile)
    file = hostile / ".env"
    file.write_text("BATCHQ_LEASE_SECONDS=61\n")
    for mode in (0o600, 0o666):
        file.chmod(mode)
        ended = batchq("status")
        assert ".env" in ended.err
        assert "\x1b" not in ended.err


if __name__ == "__main__":
    run_alone(__file__)
