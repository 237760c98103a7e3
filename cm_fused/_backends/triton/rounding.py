"""How parameters and moments are rounded to half precision: `cm_fused.rounding`, bit by bit."""

import triton
import triton.language as tl

from cm_fused._backends.triton.common import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)
_NAN_BITS = tl.constexpr(0x7FC00000)


@triton.jit
def widen(values, V: tl.constexpr):
    """Return loaded values in the state's dtype."""
    if V.PTX and V.FULL and values.dtype == tl.bfloat16:
        # Two from a register by an instruction each; the compiler takes three.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;",
            "=f,=f,r",
            [values],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return values.to(V.STATE_DTYPE)


@triton.jit
def load_param(
    param_ptr, remainder_ptr, offsets, mask, SPLIT: tl.constexpr, STATE_DTYPE: tl.constexpr
):
    """Return parameters as a step computes with them: their masters where they are SPLIT."""
    param = tl.load(param_ptr + offsets, mask=mask, other=0.0)
    if SPLIT:
        remainder = tl.load(remainder_ptr + offsets, mask=mask, other=0)
        bits = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
        values = bits.to(tl.float32, bitcast=True)
        master = (bits + remainder.to(tl.int32)).to(tl.float32, bitcast=True)
        return tl.where(master == master, master, values)
    else:
        return param.to(STATE_DTYPE)


@triton.jit
def split_master(master):
    """Return float32 masters rounded to bfloat16, and the last 16 bits of each, int16."""
    bits = master.to(tl.int32, bitcast=True)
    bits = tl.where(master == master, bits, tl.zeros_like(bits) + _NAN_BITS)
    rounded = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded, bits.to(tl.int16)


@triton.jit
def _bits_of(value):
    """Return the bits, int32, of the result of a float32 operation; adding 16 bits keeps a NaN one.

    CUDA's operations return one NaN, 0x7FFFFFFF. It is replaced by one that has no carry.
    """
    raw = value.to(tl.int32, bitcast=True)
    if INTERPRETED:
        # A CPU's operations return the NaN they are given: 32 ones would become 0.
        raw = tl.where(value == value, raw, raw & -0x10000)
    return tl.minimum(raw, tl.zeros_like(raw) + _NAN_BITS)


@triton.jit
def round_to_bfloat16(value, bits):
    """Round float32 to one of bfloat16's two neighbours; `bits` uint32 in [0, 2^16)."""
    raw = _bits_of(value).to(tl.uint32, bitcast=True) + bits
    return (raw >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def round_to_float16(value, bits):
    """Round float32 to one of float16's two neighbours; `bits` uint32 in [0, 2^16)."""
    # A float32 with float16's exponent, subnormal numbers included: the last bits are at one place.
    raw = _bits_of(value * 2.0**-112) + (bits & 0x1FFF).to(tl.int32)
    return ((raw & -0x2000).to(tl.float32, bitcast=True) * 2.0**112).to(tl.float16)
