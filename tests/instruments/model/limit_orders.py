"""Every order of two transactions where limits count: claims of one key beside whatever else happens to its batches,
and shares of one limit beside a change of it."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any
from uuid import UUID

from batchq.postgres.statements import claims, shares
from batchq.postgres.statements.running import Statement
from batchq.postgres.statements.shares import Report
from tests.instruments.model import orders
from tests.instruments.model.orders import (
    CLAIMED,
    FAILED,
    FAILED_ITEMS,
    LEASE_SECONDS,
    STAGE,
    Case,
    Operation,
    call,
    merges,
)

KEYED = (
    "INSERT INTO batchq.batches (id, queue, kind, key, unique_key, items, items_done, items_failed, attempt, status, "
    "claimed_by, claimed_at, claim_token, lease_expires_at, run_at)\nOVERRIDING SYSTEM VALUE\n"
    "SELECT {}, 'q', 'k', 'key', 'key ' || {}, '[\"a\", \"b\", \"c\", \"d\"]', 1, 1, 1, {}, '2020-01-01'"
)
WAITS = "'pending', NULL, {}, NULL, NULL::timestamptz"


def keyed(first: str) -> str:
    """Return the statements that insert batches 1, in its stage, and 2, which waits; both with the same key."""
    return "; ".join([KEYED.format(1, 1, first), KEYED.format(2, 2, WAITS.format("NULL"))])


# By the stage: that of batch 1 as other operations know it, and how it is inserted.
KEY_STAGES = {
    "its key waits": ("pending", keyed(WAITS.format("NULL"))),
    "its key has begun": ("pending", keyed(WAITS.format("now()"))),
    "its key runs": ("processing", keyed(f"{CLAIMED}, now() + interval '10 min'")),
    "its key's lease is over": ("expired", keyed(f"{CLAIMED}, now() - interval '10 min'")),
}
# One runs, and one of each kind waits. Claims of different kinds find different batches: only the lock of the key keeps
# a limit of two.
TWO_KINDS_STAGE = "its key runs, and two kinds wait"
OF_OTHER_KIND = "INSERT INTO batchq.batches (id, queue, kind, key) OVERRIDING SYSTEM VALUE VALUES (3, 'q', 'k2', 'key')"
SHARED = (
    "INSERT INTO batchq.limits (queue, max_running) VALUES ('q', 4); "
    "INSERT INTO batchq.limit_shares (queue, worker, running, wanted_running, lease_seconds) "
    "VALUES ('q', 'w1', 2, 2, 60)"
)
SHARE_STAGE = "one has half"
STAGE.update({name: insert for name, (_, insert) in KEY_STAGES.items()})
STAGE.update({TWO_KINDS_STAGE: f"{KEY_STAGES['its key runs'][1]}; {OF_OTHER_KIND}", SHARE_STAGE: SHARED})
FAILED_ITEMS.update(dict.fromkeys(KEY_STAGES, FAILED.format("now()")))
# Not in these orders: a claim of a key takes what it has found by the ids, whatever priority that gets meanwhile.
UNORDERED = "set priority"
LIMITS = (None, 1, 2)


def claim_keyed(worker: int, most: int | None, kind: str = "k") -> Operation:
    """Return the claim of a key by a worker: it locks the key if it has a limit, finds what may run, and claims it."""
    find = claims.ready_of_keys("q", [kind], [None], most, "", None, 100, 10, 10, {})
    take = partial(take_found, worker)
    name = f"claim of a key by {worker}" + ("" if most is None else f", at most {most}")
    name += "" if kind == "k" else f" of kind {kind}"
    return Operation(name, find, ["pending", "processing", "expired"], skips_locked=True, then=take)


def take_found(worker: int, rows: Sequence[Any]) -> Statement | None:
    """Return the claim of what was found."""
    ids = [batch_id for row in rows for batch_id in row[1] or ()]
    return claims.claim_keyed("q", ids, f"w{worker}", UUID(int=worker), LEASE_SECONDS) if ids else None


def others() -> Iterator[Operation]:
    """Yield what may happen to the batches of a key meanwhile."""
    live = ["pending", "processing", "expired"]
    for priority in (0, -5):
        insert = call(
            "INSERT INTO batchq.batches (queue, kind, key, priority) VALUES ('q', 'k', 'key', %(priority)s)",
            priority=priority,
        )
        yield Operation(f"enqueue its key with priority {priority}", insert, live)
    for operation in orders.operations():
        if not (operation.may_give_way or operation.name.startswith(UNORDERED)):
            yield operation


def key_cases() -> Iterator[Case]:
    """Yield every order of a claim of a key and of something else, in each stage that concerns both."""
    for most in LIMITS:
        claim = claim_keyed(2, most)
        for other in (claim_keyed(3, most), *others()):
            for stage, (stage_of_first, _) in KEY_STAGES.items():
                if stage_of_first in other.stages:
                    for order in merges(claim, other):
                        yield Case(claim, other, stage, order, most_of_key=most)
    yield from two_kinds_cases()


def two_kinds_cases() -> Iterator[Case]:
    """Yield every order of two claims of a key, of different kinds, of which only one may find room."""
    one, other = claim_keyed(2, 2), claim_keyed(3, 2, "k2")
    for order in merges(one, other):
        yield Case(one, other, TWO_KINDS_STAGE, order, most_of_key=2)


def share_operations() -> Iterator[Operation]:
    """Yield what happens to the shares of a limit."""
    for worker, holds in (("w1", 2), ("w2", 0)):
        for wanted in (1, 10):
            report = Report("q", "", holds, wanted, 0.0, 0.0, 0.0, 0.0, min(holds, wanted), None)
            take = shares.take_shares(worker, 60.0, [report])
            yield Operation(f"take shares, {worker} wants {wanted}", take, [SHARE_STAGE])
    yield Operation("return shares", call("SELECT batchq.return_shares('w1')"), [SHARE_STAGE])
    for limit in (1, 8):
        change = call("UPDATE batchq.limits SET max_running = %(limit)s WHERE queue = 'q'", limit=limit)
        yield Operation(f"change the limit to {limit}", change, [SHARE_STAGE])
    set_limit = call("SELECT batchq.set_limit('q', max_running => 3)")
    yield Operation("set the limit to 3", set_limit, [SHARE_STAGE])
    yield Operation("remove the limit", call("SELECT batchq.set_limit('q')"), [SHARE_STAGE])


def share_cases() -> Iterator[Case]:
    """Yield every order of two operations on the shares of a limit."""
    table = list(share_operations())
    for number, one in enumerate(table):
        for other in table[number:]:
            for order in merges(one, other):
                yield Case(one, other, SHARE_STAGE, order)
