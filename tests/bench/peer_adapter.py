"""Start tests/instruments/bench/peer_adapter.py: programs that compare queues know batchq's adapter by this path."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parents[1] / "instruments" / "bench" / "peer_adapter.py"), run_name="__main__")
