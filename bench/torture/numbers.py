"""Gradients of every magnitude, in every position, against norms and the reference in float64.

NOTE: [Bounds]
A norm is a root of a float64 sum of squares, which no float32's square overflows or underflows: a
key is finite where the norm, rounded to float32, is. Moments are right to the roundings of float32
and of its denormals while (1 - beta2) a^2 is finite, |a| <= 2^63; above, v is infinite and the
element stands still, as with torch.optim.Adam.
"""

import math

import torch
from torch import Tensor

from bench.torture.finding import Finding, require
from cm_fused import AdamCG, AdamCM

Kind = type[AdamCM] | type[AdamCG]

KINDS: tuple[Kind, ...] = (AdamCM, AdamCG)
# Whole vectors of every instruction set, and tails of them.
NUMELS = (1, 7, 16, 37)
EXPONENTS = range(-149, 128)
# Of gradients that come again: the sum of five slots of AdamCG is beyond float32 from 2^126 on.
LARGEST_REPEATED = 125
# What the reference takes of these steps costs most of the time.
STEPS = 3
CAPACITY = 3
LARGEST_SQUARED = 2.0**63
HALF_ULP, HALF_DENORMAL = 2.0**-24, 2.0**-150


def run(quick: bool) -> Finding:
    """Try powers of two from the smallest denormal on, NaN and inf, in each position."""
    exponents = EXPONENTS[:: 8 if quick else 1]
    cases = _try_keys(exponents)
    for kind in KINDS:
        for eps_inside_sqrt in (True, False):
            for exponent in (e for e in exponents if e <= LARGEST_REPEATED):
                _require_reference(kind, eps_inside_sqrt, 2.0**exponent)
                cases += 1
    return Finding(
        "magnitudes",
        cases,
        "gradients of 2^-149 to 2^127 (repeated: 2^125), zero, inf or NaN, in each position",
        "the key is the norm, what is not finite is not admitted, moments and parameters are those "
        "of float64 to stated bounds",
    )


def _try_keys(exponents: range) -> int:
    cases = 0
    values = [2.0**exponent for exponent in exponents]
    values += [math.nan, math.inf, -math.inf, 0.0]
    for kind in KINDS:
        for backend in ("cpu", "eager"):
            for numel in NUMELS:
                positions = {0, numel // 2, numel - 1} if backend == "eager" else range(numel)
                for position in positions:
                    for value in values[:: 9 if backend == "eager" else 1]:
                        _require_key(kind, backend, numel, position, value)
                        cases += 1
    return cases


def _require_key(kind: Kind, backend: str, numel: int, position: int, value: float) -> None:
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


def _require_reference(kind: Kind, eps_inside_sqrt: bool, value: float) -> None:
    """Require moments and parameters of a few steps to be those of the reference in float64."""
    param, state = _stepped(kind, eps_inside_sqrt, value, torch.float32, "cpu")
    expected, reference = _stepped(kind, eps_inside_sqrt, value, torch.float64, "eager")
    where = f"{kind.__name__}, {value}"
    require(bool(param.isfinite().all()), f"{where}: left {param}")
    if value > LARGEST_SQUARED:
        return
    # At most C + 8 roundings a step are in an aggregate; a square doubles them.
    roundings = (CAPACITY + 8) * STEPS
    for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        bound = power * roundings * HALF_ULP * reference[key].abs().max() + (
            2 * roundings * HALF_DENORMAL
        )
        error = (state[key] - reference[key]).abs().max()
        require(bool(error <= bound), f"{where}: {key} is off by {error}, at most {bound}")
    # Each of the steps moves a parameter of 1 by less than a half.
    off = (param - expected).abs().max()
    require(bool(off <= 2 * roundings * HALF_ULP), f"{where}: the parameter is off by {off}")


def _stepped(
    kind: Kind, eps_inside_sqrt: bool, value: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    param = torch.ones(3, dtype=dtype, requires_grad=True)
    optimizer = kind(
        [param], lr=1e-2, capacity=CAPACITY, eps_inside_sqrt=eps_inside_sqrt, backend=backend
    )
    for draw in ([0.5, -1.0, 1.0], [1.0, -0.25, 1.0], [0.75, -1.0, 0.5])[:STEPS]:
        # The same float32 numbers for both.
        param.grad = (torch.tensor(draw) * value).to(dtype)
        optimizer.step()
    return param.detach(), optimizer.state[param]
