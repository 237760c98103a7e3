"""Command line of the demo."""

import argparse
import os
from pathlib import Path

from bench.demo.contenders import BASELINE, BEST, CONTENDERS, EAGER
from bench.demo.report import (
    largest_backend_difference,
    results_table,
    save_figure,
    search_table,
)
from bench.demo.tasks import LEARNING_RATES, TASKS
from bench.demo.timing import step_time_ratios
from bench.demo.train import Job, train_all

# Far from the seeds of the comparison, so that no learning rate was chosen on them.
_FIRST_SEARCH_SEED = 1000

_QUICK_STEPS = 0.05
_QUICK_ROUNDS = 10
_ROUNDS = 300


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
    return value


def _usable_cores() -> int:
    # macOS and Windows have no affinity mask to ask.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--seeds", type=_positive_int, default=3, help="runs of each optimizer")
    parser.add_argument(
        "--steps", type=_positive_float, default=1.0, metavar="FACTOR", help="scale of every run"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed and a twentieth of the steps: shows that it runs, proves nothing",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="instead, try every learning rate of the grid and print the losses",
    )
    parser.add_argument(
        "--workers", type=_positive_int, default=_usable_cores(), help="training processes"
    )
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="figure to write")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds = 1
        arguments.steps *= _QUICK_STEPS
    return arguments


def _scaled(steps: int, factor: float) -> int:
    return max(1, round(steps * factor))


def _search(seeds: int, factor: float, workers: int) -> None:
    jobs = [
        Job(task.name, contender.label, lr, seed, _scaled(task.steps, factor))
        for task in TASKS.values()
        for contender in (BASELINE, BEST)
        for lr in LEARNING_RATES
        for seed in range(_FIRST_SEARCH_SEED, _FIRST_SEARCH_SEED + seeds)
    ]
    print(search_table(train_all(jobs, workers)))
    print(f"Final validation loss, mean; seeds: {seeds}; * marks the lowest of each row.")


def _compare(seeds: int, factor: float, workers: int, rounds: int, figure: Path) -> None:
    # All runs of the longest task come first, so that none of them is left for a single worker.
    jobs = [
        Job(
            task.name,
            contender.label,
            task.learning_rates[contender.algorithm],
            seed,
            _scaled(task.steps, factor),
        )
        for task in TASKS.values()
        for seed in range(seeds)
        for contender in CONTENDERS.values()
    ]
    runs = train_all(jobs, workers)
    ratios = {
        task.name: step_time_ratios([param.shape for param in task.build().parameters()], rounds)
        for task in TASKS.values()
    }
    save_figure(runs, figure)
    print(results_table(runs, ratios))
    print(
        f"Mean ± standard deviation; seeds: {seeds}. In each all optimizers start from the same\n"
        "weights and see the same batches. Train loss: mean over the batches since the last but\n"
        "one evaluation. Learning rates fall linearly from lr to zero; lr is the best of one\n"
        "grid, searched alike for each algorithm on other seeds. Betas are (0.9, 0.99) for\n"
        "all; every other option is the optimizer's default (weight decay: AdamW 0.01, AdamCM\n"
        "0). Step: the optimizer's step alone on one thread, interleaved, median ratio of\n"
        f"{rounds} rounds."
    )
    for task in TASKS.values():
        difference = largest_backend_difference(runs, task)
        print(
            f"{task.name}: the final validation losses of {BEST.label} and {EAGER.label} "
            f"differ by at most {difference:.2e}."
        )
    print(f"Validation curves: {figure}")


def main() -> None:
    """Run the demo."""
    arguments = _parse_arguments()
    if arguments.search:
        _search(arguments.seeds, arguments.steps, arguments.workers)
    else:
        rounds = _QUICK_ROUNDS if arguments.quick else _ROUNDS
        _compare(arguments.seeds, arguments.steps, arguments.workers, rounds, arguments.out)


if __name__ == "__main__":
    main()
