"""The form of state dicts, and their checks before a load changes an optimizer."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict
from torch.utils._pytree import tree_map_only

from cm_fused._optimizer.checks import check_options, plain_options
from cm_fused._state.loading import Entry, check_entry, loaded_state_of, write_into
from cm_fused._state.making import missing_state_of, unscaled
from cm_fused._state.table import DTYPE_OPTIONS, KEYS, ROWS, SCALES, State, as_dtype, option_dtype
from cm_fused.rounding import LARGEST, PACKED

# Options of the process, not of the training run: saved as these values, never loaded. They are
# saved because torch reads a flattened state dict by the keys of the optimizer that loads it.
LOCAL_OPTIONS = {"backend": None, "fused": None, "foreach": None, "amp_scaling": False}
# In a saved group: whether the slots are gradients.
KIND = "critical_gradients"
# Follows the name of a dtype with scales in a saved group whose state is all values, no codes: that
# of DTensors. It is in an option's value, since of a flattened state dict torch reads options only.
AS_VALUES = " as values"
# What pickles of earlier versions lack, as those versions stepped.
NEWER_OPTIONS = {"adjust_lr_fn": None, "fused": None, "foreach": None}
# Types whose values need no copies.
_IMMUTABLE = (bool, int, float, str, type(None))


def with_slots_viewed(
    state: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    stored: torch.dtype,
    viewed: torch.dtype,
) -> dict[Any, Any]:
    """Return a state whose float8 slots of one dtype are views of another; torch pickles none."""
    result = dict(state)
    packed = {
        param
        for group in groups
        if option_dtype("critical_buffer", group) is PACKED
        for param in group["params"]
    }
    for key, value in state.items():
        buffer = value.get("critical_buffer") if isinstance(value, dict) else None
        if isinstance(buffer, Tensor) and buffer.dtype == stored and key not in packed:
            result[key] = {**value, "critical_buffer": buffer.view(viewed)}
    return result


def saved_form(optimizer: Optimizer, state_dict: StateDict, *, copies: bool) -> StateDict:
    """Return a flushed optimizer's state dict as it is saved; a state dict post hook."""
    critical_gradients: bool = optimizer._critical_gradients  # type: ignore[attr-defined]
    states = {
        key: _saved_state(state, critical_gradients) if isinstance(state, dict) else state
        for key, state in state_dict["state"].items()
    }
    groups = [
        {**_saved_group(group), **_dtype_names(group, states), KIND: critical_gradients}
        for group in state_dict["param_groups"]
    ]
    saved = {**state_dict, "state": states, "param_groups": groups}
    return tree_map_only(Tensor, torch.clone, saved) if copies else saved


def _saved_state(state: Mapping[str, Any], critical_gradients: bool) -> State:
    """Return a parameter's state as it is saved, with a pending slot whatever the backend.

    torch.distributed.checkpoint looks for all keys of the optimizer that loads.
    """
    saved = unscaled(dict(state))
    if "critical_buffer" in saved and not critical_gradients:
        saved.setdefault("pending_slot", torch.tensor(-1, device="cpu"))
    return saved


def _saved_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group as it is saved: with every key that any optimizer's group can have."""
    named = {
        # torch.distributed.checkpoint cannot gather dtypes.
        name: str(value) if isinstance(value, torch.dtype) else value
        for name, value in plain_options(group).items()
    }
    # A group has it from its first step with `skip_nonfinite` on.
    count = torch.zeros((), dtype=torch.int64, device="cpu")
    return {"skipped_steps": count, **named, **LOCAL_OPTIONS}


def _dtype_names(group: Mapping[str, Any], states: Mapping[Any, Any]) -> dict[str, str]:
    """Return the saved values of the options whose dtype has scales."""
    names = {}
    for key in SCALES:
        dtype = option_dtype(key, group)
        if dtype in LARGEST:
            saved = (states[i][key] for i in group["params"] if key in states.get(i, ()))
            dtypes = {value.dtype for value in saved if isinstance(value, Tensor)}
            is_coded = not dtypes or dtype in dtypes
            option = str(ROWS[key].dtype_option)
            names[option] = f"{as_dtype(group[option])}{'' if is_coded else AS_VALUES}"
    return names


def _check_codes(entry: Entry, saved_group: Mapping[str, Any]) -> None:
    """Check that what was saved as codes is that, and not copies of them in another dtype."""
    for key, scales in SCALES.items():
        # "torch.int8 as values" is no dtype's name.
        dtype = option_dtype(key, {str(ROWS[key].dtype_option): None, **saved_group})
        value, scale = entry.saved.get(key), entry.saved.get(scales)
        # Also beside codes, and in earlier checkouts, values have a scale without dimensions.
        is_value = isinstance(scale, Tensor) and scale.dim() == 0
        is_coded = isinstance(dtype, torch.dtype) and dtype in LARGEST and not is_value
        if is_coded and isinstance(value, Tensor) and value.dtype != dtype:
            raise ValueError(
                f"{key!r} in the state of {entry.where} must be {dtype}, as it was saved, got "
                f"{value.dtype}: torch.distributed.checkpoint copies codes without their scales. "
                "Read the file with an optimizer of the dtypes that it was saved with, and load "
                "that optimizer's state_dict() into this one"
            )


def check_form(state_dict: Any) -> None:
    """Check that a state dict has the parts that every state dict has; else ValueError."""
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
    """Return the param groups with saved options over their own; changes neither."""
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
        # Its dtypes stay the optimizer's own: the state is converted to them.
        options = {
            name: value if type(value) in _IMMUTABLE else copied(value, group["params"])
            for name, value in saved.items()
            if name not in ("params", KIND, *LOCAL_OPTIONS, *DTYPE_OPTIONS)
        }
        merged = plain_options({**group, **options})
        if merged["capacity"] != group["capacity"]:
            raise ValueError(
                f"the state dict must have the capacity {group['capacity']} of group {i}, got "
                f"{merged['capacity']}; load it into an optimizer of that capacity, whose "
                "resize_buffer() changes it"
            )
        check_options(merged, in_training=True)
        loaded.append(merged)
    return loaded


def checked_entries(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any]
) -> dict[Any, Entry | None]:
    """Return each index of a state dict's state with its parameter's entry, None for no parameter.

    `groups` have the loaded options. The state dict is one that `check_form` has passed. Makes no
    state; ValueError where that of a parameter does not fit it.
    """
    saved_groups = state_dict["param_groups"]
    indices = chain.from_iterable(group["params"] for group in saved_groups)
    members = [
        (param, group, saved_group)
        for group, saved_group in zip(groups, saved_groups, strict=True)
        for param in group["params"]
    ]
    owners = dict(zip(indices, members, strict=True))
    entries: dict[Any, Entry | None] = dict.fromkeys(state_dict["state"])
    for index, saved in state_dict["state"].items():
        if index not in owners:
            continue
        param, group, saved_group = owners[index]
        # torch reads a flattened state dict with an empty dict for each key of the optimizer's own
        # state that was not saved.
        saved = {
            key: value
            for key, value in saved.items()
            if not (isinstance(value, dict) and not value and key in KEYS)
        }
        entries[index] = entry = Entry(f"parameter {index}", param, saved, group)
        _check_codes(entry, saved_group)
        check_entry(entry)
    return entries


def take_over_state(
    entries: Mapping[Any, Entry | None],
    saved: Mapping[Any, Any],
    groups: list[dict[str, Any]],
    own: MutableMapping[Any, State],
    *,
    in_place: bool,
) -> dict[Any, State]:
    """Return the state of a state dict for the parameters of `groups`, in new tensors.

    Besides the state dict and the optimizer's `own` state, one parameter's is needed at a time:
    parameters are removed from `own` as theirs are loaded. After an error, which only an allocation
    can raise, `own` has what was loaded. Entries that belong to no parameter are copied.

    `in_place` writes into all tensors of `own`, for a captured CUDA graph. No state dict may refer
    to them: see `saved_form`.
    """
    state: dict[Any, State] = defaultdict(dict)
    params = list(chain.from_iterable(group["params"] for group in groups))
    try:
        for index, entry in entries.items():
            if entry is None:
                state[index] = copied(saved[index], params)
                continue
            new = loaded_state_of(entry)
            for key, value in new.items():
                if value is entry.saved.get(key):
                    new[key] = copied(value, params)
            if in_place:
                new = _written_into(own.get(entry.param, {}), new, entry.param, entry.group)
            state[entry.param] = new
            own.pop(entry.param, None)
        if in_place:
            # The graph has state that the state dict does not have.
            for group in groups:
                for param in filter(own.__contains__, group["params"]):
                    state[param] = _written_into(own[param], {}, param, group)
                    own.pop(param)
    except BaseException:
        own.update(state)
        raise
    return state


def _written_into(old: State, new: State, param: Tensor, group: Mapping[str, Any]) -> State:
    """Return a loaded state in the tensors, `old`, that a captured graph goes on using.

    State that the graph has and the state dict does not have starts anew with what was loaded: no
    commit is pending, and the running sum is that of the loaded slots.
    """
    of_graph = tuple(key for key in KEYS if key in old)
    whole = new | missing_state_of(param, new, of_graph, group)
    return {key: write_into(old.get(key), value) for key, value in whole.items()}


def write_options_into_(groups: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    """Write loaded values into the tensors of the groups' options, which a captured graph uses.

    The loaded groups get these tensors.
    """
    for group, new in zip(groups, loaded, strict=True):
        for name, own in group.items():
            if isinstance(own, Tensor) and isinstance(new[name], (int, float, Tensor)):
                new[name] = own.copy_(torch.as_tensor(new[name]).reshape(own.shape))


def copied(value: Any, params: Iterable[Tensor]) -> Any:
    """Return a deep copy of a value, in which these parameters are not copied."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return copy.deepcopy(value, {id(param): param for param in params})
