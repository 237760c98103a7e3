"""The parts of the package's inside that the benches use; all else they use is public.

The machine code's bench reads the Triton kernels' sources besides (`bench.machine_code.variants`).
"""

from cm_fused._backends import cpu
from cm_fused._backends.triton.columns import CHUNK_SIZE as TRITON_CHUNK_SIZE
from cm_fused._state.table import RUNNING_SUM_MIN_CAPACITY

__all__ = ["TRITON_CHUNK_SIZE", "instruction_set", "running_sum_min_capacity"]


def instruction_set() -> str:
    """Return the instruction set that the C++ kernels use here; "none" without the library."""
    return cpu.capability() if cpu.unavailable_reason is None else "none"


def running_sum_min_capacity() -> int:
    """Return the capacity from which the fused passes keep the sum of float32 slots."""
    return RUNNING_SUM_MIN_CAPACITY[4]
