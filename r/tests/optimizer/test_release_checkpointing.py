"""Gradient release steps each parameter once in a backward pass, whatever passes run within it.

The older tests had no checkpointing: a module that reentrant checkpoints share took a step for
each of them, with a part of its gradient.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from cm_fused import AdamCM, enable_gradient_release
from cm_fused._optimizer.base import CriticalAdam
from tests.support.release import (
    Step,
    assert_steps_are_those_after_backward,
    backward,
    inputs,
    loss_of,
    new_model,
    values,
)
from tests.support.training import assert_same, trained

# torch says so of a checkpoint within a checkpoint, and without gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")

Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Layers that a function of the test calls."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.layers = new_model()
        self.shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        """Call the function."""
        return self._forward(self, x)


def _reentrant(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def _shared(net: Net, x: Tensor) -> Any:
    x = net.shared[0](x)
    for _ in range(3):
        x = _reentrant(net.shared, x)
    return net.layers(x)


def _shared_and_called(net: Net, x: Tensor) -> Any:
    """The outer pass has the gradient of the last call before the checkpoint computes again."""
    x = _reentrant(net.shared, x.requires_grad_())
    return net.layers(net.shared(x))


def _sequential(net: Net, x: Tensor) -> Any:
    """The helper of torch calls the last segment without a checkpoint."""
    layers = [net.shared] * 4
    x = checkpoint_sequential(layers, 4, x.requires_grad_(), use_reentrant=True)  # type: ignore[no-untyped-call]
    return net.layers(x)


def _not_shared(net: Net, x: Tensor) -> Any:
    x = net.shared(x)
    return net.layers[3:](_reentrant(net.layers[:3], x))


def _nested(net: Net, x: Tensor) -> Any:
    def inner(x: Tensor) -> Any:
        return _reentrant(net.shared, net.shared(x))

    return net.layers(_reentrant(inner, net.shared(x)))


def _not_reentrant(net: Net, x: Tensor) -> Any:
    x = net.shared(checkpoint(net.shared, x, use_reentrant=False))
    return net.layers(checkpoint(net.shared, x, use_reentrant=False))


class _Recompute(torch.autograd.Function):
    """Checkpointing of another library."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.function(x), grad)
        return None, x.grad


def _another_librarys(net: Net, x: Tensor) -> Any:
    x = net.shared[0](x)
    for _ in range(2):
        x = _Recompute.apply(net.shared, x)  # type: ignore[no-untyped-call]
    return net.layers(x)


def _make(forward: Forward) -> Callable[[], tuple[Net, CriticalAdam]]:
    def make() -> tuple[Net, CriticalAdam]:
        net = Net(forward)
        return net, AdamCM(net.parameters(), lr=0.02, priority_scope="tensor")

    return make


def _train(_: nn.Module, __: CriticalAdam, step: Step) -> None:
    for t in range(7):
        step(t)


FORWARDS = [
    *(_shared, _shared_and_called, _sequential, _not_shared, _nested, _not_reentrant),
    _another_librarys,
]


@pytest.mark.parametrize("forward", FORWARDS)
def test_checkpoints_train_as_steps_after_backward(forward: Forward) -> None:
    """A user checkpoints; shared modules and the order of the passes make no difference."""
    assert_steps_are_those_after_backward(_make(forward), _train)


@pytest.mark.parametrize("forward", [_shared, _sequential])
def test_the_loss_is_of_several_outputs_and_calls(forward: Forward) -> None:
    """The outputs are in a dict beside another value, and two calls of the model make a loss."""

    def outputs(net: Net, x: Tensor) -> Any:
        y = forward(net, x)
        return {"parts": (y, y.square()), "name": "y"}

    def several(net: Any, t: int) -> None:
        loss: Any = 0
        for i in range(2):
            first, second = net(inputs(t + i))["parts"]
            loss = loss + loss_of(first, t) + loss_of(second, t)
        loss.backward()

    assert_steps_are_those_after_backward(_make(outputs), _train, several)


def test_containers_train_as_steps_after_backward() -> None:
    """Two models in a ModuleList, which is never called itself."""

    def make() -> tuple[nn.Module, CriticalAdam]:
        models = nn.ModuleList([Net(_sequential), nn.ModuleDict({"last": nn.Linear(1, 1)})])
        return models, AdamCM(models.parameters(), priority_scope="tensor")

    def both(models: Any, t: int) -> None:
        loss_of(models[1]["last"](models[0](inputs(t))), t).backward()  # type: ignore[no-untyped-call]

    assert_steps_are_those_after_backward(make, _train, both)


def test_gradients_are_freed_within_backward_of_functions_that_are_no_checkpoints() -> None:
    """Only a checkpoint makes gradients wait: a Function of the user, as fused kernels are, not."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad

    net = Net(lambda net, x: net.layers[1:](Twice.apply(net.layers[0](x))))  # type: ignore[no-untyped-call]
    enable_gradient_release(net, AdamCM(net.parameters(), priority_scope="tensor"))
    left: list[int] = []
    net.layers[0].weight.register_hook(
        lambda _: left.append(sum(p.grad is not None for p in net.layers[1:].parameters()))
    )
    for t in range(2):
        backward(net, t)
    assert left == [0, 0]


def test_a_loss_that_the_model_did_not_return_is_refused() -> None:
    """The end of backward cannot be found then: nothing is changed, and the next step trains."""
    nets = [_make(_shared)() for _ in range(2)]
    for net, optimizer in nets:
        enable_gradient_release(net, optimizer)
        backward(net, 0)
    net, optimizer = nets[0]
    before = trained(optimizer), values(net)
    loss = _reentrant(net.shared, inputs(1).requires_grad_()).sum()
    with pytest.raises(RuntimeError, match=r"use_reentrant=False .* or compute the loss from what"):
        loss.backward()
    assert_same((trained(optimizer), values(net)), before)
    for net, _ in nets:
        backward(net, 1)
    assert_same(trained(nets[0][1]), trained(nets[1][1]))


def test_a_step_with_a_part_of_the_gradient_is_told() -> None:
    """The checkpoint of another library adds to a gradient that the outer pass had completed."""
    net = Net(
        lambda net, x: net.layers(net.shared(_Recompute.apply(net.shared, x.requires_grad_())))  # type: ignore[no-untyped-call]
    )
    optimizer = AdamCM(net.parameters(), priority_scope="tensor")
    enable_gradient_release(net, optimizer)
    with pytest.raises(RuntimeError, match=r"has stepped a parameter of shape .* use_reentrant"):
        backward(net, 0)
    assert all(param.grad is None for param in net.shared.parameters())
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@pytest.mark.parametrize("keep_error", [False, True])
@pytest.mark.parametrize("forward", [_shared, _sequential, _shared_and_called])
def test_a_backward_pass_that_fails_leaves_nothing(forward: Forward, keep_error: bool) -> None:
    """What waited in it is not added to the next gradients, also where the error is kept."""

    def fail(grad: Tensor) -> Tensor:
        raise ArithmeticError("of the user")

    runs, errors = [], []
    for release in (True, False):
        net: Any
        net, optimizer = _make(forward)()
        if release:
            enable_gradient_release(net, optimizer)
        for t in range(6):
            x = inputs(t).requires_grad_()
            if t % 2:
                x.register_hook(fail)  # type: ignore[no-untyped-call]
            try:
                loss_of(net(x * 1), t).backward()  # type: ignore[no-untyped-call]
            except ArithmeticError as error:
                errors += [error] if keep_error else []
            else:
                optimizer.step()
            if not release:
                optimizer.zero_grad()
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])


def test_a_step_that_fails_at_the_end_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters that still waited are not stepped with that gradient, now or later."""
    net, optimizer = _make(_shared)()
    enable_gradient_release(net, optimizer)
    step_alone, calls = optimizer._step_one, []

    def second_fails(index: int, position: int) -> None:
        calls.append(position)
        if len(calls) == 2:
            raise ArithmeticError("of the step")
        step_alone(index, position)

    monkeypatch.setattr(optimizer, "_step_one", second_fails)
    with pytest.raises(ArithmeticError):
        backward(net, 0)
    assert len(optimizer.state) == 1
    left = [param.grad is not None for param in net.parameters()]
    assert sum(left) == len(left) - 2
    loss = net(inputs(1)).sum() * 0
    loss.backward()
    assert all(param.grad is None for param in net.parameters())
    moved = [bool(state["exp_avg"].any()) for state in optimizer.state.values()]
    assert sum(moved) == 1


def test_what_is_no_training_registers_nothing() -> None:
    """Evaluation, autograd.grad and a model that returns a parameter leave no hook."""
    net = Net(lambda net, x: (net.shared[0].weight, _shared(net, x)))
    optimizer = AdamCM(net.parameters(), priority_scope="tensor")
    enable_gradient_release(net, optimizer)
    before = values(net)
    with torch.no_grad():
        net(inputs(0))
    assert not net.shared[0].weight._backward_hooks
    net._forward = lambda net, x: net.layers(net.shared(x))
    torch.autograd.grad(net(inputs(0)).sum(), list(net.parameters()))
    assert_same(values(net), before)
    assert all(param.grad is None for param in net.parameters())
    assert not optimizer.state


def test_removal_within_backward_leaves_the_gradients() -> None:
    """What waits when the release ends is stepped by `optimizer.step()`."""
    net, optimizer = _make(_shared)()
    release = enable_gradient_release(net, optimizer)
    x = inputs(0).requires_grad_()
    x.register_hook(lambda _: release.remove())  # type: ignore[no-untyped-call]
    loss_of(net(x * 1), 0).backward()  # type: ignore[no-untyped-call]
    assert all(param.grad is not None for param in net.parameters())
    assert not optimizer.state
    optimizer.step()
    assert len(optimizer.state) == len(list(net.parameters()))
