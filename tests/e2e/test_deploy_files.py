"""The files of docs/deploy parse, and the commands, flags and settings in them exist and work."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml

import batchq
from batchq.cli import make_parser
from batchq.cli.signals import SPARE_SECONDS
from batchq.settings import Settings
from batchq.web.metrics import STATES, metrics_of_several, queue_metrics
from batchq.web.settings import WebSettings
from batchq.worker.metrics import worker_metrics
from batchq.worker.throughput import Counts
from tests.support.alone import run_alone
from tests.support.commands import CommandLine
from tests.support.processes import ROOT
from tests.support.servers import free_port
from tests.support.steps import step
from tests.support.waiting import wait_until
from tests.support.web import answers

FOLDER = ROOT / "docs" / "deploy"
UNITS = sorted(FOLDER.glob("*.service"))
YAML = sorted(FOLDER.glob("*.yaml"))
SETTINGS = {f"BATCHQ_{name.upper()}" for name in Settings.model_fields}
SETTINGS |= {f"BATCHQ_WEB_{name.upper()}" for name in WebSettings.model_fields}
BATCHQ = Path(sys.executable).with_name("batchq")


def unit(file: Path) -> dict[str, list[str]]:
    """Return what a unit sets, by name."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def objects(file: Path) -> list[Any]:
    """Return the documents of a YAML file."""
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def every(value: Any, name: str) -> Iterator[Any]:
    """Yield each value of that name, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == name:
                yield inner
            yield from every(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from every(inner, name)


def manifest(kind: str, name: str) -> Any:
    """Return an object of the Kubernetes file."""
    [found] = [
        each for each in objects(FOLDER / "kubernetes.yaml") if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found


def commands(file: Path) -> list[list[str]]:
    """Return the commands of batchq in a file, each in words."""
    if file.suffix == ".service":
        words = [
            shlex.split(value) for name, values in unit(file).items() if name.startswith("Exec") for value in values
        ]
    elif file.suffix == ".yaml":
        words = [command for document in objects(file) for command in every(document, "command")]
    else:
        words = [json.loads(found) for found in re.findall(r"CMD (\[.*\])", file.read_text())]
    return [command for command in words if Path(command[0]).name == "batchq"]


FILES = [*UNITS, *YAML, FOLDER / "Dockerfile"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_and_flags_exist(file: Path) -> None:
    found = commands(file)
    assert found, "no command of batchq"
    for words in found:
        step("%s", " ".join(words))
        make_parser().parse_args(words[1:])  # leaves by SystemExit for what it does not know


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_names_in_the_environment_are_settings(file: Path) -> None:
    named = set(re.findall(r"\bBATCHQ_[A-Z_]+\b", file.read_text()))
    assert named <= SETTINGS
    assert named or file.name == "Dockerfile"


def test_the_platform_waits_for_longer_than_a_worker_may_take() -> None:
    graces: dict[str, tuple[float, float]] = {}
    for file in UNITS:
        shutdown = re.search(r"BATCHQ_SHUTDOWN_SECONDS=(\d+)", file.read_text())
        assert shutdown
        graces[file.name] = float(unit(file)["TimeoutStopSec"][0]), float(shutdown[1])
    deployment = manifest("Deployment", "batchq-workers")
    [environment] = every(deployment, "env")
    shutdown_text = next(each["value"] for each in environment if each["name"] == "BATCHQ_SHUTDOWN_SECONDS")
    graces["kubernetes"] = next(every(deployment, "terminationGracePeriodSeconds")), float(shutdown_text)
    workers = objects(FOLDER / "compose.yaml")[0]["services"]["workers"]
    shutdown_seconds = float(workers["environment"]["BATCHQ_SHUTDOWN_SECONDS"])
    graces["compose"] = float(workers["stop_grace_period"].removesuffix("s")), shutdown_seconds
    step("%s", graces)
    assert all(grace >= shutdown + SPARE_SECONDS + 2 for grace, shutdown in graces.values())


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_a_unit_stops_its_processes_as_they_want_it(file: Path) -> None:
    its = unit(file)
    assert its["KillMode"] == ["mixed"], "SIGTERM to the main process alone; the rest is killed at the end"
    assert its["Restart"] == ["always"]
    assert its["StartLimitIntervalSec"] == ["0"], "else systemd gives up while the database is away"


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_systemd_takes_a_unit(file: Path, tmp_path: Path) -> None:
    text = file.read_text().replace("/opt/app/.venv/bin/batchq", str(BATCHQ))
    (tmp_path / file.name).write_text(text)
    sections = re.findall(r"^\[(\w+)\]$", text, re.M)
    assert sections == ["Unit", "Service", "Install"]
    if program := shutil.which("systemd-analyze"):
        step("systemd-analyze verify %s", file.name)
        done = subprocess.run([program, "verify", tmp_path / file.name], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_kubernetes_objects_belong_together() -> None:
    deployment, scaler = (manifest(kind, "batchq-workers") for kind in ("Deployment", "HorizontalPodAutoscaler"))
    labels = deployment["spec"]["selector"]["matchLabels"]
    assert deployment["spec"]["template"]["metadata"]["labels"] == labels
    assert manifest("PodDisruptionBudget", "batchq-workers")["spec"]["selector"]["matchLabels"] == labels
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaler["spec"]["minReplicas"] == deployment["spec"]["replicas"]
    rolling = deployment["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxSurge": 1, "maxUnavailable": 0}, "a new one comes before an old one leaves"


def test_the_check_of_the_image_passes_while_the_database_answers_and_fails_while_it_does_not(
    conn: psycopg.Connection[Any], dsn: str, tmp_path: Path
) -> None:
    [words] = [words[1:] for words in commands(FOLDER / "Dockerfile") if words[1] == "status"]
    batchq.enqueue(conn, "unknown")  # nobody works it: the business of an alarm, and none of a probe's
    assert CommandLine(dsn, tmp_path)(*words).code == 0
    assert CommandLine("host=127.0.0.1 port=1 dbname=away", tmp_path)(*words).code != 0


def test_the_probes_ask_where_the_manifests_command_answers(
    conn: psycopg.Connection[Any], dsn: str, tmp_path: Path
) -> None:
    deployment = manifest("Deployment", "batchq-workers")
    [container] = next(every(deployment, "containers"))
    probes = {name: value["httpGet"] for name, value in container.items() if name.endswith("Probe")}
    paths = {name: probe["path"] for name, probe in probes.items()}
    assert paths == {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    options = make_parser().parse_args(container["command"][1:])
    assert {str(probe["port"]) for probe in probes.values()} == {options.set_metrics_port}
    assert [port["containerPort"] for port in container["ports"]] == [int(options.set_metrics_port)]
    assert options.set_metrics_host == "0.0.0.0", "the probes come from outside of the container"
    port = free_port()
    words = [word.replace(options.set_metrics_port, str(port)) for word in container["command"][1:]]
    batchq.enqueue(conn, "unknown")  # nobody works it: no business of a probe's
    with started(words, CommandLine(dsn, tmp_path).environment, tmp_path):
        for path in paths.values():
            wait_until(lambda path=path: answers(f"http://127.0.0.1:{port}{path}"), 60, path)
        assert not answers(f"http://127.0.0.1:{port}/ready")


def test_the_page_is_served_as_the_files_have_it_and_refuses_who_does_not_log_in(dsn: str, tmp_path: Path) -> None:
    deployment, service = manifest("Deployment", "batchq-web"), manifest("Service", "batchq-web")
    [container] = next(every(deployment, "containers"))
    assert deployment["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]
    options = make_parser().parse_args(container["command"][1:])
    listens = [port["containerPort"] for port in container["ports"]] + [
        each["port"] for each in every(container, "tcpSocket")
    ]
    assert set(listens) == {options.port}
    [hosts] = [each["value"] for each in container["env"] if each["name"] == "BATCHQ_WEB_HOSTS"]
    name = service["metadata"]["name"]
    assert hosts.split(",") == [name, ".svc", ".svc.cluster.local"], "as other namespaces call it, too"
    compose = objects(FOLDER / "compose.yaml")[0]["services"]["web"]
    assert compose["ports"] == ["127.0.0.1:8080:8080"], "for others it needs a proxy with TLS"
    for words in (container["command"], compose["command"]):
        port = free_port()
        command = [word for word in words[1:] if word not in ("--port", str(options.port))]
        environment = CommandLine(dsn, tmp_path).environment | {
            "BATCHQ_WEB_PASSWORD": "correct horse", "BATCHQ_WEB_TOKEN": "battery staple", "BATCHQ_WEB_HOSTS": hosts
        }  # fmt: skip
        ends = (0, -signal.SIGTERM)  # uvicorn closes everything, and then passes the signal on
        with started([*command, "--port", str(port)], environment, tmp_path, ends):
            wait_until(lambda port=port: answers(f"http://127.0.0.1:{port}/login"), 60, "the login")
            url = f"http://127.0.0.1:{port}/metrics"
            for host in (name, f"{name}.jobs.svc", f"{name}.jobs.svc.cluster.local"):
                with httpx.Client(trust_env=False, headers={"Host": f"{host}:8080"}) as client:
                    assert client.get(url).status_code == 401
                    assert "batchq_workers" in client.get(url, headers={"Authorization": "Bearer battery staple"}).text


@contextmanager
def started(
    words: list[str], environment: dict[str, str], directory: Path, ends: tuple[int, ...] = (0,)
) -> Iterator[None]:
    """Run a command of batchq while the block runs; it must end well when it is told to, with one of these codes."""
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [BATCHQ, *words], cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        yield
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) in ends, (directory / "log").read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


METRIC = re.compile(r"\bbatchq_[a-z_]+\b")


def exported() -> set[str]:
    """Return the names of the series that workers and the page export."""
    counts = Counts(ends={"completed": 1})
    row = dict.fromkeys((*STATES, "stalled", "failed", "workers", "waiting_for_failed"), 1)
    families = [
        *worker_metrics({("q", "k"): counts}, {"def": (8, 1)}),
        *queue_metrics(
            [
                {"queue": "q", "kind": "k", "oldest_wait_seconds": 1, "held_back": 1, "held_back_by": "max_running"}
                | row
            ],
            1,
            [{"queue": "q", "kind": "k", "max_running": 1, "running": 1, "per_second": None, "items_per_second": None}],
            [
                {"name": "s", "state": "active", "error": None, "last_status": None, "last_late_seconds": 0}
                | dict.fromkeys(("overdue_seconds", "batches_made", "ticks_missed", "ticks_overlapped"), 0)
            ],
        ),
        *metrics_of_several({"eu": []}),
    ]
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize(
    "file", ["deploy/kubernetes.yaml", "monitoring/alerts.yml", "monitoring/dashboard.json", "monitoring.md"]
)
def test_metrics_that_are_named_are_exported(file: str) -> None:
    text = (ROOT / "docs" / file).read_text(encoding="utf-8")
    named = set(METRIC.findall(text)) - {"batchq_batch_run_seconds"}  # the family of a histogram
    step("%s names %s", file, sorted(named))
    assert named
    assert named - exported() == set()


def test_the_scaler_looks_at_what_is_ready_in_a_queue_that_the_workers_serve() -> None:
    [scaler] = [each for each in objects(FOLDER / "kubernetes.yaml") if each["kind"] == "HorizontalPodAutoscaler"]
    [metric] = every(scaler, "metric")
    assert metric == {"name": "batchq_queue_depth", "selector": {"matchLabels": {"queue": "default", "state": "ready"}}}
    [depth] = [family for family in queue_metrics([], 0, []) if family.name == metric["name"]]
    assert {"queue", "state"} <= set(depth._labelnames)
    assert "ready" in STATES
    assert Settings.model_fields["queues"].default == ("default",)


@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.name)
def test_the_command_of_a_unit_works_and_stops(
    conn: psycopg.Connection[Any], dsn: str, tmp_path: Path, file: Path
) -> None:
    [words] = commands(file)
    commandline = CommandLine(dsn, tmp_path)  # leaves a tasks.py there
    variables = dict(word.split("=", 1) for line in unit(file)["Environment"] for word in line.split())
    step("given %s", " ".join(words))
    with started(words[1:], commandline.environment | variables, tmp_path):
        batchq.enqueue(conn, "good")
        status = "SELECT status FROM batchq.batches"
        wait_until(lambda: conn.execute(status).fetchall() == [("completed",)], 60, "completion")


if __name__ == "__main__":
    run_alone(__file__)
