"""What each opcode computes from its operands alone; an opcode that is not in the table is none."""

import re
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx import arithmetic
from tests.support.ptx.arithmetic import EXTREMES, EXTREMES_OR_NAN, Array, Function
from tests.support.ptx.parser import PtxError

_DTYPES = {"pred": np.bool_, "bf16": np.uint16}
_LETTERS = {"b": "u", "u": "u", "s": "i", "f": "f"}


class Operation(NamedTuple):
    """A function of operands, and the types of its result and of them.

    Each type has a mark for what the operand's undefined bits do: `~`, they move with the rest;
    `!`, they are an error; without a mark all of the result is undefined. A `*` ends the types of
    which the last one may repeat.
    """

    result: str
    sources: tuple[str, ...]
    function: Function
    dtype: np.dtype[Any]
    rounds: bool  # whether NaNs are canonical: those that are moved are not

    def compute(self, *values: Array) -> Array:
        """Return the result as its dtype."""
        result = self.function(*values)
        if result.dtype != self.dtype:
            result = arithmetic.cast(result, self.dtype)
        return arithmetic.canonical(result) if self.rounds else result


@cache
def dtype_of(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a PTX type, unmarked; bits are unsigned."""
    if name in _DTYPES:
        return np.dtype(_DTYPES[name])
    return np.dtype(f"{_LETTERS[name[0]]}{int(name[1:]) // 8}")


# By the names of opcodes.
_NUMPY: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}
PAIRS = {name: arithmetic.of_pairs(_NUMPY[name]) for name in ("add", "sub", "mul")}
_FLOAT_SIGNS: dict[str, Function] = {
    "neg": lambda a: a ^ arithmetic.sign_bit(a),
    "abs": lambda a: a & ~arithmetic.sign_bit(a),
}
_ORDERED: dict[str, Function] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # false of a NaN
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_NAN: Function = lambda a, b: (a != a) | (b != b)  # noqa: E731
_COMPARISONS: dict[str, Function] = {
    **_ORDERED,
    **{f"{name}u": lambda a, b, f=f: f(a, b) | _NAN(a, b) for name, f in _ORDERED.items()},
    "nan": _NAN,
    "num": lambda a, b: ~_NAN(a, b),
}
APPROXIMATE: dict[str, Function] = {
    "rcp": lambda a: 1 / a.astype(np.float64),
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
}
_HALVES = {
    "bf16": arithmetic.to_halves(arithmetic.to_bfloat16),
    "f16": arithmetic.to_halves(arithmetic.to_float16),
}
_SHUFFLES = {how: arithmetic.shuffle(how, False) for how in ("bfly", "down", "idx")}
_FINDS = {how: arithmetic.shuffle(how, True) for how in _SHUFFLES}
_INT = "[su](?:16|32|64)"
_ANY = "[bsuf](?:16|32|64)"
_REDUCTIONS = {name: arithmetic.reduction(_NUMPY[name]) for name in ("add", *EXTREMES)}
_FLOAT_REDUCTIONS = {name: arithmetic.reduction(EXTREMES[name]) for name in EXTREMES}
# Opcodes, the result's type and its operands' by the groups of an opcode, and the function, or
# functions by the first group.
_ROWS: tuple[tuple[str, str, Function | dict[str, Function]], ...] = (
    (r"(add|sub|mul)(?:.rn)?.(f32|f64)", r"\2 \2 \2", _NUMPY),
    (r"(div).rn.(f32|f64)", r"\2 \2 \2", _NUMPY),
    (r"(add|sub|mul).rn.f32x2", "b64 b64 b64", PAIRS),
    (r"(add|sub).rn.f32.(f16|bf16)", r"f32 \2 f32", _NUMPY),
    (r"fma.rn.f32", "f32 f32 f32 f32", arithmetic.fma32),
    (r"fma.rn.f32x2", "b64 b64 b64 b64", arithmetic.of_pairs(arithmetic.fma32)),
    (r"fma.rn.f64", "f64 f64 f64 f64", arithmetic.fma64),
    (r"sqrt.rn.(f32|f64)", r"\1 \1", np.sqrt),
    (r"(min|max).(f32|f64)", r"\2 \2 \2*", EXTREMES),
    (r"(min|max).NaN.(f32)", r"\2 \2 \2*", EXTREMES_OR_NAN),
    # Rounded correctly where they may be off in the last place: who uses them makes up for that.
    (r"(rcp|rsqrt).approx.ftz.f32", "f32 f32", APPROXIMATE),
    (r"cvt.rmi.ftz.f32.f32", "f32 f32", arithmetic.floor),
    (r"(neg|abs).f(32|64)", r"b\2 b\2", _FLOAT_SIGNS),
    (r"(neg|abs).(s16|s32|s64)", r"\2 \2", _NUMPY),
    (rf"(add|sub).({_INT})", r"\2 \2 \2", _NUMPY),
    (rf"(mul).lo.({_INT})", r"\2 \2 \2", _NUMPY),
    (r"mul.hi.([su]32)", r"\1 \1 \1", arithmetic.high_product),
    (rf"mad.lo.({_INT})", r"\1 \1 \1 \1", lambda a, b, c: a * b + c),
    (r"mul.wide.([su])16", r"\g<1>32 \g<1>16 \g<1>16", arithmetic.wide_product),
    (r"mul.wide.([su])32", r"\g<1>64 \g<1>32 \g<1>32", arithmetic.wide_product),
    (r"mad.wide.([su])16", r"\g<1>32 \g<1>16 \g<1>16 \g<1>32", arithmetic.wide_sum),
    (r"mad.wide.([su])32", r"\g<1>64 \g<1>32 \g<1>32 \g<1>64", arithmetic.wide_sum),
    (rf"(min|max).({_INT})", r"\2 \2 \2", _NUMPY),
    (r"div.([su](?:32|64))", r"\1 \1 \1", arithmetic.quotient),
    (r"rem.([su](?:32|64))", r"\1 \1 \1", arithmetic.remainder),
    (r"(and|or|xor).(pred|b16|b32|b64)", r"\2 \2 \2", _NUMPY),
    (r"not.(pred|b16|b32|b64)", r"\1 \1", np.invert),
    (r"shl.(b16|b32|b64)", r"\1 ~\1 u32", arithmetic.shift(np.left_shift)),
    (rf"shr.({_INT}|b16|b32|b64)", r"\1 ~\1 u32", arithmetic.shift(np.right_shift)),
    (r"bfe.([su]32)", r"\1 ~\1 u32 u32", arithmetic.bit_field),
    (r"prmt.b32", "b32 ~b32 ~b32 u32", arithmetic.permute),
    (rf"mov.(pred|{_ANY})", r"\1 ~\1", lambda a: a),
    (r"cvta.to.global.u64", "u64 ~u64", lambda a: a),
    (rf"selp.({_ANY})", r"\1 ~\1 ~\1 !pred", lambda a, b, p: np.where(p, a, b)),
    (r"setp.(eq|ne|lt|le|gt|ge).([bsu](?:16|32|64))", r"pred !\2 !\2", _COMPARISONS),
    (r"setp.((?:eq|ne|lt|le|gt|ge)u?|num|nan).(f32|f64)", r"pred !\2 !\2", _COMPARISONS),
    (r"cvt.([su](?:8|16|32|64)).([su](?:8|16|32|64))", r"\1 ~\2", lambda a: a),
    (r"cvt.rn.(f32|f64).([su](?:8|16|32|64))", r"\1 \2", lambda a: a),
    (r"cvt.rzi.([su](?:16|32|64)).(f32|f64)", r"\1 \2", lambda a: a),
    (r"cvt.rn.(f16|f32).(f32|f64)", r"\1 \2", lambda a: a),
    (r"cvt.(f32|f64).(bf16|f16|f32)", r"\1 \2", lambda a: a),
    (r"cvt.rn.bf16.f32", "bf16 f32", arithmetic.to_bfloat16),
    (r"cvt.rn.(bf16|f16)x2.f32", "b32 f32 f32", _HALVES),
    # The last operand, which PTX does not have, is the number in the warp.
    (r"shfl.sync.(bfly|down|idx).b32", "b32 ~b32 u32 !s32 !s32 !u32", _SHUFFLES),
    (r"shfl.sync.(bfly|down|idx).b32\|", "pred b32 u32 !s32 !s32 !u32", _FINDS),
    (r"redux.sync.(min|max).(f32)", r"\2 !\2 !s32 !u32", _FLOAT_REDUCTIONS),
    (r"redux.sync.(add|min|max).([su]32)", r"\2 !\2 !s32 !u32", _REDUCTIONS),
)
_TABLE = tuple((re.compile(row[0].replace(".", r"\.")), *row[1:]) for row in _ROWS)


@cache
def operation_of(opcode: str) -> Operation:
    """Return what an opcode computes."""
    for pattern, types, function in _TABLE:
        if found := pattern.fullmatch(opcode):
            result, *sources = found.expand(types).split()
            chosen = function[found[1]] if isinstance(function, dict) else function
            rounds = result[0] == "f" and sources[0][0] != "~"
            return Operation(result, tuple(sources), chosen, dtype_of(result), rounds)
    raise PtxError(f"unknown instruction: {opcode}")
