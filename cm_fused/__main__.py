"""`python -m cm_fused`: print what is installed and available, and whether it computes correctly.

Exits with 1 where a backend's results are not the reference's.
"""

import platform
import sys
from importlib import metadata

import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
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


def main() -> int:
    """Print the diagnosis; return the exit status."""
    print(f"cm_fused {_version('cm_fused')}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    cuda = torch.version.cuda or "none"
    print(f"torch {torch.__version__} (CUDA {cuda}), triton {_version('triton')}")
    print(f"C++ library: {library.unavailable_reason or f'loaded, {cpu.capability()} kernels'}")
    print(f"CUDA library: {library.cuda_unavailable_reason or 'loaded'}")
    print(f"CUDA devices: {_cuda_devices()}")
    failed = False
    for device in _devices():
        for name in NAMES:
            line, right = _diagnosis(name, device)
            failed |= not right
            print(line)
    return int(failed)


def _diagnosis(name: str, device: torch.device) -> tuple[str, bool]:
    """Return a line on a backend, and whether all is well: it is correct, or not available."""
    try:
        backend = select(name, device)
    except RuntimeError as error:
        return f"{name} on {device}: {error}", True
    what = backend.describe(device)
    if name == "eager":
        return f"{what}: the reference", True
    wrong = _self_test(name, device)
    verdict = "agrees with the reference" if wrong is None else f"WRONG: {wrong}"
    return f"{what}: {verdict}", not wrong


if __name__ == "__main__":
    sys.exit(main())
