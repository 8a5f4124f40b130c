"""batchq.contrib.django: the tests are in tests/support/django_project, and run in a process of their own."""

from pathlib import Path

import pytest

from tests.support.alone import run_alone
from tests.support.django_runs import names_in, run_file
from tests.support.servers import Server

FILES = ("check_tasks.py", "check_worker.py", "check_admin.py", "check_web.py")


@pytest.fixture(scope="module")
def problems(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Return what was wrong by file and test, "" for those that passed."""
    folder: Path = tmp_path_factory.mktemp("reports")
    return {
        (file, name): problem
        for file in FILES
        for name, problem in run_file(file, server, folder / f"{file}.xml").items()
    }


@pytest.mark.parametrize(("file", "name"), [(file, name) for file in FILES for name in names_in(file)])
def test_with_django(problems: dict[tuple[str, str], str], file: str, name: str) -> None:
    if problem := problems[file, name]:
        pytest.fail(problem, pytrace=False)


if __name__ == "__main__":
    run_alone(__file__)
