"""The C++ CPU step: typed wrappers over the operators of `cm_fused._C`.

The momentum of a step is admitted when the step's gradient norm is known, after the pass that read
the gradient. The copy into its slot is deferred to the next pass, which reads the momentum anyway;
`flush_` makes it at once, for code that reads the slots.
"""

from collections.abc import Callable
from functools import partial
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from cm_fused._backends import library
from cm_fused._bucket import Batch, Bucket, StepOptions, hyperparameters, over_scope
from cm_fused._state.table import State, mask_of
from cm_fused.rounding import join_master

unavailable_reason = library.unavailable_reason
_CPU = torch.device("cpu")


class _Scalars(NamedTuple):
    """The scalars of a batch's step as the operators take them; lists are empty or full."""

    lrs: list[Tensor]
    grad_factors: list[Tensor]
    found_infs: list[Tensor]
    numbers: list[float]
    seeds: list[int]


class _Registered:
    """The buckets of a batch, registered with the library, and the scalars of the last step."""

    def __init__(self, batch: Batch) -> None:
        # They are released with this.
        self._states = [
            library.RegisteredState(b.state, b.param_indices, b.shard_layouts)
            for b in batch.buckets
        ]
        self.ids = [state.id for state in self._states]
        self.options: list[StepOptions] = []
        self.scalars = _Scalars([], [], [], [], [])


def register(batch: Batch) -> None:
    """Register the state of a batch: lists of small tensors cost more to pass than to step."""
    batch.registered = _Registered(batch)


def prepare(batch: Batch) -> Callable[[], None]:
    """Return what takes the step of a batch: all of it, or nothing where it raises.

    It is that of `cm_fused.reference`; of critical momenta the commit is deferred to the next.
    """
    return partial(_step_, batch, None)


def update_(batch: Batch) -> list[Tensor]:
    """Step critical momenta without their priorities; return each gradient's sum of squares."""
    # Nobody reads those of a skipped step.
    sq_norms = torch.zeros(len(batch.params), dtype=torch.float64, device=_CPU)
    _step_(batch, sq_norms)
    return list(torch.split(sq_norms, [len(bucket.params) for bucket in batch.buckets]))


def update_priorities_(batch: Batch) -> None:
    """Update the priorities that `update_` left: all of them, or none where it raises."""
    torch.ops.cm_fused.update_registered_priorities_.default(
        batch.registered.ids,
        [bucket.sq_norm for bucket in batch.buckets],
        _scalars(batch).found_infs,
        priority_decays=[bucket.options.priority_decay for bucket in batch.buckets],
    )


def last_sq_norms(batch: Batch) -> list[Tensor]:
    """Return what the sums of squares of the last step's gradients add up from; NaN if unknown."""
    return [torch.ops.cm_fused.last_sq_norms(batch.registered.ids)]


def _step_(batch: Batch, local_sq_norms: Tensor | None) -> None:
    scalars = _scalars(batch)
    torch.ops.cm_fused.step_registered_.default(
        batch.registered.ids,
        batch.params,
        batch.grads,
        _sq_norms(batch),
        scalars.lrs,
        scalars.grad_factors,
        scalars.found_infs,
        local_sq_norms,
        hyperparameters=scalars.numbers,
        seeds=scalars.seeds,
    )
    torch.autograd.graph.increment_version(batch.params)


def _scalars(batch: Batch) -> _Scalars:
    """Return the scalars of a step: the last one's, where no option has changed."""
    registered: _Registered = batch.registered
    options = [bucket.options for bucket in batch.buckets]
    last = registered.options
    if len(last) == len(options) and all(map(is_, options, last)):
        return registered.scalars
    scalars = _Scalars(
        _lrs(options),
        _for_each([each.grad_factor for each in options], 1.0),
        _for_each([each.found_inf for each in options], 0.0),
        [number for bucket in batch.buckets for number in _numbers(bucket)],
        [each.seed for each in options],
    )
    # A tensor's value may change in place.
    has_tensors = scalars.lrs or scalars.grad_factors or scalars.found_infs
    registered.options = [] if has_tensors else options
    registered.scalars = scalars
    return scalars


def _numbers(bucket: Bucket) -> list[float]:
    numbers = hyperparameters(bucket.options, critical_gradients=bucket.critical_gradients)
    return list(map(float, numbers.values()))


def _lrs(options: list[StepOptions]) -> list[Tensor]:
    if not any(isinstance(each.lr, Tensor) for each in options):
        return []
    return [torch.as_tensor(each.lr, dtype=torch.float64, device=_CPU) for each in options]


def _for_each(scalars: list[Tensor | None], otherwise: float) -> list[Tensor]:
    """Return scalars of several buckets as the operators take them: none, or one for each."""
    if all(scalar is None for scalar in scalars):
        return []
    default = torch.tensor(otherwise, dtype=torch.float64, device=_CPU)
    return [default if s is None else s.to(_CPU, torch.float64) for s in scalars]


def _sq_norms(batch: Batch) -> list[Tensor]:
    """Return the sums over the priority scopes as the operator takes them: none, or all."""
    buckets = batch.buckets
    given = [bucket.sq_norm for bucket in buckets if bucket.sq_norm is not None]
    if not given or len(given) == len(buckets):
        return given
    batch.split_gradients()
    return [
        over_scope(sq_norms(bucket, bucket.options), bucket.options)
        if bucket.sq_norm is None
        else bucket.sq_norm
        for bucket in buckets
    ]


def sq_norms(bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of each of the bucket's gradients, float64 (params,)."""
    factor = options.grad_factor
    weight_decay = 0.0 if options.l2_in_aggregate else options.weight_decay
    params, grads = bucket.params, bucket.grads
    if bucket["master_remainder"] and weight_decay != 0 and not options.decoupled_weight_decay:
        params, grads = _with_masters(bucket)
    result: Tensor = torch.ops.cm_fused.sq_norms(
        params,
        grads,
        None if factor is None else factor.to(_CPU, torch.float64),
        weight_decay=weight_decay,
        maximize=options.maximize,
        decoupled_weight_decay=options.decoupled_weight_decay,
    )
    return result


def _with_masters(bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
    """Return parameters and gradients, copies in float32 of those that have masters."""
    params, grads = list(bucket.params), list(bucket.grads)
    for i, (param, remainder) in enumerate(zip(params, bucket["master_remainder"], strict=True)):
        if param.dtype is torch.bfloat16:
            params[i], grads[i] = join_master(param, remainder), grads[i].to(torch.float32)
    return params, grads


def flush_(states: list[State]) -> None:
    """Make the deferred commits of local states of real tensors, all of them or none.

    Each has an `exp_avg`, a `critical_buffer` and a `pending_slot`, which becomes -1.
    """
    keys = ("exp_avg", "critical_buffer", "critical_sum", "critical_scales", "exp_avg_scales")
    batches: dict[int, list[State]] = {}
    for state in states:
        local = {key: state[key] for key in (*keys, "pending_slot") if key in state}
        batches.setdefault(mask_of(local), []).append(local)
    registered = [
        library.RegisteredState({key: [state[key] for state in batch] for key in batch[0]})
        for batch in batches.values()
    ]
    torch.ops.cm_fused.flush_registered_([each.id for each in registered])


def capability() -> str:
    """Return the instruction set in use: "avx512", "avx2" or "default"."""
    return str(torch.ops.cm_fused.cpu_capability())
