"""Norms over priority scopes and for clipping, across the devices and processes of a step."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._backends.select import CPU, EAGER, Backend
from cm_fused._bucket import Bucket, BucketStep, StepOptions
from cm_fused._distributed import Processes, Summing


@dataclass(frozen=True)
class GroupStep:
    """The step of one param group.

    Attributes:
        group: The param group; with one parameter where that is stepped alone.
        options: The hyperparameters.
        critical_gradients: Whether the buffers hold gradients, else momenta.
        buckets: The tensors of each device, with the backend that steps them.
        first: The place of the group's first parameter among the optimizer's.
        count: How many parameters the group has, with those that take no part.
    """

    group: dict[str, Any]
    options: StepOptions
    critical_gradients: bool
    buckets: list[tuple[Backend, Bucket]]
    first: int
    count: int

    def is_alone(self) -> bool:
        """Return whether every priority scope lies within one bucket."""
        return len(self.buckets) < 2 or self.options.priority_scope == "tensor"

    def on_buckets(self, norms: "Norms | None" = None) -> Iterator[tuple[Backend, BucketStep]]:
        """Yield the steps of the buckets, with the norms over their priority scopes if given."""
        for backend, bucket in self.buckets:
            sq_norm = None if norms is None else norms.over_scope(self, bucket)
            yield backend, BucketStep(bucket, self.options, self.critical_gradients, sq_norm)


def by_backend(
    steps: Iterable[tuple[Backend, BucketStep]],
) -> list[tuple[Backend, list[BucketStep]]]:
    """Return what each backend is to do, the reference first, whose steps can be taken back."""
    lists: dict[Backend, list[BucketStep]] = {}
    for backend, step in steps:
        lists.setdefault(backend, []).append(step)
    # The C++ operator may yet fail, with nothing changed; launches that were prepared do not.
    return sorted(lists.items(), key=lambda item: (item[0] is not EAGER, item[0] is not CPU))


def step_all_(steps: Iterable[tuple[Backend, BucketStep]]) -> None:
    """Take the steps of buckets, all of them or none: all is prepared before the first change."""
    prepared = [backend.prepare(of_backend) for backend, of_backend in by_backend(steps)]
    for take_ in prepared:
        take_()


class Norms:
    """The sums of squares of all parameters of an optimizer, added up over processes.

    One small sum whatever the number of groups and tensors: a float64 for each parameter.
    """

    def __init__(
        self,
        steps: list[GroupStep],
        processes: Processes | None,
        sq_norms: Callable[[Backend, list[BucketStep]], list[Tensor]],
    ) -> None:
        """Take the sums of squares of every bucket, and start to add them up.

        Args:
            steps: Those of all groups.
            processes: Where the parameters are sharded.
            sq_norms: Returns those of each bucket's parameters, float64 (params,).
        """
        buckets = chain.from_iterable(step.on_buckets() for step in steps)
        taken = [
            (step.bucket, values)
            for backend, of_backend in by_backend(buckets)
            for step, values in zip(of_backend, sq_norms(backend, of_backend), strict=True)
        ]
        device = processes.device if processes else _home([values.device for _, values in taken])
        total = sum(step.count for step in steps)
        self._values = torch.zeros(total, dtype=torch.float64, device=device)
        for bucket, values in taken:
            self._values.index_copy_(0, bucket.places(device), values.to(device, non_blocking=True))
        self._summing: Summing | None = None
        if processes is not None:
            self._summing = processes.start_sum(self._values.mul_(processes.counted))

    def all(self) -> Tensor:
        """Return them, float64 (params,)."""
        if self._summing is not None:
            self._summing.wait()
            self._summing = None
        return self._values

    def over_scope(self, step: GroupStep, bucket: Bucket) -> Tensor:
        """Return the sums over the priority scopes of a bucket, on its device."""
        values = self.all()
        if step.options.priority_scope == "group":
            values = values[step.first : step.first + step.count]
        else:
            values = values.index_select(0, bucket.places(values.device))
        sq_norm = reference.over_scope(values, step.options)
        return sq_norm.to(bucket.steps[0].device, non_blocking=True)


def _home(devices: list[torch.device]) -> torch.device:
    """Return where to add up: on an accelerator, which is not waited for, or the CPU.

    A CPU among the devices needs the sum, and has to wait for it.
    """
    cpu = torch.device("cpu")
    return next((device for device in devices if device.type == "cpu"), (devices or [cpu])[0])


class PendingBooks:
    """The books of a step whose norms are being added up."""

    def __init__(self, steps: list[GroupStep], norms: Norms) -> None:
        self._steps = steps
        self._norms = norms

    def keep_(self) -> None:
        """Keep them: admit, decay and count the step."""
        buckets = chain.from_iterable(step.on_buckets(self._norms) for step in self._steps)
        for backend, of_backend in by_backend(buckets):
            backend.keep_books_(of_backend)


def scaled(
    steps: list[GroupStep],
    processes: Processes | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[GroupStep]:
    """Return steps that unscale and clip their gradients, and those that are to be skipped marked.

    Args:
        steps: Those of all groups, whose `skipped_steps` are changed.
        processes: Where the parameters are sharded.
        grad_scale: What the gradients were multiplied by (`torch.amp.GradScaler`), or None.
        found_inf: Not 0 where one of them is not finite, or None.
    """
    factor = None if grad_scale is None else _reciprocal(grad_scale)
    steps = [_with_scalars(step, factor, found_inf) for step in steps]
    if not any(map(_needs_norm, steps)):
        return steps
    norm = Norms(steps, processes, _plain_sq_norms).all().sum().sqrt()
    return [_clipped(step, norm, factor, found_inf) for step in steps]


def _needs_norm(step: GroupStep) -> bool:
    return step.group["max_grad_norm"] is not None or bool(step.group["skip_nonfinite"])


def _reciprocal(grad_scale: Tensor) -> Tensor:
    """Return what unscales, rounded as `torch.amp.GradScaler` rounds it."""
    return grad_scale.to(torch.float64).reciprocal().to(torch.float32).to(torch.float64).reshape(())


def _plain_sq_norms(backend: Backend, steps: list[BucketStep]) -> list[Tensor]:
    """Return the sums of squares of the gradients themselves, unscaled."""
    return [
        backend.sq_norms(step.bucket, replace(step.options, weight_decay=0.0, maximize=False))
        for step in steps
    ]


def _clipped(
    step: GroupStep, norm: Tensor, factor: Tensor | None, found_inf: Tensor | None
) -> GroupStep:
    group = step.group
    max_grad_norm = group["max_grad_norm"]
    if max_grad_norm is not None:
        # As torch.nn.utils.clip_grad_norm_.
        coefficient = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        factor = coefficient if factor is None else factor.to(norm.device) * coefficient
    if group["skip_nonfinite"]:
        skipped = (~torch.isfinite(norm)).to(torch.float64)
        # One tensor for good: a captured graph goes on adding to it.
        count = group.get("skipped_steps")
        if count is None:
            count = torch.zeros((), dtype=torch.int64, device=norm.device)
        elif not isinstance(count, Tensor):
            count = torch.tensor(count, device=norm.device)
        count = count.to(norm.device)
        group["skipped_steps"] = count.add_(skipped.to(count.dtype))
        found_inf = skipped if found_inf is None else found_inf.to(norm.device) + skipped
    return _with_scalars(step, factor, found_inf)


def _with_scalars(step: GroupStep, factor: Tensor | None, found_inf: Tensor | None) -> GroupStep:
    if factor is None and found_inf is None:
        return step
    if found_inf is not None:
        found_inf = found_inf.to(torch.float64).reshape(())
    options = replace(step.options, grad_factor=factor, found_inf=found_inf)
    return replace(step, options=options)
