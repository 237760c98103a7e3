"""Processes of sharded trainings end without an abort, whatever their last sum is doing."""

import subprocess
import sys
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cm_fused import _works
from tests.support.cases import needs_cpu_backend
from tests.support.exits import RUNS


@pytest.mark.slow
@needs_cpu_backend
def test_processes_that_exit_at_once(tmp_path: Path) -> None:
    """A script that trains, destroys the process group and ends has the exit code 0, in 20 runs.

    Nothing reads the state after the last step, as in a script that saved before. Older tests
    compared it, which waits for the last sum, and ended in processes that skip Python's
    finalization.
    """
    command = [sys.executable, "-m", "tests.support.exits", str(tmp_path)]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert len(lines) == len(RUNS), run.stdout
    assert [line for line in lines if not line.endswith(": [0, 0]")] == []


class _Work:
    def __init__(self, *, completed: bool = True, fails: bool = False) -> None:
        self.completed = completed
        self.fails = fails
        self.waited: list[timedelta] = []

    def is_completed(self) -> bool:
        return self.completed

    def wait(self, timeout: timedelta) -> bool:
        self.waited.append(timeout)
        if self.fails:
            raise RuntimeError("Connection closed by peer")
        return True


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> deque[Any]:
    """Return the works that are held, none, for this test alone."""
    held: deque[Any] = deque()
    monkeypatch.setattr(_works, "_works", held)
    monkeypatch.setattr(_works, "_register", lambda: None)
    return held


def test_finished_works_are_let_go(works: deque[Any]) -> None:
    """Only the latest are held, and those that have not finished: a long training keeps few."""
    unfinished = _Work(completed=False)
    _works.hold(unfinished)
    for _ in range(100):
        _works.hold(_Work())
    assert works[0] is unfinished
    assert len(works) == 101
    unfinished.completed = True
    _works.hold(_Work())
    assert len(works) == 16


def test_all_works_are_waited_for_at_exit(works: deque[Any]) -> None:
    """One that failed, of a process that died say, does not keep the others from being awaited."""
    held = [_Work(fails=True), _Work(), _Work(completed=False)]
    for work in held:
        _works.hold(work)
    _works._finish()
    assert [len(work.waited) for work in held] == [1, 1, 1]
    assert list(works) == held
