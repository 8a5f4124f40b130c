"""The page of charts: what ended per minute, how long it ran and how long it waited, by queue and kind."""

from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import HTMLResponse

from batchq.web.charts import PERCENTILES, RANGES, RATES, Span, points, rate_chart, rate_text, time_chart, time_labels
from batchq.web.pages import Pages
from batchq.web.reads import MOST_ROWS, Reader
from batchq.web.view import live_address

_MOST_FILTER_CHARACTERS = 300
_LIVE = "1h"


class ChartPage:
    """Answers requests for the charts."""

    def __init__(self, reader: Reader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages
        pages.add_live_part("charts", lambda text: self._values(_chosen(dict(parse_qsl(text))) | {"range": _LIVE}))

    def show(self, request: Request) -> HTMLResponse:
        """Show a range of time, of all queues and kinds or of the chosen ones."""
        chosen = _chosen(dict(request.query_params))
        name = live_address("charts", **chosen) if chosen["range"] == _LIVE else None
        return self._pages.page(request, "charts.html", live=name, **self._values(chosen))

    def _values(self, chosen: dict[str, str]) -> dict[str, Any]:
        shown = RANGES[chosen["range"]]
        names = self._reader.read("counted_names", limit=MOST_ROWS)
        rows = self._reader.read(
            "chart", step=shown.step, minutes=shown.minutes,
            queue=chosen.get("queue") or None, kind=chosen.get("kind") or None,
        )  # fmt: skip
        span = Span(rows[0]["since"], rows[0]["until"])
        found = points(rows, span, shown)
        pairs = [row for row in rows if row["queue"] is not None]
        return {
            "chosen": chosen, "ranges": RANGES.values(), "shown": shown, "span": span,
            "queues": _options((row["queue"] for row in names), chosen.get("queue")),
            "kinds": _options((row["kind"] for row in names), chosen.get("kind")),
            "charts": [
                rate_chart(found, span, shown),
                time_chart("run", "Run time", found, span, shown),
                time_chart("wait", "Wait", found, span, shown),
            ],
            "labels": time_labels(span, shown), "points": found, "pairs": pairs[:MOST_ROWS],
            "totals": {name: sum(row[name] for row in pairs) for name in (*RATES, "runs", "run_seconds")},
            "rate_names": RATES, "percentiles": PERCENTILES, "rate": rate_text,
        }  # fmt: skip


def _chosen(given: dict[str, str]) -> dict[str, str]:
    """Return the range, queue and kind that an address names; what it cannot mean is left out."""
    texts = {name: given.get(name, "").strip()[:_MOST_FILTER_CHARACTERS] for name in ("queue", "kind")}
    chosen = {name: text for name, text in texts.items() if text and "\0" not in text}
    return {"range": given["range"] if given.get("range") in RANGES else _LIVE, **chosen}


def _options(names: Any, chosen: str | None) -> list[str]:
    return sorted({*names, *([chosen] if chosen else [])})
