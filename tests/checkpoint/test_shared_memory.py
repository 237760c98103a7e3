"""Optimizers whose state several processes share step as one process does."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import get_context

from cm_fused import AdamCG, AdamCM
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import needs_cpu_backend

LOW: dict[str, Any] = {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16}


def _take_step(params: list[Tensor], optimizer: CriticalAdam, t: int) -> None:
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, (t + 1.0) * (i + 1))
    optimizer.step()


def _train(cls: type[CriticalAdam], options: dict[str, Any], *, shares: bool) -> list[Tensor]:
    """Return parameters after steps, every second one taken by another process if `shares`."""
    params = [torch.linspace(-1, 1, 8).reshape(2, 4), torch.ones(3)]
    optimizer = cls(params, lr=0.05, capacity=3, **options)
    for t in range(4):
        if not (shares and t % 2):
            _take_step(params, optimizer, t)
            continue
        # What is passed to a spawned process is moved to shared memory.
        process = get_context("spawn").Process(target=_take_step, args=(params, optimizer, t))
        process.start()
        process.join()
        assert process.exitcode == 0
    return params


@needs_cpu_backend
@pytest.mark.parametrize(
    "options", [pytest.param({}, id="float32", marks=pytest.mark.slow), pytest.param(LOW, id="low")]
)
@pytest.mark.parametrize("cls", [AdamCM, pytest.param(AdamCG, marks=pytest.mark.slow)])
def test_a_step_in_a_spawned_process(cls: type[CriticalAdam], options: dict[str, Any]) -> None:
    """The parent goes on from the step that a spawned process took on its state.

    Situation: Hogwild and A3C. The slot that waits for a momentum stayed in the other process;
    older tests do not go on with an optimizer that they passed on.
    """
    alone, shared = (_train(cls, options, shares=shares) for shares in (False, True))
    for expected, actual in zip(alone, shared, strict=True):
        assert torch.equal(actual, expected)
