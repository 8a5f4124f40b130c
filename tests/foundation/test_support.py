"""The laws that the tests' own infrastructure keeps: a check that cannot fail proves nothing."""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Thread

import psycopg
import pytest

from tests.run_all_tests import ROOT, report
from tests.support import programs
from tests.support.alone import run_alone
from tests.support.databases import Databases
from tests.support.plan import ALONE, Plan
from tests.support.poolers import PgBouncer
from tests.support.pytest_runs import Outcome, Runner, problem_of, read_results
from tests.support.servers import Server
from tests.support.steps import step
from tests.support.supasim import SupaSim
from tests.support.through import WAYS
from tests.support.waiting import wait_until

Connect = Callable[..., psycopg.Connection]
BACKEND_PID = "SELECT pg_backend_pid()"


def connect(dsn: str, **options: object) -> psycopg.Connection:
    """Connect as batchq does."""
    return psycopg.connect(dsn, **{"autocommit": True, "prepare_threshold": None} | options)


def value(conn: psycopg.Connection, query: str) -> object:
    """Return the one value of *query*."""
    row = conn.execute(query).fetchone()
    assert row
    return row[0]


# Databases and the server


def test_each_test_has_a_database_of_its_own(databases: Databases, server: Server) -> None:
    with databases.empty() as first, databases.empty() as second:
        step("create a table in %s, look for it in %s", first, second)
        with connect(server.dsn(first)) as conn:
            conn.execute("CREATE TABLE only_here ()")
        with connect(server.dsn(second)) as conn:
            assert value(conn, "SELECT to_regclass('only_here')") is None


def test_databases_of_finished_tests_are_dropped(server: Server) -> None:
    databases = Databases(server)
    with databases.empty() as name:
        pass
    databases.close()
    with connect(server.admin_dsn) as conn:
        assert value(conn, f"SELECT count(*) FROM pg_database WHERE datname = '{name}'") == 0


def test_a_crash_of_the_server_keeps_what_was_committed(
    empty_database: str, server: Server, crash_server: Callable[[], None]
) -> None:
    with connect(server.dsn(empty_database)) as conn:
        conn.execute("CREATE TABLE kept AS SELECT 1 AS one")
        step("crash the server under an open connection")
        crash_server()
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
    with connect(server.dsn(empty_database)) as conn:
        assert value(conn, "SELECT one FROM kept") == 1


@pytest.mark.parametrize(("patience", "seconds"), [(1.0, "0.02"), (3.0, "0.06")])
def test_waiting_ends_with_what_was_waited_for(monkeypatch: pytest.MonkeyPatch, patience: float, seconds: str) -> None:
    monkeypatch.setattr("tests.support.waiting.PATIENCE", patience)
    began_at = time.monotonic()
    with pytest.raises(TimeoutError, match=f"waited {seconds} s for the moon; last seen: 0"):
        wait_until(lambda: 0, 0.02, "the moon")
    assert time.monotonic() - began_at >= float(seconds)


# PgBouncer


@pytest.fixture(params=[False, True], ids=["config-a", "config-b"])
def bouncer(request: pytest.FixtureRequest, server: Server, empty_database: str) -> Iterator[PgBouncer]:
    with PgBouncer(server, reset_always=request.param) as bouncer:
        bouncer.warm_up(empty_database)
        yield bouncer


@pytest.fixture
def pgbouncer_a(server: Server, empty_database: str) -> Iterator[PgBouncer]:
    with PgBouncer(server) as bouncer:
        bouncer.warm_up(empty_database)
        yield bouncer


def test_transactions_through_pgbouncer_change_between_two_backends(bouncer: PgBouncer, empty_database: str) -> None:
    with connect(bouncer.dsn(empty_database)) as conn:
        pids = [value(conn, BACKEND_PID) for _ in range(10)]
    assert len(set(pids)) == 2
    # In B a backend comes back only when it is reset; until then, longer on a busy machine, the other serves.
    changes = sum(one != other for one, other in pairwise(pids))
    assert changes >= (1 if bouncer.settings["server_reset_query_always"] else 5)


@pytest.mark.parametrize(("reset_always", "seen"), [(False, "777ms"), (True, "0")])
def test_what_a_session_sets_leaks_with_config_a_and_vanishes_with_b(
    server: Server, empty_database: str, reset_always: bool, seen: str
) -> None:
    with PgBouncer(server, reset_always=reset_always) as bouncer:
        bouncer.warm_up(empty_database)
        with connect(bouncer.dsn(empty_database)) as conn:
            conn.execute("SET statement_timeout = 777")
            assert seen in {value(conn, "SHOW statement_timeout") for _ in range(2)}


def test_a_start_up_option_is_refused_by_pgbouncer(bouncer: PgBouncer, empty_database: str) -> None:
    with pytest.raises(psycopg.OperationalError, match="unsupported startup parameter"):
        connect(bouncer.dsn(empty_database), options="-c statement_timeout=1s")


def test_a_backend_that_a_client_holds_is_noticed(pgbouncer_a: PgBouncer, empty_database: str) -> None:
    with connect(pgbouncer_a.dsn(empty_database)) as conn:
        with conn.transaction():
            conn.execute("SELECT 1")
            assert pgbouncer_a.sv_active(empty_database) == 1
            with pytest.raises(TimeoutError, match="idle backends"):
                pgbouncer_a.check_settled(empty_database)
        pgbouncer_a.check_settled(empty_database)


def test_a_prepared_statement_left_on_a_backend_is_noticed(pgbouncer_a: PgBouncer, empty_database: str) -> None:
    with connect(pgbouncer_a.dsn(empty_database)) as conn:
        conn.execute("PREPARE left_behind AS SELECT 1")
    with pytest.raises(AssertionError, match="prepared statements"):
        pgbouncer_a.check_settled(empty_database)


def test_a_killed_pgbouncer_starts_again_on_its_port(pgbouncer_a: PgBouncer, empty_database: str) -> None:
    with connect(pgbouncer_a.dsn(empty_database)) as conn:
        pgbouncer_a.kill()
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
    pgbouncer_a.start()
    with connect(pgbouncer_a.dsn(empty_database)) as conn:
        assert value(conn, "SELECT 1") == 1


def test_a_frozen_or_paused_pgbouncer_answers_when_it_goes_on(pgbouncer_a: PgBouncer, empty_database: str) -> None:
    for stop, go_on in [
        (pgbouncer_a.freeze, pgbouncer_a.thaw),
        (lambda: pgbouncer_a.pause(empty_database), lambda: pgbouncer_a.resume(empty_database)),
    ]:
        stop()
        with connect_later(pgbouncer_a.dsn(empty_database)) as waiting:
            waiting.join(0.2)
            assert waiting.is_alive()
            go_on()


class connect_later(Thread):  # noqa: N801
    """Connects and asks for something in a thread, which must end with the block."""

    def __init__(self, dsn: str) -> None:
        super().__init__(daemon=True)
        self.dsn = dsn

    def run(self) -> None:
        with connect(self.dsn) as conn:
            conn.execute("SELECT 1")

    def __enter__(self) -> Thread:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(5)
        assert not self.is_alive()


# The Supavisor simulator


@pytest.fixture
def sim(server: Server, empty_database: str) -> Iterator[SupaSim]:
    with SupaSim(server.dsn(empty_database)) as sim:
        yield sim


def execute(query: str) -> Callable[[psycopg.Connection], object]:
    return lambda conn: conn.execute(query)


def in_transaction(query: str) -> Callable[[psycopg.Connection], object]:
    def run(conn: psycopg.Connection) -> None:
        with conn.transaction():
            conn.execute(query)

    return run


def prepare_by_name(conn: psycopg.Connection) -> None:
    conn.prepare_threshold = 0
    conn.execute("SELECT %s::int", [1])


def pipeline(conn: psycopg.Connection) -> None:
    with conn.pipeline():
        conn.execute("SELECT 1")


def pipeline_without_waiting(conn: psycopg.Connection) -> None:
    """Send COMMIT while the first statement runs: other drivers do so, psycopg only through libpq."""
    conn.pgconn.enter_pipeline_mode()
    for statement in (b"SELECT pg_sleep(5)", b"COMMIT"):  # nobody waits for it: the client leaves
        conn.pgconn.send_query_params(statement, None)
        conn.pgconn.pipeline_sync()
    conn.pgconn.flush()
    conn.close()


BREACHES = [
    ("LISTEN", execute("LISTEN bell")),
    ("SESSION_SET", execute("SET statement_timeout = 1000")),
    ("SESSION_SET", execute("SELECT set_config('statement_timeout', '1s', false)")),
    ("SESSION_SET", execute("RESET statement_timeout")),
    ("SESSION_LOCK", execute("SELECT pg_advisory_lock(1)")),
    ("SESSION_LOCK", execute("SELECT pg_try_advisory_lock_shared(1)")),
    ("TEMP", execute("CREATE TEMPORARY TABLE gone ()")),
    ("HOLD_CURSOR", in_transaction("DECLARE held CURSOR WITH HOLD FOR SELECT 1")),
    ("SQL_PREPARE", execute("PREPARE q AS SELECT 1")),
    ("SQL_PREPARE", execute("DEALLOCATE ALL")),
    ("DISCARD", execute("DISCARD ALL")),
    ("LOAD", execute("LOAD 'plpgsql'")),
    ("SEQUENCE_FN", execute("SELECT lastval()")),
    ("NAMED_PREPARE", prepare_by_name),
    ("SET_LOCAL_OUTSIDE_TX", execute("SET LOCAL statement_timeout = 1000")),
    ("PIPELINE_OUTSIDE_TX", pipeline_without_waiting),
    ("FLUSH_OUTSIDE_TX", pipeline),
    ("COMMIT_PIPELINED", pipeline_without_waiting),
    ("OVER_16K", execute(f"SELECT '{'x' * 17_000}'")),
]


@pytest.mark.parametrize(("rule", "breach"), BREACHES, ids=[f"{n}-{rule}" for n, (rule, _) in enumerate(BREACHES)])
def test_the_simulator_records_each_breach(
    sim: SupaSim, rule: str, breach: Callable[[psycopg.Connection], object]
) -> None:
    with suppress(psycopg.Error), connect(sim.dsn()) as conn:
        breach(conn)
    wait_until(lambda: not sim.clients, 10, "the simulator to have read all that the client sent")
    assert rule in {found.rule for found in sim.settled()}


def test_the_simulator_records_a_start_up_parameter_and_ignores_it(sim: SupaSim) -> None:
    with connect(sim.dsn(options="'-c statement_timeout=1s'")) as conn:
        assert value(conn, "SHOW statement_timeout") == "0"
    assert [found.rule for found in sim.settled()] == ["STARTUP_PARAM"]


def test_the_simulator_finds_nothing_in_what_batchq_may_do(sim: SupaSim) -> None:
    with connect(sim.dsn()) as conn, conn.transaction():
        conn.execute("SELECT set_config('statement_timeout', %s, true)", ["15s"])
        conn.execute("CREATE TABLE t (id int GENERATED ALWAYS AS IDENTITY, v int)")
        conn.execute("INSERT INTO t (v) SELECT unnest(%s::int[])", [[1, 2, 3]])
        conn.cursor().executemany("INSERT INTO t (v) VALUES (%s)", [[4], [5]])
        with conn.transaction(), conn.cursor().copy("COPY t (v) FROM STDIN") as copy:
            copy.write_row([6])
        conn.execute("SELECT id FROM t ORDER BY id LIMIT 2 FOR UPDATE SKIP LOCKED")
        conn.execute("SELECT pg_try_advisory_xact_lock(1), pg_notify('bell', '')")
    assert sim.settled() == []


def test_transactions_through_the_simulator_never_stay_on_a_backend(sim: SupaSim) -> None:
    with connect(sim.dsn()) as conn:
        pids = [value(conn, BACKEND_PID) for _ in range(4)]
    assert pids[:2] == pids[2:]
    assert len(set(pids)) == 2


def test_a_busy_client_sees_a_bare_eof_when_its_backend_dies_and_an_idle_one_nothing(sim: SupaSim) -> None:
    with connect(sim.dsn()) as busy, connect(sim.dsn()) as idle:
        busy.execute("BEGIN")
        sim.kill_backends()
        assert value(idle, "SELECT 1") == 1
        with pytest.raises(psycopg.OperationalError) as caught:
            busy.execute("SELECT 1")
        assert caught.value.sqlstate is None


def test_clients_see_an_admin_shutdown_or_an_eof_when_the_simulator_restarts(sim: SupaSim) -> None:
    for error, sqlstate in [(True, "57P01"), (False, None)]:
        with connect(sim.dsn()) as conn:
            sim.drop_clients(error=error)
            with pytest.raises(psycopg.OperationalError) as caught:
                conn.execute("SELECT 1")
            assert caught.value.sqlstate == sqlstate


def test_a_statement_can_be_cancelled_through_the_simulator(sim: SupaSim) -> None:
    with connect(sim.dsn()) as conn, connect(sim.dsn()) as observer:
        sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"
        canceller = Thread(
            target=lambda: (
                wait_until(lambda: value(observer, sleeping), 5, "the sleeper"),
                conn.cancel_safe(),
            )
        )
        canceller.start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            conn.execute("SELECT pg_sleep(60)")
        canceller.join()
        assert value(conn, "SELECT 1") == 1


def test_the_simulator_refuses_as_supavisor_does(
    server: Server, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.supasim.REFUSAL_SECONDS", 0.0)
    with SupaSim(server.dsn(empty_database), password="right", max_clients=1) as sim, connect(sim.dsn()):
        for changes, message in [
            ({"user": "postgres.other"}, r"\(ENOTFOUND\) tenant/user postgres.other not found"),
            ({"user": "postgres"}, r"\(ENOTFOUND\)"),
            ({"application_name": "x" * 1100}, r"\(ESTARTUPPACKETTOOLARGE\)"),
            ({}, r"\(EMAXCONN\) max client connections reached, limit: 1"),
        ]:
            with pytest.raises(psycopg.OperationalError, match=message):
                connect(sim.dsn(**changes))
    wrong_password = pytest.raises(psycopg.OperationalError, match="password authentication failed")
    with SupaSim(server.dsn(empty_database), password="right") as sim, wrong_password:
        connect(sim.dsn(password="wrong"))


def test_a_client_that_finds_all_backends_busy_is_disconnected(server: Server, empty_database: str) -> None:
    sim = SupaSim(server.dsn(empty_database), pool_size=1, checkout_timeout_seconds=0.2)
    with sim, connect(sim.dsn()) as holder, connect(sim.dsn()) as waiter, holder.transaction():
        holder.execute("SELECT 1")
        with pytest.raises(psycopg.errors.InternalError_, match=r"\(ECHECKOUTTIMEOUT\)"):
            waiter.execute("SELECT 1")


def test_a_client_that_is_idle_for_too_long_sees_an_eof(server: Server, empty_database: str) -> None:
    sim = SupaSim(server.dsn(empty_database), client_idle_timeout_seconds=0.05)
    with sim, connect(sim.dsn()) as conn:
        wait_until(lambda: not sim.clients, 5, "the client to be dropped")
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")


# The ways through poolers


@pytest.mark.parametrize("name", WAYS)
def test_each_way_leads_to_the_database(name: str, server: Server, empty_database: str) -> None:
    with WAYS[name](server) as way, way(empty_database) as dsn, connect(dsn) as conn:
        assert value(conn, "SELECT current_database()") == empty_database


@pytest.mark.parametrize("name", ["pgbouncer-a", "sim"])
def test_a_way_through_a_pooler_fails_the_test_that_breaks_the_contract(
    name: str, server: Server, empty_database: str
) -> None:
    with WAYS[name](server) as way, pytest.raises(AssertionError), way(empty_database) as dsn:
        leave_a_prepared_statement(dsn)


def leave_a_prepared_statement(dsn: str) -> None:
    conn = connect(dsn)
    with suppress(psycopg.Error):
        conn.execute("PREPARE left_behind AS SELECT 1")
    conn.close()


# The programs that are installed


def test_a_test_that_asks_for_a_missing_program_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda _: None)
    monkeypatch.setenv(programs.WHY_MISSING, "no network")
    with pytest.raises(pytest.skip.Exception, match=r"^left out: needs pgbouncer \(no network\)$"):
        programs.path_of("pgbouncer")


def test_what_only_root_could_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "find", lambda name: None if name in ("promtool", "chromium") else name)
    monkeypatch.setattr(programs.os, "geteuid", lambda: 1000)
    assert programs.install().endswith("apt-get install chromium fonts-dejavu-core libatomic1 prometheus")


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for apt-get: it prints the next line of the file that is returned, and fails unless that is empty."""
    program, answers = tmp_path / "apt-get", tmp_path / "answers"
    program.write_text(f"#!/bin/sh\nline=$(head -n 1 {answers}); sed -i 1d {answers}\n"
                       '[ -z "$line" ] || { echo "W: warned" >&2; echo "$line" >&2; exit 100; }\n')  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return answers


@pytest.mark.parametrize("lock", ["/var/lib/apt/lists/lock", "/var/cache/apt/archives/lock"])
def test_an_installation_waits_while_another_apt_has_a_lock(apt: Path, lock: str) -> None:
    apt.write_text(f"E: Could not get lock {lock}. It is held by process 7 (apt-get)\n" * 3 + "\n")
    assert programs.apt_get("install", "pgbouncer", pause_seconds=0) == ""
    assert apt.read_text() == "", "it was asked again until the lock was free"


def test_an_installation_that_fails_says_why_and_is_not_tried_again(apt: Path) -> None:
    apt.write_text("E: Unable to locate package pgbouncer\nE: asked again\n")
    assert programs.apt_get("install", "pgbouncer") == "apt-get failed: Unable to locate package pgbouncer"


CI = ROOT / ".ci"


def install_by_ci(*packages: str) -> subprocess.CompletedProcess[str]:
    """Install packages as the scripts of .ci do."""
    words = ["bash", "-c", 'set -euo pipefail; source "$0"; install_packages "$@"', str(CI / "_apt"), *packages]
    environment = os.environ | {"APT_PAUSE_SECONDS": "0"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("lock", ["/var/lib/apt/lists/lock", "/var/cache/apt/archives/lock"])
def test_the_scripts_of_ci_wait_while_another_apt_has_a_lock(apt: Path, lock: str) -> None:
    held = f"E: Could not get lock {lock}. It is held by process 7 (apt-get)\n"
    apt.write_text(held * 3 + "\n" + held * 2 + "\n")
    ended = install_by_ci("debootstrap")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert apt.read_text() == "", "the update and the installation were asked again until the lock was free"


def test_an_installation_by_ci_that_fails_says_why_and_is_not_tried_again(apt: Path) -> None:
    apt.write_text("E: Failed to fetch the list\nE: Unable to locate package debootstrap\nE: asked again\n")
    ended = install_by_ci("debootstrap")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (100, "E: Unable to locate package debootstrap")
    assert apt.read_text() == "E: asked again\n"


def test_no_script_of_ci_asks_apt_otherwise() -> None:
    asking = {file.name for file in CI.iterdir() if re.search(r"^[^#]*\bapt-get\b", file.read_text(), re.MULTILINE)}
    assert asking == {"_apt"}


# The runner

REPORT = """<testsuites><testsuite>
  <testcase classname="c" name="good"/>
  <testcase classname="c" name="bad"><failure/></testcase>
  <testcase classname="c" name="bad_at_its_end"/>
  <testcase classname="c" name="bad_at_its_end"><error/></testcase>
  <testcase classname="c" name="skipped"><skipped/></testcase>
  <testcase classname="c" name="skipped_for_a_reason"><skipped message="slow"/></testcase>
  <testcase classname="c" name="left_out"><skipped message="left out: needs chromium (no network)"/></testcase>
</testsuite></testsuites>"""


def test_the_runner_counts_errors_and_skipped_tests_as_failed_but_not_those_left_out(tmp_path: Path) -> None:
    results = tmp_path / "results.xml"
    results.write_text(REPORT)
    outcome = read_results(ROOT / "tests" / "foundation" / "test_x.py", results, exit_code=1)
    assert (outcome.passed, outcome.failed, outcome.is_good) == (1, 4, False)
    assert outcome.left_out == {"needs chromium (no network)": 1}


@pytest.mark.parametrize("exit_code", [0, 2, 5, -9, None])
def test_the_runner_fails_a_file_without_tests_or_with_a_crash(exit_code: int | None, tmp_path: Path) -> None:
    outcome = read_results(ROOT / "tests" / "foundation" / "test_x.py", tmp_path / "none.xml", exit_code)
    assert (outcome.failed, outcome.is_good) == (1, False)


def test_the_runner_finds_nothing_wrong_with_a_good_run() -> None:
    assert problem_of(exit_code=0, cases=3, skipped=0) == ""


@pytest.mark.parametrize(
    ("passed", "strict", "exit_code"), [(1, False, 0), (1, True, 1), (0, False, 1)], ids=["some", "strict", "nothing"]
)
def test_the_summary_has_a_line_for_what_was_left_out_and_the_exit_code_is_by_what_ran(
    passed: int, strict: bool, exit_code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "needs chromium (no network)"
    left_out = Outcome(Path("e2e/test_y.py"), left_out=Counter({reason: 2}))
    assert report([Outcome(Path("e2e/test_x.py"), passed=passed), left_out], 1.0, strict) == exit_code
    lines = capsys.readouterr().out.splitlines()
    assert "⏭ e2e/test_y.py: 0 passed, 0 failed, 2 left out in 0.0 s (needs chromium (no network))" in lines
    assert f"Left out: 2 tests, {reason}" in lines
    assert lines[-1] == f"{passed} passed, 0 failed"


# In which order it runs files

FILES = [
    Path(f"{name}.py")
    for name in ("e2e/test_e", "component/test_short", "component/test_long", "component/test_measures",
                 "foundation/test_f", "foundation/test_g")
]  # fmt: skip
SECONDS = {"component/test_short.py": 10, "component/test_long.py": 60, "component/test_measures.py": 5,
           "foundation/test_f.py": 20, "foundation/test_g.py": 30, "e2e/test_e.py": 40}  # fmt: skip


def plan(jobs: int) -> Plan:
    return Plan(FILES, jobs, SECONDS, alone=["component/test_measures.py"])


def test_layers_keep_their_order_and_the_longest_file_of_a_layer_comes_first() -> None:
    made = plan(jobs=1)
    order = [file.stem.removeprefix("test_") for _ in FILES if (file := made.next([]))]
    assert order == ["g", "f", "measures", "long", "short", "e"]


def test_no_more_files_run_at_a_time_than_were_asked_for() -> None:
    assert Plan(FILES[:1], 2, SECONDS).next(FILES[1:2]) is not None
    assert Plan(FILES[:1], 2, SECONDS).next(FILES[1:3]) is None


def test_nothing_else_starts_before_foundation_has_finished() -> None:
    made = plan(jobs=4)
    running = [made.next([]), made.next([FILES[4]])]
    assert [file.name for file in running if file] == ["test_g.py", "test_f.py"]
    assert made.next([FILES[4]]) is None
    assert made.next([]) is not None


def test_a_file_that_measures_runs_alone() -> None:
    made = plan(jobs=4)
    made.waiting = [FILES[3], FILES[1]]
    assert made.next([FILES[2]]) is None, "another one is running"
    assert (measures := made.next([])) == FILES[3]
    assert made.next([measures]) is None, "nothing starts beside it"
    assert made.next([]) == FILES[1]


def test_a_file_that_runs_again_runs_alone_and_before_the_rest_of_its_layer() -> None:
    made = plan(jobs=4)
    made.waiting = [FILES[1], FILES[0]]
    made.again(FILES[2])
    assert made.next([FILES[1]]) is None, "another one is running"
    assert [made.next([]), made.next([FILES[2]])] == [FILES[2], None]
    assert made.waiting == [FILES[1], FILES[0]]


def test_the_files_that_run_alone_are_there() -> None:
    assert [name for name in ALONE if not (ROOT / "tests" / name).is_file()] == []


def test_the_time_left_is_that_of_the_order_at_this_machines_speed() -> None:
    made = plan(jobs=2)
    foundation, measures, others = 30, 5, 60  # test_long beside test_short and test_e
    assert made.seconds_left({}) == pytest.approx(foundation + measures + others, abs=5)
    while file := made.next([]):
        made.finished(file, 2 * made.expected(file))
        if file == FILES[3]:
            break
    assert made.seconds_left({}) == 2 * others
    running = {file: 30.0 for _ in "ab" if (file := made.next([]))}
    assert made.seconds_left(running) == 2 * others - 30


# How it runs them

WAITS = """
import signal, time
from pathlib import Path
import pytest
signal.signal(signal.SIGTERM, signal.default_int_handler)
here = Path(__file__)

@pytest.fixture
def thing():
    yield
    here.with_suffix(".cleaned").touch()

def test_waits_for_company(thing):
    here.with_suffix(".here").touch()
    until = time.monotonic() + 20
    while len(list(here.parent.glob("*.here"))) < {files}:
        assert time.monotonic() < until, "nobody came"
        time.sleep(0.01)
    print("MARK", here.stem)
"""


def runner(directory: Path, jobs: int, texts: dict[str, str]) -> tuple[Runner, list[str]]:
    """Return a runner for files with these *texts*, and what it will say."""
    for name, text in texts.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    said: list[str] = []
    files = Plan([directory / name for name in texts], jobs, {})
    return Runner(files, [dict(os.environ) for _ in range(jobs)], said.append), said


def test_files_run_at_the_same_time_and_each_log_comes_out_whole(tmp_path: Path) -> None:
    text = WAITS.replace("{files}", "2") + "\ndef test_fails():\n    print('FAILED', here.stem)\n    assert False\n"
    made, said = runner(tmp_path, 2, {"component/test_a.py": text, "component/test_b.py": text})
    outcomes = list(made.run())
    assert [(one.passed, one.failed) for one in outcomes] == [(1, 1), (1, 1)]
    for name in ("test_a", "test_b"):
        (log,) = [entry for entry in said if f"FAILED {name}" in entry]
        assert log.startswith(f"▶ component/{name}.py\n")
        assert "2 items" in log, "from its beginning"
        assert "1 failed, 1 passed" in log.splitlines()[-1], "to its end"
    assert said[-1] == "⏳ 2 of 2 files; about 0 s left"


def test_after_a_failure_in_foundation_only_the_rest_of_it_runs(tmp_path: Path) -> None:
    good, bad = "def test_it():\n    pass\n", "def test_it():\n    assert False\n"
    made, _ = runner(tmp_path, 1, {"foundation/test_a.py": bad, "foundation/test_b.py": good, "e2e/test_c.py": good})
    found = {outcome.file.name: (outcome.ran, outcome.is_good) for outcome in made.run()}
    assert found == {"test_a.py": (True, False), "test_b.py": (True, True), "test_c.py": (False, False)}


FAILS_AT_FIRST = """
from pathlib import Path
mark = Path(__file__).with_suffix(".mark")

def test_it():
    was_there = mark.exists()
    mark.touch()
    assert was_there
"""


def test_with_again_a_file_that_fails_gets_a_second_run_which_counts(tmp_path: Path) -> None:
    good, bad = "def test_it():\n    pass\n", "def test_it():\n    assert False\n"
    texts = {"foundation/test_a.py": FAILS_AT_FIRST, "component/test_b.py": bad, "component/test_c.py": good}
    made, said = runner(tmp_path, 2, texts)
    made.again = True
    found = {outcome.file.name: (outcome.is_good, outcome.remark) for outcome in made.run()}
    second = "the second run, alone, after one that failed"
    assert found == {"test_a.py": (True, second), "test_b.py": (False, second), "test_c.py": (True, "")}
    step("both runs of a file are told, and the summary says which was the second")
    assert sum(text.startswith("❌ foundation/test_a.py") for text in said) == 1
    assert sum(text.startswith("✅ foundation/test_a.py") and text.endswith(f"({second})") for text in said) == 1
    assert said[-1].startswith("⏳ 5 of 5 files")


def test_without_again_a_file_that_fails_has_failed(tmp_path: Path) -> None:
    made, _ = runner(tmp_path, 1, {"component/test_a.py": FAILS_AT_FIRST})
    assert [outcome.is_good for outcome in made.run()] == [False]


def test_an_interrupted_run_stops_every_file_and_waits_until_it_has_cleaned_up(tmp_path: Path) -> None:
    text = WAITS.replace("{files}", "3")
    made, _ = runner(tmp_path, 2, {"component/test_a.py": text, "component/test_b.py": text})
    both = Thread(target=lambda: interrupt_when(lambda: len(list(tmp_path.glob("component/*.here"))) == 2))
    both.start()
    with pytest.raises(KeyboardInterrupt):
        list(made.run())
    both.join()
    assert len(list(tmp_path.glob("component/*.cleaned"))) == 2


def interrupt_when(condition: Callable[[], bool]) -> None:
    """Send this process what Ctrl-C sends."""
    wait_until(condition, 20, "the files to run")
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    run_alone(__file__)
