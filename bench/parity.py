"""The error of float32 steps beside float64: `python -m bench.parity [RESULTS.json]`.

Every backend of the device takes the same steps from the same start as the eager reference in
float64, which the tests hold to the oracle. Given a results file, the errors are written into it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine
from cm_fused import AdamCG, AdamCM

_SHAPES = ((1000, 333), (4096,), (65, 7))
_STEPS = 200
_FUSED = {"cpu": "cpu", "cuda": "triton"}


def _gradients(device_type: str) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for t in range(_STEPS):
        scale = 1 + t % 7
        yield [scale * torch.randn(shape, generator=generator).to(device_type) for shape in _SHAPES]


def _trained(
    kind: type[AdamCM | AdamCG], capacity: int, backend: str, dtype: torch.dtype, device_type: str
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(shape, generator=generator).to(device_type, dtype).requires_grad_()
        for shape in _SHAPES
    ]
    optimizer = kind(params, lr=0.01, capacity=capacity, backend=backend)
    for grads in _gradients(device_type):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.to(dtype)
        optimizer.step()
    return [param.detach().double() for param in params]


def measure(device_type: str) -> list[dict[str, Any]]:
    """Return the largest error of the fused and of the eager float32 step, and their ratio."""
    results = []
    for kind in (AdamCM, AdamCG):
        for capacity in (3, 5, 20):
            exact = _trained(kind, capacity, "eager", torch.float64, device_type)
            errors = {}
            for backend in (_FUSED[device_type], "eager"):
                params = _trained(kind, capacity, backend, torch.float32, device_type)
                pairs = zip(params, exact, strict=True)
                errors[backend] = max(float((a - b).abs().max()) for a, b in pairs)
            fused, eager = errors.values()
            name = f"{kind.__name__} C={capacity}"
            results.append({"optimizer": name, "errors": errors, "ratio": fused / eager})
    return results


def main() -> None:
    """Measure, print, and write into a results file if one is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="results file to update")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=machine.default_device())
    arguments = parser.parse_args()
    measured = measure(arguments.device)
    print(json.dumps(measured, indent=1))
    if arguments.results:
        results: dict[str, Any] = json.loads(arguments.results.read_text())
        results["parity"] = measured
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
