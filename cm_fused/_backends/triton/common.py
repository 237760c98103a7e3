"""What the Triton kernels share: their sizes, and how they find what a table names.

Hyperparameters are float64 run-time values, rounded once to the state's dtype as in the C++ step.
"""

import hashlib
from pathlib import Path
from typing import Any

import triton
import triton.language as tl

from cm_fused._backends.triton import columns

# Whether kernels run on the CPU, in Python: TRITON_INTERPRET=1 was set.
INTERPRETED = triton.knobs.runtime.interpret
# Elements that a program works on at a time: four, 16 bytes of float32, a thread; where they are
# not aligned or not all there, one a thread. The interpreter's time is by operation: it is given
# half a chunk.
NUM_THREADS = 128
NUM_WARPS = NUM_THREADS // 32
BLOCK_SIZE = 2048 if INTERPRETED else 4 * NUM_THREADS
TAIL_BLOCK_SIZE = 2048 if INTERPRETED else NUM_THREADS
# What every launch is given besides its arguments. A kernel that changes its arguments in place is
# never autotuned: the trials would be steps.
LAUNCH_OPTIONS: dict[str, Any] = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
CHUNK_SIZE = tl.constexpr(columns.CHUNK_SIZE)
REBUILT_CHUNK_SIZE = tl.constexpr(columns.REBUILT_CHUNK_SIZE)
FULL_BLOCK = tl.constexpr(BLOCK_SIZE)
TAIL_BLOCK = tl.constexpr(TAIL_BLOCK_SIZE)
THREADS = tl.constexpr(NUM_THREADS)
_COLUMNS = columns.COLUMNS
ROW = tl.constexpr(columns.WIDTH)
# Triton keeps compiled kernels on disk, by the sources of what they call and the constants that
# they name. It does not see what `Variant` and the columns of tables are made from.
_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
SOURCE = tl.constexpr(
    hashlib.sha256(str(_COLUMNS).encode() + b"".join(map(Path.read_bytes, _SOURCES))).hexdigest()
)


# One variant for all values of the options. A later dtype's chunks start anywhere in the lists of
# all: none for each alignment either.
entry = triton.jit(
    do_not_specialize=("capacity", "mean_over_capacity", "seed", "sq_norm_stride"),
    do_not_specialize_on_alignment=("chunks_ptr", "chunk_sq_norms_ptr", "sq_norm_ptr"),
)


@triton.jit
def double(x):
    """Return a number as a float64 scalar; the interpreter passes floats as Python's."""
    return tl.full((), x, tl.float64)


@triton.jit
def spread(x, SHAPE: tl.constexpr):
    """Return a block of a scalar.

    For comparisons: the interpreter cannot spread the result of one of scalars, as it takes the
    operands' dtype for its own.
    """
    return tl.full(SHAPE, x, x.dtype)


@triton.jit
def signed_factor(sign, grad_factor_ptr):
    """Return what gradients are multiplied by: unscaled and clipped, negated to maximize."""
    factor = double(sign)
    if grad_factor_ptr is not None:
        factor *= tl.load(grad_factor_ptr)
    return factor


@triton.jit
def is_set(flag_ptr):
    """Return whether a flag, float64 on the device or None, is set."""
    if flag_ptr is None:
        return False
    else:
        return tl.load(flag_ptr) != 0.0


@triton.constexpr_function
def _column(name):
    return _COLUMNS[name]


@triton.jit
def cell(row_ptr, NAME: tl.constexpr):
    """Return what a row has in a column of the table."""
    # Every kernel reads a cell, and so names the sources.
    tl.static_assert(SOURCE != "")
    return tl.load(row_ptr + _column(NAME))


@triton.jit
def pointer(row_ptr, NAME: tl.constexpr, DTYPE: tl.constexpr):
    """Return the address in a column of a row."""
    return cell(row_ptr, NAME).to(tl.pointer_type(DTYPE))


@triton.jit
def at(ptr, start, ALIGNED: tl.constexpr):
    """Return ptr + start, promising 16-byte alignment where it is known."""
    if ALIGNED:
        return tl.multiple_of(ptr + start, 16)
    return ptr + start


@triton.jit
def is_aligned(row_ptr):
    """Return whether every tensor of a row starts at 16 bytes, as do its chunks."""
    joined = tl.zeros((), tl.int64)
    for column in tl.static_range(_column("param"), _column("master_remainder") + 1):
        joined |= tl.load(row_ptr + column)
    return joined % 16 == 0


@triton.jit
def empty_sum(DTYPE: tl.constexpr, SHAPE: tl.constexpr):
    """Return a block of what changes nothing it is added to: -0, since 0 + -0 is +0."""
    # Older Tritons make a constant of -0.0 that is +0.
    return tl.full(SHAPE, 0.0, DTYPE) * -1.0


@triton.jit
def effective_gradient(grad, param, factor, l2):
    """Return the gradient the step uses, with the L2 term; see `signed_factor`."""
    g = factor * grad
    # Without weight decay the gradient stays what it is: a parameter that is not finite does not
    # count, and -0 + 0 would be +0, which a buffer of gradients stores.
    return tl.where(l2 != 0, g + l2 * param, g)


@triton.constexpr_function
def _sums_fours(dtype, shape):
    """Return whether each thread has four consecutive float32 elements of a block at a time."""
    return dtype == tl.float32 and shape[-1] % (4 * NUM_THREADS if len(shape) == 1 else 4) == 0


@triton.constexpr_function
def _pairs(shape):
    """Return the shape of a block whose four consecutive elements are two pairs."""
    return (*shape[:-1], shape[-1] // 4, 2, 2)


@triton.jit
def _sum_squares_of_fours(wide, SHAPE: tl.constexpr):
    """Return the sum of the squares of each four elements, by fused multiply-adds."""
    even, odd = tl.split(tl.reshape(wide, _pairs(SHAPE)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    squares = tl.fma(second, second, first * first)
    return tl.fma(fourth, fourth, tl.fma(third, third, squares))


@triton.jit
def sum_squares(g, SHAPE: tl.constexpr):
    """Return one partial sum of g^2 in float64 for each thread of a block."""
    # A float32 gradient's square neither overflows nor underflows. It is exact, so that a fused
    # multiply-add rounds as a product and a sum do.
    wide = g.to(tl.float64)
    # A thread's own elements first: it keeps one partial sum, not one for each.
    squares = _sum_squares_of_fours(wide, SHAPE) if _sums_fours(g.dtype, SHAPE) else wide * wide
    if len(SHAPE) == 4:
        squares = tl.sum(tl.sum(squares, 3), 0)
    return tl.sum(tl.reshape(squares, (THREADS, squares.numel // THREADS)), 1)
