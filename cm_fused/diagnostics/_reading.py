"""Readings of an optimizer's critical buffers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
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
_NAN = float("nan")


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


QUANTITIES = tuple(field.name for field in fields(Reading))


def read(optimizer: Optimizer) -> dict[Tensor, Reading]:
    """Return the reading of every parameter that has a buffer, or whose capacity is 0.

    It reads momentum and slots once, and makes one copy to the host for each device.

    Args:
        optimizer: `AdamCM`, `AdamCG` or a decoupled form, or `SAM` around one. Not changed. The
            state of DTensors is gathered: every process must call this.

    Raises:
        TypeError: It is another optimizer.
    """
    params, rows = quantities(critical(optimizer))
    return {param: Reading(*row) for param, row in zip(params, rows, strict=True)}


def combine(readings: Mapping[Tensor, Reading]) -> Reading:
    """Return the reading of several parameters together; see `Reading`."""
    rows = [tuple(vars(reading).values()) for reading in readings.values()]
    return Reading(*combined(QUANTITIES, rows, [param.numel() for param in readings]))


def combined(
    names: Sequence[str], rows: Sequence[Sequence[float]], numels: Sequence[int]
) -> list[float]:
    """Return the quantities of a `Reading` or `History` of several parameters together.

    Norms, the distance and root mean squares are those of all elements together, `max_age` is the
    largest, and the others are means weighted by the number of elements.

    Args:
        names: Those of the quantities.
        rows: The quantities of each parameter.
        numels: The number of elements of each parameter.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    result = []
    for name, values in zip(names, columns, strict=True):
        if name.endswith(("norm", "distance")):
            result.append(sum([value * value for value in values]) ** 0.5)
        elif name.endswith("rms"):
            result.append(_weighted_mean([value * value for value in values], numels) ** 0.5)
        elif name == "max_age":
            result.append(max([value for value in values if value == value], default=_NAN))
        else:
            result.append(_weighted_mean(values, numels))
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
    total = sum([weight for _, weight in pairs])
    return sum([value * weight for value, weight in pairs]) / total if total else _NAN


class _Buffer(NamedTuple):
    """A parameter's buffer, with what the norms and angles of its rows follow from."""

    keys: Tensor  # float32 (C,)
    # The products of the slots and the momentum with each other, float64 ((C + 1)^2,).
    products: Tensor
    numel: int
    by_capacity: bool  # whether the mean is over the capacity, else over the filled slots


@torch.no_grad()
def quantities(base: CriticalAdam) -> tuple[list[Tensor], list[tuple[float, ...]]]:
    """Return the parameters that have a buffer or capacity 0, and the `QUANTITIES` of each."""
    base._flush()
    params, buffers = [], []
    for group in base.param_groups:
        for param in group["params"]:
            state = base.state.get(param, {})
            if "critical_buffer" in state or ("exp_avg" in state and not group["capacity"]):
                params.append(param)
                buffers.append(_buffer_of(param, state, group["buffer_mean"] == "capacity"))
    numbers = _on_host(buffers)
    has_aggregate = not base._critical_gradients
    rows = [
        _quantities(buffer, each, has_aggregate)
        for buffer, each in zip(buffers, numbers, strict=True)
    ]
    return params, rows


def _buffer_of(param: Tensor, state: Mapping[str, Any], by_capacity: bool) -> _Buffer:
    if is_sharded(param):
        state = whole_state(unscaled(state))
    momentum = flat(dequantized(state, "exp_avg"), 0)
    numel = len(momentum)
    slots, keys = momentum.new_empty(0, numel), momentum.new_empty(0)  # of capacity 0
    if "critical_buffer" in state:
        slots, keys = flat(dequantized(state, "critical_buffer"), 1), state["priorities"]
    chunk = _CPU_CHUNK if slots.device.type == "cpu" else _DEVICE_CHUNK
    if numel <= chunk:
        products = _products(slots, momentum)
    else:
        products = _products(slots[:, :chunk], momentum[:chunk])
        for first in range(chunk, numel, chunk):
            last = first + chunk
            products += _products(slots[:, first:last], momentum[first:last])
    return _Buffer(keys, products.flatten(), numel, by_capacity)


def _products(slots: Tensor, momentum: Tensor) -> Tensor:
    """Return the products of all rows with each other, float64 (C + 1, C + 1).

    In float64 a difference of products has all the digits of float32 rows.
    """
    rows = torch.cat([slots, momentum[None]]).double()
    return rows @ rows.T


def _on_host(buffers: list[_Buffer]) -> list[list[float]]:
    """Return the keys, then the products of each buffer; one copy for each device."""
    result: list[list[float]] = [[]] * len(buffers)
    on_devices: dict[torch.device, list[int]] = {}
    for i, buffer in enumerate(buffers):
        if buffer.products.is_cpu:
            result[i] = buffer.keys.tolist() + buffer.products.tolist()
        else:
            on_devices.setdefault(buffer.products.device, []).append(i)
    for indices in on_devices.values():
        # Float32 keys become float64 unchanged.
        parts = [part for i in indices for part in (buffers[i].keys, buffers[i].products)]
        numbers = iter(torch.cat(parts).tolist())
        for i in indices:
            count = len(buffers[i].keys) + len(buffers[i].products)
            result[i] = list(islice(numbers, count))
    return result


def _quantities(buffer: _Buffer, numbers: list[float], has_aggregate: bool) -> tuple[float, ...]:
    """Return the `QUANTITIES` of a buffer, given its keys and products.

    A buffer has few numbers: Python needs less time for them than operators do.
    """
    capacity, width = len(buffer.keys), len(buffer.keys) + 1
    keys, products = numbers[:capacity], numbers[capacity:]
    filled = [slot for slot, key in enumerate(keys) if key > -math.inf]
    rows = {slot: products[slot * width : slot * width + width] for slot in filled}
    squares = [row[slot] for slot, row in rows.items()]
    # The products of the sum of the slots with every row.
    sums = [sum(column) for column in zip(*rows.values(), strict=True)] or [0.0] * width
    total, momentum = sum([sums[slot] for slot in filled]), products[-1]
    count = len(filled)
    divisor = max(capacity if buffer.by_capacity else count, 1)
    variance = aggregate = _NAN
    # Rounding may leave a difference of equal numbers below 0.
    if count and buffer.numel:
        variance = max(sum(squares) / count - total / count**2, 0.0) / buffer.numel
    if has_aggregate:
        aggregate = momentum + 2 * sums[capacity] / divisor + total / divisor**2
    top = max(filled, key=keys.__getitem__, default=0)
    return (
        float(count),
        variance,
        _mean_cosine(filled.index(top), [rows[top][i] for i in filled], squares) if count else _NAN,
        math.sqrt(momentum),
        math.sqrt(max(total, 0.0)) / divisor,
        math.sqrt(max(aggregate, 0.0)),
    )


def _mean_cosine(top: int, products: list[float], squares: list[float]) -> float:
    """Return the mean cosine between item `top` and the others, given its products and squares."""
    norm = math.sqrt(squares[top])
    sizes = [norm * math.sqrt(square) for square in squares]
    sizes[top] = 0.0
    pairs = zip(products, sizes, strict=True)
    cosines = [product / size for product, size in pairs if size and product == product]
    return sum(cosines) / len(cosines) if cosines else _NAN


def flat(tensor: Tensor, start: int) -> Tensor:
    """Return the elements as float32 or wider, complex ones as pairs, from one dimension on."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    elif tensor.dim() == start:
        tensor = tensor.unsqueeze(-1)
    tensor = tensor.flatten(start)
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
