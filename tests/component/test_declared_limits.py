"""Limits that code declares: written when a worker starts, valid where batchq.limits has no number."""

from typing import Any

import psycopg
import pytest

import batchq
from batchq.errors import ConfigError
from batchq.testing import running_worker
from tests.support.alone import run_alone
from tests.support.batches import await_status, drain, put

DECLARED = (
    "SELECT queue, kind, max_running, per_second, items_per_second, burst_seconds, max_running_per_key "
    "FROM batchq.declared_limits ORDER BY queue, kind"
)
IN_FORCE = "SELECT max_running, per_second, max_running_per_key FROM batchq.limits_in_force WHERE kind = 'a'"


def app_with(**limits: Any) -> batchq.App:
    """Return an app whose kind a has these limits."""
    app = batchq.App()

    @app.handler("a", **limits)
    def work(batch: batchq.Batch) -> None:
        pass

    return app


def test_a_worker_writes_what_its_handlers_declare_in_each_of_its_queues(dsn: str, conn: psycopg.Connection) -> None:
    app = app_with(max_running=3, per_second=float("inf"), max_running_per_key=1)

    @app.item_handler("items", items_per_second=50, burst_seconds=2)
    def one(item: int) -> None:
        pass

    @app.handler("free")
    def free(batch: batchq.Batch) -> None:
        pass

    drain(app, dsn, queues=("default", "mail"))
    assert conn.execute(DECLARED).fetchall() == [
        (queue, *row)
        for queue in ("default", "mail")
        for row in (("a", 3, float("inf"), None, 1.0, 1), ("items", None, None, 50.0, 2.0, None))
    ]


def test_the_worker_that_starts_last_is_right_and_deletes_what_it_does_not_declare(
    dsn: str, conn: psycopg.Connection
) -> None:
    drain(app_with(max_running=3), dsn)
    drain(app_with(max_running=5), dsn)
    assert conn.execute(IN_FORCE).fetchall() == [(5, None, None)]
    drain(app_with(), dsn)
    assert conn.execute(DECLARED).fetchall() == []


def test_a_number_of_the_table_is_valid_instead_and_only_that_number(dsn: str, conn: psycopg.Connection) -> None:
    conn.execute("INSERT INTO batchq.limits (kind, max_running) VALUES ('a', 7)")
    drain(app_with(max_running=3, per_second=4), dsn)
    assert conn.execute(IN_FORCE).fetchall() == [(7, 4.0, None)]
    conn.execute("DELETE FROM batchq.limits")
    assert conn.execute(IN_FORCE).fetchall() == [(3, 4.0, None)]


def test_without_a_limit_nothing_is_written(dsn: str, conn: psycopg.Connection) -> None:
    with conn.transaction():
        conn.execute("LOCK TABLE batchq.declared_limits IN SHARE ROW EXCLUSIVE MODE")
        with running_worker(app_with(), dsn):
            await_status(conn, _put_elsewhere(dsn), "completed")


def _put_elsewhere(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as other:
        return put(other, "a")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_running": -1}, "max_running of 'a' is a whole number from 0 up, not -1"),
        ({"max_running": 1.5}, "max_running of 'a' is a whole number from 0 up, not 1.5"),
        ({"max_running": True}, "max_running of 'a' is a whole number from 0 up, not True"),
        ({"max_running": 2**31}, "max_running of 'a' is a whole number from 0 up, not 2147483648"),
        ({"max_running_per_key": "1"}, "max_running_per_key of 'a' is a whole number from 0 up, not '1'"),
        ({"per_second": -0.5}, "per_second of 'a' is a number from 0 up, not -0.5"),
        ({"per_second": float("nan")}, "per_second of 'a' is a number from 0 up, not nan"),
        ({"per_second": "5"}, "per_second of 'a' is a number from 0 up, not '5'"),
        ({"burst_seconds": 0}, "burst_seconds of 'a' is a number from 0.001 to 3600, not 0"),
        ({"burst_seconds": 3601}, "burst_seconds of 'a' is a number from 0.001 to 3600, not 3601"),
    ],
)
def test_a_number_that_is_no_limit_is_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        app_with(**limits)


def test_items_per_second_is_for_item_handlers() -> None:
    with pytest.raises(TypeError, match="items_per_second"):
        app_with(items_per_second=5)


if __name__ == "__main__":
    run_alone(__file__)
