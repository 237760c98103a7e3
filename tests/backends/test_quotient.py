"""Eq. (7)'s quotient on GPUs, rounded as sqrt.rn and div.rn are; four share a look at the range."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import triton

from cm_fused._backends.triton import quotient
from tests.backends.test_ptx import Array, run
from tests.support.ptx import operations

FOURS = 32 * 64
TINY, HUGE = 2.0**-100, 2.0**28  # the ends of the range that needs no look at each element
EDGES = [0.0, -0.0, 2.0**-149, 2.0**-126, TINY, HUGE, 3e38, np.inf, np.nan]
EDGES += [
    float(np.nextafter(np.float32(end), np.float32(way)))
    for end in (TINY, HUGE)
    for way in (0, 9e9)
]
PTX = """
.version 8.0
.target sm_{arch}
.address_size 64
.visible .entry kernel(.param .u64 operands) {{
    .reg .b64 p;
    .reg .f32 r, root, half, minus, rest, d, q, n, x, e;
    ld.param.u64 p, [operands];
    ld.global.f32 n, [p];
    ld.global.f32 x, [p + 4];
    ld.global.f32 e, [p + 8];
    {body}
    st.global.f32 [p + 12], q;
    ret;
}}
"""
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_OPERANDS = {"": "n", "+0x4": "x", "+0x8": "e"}  # by their offsets
_SASS = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?P\d )?([A-Z][\w.]*)\s*(.*?) ;")


def _quotients(numerators: Array, squares: Array, eps: Array) -> Array:
    """Return what the inline code computes; arrays of float32 (FOURS, 4), eps the same for each."""
    arrays = [np.zeros((FOURS, 4), np.float32), numerators, squares, eps]
    names = ["%r1{}", "%r2{}", "%r3{}", "%r4{}"]
    lists = [", ".join(name.format(i) for i in range(4)) for name in names]
    code = quotient.ASSEMBLY.value.replace("$$", "$").replace("${:uid}", "0")
    for operand in reversed(range(16)):
        code = code.replace(f"${operand}", names[operand // 4].format(operand % 4))
    address = "mad.wide.u32 %rd1{0}, %r4, 16, %rd{0};\n"
    body = "".join(map(address.format, range(4)))
    body += "".join(f"ld.global.v4.b32 {{{lists[i]}}}, [%rd1{i}];\n" for i in (1, 2, 3))
    body += code.replace("; ", ";\n").replace(": ", ":\n").replace("{ .reg", "{\n.reg")
    run(f"{body}\nst.global.v4.b32 [%rd10], {{{lists[0]}}};", *arrays, grid=FOURS // 32)
    return arrays[0]


def _expected(numerators: Array, squares: Array, eps: Array) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(numerators / (np.sqrt(squares) + eps))


def _fours(rng: np.random.Generator, low: float, high: float) -> Array:
    """Return float32 numbers whose powers of two are drawn from a range."""
    powers = rng.uniform(low, high, (FOURS, 4))
    return np.exp2(powers).astype(np.float32)


@pytest.mark.parametrize("error", [-1, 0, 1])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 2.0**20, 2.0**21, 1e30])
@pytest.mark.parametrize("kind", ["usual", "any", "edges"])
def test_quotients_are_rounded_correctly(
    kind: str, eps: float, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the numbers, the bits are those of a root, a sum and a quotient, each rounded once.

    So they are if the approximate reciprocal is off by a last place, as a GPU's may be.
    """
    rng = np.random.default_rng(7)
    low, high = (-99, 28) if kind == "usual" else (-149, 128)
    numerators, squares = (_fours(rng, low, high) for _ in range(2))
    numerators *= rng.choice(np.array([-1, 1], np.float32), (FOURS, 4))
    if kind == "edges":
        for values in (numerators, squares):
            values[rng.random((FOURS, 4)) < 0.2] = 1.5
            at = rng.random((FOURS, 4)) < 0.2
            values[at] = rng.choice(np.array(EDGES, np.float32), int(at.sum()))
        squares[0, 0], numerators[1] = -1.0, [1.0, -1.0, 0.0, -0.0]
    exact = operations.APPROXIMATE["rcp"]
    approximate = lambda a: (exact(a).astype(np.float32).view(np.int32) + error).view(np.float32)  # noqa: E731
    monkeypatch.setitem(operations.APPROXIMATE, "rcp", approximate)
    operations.operation_of.cache_clear()
    spread = np.full((FOURS, 4), eps, np.float32)
    found, expected = (f(numerators, squares, spread) for f in (_quotients, _expected))
    operations.operation_of.cache_clear()
    same = (found.view(np.int32) == expected.view(np.int32)) | (
        np.isnan(found) & np.isnan(expected)
    )
    assert same.all()


def _expression(arch: int, body: str) -> str:
    """Return what ptxas makes of the quotient of usual numbers, as an expression of operands."""
    text = PTX.format(arch=arch, body=body)
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/cubin"
        ptxas = [str(_TOOLS / "ptxas"), f"-arch=sm_{arch}", "/dev/stdin", "-o", cubin]
        subprocess.run(ptxas, input=text, text=True, check=True)
        listing = subprocess.run(
            [str(_TOOLS / "cuobjdump"), "-sass", cubin],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    registers = {"RZ": "0"}
    for opcode, operands in _usual_path(listing):
        target, *sources = operands.split(", ")
        if opcode.startswith("STG"):
            return registers[sources[0]]
        values = [_value(registers, source) for source in sources]
        name = opcode.removesuffix(".FTZ")  # the same for usual numbers
        if opcode.startswith("LDG"):
            registers[target] = _OPERANDS[re.sub(r".*?(\+0x\d)?\]$", r"\1", sources[0])]
        elif name == "FFMA" and values[2] == "0":
            registers[target] = _join("FMUL", values[:2])
        elif name == "FFMA":
            registers[target] = f"({_join('FMUL', values[:2])} + {values[2]})"
        elif name in ("FMUL", "FADD"):
            registers[target] = _join(name, values)
        elif name.startswith("MUFU"):
            registers[target] = f"{name}({values[0]})"
        elif name in ("MOV", "IMAD.MOV.U32"):
            registers[target] = values[-1]
    raise AssertionError(listing)


def _usual_path(listing: str) -> Iterator[tuple[str, str]]:
    """Yield opcodes and operands, past subroutines' calls."""
    code = {
        int(place, 16): (opcode, operands) for place, opcode, operands in _SASS.findall(listing)
    }
    place = 0
    while place in code:
        opcode, operands = code[place]
        target = int(operands.split(" ")[-1], 16) if opcode == "BRA" else 0
        passed = [code[each][0] for each in range(place, target, 16)]
        if any(each.startswith("CALL") for each in passed):
            place = target
        else:
            yield opcode, operands
            place += 16


def _value(registers: dict[str, str], source: str) -> str:
    name = source.lstrip("-").removesuffix(".reuse")
    negated = source.startswith("-") and name in registers
    return ("-" if negated else "") + registers.get(name, name)


def _join(operation: str, values: list[str]) -> str:
    return f"{operation}({', '.join(sorted(values))})"


@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90])
def test_the_short_way_is_that_of_the_compiler(arch: int) -> None:
    """For usual numbers sqrt.rn and div.rn are the same operations in the same order.

    A root is rounded correctly by an inverse root that is a little off only if it is the device's:
    no other proof is at hand than that the compiler relies on it.
    """
    long, short = (
        _expression(arch, part.replace("#", "")) for part in (quotient.LONG, quotient.SHORT)
    )
    assert short == long
    assert "MUFU.RCP(FADD((FMUL" in long
