"""The priorities of CUDA devices' parameters: which kernel updates them, and its launches."""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from cm_fused._backends import library
from cm_fused._backends.triton import common as triton_common
from cm_fused._backends.triton import norms as triton_norms
from cm_fused._backends.triton.calls import Calls
from cm_fused._backends.triton.tables import Tables
from cm_fused._bucket import Bucket


def priority_kernel(device: torch.device) -> str:
    """Return what updates the priorities on a device: "CUDA", "C++" or "Triton"."""
    if device.type == "cpu":
        return "Triton" if library.unavailable_reason is not None else "C++"
    if device.type == "cuda" and library.cuda_unavailable_reason is None:
        return "CUDA"
    return "Triton"


def update_priorities_of_table_(
    table: Tensor,  # int64 (params, `WIDTH`); keys, slots, steps and filled slots are changed
    chunk_sq_norms: Tensor,  # the sum of g^2 of each chunk, float64 (chunks,)
    sq_norm: Tensor | None,  # over the scope, float64 () or (params,), if not that of these chunks
    found_inf: Tensor | None,  # float64 (); where it is not 0 nothing is changed
    *,
    capacity: int,
    priority_decay: float,
    group_scope: bool,  # whether every key is the norm over the group, or each over its tensor
    calls: Calls | None = None,  # of earlier launches
) -> None:
    """Update the priorities: cm_fused::update_priorities_ where its kernel is not built."""
    if not len(table):
        return
    calls = calls or Calls()
    if not capacity:
        kernel = triton_norms.count_steps_kernel
        calls.launch(
            kernel, len(table), (table, found_inf), (), lambda: triton_common.LAUNCH_OPTIONS
        )
        return
    if group_scope and sq_norm is None:
        sq_norm = chunk_sq_norms.sum()
    block = {"CAPACITY_BLOCK": triton.next_power_of_2(capacity), **triton_common.LAUNCH_OPTIONS}
    stride = 0 if sq_norm is None or sq_norm.numel() == 1 else 1
    calls.launch(
        triton_norms.update_priorities_kernel,
        len(table),
        (table, chunk_sq_norms, sq_norm, found_inf),
        (stride, capacity, float(priority_decay)),
        lambda: block,
    )


def update_priorities_of_bucket_(
    tables: Tables, table: Tensor, bucket: Bucket, sq_norm: Tensor | None, found_inf: Tensor | None
) -> None:
    in_triton = priority_kernel(bucket.device) == "Triton"
    kernel: Any = torch.ops.cm_fused.update_priorities_
    if in_triton:
        kernel = partial(update_priorities_of_table_, calls=tables.calls)
    kernel(
        table,
        tables.chunk_sq_norms,
        sq_norm,
        found_inf,
        capacity=bucket.capacity,
        priority_decay=bucket.options.priority_decay,
        group_scope=bucket.options.priority_scope == "group",
    )
