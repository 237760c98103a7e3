"""The time of the optimizer's step alone, as a ratio to a baseline."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from bench.demo.contenders import BASELINE, CONTENDERS, Contender
from bench.timing import interleave

# Enough steps to fill a critical buffer several times over.
_WARM_UP = 20


def _with_fixed_gradients(contender: Contender, shapes: Sequence[torch.Size]) -> Optimizer:
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return contender.make(params, lr=1e-3)


def step_time_ratios(shapes: Sequence[torch.Size], rounds: int) -> dict[str, float]:
    """Return each contender's step time over the baseline's.

    The contenders step in turn, on one thread (it stays the process's setting), so that whatever
    else the machine does falls on all alike; the ratio is taken within a round and the median over
    the rounds.
    Gradients that never change keep the critical buffer replacing a slot at every step
    (the stored keys decay, the new one does not), its most expensive regime.

    Args:
        shapes: Of the parameters; gradients are normal deviates.
        rounds: Timed steps of each contender.
    """
    # A second thread would wait at every kernel for a core that other programs hold.
    torch.set_num_threads(1)
    steps = {
        label: _with_fixed_gradients(contender, shapes).step
        for label, contender in CONTENDERS.items()
    }
    timed = interleave(steps, rounds, warm_up=_WARM_UP)
    return {label: timed.ratio(label, BASELINE.label) for label in steps}
