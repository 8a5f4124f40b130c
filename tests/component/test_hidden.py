"""Hidden fields: their values are in no log line, no stored error, no page and no output of a command."""

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import batchq
from batchq.cli.top.batch_text import page
from batchq.cli.top.source import read_page
from batchq.common import hidden, log
from batchq.common.hidden import BatchValues, Fields
from batchq.common.secrets import values_to_hide
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, failed_items, look, put, register, register_items
from tests.support.commands import CommandLine
from tests.support.web import served, text_of

Conn = psycopg.Connection[Any]
SECRET = "hunter2 \"Grüße\"\n'x'"
PAYLOAD = {"user": "ann", "phrase": SECRET, "card": {"PIN": 4711, "kind": "visa"}, "api_token": [SECRET + "!"]}
NAMES = ("phrase", "*_token", "pin")
both_styles = pytest.mark.parametrize("style", STYLES)


@pytest.fixture
def hiding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the fields of NAMES in this program."""
    monkeypatch.setattr(hidden.OF_THIS_PROGRAM, "fields", Fields(NAMES))


def has_secret(text: str) -> bool:
    """Return whether a text has a hidden value, however it is written."""
    return "hunter2" in text or "4711" in text


# -------------------------------------------------------------------------------------------------- errors and logs


@both_styles
def test_errors_tracebacks_and_logs_of_a_batch_have_no_hidden_value(
    conn: Conn, dsn: str, hiding: None, style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app = batchq.App()

    def leak(batch: batchq.Batch) -> None:
        structlog.get_logger().info("paying", phrase=SECRET, whole=batch.payload, pin_text="PIN 4711", user="ann")
        raise ValueError(f"no user with {batch.payload!r} and {json.dumps(batch.payload)} and {SECRET}")

    register(app, style, "leak", leak)
    batch_id = put(conn, "leak", PAYLOAD, max_attempts=1)
    log.configure("json", "info")
    drain(app, dsn)
    [error] = look(conn, batch_id).errors
    output = "".join(capfd.readouterr())
    assert "'user': 'ann', 'phrase': '***', 'api_token': ['***']}" in error["error"]
    assert "in leak" in error["traceback"]
    assert not has_secret(json.dumps(error))
    assert '"user": "ann"' in output
    assert "PIN ***" in output
    assert not has_secret(output)
    assert look(conn, batch_id).payload == PAYLOAD


@both_styles
def test_errors_of_items_have_no_hidden_value_of_any_item_of_their_chunk(
    conn: Conn, dsn: str, hiding: None, style: str, capfd: pytest.CaptureFixture[str]
) -> None:
    app = batchq.App()

    def leak(item: Any, batch: batchq.Batch) -> None:
        structlog.get_logger().info("item", text=f"with {item}")
        raise ValueError(f"bad {item} of {batch.payload}")

    register_items(app, style, "leak_items", leak)
    batch_id = put(conn, "leak_items", PAYLOAD, items=[{"n": n, "phrase": f"{SECRET}{n}"} for n in range(3)])
    log.configure("json", "info")
    drain(app, dsn)
    errors = [row.error for row in failed_items(conn, batch_id)]
    assert [error.partition(" of {")[0] for error in errors] == [
        f"ValueError: bad {{'n': {n}, 'phrase': '***'}}" for n in range(3)
    ]
    assert not has_secret(" ".join(errors) + json.dumps(look(conn, batch_id).errors) + "".join(capfd.readouterr()))


def test_an_error_of_a_failure_hook_is_logged_without_hidden_values(
    conn: Conn, dsn: str, hiding: None, capfd: pytest.CaptureFixture[str]
) -> None:
    app = batchq.App()
    app.handler("fail_hooked")(lambda _: 1 / 0)

    @app.on_failure
    def report(failure: batchq.Failure) -> None:
        raise ValueError(f"cannot report {failure.payload}")

    put(conn, "fail_hooked", PAYLOAD, max_attempts=1)
    log.configure("json", "info")
    drain(app, dsn)
    output = "".join(capfd.readouterr())
    assert "cannot report {'" in output
    assert not has_secret(output)


def test_without_hidden_fields_a_batch_is_as_before(conn: Conn, dsn: str) -> None:
    app = batchq.App()

    @app.handler("open")
    def fail(batch: batchq.Batch) -> None:
        raise ValueError(f"no {batch.payload}")

    batch_id = put(conn, "open", {"pin": 4711}, max_attempts=1)
    drain(app, dsn)
    assert look(conn, batch_id).errors[0]["error"] == "ValueError: no {'pin': 4711}"


# ---------------------------------------------------------------------------------------------------- what is shown


def test_the_web_ui_shows_no_hidden_value(conn: Conn, dsn: str, hiding: None) -> None:
    batch_id = put(conn, "shown", PAYLOAD)
    conn.execute(
        "SELECT batchq.set_schedule('nightly', '0 3 * * *', kind => 'shown', payload => %s)", [json.dumps(PAYLOAD)]
    )
    conn.commit()
    with served(dsn) as site:
        schedule = text_of(site, "/schedules/of?name=nightly")
        text = text_of(site, f"/batches/{batch_id}")
        raw = site.client.get(f"/batches/{batch_id}/payload.json").json()
        copy = text_of(site, f"/batches/{batch_id}/copy")
    assert raw == {"user": "ann", "phrase": "***", "card": {"PIN": "***", "kind": "visa"}, "api_token": "***"}
    assert "ann" in text
    assert "***" in text
    assert "It is copied unchanged" in copy
    assert '"phrase": "***"' in schedule
    assert not has_secret(text + copy + schedule)


def test_the_command_line_shows_no_hidden_value(conn: Conn, dsn: str, tmp_path: Path) -> None:
    batch_id = put(conn, "shown", PAYLOAD)
    command = CommandLine(dsn, tmp_path)
    shown = command("show", str(batch_id), BATCHQ_HIDDEN_FIELDS=", ".join(NAMES)).out
    as_json = command("show", str(batch_id), "--json", BATCHQ_HIDDEN_FIELDS=", ".join(NAMES)).out
    (tmp_path / ".env").write_text("BATCHQ_HIDDEN_FIELDS=phrase,pin,api_token\n")
    by_file = command("show", str(batch_id)).out
    assert [text.count("***") for text in (shown, as_json, by_file)] == [3, 3, 3]
    assert not has_secret(shown + as_json + by_file)
    assert "ann" in shown


def test_the_command_line_shows_no_hidden_value_of_a_schedule(conn: Conn, dsn: str, tmp_path: Path) -> None:
    command = CommandLine(dsn, tmp_path)
    add = ("schedule", "add", "nightly", "0 3 * * *", "--kind", "shown", "--json", "--payload")
    given = {"BATCHQ_HIDDEN_FIELDS": ",".join(NAMES)}
    added = [command(*add, json.dumps(PAYLOAD | {"user": user}), **given) for user in ("ann", "bob")]
    listed = [command(*words, "--json", **given) for words in (("schedule", "list"), ("status",), ("top",))]
    assert [found.out.count("***") for found in added + listed] == [3, 6, 3, 3, 3]
    assert all("bob" in found.out and not has_secret(found.out) for found in [added[1], *listed])


def test_the_terminal_says_that_a_payload_goes_on_only_if_it_does(conn: Conn, hiding: None) -> None:
    for payload, goes_on in (({"phrase": SECRET * 9}, False), ({"user": "ann " * 9000}, True)):
        found = read_page(conn, put(conn, "shown", payload))
        assert found
        console = Console(width=100)
        with console.capture() as captured:
            console.print(page(found, 100))
        assert ("characters; all: batchq show" in captured.get()) == goes_on


# -------------------------------------------------------------------------------------------------------- the rules

names = st.sampled_from(["a", "pin", "PIN", "x_token", "password", 'p"in', "pin\\"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(names, part, max_size=3),
)
often = settings(max_examples=300, deadline=None, derandomize=True)


@often
@given(json_values, st.sampled_from([None, 2]))
def test_a_text_hides_what_its_value_hides(value: Any, indent: int | None) -> None:
    fields = Fields(NAMES)
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert json.loads(fields.in_text(text)) == fields.in_value(value)
    assert Fields(["none"]).in_text(text) == text


@often
@given(st.text(alphabet="ab\\\"' \n", max_size=12), st.integers(0, 60))
def test_a_text_that_ends_anywhere_shows_nothing_hidden(rest: str, end: int) -> None:
    text = json.dumps({"a": rest, "pin": {"x": ["secret", 5], "y": f"secret{rest}"}, "b": [{"PIN": "secret"}]})
    shown = Fields(NAMES).in_text(text[: len(text) * end // 60])
    assert "secret" not in shown
    assert Fields(["none"]).in_text(text[:end]) == text[:end]


def test_a_log_looks_at_each_name_once_however_deep_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Counting(Fields):
        def has(self, name: str) -> bool:
            seen.append(name)
            return super().has(name)

    monkeypatch.setattr(hidden.OF_THIS_PROGRAM, "fields", Counting(["phrase"]))
    value: dict[str, Any] = {"phrase": "secret"}
    for _ in range(50):
        value = {"inner": value}
    assert '"phrase": "***"' in json.dumps(log.hidden(value))
    assert len(seen) == 51


def test_names_hold_at_any_depth_in_any_case_and_with_stars() -> None:
    fields = Fields(["password", "*token", "card.no"])
    assert all(map(fields.has, ("password", "Password", "token", "API_TOKEN", "card.no")))
    assert not any(map(fields.has, ("passwords", "token_id", "card", "cardno")))
    assert fields.in_value([{"a": [{"Token": {"b": 1}}]}]) == [{"a": [{"Token": "***"}]}]
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert fields.in_value(deep) == "***"
    assert fields.values({"password": [deep, {"z": "abc"}, 12345, True, None, "ab"]}) == {"abc", "12345"}


def test_a_value_is_searched_for_as_it_may_be_written_and_a_long_one_in_pieces() -> None:
    long = "".join(f"{number:05}" for number in range(300))
    payload = json.dumps({"phrase": "a b/ü", "x_token": long})
    found = BatchValues(Fields(NAMES), payload)()
    assert {"a b/ü", "a b/\\u00fc", "a%20b/%C3%BC", long[:1000], long[1000:]} == set(found)


def test_after_a_failure_hook_no_value_is_hidden_any_more(hiding: None) -> None:
    hidden.hide_values_of(json.dumps(PAYLOAD))
    assert values_to_hide.get() is not None
    hidden.hide_no_values()
    assert values_to_hide.get() is None


if __name__ == "__main__":
    run_alone(__file__)
