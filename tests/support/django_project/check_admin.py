"""Batches in Django's admin."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext, override_settings

from batchq.common import sealed
from batchq.contrib.django import admin
from batchq.testing import encryption_keys
from tests.support.django_project import tasks

Sql = Callable[..., list[Any]]
Run = Callable[..., None]
LIST = "/admin/batchq/batch/"


@pytest.fixture(autouse=True)
def tables(db: str) -> None:
    """Make Django's own tables."""
    call_command("migrate", verbosity=0)


def client_of(*permissions: str) -> Client:
    """Return a client logged in as a member of the staff with these permissions."""
    user = User.objects.create_user(f"user-{'-'.join(permissions)}", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client(headers={"host": "localhost"})
    client.force_login(user)
    return client


@pytest.fixture
def operator() -> Iterator[Client]:
    """Return the client of a user who may do everything here."""
    with override_settings(ALLOWED_HOSTS=["localhost"]):
        yield client_of("view_batch", "operate_batch")


def shown(client: Client, query: str = "") -> list[int]:
    """Return the ids in the list, as they are shown."""
    answer = client.get(LIST + query)
    assert answer.status_code == 200
    return [int(found) for found in re.findall(r"/admin/batchq/batch/(\d+)/change/", answer.text)]


def act(client: Client, action: str, *ids: int, across: int = 0) -> str:
    """Do an action; return the page after it."""
    data = {"action": action, "_selected_action": ids, "select_across": across}
    return client.post(LIST, data, follow=True).text


def test_sealed_values_are_shown_by_their_key_only(operator: Client, sql: Sql, run: Run) -> None:
    with encryption_keys(sealed.new_key("2026-11")):
        tasks.add.enqueue(4711, b=2)
        run()
        page = operator.get(f"{LIST}1/change/").text
    assert page.count("sealed with key 2026-11") == 2
    assert "batchq:sealed" not in page


def test_the_list_shows_the_newest_first_and_filters(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind, queue) VALUES ('a', 'default'), ('b', 'mail'), ('a', 'mail')")
    sql("SELECT batchq.cancel(1)")
    assert shown(operator) == [3, 2, 1]
    assert shown(operator, "?queue=mail") == [3, 2]
    assert shown(operator, "?kind=a") == [3, 1]
    assert shown(operator, "?kind=a&status=ready") == [3]
    assert shown(operator, "?status=cancelled") == [1]
    assert [shown(operator, f"?status={status}") for status in ("processing", "stalled", "waiting", "failed")] == [
        []
    ] * 4
    page = operator.get(f"{LIST}?queue=of-yesterday").text
    assert "of-yesterday" in page
    assert "?queue=mail" in page


def test_the_search_is_for_an_id(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind) SELECT 'a' FROM generate_series(1, 12)")
    assert shown(operator, "?q=12") == [12]
    assert [shown(operator, f"?q={text}") for text in ("13", "x", "%C2%B2", "9" * 30)] == [[]] * 4


def test_the_page_of_a_batch_shows_payload_result_errors_and_failed_items(operator: Client, sql: Sql, run: Run) -> None:
    good, bad = tasks.add.enqueue(40, b=2), tasks.fail_once.enqueue()
    run()
    page = operator.get(f"{LIST}{good.id}/change/").text
    assert "&quot;args&quot;" in page
    assert "<pre>42</pre>" in page
    assert 'name="_save"' not in page
    page = operator.get(f"{LIST}{bad.id}/change/").text
    assert "Attempt 1" in page
    assert "OwnError: once" in page
    sql("INSERT INTO batchq.batches (kind, items) VALUES ('i', '[\"<b>\"]')")
    sql("INSERT INTO batchq.failed_items VALUES ('default', 3, 0, '\"<b>\"', 'ValueError: <i>', 1)")
    page = operator.get(f"{LIST}3/change/").text
    assert "&quot;&lt;b&gt;&quot;" in page
    assert "ValueError: &lt;i&gt;" in page
    assert operator.get(f"{LIST}4/change/").status_code == 302, "there is none"


def test_actions_cancel_retry_and_retry_failed_items(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind) VALUES ('a'), ('a'), ('a')")
    statuses = "SELECT status FROM batchq.all_batches ORDER BY id"
    assert "Cancel: 2 selected." in act(operator, "cancel", 1, 2)
    assert sql(statuses) == [("cancelled",), ("cancelled",), ("pending",)]
    act(operator, "retry_items", 1, 2)
    assert sql(statuses) == [("cancelled",), ("cancelled",), ("pending",)], "none has failed items"
    act(operator, "retry", 1)
    assert sql(statuses) == [("pending",), ("cancelled",), ("pending",)]
    audit = sql("SELECT verb, batch_id, actor, reason FROM batchq.audit ORDER BY id")
    who = ("django:user-view_batch-operate_batch", "in Django's admin")
    assert audit == [("cancel", 1, *who), ("cancel", 2, *who), ("retry", 1, *who)]


def test_who_may_not_operate_has_no_actions(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind) VALUES ('a')")
    viewer, stranger = client_of("view_batch"), client_of()
    assert shown(viewer) == [1]
    assert 'name="action"' not in viewer.get(LIST).text
    act(viewer, "cancel", 1)
    assert sql("SELECT status FROM batchq.all_batches") == [("pending",)]
    assert [stranger.get(path).status_code for path in (LIST, f"{LIST}1/change/")] == [403, 403]


def test_nobody_adds_changes_or_deletes_a_batch(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind) VALUES ('a')")
    for client in (operator, client_of("view_batch")):
        assert client.post(f"{LIST}1/change/", {"kind": "b"}).status_code == 403
        assert client.post(f"{LIST}1/delete/", {"post": "yes"}).status_code == 403
        assert client.post(f"{LIST}add/", {"kind": "b"}).status_code == 403
    assert sql("SELECT kind FROM batchq.all_batches") == [("a",)]


def test_an_action_on_all_of_very_many_is_refused(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind) SELECT 'a' FROM generate_series(1, %s)", admin.MOST_SELECTED + 1)
    assert "More than 1000 batches are selected" in act(operator, "cancel", 1, across=1)
    assert sql("SELECT DISTINCT status FROM batchq.all_batches") == [("pending",)]


def test_a_page_of_the_list_never_counts_or_reads_all_rows(operator: Client, sql: Sql) -> None:
    sql("INSERT INTO batchq.batches (kind) SELECT 'a' FROM generate_series(1, 50000)")
    sql(
        "INSERT INTO batchq.batches (kind, status, finished_at) "
        "SELECT 'b', 'completed', now() FROM generate_series(1, 50000)"
    )
    sql("ANALYZE batchq.batches_live")
    sql("ANALYZE batchq.batches_finished")
    expected = {"": 100, "?p=3": 100, "?kind=b": 100, "?status=ready&queue=default": 100, "?all=": 100}
    expected |= {"?q=77": 1} | {f"?status={status}": 0 for status in ("processing", "stalled", "waiting", "failed")}
    for query, count in expected.items():
        with CaptureQueriesContext(
            connection,
        ) as captured:
            assert len(shown(operator, query)) == count
        own = [done["sql"] for done in captured.captured_queries if '"batchq"."status"' in done["sql"]]
        assert len(own) == (2 if count else 1), "one search, and one for the rows that it has found"
        for statement in own:
            assert "COUNT(" not in statement
            assert "LIMIT" in statement or '"id" IN' in statement, statement
            if "kind" not in query:  # no index has the kind: one search reads past those of others
                assert most_rows_read(sql, statement) < 5000, statement


def most_rows_read(sql: Sql, statement: str) -> int:
    """Return how many rows the busiest node of a plan has read."""
    [(plan,)] = sql("EXPLAIN (ANALYZE, FORMAT JSON) " + statement.replace("%", "%%"))

    def rows(node: dict[str, Any]) -> int:
        own = node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0)
        return int(max([own, *map(rows, node.get("Plans", []))]))

    return rows(plan[0]["Plan"])
