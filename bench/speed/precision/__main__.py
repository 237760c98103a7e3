"""Train and time every precision of the state: ``python -m bench.speed.precision``."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from bench import machine, markdown
from bench.speed.precision import report
from bench.speed.precision.setups import TASKS
from bench.speed.precision.timing import measure
from bench.speed.precision.train import Run, train


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.precision", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each precision, >= 2")
    parser.add_argument("--steps", type=int, help="instead of each task's own number")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--numel", type=int, default=30_000_000, help="of the tensor timed")
    # On a machine that others share, medians of 10 to 30 rounds of one build and precision went
    # from 0.89 to 1.16, of 300 from 1.05 to 1.06.
    parser.add_argument("--rounds", type=int, default=300, help="timed steps")
    parser.add_argument("--readme", type=Path, help="file whose tables to replace")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="folder; runs that it has are not run again",
    )
    parsed = parser.parse_args(arguments)
    if parsed.seeds < 2:
        parser.error(f"--seeds must be >= 2, got {parsed.seeds}: there is no spread of one")
    return parsed


def _finished(path: Path) -> list[Run]:
    if not path.exists():
        return []
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()]


def _train_all(parsed: argparse.Namespace) -> list[Run]:
    """Train what the folder lacks, and return all that was asked for."""
    path: Path = parsed.out / "runs.jsonl"
    wanted = [(task, seed) for seed in range(1, parsed.seeds + 1) for task in parsed.tasks]
    done = {(run.task, run.seed) for run in _finished(path)}
    # More would wait for each other on tensors of this size.
    torch.set_num_threads(1)
    missing = [pair for pair in wanted if pair not in done]
    for task, seed in tqdm(missing, desc="training", disable=None):
        lines = [json.dumps(asdict(run)) + "\n" for run in train(task, seed, parsed.steps)]
        with path.open("a") as file:
            file.writelines(lines)
    return [run for run in _finished(path) if (run.task, run.seed) in wanted]


def _timed(rounds: int) -> str:
    device, versions = machine.describe("cpu"), machine.versions()
    return (
        f"Timed in {rounds} rounds on {device['model']}, {device['threads']} threads, "
        f"{device['instructions']}; torch {versions['torch']}, cm_fused {versions['cm_fused']}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parsed = _parse_arguments(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    runs = _train_all(parsed)
    torch.set_num_threads(threads)
    costs = measure(parsed.numel, parsed.rounds)
    described = _timed(parsed.rounds)
    result = {"machine": described, "costs": list(map(asdict, costs))}
    (parsed.out / "costs.json").write_text(json.dumps(result, indent=1) + "\n")
    report.save_figure(runs, parsed.out / "distances.png")
    tables = {
        "precision": report.table(runs, costs, described),
        "timed": report.timed_table(costs, described),
    }
    for name, table in tables.items():
        print(table, end="\n\n")
        if parsed.readme is not None:
            markdown.replace_section(parsed.readme, name, table)


if __name__ == "__main__":
    main()
