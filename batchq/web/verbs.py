"""Verbs from the web UI: a page asks, and its form does it. All are safe to repeat."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from batchq.operate.refusals import refusal
from batchq.operate.verbs import Verb, whole_number
from batchq.postgres.statements.views import HIGHEST_ID
from batchq.web.reads import Reader

_MOST_TEXT = 500


class Refused(Exception):
    """A verb could not be done; the text says why, for people."""


def do(reader: Reader, verb: Verb, form: dict[str, str]) -> None:
    """Do what a form asks for. Commits. Raises Refused."""
    with refusals():
        target, change = _target(verb, form), change_of(verb, form)
        answer = reader.act(lambda conn: verb.do(conn, target, change, *why(form)))
    if answer is None:
        raise Refused("it is not there any more")


def change_of(verb: Verb, form: dict[str, str]) -> dict[str, Any]:
    """Return the verb's argument, as batchq.bulk takes it. Raises ValueError."""
    return verb.argument.change(form.get(verb.argument.name, "").strip()) if verb.argument else {}


def why(form: dict[str, str]) -> tuple[str | None, str]:
    """Return the reason and the actor, for the audit."""
    reason, actor = (form.get(name, "").strip()[:_MOST_TEXT] or None for name in ("reason", "actor"))
    return reason, actor or "web"


@contextmanager
def refusals() -> Iterator[None]:
    """Raise Refused for what the form or the database refuses in the block."""
    try:
        yield
    except psycopg.errors.InsufficientPrivilege:
        raise Refused("the database role of the web UI may not do that") from None
    except psycopg.errors.LockNotAvailable:
        raise Refused("somebody else is using it at this moment; try again") from None
    except (psycopg.errors.RaiseException, psycopg.DataError, psycopg.IntegrityError) as error:
        raise Refused(refusal(error) or str(error)) from None
    except ValueError as error:
        raise Refused(str(error)) from None


def _target(verb: Verb, form: dict[str, str]) -> dict[str, Any]:
    given = {name: text.strip() for name, text in form.items()}
    if verb.target == "batch":
        return {"batch_id": whole_number("the batch", given.get("id", ""), 1, HIGHEST_ID)}
    if verb.target == "worker":
        return {"worker_id": given.get("worker", "")}
    return {"queue": given.get("queue") or None, "kind": given.get("kind") or None}
