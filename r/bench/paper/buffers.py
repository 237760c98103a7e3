"""Buffers of real training runs, Fig. 8 (right) and 10: ``python -m bench.paper.buffers``."""

import argparse
import csv
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from bench.paper.contenders import Hyperparameters
from bench.paper.sweep import Config, train
from bench.paper.systems import BUFFERED
from bench.paper.tasks import TASKS
from cm_fused.diagnostics import ALL, Recorder

TASK = "wrn-digits"
QUANTITIES = ("variance", "agreement")
_LR = 1e-3
_EVERY = 10


def record(folder: Path, seeds: int, steps: int) -> None:
    """Train with each buffer and seed; write ``folder/SYSTEM-SEED.csv`` of the whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [(system, seed) for system in BUFFERED for seed in range(seeds)]
    for system, seed in tqdm(runs, desc="runs"):
        config = Config(TASK, system, Hyperparameters(_LR), seed, steps)
        train(config, partial(Recorder, path=folder / f"{system}-{seed}.csv", every=_EVERY))


def series(paths: Iterable[Path], quantity: str, parameter: str = ALL) -> tuple[Tensor, Tensor]:
    """Return recorded steps (records,) and a quantity (files, records), float64."""
    by_file = []
    for path in paths:
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["parameter"] == parameter]
        by_file.append([float(row[quantity]) for row in rows])
        steps = [float(row["step"]) for row in rows]
    return torch.tensor(steps, dtype=torch.float64), torch.tensor(by_file, dtype=torch.float64)


def save_figure(folder: Path, quantity: str, path: Path) -> None:
    """Draw a recorded quantity of each system's runs, and their mean in bold."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for color, system in zip(("#E69F00", "#D55E00"), BUFFERED, strict=True):
        steps, values = series(sorted(folder.glob(f"{system}-*.csv")), quantity)
        axes.plot(steps.numpy(), values.T.numpy(), color=color, alpha=0.3, linewidth=0.7)
        axes.plot(steps.numpy(), values.mean(0).numpy(), color=color, linewidth=2, label=system)
    axes.set(xlabel="step", ylabel=f"{quantity} of the buffer, {TASK}")
    if quantity == "variance":
        axes.set_yscale("log")
    axes.legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, record and draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper.buffers", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/paper/results/buffers"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=TASKS[TASK].steps)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record(parsed.out, parsed.seeds, parsed.steps)
    for quantity in QUANTITIES:
        save_figure(parsed.out, quantity, parsed.out / f"{quantity}.png")
    print(f"Written to {parsed.out}")


if __name__ == "__main__":
    main()
