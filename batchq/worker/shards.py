"""Shards: one look for all shards of a queue that is split, so that an idle worker reads as often as for one queue.

Claims come from one shard for half a second, or until it has nothing left; then from the next. What is most urgent
in any shard comes first.
"""

import time
from collections.abc import Callable

from batchq.postgres.link import Link
from batchq.postgres.statements import probes, shards
from batchq.postgres.statements.claims import Position
from batchq.worker.context import Context
from batchq.worker.positions import MOST_PRIORITIES, Source, Track

Ready = list[tuple[Source, int, Position]]  # a shard, a priority that has a ready batch there, and where to start


class ShardLooks:
    """Looks for ready batches in all shards of a source. *follow_flows*: called with what a look has found of flows."""

    def __init__(self, context: Context, link: Link, follow_flows: Callable[[bool, int, float], None]) -> None:
        self._context = context
        self._link = link
        self._follow_flows = follow_flows

    def ready(self, source: Source, from_start: bool) -> Ready:
        """Return what is ready in the shards, the most urgent first, in turn where they are equally urgent.

        *from_start*: recorded positions do not count.
        """
        if continuing := source.continuing():
            return continuing
        for one in source.shards:
            if len(one.tracks) > MOST_PRIORITIES:
                one.forget()
        if source.is_discovery_due():
            self._discover(source, from_start)
        starts = {one.queue: one.starts() for one in source.shards}
        levels = {(queue, priority): start for queue, level in starts.items() for priority, start in level.items()}
        if not levels:
            return []
        began_at = time.monotonic()
        found = {(queue, priority) for queue, priority in self._link.probe(shards.ready_levels(levels, source.kinds))}
        took_seconds = time.monotonic() - began_at
        expensive = [one for one in source.shards if one.probed(starts[one.queue], took_seconds)]
        if expensive and not from_start:
            self._take_positions(source)
        ready = [
            (one, priority, start)
            for one in source.in_turn()
            for priority, start in starts[one.queue].items()
            if (one.queue, priority) in found and priority in one.tracks
        ]
        return source.take_turns(sorted(ready, key=lambda level: level[1]))

    def _discover(self, source: Source, from_start: bool) -> None:
        if not any(one.tracks for one in source.shards) and not from_start:
            self._take_positions(source)
        began_at = time.monotonic()
        looked = {one.queue: one for one in source.shards if one.ring.is_look_due()}
        after = self._context.flows.start()
        known = {one.queue: one.tracks for one in source.shards}
        [(unknown, with_keys, has_events)] = self._link.probe(shards.discovery(known, list(looked), after))
        took_seconds = source.cost(time.monotonic() - began_at)
        for queue, one in looked.items():
            one.ring.looked(queue in with_keys, took_seconds)
        self._follow_flows(has_events, after, took_seconds)
        for queue in set(unknown):
            for (priority,) in self._link.probe(probes.priorities(queue)):
                known[queue].setdefault(priority, Track())
        source.discovered(time.monotonic() - began_at)

    def _take_positions(self, source: Source) -> None:
        recorded: dict[str, dict[int, Position]] = {}
        queues = [one.queue for one in source.shards]
        for queue, priority, run_at, batch_id in self._link.probe(shards.known_positions(queues)):
            recorded.setdefault(queue, {})[priority] = Position(run_at, batch_id)
        for one in source.shards:
            one.begin_at(recorded.get(one.queue, {}))
