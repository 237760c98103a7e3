"""How a step's time grows with elements, tensors and slots: `python -m bench.speed.growth`.

Writes bench/results/growth.json and growth.png. Every point is the median time of steps taken in
turns with torch's fused AdamW's, which show what of the growth is the machine's.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch.optim import Optimizer
from tqdm import tqdm

from bench import machine
from bench.timing import interleave
from cm_fused import AdamCM

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
# Steps beyond those that fill the buffer: every timed step replaces a slot.
WARM_UP = 2


@dataclass(frozen=True)
class Curve:
    """What grows.

    Attributes:
        name: Of the axis.
        values: Points on it, of what is not the same for all.
        tensors: How many.
        numel: Elements of each.
        capacity: Slots of each buffer.
        rounds: Timed steps of a point.
    """

    name: str
    values: tuple[int, ...]
    tensors: int = 1
    numel: int = 256
    capacity: int = 5
    rounds: int = 15


CURVES = (
    Curve("elements of one tensor", (1_000_000, 3_000_000, 10_000_000, 30_000_000, 60_000_000)),
    Curve("tensors of 256", (30, 100, 300, 1000, 3000, 10_000, 21_000), rounds=40),
    Curve("slots C", (3, 5, 10, 20, 40, 64), numel=8_000_000),
)


def _point(curve: Curve, value: int) -> dict[str, Optimizer]:
    """Return the optimizers of a point, with gradients."""
    grown = {
        "elements of one tensor": {"numel": value},
        "tensors of 256": {"tensors": value},
        "slots C": {"capacity": value},
    }[curve.name]
    size = {**asdict(curve), **grown}
    optimizers: dict[str, Optimizer] = {}
    grads = [0.01 * torch.randn(size["numel"]) for _ in range(size["tensors"])]
    for name in ("AdamCM", "AdamW"):
        params = [torch.randn_like(grad) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if name == "AdamW":
            optimizers[name] = torch.optim.AdamW(params, fused=True)
        else:
            optimizers[name] = AdamCM(params, capacity=size["capacity"])
    return optimizers


def measure(curve: Curve) -> dict[str, list[float]]:
    """Return the median seconds of a step of each optimizer at each point of a curve."""
    seconds: dict[str, list[float]] = {"AdamCM": [], "AdamW": []}
    for value in tqdm(curve.values, desc=curve.name, disable=None):
        optimizers = _point(curve, value)
        steps = {name: optimizer.step for name, optimizer in optimizers.items()}
        warm_up = WARM_UP + (value if curve.name == "slots C" else curve.capacity)
        timed = interleave(steps, curve.rounds, warm_up=warm_up)
        for name, of_name in seconds.items():
            of_name.append(timed.median(name))
    return seconds


def exponent(values: tuple[int, ...], seconds: list[float]) -> float:
    """Return the p of the best fit seconds ~ value^p."""
    return float(np.polyfit(np.log(values), np.log(seconds), 1)[0])


def main() -> None:
    """Measure all curves; write and draw them."""
    results = []
    _, axes = plt.subplots(1, len(CURVES), figsize=(14, 4), layout="constrained")
    for curve, axis in zip(CURVES, axes, strict=True):
        seconds = measure(curve)
        exponents = {name: exponent(curve.values, of_name) for name, of_name in seconds.items()}
        results.append({"curve": asdict(curve), "seconds": seconds, "exponents": exponents})
        for name, of_name in seconds.items():
            axis.plot(curve.values, of_name, "o-", label=f"{name}: ~ x^{exponents[name]:.2f}")
        axis.set(xlabel=curve.name, ylabel="seconds a step")
        if curve.name == "slots C":
            axis.set_ylim(bottom=0)  # flat or not is seen from 0 only
        else:
            axis.set(xscale="log", yscale="log")
        axis.legend()
    plt.savefig(RESULTS / "growth.png", dpi=90)
    described = {"machine": machine.describe("cpu"), "versions": machine.versions()}
    text = json.dumps({**described, "curves": results}, indent=1)
    (RESULTS / "growth.json").write_text(text + "\n")
    for result in results:
        print(result["curve"]["name"], {k: round(v, 2) for k, v in result["exponents"].items()})


if __name__ == "__main__":
    main()
