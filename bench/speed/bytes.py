"""The byte model: what a step moves between memory and caches, per float32 parameter element.

Each stream a pass reads or writes counts once; what stays in a cache between two uses counts
nothing. g, θ, m and v are the gradient, the parameter and the moments, S the running sum of the
slots. Where a step is limited by memory its time is in proportion to these bytes.
"""

from dataclasses import dataclass

import torch

from bench import internals
from cm_fused.rounding import INT4

_FLOAT = 4
_DOUBLE = 8


@dataclass(frozen=True)
class Bytes:
    """Bytes per parameter element of one step."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Bytes moved."""
        return self.read + self.written

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.read + other.read, self.written + other.written)


def slot_bytes(dtype: torch.dtype) -> float:
    """Return the bytes of a slot's element. Scales, 1/64 of a byte, are not counted."""
    return 0.5 if dtype is INT4 else dtype.itemsize


def _streams(read: float, written: float) -> Bytes:
    return Bytes(_FLOAT * read, _FLOAT * written)


def adamw_fused() -> Bytes:
    """One pass: g, θ, m, v in; θ, m, v out."""
    return _streams(4, 3)


def adamw_foreach() -> Bytes:
    """Eight passes, one an operator: decay, lerp, mul, addcmul, sqrt, div, add, addcdiv."""
    return _streams(1 + 2 + 1 + 2 + 1 + 1 + 1 + 3, 8)


def _buffer(capacity: int, admits: bool) -> Bytes:
    """The buffer's part of a fused step (csrc/cpu/kernels/slots.h).

    The commit of an admission is deferred to the next step's pass, which holds m anyway: in a
    steady state each step pays for one, the last step's, with the slot alone.
    """
    if capacity == 0:
        return _streams(0, 0)
    if capacity < internals.running_sum_min_capacity():
        return _streams(capacity - 1, 1) if admits else _streams(capacity, 0)
    return _streams(2, 2) if admits else _streams(1, 0)


def _rebuild(capacity: int, admits: bool, critical_gradients: bool) -> Bytes:
    """Return the bytes that rebuilding S from the slots, once in 4 C steps, adds to a mean step."""
    if capacity < internals.running_sum_min_capacity():
        return _streams(0, 0)
    # A momentum is in its slot before the slots are summed, so that slot is not read; a gradient
    # comes after. Either way neither S nor the evicted slot is read apart.
    usual = _buffer(capacity, admits)
    read = capacity - 1 if admits and not critical_gradients else capacity
    written = 2 if admits else 1
    share = 1 / (4 * capacity)
    return Bytes(share * (_FLOAT * read - usual.read), share * (_FLOAT * written - usual.written))


def adam_cm(capacity: int, admits: bool) -> Bytes:
    """One pass: AdamW's streams and the buffer's."""
    return adamw_fused() + _buffer(capacity, admits) + _rebuild(capacity, admits, False)


def rounded(capacity: int, admits: bool, *, moment_bytes: int, slot_bytes: float) -> Bytes:
    """One pass of critical momenta whose state has low precision and whose slots are summed.

    The slot that a momentum takes is not read.

    Args:
        capacity: C.
        admits: Whether a slot is replaced.
        moment_bytes: Of an element of m and of v.
        slot_bytes: Of an element of a slot.
    """
    moments = Bytes(2 * moment_bytes, 2 * moment_bytes)
    slots = Bytes((capacity - admits) * slot_bytes, admits * slot_bytes)
    return _streams(2, 1) + moments + slots


def adam_cg(capacity: int, admits: bool) -> Bytes:
    """As `adam_cm`, after a pass that reads g for the norm of its key."""
    norm = _streams(1 if capacity else 0, 0)
    return norm + adamw_fused() + _buffer(capacity, admits) + _rebuild(capacity, admits, True)


def triton_pass(
    amsgrad: bool,
    summed_slots: int,
    *,
    param_bytes: int,
    grad_bytes: int,
    state_bytes: int,
    moment_bytes: int,
    slot_bytes: float,
    rounding_bytes: int = 0,
) -> Bytes:
    """Loads and stores of the Triton pass where it replaces a slot (_backends/triton/kernels.py).

    Where slots are summed, the load of the one that is replaced by a momentum is counted: it is
    issued, and switched off when the step runs.

    Args:
        amsgrad: Whether there is a maximum of v.
        summed_slots: Slots that are summed, 0 where there is a running sum, -1 without a buffer.
        param_bytes: Of an element of θ.
        grad_bytes: Of an element of g.
        state_bytes: Of an element of the maximum and of the running sum.
        moment_bytes: Of an element of m and of v.
        slot_bytes: Of an element of a slot.
        rounding_bytes: Of an element of what rounding θ leaves: compensation or master_remainder.
    """
    both_ways = (2 * moment_bytes) + (state_bytes if amsgrad else 0) + rounding_bytes
    if summed_slots < 0:
        buffer = Bytes(0, 0)
    elif summed_slots:
        buffer = Bytes(summed_slots * slot_bytes, slot_bytes)
    else:
        # The running sum is read and written, the evicted slot is read.
        buffer = Bytes(state_bytes + slot_bytes, state_bytes + slot_bytes)
    read = param_bytes + grad_bytes + both_ways
    return Bytes(read, param_bytes + both_ways) + buffer


def triton(capacity: int, admits: bool, critical_gradients: bool) -> Bytes:
    """A step of the Triton backend, float32: the pass, and what comes before and now and then.

    Critical gradients take the norm in a pass that reads g. Once in 4 C steps a chunk's slots are
    read and its sum is written, before the pass reads it.
    """
    running = capacity >= internals.running_sum_min_capacity()
    if running:
        buffer = _streams(2, 2) if admits else _streams(1, 0)
        share = 1 / (4 * capacity)
        rebuild = _streams(share * capacity, share)
    else:
        # The slot a momentum takes is not read; a gradient's is, for this step's sum.
        replaced = 1 if admits and not critical_gradients else 0
        buffer = _streams(capacity - replaced, 1 if admits else 0)
        rebuild = _streams(0, 0)
    norm = _streams(1 if critical_gradients else 0, 0)
    return norm + adamw_fused() + buffer + rebuild


def eager(capacity: int, admits: bool) -> Bytes:
    """The reference: a pass an operator, whether it admits or writes the slot back unchanged."""
    norm = Bytes(_FLOAT + _DOUBLE, _DOUBLE)  # of a float64 copy
    mean = _streams(capacity + 1, 2)
    moments = _streams(1 + 2 + 2 + 1 + 1 + 2, 6)
    update = _streams(1 + 1 + 1 + 2 + 1 + 2 + 1, 7)
    admission = _streams(1 + 2 + 1, 3)
    return norm + mean + moments + update + admission


def compiled(capacity: int, admits: bool) -> Bytes:
    """The reference as well fused as it can be, the norm and the slot in passes of their own."""
    norm = _streams(1, 0)
    update = _streams(4 + capacity, 3)
    admission = _streams(2, 1)
    return norm + update + admission
