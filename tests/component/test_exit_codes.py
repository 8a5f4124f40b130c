"""Exit codes and error messages, the same for all commands: 0 done, 1 could not or not found, 2 wrong usage.

Each option is given hostile values, too: whatever comes of it is said in words, never in those of Postgres or Python.
"""

import argparse
import io
import re
import sys
from pathlib import Path

import psycopg
import pytest

import batchq as package
from batchq import cli
from batchq.cli import make_parser
from batchq.operate.refusals import refusal
from batchq.postgres.statements import workers
from batchq.postgres.statements.workers import WorkerRow
from tests.component.rows import KIND, Conn, finished, insert, processing
from tests.support.alone import run_alone
from tests.support.commands import Ended
from tests.support.hostile import MARKUP, STEERING

OF_A_BATCH = ("show", "logs", "flow", "watch")
VERBS = {
    "cancel": [], "retry": [], "snooze": ["--for", "1h"], "priority": ["--to", "3"], "move": ["--to", "slow"],
    "run-anyway": [],
}  # fmt: skip
# What each command needs to do something; those that serve, draw or start workers are left out.
BASES = {
    "migrate": [], "check": [], "doctor": [], "roles": ["viewer", "nobody"], "enqueue": ["good"], "status": [],
    "monitor": ["--until-done", "--queue", "nowhere"], "show": ["1"], "watch": ["999"], "flow": ["1"], "logs": ["1"],
    "limit": ["--queue", "q"], "keys": [], "schedule": ["add", "n", "@daily", "--kind", "k"], "prune": [], "audit": [],
    "pause": ["--queue", "q"], "resume": ["--queue", "q"], "unthrottle": ["--queue", "q"], "drain": ["w"],
    **{command: ["1", *more] for command, more in VERBS.items()},
}  # fmt: skip
HOSTILE = ("", "nan", "infinity", str(2**64), "-1", "x" * 3000, STEERING + MARKUP)
SHARED = ("--dsn", "--migration-dsn", "--database-timeout-seconds", "--actor", "--reason")
FILTERS = ("--queue", "--kind", "--key", "--status", "--error-like", "--older-than")
FORBIDDEN = re.compile(
    r"(batches|limits|schedules|pauses)_[a-z_]+|smallint|bigint|float8|SQLSTATE|psycopg|Traceback|int4|timestamptz|"
    r"[A-Za-z]+(Error|Exception|Violation|Overflow)\b|check constraint|invalid input syntax|DETAIL|None\b"
)


class Here:
    """Runs commands in this process: ten times as fast as one process each. *dsn*: None for none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], directory: Path) -> None:
        self.patch, self.capsys = monkeypatch, capsys
        parser = make_parser()
        monkeypatch.setattr(cli, "make_parser", lambda _: parser)
        monkeypatch.chdir(directory)
        self.use(None)

    def use(self, dsn: str | None) -> None:
        """Run commands on that database from now on."""
        self.patch.delenv("BATCHQ_DSN", raising=False) if dsn is None else self.patch.setenv("BATCHQ_DSN", dsn)

    def __call__(self, *arguments: str, stdin: str = "") -> Ended:
        """Run one command to its end."""
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        try:
            code = cli.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *self.capsys.readouterr())


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    """Return what runs commands without a DSN."""
    return Here(monkeypatch, capsys, tmp_path)


@pytest.fixture
def batchq(dsn: str, nowhere: Here) -> Here:
    """Return what runs commands on the test's database."""
    nowhere.use(dsn)
    return nowhere


# --------------------------------------------------------------------------------------------------- the same for all


@pytest.mark.parametrize("command", OF_A_BATCH)
def test_a_batch_that_is_not_there_is_1_and_one_line(batchq: Here, command: str) -> None:
    ended = batchq(command, "999")
    assert (ended.code, ended.out, ended.err) == (1, "", "batchq: there is no batch 999\n")


@pytest.mark.parametrize("command", VERBS)
def test_a_verb_of_a_batch_that_is_not_there_is_1(batchq: Here, command: str) -> None:
    ended = batchq(command, "999", *VERBS[command])
    assert (ended.code, ended.out) == (1, "there is no batch 999\n")


@pytest.mark.parametrize("command", [*OF_A_BATCH, *VERBS])
def test_what_cannot_be_an_id_is_2(nowhere: Here, command: str) -> None:
    for bad in ("seven", "0", "-1", "1,2", "1.5", str(2**63), "9" * 5000, "5_5", "", "1,2345"):
        ended = nowhere(command, *VERBS.get(command, []), "--", bad)
        assert (ended.code, ended.out) == (2, ""), bad
        assert "must be the id of a batch, such as 5562 or 5,562, not " in ended.err
        assert len(ended.err) < 2_000


@pytest.mark.parametrize("written", ["1,234", "1 234", "1_234", "1\u202f234", "1\u00a0234", "1234", " 1234 "])
def test_an_id_is_taken_as_batchq_writes_it(batchq: Here, written: str) -> None:
    assert batchq("show", written).err == "batchq: there is no batch 1234\n"
    assert batchq("cancel", written).out == "there is no batch 1234\n"


@pytest.mark.parametrize("command", BASES)
def test_an_option_that_there_is_not_is_2(nowhere: Here, command: str) -> None:
    ended = nowhere(command, *BASES[command], "--colour")
    assert (ended.code, ended.out, "unrecognized arguments: --colour" in ended.err) == (2, "", True)


@pytest.mark.parametrize("command", [name for name in BASES if name != "doctor"])
def test_no_database_is_2_and_one_that_is_away_is_1(nowhere: Here, command: str) -> None:
    none = nowhere(command, *BASES[command])
    assert (none.code, none.complaint.startswith("BATCHQ_DSN is not set")) == (2, True)
    nowhere.use("postgresql://me@127.0.0.1:1/x")
    away = nowhere(command, *BASES[command])
    assert (away.code, away.complaint.startswith("cannot connect: ")) == (1, True), away.err


def test_a_database_without_the_schema_is_2(empty_dsn: str, nowhere: Here) -> None:
    nowhere.use(empty_dsn)
    for command in BASES.keys() - {"migrate", "doctor"}:
        ended = nowhere(command, *BASES[command])
        assert (ended.code, ended.complaint) == (2, "the database has no batchq schema; run: batchq migrate"), command


NAMED = (
    (["schedule", "pause", "nothing"], 1, "there is no schedule nothing"),
    (["schedule", "run", "nothing"], 1, "there is no schedule nothing"),
    (["schedule", "list", "nothing"], 1, "there is no schedule nothing"),
    (["drain", "nobody"], 1, "there is no worker nobody"),
    (["pause", "--for", "2h"], 2, "nothing was changed: pause needs --queue, --kind, or both"),
    (["resume"], 2, "nothing was changed: resume needs --queue"),
    (["unthrottle", "--kind", "x"], 2, "nothing was changed: unthrottle needs --queue"),
    (["cancel"], 2, "nothing was changed: no batches selected; pass ids"),
    (["retry"], 2, "nothing was changed: no batches selected; pass ids"),
    (["run-anyway"], 2, "the following arguments are required: ID"),
    (["move", "1", "--to", ""], 2, "the name of a queue must have 1 to 128 bytes"),
    (["move", "--all", "--to", "q" * 129], 2, "the name of a queue must have 1 to 128 bytes"),
    (["priority", "1", "--to", "99999"], 2, "priority must be a whole number from -32768 to 32767, not '99999'"),
    (["snooze", "1", "--for", "-5m"], 2, "expected one argument"),
    (["snooze", "1", "--until", "soon"], 2, "\"soon\" is not a time, such as '2030-01-01 06:00+00'"),
    (["snooze", "1", "--until", "2030-13-45"], 2, "is not a date that exists"),
    (["snooze", "1", "--until", "infinity"], 2, "the time must be a date, not infinity"),
    (["snooze", "--all", "--until", "infinity"], 2, "the time must be a date, not infinity"),
    (["retry", "--all", "--error-like", ""], 2, "argument --error-like: must not be empty"),
    (["cancel", "--kind", ""], 2, "argument --kind: must be a kind, which has 1 to 200 bytes"),
    (["pause", "--queue", ""], 2, "argument --queue: must be the name of a queue, which has 1 to 128 bytes"),
    (["enqueue", "k" * 201], 2, "must be a kind, which has 1 to 200 bytes, not 201"),
    (["enqueue", "good", "--priority", "99999"], 2, "must be a whole number from -32,768 to 32,767; lower runs first"),
    (["enqueue", "good", "--max-attempts", "0"], 2, "must be a number of attempts, 1 to 32,767, not '0'"),
    (["enqueue", "good", "--delay-seconds", "1e300"], 2, "must be a number of seconds, at most 300 years"),
    (["enqueue", "good", "--after", "999"], 2, "a batch cannot wait for 999: no batch has that id"),
    (["enqueue", "good", "--unique-key", ""], 2, "must be a unique key, which has 1 to 1,000 bytes"),
    (["enqueue", "good", "--items", "-"], 2, "standard input, line 1: not valid JSON"),
    (["enqueue", "good", "--csv", "-"], 2, "standard input, line 2: 1 column, but 2 in the first row"),
    (["limit", "--queue", "q", "--max-running", "many"], 2, "max_running must be a whole number, 0 or more"),
    (["roles", "viewer", "nobody"], 0, ""),
    (["roles", "viewer", "nobody", "--apply"], 1, 'role "nobody" does not exist'),
)


def test_each_mistake_has_its_code_and_its_words(batchq: Here, conn: Conn) -> None:
    assert insert(conn) == 1
    for arguments, code, said in NAMED:
        ended = batchq(*arguments, stdin="a,b\n1\n")
        assert (ended.code, said in ended.err) == (code, True), (arguments, ended)
        assert not FORBIDDEN.search(ended.err), (arguments, ended)


# --------------------------------------------------------------------------------------------- verbs and statuses


STATUSES = ("pending", "processing", "completed", "failed", "cancelled", "waiting")
# What a verb says of one batch with each of STATUSES; in capitals: it was done.
ENDED = ("had completed already", "had failed already", "was cancelled already")
OTHERS = "waits for other batches"
SAID = {
    "cancel": ("DONE", "DONE", *ENDED, "DONE"),
    "retry": ("was pending already", "is running", "nothing in it is left to retry", "DONE", "DONE", OTHERS),
    "snooze": ("DONE", "is running", *ENDED, OTHERS),
    "priority": ("DONE", "is running", *ENDED, OTHERS),
    "move": ("DONE", "is running", *ENDED, OTHERS),
    "run-anyway": ("waited for no other batch", "is running", *ENDED, "DONE"),
}
DONE = "cancelled|made pending( again)?|snoozed|given the new priority|moved"
AS_ASKED = {("cancel", "cancelled"), ("retry", "pending"), ("run-anyway", "pending")}


def batch_of(conn: Conn, status: str) -> int:
    """Return the id of a batch with a stored status."""
    if status == "pending":
        return insert(conn)
    if status == "processing":
        return processing(conn, kind=status).id
    if status == "waiting":
        return package.enqueue(conn, KIND, after=[insert(conn, run_at="2100-01-01")]) or 0
    return finished(conn, status, kind=status)


@pytest.mark.parametrize("command", VERBS)
def test_a_verb_says_whether_it_changed_a_batch(batchq: Here, conn: Conn, command: str) -> None:
    for status in STATUSES:
        check_verb(batchq, conn, command, status)


def check_verb(batchq: Here, conn: Conn, command: str, status: str) -> None:
    """Fail unless a verb says of a batch with this status whether it changed it."""
    batch_id = batch_of(conn, status)
    said = SAID[command][STATUSES.index(status)]
    ended = batchq(command, str(batch_id), *VERBS[command])
    if said == "DONE":
        assert ended.code == 0
        assert re.fullmatch(
            f"batch {batch_id} (cancelled|made pending( again)?|snoozed|given the new priority|moved)\n", ended.out
        )
        return
    assert said in ended.out
    assert ended.code == (0 if (command, status) in AS_ASKED else 1), ended.out
    assert "retry" in said or ended.out == f"nothing was changed: batch {batch_id} {said}\n"


def test_a_verb_says_what_changed_and_what_could_not(batchq: Here, conn: Conn) -> None:
    over = [finished(conn), finished(conn)]
    live = [insert(conn) for _ in range(3)]
    ended = batchq("cancel", *map(str, [*live, *over, over[0], 999]))
    first, second = over
    assert ended.out == f"3 batches cancelled; 2 had completed already: {first}, {second}; there is no batch 999\n"
    assert ended.code == 1


# -------------------------------------------------------------------------------------------------- unknown names


def add_worker(conn: Conn) -> None:
    """Add the row of a live worker of queue mail, which handles kind send."""
    row = WorkerRow("w", "host", 1, "0.1.0", ["mail"], ["send"], 16)
    with conn.transaction():
        conn.execute(*workers.heartbeat(row, 0, stopping=False))


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (["enqueue", "sendd", "--queue", "mail"], "no worker handles kind 'sendd' (known: send); did you mean 'send'?"),
        (["enqueue", "send", "--queue", "mial"], "no worker serves queue 'mial' (known: mail); did you mean 'mail'?"),
        (["enqueue", "send", "--queue", "mail"], ""),
        (["pause", "--queue", "mial"], "no batch and no live worker of queue 'mial' is known (known: mail, other)"),
        (["pause", "--kind", "xyz"], "no batch and no live worker of kind 'xyz' is known (known: send, work)"),
        (["pause", "--queue", "mail", "--kind", "send"], ""),
        (["cancel", "--kind", "wrk"], "kind 'wrk' is known (known: send, work); did you mean 'work'?"),
        (["status", "--queue", "mial"], "queue 'mial' is known (known: mail, other); did you mean 'mail'?"),
        (["status", "--queue", "other"], ""),
        (["keys", "--queue", "mial"], "queue 'mial' is known"),
        (["move", "1", "--to", "mial"], "no worker serves queue 'mial' (known: mail); did you mean 'mail'?"),
        (["move", "1", "--to", "mail"], ""),
    ],
    ids=str,
)
def test_an_unknown_name_is_warned_of_and_no_error(
    batchq: Here, conn: Conn, arguments: list[str], warning: str
) -> None:
    insert(conn, queue="other")
    add_worker(conn)
    ended = batchq(*arguments)
    assert (ended.code, warning in ended.err, bool(ended.err)) == (0, True, bool(warning)), ended


def test_where_nothing_is_known_nothing_is_warned_of(batchq: Here) -> None:
    for arguments in (["pause", "--queue", "q"], ["status", "--queue", "x"], ["enqueue", "k"]):
        assert batchq(*arguments).err == ""


# -------------------------------------------------------------------------------------------------- hostile values


def options_of(command: str) -> list[str]:
    """Return the options of a command that take a value, without those that all commands share."""
    [commands] = [one for one in make_parser()._actions if isinstance(one, argparse._SubParsersAction)]
    found = [action for action in commands.choices[command]._actions if action.option_strings and action.nargs != 0]
    return [action.option_strings[-1] for action in found if action.option_strings[-1] not in SHARED]


@pytest.mark.parametrize("command", BASES)
def test_hostile_values_are_refused_in_words(batchq: Here, conn: Conn, command: str) -> None:
    assert FORBIDDEN.search('new row violates check constraint "batches_kind_is_named"'), "it finds what it looks for"
    insert(conn)
    for option in options_of(command):
        base = [word for word in BASES[command] if not (option in FILTERS and word == "1")]
        if option in base:
            base = base[: base.index(option)] + base[base.index(option) + 2 :]
        for value in HOSTILE:
            ended = batchq(command, *base, f"{option}={value}")
            assert ended.code in (0, 1, 2), (option, value, ended)
            assert not FORBIDDEN.search(ended.err.replace(value or "\0", "")), (option, value, ended)


def test_a_refusal_of_the_table_is_told_in_words(conn: Conn) -> None:
    for column, value, said in (
        ("kind", "''", "a kind must have 1 to 200 bytes"),
        ("priority", "99999", "a number is too large or too small to be stored"),
        ("run_at", "'infinity'", "the time must be a date, not infinity"),
        ("max_attempts", "0", "the maximum number of attempts must be 1 or more"),
        ("items", "'{}'", "items must be a JSON array"),
        ("spread", "5000", "the number of parts must be from 1 to 1,000"),
    ):
        columns, values = (column, value) if column == "kind" else (f"kind, {column}", f"'k', {value}")
        with pytest.raises(psycopg.Error) as caught:
            conn.execute(f"INSERT INTO batchq.batches ({columns}) VALUES ({values})".encode())
        assert said in refusal(caught.value)


if __name__ == "__main__":
    run_alone(__file__)
