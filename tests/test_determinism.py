"""The "cpu" backend gives the same bits whatever runs it."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.cases import CAPABILITIES, ROOT, mark_skip, needs_cpu_backend, skip_reason
from tests.workload import digest

pytestmark = needs_cpu_backend


@cache
def _expected() -> str:
    """Return the hash of one thread and the instruction set chosen by itself."""
    torch.set_num_threads(1)
    return digest()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads: int) -> None:
    """However many threads share the chunks, and on every run."""
    expected = _expected()
    torch.set_num_threads(threads)
    assert digest() == expected


@pytest.mark.parametrize(
    "capability",
    [
        pytest.param(capability, marks=mark_skip(skip_reason(capability=capability)))
        for capability in CAPABILITIES
    ],
)
def test_instruction_sets(capability: str) -> None:
    """Every instruction set, since nothing is contracted and no sum depends on its width."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.workload"],
        env={**os.environ, "CM_FUSED_CPU_CAPABILITY": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [capability, _expected()]
