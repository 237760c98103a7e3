"""`python -m cm_fused`: print what is installed and available, and whether it computes correctly.

The exit status is 1 if a backend does not compute what the reference computes, if a backend that is
named is not available, or if the fast backend of a device is not available. CPUs need no fast one
if the package was built with CM_FUSED_BUILD=none.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata

import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM, _install
from cm_fused._backends import cpu, library
from cm_fused._backends.select import NAMES, select

_SHAPES = ((300, 70), (5,), ())
_STEPS = 12
# For two implementations that round differently, after a dozen steps.
_TOLERANCE = 1e-4


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found


def _cuda_devices() -> str:
    """Return the names of the CUDA devices, or why there is none."""
    if torch.version.cuda is None:
        return "none, this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "none, torch finds no device that it can use"
    return ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))


def _run(kind: type[AdamCM | AdamCG], backend: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device) for shape in _SHAPES]
    optimizer = kind(params, lr=0.01, capacity=3, backend=backend)
    for _ in range(_STEPS):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        optimizer.step()
    return params


def _self_test(backend: str, device: torch.device) -> str | None:
    """Return an error of a backend, or None."""
    for kind in (AdamCM, AdamCG):
        try:
            params, expected = (_run(kind, name, device) for name in (backend, "eager"))
        except Exception as error:
            return f"{kind.__name__} raises {type(error).__name__}: {error}"
        pairs = zip(params, expected, strict=True)
        # With a NaN a tensor's maximum is NaN; Python's `max` may not be.
        difference = torch.stack([(mine - theirs).abs().max() for mine, theirs in pairs]).max()
        if not difference <= _TOLERANCE:
            return f"{kind.__name__} is {difference:.1e} off the reference"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the diagnosis; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cm_fused", description=(__doc__ or "").partition("\n\n")[2]
    )
    parser.add_argument(
        "backends", nargs="*", metavar="BACKEND", help=f"must be available: {', '.join(NAMES)}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parsed = parser.parse_args(arguments)
    if unknown := {*parsed.backends} - {*NAMES}:
        parser.error(f"BACKEND must be one of {', '.join(NAMES)}, got {', '.join(unknown)}")
    diagnosis = _diagnosis(parsed.backends)
    print(json.dumps(asdict(diagnosis), indent=1) if parsed.json else _as_text(diagnosis))
    return int(bool(diagnosis.problems))


@dataclass(frozen=True)
class _Found:
    """A backend on a device."""

    backend: str
    device: str
    available: bool
    what: str  # what steps there, or why nothing does
    correct: bool | None  # None: it is the reference, or not available


@dataclass(frozen=True)
class _Diagnosis:
    """All that is printed."""

    versions: dict[str, str]
    imported_from: str
    cpp_library: str
    cuda_library: str
    cuda_devices: str
    backends: list[_Found]
    problems: list[str]


def _diagnosis(wanted: Sequence[str]) -> _Diagnosis:
    """Return what is installed and at work; a problem is what was asked for and is not there."""
    found = [_examine(name, device) for device in _devices() for name in NAMES]
    problems = [each.what for each in found if each.correct is False]
    problems += [
        f"{name} is not available on any device"
        for name in wanted
        if not any(each.available for each in found if each.backend == name)
    ]
    reason = library.unavailable_reason
    if reason is not None and ("cpu" in wanted or not reason.endswith(_install.NOT_WANTED)):
        problems.append(f"{reason}. {_install.remedy()}")
    problems += [
        f"on {each.device} the slow reference takes the steps: {each.what}"
        for each in found
        if each.backend == "triton" and each.device != "cpu" and not each.available
    ]
    versions = {
        "cm_fused": _version("cm_fused"),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
    }
    return _Diagnosis(
        versions,
        str(_install.PACKAGE.parent),
        reason or f"loaded, {cpu.capability()} kernels",
        library.cuda_unavailable_reason or "loaded",
        _cuda_devices(),
        found,
        problems,
    )


def _as_text(diagnosis: _Diagnosis) -> str:
    lines = [
        *(f"{package} {version}" for package, version in diagnosis.versions.items()),
        f"imported from {diagnosis.imported_from}",
        f"C++ library: {diagnosis.cpp_library}",
        f"CUDA library: {diagnosis.cuda_library}",
        f"CUDA devices: {diagnosis.cuda_devices}",
        *(_line(each) for each in diagnosis.backends if each.correct is not False),
        *(f"PROBLEM: {problem}" for problem in diagnosis.problems),
    ]
    return "\n".join(lines)


def _line(found: _Found) -> str:
    if not found.available:
        return f"{found.backend} on {found.device}: {found.what}"
    return f"{found.what}: {'agrees with ' if found.correct else ''}the reference"


def _examine(name: str, device: torch.device) -> _Found:
    try:
        backend = select(name, device)
    except RuntimeError as error:
        # The remedy is said once, as a problem.
        reason = str(error).removesuffix(f". {_install.remedy()}")
        return _Found(name, str(device), False, reason, None)
    what = backend.describe(device)
    if name == "eager":
        return _Found(name, str(device), True, what, None)
    wrong = _self_test(name, device)
    if wrong is not None:
        return _Found(name, str(device), True, f"{what}: WRONG: {wrong}", False)
    return _Found(name, str(device), True, what, True)


if __name__ == "__main__":
    sys.exit(main())
