"""The package installs with and without its libraries, and says what it leaves out."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARY = "cm_fused/_C.abi3.so"

CUDA_LIBRARY = "cm_fused/_C_cuda.abi3.so"

# What torch and a CUDA toolkit look like to a build, on a machine that has neither a CUDA torch nor
# a toolkit.
CUDA_TORCH = """
import torch
torch.version.cuda = "13.0"
torch.cuda._is_compiled = lambda: True
torch.cuda.is_available = lambda: False
"""
NVCC = """#!/bin/sh
case "$*" in
  "--dryrun any.cu") echo "#$ TOP=$(dirname "$0")/.." >&2 ;;
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *) echo "nvcc was given $*" ; exit {compiles} ;;
esac
"""
# Makes its outputs without looking at its inputs.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
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


PIP = (
    *("-m", "pip", "wheel", "--verbose", "--no-deps", "--no-build-isolation", "--no-index"),
    *("--disable-pip-version-check", "--wheel-dir", "../wheels", "."),
)
# What pip calls, without the processes it starts for metadata, each of which imports torch.
HOOK = ("-c", "from setuptools import build_meta; build_meta.build_wheel('../wheels')")


def build_wheel(
    source: Path, command: tuple[str, ...] = HOOK, /, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Build a wheel of a copy of the source, with `environment` over this process's own."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=source,
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
    result = build_wheel(source, PIP, PYTHONPATH=str(stub), CM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "torch is not in the build environment" in result.stdout + result.stderr
    assert list((source.parent / "wheels").glob("*-py3-none-any.whl"))
    assert "because torch is not in the build environment. " in first_step(source)
    files = wheel_files(source)
    assert LIBRARY not in files
    assert "cm_fused/py.typed" in files
    assert "cm_fused/_backends/cpu.py" in files


def test_build_without_compiler_is_pure_python(source: Path) -> None:
    """Without a C++ compiler the build says so in one sentence, and so does the wheel's step."""
    result = build_wheel(source, CXX="/nonexistent/c++", CM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    reason = "/nonexistent/c++, a C++20 compiler, was not found (Debian: apt-get install g++)"
    assert reason in result.stdout + result.stderr
    assert LIBRARY not in wheel_files(source)
    assert f"the C++ extension was not built, because {reason}. " in first_step(source)


@pytest.mark.parametrize("compiler", ["", " "])
def test_an_empty_compiler_is_the_default_one(source: Path, compiler: str, tmp_path: Path) -> None:
    """An empty CXX counts as none; the older tests name compilers: it raised an IndexError."""
    write_script(tmp_path / "c++", "#!/bin/sh\necho 'error: concepts: no such file' >&2; exit 1\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    result = build_wheel(source, CXX=compiler, PATH=path, CM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "c++ does not compile C++20" in result.stdout + result.stderr


def test_build_with_an_old_compiler_is_pure_python(source: Path, tmp_path: Path) -> None:
    """The older tests had a compiler that is missing: one without C++20 printed pages of errors."""
    write_script(tmp_path / "c++", "#!/bin/sh\necho 'error: concepts: no such file' >&2; exit 1\n")
    result = build_wheel(source, CXX=str(tmp_path / "c++"), CM_FUSED_BUILD="auto")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "c++ does not compile C++20" in result.stdout + result.stderr
    assert "no such file" not in result.stdout + result.stderr


def test_build_that_fails_is_recorded(source: Path) -> None:
    """What the compiler refuses is left out, and the record says which part did not build."""
    (source / "csrc" / "library.cpp").write_text("#error not today\n")
    environment = {"CM_FUSED_OBJECTS": str(source.parent / "objects")}
    for name in (source / "csrc").rglob("*.cpp"):
        if name.name != "library.cpp":
            name.write_text("")
    result = build_wheel(source, CM_FUSED_BUILD="auto", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "compiling cm_fused._C: half a minute" in result.stdout + result.stderr
    assert "was not built, because cm_fused._C did not build" in first_step(source)


def first_step(source: Path) -> str:
    """Return what a first step with the wheel that was built warns of."""
    (wheel,) = (source.parent / "wheels").glob("*.whl")
    installed = source.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import torch; from cm_fused import AdamCM; x = torch.ones(2); x.grad = x.clone(); "
        "AdamCM([x]).step()"
    )
    step = subprocess.run(
        [sys.executable, "-c", code], cwd=installed, capture_output=True, text=True, check=True
    )
    return step.stderr


def test_build_asked_for_fails_without_compiler(source: Path) -> None:
    """CM_FUSED_BUILD=cpu makes a failed build an error, and says nothing of CUDA."""
    result = build_wheel(source, PIP, CXX="/nonexistent/c++", CM_FUSED_BUILD="cpu")
    assert result.returncode != 0
    assert "CM_FUSED_BUILD=cpu, but" in result.stdout + result.stderr
    assert "without the CUDA library" not in result.stdout + result.stderr


@pytest.fixture
def cuda_torch(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a build with a CUDA torch, a toolkit, and a compiler for C++."""
    toolkit, stub = tmp_path / "toolkit", tmp_path / "stub"
    (toolkit / "bin").mkdir(parents=True)
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(CUDA_TORCH)
    write_script(toolkit / "bin" / "nvcc", NVCC.format(release="13.0", compiles=0))
    write_script(toolkit / "c++", COMPILER)
    compilers = dict.fromkeys(("CC", "CXX"), str(toolkit / "c++"))
    return {
        "PYTHONPATH": str(stub),
        "CUDA_HOME": str(toolkit),
        "TORCH_CUDA_ARCH_LIST": "",
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
        **compilers,
    }


def write_script(path: Path, text: str) -> None:
    """Write an executable."""
    path.write_text(text)
    path.chmod(0o755)


@pytest.mark.parametrize("build", ["auto", "cuda"])
def test_build_with_cuda_has_both(source: Path, cuda_torch: dict[str, str], build: str) -> None:
    """With a toolkit and a CUDA torch both libraries are built, for what this nvcc can build."""
    nvcc = Path(cuda_torch["CUDA_HOME"], "bin", "nvcc")
    write_script(nvcc, nvcc.read_text().replace("*)", f'*) {cuda_torch["CXX"]} "$@";'))
    result = build_wheel(source, CM_FUSED_BUILD=build, **cuda_torch)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {LIBRARY, CUDA_LIBRARY} <= set(wheel_files(source))
    codes = sorted(set(re.findall(r"arch=compute_\d+,code=\w+", result.stdout + result.stderr)))
    assert codes == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90,code=compute_90",
        "arch=compute_90,code=sm_90",
    ]


@pytest.mark.parametrize("kind", ["script", "link"])
def test_build_with_an_nvcc_outside_its_toolkit(
    source: Path, cuda_torch: dict[str, str], kind: str
) -> None:
    """Where PATH has a script or a link of ccache, the toolkit is the one that nvcc names."""
    toolkit = Path(cuda_torch["CUDA_HOME"])
    nvcc, compiler = toolkit / "bin" / "nvcc", cuda_torch["CXX"]
    write_script(nvcc, nvcc.read_text().replace("*)", f'*) {compiler} "$@";'))
    other = source.parent / "other"
    (other / "bin").mkdir(parents=True)
    script = other / "bin" / "nvcc"
    if kind == "link":
        script = other / "ccache"
        (other / "bin" / "nvcc").symlink_to(script)
    write_script(script, f'#!/bin/sh\nexec {nvcc} "$@"\n')
    path = f"{other / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**cuda_torch, "CUDA_HOME": "", "CUDA_PATH": "", "PATH": path}
    result = build_wheel(source, CM_FUSED_BUILD="cuda", **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{toolkit}/include" in result.stdout + result.stderr
    assert str(other) not in result.stdout + result.stderr


def test_build_without_a_cuda_runtime(source: Path, cuda_torch: dict[str, str]) -> None:
    """Where the linker finds no CUDA runtime, the build says where it looked."""
    compiler = Path(cuda_torch["CXX"])
    refuse = 'case "$*" in *-lcudart*) exit 1 ;; esac\n'
    write_script(compiler, COMPILER.replace("\n", "\n" + refuse, 1))
    result = build_wheel(source, CM_FUSED_BUILD="cuda", **cuda_torch)
    assert result.returncode != 0
    reason = f"CM_FUSED_BUILD=cuda, but {compiler} found no libcudart.so"
    assert reason in result.stdout + result.stderr
    assert f"{cuda_torch['CUDA_HOME']}/lib" in result.stdout + result.stderr


@pytest.mark.parametrize("build", ["cpu", "cuda", "auto"])
def test_build_that_leaves_no_library(source: Path, cuda_torch: dict[str, str], build: str) -> None:
    """A compiler that succeeds and makes nothing fails what was asked for; auto says so."""
    write_script(Path(cuda_torch["CXX"]), "#!/bin/sh\n")
    result = build_wheel(source, CM_FUSED_BUILD=build, **cuda_torch)
    assert (result.returncode == 0) == (build == "auto"), result.stdout + result.stderr
    assert "did not build: the compiler left no " in result.stdout + result.stderr


def test_build_without_cuda_says_why(source: Path) -> None:
    """CM_FUSED_BUILD=cuda is an error where torch has no CUDA; auto goes on, saying the same."""
    reason = "has no CUDA"
    stub = source.parent / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text("import torch.version\ntorch.version.cuda = None\n")
    write_script(stub / "c++", COMPILER)
    result = build_wheel(source, PYTHONPATH=str(stub), CM_FUSED_BUILD="cuda")
    assert result.returncode != 0
    assert re.search(f"CM_FUSED_BUILD=cuda, but torch .* {reason}", result.stdout + result.stderr)
    environment = {"PYTHONPATH": str(stub), "TORCH_DONT_CHECK_COMPILER_ABI": "1"}
    result = build_wheel(source, CM_FUSED_BUILD="auto", CXX=str(stub / "c++"), **environment)
    assert result.returncode == 0
    said = f"without the CUDA library, because torch .* {reason}"
    assert re.search(said, result.stdout + result.stderr)


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        (None, "no CUDA toolkit with an nvcc was found"),
        (
            NVCC.format(release="12.9", compiles=0),
            "torch was built with CUDA 13.0, but nvcc's major version is 12",
        ),
        (NVCC.format(release="13.0", compiles=1), "cm_fused._C_cuda did not build"),
    ],
    ids=["missing", "other_release", "failing"],
)
def test_build_without_a_working_nvcc(
    source: Path, cuda_torch: dict[str, str], nvcc: str | None, reason: str
) -> None:
    """Without an nvcc that does, auto builds the CPU library alone and cuda fails; both say why."""
    path = Path(cuda_torch["CUDA_HOME"], "bin", "nvcc")
    path.unlink()
    if nvcc is not None:
        write_script(path, nvcc)
    result = build_wheel(source, CM_FUSED_BUILD="auto", **cuda_torch)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"building without the CUDA library, because {reason}" in result.stdout + result.stderr
    assert LIBRARY in wheel_files(source)
    assert CUDA_LIBRARY not in wheel_files(source)
    result = build_wheel(source, CM_FUSED_BUILD="cuda", **cuda_torch)
    assert result.returncode != 0
    assert reason in result.stdout + result.stderr


def test_build_none_leaves_the_extension_out(source: Path) -> None:
    """CM_FUSED_BUILD=none builds no extension, and an unknown value is an error."""
    assert build_wheel(source, CM_FUSED_BUILD="none").returncode == 0
    assert LIBRARY not in wheel_files(source)
    result = build_wheel(source, CM_FUSED_BUILD="gpu")
    assert result.returncode != 0
    assert (
        "CM_FUSED_BUILD must be auto, cpu, cuda or none, got 'gpu'" in result.stdout + result.stderr
    )


def test_build_uses_kept_objects(source: Path, cuda_torch: dict[str, str]) -> None:
    """With CM_FUSED_OBJECTS only what has changed is compiled, whichever copy is built."""
    log = source.parent / "log"
    compiler = Path(cuda_torch["CXX"])
    write_script(compiler, f'#!/bin/sh\necho "$@" >> {log}\n{COMPILER.partition(chr(10))[2]}')
    other = shutil.copytree(source, source.parent / "other" / "source")
    environment = {"CM_FUSED_BUILD": "cpu", "CM_FUSED_OBJECTS": str(source.parent / "objects")}

    def compiled(tree: Path) -> set[str]:
        log.write_text("")
        result = build_wheel(tree, **cuda_torch, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return set(re.findall(r"(\w+\.cpp) -o", log.read_text()))

    (source / "csrc" / "removed.h").touch()
    assert compiled(source) == {path.name for path in (source / "csrc").rglob("*.cpp")}
    assert compiled(other) == set()
    (other / "csrc" / "priority" / "table.cpp").write_text("// changed\n")
    assert compiled(other) == {"table.cpp"}
    assert not list((source.parent / "objects").rglob("removed.h"))
