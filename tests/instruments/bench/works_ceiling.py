"""The ceiling: how fast the server alone runs batchq's own transactions, by pgbench."""

import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import psycopg

from batchq.postgres.statements import claims, endings, session
from batchq.postgres.statements.claims import Position
from batchq.postgres.statements.running import Statement
from batchq.worker import claimer
from tests.instruments.bench import filling, records
from tests.instruments.bench.server import Database, Meter
from tests.instruments.bench.work import Bench, Run, work

CLIENTS, GROUPS = (1, 2), (100, 1000)
LIMIT_SECONDS = 15.0  # batchq's default
TOKEN = uuid.UUID(int=1)

# What stands in the statements where pgbench puts what the last claim has returned.
ANY_ID = 987_654_321
AFTER = Position(987_654_322.5, 987_654_323)
VARIABLES = {
    f"'{{{ANY_ID}}}'": ":ids",
    "'{1}'": ":numbers",
    str(AFTER.run_at): ":after_run_at",
    str(AFTER.id): ":after_id",
}
AT_FIRST = {"after_run_at": "'-Infinity'", "after_id": "0"}


@work
def ceiling(bench: Bench) -> Iterator[Run]:
    """The most that the server can do: batchq's own transactions, claim then complete, by pgbench with 1 and 2 clients.

    Batches come in groups of 100 and of 1,000. Each transaction is one message, with its limits and settings, as a
    worker sends it, and each claim starts after the last one. The claimed rows stay in the server: nobody parses
    them, and there are no workers. Each client processes its share of the groups. All batches must be completed.
    """
    count = bench.sizes.number("ceiling.batches")
    for _ in bench.times("ceiling"):
        for clients in CLIENTS:
            for group in GROUPS:
                yield one_ceiling(bench, count, clients, group)
            yield one_ceiling(bench, count, clients, GROUPS[-1], is_kept=False)


def one_ceiling(bench: Bench, wanted: int, clients: int, group: int, is_kept: bool = True) -> Run:
    """Claim and complete about as many batches as are *wanted*, by pgbench."""
    transactions = wanted // (group * clients)
    count = transactions * group * clients
    with bench.database() as database:
        filling.fill(database, count)
        meter = Meter(database).start()
        rate = group * pgbench(database, script(database.conn, group, is_kept), clients, transactions)
        figures = {"per_s": round(rate), **meter.stop().per_batch(count)}
        problems = records.problems_of_rows(database.conn, count if is_kept else 0)
    name = f"{clients} client{'s' if clients > 1 else ''}, groups of {group:,}"
    return Run("ceiling", name if is_kept else f"{name}, completed not kept", figures, problems)


def pgbench(database: Database, text: str, clients: int, transactions: int) -> float:
    """Run a script; return its transactions a second."""
    with tempfile.TemporaryDirectory(prefix="batchq-bench-") as directory:
        file = Path(directory) / "script.sql"
        file.write_text(text)
        counts = [f"--client={clients}", f"--jobs={clients}", f"--transactions={transactions}"]
        defined = [f"--define={name}={value}" for name, value in AT_FIRST.items()]
        command = [database.server.pgbench(), "--no-vacuum", *counts, *defined, f"--file={file}", database.dsn]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode or not found or "ERROR" in done.stderr:
        raise RuntimeError(f"pgbench failed: {done.stdout}{done.stderr}"[-3000:])
    return float(found[1])


# ------------------------------------------------------------------------------------------------- the script


def script(conn: psycopg.Connection, group: int, is_kept: bool) -> str:
    """Return the script: a claim, whose ids and position are kept in variables, and the completion of those."""
    claim = claims.claim("default", 0, ["noop"], group, "pgbench", TOKEN, 60.0, AFTER)
    complete = endings.complete("default", [ANY_ID], [str(TOKEN)], is_kept)
    messages = [
        message(collected(written_out(conn, claim)), claimer.SETTINGS) + "\n\\aset",
        message(written_out(conn, complete), session.FORCE_INDEX_AND_HASH_JOIN) + ";",
    ]
    return "\n".join(messages) + "\n"


def written_out(conn: psycopg.Connection, statement: Statement) -> str:
    """Return a statement with its parameters within its text, and variables where those change."""
    text = psycopg.ClientCursor(conn).mogrify(*statement)
    for constant, variable in VARIABLES.items():
        text = text.replace(constant, variable)
    return text.strip()


def message(statement: str, settings: Mapping[str, str]) -> str:
    """Return a transaction that is one message, as Link.run sends it."""
    begin = ["BEGIN", *session.transaction_settings(LIMIT_SECONDS, settings=settings).split("; ")]
    return " \\;\n".join([*begin, statement, "COMMIT"])


GATHERED = """
SELECT quote_literal(array_agg(id)::text) AS ids,
       quote_literal(array_fill(1, ARRAY[count(*)::integer])::text) AS numbers,
       max(run_at_of_claimed) AS after_run_at,
       max(id) AS after_id
FROM taken
"""


def collected(claim: str) -> str:
    """Return a claim that answers with one row: ids and numbers as texts of arrays, and the position of its last batch.

    All batches have the same run_at, so the last one is that with the highest id.
    """
    head, last = split_with(claim)
    returning = f"{last.strip()}, date_part('epoch', b.run_at) AS run_at_of_claimed"
    return f"{head},\ntaken AS (\n{returning}\n){GATHERED.rstrip()}"


def split_with(statement: str) -> tuple[str, str]:
    """Return the WITH list of a statement, and what follows it."""
    depth = 0
    for position, char in enumerate(statement):
        depth += (char == "(") - (char == ")")
        if char == ")" and depth == 0 and not re.match(r"\s*(,|AS\b)", statement[position + 1 :], re.IGNORECASE):
            return statement[: position + 1], statement[position + 1 :]
    raise ValueError(f"the ceiling cannot read this statement: {statement}")
