"""What the list of batches reads: a page in one of its sorts, and counts by status. Indexes and limits bound each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchq.postgres.statements import running, views
from batchq.postgres.statements.views import HIGHEST_ID
from batchq.web.reads import LOOK_ROWS, PAGE_ROWS, Conn, Row, rows
from batchq.web.search import InPayload, Terms

LOOK_DUE_ROWS = 1000  # how many batches of each queue and priority one page of a list by run_at searches
LOOK_PAYLOADS = 1000  # how many batches one page searches by payload, which takes longer
MOST_PAYLOAD_BYTES = 100_000  # of a payload that is searched, as stored
_MOST_COUNTED = 1000
_PENDING = ("ready", "scheduled", "retrying")
_RUNNING = ("processing", "stalled")
_ENDED = ("failed", "cancelled")
_EVERY_STATUS = ["waiting", "pending", "processing", "completed", "failed", "cancelled"]
_FILE = running.load_statements(Path(__file__).with_name("batch_list.sql"))
SQL = {name: text.replace(b"/* columns */", _FILE["columns"].strip()) for name, text in _FILE.items()}


@dataclass(frozen=True)
class Sort:
    """An order of the list that an index can give for some statuses.

    statuses: the shown statuses that it is offered for, "" for any. column: the column that is sorted. by_time: whether
    a page begins at a time and an id, instead of at an id.
    """

    name: str
    title: str
    statuses: tuple[str, ...]
    statement: str
    column: str
    is_rising: bool = False
    by_time: bool = True


# The first one of a status is its default.
SORTS = (
    Sort("newest", "Newest first", ("", "waiting", *_PENDING, "completed"), "searched_newest", "id", by_time=False),
    Sort("newest", "Newest first", _RUNNING, "searched_processing", "id", by_time=False),
    Sort("oldest", "Oldest first", _RUNNING, "searched_processing", "id", True, by_time=False),
    Sort("oldest", "Oldest first", ("completed",), "searched_oldest", "id", True, by_time=False),
    Sort("longest", "Longest running first", _RUNNING, "searched_processing", "claimed_at", True),
    Sort("run_at", "Earliest run_at first", _PENDING, "searched_due_first", "run_at", True),
    Sort("run_at_last", "Latest run_at first", _PENDING, "searched_due_last", "run_at"),
    Sort("ended", "Last ended first", _ENDED, "searched_ended_last", "ended"),
    Sort("ended_first", "First ended first", _ENDED, "searched_ended_first", "ended", True),
)


def sorts_for(status: str | None) -> list[Sort]:
    """Return the sorts that are offered for a shown status, None for any; the default first."""
    return [sort for sort in SORTS if (status or "") in sort.statuses]


def sort_of(status: str | None, name: str | None) -> Sort:
    """Return a sort of a status by its name; the default if it is not offered."""
    offered = sorts_for(status)
    return next((sort for sort in offered if sort.name == name), offered[0])


@dataclass(frozen=True)
class Found:
    """A page: its rows, the key of the next page (None: this is the last one), and how many batches were searched."""

    rows: list[Row]
    next_key: str | None
    searched: int
    looked: int


def batch_list(
    terms: Terms, sort: Sort, before: str | None = None, pairs: Sequence[tuple[str, str]] = ()
) -> Callable[[Conn], Found]:
    """Return a question for `Reader.ask` that reads one page of batches, by at most 5,000 however rare the matches are.

    pairs: the known queues and kinds, in which a unique key is looked up. What an index finds by id, key or unique key
    comes first on the first page.
    """
    most = _most(terms, sort)
    parameters = _parameters(terms, sort, before) | {"most": most}

    def read(conn: Conn) -> Found:
        conn.execute(SQL["by_index"])
        ids = _ids_by_index(conn, terms, pairs)
        begin: list[Row] = []
        if ids and not before:
            found = rows(conn, SQL["searched_ids"] + SQL["matching"], parameters | {"ids": ids, "is_first": True})
            begin = [row for row in found if row["id"] is not None]
        if terms.id:
            return Found(begin, None, len(begin), most)
        statement = SQL[sort.statement] + SQL["matching"]
        found = rows(conn, statement, parameters | {"ids": ids, "is_first": False})
        searched, last_key = found[0]["searched"], found[0]["last_key"]
        page = [row for row in found if row["id"] is not None]
        if len(page) > PAGE_ROWS:
            return Found(begin + page[:PAGE_ROWS], page[PAGE_ROWS - 1]["page_key"], searched, most)
        return Found(begin + page, last_key if searched == most else None, searched, most)

    return read


def _most(terms: Terms, sort: Sort) -> int:
    """Return how many batches one page reads at most."""
    finer = ("scheduled", "retrying") if sort.column == "run_at" else (*_PENDING, *_RUNNING)
    is_searched = terms != Terms(status=terms.status) or terms.status in finer
    if not is_searched:
        return PAGE_ROWS + 1
    if terms.payload:
        return LOOK_PAYLOADS
    return LOOK_DUE_ROWS if sort.column == "run_at" else LOOK_ROWS


def _parameters(terms: Terms, sort: Sort, before: str | None) -> dict[str, Any]:
    status = terms.status
    stored = views.STORED_STATUS.get(status or "", status)
    statuses = [stored] if stored else _EVERY_STATUS
    before_time, before_id = read_key(before, sort)
    payload = terms.payload or InPayload((), None, "null")
    return {
        "queue": terms.queue, "kind": terms.kind, "of_key": terms.key, "status": status, "error": terms.error,
        "unique_key": terms.unique_key, "worker": terms.worker, "text": terms.words,
        "path": list(payload.path) if terms.payload else None, "text_there": payload.text, "json_there": payload.json,
        "most_payload": MOST_PAYLOAD_BYTES, "limit": PAGE_ROWS, "before_time": before_time, "before_id": before_id,
        "live_status": "waiting" if status == "waiting" else None, "statuses": statuses,
        "final_statuses": [final for final in views.FINAL_STATUSES if final in statuses],
        "is_ready": status == "ready", "by_time": sort.by_time, "sign": 1 if sort.is_rising else -1,
    }  # fmt: skip


def _ids_by_index(conn: Conn, terms: Terms, pairs: Sequence[tuple[str, str]]) -> list[int]:
    """Return the live batches that have the unique key or the key, and the batch that has the id."""
    if terms.id:
        return [terms.id]
    unique_key, key = terms.unique_key or terms.words, terms.words
    if not unique_key:
        return []
    if terms.queue and terms.kind:
        pairs = [*pairs, (terms.queue, terms.kind)]
    given = {"queues": [queue for queue, _ in pairs], "kinds": [kind for _, kind in pairs]}
    found = rows(conn, SQL["ids_by_index"], given | {"unique_key": unique_key, "of_key": key})
    is_id = key is not None and key.isascii() and key.isdecimal() and len(key) < 20 and 0 < int(key) <= HIGHEST_ID
    return sorted({row["id"] for row in found} | ({int(key)} if is_id and key else set()))


def read_key(key: str | None, sort: Sort) -> tuple[float, int]:
    """Return the time and the id in a page's key; those of the first page if it is not a key of this sort."""
    try:
        time_text, _, id_text = (key or "").rpartition(" ")
        before_id = int(id_text)
        if 0 <= before_id <= HIGHEST_ID and bool(time_text) == sort.by_time:
            return float(time_text or 0), before_id
    except ValueError:
        pass
    if not sort.by_time:
        return 0.0, 0 if sort.is_rising else HIGHEST_ID
    return (float("-inf"), 0) if sort.is_rising else (float("inf"), HIGHEST_ID)


def counts(queue: str | None, kind: str | None, known: Sequence[Row]) -> Callable[[Conn], dict[str, tuple[int, str]]]:
    """Return a question for `Reader.ask`: how many batches of a queue and a kind each status has, "" for all; with ~
    (about), ≥ (at least), or nothing (exactly). known: the rows of batchq.queues."""
    chosen = [row for row in known if queue in (None, row["queue"]) and kind in (None, row["kind"])]

    def read(conn: Conn) -> dict[str, tuple[int, str]]:
        conn.execute(SQL["by_index"])
        [beside] = rows(conn, SQL["counts"], {"queue": queue, "kind": kind, "most": _MOST_COUNTED + 1})
        return _counted(chosen, beside, is_all=queue is None and kind is None)

    return read


def _counted(chosen: Sequence[Row], beside: Row, is_all: bool) -> dict[str, tuple[int, str]]:
    def of_queues(name: str, mark: str) -> tuple[int, str]:
        return sum(row[name] for row in chosen), mark if any(name in row["estimated"] for row in chosen) else ""

    (pending, pending_mark), (running_, running_mark) = of_queues("scheduled", "~"), of_queues("processing", "~")
    stalled, failed = of_queues("stalled", "≥")[0], of_queues("failed", "≥")
    retrying_mark = "≥" if beside["scheduled"] > _MOST_COUNTED else ""
    ended_mark = "≥" if beside["finished_looked"] > _MOST_COUNTED else ""
    completed = beside["completed"], ended_mark
    if ended_mark and is_all and (about := beside["finished_about"] - failed[0] - beside["cancelled"]) > completed[0]:
        completed = about, "~"
    found = {
        "waiting": of_queues("waiting", "≥"),
        "ready": of_queues("ready", "~"),
        "scheduled": (max(0, pending - beside["retrying"]), "~" if retrying_mark or pending_mark else ""),
        "retrying": (beside["retrying"], retrying_mark),
        "processing": (max(0, running_ - stalled), running_mark),
        "stalled": (stalled, "≥" if running_mark else ""),
        "completed": completed,
        "failed": failed,
        "cancelled": (beside["cancelled"], "≥" if beside["cancelled_looked"] > _MOST_COUNTED else ""),
    }
    marks = {mark for _, mark in found.values()}
    mark = "~" if "~" in marks else "≥" if "≥" in marks else ""
    return {"": (sum(number for number, _ in found.values()), mark), **found}
