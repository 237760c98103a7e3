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
from typing import Any

import pytest
import torch

from cm_fused import AdamCG, AdamCM, AdamWCM
from cm_fused._backends.select import select
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused.rounding import HALF_DTYPES, INT4
from tests.support.cases import (
    CHUNK,
    device_of,
    make_bucket,
    make_params,
    needs_cpu_backend,
    needs_triton,
    step_options,
)
from tests.support.oracle import Options
from tests.support.same_bits import Case, Class, run

DEVICE = device_of("triton")
pytestmark = [
    needs_cpu_backend,
    needs_triton,
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
]

CLASSES: tuple[Class, ...] = (AdamCM, AdamCG, AdamWCM)
BUFFERS: tuple[Class, ...] = CLASSES[:2]
CAPACITIES = (*range(12), 20)
DTYPES = (torch.float32, torch.float64, *HALF_DTYPES, torch.complex64)
BUFFER_DTYPES = (*HALF_DTYPES, torch.float8_e4m3fn, torch.int8, INT4)
MOMENT_DTYPES = (torch.bfloat16, torch.int8)
UPDATES = ("stochastic", "kahan")
# Capacities on either side of the one from which on a running sum is kept.
AROUND_RUNNING_SUM = {
    **dict.fromkeys(HALF_DTYPES, (5, 6)),
    **dict.fromkeys((torch.float8_e4m3fn, torch.int8), (9, 10)),
    INT4: (5, 26),
}
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
    {"adjust_lr_fn": "match_rms_adamw"},
    {"adjust_lr_fn": "match_rms_adamw", "lr": torch.tensor(0.03), "weight_decay": 0.1},
    {"max_grad_norm": 0.5},
    {"skip_nonfinite": True},
)


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
        for capacity in AROUND_RUNNING_SUM[dtype]
    ]
    cases += [
        Case(cls, {"moment_dtype": dtype}, lengths=(257,))
        for cls in BUFFERS
        for dtype in MOMENT_DTYPES
    ]
    cases += [
        Case(AdamCM, {"low_precision_update": update}, dtype, (257,))
        for dtype in HALF_DTYPES
        for update in UPDATES
    ]
    split = {"low_precision_update": "split"}
    cases += [
        Case(AdamCM, {**split, "weight_decay": 0.1}, torch.bfloat16, (257,)),
        Case(AdamCG, {**split, "weight_decay": 0.1}, torch.bfloat16, (CHUNK_SIZE + 3,)),
    ]
    cases += [Case(cls, {}, lengths=(length,)) for cls in BUFFERS for length in LENGTHS]
    cases += [
        Case(cls, {}, lengths=(257, CHUNK_SIZE), layout=layout, grad_dtype=dtype)
        for cls in BUFFERS
        for dtype in HALF_DTYPES
        for layout in ("", "shifted", "transposed", "gaps")
    ]
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
    # The most slots that are read; the step's interpretation takes 9 s.
    cases.append(Case(AdamCM, {"capacity": 25, "buffer_dtype": INT4}, lengths=(257,)))
    for cls, dtype, slots, moments, update in itertools.product(
        CLASSES, HALF_DTYPES, (None, *BUFFER_DTYPES), (None, *MOMENT_DTYPES), ("nearest", *UPDATES)
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
        for slots, moments in zip(BUFFER_DTYPES, itertools.cycle(MOMENT_DTYPES), strict=False)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    return cases


@pytest.mark.parametrize("case", _cases(), ids=lambda case: case.name)
def test_each(case: Case) -> None:
    """Each class with each option away from its default, each dtype and each capacity."""
    run(case)


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
    run(case)


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
