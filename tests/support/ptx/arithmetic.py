"""PTX's arithmetic on numpy arrays, an element for each thread: IEEE, rounded once to nearest.

A NaN that an operation gives is PTX's canonical one, whatever its operands' were: where bits of
float32 are used as integers they are those of a GPU. Bits that PTX leaves open are not produced.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

# Of numpy; its types say little of dtypes that are known when a kernel is.
Array = Any
_NANS = {
    np.dtype(np.float16): 0x7FFF,
    np.dtype(np.float32): 0x7FFFFFFF,
    np.dtype(np.float64): 0x7FF8000000000000,
}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def canonical(values: Array) -> Array:
    """Return values with every NaN replaced by the canonical one."""
    nan = values != values
    if nan.any():
        bits = values.view(UNSIGNED[values.itemsize])
        bits = np.where(nan, bits.dtype.type(_NANS[values.dtype]), bits)
        return bits.view(values.dtype)
    return values


def rounded(operation: Callable[..., Array]) -> Callable[..., Array]:
    """Return an operation of numpy's, which IEEE has rounded, with canonical NaNs."""
    return lambda *operands: canonical(operation(*operands))


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
    return canonical(odd.astype(np.float32))


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c of float64, rounded once, element by element."""
    return canonical(np.array([_fma64(*map(float, each)) for each in zip(a, b, c, strict=True)]))


def _fma64(a: float, b: float, c: float) -> float:
    if not all(map(np.isfinite, (a, b, c))):
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        # The sign of a sum of zeros; x - x is +0, and a * b that is not 0 may underflow to it.
        zeros = Fraction(a) * Fraction(b) == 0
        return float(np.float64(a) * np.float64(b) + np.float64(c)) if zeros else 0.0
    try:
        return exact.numerator / exact.denominator
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def _extreme(operation: Callable[..., Array], join: Callable[..., Array]) -> Callable[..., Array]:
    def extreme(a: Array, b: Array) -> Array:
        """Return the extreme; a NaN gives way to a number, and -0 is less than +0."""
        unsigned = UNSIGNED[a.itemsize]
        zeros = (a == 0) & (b == 0)
        signed = join(a.view(unsigned), b.view(unsigned)).view(a.dtype)
        return canonical(np.where(zeros, signed, operation(a, b)))

    return extreme


minimum = _extreme(np.fmin, np.bitwise_or)
maximum = _extreme(np.fmax, np.bitwise_and)


def _flushed(values: Array) -> Array:
    """Return float32 values with zeros of their sign for subnormal ones."""
    tiny = np.abs(values) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), values), values)


def inverse_root(values: Array) -> Array:
    """Return 1 / sqrt(x) of float32, of which subnormal values are zeros, rounded to nearest."""
    return canonical((1 / np.sqrt(_flushed(values).astype(np.float64))).astype(np.float32))


def floor(values: Array) -> Array:
    """Return the next integer below float32 values, of which subnormal ones are zeros."""
    return canonical(np.floor(_flushed(values)))


def divide(a: Array, b: Array) -> Array:
    """Return a / b."""
    return canonical(np.divide(a, b))


def remainder(a: Array, b: Array) -> Array:
    """Return the remainder of a quotient rounded to zero; anything where b is 0."""
    return np.fmod(a, np.where(b == 0, b.dtype.type(1), b))


def quotient(a: Array, b: Array) -> Array:
    """Return the quotient of integers rounded to zero; anything where b is 0."""
    return (a - remainder(a, b)) // np.where(b == 0, b.dtype.type(1), b)


def to_integer(kind: np.dtype[Any]) -> Callable[[Array], Array]:
    """Return the conversion of floats to an integer dtype, to zero, to the nearest of its range."""
    info = np.iinfo(kind)

    def convert(values: Array) -> Array:
        wide = values.dtype == np.float64 or info.bits == 64
        of_nan = (1 << (info.bits - 1)) - (2 * (1 << (info.bits - 1)) if info.min else 0)
        low, high = values < float(info.min), values >= 2.0 ** int(info.max).bit_length()
        nan = values != values
        inside = np.where(low | high | nan, 0, values).astype(kind)
        result = np.where(low, kind.type(info.min), np.where(high, kind.type(info.max), inside))
        return np.where(nan, kind.type(of_nan if wide else 0), result)

    return convert


def from_bfloat16(bits: Array) -> Array:
    """Return the float32 values of bfloat16's bits."""
    return canonical((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def to_bfloat16(values: Array) -> Array:
    """Return the bits of float32 values rounded to bfloat16."""
    bits = values.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(
        values != values, np.uint16(0x7FFF), (nearest >> np.uint32(16)).astype(np.uint16)
    )


def from_float16(bits: Array) -> Array:
    """Return the float32 values of float16's bits."""
    return canonical(bits.view(np.float16).astype(np.float32))


def to_float16(values: Array) -> Array:
    """Return the bits of float32 values rounded to float16."""
    return canonical(values.astype(np.float16)).view(np.uint16)


def shift_left(a: Array, count: Array) -> Array:
    """Return a << count; 0 from the width on."""
    bits = a.dtype.type(8 * a.itemsize - 1)
    wide = count.astype(a.dtype)
    return np.where(count > bits, a.dtype.type(0), a << np.minimum(wide, bits))


def shift_right(a: Array, count: Array) -> Array:
    """Return a >> count; from the width on what is left of signs or zeros."""
    last = 8 * a.itemsize - 1
    shifted = a >> np.minimum(count, np.uint32(last)).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(count > np.uint32(last), a.dtype.type(0), shifted)


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """Return `length` bits of 32-bit numbers from `start` on, extended by sign where signed."""
    begin, size = (each.astype(np.int64) & 255 for each in (start, length))
    bits = a.view(np.uint32).astype(np.uint64) if a.dtype.kind == "u" else a.astype(np.int64)
    # What lies above the number is its sign.
    field = bits.astype(np.int64) >> np.minimum(begin, 63)
    size = np.minimum(size, 32)
    kept = field & ((np.int64(1) << size) - 1)
    if a.dtype.kind == "u":
        return kept.astype(np.uint32)
    negative = (size > 0) & ((field >> np.maximum(np.minimum(size, 32 - begin) - 1, 0)) & 1 == 1)
    return np.where(negative, kept - (np.int64(1) << size), kept).astype(np.int32)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Return prmt's choice of bytes: of each nibble the low bits a byte, the high one its sign."""
    joined = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    result = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (joined >> ((nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(
            np.uint8
        )
        sign = np.where(byte >= 128, np.uint8(255), np.uint8(0))
        chosen = np.where(nibble >= 8, sign, byte).astype(np.uint32)
        result |= chosen << np.uint32(8 * i)
    return result


def high_product(a: Array, b: Array) -> Array:
    """Return the upper half of 32-bit numbers' products."""
    wide = np.uint64 if a.dtype.kind == "u" else np.int64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
