"""The file `.env` of the working directory.

If it has batchq settings, only you or root may have written it: if you start batchq in another user's directory, you
must not get that user's settings, such as where the web UI listens and its token. `BATCHQ_ENV_FILE` in the environment
names another file, which is read whoever wrote it; if it is empty, no file is read.
"""

import io
import os
import stat
from pathlib import Path

from dotenv import dotenv_values
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from batchq.errors import ConfigError

ENV_FILE = Path(".env")
_PREFIX = "BATCHQ_"
_NAMED = "BATCHQ_ENV_FILE"


class FileSettings(BaseSettings):
    """Settings from arguments, else from the environment, else from `.env`."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (it would read a file that anybody wrote)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (there is no such directory)
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources, the first one first."""
        file = EnvSettingsSource(settings_cls)
        file.env_vars = {name.lower(): value for name, value in read().items()}
        return init_settings, env_settings, file


def file_in_use() -> Path | None:
    """Return the file that has batchq settings, None if there is none. Raises ConfigError."""
    return _path_in_use().absolute() if read() else None


def _path_in_use() -> Path:
    return Path(os.environ.get(_NAMED, "")) if _NAMED in os.environ else ENV_FILE


def read() -> dict[str, str]:
    """Return the file's batchq settings, if it is readable. Raises ConfigError if others may have written them."""
    path = _path_in_use()
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())  # of the file that is read, not of its replacement
            text = file.read() if stat.S_ISREG(status.st_mode) else b""
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if os.environ.get(_NAMED):
            raise ConfigError(f"{_NAMED} names {_shown(path)}, which cannot be read ({error.strerror})") from None
        return {}
    except OSError as error:
        raise ConfigError(f"{_shown(path)} cannot be read ({error.strerror}); start batchq elsewhere") from None
    values = _batchq_settings(path, text)
    if values and _NAMED not in os.environ:
        check(path, status)
    return values


def _batchq_settings(path: Path, text: bytes) -> dict[str, str]:
    try:
        values = dotenv_values(stream=io.StringIO(text.decode()))
    except UnicodeDecodeError:
        if _PREFIX.encode() not in text.upper():
            return {}
        raise ConfigError(f"{_shown(path)} is not UTF-8 text; rewrite it or remove it") from None
    return {name: value for name, value in values.items() if value is not None and name.upper().startswith(_PREFIX)}


def _open_without_waiting(path: str, flags: int) -> int:
    """Open a file without waiting: with a named pipe the program would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def check(path: Path, status: os.stat_result) -> None:
    """Raise ConfigError if another user owns the file or a link to it, or may write to it."""
    strangers = {status.st_uid, path.lstat().st_uid} - _trusted_users()
    if strangers:
        raise ConfigError(
            f"{_shown(path)} has batchq settings and belongs to user {strangers.pop()}, not to you or root; "
            f"start batchq in a directory of your own, chown the file, or name it: {_NAMED}={path}"
        )
    by_group = status.st_mode & stat.S_IWGRP and not _is_trusted_group(status.st_gid)
    if by_group or status.st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"{_shown(path)} has batchq settings and can be written by its group or by others (mode {mode:o}); "
            f"run: chmod go-w .env, or name it: {_NAMED}={path}"
        )


def _trusted_users() -> set[int]:
    """Return who may have written the file: root, this user, and the user who became root by sudo."""
    who = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else ""
    return {0, os.geteuid(), *([int(who)] if who.isdecimal() else [])}


def _is_trusted_group(group_id: int) -> bool:
    """Return whether a group is root's, or one of only this user, as several systems give to each user."""
    import grp  # not on Windows, and only workers get here
    import pwd

    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(os.geteuid())
    except KeyError:
        return group_id == 0
    is_own = group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return group_id == 0 or is_own


def _shown(path: Path) -> str:
    return repr(str(path.absolute()))  # control characters escaped
