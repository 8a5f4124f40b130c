"""Every order of two transactions around flows and parts: releases beside whatever else happens to the batches that
wait and to those that are needed; the spread of a batch, the ends of its parts, and what people do to it meanwhile."""

from collections.abc import Iterable, Iterator
from typing import Any
from uuid import UUID

from batchq.postgres.statements import checkpoints, claims, endings, leases
from batchq.postgres.statements.checkpoints import ItemFailure, Progress
from batchq.postgres.statements.endings import KEPT, Finish, Requeue
from tests.instruments.model.orders import (
    CLAIMED,
    LEASE_SECONDS,
    NEW_TOKEN,
    STAGE,
    TOKEN,
    Case,
    Operation,
    call,
    merges,
)

PART, OTHER_PART = 1000, 1001  # ids
PART_TOKEN = UUID(int=3)
LIVE = "'{pending,processing,waiting}'"

# ---------------------------------------------------------------------------------------------- stages: flows
# Batch 1 is needed by 2, and 2 by 3.

NEEDED = (
    "INSERT INTO batchq.batches (id, queue, kind, attempt, status, claimed_by, claimed_at, claim_token, "
    "lease_expires_at, run_at, finished_at) OVERRIDING SYSTEM VALUE VALUES (1, 'q', 'k', 1, {}, '2020-01-01', {})"
)
WAITING = (
    "INSERT INTO batchq.batches (id, queue, kind, after, on_failure, run_at) OVERRIDING SYSTEM VALUE "
    "VALUES (2, 'q', 'k', '{1}', 'ON FAILURE', '2020-01-01'), (3, 'q', 'k', '{2}', 'cancel', '2020-01-01')"
)
HELD = f"{CLAIMED}, now() + interval '10 min'"
PENDING = NEEDED.format("'pending', NULL, NULL, NULL, NULL::timestamptz", "NULL")
RUNS = NEEDED.format(HELD, "NULL")
FAILED = NEEDED.format("'failed', 'w1', now(), NULL, NULL::timestamptz", "now()")
FLOW_STAGES = {
    "needed pending": f"{PENDING}; {WAITING}",
    "needed runs": f"{RUNS}; {WAITING}",
    "needed runs, not marked": f"{RUNS}; {WAITING}; UPDATE batchq.batches SET is_needed = NULL WHERE id = 1; "
    "INSERT INTO batchq.flow_events (needed_id) VALUES (1)",
    "needed cancelled": f"{RUNS}; {WAITING}; SELECT batchq.cancel(1)",
    "needed failed": f"{FAILED}; {WAITING}",
    "needed failed, as is known": f"{FAILED}; {WAITING}; SELECT batchq.follow_flows(0) FROM generate_series(1, 3)",
    "needed failed long ago": (
        f"{FAILED}; {WAITING}; UPDATE batchq.batches SET finished_at = now() - interval '40 days' WHERE id = 1"
    ),
    "waiting cancelled": f"{RUNS}; {WAITING}; SELECT batchq.cancel(2)",
}
ON_FAILURE = ("wait", "run", "cancel")
STAGE |= {
    f"{name}, {on_failure}": text.replace("ON FAILURE", on_failure)
    for name, text in FLOW_STAGES.items()
    for on_failure in ON_FAILURE
}

# ---------------------------------------------------------------------------------------------- stages: parts
# Batch 1 has four items, and 2 waits for it.

WHOLE = (
    "INSERT INTO batchq.batches (id, queue, kind, items, attempt, status, claimed_by, claimed_at, claim_token, "
    "lease_expires_at, run_at) OVERRIDING SYSTEM VALUE "
    "VALUES (1, 'q', 'k', '[\"a\", \"b\", \"c\", \"d\"]', 1, {}, '2020-01-01'); "
    "INSERT INTO batchq.batches (id, queue, kind, after, on_failure, run_at) OVERRIDING SYSTEM VALUE "
    "VALUES (2, 'q', 'k', ARRAY[1], 'run', '2020-01-01')"
)
CLAIM_WHOLE = (
    f"UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'w1', claimed_at = now(), "
    f"claim_token = '{TOKEN}', lease_expires_at = now() + interval '10 min' WHERE id = 1"
)
WAIT_PARTS = (
    f"{WHOLE.format(HELD)}; SELECT batchq.spread_batch('q', 1, '{TOKEN}', 2); "
    "UPDATE batchq.batches_live SET run_at = '2020-01-01' WHERE part_of = 1"
)
RUN_PARTS = (
    f"{WAIT_PARTS}; UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'w2', "
    f"claimed_at = now(), claim_token = '{PART_TOKEN}', lease_expires_at = now() + interval '10 min' WHERE part_of = 1"
    f"; UPDATE batchq.batches_live SET items_failed = 1 WHERE id = {PART}; "
    "INSERT INTO batchq.failed_items (queue, batch_id, item_index, item, error, attempt) "
    f"VALUES ('q', {PART}, 0, '\"a\"', 'no', 1)"
)


def end_part(part: int, status: str = "completed") -> str:
    """Return the statement that ends a part in a stage: completed with all its items, or as it is."""
    done = "items_total - items_failed" if status == "completed" else "items_done"
    return (
        f"WITH gone AS (DELETE FROM batchq.batches_live WHERE id = {part} RETURNING *) "
        f"INSERT INTO batchq.batches_finished ({KEPT}, status, items_done, errors, finished_at) "
        f"OVERRIDING SYSTEM VALUE SELECT {KEPT}, '{status}', {done}, errors, now() FROM gone"
    )


CANCEL = "SELECT batchq.cancel(1)"
PARTS_STAGES = {
    "to be spread": WHOLE.format(HELD),
    "to be spread, its lease is over": WHOLE.format(f"{CLAIMED}, now() - interval '10 min'"),
    "parts wait": WAIT_PARTS,
    "parts run": RUN_PARTS,
    "one part has ended": f"{RUN_PARTS}; {end_part(PART)}",
    "all parts have ended": f"{RUN_PARTS}; {end_part(PART)}; {end_part(OTHER_PART)}",
    "one part has failed": f"{RUN_PARTS}; {end_part(PART, 'failed')}",
    "whole cancelled": f"{RUN_PARTS}; {end_part(OTHER_PART)}; {CANCEL}",
    "whole cancelled after its last item": f"{RUN_PARTS}; {end_part(PART)}; {end_part(OTHER_PART)}; {CANCEL}",
    "to be spread again": (f"{RUN_PARTS}; {end_part(OTHER_PART)}; {CANCEL}; SELECT batchq.retry(1); {CLAIM_WHOLE}"),
}
STAGE |= PARTS_STAGES

# ------------------------------------------------------------------------------------------------- operations: flows


def staged(*names: str) -> list[str]:
    """Return stages of flows, for each value of on_failure."""
    return [f"{name}, {on_failure}" for name in names for on_failure in ON_FAILURE]


EVERYWHERE = staged(*FLOW_STAGES)


def follow(stages: Iterable[str], most: int = 500) -> Operation:
    """Return what a worker does for flows. What it leaves because of locks is followed at the end of every order."""
    name = "follow flows" if most > 1 else "follow one event"
    return Operation(name, call("SELECT batchq.follow_flows(0, %(m)s)", m=most), list(stages))


def flow_operations() -> Iterator[Operation]:
    """Yield what may happen to a batch that is needed, and to the one that waits."""
    run = staged("needed runs", "needed runs, not marked", "waiting cancelled")
    failed = staged("needed failed", "needed failed, as is known", "needed failed long ago")
    yield follow(EVERYWHERE)
    yield follow(EVERYWHERE, 1)
    tokens = [str(TOKEN)]
    yield Operation("complete 1", endings.complete("q", [1], tokens), run)
    yield Operation("complete 1 and forget", endings.complete("q", [1], tokens, keep=False), run)
    for status in ("failed", "cancelled"):
        end = Finish(1, TOKEN, status, None, '{"error": "no"}')
        yield Operation(f"end 1 as {status}", endings.finish("q", [end]), run)
    yield Operation("requeue 1", endings.requeue("q", [Requeue(1, TOKEN, 0.0, False, None)]), run)
    for i in (1, 2):
        yield Operation(f"cancel {i}", call("SELECT batchq.cancel(%(i)s)", i=i), EVERYWHERE)
        cancel = call("SELECT batchq.cancel_with_dependents(%(i)s)", i=i)
        yield Operation(f"cancel {i} with dependents", cancel, EVERYWHERE)
    bulk = call(f"SELECT batchq.cancel_live('q', '{{1,2,3}}', {LIVE}, 'no')")
    yield Operation("bulk cancel", bulk, EVERYWHERE, skips_locked=True)
    ended = [*failed, *staged("needed cancelled")]
    yield Operation("retry 1", call("SELECT batchq.retry(1)"), ended)
    revive = call("SELECT batchq.revive('q', '{1}', 'failed', false, '-infinity', 'infinity')")
    yield Operation("bulk retry 1", revive, failed, skips_locked=True)
    yield Operation("retry 2", call("SELECT batchq.retry(2)"), staged("waiting cancelled"))
    prune = call("SELECT batchq.prune('30 days')")
    yield Operation("prune", prune, staged("needed failed long ago", "needed failed"), may_give_way=True)
    yield Operation("run 2 anyway", call("SELECT batchq.run_anyway(2)"), EVERYWHERE)
    yield Operation("move 1", call("SELECT batchq.move(1, 'q2')"), staged("needed pending"))
    for on_failure in ("wait", "run"):
        insert = call("INSERT INTO batchq.batches (queue, kind, after, on_failure) VALUES ('q', 'k', '{1}', %(f)s)",
                      f=on_failure)  # fmt: skip
        yield Operation(f"enqueue after 1, {on_failure}", insert, EVERYWHERE)


# ------------------------------------------------------------------------------------------------- operations: parts


def parts_operations() -> Iterator[Operation]:
    """Yield what may happen to a batch that is spread, and to its parts."""
    waits = [name for name in PARTS_STAGES if name.startswith(("parts", "one", "all"))]
    spread = [name for name in PARTS_STAGES if name.startswith("to be spread")]
    yield follow(PARTS_STAGES)
    yield follow(PARTS_STAGES, 1)
    make = call("SELECT batchq.spread_batch('q', 1, %(token)s, 2)", token=TOKEN)
    yield Operation("spread", make, spread)
    yield Operation("complete 1", endings.complete("q", [1], [str(TOKEN)]), spread)
    rescue: dict[str, Any] = {"queue": "q", "limit": 10, "spread_seconds": 0.0, "after": float("-inf")}
    rescue |= {"skipped": [], "only": None}
    yield Operation("rescue", (leases.RESCUE, rescue), ["to be spread, its lease is over"], skips_locked=True)
    claim = claims.claim("q", 0, ["k"], 10, "w2", NEW_TOKEN, LEASE_SECONDS)
    yield Operation("claim", claim, ["parts wait"], skips_locked=True)
    yield Operation("cancel 1", call("SELECT batchq.cancel(1)"), PARTS_STAGES)
    yield Operation("cancel 1 with dependents", call("SELECT batchq.cancel_with_dependents(1)"), PARTS_STAGES)
    bulk = call(f"SELECT batchq.cancel_live('q', '{{1,2}}', {LIVE}, 'no')")
    yield Operation("bulk cancel", bulk, PARTS_STAGES, skips_locked=True)
    yield Operation("set priority 1", call("SELECT batchq.set_priority(1, 3)"), ["parts wait", "parts run"])
    yield Operation("run 1 anyway", call("SELECT batchq.run_anyway(1)"), waits)
    ended = [name for name in PARTS_STAGES if name.startswith("whole")]
    yield Operation("retry 1", call("SELECT batchq.retry(1)"), ended)
    yield Operation("retry whole 1", call("SELECT batchq.retry(1, true)"), ended)
    revive = call("SELECT batchq.revive('q', '{1}', 'cancelled', false, '-infinity', 'infinity')")
    yield Operation("bulk retry 1", revive, ended, skips_locked=True)
    yield from ends_of_parts()


def ends_of_parts() -> Iterator[Operation]:
    """Yield how parts end, or go on."""
    run = ["parts run", "one part has ended", "one part has failed"]
    both = (PART, OTHER_PART)
    for name, parts in (("a", [PART]), ("b", [OTHER_PART]), ("a and b", both), ("b and a", both[::-1])):
        for status in ("completed", "failed", "cancelled"):
            error = None if status == "completed" else '{"error": "no"}'
            ends = [Finish(part, PART_TOKEN, status, None, error, status == "completed") for part in parts]
            yield Operation(f"end part {name} as {status}", endings.finish("q", ends), run)
    requeue = endings.requeue("q", [Requeue(OTHER_PART, PART_TOKEN, 0.0, False, None)])
    yield Operation("requeue part b", requeue, run)
    fails = Progress(1, 1, [ItemFailure(1, "no", True)], first_index=0, done_before=0, failed_before=0)
    save = checkpoints.checkpoint("q", OTHER_PART, PART_TOKEN, LEASE_SECONDS, fails)
    yield Operation("checkpoint part b", save, run)


def every_order(operations: Iterable[Operation]) -> Iterator[Case]:
    """Yield every order of each pair of operations, in each stage that concerns both."""
    table = list(operations)
    for number, one in enumerate(table):
        for other in table[number:]:
            for stage in one.stages:
                if stage in other.stages:
                    for order in merges(one, other):
                        yield Case(one, other, stage, order)


def flow_cases() -> Iterator[Case]:
    """Yield every order of two operations on batches that wait, and on those that they need."""
    return every_order(flow_operations())


def parts_cases() -> Iterator[Case]:
    """Yield every order of two operations on a batch that is spread, and on its parts."""
    yield from every_order(parts_operations())
    yield from gated_cases()


def gated_cases() -> Iterator[Case]:
    """Yield orders of an end of two parts and of what locks all parts, while somebody holds one of them at first."""
    table = list(parts_operations())
    ends = [one for one in table if one.name.startswith(("end part a and b", "end part b and a"))]
    others = [one for one in table if not one.skips_locked and "parts run" in one.stages]
    for one in ends:
        for other in others:
            for gate in (PART, OTHER_PART):
                for order in ((0, 1, 0, 1), (1, 0, 1, 0)):
                    yield Case(one, other, "parts run", order, gate)
