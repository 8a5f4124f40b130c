"""Metrics: what a live worker and the page show to Prometheus, the checks of their health, and the bounds of labels."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families

import batchq
from batchq.common.exposition import MOST_PAIRS, exposition
from batchq.errors import ConfigError
from batchq.web.metrics import bounded_rows, queue_metrics
from batchq.worker.metrics import buckets, first_pairs, worker_metrics
from batchq.worker.throughput import BOUNDS, Counts, Throughput
from batchq.worker.worker import Worker
from tests.component.rows import Conn, expire_lease, insert, processing
from tests.support.alone import run_alone
from tests.support.batches import put, wait_for_status
from tests.support.processes import Processes
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import served

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """Return the value of each sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labelled(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the key of a sample."""
    return name, tuple(sorted(labels.items()))


def mail_app() -> batchq.App:
    """Return an app with one handler."""
    app = batchq.App()

    @app.handler("mail")
    def mail(batch: batchq.Batch) -> None:
        pass

    return app


@contextmanager
def working(app: batchq.App, dsn: str, port: int) -> Iterator[Worker]:
    """Let a worker work while the block runs."""
    worker = Worker(app, batchq.Settings.load(dsn=dsn, metrics_port=port))
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop_now()
        thread.join(30)


def get(port: int, path: str = "/metrics") -> httpx.Response:
    """Ask a worker, as soon as it listens."""

    def ask() -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=30)
        except httpx.ConnectError:
            return None

    answer = wait_until(ask, 60, "the worker to listen")
    assert answer is not None
    return answer


def test_a_worker_shows_what_it_has_ended_and_what_it_runs(conn: Conn, dsn: str) -> None:
    app, go_on, port = batchq.App(), threading.Event(), free_port()

    @app.handler("mail")
    def mail(batch: batchq.Batch) -> None:
        if batch.payload == "bad":
            raise ValueError("bad")

    @app.handler("slow")
    def slow(batch: batchq.Batch) -> None:
        go_on.wait(60)

    ids = [put(conn, "mail"), put(conn, "mail"), put(conn, "mail", "bad", max_attempts=1), put(conn, "slow")]
    with working(app, dsn, port):
        try:
            wait_for_status(conn, ids[2], "failed", 60)
            wait_for_status(conn, ids[3], "processing", 60)
            answer = get(port)
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            busy = labelled("batchq_worker_slots_busy", style="def")
            wait_until(lambda: samples(get(port).text)[busy] == 1, 60, "one slot to be busy")
            shown = samples(get(port).text)
        finally:
            go_on.set()
        mails = {"queue": "default", "kind": "mail"}
        assert shown[labelled("batchq_batches_finished_total", **mails, status="completed")] == 2
        assert shown[labelled("batchq_batches_finished_total", **mails, status="failed")] == 1
        assert shown[labelled("batchq_batch_run_seconds_count", **mails)] == 3
        assert shown[labelled("batchq_batch_run_seconds_bucket", **mails, le="+Inf")] == 3
        assert shown[labelled("batchq_worker_slots", style="def")] == 8
        step("its health")
        assert (get(port, "/healthz").status_code, get(port, "/readyz").status_code) == (200, 200)
        assert get(port, "/nothing").status_code == 404
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False)


def test_a_worker_that_does_not_poll_is_not_healthy_and_one_without_database_is_not_ready(dsn: str) -> None:
    app, port = mail_app(), free_port()
    worker = Worker(app, batchq.Settings.load(dsn=dsn, metrics_port=port))
    server = worker.serve_metrics()
    assert server
    try:
        worker.claimer.polled_at -= 3600
        assert get(port, "/healthz").status_code == 503
        assert "3600 s" in get(port, "/healthz").text
    finally:
        server.close()
    away = psycopg.conninfo.make_conninfo(dsn, port=free_port(), host="127.0.0.1")
    server = Worker(app, batchq.Settings.load(dsn=away, metrics_port=port)).serve_metrics()
    assert server
    try:
        assert get(port, "/readyz").status_code == 503
    finally:
        server.close()


def test_a_port_that_is_taken_is_said(dsn: str) -> None:
    app = mail_app()
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"BATCHQ_METRICS_PORT {port}: Address already in use"):
            Worker(app, batchq.Settings.load(dsn=dsn, metrics_port=port)).serve_metrics()


def test_it_costs_nothing_when_off(dsn: str) -> None:
    app = mail_app()
    worker = Worker(app, batchq.Settings.load(dsn=dsn))
    assert worker.serve_metrics() is None
    assert worker.finisher.throughput.sums is None


def test_several_workers_have_ports_that_follow_each_other(dsn: str) -> None:
    port = free_port(following=1)
    with Processes(dsn, "tests.e2e.apps:app") as processes:
        several = processes.run("workers", "2", "tests.e2e.apps:app", "--metrics-port", str(port))
        for number in (0, 1):
            assert get(port + number, "/healthz").status_code == 200
        assert several.stop(60) == 0


def test_sums_go_on_when_what_was_counted_is_written() -> None:
    throughput = Throughput()
    throughput.sums = {}
    throughput.ended("default", "mail", "completed", 10, [0.5])
    throughput.counts = {}
    throughput.ended("default", "mail", "completed", 5, [0.5])
    assert throughput.sums["default", "mail"].ends == {"completed": 15}
    assert throughput.counts["default", "mail"].ends == {"completed": 5}


def test_buckets_count_what_is_not_above_them() -> None:
    counts = Counts()
    throughput = Throughput()
    throughput.sums = {("q", "k"): counts}
    for seconds in (0.00001, 0.01, 0.5, 0.9, 100.0, 1e9):
        throughput.ended("q", "k", "completed", 1, [seconds])
    made = dict(buckets(counts.run_times))
    assert (made["0.25"], made["1.0"], made["+Inf"]) == (2, 4, 6)
    assert [float(bound) for bound in made] == [*BOUNDS[::4], float("inf")]
    assert list(made.values()) == sorted(made.values())


def test_labels_are_limited() -> None:
    def counts() -> Counts:
        return Counts(ends={"completed": 1}, items=2)

    shown = first_pairs({("q", f"kind {number}"): counts() for number in range(MOST_PAIRS + 30)})
    assert len(shown) == MOST_PAIRS + 1
    assert (shown["other", "other"].ends, shown["other", "other"].items) == ({"completed": 30}, 60)
    row = {"ready": 1, "scheduled": 0, "waiting": 2, "processing": 0, "stalled": 0, "failed": 0, "workers": 1}
    row |= {"held_back": 1, "held_back_by": "max_running", "waiting_for_failed": 1}
    rows = [
        row | {"queue": "q", "kind": str(number), "oldest_wait_seconds": number} for number in range(MOST_PAIRS + 30)
    ]
    other = bounded_rows(rows)[-1]
    assert (other["kind"], other["ready"], other["oldest_wait_seconds"]) == ("other", 30, MOST_PAIRS + 29)
    assert (other["held_back"], other["held_back_by"]) == (30, "max_running")
    assert (other["waiting"], other["waiting_for_failed"]) == (60, 30)
    assert len(bounded_rows(rows)) == MOST_PAIRS + 1


def test_hostile_labels_stay_one_label_each() -> None:
    kind = 'a"} 1\nbatchq_fake{x="'
    row = {"queue": "\\", "kind": kind, "ready": 3, "scheduled": 0, "processing": 0, "stalled": 0, "failed": 0}
    row |= {"oldest_wait_seconds": None, "workers": 0, "held_back": 0, "held_back_by": None}
    row |= {"waiting": 0, "waiting_for_failed": 0}
    limit = {"queue": "\\", "kind": kind, "max_running": 4, "per_second": None, "items_per_second": None, "running": 1}
    text = exposition(lambda: queue_metrics([row], 1, [limit])).decode()
    shown = samples(text)
    assert shown[labelled("batchq_queue_depth", queue="\\", kind=kind, state="ready")] == 3
    assert shown[labelled("batchq_limit", queue="\\", kind=kind, limit="max_running")] == 4
    assert not [name for name, _ in shown if "fake" in name]
    assert exposition(lambda: worker_metrics({}, {}))


def test_the_page_shows_the_queues(conn: Conn, dsn: str) -> None:
    insert(conn)
    lost = processing(conn, kind="lost")
    expire_lease(conn, lost.id, 60)
    with served(dsn) as site:
        shown = samples(site.client.get("/metrics").text)
    assert shown[labelled("batchq_queue_depth", queue="default", kind="work", state="ready")] == 1
    assert shown[labelled("batchq_stalled", queue="default", kind="lost")] == 1
    assert shown[labelled("batchq_oldest_wait_seconds", queue="default", kind="work")] >= 0
    assert shown[labelled("batchq_serving_workers", queue="default", kind="work")] == 0
    assert shown[labelled("batchq_workers")] == 0


def test_the_page_shows_the_limits_and_what_they_hold_back(conn: Conn, dsn: str) -> None:
    insert(conn)
    conn.execute("SELECT batchq.set_limit('default', 'work', max_running => 10, per_second => 50)")
    conn.execute("SELECT batchq.set_limit('mail', items_per_second => 'infinity')")
    conn.execute(
        "INSERT INTO batchq.limit_shares (queue, kind, worker, in_use, starts_per_second, lease_seconds, held_back_by) "
        "VALUES ('default', 'work', 'a', 3, 48, 15, 'max_running,per_second')"
    )
    with served(dsn) as site:
        shown = samples(site.client.get("/metrics").text)
    of_kind, of_queue = {"queue": "default", "kind": "work"}, {"queue": "mail", "kind": ""}
    for limit, number, in_use in (("max_running", 10, 3), ("per_second", 50, 48)):
        assert shown[labelled("batchq_limit", **of_kind, limit=limit)] == number
        assert shown[labelled("batchq_limit_in_use", **of_kind, limit=limit)] == in_use
        assert shown[labelled("batchq_held_back", **of_kind, by=limit)] == 1
    assert shown[labelled("batchq_limit", **of_queue, limit="items_per_second")] == float("inf")
    assert labelled("batchq_limit", **of_queue, limit="max_running") not in shown


if __name__ == "__main__":
    run_alone(__file__)
