"""A step of many elements stores momenta past the caches: the bits are those of a small step.

Small steps store them as other tests compare with the reference. Here a large parameter repeats a
small one, so that its buffer admits the same steps: norms differ by a power of two.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
from tests.support.cases import ROOT, capability_params, needs_cpu_backend
from tests.support.training import SCALES

pytestmark = needs_cpu_backend

SMALL = 2**19
REPEATS = 16
# What stands in the same step, whose slots begin within cache lines and which no tile divides.
ODD = 12_345
# kNumelPastCache in csrc/cpu/step.h.
assert SMALL * REPEATS == 2**23

CASES: dict[str, tuple[type[AdamCM | AdamCG], dict[str, Any]]] = {
    "int8": (AdamCM, {"buffer_dtype": torch.int8}),
    "int8, rounded moments": (
        AdamCM,
        {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16},
    ),
    "int8, int8 moments": (AdamCM, {"buffer_dtype": torch.int8, "moment_dtype": torch.int8}),
    "bfloat16": (AdamCM, {"buffer_dtype": torch.bfloat16, "capacity": 3}),
    "float8": (AdamCM, {"buffer_dtype": torch.float8_e4m3fn}),
    "float32": (AdamCM, {"capacity": 2}),
    "critical gradients": (AdamCG, {"buffer_dtype": torch.int8}),
}


def _trained(name: str, repeats: int) -> list[dict[str, Tensor]]:
    """Return both parameters and their state after steps that fill and replace slots."""
    cls, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in (SMALL, ODD)]
    grad, odd_grad = (torch.randn(n, generator=generator) for n in (SMALL, ODD))
    params = [values[0].repeat(repeats), values[1]]
    optimizer = cls(params, priority_scope="tensor", **options)
    for scale in SCALES:
        params[0].grad = (scale * grad).repeat(repeats)
        params[1].grad = scale * odd_grad
        optimizer.step()
        grad, odd_grad = grad.roll(1), odd_grad.roll(1)
    optimizer.state_dict()  # commits
    return [{"param": param.detach(), **optimizer.state[param]} for param in params]


@pytest.mark.parametrize("name", CASES)
def test_large_step(name: str) -> None:
    """The large parameter begins as the small one goes, with its random bits and its scales."""
    large, small = _trained(name, REPEATS), _trained(name, 1)
    for key, expected in small[0].items():
        if expected.ndim > 0 and key != "priorities":
            assert torch.equal(large[0][key][..., : expected.shape[-1]], expected), key
    for key, expected in small[1].items():
        assert torch.equal(large[1][key], expected), key


@pytest.mark.slow
@pytest.mark.parametrize("capability", capability_params())
def test_instruction_sets(capability: str) -> None:
    """So it is with every instruction set: each has tiles of its own."""
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_large_step"],
        env={**os.environ, "CM_FUSED_CPU_CAPABILITY": capability},
        cwd=ROOT,
        check=True,
    )
