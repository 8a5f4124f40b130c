"""The keys of one queue, in turn: where the next claim of batches with a key continues.

A claim goes from key to key through an index, takes the first batches of each, and the next claim continues where it
ended. Dead entries of the index, which stay while any session holds a snapshot, are in the way there as they are for
other claims (positions.py). So the range of keys is divided into parts: one that was expensive to go through and had
nothing is visited again after a pause of 20 times what all such parts cost. And of a key that was expensive to read,
the next claims read from the last position on.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

CHEAP_SECONDS = 0.005
SLOW_KEY_SECONDS = 0.002
PAUSE_FACTOR = 20
MOST_KEYS = 500  # that one claim visits
LARGE_ROOM = 50
PART_KEYS = 2000
_MOST_POSITIONS = 100


class Visited(NamedTuple):
    """What a claim found at one key, or, without ids, where it ended; see batchq.ready_of_keys."""

    key: str | None
    ids: list[int] | None
    last_priority: int | None
    last_run_at: float | None
    last_id: int | None
    seconds: float


@dataclass
class Part:
    """The keys after *after*, up to the next part; not visited before *due_at* (monotonic).

    cost_seconds: what the last visit cost that found nothing.
    """

    after: str
    due_at: float = 0.0
    cost_seconds: float = 0.0


@dataclass
class _KeyPosition:
    priority: int
    run_at: float
    id: int
    from_start_at: float  # monotonic: when to read from the start again


def per_turn(room: int, known_keys: int, keys_of_shard: int) -> int:
    """Return how many batches to take of each key, so that the known keys of all shards share the room.

    A large room is for batches that take no time. Then the keys of one shard share it, and those of the next shard the
    next one: a claim and a finish of few batches would cost as much as one of many.
    """
    sharing = known_keys if room <= LARGE_ROOM else keys_of_shard
    return max(1, math.ceil(room / sharing)) if known_keys and sharing else 1


class KeyRing:
    """Where to continue. All times of visits are those that the server measured."""

    def __init__(self) -> None:
        self.parts = [Part("")]
        self.number = 0  # of the part in which the next claim continues
        self.after = ""
        self.known_keys = 0  # in the last round
        self.has_keys = False
        self._look_at = 0.0
        self._round_keys = 0
        self._part_keys, self._part_found, self._part_seconds = 0, 0, 0.0  # of the part that is being visited
        self._positions: dict[str, _KeyPosition] = {}

    # ------------------------------------------------------------------------------------------- whether there are keys

    def is_look_due(self) -> bool:
        """Return whether to search for keys now, where none are known."""
        return not self.has_keys and time.monotonic() >= self._look_at

    def looked(self, found: bool, took_seconds: float) -> None:
        """Record whether there are keys. After an expensive search the next one comes later."""
        self.has_keys = found
        if took_seconds >= CHEAP_SECONDS:
            self._look_at = time.monotonic() + PAUSE_FACTOR * took_seconds

    # ------------------------------------------------------------------------------------------------- the next claim

    def next_range(self) -> tuple[str, str | None] | None:
        """Return the range of keys for the next claim: after which key, and up to which (None: the last). Return None
        if nothing is due."""
        now = time.monotonic()
        for _ in self.parts:
            if self.parts[self.number].due_at <= now:
                following = self.number + 1
                return self.after, self.parts[following].after if following < len(self.parts) else None
            self._go_to((self.number + 1) % len(self.parts))
        return None

    @property
    def is_at_start(self) -> bool:
        """Whether the next claim begins a round."""
        return self.number == 0 and not self.after

    def positions(self) -> dict[str, tuple[int, float, int]]:
        """Return the positions, by key, from which keys that are expensive to read are read."""
        now = time.monotonic()
        return {key: (at.priority, at.run_at, at.id) for key, at in self._positions.items() if now < at.from_start_at}

    def visited(self, visits: Sequence[Visited]) -> None:
        """Record what a claim has visited. The last visit says where it ended."""
        end = visits[-1]
        found = sum(len(visit.ids or ()) for visit in visits)
        for visit in visits[:-1]:
            self._move_position(visit)
        self._round_keys += end.last_id or 0
        self._part_keys += end.last_id or 0
        self._part_found += found
        self._part_seconds += end.seconds
        if end.key is None:
            self._end_part()
        else:
            self.after = end.key
            if self._part_keys >= PART_KEYS:
                self.parts.insert(self.number + 1, Part(self.after))
                self._end_part()

    def _move_position(self, visit: Visited) -> None:
        known = self._positions.get(visit.key or "")
        is_slow = visit.seconds >= SLOW_KEY_SECONDS
        if visit.last_id is None or not (known or is_slow):
            return
        if known is None or time.monotonic() >= known.from_start_at:
            if not is_slow:
                del self._positions[visit.key or ""]
                return
            if len(self._positions) >= _MOST_POSITIONS:
                self._positions.clear()
            until = time.monotonic() + PAUSE_FACTOR * visit.seconds
        else:
            until = known.from_start_at
        self._positions[visit.key or ""] = _KeyPosition(
            visit.last_priority or 0, visit.last_run_at or 0.0, visit.last_id, until
        )

    # ------------------------------------------------------------------------------------------------------ the parts

    def _end_part(self) -> None:
        """Go on to the next part. One that was expensive and had nothing waits; a small one joins the one before."""
        now = time.monotonic()
        part = self.parts[self.number]
        is_dead = self._part_found == 0 and self._part_seconds >= CHEAP_SECONDS
        part.cost_seconds = self._part_seconds if is_dead else 0.0
        if is_dead:
            part.due_at = now + PAUSE_FACTOR * sum(other.cost_seconds for other in self.parts)
        elif self._part_keys < PART_KEYS // 4 and self.number > 0:
            del self.parts[self.number]
            self.number -= 1
        if self.number + 1 == len(self.parts):
            self.known_keys, self._round_keys = self._round_keys, 0
            self.has_keys = self.known_keys > 0 or any(other.due_at > now for other in self.parts)
        self._part_keys, self._part_found, self._part_seconds = 0, 0, 0.0
        self._go_to((self.number + 1) % len(self.parts))

    def _go_to(self, number: int) -> None:
        self.number = number
        self.after = self.parts[number].after
