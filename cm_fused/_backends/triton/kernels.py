"""The Triton kernel of the step: one pass over all chunks of all tensors.

It finds its tensors through a table (`cm_fused._backends.triton.columns`). The compiler contracts
nothing to a fused multiply-add (see `LAUNCH_OPTIONS`), and quotients and roots are correctly
rounded, so a parameter's bits depend neither on the path its chunk takes nor on the device.
"""

from collections import namedtuple

import triton
import triton.language as tl

from cm_fused._backends.triton import layout, philox, rounding
from cm_fused._backends.triton.buffer import Admission, buffer_of, rebuild_sum, sum_and_commit
from cm_fused._backends.triton.chunks import block_at, chunk_of, tensors_of
from cm_fused._backends.triton.common import (
    CHUNK_SIZE,
    REBUILT_CHUNK_SIZE,
    THREADS,
    cell,
    double,
    effective_gradient,
    empty_sum,
    entry,
    is_aligned,
    is_set,
    pointer,
    signed_factor,
    sum_squares,
)
from cm_fused._backends.triton.moments import load_moment, store_moments
from cm_fused._backends.triton.quotient import divide_by_root
from cm_fused._backends.triton.variants import make_variant, of_chunk

# The numbers of a launch, see `critical_adam_kernel`.
_Hyperparameters = namedtuple(
    "_Hyperparameters",
    "lr beta1 beta2 eps_inside eps_outside l2 late_l2 decoupled_weight_decay factor",
)

# The scalars of a tensor's step, rounded once to the state's dtype.
_Scalars = namedtuple(
    "_Scalars",
    "inverse_divisor beta1 one_minus_beta1 beta2 one_minus_beta2 inverse_bias_correction2 "
    "step_size eps_inside eps_outside decay_factor l2 late_l2 factor",
)


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


@triton.jit
def _counters_of(chunk, seed, step):
    """Return what a tensor's random bits are drawn from."""
    return philox.Counters(
        seed,
        cell(chunk.row_ptr, "param_index"),
        step,
        cell(chunk.row_ptr, "shard_offset"),
        cell(chunk.row_ptr, "shard_length"),
        cell(chunk.row_ptr, "shard_stride"),
    )


@triton.jit
def _second_moment(tensors, block, exp_avg_sq, V: tl.constexpr):
    """Return the second moment that the step uses; with amsgrad store the largest of all steps."""
    second_moment = exp_avg_sq
    if V.AMSGRAD:
        largest = tl.load(tensors.max_exp_avg_sq + block.offsets, mask=block.mask, other=0.0)
        # In this order a NaN in exp_avg_sq is kept.
        second_moment = tl.where(largest > exp_avg_sq, largest, exp_avg_sq)
        tl.store(tensors.max_exp_avg_sq + block.offsets, second_moment, mask=block.mask)
    return second_moment


@triton.jit
def _load(tensors, block, V: tl.constexpr):
    """Return m, the parameter, the gradient and v of a block."""
    exp_avg = load_moment(tensors.exp_avg, tensors.exp_avg_scales, block, True, V)
    param = rounding.load_param(
        tensors.param, tensors.master_remainder, block.offsets, block.mask, V.SPLIT, V.STATE_DTYPE
    )
    grad = tl.load(tensors.grad + block.offsets, mask=block.mask, other=0.0)
    exp_avg_sq = load_moment(tensors.exp_avg_sq, tensors.exp_avg_sq_scales, block, False, V)
    return exp_avg, param, rounding.widen(grad, V), exp_avg_sq


@triton.jit
def _update_moments(s, g, buffer_sum, exp_avg, exp_avg_sq, V: tl.constexpr):
    """Return m, v and the numerator of the step, Eqs. (3) to (6)."""
    # What changes nothing that it is added to, where there is no buffer.
    mean = s.inverse_divisor * buffer_sum if V.HAS_BUFFER else empty_sum(V.STATE_DTYPE, V.SHAPE)
    if V.CRITICAL_GRADIENTS:
        aggregate = g + mean  # Eq. (3)
        exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * aggregate
        numerator = exp_avg
    else:
        exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * g  # Eq. (4)
        aggregate = exp_avg + mean  # Eq. (5)
        numerator = aggregate
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (aggregate * aggregate)  # Eq. (5)
    return exp_avg, exp_avg_sq, numerator


@triton.jit
def _update_param(s, param, numerator, second_moment, V: tl.constexpr):
    """Return the parameter after the step, Eq. (7)."""
    corrected = s.inverse_bias_correction2 * second_moment
    ratio = divide_by_root(numerator, corrected + s.eps_inside, s.eps_outside, V)
    return s.decay_factor * param - s.step_size * ratio


@triton.jit
def _store_param(tensors, block, param, words, V: tl.constexpr):
    """Store the parameter, rounded as the variant says; `words` are random, if stochastically."""
    if V.STOCHASTIC:
        # See `cm_fused.rounding.param_bits`.
        bits = (words >> 16) ^ (words & 0xFFFF)
        if V.PARAM_DTYPE == tl.bfloat16:
            rounded = rounding.round_to_bfloat16(param, bits)
        else:
            rounded = rounding.round_to_float16(param, bits)
    elif V.SPLIT:
        rounded, remainder = rounding.split_master(param)
        tl.store(tensors.master_remainder + block.offsets, remainder, mask=block.mask)
    else:
        rounded = param.to(V.PARAM_DTYPE)
    tl.store(tensors.param + block.offsets, rounded, mask=block.mask)
    if V.KAHAN:
        lost = (param - rounded.to(V.STATE_DTYPE)).to(V.PARAM_DTYPE)
        tl.store(tensors.compensation + block.offsets, lost, mask=block.mask)


@triton.jit
def _update_chunk(
    chunk,
    chunk_sq_norm_ptr,
    admission,
    s,
    seed,
    step,
    VARIANT: tl.constexpr,
    FULL: tl.constexpr,
    ALIGNED_SLOTS: tl.constexpr,
):
    """Update a chunk, and write its sum of g^2 where that has not been taken before.

    FULL: it has CHUNK_SIZE elements, and every tensor is aligned. ALIGNED_SLOTS: so is every slot.
    """
    V: tl.constexpr = of_chunk(VARIANT, FULL, ALIGNED_SLOTS)
    BLOCK: tl.constexpr = V.BLOCK
    tensors = tensors_of(chunk, V)
    buffer = buffer_of(chunk, admission, V)
    counters = _counters_of(chunk, seed, step)
    follow = (admission.slot >= 0).to(tl.int32)
    if not V.CRITICAL_GRADIENTS:
        # A sum that was rebuilt with the momentum in its slot has followed the commit.
        follow = follow * (1 - admission.rebuild)
    if V.HAS_BUFFER:  # noqa: SIM102
        if admission.rebuild:
            # The threads that write an element here read it below: both walk in the same layout.
            rebuild_sum(tensors, buffer, chunk.count, V)
    squares = tl.zeros((THREADS,), dtype=tl.float64)
    for begin in range(0, CHUNK_SIZE if FULL else chunk.count, BLOCK):
        block = block_at(begin, chunk.count, V)
        exp_avg, param, grad, exp_avg_sq = _load(tensors, block, V)
        g = effective_gradient(grad, param, s.factor, s.l2)
        late_g = effective_gradient(g, param, 1.0, s.late_l2) if V.CRITICAL_GRADIENTS else g
        if V.KAHAN:
            lost = tl.load(tensors.compensation + block.offsets, mask=block.mask, other=0.0)
            param += lost.to(V.STATE_DTYPE)
        buffer_sum = 0.0
        if V.HAS_BUFFER:
            item = g if V.CRITICAL_GRADIENTS else exp_avg
            buffer_sum = sum_and_commit(buffer, item, follow, block, V)
        if not V.CRITICAL_GRADIENTS:
            squares += sum_squares(g, V.SHAPE)
        exp_avg, exp_avg_sq, numerator = _update_moments(
            s, late_g, buffer_sum, exp_avg, exp_avg_sq, V
        )
        words = 0
        if V.STOCHASTIC or V.MOMENT_DTYPE != V.STATE_DTYPE:
            words = philox.random_words(counters, chunk.start + begin, V.BY_FOURS, V.SHAPE)
        store_moments(tensors, block, exp_avg, exp_avg_sq, words, V)
        second_moment = _second_moment(tensors, block, exp_avg_sq, V)
        param = _update_param(s, param, numerator, second_moment, V)
        _store_param(tensors, block, param, words, V)
    if not V.CRITICAL_GRADIENTS:
        tl.store(chunk_sq_norm_ptr, tl.sum(squares))


@triton.jit
def _mean_divisor(row_ptr, capacity, mean_over_capacity, CRITICAL_GRADIENTS: tl.constexpr):
    """Return what the buffer's sum is divided by: its capacity, or its number of filled slots."""
    divisor = capacity
    if mean_over_capacity == 0:
        filled = tl.full((), 0, tl.int32)
        if CRITICAL_GRADIENTS:
            filled = tl.load(pointer(row_ptr, "filled", tl.int64)).to(tl.int32)
        else:
            keys_ptr = pointer(row_ptr, "priorities", tl.float32)
            for slot in range(0, capacity):
                filled += (tl.load(keys_ptr + slot) >= 0).to(tl.int32)
        # An empty buffer's sum is 0 whatever divides it.
        divisor = tl.maximum(filled, 1)
    return divisor


@triton.jit
def _scalars_of(hyperparameters, step, divisor, STATE_DTYPE: tl.constexpr):
    """Return the scalars of step number `step`, from 1, all computed in float64."""
    lr = hyperparameters.lr
    beta1 = double(hyperparameters.beta1)
    beta2 = double(hyperparameters.beta2)
    bias_correction1 = 1.0 - _power(beta1, step)
    bias_correction2 = 1.0 - _power(beta2, step)
    return _Scalars(
        (1.0 / divisor.to(tl.float64)).to(STATE_DTYPE),
        beta1.to(STATE_DTYPE),
        (1.0 - beta1).to(STATE_DTYPE),
        beta2.to(STATE_DTYPE),
        (1.0 - beta2).to(STATE_DTYPE),
        (1.0 / bias_correction2).to(STATE_DTYPE),
        (lr / bias_correction1).to(STATE_DTYPE),
        double(hyperparameters.eps_inside).to(STATE_DTYPE),
        double(hyperparameters.eps_outside).to(STATE_DTYPE),
        (1.0 - lr * hyperparameters.decoupled_weight_decay).to(STATE_DTYPE),
        double(hyperparameters.l2).to(STATE_DTYPE),
        double(hyperparameters.late_l2).to(STATE_DTYPE),
        hyperparameters.factor.to(STATE_DTYPE),
    )


@entry
def critical_adam_kernel(
    table_ptr,  # the bucket's table; except gradients and keys, what it names is changed
    chunks_ptr,  # int32 (programs, 2): tensor and number of each program's chunk within it
    # float64 (programs,): the sum of g^2 of each chunk. Written by critical momenta; critical
    # gradients have taken their norm before.
    chunk_sq_norms_ptr,
    lr_ptr,  # the learning rate on the device, or None: `lr`
    grad_factor_ptr,  # float64 (): what every gradient is multiplied by; None for 1
    found_inf_ptr,  # float64 (): where it is not 0 nothing is changed; or None
    lr: tl.float64,
    beta1: tl.float64,
    beta2: tl.float64,
    eps_inside: tl.float64,  # added inside the root
    eps_outside: tl.float64,  # added outside of it; one of the two is 0
    l2: tl.float64,  # coupled weight decay
    late_l2: tl.float64,  # that of critical gradients which neither norms nor slots have
    decoupled_weight_decay: tl.float64,
    sign: tl.float64,  # -1 to maximize, else 1
    capacity: tl.int32,
    mean_over_capacity: tl.int32,  # else the buffer's sum is divided by its filled slots
    seed: tl.int64,  # of the random bits, in [0, 2^63)
    PARAM_DTYPE: tl.constexpr,  # of parameters
    GRAD_DTYPE: tl.constexpr,  # of gradients: PARAM_DTYPE, or bfloat16 or float16 of float32
    STATE_DTYPE: tl.constexpr,  # of the arithmetic, and of the state except the next two
    MOMENT_DTYPE: tl.constexpr,  # STATE_DTYPE, bfloat16 or int8
    # STATE_DTYPE, bfloat16, float16, int8, uint8 for 8-bit floats, or `layout.INT4`
    SLOT_DTYPE: tl.constexpr,
    CRITICAL_GRADIENTS: tl.constexpr,  # the buffer holds gradients, else momenta
    AMSGRAD: tl.constexpr,  # divide by the running maximum of the second moment
    # The capacity where slots are summed, 0 where there are sums, NO_BUFFER where there are none.
    SUMMED_SLOTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,  # a half-precision parameter is rounded stochastically
    KAHAN: tl.constexpr,  # it has a compensation, which takes what rounding leaves
    SPLIT: tl.constexpr,  # it is of bfloat16 and has the rest of a float32 master's bits
    # Each four consecutive elements, from the first on, are four of the whole parameter's that
    # share a counter of random bits.
    BY_FOURS: tl.constexpr,
    PTX: tl.constexpr,  # PTX may be written inline: it is compiled for CUDA
):
    """One step of one chunk: pending commit, aggregate, moments, parameter, and the norm's part."""
    if is_set(found_inf_ptr):
        return
    VARIANT: tl.constexpr = make_variant(
        PARAM_DTYPE,
        GRAD_DTYPE,
        STATE_DTYPE,
        MOMENT_DTYPE,
        SLOT_DTYPE,
        CRITICAL_GRADIENTS,
        AMSGRAD,
        SUMMED_SLOTS,
        STOCHASTIC,
        KAHAN,
        SPLIT,
        BY_FOURS,
        PTX,
    )
    chunk = chunk_of(table_ptr, chunks_ptr)
    HAS_BUFFER: tl.constexpr = VARIANT.HAS_BUFFER
    slot_bytes = chunk.numel * 0
    if HAS_BUFFER:
        slot_bytes = layout.slot_bytes(chunk.numel, SLOT_DTYPE)
    # Slots are aligned where the number of bytes of each is a multiple of 16. Where they are not,
    # the other tensors may be, and a full chunk still is one unless its slots are read as words.
    full = (chunk.count == CHUNK_SIZE) & is_aligned(chunk.row_ptr)
    aligned_slots = slot_bytes % 16 == 0
    # The priorities of critical momenta are updated after the pass, those of critical gradients
    # before.
    step = tl.load(pointer(chunk.row_ptr, "step", tl.float32)).to(tl.int64)
    if not CRITICAL_GRADIENTS:
        step += 1
    hyperparameters = _Hyperparameters(
        double(lr) if lr_ptr is None else tl.load(lr_ptr).to(tl.float64),
        beta1,
        beta2,
        eps_inside,
        eps_outside,
        l2,
        late_l2,
        decoupled_weight_decay,
        signed_factor(sign, grad_factor_ptr),
    )
    divisor = tl.full((), 1, tl.int32)
    slot = tl.full((), -1, tl.int32)
    rebuild = tl.full((), 0, tl.int32)
    if HAS_BUFFER:
        divisor = _mean_divisor(chunk.row_ptr, capacity, mean_over_capacity, CRITICAL_GRADIENTS)
        slot = tl.load(pointer(chunk.row_ptr, "pending_slot", tl.int64)).to(tl.int32)
        # A running sum loses a rounding with every admission: each part of a tensor is summed anew
        # once in 4 C steps, a different part each step (see csrc/cpu/kernels/slots.h).
        turn = step + chunk.start // REBUILT_CHUNK_SIZE
        rebuild = ((turn % (4 * capacity) == 0) & (SUMMED_SLOTS == 0)).to(tl.int32)
    s = _scalars_of(hyperparameters, step, divisor, STATE_DTYPE)
    admission = Admission(capacity, slot, rebuild)
    sq_norm_ptr = chunk_sq_norms_ptr + tl.program_id(0)
    if full & aligned_slots:
        _update_chunk(chunk, sq_norm_ptr, admission, s, seed, step, VARIANT, True, True)
    elif full & VARIANT.HAS_PLAIN_SLOTS:
        _update_chunk(chunk, sq_norm_ptr, admission, s, seed, step, VARIANT, True, False)
    else:
        _update_chunk(chunk, sq_norm_ptr, admission, s, seed, step, VARIANT, False, False)
