"""The app: which function handles which kind of batch."""

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Concatenate

from typing_extensions import ParamSpec, TypeVar

from batchq.common import sealed as sealing
from batchq.common.text import json_text
from batchq.errors import ConfigError
from batchq.hooks import Around, Hooks, Lifespan, OnFailure
from batchq.retry import Backoff

if TYPE_CHECKING:
    from pydantic import BaseModel

    from batchq.batch import Batch

Function = TypeVar("Function", bound=Callable[..., Any])

# A handler's types. Without a model, payload and items may be anything.
Model = TypeVar("Model", bound="BaseModel", default=Any)
Returned = TypeVar("Returned", default=Any)
More = ParamSpec("More", default=...)  # of an item handler: batch and conn, if it takes them
if TYPE_CHECKING:
    BatchFunction = Callable[[Batch[Model]], Returned]
    ItemFunction = Callable[Concatenate[Model, More], Returned]

_MAX_KIND_BYTES = 200
MOST_PARTS = 1000


@dataclass(frozen=True)
class DeclaredLimits:
    """The limits of a kind as its code declares them; None: no limit. The columns of batchq.limits."""

    max_running: int | None = None
    per_second: float | None = None
    items_per_second: float | None = None
    burst_seconds: float = 1.0
    max_running_per_key: int | None = None

    @property
    def are_any(self) -> bool:
        """Whether there is a limit."""
        limits = (self.max_running, self.per_second, self.items_per_second, self.max_running_per_key)
        return any(limit is not None for limit in limits)


@dataclass(frozen=True)
class Handler:
    """A function and how to call it. Made by `App.handler` and `App.item_handler`."""

    kind: str
    function: Callable[..., Any]
    timeout_seconds: float | None
    backoff: Backoff
    payload_model: "type[BaseModel] | None"
    limits: DeclaredLimits
    sealed: bool

    @property
    def is_async(self) -> bool:
        """Return whether it runs in the event loop."""
        return inspect.iscoroutinefunction(self.function)


@dataclass(frozen=True)
class ItemHandler(Handler):
    """A function that is called once for each item."""

    item_model: "type[BaseModel] | None"
    concurrency: int
    transactional: bool
    chunk_size: int
    spread: int
    wants_batch: bool
    wants_conn: bool
    run: Callable[[Any], Any] | None = None  # runs the handler on all items, inside the hooks; set by the worker


@dataclass(frozen=True)
class DeclaredSchedule:
    """A schedule as code declares it, for the handler that *function* is; the columns of batchq.schedules."""

    function: Callable[..., Any]
    name: str | None
    cron: str
    time_zone: str
    queue: str
    payload: str
    missed: str
    catch_up_most: int
    overlap: str


@dataclass
class App:
    """The handlers of a program: ``app = batchq.App()``, then ``@app.handler("kind")``."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    schedules: list[DeclaredSchedule] = field(default_factory=list)
    hooks: Hooks = field(default_factory=Hooks)

    def handler(
        self,
        kind: str,
        *,
        payload: type[Model] | None = None,
        timeout_seconds: float | None = None,
        backoff: Backoff | None = None,
        max_running: int | None = None,
        per_second: float | None = None,
        burst_seconds: float = 1.0,
        max_running_per_key: int | None = None,
        sealed: bool = False,
    ) -> "Callable[[BatchFunction[Model, Returned]], BatchFunction[Model, Returned]]":
        """Register a function of one argument, the batch, as the handler of *kind*; it stays a plain function.

        *payload*: a pydantic model, of which batch.payload is then an instance; a batch whose payload does not fit the
        model fails without a retry. *timeout_seconds*: timeout of an attempt, unless the batch has its own. *backoff*:
        the waits between attempts. *max_running*, *per_second*, *burst_seconds*, *max_running_per_key*: limits for all
        workers together, in each queue; a number in batchq.limits is valid instead (see docs/limits.md). *sealed*: a
        batch in the clear is refused by enqueue, and fails without a retry if it is there (see docs/sealed.md).
        The return value (JSON) is stored as the batch's result. Raises ConfigError.
        """
        limits = _checked_limits(
            kind, DeclaredLimits(max_running, per_second, None, burst_seconds, max_running_per_key)
        )

        def register(function: "BatchFunction[Model, Returned]") -> "BatchFunction[Model, Returned]":
            _check_batch_argument(kind, function)
            self.add(Handler(kind, function, timeout_seconds, backoff or Backoff(), payload, limits, sealed))
            return function

        return register

    def item_handler(
        self,
        kind: str,
        *,
        concurrency: int = 1,
        transactional: bool = False,
        chunk_size: int = 1000,
        spread: int = 1,
        item: type[Model] | None = None,
        payload: "type[BaseModel] | None" = None,
        timeout_seconds: float | None = None,
        backoff: Backoff | None = None,
        items_per_second: float | None = None,
        max_running: int | None = None,
        per_second: float | None = None,
        burst_seconds: float = 1.0,
        max_running_per_key: int | None = None,
        sealed: bool = False,
    ) -> "Callable[[ItemFunction[Model, More, Returned]], ItemFunction[Model, More, Returned]]":
        """Register a function that is called once for each item of a batch; its error fails that item only.

        Its first argument is the item. It may also take ``batch`` and, if *transactional*, ``conn``: the connection of
        the chunk's transaction, which has a savepoint for each item and commits with the checkpoint. *concurrency*: how
        many items of a batch run concurrently. *chunk_size*: the most items between two checkpoints; one is also
        written about once a second. *spread*: into how many parts a batch is split whose row does not say so (see
        docs/spread.md). *item*: a pydantic model; an item that does not fit it fails without a retry.
        *items_per_second*: items per second, in all workers together. Others: see `handler`. Raises ConfigError.
        """
        rates = (max_running, per_second, items_per_second, burst_seconds, max_running_per_key)
        limits = _checked_limits(kind, DeclaredLimits(*rates))

        def register(function: "ItemFunction[Model, More, Returned]") -> "ItemFunction[Model, More, Returned]":
            names = _check_item_arguments(kind, function, transactional)
            _check_numbers(kind, concurrency, chunk_size, spread, transactional)
            common = (kind, function, timeout_seconds, backoff or Backoff(), payload, limits, sealed)
            numbers = (concurrency, transactional, chunk_size, spread)
            self.add(ItemHandler(*common, item, *numbers, "batch" in names, "conn" in names))
            return function

        return register

    def schedule(
        self,
        cron: str,
        *,
        name: str | None = None,
        time_zone: str = "UTC",
        queue: str = "default",
        payload: Any = None,
        missed: str = "coalesce",
        catch_up_most: int = 100,
        overlap: str = "allow",
    ) -> Callable[[Function], Function]:
        """Enqueue a batch for this handler on a schedule. The decorator may stand above or below ``@app.handler``.

        *cron*: an expression such as ``0 2 * * *``, or ``@every 30 s``. *name*: of the schedule (default: the kind).
        *missed*: coalesce, skip or catch_up (up to *catch_up_most* batches), for ticks at which no worker ran.
        *overlap*: allow, or skip (no batch while an earlier one is pending or processing). A row of batchq.schedules
        that a person has written or changed is valid instead (see docs/schedules.md). Raises ConfigError.
        """
        _check_schedule(
            cron=cron,
            time_zone=time_zone,
            missed=missed,
            catch_up_most=catch_up_most,
            overlap=overlap,
            queue=queue,
            **({} if name is None else {"name": name}),
        )
        text = json_text({} if payload is None else payload, "the payload of a schedule")

        def register(function: Function) -> Function:
            declared = (function, name, cron, time_zone, queue, text, missed, catch_up_most, overlap)
            self.schedules.append(DeclaredSchedule(*declared))
            return function

        return register

    def around(self, function: Around) -> Around:
        """Run a generator function around the handler of each batch: ``@app.around``, with one yield.

        A ``def`` one is for ``def`` handlers, an ``async def`` one for ``async def`` handlers. It takes the batch. What
        the handler raises is raised at the yield; the hook may raise another error in its place, but cannot swallow it.
        An error of the hook ends the attempt as if the handler had raised it. Of several hooks, the first one
        registered is the outermost. Raises ConfigError.
        """
        self.hooks.add_around(function)
        return function

    def lifespan(self, function: Lifespan) -> Lifespan:
        """Run a generator function, ``def`` or ``async def``, once per worker process: ``@app.lifespan``, with one
        yield.

        What is before the yield runs before the first claim, what is after it when the last handler has ended. Handlers
        find what it yields in ``batch.app_state``. An ``async def`` one runs in the event loop of the handlers. An
        error before the yield ends the worker (LifespanFailed), a later one is only logged. Raises ConfigError.
        """
        self.hooks.set_lifespan(function)
        return function

    def on_failure(self, function: OnFailure) -> OnFailure:
        """Call a function with a `Failure` after a batch has failed for good: ``@app.on_failure``.

        The worker that commits the failure calls it afterwards, also if the batch's own worker has died. It is called
        at most once, unless the connection breaks during that commit, and not at all if the process ends before the
        call. An error of the function is only logged. Raises ConfigError.
        """
        self.hooks.add_on_failure(function)
        return function

    def declared_schedules(self) -> list[dict[str, Any]]:
        """Return the schedules that the code declares, by column. Raises ConfigError for one without a handler, and for
        a name that two have."""
        kinds = {id(handler.function): handler.kind for handler in self.handlers.values()}
        found: dict[str, dict[str, Any]] = {}
        for declared in self.schedules:
            kind = kinds.get(id(declared.function))
            if kind is None:
                where = _name_of(declared.function)
                raise ConfigError(f"{where}() has the schedule {declared.cron!r}, but it is not the handler of a kind")
            columns = {key: value for key, value in vars(declared).items() if key != "function"}
            payload = sealing.sealed_of_schedule(json.loads(declared.payload), kind)
            name = declared.name or kind
            if name in found:
                raise ConfigError(f"two schedules have the name {name!r}; give one of them another name=")
            found[name] = columns | {"name": name, "kind": kind, "payload": payload}
        return list(found.values())

    def add(self, handler: Handler) -> None:
        """Register a handler. Raises ConfigError for a kind that has one, and for a timeout that is not over 0."""
        if handler.kind in self.handlers:
            other = _name_of(self.handlers[handler.kind].function)
            raise ConfigError(f"kind {handler.kind!r} has a handler already: {other}")
        if handler.timeout_seconds is not None and not handler.timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds of {handler.kind!r} must be over 0, not {handler.timeout_seconds!r}")
        self.handlers[handler.kind] = handler
        if handler.sealed:
            sealing.demand(handler.kind)


def _check_kind(kind: str) -> None:
    """Raise ConfigError for a kind that the table would refuse, such as the function in ``@app.handler`` without ()."""
    if not isinstance(kind, str) or not 1 <= len(kind.encode()) <= _MAX_KIND_BYTES:
        raise ConfigError(f"a kind is a text of 1 to {_MAX_KIND_BYTES} bytes, not {kind!r}")


def _checked_limits(kind: str, limits: DeclaredLimits) -> DeclaredLimits:
    """Return limits that the table would accept. Raises ConfigError for others, and for a kind that it would not."""
    _check_kind(kind)
    for name in ("max_running", "max_running_per_key"):
        value = getattr(limits, name)
        if value is not None and (type(value) is not int or not 0 <= value < 2**31):
            raise ConfigError(f"{name} of {kind!r} is a whole number from 0 up, not {value!r}")
    for name in ("per_second", "items_per_second"):
        value = getattr(limits, name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0):
            raise ConfigError(f"{name} of {kind!r} is a number from 0 up, not {value!r}")
    if not isinstance(limits.burst_seconds, int | float) or not 0.001 <= limits.burst_seconds <= 3600:
        raise ConfigError(f"burst_seconds of {kind!r} is a number from 0.001 to 3600, not {limits.burst_seconds!r}")
    return limits


def _check_schedule(**columns: Any) -> None:
    """Raise ConfigError for columns of batchq.schedules that cannot be used."""
    from batchq.common.cron import ScheduleError, check_definition  # only here: few apps have schedules

    try:
        check_definition(**columns)
    except ScheduleError as error:
        raise ConfigError(str(error)) from None


def _check_arguments(kind: str, function: Callable[..., Any], expected: str) -> list[str]:
    """Return the names of a handler's arguments. Raises ConfigError unless it is a function that takes at least one."""
    if not callable(function):
        raise ConfigError(f"the handler of {kind!r} is not a function: {function!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"the handler of {kind!r}, {_name_of(function)}(), is a generator: nobody would run its body")
    names = list(inspect.signature(function).parameters)
    if not names:
        raise ConfigError(f"the handler of {kind!r}, {_name_of(function)}(), must take an argument, the {expected}")
    return names


def _check_batch_argument(kind: str, function: Callable[..., Any]) -> None:
    _check_arguments(kind, function, "batch")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise ConfigError(
            f"the handler of {kind!r}, {_name_of(function)}(), is called with only the batch: {error}"
        ) from None


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__qualname__", function))


def _check_item_arguments(kind: str, function: Callable[..., Any], transactional: bool) -> list[str]:
    """Return which of batch and conn an item handler takes besides the item. Raises ConfigError for others."""
    extra = _check_arguments(kind, function, "item")[1:]
    allowed = ["batch", "conn"] if transactional else ["batch"]
    if unknown := [name for name in extra if name not in allowed]:
        why = "; conn is for transactional=True" if "conn" in unknown else ""
        raise ConfigError(
            f"the item handler of {kind!r} takes (item, {', '.join(allowed)}), not {', '.join(unknown)}{why}"
        )
    return extra


def _check_numbers(kind: str, concurrency: int, chunk_size: int, spread: int, transactional: bool) -> None:
    if type(spread) is not int or not 1 <= spread <= MOST_PARTS:
        raise ConfigError(f"spread of {kind!r} is a number of parts from 1 to {MOST_PARTS:,}, not {spread!r}")
    if concurrency < 1 or chunk_size < 1:
        raise ConfigError(f"{kind!r}: concurrency and chunk_size start at 1, not {concurrency} and {chunk_size}")
    if transactional and concurrency > 1:
        raise ConfigError(f"{kind!r}: a transactional item handler has one connection, so concurrency must be 1")


def _import_from_here(name: str) -> ModuleType:
    """Import a module, from the current directory first.

    Its own imports and all later ones search that directory last, so no file there replaces a module of batchq.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    top = name.partition(".")[0]
    spec = None if top in sys.modules else PathFinder.find_spec(top, [here])
    if spec is not None and spec.loader is not None:
        module = sys.modules[top] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[top]
            raise
    return importlib.import_module(name)


def _is_in_current_directory(module: ModuleType) -> bool:
    return Path(_file_of(module)).is_relative_to(Path.cwd())


def _file_of(module: ModuleType) -> str:
    return str(getattr(module, "__file__", None) or "part of Python")


def hidden_modules() -> list[tuple[str, str]]:
    """Return the modules in the current directory that another of that name hides: name, and file of the other."""
    try:
        here = [path for path in Path.cwd().iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        names = sorted({path.stem for path in here} - {"__main__"})
        loaded = [(name, module) for name in names if (module := sys.modules.get(name))]
        return [(name, _file_of(module)) for name, module in loaded if not _is_in_current_directory(module)]
    except OSError:  # the directory is gone, or may not be listed
        return []


def load_app(name: str) -> App:
    """Import the app named ``module:attribute``; the current directory comes first. Raises ConfigError, in one line."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"name the app as MODULE:APP, such as tasks:app, not {name!r}")
    try:
        module = _import_from_here(module_name)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"cannot import {module_name!r}: {message}") from error
    if not hasattr(module, attribute):
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        is_own = _is_in_current_directory(module)
        where = "" if is_own else f" (it is {_file_of(module)}: give a module of yours another name)"
        raise ConfigError(f"{module_name!r} has no {attribute!r}; its apps: {', '.join(apps) or 'none'}{where}")
    app = getattr(module, attribute)
    if not isinstance(app, App):
        raise ConfigError(f"{name!r} is not a batchq.App (it is {type(app).__name__})")
    if not app.handlers:
        raise ConfigError(f"{name!r} has no handlers; decorate functions with @{attribute}.handler(kind)")
    return app
