"""Several databases on the command line: status, top, doctor, workers; and how they are named."""

import json
import os
import re
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

import batchq
from batchq.cli import make_parser
from batchq.cli.commands.worker import environments
from batchq.cli.connections import one_or_several
from batchq.common.secrets import hide_password
from batchq.errors import ConfigError
from batchq.operate.watch import Watch, in_parallel, why
from batchq.postgres.connections import connect
from batchq.postgres.databases import Database, databases_of
from batchq.postgres.logins import LoginBackoffs
from batchq.postgres.statements.totals import totals
from batchq.worker.supervisor import Supervisor
from tests.component.rows import finished, insert, processing
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.databases import Databases
from tests.support.processes import ROOT, Processes
from tests.support.several import PASSWORD, away_dsn, deaf_dsn, settings, variables, wait_until_done
from tests.support.steps import step
from tests.support.through import Way
from tests.support.waiting import wait_until

Conn = psycopg.Connection
APP = "tests.support.several:app"


@pytest.fixture
def other_dsn(databases: Databases, way: Way) -> Iterator[str]:
    """Return the DSN of a second database."""
    with databases.migrated() as name, way(name) as dsn:
        yield dsn


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    """Return the command line, with no database set."""
    return CommandLine(None, tmp_path)


# ----------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (",", "needs at least one name"),
        ("eu,eu", "two databases have the name 'eu'"),
        ("eu-1,eu_1", "two databases have the name 'eu-1' (- and _ count as the same)"),
        ("EU", "'EU' cannot be one: the name of a database is"),
        ("../x", "the name of a database is"),
        (
            "eu,gone",
            "BATCHQ_DSN_GONE is not set; set it to the DSN of the database 'gone' "
            "(set are: BATCHQ_DSN_BAD, BATCHQ_DSN_EU, BATCHQ_DSN_ODD, BATCHQ_DSN_SAME)",
        ),
        ("eu,same", "BATCHQ_DSN_EU and BATCHQ_DSN_SAME are the same"),
        ("eu,bad", "BATCHQ_DSN_BAD: not a Postgres DSN"),
        ("eu,odd", "BATCHQ_DSN_ODD: options= does not survive a pooler"),
    ],
)
def test_a_list_that_cannot_be_is_refused_by_name(command: CommandLine, names: str, complaint: str) -> None:
    dsn = f"host=127.0.0.1 password={PASSWORD}"
    given = {"EU": dsn, "SAME": dsn, "BAD": f"what {PASSWORD}", "ODD": f"{dsn} options=-cjit=off"}
    found = command("status", BATCHQ_DATABASES=names, **{f"BATCHQ_DSN_{name}": text for name, text in given.items()})
    assert found.code == 2
    assert complaint in found.complaint
    assert PASSWORD not in found.err


def test_a_dsn_in_place_of_a_name_is_not_shown(command: CommandLine) -> None:
    found = command("status", BATCHQ_DATABASES=f"host=db user=ann password={PASSWORD}")
    assert "the name of a database is" in found.complaint
    assert PASSWORD not in found.err


def test_the_password_of_each_database_is_hidden_from_the_first_line_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DSN", "LISTEN_DSN", "MIGRATION_DSN"):
        monkeypatch.setenv(f"BATCHQ_{name}_HIDDEN", f"host=db user=ann password=canary-of-{name}")
    databases_of(["hidden"])
    assert "canary" not in hide_password("canary-of-DSN canary-of-LISTEN_DSN canary-of-MIGRATION_DSN")


def test_a_command_for_one_database_asks_which_one(command: CommandLine, dsn: str, other_dsn: str) -> None:
    given = variables(eu=dsn, us=other_dsn)
    for name in ("keys", "distribute"):
        assert "this works on one database, and BATCHQ_DATABASES names 2 (eu, us)" in command(name, **given).complaint
    step("--database chooses; so does BATCHQ_DSN, and --dsn precedes the list")
    assert command("enqueue", "good", "--database", "us", **given).code == 0
    assert command("enqueue", "good", BATCHQ_DSN=other_dsn, **given).code == 0
    with psycopg.connect(dsn) as one, psycopg.connect(other_dsn) as other:
        assert totals(one)["ready"] == 0
        assert totals(other)["ready"] == 2
    assert command("distribute", "--dry-run", "--without-citus", "--database", "us", **given).code == 0
    assert "databases" not in command("status", "--json", "--dsn", other_dsn, **given).json
    complaint = command("status", "--dsn", dsn, "--database", "eu", **given).complaint
    assert "give one of the two" in complaint
    assert "needs at least one name" in command("status", "--database", "", **given).complaint


def test_a_list_of_one_is_as_one_dsn(command: CommandLine, conn: Conn, dsn: str) -> None:
    insert(conn, kind="good")
    for arguments in (("status",), ("top",), ("doctor", "--json")):
        alone, listed = command(*arguments, BATCHQ_DSN=dsn), command(*arguments, **variables(eu=dsn))
        assert (listed.code, listed.out.splitlines()[0]) == (alone.code, alone.out.splitlines()[0])
        assert "eu" not in listed.out.split(), arguments


def test_each_database_has_a_migration_dsn_of_its_own(
    command: CommandLine, empty_dsn: str, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"BATCHQ_DATABASES": "new,old", "BATCHQ_DSN_NEW": away_dsn(), "BATCHQ_DSN_OLD": dsn}
    given |= {"BATCHQ_MIGRATION_DSN_NEW": empty_dsn, "BATCHQ_MIGRATION_DSN": away_dsn()}
    assert command("migrate", "--database", "new", **given).code == 0
    with psycopg.connect(empty_dsn) as conn:
        assert totals(conn)["ready"] == 0
    step("the names and DSNs may also be in .env")
    monkeypatch.setenv("BATCHQ_ENV_FILE", str(command.directory / "settings"))
    (command.directory / "settings").write_text(f"BATCHQ_DSN_FROM_FILE='{dsn}'\n")
    assert databases_of(["from-file"]) == [Database("from-file", dsn)]


# ---------------------------------------------------------------------------------------------------------- status


def test_status_shows_every_database_and_exits_with_1_if_one_is_away(
    command: CommandLine, conn: Conn, dsn: str, other_dsn: str
) -> None:
    processing(conn, kind="good")
    insert(conn, kind="good")
    with psycopg.connect(other_dsn, autocommit=True) as other:
        finished(other, "failed", kind="bad")
    given = variables(eu=dsn, us=other_dsn)
    found = command("status", **given)
    assert found.code == 0
    eu = next(line for line in found.out.splitlines() if line.startswith("eu"))
    us = next(line for line in found.out.splitlines() if line.startswith("us"))
    assert eu.split()[:6] == ["eu", "up", "1", "0", "1", "0"]
    assert us.split()[:7] == ["us", "up", "0", "0", "0", "0", "1"]
    assert "Database eu" in found.out
    step("one away: its row says how long and why, the others are as before, and no password is shown")
    away = command("status", **(given | variables(eu=dsn, us=away_dsn())))
    assert away.code == 1
    assert re.search("us: away(| for [0-9.]+ s): connection refused", away.out)
    assert "Database eu" in away.out
    assert "Database us" not in away.out
    assert PASSWORD not in away.out + away.err
    step("as JSON")
    listed = command("status", "--json", **variables(eu=dsn, us=away_dsn()))
    assert listed.code == 1
    eu_json, us_json = listed.json["databases"]
    assert (eu_json["database"], eu_json["state"], eu_json["totals"]["ready"]) == ("eu", "up", 1)
    assert [row["kind"] for row in eu_json["queues"]] == ["good"]
    assert us_json.keys() == {"database", "state", "away", "away_seconds"}
    assert (us_json["state"], us_json["away"]) == ("away", "connection refused")


def test_top_in_a_pipe_shows_every_database(command: CommandLine, conn: Conn, dsn: str) -> None:
    running = processing(conn, kind="good").id
    given = variables(eu=dsn, us=away_dsn())
    found = command("top", **given)
    assert found.code == 1
    assert "us: away" in found.out
    assert str(running) in found.out.partition("Latest batches")[2]
    listed = command("top", "--json", **given).json["databases"]
    assert [row["id"] for row in listed[0]["running"]] == [running]
    assert listed[1]["state"] == "away"


def test_doctor_names_the_database_of_each_finding_and_exits_with_the_worst(
    command: CommandLine, dsn: str, other_dsn: str, empty_dsn: str
) -> None:
    both = command("doctor", "--json", **variables(eu=dsn, us=other_dsn))
    names = [row["database"] for row in both.json]
    assert names == sorted(names)
    assert set(names) == {"eu", "us"}
    one = command("doctor", "--json", BATCHQ_DSN=dsn)
    assert [row["check"] for row in both.json if row["database"] == "eu"] == [row["check"] for row in one.json]
    step("one without the schema, one away: critical")
    assert command("doctor", **variables(eu=dsn, us=empty_dsn)).code == 2
    away = command("doctor", **variables(eu=dsn, us=away_dsn()))
    assert away.code == 2
    critical = [line for line in away.out.splitlines() if line.startswith("critical")]
    assert len(critical) == 1
    assert critical[0].split()[1:3] == ["us:", "connection:"]
    assert critical[0].endswith("or correct BATCHQ_DSN_US")
    assert PASSWORD not in away.out + away.err


# ------------------------------------------------------------------------------------------------------- the watch


def test_a_watch_that_is_closed_does_not_connect_again(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as conn:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

        def count() -> int:
            return int(conn.execute(others).fetchone()[0])  # type: ignore[index]

        watch = Watch([Database("eu", dsn)], lambda one: one.execute("SELECT pg_sleep(0.7)"))
        watch.read(0.2)
        wait_until(lambda: count() == 1, 5, "a read to be under way")
        watch.close()
        wait_until(lambda: count() == 0, 5, "it to end, and to close its connection")
        watch.read(0.2)
        assert count() == 0
        watch.allow()
        watch.read(0.2)
        wait_until(lambda: count() == 1, 5, "it to read again")
        watch.close()
        wait_until(lambda: count() == 0, 5, "the connection to be closed")


def test_a_database_that_never_answers_delays_nobody(dsn: str) -> None:
    with deaf_dsn() as deaf, closing(Watch([Database("eu", dsn), Database("us", deaf)], totals, 0.5)) as watch:
        first = watch.read(10)
        assert [state.name for state in first if state.away] == ["us"]
        assert first[1].away
        assert "no answer" in first[1].away.why
        step("known to be away: the others are read without waiting for it")
        began_at = time.monotonic()
        states = watch.read(10)
        assert time.monotonic() - began_at < 1
        assert states[0].away is None
        assert states[1].away
        assert states[1].away.since == first[1].away.since


def test_a_database_that_does_not_answer_is_read_by_one_thread_however_often_it_is_asked(dsn: str) -> None:
    with deaf_dsn() as deaf, closing(Watch([Database("eu", dsn), Database("deaf", deaf)], totals, 2)) as watch:
        for _ in range(5):
            watch.read(0.05)
        assert [thread.name for thread in threading.enumerate()].count("batchq-watch-deaf") == 1


def test_a_read_in_parallel_that_fails_or_never_ends_leaves_the_others(dsn: str) -> None:
    def fail() -> None:
        raise ConfigError("no")

    with deaf_dsn() as deaf:
        found = in_parallel({"eu": lambda: 1, "us": lambda: connect(deaf), "asia": fail}, 0.5)
    assert found["eu"] == 1
    assert isinstance(found["us"], TimeoutError)
    assert isinstance(found["asia"], ConfigError)


def test_the_words_for_a_database_that_is_away_name_no_host_and_no_user(admin_dsn: str, empty_dsn: str) -> None:
    found: dict[str, str] = {}
    for name, each in {
        "host": "host=db.secret.invalid user=ann", "socket": "host=/secret user=ann",
        "database": psycopg.conninfo.make_conninfo(admin_dsn, dbname="secret"), "schema": empty_dsn,
    }.items():  # fmt: skip
        with closing(Watch([Database("x", each)], totals)) as watch:
            state = watch.read(10)[0]
            assert state.away
            found[name] = state.away.why
    assert found["host"] == "unknown host name"
    assert found["socket"] == "no server at its socket"
    assert found["database"] == "the login was rejected, or there is no such database"
    assert found["schema"] == "batchq's schema is missing, or of another version; run: batchq migrate --database x"
    assert why(psycopg.OperationalError(f"what {PASSWORD}")) == "the connection was lost"
    assert why(KeyError(PASSWORD)) == "an error"


def test_a_rejected_login_delays_no_login_to_another_database() -> None:
    backoffs = LoginBackoffs()
    with pytest.raises(psycopg.OperationalError, match="password authentication"), backoffs.of("one").log_in(False):
        raise psycopg.OperationalError("password authentication failed")
    with pytest.raises(psycopg.OperationalError, match="login was rejected"):
        backoffs.of("one").check()
    backoffs.of("other").check()


# --------------------------------------------------------------------------------------------------------- workers


def test_workers_serve_every_database_and_wait_for_one_that_is_away(dsn: str, other_dsn: str) -> None:
    with Processes(dsn, APP) as processes:
        supervisor = processes.run("workers", "1", APP, **settings(a=dsn, b=other_dsn, c=away_dsn()))
        away = supervisor.wait_for("database away, its workers start when it is back", database="c")
        assert PASSWORD not in json.dumps(away)
        for each in (dsn, other_dsn):
            with psycopg.connect(each, autocommit=True) as conn:
                wait_until(lambda conn=conn: totals(conn)["workers"] == 1, 30, "a worker of each database")
                wait_until_done(conn, batchq.enqueue(conn, "noop"))
        supervisor.wait_for("worker process exited", database="c")
        assert PASSWORD not in supervisor.text()
        supervisor.stop()


def test_what_is_wrong_with_one_database_ends_the_workers_of_no_other() -> None:
    several, single = Supervisor(1, [], {}, False, 1, {"eu": {}, "us": {}}), Supervisor(1, [], {}, False, 1)
    for supervisor in (several, single):
        supervisor._children[0].pings_fd = os.open(os.devnull, os.O_RDONLY)
        supervisor._children[0].started_at = time.monotonic()
        supervisor._exited(supervisor._children[0], 2)
    assert [child.is_done for child in several._children] == [False, False]
    assert not several._stopping.is_set()
    assert single._stopping.is_set()


def test_the_workers_of_a_database_get_the_dsns_of_no_other() -> None:
    eu, us = Database("eu", "host=eu", "host=eu port=5432"), Database("us", "host=us")
    common, each = environments(batchq.Settings.load(dsn="host=other", metrics_port=9400), [eu, us])
    assert common == {"BATCHQ_METRICS_PORT": "9400"}
    assert each == {
        "eu": {"BATCHQ_DATABASES": "", "BATCHQ_DSN": "host=eu", "BATCHQ_LISTEN_DSN": "host=eu port=5432"},
        "us": {"BATCHQ_DATABASES": "", "BATCHQ_DSN": "host=us"},
    }


def test_workers_refuse_a_database_that_cannot_work_by_its_name(command: CommandLine, dsn: str, empty_dsn: str) -> None:
    given = variables(eu=dsn, us=empty_dsn)
    assert command("workers", "1", "tasks:app", **given).complaint.startswith("database us: ")
    complaint = command("workers", "1", "tasks:app", BATCHQ_LISTEN_DSN=dsn, **given).complaint
    assert "such as BATCHQ_LISTEN_DSN_EU" in complaint


# ------------------------------------------------------------------------------------------------------------ docs


def test_the_commands_and_variables_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "databases.md").read_text(encoding="utf-8")
    block = text.partition("```bash\n")[2].partition("```")[0]
    variables = dict(line.removeprefix("export ").split("=", 1) for line in block.splitlines() if "export" in line)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    commands = re.findall(r"^batchq [^#\n]+", block, re.MULTILINE) + re.findall(
        r"`(batchq [^`]*--database[^`]*)`", text
    )
    assert len(commands) == 7
    for command in commands:
        options = make_parser().parse_args(shlex.split(command)[1:])
        settings, databases = one_or_several(options)
        if "--database" in command:
            assert settings.require_dsn() == variables["BATCHQ_DSN_EU"], command
        else:
            assert [each.name for each in databases] == ["eu", "us"], command


if __name__ == "__main__":
    run_alone(__file__)
