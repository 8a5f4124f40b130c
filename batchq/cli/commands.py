"""What each command does."""

import functools
import json
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import psycopg
from rich.live import Live

from batchq.app import App, hidden_modules, load_app
from batchq.cli import enqueue_file, show_tables
from batchq.cli.leaving import flush
from batchq.cli.signals import StopSignals
from batchq.common import log
from batchq.common.env_file import file_in_use
from batchq.common.terminal import complain, console, one_line, put, put_json, put_marked
from batchq.common.terminal import show as show_on_terminal
from batchq.enqueue import enqueue as enqueue_batch
from batchq.errors import ConfigError, InvalidInput, OutcomeUnknown
from batchq.operate.monitor import Monitor
from batchq.postgres import migrate as migrations
from batchq.postgres.connections import connect
from batchq.postgres.link import Link
from batchq.postgres.server_checks import check_server, check_writable
from batchq.postgres.statements import ledger, maintenance, session, verbs, views
from batchq.postgres.transactions import transaction
from batchq.settings import SECRET_SETTINGS, Settings
from batchq.worker import memory
from batchq.worker.checks import check_database, require_extras
from batchq.worker.liveness import LivenessPings
from batchq.worker.supervisor import EXIT_REPLACE, Supervisor, command
from batchq.worker.worker import Worker

A_DAY_SECONDS = 86_400


def settings_of(options: Namespace) -> Settings:
    """Return the settings, with the flags that were given. Raises ConfigError."""
    flags = {name.removeprefix("set_"): value for name, value in vars(options).items() if name.startswith("set_")}
    settings = Settings.load(**flags)
    if options.run not in (worker, workers):  # those log it
        print_file_in_use()
    return settings


@functools.cache
def print_file_in_use() -> None:
    """Print which `.env` was read, if any, once: in a strange directory its settings may not be what you expect."""
    if file := file_in_use():
        complain(f"settings read from {str(file)!r}")


def load(options: Namespace) -> App:
    """Load the app; log which modules beside it are not the ones that are imported by their name."""
    app = load_app(options.app)
    for name, used in hidden_modules():
        log.get_logger().warning("a module here is not imported: another one has its name", module=name, used=used)
    return app


def log_file_in_use() -> None:
    """Log which `.env` was read, if any."""
    if file := file_in_use():
        log.get_logger().info("settings read", file=str(file))


@contextmanager
def database(options: Namespace, seconds: float | None = None) -> Iterator[psycopg.Connection[Any]]:
    """Give a connection in a transaction of at most *seconds*, on a database with our schema. Raises ConfigError."""
    timeout_seconds = settings_of(options).database_timeout_seconds
    with connected(options) as conn, transaction(conn, seconds or timeout_seconds, settings=session.FIXED_FORMATS):
        yield conn


@contextmanager
def connected(options: Namespace) -> Iterator[psycopg.Connection[Any]]:
    """Give a connection to a database with our schema. Raises ConfigError."""
    settings = settings_of(options)
    with connect(settings.require_dsn()) as conn:
        with transaction(conn, settings.database_timeout_seconds):
            migrations.check_schema(conn)
        yield conn


@contextmanager
def linked(options: Namespace) -> Iterator[Link]:
    """Yield a link to a database with our schema, for commands that look more than once.

    It logs in once, and again only after the connection was lost. Raises ConfigError.
    """
    settings = settings_of(options)
    dsn = settings.require_dsn()
    with closing(Link(dsn, settings.database_timeout_seconds, connect(dsn))) as link:
        with link.transaction() as conn:
            migrations.check_schema(conn)
        yield link


# ------------------------------------------------------------------------------------------------------------- setup


def migrate(options: Namespace) -> int:
    """Create or update the schema."""
    dsn = settings_of(options).require_dsn(for_migration=True)
    with connect(dsn) as conn:
        check_server(conn)
        check_writable(conn)
        applied = migrations.apply_all(conn)
    put(f"applied {', '.join(applied)}" if applied else "the schema is up to date")
    return 0


def check(options: Namespace) -> int:
    """Check the DSN, the server, the schema, and that every waiting kind has a handler; 1 if something is wrong."""
    settings = settings_of(options)
    findings: list[tuple[bool, str]] = []
    dsn = settings.require_dsn()
    kinds = set(load_app(options.app).handlers) if options.app else None
    with connect(dsn) as conn, transaction(conn, settings.database_timeout_seconds, settings=session.FIXED_FORMATS):
        check_server(conn)
        check_writable(conn)
        findings.append((True, f"the server answers: {session.server_version(conn)[1].split(',')[0]}"))
        migrations.check_schema(conn)
        findings.append((True, f"the schema is at version {max(ledger.applied_migrations(conn))}"))
        try:
            with conn.transaction():
                findings += [judge_queue(row, kinds) for row in views.queue_rows(conn)]
        except psycopg.errors.InsufficientPrivilege as error:
            findings.append((True, f"what waits was not looked at: {error.diag.message_primary}"))
    if options.json:
        put_json([{"ok": ok, "finding": text} for ok, text in findings])
    else:
        for ok, text in findings:
            put_marked("ok      " if ok else "problem ", "green" if ok else "red", text)
    return 0 if all(ok for ok, _ in findings) else 1


def judge_queue(row: dict[str, Any], kinds: set[str] | None) -> tuple[bool, str]:
    """Return whether what waits in one queue, of one kind, will be worked, and a line that says so."""
    name = f"kind {row['kind']!r} in queue {row['queue']!r}"
    if kinds is not None and row["kind"] not in kinds:
        return False, f"{name}: the app has no handler for it"
    if row["stalled"]:
        return False, f"{name}: {row['stalled']} stalled; their worker died, and no live one serves the queue"
    if row["ready"] and not row["workers"]:
        return False, f"{name}: {row['ready']} ready, and no live worker knows the kind"
    return True, f"{name}: {row['ready']} ready, {row['processing']} processing, {row['failed']} failed"


def demo(options: Namespace) -> int:
    """Run the demonstration."""
    from batchq.demo import run  # its extra need not be installed for the other commands

    return run(settings_of(options), options.directory, options.files, options.web)


# ----------------------------------------------------------------------------------------------------------- workers


def worker(options: Namespace) -> int:
    """Work batches until SIGTERM, SIGINT or SIGHUP; a second one gives back what runs and leaves at once."""
    settings = settings_of(options)
    memory.return_large_buffers()
    log.configure(settings.log_format, settings.log_level)
    log_file_in_use()
    pings, signals, started_in = LivenessPings(os.environ), StopSignals(), Path.cwd()
    pings.start()
    require_extras(settings)  # before the app's directory is on the path
    process = Worker(load(options), settings, drain=options.drain)
    signals.follow(process.stop, process.stop_now, settings.shutdown_seconds)
    code = 0 if process.run() else 1
    if process.wants_replacement:
        code = EXIT_REPLACE
        if not pings.is_supervised:
            start_again(options, settings, started_in)
    return code


def start_again(options: Namespace, settings: Settings, directory: Path) -> None:
    """Become a fresh worker process, of the same id: no thread is left. Returns only if that cannot be."""
    flush()
    environment = os.environ | secrets_of(settings)
    words = command(worker_arguments(options))
    try:
        os.chdir(directory)
        os.execve(words[0], words, environment)  # noqa: S606 (the command is this one)
    except OSError as error:
        complain(f"the worker cannot start again: {error}")


def workers(options: Namespace) -> int:
    """Run several workers until SIGTERM, SIGINT or SIGHUP."""
    settings = settings_of(options)
    if options.processes < 1:
        raise InvalidInput(f"the number of processes starts at 1, not {options.processes}")
    dsn = settings.require_dsn()
    log.configure(settings.log_format, settings.log_level)
    log_file_in_use()
    signals = StopSignals()
    load(options)
    check_database(dsn, settings.database_timeout_seconds)  # here once, instead of in each process
    arguments, environment = worker_arguments(options), secrets_of(settings)
    environment["BATCHQ_METRICS_PORT"] = str(settings.metrics_port)
    supervisor = Supervisor(options.processes, arguments, environment, options.drain, settings.lease_seconds)
    signals.follow(supervisor.stop, supervisor.stop)
    return supervisor.run()


def worker_arguments(options: Namespace) -> list[str]:
    """Return the arguments of one worker process: those of this one except secrets, which a list of processes would
    show."""
    arguments = [options.app, *(["--drain"] if options.drain else [])]
    for name, value in vars(options).items():
        setting = name.removeprefix("set_")
        if setting != name and value is not None and setting not in (*SECRET_SETTINGS, "metrics_port"):
            arguments += ["--" + setting.replace("_", "-"), value]
    return arguments


def secrets_of(settings: Settings) -> dict[str, str]:
    """Return the settings that a worker process gets by its environment: those that are set, whatever set them."""
    found = {name: getattr(settings, name).get_secret_value() for name in SECRET_SETTINGS}
    return {f"BATCHQ_{name.upper()}": value for name, value in found.items() if value}


# ----------------------------------------------------------------------------------------------------------- enqueue


def enqueue(options: Namespace) -> int:
    """Enqueue one batch, or a file of items in batches, in one transaction."""
    try:
        payload = json.loads(options.payload) if options.payload is not None else None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"--payload is no JSON: {error}") from None
    given = {
        name: getattr(options, name)
        for name in ("queue", "priority", "delay_seconds", "max_attempts", "max_failed_items", "timeout_seconds")
    }
    source = options.items or options.lines
    with database(options, A_DAY_SECONDS if source else None) as conn:  # a file may be long, and a pipe slow
        if source:
            count = enqueue_file.enqueue(conn, options, payload, given)
            said: dict[str, Any] = {"batches": count}
        else:
            said = {"id": enqueue_batch(conn, options.kind, payload, unique_key=options.unique_key, **given)}
    print_enqueued(options, said)
    return 0


def print_enqueued(options: Namespace, said: dict[str, Any]) -> None:
    """Print what was enqueued."""
    if options.json:
        put_json(said)
    elif "batches" in said:
        put(f"enqueued {said['batches']:,} batches of {options.kind}")
    elif said["id"] is None:
        put(f"nothing enqueued: a batch with unique key {options.unique_key!r} is pending or processing")
    else:
        put(f"enqueued batch {said['id']}")


# ----------------------------------------------------------------------------------------------------------- looking


def status(options: Namespace) -> int:
    """Show queues, workers and the latest batches; again and again with --watch."""
    with linked(options) as link:
        if options.json:
            put_json(read_status(link, options))
        elif options.watch:
            with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
                while True:
                    live.update(show_tables.overview(patiently(lambda: read_status(link, options))), refresh=True)
                    time.sleep(1)
        else:
            show_on_terminal(show_tables.overview(read_status(link, options)))
    return 0


def read_status(link: Link, options: Namespace) -> dict[str, Any]:
    """Read what `status` shows."""
    with link.transaction() as conn:
        return {
            "queues": views.queue_rows(conn, options.queue, options.kind),
            "workers": views.worker_objects(conn),
            "pauses": verbs.pause_rows(conn),
            "batches": views.status_rows(conn, options.queue, options.kind, options.status, options.limit),
        }


MOST_IN_TOP = 200


def top(options: Namespace) -> int:
    """Show queues, workers, running batches and failures on a full screen; into a pipe, once and plain."""
    with linked(options) as link:
        looks = TopLooks(link, options)
        if options.json:
            put_json(looks.look())
        elif not console.is_terminal:
            found = looks.look()
            show_on_terminal(show_tables.overview(found | {"batches": found["running"] + found["failures"]}))
        else:
            load_top().run(options, looks.look, looks.show)
    return 0


class TopLooks:
    """What `top` reads, over one connection: the screen asks from several threads, which take turns."""

    def __init__(self, link: Link, options: Namespace) -> None:
        self.link = link
        self.options = options
        self.turn = Lock()

    def look(self) -> dict[str, list[dict[str, Any]]]:
        """Return the tables."""
        with self.turn, self.link.transaction() as conn:
            return read_top(conn, self.options)

    def show(self, batch_id: int) -> Any:
        """Return what is shown of one batch, None if it is gone."""
        with self.turn, self.link.transaction() as conn:
            batch, failed_items = read_batch(conn, batch_id), views.failed_item_objects(conn, batch_id, MOST_IN_TOP)
        return show_tables.one_batch(batch, failed_items) if batch else None


def read_top(conn: psycopg.Connection[Any], options: Namespace) -> dict[str, list[dict[str, Any]]]:
    """Read what `top` shows."""
    return {
        "queues": views.queue_rows(conn, options.queue, options.kind),
        "running": views.running_rows(conn, options.queue, options.kind, MOST_IN_TOP),
        "failures": views.failed_rows(conn, options.queue, options.kind, MOST_IN_TOP),
        "workers": views.worker_objects(conn),
        "pauses": verbs.pause_rows(conn),
    }


def load_top() -> Any:
    """Return the module of the full screen. Raises ConfigError where its extra is not installed."""
    try:
        from batchq.cli import top as screen
    except ImportError as error:
        raise ConfigError(f'batchq top needs an extra ({error}): pip install "batchq[top]"') from None
    return screen


def show(options: Namespace) -> int:
    """Show one batch and its failed items; 1 if there is no such batch."""
    with database(options) as conn:
        batch = read_batch(conn, options.id)
        failed_items = views.failed_item_objects(conn, options.id, options.limit)
    if batch is None:
        complain(f"there is no batch {options.id}")
        return 1
    if options.json:
        put_json(batch | {"failed_items": failed_items})
    else:
        show_on_terminal(show_tables.one_batch(batch, failed_items))
    return 0


def read_batch(conn: psycopg.Connection[Any], batch_id: int) -> dict[str, Any] | None:
    """Read what `show` shows; payload and cursor as text where they are nested too deep, or a number is too long."""
    try:
        return views.batch_object(conn, batch_id)
    except (ValueError, RecursionError):
        return views.batch_object(conn, batch_id, inputs_as_text=True)


def monitor(options: Namespace) -> int:
    """Print batches as they change; 1 when one comes into a state of --exit-on."""
    exit_on = {name.strip() for name in options.exit_on.split(",") if name.strip()}
    if unknown := exit_on - {"failed", "stalled", "cancelled", "retrying"}:
        raise ConfigError(f"--exit-on takes failed, stalled, cancelled or retrying, not {', '.join(sorted(unknown))}")
    with linked(options) as link:
        return follow(Monitor(link, options.queue, options.kind), options, exit_on)


def follow(watched: Monitor, options: Namespace, exit_on: set[str]) -> int:
    """Print what changes, until what is waited for is there; return the exit code."""
    is_done = False
    while True:
        changes = patiently(watched.changes)
        for row in changes:
            put_json(row, indent=None) if options.json else put(show_tables.change_line(row))
        if any(row["status"] in exit_on for row in changes):
            return 1
        if is_done:
            return 0
        is_done = options.until_done and patiently(watched.is_done)
        if not is_done:  # else one more look: the last batch may have ended, and failed, since the one before
            time.sleep(options.every_seconds)


def patiently(look: Callable[[], Any]) -> Any:
    """Return what *look* returns; try again while the database is away, and say so once."""
    is_told = False
    while True:
        try:
            return look()
        except (psycopg.OperationalError, OutcomeUnknown) as error:  # a look may be repeated, whatever its COMMIT did
            if not is_told:
                complain(f"the database is away: {one_line(str(error))}")
            is_told = True
            time.sleep(1)


# ------------------------------------------------------------------------------------------------------------- verbs


def refusal(error: psycopg.Error) -> str:
    """Return why the database refused, with what it advises."""
    return "; ".join(text for text in (error.diag.message_primary, error.diag.message_hint) if text)


def prune(options: Namespace) -> int:
    """Drop old finished partitions."""
    days = options.older_than_days
    if days is None:
        days = settings_of(options).keep_finished_days
    if not 0 <= days < 1_000_000:
        raise InvalidInput(f"--older-than-days takes a number from 0 up, not {days:g}")
    dropped = 0
    try:
        for count in pruned(options, days):
            dropped += count
    except psycopg.errors.LockNotAvailable:
        complain(f"a table is in use; {dropped} daily partitions were dropped, try again")
        return 1
    put_json({"dropped_partitions": dropped}) if options.json else put(f"dropped {dropped} daily partitions")
    return 0


def pruned(options: Namespace, days: float) -> Iterator[int]:
    """Drop old partitions, a few in each transaction; yield how many in each."""
    settings = settings_of(options)
    with connect(settings.require_dsn()) as conn:
        with transaction(conn, settings.database_timeout_seconds):
            migrations.check_schema(conn)
        count = 1
        while count > 0:
            with transaction(conn, settings.database_timeout_seconds, settings=session.FIXED_FORMATS):
                count = maintenance.prune(conn, days)
            yield count
