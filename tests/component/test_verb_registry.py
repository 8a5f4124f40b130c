"""The registry of verbs: SQL, command line and web UI have what it says, no more and no less."""

import argparse
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from batchq.cli import make_parser
from batchq.cli.verbs import add_arguments, run
from batchq.operate.schedules import ACTIONS
from batchq.operate.verbs import VERBS, Verb
from batchq.postgres.statements.checkpoints import Progress
from batchq.settings import Settings
from tests.component.rows import Conn, failure, insert, processing, value, values
from tests.component.rows import checkpoint as write_checkpoint
from tests.support.alone import run_alone
from tests.support.steps import step
from tests.support.web import served

STORED = ("live", "pending", "processing", "failed", "cancelled", "completed")
TARGETS = {"batch": {"batch_id"}, "queue": {"queue", "kind"}, "worker": {"worker_id"}}
GIVEN = {"priority": 3, "to_queue": "slow", "delay_seconds": 60, "key": "acme"}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)
each_in_bulk = pytest.mark.parametrize(
    "verb", [verb for verb in VERBS.values() if verb.statuses], ids=lambda verb: verb.name
)


def change_of(verb: Verb) -> dict[str, Any]:
    """Return an argument that the verb accepts."""
    return {verb.argument.keys[0]: GIVEN[verb.argument.keys[0]]} if verb.argument else {}


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    [found] = [action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return found.choices


def test_a_verb_that_is_not_for_bulk_takes_ids_and_no_filter(conn: Conn, dsn: str, capsys: Any) -> None:
    batch_id = insert(conn)
    verb = replace(VERBS["cancel"], statuses=())
    parser = argparse.ArgumentParser()
    add_arguments(parser, verb, [])
    with pytest.raises(SystemExit):
        parser.parse_args(["--queue", "mail"])
    settings = {f"set_{name}": None for name in Settings.model_fields} | {"set_dsn": dsn}
    parser.set_defaults(**settings, runs_workers=False)
    assert run(parser.parse_args([str(batch_id)])) == 0
    assert capsys.readouterr().out == f"batch {batch_id} cancelled\n"


@each_verb
def test_the_function_of_a_verb_has_its_arguments(conn: Conn, verb: Verb) -> None:
    [names] = values(
        conn,
        "SELECT proargnames FROM pg_proc WHERE pronamespace = 'batchq'::regnamespace AND proname = %s",
        [verb.function],
    )
    own = {"until"} & set(names) if verb.argument and verb.argument.type == "time" else set(change_of(verb))
    needed = TARGETS[verb.target] | own | verb.fixed.keys() | {"reason", "actor"}
    step("besides, a snooze has a delay, and a retry has a choice")
    assert needed <= set(names) <= needed | {"delay", "whole"}


def test_an_operator_may_call_the_functions_of_the_registry_and_bulk(conn: Conn) -> None:
    granted = values(conn, "SELECT object FROM batchq.duties WHERE duty = 'operator' AND privilege = 'EXECUTE'")
    others = {"bulk", "set_limit", "set_schedule", "enqueue_copy"}
    assert set(granted) == {verb.function for verb in VERBS.values()} | others | {
        f"{action}_schedule" for action in ACTIONS
    }


@pytest.mark.parametrize("status", STORED)
@each_in_bulk
def test_bulk_accepts_the_statuses_of_the_registry(conn: Conn, verb: Verb, status: str) -> None:
    query = "SELECT matched FROM batchq.bulk(%s, %s, %s, dry_run => true)"
    arguments = [verb.function, Jsonb({"status": status}), Jsonb({**verb.fixed, **change_of(verb)})]
    if status in verb.statuses:
        assert value(conn, query, arguments) == 0
    else:
        with pytest.raises(psycopg.errors.RaiseException, match=f"does not apply to batches that are {status}"):
            conn.execute(query, arguments)


@each_in_bulk
def test_the_first_status_of_a_verb_is_the_default(conn: Conn, verb: Verb) -> None:
    insert(conn)
    processing(conn, kind="runs")
    for status, count in (("failed", 3), ("cancelled", 4), ("completed", 5)):
        for _ in range(count):
            taken = processing(conn, kind=status, items=[1, 2], max_failed_items=1)
            write_checkpoint(conn, taken, Progress(1, 1, [failure(1)], first_index=0))
            conn.execute("SELECT batchq.cancel(%s)", [taken.id])
            conn.execute("UPDATE batchq.batches_finished SET status = %s WHERE id = %s", [status, taken.id])
    query = "SELECT matched FROM batchq.bulk(%s, %s, %s, dry_run => true)"
    change = Jsonb({**verb.fixed, **change_of(verb)})
    filters: list[dict[str, str]] = [{}, {"status": verb.statuses[0]}]
    found = [value(conn, query, [verb.function, Jsonb(given), change]) for given in filters]
    assert found[0] == found[1] == {"live": 2, "pending": 1, "failed": 3}[verb.statuses[0]]


@each_verb
def test_the_command_of_a_verb_has_its_options(verb: Verb) -> None:
    parser = commands()[verb.command]
    options = {name: action for action in parser._actions for name in action.option_strings}
    expected = {"--reason", "--actor", "--json"} | ({verb.option} if verb.option else set())
    if verb.argument:
        expected |= {"--for", "--until"} if verb.argument.type == "time" else {verb.argument.option}
    if verb.statuses:
        expected |= {"--status", "--dry-run", "--fast"}
        assert options["--status"].choices == verb.statuses
    assert expected <= options.keys()
    assert [action.dest for action in parser._actions if not action.help] == []


@each_verb
def test_the_web_ui_asks_before_each_verb_and_offers_bulk_where_it_can_be_done(dsn: str, verb: Verb) -> None:
    with served(dsn) as site:
        asked, in_bulk = (site.client.get(f"/{form}/{verb.name}?id=1&queue=q&worker=w") for form in ("verbs", "bulk"))
    assert (asked.status_code, in_bulk.status_code) == (200, 200 if verb.statuses else 404)
    for answer in (asked, in_bulk) if verb.statuses else (asked,):
        assert verb.explanation in answer.text
        assert verb.argument is None or f'name="{verb.argument.name}"' in answer.text


def test_a_page_offers_what_would_change_a_batch() -> None:
    pending = ["snooze", "set_priority", "move"]
    expected = {
        "ready": ["cancel", *pending],
        "scheduled": ["cancel", "retry", *pending],
        "retrying": ["cancel", "retry", *pending],
        "processing": ["cancel"],
        "stalled": ["cancel"],
        "completed": ["retry_whole"],
        "failed": ["retry", "retry_whole"],
        "cancelled": ["retry", "retry_whole"],
    }
    for status, names in expected.items():
        assert [name for name, verb in VERBS.items() if verb.is_offered(status, 0)] == names, status
    assert [name for name, verb in VERBS.items() if verb.is_offered("completed", 2)] == ["retry_items", "retry_whole"]


if __name__ == "__main__":
    run_alone(__file__)
