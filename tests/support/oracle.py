"""The float64 oracle: one step of Adam with critical momenta or critical gradients.

Written from the definition alone, in numpy and plain control flow, and meant to be obviously
right rather than fast: every backend is judged against it. It shares no code with the package.

Source: Malviya et al., "Promoting Exploration in Memory-Augmented Adam using Critical Momenta";
the equation numbers are the paper's.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """The options of one param group, with the optimizers' defaults."""

    kind: Literal["cm", "cg"] = "cm"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    capacity: int = 5
    priority_decay: float = 0.7
    priority_scope: Literal["group", "tensor"] = "group"
    buffer_mean: Literal["capacity", "size"] = "capacity"
    eps_inside_sqrt: bool = True
    maximize: bool = False
    decoupled_weight_decay: bool = False
    adjust_lr_fn: Literal["match_rms_adamw"] | None = None


@dataclass
class ParamState:
    """The state of one parameter. Only filled slots are kept: their number is ``len(slots)``."""

    step: int
    exp_avg: Array
    exp_avg_sq: Array
    max_exp_avg_sq: Array  # moves only with amsgrad
    slots: list[Array] = field(default_factory=list)
    keys: list[np.float32] = field(default_factory=list)

    @classmethod
    def fresh(cls, param: NDArray[Any]) -> "ParamState":
        """The state before the first step: moments 0, buffer empty."""
        shape = param.shape
        return cls(0, np.zeros(shape), np.zeros(shape), np.zeros(shape))

    def priorities(self, capacity: int) -> NDArray[np.float32]:
        """The keys as a checkpoint shows them: (capacity,) float32, -inf where unfilled."""
        keys = np.full(capacity, -np.inf, dtype=np.float32)
        for index, key in enumerate(self.keys):
            keys[index] = key
        return keys

    def critical_buffer(self, capacity: int) -> Array:
        """The slots as (capacity, *shape), 0 where unfilled."""
        buffer = np.zeros((capacity, *self.exp_avg.shape))
        for index, slot in enumerate(self.slots):
            buffer[index] = slot
        return buffer


def oracle_step(
    params: list[Array],
    grads: list[NDArray[Any] | None],
    states: list[ParamState],
    options: Options,
) -> None:
    """Take one step for one param group, changing ``params`` and ``states`` in place.

    Args:
        params: float64 arrays. A complex parameter is passed as its real view.
        grads: One per parameter, any float dtype, read as float64 and never written; None
            where the parameter takes no part in the step.
        states: One per parameter.
        options: The hyperparameters of this step.

    Raises:
        TypeError: A parameter is not float64, so that it could not be updated exactly.
    """
    for index, param in enumerate(params):
        if param.dtype != np.float64:
            raise TypeError(f"params[{index}] must be float64, got {param.dtype}")
    with np.errstate(all="ignore"):  # infinities and NaN in a gradient are data, not accidents
        _step_group(params, grads, states, options)


def _step_group(
    params: list[Array],
    grads: list[NDArray[Any] | None],
    states: list[ParamState],
    options: Options,
) -> None:
    taking_part = [index for index, grad in enumerate(grads) if grad is not None]

    effective_grads: dict[int, Array] = {}
    for index in taking_part:
        g = np.asarray(grads[index], dtype=np.float64)
        if options.maximize:
            g = -g
        # Without weight decay no parameter enters its gradient, not even as 0 * NaN.
        if options.weight_decay and not options.decoupled_weight_decay:
            g = g + options.weight_decay * params[index]
        effective_grads[index] = g

    sums_of_squares = {index: float(np.sum(g * g)) for index, g in effective_grads.items()}
    for index in taking_part:
        if options.priority_scope == "group":
            kappa = np.sqrt(sum(sums_of_squares.values()))
        else:
            kappa = np.sqrt(sums_of_squares[index])
        _step_one(params[index], effective_grads[index], np.float32(kappa), states[index], options)


def _step_one(
    param: Array, g: Array, kappa: np.float32, state: ParamState, options: Options
) -> None:
    beta1, beta2 = options.betas
    state.step += 1

    if options.decoupled_weight_decay:
        param *= 1 - options.lr * options.weight_decay

    buffer_mean = _buffer_mean(state, options)
    m, v = state.exp_avg, state.exp_avg_sq
    if options.kind == "cm":
        m = beta1 * m + (1 - beta1) * g  # Eq. (4)
        aggregate = m + buffer_mean  # Eq. (5)
        v = beta2 * v + (1 - beta2) * aggregate**2  # Eq. (5)
        numerator = aggregate
        item = m
    else:
        aggregate = g + buffer_mean  # Eq. (3)
        m = beta1 * m + (1 - beta1) * aggregate  # Eq. (3)
        v = beta2 * v + (1 - beta2) * aggregate**2  # Eq. (3)
        numerator = m
        item = g
    state.exp_avg, state.exp_avg_sq = m, v

    _admit(kappa, item, state, options.capacity)
    decay = np.float32(options.priority_decay)
    state.keys = [decay * key for key in state.keys]

    # Eq. (7)
    if options.amsgrad:
        state.max_exp_avg_sq = np.maximum(state.max_exp_avg_sq, v)
        v = state.max_exp_avg_sq
    v_hat = v / (1 - beta2**state.step)
    numerator_hat = numerator / (1 - beta1**state.step)
    if options.eps_inside_sqrt:
        denominator = np.sqrt(v_hat + options.eps)
    else:
        denominator = np.sqrt(v_hat) + options.eps
    lr = options.lr
    if options.adjust_lr_fn == "match_rms_adamw":
        lr *= np.sqrt((1 - beta1) / (1 + beta1))
    param -= lr * numerator_hat / denominator


def _buffer_mean(state: ParamState, options: Options) -> Array:
    """The mean of the buffer as it stands before this step's admission, Eq. (6)."""
    total = np.zeros(state.exp_avg.shape)
    if len(state.slots) == 0:
        return total
    for slot in state.slots:
        total = total + slot
    if options.buffer_mean == "capacity":
        return np.asarray(total / options.capacity)
    return np.asarray(total / len(state.slots))


def _admit(kappa: np.float32, item: Array, state: ParamState, capacity: int) -> None:
    """Offer (kappa, item) to the buffer of one parameter."""
    if capacity == 0 or not np.isfinite(kappa):
        return
    if len(state.slots) < capacity:
        state.slots.append(item.copy())
        state.keys.append(kappa)
        return
    smallest = 0
    for index in range(1, capacity):
        if state.keys[index] < state.keys[smallest]:  # strict: the lowest index wins a tie
            smallest = index
    if kappa > state.keys[smallest]:
        state.slots[smallest] = item.copy()
        state.keys[smallest] = kappa
