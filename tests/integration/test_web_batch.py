"""The page of one batch: a bar that tells done from failed, its timeline, its payload as a tree, links, and copies."""

import json
import re
import time
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb

import batchq
from batchq.common.traces import trace_id_of
from batchq.errors import ConfigError
from batchq.operate.progress import items_text, shares
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from batchq.web import json_tree
from batchq.web.settings import WebSettings
from batchq.web.timeline import events
from tests.component.rows import (
    Conn,
    batch,
    checkpoint,
    complete,
    expire_lease,
    failure,
    finish,
    finished,
    insert,
    processing,
    value,
    values,
)
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.steps import step
from tests.support.web import Site, served

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
HOSTILE = "<script>alert(1)</script>'\"&{{ 7*7 }}\u202egnp.exe\u200b"
MOST_SECONDS = 0.1


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


def text_of(html: str) -> str:
    """Return the text of the main part of a page, with one space between words."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html.partition("<main")[2])).split())


def shown(site: Site, batch_id: int) -> str:
    """Return the text of the page of a batch."""
    answer = site.client.get(f"/batches/{batch_id}")
    assert answer.status_code == 200, answer.text
    return text_of(answer.text)


def timeline(site: Site, batch_id: int) -> list[str]:
    """Return the events on the page of a batch, without their times, the latest first."""
    page = site.client.get(f"/batches/{batch_id}").text
    entries = re.findall(r'<li class="[a-z]*">(.*?)</li>', page.partition('<ol class="timeline">')[2], re.DOTALL)
    texts = [" ".join(unescape(re.sub(r"<[^>]*>", " ", entry)).split()) for entry in entries]
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text).replace(" :", ":") for text in texts]


# --------------------------------------------------------------------------------------------------------- the bar


def test_a_failed_batch_has_a_bar_of_done_and_failed_with_the_same_words_everywhere(
    conn: Conn, site: Site, dsn: str, tmp_path: Path
) -> None:
    taken = processing(conn, items=list(range(1500)))
    checkpoint(conn, taken, Progress(1485, 15, [failure(number) for number in range(15)], first_index=0))
    finish(conn, Finish(taken.id, taken.token, "failed", error='{"error": "15 of 1500 items failed"}'))
    words = "1,485 done, 15 failed, of 1,500"
    page = site.client.get(f"/batches/{taken.id}").text
    assert f'aria-label="{words} items"' in page
    assert "100 % 1,485 done, 15 failed, of 1,500 items" in text_of(page)
    assert '<rect class="done" width="988" height="8"/><rect class="failed" x="988" width="12" height="8"/>' in page
    assert f'aria-label="{words} items"' in site.client.get("/batches").text
    command = CommandLine(dsn, tmp_path)
    assert words in command("show", str(taken.id)).out
    assert f"{words} items" in command("watch", str(taken.id)).out


def test_a_bar_is_full_only_at_the_end_and_a_failed_item_can_always_be_seen() -> None:
    rows = {
        (0, 0, 10): (0, 0), (10, 0, 10): (1000, 0), (0, 10, 10): (0, 1000), (999_999, 0, 1_000_000): (999, 0),
        (0, 1, 1_000_000): (0, 12), (999_999, 1, 1_000_000): (988, 12), (0, 0, 0): (0, 0),
    }  # fmt: skip
    for (done, failed, total), expected in rows.items():
        row = {"items_done": done, "items_failed": failed, "items_total": total}
        assert shares(row, 1000, least=12) == expected, row
    assert items_text({"items_done": 1, "items_failed": 0, "items_total": 3}) == "1 of 3"
    assert items_text({"items_done": 0, "items_failed": 0, "items_total": None}) == ""


# --------------------------------------------------------------------------------------------------------- the timeline


def test_a_batch_that_completes_was_enqueued_started_and_completed(conn: Conn, site: Site) -> None:
    taken = processing(conn, worker="jobs-1-44-5eed")
    assert timeline(site, taken.id) == ["attempt 1 started by jobs-1-44-5eed", "enqueued"]
    complete(conn, taken)
    first, *others = timeline(site, taken.id)
    assert re.fullmatch(r"completed after [\d.]+ m?s", first)
    assert others == ["attempt 1 started by jobs-1-44-5eed", "enqueued"]
    assert 'href="/workers?id=jobs-1-44-5eed"' in site.client.get(f"/batches/{taken.id}").text


def test_what_people_did_is_told_once_with_who_and_why(conn: Conn, site: Site) -> None:
    one = insert(conn, run_at="2100-01-01")
    conn.execute("SELECT batchq.move(%s, 'slow', reason => 'too big', actor => 'ann')", [one])
    conn.execute("SELECT batchq.set_priority(%s, 7, actor => 'ann')", [one])
    conn.execute("SELECT batchq.snooze(%s, until => '2101-02-03 04:05:06+00', actor => 'bob')", [one])
    conn.execute("SELECT batchq.cancel(%s, 'no longer needed', 'eve')", [one])
    history = ["cancelled by eve: no longer needed", "snoozed until 2101-02-03 04:05:06 by bob",
               "priority changed to 7 by ann", "moved to queue slow by ann: too big", "enqueued"]  # fmt: skip
    assert timeline(site, one) == history
    conn.execute("SELECT batchq.retry(%s, true, 'sorry', 'eve')", [one])
    assert timeline(site, one) == ["retried from the start by eve: sorry", *history]


def test_each_attempts_end_is_told_a_dead_worker_and_a_cancel_in_bulk_too(conn: Conn, site: Site) -> None:
    taken = processing(conn, max_attempts=9)
    errors = [
        {"attempt": 1, "at": "2026-03-04T10:00:00.5+02:00", "error": "ValueError: no", "traceback": "Traceback ..."},
        {"attempt": 2, "at": "2026-03-04T09:00:00+00:00", "error": "worker died: w-1 did not renew its lease"},
        {"at": "nonsense", "error": HOSTILE},
        "not even an object",
    ]
    conn.execute(
        "UPDATE batchq.batches SET errors = %s, attempt = 3, created_at = '2026-03-04 07:00:00+00', "
        "run_at = '2026-03-04 07:00:00+00' WHERE id = %s",
        [Jsonb(errors), taken.id],
    )
    entries = timeline(site, taken.id)
    assert entries[0] == "attempt 3 started by worker-1"
    assert entries[1:4] == [
        "attempt 2: lease lost worker died: w-1 did not renew its lease",
        "attempt 1 failed ValueError: no Traceback Traceback ...",
        "enqueued",
    ]
    assert "alert(1)" in entries[4] + entries[5], "without a time, but not lost"
    page = site.client.get(f"/batches/{taken.id}").text
    assert "2026-03-04 08:00:00" in page, "in UTC, whatever the zone of the session that wrote it"
    step("a cancel in bulk has no batch in the audit, but the batch says so itself")
    other = insert(conn)
    conn.execute("""SELECT batchq.bulk('cancel', '{"status": "live", "kind": "work"}', reason => 'all of them')""")
    assert timeline(site, other)[:2] == ["cancelled", "cancelled cancelled: all of them"]


def test_what_it_waits_for_and_waited_for_is_told(conn: Conn, site: Site) -> None:
    first, second = processing(conn), processing(conn)
    later = batchq.enqueue(conn, "later", after=[first.id, second.id])
    assert later
    assert timeline(site, later) == ["enqueued"]
    complete(conn, first, second)
    conn.execute("SELECT batchq.follow_flows(0)")
    assert timeline(site, later) == ["the last of the batches ended of 2 that it waited for", "enqueued"]


def test_what_holds_a_ready_batch_back_is_told(conn: Conn, site: Site) -> None:
    one = insert(conn, kind="mail")
    conn.execute("SELECT batchq.pause(kind => 'mail', reason => 'they are down', actor => 'ann')")
    conn.execute("SELECT batchq.throttle('default', 'mail', '', 60, 'jobs-7')")
    conn.execute("SELECT batchq.throttle('default', 'other', '', 60, 'jobs-7')")
    throttled, paused, enqueued = timeline(site, one)
    if paused.startswith("throttled"):
        throttled, paused = paused, throttled
    assert re.fullmatch(r"throttled kind mail queue default until [\d: -]+ by jobs-7", throttled)
    assert (paused, enqueued) == ("paused kind mail by ann: they are down", "enqueued")


def test_a_time_to_come_stands_above_and_one_that_has_come_is_told(conn: Conn, site: Site) -> None:
    stalled = processing(conn)
    expire_lease(conn, stalled.id)
    assert timeline(site, stalled.id)[0].startswith("stalled its worker has not renewed the lease")
    later = insert(conn, run_at="2100-01-01")
    assert timeline(site, later) == ["scheduled not before this time", "enqueued"]
    conn.execute(
        "UPDATE batchq.batches SET run_at = now(), created_at = now() - interval '1 hour' WHERE id = %s", [later]
    )
    assert timeline(site, later) == ["due a worker may claim it from now on", "enqueued"]


def test_the_audit_of_one_batch_is_read_by_its_index(conn: Conn) -> None:
    one = insert(conn)
    conn.execute(
        "INSERT INTO batchq.audit (verb, batches, batch_id, details) SELECT 'snooze', 1, %s, '{}' "
        "FROM generate_series(1, 20000)", [one]
    )  # fmt: skip
    conn.execute("INSERT INTO batchq.audit (verb, batches, details) SELECT 'x', 1, '{}' FROM generate_series(1, 20000)")
    conn.execute("ANALYZE batchq.audit")
    from batchq.web.reads import SQL

    plan = "\n".join(values(conn, "EXPLAIN " + SQL["batch_audit"].decode().replace("%(id)s", "1")))
    assert "audit_batch" in plan, plan


# --------------------------------------------------------------------------------------------------------- the tree


def outline(node: json_tree.Node | None) -> Any:
    """Return keys and texts of a tree."""
    assert node
    if node.kind in ("object", "array"):
        return {member.key: outline(member) for member in node.members} | ({"…": node.more} if node.more else {})
    return node.text


def test_a_tree_is_exact() -> None:
    text = r'{"a b": [12345678901234567890.000000000000000001, 1e400], "é\"": {"": "x\\"}, "n": null, "e": [[], {}]}'
    assert outline(json_tree.tree(text)) == {
        '"a b"': {"0": "12345678901234567890.000000000000000001", "1": "1e400"},
        r'"é\""': {'""': r'"x\\"'}, '"n"': "null", '"e"': {"0": {}, "1": {}},
    }  # fmt: skip


def test_a_tree_is_bounded_in_members_depth_and_nodes() -> None:
    long = json_tree.tree(json.dumps(list(range(1300))))
    assert long
    assert (long.count, len(long.members), long.more) == (1300, 100, 1200)
    deep = node = json_tree.tree("[" * 5000 + "]" * 5000)
    levels = 0
    while node and node.members:
        node, levels = node.members[0], levels + 1
    assert (levels, node and node.more) == (json_tree.MOST_DEPTH, 1)
    assert deep
    wide = json_tree.tree(json.dumps([list(range(99))] * 99))
    assert wide
    assert sum(len(member.members) for member in wide.members) + len(wide.members) <= json_tree.MOST_NODES


@pytest.mark.parametrize("length", range(1, 40))
def test_a_text_that_is_cut_anywhere_is_a_tree_without_a_wrong_number(length: int) -> None:
    text = '{"ab": [1, 234, "x\\"y"], "c": {"d": 5}}'
    node = json_tree.tree(text[:length], is_cut=True)
    assert node
    assert node.is_cut == (length < len(text))
    found = json.dumps(outline(node))
    assert not set(re.findall(r'"(\d+)"(?!:)', found)) - {"1", "234", "5"}, found


def test_a_payload_is_a_tree_that_folds_without_a_script_and_there_as_it_is(conn: Conn, site: Site) -> None:
    payload = '{"order": {"lines": [1, 2.50, 12345678901234567890.01]}, "note": "a\\u202eb"}'
    one = value(
        conn, "INSERT INTO batchq.batches (kind, payload) VALUES ('a', %s::text::jsonb) RETURNING id", [payload]
    )
    page = site.client.get(f"/batches/{one}").text
    assert re.findall(r'<details id="(t-payload[-\d]*)"( open)?>', page) == [
        ("t-payload", " open"), ("t-payload-2", " open"), ("t-payload-2-1", ""),
    ]  # fmt: skip
    assert "12345678901234567890.01" in page
    assert "a⟨U+202E⟩b" in page
    assert "\u202e" not in page
    raw = site.client.get(f"/batches/{one}/payload.json")
    assert raw.headers["content-type"] == "application/json"
    assert json.loads(raw.text)["note"] == "a\u202eb"
    assert "2.50" in raw.text
    assert site.client.get(f"/batches/{one}/result.json").status_code == 404
    assert site.client.get(f"/batches/{one}/items.json").status_code == 404
    assert site.client.get("/batches/999/payload.json").status_code == 404


def test_a_payload_of_4_mb_costs_little(conn: Conn, site: Site) -> None:
    many = insert(conn, payload={f"key {number}": "x" * 30 for number in range(80_000)})
    assert site.client.get(f"/batches/{many}").status_code == 200
    times = []
    for _ in range(7):
        began = time.perf_counter()
        answer = site.client.get(f"/batches/{many}")
        times.append(time.perf_counter() - began)
    assert "shortened to the first" in answer.text
    assert len(answer.content) < 150_000
    step("%.0f ms at the median", 1000 * sorted(times)[3])
    assert sorted(times)[0] < 3 * MOST_SECONDS, "100 ms on a machine that is not shared"


def test_hostile_texts_are_text(conn: Conn, site: Site) -> None:
    taken = processing(conn, kind="work", payload={HOSTILE: [HOSTILE], "__proto__": {"</details></section>": 1}})
    conn.execute(
        "INSERT INTO batchq.audit (verb, batches, batch_id, details, reason, actor) "
        "VALUES (%(h)s, 1, %(id)s, %(d)s, %(h)s, %(h)s)",
        {"h": HOSTILE, "id": taken.id, "d": Jsonb({"to_queue": HOSTILE})},
    )
    conn.execute("SELECT batchq.note_verb('move', 1, %s, 'q', 'k', %s, %s, %s)",
                 [taken.id, Jsonb({"to_queue": HOSTILE}), HOSTILE, HOSTILE])  # fmt: skip
    conn.execute("UPDATE batchq.batches SET result = to_jsonb(%s::text), trace_context = %s WHERE id = %s",
                 [HOSTILE, HOSTILE, taken.id])  # fmt: skip
    for path in (f"/batches/{taken.id}", f"/batches/{taken.id}/copy"):
        page = site.client.get(path).text
        assert "<script>alert" not in page, path
        assert not re.search("[\u202a-\u202e\u200b]", page), path
        assert page.count("</section>") == len(re.findall("<section", page)), path
    assert "49" not in shown(site, taken.id).partition("Timeline")[2].partition("Payload")[0]


# --------------------------------------------------------------------------------------------------------- links


def test_it_links_to_its_kind_queue_key_schedule_and_trace(conn: Conn, dsn: str) -> None:
    conn.execute("SELECT batchq.set_schedule('nightly & co', '0 3 * * *', 'report')")
    made = value(conn, "SELECT batchq.run_schedule('nightly & co', actor => 'ann')")
    context = f"00-{TRACE}-00f067aa0ba902b7-01"
    conn.execute("UPDATE batchq.batches SET key = 'a/b', trace_context = %s WHERE id = %s", [context, made])
    with served(dsn, trace_url="https://traces.example.com/trace/{trace_id}?x=1") as site:
        page = site.client.get(f"/batches/{made}").text
        for address in ("/kinds?queue=default&amp;kind=report", "/batches?queue=default", "/batches?key=a%2Fb",
                        "/schedules?name=nightly+%26+co",
                        f"https://traces.example.com/trace/{TRACE}?x=1"):  # fmt: skip
            assert f'href="{address}"' in page, address
        assert timeline(site, made)[-1] == "enqueued by schedule nightly & co by ann"
    with served(dsn) as site:
        page = site.client.get(f"/batches/{made}").text
        assert (TRACE in page, "traces.example" in page) == (True, False)


def test_a_trace_id_is_one_or_none() -> None:
    assert trace_id_of(f"00-{TRACE}-00f067aa0ba902b7-01") == TRACE
    for text in (
        None,
        "",
        "nonsense",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-x-01",
        f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
    ):
        assert trace_id_of(text) is None, text


@pytest.mark.parametrize(
    "url", ["javascript:alert('{trace_id}')", "https://x.example/", "//x/{trace_id}", "https://x/{trace_id}/{other}",
            "data:text/html,{trace_id}", "https://x y/{trace_id}", "https://{trace_id}\"onclick="]
)  # fmt: skip
def test_an_address_of_traces_is_http_or_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"BATCHQ_WEB_TRACE_URL: .*must be an http or https address"):
        WebSettings.load(trace_url=url)


# --------------------------------------------------------------------------------------------------------- copies


def copy(site: Site, batch_id: int, **fields: object) -> httpx.Response:
    """Enqueue a copy by the form, with its fields as they are unless others are given."""
    page = site.client.get(f"/batches/{batch_id}/copy").text
    given = {name: unescape(text) for name, text in re.findall(r'<input id="c-\w+" name="(\w+)" value="([^"]*)"', page)}
    if payload := re.search(r"<textarea[^>]*>\n(.*?)</textarea>", page, re.DOTALL):
        given["payload"] = unescape(payload[1])
    return site.post(f"/batches/{batch_id}/copy", site.form_token(f"/batches/{batch_id}/copy"), **(given | fields))


def test_a_copy_has_what_the_batch_has_but_its_unique_key(conn: Conn, site: Site) -> None:
    columns: dict[str, Any] = {
        "queue": "slow", "kind": "import", "payload": {"n": 1}, "items": [1, 2], "priority": 3, "key": "ann",
        "unique_key": "once", "max_attempts": 2, "max_failed_items": 1, "timeout_seconds": 60, "spread": 2,
    }  # fmt: skip
    one = insert(conn, **columns)
    assert "The unique key is not copied." in text_of(site.client.get(f"/batches/{one}/copy").text)
    answer = copy(site, one, reason="once more", actor="ann")
    made = one + 1
    assert (answer.status_code, answer.headers["location"]) == (303, f"/batches/{made}")
    row = batch(conn, made)
    assert {name: row[name] for name in columns} == columns | {"unique_key": None}
    assert (row["status"], row["items_total"]) == ("pending", 2)
    assert timeline(site, made) == [f"enqueued as a copy of {one} by ann: once more"]
    assert values(conn, "SELECT details FROM batchq.audit") == [{"copy_of": one, "payload_changed": False}]


def test_a_copy_can_differ_and_no_number_of_its_payload_changes(conn: Conn, site: Site) -> None:
    one = insert(conn, payload={"text": "a\u202eb"})
    payload = '{"big": 12345678901234567890.000000000000000001, "text": "é\\u202e"}'
    copy(site, one, payload=payload, queue="other", priority="-5", delay="2h")
    [row] = conn.execute(
        "SELECT payload::text, queue, priority, run_at - now() BETWEEN interval '119 min' AND interval '2 h' "
        "FROM batchq.all_batches WHERE id = %s", [one + 1]
    ).fetchall()  # fmt: skip
    assert row == ('{"big": 12345678901234567890.000000000000000001, "text": "é\u202e"}', "other", -5, True)
    assert values(conn, "SELECT details -> 'payload_changed' FROM batchq.audit") == [True]
    step("hidden characters are spelled as JSON escapes in the field, so they come back")
    assert "a\\u202eb" in unescape(site.client.get(f"/batches/{one}/copy").text)
    copy(site, one)
    assert values(conn, "SELECT count(*) FROM batchq.all_batches WHERE payload ->> 'text' = %s", ["a\u202eb"]) == [2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"payload": '{"a": 1,\n}'}, "the payload is not valid JSON"),
        ({"payload": '{"a": 1,\n}'}, "in line 2, column 1"),
        ({"payload": ""}, "the payload is not valid JSON"),
        ({"payload": '[NaN]'}, "the payload has NaN, which is not JSON"),
        ({"payload": '"\\u0000"'}, "NUL character"),
        ({"payload": '"\\ud800"'}, "the payload cannot be stored as JSON"),
        ({"priority": "high"}, "priority must be a whole number from -32768 to 32767"),
        ({"priority": "40000"}, "priority must be a whole number"),
        ({"delay": "soon"}, "the delay must be a length of time"),
        ({"delay": "-5"}, "the delay must be from 0 to 300 years"),
        ({"queue": " "}, "the queue has no name"),
        ({"queue": "x" * 129}, "the name of a queue must have 1 to 128 bytes"),
        ({"payload": "[" * 100_000 + "]" * 100_000}, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_copy_that_is_wrong_is_refused_with_what_to_do(
    conn: Conn, site: Site, fields: dict[str, str], said: str
) -> None:
    one = insert(conn, payload={"a": 1})
    answer = copy(site, one, **fields)
    assert answer.status_code == 409, answer.text
    assert said in unescape(answer.text)
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 1
    for name, text in fields.items():
        if name != "payload" or text:
            assert (text.strip() in unescape(answer.text)) or name == "payload", "what was written is kept"


def test_a_long_payload_is_copied_unchanged_and_many_items_are_not(conn: Conn, site: Site) -> None:
    long = insert(conn, payload={"x": "a" * 30_000})
    page = site.client.get(f"/batches/{long}/copy").text
    assert ("<textarea" in page, "It is copied unchanged" in page) == (False, True)
    assert copy(site, long, payload='"ignored"').status_code == 303
    assert value(conn, "SELECT count(*) FROM batchq.all_batches WHERE length(payload ->> 'x') = 30000") == 2
    many = insert(conn, items=list(range(10_001)))
    page = site.client.get(f"/batches/{many}/copy").text
    assert "more than 10,000 items cannot be copied" in page
    assert '<button class="main"' not in page
    with pytest.raises(psycopg.errors.RaiseException, match="more than 10000 cannot be copied"):
        conn.execute("SELECT batchq.enqueue_copy(%s)", [many])
    assert value(conn, "SELECT batchq.enqueue_copy(999)") is None
    assert site.client.get("/batches/999/copy").status_code == 404


def test_a_forged_form_copies_nothing_and_a_read_only_page_has_none(conn: Conn, site: Site, dsn: str) -> None:
    one = finished(conn, "failed", error='{"error": "no"}')
    assert site.post(f"/batches/{one}/copy", "forged", queue="default", priority="0").status_code == 403
    assert "Enqueue a copy" in shown(site, one)
    with served(dsn, read_only=True) as looked_at:
        assert "Enqueue a copy" not in shown(looked_at, one)
        assert looked_at.client.get(f"/batches/{one}/copy").status_code == 403
        assert looked_at.post(f"/batches/{one}/copy", "x").status_code == 403
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 1


def test_an_operator_may_copy_and_a_viewer_may_only_look(conn: Conn, admin_dsn: str, database: str) -> None:
    one = insert(conn)
    for duty in ("operator", "viewer"):
        role = f"{duty}_{database}"[:63]
        with psycopg.connect(admin_dsn, autocommit=True) as admin:
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'copies-only'").format(sql.Identifier(role)))
            try:
                admin.execute("SELECT batchq.grant_duty(%s, %s)", [duty, role])
                with served(psycopg.conninfo.make_conninfo(admin_dsn, user=role, password="copies-only")) as site:
                    answer = copy(site, one)
                    may = answer.status_code == 303
                    assert (may, "may not do that" in answer.text) == ((duty == "operator"), (duty == "viewer"))
                    assert site.client.get(f"/batches/{one}/payload.json").text == "{}"
            finally:
                admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
                admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert value(conn, "SELECT count(*) FROM batchq.all_batches") == 2


def test_events_without_a_time_are_kept_at_the_end() -> None:
    row = {"created_utc": "2026-01-01 00:00:00.000000", "claimed_utc": None, "finished_utc": None, "due_utc": None,
           "was_due_utc": None, "stored_status": "pending", "status": "ready", "claimed_by": None,
           "attempt": 0}  # fmt: skip
    error = {"attempt": "1", "at_text": None, "error": "no", "traceback": None}
    assert [event.title for event in events(row, [error], [], None, [], 0)] == ["enqueued", "attempt 1 failed"]


if __name__ == "__main__":
    run_alone(__file__)
