"""Making a parameter's state: on its first step, when options change, when the buffer is resized.

State is float32, or float64 for a float64 parameter (complex likewise), unless a group's
`buffer_dtype` and `moment_dtype` say otherwise. It has the strides of its parameter where that is
dense, so that the fused backends walk both in one order.
"""

import torch
from torch import Tensor

from cm_fused._distributed import is_sharded, is_wrapper, local, local_state, sharded_as
from cm_fused._state import access
from cm_fused._state.table import (
    BUFFER_KEYS,
    DTYPE_OPTIONS,
    LEADING,
    ROWS,
    SCALES,
    Group,
    State,
    option_dtype,
    required_keys,
    shape_of,
    shapes_of,
)
from cm_fused.rounding import HALF_DTYPES, LARGEST, PACKED

LOW_PRECISION_PARAM_DTYPES = (torch.float32, *HALF_DTYPES)


def refused_precision(param: Tensor, group: Group) -> tuple[str, str] | None:
    """Return the option that a parameter cannot follow and what it must be, or None."""
    if param.dtype is torch.float16 and group["low_precision_update"] == "split":
        rule = "'nearest', 'stochastic' or 'kahan' for float16 parameters, no part of a float32"
        return "low_precision_update", rule
    if is_wrapper(param):
        # Scales are plain tensors, and those of the tensors inside may differ.
        key = next((key for key in SCALES if option_dtype(key, group) in LARGEST), None)
        if key is not None:
            rule = "a dtype without scales for tensors that wrap others, or None"
            return str(ROWS[key].dtype_option), rule
    if param.dtype in LOW_PRECISION_PARAM_DTYPES:
        return None
    asked = (name for name in DTYPE_OPTIONS if group[name] is not None)
    name = next(asked, None)
    return None if name is None else (name, "None for float64 and complex parameters")


def check_param(param: Tensor, state: State) -> None:
    """Check that a step could write a parameter and that its state, if any, fits it.

    RuntimeError where it is an expanded tensor, or a lazy conjugate or negative, or its shape or
    dtype is not its state's, or something of its state is no tensor.
    """
    if not param.is_contiguous() and torch._debug_has_internal_overlap(param) == 1:
        raise RuntimeError(
            "a parameter must not hold two elements in one place (an expanded tensor?), got shape "
            f"{tuple(param.shape)} and strides {param.stride()}; use param.contiguous()"
        )
    # torch.compile traces neither is_conj nor is_neg.
    if not torch.compiler.is_compiling() and (param.is_conj() or param.is_neg()):
        raise RuntimeError(
            "a parameter must not be a lazy conjugate or negative, got a lazy "
            f"{'conjugate' if param.is_conj() else 'negative'}; set "
            "param.data = param.data.resolve_conj().resolve_neg()"
        )
    for key in ROWS:
        if not isinstance(state.get(key, param), Tensor):
            raise RuntimeError(
                f"the state's {key!r} must be a tensor, got {type(state[key]).__name__}; change "
                "the values of the tensor, as by fill_()"
            )
    for key, leading in LEADING.items():
        # A row of some dtypes' parameters only is empty for all others.
        if ROWS[key].param_dtypes or key not in state:
            continue
        each = shapes_of(param, 1)[shape_of(key, state[key].dtype)][leading:]
        if state[key].shape[leading:] == each:
            continue
        slots = "C, " if leading else ""
        raise RuntimeError(
            f"the state's {key!r} must have the parameter's shape, "
            f"({slots}{', '.join(map(str, each))}), got {tuple(state[key].shape)}; change "
            "all tensors of the state as the parameter is changed, delete 'critical_buffer' from "
            "optimizer.state[param] to start with an empty buffer, or delete all of it"
        )
    # Moments of lower precision are those of parameters whose state is float32.
    computed = state_dtype(state["exp_avg"].dtype if "exp_avg" in state else param.dtype)
    if computed != state_dtype(param.dtype):
        raise RuntimeError(
            f"a parameter must have a dtype that fits its state of {computed}, got {param.dtype}; "
            "load state_dict() into a new optimizer to convert the state, or delete "
            "optimizer.state[param] to start anew"
        )


def missing_state(param: Tensor, state: State, keys: tuple[str, ...], group: Group) -> State:
    """Return new tensors for those of `keys` that `state` lacks; changes nothing.

    Where a part of the buffer is missing, all of it is new. RuntimeError as of `check_param`, or
    where the state's capacity or a dtype of it is not the group's, or the parameter cannot have
    state of the group's precision.
    """
    if not ("critical_buffer" in state and "priorities" in state):
        keys = (*keys, *(key for key in BUFFER_KEYS if key in state and key not in keys))
        state = {key: value for key, value in state.items() if key not in BUFFER_KEYS}
    check_param(param, state)
    refused = refused_precision(param, group)
    if refused is not None:
        name, rule = refused
        raise RuntimeError(
            f"{name} must be {rule}, got {group[name]!r} for one of {param.dtype}; put it into a "
            "group of its own"
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
    return {
        key: new_tensor(key, param, state, group)
        for key in keys
        if key not in state or _is_of_another_dtype(key, param, state[key], group)
    }


def _is_of_another_dtype(key: str, param: Tensor, value: Tensor, group: Group) -> bool:
    """Return whether a row that parameters of some dtypes have is from before a model was cast."""
    dtypes = ROWS[key].param_dtypes
    if dtypes is None:
        return False
    is_wanted = param.dtype in dtypes and param.numel() > 0
    return value.dtype != dtype_of(key, param, group) or (value.numel() > 0) != is_wanted


def missing_state_of(param: Tensor, state: State, keys: tuple[str, ...], group: Group) -> State:
    """Return what `missing_state` does, for a parameter that may be a DTensor, placed as it is."""
    return placed_as(param, missing_state(local(param), local_state(state), keys, group))


def placed_as(param: Tensor, state: State) -> State:
    """Return a state of the local tensor of a parameter with DTensors placed as the parameter."""
    if not is_sharded(param):
        return state
    shape = local(param).shape
    return {
        key: sharded_as(value, param, LEADING[key])
        if key in LEADING and value.dtype is not PACKED and value.shape[LEADING[key] :] == shape
        else value
        for key, value in state.items()
    }


def dtype_of(key: str, param: Tensor, group: Group) -> torch.dtype:
    """Return the dtype of a state key."""
    if key == "compensation":
        return param.dtype
    return ROWS[key].dtype or option_dtype(key, group) or state_dtype(param.dtype)


def new_tensor(key: str, param: Tensor, state: State, group: Group) -> Tensor:
    """Return the tensor of a key of the STATE table as it is before the first step.

    `state` is what there is of the parameter's, whose memory order it follows. A running sum starts
    as the sum of its slots.
    """
    row, capacity, dtype = ROWS[key], group["capacity"], dtype_of(key, param, group)
    if key not in LEADING or dtype is PACKED:
        size = shapes_of(param, capacity)[shape_of(key, dtype)]
        return torch.full(size, row.fill, dtype=dtype, device=param.device)
    if row.param_dtypes is not None and param.dtype not in row.param_dtypes:
        return torch.zeros(0, dtype=dtype, device=param.device)
    like = state.get("exp_avg", param)
    if key == "critical_buffer":
        if is_wrapper(like):  # whose values have no strides of their own
            return torch.zeros_like(like).new_zeros((capacity, *like.shape), dtype=dtype)
        slot = torch.empty_like(like, memory_format=torch.preserve_format, device="meta")
        size, strides = (capacity, *slot.shape), (like.numel(), *slot.stride())
        return torch.empty_strided(size, strides, dtype=dtype, device=like.device).zero_()
    shaped = torch.zeros_like(
        like, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
    )
    if key == "critical_sum" and "critical_buffer" in state:
        shaped.copy_(access.sum_slots(dequantized(state, "critical_buffer")))
    return shaped


def unscaled(state: Group) -> State:
    """Return a state whose DTensors can be gathered, without scales: float32 where they had.

    A process's blocks are not those of another mesh. Instead of its scales, each such tensor has a
    scale of 1, without dimensions: a load that takes codes for values, or values for codes, then
    finds scales of another size.
    """
    values = dict(state)
    exp_avg = state.get("exp_avg")
    if not isinstance(exp_avg, Tensor) or not is_sharded(exp_avg):
        return values
    for key, scales in SCALES.items():
        stored = state.get(key)
        if scales in state and isinstance(stored, Tensor):
            wide = dequantized(local_state(dict(state)), key)
            values[key] = sharded_as(wide, exp_avg, LEADING[key])
            values[scales] = torch.ones((), dtype=torch.float32, device=wide.device)
    remainder = state.get("master_remainder")
    if isinstance(remainder, Tensor) and is_sharded(remainder):
        # Processes cannot gather int16: neither gloo nor NCCL has it.
        wide = local(remainder).to(torch.int32)
        values["master_remainder"] = sharded_as(wide, remainder)
    return values


def dequantized(state: Group, key: str) -> Tensor:
    """Return the values of a row of `SCALES`: the tensor itself where no cast is needed.

    Packed slots lie in the memory order of the state's `exp_avg`.
    """
    stored: Tensor = state[key]
    scales = state.get(SCALES[key]) if stored.dtype in LARGEST else None
    if LEADING[key]:
        return access.load_slots(stored, scales, state["exp_avg"])
    return access.load_moment(stored, scales, signed=key == "exp_avg")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state, and of the update, of a parameter's dtype."""
    if dtype in (torch.float64, torch.complex128):
        return dtype
    return torch.complex64 if dtype.is_complex else torch.float32


def resize_buffer(param: Tensor, state: State, group: Group) -> None:
    """Give a flushed state a buffer of a group's capacity.

    If there are too many, those with the highest keys stay, in their order, the first of equals.
    `critical_buffer`, its scales and `priorities` are replaced; the running sum is removed, to be
    made anew. Without slots nothing of the buffer is left; where there was none it is new.
    """
    if group["capacity"] == 0:
        for key in BUFFER_KEYS:
            state.pop(key, None)
        return
    if "priorities" not in state:
        state.update(missing_state_of(param, state, required_keys(group), group))
        return
    keys: Tensor = state["priorities"]
    slots = keys.argsort(descending=True, stable=True)[: group["capacity"]].sort().values
    # Unfilled slots come last, as they do in every buffer.
    new: State = {}
    for key in ("priorities", "critical_buffer", "critical_scales"):
        if key in state:
            new[key] = new_tensor(key, local(param), local_state(state), group)
            resized, old = access.as_bytes(new[key]), access.as_bytes(local(state[key]))
            resized[: len(slots)].copy_(old.index_select(0, slots))
    state.update(placed_as(param, new))
    state.pop("critical_sum", None)
