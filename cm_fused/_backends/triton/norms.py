"""The Triton kernels of norms, and of the priorities that are updated from them."""

import triton
import triton.language as tl

from cm_fused._backends.triton.chunks import chunk_of
from cm_fused._backends.triton.common import (
    CHUNK_SIZE,
    FULL_BLOCK,
    ROW,
    TAIL_BLOCK,
    THREADS,
    at,
    cell,
    double,
    effective_gradient,
    entry,
    is_aligned,
    is_set,
    pointer,
    signed_factor,
    spread,
    sum_squares,
)
from cm_fused._backends.triton.rounding import load_param


@triton.jit
def _two_sum(a, b):
    """Return a + b and what its rounding left out (Knuth)."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


@triton.jit
def _compensated_total(sums, errors, SIZE: tl.constexpr):
    """Return the sum of a block with its errors, rounded once, so that its order does not matter.

    csrc/cpu/compensated_sum.h adds up in another order, and has the same bits.
    """
    error = tl.sum(errors)
    for level in tl.static_range(1, 12):  # the halvings of the largest block
        if SIZE >> level > 0:
            left, right = tl.split(tl.reshape(sums, (SIZE >> level, 2)))
            sums, rounded = _two_sum(left, right)
            error += tl.sum(rounded)
    total = tl.sum(sums)
    return tl.where(tl.abs(total) < float("inf"), total + error, total)


@triton.jit
def _sq_norm_of_chunk(
    chunk,
    chunk_sq_norm_ptr,
    l2,
    factor,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    FULL: tl.constexpr,
):
    row_ptr = chunk.row_ptr
    start = chunk.start
    count = chunk.count
    param_ptr = at(pointer(row_ptr, "param", PARAM_DTYPE), start, FULL)
    remainder_ptr = at(pointer(row_ptr, "master_remainder", tl.int16), start, FULL)
    grad_ptr = at(pointer(row_ptr, "grad", GRAD_DTYPE), start, FULL)
    BLOCK: tl.constexpr = FULL_BLOCK if FULL else TAIL_BLOCK
    decays = spread(l2, (BLOCK,)) != 0
    squares = tl.zeros((BLOCK if STATE_DTYPE == tl.float64 else THREADS,), dtype=tl.float64)
    errors = tl.zeros((BLOCK,), dtype=tl.float64)
    for begin in range(0, CHUNK_SIZE if FULL else count, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = tl.full((BLOCK,), 1, dtype=tl.int1) if FULL else offsets < count
        # Without weight decay there is no need to read the parameter.
        param = load_param(param_ptr, remainder_ptr, offsets, mask & decays, SPLIT, STATE_DTYPE)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(STATE_DTYPE)
        g = effective_gradient(grad, param, factor, l2)
        if STATE_DTYPE == tl.float64:
            squares, error = _two_sum(squares, g * g)
            errors += error
        else:
            squares += sum_squares(g, (BLOCK,))
    if STATE_DTYPE == tl.float64:
        tl.store(chunk_sq_norm_ptr, _compensated_total(squares, errors, BLOCK))
    else:
        tl.store(chunk_sq_norm_ptr, tl.sum(squares))


@entry
def sq_norm_kernel(
    table_ptr,
    chunks_ptr,
    chunk_sq_norms_ptr,
    grad_factor_ptr,
    l2: tl.float64,
    sign: tl.float64,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Write the sum of g^2 of each chunk; arguments as for `critical_adam_kernel`."""
    chunk = chunk_of(table_ptr, chunks_ptr)
    l2 = double(l2).to(STATE_DTYPE)
    factor = signed_factor(sign, grad_factor_ptr).to(STATE_DTYPE)
    chunk_sq_norm_ptr = chunk_sq_norms_ptr + tl.program_id(0)
    full = (chunk.count == CHUNK_SIZE) & is_aligned(chunk.row_ptr)
    if full:
        _sq_norm_of_chunk(
            chunk,
            chunk_sq_norm_ptr,
            l2,
            factor,
            PARAM_DTYPE,
            GRAD_DTYPE,
            STATE_DTYPE,
            SPLIT,
            True,
        )
    else:
        _sq_norm_of_chunk(
            chunk,
            chunk_sq_norm_ptr,
            l2,
            factor,
            PARAM_DTYPE,
            GRAD_DTYPE,
            STATE_DTYPE,
            SPLIT,
            False,
        )


@triton.jit
def _sum_of_chunks(row_ptr, chunk_sq_norms_ptr):
    """Return the sum of g^2 of a row's tensor, float64, rounded once."""
    first = cell(row_ptr, "first_chunk")
    num_chunks = cell(row_ptr, "num_chunks")
    sums = tl.zeros((TAIL_BLOCK,), dtype=tl.float64)
    errors = tl.zeros((TAIL_BLOCK,), dtype=tl.float64)
    for begin in range(0, num_chunks, TAIL_BLOCK):
        offsets = begin + tl.arange(0, TAIL_BLOCK)
        mask = offsets < num_chunks
        chunk = tl.load(chunk_sq_norms_ptr + first + offsets, mask=mask, other=0.0)
        sums, error = _two_sum(sums, chunk)
        errors += error
    return _compensated_total(sums, errors, TAIL_BLOCK)


@entry
def tensor_sq_norms_kernel(table_ptr, chunk_sq_norms_ptr, sq_norms_ptr):
    """Write the sum of g^2 of each tensor, float64 (rows,), from those of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(sq_norms_ptr + row, _sum_of_chunks(table_ptr + row * ROW, chunk_sq_norms_ptr))


@entry
def update_priorities_kernel(
    table_ptr,  # keys, slots, steps and, where there are such, counts of filled slots are changed
    chunk_sq_norms_ptr,  # float64: the sum of g^2 of each chunk
    sq_norm_ptr,  # float64: those over the priority scope, or None for each tensor's chunks'
    found_inf_ptr,  # float64 (): where it is not 0 nothing is changed; or None
    sq_norm_stride: tl.int32,  # 1 for a sum for each row, 0 for one for all
    capacity: tl.int32,
    priority_decay,  # float32
    CAPACITY_BLOCK: tl.constexpr,  # the capacity rounded up to a power of two
):
    """Update the priorities of one tensor: key, admission, decay, slot, step (csrc/priority)."""
    if is_set(found_inf_ptr):
        return
    row = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + row * ROW
    if sq_norm_ptr is not None:
        sq_norm = tl.load(sq_norm_ptr + row * sq_norm_stride)
    else:
        sq_norm = _sum_of_chunks(row_ptr, chunk_sq_norms_ptr)
    key = tl.sqrt(sq_norm).to(tl.float32)

    slots = tl.arange(0, CAPACITY_BLOCK)
    in_buffer = slots < capacity
    keys_ptr = pointer(row_ptr, "priorities", tl.float32)
    keys = tl.load(keys_ptr + slots, mask=in_buffer, other=float("inf"))
    filled_address = cell(row_ptr, "filled")
    if filled_address != 0:
        filled = tl.sum((in_buffer & (keys >= 0)).to(tl.int64))
        tl.store(filled_address.to(tl.pointer_type(tl.int64)), filled)
    # An unfilled slot's key, -inf, is the smallest; of equal ones the first.
    slot = tl.argmin(keys, 0)
    admitted = ((key < float("inf")) & (key > tl.min(keys, 0))).to(tl.int32)
    taken = (spread(admitted, (CAPACITY_BLOCK,)) != 0) & (slots == slot)
    keys = tl.where(taken, key, keys)
    # An unfilled slot keeps -inf, which times 0 would be NaN.
    keys = tl.where(keys >= 0, keys * priority_decay, keys)
    step_ptr = pointer(row_ptr, "step", tl.float32)
    step = tl.load(step_ptr) + 1.0
    # Every thread has read keys and step by then; few of them write.
    tl.debug_barrier()
    tl.store(keys_ptr + slots, keys, mask=in_buffer)
    slot_ptr = pointer(row_ptr, "pending_slot", tl.int64)
    tl.store(slot_ptr, tl.where(admitted != 0, slot, -1).to(tl.int64))
    tl.store(step_ptr, step)


@entry
def count_steps_kernel(table_ptr, found_inf_ptr):
    """Count the step of one tensor without a buffer; the arguments are those of priorities."""
    if is_set(found_inf_ptr):
        return
    row_ptr = table_ptr + tl.program_id(0).to(tl.int64) * ROW
    step_ptr = pointer(row_ptr, "step", tl.float32)
    step = tl.load(step_ptr) + 1.0
    # Every thread has read the step by then.
    tl.debug_barrier()
    tl.store(step_ptr, step)
