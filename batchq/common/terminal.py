"""Everything that is printed goes through here: no text moves the cursor, hides, forges a line, or is markup.

Kinds, errors, names of workers, reasons, file names: any of these may come from an attacker. Here each is one line,
with its hidden characters spelled out, and colors are styles, never markup.

What needs rich imports it when it is called: a worker prints only its log, and rich takes memory.
"""

import json
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from batchq.common.secrets import hide_password
from batchq.common.text import visible, visible_json, visible_line

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod, RenderableType
    from rich.progress import TextColumn
    from rich.text import Text

_PIPE_WIDTH = 300  # so that a row is one line there, unless COLUMNS is set
_MOST_SHOWN = 20_000


@cache
def console() -> "Console":
    """Return what prints tables and bars to standard output."""
    from rich.console import Console

    made = Console(highlight=False, markup=False, emoji=False)
    if not made.is_terminal and not os.environ.get("COLUMNS"):
        made.width = _PIPE_WIDTH
    return made


@cache
def errors() -> "Console":
    """Return what prints bars and notes to standard error."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False, stderr=True)


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


def styled(value: Any, style: str = "", justify: "JustifyMethod | None" = None) -> "Text":
    """Return a value as one line for a table or a bar."""
    from rich.text import Text

    return Text(line(value), style=style, justify=justify)


def column(template: str) -> "TextColumn":
    """Return a column of a progress bar; its values are not markup."""
    from rich.progress import TextColumn

    return TextColumn(template, markup=False)


def put(text: str, below: str = "") -> None:
    """Print a line, and a block of text below it."""
    print(f"{line(text)}\n{block(below)}" if below else line(text), flush=True)


def put_marked(mark: str, style: str, text: str) -> None:
    """Print a line that begins with a colored mark."""
    from rich.text import Text

    console().print(Text.assemble(Text(mark, style), " ", line(text)), soft_wrap=True)


def put_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON, for programs."""
    print(visible_json(json.dumps(value, indent=indent, ensure_ascii=False)), flush=True)


def show(*shown: "RenderableType") -> None:
    """Print tables and texts made of the results of `line` and `styled`."""
    console().print(*shown)


def complain(text: str) -> None:
    """Print a line on standard error, without the passwords in it."""
    print(f"batchq: {line(hide_password(text))}", file=sys.stderr, flush=True)


def ask(question: str) -> str:
    """Ask a question on standard error; return the answer, a line of standard input."""
    print(f"{line(question)} ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):
        print(file=sys.stderr)
    return answer.strip()


def one_line(text: str) -> str:
    """Return an error, which may have several lines, on one."""
    return " ".join(hide_password(text).split())
