"""Slots and moments read as values, and slots stored, in plain torch.

State of low precision is restored and rounded as `cm_fused.rounding` defines.
"""

import torch
from torch import Tensor

from cm_fused.rounding import (
    PACKED,
    as_flat,
    dequantize,
    dequantize_moment,
    flat_as,
    quantize,
    shaped_as,
    unpack,
)


def _order_of(buffer: Tensor, exp_avg: Tensor) -> Tensor:
    """Return a tensor of the shape and strides of a buffer's slots; packed ones have exp_avg's."""
    return exp_avg if buffer.dtype is PACKED else buffer[0]


def load_slots(buffer: Tensor, scales: Tensor | None, exp_avg: Tensor) -> Tensor:
    """Return the values of a buffer's slots, in their dtype or float32, (C, *shape)."""
    if scales is None:
        return dequantize(buffer, None)
    order = _order_of(buffer, exp_avg)
    values = dequantize(unpack(as_flat(buffer, leading=1), order.numel()), scales)
    return values.as_strided((len(buffer), *order.shape), (order.numel(), *order.stride()))


def load_moment(stored: Tensor, scales: Tensor | None, *, signed: bool) -> Tensor:
    """Return the values of a moment, in its dtype or float32, (*shape)."""
    if scales is None:
        return dequantize(stored, None)
    values = dequantize_moment(as_flat(stored), scales, signed=signed)
    return shaped_as(values, stored)


def load_slot(buffer: Tensor, scales: Tensor | None, slot: Tensor, exp_avg: Tensor) -> Tensor:
    """Return the values of one slot, int64 (1,), in the buffer's dtype or float32, (*shape)."""
    slots = as_flat(buffer, leading=1)
    stored = as_bytes(slots).index_select(0, slot)[0].view(buffer.dtype)
    if scales is not None:
        scales = scales.index_select(0, slot)[0]
    order = _order_of(buffer, exp_avg)
    return shaped_as(dequantize(unpack(stored, order.numel()), scales), order)


def sum_slots(slots: Tensor) -> Tensor:
    """Return the sum over slots, (C, *shape), added in their order as the fused backends add them.

    `Tensor.sum` adds five and more in another order, which goes by their strides.
    """
    total = slots[0].clone()
    for slot in slots[1:]:
        total.add_(slot)
    return total


def store_slot_(
    buffer: Tensor,
    scales: Tensor | None,
    slot: Tensor,
    admitted: Tensor,
    item: Tensor,
    exp_avg: Tensor,
) -> None:
    """Round an item to its slot's dtype and store it, where it is admitted.

    Args:
        buffer: The slots, (C, *shape), or (C, stored_numel) of packed ones. Changed.
        scales: Their scales, or None. Changed.
        slot: Which one, int64 (1,).
        admitted: Whether to, bool () or (1,).
        item: (*shape).
        exp_avg: The momentum, whose memory order packed slots have.
    """
    order = _order_of(buffer, exp_avg)
    values = item if item.dtype == buffer.dtype else flat_as(item, order)
    stored, new_scales = quantize(values, buffer.dtype)
    slots = buffer if item.dtype == buffer.dtype else as_flat(buffer, leading=1)
    slots, stored = as_bytes(slots), as_bytes(stored)
    content = torch.where(admitted, stored.unsqueeze(0), slots.index_select(0, slot))
    slots.index_copy_(0, slot, content)
    if scales is not None and new_scales is not None:
        content = torch.where(admitted, new_scales.unsqueeze(0), scales.index_select(0, slot))
        scales.index_copy_(0, slot, content)


def as_bytes(tensor: Tensor) -> Tensor:
    """Return 8-bit floats as bytes, which more operators take, and other tensors as they are."""
    return tensor.view(torch.int8) if tensor.dtype is torch.float8_e4m3fn else tensor
