"""Every exception of batchq, in one place."""


class BatchqError(Exception):
    """Base of the errors that batchq raises for a caller to handle."""


class ConfigError(BatchqError):
    """A setting, a DSN, a schema or an app is wrong; the message says what, and what to do."""


class InvalidInput(BatchqError, ValueError):
    """An argument cannot become a batch; the message names it and its value."""


class OutcomeUnknown(BatchqError):
    """The connection was lost while COMMIT was in flight: the transaction may or may not have committed."""


class DatabaseAway(BatchqError):
    """No connection could be had: the batch is given back, its attempt not counted."""


class ConnectionLost(DatabaseAway):
    """The connection was gone before anything was done with it."""


class Snooze(BatchqError):
    """Raise in a handler: put the batch back for *seconds*; the attempt is not counted."""

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds < float("inf"):
            raise InvalidInput(f"Snooze takes a number of seconds from 0 up, not {seconds!r}")
        super().__init__(f"snoozed for {seconds:g} s")
        self.seconds = seconds


class Cancel(BatchqError):
    """Raise in a handler: end the batch as cancelled, for *reason*."""


class Interrupted(BaseException):
    """Base of what ends a handler from outside.

    Derived from BaseException so that a handler's ``except Exception`` does not swallow it.
    """


class StopRequested(Interrupted):
    """The worker is stopping: the batch is given back, its attempt not counted, its checkpoint kept."""


class LeaseLost(Interrupted):
    """The batch is no longer this worker's: rescued, cancelled or finished. Nothing was written."""


class TimedOut(Interrupted):
    """The batch ran for longer than its timeout_seconds; its attempt has failed."""


# What ends a batch, or puts it back, without a failed attempt; the first of these that a group has decides.
CONTROL = (LeaseLost, TimedOut, InvalidInput, Cancel, Snooze, StopRequested, DatabaseAway)


def of_group(error: BaseException) -> BaseException:
    """Return the control exception that a group stands for, which has nothing else in it; else *error* itself.

    asyncio.TaskGroup raises a group even for the one Snooze of one task. Of several LeaseLost and TimedOut decide
    before what the handler asks for, of that InvalidInput, which must not go unseen, before Cancel, Cancel before
    Snooze, and of several Snooze the longest.
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    found = leaves(error)
    ranked = [(rank, leaf) for leaf in found for rank, kind in enumerate(CONTROL) if isinstance(leaf, kind)]
    if len(ranked) < len(found):
        return error
    first = min(rank for rank, _ in ranked)
    return max((leaf for rank, leaf in ranked if rank == first), key=lambda leaf: getattr(leaf, "seconds", 0))


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """Return the exceptions in a group, and in the groups within it, however deep."""
    found: list[BaseException] = []
    todo: list[BaseException] = [group]
    while todo:
        error = todo.pop()
        if isinstance(error, BaseExceptionGroup):
            todo.extend(reversed(error.exceptions))
        else:
            found.append(error)
    return found
