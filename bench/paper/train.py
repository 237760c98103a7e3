"""Train the paper's models: ``python -m bench.paper.train lstm-kjv-small``."""

import argparse
import itertools
import random
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch

from bench.paper import models
from bench.paper.contenders import PAPERS, SYSTEMS, VARIED, Hyperparameters
from bench.paper.paper_numbers import TABLE_5
from bench.paper.presets import hyperparameters, learning_rates, tuned_settings
from bench.paper.sweep import Config, Run, run_all
from bench.paper.tasks import TASKS
from bench.paper.trainer import load_data, train
from bench.paper.training_curves import save_curves
from bench.paper.training_table import results_table

SEARCH = "search"
FINE_SEARCH = "fine-search"
PAPER_DEFAULT = "paper-default"
PAPER_TUNED = "paper-tuned"
CAPACITIES = "capacities"
PRESETS = {
    SEARCH: "each system at the best point of its own grid",
    FINE_SEARCH: "the same, with three more learning rates for each, between those of Table 5",
    PAPER_DEFAULT: "Table 1 without grid search: defaults, and the best learning rate of Adam's "
    "search for all",
    PAPER_TUNED: "Table 1 with grid search: the best settings of Tables 6 to 8",
    CAPACITIES: "Adam+CM's defaults with several capacities (Fig. 8, right)",
}
_CAPACITIES = (2, 5, 10, 20)

# Far from the seeds of the comparison, so that no setting was chosen on them.
SEARCH_SEED = 1000

Searched = Mapping[str, Sequence[Run]]


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.train",
        description=__doc__,
        epilog="; ".join(f"{name}: {what}" for name, what in PRESETS.items()),
    )
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--preset", choices=PRESETS, default=SEARCH)
    parser.add_argument("--data", type=Path, help="folder with the data set's standard files")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: the preset's")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    parser.add_argument("--epochs", type=int, help="instead of the task's own number")
    parser.add_argument(
        "--drops", type=int, nargs="*", help="epochs after which the learning rate falls by ten"
    )
    parser.add_argument("--sharpness-every", type=int, help="epochs between two readings; 0: none")
    _add_grid(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--workers", type=int, default=1, help="training processes")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs"),
        help="folder; runs that TASK in it has are not run again, and a stopped one goes on",
    )
    parsed = parser.parse_args(arguments)
    _check(parser, parsed)
    return parsed


def _add_grid(parser: argparse.ArgumentParser) -> None:
    grid = parser.add_argument_group(
        "grid", "all combinations of these are searched, of each system those it has"
    )
    grid.add_argument(
        "--table-5", action="store_true", help="the paper's grid; default: its learning rates only"
    )
    grid.add_argument(
        "--budget",
        type=int,
        help="search runs of every system, drawn from its grid; default: all of the smallest grid",
    )
    for field in fields(Hyperparameters):
        grid.add_argument(
            f"--{field.name.replace('_', '-')}",
            nargs="+",
            type=int if field.name == "capacity" else float,
            help="default: Table 5's, for SGD times ten" if field.name == "lr" else None,
        )


def _check(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    task = TASKS[parsed.task]
    if task.needs_data and parsed.data is None:
        parser.error(f"{parsed.task} needs --data, the folder with its data set's files")
    if parsed.preset == PAPER_TUNED and task.tuned_like is None:
        parser.error(f"the paper has no tuned settings for {parsed.task}")
    if parsed.systems is None:
        if parsed.preset == CAPACITIES:
            parsed.systems = ["Adam+CM"]
        else:
            own = parsed.preset in (SEARCH, FINE_SEARCH)
            every = task.systems if own or task.fixed else PAPERS
            parsed.systems = list(every)
    # Fails here, before anything is trained.
    load_data(parsed.task, str(parsed.data or ""))


def _config(parsed: argparse.Namespace, system: str, setting: Hyperparameters) -> Config:
    task = TASKS[parsed.task]
    every = task.sharpness_every if parsed.sharpness_every is None else parsed.sharpness_every
    epochs = parsed.epochs or task.epochs
    drops = task.drops if parsed.drops is None else parsed.drops
    return Config(
        parsed.task,
        system,
        setting,
        seed=0,
        epochs=epochs,
        drops=tuple(drop for drop in drops if drop < epochs),
        sharpness_every=every,
        data=str(parsed.data or ""),
        device=parsed.device,
        amp=parsed.amp,
    )


def grid_values(parsed: argparse.Namespace, system: str) -> dict[str, Sequence[float]]:
    """Return the values of each hyperparameter that a system's search tries."""
    values: dict[str, Sequence[float]] = {}
    for name in VARIED[system]:
        chosen = getattr(parsed, name)
        if chosen is None and name == "lr":
            chosen = learning_rates(system, between=parsed.preset == FINE_SEARCH)
        elif chosen is None and parsed.table_5 and name in TABLE_5:
            chosen = TABLE_5[name]
        if chosen is not None:
            values[name] = chosen
    return values


def search_configs(parsed: argparse.Namespace, systems: Sequence[str]) -> dict[str, list[Config]]:
    """Return the runs of every system's search, as many for each."""
    default = _default(parsed, 1.0)
    grids: dict[str, list[Config]] = {}
    for system in systems:
        values = grid_values(parsed, system)
        settings = (
            hyperparameters(default, dict(zip(values, point, strict=True)))
            for point in itertools.product(*values.values())
        )
        grids[system] = [
            replace(_config(parsed, system, setting), seed=SEARCH_SEED, sharpness_every=0)
            for setting in settings
        ]
    budget = parsed.budget or min(map(len, grids.values()))
    draw = random.Random(0)
    return {
        system: draw.sample(grid, budget) if budget < len(grid) else grid
        for system, grid in grids.items()
    }


def _default(parsed: argparse.Namespace, lr: float) -> Hyperparameters:
    task = TASKS[parsed.task]
    default = Hyperparameters(lr, beta2=task.beta2)
    return replace(default, weight_decay=task.fixed[1]) if task.fixed else default


def best(runs: Sequence[Run]) -> Config:
    """Return the config of the best score that a run had after any epoch."""
    return min(runs, key=lambda run: run.rank).config


def edges(runs: Sequence[Run]) -> Iterator[str]:
    """Yield a warning for each hyperparameter whose best value is the lowest or highest tried."""
    chosen = best(runs)
    for name in VARIED[chosen.system]:
        tried = {getattr(run.config.hyperparameters, name) for run in runs}
        value = getattr(chosen.hyperparameters, name)
        if len(tried) > 2 and value in (min(tried), max(tried)):
            yield f"{chosen.system}: the best {name}, {value:g}, lies on the edge of the grid."


def chosen_settings(parsed: argparse.Namespace, searched: Searched) -> list[Config]:
    """Return the settings of a preset, without their seeds."""
    task, preset = TASKS[parsed.task], parsed.preset
    if preset in (SEARCH, FINE_SEARCH):
        every = _config(parsed, "", _default(parsed, 1.0)).sharpness_every
        return [replace(best(searched[s]), sharpness_every=every) for s in parsed.systems]
    if preset == PAPER_TUNED:
        assert task.tuned_like is not None
        tuned = tuned_settings(*task.tuned_like)
        return [_config(parsed, system, tuned[system]) for system in parsed.systems]
    rate = task.fixed[0] if task.fixed else best(searched["Adam"]).hyperparameters.lr
    default = _default(parsed, rate)
    if preset == PAPER_DEFAULT:
        return [_config(parsed, system, default) for system in parsed.systems]
    return [
        _config(parsed, system, replace(default, capacity=capacity))
        for system in parsed.systems
        for capacity in _CAPACITIES
    ]


def _searched_systems(parsed: argparse.Namespace) -> list[str]:
    if parsed.preset in (SEARCH, FINE_SEARCH):
        return list(parsed.systems)
    return [] if parsed.preset == PAPER_TUNED or TASKS[parsed.task].fixed else ["Adam"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Search, run the seeds, and write table and curves."""
    parsed = _parse_arguments(arguments)
    folder: Path = parsed.out / parsed.task
    folder.mkdir(parents=True, exist_ok=True)
    train_one = partial(train, checkpoints=folder / "checkpoints")
    searched: dict[str, list[Run]] = {}
    systems = _searched_systems(parsed)
    if systems:
        grids = search_configs(parsed, systems)
        every = [config for grid in grids.values() for config in grid]
        runs = run_all(every, folder / "grid.jsonl", parsed.workers, train_one)
        by_config = {run.config: run for run in runs}
        searched = {s: [by_config[config] for config in grid] for s, grid in grids.items()}
    settings = chosen_settings(parsed, searched)
    configs = [replace(setting, seed=seed) for seed in range(parsed.seeds) for setting in settings]
    own = folder / f"{parsed.preset}.jsonl"
    others = [folder / f"{preset}.jsonl" for preset in PRESETS if preset != parsed.preset]
    runs = run_all(configs, own, parsed.workers, train_one, others)
    made = list(sys.argv[1:] if arguments is None else arguments)
    notes = _notes(parsed, configs[0], searched, shlex.join(made))
    text = "\n".join([results_table(runs, searched), "", *notes, ""])
    (folder / f"{parsed.preset}.txt").write_text(text)
    save_curves(runs, folder / f"{parsed.preset}.png")
    print(f"{text}Written to {folder}")


def _notes(
    parsed: argparse.Namespace, config: Config, searched: Searched, made: str
) -> Iterator[str]:
    """Yield the lines below the table: what was run, and by which command."""
    task, data = TASKS[parsed.task], load_data(parsed.task, str(parsed.data or ""))
    size = models.parameters(task.build(data.classes))
    yield f"{parsed.task}, {parsed.preset}: {PRESETS[parsed.preset]}."
    yield (
        f"{data.train_size} training examples, {data.val_size} held out, {data.classes} "
        f"{'tokens' if task.text else 'classes'}, {size} parameters; batches of {task.batch_size}, "
        f"{config.epochs} epochs, the learning rate falls by ten after epoch "
        f"{', '.join(map(str, config.drops))}."
    )
    yield f"Mean ± standard deviation of {parsed.seeds} seeds, which share weights and batches."
    for system, runs in searched.items():
        rates = dict.fromkeys(run.config.hyperparameters.lr for run in runs)
        tried = ", ".join(f"{rate:g}" for rate in rates)
        yield f"{system}: searched on seed {SEARCH_SEED} over lr {tried}."
        yield from edges(runs)
    yield f"torch {torch.__version__}; python -m bench.paper.train {made}"


if __name__ == "__main__":
    main()
