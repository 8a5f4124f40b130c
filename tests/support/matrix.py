"""The matrix of roles in docs/security.md: what each role may do with each table, column, view and function of batchq.

Nothing is read from the grants: each cell is a statement that is tried as that role.
"""

from collections.abc import Iterator
from contextlib import ExitStack

import psycopg

from tests.support.markdown import ROOT
from tests.support.roles import role_for

PAGE = ROOT / "docs" / "security.md"
BEGIN = "<!-- matrix: each cell tried; `python -m tests.instruments.reference` writes it anew -->\n"
END = "<!-- end of matrix -->"
ROLES = ("stranger", "producer", "worker", "viewer", "operator")
NOTHING = "-"
Conn = psycopg.Connection
# Nobody can write a view or an identity, or truncate a view, whatever is granted.
DENIED = (
    psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectNotInPrerequisiteState,
    psycopg.errors.WrongObjectType, psycopg.errors.FeatureNotSupported, psycopg.errors.GeneratedAlways,
)  # fmt: skip

RELATIONS = """
SELECT c.relname::text, array_agg(a.attname::text ORDER BY a.attnum)
FROM pg_class c
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
WHERE c.relnamespace = 'batchq'::regnamespace
  AND c.relkind IN ('r', 'p', 'v')
  AND c.relname !~ '^finished_'
GROUP BY c.relname
ORDER BY c.relname
"""
FUNCTIONS = """
SELECT p.proname::text, string_agg('NULL::' || format_type(t.type, NULL), ', ' ORDER BY t.place)
FROM pg_proc p
LEFT JOIN LATERAL unnest(p.proargtypes) WITH ORDINALITY AS t(type, place) ON true
WHERE p.pronamespace = 'batchq'::regnamespace
GROUP BY p.oid, p.proname
ORDER BY p.proname
"""
OF_COLUMNS = {
    "select": "SELECT {column} FROM batchq.{relation} LIMIT 0",
    "insert": "INSERT INTO batchq.{relation} ({column}) OVERRIDING SYSTEM VALUE SELECT NULL WHERE false",
    "update": "UPDATE batchq.{relation} SET {column} = DEFAULT WHERE false",
}
OF_RELATIONS = {
    "delete": "DELETE FROM batchq.{relation} WHERE false",
    "truncate": "TRUNCATE batchq.{relation}",
}


def matrix(admin_dsn: str) -> str:
    """Return it as Markdown. *admin_dsn*: of a superuser, who makes a role for each duty."""
    with psycopg.connect(admin_dsn) as conn:
        relations, functions = conn.execute(RELATIONS.encode()).fetchall(), conn.execute(FUNCTIONS.encode()).fetchall()
    with ExitStack() as stack:
        roles = []
        for role in ROLES:
            dsn = stack.enter_context(role_for(admin_dsn, *([] if role == "stranger" else [role])))
            roles.append(stack.enter_context(psycopg.connect(dsn)))
        rows = [(f"`{name}`", *(what(role, name, columns) for role in roles)) for name, columns in relations]
        rows += callers(roles, functions)
    head = [("table, view or function", *ROLES), ("---",) * (len(ROLES) + 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [*head, *rows])


def what(role: Conn, relation: str, columns: list[str]) -> str:
    """Return what a role may do with a table or a view, and with which of its columns, if not all."""
    parts = []
    for verb, statement in OF_COLUMNS.items():
        allowed = [column for column in columns if may(role, statement.format(relation=relation, column=column))]
        if allowed:
            parts.append(verb if allowed == columns else f"{verb} ({', '.join(allowed)})")
    parts += [verb for verb, statement in OF_RELATIONS.items() if may(role, statement.format(relation=relation))]
    return ", ".join(parts) or NOTHING


def callers(roles: list[Conn], functions: list[tuple[str, str | None]]) -> Iterator[tuple[str, ...]]:
    """Yield rows: the functions that the same roles may call, and which those are."""
    by_roles: dict[tuple[str, ...], list[str]] = {}
    for name, arguments in functions:
        cells = tuple("call" if may(role, f"SELECT batchq.{name}({arguments or ''})") else NOTHING for role in roles)
        by_roles.setdefault(cells, []).append(f"`{name}`")
    for cells, names in sorted(by_roles.items(), reverse=True):
        yield ", ".join(dict.fromkeys(names)), *cells


def may(role: Conn, statement: str) -> bool:
    """Try a statement, and take it back. What is not allowed is denied before anything else can go wrong."""
    try:
        role.execute(statement.encode())
    except DENIED:
        return False
    except psycopg.Error:
        return True
    finally:
        role.rollback()
    return True


def shown() -> str:
    """Return the matrix that the page has."""
    return PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


def write(admin_dsn: str) -> None:
    """Put the matrix into the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(BEGIN + shown(), BEGIN + matrix(admin_dsn)), encoding="utf-8")
