"""The code blocks of a Markdown file."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and where it stands."""

    language: str
    text: str
    place: str

    @property
    def lines(self) -> list[str]:
        """The lines that are not empty."""
        return [line for line in self.text.splitlines() if line.strip()]


def blocks(name: str) -> list[Block]:
    """Return the code blocks of the file *name* (from the checkout's root), in order."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [
        Block(match[1], match[2], f"{name}:{text.count(chr(10), 0, match.start()) + 1}")
        for match in BLOCK.finditer(text)
    ]
