"""The one timing loop: steps take turns, so that what else the machine does falls on all alike."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter

Step = Callable[[], object]
# Takes every step once and returns the seconds of each.
Round = Callable[[Mapping[str, Step]], dict[str, float]]

# A time limit ends no measurement before this many rounds.
MIN_ROUNDS = 5


@dataclass(frozen=True)
class Timed:
    """The seconds of each step in every round, by name."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median seconds of a step."""
        return median(self.seconds[name])

    def ratios(self, name: str, baseline: str) -> list[float]:
        """Return a step's time over the baseline's of the same round."""
        pairs = zip(self.seconds[name], self.seconds[baseline], strict=True)
        return [own / other for own, other in pairs]

    def ratio(self, name: str, baseline: str) -> float:
        """Return the median of `ratios`."""
        return median(self.ratios(name, baseline))


def by_host_clock(steps: Mapping[str, Step]) -> dict[str, float]:
    """Take every step once, in order; return the seconds of each on the host's clock."""
    seconds = {}
    for name, step in steps.items():
        start = perf_counter()
        step()
        seconds[name] = perf_counter() - start
    return seconds


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    *,
    warm_up: int = 0,
    before_round: Step | None = None,
    most_seconds: float = math.inf,
    take_round: Round = by_host_clock,
) -> Timed:
    """Time steps that take turns.

    Args:
        steps: By name, in the order of their turns.
        rounds: Timed turns of each.
        warm_up: Rounds before them, which are not timed.
        before_round: Called before each round, not timed.
        most_seconds: The rounds end early when they have taken this long, at the earliest after
            `MIN_ROUNDS`.
        take_round: What takes a round; default, the host's clock.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    start = perf_counter()
    for turn in range(-warm_up, rounds):
        if before_round is not None:
            before_round()
        of_round = take_round(steps)
        if turn < 0:
            start = perf_counter()
            continue
        for name, taken in of_round.items():
            seconds[name].append(taken)
        if turn + 1 >= MIN_ROUNDS and perf_counter() - start > most_seconds:
            break
    return Timed(seconds)
