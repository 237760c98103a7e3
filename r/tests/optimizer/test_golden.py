"""Every backend meets the golden cases through the public classes, after every step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import backend_params, device_of, make_optimizer, to_array, ulp
from tests.support.compare import OracleRun, check_state, relative, saved
from tests.support.golden import CASES, GoldenCase, load_case
from tests.support.oracle import Options

pytestmark = [
    pytest.mark.parametrize("name", CASES),
    pytest.mark.parametrize("backend", backend_params()),
]


class _Run:
    """The optimizer of a golden case with parameters of one dtype."""

    def __init__(self, name: str, dtype: torch.dtype, backend: str) -> None:
        self.case: GoldenCase = load_case(name)
        self.options = Options(kind=self.case.kind, **self.case.options)
        self.device = device_of(backend)
        self.params = [
            torch.from_numpy(param).to(self.device, dtype) for param in self.case.params0
        ]
        self.optimizer: CriticalAdam = make_optimizer(self.params, self.options, backend)

    def step(self, t: int) -> list[Tensor | None]:
        """Take step t, counted from 0; return its gradients, rounded to the parameters' dtype."""
        self.optimizer.param_groups[0]["lr"] = self.case.lrs[t]
        for param, grad in zip(self.params, self.case.grads[t], strict=True):
            param.grad = None if grad is None else torch.from_numpy(grad).to(param)
        self.optimizer.step()
        return [param.grad for param in self.params]

    def options_of(self, t: int) -> Options:
        """Return the options of step t."""
        return replace(self.options, lr=self.case.lrs[t])


def test_float32(name: str, backend: str) -> None:
    """Parameters and state after every step to 3e-6 of the largest value, keys to an ulp or two.

    Keys are exact where no weight decay brings rounded parameters into the gradient.
    """
    run = _Run(name, torch.float32, backend)
    oracle = OracleRun(run.params)
    l2 = run.options.weight_decay != 0 and not run.options.decoupled_weight_decay
    for t in range(run.case.steps):
        oracle.step(run.step(t), run.options_of(t))
        for i, (param, expected) in enumerate(zip(run.params, oracle.params, strict=True)):
            relative(0, 3e-6)(to_array(param), expected, f"{t=}, params[{i}]")
            if i < len(run.case.params):
                relative(0, 3e-6)(to_array(param), run.case.params[i][t], f"{t=}, params[{i}]")
            state = oracle.states[i]
            if state.step == 0:
                continue
            seen = saved(run.optimizer, i)
            if l2:
                keys = state.priorities(run.options.capacity)
                np.testing.assert_allclose(seen.priorities.numpy(), keys, rtol=5e-7)
                state.keys = list(seen.priorities.numpy()[: len(state.keys)])
            check_state(
                seen,
                state,
                run.options.capacity,
                relative(0, 3e-6),
                f"{t=}, parameter {i}",
                amsgrad=run.options.amsgrad,
            )


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, backend: str, dtype: torch.dtype) -> None:
    """A half parameter is the oracle's result for the same start, rounded once, at every step.

    Rounding to nearest costs 0.5 ulp of the stored dtype. Before it, the result in float32 is off
    by float32's share of the old parameter and of the update: a few 1e-6 of the update, as
    `test_float32` holds it to, and 2^-23 of the parameter. Both are less than 0.01 ulp unless the
    two cancel. The oracle starts each step from the rounded parameter, as the optimizer does.
    """
    run = _Run(name, dtype, backend)
    oracle = OracleRun(run.params)
    for t in range(run.case.steps):
        before = [param.copy() for param in oracle.params]
        oracle.step(run.step(t), run.options_of(t))
        for i, (param, old) in enumerate(zip(run.params, before, strict=True)):
            stored, expected = to_array(param), oracle.params[i]
            in_float32 = 3e-6 * np.abs(expected - old).max() + 2.0**-23 * np.abs(old)
            excess = np.abs(stored - expected) - 0.5 * ulp(expected, dtype) - in_float32
            assert excess.max() <= 0, f"{t=}, params[{i}]: {excess.max()} more than the bound"
            oracle.params[i] = stored
    for i, state in enumerate(oracle.states):
        np.testing.assert_allclose(
            saved(run.optimizer, i).priorities.numpy(),
            state.priorities(run.options.capacity),
            rtol=5e-7,
        )
