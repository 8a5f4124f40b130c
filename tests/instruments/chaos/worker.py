"""``python -m tests.instruments.chaos.worker STYLE``: `batchq worker`, with faults.

Its standard input says what is to befall it.

A line is a command: ``arm POINT SIGNAL``, ``clock SECONDS``, ``memory BYTES SECONDS``. When the input ends, the run has
ended without a word, and so does the worker. BATCHQ_CHAOS_CODE names a directory with another version of batchq.
"""

import datetime
import os
import sys
import threading
import time
from typing import Any

CODE = "BATCHQ_CHAOS_CODE"
EXIT_ORPHAN = 70
PIECE_BYTES = 2**20


def main() -> int:
    """Work batches of one style."""
    if code := os.environ.get(CODE):
        sys.path.insert(0, code)
    from tests.instruments.chaos import points

    points.install()
    threading.Thread(target=listen, name="chaos-listener", daemon=True).start()
    from batchq.cli import main

    return main(["worker", f"tests.instruments.chaos.apps:{sys.argv[1]}_app"])


def listen() -> None:
    """Do what the commands say."""
    for line in sys.stdin:
        words = line.split()
        COMMANDS[words[0]](*words[1:])
    os._exit(EXIT_ORPHAN)


def arm(point: str, number: str) -> None:
    """Arm a point with a signal; with 0, disarm it, and say so."""
    import signal

    from tests.instruments.chaos import points

    if int(number):
        points.armed[point] = signal.Signals(int(number))
    else:
        points.armed.pop(point, None)
        os.write(2, b'{"event": "disarmed"}\n')


# -------------------------------------------------------------------------------------------------------- the clock

real_time, real_time_ns, real_datetime = time.time, time.time_ns, datetime.datetime
shift_seconds = 0.0


class ShiftedDatetime(real_datetime):
    """A datetime whose now() is by the clock that has jumped."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        """Return the wrong time."""
        return real_datetime.now(tz) + datetime.timedelta(seconds=shift_seconds)


def clock(seconds: str) -> None:
    """Let the wall clock of this process be wrong by so many seconds; monotonic clocks go on as they were."""
    global shift_seconds
    shift_seconds = float(seconds)
    time.time = lambda: real_time() + shift_seconds
    time.time_ns = lambda: real_time_ns() + int(shift_seconds * 1e9)
    datetime.datetime = ShiftedDatetime  # type: ignore[misc]


# -------------------------------------------------------------------------------------------------------- the memory


def memory(more_bytes: str, seconds: str) -> None:
    """Let this process have no more than so much memory for a while: what asks for more gets a MemoryError."""
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + int(more_bytes), hard))
    held = []
    try:
        while True:
            held.append(bytearray(PIECE_BYTES))
    except MemoryError:
        pass
    time.sleep(float(seconds))
    held.clear()
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


COMMANDS: dict[str, Any] = {"arm": arm, "clock": clock, "memory": memory}

if __name__ == "__main__":
    sys.exit(main())
