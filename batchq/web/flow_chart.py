"""The drawing of a flow as numbers for inline SVG: a column of boxes for each level, and lines from each batch to those
that wait for it. Lines from a batch that pass a level share a lane there, so that they cross no box."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from batchq.operate.flow_graph import Edge, Graph

MOST_BOXES = 300
_MOST_LINES = 1500
_MOST_LANES = 600
_WIDTH, _HEIGHT = 186, 44  # of a box
_GAP, _LANE, _BETWEEN = 14, 14, 72  # below a box; of a lane; between two levels, for the lines
_STACK = 32  # between two stacks of a level, for lines that leave the left one and lines that come to the right one
_OUT, _IN = _HEIGHT // 2 + 10, _HEIGHT // 2 + 4  # from the middle of a box to where such lines run, below it
_MARGIN, _MOST_ROWS, _SWEEPS = 6, 12, 4
_ENDED = ("completed", "failed", "cancelled")

_Key = tuple[int, ...]  # of a box: its id; of a lane: the needed id, and the level that it passes


class Box(NamedTuple):
    """Where a batch is drawn: its upper left corner."""

    id: int
    x: int
    y: int


class Lines(NamedTuple):
    """All lines of one state as one path, and their arrowheads as another. state: met, open or stuck."""

    state: str
    path: str
    heads: str


class Chart(NamedTuple):
    """The drawing. width, height: of the whole; box_width, box_height: of each box."""

    width: int
    height: int
    box_width: int
    box_height: int
    boxes: list[Box]
    lines: list[Lines]


@dataclass
class _Column:
    """What is drawn at one level. at: the upper left corner of each box and lane, once it is placed."""

    keys: list[_Key] = field(default_factory=list)
    x: int = 0
    width: int = _WIDTH
    height: int = 0
    at: dict[_Key, tuple[int, int]] = field(default_factory=dict)


def chart(graph: Graph) -> Chart | None:
    """Return the drawing of a flow; None if it has too many batches or edges to be read as one."""
    if len(graph.batches) > MOST_BOXES or len(graph.edges) > _MOST_LINES:
        return None
    columns, routes = _columns(graph)
    _order(columns, routes)
    _place(columns)
    height = max(column.height for column in columns)
    boxes = [Box(key[0], *column.at[key]) for column in columns for key in column.keys if len(key) == 1]
    width = columns[-1].x + columns[-1].width + _MARGIN
    return Chart(width, height + 2 * _MARGIN, _WIDTH, _HEIGHT, boxes, _lines(graph, columns, routes))


def _columns(graph: Graph) -> tuple[list[_Column], list[tuple[Edge, list[_Key]]]]:
    """Return the columns, and for each edge the boxes and lanes that its line goes through."""
    levels = graph.levels()
    columns = [_Column() for _ in range(max(levels.values(), default=0) + 1)]
    for one in graph.batches:
        columns[levels.get(one, 0)].keys.append((one,))
    has_lanes = sum(levels[edge.waits] - levels[edge.needed] - 1 for edge in graph.edges) <= _MOST_LANES
    routes, known = [], set[_Key]()
    for edge in graph.edges:
        passed = range(levels[edge.needed] + 1, levels[edge.waits]) if has_lanes else ()
        lanes: list[_Key] = [(edge.needed, level) for level in passed]
        for level, lane in zip(passed, lanes, strict=True):
            if lane not in known:
                known.add(lane)
                columns[level].keys.append(lane)
        routes.append((edge, [(edge.needed,), *lanes, (edge.waits,)]))
    return columns, routes


def _order(columns: list[_Column], routes: list[tuple[Edge, list[_Key]]]) -> None:
    """Order each column by the mean place of its neighbors, there and back again: then few lines cross."""
    before: dict[_Key, list[_Key]] = defaultdict(list)
    after: dict[_Key, list[_Key]] = defaultdict(list)
    for _, route in routes:
        for one, next_one in pairwise(route):
            before[next_one].append(one)
            after[one].append(next_one)
    place = {key: (number + 0.5) / len(column.keys) for column in columns for number, key in enumerate(column.keys)}
    for sweep in range(_SWEEPS):
        neighbors = after if sweep % 2 else before
        for column in reversed(columns) if sweep % 2 else columns:
            column.keys.sort(key=lambda key: _mean([place[one] for one in neighbors[key]], place[key]))
            place |= {key: (number + 0.5) / len(column.keys) for number, key in enumerate(column.keys)}


def _mean(places: list[float], otherwise: float) -> float:
    return sum(places) / len(places) if places else otherwise


def _place(columns: list[_Column]) -> None:
    """Give boxes and lanes their corners, each column in the middle of the height."""
    x = _MARGIN
    for column in columns:
        column.x = x
        _stack(column)
        x += column.width + _BETWEEN
    most = max(column.height for column in columns)
    for column in columns:
        down = _MARGIN + (most - column.height) // 2
        column.at = {key: (left, top + down) for key, (left, top) in column.at.items()}


def _stack(column: _Column) -> None:
    """Place a column's boxes and lanes below each other; many boxes in several stacks, with the lanes below them."""
    boxes: list[_Key] = [key for key in column.keys if len(key) == 1]
    stacks = math.ceil(len(boxes) / max(_MOST_ROWS, math.ceil(math.sqrt(2 * len(boxes))))) or 1
    rows = math.ceil(len(boxes) / stacks)
    keys, top = column.keys, 0
    if stacks > 1:
        keys = [key for key in column.keys if len(key) > 1]
        top = rows * (_HEIGHT + _GAP)
        for number, key in enumerate(boxes):
            stack, row = divmod(number, rows)
            column.at[key] = column.x + stack * (_WIDTH + _STACK), row * (_HEIGHT + _GAP)
        column.width = stacks * (_WIDTH + _STACK) - _STACK
    for key in keys:
        column.at[key] = column.x, top
        top += _HEIGHT + _GAP if len(key) == 1 else _LANE
    column.height = top


def _lines(graph: Graph, columns: list[_Column], routes: list[tuple[Edge, list[_Key]]]) -> list[Lines]:
    column_of = {key: column for column in columns for key in column.keys}
    paths: dict[str, list[str]] = defaultdict(list)
    heads: dict[str, dict[str, None]] = defaultdict(dict)
    for edge, route in routes:
        state = _state(graph, edge)
        start, x, y = _way_out(column_of[route[0]], route[0])
        drawn = [start]
        for key in route[1:]:
            column = column_of[key]
            next_x, next_y, through = _way_through(column, key)
            bend = (x + next_x) // 2
            drawn.append(f"C{bend} {y} {bend} {next_y} {next_x} {next_y}{through}")
            x, y = column.x + column.width, next_y
        paths[state].append("".join(drawn))
        left, top = column_of[route[-1]].at[route[-1]]
        heads[state][f"M{left} {top + _HEIGHT // 2}l-7 -4v8z"] = None
    order = [state for state in ("met", "open", "stuck") if state in paths]
    return [Lines(state, "".join(paths[state]), "".join(heads[state])) for state in order]


def _way_out(column: _Column, key: _Key) -> tuple[str, int, int]:
    """Return the line from a box to the right edge of its column, and where it ends: below the boxes to its right."""
    left, top = column.at[key]
    x, y, right = left + _WIDTH, top + _HEIGHT // 2, column.x + column.width
    if x == right:
        return f"M{x} {y}", x, y
    return f"M{x} {y}h8v{_OUT}H{right}", right, y + _OUT


def _way_through(column: _Column, key: _Key) -> tuple[int, int, str]:
    """Return where a line comes to the left edge of a column, and how it continues: to its box, or through the lane."""
    left, top = column.at[key]
    if len(key) > 1:
        return left, top + _LANE // 2, f"h{column.width}"
    y = top + _HEIGHT // 2
    if left == column.x:
        return left, y, ""
    return column.x, y + _IN, f"H{left - 15}v-{_IN}h15"


def _state(graph: Graph, edge: Edge) -> str:
    """Return met, open or stuck: the needed batch failed or was cancelled, and the other one waits for a retry."""
    status = graph.batches[edge.needed].get("status") or edge.ended_as
    if edge.ended_as is None or status not in _ENDED:
        return "open"
    return "stuck" if edge.on_failure == "wait" and edge.ended_as != "completed" else "met"
