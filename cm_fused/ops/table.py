"""The Triton step's division of work: chunks, a table's columns, what the state has.

A table has a row of int64 for each parameter, so that one launch serves any number of tensors.
`csrc/table.h` holds the same columns for C++.
"""

from enum import IntEnum

import torch

# Elements of the chunks that the work is cut into: one program and one partial norm for each.
# 4096 float32 parameters are 180 kB of traffic: enough to hide the three dependent loads that find
# them, and few enough that 25 M parameters (ResNet-50) are six waves of an H200's programs.
CHUNK_SIZE = 4096


class Column(IntEnum):
    """Column of a table: an address, 0 where there is no such tensor, a count or a dtype."""

    PARAM = 0
    GRAD = 1
    EXP_AVG = 2
    EXP_AVG_SQ = 3
    MAX_EXP_AVG_SQ = 4
    CRITICAL_BUFFER = 5
    CRITICAL_SUM = 6
    PRIORITIES = 7
    # int64 (): the slot that the momentum of the last step, or the gradient of this, is to take.
    SLOT = 8
    STEP = 9
    NUMEL = 10
    # The parameter's place in PARAM_DTYPES.
    PARAM_DTYPE = 11
    # The parameter's chunks, consecutive in the order of the partial norms.
    FIRST_CHUNK = 12
    NUM_CHUNKS = 13
    # int64 (): the number of filled slots before this step's admission.
    FILLED = 14


# In the order of csrc/param_data.h.
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A row fills whole cache lines.
WIDTH = 16


def running_sum_min_capacity(critical_gradients: bool) -> int:
    """Return the capacity from which on keeping the slots' sum takes fewer bytes than reading them.

    44 an element against 28 + 4 C for momenta, 48 against 36 + 4 C for gradients (float32).
    """
    return 4 if critical_gradients else 5
