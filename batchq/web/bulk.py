"""Verbs in bulk from the web UI: first a count, then the changes, a step for each request.

What is asked for and how far it is travels in the form, sealed, from one answer to the next request. The server keeps
nothing of it: closing the page stops it, and what is done stays done.
"""

import json
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

import psycopg

from batchq.common.text import period_seconds
from batchq.errors import BatchqError
from batchq.operate.bulk import PAUSE_FACTOR, Bulk
from batchq.operate.verbs import VERBS, Verb, stored
from batchq.web.reads import Reader
from batchq.web.verbs import Refused, change_of, refusals, why

_COUNT_SECONDS = 1.0
_MOST_FILTER_CHARACTERS = 300
_AS_THEY_ARE = ("queue", "kind", "key", "status", "error_group")


class TryAgain(Refused):
    """A transient error: the same form, sent again, continues."""


@dataclass
class Job:
    """A bulk, with its filter as people typed it. rest_seconds: how long to leave the workers alone now."""

    given: dict[str, str]
    bulk: Bulk
    rest_seconds: float = 0.0

    @property
    def continues(self) -> bool:
        """Whether the next step needs no decision."""
        return self.bulk.state in ("counting", "changing")

    @property
    def not_before(self) -> str:
        """The time in UTC that a number of minutes means; empty if none was given."""
        if "delay_seconds" not in self.bulk.change or "before" not in self.bulk.filter:
            return ""
        at = datetime.fromisoformat(self.bulk.filter["before"]) + timedelta(seconds=self.bulk.change["delay_seconds"])
        return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")

    def as_text(self) -> str:
        """Return it as the text of a form's field."""
        return json.dumps(asdict(self))

    @classmethod
    def of_text(cls, text: str) -> "Job":
        """Return what `as_text` wrote."""
        fields = json.loads(text)
        return cls(fields["given"], Bulk(**fields["bulk"]), fields["rest_seconds"])


def verbs_for(status: str | None) -> list[Verb]:
    """Return the verbs that accept batches of a list filtered by *status*, None for any."""
    return [verb for verb in VERBS.values() if verb.accepts(status)]


def shown_status(given: dict[str, str]) -> str:
    """Return the stored status of a list's filter; empty for none."""
    return stored(given.get("status", ""))


def asked(verb: Verb, form: dict[str, str]) -> Job:
    """Return what a form asks for. Raises Refused."""
    names = ("queue", "kind", "key", "error", "older")
    given = {name: text for name in names if (text := form.get(name, "").strip()[:_MOST_FILTER_CHARACTERS])}
    if form.get("grouped"):  # said apart, since the group of batches without an error is empty
        given["error_group"] = form.get("error_group", "")[:_MOST_FILTER_CHARACTERS]
    if not given and form.get("all") != "yes":
        raise Refused("no batches selected; give a queue, a kind, a key, an error or an age, or tick the box for all")
    given["status"] = form.get("status") or verb.statuses[0]
    with refusals():
        return Job(given, Bulk(verb.name, _filter(given), change_of(verb, form), *why(form)))


def take_step(reader: Reader, job: Job) -> None:
    """Count for a second at most, or change the next batches. Raises TryAgain, Refused."""
    began_at = time.monotonic()
    with refusals():
        try:
            if job.bulk.state != "counting":
                job.bulk.step(reader.act)
                job.rest_seconds = PAUSE_FACTOR * (time.monotonic() - began_at)
            while job.bulk.state == "counting" and time.monotonic() - began_at < _COUNT_SECONDS:
                job.bulk.step(reader.ask)
        except (psycopg.OperationalError, BatchqError):
            raise TryAgain("the database did not answer in time; what is shown here still holds; try again") from None


def _filter(given: dict[str, str]) -> dict[str, str | float]:
    found: dict[str, str | float] = {name: given[name] for name in _AS_THEY_ARE if name in given}
    if "error" in given:
        found["error_like"] = f"%{_literal(given['error'])}%"
    if "older" in given:
        try:
            found["older_than_seconds"] = period_seconds(given["older"])
        except ValueError as error:
            raise ValueError(f"older than: {error}") from None
    return found


def _literal(text: str) -> str:
    """Return a pattern of LIKE that matches the text only, as the lists' filter does."""
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
