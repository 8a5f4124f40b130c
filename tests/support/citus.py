"""Databases on a cluster of Citus, for tests and instruments that are given its coordinator."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.servers import Server

SHARDS = 8  # of each table
NODES = "SELECT nodename, nodeport FROM pg_dist_node WHERE isactive AND shouldhaveshards AND groupid <> 0 ORDER BY 1, 2"
Node = tuple[str, int]


def nodes(server: Server) -> Sequence[Node]:
    """Return host and port of the nodes that hold data, as the coordinator's own database knows them."""
    with psycopg.connect(server.admin_dsn) as conn:
        return conn.execute(NODES).fetchall()


def create_database(server: Server, name: str) -> None:
    """Make a database on the coordinator and on each node, with Citus, and let the coordinator know the nodes."""
    workers = nodes(server)
    for conn in _each(server, workers):
        conn.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        conn.execute(sql.SQL("ALTER DATABASE {} SET citus.enable_unsafe_triggers = on").format(sql.Identifier(name)))
    for conn in _each(server, workers, name):
        conn.execute("CREATE EXTENSION citus")
    coordinator = conninfo_to_dict(server.admin_dsn)
    with psycopg.connect(server.dsn(name), autocommit=True) as conn:
        conn.execute(
            "SELECT citus_set_coordinator_host(%s, %s)", [coordinator.get("host"), int(coordinator.get("port") or 5432)]
        )
        for host, port in workers:
            conn.execute("SELECT citus_add_node(%s, %s)", [host, port])
        setting = sql.SQL("ALTER DATABASE {} SET citus.shard_count = {}")
        conn.execute(setting.format(sql.Identifier(name), sql.Literal(SHARDS)))


def drop_database(server: Server, name: str) -> None:
    """Drop a database from the coordinator, then from the nodes."""
    for conn in _each(server, nodes(server)):
        conn.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def _each(server: Server, workers: Sequence[Node], name: str | None = None) -> Iterator[psycopg.Connection]:
    """Yield a connection to the coordinator, then to each node."""
    base = server.admin_dsn if name is None else server.dsn(name)
    with ExitStack() as stack:
        for dsn in (base, *(make_conninfo(base, host=host, port=port) for host, port in workers)):
            yield stack.enter_context(psycopg.connect(dsn, autocommit=True))


@contextmanager
def database(server: Server, name: str) -> Iterator[str]:
    """Yield the DSN of a new database on the cluster; it is dropped at the end."""
    create_database(server, name)
    try:
        yield server.dsn(name)
    finally:
        drop_database(server, name)
