"""What one call of a backend works on: the tensors of a bucket and its hyperparameters."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cm_fused.philox import Places


class Handle(Protocol):
    """What a backend keeps for further steps of the same tensors.

    Attributes:
        checks_lists: Whether a step with it checks the lists before it changes anything.
    """

    checks_lists: bool


@dataclass(slots=True)
class Bucket:
    """The tensors of one param group that share a device and take part in a step.

    Item i of every list belongs to parameter i. Real dtypes only: complex tensors come as views of
    pairs. State tensors have the dtypes that `cm_fused._state.making` says.

    Attributes:
        params: Changed by the step. Any strides.
        grads: Never changed. Shape and dtype of their parameter, any strides.
        exp_avgs: m, shape of the parameter. Changed.
        exp_avg_sqs: v, shape of the parameter. Changed.
        critical_buffers: The slots, (C, *shape). Changed.
        priorities: The keys, float32 (C,), -inf where a slot is unfilled. Changed.
        steps: Steps taken so far, float32 (). Changed.
        max_exp_avg_sqs: Running maximum of v; empty without amsgrad. Changed.
        critical_sums: Running sum of the slots, shape of the parameter; empty where a backend
            keeps none. Changed.
        pending_slots: The slot that exp_avg is still to be copied to, or -1, int64 (); empty where
            a backend commits at once. Changed.
        critical_scales: Scales of the slots, float32 (C, blocks); empty where their dtype has none.
            Changed.
        exp_avg_scales: Scales of m, float32 (blocks,); empty where its dtype has none. Changed.
        exp_avg_sq_scales: Scales of v, likewise.
        compensations: What rounding took from a half-precision parameter, shape and dtype of the
            parameter, (0,) for others; empty unless `low_precision_update="kahan"`. Changed.
        param_indices: The place of each parameter among the optimizer's, the key of its random
            words; empty where the bucket is all there is.
        element_places: Where each parameter's elements lie in the whole parameter, which keys their
            random words: the three numbers of `cm_fused.philox.Places` for each; empty where all
            are whole.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    critical_buffers: list[Tensor]
    priorities: list[Tensor]
    steps: list[Tensor]
    max_exp_avg_sqs: list[Tensor] = field(default_factory=list)
    critical_sums: list[Tensor] = field(default_factory=list)
    pending_slots: list[Tensor] = field(default_factory=list)
    critical_scales: list[Tensor] = field(default_factory=list)
    exp_avg_scales: list[Tensor] = field(default_factory=list)
    exp_avg_sq_scales: list[Tensor] = field(default_factory=list)
    compensations: list[Tensor] = field(default_factory=list)
    param_indices: list[int] = field(default_factory=list)
    element_places: list[int] = field(default_factory=list)
    # What a backend prepared for further steps of these tensors.
    handle: Handle | None = field(default=None, init=False)
    _places: Tensor | None = field(default=None, init=False)

    def places(self, device: torch.device) -> Tensor:
        """Return `param_indices` on a device; copied there once, and not waited for."""
        if self._places is None or self._places.device != device:
            places = torch.tensor(self.param_indices, device="cpu")
            if device.type == "cuda":
                places = places.pin_memory()
            self._places = places.to(device, non_blocking=True)
        return self._places

    def places_of(self, i: int) -> Places:
        """Return where the elements of parameter i lie in the whole parameter."""
        if not self.element_places:
            return Places()
        numbers = len(Places._fields)
        return Places(*self.element_places[numbers * i : numbers * (i + 1)])

    def changed(self, i: int) -> list[Tensor]:
        """Return what a step of the reference changes of parameter i."""
        lists = (
            *(self.params, self.exp_avgs, self.exp_avg_sqs, self.max_exp_avg_sqs),
            *(self.critical_buffers, self.priorities, self.steps),
            *(self.critical_scales, self.exp_avg_scales, self.exp_avg_sq_scales),
            self.compensations,
        )
        return [tensors[i] for tensors in lists if tensors]

    def low_precision_state(self) -> tuple[Any, ...]:
        """Return the lists that only low precision needs, in the order of the operators."""
        return (
            self.critical_scales,
            self.exp_avg_scales,
            self.exp_avg_sq_scales,
            self.compensations,
            self.param_indices,
            self.element_places,
        )

    def state(self) -> tuple[Any, ...]:
        """Return the lists of the state, in the order of `cm_fused::hold_state`."""
        return (
            self.exp_avgs,
            self.exp_avg_sqs,
            self.max_exp_avg_sqs,
            self.critical_buffers,
            self.critical_sums,
            self.priorities,
            self.pending_slots,
            self.steps,
            *self.low_precision_state(),
        )


@dataclass(frozen=True, slots=True)
class StepOptions:
    """The hyperparameters of one step of one param group, as the optimizers' docstrings define.

    Attributes:
        l2_in_aggregate: The L2 term of critical gradients is added to the aggregate alone: neither
            norms nor slots have it (`cm_fused.compat`).
        sum_of_norms: A group's key is the sum of its parameters' norms, not the norm of them all
            (`cm_fused.compat`).
        grad_factor: What every gradient is multiplied by before all else, float64 (); None for 1.
        found_inf: float64 (); where it is not 0 the step changes nothing. None for 0.
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
    l2_in_aggregate: bool = False
    sum_of_norms: bool = False
    grad_factor: Tensor | None = None
    found_inf: Tensor | None = None


class BucketStep(NamedTuple):
    """The step of one bucket, which a backend takes with those of others.

    Attributes:
        bucket: What is stepped.
        options: The hyperparameters.
        critical_gradients: Whether the buffers hold gradients, else momenta.
        sq_norm: The sum of g^2 over the priority scope, float64 () or (params,), where the bucket
            is not all of it.
    """

    bucket: Bucket
    options: StepOptions
    critical_gradients: bool
    sq_norm: Tensor | None = None


def step_options(group: dict[str, Any]) -> StepOptions:
    """Return the hyperparameters of a step of a group."""
    beta1, beta2 = group["betas"]
    return StepOptions(
        lr=group["lr"],
        beta1=float(beta1),
        beta2=float(beta2),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        priority_decay=group["priority_decay"],
        priority_scope=group["priority_scope"],
        buffer_mean=group["buffer_mean"],
        eps_inside_sqrt=group["eps_inside_sqrt"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
        low_precision_update=group["low_precision_update"],
        seed=group["seed"],
    )
