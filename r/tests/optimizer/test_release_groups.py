"""Gradient release steps with the groups that the optimizer has when it steps.

The older tests neither changed nor added a group after enabling, except its learning rate.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused import AdamCM, enable_gradient_release
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_CM
from tests.support.release import (
    Step,
    assert_steps_are_those_after_backward,
    backward,
    new_model,
    values,
)
from tests.support.training import BACKENDS, assert_same, snapshot, trained

# Random bits depend on a parameter's place among all: a change of groups changes them.
STOCHASTIC: dict[str, Any] = {"moment_dtype": torch.int8, "seed": 3}


def _make(
    options: dict[str, Any], backend: str | None = None
) -> Callable[[], tuple[nn.Module, CriticalAdam]]:
    def make() -> tuple[nn.Module, CriticalAdam]:
        model = new_model()
        groups = [
            {"params": model[0].parameters()},
            {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.03},
        ]
        kwargs = {"lr": 0.01, "priority_scope": "tensor", "backend": backend, **options}
        return model, AdamCM(groups, **kwargs)

    return make


def _load(_: Any, optimizer: CriticalAdam) -> None:
    """As `accelerate.prepare` does."""
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.2


def _load_other_options(_: Any, optimizer: CriticalAdam) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["lr"] = 0.2
    saved["param_groups"][0]["betas"] = (0.5, 0.6)
    optimizer.load_state_dict(saved)


def _assign(_: Any, optimizer: CriticalAdam) -> None:
    optimizer.param_groups = [{**group, "lr": 0.2} for group in optimizer.param_groups]


def _set_options(_: Any, optimizer: CriticalAdam) -> None:
    optimizer.param_groups[0].update(betas=(0.5, 0.6), lr=0.2, weight_decay=0.1, amsgrad=True)


def _set_backend(_: Any, optimizer: CriticalAdam) -> None:
    optimizer.param_groups[1]["backend"] = "eager"


def _resize(_: Any, optimizer: CriticalAdam) -> None:
    optimizer.resize_buffer(2)


def _move(_: Any, optimizer: CriticalAdam) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    first.append(second.pop(0))
    second.reverse()


def _move_in_front(_: Any, optimizer: CriticalAdam) -> None:
    """The second group's parameters keep their places in it."""
    first, second = (group["params"] for group in optimizer.param_groups)
    first.insert(0, second.pop())


def _remove(_: Any, optimizer: CriticalAdam) -> None:
    for param in optimizer.param_groups.pop(0)["params"]:
        del optimizer.state[param]


def _replace_data(model: Any, _: CriticalAdam) -> None:
    for param in model.parameters():
        param.data = 2 * param.data.clone()


def _replace_state(_: Any, optimizer: CriticalAdam) -> None:
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].clone()
        state["priorities"] = state["priorities"].clone()


def _replace_param(model: Any, optimizer: CriticalAdam) -> None:
    """As a layer that is resized: the model and the optimizer get another parameter."""
    del optimizer.state[model[4].weight]
    model[4].weight = nn.Parameter(torch.ones(1, 5))
    optimizer.param_groups[1]["params"][2] = model[4].weight


def _add_group(model: Any, optimizer: CriticalAdam) -> None:
    model.append(nn.Tanh())
    model.append(nn.Linear(1, 1))
    optimizer.add_param_group({"params": model[6].parameters(), "lr": 0.1})


CHANGES = [
    *(_load, _load_other_options, _assign, _set_options, _set_backend, _resize, _move),
    *(_move_in_front, _remove, _replace_data, _replace_state, _replace_param, _add_group),
]


@pytest.mark.sampled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, STOCHASTIC], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_count(
    change: Callable[[Any, CriticalAdam], None], options: dict[str, Any], backend: str
) -> None:
    """A user loads, schedules, resizes, moves, replaces or adds in the middle of training."""

    def train(model: nn.Module, optimizer: CriticalAdam, step: Step) -> None:
        for t in range(8):
            if t == 4:
                change(model, optimizer)
            step(t)

    assert_steps_are_those_after_backward(_make(options, backend), train)


def test_a_scheduler_counts_after_loading() -> None:
    """The learning rate fell in the groups that loading had replaced, and stayed in the steps."""

    def train(_: nn.Module, optimizer: CriticalAdam, step: Step) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        step(0)
        optimizer.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        for t in range(1, 6):
            step(t)
            scheduler.step()

    assert_steps_are_those_after_backward(_make({}), train)


NEEDS_ALL: list[dict[str, Any]] = [
    {"priority_scope": "group"},
    {"max_grad_norm": 1.0},
    {"skip_nonfinite": True},
]


@pytest.mark.parametrize("options", NEEDS_ALL, ids=str)
def test_loading_what_needs_all_gradients_changes_nothing(options: dict[str, Any]) -> None:
    """A checkpoint of a run without gradient release has options that it cannot serve."""
    model, optimizer = _make({})()
    enable_gradient_release(model, optimizer)
    backward(model, 0)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group.update(options, lr=0.5)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"gradient release needs .* group 0"):
        optimizer.load_state_dict(saved)
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("options", [*NEEDS_ALL, {"amp_scaling": True}], ids=str)
def test_setting_what_needs_all_gradients_changes_nothing(options: dict[str, Any]) -> None:
    """An option is set in a group: the next forward pass raises, or without one, backward."""
    model, optimizer = _make({})()
    enable_gradient_release(model, optimizer)
    backward(model, 0)
    loss = model(torch.ones(2, 4)).sum()
    optimizer.param_groups[1].update(options)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"gradient release needs .* group 1"):
        backward(model, 1)
    with pytest.raises(ValueError, match=r"gradient release needs .* group 1"):
        loss.backward()
    assert_same(snapshot(optimizer), before)
    with torch.no_grad():
        model(torch.ones(2, 4))  # evaluation goes on


def _of_another_model() -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.ones(3))]}


@pytest.mark.parametrize("cls", [AdamCM, Adam_CM])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"priority_scope": "group"}, ValueError, "gradient release needs priority_scope"),
        ({"max_grad_norm": 1.0}, ValueError, "gradient release needs max_grad_norm"),
        (_of_another_model(), RuntimeError, r"params\[0\] of group 1 must be a parameter of the"),
    ],
    ids=["scope", "clipping", "another model"],
)
def test_a_group_that_cannot_be_served_is_not_added(
    cls: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A group added later was neither trained nor refused."""
    model = new_model()
    scope: dict[str, Any] = {"synced": False} if cls is Adam_CM else {"priority_scope": "tensor"}
    optimizer = cls(model[0].parameters(), **scope)
    enable_gradient_release(model, optimizer)
    backward(model, 0)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": [model[2].weight, model[2].bias], **change})
    assert_same(snapshot(optimizer), before)
    assert not model[2].weight._post_accumulate_grad_hooks
    optimizer.add_param_group({"params": model[2].parameters()})
    weight = model[2].weight.detach().clone()
    for t in range(2):
        backward(model, t)
    assert not torch.equal(model[2].weight, weight)


def test_a_parameter_in_no_group_keeps_its_gradient() -> None:
    """It is taken out of its group between forward and backward: a step would pass over it."""
    model: Any
    model, optimizer = _make({})()
    enable_gradient_release(model, optimizer)
    loss = model(torch.ones(2, 4)).sum()
    taken = optimizer.param_groups[1]["params"].pop(0)
    before = taken.detach().clone()
    loss.backward()
    assert taken.grad is not None
    assert torch.equal(taken, before)
    assert model[4].weight.grad is None


def test_an_error_names_the_parameter() -> None:
    """A gradient that is refused was always that of parameter 0 of the group."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.table = nn.Embedding(3, 2, sparse=True)

        def forward(self, words: Tensor) -> Tensor:
            out: Tensor = self.linear(self.table(words))
            return out

    model = Words()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    enable_gradient_release(model, optimizer)
    table = model.table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="the gradient of parameter 2 of group 0 must be dense"):
        model(torch.tensor([0, 2])).sum().backward()
    assert torch.equal(model.table.weight, table)
    assert model.table.weight not in optimizer.state
    assert model.table.weight.grad is None


def test_a_capacity_set_without_resizing_changes_nothing() -> None:
    """The slots that are there do not fit: the parameter is as it was, and so is its state."""
    model, optimizer = _make({})()
    enable_gradient_release(model, optimizer)
    backward(model, 0)
    optimizer.param_groups[0]["capacity"] = 7
    optimizer.param_groups[1]["capacity"] = 7
    before = trained(optimizer), values(model)
    with pytest.raises((RuntimeError, ValueError)):
        backward(model, 1)
    assert_same((trained(optimizer), values(model)), before)
