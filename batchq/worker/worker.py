"""The worker: one process of claimer, lanes, finisher, keeper and housekeeper, from its start to its graceful end."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from batchq.app import App
from batchq.common import traces
from batchq.common.log import get_logger
from batchq.errors import ConfigError
from batchq.postgres.statements import shards
from batchq.postgres.statements.workers import Turn
from batchq.settings import Settings
from batchq.worker.bell import Bell
from batchq.worker.checks import check_database, require_extras
from batchq.worker.claimer import Claimer
from batchq.worker.context import Context
from batchq.worker.event_loop import EventLoop
from batchq.worker.finisher import Finisher
from batchq.worker.hooks import WorkerHooks, in_hooks
from batchq.worker.housekeeper import Housekeeper
from batchq.worker.keeper import Keeper
from batchq.worker.lanes import Ended, Lane
from batchq.worker.lifecycle import Services, StopReason
from batchq.worker.loop_lane import LoopLane
from batchq.worker.memory import collecting_seldom
from batchq.worker.permits import declare_limits
from batchq.worker.shutdown import Shutdown
from batchq.worker.thread_lane import ThreadLane

if TYPE_CHECKING:
    from batchq.worker.metrics_server import MetricsServer

_SWITCH_SECONDS = 0.001

_log = get_logger()


class Worker:
    """Runs the batches of an app's kinds. `run` blocks; `stop` and `stop_now` may be called from anywhere."""

    def __init__(self, app: App, settings: Settings, *, drain: bool = False) -> None:
        if not app.handlers:
            raise ConfigError("the app has no handlers; decorate functions with @app.handler(kind)")
        require_extras(settings)
        self.settings = settings
        self.context = context = Context(settings)
        self.lifecycle = context.lifecycle
        if not drain:
            context.schedules = app.declared_schedules()
        self._hooks = WorkerHooks(app, context)
        on_failed = self._hooks.on_failed
        self.finisher = Finisher(
            context.new_link(), self.lifecycle.wake.set, settings.keep_completed, context.flows.follow, on_failed
        )
        self.finisher.throughput.clock_ahead = lambda: context.turns.clock_ahead
        self.lanes = context.lanes = _lanes(app, context, self.finisher.put, self._hooks.event_loop)
        self.claimer = Claimer(context, context.new_link())
        self.keeper = Keeper(context, self.finisher.unwritten, on_failed)
        self.housekeeper = Housekeeper(context, self.finisher.throughput, self.claimer.known_priorities)
        listen_dsn = settings.checked_listen_dsn()
        self._bell = Bell(listen_dsn, self.lifecycle.wake.set) if listen_dsn else None
        self._metrics: MetricsServer | None = None
        self._services = Services(self.lifecycle)
        self._drain = drain

    # ----------------------------------------------------------------------------------------------- from outside

    def stop(self) -> None:
        """Claim no more, release what has not begun, and let handlers finish, for `shutdown_seconds` at most."""
        self.lifecycle.stop(StopReason.REQUESTED)

    def stop_now(self) -> None:
        """Release what runs, too, and return immediately."""
        self.lifecycle.leaving.set()
        self.stop()

    @property
    def id(self) -> str:
        """Its id in batchq.workers."""
        return self.context.worker_id

    @property
    def wants_replacement(self) -> bool:
        """Whether it has ended because of lost slots, and not because it was asked to stop or drain."""
        return self.lifecycle.wants_replacement

    def run(self) -> bool:
        """Run batches until stopped or, with drain, until none is ready. Return whether every outcome was written.

        Raises ConfigError if the database, its schema or the DSN will not do, LifespanFailed if the app's lifespan
        raises before its yield.
        """
        checked = check_database(self.context.dsn, self.settings.database_timeout_seconds, self.keeper.row)
        self.context.set_turn(Turn(1, 0, checked.clock_ahead), 0.0)  # until the first heartbeat
        self.context.layout.is_distributed = checked.is_distributed
        with switching_quickly(), collecting_seldom():
            try:
                self._start()
                self.claimer.run(self._drain)
            finally:  # a start that fails must leave no thread: it would send the heartbeat of a worker without claims
                written = self._shut_down_interruptibly()
        return written and StopReason.SERVICE_FAILED not in self.lifecycle.reasons

    # --------------------------------------------------------------------------------------------- start and stop

    def _start(self) -> None:
        handlers = {kind: handler for lane in self.lanes for kind, handler in lane.handlers.items()}
        self._read_shards()
        declare_limits(self.claimer.link, self.settings.queues, handlers)
        self._metrics = self.serve_metrics()
        self.context.connections.open()
        for lane in self.lanes:
            lane.start()
        self._hooks.start(self._services)
        self._services.start("keeper", self.keeper.run)
        self._services.start("housekeeper", self.housekeeper.run)
        self._services.start("finisher", self.finisher.run)
        if self._bell:
            self._services.start("bell", self._bell.run)
        _log.info("worker started", worker=self.id, queues=self.settings.queues, kinds=self.keeper.row.kinds)

    def _read_shards(self) -> None:
        with self.claimer.link.reading() as conn:
            self.context.set_shards(shards.shards_of(conn, self.settings.queues))
            for shard, whole in shards.wholes_of(conn, self.settings.queues).items():
                raise ConfigError(f"queue {shard!r} is a shard of queue {whole!r}; let the worker serve {whole!r}")

    def serve_metrics(self) -> "MetricsServer | None":
        """Serve metrics and health checks, if a port is set. Raises ConfigError."""
        if not self.settings.metrics_port:
            return None
        from batchq.worker.metrics import serve_worker

        lanes: dict[str, list[Lane]] = defaultdict(list)
        for lane in self.lanes:
            lanes["async def" if isinstance(lane, LoopLane) else "def"].append(lane)
        return serve_worker(self.settings, self.finisher.throughput, lanes, self.claimer, self.keeper)

    def _shut_down_interruptibly(self) -> bool:
        """Shut down. After an interruption, such as a second Ctrl-C, do not wait for handlers."""
        try:
            return self._shut_down()
        except BaseException:
            self.lifecycle.leaving.set()
            self._shut_down()
            raise

    def _shut_down(self) -> bool:
        self.lifecycle.stop()
        if self._bell:
            self._bell.close()
        shutdown = Shutdown(self.context, self._services, self.claimer, self.finisher)
        shutdown.release_claims()
        shutdown.wait_for_handlers()
        shutdown.release_running()
        written = shutdown.finish_writing()
        self._close_keepers()
        if written and self._services.have_started():  # else the database does not answer, or there is no row
            shutdown.remove_row()
        self._hooks.close(self._services, shutdown.seconds_left())
        self._close_all()
        lost_slots = sum(self.keeper.lost_slots.values())
        _log.info("worker stopped", worker=self.id, lost_slots=lost_slots, **self.finisher.counts)
        return written

    def _close_keepers(self) -> None:
        """Close keeper and housekeeper, and wait for both, a second together."""
        self.keeper.close()
        self.housekeeper.close()
        until = time.monotonic() + 1
        for name in ("keeper", "housekeeper"):
            self._services.has_ended(name, until - time.monotonic())

    def _close_all(self) -> None:
        for lane in self.lanes:
            lane.stop()
        self.context.connections.close()
        for link in self.context.links:
            link.close()
        if self._metrics:
            self._metrics.close()
        if self.settings.traces:
            traces.flush()


def _lanes(app: App, context: Context, ended: Ended, loop: EventLoop | None) -> list[Lane]:
    """Return a lane for each style of handlers and each queue that has slots of its own, and for all other queues.

    A lane with slots of its own is not held up while handlers of other queues wait for connections.
    """
    settings, connections, own = context.settings, context.connections, context.settings.queue_slots
    handlers = in_hooks(app.handlers, app.hooks)
    in_threads = {kind: handler for kind, handler in handlers.items() if not handler.is_async}
    in_loop = {kind: handler for kind, handler in handlers.items() if handler.is_async}
    shared = [queue for queue in settings.queues if queue not in own]
    traced = settings.traces
    lanes: list[Lane] = []
    if in_threads:
        lanes += [ThreadLane(in_threads, slots, ended, queues=[queue], traced=traced) for queue, slots in own.items()]
        if shared:
            lanes.append(
                ThreadLane(
                    in_threads, settings.concurrency, ended, connections.fair_queue, queues=shared, traced=traced
                )
            )
    if in_loop and loop is not None:
        fair_queue = connections.async_fair_queue
        lanes += [
            LoopLane(in_loop, slots, ended, None, loop, queues=[queue], traced=traced) for queue, slots in own.items()
        ]
        if shared:
            lanes.append(
                LoopLane(in_loop, settings.async_concurrency, ended, fair_queue, loop, queues=shared, traced=traced)
            )
    return lanes


@contextmanager
def switching_quickly() -> Iterator[None]:
    """Let threads switch every 1 ms instead of 5 ms: that long an answer of the database waits for handlers."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
