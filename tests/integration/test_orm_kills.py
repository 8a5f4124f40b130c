"""Exactly once with an ORM, beside kills of real worker processes. The long form: tests/instruments/orm_kills."""

import pytest

from tests.instruments.orm_kills import works
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.trials import Place


@pytest.fixture
def place(admin_dsn: str, dsn: str) -> Place:
    """The test's database."""
    return Place(admin_dsn, works.APP, dsn)


def test_rows_of_sqlalchemy_are_there_exactly_once_beside_kills(place: Place) -> None:
    seen = works.kills(place, 20, workers=2)
    step("%s", seen.figures)
    assert seen.faults == []


if __name__ == "__main__":
    run_alone(__file__)
