"""The random bits of stochastic rounding: `cm_fused.philox`, bit by bit."""

from collections import namedtuple

import triton
import triton.language as tl

from cm_fused._backends.triton import layout
from cm_fused.philox import MULTIPLIERS, WEYL
from cm_fused.philox import ROUNDS as _ROUNDS

ROUNDS = tl.constexpr(_ROUNDS)
_MULTIPLIER0, _MULTIPLIER1 = map(tl.constexpr, MULTIPLIERS)
_WEYL0, _WEYL1 = map(tl.constexpr, WEYL)


@triton.constexpr_function
def _fours(shape):
    """Return the shape of a block's groups of four elements."""
    *outer, lanes, vector = shape
    return (*outer, lanes * vector // 4)


@triton.jit
def _four_offsets(SHAPE: tl.constexpr):
    """Return the place of each four elements of a block, counted in fours."""
    if layout.is_by_warps(SHAPE):
        FOURS: tl.constexpr = _fours(SHAPE)
        run = tl.arange(0, FOURS[0])[:, None, None]
        warp = tl.arange(0, FOURS[1])[None, :, None]
        four = tl.arange(0, FOURS[2])[None, None, :]
        return warp * (layout.SCALE_BLOCK // 4) + run * FOURS[2] + four
    else:
        return tl.arange(0, SHAPE[0] // 4)


# What a tensor's random bits are drawn from; the last three are `cm_fused.philox.ShardLayout`'s.
Counters = namedtuple("Counters", "seed param_index step offset length stride")


@triton.jit
def _products(x, FACTOR: tl.constexpr):
    """Return the upper and the lower half of x times a number, uint32."""
    # One multiplication; `tl.philox` takes two, one for each half.
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def _philox(counters, quads):
    """Return the random bits of each four elements, four uint32."""
    zeros = tl.zeros_like(quads)
    c0, c1 = quads.to(tl.uint32), (quads >> 32).to(tl.uint32)
    c2 = (zeros + counters.param_index).to(tl.uint32)
    c3 = (zeros + counters.step).to(tl.uint32)
    seed = tl.full((), counters.seed, tl.int64)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        upper0, lower0 = _products(c0, _MULTIPLIER0)
        upper1, lower1 = _products(c2, _MULTIPLIER1)
        c0 = upper1 ^ c1 ^ key0
        c2 = upper0 ^ c3 ^ key1
        c1, c3 = lower1, lower0
        key0 = tl.add(key0, _WEYL0, sanitize_overflow=False)
        key1 = tl.add(key1, _WEYL1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_words(counters, first, BY_FOURS: tl.constexpr, SHAPE: tl.constexpr):
    """Return a random word for each of a block's elements from `first`, uint32.

    BY_FOURS: each four consecutive elements are also four of the whole parameter's; else every
    element takes its bits from a counter of its own.
    """
    if BY_FOURS:
        quads = (counters.offset + first) // 4 + _four_offsets(SHAPE)
        bits0, bits1, bits2, bits3 = _philox(counters, quads)
        bits = tl.join(tl.join(bits0, bits2), tl.join(bits1, bits3))
        return tl.reshape(bits, SHAPE)
    else:
        elements = first + layout.block_offsets(SHAPE)
        skipped = elements // counters.length * (counters.stride - counters.length)
        positions = counters.offset + elements + skipped
        bits0, bits1, bits2, bits3 = _philox(counters, positions // 4)
        even = tl.where(positions % 4 == 0, bits0, bits2)
        odd = tl.where(positions % 4 == 1, bits1, bits3)
        return tl.where(positions % 2 == 0, even, odd)
