"""Loading a state dict: everything is checked before the optimizer changes."""

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
from cm_fused._sharding import is_sharded, local, local_as
from cm_fused._state import (
    SCALES,
    SHAPED_KEYS,
    State,
    dequantized,
    missing_state,
    new_tensor,
    placed_as,
    required_keys,
    unscaled,
)
from cm_fused.rounding import LARGEST, as_flat, flat_as, quantize, quantize_moment

# Keys that are loaded where the state dict has them, whatever the options.
OPTIONAL_KEYS = ("max_exp_avg_sq", "critical_sum", "compensation")
BUFFER_KEYS = ("critical_buffer", "priorities")
FLOAT8 = torch.float8_e4m3fn
# Options of the process, not of the training run: neither saved nor loaded.
LOCAL_OPTIONS = ("backend", "amp_scaling")
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
        "param_groups": [
            {
                # Of dtypes themselves torch.distributed.checkpoint makes no whole state dict.
                name: str(value) if isinstance(value, torch.dtype) else value
                for name, value in group.items()
                if name not in LOCAL_OPTIONS
            }
            for group in state_dict["param_groups"]
        ],
    }


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
            _loaded_param_state(where, _on_meta(param), shapes, group)
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
            state[param] = _loaded_in_place(where, param, saved, group, own.get(param, {}))
    return state


def _loaded_in_place(
    where: str, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any], own: State
) -> State:
    new = _loaded_param_state_of(where, param, saved, group)
    return {key: _in_place(own.get(key), value) for key, value in new.items()}


def _states_with_owners(
    groups: list[dict[str, Any]], state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, Tensor | None, Any, dict[str, Any]]]:
    """Yield each entry's index, its parameter or None, the entry, and the parameter's group."""
    indices = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    members = [(param, group) for group in groups for param in group["params"]]
    owners = dict(zip(indices, members, strict=True))
    for index, saved in state_dict["state"].items():
        param, group = owners.get(index, (None, {}))
        yield index, param, saved, group


def _on_meta(value: Any) -> Any:
    """Return a tensor without its values, whole, and any other value as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _in_place(own: Any, value: Any) -> Any:
    """Return a tensor with the value of another: the optimizer's own, where it is like that."""
    if not (isinstance(own, Tensor) and isinstance(value, Tensor)):
        return value
    if is_sharded(own) != is_sharded(value) or own.shape != value.shape:
        return value
    held, new = local(own), local(value)
    alike = (held.dtype, held.device, held.stride()) == (new.dtype, new.device, new.stride())
    if not alike or held.shape != new.shape:
        return value
    held.copy_(new)
    return own


def _loaded_param_state_of(
    where: str, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]
) -> State:
    """Return what `_loaded_param_state` does, of a parameter that may be a DTensor.

    What is saved may be whole, or be placed otherwise.
    """
    if is_sharded(param):
        saved = _without_scales(saved)
    held = {
        key: local_as(value, param, SHAPED_KEYS[key]) if key in SHAPED_KEYS else value
        for key, value in saved.items()
    }
    return placed_as(param, _loaded_param_state(where, local(param), held, group))


def _without_scales(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved state with values in place of whole tensors' codes, which cannot be cut."""
    values = dict(saved)
    for key, scales in SCALES.items():
        stored = saved.get(key)
        if not isinstance(stored, Tensor) or is_sharded(stored):
            continue
        if stored.dtype in LARGEST:
            values[key] = dequantized(saved, key)
            values.pop(scales, None)
    return values


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
    loadable = {*required_keys(group), *OPTIONAL_KEYS}.difference(SCALES.values())
    # In one order in every process: whoever gathers state goes through it key by key.
    known = dict.fromkeys(key for key in saved if key in loadable)
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in known:
            raise ValueError(f"the state of {where} must have {key!r}, got {sorted(saved)}")
    if len(known.keys() & BUFFER_KEYS) == 1:
        raise ValueError(
            f"the state of {where} must have both of {BUFFER_KEYS} or neither, got {sorted(saved)}"
        )
    slots = (capacity,)
    shapes = {key: (*slots[:n], *param.shape) for key, n in SHAPED_KEYS.items()}
    shapes |= {"priorities": slots}
    not_copied = {*known, *SCALES.values()}
    state = {key: copy.deepcopy(value) for key, value in saved.items() if key not in not_copied}
    for key in known:
        value = _as_tensor(where, key, saved[key])
        if key == "step":
            value = value.reshape(()) if value.numel() == 1 else value
        new = new_tensor(key, param, {}, group)
        expected = tuple(new.shape) if key == "compensation" else shapes.get(key, ())
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{key!r} in the state of {where} must have shape {expected} (capacity "
                f"{capacity}), got {tuple(value.shape)}"
            )
        if key in SCALES:
            state |= _loaded_in_precision(where, key, saved, new, param, group)
        else:
            state[key] = new.copy_(value)
    if "critical_sum" in known and saved["critical_buffer"].dtype != state["critical_buffer"].dtype:
        _follow_slots_(state, saved["critical_buffer"])
    return state | missing_state(param, state, required_keys(group), group)


def _as_tensor(where: str, key: str, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{key!r} in the state of {where} must be a tensor, got {type(value).__name__}"
        ) from error


def _follow_slots_(state: State, saved_slots: Tensor) -> None:
    """Sum the slots anew where they are not the values that were saved but rounded otherwise."""
    slots, critical_sum = dequantized(state, "critical_buffer"), state["critical_sum"]
    same = (slots == saved_slots.to(slots.device, slots.dtype)).all()
    critical_sum.copy_(torch.where(same, critical_sum, slots.sum(0)))


def _loaded_in_precision(
    where: str,
    key: str,
    saved: Mapping[str, Any],
    new: Tensor,
    param: Tensor,
    group: Mapping[str, Any],
) -> State:
    """Return a tensor of `SCALES` and its scales, if any, as a group's options have them.

    What is saved in the same precision is copied; else it is rounded to nearest.

    Raises:
        ValueError: What is saved has no scales where its dtype needs them, or does not fit them.
    """
    value, scales_key = _as_tensor(where, key, saved[key]), SCALES[key]
    leading = value.ndim - param.ndim
    scales = new_tensor(scales_key, param, {}, group)
    if value.dtype in LARGEST:
        found = saved.get(scales_key)
        found = None if found is None else _as_tensor(where, scales_key, found)
        if found is None or found.shape != scales.shape:
            raise ValueError(
                f"{scales_key!r} in the state of {where} must have shape {tuple(scales.shape)}, "
                f"got {None if found is None else tuple(found.shape)}"
            )
        same_order = value.numel() == 0 or value.stride() == new.stride()
        if value.dtype == new.dtype and same_order:
            return {key: new.copy_(value), scales_key: scales.copy_(found)}
    elif new.dtype not in LARGEST:
        return {key: new.copy_(value)}
    order = new[0] if leading else new
    values = dequantized({**saved, key: value}, key).to(new.device, torch.float32)
    if key == "critical_buffer":
        flat = torch.stack([flat_as(slot, order) for slot in values])
        stored, new_scales = quantize(flat, new.dtype)
    elif new.dtype in LARGEST:
        stored, new_scales = quantize_moment(flat_as(values, order), None, signed=key == "exp_avg")
    else:
        stored, new_scales = flat_as(values, order).to(new.dtype), None
    as_flat(new, leading).copy_(stored)
    return {key: new} if new_scales is None else {key: new, scales_key: scales.copy_(new_scales)}


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
