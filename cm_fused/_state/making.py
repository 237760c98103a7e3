"""The state of a parameter: made on its first step, completed when options change, loaded.

State is float32, or float64 for a float64 parameter (complex likewise), unless a group's
`buffer_dtype` and `moment_dtype` say otherwise. It lies in memory as its parameter does where that
is dense, so that the fused backends walk both in one order.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cm_fused import reference
from cm_fused._backends import cpu
from cm_fused._distributed import is_sharded, local, placed_with, sharded_as
from cm_fused.rounding import LARGEST, num_blocks

State = dict[str, Any]


# The list of a `Bucket` that holds each key of a state.
LIST_NAMES = {
    "step": "steps",
    "exp_avg": "exp_avgs",
    "exp_avg_sq": "exp_avg_sqs",
    "max_exp_avg_sq": "max_exp_avg_sqs",
    "critical_buffer": "critical_buffers",
    "critical_sum": "critical_sums",
    "priorities": "priorities",
    "pending_slot": "pending_slots",
    "critical_scales": "critical_scales",
    "exp_avg_scales": "exp_avg_scales",
    "exp_avg_sq_scales": "exp_avg_sq_scales",
    "compensation": "compensations",
}
# The scales of what is stored with scales.
SCALES = {
    "critical_buffer": "critical_scales",
    "exp_avg": "exp_avg_scales",
    "exp_avg_sq": "exp_avg_sq_scales",
}


# The keys whose tensors have the parameter's shape, and the dimensions in front of it.
SHAPED_KEYS = {
    "exp_avg": 0,
    "exp_avg_sq": 0,
    "max_exp_avg_sq": 0,
    "critical_buffer": 1,
    "critical_sum": 0,
    "compensation": 0,
}


# What a buffer is made of: whole or new, never a part of it.
BUFFER_KEYS = ("critical_buffer", "priorities", "critical_scales", "critical_sum", "pending_slot")
# Dtypes that moments have where no `moment_dtype` is asked for, besides float32.
_WIDE_DTYPES = (torch.float64, torch.complex64, torch.complex128)
LOW_PRECISION_PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refused_precision(param: Tensor, group: Mapping[str, Any]) -> str | None:
    """Return the option that asks for state which a parameter cannot have, or None."""
    if param.dtype in LOW_PRECISION_PARAM_DTYPES:
        return None
    asked = (name for name in ("buffer_dtype", "moment_dtype") if group[name] is not None)
    return next(asked, None)


def required_keys(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the state keys that every backend needs under a group's options."""
    keys = ["step", "exp_avg", "exp_avg_sq", "critical_buffer", "priorities"]
    if group["amsgrad"]:
        keys.append("max_exp_avg_sq")
    keys += [scales for key, scales in SCALES.items() if option_dtype(key, group) in LARGEST]
    if group["low_precision_update"] == "kahan":
        keys.append("compensation")
    return tuple(keys)


def option_dtype(key: str, group: Mapping[str, Any]) -> torch.dtype | None:
    """Return the dtype that a group's options give a state key, or None: as the parameter says.

    `max_exp_avg_sq` keeps its precision: a maximum of rounded values would only grow.
    """
    option = {
        "critical_buffer": "buffer_dtype",
        "exp_avg": "moment_dtype",
        "exp_avg_sq": "moment_dtype",
    }.get(key)
    dtype: torch.dtype | None = group[option] if option else None
    return dtype


def lists(states: list[State], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the lists of a `Bucket` that hold these keys.

    Raises:
        KeyError: A state lacks one.
    """
    return {LIST_NAMES[key]: [state[key] for state in states] for key in keys}


def check_param(param: Tensor, state: State) -> None:
    """Check that a step could write a parameter and that its state, if any, fits it.

    Raises:
        RuntimeError: The parameter is an expanded tensor, or a lazy conjugate or negative, or its
            shape or dtype is not its state's.
    """
    if not param.is_contiguous() and torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            "a parameter must not hold two elements in one place (an expanded tensor?), got shape "
            f"{tuple(param.shape)} and strides {param.stride()}; use param.contiguous()"
        )
    # torch.compile does not trace the questions.
    if not torch.compiler.is_compiling() and (param.is_conj() or param.is_neg()):
        raise RuntimeError(
            "a parameter must not be a lazy conjugate or negative, got a lazy "
            f"{'conjugate' if param.is_conj() else 'negative'}; set "
            "param.data = param.data.resolve_conj().resolve_neg()"
        )
    for key, leading in SHAPED_KEYS.items():
        # A compensation of what is not rounded is empty.
        if key in state and key != "compensation":
            _check_shape(key, state[key], param, leading)
    # Moments of lower precision are those of parameters whose state is float32.
    stored = state["exp_avg"].dtype if "exp_avg" in state else None
    computed = stored if stored in _WIDE_DTYPES else torch.float32
    if stored is not None and computed != state_dtype(param.dtype):
        raise RuntimeError(
            f"a parameter must have a dtype that fits its state of {computed}, got {param.dtype}; "
            "load state_dict() into a new optimizer to convert the state, or delete "
            "optimizer.state[param] to start anew"
        )


def _check_shape(key: str, tensor: Tensor, param: Tensor, leading: int) -> None:
    if tensor.shape[leading:] == param.shape:
        return
    slots = "C, " if leading else ""
    raise RuntimeError(
        f"the state's {key!r} must have the parameter's shape, "
        f"({slots}{', '.join(map(str, param.shape))}), got {tuple(tensor.shape)}; change all "
        "tensors of the state as the parameter is changed, delete 'critical_buffer' from "
        "optimizer.state[param] to start with an empty buffer, or delete all of it"
    )


def missing_state(
    param: Tensor, state: State, keys: tuple[str, ...], group: Mapping[str, Any]
) -> State:
    """Return new tensors for those of `keys` that `state` lacks; changes nothing.

    Where a part of the buffer is missing, all of it is new.

    Raises:
        RuntimeError: As `check_param`, or the state's capacity or a dtype of it is another than the
            group's, or the parameter cannot have state of the group's precision.
    """
    if not ("critical_buffer" in state and "priorities" in state):
        keys = (*keys, *(key for key in BUFFER_KEYS if key in state and key not in keys))
        state = {key: value for key, value in state.items() if key not in BUFFER_KEYS}
    _check_state(param, state, group)
    return {
        key: new_tensor(key, param, state, group)
        for key in keys
        if key not in state or (key == "compensation" and not _compensates(state[key], param))
    }


def _check_state(param: Tensor, state: State, group: Mapping[str, Any]) -> None:
    check_param(param, state)
    refused = refused_precision(param, group)
    if refused is not None:
        raise RuntimeError(
            f"{refused} must be None for float64 and complex parameters, got {group[refused]!r} "
            f"for one of {param.dtype}; put it into a group of its own"
        )
    if "priorities" in state and state["priorities"].numel() != group["capacity"]:
        raise RuntimeError(
            f"capacity must stay that of the state, {state['priorities'].numel()}, got "
            f"{group['capacity']}; optimizer.resize_buffer() changes it"
        )
    for key in SCALES:
        expected = dtype_of(key, param, group)
        if key in state and state[key].dtype != expected:
            raise RuntimeError(
                f"buffer_dtype and moment_dtype must stay those of the state, whose {key!r} is "
                f"{state[key].dtype}, got {expected}; to convert a state, load its state dict into "
                "a new optimizer"
            )


def missing_state_of(
    param: Tensor, state: State, keys: tuple[str, ...], group: Mapping[str, Any]
) -> State:
    """Return what `missing_state` does, of a parameter that may be a DTensor, placed as it is."""
    return placed_as(param, missing_state(local(param), local_state(state), keys, group))


def local_state(state: State) -> State:
    """Return a state with what this process holds of its tensors."""
    if not any(isinstance(value, Tensor) and is_sharded(value) for value in state.values()):
        return state
    return {
        key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()
    }


def placed_as(param: Tensor, state: State) -> State:
    """Return a state of the local tensor of a parameter with DTensors placed as the parameter."""
    if not is_sharded(param):
        return state
    shape = local(param).shape
    return {
        key: sharded_as(value, param, SHAPED_KEYS[key])
        if key in SHAPED_KEYS and value.shape[SHAPED_KEYS[key] :] == shape
        else value
        for key, value in state.items()
    }


def _compensates(compensation: Tensor, param: Tensor) -> bool:
    """Return whether a compensation is for a parameter of this dtype, which may have been cast."""
    return compensation.dtype == param.dtype


def dtype_of(key: str, param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of a state key that has the parameter's shape."""
    if key == "compensation":
        return param.dtype
    return option_dtype(key, group) or state_dtype(param.dtype)


def new_tensor(key: str, param: Tensor, state: State, group: Mapping[str, Any]) -> Tensor:
    """Return the tensor of a state key as it is before the first step.

    Args:
        key: One of `LIST_NAMES`.
        param: The parameter.
        state: What there is of its state, whose memory order a new tensor follows; a running sum
            starts as the sum of its slots.
        group: The options: the number of slots, and dtypes.
    """
    like = state.get("exp_avg", param)
    capacity = group["capacity"]
    device = param.device
    if key == "step":
        return torch.zeros((), dtype=torch.float32, device=device)
    if key == "priorities":
        return torch.full((capacity,), -torch.inf, dtype=torch.float32, device=device)
    if key == "pending_slot":
        return torch.full((), -1, dtype=torch.int64, device=device)
    if key in SCALES.values():
        slots = (capacity,) if key == "critical_scales" else ()
        return torch.zeros((*slots, num_blocks(param.numel())), dtype=torch.float32, device=device)
    dtype = dtype_of(key, param, group)
    if key == "critical_buffer":
        return _new_buffer(like, capacity, dtype)
    if key == "compensation" and dtype not in (torch.bfloat16, torch.float16):
        return torch.zeros(0, dtype=dtype, device=device)
    shaped = torch.zeros_like(
        like, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
    )
    if key == "critical_sum" and "critical_buffer" in state:
        shaped.copy_(reference.sum_slots(dequantized(state, "critical_buffer")))
    return shaped


def _new_buffer(like: Tensor, capacity: int, dtype: torch.dtype) -> Tensor:
    slot = torch.empty_like(like, memory_format=torch.preserve_format, device="meta")
    buffer = torch.empty_strided(
        (capacity, *slot.shape),
        (like.numel(), *slot.stride()),
        dtype=dtype,
        device=like.device,
    )
    return buffer.zero_()


def unscaled(state: Mapping[str, Any]) -> State:
    """Return a state whose DTensors have no scales: values in float32 where they had.

    A process's blocks are not another mesh's. Instead of its scales, each such tensor has a scale
    of 1, without dimensions: whoever takes codes for values, or values for codes, notices.
    """
    values = dict(state)
    for key, scales in SCALES.items():
        stored = state.get(key)
        if scales in state and isinstance(stored, Tensor) and is_sharded(stored):
            held = {key: local(stored), scales: state[scales]}
            values[key] = placed_with(dequantized(held, key), stored)
            values[scales] = torch.ones((), dtype=torch.float32, device=held[key].device)
    return values


def dequantized(state: Mapping[str, Any], key: str) -> Tensor:
    """Return the values of "exp_avg", "exp_avg_sq" or "critical_buffer", of its shape.

    That is the tensor itself where it is stored as what it is computed in.
    """
    stored: Tensor = state[key]
    scales = state.get(SCALES[key]) if stored.dtype in LARGEST else None
    if key == "critical_buffer":
        return reference.load_slots(stored, scales)
    return reference.load_moment(stored, scales, signed=key == "exp_avg")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state, and of the update, of a parameter's dtype."""
    if dtype in (torch.float64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def resize_buffer(param: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """Give a state whose commits are made a buffer of a group's capacity.

    Of too many slots those with the highest keys stay, in their order, of equal ones the first.

    Args:
        param: The parameter.
        state: Its state. `critical_buffer`, its scales and `priorities` are replaced; the running
            sum is removed, to be made anew.
        group: The options of its group.
    """
    keys: Tensor = state["priorities"]
    kept = keys.argsort(descending=True, stable=True)[: group["capacity"]].sort().values
    # Unfilled slots come last, as they do in every buffer.
    new: State = {}
    for key in ("priorities", "critical_buffer", "critical_scales"):
        if key in state:
            old = local(state[key])
            new[key] = new_tensor(key, local(param), local_state(state), group)
            raw = [_as_bytes(tensor) for tensor in (new[key], old)]
            raw[0][: len(kept)].copy_(raw[1].index_select(0, kept))
    state.update(placed_as(param, new))
    state.pop("critical_sum", None)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return an 8-bit float's bytes, which more operators take."""
    return tensor.view(torch.int8) if tensor.dtype == torch.float8_e4m3fn else tensor


def param_states(state: Mapping[Any, Any]) -> list[State]:
    """Return the local states of parameters; an optimizer's state may hold other entries."""
    return [local_state(value) for key, value in state.items() if isinstance(key, Tensor)]


def commit_pending(states: list[State]) -> None:
    """Make the deferred commits of these states, so that their slots are as Algorithm 1's."""
    for_the_extension = []
    for state in states:
        if not {"pending_slot", "critical_buffer", "exp_avg"}.issubset(state):
            continue
        if state["exp_avg"].device.type == "cpu" and cpu.unavailable_reason is None:
            for_the_extension.append(state)
        else:
            reference.commit_(
                state["exp_avg"],
                state["critical_buffer"],
                state.get("critical_sum"),
                state["pending_slot"],
                state.get("critical_scales"),
                state.get("exp_avg_scales"),
            )
    _commit_in_the_extension(for_the_extension)


def commit_where_it_fits(state: State) -> None:
    """Make the deferred commit of a state, unless its buffer already has another shape.

    The buffer may have been changed before the momentum; its slot is then for the changed one.
    """
    buffer, exp_avg = state.get("critical_buffer"), state["exp_avg"]
    if isinstance(buffer, Tensor) and buffer.shape[1:] == exp_avg.shape:
        commit_pending([local_state(state)])


def _commit_in_the_extension(states: list[State]) -> None:
    # A list of the operator's has a tensor for each state, or none.
    optional = ("critical_sum", "critical_scales", "exp_avg_scales")
    batches: dict[tuple[bool, ...], list[State]] = {}
    for state in states:
        batches.setdefault(tuple(key in state for key in optional), []).append(state)
    for batch in batches.values():
        sums, slot_scales, momentum_scales = (
            [as_real(state[key]) for state in batch if key in state] for key in optional
        )
        cpu.commit_(
            [as_real(state["exp_avg"]) for state in batch],
            [as_real(state["critical_buffer"]) for state in batch],
            sums,
            [state["pending_slot"] for state in batch],
            slot_scales,
            momentum_scales,
        )


def drop_derived(states: list[State], kept: tuple[str, ...]) -> None:
    """Remove what this step would let go stale: what only another backend or option keeps.

    Args:
        states: Of the parameters.
        kept: The keys that this backend keeps.
    """
    stale = {"pending_slot", "critical_sum", "compensation"}.difference(kept)
    if not any(key in state for state in states for key in stale):
        return
    commit_pending([local_state(state) for state in states])
    for state in states:
        for key in stale:
            state.pop(key, None)


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
