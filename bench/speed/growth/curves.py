"""The quantities that grow, and the times of steps as they do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer
from tqdm import tqdm

from bench.speed.precision.setups import PRECISIONS
from bench.timing import Step, by_host_clock, interleave
from cm_fused import AdamCM

# Steps beyond those that fill the buffer: every timed step replaces a slot.
WARM_UP = 2
# The optimizers of every point: torch's fused AdamW, whose growth is the machine's, and ours.
BASELINE = "AdamW"
TIMED = {name: precision for name, precision in PRECISIONS.items() if precision.backend is None}


@dataclass(frozen=True)
class Size:
    """Parameters of an optimizer: `groups` param groups of `tensors` tensors of `numel` each."""

    groups: int = 1
    tensors: int = 1
    numel: int = 256
    capacity: int = 5


@dataclass(frozen=True)
class Curve:
    """A quantity that grows.

    Attributes:
        name: Of the axis.
        grows: The attribute of `size` that does.
        values: Points on the axis.
        size: What is the same for all points.
        rounds: Timed steps of a point.
    """

    name: str
    grows: str
    values: tuple[int, ...]
    size: Size = field(default_factory=Size)
    rounds: int = 25

    def at(self, value: int) -> Size:
        """Return the size at a point."""
        return replace(self.size, **{self.grows: value})


CURVES = (
    Curve(
        "elements of one tensor",
        "numel",
        (1_000_000, 3_000_000, 10_000_000, 20_000_000, 30_000_000, 60_000_000),
    ),
    Curve("tensors of 256", "tensors", (30, 100, 300, 1000, 3000, 10_000, 20_000), rounds=40),
    Curve("groups of 10 tensors", "groups", (1, 3, 10, 30, 100, 300), Size(tensors=10), rounds=60),
    Curve("slots C", "capacity", (1, 2, 3, 5, 10, 20, 40, 64), Size(numel=8_000_000)),
)
# The sizes whose time with one thread is compared with that of two.
THREADED = {
    "one tensor of 30 M": Size(numel=30_000_000),
    "1000 tensors of 256": Size(tensors=1000),
}


def optimizers(size: Size) -> dict[str, Optimizer]:
    """Return the optimizers of a point, with gradients, which they share."""
    grads = [
        [0.01 * torch.randn(size.numel) for _ in range(size.tensors)] for _ in range(size.groups)
    ]

    def groups() -> list[dict[str, list[torch.Tensor]]]:
        made = []
        for of_group in grads:
            params = [torch.randn_like(grad) for grad in of_group]
            for param, grad in zip(params, of_group, strict=True):
                param.grad = grad
            made.append({"params": params})
        return made

    ours = {
        name: AdamCM(
            groups(),
            capacity=size.capacity,
            buffer_dtype=precision.buffer_dtype,
            moment_dtype=precision.moment_dtype,
        )
        for name, precision in TIMED.items()
    }
    return {BASELINE: torch.optim.AdamW(groups(), fused=True), **ours}


def measure(curve: Curve) -> dict[str, list[list[float]]]:
    """Return the seconds of every round of each optimizer, at each point of a curve."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in (BASELINE, *TIMED)}
    for value in tqdm(curve.values, desc=curve.name, disable=None):
        size = curve.at(value)
        steps = {name: optimizer.step for name, optimizer in optimizers(size).items()}
        timed = interleave(steps, curve.rounds, warm_up=WARM_UP + size.capacity)
        for name, of_name in seconds.items():
            of_name.append(timed.seconds[name])
    return seconds


def exponent(
    values: Sequence[int], seconds: Sequence[Sequence[float]], resamples: int = 2000
) -> tuple[float, float, float]:
    """Return the p of the best fit time ~ value^p, and the ends of its 95 % interval.

    The fit is of the medians of the rounds at each point. The interval comes from drawing each
    point's rounds anew, with replacement.
    """
    generator = np.random.default_rng(0)
    x = np.log(values)

    def fit(medians: NDArray[np.float64]) -> float:
        return float(np.polyfit(x, np.log(medians), 1)[0])

    rounds = [np.asarray(of_point) for of_point in seconds]
    drawn = [
        fit(np.array([np.median(generator.choice(each, len(each))) for each in rounds]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return fit(np.array([np.median(each) for each in rounds])), float(low), float(high)


def speedups(size: Size, rounds: int) -> dict[str, list[float]]:
    """Return each optimizer's time with one thread over its time with two, of every round."""
    made = {name: optimizer.step for name, optimizer in optimizers(size).items()}
    by_threads = {f"{threads} {name}": step for threads in (1, 2) for name, step in made.items()}
    before = torch.get_num_threads()
    timed = interleave(
        by_threads, rounds, warm_up=WARM_UP + size.capacity, take_round=_round_by_threads
    )
    torch.set_num_threads(before)
    return {name: timed.ratios(f"1 {name}", f"2 {name}") for name in made}


def _round_by_threads(steps: Mapping[str, Step]) -> dict[str, float]:
    """Take the steps with one thread, then those with two: a change of threads takes time."""
    seconds = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.ones(1_000_000).add_(1.0)  # the first to use the threads
        chosen = {name: step for name, step in steps.items() if name.startswith(f"{threads} ")}
        seconds.update(by_host_clock(chosen))
    return seconds
