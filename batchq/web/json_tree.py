"""JSON text as a tree that folds: bounded, never nested too deeply to show, and exact, because no number is converted.

The text may be cut off anywhere; the tree then says that there is more. The database shortens long texts, so a payload
of megabytes costs what its beginning costs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MOST_NODES = 600
MOST_MEMBERS = 100  # of one object or array
MOST_DEPTH = 12
_BEGINNINGS = {"{": "object", "[": "array"}
_MOST_STRING = 1000
_MOST_KEY = 200
_TOKEN = re.compile(
    r'\s*(?:(?P<string>"[^"\\]*(?:\\.[^"\\]*)*")|(?P<mark>[\[\]{},:])|(?P<word>[^\s\[\]{},:"]+)|(?P<rest>"(?s:.*)))'
)


@dataclass
class Node:
    """A value of a JSON text.

    key: the key as in the JSON text, or the index. kind: object, array, string or word (a number, true, false or null).
    text: a scalar as in the JSON text, perhaps cut; left_out: how many characters are missing from it. members: those
    that are shown. count: how many the text has; is_cut: the text ends before the value does.
    """

    key: str
    kind: str
    text: str = ""
    left_out: int = 0
    members: list["Node"] = field(default_factory=list)
    count: int = 0
    is_cut: bool = False

    @property
    def more(self) -> int:
        """How many members are not shown."""
        return self.count - len(self.members)

    @property
    def is_open(self) -> bool:
        """Whether it is shown unfolded at first."""
        return self.count <= 30


@dataclass
class _Open:
    """An object or array whose end has not been read. node: None if it is not shown. key: that of the next value."""

    node: Node | None
    kind: str
    key: str | None = None
    count: int = 0


def tree(text: str, is_cut: bool = False) -> Node | None:
    """Return the tree of a JSON text as Postgres writes it. *is_cut*: only its beginning is there. None: no value."""
    return _Reading(text, is_cut).root


class _Reading:
    """One pass over a text. It does not recurse: a text may be nested deeper than Python allows."""

    def __init__(self, text: str, is_cut: bool) -> None:
        self.root: Node | None = None
        self._open: list[_Open] = []
        self._nodes = 0
        for kind, token in _tokens(text, is_cut):
            self._take(kind, token)
        for left in self._open:
            if left.node:
                left.node.count, left.node.is_cut = left.count, True

    def _take(self, kind: str, token: str) -> None:
        inside = self._open[-1] if self._open else None
        if token in ("}", "]"):
            if inside:
                self._close(self._open.pop())
        elif token in _BEGINNINGS:
            self._begin(_BEGINNINGS[token])
        elif kind == "mark":
            pass
        elif inside and inside.kind == "object" and inside.key is None:
            inside.key = token
        else:
            node = self._add(kind)
            if node:
                node.text, node.left_out = token[:_MOST_STRING], max(0, len(token) - _MOST_STRING)
                node.is_cut = kind == "rest"

    def _begin(self, kind: str) -> None:
        self._open.append(_Open(self._add(kind), kind))

    def _close(self, ended: _Open) -> None:
        if ended.node:
            ended.node.count = ended.count

    def _add(self, kind: str) -> Node | None:
        """Count a value, and return its node if it is shown."""
        name = "string" if kind == "rest" else kind
        if not self._open:
            self.root = self.root or Node("", name)
            return self.root
        around = self._open[-1]
        key = (around.key or "")[:_MOST_KEY] if around.kind == "object" else str(around.count)
        around.key = None
        around.count += 1
        is_shown = around.count <= MOST_MEMBERS and len(self._open) <= MOST_DEPTH and self._nodes < MOST_NODES
        if around.node is None or not is_shown:
            return None
        self._nodes += 1
        node = Node(key, name)
        around.node.members.append(node)
        return node


def _tokens(text: str, is_cut: bool) -> Iterator[tuple[str, str]]:
    """Yield kind and text of each token; the last value of a text that is cut may be incomplete."""
    for found in _TOKEN.finditer(text):
        kind = found.lastgroup or "word"
        if kind == "word" and is_cut and found.end() == len(text):
            return  # a number of which digits are missing would be another number
        yield kind, found[kind]
