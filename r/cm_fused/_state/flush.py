"""Making a deferred commit at once, so that a buffer is as Algorithm 1's."""

from cm_fused import rounding
from cm_fused._distributed import local_state
from cm_fused._state.table import State

# Without these there is nothing to commit.
COMMIT_KEYS = frozenset({"pending_slot", "critical_buffer", "exp_avg"})


def flush_(state: State) -> None:
    """Copy the momentum of a local state to its pending slot; the running sum follows.

    The form of `cm_fused::flush_registered_` for any device and dtype, with the same bits. The
    state has `COMMIT_KEYS`.
    """
    buffer, pending_slot = state["critical_buffer"], state["pending_slot"]
    critical_scales, critical_sum = state.get("critical_scales"), state.get("critical_sum")
    slot = pending_slot.clamp(min=0).reshape(1)
    item = rounding.load_moment(state["exp_avg"], state.get("exp_avg_scales"), signed=True)
    evicted = rounding.load_slot(buffer, critical_scales, slot)
    rounding.store_slot_(buffer, critical_scales, slot, pending_slot >= 0, item)
    if critical_sum is not None:
        critical_sum.add_(rounding.load_slot(buffer, critical_scales, slot) - evicted)
    pending_slot.fill_(-1)


def flush_where_it_fits_(state: State) -> None:
    """Make the deferred commit of a state, unless its buffer already has another shape.

    The buffer may have been changed before the momentum; its slot is then for the changed one.
    """
    local = local_state(state)
    if COMMIT_KEYS.issubset(local) and local["critical_buffer"].shape[1:] == local["exp_avg"].shape:
        flush_(local)
