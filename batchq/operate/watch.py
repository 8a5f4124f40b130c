"""Read the same of several databases, each in a thread of its own: none waits for another.

A database that does not answer is away. Its last answer is kept, and it is read again at the next call: it comes back
by itself.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import psycopg

from batchq.common.numbers import duration
from batchq.errors import BatchqError, ConfigError
from batchq.postgres.databases import Database
from batchq.postgres.link import Link
from batchq.postgres.logins import is_login_failure
from batchq.postgres.statements.running import Conn

ANSWER_SECONDS = 5.0  # a database that takes longer is away
ONCE_SECONDS = ANSWER_SECONDS + 1  # how long a command waits that shows them once
LIVE_SECONDS = 1.0  # how long a page that is read again and again waits for those that have not answered yet
# By what the server or libpq says: a failed connect has no SQLSTATE. Their texts name hosts and users.
_REASONS = (
    ("login was rejected", "the login was rejected; it is tried again later"),
    ("Connection refused", "connection refused"),
    ("No such file or directory", "no server at its socket"),
    ("could not translate host name", "unknown host name"),
    ("failed to resolve host", "unknown host name"),
    ("timeout", "no answer to the connection"),
    ("starting up", "the server is starting"),
    ("shutting down", "the server is shutting down"),
    ("too many clients", "the server takes no more connections"),
)


class Away(NamedTuple):
    """Why a database is away, in words that name no host and no user. since: a monotonic time."""

    why: str
    since: float

    @property
    def seconds(self) -> float:
        """How long it has been away."""
        return time.monotonic() - self.since

    @property
    def time_text(self) -> str:
        """How long it has been away, in words: "away for 3 min 20 s"; "away" in the first second."""
        return "away" if self.seconds < 1 else f"away for {duration(self.seconds)}"

    @property
    def text(self) -> str:
        """All of it, such as "away for 3 min 20 s: connection refused"."""
        return f"{self.time_text}: {self.why}"


class State(NamedTuple):
    """A database when it was last read. answer: the last one, None before the first. away: None if it answers."""

    name: str
    answer: Any
    away: Away | None


class _Watched:
    """One database: its connection, and the thread that reads it now, if any does."""

    def __init__(self, database: Database, seconds: float) -> None:
        self._seconds, self._database = seconds, database
        self.name = database.name
        self.state = State(database.name, None, Away("no answer yet", time.monotonic()))
        self.is_known = False
        self._link = Link(database.dsn, seconds)
        self._turn = threading.Lock()
        self._read_since: float | None = None
        self.is_closed = False
        self._has_answered = threading.Event()

    def begin(self, question: Callable[[Conn], Any]) -> None:
        """Begin to read, unless the last read has not ended, or it is closed."""
        with self._turn:
            if self.is_closed or self._read_since is not None:
                return
            self._read_since = time.monotonic()
            self._has_answered.clear()
        # A daemon, since a program that ends does not wait for a server that never answers.
        threading.Thread(target=self._read, args=(question,), name=f"batchq-watch-{self.name}", daemon=True).start()

    def wait(self, until: float) -> None:
        """Wait for the answer, but not to a database that is known to be away."""
        if not self.is_known or self.state.away is None:
            self._has_answered.wait(max(0.0, until - time.monotonic()))
            with self._turn:  # in which no answer arrives
                since = self._read_since
                if since is not None and time.monotonic() - since >= self._seconds:
                    self._note(_no_answer(self._seconds))

    def _read(self, question: Callable[[Conn], Any]) -> None:
        try:
            with self._link.transaction() as conn:
                answer = question(conn)
            with self._turn:
                self.state, self.is_known, self._read_since = State(self.name, answer, None), True, None
        except Exception as error:  # whatever it is, it is shown, and the next read begins anew
            self._note(self._database.advice(why(error, self._seconds)))
        finally:
            with self._turn:
                self._read_since = None
                if self.is_closed:
                    self._link.close()
            self._has_answered.set()

    def close(self) -> None:
        """Close the connection; a read that has not ended does so at its end."""
        with self._turn:
            self.is_closed = True
            if self._read_since is None:
                self._link.close()

    def _note(self, reason: str) -> None:
        """Note that it is away; since when does not change if it was away before."""
        since = self.state.away.since if self.is_known and self.state.away else time.monotonic()
        self.state, self.is_known = self.state._replace(away=Away(reason, since)), True


class Watch:
    """Several databases that are read together. *question*: what is read of each, in one transaction.

    A database that does not answer within *seconds* is away.
    """

    def __init__(
        self, databases: Iterable[Database], question: Callable[[Conn], Any], seconds: float = ANSWER_SECONDS
    ) -> None:
        self._question = question
        self._watched = {database.name: _Watched(database, seconds) for database in databases}

    def read(self, seconds: float = LIVE_SECONDS) -> list[State]:
        """Read all at once; return their states as soon as all have answered, or *seconds* have passed.

        Does not wait for a database that was away: its state is that of its last read.
        """
        until = time.monotonic() + seconds
        for each in self._watched.values():
            each.begin(self._question)
        for each in self._watched.values():
            each.wait(until)
        return [each.state for each in self._watched.values()]

    def away(self, name: str) -> Away | None:
        """Return why a database is away, None if it answers or was not read yet; begin to read it if it is away."""
        each = self._watched[name]
        if not each.is_known or each.state.away is None:
            return None
        each.begin(self._question)
        return each.state.away

    def allow(self) -> None:
        """Let the next read connect, also after `close`."""
        for each in self._watched.values():
            each.is_closed = False

    def close(self) -> None:
        """Close the connections. From now on nothing is read: a page that is still watched must not connect again."""
        for each in self._watched.values():
            each.close()

    def begin(self, name: str) -> None:
        """Begin to read one database, without waiting: it may be away."""
        self._watched[name].begin(self._question)


def in_parallel(reads: Mapping[str, Callable[[], Any]], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
    """Return what each of *reads* returns, or the exception that it raised; TimeoutError if it takes too long.

    Each runs in a thread of its own, and is left to its thread if it takes longer.
    """
    results: dict[str, Any] = {}

    def run(name: str, read: Callable[[], Any]) -> None:
        try:
            results[name] = read()
        except Exception as error:
            results[name] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in reads.items()]
    until = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return {name: results.get(name, TimeoutError(_no_answer(seconds))) for name in reads}


def why(error: BaseException, seconds: float = ANSWER_SECONDS) -> str:
    """Return why a database is away, in words that name no host, user or statement. *seconds*: its time limit."""
    if isinstance(error, psycopg.errors.QueryCanceled):
        return _no_answer(seconds)
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return "its role may not read batchq's views"
    if isinstance(error, psycopg.ProgrammingError):
        return "batchq's schema is missing, or of another version; run: batchq migrate"
    text = str(error)
    if found := next((reason for part, reason in _REASONS if part in text), None):
        return found
    if is_login_failure(error):
        return "the login was rejected, or there is no such database"
    if isinstance(error, ConfigError):
        return "its DSN or its schema does not work; run: batchq check"
    return "the connection was lost" if isinstance(error, psycopg.OperationalError | BatchqError) else "an error"


def _no_answer(seconds: float) -> str:
    return f"no answer within {seconds:g} s"
