"""The way from the tests to their database: straight, or through a pooler that is then checked."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from tests.support.poolers import PgBouncer
from tests.support.servers import Server
from tests.support.supasim import SupaSim

Way = Callable[[str], AbstractContextManager[str]]
"""Given the name of a database, opens it: yields the DSN, and at the end checks what the test left."""


def way_to(server: Server) -> AbstractContextManager[Way]:
    """Return the way that BATCHQ_TEST_THROUGH names, one of WAYS; by default direct."""
    name = os.environ.get("BATCHQ_TEST_THROUGH") or "direct"
    if name not in WAYS:
        raise ValueError(f"BATCHQ_TEST_THROUGH is {name!r}; it can be {', '.join(WAYS)}")
    return WAYS[name](server)


@contextmanager
def _direct(server: Server) -> Iterator[Way]:
    yield lambda dbname: nullcontext(server.dsn(dbname))


@contextmanager
def _pgbouncer(server: Server, *, reset_always: bool) -> Iterator[Way]:
    with PgBouncer(server, reset_always=reset_always) as bouncer:

        @contextmanager
        def open_database(dbname: str) -> Iterator[str]:
            bouncer.warm_up(dbname)
            try:
                yield bouncer.dsn(dbname)
                bouncer.check_settled(dbname)
            finally:
                bouncer.forget(dbname)

        yield open_database


@contextmanager
def _sim(server: Server) -> Iterator[Way]:
    @contextmanager
    def open_database(dbname: str) -> Iterator[str]:
        with SupaSim(server.dsn(dbname)) as sim:
            yield sim.dsn()
            assert sim.settled() == []

    yield open_database


WAYS: dict[str, Callable[[Server], AbstractContextManager[Way]]] = {
    "direct": _direct,
    "pgbouncer-a": lambda server: _pgbouncer(server, reset_always=False),
    "pgbouncer-b": lambda server: _pgbouncer(server, reset_always=True),
    "sim": _sim,
}

POOLED = {
    "foundation/test_db_connection.py": "connections, deadlines, transactions, and what they make of errors",
    "component/test_batch_create.py": "enqueue in a caller's transaction, and COPY",
    "component/test_batch_process.py": "a worker's three connections: claims, finishes, releases",
    "component/test_bell.py": "a connection past the pooler beside those through it",
    "component/test_claim.py": "the claim's locks, and the limits that its transaction sets for itself",
    "component/test_finisher.py": "texts of many sizes; some poolers mind",
    "component/test_items.py": "transactions of chunks, savepoints, the pools of handlers' connections",
    "component/test_keep_completed.py": "the finish that deletes",
    "component/test_keys.py": "claims in a transaction of several statements, with locks and a savepoint",
    "component/test_leases.py": "the fence, between two sessions",
    "component/test_migrations.py": "DDL, and its lock, in transactions",
    "component/test_permits.py": "shares, refreshed by several workers",
    "component/test_reach.py": "waits on a caller's connection, with no transaction between two reads",
    "component/test_retention.py": "DDL of partitions, with its lock_timeout",
    "component/test_throttled.py": "a worker that writes and reads throttles",
    "component/test_transactions.py": "handlers' own statements, in sync and async transactions",
    "component/test_verbs.py": "cancel and retry, against a worker's transactions",
    "component/test_worker_parts.py": "the parts' connections lost, and had again",
    "component/test_flows.py": "what follows an end, on whose connection",
    "component/test_schedules.py": "ticks in one transaction",
    "component/test_spread.py": "parts that are made and gathered in one transaction",
    "component/test_protocol.py": "SQL functions that other languages call",
    "integration/test_faults.py": "what dies while it works",
    "integration/test_monitor.py": "long polling, and connections lost",
    "e2e/test_batch_e2e.py": "all of it",
}
"""Files for which it matters what lies between a test and its database, and why: `bin/test pooled --through ...`.

The others look at code without a database, start their own poolers, or ask the database what no pooler changes (plans,
triggers, views); one that opens connections or transactions in a way of its own belongs here.
"""

SAME_ON_ANY_SERVER = {
    "foundation/test_mutants.py": "reads files, and tries a mutant of no SQL",
    "foundation/test_support.py": "the tests' own tools",
    "component/test_app.py": "asks no database",
    "component/test_architecture.py": "reads files",
    "component/test_bad_input.py": "the command line's and the API's refusals",
    "component/test_cli.py": "the command line",
    "component/test_django.py": "Django's interface",
    "component/test_enqueue_types.py": "type checkers",
    "component/test_types.py": "type checkers",
    "component/test_footprint.py": "what is loaded, and how much memory it takes",
    "component/test_enqueue_csv.py": "the command line, and a parser",
    "component/test_hostile_handlers.py": "what Python code does to its own process",
    "component/test_logs.py": "asks no database",
    "component/test_lost_slots.py": "threads and processes",
    "component/test_memory.py": "asks no database",
    "component/test_portable.py": "the package",
    "component/test_top.py": "the terminal",
    "component/test_soak.py": "the soak's own arithmetic",
    "component/test_watching.py": "the terminal",
    "component/test_wheel.py": "the package",
    "component/test_ending.py": "how processes end",
    "component/test_hidden.py": "what logs, pages and the command line hide",
    "component/test_hooks.py": "Python code around handlers",
    "component/test_odd_settings.py": "settings",
    "component/test_pool.py": "the pool of a worker's connections",
    "integration/test_chaos.py": "the chaos run's own arithmetic, and a minute of it",
    "integration/test_django_docs.py": "Django's interface",
    "integration/test_example_django.py": "the examples' programs",
    "integration/test_traces.py": "what OpenTelemetry gets",
    "integration/test_web_mounted.py": "the page in other applications",
    "integration/test_web_prefix.py": "the page behind a proxy",
    "integration/attacks/test_argument_list.py": "what other users see of a process",
    "integration/attacks/test_env_file.py": "files",
    "integration/attacks/test_imports.py": "what Python imports",
    "integration/attacks/test_markup.py": "the page",
    "integration/attacks/test_metrics_server.py": "HTTP",
    "integration/attacks/test_mounted.py": "the page in other applications",
    "integration/attacks/test_page.py": "the page",
    "integration/attacks/test_proxy.py": "the page behind a proxy",
    "integration/attacks/test_terminal.py": "the terminal",
    "integration/attacks/test_web_who.py": "who uses the page",
    "e2e/test_completion.py": "what shells do with a script",
    "e2e/test_deploy_files.py": "units and manifests",
    "e2e/test_deploys.py": "signals, and what processes make of them",
    "e2e/test_docs.py": "the documents' blocks",
    "e2e/test_examples.py": "the examples' programs",
    "e2e/test_prometheus.py": "the metrics' format and rules",
    "e2e/test_readme.py": "the README's commands",
    "e2e/test_release.py": "the package",
    "e2e/test_screenshots.py": "pictures of page and terminal",
    "e2e/test_site.py": "the documentation site",
    "e2e/test_web_all_pages_browser.py": "the page in a browser",
    "e2e/test_web_batch_browser.py": "the page in a browser",
    "e2e/test_web_browser.py": "the page in a browser",
    "e2e/test_web_list_browser.py": "the page in a browser",
    "e2e/test_web_mounted_browser.py": "the page in a browser",
    "e2e/test_web_pages_browser.py": "the page in a browser",
}
"""Files for which it does not matter which version the server has, and why: `bin/test servers` leaves them out."""
