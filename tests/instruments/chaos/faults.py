"""Every fault: a function that begins it, lets it last, and ends it. Its docstring's first line says what it is."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql

from tests.instruments.chaos.fleet import ChaosWorker
from tests.instruments.chaos.operator import note_cancelled
from tests.instruments.chaos.orders import LETTERS, ORDERS, STYLES
from tests.instruments.chaos.points import POINTS
from tests.instruments.chaos.server import DISK_BYTES, as_role
from tests.instruments.chaos.two_schemas import migrate_under_load
from tests.instruments.chaos.world import OLD_CODE, POOL_SIZE, World
from tests.support.waiting import wait_until

Run = Callable[[World, random.Random], object]
Need = Callable[[World], str | None]
LEASE_AND_MORE_SECONDS = (2.2, 3.5)
POINT_SECONDS = 15.0
MOST_SECONDS = 10.0
TERMINATED = 10
HUNGRY_MEGABYTES = 300
MOST_MEGABYTES = 250
GOES_ON = 10  # batches of each style, in spite of a fault
GOES_ON_SECONDS = 40.0
RESCUE_SECONDS = 10.0
HELD_SECONDS = 5.0
BURST = 2000  # batches that take no time
SMALLEST_POOL = 1
EFFECTS_THROUGH_IT = 20
ODD_ENCODING = "LATIN1"
ODD_KINDS = {
    "plain": 20,
    "failing": 5,
    "items": 10,
    "items_tx": 10,
}  # results, errors, items' errors, in its transaction


class NotInjected(Exception):
    """The fault has not come about; it does not count."""


class WorkStands(Exception):
    """Work that the fault must leave alone does not go on."""


def passed(since: float) -> float:
    """Return how many seconds have passed since a monotonic time."""
    return time.monotonic() - since


@dataclass(frozen=True)
class Fault:
    """A kind of fault. *touches*: what no other fault may touch at the same time. *needs*: says what is missing."""

    name: str
    run: Run
    touches: frozenset[str]
    needs: tuple[Need, ...] = field(default=())

    @property
    def summary(self) -> str:
        """What it is, in one line."""
        return (self.run.__doc__ or "").strip().splitlines()[0]

    def missing(self, world: World) -> str | None:
        """Return why it cannot be tried here, None if it can."""
        return next((problem for need in self.needs if (problem := need(world))), None)


FAULTS: dict[str, Fault] = {}


def fault(name: str, *touches: str, needs: tuple[Need, ...] = ()) -> Callable[[Run], Run]:
    """Register a fault."""

    def register(run: Run) -> Run:
        FAULTS[name] = Fault(name, run, frozenset(touches), needs)
        return run

    return register


def a_pooler(world: World) -> str | None:
    """A pooler stands between."""
    return None if world.pooler else "there is no pooler in between"


def may_crash(world: World) -> str | None:
    """The server may be crashed."""
    return None if world.server.can_crash else "the server is not this run's to crash"


def may_restart(world: World) -> str | None:
    """The server may be stopped and started."""
    return None if world.server.can_restart else "the server is not this run's to restart"


def own_disk(world: World) -> str | None:
    """The server's disk may be filled."""
    return None if world.server.disk else "no small file system could be mounted for the server (needs root)"


def the_past(commit: str) -> Need:
    """An earlier version of the code is at hand."""

    def need(world: World) -> str | None:
        try:
            world.code(commit)
        except Exception:
            return f"commit {commit} is not in this checkout"
        return None

    return need


# -------------------------------------------------------------------------------------------------------- the workers


@fault("kill")
def kill(world: World, dice: random.Random) -> None:
    """kill -9 of a worker, at random."""
    world.hold(dice.uniform(0, 0.3))
    with world.fleet.lend(dice) as place:
        world.fleet.kill(place)


@fault("kills")
def kills(world: World, dice: random.Random) -> None:
    """kill -9 of workers, six times within three seconds."""
    for _ in range(6):
        kill(world, dice)
        world.hold(0.3)


@fault("stop")
def stop(world: World, dice: random.Random) -> None:
    """SIGTERM to a worker, at random."""
    world.hold(dice.uniform(0, 0.3))
    with world.fleet.lend(dice) as place:
        world.fleet.stop_worker(place)


def at_point(point: str, number: signal.Signals) -> Run:
    """Return the fault that sends a worker a signal at a named point."""

    def run(world: World, dice: random.Random) -> None:
        with world.fleet.lend(dice, dice.choice(STYLES)) as place:
            worker = place.worker  # once it has ended, another one takes its place at any time
            if not reached(worker, point, number):
                raise NotInjected(f"no {place.style} worker has come to {point} within {POINT_SECONDS:g} s")
            world.fleet.wait_for_stop(worker)

    what = {"claim": "the claim's COMMIT", "commit": "a handler's COMMIT", "finish": "the finish's COMMIT"}
    whose, _, moment = point.partition("-")
    called = "kill -9" if number == signal.SIGKILL else "SIGTERM"
    run.__doc__ = f"{called} of a worker {moment} {what[whose]}."
    return run


def reached(worker: ChaosWorker, point: str, number: signal.Signals) -> bool:
    """Arm a point, wait until the worker comes to it, and tell whether it did."""
    worker.tell("arm", point, int(number))
    until = time.monotonic() + POINT_SECONDS
    while not worker.has_said("reached"):
        if time.monotonic() > until:
            worker.tell("arm", point, 0)
            wait_until(lambda: worker.has_said("disarmed") or not worker.is_running, POINT_SECONDS, "an answer")
            return worker.has_said("reached")
        time.sleep(0.01)
    return True


for each_point in POINTS:
    fault(f"kill-{each_point}")(at_point(each_point, signal.SIGKILL))
    fault(f"stop-{each_point}")(at_point(each_point, signal.SIGTERM))


@fault("freeze")
def freeze(world: World, dice: random.Random) -> None:
    """SIGSTOP of a worker for longer than its lease, then SIGCONT."""
    with world.fleet.lend(dice) as place:
        place.worker.freeze()
        try:
            world.hold(dice.uniform(*LEASE_AND_MORE_SECONDS))
        finally:
            place.worker.thaw()


@fault("clock")
def clock(world: World, dice: random.Random) -> None:
    """The wall clock of half the workers jumps, a day ahead or back, and back again."""
    with ExitStack() as stack:
        workers = [stack.enter_context(world.fleet.lend(dice)).worker for _ in range(len(world.fleet.places) // 2)]
        for worker in workers:
            worker.tell("clock", dice.choice([86_400, -86_400]))
        world.hold(1.0)
        for worker in workers:
            worker.tell("clock", 0)


@fault("memory")
def memory(world: World, dice: random.Random) -> None:
    """A limit of memory: for a second, whatever a worker asks for is refused (MemoryError)."""
    with world.fleet.lend(dice) as place:
        place.worker.may_end_itself = True
        place.worker.tell("memory", 2**20, 1.0)
        world.hold(1.2)


@fault("small-pool")
def small_pool(world: World, dice: random.Random) -> None:
    """A worker gives way to one with a single connection for its handlers' transactions, for a while."""
    with world.fleet.lend(dice) as place:
        try:
            world.fleet.set(place, pool_size=SMALLEST_POOL)
            otherwise = f"a {place.style} worker has not written {EFFECTS_THROUGH_IT} rows"
            wait_for_work(world, lambda: effects_of(world, place.worker.pid) >= EFFECTS_THROUGH_IT, otherwise)
            world.hold(dice.uniform(1, 3))
        finally:
            world.fleet.set(place)


def effects_of(world: World, pid: int) -> int:
    """Return how many rows a worker has written; 0 if the server goes away meanwhile."""
    with suppress(psycopg.OperationalError), world.admin() as conn:
        return number(conn, "SELECT count(*) FROM effects WHERE pid = %s", pid)
    return 0


@fault("oom", "server")
def oom(world: World, dice: random.Random) -> None:
    """A batch takes so much memory that its worker is killed for it, as by the kernel."""
    world.producer.order("hungry", 1, megabytes=HUNGRY_MEGABYTES)
    until = time.monotonic() + POINT_SECONDS
    while time.monotonic() < until:
        world.hold(0.05)
        for place in world.fleet.places:
            if is_too_large(place.worker.pid) and world.fleet.lend_this(place):
                world.fleet.kill(place)
                world.fleet.take_back(place)
                return
    raise NotInjected(f"the hungry batch has not begun within {POINT_SECONDS:g} s")


def is_too_large(pid: int) -> bool:
    """Tell whether a process has more memory than any worker should."""
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).memory_info().rss > MOST_MEGABYTES * 2**20)
    return False


@fault("deploy", "fleet", needs=(the_past(OLD_CODE),))
def deploy(world: World, dice: random.Random) -> None:
    """A rolling deploy: workers give way to others with the other version of the code, half of them at a time."""
    world.fleet.roll(None if world.fleet.code else world.code(OLD_CODE))


@fault("schema", "server", needs=(the_past(OLD_CODE),))
def schema(world: World, dice: random.Random) -> None:
    """Two versions of the schema: in a database beside, migrations come while an old worker and a new one work."""
    migrate_under_load(world, world.code(OLD_CODE))


# ------------------------------------------------------------------------------------------------ somebody else's work


WORKED_SINCE = """
SELECT kind, count(*)
FROM batchq.batches_finished
WHERE finished_at > to_timestamp(%s) AND status <> 'cancelled'
GROUP BY kind
"""
LOCK = """
SELECT id FROM batchq.batches_live WHERE status = %s AND kind <> 'hungry' ORDER BY random() LIMIT %s
FOR UPDATE SKIP LOCKED
"""
RUNNING = (
    "SELECT coalesce(part_of, id) FROM batchq.batches_live "
    "WHERE status = 'processing' AND kind NOT IN ('hungry', 'tick') ORDER BY random() LIMIT 1"
)
OVERDUE = """
SELECT count(*) FROM batchq.batches_live WHERE id = ANY (%s) AND status = 'processing' AND lease_expires_at < now()
"""
Conn = psycopg.Connection[Any]


def number(conn: Conn, query: str, *parameters: Any) -> int:
    """Return the one number of a query."""
    row = conn.execute(query.encode(), parameters).fetchone()
    assert row
    return int(row[0])


def worked_by_style(conn: Conn, since: float) -> Counter[str]:
    """Return how many batches of each style workers have finished since a time."""
    counts: Counter[str] = Counter()
    for kind, count in conn.execute(WORKED_SINCE.encode(), [since]):
        counts[ORDERS[kind].style] += count
    return counts


def wait_for_work(world: World, is_done: Callable[[], bool], otherwise: str, seconds: float = GOES_ON_SECONDS) -> None:
    """Wait until something is worked. Raises WorkStands if that takes too long."""
    until = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > until:
            raise WorkStands(f"{otherwise} within {seconds:g} s")
        world.hold(0.05)


def see_all_go_on(world: World, conn: Conn, since: float) -> None:
    """Wait until batches of every style have finished since a time."""

    def all_go_on() -> bool:
        counts = worked_by_style(conn, since)
        return all(counts[style] >= GOES_ON for style in STYLES)

    wait_for_work(world, all_go_on, f"{GOES_ON} batches of each style have not finished")


@fault("held-rows", "server")
def held_rows(world: World, dice: random.Random) -> None:
    """Rows of a few batches, some of them processing, are locked by a transaction that is left open, up to 30 s."""
    seconds = dice.uniform(HELD_SECONDS, world.longest_seconds)
    with world.admin() as conn, world.admin() as onlooker:
        conn.execute("BEGIN")
        held, end = dice.choice([lock_rows, cancel_one])(conn, dice)
        since = time.time()
        world.hold(seconds)
        see_all_go_on(world, onlooker, since)
        conn.execute(end)
        wait_for_work(
            world, lambda: number(onlooker, OVERDUE, held) == 0, "what was held is not rescued", RESCUE_SECONDS
        )


def lock_rows(conn: Conn, dice: random.Random) -> tuple[list[int], str]:
    """Lock some rows, as a person does who looks at them; return their ids, and how the transaction is to end."""
    running = [row[0] for row in conn.execute(LOCK.encode(), ["processing", 2])]
    if not running:
        raise NotInjected("no batch was processing")
    return running + [row[0] for row in conn.execute(LOCK.encode(), ["pending", 3])], "ROLLBACK"


def cancel_one(conn: Conn, dice: random.Random) -> tuple[list[int], str]:
    """Cancel a batch that runs, and write that down with it; return its id, and how the transaction is to end."""
    for _ in range(100):
        row = conn.execute(RUNNING.encode()).fetchone()
        if row and conn.execute("SELECT batchq.cancel(%s)", row).fetchone() == ("cancelled",):
            note_cancelled(conn, row[0])
            return [row[0]], dice.choice(["COMMIT", "ROLLBACK"])
    raise NotInjected("no batch was processing")


@fault("held-snapshot", "server")
def held_snapshot(world: World, dice: random.Random) -> None:
    """A snapshot is held over a burst and the calm after it, with an ANALYZE and a VACUUM meanwhile."""
    with world.admin() as conn, world.admin() as onlooker:
        conn.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        conn.execute("SELECT count(*) FROM batchq.batches_live")
        for kind in ("plain", "plain_async"):
            world.producer.order(kind, BURST // 2, is_cheap=True)
        onlooker.execute("ANALYZE batchq.batches_live")
        left = "SELECT count(*) FROM batchq.batches_live WHERE payload ? 'is_cheap'"
        wait_for_work(world, lambda: number(onlooker, left) < BURST / 2, "half of a burst is not worked")
        onlooker.execute("VACUUM (ANALYZE) batchq.batches_live")
        wait_for_work(world, lambda: number(onlooker, left) == 0, "a burst is not worked")
        since = time.time()
        world.hold(dice.uniform(1, 3))
        see_all_go_on(world, onlooker, since)
        conn.execute("ROLLBACK")


# --------------------------------------------------------------------------------------------------------- the server


TERMINATE = """
SELECT count(pg_terminate_backend(pid))
FROM pg_stat_activity
WHERE datname = current_database() AND usename = %s AND {}
"""


def terminate(world: World, which: str) -> None:
    """Terminate backends of the workers that are as *which* says, for a second, or until one was."""
    done, began_at = 0, time.monotonic()
    with world.admin() as conn:
        while done < TERMINATED and passed(began_at) < (MOST_SECONDS if done == 0 else 1.0):
            row = conn.execute(TERMINATE.format(which).encode(), [world.role]).fetchone()
            done += row[0] if row else 0
            world.hold(0.005)
    if not done:
        raise NotInjected(f"no backend was {which}")


@fault("terminate-idle", "server")
def terminate_idle(world: World, dice: random.Random) -> None:
    """pg_terminate_backend of idle backends."""
    terminate(world, "state = 'idle'")


@fault("terminate-busy", "server")
def terminate_busy(world: World, dice: random.Random) -> None:
    """pg_terminate_backend of backends in a transaction."""
    terminate(world, "(state = 'active' OR state LIKE 'idle in transaction%%')")


@fault("restart", "server", needs=(may_restart,))
def restart(world: World, dice: random.Random) -> None:
    """An immediate stop of Postgres, and its start."""
    world.server.restart()


@fault("crash", "server", needs=(may_crash,))
def crash(world: World, dice: random.Random) -> None:
    """kill -9 of a process of Postgres, which then ends all others and recovers."""
    world.server.crash()


@fault("postmaster", "server", needs=(may_restart,))
def postmaster(world: World, dice: random.Random) -> None:
    """kill -9 of the first process of Postgres, and its start."""
    world.server.kill()


@fault("disk-full", "server", needs=(own_disk,))
def disk_full(world: World, dice: random.Random) -> None:
    """The disk of the database is full for two seconds."""
    assert world.server.disk is not None
    refused = 0
    try:
        until = time.monotonic() + 2.0
        while time.monotonic() < until:
            resize(world.server.disk, used_bytes(world.server.disk))
            refused += is_out_of_disk(world)
            world.hold(0.05)
    finally:
        resize(world.server.disk, DISK_BYTES)
        world.server.ensure_up()
    if not refused:
        raise NotInjected("the server had room all the same")


def used_bytes(disk: Path) -> int:
    """Return how much of a file system is used."""
    figures = os.statvfs(disk)
    return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


def resize(disk: Path, size: int) -> None:
    """Change the size of a file system in memory; one that has grown meanwhile cannot be made as small."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], capture_output=True, check=False)


def is_out_of_disk(world: World) -> bool:
    """Tell whether the server refuses to write, or has gone down for it."""
    try:
        with psycopg.connect(world.server.dsn(world.dbname), connect_timeout=2) as conn:
            conn.execute("CREATE TEMPORARY TABLE probe AS SELECT repeat('x', 100) FROM generate_series(1, 10000)")
    except (psycopg.OperationalError, psycopg.errors.DiskFull):
        return True
    return False


@fault("password", "server", "line")
def password(world: World, dice: random.Random) -> None:
    """New log-ins are refused for a second (another password; where the server asks for none, no log-in at all)."""
    with world.admin() as conn:
        refuse = "PASSWORD 'another'" if asks_for_password(world) else "NOLOGIN"
        alter(conn, world.role, refuse)
        try:
            conn.execute(TERMINATE.format("true").encode(), [world.role])
            world.proxy.cut()
            world.hold(1.0)
        finally:
            alter(conn, world.role, f"LOGIN PASSWORD '{world.password}'")


def alter(conn: psycopg.Connection[Any], role: str, what: str) -> None:
    """ALTER ROLE."""
    conn.execute(sql.SQL("ALTER ROLE {} {}").format(sql.Identifier(role), sql.SQL(what)))


def asks_for_password(world: World) -> bool:
    """Tell whether the server refuses a wrong password."""
    try:
        psycopg.connect(as_role(world.server.dsn(world.dbname), "wrong", world.role)).close()
    except psycopg.OperationalError:
        return True
    return False


@contextmanager
def setting(world: World, name: str, value: str, whose: list[str]) -> Iterator[Conn]:
    """Set something for role or database, and end all sessions, so that new ones have it; for the block."""
    names = {"role": sql.Identifier(world.role), "database": sql.Identifier(world.dbname), "name": sql.Identifier(name)}
    with world.admin() as conn:
        try:
            for each in whose:
                conn.execute(
                    sql.SQL(f"ALTER {each} SET {{name}} = {{value}}").format(**names, value=sql.Literal(value))
                )
            conn.execute(TERMINATE.format("true").encode(), [world.role])
            yield conn
        finally:
            for each in whose:
                conn.execute(sql.SQL(f"ALTER {each} RESET {{name}}").format(**names))


SETTABLE = ["ROLE {role}", "DATABASE {database}", "ROLE {role} IN DATABASE {database}"]


@fault("read-only", "server")
def read_only(world: World, dice: random.Random) -> None:
    """Role or database become read-only (default_transaction_read_only), for one to three seconds."""
    with setting(world, "default_transaction_read_only", "on", [dice.choice(SETTABLE)]) as conn:
        since = time.time()
        world.hold(dice.uniform(1, 3))
        worked = worked_by_style(conn, since).total()
    if world.pooler:
        with world.admin() as conn:  # batchq drops a connection that only reads; the pooler keeps its own
            conn.execute(TERMINATE.format("true").encode(), [world.role])
    if worked:
        raise NotInjected(f"{worked} batches were finished all the same")


@fault("odd-encoding", "server", "pooler")
def odd_encoding(world: World, dice: random.Random) -> None:
    """Role and database ask for LATIN1 while payloads, results and errors have letters beyond it."""
    with setting(world, "client_encoding", ODD_ENCODING, SETTABLE[:2]) as conn:
        if world.pooler:  # it goes by the encoding that it has met first
            world.pooler.kill()
            world.pooler.start()
        for kind, count in ODD_KINDS.items():
            world.producer.order(kind, count, text=LETTERS)
        left = "SELECT count(*) FROM batchq.batches_live WHERE payload ? 'text'"
        wait_for_work(world, lambda: number(conn, left) == 0, "batches with such letters are not worked")


# --------------------------------------------------------------------------------------------------------- the pooler


@fault("pooler-killed", "pooler", needs=(a_pooler,))
def pooler_killed(world: World, dice: random.Random) -> None:
    """The pooler is killed, away for a second, and started."""
    assert world.pooler
    world.pooler.kill()
    try:
        world.hold(1.0)
    finally:
        world.pooler.start()


@fault("pooler-restarted", "pooler", needs=(a_pooler,))
def pooler_restarted(world: World, dice: random.Random) -> None:
    """The pooler is killed and started at once."""
    assert world.pooler
    world.pooler.kill()
    world.pooler.start()


@fault("pooler-paused", "pooler", "server", needs=(a_pooler,))
def pooler_paused(world: World, dice: random.Random) -> None:
    """PAUSE of the pooler for a second, then RESUME."""
    assert world.pooler
    world.pooler.pause(world.dbname)
    try:
        world.hold(1.0)
    finally:
        world.pooler.resume(world.dbname)


@fault("pooler-frozen", "pooler", needs=(a_pooler,))
def pooler_frozen(world: World, dice: random.Random) -> None:
    """SIGSTOP of the pooler for longer than any deadline, then SIGCONT."""
    assert world.pooler
    world.pooler.freeze()
    try:
        world.hold(3.2)
    finally:
        world.pooler.thaw()


@fault("pooler-full", "pooler", "line", "server", needs=(a_pooler,))
def pooler_full(world: World, dice: random.Random) -> None:
    """All clients that the pooler takes are somebody else's, for a second."""
    assert world.pooler
    with ExitStack() as stack:
        world.proxy.cut()
        with suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(psycopg.connect(world.pooler.dsn(world.dbname), connect_timeout=2))
        world.proxy.cut()
        world.hold(1.0)


@fault("pool-busy", "pooler", "server")
def pool_busy(world: World, dice: random.Random) -> None:
    """All backends of the pool are in somebody else's transactions, for a second and a half."""
    target = world.pooler.dsn(world.dbname) if world.pooler else as_role(
        world.server.dsn(world.dbname), world.password, world.role)  # fmt: skip
    with ExitStack() as stack:
        try:
            for _ in range(POOL_SIZE):
                conn = stack.enter_context(psycopg.connect(target, prepare_threshold=None))
                conn.execute("SELECT 1")
        except psycopg.OperationalError as error:
            raise NotInjected(f"the pool was busy already: {error}") from error
        world.hold(1.5)


# ----------------------------------------------------------------------------------------------------------- the line


def delayed(seconds: float) -> Run:
    """Return the fault that delays each piece."""

    def run(world: World, dice: random.Random) -> None:
        world.proxy.delay_seconds = seconds
        try:
            world.hold(max(1.0, 10 * seconds))
        finally:
            world.proxy.delay_seconds = 0.0

    run.__doc__ = f"Everything on the line, each way, is {seconds * 1000:g} ms late."
    return run


fault("delay-20ms", "line")(delayed(0.02))
fault("delay-200ms", "line")(delayed(0.2))


@fault("cut", "line")
def cut(world: World, dice: random.Random) -> None:
    """All connections are cut, three times within half a second."""
    for _ in range(3):
        world.proxy.cut()
        world.hold(dice.uniform(0.05, 0.3))


@fault("half-open", "line")
def half_open(world: World, dice: random.Random) -> None:
    """All connections swallow what they are given, for good; only new ones work. The server's side ends after 10 s."""
    world.proxy.swallow()


@fault("cut-commit", "line")
def cut_commit(world: World, dice: random.Random) -> None:
    """Each twentieth COMMIT is cut, half of them before it arrives, half in the middle of its answer."""
    before = world.proxy.cuts
    world.proxy.cut_share = 0.05
    began_at = time.monotonic()
    try:
        world.hold(1.0)
        while world.proxy.cuts == before and passed(began_at) < MOST_SECONDS:
            world.hold(0.1)
    finally:
        world.proxy.cut_share = 0.0
    if world.proxy.cuts == before:
        raise NotInjected("there was no COMMIT to cut")
