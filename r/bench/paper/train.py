"""Train the paper's models: ``python -m bench.paper.train lstm-python wrn-digits``."""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure

from bench.demo.report import align
from bench.paper.contenders import SYSTEMS, VARIED, Hyperparameters
from bench.paper.sweep import Config, Run, run_all
from bench.paper.tasks import TASKS

LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)

# Far from the seeds of the comparison, so that no learning rate was chosen on them.
SEARCH_SEED = 1000


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.paper.train", description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--data", type=Path, help="folder with the data set's standard files")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, default=3, help="runs at the best learning rate")
    parser.add_argument("--steps", type=int, help="instead of the task's own number")
    grid = parser.add_argument_group(
        "grid", "all combinations of these are searched, of each system those it has"
    )
    for field in fields(Hyperparameters):
        default = LEARNING_RATES if field.name == "lr" else [field.default]
        grid.add_argument(
            f"--{field.name.replace('_', '-')}",
            nargs="+",
            type=int if field.name == "capacity" else float,
            default=default,
        )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--workers", type=int, default=1, help="training processes")
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), help="folder; what it has is not run again"
    )
    parsed = parser.parse_args(arguments)
    for name in parsed.tasks:
        if TASKS[name].needs_data and parsed.data is None:
            parser.error(f"{name} needs --data, the folder with its data set's files")
        if TASKS[name].needs_data:
            TASKS[name].load(parsed.data)  # fails here, before anything is trained
    return parsed


def _configs(arguments: argparse.Namespace, task: str, system: str) -> list[Config]:
    """Return the search's runs of one system: the grid over its hyperparameters."""
    config = Config(
        task,
        system,
        Hyperparameters(arguments.lr[0]),
        SEARCH_SEED,
        arguments.steps or TASKS[task].steps,
        str(arguments.data or ""),
        arguments.device,
        arguments.amp,
    )
    names = VARIED[system]
    grid = itertools.product(*(getattr(arguments, name) for name in names))
    return [
        replace(config, hyperparameters=Hyperparameters(**dict(zip(names, point, strict=True))))
        for point in grid
    ]


def best(runs: Sequence[Run]) -> Config:
    """Return the config of lowest final held-out loss."""
    return min(runs, key=lambda run: run.loss).config


def results_table(runs: Sequence[Run]) -> str:
    """Return the table of results: mean and standard deviation over the seeds."""
    rows = [
        (
            "task",
            "system",
            "best of the grid",
            "val loss",
            "perplexity or accuracy %",
            "state B/param",
        )
    ]
    for task, system in dict.fromkeys((run.config.task, run.config.system) for run in runs):
        chosen = [r for r in runs if (r.config.task, r.config.system) == (task, system)]
        found = _as_text(chosen[0].config)
        losses = _mean_and_spread([run.loss for run in chosen], 4)
        scores = _mean_and_spread([run.score for run in chosen], 2)
        rows.append((task, system, found, losses, scores, f"{chosen[0].state_bytes:.1f}"))
    return align(rows)


def _as_text(config: Config) -> str:
    """Return what a config's optimizer differs in from the defaults, the learning rate first."""
    chosen, defaults = config.hyperparameters, Hyperparameters(config.hyperparameters.lr)
    others = [name for name in VARIED[config.system] if name != "lr"]
    changed = [name for name in others if getattr(chosen, name) != getattr(defaults, name)]
    return ", ".join(f"{name} {getattr(chosen, name):g}" for name in ("lr", *changed))


def _mean_and_spread(values: Sequence[float], digits: int) -> str:
    if not all(map(math.isfinite, values)):
        return f"diverged in {sum(not math.isfinite(value) for value in values)}"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def save_curves(runs: Sequence[Run], path: Path) -> None:
    """Draw the held-out loss of every system, the mean over its seeds, a panel for each task."""
    tasks = list(dict.fromkeys(run.config.task for run in runs))
    figure = Figure(figsize=(6.5 * len(tasks), 4.5), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for system in dict.fromkeys(run.config.system for run in runs):
            of_both = [r for r in runs if (r.config.task, r.config.system) == (task, system)]
            whole = [run for run in of_both if math.isfinite(run.loss)]
            if whole:
                losses = [mean(at) for at in zip(*(r.val_losses for r in whole), strict=True)]
                axes.plot(whole[0].eval_steps, losses, label=system)
        axes.set(title=task, xlabel="step", ylabel="held-out loss, nats", yscale="log")
        axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Search the learning rate, run the seeds, and write table and curves."""
    parsed = _parse_arguments(arguments)
    folder: Path = parsed.out
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(task, system) for task in parsed.tasks for system in parsed.systems]
    grids = {pair: _configs(parsed, *pair) for pair in pairs}
    every = [config for configs in grids.values() for config in configs]
    searched = dict(
        zip(every, run_all(every, folder / "search.jsonl", parsed.workers), strict=True)
    )
    finals = [
        replace(best([searched[config] for config in grids[pair]]), seed=seed)
        for pair in pairs
        for seed in range(parsed.seeds)
    ]
    runs = run_all(finals, folder / "runs.jsonl", parsed.workers)
    table = results_table(runs)
    grid = "; ".join(
        f"{field.name} {', '.join(f'{value:g}' for value in getattr(parsed, field.name))}"
        for field in fields(Hyperparameters)
    )
    note = (
        f"Mean ± standard deviation; seeds: {parsed.seeds}, which share weights and batches. The "
        "learning rate falls linearly to zero from lr. Best of the grid on the held-out loss of "
        f"seed {SEARCH_SEED}, of these: {grid}."
    )
    (folder / "table.txt").write_text(f"{table}\n\n{note}\n")
    save_curves(runs, folder / "curves.png")
    print(f"{table}\n\n{note}\nWritten to {folder}")


if __name__ == "__main__":
    main()
