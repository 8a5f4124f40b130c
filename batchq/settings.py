"""Settings: from ``BATCHQ_*`` in the environment, from ``.env``, or from the flags of the command line."""

import os
import re
from typing import Annotated, Any, Literal, Self

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from batchq.common import hidden, sealed
from batchq.common.env_file import FileSettings
from batchq.common.hosts import host_names
from batchq.common.secrets import SECRET_VARIABLES, know_keys, know_password, know_passwords_of
from batchq.errors import ConfigError
from batchq.postgres.databases import Database, databases_of, read_names
from batchq.postgres.dsn import dsn_problems, not_a_dsn

MAX_CONCURRENCY = 1000
MAX_QUEUE_BYTES = 128
# A statement that reads all days takes 5 locks for each. With max_locks_per_transaction = 64 and max_connections = 100
# there is room for 6,400: for three such statements concurrently.
MAX_KEEP_FINISHED_DAYS = 400


class Queue(str):
    """The name of a queue that a worker serves, and its *slots*, if it has slots of its own."""

    slots: int | None = None

    @classmethod
    def read(cls, text: str) -> "Queue":
        """Read ``NAME`` or ``NAME:SLOTS``. Raises ValueError for a name that looks like a mistake."""
        name, colon, number = text.partition(":")
        if colon:
            name = name.strip()
        if colon and not name:
            raise ValueError(f"{text!r} looks like a mistake: before the colon comes the name of a queue")
        if not 1 <= len(name.encode()) <= MAX_QUEUE_BYTES:
            raise ValueError(
                f"the name of a queue has 1 to {MAX_QUEUE_BYTES} bytes, not {len(name.encode())}: {text!r}"
            )
        if "*" in name:
            raise ValueError(f"{text!r} looks like a mistake: patterns are not supported; name each queue")
        digits = number.strip()
        if colon and not (re.fullmatch("[0-9]{1,4}", digits) and 1 <= int(digits) <= MAX_CONCURRENCY):
            raise ValueError(f"{text!r} looks like a mistake: after the colon comes a number of slots, 1 to 1000")
        queue = cls(name)
        queue.slots = int(digits) if colon else None
        return queue


class Settings(FileSettings):
    """Every setting of batchq. Read them with `Settings.load`, which reports an invalid value in one line."""

    model_config = SettingsConfigDict(
        env_prefix="BATCHQ_",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=False,
    )

    dsn: SecretStr = Field(SecretStr(""), description="The database, directly or through a transaction-mode pooler.")
    databases: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of several databases, separated by commas, for `status`, `top`, `web`, `doctor` and "
        "`workers`; the DSN of `eu` is `BATCHQ_DSN_EU`. Other commands need one of them, or `BATCHQ_DSN`.",
    )
    migration_dsn: SecretStr = Field(
        SecretStr(""),
        description="For `batchq migrate` and `distribute`, if another role owns the schema. Default: `BATCHQ_DSN`.",
    )
    listen_dsn: SecretStr = Field(
        SecretStr(""),
        description="A direct connection (no pooler) for immediate notifications of new batches; see `batchq.bell`.",
    )
    encryption_keys: SecretStr = Field(
        SecretStr(""),
        description="Keys that seal and open batches, as `NAME:KEY` separated by commas: the first seals, all open. "
        "Programs that enqueue need them, too. Needs the extra `crypto`; see docs/sealed.md.",
    )
    hidden_fields: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of fields in payloads, items and results, separated by commas, whose values logs, errors, "
        "the web UI and the command line show as `***`: `password,*_token`. See docs/sealed.md.",
    )
    queues: Annotated[tuple[str, ...], NoDecode] = Field(
        ("default",),
        description="The queues that a worker serves, in turn; separated by commas. `mail:5` gives the queue `mail` 5 "
        "slots of its own; the queues without a number share the others.",
    )
    concurrency: int = Field(
        8, ge=1, le=MAX_CONCURRENCY, description="How many `def` batches a worker runs concurrently, in threads."
    )
    async_concurrency: int = Field(
        100, ge=1, le=MAX_CONCURRENCY, description="How many `async def` batches a worker runs concurrently."
    )
    lease_seconds: float = Field(
        60,
        ge=1,
        le=86_400,
        description="A worker that does not renew its leases for this long loses its batches. It renews a lease once a "
        "third of that time has passed.",
    )
    shutdown_seconds: float = Field(
        25,
        ge=0,
        le=86_400,
        description="How long running handlers may take to finish after SIGTERM; then their batches are released.",
    )
    database_timeout_seconds: float = Field(
        15, ge=1, le=3600, description="Timeout of each of batchq's own statements and round trips."
    )
    transaction_timeout_seconds: float = Field(
        300, ge=1, le=86_400, description="Timeout of a handler's transaction (`batch.transaction()` or a chunk's)."
    )
    pool_size: int = Field(
        10,
        ge=1,
        le=MAX_CONCURRENCY,
        description="Most connections for handlers' transactions: for threads, and as many for the event loop.",
    )
    keep_finished_days: int = Field(
        30,
        ge=1,
        le=MAX_KEEP_FINISHED_DAYS,
        description="Finished batches older than this are dropped, a whole day at a time.",
    )
    keep_completed: bool = Field(
        True,
        description="`no`: a completed batch is deleted immediately; failed and cancelled ones are kept all the same.",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65_000,
        description="Port for Prometheus metrics and health checks; 0: none. `batchq workers` counts up from it.",
    )
    metrics_host: str = Field("127.0.0.1", description="Address that serves the metrics; `0.0.0.0` in a container.")
    metrics_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Host names under which the metrics may be requested, separated by commas; any other name is "
        "refused. Addresses, `localhost` and the machine's own name need no entry; `.example.com` stands for all names "
        "below it.",
    )
    traces: bool = Field(
        False,
        description="`yes`: an OpenTelemetry span around each run, linked to the enqueue's; see docs/monitoring.md.",
    )
    log_format: Literal["console", "json"] = Field("console", description="`console` for people, `json` for machines.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level that is logged.")

    def model_post_init(self, _: Any, /) -> None:
        """Hide the passwords of these settings in all that is logged or stored from now on."""
        for name in SECRET_SETTINGS:
            know_passwords_of(getattr(self, name).get_secret_value())
        know_keys(self.encryption_keys.get_secret_value())
        if self.hidden_fields:
            hidden.use(self.hidden_fields)
        for name in SECRET_VARIABLES:
            know_password(os.environ.get(name, ""))

    @field_validator("databases", mode="before")
    @classmethod
    def _split_databases(cls, value: Any) -> Any:
        return read_names(value) if isinstance(value, str) else value

    @field_validator("queues", mode="before")
    @classmethod
    def _split_queues(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if (
            "," not in value
            and len(names) == 1
            and len(words := names[0].replace(" :", ":").replace(": ", ":").split()) > 1
        ):
            raise ValueError(
                f"use a comma between queues: {','.join(words)}; a queue whose name has a space needs one after it"
            )
        return names

    @field_validator("queues")
    @classmethod
    def _check_queues(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("needs at least one queue")
        queues = [Queue.read(text) for text in value]
        slots = {queue: queue.slots for queue in queues}
        if clash := next((queue for queue in queues if queue.slots != slots[queue]), None):
            raise ValueError(f"the queue {clash!r} is named twice, with different numbers of slots")
        return tuple(dict.fromkeys(queues))

    @property
    def queue_slots(self) -> dict[str, int]:
        """How many slots of its own each queue has that has any."""
        named = {queue: queue.slots for queue in self.queues if isinstance(queue, Queue)}
        return {queue: slots for queue, slots in named.items() if slots is not None}

    @field_validator("hidden_fields", mode="before")
    @classmethod
    def _split_fields(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return tuple(name.strip() for name in names if name.strip())

    @field_validator("metrics_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, value: Any) -> Any:
        return host_names(value)

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
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
            raise ConfigError(_describe_problem(error)) from None

    def use_encryption_keys(self) -> None:
        """Seal and open batches with these keys in this process, if there are any. Raises ConfigError."""
        if text := self.encryption_keys.get_secret_value():
            sealed.use_keys(text)

    def require_dsn(self, *, for_migration: bool = False) -> str:
        """Return the DSN. Raises ConfigError if none is set, or if it cannot work through a pooler."""
        name, secret = "BATCHQ_DSN", self.dsn
        if for_migration and self.migration_dsn.get_secret_value():
            name, secret = "BATCHQ_MIGRATION_DSN", self.migration_dsn
        dsn = secret.get_secret_value()
        if not dsn and self.databases:
            only = self._only_database()
            return (for_migration and only.migration_dsn) or only.dsn
        if not dsn:
            raise ConfigError(
                f"{name} is not set; set it to your database, such as postgresql://user:password@host:6543/postgres"
            )
        if problems := dsn_problems(dsn):
            raise ConfigError(f"{name}: {'; '.join(problems)}")
        return dsn

    def named_databases(self) -> list[Database]:
        """Return the databases that `BATCHQ_DATABASES` names; none if it is not set.

        Raises ConfigError, which names the variable, if the DSN of one is not set or cannot work through a pooler.
        """
        return databases_of(self.databases)

    def of_database(self, database: Database) -> Self:
        """Return the settings of a program that works on one of the databases."""
        secrets = {name: SecretStr(text) for name, text in database.dsns().items()}
        return self.model_copy(update={**secrets, "databases": ()})

    def _only_database(self) -> Database:
        if len(self.databases) > 1:
            raise ConfigError(
                f"this works on one database, and BATCHQ_DATABASES names {len(self.databases)} "
                f"({', '.join(self.databases)}); give --database {self.databases[0]}, or set BATCHQ_DSN"
            )
        return self.named_databases()[0]

    def checked_listen_dsn(self) -> str:
        """Return the DSN of the bell, "" if none is set. Raises ConfigError, without its text, if it is not a DSN."""
        dsn = self.listen_dsn.get_secret_value()
        try:
            conninfo_to_dict(dsn)
        except ProgrammingError as error:
            raise ConfigError(f"BATCHQ_LISTEN_DSN: {not_a_dsn(str(error))}") from None
        return dsn


SECRET_SETTINGS = tuple(name for name, field in Settings.model_fields.items() if field.annotation is SecretStr)


def _describe_problem(error: ValidationError) -> str:
    """Return in one line which setting is invalid and why, without a value that may be secret."""
    problems = []
    for detail in error.errors(include_url=False, include_input=True):
        name = ".".join(str(part) for part in detail["loc"])
        is_secret = "dsn" in name or "keys" in name or name == "databases"  # some people put DSNs there
        shown = "" if is_secret else f" (not {detail['input']!r})"
        problems.append(f"BATCHQ_{name.upper()}: {detail['msg'].removeprefix('Value error, ')}{shown}")
    return "; ".join(problems)
