"""The ORM's connections around each batch: a lost or outdated one is closed, so that the next batch opens another."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import connections, reset_queries

Function = TypeVar("Function", bound=Callable[..., Any])


def fresh_connections(function: Function) -> Function:
    """Give each call of a handler usable connections of the ORM; put it below ``@app.handler``.

    ``def``: connections that are lost or older than CONN_MAX_AGE are closed before and after the call, in its thread.
    ``async def``: the ORM's synchronous code of this call runs in a thread of its own, whose connections are closed
    after the call.
    """
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            async with ThreadSensitiveContext():
                try:
                    return await function(*args, **kwargs)
                finally:
                    await sync_to_async(_close_all)()

        return call_async  # type: ignore[return-value]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _fresh():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@contextmanager
def _fresh() -> Iterator[None]:
    reset_queries()  # with DEBUG, Django keeps each query
    _close_unusable()
    for connection in _idle():
        if connection.connection is not None and not connection.is_usable():  # nobody has noticed yet that it is lost
            connection.close()
    try:
        yield
    finally:
        _close_unusable()


def _close_unusable() -> None:
    """Do what `close_old_connections` does, except to connections in a transaction of the caller."""
    for connection in _idle():
        connection.close_if_unusable_or_obsolete()


def _close_all() -> None:
    for connection in _idle():
        connection.close()


def _idle() -> list[Any]:
    """Return this thread's connections, except those in a transaction of the caller, such as that of a TestCase."""
    return [one for one in connections.all(initialized_only=True) if not one.in_atomic_block]
