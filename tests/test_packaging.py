"""What holds for the packages as a whole: who imports whom, what start-up loads, what is shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.commands import run

ROOT = Path(__file__).parents[1]
PACKAGES = ("merging", "search", "embeddings")
HEAVY = ("torch", "transformers", "sentence_transformers", "pydantic", "mergekit", "numba")


def _modules() -> dict[str, Path]:
    files = [ROOT / "cuvee.py", *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def _imports(file: Path, modules: dict[str, Path]) -> set[str]:
    """Our own modules that a file imports: at once, later, or for its types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in modules else node.module for part in parts}
    return found & modules.keys()


def test_no_two_modules_know_each_other() -> None:
    modules = _modules()
    graph = {name: _imports(file, modules) - {name} for name, file in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_packages_know_each_other_in_one_direction() -> None:
    modules = _modules()
    for name, file in modules.items():
        package = name.partition(".")[0]
        if package in PACKAGES:
            upwards = PACKAGES[PACKAGES.index(package) + 1 :]
            known = {other.partition(".")[0] for other in _imports(file, modules)}
            assert not known & {*upwards, "cuvee"}, f"{name} imports {known}"


@pytest.mark.parametrize(
    "code",
    ["import sys; sys.argv = ['cuvee', '--help']; import cuvee; cuvee.app(standalone_mode=False)", "import merging"],
)
def test_start_up_loads_nothing_heavy(code: str) -> None:
    code += f"; import sys; loaded = set({HEAVY!r}) & set(sys.modules); assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_says_that_it_is_typed() -> None:
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["merge", "--nope"], ["merge", "--threads", "0", "a", "b"], ["inspect"]]
)
def test_a_slip_on_the_command_line_is_told_in_one_line(arguments: list[str]) -> None:
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1 and done.err.startswith("error: cuvee") and "--help" in done.err


def test_version_and_help() -> None:
    assert run("--version").out.strip() == version("cuvee")
    assert run().out == run("--help").out != ""
