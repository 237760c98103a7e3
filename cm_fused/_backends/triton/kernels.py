"""The Triton kernel of the step: one pass over all chunks of all tensors.

It finds its tensors through a table (`cm_fused._backends.triton.columns`). Nothing is contracted to
a fused multiply-add (see `LAUNCH_OPTIONS`), and quotients and roots are correctly rounded, so a
parameter's bits depend neither on the path its chunk takes nor on the device.
"""

from typing import Any

import triton
import triton.language as tl

from cm_fused._backends.triton.common import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    COMPENSATION_COLUMN,
    CRITICAL_BUFFER_COLUMN,
    CRITICAL_SCALES_COLUMN,
    CRITICAL_SUM_COLUMN,
    EXP_AVG_COLUMN,
    EXP_AVG_SCALES_COLUMN,
    EXP_AVG_SQ_COLUMN,
    EXP_AVG_SQ_SCALES_COLUMN,
    FILLED_COLUMN,
    GRAD_COLUMN,
    LAUNCH_OPTIONS,
    MAX_EXP_AVG_SQ_COLUMN,
    NUMEL_COLUMN,
    PARAM_COLUMN,
    PARAM_INDEX_COLUMN,
    PLACES_LENGTH_COLUMN,
    PLACES_OFFSET_COLUMN,
    PLACES_STRIDE_COLUMN,
    PRIORITIES_COLUMN,
    ROW,
    SLOT_COLUMN,
    STEP_COLUMN,
    TAIL_BLOCK_SIZE,
    THREADS,
    at,
    double,
    effective_gradient,
    empty_sum,
    entry,
    is_aligned,
    is_set,
    pointer,
    signed_factor,
    spread,
    sum_squares,
)
from cm_fused._backends.triton.rounding import (
    MOMENTS_STREAM,
    PARAM_STREAM,
    SCALE_BLOCK,
    from_moment,
    from_slot,
    has_scales,
    load_scales,
    random_words,
    round_to_bfloat16,
    round_to_float16,
    store_scales,
    to_moment,
    to_slot,
)
from cm_fused.rounding import BLOCK_SIZE as SCALE_BLOCK_SIZE


def launch_options(
    param_dtype: tl.dtype,
    moment_dtype: tl.dtype,
    slot_dtype: tl.dtype,
    amsgrad: bool,
    summed_slots: int,
) -> dict[str, Any]:
    """Return the launch options of the pass for CUDA devices.

    Left alone ptxas takes 48 to 64 registers and spills some in the variant most used (triton 3.6,
    AdamCM in float32 on sm_90 and sm_100). Given a number it uses them: these are the smallest by
    which no variant spills, at half of a multiprocessor's warps for float32 (bench.machine_code).
    State of low precision spills 40 to 112 bytes a thread at 80 registers, none at 96 but for 8 to
    32 on sm_100 with 8-bit floats or a compensation; int8 moments spill 48 there.
    """
    if param_dtype == tl.float64:
        return LAUNCH_OPTIONS
    if moment_dtype == tl.int8:
        return {**LAUNCH_OPTIONS, "maxnreg": 128}
    if moment_dtype != tl.float32 or slot_dtype != tl.float32:
        return {**LAUNCH_OPTIONS, "maxnreg": 96}
    half = param_dtype != tl.float32
    if half and summed_slots == 4:
        return {**LAUNCH_OPTIONS, "maxnreg": 80}
    return {**LAUNCH_OPTIONS, "maxnreg": 72 if half or amsgrad else 64}


_SCALED_DTYPES = (tl.int8, tl.uint8)


@triton.jit
def _divide(x, y):
    """Return x / y, correctly rounded."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def _sqrt(x):
    """Return the root of x, correctly rounded."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def _power(base, exponent):
    """Return base to a power >= 1, by squaring: exp would cost 24 registers of coefficients."""
    result = base * 0.0 + 1.0
    while exponent > 0:
        if exponent % 2 == 1:
            result *= base
        base *= base
        exponent = exponent // 2
    return result


@triton.constexpr_function
def _block_size(full, moment_dtype, slot_dtype):
    """Return the elements that are worked on at a time: whole blocks of those that share scales."""
    if full:
        return BLOCK_SIZE
    scaled = moment_dtype in _SCALED_DTYPES or slot_dtype in _SCALED_DTYPES
    return max(TAIL_BLOCK_SIZE, SCALE_BLOCK_SIZE) if scaled else TAIL_BLOCK_SIZE


@triton.jit
def _load_slot(
    slots_ptr,
    scales_ptr,
    slot,
    numel,
    begin,
    count,
    mask,
    STATE_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Return the values of a slot, or what is cheap to load where the mask is not set."""
    slot_ptr = at(slots_ptr, slot * numel, FULL)
    stored = tl.load(slot_ptr + (begin + tl.arange(0, BLOCK)), mask=mask, other=0)
    scales = 0
    if has_scales(slots_ptr.dtype.element_ty):
        scales = load_scales(scales_ptr + slot * tl.cdiv(numel, SCALE_BLOCK), begin, count, BLOCK)
    return from_slot(stored, scales, STATE_DTYPE, BLOCK)


@triton.jit
def _load_moment(
    moment_ptr,
    scales_ptr,
    begin,
    count,
    mask,
    STATE_DTYPE: tl.constexpr,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the values of a moment."""
    stored = tl.load(moment_ptr + (begin + tl.arange(0, BLOCK)), mask=mask, other=0)
    if stored.dtype == tl.int8:
        return from_moment(stored, load_scales(scales_ptr, begin, count, BLOCK), SIGNED, BLOCK)
    else:
        return stored.to(STATE_DTYPE)


@triton.jit
def _store_moment(
    moment_ptr,
    scales_ptr,
    begin,
    count,
    mask,
    values,
    words,
    SIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store a moment; of an element's word, m takes the upper half and v the lower."""
    offsets = begin + tl.arange(0, BLOCK)
    MOMENT_DTYPE: tl.constexpr = moment_ptr.dtype.element_ty
    if values.dtype == MOMENT_DTYPE:
        tl.store(moment_ptr + offsets, values, mask=mask)
    else:
        bits = words >> 16 if SIGNED else words & 0xFFFF
        if MOMENT_DTYPE == tl.int8:
            codes, scales = to_moment(values, bits, SIGNED, BLOCK)
            store_scales(scales_ptr, begin, count, scales, 1, BLOCK)
            tl.store(moment_ptr + offsets, codes, mask=mask)
        else:
            tl.store(moment_ptr + offsets, round_to_bfloat16(values, bits), mask=mask)


@triton.jit
def _rebuild_sum(
    exp_avg_ptr,
    exp_avg_scales_ptr,
    slots_ptr,
    slot_scales_ptr,
    critical_sum_ptr,
    count,
    numel,
    capacity,
    slot,
    STATE_DTYPE: tl.constexpr,
    CRITICAL_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Set the running sum of a chunk to the sum of its slots, in slot order.

    The momentum that is to be committed takes its slot's place; a gradient is not there yet.
    """
    for begin in range(0, CHUNK_SIZE if FULL else count, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = tl.full((BLOCK,), 1, dtype=tl.int1) if FULL else offsets < count
        buffer_sum = empty_sum(STATE_DTYPE, BLOCK)
        item = buffer_sum
        if not CRITICAL_GRADIENTS:
            item = _load_moment(
                exp_avg_ptr, exp_avg_scales_ptr, begin, count, mask, STATE_DTYPE, True, BLOCK
            )
        stored, scales = to_slot(item, slots_ptr.dtype.element_ty, BLOCK)
        item = from_slot(stored, scales, STATE_DTYPE, BLOCK)
        for other in range(0, capacity):
            taken = (not CRITICAL_GRADIENTS) & (spread(slot, BLOCK) == other)
            kept = _load_slot(
                slots_ptr,
                slot_scales_ptr,
                other,
                numel,
                begin,
                count,
                mask & ~taken,
                STATE_DTYPE,
                BLOCK,
                FULL,
            )
            buffer_sum += tl.where(taken, item, kept)
        tl.store(critical_sum_ptr + offsets, buffer_sum, mask=mask)


@triton.jit
def _update_chunk(
    row_ptr,
    chunk_sq_norm_ptr,
    start,
    count,
    numel,
    capacity,
    slot,
    rebuild,
    inverse_divisor,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    inverse_bias_correction2,
    step_size,
    eps_inside,
    eps_outside,
    decay_factor,
    l2,
    late_l2,
    factor,
    step,
    seed,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    SLOT_DTYPE: tl.constexpr,
    CRITICAL_GRADIENTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SUMMED_SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KAHAN: tl.constexpr,
    BY_FOURS: tl.constexpr,
    FULL: tl.constexpr,
):
    """Update the `count` elements from `start` of a tensor; return their sum of g^2, float64.

    FULL: there are CHUNK_SIZE of them, and every tensor is aligned.
    """
    param_ptr = at(pointer(row_ptr, PARAM_COLUMN, PARAM_DTYPE), start, FULL)
    grad_ptr = at(pointer(row_ptr, GRAD_COLUMN, PARAM_DTYPE), start, FULL)
    exp_avg_ptr = at(pointer(row_ptr, EXP_AVG_COLUMN, MOMENT_DTYPE), start, FULL)
    exp_avg_sq_ptr = at(pointer(row_ptr, EXP_AVG_SQ_COLUMN, MOMENT_DTYPE), start, FULL)
    slots_ptr = at(pointer(row_ptr, CRITICAL_BUFFER_COLUMN, SLOT_DTYPE), start, FULL)
    # Where nothing is committed this is no slot, and it is not touched.
    slot_ptr = at(slots_ptr, slot * numel, FULL)
    # What an option does without is no tensor, and it is not touched.
    critical_sum_ptr = at(pointer(row_ptr, CRITICAL_SUM_COLUMN, STATE_DTYPE), start, FULL)
    max_exp_avg_sq_ptr = at(pointer(row_ptr, MAX_EXP_AVG_SQ_COLUMN, STATE_DTYPE), start, FULL)
    compensation_ptr = at(pointer(row_ptr, COMPENSATION_COLUMN, PARAM_DTYPE), start, FULL)
    slot_scales_ptr = pointer(row_ptr, CRITICAL_SCALES_COLUMN, tl.float32) + start // SCALE_BLOCK
    exp_avg_scales_ptr = pointer(row_ptr, EXP_AVG_SCALES_COLUMN, tl.float32) + start // SCALE_BLOCK
    exp_avg_sq_scales_ptr = (
        pointer(row_ptr, EXP_AVG_SQ_SCALES_COLUMN, tl.float32) + start // SCALE_BLOCK
    )
    param_index = tl.load(row_ptr + PARAM_INDEX_COLUMN)
    offset = tl.load(row_ptr + PLACES_OFFSET_COLUMN)
    length = tl.load(row_ptr + PLACES_LENGTH_COLUMN)
    stride = tl.load(row_ptr + PLACES_STRIDE_COLUMN)
    commits_first: tl.constexpr = not CRITICAL_GRADIENTS
    rounds_moments: tl.constexpr = MOMENT_DTYPE != STATE_DTYPE
    BLOCK: tl.constexpr = _block_size(FULL, MOMENT_DTYPE, SLOT_DTYPE)
    commit = spread(slot, BLOCK) >= 0
    # A sum that was rebuilt with the momentum in its slot has followed the commit.
    follow = commit & (spread(rebuild, BLOCK) == 0) if commits_first else commit
    if rebuild:
        # The threads that write an element here read it below: both walk in the same layout.
        _rebuild_sum(
            exp_avg_ptr,
            exp_avg_scales_ptr,
            slots_ptr,
            slot_scales_ptr,
            critical_sum_ptr,
            count,
            numel,
            capacity,
            slot,
            STATE_DTYPE,
            CRITICAL_GRADIENTS,
            BLOCK,
            FULL,
        )
    squares = tl.zeros((THREADS,), dtype=tl.float64)
    for begin in range(0, CHUNK_SIZE if FULL else count, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = tl.full((BLOCK,), 1, dtype=tl.int1) if FULL else offsets < count
        exp_avg = _load_moment(
            exp_avg_ptr, exp_avg_scales_ptr, begin, count, mask, STATE_DTYPE, True, BLOCK
        )
        param = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(STATE_DTYPE)
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(STATE_DTYPE)
        exp_avg_sq = _load_moment(
            exp_avg_sq_ptr, exp_avg_sq_scales_ptr, begin, count, mask, STATE_DTYPE, False, BLOCK
        )
        g = effective_gradient(grad, param, factor, l2)
        late = effective_gradient(g, param, 1.0, late_l2) if CRITICAL_GRADIENTS else g
        if KAHAN:
            param += tl.load(compensation_ptr + offsets, mask=mask, other=0.0).to(STATE_DTYPE)
        stored, scales = to_slot(g if CRITICAL_GRADIENTS else exp_avg, SLOT_DTYPE, BLOCK)
        # What is stored is what is summed.
        item = from_slot(stored, scales, STATE_DTYPE, BLOCK)
        # A momentum's commit is last step's and comes before the sum, a gradient's is this step's
        # and comes after.
        if SUMMED_SLOTS > 0:
            buffer_sum = empty_sum(STATE_DTYPE, BLOCK)
            for other in tl.static_range(SUMMED_SLOTS):
                taken = commits_first & (spread(slot, BLOCK) == other)
                kept = _load_slot(
                    slots_ptr,
                    slot_scales_ptr,
                    other,
                    numel,
                    begin,
                    count,
                    mask & ~taken,
                    STATE_DTYPE,
                    BLOCK,
                    FULL,
                )
                buffer_sum += tl.where(taken, item, kept)
        else:
            buffer_sum = tl.load(critical_sum_ptr + offsets, mask=mask, other=0.0)
            evicted = _load_slot(
                slots_ptr,
                slot_scales_ptr,
                tl.maximum(slot, 0),
                numel,
                begin,
                count,
                mask & follow,
                STATE_DTYPE,
                BLOCK,
                FULL,
            )
            new_sum = tl.where(follow, buffer_sum + (item - evicted), buffer_sum)
            tl.store(critical_sum_ptr + offsets, new_sum, mask=mask & follow)
            if commits_first:
                buffer_sum = new_sum
        if has_scales(SLOT_DTYPE):
            store_scales(
                slot_scales_ptr + slot * tl.cdiv(numel, SCALE_BLOCK),
                begin,
                count,
                scales,
                slot >= 0,
                BLOCK,
            )
        tl.store(slot_ptr + offsets, stored, mask=mask & commit)
        mean = inverse_divisor * buffer_sum  # Eq. (6)
        if CRITICAL_GRADIENTS:
            aggregate = late + mean  # Eq. (3)
            exp_avg = beta1 * exp_avg + one_minus_beta1 * aggregate
            numerator = exp_avg
        else:
            exp_avg = beta1 * exp_avg + one_minus_beta1 * g  # Eq. (4)
            aggregate = exp_avg + mean  # Eq. (5)
            numerator = aggregate
            squares += sum_squares(g, BLOCK)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (aggregate * aggregate)  # Eq. (5)
        words = 0
        if rounds_moments:
            words = random_words(
                seed,
                param_index,
                step,
                start + begin,
                offset,
                length,
                stride,
                MOMENTS_STREAM,
                BY_FOURS,
                BLOCK,
            )
        _store_moment(
            exp_avg_ptr, exp_avg_scales_ptr, begin, count, mask, exp_avg, words, True, BLOCK
        )
        _store_moment(
            exp_avg_sq_ptr,
            exp_avg_sq_scales_ptr,
            begin,
            count,
            mask,
            exp_avg_sq,
            words,
            False,
            BLOCK,
        )
        second_moment = exp_avg_sq
        if AMSGRAD:
            largest = tl.load(max_exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
            # In this order a NaN in exp_avg_sq is kept.
            second_moment = tl.where(largest > exp_avg_sq, largest, exp_avg_sq)
            tl.store(max_exp_avg_sq_ptr + offsets, second_moment, mask=mask)
        corrected = inverse_bias_correction2 * second_moment
        denominator = _sqrt(corrected + eps_inside) + eps_outside
        param = decay_factor * param - step_size * _divide(numerator, denominator)  # Eq. (7)
        if STOCHASTIC:
            words = random_words(
                seed,
                param_index,
                step,
                start + begin,
                offset,
                length,
                stride,
                PARAM_STREAM,
                BY_FOURS,
                BLOCK,
            )
            if PARAM_DTYPE == tl.bfloat16:
                rounded = round_to_bfloat16(param, words >> 16)
            else:
                rounded = round_to_float16(param, words >> 16)
        else:
            rounded = param.to(PARAM_DTYPE)
        tl.store(param_ptr + offsets, rounded, mask=mask)
        if KAHAN:
            lost = param - rounded.to(STATE_DTYPE)
            tl.store(compensation_ptr + offsets, lost.to(PARAM_DTYPE), mask=mask)
    if not CRITICAL_GRADIENTS:
        tl.store(chunk_sq_norm_ptr, tl.sum(squares))


@entry
def critical_adam_kernel(
    table_ptr,
    chunks_ptr,
    chunk_sq_norms_ptr,
    lr_ptr,
    grad_factor_ptr,
    found_inf_ptr,
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps_inside: tl.float64,
    eps_outside: tl.float64,
    l2: tl.float64,
    late_l2: tl.float64,
    decoupled_weight_decay: tl.float64,
    sign: tl.float64,
    capacity: tl.int32,
    mean_over_capacity: tl.int32,
    seed: tl.int64,
    PARAM_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    SLOT_DTYPE: tl.constexpr,
    CRITICAL_GRADIENTS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    SUMMED_SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    KAHAN: tl.constexpr,
    BY_FOURS: tl.constexpr,
):
    """One step of one chunk: pending commit, aggregate, moments, parameter, and the norm's part.

    Args:
        table_ptr: The bucket's table. What it names is changed, but for gradients and keys.
        chunks_ptr: int32 (programs, 2): tensor and number of each program's chunk within it.
        chunk_sq_norms_ptr: float64 (programs,): the sum of g^2 of each chunk. Written by critical
            momenta; critical gradients have taken their norm before.
        lr_ptr: The learning rate on the device, or None: `lr`.
        grad_factor_ptr: float64 (): what every gradient is multiplied by; None for 1.
        found_inf_ptr: float64 (): where it is not 0 nothing is changed. Or None.
        lr: The learning rate.
        beta1: Decay of the momentum, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps_inside: Added inside the root.
        eps_outside: Added outside of it. One of the two is 0.
        l2: Coupled weight decay, 0 for none.
        late_l2: That of critical gradients which neither norms nor slots have, 0 for none.
        decoupled_weight_decay: Decoupled weight decay, 0 for none.
        sign: -1 to maximize, else 1.
        capacity: Slots of each buffer.
        mean_over_capacity: Whether the buffer's sum is divided by its capacity, or by its filled
            slots.
        seed: Of the random words, in [0, 2^63).
        PARAM_DTYPE: Of parameters and gradients.
        STATE_DTYPE: Of the arithmetic, and of the state but for the next two.
        MOMENT_DTYPE: Of the moments: STATE_DTYPE, bfloat16 or int8.
        SLOT_DTYPE: Of the slots: STATE_DTYPE, bfloat16, float16, int8, or uint8 for 8-bit floats.
        CRITICAL_GRADIENTS: The buffer holds gradients, else momenta.
        AMSGRAD: Divide by the running maximum of the second moment.
        SUMMED_SLOTS: The capacity where the slots are summed, 0 where the table has running sums.
        STOCHASTIC: A half-precision parameter is rounded stochastically.
        KAHAN: It has a compensation, which takes what rounding leaves.
        BY_FOURS: Where random words are drawn, each four consecutive elements, from the first on,
            are four of the whole parameter's with one counter.
    """
    if is_set(found_inf_ptr):
        return
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(chunks_ptr + 2 * program).to(tl.int64) * ROW
    chunk = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64)
    numel = tl.load(row_ptr + NUMEL_COLUMN)
    start = chunk * CHUNK_SIZE
    count = tl.minimum(numel - start, CHUNK_SIZE).to(tl.int32)

    beta1 = double(beta1)
    beta2 = double(beta2)
    # The books of critical momenta are kept after the pass, those of critical gradients before.
    step = tl.load(pointer(row_ptr, STEP_COLUMN, tl.float32)).to(tl.int64)
    if not CRITICAL_GRADIENTS:
        step += 1
    lr = double(lr) if lr_ptr is None else tl.load(lr_ptr).to(tl.float64)
    bias_correction1 = 1.0 - _power(beta1, step)
    bias_correction2 = 1.0 - _power(beta2, step)

    divisor = capacity
    if mean_over_capacity == 0:
        filled = tl.full((), 0, tl.int32)
        if CRITICAL_GRADIENTS:
            filled = tl.load(pointer(row_ptr, FILLED_COLUMN, tl.int64)).to(tl.int32)
        else:
            keys_ptr = pointer(row_ptr, PRIORITIES_COLUMN, tl.float32)
            for slot in range(0, capacity):
                filled += (tl.load(keys_ptr + slot) >= 0).to(tl.int32)
        # An empty buffer's sum is 0 whatever divides it.
        divisor = tl.maximum(filled, 1)
    slot = tl.load(pointer(row_ptr, SLOT_COLUMN, tl.int64)).to(tl.int32)
    # A running sum loses a rounding with every admission: each chunk is summed anew once in 4 C
    # steps, a different chunk each step (see csrc/cpu/kernels/slots.h).
    rebuild = (((step + chunk) % (4 * capacity) == 0) & (SUMMED_SLOTS == 0)).to(tl.int32)
    inverse_divisor = (1.0 / divisor.to(tl.float64)).to(STATE_DTYPE)
    step_size = (lr / bias_correction1).to(STATE_DTYPE)
    decay_factor = (1.0 - lr * decoupled_weight_decay).to(STATE_DTYPE)
    full = (count == CHUNK_SIZE) & is_aligned(row_ptr, numel, SLOT_DTYPE.primitive_bitwidth // 8)
    values = (
        row_ptr,
        chunk_sq_norms_ptr + program,
        start,
        count,
        numel,
        capacity,
        slot,
        rebuild,
        inverse_divisor,
        beta1.to(STATE_DTYPE),
        (1.0 - beta1).to(STATE_DTYPE),
        beta2.to(STATE_DTYPE),
        (1.0 - beta2).to(STATE_DTYPE),
        (1.0 / bias_correction2).to(STATE_DTYPE),
        step_size,
        double(eps_inside).to(STATE_DTYPE),
        double(eps_outside).to(STATE_DTYPE),
        decay_factor,
        double(l2).to(STATE_DTYPE),
        double(late_l2).to(STATE_DTYPE),
        signed_factor(sign, grad_factor_ptr).to(STATE_DTYPE),
        step,
        seed,
    )
    if full:
        _update_chunk(
            *values,
            PARAM_DTYPE,
            STATE_DTYPE,
            MOMENT_DTYPE,
            SLOT_DTYPE,
            CRITICAL_GRADIENTS,
            AMSGRAD,
            SUMMED_SLOTS,
            STOCHASTIC,
            KAHAN,
            BY_FOURS,
            True,
        )
    else:
        _update_chunk(
            *values,
            PARAM_DTYPE,
            STATE_DTYPE,
            MOMENT_DTYPE,
            SLOT_DTYPE,
            CRITICAL_GRADIENTS,
            AMSGRAD,
            SUMMED_SLOTS,
            STOCHASTIC,
            KAHAN,
            BY_FOURS,
            False,
        )
