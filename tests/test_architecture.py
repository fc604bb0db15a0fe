"""The shape of the code base: what docs/architecture.md promises is so."""

import ast
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import pytest

from deploy.setup import file_tree

ROOT = Path(__file__).parents[1]
PACKAGES = ("services", "shared", "sim", "bench")
LINES_MAX = 500
"""A file over 400 lines asks to be two; beyond this it has to be."""
TEST_LINES_MAX = 700
"""Suites of many small cases may be longer."""
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
IMPURE_MODULES = {"asyncio", "time", "random", "uuid", "logging", "socket", "threading", "secrets"}
IMPURE_MODULES |= {"os", "torch", "numpy.random", "structlog", "aio_pika"}


def tracked(pattern: str) -> list[Path]:
    """The files git knows that match."""
    command = ["git", "ls-files", "-z", "--", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.exists()]


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_tree_has_a_line_for_each_python_file() -> None:
    listed = file_tree.tree(file_tree.source_files())
    missing = [path for path in tracked("*.py") if f"`{path.name}`" not in listed]
    assert all(path.name == "__init__.py" for path in missing), missing


def test_init_files_are_empty() -> None:
    assert [path for path in tracked("*__init__.py") if path.read_text().strip()] == []


def test_no_file_has_a_vague_name_or_no_end() -> None:
    files = tracked("*.py")
    assert [path for path in files if path.name in VAGUE_NAMES] == []
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    in_tests = {path for path in files if path.is_relative_to(ROOT / "tests")}
    limits = {path: TEST_LINES_MAX if path in in_tests else LINES_MAX for path in files}
    assert {path: lines for path, lines in lengths.items() if lines > limits[path]} == {}


@pytest.mark.parametrize("service", ["gateway", "scheduler", "worker", "estimator"])
def test_cores_reach_nothing_of_the_world(service: str) -> None:
    core = tracked(f"services/{service}/core/*.py")
    assert core
    for path in core:
        roots = {name.split(".")[0] for name in imports_of(path)} | imports_of(path)
        assert not roots & IMPURE_MODULES, path


def test_services_never_import_each_other() -> None:
    for path in tracked("services/*/*.py"):
        own = path.relative_to(ROOT / "services").parts[0]
        others = {name for name in imports_of(path) if name.startswith("services.")} - {
            name for name in imports_of(path) if name.split(".")[1:2] == [own]
        }
        assert not others, f"{path} imports {others}"


def test_no_dependency_ships_a_package_of_our_names() -> None:
    clashes = set()
    for distribution in distributions():
        if distribution.metadata["Name"].lower() == "tranche":
            continue
        tops = {Path(str(file)).parts[0] for file in distribution.files or []}
        clashes |= {(distribution.metadata["Name"], top) for top in tops & set(PACKAGES)}
    assert clashes == set()


def test_nothing_names_the_machine_it_was_written_on() -> None:
    words = ("/" + "work/", "/" + "root/", "/" + "opt/wheels")
    for path in [*tracked("*.py"), *tracked("*.md"), *tracked("*.yml"), *tracked("*.sh")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in words if word in text], path
