"""The buffer within the pass: the sum of its slots, and the commit of what is admitted."""

from collections import namedtuple

import triton
import triton.language as tl

from cm_fused._backends.triton import codes, layout
from cm_fused._backends.triton.chunks import Block, block_at
from cm_fused._backends.triton.common import CHUNK_SIZE, at, empty_sum, pointer, spread
from cm_fused._backends.triton.moments import load_moment
from cm_fused._backends.triton.scales import (
    load_scales,
    load_scales_of_slots,
    scales_of_slot,
    store_scales,
)

# The change of a chunk's buffer: the slot to write or -1, and whether to rebuild the sum.
Admission = namedtuple("Admission", "capacity slot rebuild")

# A chunk's buffer: addresses of its first element in slot 0, in its sum and of its scale. A slot
# has `size` numbers in memory; `slot` is the one to write, or -1.
Buffer = namedtuple("Buffer", "slots scales critical_sum numel size capacity slot slot_ptr")


@triton.jit
def buffer_of(chunk, admission, V: tl.constexpr):
    """Return a chunk's buffer."""
    row_ptr = chunk.row_ptr
    start = chunk.start
    slots_ptr = pointer(row_ptr, "critical_buffer", layout.memory_dtype(V.SLOT_DTYPE, V.SHAPE))
    slots_ptr = at(slots_ptr, layout.slot_size(start, V.SLOT_DTYPE, V.SHAPE), V.ALIGNED_SLOTS)
    size = layout.slot_size(chunk.numel, V.SLOT_DTYPE, V.SHAPE)
    return Buffer(
        slots_ptr,
        pointer(row_ptr, "critical_scales", tl.float32) + start // layout.SCALE_BLOCK,
        at(pointer(row_ptr, "critical_sum", V.STATE_DTYPE), start, V.FULL),
        chunk.numel,
        size,
        admission.capacity,
        admission.slot,
        at(slots_ptr, admission.slot * size, V.ALIGNED_SLOTS),
    )


@triton.jit
def _stored(block, V: tl.constexpr):
    """Return the block of what the slots store of a block: of words, where there are scales."""
    if layout.has_scales(V.SLOT_DTYPE):
        word, element = layout.word_offsets(V.SLOT_DTYPE, V.SHAPE)
        SHAPE: tl.constexpr = layout.stored_shape(V.SLOT_DTYPE, V.SHAPE)
        mask = tl.full(SHAPE, 1, dtype=tl.int1)
        if not V.FULL:
            mask = block.begin + element < block.count
        first = block.begin // V.SHAPE[3]
        if layout.is_packed(V.SLOT_DTYPE):
            first = first // 2
        return Block(block.begin, block.count, first + word, mask)
    else:
        return block


@triton.jit
def _load_slot(buffer, slot, block, wanted, other, V: tl.constexpr):
    """Return what a slot stores, or `other` where `wanted`, a scalar, is 0."""
    slot_ptr = at(buffer.slots, slot * buffer.size, V.ALIGNED_SLOTS)
    SHAPE: tl.constexpr = layout.stored_shape(V.SLOT_DTYPE, V.SHAPE)
    where = _stored(block, V)
    mask = where.mask & (tl.full(SHAPE, wanted, tl.int32) != 0)
    return tl.load(slot_ptr + where.offsets, mask=mask, other=other)


@triton.jit
def _load_scales(buffer, slot, block, wanted, other, V: tl.constexpr):
    """Return a slot's scales, if there are any, or `other` where `wanted`, a scalar, is 0."""
    if layout.has_scales(V.SLOT_DTYPE):
        scales_ptr = buffer.scales + slot * tl.cdiv(buffer.numel, layout.SCALE_BLOCK)
        return load_scales(scales_ptr, block, wanted, other, V.SHAPE)
    else:
        return 0


@triton.jit
def _is_taken(buffer, other, V: tl.constexpr):
    """Return whether a momentum to be committed takes a slot's place, int32."""
    if V.CRITICAL_GRADIENTS:
        return tl.full((), 0, tl.int32)
    else:
        return (buffer.slot == other).to(tl.int32)


@triton.jit
def _add_slot(buffer_sum, buffer, other, scales, taken, item, block, V: tl.constexpr):
    """Return a sum plus one more slot, or plus an item where `taken`, a scalar, is 1."""
    if layout.has_scales(V.SLOT_DTYPE):
        # Chosen among codes, which are four in a register, or eight.
        stored = _load_slot(buffer, other, block, 1 - taken, item, V)
    else:
        # Chosen among values: the load need not wait for the item.
        stored = _load_slot(buffer, other, block, 1 - taken, 0.0, V).to(V.STATE_DTYPE)
        if not V.CRITICAL_GRADIENTS:
            stored = tl.where(spread(taken, V.SHAPE) != 0, item.to(V.STATE_DTYPE), stored)
    return codes.add_slot(buffer_sum, stored, scales, V.SLOT_DTYPE, V.STATE_DTYPE, V.SHAPE)


@triton.jit
def rebuild_sum(tensors, buffer, count, V: tl.constexpr):
    """Set the running sum of a chunk to the sum of its slots, in slot order.

    A pending momentum takes its slot's place; a gradient is not there yet.
    """
    for begin in range(0, CHUNK_SIZE if V.FULL else count, V.BLOCK):
        block = block_at(begin, count, V)
        buffer_sum = empty_sum(V.STATE_DTYPE, V.SHAPE)
        item = (0, 0)
        if not V.CRITICAL_GRADIENTS:
            exp_avg = load_moment(tensors.exp_avg, tensors.exp_avg_scales, block, True, V)
            item = codes.to_slot(exp_avg, V.SLOT_DTYPE)
        for other in range(0, buffer.capacity):
            taken = _is_taken(buffer, other, V)
            scales = _load_scales(buffer, other, block, 1 - taken, item[1], V)
            buffer_sum = _add_slot(buffer_sum, buffer, other, scales, taken, item[0], block, V)
        tl.store(buffer.critical_sum + block.offsets, buffer_sum, mask=block.mask)


@triton.jit
def _sum_of_slots(buffer, item, block, V: tl.constexpr):
    """Return the sum of all slots, in their order."""
    SUMMED_SLOTS: tl.constexpr = V.SUMMED_SLOTS
    buffer_sum = empty_sum(V.STATE_DTYPE, V.SHAPE)
    scales = 0
    if layout.has_scales(V.SLOT_DTYPE):
        slot = -1 if V.CRITICAL_GRADIENTS else buffer.slot
        stride = tl.cdiv(buffer.numel, layout.SCALE_BLOCK)
        all_scales = load_scales_of_slots(
            buffer.scales, stride, block, slot, item[1], SUMMED_SLOTS, V.SHAPE
        )
    for other in tl.static_range(SUMMED_SLOTS):
        if layout.has_scales(V.SLOT_DTYPE):
            scales = scales_of_slot(all_scales, other)
        taken = _is_taken(buffer, other, V)
        buffer_sum = _add_slot(buffer_sum, buffer, other, scales, taken, item[0], block, V)
    return buffer_sum


@triton.jit
def sum_and_commit(buffer, item, follow, block, V: tl.constexpr):
    """Return the sum of the buffer, and put an item, rounded, in its slot where one is admitted.

    A momentum's commit is last step's and comes before the sum, a gradient's is this step's and
    comes after. `follow` is 1 where a running sum has yet to follow.
    """
    buffer_sum = empty_sum(V.STATE_DTYPE, V.SHAPE)
    evicted = buffer_sum
    if V.SUMMED_SLOTS == 0:
        buffer_sum = tl.load(buffer.critical_sum + block.offsets, mask=block.mask, other=0.0)
        slot = tl.maximum(buffer.slot, 0)
        old = _load_slot(buffer, slot, block, follow, 0, V)
        old_scales = _load_scales(buffer, slot, block, follow, 0.0, V)
        evicted = codes.from_slot(old, old_scales, V.SLOT_DTYPE, V.STATE_DTYPE, V.SHAPE)
    elif V.CRITICAL_GRADIENTS:
        no_scales = tl.zeros((1, 1, 1, 1), tl.float32)
        buffer_sum = _sum_of_slots(buffer, (0, no_scales), block, V)
    stored, scales = codes.to_slot(item, V.SLOT_DTYPE)
    if V.SUMMED_SLOTS == 0:
        # What is stored is what is summed.
        item = codes.from_slot(stored, scales, V.SLOT_DTYPE, V.STATE_DTYPE, V.SHAPE)
        follows = tl.full(V.SHAPE, follow, tl.int32) != 0
        new_sum = tl.where(follows, buffer_sum + (item - evicted), buffer_sum)
        tl.store(buffer.critical_sum + block.offsets, new_sum, mask=block.mask & follows)
        buffer_sum = buffer_sum if V.CRITICAL_GRADIENTS else new_sum
    elif not V.CRITICAL_GRADIENTS:
        buffer_sum = _sum_of_slots(buffer, (stored, scales), block, V)
    _commit(buffer, stored, scales, block, V)
    return buffer_sum


@triton.jit
def _commit(buffer, stored, scales, block, V: tl.constexpr):
    """Put what is stored of an item, and its scales, in its slot where one is admitted."""
    if layout.has_scales(V.SLOT_DTYPE):
        scales_ptr = buffer.scales + buffer.slot * tl.cdiv(buffer.numel, layout.SCALE_BLOCK)
        admits = (buffer.slot >= 0).to(tl.int32)
        # The lane that has loaded them, in `_sum_of_slots` or `_load_scales`.
        by = buffer.slot if V.SUMMED_SLOTS > 0 else 0
        store_scales(scales_ptr, block, scales, admits, by, V.SHAPE)
    # Where nothing is committed this is no slot, and it is not touched.
    SHAPE: tl.constexpr = layout.stored_shape(V.SLOT_DTYPE, V.SHAPE)
    where = _stored(block, V)
    commit = spread(buffer.slot, SHAPE) >= 0
    tl.store(buffer.slot_ptr + where.offsets, stored, mask=where.mask & commit)
