"""The terminal: no text that somebody hostile has chosen steers it, hides in it, or forges a line of batchq's own."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from batchq.common import terminal
from batchq.common.text import visible, visible_json, visible_line
from batchq.postgres.statements import workers
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.workers import WorkerRow
from tests.component.rows import change, checkpoint, expire_lease, failure, finished, insert, processing
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.hostile import CLEAR, COPY, FORGING, SHOWN, STEERING, invisible_in, is_invisible, without_colors
from tests.support.steps import step
from tests.support.terminals import on_terminal

Conn = psycopg.Connection[Any]
FORGED_TRACE = "boom\nattempt 9, 2030-01-01: forged\n2030-01-01  completed in attempt 1\n\x1b[2Jgone"


@pytest.fixture
def command(dsn: str, tmp_path: Path) -> CommandLine:
    """Return what runs commands on the test's database."""
    return CommandLine(dsn, tmp_path)


def poison(conn: Conn, text: str) -> dict[str, int]:
    """As a producer, a worker and an operator, write *text* into every column that takes any text; return ids."""
    error = {"error": text, "traceback": FORGED_TRACE, "attempt": text, "at": text}
    ids = {"pending": insert(conn, kind=text, queue=text, payload={text: [text]}, unique_key=text)}
    running = processing(conn, kind=text, items=[text, 2], worker=text, payload={text: text})
    checkpoint(conn, running, Progress(1, 1, [failure(0, text)], first_index=0))
    change(conn, running.id, errors=[error], cursor={text: text})
    ids["running"] = running.id
    stalled = processing(conn, kind=text, worker=text, queue=text[:20], priority=5)
    expire_lease(conn, stalled.id, 30)
    ids["stalled"] = stalled.id
    ids["failed"] = finished(conn, "failed", kind=text, queue=text[-20:], error=json.dumps(error))
    conn.execute("SELECT batchq.pause(queue => %s, reason => %s, actor => %s)", [text] * 3)
    with conn.transaction():
        row = WorkerRow(text, text, 1, text, [text], [text[:30]], 8)
        conn.execute(*workers.heartbeat(row, 3, stopping=False))
    conn.execute(
        "INSERT INTO batchq.audit (verb, details, reason, actor, queue) VALUES (%s, %s, %s, %s, %s)",
        [text, Jsonb({text: text, "filter": {text: text}}), text, text, text],
    )
    return ids


COMMANDS = (
    ("status",), ("top",), ("audit",), ("pause",), ("check",), ("check", "--invariants"), ("doctor",),
    ("show", "running"), ("show", "failed"), ("logs", "running"), ("logs", "failed"), ("watch", "failed"),
    ("monitor", "--exit-on", "stalled"), ("cancel", "failed", "pending"), ("retry", "running"),
)  # fmt: skip


def words(ids: dict[str, int], arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command, with ids for names."""
    return [str(ids.get(word, word)) for word in arguments]


def test_a_producer_a_worker_and_an_operator_steer_the_terminal_of_who_looks(conn: Conn, command: CommandLine) -> None:
    ids = poison(conn, STEERING)
    shown = 0
    for arguments in COMMANDS:
        for more in ((), ("--json",)):
            step("%s", (*arguments, *more))
            ended = command(*words(ids, [*arguments, *more]))
            assert "Traceback (most" not in ended.err.replace(FORGED_TRACE, "")
            assert invisible_in(ended.out + ended.err) == [], arguments
            shown += SHOWN in ended.out
            if more and ended.out and arguments[0] not in ("watch", "monitor", "logs"):
                json.loads(ended.out)
    assert shown >= 10, "the texts were there to be seen"
    # In color: what is sent besides is nothing but colors.
    for arguments in COMMANDS:
        if arguments[0] in ("top", "watch"):
            continue  # they move the cursor themselves: see below
        ended = command(*words(ids, arguments), FORCE_COLOR="1", TERM="xterm")
        assert invisible_in(without_colors(ended.out + ended.err)) == [], arguments


def test_an_invariant_that_a_worker_breaks_names_the_worker_harmlessly(conn: Conn, command: CommandLine) -> None:
    batch_id = insert(conn)
    conn.execute("UPDATE batchq.batches_live SET claimed_by = %s WHERE id = %s", [STEERING, batch_id])
    ended = command("check", "--invariants")
    assert (ended.code, SHOWN in ended.out, invisible_in(ended.out)) == (1, True, [])


def test_a_producer_steers_the_bar_of_who_watches(conn: Conn, command: CommandLine) -> None:
    batch_id = finished(conn, "failed", kind=STEERING, items=[1], error=json.dumps({"error": STEERING}))
    code, seen = on_terminal(command, "watch", str(batch_id))
    assert code == 1
    assert COPY not in seen
    assert CLEAR not in seen
    assert not [char for char in invisible_in(seen, but="\r\n\x1b") if char != "U+0007"], seen
    assert SHOWN in seen.replace("\r\n", "")


def test_a_producer_forges_a_line_by_a_line_break_in_a_kind(conn: Conn, command: CommandLine) -> None:
    ids = poison(conn, FORGING)
    for arguments in COMMANDS:
        for environment in ({}, {"COLUMNS": "2000"}):
            ended = command(*words(ids, arguments), **environment)
            lines = (ended.out + ended.err).splitlines()
            assert [line for line in lines if line.startswith(("forged", "cell", "attempt 9", "2030-01-01"))] == []
            if environment:  # else a long cell is folded, within its column
                assert not any(line.strip().startswith("forged") for line in lines), (arguments, ended.out)
            assert invisible_in(ended.out + ended.err) == [], arguments


def test_a_handlers_traceback_forges_another_attempt(conn: Conn, command: CommandLine) -> None:
    error = json.dumps({"error": "no", "traceback": FORGED_TRACE, "attempt": 1, "at": "2020-01-01"})
    batch_id = finished(conn, "failed", error=error)
    for name in ("show", "logs"):
        text = command(name, str(batch_id)).out
        assert (
            "\n    attempt 9, 2030-01-01: forged\n    2030-01-01  completed in attempt 1\n    ⟨U+001B⟩[2Jgone\n" in text
        )


def test_somebody_names_a_file_so_that_the_complaint_steers_the_terminal(command: CommandLine) -> None:
    for arguments in (("enqueue", "k", "--items", STEERING), ("enqueue", "k", "--lines", f"{FORGING}.txt")):
        ended = command(*arguments)
        assert ended.code == 2
        assert "cannot read" in ended.complaint
        assert invisible_in(ended.err) == []
    path = command.directory / "x\x1b]52;c;ZXZpbA==\x07\nforged.jsonl"
    path.write_text("{]\n")
    for flag, text in (("--items", "{]\n"), ("--lines", "\udcff")):
        path.write_bytes(text.encode(errors="surrogateescape"))
        ended = command("enqueue", "k", flag, path.name)
        assert "⟨U+001B⟩]52" in ended.complaint
        assert invisible_in(ended.err) == []
    # The shell puts the names of files there, where somebody wrote `*`.
    for arguments in (("show", STEERING), ("cancel", "1", FORGING), ("status", "--status", STEERING), (STEERING,)):
        ended = command(*arguments)
        assert ended.code == 2
        assert invisible_in(ended.out + ended.err) == [], arguments


def test_a_trigger_of_the_database_steers_the_terminal_by_what_it_raises(conn: Conn, command: CommandLine) -> None:
    batch_id = insert(conn)
    conn.execute(
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION USING MESSAGE = E'no\\x1b]52;c;ZXZpbA==\\x07\\nforged', "
        "HINT = E'\\u202ehint'; END $$"
    )
    conn.execute(
        "CREATE TRIGGER refuse BEFORE DELETE OR UPDATE ON batchq.batches_live "
        "FOR EACH ROW EXECUTE FUNCTION public.refuse()"
    )
    for arguments in (("cancel", str(batch_id)), ("cancel", "--all"), ("snooze", str(batch_id), "--for", "1h")):
        ended = command(*arguments)
        assert ended.code != 0
        assert "⟨U+001B⟩]52" in ended.out + ended.err
        assert invisible_in(ended.out + ended.err) == []
        assert "\nforged" not in ended.out + ended.err


def test_an_operator_writes_a_reason_that_forges_a_row_of_the_audit(conn: Conn, command: CommandLine) -> None:
    batch_id = insert(conn)
    assert command("cancel", str(batch_id), "--reason", FORGING, "--actor", STEERING).code == 0
    assert command("pause", "--kind", "a", "--reason", FORGING, "--actor", FORGING).code == 0
    for name in ("audit", "pause", "status", "top"):
        text = command(name, COLUMNS="2000").out
        assert "x⟨U+000A⟩forged line⟨U+000D⟩" in text, name
        assert invisible_in(text) == []
    assert len(command("audit", COLUMNS="2000").out.splitlines()) == 4


def test_a_worker_with_a_name_of_two_hundred_kilobytes_floods_the_screen(conn: Conn, command: CommandLine) -> None:
    with conn.transaction():
        conn.execute(
            *workers.heartbeat(WorkerRow("w" * 200_000, "h", 1, "0", ["default"], ["k"], 8), 3, stopping=False)
        )
    for name in ("status", "top"):
        ended = command(name)
        assert "(200,000characters)" in "".join(ended.out.split())
        assert len(ended.out) < 300_000


def test_a_producer_disguises_a_kind_as_another_by_what_has_no_width(conn: Conn, command: CommandLine) -> None:
    for kind in ("payments", "pay\u200bments", "pay\u00adments", "pay\ufe0fments", "pay\U000e0061ments"):
        insert(conn, kind=kind)
    text = command("status").out
    for shown in ("pay⟨U+200B⟩ments", "pay⟨U+00AD⟩ments", "pay⟨U+FE0F⟩ments", "pay⟨U+E0061⟩ments"):
        assert shown in text


def test_wide_letters_stay_in_their_column(conn: Conn, command: CommandLine) -> None:
    insert(conn, kind="漢字漢字", queue="🙂")
    insert(conn, kind="plain", queue="q")
    rows = [line for line in command("status").out.splitlines() if "漢字" in line or "plain" in line][:2]
    places = [cells_before(line, line.index("漢字" if "漢字" in line else "plain")) for line in rows]
    assert len(set(places)) == 1, rows


def cells_before(line: str, end: int) -> int:
    """Return how many cells of a terminal the beginning of a line takes."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line[:end])


LOGGING_TASKS = """
import json, logging, pathlib
import batchq, structlog

app = batchq.App()
log = structlog.get_logger()

class Bad:
    def __repr__(self):
        return json.loads(pathlib.Path("text.json").read_text())

@app.handler("log")
def handler(batch):
    text = batch.payload["text"]
    log.info(text, kind_of=text, nested=[text], bad=Bad(), **{text: text})
    log.info("one", plain="\\x1b]52;c;ZXZpbA==\\x07")
    logging.getLogger("theirs").warning("got %s", text)
    try:
        raise ValueError(text)
    except ValueError:
        log.exception("failed", text=text)
        logging.getLogger("theirs").exception(text)
        logging.getLogger("theirs").warning("x", stack_info=True)
    logging.getLogger("theirs").warning("%d", text)  # cannot be made
    raise ValueError(text)
"""


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_producer_forges_lines_of_the_log_and_steers_who_reads_it(
    conn: Conn, command: CommandLine, log_format: str
) -> None:
    (command.directory / "logging_tasks.py").write_text(LOGGING_TASKS)
    text = STEERING + FORGING
    (command.directory / "text.json").write_text(json.dumps(text))
    insert(conn, kind="log", payload={"text": text}, max_attempts=1)
    ended = command.run_program("worker", "logging_tasks:app", "--drain", BATCHQ_LOG_FORMAT=log_format)
    assert ended.code == 0
    assert invisible_in(ended.err, but="\n\t") == []
    lines = ended.err.splitlines()
    assert not any(line.startswith("forged") for line in lines)
    if log_format == "json":
        assert all(json.loads(line) for line in lines if not line.startswith(("---", " ")))
    else:
        assert ended.err.count(SHOWN) >= 10
        begins = [line for line in lines if not line.startswith("    ")]
        assert all(line[:4].isdigit() or line.startswith("--- Logging error") for line in begins), begins


# ------------------------------------------------------------------------------------------------- the one function


def test_every_invisible_character_of_unicode_is_spelled_out_and_nothing_else() -> None:
    every = [chr(number) for number in range(0x110000)]
    missed = [f"U+{ord(char):04X}" for char in every if is_invisible(char) and visible_line(char) == char]
    assert missed == []
    letters = [char for char in every if unicodedata.category(char)[0] in "LNPS" and visible_line(char) != char]
    # Fillers are letters by their category, and show nothing.
    assert [f"U+{ord(char):04X}" for char in letters] == ["U+115F", "U+1160", "U+3164", "U+FFA0"]
    assert visible("a\tb\n") == "a\tb\n"
    assert visible_line("a\tb\n") == "a⟨U+0009⟩b⟨U+000A⟩"


@pytest.mark.parametrize("text", ["⚠️ retry ❤️", "👨‍👩‍👧 at home", "👍🏽‍", "می‌خواهم", "क्‍ष", "grüße, שלום, 漢字, 🙂"])
def test_what_changes_how_its_neighbors_look_is_left_as_it_is(text: str) -> None:
    assert visible(text.rstrip("\u200d")) == text.rstrip("\u200d")


@pytest.mark.parametrize(
    "text",
    ["good\u200d", "go\u200dod", "a\ufe0f", "支\u200c付", "❤\ufe0f\ufe0f", "\u200d", "👨\u200d", "א\u200dב"],
)
def test_what_joins_nothing_is_spelled_out(text: str) -> None:
    assert "⟨U+" in visible(text)


def test_json_for_a_program_is_the_same_json() -> None:
    value = {STEERING + FORGING: [STEERING, "漢字 grüße"]}
    text = visible_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert invisible_in(text) == []
    assert "漢字 grüße" in text


def test_a_block_is_indented_and_a_line_is_a_line() -> None:
    assert terminal.block("a\n\nb\x1b[2J\n") == "    a\n    \n    b⟨U+001B⟩[2J"
    assert terminal.line(1234567) == "1,234,567"
    assert [terminal.line(value) for value in (None, True, "x" * 20_001)] == [
        "", "True", f"{'x' * 20_000} ... (20,001 characters)"
    ]  # fmt: skip


if __name__ == "__main__":
    run_alone(__file__)
