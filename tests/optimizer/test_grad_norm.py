"""The norm of the last step's gradients, as `grad_norm` returns it."""

import copy
import math
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from cm_fused import AdamCG, AdamCM, enable_gradient_release
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.support.training import (
    BACKENDS,
    KINDS,
    assert_same,
    give_gradients,
    new_optimizer,
    new_params,
    params_of,
    train,
    trained,
)

pytestmark = pytest.mark.sampled
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("cls", KINDS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"priority_scope": "tensor"},
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True, "weight_decay": 0.3},
    {"decoupled_weight_decay": True, "weight_decay": 0.3, "maximize": True},
)


def _norm(optimizer: CriticalAdam) -> float:
    grads = [p.grad for p in params_of(optimizer) if p.grad is not None]
    wide = torch.complex128 if grads[0].is_complex() else torch.float64
    return float(nn.utils.get_total_norm([grad.to(wide) for grad in grads]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@on_each_backend
@of_each_kind
def test_it_is_the_norm_before_clipping(
    cls: type[CriticalAdam], backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Over all groups in every scope, of the gradients that took part; asking changes nothing."""
    optimizer = new_optimizer(cls, dtype, backend=backend, **options)
    twin = new_optimizer(cls, dtype, backend=backend, **options)
    for t in range(6):
        for each in (optimizer, twin):
            give_gradients(each, t, without=[t % 5])
            each.step()
        norm = optimizer.grad_norm()
        assert (norm.shape, norm.dtype) == ((), torch.float64)
        assert norm.item() == pytest.approx(_norm(optimizer), rel=1e-7)
        optimizer.zero_grad()
        assert optimizer.grad_norm() == norm
    assert_same(trained(optimizer), trained(twin))


@on_each_backend
@of_each_kind
def test_the_l2_term_counts_as_in_the_keys(cls: type[CriticalAdam], backend: str) -> None:
    """Without clipping the norm is that of the keys: with scope "group" the newest one."""
    options: dict[str, Any] = {"weight_decay": 0.3, "priority_decay": 1.0, "backend": backend}
    optimizer = cls(new_params(), **options)
    for t in range(3):
        give_gradients(optimizer, t)
        effective = [cast(Tensor, p.grad) + 0.3 * p.detach() for p in params_of(optimizer)]
        optimizer.step()
        norm = optimizer.grad_norm().item()
        assert norm == pytest.approx(float(nn.utils.get_total_norm(effective)), rel=1e-6)
        keys = optimizer.state[params_of(optimizer)[0]]["priorities"]
        assert keys[t] == torch.tensor(norm, dtype=torch.float32)


@pytest.mark.parametrize("cls", [Adam_CM, Adam_C])
@pytest.mark.parametrize("synced", [True, False])
def test_norms_of_the_research_package(cls: Any, synced: bool) -> None:
    """The norm is that of all gradients, though its keys add norms up."""
    optimizer = cls(new_params(), synced=synced)
    train(optimizer, range(1))
    if cls is Adam_CM:  # whose first step only stores the gradients
        assert math.isnan(optimizer.grad_norm())
    give_gradients(optimizer, 1)
    optimizer.step()
    assert optimizer.grad_norm().item() == pytest.approx(_norm(optimizer), rel=1e-6)


@pytest.mark.parametrize("cls", KINDS)
def test_groups_of_several_backends(cls: type[CriticalAdam]) -> None:
    """Each backend has a part of the norm."""
    optimizer = new_optimizer(cls)
    for group, backend in zip(optimizer.param_groups, ("eager", "cpu"), strict=True):
        group["backend"] = backend
    for t in range(3):
        give_gradients(optimizer, t)
        optimizer.step()
        assert optimizer.grad_norm().item() == pytest.approx(_norm(optimizer), rel=1e-6)


@on_each_backend
@of_each_kind
def test_where_there_is_no_norm(cls: type[CriticalAdam], backend: str) -> None:
    """It is NaN before the first step, after a load and in a copy, and then it is there again."""
    optimizer = new_optimizer(cls, backend=backend)
    assert math.isnan(optimizer.grad_norm())
    train(optimizer, range(2))
    assert not math.isnan(optimizer.grad_norm())
    copied = copy.deepcopy(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, copied):
        assert math.isnan(each.grad_norm())
        give_gradients(each, 2)
        each.step()
        assert each.grad_norm().item() == pytest.approx(_norm(each), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@on_each_backend
def test_a_step_without_gradients(backend: str, options: dict[str, Any]) -> None:
    """Its norm is 0, with clipping and without.

    Older tests leave out single gradients, never all: without clipping the norm was NaN.
    """
    optimizer = new_optimizer(AdamCM, backend=backend, **options)
    train(optimizer, range(2))
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.grad_norm() == 0


@on_each_backend
def test_a_step_that_failed(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no norm: neither a part of one nor that of the step before."""
    optimizer = new_optimizer(AdamCM, backend=backend)
    for t in range(2):
        give_gradients(optimizer, t)
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_run_buckets", Mock(side_effect=InterruptedError))
            with pytest.raises(InterruptedError):
                optimizer.step()
        assert math.isnan(optimizer.grad_norm())
        optimizer.step()
        assert optimizer.grad_norm().item() == pytest.approx(_norm(optimizer), rel=1e-6)


@on_each_backend
def test_a_step_that_is_refused(backend: str) -> None:
    """A step that fails before it runs leaves no norm either.

    Older tests break a step inside, after its plan is found: a refused one left the last norm.
    """
    optimizer = new_optimizer(AdamCM, backend=backend)
    train(optimizer, range(2))
    first, second = params_of(optimizer)[:2]
    first.grad, second.grad = torch.ones_like(first).to_sparse(), None
    with pytest.raises(RuntimeError, match="must be dense"):
        optimizer.step()
    assert math.isnan(optimizer.grad_norm())


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@on_each_backend
@of_each_kind
def test_scaled_gradients(cls: type[CriticalAdam], backend: str, options: dict[str, Any]) -> None:
    """They are unscaled; of a step that the scaler has skipped there is no finite norm."""
    optimizer: Any = new_optimizer(cls, backend=backend, amp_scaling=True, **options)
    for found_inf in (0.0, 1.0, 0.0):
        give_gradients(optimizer, 0)
        expected = _norm(optimizer)
        for param in params_of(optimizer):
            param.grad = 1024 * cast(Tensor, param.grad)
        if found_inf:
            cast(Tensor, params_of(optimizer)[0].grad)[0, 0] = torch.inf
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found_inf)
        optimizer.step()
        norm = optimizer.grad_norm().item()
        assert not math.isfinite(norm) if found_inf else norm == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradient_release(backend: str) -> None:
    """Each parameter counts with the gradient that was freed in the backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    optimizer = AdamCM(model.parameters(), priority_scope="tensor", backend=backend)
    handle = enable_gradient_release(model, optimizer)
    for each in (model, twin):
        each(torch.ones(2, 3)).sum().backward()
    expected = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in twin.parameters()])
    torch.testing.assert_close(optimizer.grad_norm().float(), expected)
    handle.remove()
    assert math.isnan(optimizer.grad_norm())


@pytest.mark.parametrize(
    "refused", [{"max_grad_norm": 1.0}, {"adjust_lr_fn": "foo"}, {"capturable": True}], ids=str
)
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_step_that_is_refused_inside_backward(
    backend: str, steps_before: int, refused: dict[str, Any]
) -> None:
    """It leaves no norm until its parameter has been stepped: the others' alone is none.

    Older tests refuse steps outside of backward: the parameter counted with the gradient before.
    """
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    model = nn.ParameterList([first, second])
    groups = [{"params": [first]}, {"params": [second]}]
    optimizer = AdamCM(groups, priority_scope="tensor", backend=backend)
    enable_gradient_release(model, optimizer)
    for _ in range(steps_before):
        (3 * first.sum() + 4 * second.sum()).backward()  # type: ignore[no-untyped-call]
    first.sum().backward()  # type: ignore[no-untyped-call]
    group = optimizer.param_groups[1]
    good = {name: group[name] for name in refused}
    group.update(refused)
    with pytest.raises((ValueError, RuntimeError)):
        second.sum().backward()  # type: ignore[no-untyped-call]
    assert math.isnan(optimizer.grad_norm())
    group.update(good)
    (3 * first.sum() + 4 * second.sum()).backward()  # type: ignore[no-untyped-call]
    assert optimizer.grad_norm().item() == pytest.approx(75**0.5)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("cls", "backend"),
    [
        (AdamCM, "cpu"),
        (AdamCG, "eager"),
        # Each class and each backend once where there is little time.
        pytest.param(AdamCM, "eager", marks=pytest.mark.slow),
        pytest.param(AdamCG, "cpu", marks=pytest.mark.slow),
    ],
)
def test_a_step_that_is_traced(cls: type[CriticalAdam], backend: str) -> None:
    """It leaves no norm, and not that of a step before it either."""
    optimizer = new_optimizer(cls, shapes=((3, 4), ()), backend=backend)
    train(optimizer, range(1))
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for t in (1, 2, 3):
        give_gradients(optimizer, t)
        (optimizer.step if t == 2 else step)()
        assert math.isnan(optimizer.grad_norm()) == (t != 2)
