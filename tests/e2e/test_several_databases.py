"""Two servers, of which one is stopped and started again: the page, `batchq top` and the workers show it and go on."""

import asyncio
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import psycopg
import pytest

import batchq
from batchq.cli.top.app import Top
from batchq.cli.top.several import DatabasesView, DatabaseView, Several
from batchq.cli.top.source import Source
from batchq.operate.watch import Watch
from batchq.postgres.databases import Database
from batchq.postgres.embedded import EmbeddedServer
from batchq.postgres.link import Link
from batchq.postgres.statements.totals import totals
from tests.support.alone import run_alone
from tests.support.processes import Processes
from tests.support.screen import NARROW, cells, lines, state, until
from tests.support.several import served_several, settings, two_servers, wait_until_done
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import Site

Servers = tuple[EmbeddedServer, EmbeddedServer]
WAIT_SECONDS = 60
APP = "tests.support.several:app"


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Return two servers of this test's own."""
    with two_servers() as servers:
        yield servers


def enqueue(server: EmbeddedServer) -> int:
    """Enqueue a batch on a server."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        return batchq.enqueue(conn, "noop")


def wait_until_shown(site: Site, text: str) -> str:
    """Wait until the page of all databases shows a text; return what it shows."""

    def page() -> str:
        shown = re.sub(r"<[^>]*>", " ", site.client.get("/").text.partition("<main")[2])
        return shown if text in " ".join(shown.split()) else ""

    return wait_until(page, WAIT_SECONDS, f"{text!r} on the page")


def test_the_page_shows_a_server_that_stops_and_comes_back_while_the_other_goes_on(servers: Servers) -> None:
    eu, us = servers
    with served_several(eu=eu.dsn(), us=us.dsn()) as site, site.client.stream("GET", "/live/databases") as stream:
        live = stream.iter_lines()
        wait_until_shown(site, "2 up · 0 away")
        us.stop()
        wait_until_shown(site, "us away for ")
        assert any("1 database up, 1 away" in line for line in live)
        enqueue(eu)
        wait_until_shown(site, "eu up 1 0 0 0")
        assert site.client.get("/db/eu/").status_code == 200
        assert site.client.get("/db/us/").status_code == 503
        assert 'batchq_database_up{database="us"} 0.0' in site.client.get("/metrics").text
        step("back: nobody has to do anything")
        us.open({})
        enqueue(us)
        wait_until_shown(site, "us up 1 0 0 0")
        assert any("2 databases up, 0 away" in line for line in live)
        assert site.client.get("/db/us/").status_code == 200
        assert 'batchq_database_up{database="us"} 1.0' in site.client.get("/metrics").text


def test_top_shows_a_server_that_stops_and_comes_back_while_the_other_goes_on(servers: Servers) -> None:
    eu, us = servers

    async def run(screen: Top, pilot: Any) -> None:
        await until(pilot, lambda: rows(screen) == [["eu", "up"], ["us", "up"]])
        step("one stops: its row and the line on top say so; the other one is read as before")
        await asyncio.to_thread(us.stop)
        await until(pilot, lambda: rows(screen)[1][1].startswith("away"))
        assert "us: away" in state(screen)
        assert state(screen).startswith("1 database up  away 1")
        await asyncio.to_thread(enqueue, eu)
        await until(pilot, lambda: cells(screen, "databases")[0][:3] == ["eu", "up", "1"])
        step("Enter leads to one database, and q back; also to one that is away")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(screen.screen, DatabaseView) and "ready 1" in state(screen))
        assert state(screen).startswith("eu: ready 1")
        await pilot.press("q", "down", "enter")
        await until(pilot, lambda: state(screen).startswith("us: the database is unavailable"))
        step("it starts again, and is there")
        await asyncio.to_thread(us.open, {})
        await until(pilot, lambda: state(screen).startswith("us: ready 0"))
        await pilot.press("q")
        await until(pilot, lambda: isinstance(screen.screen, DatabasesView) and rows(screen)[1] == ["us", "up"])
        assert state(screen).startswith("2 databases up")
        assert max(map(len, lines(screen))) <= NARROW[0]

    on_screen_of_several(servers, run)


def rows(screen: Top) -> list[list[str]]:
    """Return name and state of each database in the table."""
    return [row[:2] for row in cells(screen, "databases")] or [["", ""], ["", ""]]


def on_screen_of_several(servers: Servers, act: Any) -> None:
    """Run the full screen on two servers, without a terminal, and *act* on it."""
    named = [Database(name, server.dsn()) for name, server in zip(("eu", "us"), servers, strict=True)]
    options = Namespace(queue=None, kind=None)

    async def run(several: Several) -> None:
        screen = Top(several.sources["eu"], 0.1, several=several)
        async with screen.run_test(size=NARROW) as pilot:
            await act(screen, pilot)

    with closing(Watch(named, totals)) as watch, ExitStack() as links:
        opened = {each.name: links.enter_context(closing(Link(each.dsn, 5))) for each in named}
        asyncio.run(run(Several(watch, {name: Source(link, options, "ann") for name, link in opened.items()})))


def test_workers_of_one_server_never_stop_while_the_other_is_away_at_the_start_and_later(servers: Servers) -> None:
    eu, us = servers
    both = settings(eu=eu.dsn(), us=us.dsn())
    us.stop()
    with Processes(eu.dsn(), APP) as processes, psycopg.connect(eu.dsn(), autocommit=True) as conn:
        supervisor = processes.run("workers", "1", APP, **both)
        supervisor.wait_for("worker process exited", database="us")
        wait_until_done(conn, enqueue(eu))
        step("it is there: its workers start, and those of the other one are as before")
        us.open({})
        work_on(us)
        before = set(supervisor.children())
        step("it stops and starts again: its workers stay, and go on")
        us.stop()
        supervisor.wait_for("database error")
        wait_until_done(conn, enqueue(eu))
        us.open({})
        work_on(us)
        assert set(supervisor.children()) == before
        assert supervisor.stop() == 0


def work_on(server: EmbeddedServer) -> None:
    """Wait until a worker has run a batch of a server."""
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        wait_until_done(conn, enqueue(server))


if __name__ == "__main__":
    run_alone(__file__)
