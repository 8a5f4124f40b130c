"""Alarms and dashboard in the real Prometheus: worker and page are scraped, the alarm of stalled batches fires and
clears."""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import batchq
from tests.component.rows import Conn, expire_lease, processing
from tests.support.alone import run_alone
from tests.support.batches import put, wait_for_status
from tests.support.processes import ROOT, Processes
from tests.support.programs import path_of
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import Site, served

app = batchq.App()  # of the worker process


@app.handler("mail")
def mail(batch: batchq.Batch) -> None:
    """Do nothing, well."""


MONITORING = ROOT / "docs" / "monitoring"
RULES = MONITORING / "alerts.yml"
WAIT_SECONDS = 90.0


class Prometheus:
    """A Prometheus of the test's own, that scrapes twice a second."""

    def __init__(self, port: int) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", trust_env=False, timeout=30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what an expression gives now; nothing while Prometheus starts."""
        try:
            answer = self.client.get("/query", params={"query": expression})
        except httpx.ConnectError:
            return []
        if answer.status_code == 503:
            return []
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["data"]["result"]
        return found

    def firing(self) -> set[str]:
        """Return the names of the alarms that fire."""
        return {one["metric"]["alertname"] for one in self.query('ALERTS{alertstate="firing"}')}


@contextmanager
def prometheus(directory: Path, targets: dict[str, int]) -> Iterator[Prometheus]:
    """Run Prometheus on our rules, with short times, while the block runs."""
    rules = re.sub(r"for: \w+", "for: 1s", RULES.read_text(encoding="utf-8"))
    (directory / "alerts.yml").write_text(rules, encoding="utf-8")
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]} for name, port in targets.items()
    ]
    times = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config = {"global": times, "rule_files": ["alerts.yml"], "scrape_configs": jobs}
    (directory / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
    port = free_port()
    command = [path_of("prometheus"), f"--config.file={directory}/prometheus.yml", "--log.level=warn",
               f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
    with (directory / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        made = Prometheus(port)
        try:
            wait_until(lambda: made.query("vector(1)"), WAIT_SECONDS, "Prometheus to answer")
            yield made
        finally:
            made.client.close()
            process.terminate()


def test_the_rules_are_right() -> None:
    done = subprocess.run([path_of("promtool"), "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "9 rules found" in done.stdout


def test_each_alarm_is_explained() -> None:
    names = re.findall(r"alert: (\w+)", RULES.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert names == re.findall(r"^\| `(Batchq\w+)` \|", text, re.MULTILINE)


@pytest.fixture
def site(dsn: str) -> Iterator[Site]:
    """Serve the page."""
    with served(dsn) as site:
        yield site


def test_a_worker_and_the_page_are_scraped_and_the_alarm_fires_and_clears(
    conn: Conn, dsn: str, site: Site, tmp_path: Path
) -> None:
    port = free_port()
    with Processes(dsn, "tests.e2e.test_prometheus:app") as processes:
        worker = processes.worker(metrics_port=port)
        done = put(conn, "mail")
        wait_for_status(conn, done, "completed", WAIT_SECONDS)
        with prometheus(tmp_path, {"batchq": port, "batchq-page": site.port}) as prom:
            step("both are scraped")
            wait_until(lambda: len(prom.query('up{job=~"batchq.*"} == 1')) == 2, WAIT_SECONDS, "both to be scraped")
            counted = 'batchq_batches_finished_total{kind="mail",status="completed"} == 1'
            wait_until(lambda: prom.query(counted), WAIT_SECONDS, "the batch to be counted")
            step("every expression of the dashboard is understood, and most have something to show")
            shown = [bool(prom.query(expression)) for expression in dashboard()]
            assert sum(shown) >= 3, shown
            step("a batch of a queue that nobody serves stalls")
            lost = processing(conn, queue="unserved")
            expire_lease(conn, lost.id, 60)
            wait_until(lambda: "BatchqStalled" in prom.firing(), WAIT_SECONDS, "the alarm to fire")
            step("it is cancelled: the alarm clears")
            conn.execute("SELECT batchq.cancel(%s)", [lost.id])
            wait_until(lambda: "BatchqStalled" not in prom.firing(), WAIT_SECONDS, "the alarm to clear")
            step("the worker goes: the target is down")
            worker.kill()
            wait_until(lambda: "BatchqTargetDown" in prom.firing(), WAIT_SECONDS, "the alarm to fire")


def dashboard() -> list[str]:
    """Return the expressions of the dashboard."""
    panels = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    return [target["expr"].replace("$__rate_interval", "30s") for panel in panels for target in panel["targets"]]


if __name__ == "__main__":
    run_alone(__file__)
