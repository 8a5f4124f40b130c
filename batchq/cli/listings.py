"""The tables of `batchq top` and `batchq status`: their columns, and which of them leave a narrow terminal first."""

from functools import partial
from typing import Any

from rich.text import Text

from batchq.cli import show_tables
from batchq.cli.bars import progress
from batchq.cli.columns import Column, Row, spark
from batchq.cli.rate import clock
from batchq.cli.show_tables import attempts, colored, first_line, processed, short, to_the_second
from batchq.common.terminal import styled
from batchq.operate.limits import origin_text
from batchq.operate.schedules import origin_of, rules_of, words_of
from batchq.postgres.statements.views import MOST_OF_A_KEY

MINUTES = 60


def length(interval: str | None) -> tuple[int, str] | None:
    """Return an interval of Postgres ("1 day 02:03:04") as a value that sorts by its length."""
    if interval is None:
        return None
    days, _, rest = interval.rpartition(" ")
    return int(days.split()[0]) if days else 0, rest.rjust(20, "0")


def _field(name: str, title: str = "", **given: Any) -> Column:
    return Column(title or name.capitalize(), lambda row: row.get(name), **given)


def _name(name: str, title: str = "", least: int = 8, **given: Any) -> Column:
    """Return a column of names, which are shortened in their middle: most differ at both ends."""
    return _field(name, title, least=least, cut="middle", **given)


def _number(name: str, title: str = "", **given: Any) -> Column:
    return _field(name, title, is_number=True, **given)


def _count(name: str, **given: Any) -> Column:
    """Return a column of counts of batchq.queues; an estimate has a ~."""
    return Column(
        name.capitalize(),
        lambda row: row[name],
        lambda row: show_tables.count_text(row, name),
        is_number=True,
        **given,
    )


def _interval(name: str, title: str, **given: Any) -> Column:
    return Column(title, lambda row: length(row[name]), lambda row: short(row[name]), is_number=True, **given)


def _time(name: str, title: str, **given: Any) -> Column:
    return Column(
        title, lambda row: row[name], lambda row: to_the_second(row[name]), brief=lambda row: _to_the_minute(row[name]),
        **given,
    )  # fmt: skip


def _to_the_minute(time: str | None) -> str:
    """Return a time of Postgres without its year and seconds."""
    return (time or "")[5:16].replace("T", " ")


def _alarming(row: Row, name: str) -> Text:
    """Return a number that stands out unless it is 0."""
    return styled(show_tables.count_text(row, name), "bold red" if row[name] else "")


def _per_second(row: Row) -> str:
    rate = row["finished_per_second"]
    return f"{rate:,.2f}" if rate < 10 else f"{rate:,.1f}"


def _handlers(row: Row) -> Text:
    """Return how many workers have a handler for the kind, in few letters."""
    is_missing = bool(row["ready"]) and not row["workers"]
    return styled("none" if is_missing else row["workers"], "bold red" if is_missing else "")


def _how_far_held(row: Row) -> float:
    return float("inf") if row.get("is_paused") else row["held_back"] or 0


def _held_back(row: Row) -> Text:
    """Return what holds back the batches of a queue."""
    return styled("paused", "bold yellow") if row.get("is_paused") else styled(show_tables.held_back(row))


def _percent(row: Row) -> str:
    return f"{100 * processed(row) // row['items_total']} %" if row["items_total"] else ""


def _limit(title: str, number: int, **given: Any) -> Column:
    return Column(title, lambda row: show_tables.limit_cells(row)[number], **given)


def _minutes(row: Row) -> list[int]:
    found: list[int] = row.get("minutes") or [0] * MINUTES
    return found


def _spark(row: Row, width: int) -> Text:
    return Text(spark(_minutes(row), width), style="green" if any(_minutes(row)) else "bright_black")


def _at_least(row: Row, name: str) -> str:
    counted = row["running"] if name == "running" else row["waiting"] + row["scheduled"]
    return f"{row[name]:,}+" if counted > MOST_OF_A_KEY and row[name] else f"{row[name]:,}"


def _key_count(name: str, **given: Any) -> Column:
    return Column(name.capitalize(), lambda row: row[name], lambda row: _at_least(row, name), is_number=True, **given)


def batch_columns(*others: Column) -> tuple[Column, ...]:
    """Return the columns that say which batch it is, followed by *others*."""
    return (_number("id", "ID"), _name("queue"), _name("kind"), *others)


def _total(name: str, **given: Any) -> Column:
    """Return a column of sums over a database; empty while the database is away."""
    return Column(
        name.capitalize(),
        lambda row: row.get(name) or 0,
        lambda row: show_tables.count_text(row, name) if name in row else "",
        is_number=True,
        **given,
    )


def _state_of_database(row: Row) -> Text:
    """Return whether a database answers, or how long it has been away."""
    return styled(row["state"], "bold red") if row["away"] else styled("up", "green")


_STATUS = Column("Status", lambda row: row["status"], lambda row: colored(row["status"]))
_PROGRESS = Column(
    "Progress", lambda row: row["progress_percent"] or 0, drawn=progress, widths=(8, 12, 16, 24), leaves=6
)
_DONE = Column("Done", lambda row: row["progress_percent"] or 0, _percent, is_number=True)
_ITEMS = Column("Items", processed, show_tables.items, leaves=7)
_ATTEMPT = Column("Attempt", lambda row: row["attempt"], attempts, short="Try", is_number=True, leaves=5)
_ERROR = Column("Last error", lambda row: row["last_error"], lambda row: first_line(row["last_error"]), least=12)
_WORKER = _name("claimed_by", "Worker", least=10, leaves=8)
DATABASES = (
    _name("database"),
    Column("State", lambda row: row["away_seconds"] or 0, _state_of_database),
    _total("ready"),
    _total("scheduled", short="Sched.", leaves=4),
    _total("processing", short="Proc."),
    Column(
        "Stalled", lambda row: row.get("stalled") or 0,
        lambda row: _alarming(row, "stalled") if "stalled" in row else "", is_number=True,
    ),
    _total("failed"),
    Column(
        "Oldest wait", lambda row: length(row.get("oldest_wait")), lambda row: short(row.get("oldest_wait")),
        short="Oldest", is_number=True,
    ),
    Column(
        "Per second", lambda row: row.get("finished_per_second") or 0,
        lambda row: _per_second(row) if "finished_per_second" in row else "", short="/s", is_number=True,
    ),
    _number("workers", "Workers", short="Wkrs."),
)  # fmt: skip
QUEUES = (
    _name("queue"),
    _name("kind"),
    _count("ready"),
    _count("waiting", leaves=8),
    _count("scheduled", short="Sched.", leaves=4),
    _count("processing", short="Proc."),
    Column("Stalled", lambda row: row["stalled"], partial(_alarming, name="stalled"), is_number=True),
    _count("failed"),
    _interval("oldest_wait", "Oldest wait", short="Oldest"),
    Column("Per second", lambda row: row["finished_per_second"], _per_second, short="/s", is_number=True),
    Column(
        "Workers", lambda row: row["workers"], show_tables.workers_of, short="Wkrs.", is_number=True, leaves=3,
        brief=_handlers
    ),
    Column("Held back", _how_far_held, _held_back, leaves=5, least=9),
)  # fmt: skip
QUEUES_LIVE = (
    *QUEUES,
    Column("Last hour", lambda row: sum(_minutes(row)), drawn=_spark, widths=(10, 12, 20, 30, 60), leaves=7),
)
BATCHES = batch_columns(
    _STATUS, _PROGRESS, _DONE, _ITEMS, _ATTEMPT, _interval("age", "Age"), _ERROR
)  # fmt: skip
RUNNING = batch_columns(
    _STATUS,
    _PROGRESS,
    _DONE,
    _ITEMS,
    Column("Time left", lambda row: row.get("seconds_left") or 0, lambda row: clock(row.get("seconds_left")),
           short="Left", is_number=True),
    _ATTEMPT,
    _interval("running_time", "Run time", short="Runs"),
    _WORKER,
)  # fmt: skip
FAILED = batch_columns(_ATTEMPT, _time("finished_at", "Failed at", leaves=4), _ERROR)
FAILURES = (
    _number("failures", "Failed"),
    _name("kind"),
    _time("latest_at", "Latest"),
    _number("example_id", "Example", leaves=4),
    _field("error", least=20),
)
OPENED = batch_columns(
    _STATUS, _PROGRESS, _DONE, _ITEMS, _ATTEMPT, _interval("running_time", "Run time", short="Runs"), _WORKER, _ERROR
)
WORKERS = (
    _name("id", "Worker", least=16),
    Column("State", lambda row: (row["state"] != "working", row["state"]), show_tables.state_of),
    _number("in_hand", "Claimed"),
    _number("concurrency", "Capacity"),
    Column("Queues", lambda row: ", ".join(row["queues"]), least=8),
    _time("started_at", "Started", leaves=5),
    _field("version", leaves=8),
)
LIMITS = (
    _name("queue"),
    Column("Kind", lambda row: row["kind"] or "", lambda row: row["kind"] or "(all)", least=8, cut="middle"),
    _limit("Running", 0),
    _limit("Per second", 1, short="/s"),
    _limit("Items per second", 2, short="Items/s"),
    _limit("Per key", 3, leaves=3),
    _limit("Burst seconds", 4, short="Burst", leaves=5),
    Column("Origin", origin_text, leaves=4),
    _field("held_back_by", "Holds back by", least=10),
)
KEYS = (
    _name("queue"),
    _name("key", least=12),
    *(_key_count(name) for name in ("waiting", "scheduled", "running")),
    _interval("oldest_wait", "Oldest wait"),
)
FLOWS = batch_columns(
    _number("needs_left", "Waits for"),
    _interval("age", "Age"),
    _name("key", leaves=6),
    _field("unique_key", "Unique key", least=8, leaves=7),
)
SCHEDULES = (
    _name("name", "Schedule", least=10),
    Column("When", words_of, least=10, leaves=6),
    _name("kind", leaves=4),
    _name("queue", leaves=5),
    _field("state"),
    _time("next_at", "Next"),
    Column("Latest batch", lambda row: row["last_batch_id"] or 0, show_tables.latest, short="Latest", leaves=2),
    _number("batches_made", "Batches", leaves=7),
    _number("ticks_missed", "Missed", leaves=1),
    _number("ticks_overlapped", "Overlapped", leaves=8),
    Column("Rules", rules_of, leaves=9),
    Column("Origin", origin_of, leaves=10),
    Column("Error", lambda row: row["error"], lambda row: first_line(row["error"]), least=12, leaves=3),
)
PAUSES = (
    _name("queue"),
    _name("kind"),
    _time("until", "Until"),
    _time("paused_at", "Paused since", leaves=3),
    _field("reason", least=10),
    _name("actor", leaves=2),
)
THROTTLES = (
    _name("queue"),
    Column("Kind", lambda row: row["kind"] or "(all)", least=8, cut="middle"),
    Column("Key", lambda row: row["key"] or "(all)", least=8, cut="middle"),
    Column("Time left", lambda row: row["seconds_left"], lambda row: clock(row["seconds_left"]), is_number=True),
    _time("throttled_at", "Throttled since", leaves=3),
    _name("worker", leaves=4),
)


# ----------------------------------------------------------------------------------------------------------- grouping


def by_queue(rows: list[Row]) -> list[Row]:
    """Return a row for each queue, made of the rows of its kinds."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["queue"], []).append(row)
    return [_merged(queue, group) for queue, group in groups.items()]


def _merged(queue: str, rows: list[Row]) -> Row:
    summed = ("ready", "waiting", "scheduled", "processing", "stalled", "failed", "held_back", "finished_per_second")
    totals = {name: sum(row[name] or 0 for row in rows) for name in summed}
    reasons = {reason for row in rows for reason in str(row["held_back_by"] or "").split(", ") if reason}
    return totals | {
        "queue": queue,
        "kind": rows[0]["kind"] if len(rows) == 1 else f"{len(rows):,} kinds",
        "kinds": [row["kind"] for row in rows],
        "oldest_wait": max(
            (row["oldest_wait"] for row in rows if row["oldest_wait"]),
            key=lambda wait: length(wait) or (0, ""),
            default=None,
        ),
        "workers": min((row["workers"] for row in rows if row["ready"]), default=max(row["workers"] for row in rows)),
        "estimated": sorted({name for row in rows for name in row["estimated"]}),
        "held_back_by": ", ".join(sorted(reasons)),
        "minutes": [sum(each) for each in zip(*map(_minutes, rows), strict=True)],
    }


def with_minutes(rows: list[Row], minutes: list[Row]) -> list[Row]:
    """Return rows of batchq.queues, each with "minutes": what completed or failed in each of the last 60."""
    counts: dict[tuple[str, str], list[int]] = {}
    for each in minutes:
        if 0 <= each["minutes_ago"] < MINUTES:
            found = counts.setdefault((each["queue"], each["kind"]), [0] * MINUTES)
            found[MINUTES - 1 - each["minutes_ago"]] += each["ended"]
    return [row | {"minutes": counts.get((row["queue"], row["kind"]), [0] * MINUTES)} for row in rows]


def with_pauses(rows: list[Row], pauses: list[Row]) -> list[Row]:
    """Return rows of batchq.queues, each with "is_paused"."""
    return [row | {"is_paused": bool(pauses_of(row["queue"], row["kind"], pauses))} for row in rows]


def pauses_of(queue: str, kind: str, pauses: list[Row]) -> list[Row]:
    """Return the pauses that stop a kind in a queue."""
    return [row for row in pauses if row["queue"] in (None, queue) and row["kind"] in (None, kind)]
