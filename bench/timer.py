"""Timing a step on the CPU or on a CUDA device."""

from collections.abc import Callable
from time import perf_counter

import torch


class Timer:
    """A step that is timed whenever it is called.

    Attributes:
        seconds: Of every call, from its start until the device is through with it.
        host_seconds: Of every call, until it returned.
    """

    def __init__(self, step: Callable[[], object], device_type: str) -> None:
        self._step = step
        self._on_cuda = device_type == "cuda"
        self.seconds: list[float] = []
        self.host_seconds: list[float] = []

    def __call__(self) -> None:
        """Take a step, and wait for it."""
        if not self._on_cuda:
            start = perf_counter()
            self._step()
            self.host_seconds.append(perf_counter() - start)
            self.seconds.append(self.host_seconds[-1])
            return
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        # The device is idle: between the events is all it does and all it waits for.
        torch.cuda.synchronize()
        begin.record()
        start = perf_counter()
        self._step()
        self.host_seconds.append(perf_counter() - start)
        end.record()
        end.synchronize()
        self.seconds.append(begin.elapsed_time(end) / 1e3)
