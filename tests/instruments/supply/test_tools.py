"""The commands of bin/supply that install tools: run by .ci/run, and not a part of `bin/test`."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from batchq.common.version import __version__
from tests.instruments.supply import audit, locks, sbom, tools
from tests.support.servers import free_port

VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
print(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read()))
"""


def test_the_bill_of_materials_is_valid_and_names_what_the_container_installs() -> None:
    text = sbom.make()
    done = subprocess.run(
        [tools.program("python"), "-c", VALIDATE], input=text, capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n", done.stdout
    bill = json.loads(text)
    here = locks.environment("3.11")
    pins = {(pin.name, pin.version) for pin in locks.read("container") if locks.holds(pin.marker, here)}
    named = {tuple(each["purl"].removeprefix("pkg:pypi/").split("@")) for each in bill["components"]}
    assert named == pins
    assert all(each["licenses"] for each in bill["components"])
    assert bill["metadata"]["component"]["version"] == __version__
    assert bill["metadata"]["timestamp"]


@contextmanager
def advisories(known: dict[tuple[str, str], str]) -> Iterator[str]:
    """Serve advisories, by name and version, as OSV does; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, version = query["package"]["name"], query["version"]
            answer: dict[str, Any] = {}
            if (name, version) in known:
                package = {"name": name, "ecosystem": "PyPI"}
                ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99"}]}]
                answer = {"vulns": [{"id": known[name, version], "affected": [{"package": package, "ranges": ranges}]}]}
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
        server.shutdown()
        thread.join()


def test_a_known_vulnerability_of_a_locked_version_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    pin = next(pin for pin in locks.read("container") if pin.name == "starlette")
    with advisories({audit.CANARY: "OLD-1", (pin.name, pin.version): "NEW-1"}) as url:
        assert audit.main(url) == audit.FOUND
    assert f"starlette {pin.version}: NEW-1, fixed in 99\n" in capsys.readouterr().out


def test_only_a_service_that_knows_advisories_clears_the_locked_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with advisories({audit.CANARY: "OLD-1"}) as url:
        assert audit.main(url) == audit.NOTHING_FOUND
    with advisories({}) as url:
        assert audit.main(url) == audit.NOT_AUDITED
    assert "NOT AUDITED" in capsys.readouterr().out


def test_a_service_that_cannot_be_reached_clears_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(f"http://127.0.0.1:{free_port()}/") == audit.NOT_AUDITED
    assert "NOT AUDITED" in capsys.readouterr().out


def test_locking_again_changes_nothing(tmp_path: Path) -> None:
    for name in locks.LOCKS:
        before = (locks.FOLDER / f"{name}.lock").read_text(encoding="utf-8")
        (tmp_path / f"{name}.lock").write_text(before, encoding="utf-8")
        locks.write(name, tmp_path, upgrade=False)
        assert (tmp_path / f"{name}.lock").read_text(encoding="utf-8") == before
