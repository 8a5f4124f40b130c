"""``batchq flow``: the batches that wait for each other around one batch: a tree or, if there are many, counts."""

from argparse import Namespace
from typing import Any

from rich.console import Group
from rich.text import Text

from batchq.cli import show_tables
from batchq.cli.arguments import add_command, add_id, natural
from batchq.cli.connections import database
from batchq.common.terminal import complain, put_json, show, styled
from batchq.operate import flow_graph
from batchq.operate.flow_graph import Graph
from batchq.operate.parts import missing_text


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(subparsers, "flow", _run, "show which batches wait for which, around one batch")
    parser.description = (
        "Show the flow that a batch is part of. The batches that wait for a batch are listed below it. A flow of more "
        "than --limit batches is shown as counts by kind and status."
    )
    add_id(parser)
    parser.add_argument("--limit", type=natural, default=200, metavar="N", help="batches to list (default: 200)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _run(options: Namespace) -> int:
    with database(options) as conn:
        graph = flow_graph.read(conn, options.id)
        missing = "" if graph else missing_text(conn, options.id)
    if graph is None:
        complain(missing)
        return 1
    if options.json:
        put_json({
            "batches": list(graph.batches.values()),
            "edges": [edge._asdict() for edge in graph.edges],
            "is_cut": graph.is_cut,
        })  # fmt: skip
    elif len(graph.batches) > options.limit:
        show(show_tables.flow_groups(graph.groups(), graph.is_cut))
    else:
        show(Group(*_tree(graph, options.id)))
    return 0


def _tree(graph: Graph, marked: int) -> list[Text]:
    shown = []
    for depth, one, is_again in graph.tree():
        row = graph.batches[one]
        line = Text("  " * depth).append(str(one), style="bold" if one == marked else "")
        if not row.get("status"):
            line.append("  not stored any more", style="dim")
        else:
            line.append("  ").append(styled(f"{row['queue']}/{row['kind']}")).append("  ")
            line.append(show_tables.colored(row["status"]))
        if row.get("status") == "waiting":
            line.append(f" for {row['needs_left']:,}")
        if is_again:
            line.append("  (see above)", style="dim")
        shown.append(line)
    return shown
