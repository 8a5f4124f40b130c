"""A release: what bin/release does and refuses, and how the wheel upgrades a schema of an earlier version."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest

from batchq.common.version import __version__
from batchq.postgres import migrate as migrations
from tests.support.alone import run_alone
from tests.support.commands import TASKS
from tests.support.later_migrations import known
from tests.support.steps import step
from tests.support.wheels import ROOT, build_wheel, environment, install, new_environment, run

WHO = {f"GIT_{role}_{what}": "tester@example.com" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
EARLIER = 15  # the last migration of the earlier version
# What the earlier version's clients insert: new batches, one that waits for another, and one that an earlier worker
# left behind with half of its items done.
ENQUEUED = """
INSERT INTO batchq.batches (kind, payload) SELECT 'good', jsonb_build_object('n', n) FROM generate_series(1, 20) n;
INSERT INTO batchq.batches (kind, after) VALUES ('good', '{1}');
INSERT INTO batchq.batches (kind, items, max_failed_items, max_attempts)
VALUES ('items', '["a", "bad", "b", "c"]', 1, 2);
UPDATE batchq.batches_live SET status = 'processing', attempt = 1, claimed_by = 'old', claimed_at = now(),
  claim_token = gen_random_uuid(), lease_expires_at = now() - interval '1 s', items_done = 1
WHERE kind = 'items';
"""


@pytest.fixture(scope="module")
def programs() -> Iterator[Path]:
    """Install the wheel in a new environment; return the folder of its programs."""
    with TemporaryDirectory(prefix="batchq-release-") as directory:
        programs = new_environment(Path(directory) / "venv")
        install(programs, build_wheel(Path(directory)), "binary")
        yield programs


def test_the_wheel_upgrades_a_schema_of_an_earlier_version_and_runs_its_batches(
    programs: Path, empty_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step("an earlier version makes the schema, and its clients enqueue")
    earlier = known(tmp_path / "earlier", EARLIER)
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "directory", lambda: earlier)
        assert len(migrations.migrate(empty_dsn)) == EARLIER
    with psycopg.connect(empty_dsn, prepare_threshold=None) as conn:
        conn.execute(ENQUEUED.encode())

    batchq = programs / "batchq"
    (tmp_path / "tasks.py").write_text(TASKS)
    step("a new worker does not start, and says what to do")
    refused = run(batchq, "worker", "tasks:app", "--drain", cwd=tmp_path, dsn=empty_dsn, code=2)
    assert "batchq migrate" in refused
    step("the new version migrates; a client of the earlier one goes on")
    newer = [file.stem for file in sorted((ROOT / "migrations").glob("*.sql")) if int(file.name[:4]) > EARLIER]
    assert run(batchq, "migrate", cwd=tmp_path, dsn=empty_dsn) == f"applied {', '.join(newer)}\n"
    with psycopg.connect(empty_dsn, prepare_threshold=None) as conn:
        conn.execute("INSERT INTO batchq.batches (kind) VALUES ('good')")
    step("a new worker runs all of them, also what the earlier worker has left behind")
    words = [batchq, "worker", "tasks:app", "--lease-seconds", "2"]
    with subprocess.Popen(words, cwd=tmp_path, env=environment(dsn=empty_dsn)) as worker:
        try:
            run(batchq, "monitor", "--until-done", cwd=tmp_path, dsn=empty_dsn)
        finally:
            worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    with psycopg.connect(empty_dsn, prepare_threshold=None) as conn:
        query = "SELECT kind, status, count(*), sum(items_done) FROM batchq.status GROUP BY 1, 2"
        found = conn.execute(query).fetchall()
    assert sorted(found) == [("good", "completed", 22, 0), ("items", "completed", 1, 3)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a clone of this checkout, with one more change that is not released."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    changelog = clone / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("## [Unreleased]\n", "## [Unreleased]\n\n- A change.\n", 1))
    commit(clone)
    return clone


def commit(checkout: Path) -> None:
    """Commit what has changed."""
    words = ["git", "commit", "--quiet", "--all", "--message", "A change"]
    subprocess.run(words, cwd=checkout, env=os.environ | WHO, check=True)


def release(checkout: Path, *arguments: str) -> tuple[int, str]:
    """Run bin/release; return its exit code and what it printed."""
    ended = subprocess.run(
        [sys.executable, "bin/release", *arguments],
        cwd=checkout, env=os.environ | WHO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ended.returncode, ended.stdout + ended.stderr


def test_a_release_is_committed_and_tagged_and_passes_its_check(checkout: Path) -> None:
    code, said = release(checkout, "99.0.0")
    assert (code, said.partition(";")[0]) == (0, "committed and tagged v99.0.0")
    assert release(checkout, "--check", "v99.0.0") == (0, "v99.0.0 is ready to be published\n")
    changelog = (checkout / "CHANGELOG.md").read_text()
    assert re.search(r"## \[Unreleased\]\n\n## \[99\.0\.0\] - \d{4}-\d\d-\d\d\n\n\S", changelog)
    assert re.search(r"^\[99\.0\.0\]: https://\S+/releases/tag/v99\.0\.0$", changelog, re.MULTILINE)
    assert '__version__ = "99.0.0"' in (checkout / "batchq/common/version.py").read_text()
    tagged = subprocess.run(["git", "status", "--porcelain"], cwd=checkout, capture_output=True, text=True, check=True)
    assert tagged.stdout == ""
    code, said = release(checkout, "100.0.0")
    assert (code, said) == (1, "release: CHANGELOG.md has nothing under Unreleased\n")


def test_a_release_that_would_be_wrong_is_refused(checkout: Path) -> None:
    assert "three numbers" in release(checkout, "1.0")[1]
    assert "older than" in release(checkout, "0.0.1")[1]
    assert release(checkout, "--check", "v0.0.1")[1].startswith("release: the tag is v0.0.1, but the version")
    version = checkout / "batchq/common/version.py"
    version.write_text(version.read_text().replace(__version__, "98.0.0"))
    commit(checkout)
    assert "has no section" in release(checkout, "--check", "v98.0.0")[1]
    (checkout / "new").touch()
    assert release(checkout, "99.0.0") == (1, "release: the checkout has changes; commit them first\n")


def test_a_release_for_another_repository_is_refused(checkout: Path) -> None:
    release(checkout, "99.0.0")
    code, said = release(checkout, "--check", "v99.0.0", "--repository", "https://example.com/somebody/else")
    assert code == 1
    assert "https://example.com/somebody/else" in said


if __name__ == "__main__":
    run_alone(__file__)
