"""The Triton step's division of work: chunks, and the columns of the address table.

A table has a row of int64 for each parameter, so that one launch serves any number of tensors.
`csrc/priority/table.h` has the same columns for C++.
"""

import torch

from cm_fused._state.table import KEYS

# Elements of the chunks that the work is cut into: one program and one partial norm for each.
# 4096 float32 parameters are 180 kB of traffic: enough to hide the three dependent loads that find
# them, and few enough that 25 M parameters (ResNet-50) are six waves of an H200's programs.
CHUNK_SIZE = 4096
# Elements whose running sum is rebuilt in the same step: csrc/cpu/step.h's kChunkSize, so that both
# passes round at the same steps and a training has the same bits on either.
REBUILT_CHUNK_SIZE = 16384

# Addresses, 0 where there is no such tensor: of the parameter, its gradient and its state. Without
# a pending slot, that column has the place for the slot of this step's gradient.
_ADDRESSES = ("param", "grad", *KEYS)
_NUMBERS = (
    "numel",
    # Its index in PARAM_DTYPES, and its gradient's times their number.
    "dtypes",
    # The key of its random bits, and where its elements lie in the full parameter.
    "param_index",
    "shard_offset",
    "shard_length",
    "shard_stride",
    # The parameter's chunks, consecutive in the order of the partial norms.
    "first_chunk",
    "num_chunks",
    # The address of an int64 (), or 0: the number of filled slots before this step's admission.
    "filled",
)
# The column of each.
COLUMNS = {name: column for column, name in enumerate((*_ADDRESSES, *_NUMBERS))}

# In the order of csrc/core/param_data.h.
PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# A row fills whole cache lines.
WIDTH = 24
if len(COLUMNS) > WIDTH:
    # Kernels would take the next parameter's first columns for a row's last ones.
    raise RuntimeError(
        f"a row of the address table must have room for {len(COLUMNS)} columns, got {WIDTH}; raise "
        "WIDTH and csrc/priority/table.h's kTableWidth"
    )
