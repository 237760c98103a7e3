"""Bytes and time of a step in every precision, beside torch's fused AdamW."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from bench.speed.precision.setups import PRECISIONS
from bench.timing import interleave
from cm_fused import AdamCM

# Fills the buffers, so that every timed step replaces a slot.
_WARM_UP = 7


@dataclass
class Cost:
    """The costs of a precision.

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
    # Gradients that never change replace a slot at every step: the stored keys decay.
    grad = 0.01 * torch.randn(numel)

    def param() -> torch.Tensor:
        made = torch.randn(numel)
        made.grad = grad
        return made

    optimizers: dict[str, Optimizer] = {
        name: AdamCM([param()], buffer_dtype=p.buffer_dtype, moment_dtype=p.moment_dtype)
        for name, p in PRECISIONS.items()
        if p.backend is None
    }
    steps = {"AdamW": torch.optim.AdamW([param()], fused=True).step}
    steps |= {name: optimizer.step for name, optimizer in optimizers.items()}
    timed = interleave(steps, rounds, warm_up=_WARM_UP)
    return [
        Cost(name, _state_bytes(optimizer, numel), timed.ratio(name, "AdamW"))
        for name, optimizer in optimizers.items()
    ]
