"""The tree of errors is the one that is drawn, and each family ends a process with a code of its own."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import pytest

from edge_runtime import errors
from edge_runtime.errors import EdgeRuntimeError, missing_extra, unknown_name

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, EdgeRuntimeError)
}


class Drawn(NamedTuple):
    """A line of the drawing: whose child the class is, and the exit code beside it."""

    parent: str | None
    code: int | None


def drawing() -> dict[str, Drawn]:
    """The tree in the module's docstring."""
    tree: dict[str, Drawn] = {}
    above: list[str] = []
    for line in inspect.getdoc(errors).splitlines():  # type: ignore[union-attr]  # the module has a docstring
        match = re.match(r"(?P<branch>[ │├└─]*)(?P<name>\w+Error)\b(?: +(?P<code>\d+)\b)?", line)
        if match is None:
            continue
        # Four columns for each level, under the margin of the drawing.
        level = (len(match["branch"]) - 4) // 4
        above = [*above[:level], match["name"]]
        tree[match["name"]] = Drawn(above[-2] if level else None, int(match["code"]) if match["code"] else None)
    return tree


TREE = drawing()


def test_every_exception_of_the_module_is_of_the_tree() -> None:
    assert {
        name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)
    } == (CLASSES.keys())


def test_the_drawing_shows_every_class_and_no_other() -> None:
    assert TREE.keys() == CLASSES.keys()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_hangs_where_it_is_drawn(name: str) -> None:
    parent = CLASSES[name].__bases__[0]

    assert (parent.__name__ if parent is not Exception else None) == TREE[name].parent
    assert len(CLASSES[name].__bases__) == 1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_class_ends_a_process_with_the_code_that_is_drawn_for_its_family(name: str) -> None:
    family = name
    while TREE[family].code is None:
        family = str(TREE[family].parent)

    assert CLASSES[name].exit_code == TREE[family].code


def test_each_family_has_a_code_of_its_own() -> None:
    families = [name for name, drawn in TREE.items() if drawn.parent in {None, EdgeRuntimeError.__name__}]
    codes = [CLASSES[name].exit_code for name in families]

    assert all(TREE[name].code is not None for name in families)
    assert len(set(codes)) == len(codes)
    # 0 is success, from 126 on a shell speaks, and 130 is Ctrl-C.
    assert all(0 < code < 126 for code in codes)
    assert str(errors.INTERRUPTED) in str(errors.__doc__)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_says_what_it_means(name: str) -> None:
    assert CLASSES[name].__doc__
    assert str(CLASSES[name]("expected a, found b; do c")) == "expected a, found b; do c"


def test_an_unknown_name_is_answered_with_the_known_ones_in_order() -> None:
    assert unknown_name("codec", "int9", {"int8": 1, "fp16": 2}) == "unknown codec 'int9'; expected one of: fp16, int8"


def test_a_missing_extra_is_answered_with_the_command_that_installs_it() -> None:
    error = missing_extra("torch", "client")

    assert "'torch'" in str(error)
    assert "pip install 'edge-runtime[client]'" in str(error)
    assert error.exit_code == 16


@pytest.mark.parametrize(
    ("error", "said"),
    [(ValueError("\n one\n two"), "one"), (NotImplementedError(), "NotImplementedError"), (OSError(" \n"), "OSError")],
)
def test_an_error_of_others_is_said_in_one_line_and_by_its_type_where_it_says_nothing(
    error: Exception, said: str
) -> None:
    assert errors.first_line(error) == said
