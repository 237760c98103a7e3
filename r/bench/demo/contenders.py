"""The optimizers that the demo compares."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.optim import Optimizer

import cm_fused

# The default of AdamCM; torch's own is (0.9, 0.999).
_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class Contender:
    """One optimizer and one implementation of it.

    Args:
        label: Its name in the table and the figure.
        algorithm: The name under which a task keeps the learning rate.
        make: Builds it from ``(params, lr=...)``.
    """

    label: str
    algorithm: str
    make: Callable[..., Optimizer]


BASELINE = Contender("AdamW fused", "AdamW", partial(torch.optim.AdamW, betas=_BETAS, fused=True))
BEST = Contender("AdamCM", "AdamCM", partial(cm_fused.AdamCM, betas=_BETAS))
EAGER = Contender("AdamCM eager", "AdamCM", partial(cm_fused.AdamCM, betas=_BETAS, backend="eager"))

CONTENDERS = {contender.label: contender for contender in (BASELINE, BEST, EAGER)}
