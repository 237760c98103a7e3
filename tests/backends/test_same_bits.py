"""The C++ and the Triton pass leave the same bits in every parameter and state tensor.

A training can therefore move between them, and any difference is an error. `test_parity` compares
each backend with the reference within bounds; older tests compared bits at one capacity, over fewer
steps than the first rebuild of a running sum takes, and not in float64.

Every case here has a rebuild of each running sum, a gradient of zeros, elements of -0 and a
gradient that is not finite. NaNs are compared as such: their bits are the machine's.

The passes add a norm's squares up in different orders. Every bit of the norm shows in float64
parameters clipped by it: older cases had gradients whose squares have an exact sum.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM, AdamWCM
from cm_fused._backends.select import select
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import (
    CHUNK,
    device_of,
    make_bucket,
    make_params,
    needs_cpu_backend,
    needs_triton,
    normal_like,
    real,
    step_options,
)
from tests.support.oracle import Options

DEVICE = device_of("triton")
pytestmark = [
    needs_cpu_backend,
    needs_triton,
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]

Class = type[CriticalAdam]
CLASSES: tuple[Class, ...] = (AdamCM, AdamCG, AdamWCM)
BUFFERS: tuple[Class, ...] = CLASSES[:2]
CAPACITIES = (*range(1, 12), 20)
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES, torch.complex64)
BUFFER_DTYPES = (*HALVES, torch.float8_e4m3fn, torch.int8)
MOMENT_DTYPES = (torch.bfloat16, torch.int8)
UPDATES = ("stochastic", "kahan")
# Capacities on either side of the one from which on a running sum is kept.
AROUND_RUNNING_SUM = {2: (5, 6), 1: (9, 10)}
# One tail; one full chunk and a tail; two chunks of the C++ pass, of which the second is a tail.
TAILS = (1, 5, 257)
LENGTHS = (CHUNK_SIZE, CHUNK_SIZE + 3, CHUNK + 7)
# Each away from its default.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"amsgrad": True},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True},
    {"eps_inside_sqrt": False},
    {"eps": 1e-3},
    {"betas": (0.5, 0.8)},
    {"betas": (0.0, 0.999)},
    {"priority_decay": 1.0},
    {"priority_decay": 0.0},
    {"priority_scope": "tensor"},
    {"buffer_mean": "size"},
    {"lr": torch.tensor(0.03)},
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True},
)


@dataclass(frozen=True)
class Case:
    """One run with both backends.

    Attributes:
        cls: The optimizer's class.
        options: Its keywords away from their defaults.
        dtype: Of the parameters.
        lengths: Of the parameters.
    """

    cls: Class
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] = (5, 257)

    @property
    def capacity(self) -> int:
        """The slots of each buffer; of 3 float32 a running sum is kept."""
        return int(self.options.get("capacity", 3))

    @property
    def name(self) -> str:
        """What the test's id says of it."""
        options = [f"{key}={_short(value)}" for key, value in self.options.items()]
        lengths = "+".join(map(str, self.lengths))
        return "-".join([self.cls.__name__, _short(self.dtype), *options, lengths])

    def make(self, params: list[Tensor], backend: str) -> CriticalAdam:
        """Return the optimizer."""
        options = {"lr": 0.05, "capacity": self.capacity, "seed": 2**40 + 3, **self.options}
        return self.cls(params, **options, backend=backend)

    def gradients(self) -> Iterator[list[Tensor]]:
        """Yield the gradients of 2 C + 3 steps; the last but one is not finite."""
        source = torch.Generator().manual_seed(1)
        params = make_params([(length,) for length in self.lengths], self.dtype)
        steps = 2 * self.capacity + 3
        for step, scale in zip(range(steps), itertools.cycle((1.0, 0.5, 2.0, 0.0, 0.25, 4.0))):
            grads = [normal_like(param, scale, source) for param in params]
            for grad in map(real, grads):
                grad.view(-1)[0] = -0.0
                if step == steps - 2:
                    grad.view(-1)[-1] = torch.inf if len(grad) % 2 else torch.nan
            yield grads


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def _cases() -> list[Case]:
    """Return the cases of every run: each option, dtype and capacity, and some pairs."""
    cases = [Case(cls, options, lengths=(5,)) for cls in CLASSES for options in OPTIONS]
    cases += [Case(cls, {}, dtype, (1, 257)) for cls in CLASSES for dtype in DTYPES]
    cases += [
        Case(cls, {"capacity": capacity}, lengths=(5,))
        for cls in BUFFERS
        for capacity in CAPACITIES
    ]
    cases += [
        Case(AdamCM, {"buffer_dtype": dtype, "capacity": capacity}, lengths=(257,))
        for dtype in BUFFER_DTYPES
        for capacity in AROUND_RUNNING_SUM[dtype.itemsize]
    ]
    cases += [
        Case(cls, {"moment_dtype": dtype}, lengths=(257,))
        for cls in BUFFERS
        for dtype in MOMENT_DTYPES
    ]
    cases += [
        Case(AdamCM, {"low_precision_update": update}, dtype, (257,))
        for dtype in HALVES
        for update in UPDATES
    ]
    cases += [Case(cls, {}, lengths=(length,)) for cls in BUFFERS for length in LENGTHS]
    clipped = {"max_grad_norm": 0.5, "weight_decay": 0.1, "capacity": 1}
    cases += [
        Case(cls, clipped, torch.float64, lengths)
        for cls in BUFFERS
        for lengths in (TAILS, LENGTHS, (CHUNK_SIZE + 3,))
    ]
    return cases


def _slow_cases() -> list[Case]:
    """Return the products of options, dtypes, capacities and ways to store the state."""
    cases = [
        Case(cls, options, dtype, TAILS)
        for cls, options, dtype in itertools.product(CLASSES, OPTIONS, DTYPES)
    ]
    cases += [
        Case(cls, {"capacity": capacity}, dtype, (257,))
        for cls, capacity, dtype in itertools.product(BUFFERS, CAPACITIES, DTYPES)
    ]
    cases += [
        Case(cls, {"capacity": capacity, "buffer_dtype": dtype}, lengths=(257,))
        for cls, capacity, dtype in itertools.product(BUFFERS, CAPACITIES, BUFFER_DTYPES)
    ]
    for cls, dtype, slots, moments, update in itertools.product(
        CLASSES, HALVES, (None, *BUFFER_DTYPES), (None, *MOMENT_DTYPES), ("nearest", *UPDATES)
    ):
        precision = {
            "buffer_dtype": slots,
            "moment_dtype": moments,
            "low_precision_update": update,
        }
        cases.append(Case(cls, precision, dtype, (257,)))
    cases += [
        Case(cls, {"buffer_dtype": slots, "moment_dtype": moments, "capacity": 10}, dtype, LENGTHS)
        for cls in BUFFERS
        for slots, moments in zip(BUFFER_DTYPES, MOMENT_DTYPES * 2, strict=True)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return cases


def _state(optimizer: CriticalAdam, params: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and their state as it lies in memory, a commit that is due included."""
    for i, param in enumerate(params):
        yield f"params[{i}]", param
        for key, value in sorted(optimizer.state[param].items()):
            yield f"state[{i}][{key!r}]", value


def _saved(optimizer: CriticalAdam) -> Iterator[tuple[str, Tensor]]:
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in sorted(state.items()):
            yield f"state_dict: state[{i}][{key!r}]", value


def _bits(tensor: Tensor) -> Tensor:
    values = real(tensor).cpu().contiguous().reshape(-1)
    if values.dtype not in (torch.int8, torch.float8_e4m3fn):
        values = (
            torch.where(values.isnan(), torch.nan, values) if values.is_floating_point() else values
        )
    return values.view(torch.uint8)


def _check(actual: Iterator[tuple[str, Tensor]], expected: Iterator[tuple[str, Tensor]]) -> None:
    for (name, value), (expected_name, expected_value) in zip(actual, expected, strict=True):
        assert name == expected_name
        assert value.dtype == expected_value.dtype, name
        bits, expected_bits = _bits(value), _bits(expected_value)
        assert torch.equal(bits, expected_bits), (
            f"{name}: {int((bits != expected_bits).sum())} of {len(bits)} bytes differ"
        )


def _run(case: Case) -> None:
    """Take the steps with both backends, and compare everything after each."""
    made = make_params([(length,) for length in case.lengths], case.dtype, seed=2)
    runs = []
    for backend in ("cpu", "triton"):
        params = [param.to(device_of(backend), copy=True) for param in made]
        runs.append((params, case.make(params, backend)))
    for step, grads in enumerate(case.gradients()):
        for params, optimizer in runs:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.device)
                if step == 1:
                    # Sums are rebuilt once in 4 C steps: the run comes to the next.
                    optimizer.state[param]["step"] += 2 * case.capacity
            optimizer.step()
        (expected_params, expected), (actual_params, actual) = runs
        _check(_state(actual, actual_params), _state(expected, expected_params))
    _check(_saved(runs[1][1]), _saved(runs[0][1]))


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
def test_each(case: Case) -> None:
    """Each class with each option away from its default, each dtype and each capacity."""
    _run(case)


@pytest.mark.parametrize("seed", range(3))
def test_norms_of_float64_are_rounded_once(seed: int) -> None:
    """The squares of a chunk add up as real numbers do, and so do the chunks.

    A sum's order shows in few norms: the runs above need not meet one.
    """
    params = make_params([(length,) for length in (*TAILS, *LENGTHS)], torch.float64, seed=seed)
    chunks = [torch.split(param.detach().square(), CHUNK_SIZE) for param in params]
    expected = [math.fsum(math.fsum(chunk.tolist()) for chunk in parts) for parts in chunks]
    for backend in ("cpu", "triton"):
        bucket = make_bucket(
            [param.to(device_of(backend)) for param in params], Options(), fused=True
        )
        bucket.grads = bucket.params
        sums = select(backend, bucket.device).sq_norms(bucket, step_options(Options()))
        assert sums.tolist() == expected, backend


@pytest.mark.slow
@pytest.mark.parametrize("case", _slow_cases(), ids=lambda case: case.name)
def test_products(case: Case) -> None:
    """Options in every dtype, every capacity by how slots are stored, every pair of roundings."""
    _run(case)


@pytest.mark.parametrize("cls", BUFFERS)
def test_a_running_sum_is_rebuilt_by_chunks_of_the_cpp_pass(cls: Class) -> None:
    """The cases can tell: a sum that is wrong by more than a rounding is right after the run."""
    case = Case(cls, lengths=(CHUNK + 7,))
    (param,) = make_params([case.lengths])
    optimizer = case.make([param], "triton")
    for step, (grad,) in enumerate(itertools.islice(case.gradients(), 2 * case.capacity)):
        param.grad = grad
        if step == 1:
            optimizer.state[param]["step"] += 2 * case.capacity - 1
            optimizer.state[param]["critical_sum"] += 1e3
        optimizer.step()
    total = optimizer.state[param]["critical_sum"]
    assert total[CHUNK:].abs().max() < 100  # one step earlier than the first
    assert total[:CHUNK].abs().min() > 100
