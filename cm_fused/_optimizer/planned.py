"""Checks parameters and gradients, and makes the state and the buckets of a plan."""

import contextlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cm_fused._backends.capture import check_not_capturing
from cm_fused._backends.flush import drop_derived
from cm_fused._backends.select import Backend
from cm_fused._bucket import Bucket
from cm_fused._distributed import is_sharded, local, local_state, shard_layout_of
from cm_fused._optimizer import tensor_checks
from cm_fused._optimizer.checkpointed import CheckpointedOptimizer
from cm_fused._optimizer.plan import Groups, Member, Plan
from cm_fused._optimizer.plan_cache import Plans
from cm_fused._state.making import check_param, missing_state_of
from cm_fused._state.table import State, fused_keys, option_dtype, required_keys


class PlannedOptimizer(CheckpointedOptimizer):
    """An optimizer that can prepare a step, and undo that; it takes none."""

    def _check(self, groups: Groups, cached: Plan | None) -> None:
        """Check all gradients, and parameters against the state of a cached plan."""
        for i, group in enumerate(groups):
            # FSDP1 may have wrapped the model since the group was added.
            tensor_checks.check_not_flattened(i, group)
            tensor_checks.check_gradients(i, group["params"])
            if cached is None:
                tensor_checks.check_wrappers(i, group)
            if cached is None and group["capturable"]:
                tensor_checks.check_capturable([p for p in group["params"] if p.grad is not None])
        if cached is None:
            tensor_checks.check_no_duplicates(groups)
        else:
            for param in cached.params:
                self._check_state(param)

    def _check_state(self, param: Tensor) -> None:
        with self._naming(param):
            check_param(local(param), local_state(self.state[param]))

    def _new_plan(
        self, plans: Plans, groups: Groups, first: int, new_state: list[tuple[Tensor, State]]
    ) -> Plan:
        """Return a plan of the step that `plans` has read, with its gradients and options.

        New state is added to `new_state`, for `_remove_new_state`; `first` is as of `_take_step`.
        """
        self._check(groups, None)
        members = plans.members(groups, first)
        new_state.extend(self._make_state(members, groups))
        buckets = [self._bucket(member, groups[member.group]) for member in members]
        return plans.new_plan(members, buckets, groups)

    def _make_state(self, members: list[Member], groups: Groups) -> list[tuple[Tensor, State]]:
        """Make the missing state of all parameters that take part, or none; return what is new."""
        missing = []
        for member in members:
            group = groups[member.group]
            keys = self._state_keys(group, member.backend)
            for param in member.params:
                with self._naming(param):
                    state = self.state.get(param, {})
                    missing.append((param, missing_state_of(param, state, keys, group)))
        new_state = [(param, tensors) for param, tensors in missing if tensors]
        for param, _ in new_state:
            check_not_capturing(param.device)
        for param, tensors in new_state:
            self.state[param].update(tensors)
        return new_state

    @contextlib.contextmanager
    def _naming(self, param: Tensor) -> Iterator[None]:
        """Add the parameter's name to an error about it."""
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError:  # running out of a device's memory, for one
                raise
            raise RuntimeError(f"{self._name_of(param)}: {error}") from error

    def _name_of(self, param: Tensor) -> str:
        """Return which parameter of which group it is, with their names if they have some."""
        for i, group in enumerate(self.param_groups):
            for j, member in enumerate(group["params"]):
                if member is param:
                    names = [group["name"]] if "name" in group else []
                    names += group.get("param_names", [])[j : j + 1]
                    name = f" ({', '.join(map(repr, names))})" if names else ""
                    return f"parameter {j} of group {i}{name}"
        return "a parameter of no group"

    def _remove_new_state(self, new_state: list[tuple[Tensor, State]]) -> None:
        """Remove what `_make_state` made and no step has used, after one that failed."""
        for param, tensors in new_state:
            if "step" in tensors and not local(tensors["step"]) > 0:
                self._drop_state(param, tensors)

    def _drop_state(self, param: Tensor, keys: Iterable[str]) -> None:
        """Remove some keys of a parameter's state, and the state when it is empty."""
        for key in keys:
            self.state[param].pop(key, None)
        if not self.state[param]:
            del self.state[param]

    def _stores_gradients(self, group: dict[str, Any]) -> bool:
        """Return whether the buffers of a group hold gradients; else they hold momenta."""
        return self._critical_gradients

    def _state_keys(self, group: dict[str, Any], backend: Backend) -> tuple[str, ...]:
        keys = required_keys(group)
        if backend.is_fused:
            keys += fused_keys(group, critical_gradients=self._stores_gradients(group))
        return keys

    def _bucket(self, member: Member, group: dict[str, Any]) -> Bucket:
        """Return the bucket of a member, all of whose state must have been made."""
        keys = self._state_keys(group, member.backend)
        drop_derived([self.state[param] for param in member.params], keys)
        states = [local_state(self.state[param]) for param in member.params]
        lists = {key: [state[key] for state in states] for key in keys}
        return Bucket(
            [local(param) for param in member.params],
            [],
            lists,
            member.indices,
            _shard_layouts(member.params, lists["exp_avg"], group),
            self._stores_gradients(group),
            group=member.group,
        )


def _shard_layouts(
    params: list[Tensor], exp_avgs: list[Tensor], group: dict[str, Any]
) -> list[int]:
    """Return the `shard_layouts` of a bucket; only shards that draw random bits need them."""
    rounds = option_dtype("exp_avg", group) in (torch.bfloat16, torch.int8)
    draws = rounds or group["low_precision_update"] == "stochastic"
    if not (draws and any(map(is_sharded, params))):
        return []
    return list(chain.from_iterable(map(shard_layout_of, params, exp_avgs)))
