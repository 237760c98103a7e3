"""A long run beside an independent float64 recurrence.

NOTE: [Bounds of a long run]
Keys are exact: gradients are multiples of 2^-6 whose squares' sums float64 holds, and a key's decay
is one float32 product on both sides. The recurrence takes float32's betas, as the step does. Of a
moment the roundings die out as it does: with u = 2^-24, m has three in a step that are worth
1 / (1 - beta1) steps, and v the aggregate's C + 8, doubled by the square, and three of its own that
are worth 1 / (1 - beta2). Sizes are those of the last 2,000 steps, before which nothing is left.
The running sum is rebuilt once in 4 C steps: 8 C u of the slots' size
(`tests/optimizer/test_drift.py`).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.reliability.finding import Finding, Kind, require
from cm_fused import AdamCG, AdamCM

Array = NDArray[np.float64]

STEPS, QUICK_STEPS = 1_000_000, 20_000
SIZE = 5
CAPACITY = 5
BETA1, BETA2 = float(np.float32(0.9)), float(np.float32(0.99))
DECAY = np.float32(0.7)
U = 2.0**-24
# Prime, so that all draws meet all scales.
DRAWS, SCALES = 997, 1013


def run(quick: bool) -> Finding:
    """Follow sum, keys and moments of critical momenta, and of critical gradients."""
    steps = QUICK_STEPS if quick else STEPS
    for kind in (AdamCM, AdamCG):
        _follow(kind, steps // 2)
    return Finding(
        "drift",
        steps,
        "steps of small tensors",
        "keys equal to a float64 recurrence's; moments, slots and running sum within stated bounds",
    )


class _Recurrence:
    """Both methods for one tensor, in float64 and NumPy."""

    def __init__(self, stores_gradients: bool) -> None:
        self.stores_gradients = stores_gradients
        self.m, self.v = np.zeros(SIZE), np.zeros(SIZE)
        self.slots = np.zeros((CAPACITY, SIZE))
        self.keys = np.full(CAPACITY, -np.inf, np.float32)

    def step(self, g: Array) -> None:
        mean = self.slots.sum(0) / CAPACITY
        if self.stores_gradients:
            aggregate = g + mean
            self.m = BETA1 * self.m + (1 - BETA1) * aggregate
            item = g
        else:
            self.m = item = BETA1 * self.m + (1 - BETA1) * g
            aggregate = self.m + mean
        self.v = BETA2 * self.v + (1 - BETA2) * aggregate * aggregate
        key = np.float32(np.sqrt(g @ g))
        slot = int(self.keys.argmin())
        if key > self.keys[slot]:
            self.slots[slot], self.keys[slot] = item, key
        self.keys *= DECAY


def _follow(kind: Kind, steps: int) -> None:
    source = torch.Generator().manual_seed(0)
    draws = torch.randint(-256, 257, (DRAWS, SIZE), generator=source) / 64
    exact = draws.double().numpy()
    param = torch.zeros(SIZE, requires_grad=True)
    param.grad = torch.empty(SIZE)
    optimizer = kind([param], lr=1e-4, betas=(BETA1, BETA2), capacity=CAPACITY, backend="cpu")
    recurrence = _Recurrence(stores_gradients=kind is AdamCG)
    for t in range(steps):
        scale = 1 + t % SCALES
        torch.mul(draws[t % DRAWS], scale, out=param.grad)
        optimizer.step()
        recurrence.step(exact[t % DRAWS] * scale)
    optimizer.state_dict()  # makes what is pending
    _require(optimizer.state[param], recurrence, steps)


def _require(state: dict[str, Tensor], expected: _Recurrence, steps: int) -> None:
    require(state["step"].item() == steps, f"{state['step'].item()} of {steps} were counted")
    found = state["priorities"].numpy()
    require(bool((found == expected.keys).all()), f"keys are {found}, should be {expected.keys}")
    # The largest gradient there is, of which an average has at most all.
    size = 4.0 * SCALES
    aggregate = 2 * size
    m = 3 * U * (aggregate if expected.stores_gradients else size) / (1 - BETA1)
    v = (2 * (CAPACITY + 8) + 3) * U * aggregate**2 / (1 - BETA2)
    bounds = {
        "exp_avg": (expected.m, m),
        "exp_avg_sq": (expected.v, v),
        "critical_buffer": (expected.slots, m),
    }
    for key, (values, bound) in bounds.items():
        error = float(np.abs(state[key].double().numpy() - values).max())
        require(error <= bound, f"{key} is off by {error:.1e}, at most {bound:.1e}")
    exact_sum = state["critical_buffer"].double().sum(0)
    error = float((state["critical_sum"] - exact_sum).abs().max())
    bound = 8 * CAPACITY * U * size
    require(error <= bound, f"the running sum is off by {error:.1e}, at most {bound:.1e}")
