"""Memory of a worker: what large payloads leave behind in many threads."""

import subprocess
import sys

from tests.support.alone import run_alone
from tests.support.steps import step

GROWTH = """
import sys, threading
from batchq.memory import return_large_buffers

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
        code = "from batchq.memory import return_large_buffers; print(return_large_buffers())"
        value = "glibc.malloc.arena_max=1" if name == "GLIBC_TUNABLES" else "100000"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={name: value}, check=True
        )
        assert done.stdout == "False\n"


if __name__ == "__main__":
    run_alone(__file__)
