"""The quotient of Eq. (7): its root, sum and quotient are each rounded correctly."""

import re

import triton
import triton.language as tl


@triton.jit
def _divide(x, y):
    """Return x / y, correctly rounded."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    return x / y


@triton.jit
def _sqrt(x):
    """Return the root of x, correctly rounded."""
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def divide_by_root(numerator, square, eps, V: tl.constexpr):
    """Return numerator / (sqrt(square) + eps); `eps`, float32 or float64, is a scalar."""
    if V.PTX and V.FULL and V.STATE_DTYPE == tl.float32:
        # A thread has its elements of a full chunk by fours.
        return tl.inline_asm_elementwise(
            ASSEMBLY,
            _CONSTRAINTS,
            [numerator, square, tl.full(square.shape, eps, tl.float32)],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    else:
        return _divide(numerator, _sqrt(square) + eps)


# NOTE: [Four quotients]
# What sqrt.rn and div.rn become are 11 instructions that compute, and 9 that look for numbers near
# the ends of the range and go around a subroutine for them. Here one look serves four elements.
# Their numerators and squares are all within [2^-100, 2^28), or they go the long way: of the upper
# half of a float32 less that of 2^-100 the second bit is set if, and only if, it is not. What is
# computed from them is then far from the ends of the range too, unless eps is above 2^20.
#
# `SHORT` is what ptxas makes of the two in that range (tests/backends/test_quotient.py compares
# them), so that it is rounded as they are.
_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 12))
SHORT = """
    rsqrt.approx.ftz.f32 r, x#;
    mul.rn.f32 root, x#, r;
    mul.rn.f32 half, r, 0f3F000000;
    neg.f32 minus, root;
    fma.rn.f32 rest, minus, root, x#;
    fma.rn.f32 root, rest, half, root;
    add.rn.f32 d, root, e#;
    rcp.approx.ftz.f32 r, d;
    neg.f32 minus, d;
    fma.rn.f32 rest, minus, r, 0f3F800000;
    fma.rn.f32 r, r, rest, r;
    mul.rn.f32 q, n#, r;
    fma.rn.f32 rest, minus, q, n#;
    fma.rn.f32 q#, r, rest, q;
"""
LONG = """
    sqrt.rn.f32 root, x#;
    add.rn.f32 d, root, e#;
    div.rn.f32 q#, n#, d;
"""
_CODE = """{
    .reg .b32 a, b, c;
    .reg .f32 r, root, half, minus, rest, d, q;
    .reg .pred far, large;
    prmt.b32 a, n0, n1, 0x7632;
    prmt.b32 b, n2, n3, 0x7632;
    sub.s32 a, a, 0x0D800D80;
    sub.s32 b, b, 0x0D800D80;
    or.b32 a, a, b;
    prmt.b32 b, x0, x1, 0x7632;
    prmt.b32 c, x2, x3, 0x7632;
    sub.s32 b, b, 0x0D800D80;
    sub.s32 c, c, 0x0D800D80;
    or.b32 b, b, c;
    or.b32 a, a, b;
    and.b32 a, a, 0x40004000;
    setp.ne.s32 far, a, 0;
    setp.gt.f32 large, e0, 0f49800000;
    or.pred far, far, large;
    @far bra $$L_long_${:uid};
    {short}
    bra $$L_done_${:uid};
    $$L_long_${:uid}:
    {long}
    $$L_done_${:uid}:
}"""


def _assembly() -> str:
    """Return the code, of operands by their numbers: q, n, x and e of four elements."""
    code = _CODE
    for name, part in (("{short}", SHORT), ("{long}", LONG)):
        code = code.replace(name, "".join(part.replace("#", str(i)) for i in range(4)))
    operands = {f"{name}{i}": f"${4 * k + i}" for k, name in enumerate("qnxe") for i in range(4)}
    code = re.sub(r"\b[qnxe][0-3]\b", lambda name: operands[name[0]], code)
    # In one line: the compiler takes each line for another one of this file.
    return " ".join(code.split())


ASSEMBLY = tl.constexpr(_assembly())
