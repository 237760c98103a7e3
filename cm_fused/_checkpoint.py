"""Loading a state dict: everything is checked and copied before the optimizer changes."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from cm_fused._checks import check_options
from cm_fused._state import State, missing_state, new_tensor, required_keys

# Keys that hold a tensor of the parameter's shape.
SHAPED_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "critical_sum")
BUFFER_KEYS = ("critical_buffer", "priorities")
# Options of the process, not of the training run: neither saved nor loaded.
LOCAL_OPTIONS = ("backend",)


def saved_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return an optimizer's state, its commits made, in plain dicts without what is not saved."""
    return {
        key: {name: entry for name, entry in value.items() if name != "pending_slot"}
        if isinstance(value, dict)
        else value
        for key, value in state.items()
    }


def saved_form(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Return a state dict, its commits made, without what is not saved; a post hook."""
    return {
        **state_dict,
        "state": saved_state(state_dict["state"]),
        "param_groups": [
            {name: value for name, value in group.items() if name not in LOCAL_OPTIONS}
            for group in state_dict["param_groups"]
        ],
    }


def loaded_groups(
    groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the param groups with saved options over their own; changes neither.

    Raises:
        ValueError: Numbers of groups or parameters differ, or a saved option is out of range.
    """
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"the state dict must have {len(groups)} param groups, got {len(saved_groups)}"
        )
    loaded = []
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"group {i} of the state dict must have {len(group['params'])} parameters, got "
                f"{len(saved['params'])}"
            )
        options = {
            name: copy.deepcopy(value)
            for name, value in saved.items()
            if name != "params" and name not in LOCAL_OPTIONS
        }
        merged = {**group, **options}
        if merged["capacity"] != group["capacity"]:
            raise ValueError(
                f"the state dict must have the capacity {group['capacity']} of group {i}, got "
                f"{merged['capacity']}"
            )
        check_options(merged)
        loaded.append(merged)
    return loaded


def loaded_state(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> dict[Any, State]:
    """Return the state of a state dict for the parameters of `groups`, as new tensors.

    Entries that belong to no parameter are kept as they are.

    Raises:
        ValueError: The state of a parameter does not fit it.
    """
    indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = [(param, group) for group in groups for param in group["params"]]
    owners = dict(zip(indices, members, strict=True))
    state: dict[Any, State] = defaultdict(dict)
    for index, saved in state_dict["state"].items():
        if index in owners:
            param, group = owners[index]
            state[param] = _loaded_param_state(f"parameter {index}", param, saved, group)
        else:
            state[index] = copy.deepcopy(saved)
    return state


def _loaded_param_state(
    where: str, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]
) -> State:
    """Return a parameter's state as new tensors holding the values of a saved one.

    Keeps the state's own dtypes whatever the parameter's, accepts a number for `step`, an Adam
    state without a buffer, and keeps keys it does not know.

    Args:
        where: Names the parameter, for messages.
        param: The parameter.
        saved: Its entry of a state dict's "state"; not changed.
        group: The options of its group.

    Raises:
        ValueError: A tensor is missing or does not fit the parameter or the capacity.
    """
    if not saved:
        return {}
    capacity = group["capacity"]
    known = {
        key for key in (*required_keys(group), "max_exp_avg_sq", "critical_sum") if key in saved
    }
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in known:
            raise ValueError(f"the state of {where} must have {key!r}, got {sorted(saved)}")
    if len(known.intersection(BUFFER_KEYS)) == 1:
        raise ValueError(
            f"the state of {where} must have both of {BUFFER_KEYS} or neither, got {sorted(saved)}"
        )
    shapes = {key: tuple(param.shape) for key in SHAPED_KEYS}
    shapes |= {"critical_buffer": (capacity, *param.shape), "priorities": (capacity,)}
    state = {key: copy.deepcopy(value) for key, value in saved.items() if key not in known}
    for key in known:
        value = torch.as_tensor(saved[key])
        if key == "step":
            value = value.reshape(()) if value.numel() == 1 else value
        expected = shapes.get(key, ())
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{key!r} in the state of {where} must have shape {expected} (capacity "
                f"{capacity}), got {tuple(value.shape)}"
            )
        state[key] = new_tensor(key, param, {}, capacity).copy_(value)
    return state | missing_state(param, state, required_keys(group), capacity)
