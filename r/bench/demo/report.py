"""The table and the figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from bench.demo.contenders import BASELINE, BEST, CONTENDERS, EAGER
from bench.demo.tasks import TASKS, Task
from bench.demo.train import Run


@dataclass(frozen=True)
class _LineStyle:
    color: str
    width: float
    dashes: str | tuple[int, tuple[int, int]]


# Two colours of the Okabe-Ito palette and black. The eager line is thin and dashed because
# it should lie exactly on AdamCM's.
_LINE_STYLES = {
    BASELINE.label: _LineStyle("#0072B2", 2.0, "-"),
    BEST.label: _LineStyle("#D55E00", 3.0, "-"),
    EAGER.label: _LineStyle("#000000", 1.0, (0, (4, 4))),
}

# The default of one tick per decade would leave the language model's axis without labels.
_TICKS_PER_DECADE = (1, 1.5, 2, 3, 5, 7)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as columns of text, the first row underlined.

    Columns whose cells are words stand left, all others right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [
        not any(cell[:1].isdigit() for cell in column[1:]) for column in zip(*rows, strict=True)
    ]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in (rows[0], rule, *rows[1:])
    )


def select(runs: Sequence[Run], task: Task, contender: str) -> list[Run]:
    """Return the runs of one task with one contender, one per seed."""
    return [run for run in runs if (run.job.task, run.job.contender) == (task.name, contender)]


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def results_table(runs: Sequence[Run], ratios: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of results.

    Args:
        runs: All runs.
        ratios: Step time over the baseline's, by task and contender.
    """
    rows = [
        (
            "model",
            "optimizer",
            "lr",
            "train loss",
            "val loss",
            "score",
            f"step / {BASELINE.label}",
            "state B/param",
        )
    ]
    for task in TASKS.values():
        for label in CONTENDERS:
            chosen = select(runs, task, label)
            rows.append(
                (
                    task.name,
                    label,
                    f"{chosen[0].job.lr:g}",
                    _mean_and_spread([run.train_loss for run in chosen], 4),
                    _mean_and_spread([run.val_losses[-1] for run in chosen], 4),
                    f"{task.score_name} {_mean_and_spread([run.score for run in chosen], 2)}",
                    f"{ratios[task.name][label]:.2f}",
                    f"{chosen[0].state_bytes:.1f}",
                )
            )
    return align(rows)


def largest_backend_difference(runs: Sequence[Run], task: Task) -> float:
    """Return how far AdamCM's final validation loss lies from its eager reference's."""
    pairs = zip(select(runs, task, BEST.label), select(runs, task, EAGER.label), strict=True)
    return max(abs(best.val_losses[-1] - eager.val_losses[-1]) for best, eager in pairs)


def search_table(runs: Sequence[Run]) -> str:
    """Return the mean final validation loss at every learning rate, each row's best marked."""
    rates = sorted({run.job.lr for run in runs})
    rows = [("model", "optimizer", *(f"lr {rate:g}" for rate in rates))]
    for task in TASKS.values():
        for label in CONTENDERS:
            chosen = select(runs, task, label)
            losses = {
                rate: mean(run.val_losses[-1] for run in chosen if run.job.lr == rate)
                for rate in {run.job.lr for run in chosen}
            }
            if losses:
                best = min(losses, key=losses.__getitem__)
                cells = (f"{losses[rate]:.4f}{'*' if rate == best else ' '}" for rate in rates)
                rows.append((task.name, label, *cells))
    return align(rows)


def _draw(axes: Axes, task: Task, runs: Sequence[Run]) -> None:
    for label, style in _LINE_STYLES.items():
        chosen = select(runs, task, label)
        steps = chosen[0].eval_steps
        by_step = list(zip(*(run.val_losses for run in chosen), strict=True))
        axes.plot(
            steps,
            [mean(losses) for losses in by_step],
            color=style.color,
            linewidth=style.width,
            linestyle=style.dashes,
            label=f"{label}, lr {chosen[0].job.lr:g}",
        )
        if label != EAGER.label:
            lowest = [min(losses) for losses in by_step]
            highest = [max(losses) for losses in by_step]
            axes.fill_between(steps, lowest, highest, color=style.color, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=_TICKS_PER_DECADE))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(f"validation loss ({task.loss_unit})")
    axes.set_title(task.title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """Write the validation curves as an image, one panel per task.

    Args:
        runs: All runs.
        path: File to write; its suffix names the format.
    """
    # Without pyplot: no display is looked for and no global state is kept.
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, len(TASKS), squeeze=False)
    for axes, task in zip(panels.flat, TASKS.values(), strict=True):
        _draw(axes, task, runs)
    seeds = len({run.job.seed for run in runs})
    figure.supxlabel(
        f"Lines: mean over {seeds} seed{'s' if seeds > 1 else ''}; bands: lowest to highest.",
        fontsize="small",
    )
    figure.savefig(path, dpi=150)
