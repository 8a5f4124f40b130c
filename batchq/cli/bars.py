"""A progress bar on a terminal that tells done from failed."""

from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, Task
from rich.progress_bar import ProgressBar
from rich.text import Text

from batchq.operate.progress import shares


def progress(row: Mapping[str, Any], width: int) -> Text:
    """Return the progress bar of a batch with items: what is done, what failed (dashed), and what is left."""
    if not row["items_total"]:
        return Text()
    done, failed = shares(row, width)
    made = Text("━" * done, style="green")
    made.append("╍" * failed, style="bold red")
    return made.append("─" * (width - done - failed), style="bright_black")


class BatchBarColumn(BarColumn):
    """Draws the batch in the field *row* of a task; a batch without items gets the usual bar of rich."""

    def render(self, task: Task) -> ProgressBar | Text:  # type: ignore[override]
        """Return the bar."""
        row = task.fields.get("row")
        return progress(row, self.bar_width or 40) if row and row["items_total"] else super().render(task)
