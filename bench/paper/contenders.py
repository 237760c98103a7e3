"""The systems that are trained: the paper's five, its AdamW variants, and three baselines."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from cm_fused import SAM, AdamCG, AdamCM, AdamWCG, AdamWCM

RIVAL = "AdEMAMix"
MOMENTUM = "SGD+momentum"


@dataclass(frozen=True)
class Hyperparameters:
    """The values that a grid varies.

    Args:
        lr: Learning rate of the first epoch, > 0.
        beta1: Decay rate of the momentum, in [0, 1); the momentum of SGD.
        beta2: Decay rate of the second moment, in [0, 1).
        capacity: C, >= 1, of the systems with a buffer.
        priority_decay: Lambda, in [0, 1], likewise.
        rho: Radius of the systems with SAM, >= 0.
        weight_decay: Of the systems with AdamW, >= 0; 0 for all others.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.99
    capacity: int = 5
    priority_decay: float = 0.7
    rho: float = 0.05
    weight_decay: float = 1e-2


Params = Iterable[nn.Parameter]
Builder = Callable[[Params, Hyperparameters], Optimizer]


def _adam(params: Params, h: Hyperparameters) -> Optimizer:
    return Adam(params, h.lr, (h.beta1, h.beta2))


def _adamw(params: Params, h: Hyperparameters) -> Optimizer:
    return AdamW(params, h.lr, (h.beta1, h.beta2), weight_decay=h.weight_decay)


def _critical(kind: Callable[..., Optimizer], params: Params, h: Hyperparameters) -> Optimizer:
    decayed = {"weight_decay": h.weight_decay} if kind in (AdamWCM, AdamWCG) else {}
    return kind(
        params,
        h.lr,
        (h.beta1, h.beta2),
        capacity=h.capacity,
        priority_decay=h.priority_decay,
        **decayed,
    )


def _with_sam(build: Builder, params: Params, h: Hyperparameters) -> Optimizer:
    return SAM(build(params, h), h.rho)


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


_critical_momenta = partial(_critical, AdamCM)

SYSTEMS: dict[str, Builder] = {
    "Adam": _adam,
    "Adam+CG": partial(_critical, AdamCG),
    "Adam+SAM": partial(_with_sam, _adam),
    "Adam+CM": _critical_momenta,
    "Adam+SAM+CM": partial(_with_sam, _critical_momenta),
    "AdamW": _adamw,
    RIVAL: _ademamix,
    MOMENTUM: lambda params, h: SGD(params, h.lr, momentum=h.beta1),
    "AdamW+CG": partial(_critical, AdamWCG),
    "AdamW+SAM": partial(_with_sam, _adamw),
    "AdamW+CM": partial(_critical, AdamWCM),
}

PAPERS = ("Adam", "Adam+CG", "Adam+SAM", "Adam+CM", "Adam+SAM+CM")
BASELINES = ("AdamW", RIVAL, MOMENTUM)
# The paper's systems on ImageNet.
DECOUPLED = ("AdamW", "AdamW+CG", "AdamW+SAM", "AdamW+CM")


def _varied(system: str) -> tuple[str, ...]:
    if system == MOMENTUM:
        return ("lr", "beta1")
    parts = system.split("+")
    return (
        *("lr", "beta1", "beta2"),
        *(("capacity", "priority_decay") if {"CM", "CG"} & set(parts) else ()),
        *(("rho",) if "SAM" in parts else ()),
        *(("weight_decay",) if parts[0] == "AdamW" else ()),
    )


# The hyperparameters that each system has; a grid varies no others.
VARIED: dict[str, tuple[str, ...]] = {system: _varied(system) for system in SYSTEMS}
