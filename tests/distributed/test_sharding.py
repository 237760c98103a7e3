"""Training over several processes is that of one: DDP, FSDP2, tensor parallelism, ZeRO, DCP.

The cases are in `tests/support/sharded`. Processes are started once for each number of them and
run all of its cases.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.cases import needs_cpu_backend
from tests.support.sharded import CASES, WORLDS, is_slow


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], str]:
    """Return what became of every case: its traceback, or nothing."""
    folder = tmp_path_factory.mktemp("sharded")
    has_slow = any(item.get_closest_marker("slow") for item in request.session.items)
    which = "all" if has_slow else "quick"
    command = [sys.executable, "-m", "tests.support.sharded", str(folder), which]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {
        (name, world): text
        for world in WORLDS
        for name, text in json.loads((folder / f"{world}.json").read_text()).items()
    }


PARAMS: list[Any] = [
    pytest.param(name, world, marks=[pytest.mark.slow] if is_slow(name, world) else [])
    for name, case in CASES.items()
    for world in case.worlds
]


@needs_cpu_backend
@pytest.mark.parametrize(("name", "world"), PARAMS)
def test_case(name: str, world: int, results: dict[tuple[str, int], str]) -> None:
    """Every process runs the case through; its docstring says what it holds."""
    assert not results[name, world], results[name, world]
