"""The looks of claimers: what is ready, by queue, kind, priority, time, status and position, each on its own.

A look that sees too much costs a claim that finds nothing, again and again; one that sees too little leaves work lying.
"""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from batchq.postgres.statements import claims, probes
from batchq.postgres.statements.claims import END, START, Position
from tests.component.rows import (
    KIND,
    Conn,
    claim,
    has_unknown_priority,
    insert,
    is_ready_between,
    priorities,
    ready_priorities,
    value,
)
from tests.support.alone import run_alone

AN_HOUR = {"run_at": "2000-01-01 01:00:00+00"}
AT_ONE = 946_688_400.0  # the same, in seconds


def by_one(conn: Conn, after: Position = START, until: Position = END) -> bool:
    """Look at one priority, as an idle worker does."""
    return probes.has_ready(conn, "default", 0, [KIND], after).is_ready


def by_several(conn: Conn, after: Position = START, until: Position = END) -> bool:
    """Look at several priorities, as a worker of several does; 7 is never used."""
    return ready_priorities(conn, "default", [KIND], {0: after, 7: START}) == [0]


def by_part(conn: Conn, after: Position = START, until: Position = END) -> bool:
    """Look at a part, as a sweep does."""
    return is_ready_between(conn, "default", 0, [KIND], after, until)


Look = Callable[..., bool]
looks = pytest.mark.parametrize("look", [by_one, by_several, by_part])


@looks
def test_what_is_ready_is_seen(conn: Conn, look: Look) -> None:
    assert not look(conn)
    insert(conn)
    assert look(conn)


@looks
@pytest.mark.parametrize(
    "columns",
    [
        {"queue": "other"},
        {"kind": "unknown"},
        {"priority": 1},
        {"priority": -1},
        {"run_at": "2100-01-01"},
    ],
    ids=str,
)
def test_what_is_not_ready_for_it_is_not_seen(conn: Conn, look: Look, columns: dict[str, Any]) -> None:
    insert(conn, **columns)
    assert not look(conn)
    insert(conn)
    assert look(conn), "what lies beside it is"


@looks
def test_what_is_claimed_is_not_seen(conn: Conn, look: Look) -> None:
    insert(conn)
    assert len(claim(conn)) == 1
    assert not look(conn)


@looks
def test_a_look_is_behind_its_position(conn: Conn, look: Look) -> None:
    batch_id = insert(conn, **AN_HOUR)
    assert look(conn, Position(AT_ONE, batch_id - 1))
    assert not look(conn, Position(AT_ONE, batch_id))
    assert look(conn, Position(AT_ONE - 1, batch_id + 1))
    assert not look(conn, Position(AT_ONE + 1, 0))


def test_a_look_at_a_part_ends_with_the_part(conn: Conn) -> None:
    batch_id = insert(conn, **AN_HOUR)
    assert by_part(conn, START, Position(AT_ONE, batch_id))
    assert not by_part(conn, START, Position(AT_ONE, batch_id - 1))
    assert not by_part(conn, START, Position(AT_ONE - 1, batch_id))


@pytest.mark.parametrize("gone", ["queue", "status"])
def test_priorities_are_those_of_what_waits_in_the_queue(conn: Conn, gone: str) -> None:
    insert(conn, priority=3)
    assert priorities(conn, "default") == [3]
    assert has_unknown_priority(conn, "default", [])
    assert not has_unknown_priority(conn, "default", [3])
    if gone == "queue":
        conn.execute("UPDATE batchq.batches SET queue = 'other'")
    else:
        claim(conn, priority=3)
    assert priorities(conn, "default") == []
    assert not has_unknown_priority(conn, "default", [])


def test_a_priority_between_known_ones_and_beyond_them_is_unknown(conn: Conn) -> None:
    for priority in (-5, 0, 5):
        insert(conn, priority=priority)
        known = {-5, 0, 5} - {priority}
        assert has_unknown_priority(conn, "default", known)
        assert not has_unknown_priority(conn, "default", known | {priority})


def test_a_claim_of_unknown_outcome_is_given_back_in_its_own_queue_alone(conn: Conn) -> None:
    insert(conn)
    token = uuid4()
    claim(conn, token=token)
    assert claims.release_claim(conn, "other", token) == 0
    assert value(conn, "SELECT status FROM batchq.all_batches") == "processing"
    assert claims.release_claim(conn, "default", token) == 1


if __name__ == "__main__":
    run_alone(__file__)
