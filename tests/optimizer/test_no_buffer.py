"""A capacity of 0: no buffer, so that critical gradients are Adam, the control of an experiment.

The option matrix of `test_reference` and `test_parity` and the cases of `test_same_bits` have it
too. Here is what else changes without a buffer: state, checkpoints, norms.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW

from cm_fused import SAM, AdamCG, AdamCM, AdamWCG
from cm_fused._backends import library
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from cm_fused.diagnostics import Recorder
from tests.support.cases import needs_cpu_backend
from tests.support.release import assert_steps_are_those_after_backward, new_model
from tests.support.training import (
    BACKENDS,
    KINDS,
    assert_same,
    give_gradients,
    new_optimizer,
    new_params,
    params_of,
    snapshot,
    train,
    trained,
)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("cls", KINDS)
# As torch's classes have them by default.
TORCHS: dict[str, Any] = {"betas": (0.9, 0.999), "eps_inside_sqrt": False}
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}
# After 100 steps of lr 1e-2; torch contracts some products and sums to one operation.
BOUNDS = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-6)}


def _empty(cls: type[CriticalAdam], **options: Any) -> CriticalAdam:
    return new_optimizer(cls, capacity=0, **options)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True, "eps": 1e-3}],
    ids=str,
)
@pytest.mark.parametrize(("ours", "torchs"), [(AdamCG, Adam), (AdamWCG, AdamW)])
@on_each_backend
def test_critical_gradients_are_adam(
    ours: Any, torchs: Any, backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Parameters and moments are those of torch's class, to the rounding of many steps."""
    params, expected = new_params(dtype), new_params(dtype)
    optimizer = ours(params, lr=1e-2, capacity=0, backend=backend, **TORCHS, **options)
    reference = torchs(expected, lr=1e-2, **options)
    steps = range(100 if backend != "triton" else 8)  # whose kernels are interpreted
    train(optimizer, steps)
    train(reference, steps)
    rtol, atol = BOUNDS[dtype]
    torch.testing.assert_close(params, expected, rtol=rtol, atol=atol)
    for param, other in zip(params, expected, strict=True):
        state, wanted = optimizer.state[param], reference.state[other]
        assert state.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol)


@on_each_backend
@of_each_kind
def test_nothing_of_a_buffer_is_kept(cls: type[CriticalAdam], backend: str) -> None:
    """Neither in the state nor in checkpoints, whatever its options; a copy trains on."""
    options = {"buffer_dtype": "int8", "buffer_mean": "size", "backend": backend}
    optimizer = _empty(cls, **options)
    twin = _empty(cls, backend=backend)
    for each in (optimizer, twin):
        train(each, range(3))
    assert_same(trained(optimizer), trained(twin))
    assert all(optimizer.state[param].keys() == MOMENTS for param in params_of(optimizer))
    copied = copy.deepcopy(optimizer)
    resumed = _empty(cls, **options)
    resumed.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for param, own in zip(params_of(resumed), params_of(optimizer), strict=True):
            param.copy_(own)
    for each in (optimizer, copied, resumed):
        train(each, range(3, 6))
    assert_same(trained(copied), trained(optimizer))
    assert_same(trained(resumed), trained(optimizer))


@on_each_backend
def test_checkpoints_go_to_torch_and_back(backend: str) -> None:
    """AdamW loads what AdamWCG saves, and the other way round."""
    params = new_params()
    optimizer = AdamWCG(params, capacity=0, backend=backend, **TORCHS)
    reference = AdamW(new_params())
    train(reference, range(3))
    optimizer.load_state_dict(reference.state_dict())
    for param, other in zip(params, params_of(reference), strict=True):
        assert_same(dict(optimizer.state[param]), dict(reference.state[other]))
    train(optimizer, range(3, 5))
    theirs = AdamW(params)
    theirs.load_state_dict({**theirs.state_dict(), "state": optimizer.state_dict()["state"]})
    for param in params:
        assert_same(dict(theirs.state[param]), dict(optimizer.state[param]))


@of_each_kind
@pytest.mark.parametrize(("own", "saved"), [(0, 5), (5, 0)])
def test_another_capacity_is_refused(cls: type[CriticalAdam], own: int, saved: int) -> None:
    """As it is of any two capacities; a state that has a buffer is refused by its shape."""
    optimizer, other = new_optimizer(cls, capacity=own), new_optimizer(cls, capacity=saved)
    train(optimizer, range(2))
    train(other, range(2))
    before, state_dict = snapshot(optimizer), other.state_dict()
    with pytest.raises(ValueError, match=f"must have the capacity {own} of group 0, got {saved}"):
        optimizer.load_state_dict(state_dict)
    if own == 0:
        for group in state_dict["param_groups"]:
            group["capacity"] = 0
        with pytest.raises(ValueError, match=r"'critical_buffer'.*shape \(0, 3, 4\) \(capacity 0"):
            optimizer.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), before)
    for group in optimizer.param_groups:
        group["capacity"] = saved
    if own:
        with pytest.raises(RuntimeError, match="capacity must stay that of the state, 5, got 0"):
            train(optimizer, range(2, 3))


@on_each_backend
@of_each_kind
def test_resizing_to_nothing_and_back(cls: type[CriticalAdam], backend: str) -> None:
    """The buffer is gone, and what comes back is empty; the moments stay."""
    optimizer = new_optimizer(cls, capacity=3, backend=backend)
    train(optimizer, range(5))
    moments = [optimizer.state[p]["exp_avg"].clone() for p in params_of(optimizer)]
    optimizer.resize_buffer(0)
    assert all(optimizer.state[param].keys() == MOMENTS for param in params_of(optimizer))
    assert_same([optimizer.state[p]["exp_avg"] for p in params_of(optimizer)], moments)
    train(optimizer, range(5, 7))
    optimizer.resize_buffer(2)
    for state in optimizer.state_dict()["state"].values():
        assert not state["critical_buffer"].any()
    train(optimizer, range(7, 8))
    for state in optimizer.state_dict()["state"].values():
        assert (state["priorities"] > -torch.inf).tolist() == [True, False]
        assert state["step"] == 8


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}], ids=str)
@on_each_backend
@of_each_kind
def test_the_norm(cls: type[CriticalAdam], backend: str, options: dict[str, Any]) -> None:
    """Momenta have it from their pass; gradients only where clipping or skipping needs it."""
    optimizer = _empty(cls, backend=backend, **options)
    for t in range(3):
        give_gradients(optimizer, t)
        norm = nn.utils.get_total_norm([p.grad for p in params_of(optimizer) if p.grad is not None])
        optimizer.step()
        if options or cls is AdamCM:
            assert optimizer.grad_norm().item() == pytest.approx(float(norm), rel=1e-6)
        else:
            assert math.isnan(optimizer.grad_norm())


@of_each_kind
def test_groups_with_and_without(cls: type[CriticalAdam]) -> None:
    """Each group trains as it does by itself, on several backends at once, also with a closure."""

    def make(*capacities: int) -> CriticalAdam:
        backends = dict(zip((0, 3), ("cpu", "eager"), strict=True))
        groups = [
            {"params": new_params(), "capacity": capacity, "backend": backends[capacity]}
            for capacity in capacities
        ]
        return cls(groups, lr=1e-2)

    both = make(0, 3)
    singles = [make(0), make(3)]
    for t in range(6):
        for single in singles:
            give_gradients(single, t)
        grads = [p.grad for single in singles for p in params_of(single)]
        for param, grad in zip(params_of(both), grads, strict=True):
            param.grad = grad
        for each in (both, *singles):
            each.step(lambda: 1.0)
        known = torch.stack([single.grad_norm() for single in singles]).square().sum().sqrt()
        torch.testing.assert_close(both.grad_norm(), known, equal_nan=True)
    expected = [value for single in singles for value in trained(single)["params"]]
    assert_same(trained(both)["params"], expected)


@on_each_backend
@of_each_kind
def test_a_step_that_fails_or_is_skipped_changes_nothing(
    cls: type[CriticalAdam], backend: str
) -> None:
    """By amp's mark, a gradient that is not finite, or a gradient of another shape."""
    optimizer = _empty(cls, backend=backend, skip_nonfinite=True, amp_scaling=True)
    train(optimizer, range(2))
    before = trained(optimizer)
    for grad_value, found_inf in ((torch.nan, 0.0), (1.0, 1.0)):
        give_gradients(optimizer, 2)
        grad = params_of(optimizer)[-1].grad
        assert grad is not None
        grad[0] = grad_value
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(found_inf)  # type: ignore[attr-defined]
        optimizer.step()
        assert_same(trained(optimizer), before)


@on_each_backend
@of_each_kind
def test_gradient_release_and_sam(cls: type[CriticalAdam], backend: str) -> None:
    """Stepping inside backward and SAM are those of any capacity."""

    def make() -> tuple[nn.Module, CriticalAdam]:
        model = new_model()
        options: dict[str, Any] = {"capacity": 0, "priority_scope": "tensor", "backend": backend}
        return model, cls(model.parameters(), lr=1e-2, **options)

    assert_steps_are_those_after_backward(make)
    model, optimizer = make()
    sam = SAM(optimizer)
    inputs = torch.ones(2, 4)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        return float(loss.detach())

    losses = [sam.step(closure) for _ in range(5)]
    assert losses[-1] < losses[0]


@of_each_kind
def test_diagnostics(cls: type[CriticalAdam]) -> None:
    """Norms and moves of a control are recorded; what is of a buffer does not exist."""
    optimizer = _empty(cls)
    with Recorder(optimizer) as recorder:
        train(optimizer, range(3))
    for numbers in recorder.last.values():
        assert numbers["filled"] == numbers["mean_norm"] == 0.0
        of_a_buffer = ("variance", "agreement", "mean_age", "max_age", "admission_rate")
        assert all(math.isnan(numbers[name]) for name in of_a_buffer)
    numbers = recorder.last["all"]
    assert numbers["momentum_norm"] > 0 < numbers["distance"]
    assert numbers["update_rms"] > 0
    if cls is AdamCM:
        assert numbers["aggregate_norm"] == pytest.approx(numbers["momentum_norm"])


@pytest.mark.parametrize("cls", [Adam_CM, Adam_C])
@pytest.mark.parametrize("synced", [True, False])
def test_the_research_packages_classes(cls: Any, synced: bool) -> None:
    """They want a slot, and train on once it was taken from them: as with kappa=0."""
    options: dict[str, Any] = {"synced": synced, "critical_test": 0.5}
    optimizer, other = (cls(new_params(), kappa=kappa, **options) for kappa in (1, 0))
    for each in (optimizer, other):
        each.resize_buffer(0)
        train(each, range(5))
    if cls is Adam_C:
        assert_same(trained(optimizer), trained(other))
    assert all(optimizer.state[param]["step"] == 5 for param in params_of(optimizer))


@needs_cpu_backend
def test_rows_of_a_part_of_a_buffer_are_refused() -> None:
    """The operator wants all rows of a buffer or none, and pending slots of momenta alone."""
    optimizer = new_optimizer(AdamCM, capacity=2, backend="cpu", shapes=((3,),))
    train(optimizer, range(1))
    (param,) = params_of(optimizer)
    state = {key: [value] for key, value in optimizer.state[param].items()}
    for missing, message in (
        ("critical_buffer", "critical_buffers must have one tensor"),
        ("pending_slot", "pending_slots must be given for the buffers of critical momenta"),
    ):
        part = {key: value for key, value in state.items() if key != missing}
        registered = library.RegisteredState(part)
        numbers = [0.0] * len(torch.ops.cm_fused.hyperparameter_names().split(","))
        with pytest.raises(RuntimeError, match=message):
            torch.ops.cm_fused.step_registered_(
                [registered.id],
                [param.detach()],
                [param.grad],
                [],
                [],
                [],
                [],
                None,
                hyperparameters=numbers,
                seeds=[0],
            )
