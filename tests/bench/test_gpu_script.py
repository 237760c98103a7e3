"""What bench/gpu.sh makes of the interpreter it is given, without a GPU."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cases import ROOT, needs_proc

COMMAND = ["bash", str(ROOT / "bench" / "gpu.sh")]
MOST_SECONDS = 9 * 60

# Has a device, warns, and fails every build.
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo "a warning" >&2; echo 9.0 ;;
  *setup.py*) echo "$TORCH_CUDA_ARCH_LIST $CM_FUSED_BUILD" >>"$LOG"; exit 1 ;;
esac
"""


# Has a device; every stage waits in a process of its own, but the bench writes what it has.
SLOW_PYTHON = """#!/bin/sh
case "$*" in
  *get_device_capability*) echo 9.0; exit ;;
  *default_name*) echo gpu.json; exit ;;
  *xdist*|"- "*) exit 1 ;;
  *$WAITS*) ;;
  *) exit 0 ;;
esac
for last; do case "$last" in *.json) out=$last ;; esac; done
sleep 600 & child=$!
trap 'kill $child; [ -z "$out" ] || echo "{}" >"$out"; exit 1' TERM
echo "$child" >>"$LOG"
wait
"""

LACKS_NVCC = """
  *setup.py*)
    [ "$CM_FUSED_BUILD" = cpu ] && exit
    echo "error: no CUDA toolkit with an nvcc was found (CUDA_HOME names one)"; exit 1 ;;
"""


def _environment(tmp_path: Path, python: str, **others: str) -> dict[str, str]:
    path = tmp_path / "python"
    path.write_text(python)
    path.chmod(0o755)
    of = {"PYTHON": str(path), "LOG": str(tmp_path / "log"), "OUT": str(tmp_path / "out")}
    return {**os.environ, **of, **others}


def _first_line(path: Path) -> str:
    """Return a file's first line once it has one, which takes seconds."""
    end = time.monotonic() + 120
    while not path.exists() or "\n" not in path.read_text():
        assert time.monotonic() < end, f"the script has not begun to write {path.name}"
        time.sleep(0.05)
    return path.read_text().splitlines()[0]


def _has_ended(process: str) -> bool:
    """Return whether a process has ended, if only its parent has not asked for its status."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def _ends(process: str) -> bool:
    """Return whether a process that was sent a signal ends; on a busy machine not at once."""
    end = time.monotonic() + 10
    while not _has_ended(process) and time.monotonic() < end:
        time.sleep(0.05)
    return _has_ended(process)


BENCHES = (
    "bench.speed.__main__",
    "bench.speed.host_time",
    "bench.speed.report",
    "bench.reliability.parity",
    "bench.reliability.sanitize",
)
# A machine with a GPU is only known to have torch, triton, numpy, pytest and its benchmark.
LACKED = "hypothesis", "matplotlib", "mlxtend", "rich", "scipy", "sklearn", "timm", "tqdm"


def test_benches_import_what_is_there() -> None:
    """Without the packages that only CPU benches need; `bench.speed` needed scikit-learn.

    No test saw it, as every machine that ran one had all of them.
    """
    lacked = f"import sys; sys.modules.update(dict.fromkeys({LACKED!r}))"
    script = f"{lacked}; import {', '.join(BENCHES)}"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_builds_are_asked_for_and_fail(tmp_path: Path) -> None:
    """Warnings are no architecture, and a build without a library is a stage that failed."""
    environment = _environment(tmp_path, PYTHON)
    run = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    assert (tmp_path / "log").read_text().splitlines() == ["9.0 cuda", "9.0 cpu"]
    assert "build-without-cuda: FAILED" in run.stdout


@needs_proc
@pytest.mark.parametrize(
    ("waits", "cut_off"), [("pytest", "tests-gpu"), ("bench.speed", "bench"), ("setup.py", "build")]
)
def test_what_there_is_comes_back(tmp_path: Path, waits: str, cut_off: str) -> None:
    """A script that is asked to end delivers logs and results, and leaves no process behind."""
    environment = _environment(tmp_path, SLOW_PYTHON, WAITS=waits)
    script = subprocess.Popen([*COMMAND, "--smoke"], env=environment, stdout=subprocess.PIPE)
    child = _first_line(tmp_path / "log")
    script.terminate()
    output, _ = script.communicate(timeout=60)
    assert script.returncode == 128 + signal.SIGTERM, output
    out = tmp_path / "out"
    assert f"{cut_off}: FAILED: cut off" in (out / "stages.txt").read_text()
    assert f"===== {cut_off}" in (out / "gpu.log").read_text()
    assert (out / "gpu.json").exists() == (cut_off == "bench")
    assert _ends(child)


def test_what_a_machine_lacks_is_no_failure(tmp_path: Path) -> None:
    """No toolkit and no compute-sanitizer: said, and passed."""
    python = SLOW_PYTHON.replace("*$WAITS*) ;;", LACKS_NVCC)
    environment = _environment(tmp_path, python, PATH="/usr/bin:/bin")
    run = subprocess.run(COMMAND, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    stages = (tmp_path / "out" / "stages.txt").read_text()
    assert "build: cannot: no CUDA toolkit with an nvcc was found" in stages
    assert "build-without-cuda: passed" in stages
    assert "memcheck: cannot: compute-sanitizer is not installed" in stages


def test_the_plan_fits() -> None:
    """The limits of all stages together are under nine minutes."""
    run = subprocess.run([*COMMAND, "--plan"], capture_output=True, text=True, check=True)
    limits = re.search(r"^together: (\d+) s", run.stdout, re.MULTILINE)
    assert limits is not None
    assert int(limits[1]) < MOST_SECONDS
