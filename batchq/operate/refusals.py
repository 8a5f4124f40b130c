"""What Postgres refuses, in words: its own messages name constraints and types, which nobody has typed."""

import re

import psycopg

# By the end of the constraint's name; "limits_queue_is_named" and "batches_queue_is_named" refuse the same.
_CHECKS = {
    "queue_is_named": "the name of a queue must have 1 to 128 bytes",
    "kind_is_named": "a kind must have 1 to 200 bytes",
    "schedules_name_fits": "the name of a schedule must have 1 to 200 bytes",
    "unique_key_fits": "a unique key must have 1 to 1,000 bytes",
    "key_fits": "a key must have 1 to 500 bytes",
    "schedules_payload_fits": "the payload of a schedule must be at most 1 MiB of JSON",
    "payload_fits": "the payload is too large: at most 4 MiB are stored",
    "items_fit": "there are too many items for one batch: at most 1,000,000, and 64 MiB as stored",
    "items_is_array": "items must be a JSON array",
    "run_at_is_finite": "the time must be a date, not infinity",
    "times_are_finite": "the time must be a date, not infinity",
    "max_attempts_is_positive": "the maximum number of attempts must be 1 or more",
    "attempts_are_left": "the maximum number of attempts must be 1 or more",
    "max_failed_items_is_not_negative": "the number of failed items that are tolerated must be 0 or more",
    "timeout_is_positive": "the timeout must be 1 second or more",
    "on_failure_is_known": "on_failure must be wait, run or cancel",
    "spread_fits": "the number of parts must be from 1 to 1,000",
    "spread_has_items": "only a batch with items can be spread",
    "after_fits": "a batch can wait for at most 100,000 others",
    "cron_fits": "a cron expression must have at most 300 bytes",
    "cron_is_readable": "this is not a cron expression",
    "catch_up_is_bounded": "the most batches to catch up must be from 1 to 1,000",
}
_TYPES = {
    "timestamp with time zone": "a time, such as '2030-01-01 06:00+00'",
    "timestamp": "a time, such as '2030-01-01 06:00+00'",
    "interval": "a length of time, such as '2 hours'",
    "json": "JSON",
    "boolean": "true or false",
    "bigint": "a whole number",
    "integer": "a whole number",
    "smallint": "a whole number",
    "double precision": "a number",
}
_CONSTRAINT = re.compile('check constraint "([a-z_]+)"')
_INPUT = re.compile('invalid input syntax for type ([a-z ]+): (".*")', re.DOTALL)
_TIME = re.compile('date/time field value out of range: (".*")', re.DOTALL)
_RETRY_HINT = re.compile("batchq[.]retry[(]([0-9]+), whole => true[)] runs it again from the beginning[.]")
_NAMED_CHECK = re.compile(r" \((?:batches|limits|schedules)_[a-z_]+\)")


def refusal(error: psycopg.Error, as_command: bool = False) -> str:
    """Return why the database refused, in words, and its hint; empty if the error is not one of the database's.

    *as_command*: the hint names the command, not the SQL function that does the same.
    """
    message = error.diag.message_primary
    if not message:
        return ""
    hint = error.diag.message_hint
    if as_command and hint and (found := _RETRY_HINT.fullmatch(hint)):
        hint = f"to run it again from the start: batchq retry --whole {found[1]}"
    return "; ".join(text for text in (_in_words(error, message), hint) if text)


def _in_words(error: psycopg.Error, message: str) -> str:
    found = _CONSTRAINT.search(message)
    if isinstance(error, psycopg.errors.CheckViolation) or found:
        return _check(error.diag.constraint_name or (found[1] if found else ""), message)
    if found := _INPUT.fullmatch(message):
        return f"{_cut(found[2])} is not {_TYPES.get(found[1], f'of type {found[1]}')}"
    if found := _TIME.fullmatch(message):
        return f"{_cut(found[1])} is not a date that exists; write a time as '2030-01-01 06:00+00'"
    if isinstance(error, psycopg.errors.NumericValueOutOfRange):
        return "a number is too large or too small to be stored; give one closer to 0"
    if isinstance(error, psycopg.errors.DatetimeFieldOverflow | psycopg.errors.IntervalFieldOverflow):
        return "a time is too far away to be stored; give one within a few hundred years"
    if isinstance(error, psycopg.errors.StringDataRightTruncation):
        return "a text is too long to be stored; give a shorter one"
    if isinstance(error, psycopg.errors.InvalidName) or "zero-length delimited identifier" in message:
        return "a name must not be empty"
    return _NAMED_CHECK.sub("", message)


def _check(name: str, message: str) -> str:
    """Return what a check of a table wants."""
    for ending, text in _CHECKS.items():
        if name.endswith(ending):
            return text
    if not name or "violates" not in message:
        return _NAMED_CHECK.sub("", message)
    return f"a value does not fit ({name.partition('_')[2].replace('_', ' ')})"


def _cut(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f'{text[:most]}..."'
