"""`cm_fused.compat.cmoptimizer` beside the research package, in turns in one process.

    PYTHONPATH=<a checkout of chandar-lab/CMOptimizer> python -m bench.speed.compat

Prints the research package's time a step over ours, the median of interleaved rounds.
"""

import argparse
import warnings
from importlib import import_module
from typing import Any

import torch

from bench.timing import interleave
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


def main() -> None:
    """Print a ratio for each class and model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=75)
    arguments = parser.parse_args()
    package = import_module("cmoptimizer.optim")
    warnings.simplefilter("ignore")
    for cls in ("Adam_CM", "Adam_C"):
        for name, shapes in MODELS.items():
            optimizers = [_optimizer(getattr(m, cls), shapes) for m in (package, cmoptimizer)]
            steps = dict(zip(("theirs", "ours"), (o.step for o in optimizers), strict=True))
            timed = interleave(steps, arguments.rounds, warm_up=12)  # until the buffer is full
            ratio = timed.ratio("theirs", "ours")
            print(f"{cls}, {name}: {ratio:.1f}")


if __name__ == "__main__":
    main()
