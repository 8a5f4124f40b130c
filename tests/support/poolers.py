"""PgBouncer in transaction mode, strict, with two backends that take turns."""

import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row

from batchq.postgres.embedded import hand_over, run_unprivileged
from tests.support.programs import path_of
from tests.support.servers import Server, free_port
from tests.support.waiting import wait_until

START_TIMEOUT_SECONDS = 10.0
SETTLE_TIMEOUT_SECONDS = 1.0


class PgBouncer:
    """A PgBouncer before *server*; every database of the server is reachable through it.

    *reset_always* False lets what a session sets leak to the next client, as on Supavisor; True makes it
    vanish after each transaction. *settings* are further lines of its configuration.
    """

    def __init__(self, server: Server, *, reset_always: bool = False, **settings: object) -> None:
        self.server = server
        self.port = free_port()
        self.upstream = conninfo_to_dict(server.admin_dsn)
        self.settings = self._standard_settings() | {"server_reset_query_always": int(reset_always)} | settings
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="batchq-pgbouncer-"))
        self._cleanup.callback(shutil.rmtree, self.directory)
        self._write_files()
        self._cleanup.callback(self.kill)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def start(self) -> None:
        """Start the process, for the first time or after kill(), and wait until it listens."""
        self.process = subprocess.Popen(
            [path_of("pgbouncer"), "--quiet", str(self.directory / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for pytest, which then ends it
            **run_unprivileged(),
        )
        wait_until(self._listens, START_TIMEOUT_SECONDS, "PgBouncer to listen")

    def kill(self) -> None:
        """End the process at once, as a crash of the pooler."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Stop the process with SIGSTOP: connections stand, nothing is answered."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the process go on after freeze()."""
        self.process.send_signal(signal.SIGCONT)

    def pause(self, dbname: str) -> None:
        """Let running transactions of *dbname* end, and new ones wait until resume()."""
        self.admin(f"PAUSE {dbname}")

    def resume(self, dbname: str) -> None:
        """End a pause() or what KILL did."""
        self.admin(f"RESUME {dbname}")

    def dsn(self, dbname: str) -> str:
        """Return the conninfo for *dbname* through PgBouncer."""
        user, password = self.upstream["user"], self.upstream.get("password")
        return make_conninfo(
            host="127.0.0.1", port=self.port, user=user, password=password, dbname=dbname, sslmode="disable"
        )

    def dsn_of(self, role_dsn: str) -> str:
        """Return the conninfo through PgBouncer for the role and database of *role_dsn*; it lets the role in."""
        parts = conninfo_to_dict(role_dsn)
        user, password = _quoted(parts["user"]), _quoted(parts.get("password") or "")
        with (self.directory / "users.txt").open("a") as users:
            users.write(f"{user} {password}\n")
        self.admin("RELOAD")
        return make_conninfo(role_dsn, host="127.0.0.1", port=self.port, sslmode="disable")

    def admin(self, command: str) -> list[dict[str, Any]]:
        """Run a command of the admin console and return its rows."""
        connect = psycopg.connect(self.dsn("pgbouncer"), autocommit=True, cursor_factory=psycopg.ClientCursor)
        with connect as conn:
            cursor = conn.cursor(row_factory=dict_row)
            cursor.execute(command.encode())
            return cursor.fetchall() if cursor.description else []

    def pool(self, dbname: str) -> dict[str, Any]:
        """Return the row of SHOW POOLS for *dbname*: cl_active, cl_waiting, sv_active, sv_idle and so on."""
        rows = [row for row in self.admin("SHOW POOLS") if row["database"] == dbname]
        return rows[0] if rows else {"cl_active": 0, "cl_waiting": 0, "sv_active": 0, "sv_idle": 0}

    def sv_active(self, dbname: str) -> int:
        """Return how many backends of *dbname* clients hold now."""
        return int(self.pool(dbname)["sv_active"])

    def warm_up(self, dbname: str) -> None:
        """Open both backends of *dbname*: from now on transactions change between them."""
        self.backends(dbname)

    def backends(self, dbname: str) -> dict[int, int]:
        """Return how many prepared statements each backend of *dbname* has, by process id.

        Two transactions at the same time are on two backends.
        """
        query = "SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements)"
        with ExitStack() as stack:
            conns = [stack.enter_context(psycopg.connect(self.dsn(dbname), prepare_threshold=None)) for _ in "AB"]
            rows = [conn.execute(query).fetchone() for conn in conns]
        return {row[0]: row[1] for row in rows if row}

    def check_settled(self, dbname: str) -> None:
        """Fail unless all backends of *dbname* are free within 1 s and have no prepared statements."""
        wait_until(lambda: self._is_idle(dbname), SETTLE_TIMEOUT_SECONDS, f"idle backends: {self.pool(dbname)}")
        prepared = self.backends(dbname)
        assert not any(prepared.values()), f"prepared statements by backend: {prepared}"

    def forget(self, dbname: str) -> None:
        """Close all connections of *dbname*, which will be dropped."""
        self.admin(f"KILL {dbname}")

    def _is_idle(self, dbname: str) -> bool:
        pool = self.pool(dbname)
        return pool["sv_active"] == pool["cl_waiting"] == 0

    def _listens(self) -> bool:
        if self.process.poll() is not None:
            log = (self.directory / "pgbouncer.log").read_text()
            raise RuntimeError(f"PgBouncer ended with {self.process.returncode}: {log}")
        try:
            self.admin("SHOW VERSION")
        except psycopg.OperationalError:
            return False
        return True

    def _standard_settings(self) -> dict[str, object]:
        return {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "unix_socket_dir": "",
            "auth_type": "trust",
            "admin_users": self.upstream["user"],
            "pool_mode": "transaction",
            "default_pool_size": 2,
            "min_pool_size": 2,
            "server_round_robin": 1,
            "max_client_conn": 100,
            "query_wait_timeout": 5,
            "server_login_retry": 0.2,
            "server_reset_query": "DISCARD ALL",
            "ignore_startup_parameters": "",
        }

    def _write_files(self) -> None:
        files = {"auth_file": self.directory / "users.txt", "logfile": self.directory / "pgbouncer.log"}
        user, password = _quoted(self.upstream["user"]), _quoted(self.upstream.get("password") or "")
        files["auth_file"].write_text(f"{user} {password}\n")
        lines = [f"{name} = {value}" for name, value in (self.settings | files).items()]
        databases = f"[databases]\n* = host={self.upstream['host']} port={self.upstream['port']}\n"
        ini = self.directory / "pgbouncer.ini"
        ini.write_text(databases + "[pgbouncer]\n" + "\n".join(lines) + "\n")
        for path in (self.directory, ini, files["auth_file"]):
            hand_over(path)


def _quoted(word: object) -> str:
    """Return *word* as it stands in PgBouncer's list of users."""
    return '"' + str(word).replace('"', '""') + '"'
