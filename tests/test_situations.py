"""Situations in which an optimizer went silently wrong, taken from public issue threads.

Every test names its thread. Those that hold what was right already are here since a silent fault
would be easy to bring back.
"""

import copy
from typing import Any

import pytest
import torch

from cm_fused._critical_adam import CriticalAdam
from tests.training import (
    BACKENDS,
    KINDS,
    assert_same,
    give_gradients,
    new_optimizer,
    params_of,
    snapshot,
    train,
)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("cls", KINDS)


# Gradients and parameters in other forms


@pytest.mark.parametrize("options", [{}, {"moment_dtype": torch.int8}], ids=str)
@on_each_backend
@of_each_kind
def test_model_turned_to_double(
    cls: type[CriticalAdam], backend: str, options: dict[str, Any]
) -> None:
    """A parameter turned to float64 after a step is refused, and the remedy that is named works.

    Thread: plenoptic-org/plenoptic#404 (after `.to(dtype)` the optimizer no longer moves anything).
    The reference went on with float32 state, and the C++ step named an internal list; the older
    tests turned parameters to half precision, whose state is float32 too.
    """
    optimizer = new_optimizer(cls, backend=backend, **options)
    train(optimizer, range(3))
    for param in params_of(optimizer):
        param.data = param.data.double()
    give_gradients(optimizer, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"fits its state of torch.float32, got torch.float64"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    if not options:
        successor = cls(copy.copy(optimizer.param_groups), backend=backend)
        successor.load_state_dict(optimizer.state_dict())
        train(successor, range(3, 5))
        assert all(state["step"] == 5 for state in successor.state_dict()["state"].values())
