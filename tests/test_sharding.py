"""Training over several processes is that of one: DDP, FSDP2, tensor parallelism, ZeRO, DCP.

The cases are in `tests/sharded.py`. Processes are started once for each number of them and run all
of its cases, since starting takes longer than most of these.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases import needs_cpu_backend
from tests.sharded import CASES

# Four processes save what fewer load.
WORLDS = (4, 2, 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str]:
    """Return what became of every case: its traceback, or nothing."""
    folder = tmp_path_factory.mktemp("sharded")
    found: dict[tuple[str, int], str] = {}
    for world in WORLDS:
        out = folder / f"{world}.json"
        command = [sys.executable, "-m", "tests.sharded", str(world), str(folder), str(out)]
        root = Path(__file__).parent.parent
        run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-4000:]
        found |= {(name, world): text for name, text in json.loads(out.read_text()).items()}
    return found


@needs_cpu_backend
@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, case in CASES.items() for world in case.worlds]
)
def test_case(name: str, world: int, results: dict[tuple[str, int], str]) -> None:
    """Every process runs the case through; its docstring says what it holds."""
    assert not results[name, world], results[name, world]
