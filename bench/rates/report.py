"""The tables: the best rates and what the optimizers lose at AdamW's, and what C and λ change."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from bench import markdown
from bench.rates.setups import ADAMW, LEARNING_RATES, MATCHED, PLAIN, SETTINGS
from bench.rates.train import Job

Losses = Mapping[Job, float]


def of_rate(losses: Losses, task: str, system: str, lr: float) -> list[float]:
    """Return the losses of all seeds at a rate."""
    return [
        loss for job, loss in losses.items() if (job.task, job.system, job.lr) == (task, system, lr)
    ]


def best_rate(losses: Losses, task: str, system: str) -> float:
    """Return the rate of lowest mean loss; one at which a seed diverged has none."""
    means = {lr: mean(of_rate(losses, task, system, lr) or [math.nan]) for lr in LEARNING_RATES}
    finite = [lr for lr in LEARNING_RATES if math.isfinite(means[lr])]
    best: float = min(finite, key=lambda lr: means[lr])
    return best


def rates_table(losses: Losses, tasks: Sequence[str]) -> str:
    """Return the table of the best rates, and of the losses at them and at AdamW's best."""
    header = ["task", f"{ADAMW}: best lr", "loss"]
    for system in (PLAIN, MATCHED):
        header += [f"{system}: best lr", "loss", f"loss at {ADAMW}'s best lr"]
    rows = []
    for task in tasks:
        rate = best_rate(losses, task, ADAMW)
        row = [task, _rate(rate), _loss(of_rate(losses, task, ADAMW, rate))]
        for system in (PLAIN, MATCHED):
            own = best_rate(losses, task, system)
            row += [_rate(own), _loss(of_rate(losses, task, system, own))]
            row.append(_beside(losses, task, system, rate))
        rows.append(row)
    low, high = _rate(LEARNING_RATES[0]), _rate(LEARNING_RATES[-1])
    seeds = len({job.seed for job in losses})
    note = (
        f"Held-out loss at the end, mean ± standard deviation of {seeds} seeds, which share "
        f"weights and batches. Rates: {low} to {high}, each twice the one before; each falls "
        "linearly to zero. Every optimizer has its own defaults, weight decay is 0.01, decoupled. "
        f"In brackets: the distance from {ADAMW}'s loss in {ADAMW}'s standard deviations, positive "
        "is worse."
    )
    return f"{markdown.table(header, rows)}\n\n{note}"


def settings_table(losses: Losses, tasks: Sequence[str]) -> str:
    """Return the table of other capacities and priority decays, each at the best of three rates."""
    header = ["task", "C=5, λ=0.7", *(name.removeprefix(f"{MATCHED}, ") for name in SETTINGS)]
    rows = []
    for task in tasks:
        rate = best_rate(losses, task, MATCHED)
        row = [task, f"{_loss(of_rate(losses, task, MATCHED, rate))}"]
        for name in SETTINGS:
            own = best_rate(losses, task, name)
            row.append(f"{_beside(losses, task, name, own, (MATCHED, rate))} at {_rate(own)}")
        rows.append(row)
    note = (
        f"Held-out loss of {MATCHED} at the best of three rates: the defaults' best, half and "
        "twice that. In brackets: the distance from the defaults in their standard deviations."
    )
    return f"{markdown.table(header, rows)}\n\n{note}"


def _beside(
    losses: Losses, task: str, system: str, lr: float, other: tuple[str, float] | None = None
) -> str:
    """Return a loss with its distance from another's, by default AdamW's at the same rate."""
    baseline = of_rate(losses, task, *(other or (ADAMW, lr)))
    own = of_rate(losses, task, system, lr)
    distance = (mean(own) - mean(baseline)) / stdev(baseline)
    return f"{mean(own):.3f} ({distance:+.1f})"


def _loss(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def _rate(lr: float) -> str:
    return f"{lr:.2g}"
