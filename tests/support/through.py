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
