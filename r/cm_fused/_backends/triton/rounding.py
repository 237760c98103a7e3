"""How the Triton kernels read and round state of low precision: `cm_fused.rounding`, bit by bit.

8-bit floats are handled as bytes, since not every GPU converts them.
"""

from collections import namedtuple

import triton
import triton.language as tl

from cm_fused.philox import ROUNDS as _ROUNDS
from cm_fused.philox import Stream
from cm_fused.rounding import BLOCK_SIZE as _SCALE_BLOCK

SCALE_BLOCK = tl.constexpr(_SCALE_BLOCK)
ROUNDS = tl.constexpr(_ROUNDS)
MOMENTS_STREAM = tl.constexpr(int(Stream.MOMENTS))
PARAM_STREAM = tl.constexpr(int(Stream.PARAM))
_INFINITY_BITS = tl.constexpr(0x7F800000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# The bits of 2^-14 and 2^-6, and of 1.5 * 2^23 and 2^14, by whose sum a number is rounded to an
# integer or to a multiple of 2^-9 in its last bits.
_SMALLEST_HALF = tl.constexpr(0x38800000)
_SMALLEST_FLOAT8 = tl.constexpr(0x3C800000)
_INTEGER_BITS = tl.constexpr(0x4B400000)
_SUBNORMAL_BITS = tl.constexpr(0x46800000)


@triton.constexpr_function
def has_scales(dtype):
    """Return whether state of a dtype has scales; 8-bit floats come as uint8."""
    return dtype in (tl.int8, tl.uint8)


# What a tensor's random bits are drawn from; the last three are `cm_fused.philox.ShardLayout`'s.
Counters = namedtuple("Counters", "seed param_index step offset length stride")


@triton.jit
def _philox(counters, quads, STREAM: tl.constexpr):
    """Return the random bits of each four elements, four uint32."""
    zeros = tl.zeros_like(quads)
    return tl.philox(
        counters.seed,
        quads.to(tl.uint32),
        ((quads >> 32) | (STREAM << 31)).to(tl.uint32),
        (zeros + counters.param_index).to(tl.uint32),
        (zeros + counters.step).to(tl.uint32),
        ROUNDS,
    )


@triton.jit
def random_bits(counters, first, STREAM: tl.constexpr, BY_FOURS: tl.constexpr, BLOCK: tl.constexpr):
    """Return 32 random bits for each of the elements from `first`, uint32 (BLOCK,).

    BY_FOURS: each four consecutive elements are also four of the whole parameter's; else every
    element takes its bits from a counter of its own.
    """
    if BY_FOURS:
        quads = (counters.offset + first) // 4 + tl.arange(0, BLOCK // 4)
        bits0, bits1, bits2, bits3 = _philox(counters, quads, STREAM)
        bits = tl.join(tl.join(bits0, bits2), tl.join(bits1, bits3))
        return tl.reshape(bits, (BLOCK,))
    else:
        elements = first + tl.arange(0, BLOCK)
        skipped = elements // counters.length * (counters.stride - counters.length)
        positions = counters.offset + elements + skipped
        bits0, bits1, bits2, bits3 = _philox(counters, positions // 4, STREAM)
        even = tl.where(positions % 4 == 0, bits0, bits2)
        odd = tl.where(positions % 4 == 1, bits1, bits3)
        return tl.where(positions % 2 == 0, even, odd)


@triton.jit
def round_to_bfloat16(value, bits):
    """Round float32 to one of bfloat16's two neighbours; `bits` uint32 in [0, 2^16)."""
    raw = value.to(tl.uint32, bitcast=True)
    raw += tl.where(value == value, bits, tl.zeros_like(bits))
    return (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_float16(value, bits):
    """Round float32 to one of float16's two neighbours; `bits` uint32 in [0, 2^16)."""
    raw = value.to(tl.int32, bitcast=True)
    magnitude = raw & _MAGNITUDE_BITS
    finite = magnitude < _INFINITY_BITS
    exponent = tl.maximum(magnitude & _INFINITY_BITS, tl.zeros_like(raw) + _SMALLEST_HALF)
    spacing = exponent.to(tl.float32, bitcast=True) * (2.0**-10)
    scaled = tl.div_rn(magnitude.to(tl.float32, bitcast=True), spacing)  # exact
    lower = tl.where(finite, scaled, 0.0).to(tl.int32).to(tl.float32)
    up = (scaled - lower) * 65536.0 > bits.to(tl.int32).to(tl.float32)
    rounded = (lower + tl.where(up, 1.0, 0.0)) * spacing
    rounded = tl.where(raw < 0, -rounded, rounded)
    return tl.where(finite, rounded, value).to(tl.float16)


@triton.jit
def block_scale(values, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Return what each SCALE_BLOCK of values is multiplied by, and restored by.

    The order of magnitudes is that of their bits, in which NaN is above infinity.
    """
    bits = values.to(tl.int32, bitcast=True) & _MAGNITUDE_BITS
    largest_bits = tl.max(tl.reshape(bits, (BLOCK // SCALE_BLOCK, SCALE_BLOCK)), 1)
    largest = largest_bits.to(tl.float32, bitcast=True)
    usable = (largest >= 2.0**-100) & (largest_bits < _INFINITY_BITS)
    highest = tl.full((BLOCK // SCALE_BLOCK,), LARGEST, tl.float32)
    inverse = tl.where(usable, tl.div_rn(highest, tl.where(usable, largest, 1.0)), 0.0)
    return inverse, tl.div_rn(largest, highest)


@triton.jit
def per_element(scales, BLOCK: tl.constexpr):
    """Return each element's scale, (BLOCK,), of a block's scales."""
    columns = tl.broadcast_to(scales[:, None], (BLOCK // SCALE_BLOCK, SCALE_BLOCK))
    return tl.reshape(columns, (BLOCK,))


@triton.jit
def load_scales(scales_ptr, begin, count, BLOCK: tl.constexpr):
    """Load the scales of the elements [begin, begin + BLOCK) of a chunk with `count` elements."""
    blocks = begin // SCALE_BLOCK + tl.arange(0, BLOCK // SCALE_BLOCK)
    return tl.load(scales_ptr + blocks, mask=blocks * SCALE_BLOCK < count, other=0.0)


@triton.jit
def store_scales(scales_ptr, begin, count, scales, mask, BLOCK: tl.constexpr):
    """Store the scales of the elements [begin, begin + BLOCK) where `mask`, a scalar, is not 0."""
    # Other threads have read the old ones by then.
    tl.debug_barrier()
    blocks = begin // SCALE_BLOCK + tl.arange(0, BLOCK // SCALE_BLOCK)
    wanted = tl.full((BLOCK // SCALE_BLOCK,), mask, tl.int32) != 0
    tl.store(scales_ptr + blocks, scales, mask=wanted & (blocks * SCALE_BLOCK < count))


@triton.jit
def _to_float8(value):
    """Return the byte of a float32 value of at most 448, rounded to nearest even."""
    raw = value.to(tl.int32, bitcast=True)
    magnitude = raw & _MAGNITUDE_BITS
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    sum_bits = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    subnormal = sum_bits - _SUBNORMAL_BITS
    byte = tl.where(magnitude >= _SMALLEST_FLOAT8, normal, subnormal)
    return tl.where(raw < 0, byte + 128, byte).to(tl.uint8)


@triton.jit
def _from_float8(byte):
    """Return the float32 value of an 8-bit float's byte."""
    wide = byte.to(tl.int32)
    magnitude = wide & 127
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * (2.0**-9), normal)
    return tl.where(wide >= 128, -value, value)


@triton.jit
def to_slot(values, SLOT_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return values as a slot stores them, and the scales of each SCALE_BLOCK; see `from_slot`."""
    if SLOT_DTYPE == tl.int8:
        inverse, scales = block_scale(values, 127.0, BLOCK)
        inverse = per_element(inverse, BLOCK)
        scaled = tl.where(inverse == 0, 0.0, values * inverse)
        stored = (scaled + 12582912.0).to(tl.int32, bitcast=True) - _INTEGER_BITS
        return stored.to(tl.int8), scales
    elif SLOT_DTYPE == tl.uint8:
        inverse, scales = block_scale(values, 448.0, BLOCK)
        inverse = per_element(inverse, BLOCK)
        return _to_float8(tl.where(inverse == 0, 0.0, values * inverse)), scales
    else:
        return values.to(SLOT_DTYPE), 0


@triton.jit
def from_slot(stored, scales, STATE_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the values of a slot; `scales` are used by the dtypes that have them."""
    if stored.dtype == tl.int8:
        return stored.to(tl.float32) * per_element(scales, BLOCK)
    elif stored.dtype == tl.uint8:
        return _from_float8(stored) * per_element(scales, BLOCK)
    else:
        return stored.to(STATE_DTYPE)


@triton.jit
def _magnitude(code, LARGEST_CODE: tl.constexpr):
    # Its inverse is rounded to float32 before the product.
    root = code.to(tl.float32) * tl.div_rn(
        tl.full((), 1.0, tl.float32), tl.full((), LARGEST_CODE, tl.float32)
    )
    square = root * root
    return square * square


@triton.jit
def to_moment(values, bits, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return a moment's int8 codes and the scales of each SCALE_BLOCK.

    `bits` uint32 in [0, 2^16) decide which neighbour a value is rounded to.
    """
    LARGEST_CODE: tl.constexpr = 127 if SIGNED else 255
    inverse, scales = block_scale(values, 1.0, BLOCK)
    inverse = per_element(inverse, BLOCK)
    product = tl.abs(values) * inverse
    scaled = tl.where(inverse == 0, 0.0, tl.where(product < 1.0, product, 1.0))
    found = (tl.sqrt_rn(tl.sqrt_rn(scaled)) * LARGEST_CODE).to(tl.int32)
    lower = tl.minimum(found, LARGEST_CODE - 1)
    below = _magnitude(lower, LARGEST_CODE)
    threshold = bits.to(tl.int32).to(tl.float32) * (_magnitude(lower + 1, LARGEST_CODE) - below)
    code = lower + ((scaled - below) * 65536.0 > threshold).to(tl.int32)
    if SIGNED:
        code = tl.where(values < 0, -code, code)
    else:
        # It is divided by: what is positive stays so.
        code = tl.maximum(code, (scaled > 0).to(tl.int32))
    return code.to(tl.int8), scales


@triton.jit
def from_moment(codes, scales, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the values of a moment's int8 codes."""
    wide = codes.to(tl.int32)
    if SIGNED:
        values = _magnitude(tl.abs(wide), 127) * per_element(scales, BLOCK)
        return tl.where(wide < 0, -values, values)
    else:
        return _magnitude(wide & 255, 255) * per_element(scales, BLOCK)
