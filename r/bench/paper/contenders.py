"""The six systems of the paper, and AdEMAMix."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import Adam, Optimizer

from cm_fused import SAM, AdamCG, AdamCM, AdamWCM

RIVAL = "AdEMAMix"


@dataclass(frozen=True)
class Hyperparameters:
    """What a grid varies.

    Args:
        lr: Learning rate of the first step, > 0.
        beta1: Decay rate of the momentum, in [0, 1).
        beta2: Of the second moment, in [0, 1).
        capacity: C, >= 1, of the systems with a buffer.
        priority_decay: Lambda, in [0, 1], likewise.
        rho: Radius of the systems with SAM, >= 0.
        weight_decay: Of AdamW+CM, >= 0; 0 for all others.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    capacity: int = 5
    priority_decay: float = 0.7
    rho: float = 0.05
    weight_decay: float = 1e-2


Params = Iterable[nn.Parameter]


def _adam(params: Params, h: Hyperparameters) -> Optimizer:
    return Adam(params, h.lr, (h.beta1, h.beta2))


def _critical(
    kind: Callable[..., Optimizer], params: Params, h: Hyperparameters, **more: float
) -> Optimizer:
    options = {"capacity": h.capacity, "priority_decay": h.priority_decay, **more}
    return kind(params, h.lr, (h.beta1, h.beta2), **options)


def _ademamix(params: Params, h: Hyperparameters) -> Optimizer:
    try:
        from pytorch_optimizer import AdEMAMix
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{RIVAL} comes from pytorch_optimizer, which is not installed: "
            "pip install pytorch_optimizer"
        ) from error
    # Its own default for the slow average; the fast betas are everyone's.
    optimizer: Optimizer = AdEMAMix(params, h.lr, betas=(h.beta1, h.beta2, 0.9999))
    return optimizer


SYSTEMS: dict[str, Callable[[Params, Hyperparameters], Optimizer]] = {
    "Adam": _adam,
    "Adam+CG": partial(_critical, AdamCG),
    "Adam+SAM": lambda params, h: SAM(_adam(params, h), h.rho),
    "Adam+CM": partial(_critical, AdamCM),
    "Adam+SAM+CM": lambda params, h: SAM(_critical(AdamCM, params, h), h.rho),
    "AdamW+CM": lambda params, h: _critical(AdamWCM, params, h, weight_decay=h.weight_decay),
    RIVAL: _ademamix,
}

_EVERYONES = ("lr", "beta1", "beta2")
_BUFFERS = ("capacity", "priority_decay")

# The hyperparameters that each system has; a grid varies no others.
VARIED: dict[str, tuple[str, ...]] = {
    "Adam": _EVERYONES,
    "Adam+CG": (*_EVERYONES, *_BUFFERS),
    "Adam+SAM": (*_EVERYONES, "rho"),
    "Adam+CM": (*_EVERYONES, *_BUFFERS),
    "Adam+SAM+CM": (*_EVERYONES, *_BUFFERS, "rho"),
    "AdamW+CM": (*_EVERYONES, *_BUFFERS, "weight_decay"),
    RIVAL: _EVERYONES,
}
