"""The file `.env` of the working directory. If it sets something of batchq's, nobody else may have written it: whoever
starts batchq in a directory of somebody else must not get that person's settings, such as where the web UI listens and
its token. `BATCHQ_ENV_FILE` in the environment names another file, which is read whoever wrote it; empty: none is read.
"""

import grp
import io
import os
import pwd
import stat
from pathlib import Path

from dotenv import dotenv_values
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from batchq.errors import ConfigError

ENV_FILE = Path(".env")
PREFIX = "BATCHQ_"
NAMED = "BATCHQ_ENV_FILE"


class FileSettings(BaseSettings):
    """Settings from arguments, else from the environment, else from `.env`."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (it would read any file, whoever wrote it)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (there is no such directory)
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return where settings come from, the first one first."""
        file = EnvSettingsSource(settings_cls)
        file.env_vars = {name.lower(): value for name, value in read().items()}
        return init_settings, env_settings, file


def file_in_use() -> Path | None:
    """Return the file that sets something of batchq's, None if there is none. Raises ConfigError."""
    return path_in_use().absolute() if read() else None


def path_in_use() -> Path:
    """Return the file to read."""
    return Path(os.environ.get(NAMED, "")) if NAMED in os.environ else ENV_FILE


def read() -> dict[str, str]:
    """Return what the file sets of batchq's; nothing where there is no file, or one that cannot be read: that sets
    nothing. Raises ConfigError if it sets something and others may have written it."""
    path = path_in_use()
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())  # of what is read, not of what stands there a moment later
            text = file.read() if stat.S_ISREG(status.st_mode) else b""
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        if os.environ.get(NAMED):
            raise ConfigError(f"{NAMED} names {shown(path)}, which cannot be read ({error.strerror})") from None
        return {}
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read ({error.strerror}); start batchq elsewhere") from None
    values = ours(path, text)
    if values and NAMED not in os.environ:
        check(path, status)
    return values


def ours(path: Path, text: bytes) -> dict[str, str]:
    """Return the settings of batchq's in the text of a file."""
    try:
        values = dotenv_values(stream=io.StringIO(text.decode()))
    except UnicodeDecodeError:
        if PREFIX.encode() not in text.upper():
            return {}
        raise ConfigError(f"{shown(path)} is not UTF-8 text; write it anew, or remove it") from None
    return {name: value for name, value in values.items() if value is not None and name.upper().startswith(PREFIX)}


def open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a named pipe would otherwise hold the program until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def check(path: Path, status: os.stat_result) -> None:
    """Raise ConfigError if another user owns the file or a link to it, or may write to it."""
    strangers = {status.st_uid, path.lstat().st_uid} - trusted_users()
    if strangers:
        raise ConfigError(
            f"{shown(path)} has settings of batchq and belongs to user {strangers.pop()}, not to you or root; "
            f"start batchq in a directory of yours, make the file yours with chown, or name it: {NAMED}={path}"
        )
    by_group = status.st_mode & stat.S_IWGRP and not is_trusted_group(status.st_gid)
    if by_group or status.st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"{shown(path)} has settings of batchq and can be written by its group or by others (mode {mode:o}); "
            f"run: chmod go-w .env, or name it: {NAMED}={path}"
        )


def trusted_users() -> set[int]:
    """Return who may have written the file: root, this user, and who became root by sudo."""
    who = os.environ.get("SUDO_UID", "") if os.geteuid() == 0 else ""
    return {0, os.geteuid(), *([int(who)] if who.isdecimal() else [])}


def is_trusted_group(group_id: int) -> bool:
    """Return whether a group is root's, or that of this user alone: several systems give each user one, and let it
    write what its user makes."""
    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(os.geteuid())
    except KeyError:
        return group_id == 0
    is_own = group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return group_id == 0 or is_own


def shown(path: Path) -> str:
    """Return a path for a message; control characters in the name of a directory are escaped."""
    return repr(str(path.absolute()))
