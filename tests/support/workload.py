"""A run of the "cpu" backend over dtypes and options, and the hash of all that comes out of it.

Run as a module it prints the instruction set in use and the hash.
"""

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
from cm_fused._backends import cpu
from cm_fused.rounding import HALF_DTYPES
from tests.support.cases import (
    CHUNK,
    DTYPES,
    KINDS,
    Event,
    Kind,
    make_bucket,
    make_gradients,
    make_optimizer,
    make_params,
    real,
    step_options,
)
from tests.support.oracle import Options

# Two chunks and a part of a third, which ends within a block; and a tensor of a few lanes.
SHAPES: list[tuple[int, ...]] = [(2 * CHUNK + 77,), (5,)]
OPTIONS = (
    Options(),
    Options(capacity=3, amsgrad=True, eps_inside_sqrt=False, priority_scope="tensor"),
    Options(weight_decay=0.1, maximize=True, buffer_mean="size"),
)
STEPS = 30
# Halves that are quiet and signalling NaNs and infinities, of one dtype or of both.
NOT_FINITE = (-1, 0x7D01, 0x7FA1, -0x3FF, 0x7C00, 0x7F80)
# Of runs in half-precision parameters, which take every form of rounding.
PRECISIONS: tuple[dict[str, Any], ...] = (
    {"buffer_dtype": torch.bfloat16, "low_precision_update": "kahan"},
    {"buffer_dtype": torch.float16, "moment_dtype": torch.bfloat16},
    {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.int8},
    {"buffer_dtype": torch.int8, "low_precision_update": "stochastic", "capacity": 12},
)


def _bytes(tensor: Tensor) -> bytes:
    return real(tensor).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _sq_norm(params: list[Tensor]) -> Tensor:
    """Return the sum of squares by which keys are made: in the float32 keys few of its bits show.

    Those few decide an admission all the same, on one machine in a great many.
    """
    bucket = make_bucket(params, Options(), fused=True)
    bucket.grads = params
    return cpu.sq_norms(bucket, step_options(Options())).sum()


def _rounded_run(kind: Kind, dtype: torch.dtype, precision: dict[str, Any]) -> bytes:
    """Return the parameters and state of a run with state of low precision.

    Some parameters are not finite: conversions may differ in what they make of a NaN.
    """
    params = make_params(SHAPES, dtype)
    for i, bits in enumerate(NOT_FINITE):
        params[0].detach().view(torch.int16)[i::97] = bits
    cls = AdamCM if kind == "cm" else AdamCG
    optimizer = cls(params, lr=0.05, seed=2**40 + 3, backend="cpu", **precision)
    for grads in make_gradients(params, [Event(scale=1 + t % 7) for t in range(8)]):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    states = optimizer.state_dict()["state"]
    values = [value for state in states.values() for _, value in sorted(state.items())]
    return b"".join(map(_bytes, [*params, *values]))


def digest() -> str:
    """Return a hash of all parameters and state after the run, and of the gradients' norm."""
    bits = hashlib.sha256()
    events = [Event(scale=1 + t % 7) for t in range(STEPS)]
    for dtype in DTYPES:
        params = make_params(SHAPES, dtype)
        runs = [[param.clone() for param in params] for _ in range(len(KINDS) * len(OPTIONS))]
        optimizers = [
            make_optimizer(run, replace(options, kind=kind, lr=0.05), "cpu")
            for run, (kind, options) in zip(
                runs, [(kind, options) for kind in KINDS for options in OPTIONS], strict=True
            )
        ]
        # The gradients are the dearest part: one draw serves all runs.
        for grads in make_gradients(params, events):
            for run, optimizer in zip(runs, optimizers, strict=True):
                for param, grad in zip(run, grads, strict=True):
                    param.grad = grad
                optimizer.step()
        for run, optimizer in zip(runs, optimizers, strict=True):
            states = optimizer.state_dict()["state"]
            values = [value for state in states.values() for _, value in sorted(state.items())]
            for tensor in [*run, *values]:
                bits.update(_bytes(tensor))
        bits.update(_bytes(_sq_norm(params)))
    for kind in KINDS:
        for dtype in HALF_DTYPES:
            split = ({"low_precision_update": "split"},) if dtype is torch.bfloat16 else ()
            for precision in (*PRECISIONS, *split):
                bits.update(_rounded_run(kind, dtype, precision))
    return bits.hexdigest()


if __name__ == "__main__":
    print(cpu.capability(), digest())
