"""The demo's processes: what they say when they fail, and that none of them outlives the demo."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_runtime.demo.limits import Limit, impose
from edge_runtime.demo.processes import Child, end, spawn, verb

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(600)
"""


def python(code: str) -> list[str]:
    """The command line that runs some Python."""
    return [sys.executable, "-c", code]


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Whatever a test puts in here is killed after it."""
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.wait()


def finished(child: Child) -> Child:
    """The child, ended."""
    child.process.wait(60)
    return child


def says(child: Child, words: str) -> None:
    """Wait until a child has said something."""
    deadline = time.monotonic() + 60
    while words not in child.last_words():
        assert time.monotonic() < deadline, child.last_words()
        time.sleep(0.01)


def test_a_child_that_does_its_work_has_no_failure(tmp_path: Path) -> None:
    child = finished(spawn("pi", python("print('done')"), tmp_path / "logs" / "pi.log"))

    assert (child.ended, child.failure(), child.last_words()) == (True, "", "done")


def test_a_child_that_runs_has_not_failed_yet(tmp_path: Path, children: list[Child]) -> None:
    children.append(spawn("pi", python("import time; time.sleep(600)"), tmp_path / "pi.log"))

    assert not children[0].ended
    assert children[0].failure() == ""


def test_a_failure_is_its_exit_code_and_the_last_line_of_its_log(tmp_path: Path) -> None:
    code = "import sys; print('working'); sys.exit('no data here')"

    assert finished(spawn("pi", python(code), tmp_path / "pi.log")).failure() == "'pi' ended with 1: no data here"


def test_a_failure_without_a_word_is_told_by_its_exit_code(tmp_path: Path) -> None:
    assert (
        finished(spawn("pi", python("raise SystemExit(12)"), tmp_path / "pi.log")).failure() == "'pi' ended with 12: "
    )


def test_a_kill_by_somebody_is_not_laid_to_the_memory_limit(tmp_path: Path) -> None:
    declared = Limit(1 << 30, None, "declared only")
    child = finished(spawn("pi", python("import os; os.kill(os.getpid(), 9)"), tmp_path / "pi.log", declared))

    assert child.failure() == "'pi' was killed"


def test_a_kill_under_an_enforced_limit_is_told_as_such(tmp_path: Path) -> None:
    limit = impose(f"edge-runtime-test-{os.getpid()}", 64 << 20)
    if limit.group is None:
        pytest.skip(f"this machine lets nobody here limit memory: {limit.reason}")
    child = finished(spawn("pi", python(f"held = bytearray(b'x' * {256 << 20})"), tmp_path / "pi.log", limit))
    end([child])

    assert child.failure() == "'pi' was killed, by its memory limit"
    assert not limit.group.exists()


def test_end_terminates_those_that_listen_and_kills_those_that_do_not(tmp_path: Path, children: list[Child]) -> None:
    children.append(spawn("polite", python("print('here', flush=True); import time; time.sleep(600)"), tmp_path / "a"))
    children.append(spawn("stubborn", python(STUBBORN), tmp_path / "b"))
    says(children[0], "here")
    says(children[1], "deaf")
    end(children, grace=1.0)

    assert [child.process.returncode for child in children] == [-signal.SIGTERM, -signal.SIGKILL]


def test_end_leaves_alone_what_has_ended(tmp_path: Path) -> None:
    child = finished(spawn("pi", python("raise SystemExit(3)"), tmp_path / "pi.log"))
    end([child])

    assert child.process.returncode == 3


def test_output_of_both_kinds_goes_to_the_log_and_a_second_life_is_appended(tmp_path: Path) -> None:
    log = tmp_path / "pi.log"
    finished(spawn("pi", python("import sys; print('first'); print('wrong', file=sys.stderr)"), log))
    child = finished(spawn("pi", python("print('second')"), log))

    assert child.last_words(9).splitlines() == ["first", "wrong", "second"]


def test_a_log_that_is_no_text_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    code = r"import sys; sys.stdout.buffer.write(b'caf\xe9\n')"

    assert finished(spawn("pi", python(code), tmp_path / "pi.log")).last_words() == "caf\N{REPLACEMENT CHARACTER}"


def test_a_child_hears_no_ctrl_c_of_the_terminal(tmp_path: Path) -> None:
    """The demo hears it, and asks its children to end in order."""
    child = finished(spawn("pi", python("import os; print(os.getpgrp() == os.getpid())"), tmp_path / "pi.log"))

    assert child.last_words() == "True"


def test_a_verb_is_run_by_this_interpreter(tmp_path: Path) -> None:
    child = finished(spawn("nothing", verb("no-such-verb"), tmp_path / "log"))

    assert "No such command 'no-such-verb'" in child.failure()
    assert child.failure().startswith("'nothing' ended with 2: edge-runtime: ")
