"""The CUDA library builds, links, loads and registers its operators, without a device."""

import json

import pytest

from bench.machine_code import cuda_build
from tests.support.cases import ROOT, skip_if


@pytest.mark.slow
@skip_if(cuda_build.missing_requirement())
def test_the_cuda_build() -> None:
    """No symbol is missing, every operator has its kernels, and the package says what it lacks."""
    diagnosis = cuda_build.check()["diagnosis"]
    assert "CUDA library: loaded" in diagnosis
    assert "CUDA devices: none, torch finds no device that it can use" in diagnosis
    assert "cpu on cpu: agrees with the reference" in diagnosis


def test_the_recorded_build() -> None:
    """The build that was recorded registered the operators of today's sources, that of CUDA too."""
    recorded = json.loads((ROOT / "bench" / "results" / "cuda_build.json").read_text())
    assert recorded["operators"] == cuda_build.expected_operators()
    assert recorded["operators"]["update_priorities_"] == ["CPU", "CUDA"]
    assert "CUDA library: loaded" in recorded["diagnosis"]
