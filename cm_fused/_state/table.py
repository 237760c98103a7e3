"""The STATE table: one row for each tensor that a parameter's state can have.

Making, loading and checking state, a `Bucket`'s lists, what an undone step restores, the columns of
the Triton step's address table and the argument order of the C++ operators all derive from it.
`csrc/core/param_data.h` has the same rows in the same order; loading the library compares them.
"""

from collections.abc import Iterable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

import torch

from cm_fused.rounding import HALF_DTYPES, INT4, LARGEST, PACKED, num_blocks, stored_numel

State = dict[str, Any]
Group = Mapping[str, Any]


class Shape(Enum):
    """The shape of a state tensor, by that of its parameter and the capacity C."""

    PARAM = auto()  # (*shape)
    SLOTS = auto()  # (C, *shape)
    PACKED_SLOTS = auto()  # (C, bytes): of slots that are packed, whose row has the shape SLOTS
    SCALES = auto()  # (blocks,)
    SLOT_SCALES = auto()  # (C, blocks)
    KEYS = auto()  # (C,)
    SCALAR = auto()  # ()


class Row(NamedTuple):
    """One state tensor."""

    key: str  # its name in a parameter's state
    shape: Shape
    dtype: torch.dtype | None = None  # None: that of `dtype_option`, else the update's
    dtype_option: str | None = None  # the option that chooses its dtype
    scales: str | None = None  # the key of its scales, where its dtype has such
    # The option that needs it, and the option's value; None: every backend needs it.
    option: tuple[str, Any] | None = None
    # The dtypes of the parameters that have it; of others it is empty. None: all have it.
    param_dtypes: tuple[torch.dtype, ...] | None = None
    fill: float = 0.0  # what a new one is filled with
    in_buffer: bool = False  # part of the buffer, which is new as a whole or not at all
    # It follows from the other rows: only some backends or options keep it, and it goes stale when
    # a step of others is taken.
    is_derived: bool = False


# In the order of the C++ operators' arguments and of the address table's columns.
STATE = (
    Row("exp_avg", Shape.PARAM, dtype_option="moment_dtype", scales="exp_avg_scales"),
    Row("exp_avg_sq", Shape.PARAM, dtype_option="moment_dtype", scales="exp_avg_sq_scales"),
    # It keeps its precision: a maximum of rounded values would only grow.
    Row("max_exp_avg_sq", Shape.PARAM, option=("amsgrad", True)),
    Row(
        "critical_buffer",
        Shape.SLOTS,
        dtype_option="buffer_dtype",
        scales="critical_scales",
        in_buffer=True,
    ),
    # The running sum of the slots, where a backend keeps one.
    Row("critical_sum", Shape.PARAM, in_buffer=True, is_derived=True),
    # What rounding took from a half-precision parameter, in the parameter's dtype.
    Row(
        "compensation",
        Shape.PARAM,
        option=("low_precision_update", "kahan"),
        param_dtypes=HALF_DTYPES,
        is_derived=True,
    ),
    # The last 16 bits of a bfloat16 parameter's float32 master (`cm_fused.rounding.join_master`).
    Row(
        "master_remainder",
        Shape.PARAM,
        torch.int16,
        option=("low_precision_update", "split"),
        param_dtypes=(torch.bfloat16,),
        is_derived=True,
    ),
    Row("critical_scales", Shape.SLOT_SCALES, torch.float32, in_buffer=True),
    Row("exp_avg_scales", Shape.SCALES, torch.float32),
    Row("exp_avg_sq_scales", Shape.SCALES, torch.float32),
    # -inf where a slot is unfilled.
    Row("priorities", Shape.KEYS, torch.float32, fill=-torch.inf, in_buffer=True),
    # The slot that exp_avg is still to be copied to, or -1, where a backend defers the commit.
    Row(
        "pending_slot",
        Shape.SCALAR,
        torch.int64,
        fill=-1,
        in_buffer=True,
        is_derived=True,
    ),
    Row("step", Shape.SCALAR, torch.float32),
)
ROWS = {row.key: row for row in STATE}
KEYS = tuple(ROWS)
SCALES = {row.key: row.scales for row in STATE if row.scales is not None}
BUFFER_KEYS = tuple(row.key for row in STATE if row.in_buffer)
DERIVED_KEYS = tuple(row.key for row in STATE if row.is_derived)
# The dimensions in front of the parameter's, of the rows that have its shape.
LEADING = {
    row.key: int(row.shape is Shape.SLOTS)
    for row in STATE
    if row.shape in (Shape.PARAM, Shape.SLOTS)
}
# What only some backends keep.
_BY_BACKEND = {row.key for row in STATE if row.is_derived and row.option is None}
# What all backends need, under the options that ask for it. Scales are not here: they come with the
# dtype.
_NEEDED = tuple(row for row in STATE if row.key not in _BY_BACKEND | set(SCALES.values()))

# The capacity from which keeping the sum of the slots costs no more bytes than reading them, by the
# bytes of a slot's element. Besides what both move, with b bytes an element: C b against 8 for the
# sum and 2 b for a slot; on a CPU a slot that is written must be fetched first. Measured against
# fused AdamW at C = 1, 2, 3, 4 (30 M float32, two cores of a Zen 4): reading 1.35, 1.65,
# 1.92, 2.24; running sum 1.73 for each. Of 2 and of 1 byte at C = 5 (two cores of a Xeon): reading
# 1.67 to 1.72 and 1.37 to 1.41, running sum 1.70 to 1.99 and 1.37 to 1.45. A GPU would gain 4 bytes
# an element at C = 3 of float32 by reading; one table for all keeps the bits of all backends equal.
# int4 would have 18. A sum saves 0.5 C - 9 bytes a step there, and takes 4 bytes of state: from 26
# slots on it saves as many as it takes. C = 20, which the paper uses too, reads its slots.
RUNNING_SUM_MIN_CAPACITY = {4: 3, 2: 6, 1: 10, 0.5: 26}


# The options that are dtypes, or names of dtypes: those of slots and of moments.
DTYPE_OPTIONS = ("buffer_dtype", "moment_dtype")


def as_dtype(option: Any) -> Any:
    """Return the dtype of a name such as "int8" or "torch.int8"; any other value as it is."""
    if not isinstance(option, str):
        return option
    dtype = getattr(torch, option.removeprefix("torch."), None)
    # "half" and "float" are names of other dtypes' too.
    is_name = isinstance(dtype, torch.dtype) and str(dtype).endswith(f".{option.split('.')[-1]}")
    return dtype if is_name else option


def option_dtype(key: str, group: Group) -> torch.dtype | None:
    """Return the dtype that a group's options give a state key; None if the parameter decides.

    int4 is stored as `PACKED`.
    """
    option = ROWS[key].dtype_option
    dtype: torch.dtype | None = as_dtype(group[option]) if option is not None else None
    return PACKED if dtype is INT4 else dtype


def required_keys(group: Group) -> tuple[str, ...]:
    """Return the state keys that every backend needs under a group's options."""
    needed = [
        row
        for row in _NEEDED
        if (row.option is None or group[row.option[0]] == row.option[1])
        and not (row.in_buffer and group["capacity"] == 0)
    ]
    scales = [
        row.scales
        for row in needed
        if row.scales is not None and option_dtype(row.key, group) in LARGEST
    ]
    return (*(row.key for row in needed), *scales)


def fused_keys(group: Group, *, critical_gradients: bool) -> tuple[str, ...]:
    """Return the state keys that the fused backends keep besides: a running sum, a pending slot."""
    if group["capacity"] == 0:
        return ()
    dtype = option_dtype("critical_buffer", group) or torch.float32
    slot_bytes = 0.5 if dtype is PACKED else dtype.itemsize
    sums = group["capacity"] >= RUNNING_SUM_MIN_CAPACITY[slot_bytes]
    running_sum = ("critical_sum",) if sums else ()
    return running_sum if critical_gradients else (*running_sum, "pending_slot")


def shapes_of(param: torch.Tensor, capacity: int) -> dict[Shape, tuple[int, ...]]:
    """Return the shapes of a parameter's state tensors."""
    shape, blocks = tuple(param.shape), num_blocks(param.numel())
    return {
        Shape.PARAM: shape,
        Shape.SLOTS: (capacity, *shape),
        Shape.PACKED_SLOTS: (capacity, stored_numel(param.numel(), PACKED)),
        Shape.SCALES: (blocks,),
        Shape.SLOT_SCALES: (capacity, blocks),
        Shape.KEYS: (capacity,),
        Shape.SCALAR: (),
    }


def shape_of(key: str, dtype: torch.dtype) -> Shape:
    """Return the shape of a state key's tensor of a dtype."""
    shape = ROWS[key].shape
    return Shape.PACKED_SLOTS if shape is Shape.SLOTS and dtype is PACKED else shape


def mask_of(keys: Iterable[str]) -> int:
    """Return the mask by which the operators know which rows there are: bit r is row r's."""
    present = set(keys)
    return sum(1 << index for index, key in enumerate(KEYS) if key in present)


def keys_of(mask: int) -> list[str]:
    """Return the keys whose bits a mask has, in the order of the rows."""
    return [key for index, key in enumerate(KEYS) if mask >> index & 1]
