"""The shape of the code: who may import whom, where SQL may stand, how long a function may be."""

import ast
import re
import statistics
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import batchq
from tests.support import code_map
from tests.support.alone import run_alone

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "batchq"
MOST_LINES = 40
MEDIAN_LINES = 6
MOST_MODULE_LINES = 450
MOST_ATTRIBUTES = 13
# Classes with more attributes, each with its reason.
LARGE_CLASSES = {
    "Settings": "an attribute per setting",
    "BatchInfo": "a batch as a program sees it: a field per column",
    "Verb": "everything that differs between verbs",
    "ClaimedBatch": "what the worker knows of a batch in flight; one object per batch is what the hot path affords",
    "Finisher": "the outcomes to write, in the states that they are in",
    "Lane": "what it serves, what is in flight, and counters with one writer each",
    "ClaimedRow": "the columns that a claim returns",
    "Claimer": "a thread's whole state",
    "Source": "the tracks of batches without a key, the ring of those with one, and the permits",
    "Permit": "three limits, each with what is held, what was wanted, and since when",
    "Context": "what the parts of a worker share, an attribute each",
    "Enqueued": "the columns of a batch that a test may ask for",
    "Bulk": "travels sealed in a form, so all of it is one flat record",
}

# Which folders of the package each folder may import from. Within a folder, modules import each other freely, but never
# in a circle.
EVERYBODY = {"errors"}
TOP = {
    "settings",
    "retry",
    "app",
    "batch",
    "enqueue",
    "hooks",
    "reach",
}  # what users import; App and Batch know nothing of a worker
FOLDERS_MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "postgres": {"common"},
    "top": {"common", "postgres"},
    "worker": {"common", "postgres", "top"},
    "operate": {"common", "postgres"},
    "web": {"common", "postgres", "top", "operate"},
    "cli": {"common", "postgres", "top", "worker", "operate", "web", "demo"},
    "demo": {"common", "postgres", "top", "worker", "web", "package"},
    "contrib": {"common", "postgres", "top", "worker", "cli", "web"},
    "testing": {"common", "postgres", "top", "worker"},
    "package": {"common", "top", "worker"},  # batchq/__init__.py
    "__main__": {"cli"},
}


def name_of(file: Path) -> str:
    """Return the name of a module of batchq, as in ALLOWED."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "batchq"


MODULES = {name_of(file): ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
FUNCTIONS = [
    (name, node)
    for name, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


def imported(tree: ast.Module) -> set[str]:
    """Return the modules of batchq that a module imports, also within functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "batchq"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            found |= set(imported_from(node.module or "", [alias.name for alias in node.names]))
    return {name.removeprefix("batchq.") for name in found}


def imported_from(module: str, names: list[str]) -> Iterator[str]:
    """Yield the modules that ``from module import names`` means."""
    if module.partition(".")[0] != "batchq":
        return
    for name in names:
        full = f"{module}.{name}"
        yield full if full.removeprefix("batchq.") in MODULES else module


# ------------------------------------------------------------------------------------------------- imports


def folder_of(module: str) -> str:
    """Return where a module stands, as in FOLDERS_MAY_IMPORT."""
    first = module.partition(".")[0]
    return "top" if first in TOP else "package" if first == "batchq" else first


def may_import(module: str, other: str) -> bool:
    """Return whether the rules allow a module to import another one."""
    here, there = folder_of(module), folder_of(other)
    return there == here or there in EVERYBODY or there in FOLDERS_MAY_IMPORT[here]


def test_modules_import_only_what_their_folder_may() -> None:
    arrows = [(name, other) for name, tree in MODULES.items() if name != "errors" for other in imported(tree)]
    assert [f"{name} imports {other}" for name, other in arrows if not may_import(name, other)] == []
    assert imported(MODULES["errors"]) == set()


def test_the_rules_name_every_folder_and_nothing_that_is_not_needed() -> None:
    assert {folder_of(name) for name in MODULES} - EVERYBODY == FOLDERS_MAY_IMPORT.keys()
    used = {(folder_of(name), folder_of(other)) for name, tree in MODULES.items() for other in imported(tree)}
    allowed = {(here, there) for here, others in FOLDERS_MAY_IMPORT.items() for there in others}
    assert allowed - used == set()


def test_imports_have_no_circle_neither_of_modules_nor_of_folders() -> None:
    TopologicalSorter(FOLDERS_MAY_IMPORT).prepare()  # raises CycleError
    TopologicalSorter({name: imported(tree) - {name} for name, tree in MODULES.items()}).prepare()


def test_the_map_of_the_code_in_the_docs_is_that_of_the_modules() -> None:
    assert code_map.shown() == code_map.code_map(), "run: python -m tests.instruments.reference"
    assert {folder.relative_to(PACKAGE).as_posix() for folder in PACKAGE.rglob("*") if list(folder.glob("*.py"))} == {
        folder for folder in code_map.FOLDERS if folder
    }


def test_the_tour_of_a_batchs_life_goes_through_six_files_that_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tour = text.partition("## A batch's life, in six files\n")[2].partition("\n## ")[0]
    stops = re.findall(r"^\d\. `(batchq/[\w/]+\.py)`", tour, re.MULTILINE)
    assert len(stops) == 6
    assert [file for file in re.findall(r"`(batchq/[\w/]+\.py)`", tour) if not (ROOT / file).is_file()] == []


# ------------------------------------------------------------------------------------------------- SQL

A_STATEMENT = re.compile(
    r"^\s*(SELECT|WITH|INSERT\s+INTO|UPDATE|DELETE\s+FROM|COPY|CREATE|ALTER|DROP|TRUNCATE|GRANT|SET|LISTEN|NOTIFY|LOCK"
    r"|BEGIN|COMMIT|VALUES|CALL|DO)\s+[A-Za-z_\"(%{]"
)
DDL = re.compile(
    r"\b(CREATE|ALTER|DROP|TRUNCATE|COMMENT ON)\s+(OR REPLACE\s+)?[A-Z]*\s*(TABLE|INDEX|VIEW|FUNCTION|SCHEMA)\b"
)


def texts(tree: ast.Module) -> Iterator[str]:
    """Yield the texts in a module, but its docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


STATEMENTS = "postgres.statements."


def test_statements_stand_in_the_folder_of_statements_alone() -> None:
    own = {"demo", "demo.tasks"}  # the demo is a user's program, with statements of its own
    found = {name: [text for text in texts(tree) if A_STATEMENT.match(text)] for name, tree in MODULES.items()}
    assert {
        name: statements
        for name, statements in found.items()
        if statements and not name.startswith(STATEMENTS) and name not in own
    } == {}
    assert sum(len(found[name]) for name in found if name.startswith(STATEMENTS)) > 20, (
        "the test does not see statements"
    )


def test_ddl_stands_in_migrations_alone() -> None:
    found = {name: [text for text in texts(tree) if DDL.search(text)] for name, tree in MODULES.items()}
    assert {name: statements for name, statements in found.items() if statements} == {}
    files = {file.relative_to(ROOT) for folder in (PACKAGE, ROOT / "migrations") for file in folder.rglob("*.sql")}
    with_ddl = {file.as_posix() for file in files if DDL.search((ROOT / file).read_text(encoding="utf-8"))}
    own = {file for file in with_ddl if file.startswith("batchq/demo/")}  # a user's program
    assert own
    assert with_ddl - own - {file for file in with_ddl if file.startswith("migrations/")} == {
        "batchq/operate/distribute.sql"  # the second layout
    }


# ------------------------------------------------------------------------------------------------- the terminal

THE_WAY_OUT = "common.terminal"
READS_MARKUP = {"TextColumn", "Static", "Console", "Status", "Panel", "Label", "track", "status"}


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Yield each call in a module, with the last part of the name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield name, node


def is_harmless(called: str, call: ast.Call) -> bool:
    """Return whether a call says that nothing is markup, or gives nothing but texts that stand in the code."""
    for keyword in call.keywords:
        if keyword.arg == "markup":
            return isinstance(keyword.value, ast.Constant) and keyword.value.value is False
    shown = call.args[1:] if called == "track" else call.args  # what it goes through, then its text
    return all(isinstance(argument, ast.Constant) for argument in shown)


def test_everything_that_is_printed_goes_one_way() -> None:
    """`print` and the consoles' own methods would let through what a row of the database says."""
    printers = {
        f"{name}:{call.lineno}": called
        for name, tree in MODULES.items()
        for called, call in calls(tree)
        if called in ("print", "Console", "print_exception")
    }
    own = {place: called for place, called in printers.items() if place.startswith(f"{THE_WAY_OUT}:")}
    assert len(own) > 5, "the test does not see what prints"
    # `errors.print(styled(...))`: the argument has come the way.
    others = {place for place in printers.keys() - own.keys() if not is_made_by_the_way_out(place)}
    assert others == set()


def is_made_by_the_way_out(place: str) -> bool:
    """Return whether what is printed there is what `styled` returns."""
    name, _, number = place.partition(":")
    found = [call for called, call in calls(MODULES[name]) if called == "print" and call.lineno == int(number)]
    return all(
        isinstance(argument, ast.Call) and getattr(argument.func, "id", "") == "styled"
        for call in found
        for argument in call.args
    ) and bool(found)


def test_no_text_from_outside_is_markup() -> None:
    for name, tree in MODULES.items():
        words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | {
            alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not words & {"from_markup", "from_ansi", "render_markup"}, name
        assert "rich.markup" not in modules, f"{name}: styles need no escapes, and markup has too many"
    unsafe = [
        f"{name}:{call.lineno}"
        for name, tree in MODULES.items()
        if name.startswith(("cli", "demo"))
        for called, call in calls(tree)
        if called in READS_MARKUP and not is_harmless(called, call)
    ]
    assert unsafe == []


# ------------------------------------------------------------------------------------------------- size, docstrings


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines a function has, from its def to its end, docstring included, decorators not."""
    return (function.end_lineno or 0) - function.lineno + 1


def test_no_function_is_long() -> None:
    long = {f"{name}.{node.name}": lines_of(node) for name, node in FUNCTIONS if lines_of(node) > MOST_LINES}
    assert long == {}


def test_no_module_is_long() -> None:
    lines = {str(file.relative_to(PACKAGE)): file.read_text().count("\n") for file in PACKAGE.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > MOST_MODULE_LINES} == {}


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Return the names that a class's own methods set on self, and its fields."""
    own = {
        child.attr
        for child in ast.walk(node)
        if isinstance(child, ast.Attribute)
        and isinstance(child.ctx, ast.Store)
        and isinstance(child.value, ast.Name)
        and child.value.id == "self"
    }
    fields = (part.target for part in node.body if isinstance(part, ast.AnnAssign))
    return own | {field.id for field in fields if isinstance(field, ast.Name)}


def test_no_class_has_many_attributes_without_a_reason() -> None:
    classes = [node for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    large = {node.name for node in classes if len(attributes_of(node)) > MOST_ATTRIBUTES}
    assert large == LARGE_CLASSES.keys()


def test_a_typical_function_is_short() -> None:
    assert statistics.median(lines_of(node) for _, node in FUNCTIONS) <= MEDIAN_LINES


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Yield the public functions and classes of a module, and the public methods of those classes."""
    for node in body:
        is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if is_definition and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def is_covered(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """Tell whether a name is explained: by its docstring or, for a setter, by the property's."""
    is_setter = any(
        isinstance(decorator, ast.Attribute) and decorator.attr == "setter" for decorator in node.decorator_list
    )
    return is_setter or ast.get_docstring(node) is not None


OVERRIDES = {"connect"}  # what a base class explains


def test_every_module_and_public_name_explains_itself() -> None:
    assert [name for name, tree in MODULES.items() if not ast.get_docstring(tree)] == []
    silent = [
        f"{name}.{node.name}" for name, tree in MODULES.items() for node in public(tree.body) if not is_covered(node)
    ]
    assert [name for name in silent if name.rpartition(".")[2] not in OVERRIDES] == []


def test_what_is_public_is_there_and_explains_itself() -> None:
    assert sorted(batchq.__all__) == batchq.__all__
    assert [name for name in batchq.__all__ if not getattr(batchq, name).__doc__] == []


# ------------------------------------------------------------------------------------------------- no machine's own


FOLDERS = ("batchq", "migrations", "tests", "bin", "docs", ".ci", ".github")
PATHS = re.compile(r"(?<![\w.$}*-])/(?:home|root|work|mnt|Users)/")
REGISTRIES = re.compile(
    r"(index[-_]url|trusted[-_]host|registry|mirror|proxy)\S*\s*[=:]\s*\S*(https?://|\d+\.\d+\.\d+\.\d+)",
    re.I,
)


def own_files() -> list[Path]:
    """Return the text files of the project."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    top = [path for pattern in ("*.md", "*.py", "*.toml", "*.y*ml", ".gitignore") for path in ROOT.glob(pattern)]
    return [path for path in (*inside, *top) if path.is_file() and "__pycache__" not in path.parts]


@pytest.mark.parametrize("pattern", [PATHS, REGISTRIES], ids=["paths", "registries"])
def test_no_file_knows_the_machine_it_was_made_on(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in own_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_time_is_the_databases() -> None:
    clocks = re.compile(r"time\.time\b|datetime\.(now|utcnow|today)\(|date\.today\(|time\.(gmtime|localtime)\(")
    readers = [path.name for path in PACKAGE.rglob("*.py") if clocks.search(path.read_text(encoding="utf-8"))]
    assert readers == ["doctor.py"], "only the database's clock is compared; for intervals there is time.monotonic()"


if __name__ == "__main__":
    run_alone(__file__)
