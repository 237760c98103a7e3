"""Runs that were recorded with the research package, and how.

`tests/data/cmoptimizer` was written by

    python -m tests.support.cmoptimizer_runs tests/data/cmoptimizer

with `cmoptimizer` (chandar-lab/CMOptimizer at b42a8016e111161441372734378415cdd31ac157, the last
commit at which its two modules fit each other) on the path, torch 2.13.0 on a CPU. Parameters and
gradients are sines of small integers, which need no generator. With `critical_test` at 0 or 1 the
package's own generator decides nothing.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES: tuple[tuple[int, ...], ...] = ((4, 3), (5,), ())
STEPS = 100
CHECKPOINT_AT = 10
RECORDED = (1, 2, 3, 4, 5, 6, 10, 20, 50, 100)

_DEFAULTS: dict[str, Any] = {"lr": 0.01, "critical_test": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "layer_wise": {"synced": False},
    "small_buffer": {"topC": 2, "decay": 0.9, "betas": (0.8, 0.99)},
    "decay_of_weights": {"weight_decay": 0.1, "amsgrad": True, "eps": 1e-4},
    "keys_that_stay": {"topC": 3, "decay": 1.0},
    "keys_that_go": {"topC": 4, "decay": 0.0},
    "always_replaced": {"topC": 3, "critical_test": 1.0},
}
CLASSES = ("Adam_CM", "Adam_C")


def make_params() -> list[Tensor]:
    """Return the parameters that every run starts from."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [
        torch.sin(torch.arange(size, dtype=torch.float64) + 10 * i).float().reshape(shape)
        for i, (size, shape) in enumerate(zip(sizes, SHAPES, strict=True))
    ]


def gradient(t: int, i: int, param: Tensor) -> Tensor | None:
    """Return the gradient of parameter i at step t; the second starts late and pauses once."""
    if i == 1 and (t < 2 or t == 7):
        return None
    numbers = torch.arange(param.numel(), dtype=torch.float64)
    noise = torch.sin((1.3 + 0.7 * i) * numbers * (t + 1) + 1.7 * t)
    return ((1 + 4 * (t % 7 == 3)) * noise + 0.3).float().reshape(param.shape)


def run(
    optimizer_class: Any, name: str, *, first: int = 0, steps: int = STEPS, load: Any = None
) -> tuple[dict[str, list[list[float]]], list[Tensor], Any]:
    """Return the parameters after the recorded steps, and those and the optimizer at the end.

    Args:
        optimizer_class: Makes the optimizer.
        name: Of `RUNS`.
        first: The step to begin with.
        steps: The step to end before.
        load: What is done with parameters and optimizer at first.
    """
    params = make_params()
    optimizer = optimizer_class(params, **{**_DEFAULTS, **RUNS[name]})
    if load is not None:
        load(params, optimizer)
    recorded = {}
    for t in range(first, steps):
        for i, param in enumerate(params):
            param.grad = gradient(t, i, param)
        optimizer.step()
        if t + 1 in RECORDED:
            recorded[str(t + 1)] = [param.flatten().tolist() for param in params]
    return recorded, params, optimizer


def main(out: Path) -> None:
    """Record all runs with the research package, and a checkpoint of each class."""
    package = import_module("cmoptimizer.optim")
    runs = {}
    for cls in CLASSES:
        for name in RUNS:
            runs[f"{cls} {name}"], _, _ = run(getattr(package, cls), name)
        _, params, optimizer = run(getattr(package, cls), "defaults", steps=CHECKPOINT_AT)
        saved = {"params": params, "optimizer": optimizer.state_dict()}
        torch.save(saved, out / f"{cls}.pt")
    (out / "trajectories.json").write_text(json.dumps(runs, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
