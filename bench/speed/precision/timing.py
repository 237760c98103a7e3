"""Bytes and time of a step in every precision, beside torch's fused AdamW in float32."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from bench.speed.precision.setups import PRECISIONS, TIMED
from bench.timing import interleave
from cm_fused import AdamCM

# Fills the buffers, so that every timed step replaces a slot.
_WARM_UP = 7


@dataclass
class Cost:
    """The costs of a step.

    Attributes:
        name: A key of ``PRECISIONS`` or ``TIMED``.
        state_bytes: Of state, bytes per parameter; a running sum is a part of it.
        ratio: Median over the rounds of its step's time by AdamW's of the same round.
    """

    name: str
    state_bytes: float
    ratio: float


def _state_bytes(optimizer: Optimizer, numel: int) -> float:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return float(sum(tensor.nbytes for tensor in tensors) / numel)


def _param(numel: int, dtype: torch.dtype, grad: torch.Tensor) -> torch.Tensor:
    # Set while both have one dtype: torch checks that here, and not later.
    param = torch.empty_like(grad)
    param.grad = grad
    param.data = torch.randn(numel).to(dtype)
    return param


def measure(numel: int, rounds: int) -> list[Cost]:
    """Time one tensor's step in every precision and setup, in turn with AdamW's.

    Args:
        numel: Elements of the tensor.
        rounds: Timed steps of each.
    """
    # Gradients that never change replace a slot at every step: the stored keys decay.
    grad = 0.01 * torch.randn(numel)
    grads = {dtype: grad.to(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def params(
        dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32
    ) -> list[torch.Tensor]:
        return [_param(numel, dtype, grads[grad_dtype])]

    optimizers: dict[str, Optimizer] = {
        name: AdamCM(params(), buffer_dtype=p.buffer_dtype, moment_dtype=p.moment_dtype)
        for name, p in PRECISIONS.items()
        if p.backend is None
    }
    optimizers |= {
        name: AdamCM(params(t.param_dtype, t.grad_dtype), **t.options) for name, t in TIMED.items()
    }
    steps = {"AdamW": torch.optim.AdamW(params(), fused=True).step}
    steps |= {name: optimizer.step for name, optimizer in optimizers.items()}
    timed = interleave(steps, rounds, warm_up=_WARM_UP)
    return [
        Cost(name, _state_bytes(optimizer, numel), timed.ratio(name, "AdamW"))
        for name, optimizer in optimizers.items()
    ]
