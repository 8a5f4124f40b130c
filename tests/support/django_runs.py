"""Tests with Django, which is configured once per process: their files run in a pytest process of their own."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.support.markdown import ROOT
from tests.support.servers import Server
from tests.support.waiting import allowed

PROJECT = Path(__file__).parent / "django_project"
MOST_SECONDS = 120


def names_in(file: str) -> list[str]:
    """Return the names of the tests in a file of the project."""
    tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def run_file(file: str, server: Server, report: Path) -> dict[str, str]:
    """Run a file on *server*; return by test what was wrong, "" for one that passed in all its cases."""
    environment = os.environ | server.environment()
    plugin = "tests.support.django_project.fixtures"
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, str(PROJECT / file), f"--junit-xml={report}"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=allowed(MOST_SECONDS), check=False
    )
    assert done.returncode in (0, 1), f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    problems: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = (case.get("name") or "").partition("[")[0]
        texts = [found.text or "" for tag in ("failure", "error", "skipped") for found in case.iter(tag)]
        problems[name] = problems.get(name, "") + "\n".join(texts)
    return problems
