"""Where claims continue: the positions of one queue, for the kinds of one lane.

A claim turns entries of the index of ready batches into dead ones, and as long as any session holds a snapshot none of
those can be removed: a claim from the beginning walks over all of them. So each claim starts after the last one.
Batches that become ready before a position (a late commit, a release, a rescue, a run_at in the past) are found by
sweeps: of everything while that is cheap, else of one part after another, with a pause of 20 times the cost of each.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence, Set

from batchq.postgres.statements.claims import START, ClaimedRow, Position
from batchq.worker.key_ring import KeyRing
from batchq.worker.lanes import Lane
from batchq.worker.permits import Permit

CHEAP_SECONDS = 0.005
PAUSE_FACTOR = 20
BUSY_PAUSE_SECONDS = 1.0
PART_ROWS = 20_000
MOST_PARTS = 1000
MOST_PRIORITIES = 1000
PROBE_VALID_SECONDS = 0.1
NOISE_SECONDS = 0.002
SHARD_SECONDS = 0.5  # for which one shard of a split queue comes first
_PROBES = 3
_DISCOVER_SECONDS = 0.25
_RECORDED_PAUSE_SECONDS = 1.0  # after it, a worker sweeps what lies before the recorded position

Pauses = Set[tuple[str | None, str | None]]  # queue and kind; None: any


class Track:
    """The positions within one priority: where the next claim starts, and the marks between the parts of a sweep."""

    def __init__(self, position: Position = START) -> None:
        self.position = position
        self.marks = [START] if position == START else [START, position]
        self.sweep_at = 0.0 if position == START else time.monotonic() + _RECORDED_PAUSE_SECONDS
        self._rows_since_mark = 0
        self._sweeps = 0

    @property
    def is_whole(self) -> bool:
        """Whether a sweep has only one part: everything."""
        return len(self.marks) == 1

    def start(self, now: float) -> Position:
        """Return where to probe from: the beginning if a sweep of everything is due, else the position."""
        return START if self.is_whole and now >= self.sweep_at else self.position

    def claimed(self, rows: Sequence[ClaimedRow], start: Position, is_full: bool) -> None:
        """Move the position after *rows*, which a claim from *start* has taken, in the order of claims.

        It moves back if a claim from the beginning was full: there may be more between its rows and the position.
        """
        if not rows:
            return
        last = rows[-1].position
        self.position = last if is_full else max(last, self.position)
        while len(self.marks) > 1 and self.marks[-1] >= self.position:
            self.marks.pop()
        self._rows_since_mark += len(rows) if start != START else 0
        if self._rows_since_mark >= PART_ROWS:
            self.mark()

    def mark(self) -> None:
        """End a part at the position. If there are too many parts, each two become one."""
        self._rows_since_mark = 0
        self.marks.append(self.position)
        if len(self.marks) > MOST_PARTS:
            self.marks = self.marks[::2]

    def next_part(self) -> tuple[int, Position, Position]:
        """Return the part to sweep next, as number and limits: every second time the newest, where most is found."""
        last = len(self.marks) - 1
        self._sweeps += 1
        number = last if self._sweeps % 2 else self._sweeps // 2 % len(self.marks)
        return number, self.marks[number], self.position if number == last else self.marks[number + 1]

    def was_swept(self, cost_seconds: float, is_busy: bool, number: int | None = None) -> None:
        """Record the cost of sweeping a part (None: everything). A cheap part is merged with the next one."""
        pause_seconds = PAUSE_FACTOR * cost_seconds
        self.sweep_at = time.monotonic() + (max(pause_seconds, BUSY_PAUSE_SECONDS) if is_busy else pause_seconds)
        if number is not None and cost_seconds < CHEAP_SECONDS and number + 1 < len(self.marks):
            del self.marks[number + 1]

    def sweep_again(self) -> None:
        """Sweep the same part once more, immediately: it had more than could be claimed."""
        self._sweeps -= 1
        self.sweep_at = 0.0


class Source:
    """One queue, for one lane: a track for each known priority.

    kinds: those of the lane that it serves now, without paused ones. permits: those that each of its batches needs.
    busy_priority: that of the last claim, if it was full.

    A queue that is split has a source for each shard, with its stored name. *whole*: the one of the queue itself, which
    is also that of the first shard, and has them all in *shards*. Limits, pauses and permits are those of the whole.
    """

    # More than a dozen attributes: the tracks of batches without a key, the ring of those with one, and the permits.
    def __init__(self, queue: str, lane: Lane, limited_kind: str | None = None, whole: "Source | None" = None) -> None:
        self.queue = queue
        self.whole: Source = whole or self
        self.shards: list[Source] = [self]
        self.turns: list[tuple[Source, int]] = []  # shards and the priority in which they may have more
        self._look_turn = 0  # the number of the shard that comes first
        self._turned_at = 0.0  # monotonic: when it began to come first
        self._ring_turn = 0  # the number of the shard in whose ring of keys the next claim continues
        self.lane = lane
        self.limited_kind = limited_kind  # it serves only this kind, whose claims are limited
        self.kinds = lane.kinds if limited_kind is None else [limited_kind]
        self.permits: tuple[Permit, ...] = ()
        self.asked_at = 0.0  # monotonic: when something was last sought for which there is no permit
        self.is_held_back = False  # something is ready that has no permit
        self.ring = KeyRing()
        self.is_keyed_first = False
        self.tracks: dict[int, Track] = {}
        self.busy_priority: int | None = None
        self.probe_costs: deque[float] = deque([0.0] * _PROBES, maxlen=_PROBES)
        self._probed_at = 0.0
        self._discover_at = 0.0
        self._fastest_probe_seconds = float("inf")

    def serve(self, kinds: Sequence[str], pauses: Pauses) -> None:
        """Serve these kinds, without paused ones. If one is new or resumed, start from the beginning."""
        before = self.kinds
        is_queue_paused = (self.queue, None) in pauses
        self.kinds = [
            kind
            for kind in kinds
            if not is_queue_paused and (None, kind) not in pauses and (self.queue, kind) not in pauses
        ]
        is_new = bool(set(self.kinds) - set(before))
        for shard in self.shards:
            shard.kinds = self.kinds
            if is_new:
                shard.forget()

    def forget(self) -> None:
        """Start from the beginning everywhere."""
        self.tracks.clear()
        self.busy_priority = None
        self.turns.clear()
        self._discover_at = 0.0
        self.ring = KeyRing()

    # ----------------------------------------------------------------------------------------------------- shards

    def split(self, shards: Sequence[str]) -> None:
        """Serve these shards, by their stored names; those that are known keep their positions."""
        known = {shard.queue: shard for shard in self.shards}
        for name in shards:
            if name not in known:
                self.shards.append(shard := Source(name, self.lane, self.limited_kind, whole=self))
                shard.kinds = self.kinds
                self._discover_at = 0.0

    def in_turn(self) -> "list[Source]":
        """Return the shards, beginning with another one every half second."""
        now = time.monotonic()
        if now - self._turned_at >= SHARD_SECONDS:
            self._turned_at = now
            self._look_turn = (self._look_turn + 1) % len(self.shards)
        return self.shards[self._look_turn :] + self.shards[: self._look_turn]

    def take_turns(self, ready: "list[tuple[Source, int, Position]]") -> "list[tuple[Source, int, Position]]":
        """Note which shards have the most urgent batches, for the claims until the next look; return *ready*."""
        self.turns = [(shard, priority) for shard, priority, _ in ready if priority == ready[0][1]]
        return ready

    def continuing(self) -> "list[tuple[Source, int, Position]]":
        """Return where to claim without a look: in the shards that may have more, while the last look is recent."""
        if time.monotonic() - self._probed_at > PROBE_VALID_SECONDS:
            self.turns = []
        return [(one, level, one.tracks[level].position) for one, level in self.turns if level in one.tracks]

    def was_claimed(self, shard: "Source", priority: int, is_full: bool) -> None:
        """Record a claim. A shard that may have more stays first: a finish is of one shard, and should be of many."""
        shard.busy_priority = priority if is_full else None
        if not is_full and self.turns:
            self.turns = [turn for turn in self.turns if turn != (shard, priority)]

    @property
    def has_keys(self) -> bool:
        """Whether batches with a key are pending."""
        return any(shard.ring.has_keys for shard in self.shards)

    @property
    def known_keys(self) -> int:
        """How many keys the last round has visited in all shards; 0 if one of them has had none yet."""
        counts = [shard.ring.known_keys for shard in self.shards if shard.ring.has_keys]
        return sum(counts) if all(counts) else 0

    def shard_of_ring(self) -> "Source":
        """Return the shard whose keys come next: the keys of all shards are one ring, a shard after the other."""
        if len(self.shards) == 1:
            return self
        for _ in self.shards:
            shard = self.shards[self._ring_turn % len(self.shards)]
            if shard.ring.has_keys:
                return shard
            self._ring_turn += 1
        return self

    def leave_ring(self) -> None:
        """Continue with the keys of the next shard."""
        self._ring_turn = (self._ring_turn + 1) % len(self.shards)

    # ----------------------------------------------------------------------------------------------------- probes

    def is_discovery_due(self) -> bool:
        """Return whether to search for unknown priorities now; if so, set the time of the next search."""
        now = time.monotonic()
        if now < self._discover_at and any(shard.tracks for shard in self.shards):
            return False
        self._discover_at = now + _DISCOVER_SECONDS
        return True

    def discovered(self, took_seconds: float) -> None:
        """Record how long a search for unknown priorities took: after an expensive one the next comes later."""
        self._discover_at = max(self._discover_at, time.monotonic() + PAUSE_FACTOR * self.cost(took_seconds))

    def continues_at(self) -> Position | None:
        """Return where to claim without a probe: if the last claim was full, and the last probe is recent."""
        if self.busy_priority is None or time.monotonic() - self._probed_at > PROBE_VALID_SECONDS:
            return None
        return self.tracks[self.busy_priority].position

    def starts(self) -> dict[int, Position]:
        """Return where to probe from, for each priority."""
        now = time.monotonic()
        return {priority: track.start(now) for priority, track in self.tracks.items()}

    def probed(self, starts: dict[int, Position], took_seconds: float) -> bool:
        """Record the cost of a probe; return whether it started at the beginning and was expensive.

        Dead entries make it expensive, and ready batches of kinds for which this lane has no handler.
        """
        self._probed_at = time.monotonic()
        cost_seconds = self.cost(took_seconds)
        self.probe_costs.append(cost_seconds)
        from_start = [priority for priority, start in starts.items() if start == START]
        for priority in from_start:
            self.tracks[priority].was_swept(cost_seconds, self.busy_priority is not None)
        return bool(from_start) and cost_seconds >= CHEAP_SECONDS

    @property
    def probe_cost_seconds(self) -> float:
        """What a probe costs: the least of the last three, since any one may have met a busy machine."""
        return min(self.probe_costs)

    def cost(self, took_seconds: float) -> float:
        """Return how much longer than the fastest probe, a network round trip, one took; at most 2 ms are noise."""
        self._fastest_probe_seconds = min(self._fastest_probe_seconds, took_seconds)
        return max(0.0, took_seconds - self._fastest_probe_seconds - NOISE_SECONDS)

    # ------------------------------------------------------------------------------------------ positions, sweeps

    def begin_at(self, recorded: Mapping[int, Position]) -> None:
        """Begin at the positions that workers have recorded, unless a later one is known here."""
        for priority, position in recorded.items():
            track = self.tracks.get(priority)
            if track is None or track.position < position:
                self.tracks[priority] = Track(position)

    def due_part(self) -> int | None:
        """Return the priority whose part is due for a sweep, the longest-waiting one; None without any."""
        now = time.monotonic()
        due = [priority for priority, track in self.tracks.items() if not track.is_whole and now >= track.sweep_at]
        return min(due, key=lambda priority: self.tracks[priority].sweep_at, default=None)
