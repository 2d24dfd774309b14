"""Memory limits: real ones where this machine allows them, declared ones otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.demo.limits import FILES, ROOT, Limit, impose

MIB = 1 << 20


def tree(root: Path, kind: str) -> Path:
    """The files of a cgroup hierarchy that `impose` looks for; returns the folder in which groups are made."""
    folder, memory, _ = FILES[kind]
    parent = root / folder
    parent.mkdir(exist_ok=True)
    (parent / ("cgroup.subtree_control" if kind == "v2" else memory)).touch()
    return parent


@pytest.mark.parametrize("kind", list(FILES))
def test_a_hierarchy_that_may_be_written_enforces_the_limit(tmp_path: Path, kind: str) -> None:
    parent = tree(tmp_path, kind)
    limit = impose("device", 64 * MIB, root=tmp_path)

    assert limit == Limit(64 * MIB, parent / "device", f"enforced by cgroup {kind}")
    assert (parent / "device" / FILES[kind][1]).read_text() == str(64 * MIB)


def test_without_memory_cgroups_a_limit_is_only_declared(tmp_path: Path) -> None:
    assert impose("device", MIB, root=tmp_path) == Limit(MIB, None, "declared only (no memory cgroups here)")


@pytest.mark.parametrize("kind", list(FILES))
def test_a_group_of_that_name_belongs_to_somebody_else_and_is_left_alone(tmp_path: Path, kind: str) -> None:
    theirs = tree(tmp_path, kind) / "device"
    theirs.mkdir()
    limit = impose("device", MIB, root=tmp_path)

    assert limit.group is None
    assert f"{kind}: " in limit.reason
    assert theirs.is_dir()
    assert not list(theirs.iterdir())


def test_both_hierarchies_that_refuse_are_named_as_the_reason(tmp_path: Path) -> None:
    for kind in FILES:
        (tree(tmp_path, kind) / "device").mkdir()

    reason = impose("device", MIB, root=tmp_path).reason
    assert reason.startswith("declared only (v1: ")
    assert "; v2: " in reason


def test_a_declared_limit_changes_no_command() -> None:
    assert Limit(MIB, None, "declared only").command(["a", "b c"]) == ["a", "b c"]


def test_a_program_under_a_limit_first_enters_the_group_and_gets_its_arguments_as_they_are(tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.mkdir()
    odd = ["$HOME", "two words", "'quoted'", ""]
    program = [sys.executable, "-c", "import os, sys; print(os.getpid(), sys.argv[1:])", *odd]
    ended = subprocess.run(Limit(MIB, group, "enforced").command(program), capture_output=True, text=True, check=True)

    assert ended.stdout == f"{(group / 'cgroup.procs').read_text().strip()} {odd}\n"


def test_a_program_that_cannot_enter_its_group_does_not_run_at_all(tmp_path: Path) -> None:
    limit = Limit(MIB, tmp_path / "no-such-group", "enforced")
    ended = subprocess.run(
        limit.command([sys.executable, "-c", "print('ran')"]), capture_output=True, text=True, check=False
    )

    assert ended.returncode != 0
    assert "ran" not in ended.stdout


def test_release_removes_the_group_and_a_second_one_does_nothing(tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.mkdir()
    limit = Limit(MIB, group, "enforced")
    limit.release()

    assert not group.exists()
    limit.release()
    Limit(MIB, None, "declared only").release()


@pytest.fixture
def enforced() -> Iterator[Limit]:
    """A limit of 64 MiB by this machine's own kernel."""
    limit = impose(f"edge-runtime-test-{os.getpid()}", 64 * MIB)
    if limit.group is None:
        pytest.skip(f"this machine lets nobody here limit memory: {limit.reason}")
    yield limit
    limit.release()


def allocate(limit: Limit, size: int) -> int:
    """The exit code of a process that touches so many bytes under the limit."""
    program = [sys.executable, "-c", f"held = bytearray(b'x' * {size})"]
    return subprocess.run(limit.command(program), capture_output=True, check=False).returncode


def test_the_kernel_kills_a_process_that_takes_more_than_its_limit(enforced: Limit) -> None:
    assert allocate(enforced, 16 * MIB) == 0
    assert allocate(enforced, 256 * MIB) == -signal.SIGKILL


def test_a_released_group_is_gone_from_the_kernel(enforced: Limit) -> None:
    allocate(enforced, MIB)
    enforced.release()

    assert enforced.group is not None
    assert not enforced.group.exists()
    assert enforced.group.is_relative_to(ROOT)


def test_a_second_demo_on_the_same_machine_does_not_disturb_the_first(enforced: Limit) -> None:
    assert enforced.group is not None
    with subprocess.Popen(
        enforced.command([sys.executable, "-c", "print('in', flush=True); input()"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"in\n"
        second = impose(enforced.group.name, MIB)

        assert second.group is None
        assert "File exists" in second.reason
        assert str(first.pid) in (enforced.group / "cgroup.procs").read_text().split()
        first.communicate(b"\n")
