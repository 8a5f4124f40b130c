"""The list of batches over HTTP: tabs, sorts, search, columns, suggestions, live part, actions on selected rows."""

import re
from collections.abc import Iterator
from html import unescape
from typing import Any
from urllib.parse import quote

import httpx
import pytest

import batchq
from batchq.postgres.statements.checkpoints import Progress
from batchq.postgres.statements.endings import Finish
from batchq.postgres.statements.views import STATUSES
from batchq.web import batch_list, list_reads
from batchq.web.chosen import MOST_CHOSEN
from batchq.web.search import InPayload, Terms, parse, term, without
from tests.component.rows import (
    Conn,
    change,
    checkpoint,
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
from tests.support.steps import step
from tests.support.web import Site, served

THIN = "\N{NARROW NO-BREAK SPACE}"
HOSTILE = "<script>x</script>\"'><img src=x>\u202egnp.exe"


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the web UI without a password."""
    with served(dsn) as site:
        yield site


def listed(answer: httpx.Response) -> list[int]:
    """Return the batches that a list shows."""
    assert answer.status_code == 200, answer.text
    return [int(number) for number in re.findall(r'href="/batches/(\d+)">\1</a></th>', answer.text)]


def ids(site: Site, **given: str) -> list[int]:
    """Return the batches of a list."""
    return listed(site.client.get("/batches", params=given))


def tabs(site: Site, **given: str) -> dict[str, str]:
    """Return the count of each tab."""
    text = site.client.get("/batches", params=given).text
    return dict(re.findall(r'<a id="tab-(\w+)"[^>]*>\1 <span[^>]*>([^<]*)</span>', text))


def one_of_each(conn: Conn, **columns: Any) -> dict[str, int]:
    """Return a batch of each status."""
    made = {"ready": insert(conn, **columns), "scheduled": insert(conn, run_at="2100-01-01", **columns)}
    made["retrying"] = insert(conn, run_at="2100-01-02", **columns)
    change(conn, made["retrying"], errors=[{"error": "OSError: again", "attempt": 1}])
    kind = columns.get("kind", "work")
    made["waiting"] = batchq.enqueue(conn, kind, after=[made["ready"]], queue=columns.get("queue", "default")) or 0
    conn.execute("UPDATE batchq.batches SET priority = 5 WHERE id = ANY (%s)", [list(made.values())])
    made["processing"], made["stalled"] = processing(conn, **columns).id, processing(conn, **columns).id
    expire_lease(conn, made["stalled"])
    for status in ("completed", "failed", "cancelled"):
        made[status] = finished(
            conn, status, error='{"error": "OSError: no"}' if status == "failed" else None, **columns
        )
    return made


# ------------------------------------------------------------------------------------------------- tabs and sorts


def test_each_status_has_a_tab_with_its_count_of_the_chosen_queue_and_kind(conn: Conn, site: Site) -> None:
    made = one_of_each(conn)
    insert(conn, queue="other", kind="mail")
    assert tabs(site) == {"all": "10", **dict.fromkeys(STATUSES, "1"), "ready": "2"}
    assert tabs(site, kind="work") == {"all": "9", **dict.fromkeys(STATUSES, "1")}
    assert tabs(site, queue="other") == {"all": "1", **dict.fromkeys(STATUSES, "0"), "ready": "1"}
    for status in STATUSES:
        assert ids(site, status=status, kind="work") == [made[status]], status
    text = site.client.get("/batches?status=failed&kind=work&q=error:no").text
    assert re.findall(r'id="tab-(\w+)"[^>]*aria-current="page"', text) == ["failed"]
    assert 'href="/batches?kind=work&amp;status=cancelled&amp;q=error%3Ano"' in text


def test_counts_are_bounded_and_marked(conn: Conn, site: Site) -> None:
    conn.execute(
        "INSERT INTO batchq.batches (kind, status, finished_at) "
        "SELECT 'work', s, now() FROM generate_series(1, 1500) n, unnest('{completed,cancelled}'::text[]) s"
    )
    conn.execute(
        "INSERT INTO batchq.batches (kind, run_at, errors) "
        "SELECT 'work', '2100-01-01', '[{}]' FROM generate_series(1, 1500)"
    )
    shown = tabs(site, queue="default")
    assert (shown["cancelled"], shown["retrying"]) == (f"≥{THIN}1,001", f"≥{THIN}1,001")
    assert shown["completed"] == "", "none among those that were looked at: unknown"
    assert shown["all"].startswith("~")


SORTED = {
    "newest": "id DESC", "oldest": "id", "longest": "claimed_at, id", "run_at": "run_at, id",
    "run_at_last": "run_at DESC, id DESC", "ended": "finished_at DESC, id DESC", "ended_first": "finished_at, id",
}  # fmt: skip
PAGED = [
    (sort, status)
    for status in (*STATUSES, "")
    for sort in list_reads.sorts_for(status)
    if status not in ("waiting", "stalled", "retrying")
]


@pytest.mark.parametrize(("sort", "status"), PAGED, ids=lambda one: getattr(one, "name", one) or "all")
def test_a_sort_is_paged_by_key_and_misses_nothing(conn: Conn, site: Site, sort: list_reads.Sort, status: str) -> None:
    stored = {"ready": "pending", "scheduled": "pending", "": "completed"}.get(status, status)
    day = {"scheduled": "+ interval '90 days'"}.get(status, "- interval '1 day'")
    claimed = "gen_random_uuid()" if stored == "processing" else "NULL"
    conn.execute(
        f"""
        INSERT INTO batchq.batches (kind, priority, key, status, run_at, finished_at, claimed_by, claim_token,
          claimed_at, lease_expires_at)
        SELECT 'work', n %% 3, CASE WHEN n %% 4 = 0 AND %(stored)s = 'pending' THEN 'k' || n %% 9 END, %(stored)s,
          now() {day} + n * 7919 %% 60 * interval '1 second',
          CASE WHEN %(stored)s IN ('completed', 'failed', 'cancelled')
               THEN now() - n * 7919 %% 60 * interval '1 hour' END,
          CASE WHEN %(stored)s = 'processing' THEN 'w' END, {claimed},
          CASE WHEN %(stored)s = 'processing' THEN now() - n * 7919 %% 60 * interval '1 second' END,
          CASE WHEN %(stored)s = 'processing' THEN now() + n * interval '1 second' + interval '1 hour' END
        FROM generate_series(1, 170) n
        """.encode(),
        {"stored": stored},
    )
    seen: list[int] = []
    path: str | None = f"/batches?status={status}&sort={sort.name}"
    while path:
        answer = site.client.get(path)
        seen += listed(answer)
        found = re.search(r'href="([^"]*)" rel="next"', answer.text)
        path = unescape(found[1]) if found else None
    assert seen == values(conn, f"SELECT id FROM batchq.all_batches ORDER BY {SORTED[sort.name]}")
    assert f'id="sort-{sort.name}"' in answer.text


def test_only_sorts_that_an_index_gives_are_offered_and_the_sorted_column_is_marked(conn: Conn, site: Site) -> None:
    finished(conn, "failed")
    failed = site.client.get("/batches?status=failed").text
    assert re.findall(r'id="sort-(\w+)"', failed) == ["ended", "ended_first"]
    assert "Failed batches are sorted by the time when they ended." in failed
    assert '<th scope="col" aria-sort="descending">Ended</th>' in failed
    assert re.findall(r'id="sort-(\w+)"', site.client.get("/batches?sort=run_at").text) == ["newest"]
    step("a sort that the status does not have is the default")
    for sort in ("run_at", "nonsense", "%00", "oldest"):
        assert len(listed(site.client.get(f"/batches?status=failed&sort={sort}"))) == 1


def test_a_failed_batch_without_items_shows_none_and_one_with_items_how_many(conn: Conn, site: Site) -> None:
    finished(conn, "failed", kind="bare")
    taken = processing(conn, kind="list", items=list(range(1500)))
    failures = [failure(number, "no") for number in range(15)]
    checkpoint(conn, taken, Progress(1485, 15, failures, first_index=0))
    finish(conn, Finish(taken.id, taken.token, "failed"))
    with_items, bare = (
        re.sub(
            r"<[^>]*>|\s", "", re.findall(r'data-label="Progress">(.*?)</td>', site.client.get(path).text, re.DOTALL)[0]
        )
        for path in ("/batches?kind=list", "/batches?kind=bare")
    )
    assert bare == "–"
    assert with_items.endswith("1,485done,15failed,of1,500")


# ------------------------------------------------------------------------------------------------- search


def test_the_search_finds_ids_keys_errors_workers_and_payloads(conn: Conn, site: Site) -> None:
    failed = finished(conn, "failed", error='{"error": "TimeoutError: geo.example did not answer"}', unique_key="old")
    taken = processing(conn, worker="host-9-x", kind="run").id
    plain = insert(conn, payload={"customer": {"id": 42}, "tags": ["red", "blue"], "a.b": {"c": None}, "ok": True})
    keyed = insert(conn, key="cust 7", payload={"customer": {"id": 43}})
    unique = insert(conn, unique_key="report:2030", kind="report", queue="bulk", payload={"customer": {"id": "42"}})
    for text, expected in {
        str(plain): [plain], f"id:{keyed}": [keyed], 'key:"cust 7"': [keyed], "cust 7": [keyed],
        "report:2030 ": None, '"report:2030"': [unique], "unique_key:report:2030": [unique], "old": [failed],
        "report": [unique], "bulk": [unique], "TIMEOUTerror: geo": [failed], 'error:"did not"': [failed],
        "did not answer": [failed], "worker:host-9": [taken], "kind:run": [taken], "queue:bulk": [unique],
        "status:failed": [failed], "payload.customer.id = 42": [unique, plain], "customer.id:43": [keyed],
        "payload.customer.id=42.0": [plain], 'payload.customer.id = "42"': [unique, plain], "payload.tags:red": [plain],
        'payload:{"customer": {"id": 42}}': [plain], 'payload.customer = {"id": 43}': [keyed],
        'payload."a.b".c = null': [plain], "payload.ok:true": [plain], "payload.ok:false": [],
        "payload.tags.1=blue": [plain],
        "payload.customer.id:42 kind:report": [unique], "no such text": [], "%": [], "_": [], "\\": [],
    }.items():  # fmt: skip
        if expected is not None:
            assert ids(site, q=text) == expected, text


def test_a_unique_key_is_found_by_its_index_behind_many_newer_batches(conn: Conn, site: Site) -> None:
    wanted = insert(conn, unique_key="needle", kind="report", queue="bulk")
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 11000)")
    for text in ("needle", "unique_key:needle", str(wanted), f"id:{wanted}"):
        answer = site.client.get("/batches", params={"q": text})
        assert listed(answer) == [wanted], text
    assert ids(site, q="needle", status="failed") == []
    step("further pages do not show it again")
    answer = site.client.get("/batches", params={"q": "needle"})
    while found := re.search(r'href="([^"]*)" rel="next"', answer.text):
        answer = site.client.get(unescape(found[1]))
        assert listed(answer) == []


def test_a_search_by_payload_is_bounded_and_leaves_out_large_payloads(conn: Conn, site: Site) -> None:
    old = insert(conn, payload={"n": 1})
    insert(conn, payload={"n": 1, "random": [quote(str(hash(n))) for n in range(40_000)]})
    conn.execute("INSERT INTO batchq.batches (kind) SELECT 'work' FROM generate_series(1, 1500)")
    answer = site.client.get("/batches?q=payload.n:1")
    assert listed(answer) == []
    assert "Searched 1,000 batches; payloads over 100 kB are not searched" in answer.text
    found = re.search(r'href="([^"]*)" rel="next"', answer.text)
    assert found
    assert listed(site.client.get(unescape(found[1]))) == [old]


BAD = {
    "kindd:mail": "There is no field kindd",
    "id:abc": "An id is a whole number, not abc",
    "id:99999999999999999999": "An id is a whole number",
    "status:done": "There is no status done; use waiting, ready",
    'error:"open': "needs a closing quote",
    "payload:{oops}": "not valid JSON",
    "payload.a = [1,": "not valid JSON",
    "payload:x": "no field is named before x",
    "payload.a:1 payload.b:2": "The search has payload twice",
    "key:a key:b": "The search has key twice",
    'key:"a"b': "put a space",
    'payload."\\u0000":1': "NUL character",
    'payload.a:"\\u0000"': "NUL character",
    'payload.a:{"b": "\\ud800"}': "not valid JSON",
    'key:"\\u0000"': "NUL character",
    'payload.a:{"b": 1e999999}': "not valid JSON",
    "payload:" + "[" * 290: "not valid JSON",
    "x" * 301: "at most 300",
}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("status:failed", ""),
        ("status = failed key:a", "key:a"),
        ('a status:"failed"  b', "a b"),
        ("status:ready payload.status:ready", "payload.status:ready"),
        ('status:failed error:"status:failed"', 'error:"status:failed"'),
        ('error:"a  b"', 'error:"a  b"'),
    ],
)
def test_a_tab_leaves_everything_of_a_search_but_its_status(site: Site, text: str, left: str) -> None:
    assert without(text, "status") == left
    page = site.client.get("/batches", params={"q": text}).text
    [address] = re.findall(r'<a id="tab-completed" href="([^"]*)"', page)
    assert site.client.get(unescape(address)).status_code == 200


def test_a_search_that_means_nothing_is_explained(conn: Conn, site: Site) -> None:
    insert(conn)
    for text in BAD:
        check_explained(site, text)


def check_explained(site: Site, text: str) -> None:
    """Check that the page says what is wrong with a search, keeps it in the field, and has no live part."""
    answer = site.client.get("/batches", params={"q": text})
    assert answer.status_code == 400
    found = re.search(r'id="f-problem" role="alert">(.*?)</p>', answer.text, re.DOTALL)
    assert found
    assert BAD[text].lower() in unescape(found[1]).lower()
    assert 'aria-invalid="true"' in answer.text
    assert text[:301] in unescape(answer.text)
    assert site.client.get("/live/batches/" + quote("q=" + quote(text), safe="")).status_code == 404


def test_texts_that_look_like_terms_are_words() -> None:
    for text in ("ValueError: no @ in", "https://example.com/x", "a == b", "12:30", "a", "x:", "=", "{", "[1", "\\"):
        assert parse(text) == Terms(words=text), text
    assert parse('"kindd:mail" key:a') == Terms(words="kindd:mail", key="a")
    assert parse(r'payload."a\"b".c:1').payload == InPayload(('a"b', "c"), "1", "1")
    assert parse("") == parse("  ") == Terms()
    for given in ("a", "a b", 'say "hi"', "{x", "\\", "/x", "=", HOSTILE, "a:b"):
        assert parse(term("key", given)) == Terms(key=given)


def test_no_search_whatever_it_is_breaks_the_page(conn: Conn, site: Site) -> None:
    insert(conn, payload={"a": {"b": [1, {"c": 2}]}})
    for text in (
        HOSTILE, "payload." + "a." * 100 + "b:1", "payload.-1.x:1", "payload.a.b:[1]", "payload.a.b.0:1",
        "payload.a:1e308",
        "payload.a:1e999", "payload.a:9" + "9" * 200, 'payload."":1', "payload.a:'", "\U0001f600",
        "\x01\x02", "a\r\nb", "key:" + HOSTILE, "worker:%", "id:1 id:1", "status:", ":", "payload.:1", "payload..a:1",
        '"', '""',
    ):  # fmt: skip
        assert site.client.get("/batches", params={"q": text}).status_code in (200, 400), text


# ------------------------------------------------------------------------------------------------- suggestions, columns


def test_queues_kinds_statuses_and_latest_errors_are_suggested_if_nothing_hides_in_them(conn: Conn, site: Site) -> None:
    insert(conn, kind="mail", queue="bulk")
    insert(conn, kind=HOSTILE)
    insert(conn, kind="<b>'\"")
    finished(conn, "failed", error='{"error": "OSError: the disk is full"}')
    lists = re.findall(r'<datalist id="([\w-]+)">(.*?)</datalist>', site.client.get("/batches").text, re.DOTALL)
    suggested = {name: [unescape(one) for one in re.findall(r'value="([^"]*)"', text)] for name, text in lists}
    assert suggested["f-queues"] == ["bulk", "default"]
    assert suggested["f-kinds"] == ["<b>'\"", "mail", "work"]
    assert 'error:"OSError: the disk is full"' in suggested["f-searches"]
    assert "status:stalled" in suggested["f-searches"]
    for text in suggested["f-searches"]:
        assert site.client.get("/batches", params={"q": text}).status_code == 200, text


def test_columns_are_chosen_kept_in_the_address_and_remembered(conn: Conn, site: Site) -> None:
    insert(conn, key="cust-7", unique_key="once", priority=3, run_at="2100-01-02 03:04:05+00")

    def columns(path: str) -> list[str]:
        return re.findall(r'<th scope="col"[^>]*>([A-Z][^<]*)</th>', site.client.get(path).text)[3:]

    assert columns("/batches") == ["Queue", "Progress", "Attempt", "Age", "Last error"]
    chosen = "/batches?column=id&column=unique_key&column=run_at&column=nonsense&status=scheduled"
    text = site.client.get(chosen).text
    assert "2100-01-02 03:04:05" in text
    assert "<bdi>once</bdi>" in text
    assert 'href="/batches?status=ready&amp;columns=id.unique_key.run_at"' in text
    assert columns("/batches") == ["Unique key", "Run at"], "remembered"
    assert columns("/batches?column=id") == []
    assert (
        columns("/batches?columns=default")
        == columns("/batches")
        == ["Queue", "Progress", "Attempt", "Age", "Last error"]
    )
    for text in ("id.<script>", "x", "id." + "a" * 500):
        site.client.cookies.set("batchq_columns", quote(text))
        assert site.client.get("/batches").status_code == 200, text


def test_the_live_part_is_that_of_the_first_page_with_its_filters(conn: Conn, site: Site) -> None:
    for number in range(60):
        insert(conn, kind="mail & more", payload={"n": number})
    page = site.client.get("/batches", params={"kind": "mail & more", "q": "payload.n:7", "sort": "newest"})
    found = re.search(r'data-live="([^"]*)"', page.text)
    assert found
    with site.client.stream("GET", found[1]) as answer:
        text = ""
        for line in answer.iter_lines():
            text += line.removeprefix("data: ") + "\n"
            if "piece-pager" in text and "</nav>" in text.split("piece-pager")[1]:
                break
    assert text.split('id="piece-tabs"')[1].split("</nav>")[0].strip() in page.text
    assert re.findall(r'href="/batches/(\d+)">', text) == ["8"]
    step("an older page is not live, and says so")
    older = site.client.get("/batches", params={"before": "30"})
    assert "data-live" not in older.text
    assert "This page does not update itself." in older.text
    assert "live.js" not in older.text


# ------------------------------------------------------------------------------------------------- selected rows


def act(site: Site, verb: str, chosen: list[int], **fields: object) -> str:
    """Do an action to selected batches; return what the page says."""
    asked = site.client.get(f"/chosen/{verb}", params={"id": [str(one) for one in chosen], "back": "kind=work"})
    assert asked.status_code == 200, asked.text
    token = re.search(r'name="form_token" value="(\w+)"', asked.text)
    assert token
    answer = site.post(f"/chosen/{verb}", token[1], ids=",".join(map(str, chosen)), back="kind=work", **fields)
    found = re.search(r'id="chosen-said"[^>]*>(.*?)</p>', answer.text, re.DOTALL)
    assert found, answer.text
    assert 'href="/batches?kind=work"' in answer.text
    return re.sub(r"<[^>]*>", "", unescape(found[1])).strip()


def test_selected_batches_are_cancelled_and_those_that_had_ended_are_told(conn: Conn, site: Site) -> None:
    made = one_of_each(conn)
    chosen = [*made.values(), 999]
    asked = site.client.get("/chosen/cancel", params={"id": [str(one) for one in chosen]}).text
    for status in STATUSES:
        assert f"1 {status}" in asked, status
    said = "6 batches cancelled. 3 have ended already. 1 is not stored any more."
    assert "6 would be cancelled." in asked
    assert "3 have ended already." in asked
    assert values(conn, "SELECT count(*) FROM batchq.audit") == [0], "asking changes nothing"
    assert act(site, "cancel", chosen, reason="too many", actor="ann") == said
    assert value(conn, "SELECT count(*) FROM batchq.all_batches WHERE status = 'cancelled'") == 7
    step("each has its row in the audit")
    assert values(conn, "SELECT DISTINCT (verb, reason, actor)::text FROM batchq.audit") == ['(cancel,"too many",ann)']
    assert values(conn, "SELECT batch_id FROM batchq.audit ORDER BY 1") == sorted(
        made[name] for name in ("waiting", "ready", "scheduled", "retrying", "processing", "stalled")
    )
    assert act(site, "cancel", chosen) == "0 batches cancelled. 9 have ended already. 1 is not stored any more."


DONE = {  # what each action does to one batch of each status
    "retry": "4 batches made pending again. 1 is completed: nothing is left to retry. 1 waits for other batches. "
    "2 are running. 1 is ready already.",
    "run_now": "2 batches made ready. 3 have ended already. 1 waits for other batches. 2 are running. "
    "1 is ready already.",
    "run_anyway": "1 batch made pending. 5 wait for no other batch. 3 have ended already.",
    "retry_items": "0 batches made pending again. 3 have not ended. 3 have no failed items. 1 waits for other batches. "
    "2 are running.",
    "retry_whole": "3 batches made pending again. 3 have not ended. 1 waits for other batches. 2 are running.",
    "snooze": "3 batches snoozed. 3 have ended already. 1 waits for other batches. 2 are running.",
    "set_priority": "3 batches given the new priority. 3 have ended already. 1 waits for other batches. 2 are running.",
    "move": "3 batches moved. 3 have ended already. 1 waits for other batches. 2 are running.",
    "cancel": "6 batches cancelled. 3 have ended already.",
    "cancel_with_dependents": "1 batch cancelled. 5 wait for no other batch. 3 have ended already.",
}
FIELDS: dict[str, dict[str, object]] = {
    "snooze": {"minutes": 5},
    "set_priority": {"priority": 7},
    "move": {"to_queue": "b"},
}


@pytest.mark.parametrize("verb", DONE)
def test_every_action_says_what_it_changed_and_why_it_left_the_others(conn: Conn, site: Site, verb: str) -> None:
    made = one_of_each(conn)
    said = act(site, verb, list(made.values()), **FIELDS.get(verb, {}))
    assert set(said.split(". ")) == set(DONE[verb].split(". ")) or sorted(said) == sorted(DONE[verb]), said
    changed = int(said.split()[0])
    assert value(conn, "SELECT count(DISTINCT batch_id) FROM batchq.audit") == changed
    if verb == "run_now":
        assert values(conn, "SELECT count(*) FROM batchq.status WHERE status = 'ready'") == [3]


def test_what_is_as_it_should_be_and_what_is_refused_is_told(conn: Conn, site: Site) -> None:
    same, other = insert(conn, priority=7), insert(conn)
    said = act(site, "set_priority", [same, other], priority=7)
    assert said.startswith("1 batch given the new priority. 1 is as it should be already")
    keyed = finished(conn, "failed", unique_key="a", kind="mail")
    insert(conn, unique_key="a", kind="mail")
    assert f"1 was refused: batch {keyed} cannot be retried" in act(site, "retry", [keyed])


def test_what_cannot_be_selected_is_said(conn: Conn, site: Site, dsn: str) -> None:
    batch_id = insert(conn)
    for query, problem in {
        "": "No batches selected; tick the boxes",
        "id=x": "Not the id of a batch: x",
        "id=%3Cscript%3E": "Not the id of a batch: &lt;script&gt;",
        "&".join(f"id={n}" for n in range(1, MOST_CHOSEN + 2)): "201 batches are selected; select at most 200",
    }.items():
        answer = site.client.get(f"/chosen/cancel?{query}")
        assert (answer.status_code, problem in answer.text) == (409, True), answer.text
    answer = site.client.get(f"/chosen/set_priority?id={batch_id}&id={batch_id}")
    assert "1 selected batch?" in answer.text
    token = site.form_token(f"/chosen/set_priority?id={batch_id}")
    answer = site.post("/chosen/set_priority", token, ids=str(batch_id), priority="high")
    assert (answer.status_code, "Priority must be a whole number from -32768" in answer.text) == (409, True)
    assert site.post("/chosen/cancel", "forged", ids=str(batch_id)).status_code == 403
    for path in ("/chosen/pause", "/chosen/nothing"):
        assert site.client.get(f"{path}?id=1").status_code == 404
    step("a read-only web UI has no boxes and refuses")
    with served(dsn, read_only=True) as other:
        assert other.client.get(f"/chosen/cancel?id={batch_id}").status_code == 403
        text = other.client.get("/batches").text
        assert 'type="checkbox" name="id"' not in text
        assert "chosen-bar" not in text
    assert value(conn, "SELECT count(*) FROM batchq.audit") == 0


def test_the_way_back_leads_to_the_list_only(conn: Conn, site: Site) -> None:
    batch_id = insert(conn)
    for back in ("//evil.example/", 'x="><script>', "javascript:alert(1)", "\u202e", "a=1&a=2"):
        text = site.client.get("/chosen/cancel", params={"id": str(batch_id), "back": back}).text
        [address] = re.findall(r'href="([^"]*)">Go back', text)
        assert address.startswith("/batches"), back
        assert "<script>" not in text


def test_hostile_texts_in_every_column_are_text(conn: Conn, site: Site) -> None:
    insert(conn, kind=HOSTILE, queue=HOSTILE, key=HOSTILE, unique_key=HOSTILE, payload={HOSTILE: HOSTILE})
    processing(conn, worker=HOSTILE)
    columns = ".".join(["id", *batch_list.COLUMNS])
    queries = (
        {"columns": columns}, {"q": f"key:{HOSTILE}"}, {"q": HOSTILE}, {"kind": HOSTILE, "queue": HOSTILE},
        {"q": term("unique_key", HOSTILE)}, {"q": 'payload."' + HOSTILE.replace('"', '\\"') + '":1'},
    )  # fmt: skip
    for given in queries:
        text = site.client.get("/batches", params=given).text
        assert "<img" not in text, given
        assert "<script>x" not in text
        assert "\u202e" not in re.sub(r'value="[^"]*"', "", text), "but in fields, which are sent back"


if __name__ == "__main__":
    run_alone(__file__)
