"""What is stored: a handler's error that has a password of batchq's in it is stored, and logged, without it."""

import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, quote_plus

import psycopg
import pydantic
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import batchq
from batchq.common import secrets
from batchq.common.log import hidden
from batchq.common.secrets import hide_password
from batchq.common.text import error_object, message_object, one_line
from batchq.postgres.connections import connect
from batchq.settings import Settings
from tests.support.alone import run_alone
from tests.support.batches import STYLES, drain, failed_items, look, put, register, register_items
from tests.support.roles import role_for

Conn = psycopg.Connection[Any]
AT_ONCE = batchq.Backoff(0, 0)
PASSWORD = "Pq7/correct@horse"
PASSWORDS = {
    "plain": "Pq7correcthorse",
    "special": "p@ss:w/o?r#d%41&=+",
    "spaces and quotes": 'it\'s "a" \\ pass  word',
    "letters": "größe漢字pass",
}


@pytest.fixture
def secret_dsn(admin_dsn: str) -> Iterator[str]:
    """Return the DSN of a worker's role, with its password."""
    with role_for(admin_dsn, "worker", password=PASSWORD) as dsn:
        yield dsn


def spelled(password: str) -> dict[str, str]:
    """Return a password as programs write it."""
    address = f"postgresql://u:{quote(password, safe='')}@h:6543/db"
    return {
        "as it is": password,
        "percent-encoded": quote(password, safe=""),
        "percent-encoded, lower case": quote(password, safe="").replace("%2F", "%2f").replace("%C3%B6", "%c3%b6"),
        "partly encoded": quote(password),
        "of a form": quote_plus(password),
        "address": address,
        "address, as typed": f"postgresql://u:{password}@h:6543/db",
        "parts": make_conninfo(host="h", password=password),
        "repr": repr(password),
        "dict": repr({"host": "h", "password": password}),
        "JSON": json.dumps({"password": password}),
        "JSON of letters": json.dumps({"password": password}, ensure_ascii=False),
        "variable": f"PGPASSWORD={password} psql",
    }


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """Let each test know its own passwords only."""
    before = dict(secrets.known_passwords)
    secrets.known_passwords.clear()
    yield
    secrets.known_passwords.clear()
    secrets.known_passwords.update(before)


def assert_hidden(text: str, password: str) -> None:
    """Assert that a text shows the password in none of its spellings, nor most of it."""
    for name, form in spelled(password).items():
        assert form not in text, name
    longest = max(password.split(), key=len)
    for piece in (longest[: len(longest) * 2 // 3], quote(longest, safe="")[: len(longest)]):
        assert len(piece) < 5 or piece not in text, text


@pytest.mark.parametrize("password", PASSWORDS.values(), ids=PASSWORDS)
def test_a_library_raises_the_password_in_each_of_its_spellings(password: str) -> None:
    secrets.know_password(password)
    for form in spelled(password).values():
        for text in (form, f"cannot connect to {form}: refused", f"a\n{form}\nb", f"x{form}y"):
            error = ValueError(text)
            assert_hidden(one_line(error), password)
            assert_hidden(json.loads(error_object(error))["traceback"], password)
            assert_hidden(json.loads(message_object(text))["error"], password)


def test_a_long_message_is_cut_in_the_middle_of_the_password() -> None:
    password = "Pq7" + "correct-horse" * 3
    secrets.know_password(password)
    for before in (*range(860, 900, 3), *range(1_000, 1_060, 7), 19_990, 50_000):
        for after in (0, 30, 880, 890, 5_000, 100_000):
            for form in (password, f"postgresql://u:{password}@h/db"):
                error = ValueError("a" * before + " " + form + " " + "b" * after)
                for text in (one_line(error), error_object(error)):
                    assert "correct-horse" not in text, (before, after)
                    assert len(text.encode()) <= 8_300


def test_a_message_of_many_addresses_takes_the_worker_long() -> None:
    secrets.know_password("Pq7correcthorse")
    for text in (
        "://a:" * 2_000_000,
        "password='" * 1_000_000,
        "password " * 1_000_000,
        "\\" * 5_000_000,
        "%" * 5_000_000,
    ):
        began_at = time.thread_time()
        one_line(ValueError(text))
        assert time.thread_time() - began_at < 3


def secret_failures(password: str, dsn: str) -> dict[str, Callable[[], Any]]:
    """Return what a handler may do that ends with an error with a secret in it."""

    def cause() -> None:
        try:
            raise ConnectionError(f"no route to {dsn}")
        except ConnectionError as error:
            raise RuntimeError("job failed") from error

    def context() -> None:
        try:
            raise KeyError(password)
        except KeyError:
            raise RuntimeError("while handling") from ValueError(f"second {password}")

    def note() -> None:
        error = ValueError("see the note")
        error.add_note(f"the DSN was {dsn}, its password {quote(password, safe='')}")
        raise error

    def group() -> None:
        raise ExceptionGroup(f"group of {password}", [ValueError(dsn), OSError(2, password, dsn)])

    def name() -> None:
        raise type(f"E{password}", (Exception,), {})("named")

    def model() -> None:
        class Config(pydantic.BaseModel):
            port: int

        Config.model_validate({"port": dsn})

    def source_line() -> None:
        exec(compile(f"def f(): raise ValueError('x')\nf()  # {password}", "tasks.py", "exec"))

    def environment() -> None:
        raise KeyError(dict(os.environ))

    def refused() -> None:
        connect(make_conninfo(dsn, host="127.0.0.1", port=1, connect_timeout=2))

    def cancel() -> None:
        raise batchq.Cancel(f"no need for {dsn}")

    def invalid() -> None:
        raise batchq.InvalidInput(f"bad {dsn} {password}")

    def no_json() -> Any:
        return {"x": {dsn: object()}, "y": float("nan")} if password else None

    def syntax() -> None:
        psycopg.conninfo.make_conninfo(f"postgresql://u:{password} @@ :h:x/db?nonsense={password}")

    made = (
        cause,
        context,
        note,
        group,
        name,
        model,
        source_line,
        environment,
        refused,
        cancel,
        invalid,
        no_json,
        syntax,
    )
    return {function.__name__: function for function in made}


@pytest.mark.parametrize("style", STYLES)
def test_a_handler_fails_with_the_dsn_or_its_password_in_its_error(
    secret_dsn: str, conn: Conn, style: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_secret, password = secret_dsn, PASSWORD
    variable = "Hidden-in-PGPASSWORD"
    monkeypatch.setenv("PGPASSWORD", variable)
    monkeypatch.setenv("SOME_DSN", with_secret)
    ways = secret_failures(password, with_secret)
    app = batchq.App()
    register(app, style, "fail", lambda batch: ways[batch.payload](), backoff=AT_ONCE)

    def fail_item(item: str, batch: batchq.Batch) -> None:
        raise ValueError(f"{item}: {with_secret} {quote(password, safe='')} {variable}")

    register_items(app, style, "items", fail_item)
    app.handler("by_hand")(by_hand(with_secret, variable))
    ids = [put(conn, "fail", name, max_attempts=1) for name in ways]
    ids += [put(conn, "fail", "cause", max_attempts=3), put(conn, "items", items=["a", "b"], max_attempts=1)]
    ids += [put(conn, "by_hand", items=["a"], max_attempts=1)]
    drain(app, with_secret)
    for batch_id in ids:
        row = look(conn, batch_id)
        assert row.status in ("failed", "cancelled"), (batch_id, row.errors)
        stored = json.dumps(row.errors, ensure_ascii=False)
        assert_hidden(stored, password)
        assert_hidden(stored, variable)
    for batch_id in ids[-2:]:
        items = failed_items(conn, batch_id)
        assert items
        for item in items:
            assert "***" in item.error
            assert_hidden(item.error, password)
            assert_hidden(item.error, variable)
    everything = conn.execute("SELECT string_agg(b::text, ' ') FROM batchq.batches b").fetchone()
    assert everything
    assert_hidden(everything[0], password)
    written = capfd.readouterr()
    assert_hidden(written.out + written.err, password)


def by_hand(dsn: str, variable: str) -> Callable[[batchq.Batch], None]:
    """Return a handler that has items fail by hand, with a text."""

    def handler(batch: batchq.Batch) -> None:
        for chunk in batch.chunks():
            for position in range(len(chunk.items)):
                chunk.fail(position, f"not through {dsn} with {variable}")

    return handler


def test_what_a_handler_returns_or_saves_is_its_own(secret_dsn: str, conn: Conn) -> None:
    app = batchq.App()
    password = PASSWORD

    @app.handler("return")
    def returning(batch: batchq.Batch) -> str:
        batch.checkpoint(cursor=f"postgresql://u:{password}@h/db")
        return password

    batch_id = put(conn, "return")
    drain(app, secret_dsn)
    row = look(conn, batch_id)
    assert (row.result, row.cursor) == (password, f"postgresql://u:{password}@h/db")


def test_a_password_comes_from_a_file_of_passwords(
    secret_dsn: str, conn: Conn, tmp_path: Any, monkeypatch: Any
) -> None:
    parts = conninfo_to_dict(secret_dsn)
    password = parts.pop("password")
    file = tmp_path / "pgpass"
    file.write_text(f"*:*:*:*:{password}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    app = batchq.App()

    @app.handler("fail")
    def failing(batch: batchq.Batch) -> None:
        raise ValueError(f"it is {password}")

    batch_id = put(conn, "fail", max_attempts=1)
    drain(app, make_conninfo(**parts))
    assert look(conn, batch_id).errors[0]["error"] == "ValueError: it is ***"


@pytest.mark.parametrize("text", ["\\" * 1_000_000, "://:" * 250_000, "://u:p@" * 140_000, "%" * 1_000_000])
def test_no_text_takes_long_to_search(text: str) -> None:
    Settings.load(dsn=f"postgresql://u:{quote(PASSWORD, safe='')}@h/db")
    began = time.monotonic()
    hide_password(text)
    assert time.monotonic() - began < 2


def test_a_line_of_the_log_is_bounded() -> None:
    line = hidden("a" * 1_000_000)
    assert len(line) < 101_000
    assert "900000 characters" in line


def test_a_password_that_is_a_name_too_or_short_hides_no_half_of_a_message() -> None:
    Settings.load(dsn="postgresql://postgres:postgres@h/db")
    Settings.load(dsn="postgresql://u:abc@h/db")
    Settings.load(dsn="postgresql://u:batchq@h/db")
    text = 'FATAL: database "postgres" of abc has no batchq schema; role "postgres"'
    assert hide_password(text) == text
    assert hide_password("postgresql://postgres:postgres@h/db and password=abc") == (
        "postgresql://postgres:***@h/db and password=***"
    )


def test_an_example_shows_where_the_password_goes_and_no_password_hides_behind_it() -> None:
    example = "set it to your database, such as postgresql://user:password@host:6543/postgres"
    assert hide_password(example) == example
    for text in ("postgresql://user:password@1:secret@host/db", "postgresql://u:passwords@h", "x://u:password1@h"):
        assert "secret" not in hide_password(text)
        assert ":***@h" in hide_password(text)


@pytest.mark.parametrize(
    "text",
    [
        "GET http://api:8080/users/ann@example.com: 404",
        "password: must have 8 characters",
        "the password of ann@example.com is wrong",
        "10:30@noon",
        "key 'password' is missing",
    ],
)
def test_what_is_no_password_is_kept(text: str) -> None:
    assert hide_password(text) == text


if __name__ == "__main__":
    run_alone(__file__)
