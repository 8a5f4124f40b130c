"""``batchq top``: queues, workers, running batches and failures on a full screen; into a pipe, once and plain."""

from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack, closing
from typing import Any

from batchq.cli.arguments import add_command, add_filters, add_interval
from batchq.cli.connections import linked, one_or_several
from batchq.cli.overview import overview, show_several
from batchq.cli.top.source import PLAIN_TABLES, Source, read_tables
from batchq.cli.verbs import user_name
from batchq.common.terminal import console, put_json, show
from batchq.errors import ConfigError
from batchq.operate.watch import ONCE_SECONDS, Watch
from batchq.postgres.databases import Database
from batchq.postgres.link import Link
from batchq.postgres.statements.running import Conn
from batchq.postgres.statements.totals import totals
from batchq.settings import Settings


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "top", _run, "show everything live on a full screen; needs pgbatchq[top]")
    add_filters(parser)
    parser.add_argument("--read-only", action="store_true", help="offer no actions")
    text = "colors for a light or a dark terminal (default: as COLORFGBG says, or else dark)"
    parser.add_argument("--theme", choices=("light", "dark"), help=text)
    parser.add_argument("--actor", default=user_name(), help="name to record in batchq.audit (default: your user name)")
    parser.add_argument("--json", action="store_true", help="print JSON once")
    add_interval(parser, None, "100 times the duration of a query, from 1 to 10")


def _run(options: Namespace) -> int:
    settings, databases = one_or_several(options)
    if databases:
        return _run_several(options, settings, databases)
    with linked(options, settings) as link:
        source = Source(link, options, options.actor)
        if options.json:
            put_json(source.tables(PLAIN_TABLES))
        elif not console().is_terminal:
            tables = source.tables(PLAIN_TABLES)
            show(overview(_with_batches(tables)))
        else:
            load_app().run(source, options.every_seconds, options.read_only, _is_light(options))
    return 0


def _run_several(options: Namespace, settings: Settings, databases: list[Database]) -> int:
    """Show all databases; printed once, return 1 if one is away."""
    if options.json or not console().is_terminal:
        with closing(Watch(databases, lambda conn: _read_all(conn, options))) as watch:
            return show_several(watch.read(ONCE_SECONDS), options.json, _with_batches)
    app = load_app()
    with closing(Watch(databases, totals)) as watch, ExitStack() as links:
        sources = {
            each.name: Source(links.enter_context(closing(Link(each.dsn, seconds))), options, options.actor)
            for each in databases
            for seconds in [settings.database_timeout_seconds]
        }
        app.run_several(app.Several(watch, sources), options.every_seconds, options.read_only, _is_light(options))
    return 0


def _read_all(conn: Conn, options: Namespace) -> dict[str, Any]:
    return {"totals": totals(conn), **read_tables(conn, options, PLAIN_TABLES)}


def _with_batches(tables: Mapping[str, Any]) -> dict[str, Any]:
    return {**tables, "batches": tables["running"] + tables["failures"]}


def _is_light(options: Namespace) -> bool | None:
    return None if options.theme is None else options.theme == "light"


def load_app() -> Any:
    """Return the module of the full screen. Raises ConfigError where its extra is not installed."""
    try:
        from batchq.cli.top import app
    except ImportError as error:
        raise ConfigError(f'batchq top needs an extra ({error}); run: pip install "pgbatchq[top]"') from None
    return app
