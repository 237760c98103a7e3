"""The rule that decides every verdict of the report."""

from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

CONFIDENCE = 0.95
_RESAMPLES = 10_000

RULE = (
    "Every claim is a difference with a sign that the paper predicts, taken between runs that "
    "share their start, averaged, with a 95 % percentile bootstrap interval over the starts "
    f"({_RESAMPLES} resamples, fixed seed); for trained models, of few seeds, Student's t "
    "interval over the seeds. **Reproduced in direction**: the whole interval lies "
    "on the predicted side of zero. **Contradicted** (not reproduced, and the opposite is "
    "established): it lies on the other side. **Not reproduced**: it contains zero."
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
class Claim:
    """A claim of the paper and what was found.

    Args:
        figure: Where the paper makes it.
        text: The claim.
        measure: What the difference is of; the paper predicts it to be positive.
        difference: The difference found.
    """

    figure: str
    text: str
    measure: str
    difference: Interval

    @property
    def verdict(self) -> str:
        """What `RULE` says."""
        if self.difference.low > 0:
            return "reproduced in direction"
        return "contradicted" if self.difference.high < 0 else "not reproduced"


def mean_interval(samples: Tensor) -> Interval:
    """Return the mean of independent samples (N,), N >= 2, with its bootstrap interval."""
    values = samples.double().numpy()
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=1000,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    bounds = result.confidence_interval
    return Interval(float(values.mean()), float(bounds.low), float(bounds.high))


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
