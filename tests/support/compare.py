"""Comparing a run with the oracle's, and what of an optimizer's state there is to compare."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.flush import flush_
from tests.support.cases import Grads, grads_to_arrays, real, to_array
from tests.support.oracle import Array, Options, ParamState, oracle_step

Close = Callable[[Array, Array, str], None]


class OracleRun:
    """The oracle's parameters and state for some tensors."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = [to_array(param) for param in params]
        self.states = [ParamState.fresh(param) for param in self.params]

    def step(self, grads: Grads, options: Options) -> None:
        """Take one step."""
        oracle_step(self.params, grads_to_arrays(grads), self.states, options)


@dataclass(frozen=True)
class Seen:
    """The state of one parameter as a checkpoint would show it, complex tensors as pairs.

    A capacity of 0 is shown as an empty buffer.
    """

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    critical_buffer: Tensor
    priorities: Tensor
    critical_sum: Tensor | None

    @property
    def filled(self) -> int:
        """The number of filled slots."""
        return int((self.priorities > -torch.inf).sum())


def committed_copy(state: dict[str, Any]) -> dict[str, Tensor]:
    """Copy a state to the CPU, complex tensors as pairs, with its pending commit made there alone.

    `state_dict()` would commit in the original too, and the commit that the next step makes by
    itself would never run in a test that looks at every step.
    """
    copied = {key: real(value).to("cpu", copy=True) for key, value in state.items()}
    if "pending_slot" in copied:
        flush_(copied)
    return copied


def see(state: dict[str, Any]) -> Seen:
    """Return what a checkpoint would show of a state; see `committed_copy`."""
    copied = committed_copy(state)
    no_slots = copied["exp_avg"].new_empty(0, *copied["exp_avg"].shape)
    return Seen(
        step=int(copied["step"]),
        exp_avg=copied["exp_avg"],
        exp_avg_sq=copied["exp_avg_sq"],
        max_exp_avg_sq=copied.get("max_exp_avg_sq"),
        critical_buffer=copied.get("critical_buffer", no_slots),
        priorities=copied.get("priorities", torch.empty(0)),
        critical_sum=copied.get("critical_sum"),
    )


def saved(optimizer: CriticalAdam, index: int) -> Seen:
    """Return the state of a parameter from the optimizer's state dict."""
    return see(optimizer.state_dict()["state"][index])


def within(actual: Array, expected: Array, bound: Array | float, what: str) -> None:
    """Check that values differ by no more than `bound`; NaN and infinities are themselves."""
    with np.errstate(invalid="ignore"):  # infinity less itself
        error = np.abs(actual - expected)
    if not ((error <= bound) & np.isfinite(error)).all():
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[~finite], expected[~finite], err_msg=what)
        assert not (error > bound).any(), f"{what}: {actual} should be {expected}"
        assert np.isfinite(actual[finite]).all(), f"{what}: {actual} should be {expected}"


def largest(values: Array) -> float:
    """Return the largest finite magnitude, 0 where there is none."""
    magnitudes = np.abs(values[np.isfinite(values)])
    return float(magnitudes.max()) if magnitudes.size else 0.0


def relative(rtol: float, atol_of_largest: float, size: float = 0.0) -> Close:
    """Return a comparison to `rtol` of each value or to a part of the tensor's largest value.

    The second is for values that are small because their terms cancel: the roundings of the terms
    stay.

    Args:
        rtol: Part of each value.
        atol_of_largest: Part of the largest value.
        size: The largest value is taken to be at least this: for small tensors that are what is
            left of larger terms.
    """

    def close(actual: Array, expected: Array, what: str) -> None:
        with np.errstate(invalid="ignore"):
            bound = rtol * np.abs(expected) + atol_of_largest * max(size, largest(expected))
        within(actual, expected, bound, what)

    return close


def check_state(
    seen: Seen, expected: ParamState, capacity: int, close: Close, where: str, *, amsgrad: bool
) -> None:
    """Check a state against the oracle's: keys and counts exactly, the rest by `close`."""
    assert seen.step == expected.step, where
    np.testing.assert_array_equal(
        seen.priorities.numpy(), expected.priorities(capacity), err_msg=f"{where}: keys"
    )
    pairs: list[tuple[str, Tensor | None, NDArray[Any]]] = [
        ("exp_avg", seen.exp_avg, expected.exp_avg),
        ("exp_avg_sq", seen.exp_avg_sq, expected.exp_avg_sq),
        ("slots", seen.critical_buffer, expected.critical_buffer(capacity)),
    ]
    if amsgrad:
        pairs.append(("max_exp_avg_sq", seen.max_exp_avg_sq, expected.max_exp_avg_sq))
    for name, actual, wanted in pairs:
        assert actual is not None, f"{where}: no {name}"
        close(to_array(actual), wanted, f"{where}: {name}")
