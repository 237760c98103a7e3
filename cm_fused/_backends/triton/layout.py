"""How a block of elements lies among threads, and in the memory of state with scales.

Int4, which Triton has no dtype of, goes by a name of its own, and 8-bit floats as bytes, since not
every GPU converts them.
"""

import triton
import triton.language as tl

from cm_fused.rounding import BLOCK_SIZE as _SCALE_BLOCK

INT4 = "int4"
SCALE_BLOCK = tl.constexpr(_SCALE_BLOCK)


# NOTE: [Blocks with scales]
# SCALE_BLOCK elements share a scale, and each is worked on by the 32 lanes of one warp: the largest
# of them is found and their scale spread without shared memory. A block of elements has the shape
# (runs, warps, 32, vector): a lane has `vector` consecutive elements of each run, 16 bytes of
# float32 or one element, and a warp's runs follow each other. With these four dimensions triton
# gives every tensor, whatever its dtype, the layout they name, and lays out nothing anew.
#
# One lane of its warp loads and stores a scale, and the others get it from that lane: no other
# thread accesses it, so that no barrier is needed in between. It is the first lane. Of summed
# slots, whose scales are loaded at once, it is the one with the slot's number.
#
# A lane accesses its four bytes of a run of a full chunk as one int32, and chooses between two such
# words: left alone, the compiler takes bytes apart and joins them again.


@triton.constexpr_function
def has_scales(dtype):
    """Return whether state of a dtype has scales; 8-bit floats come as uint8."""
    return dtype in (tl.int8, tl.uint8, INT4)


@triton.constexpr_function
def is_packed(dtype):
    """Return whether a slot of a dtype has two elements in each number of its memory."""
    return dtype == INT4


@triton.constexpr_function
def memory_dtype(dtype, shape):
    """Return the dtype by which a slot is accessed; see the NOTE."""
    if not has_scales(dtype):
        return dtype
    return tl.int32 if is_of_full_chunk(shape) else tl.uint8


@triton.constexpr_function
def stored_shape(dtype, shape):
    """Return the shape of what slots of a dtype store of a block."""
    if not has_scales(dtype):
        return shape
    return (shape[0] // 2 if is_packed(dtype) else shape[0], *shape[1:3], 1)


@triton.constexpr_function
def is_by_warps(shape):
    return len(shape) == 4


@triton.constexpr_function
def is_of_full_chunk(shape):
    return shape[3] == 4


@triton.jit
def block_offsets(SHAPE: tl.constexpr):
    """Return the place of each element within a block: (BLOCK,), or by warps; see the NOTE."""
    if is_by_warps(SHAPE):
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

    If slots are packed, the second half of a warp's runs is in the upper halves of the bytes that
    have the first half.
    """
    WORDS: tl.constexpr = stored_shape(SLOT_DTYPE, SHAPE)
    run = tl.arange(0, WORDS[0])[:, None, None, None]
    warp = tl.arange(0, WORDS[1])[None, :, None, None]
    lane = tl.arange(0, WORDS[2])[None, None, :, None]
    byte = (run * WORDS[2] + lane) * SHAPE[3]
    # Divided, so that the compiler does not see that the words of two lanes are consecutive: it
    # would give both of them to one thread.
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
