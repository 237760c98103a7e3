"""The form of state dicts: what is saved, and what is checked before an optimizer changes."""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from cm_fused._checks import check_options
from cm_fused._loading import load_param_state_, loaded_param_state
from cm_fused._state import LIST_NAMES, State, unscaled

FLOAT8 = torch.float8_e4m3fn
# Options of the process, not of the training run: saved as these values, never loaded. They are
# saved because torch reads a flattened state dict by the keys of the optimizer that loads it.
LOCAL_OPTIONS = {"backend": None, "amp_scaling": False}
# Options that stay the optimizer's own; the state is converted to them.
PRECISION_OPTIONS = ("buffer_dtype", "moment_dtype")


def saved_state(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return an optimizer's state, its commits made, in plain dicts without what is not saved."""
    return {
        key: {name: entry for name, entry in value.items() if name != "pending_slot"}
        if isinstance(value, dict)
        else value
        for key, value in state.items()
    }


def picklable(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a state, as `saved_state`, whose 8-bit floats are bytes: torch pickles none."""
    return {key: _with_viewed(value, FLOAT8, torch.uint8) for key, value in state.items()}


def unpickled(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the state that `picklable` was given."""
    return {key: _with_viewed(value, torch.uint8, FLOAT8) for key, value in state.items()}


def _with_viewed(state: Any, held: torch.dtype, viewed: torch.dtype) -> Any:
    buffer = state.get("critical_buffer") if isinstance(state, dict) else None
    if not isinstance(buffer, Tensor) or buffer.dtype != held:
        return state
    return {**state, "critical_buffer": buffer.view(viewed)}


def saved_form(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Return a state dict, its commits made, without what is not saved; a post hook."""
    state = saved_state(state_dict["state"])
    return {
        **state_dict,
        "state": {
            key: unscaled(value) if isinstance(value, dict) else value
            for key, value in state.items()
        },
        "param_groups": [_saved_group(group) for group in state_dict["param_groups"]],
    }


def _saved_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group as it is saved: with every key that any optimizer's group can have.

    Those include the count of skipped steps, which a group has from its first step with
    `skip_nonfinite` on.
    """
    named = {
        # torch.distributed.checkpoint cannot gather dtypes.
        name: str(value) if isinstance(value, torch.dtype) else value
        for name, value in group.items()
    }
    count = torch.zeros((), dtype=torch.int64, device="cpu")
    return {"skipped_steps": count, **named, **LOCAL_OPTIONS}


def check_form(state_dict: Any) -> None:
    """Check that a state dict has the parts that all have.

    Raises:
        ValueError: It has not.
    """
    parts = {"state": dict, "param_groups": list}
    for name, expected in parts.items():
        found = state_dict.get(name) if isinstance(state_dict, Mapping) else None
        if not isinstance(found, expected):
            raise ValueError(
                f"state_dict[{name!r}] must be a {expected.__name__}, got {type(found).__name__}; "
                "is it what optimizer.state_dict() returned?"
            )
    for i, group in enumerate(state_dict["param_groups"]):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            raise ValueError(
                f"group {i} of the state dict must be a dict with a list 'params', got "
                f"{type(group).__name__}"
            )
    for index, state in state_dict["state"].items():
        if isinstance(index, int) and not isinstance(state, Mapping):
            raise ValueError(
                f"the state of parameter {index} must be a dict, got {type(state).__name__}"
            )


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
            if name not in ("params", *LOCAL_OPTIONS, *PRECISION_OPTIONS)
        }
        merged = {**group, **options}
        if merged["capacity"] != group["capacity"]:
            raise ValueError(
                f"the state dict must have the capacity {group['capacity']} of group {i}, got "
                f"{merged['capacity']}; load it into an optimizer of that capacity, whose "
                "resize_buffer() changes it"
            )
        check_options(merged)
        loaded.append(merged)
    return loaded


def check_state(groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> None:
    """Check that the state of a state dict fits the parameters of `groups`; allocates nothing.

    Raises:
        ValueError: The state of a parameter does not fit it.
    """
    for index, param, saved, group in _states_with_owners(groups, state_dict):
        if param is not None:
            where = f"parameter {index}"
            shapes = {key: _on_meta(value) for key, value in saved.items()}
            loaded_param_state(where, _on_meta(param), shapes, group)
            _check_step(where, saved.get("step", 0))


def _check_step(where: str, step: Any) -> None:
    if not float(step) >= 0 or math.isinf(step):
        raise ValueError(
            f"'step' in the state of {where} must be finite and >= 0, got {float(step)}"
        )


def loaded_state(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any], own: Mapping[Any, State]
) -> dict[Any, State]:
    """Return the state of a state dict for the parameters of `groups`.

    The values are copied into the tensors that the optimizer has, where it has such, and else into
    new ones: besides these one parameter's state is held at a time. Entries that belong to no
    parameter are kept as they are.

    Args:
        groups: The param groups.
        state_dict: What `check_state` has passed.
        own: The optimizer's state. Its tensors are changed.
    """
    state: dict[Any, State] = defaultdict(dict)
    for index, param, saved, group in _states_with_owners(groups, state_dict):
        if param is None:
            state[index] = copy.deepcopy(saved)
        else:
            where = f"parameter {index}"
            state[param] = load_param_state_(where, param, saved, group, own.get(param, {}))
    return state


def _states_with_owners(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, Tensor | None, Any, dict[str, Any]]]:
    """Yield each entry's index, its parameter or None, the entry, and the parameter's group."""
    indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = [(param, group) for group in groups for param in group["params"]]
    owners = dict(zip(indices, members, strict=True))
    for index, saved in state_dict["state"].items():
        param, group = owners.get(index, (None, {}))
        yield index, param, saved if param is None else _without_placeholders(saved), group


def _without_placeholders(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state without the empty dicts that stand for tensors that were not saved.

    torch puts them there when it reads a flattened state dict: one for each key of the optimizer's
    own state that the state dict does not have.
    """
    return {
        key: value
        for key, value in saved.items()
        if not (key in LIST_NAMES and isinstance(value, dict) and not value)
    }


def _on_meta(value: Any) -> Any:
    """Return a tensor without its values, whole, and any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def warn_of_conversion(groups: list[dict[str, Any]], saved_groups: list[dict[str, Any]]) -> None:
    """Say which groups' state was saved in another precision than they keep it in."""
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        # A checkpoint of torch.optim has no buffer.
        names = PRECISION_OPTIONS if "capacity" in saved else ("moment_dtype",)
        for name in names:
            # Saved by its name, in older state dicts by itself.
            own, other = (str(options.get(name) or torch.float32) for options in (group, saved))
            if own != other:
                warnings.warn(
                    f"the state of group {i} was saved with {name}={other} and is converted to "
                    f"this optimizer's {name}={own}",
                    UserWarning,
                    stacklevel=3,
                )
