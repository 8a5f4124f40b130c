"""Make docs/reference.md from docstrings, settings, the parser and the schema.

python -m tests.instruments.reference
"""

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import psycopg
from pydantic.fields import FieldInfo

import batchq
from batchq import testing
from batchq.cli import make_parser
from batchq.operate.verbs import VERBS
from batchq.settings import Settings
from tests.support import code_map, matrix
from tests.support.databases import Databases
from tests.support.markdown import ROOT
from tests.support.servers import running_server
from tests.support.settings_table import default

PAGE = ROOT / "docs" / "reference.md"
INTRODUCTION = """\
# Reference

Made by `python -m tests.instruments.reference`, from the code: edit it there. [Python](#python) · [Tests](#tests) ·
[Settings](#settings) · [Command line](#command-line) · [Exit codes](#exit-codes) · [Schema](#schema). What it is for is
told in [handlers](handlers.md), [enqueue](enqueue.md), [steering](steering.md) and [operations](operations.md).
"""
# What a program may use of a class; the other names are the worker's own.
MEMBERS = {
    "App": ("handler", "item_handler", "schedule", "around", "lifespan", "on_failure"),
    "Batch": (
        "payload", "items", "cursor", "app_state", "queue", "stop_requested", "all_items_worked", "transaction",
        "checkpoint", "checkpoint_async", "chunks", "raise_if_interrupted",
    ),
    "Chunk": ("fail", "end_at", "transaction", "commit", "commit_async"),
    "Settings": ("load",),
    "Worker": ("run", "stop", "stop_now"),
}  # fmt: skip
RELATIONS = (
    "batches",
    "failed_items",
    "status",
    "queues",
    "failures",
    "throughput",
    "workers",
    "pauses",
    "limits",
    "limits_in_use",
)
RELATIONS += ("throttles", "schedules", "schedule_status", "audit")
FUNCTIONS = (
    *dict.fromkeys(verb.function for verb in VERBS.values()), "bulk", "set_limit", "set_schedule", "pause_schedule",
    "resume_schedule", "run_schedule", "remove_schedule", "enqueue_copy",
    "prune", "create_finished_partitions", "bell", "give_replica_identities", "newest_live",
    "split_queue", "whole_queue", "whole_of_shard", "shards_of", "shard_of",
    "failed_items_of", "progress_of_parts", "grant_duty", "duty_statements", "shown_status",
    "claim", "extend", "items", "items_to_retry", "checkpoint", "complete", "fail", "release", "rescue",
)  # fmt: skip
UNITS = {"seconds": " seconds", "days": " days"}


def page(conn: psycopg.Connection[Any]) -> str:
    """Return the page. *conn*: to a database with the newest schema."""
    return "\n".join(
        [INTRODUCTION, *python(), *testing_names(), *settings(), *command_line(), *exit_codes(), *schema(conn)]
    )


def table(*rows: tuple[str, ...]) -> str:
    """Return a table, its head first."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def python() -> Iterator[str]:
    """Yield what ``import batchq`` gives."""
    yield "## Python\n"
    yield from names(batchq)


def testing_names() -> Iterator[str]:
    """Yield what ``batchq.testing`` gives."""
    yield "## Tests\n"
    yield "The names of `batchq.testing`; [testing](testing.md) shows how they are used.\n"
    yield from names(testing)


def names(module: ModuleType) -> Iterator[str]:
    """Yield the public names of a module."""
    for name in module.__all__:
        thing = getattr(module, name)
        yield f"### {name}\n"
        if inspect.isfunction(thing):
            yield f"`{signature(name, thing)}`\n"
        elif name == "Settings":
            yield "`Settings.load(**overrides)`: the fields are the [settings](#settings).\n"
        elif "__init__" in vars(thing) and name not in ("Batch", "Chunk"):  # those are made by the worker
            yield f"`{constructor(name, thing)}`\n"
        elif issubclass(thing, BaseException):
            yield f"An exception: `{name}({', '.join(base.__name__ for base in thing.__bases__)})`\n"
        yield text_of(thing)
        for member in MEMBERS.get(name, ()):
            found = vars(thing)[member]
            yield f"#### {name}.{member}\n"
            if not isinstance(found, property):
                yield f"`{signature(member, found)}`\n"
            yield text_of(found)


def signature(name: str, thing: Any) -> str:
    """Return a function's signature as it is written, without self."""
    [node] = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    unquoted = re.sub(r": '([^']+)'", r": \1", ast.unparse(node.args))
    arguments = re.sub(r"(: [^=,()]+)=", r"\1 = ", unquoted)
    result = ast.unparse(node.returns or ast.Constant(None)).strip("'")
    awaited = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{awaited}{name}({arguments}) -> {result}"


def constructor(name: str, thing: type) -> str:
    """Return how an object of a class is made; a dataclass's constructor has no source."""
    if is_dataclass(thing):
        return "App()" if thing is batchq.App else f"{name}{inspect.signature(thing)}".removesuffix(" -> None")
    return signature(name, thing.__init__).removesuffix(" -> None")  # type: ignore[misc]


def text_of(thing: Any) -> str:
    """Return a docstring."""
    return inspect.cleandoc(thing.__doc__ or "") + "\n"


def settings() -> Iterator[str]:
    """Yield the settings."""
    rows = [
        (f"`BATCHQ_{name.upper()}`", default(field), takes(name, field), field.description or "")
        for name, field in Settings.model_fields.items()
    ]
    yield "## Settings\n"
    yield "From the environment or `.env`, or as flags: `BATCHQ_LEASE_SECONDS=30`, `--lease-seconds 30`."
    yield "A `.env` with settings of batchq that another user (not root) owns, or that others may write, is refused,"
    yield "unless `BATCHQ_ENV_FILE` names it; empty, that has no file read.\n"
    yield table(("setting", "default", "takes", "what it is"), *rows)
    yield "The settings of the web UI are in [web](web.md).\n"


def takes(name: str, field: FieldInfo) -> str:
    """Return what a setting takes."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    if field.annotation is bool:
        return "`yes`, `no`"
    limits = {key: getattr(limit, key) for limit in field.metadata for key in ("ge", "le") if hasattr(limit, key)}
    if not limits:
        return "DSN" if name.endswith("dsn") else "text"
    return f"{limits['ge']} to {limits['le']:,}{UNITS.get(name.rpartition('_')[2], '')}"


def command_line() -> Iterator[str]:
    """Yield the commands and their arguments."""
    parser = make_parser()
    [commands] = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield "## Command line\n"
    yield f"{parser.description}\n"
    for name, command in commands.choices.items():
        yield f"### batchq {name}\n"
        yield " ".join(filter(None, (command.description, command.epilog))) + "\n"
        flags = [action for action in command._actions if action.dest.startswith("set_")]
        own = [action for action in command._actions if action not in flags and action.dest != "help"]
        if own:
            yield table(("argument", "what it is"), *((written(action), told(action)) for action in own))
        yield f"[Settings](#settings): {', '.join(f'`{flag.option_strings[0]}`' for flag in flags)}\n"


def written(action: argparse.Action) -> str:
    """Return an argument as it is written."""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = "" if action.nargs == 0 else str(action.metavar or choices or action.dest.upper())
    if not action.option_strings:
        return f"`{value}`" + {"?": " (may be left out)", "*": " ...", "+": " ..."}.get(str(action.nargs), "")
    return f"`{' '.join([action.option_strings[0], value]).strip()}`" + (" (required)" if action.required else "")


def told(action: argparse.Action) -> str:
    """Return what is said of an argument, or else its default."""
    return (action.help or ("" if action.default is None else f"(default: {action.default})")).replace("%%", "%")


def exit_codes() -> Iterator[str]:
    """Yield the exit codes, as the page of operations tells them."""
    operations = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    yield "## Exit codes\n" + operations.split("## Exit codes\n")[1].split("\n## ")[0]


def schema(conn: psycopg.Connection[Any]) -> Iterator[str]:
    """Yield tables, views and functions, as their comments tell them."""
    yield "## Schema\n"
    for relation in RELATIONS:
        [(comment,)] = rows(conn, "SELECT obj_description(%s::regclass, 'pg_class')", f"batchq.{relation}")
        yield f"### batchq.{relation}\n\n{comment}\n"
        yield table(("column", "type", "what it is"), *rows(conn, COLUMNS, f"batchq.{relation}"))
    for function in FUNCTIONS:
        yield f"### batchq.{function}\n"
        for arguments, result, comment in rows(conn, FUNCTION, function):
            yield f"`batchq.{function}({arguments}) -> {result}`\n\n{comment}\n"


COLUMNS = """
SELECT format('`%%s`', attname), format_type(atttypid, atttypmod), coalesce(col_description(attrelid, attnum), '')
FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
ORDER BY attnum
"""
FUNCTION = """
SELECT pg_get_function_arguments(oid), pg_get_function_result(oid), obj_description(oid, 'pg_proc')
FROM pg_proc
WHERE pronamespace = 'batchq'::regnamespace AND proname = %s
ORDER BY 1
"""


def rows(conn: psycopg.Connection[Any], query: str, name: str) -> list[tuple[str, ...]]:
    """Return what a query says of a name."""
    return conn.execute(query.encode(), [name]).fetchall()


def main() -> None:
    """Write the page, the map of the code in docs/design.md, and the matrix of roles in docs/security.md."""
    code_map.write()
    with running_server() as server:
        databases = Databases(server)
        with databases.migrated() as name, psycopg.connect(server.dsn(name), autocommit=True) as conn:
            PAGE.write_text(page(conn), encoding="utf-8")
            matrix.write(server.dsn(name))
        databases.close()


if __name__ == "__main__":
    main()
