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
from cm_fused.rounding import SCALE_BITS

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
_SIGN_BIT = tl.constexpr(-0x80000000)
# The bits of a power of two taken from these are those of its inverse.
_INVERSE_BITS = tl.constexpr(254 << 23)
_SCALE_BITS = tl.constexpr(SCALE_BITS)
# The upper half of each byte of a word.
_UPPER_HALVES = tl.constexpr(-0x0F0F0F10)
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
def _largest(dtype):
    """Return the largest number a dtype with scales holds."""
    return {tl.int8: 127.0, tl.uint8: 448.0, INT4: 7.0}[dtype]


@triton.constexpr_function
def is_packed(dtype):
    """Return whether a slot of a dtype has two elements in each number of its memory."""
    return dtype == INT4


@triton.constexpr_function
def memory_dtype(dtype, shape):
    """Return the dtype by which a slot is accessed; see NOTE: [Words]."""
    if not has_scales(dtype):
        return dtype
    return tl.int32 if _is_of_full_chunk(shape) else tl.uint8


@triton.constexpr_function
def stored_shape(dtype, shape):
    """Return the shape of what slots of a dtype store of a block."""
    if not has_scales(dtype):
        return shape
    return (shape[0] // 2 if is_packed(dtype) else shape[0], *shape[1:3], 1)


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
def word_offsets(SLOT_DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Return the place of each word of a slot within a block, and of its first element.

    The second half of a warp's runs is, if packed, in the upper halves of the bytes that the first
    half is in.
    """
    WORDS: tl.constexpr = stored_shape(SLOT_DTYPE, SHAPE)
    run = tl.arange(0, WORDS[0])[:, None, None, None]
    warp = tl.arange(0, WORDS[1])[None, :, None, None]
    lane = tl.arange(0, WORDS[2])[None, None, :, None]
    byte = (run * WORDS[2] + lane) * SHAPE[3]
    # By the byte, which hides that a lane's word follows that of another: a thread would be given
    # two that do.
    word = (warp * (WORDS[0] * WORDS[2] * SHAPE[3]) + byte) // SHAPE[3]
    return word, warp * SCALE_BLOCK + byte


@triton.jit
def slot_bytes(numel, SLOT_DTYPE: tl.constexpr):
    """Return how many bytes a slot has."""
    if is_packed(SLOT_DTYPE):
        half = SCALE_BLOCK // 2
        return numel // SCALE_BLOCK * half + tl.minimum(numel % SCALE_BLOCK, half)
    else:
        return numel * (SLOT_DTYPE.primitive_bitwidth // 8)


@triton.jit
def slot_size(numel, SLOT_DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Return how many numbers of its `memory_dtype` a slot has."""
    if has_scales(SLOT_DTYPE):
        return slot_bytes(numel, SLOT_DTYPE) // SHAPE[3]
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
def _bits_of(value):
    """Return the bits, int32, of the result of an operation on float32, to which 16 may be added.

    Of NaN, which CUDA's operations have one of, 0x7FFFFFFF, they are another's: without a carry.
    """
    raw = value.to(tl.int32, bitcast=True)
    return tl.minimum(raw, tl.zeros_like(raw) + _NAN_BITS)


@triton.jit
def round_to_bfloat16(value, bits):
    """Round float32 to one of bfloat16's two neighbours; `bits` uint32 in [0, 2^16)."""
    raw = _bits_of(value).to(tl.uint32, bitcast=True) + bits
    return (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_float16(value, bits):
    """Round float32 to one of float16's two neighbours; `bits` uint32 in [0, 2^16)."""
    magnitude = tl.abs(value)
    # Added to 2^-14, a subnormal number has its last bits where a normal one has.
    offset = tl.where(magnitude < 2.0**-14, 2.0**-14, 0.0)
    carried = _bits_of(magnitude + offset) + (0x1FFF - (bits >> 3).to(tl.int32))
    rounded = (carried & -0x2000).to(tl.float32, bitcast=True) - offset
    sign = value.to(tl.int32, bitcast=True) & _SIGN_BIT
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True).to(tl.float16)


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
    scales = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    scales = (scales.to(tl.int32, bitcast=True) & _SCALE_BITS).to(tl.float32, bitcast=True)
    ones = tl.full(largest.shape, 1.0, tl.float32)
    return tl.where(usable, tl.div_rn(ones, tl.where(usable, scales, ones)), 0.0), scales


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


# NOTE: [Words]
# The four bytes that a lane has of a run of a full chunk are accessed as one int32, and chosen from
# as one: left alone, the compiler takes bytes apart and joins them again.


@triton.jit
def _byte_shifts(SHAPE: tl.constexpr):
    """Return by how many bits each byte of a word is shifted."""
    return (tl.arange(0, SHAPE[3]) * 8)[None, None, None, :]


@triton.jit
def _to_words(bytes, SHAPE: tl.constexpr):
    """Return a block of words of int32 bytes from 0 to 255."""
    if _is_of_full_chunk(SHAPE):
        return tl.sum(bytes << _byte_shifts(SHAPE), 3, keep_dims=True)
    else:
        return bytes.to(tl.uint8)


@triton.jit
def _from_words(words, SHAPE: tl.constexpr):
    """Return the bytes of a block of words, int8."""
    return (words.to(tl.int32) >> _byte_shifts(SHAPE)).to(tl.int8)


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
        packed = tl.zeros((RUNS, SHAPE[1], SHAPE[2], SHAPE[3]), tl.int32)
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
        words = tl.zeros((2 * RUNS, SHAPE[1], SHAPE[2], 1), tl.int32)
        for i in tl.static_range(RUNS):
            first = tl.sum(tl.where(packed_run == i, lower, 0), 0, keep_dims=True)
            second = tl.sum(tl.where(packed_run == i, upper, 0), 0, keep_dims=True)
            words = tl.where(run == i, first, tl.where(run == RUNS + i, second, words))
        return words


@triton.jit
def to_slot(values, SLOT_DTYPE: tl.constexpr):
    """Return values as a slot stores them, and the scales of each warp; see `from_slot`."""
    if has_scales(SLOT_DTYPE):
        inverse, scales = _block_scale(values, _largest(SLOT_DTYPE))
        scaled = tl.where(inverse == 0, 0.0, values * inverse)
        if SLOT_DTYPE == tl.uint8:
            codes = _to_float8(scaled)
        else:
            codes = (scaled + 12582912.0).to(tl.int32, bitcast=True)
            codes = _pack(codes, values.shape) if is_packed(SLOT_DTYPE) else codes & 0xFF
        return _to_words(codes, values.shape), scales
    else:
        return values.to(SLOT_DTYPE), 0


@triton.jit
def _decoded(stored, scales, SLOT_DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Return two factors of the values of a slot with scales, whose product is exact."""
    if is_packed(SLOT_DTYPE):
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
    if has_scales(SLOT_DTYPE):
        codes, scales = _decoded(stored, scales, SLOT_DTYPE, SHAPE)
        return codes * scales
    else:
        return stored.to(STATE_DTYPE)


@triton.jit
def add_slot(
    total, stored, scales, SLOT_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, SHAPE: tl.constexpr
):
    """Return a sum and the values of one more slot, which `from_slot` returns."""
    if has_scales(SLOT_DTYPE):
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


@triton.jit
def to_moment(values, bits, SIGNED: tl.constexpr):
    """Return a moment's int8 codes and the scales of each warp; `bits` uint32 in [0, 2^20)."""
    inverse, scales = _moment_scale(values, 8 if SIGNED else 15)
    scaled = tl.where(inverse == 0, 0.0, values * inverse)
    # A float32 with a code's exponent, subnormal numbers included.
    subnormal = scaled * (2.0**-120 if SIGNED else 2.0**-112)
    raw = subnormal.to(tl.int32, bitcast=True) + bits.to(tl.int32, bitcast=True)
    if SIGNED:
        code = ((raw << 4) & _MAGNITUDE_BITS | raw & _SIGN_BIT) >> 24
    else:
        # It is divided by: what is positive stays so.
        code = tl.maximum(raw >> 20, tl.minimum(scaled.to(tl.int32, bitcast=True), 1))
    return code.to(tl.uint8).to(tl.int8, bitcast=True), scales


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
