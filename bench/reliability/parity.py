"""How far float32 steps are from float64 ones: `python -m bench.reliability.parity [RESULTS.json]`.

The reference in float64 is the truth; the device's fused backend and the reference, both in
float32, take the same steps from the same parameters with the same gradients. The errors of the
two are alike if the fused step is as exact as float32 allows. Given a results file, the figures are
written into it.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench import machine
from bench.speed import report
from bench.speed.providers import BACKENDS
from cm_fused import AdamCG, AdamCM

Kind = type[AdamCM | AdamCG]

_STEPS = 200
# With a last chunk that is not full, a tensor smaller than a block, and one that is not aligned.
_ELEMENTS = (2_000_003, 786_432, 4096, 1001, 7)
_RUNS: tuple[tuple[Kind, int], ...] = (
    (AdamCM, 5),
    (AdamCM, 3),
    (AdamCG, 5),
    (AdamCG, 3),
)
_LR = 1e-2
# The spread of a gradient's logarithm from step to step: enough for keys that no rounding confuses,
# and for steps that admit and steps that skip.
_SPREAD = 0.5


def fused_backend(device: str) -> str:
    """Return the backend that is held against the reference; Triton's too when interpreted."""
    return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else BACKENDS[device]


class _Run:
    """An optimizer, its parameters, and what a step does to them."""

    def __init__(
        self,
        optimizer_class: Kind,
        capacity: int,
        backend: str,
        initial: list[Tensor],
    ) -> None:
        self.params = [Parameter(tensor.clone()) for tensor in initial]
        self.optimizer = optimizer_class(self.params, lr=_LR, capacity=capacity, backend=backend)

    def step(self, grads: list[Tensor]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad.to(param.dtype)
        self.optimizer.step()

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return what is compared, by name, with every commit made."""
        self.optimizer.state_dict()
        states = [self.optimizer.state[param] for param in self.params]
        compared = {"parameters": [param.detach() for param in self.params]}
        for key in ("exp_avg", "exp_avg_sq", "critical_buffer", "priorities"):
            compared[key] = [state[key] for state in states]
        return compared


def _error(own: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference of two lists of tensors; NaN if there is one."""
    differences = [
        (a.double() - b.double()).abs().max() for a, b in zip(own, exact, strict=True) if a.numel()
    ]
    return float(torch.stack(differences).max())


def _compare(
    optimizer_class: Kind,
    capacity: int,
    device: str,
    elements: tuple[int, ...],
    steps: int,
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> list[Tensor]:
        return [torch.randn(n, generator=generator, device=device) for n in elements]

    initial = normal()
    fused = _Run(optimizer_class, capacity, fused_backend(device), initial)
    eager = _Run(optimizer_class, capacity, "eager", initial)
    exact = _Run(optimizer_class, capacity, "eager", [tensor.double() for tensor in initial])
    for _ in range(steps):
        scale = (_SPREAD * torch.randn((), generator=generator, device=device)).exp()
        grads = [scale * grad for grad in normal()]
        for run in (fused, eager, exact):
            run.step(grads)
    errors = {}
    truth, of_eager = exact.tensors(), eager.tensors()
    for name, tensors in fused.tensors().items():
        own, theirs = _error(tensors, truth[name]), _error(of_eager[name], truth[name])
        errors[name] = {"fused": own, "eager": theirs, "ratio": own / theirs if theirs else None}
    return {
        "optimizer": optimizer_class.__name__,
        "capacity": capacity,
        "largest_errors": errors,
    }


def measure(
    device: str, elements: tuple[int, ...] = _ELEMENTS, steps: int = _STEPS
) -> dict[str, Any]:
    """Return the largest errors of float32 steps and their ratios.

    Args:
        device: "cpu" or "cuda".
        elements: Of each parameter.
        steps: How many are taken before the comparison.
    """
    return {
        "backend": fused_backend(device),
        "steps": steps,
        "elements": list(elements),
        "runs": [
            _compare(optimizer_class, capacity, device, elements, steps)
            for optimizer_class, capacity in _RUNS
        ],
    }


def main() -> None:
    """Measure, print, and write into a results file if one is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability.parity", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="results file to update")
    parser.add_argument("--device", choices=machine.DEVICES, default=machine.default_device())
    parser.add_argument("--steps", type=int, default=_STEPS)
    parser.add_argument("--elements", type=int, nargs="+", default=_ELEMENTS)
    arguments = parser.parse_args()
    measured = measure(arguments.device, tuple(arguments.elements), arguments.steps)
    print(report.parity_table(measured))
    if arguments.results:
        results: dict[str, Any] = json.loads(arguments.results.read_text())
        results["parity"] = measured
        arguments.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
