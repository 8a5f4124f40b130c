"""Types of the connections that callers pass, for type checkers: by the methods that only those connections have.

So no type checker needs SQLAlchemy, Django or asyncpg to be installed, and an engine, a pool or a psycopg2 connection
is an error before the program runs. `batchq.postgres.drivers` checks the same when it runs.
"""

from collections.abc import Coroutine
from typing import Any, Protocol

import psycopg


class SqlAlchemyConnection(Protocol):
    """SQLAlchemy's Connection."""

    def exec_driver_sql(self, statement: str, /) -> Any:
        """Run a statement in the driver's own style."""
        ...

    def commit(self) -> None:
        """Commit."""
        ...


class SqlAlchemySession(Protocol):
    """SQLAlchemy's Session, and scoped_session."""

    def connection(self) -> SqlAlchemyConnection:
        """Return the connection of the transaction."""
        ...

    def commit(self) -> None:
        """Commit."""
        ...


class DjangoConnection(Protocol):
    """A connection of Django: ``connections["x"]``."""

    def ensure_connection(self) -> Any:
        """Connect, if not connected."""
        ...

    def on_commit(self, func: Any, /) -> Any:
        """Call a function after the commit."""
        ...


class DjangoConnectionProxy(Protocol):
    """``django.db.connection``, which has no methods of its own."""

    def __getattr__(self, item: str, /) -> Any: ...
    def __contains__(self, key: Any, /) -> bool: ...


class SqlAlchemyAsyncConnection(Protocol):
    """SQLAlchemy's AsyncConnection."""

    def exec_driver_sql(self, statement: str, /) -> Coroutine[Any, Any, Any]:
        """Run a statement in the driver's own style."""
        ...

    def commit(self) -> Coroutine[Any, Any, None]:
        """Commit."""
        ...


class SqlAlchemyAsyncSession(Protocol):
    """SQLAlchemy's AsyncSession, and async_scoped_session."""

    def connection(self) -> Coroutine[Any, Any, SqlAlchemyAsyncConnection]:
        """Return the connection of the transaction."""
        ...

    def commit(self) -> Coroutine[Any, Any, None]:
        """Commit."""
        ...


class AsyncpgConnection(Protocol):
    """asyncpg's Connection."""

    def fetch(self, query: str, /, *args: Any) -> Coroutine[Any, Any, Any]:
        """Return the rows of a statement."""
        ...

    def is_in_transaction(self) -> bool:
        """Return whether a transaction is open."""
        ...


class AsyncpgConnectionProxy(Protocol):
    """A connection of asyncpg's Pool, which has no methods that a type checker sees."""

    def __getattr__(self, attr: str, /) -> Any: ...
    def _detach(self) -> Any: ...


SyncConnection = (
    psycopg.Connection[Any] | SqlAlchemyConnection | SqlAlchemySession | DjangoConnection | DjangoConnectionProxy
)
AsyncConnection = (
    psycopg.AsyncConnection[Any]
    | SqlAlchemyAsyncConnection
    | SqlAlchemyAsyncSession
    | AsyncpgConnection
    | AsyncpgConnectionProxy
)
