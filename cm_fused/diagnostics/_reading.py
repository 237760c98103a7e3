"""Readings of an optimizer's critical buffers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused._distributed import is_sharded, whole_state
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.making import dequantized, unscaled
from cm_fused.sam import SAM

# Elements of a row that are in float64 at a time. On a CPU those of six rows fit into a core's
# second-level cache: 1.8 times faster than parts of 2^20.
_CPU_CHUNK, _DEVICE_CHUNK = 2**14, 2**22


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


@torch.no_grad()
def read(optimizer: Optimizer) -> dict[Tensor, Reading]:
    """Return the reading of every parameter that has a buffer, or whose capacity is 0.

    It reads momentum and slots once, and makes one copy to the host for each device and capacity.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Not changed. The
            state of DTensors is gathered: every process must call this.

    Raises:
        TypeError: It is another optimizer.
    """
    base = critical(optimizer)
    base._flush()
    members: dict[tuple[torch.device, int], list[_Buffer]] = {}
    params = []
    for group in base.param_groups:
        for param in group["params"]:
            state = base.state.get(param, {})
            if "critical_buffer" in state or ("exp_avg" in state and not group["capacity"]):
                params.append(param)
                buffer = _buffer_of(param, state, group["buffer_mean"] == "capacity")
                key = buffer.keys.device, len(buffer.keys)
                members.setdefault(key, []).append(buffer)
    readings = {}
    for buffers in members.values():
        readings.update(_readings(buffers, has_aggregate=not base._critical_gradients))
    return {param: readings[param] for param in params}


def combine(readings: Mapping[Tensor, Reading]) -> Reading:
    """Return the reading of several parameters together; see `Reading`."""
    return Reading(**combined(Reading, readings))


def combined(kind: Any, items: Mapping[Tensor, Any]) -> dict[str, float]:
    """Return the quantities of a `Reading` or `History` of several parameters together.

    Norms, the distance and root mean squares are those of all elements together, `max_age` is the
    largest, and the others are means weighted by the number of elements.
    """
    weights = [param.numel() for param in items]
    result = {}
    for field in fields(kind):
        values = [getattr(item, field.name) for item in items.values()]
        if field.name.endswith(("norm", "distance")):
            result[field.name] = sum(value**2 for value in values) ** 0.5
        elif field.name.endswith("rms"):
            squares = [value**2 for value in values]
            result[field.name] = _weighted_mean(squares, weights) ** 0.5
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


class _Buffer(NamedTuple):
    """A parameter's buffer, with what the norms and angles of its rows follow from."""

    param: Tensor
    keys: Tensor  # float32 (C,)
    # The products of the slots and the momentum with each other, float64 (C + 1, C + 1).
    products: Tensor
    numel: int
    by_capacity: bool  # whether the mean is over the capacity, else over the filled slots


def _buffer_of(param: Tensor, state: Mapping[str, Any], by_capacity: bool) -> _Buffer:
    if is_sharded(param):
        state = whole_state(unscaled(state))
    momentum = flat(dequantized(state, "exp_avg"), 0)
    numel = len(momentum)
    slots, keys = momentum.new_empty(0, numel), momentum.new_empty(0)  # of capacity 0
    if "critical_buffer" in state:
        slots, keys = flat(dequantized(state, "critical_buffer"), 1), state["priorities"]
    chunk = _CPU_CHUNK if slots.device.type == "cpu" else _DEVICE_CHUNK
    products = _products(slots[:, :chunk], momentum[:chunk])
    for first in range(chunk, numel, chunk):
        products += _products(slots[:, first : first + chunk], momentum[first : first + chunk])
    return _Buffer(param, keys, products, numel, by_capacity)


def _products(slots: Tensor, momentum: Tensor) -> Tensor:
    """Return the products of all rows with each other, float64 (C + 1, C + 1).

    In float64 a difference of products has all the digits of float32 rows.
    """
    rows = torch.cat([slots, momentum[None]]).double()
    return rows @ rows.T


def _readings(buffers: list[_Buffer], *, has_aggregate: bool) -> dict[Tensor, Reading]:
    """Return the readings of buffers of one device and capacity."""
    products = torch.stack([buffer.products for buffer in buffers]).cpu()
    keys = torch.stack([buffer.keys for buffer in buffers]).cpu()
    capacity = keys.shape[1]
    filled = keys > -torch.inf
    counts = filled.sum(1).double()
    numels = torch.tensor([buffer.numel for buffer in buffers], device="cpu")
    divisors = torch.tensor(
        [float(capacity) if buffer.by_capacity else 0.0 for buffer in buffers],
        dtype=torch.float64,
        device="cpu",
    )
    divisors = torch.where(divisors > 0, divisors, counts.clamp(min=1))
    slots = products[:, :capacity, :capacity]
    slots = slots.masked_fill(~(filled[:, :, None] & filled[:, None, :]), 0.0)
    squares, total = slots.diagonal(dim1=1, dim2=2), slots.sum((1, 2))
    with_momentum = products[:, :capacity, capacity].masked_fill(~filled, 0.0).sum(1)
    momentum = products[:, capacity, capacity]
    # Rounding may leave a difference of equal numbers below 0.
    variance = (squares.sum(1) / counts - total / counts.square()).clamp(min=0) / numels
    aggregate = momentum + 2 * with_momentum / divisors + total / divisors.square()
    if not has_aggregate:
        aggregate = torch.full_like(aggregate, torch.nan)
    numbers = [
        counts,
        variance,
        _agreements(slots, keys, filled),
        momentum.sqrt(),
        total.clamp(min=0).sqrt() / divisors,
        aggregate.clamp(min=0).sqrt(),
    ]
    rows = torch.stack(numbers, dim=1).tolist()
    return {buffer.param: Reading(*row) for buffer, row in zip(buffers, rows, strict=True)}


def _agreements(slots: Tensor, keys: Tensor, filled: Tensor) -> Tensor:
    """Return each buffer's mean cosine between the slot of the highest key and the other ones."""
    if not keys.shape[1]:
        return torch.full((len(keys),), torch.nan, dtype=slots.dtype, device=slots.device)
    top = keys.argmax(1, keepdim=True)
    norms = slots.diagonal(dim1=1, dim2=2).sqrt()
    with_top = slots.gather(1, top[:, :, None].expand(-1, 1, slots.shape[2]))[:, 0]
    cosines = with_top / (norms * norms.gather(1, top))
    others = filled.scatter(1, top, False)
    return torch.where(others, cosines, torch.nan).nanmean(1)


def flat(tensor: Tensor, start: int) -> Tensor:
    """Return the elements as float32 or wider, complex ones as pairs, from one dimension on."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor.unsqueeze(-1)
    wide = real.to(torch.promote_types(real.dtype, torch.float32))
    return wide.flatten(start)
