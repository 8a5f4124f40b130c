"""Which layout of tables the tests run on, and what the second one (`batchq distribute`) does otherwise.

BATCHQ_TEST_LAYOUT is `plain` (the default); `distributed`, the second layout on a plain Postgres; or `citus`, the same
on the cluster whose coordinator BATCHQ_TEST_DSN names.
"""

import os

import psycopg

from batchq.operate.distribute import distribute

LAYOUTS = ("plain", "distributed", "citus")

DISTRIBUTED = {
    "component/test_distribute.py": "the command, and what is special on this layout",
    "component/test_claim.py": "claims, by their second form",
    "component/test_batch_process.py": "a worker, from claim to finish",
    "component/test_leases.py": "the fence, renewals, rescues",
    "component/test_items.py": "checkpoints and failed items",
    "component/test_keep_completed.py": "the finish that deletes, by its second form",
    "component/test_finisher.py": "finishes, many at a time",
    "component/test_transactions.py": "handlers' transactions",
    "component/test_verbs.py": "verbs on one batch",
    "component/test_bulk_verbs.py": "verbs on many",
    "component/test_keys.py": "keys, in turn and in order",
    "component/test_permits.py": "limits",
    "component/test_throttled.py": "throttles",
    "component/test_flows.py": "flows, without triggers",
    "component/test_spread.py": "spread batches, without triggers",
    "component/test_schedules.py": "schedules",
    "component/test_protocol.py": "workers in other languages",
    "component/test_retention.py": "partitions by day",
    "component/test_views.py": "what people see",
    "component/test_invariants.py": "what must be true of all rows",
    "integration/test_model.py": "the model, step by step",
    "integration/test_flows.py": "flows under kills",
    "integration/test_limits.py": "limits under kills",
    "integration/test_monitor.py": "what a monitor sees",
}
"""Files that run on the second layout too, and why: `bin/test distributed --layout distributed`."""

_AT_ONCE = "a trigger does it in the INSERT; on this layout a worker does it, within half a second"
_BY_HAND = "on this layout, nobody notices what a person deletes or truncates by hand"
_FINISHED_ROW = "on this layout, no finished row can be inserted into batchq.batches, and no row be updated to one"
PLAIN_ONLY = {
    "component/test_flows.py::test_any_client_can_let_a_batch_wait": _AT_ONCE,
    "component/test_flows.py::test_a_completed_batch_that_is_not_kept_counts": "on this layout it is kept",
    "component/test_flows.py::test_a_needed_batch_that_a_person_deletes_counts_as_cancelled": _BY_HAND,
    "component/test_flows.py::test_a_truncate_forgets_flows": _BY_HAND,
    "component/test_flows.py::test_the_table_refuses_by_name": _AT_ONCE,
    "component/test_flows.py::test_a_batch_of_a_transaction_that_is_open_does_not_exist_for_others": _AT_ONCE,
    "component/test_flows.py::test_an_idle_worker_goes_on_at_once": _AT_ONCE,
    "component/test_flows.py::test_a_waiting_batch_that_somebody_has_locked_delays_only_itself": "it counts events",
    "component/test_flows.py::test_events_that_were_dealt_with_are_not_read_again_while_a_snapshot_is_held": (
        "on this layout, the index of a day is read for each day"
    ),
    "component/test_flows.py::test_counting_ends_costs_the_same_however_many_were_counted_while_a_snapshot_is_held": (
        _BY_HAND
    ),
    "component/test_spread.py::test_parts_that_somebody_deletes_count_as_cancelled": _BY_HAND,
    "component/test_spread.py::test_rows_of_parts_go_with_their_batch": _BY_HAND,
    "component/test_invariants.py::test_what_a_hostile_client_does_is_named": _FINISHED_ROW,
    "component/test_invariants.py::test_ranges_of_parts_begin_where_the_batch_itself_has_come": (
        "on this layout, items_total is set with items"
    ),
    "component/test_retention.py::test_a_day_whose_batches_lie_in_the_default_partition_is_left_there": _FINISHED_ROW,
    "component/test_retention.py::test_a_partition_has_the_indexes_and_checks_of_its_parent": "it has one CHECK more",
    "component/test_retention.py::test_as_many_days_as_may_be_kept_leave_room_for_three_looks_over_all_of_them": (
        "an index more for each day: 366 days leave room"
    ),
    "component/test_views.py::test_times_tell_how_old_a_batch_is_and_how_long_its_attempt_ran": _FINISHED_ROW,
    "component/test_views.py::test_a_queue_shows_how_many_batches_are_where": _FINISHED_ROW,
    "component/test_views.py::test_failed_batches_beyond_the_bound_are_told_as_at_least_so_many": _FINISHED_ROW,
    "component/test_views.py::test_failures_are_the_latest_500_however_old": _FINISHED_ROW,
}
"""Tests that look at what the second layout does otherwise, FILE::FUNCTION, and why."""


def lay_out(dsn: str) -> None:
    """Give a migrated database the layout that the environment asks for."""
    if layout() != "plain":
        with psycopg.connect(dsn, autocommit=True) as conn:
            list(distribute(conn, with_citus=layout() == "citus"))


def layout() -> str:
    """Return the layout that the environment asks for. Raises ValueError for one that is not known."""
    name = os.environ.get("BATCHQ_TEST_LAYOUT") or "plain"
    if name not in LAYOUTS:
        raise ValueError(f"BATCHQ_TEST_LAYOUT is {name!r}; it can be {', '.join(LAYOUTS)}")
    return name
