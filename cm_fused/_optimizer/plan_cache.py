"""The plans of an optimizer's last steps: who takes part in one, and when one is used again."""

from collections import Counter
from collections.abc import Set
from itertools import accumulate
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from cm_fused._backends.select import CPU, EAGER, Backend, select_for
from cm_fused._bucket import (
    Batch,
    Bucket,
    StepOptions,
    is_adjusted_on_device,
    step_options,
)
from cm_fused._distributed import Processes, is_sharded, is_wrapper, local, processes
from cm_fused._optimizer.checks import (
    CHECKED_NUMBERS,
    check_choices,
    check_flags,
    check_lrs,
    check_numbers,
)
from cm_fused._optimizer.plan import Groups, Member, Plan, needs_norm, view_as_real_
from cm_fused._state.table import DTYPE_OPTIONS
from cm_fused._state.tracking import OptimizerState

# The options that decide which tensors a step needs and which backend steps them, and the other
# ones with few values. They come first in `_options_of`: when one of them changes, they are checked
# and all plans are made anew.
_REPLANNED = (
    *("amsgrad", "capacity", "backend", "fused", "capturable"),
    *DTYPE_OPTIONS,
    "low_precision_update",
    *("priority_scope", "buffer_mean", "adjust_lr_fn"),
)
# When one of these changes they are checked, and the plans stay.
_CHECKED = (
    *CHECKED_NUMBERS,
    *("eps_inside_sqrt", "maximize", "decoupled_weight_decay", "skip_nonfinite"),
)
_options_of = itemgetter(*_REPLANNED, *_CHECKED, "betas")
_lr_of = itemgetter("lr")
_params_of = itemgetter("params")
# How many plans are cached, one for each set of parameters with gradients. It is enough for the
# experts of a mixture, or two networks trained in turn; more would cost the memory of their lists.
_MAX_PLANS = 16


class Plans:
    """The plans of an optimizer's last steps, and what they were made for."""

    def __init__(self) -> None:
        self.params: list[Tensor] = []  # those of all groups at the last step
        self.grads: list[Tensor | None] = []  # None where a parameter takes no part
        self.sizes: list[int] = []  # the number of parameters of each group
        self.options: list[StepOptions] = []  # those of each group
        self.needs_norm = False  # whether a step needs the norm of all gradients
        self.processes: Processes | None = None  # those that the parameters are sharded among
        self.on_gpu = False  # whether a parameter is on a CUDA device
        self.last: Plan | None = None  # that of the last step
        self._plans: dict[tuple[bool, ...], Plan] = {}
        self._values: list[tuple[Any, ...]] | None = None
        self._replanned: list[tuple[Any, ...]] = []
        self._checked: list[tuple[Any, ...]] = []
        self._lrs: list[float | Tensor] = []
        self._state: Any = None
        self._changes = -1
        self.kinds: list[bool] = []  # for `cm_fused.compat`: what each group's buffers store
        self._key: tuple[bool, ...] = ()

    def find(self, groups: Groups, state: Any, waiting: Set[int] = frozenset()) -> Plan | None:
        """Return the cached plan of this step, with its gradients and options, or None.

        `waiting` has the ids of parameters that take no part although they have gradients.
        """
        params = [param for group in groups for param in group["params"]]
        self._read_gradients(params, waiting)
        self._read_params(params, list(map(len, map(_params_of, groups))))
        self._read_options(groups)
        if state is not self._state or state.changes.count != self._changes:
            self._plans.clear()
        self._key = tuple([grad is not None for grad in self.grads])
        plan = self._plans.get(self._key)
        if plan is None or not (plan.is_plain or plan.is_current()):
            return None
        self._begin(plan)
        return plan

    def read(self, groups: Groups, waiting: Set[int] = frozenset()) -> None:
        """Read what `find` reads, by code that torch.compile can trace; the arguments are its."""
        self.params = [param for group in groups for param in group["params"]]
        self._read_gradients(self.params, waiting)
        self.sizes = [len(group["params"]) for group in groups]
        for group in groups:
            check_choices(group)
            check_numbers(group)
            check_flags(group)
        self.options = [step_options(group) for group in groups]
        self.needs_norm = any(needs_norm(group) for group in groups)

    def _read_gradients(self, params: list[Tensor], waiting: Set[int]) -> None:
        self.grads = [param.grad for param in params]
        if waiting:
            pairs = zip(params, self.grads, strict=True)
            self.grads = [None if id(param) in waiting else grad for param, grad in pairs]

    def _begin(self, plan: Plan) -> None:
        """Give a plan this step's gradients and options."""
        plan.take_gradients([grad for grad in self.grads if grad is not None])
        plan.take_options(self.options)

    def forget(self) -> None:
        """Forget the plans."""
        self._plans.clear()

    def drop_gradients(self, plan: Plan | None) -> None:
        """Let go of this step's gradients, which `zero_grad` is to free."""
        self.grads = []
        if plan is not None:
            for _, batch in plan.batches:
                batch.grads = []
                if batch.buckets[0].grads:
                    batch.split_gradients()

    def members(self, groups: Groups, first: int) -> list[Member]:
        """Return the parameters that take part, by group, device and backend.

        `first` is the index of the groups' first parameter among the optimizer's.
        """
        members = []
        start, params = 0, self.params
        for index, (group, size) in enumerate(zip(groups, self.sizes, strict=True)):
            present = [i for i in range(start, start + size) if self.grads[i] is not None]
            start += size
            kinds = {i: (params[i].device, is_wrapper(params[i])) for i in present}
            for kind in dict.fromkeys(kinds.values()):
                chosen = [i for i in present if kinds[i] == kind]
                backend, indices = select_for(group, params[chosen[0]]), [first + i for i in chosen]
                members.append(Member(index, backend, [params[i] for i in chosen], indices))
        return members

    def new_plan(self, members: list[Member], buckets: list[Bucket], groups: Groups) -> Plan:
        """Return a registered plan of these buckets, with this step's gradients and options.

        `buckets` has one for each of `members`, of local tensors.
        """
        by_index = {i: p for m in members for i, p in zip(m.indices, m.params, strict=True)}
        # In the order of the groups, whatever their devices.
        params = [by_index[index] for index in sorted(by_index)]
        positions = {index: position for position, index in enumerate(sorted(by_index))}
        views = view_as_real_(buckets)
        batches, orders = [], []
        for backend in sorted({m.backend for m in members}, key=_rank_of):
            chosen = [b for m, b in zip(members, buckets, strict=True) if m.backend is backend]
            order = [positions[i] for bucket in chosen for i in bucket.param_indices]
            batches.append((backend, Batch(chosen, [p for b in chosen for p in b.params])))
            orders.append(None if order == list(range(len(params))) else order)
        counts = Counter(bucket.group for bucket in buckets)
        compensates = any(group["low_precision_update"] in ("kahan", "split") for group in groups)
        plan = Plan(
            params,
            buckets,
            batches,
            orders,
            list(zip(accumulate(self.sizes[:-1], initial=0), self.sizes, strict=True)),
            divided=[b for b in buckets if counts[b.group] > 1 and b.capacity],
            local_params=list(map(local, params)) if any(map(is_sharded, params)) else None,
            dtypes=[param.dtype for param in params] if compensates else None,
            views=views,
        )
        self._begin(plan)
        if not plan.is_traced:
            for backend, batch in batches:
                backend.register(batch)
        return plan

    def add(self, plan: Plan, state: Any) -> None:
        """Cache a plan for what `find` last read, if the state counts its changes."""
        if not isinstance(state, OptimizerState) or not all(map(state.tracks, plan.params)):
            self._state = None
            return
        if state is not self._state or state.changes.count != self._changes:
            self._plans.clear()
            self._state, self._changes = state, state.changes.count
        self._plans.pop(self._key, None)
        while len(self._plans) >= _MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[self._key] = plan

    def _read_params(self, params: list[Tensor], sizes: list[int]) -> None:
        known = self.params
        if len(params) == len(known) and sizes == self.sizes and all(map(is_, params, known)):
            return
        self._plans.clear()
        # This may raise, after which refused parameters must not be taken for known ones.
        self.processes = processes(params)
        self.params, self.sizes = params, sizes
        self.on_gpu = any(param.is_cuda for param in params)

    def _read_options(self, groups: Groups) -> None:
        values, lrs = list(map(_options_of, groups)), list(map(_lr_of, groups))
        is_known = self._values is not None and values == self._values
        # A learning rate is compared by its identity: a tensor's value may be on a device.
        if is_known and all(map(is_, lrs, self._lrs)):
            return
        # This may raise, after which refused options must not be taken for known ones.
        self._values = None
        if not is_known:  # else a scheduler has changed learning rates
            self._read_replanned(groups, [each[: len(_REPLANNED)] for each in values])
            self._read_checked(
                groups, [each[len(_REPLANNED) :][: len(_CHECKED)] for each in values]
            )
            self.needs_norm = any(map(needs_norm, groups))
        check_lrs(lrs)
        self.options, self._lrs = list(map(step_options, groups)), lrs
        # What may change in place is read at every step.
        immutable = is_known or all(_is_immutable(value) for each in values for value in each)
        immutable = immutable and all(isinstance(lr, (float, int, Tensor)) for lr in lrs)
        if immutable and not any(map(is_adjusted_on_device, groups)):
            self._values = values

    def _read_replanned(self, groups: Groups, values: list[tuple[Any, ...]]) -> None:
        if values == self._replanned:
            return
        for group in groups:
            check_choices(group)
            check_flags(group)
        self._plans.clear()
        self._replanned = values

    def _read_checked(self, groups: Groups, checked: list[tuple[Any, ...]]) -> None:
        if checked == self._checked:
            return
        for group in groups:
            check_numbers(group)
            check_flags(group)
        self._checked = checked


def _is_immutable(value: Any) -> bool:
    """Return whether an option's value cannot change in place."""
    if type(value) is tuple:
        return all(map(_is_immutable, value))
    return value is None or type(value) in (bool, int, float, str, torch.dtype)


def _rank_of(backend: Backend) -> tuple[bool, bool]:
    """Return what sorts backends as `Plan.batches` has them."""
    return backend is not EAGER, backend is not CPU
