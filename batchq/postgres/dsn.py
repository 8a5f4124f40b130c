"""Find what in a DSN or in the environment breaks behind a transaction-mode pooler."""

import os
import re

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

# Variables that libpq sends as startup parameters, which poolers reject or drop. PGCLIENTENCODING is harmless: each
# connection asks for UTF-8 itself, which overrides the variable.
STARTUP_VARIABLES = ("PGOPTIONS", "PGTZ", "PGDATESTYLE", "PGGEQO")
SUPABASE_POOLER = ".pooler.supabase.com"
MAX_STARTUP_BYTES = 900  # Supavisor (2.9 and later) rejects a startup packet over 1024


def dsn_problems(dsn: str) -> list[str]:
    """Return what would break *dsn* behind a transaction-mode pooler, each with its remedy, without the password."""
    try:
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    except ProgrammingError as error:
        return [not_a_dsn(str(error))]
    return [*parameter_problems(parts), *_environment_problems(), *_supabase_problems(parts)]


def not_a_dsn(error: str) -> str:
    """Return the problem that libpq cannot parse the DSN. libpq's message may quote a password: keep only a name."""
    found = re.search(r'invalid (?:connection option|URI query parameter:?) "\w+"', error)
    return (
        f"not a Postgres DSN{f': {found[0]}' if found else ''}; it looks like postgresql://user:password@host:6543/db"
    )


def parameter_problems(parts: dict[str, str]) -> list[str]:
    """Return what is wrong with the DSN's parameters."""
    problems = [
        f"{name}= does not survive a pooler; use ALTER ROLE ... SET, or leave it out"
        for name in ("options", "replication")
        if parts.get(name)
    ]
    if parts.get("channel_binding") == "require" and "neon" not in parts.get("host", ""):
        problems.append("channel_binding=require: poolers offer SCRAM-SHA-256 only; leave it out")
    if parts.get("sslnegotiation") == "direct":
        problems.append("sslnegotiation=direct: poolers wait for an SSLRequest first; leave it out")
    if "@" in parts.get("host", "") or not re.fullmatch(r"[\d,]*", parts.get("port", "")):
        problems.append("its host or port has characters of a password: write @ : / ? # % in a password as %40 %3A ...")
    startup = ("user", "dbname", "application_name")
    if sum(len(name) + len(parts.get(name, "").encode()) + 2 for name in startup) > MAX_STARTUP_BYTES:
        problems.append("user, database and application_name are together over 900 bytes; shorten them")
    return problems


def _environment_problems() -> list[str]:
    return [
        f"the environment's {name} would be sent at the start of each connection; unset it"
        for name in STARTUP_VARIABLES
        if os.environ.get(name)
    ]


def _supabase_problems(parts: dict[str, str]) -> list[str]:
    if not parts.get("host", "").endswith(SUPABASE_POOLER):
        return []
    problems = []
    if "." not in parts.get("user", ""):
        problems.append(f"Supabase's pooler wants the user as ROLE.PROJECT_REF, not {parts.get('user', '')!r}")
    if parts.get("port", "5432") == "5432":
        problems.append("port 5432 of Supabase's pooler is session mode, which allows few clients; use 6543")
    if parts.get("sslmode", "prefer") in ("disable", "allow", "prefer"):
        problems.append("add sslmode=require (or verify-full with Supabase's certificate)")
    return problems
