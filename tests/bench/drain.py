"""How fast one worker process drains no-op batches: ``python tests/bench/drain.py [--batches N] [--runs R]``.

On the server of the tests (BATCHQ_TEST_SERVER, BATCHQ_TEST_DSN) or, with neither, on the embedded one, with durable
commits. Each run: N batches of about 100 bytes by COPY, ANALYZE, then ``batchq worker --drain`` as its own process; the
rate is N through the time from the first claim to the last finish, by the database's clock, and every batch must have
been completed in one attempt. Prints a JSON line a run, and the median.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from batchq import embedded, enqueue_many  # noqa: E402
from batchq.migrate import migrate  # noqa: E402

MEASURE = """
SELECT count(*) FILTER (WHERE status = 'completed' AND attempt = 1),
       extract(epoch FROM max(finished_at) - min(claimed_at))::float8
FROM batchq.batches
"""


def main() -> int:
    """Measure, print, and return 0 if every batch was worked once."""
    options = parse_arguments()
    with ExitStack() as stack:
        dsn = options.dsn or embedded_dsn(stack)
        migrate(dsn)
        rates = [run(dsn, options.batches) for _ in range(options.runs)]
    print(f"median of {options.runs}: {statistics.median(rates):,.0f} batches/s, one worker process")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dsn", help="a database to use; its batches are removed first (default: a private server)")
    return parser.parse_args()


def embedded_dsn(stack: ExitStack) -> str:
    """Start a private server with durable commits, on disk; return its DSN."""
    directory = Path(stack.enter_context(TemporaryDirectory(prefix="batchq-bench-", dir="/var/tmp")))
    directory.chmod(0o755)
    server = embedded.start(directory, {"shared_buffers": "1GB", "max_wal_size": "8GB"})
    return stack.enter_context(server).dsn()


def run(dsn: str, count: int) -> float:
    """Drain *count* batches; return how many a second."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("TRUNCATE batchq.batches")
        enqueue_many(conn, "noop", ({"n": n, "to": "user@example.com", "pad": "x" * 50} for n in range(count)))
        conn.execute("VACUUM ANALYZE batchq.batches_live")
        conn.execute("CHECKPOINT")
        command = [
            sys.executable,
            "-m",
            "batchq",
            "worker",
            "tests.bench.noop:app",
            "--drain",
            "--log-level",
            "warning",
        ]
        subprocess.run(command, env=os.environ | {"BATCHQ_DSN": dsn}, cwd=ROOT, check=True)
        row = conn.execute(MEASURE).fetchone()
        version = conn.execute("SHOW server_version").fetchone()
    if row is None or row[0] != count:
        sys.exit(f"not every batch was completed in one attempt: {row}")
    rate = count / row[1]
    said = {"batches": count, "per_second": round(rate), "postgres": version and version[0], "cpus": os.cpu_count()}
    print(
        json.dumps(said | {"python": platform.python_version(), "at": datetime.now(UTC).isoformat(timespec="seconds")})
    )
    return rate


if __name__ == "__main__":
    sys.exit(main())
