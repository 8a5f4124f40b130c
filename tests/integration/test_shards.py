"""Shards that are added under load, with real processes and kills, as handlers saw it."""

from tests.instruments.limits import works
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.trials import Place


def test_shards_added_under_load_lose_nothing_and_keep_the_order_of_each_key_beside_kills(dsn: str) -> None:
    seen = works.shards(Place(dsn, works.APP), batches=1500, workers=2, kill_every_seconds=3, splits=(4, 5, 8))
    step("%s", seen.figures)
    assert seen.faults == []
    assert seen.figures["shards used"] >= 5


if __name__ == "__main__":
    run_alone(__file__)
