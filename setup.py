"""Builds the C++ extension where it can; everything else is in pyproject.toml.

CM_FUSED_BUILD chooses: "auto" (default) builds the CPU library when torch and a C++ compiler are
at hand, "cpu" makes a failure to build it an error, "none" leaves it out.
"""

import glob
import os
import sys

from setuptools import setup

BUILD = os.environ.get("CM_FUSED_BUILD", "auto")
TORCH_MINIMUM = (2, 11)
# The stable ABI of that release: the wheel loads into every later torch.
TORCH_TARGET_VERSION = "0x020b000000000000"

SOURCES = [
    "csrc/library.cpp",
    "csrc/cpu/capability.cpp",
    "csrc/cpu/ops.cpp",
    "csrc/cpu/step_default.cpp",
    "csrc/cpu/step_avx2.cpp",
    "csrc/cpu/step_avx512.cpp",
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


def pure_python(reason: str) -> None:
    """Say that the package is built without its extension, or fail when it was asked for."""
    if BUILD == "cpu":
        sys.exit(f"cm_fused: CM_FUSED_BUILD=cpu, but {reason}")
    print(
        f"cm_fused: building the pure-Python package, because {reason}. AdamCM will run on the "
        'eager backend. For the fast one: pip install "torch>=2.11" setuptools, have a C++20 '
        "compiler, and install again with --no-build-isolation.",
        file=sys.stderr,
    )


def missing_requirement() -> str | None:
    """Return why the extension cannot be built here, or None."""
    if BUILD not in ("auto", "cpu", "none"):
        sys.exit(f"cm_fused: CM_FUSED_BUILD must be auto, cpu or none, got {BUILD!r}")
    if BUILD == "none":
        return "CM_FUSED_BUILD=none"
    try:
        import torch
    except ImportError:
        return "torch is not in the build environment"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH_MINIMUM:
        return f"torch {torch.__version__} is older than 2.11"
    return None


def extension_arguments() -> dict[str, object]:
    """Return setup()'s arguments for the extension."""
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class OptionalBuildExtension(BuildExtension):
        """Turns a failed build into a pure-Python package, unless the extension was asked for."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                self.extensions: list[object] = []
                pure_python(f"the C++ extension did not build: {error}")

    extension = CppExtension(  # type: ignore[no-untyped-call]
        "cm_fused._C",
        SOURCES,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[
            *COMPILE_ARGS,
            # torch's headers are not ours to keep free of warnings.
            *(flag for path in include_paths() for flag in ("-isystem", path)),
            *os.environ.get("CM_FUSED_CXXFLAGS", "").split(),
        ],
        depends=glob.glob("csrc/**/*.h", recursive=True),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": OptionalBuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = missing_requirement()
if reason is not None:
    pure_python(reason)
setup(**({} if reason is not None else extension_arguments()))
