"""Optimizers before a step that is to fail, and whether two of them are alike."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import assert_same, give_gradients, train, trained

Make = Callable[..., CriticalAdam]


def made(make: Make, num_groups: int, **options: Any) -> tuple[list[Tensor], CriticalAdam]:
    """Return the parameters and an optimizer of some groups, before the first step."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (7,)) * num_groups
    params = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    groups = [{"params": params[2 * i : 2 * i + 2]} for i in range(num_groups)]
    return params, make(groups, lr=0.1, **options)


def after(
    make: Make, steps: int, num_groups: int, **options: Any
) -> tuple[list[Tensor], CriticalAdam]:
    """Return parameters and optimizer after some steps, with the gradients of the next."""
    params, optimizer = made(make, num_groups, **options)
    train(optimizer, range(steps))
    give_gradients(optimizer, steps)
    return params, optimizer


def assert_alike(*both: tuple[list[Tensor], CriticalAdam]) -> None:
    """Check that parameters and state have the same bits, and groups the same skipped steps."""
    left, right = ((trained(o), o.state_dict()["param_groups"]) for _, o in both)
    assert_same(left, right)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"capacity": 1, "amsgrad": True, "priority_scope": "tensor"},
    {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16},
    {"max_grad_norm": 0.5, "skip_nonfinite": True},
]
