"""Builds the C++ libraries that can be built here; everything else is in pyproject.toml.

CM_FUSED_BUILD chooses: "auto" (default) builds the CPU library when torch and a C++ compiler are
at hand, and the CUDA library when torch has CUDA and there is a toolkit; "cpu" builds the CPU
library alone, "cuda" both, and either makes it an error when that cannot be; "none" builds
neither. Whether this machine has a GPU does not matter.

CM_FUSED_OBJECTS names a folder that keeps objects for later builds, also of other copies of the
sources; one build at a time may use it. CM_FUSED_CXXFLAGS adds flags.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# An empty CXX is one that is not set, here and for what compiles.
if not os.environ.get("CXX", "").strip():
    os.environ.pop("CXX", None)

BUILDS = ("auto", "cpu", "cuda", "none")
BUILD = os.environ.get("CM_FUSED_BUILD", "auto")
TORCH_MINIMUM = (2, 11)
# The stable ABI of that release: the wheel loads into every later torch.
TORCH_TARGET_VERSION = "0x020b000000000000"

SOURCES = [
    "csrc/library.cpp",
    "csrc/core/state.cpp",
    "csrc/core/bind.cpp",
    "csrc/core/glibc.cpp",
    "csrc/core/libstdcxx.cpp",
    "csrc/priority/table.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/ops.cpp",
    "csrc/cpu/pass.cpp",
    "csrc/cpu/steps.cpp",
    "csrc/cpu/kernels/step_default.cpp",
    "csrc/cpu/kernels/step_avx2.cpp",
    "csrc/cpu/kernels/step_avx512.cpp",
]
COMPILE_ARGS = [
    "-O3",
    # Python's own flags ask for debugging information, ten times the size of the code.
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    # One result on every instruction set: nothing is contracted to a fused multiply-add.
    "-ffp-contract=off",
    # Lets sqrt and selects be vectorized; neither changes a result.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
]
CUDA_SOURCES = ["csrc/cuda/update_priorities.cu"]
CUDA_COMPILE_ARGS = ["-O3", "-std=c++20", "-Xcompiler", "-fvisibility=hidden,-Wall,-Wextra"]
# 45 s of a core of a Zen 4.
COMPILE_TIME = "half a minute on two cores where ninja is installed, else a minute"
# Why each library that is not built is not, as cm_fused/_install.py reads it.
not_built = {"_C_cuda": "CM_FUSED_BUILD=cpu"} if BUILD == "cpu" else {}
# Those with a memory worth it, and PTX of the last for what comes after.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0")


def say(text: str) -> None:
    """Tell who builds, where pip shows it."""
    print(f"cm_fused: {text}", file=sys.stderr)


def pure_python(reason: str) -> None:
    """Say that the package is built without its libraries, or fail when one was asked for."""
    if BUILD in ("cpu", "cuda"):
        sys.exit(f"cm_fused: CM_FUSED_BUILD={BUILD}, but {reason}")
    not_built.update(_C=reason, _C_cuda=reason)
    say(
        f"building the pure-Python package, because {reason}. AdamCM will run on the "
        'eager backend. For the fast one: pip install "torch>=2.11" setuptools, have a C++20 '
        "compiler, and install again with --no-build-isolation."
    )


def without_cuda(reason: str) -> None:
    """Say that the CUDA library is left out, or fail when it was asked for."""
    if BUILD == "cuda":
        sys.exit(f"cm_fused: CM_FUSED_BUILD=cuda, but {reason}")
    not_built.update(_C_cuda=reason)
    say(f"building without the CUDA library, because {reason}")


def record(package: Path) -> None:
    """Write what was not built into the package that is being built."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build.json").write_text(json.dumps(not_built) + "\n")


def missing_requirement() -> str | None:
    """Return why no library can be built here, or None."""
    if BUILD not in BUILDS:
        sys.exit(f"cm_fused: CM_FUSED_BUILD must be auto, cpu, cuda or none, got {BUILD!r}")
    if BUILD == "none":
        return "CM_FUSED_BUILD=none"
    try:
        import torch
    except ImportError:
        return "torch is not in the build environment"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MINIMUM:
        return f"torch {torch.__version__} is older than 2.11"
    return missing_compiler()


def missing_compiler() -> str | None:
    """Return why nothing can be compiled here, or None; before a compiler says it at length."""
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        return f"{compiler[0]}, a C++20 compiler, was not found (Debian: apt-get install g++)"
    command = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    code = "#include <concepts>\n#include <span>\n"
    tried = subprocess.run(command, input=code, capture_output=True, text=True)
    if tried.returncode:
        return f"{compiler[0]} does not compile C++20 (GCC 10, Clang 13 or later do)"
    return None


def name_toolkit() -> None:
    """Set CUDA_HOME, where it is not set, to the toolkit that the nvcc on PATH belongs to.

    Before torch.utils.cpp_extension is imported, which takes the folder above that nvcc: another
    one where it is a script or a link.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None or os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    # What it would run, of a file that need not be there.
    plan = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    if top is not None:
        os.environ["CUDA_HOME"] = str(Path(top[1]).resolve())


def missing_cudart() -> str | None:
    """Return where the linker finds no CUDA runtime, or None."""
    from torch.utils.cpp_extension import library_paths

    folders = library_paths(device_type="cuda")
    compiler = os.environ.get("CXX", "c++").split()
    flags = [*os.environ.get("LDFLAGS", "").split(), *(f"-L{folder}" for folder in folders)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*compiler, "-shared", *flags, "-lcudart", "-o", f"{folder}/linked.so"]
        try:
            if subprocess.run(command, capture_output=True).returncode == 0:
                return None
        except OSError:  # the CPU library tells of a compiler that is not there
            return None
    return (
        f"{compiler[0]} found no libcudart.so, neither by itself nor in {' or '.join(folders)} "
        "(CUDA_HOME names the toolkit)"
    )


def missing_cuda_requirement() -> str | None:
    """Return why the CUDA library cannot be built here, or None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if CUDA_HOME is None or not (nvcc := Path(CUDA_HOME, "bin", "nvcc")).exists():
        return "no CUDA toolkit with an nvcc was found (CUDA_HOME names one)"
    release = re.search(r"release (\d+)", output_of(str(nvcc), "--version"))
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = "unknown" if release is None else release[1]
        return (
            f"torch was built with CUDA {torch.version.cuda}, but nvcc's major version is {found}"
        )
    return missing_cudart()


def output_of(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kept_objects() -> Path | None:
    """Return the folder for objects that later builds may use, or None.

    ninja sees when the sources, the headers of csrc or the flags change, but not the headers of
    torch and of the system, nor the compiler: their versions choose the folder.
    """
    if not (folder := os.environ.get("CM_FUSED_OBJECTS")):
        return None
    import torch

    compiler = output_of(*os.environ.get("CXX", "c++").split(), "--version")
    versions = f"{torch.__version__} {sys.version} {compiler}"
    return Path(folder, hashlib.sha256(versions.encode()).hexdigest()[:16]).absolute()


def mirror_sources(folder: Path) -> None:
    """Make folder/csrc equal to csrc. A file that has not changed keeps its time, for ninja."""
    sources = {path for path in Path("csrc").rglob("*") if path.is_file()}
    for copy in list((folder / "csrc").rglob("*")):
        if copy.is_file() and copy.relative_to(folder) not in sources:
            copy.unlink()
    for source in sources:
        copy = folder / source
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def default_architectures(supported: str) -> str:
    """Return TORCH_CUDA_ARCH_LIST, given what `nvcc --list-gpu-arch` prints."""
    names = supported.split()
    chosen = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in names]
    return ";".join(chosen) + "+PTX" if chosen else ""


def torch_headers() -> list[str]:
    """Return the flags for torch's headers, which are not ours to keep free of warnings."""
    from torch.utils.cpp_extension import include_paths

    return [flag for path in include_paths() for flag in ("-isystem", path)]


def relative_paths() -> list[str]:
    """Return the flags for relative paths in errors, where this build's say nothing to a user."""
    from torch.utils.cpp_extension import include_paths

    roots = [kept_objects() or Path.cwd(), *include_paths()]
    flags = [f"-fmacro-prefix-map={root}/=" for root in roots]
    compiler = os.environ.get("CXX", "c++").split()
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", "-"]
    knows = subprocess.run(command, input="", capture_output=True, text=True).returncode == 0
    return flags if knows else []


def cpu_extension() -> Extension:
    """Return the CPU library, which also has the schemas."""
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(  # type: ignore[no-untyped-call]
        "cm_fused._C",
        SOURCES,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            *COMPILE_ARGS,
            *torch_headers(),
            *relative_paths(),
            *os.environ.get("CM_FUSED_CXXFLAGS", "").split(),
        ],
        depends=glob.glob("csrc/**/*.h", recursive=True),
        py_limited_api=True,
    )


def cuda_extension() -> Extension:
    """Return the CUDA library, apart from the other so that a torch without CUDA loads that."""
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        architectures = default_architectures(output_of(f"{CUDA_HOME}/bin/nvcc", "--list-gpu-arch"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    # It is the host compiler that replaces macros.
    host_flags = [arg for flag in relative_paths() for arg in ("-Xcompiler", flag)]
    return CUDAExtension(  # type: ignore[no-untyped-call]
        "cm_fused._C_cuda",
        CUDA_SOURCES,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"nvcc": [*CUDA_COMPILE_ARGS, *torch_headers(), *host_flags]},
        depends=glob.glob("csrc/**/*.h", recursive=True),
        py_limited_api=True,
    )


def extension_arguments() -> dict[str, object]:
    """Return setup()'s arguments for the libraries."""
    name_toolkit()
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuildExtension(BuildExtension):
        """Leaves out what does not build, unless it was asked for: CUDA first, then everything."""

        extensions: list[Extension]
        compiler: object
        build_temp: str

        def run(self) -> None:
            package = Path(self.get_ext_fullpath(self.extensions[0].name)).parent
            compiler = self.compiler  # which a run replaces by what it made of it
            for report in (without_cuda, pure_python)[-len(self.extensions) :]:
                self.compiler = compiler
                try:
                    self.keep_objects()
                    say(f"compiling {self.extensions[-1].name}: {COMPILE_TIME}")
                    super().run()
                    self.check_libraries()
                    break
                except Exception as error:
                    report(f"{self.extensions[-1].name} did not build: {error}")
                    self.extensions = self.extensions[:-1]
            record(package)

        def check_libraries(self) -> None:
            """Raise where a compiler reported success and made nothing."""
            for extension in self.extensions:
                path = Path(self.get_ext_fullpath(extension.name))
                if not path.exists():
                    raise FileNotFoundError(f"the compiler left no {path.name}")

        def keep_objects(self) -> None:
            """Compile copies of the sources whose paths are the same in every build."""
            if (folder := kept_objects()) is None:
                return
            mirror_sources(folder)
            self.build_temp = str(folder)
            for extension in self.extensions:
                extension.sources = [str(folder / source) for source in extension.sources]

    extensions = [cpu_extension()]
    if BUILD != "cpu":
        reason = missing_cuda_requirement()
        if reason is None:
            extensions.append(cuda_extension())
        else:
            without_cuda(reason)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": OptionalBuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def pure_python_arguments() -> dict[str, object]:
    """Return setup()'s arguments for the package without libraries."""

    class RecordingBuild(build_py):  # type: ignore[misc]
        """Adds the record of what was not built, which else `build_ext` writes."""

        build_lib: str
        editable_mode: bool

        def run(self) -> None:
            super().run()
            record(Path("" if self.editable_mode else self.build_lib, "cm_fused"))

    return {"cmdclass": {"build_py": RecordingBuild}}


reason = missing_requirement()
if reason is not None:
    pure_python(reason)
setup(**(extension_arguments() if reason is None else pure_python_arguments()))
