"""What is told of runs: JSON lines, Markdown tables, and the page docs/benchmarks.md."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from batchq.common.version import __version__
from tests.instruments.bench import plots
from tests.instruments.bench.goals import GOALS, Goal
from tests.instruments.bench.server import Server, file_system
from tests.instruments.bench.work import WORKS, Figures, Medians, Run, medians
from tests.instruments.bench.worker_process import ROOT

Facts = dict[str, Any]
ORDER = (
    "enqueue",
    "drain",
    "ceiling",
    "pickup",
    "backlog",
    "history",
    "snapshot",
    "network",
    "pooler",
    "items",
    "steady",
    "burst",
)


def all_works() -> list[str]:
    """Return the names of the works, in the order in which they run."""
    return [*ORDER, *(name for name in WORKS if name not in ORDER)]


def works_in(runs: Iterable[Run]) -> list[str]:
    """Return the names of the works that were run, in that order."""
    found = {run.work for run in runs}
    return [name for name in all_works() if name in found]


# ------------------------------------------------------------------------------------------------ JSON lines


def facts_about(server: Server, command: str) -> Facts:
    """Return what all runs have in common: versions, machine, the command."""
    data = server.data_directory()
    machine = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": file_system(data) if data else "unknown",
    }
    python = {"python": platform.python_version(), "psycopg": version("psycopg"), "batchq": __version__}
    return {
        "versions": python | {"commit": commit(), "server": server.describe()},
        "machine": machine,
        "made_by": command,
    }


def cpu_model() -> str:
    """Return what the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """Return the commit of the checkout, with a + where batchq or its migrations differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode != 0:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "batchq", "migrations"], check=False)
    return head.stdout.strip() + ("+" if changed.returncode else "")


def line_of(run: Run, facts: Facts) -> str:
    """Return a run as a line of JSON."""
    said = {"work": run.work, "variant": run.variant, "figures": run.figures, "verified": run.is_verified}
    return json.dumps(said | {"problems": run.problems, "series": run.series, "at": run.at} | facts)


@dataclass
class Results:
    """Runs, and what they have in common, each as it first came."""

    runs: list[Run]
    facts: list[Facts]


def read(files: Iterable[Path]) -> Results:
    """Read files of JSON lines."""
    results = Results([], [])
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            said = json.loads(line)
            problems = said["problems"] or ([] if said["verified"] else ["not verified"])
            run = Run(said["work"], said["variant"], said["figures"], problems, said["series"], said["at"])
            results.runs.append(run)
            facts = {name: said[name] for name in ("versions", "machine", "made_by")}
            if facts not in results.facts:
                results.facts.append(facts)
    return results


# ------------------------------------------------------------------------------------------------- Markdown


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all but the first column are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(value: float | None) -> str:
    """Return a figure for people."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:,.3g}"


def table_of(work: str, runs: list[Run]) -> str:
    """Return the table of a work: the medians of each variant, how many runs, and whether all were verified."""
    found = {variant: figures for (name, variant), figures in medians(runs).items() if name == work}
    columns = list(dict.fromkeys(name for figures in found.values() for name in figures))
    rows = [
        [variant, *(shown(figures.get(name)) for name in columns), *verdict(work, variant, runs)]
        for variant, figures in found.items()
    ]
    return markdown_table([work, *(name.replace("_", " ") for name in columns), "runs", "verified"], rows)


def verdict(work: str, variant: str, runs: list[Run]) -> list[str]:
    """Return how many runs a variant had, and whether all were verified."""
    its = [run.is_verified for run in runs if (run.work, run.variant) == (work, variant)]
    return [str(len(its)), "yes" if all(its) else "**no**"]


def goals_table(found: Medians) -> str:
    """Return the goals, what was measured, and whether they are met; those of works that were not run are left out."""
    rows = [goal_row(goal, found) for goal in GOALS if goal.measure(found) is not None]
    return markdown_table(["goal", "bound", "measured", "met"], rows)


def goal_row(goal: Goal, found: Medians) -> list[str]:
    """Return the row of a goal."""
    bound = f"{'≥' if goal.is_at_least else '≤'} {shown(goal.bound)}"
    return [f"{goal.work}: {goal.text}", bound, shown(goal.measure(found)), "yes" if goal.is_met(found) else "**no**"]


def all_tables(runs: list[Run], with_goals: bool = True) -> str:
    """Return the tables of all works that were run, and the goals."""
    goals = [goals_table(medians(runs))] if with_goals else []
    return "\n".join([*(table_of(work, runs) for work in works_in(runs)), *goals])


# -------------------------------------------------------------------------------------------------- the page

INTRODUCTION = """# Benchmarks

`bin/bench --write-docs` generates this page. Every run is verified: handlers record each start, and every batch must
have run exactly once and be completed in one attempt. Figures are medians of the runs. `bin/bench --list` prints the
benchmarks and their sizes; `bin/bench --page FILE` generates this page from existing results.
"""


def write_page(results: Results, page: Path) -> None:
    """Write the page, and its plots into a folder beside it, which is made anew."""
    folder = page.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts = [INTRODUCTION, about(results), f"## Goals\n\n{goals_table(medians(results.runs))}"]
    for work in works_in(results.runs):
        files = plots.draw(work, results.runs, folder)
        pictures = [f"![{work}]({folder.name}/{file.name})\n" for file in files]
        parts += [f"## {work}\n\n{explained(work)}\n", table_of(work, results.runs), *pictures]
    page.write_text("\n".join(parts), encoding="utf-8")


def explained(work: str) -> str:
    """Return what is measured: the work's docstring."""
    lines = (WORKS[work].__doc__ or "").strip().splitlines() if work in WORKS else []
    return "\n".join(line.strip() for line in lines)


def about(results: Results) -> str:
    """Return date, machine, versions and commands."""
    first = results.facts[0]
    machine, versions = first["machine"], first["versions"]
    server = versions["server"]
    settings = ", ".join(f"{name} {value}" for name, value in server.items() if name != "server_version")
    days = sorted({run.at[:10] for run in results.runs})
    rows = [
        ["date", days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"],
        ["machine", f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, {machine['kernel']}"],
        ["server", f"PostgreSQL {server['server_version']} on {machine['file_system']}; {settings}"],
        ["client", f"Python {versions['python']}, psycopg {versions['psycopg']}; on the same machine"],
        [
            "batchq",
            ", ".join(sorted({f"{f['versions']['batchq']} ({f['versions']['commit']})" for f in results.facts})),
        ],
        ["made by", "; ".join(f"`{command}`" for command in dict.fromkeys(f["made_by"] for f in results.facts))],
    ]
    return markdown_table(["", ""], rows).replace("---:", "---")


def figures_line(run: Run) -> str:
    """Return a run in a line, for whoever watches."""
    return (
        f"{run.work}, {run.variant}: " + ", ".join(said(run.figures)) + "".join(f"; WRONG: {p}" for p in run.problems)
    )


def said(figures: Figures) -> list[str]:
    """Return figures with their names."""
    return [f"{name.replace('_', ' ')} {shown(value)}" for name, value in figures.items() if value is not None]
