"""A program's chunk, where its tensors are, and the blocks that it is worked on by."""

from collections import namedtuple

import triton
import triton.language as tl

from cm_fused._backends.triton import layout
from cm_fused._backends.triton.common import CHUNK_SIZE, ROW, at, cell, pointer

# The elements of one program: `count` from `start` of a tensor.
Chunk = namedtuple("Chunk", "row_ptr start count numel")

# Addresses of a chunk's first element; an option's tensor is not touched without it.
Tensors = namedtuple(
    "Tensors",
    "param grad exp_avg exp_avg_sq max_exp_avg_sq compensation master_remainder exp_avg_scales "
    "exp_avg_sq_scales",
)

# The elements worked on at a time: BLOCK from `begin` of a chunk with `count` elements.
Block = namedtuple("Block", "begin count offsets mask")


@triton.jit
def chunk_of(table_ptr, chunks_ptr):
    """Return this program's chunk."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(chunks_ptr + 2 * program).to(tl.int64) * ROW
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK_SIZE
    numel = cell(row_ptr, "numel")
    return Chunk(row_ptr, start, tl.minimum(numel - start, CHUNK_SIZE).to(tl.int32), numel)


@triton.jit
def tensors_of(chunk, V: tl.constexpr):
    """Return the addresses of a chunk's tensors, except the buffer's."""
    row_ptr = chunk.row_ptr
    start = chunk.start
    scale = start // layout.SCALE_BLOCK
    return Tensors(
        at(pointer(row_ptr, "param", V.PARAM_DTYPE), start, V.FULL),
        at(pointer(row_ptr, "grad", V.GRAD_DTYPE), start, V.FULL),
        at(pointer(row_ptr, "exp_avg", V.MOMENT_DTYPE), start, V.FULL),
        at(pointer(row_ptr, "exp_avg_sq", V.MOMENT_DTYPE), start, V.FULL),
        at(pointer(row_ptr, "max_exp_avg_sq", V.STATE_DTYPE), start, V.FULL),
        at(pointer(row_ptr, "compensation", V.PARAM_DTYPE), start, V.FULL),
        at(pointer(row_ptr, "master_remainder", tl.int16), start, V.FULL),
        pointer(row_ptr, "exp_avg_scales", tl.float32) + scale,
        pointer(row_ptr, "exp_avg_sq_scales", tl.float32) + scale,
    )


@triton.jit
def block_at(begin, count, V: tl.constexpr):
    """Return the block from `begin` on of a chunk with `count` elements."""
    offsets = begin + layout.block_offsets(V.SHAPE)
    mask = tl.full(V.SHAPE, 1, dtype=tl.int1) if V.FULL else offsets < count
    return Block(begin, count, offsets, mask)
