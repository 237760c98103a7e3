"""What the pass is compiled for: its compile-time arguments, and the launch options of each."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from cm_fused._backends.triton import layout
from cm_fused._backends.triton.common import (
    BLOCK_SIZE,
    INTERPRETED,
    LAUNCH_OPTIONS,
    NUM_WARPS,
    TAIL_BLOCK_SIZE,
)
from cm_fused.rounding import BLOCK_SIZE as SCALE_BLOCK_SIZE
from cm_fused.rounding import HALF_DTYPES, PACKED

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# State that is stored otherwise than it is computed with; 8-bit floats as their bytes, int4 under
# the name that the kernels have for it.
STORED_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.uint8,
    torch.int8: tl.int8,
    PACKED: layout.INT4,
}
# The SUMMED_SLOTS of a capacity of 0.
NO_BUFFER = tl.constexpr(-1)


def precision(
    param_dtype: torch.dtype,
    moment_dtype: torch.dtype,
    slot_dtype: torch.dtype,
    low_precision_update: str,
) -> dict[str, Any]:
    """Return the pass's compile-time arguments of how state and parameters are stored."""
    half = param_dtype in HALF_DTYPES
    update_dtype = tl.float64 if param_dtype == torch.float64 else tl.float32
    return {
        "MOMENT_DTYPE": STORED_DTYPES.get(moment_dtype, update_dtype),
        "SLOT_DTYPE": STORED_DTYPES.get(slot_dtype, update_dtype),
        "STOCHASTIC": half and low_precision_update == "stochastic",
        "KAHAN": half and low_precision_update == "kahan",
        "SPLIT": has_masters(param_dtype, low_precision_update),
    }


def has_masters(param_dtype: torch.dtype, low_precision_update: str) -> bool:
    """Return whether parameters of a dtype are parts of float32 masters."""
    return param_dtype is torch.bfloat16 and low_precision_update == "split"


def launch_options(
    param_dtype: tl.dtype,
    moment_dtype: tl.dtype,
    slot_dtype: tl.dtype,
    amsgrad: bool,
    summed_slots: int,
) -> dict[str, Any]:
    """Return the launch options of the pass for CUDA devices.

    Left alone ptxas takes 48 to 64 registers and spills some in the variant most used (triton 3.6,
    AdamCM in float32 on sm_90 and sm_100). Given a number it uses them: with these, at half of a
    multiprocessor's warps for float32, none of the 224 forms of bench.machine_code for sm_80 and
    sm_90 spills.
    bfloat16 and float16 slots spill 40 to 112 bytes a thread at 80 registers, none at 96. Where
    there are scales a thread has eight elements, not four: 24 to 168 bytes are spilled at 128, none
    at 168, which let three programs run beside each other. Those have more bytes in flight, 64 kB a
    multiprocessor with int8 slots, than five programs of four elements a thread.
    """
    if param_dtype == tl.float64:
        return LAUNCH_OPTIONS
    if moment_dtype == tl.int8 or layout.has_scales(slot_dtype):
        return {**LAUNCH_OPTIONS, "maxnreg": 168}
    if moment_dtype != tl.float32 or slot_dtype != tl.float32:
        return {**LAUNCH_OPTIONS, "maxnreg": 96}
    half = param_dtype != tl.float32
    if half and summed_slots == 4:
        return {**LAUNCH_OPTIONS, "maxnreg": 80}
    return {**LAUNCH_OPTIONS, "maxnreg": 72 if half or amsgrad else 64}


@dataclass(frozen=True)
class Variant:
    """The compile-time arguments of `critical_adam_kernel`, and how a chunk is walked through."""

    PARAM_DTYPE: tl.dtype
    GRAD_DTYPE: tl.dtype
    STATE_DTYPE: tl.dtype
    MOMENT_DTYPE: tl.dtype
    slot_dtype: tl.dtype | str
    CRITICAL_GRADIENTS: bool
    AMSGRAD: bool
    SUMMED_SLOTS: int
    STOCHASTIC: bool
    KAHAN: bool
    SPLIT: bool
    BY_FOURS: bool
    PTX: bool
    FULL: bool = False  # the chunk has CHUNK_SIZE elements, and every tensor is aligned
    ALIGNED_SLOTS: bool = False  # so is every slot
    shape: tuple[int, ...] = ()  # of the elements that are worked on at a time

    # Kernels pass these on. Triton 3.6 takes a tuple for run-time numbers, and no name at all.
    @property
    def SHAPE(self) -> Any:  # noqa: N802
        """Return the shape of a block."""
        return self.shape if INTERPRETED else tl.constexpr(self.shape)

    @property
    def SLOT_DTYPE(self) -> Any:  # noqa: N802
        """Return the dtype of the slots."""
        return self.slot_dtype if INTERPRETED else tl.constexpr(self.slot_dtype)

    @property
    def HAS_BUFFER(self) -> bool:  # noqa: N802
        """Return whether there are slots."""
        return self.SUMMED_SLOTS >= 0

    @property
    def HAS_PLAIN_SLOTS(self) -> bool:  # noqa: N802
        """Return whether there are slots, and none of words, which must be aligned."""
        return self.HAS_BUFFER and not layout.has_scales(self.slot_dtype)

    @property
    def BLOCK(self) -> int:  # noqa: N802
        """Return how many elements those are."""
        return prod(self.shape)

    def of_chunk(self, full: bool, aligned_slots: bool) -> "Variant":
        """Return the variant with its block: of a warp for each scale, if there are scales."""
        if self.MOMENT_DTYPE == tl.int8 or layout.has_scales(self.slot_dtype):
            warps = NUM_WARPS if not INTERPRETED else BLOCK_SIZE // SCALE_BLOCK_SIZE
            vector = 4 if full else 1
            shape: tuple[int, ...] = (SCALE_BLOCK_SIZE // (32 * vector), warps, 32, vector)
        else:
            shape = (BLOCK_SIZE if full else TAIL_BLOCK_SIZE,)
        return replace(self, FULL=full, ALIGNED_SLOTS=aligned_slots, shape=shape)


@triton.constexpr_function
def make_variant(*arguments):
    """Return the variant of these arguments."""
    return Variant(*arguments)


@triton.constexpr_function
def of_chunk(variant, full, aligned_slots):
    """Return the variant of a chunk, by whether it is full, and aligned with its slots."""
    return variant.of_chunk(full, aligned_slots)
