"""What each opcode computes from its operands alone; an opcode that is not in the table is none."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx import arithmetic
from tests.support.ptx.arithmetic import Array, rounded
from tests.support.ptx.parser import PtxError

Function = Callable[..., Array]
_FLOATS = {"f32": np.float32, "f64": np.float64}
_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ARITHMETIC: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_BITWISE: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
_INTEGERS = r"[su](?:16|32|64)"


class Operation(NamedTuple):
    """The types of an opcode's result and operands, and its function."""

    result: str
    operands: tuple[str, ...]
    function: Function
    # Whether operands may be registers wider than their types, and the result's too.
    widens: bool = False
    # How many operands of the last one's type may follow.
    more: int = 0


@cache
def dtype_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a PTX type; bits are unsigned, halves of floats their bits."""
    if name in _FLOATS:
        return np.dtype(_FLOATS[name])
    if name == "pred":
        return np.dtype(bool)
    if name in ("bf16", "f16"):
        return np.dtype(np.uint16)
    if name in ("bf16x2", "f16x2", "f32x2"):
        return np.dtype(np.uint64 if name == "f32x2" else np.uint32)
    return np.dtype(f"{'int' if name[0] == 's' else 'uint'}{name[1:]}")


def _float_arithmetic(name: str, kind: str) -> Operation:
    return Operation(kind, (kind, kind), rounded(_ARITHMETIC[name]))


def _packed(name: str) -> Operation:
    function = arithmetic.fma32 if name == "fma" else rounded(_ARITHMETIC[name])

    def both(*operands: Array) -> Array:
        pairs = np.broadcast_arrays(*operands)
        return function(*(np.ascontiguousarray(each).view(np.float32) for each in pairs)).view(
            np.uint64
        )

    return Operation("f32x2", ("f32x2",) * (3 if name == "fma" else 2), both)


def _mixed(name: str, half: str) -> Operation:
    function = rounded(_ARITHMETIC[name])
    convert = getattr(arithmetic, f"from_{'bfloat16' if half == 'bf16' else 'float16'}")
    return Operation("f32", (half, "f32"), lambda a, b: function(convert(a), b))


def _wide(kind: str) -> tuple[str, Callable[[Array], Array]]:
    """Return the type of twice the width, and the conversion to it."""
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    return wide, lambda a: a.astype(dtype_of(wide))


def _wide_product(kind: str) -> Operation:
    wide, widen = _wide(kind)
    return Operation(wide, (kind, kind), lambda a, b: widen(a) * widen(b))


def _wide_sum(kind: str) -> Operation:
    wide, widen = _wide(kind)
    return Operation(wide, (kind, kind, wide), lambda a, b, c: widen(a) * widen(b) + c)


def _extremes(name: str, kind: str) -> Operation:
    functions: dict[str, Function] = {"min": np.minimum, "max": np.maximum}
    if kind in _FLOATS:
        functions = {"min": arithmetic.minimum, "max": arithmetic.maximum}
    return Operation(kind, (kind, kind), functions[name])


def _extremes_or_nan(name: str, kind: str) -> Operation:
    function = _extremes(name, kind).function

    def extreme(a: Array, b: Array, *more: Array) -> Array:
        result = arithmetic.canonical(np.where((a != a) | (b != b), a + b, function(a, b)))
        return extreme(result, *more) if more else result

    return Operation(kind, (kind, kind), extreme, more=1)


def _sign(name: str, kind: str) -> Operation:
    return Operation(kind, (kind,), np.negative if name == "neg" else np.abs)


def _compare(name: str, kind: str) -> Operation:
    if name in _COMPARISONS:
        ordered = _COMPARISONS[name]
        if name == "ne" and kind in _FLOATS:
            # Ordered: false of a NaN.
            return Operation("pred", (kind, kind), lambda a, b: (a < b) | (a > b))
        return Operation("pred", (kind, kind), ordered)
    if kind not in _FLOATS:
        raise PtxError(f"unknown comparison {name} of {kind}")
    if name in ("num", "nan"):
        wanted = name == "nan"
        return Operation("pred", (kind, kind), lambda a, b: ((a != a) | (b != b)) == wanted)
    unordered = _COMPARISONS[name[:-1]]
    return Operation("pred", (kind, kind), lambda a, b: unordered(a, b) | (a != a) | (b != b))


def _convert_integer(target: str, source: str) -> Operation:
    dtype = dtype_of(target)
    return Operation(target, (source,), lambda a: a.astype(dtype), widens=True)


def _to_float(target: str, source: str) -> Operation:
    dtype = dtype_of(target)
    return Operation(target, (source,), lambda a: canonical_float(a, dtype), widens=True)


def canonical_float(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return values converted to a dtype of floats."""
    return arithmetic.canonical(values.astype(dtype))


def _to_integer(target: str, source: str) -> Operation:
    return Operation(target, (source,), arithmetic.to_integer(dtype_of(target)), widens=True)


def _from_half(source: str) -> Operation:
    named = {"bf16": arithmetic.from_bfloat16, "f16": arithmetic.from_float16}
    return Operation("f32", (source,), named[source])


def _to_half(target: str) -> Operation:
    named = {"bf16": arithmetic.to_bfloat16, "f16": arithmetic.to_float16}
    if target in named:
        return Operation(target, ("f32",), named[target])
    convert = named[target.removesuffix("x2")]

    def pair(high: Array, low: Array) -> Array:
        upper, lower = (convert(each).astype(np.uint32) for each in (high, low))
        return (upper << np.uint32(16)) | lower

    return Operation(target, ("f32", "f32"), pair)


def _shift(name: str, kind: str) -> Operation:
    function = arithmetic.shift_left if name == "shl" else arithmetic.shift_right
    return Operation(kind, (kind, "u32"), function)


def _select(kind: str) -> Operation:
    return Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


def _bitwise(name: str, kind: str) -> Operation:
    return Operation(kind, (kind,) * (1 if name == "not" else 2), _BITWISE[name])


def _fma(kind: str) -> Operation:
    function = {"f32": arithmetic.fma32, "f64": arithmetic.fma64}[kind]
    return Operation(kind, (kind,) * 3, function)


_TABLE: tuple[tuple[str, Callable[..., Operation]], ...] = (
    (r"(add|sub|mul)(?:\.rn)?\.(f32|f64)", _float_arithmetic),
    (r"(add|sub|mul|fma)\.rn\.f32x2", _packed),
    (r"(add|sub)\.rn\.f32\.(bf16|f16)", _mixed),
    (r"fma\.rn\.(f32|f64)", _fma),
    (r"div\.rn\.(f32|f64)", lambda kind: Operation(kind, (kind, kind), arithmetic.divide)),
    (r"sqrt\.rn\.(f32|f64)", lambda kind: Operation(kind, (kind,), rounded(np.sqrt))),
    (rf"(min|max)\.(f32|f64|{_INTEGERS})", _extremes),
    (r"(min|max)\.NaN\.(f32)", _extremes_or_nan),
    # Exact where it may be off by two last places: who uses it has to make up for them.
    (r"rsqrt\.approx\.ftz\.(f32)", lambda k: Operation(k, (k,), arithmetic.inverse_root)),
    (r"cvt\.rmi\.ftz\.(f32)\.f32", lambda k: Operation(k, (k,), arithmetic.floor)),
    (r"(neg|abs)\.(f32|f64|s16|s32|s64)", _sign),
    (
        rf"(add|sub|mul(?=\.lo))(?:\.lo)?\.({_INTEGERS})",
        lambda name, kind: Operation(kind, (kind, kind), _ARITHMETIC[name]),
    ),
    (r"mul\.hi\.([su]32)", lambda kind: Operation(kind, (kind,) * 2, arithmetic.high_product)),
    (r"mul\.wide\.([su](?:16|32))", _wide_product),
    (r"mad\.wide\.([su](?:16|32))", _wide_sum),
    (rf"mad\.lo\.({_INTEGERS})", lambda k: Operation(k, (k, k, k), lambda a, b, c: a * b + c)),
    (r"div\.([su](?:32|64))", lambda kind: Operation(kind, (kind, kind), arithmetic.quotient)),
    (r"rem\.([su](?:32|64))", lambda kind: Operation(kind, (kind, kind), arithmetic.remainder)),
    (r"(and|or|xor|not)\.(pred|b16|b32|b64)", _bitwise),
    (r"(shl)\.(b16|b32|b64)", _shift),
    (r"(shr)\.([bsu](?:16|32|64))", _shift),
    (r"bfe\.([su]32)", lambda kind: Operation(kind, (kind, "u32", "u32"), arithmetic.bit_field)),
    (r"prmt\.b32", lambda: Operation("b32", ("b32", "b32", "b32"), arithmetic.permute)),
    (r"selp\.([bsuf](?:16|32|64))", _select),
    (r"setp\.(\w+)\.([bsu](?:16|32|64)|f32|f64)", _compare),
    (r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))", _convert_integer),
    (r"cvt\.rn\.(f32|f64)\.([su](?:8|16|32|64))", _to_float),
    (r"cvt\.rn\.(f32)\.(f64)", _to_float),
    (r"cvt\.(f64)\.(f32)", _to_float),
    (r"cvt\.rzi\.([su](?:16|32|64))\.(f32|f64)", _to_integer),
    (r"cvt\.f32\.(bf16|f16)", _from_half),
    (r"cvt\.rn\.(bf16|f16|bf16x2|f16x2)\.f32", _to_half),
    (r"cvta\.to\.global\.(u64)", lambda kind: Operation(kind, (kind,), lambda a: a)),
)


@cache
def operation_of(opcode: str) -> Operation:
    """Return what an opcode computes."""
    for pattern, make in _TABLE:
        if found := re.fullmatch(pattern, opcode):
            return make(*found.groups())
    raise PtxError(f"unknown instruction: {opcode}")
