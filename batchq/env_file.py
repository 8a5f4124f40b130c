"""The file `.env` of the working directory. It is read only if nobody else could have written it: whoever starts batchq
in a directory of somebody else must not get that person's settings, such as where the web UI listens and its token."""

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
        file.env_vars = {name.lower(): value for name, value in read(ENV_FILE).items()}
        return init_settings, env_settings, file


def file_in_use() -> Path | None:
    """Return the `.env` that sets something of batchq, None if there is none. Raises ConfigError."""
    return ENV_FILE.absolute() if any(name.upper().startswith(PREFIX) for name in read(ENV_FILE)) else None


def read(path: Path) -> dict[str, str]:
    """Return what a file sets; nothing where there is none. Raises ConfigError if others may have written it."""
    try:
        with open(path, "rb", opener=open_at_once) as file:
            status = os.fstat(file.fileno())  # of what is read, not of what stands there a moment later
            if not stat.S_ISREG(status.st_mode):
                return {}
            check(path, status)
            text = file.read().decode()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return {}
    except UnicodeDecodeError:
        raise ConfigError(f"{shown(path)} is not UTF-8 text; write it anew, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{shown(path)} cannot be read ({error.strerror}); start batchq elsewhere") from None
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def open_at_once(path: str, flags: int) -> int:
    """Open a file without waiting: a named pipe would otherwise hold the program until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def check(path: Path, status: os.stat_result) -> None:
    """Raise ConfigError if another user owns the file or a link to it, or may write to it."""
    strangers = {status.st_uid, path.lstat().st_uid} - {0, os.geteuid()}
    if strangers:
        raise ConfigError(
            f"{shown(path)} belongs to user {strangers.pop()}, not to you or root; "
            "start batchq in a directory of yours, or make the file yours with chown"
        )
    by_group = status.st_mode & stat.S_IWGRP and not is_private(status.st_gid)
    if by_group or status.st_mode & stat.S_IWOTH:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(
            f"{shown(path)} can be written by its group or by others (mode {mode:o}); run: chmod go-w .env"
        )


def is_private(group_id: int) -> bool:
    """Return whether a group is that of this user alone: several systems give each user one, and let it write files."""
    try:
        group, user = grp.getgrgid(group_id), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def shown(path: Path) -> str:
    """Return a path for a message; control characters in the name of a directory are escaped."""
    return repr(str(path.absolute()))
