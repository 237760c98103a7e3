"""The PTX interpreter computes what PTX says, and refuses what a kernel must not do.

What is said of its arithmetic is checked against rationals, of conversions against torch.
"""

import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.ptx.compiler import Compiled
from tests.support.ptx.machine import Launch, launch
from tests.support.ptx.memory import Allocation
from tests.support.ptx.parser import PtxError, parse

Array = np.ndarray[Any, Any]
HEAD = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(
{params}
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<29>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
{loads}
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
{body}
    ret;
}}
"""


def run(
    body: str,
    *arrays: Array,
    read_only: Sequence[int] = (),
    threads: int = 32,
    grid: int = 1,
    shared: int = 0,
) -> None:
    """Run a kernel's body: the arrays' addresses are in %rd0, ..., the thread's number in %r4."""
    numbers = range(len(arrays))
    text = HEAD.format(
        params=",\n".join(f".param .u64 .ptr .global .align 1 param_{i}" for i in numbers),
        loads="\n".join(f"ld.param.b64 %rd{i}, [param_{i}];" for i in numbers),
        threads=threads,
        body=body,
    )
    addresses = [array.ctypes.data for array in arrays]
    params = np.array(addresses, np.uint64).tobytes()
    allocations = [
        Allocation(address, array.nbytes, i not in read_only)
        for i, (address, array) in enumerate(zip(addresses, arrays, strict=True))
    ]
    compiled = Compiled(parse(text)["kernel"])
    launch(compiled, Launch(grid, threads, params, shared), allocations)


def run_on(instructions: str, result: Any, *operands: Array) -> Array:
    """Run instructions on elements of operands, each in %r10 or %rd10 and so on by its size."""
    count = len(operands[0])
    padded = -(-count // 32) * 32
    arrays = [np.resize(each, padded) for each in operands]
    output = np.zeros(padded, result)
    body = ""
    for i, array in enumerate([*arrays, output]):
        body += f"mad.wide.u32 %rd{50 + i}, %r4, {array.itemsize}, %rd{i};\n"
    for i, array in enumerate(arrays):
        body += f"ld.global.b{8 * array.itemsize} {_register(array)}{10 + i}, [%rd{50 + i}];\n"
    body += instructions
    last = 50 + len(arrays)
    body += f"\nst.global.b{8 * output.itemsize} [%rd{last}], {_register(output)}20;"
    run(body, *arrays, output, threads=32, grid=padded // 32)
    return output[:count]


def _floats(values: Sequence[float]) -> Array:
    return np.array(values, np.float32)


def _register(array: Array) -> str:
    return {2: "%rs", 4: "%r", 8: "%rd"}[array.itemsize]


# Arithmetic

FLOATS: dict[str, tuple[Any, int, int]] = {
    "f32": (np.float32, 24, -149),
    "f64": (np.float64, 53, -1074),
}
SPECIAL = (0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan)


def _numbers(kind: str, seed: int) -> Array:
    """Return floats of all magnitudes, among them each other's neighbours, subnormals and NaN."""
    dtype, bits, lowest = FLOATS[kind]
    source = np.random.default_rng(seed)
    exponents = source.integers(lowest, 4 - lowest - 2 * bits, 96)
    values = np.ldexp(source.integers(2 ** (bits - 1), 2**bits, 96).astype(np.float64), exponents)
    near = 1.0 + source.integers(-4, 5, 64) * 2.0 ** (1 - bits)
    with np.errstate(over="ignore"):
        signed = np.r_[values * source.choice([-1, 1], 96), near].astype(dtype)
    result: Array = np.r_[signed, np.resize(np.array(SPECIAL, dtype), 96)]
    return result


def rounded(exact: Fraction, kind: str) -> float:
    """Return a rational that is not 0 rounded to the nearest float, ties to even."""
    dtype, bits, lowest = FLOATS[kind]
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - bits - 1
    while magnitude / Fraction(2) ** exponent >= 2**bits:
        exponent += 1
    exponent = max(exponent, lowest)
    integer = round(magnitude / Fraction(2) ** exponent)
    largest = Fraction(float(np.finfo(dtype).max))
    value = integer * Fraction(2) ** exponent
    result = math.inf if value > largest else float(value)
    return -result if exact < 0 else result


def _root(value: Fraction) -> Fraction:
    """Return a square root to 300 bits more than any float has."""
    scaled = (value.numerator << 2800) // value.denominator
    return Fraction(math.isqrt(scaled), 1 << 1400)


EXACT: dict[str, Callable[..., Fraction]] = {
    "add.rn": operator.add,
    "sub.rn": operator.sub,
    "mul.rn": operator.mul,
    "div.rn": operator.truediv,
    "fma.rn": lambda a, b, c: a * b + c,
    "sqrt.rn": _root,
}


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("name", EXACT)
def test_floats_are_rounded_once(name: str, kind: str) -> None:
    """Finite results are rationals rounded to nearest even; others are numpy's, and one NaN."""
    dtype = FLOATS[kind][0]
    count = {"fma.rn": 3, "sqrt.rn": 1}.get(name, 2)
    operands = [np.random.default_rng(i).permutation(_numbers(kind, i)) for i in range(count)]
    prefix = "%r" if kind == "f32" else "%rd"
    sources = ", ".join(f"{prefix}{10 + i}" for i in range(count))
    actual = run_on(f"{name}.{kind} {prefix}20, {sources};", dtype, *operands)
    with np.errstate(all="ignore"):
        numpy_s = _by_numpy(name, operands)
    for i, values in enumerate(zip(*operands, strict=True)):
        expected = float(numpy_s[i])
        if all(map(math.isfinite, values)) and _is_rational(name, values):
            exact = EXACT[name](*map(Fraction, map(float, values)))
            expected = rounded(exact, kind) if exact else expected
        assert dtype(expected).tobytes() == actual[i].tobytes() or math.isnan(expected), values
        assert math.isnan(expected) == math.isnan(actual[i]), values
    nans = actual[np.isnan(actual)].view(f"u{actual.itemsize}")
    assert set(nans) <= {0x7FFFFFFF if kind == "f32" else 0x7FF8000000000000}


def _is_rational(name: str, values: Sequence[float]) -> bool:
    return {"div.rn": values[-1] != 0, "sqrt.rn": values[0] > 0}.get(name, True)


def _by_numpy(name: str, operands: list[Array]) -> Array:
    functions: dict[str, Callable[..., Array]] = {
        "add.rn": np.add,
        "sub.rn": np.subtract,
        "mul.rn": np.multiply,
        "div.rn": np.divide,
        "sqrt.rn": np.sqrt,
        "fma.rn": lambda a, b, c: a * b + c,
    }
    return functions[name](*operands)


def test_a_second_rounding_would_show() -> None:
    """A product and a sum that round to a tie in float64 are not rounded there."""
    a, b = _floats([1 + 2**-12]), _floats([1 + 2**-12])
    c = _floats([2.0**-60])
    # The product is a tie of float32 but for c, which float64 does not hold beside it.
    actual = run_on("fma.rn.f32 %r20, %r10, %r11, %r12;", np.float32, a, b, c)
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    assert float(actual[0]) == rounded(exact, "f32")
    assert actual[0] != np.float32(np.float64(a[0]) * np.float64(b[0]) + np.float64(c[0]))


@pytest.mark.parametrize("name", ["min", "max"])
def test_extremes(name: str) -> None:
    """A NaN gives way to a number, and -0 is less than +0."""
    a = _floats([1, np.nan, np.nan, -0.0, 0.0, -np.inf])
    b = _floats([2, 3, np.nan, 0.0, -0.0, 5])
    actual = run_on(f"{name}.f32 %r20, %r10, %r11;", np.float32, a, b)
    expected = {"min": [1, 3, np.nan, -0.0, -0.0, -np.inf], "max": [2, 3, np.nan, 0.0, 0.0, 5]}
    np.testing.assert_array_equal(actual, _floats(expected[name]))
    assert (np.signbit(actual) == np.signbit(_floats(expected[name])))[3:5].all()


def test_what_scales_use_besides() -> None:
    """A floor of normal numbers, and an extreme that is NaN where one number is."""
    values = np.abs(_numbers("f32", 5))
    values = values[(values >= np.finfo(np.float32).tiny) & np.isfinite(values)]
    found = run_on("cvt.rmi.ftz.f32.f32 %r20, %r10;", np.float32, -values)
    assert found.tolist() == [float(math.floor(-x)) for x in values.tolist()]
    found = run_on("max.NaN.f32 %r20, %r10, %r11;", np.float32, values, _floats([math.nan, 1.0]))
    assert np.isnan(found[::2]).all()
    assert found[1::2].tolist() == np.maximum(values[1::2], 1).tolist()
    found = run_on("max.NaN.f32 %r20, %r10, 0f00000000, %r10;", np.float32, -values)
    assert not found.any()


def test_pairs_of_floats() -> None:
    """Instructions of two float32 in 64 bits are two of one each; halves are widened exactly."""
    a, b = (_numbers("f32", seed)[:96] for seed in (1, 2))
    actual = run_on("mul.rn.f32x2 %rd20, %rd10, %rd11;", np.uint64, *(x.view("u8") for x in (a, b)))
    single = run_on("mul.rn.f32 %r20, %r10, %r11;", np.float32, a, b)
    np.testing.assert_array_equal(actual.view(np.float32), single)
    pairs = (x.view("u8") for x in (a, b, a))
    actual = run_on("fma.rn.f32x2 %rd20, %rd10, %rd11, %rd12;", np.uint64, *pairs)
    single = run_on("fma.rn.f32 %r20, %r10, %r11, %r12;", np.float32, a, b, a)
    np.testing.assert_array_equal(actual.view(np.float32), single)
    halves = torch.from_numpy(a).to(torch.bfloat16)
    bits = halves.view(torch.int16).numpy().view(np.uint16)
    mixed = run_on("sub.rn.f32.bf16 %r20, %rs10, %r11;", np.float32, bits, b)
    wide = run_on("sub.rn.f32 %r20, %r10, %r11;", np.float32, halves.float().numpy(), b)
    np.testing.assert_array_equal(mixed, wide)


# Integers

INTEGERS = np.array(
    [0, 1, 2, 5, 31, 32, 33, 255, 2**31 - 1, 2**31, 2**32 - 5, 2**32 - 1], np.uint32
)
WORD = 2**32


def _signed(value: int) -> int:
    return value - WORD if value >= WORD // 2 else value


OF_INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32": operator.add,
    "sub.s32": operator.sub,
    "mul.lo.s32": operator.mul,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: _signed(a) * _signed(b) >> 32,
    "max.s32": lambda a, b: max(_signed(a), _signed(b)),
    "min.u32": min,
    "and.b32": operator.and_,
    "or.b32": operator.or_,
    "xor.b32": operator.xor,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: _signed(a) >> min(b, 31),
    "rem.u32": lambda a, b: a % b,
    "rem.s32": lambda a, b: int(math.fmod(_signed(a), _signed(b))),
    "div.s32": lambda a, b: int(Fraction(_signed(a), _signed(b))),
    "prmt.b32": lambda a, b: _permuted(a, b, 0x7B41),
    "bfe.u32": lambda a, b: (a >> (b & 255)) & 31,
}


def _permuted(a: int, b: int, selector: int) -> int:
    joined = a | b << 32
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = joined >> 8 * (nibble & 7) & 255
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


@pytest.mark.parametrize("name", OF_INTEGERS)
def test_integers(name: str) -> None:
    """Integers are Python's, cut to their width."""
    pairs = [(a, b) for a in INTEGERS for b in INTEGERS if b or name[:3] not in ("rem", "div")]
    a, b = (np.array(each, np.uint32) for each in zip(*pairs, strict=True))
    more = {"prmt.b32": ", 0x7B41U", "bfe.u32": ", 5"}.get(name, "")
    actual = run_on(f"{name} %r20, %r10, %r11{more};", np.uint32, a, b)
    expected = [OF_INTEGERS[name](int(x), int(y)) % WORD for x, y in pairs]
    assert actual.tolist() == expected


def test_wide_integers() -> None:
    """Products of twice the width, with and without a sum."""
    a = INTEGERS
    for kind, value in (("u32", int), ("s32", _signed)):
        actual = run_on(
            f"mad.wide.{kind} %rd20, %r10, -5, 7;"
            if kind == "s32"
            else f"mad.wide.{kind} %rd20, %r10, 5, 7;",
            np.uint64,
            a,
        )
        factor = -5 if kind == "s32" else 5
        assert actual.tolist() == [(value(int(x)) * factor + 7) % 2**64 for x in a]


# Conversions


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_halves_are_torch_s(name: str, dtype: torch.dtype) -> None:
    """Every half is widened exactly; float32 between halves is rounded to nearest even."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(dtype).float()
    source = np.resize(bits.numpy().view(np.uint16), 2**16)
    widened = run_on(f"cvt.f32.{name} %r20, %rs10;", np.float32, source)
    torch.testing.assert_close(torch.from_numpy(widened), values, rtol=0, atol=0, equal_nan=True)
    finite = values[values.isfinite()].sort().values
    ties = torch.cat([(finite[1:] + finite[:-1]) / 2, finite, _numbers_as_tensor()])
    narrowed = run_on(
        f"cvt.rn.{name}.f32 %rs8, %r10;\nmov.b32 %r20, {{%rs8, %rs8}};", np.uint32, ties.numpy()
    )
    actual = torch.from_numpy(narrowed.astype(np.uint16).view(np.int16)).view(dtype)
    torch.testing.assert_close(actual, ties.to(dtype), rtol=0, atol=0, equal_nan=True)


def _numbers_as_tensor() -> torch.Tensor:
    return torch.from_numpy(_numbers("f32", 3))


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("s32", -(2**31), 2**31 - 1), ("u32", 0, WORD - 1)]
)
def test_floats_to_integers(kind: str, low: int, high: int) -> None:
    """They are cut to integers, and those out of range to its ends; NaN is 0."""
    values = np.r_[_numbers("f32", 4), _floats([0.5, -0.5, 2**31, -(2**31), 3e9, -1.5, 7.99])]
    actual = run_on(f"cvt.rzi.{kind}.f32 %r20, %r10;", np.uint32, values)
    expected = [
        0
        if math.isnan(x)
        else int(max(low, min(high, x)))
        if math.isinf(x)
        else max(low, min(high, int(x)))
        for x in map(float, values)
    ]
    assert actual.tolist() == [x % WORD for x in expected]


def test_integers_to_floats_and_other_widths() -> None:
    """Integers are rounded to floats, widened by their sign and cut."""
    a = INTEGERS
    assert run_on("cvt.rn.f32.u32 %r20, %r10;", np.float32, a).tolist() == [
        rounded(Fraction(int(x)), "f32") if x else 0.0 for x in a
    ]
    assert run_on("cvt.s64.s32 %rd20, %r10;", np.int64, a).tolist() == [_signed(int(x)) for x in a]
    assert run_on("cvt.u64.u32 %rd20, %r10;", np.int64, a).tolist() == a.tolist()
    cut = run_on("cvt.s8.s32 %rs8, %r10;\ncvt.s64.s16 %rd20, %rs8;", np.int64, a)
    assert cut.tolist() == a.astype(np.int8).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eq", [1, 0, 0, 0, 0]),
        ("ne", [0, 1, 1, 0, 0]),
        ("lt", [0, 1, 0, 0, 0]),
        ("ge", [1, 0, 1, 0, 0]),
        ("neu", [0, 1, 1, 1, 1]),
        ("ltu", [0, 1, 0, 1, 1]),
        ("geu", [1, 0, 1, 1, 1]),
        ("num", [1, 1, 1, 0, 0]),
        ("nan", [0, 0, 0, 1, 1]),
    ],
)
def test_comparisons(name: str, expected: list[int]) -> None:
    """Of a NaN the ordered ones are false, `ne` among them, the unordered ones true."""
    a = _floats([1, 1, 2, np.nan, 1])
    b = _floats([1, 2, 1, 1, np.nan])
    code = f"setp.{name}.f32 %p1, %r10, %r11;\nselp.b32 %r20, 1, 0, %p1;"
    assert run_on(code, np.uint32, a, b).tolist() == expected


# Threads

STORE = "mad.wide.u32 %rd50, %r4, 4, %rd0;\nst.global.b32 [%rd50], %r20;"
LOOP = """
    and.b32 %r10, %r1, 7;
    mov.b32 %r20, 0;
$L__BB0_1:
    setp.eq.b32 %p1, %r10, 0;
    @%p1 bra $L__BB0_3;
    add.s32 %r20, %r20, %r10;
    add.s32 %r10, %r10, -1;
    and.b32 %r11, %r10, 1;
    setp.ne.b32 %p2, %r11, 0;
    @!%p2 bra $L__BB0_1;
    add.s32 %r20, %r20, 100;
    bra.uni $L__BB0_1;
$L__BB0_3:
    shfl.sync.bfly.b32 %r21, %r20, 1, 31, -1;
    add.s32 %r20, %r20, %r21;
"""


def test_divergence() -> None:
    """Threads that take a loop as often as they like meet again before a shuffle."""
    output = np.zeros(96, np.uint32)
    run(LOOP + STORE, output, threads=32, grid=3)

    def alone(n: int) -> int:
        return sum(range(n + 1)) + 100 * (n // 2)

    assert output.tolist() == [alone(i % 8) + alone((i ^ 1) % 8) for i in range(96)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("shfl.sync.bfly.b32 %r20, %r1, 5, 31, -1;", lambda i: i ^ 5),
        ("shfl.sync.down.b32 %r20, %r1, 5, 31, -1;", lambda i: i + 5 if i % 32 < 27 else i),
        ("shfl.sync.idx.b32 %r20, %r1, 3, 31, -1;", lambda i: i // 32 * 32 + 3),
        (
            "shfl.sync.down.b32 %r21|%p1, %r1, 5, 31, -1;\nselp.b32 %r20, 1, 0, %p1;",
            lambda i: i % 32 < 27,
        ),
        ("redux.sync.max.s32 %r20, %r1, -1;", lambda i: i // 32 * 32 + 31),
        ("redux.sync.add.s32 %r20, %r1, -1;", lambda i: i // 32 * 1024 + 496),
    ],
)
def test_shuffles(code: str, expected: Callable[[int], int]) -> None:
    """Values come from other threads of the warp, or of all of them."""
    output = np.zeros(64, np.uint32)
    run(f"{code}\n{STORE}", output, threads=64)
    assert output.tolist() == [expected(i) for i in range(64)]


EXCHANGE = """
    mov.b32 %r10, memory;
    shl.b32 %r11, %r1, 2;
    add.s32 %r12, %r10, %r11;
    st.shared.b32 [%r12], %r1;
    {barrier}
    sub.s32 %r13, 252, %r11;
    add.s32 %r13, %r10, %r13;
    ld.shared.b32 %r20, [%r13];
"""


def test_shared_memory() -> None:
    """After a barrier each thread reads what another one has written, in each block."""
    output = np.zeros(128, np.uint32)
    run(EXCHANGE.format(barrier="bar.sync 0;") + STORE, output, threads=64, grid=2, shared=256)
    assert output.tolist() == [63 - i % 64 for i in range(128)]


# What is not written, as a compiler leaves it where nothing depends on it

MOVED: dict[str, tuple[str, Callable[[int], int]]] = {
    "upper half of a pair": (
        "@%p1 mov.b64 %rd8, {%r1, %r1};\nmov.b64 {_, %r20}, %rd8;\n@!%p1 mov.b32 %r20, 7;",
        lambda i: i if i < 5 else 7,
    ),
    "lanes of a sum": (
        "@%p1 mov.b32 %r8, %r1;\nshfl.sync.bfly.b32 %r9, %r8, 1, 31, -1;\n"
        "add.s32 %r10, %r8, %r9;\nmov.b32 %r20, 7;\nsetp.lt.s32 %p2, %r1, 4;\n"
        "@%p2 mov.b32 %r20, %r10;",
        lambda i: 2 * (i & ~1) + 1 if i < 4 else 7,
    ),
    "lower half": ("mov.b64 %rd9, {%r8, %r1};\nmov.b64 {_, %r20}, %rd9;", lambda i: i),
    "shifted out": (
        "mov.b64 %rd9, {%r8, %r1};\nshr.u64 %rd9, %rd9, 32;\ncvt.u32.u64 %r20, %rd9;",
        lambda i: i,
    ),
    "masked": (
        "prmt.b32 %r9, %r8, %r1, 0x1054U;\nor.b32 %r9, %r9, -256;\nand.b32 %r20, %r9, 255;",
        lambda i: i,
    ),
    "one of two floats": (
        "mov.b64 %rd8, {%r8, %r1};\nmov.b32 %r9, 0f3F800000;\nmov.b64 %rd9, {%r9, %r9};\n"
        "mul.rn.f32x2 %rd9, %rd8, %rd9;\nmov.b64 {_, %r20}, %rd9;",
        lambda i: i,
    ),
    "bytes not chosen": ("prmt.b32 %r20, %r1, %r8, 0x3210U;", lambda i: i),
    "not selected": (
        "selp.b32 %r8, %r8, 3, %p1;\nselp.b32 %r20, 2, %r8, %p1;",
        lambda i: 2 + (i >= 5),
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_undefined_bits_may_be_moved(name: str) -> None:
    """Bits of registers that are not written are no error where they reach nothing."""
    code, expected = MOVED[name]
    output = np.zeros(32, np.uint32)
    run(f"setp.lt.s32 %p1, %r1, 5;\n{code}\n{STORE}", output)
    assert output.tolist() == [expected(i) for i in range(32)]


MATRIX = """
    mov.b32 %r10, memory;
    shl.b32 %r11, %r1, 4;
    add.s32 %r12, %r10, %r11;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r12], {%r1, %r2, %r1, %r1};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r12];
    shl.b32 %r11, %r1, 2;
    add.s32 %r12, %r10, %r11;
    ld.shared.b32 %r24, [%r12+256];
    sub.s32 %r24, %r24, %r22;
    add.s32 %r20, %r20, %r24;
"""


def test_matrices_in_shared_memory() -> None:
    """A warp loads what it has stored, and eight rows of 16 bytes follow one another."""
    output = np.zeros(32, np.uint32)
    run(MATRIX + STORE, output, shared=512)
    assert output.tolist() == list(range(32))


# What is refused

LAST = "mad.wide.u32 %rd50, %r4, 4, %rd0;\n"
REFUSED: dict[str, tuple[str, str]] = {
    "shared race": (EXCHANGE.format(barrier="") + STORE, "race at unit"),
    "race of blocks": ("st.global.b32 [%rd0], %r2;", "race"),
    "race of a block": (
        "shr.u32 %r10, %r1, 1;\nmad.wide.u32 %rd50, %r10, 4, %rd0;\n"
        "ld.global.b32 %r11, [%rd50];\nmad.wide.u32 %rd51, %r1, 4, %rd0;\n"
        "st.global.b32 [%rd51], %r11;",
        "race at unit",
    ),
    "two values": ("mov.b32 %r9, memory;\nst.shared.b32 [%r9], %r1;", "different values"),
    "after the end": (LAST + "ld.global.b32 %r9, [%rd50+4];", "out of bounds"),
    "before the start": (LAST + "ld.global.b32 %r9, [%rd50+-4];", "out of bounds"),
    "not aligned": (LAST + "ld.global.b32 %r9, [%rd50+2];", "not aligned"),
    "vector not aligned": (LAST + "ld.global.v2.b32 {%r8,%r9}, [%rd50];", "not aligned to 8"),
    "read-only": ("mad.wide.u32 %rd50, %r4, 4, %rd1;\nst.global.b32 [%rd50], %r1;", "read-only"),
    "shared out of bounds": ("mov.b32 %r9, 256;\nld.shared.b32 %r9, [%r9];", "shared memory"),
    "shared not written": ("mov.b32 %r9, memory;\nld.shared.b32 %r9, [%r9];", "not written"),
    "not written": (STORE, "what is stored is not written"),
    "not written by all": (
        f"setp.lt.s32 %p1, %r1, 5;\n@%p1 mov.b32 %r8, 1;\nadd.s32 %r20, %r8, 1;\n{STORE}",
        "what is stored is not written",
    ),
    "half not written": (
        f"mov.b64 %rd9, {{%r1, %r8}};\nmov.b64 {{_, %r20}}, %rd9;\n{STORE}",
        "what is stored is not written",
    ),
    "masked in part": (
        f"and.b32 %r20, %r8, 256;\n{STORE}",
        "what is stored is not written",
    ),
    "compared, not written": ("setp.lt.s32 %p1, %r8, %r1;", "%r8 is used where"),
    "address not written": ("ld.global.b32 %r9, [%rd9];", "%rd9 is used where"),
    "branch not written": ("@%p1 bra $L__BB0_9;\n$L__BB0_9:", "%p1 is used where"),
    "guard not written": ("@!%p1 mov.b32 %r9, 1;", "%p1 is used where"),
    "chosen by not written": ("selp.b32 %r9, 1, 2, %p1;", "%p1 is used where"),
    "other lane not written": (
        f"setp.lt.s32 %p1, %r1, 5;\n@%p1 mov.b32 %r8, 1;\n"
        f"shfl.sync.bfly.b32 %r20, %r8, 16, 31, -1;\n{STORE}",
        "what is stored is not written",
    ),
    "part of a warp": (
        "setp.lt.s32 %p1, %r1, 5;\n@%p1 shfl.sync.idx.b32 %r9, %r1, 0, 31, -1;",
        "part of a warp",
    ),
    "barrier of a part": (
        "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $L__BB0_9;\nbar.sync 0;\n$L__BB0_9:",
        "not reached by all",
    ),
    "barrier of a part of a warp": (
        "setp.lt.s32 %p1, %r1, 5;\n@%p1 bra $L__BB0_9;\nbar.sync 0;\n$L__BB0_9:",
        "part of a warp",
    ),
    "division by zero": ("rem.s32 %r9, %r1, 0;", "division by zero"),
    "endless": ("$L__BB0_9:\nbra.uni $L__BB0_9;", "does not end"),
    "ftz": ("add.rn.ftz.f32 %r9, %r1, %r1;", "unknown instruction: add.rn.ftz.f32"),
    "approximate": ("div.approx.f32 %r9, %r1, %r1;", "unknown instruction"),
    "cached": ("ld.global.nc.b32 %r9, [%rd0];", "unknown instruction"),
    "atomic": ("atom.global.add.u32 %r9, [%rd0], 1;", "unknown instruction"),
    "directive": (".maxnreg 5;", "unknown directive"),
    "register": ("mov.b32 %q9, 1;", "unknown register"),
    "size": ("mov.b32 %rd9, 1;", "of 8 bytes as b32"),
    "contraction": (
        "mul.f32 %r9, %r1, %r1;\nadd.f32 %r9, %r9, %r1;",
        "may be contracted",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What no kernel may do is an error that says where."""
    code, message = REFUSED[name]
    arrays = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    with pytest.raises(PtxError, match=message):
        run(code, *arrays, read_only=[1], threads=64, grid=2, shared=256)


@pytest.mark.parametrize(
    "line", [".weak .func (.param .b32 a)", ".section .text", ".const .b32 x;"]
)
def test_unknown_directives(line: str) -> None:
    """A module's directives are known ones."""
    with pytest.raises(PtxError, match="unknown"):
        parse(f".version 9.0\n{line}\n")


def test_nothing_is_written_where_a_launch_is_refused() -> None:
    """The memory is as it was before."""
    output = np.zeros(64, np.uint32)
    with pytest.raises(PtxError, match="race"):
        run("st.global.b32 [%rd0], %r1;", output, threads=64)
    assert not output.any()
