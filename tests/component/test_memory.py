"""Memory of a worker: what large payloads leave behind in many threads, and how often rubbish is looked for."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from batchq.worker.memory import NEW_OBJECTS, collecting_seldom
from tests.support.alone import run_alone
from tests.support.batches import look, put
from tests.support.commands import CommandLine
from tests.support.steps import step

GROWTH = """
import sys, threading
from batchq.worker.memory import return_large_buffers

if sys.argv[1] == "set":
    assert return_large_buffers()

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def churn(number):
    kept = []
    for size in range(100):
        large = bytes(1_000_000 + 10_000 * size)
        kept.append(bytes(3_000))
        del large

before = resident_mb()
for _ in range(5):
    threads = [threading.Thread(target=churn, args=[number]) for number in range(16)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
print(resident_mb() - before)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    """Run Python in an environment that has nothing else; return what it printed."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def growth_mb(how: str) -> float:
    """Return by how many MiB a process has grown whose threads had large buffers."""
    return float(run(GROWTH, how))


def test_large_buffers_of_many_threads_go_back_to_the_system() -> None:
    ours = growth_mb("set")
    theirs = growth_mb("not")
    step("grown by %.1f MiB; by glibc's defaults by %.1f", ours, theirs)
    assert ours < min(3, theirs / 2)


def test_what_the_environment_sets_stays() -> None:
    for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        code = "from batchq.worker.memory import return_large_buffers; print(return_large_buffers())"
        value = "glibc.malloc.arena_max=1" if name == "GLIBC_TUNABLES" else "100000"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={name: value}, check=True
        )
        assert done.stdout == "False\n"


@pytest.fixture
def threshold() -> Iterator[tuple[int, int, int]]:
    """Return how often the collector looks; it is enabled, and as before afterwards."""
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)
    gc.enable()


def test_a_worker_has_the_collector_look_less_often(threshold: tuple[int, int, int]) -> None:
    with collecting_seldom():
        assert gc.get_threshold() == (NEW_OBJECTS, *threshold[1:])
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == threshold
    assert gc.get_freeze_count() == 0


def test_rubbish_of_handlers_is_found_still(threshold: tuple[int, int, int]) -> None:
    class Rubbish:
        """What refers to itself, so that only the collector can free it."""

        count = 0

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            Rubbish.count += 1

    with collecting_seldom():
        for _ in range(NEW_OBJECTS):
            Rubbish()
    step("of %s objects of rubbish %s were freed", NEW_OBJECTS, Rubbish.count)
    assert Rubbish.count > NEW_OBJECTS / 4


@pytest.mark.parametrize("own", [(0, 10, 10), (50_000, 5, 5)])
def test_a_collector_that_looks_less_often_is_left_alone(
    own: tuple[int, int, int], threshold: tuple[int, int, int]
) -> None:
    gc.set_threshold(*own)
    with collecting_seldom():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


def test_a_collector_that_is_off_stays_off(threshold: tuple[int, int, int]) -> None:
    gc.disable()
    with collecting_seldom():
        assert not gc.isenabled()
        assert gc.get_threshold() == threshold
    assert not gc.isenabled()


# What a handler sees: the collector's figure, how often threads take turns, and whether malloc maps a buffer of 15 MB
# apart (mallinfo2's hblks) after one of 20 MB was freed; by glibc's defaults it does not, from then on.
SEEING = """
import ctypes, gc, sys
import batchq

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("a", "b", "c", "hblks", "e", "f", "g", "h", "i", "j")]

def mapped():
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Info
    return libc.mallinfo2().hblks

app = batchq.App()

@app.handler("see")
def see(batch):
    large = bytes(20_000_000)
    del large
    before = mapped()
    kept = bytes(15_000_000)
    return {"threshold": gc.get_threshold()[0], "turns": sys.getswitchinterval(), "apart": mapped() - before}
"""


def test_the_worker_of_the_command_line_is_set_up_so(dsn: str, conn: psycopg.Connection, tmp_path: Path) -> None:
    command_line = CommandLine(dsn, tmp_path)
    (tmp_path / "seeing.py").write_text(SEEING)
    batch_id = put(conn, "see")
    assert command_line.run_program("worker", "seeing:app", "--drain").code == 0
    seen = look(conn, batch_id).result
    step("a handler has seen %s", seen)
    assert seen == {"threshold": NEW_OBJECTS, "turns": 0.001, "apart": 1}


if __name__ == "__main__":
    run_alone(__file__)
