"""The page of keys: what waits and runs of each, and which batches the others of a key wait for."""

from collections import defaultdict
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from batchq.operate.limits import number_text
from batchq.postgres.statements.views import MOST_OF_A_KEY
from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Reader, Row
from batchq.web.view import live_address, names_in, without_nul

MOST_READ = 1000
MOST_SHOWN = 100
_MOST_BEGUN = 4  # read of a key; one less is shown

_Name = tuple[str, str]


class Keys:
    """Answers requests for the page of keys."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("keys", lambda text: self._values(**names_in(text, "queue", "key")))

    def show_all(self, request: Request) -> Response:
        """Show the keys that have live batches, the longest waiting first; of one queue, or with a text in them."""
        chosen = {name: without_nul(request.query_params.get(name, "").strip()) or None for name in ("queue", "key")}
        return self._pages.page(request, "keys.html", live=live_address("keys", **chosen), **self._values(**chosen))

    def _values(self, queue: str | None, key: str | None) -> dict[str, Any]:
        found = self._reader.read(
            "keys", most=MOST_READ, most_of_a_key=MOST_OF_A_KEY, queue=queue, part=key, limit=MOST_SHOWN
        )
        rows = {(row["queue"], row["key"]): row for row in found}
        if key:  # also if it is not one of those that were read
            exact = self._reader.read_by_index("one_key", key=key, queue=queue, most_of_a_key=MOST_OF_A_KEY)
            rows = {(row["queue"], row["key"]): row for row in exact} | rows
        limits = self._limits()
        begun = self._begun([name for name, row in rows.items() if row["waiting"] and name[0] in limits])
        throttled = {
            (row["queue"], row["key"]): row["left_seconds"]
            for row in self._reader.read("throttles")
            if row["key"] is not None
        }
        return {
            "chosen": {"queue": queue, "key": key},
            "keys": [
                row
                | {"limits": limits.get(name[0], []), "throttled": throttled.get(name)}
                | _waited_for(begun.get(name, []), limits.get(name[0], []))
                for name, row in rows.items()
            ],
            "found": max(len(rows), found[0]["keys_found"] if found else 0),
            "is_cut": bool(found) and found[0]["keys_read"] >= MOST_READ,
            "most_read": MOST_READ, "most_shown": MOST_SHOWN, "most_of_a_key": MOST_OF_A_KEY,
        }  # fmt: skip

    def _limits(self) -> dict[str, list[Row]]:
        """Return the limits that hold for each key, by queue."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self._reader.read("limits", limit=MOST_ROWS):
            if row["max_running_per_key"] is not None:
                found[row["queue"]].append(row | {"text": number_text(row["max_running_per_key"])})
        return found

    def _begun(self, names: list[_Name]) -> dict[_Name, list[Row]]:
        """Return the first batches of each key that have begun and not ended."""
        found: dict[_Name, list[Row]] = defaultdict(list)
        if names:
            queues, keys = [queue for queue, _ in names], [key for _, key in names]
            for row in self._reader.read_by_index("begun_of_keys", queues=queues, keys=keys, limit=_MOST_BEGUN):
                if row["id"] not in [other["id"] for other in found[row["queue"], row["key"]]]:  # parts of one batch
                    found[row["queue"], row["key"]].append(row)
        return found


def _waited_for(begun: list[Row], limits: list[Row]) -> dict[str, Any]:
    """Return which batches of a key the others wait for: those that have begun, if a limit lets no more begin."""
    blocking: list[Row] = []
    for limit in limits:
        of_limit = [row for row in begun if limit["kind"] in (None, row["kind"])]
        if len(of_limit) >= limit["max_running_per_key"]:
            blocking += [row for row in of_limit if row not in blocking]
    return {"waits_for": blocking[: _MOST_BEGUN - 1], "waits_for_more": len(blocking) >= _MOST_BEGUN}
