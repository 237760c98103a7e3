"""The table and the figure of what precision costs."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from bench import markdown
from bench.speed.precision.setups import BASELINE, PRECISIONS, TASKS, TIMED
from bench.speed.precision.timing import PLACES, Cost
from bench.speed.precision.train import Run

_COST = ["bytes a parameter", "step / fused AdamW"]


def _cells(cost: Cost) -> list[str]:
    return [f"{cost.state_bytes:.1f}", f"{cost.ratio:.2f} ({cost.least:.2f} to {cost.most:.2f})"]


def _losses(runs: Sequence[Run], task: str, precision: str) -> list[float]:
    return [run.val_loss for run in runs if (run.task, run.precision) == (task, precision)]


def deviation(runs: Sequence[Run], task: str, precision: str) -> float:
    """Return how far a precision's mean loss is from float32's, in its standard deviations."""
    baseline = _losses(runs, task, BASELINE)
    return (mean(_losses(runs, task, precision)) - mean(baseline)) / stdev(baseline)


def table(runs: Sequence[Run], costs: Sequence[Cost], machine: str) -> str:
    """Return the table in Markdown: a row for each precision.

    Args:
        runs: At least two seeds of every task and precision.
        costs: Of every precision that is timed.
        machine: What the times were measured on.
    """
    tasks = [task for task in TASKS if any(run.task == task for run in runs)]
    header = ["state", *_COST, *(f"{t}, loss" for t in tasks)]
    rows = []
    cost_of = {cost.name: cost for cost in costs}
    for name in PRECISIONS:
        cost = cost_of.get(name)
        cells = _cells(cost) if cost else ["", ""]
        for task in tasks:
            losses = _losses(runs, task, name)
            spread = f" ± {stdev(losses):.3f}" if name == BASELINE else ""
            off = "" if name == BASELINE else f" ({deviation(runs, task, name):+.2f})"
            cells.append(f"{mean(losses):.3f}{spread}{off}")
        rows.append([name, *cells])
    seeds = len({run.seed for run in runs})
    note = (
        f"C = 5. Held-out loss at the end, mean of {seeds} seeds; ±: standard deviation over the "
        "seeds; in brackets the distance from float32's mean in its standard deviations. "
        "Time: median ratio of one tensor's interleaved steps, every step replacing a slot; in "
        "brackets the least and the largest median of its tensors in one place in memory, of "
        f"{PLACES} places. {machine}"
    )
    return f"{markdown.table(header, rows)}\n\n{note}"


def timed_table(costs: Sequence[Cost], machine: str) -> str:
    """Return the table of what is timed only; the arguments are those of `table`."""
    rows = ([cost.name, *_cells(cost)] for cost in costs if cost.name in TIMED)
    note = (
        "C = 5 but for capacity=0, float32 state but for bfloat16 moments; gradients have their "
        f"parameters' dtype unless it is named. AdamW is all float32. {machine}"
    )
    return f"{markdown.table(['step', *_COST], rows)}\n\n{note}"


def save_figure(runs: Sequence[Run], path: Path) -> None:
    """Draw each precision's distance to the float32 trajectory after each step."""
    tasks = [task for task in TASKS if any(run.task == task for run in runs)]
    figure = Figure(figsize=(5 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for name in PRECISIONS:
            if name == BASELINE:
                continue
            curves = [r.distances for r in runs if (r.task, r.precision) == (task, name)]
            averaged = [mean(at) for at in zip(*curves, strict=True)]
            axes.plot(range(1, len(averaged) + 1), averaged, label=name)
        axes.set(title=TASKS[task].title, xlabel="step", yscale="log")
        axes.grid(color="0.9")
    first = figure.axes[0]
    first.set_ylabel("distance to float32's parameters /\ndistance float32's have gone")
    first.legend(fontsize="small")
    figure.savefig(path, dpi=110)
