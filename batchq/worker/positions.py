"""Where claims go on: the positions of one queue, for the kinds of one lane.

A claim turns entries of the index of ready batches into dead ones, and while anybody holds a snapshot none of those can
be removed: a claim that starts at the beginning walks over all of them. So each claim starts behind the last one. What
lands behind a position (a commit that came late, a batch given back or rescued, a run_at in the past) is found by
sweeps: of everything while that is cheap, else of one part after another, with a pause of 20 times the cost of each.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence, Set

from batchq.postgres.statements.claims import START, ClaimedRow, Position
from batchq.worker.lanes import Lane

CHEAP_SECONDS = 0.005
PAUSE_FACTOR = 20
BUSY_PAUSE_SECONDS = 1.0
PART_ROWS = 20_000
MOST_PARTS = 1000
MOST_PRIORITIES = 1000
LOOK_SECONDS = 0.1
LOOKS = 3
LEARN_SECONDS = 0.25
NOISE_SECONDS = 0.002
RECORDED_PAUSE_SECONDS = 1.0  # after it, a worker sweeps what lies before the recorded position

Pauses = Set[tuple[str | None, str | None]]  # queue and kind; None: any


class Track:
    """The positions within one priority: where the next claim starts, and the marks between the parts of a sweep."""

    def __init__(self, position: Position = START) -> None:
        self.position = position
        self.marks = [START] if position == START else [START, position]
        self.rows_since_mark = 0
        self.swept = 0
        self.sweep_at = 0.0 if position == START else time.monotonic() + RECORDED_PAUSE_SECONDS

    @property
    def is_whole(self) -> bool:
        """Whether a sweep has one part alone: everything."""
        return len(self.marks) == 1

    def start(self, now: float) -> Position:
        """Return where to look from: the beginning if a sweep of everything is due, else the position."""
        return START if self.is_whole and now >= self.sweep_at else self.position

    def claimed(self, rows: Sequence[ClaimedRow], start: Position, is_full: bool) -> None:
        """Move the position behind what a claim from *start* has taken: *rows*, in the order of claims.

        Back too, if a claim from the beginning was full: there may be more between what it took and the position.
        """
        if not rows:
            return
        last = rows[-1].position
        self.position = last if is_full else max(last, self.position)
        while len(self.marks) > 1 and self.marks[-1] >= self.position:
            self.marks.pop()
        self.rows_since_mark += len(rows) if start != START else 0
        if self.rows_since_mark >= PART_ROWS:
            self.mark()

    def mark(self) -> None:
        """End a part at the position. Of too many parts, each two become one."""
        self.rows_since_mark = 0
        self.marks.append(self.position)
        if len(self.marks) > MOST_PARTS:
            self.marks = self.marks[::2]

    def next_part(self) -> tuple[int, Position, Position]:
        """Return the part to sweep next, its number and bounds: the newest each second time, where most things land."""
        last = len(self.marks) - 1
        self.swept += 1
        number = last if self.swept % 2 else self.swept // 2 % len(self.marks)
        return number, self.marks[number], self.position if number == last else self.marks[number + 1]

    def was_swept(self, cost_seconds: float, is_busy: bool, number: int | None = None) -> None:
        """Note what the sweep of a part (None: of everything) has cost. A cheap part becomes one with the next."""
        pause_seconds = PAUSE_FACTOR * cost_seconds
        self.sweep_at = time.monotonic() + (max(pause_seconds, BUSY_PAUSE_SECONDS) if is_busy else pause_seconds)
        if number is not None and cost_seconds < CHEAP_SECONDS and number + 1 < len(self.marks):
            del self.marks[number + 1]

    def sweep_again(self) -> None:
        """Sweep the same part once more, now: there was more in it than could be taken."""
        self.swept -= 1
        self.sweep_at = 0.0


class Source:
    """One queue, for one lane: a track for each priority that was ever seen."""

    def __init__(self, queue: str, lane: Lane) -> None:
        self.queue = queue
        self.lane = lane
        self.kinds = lane.kinds  # without those that are paused
        self.tracks: dict[int, Track] = {}
        self.busy_priority: int | None = None  # of the last claim, if that was full
        self.looked_at = 0.0
        self.learns_at = 0.0
        self.fastest_look_seconds = float("inf")
        self.look_costs: deque[float] = deque([0.0] * LOOKS, maxlen=LOOKS)

    def leave_out(self, pauses: Pauses) -> None:
        """Leave out what is paused: queue and kind, None for any. Where a kind goes on, start from the beginning."""
        before = self.kinds
        is_queue_paused = (self.queue, None) in pauses
        self.kinds = [
            kind
            for kind in self.lane.kinds
            if not is_queue_paused and (None, kind) not in pauses and (self.queue, kind) not in pauses
        ]
        if set(self.kinds) - set(before):
            self.forget()

    def forget(self) -> None:
        """Start from the beginning everywhere."""
        self.tracks.clear()
        self.busy_priority = None
        self.learns_at = 0.0

    def learns_now(self) -> bool:
        """Tell whether it is time to look for priorities never seen before."""
        now = time.monotonic()
        if self.tracks and now < self.learns_at:
            return False
        self.learns_at = now + LEARN_SECONDS
        return True

    def goes_on(self) -> Position | None:
        """Return where the next claim starts without a look: the last one was full, and the last look not long ago."""
        if self.busy_priority is None or time.monotonic() - self.looked_at > LOOK_SECONDS:
            return None
        return self.tracks[self.busy_priority].position

    def starts(self) -> dict[int, Position]:
        """Return from where to look, for each priority."""
        now = time.monotonic()
        return {priority: track.start(now) for priority, track in self.tracks.items()}

    def looked(self, starts: dict[int, Position], took_seconds: float) -> bool:
        """Note how much longer than the fastest, which is the network's round trip, a probe has taken. Return whether
        it began at the beginning and was expensive.

        It is expensive with dead entries in its way, and with ready batches of kinds that this lane has no handler for.
        """
        self.looked_at = time.monotonic()
        cost_seconds = self.cost(took_seconds)
        self.look_costs.append(cost_seconds)
        from_start = [priority for priority, start in starts.items() if start == START]
        for priority in from_start:
            self.tracks[priority].was_swept(cost_seconds, self.busy_priority is not None)
        return bool(from_start) and cost_seconds >= CHEAP_SECONDS

    def learned(self, took_seconds: float) -> None:
        """Note how long it took to look for unknown priorities: the next time comes later where that is expensive."""
        self.learns_at = max(self.learns_at, time.monotonic() + PAUSE_FACTOR * self.cost(took_seconds))

    def begin_at(self, recorded: Mapping[int, Position]) -> None:
        """Begin at the positions that workers have recorded, where this one knows of none that is later."""
        for priority, position in recorded.items():
            track = self.tracks.get(priority)
            if track is None or track.position < position:
                self.tracks[priority] = Track(position)

    @property
    def look_cost_seconds(self) -> float:
        """What a look costs: the least of the last three, since any one may have met a busy machine."""
        return min(self.look_costs)

    def cost(self, took_seconds: float) -> float:
        """Return how much longer than the fastest look a look has taken, leaving out what any machine is late by."""
        self.fastest_look_seconds = min(self.fastest_look_seconds, took_seconds)
        return max(0.0, took_seconds - self.fastest_look_seconds - NOISE_SECONDS)

    def due_part(self) -> int | None:
        """Return a priority of which a part is to be swept now, if any: the one that has waited longest."""
        now = time.monotonic()
        due = [priority for priority, track in self.tracks.items() if not track.is_whole and now >= track.sweep_at]
        return min(due, key=lambda priority: self.tracks[priority].sweep_at, default=None)
