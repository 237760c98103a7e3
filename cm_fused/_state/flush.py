"""Making a deferred commit at once, so that a buffer is as Algorithm 1's."""

from cm_fused._distributed import local_state
from cm_fused._state import access
from cm_fused._state.table import State, shape_of, shapes_of

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
    item = access.load_moment(state["exp_avg"], state.get("exp_avg_scales"), signed=True)
    exp_avg = state["exp_avg"]
    evicted = access.load_slot(buffer, critical_scales, slot, exp_avg)
    access.store_slot_(buffer, critical_scales, slot, pending_slot >= 0, item, exp_avg)
    if critical_sum is not None:
        stored = access.load_slot(buffer, critical_scales, slot, exp_avg)
        critical_sum.add_(stored - evicted)
    pending_slot.fill_(-1)


def flush_where_it_fits_(state: State) -> None:
    """Make the deferred commit of a state, unless its buffer already has another shape.

    The buffer may have been changed before the momentum; its slot is then for the changed one.
    """
    local = local_state(state)
    if not COMMIT_KEYS.issubset(local):
        return
    buffer, exp_avg = local["critical_buffer"], local["exp_avg"]
    if buffer.shape == shapes_of(exp_avg, len(buffer))[shape_of("critical_buffer", buffer.dtype)]:
        flush_(local)
