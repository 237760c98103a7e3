"""Loading one parameter's state: checked, converted in precision, placed as the parameter is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cm_fused._distributed import is_sharded, local, local_as
from cm_fused._state.making import dequantized, missing_state, new_tensor, placed_as
from cm_fused._state.table import LEADING, SCALES, State, required_keys
from cm_fused.rounding import LARGEST, as_flat, flat_as, quantize, quantize_moment, sum_slots

# Keys that are loaded where the state dict has them, whatever the options.
OPTIONAL_KEYS = ("max_exp_avg_sq", "critical_sum", "compensation")
BUFFER_KEYS = ("critical_buffer", "priorities")


def loaded_state_of(
    where: str, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]
) -> State:
    """Return what `loaded_param_state` does, for a parameter that may be a DTensor.

    What is saved may be whole, or be placed otherwise.
    """
    if is_sharded(param):
        saved = _without_scales(saved)
    held = {
        key: local_as(value, param, LEADING[key]) if key in LEADING else value
        for key, value in saved.items()
    }
    return placed_as(param, loaded_param_state(where, local(param), held, group))


def write_into(own: Any, value: Any) -> Any:
    """Return `own` with the value of another tensor, or the other where they are not alike.

    Args:
        own: What the optimizer has. Changed where both are tensors that are alike.
        value: What was loaded.
    """
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


def loaded_param_state(
    where: str, param: Tensor, saved: Mapping[str, Any], group: Mapping[str, Any]
) -> State:
    """Return a parameter's state as new tensors holding the values of a saved one.

    Keeps the state's own dtypes whatever the parameter's, accepts a number for `step`, an Adam
    state without a buffer, and returns what it does not know as it is.

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
    shapes = {key: (*slots[:n], *param.shape) for key, n in LEADING.items()}
    shapes |= {"priorities": slots}
    not_copied = {*known, *SCALES.values()}
    state = {key: value for key, value in saved.items() if key not in not_copied}
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
    try:
        return state | missing_state(param, state, required_keys(group), group)
    except RuntimeError as error:
        raise ValueError(f"the state of {where} does not fit it: {error}") from error


def _as_tensor(where: str, key: str, value: Any) -> Tensor:
    try:
        if isinstance(value, Tensor):
            return value
        # The default dtype may be too short for a count of steps.
        dtype = torch.float64 if isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{key!r} in the state of {where} must be a tensor, got {type(value).__name__}"
        ) from error


def _follow_slots_(state: State, saved_slots: Tensor) -> None:
    """Sum the slots anew where they are not the values that were saved but rounded otherwise."""
    slots, critical_sum = dequantized(state, "critical_buffer"), state["critical_sum"]
    same = (slots == saved_slots.to(slots.device, slots.dtype)).all()
    critical_sum.copy_(torch.where(same, critical_sum, sum_slots(slots)))


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
