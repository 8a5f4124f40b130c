"""Settings: from ``BATCHQ_*`` in the environment, from ``.env``, or from the flags of the command line."""

import os
from typing import Annotated, Any, Literal, Self

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from batchq.common.env_file import FileSettings
from batchq.common.hosts import host_names
from batchq.common.secrets import SECRET_VARIABLES, know_password, know_passwords_of
from batchq.errors import ConfigError
from batchq.postgres.dsn import dsn_problems, not_a_dsn

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
