"""How the pass loads and stores the moments, rounded where they are."""

import triton
import triton.language as tl

from cm_fused._backends.triton import codes, philox, rounding


@triton.jit
def load_moment(moment_ptr, scales_ptr, block, SIGNED: tl.constexpr, V: tl.constexpr):
    """Return the values of a moment."""
    stored = tl.load(moment_ptr + block.offsets, mask=block.mask, other=0)
    if stored.dtype == tl.int8:
        scales = codes.load_scales(scales_ptr, block, 1, 0.0, V.SHAPE)
        return codes.from_moment(stored, scales, SIGNED)
    else:
        return stored.to(V.STATE_DTYPE)


@triton.jit
def _store_moment(
    moment_ptr, scales_ptr, block, values, bits, SIGNED: tl.constexpr, V: tl.constexpr
):
    """Store a moment; an element's first random bits round m, its last ones v."""
    if V.MOMENT_DTYPE == V.STATE_DTYPE:
        tl.store(moment_ptr + block.offsets, values, mask=block.mask)
    else:
        if V.MOMENT_DTYPE == tl.int8:
            taken = bits >> 12 if SIGNED else bits & 0xFFFFF
            stored, scales = codes.to_moment(values, taken, SIGNED, V)
            codes.store_scales(scales_ptr, block, scales, 1, 0, V.SHAPE)
            tl.store(moment_ptr + block.offsets, stored, mask=block.mask)
        else:
            half = bits >> 16 if SIGNED else bits & 0xFFFF
            rounded = rounding.round_to_bfloat16(values, half)
            tl.store(moment_ptr + block.offsets, rounded, mask=block.mask)


@triton.jit
def store_moments(tensors, block, first, exp_avg, exp_avg_sq, counters, V: tl.constexpr):
    """Store both moments of the elements from `first` of a tensor."""
    bits = 0
    if V.MOMENT_DTYPE != V.STATE_DTYPE:
        bits = philox.random_bits(counters, first, philox.MOMENTS_STREAM, V.BY_FOURS, V.SHAPE)
    _store_moment(tensors.exp_avg, tensors.exp_avg_scales, block, exp_avg, bits, True, V)
    _store_moment(tensors.exp_avg_sq, tensors.exp_avg_sq_scales, block, exp_avg_sq, bits, False, V)
