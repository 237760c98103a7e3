"""Gradients of float32 parameters in bfloat16 or float16: they step as `grad.float()` does.

Every bit of parameters, state and norms is compared. Other mismatches of dtypes are in
`test_errors`, the fused backends' layouts beside each other in `test_same_bits`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused import SAM, AdamCM, enable_gradient_release
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.rounding import HALF_DTYPES
from tests.support.cases import CHUNK, skip_if
from tests.support.release import backward, new_model
from tests.support.training import (
    BACKENDS,
    KINDS,
    assert_same,
    gradient,
    new_optimizer,
    params_of,
    set_gradient,
    snapshot,
    train,
    trained,
)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("cls", KINDS)
in_each_precision = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
# A tensor without dimensions, a tail, and chunks of the fused passes that are full.
SHAPES = ((), (3, 5), (CHUNK_SIZE,), (CHUNK + 7,))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"capacity": 0},
    {"maximize": True, "weight_decay": 0.1, "priority_scope": "tensor"},
    {"max_grad_norm": 0.5, "skip_nonfinite": True, "amp_scaling": True},
    {"buffer_dtype": "int8", "moment_dtype": "bfloat16", "buffer_mean": "size"},
    {"moment_dtype": "int8", "amsgrad": True},
)


def _strided(grad: Tensor, t: int) -> Tensor:
    """Return a gradient that lies in memory as it is, transposed, or at an odd address."""
    if t % 3 == 1 and grad.ndim == 2:
        return grad.T.contiguous().T
    if t % 3 == 2:
        return grad.new_empty(grad.numel() + 1)[1:].view(grad.shape).copy_(grad)
    return grad


class Twins:
    """Two optimizers, the first with gradients of lower precision, the other with float32."""

    def __init__(self, cls: Any, **options: Any) -> None:
        self.lower, self.other = (new_optimizer(cls, shapes=SHAPES, **options) for _ in range(2))
        self.amp_scaling = options.get("amp_scaling", False)

    def step(self, t: int, *dtypes: torch.dtype) -> None:
        """Step both, the parameters' gradients in these dtypes in turn; float32 is as it is."""
        pairs = list(zip(params_of(self.lower), params_of(self.other), strict=True))
        for i, (param, other) in enumerate(pairs):
            grad = _strided(gradient(t, i, param).to(dtypes[i % len(dtypes)]), t)
            set_gradient(param, grad)
            other.grad = grad.float()
        for optimizer in (self.lower, self.other):
            if self.amp_scaling:
                optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(float(t == 2))  # type: ignore[attr-defined]
            optimizer.step()
        for param, other in pairs:
            assert param.grad is not None
            assert_same(param.grad.float(), other.grad)  # which a step never writes
        assert_same(trained(self.lower), trained(self.other), f"step {t}")
        assert_same(self.lower.grad_norm(), self.other.grad_norm())


@pytest.mark.sampled
@in_each_precision
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_each_backend
@of_each_kind
def test_they_are_read_as_they_are(
    cls: type[CriticalAdam], backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Aligned or not and in any strides, a step has the bits of one with float32 gradients."""
    twins = Twins(cls, backend=backend, **{"capacity": 2, **options})
    for t in range(4):
        twins.step(t, dtype)


@on_each_backend
@of_each_kind
def test_dtypes_that_change_and_differ(cls: type[CriticalAdam], backend: str) -> None:
    """From step to step and from tensor to tensor; the plans of the steps before are still used."""
    twins = Twins(cls, backend=backend, capacity=2)
    bfloat16, float16, float32 = *HALF_DTYPES, torch.float32
    steps = ((float32,), (bfloat16,), (bfloat16, float32), (float16, bfloat16), (float32,))
    for t, dtypes in enumerate(steps):
        twins.step(t, *dtypes)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
def test_a_larger_dtype_at_the_same_address_is_looked_at(backend: str) -> None:
    """Memory that holds a gradient of 2 bytes an element is too short for one of 4."""
    optimizer = AdamCM([nn.Parameter(torch.ones(8))], backend=backend)
    (param,) = params_of(optimizer)
    memory = torch.ones(16, dtype=torch.bfloat16)
    set_gradient(param, memory[:8])
    optimizer.step()
    before = snapshot(optimizer)
    param.grad = memory.view(torch.float32)
    memory.untyped_storage().resize_(16)
    with pytest.raises(RuntimeError, match="must have its memory"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("param", "grad"),
    [
        *((half, torch.float32) for half in HALF_DTYPES),
        *(HALF_DTYPES, HALF_DTYPES[::-1]),
        *((torch.float64, lower) for lower in (torch.float32, *HALF_DTYPES)),
        (torch.complex64, torch.bfloat16),
    ],
    ids=str,
)
@on_each_backend
@of_each_kind
def test_no_other_mismatch_is_accepted(
    cls: type[CriticalAdam], backend: str, param: torch.dtype, grad: torch.dtype
) -> None:
    """It is an error before any parameter is touched, also where a plan is there."""
    optimizer = new_optimizer(cls, param, backend=backend)
    for steps in (range(0), range(2)):
        train(optimizer, steps)
        before, last = snapshot(optimizer), params_of(optimizer)[-1]
        set_gradient(last, torch.ones(last.shape, dtype=grad))
        with pytest.raises(RuntimeError, match=f"dtype {param} .*; convert .*got {grad}"):
            optimizer.step()
        assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("adaptive", [False, True])
@in_each_precision
def test_sam(dtype: torch.dtype, adaptive: bool) -> None:
    """The ascent is computed in float32 too."""
    runs = []
    for lower in (True, False):
        optimizer = new_optimizer(AdamCM, capacity=2)
        sam = SAM(optimizer, adaptive=adaptive)

        def give(t: int, of: Any = optimizer, in_lower: bool = lower) -> None:
            for i, param in enumerate(params_of(of)):
                grad = gradient(t, i, param).to(dtype)
                set_gradient(param, grad if in_lower else grad.float())

        for t in range(0, 6, 2):
            give(t)
            sam.first_step()
            give(t + 1)
            sam.second_step()
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])


@skip_if(None if hasattr(Tensor, "grad_dtype") else "this torch has no Tensor.grad_dtype")
@on_each_backend
@of_each_kind
def test_autograds_own(cls: type[CriticalAdam], backend: str) -> None:
    """`Tensor.grad_dtype`: after backward, within it with gradient release, with a closure."""
    runs = []
    for release in (True, False):
        model = new_model()
        for param in model.parameters():
            param.grad_dtype = torch.bfloat16
        options: dict[str, Any] = {"capacity": 2, "priority_scope": "tensor", "backend": backend}
        optimizer = cls(model.parameters(), lr=1e-2, **options)
        if release:
            enable_gradient_release(model, optimizer)
        for t in range(5):
            loss = backward(model, t)
            assert all((p.grad is None) == release for p in model.parameters())
            assert release or all(p.grad.dtype is torch.bfloat16 for p in model.parameters())
            optimizer.step(lambda loss=loss: float(loss.detach()))  # type: ignore[misc]
            optimizer.zero_grad()
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])
