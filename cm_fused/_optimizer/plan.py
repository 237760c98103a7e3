"""The plan of a step: what it holds and how it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm_fused._backends import traced
from cm_fused._backends.flush import as_real
from cm_fused._backends.select import EAGER, Backend
from cm_fused._bucket import Batch, Bucket, StepOptions
from cm_fused._distributed import local, local_grad

Groups = list[dict[str, Any]]


def needs_norm(group: Mapping[str, Any]) -> bool:
    """Return whether a step of a group needs the norm of all gradients."""
    return group["max_grad_norm"] is not None or bool(group["skip_nonfinite"])


class Member(NamedTuple):
    """The parameters of one group, device and backend that take part in a step."""

    group: int  # the index of the group
    backend: Backend  # the one that steps them
    params: list[Tensor]
    indices: list[int]  # theirs among the optimizer's parameters


@dataclass(eq=False)
class Plan:
    """The buckets of a step, with the backends that step them."""

    params: list[Tensor]  # those that take part, in the order of the groups
    buckets: list[Bucket]  # those of every group and device, in the order of the groups
    # The same buckets by backend: the reference first, whose steps can be undone, then the C++
    # operator, which may yet fail with nothing changed.
    batches: list[tuple[Backend, Batch]]
    orders: list[list[int] | None]  # each batch's positions in `params`; None: all, in order
    spans: list[tuple[int, int]]  # each group's first index among the optimizer's, and its size
    # Those with buffers, of groups that have several buckets: their norms are added up.
    divided: list[Bucket]
    local_params: list[Tensor] | None = None  # those of `params`, where some are DTensors
    # The dtypes of `params`, where the state depends on them besides the gradients.
    dtypes: list[torch.dtype] | None = None
    # Complex tensors with their views as pairs of reals, which do not follow a replaced `.data`.
    views: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    batches_number: int = -1  # of the optimizer's `traced.Batches`
    # By group, what `take_options` gave the buckets; None where `norms.scale_` has replaced it.
    options: list[StepOptions] | None = None
    # This step's factor of the gradients and mark of a skipped step, by group.
    scalars: list[tuple[Tensor | None, Tensor | None]] | None = None
    # This step's sums of squares of all of the optimizer's parameters over processes, float64
    # (params,), and its norm before clipping, float64 (); None where they were not needed.
    sums: Tensor | None = None
    norm: Tensor | None = None

    def __post_init__(self) -> None:
        # Without these `is_current` has nothing to compare.
        self.is_plain = self.local_params is None and self.dtypes is None and not self.views
        # One operator takes the whole step, and checks all its lists before the first change.
        self.checks_itself = len(self.batches) <= 1 and all(
            backend.checks_lists for backend, _ in self.batches
        )
        self.has_eager = any(backend is EAGER for backend, _ in self.batches)
        self.is_traced = torch.compiler.is_compiling()

    def eager_buckets(self) -> list[Bucket]:
        """Return the buckets that the reference steps."""
        return [b for backend, batch in self.batches if backend is EAGER for b in batch.buckets]

    def is_current(self) -> bool:
        """Return whether the plan's tensors are still those of the parameters."""
        return (
            (self.local_params is None or all(map(is_, map(local, self.params), self.local_params)))
            and (self.dtypes is None or self.dtypes == [param.dtype for param in self.params])
            and all(map(_is_view_of, self.views))
        )

    def run_(self) -> None:
        """Take the step of all batches: all is prepared before the first change."""
        if len(self.batches) == 1 and not self.is_traced:
            ((backend, batch),) = self.batches
            backend.prepare(batch)()
            return
        prepared = [
            traced.prepare(backend, batch, self.batches_number)
            if self.is_traced
            else backend.prepare(batch)
            for backend, batch in self.batches
        ]
        for take_ in prepared:
            take_()

    def take_gradients(self, grads: list[Tensor]) -> None:
        """Give the batches this step's gradients, those of `params`."""
        if self.local_params is not None:
            grads = list(map(local_grad, self.params))
        if self.views:
            # Autograd leaves the conjugation of a complex gradient to whoever reads it.
            grads = [as_real(grad.resolve_conj()) if grad.is_complex() else grad for grad in grads]
        for (_, batch), order in zip(self.batches, self.orders, strict=True):
            batch.grads = grads if order is None else [grads[i] for i in order]

    def take_options(self, options: list[StepOptions]) -> None:
        """Give the buckets this step's options, by group."""
        if options is self.options:
            return
        for bucket in self.buckets:
            bucket.options = options[bucket.group]
        self.options, self.scalars = options, None


def _is_view_of(pair: tuple[Tensor, Tensor]) -> bool:
    """Return whether a view as pairs of reals is still that of its complex tensor."""
    source, view = pair
    same_memory = source.data_ptr() == view.data_ptr() and source.shape == view.shape[:-1]
    strides = tuple(2 * stride for stride in source.stride())
    return same_memory and strides == view.stride()[:-1] and not source.is_conj()


def view_as_real_(buckets: list[Bucket]) -> list[tuple[Tensor, Tensor]]:
    """Put views as pairs of reals in the place of a bucket's complex tensors; return both."""
    views = []
    for bucket in buckets:
        for tensors in (bucket.params, *bucket.state.values()):
            for i, tensor in enumerate(tensors):
                if tensor.is_complex():
                    tensors[i] = as_real(tensor)
                    views.append((tensor, tensors[i]))
    return views
