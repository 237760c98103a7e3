"""Slots and moments as codes beside scales: `cm_fused.rounding`, bit by bit.

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
_SIGN_BIT = tl.constexpr(-0x80000000)
# The bits of a power of two taken from these are those of its inverse.
_INVERSE_BITS = tl.constexpr(254 << 23)
_SCALE_BITS = tl.constexpr(SCALE_BITS)
# The upper half of each byte of a word.
_UPPER_HALVES = tl.constexpr(-0x0F0F0F10)
# The sign of each byte of a word, and the sum of the bits of 1.5 * 2^23, shifted to each byte.
_SIGNS = tl.constexpr(-0x7F7F7F80)
_ROUNDING_BITS = tl.constexpr(-0x74C00000)
# Those of 2^-100, and the last bits of a float32, which a moment's code has not.
_SMALLEST_SCALED = tl.constexpr(0x0D800000)
_ROUNDED = tl.constexpr(0xFFFFF)
# The bits of 2^-6, and of 2^14: a number that is added to it is rounded to a multiple of 2^-9, in
# the sum's last bits.
_SMALLEST_FLOAT8 = tl.constexpr(0x3C800000)
_SUBNORMAL_BITS = tl.constexpr(0x46800000)
# The sign, exponent and mantissa of an 8-bit float, moved to their places in float32.
_FLOAT8_BITS = tl.constexpr(-0x78100000)


@triton.constexpr_function
def _largest(dtype):
    """Return the largest number a dtype with scales holds."""
    return {tl.int8: 127.0, tl.uint8: 448.0, layout.INT4: 7.0}[dtype]


@triton.constexpr_function
def _scales(shape):
    """Return the shape in which a block's scales are loaded and stored, one for each lane."""
    return (1, shape[1], shape[2], 1)


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
    """Return x >= 2^-100 divided by a number, correctly rounded."""
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
    """Return 1 over scales, which have 16 bits, correctly rounded."""
    ones = tl.full(scales.shape, 1.0, tl.float32)
    if INTERPRETED:
        return tl.div_rn(ones, scales)
    else:
        root = tl.rsqrt(scales)
        inverse = root * root
        return tl.fma(tl.fma(-scales, inverse, ones), inverse, inverse)


@triton.jit
def _block_scale(values, LARGEST: tl.constexpr):
    """Return what each warp's values are multiplied by, and restored by."""
    largest_bits = _largest_bits(values)
    largest = largest_bits.to(tl.float32, bitcast=True)
    usable = (largest >= 2.0**-100) & (largest_bits < _INFINITY_BITS)
    scales = _quotient(largest, LARGEST).to(tl.int32, bitcast=True) & _SCALE_BITS
    scales = tl.where(usable, scales.to(tl.float32, bitcast=True), largest)
    return tl.where(usable, _inverse(scales), 0.0), scales


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

    `other`, those of an item, are in the place of the scalar `slot`'s, or of none's where it is -1.
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
    """Store the scales of a block where `wanted`, a scalar, is not 0, by the lane of a number."""
    elements, lane = _lanes(block.begin, SHAPE)
    mask = (lane == by) & _are_wanted(elements, block, wanted, SHAPE)
    scales = tl.broadcast_to(scales, _scales(SHAPE))
    tl.store(scales_ptr + elements // layout.SCALE_BLOCK, scales, mask=mask)


@triton.jit
def _to_float8(value):
    """Return the byte, int32, of a float32 value of at most 448, rounded to nearest even."""
    raw = value.to(tl.int32, bitcast=True)
    magnitude = raw & _MAGNITUDE_BITS
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    sum_bits = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    subnormal = sum_bits - _SUBNORMAL_BITS
    byte = tl.where(magnitude >= _SMALLEST_FLOAT8, normal, subnormal)
    return tl.where(raw < 0, byte + 128, byte)


@triton.jit
def _from_float8(byte):
    """Return the float32 value of an 8-bit float's byte, int8."""
    # A float32 with its bits is 2^-120 times it, subnormal numbers included.
    bits = (byte.to(tl.int32) << 20) & _FLOAT8_BITS
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _byte_shifts(SHAPE: tl.constexpr):
    """Return by how many bits each byte of a word is shifted."""
    return (tl.arange(0, SHAPE[3]) * 8)[None, None, None, :]


@triton.jit
def _to_words(bytes, SHAPE: tl.constexpr):
    """Return a block of words of int32 bytes from 0 to 255."""
    if layout.is_of_full_chunk(SHAPE):
        return tl.sum(bytes << _byte_shifts(SHAPE), 3, keep_dims=True)
    else:
        return bytes.to(tl.uint8)


@triton.jit
def _to_signed_words(codes, SHAPE: tl.constexpr):
    """Return a block of words of int8 codes, which have 128 more, and the bits of 1.5 * 2^23."""
    if layout.is_of_full_chunk(SHAPE):
        words = tl.sum(codes << _byte_shifts(SHAPE), 3, keep_dims=True)
        return (words - _ROUNDING_BITS) ^ _SIGNS
    else:
        return (codes ^ 128).to(tl.uint8)


@triton.jit
def _from_words(words, SHAPE: tl.constexpr):
    """Return the bytes of a block of words, int8."""
    return (words.to(tl.int32) >> _byte_shifts(SHAPE)).to(tl.int8)


# Shapes are made by functions: Triton 3.6 takes a tuple of sizes for run-time numbers.
@triton.constexpr_function
def _packed(shape):
    """Return the shape of a block's bytes in a packed slot."""
    return (shape[0] // 2, *shape[1:])


@triton.constexpr_function
def _words_of_runs(shape):
    """Return the shape of a block's words, if each run has one."""
    return (*shape[:3], 1)


@triton.jit
def _pack(codes, SHAPE: tl.constexpr):
    """Return the bytes, int32, of a block of int32 codes, two in each.

    Runs are picked out by sums over all of them, which a thread has: to reshape them would lay them
    out anew.
    """
    RUNS: tl.constexpr = SHAPE[0] // 2
    run = tl.arange(0, 2 * RUNS)[:, None, None, None]
    halves = (codes & 15) << (run // RUNS * 4)
    if RUNS == 1:
        return tl.sum(halves, 0, keep_dims=True)
    else:
        packed_run = tl.arange(0, RUNS)[:, None, None, None]
        packed = tl.zeros(_packed(SHAPE), tl.int32)
        for i in tl.static_range(RUNS):
            both = tl.sum(tl.where(run % RUNS == i, halves, 0), 0, keep_dims=True)
            packed = tl.where(packed_run == i, both, packed)
        return packed


@triton.jit
def _unpack(stored, SHAPE: tl.constexpr):
    """Return the words of 16 times the codes: in the upper half of a byte a code has its sign."""
    word = stored.to(tl.int32)
    lower, upper = (word << 4) & _UPPER_HALVES, word & _UPPER_HALVES
    RUNS: tl.constexpr = SHAPE[0] // 2
    run = tl.arange(0, 2 * RUNS)[:, None, None, None]
    if RUNS == 1:
        return tl.where(run == 0, lower, upper)
    else:
        packed_run = tl.arange(0, RUNS)[:, None, None, None]
        words = tl.zeros(_words_of_runs(SHAPE), tl.int32)
        for i in tl.static_range(RUNS):
            first = tl.sum(tl.where(packed_run == i, lower, 0), 0, keep_dims=True)
            second = tl.sum(tl.where(packed_run == i, upper, 0), 0, keep_dims=True)
            words = tl.where(run == i, first, tl.where(run == RUNS + i, second, words))
        return words


@triton.jit
def to_slot(values, SLOT_DTYPE: tl.constexpr):
    """Return values as a slot stores them, and the scales of each warp; see `from_slot`."""
    if layout.has_scales(SLOT_DTYPE):
        inverse, scales = _block_scale(values, _largest(SLOT_DTYPE))
        scaled = tl.where(inverse == 0, 0.0, values * inverse)
        if SLOT_DTYPE == tl.uint8:
            codes = _to_float8(scaled)
        else:
            # Added to 1.5 * 2^23, a number is rounded to an integer, in the sum's last bits. By 128
            # more all codes are positive.
            codes = (scaled + 12583040.0).to(tl.int32, bitcast=True)
            if layout.is_packed(SLOT_DTYPE):
                codes = _pack(codes, values.shape)
            else:
                return _to_signed_words(codes, values.shape), scales
        return _to_words(codes, values.shape), scales
    else:
        return values.to(SLOT_DTYPE), 0


@triton.jit
def _decoded(stored, scales, SLOT_DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Return two factors of the values of a slot with scales, whose product is exact."""
    if layout.is_packed(SLOT_DTYPE):
        return _from_words(_unpack(stored, SHAPE), SHAPE).to(tl.float32), scales * 0.0625
    elif SLOT_DTYPE == tl.int8:
        return _from_words(stored, SHAPE).to(tl.float32), scales
    else:
        return _from_float8(_from_words(stored, SHAPE)), scales


@triton.jit
def from_slot(
    stored, scales, SLOT_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, SHAPE: tl.constexpr
):
    """Return the values of a slot; `scales` are used by the dtypes that have them."""
    if layout.has_scales(SLOT_DTYPE):
        codes, scales = _decoded(stored, scales, SLOT_DTYPE, SHAPE)
        return codes * scales
    else:
        return stored.to(STATE_DTYPE)


@triton.jit
def add_slot(
    total, stored, scales, SLOT_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, SHAPE: tl.constexpr
):
    """Return a sum to which the values of one more slot are added; see `from_slot`."""
    if layout.has_scales(SLOT_DTYPE):
        codes, scales = _decoded(stored, scales, SLOT_DTYPE, SHAPE)
        return tl.fma(codes, tl.broadcast_to(scales, codes.shape), total)
    else:
        return total + stored.to(STATE_DTYPE)


@triton.jit
def _moment_scale(values, TOP: tl.constexpr):
    """Return what each warp's values are multiplied by, and restored by: powers of two."""
    largest = tl.minimum(_largest_bits(values), _INFINITY_BITS)
    # The next power of two where the largest value is above the largest number with its own.
    power = (largest + _ROUNDED) & _INFINITY_BITS
    usable = (largest >= _SMALLEST_SCALED) & (power < _INFINITY_BITS)
    inverse = tl.where(usable, _INVERSE_BITS - power + (TOP << 23), 0)
    scales = tl.where(usable, power - (TOP << 23), power)
    return inverse.to(tl.float32, bitcast=True), scales.to(tl.float32, bitcast=True)


def _one_line(assembly: str) -> tl.constexpr:
    """Return code in one line: the compiler takes each line for another one of this file."""
    return tl.constexpr(" ".join(assembly.split()))


# The codes of four elements as a word, 0 where the inverse of their scale is: the last byte of
# each, or, from the bits of a float32, the 7 bits from the 21st on and the sign.
_PACK = _one_line("""{
    .reg .b32 a, b;
    .reg .pred unusable;
    prmt.b32 a, $1, $2, 0x0040;
    prmt.b32 b, $3, $4, 0x0040;
    prmt.b32 a, a, b, 0x5410;
    setp.eq.f32 unusable, $5, 0f00000000;
    selp.b32 $0, 0, a, unusable;
}""")
_PACK_SIGNED = _one_line("""{
    .reg .b32 a, b, signs;
    .reg .pred unusable;
    prmt.b32 a, $1, $2, 0x7632;
    prmt.b32 b, $3, $4, 0x7632;
    prmt.b32 signs, a, b, 0x7531;
    shr.u32 a, a, 4;
    shr.u32 b, b, 4;
    prmt.b32 a, a, b, 0x6420;
    and.b32 signs, signs, 0x80808080;
    or.b32 a, a, signs;
    setp.eq.f32 unusable, $5, 0f00000000;
    selp.b32 $0, 0, a, unusable;
}""")


@triton.jit
def to_moment(values, bits, SIGNED: tl.constexpr, V: tl.constexpr):
    """Return a moment's int8 codes and the scales of each warp; `bits` uint32 in [0, 2^20)."""
    inverse, scales = _moment_scale(values, 8 if SIGNED else 15)
    scaled = values * inverse
    # A float32 with a code's exponent, subnormal numbers included.
    subnormal = scaled * (2.0**-120 if SIGNED else 2.0**-112)
    codes = subnormal.to(tl.int32, bitcast=True) + bits.to(tl.int32, bitcast=True)
    if not SIGNED:
        # It is divided by: what is positive stays so.
        codes = tl.maximum(codes >> 20, tl.minimum(scaled.to(tl.int32, bitcast=True), 1))
    if V.PTX and V.FULL:
        codes = tl.inline_asm_elementwise(
            _PACK_SIGNED if SIGNED else _PACK,
            "=r,r,r,r,r,f,f,f,f",
            [codes, tl.broadcast_to(inverse, codes.shape)],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    else:
        if SIGNED:
            codes = ((codes << 4) & _MAGNITUDE_BITS | codes & _SIGN_BIT) >> 24
        codes = tl.where(inverse == 0, 0, codes).to(tl.uint8).to(tl.int8, bitcast=True)
    return codes, scales


@triton.jit
def from_moment(codes, scales, SIGNED: tl.constexpr):
    """Return the values of a moment's int8 codes."""
    if SIGNED:
        return _from_float8(codes) * scales
    else:
        return (
            (codes.to(tl.uint8, bitcast=True).to(tl.int32) << 20).to(tl.float32, bitcast=True)
            * 2.0**112
            * scales
        )
