"""A fused backend beside the "eager" one, step by step from the same state."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import (
    Grads,
    copy_of,
    device_of,
    eps_of,
    make_optimizer,
    real,
    to_array,
    ulp,
)
from tests.support.compare import Seen, largest, see, within
from tests.support.oracle import Array, Options

# (parameters, backend) -> the optimizer of a test.
Maker = Callable[[list[Tensor], str], CriticalAdam]


def maker(options: Options) -> Maker:
    """Return what makes an optimizer with these options for all parameters."""
    return lambda params, backend: make_optimizer(params, options, backend)


class Lockstep:
    """Two optimizers that start every step from the same parameters and state.

    After a step the fused backend's result is compared with the reference's and then replaced by
    it, so that a failure names one step and no rounding adds up. A commit that is pending stays
    pending: the slot keeps its old content, and the next step has to make the commit.

    NOTE: [Bounds of one step]
    Both compute the same formulas; torch's kernels contract some products and sums to one
    operation. Let e be the state dtype's eps, twice the most that one rounding costs, C the
    capacity and M the sum of the largest |m|, |g|, L2 term and value of each slot; the evicted
    one counts, since a running sum loses it by subtraction. Then, worst case over both sides:

    - exp_avg: two products and a sum on each side, 3 e M.
    - the buffer's sum: C - 1 additions, or C - 1 and two in a running sum, on each side, and the
      mean's product: (C + 4) e M in the aggregate a, exp_avg's share included.
    - exp_avg_sq: twice a's share, for the square, and four roundings: (2 (C + 4) + 4) e of the
      larger of v and (1 - beta2) M^2.
    - the parameter: two roundings of its own, 2 e |p|, and the shares of numerator and
      denominator, 4 (C + 4) e of the largest change in the tensor; a numerator that cancels has
      a's share of the largest value, hence not of its own change.

    A half parameter is rounded from results that differ by so little that they seldom lie on two
    sides of a midpoint: one ulp apart, and at most one element in a hundred.
    """

    def __init__(self, params: list[Tensor], make: Maker, backend: str) -> None:
        self.device = device_of(backend)
        self.params = [copy_of(param, self.device).requires_grad_() for param in params]
        self.expected = [copy_of(param, self.device).requires_grad_() for param in params]
        self.optimizer = make(self.params, backend)
        self.reference = make(self.expected, "eager")
        self.taken = 0

    def step(self, grads: Grads) -> None:
        """Take one step with both, compare, and give the first the state of the second."""
        if self.device.type != "cpu":
            grads = [None if grad is None else copy_of(grad, self.device) for grad in grads]
        before = [self._before(param, grad) for param, grad in self._pairs(self.params, grads)]
        for params, optimizer in self._sides():
            for param, grad in self._pairs(params, grads):
                param.grad = grad
            kept = [None if grad is None else grad.clone() for grad in grads]
            optimizer.step()
            for grad, copy in zip(grads, kept, strict=True):
                assert grad is None or copy is None or _same_bits(grad, copy), ".grad was written"
        self.taken += 1
        for i, (scale, old) in enumerate(before):
            self._compare(i, scale, old)
        self._synchronize()

    def _sides(self) -> tuple[tuple[list[Tensor], CriticalAdam], ...]:
        return (self.params, self.optimizer), (self.expected, self.reference)

    @staticmethod
    def _pairs(params: list[Tensor], grads: Grads) -> list[tuple[Tensor, Tensor | None]]:
        return list(zip(params, grads, strict=True))

    def _before(self, param: Tensor, grad: Tensor | None) -> tuple[float, Array]:
        """Return M of the bounds, and the parameter."""
        state = self.optimizer.state.get(param, {})
        old = to_array(param)
        terms = [] if grad is None else [grad]
        if state:
            terms = [*terms, state["exp_avg"], *state.get("critical_buffer", ())]
        weight_decay = max(group["weight_decay"] for group in self.optimizer.param_groups)
        l2_term = weight_decay * largest(old)
        return l2_term + sum(largest(to_array(term)) for term in terms), old

    def _compare(self, i: int, scale: float, old: Array) -> None:
        where = f"step {self.taken}, params[{i}]"
        param, reference = self.params[i], self.expected[i]
        state = self.optimizer.state.get(param, {})
        expected_state = self.reference.state.get(reference, {})
        if not expected_state:  # it has not taken part in any step
            assert not state, where
            within(to_array(param), to_array(reference), 0.0, where)
            return
        seen, expected = see(state), see(expected_state)
        capacity = len(expected.priorities)
        eps = eps_of(param.dtype)
        self._compare_keys(seen, expected, where)
        m = 3 * eps * scale
        aggregate = (capacity + 4) * eps * scale
        beta2 = min(group["betas"][1] for group in self.optimizer.param_groups)
        square = max(largest(to_array(expected.exp_avg_sq)), (1 - beta2) * scale**2)
        v = (2 * (capacity + 4) + 4) * eps * square
        within(to_array(seen.exp_avg), to_array(expected.exp_avg), m, f"{where}: exp_avg")
        within(to_array(seen.exp_avg_sq), to_array(expected.exp_avg_sq), v, f"{where}: exp_avg_sq")
        if expected.max_exp_avg_sq is not None:
            assert seen.max_exp_avg_sq is not None, where
            within(
                to_array(seen.max_exp_avg_sq),
                to_array(expected.max_exp_avg_sq),
                v,
                f"{where}: max_exp_avg_sq",
            )
        slots = to_array(expected.critical_buffer)
        within(to_array(seen.critical_buffer), slots, m, f"{where}: slots")
        if seen.critical_sum is not None:
            within(to_array(seen.critical_sum), slots.sum(0), aggregate, f"{where}: critical_sum")
        change = 4 * (capacity + 4) * eps * largest(to_array(reference) - old)
        self._compare_param(to_array(param), to_array(reference), old, change, param.dtype, where)

    @staticmethod
    def _compare_keys(seen: Seen, expected: Seen, where: str) -> None:
        assert seen.step == expected.step, where
        # Both take the norm in float64 of the same gradients; it is rounded to float32 after.
        np.testing.assert_array_equal(
            seen.priorities.numpy(), expected.priorities.numpy(), err_msg=f"{where}: keys"
        )

    @staticmethod
    def _compare_param(
        actual: Array, expected: Array, old: Array, change: float, dtype: torch.dtype, where: str
    ) -> None:
        if dtype in (torch.bfloat16, torch.float16):
            # Where a value is not finite there is no distance to measure.
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=where)
            distance = np.abs(actual - expected)[finite]
            bound = ulp(expected, dtype)[finite] + change
            assert (distance <= bound).all(), f"{where}: {(distance - bound).max()} over an ulp"
            differing = int((distance > change).sum())
            assert differing <= 1 + 0.01 * actual.size, f"{where}: {differing} elements differ"
            return
        own = 2 * eps_of(dtype) * max(largest(expected), largest(old))
        within(actual, expected, own + change, where)

    def _synchronize(self) -> None:
        with torch.no_grad():
            for param, reference in zip(self.params, self.expected, strict=True):
                param.copy_(reference)
                if param in self.optimizer.state:
                    _copy_state(self.optimizer.state[param], self.reference.state[reference])


def _copy_state(state: dict[str, Any], reference: dict[str, Any]) -> None:
    pending = int(state.get("pending_slot", -1))
    for key, value in reference.items():
        if key == "critical_buffer" and pending >= 0:
            kept = state[key][pending].clone()
            state[key].copy_(value)
            state[key][pending] = kept
        else:
            state[key].copy_(value)
    if "critical_sum" in state:
        torch.sum(state["critical_buffer"], 0, out=state["critical_sum"])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(*(real(x).reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))
