"""The worker: one process of claimer, lanes, finisher and keeper, from its start to its graceful end."""

import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from batchq.app import App
from batchq.batch.claimed import Runtime
from batchq.common import traces
from batchq.common.log import get_logger
from batchq.common.text import one_line
from batchq.errors import ConfigError, StopRequested
from batchq.postgres.connections import connect
from batchq.postgres.handler_connections import HandlerConnections
from batchq.postgres.link import Link
from batchq.postgres.migrate import check_schema
from batchq.postgres.server_checks import check_server, check_writable
from batchq.postgres.statements import claims, health, session, workers
from batchq.postgres.statements.workers import WorkerRow
from batchq.postgres.transactions import transaction
from batchq.settings import Settings
from batchq.worker.bell import Bell
from batchq.worker.claimer import Claimer
from batchq.worker.execution import RELEASED
from batchq.worker.finisher import Finisher
from batchq.worker.keeper import Keeper
from batchq.worker.lanes import Lane
from batchq.worker.loop_lane import LoopLane
from batchq.worker.memory import collecting_seldom
from batchq.worker.thread_lane import ThreadLane

if TYPE_CHECKING:
    from batchq.worker.metrics_server import MetricsServer

SWITCH_SECONDS = 0.001
WRITING_SECONDS = 2.0
LEAST_TOLD_SECONDS = 1.0
KEEPER, FINISHER = "batchq-keeper", "batchq-finisher"
IDS_FINISHED_DAYS = 30.0
MOST_LOGGED = 20

log = get_logger()


class Worker:
    """Works the batches of an app's kinds. `run` blocks; `stop` and `stop_now` may be called from anywhere."""

    def __init__(self, app: App, settings: Settings, *, drain: bool = False) -> None:
        if not app.handlers:
            raise ConfigError("the app has no handlers; decorate functions with @app.handler(kind)")
        self.settings = settings
        self.drain = drain
        self.dsn = settings.require_dsn()
        self.id = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.stopping = threading.Event()
        self.leaving = threading.Event()
        self.connections = HandlerConnections(
            self.dsn, settings.pool_size, settings.database_timeout_seconds, settings.transaction_timeout_seconds
        )
        keeper_seconds = max(1.0, min(settings.database_timeout_seconds, settings.lease_seconds / 6))
        timeouts = (settings.database_timeout_seconds, settings.database_timeout_seconds, keeper_seconds)
        self.links = [Link(self.dsn, timeout_seconds) for timeout_seconds in timeouts]
        self.is_broken = False
        self.told_at = float("inf")  # when the end was asked for
        self.is_told_to_stop = False
        self.is_worn_out = False  # half of its slots are lost: it ends in order to be replaced
        self.finisher = Finisher(self.links[0], lambda: self.claimer.nudge(), settings.keep_completed)
        self.lanes = self.make_lanes(app)
        runtime = Runtime(self.connections, settings.lease_seconds, self.stopping, settings.keep_completed)
        self.claimer = Claimer(self.links[1], settings.queues, self.lanes, self.id, runtime)
        self.keeper = self.make_keeper(app)
        listen_dsn = settings.checked_listen_dsn()
        self.bell = Bell(listen_dsn, self.claimer.nudge) if listen_dsn else None
        self.metrics: MetricsServer | None = None
        self.services: dict[str, threading.Thread] = {}

    def make_lanes(self, app: App) -> list[Lane]:
        """Make a lane for each style of handler that the app has."""
        handlers = app.handlers.items()
        in_threads = {kind: handler for kind, handler in handlers if not handler.is_async}
        in_loop = {kind: handler for kind, handler in handlers if handler.is_async}
        lanes: list[Lane] = []
        require_extras(self.settings)
        traced = self.settings.traces
        if in_threads:
            slots, fair_queue = self.settings.concurrency, self.connections.fair_queue
            lanes.append(ThreadLane(in_threads, slots, self.finisher.put, fair_queue, traced=traced))
        if in_loop:
            slots = self.settings.async_concurrency
            lanes.append(LoopLane(in_loop, slots, self.finisher.put, self.connections, traced=traced))
        return lanes

    def make_keeper(self, app: App) -> Keeper:
        """Make the keeper."""
        row = WorkerRow(
            self.id,
            socket.gethostname(),
            os.getpid(),
            version("batchq"),
            list(self.settings.queues),
            sorted(app.handlers),
            sum(lane.concurrency for lane in self.lanes),
        )
        return Keeper(
            self.links[2],
            self.settings.queues,
            self.lanes,
            row,
            self.settings.lease_seconds,
            self.settings.keep_finished_days,
            self.claimer,
            self.finisher.throughput,
            max(self.settings.shutdown_seconds, LEAST_TOLD_SECONDS),
            self.wear_out,
            self.finisher.unwritten,
        )

    # ----------------------------------------------------------------------------------------------- from outside

    def stop(self) -> None:
        """Claim no more; give back what has not begun; let the rest end, for shutdown_seconds at most."""
        self.is_told_to_stop = True
        self.end()

    def end(self) -> None:
        """Do as `stop` does, unasked."""
        self.told_at = min(self.told_at, time.monotonic())
        self.stopping.set()
        self.claimer.nudge()

    def stop_now(self) -> None:
        """Give back what runs, too, and leave at once."""
        self.leaving.set()
        self.stop()

    @property
    def wants_replacement(self) -> bool:
        """Whether it has ended for the loss of its slots, and not because it was told to stop or to drain."""
        return self.is_worn_out and not self.is_told_to_stop and not self.claimer.draining.is_set()

    def run(self) -> bool:
        """Work until stopped or, with drain, until nothing is ready. Returns True if every outcome was written.

        Raises ConfigError if the database, its schema or the DSN will not do.
        """
        check_database(self.dsn, self.settings.database_timeout_seconds, self.keeper.row)
        with switching_quickly(), collecting_seldom():
            return self.work()

    def work(self) -> bool:
        """Start everything, claim until the end, and end everything; return whether every outcome was written.

        What fails at the start, a port that is taken for one, leaves nothing running: its threads would keep up the
        heartbeat of a worker that never claims.
        """
        try:
            self.begin()
            self.claimer.run(self.drain)
        finally:
            written = self.shut_down_whatever_comes()
        return written and not self.is_broken

    # ------------------------------------------------------------------------------------------------- beginning

    def begin(self) -> None:
        """Start everything. Raises ConfigError, PoolTimeout."""
        self.metrics = self.serve_metrics()
        self.connections.open()
        for lane in self.lanes:
            lane.start()
        self.start_service(self.keeper.run, KEEPER)
        self.start_service(self.finisher.run, FINISHER)
        if self.bell:
            self.start_service(self.bell.run, "batchq-bell")
        log.info("worker started", worker=self.id, queues=self.settings.queues, kinds=self.keeper.row.kinds)

    def start_service(self, run: Callable[[], None], name: str) -> None:
        """Start a service thread; should it fail, which it must not, the worker stops: half a worker does harm."""

        def guarded() -> None:
            try:
                run()
            except BaseException as error:
                log.error("a service has failed; the worker stops", service=name, error=one_line(error))
                self.is_broken = True
                self.end()

        self.services[name] = thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()

    def wear_out(self) -> None:
        """Stop in order to be replaced: lost threads hold memory and connections, a blocked event loop runs nothing."""
        if not self.stopping.is_set():
            log.error("half of the slots are lost; the worker stops to be replaced", worker=self.id)
            self.is_worn_out = True
            self.end()

    def serve_metrics(self) -> "MetricsServer | None":
        """Serve metrics and health checks, if a port is set. Raises ConfigError."""
        if not self.settings.metrics_port:
            return None
        from batchq.worker.metrics import serve_worker

        lanes = {"async def" if isinstance(lane, LoopLane) else "def": lane for lane in self.lanes}
        silent_seconds = 30 + 2 * self.settings.database_timeout_seconds
        return serve_worker(self.settings, self.finisher.throughput, lanes, self.keeper, silent_seconds)

    # ---------------------------------------------------------------------------------------------------- ending

    def shut_down_whatever_comes(self) -> bool:
        """Do as `shut_down` does; an interruption, a second Ctrl-C for one, makes it short."""
        try:
            return self.shut_down()
        except BaseException:
            self.leaving.set()
            self.shut_down()
            raise

    def shut_down(self) -> bool:
        """End what has begun, in the order in which nothing is lost; return whether every outcome was written."""
        self.told_at = min(self.told_at, time.monotonic())
        self.stopping.set()
        if self.bell:
            self.bell.close()
        self.give_back_claims()
        self.wait_for_handlers()
        self.give_back_running()
        written = self.finish_writing()
        self.keeper.close()
        self.has_ended(KEEPER, 1)
        if written and self.services:  # else the database does not answer, or nobody has written a heartbeat
            self.say_goodbye()
        for lane in self.lanes:
            lane.stop()
        self.connections.close()
        for link in self.links:
            link.close()
        if self.metrics:
            self.metrics.close()
        if self.settings.traces:
            traces.flush()
        lost_slots = sum(self.keeper.lost.values())
        log.info("worker stopped", worker=self.id, lost_slots=lost_slots, **self.finisher.counts)
        return written

    def give_back_claims(self) -> None:
        """Give back what is claimed and has not begun, also by a claim of which we do not know whether it happened."""
        for lane in self.lanes:
            lane.release_waiting(0)
        try:
            self.claimer.give_back_unknown()
        except Exception as error:
            log.warning("a claim could not be given back; its lease will run out", error=one_line(error))

    def wait_for_handlers(self) -> None:
        """Wait until no batch is in hand, until shutdown_seconds have passed; not at all when leaving.

        Counted from when the end was asked for: the claimer may have waited long for the database since.
        """
        until = self.told_at + self.settings.shutdown_seconds
        while any(lane.in_flight for lane in self.lanes) and time.monotonic() < until:
            if self.leaving.wait(0.02):
                return

    def give_back_running(self) -> None:
        """Give back what still runs; its handlers are told at their next checkpoint, if they come to one."""
        for lane in self.lanes:
            for batch in lane.list_in_flight():
                stopped = StopRequested(f"the worker has stopped: batch {batch.id} was given back")
                if lane.end_from_outside(batch, RELEASED, stopped):
                    log.info("batch given back while it ran", batch_id=batch.id, kind=batch.kind)

    def has_ended(self, name: str, seconds: float) -> bool:
        """Wait for a service to end; return whether it has, or was never started."""
        thread = self.services.get(name)
        if thread is not None and thread.is_alive():
            thread.join(max(0.0, seconds))
        return thread is None or not thread.is_alive()

    def finish_writing(self) -> bool:
        """Wait until the finisher has written everything; return False if the database did not let it.

        For a while after the handlers' time at most: the platform is about to kill the process.
        """
        now = time.monotonic()
        last = now if self.leaving.is_set() else max(now, self.told_at + self.settings.shutdown_seconds)
        until = min(now + self.settings.database_timeout_seconds, last + WRITING_SECONDS)
        while any(lane.unwritten for lane in self.lanes) and time.monotonic() < until:
            time.sleep(0.01)  # an outcome may still be on its way to the finisher
        self.finisher.close()
        if self.has_ended(FINISHER, until - time.monotonic()):
            return True
        self.finisher.give_up.set()
        left = [batch.id for batch in self.finisher.unwritten()]
        log.error("not every outcome could be written", count=len(left), batch_ids=left[:MOST_LOGGED])
        return False

    def say_goodbye(self) -> None:
        """Write what was counted last, and remove our row of batchq.workers, if the database answers."""
        try:
            self.finisher.throughput.write(self.links[1], self.id)
            with self.links[1].transaction() as conn:
                workers.forget_worker(conn, self.id)
        except Exception:
            log.info("the worker's row stays behind until somebody tidies up", worker=self.id)


@contextmanager
def switching_quickly() -> Iterator[None]:
    """Let threads take turns each millisecond, not each five: so long an answer of the database waits for handlers."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def require_extras(settings: Settings) -> None:
    """Import what the settings ask for besides batchq's own needs. Raises ConfigError where it is not installed.

    The command line does so before the app's directory is on the path: what is imported is not imported from there.
    """
    if settings.traces:
        traces.require()
    if settings.metrics_port:
        try:
            import batchq.worker.metrics  # noqa: F401
        except ModuleNotFoundError as error:
            raise ConfigError(f"metrics need an extra ({error}): pip install 'batchq[metrics]'") from None


def check_database(dsn: str, seconds: float, row: WorkerRow | None = None) -> None:
    """Raise ConfigError unless the database is new enough and has our schema, OperationalError if it is away.

    Also ConfigError if its encoding does not have a letter of a name in *row*: no claim and no heartbeat would work.
    """
    with connect(dsn) as conn, transaction(conn, seconds, settings=session.FIXED_FORMATS):
        check_server(conn)
        check_writable(conn)
        check_schema(conn)
        if not session.has_worker_duty(conn):
            role = shlex.quote(session.role_and_encoding(conn)[0])
            raise ConfigError(
                f"permission denied: role {role} may not work batches; "
                f"as the owner of the schema: batchq roles worker {role} --apply"
            )
        try:
            session.check_encodable(conn, [*row.queues, *row.kinds, row.id] if row else [])
        except claims.UNREADABLE as error:
            raise ConfigError(f"the name of a queue or a kind: {error.diag.message_primary}") from None
        for relation, last_given, newest in health.ids_given_twice(conn, IDS_FINISHED_DAYS):
            log.error("ids given twice", relation=relation, last_given=last_given, newest=newest)
