"""Bytes and time of a step in every precision, beside torch's fused AdamW in float32."""

from dataclasses import dataclass
from itertools import chain
from statistics import median

import torch
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from bench.speed.precision.setups import PRECISIONS, TIMED, Timed
from bench.timing import interleave
from cm_fused import AdamCM

# Fills the buffers, so that every timed step replaces a slot.
_WARM_UP = 7
# How often both optimizers' tensors are made anew: where they lie in memory changes a ratio more
# than the rounds do. With all setups at once, in 13 GB, float32 took 1.21 to 2.11 of AdamW's time.
PLACES = 5


@dataclass
class Cost:
    """The costs of a step.

    Attributes:
        name: A key of ``PRECISIONS`` or ``TIMED``.
        state_bytes: Of state, bytes per parameter; a running sum is a part of it.
        ratio: Median over the rounds of its step's time by AdamW's of the same round.
        least: The least of the medians of the rounds between which no tensor was made anew.
        most: The largest of those.
    """

    name: str
    state_bytes: float
    ratio: float
    least: float
    most: float


def _state_bytes(optimizer: Optimizer, numel: int) -> float:
    tensors = (value for state in optimizer.state.values() for value in state.values())
    return float(sum(tensor.nbytes for tensor in tensors) / numel)


def _param(numel: int, setup: Timed) -> torch.Tensor:
    # Gradients that never change replace a slot at every step: the stored keys decay.
    grad = (0.01 * torch.randn(numel)).to(setup.grad_dtype)
    # Set while both have one dtype: torch checks that here, and not later.
    param = torch.empty_like(grad)
    param.grad = grad
    param.data = torch.randn(numel).to(setup.param_dtype)
    return param


def _setups() -> dict[str, Timed]:
    of_state = {
        name: Timed(options={"buffer_dtype": p.buffer_dtype, "moment_dtype": p.moment_dtype})
        for name, p in PRECISIONS.items()
        if p.backend is None
    }
    return of_state | TIMED


def measure(numel: int, rounds: int) -> list[Cost]:
    """Time one tensor's step in every precision and setup, in turn with AdamW's.

    Args:
        numel: Elements of the tensor.
        rounds: Timed steps of each, rounded up to a multiple of the times that tensors are made.
    """
    return [_cost(numel, rounds, name, setup) for name, setup in tqdm(_setups().items(), "timing")]


def _cost(numel: int, rounds: int, name: str, setup: Timed) -> Cost:
    ratios = []
    for _ in range(PLACES):
        own = AdamCM([_param(numel, setup)], **setup.options)
        steps = {name: own.step, "AdamW": AdamW([_param(numel, Timed())], fused=True).step}
        timed = interleave(steps, -(-rounds // PLACES), warm_up=_WARM_UP)
        ratios.append(timed.ratios(name, "AdamW"))
    medians = [median(each) for each in ratios]
    return Cost(
        name,
        _state_bytes(own, numel),
        median(chain.from_iterable(ratios)),
        min(medians),
        max(medians),
    )
