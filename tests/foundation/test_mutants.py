"""The table of mutants is kept up: each text stands in the code, and each mutant has its killer in the suite.

`bin/mutants` tries them; here is what can be checked at once.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.instruments.mutants import cli
from tests.instruments.mutants.cli import SURVIVED, UNTRIED, page, read_killers
from tests.instruments.mutants.table import MUTANTS, ROOT, Mutant, StaleError
from tests.support.alone import run_alone
from tests.support.servers import Server


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_the_text_of_every_mutant_stands_in_its_file(file: str) -> None:
    text = (ROOT / file).read_text()
    for mutant in MUTANTS:
        if mutant.file == file:
            mutated = mutant.mutated(text)
            assert mutated != text
            if file.endswith(".py"):
                ast.parse(mutated)


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS if mutant.file.startswith("migrations/")}))
def test_no_later_migration_makes_a_mutants_function_anew(file: str) -> None:
    sections = [mutant.section for mutant in MUTANTS if mutant.file == file and "FUNCTION " in mutant.section]
    begun = tuple(f"{name}(" if "(" not in name else name for _, name in (each.split("FUNCTION ") for each in sections))
    for later in sorted((ROOT / "migrations").glob("*.sql")):
        if f"migrations/{later.name}" > file:
            made = re.findall(r"(?:CREATE|CREATE OR REPLACE|DROP) FUNCTION ([\w.]+\([^)]*)", later.read_text())
            again = [signature for signature in made if signature.startswith(begun)]
            assert again == [], f"{later.name} has the newest of it: mutate that"


AMENDED = re.compile(r"SELECT batchq\.amend\('batchq\.(\w+)', ARRAY\[(.*?)\]\);\n", re.DOTALL)
LITERAL = re.compile(r"(E?)'((?:[^']|'')*)'")


def amended_texts() -> Iterator[tuple[str, str]]:
    """Yield the functions that migrations amend, and the texts in those calls."""
    for file in sorted((ROOT / "migrations").glob("*.sql")):
        for name, changes in AMENDED.findall(file.read_text(encoding="utf-8")):
            for escapes, text in LITERAL.findall(changes):
                plain = text.replace("''", "'")
                yield name, plain.replace("\\n", "\n") if escapes else plain


def test_a_mutant_leaves_what_a_later_migration_amends() -> None:
    """Otherwise the migration fails, and with it every test, whatever the mutant breaks."""
    amended = list(amended_texts())
    assert len(amended) > 20
    for mutant in MUTANTS:
        if mutant.file.startswith("migrations/"):
            text = (ROOT / mutant.file).read_text(encoding="utf-8")
            begin = text.index(mutant.section)
            section = text[begin : text.index("END $$;", begin)] if "FUNCTION " in mutant.section else ""
            gone = [one for name, one in amended if f"batchq.{name}(" in mutant.section and one in section
                    and one not in section.replace(mutant.old, mutant.new)]  # fmt: skip
            assert gone == [], mutant


def test_a_text_that_is_gone_or_twice_there_is_an_error() -> None:
    mutant = Mutant("CLAIM: ", "AND locked", "", "nothing", (), "a file")
    assert mutant.mutated("CLAIM: x AND locked\n\n\nAND locked") == "CLAIM: x \n\n\nAND locked"
    for text in ("CLAIM: x", "x AND locked", "CLAIM: AND locked AND locked", "CLAIM: x\n\n\nAND locked"):
        with pytest.raises(StaleError):
            mutant.mutated(text)


def test_every_mutant_has_a_name_of_its_own() -> None:
    assert [name for name, count in Counter(mutant.name for mutant in MUTANTS).items() if count > 1] == []


def test_the_page_is_the_table_and_its_killers_are_tests_of_the_suite() -> None:
    killers = read_killers()
    assert page(killers) == (ROOT / "tests" / "instruments" / "mutants" / "README.md").read_text()
    assert {mutant.name for mutant in MUTANTS} == set(killers)
    assert [name for name, killer in killers.items() if killer in (SURVIVED, UNTRIED)] == []
    wanted = {f"tests/{killer}" for killer in killers.values()}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *sorted(wanted)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert wanted - set(ended.stdout.splitlines()) == set(), ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.mark.parametrize(
    ("killer", "code", "said"),
    [
        ("test_a_sweep_in_parts_visits_every_part_and_the_newest_each_second_time[3]", 0, "1 of 1 mutants killed\n"),
        ("test_rows_of_the_same_time_are_told_apart_by_their_id", 1, "survived: next_part: "),
    ],
    ids=["killed", "survived"],
)
def test_a_sample_ends_well_only_if_the_killers_that_the_page_names_still_kill(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    server: Server,
    killer: str,
    code: int,
    said: str,
) -> None:
    [mutant] = [mutant for mutant in MUTANTS if mutant.place == "next_part"]
    for variable, value in server.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["bin/mutants", "next_part", "--sample", "3", "--seed", "a day"])
    monkeypatch.setattr(cli, "read_killers", lambda: {mutant.name: f"component/test_positions.py::{killer}"})
    monkeypatch.setattr(cli, "write_page", lambda _: pytest.fail("the page is not a sample's to write"))
    assert cli.main() == code
    out = capsys.readouterr().out
    assert out.startswith("a sample by the seed a day\n")
    assert said in out


@pytest.mark.parametrize("file", sorted({file for mutant in MUTANTS for file in mutant.tests}))
def test_the_files_that_ought_to_see_a_mutant_are_there(file: str) -> None:
    assert Path(ROOT / "tests" / file).is_file()


if __name__ == "__main__":
    run_alone(__file__)
