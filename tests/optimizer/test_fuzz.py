"""Random use of the API, by the state machine of `tests.support.random_use`.

`test_properties.py` draws runs of steps; here an optimizer is also saved, loaded into another
backend, copied, pickled, resized, moved, and asked for what it must refuse.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from torch import Tensor

from cm_fused import AdamCM
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.rounding import INT4
from tests.support.cases import needs_cpu_backend
from tests.support.effort import effort, record_cases
from tests.support.random_use import (
    ApiMachine,
    View,
    assert_same_bits,
    options_of_a_group,
    seeds,
    views,
)
from tests.support.training import CLASSES, assert_same, new_optimizer, train, trained

STEPS_OF_A_RUN = 50


class ReferenceMachine(ApiMachine):
    """Any backend, and the reference as the model, to the roundings of float64.

    Of float32 other roundings could decide an admission otherwise.
    """

    dtypes = (torch.float64, torch.complex128)
    backends = (None, "cpu", "eager")
    reorders = True

    @initialize(kind=st.sampled_from(CLASSES), options=options_of_a_group, seed=seeds)
    def construct(self, kind: type[CriticalAdam], options: dict[str, Any], seed: int) -> None:
        """Make both."""
        self.precision = {}
        self.construct_both(kind, seed, "eager", options)
        self.largest = 1.0
        self.had_l2_term = False

    def after_gradients(self) -> None:
        """Keep the largest gradient, whose roundings stay in the moments."""
        for param in self.model_params:
            if param.grad is not None and param.numel():
                self.largest = max(self.largest, float(param.grad.abs().max()))
        self.had_l2_term |= any(
            group["weight_decay"] and not group["decoupled_weight_decay"]
            for group in self.model.param_groups
        )

    def check_agreement(self) -> None:
        """The whole state is the reference's."""
        # Keys are float32 of float64 norms: the same, unless the norm is one of parameters too.
        _check_close(
            views(self.optimizer, self.params),
            views(self.model, self.model_params),
            rtol=1e-12,
            size=self.largest,
            key_rtol=1e-6 if self.had_l2_term else 0.0,
        )


_PRECISIONS: dict[torch.dtype, tuple[dict[str, Any], ...]] = {
    torch.float32: (
        {},
        {"buffer_dtype": torch.bfloat16},
        {"buffer_dtype": torch.float16, "moment_dtype": torch.bfloat16},
        {"buffer_dtype": torch.float8_e4m3fn},
        {"buffer_dtype": torch.int8, "moment_dtype": torch.int8},
        {"buffer_dtype": INT4, "moment_dtype": torch.bfloat16},
    ),
    torch.bfloat16: (
        {},
        {"low_precision_update": "stochastic", "seed": 3},
        {"low_precision_update": "kahan", "buffer_dtype": torch.int8},
        {"low_precision_update": "split"},
    ),
    torch.float16: ({"low_precision_update": "stochastic"}, {"low_precision_update": "kahan"}),
    torch.complex64: ({},),
}
_precisions = st.sampled_from([(dtype, o) for dtype, all_ in _PRECISIONS.items() for o in all_])


class UndisturbedMachine(ApiMachine):
    """Any precision, and the same backend left alone as the model, to the last bit."""

    @initialize(
        kind=st.sampled_from(CLASSES),
        backend=st.sampled_from(["cpu", "cpu", "eager"]),
        precision=_precisions,
        options=options_of_a_group,
        seed=seeds,
    )
    def construct(
        self,
        kind: type[CriticalAdam],
        backend: str,
        precision: tuple[torch.dtype, dict[str, Any]],
        options: dict[str, Any],
        seed: int,
    ) -> None:
        """Make both."""
        dtype, self.precision = precision
        self.dtypes = (dtype,)
        self.backends = (backend,)
        # Scales and random numbers go by the place in memory.
        self.reorders = not self.precision
        self.construct_both(kind, seed, backend, options)

    def check_agreement(self) -> None:
        """Every bit is the model's."""
        assert_same_bits(
            views(self.optimizer, self.params), views(self.model, self.model_params), "disturbed"
        )


def _check_close(
    actual: list[View], expected: list[View], rtol: float, size: float, key_rtol: float
) -> None:
    """Check that the state is that of the reference, to the roundings of another order.

    Args:
        actual: What is compared; of a running sum, whether it is that of the slots.
        expected: What it is to be.
        rtol: Of `size`; of a square, its square; of a parameter, its largest value and 1.
        size: The largest gradient so far: a moment keeps its roundings.
        key_rtol: Of keys.
    """
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        expected_view = dict(other)
        if "critical_sum" in one:
            expected_view["critical_sum"] = other["critical_buffer"].sum(0)
        assert one.keys() == expected_view.keys(), f"parameter {i}"
        bounds = {
            "step": 0.0,
            "priorities": 0.0,
            "param": rtol * (1.0 + _largest(other["param"])),
            "exp_avg_sq": rtol * size * size,
            "max_exp_avg_sq": rtol * size * size,
        }
        for key, value in expected_view.items():
            atol = bounds.get(key, rtol * size)
            near = torch.isclose(one[key], value, key_rtol if key == "priorities" else 0.0, atol)
            assert near.all(), f"{key} of parameter {i} is {one[key]}, should be {value}"


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


@needs_cpu_backend
@pytest.mark.parametrize("machine", [ReferenceMachine, UndisturbedMachine])
def test_random_use(machine: type[ApiMachine]) -> None:
    """The whole state stays the model's, whatever is done in between.

    What fails is shrunk to a minimal example and printed.
    """
    before = ApiMachine.transitions
    options = settings(
        max_examples=effort(8, 280),
        stateful_step_count=STEPS_OF_A_RUN,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)
    record_cases(ApiMachine.transitions - before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, INT4], ids=str)
def test_slots_of_bytes_are_pickled(dtype: torch.dtype) -> None:
    """An optimizer with 8-bit float slots comes back from pickle and goes on with the same bits.

    torch pickles no tensor of 8-bit floats, which go as the bytes that int4 slots are; older tests
    pickled float32 state only.
    """
    for pickles in (True, False):
        optimizer = new_optimizer(AdamCM, buffer_dtype=dtype)
        train(optimizer, range(3))
        copied = pickle.loads(pickle.dumps(optimizer)) if pickles else copy.deepcopy(optimizer)
        for each in (optimizer, copied):
            train(each, range(3, 6))
        assert_same(trained(copied), trained(optimizer))


def test_decoupled_decay_by_a_float32_learning_rate() -> None:
    """The reference decays float64 parameters by 1 - lr * weight_decay of float64.

    Older tests gave a tensor `lr` to float32 parameters, in which the loss does not show.
    """
    lr = torch.tensor(0.1)
    param = torch.ones(1, dtype=torch.float64, requires_grad=True)
    param.grad = torch.zeros_like(param)
    AdamCM([param], lr=lr, weight_decay=0.1, decoupled_weight_decay=True, backend="eager").step()
    assert abs(param.item() - (1 - lr.item() * 0.1)) < 1e-15
