"""How the pass loads and stores the moments, rounded where they are."""

import triton
import triton.language as tl

from cm_fused._backends.triton import codes, rounding
from cm_fused._backends.triton.scales import load_scales, store_scales


@triton.jit
def load_moment(moment_ptr, scales_ptr, block, SIGNED: tl.constexpr, V: tl.constexpr):
    """Return the values of a moment."""
    stored = tl.load(moment_ptr + block.offsets, mask=block.mask, other=0)
    if stored.dtype == tl.int8:
        scales = load_scales(scales_ptr, block, 1, 0.0, V.SHAPE)
        return codes.from_moment(stored, scales, SIGNED)
    else:
        return rounding.widen(stored, V)


@triton.jit
def _store_moment(
    moment_ptr, scales_ptr, block, values, words, SIGNED: tl.constexpr, V: tl.constexpr
):
    """Store a moment; the first bits of an element's random word round m, the last ones v."""
    if V.MOMENT_DTYPE == V.STATE_DTYPE:
        tl.store(moment_ptr + block.offsets, values, mask=block.mask)
    else:
        if V.MOMENT_DTYPE == tl.int8:
            taken = words >> 12 if SIGNED else words & 0xFFFFF
            stored, scales = codes.to_moment(values, taken, SIGNED, V)
            store_scales(scales_ptr, block, scales, 1, 0, V.SHAPE)
            tl.store(moment_ptr + block.offsets, stored, mask=block.mask)
        else:
            half = words >> 16 if SIGNED else words & 0xFFFF
            rounded = rounding.round_to_bfloat16(values, half)
            tl.store(moment_ptr + block.offsets, rounded, mask=block.mask)


@triton.jit
def store_moments(tensors, block, exp_avg, exp_avg_sq, words, V: tl.constexpr):
    """Store both moments of a block; `words` are random, if they are rounded."""
    _store_moment(tensors.exp_avg, tensors.exp_avg_scales, block, exp_avg, words, True, V)
    _store_moment(tensors.exp_avg_sq, tensors.exp_avg_sq_scales, block, exp_avg_sq, words, False, V)
