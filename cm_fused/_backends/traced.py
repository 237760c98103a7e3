"""The Triton step as operators, for `torch.compile`, which cannot trace what prepares its launches.

Called eagerly the step goes past them: they make the tables of a bucket anew at every call.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._backends import cpu
from cm_fused._backends.triton import launch as triton
from cm_fused._bucket import Bucket, BucketStep, StepOptions

keep_books_ = triton.keep_books_
update_cm_ = triton.update_cm_


def prepare(steps: list[BucketStep]) -> Callable[[], None]:
    """Prepare the steps of some buckets: see `cm_fused._backends.triton.launch.prepare`."""
    if torch.compiler.is_compiling():
        return partial(_traced_steps_, steps)
    return triton.prepare(steps)


def sq_norms(bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of each of the bucket's gradients, float64 (params,)."""
    if not torch.compiler.is_compiling():
        return triton.sq_norms(bucket, options)
    return reference.sq_norms(bucket, options)


# The lists of a bucket that a step changes.
CHANGED = (
    *("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "critical_buffers", "critical_sums"),
    *("priorities", "pending_slots", "steps"),
    *("critical_scales", "exp_avg_scales", "exp_avg_sq_scales", "compensations"),
)
# Those that come to the operators by themselves, as tensors.
_TENSORS = ("lr", "grad_factor", "found_inf")
_OPTIONS = tuple(field.name for field in fields(StepOptions))
PLAIN_OPTIONS = tuple(name for name in _OPTIONS if name not in _TENSORS)


def _traced_steps_(steps: list[BucketStep]) -> None:
    for step in steps:
        _traced_step_(step)


def _traced_step_(step: BucketStep) -> None:
    bucket, options, critical_gradients, sq_norm = step
    lr = options.lr
    if not isinstance(lr, Tensor):
        lr = cpu.lr_as_tensor(lr, bucket.params[0].device)
    step_op(
        *[getattr(bucket, name) for name in CHANGED],
        bucket.grads,
        bucket.param_indices,
        bucket.element_places,
        sq_norm,
        lr,
        options.grad_factor,
        options.found_inf,
        critical_gradients=critical_gradients,
        **{name: getattr(options, name) for name in PLAIN_OPTIONS},
    )


@torch.library.custom_op("cm_fused_triton::step_", mutates_args=CHANGED)
def step_op(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    critical_buffers: list[Tensor],
    critical_sums: list[Tensor],
    priorities: list[Tensor],
    pending_slots: list[Tensor],
    steps: list[Tensor],
    critical_scales: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    compensations: list[Tensor],
    grads: list[Tensor],
    param_indices: list[int],
    element_places: list[int],
    sq_norm: Tensor | None,
    lr: Tensor,
    grad_factor: Tensor | None,
    found_inf: Tensor | None,
    *,
    critical_gradients: bool,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    priority_decay: float,
    priority_scope: str,
    buffer_mean: str,
    eps_inside_sqrt: bool,
    maximize: bool,
    decoupled_weight_decay: bool,
    low_precision_update: str,
    seed: int,
    l2_in_aggregate: bool,
    sum_of_norms: bool,
) -> None:
    """Take a step of either kind, its arguments those of `Bucket` and `StepOptions`."""
    given = locals()
    numbers = ("param_indices", "element_places")
    bucket = Bucket(**{name: given[name] for name in (*CHANGED, "grads", *numbers)})
    options = StepOptions(**{name: given[name] for name in _OPTIONS})
    triton.prepare([BucketStep(bucket, options, critical_gradients, sq_norm)])()
