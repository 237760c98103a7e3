"""The history of an optimizer's critical buffers and parameters."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_fused.diagnostics._reading import flat, weighted_mean


@dataclass(frozen=True)
class History:
    """The history of some parameters up to a step.

    Attributes:
        mean_age: Steps since a filled slot was admitted, mean over the slots; 0 for the last step.
        max_age: The age of the oldest slot.
        admission_rate: Share of the steps since the last record in which something was admitted.
        distance: L2 distance from where the parameters were when recording began.
    """

    mean_age: float
    max_age: float
    admission_rate: float
    distance: float


class Track:
    """The history of one parameter."""

    def __init__(self, param: Tensor, keys: Tensor | None) -> None:
        self.start = param.detach().clone()
        self.follow(keys)
        self.admissions = 0
        self.steps = 0

    def follow(self, keys: Tensor | None) -> None:
        """Begin anew with keys, (C,) on the CPU, whose slots count as filled now."""
        self.keys = torch.empty(0, device="cpu") if keys is None else keys
        self.ages = torch.zeros_like(self.keys, dtype=torch.int64)

    def update(self, keys: Tensor, decay: float) -> None:
        """Find what a step admitted, from the keys before and after it, both (C,) on the CPU."""
        if len(self.keys) != len(keys):
            self.follow(torch.full_like(keys, -torch.inf))
        # Only the smallest key can be replaced, the first of equal ones; unfilled slots have -inf.
        slot = int(self.keys.argmin())
        self.ages += 1
        self.steps += 1
        decayed = self.keys[slot] * decay if self.keys[slot] > -torch.inf else self.keys[slot]
        # With a decay of 0 all keys are 0 after a step, and any gradient but zero is admitted.
        if keys[slot] != decayed or (decay == 0 and decayed > -torch.inf):
            self.ages[slot] = 0
            self.admissions += 1
        self.keys = keys.clone()

    def history(self, param: Tensor) -> History:
        """Return the history, and begin to count admissions anew."""
        nan = float("nan")
        ages = self.ages[self.keys > -torch.inf].double()
        mean_age, max_age = (ages.mean().item(), ages.max().item()) if len(ages) else (nan, nan)
        rate = self.admissions / self.steps if self.steps else nan
        self.admissions = self.steps = 0
        moved = torch.linalg.vector_norm(flat(param.detach() - self.start, 0))
        return History(mean_age, max_age, rate, moved.item())


def combine_histories(histories: Mapping[Tensor, History]) -> History:
    """Return the history of several parameters together, means weighted by their elements."""
    weights = [param.numel() for param in histories]
    every = list(histories.values())
    ages = [h.max_age for h in every if h.max_age == h.max_age]
    return History(
        weighted_mean([h.mean_age for h in every], weights),
        max(ages, default=float("nan")),
        weighted_mean([h.admission_rate for h in every], weights),
        sum(h.distance**2 for h in every) ** 0.5,
    )
