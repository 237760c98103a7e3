"""The Triton step: launches of `cm_fused._backends.triton.kernels` and of the priority kernel.

A step of critical momenta is one pass over all chunks of all tensors of a dtype, which leaves the
gradient's norm in parts, and one launch that updates the priorities from them; critical gradients
take the norm first, in a pass of its own. No launch depends on a value of the device.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from cm_fused._backends.overlap import have_overlap
from cm_fused._backends.triton import common as triton_common
from cm_fused._backends.triton import kernels as triton_kernels
from cm_fused._backends.triton import norms as triton_norms
from cm_fused._backends.triton.calls import Pointers
from cm_fused._backends.triton.placed import placed_tensors
from cm_fused._backends.triton.priorities import priority_kernel, update_priorities_of_bucket_
from cm_fused._backends.triton.tables import Chunks, Tables
from cm_fused._backends.triton.variants import (
    NO_BUFFER,
    TRITON_DTYPES,
    has_masters,
    launch_options,
    precision,
)
from cm_fused._bucket import Batch, Bucket, StepOptions, over_scope
from cm_fused._devices import to_device


def unavailable_reason(device: torch.device) -> str | None:
    """Return why this backend cannot step parameters on a device, or None."""
    if triton_common.INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 interprets kernels on the CPU"
    if device.type not in ("cuda", "xpu"):
        return f"Triton compiles for CUDA, ROCm and XPU devices, got {device}"
    return None


def describe(device: torch.device) -> str:
    """Return what is at work on a device."""
    return f"triton on {device.type} with the {priority_kernel(device)} priority kernel"


def prepare(batch: Batch) -> Callable[[], None]:
    """Prepare the step of a batch, and return what launches it.

    It is that of `cm_fused.reference`; of critical momenta the commit is deferred to the next. What
    can fail, allocations included, comes before the first launch.
    """
    batch.split_gradients()
    sq_norms = [_sq_norm_of(bucket) for bucket in batch.buckets]
    launchers = _launchers(batch.buckets)
    return partial(_launch_, list(zip(launchers, sq_norms, strict=True)))


def _launchers(buckets: list[Bucket]) -> list["_Launcher"]:
    """Prepare the launches of some buckets; find parameters that overlap where one has moved."""
    launchers = [_Launcher(bucket, bucket.options) for bucket in buckets]
    if any(launcher.may_have_moved() for launcher in launchers):
        params = chain.from_iterable(bucket.params for bucket in buckets)
        one_by_one = have_overlap(params)
        for launcher in launchers:
            launcher.tables.one_by_one = one_by_one
            launcher.tables.changed = False
    return launchers


def _sq_norm_of(bucket: Bucket) -> Tensor | None:
    """Return the sum over the priority scope where the kernels, which add up squares, cannot."""
    options = bucket.options
    in_squares = not options.sum_of_norms or options.priority_scope == "tensor"
    if bucket.sq_norm is None and bucket.capacity and not in_squares:
        return over_scope(sq_norms(bucket, options), options)
    return bucket.sq_norm


def _launch_(prepared: list[tuple["_Launcher", Tensor | None]]) -> None:
    for launcher, sq_norm in prepared:
        if launcher.bucket.critical_gradients and launcher.bucket.capacity and sq_norm is None:
            # The gradient is gone by the next step: its norm comes first, so that it can be stored
            # at once.
            with _device_guard(launcher.bucket.device):
                launcher.sq_norms()
    for launcher, sq_norm in prepared:
        with _device_guard(launcher.bucket.device):
            if launcher.bucket.critical_gradients:
                launcher.update_priorities(sq_norm)
                launcher.update()
            else:
                launcher.update()
                launcher.update_priorities(sq_norm)


def update_(batch: Batch) -> list[Tensor]:
    """Step critical momenta without their priorities; return each gradient's sum of squares."""
    batch.split_gradients()
    sq_norms = []
    for launcher in _launchers(batch.buckets):
        with _device_guard(launcher.bucket.device):
            launcher.update()
            sq_norms.append(launcher.tensor_sq_norms())
    return sq_norms


def update_priorities_(batch: Batch) -> None:
    """Update the priorities that `update_` left; the commit is deferred to the next step."""
    for bucket in batch.buckets:
        tables: Tables = bucket.registered
        assert tables.last is not None
        found_inf = _on_device(bucket.options.found_inf, bucket.device)
        with _device_guard(bucket.device):
            update_priorities_of_bucket_(tables, tables.last, bucket, bucket.sq_norm, found_inf)


def last_sq_norms(batch: Batch) -> list[Tensor]:
    """Return what the sums of squares of the last step's gradients add up from."""
    return [bucket.registered.chunk_sq_norms for bucket in batch.buckets]


def sq_norms(bucket: Bucket, options: StepOptions) -> Tensor:
    """Return the sum of the squares of each of the bucket's gradients, float64 (params,)."""
    launcher = _Launcher(bucket, options)
    with _device_guard(bucket.device):
        launcher.sq_norms()
        return launcher.tensor_sq_norms()


class _Launcher:
    """One step's launches, for which the bucket's device must be the current one."""

    def __init__(self, bucket: Bucket, options: StepOptions) -> None:
        self.bucket = bucket
        self._options = options
        self._device = bucket.device
        self._capacity = bucket.capacity
        self._lr_ptr, self._lr = _lr(options, self._device)
        self._grad_factor = _on_device(options.grad_factor, self._device)
        self._found_inf = _on_device(options.found_inf, self._device)
        self._placed = placed_tensors(bucket)
        self.tables = self._placed.tables

    def may_have_moved(self) -> bool:
        """Return whether a parameter may lie elsewhere than at the last step.

        The table knows a copy's address alone, which may be the one that its parameter left.
        """
        return self.tables.changed or bool(self._placed.param_copies)

    def update(self) -> None:
        """Launch the pass that changes moments, buffers and parameters."""
        params, copies = self.bucket.params, self._placed.param_copies
        if self.tables.one_by_one:
            for i, chunks in self.tables.launches_one_by_one():
                # Another parameter's step may have changed this one.
                _copy_(copies[i : i + 1], params[i : i + 1])
                self._update_chunks([chunks])
                _copy_(params[i : i + 1], copies[i : i + 1])
        else:
            self._update_chunks(self.tables.launches)
            _copy_(params, copies)
        torch.autograd.graph.increment_version(params)

    def _update_chunks(self, launches: list[Chunks]) -> None:
        options = self._options
        pointers = self._lr_ptr, self._grad_factor, self._found_inf
        scalars = (
            self._lr,
            options.beta1,
            options.beta2,
            *_eps(options),
            *_weight_decays(options),
            _sign(options),
            self._capacity,
            int(options.buffer_mean == "capacity"),
            options.seed,
        )
        for chunks in launches:
            kernel = triton_kernels.critical_adam_kernel
            self._launch(kernel, chunks, pointers, scalars, partial(self._pass_options, chunks))

    def sq_norms(self) -> None:
        """Launch the pass that only reads the gradients, for the sum of g^2 of each chunk."""
        scalars = _weight_decays(self._options)[0], _sign(self._options)
        for chunks in self.tables.launches:
            kernel, options = triton_norms.sq_norm_kernel, partial(self._norm_options, chunks)
            self._launch(kernel, chunks, (self._grad_factor,), scalars, options)

    def _norm_options(self, chunks: Chunks) -> dict[str, Any]:
        split = has_masters(chunks.param_dtype, self._options.low_precision_update)
        return {**_dtype_options(chunks), "SPLIT": split}

    def tensor_sq_norms(self) -> Tensor:
        """Return the sum of g^2 of each parameter, after a pass that took those of the chunks."""
        table = self._placed.table
        result = torch.empty(len(table), dtype=torch.float64, device=self._device)
        if len(table):
            pointers = table, self.tables.chunk_sq_norms, result
            kernel = triton_norms.tensor_sq_norms_kernel
            self.tables.calls.launch(kernel, len(table), pointers, (), _launch_options)
        return result

    def update_priorities(self, sq_norm: Tensor | None) -> None:
        """Launch the priority kernel on the norms of the pass before, or on a given sum."""
        table = self._placed.table
        update_priorities_of_bucket_(self.tables, table, self.bucket, sq_norm, self._found_inf)

    def _launch(
        self,
        kernel: Any,
        chunks: Chunks,
        pointers: Pointers,
        scalars: tuple[float, ...],
        options: Callable[[], dict[str, Any]],
    ) -> None:
        programs = len(chunks.chunks)
        if programs:
            pointers = self._placed.table, chunks.chunks, chunks.sq_norms, *pointers
            chunks.calls.launch(kernel, programs, pointers, scalars, options)

    def _pass_options(self, chunks: Chunks) -> dict[str, Any]:
        bucket = self.bucket
        amsgrad = bool(bucket["max_exp_avg_sq"])
        summed_slots, slots = _summed_slots(bucket), bucket["critical_buffer"]
        stored = bucket["exp_avg"][0].dtype, slots[0].dtype if slots else torch.float32
        dtypes = precision(chunks.param_dtype, *stored, self._options.low_precision_update)
        options = _dtype_options(chunks)
        compiles_ptx = _compiles_ptx(self._device)
        if compiles_ptx:
            options |= launch_options(
                options["PARAM_DTYPE"],
                dtypes["MOMENT_DTYPE"],
                dtypes["SLOT_DTYPE"],
                amsgrad,
                summed_slots,
            )
        return {
            **options,
            **dtypes,
            "CRITICAL_GRADIENTS": bucket.critical_gradients,
            "AMSGRAD": amsgrad,
            "SUMMED_SLOTS": summed_slots,
            "BY_FOURS": self.tables.by_fours,
            "PTX": compiles_ptx,
        }


def _summed_slots(bucket: Bucket) -> int:
    if not bucket.capacity:
        return int(NO_BUFFER.value)
    return 0 if bucket["critical_sum"] else bucket.capacity


def _launch_options() -> dict[str, Any]:
    return triton_common.LAUNCH_OPTIONS


def _dtype_options(chunks: Chunks) -> dict[str, Any]:
    """Return the launch options, and the dtypes of a chunk's tensors and arithmetic."""
    dtypes = {
        "PARAM_DTYPE": TRITON_DTYPES[chunks.param_dtype],
        "GRAD_DTYPE": TRITON_DTYPES[chunks.grad_dtype],
        "STATE_DTYPE": tl.float64 if chunks.param_dtype is torch.float64 else tl.float32,
    }
    return triton_common.LAUNCH_OPTIONS | dtypes


def _compiles_ptx(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and not triton_common.INTERPRETED


def _sign(options: StepOptions) -> float:
    return -1.0 if options.maximize else 1.0


def _lr(options: StepOptions, device: torch.device) -> tuple[Tensor | None, float]:
    """Return the learning rate as an address or as a number; never waits for a device."""
    lr = options.lr
    if not isinstance(lr, Tensor):
        return None, float(lr)
    if lr.device == device or lr.device.type != "cpu":
        return to_device(lr, device), 0.0
    return None, float(lr)


def _on_device(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    """Return a scalar where the kernels can read it; never waits for a device."""
    return None if scalar is None else to_device(scalar, device, torch.float64)


def _weight_decays(options: StepOptions) -> tuple[float, float, float]:
    """Return weight decay in the gradient, in the aggregate alone and decoupled: two are 0."""
    if options.decoupled_weight_decay:
        return 0.0, 0.0, options.weight_decay
    if options.l2_in_aggregate:
        return 0.0, options.weight_decay, 0.0
    return options.weight_decay, 0.0, 0.0


def _eps(options: StepOptions) -> tuple[float, float]:
    """Return eps as it is inside and outside of the root, one of them 0."""
    return (options.eps, 0.0) if options.eps_inside_sqrt else (0.0, options.eps)


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy what is not the target itself; without copies there is nothing to do."""
    for target, source in zip(targets, sources, strict=False):
        if target is not source:
            target.copy_(source)


def _device_guard(device: torch.device) -> Any:
    """Make a device the current one; where it is, there is nothing to enter and leave."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.get_device_module(device.type).device(device)
