"""All numbers of the report, computed once."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from bench.paper.experiments import (
    ACKLEY,
    CAPACITIES,
    GOLDSTEIN_PRICE,
    LEARNING_RATE,
    LEVY,
    STARTS,
    STEPS,
    WIDE_GOLDSTEIN_PRICE,
    Outcome,
    best_outcomes,
    cancellation,
    end_distances,
    escapes,
    slot_paths,
    uniform,
)
from bench.paper.systems import BUFFERED, SYSTEMS, Setting

OURS = "Adam+CM"
OTHERS = tuple(system for system in SYSTEMS if system != OURS)
DIMENSIONS = (10, 1)
TABLE_CAPACITIES = (5, 20)
DECAYS = (0.7, 0.99)
BUFFER_RATES = (LEARNING_RATE, 0.1, 0.5)
LANDSCAPES = (GOLDSTEIN_PRICE, WIDE_GOLDSTEIN_PRICE, LEVY)
_NARROW_BOX = (0.0, 2.0)


@dataclass(frozen=True)
class Results:
    """The numbers, by what they depend on.

    Args:
        escape: Share of coordinates at the flat minimum, (sharpness, start), by (system, D).
        escape_capacity: The same in ten dimensions, by (system, C).
        escape_variants: The same in ten dimensions where the paper leaves a setting open, by
            (variant, system).
        cancelled: `cancellation` averaged over the steps with at least two slots, (start,), by
            (system, learning rate).
        best: Outcomes at each system's best rate, by (landscape, system).
        grid: Outcomes of Table 2, by (landscape, system, C, lambda).
        distances: From the global minimum at the end, (seed,), by (landscape, system).
    """

    escape: dict[tuple[str, int], Tensor]
    escape_capacity: dict[tuple[str, int], Tensor]
    escape_variants: dict[tuple[str, str], Tensor]
    cancelled: dict[tuple[str, float], Tensor]
    best: dict[tuple[str, str], Outcome]
    grid: dict[tuple[str, str, int, float], Outcome]
    distances: dict[tuple[str, str], Tensor]


def compute() -> Results:
    """Run every experiment, with a progress bar over them."""
    parts = {
        "escape": _escape,
        "escape_capacity": _escape_capacity,
        "escape_variants": _escape_variants,
        "cancelled": _cancelled,
        "best": _best,
        "grid": _grid,
        "distances": _distances,
    }
    done: dict[str, Any] = {}
    for name, part in tqdm(parts.items(), desc="experiments"):
        done[name] = part()
    return Results(**done)


def _escape() -> dict[tuple[str, int], Tensor]:
    return {
        (system, dimension): escapes(Setting(system, LEARNING_RATE), dimension)
        for system in SYSTEMS
        for dimension in DIMENSIONS
    }


def _escape_capacity() -> dict[tuple[str, int], Tensor]:
    return {
        (system, capacity): escapes(Setting(system, LEARNING_RATE, capacity), DIMENSIONS[0])
        for system in BUFFERED
        for capacity in CAPACITIES
    }


def _escape_variants() -> dict[tuple[str, str], Tensor]:
    dimension = DIMENSIONS[0]
    variants = {}
    for system in SYSTEMS:
        plain = Setting(system, LEARNING_RATE)
        variants["starts in [0, 2]^D", system] = escapes(plain, dimension, box=_NARROW_BOX)
        variants[f"{4 * STEPS} steps", system] = escapes(plain, dimension, steps=4 * STEPS)
        for lr in (LEARNING_RATE / 5, LEARNING_RATE * 5):
            variants[f"lr {lr:g}", system] = escapes(Setting(system, lr), dimension)
    for system in BUFFERED:
        slow = Setting(system, LEARNING_RATE, priority_decay=DECAYS[-1])
        variants[f"λ = {DECAYS[-1]}", system] = escapes(slow, dimension)
    return variants


def _cancelled() -> dict[tuple[str, float], Tensor]:
    starts = uniform((STARTS, 2), ACKLEY.box, seed=0)
    cancelled = {}
    for system in BUFFERED:
        for lr in BUFFER_RATES:
            with_two = slot_paths(Setting(system, lr), starts)[1:]
            cancelled[system, lr] = sum(
                (cancellation(slots) for slots in with_two), start=0 * starts[:, 0]
            ) / len(with_two)
    return cancelled


def _best() -> dict[tuple[str, str], Outcome]:
    return {
        (landscape.name, system): best_outcomes(landscape, [Setting(system, LEARNING_RATE)])[0]
        for landscape in LANDSCAPES
        for system in SYSTEMS
    }


def _grid() -> dict[tuple[str, str, int, float], Outcome]:
    grid = {}
    for landscape in LANDSCAPES:
        for system in BUFFERED:
            settings = [
                Setting(system, LEARNING_RATE, capacity, decay)
                for capacity in TABLE_CAPACITIES
                for decay in DECAYS
            ]
            for found in best_outcomes(landscape, settings):
                setting = found.setting
                key = (landscape.name, system, setting.capacity, setting.priority_decay)
                grid[key] = found
    return grid


def _distances() -> dict[tuple[str, str], Tensor]:
    return {
        (landscape.name, system): end_distances(landscape, system)
        for landscape in (GOLDSTEIN_PRICE, WIDE_GOLDSTEIN_PRICE, ACKLEY)
        for system in SYSTEMS
    }
