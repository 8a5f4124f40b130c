"""The map of the code in docs/design.md: each module of the package with the first sentence of its docstring."""

import ast
import re
from pathlib import Path

from tests.support.markdown import ROOT

PAGE = ROOT / "docs" / "design.md"
PACKAGE = ROOT / "batchq"
BEGIN = "<!-- map of the code: from the modules' docstrings; `python -m tests.instruments.reference` writes it -->\n"
END = "<!-- end of the map -->"
FOLDERS = (
    "",
    "batch",
    "worker",
    "postgres",
    "postgres/statements",
    "operate",
    "cli",
    "cli/commands",
    "cli/top",
    "web",
    "demo",
    "testing",
    "contrib",
    "contrib/django",
    "contrib/django/management",
    "contrib/django/management/commands",
    "common",
)


def code_map() -> str:
    """Return the map, in Markdown: a table per folder of the package."""
    return "\n".join(section(PACKAGE / folder) for folder in FOLDERS)


def section(folder: Path) -> str:
    """Return the table of one folder."""
    shown = f"`{folder.relative_to(ROOT)}/`"
    files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
    rows = "".join(f"| `{file.name}` | {first_sentence(file)} |\n" for file in files)
    return f"**{shown}** {first_sentence(folder / '__init__.py')}\n\n| module | what it is |\n| --- | --- |\n{rows}"


def first_sentence(file: Path) -> str:
    """Return the first sentence of a module's docstring, on one line, as Markdown."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = re.split(r"(?<=\.)\s", " ".join(text.partition("\n\n")[0].split()), maxsplit=1)[0]
    return re.sub(r"`{2}", "`", first.rstrip(".")).replace("|", "\\|")


def shown() -> str:
    """Return the map that the page has."""
    text = PAGE.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0]


def write() -> None:
    """Put the map into the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(BEGIN + shown(), BEGIN + code_map()), encoding="utf-8")
