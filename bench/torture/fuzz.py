"""Random use of the public API beside a model, in two state machines."""

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from bench.torture.finding import Finding, require
from bench.torture.machine import ApiMachine, options_of_a_group, seeds
from bench.torture.states import require_close, require_same_bits, views
from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM
from cm_fused._optimizer.base import CriticalAdam

STEPS_OF_A_RUN = 50
KINDS: tuple[type[CriticalAdam], ...] = (AdamCM, AdamWCM, AdamCG, AdamWCG)
LEAST_TRANSITIONS = 20_000


def run(quick: bool) -> Finding:
    """Use the API at random."""
    for machine in (ReferenceMachine, UndisturbedMachine):
        use_at_random(machine, 12 if quick else 280)
    made = ApiMachine.transitions
    require(quick or made >= LEAST_TRANSITIONS, f"only {made} transitions were made")
    return Finding(
        "random use",
        made,
        "transitions of state machines",
        "the reference's parameters and state, and the bits of a run that is not disturbed",
    )


def use_at_random(machine: type[ApiMachine], runs: int) -> None:
    """Run a machine; what fails is shrunk to a minimal example and printed."""
    options = settings(
        max_examples=runs,
        stateful_step_count=STEPS_OF_A_RUN,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)


class ReferenceMachine(ApiMachine):
    """Any backend, and the reference as the model, to the roundings of float64.

    Of float32 other roundings could decide an admission otherwise.
    """

    dtypes = (torch.float64, torch.complex128)
    backends = (None, "cpu", "eager")
    reorders = True

    @initialize(kind=st.sampled_from(KINDS), options=options_of_a_group, seed=seeds)
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

    def require_agreement(self) -> None:
        """The whole state is the reference's."""
        # Keys are float32 of float64 norms: the same, unless the norm is one of parameters too.
        require_close(
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
    ),
    torch.bfloat16: (
        {},
        {"low_precision_update": "stochastic", "seed": 3},
        {"low_precision_update": "kahan", "buffer_dtype": torch.int8},
    ),
    torch.float16: ({"low_precision_update": "stochastic"}, {"low_precision_update": "kahan"}),
    torch.complex64: ({},),
}
_precisions = st.sampled_from([(dtype, o) for dtype, all_ in _PRECISIONS.items() for o in all_])


class UndisturbedMachine(ApiMachine):
    """Any precision, and the same backend left alone as the model, to the last bit."""

    @initialize(
        kind=st.sampled_from(KINDS),
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

    def require_agreement(self) -> None:
        """Every bit is the model's."""
        require_same_bits(
            views(self.optimizer, self.params), views(self.model, self.model_params), "disturbed"
        )
