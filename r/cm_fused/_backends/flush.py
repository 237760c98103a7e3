"""Making the deferred commits of many parameters at once."""

import torch
from torch import Tensor

from cm_fused._backends import cpu
from cm_fused._distributed import local_state
from cm_fused._state.flush import COMMIT_KEYS, flush_
from cm_fused._state.table import DERIVED_KEYS, State


def flush_all_(states: list[State]) -> None:
    """Make the deferred commits of these local states, so that their slots are as Algorithm 1's."""
    in_cpp = []
    for state in states:
        if not COMMIT_KEYS.issubset(state):
            continue
        exp_avg = state["exp_avg"]
        # A tensor of a subclass, as a fake one, may have no memory.
        is_plain = type(exp_avg) is Tensor and exp_avg.device.type == "cpu"
        if is_plain and cpu.unavailable_reason is None:
            in_cpp.append(
                {key: as_real(value) for key, value in state.items() if isinstance(value, Tensor)}
            )
        else:
            flush_(state)
    if in_cpp:
        cpu.flush_(in_cpp)


def drop_derived(states: list[State], keys: tuple[str, ...]) -> None:
    """Remove what a step that keeps `keys` would let go stale: what only others keep."""
    stale = set(DERIVED_KEYS).difference(keys)
    if not any(key in state for state in states for key in stale):
        return
    flush_all_([local_state(state) for state in states])
    for state in states:
        for key in stale:
            state.pop(key, None)


def as_real(tensor: Tensor) -> Tensor:
    """Return a tensor, or the view of pairs of a complex one."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
