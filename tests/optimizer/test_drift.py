"""The running sum of the slots stays the sum of the slots, however long a run is.

NOTE: [Rebuilding the running sum]
In float32 every admission adds the difference of two slots to the sum: two roundings, whose errors
are as large as the slots were then and never leave. The library therefore computes each chunk's sum
anew from the slots once in 4 C steps, C the capacity. What may gather in between is 4 C admissions'
roundings, 8 C u of the slots' size, u = 2^-24: 1e-5 at C = 20.

Measured, as a part of the sum's norm: over 100,000 steps in which the gradients shrink a
thousandfold at most 2.3e-7; a sum that only follows the admissions ends 2e-3 off.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cm_fused._backends import cpu
from cm_fused._bucket import Batch, Bucket
from cm_fused._optimizer.checks import BUFFER_DTYPES
from cm_fused._state import access
from cm_fused._state.flush import flush_
from cm_fused._state.table import KEYS
from cm_fused.rounding import INT4, LARGEST
from tests.support.cases import (
    CHUNK,
    KINDS,
    Kind,
    generator,
    make_bucket,
    make_params,
    needs_cpu_backend,
)
from tests.support.oracle import Options

STEPS = 100_000
CHECKS = 50
SIZE = 33
FALL = 1e3
# Larger than that of the long run, so that what it leaves is far beyond the bound.
ABRUPT_FALL = 1e6
BOUND = 1e-5


def _scales() -> NDArray[np.float64]:
    """Return the gradients' scale at every step: it falls by `FALL` over the run."""
    return np.asarray(FALL ** (-np.arange(STEPS) / STEPS))


def _draws(size: int) -> list[Tensor]:
    """Return gradients of scale 1, taken in turn; their number has no divisor with 4 C."""
    source = generator(3)
    return [torch.randn(size, generator=source) for _ in range(97)]


def _joined(buckets: list[Bucket]) -> Bucket:
    """Return one bucket of the tensors of several: a step of many costs little more than one's."""
    for bucket in buckets:
        # A list has an item for each tensor. Where there are no scales, it is not looked at.
        bucket.state.setdefault("critical_scales", [torch.empty(0)])
    lists = {
        key: [tensor for bucket in buckets for tensor in bucket[key]]
        for key in KEYS
        if any(bucket[key] for bucket in buckets)
    }
    first = buckets[0]
    return Bucket(
        [param for bucket in buckets for param in bucket.params],
        [],
        lists,
        list(range(len(buckets))),
        critical_gradients=first.critical_gradients,
        options=first.options,
    )


class _Run:
    """Steps of tensors that get the same gradient, one for each dtype of slots.

    By the library's operators, which cost less than an optimizer's.
    """

    def __init__(
        self, size: int, options: Options, buffer_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    ) -> None:
        self.bucket = _joined(
            [
                make_bucket(make_params([(size,)]), options, fused=True, buffer_dtype=dtype)
                for dtype in buffer_dtypes
            ]
        )
        self.gradient = torch.zeros(size)
        self.batch = Batch([self.bucket], self.bucket.params, [self.gradient] * len(buffer_dtypes))
        cpu.register(self.batch)
        self.draws = _draws(size)
        self.taken = 0

    def step(self, scale: float) -> None:
        """Take a step with the next draw times `scale`."""
        draw = self.draws[self.taken % len(self.draws)]
        torch.mul(draw, scale, out=self.gradient)
        cpu.prepare(self.batch)()
        self.taken += 1

    def slots(self, i: int = 0) -> tuple[Tensor, Tensor]:
        """Return copies of tensor i's slots and running sum, with what is pending committed."""
        slots = self.bucket["critical_buffer"][i].clone()
        scales = self.bucket["critical_scales"][i].clone() if slots.dtype in LARGEST else None
        running_sum = self.bucket["critical_sum"][i].clone()
        if self.bucket["pending_slot"]:
            state = {
                "exp_avg": self.bucket["exp_avg"][i],
                "critical_buffer": slots,
                "critical_sum": running_sum,
                "pending_slot": self.bucket["pending_slot"][i].clone(),
            }
            flush_(state if scales is None else {**state, "critical_scales": scales})
        exp_avg = self.bucket["exp_avg"][i]
        return access.load_slots(slots, scales, exp_avg), running_sum

    def error(self) -> float:
        """Return the worst error of all tensors' chunks, as a part of the float64 sum's norm."""
        return max(map(self._error, range(len(self.bucket.params))))

    def _error(self, i: int) -> float:
        slots, running_sum = self.slots(i)
        exact = slots.double().sum(0)
        wrong = running_sum.double() - exact
        chunks = [slice(begin, begin + CHUNK) for begin in range(0, len(exact), CHUNK)]
        return max(float(wrong[chunk].norm() / exact[chunk].norm()) for chunk in chunks)


# Five slots of the other dtypes have no running sum, and 20 of int4 have none.
@needs_cpu_backend
@pytest.mark.parametrize(
    ("capacity", "buffer_dtypes"),
    [
        (5, (torch.float32,)),
        (20, tuple(dtype for dtype in BUFFER_DTYPES if dtype is not INT4)),
        (26, (INT4,)),
    ],
    ids=["5", "20", "26"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_long_run(kind: Kind, capacity: int, buffer_dtypes: tuple[torch.dtype, ...]) -> None:
    """100,000 steps whose gradients shrink a thousandfold leave the sum right all along.

    What is stored is what is summed: slots of low precision add nothing to the sum's error.
    """
    run = _Run(SIZE, Options(kind, capacity=capacity), buffer_dtypes)
    assert len(run.bucket["critical_sum"]) == len(buffer_dtypes)
    for part in np.split(_scales(), CHECKS):
        for scale in part.tolist():
            run.step(scale)
        assert run.error() < BOUND, f"step {run.taken}"


@needs_cpu_backend
@pytest.mark.parametrize("capacity", [5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_abrupt_fall(kind: Kind, capacity: int) -> None:
    """4 C steps after the last large slot is gone, the large slots' roundings are gone too.

    Without momentum of their own (beta1 = 0) the slots fall as abruptly as the gradients. Three
    chunks, each rebuilt at a step of its own.
    """
    run = _Run(2 * CHUNK + 5, Options(kind, betas=(0.0, 0.99), capacity=capacity))
    for _ in range(2 * capacity):
        run.step(ABRUPT_FALL)
    while run.slots()[0].abs().max() > 0.01 * ABRUPT_FALL:
        run.step(1.0)
        assert run.taken < 30 * capacity, "the large slots are still there"
    for _ in range(4 * capacity):
        run.step(1.0)
    assert run.error() < BOUND
