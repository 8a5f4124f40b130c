"""What is checked before a worker starts: that the extras are installed, and that the database will do."""

import shlex

from batchq.common import traces
from batchq.common.log import get_logger
from batchq.errors import ConfigError
from batchq.postgres.connections import connect
from batchq.postgres.migrate import check_schema
from batchq.postgres.server_checks import check_server, check_writable
from batchq.postgres.statements import claims, health, session
from batchq.postgres.statements.workers import WorkerRow
from batchq.postgres.transactions import transaction
from batchq.settings import Settings

_IDS_FINISHED_DAYS = 30.0

_log = get_logger()


def require_extras(settings: Settings) -> None:
    """Import the extras that the settings need. Raises ConfigError where one is not installed.

    The command line does so before the app's directory is on the path, so that they are not imported from there.
    """
    if settings.traces:
        traces.require()
    if settings.metrics_port:
        try:
            import batchq.worker.metrics  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(f"metrics need an extra ({error}): pip install 'batchq[metrics]'") from None


def check_database(dsn: str, seconds: float, row: WorkerRow | None = None) -> None:
    """Raise ConfigError unless the database is new enough and has the schema; OperationalError if it is unavailable.

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
