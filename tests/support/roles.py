"""Login roles for a test, with the grants of their duties and nothing else."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo


@contextmanager
def role_for(admin_dsn: str, *duties: str, password: str | None = None) -> Iterator[str]:
    """Give the DSN of a new role with these duties of batchq.duties; with none it may connect and no more.

    *admin_dsn*: of a superuser, for the database. The role is dropped at the end, with all that it owns.
    """
    name, password = f"batchq_test_{secrets.token_hex(6)}", password or secrets.token_hex(12)
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(name), password))
        try:
            for duty in duties:
                admin.execute("SELECT batchq.grant_duty(%s, %s)", [duty, name])
            yield make_conninfo(admin_dsn, user=name, password=password)
        finally:
            admin.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE usename = %s", [name])
            admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
