"""The measurements of a step on a GPU: the device's time, the host's, launches and memory.

NOTE: [Device time]
Two CUDA events around a step tell the device's time only if the device never waits for the host in
between. So it is kept busy while the host enqueues: with a kernel that spins for longer than that
takes, and after it the baseline's step and the other's, three events around them. A step with more
launches than the queue holds (about a thousand) makes the host wait for the device, and the device
for the host after that: `queued` says in what share of the rounds everything was enqueued before
the spinning ended. Where that is not 1, the device's time holds the host's.
"""

from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from bench.timing import Step, Timed, by_host_clock, interleave

_COPY_ELEMENTS = 2**28
_COPY_ROUNDS = 15
_SPIN_CYCLES = 10_000_000
# The spinning lasts this many times as long as it took to enqueue both steps before, and this much
# more; but no longer than that, as all the rounds together may not take minutes.
_SPIN_FACTOR, _SPIN_MARGIN, _SPIN_MOST = 2.0, 3e-4, 0.5
# A case's rounds end early when they have taken this long.
_MOST_SECONDS = 1.5
_MAX_HOST_ROUNDS = 50


class _Event(Protocol):
    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any) -> float: ...


def _event() -> _Event:
    event: _Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event


def _seconds(start: _Event, end: _Event) -> float:
    return start.elapsed_time(end) / 1e3


@cache
def _spin_rate() -> float:
    """Return the cycles a second that the spinning kernel counts."""
    rates = []
    for _ in range(3):
        start, end = _event(), _event()
        start.record()
        torch.cuda._sleep(_SPIN_CYCLES)  # type: ignore[no-untyped-call]
        end.record()
        torch.cuda.synchronize()
        rates.append(_SPIN_CYCLES / _seconds(start, end))
    return median(rates)


def _spin(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * _spin_rate()))  # type: ignore[no-untyped-call]


def copy_bytes_per_second(smoke: bool) -> float:
    """Return the bytes per second that a large copy reads and writes.

    Args:
        smoke: Copy next to nothing.
    """
    elements = 2**16 if smoke else _COPY_ELEMENTS
    source = torch.ones(elements, device="cuda")
    target = torch.zeros(elements, device="cuda")
    clock = _DeviceClock(_SPIN_MARGIN)
    steps = {"copy": lambda: target.copy_(source)}
    timed = interleave(steps, _COPY_ROUNDS, warm_up=1, take_round=clock)
    return 2 * source.nbytes / timed.median("copy")


class _DeviceClock:
    """Takes a round of steps and returns the device's seconds of each; see NOTE: [Device time].

    Args:
        spin_seconds: How long the device spins first.

    Attributes:
        queued: Of how many rounds everything was enqueued before the spinning ended.
    """

    def __init__(self, spin_seconds: float) -> None:
        self._spin_seconds = spin_seconds
        self.queued = 0

    def __call__(self, steps: Mapping[str, Step]) -> dict[str, float]:
        events = [_event() for _ in range(len(steps) + 1)]
        torch.cuda.synchronize()
        _spin(self._spin_seconds)
        events[0].record()
        for step, event in zip(steps.values(), events[1:], strict=True):
            step()
            event.record()
        self.queued += not events[0].query()
        torch.cuda.synchronize()
        between = pairwise(events)
        return dict(zip(steps, (_seconds(*pair) for pair in between), strict=True))


def paired_rounds(steps: Mapping[str, Step], rounds: int) -> tuple[Timed, float]:
    """Time steps on the device, in turn; see NOTE: [Device time].

    Args:
        steps: By name, warmed up.
        rounds: How many, or fewer where they take long.

    Returns:
        The times, and `queued` of the note.
    """
    torch.cuda.synchronize()
    seconds = sum(by_host_clock(steps).values())
    torch.cuda.synchronize()
    clock = _DeviceClock(min(_SPIN_FACTOR * seconds + _SPIN_MARGIN, _SPIN_MOST))
    timed = interleave(steps, rounds, most_seconds=_MOST_SECONDS, take_round=clock)
    return timed, clock.queued / len(next(iter(timed.seconds.values())))


def host_seconds(step: Step, rounds: int) -> float:
    """Return the median time that a step keeps the host, the device not waited for.

    Args:
        step: Takes a step, warmed up.
        rounds: How many, or fewer where they take long.
    """
    torch.cuda.synchronize()
    timed = interleave({"own": step}, min(rounds, _MAX_HOST_ROUNDS), most_seconds=_MOST_SECONDS)
    torch.cuda.synchronize()
    return timed.median("own")


def peak_growth(step: Step) -> int:
    """Return the bytes that a step allocates beyond what is there before."""
    return allocations(step)["peak_growth_bytes"]


def allocations(step: Step) -> dict[str, int]:
    """Return how often a step allocates, and the bytes beyond what is there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    allocated = "allocation.all.allocated"
    peak = after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"]
    return {"allocations": after[allocated] - before[allocated], "peak_growth_bytes": peak}


def launches(step: Step) -> dict[str, int]:
    """Return what a step has the device do, as torch.profiler counts it.

    Returns:
        "kernels" and "copies" (and fills) that the device ran, and "calls" by which the host
        launched kernels or whole graphs. All 0 where the profiler sees no device.
    """
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    counts = {"kernels": 0, "copies": 0, "calls": 0}
    for event in profiler.events() or ():
        if event.device_type.name == "CPU":
            # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, cudaGraphLaunch.
            counts["calls"] += event.name.startswith("cu") and "Launch" in event.name
        elif not getattr(event, "is_user_annotation", False):
            kind = "copies" if event.name.startswith(("Memcpy", "Memset")) else "kernels"
            counts[kind] += 1
    return counts
