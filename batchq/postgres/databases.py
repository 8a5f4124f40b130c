"""Several databases: their names, and where the DSN of each is set."""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from batchq.common.env_file import read
from batchq.common.secrets import know_passwords_of
from batchq.errors import ConfigError
from batchq.postgres.dsn import dsn_problems

_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,39}")


class Database(NamedTuple):
    """A database with the name that people see instead of its DSN."""

    name: str
    dsn: str
    listen_dsn: str = ""
    migration_dsn: str = ""

    @property
    def variable(self) -> str:
        """The variable that holds its DSN."""
        return _variable("DSN", self.name)

    def advice(self, text: str) -> str:
        """Return a message that was written for the only database, with the variable and the option of this one."""
        option = f"batchq migrate --database {self.name}"
        return text.replace("BATCHQ_DSN", self.variable).replace("batchq migrate", option)

    def dsns(self) -> dict[str, str]:
        """Return the settings that hold the DSNs of a program that works on this database."""
        return {"dsn": self.dsn, "listen_dsn": self.listen_dsn, "migration_dsn": self.migration_dsn}


def read_names(text: str) -> tuple[str, ...]:
    """Read ``eu, us``; an empty text is no names. Raises ValueError for a name that cannot be, or is there twice."""
    if not text.strip():
        return ()
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise ValueError("needs at least one name, such as eu,us")
    for name in names:
        if not _NAME.fullmatch(name):
            shown = f"{name!r} cannot be one: " if re.fullmatch("[A-Za-z0-9._ -]{1,60}", name) else ""  # may be a DSN
            raise ValueError(
                f"{shown}the name of a database is 1 to 40 lower-case letters, digits, - or _, a letter or digit "
                "first; each DSN is in a variable of its own, such as BATCHQ_DSN_EU"
            )
    variables = [_variable("DSN", name) for name in names]
    if twice := next((name for name, each in zip(names, variables, strict=True) if variables.count(each) > 1), None):
        raise ValueError(f"two databases have the name {twice!r} (- and _ count as the same); rename one")
    return names


def databases_of(names: Sequence[str]) -> list[Database]:
    """Return the databases of some names, whose DSNs are in the environment or in `.env`.

    Raises ConfigError if a DSN is not set, is not one or cannot work, or if two databases have the same; it names the
    variable, and never shows the DSN.
    """
    file = {name.upper(): text for name, text in read().items()} if names else {}
    found: dict[str, str] = {}
    made = []
    for name in names:
        dsn, listen, migration = (
            _checked(_variable(kind, name), file) for kind in ("DSN", "LISTEN_DSN", "MIGRATION_DSN")
        )
        if not dsn:
            known = ", ".join(sorted(each for each in {*file, *os.environ} if each.startswith("BATCHQ_DSN_")))
            shown = f" (set are: {known})" if known else ""
            raise ConfigError(f"{_variable('DSN', name)} is not set; set it to the DSN of the database {name!r}{shown}")
        if other := found.get(dsn):
            raise ConfigError(f"{_variable('DSN', other)} and {_variable('DSN', name)} are the same; correct one")
        found[dsn] = name
        made.append(Database(name, dsn, listen, migration))
    return made


def _variable(kind: str, name: str) -> str:
    return f"BATCHQ_{kind}_{name.upper().replace('-', '_')}"


def _checked(variable: str, file: dict[str, str]) -> str:
    """Return the DSN in a variable, "" if it is not set. Raises ConfigError for one that cannot work."""
    dsn = os.environ.get(variable) or file.get(variable, "")
    know_passwords_of(dsn)
    problems = dsn_problems(dsn) if dsn and not variable.startswith("BATCHQ_LISTEN") else []
    if problems:
        raise ConfigError(f"{variable}: {'; '.join(problems)}")
    return dsn
