"""What is checked before a worker starts: that the extras are installed, and that the database will do."""

import shlex
import time
from typing import NamedTuple

from batchq.common import traces
from batchq.common.log import get_logger
from batchq.errors import ConfigError
from batchq.postgres.connections import connect
from batchq.postgres.migrate import check_schema
from batchq.postgres.server_checks import check_server, check_writable
from batchq.postgres.statements import claims, health, ledger, session
from batchq.postgres.statements.workers import WorkerRow
from batchq.postgres.transactions import transaction
from batchq.settings import Settings

_IDS_FINISHED_DAYS = 30.0

_log = get_logger()


def require_extras(settings: Settings) -> None:
    """Import the extras that the settings need, and read the keys of sealed batches. Raises ConfigError for what is not
    installed, and for keys that are none.

    The command line does so before the app's directory is on the path, so that they are not imported from there.
    """
    settings.use_encryption_keys()
    if settings.traces:
        traces.require()
    if settings.metrics_port:
        try:
            import batchq.worker.metrics  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(f"metrics need an extra ({error}): pip install 'pgbatchq[metrics]'") from None


class Checked(NamedTuple):
    """What a worker knows of its database once it has checked it.

    clock_ahead: what to add to a monotonic time for the database's clock, in seconds since 1970. is_distributed:
    whether its tables have the layout for a distributed Postgres.
    """

    clock_ahead: float
    is_distributed: bool


def check_database(dsn: str, seconds: float, row: WorkerRow | None = None) -> Checked:
    """Return what a worker must know of its database.

    Raise ConfigError unless the database is new enough and has the schema; OperationalError if it is unavailable.

    Also ConfigError if its encoding lacks a character of a name in *row*: no claim and no heartbeat would work.
    """
    with connect(dsn) as conn, transaction(conn, seconds, settings=session.FIXED_FORMATS):
        check_server(conn)
        check_writable(conn)
        check_schema(conn)
        if not session.has_worker_duty(conn):
            role = shlex.quote(session.role_and_encoding(conn)[0])
            raise ConfigError(
                f"permission denied: role {role} may not run batches; "
                f"as the owner of the schema: batchq roles worker {role} --apply"
            )
        try:
            session.check_encodable(conn, [*row.queues, *row.kinds, row.id] if row else [])
        except claims.UNREADABLE as error:
            raise ConfigError(f"the name of a queue or a kind: {error.diag.message_primary}") from None
        for relation, last_given, newest in health.ids_given_twice(conn, _IDS_FINISHED_DAYS):
            _log.error("ids given twice", relation=relation, last_given=last_given, newest=newest)
        return Checked(session.clock(conn) - time.monotonic(), ledger.is_distributed(conn))
