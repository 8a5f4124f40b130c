"""Hooks of an app: code that runs around its batches, while a worker runs, and after a batch has failed."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from batchq.errors import ConfigError

if TYPE_CHECKING:
    from batchq.batch import Batch


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch that has failed for good, as `App.on_failure` gets it.

    attempt: the last one, from 1. payload: the JSON value; None if Python cannot read it. error: one line, such as
    ``ValueError: no``. traceback: None if no handler raised the error (the worker died, a timeout).
    """

    id: int
    queue: str
    kind: str
    payload: Any
    attempt: int
    error: str
    traceback: str | None


AroundHook = Callable[["Batch"], Iterator[None]] | Callable[["Batch"], AsyncIterator[None]]
LifespanHook = Callable[[], Iterator[Any]] | Callable[[], AsyncIterator[Any]]
FailureHook = Callable[[Failure], None] | Callable[[Failure], Awaitable[None]]
Around = TypeVar("Around", bound=AroundHook)
Lifespan = TypeVar("Lifespan", bound=LifespanHook)
OnFailure = TypeVar("OnFailure", bound=FailureHook)


@dataclass
class Hooks:
    """The hooks of one app. *around* is of ``def`` handlers, *around_async* of ``async def`` ones."""

    around: list[Callable[["Batch"], Iterator[None]]] = field(default_factory=list)
    around_async: list[Callable[["Batch"], AsyncIterator[None]]] = field(default_factory=list)
    lifespan: LifespanHook | None = None
    on_failure: list[FailureHook] = field(default_factory=list)

    def add_around(self, function: AroundHook) -> None:
        """Add a hook around each batch. Raises ConfigError."""
        _check("around", function, 1, must_yield=True)
        is_async = inspect.isasyncgenfunction(function)
        (self.around_async if is_async else self.around).append(function)  # type: ignore[arg-type]

    def set_lifespan(self, function: LifespanHook) -> None:
        """Set the lifespan. Raises ConfigError, also for a second one."""
        _check("lifespan", function, 0, must_yield=True)
        if self.lifespan is not None:
            raise ConfigError(f"the app has a lifespan already, {name_of(self.lifespan)}(); put both into one function")
        self.lifespan = function

    def add_on_failure(self, function: FailureHook) -> None:
        """Add a function to call after a batch has failed. Raises ConfigError."""
        _check("on_failure", function, 1, must_yield=False)
        self.on_failure.append(function)

    @property
    def need_event_loop(self) -> bool:
        """Whether one of them runs in the worker's event loop, even if no handler does."""
        return inspect.isasyncgenfunction(self.lifespan) or any(map(inspect.iscoroutinefunction, self.on_failure))


def _check(hook: str, function: object, arguments: int, *, must_yield: bool) -> None:
    """Raise ConfigError unless *function* is a function of that many arguments that yields, or does not."""
    if not callable(function):
        raise ConfigError(f"@app.{hook} is for a function, not {function!r}")
    name = name_of(function)
    yields = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
    if must_yield and not yields:
        raise ConfigError(f"@app.{hook}: {name}() must have one yield; leave out @contextmanager, if it has that")
    if not must_yield and yields:
        raise ConfigError(f"@app.{hook}: {name}() has a yield; it must be a plain function")
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError as error:
        expected = {0: "no argument", 1: "one argument"}[arguments]
        raise ConfigError(f"@app.{hook}: {name}() is called with {expected}: {error}") from None


def name_of(function: object) -> str:
    """Return a function's name, for messages."""
    return str(getattr(function, "__qualname__", function))
