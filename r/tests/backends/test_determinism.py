"""The "cpu" backend gives the same bits whatever runs it."""

import os
import subprocess
import sys
from functools import cache

import pytest
import torch

from tests.support.cases import ROOT, capability_params, needs_cpu_backend
from tests.support.workload import digest

pytestmark = needs_cpu_backend


@cache
def _expected() -> str:
    """Return the hash of one thread and the instruction set chosen by itself."""
    torch.set_num_threads(1)
    return digest()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(threads: int) -> None:
    """However many threads share the chunks, and on every run."""
    expected = _expected()
    torch.set_num_threads(threads)
    assert digest() == expected


@pytest.mark.slow
@pytest.mark.parametrize("capability", capability_params())
def test_instruction_sets(capability: str) -> None:
    """Every instruction set, since nothing is contracted and no sum depends on its width."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.workload"],
        env={**os.environ, "CM_FUSED_CPU_CAPABILITY": capability},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [capability, _expected()]
