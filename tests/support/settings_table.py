"""The README's table of settings, made from the class: ``python tests/support/settings_table.py`` writes it anew."""

import sys
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN = "<!-- settings: made from the class by tests/support/settings_table.py -->\n"
END = "<!-- end of settings -->"


def table() -> str:
    """Return the table as Markdown."""
    from batchq.settings import Settings

    rows = [
        f"| `BATCHQ_{name.upper()}` | {default(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| setting | default | what it is |", "|---|---|---|", *rows]) + "\n"


def default(field: FieldInfo) -> str:
    """Return a setting's default as it would be written in the environment."""
    if isinstance(field.default, SecretStr) or field.default == ():
        return "none"
    if isinstance(field.default, bool):
        return "`yes`" if field.default else "`no`"
    return f"`{','.join(field.default) if isinstance(field.default, tuple) else field.default}`"


def shown() -> str:
    """Return the table that the README has."""
    return README.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write() -> None:
    """Put the table into the README."""
    README.write_text(README.read_text(encoding="utf-8").replace(BEGIN + shown(), BEGIN + table()), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(README.parent))
    write()
