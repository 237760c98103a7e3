"""Optimizers before a step that is to fail, and whether two of them are alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam

Make = Callable[..., CriticalAdam]


def made(make: Make, num_groups: int, **options: Any) -> tuple[list[Tensor], CriticalAdam]:
    """Return the parameters and an optimizer of some groups, before the first step."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7,)) * num_groups
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    groups = [{"params": params[2 * i : 2 * i + 2]} for i in range(num_groups)]
    return params, make(groups, lr=0.1, **options)


def give_gradients(params: list[Tensor], t: int) -> None:
    """Give the parameters the gradients of a step."""
    generator = torch.Generator().manual_seed(1 + t)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def after(
    make: Make, steps: int, num_groups: int, **options: Any
) -> tuple[list[Tensor], CriticalAdam]:
    """Return parameters and optimizer after some steps, with the gradients of the next."""
    params, optimizer = made(make, num_groups, **options)
    for t in range(steps):
        give_gradients(params, t)
        optimizer.step()
    give_gradients(params, steps)
    return params, optimizer


def assert_alike(
    left: tuple[list[Tensor], CriticalAdam], right: tuple[list[Tensor], CriticalAdam]
) -> None:
    """Check that parameters and state have the same bits."""
    for param, other in zip(left[0], right[0], strict=True):
        assert torch.equal(param, other)
    dicts = [optimizer.state_dict() for _, optimizer in (left, right)]
    # With them the counts of skipped steps.
    assert dicts[0]["param_groups"] == dicts[1]["param_groups"]
    states = [state_dict["state"] for state_dict in dicts]
    assert states[0].keys() == states[1].keys()
    for i in states[0]:
        assert states[0][i].keys() == states[1][i].keys()
        for key, value in states[0][i].items():
            assert torch.equal(value, states[1][i][key]), key


OPTIONS: list[dict[str, Any]] = [
    {},
    {"capacity": 1, "amsgrad": True, "priority_scope": "tensor"},
    {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16},
    {"max_grad_norm": 0.5, "skip_nonfinite": True},
]
