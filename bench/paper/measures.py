"""Readings during training: distance from the start, sharpness, and the contents of the buffer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused import diagnostics

# The largest eigenvalue stands out: a hundredth of it is reached in about ten products.
_TOLERANCE = 1e-2
_MAX_ITERATIONS = 50


def rounded(value: float) -> float:
    """Return a number to six significant digits, which a file of results has."""
    return float(f"{value:.6g}")


@dataclass(frozen=True)
class Measure:
    """One reading; what a system does not have, or what was not taken, is None.

    Args:
        epoch: Finished epochs.
        distance: Norm of the parameters less the initial ones (Fig. 10, top right).
        sharpness: Largest eigenvalue of the Hessian of the loss on fixed training examples.
        variance: Over the buffer's slots, mean over the elements (Fig. 10, bottom left).
        relative_variance: That, divided by the slots' mean square, in [0, 1]: 0 if the slots are
            equal, 1 if they cancel in their mean.
        agreement: Mean cosine of the slot of largest priority with the others (Fig. 10, bottom
            right).
    """

    epoch: int
    distance: float
    sharpness: float | None = None
    variance: float | None = None
    relative_variance: float | None = None
    agreement: float | None = None


def measure(
    epoch: int,
    params: Sequence[Tensor],
    initial: Sequence[Tensor],
    optimizer: Optimizer,
    loss: Callable[[], Tensor] | None,
) -> Measure:
    """Return a reading; nothing is changed.

    Args:
        epoch: Finished epochs.
        params: The parameters.
        initial: Copies of the initial ones.
        optimizer: Theirs.
        loss: Returns the loss with its graph; None to leave the sharpness out.
    """
    pairs = zip(params, initial, strict=True)
    distance = math.hypot(*(torch.dist(param.detach(), start).item() for param, start in pairs))
    found = _of_buffer(optimizer)
    if loss is not None:
        found["sharpness"] = diagnostics.sharpness(
            loss(), params, tolerance=_TOLERANCE, max_iterations=_MAX_ITERATIONS
        ).eigenvalue
    finite = {name: rounded(value) for name, value in found.items() if math.isfinite(value)}
    return Measure(epoch, rounded(distance), **finite)


def _of_buffer(optimizer: Optimizer) -> dict[str, float]:
    capacity = optimizer.param_groups[0].get("capacity")
    if capacity is None:
        return {}
    readings = diagnostics.read(optimizer)
    reading = diagnostics.combine(readings)
    # A step divides the sum of the slots by their number in the full buffer.
    mean_norm = reading.mean_norm * capacity / reading.filled
    scatter = reading.variance * sum(param.numel() for param in readings)
    size = scatter + mean_norm**2
    relative = scatter / size if size else math.nan
    return {
        "variance": reading.variance,
        "relative_variance": relative,
        "agreement": reading.agreement,
    }
