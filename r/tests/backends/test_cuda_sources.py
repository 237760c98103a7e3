"""The CUDA sources compile for every architecture, without warnings, stack frames or spills."""

import re
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.support.cases import ROOT, needs_nvcc

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def compiled(source: Path, directory: Path) -> str:
    """Return what nvcc and ptxas print on a source that compiles; warnings are errors."""
    codes = (f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES)
    result = subprocess.run(
        [
            *("nvcc", "-c", "-O3", "-std=c++20", *codes),
            *("-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"),
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            *(flag for path in include_paths() for flag in ("-isystem", path)),
            *(str(source), "-o", str(directory / "object.o")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_kernels_keep_to_registers(source: Path, tmp_path: Path) -> None:
    """No kernel needs local memory: no stack frame, no spilled register."""
    printed = compiled(source, tmp_path)
    kernels = re.findall(r"Compiling entry function '\w+' for 'sm_(\w+)'", printed)
    assert set(kernels) == set(ARCHITECTURES)
    memory = [tuple(map(int, found)) for found in MEMORY.findall(printed)]
    assert memory == [(0, 0, 0)] * len(kernels), printed


def test_there_are_sources() -> None:
    """The test above has something to compile."""
    assert SOURCES
