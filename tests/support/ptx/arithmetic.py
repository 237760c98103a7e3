"""PTX's arithmetic on numpy arrays, an element for each thread: IEEE, rounded once to nearest.

A NaN that an operation gives is PTX's canonical one, whatever its operands' were: where bits of
float32 are used as integers they are those of a GPU. Bits that PTX leaves open are not produced.
"""

import ctypes
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from tests.support.ptx.parser import PtxError

# Of numpy; its types say little of dtypes that are known when a kernel is.
Array = Any
Function = Callable[..., Array]
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NANS = {2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FF8000000000000}


def canonical(values: Array) -> Array:
    """Return floats with every NaN replaced by the canonical one."""
    nan = values != values
    if np.count_nonzero(nan):
        bits = values.view(UNSIGNED[values.itemsize])
        return np.where(nan, bits.dtype.type(_NANS[values.itemsize]), bits).view(values.dtype)
    return values


def cast(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return values as a dtype; floats to zero, to the nearest that an integer dtype has."""
    if values.dtype.kind != "f" or dtype.kind not in "iu":
        return values.astype(dtype, copy=False)
    info = np.iinfo(dtype)
    low, high = values < float(info.min), values >= 2.0 ** int(info.max).bit_length()
    nan = values != values
    of_nan = info.min or 1 << (info.bits - 1)
    result = np.where(low | high | nan, 0, values).astype(dtype)
    result = np.where(low, dtype.type(info.min), np.where(high, dtype.type(info.max), result))
    wide = values.itemsize == 8 or info.bits == 64
    return np.where(nan, dtype.type(of_nan if wide else 0), result)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd, from where a second rounding, to at
    most half as many bits, gives what a single one would.
    """
    x, y = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)
    odd = np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)
    return odd.astype(np.float32)


_c_fma = ctypes.CDLL(None).fma
_c_fma.restype, _c_fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
fma64 = np.vectorize(_c_fma, otypes=[np.float64])  # C's rounds once


def of_pairs(function: Function) -> Function:
    """Return a function of float32 as one of two of them in 64 bits."""

    def both(*operands: Array) -> Array:
        pairs = (np.ascontiguousarray(each) for each in np.broadcast_arrays(*operands))
        return canonical(function(*(each.view(np.float32) for each in pairs))).view(np.uint64)

    return both


def _extreme(operation: Function, join: Function) -> Function:
    def extreme(a: Array, b: Array) -> Array:
        unsigned = UNSIGNED[a.itemsize]
        signed = join(a.view(unsigned), b.view(unsigned)).view(a.dtype)
        return np.where((a == 0) & (b == 0), signed, operation(a, b))

    return lambda *values: reduce(extreme, values)


# A NaN gives way to a number, and -0 is less than +0.
EXTREMES = {"min": _extreme(np.fmin, np.bitwise_or), "max": _extreme(np.fmax, np.bitwise_and)}
EXTREMES_OR_NAN = {
    "min": _extreme(np.minimum, np.bitwise_or),
    "max": _extreme(np.maximum, np.bitwise_and),
}


def _flushed(values: Array) -> Array:
    """Return float32 values with zeros of their sign for subnormal ones."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def floor(values: Array) -> Array:
    """Return the next integer below float32 values, of which subnormal ones are zeros."""
    return np.floor(_flushed(values))


def from_bfloat16(bits: Array) -> Array:
    """Return the float32 values of bfloat16's bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """Return the bits of float32 values rounded to bfloat16."""
    bits = values.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(values != values, np.uint16(_NANS[2]), nearest.astype(np.uint16))


def to_float16(values: Array) -> Array:
    """Return the bits of float32 values rounded to float16."""
    return canonical(values.astype(np.float16)).view(np.uint16)


def to_halves(convert: Function) -> Function:
    """Return the conversion of two float32, the upper half's first, to 32 bits."""
    return lambda high, low: (convert(high).astype(np.uint32) << np.uint32(16)) | convert(low)


def sign_bit(a: Array) -> Array:
    """Return the highest bit of unsigned numbers."""
    return a.dtype.type(1 << (8 * a.itemsize - 1))


def wide(a: Array) -> Array:
    """Return integers in twice as many bits."""
    return a.astype(f"{a.dtype.kind}{2 * a.itemsize}")


def wide_product(a: Array, b: Array) -> Array:
    """Return the products of integers in twice as many bits."""
    return wide(a) * wide(b)


def wide_sum(a: Array, b: Array, c: Array) -> Array:
    """Return the products of integers and a number of twice as many bits, summed."""
    return wide(a) * wide(b) + c


def high_product(a: Array, b: Array) -> Array:
    """Return the upper half of the products of integers."""
    product = wide(a) * wide(b)
    return product >> product.dtype.type(8 * a.itemsize)


def remainder(a: Array, b: Array) -> Array:
    """Return the remainder of a quotient rounded to zero; anything where b is 0."""
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def quotient(a: Array, b: Array) -> Array:
    """Return the quotient of integers rounded to zero; anything where b is 0."""
    return (a - remainder(a, b)) // np.where(b == 0, b.dtype.type(1), b)


def shift(function: Function) -> Function:
    """Return numpy's shift, which from the width on leaves signs or zeros as PTX's does."""
    return lambda a, count: function(a, np.minimum(count, np.uint32(64)).astype(a.dtype))


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """Return `length` bits of 32-bit numbers from `start` on, extended by sign where signed."""
    # What lies above the number is its sign.
    kind = np.dtype(f"{a.dtype.kind}8")
    begin, size = (each.astype(kind) & kind.type(255) for each in (start, length))
    spare = kind.type(64) - np.minimum(size, kind.type(32))
    return ((wide(a) >> begin) << spare) >> spare


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Return prmt's choice of bytes: of each nibble the low bits a byte, the high one its sign."""
    joined = np.stack(np.broadcast_arrays(a, b), axis=1).view(np.uint8)
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    at = (nibbles & np.uint32(7)).astype(np.int64)
    chosen = joined[:, at[0]] if len(at) == 1 else np.take_along_axis(joined, at, axis=1)
    signs = (chosen.view(np.int8) >> np.int8(7)).view(np.uint8)
    return np.ascontiguousarray(np.where(nibbles >= 8, signs, chosen)).view(np.uint32)[:, 0]


def shuffle(how: str, found: bool) -> Function:
    """Return shfl of whole warps, or where it finds a thread: lanes that do not keep theirs."""

    def shuffled(values: Array, count: Array, clamp: Array, members: Array, own: Array) -> Array:
        if (clamp != 31).any() or (members != -1).any():
            raise PtxError("a shuffle of a part of a warp is not known")
        count = count & np.uint32(31)
        lanes = {"bfly": own ^ count, "down": own + count, "idx": own * 0 + count}[how]
        valid = lanes < 32
        places = np.arange(len(own)) - own + np.where(valid, lanes, own)
        return valid if found else np.broadcast_to(values, len(own))[places]

    return shuffled


def reduction(function: Function) -> Function:
    """Return redux, of whole warps, of a function of two values."""

    def reduced(values: Array, members: Array, own: Array) -> Array:
        if (members != -1).any():
            raise PtxError("a reduction of a part of a warp is not known")
        values = np.broadcast_to(values, len(own))
        for distance in (16, 8, 4, 2, 1):
            values = function(values, values[np.arange(len(own)) ^ distance])
        return values

    return reduced
