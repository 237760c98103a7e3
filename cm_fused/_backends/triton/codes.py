"""Slots and moments as codes beside scales: `cm_fused.rounding`, bit by bit.

See NOTE: [Blocks with scales] in `layout`.
"""

import triton
import triton.language as tl

from cm_fused._backends.triton import layout
from cm_fused._backends.triton.scales import block_scale, moment_scale

_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
_SIGN_BIT = tl.constexpr(-0x80000000)
# The upper half of each byte of a word.
_UPPER_HALVES = tl.constexpr(-0x0F0F0F10)
# The sign of each byte of a word, and the sum of the bits of 1.5 * 2^23, shifted to each byte.
_SIGNS = tl.constexpr(-0x7F7F7F80)
_ROUNDING_BITS = tl.constexpr(-0x74C00000)
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
    """Return a block of words of int8 codes; 128 and the bits of 1.5 * 2^23 were added to each."""
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
        inverse, scales = block_scale(values, _largest(SLOT_DTYPE))
        scaled = tl.where(inverse == 0, 0.0, values * inverse)
        if SLOT_DTYPE == tl.uint8:
            words = _to_words(_to_float8(scaled), values.shape)
        else:
            # Added to 1.5 * 2^23, a number is rounded to an integer, in the sum's last bits. By 128
            # more all codes are positive.
            codes = (scaled + 12583040.0).to(tl.int32, bitcast=True)
            if layout.is_packed(SLOT_DTYPE):
                words = _to_words(_pack(codes, values.shape), values.shape)
            else:
                words = _to_signed_words(codes, values.shape)
        return words, scales
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


def _one_line(assembly: str) -> tl.constexpr:
    """Return code in one line: the compiler takes each line for another one of this file."""
    return tl.constexpr(" ".join(assembly.split()))


# Each makes a word of four elements' codes, or 0 where the scale's inverse is 0. The first takes
# the last byte of each, the second a float32's sign and bits 20 to 26.
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
    inverse, scales = moment_scale(values, 8 if SIGNED else 15)
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
