"""The experiments on the toy surfaces; each returns its numbers, none draws or writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.paper import surfaces
from bench.paper.systems import SYSTEMS, Batch, Setting, Surface, trajectory

LEARNING_RATE = 0.05
STEPS = 500
STARTS = 50
SEEDS = 20
SHARPNESS = (2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 100.0)
CAPACITIES = (1, 2, 5, 10, 20, 50)
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BUFFER_STEPS = 10


@dataclass(frozen=True)
class Landscape:
    """A surface of two dimensions with what a run on it needs.

    Args:
        name: As in the paper.
        surface: The function.
        minimum: Where its global minimum is.
        box: Runs start uniformly in [low, high]².
    """

    name: str
    surface: Surface
    minimum: tuple[float, float]
    box: tuple[float, float]


GOLDSTEIN_PRICE = Landscape("Goldstein-Price", surfaces.goldstein_price, (0.5, 0.25), (0.0, 1.0))
# The same function at another scale: the original's coordinates. Learning rate and curvature are
# not invariant to it, and the paper does not say which it used.
WIDE_GOLDSTEIN_PRICE = Landscape(
    "Goldstein-Price on [−2, 2]²",
    lambda x: surfaces.goldstein_price((x + 2) / 4),
    (0.0, -1.0),
    (-2.0, 2.0),
)
ACKLEY = Landscape("Ackley", surfaces.ackley, (0.0, 0.0), (-5.0, 5.0))
GOLDSTEIN_PRICE_MINIMA = ((0.5, 0.25), (0.35, 0.4), (0.95, 0.55), (0.8, 0.7))
LEVY = Landscape("Levy", surfaces.levy, (1.0, 1.0), (-10.0, 10.0))
ACKLEY_ROSENBROCK = Landscape(
    "Ackley + Rosenbrock", surfaces.ackley_rosenbrock, (0.0, 0.0), (-2.0, 2.0)
)


def uniform(shape: Sequence[int], box: tuple[float, float], seed: int) -> Tensor:
    """Return points uniform in a box, float64; torch's global generator is not touched."""
    generator = torch.Generator().manual_seed(seed)
    low, high = box
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def escapes(
    setting: Setting,
    dimension: int,
    sharpness: Sequence[float] = SHARPNESS,
    box: tuple[float, float] = (-5.0, 5.0),
    steps: int = STEPS,
) -> Tensor:
    """Return the share of coordinates that end at the flat minimum, (len(sharpness), STARTS).

    Every sharpness has the same starts. A coordinate is at the flat minimum when it ends below
    1/2, nearer to 0 than to 1. A run escapes when all its coordinates do: the share is 1.
    """
    starts = uniform((STARTS, dimension), box, seed=0)
    count = len(sharpness)
    each = torch.tensor(sharpness, dtype=torch.float64).repeat_interleave(STARTS)
    batch = Batch(partial(surfaces.flat_sharp, sharpness=each), starts.repeat(count, 1), setting)
    for _ in range(steps):
        batch.step()
    at_flat = batch.points.detach() < 0.5
    shares: Tensor = at_flat.view(count, STARTS, dimension).double().mean(-1)
    return shares


def slot_paths(setting: Setting, starts: Tensor, steps: int = BUFFER_STEPS) -> list[Tensor]:
    """Return the filled slots after each step on Ackley's function, each (N, filled, D).

    Args:
        setting: A system with a buffer.
        starts: (N, D).
        steps: How many.
    """
    batch = Batch(surfaces.ackley, starts, setting)
    slots = []
    for step in range(1, steps + 1):
        batch.step()
        # A state dict has every commit made; the fused steps defer them.
        states = batch.optimizer.state_dict()["state"]
        buffers = torch.stack([states[i]["critical_buffer"] for i in range(len(starts))])
        slots.append(buffers[:, : min(step, setting.capacity)].clone())
    return slots


def cancellation(slots: Tensor) -> Tensor:
    """Return 1 − |mean of the slots| / mean of the |slots|, (N,): 0 parallel, 1 sum to nothing.

    Args:
        slots: (N, filled, D).
    """
    lengths: Tensor = torch.linalg.vector_norm(slots, dim=-1)
    length_of_mean: Tensor = torch.linalg.vector_norm(slots.mean(1), dim=-1)
    return 1 - length_of_mean / lengths.mean(1)


@dataclass(frozen=True)
class Outcome:
    """Where the runs of a setting ended.

    Args:
        setting: The optimizer.
        losses: The final loss of each run, (SEEDS,).
        sharpness: The largest eigenvalue of the Hessian there, (SEEDS,).
    """

    setting: Setting
    losses: Tensor
    sharpness: Tensor


def outcomes(landscape: Landscape, settings: Sequence[Setting], seed: int = 0) -> list[Outcome]:
    """Run settings of one system, all from the same ``SEEDS`` uniform starts."""
    starts = uniform((SEEDS, 2), landscape.box, seed)
    batch = Batch(landscape.surface, starts.repeat(len(settings), 1), *settings)
    for _ in range(STEPS):
        batch.step()
    losses, sharpness = loss_and_sharpness(landscape, batch.points)
    parts = zip(settings, losses.chunk(len(settings)), sharpness.chunk(len(settings)), strict=True)
    return [Outcome(*part) for part in parts]


def loss_and_sharpness(landscape: Landscape, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the surface's values and the Hessians' largest eigenvalues at points (N, 2)."""
    points = points.detach().requires_grad_()
    losses = landscape.surface(points)
    return losses.detach(), surfaces.sharpness(losses, points)


def best_outcomes(landscape: Landscape, settings: Sequence[Setting]) -> list[Outcome]:
    """Return the outcome of each setting at its own best learning rate.

    The best rate of ``LEARNING_RATES`` has the lowest mean loss on starts of another seed.

    Args:
        landscape: Where.
        settings: Of one system; their learning rates are not used.
    """
    candidates = [replace(setting, lr=lr) for setting in settings for lr in LEARNING_RATES]
    searched = outcomes(landscape, candidates, seed=1000)
    count = len(LEARNING_RATES)
    tries = [searched[i : i + count] for i in range(0, len(searched), count)]
    best = [min(of_one, key=lambda found: found.losses.mean().item()) for of_one in tries]
    return outcomes(landscape, [found.setting for found in best])


def trajectories(landscape: Landscape, start: tuple[float, float]) -> Mapping[str, Tensor]:
    """Return each system's path from one start at the paper's rate, (STEPS + 1, 2)."""
    starts = torch.tensor([start], dtype=torch.float64)
    return {
        system: trajectory(landscape.surface, starts, Setting(system, LEARNING_RATE), STEPS)[:, 0]
        for system in SYSTEMS
    }


def line_paths(system: str, sharpness: float, starts: Sequence[float], steps: int) -> Tensor:
    """Return 1-D paths on the flat/sharp pair, (steps + 1, len(starts))."""
    points = torch.tensor(starts, dtype=torch.float64)[:, None]
    surface = partial(surfaces.flat_sharp, sharpness=sharpness)
    return trajectory(surface, points, Setting(system, LEARNING_RATE), steps)[..., 0]


def end_distances(landscape: Landscape, system: str) -> Tensor:
    """Return how far from the global minimum ``SEEDS`` runs at the paper's rate end, (SEEDS,)."""
    starts = uniform((SEEDS, 2), landscape.box, seed=0)
    path = trajectory(landscape.surface, starts, Setting(system, LEARNING_RATE), STEPS)
    distances: Tensor = torch.linalg.vector_norm(
        path[-1] - torch.tensor(landscape.minimum, dtype=path.dtype), dim=-1
    )
    return distances
