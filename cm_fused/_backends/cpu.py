"""The C++ CPU step: typed wrappers over the operators of `cm_fused._C`.

The momentum of a step is admitted when the step's gradient norm is known, after the pass that read
the gradient. The copy into its slot is deferred to the next pass, which reads the momentum anyway;
`commit_` makes it at once, for whoever wants to see the slots.
"""

from collections.abc import Mapping
from itertools import chain
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from cm_fused._backends import library
from cm_fused._bucket import Bucket, BucketStep, StepOptions
from cm_fused.reference import over_scope

# From this capacity on, by the bytes of a slot's element, keeping the sum of the slots costs no
# more bytes than reading them: for float32 44 an element against 32 + 4 C, since a slot that is
# written must be fetched first. Measured against fused AdamW at C = 1, 2, 3, 4 (30 M float32, two
# cores of a Zen 4): reading 1.35, 1.65, 1.92, 2.24; running sum 1.73 for each. Of 2 and of 1 byte
# at C = 5 (two cores of a Xeon): reading 1.67 to 1.72 and 1.37 to 1.41, running sum 1.70 to 1.99
# and 1.37 to 1.45.
RUNNING_SUM_MIN_CAPACITY = {4: 3, 2: 6, 1: 10}


unavailable_reason = library.unavailable_reason


class HeldState(library.Held):
    """A bucket's state, held by the library, which checks each step's lists against it."""

    checks_lists = True


def state_keys(critical_gradients: bool, capacity: int, slot_bytes: int) -> tuple[str, ...]:
    """Return the keys this backend keeps in a parameter's state besides the reference's.

    Args:
        critical_gradients: Whether the buffer holds gradients.
        capacity: Slots of the buffer.
        slot_bytes: Of one element of a slot.
    """
    running_sum = ("critical_sum",) if capacity >= RUNNING_SUM_MIN_CAPACITY[slot_bytes] else ()
    return running_sum if critical_gradients else (*running_sum, "pending_slot")


def step_(steps: list[BucketStep]) -> None:
    """Take the steps of some buckets: all of them, or none where it raises.

    Each is that of `cm_fused.reference`; of critical momenta the commit is deferred to the next.
    """
    held = _held(steps)
    if held is not None:
        _step_held_(held, steps, None)
        return
    for step in steps:
        if step.critical_gradients:
            _adam_cg_(step)
        else:
            _adam_cm_(step, None)


def update_cm_(steps: list[BucketStep]) -> list[Tensor]:
    """Take steps of critical momenta but for the books; return each gradient's sum of squares.

    Returns:
        Of each bucket, float64 (params,).
    """
    counts = [len(step.bucket.params) for step in steps]
    # Of a skipped step nobody reads them.
    sq_norms = torch.zeros(sum(counts), dtype=torch.float64, device="cpu")
    of_each = list(torch.split(sq_norms, counts))
    held = _held(steps)
    if held is not None:
        _step_held_(held, steps, sq_norms)
    else:
        for step, of_bucket in zip(steps, of_each, strict=True):
            _adam_cm_(step, of_bucket)
    return of_each


def keep_books_(steps: list[BucketStep]) -> None:
    """Keep the books that `update_cm_` left: all of them, or none where it raises."""
    held = _held(steps)
    if held is not None:
        torch.ops.cm_fused.keep_books_held_(
            held,
            [step.sq_norm for step in steps],
            _for_each([_on_host(step.options.found_inf) for step in steps], 0.0),
            priority_decays=[step.options.priority_decay for step in steps],
        )
        return
    for bucket, options, _, sq_norm in steps:
        torch.ops.cm_fused.keep_books_(
            bucket.priorities,
            bucket.pending_slots,
            bucket.steps,
            sq_norm,
            _on_host(options.found_inf),
            priority_decay=options.priority_decay,
        )


def _held(steps: list[BucketStep]) -> list[int] | None:
    """Return what the library knows the buckets' states by.

    Several are held for it where they are not yet, since only held ones go into one call.

    Returns:
        None where the states' lists are to be passed: a bucket alone is held from its second step
        on, and a compiled graph is to see what is changed.
    """
    buckets = [step.bucket for step in steps]
    if torch.compiler.is_compiling() or (len(buckets) == 1 and buckets[0].handle is None):
        return None
    for bucket in buckets:
        if bucket.handle is None:
            bucket.handle = HeldState(bucket)
    return [cast(HeldState, bucket.handle).id for bucket in buckets]


def _step_held_(held: list[int], steps: list[BucketStep], local_sq_norms: Tensor | None) -> None:
    options = [step.options for step in steps]
    params = list(chain.from_iterable(step.bucket.params for step in steps))
    torch.ops.cm_fused.step_held_(
        held,
        params,
        list(chain.from_iterable(step.bucket.grads for step in steps)),
        _sq_norms_of_all(steps),
        _lr_tensors(options),
        _for_each([_on_host(each.grad_factor) for each in options], 1.0),
        _for_each([_on_host(each.found_inf) for each in options], 0.0),
        local_sq_norms,
        hyperparameters=[
            number for each in options for number in held_numbers(_hyperparameters(each))
        ],
        seeds=[each.seed for each in options],
    )
    _increment_version(params)


def _sq_norms_of_all(steps: list[BucketStep]) -> list[Tensor]:
    """Return the sums over the priority scopes as the operator takes them: none, or all."""
    if all(step.sq_norm is None for step in steps):
        return []
    return [
        over_scope(sq_norms(step.bucket, step.options), step.options)
        if step.sq_norm is None
        else step.sq_norm
        for step in steps
    ]


def _for_each(scalars: list[Tensor | None], otherwise: float) -> list[Tensor]:
    """Return scalars of several buckets as the operators take them: none, or one for each.

    Args:
        scalars: Those that are given, else None.
        otherwise: What None means.
    """
    given = [scalar for scalar in scalars if scalar is not None]
    if len(given) in (0, len(scalars)):
        return given
    default = torch.tensor(otherwise, dtype=torch.float64, device="cpu")
    return [default if scalar is None else scalar for scalar in scalars]


def _lr_tensors(options: list[StepOptions]) -> list[Tensor]:
    if not [each for each in options if isinstance(each.lr, Tensor)]:
        return []
    cpu = torch.device("cpu")
    return [
        each.lr.to(cpu, torch.float64)
        if isinstance(each.lr, Tensor)
        else lr_as_tensor(each.lr, cpu)
        for each in options
    ]


def _adam_cm_(step: BucketStep, local_sq_norms: Tensor | None) -> None:
    bucket, options, _, sq_norm = step
    torch.ops.cm_fused.adam_cm_(
        *_momenta_and_buffers(bucket),
        bucket.pending_slots,
        bucket.steps,
        *bucket.low_precision_state(),
        *_scalars(sq_norm, options),
        local_sq_norms,
        **_hyperparameters(options),
    )
    _increment_version(bucket.params)


def _adam_cg_(step: BucketStep) -> None:
    bucket, options, _, sq_norm = step
    torch.ops.cm_fused.adam_cg_(
        *_momenta_and_buffers(bucket),
        bucket.steps,
        *bucket.low_precision_state(),
        *_scalars(sq_norm, options),
        **_hyperparameters(options),
    )
    _increment_version(bucket.params)


def sq_norms(bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of each of the bucket's gradients, float64 (params,)."""
    result: Tensor = torch.ops.cm_fused.sq_norms(
        bucket.params,
        bucket.grads,
        _on_host(options.grad_factor),
        weight_decay=0.0 if options.l2_in_aggregate else options.weight_decay,
        maximize=options.maximize,
        decoupled_weight_decay=options.decoupled_weight_decay,
    )
    return result


def commit_(
    exp_avgs: list[Tensor],
    critical_buffers: list[Tensor],
    critical_sums: list[Tensor],
    pending_slots: list[Tensor],
    critical_scales: list[Tensor],
    exp_avg_scales: list[Tensor],
) -> None:
    """Copy each momentum to its pending slot, where it has one, and follow with the running sum.

    Args:
        exp_avgs: The momenta; not changed.
        critical_buffers: The slots, (C, *shape). Changed.
        critical_sums: The running sums, or an empty list. Changed.
        pending_slots: The slots to copy to, int64 (). Changed to -1.
        critical_scales: The scales of the slots, or an empty list. Changed.
        exp_avg_scales: The scales of the momenta, or an empty list.
    """
    torch.ops.cm_fused.commit_(
        exp_avgs, critical_buffers, critical_sums, pending_slots, critical_scales, exp_avg_scales
    )


def capability() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "default"."""
    return str(torch.ops.cm_fused.cpu_capability())


def _increment_version(params: list[Tensor]) -> None:
    """Tell autograd that the parameters changed, as in-place operators of torch do."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(params)


def _momenta_and_buffers(bucket: Bucket) -> tuple[list[Tensor], ...]:
    """Return the lists that the operators of both steps begin with."""
    return (
        bucket.params,
        bucket.grads,
        bucket.exp_avgs,
        bucket.exp_avg_sqs,
        bucket.max_exp_avg_sqs,
        bucket.critical_buffers,
        bucket.critical_sums,
        bucket.priorities,
    )


def _on_host(scalar: Tensor | None) -> Tensor | None:
    """Return a scalar as the operators take it."""
    return None if scalar is None else scalar.to("cpu", torch.float64)


def _scalars(sq_norm: Tensor | None, options: StepOptions) -> tuple[Tensor | None, ...]:
    return sq_norm, _lr_tensor(options), _on_host(options.grad_factor), _on_host(options.found_inf)


def _lr_tensor(options: StepOptions) -> Tensor | None:
    if isinstance(options.lr, Tensor):
        return _on_host(options.lr)
    if not _lr_is_in_a_tensor(options):
        return None
    return lr_as_tensor(options.lr, torch.device("cpu"))


def lr_as_tensor(lr: float, device: torch.device) -> Tensor:
    """Return a number in a tensor that torch.compile keeps a number: it traces products of such."""
    return torch.ones((), dtype=torch.float64, device=device) * lr


def _lr_is_in_a_tensor(options: StepOptions) -> bool:
    # A number would be compiled in: every step of a scheduler would be compiled anew.
    return isinstance(options.lr, Tensor) or torch.compiler.is_compiling()


def _hyperparameters(options: StepOptions) -> dict[str, float | bool]:
    return {
        "lr": 0.0 if _lr_is_in_a_tensor(options) else float(options.lr),
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
        "seed": options.seed,
        "l2_in_aggregate": options.l2_in_aggregate,
        "sum_of_norms": options.sum_of_norms,
    }


def held_numbers(hyperparameters: Mapping[str, Any]) -> list[float]:
    """Return hyperparameters as the operators of held states take them.

    Args:
        hyperparameters: By the names of `adam_cm_`'s schema.
    """
    return list(map(float, _in_order(hyperparameters)))


# The order of csrc/cpu/step.h.
_in_order = itemgetter(
    *("lr", "beta1", "beta2", "eps", "weight_decay", "priority_decay"),
    *("group_scope", "mean_over_capacity", "eps_inside_sqrt", "maximize"),
    *("decoupled_weight_decay", "stochastic_update", "l2_in_aggregate", "sum_of_norms"),
)
