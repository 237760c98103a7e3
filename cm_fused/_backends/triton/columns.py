"""The Triton step's division of work: chunks, a table's columns, what the state has.

A table has a row of int64 for each parameter, so that one launch serves any number of tensors.
`csrc/priority/table.h` holds the same columns for C++.
"""

from enum import IntEnum

import torch

# Elements of the chunks that the work is cut into: one program and one partial norm for each.
# 4096 float32 parameters are 180 kB of traffic: enough to hide the three dependent loads that find
# them, and few enough that 25 M parameters (ResNet-50) are six waves of an H200's programs.
CHUNK_SIZE = 4096

# Elements whose running sum is rebuilt in the same step: csrc/cpu/step.h's kChunkSize, so that both
# passes round at the same steps and a training has the same bits on either.
REBUILT_CHUNK_SIZE = 16384


class Column(IntEnum):
    """Column of a table: an address, 0 where there is no such tensor, a count or a dtype."""

    PARAM = 0
    GRAD = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    MAX_EXP_AVG_SQ = 4
    CRITICAL_BUFFER = 5
    CRITICAL_SUM = 6
    COMPENSATION = 7
    CRITICAL_SCALES = 8
    EXP_AVG_SCALES = 9
    EXP_AVG_SQ_SCALES = 10
    PRIORITIES = 11
    # int64 (): the slot that the momentum of the last step, or the gradient of this, is to take.
    SLOT = 12
    STEP = 13
    NUMEL = 14
    # The parameter's place in PARAM_DTYPES.
    PARAM_DTYPE = 15
    # Its place among the optimizer's parameters, which keys its random numbers.
    PARAM_INDEX = 16
    # Where its elements lie in the whole parameter (`cm_fused.philox.Places`), which keys them too.
    PLACES_OFFSET = 17
    PLACES_LENGTH = 18
    PLACES_STRIDE = 19
    # The parameter's chunks, consecutive in the order of the partial norms.
    FIRST_CHUNK = 20
    NUM_CHUNKS = 21
    # int64 (): the number of filled slots before this step's admission.
    FILLED = 22


# In the order of csrc/core/param_data.h.
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A row fills whole cache lines.
WIDTH = 24


# By the bytes of a slot's element; those of the C++ pass, so that both keep the same state.
_RUNNING_SUM_MIN_CAPACITY = {4: 3, 2: 6, 1: 10}


def running_sum_min_capacity(critical_gradients: bool, slot_bytes: int) -> int:
    """Return the capacity from which on a running sum is kept, instead of reading all slots.

    Args:
        critical_gradients: Whether the buffer holds gradients; the same for both.
        slot_bytes: Of one element of a slot.
    """
    return _RUNNING_SUM_MIN_CAPACITY[slot_bytes]
