"""The graph of a flow: who waits for whom around a batch, in levels, for the command line and the web UI."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from batchq.postgres.statements import flows
from batchq.postgres.statements.running import Conn

MOST_BATCHES = 1000  # that are read of one flow
_Row = Mapping[str, Any]


class Edge(NamedTuple):
    """One batch waits for another. ended_as: how the needed one ended, as far as that counted; else None."""

    needed: int
    waits: int
    on_failure: str
    ended_as: str | None


class Group(NamedTuple):
    """Batches of one kind and status at one level: those that wait for the level before."""

    level: int
    queue: str
    kind: str
    status: str
    batches: int


@dataclass(frozen=True)
class Graph:
    """A flow. batches: rows by id, in the order of ids; one that is not stored any more has only its id."""

    batches: dict[int, dict[str, Any]]
    edges: list[Edge]
    is_cut: bool  # there are more batches than were read

    def levels(self) -> dict[int, int]:
        """Return the level of each batch: 0 for those that wait for none, else one more than the highest needed."""
        needs: dict[int, list[int]] = defaultdict(list)
        waiting: dict[int, list[int]] = defaultdict(list)
        for edge in self.edges:
            needs[edge.waits].append(edge.needed)
            waiting[edge.needed].append(edge.waits)
        found = {one: 0 for one in self.batches if not needs[one]}
        left = Counter({one: len(needs[one]) for one in self.batches})
        ready = list(found)
        for one in ready:  # grows meanwhile
            for other in waiting[one]:
                found[other] = max(found.get(other, 0), found[one] + 1)
                left[other] -= 1
                if not left[other]:
                    ready.append(other)
        return found

    def groups(self) -> list[Group]:
        """Return how many batches there are of each level, kind and status."""
        levels = self.levels()
        counted = Counter(
            (levels.get(one, 0), row.get("queue") or "", row.get("kind") or "", row.get("status") or "")
            for one, row in self.batches.items()
        )
        return [Group(*key, count) for key, count in sorted(counted.items())]

    def tree(self) -> Iterator[tuple[int, int, bool]]:
        """Yield depth, id and whether it was yielded before: each batch below each that it waits for, once with what
        waits for it."""
        waiting: dict[int, list[int]] = defaultdict(list)
        for edge in self.edges:
            waiting[edge.needed].append(edge.waits)
        seen: set[int] = set()
        levels = self.levels()
        todo = [(0, one) for one in sorted(self.batches, reverse=True) if levels.get(one, 0) == 0]
        while todo:
            depth, one = todo.pop()
            yield depth, one, one in seen
            if one not in seen:
                seen.add(one)
                todo += [(depth + 1, other) for other in sorted(waiting[one], reverse=True)]


def read(conn: Conn, batch_id: int, most: int = MOST_BATCHES) -> Graph | None:
    """Return the flow that a batch is part of, up to *most* batches, the nearest first; None if there is none."""
    edges = [Edge(*row) for row in flows.flow_edges(conn, batch_id, most)]
    ids = sorted({batch_id}.union(*((edge.needed, edge.waits) for edge in edges)))
    rows = {row["id"]: row for row in flows.flow_batches(conn, ids)}
    if not edges and batch_id not in rows:
        return None
    return Graph({one: rows.get(one) or {"id": one} for one in ids}, edges, len(ids) >= most)
