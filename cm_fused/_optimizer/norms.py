"""Norms over priority scopes and for clipping, across the devices and processes of a step.

One small sum whatever the number of groups and tensors: a float64 for each parameter of the
optimizer.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cm_fused._backends import traced
from cm_fused._backends.select import Backend
from cm_fused._bucket import Bucket, StepOptions, over_scope
from cm_fused._devices import to_device
from cm_fused._distributed import Processes
from cm_fused._optimizer.plan import Groups, Plan, needs_norm

_OptionsOf = Callable[[Bucket], StepOptions]


def gathered(
    plan: Plan, of_buckets: Iterable[tuple[Bucket, Tensor]], among: Processes | None
) -> Tensor:
    """Return the sums of squares of all of the optimizer's parameters, float64 (params,).

    `of_buckets` has those of each bucket's. What another process of `among` counts is 0.
    """
    pairs = list(of_buckets)
    total = sum(count for _, count in plan.spans)
    device = among.device if among is not None else _home([values.device for _, values in pairs])
    if len(pairs) == 1 and len(pairs[0][1]) == total:
        sums = to_device(pairs[0][1], device)
    else:
        sums = torch.zeros(total, dtype=torch.float64, device=device)
        for bucket, values in pairs:
            sums.index_copy_(0, bucket.indices_on(device), to_device(values, device))
    return sums if among is None else sums.mul_(among.counted)


def _home(devices: list[torch.device]) -> torch.device:
    """Return where to add up: on an accelerator, which is not waited for, unless there is a CPU.

    A CPU needs the sum, and has to wait for it.
    """
    cpu = torch.device("cpu")
    return next((device for device in devices if device.type == "cpu"), (devices or [cpu])[0])


def set_sq_norms(plan: Plan, sums: Tensor) -> None:
    """Give every bucket the sums over its priority scope, from `gathered` sums over processes."""
    for bucket in plan.buckets:
        first, count = plan.spans[bucket.group]
        if bucket.options.priority_scope == "group":
            values = sums[first : first + count]
        else:
            values = sums.index_select(0, bucket.indices_on(sums.device))
        sq_norm = over_scope(values, bucket.options)
        bucket.sq_norm = to_device(sq_norm, bucket.device)


def clear_sq_norms(plan: Plan) -> None:
    """Leave the sums over the priority scopes to the backends."""
    for bucket in plan.buckets:
        bucket.sq_norm = None


def set_scope_norms(plan: Plan, among: Processes | None) -> None:
    """Give the buckets the sums over their priority scopes, where those have more than a bucket."""
    if among is None and not any(b.options.priority_scope == "group" for b in plan.divided):
        if plan.divided:
            clear_sq_norms(plan)
        return
    plan.sums = sums = gathered(plan, sq_norms_of_buckets(plan), among)
    if among is not None:
        among.start_sum(sums).wait()
    set_sq_norms(plan, sums)


def last_norm(plans: list[Plan]) -> Tensor:
    """Return the norm of the gradients of the last steps by these plans, float64 (); NaN for none.

    Nothing is waited for, unless one of several devices is the CPU.
    """
    norms = [plan.norm for plan in plans if plan.norm is not None]
    if norms:  # with clipping or without gradients, which only steps of all parameters have
        return norms[-1].clone()
    sums = [each for plan in plans for each in _last_sums(plan)]
    if not sums:
        return torch.full((), math.nan, dtype=torch.float64, device="cpu")
    home = _home([each.device for each in sums])
    return torch.stack([to_device(each.sum(), home) for each in sums]).sum().sqrt()


def _last_sums(plan: Plan) -> list[Tensor]:
    """Return what the sum of squares of a plan's last gradients adds up from; NaN if skipped."""
    if plan.sums is not None:
        sums = [plan.sums]
    elif plan.local_params is not None or not all(b.finds_norms for b in plan.buckets):
        # Without keys these sums were not found, or not added up over the processes.
        sums = [torch.full((), math.nan, dtype=torch.float64, device="cpu")]
    else:
        sums = [each for backend, batch in plan.batches for each in backend.last_sq_norms(batch)]
    _, found_inf = plan.scalars[0] if plan.scalars else (None, None)
    if found_inf is None:
        return sums
    return [each.masked_fill(to_device(found_inf, each.device) != 0, math.nan) for each in sums]


def update_all_(plan: Plan) -> list[tuple[Bucket, Tensor]]:
    """Step critical momenta without their priorities; return each bucket's `sq_norms`."""
    pairs: list[tuple[Bucket, Tensor]] = []
    for backend, batch in plan.batches:
        pairs += zip(batch.buckets, backend.update_(batch), strict=True)
    return pairs


def sq_norms_of_buckets(
    plan: Plan, options_of: _OptionsOf | None = None, group: int | None = None
) -> list[tuple[Bucket, Tensor]]:
    """Return the sums of squares of each bucket's gradients, float64 (params,) of each.

    `options_of` has the hyperparameters by which they are read, if not the buckets' own. The
    buckets are those of a group by its index, or all.
    """
    pairs = []
    for backend, batch in plan.batches:
        batch.split_gradients()
        for bucket in batch.buckets:
            if group is None or bucket.group == group:
                options = bucket.options if options_of is None else options_of(bucket)
                pairs.append((bucket, _sq_norms(backend, bucket, options)))
    return pairs


def _sq_norms(backend: Backend, bucket: Bucket, options: StepOptions) -> Tensor:
    if torch.compiler.is_compiling():
        return traced.sq_norms(backend.name, bucket, options)
    return backend.sq_norms(bucket, options)


def scale_(
    plan: Plan,
    groups: Groups,
    among: Processes | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    counts: list["SkippedSteps"],
) -> None:
    """Unscale and clip the gradients of a step by its buckets' options, and mark what is skipped.

    The gradients were multiplied by `grad_scale` (`torch.amp.GradScaler`); `found_inf` is not 0
    where one is not finite. The groups' `skipped_steps` are changed; `counts` gets those of before,
    to restore them after an error.
    """
    unscale = None if grad_scale is None else _reciprocal(grad_scale)
    if found_inf is not None:
        found_inf = found_inf.to(torch.float64).reshape(())
    scalars = [(unscale, found_inf)] * len(groups)
    if any(map(needs_norm, groups)):
        plan.norm = norm = _total_norm(plan, among, unscale)
        counts += [SkippedSteps(group) for group in groups if group["skip_nonfinite"]]
        scalars = _clip_(groups, norm, unscale, found_inf)
    plan.options, plan.scalars = None, scalars
    for bucket in plan.buckets:
        factor, found = scalars[bucket.group]
        bucket.options = bucket.options._replace(grad_factor=factor, found_inf=found)


def _reciprocal(grad_scale: Tensor) -> Tensor:
    """Return what unscales, rounded as `torch.amp.GradScaler` rounds it."""
    return grad_scale.to(torch.float64).reciprocal().to(torch.float32).to(torch.float64).reshape(())


def _total_norm(plan: Plan, among: Processes | None, unscale: Tensor | None) -> Tensor:
    """Return the norm of all gradients, unscaled, float64 ()."""

    def plain(bucket: Bucket) -> StepOptions:
        return bucket.options._replace(weight_decay=0.0, maximize=False, grad_factor=unscale)

    sums = gathered(plan, sq_norms_of_buckets(plan, plain), among)
    if among is not None:
        among.start_sum(sums).wait()
    return sums.sum().sqrt()


def _clip_(
    groups: Groups, norm: Tensor, unscale: Tensor | None, found_inf: Tensor | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return each group's factor and mark, and count the step where it is to be skipped."""
    limits = {group["max_grad_norm"] for group in groups}
    factors = {limit: _clip_factor(norm, limit, unscale) for limit in limits}
    marks = {False: found_inf}
    skipping = [group for group in groups if group["skip_nonfinite"]]
    if skipping:
        skipped = ~torch.isfinite(norm)
        mark = skipped.to(torch.float64)
        marks[True] = mark if found_inf is None else found_inf.to(norm.device) + mark
    for group in skipping:
        # One tensor for good: a captured graph goes on adding to it.
        group["skipped_steps"] = _count_on(norm.device, group.get("skipped_steps", 0)).add_(skipped)
    return [
        (factors[group["max_grad_norm"]], marks[bool(group["skip_nonfinite"])]) for group in groups
    ]


def _clip_factor(norm: Tensor, limit: float | None, unscale: Tensor | None) -> Tensor | None:
    """Return what clips gradients as torch.nn.utils.clip_grad_norm_ does, and unscales them."""
    if limit is None:
        return unscale
    coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
    return coefficient if unscale is None else unscale.to(norm.device) * coefficient


def _count_on(device: torch.device, count: Any) -> Tensor:
    """Return a count on a device, itself where it is there; no accelerator is waited for."""
    if isinstance(count, Tensor) and (count.device.type != "cpu" or device.type == "cpu"):
        return count.to(device)
    return torch.full((), int(count), dtype=torch.int64, device=device)


class SkippedSteps:
    """A group's count of skipped steps before a step."""

    def __init__(self, group: dict[str, Any]) -> None:
        self._group = group
        self._count: Any = group.get("skipped_steps")
        self._before: Any = self._count.clone() if isinstance(self._count, Tensor) else self._count

    def restore(self) -> None:
        """Give the group the count it had; allocates nothing."""
        if self._count is None:
            self._group.pop("skipped_steps", None)
        elif isinstance(self._count, Tensor):
            self._group["skipped_steps"] = self._count.copy_(self._before)
        else:
            self._group["skipped_steps"] = self._count
