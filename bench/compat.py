"""`cm_fused.compat.cmoptimizer` beside the research package, in turns in one process.

    PYTHONPATH=<a checkout of chandar-lab/CMOptimizer> python -m bench.compat

Prints the research package's time a step over ours, the median of interleaved rounds.
"""

import argparse
import statistics
import time
import warnings
from importlib import import_module
from typing import Any

import torch
from tqdm import trange

from cm_fused.compat import cmoptimizer

# Tensors of a small convolutional network, and large matrices: of the first one's size malloc may
# keep the package's temporaries, of the second one's the system maps them anew in every step.
MODELS: dict[str, list[tuple[int, ...]]] = {
    "100 tensors of 500 elements": [(500,)] * 100,
    "60 tensors of 1,000 to 40,000 elements": [(1000 + 661 * i,) for i in range(60)],
    "one matrix of 4 M elements": [(2000, 2000)],
    "one matrix of 16 M elements": [(4000, 4000)],
}


def _optimizer(cls: Any, shapes: list[tuple[int, ...]]) -> Any:
    params = [torch.randn(shape, requires_grad=True) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return cls(params, lr=1e-3, critical_test=0.0)


def _seconds(optimizer: Any, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    """Print a ratio for each class and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    package = import_module("cmoptimizer.optim")
    warnings.simplefilter("ignore")
    for cls in ("Adam_CM", "Adam_C"):
        for name, shapes in MODELS.items():
            optimizers = [_optimizer(getattr(m, cls), shapes) for m in (package, cmoptimizer)]
            for optimizer in optimizers:
                _seconds(optimizer, 12)  # until the buffer is full
            rounds = [
                [_seconds(optimizer, arguments.steps) for optimizer in optimizers]
                for _ in trange(arguments.rounds, leave=False)
            ]
            ratio = statistics.median(theirs / ours for theirs, ours in rounds)
            print(f"{cls}, {name}: {ratio:.1f}")


if __name__ == "__main__":
    main()
