"""Trainings with and without gradient release, for its tests."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cm_fused import enable_gradient_release
from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import assert_same, params_of, trained

Step = Callable[[int], None]


def new_model() -> Any:
    """Return a model of three layers, the same one at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def inputs(t: int) -> Tensor:
    """Return the inputs of step t."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(t))


def loss_of(outputs: Tensor, t: int) -> Tensor:
    """Return the loss of step t."""
    return (outputs - t % 3).square().mean()


def backward(model: Callable[[Tensor], Tensor], t: int) -> Tensor:
    """Run backward of step t, and return the loss."""
    loss = loss_of(model(inputs(t)), t)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def assert_steps_are_those_after_backward(
    make: Callable[[], tuple[nn.Module, CriticalAdam]],
    train: Callable[[nn.Module, CriticalAdam, Step], None],
    backward: Callable[[Any, int], object] = backward,
) -> None:
    """Check that a training has the same bits with gradient release as without.

    Args:
        make: Makes the model and the optimizer.
        train: Trains them; its last argument takes a step.
        backward: Runs backward of a step.
    """
    runs = []
    for release in (True, False):
        model, optimizer = make()
        if release:
            enable_gradient_release(model, optimizer)

        def step(
            t: int, model: Any = model, optimizer: Any = optimizer, released: bool = release
        ) -> None:
            backward(model, t)
            assert not released or all(param.grad is None for param in params_of(optimizer))
            optimizer.step()
            optimizer.zero_grad()

        train(model, optimizer, step)
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])


def values(model: nn.Module) -> list[Tensor]:
    """Return copies of a model's parameters."""
    return [param.detach().clone() for param in model.parameters()]
