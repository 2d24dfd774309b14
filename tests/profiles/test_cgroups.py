"""The limits that control groups put on a process."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.cgroups import cpu_quota, memory_limit, memory_limits
from tests.profiles.trees import MIB, version_1, version_2, write

UNLIMITED_V1 = str(2**63 - 4096)


def test_no_control_group_means_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    assert cpu_quota(tmp_path) is None


@given(limits=st.lists(st.one_of(st.none(), st.integers(1, 2**40)), min_size=4, max_size=4))
def test_the_tightest_level_wins_on_version_2(
    limits: list[int | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = version_2(tmp_path_factory.mktemp("v2"), "/a/b/c")
    for folder, limit in zip(("", "a/", "a/b/", "a/b/c/"), limits, strict=True):
        write(root, {f"sys/fs/cgroup/{folder}memory.max": "max" if limit is None else str(limit)})

    found = memory_limit(root)

    stated = [limit for limit in limits if limit is not None]
    assert (found.limit if found else None) == min(stated, default=None)


@given(limits=st.lists(st.one_of(st.none(), st.integers(1, 2**40)), min_size=3, max_size=3))
def test_the_tightest_level_wins_on_version_1(
    limits: list[int | None], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = version_1(tmp_path_factory.mktemp("v1"), "/a/b")
    for folder, limit in zip(("", "a/", "a/b/"), limits, strict=True):
        text = UNLIMITED_V1 if limit is None else str(limit)
        write(root, {f"sys/fs/cgroup/memory/{folder}memory.limit_in_bytes": text})

    found = memory_limit(root)

    stated = [limit for limit in limits if limit is not None]
    assert (found.limit if found else None) == min(stated, default=None)


def test_a_version_1_parent_without_hierarchy_does_not_count(tmp_path: Path) -> None:
    root = version_1(tmp_path, "/a/b")
    write(
        root,
        {
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(100 * MIB),
            "sys/fs/cgroup/memory/a/memory.use_hierarchy": "0",
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": str(200 * MIB),
            "sys/fs/cgroup/memory/a/b/memory.use_hierarchy": "0",
        },
    )

    assert [level.limit for level in memory_limits(root)] == [200 * MIB]


def test_a_limit_above_what_the_container_mounts_is_read_from_the_statistics(tmp_path: Path) -> None:
    root = version_1(tmp_path, "/docker/abc", mount_root="/docker/abc")
    write(
        root,
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED_V1,
            "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {300 * MIB}",
        },
    )

    found = memory_limit(root)

    assert found is not None
    assert found.limit == 300 * MIB


@pytest.mark.parametrize("path", ["/docker/abc", "/../../elsewhere", "/docker/abc/child"])
def test_a_container_finds_its_group_below_the_root_of_the_mount(tmp_path: Path, path: str) -> None:
    root = version_2(tmp_path, path, mount_root="/docker/abc")
    write(root, {"sys/fs/cgroup/memory.max": str(400 * MIB)})

    found = memory_limit(root)

    assert found is not None
    assert found.limit == 400 * MIB


def test_being_slowed_down_counts_as_a_limit(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/a")
    write(root, {"sys/fs/cgroup/a/memory.max": str(500 * MIB), "sys/fs/cgroup/a/memory.high": str(350 * MIB)})

    found = memory_limit(root)

    assert found is not None
    assert (found.limit, Path(found.path).name) == (350 * MIB, "memory.high")


def test_page_cache_is_no_usage_but_shared_memory_is(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/a")
    write(
        root,
        {
            "sys/fs/cgroup/a/memory.max": str(1000 * MIB),
            "sys/fs/cgroup/a/memory.current": str(700 * MIB),
            "sys/fs/cgroup/a/memory.stat": f"anon {200 * MIB}\nfile {450 * MIB}\nshmem {50 * MIB}",
        },
    )

    found = memory_limit(root)

    assert found is not None
    assert (found.usage, found.room) == (300 * MIB, 700 * MIB)


def test_the_tightest_cpu_quota_wins_on_version_2(tmp_path: Path) -> None:
    root = version_2(tmp_path, "/a/b")
    write(root, {"sys/fs/cgroup/a/cpu.max": "150000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"})

    found = cpu_quota(root)

    assert found is not None
    assert found.cores == 1.5


def test_a_cpu_quota_is_read_from_a_shared_mount_of_version_1(tmp_path: Path) -> None:
    root = version_1(tmp_path, "/a")
    folder = "sys/fs/cgroup/cpu,cpuacct/"
    write(
        root,
        {
            folder + "cpu.cfs_quota_us": "-1",
            folder + "cpu.cfs_period_us": "100000",
            folder + "a/cpu.cfs_quota_us": "50000",
            folder + "a/cpu.cfs_period_us": "100000",
        },
    )

    found = cpu_quota(root)

    assert found is not None
    assert found.cores == 0.5


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    mount = "31 23 0:28 / /sys/fs/my\\040groups rw,relatime - cgroup2 cgroup2 rw"
    write(tmp_path, {"proc/self/cgroup": "0::/", "proc/self/mountinfo": mount})
    write(tmp_path, {"sys/fs/my groups/memory.max": str(77 * MIB)})

    found = memory_limit(tmp_path)

    assert found is not None
    assert found.limit == 77 * MIB
