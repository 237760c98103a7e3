"""The scales of blocks, each found and accessed by one warp.

See NOTE: [Blocks with scales] in `layout`.
"""

import triton
import triton.language as tl

from cm_fused._backends.triton import layout
from cm_fused._backends.triton.common import INTERPRETED as _INTERPRETED
from cm_fused.rounding import SCALE_BITS

INTERPRETED = tl.constexpr(_INTERPRETED)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# The bits of a power of two taken from these are those of its inverse.
_INVERSE_BITS = tl.constexpr(254 << 23)
_SCALE_BITS = tl.constexpr(SCALE_BITS)
# Those of 2^-100, and the last bits of a float32, which a moment's code has not.
_SMALLEST_SCALED = tl.constexpr(0x0D800000)
_ROUNDED = tl.constexpr(0xFFFFF)


@triton.jit
def _larger(a, b):
    """Return the larger of two numbers, NaN where one is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest_bits(values):
    """Return the bits of each warp's largest magnitude, in which NaN is above infinity."""
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
        bits = tl.max(tl.max(bits, 3, keep_dims=True), 0, keep_dims=True)
    else:
        # A lane's own elements first, in one instruction each.
        largest = tl.reduce(tl.abs(values), 3, _larger, keep_dims=True)
        largest = tl.reduce(largest, 0, _larger, keep_dims=True)
        bits = largest.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
    return tl.max(bits, 2, keep_dims=True)


@triton.jit
def _quotient(x, DIVISOR: tl.constexpr):
    """Return x >= 2^-100 divided by DIVISOR, which is 7, 127 or 448, correctly rounded."""
    if INTERPRETED:
        return tl.div_rn(x, tl.full(x.shape, DIVISOR, tl.float32))
    else:
        # By its inverse, with one correction (Markstein): div_rn looks for the ends of the range.
        divisor = tl.full(x.shape, DIVISOR, tl.float32)
        inverse = tl.full(x.shape, 1.0 / DIVISOR, tl.float32)
        quotient = x * inverse
        return tl.fma(tl.fma(-divisor, quotient, x), inverse, quotient)


@triton.jit
def _inverse(scales):
    """Return 1 over usable scales, which have 16 significant bits, correctly rounded."""
    ones = tl.full(scales.shape, 1.0, tl.float32)
    if INTERPRETED:
        return tl.div_rn(ones, scales)
    else:
        root = tl.rsqrt(scales)
        inverse = root * root
        return tl.fma(tl.fma(-scales, inverse, ones), inverse, inverse)


@triton.jit
def block_scale(values, LARGEST: tl.constexpr):
    """Return what each warp's values are multiplied by, and restored by."""
    largest_bits = _largest_bits(values)
    largest = largest_bits.to(tl.float32, bitcast=True)
    usable = (largest >= 2.0**-100) & (largest_bits < _INFINITY_BITS)
    scales = _quotient(largest, LARGEST).to(tl.int32, bitcast=True) & _SCALE_BITS
    scales = tl.where(usable, scales.to(tl.float32, bitcast=True), largest)
    return tl.where(usable, _inverse(scales), 0.0), scales


@triton.jit
def moment_scale(values, TOP: tl.constexpr):
    """Return what each warp's values are multiplied by, and restored by: powers of two."""
    largest = tl.minimum(_largest_bits(values), _INFINITY_BITS)
    # The next power of two where the largest value is above the largest number with its own.
    power = (largest + _ROUNDED) & _INFINITY_BITS
    usable = (largest >= _SMALLEST_SCALED) & (power < _INFINITY_BITS)
    inverse = tl.where(usable, _INVERSE_BITS - power + (TOP << 23), 0)
    scales = tl.where(usable, power - (TOP << 23), power)
    return inverse.to(tl.float32, bitcast=True), scales.to(tl.float32, bitcast=True)


@triton.constexpr_function
def _scales(shape):
    """Return the shape in which a block's scales are loaded and stored, one for each lane."""
    return (1, shape[1], shape[2], 1)


@triton.jit
def _lanes(begin, SHAPE: tl.constexpr):
    """Return an element whose scale each lane uses, and the lane's number in its warp."""
    SCALES: tl.constexpr = _scales(SHAPE)
    # By the element, which hides that a warp's scale follows that of another: lanes would be laid
    # out along them.
    warp = tl.arange(0, SCALES[1])[None, :, None, None] * layout.SCALE_BLOCK
    lane = tl.arange(0, SCALES[2])[None, None, :, None]
    return begin + warp + 0 * lane, lane + 0 * warp


@triton.jit
def _are_wanted(elements, block, wanted, SHAPE: tl.constexpr):
    """Return the mask of scales that are wanted and those of elements of the chunk."""
    mask = tl.full(_scales(SHAPE), wanted, tl.int32) != 0
    return mask if layout.is_of_full_chunk(SHAPE) else mask & (elements < block.count)


@triton.jit
def load_scales(scales_ptr, block, wanted, other, SHAPE: tl.constexpr):
    """Load the scales of a block of a chunk, or return `other` where `wanted`, a scalar, is 0."""
    elements, lane = _lanes(block.begin, SHAPE)
    mask = (lane == 0) & _are_wanted(elements, block, wanted, SHAPE)
    loaded = tl.load(scales_ptr + elements // layout.SCALE_BLOCK, mask=mask, other=0.0)
    # The other lanes have 0. Integers are reduced by one instruction.
    bits = tl.max(loaded.to(tl.uint32, bitcast=True), 2, keep_dims=True)
    scales = bits.to(tl.float32, bitcast=True)
    return tl.where(tl.full(scales.shape, wanted, tl.int32) != 0, scales, other)


@triton.jit
def load_scales_of_slots(
    scales_ptr, stride, block, slot, other, C: tl.constexpr, SHAPE: tl.constexpr
):
    """Return the scales of C slots, each lane those of the slot with its number.

    The lane with the number `slot`, a scalar, has `other` instead, an item's scales. Where `slot`
    is -1 no lane has.
    """
    tl.static_assert(C <= SHAPE[2])
    elements, lane = _lanes(block.begin, SHAPE)
    mask = (lane < C) & (lane != tl.full(lane.shape, slot, tl.int32))
    if not layout.is_of_full_chunk(SHAPE):
        mask = mask & (elements < block.count)
    ptrs = scales_ptr + lane * stride + elements // layout.SCALE_BLOCK
    return tl.load(ptrs, mask=mask, other=tl.broadcast_to(other, lane.shape))


@triton.jit
def scales_of_slot(scales, slot: tl.constexpr):
    """Return a slot's scales of those that `load_scales_of_slots` returned."""
    return tl.gather(scales, tl.full(scales.shape, slot, tl.int32), 2)


@triton.jit
def store_scales(scales_ptr, block, scales, wanted, by, SHAPE: tl.constexpr):
    """Store the scales of a block where `wanted`, a scalar, is not 0; the lane `by` stores them."""
    elements, lane = _lanes(block.begin, SHAPE)
    mask = (lane == by) & _are_wanted(elements, block, wanted, SHAPE)
    scales = tl.broadcast_to(scales, _scales(SHAPE))
    tl.store(scales_ptr + elements // layout.SCALE_BLOCK, scales, mask=mask)
