"""The pictures of trained models: scores and readings, epoch by epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from bench.paper.sweep import Run
from bench.paper.tasks import TASKS
from bench.paper.training_table import by_setting

# The palette of Okabe and Ito, whose colours the colour-blind tell apart. The paper's systems with
# critical momenta are thick, those with SAM dashed, the baselines dotted.
_STYLES = {
    "Adam": ("#0072B2", "-", 1.5),
    "Adam+CG": ("#E69F00", "-", 1.5),
    "Adam+SAM": ("#56B4E9", "--", 1.5),
    "Adam+CM": ("#D55E00", "-", 2.5),
    "Adam+SAM+CM": ("#CC79A7", "--", 2.5),
    "AdamW": ("#000000", ":", 1.8),
    "AdEMAMix": ("#009E73", ":", 1.8),
    "SGD+momentum": ("#888888", ":", 1.8),
    "AdamW+CG": ("#E69F00", "-", 1.5),
    "AdamW+SAM": ("#56B4E9", "--", 1.5),
    "AdamW+CM": ("#D55E00", "-", 2.5),
}
# Runs of one system at several settings, in this order.
_SHADES = ("#FDD0A2", "#FD8D3C", "#D94801", "#7F2704")
_TICKS = (1, 1.5, 2, 3, 5, 7)
_COLUMNS = 3


@dataclass(frozen=True)
class _Panel:
    """One quantity.

    Args:
        title: With the claims that it is of.
        series: Returns the (epoch, value) pairs of a run.
        log: Whether the axis is logarithmic.
        cut: The axis ends at this multiple of the lowest value; None for no cut.
    """

    title: str
    series: Callable[[Run], list[tuple[int, float]]]
    log: bool = True
    cut: float | None = None


def _by_epoch(name: str) -> Callable[[Run], list[tuple[int, float]]]:
    return lambda run: list(enumerate(getattr(run, name), start=1))


def _measured(name: str) -> Callable[[Run], list[tuple[int, float]]]:
    def series(run: Run) -> list[tuple[int, float]]:
        values = ((reading.epoch, getattr(reading, name)) for reading in run.measures)
        return [(epoch, value) for epoch, value in values if value is not None]

    return series


def _errors(run: Run) -> list[tuple[int, float]]:
    return [(epoch, 100 - accuracy) for epoch, accuracy in enumerate(run.scores, start=1)]


def _panels(text: bool) -> list[_Panel]:
    score = (
        _Panel("held-out perplexity (F7), cut at 6 x the lowest", _by_epoch("scores"), cut=6.0)
        if text
        else _Panel("held-out error, % (F8 left, F15, F16)", _errors)
    )
    return [
        score,
        _Panel("training loss, nats", _by_epoch("train_losses")),
        _Panel("distance from the start (F10b)", _measured("distance")),
        _Panel("largest Hessian eigenvalue (F8 right, F10a)", _measured("sharpness")),
        _Panel("buffer: variance / mean square (F10c)", _measured("relative_variance")),
        _Panel("buffer: mean cosine to the top slot (F10d)", _measured("agreement"), log=False),
    ]


def save_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw every quantity that the runs have against the epoch: the mean and range of the seeds.

    Args:
        runs: Of one task; those that diverged are left out.
        path: The picture.
    """
    task = runs[0].config.task
    groups = by_setting([run for run in runs if not run.diverged])
    panels = [
        panel
        for panel in _panels(TASKS[task].text)
        if any(panel.series(run) for group in groups.values() for run in group)
    ]
    rows = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(5 * _COLUMNS, 3.8 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for panel, ax in zip(panels, axes, strict=False):
        _draw(ax, panel, groups)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.suptitle(f"{task}: mean over the seeds, the band from the lowest to the highest")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)


def _draw(ax: Axes, panel: _Panel, groups: dict[tuple[str, str], list[Run]]) -> None:
    same_system = len({system for system, _ in groups}) == 1
    for number, ((system, setting), group) in enumerate(groups.items()):
        color, dashes, width = _STYLES[system]
        if same_system:
            color = _SHADES[number % len(_SHADES)]
        series = [panel.series(run) for run in group]
        epochs = [epoch for epoch, _ in series[0]]
        values = np.array([[value for _, value in one] for one in series])
        if epochs:
            ax.plot(
                *(epochs, values.mean(0), dashes),
                color=color,
                linewidth=width,
                label=f"{system}, {setting}",
                marker="o" if len(epochs) < 10 else None,
                markersize=4,
            )
            ax.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    ax.set_title(panel.title, fontsize=11)
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    drops = {drop for group in groups.values() for run in group for drop in run.config.drops}
    for drop in drops:
        ax.axvline(drop, color="black", linewidth=0.8, alpha=0.5)
    if panel.cut is not None:
        every = (panel.series(run) for group in groups.values() for run in group)
        lowest = min(value for series in every for _, value in series)
        ax.set_ylim(0.95 * lowest, panel.cut * lowest)
    if panel.log:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=_TICKS))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
