"""What bench/gpu.sh makes of the interpreter it is given, without a GPU."""

import os
import subprocess
from pathlib import Path

from tests.support.cases import ROOT

# Has a device, warns, and fails every build.
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo "a warning" >&2; echo 9.0 ;;
  *setup.py*) echo "$TORCH_CUDA_ARCH_LIST $CM_FUSED_BUILD" >>"$LOG"; exit 1 ;;
esac
"""


def test_builds_are_asked_for_and_fail(tmp_path: Path) -> None:
    """Warnings are no architecture, and a build without a library is a stage that failed."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "LOG": str(log)}
    environment.pop("OUT", None)
    command = ["bash", str(ROOT / "bench" / "gpu.sh")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1, run.stdout + run.stderr
    assert log.read_text().splitlines() == ["9.0 cuda", "9.0 cpu"]
    assert "build-without-cuda: FAILED" in run.stdout
