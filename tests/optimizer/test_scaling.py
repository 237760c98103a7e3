"""Gradients that a step unscales and clips itself, and steps that it skips."""

import copy
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from cm_fused import AdamCM
from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import (
    BACKENDS,
    CLASSES,
    KINDS,
    assert_close,
    assert_same,
    give_gradients,
    new_optimizer,
    params_of,
    snapshot,
    train,
    trained,
)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("cls", KINDS)
pytestmark = pytest.mark.sampled

DTYPES = (torch.float32, torch.float64, torch.complex64)
L2: dict[str, Any] = {"weight_decay": 0.3, "maximize": True, "amsgrad": True}


def _twins(cls: type[CriticalAdam], own: dict[str, Any], **options: Any) -> list[CriticalAdam]:
    """Return an optimizer with options of its own beside one without."""
    return [new_optimizer(cls, **options, **more) for more in (own, {})]


# Clipping


@on_each_backend
@pytest.mark.parametrize(
    ("dtype", "options"), [*((dtype, {}) for dtype in DTYPES), (torch.float32, L2)], ids=str
)
@pytest.mark.parametrize("scope", ["group", "tensor"])
@of_each_kind
def test_clipping_is_clip_grad_norm(
    cls: type[CriticalAdam], scope: str, dtype: torch.dtype, options: dict[str, Any], backend: str
) -> None:
    """max_grad_norm is clip_grad_norm_ over all groups before the step, keys included.

    The norm is that of the gradients, not of the L2 term. Some steps' norm is below the bound. Half
    precision is not here: clip_grad_norm_ rounds what it clips, and the norm.
    """
    options = {"priority_scope": scope, "backend": backend, **options}
    ours, theirs = _twins(cls, {"max_grad_norm": 3.0}, dtype=dtype, **options)
    for t in range(9):
        for optimizer in (ours, theirs):
            give_gradients(optimizer, t, without=[t % 5])
        before = [None if p.grad is None else p.grad.clone() for p in params_of(ours)]
        nn.utils.clip_grad_norm_(params_of(theirs), 3.0)
        ours.step()
        theirs.step()
        assert_same([p.grad for p in params_of(ours)], before)
    assert_close(trained(ours), trained(theirs))


@on_each_backend
def test_bounds_of_groups(backend: str) -> None:
    """A group without a bound is not clipped; the norm is over all groups all the same."""
    ours, theirs = _twins(AdamCM, {}, backend=backend)
    ours.param_groups[1]["max_grad_norm"] = 0.1
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 1)
    norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in params_of(theirs)])
    for param in theirs.param_groups[1]["params"]:
        param.grad *= 0.1 / (norm + 1e-6)
    ours.step()
    theirs.step()
    assert_close(trained(ours), trained(theirs))


@on_each_backend
def test_a_norm_that_is_not_finite_is_as_torch_has_it(backend: str) -> None:
    """Without skip_nonfinite an infinite norm makes zeros and NaN, as clip_grad_norm_ does."""
    ours, theirs = _twins(AdamCM, {"max_grad_norm": 1.0}, backend=backend)
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 0)
        cast(Tensor, params_of(optimizer)[0].grad)[0, 0] = torch.inf
    nn.utils.clip_grad_norm_(params_of(theirs), 1.0)
    ours.step()
    theirs.step()
    for mine, other in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)


# Skipping


@on_each_backend
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.int8}),
        (torch.bfloat16, {"low_precision_update": "kahan"}),
        (torch.bfloat16, {"low_precision_update": "split"}),
    ],
    ids=str,
)
@of_each_kind
def test_skip_nonfinite(
    cls: type[CriticalAdam], dtype: torch.dtype, options: dict[str, Any], value: float, backend: str
) -> None:
    """A step whose norm is not finite changes nothing, scales included, and is counted."""
    optimizer = new_optimizer(cls, dtype, backend=backend, skip_nonfinite=True, **options)
    train(optimizer, range(5))
    give_gradients(optimizer, 5)
    cast(Tensor, params_of(optimizer)[-1].grad)[0] = value
    before = snapshot(optimizer)
    optimizer.step()
    after = snapshot(optimizer)
    for groups in (before["groups"], after["groups"]):
        counts = [group.pop("skipped_steps").item() for group in groups]
        assert counts == ([0, 0] if groups is before["groups"] else [1, 1])
    assert_same(after, before)
    train(optimizer, range(6, 9))
    twin = new_optimizer(cls, dtype, backend=backend, **options)
    train(twin, [*range(5), *range(6, 9)])
    assert_same(trained(optimizer), trained(twin))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "triton"])
def test_a_count_survives_a_checkpoint(backend: str) -> None:
    """skipped_steps is saved with the group's options and goes on."""
    optimizer = new_optimizer(AdamCM, backend=backend, skip_nonfinite=True)
    for _ in range(2):
        give_gradients(optimizer, 0)
        cast(Tensor, params_of(optimizer)[0].grad)[0, 0] = torch.nan
        optimizer.step()
    other = new_optimizer(AdamCM, backend=backend, skip_nonfinite=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    params_of(other)[0].grad = torch.full((3, 4), torch.nan)
    other.step()
    assert [group["skipped_steps"].item() for group in other.param_groups] == [3, 3]
    assert [group["skipped_steps"].item() for group in optimizer.param_groups] == [2, 2]


# GradScaler


class _Run:
    """A model of float32 under a gradient scaler."""

    def __init__(self, cls: type[CriticalAdam], **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer = cls(self.model.parameters(), lr=0.01, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def step(self, t: int, *, unscale: bool = False, clip: float | None = None) -> None:
        """Step with the scaler; steps 2 and 5 overflow."""
        generator = torch.Generator().manual_seed(t)
        inputs = torch.randn(8, 5, generator=generator)
        self.optimizer.zero_grad()
        loss = (self.model(inputs) - t).square().mean()
        self.scaler.scale(loss * (torch.inf if t in (2, 5) else 1)).backward()
        if unscale:
            self.scaler.unscale_(self.optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def seen(self) -> dict[str, Any]:
        """Return what a run leaves, and the scale."""
        return {**trained(self.optimizer), "scale": self.scaler.get_scale()}


@on_each_backend
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_grad_scaler(cls: type[CriticalAdam], unscale: bool, backend: str) -> None:
    """Unscaling in the step is the scaler's own, to the bit: scales are powers of two.

    So are the steps that overflow: they change nothing, of keys and step counts either.
    """
    ours, theirs = (_Run(cls, backend=backend, amp_scaling=on) for on in (True, False))
    for t in range(8):
        ours.step(t, unscale=unscale)
        theirs.step(t)
        assert_same(ours.seen(), theirs.seen())


@on_each_backend
def test_grad_scaler_with_clipping(backend: str) -> None:
    """Unscaling, clipping and skipping in one step are those three before it."""
    ours = _Run(AdamCM, backend=backend, amp_scaling=True, max_grad_norm=0.5)
    theirs = _Run(AdamCM, backend=backend)
    for t in range(8):
        ours.step(t)
        theirs.step(t, unscale=True, clip=0.5)
    mine, expected = ours.seen(), theirs.seen()
    assert mine.pop("scale") == expected.pop("scale")
    assert_close(mine, expected)


def test_amp_scaling_is_opt_in() -> None:
    """Torch asks an attribute; copies and pickles keep the answer, checkpoints do not bring it."""
    off, on = (new_optimizer(AdamCM, amp_scaling=value) for value in (False, True))
    assert not off._step_supports_amp_scaling
    for same in (on, copy.deepcopy(on), pickle.loads(pickle.dumps(on))):
        assert same._step_supports_amp_scaling
    off.load_state_dict(on.state_dict())
    assert not off._step_supports_amp_scaling


def test_amp_scaling_is_the_optimizers() -> None:
    """A group cannot have its own: the scaler steps the optimizer as a whole."""
    optimizer = AdamCM([torch.ones(2, requires_grad=True)])
    with pytest.raises(ValueError, match="amp_scaling must be the same for all param groups"):
        optimizer.add_param_group({"params": [torch.ones(3)], "amp_scaling": True})
    assert len(optimizer.param_groups) == 1
