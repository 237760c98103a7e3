"""Random use of the public API beside the reference, which is the model."""

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from bench.torture.finding import Finding, require
from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM
from cm_fused._critical_adam import CriticalAdam

SHAPES = ((), (0,), (3,), (4, 5), (2, 3, 2))
STEPS_OF_A_RUN = 50
_transitions = 0
_seeds = st.integers(0, 2**31)


def run(quick: bool) -> Finding:
    """Use the API at random."""
    options = settings(
        max_examples=20 if quick else 420,
        stateful_step_count=STEPS_OF_A_RUN,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(ApiMachine, settings=options)
    if not quick:
        require(_transitions >= 20_000, f"only {_transitions} transitions were made")
    return Finding(
        "random use", _transitions, "transitions of a state machine", "the reference's parameters"
    )


class ApiMachine(RuleBasedStateMachine):
    """An optimizer, and the reference on parameters of its own.

    Parameters are float64: admissions depend on comparisons, which other roundings of float32
    would decide otherwise.
    """

    @initialize(
        kind=st.sampled_from([AdamCM, AdamWCM, AdamCG, AdamWCG]),
        capacity=st.integers(1, 6),
        scope=st.sampled_from(["group", "tensor"]),
        amsgrad=st.booleans(),
        mean=st.sampled_from(["capacity", "size"]),
        seed=_seeds,
    )
    def construct(
        self,
        kind: type[CriticalAdam],
        capacity: int,
        scope: str,
        amsgrad: bool,
        mean: str,
        seed: int,
    ) -> None:
        """Make both, with one group."""
        self.kind = kind
        self.options: dict[str, Any] = {
            "capacity": capacity,
            "priority_scope": scope,
            "amsgrad": amsgrad,
            "buffer_mean": mean,
        }
        self.params = _params(seed)
        self.expected_params = _params(seed)
        self.optimizer = kind(self.params, **self.options)
        self.expected = kind(self.expected_params, backend="eager", **self.options)

    @rule(seed=_seeds)
    def add_group(self, seed: int) -> None:
        """Add a param group, up to three."""
        if len(self.optimizer.param_groups) > 2:
            return
        for params, optimizer in (
            (self.params, self.optimizer),
            (self.expected_params, self.expected),
        ):
            new = _params(seed)
            params += new
            optimizer.add_param_group({"params": new})

    @rule(seed=_seeds)
    def step(self, seed: int) -> None:
        """Step with missing, zero, spiky, strided and plain gradients."""
        for params, optimizer in (
            (self.params, self.optimizer),
            (self.expected_params, self.expected),
        ):
            generator = torch.Generator().manual_seed(seed)
            for param in params:
                param.grad = _gradient(param, generator)
            optimizer.step()

    @rule(
        lr=st.sampled_from([0.0, 1e-4, 0.1]),
        betas=st.sampled_from([(0.9, 0.99), (0.0, 0.5), (0.5, 0.999)]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        priority_decay=st.sampled_from([0.0, 0.7, 1.0]),
        maximize=st.booleans(),
        group=st.integers(0, 2),
    )
    def change_hyperparameters(self, group: int, **options: Any) -> None:
        """Change what a scheduler may change, and more."""
        for optimizer in (self.optimizer, self.expected):
            optimizer.param_groups[group % len(optimizer.param_groups)].update(options)

    @rule(backend=st.sampled_from([None, "cpu", "eager"]))
    def save_and_load(self, backend: str | None) -> None:
        """Go on in a new optimizer, of another backend."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer = self.kind(groups, **self.options)
        self.optimizer.load_state_dict(torch.load(file))
        for group in self.optimizer.param_groups:
            group["backend"] = backend

    @rule()
    def load_own(self) -> None:
        """Load a state dict into the optimizer that it is of."""
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    @rule()
    def deepcopy(self) -> None:
        """Go on with a copy."""
        self.params, self.optimizer = copy.deepcopy((self.params, self.optimizer))

    @rule()
    def pickle(self) -> None:
        """Go on with what pickle makes of it."""
        self.params, self.optimizer = pickle.loads(pickle.dumps((self.params, self.optimizer)))

    @rule(capacity=st.integers(1, 6))
    def resize_buffer(self, capacity: int) -> None:
        """Change the capacity of all buffers."""
        self.options["capacity"] = capacity
        self.optimizer.resize_buffer(capacity)
        self.expected.resize_buffer(capacity)

    @rule(transposed=st.booleans())
    def move_storage(self, transposed: bool) -> None:
        """Have the parameters lie elsewhere, and otherwise."""
        for param in self.params:
            moved = param.detach().clone()
            if transposed and moved.ndim > 1:
                moved = moved.mT.contiguous().mT
            param.data = moved

    @invariant()
    def follows_the_reference(self) -> None:
        """The parameters and keys are the reference's."""
        global _transitions
        _transitions += 1
        if not hasattr(self, "optimizer"):
            return
        for param, expected in zip(self.params, self.expected_params, strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-7, atol=1e-9, equal_nan=True)


def _params(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in SHAPES[seed % 3 : seed % 3 + 3]
    ]


def _gradient(param: Tensor, generator: torch.Generator) -> Tensor | None:
    kind = int(torch.randint(6, (), generator=generator))
    gradient = torch.randn(param.shape, generator=generator, dtype=param.dtype)
    if kind == 0:
        return None
    if kind == 1:
        return torch.zeros_like(gradient)
    if kind == 2:
        return gradient * 1e6
    if kind == 3 and param.ndim > 1:
        return gradient.mT.contiguous().mT
    return gradient
