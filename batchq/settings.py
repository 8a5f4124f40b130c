"""Settings: from ``BATCHQ_*`` in the environment, from ``.env``, or from the flags of the command line."""

import os
import re
from contextlib import suppress
from typing import Annotated, Any, Literal, Self

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from batchq.env_file import FileSettings
from batchq.errors import ConfigError
from batchq.hosts import host_names

MAX_CONCURRENCY = 1000
# A statement that looks over all days takes 5 locks for each. With max_locks_per_transaction = 64 and
# max_connections = 100 there is room for 6,400: for three such statements at once.
MAX_KEEP_FINISHED_DAYS = 400


class Settings(FileSettings):
    """Every setting of batchq. Read them with `Settings.load`, which reports a wrong value in one line."""

    model_config = SettingsConfigDict(
        env_prefix="BATCHQ_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    dsn: SecretStr = Field(
        SecretStr(""), description="Where the database is; through a transaction-mode pooler or not."
    )
    migration_dsn: SecretStr = Field(
        SecretStr(""), description="For `batchq migrate` alone, where another role owns the schema. Default: the DSN."
    )
    listen_dsn: SecretStr = Field(
        SecretStr(""),
        description="A direct connection (no pooler) on which to hear of new batches at once; see `batchq.bell`.",
    )
    queues: Annotated[tuple[str, ...], NoDecode] = Field(
        ("default",), description="Queues that a worker serves, in turn; separated by commas."
    )
    concurrency: int = Field(
        8, ge=1, le=MAX_CONCURRENCY, description="How many batches of `def` handlers a worker runs at once, in threads."
    )
    async_concurrency: int = Field(
        100, ge=1, le=MAX_CONCURRENCY, description="How many batches of `async def` handlers it runs at once."
    )
    lease_seconds: float = Field(
        60, ge=1, le=86_400, description="A worker silent for this long loses its batches. It gives a sign each third."
    )
    shutdown_seconds: float = Field(
        25,
        ge=0,
        le=86_400,
        description="How long running handlers may take to end after SIGTERM; then they are given back.",
    )
    database_timeout_seconds: float = Field(
        15, ge=1, le=3600, description="Bound of each of batchq's own statements and round trips."
    )
    transaction_timeout_seconds: float = Field(
        300, ge=1, le=86_400, description="Bound of a handler's transaction (batch.transaction() or a chunk's)."
    )
    pool_size: int = Field(
        10,
        ge=1,
        le=MAX_CONCURRENCY,
        description="Connections for transactions of handlers, at most: for threads, and as many for the event loop.",
    )
    keep_finished_days: int = Field(
        30,
        ge=1,
        le=MAX_KEEP_FINISHED_DAYS,
        description="Finished batches older than this are dropped, a whole day at a time.",
    )
    keep_completed: bool = Field(
        True, description="`no`: a batch that completes is deleted at once; failed and cancelled ones are kept."
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65_000,
        description="A port for Prometheus metrics and health checks; 0: none. `batchq workers` counts up from it.",
    )
    metrics_host: str = Field("127.0.0.1", description="The address that they are served on; `0.0.0.0` in a container.")
    metrics_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names under which they are scraped, separated by commas. Addresses and `localhost` need no "
        "entry, nor does the machine's own name; `.example.com` stands for all below it; any other name is refused.",
    )
    traces: bool = Field(
        False,
        description="`yes`: a span of OpenTelemetry around each run, linked to its enqueue's; see docs/monitoring.md.",
    )
    log_format: Literal["console", "json"] = Field("console", description="`console` for people, `json` for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least level that is logged."
    )

    def model_post_init(self, _: Any, /) -> None:
        """Have the passwords of these settings hidden in whatever is logged or stored from now on."""
        for name in SECRET_SETTINGS:
            know_passwords_of(getattr(self, name).get_secret_value())
        for name in SECRET_VARIABLES:
            know_password(os.environ.get(name, ""))

    @field_validator("queues", mode="before")
    @classmethod
    def split_queues(cls, value: Any) -> Any:
        """Take ``"mail, default"`` as well as a sequence."""
        if isinstance(value, str):
            return tuple(name.strip() for name in value.split(",") if name.strip())
        return value

    @field_validator("queues")
    @classmethod
    def check_queues(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse no queues at all, and names that the table would refuse."""
        if not value or any(not 1 <= len(name.encode()) <= 128 for name in value):
            raise ValueError("needs at least one queue, each name 1 to 128 bytes long")
        return tuple(dict.fromkeys(value))

    @field_validator("metrics_hosts", mode="before")
    @classmethod
    def split_hosts(cls, value: Any) -> Any:
        """Take ``"a.example, b.example"`` as well as a sequence."""
        return host_names(value)

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def lower(cls, value: Any) -> Any:
        """Take ``INFO`` for ``info``."""
        return value.lower() if isinstance(value, str) else value

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Return the settings, *overrides* (those that are not None) first.

        Raises ConfigError, in one line that names the setting and never shows a secret.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        try:
            return cls(**given)
        except ValidationError as error:
            raise ConfigError(describe_problem(error)) from None

    def require_dsn(self, *, for_migration: bool = False) -> str:
        """Return the DSN. Raises ConfigError if none is set, or if it cannot work through a pooler."""
        name, secret = "BATCHQ_DSN", self.dsn
        if for_migration and self.migration_dsn.get_secret_value():
            name, secret = "BATCHQ_MIGRATION_DSN", self.migration_dsn
        dsn = secret.get_secret_value()
        if not dsn:
            raise ConfigError(
                f"{name} is not set; set it to your database, such as postgresql://user:password@host:6543/postgres"
            )
        if problems := dsn_problems(dsn):
            raise ConfigError(f"{name}: {'; '.join(problems)}")
        return dsn

    def checked_listen_dsn(self) -> str:
        """Return the DSN of the bell, "" if none is set. Raises ConfigError, without its text, if it is no DSN."""
        dsn = self.listen_dsn.get_secret_value()
        try:
            conninfo_to_dict(dsn)
        except ProgrammingError as error:
            raise ConfigError(f"BATCHQ_LISTEN_DSN: {not_a_dsn(str(error))}") from None
        return dsn


SECRET_SETTINGS = tuple(name for name, field in Settings.model_fields.items() if field.annotation is SecretStr)


def describe_problem(error: ValidationError) -> str:
    """Say in one line which setting is wrong and why, without its value where that may be secret."""
    problems = []
    for detail in error.errors(include_url=False, include_input=True):
        name = ".".join(str(part) for part in detail["loc"])
        shown = "" if "dsn" in name else f" (not {detail['input']!r})"
        problems.append(f"BATCHQ_{name.upper()}: {detail['msg']}{shown}")
    return "; ".join(problems)


# What becomes a start-up parameter of libpq; poolers refuse it or drop it (psycopg sends these from the environment).
# Not PGCLIENTENCODING: each connection asks for UTF-8 itself, which comes before the variable.
STARTUP_VARIABLES = ("PGOPTIONS", "PGTZ", "PGDATESTYLE", "PGGEQO")
SUPABASE_POOLER = ".pooler.supabase.com"
MAX_STARTUP_BYTES = 900  # Supavisor (2.9 and later) refuses a start-up packet over 1024


def dsn_problems(dsn: str) -> list[str]:
    """Return what would break *dsn* behind a transaction-mode pooler, each with its remedy. Shows no password."""
    try:
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    except ProgrammingError as error:
        return [not_a_dsn(str(error))]
    return [*parameter_problems(parts), *environment_problems(), *supabase_problems(parts)]


def not_a_dsn(error: str) -> str:
    """Say that libpq could not read the DSN. Its own words quote parts of it, so no more of them than a name."""
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


def environment_problems() -> list[str]:
    """Return what the environment adds to every connection that a pooler would refuse or drop."""
    return [
        f"the environment's {name} would be sent at the start of each connection; unset it"
        for name in STARTUP_VARIABLES
        if os.environ.get(name)
    ]


def supabase_problems(parts: dict[str, str]) -> list[str]:
    """Return what is wrong for Supabase's pooler (host ``*.pooler.supabase.com``)."""
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


# ----------------------------------------------------------------------------------------------------- passwords

# A port and a path with an @ in it are no password: http://host:8080/users/me@there.
IN_AN_ADDRESS = re.compile(r"(://[^:/?#@\s]{0,500}):(?!\d{1,5}/)(?:(?:(?!://)[^@\s]){0,2000}@)+")
# password=x as in a DSN or a list of variables; 'password': 'x' as in a dict.
AFTER_ITS_NAME = re.compile(
    r"""(password["']?\s*(?:=|:(?=\s*["']))\s*)('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\s&]+)""", re.IGNORECASE
)
LEAST_KNOWN_CHARACTERS = 6
NO_SECRETS = ("batchq", "postgres", "password")  # as passwords for trying things out; they stand in many messages
SECRET_VARIABLES = ("PGPASSWORD", "BATCHQ_WEB_PASSWORD", "BATCHQ_WEB_TOKEN")
known_passwords: dict[str, re.Pattern[str]] = {}


def hide_password(text: str) -> str:
    """Return *text* with every password in it replaced by ***: those of DSNs, those behind the word password, and those
    that `know_password` has been given."""
    for known in tuple(known_passwords.values()):
        text = known.sub("***", text)
    return AFTER_ITS_NAME.sub(r"\1***", IN_AN_ADDRESS.sub(r"\1:***@", text))


def know_password(password: str, *names: str) -> None:
    """Have `hide_password` hide a password wherever it stands, percent-encoded and escaped as well.

    Not one that is shorter than 6 characters, or is one of *names* too (its user's, its database's) or a word that
    everybody knows: half a message would be hidden with it.
    """
    if len(password) >= LEAST_KNOWN_CHARACTERS and password not in (*names, *NO_SECRETS, *known_passwords):
        known_passwords[password] = re.compile("".join(spellings(char) for char in password))


def know_passwords_of(dsn: str) -> None:
    """Do so for the password in a DSN; a text that is no DSN is left to whoever connects."""
    with suppress(ProgrammingError):
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
        know_password(parts.get("password", ""), parts.get("user", ""), parts.get("dbname", ""))


# Bounded: else a text of nothing but backslashes is searched from each of them to its end.
ESCAPES = r"\\{1,16}"


def spellings(char: str) -> str:
    """Return a pattern for a character of a password: as it is, after backslashes (repr, JSON, a DSN of name=value),
    percent-encoded, or by its number."""
    encoded = "".join(f"%{byte:02x}" for byte in char.encode(errors="surrogateescape"))
    ways = [re.escape(char), rf"{ESCAPES}{re.escape(char)}", encoded, encoded.upper()]
    if char == " ":
        ways.append(r"\+")
    if not char.isascii():
        ways += [rf"{ESCAPES}u{ord(char):04x}", rf"{ESCAPES}x{ord(char):02x}"]
    return f"(?:{'|'.join(ways)})"
