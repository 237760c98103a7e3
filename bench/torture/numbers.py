"""Gradients of every magnitude, in every position: keys are the norms, and none is lost.

The norm is a root of a float64 sum of squares: no float32 gradient's square overflows or underflows
there. A key is finite where the norm is at most the largest float32; else nothing is admitted.
"""

import math

import torch

from bench.torture.finding import Finding, require
from cm_fused import AdamCG, AdamCM

# Whole vectors of every instruction set, and tails of them.
NUMELS = (1, 7, 16, 37)


def run(quick: bool) -> Finding:
    """Try powers of two from the smallest denormal on, NaN and inf, in each position."""
    cases = 0
    values = [2.0**exponent for exponent in range(-149, 128, 8 if quick else 1)]
    values += [math.nan, math.inf, -math.inf, 0.0]
    for kind in (AdamCM, AdamCG):
        for backend in ("cpu", "eager"):
            for numel in NUMELS:
                positions = {0, numel // 2, numel - 1} if backend == "eager" else range(numel)
                for position in positions:
                    for value in values[:: 9 if backend == "eager" else 1]:
                        _check(kind, backend, numel, position, value)
                        cases += 1
    return Finding(
        "magnitudes",
        cases,
        "gradients with one number of 2^-149 to 2^127, zero, inf or NaN",
        "the key is the norm; what is not finite is not admitted",
    )


def _check(
    kind: type[AdamCM] | type[AdamCG], backend: str, numel: int, position: int, value: float
) -> None:
    param = torch.zeros(numel, requires_grad=True)
    optimizer = kind([param], capacity=2, priority_decay=1.0, backend=backend)
    param.grad = torch.zeros(numel)
    param.grad[position] = value
    optimizer.step()
    key = optimizer.state[param]["priorities"].max().item()
    expected = abs(value) if math.isfinite(value) else -math.inf
    require(key == expected, f"{backend}: the key of {value} at {position} of {numel} is {key}")
    if math.isfinite(value):
        require(bool(param.isfinite().all()), f"{backend}: {value} left {param}")
