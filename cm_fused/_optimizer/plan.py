"""What a step of a param group does, kept for the next step of the same tensors."""

from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from cm_fused._backends.select import Backend
from cm_fused._bucket import Bucket
from cm_fused._distributed import is_sharded, local, local_grad
from cm_fused._state.tracking import OptimizerState


class Plan:
    """The buckets of a group's step, and when they may serve again.

    Attributes:
        buckets: Those of each device, with the backend that steps it.
    """

    def __init__(
        self,
        buckets: list[tuple[Backend, Bucket]],
        params: list[Tensor],
        group: dict[str, Any],
        first: int,
        state: Any,
    ) -> None:
        self.buckets = buckets
        self._params = params
        # The buckets have the places of their parameters among all of the optimizer's.
        self._first = first
        self._group_params = list(group["params"])
        self._options = _deciding_options(group)
        # A compensation is one of the parameter's dtype, which a cast of the model changes.
        compensates = group["low_precision_update"] == "kahan"
        self._dtypes = [param.dtype for param in params] if compensates else None
        self._state = state
        # What this process holds of them, where they are DTensors.
        sharded = any(map(is_sharded, params))
        self._locals = [local(param) for param in params] if sharded else None
        # A complex bucket holds views, which do not follow a replaced `p.data`. A state that is not
        # ours does not count its changes.
        self._lasting = (
            not any(map(torch.is_complex, params))
            and isinstance(state, OptimizerState)
            and all(map(state.counts, params))
        )
        self._changes = state.changes.count if isinstance(state, OptimizerState) else -1

    def holds_for(
        self, state: Any, group: dict[str, Any], first: int, params: list[Tensor]
    ) -> bool:
        """Return whether the plan serves a step.

        Args:
            state: The optimizer's state.
            group: The param group.
            first: The place of its first parameter among the optimizer's.
            params: Its parameters that take part.
        """
        return (
            self._lasting
            and state is self._state
            and state.changes.count == self._changes
            and _deciding_options(group) == self._options
            and first == self._first
            and _same(group["params"], self._group_params)
            # Where all of the group take part, as then, they have been compared.
            and (
                len(params) == len(self._params) == len(self._group_params)
                or _same(params, self._params)
            )
            and (self._locals is None or all(map(is_, map(local, params), self._locals)))
            and (self._dtypes is None or self._dtypes == [param.dtype for param in params])
        )

    def take_gradients(self) -> None:
        """Give the buckets this step's gradients."""
        if self._locals is not None:
            grads = {
                id(held): local_grad(p) for p, held in zip(self._params, self._locals, strict=True)
            }
            for _, bucket in self.buckets:
                bucket.grads = [grads[id(param)] for param in bucket.params]
            return
        for _, bucket in self.buckets:
            bucket.grads = [cast(Tensor, param.grad) for param in bucket.params]

    def drop_gradients(self) -> None:
        """Keep no gradient alive."""
        for _, bucket in self.buckets:
            bucket.grads = []


def _same(params: list[Tensor], others: list[Tensor]) -> bool:
    return len(params) == len(others) and all(map(is_, params, others))


def one_call_checks(plans: list[Plan | None]) -> bool:
    """Return whether one call takes the steps of all plans, and checks all lists before them."""
    backends = set()
    for plan in plans:
        if plan is None:
            return False
        for backend, bucket in plan.buckets:
            if bucket.handle is None or not bucket.handle.checks_lists:
                return False
            backends.add(backend.name)
    return len(backends) <= 1


def _deciding_options(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the options that decide which tensors a step needs and who steps them."""
    names = ("amsgrad", "capacity", "backend", "capturable")
    precisions = ("buffer_dtype", "moment_dtype", "low_precision_update")
    return tuple(group[name] for name in (*names, *precisions))
