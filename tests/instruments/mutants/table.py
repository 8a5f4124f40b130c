"""The mutants: each takes out one fence, lock, lease condition or bound, and says what it would break.

Not among them is what would change nothing: that a rescue and what gives a claim back look for `processing` (a pending
row has no token and no lease: batches_claim_is_whole), and that a statement names the queue in its second part, too,
which has its ids from the first (that of EXTEND in its first, too, which has them from its caller).
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
STATEMENTS = {file: file.read_text() for file in sorted((ROOT / "batchq/postgres/statements").glob("*.py"))}
MIGRATE = "batchq/postgres/migrate.py"
ITEMS_SQL, SPREAD_SQL = "migrations/0016_items_that_wait.sql", "migrations/0017_spread.sql"
POSITIONS, KEEPER, RESCUE = (f"batchq/worker/{name}.py" for name in ("positions", "keeper", "rescue"))
TABLES, PARTITIONS, PLACES_OF_READING, VERBS, BULK, VIEWS_SQL, LIMITS_SQL, KEYS_SQL, FLOWS_SQL = (
    f"migrations/{name}.sql"
    for name in (
        "0001_batches", "0002_partitions", "0003_positions", "0005_verbs", "0006_bulk", "0008_views", "0010_limits",
        "0011_keys", "0013_flows",
    )
)  # fmt: skip
CLAIM, LEASES, RETENTION, SCHEMA, LIFE, ITEMS = (
    f"component/test_{name}.py" for name in ("claim", "leases", "retention", "migrations", "batch_process", "items")
)
POSITION, ACTIONS, CREATE, FORGET, PARTS, TRANSACTIONS, TOTALS = (
    f"component/test_{name}.py"
    for name in ("positions", "verbs", "batch_create", "keep_completed", "worker_parts", "transactions", "items_total")
)
ENDING = "component/test_ending.py"
FLAT = "component/test_flat.py"
LOOKS, FINISHER, VIEWS = (f"component/test_{name}.py" for name in ("looks", "finisher", "views"))
BULK_ACTIONS = "component/test_bulk_verbs.py"
PERMITS_TEST, KEYS_TEST, THROTTLED_TEST, FLOWS_TEST = (
    f"component/test_{name}.py" for name in ("permits", "keys", "throttled", "flows")
)
PERMITS, KEY_RING, BUCKET, ITEMS_FILE = (
    f"batchq/worker/{n}.py" for n in ("permits", "key_ring", "token_bucket", "items")
)
SPREAD_TEST = "component/test_spread.py"
PROTOCOL_TEST, ORM_TEST, HOOKS_TEST = (f"component/test_{name}.py" for name in ("protocol", "orm", "hooks"))
PROTOCOL_SQL = "migrations/0018_protocol.sql"
FAILURES_SQL = "migrations/0019_failures_and_waits.sql"
SCHEDULES_TEST, DECLARED_SCHEDULES = (f"component/test_{name}.py" for name in ("schedules", "declared_schedules"))
SCHEDULES, SCHEDULES_SQL = "batchq/worker/schedules.py", "migrations/0014_schedules.sql"
CONNECTIONS = "foundation/test_db_connection.py"
POOL, SESSIONS, STUCK, ODD, ENCODINGS, LOG_INS = (
    f"component/test_{name}.py" for name in ("pool", "sessions", "stuck_rows", "odd_settings", "encodings", "log_ins")
)
TERMINAL, SECRETS, ARGUMENTS, IMPORTS, FUNCTIONS, PRODUCER, SEARCH_PATHS, NOTIFY, PAGE, HELD, ENV_FILE = (
    f"integration/attacks/test_{name}.py"
    for name in (
        "terminal", "stored_secrets", "argument_list", "imports", "functions", "producer", "search_path", "notify",
        "page", "page_connections", "env_file",
    )
)  # fmt: skip
CONNECTING, TRANSACTING, HANDLERS, FAIR_QUEUE = (
    f"batchq/postgres/{name}.py" for name in ("connections", "transactions", "handler_connections", "fair_queue")
)
SECTION_END = re.compile(r'^"""(?=$|  # )|\n\n\n|^(END )?\$\$;', re.MULTILINE)


class StaleError(Exception):
    """A mutant's text no longer stands where the table says, once."""


@dataclass(frozen=True)
class Mutant:
    """*old* becomes *new* in the section of *file* that begins with *section*; *tests*: files that ought to see it."""

    section: str
    old: str
    new: str
    promise: str
    tests: tuple[str, ...]
    file: str

    @property
    def name(self) -> str:
        """What it is called: the statement or function, and what goes and comes there."""
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.place}: {old}" + (f" → {new}" if new not in ("", "true", "AND true") else "")

    @property
    def place(self) -> str:
        """The name of the statement, function or table that it changes."""
        return str(KEYWORDS.sub("", self.section.strip()).partition(":")[0].partition("(")[0]).strip()

    def apply(self, root: Path) -> None:
        """Change the file below *root*. Raises StaleError."""
        path = root / self.file
        path.write_text(self.mutated(path.read_text()))

    def mutated(self, text: str) -> str:
        """Return the file's text with the change. Raises StaleError."""
        if text.count(self.section) != 1:
            raise StaleError(f"{self.file} has {self.section!r} {text.count(self.section)} times, not once")
        start = text.index(self.section)
        end = SECTION_END.search(text, start)
        section = text[start : end.start() if end else len(text)]
        if section.count(self.old) != 1:
            raise StaleError(
                f"{self.file}, {self.section!r}: has {self.old!r} {section.count(self.old)} times, not once"
            )
        return text[:start] + section.replace(self.old, self.new) + text[start + len(section) :]


KEYWORDS = re.compile(r"^(CREATE|OR|REPLACE|UNIQUE|FUNCTION|INDEX|TABLE|def|\s)+\b")


def with_statement(section: str) -> str:
    """Return the module of statements that has a section, once. Raises StaleError."""
    found = [file for file, text in STATEMENTS.items() if section in text]
    if len(found) != 1:
        raise StaleError(f"{len(found)} modules of statements have {section!r}, not one")
    return str(found[0].relative_to(ROOT))


def of(
    section: str, tests: str | tuple[str, ...], changes: list[tuple[str, str, str]], file: str | None = None
) -> list[Mutant]:
    """Return the mutants of one section: what goes, what comes in its place, and what that breaks.

    Without a *file*: of the module of statements that has the section.
    """
    files = (tests,) if isinstance(tests, str) else tests
    return [Mutant(section, old, new, promise, files, file or with_statement(section)) for old, new, promise in changes]


MUTANTS = [
    # ----------------------------------------------------------------------------- sealed, shards, the second layout
    *of(
        "def _about(",
        "component/test_sealed.py",
        [('return f"{field}\\n{kind}".encode()', 'return b""', "a sealed value opens in its kind and field alone")],
        "batchq/common/sealed.py",
    ),
    *of(
        "def opened_items(",
        "component/test_sealed.py",
        [("if envelope is None:", "if False:", "an item in the clear among sealed ones fails the batch")],
        "batchq/common/sealed.py",
    ),
    *of(
        "CREATE FUNCTION batchq.choose_shard(",
        "component/test_shards.py",
        [
            (
                "coalesce(pinned, batchq.shard_name(whole, batchq.shard_number(NEW.key, shards)))",
                "batchq.shard_name(whole, batchq.shard_number(NEW.key, shards))",
                "a key with live batches stays on its shard",
            ),
            (
                "IF seen IS DISTINCT FROM TG_ARGV[2]::integer THEN",
                "IF false THEN",
                "a transaction from before the split puts no key elsewhere",
            ),
        ],
        "migrations/0022_shards.sql",
    ),
    *of(
        "FUNCTION batchq.collect_ends(",
        "component/test_distribute.py",
        [
            (
                "  INSERT INTO batchq.flow_events (needed_id, status) VALUES (found.id, found.status);\n",
                "",
                "what waits begins, also without a trigger",
            )
        ],
        "batchq/operate/distribute.sql",
    ),
    *of(
        "-- name: keep_what_is_needed",
        "component/test_distribute.py",
        [
            (
                "b.is_needed AND b.claim_token",
                "false AND b.claim_token",
                "what is needed is kept until its end is noted",
            )
        ],
        "batchq/operate/distribute.sql",
    ),
    # ---------------------------------------------------------------------------------------------------- protocol
    *of(
        "CREATE FUNCTION batchq.lock_claim(",
        PROTOCOL_TEST,
        [
            (
                "AND b.id = batch_id AND b.claim_token = token\n  FOR",
                "AND b.id = batch_id\n  FOR",
                "a lost claim writes nothing",
            ),
        ],
        PROTOCOL_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.claim(",
        PROTOCOL_TEST,
        [
            ("AND (p.until IS NULL OR p.until > at)", "AND false", "what is paused is not claimed"),
            (
                "(f.max_running < 2147483647 OR f.per_second",
                "(false AND f.per_second",
                "kinds with a limit are left out",
            ),
            ("AND t.key = '' AND t.until > at", "AND false", "what is throttled is not claimed"),
            (
                "b.key IS NULL AND b.priority = level",
                "b.priority = level",
                "keys are left to those who keep their order",
            ),
            ("AND NOT EXISTS (SELECT 1 FROM batchq.parts p WHERE p.batch_id = b.id)", "", "a spread batch is left out"),
            ("FOR UPDATE OF b SKIP LOCKED", "", "two workers claim a batch once"),
        ],
        PROTOCOL_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.complete(",
        (PROTOCOL_TEST, ORM_TEST),
        [
            ("b.items_failed > b.max_failed_items OR", "", "too many failed items fail the batch"),
            ("IF keep OR b.part_of IS NOT NULL THEN", "IF true THEN", "completed batches can be deleted"),
        ],
        PROTOCOL_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.fail(",
        PROTOCOL_TEST,
        [("OR b.attempt >= b.max_attempts", "", "the last attempt is the last")],
        PROTOCOL_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.checkpoint(",
        PROTOCOL_TEST,
        [("OR ended > coalesce(b.items_total, 0)", "", "no more items are counted than there are")],
        PROTOCOL_SQL,
    ),
    *of(
        "def settle(",
        ORM_TEST,
        [("if not was_committed(batch):", "if False:", "a transaction that was rolled back fails the attempt")],
        "batchq/batch/callers.py",
    ),
    *of(
        "def _note(",
        ORM_TEST,
        [
            ("if not held:", "if False:", "a lost claim is told before the caller commits"),
            ("if held is None:", "if False:", "rows and state commit together"),
        ],
        "batchq/batch/callers.py",
    ),
    *of(
        "def _swallowed(",
        HOOKS_TEST,
        [("return raised or ", "return ", "a hook cannot swallow an error")],
        "batchq/worker/hooks.py",
    ),
    # ------------------------------------------------------------------------------------------------------ spread
    *of(
        "CREATE FUNCTION batchq.spread_batch(",
        SPREAD_TEST,
        [
            ("AND l.claim_token = token FOR UPDATE", "FOR UPDATE", "a claim that is lost spreads nothing"),
            ("f.max_running_per_key = 1", "false", "the order of a key is kept"),
            (
                "AND p.part_id IS NOT NULL AND p.items_done + p.items_failed < p.items ORDER",
                "AND false ORDER",
                "a part that failed fails the whole",
            ),
            ("least(most, b.items_total - first)", "most", "no part is empty"),
            ("SET items = p.items_done + p.items_failed", "SET items = p.items", "a retry works what is left"),
            ("b.key, b.id, true", "b.key, b.id, NULL", "the end of a part is noticed"),
            ("b.trace_context, b.key, b.id", "b.trace_context, NULL, b.id", "a part has the key of the whole"),
            ("ends[s.number] - firsts[s.number],", "0,", "a part tolerates its failed items: the whole decides"),
            ("greatest(l.attempt - 1, 0)", "l.attempt", "making parts is no attempt"),
            ("b.priority, clock_timestamp()", "b.priority, b.run_at", "parts are claimed at once"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.gather(",
        SPREAD_TEST,
        [
            ("p.first_item + g.item_index", "g.item_index", "a failed item has its index in the whole list"),
            ("g.attempt, false,", "g.attempt, true,", "parts have used all attempts"),
            ("UPDATE batchq.parts p SET is_gathered = true", "UPDATE batchq.parts p SET at = at", "all parts end once"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.count_parts(",
        SPREAD_TEST,
        [
            (
                "CASE WHEN sums.is_whole THEN sums.failed ELSE 0 END",
                "0",
                "failed items of parts are those of the whole",
            ),
            ("SET items_done = 0, items_failed = 0", "SET at = at", "no item counts twice"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.gather_parts(",
        SPREAD_TEST,
        [
            ("IF open > 0 THEN", "IF false THEN", "the whole goes on when its last part has ended"),
            ("IF reason IS NOT NULL THEN", "IF false THEN", "an item that cancels its batch cancels the whole"),
            ("FOR UPDATE SKIP LOCKED", "", "two workers gather one after the other"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.cancel_live(",
        SPREAD_TEST,
        [
            ("c <> ALL (wholes)", "true", "no part is left behind"),
            ("'{pending,processing}', reason)", "'{pending}', reason)", "a cancel stops all parts"),
            ("PERFORM batchq.gather(", "PERFORM (", "a cancel keeps the failed items of parts"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.revive(",
        SPREAD_TEST,
        [
            (
                "UPDATE batchq.parts p SET part_id = NULL",
                "UPDATE batchq.parts p SET at = at",
                "a retry makes new parts",
            ),
            (
                "DELETE FROM batchq.parts p WHERE p.batch_id",
                "DELETE FROM batchq.parts p WHERE false AND p.batch_id",
                "a retry of the whole begins with the first item",
            ),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.lock_batch(",
        SPREAD_TEST,
        [("IF whole IS NOT NULL THEN", "IF false THEN", "a part alone cannot be changed")],
        SPREAD_SQL,
    ),
    *of(
        "def parts_wanted(",
        SPREAD_TEST,
        [
            ("claimed.row.spread or handler.spread", "claimed.row.spread or 1", "the handler's default counts"),
            ("claimed.row.part_of is not None or ", "", "a part is not spread again"),
        ],
        "batchq/worker/spread.py",
    ),
    *of(
        "    def _way(",
        SPREAD_TEST,
        [("if entry.batch.row.part_of is not None else", "if False else", "a part is kept until it is gathered")],
        "batchq/worker/finisher.py",
    ),
    # --------------------------------------------------------------------------------------------------- schedules
    *of(
        "CREATE FUNCTION batchq.fire_schedules(",
        SCHEDULES_TEST,
        [
            ("s.next_at IS NOT DISTINCT FROM plan.due_at", "true", "a tick makes one batch"),
            ("FOR UPDATE SKIP LOCKED", "", "two workers make one batch of a tick"),
            ("AND NOT s.paused", "", "a paused schedule makes no batch"),
            ("(s.next_at IS NULL OR s.next_at <= clock_timestamp())", "true", "no tick is early"),
            (
                "+ CASE WHEN refusal IS NULL THEN 0 ELSE wanted END",
                "",
                "a tick whose batch is refused counts as missed",
            ),
        ],
        SCHEDULES_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.fire_schedules(",
        DECLARED_SCHEDULES,
        [("NOT s.is_declared OR EXISTS", "true OR EXISTS", "what nobody declares makes no batch")],
        SCHEDULES_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.check_schedule(",
        DECLARED_SCHEDULES,
        [
            (
                "NEW.is_declared AND NEW.declared_at IS DISTINCT FROM OLD.declared_at",
                "NEW.is_declared",
                "what a person writes holds instead of the code",
            )
        ],
        SCHEDULES_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.check_schedule(",
        SCHEDULES_TEST,
        [("NEW.next_at := NULL;", "", "after a change the next time is computed anew")],
        SCHEDULES_SQL,
    ),
    *of(
        "def plan(",
        SCHEDULES_TEST,
        [
            ("if next_at <= until:", "if False:", "ticks that one plan cannot hold are accounted for by the next"),
            (
                'if schedule.missed == "skip" and now - fired[-1].timestamp() > MISSED_SECONDS:',
                "if False:",
                "with skip, a tick of hours ago makes no batch",
            ),
        ],
        SCHEDULES,
    ),
    # ---------------------------------------------------------------------------------------------------------- flows
    *of(
        "CREATE TRIGGER note_end",
        FLOWS_TEST,
        [("WHEN (OLD.is_needed) ", "WHEN (false) ", "the end of a needed batch is noticed")],
        FLOWS_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.note_end(",
        FLOWS_TEST,
        [
            ("IF FOUND THEN RETURN NULL; END IF;", "", "a batch that moves has not ended"),
            ("IF ended_as IS NULL THEN", "IF true THEN", "a batch that failed has not completed"),
            ("THEN 'completed' ELSE", "THEN 'cancelled' ELSE", "a batch that is not kept counts"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.begin_waiting(",
        FLOWS_TEST,
        [
            ("IF unknown <> '{}' AND NEW.created_at = now() THEN", "IF false THEN", "an unknown id is refused"),
            ("ELSIF NEW.id = ANY (NEW.after) THEN", "ELSIF false THEN", "no batch waits for itself"),
            ("AND b.xmin = pg_current_xact_id()::xid", "", "an enqueue locks no batch that others see"),
            (
                "SELECT DISTINCT u FROM unnest(NEW.after)",
                "SELECT u FROM unnest(NEW.after)",
                "an id that is given twice counts once",
            ),
        ],
        FLOWS_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.mark_needed(",
        FLOWS_TEST,
        [
            (
                "SET is_needed = true",
                "SET is_needed = b.is_needed",
                "a batch is marked when others begin to wait for it",
            ),
            ("ended := ended || found.id;", "", "a batch that has ended by then counts"),
        ],
        FLOWS_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.follow_flows(",
        FLOWS_TEST,
        [
            ("WHERE e.id > after_id ORDER", "ORDER", "what was dealt with is not read again"),
            (
                "AND b.claimed_at IS NULL\n                  FOR UPDATE SKIP LOCKED",
                "AND b.claimed_at IS NULL\n                  FOR UPDATE",
                "a locked batch delays only itself",
            ),
            ("WHERE u.needed_id <> ALL (kept)", "", "what could not be counted is counted later"),
            ("IF cardinality(waiting) = most_needs THEN", "IF false THEN", "all that wait for one batch are counted"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.count_needs(",
        FLOWS_TEST,
        [
            ("ELSE n.ended_as IS NULL END", "ELSE true END", "an end counts once, whatever comes twice"),
            (
                "WHEN 'wait' THEN e.status = 'completed' AND",
                "WHEN 'wait' THEN",
                "what waits for a failed batch waits on",
            ),
            ("PERFORM batchq.cancel_live(", "PERFORM (", "with cancel, a failure goes down the line"),
            ("greatest(b.run_at, earliest_at)", "b.run_at", "what is released is claimed at once"),
        ],
        FLOWS_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.revive(",
        FLOWS_TEST,
        [
            (
                "b.id = ANY (ARRAY(SELECT n.needed_id",
                "b.id = ANY ('{}') AND b.id = ANY (ARRAY(SELECT n.needed_id",
                "a retried batch is still needed",
            ),
            (
                "CASE WHEN c.after IS NULL OR (c.needs_left > 0 AND c.claimed_at IS NULL) THEN NULL ELSE 0 END",
                "0",
                "a batch cancelled while it waited waits again",
            ),
        ],
        SPREAD_SQL,
    ),
    *of(
        "def _follow_flows(",
        "component/test_worker_parts.py",
        [("except Exception as error:", "except KeyError as error:", "flows that cannot be followed end no thread")],
        "batchq/worker/finisher.py",
    ),
    *of(
        "def wait_seconds(",
        SCHEDULES_TEST,
        [
            (
                'max(self._schedules.wait_seconds(), self.duties["schedules"].wait_seconds())',
                "self._schedules.wait_seconds()",
                "a duty that fails does not spin",
            )
        ],
        "batchq/worker/housekeeper.py",
    ),
    *of(
        "def mark_running(",
        "component/test_lanes.py",
        [
            (
                "now - batch.leased_at < batch.claim.runtime.lease_seconds",
                "True",
                "what waited until its lease expired does not begin",
            )
        ],
        "batchq/worker/lanes.py",
    ),
    *of(
        "CREATE FUNCTION batchq.ready_of_keys(",
        KEYS_TEST,
        [(" - interval '1 hour'", "", "a claim that committed behind the position of leases counts")],
        KEYS_SQL,
    ),
    *of(
        "def _is_strict(",
        KEYS_TEST,
        [
            (
                "per_key(source.whole.queue, kind) == 1",
                "per_key(source.whole.queue, kind) == -1",
                "an urgent batch comes next in its key",
            )
        ],
        "batchq/worker/keyed_claims.py",
    ),
    # ---------------------------------------------------------------------------------------------- limits and keys
    *of(
        "CREATE FUNCTION batchq.take_shares(",
        PERMITS_TEST,
        [
            ("interval '5 seconds'", "interval '1 hour'", "a dead worker's rate comes back"),
            (
                "AND s.refreshed_at < now() - (s.lease_seconds + 2) * interval '1 second';",
                "AND s.refreshed_at < now() - (s.lease_seconds + 99) * interval '1 second';",
                "a dead worker's share comes back",
            ),
            (
                "greatest(running, report.running)",
                "running",
                "a share that shrinks counts at its old size until it is confirmed",
            ),
            ("coalesce(sum(s.running), 0) AS running", "0 AS running", "what others hold is not given twice"),
        ],
        LIMITS_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.grant_part(",
        PERMITS_TEST,
        [
            ("greatest(0, total - held_by_others)", "total", "no more than the limit is given"),
            (
                "greatest(batchq.fair_part(total, wanted, wanted_by_others), least(least_part, total))",
                "total",
                "who comes later gets a part",
            ),
            (
                "total / greatest(1, floor(total / least_part)) END;",
                "least_part END;",
                "nothing is left that is too small for one more",
            ),
        ],
        LIMITS_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.ready_of_keys(",
        KEYS_TEST,
        [
            (
                "CONTINUE WHEN is_limited AND NOT batchq.lock_key(in_queue, head.key);",
                "",
                "two claims of one key exclude each other",
            ),
        ],
        KEYS_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.ready_of_key(",
        KEYS_TEST,
        [
            ("room := least(room, per_queue - running);", "room := least(room, per_queue);", "a limit of all kinds"),
            ("free[number] := free[number] - one.running;", "NULL;", "what runs of a key counts"),
            ("IF per_queue = 1 THEN RETURN; END IF;", "", "what has begun keeps its key"),
            ("ORDER BY b.priority, b.run_at, b.id\n    LIMIT room", "ORDER BY b.id\n    LIMIT room", "order in a key"),
            ("AND b.run_at <= now()\n", "", "what is scheduled does not run before its time"),
        ],
        KEYS_SQL,
    ),
    *of(
        "    def reserve(self, wanted: int)",
        PERMITS_TEST,
        [("self.held += granted", "pass", "what runs counts")],
        PERMITS,
    ),
    *of(
        "    def _room_to_run(self)",
        PERMITS_TEST,
        [
            ("if is_fresh else 0", "", "a claim needs a fresh share"),
            ("self.may_run - self._all_held()", "self.may_run - self.held", "what was claimed before the limit counts"),
        ],
        PERMITS,
    ),
    *of(
        "    def _fill(self)",
        PERMITS_TEST,
        [(", self.capacity)", ", 1e9)", "no more than a burst begins at once")],
        BUCKET,
    ),
    *of(
        "    def _record(self, position",
        (THROTTLED_TEST, ITEMS),
        [("elif isinstance(error, Throttled):", "elif False:", "a throttled item makes its kind wait")],
        ITEMS_FILE,
    ),
    # ------------------------------------------------------------------------------------------------------ claim
    *of(
        "CLAIM: LiteralString",
        (CLAIM, POSITION, LEASES),
        [
            ("WHERE queue = %(queue)s", "WHERE true", "a worker serves its own queues only"),
            ("AND status = 'pending'", "AND true", "what somebody works is not claimed"),
            ("AND priority = %(priority)s", "AND true", "a claim is of one priority"),
            (
                "AND (run_at, id) > (to_timestamp(%(after_run_at)s), %(after_id)s::bigint)",
                "AND true",
                "a claim starts behind the dead",
            ),
            (
                "AND (run_at, id) <= (to_timestamp(%(until_run_at)s), %(until_id)s::bigint)",
                "AND true",
                "a sweep of a part keeps to it",
            ),
            ("AND run_at <= now()", "AND true", "nothing runs before its time"),
            ("AND kind = ANY (%(kinds)s)", "AND true", "a worker claims only kinds that it knows"),
            ("ORDER BY run_at, id", "ORDER BY run_at DESC, id DESC", "the oldest first"),
            ("LIMIT %(limit)s", "", "no more than there is room for"),
            ("FOR UPDATE SKIP LOCKED", "FOR UPDATE", "claims do not wait for each other"),
            ("  FOR UPDATE SKIP LOCKED\n", "", "no two claims take one batch"),
            ("attempt = b.attempt + 1", "attempt = b.attempt", "the attempt is counted at the claim"),
            ("now() + %(lease_seconds)s::float8 * interval '1 second'", "'infinity'", "a lease runs out"),
            ("now() + %(lease_seconds)s::float8 * interval '1 second'", "now()", "a lease lasts"),
        ],
    ),
    *of(
        "CLAIM_SKIPPING: LiteralString",
        STUCK,
        [("AND id <> ALL (%(skipped)s)", "", "rows that are refused keep no other from being claimed")],
    ),
    *of(
        "READY_POSITIONS: LiteralString",
        STUCK,
        [("AND id <> ALL (%(skipped)s::bigint[])", "", "rows that are refused keep no other from being claimed")],
    ),
    *of(
        "def release_claim(",
        (LOOKS, CLAIM, PARTS),
        [
            ("WHERE queue = %(queue)s", "WHERE true", "a write names its queue"),
            ("AND claim_token = %(token)s", "AND true", "only what the lost claim took is given back"),
            ("attempt = greatest(attempt - 1, 0)", "attempt = attempt", "a claim that never ran costs no attempt"),
        ],
    ),
    *of(
        "READY: LiteralString",
        (LOOKS, CLAIM, POSITION),
        [
            ("b.queue = %(queue)s", "true", "looks are of one queue"),
            ("AND b.status = 'pending'", "", "what is claimed is not ready"),
            ("AND b.priority = known.priority", "", "looks tell priorities apart"),
            ("AND (b.run_at, b.id) > (to_timestamp(known.run_at), known.id)", "", "looks start behind the dead"),
            ("AND b.run_at <= now()", "", "what is scheduled is not ready"),
            ("AND b.kind = ANY (%(kinds)s)", "", "what no handler knows is not ready"),
        ],
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.has_ready",
        (LOOKS, CLAIM, POSITION),
        [
            ("b.queue = in_queue", "true", "looks are of one queue"),
            ("AND b.status = 'pending'", "", "what is claimed is not ready"),
            ("AND b.priority = in_priority", "", "looks tell priorities apart"),
            ("AND (b.run_at, b.id) > (to_timestamp(after_run_at), after_id)", "", "looks start behind the dead"),
            ("AND b.run_at <= now()", "", "what is scheduled is not ready"),
            ("AND b.kind = ANY (kinds)", "", "what no handler knows is not ready"),
        ],
        KEYS_SQL,
    ),
    *of(
        "READY_BETWEEN: LiteralString",
        (LOOKS, CLAIM, POSITION),
        [
            (
                "AND (run_at, id) > (to_timestamp(%(after_run_at)s), %(after_id)s::bigint)",
                "",
                "a sweep of a part keeps to it",
            ),
            (
                "AND (run_at, id) <= (to_timestamp(%(until_run_at)s), %(until_id)s::bigint)",
                "",
                "a sweep of a part keeps to it",
            ),
            ("AND run_at <= now()", "", "what is scheduled is not ready"),
            ("AND kind = ANY (%(kinds)s)", "", "what no handler knows is not ready"),
        ],
    ),
    *of(
        "UNKNOWN_PRIORITY: LiteralString",
        (LOOKS, CLAIM),
        [
            ("AND b.status = 'pending'", "", "only what waits has a priority to learn"),
            ("AND b.priority > gap.above", "", "known priorities are known"),
            ("AND b.priority < gap.below", "", "known priorities are known"),
        ],
    ),
    *of(
        "CREATE UNIQUE INDEX batches_live_id",
        FLAT,
        [("batchq.batches_live (id)", "batchq.batches_live (id, queue)", "no index by id can serve a look at a queue")],
        TABLES,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.newest_live(",
        FLAT,
        [
            ("AND (b.run_at, b.id) >= (w.at, w.id)", "", "views begin after the dead"),
            ("AND b.lease_expires_at >= q.at", "", "views begin after the dead leases"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.count_live(",
        (FLAT, VIEWS),
        [
            (
                "AND b.lease_expires_at >= q.at\n      ORDER BY b.lease_expires_at LIMIT share.of_busy",
                "ORDER BY b.lease_expires_at LIMIT share.of_busy",
                "counts begin after the dead leases",
            ),
            (
                "AND b.lease_expires_at >= q.at\n          ORDER BY b.lease_expires_at LIMIT most",
                "ORDER BY b.lease_expires_at LIMIT most",
                "counts begin after the dead leases",
            ),
            (
                "CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM waiting), 1) END",
                "most / greatest((SELECT count(*) FROM waiting), 1)",
                "counts are exact up to the bound",
            ),
            (
                "CASE WHEN counts_all THEN most ELSE most / greatest((SELECT count(*) FROM busy), 1) END",
                "most / greatest((SELECT count(*) FROM busy), 1)",
                "counts are exact up to the bound",
            ),
        ],
        KEYS_SQL,
    ),
    # ------------------------------------------------------------------------------------------- input, checkpoint
    *of("def large_input(", (CLAIM, LEASES), [("AND claim_token = %(token)s", "", "input is for who has the batch")]),
    *of("def items_page(", (CLAIM, ITEMS), [("AND claim_token = %(token)s", "", "input is for who has the batch")]),
    *of(
        "def failed_page(",
        (LEASES, ITEMS),
        [
            ("AND retryable", "", "what cannot be cured is not run again"),
            ("AND attempt < %(attempt)s", "", "an item runs once an attempt"),
            ("AND b.claim_token = %(token)s", "", "fence: a late worker calls no failed item again"),
        ],
    ),
    *of(
        "PLAIN_CHECKPOINT: LiteralString",
        (LEASES, ITEMS, TRANSACTIONS),
        [
            ("WHERE queue = %(queue)s", "WHERE true", "a write names its queue"),
            ("AND id = %(id)s", "", "a checkpoint is of one batch"),
            ("AND claim_token = %(token)s", "", "fence: a late worker changes nothing"),
            ("AND items_done = %(done_before)s", "", "a checkpoint written twice counts once"),
            ("AND items_failed = %(failed_before)s", "", "a checkpoint written twice counts once"),
            (
                "greatest(lease_expires_at,\n      pg_catalog.statement_timestamp()"
                " + %(lease_seconds)s::float8 * interval '1 second')",
                "pg_catalog.statement_timestamp() + %(lease_seconds)s::float8 * interval '1 second'",
                "a checkpoint never shortens a lease",
            ),
            (
                "pg_catalog.statement_timestamp() + %(lease_seconds)s::float8 * interval '1 second'",
                "now() + %(lease_seconds)s::float8 * interval '1 second'",
                "a lease counts from now, not from the BEGIN",
            ),
        ],
    ),
    *of(
        "\nCHECKPOINT: LiteralString",
        (LEASES, ITEMS),
        [
            ("WHERE queue = %(queue)s", "WHERE true", "a write names its queue"),
            ("AND claim_token = %(token)s", "", "fence: a late worker changes nothing"),
            ("AND items_done = %(done_before)s", "", "a checkpoint written twice counts once"),
            ("AND items_failed = %(failed_before)s", "", "a checkpoint written twice counts once"),
            (
                "pg_catalog.statement_timestamp() + %(lease_seconds)s::float8 * interval '1 second'",
                "now() + %(lease_seconds)s::float8 * interval '1 second'",
                "a lease counts from now, not from the BEGIN",
            ),
            ("AND f.item_index = ANY (%(recovered)s::integer[])", "", "only what is cured loses its error"),
            (
                "WHERE f.queue = %(queue)s\n    AND f.batch_id = mine.id\n    AND f.item_index = ANY",
                "WHERE f.item_index = ANY",
                "other batches' failed items stay",
            ),
            ("AND f.item_index = failure.item_index", "", "each item has its own error"),
        ],
    ),
    # ------------------------------------------------------------------------------------------------------ finish
    *of(
        "FINISH: LiteralString",
        (LEASES, CLAIM),
        [
            ("b.queue = %(queue)s", "true", "a write names its queue"),
            ("AND b.id = ANY (%(ids)s::bigint[])", "", "finishes go by the id index"),
            ("AND b.id = u.id", "", "each batch has its own outcome"),
            ("AND b.claim_token = u.token", "", "fence: a late worker changes nothing"),
        ],
    ),
    *of(
        "COMPLETE: LiteralString",
        (LEASES, FINISHER, CLAIM),
        [
            ("b.queue = %(queue)s", "true", "a write names its queue"),
            (
                "AND b.id = ANY ((SELECT pg_catalog.array_agg(id) FROM given)::bigint[])",
                "",
                "finishes go by the id index",
            ),
            ("AND b.id = given.id", "", "only batches that are named are completed"),
            ("AND b.claim_token = (%(tokens)s::uuid[])[given.number]", "", "fence: a late worker changes nothing"),
        ],
    ),
    *of(
        "COMPLETE_AND_FORGET: LiteralString",
        (LEASES, FORGET),
        [
            ("b.queue = %(queue)s", "true", "a write names its queue"),
            ("AND b.claim_token = (%(tokens)s::uuid[])[given.number]", "", "fence: a late worker deletes nothing"),
        ],
    ),
    *of(
        "CREATE FUNCTION batchq.forget_failed_items(in_queue",
        (LEASES, FORGET),
        [("AND f.batch_id = of_batch", "", "other batches' failed items stay")],
        TABLES,
    ),
    *of(
        "REQUEUE: LiteralString",
        (LEASES, LIFE),
        [
            ("b.queue = %(queue)s", "true", "a write names its queue"),
            ("AND b.id = u.id", "", "each batch has its own outcome"),
            ("AND b.claim_token = u.token", "", "fence: a late worker changes nothing"),
            ("b.attempt - u.is_release::integer", "b.attempt", "a graceful stop costs no attempt"),
            ("claim_token = NULL", "claim_token = b.claim_token", "what is given back is nobody's"),
        ],
    ),
    *of(
        "LOCKED: LiteralString",
        STUCK,
        [
            ("FOR UPDATE SKIP LOCKED", "FOR UPDATE", "who looks for locked rows waits for none"),
            ("  FOR UPDATE SKIP LOCKED\n", "", "a locked row costs one wait"),
            ("AND id <> ALL (ARRAY(SELECT id FROM free))", "", "a locked row holds up no other"),
        ],
    ),
    *of(
        "SETTINGS = session.FORCE_INDEX_AND_HASH_JOIN",
        STUCK,
        [(' | {"lock_timeout": str(LOCK_MILLISECONDS)}', "", "a finish waits briefly for a locked row")],
        "batchq/worker/finisher.py",
    ),
    # ------------------------------------------------------------------------------------------------------ leases
    *of(
        "EXTEND: LiteralString",
        LEASES,
        [
            (
                "ON b.id = given.id AND b.claim_token = given.token",
                "ON b.id = given.id",
                "fence: a late worker keeps no lease",
            ),
            ("FOR UPDATE OF b SKIP LOCKED", "FOR UPDATE OF b", "extensions do not wait, so do not deadlock"),
            ("  FOR UPDATE OF b SKIP LOCKED\n", "", "extensions do not wait, so do not deadlock"),
            (
                "SET lease_expires_at = now() + %(lease_seconds)s::float8 * interval '1 second'",
                "SET lease_expires_at = b.lease_expires_at",
                "a lease is extended",
            ),
            ("    AND b.claim_token = given.token\n  LIMIT 1", "  LIMIT 1", "whoever lost a batch is told"),
            ("OR held.is_ours IS NULL", "", "whoever lost a batch is told"),
        ],
    ),
    *of(
        "RESCUE: LiteralString",
        (LEASES, POSITION),
        [
            ("SELECT id, attempt < max_attempts AS again", "SELECT id, true AS again", "a poison batch stops"),
            ("SELECT id, attempt < max_attempts AS again", "SELECT id, false AS again", "a rescued batch runs again"),
            ("WHERE queue = %(queue)s", "WHERE true", "a rescue is of one queue"),
            ("AND lease_expires_at < now()", "", "rescue is by lease only"),
            ("AND lease_expires_at < now()", "AND claimed_at < now()", "rescue is by lease, not by start"),
            ("AND lease_expires_at > to_timestamp(%(after)s)", "", "a rescue does not walk over the dead"),
            ("ORDER BY lease_expires_at", "ORDER BY lease_expires_at DESC", "the longest silent first"),
            ("LIMIT %(limit)s", "", "a rescue is bounded"),
            ("FOR UPDATE SKIP LOCKED", "FOR UPDATE", "a rescue passes over locked rows"),
            ("  FOR UPDATE SKIP LOCKED\n", "", "a rescue passes over locked rows"),
            ("CASE WHEN attempt < 2 THEN run_at", "CASE WHEN true THEN run_at", "a killer has other neighbours"),
            (
                "CASE WHEN attempt < 2 THEN run_at",
                "CASE WHEN false THEN run_at",
                "a first rescue is ready at once",
            ),
            ("claim_token = NULL", "claim_token = b.claim_token", "what is rescued is nobody's"),
        ],
    ),
    *of(
        "RESCUE: LiteralString",
        STUCK,
        [
            ("AND id <> ALL (%(skipped)s::bigint[])", "", "rows that are refused keep no other from being rescued"),
            (
                "AND (%(only)s::bigint[] IS NULL OR id = ANY (%(only)s::bigint[]))",
                "",
                "rows that are refused keep no other from being rescued",
            ),
        ],
    ),
    *of(
        "EXPIRED: LiteralString",
        STUCK,
        [("AND id <> ALL (%(skipped)s::bigint[])", "", "rows that are refused keep no other from being rescued")],
    ),
    # ------------------------------------------------------------------------------------- bounds, workers, days
    *of(
        "def transaction_settings(",
        (CONNECTIONS, RETENTION),
        [
            ('        "statement_timeout": str(milliseconds),\n', "", "every statement is bounded"),
            ('        "lock_timeout": str(int(min(seconds, lock_seconds) * 1000)),\n', "", "lock waits are bounded"),
            ('        "idle_in_transaction_session_timeout": str(milliseconds),\n', "", "no transaction is left open"),
        ],
    ),
    *of(
        "def transaction_settings(",
        ODD,
        [('        "array_nulls": "on",', "", "a role's settings change no value")],
    ),
    *of(
        "FIXED_FORMATS = {",
        ODD,
        [
            ('    "DateStyle": "ISO",\n', "", "a role's settings change no value"),
            ('    "IntervalStyle": "postgres",\n', "", "a role's settings change no value"),
            ('    "extra_float_digits": "1",\n', "", "a role's settings move no position"),
            ('    "standard_conforming_strings": "on",\n', "", "a role's settings change no statement"),
        ],
    ),
    *of(
        "FORCE_INDEX = FIXED_FORMATS",
        FLAT,
        [
            ('"enable_seqscan": "off", ', "", "a probe goes by its index whatever the statistics say"),
            ('"enable_bitmapscan": "off", ', "", "a probe goes by its index whatever the statistics say"),
        ],
    ),
    *of(
        "CLEAN_SESSION = ",
        SESSIONS,
        [
            (f"{part};", "", "a batch finds the session as it was")
            for part in (
                "CLOSE ALL",
                "RESET SESSION AUTHORIZATION; RESET ROLE",
                "RESET ALL",
                "DEALLOCATE ALL",
                "UNLISTEN *",
                "DISCARD TEMP",
            )
        ]
        + [("SELECT pg_advisory_unlock_all();", "", "a batch finds the session as it was")],
    ),
    *of(
        "    def _clean(self",
        SESSIONS,
        [
            (
                "                conn.execute(session.CLEAN_SESSION)",
                "                pass",
                "a batch finds the session as it was",
            ),
            ("await conn.execute(session.CLEAN_SESSION)", "pass", "a batch finds the session as it was"),
        ],
        HANDLERS,
    ),
    *of(
        "CONNECT_OPTIONS: dict",
        ENCODINGS,
        [('    "client_encoding": "UTF8",\n', "", "texts travel as UTF-8")],
        CONNECTING,
    ),
    *of("def without_overridden(", ENCODINGS, [(' - {"client_encoding"}', "", "texts travel as UTF-8")], CONNECTING),
    *of(
        "def _on_each_batch(",
        LOG_INS,
        [
            (
                "with transaction(conn, seconds, settings=session.FIXED_FORMATS):\n                    status",
                "with connected(options) as conn, transaction(conn, seconds):\n                    status",
                "a verb logs in once",
            )
        ],
        "batchq/cli/verbs.py",
    ),
    *of(
        "BEGIN = ",
        CONNECTIONS,
        [(" ISOLATION LEVEL READ COMMITTED", "", "no serialization failure by the role's default")],
    ),
    *of(
        "class Connection(psycopg",
        SESSIONS,
        [
            (
                "conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED",
                "pass",
                "no serialization failure by the role's default",
            )
        ],
        CONNECTING,
    ),
    *of(
        "class AsyncConnection(psycopg",
        SESSIONS,
        [
            (
                "await conn.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)",
                "pass",
                "no serialization failure by the role's default",
            )
        ],
        CONNECTING,
    ),
    *of(
        "class ReadingCursor(",
        SESSIONS,
        [("{session.BEGIN}", "BEGIN", "no serialization failure by the role's default")],
        TRANSACTING,
    ),
    *of(
        "class ReadingCursor(",
        STUCK,
        [("                conn.rollback()", "                pass", "a read that fails leaves a usable connection")],
        TRANSACTING,
    ),
    *of(
        "class ReadingCursor(",
        CONNECTIONS,
        [("if len(text) > LONGEST_TEXT:", "if False:", "no text is longer than every pooler takes")],
        TRANSACTING,
    ),
    *of(
        "class Conflicts:",
        SESSIONS,
        [("if count > self.MOST:", "if False:", "a conflict that does not pass is charged in the end")],
        "batchq/retry.py",
    ),
    *of(
        "class FairQueue:",
        POOL,
        [
            ("on_turn = self.waiting.popleft()", "on_turn = self.waiting.pop()", "a connection goes to who came first"),
            (
                "if is_waiting := on_turn in self.waiting:",
                "if is_waiting := True:",
                "who leaves the line takes no place along",
            ),
            ("max(self._hold_seconds, time.monotonic() - self.last_released_at)", "0.001", "no more begin than get on"),
        ],
        FAIR_QUEUE,
    ),
    *of(
        "class BorrowTimeout:",
        POOL,
        [
            ("if self._queue.is_busy():", "if False:", "a pool in use is no outage"),
            ("if self._queue.is_busy():", "if True:", "a wait ends where no connection can be made"),
            ("min(self._until, self._last)", "self._until", "the page waits no longer than it may"),
        ],
        FAIR_QUEUE,
    ),
    *of(
        "HEARTBEAT: LiteralString",
        VIEWS,
        [
            ("WHERE id <> %(id)s", "WHERE true", "a worker counts once"),
            ("heartbeat_at > now() - %(silent_seconds)s * interval '1 second'", "true", "the dead have no turn"),
            ("AND queues && %(queues)s::text[]", "", "turns are among who serves the queue"),
            ("AND NOT stopping", "", "who stops has no turn"),
        ],
    ),
    *of(
        "HEARTBEAT_SETTINGS = ",
        VIEWS,
        [(' | {"lock_timeout": "100"}', "", "leases are kept though workers is locked")],
    ),
    *of(
        "def forget_silent_workers(",
        VIEWS,
        [
            (
                "    set_lock_timeout(conn)  # the same thread extends leases\n",
                "",
                "leases are kept though workers is locked",
            ),
            ("WHERE heartbeat_at < now() - interval '1 hour'", "WHERE true", "rows of live workers stay"),
            ("FOR UPDATE SKIP LOCKED", "FOR UPDATE", "no worker waits for another that tidies up"),
        ],
    ),
    *of(
        "LEASE_PROBE: LiteralString",
        (PARTS, LEASES),
        [
            ("WHERE queue = %(queue)s", "WHERE true", "looks are of one queue"),
            ("AND lease_expires_at > start.at", "", "looks start behind the dead"),
            ("AND lease_expires_at < now()", "", "a lease that lasts is not looked for twice"),
        ],
    ),
    *of(
        "def create_finished_partitions(",
        RETENTION,
        [("    set_lock_timeout(conn)\n", "", "maintenance waits 100 ms for a lock at most")],
    ),
    *of(
        "def prune(",
        RETENTION,
        [("    set_lock_timeout(conn)\n", "", "maintenance waits 100 ms for a lock at most")],
    ),
    *of(
        "CREATE FUNCTION batchq.create_finished_partitions",
        (RETENTION, SCHEMA),
        [
            ("IF days BETWEEN 1 AND 400 IS NOT TRUE THEN", "IF false THEN", "a call makes a bounded number of days"),
            (
                "  PERFORM batchq.take_lock('partitions');\n",
                "",
                "workers that make one partition do not collide",
            ),
            ("CONTINUE WHEN to_regclass('batchq.' || name) IS NOT NULL;", "", "a partition that is there will do"),
            (
                "EXCEPTION WHEN check_violation THEN",
                "EXCEPTION WHEN division_by_zero THEN",
                "a day that lies in the default partition stops nothing",
            ),
            (
                "      EXECUTE format('ALTER TABLE batchq.%I REPLICA IDENTITY FULL', name);\n",
                "",
                "no publication stops a retry",
            ),
        ],
        PARTITIONS,
    ),
    *of(
        "CREATE FUNCTION batchq.prune(",
        RETENTION,
        [
            (
                "  PERFORM batchq.take_lock('partitions');\n",
                "",
                "workers that prune at once do not collide",
            ),
            ("    LIMIT most\n", "", "locks of a prune do not grow with history"),
            ("< first_kept_day\n", "<= first_kept_day\n", "only days wholly before are dropped"),
            (
                "FROM batchq.batches b WHERE b.queue = one AND b.id = i.batch_id",
                "FROM batchq.batches b WHERE false",
                "failed items stay with their batch",
            ),
            ("IF older_than < interval '0' THEN", "IF false THEN", "a negative age is refused"),
        ],
        PARTITIONS,
    ),
    *of(
        "CREATE FUNCTION batchq.prune(",
        ODD,
        [("'^finished_[0-9]{8}$'", r"'^finished_\d{8}$'", "a caller's settings hide no day")],
        PARTITIONS,
    ),
    *of(
        "CREATE FUNCTION batchq.create_finished_partitions",
        ODD,
        [("to_char(day, 'YYYY-MM-DD 00:00:00+00')", "day || ' 00:00:00+00'", "a caller's settings move no day")],
        PARTITIONS,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.bulk(",
        ODD,
        [("older_than::numeric)", "older_than)", "a caller's settings change no age")],
        FAILURES_SQL,
    ),
    # ------------------------------------------------------------------------------------------------------- verbs
    *of(
        "CREATE OR REPLACE FUNCTION batchq.retry(",
        ACTIONS,
        [
            (
                "IF b.status IN ('processing', 'waiting') OR b.status IS NULL THEN",
                "IF b.status IS NULL THEN",
                "a batch that runs is left alone",
            ),
            ("run_at = least(l.run_at, began_at)", "run_at = l.run_at", "a retry runs immediately"),
            ("WHERE whole AND f.queue", "WHERE f.queue", "a retry keeps what has failed"),
            (
                "ELSIF b.status = 'completed' AND b.items_failed = 0 AND NOT whole THEN",
                "ELSIF false THEN",
                "what is complete is not run again by mistake",
            ),
            (
                "whole, '-infinity', 'infinity')).changed = 0",
                "whole, '-infinity', 'infinity')).changed < 0",
                "a retry says which key is taken",
            ),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.move(",
        ACTIONS,
        [("IF moved.keyed > 0 THEN", "IF false THEN", "a move says which key is taken")],
        VERBS,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.lock_batch(",
        (ACTIONS, "integration/test_interleavings.py"),
        [
            (
                "batches_live b\n    WHERE b.queue = lock_batch.queue AND b.id = batch_id\n    FOR UPDATE",
                "batches_live b\n    WHERE b.queue = lock_batch.queue AND b.id = batch_id",
                "an action that waited is not lost",
            ),
            (
                "batches_finished b\n    WHERE b.queue = lock_batch.queue AND b.id = batch_id\n    FOR UPDATE",
                "batches_finished b\n    WHERE b.queue = lock_batch.queue AND b.id = batch_id",
                "an action that waited is not lost",
            ),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.revive(",
        BULK_ACTIONS,
        [
            ("AND f.status = from_status", "", "a bulk action keeps to its filter"),
            ("f.queue = in_queue AND f.id = ANY (ids)", "f.queue = in_queue", "a retry takes no other batch"),
            (
                "AND (f.status <> 'completed' OR f.items_failed > 0 OR whole IS DISTINCT FROM false)",
                "",
                "what is complete is not run again by mistake",
            ),
            ("FOR UPDATE SKIP LOCKED", "FOR UPDATE", "bulk actions wait for no row"),
            ("ON CONFLICT DO NOTHING", "", "a key that is taken stops no other batch"),
            ("attempt = 0, retryable = true", "retryable = true", "a retry runs the failed items"),
            (
                "retryable = true, run_at = NULL WHERE f.queue = in_queue AND f.batch_id = ANY (done);",
                "retryable = true;",
                "other batches' failed items stay",
            ),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.cancel_live(",
        BULK_ACTIONS,
        [
            ("AND b.status = ANY (statuses)", "", "a bulk action keeps to its filter"),
            ("b.queue = in_queue AND b.id = ANY (ids)", "b.queue = in_queue", "a cancel takes no other batch"),
            ("(statuses) FOR UPDATE SKIP LOCKED", "(statuses) FOR UPDATE", "bulk actions wait for no row"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.change_pending(",
        (BULK_ACTIONS, ACTIONS),
        [
            ("AND b.status = 'pending'", "", "a batch that runs is left alone"),
            ("FOR UPDATE SKIP LOCKED", "FOR UPDATE", "bulk actions wait for no row"),
            (
                "EXCEPTION WHEN unique_violation THEN",
                "EXCEPTION WHEN division_by_zero THEN",
                "a key that is taken stops no other batch",
            ),
        ],
        VERBS,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.move_pending(",
        (BULK_ACTIONS, ACTIONS),
        [
            ("f.queue = in_queue AND f.batch_id = ANY (ids)", "f.queue = in_queue", "other batches' failed items stay"),
        ],
        SPREAD_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.bulk(",
        BULK_ACTIONS,
        [
            (
                "coalesce((filter ->> 'before')::timestamptz, (place",
                "coalesce((place",
                "a verb in bulk takes each batch once",
            ),
            (
                "OR b.queue <> change ->> 'to_queue'));",
                "OR false AND b.queue <> change ->> 'to_queue'));",
                "what is as wanted is not left out",
            ),
        ],
        FAILURES_SQL,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.bulk_find(",
        "component/test_error_groups.py",
        [
            (
                "AND (in_group IS NULL OR batchq.error_group(coalesce(errors -> -1 ->> 'error', '')) = in_group)",
                "",
                "a retry of a group takes no other batch",
            )
        ],
        FAILURES_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.add_up_throughput(",
        "component/test_wait_times.py",
        [("EXIT WHEN NOT is_done;", "", "no minute is left out while a week is added up")],
        FAILURES_SQL,
    ),
    # ------------------------------------------------------------------------------------------------------ tables
    *of(
        "CREATE UNIQUE INDEX batches_live_unique_key",
        CREATE,
        [
            (
                "CREATE UNIQUE INDEX batches_live_unique_key",
                "CREATE INDEX batches_live_unique_key",
                "one live batch a key",
            )
        ],
        TABLES,
    ),
    *of(
        "CREATE TABLE batchq.batches (",
        (CREATE, LEASES),
        [
            ("AND (status <> 'pending' OR attempt < max_attempts)", "", "what has no attempt left is not pending"),
            (
                "THEN num_nulls(claimed_by, claim_token, claimed_at, lease_expires_at) = 0",
                "THEN true",
                "what is processing has an owner and a lease",
            ),
            (
                "ELSE claim_token IS NULL AND lease_expires_at IS NULL END",
                "ELSE true END",
                "what is not processing has no owner",
            ),
            (
                "((status IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL))",
                "(true)",
                "what has ended has a time of its end",
            ),
        ],
        TABLES,
    ),
    *of(
        "CREATE OR REPLACE FUNCTION batchq.count_items(",
        (TOTALS, CREATE),
        [
            ("ELSIF jsonb_typeof(NEW.items) <> 'array' THEN", "ELSIF false THEN", "bad input is refused by name"),
            (
                "= counted WHERE b.queue = NEW.queue AND b.id = NEW.id",
                "= counted WHERE b.queue = NEW.queue",
                "an INSERT changes its own rows",
            ),
        ],
        ITEMS_SQL,
    ),
    *of("INSERT_BATCH: LiteralString", CREATE, [("ON CONFLICT DO NOTHING", "", "a key that is taken is no error")]),
    # -------------------------------------------------------------------------------------------------- migrations
    *of(
        "def apply(",
        SCHEMA,
        [
            ("        ledger.take_migration_lock(conn)\n", "", "each file is applied once"),
            ("        session.set_lock_timeout(conn, 500)\n", "", "a migration holds up nobody"),
            ("if migration.version in ledger.applied_migrations(conn):", "if False:", "each file is applied once"),
            (
                "deadline(conn, SECONDS_A_FILE + 1), conn.transaction()",
                "deadline(conn, SECONDS_A_FILE)",
                "a file that fails leaves nothing",
            ),
        ],
        MIGRATE,
    ),
    *of(
        "def check_schema(",
        SCHEMA,
        [
            (
                "if version not in known and breaks]",
                "if version not in known]",
                "old workers go on beside a new schema",
            ),
            ("if version not in known and breaks]", "if False]", "a schema that breaks a worker is refused"),
            (
                "if missing := sorted(known.keys() - applied.keys()):",
                "if missing := []:",
                "a schema that is too old is refused",
            ),
        ],
        MIGRATE,
    ),
    # --------------------------------------------------------------------------------------- positions and leases
    *of(
        "    def start(self",
        POSITION,
        [
            (
                "return START if self.is_whole and now >= self.sweep_at else self.position",
                "return self.position",
                "what lands behind a position is found",
            )
        ],
        POSITIONS,
    ),
    *of(
        "    def claimed(self",
        POSITION,
        [
            (
                "self.position = last if is_full else max(last, self.position)",
                "self.position = max(last, self.position)",
                "a full claim from the start leaves nothing behind",
            )
        ],
        POSITIONS,
    ),
    *of(
        "    def due_part(self",
        POSITION,
        [("if not track.is_whole and now >= track.sweep_at", "if False", "what lands behind a position is found")],
        POSITIONS,
    ),
    *of(
        "    def next_part(self",
        POSITION,
        [
            (
                "number = last if self._sweeps % 2 else self._sweeps // 2 % len(self.marks)",
                "number = last",
                "every part is swept",
            )
        ],
        POSITIONS,
    ),
    *of(
        "    def renew_leases(self",
        (PARTS, LIFE),
        [
            (
                "time.monotonic() - self._lease_seconds / 3",
                "time.monotonic() - self._lease_seconds",
                "leases are extended at a third of their time",
            )
        ],
        KEEPER,
    ),
    *of(
        "    def passing(self",
        (POSITION, PARTS),
        [
            (
                'yield float("-inf") if is_whole else self.passed_until',
                "yield self.passed_until",
                "a lease that was locked is found later",
            )
        ],
        RESCUE,
    ),
    # ---------------------------------------------------------------------------------------------------- the process
    *of(
        "    def has_room(self",
        ENDING,
        [("self.waiting_bytes + size <= MOST_BYTES", "True", "what waits for a reader is bounded")],
        "batchq/common/outlet.py",
    ),
    *of(
        "def leave(code",
        ENDING,
        [("leave_after(_LEAVE_SECONDS)", "pass", "a process ends in time, whatever handlers leave behind")],
        "batchq/cli/leaving.py",
    ),
    *of(
        "def raised(",
        LIFE,
        [
            (
                "of_group(_cause_of_cancellation(claimed, error))",
                "_cause_of_cancellation(claimed, error)",
                "a Snooze is no failure",
            )
        ],
        "batchq/worker/execution.py",
    ),
    # ---------------------------------------------------------------------------------- the terminal and what is stored
    *of(
        "def error_text(",
        SECRETS,
        [("clean(hide_password(text))", "clean(text)", "no password is stored")],
        "batchq/common/text.py",
    ),
    *of(
        "def line(",
        TERMINAL,
        [("visible_line(_shortened(_plain(value)))", "_shortened(_plain(value))", "no row steers the terminal")],
        "batchq/common/terminal.py",
    ),
    *of(
        "def _last_processors(",
        TERMINAL,
        [("[*first, spell_out, ", "[*first, ", "no row steers who reads the log")],
        "batchq/common/log.py",
    ),
    *of(
        "def hide_secret_arguments(",
        ARGUMENTS,
        [("os.pwrite(memory", "(memory", "no password stays in the list of arguments")],
        "batchq/common/program.py",
    ),
    *of(
        "def _import_from_here(",
        IMPORTS,
        [("sys.path.append(here)", "sys.path.insert(0, here)", "no file in the directory replaces a module")],
        "batchq/app.py",
    ),
    # ------------------------------------------------------------------------------------------- the database's doors
    *of(
        "CREATE OR REPLACE FUNCTION batchq.count_items(",
        FUNCTIONS,
        [("TG_TABLE_SCHEMA <> 'batchq'", "false", "a trigger function does its work on batchq's own tables alone")],
        ITEMS_SQL,
    ),
    *of(
        "CREATE FUNCTION batchq.forget_failed_items()",
        FUNCTIONS,
        [("TG_RELID <> 'batchq.batches'::regclass", "false", "failed items are forgotten by TRUNCATE batches alone")],
        TABLES,
    ),
    *of(
        "CREATE TABLE batchq.batches (",
        PRODUCER,
        [
            (
                "coalesce(isfinite(lease_expires_at), true)",
                "true",
                "every lease runs out",
            ),
        ],
        TABLES,
    ),
    *of(
        "CREATE FUNCTION batchq.refuse_packed_values(",
        PRODUCER,
        [("OR octet_length(NEW.items::text) >", "OR false AND 0 >", "no value is larger than it looks")],
        TABLES,
    ),
    *of(
        "CREATE FUNCTION batchq.refuse_finish_ahead(",
        PRODUCER,
        [("NEW.finished_at > clock_timestamp() + interval '1 hour'", "false", "each day's partition can be made")],
        TABLES,
    ),
    *of(
        "FIXED_FORMATS = {",
        SEARCH_PATHS,
        [('"search_path": SEARCH_PATH,', "", "names in statements mean pg_catalog's")],
    ),
    *of(
        "    def _listen(self",
        NOTIFY,
        [
            (
                "conn.notifies(timeout=REST_SECONDS)",
                "conn.notifies(timeout=0)",
                "whoever may NOTIFY sets no worker's pace",
            )
        ],
        "batchq/worker/bell.py",
    ),
    # ----------------------------------------------------------------------------------------------- the page's doors
    *of(
        "    def failed(self, address",
        PAGE,
        [
            (
                "self._paid_until = max(self._paid_until, now) + _SECONDS_PER_FAILURE_OF_ALL",
                "pass",
                "guesses from many addresses are throttled",
            ),
            ("max(free_at - now, ahead)", "ahead", "guesses from one address are throttled"),
        ],
        "batchq/web/throttle.py",
    ),
    *of(
        "    def is_known(self",
        PAGE,
        [(" and session in self.known", "", "logging out ends a session")],
        "batchq/web/sessions.py",
    ),
    *of(
        "def client_of(",
        PAGE,
        [("not is_within(address, proxies) or ", "", "only a trusted proxy names a client")],
        "batchq/web/guard.py",
    ),
    *of(
        "    def admit(self",
        HELD,
        [
            ("and not self._drop_one(address)", "and False", "one address does not hold all connections"),
            ("and not self._drop_one():", "and False:", "who waits longest for its client gives way"),
        ],
        "batchq/web/connections.py",
    ),
    *of(
        "    def _follow(self",
        HELD,
        [
            (
                "self._timer = self.loop.call_later(WAIT_SECONDS[stage[0]], self.drop)",
                "self._timer = None",
                "no client is waited for without a limit",
            )
        ],
        "batchq/web/connections.py",
    ),
    *of(
        "def check(path: Path",
        ENV_FILE,
        [
            ("if strangers:", "if False:", "nobody else chooses the settings"),
            ("if by_group or status.st_mode & stat.S_IWOTH:", "if False:", "nobody else changes the settings"),
        ],
        "batchq/common/env_file.py",
    ),
]
