"""Readings of an optimizer's critical buffers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused._distributed import whole_state
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.making import dequantized, unscaled
from cm_fused.sam import SAM


@dataclass(frozen=True)
class Reading:
    """The contents of some parameters' buffers after a step, in numbers.

    A quantity that does not exist yet is NaN. Over several parameters norms are those of all their
    elements together, and the others are means weighted by the number of elements.

    Attributes:
        filled: Number of filled slots.
        variance: Population variance over the filled slots, mean over the elements (Fig. 8).
        agreement: Mean cosine between the slot of the highest key and each other filled slot, from
            two slots on (Fig. 10); a slot of zeros has none.
        momentum_norm: Norm of m, `exp_avg`.
        mean_norm: Norm of the buffer's mean as a step uses it, eq. (6).
        aggregate_norm: Norm of m + the mean, eq. (5), with the buffer after the last admission;
            critical momenta only, since critical gradients add the mean to a gradient.
    """

    filled: float
    variance: float
    agreement: float
    momentum_norm: float
    mean_norm: float
    aggregate_norm: float


def read(optimizer: Optimizer) -> dict[Tensor, Reading]:
    """Return the reading of every parameter that has a buffer.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Not changed. The
            state of DTensors is gathered: every process must call this.

    Raises:
        TypeError: It is another optimizer.
    """
    base = critical(optimizer)
    base._flush()
    return {
        param: _reading(base, group, whole_state(unscaled(base.state[param])))
        for group in base.param_groups
        for param in group["params"]
        if "critical_buffer" in base.state.get(param, {})
    }


def combine(readings: Mapping[Tensor, Reading]) -> Reading:
    """Return the reading of several parameters together; see `Reading`."""
    return Reading(**combined(Reading, readings))


def combined(kind: Any, items: Mapping[Tensor, Any]) -> dict[str, float]:
    """Return the quantities of a `Reading` or `History` of several parameters together.

    Norms and the distance are those of all elements together, `max_age` is the largest, and the
    others are means weighted by the number of elements.
    """
    weights = [param.numel() for param in items]
    result = {}
    for field in fields(kind):
        values = [getattr(item, field.name) for item in items.values()]
        if field.name.endswith(("norm", "distance")):
            result[field.name] = sum(value**2 for value in values) ** 0.5
        elif field.name == "max_age":
            result[field.name] = max((v for v in values if v == v), default=float("nan"))
        else:
            result[field.name] = _weighted_mean(values, weights)
    return result


def critical(optimizer: Optimizer) -> CriticalAdam:
    """Return an optimizer of this package, without `SAM` around it; TypeError for any other."""
    base = optimizer.optimizer if isinstance(optimizer, SAM) else optimizer
    if not isinstance(base, CriticalAdam):
        raise TypeError(
            "optimizer must have a critical buffer (AdamCM, AdamCG, their decoupled forms, or SAM "
            f"around one), got {type(base).__name__}"
        )
    return base


def _weighted_mean(values: Sequence[float], weights: Sequence[int]) -> float:
    """Return the mean of the values that exist; NaN if none does."""
    pairs = [(v, w) for v, w in zip(values, weights, strict=True) if v == v and w]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else float("nan")


def _reading(base: CriticalAdam, group: Mapping[str, Any], state: Mapping[str, Any]) -> Reading:
    keys = state["priorities"]
    momentum = flat(dequantized(state, "exp_avg"), 0)
    slots = flat(dequantized(state, "critical_buffer"), 1)[keys > -torch.inf]
    filled = len(slots)
    divisor = group["capacity"] if group["buffer_mean"] == "capacity" else max(filled, 1)
    mean = slots.sum(0) / divisor
    nan = torch.tensor(float("nan"), dtype=torch.float32, device=keys.device)
    numbers = [
        slots.var(0, correction=0).mean() if filled and slots.shape[1] else nan,
        _agreement(slots, keys[keys > -torch.inf]) if filled > 1 else nan,
        torch.linalg.vector_norm(momentum),
        torch.linalg.vector_norm(mean),
        nan if base._critical_gradients else torch.linalg.vector_norm(momentum + mean),
    ]
    # One copy to the host, whatever the number of quantities.
    return Reading(float(filled), *torch.stack([number.float() for number in numbers]).tolist())


def flat(tensor: Tensor, start: int) -> Tensor:
    """Return the elements as float32 or wider, complex ones as pairs, from one dimension on."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
    wide = real.to(torch.promote_types(real.dtype, torch.float32))
    return wide.flatten(start)


def _agreement(slots: Tensor, keys: Tensor) -> Tensor:
    top = int(keys.argmax())
    others = torch.cat([slots[:top], slots[top + 1 :]])
    cosines = (others @ slots[top]) / (
        torch.linalg.vector_norm(others, dim=1) * torch.linalg.vector_norm(slots[top])
    )
    mean: Tensor = cosines.nanmean()
    return mean
