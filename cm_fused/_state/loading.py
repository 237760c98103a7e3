"""Loading one parameter's state: checked, converted in precision, placed as the parameter is."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cm_fused import rounding
from cm_fused._distributed import is_sharded, local, local_as
from cm_fused._state import access
from cm_fused._state.making import dequantized, missing_state, new_tensor, placed_as
from cm_fused._state.table import (
    LEADING,
    ROWS,
    SCALES,
    STATE,
    State,
    required_keys,
    shape_of,
    shapes_of,
)

# Keys that are loaded where the state dict has them, whatever the options; scales come with them.
_LOADED = {row.key for row in STATE if row.key not in SCALES.values()}
_NEEDED = ("step", "exp_avg", "exp_avg_sq")
_BUFFER_KEYS = ("critical_buffer", "priorities")
# The integers and 8-bit floats that a key is saved in. DTensors' remainders are saved as int32.
_CODED = {
    "exp_avg": (torch.int8,),
    "exp_avg_sq": (torch.int8,),
    "critical_buffer": tuple(rounding.LARGEST),
    "master_remainder": (torch.int16, torch.int32),
}


class Entry(NamedTuple):
    """A parameter's entry of a state dict."""

    where: str  # names the parameter, for messages
    param: Tensor
    saved: Mapping[str, Any]  # the entry; not changed
    group: Mapping[str, Any]  # the options of the parameter's group


def check_entry(entry: Entry) -> None:
    """Check that an entry fits its parameter and its group's options; makes no state.

    ValueError where a tensor is missing, does not fit the parameter or the capacity, or has a dtype
    or keys that no optimizer saves.
    """
    where, param, saved, group = entry
    if not saved:
        return
    values = _loaded_values(entry)
    for key in _NEEDED:
        if key not in values:
            raise ValueError(f"the state of {where} must have {key!r}, got {sorted(saved)}")
    if len(values.keys() & _BUFFER_KEYS) == 1:
        raise ValueError(
            f"the state of {where} must have both of {_BUFFER_KEYS} or neither, got {sorted(saved)}"
        )
    shapes = shapes_of(param, group["capacity"])
    for key, value in values.items():
        _check_form(entry, key, value)
        if ROWS[key].param_dtypes is not None and value.shape == (0,):
            continue  # of a parameter of another dtype
        expected = shapes[shape_of(key, value.dtype)]
        if value.shape != expected and not (key == "step" and value.numel() == 1):
            raise ValueError(
                f"{key!r} in the state of {where} must have shape {expected} (capacity "
                f"{group['capacity']}), got {tuple(value.shape)}"
            )
        _check_dtype(entry, key, value)
    try:
        # With no state and no keys it only checks the parameter and its options.
        missing_state(local(param), {}, (), group)
    except RuntimeError as error:
        raise ValueError(f"the state of {where} does not fit it: {error}") from error
    try:
        _check_numbers(where, values, group["capacity"])
    except RuntimeError:  # tensors without values, of an estimate of a run's memory
        return


def _check_form(entry: Entry, key: str, value: Tensor) -> None:
    """Check that a tensor can be copied: that it is dense, and has values if the parameter has."""
    form = str(value.layout)
    if local(value).is_meta and not local(entry.param).is_meta:
        form = "the meta device"
    if form != str(torch.strided):
        raise ValueError(
            f"{key!r} in the state of {entry.where} must be a dense tensor with values, got one of "
            f"{form}"
        )


def _check_dtype(entry: Entry, key: str, value: Tensor) -> None:
    dtypes = [str(dtype) for dtype in _CODED.get(key, ())]
    # A number of any dtype may stand for these two.
    if key in ("step", "pending_slot") or str(value.dtype) in dtypes:
        return
    is_complex = key in LEADING and entry.param.is_complex()
    if key != "master_remainder":
        dtypes.insert(0, "complex" if is_complex else "float")
        is_wide = value.is_complex() if is_complex else value.is_floating_point()
        if is_wide and value.dtype not in rounding.LARGEST:
            return
    raise ValueError(
        f"{key!r} in the state of {entry.where} must have the dtype {' or '.join(dtypes)}, got "
        f"{value.dtype}"
    )


def _check_numbers(where: str, values: Mapping[str, Tensor], capacity: int) -> None:
    count = float(values["step"])
    if not 0 <= count < torch.inf:
        raise ValueError(f"'step' in the state of {where} must be finite and >= 0, got {count}")
    for priority in values["priorities"].tolist() if "priorities" in values else ():
        if not (0 <= priority < torch.inf or priority == -torch.inf):
            raise ValueError(
                f"'priorities' in the state of {where} must be finite and >= 0, or -inf for an "
                f"unfilled slot, got {priority}"
            )
    pending = values["pending_slot"].item() if "pending_slot" in values else -1
    if pending not in range(-1, capacity):
        raise ValueError(
            f"'pending_slot' in the state of {where} must be -1 or one of {capacity} slots, got "
            f"{pending}"
        )


def _loaded_values(entry: Entry) -> dict[str, Tensor]:
    """Return the tensors of an entry that are loaded, codes with their scales, numbers as tensors.

    Their order is that of every process, since gathering state goes through it key by key.
    """
    values = {
        key: value if isinstance(value, Tensor) else _as_tensor(entry.where, key, value)
        for key, value in entry.saved.items()
        if key in _LOADED
    }
    for key, scales in SCALES.items():
        if key in values and values[key].dtype in rounding.LARGEST:
            values[scales] = _as_tensor(entry.where, scales, entry.saved.get(scales))
    return values


def _as_tensor(where: str, key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        # The default dtype may be too short for a count of steps.
        dtype = torch.float64 if isinstance(value, float) else None
        return torch.tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{key!r} in the state of {where} must be a tensor, got {type(value).__name__}"
        ) from error


def loaded_state_of(entry: Entry) -> State:
    """Return a parameter's state as new tensors with the values of a checked entry.

    The tensors are placed as the parameter is, which may be a DTensor; those of the entry may be
    full or placed otherwise. State keeps its own dtypes whatever the parameter's. An Adam state
    without a buffer gets an empty one. A row that parameters of some dtypes have is new if the
    saved parameter had another dtype. Entries of unknown keys are returned as they are.
    """
    param, saved = entry.param, entry.saved
    if not saved:
        return {}
    if is_sharded(param):
        saved = _without_scales(saved)
    saved = {
        key: local_as(value, param, LEADING[key]) if key in LEADING else value
        for key, value in saved.items()
    }
    return placed_as(param, _loaded_state(entry._replace(param=local(param), saved=saved)))


def write_into(own: Any, value: Any) -> Any:
    """Return `own` with the value of another tensor, or the other where the two differ in form.

    Its form is its shape, dtype, device and strides.
    """
    if not (isinstance(own, Tensor) and isinstance(value, Tensor)):
        return value
    if is_sharded(own) != is_sharded(value) or own.shape != value.shape:
        return value
    target, source = local(own), local(value)
    forms = [(each.shape, each.dtype, each.device, each.stride()) for each in (target, source)]
    if forms[0] != forms[1]:
        return value
    target.copy_(source)
    return own


def _without_scales(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a saved state with values instead of full tensors' codes, which cannot be sharded."""
    values = dict(saved)
    for key, scales in SCALES.items():
        stored = saved.get(key)
        if not isinstance(stored, Tensor) or is_sharded(stored):
            continue
        if stored.dtype in rounding.LARGEST:
            values[key] = dequantized(saved, key)
            values.pop(scales, None)
    return values


def _loaded_state(entry: Entry) -> State:
    """Return what `loaded_state_of` does, for local tensors."""
    _, param, saved, group = entry
    values = _loaded_values(entry)
    not_copied = {*values, *SCALES.values()}
    state = {key: value for key, value in saved.items() if key not in not_copied}
    for key in filter(_LOADED.__contains__, values):
        new = new_tensor(key, param, {}, group)
        if key in SCALES:
            state |= _loaded_in_precision(entry, key, values, new)
        elif new.numel() != values[key].numel():  # saved with a parameter of another dtype
            state[key] = new
        else:
            state[key] = new.copy_(values[key].reshape(new.shape))
    if "critical_sum" in state and "critical_buffer" in state:
        _follow_slots_(state, values["critical_buffer"])
    keys = required_keys(group)
    if not state.keys() >= set(keys):
        state |= missing_state(param, state, keys, group)
    return state


def _follow_slots_(state: State, saved_slots: Tensor) -> None:
    """Sum the slots anew where converting them has changed their values."""
    if saved_slots.dtype == state["critical_buffer"].dtype:
        return
    slots, critical_sum = dequantized(state, "critical_buffer"), state["critical_sum"]
    if saved_slots.dtype is rounding.PACKED:
        critical_sum.copy_(access.sum_slots(slots))
        return
    same = (slots == saved_slots.to(slots.device, slots.dtype)).all()
    critical_sum.copy_(torch.where(same, critical_sum, access.sum_slots(slots)))


def _loaded_in_precision(
    entry: Entry, key: str, values: Mapping[str, Tensor], new: Tensor
) -> State:
    """Return a row of `SCALES` and its scales, if any, in the precision of a group's options.

    The tensors are local; `new`, of the state, is changed. A value of the same precision is copied.
    Any other is rounded to nearest.
    """
    value, leading, scales_key = values[key], LEADING[key], SCALES[key]
    if value.dtype not in rounding.LARGEST and new.dtype not in rounding.LARGEST:
        return {key: new.copy_(value)}
    new_scales: Tensor | None
    order = new[0] if leading else new
    ordered, old_order = new, value
    if rounding.PACKED in (value.dtype, new.dtype):
        # Packed slots lie in the order of the momentum.
        ordered = order = torch.empty_like(entry.param, memory_format=torch.preserve_format)
        old_order = values["exp_avg"]
    same_order = old_order.numel() == 0 or old_order.stride() == ordered.stride()
    if value.dtype == new.dtype and same_order:
        new.copy_(value)
        new_scales = values[scales_key]
    else:
        wide = dequantized(values, key).to(new.device, torch.float32)
        if leading:
            flat = torch.stack([rounding.flat_as(slot, order) for slot in wide])
            stored, new_scales = rounding.quantize(flat, new.dtype)
        elif new.dtype in rounding.LARGEST:
            flat = rounding.flat_as(wide, order)
            stored, new_scales = rounding.quantize_moment(flat, None, signed=key == "exp_avg")
        else:
            stored, new_scales = rounding.flat_as(wide, order).to(new.dtype), None
        rounding.as_flat(new, leading).copy_(stored)
    if new_scales is None:
        return {key: new}
    scales = new_tensor(scales_key, entry.param, {}, entry.group)
    return {key: new, scales_key: scales.copy_(new_scales)}
