"""Scales on GPUs: quotients and inverses, rounded as IEEE's, without a look at the range's ends."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from cm_fused._backends.triton import scales
from cm_fused.rounding import SCALE_BITS
from tests.support.cases import needs_triton

pytestmark = [
    needs_triton,
    # Older interpreters round a fused multiply-add twice.
    pytest.mark.skipif(
        not scales.INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
        reason="the interpreter has to round fused multiply-adds once",
    ),
]
SIZE = 2**18


@triton.jit
def _quotients(x_ptr, quotients_ptr, divisor: tl.constexpr, n: tl.constexpr):
    places = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(quotients_ptr + places, scales._quotient(tl.load(x_ptr + places), divisor))


@triton.jit
def _inverses(x_ptr, inverses_ptr, n: tl.constexpr):
    places = tl.program_id(0) * n + tl.arange(0, n)
    tl.store(inverses_ptr + places, scales._inverse(tl.load(x_ptr + places)))


@pytest.fixture(autouse=True)
def _as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "INTERPRETED", tl.constexpr(False))


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("divisor", [7.0, 127.0, 448.0])
@pytest.mark.parametrize(("exponent", "step"), [(27, 64), (127, 1), (254, 64)])
def test_quotients_are_rounded_correctly(divisor: float, exponent: int, step: int) -> None:
    """So they are for every number of one power of two, and for some at both ends of the range."""
    largest = _floats(torch.arange(0, 2**23, step) | exponent << 23)
    quotients = torch.empty_like(largest)
    n = min(SIZE, len(largest))
    _quotients[(len(largest) // n,)](largest, quotients, divisor, n)
    assert torch.equal(quotients, largest / torch.full_like(largest, divisor))


@pytest.mark.parametrize("error", [-2, -1, 0, 1, 2])
def test_inverses_are_rounded_correctly(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they are for every scale there is, if the inverse root is off by two last places."""

    def inverse_root(_: object, arg: interpreter.TensorHandle) -> interpreter.TensorHandle:
        roots = (1 / np.sqrt(arg.data.astype(np.float64))).astype(np.float32)
        return interpreter.TensorHandle((roots.view(np.int32) + error).view(np.float32), arg.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_rsqrt", inverse_root)
    # The first exponent is that of 2^-100 / 448, the last that of the largest number / 7.
    exponents = torch.arange(18, 253).unsqueeze(1) << 23
    given = _floats(exponents | torch.arange(0, 2**23, -SCALE_BITS)).flatten()
    given = torch.nn.functional.pad(given, (0, -len(given) % SIZE), value=1.0)
    inverses = torch.empty_like(given)
    _inverses[(len(given) // SIZE,)](given, inverses, SIZE)
    assert torch.equal(inverses, 1 / given)
