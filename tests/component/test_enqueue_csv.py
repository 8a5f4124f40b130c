"""`batchq enqueue KIND --csv FILE`: each row becomes an item; what is no such file is refused with its line."""

import csv
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from batchq.cli.commands import enqueue
from batchq.errors import InvalidInput
from tests.support.alone import run_alone
from tests.support.batches import values
from tests.support.commands import CommandLine

ITEMS = "SELECT jsonb_array_elements(items) FROM batchq.all_batches ORDER BY id"
PEOPLE = "email,name\nann@example.com,Ann\nbob@example.com,\n"
FOUND = [{"email": "ann@example.com", "name": "Ann"}, {"email": "bob@example.com", "name": ""}]


@pytest.fixture
def command(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


@pytest.mark.parametrize("source", ["-", "people.csv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_each_row_becomes_an_item(
    command: CommandLine, conn: psycopg.Connection, source: str, encoding: str, line_end: str
) -> None:
    data = PEOPLE.replace("\n", line_end).encode(encoding)
    (command.directory / "people.csv").write_bytes(data)
    ended = command("enqueue", "items", "--csv", source, "--items-per-batch", "1", stdin=data)
    assert (ended.code, ended.out, ended.err) == (0, "enqueued 2 batches of items\n", "")
    assert values(conn, ITEMS) == FOUND


def test_values_are_texts_as_they_are_written(command: CommandLine, conn: psycopg.Connection) -> None:
    text = 'n,text\n007,"a ""quoted"", value\nof two lines"\n\n 1 ,ü💥\n'
    assert command("enqueue", "items", "--csv", "-", "--json", stdin=text).json == {"batches": 1}
    assert values(conn, ITEMS) == [
        {"n": "007", "text": 'a "quoted", value\nof two lines'},
        {"n": " 1 ", "text": "ü💥"},
    ]


@pytest.mark.parametrize(("given", "delimiter"), [(";", ";"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("|", "|")])
def test_another_delimiter(command: CommandLine, conn: psycopg.Connection, given: str, delimiter: str) -> None:
    text = PEOPLE.replace(",", delimiter)
    assert command("enqueue", "items", "--csv", "-", "--delimiter", given, stdin=text).code == 0
    assert values(conn, ITEMS) == FOUND


def test_the_options_of_a_list_of_items_apply(command: CommandLine, conn: psycopg.Connection) -> None:
    assert command("enqueue", "items", "--csv", "-", "--spread", "4", "--queue", "imports", stdin=PEOPLE).code == 0
    assert conn.execute("SELECT queue, items_total, spread FROM batchq.all_batches").fetchall() == [("imports", 2, 4)]


def test_a_file_without_rows_enqueues_nothing(command: CommandLine, conn: psycopg.Connection) -> None:
    assert command("enqueue", "items", "--csv", "-", stdin="a,b\n").out == "enqueued 0 batches of items\n"
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: the file is empty; write the names of the columns into the first row"),
        ("\n\n", "line 1: the file is empty; write the names of the columns into the first row"),
        ("a,,c\n1,2,3\n", "line 1: column 2 has no name; name every column in the first row"),
        ("\na,b, \n1,2,3\n", "line 2: column 3 has no name; name every column in the first row"),
        ("a,b,a\n1,2,3\n", "line 1: two columns have the name 'a'; rename one"),
        ("a,b\n1,2\n3\n", "line 3: 1 column, but 2 in the first row; quote values that contain ','"),
        ('a,b\n"1\n1",2\n3,4,5\n', "line 4: 3 columns, but 2 in the first row; quote values that contain ','"),
        ('a,b\n1,2\n"3,4\n5,6\n', "line 3: a quote is not closed; close it, or write a quote within a quoted value "
         "twice"),
        ('a,b\n1,2\n"3" x,4\n', "line 3: text follows a closing quote; write a quote within a quoted value twice"),
        (f'a,b\n1,"{"x" * 1_048_577}"\n', "line 2: a value has more than 1,048,576 letters; a quote is probably not "
         "closed"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused_with_its_line(
    command: CommandLine, conn: psycopg.Connection, text: str, problem: str
) -> None:
    assert command("enqueue", "items", "--csv", "-", stdin=text).complaint == f"standard input, {problem}"
    assert values(conn, "SELECT count(*) FROM batchq.all_batches") == [0]


def test_options_that_do_not_fit_are_refused(command: CommandLine) -> None:
    ended = command("enqueue", "items", "--delimiter", ";")
    assert ended.complaint == "--delimiter is for a CSV file: give it with --csv"
    ended = command("enqueue", "items", "--csv", "-", "--delimiter", "ab")
    assert ended.code == 2
    assert "must be one character other than a quote or a line break, or tab, not 'ab'" in ended.err
    assert "not allowed with argument" in command("enqueue", "items", "--csv", "-", "--lines", "-").err
    assert command("enqueue", "items", "--csv", "-", stdin=b"a\n\xff\n").complaint.startswith(
        "standard input is not UTF-8 ("
    )
    assert command("enqueue", "items", "--csv", "none.csv").complaint.startswith("cannot read none.csv")


def test_a_long_file_is_not_held_in_memory() -> None:
    def lines() -> Iterator[str]:
        yield "email,name\n"
        for number in range(200_000):
            yield f"{number}@example.com,Ann\n"

    tracemalloc.start()
    try:
        count = sum(1 for _ in enqueue._csv_items(",", "people.csv", lines()))
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert count == 200_000


def test_what_python_writes_is_read_back() -> None:
    rows: list[dict[str, Any]] = [
        {"a": 'quote " and, comma', "b": "lines\r\nof\ntext"},
        {"a": "", "b": " spaces "},
        {"a": "'", "b": "\\"},
    ]
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, ["a", "b"])
    writer.writeheader()
    writer.writerows(rows)
    written.seek(0)
    assert list(enqueue._csv_items(",", "x.csv", iter(written))) == rows
    with pytest.raises(InvalidInput, match="line 1: the file is empty"):
        list(enqueue._csv_items(",", "x.csv", iter([])))


if __name__ == "__main__":
    run_alone(__file__)
