"""Everything that is printed goes through here: no text moves the cursor, hides, forges a line, or is markup.

Kinds, errors, names of workers, reasons, file names: any of these may come from an attacker. Here each is one line,
with its hidden characters spelled out, and colors are styles, never markup.
"""

import json
import os
import sys
from typing import Any

from rich.console import Console, JustifyMethod, RenderableType
from rich.progress import TextColumn
from rich.text import Text

from batchq.common.secrets import hide_password
from batchq.common.text import visible, visible_json, visible_line

_PIPE_WIDTH = 300  # so that a row is one line there, unless COLUMNS is set
_MOST_SHOWN = 20_000

console = Console(highlight=False, markup=False, emoji=False)
errors = Console(highlight=False, markup=False, emoji=False, stderr=True)
if not console.is_terminal and not os.environ.get("COLUMNS"):
    console.width = _PIPE_WIDTH


def line(value: Any) -> str:
    """Return a value as one line: numbers with commas, at most 20,000 characters, hidden ones spelled out."""
    return visible_line(_shortened(_plain(value)))


def block(value: Any) -> str:
    """Return a text with each line indented, so that none looks like one of batchq's own."""
    return "\n".join(f"    {each}" for each in visible(_shortened(_plain(value))).rstrip().split("\n"))


def _plain(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ... ({len(text):,} characters)"


def styled(value: Any, style: str = "", justify: JustifyMethod | None = None) -> Text:
    """Return a value as one line for a table or a bar."""
    return Text(line(value), style=style, justify=justify)


def column(template: str) -> TextColumn:
    """Return a column of a progress bar; its values are not markup."""
    return TextColumn(template, markup=False)


def put(text: str, below: str = "") -> None:
    """Print a line, and a block of text below it."""
    print(f"{line(text)}\n{block(below)}" if below else line(text), flush=True)


def put_marked(mark: str, style: str, text: str) -> None:
    """Print a line that begins with a colored mark."""
    console.print(Text.assemble(Text(mark, style), " ", line(text)), soft_wrap=True)


def put_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON, for programs."""
    print(visible_json(json.dumps(value, indent=indent, ensure_ascii=False)), flush=True)


def show(*shown: RenderableType) -> None:
    """Print tables and texts made of the results of `line` and `styled`."""
    console.print(*shown)


def complain(text: str) -> None:
    """Print a line on standard error, without the passwords in it."""
    print(f"batchq: {line(hide_password(text))}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """Return an error, which may have several lines, on one."""
    return " ".join(hide_password(text).split())
