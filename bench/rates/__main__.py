"""Train at every learning rate: ``python -m bench.rates [--page docs/options.md]``."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import markdown
from bench.rates import report
from bench.rates.setups import LEARNING_RATES, MATCHED, SEEDS, SETTINGS, SYSTEMS, TASKS
from bench.rates.train import Job, held_out_loss

RUNS = Path(__file__).parent / "results" / "runs.jsonl"


def read(path: Path) -> dict[Job, float]:
    """Return the held-out losses of the runs that a file has."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text().splitlines())
    return {
        Job(line["task"], line["system"], line["lr"], line["seed"]): line["loss"] for line in lines
    }


def jobs(tasks: Sequence[str], seeds: int) -> Iterator[Job]:
    """Yield the runs of the comparison, all of one seed before those of the next."""
    for seed in range(seeds):
        for task in tasks:
            for system in SYSTEMS:
                yield from (Job(task, system, lr, seed) for lr in LEARNING_RATES)


def settings(losses: dict[Job, float], tasks: Sequence[str], seeds: int) -> Iterator[Job]:
    """Yield the runs of other settings, at the best rate of the defaults and its neighbours."""
    for task in tasks:
        best = LEARNING_RATES.index(report.best_rate(losses, task, MATCHED))
        near = LEARNING_RATES[max(best - 1, 0) : best + 2]
        for seed in range(seeds):
            for system in SETTINGS:
                yield from (Job(task, system, lr, seed) for lr in near)


def train(wanted: Sequence[Job], losses: dict[Job, float], path: Path) -> None:
    """Train what is missing; add it to the losses, and a line of each run to a file."""
    for job in tqdm([job for job in wanted if job not in losses], disable=None):
        losses[job] = held_out_loss(job)
        with path.open("a") as file:
            file.write(json.dumps({**asdict(job), "loss": losses[job]}) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rates", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs at each rate, >= 2")
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="file; what it has is not run again"
    )
    parser.add_argument("--page", type=Path, help="page whose tables to replace")
    parsed = parser.parse_args(arguments)
    # More would wait for each other on tensors of this size.
    torch.set_num_threads(1)
    parsed.runs.parent.mkdir(parents=True, exist_ok=True)
    losses = read(parsed.runs)
    train(list(jobs(parsed.tasks, parsed.seeds)), losses, parsed.runs)
    train(list(settings(losses, parsed.tasks, parsed.seeds)), losses, parsed.runs)
    for name, table in (
        ("rates", report.rates_table(losses, parsed.tasks)),
        ("settings", report.settings_table(losses, parsed.tasks)),
    ):
        print(f"{table}\n")
        if parsed.page is not None:
            markdown.replace_section(parsed.page, name, table)


if __name__ == "__main__":
    main()
