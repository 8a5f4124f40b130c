"""Find what a distributed Postgres (Citus) could not run: rules for statements over tables distributed by queue.

The rules come from trying batchq on a cluster of Citus 13.2 with PostgreSQL 15. Statements are parsed by Postgres' own
parser (pglast); which functions are volatile or stable is read from pg_proc of a plain server. An operator counts as
stable where an operand is visibly a time or an interval, since the parser does not know types.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import psycopg
from pglast import ast as pg
from pglast import parse_plpgsql, parse_sql
from pglast.parser import ParseError
from pglast.visitors import Visitor

DISTRIBUTED = {
    "batches", "batches_live", "batches_finished", "finished_default", "all_batches", "failed_items",
    "throughput_minutes", "needs",
}  # fmt: skip
VIEWS = {"status", "queues", "throughput", "failures"}
RULES = {
    "returning": "RETURNING, CASE and coalesce of a write call immutable functions only",
    "volatile": "SET calls no volatile function",
    "nested write": "no statement over distributed tables calls a function that writes",
    "queue": "writes and row locks name the queue",
    "moved": "no UPDATE assigns the queue",
    "join": "distributed tables are joined on the queue",
    "recursive": "a recursive query names the queue",
    "no columns": "each SELECT has a column",
    "whole row": "to_jsonb takes no row of a view",
    "setting": "no statement calls set_config, which acts on the coordinator alone; SET LOCAL reaches the nodes",
}
PLACEHOLDER = re.compile(r"%\((\w+)\)s|%s")
OWN_ROW_TYPE = re.compile(r" batchq\.\w+;")  # in a declaration: libpg_query knows no schema but its own
A_STATEMENT = re.compile(r"\s*(SELECT|WITH|INSERT|UPDATE|DELETE)\b\s*\S")


@dataclass
class Routine:
    """A function of the schema: the statements in it, and whether one of them writes."""

    name: str
    statements: list[Any]
    calls: set[str] = field(default_factory=set)
    writes: bool = False


@dataclass
class Catalog:
    """What the rules need to know: volatility by function name and number of arguments, and which functions write."""

    volatility: dict[tuple[str, int], str]
    writers: set[str]

    def of_call(self, call: pg.FuncCall) -> str:
        """Return i, s or v: the worst of the functions that the name and the number of arguments allow."""
        name = call.funcname[-1].sval
        if name == "extract":
            return "s"  # of a timestamptz
        return self.volatility.get((name, len(call.args or ())), "i")


# ------------------------------------------------------------------------------------------------------- what is read


def statements_of_module(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the statements of a Python module, named MODULE.CONSTANT or MODULE.FUNCTION, each parsed."""
    short = module.__name__.rpartition(".")[2]
    texts = {name: value for name, value in vars(module).items() if isinstance(value, str) and A_STATEMENT.match(value)}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef):
            pieces = {part for child in ast.walk(node) if isinstance(child, ast.JoinedStr) for part in child.values}
            inner = [child.value for child in ast.walk(node) if isinstance(child, ast.Constant) and child not in pieces]
            found = [text for text in inner if isinstance(text, str) and A_STATEMENT.match(text)]
            texts |= {f"{node.name}{number or ''}": text for number, text in enumerate(found)}
    for name, text in texts.items():
        yield from parsed(f"{short}.{name}", text)


def parsed(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the statements of a text. A template that is filled in later is no statement yet and yields nothing; the
    beginning of a statement (WITH ...) is completed."""
    text = PLACEHOLDER.sub("$1", text.replace("%%", "%"))
    for whole in (text, f"{text} SELECT 1", f"WITH before AS (SELECT 1) {text}"):
        with suppress(ParseError):
            for raw in parse_sql(whole):
                yield name, raw.stmt
            return
    assert "{" in text, f"{name} cannot be parsed: {text}"


DEFINITIONS = """
SELECT pg_get_functiondef(p.oid)
FROM pg_proc p
WHERE p.pronamespace = 'batchq'::regnamespace
  AND p.prokind = 'f'
UNION ALL
SELECT format('CREATE VIEW batchq.%I AS %s', c.relname, pg_get_viewdef(c.oid))
FROM pg_class c
WHERE c.relnamespace = 'batchq'::regnamespace
  AND c.relkind = 'v'
"""


def routines(conn: psycopg.Connection[Any]) -> list[Routine]:
    """Return the functions and views of a database's schema."""
    found: list[Routine] = []
    for (text,) in conn.execute(DEFINITIONS).fetchall():
        for raw in parse_sql(text):
            if isinstance(raw.stmt, pg.CreateFunctionStmt):
                found.append(Routine(raw.stmt.funcname[-1].sval, list(bodies(raw.stmt, text))))
            elif isinstance(raw.stmt, pg.ViewStmt):
                found.append(Routine(f"view {raw.stmt.view.relname}", [raw.stmt.query]))
    for routine in found:
        watcher = Watcher()
        for statement in routine.statements:
            watcher(statement)
        routine.calls, routine.writes = watcher.calls, watcher.writes
    return found


def bodies(function: pg.CreateFunctionStmt, source: str) -> Iterator[Any]:
    """Yield the statements in a function."""
    language = next(option.arg.sval for option in function.options if option.defname == "language")
    if language == "plpgsql":
        source = OWN_ROW_TYPE.sub(" record;", source)
        for query, mode in expressions(parse_plpgsql(source)):
            for text in (query, f"SELECT {query}", f"SELECT {query.partition(':=')[2]}"):
                try:
                    yield from (raw.stmt for raw in parse_sql(text))
                    break
                except ParseError:
                    continue
            else:
                raise AssertionError(f"{function.funcname[-1].sval} ({mode}) cannot be parsed: {query}")
    elif function.sql_body is not None:
        body = function.sql_body
        yield from (part for block in body for part in block) if isinstance(body, tuple) else [body]


def expressions(node: Any) -> Iterator[tuple[str, int]]:
    """Yield each query and expression of a function in PL/pgSQL, as libpg_query's JSON has them."""
    if isinstance(node, dict):
        if "PLpgSQL_expr" in node:
            yield node["PLpgSQL_expr"]["query"], node["PLpgSQL_expr"].get("parseMode", 0)
        for value in node.values():
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


class Watcher(Visitor):  # type: ignore[misc]
    """Notes what a statement calls, and whether it writes."""

    def __init__(self) -> None:
        self.calls: set[str] = set()
        self.writes = False

    def visit_FuncCall(self, _: Any, node: pg.FuncCall) -> None:
        """Note a call."""
        self.calls.add(node.funcname[-1].sval)

    def visit_InsertStmt(self, _: Any, __: Any) -> None:
        """Note a write."""
        self.writes = True

    visit_UpdateStmt = visit_DeleteStmt = visit_TruncateStmt = visit_InsertStmt


def catalog(conn: psycopg.Connection[Any], made: list[Routine]) -> Catalog:
    """Return what the rules need: volatilities from pg_proc, and the functions that write or call one that does."""
    worst: dict[tuple[str, int], str] = {}
    rows = conn.execute(
        "SELECT proname, n, provolatile::text FROM pg_catalog.pg_proc p "
        "CROSS JOIN generate_series((p.pronargs - p.pronargdefaults)::integer, p.pronargs::integer) n "
        "WHERE p.pronamespace IN ('pg_catalog'::regnamespace, 'batchq'::regnamespace)"
    )
    for name, count, volatility in rows:
        worst[name, count] = max(volatility, worst.get((name, count), "i"))  # i < s < v
    writers = {routine.name for routine in made if routine.writes}
    while more := {routine.name for routine in made if routine.calls & writers} - writers:
        writers |= more
    return Catalog(worst, writers)


# --------------------------------------------------------------------------------------------------------- the rules


def breaches(statement: Any, known: Catalog) -> set[str]:
    """Return the rules that a statement breaks."""
    checker = Checker(known)
    checker(statement)
    if checker.touches and checker.calls & known.writers:
        checker.found.add("nested write")
    return checker.found


class Checker(Visitor):  # type: ignore[misc]
    """Visits a statement and notes the rules that it breaks."""

    def __init__(self, known: Catalog) -> None:
        self.known = known
        self.found: set[str] = set()
        self.calls: set[str] = set()
        self.touches = False

    def visit_RangeVar(self, _: Any, node: pg.RangeVar) -> None:
        """Note whether a distributed table is touched."""
        self.touches |= is_distributed(node)

    def visit_FuncCall(self, _: Any, node: pg.FuncCall) -> None:
        """Note a call."""
        self.calls.add(node.funcname[-1].sval)
        if node.funcname[-1].sval == "set_config":
            self.found.add("setting")

    def visit_SelectStmt(self, ancestors: Any, node: pg.SelectStmt) -> None:
        """Check a SELECT."""
        if node.op == 0 and not node.valuesLists and not node.targetList:
            self.found.add("no columns")
        tables = list(tables_of(node.fromClause))
        distributed = [table for table in tables if is_distributed(table)]
        named = queues_named(node.whereClause, node.fromClause)
        if node.lockingClause and any(not fixes_queue(table, named, tables) for table in distributed):
            self.found.add("queue")
        if len(distributed) > 1 and any(not names_queue(table, named, tables) for table in distributed):
            self.found.add("join")
        if is_within_a_read(ancestors) and any(not names_queue(table, named, tables) for table in distributed):
            self.found.add("join")
        names = {name_of(table) for table in tables if is_view(table)}
        if node.targetList and whole_rows(node.targetList) & names:
            self.found.add("whole row")

    def visit_WithClause(self, _: Any, node: pg.WithClause) -> None:
        """Check a recursive query."""
        if node.recursive:
            for common in node.ctes:
                checker = Recursion()
                checker(common)
                if checker.is_free and common.ctename in checker.names:
                    self.found.add("recursive")

    def visit_UpdateStmt(self, _: Any, node: pg.UpdateStmt) -> None:
        """Check an UPDATE."""
        if not is_distributed(node.relation):
            return
        self.check_write(node)
        calls = [call for target in node.targetList for call in calls_in(target.val)]
        if any(self.known.of_call(call) == "v" for call in calls):
            self.found.add("volatile")
        if any(target.name == "queue" for target in node.targetList):
            self.found.add("moved")
        if any(self.is_unstable(part) for part in conditionals((node.targetList, node.whereClause))):
            self.found.add("returning")

    def visit_DeleteStmt(self, _: Any, node: pg.DeleteStmt) -> None:
        """Check a DELETE."""
        if is_distributed(node.relation):
            self.check_write(node)

    def visit_InsertStmt(self, _: Any, node: pg.InsertStmt) -> None:
        """Check an INSERT."""
        if is_distributed(node.relation) and self.is_unstable(returning_of(node)):
            self.found.add("returning")

    def check_write(self, node: Any) -> None:
        """Check what UPDATE and DELETE have in common."""
        others = getattr(node, "fromClause", None) or getattr(node, "usingClause", None)
        tables = [node.relation, *tables_of(others)]
        named = queues_named(node.whereClause, others)
        if not fixes_queue(node.relation, named, tables):
            self.found.add("queue")
        if self.is_unstable(returning_of(node)):
            self.found.add("returning")

    def is_unstable(self, node: Any) -> bool:
        """Return whether an expression calls more than immutable functions."""
        return any(self.known.of_call(call) != "i" for call in calls_in(node)) or has_times(node)


def returning_of(node: Any) -> Any:
    """Return the RETURNING list, wherever this version of the parser keeps it."""
    clause = getattr(node, "returningClause", None)
    return clause.exprs if clause is not None else getattr(node, "returningList", None)


def is_distributed(table: pg.RangeVar) -> bool:
    """Return whether a table is distributed by queue. A CTE has no schema."""
    return table.schemaname == "batchq" and table.relname in DISTRIBUTED


def is_view(table: pg.RangeVar) -> bool:
    """Return whether a name is one of the views over distributed tables."""
    return table.schemaname == "batchq" and table.relname in VIEWS


def name_of(table: pg.RangeVar) -> str:
    """Return the name by which a statement knows a table."""
    return str(table.alias.aliasname if table.alias else table.relname)


def lineage(ancestor: Any) -> Iterator[Any]:
    """Yield the nodes above one, the nearest first."""
    while ancestor is not None and ancestor.node is not None:
        yield ancestor.node
        ancestor = ancestor.parent


def is_within_a_read(ancestors: Any) -> bool:
    """Return whether a SELECT is a subquery in an expression of one that reads a distributed table."""
    above = list(lineage(ancestors))
    links = [number for number, node in enumerate(above) if isinstance(node, pg.SubLink)]
    outer = above[links[0] :] if links else []
    read = [table for node in outer for table in tables_of(getattr(node, "fromClause", None))]
    return any(is_distributed(table) for table in read)


def tables_of(clause: Any) -> Iterator[pg.RangeVar]:
    """Yield the tables that a FROM clause names itself, not in subqueries."""
    for item in clause or ():
        if isinstance(item, pg.RangeVar):
            yield item
        elif isinstance(item, pg.JoinExpr):
            yield from tables_of((item.larg, item.rarg))


def queues_named(where: Any, clause: Any) -> list[tuple[str | None, str | None]]:
    """Return the pairs that are said to be equal where a column "queue" is one side: its table, and that of the other
    side (None: no other table's column)."""
    pairs: list[tuple[str | None, str | None]] = []
    for condition in conjuncts([where, *join_conditions(clause)]):
        if isinstance(condition, pg.A_Expr) and condition.name[-1].sval == "=" and condition.kind in (0, 1):
            sides = [condition.lexpr, condition.rexpr]
            for one, other in (sides, sides[::-1]):
                if (table := queue_column(one)) is not None:
                    pairs.append((table, queue_column(other)))
    return pairs


def conjuncts(conditions: Any) -> Iterator[Any]:
    """Yield what must all be true."""
    for condition in conditions:
        if isinstance(condition, pg.BoolExpr) and condition.boolop == 0:
            yield from conjuncts(condition.args)
        elif condition is not None:
            yield condition


def join_conditions(clause: Any) -> Iterator[Any]:
    """Yield the conditions of the joins in a FROM clause."""
    for item in clause or ():
        if isinstance(item, pg.JoinExpr):
            yield item.quals
            yield from join_conditions((item.larg, item.rarg))


def queue_column(node: Any) -> str | None:
    """Return the table ("": none is named) whose column "queue" an expression is, None if it is another."""
    if isinstance(node, pg.ColumnRef) and isinstance(node.fields[-1], pg.String) and node.fields[-1].sval == "queue":
        return node.fields[0].sval if len(node.fields) > 1 else ""
    return None


def names_queue(table: pg.RangeVar, pairs: list[tuple[str | None, str | None]], tables: list[pg.RangeVar]) -> bool:
    """Return whether a condition says which queue the rows of a table are of."""
    name = name_of(table)
    return any(one == name or (one == "" and len(tables) == 1) for one, _ in pairs)


def fixes_queue(table: pg.RangeVar, pairs: list[tuple[str | None, str | None]], tables: list[pg.RangeVar]) -> bool:
    """Return whether the queue of a table's rows is said to equal a value, perhaps by that of another table. What is no
    table of the statement is a variable."""
    names = {name_of(one) for one in tables} | {""}
    fixed: set[str | None] = {one for one, other in pairs if other not in names}
    for _ in pairs:
        fixed |= {one for one, other in pairs if other in fixed}
    return names_queue(table, [(one, None) for one in fixed], tables)


class Finder(Visitor):  # type: ignore[misc]
    """Collects nodes of some kinds."""

    def __init__(self, *kinds: type) -> None:
        self.kinds = kinds
        self.nodes: list[Any] = []

    def visit(self, _: Any, node: Any) -> None:
        """Collect a node."""
        if isinstance(node, self.kinds):
            self.nodes.append(node)


def nodes(node: Any, *kinds: type) -> list[Any]:
    """Return the nodes of some kinds in an expression, itself included."""
    if node is None:
        return []
    if isinstance(node, tuple | list):
        return [found for part in node for found in nodes(part, *kinds)]
    finder = Finder(*kinds)
    finder(node)
    return finder.nodes


def calls_in(node: Any) -> list[pg.FuncCall]:
    """Return the calls in an expression."""
    return nodes(node, pg.FuncCall)


def conditionals(node: Any) -> list[Any]:
    """Return each CASE and coalesce in an expression."""
    return nodes(node, pg.CaseExpr, pg.CoalesceExpr)


def has_times(node: Any) -> bool:
    """Return whether an expression computes with times: such operators are stable, not immutable."""
    for operation in nodes(node, pg.A_Expr):
        casts = [cast.typeName.names[-1].sval for cast in nodes(operation, pg.TypeCast)]
        if operation.name[-1].sval in ("+", "-", "*") and {"interval", "timestamptz"} & set(casts):
            return True
    return False


def whole_rows(targets: Any) -> set[str]:
    """Return the names that to_jsonb and its kin are given as a whole row."""
    found: set[str] = set()
    for call in calls_in(targets):
        if call.funcname[-1].sval in ("to_jsonb", "to_json", "row_to_json"):
            for argument in call.args or ():
                if isinstance(argument, pg.ColumnRef) and len(argument.fields) == 1:
                    found.add(getattr(argument.fields[0], "sval", ""))
    return found


class Recursion(Visitor):  # type: ignore[misc]
    """Notes what a common table expression reads, and whether a distributed table is read without its queue."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.is_free = False

    def visit_RangeVar(self, _: Any, node: pg.RangeVar) -> None:
        """Note a table."""
        self.names.add(node.relname)

    def visit_SelectStmt(self, _: Any, node: pg.SelectStmt) -> None:
        """Note a SELECT."""
        tables = list(tables_of(node.fromClause))
        named = queues_named(node.whereClause, node.fromClause)
        self.is_free |= any(is_distributed(table) and not names_queue(table, named, tables) for table in tables)


def as_json(found: dict[str, set[str]]) -> str:
    """Return findings as text, for the log of a test."""
    return json.dumps({name: sorted(rules) for name, rules in sorted(found.items())}, indent=2)
