"""How the Triton kernels read and round state of low precision: `cm_fused.rounding`, bit by bit.

8-bit floats are handled as bytes, since not every GPU converts them. Int4, which Triton has no
dtype of, goes by a name of its own.
"""

from collections import namedtuple

import triton
import triton.language as tl

from cm_fused import philox
from cm_fused._backends.triton.common import INTERPRETED as _INTERPRETED
from cm_fused.rounding import BLOCK_SIZE as _SCALE_BLOCK

INT4 = "int4"
INTERPRETED = tl.constexpr(_INTERPRETED)
SCALE_BLOCK = tl.constexpr(_SCALE_BLOCK)
MOMENTS_STREAM = tl.constexpr(int(philox.Stream.MOMENTS))
PARAM_STREAM = tl.constexpr(int(philox.Stream.PARAM))
ROUNDS = tl.constexpr(philox.ROUNDS)
_MULTIPLIER0, _MULTIPLIER1 = map(tl.constexpr, philox.MULTIPLIERS)
_WEYL0, _WEYL1 = map(tl.constexpr, philox.WEYL)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
# The bits of 2^-14 and 2^17; those of a power of two taken from the last are those of its inverse.
_SMALLEST_HALF = tl.constexpr(0x38800000)
_INFINITE_HALF = tl.constexpr(0x48000000)
_INVERSE_BITS = tl.constexpr(254 << 23)
# Those of 2^-100, and the last bits of a float32, which a moment's code has not.
_SMALLEST_SCALED = tl.constexpr(0x0D800000)
_ROUNDED = tl.constexpr(0xFFFFF)
# The bits of 2^-6, and of 1.5 * 2^23 and 2^14, by whose sum a number is rounded to an
# integer or to a multiple of 2^-9 in its last bits.
_SMALLEST_FLOAT8 = tl.constexpr(0x3C800000)
_INTEGER_BITS = tl.constexpr(0x4B400000)
_SUBNORMAL_BITS = tl.constexpr(0x46800000)
# The sign, exponent and mantissa of an 8-bit float, moved to their places in float32.
_FLOAT8_BITS = tl.constexpr(-0x78100000)


# NOTE: [Blocks with scales]
# SCALE_BLOCK elements share a scale, and each is worked on by the 32 lanes of one warp: the largest
# of them is found and their scale spread without shared memory. A block of elements has the shape
# (runs, warps, 32, vector): a lane has `vector` consecutive elements of each run, 16 bytes of
# float32 or one element, and a warp's runs follow each other. With these four dimensions triton
# gives every tensor, whatever its dtype, the layout they name, and lays out nothing anew.
#
# A warp's first lane loads a scale, spreads it, and stores the new one: no other thread accesses
# it, so that no barrier is needed in between.


@triton.constexpr_function
def has_scales(dtype):
    """Return whether state of a dtype has scales; 8-bit floats come as uint8."""
    return dtype in (tl.int8, tl.uint8, INT4)


@triton.constexpr_function
def is_packed(dtype):
    """Return whether a slot of a dtype has two elements in each number of its memory."""
    return dtype == INT4


@triton.constexpr_function
def memory_dtype(dtype):
    """Return the dtype of a slot's memory."""
    return tl.uint8 if dtype == INT4 else dtype


@triton.constexpr_function
def _packed(shape):
    """Return the shape of a block's bytes in a packed slot."""
    return (shape[0] // 2, *shape[1:])


@triton.constexpr_function
def stored_shape(dtype, shape):
    """Return the shape of what slots of a dtype store of a block."""
    return (shape[0] // 2, *shape[1:]) if dtype == INT4 else shape


@triton.constexpr_function
def _is_by_warps(shape):
    return len(shape) == 4


@triton.constexpr_function
def _is_of_full_chunk(shape):
    return shape[3] == 4


@triton.constexpr_function
def _fours(shape):
    """Return the shape of a block's groups of four elements."""
    *outer, lanes, vector = shape
    return (*outer, lanes * vector // 4)


@triton.constexpr_function
def _scales(shape):
    """Return the shape in which a block's scales are loaded and stored, one for each lane."""
    return (1, shape[1], shape[2], 1)


@triton.jit
def block_offsets(SHAPE: tl.constexpr):
    """Return the place of each element within a block: (BLOCK,), or by warps; see the NOTE."""
    if _is_by_warps(SHAPE):
        run = tl.arange(0, SHAPE[0])[:, None, None, None]
        warp = tl.arange(0, SHAPE[1])[None, :, None, None]
        lane = tl.arange(0, SHAPE[2])[None, None, :, None]
        within = tl.arange(0, SHAPE[3])[None, None, None, :]
        return warp * SCALE_BLOCK + (run * SHAPE[2] + lane) * SHAPE[3] + within
    else:
        return tl.arange(0, SHAPE[0])


@triton.jit
def byte_offsets(SHAPE: tl.constexpr):
    """Return the place of each byte of a packed slot within a block, and of its first element.

    The second half of a warp's runs is in the upper halves of the bytes that the first half is in.
    """
    run = tl.arange(0, SHAPE[0] // 2)[:, None, None, None]
    warp = tl.arange(0, SHAPE[1])[None, :, None, None]
    lane = tl.arange(0, SHAPE[2])[None, None, :, None]
    within = tl.arange(0, SHAPE[3])[None, None, None, :]
    byte = (run * SHAPE[2] + lane) * SHAPE[3] + within
    return warp * (SCALE_BLOCK // 2) + byte, warp * SCALE_BLOCK + byte


@triton.jit
def slot_size(numel, SLOT_DTYPE: tl.constexpr):
    """Return how many numbers a slot has in memory."""
    if is_packed(SLOT_DTYPE):
        half = SCALE_BLOCK // 2
        return numel // SCALE_BLOCK * half + tl.minimum(numel % SCALE_BLOCK, half)
    else:
        return numel


@triton.jit
def _four_offsets(SHAPE: tl.constexpr):
    """Return the place of each four elements of a block, counted in fours."""
    if _is_by_warps(SHAPE):
        FOURS: tl.constexpr = _fours(SHAPE)
        run = tl.arange(0, FOURS[0])[:, None, None]
        warp = tl.arange(0, FOURS[1])[None, :, None]
        return warp * (SCALE_BLOCK // 4) + run * FOURS[2] + tl.arange(0, FOURS[2])[None, None, :]
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
def _philox(counters, quads, STREAM: tl.constexpr):
    """Return the random bits of each four elements, four uint32."""
    zeros = tl.zeros_like(quads)
    c0, c1 = quads.to(tl.uint32), ((quads >> 32) | (STREAM << 31)).to(tl.uint32)
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
def random_bits(counters, first, STREAM: tl.constexpr, BY_FOURS: tl.constexpr, SHAPE: tl.constexpr):
    """Return 32 random bits for each of a block's elements from `first`, uint32.

    BY_FOURS: each four consecutive elements are also four of the whole parameter's; else every
    element takes its bits from a counter of its own.
    """
    if BY_FOURS:
        quads = (counters.offset + first) // 4 + _four_offsets(SHAPE)
        bits0, bits1, bits2, bits3 = _philox(counters, quads, STREAM)
        bits = tl.join(tl.join(bits0, bits2), tl.join(bits1, bits3))
        return tl.reshape(bits, SHAPE)
    else:
        elements = first + block_offsets(SHAPE)
        skipped = elements // counters.length * (counters.stride - counters.length)
        positions = counters.offset + elements + skipped
        bits0, bits1, bits2, bits3 = _philox(counters, positions // 4, STREAM)
        even = tl.where(positions % 4 == 0, bits0, bits2)
        odd = tl.where(positions % 4 == 1, bits1, bits3)
        return tl.where(positions % 2 == 0, even, odd)


@triton.jit
def load_param(
    param_ptr, remainder_ptr, offsets, mask, SPLIT: tl.constexpr, STATE_DTYPE: tl.constexpr
):
    """Return parameters as a step computes with them: their masters where they are SPLIT."""
    param = tl.load(param_ptr + offsets, mask=mask, other=0.0)
    if SPLIT:
        remainder = tl.load(remainder_ptr + offsets, mask=mask, other=0)
        bits = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
        values = bits.to(tl.float32, bitcast=True)
        master = (bits + remainder.to(tl.int32)).to(tl.float32, bitcast=True)
        return tl.where(master == master, master, values)
    else:
        return param.to(STATE_DTYPE)


@triton.jit
def split_master(master):
    """Return float32 masters rounded to bfloat16, and the last 16 bits of each, int16."""
    bits = master.to(tl.int32, bitcast=True)
    bits = tl.where(master == master, bits, tl.zeros_like(bits) + _NAN_BITS)
    rounded = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded, bits.to(tl.int16)


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
    exponent = tl.maximum(magnitude & _INFINITY_BITS, tl.zeros_like(raw) + _SMALLEST_HALF)
    # From 2^17 on everything is infinite, whatever the spacing.
    exponent = tl.minimum(exponent, _INFINITE_HALF)
    spacing = exponent.to(tl.float32, bitcast=True) * (2.0**-10)
    inverse = (tl.zeros_like(raw) + _INVERSE_BITS - exponent).to(tl.float32, bitcast=True)
    scaled = magnitude.to(tl.float32, bitcast=True) * inverse * 2.0**10  # exact
    lower = tl.floor(scaled)
    up = (scaled - lower) * 65536.0 > bits.to(tl.int32).to(tl.float32)
    # Infinity and NaN stay what they are.
    rounded = (lower + tl.where(up, 1.0, 0.0)) * spacing
    return tl.where(raw < 0, -rounded, rounded).to(tl.float16)


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
def _block_scale(values, LARGEST: tl.constexpr):
    """Return what each warp's values are multiplied by, and restored by; see the NOTE above."""
    largest_bits = _largest_bits(values)
    largest = largest_bits.to(tl.float32, bitcast=True)
    usable = (largest >= 2.0**-100) & (largest_bits < _INFINITY_BITS)
    highest = tl.full(largest.shape, LARGEST, tl.float32)
    inverse = tl.where(usable, tl.div_rn(highest, tl.where(usable, largest, 1.0)), 0.0)
    return inverse, tl.div_rn(largest, highest)


@triton.jit
def _scale_offsets(begin, SHAPE: tl.constexpr):
    """Return an element whose scale each lane uses, and whether it is the one to access it."""
    SCALES: tl.constexpr = _scales(SHAPE)
    # By the element, which hides that a warp's scale follows that of another: lanes would be laid
    # out along them.
    warp = tl.arange(0, SCALES[1])[None, :, None, None] * SCALE_BLOCK
    lane = tl.arange(0, SCALES[2])[None, None, :, None]
    first_element = begin + warp + 0 * lane
    return first_element, lane + 0 * warp == 0


@triton.jit
def _are_wanted(elements, block, wanted, SHAPE: tl.constexpr):
    """Return the mask of scales that are wanted and those of elements of the chunk."""
    mask = tl.full(_scales(SHAPE), wanted, tl.int32) != 0
    return mask if _is_of_full_chunk(SHAPE) else mask & (elements < block.count)


@triton.jit
def load_scales(scales_ptr, block, wanted, other, SHAPE: tl.constexpr):
    """Load the scales of a block of a chunk, or return `other` where `wanted`, a scalar, is 0."""
    elements, is_first = _scale_offsets(block.begin, SHAPE)
    mask = is_first & _are_wanted(elements, block, wanted, SHAPE)
    loaded = tl.load(scales_ptr + elements // SCALE_BLOCK, mask=mask, other=0.0)
    # The other lanes have 0. Integers are reduced by one instruction.
    bits = tl.max(loaded.to(tl.uint32, bitcast=True), 2, keep_dims=True)
    scales = bits.to(tl.float32, bitcast=True)
    return tl.where(tl.full(scales.shape, wanted, tl.int32) != 0, scales, other)


@triton.jit
def store_scales(scales_ptr, block, scales, wanted, SHAPE: tl.constexpr):
    """Store the scales of a block where `wanted`, a scalar, is not 0; see the NOTE above."""
    elements, is_first = _scale_offsets(block.begin, SHAPE)
    mask = is_first & _are_wanted(elements, block, wanted, SHAPE)
    scales = tl.broadcast_to(scales, _scales(SHAPE))
    tl.store(scales_ptr + elements // SCALE_BLOCK, scales, mask=mask)


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
    # A float32 with its bits is 2^-120 times it, subnormal numbers included.
    bits = (byte.to(tl.int8, bitcast=True).to(tl.int32) << 20) & _FLOAT8_BITS
    return bits.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def _pack(codes, SHAPE: tl.constexpr):
    """Return a block of int32 codes as bytes, two elements in each.

    Runs are picked out by sums over all of them, which a thread has: to reshape them would lay them
    out anew.
    """
    RUNS: tl.constexpr = SHAPE[0] // 2
    run = tl.arange(0, 2 * RUNS)[:, None, None, None]
    halves = (codes & 15) << (run // RUNS * 4)
    if RUNS == 1:
        stored = tl.sum(halves, 0, keep_dims=True)
    else:
        packed_run = tl.arange(0, RUNS)[:, None, None, None]
        stored = tl.zeros(_packed(SHAPE), tl.int32)
        for i in tl.static_range(RUNS):
            both = tl.sum(tl.where(run % RUNS == i, halves, 0), 0, keep_dims=True)
            stored = tl.where(packed_run == i, both, stored)
    return stored.to(tl.uint8)


@triton.jit
def _unpack(stored, SHAPE: tl.constexpr):
    """Return 16 times the codes of a block of bytes, float32."""
    RUNS: tl.constexpr = SHAPE[0] // 2
    run = tl.arange(0, 2 * RUNS)[:, None, None, None]
    if RUNS == 1:
        halves = tl.broadcast_to(stored, SHAPE)
    else:
        packed_run = tl.arange(0, RUNS)[:, None, None, None]
        halves = tl.zeros(SHAPE, tl.uint8)
        for i in tl.static_range(RUNS):
            both = tl.sum(tl.where(packed_run == i, stored.to(tl.int32), 0), 0, keep_dims=True)
            halves = tl.where(run % RUNS == i, both.to(tl.uint8), halves)
    # In the upper half of a byte a code has its sign: one instruction converts it.
    upper = (halves << ((1 - run // RUNS) * 4).to(tl.uint8)) & 0xF0
    return upper.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def to_slot(values, SLOT_DTYPE: tl.constexpr):
    """Return values as a slot stores them, and the scales of each warp; see `from_slot`."""
    if SLOT_DTYPE == tl.int8:
        inverse, scales = _block_scale(values, 127.0)
        scaled = tl.where(inverse == 0, 0.0, values * inverse)
        stored = (scaled + 12582912.0).to(tl.int32, bitcast=True) - _INTEGER_BITS
        return stored.to(tl.int8), scales
    elif is_packed(SLOT_DTYPE):
        inverse, scales = _block_scale(values, 7.0)
        scaled = tl.where(inverse == 0, 0.0, values * inverse)
        return _pack((scaled + 12582912.0).to(tl.int32, bitcast=True), values.shape), scales
    elif SLOT_DTYPE == tl.uint8:
        inverse, scales = _block_scale(values, 448.0)
        return _to_float8(tl.where(inverse == 0, 0.0, values * inverse)), scales
    else:
        return values.to(SLOT_DTYPE), 0


@triton.jit
def from_slot(
    stored, scales, SLOT_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, SHAPE: tl.constexpr
):
    """Return the values of a slot; `scales` are used by the dtypes that have them."""
    if is_packed(SLOT_DTYPE):
        # Exact, as a scale of what is not 0 is 2^-103 or more.
        return _unpack(stored, SHAPE) * (scales * 0.0625)
    elif stored.dtype == tl.int8:
        return stored.to(tl.float32) * scales
    elif stored.dtype == tl.uint8:
        return _from_float8(stored) * scales
    else:
        return stored.to(STATE_DTYPE)


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


@triton.jit
def to_moment(values, bits, SIGNED: tl.constexpr):
    """Return a moment's int8 codes and the scales of each warp; `bits` uint32 in [0, 2^20)."""
    inverse, scales = _moment_scale(values, 8 if SIGNED else 15)
    scaled = tl.where(inverse == 0, 0.0, values * inverse)
    # A float32 with a code's exponent, subnormal numbers included.
    subnormal = scaled * (2.0**-120 if SIGNED else 2.0**-112)
    raw = subnormal.to(tl.uint32, bitcast=True) + bits
    if SIGNED:
        code = (raw >> 20 & 0x7F) | (raw >> 24 & 0x80)
    else:
        # It is divided by: what is positive stays so.
        code = tl.maximum(raw >> 20, tl.minimum(scaled.to(tl.uint32, bitcast=True), 1))
    return code.to(tl.uint8).to(tl.int8, bitcast=True), scales


@triton.jit
def from_moment(codes, scales, SIGNED: tl.constexpr):
    """Return the values of a moment's int8 codes."""
    byte = codes.to(tl.uint8, bitcast=True)
    if SIGNED:
        return _from_float8(byte) * scales
    else:
        return (byte.to(tl.int32) << 20).to(tl.float32, bitcast=True) * 2.0**112 * scales
