"""Fails the C++ step at each of its allocations: a module to run with `fail_at_new.cpp` preloaded.

    LD_PRELOAD=fail_at_new.so python -m tests.support.allocation_faults fail_at_new.so

Prints how many allocations were failed, by torch, its dispatcher and the library.
"""

import ctypes
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cm_fused import AdamCG, AdamCM
from tests.support.faults import OPTIONS, Make, after, assert_alike


class FailingOperator:
    """Fails the n-th allocation within the calls of an operator."""

    def __init__(self, library: str, operator: Callable[..., Any]) -> None:
        self._library = ctypes.CDLL(library)
        self._operator = operator
        self.default = self  # the one overload
        self.at: int | None = None
        self.has_failed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        if self.at is None:
            return self._operator(*args, **kwargs)
        self._library.fail_at_new(ctypes.c_long(self.at))
        try:
            return self._operator(*args, **kwargs)
        finally:
            self.has_failed = bool(self._library.stop_failing())


def fail_at_all(
    operator: FailingOperator, make: Make, steps_before: int, options: dict[str, Any]
) -> int:
    """Have a step fail at one allocation after another, and be tried again; return how many."""
    before, expected = (after(make, steps_before, 2, backend="cpu", **options) for _ in range(2))
    expected[1].step()
    number = 0
    while True:
        params, optimizer = after(make, steps_before, 2, backend="cpu", **options)
        operator.at = number
        try:
            optimizer.step()
        except MemoryError:
            operator.at = None
            assert operator.has_failed
            assert_alike((params, optimizer), before)
            optimizer.step()
            assert_alike((params, optimizer), expected)
            number += 1
        else:
            operator.at = None
            # An allocation whose failure was swallowed must not have cost anything.
            assert_alike((params, optimizer), expected)
            if not operator.has_failed:
                return number
            number += 1


def main(library: str) -> None:
    """Fail them all."""
    torch.set_num_threads(1)  # the count of allocations is one thread's
    operator = FailingOperator(library, torch.ops.cm_fused.step_registered_)
    count = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.cm_fused, "step_registered_", operator)
        for make in (AdamCM, AdamCG):
            for options in OPTIONS:
                for steps_before in (0, 3):
                    count += fail_at_all(operator, make, steps_before, options)
    print(count)


if __name__ == "__main__":
    main(sys.argv[1])
