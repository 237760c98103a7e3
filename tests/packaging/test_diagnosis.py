"""`python -m cm_fused` says what is at work, and notices a backend that computes something else."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from cm_fused import __main__ as diagnosis
from tests.support.cases import needs_cpu_backend, needs_triton


@needs_cpu_backend
def test_what_it_prints() -> None:
    """Versions, libraries, each backend and why one is not there; the exit status is 0."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "cm_fused"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    for part in (
        f"torch {torch.__version__}",
        "C++ library: loaded, ",
        "CUDA library: ",
        "CUDA devices: none, ",
        "eager on cpu: the reference",
        "cpu on cpu: agrees with the reference",
        "triton on cpu: backend='triton' is not available: ",
    ):
        assert part in run.stdout, run.stdout


@needs_cpu_backend
@needs_triton
@pytest.mark.parametrize("difference", [1e-3, float("nan")])
def test_a_wrong_backend_is_noticed(
    difference: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A parameter that is off, or not a number, is shown, and the exit status is 1."""
    run = diagnosis._run

    def off(kind: Any, backend: str, device: torch.device) -> Any:
        params = run(kind, backend, device)
        if backend == "cpu":
            params[1][2] += difference
        return params

    monkeypatch.setattr(diagnosis, "_run", off)
    assert diagnosis.main() == 1
    printed = capsys.readouterr().out
    assert "cpu on cpu: WRONG: AdamCM is " in printed
    assert printed.count("WRONG") == 1


@needs_cpu_backend
def test_a_backend_that_raises_is_noticed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error is a line of the diagnosis, not its end."""
    run = diagnosis._run

    def fail(kind: Any, backend: str, device: torch.device) -> Any:
        if backend == "cpu":
            raise RuntimeError("no such kernel")
        return run(kind, backend, device)

    monkeypatch.setattr(diagnosis, "_run", fail)
    assert diagnosis.main() == 1
    assert "WRONG: AdamCM raises RuntimeError: no such kernel" in capsys.readouterr().out
