"""The definition of every rounding of low-precision state, in plain torch.

Values come as float32, flat in the state's memory order; leading dimensions, such as a buffer's
slots, are kept. int4, int8 and float8_e4m3fn have one float32 scale for each block of `BLOCK_SIZE`
consecutive elements, by which no value of a block is too large. The fused backends give the same
bits.

The codes of int4 are linear and rounded to nearest, which costs least to decode. Li, Chen and Zhu,
"Memory Efficient Optimizers with 4-bit States" (NeurIPS 2023), take blocks of 128 and codes that
are finer near zero for the first moment, which is rounded anew at every step. A slot is rounded
once, is averaged with the others and leaves: no error of it is fed back. Blocks of 128, quadratic
codes and stochastic rounding changed no loss by more than the seed does (bench/NOTES.md).

The int8 form of moments is an 8-bit float beside a power of two that its block has in common: of m
a sign, 4 bits of exponent and 3 of mantissa; of v, which has no sign, one more of exponent. Small
values of a block are kept beside its largest, down to 2^-17 of it in m, and in the root of v, by
which m is divided. Floats were chosen over codes linear in a root of the value, as in Gonzalez
Ortiz, Gupta, Rinard and Blalock, "FlashOptim: Optimizers for Memory-Efficient Training" (arXiv
2602.23349), and over a table of codes, as in Dettmers et al., "8-bit Optimizers via Block-wise
Quantization" (ICLR 2022), since they are made from float32's bits by an addition and a shift.
Rounding is stochastic in the value, since an average that changes by less than half a code would
stand still.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Consecutive elements that share a scale.
BLOCK_SIZE = 256
# torch's stubs lack it.
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
# What slots of int4 are stored as; see NOTE: [Two elements a byte].
PACKED = torch.uint8
# Dtypes of parameters that `low_precision_update` rounds, and of gradients of float32 ones.
HALF_DTYPES = (torch.bfloat16, torch.float16)
# Dtypes with scales, and the largest number they hold.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, PACKED: 7.0}
# A block whose largest value is below is stored as zeros: the inverse of its scale would overflow.
SMALLEST_SCALED = 2.0**-100
# Scales of slots have 16 significant bits and codes at most 7, so that their product is exact: an
# instruction that multiplies and adds gives the bits that a product and a sum give.
SCALE_BITS = -0x100
# The random bits of one rounding to a half dtype (float16 takes the last 13), and of one to a
# moment's code.
RANDOM_BITS = 16
MOMENT_RANDOM_BITS = {torch.bfloat16: RANDOM_BITS, torch.int8: 20}
_HALF_BLOCK = BLOCK_SIZE // 2
_EXPONENT = 0x7F800000
_NAN = 0x7FC00000
_SIGN_BIT = 0x80
_SMALLEST_HALF = 2.0**-14
_MAX_FINITE = float(torch.finfo(torch.float32).max)


def num_blocks(numel: int) -> int:
    """Return the number of scales of a tensor."""
    return -(-numel // BLOCK_SIZE)


# NOTE: [Two elements a byte]
# A slot of int4 is a row of bytes, whatever the parameter's shape. The element i of a block, in
# memory order, is in the block's byte i % 128: in the lower four bits for i < 128, else in the
# upper four, as two's complement from -7 to 7. A last block of fewer than 128 elements has as many
# bytes. So elements that are side by side in memory are decoded alike: a thread of a GPU has four
# elements from each half, which are the halves of the same four bytes, and a vector of a CPU's has
# one half of as many consecutive bytes.


def stored_numel(numel: int, dtype: torch.dtype) -> int:
    """Return how many numbers of a dtype store a slot: fewer than the elements, if packed."""
    if dtype is not PACKED:
        return numel
    return numel // BLOCK_SIZE * _HALF_BLOCK + min(numel % BLOCK_SIZE, _HALF_BLOCK)


def _pack(blocks: Tensor, numel: int) -> Tensor:
    """Return the bytes, (..., stored_numel), of codes by blocks."""
    codes = blocks.to(torch.uint8)
    lower, upper = codes[..., :_HALF_BLOCK], codes[..., _HALF_BLOCK:]
    return _unblocked(lower & 15 | upper << 4, stored_numel(numel, PACKED))


def unpack(stored: Tensor, numel: int) -> Tensor:
    """Return the codes of a packed slot, int8 (..., numel); any other slot as it is."""
    if stored.dtype is not PACKED:
        return stored
    size = num_blocks(numel) * _HALF_BLOCK
    padded = torch.nn.functional.pad(stored, (0, size - stored.shape[-1]))
    halves = padded.reshape(*stored.shape[:-1], -1, 1, _HALF_BLOCK).view(torch.int8)
    # Shifted to the upper half and back, a code keeps its sign.
    codes = torch.cat([halves << 4 >> 4, halves >> 4], dim=-2)
    return codes.flatten(-3)[..., :numel]


def as_flat(tensor: Tensor, leading: int = 0) -> Tensor:
    """Return a view of dense state in memory order, its first `leading` dimensions kept.

    Those must be as a buffer's slots: one after the other.
    """
    shape = tensor.shape[:leading]
    numel = tensor.shape[leading:].numel()
    strides = [numel] if leading else []
    return tensor.as_strided((*shape, numel), (*strides, 1))


def flat_as(values: Tensor, order: Tensor) -> Tensor:
    """Return values in the memory order of a dense tensor of their shape."""
    laid_out = torch.empty_like(order, dtype=values.dtype, memory_format=torch.preserve_format)
    return as_flat(laid_out.copy_(values))


def shaped_as(flat: Tensor, order: Tensor) -> Tensor:
    """Return a view of flat values with the shape and strides of a dense tensor."""
    return flat.as_strided(order.shape, order.stride())


# NOTE: [Quantizing again]
# A block's largest value L has the scale s, the first 16 bits of L / n, where n is 127, 7, or 448,
# which is 7 * 64. It is restored as L' = n s, exactly, and L' / n is s again. A moment's scale is a
# power of two, by which nothing is rounded; a block whose largest value has been rounded down to
# the next scale's range has codes there for all of its values. So a state that was saved as values
# is loaded with the values it had, if its blocks are the same.


def quantize(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return values as a slot stores them, rounded to nearest even, and their scales.

    Args:
        values: float32 (..., numel).
        dtype: bfloat16, float16, float8_e4m3fn, int8, `PACKED`, or float32 and float64, which store
            all.

    Returns:
        The stored values, (..., stored_numel), and their scales, float32 (..., num_blocks) or None.
        A block with a value that is not finite is restored as NaN. Values that `dequantize` gave
        are stored as they were: see the NOTE above.
    """
    if dtype not in LARGEST:
        return values.to(dtype), None
    blocks = _blocks(values)
    inverse, scales = _block_scale(blocks, LARGEST[dtype])
    # Without a usable scale also what is not finite is stored as 0, and what is negative not as -0.
    scaled = torch.where(inverse == 0, 0.0, blocks * inverse)
    scales = scales.squeeze(-1)
    if dtype is PACKED:
        return _pack(scaled.round().to(torch.int8), values.shape[-1]), scales
    if dtype is torch.int8:
        scaled = scaled.round()
    return _unblocked(scaled.to(dtype), values.shape[-1]), scales


def dequantize(stored: Tensor, scales: Tensor | None) -> Tensor:
    """Return the values of an unpacked slot: itself for the dtypes of the update, else float32."""
    if stored.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return stored
    values = stored.to(torch.float32)
    return values if scales is None else values * _per_element(scales, values.shape[-1])


def param_bits(words: Tensor) -> Tensor:
    """Return the bits that round parameters, of the words that round the moments.

    They are the exclusive or of a word's halves, and independent of each half. A bfloat16 moment is
    rounded by one half. An int8 moment takes four bits of the other one too, by which the
    parameter's bits depend on it, in the last places of one or the other.

    Args:
        words: int64, any shape, with values in [0, 2^32).

    Returns:
        int64 of that shape, with values in [0, 2^16).
    """
    bits: Tensor = (words >> RANDOM_BITS) ^ (words & (2**RANDOM_BITS - 1))
    return bits


def round_stochastically(values: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Return float32 values rounded to one of a half dtype's two neighbours, as float32.

    A value goes up with the probability of its distance from the lower neighbour, in spacings: to
    2^-14 where it is subnormal in float16, else exactly.

    Args:
        values: float32, any shape. Values that are not finite stay.
        dtype: bfloat16 or float16.
        bits: int64 of that shape, with values in [0, 2^16).
    """
    raw = values.view(torch.int32)
    if dtype is torch.bfloat16:
        rounded = (raw + bits.to(torch.int32)) & -0x10000
        return torch.where(values.isfinite(), rounded.view(torch.float32), values)
    # Added to 2^-14, a subnormal number has its last bits where a normal one has.
    offset = torch.where(values.abs() < _SMALLEST_HALF, _SMALLEST_HALF, 0.0)
    carried = (values.abs() + offset).view(torch.int32) + (bits.to(torch.int32) & 0x1FFF)
    rounded = torch.copysign((carried & -0x2000).view(torch.float32) - offset, values)
    return torch.where(values.isfinite(), rounded, values)


def join_master(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 masters that `split_master` split.

    Args:
        param: bfloat16, any shape.
        remainder: int16 of that shape. Of a parameter that was set since, the master is within half
            a unit of the parameter's last place, and the parameter itself where it would be NaN.
    """
    values = param.to(torch.float32)
    master = (values.view(torch.int32) + remainder.to(torch.int32)).view(torch.float32)
    return torch.where(master.isnan(), values, master)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 masters rounded to bfloat16, and the last 16 bits of each.

    Rounding is to nearest, ties away from 0: after ties to even, those bits would not tell whether
    a tie went up or down. All NaNs become one, whose last bits are 0.

    Args:
        master: float32, any shape.

    Returns:
        bfloat16 and int16 of that shape.
    """
    bits = torch.where(master.isnan(), _NAN, master.view(torch.int32))
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


class _Float8(NamedTuple):
    """The 8-bit floats of an int8 moment: subnormal numbers are among them, all are finite."""

    bias: int  # of the exponent
    top: int  # the largest exponent: numbers are below 2^(top + 1)

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all bits of the mantissa."""
        return 2.0 ** (1 - self.bias)

    @property
    def first_bits(self) -> int:
        """The bits of the float32 whose exponent is this one's 0."""
        return (127 - self.bias) << 23


# By whether there is a sign: float8_e4m3fn with numbers for its NaN, and the bits of a float16 from
# its exponent on, so that both are read as float16.
MOMENT_FLOAT = {True: _Float8(bias=7, top=8), False: _Float8(bias=15, top=15)}
# The last bits of a float32, which its code has not.
_ROUNDED_BITS = 20


def _moment_scale(blocks: Tensor, form: _Float8) -> tuple[Tensor, Tensor]:
    """Return what blocks are multiplied by and restored by: powers of two, each other's inverse.

    The first is 0 where a block's largest value is too small or not finite.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    raw = largest.view(torch.int32).clamp(max=_EXPONENT)
    # The next power of two where the largest value is above the largest number with its own.
    power = (raw + (2**_ROUNDED_BITS - 1)) & _EXPONENT
    usable = (largest >= SMALLEST_SCALED) & (power < _EXPONENT)
    inverse = torch.where(usable, (254 << 23) - power + (form.top << 23), 0)
    scale = torch.where(usable, power - (form.top << 23), power)
    return inverse.view(torch.float32), scale.view(torch.float32)


def quantize_moment(values: Tensor, bits: Tensor | None, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return a moment's codes and scales.

    A block with a value that is not finite, or above 1.875 * 2^127, is restored as NaN.

    Args:
        values: float32 (numel,); >= 0 without a sign.
        bits: int64 (numel,) with values in [0, 2^20), for stochastic rounding; None rounds to
            nearest.
        signed: Whether the codes have a sign.

    Returns:
        int8 (numel,), the bits of an 8-bit float, and scales, float32 (num_blocks,). A positive
        value without a sign is never stored as 0: it is divided by.
    """
    form = MOMENT_FLOAT[signed]
    blocks = _blocks(values)
    inverse, scale = _moment_scale(blocks, form)
    # Without a usable scale also what is not finite is stored as 0.
    scaled = torch.where(inverse == 0, 0.0, blocks * inverse)
    magnitude = scaled.abs()
    # The bits of a float32 with this exponent. A number below the smallest normal one is added to
    # it: the last bits of the sum are those of a subnormal number.
    is_normal = magnitude >= form.smallest_normal
    wide = torch.where(is_normal, magnitude, magnitude + form.smallest_normal).view(torch.int32)
    wide = wide - torch.where(is_normal, form.first_bits, form.first_bits + (1 << 23))
    random = 2 ** (_ROUNDED_BITS - 1) if bits is None else _blocks(bits.to(torch.int32))
    codes = (wide + random) >> _ROUNDED_BITS
    if signed:
        codes = codes | torch.where(scaled.signbit(), _SIGN_BIT, 0)
    else:
        codes = torch.where((codes == 0) & (scaled > 0), 1, codes)
    stored = codes.to(torch.uint8).view(torch.int8)
    return _unblocked(stored, values.shape[-1]), scale.squeeze(-1)


def dequantize_moment(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Return the values of a moment's codes, float32 (numel,); see `quantize_moment`."""
    wide = codes.view(torch.uint8).to(torch.int16)
    half = (wide & ~_SIGN_BIT) << 7 | (wide & _SIGN_BIT) << 8 if signed else wide << 7
    values = half.view(torch.float16).to(torch.float32) * 2.0 ** (15 - MOMENT_FLOAT[signed].bias)
    return values * _per_element(scales, values.shape[-1])


def _blocks(values: Tensor) -> Tensor:
    """Return values by blocks, (..., num_blocks, BLOCK_SIZE), the last one filled with zeros."""
    missing = -values.shape[-1] % BLOCK_SIZE
    padded = torch.nn.functional.pad(values, (0, missing))
    return padded.reshape(*values.shape[:-1], num_blocks(values.shape[-1]), BLOCK_SIZE)


def _unblocked(blocks: Tensor, numel: int) -> Tensor:
    return blocks.flatten(-2)[..., :numel]


def _per_element(scales: Tensor, numel: int) -> Tensor:
    return scales.repeat_interleave(BLOCK_SIZE, dim=-1)[..., :numel]


def _block_scale(blocks: Tensor, largest_stored: float) -> tuple[Tensor, Tensor]:
    """Return what blocks are multiplied by, and restored by.

    The first is 0 where a block's largest value is too small or not finite. Such a block is stored
    as 0. Its largest value is its scale, so that it is restored as 0, or as NaN where that value is
    not finite.
    """
    largest = blocks.abs().amax(-1, keepdim=True)
    usable = (largest >= SMALLEST_SCALED) & (largest <= _MAX_FINITE)
    # Divided by a number, CUDA's tensors are multiplied by its reciprocal: rounded twice.
    scales = largest / torch.full_like(largest, largest_stored)
    scales = (scales.view(torch.int32) & SCALE_BITS).view(torch.float32)
    inverse = torch.where(usable, torch.ones_like(scales) / scales, 0.0)
    return inverse, torch.where(usable, scales, largest)
