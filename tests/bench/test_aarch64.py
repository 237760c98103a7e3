"""The run of the aarch64 wheel that was recorded, and what stands in for CUDA in such a run."""

import json
import shutil
import subprocess
from pathlib import Path

from bench import aarch64
from tests.support.cases import ROOT, skip_if


def test_the_recorded_run() -> None:
    """All that was selected passed, among it the frozen bits, which are those of x86-64."""
    recorded = json.loads((ROOT / "bench" / "results" / "aarch64.json").read_text())
    assert "tests/backends/test_frozen_bits.py" in recorded["tests"]
    for path, counts in recorded["tests"].items():
        assert (ROOT / path).exists()
        assert counts["passed"] > 0
        assert counts["failed"] == counts["skipped"] == 0, path
    assert "C++ library: loaded, default kernels" in recorded["diagnosis"]
    assert "cpu on cpu: agrees with the reference" in recorded["diagnosis"]


@skip_if("gcc is not installed" if shutil.which("gcc") is None else None)
def test_stand_ins_have_their_versions(tmp_path: Path) -> None:
    """Functions with and without versions link into one library, and torch finds no device."""
    symbols = {"cudaGetDeviceCount": "libcudart.so.13", "cublasCreate_v2": "libcublas.so.13"}
    source, script = aarch64.stand_in_source({**symbols, "ncclSend": ""})
    (tmp_path / "cuda.c").write_text(source)
    (tmp_path / "cuda.map").write_text(script)
    command = ("gcc", "-w", "-shared", "-fPIC", "-Wl,--version-script=cuda.map", "cuda.c")
    subprocess.run([*command, "-o", "cuda.so"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "cuda.so"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert {f"{name}@@{version}" for name, version in symbols.items()} | {"ncclSend"} <= names
