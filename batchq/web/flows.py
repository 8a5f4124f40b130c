"""The page of a flow: what it shows of who waits for whom."""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from batchq.operate.flow_graph import Graph, Group
from batchq.web.flow_chart import chart

_MOST_NEEDED = 5  # that the list names of a batch
_ORDER = ("failed", "cancelled", "stalled", "retrying", "processing", "ready", "scheduled", "waiting", "completed", "")


class Shown(NamedTuple):
    """A batch of a flow. status: for its color; text: what is written. needed: the first ones that it waits for."""

    id: int
    level: int
    queue: str
    kind: str
    status: str
    text: str
    needed: list[int]
    more_needed: int
    is_stored: bool


class Counted(NamedTuple):
    """The batches of a queue and kind at one level; statuses: how many have each one."""

    queue: str
    kind: str
    batches: int
    statuses: list[tuple[str, int]]


def flow_values(graph: Graph, batch_id: int) -> dict[str, Any]:
    """Return what the page of a batch's flow shows: a drawing and a list, or, of a large flow, counts."""
    drawn = chart(graph)
    rows = shown_batches(graph)
    groups = [] if drawn else graph.groups()
    return {
        "batch_id": batch_id,
        "chart": drawn,
        "batches": {row.id: row for row in rows} if drawn else {},
        "groups": groups,
        "levels": _levels(groups),
        "counts": _counts(Counter(row.status for row in rows)),
        "total": len(rows),
        "has_edges": bool(graph.edges),
        "is_cut": graph.is_cut,
    }


def shown_batches(graph: Graph) -> list[Shown]:
    """Return the batches of a flow, by level and id."""
    levels = graph.levels()
    needed: dict[int, list[int]] = defaultdict(list)
    ended: dict[int, str | None] = {}
    for edge in graph.edges:
        needed[edge.waits].append(edge.needed)
        ended[edge.needed] = edge.ended_as or ended.get(edge.needed)
    found = []
    for one, row in graph.batches.items():
        status = row.get("status") or ended.get(one) or ""
        found.append(
            Shown(
                one, levels.get(one, 0), row.get("queue") or "", row.get("kind") or "", status, _text(row, status),
                needed[one][:_MOST_NEEDED], max(0, len(needed[one]) - _MOST_NEEDED), bool(row.get("status")),
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: (row.level, row.id))


def _text(row: dict[str, Any], status: str) -> str:
    if not row.get("status"):
        return f"{status}, not stored" if status else "not stored"
    return f"waiting for {row['needs_left']:,}" if status == "waiting" else status


def _levels(groups: list[Group]) -> list[list[Counted]]:
    """Return the boxes of each level."""
    statuses: dict[int, dict[tuple[str, str], dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
    for group in groups:
        statuses[group.level][group.queue, group.kind][group.status] = group.batches
    return [
        [
            Counted(queue, kind, sum(counts.values()), _counts(counts))
            for (queue, kind), counts in statuses[level].items()
        ]
        for level in sorted(statuses)
    ]


def _counts(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: _ORDER.index(pair[0]))
