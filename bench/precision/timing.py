"""Bytes and time of a step in every precision, beside torch's fused AdamW."""

import time
from dataclasses import dataclass
from statistics import median

import torch
from torch.optim import Optimizer

from bench.precision.setups import PRECISIONS
from cm_fused import AdamCM

# Fills the buffers, so that every timed step replaces a slot.
_WARM_UP = 7


@dataclass
class Cost:
    """What a precision costs.

    Attributes:
        precision: A key of ``PRECISIONS``.
        state_bytes: Of state, bytes per parameter; a running sum is a part of it.
        ratio: Median over the rounds of its step's time by AdamW's of the same round.
    """

    precision: str
    state_bytes: float
    ratio: float


def _state_bytes(optimizer: Optimizer, numel: int) -> float:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return float(sum(tensor.nbytes for tensor in tensors) / numel)


def measure(numel: int, rounds: int) -> list[Cost]:
    """Time one tensor's step in every precision, in turn with AdamW's.

    Args:
        numel: Elements of the tensor.
        rounds: Timed steps of each.
    """
    grad = 0.01 * torch.randn(numel)
    # Gradients that never change replace a slot at every step: the stored keys decay.
    params = {name: torch.randn(numel) for name in ("AdamW", *PRECISIONS) if "eager" not in name}
    optimizers: dict[str, Optimizer] = {}
    for name, param in params.items():
        param.grad = grad
        if name == "AdamW":
            optimizers[name] = torch.optim.AdamW([param], fused=True)
        else:
            precision = PRECISIONS[name]
            optimizers[name] = AdamCM(
                [param],
                buffer_dtype=precision.buffer_dtype,
                moment_dtype=precision.moment_dtype,
            )
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for turn in range(_WARM_UP + rounds):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if turn >= _WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    baseline = seconds.pop("AdamW")
    return [
        Cost(
            name,
            _state_bytes(optimizers[name], numel),
            median(mine / its for mine, its in zip(of_name, baseline, strict=True)),
        )
        for name, of_name in seconds.items()
    ]
