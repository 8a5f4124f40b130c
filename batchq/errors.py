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
