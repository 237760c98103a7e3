"""The history of an optimizer's critical buffers and parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cm_fused.diagnostics._reading import flat


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

    def __init__(self, param: Tensor, keys: Tensor | None, count: float) -> None:
        self.start = param.detach().clone()
        self.follow(keys, count)
        self.admissions = 0
        self.steps = 0

    def follow(self, keys: Tensor | None, count: float) -> None:
        """Begin anew after `count` steps with keys, (C,) on the CPU; their slots are filled now."""
        self.count = count
        self.keys = torch.empty(0, device="cpu") if keys is None else keys
        self.ages = torch.zeros_like(self.keys, dtype=torch.int64)

    def update(self, keys: Tensor | None, count: float, decay: float) -> None:
        """Find what a step admitted, from the keys before and after it, both (C,) on the CPU."""
        took_part, self.count = count != self.count, count
        # A parameter without a gradient took no part: its keys did not decay.
        if keys is None or not took_part:
            return
        if len(self.keys) != len(keys):
            self.follow(torch.full_like(keys, -torch.inf), count)
        # Only the smallest key can be replaced, the first of equal ones; unfilled slots have -inf.
        slot = int(self.keys.argmin())
        self.ages += 1
        self.steps += 1
        decayed = self.keys[slot] * decay if self.keys[slot] > -torch.inf else self.keys[slot]
        # With a decay of 0 all keys are 0 after a step, and any gradient but zero is admitted.
        if keys[slot] != decayed or (decay == 0 and decayed > -torch.inf):
            self.ages[slot] = 0
            self.admissions += 1
        self.keys = keys

    def history(self, param: Tensor) -> History:
        """Return the history, and begin to count admissions anew."""
        nan = float("nan")
        ages = self.ages[self.keys > -torch.inf].double()
        mean_age, max_age = (ages.mean().item(), ages.max().item()) if len(ages) else (nan, nan)
        rate = self.admissions / self.steps if self.steps else nan
        self.admissions = self.steps = 0
        moved = torch.linalg.vector_norm(flat(param.detach() - self.start, 0))
        return History(mean_age, max_age, rate, moved.item())
