"""Every page of the web UI, found by following its links, each kind of page once; and a queue that has all of them."""

import re
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import psycopg
from psycopg.types.json import Jsonb

import batchq
from batchq.postgres.statements import workers
from tests.component.rows import insert, processing
from tests.support.scene import set_flow, set_scene, set_spread

LINK = re.compile(r'href="([^"]+)"')
NUMBER = re.compile(r"\d+")
SKIPPED = ("/static/", "/live/")
LONG = "recalculate_the_recommendations_of_all_customers_in_the_european_union"


def set_everything(conn: psycopg.Connection[Any]) -> list[str]:
    """Fill a queue so that no page is empty, with long names among the short ones; return addresses of its batches."""
    running, waiting, (spread, _) = set_scene(conn), set_flow(conn), set_spread(conn)
    insert(conn, kind=LONG, queue=f"{LONG}_2", key="customer 4711", payload={"a": {"b": [1, 2, {"c": "d" * 300}]}})
    processing(conn, kind=LONG, worker=f"{LONG}-4711-5eed")
    conn.execute("INSERT INTO batchq.limits (queue, kind, max_running, per_second) VALUES ('bulk', 'geocode', 1, 2.5)")
    conn.execute(
        "INSERT INTO batchq.schedules (name, cron, time_zone, kind, next_at) VALUES"
        " ('nightly ' || repeat('x', 60), '0 3 * * *', 'Europe/Berlin', 'report', now() + interval '3 hours')"
    )
    conn.execute("INSERT INTO batchq.pauses (kind, reason) VALUES (%s, %s)", ["geocode", "the provider is down today"])
    ready = batchq.enqueue(conn, "send_receipt", unique_key="order 5")
    return [*(f"/batches/{each}" for each in (running, waiting, spread, ready)), f"/flow/{waiting}"]


def set_hostile(conn: psycopg.Connection[Any], text: str) -> list[str]:
    """Fill a queue with a text wherever strangers can put one; return addresses of its batches."""
    bad: dict[str, Any] = {"kind": text, "queue": text[:200]}
    failed = batchq.enqueue(conn, payload={text: [text, {text: text}]}, items=[text], **bad)
    error = {"attempt": 1, "at": text, "error": text, "traceback": text}
    conn.execute(
        "UPDATE batchq.batches SET status = 'failed', errors = jsonb_build_array(%s::jsonb), attempt = 1,"
        " finished_at = now(), result = %s, cursor = %s WHERE id = %s",
        [Jsonb(error), Jsonb(text), Jsonb({text: text}), failed],
    )
    running = processing(conn, worker=text, payload=[text], **bad)
    waiting = batchq.enqueue(conn, after=[running.id], unique_key=text, **bad)
    keyed, _ = (batchq.enqueue(conn, key=text, **bad) for _ in range(2))
    conn.execute("INSERT INTO batchq.limits (queue, kind, max_running) VALUES (%s, %s, 1)", [bad["queue"], text])
    conn.execute("INSERT INTO batchq.pauses (queue, reason, actor) VALUES (%s, %s, %s)", [bad["queue"], text, text])
    conn.execute(
        "INSERT INTO batchq.schedules (name, cron, time_zone, queue, kind, next_at, error)"
        " VALUES (%s, '0 3 * * *', 'UTC', %s, %s, now() + interval '3 hours', %s)",
        [text, bad["queue"], text, text],
    )
    row = workers.WorkerRow(text, text, 1, text, [text], [text], 1)
    conn.execute(*workers.heartbeat(row, 0, stopping=False))
    conn.execute("SELECT batchq.cancel(%s, reason => %s)", [keyed, text])
    return [*(f"/batches/{each}" for each in (failed, running.id, waiting, keyed)), f"/flow/{waiting}"]


def shape(address: str) -> str:
    """Return what pages of one kind have in common: the path, and the names of the parameters, without numbers."""
    parts = urlsplit(address)
    names = sorted(pair.partition("=")[0] for pair in parts.query.split("&") if pair)
    return NUMBER.sub("N", parts.path) + "?" + "&".join(names)


def addresses(client: httpx.Client, first: list[str], base: str = "") -> list[str]:
    """Return the addresses of pages: the overview, *first*, and those that links lead to from there, one of each shape.
    Raises AssertionError if one does not answer."""
    found: list[str] = []
    shapes: set[str] = set()
    waiting = [f"{base}/", *(base + each for each in first)]
    known, chosen = set(waiting), set(waiting)
    while waiting:
        address = waiting.pop(0)
        if shape(address) in shapes and address not in chosen:
            continue
        shapes.add(shape(address))
        answer = client.get(address, follow_redirects=True)
        assert answer.status_code < 400, (address, answer.status_code, answer.text[:500])
        found.append(address)
        for link in LINK.findall(answer.text):
            target = urljoin(str(answer.url), link.replace("&amp;", "&").partition("#")[0])
            path = target.removeprefix(str(client.base_url).rstrip("/"))
            if (
                path not in known
                and path.startswith(f"{base}/")
                and not path.startswith(tuple(base + s for s in SKIPPED))
                and not path.endswith(".json")
            ):
                known.add(path)
                waiting.append(path)
    return found
