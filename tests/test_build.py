"""The package installs with and without its extension, and the shared C++ compiles elsewhere."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LIBRARY = "cm_fused/_C.abi3.so"

DEVICE_CODE = """
#include "priority.h"

__global__ void update(float* keys, long capacity, double sq_norm, float decay, long* slot) {
  *slot = cm_fused::admit(keys, capacity, cm_fused::priority_key(sq_norm));
  cm_fused::decay(keys, capacity, decay);
  *slot += cm_fused::count_filled(keys, capacity);
}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Copy what an sdist holds, so that no build of the repository's is found."""
    copy = tmp_path / "source"
    for name in ("cm_fused", "csrc"):
        shutil.copytree(
            REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy / name)
    return copy


def build_wheel(source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `pip wheel` on a copy of the source, with `environment` over this process's own."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps"),
            *("--no-build-isolation", "--no-index", "--disable-pip-version-check"),
            *("--wheel-dir", str(source.parent / "wheels"), str(source)),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def wheel_files(source: Path) -> list[str]:
    """Return the names in the one wheel that was built."""
    (wheel,) = (source.parent / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_build_without_torch_is_pure_python(source: Path, tmp_path: Path) -> None:
    """Without torch in the build environment the wheel is pure Python, and the build says so."""
    stub = tmp_path / "no_torch"
    stub.mkdir()
    (stub / "torch.py").write_text("raise ImportError('no torch here')\n")
    result = build_wheel(source, PYTHONPATH=str(stub), CM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "torch is not in the build environment" in result.stdout + result.stderr
    assert list((source.parent / "wheels").glob("*-py3-none-any.whl"))
    files = wheel_files(source)
    assert LIBRARY not in files
    assert "cm_fused/py.typed" in files
    assert "cm_fused/ops/cpu.py" in files


def test_build_without_compiler_is_pure_python(source: Path) -> None:
    """Without a C++ compiler the build succeeds without the extension, and says so."""
    result = build_wheel(source, CXX="/nonexistent/c++", CM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the C++ extension did not build" in result.stdout + result.stderr
    assert LIBRARY not in wheel_files(source)


def test_build_asked_for_fails_without_compiler(source: Path) -> None:
    """CM_FUSED_BUILD=cpu makes a failed build an error."""
    result = build_wheel(source, CXX="/nonexistent/c++", CM_FUSED_BUILD="cpu")
    assert result.returncode != 0
    assert "CM_FUSED_BUILD=cpu, but" in result.stdout + result.stderr


def test_build_none_leaves_the_extension_out(source: Path) -> None:
    """CM_FUSED_BUILD=none builds no extension, and an unknown value is an error."""
    assert build_wheel(source, CM_FUSED_BUILD="none").returncode == 0
    assert LIBRARY not in wheel_files(source)
    result = build_wheel(source, CM_FUSED_BUILD="gpu")
    assert result.returncode != 0
    assert "CM_FUSED_BUILD must be auto, cpu or none, got 'gpu'" in result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_priority_buffer_compiles_for_a_device(tmp_path: Path) -> None:
    """csrc/priority.h compiles as device code, so that a CUDA kernel can use the same lines."""
    code = tmp_path / "device.cu"
    code.write_text(DEVICE_CODE)
    result = subprocess.run(
        [
            *("nvcc", "-std=c++20", "-arch=sm_90", "-Werror", "all-warnings", "-I"),
            *(str(REPOSITORY / "csrc"), "-cubin", "-o", str(tmp_path / "device.cubin"), str(code)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
