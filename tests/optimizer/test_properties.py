"""What holds for any run: the backends agree and the buffer keeps its rules."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import (
    BLOCK,
    DECAYS,
    KINDS,
    Grads,
    backend_params,
    make_optimizer,
    make_params,
    normal_like,
)
from tests.support.compare import OracleRun, check_state, largest, relative, see
from tests.support.lockstep import Lockstep, maker
from tests.support.oracle import Options

# The same examples on every run, so that a failure is of the change that shows it.
stable = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7,), (2, 3), (1, 4, 1), (BLOCK + 1,)]


@dataclass(frozen=True)
class Gradient:
    """One parameter's gradient in one step: a draw's seed, a scale, and what is put into it."""

    seed: int
    scale: float
    poison: float | None


@dataclass(frozen=True)
class Run:
    """What hypothesis draws; None stands for a missing gradient."""

    shapes: list[tuple[int, ...]]
    options: Options
    steps: list[list[Gradient | None]]

    def params(self) -> list[Tensor]:
        """Return the float64 parameters."""
        return make_params(self.shapes, torch.float64)

    def gradients(self, params: list[Tensor]) -> Iterator[Grads]:
        """Yield the gradients of every step."""
        for step in self.steps:
            yield [
                None if drawn is None else _gradient(param, drawn)
                for param, drawn in zip(params, step, strict=True)
            ]


def _gradient(param: Tensor, drawn: Gradient) -> Tensor:
    grad = normal_like(param, drawn.scale, torch.Generator().manual_seed(drawn.seed))
    if drawn.poison is not None and grad.numel():
        grad.view(-1)[drawn.seed % grad.numel()] = drawn.poison
    return grad


SCALES = [0.0, 1e-3, 1.0, 1.0, 1.0, 3.0, 1e3]
# The last makes a norm that is too large for a float32 key. After any of them there is little left
# to compare, so half of the runs have none.
POISONS = [st.none(), st.sampled_from([None] * 12 + [np.nan, np.inf, -np.inf, 1e42])]


@st.composite
def options_of_a_run(draw: st.DrawFn) -> Options:
    """Draw the options."""
    decay = draw(st.sampled_from(sorted(DECAYS)))
    options = Options(
        kind=draw(st.sampled_from(KINDS)),
        lr=draw(st.sampled_from([0.0, 1e-3, 0.1])),
        betas=(draw(st.sampled_from([0.0, 0.5, 0.9])), draw(st.sampled_from([0.0, 0.9, 0.99]))),
        eps=draw(st.sampled_from([1e-8, 1e-3])),
        amsgrad=draw(st.booleans()),
        capacity=draw(st.sampled_from([1, 2, 4, 5, 7])),
        priority_decay=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
        priority_scope=draw(st.sampled_from(["group", "tensor"])),
        buffer_mean=draw(st.sampled_from(["capacity", "size"])),
        eps_inside_sqrt=draw(st.booleans()),
        maximize=draw(st.booleans()),
    )
    return replace(options, **DECAYS[decay])


@st.composite
def runs(draw: st.DrawFn) -> Run:
    """Draw a run. Few seeds, so that gradients, and with them keys, come again."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3))
    poison = draw(st.sampled_from(POISONS))
    gradient = st.builds(
        Gradient,
        seed=st.integers(0, 5),
        scale=st.sampled_from(SCALES),
        poison=poison,
    )
    one = st.one_of(gradient, gradient, gradient, st.none())
    step = st.lists(one, min_size=len(shapes), max_size=len(shapes))
    steps = draw(st.lists(step, min_size=1, max_size=14))
    return Run(shapes, draw(options_of_a_run()), steps)


def _step(params: list[Tensor], grads: Grads, optimizer: CriticalAdam) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()


@pytest.mark.parametrize("backend", backend_params(("cpu",)))
@stable
@given(run=runs())
def test_cpu_is_eager(backend: str, run: Run) -> None:
    """The "cpu" backend takes every step as the reference does."""
    _take_in_lockstep(run, backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", backend_params(("triton",)))
@settings(stable, max_examples=60)  # an interpreted step takes a hundred times as long
@given(run=runs())
def test_triton_is_eager(backend: str, run: Run) -> None:
    """The "triton" backend takes every step as the reference does."""
    _take_in_lockstep(run, backend)


def _take_in_lockstep(run: Run, backend: str) -> None:
    params = run.params()
    lockstep = Lockstep(params, maker(run.options), backend)
    for grads in run.gradients(params):
        lockstep.step(grads)


@stable
@given(runs())
def test_eager_is_the_oracle(run: Run) -> None:
    """The reference's whole run is the oracle's, to float64's roundings.

    These grow with the largest gradient so far: what is left of a spike in a moment keeps the
    spike's roundings.
    """
    params = run.params()
    optimizer = make_optimizer(params, run.options, "eager")
    oracle = OracleRun(params)
    biggest = 1.0
    for t, grads in enumerate(run.gradients(params)):
        _step(params, grads, optimizer)
        oracle.step(grads, run.options)
        biggest = max(biggest, *(largest(grad.numpy()) for grad in grads if grad is not None), 0.0)
        close = relative(1e-10, 1e-13, size=biggest)
        for i, (expected, state) in enumerate(zip(oracle.params, oracle.states, strict=True)):
            where = f"step {t + 1}, params[{i}]"
            relative(1e-10, 1e-13, size=1.0)(params[i].numpy(), expected, where)
            if state.step:
                check_state(
                    see(optimizer.state[params[i]]),
                    state,
                    run.options.capacity,
                    close,
                    where,
                    amsgrad=run.options.amsgrad,
                )
