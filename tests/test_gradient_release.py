"""Steps inside backward are the steps after it, without the gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused import AdamCG, AdamCM, AdamWCM, enable_gradient_release
from cm_fused._critical_adam import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.training import BACKENDS, KINDS, assert_same, trained

pytestmark = pytest.mark.sampled


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def _groups(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": model[0].parameters()},
        {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.03},
    ]


def _backward(model: nn.Module, t: int) -> Tensor:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(t))
    loss: Tensor = (model(inputs) - t % 3).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", [{}, {"buffer_dtype": torch.int8, "seed": 3}], ids=str)
@pytest.mark.parametrize("cls", [AdamCM, AdamWCM, AdamCG])
def test_steps_are_those_after_backward(
    cls: type[CriticalAdam], precision: dict[str, Any], backend: str
) -> None:
    """The same bits in parameters and state, a scheduler in between; no gradient is left."""
    runs = []
    for release in (True, False):
        model = _model()
        optimizer = cls(
            _groups(model), lr=0.01, priority_scope="tensor", backend=backend, **precision
        )
        if release:
            enable_gradient_release(model, optimizer)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for t in range(8):
            _backward(model, t)
            assert all((p.grad is None) == release for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"critical_test": 0.5}, {"kappa": 0}, {"weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("cls", [Adam_CM, Adam_C])
def test_steps_of_the_research_packages_optimizers(
    cls: type[CriticalAdam], options: dict[str, Any], backend: str
) -> None:
    """Theirs too are those after backward, the first one, which only stores, included.

    The older test had the four classes of the paper: these raised, or took no step.
    """
    runs = []
    for release in (True, False):
        model = _model()
        groups = [{**group, "backend": backend} for group in _groups(model)]
        optimizer = cls(groups, lr=0.01, synced=False, **options)  # type: ignore[call-arg]
        if release:
            enable_gradient_release(model, optimizer)
        for t in range(8):
            _backward(model, t)
            assert all((p.grad is None) == release for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])


def test_gradients_are_freed_within_backward() -> None:
    """When the first layer's gradient arrives, all that came before are gone."""
    model: Any = _model()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    enable_gradient_release(model, optimizer)
    left: list[int] = []
    model[0].weight.register_hook(
        lambda grad: left.append(sum(p.grad is not None for p in model[2:].parameters()))
    )
    _backward(model, 0)
    assert left == [0]


@pytest.mark.parametrize("cls", KINDS)
def test_removal(cls: type[CriticalAdam]) -> None:
    """After remove() the optimizer steps as ever, and it may be enabled again."""
    model = _model()
    optimizer = cls(model.parameters(), priority_scope="tensor")
    for _ in range(2):
        release = enable_gradient_release(model, optimizer)
        with pytest.raises(RuntimeError, match="enabled already"):
            enable_gradient_release(model, optimizer)
        _backward(model, 0)
        release.remove()
        before = [param.clone() for param in model.parameters()]
        _backward(model, 1)
        assert_same([param.detach() for param in model.parameters()], before)
        optimizer.step()
        optimizer.zero_grad()
        for param, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(param, old)


def test_copies_do_not_step_in_backward() -> None:
    """A deep copy of the optimizer steps as ever: the hooks are the model's."""
    model = _model()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    enable_gradient_release(model, optimizer)
    _backward(model, 0)
    copied = copy.deepcopy(optimizer)
    params = copied.param_groups[0]["params"]
    before = [param.clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    copied.step()
    assert not any(map(torch.equal, before, params))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority_scope": "tensor", "max_grad_norm": 1.0},
        {"priority_scope": "tensor", "skip_nonfinite": True},
        {"priority_scope": "tensor", "amp_scaling": True},
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused(options: dict[str, Any]) -> None:
    """Scope "group" and all that needs the norm of all raise, and say why."""
    model = _model()
    with pytest.raises(ValueError, match=r"gradient release needs .* known when all"):
        enable_gradient_release(model, AdamCM(model.parameters(), **options))


def test_a_parameter_of_another_model_is_refused() -> None:
    """A parameter that no backward of the model reaches would never be stepped."""
    optimizer = AdamCM(_model().parameters(), priority_scope="tensor")
    with pytest.raises(RuntimeError, match=r"params\[0\] of group 0 must be a parameter of the"):
        enable_gradient_release(_model(), optimizer)
