"""Every exception of batchq."""

MOST_THROTTLED_SECONDS = 30 * 86_400


class BatchqError(Exception):
    """Base of the errors that batchq raises for a caller to handle."""


class ConfigError(BatchqError):
    """A setting, a DSN, a schema or an app is wrong; the message says what is wrong and what to do."""


class LifespanFailed(BatchqError):
    """The app's lifespan raised an error before its yield: the worker ends, and has claimed nothing."""


class InvalidInput(BatchqError, ValueError):
    """An argument cannot become a batch; the message names it and its value."""


class CannotOpen(InvalidInput):
    """A sealed value does not fit its key, kind or field, or a value is in the clear where it must be sealed."""


class KeyMissing(BatchqError):
    """A value is sealed with a key that this program does not have; the message names the key."""


class OutcomeUnknown(BatchqError):
    """The connection was lost during COMMIT: the transaction may or may not have committed."""


class DatabaseAway(BatchqError):
    """No connection could be made: the batch is released, its attempt not counted."""


class ConnectionLost(DatabaseAway):
    """The connection was lost before its first use."""


class Snooze(BatchqError):
    """Raise in a handler: run the batch again after *seconds*; the attempt is not counted."""

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            raise InvalidInput(f"Snooze takes a number of seconds from 0 up, not {seconds!r}")
        super().__init__(f"snoozed for {seconds:g} s")
        self.seconds = seconds


class Throttled(BatchqError):
    """Raise in a handler that was told to slow down (HTTP 429): the batch or item runs again after *seconds*, the
    attempt is not counted, and no batch or item of its *scope* begins until then, in any worker.

    scope: "kind" (this kind in this queue), "queue" (all kinds of the queue), or "key" (batches of this kind with this
    batch's key; without a key, only this batch). With "key", batches of that key that run already go on.
    """

    def __init__(self, seconds: float, scope: str = "kind") -> None:
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not is_number or not 0 <= seconds <= MOST_THROTTLED_SECONDS:
            raise InvalidInput(f"Throttled takes 0 to {MOST_THROTTLED_SECONDS:,} seconds, not {seconds!r}")
        if scope not in ("kind", "queue", "key"):
            raise InvalidInput(f'the scope of Throttled is "kind", "queue" or "key", not {scope!r}')
        super().__init__(f"throttled for {seconds:g} s")
        self.seconds = seconds
        self.scope = scope


class Cancel(BatchqError):
    """Raise in a handler: end the batch as cancelled, for *reason*."""


class Interrupted(BaseException):
    """Base of the exceptions that end a handler from outside.

    Derived from BaseException so that a handler's ``except Exception`` does not swallow it.
    """


class StopRequested(Interrupted):
    """The worker is stopping: the batch is released, its attempt not counted, its checkpoint kept."""


class LeaseLost(Interrupted):
    """The batch is no longer claimed by this worker: it was rescued, cancelled or finished. Nothing was written."""


class TimedOut(Interrupted):
    """The batch ran for longer than its timeout_seconds; its attempt has failed."""


# Exceptions with an outcome of their own, other than a failed attempt. Of several in a group, the first here decides.
_CONTROL = (LeaseLost, TimedOut, InvalidInput, Cancel, Throttled, Snooze, StopRequested, DatabaseAway)


def of_group(error: BaseException) -> BaseException:
    """Return the control exception that decides, if *error* is a group of only those; otherwise *error* itself.

    asyncio.TaskGroup raises a group even for a single Snooze of one task. Of several, LeaseLost and TimedOut come
    before the handler's own requests; of these, InvalidInput comes first, since it must not go unnoticed, then Cancel,
    then the longest Throttled, then the longest Snooze.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    found = _leaves(error)
    ranked = [(rank, leaf) for leaf in found for rank, kind in enumerate(_CONTROL) if isinstance(leaf, kind)]
    if len(ranked) < len(found):
        return error
    first = min(rank for rank, _ in ranked)
    return max((leaf for rank, leaf in ranked if rank == first), key=lambda leaf: getattr(leaf, "seconds", 0))


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    # Not recursive: groups may be nested deeper than Python's limit.
    found: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop()
        if isinstance(error, BaseExceptionGroup):
            todo.extend(reversed(error.exceptions))
        else:
            found.append(error)
    return found
