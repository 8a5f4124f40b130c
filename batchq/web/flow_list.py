"""The page of the flows that are under way: put together from the batches that wait, and what each waits for."""

from collections import defaultdict
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from batchq.web.pages import Pages
from batchq.web.reads import Reader, Row

MOST_WAITING = 1000
_MOST_NEEDS = 10_000
_LEAST_NEEDS = 10  # of a batch
_MOST_FLOWS = 100
_MOST_STUCK = 3  # that are named of a flow


class Flow(NamedTuple):
    """A flow. last: a batch that no other one waits for. stuck_on: batches that have failed and that others wait for:
    id and how it ended. open: batches that are waited for, and that do not wait themselves. age_seconds: of the batch
    that waits for longest."""

    last: Row
    waiting: int
    open: int
    age_seconds: float | None
    stuck: int
    stuck_on: list[tuple[int, str | None]]
    more_stuck: int


class FlowList:
    """Answers requests for the page of all flows."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("flows", lambda _: self._values())

    def show_all(self, request: Request) -> Response:
        """Show the flows that are under way, those that are stuck first."""
        return self._pages.page(request, "flows.html", live="flows", **self._values())

    def _values(self) -> dict[str, Any]:
        waiting = self._reader.read_by_index("flow_waiting", most=MOST_WAITING)
        found = flows_of(waiting, self._needs([row["id"] for row in waiting]), self._reader.read("stuck"))
        return {
            "flows": found[:_MOST_FLOWS], "more": max(0, len(found) - _MOST_FLOWS), "waiting": len(waiting),
            "stuck": sum(1 for flow in found if flow.stuck),
            "is_cut": len(waiting) >= MOST_WAITING, "most_waiting": MOST_WAITING,
        }  # fmt: skip

    def _needs(self, ids: list[int]) -> list[Row]:
        """Return what batches wait for: of each the same number, so that none of them seems to be on its own."""
        most_of_each = max(_LEAST_NEEDS, _MOST_NEEDS // max(1, len(ids)))
        return self._reader.read_by_index("flow_needs", ids=ids, most_of_each=most_of_each) if ids else []


def flows_of(waiting: list[Row], needs: list[Row], stuck: list[Row]) -> list[Flow]:
    """Return flows: the stuck ones first, then the ones that wait for longest.

    waiting: id, queue, kind, needs_left and age_seconds of batches. needs: batch_id, needed_id, ended_as and is_stuck
    of what these wait for. stuck: rows of batchq.stuck_waiting(), also of other batches.
    """
    rows: dict[Any, Row] = {row["id"]: row for row in waiting}
    for row in stuck:
        others = {"needs_left": None, "age_seconds": None, "queue": row["queue"], "kind": row["kind"]}
        rows.setdefault(row["batch_id"], {"id": row["batch_id"]} | others)
    edges = [*needs, *(row | {"is_stuck": True} for row in stuck)]
    members: dict[Any, list[Row]] = defaultdict(list)
    of_flow: dict[int, list[Row]] = defaultdict(list)
    flow = _joined(edges)
    for row in rows.values():
        members[flow.get(row["id"], row["id"])].append(row)
    for edge in edges:
        of_flow[flow[edge["batch_id"]]].append(edge)
    found = [_flow(members[one], of_flow[one]) for one in members]
    return sorted(found, key=lambda one: (not one.stuck, -(one.age_seconds or 0), one.last["id"]))


def _joined(edges: list[Row]) -> dict[Any, int]:
    """Return for each batch one that stands for its flow."""
    above: dict[int, int] = {}

    def top(one: int) -> int:
        while above.setdefault(one, one) != one:
            above[one] = one = above[above[one]]
        return one

    for edge in edges:
        above[top(edge["batch_id"])] = top(edge["needed_id"])
    return {one: top(one) for one in list(above)}


def _flow(rows: list[Row], edges: list[Row]) -> Flow:
    """Return a flow from the batches that wait in it, and what they wait for."""
    ids = {row["id"] for row in rows}
    needed = {edge["needed_id"] for edge in edges}
    stuck_on = {edge["needed_id"]: edge["ended_as"] for edge in edges if edge["is_stuck"]}
    ages = [row["age_seconds"] for row in rows if row["age_seconds"] is not None]
    named = sorted(stuck_on.items())
    return Flow(
        last=max((row for row in rows if row["id"] not in needed), key=lambda row: row["id"], default=rows[-1]),
        waiting=len(rows),
        open=len({e["needed_id"] for e in edges if e["ended_as"] is None and not e["is_stuck"]} - ids),
        age_seconds=max(ages, default=None),
        stuck=len({edge["batch_id"] for edge in edges if edge["is_stuck"]}),
        stuck_on=named[:_MOST_STUCK],
        more_stuck=max(0, len(named) - _MOST_STUCK),
    )
