"""The command line: each command as a process of its own, its output, its exit code, its one-line errors."""

import json
import re
import select
import signal
from pathlib import Path

import psycopg
import pytest

from batchq.cli import make_parser
from batchq.cli.connections import settings_of
from batchq.common.version import __version__
from batchq.operate.verbs import VERBS
from batchq.settings import Settings
from tests.support.alone import run_alone
from tests.support.batches import failed_items, look, put, values
from tests.support.commands import CommandLine
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until

COMMANDS = ("migrate", "check", "demo", "worker", "workers", "enqueue", "status", "monitor", "show", "watch", "logs")
COMMANDS += (
    "top",
    "web",
    "doctor",
    "keys",
    "new-key",
    "limit",
    "prune",
    "audit",
    "roles",
    "schedule",
    "split",
    "flow",
    "distribute",
    *dict.fromkeys(verb.command for verb in VERBS.values()),
)
TODAY = "(now() AT TIME ZONE 'UTC')::date"


@pytest.fixture
def batchq(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


@pytest.fixture
def nowhere(tmp_path: Path) -> CommandLine:
    """Return what runs commands without a DSN."""
    return CommandLine(None, tmp_path)


# ---------------------------------------------------------------------------------------------------- arguments


def test_help_names_every_command(nowhere: CommandLine) -> None:
    ended = nowhere("--help")
    assert ended.code == 0
    listed = [line.split()[0] for line in ended.out.splitlines() if re.match(r"    \S", line)]
    assert {*COMMANDS, "completion"} == set(listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_needs_no_database(nowhere: CommandLine, command: str) -> None:
    ended = nowhere(command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: batchq {command} ")
    assert ("--dsn" in ended.out) == (command != "new-key")  # which needs no database at all


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["show"],
        ["show", "seven"],
        ["show", "9" * 30],
        ["snooze", "1"],
        ["snooze", "1", "--for", "soon"],
        ["priority", "1"],
        ["cancel", "--status", "failed"],
        ["drain"],
        ["cancel", "1", "9" * 5_000],
        ["retry", "0"],
        ["roles", "emperor"],
        ["worker"],
        ["workers", "two", "tasks:app"],
        ["status", "--status", "odd"],
        ["status", "--limit", "-1"],
        ["show", "1", "--limit", "-1"],
        ["monitor", "--every-seconds", "0"],
        ["monitor", "--every-seconds", "nan"],
        ["enqueue", "caf\udce9"],
    ],
    ids=lambda arguments: " ".join(arguments)[:20] or "none",
)
def test_arguments_that_cannot_be_are_refused_with_the_usage(nowhere: CommandLine, arguments: list[str]) -> None:
    ended = nowhere(*arguments)
    assert ended.code == 2
    assert ended.err.startswith("usage: batchq")
    assert "Traceback" not in ended.err


SAME: dict[str, tuple[list[str], int]] = {
    "help": (["--help"], 0),
    "a mistake": (["dance"], 2),
    "bytes that are no text": (["enqueue", "caf\udce9"], 2),
    "an import that fails": (["worker", "failing:app"], 2),
    "a table": (["status"], 0),
    "JSON": (["status", "--json"], 0),
    "what is not there": (["show", "999"], 1),
    "an answer of no": (["cancel", "999"], 1),
    "standard input": (["enqueue", "good", "--lines", "-"], 0),
    "a worker": (["worker", "tasks:app", "--drain", "--log-level", "error"], 0),
    "two workers": (["workers", "2", "tasks:app", "--drain", "--log-level", "error"], 0),
    "a crash": (["worker", "crashing:app"], -signal.SIGKILL),
    "an exit": (["worker", "leaving:app"], 7),
}


@pytest.mark.parametrize("what", SAME)
def test_a_program_does_what_the_command_server_does(batchq: CommandLine, what: str) -> None:
    arguments, code = SAME[what]
    (batchq.directory / "failing.py").write_text("import nowhere")
    (batchq.directory / "crashing.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    (batchq.directory / "leaving.py").write_text("import os; os.write(2, os.environ['WORD'].encode()); os._exit(7)")
    program = batchq.run_program(*arguments, stdin=b"one\ntwo\n", WORD="left")
    forked = batchq(*arguments, stdin=b"one\ntwo\n", WORD="left")
    assert program == forked
    assert program.code == code


def test_the_version_is_told(nowhere: CommandLine) -> None:
    assert nowhere("--version").out == f"batchq {__version__}\n"


SAMPLES = {
    "dsn": "postgresql://host/db",
    "databases": "eu, us",
    "migration_dsn": "postgresql://host/db",
    "listen_dsn": "postgresql://host/db",
    "queues": "mail, default",
    "keep_completed": "no",
    "traces": "yes",
    "log_format": "JSON",
    "log_level": "Debug",
}


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name != "encryption_keys"])
def test_a_flag_sets_what_the_environment_sets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    value = SAMPLES.get(name, "7")
    command = ["migrate"] if name == "migration_dsn" else ["worker", "tasks:app"]
    by_flag = settings_of(make_parser().parse_args([*command, "--" + name.replace("_", "-"), value]))
    monkeypatch.setenv(f"BATCHQ_{name.upper()}", value)
    by_environment = settings_of(make_parser().parse_args(command))
    assert by_flag == by_environment
    assert getattr(by_flag, name) != Settings.model_fields[name].default


def test_keys_are_no_flag_because_a_list_of_processes_would_show_them(batchq: CommandLine) -> None:
    refused = batchq("worker", "tasks:app", "--encryption-keys", "a:secret")
    assert (refused.code, "unrecognized arguments: --encryption-keys" in refused.err) == (2, True)


def test_a_flag_goes_before_the_environment_and_that_before_the_file(batchq: CommandLine) -> None:
    (batchq.directory / ".env").write_text("BATCHQ_KEEP_FINISHED_DAYS=-3\nBATCHQ_LEASE_SECONDS=0\n")
    (batchq.directory / ".env").chmod(0o600)
    step("the file is read")
    assert "BATCHQ_LEASE_SECONDS" in batchq("worker", "tasks:app").complaint
    step("the environment goes before it")
    complaint = batchq("worker", "tasks:app", BATCHQ_LEASE_SECONDS="60").complaint
    assert "BATCHQ_KEEP_FINISHED_DAYS" in complaint
    assert "LEASE" not in complaint
    step("a flag goes before that")
    ended = batchq(
        "worker", "tasks:app", "--drain", "--keep-finished-days", "9", BATCHQ_LEASE_SECONDS="60",
        BATCHQ_KEEP_FINISHED_DAYS="0",
    )  # fmt: skip
    assert ended.code == 0, ended.err


def test_the_dsn_may_come_from_the_file(dsn: str, nowhere: CommandLine) -> None:
    assert "BATCHQ_DSN is not set" in nowhere("status").complaint
    (nowhere.directory / ".env").write_text(f'BATCHQ_DSN="{dsn}"\n')
    (nowhere.directory / ".env").chmod(0o600)
    assert nowhere("status").code == 0


# -------------------------------------------------------------------------------------------------- migrate, check


def test_migrate_creates_the_schema_and_then_has_nothing_to_do(empty_dsn: str, tmp_path: Path) -> None:
    batchq = CommandLine(empty_dsn, tmp_path)
    assert batchq("status").complaint == "the database has no batchq schema; run: batchq migrate"
    first = batchq("migrate")
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("applied 0001_batches, ")
    assert batchq("migrate").out == "the schema is up to date\n"
    assert batchq("status").code == 0


def test_migrate_takes_its_own_dsn(empty_dsn: str, tmp_path: Path) -> None:
    batchq = CommandLine(f"postgresql://me@127.0.0.1:{free_port()}/x", tmp_path)
    assert batchq("migrate", BATCHQ_MIGRATION_DSN=empty_dsn).out.startswith("applied ")
    assert batchq("migrate", "--migration-dsn", empty_dsn).out == "the schema is up to date\n"


def test_check_says_what_is_well_and_what_is_not(batchq: CommandLine, conn: psycopg.Connection) -> None:
    ended = batchq("check", "tasks:app")
    assert (ended.code, ended.err) == (0, "")
    assert "the server answers: PostgreSQL" in ended.out
    assert "the schema is at version" in ended.out

    step("nobody works what waits")
    put(conn, "good")
    put(conn, "unknown")
    ended = batchq("check", "tasks:app", "--json")
    assert ended.code == 1
    problems = [finding["finding"] for finding in ended.json if not finding["ok"]]
    assert problems == [
        "kind 'good' in queue 'default': 1 ready, but no live worker has a handler for the kind",
        "kind 'unknown' in queue 'default': the app has no handler for it",
    ]
    assert batchq("check", "tasks:nothing").complaint == "'tasks' has no 'nothing'; its apps: app"


# -------------------------------------------------------------------------------------------------- enqueue


def test_enqueue_inserts_a_batch_with_its_options(batchq: CommandLine, conn: psycopg.Connection) -> None:
    options = "--queue mail --priority -5 --delay-seconds 60 --max-attempts 2 --max-failed-items 3 --timeout-seconds 9"
    ended = batchq("enqueue", "good", "--payload", '{"to": "ü"}', "--json", *options.split(), "--unique-key", "k")
    assert (ended.code, ended.err) == (0, "")
    row = look(conn, ended.json["id"])
    assert (row.kind, row.queue, row.payload, row.unique_key) == ("good", "mail", {"to": "ü"}, "k")
    assert (row.priority, row.max_attempts, row.max_failed_items, row.timeout_seconds) == (-5, 2, 3, 9)
    assert 30 < row.wait_seconds <= 60

    step("a second one with the key is none")
    assert batchq("enqueue", "good", "--queue", "mail", "--unique-key", "k", "--json").json == {"id": None}
    ended = batchq("enqueue", "good", "--queue", "mail", "--unique-key", "k")
    assert ended.out == "nothing enqueued: a batch with unique key 'k' is waiting, pending or processing\n"
    assert (
        batchq("enqueue", "good").out == f"enqueued batch {values(conn, 'SELECT max(id) FROM batchq.all_batches')[0]}\n"
    )


ITEMS = '{"n": 1}\n\n"two"\n3\n'
LINES = 'plain\n{"n": 1}\r\n\nlast, without its end'


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_enqueue_takes_a_file_of_items(batchq: CommandLine, conn: psycopg.Connection, source: str) -> None:
    (batchq.directory / "items.jsonl").write_text(ITEMS)
    name = "items.jsonl" if source == "file" else "-"
    ended = batchq("enqueue", "items", "--items", name, "--items-per-batch", "2", "--payload", "[1]", stdin=ITEMS)
    assert (ended.code, ended.out, ended.err) == (0, "enqueued 2 batches of items\n", "")
    assert values(conn, "SELECT items FROM batchq.all_batches ORDER BY id") == [[{"n": 1}, "two"], [3]]
    assert values(conn, "SELECT payload FROM batchq.all_batches") == [[1], [1]]


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_enqueue_takes_lines_of_text(batchq: CommandLine, conn: psycopg.Connection, source: str) -> None:
    (batchq.directory / "lines.txt").write_bytes(LINES.encode())
    name = "lines.txt" if source == "file" else "-"
    assert batchq("enqueue", "items", "--lines", name, "--json", stdin=LINES).json == {"batches": 1}
    assert values(conn, "SELECT items FROM batchq.all_batches") == [["plain", '{"n": 1}', "last, without its end"]]


@pytest.mark.parametrize("source", ["file", "stdin"])
@pytest.mark.parametrize("form", ["--items", "--lines"])
def test_a_byte_order_mark_is_not_part_of_the_first_item(
    batchq: CommandLine, conn: psycopg.Connection, source: str, form: str
) -> None:
    text = '"éxample.com"\r\n"example.org"\r\n' if form == "--items" else "éxample.com\r\nexample.org\r\n"
    (batchq.directory / "marked.txt").write_bytes(text.encode("utf-8-sig"))
    name = "marked.txt" if source == "file" else "-"
    assert batchq("enqueue", "items", form, name, stdin=text.encode("utf-8-sig")).code == 0
    assert values(conn, "SELECT items FROM batchq.all_batches") == [["éxample.com", "example.org"]]


def test_a_file_in_utf_16_is_refused_by_name(batchq: CommandLine, conn: psycopg.Connection) -> None:
    (batchq.directory / "wide.txt").write_bytes("example.com\n".encode("utf-16"))
    ended = batchq("enqueue", "items", "--lines", "wide.txt")
    assert (ended.code, "wide.txt is not UTF-8" in ended.err) == (2, True)
    assert values(conn, "SELECT id FROM batchq.all_batches") == []


def test_an_output_that_knows_only_ascii_is_no_error(batchq: CommandLine, conn: psycopg.Connection) -> None:
    assert batchq("enqueue", "grüße 💥", "--items", "-", stdin='"ä"\n').code == 0
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    for command in (("status",), ("show", "1"), ("logs", "1"), ("doctor",), ("status", "--json")):
        ended = batchq.run_program(*command, **ascii_only)
        assert "Traceback" not in ended.err, command
        assert "gr" in ended.out or command[0] in ("logs", "doctor"), command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["good", "--payload", "{"], "--payload is not valid JSON: "),
        (["good", "--payload", "NaN"], "the payload cannot be stored as JSON"),
        (["good", "--items", "nowhere.jsonl"], "cannot read nowhere.jsonl: No such file or directory"),
        (["good", "--items", "."], "cannot read .: Is a directory"),
        (["good", "--items", "bad.jsonl"], "bad.jsonl, line 3: not valid JSON ("),
        (["good", "--lines", "latin.txt"], "latin.txt is not UTF-8 ("),
        (["good", "--items", "good.jsonl", "--unique-key", "k"], "--unique-key is for one batch"),
    ],
)
def test_enqueue_refuses_in_one_line_and_inserts_nothing(
    batchq: CommandLine, conn: psycopg.Connection, arguments: list[str], said: str
) -> None:
    (batchq.directory / "good.jsonl").write_text("1\n2\n")
    (batchq.directory / "bad.jsonl").write_text("1\n\n{bad\n")
    (batchq.directory / "latin.txt").write_bytes(b"caf\xe9\n")
    ended = batchq("enqueue", *arguments)
    assert said in ended.complaint
    assert ended.code == 2
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


# -------------------------------------------------------------------------------------------------- status, show


def test_status_shows_queues_workers_and_batches(batchq: CommandLine, conn: psycopg.Connection) -> None:
    assert "no batches yet" in batchq("status").out
    mail = put(conn, "good", queue="mail")
    later = put(conn, "items", items=[1, 2, 3], delay_seconds=60)

    shown = batchq("status")
    assert (shown.code, shown.err) == (0, "")
    assert "none has a handler" in shown.out
    assert "no workers seen in the last hour" in shown.out
    assert "0 of 3" in shown.out

    as_json = batchq("status", "--json").json
    assert [(row["queue"], row["kind"], row["ready"], row["scheduled"]) for row in as_json["queues"]] == [
        ("default", "items", 0, 1),
        ("mail", "good", 1, 0),
    ]
    assert [row["id"] for row in as_json["batches"]] == [later, mail]

    def ids(*flags: str) -> list[int]:
        return [row["id"] for row in batchq("status", "--json", *flags).json["batches"]]

    assert ids("--queue", "mail") == [mail]
    assert ids("--kind", "items") == [later]
    assert ids("--status", "scheduled") == [later]
    assert ids("--limit", "1") == [later]


def test_show_tells_all_about_a_batch(batchq: CommandLine, conn: psycopg.Connection) -> None:
    batch_id = put(conn, "items", {"a": 1}, items=["good", "bad"], max_attempts=1)
    assert batchq("worker", "tasks:app", "--drain").code == 0

    ended = batchq("show", str(batch_id))
    assert (ended.code, ended.err) == (0, "")
    for text in ("failed", '{"a": 1}', "ValueError: bad item", "1 of 2 items failed"):
        assert text in ended.out
    shown = batchq("show", str(batch_id), "--json").json
    assert (shown["id"], shown["status"], shown["payload"], shown["items_done"]) == (batch_id, "failed", {"a": 1}, 1)
    assert [(item["item_index"], item["error"]) for item in shown["failed_items"]] == [(1, "ValueError: bad item")]

    assert batchq("show", str(batch_id), "--json", "--limit", "0").json["failed_items"] == []
    assert batchq("show", "999999").complaint == "there is no batch 999999"


# -------------------------------------------------------------------------------------------------- verbs


def test_cancel_and_retry_say_what_they_changed(batchq: CommandLine, conn: psycopg.Connection) -> None:
    first, second = put(conn, "good"), put(conn, "good")
    ended = batchq("cancel", str(first), "999", "--reason", "not needed")
    assert (ended.code, ended.out) == (1, "1 batch cancelled; there is no batch 999\n")
    assert look(conn, first).errors[0]["error"] == "cancelled: not needed"

    assert batchq("retry", str(first), "--json").json == {str(first): "pending"}
    assert batchq("worker", "tasks:app", "--drain").code == 0
    assert {look(conn, batch_id).status for batch_id in (first, second)} == {"completed"}

    step("nothing is left to retry in a completed batch, but the whole")
    ended = batchq("retry", str(first), str(second), "--json")
    assert ended.code == 1
    assert f"batch {first} is completed: nothing in it is left to retry" in ended.json[str(first)]
    assert "whole => true" in ended.json[str(first)]
    assert batchq("retry", str(first)).out == (
        f"batch {first} is completed: nothing in it is left to retry; "
        f"to run it again from the start: batchq retry --whole {first}\n"
    )
    ended = batchq("cancel", str(first))
    assert (ended.code, ended.out) == (1, f"nothing was changed: batch {first} had completed already\n")
    assert batchq("retry", str(first), "--whole").code == 0
    assert look(conn, first).shown == "ready"


def test_retry_says_when_another_batch_has_the_key(batchq: CommandLine, conn: psycopg.Connection) -> None:
    first = put(conn, "good", unique_key="k")
    conn.execute("SELECT batchq.cancel(%s)", [first])
    put(conn, "good", unique_key="k")
    ended = batchq("retry", str(first))
    assert ended.code == 1
    assert 'another batch of kind "good" with unique_key "k" is pending or processing' in ended.out


def test_prune_drops_old_days(batchq: CommandLine, conn: psycopg.Connection) -> None:
    conn.execute(f"SELECT batchq.create_finished_partitions({TODAY} - 40, 3)")
    assert batchq("prune").out == "dropped 3 daily partitions\n"
    conn.execute(f"SELECT batchq.create_finished_partitions({TODAY} - 8, 2)")
    assert batchq("prune", "--json").json == {"dropped_partitions": 0}
    assert batchq("prune", "--json", "--older-than-days", "7").json == {"dropped_partitions": 1}
    assert batchq("prune", "--json", BATCHQ_KEEP_FINISHED_DAYS="1").json == {"dropped_partitions": 1}
    for days in ("-1", "nan", "1e9"):
        assert "--older-than-days must be 0 or more" in batchq("prune", f"--older-than-days={days}").complaint


# -------------------------------------------------------------------------------------------------- monitor


@pytest.mark.parametrize("as_json", [False, True], ids=["for people", "json"])
def test_monitor_exits_when_a_batch_fails(batchq: CommandLine, conn: psycopg.Connection, as_json: bool) -> None:
    good, bad = put(conn, "good", delay_seconds=3600), put(conn, "bad", max_attempts=1, delay_seconds=3600)
    flags = ["--every-seconds", "0.05", "--exit-on", "failed, stalled", *(["--json"] if as_json else [])]
    with batchq.start("monitor", *flags) as monitor:
        step("new batches are shown as soon as it watches")
        while not select.select([monitor.stdout], [], [], 0.1)[0]:
            put(conn, "good", delay_seconds=3600)
        conn.execute("UPDATE batchq.batches SET run_at = now() WHERE id = ANY (%s)", [[good, bad]])
        assert batchq("worker", "tasks:app", "--drain").code == 0
        out, err = monitor.communicate(timeout=20)
    assert (monitor.returncode, err) == (1, "")
    if as_json:
        rows = [json.loads(line) for line in out.splitlines()]
        assert (bad, "failed") in [(row["id"], row["status"]) for row in rows]
    else:
        assert f"batch {bad}  default/bad  failed  attempt 1/1  ValueError: bad batch\n" in out


def test_monitor_until_done_ends_when_nothing_waits_or_runs(batchq: CommandLine, conn: psycopg.Connection) -> None:
    assert batchq("monitor", "--until-done").code == 0
    put(conn, "good", queue="other", delay_seconds=3600)
    assert batchq("monitor", "--until-done", "--queue", "default").code == 0

    put(conn, "good", queue="mail", delay_seconds=3600)
    with batchq.start("monitor", "--until-done", "--queue", "mail", "--every-seconds", "0.05") as monitor:
        assert batchq("status").code == 0
        assert monitor.poll() is None
        conn.execute("UPDATE batchq.batches SET run_at = now() WHERE queue = 'mail'")
        assert batchq("worker", "tasks:app", "--drain", "--queues", "mail").code == 0
        monitor.communicate(timeout=20)
    assert monitor.returncode == 0


def test_monitor_refuses_a_state_that_it_cannot_exit_on(batchq: CommandLine) -> None:
    assert batchq("monitor", "--exit-on", "bored,failed").complaint == (
        "--exit-on takes failed, stalled, cancelled or retrying, not bored"
    )


# -------------------------------------------------------------------------------------------------- workers


def test_worker_drains_and_exits(batchq: CommandLine, conn: psycopg.Connection) -> None:
    ids = [put(conn, "good") for _ in range(20)]
    failing = put(conn, "items", items=["good", "bad", "good"], max_attempts=1)
    ended = batchq("worker", "tasks:app", "--drain", "--log-format", "json")
    assert ended.code == 0
    assert ended.out == ""
    assert {look(conn, batch_id).status for batch_id in ids} == {"completed"}
    assert [item.item for item in failed_items(conn, failing)] == ["bad"]
    last = json.loads(ended.err.splitlines()[-1])
    assert (last["event"], last["completed"], last["failed"]) == ("worker stopped", 20, 1)
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]


def test_worker_serves_the_queues_named(batchq: CommandLine, conn: psycopg.Connection) -> None:
    ids = {queue: put(conn, "good", queue=queue) for queue in ("default", "mail", "slow")}
    assert batchq("worker", "tasks:app", "--drain", "--queues", "mail, slow").code == 0
    assert {queue: look(conn, batch_id).status for queue, batch_id in ids.items()} == {
        "default": "pending",
        "mail": "completed",
        "slow": "completed",
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_worker_stops_at_a_signal_with_exit_code_0(
    batchq: CommandLine, conn: psycopg.Connection, number: signal.Signals
) -> None:
    with batchq.start("worker", "tasks:app") as worker:
        wait_until(lambda: values(conn, "SELECT count(*) FROM batchq.workers") == [1], 20, "the worker's row")
        worker.send_signal(number)
        _, err = worker.communicate(timeout=20)
    assert worker.returncode == 0, err
    assert "worker stopped" in err
    assert "Traceback" not in err
    assert values(conn, "SELECT count(*) FROM batchq.workers") == [0]


def test_workers_drain_together_and_exit(batchq: CommandLine, conn: psycopg.Connection) -> None:
    for _ in range(50):
        put(conn, "good")
    ended = batchq("workers", "2", "tasks:app", "--drain", "--log-format", "json")
    assert ended.code == 0, ended.err
    started = {json.loads(line)["worker"] for line in ended.err.splitlines() if "worker started" in line}
    assert len(started) == 2
    assert values(conn, "SELECT DISTINCT status FROM batchq.all_batches") == ["completed"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["worker", "tasks"], "name the app as MODULE:APP"),
        (["worker", "no_such_module:app"], "cannot import 'no_such_module'"),
        (["workers", "0", "tasks:app"], "the number of processes must be 1 or more, not 0"),
        (["workers", "2", "tasks:nothing"], "'tasks' has no 'nothing'"),
        (["worker", "tasks:app", "--concurrency", "many"], "BATCHQ_CONCURRENCY: Input should be a valid integer"),
        (["worker", "tasks:app", "--queues", ","], "BATCHQ_QUEUES: needs at least one queue"),
        (["worker", "tasks:app", "--lease-seconds", "nan"], "BATCHQ_LEASE_SECONDS"),
    ],
)
def test_workers_refuse_a_mistake_in_one_line(batchq: CommandLine, arguments: list[str], said: str) -> None:
    ended = batchq(*arguments)
    assert said in ended.complaint
    assert ended.code == 2


if __name__ == "__main__":
    run_alone(__file__)
