"""The house itself: what an import costs, whose names the rooms have, and whether words and disk agree."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from edge_runtime import errors
from server.aggregators import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("edge_runtime", "server", "profiles", "export", "simulation")
MODULES = sorted(path for folder in (*PACKAGES, "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))
TORCH = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
PROBE = """
import atexit, json, sys
atexit.register(lambda: print("LOADED", json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))))
"""


def relative(paths: Iterable[Path]) -> list[str]:
    """Paths as a reader writes them."""
    return [path.relative_to(ROOT).as_posix() for path in paths]


def normal(requirement: str) -> str:
    """The name of a requirement, as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement, maxsplit=1)[0]).lower()


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds when it ends after running the code."""
    ended = subprocess.run([sys.executable, "-c", PROBE + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.rpartition("LOADED ")[2]))


def test_the_server_and_a_waiting_device_load_no_torch() -> None:
    """Only training pays for torch."""
    rooms = "server, server.service, edge_runtime.wire.mqtt, edge_runtime.client, edge_runtime.agent"
    loaded = loaded_by(f"import {rooms}")

    assert {"edge_runtime", "server"} <= loaded
    assert not loaded & TORCH


def test_help_loads_nothing_heavy() -> None:
    """Each verb's module is imported when it is called."""
    loaded = loaded_by("sys.argv = ['edge-runtime', '--help']\nfrom edge_runtime.cli import main\nmain()")

    assert "typer" in loaded
    assert not loaded & {*TORCH, "numpy", "matplotlib", "paho", "server", "export"}


def test_a_library_is_loaded_by_name_only_where_it_may_be_imported() -> None:
    """A name in a string is an import that the walls of import-linter cannot see.

    `export` may have PEFT, and loads it by name to have it light; its table names its own modules.
    """
    by_name = [
        path
        for path in MODULES
        if path.relative_to(ROOT).parts[0] in PACKAGES and ROOT / "edge_runtime" / "train" not in path.parents
        if any(
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"importlib.import_module", "__import__", "light_import"}
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]

    assert sorted(relative(by_name)) == [
        "export/__init__.py",
        "export/peft.py",
        "profiles/light_import.py",
        "profiles/probe.py",
    ]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_room_is_ours_and_no_other_distribution_claims_its_name(name: str) -> None:
    """PyPI has an `export` of its own: installed beside ours, one would hide the other."""
    module = importlib.import_module(name)
    claimants = set(importlib.metadata.packages_distributions().get(name, ()))

    assert module.__file__ is not None
    assert Path(module.__file__).parent == ROOT / name
    assert claimants <= {"edge-runtime"}


def error_classes() -> list[type[errors.EdgeRuntimeError]]:
    """Every class of the tree, the root first."""
    members = (value for _, value in inspect.getmembers(errors, inspect.isclass))
    return [value for value in members if issubclass(value, errors.EdgeRuntimeError)]


@pytest.mark.parametrize("error", error_classes(), ids=lambda error: error.__name__)
def test_an_error_says_what_it_means_and_stands_in_the_drawn_tree(error: type[errors.EdgeRuntimeError]) -> None:
    """The tree in the module docstring has every class, with the exit code of its family."""
    drawn = dict(re.findall(r"^\W*(\w+Error) *(\d*)", errors.__doc__ or "", re.MULTILINE))

    assert error.__doc__
    assert error.__name__ in drawn
    if drawn[error.__name__]:
        assert int(drawn[error.__name__]) == error.exit_code


@pytest.mark.parametrize("name", METHODS)
def test_a_method_names_its_source(name: str) -> None:
    """A reader can go to the paper, or sees that there is none."""
    described = sys.modules[METHODS[name].build.__module__].__doc__ or ""

    assert re.search(r"^Source: \S", described, re.MULTILINE)


def test_every_declared_dependency_is_pinned() -> None:
    """But for [simulate], which is no part of the tested set."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = itertools.chain(project["dependencies"], *(extras[extra] for extra in extras.keys() - {"simulate"}))
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {normal(name) for name in re.findall(r"^([\w.-]+)==", pins, re.MULTILINE)}

    assert {normal(entry) for entry in declared} - pinned == {"edge-runtime"}


def test_every_folder_of_tests_is_a_package() -> None:
    """Or two test modules of one name in two rooms would be taken for each other."""
    folders = {path.parent for path in MODULES if path.is_relative_to(ROOT / "tests")}

    assert relative(folder for folder in sorted(folders) if not (folder / "__init__.py").exists()) == []


def test_no_module_is_longer_than_one_sitting() -> None:
    """At most 400 lines."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}

    assert relative(path for path, lines in lengths.items() if lines > 400) == []


def test_no_error_is_swallowed() -> None:
    """No `except` whose whole answer is `pass`."""
    swallowed = [
        f"{relative([path])[0]}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ExceptHandler) and all(isinstance(step, ast.Pass) for step in node.body)
    ]

    assert swallowed == []


def tree_of(readme: str) -> Iterator[str]:
    """The paths of the README's tree: the first code block with a line for `edge_runtime/`, one path to a line.

    Depth is the column where a name begins, so both ways of drawing a tree (lines or plain indentation) are read. A
    name holds a dot or a slash, or is followed by two spaces or nothing; other lines continue the words before them.
    """
    blocks = (block for block in re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL))
    tree = next((block for block in blocks if re.search(r"^\W*edge_runtime/(\s|$)", block, re.MULTILINE)), "")
    above: list[tuple[int, str]] = []
    for line in tree.splitlines():
        entry = re.match(r"[\s│├└─]*(?=[./*-]*\w)([\w*-]*[./][\w.*/-]*|\w+(?=\s{2}|\s*$))", line)
        if entry is None:
            continue
        column, name = entry.start(1), entry.group(1)
        while above and above[-1][0] >= column:
            above.pop()
        path = "".join(folder for _, folder in above) + name
        if name.endswith("/"):
            above.append((column, name))
        yield path


def test_the_tree_in_the_readme_is_the_tree_on_disk() -> None:
    """Every path in it exists, and every module outside tests is in it."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md to compare with")
    listed = list(tree_of(readme.read_text(encoding="utf-8")))
    found = {path for entry in listed for path in ROOT.glob(entry)}
    modules = {path for path in MODULES if path.name != "__init__.py" and not path.is_relative_to(ROOT / "tests")}

    assert listed, "README.md has no code block with a line for edge_runtime/"
    assert [entry for entry in listed if not any(ROOT.glob(entry))] == []
    assert relative(sorted(modules - found)) == []
