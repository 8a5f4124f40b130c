"""``batchq worker`` and ``batchq workers``: one worker process, or several under a supervisor."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from batchq.app import App, hidden_modules, load_app
from batchq.cli.arguments import add_command
from batchq.cli.connections import check_each, one_or_several, settings_of
from batchq.cli.leaving import flush
from batchq.cli.signals import StopSignals
from batchq.common import log
from batchq.common.env_file import file_in_use
from batchq.common.terminal import complain
from batchq.errors import ConfigError, InvalidInput
from batchq.postgres.databases import Database
from batchq.settings import SECRET_SETTINGS, Settings
from batchq.worker import memory
from batchq.worker.checks import check_database, require_extras
from batchq.worker.liveness import LivenessPings
from batchq.worker.supervisor import EXIT_REPLACE, Supervisor, command
from batchq.worker.worker import Worker

# Keys are never flags: a list of processes would show them.
_SETTINGS = tuple(name for name in Settings.model_fields if name not in ("migration_dsn", "encryption_keys"))


def add_parser(subparsers: Any) -> None:
    """Add both commands."""
    one = add_command(subparsers, "worker", _run_one, "run batches until stopped", settings=_SETTINGS)
    summary = "run several worker processes and replace those that die"
    several = add_command(subparsers, "workers", _run_several, summary, settings=_SETTINGS)
    several.add_argument("processes", type=int, metavar="N", help="number of processes")
    for parser in (one, several):
        parser.set_defaults(runs_workers=True)
        parser.add_argument("app", metavar="MODULE:APP", help="the batchq.App, for example tasks:app")
        parser.add_argument("--drain", action="store_true", help="exit when no batch is ready any more")


def _run_one(options: Namespace) -> int:
    """Run batches until SIGTERM, SIGINT or SIGHUP; at a second signal, release running batches and exit immediately."""
    settings = settings_of(options)
    memory.return_large_buffers()
    log.configure(settings.log_format, settings.log_level)
    _log_env_file()
    pings, signals, started_in = LivenessPings(os.environ), StopSignals(), Path.cwd()
    pings.start()
    require_extras(settings)  # before the app's directory is on the path
    process = Worker(_load(options), settings, drain=options.drain)
    signals.follow(process.stop, process.stop_now, settings.shutdown_seconds)
    code = 0 if process.run() else 1
    if process.wants_replacement:
        code = EXIT_REPLACE
        if not pings.is_supervised:
            _start_again(options, settings, started_in)
    return code


def _start_again(options: Namespace, settings: Settings, directory: Path) -> None:
    """Replace this process by a fresh worker with the same process id, without the old threads. Returns on failure."""
    flush()
    environment = os.environ | _secrets_of(settings)
    words = command(_worker_arguments(options))
    try:
        os.chdir(directory)
        os.execve(words[0], words, environment)  # noqa: S606 (the command is this one)
    except OSError as error:
        complain(f"the worker cannot start again: {error}")


def _run_several(options: Namespace) -> int:
    settings, databases = one_or_several(options)
    if options.processes < 1:
        raise InvalidInput(f"the number of processes must be 1 or more, not {options.processes}")
    if databases and settings.listen_dsn.get_secret_value():
        raise ConfigError(
            "BATCHQ_LISTEN_DSN is the connection to one database, and there are several; "
            f"set one for each, such as {databases[0].variable.replace('DSN', 'LISTEN_DSN', 1)}"
        )
    dsn = "" if databases else settings.require_dsn()
    settings.use_encryption_keys()  # a mistake in them is reported once, instead of by each process
    log.configure(settings.log_format, settings.log_level)
    _log_env_file()
    signals = StopSignals()
    _load(options)
    if databases:
        check_each(databases, lambda dsn: check_database(dsn, settings.database_timeout_seconds), _log_away)
    else:
        check_database(dsn, settings.database_timeout_seconds)  # here once, instead of in each process
    arguments, (environment, of_databases) = _worker_arguments(options), environments(settings, databases)
    supervisor = Supervisor(
        options.processes, arguments, environment, options.drain, settings.lease_seconds, of_databases
    )
    signals.follow(supervisor.stop, supervisor.stop)
    return supervisor.run()


def environments(settings: Settings, databases: list[Database]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return what is in the environment of all worker processes, and what is in that of each of several databases."""
    port = {"BATCHQ_METRICS_PORT": str(settings.metrics_port)}
    if not databases:
        return _secrets_of(settings) | port, {}
    return port, {each.name: _secrets_of(settings.of_database(each)) for each in databases}


def _log_away(name: str, error: str) -> None:
    log.get_logger().warning("database away, its workers start when it is back", database=name, error=error)


def _load(options: Namespace) -> App:
    app = load_app(options.app)
    for name, used in hidden_modules():
        log.get_logger().warning("local module shadowed", module=name, used=used)
    return app


def _log_env_file() -> None:
    if file := file_in_use():
        log.get_logger().info("settings read", file=str(file))


def _worker_arguments(options: Namespace) -> list[str]:
    """Return the arguments of one worker process: these, except secrets, which a list of processes would show."""
    arguments = [options.app, *(["--drain"] if options.drain else [])]
    for name, value in vars(options).items():
        setting = name.removeprefix("set_")
        if setting != name and value is not None and setting not in (*SECRET_SETTINGS, "databases", "metrics_port"):
            arguments += ["--" + setting.replace("_", "-"), value]
    return arguments


def _secrets_of(settings: Settings) -> dict[str, str]:
    """Return the secrets that are set, wherever from, as a worker process gets them: by its environment.

    The process works on one database, whatever `BATCHQ_DATABASES` is here.
    """
    found = {name: getattr(settings, name).get_secret_value() for name in SECRET_SETTINGS}
    return {"BATCHQ_DATABASES": ""} | {f"BATCHQ_{name.upper()}": value for name, value in found.items() if value}
