"""Buckets of tensors with their hyperparameters, in batches: the arguments of backends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm_fused._state.table import KEYS
from cm_fused.philox import ShardLayout

# The keys that a step of the reference changes: it commits at once and sums the slots.
_CHANGED = tuple(key for key in KEYS if key not in ("critical_sum", "pending_slot"))


class StepOptions(NamedTuple):
    """The hyperparameters of one step of one param group, as the optimizers' docstrings define.

    With `adjust_lr_fn`, `lr` is the update's, and decoupled `weight_decay` is divided by what `lr`
    was multiplied by: lr * weight_decay is the group's, and no kernel has to know.
    """

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    priority_decay: float
    priority_scope: str
    buffer_mean: str
    eps_inside_sqrt: bool
    maximize: bool
    decoupled_weight_decay: bool
    low_precision_update: str
    seed: int
    # For `cm_fused.compat`: the L2 term of critical gradients is added to the aggregate alone, so
    # that neither norms nor slots have it.
    l2_in_aggregate: bool = False
    # For `cm_fused.compat`: a group's key is the sum of its parameters' norms, not the norm of all.
    sum_of_norms: bool = False
    # The factor of every gradient, before all else, float64 (); None for 1.
    grad_factor: Tensor | None = None
    # float64 (); where it is not 0 the step changes nothing. None for 0.
    found_inf: Tensor | None = None


def step_options(group: Mapping[str, Any]) -> StepOptions:
    """Return the hyperparameters of a step of a group."""
    try:
        beta1, beta2 = group["betas"]
        if isinstance(beta1, str) or isinstance(beta2, str):  # which float() would read
            raise TypeError
        beta1, beta2 = float(beta1), float(beta2)
    except (TypeError, ValueError):
        raise ValueError(f"betas must be a pair of floats, got {group['betas']!r}") from None
    # With a beta of 1 the corrections divide by 0.
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        i, beta = (1, beta2) if 0 <= beta1 < 1 else (0, beta1)
        raise ValueError(f"betas[{i}] must be in [0, 1), got {beta!r}")
    options = StepOptions(
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        **{name: group[name] for name in _OF_GROUP},
    )
    return options if group["adjust_lr_fn"] is None else _adjusted(options)


def _adjusted(options: StepOptions) -> StepOptions:
    """Return options whose update has the root mean square of AdamW's, "match_rms_adamw".

    A momentum of independent gradients of size 1 has the mean square (1 - beta1) / (1 + beta1),
    which AdamW divides by 1, the second moment of the gradients; critical momenta divide the
    aggregate by its own second moment.
    """
    factor = math.sqrt((1 - options.beta1) / (1 + options.beta1))
    lr, weight_decay = options.lr, options.weight_decay
    # Multiplied where it is, without waiting for a device.
    lr = lr.to(torch.float64) * factor if isinstance(lr, Tensor) else lr * factor
    if options.decoupled_weight_decay:
        weight_decay = weight_decay / factor
    return options._replace(lr=lr, weight_decay=weight_decay)


def is_adjusted_on_device(group: Mapping[str, Any]) -> bool:
    """Return whether `step_options` makes a new tensor of a learning rate at every step."""
    return group["adjust_lr_fn"] is not None and isinstance(group["lr"], Tensor)


# The fields that are options of a group by the same name.
_OF_GROUP = tuple(
    name
    for name in StepOptions._fields
    if name not in ("lr", "beta1", "beta2", *StepOptions._field_defaults)
)


def hyperparameters(options: StepOptions, *, critical_gradients: bool) -> dict[str, float]:
    """Return the numbers of a step of either kind, in the order of the C++ operators."""
    return {
        "lr": 0.0 if isinstance(options.lr, Tensor) else options.lr,
        "beta1": options.beta1,
        "beta2": options.beta2,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "priority_decay": options.priority_decay,
        "group_scope": options.priority_scope == "group",
        "mean_over_capacity": options.buffer_mean == "capacity",
        "eps_inside_sqrt": options.eps_inside_sqrt,
        "maximize": options.maximize,
        "decoupled_weight_decay": options.decoupled_weight_decay,
        "stochastic_update": options.low_precision_update == "stochastic",
        "l2_in_aggregate": options.l2_in_aggregate,
        "sum_of_norms": options.sum_of_norms,
        "critical_gradients": critical_gradients,
    }


# Only the names are taken: any values will do.
_ANY_VALUES: dict[str, Any] = dict.fromkeys(StepOptions._fields, 0)
# csrc/cpu/step.h has the same ones; loading the library compares them.
HYPERPARAMETERS = tuple(hyperparameters(StepOptions(**_ANY_VALUES), critical_gradients=False))


@dataclass(slots=True, eq=False)
class Bucket:
    """The tensors of one param group that share a device and take part in a step.

    Item i of every list belongs to parameter i. Real dtypes only: complex tensors come as views of
    pairs. `bucket[key]` is the list of a state key.
    """

    params: list[Tensor]  # changed by the step, any strides
    # Never changed; shape and dtype of their parameter, or half precision if that is float32; any
    # strides.
    grads: list[Tensor]
    state: dict[str, list[Tensor]]  # changed; by the keys of `cm_fused._state.table` there are
    # The index of each parameter among the optimizer's, the key of its random bits; empty where the
    # bucket has all of them, in order.
    param_indices: list[int] = field(default_factory=list)
    # Where each parameter's elements lie in the full parameter, which keys their random bits: the
    # three numbers of `cm_fused.philox.ShardLayout` for each; empty where all are full.
    shard_layouts: list[int] = field(default_factory=list)
    critical_gradients: bool = False  # whether the buffers hold gradients, else momenta
    options: StepOptions = field(default=None)  # type: ignore[assignment]
    # This step's sum of g^2 over the priority scope, float64 () or (params,), where the bucket is
    # not all of the scope.
    sq_norm: Tensor | None = None
    # The sums that the reference found in its last step, float64 (params,).
    last_sq_norms: Tensor | None = None
    group: int = 0  # the index of its param group
    registered: Any = None  # what its backend prepared for all steps of these tensors
    placed: Any = None  # what it prepared for the step of these gradients, and no longer
    _indices: Tensor | None = None

    def __getitem__(self, key: str) -> list[Tensor]:
        """Return the list of a state key, empty where there is no such tensor."""
        return self.state.get(key, [])

    @property
    def device(self) -> torch.device:
        """The device of the state and the step."""
        return self.state["exp_avg"][0].device

    @property
    def capacity(self) -> int:
        """The number of slots of each buffer, 0 where there is none."""
        return self.state["priorities"][0].numel() if self["priorities"] else 0

    @property
    def finds_norms(self) -> bool:
        """Whether a step finds its gradients' norms; critical gradients' only for their keys."""
        return self.capacity > 0 or not self.critical_gradients

    def indices_on(self, device: torch.device) -> Tensor:
        """Return `param_indices` on a device; copied there once, without waiting."""
        if self._indices is None or self._indices.device != device:
            indices = torch.tensor(self.param_indices, device="cpu")
            if device.type == "cuda":
                indices = indices.pin_memory()
            self._indices = indices.to(device, non_blocking=True)
        return self._indices

    def shard_layout(self, i: int) -> ShardLayout:
        """Return where the elements of parameter i lie in the full parameter."""
        if not self.shard_layouts:
            return ShardLayout()
        numbers = len(ShardLayout._fields)
        return ShardLayout(*self.shard_layouts[numbers * i : numbers * (i + 1)])

    def changed(self, i: int) -> list[Tensor]:
        """Return what a step of the reference changes of parameter i."""
        lists = (self.params, *(self[key] for key in _CHANGED))
        return [tensors[i] for tensors in lists if tensors]


@dataclass(slots=True, eq=False)
class Batch:
    """The buckets of a step that one backend steps in one call."""

    buckets: list[Bucket]  # in the order of their param groups
    params: list[Tensor]  # those of all of them, one bucket after the other
    grads: list[Tensor] = field(default_factory=list)
    registered: Any = None  # what the backend prepared for all steps of these buckets
    _split: list[Tensor] | None = None  # the `grads` that the buckets have

    def split_gradients(self) -> None:
        """Give the buckets their gradients; once for each list of them."""
        if self._split is self.grads:
            return
        self._split, first = self.grads, 0
        for bucket in self.buckets:
            bucket.grads = self.grads[first : first + len(bucket.params)]
            bucket.placed = None
            first += len(bucket.params)


def over_scope(sq_norms: Tensor, options: StepOptions) -> Tensor:
    """Return the sums of squares over the priority scope, for a bucket that is all of its group.

    `sq_norms` has each parameter's, float64 (params,); the scope "tensor" takes them as they are.
    """
    if options.priority_scope == "tensor":
        return sq_norms
    return sq_norms.sqrt().sum().square() if options.sum_of_norms else sq_norms.sum()
