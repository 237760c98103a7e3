"""The rule that decides every verdict of the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

CONFIDENCE = 0.95
_RESAMPLES = 10_000
_FLIPS = 100_000
_MOST = 200
# With fewer samples Student's t: the bootstrap cannot leave their range, and sign flips have no
# small p value.
_MANY = 10

HOLDS, CONTRADICTED, UNDECIDED, NOT_RUN = "holds", "contradicted", "undecided", "not run"

RULE = (
    "Every row is a difference that the paper predicts to be positive, between runs that share "
    "their start or seed. Ours is its mean with a 95 % interval: percentile bootstrap "
    f"({_RESAMPLES} resamples, fixed seed), of fewer than {_MANY} samples Student's t. p is that "
    f"of the two-sided sign-flip test (all flips, or {_FLIPS} drawn with a fixed seed), of fewer "
    "samples of the t test, unless they are equal. "
    f"**{HOLDS}**: p ≤ 0.05 and the mean is positive. **{CONTRADICTED}**: p ≤ 0.05 and the mean "
    f"is negative. **{UNDECIDED}**: p > 0.05. The same with Holm's correction over all rows that "
    "have a p stands beside it. A count of given cells has neither interval nor p; its sign "
    "decides, and zero is undecided."
)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Estimate:
    """A difference that was found.

    Args:
        interval: Of the difference; a count's is a point.
        p: That the difference is zero, in [0, 1]; None for a count.
        count: Samples, starts or seeds.
    """

    interval: Interval
    p: float | None
    count: int

    def __str__(self) -> str:
        if self.p is None:
            return f"{self.interval.value:g} of {self.count}"
        return str(self.interval)


@dataclass(frozen=True)
class Claim:
    """A row of the report: a claim of the paper in one setting, and what was found.

    Args:
        id: Figure or table and part, as "F5-loss".
        setting: "paper", or in words what differs from the paper's setting.
        text: The claim.
        measure: What the difference is of; the paper predicts it to be positive.
        paper: The paper's number for it, or "—".
        estimate: What was found; None: it was not run.
        needs: What running it takes, with the command; for what was not run.
        starts: The box of starts, where the paper does not say it.
    """

    id: str
    setting: str
    text: str
    measure: str
    paper: str
    estimate: Estimate | None
    needs: str = ""
    starts: str = ""


def paired(samples: Tensor) -> Estimate:
    """Return the estimate of independent paired differences (N,), 2 <= N <= 200."""
    values = samples.double().numpy()
    count, mean = len(values), float(values.mean())
    # Student's t of equal samples, as differences of counts may be, would be certain of them.
    are_equal = np.ptp(values) <= 1e-9 * abs(mean)
    if are_equal:
        interval = Interval(mean, mean, mean)
    else:
        interval = mean_interval(samples) if count >= _MANY else seed_interval(samples)
    if count >= _MANY or are_equal:
        return Estimate(interval, _sign_flip_p(values), count)
    return Estimate(interval, float(stats.ttest_1samp(values, 0.0).pvalue), count)


def equivalent(samples: Tensor, margin: float) -> Estimate:
    """Return the estimate of margin − |mean|, for the claim that a mean is zero in effect.

    Its p is that of two one-sided t tests, doubled to stand beside two-sided ones.

    Args:
        samples: Independent paired differences, (N,), N >= 2.
        margin: What counts as zero, > 0.
    """
    mean = mean_interval(samples)
    ends = abs(mean.low), abs(mean.high)
    nearest = 0.0 if mean.low <= 0 <= mean.high else min(ends)
    interval = Interval(margin - abs(mean.value), margin - max(ends), margin - nearest)
    data = samples.double().numpy()
    if np.ptp(data) <= 1e-9 * np.abs(data).max():  # equal samples leave nothing to chance
        return Estimate(interval, 0.0, len(data))
    above = stats.ttest_1samp(data, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(data, margin, alternative="less").pvalue
    inside, outside = max(above, below), 1 - max(above, below)
    return Estimate(interval, min(1.0, 2 * float(min(inside, outside))), len(data))


def counted(difference: float, count: int) -> Estimate:
    """Return a difference of counts out of ``count`` given cells, without chance."""
    return Estimate(Interval(difference, difference, difference), None, count)


def verdicts(claims: Sequence[Claim]) -> list[tuple[str, str]]:
    """Return what `RULE` says of each claim: raw, and with Holm's correction over all of them."""
    known = [c.estimate.p for c in claims if c.estimate is not None and c.estimate.p is not None]
    corrected = dict(zip(known, holm(known), strict=True))
    both = []
    for claim in claims:
        p = None if claim.estimate is None else claim.estimate.p
        values = (p, None if p is None else corrected[p])
        raw, after = (_verdict(claim.estimate, value) for value in values)
        both.append((raw, after))
    return both


def _verdict(estimate: Estimate | None, p: float | None) -> str:
    if estimate is None:
        return NOT_RUN
    value = estimate.interval.value
    if not value or (p is not None and p > 1 - CONFIDENCE + 1e-12):
        return UNDECIDED
    return HOLDS if value > 0 else CONTRADICTED


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number.

    Source: Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _sign_flip_p(values: NDArray[np.float64]) -> float:
    """Return the two-sided p of a mean, were each difference as likely to have the other sign."""
    values = values[values != 0]  # zeros have no sign
    if 2 ** len(values) <= _FLIPS:
        bits = np.arange(2 ** len(values))[:, None] >> np.arange(len(values)) & 1
        flipped, drawn = (2 * bits - 1.0) @ values, 0
    else:
        signs, drawn = _signs()[:, : len(values)], 1
        flipped = (signs @ values.astype(np.float32)).astype(np.float64)
    # Sums that are equal but for rounding count, and of drawn flips the one that was observed.
    as_large = int((np.abs(flipped) >= abs(values.sum()) * (1 - 1e-6)).sum())
    return (as_large + drawn) / (len(flipped) + drawn)


@cache
def _signs() -> NDArray[np.float32]:
    """Return drawn vectors of signs, (_FLIPS, _MOST)."""
    bits = np.random.default_rng(0).integers(0, 2, (_FLIPS, _MOST), dtype=np.int8)
    return (2 * bits - 1).astype(np.float32)


def mean_interval(samples: Tensor) -> Interval:
    """Return the mean of independent samples (N,), N >= 2, with its bootstrap interval."""
    values = samples.double().numpy()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(_resampling(len(values)) @ values, (tail, 1 - tail))
    return Interval(float(values.mean()), float(low), float(high))


@cache
def _resampling(count: int) -> NDArray[np.float64]:
    """Return how much each of ``count`` samples weighs in each resample, (_RESAMPLES, count)."""
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(count, np.full(count, 1 / count), _RESAMPLES)
    return drawn / count


def seed_interval(samples: Tensor) -> Interval:
    """Return the mean of a few independent samples (N,), N >= 2, with Student's t interval.

    The bootstrap of three samples cannot leave their range, and is too narrow.
    """
    values = samples.double().numpy()
    bounds = stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return Interval(float(values.mean()), float(bounds.low), float(bounds.high))


def proportion_interval(hits: Tensor) -> Interval:
    """Return the share of true values in a bool tensor (N,) with its Wilson interval."""
    test = stats.binomtest(int(hits.sum()), len(hits))
    bounds = test.proportion_ci(CONFIDENCE, method="wilson")
    return Interval(test.statistic, bounds.low, bounds.high)
