"""Parameters that are DTensors: their local tensors, and sums over all processes.

The backends step local tensors. State of a parameter's shape is a DTensor placed as the parameter
is, so that `torch.distributed.checkpoint` can save it on one mesh and load it on another. Keys and
step counts are plain tensors, the same on every process.
"""

import functools
import sys
import traceback
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cm_fused._works import hold
from cm_fused.philox import ShardLayout

# Types that need no import of torch.distributed.tensor, which takes half a second.
_PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    kind = type(tensor)
    return kind not in _PLAIN and _is_dtensor(kind)


@functools.cache
def _is_dtensor(kind: type) -> bool:
    return hasattr(kind, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Return the local tensor of a DTensor, and any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor
    # Without gradients `to_local` makes a new Parameter of it at every call, since torch 2.13.
    result: Tensor = part.to_local() if torch.is_grad_enabled() else part._local_tensor
    return result


def is_wrapper(tensor: Tensor) -> bool:
    """Return whether a tensor, or its local tensor, holds its values in tensors of its own.

    An operator on such a subclass is one on each tensor inside: a fused step of it would be two
    steps, with one count.
    """
    if type(tensor) in _PLAIN:
        return False
    # As `is_traceable_wrapper_subclass`, which torch.compile takes for False.
    kind = type(local(tensor))
    has_parts = hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")
    # A collective's result, which a DTensor may hold, is waited for and then is a plain tensor.
    return has_parts and not hasattr(kind, "trigger_wait")


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with the local tensors of its DTensors."""
    if not any(isinstance(value, Tensor) and is_sharded(value) for value in state.values()):
        return state
    return {
        key: local(value) if isinstance(value, Tensor) else value for key, value in state.items()
    }


def local_grad(param: Tensor) -> Tensor:
    """Return the gradient of `local(param)`, which must have one, placed as the parameter."""
    grad = param.grad
    assert grad is not None
    if not is_sharded(param):
        return grad
    placed: Any = grad
    # It may be placed otherwise: as summands on the processes, for one.
    if placed.placements != param.placements:  # type: ignore[attr-defined]
        placed = placed.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return local(placed)


def whole_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with full tensors, gathered from all processes; it must have no scales."""
    # Those belong to blocks of local tensors.
    return {
        key: value.full_tensor() if isinstance(value, Tensor) and is_sharded(value) else value  # type: ignore[attr-defined]
        for key, value in state.items()
    }


def sharded_as(tensor: Tensor, param: Tensor, leading: int = 0) -> Tensor:
    """Return a DTensor, placed as the DTensor `param`, of this process's local tensor.

    That has the local shape of `param`, after `leading` dimensions more, 0 or 1: the slots.
    """
    from torch.distributed.tensor import DTensor

    spec: Any = param
    placements = [_moved(placement, leading) for placement in spec.placements]
    shape = torch.Size((*tensor.shape[:leading], *param.shape))
    stride = param.stride()
    if leading:
        stride = (param.numel(), *stride)
    placed: Tensor = DTensor.from_local(
        tensor, spec.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
    return placed


def _moved(placement: Any, by: int) -> Any:
    """Return how a tensor with `by` more dimensions in front is placed as one without."""
    if not by or not _is_cut(placement):
        return placement
    if placement.is_shard():
        return type(placement)(placement.dim + by)
    return type(placement)(placement.dim + by, split_factor=placement.split_factor)


def local_as(value: Any, param: Tensor, leading: int = 0) -> Any:
    """Return the part of a full tensor or DTensor that belongs to the local tensor of a parameter.

    It has the parameter's shape, after `leading` dimensions more. Any other value is returned.
    """
    if not isinstance(value, Tensor):
        return value
    if not is_sharded(param):
        return value.full_tensor() if is_sharded(value) else value  # type: ignore[attr-defined]
    if value.ndim != param.ndim + leading:
        return local(value)
    from torch.distributed.tensor import DTensor, Replicate

    spec: Any = param
    placements = [_moved(placement, leading) for placement in spec.placements]
    placed: Any = value
    if not is_sharded(value):
        mesh = spec.device_mesh
        placed = value.to(mesh.device_type)
        placed = DTensor.from_local(placed, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(placed.redistribute(spec.device_mesh, placements))


def shard_layout_of(param: Tensor, order: Tensor) -> ShardLayout:
    """Return where the elements of a parameter's local tensor lie in the full parameter.

    They must be runs of one length, evenly apart, in the order in which the full parameter has
    them. They are where only the first dimension and one more are sharded, in slices of consecutive
    indices, and the parameter is dense. Otherwise the local elements are numbered from 0 on. The
    memory order of `order`, dense and of the local tensor's shape, numbers them.
    """
    if not is_sharded(param) or not order.numel():
        return ShardLayout()
    dims = [dim for dim in range(param.ndim) if param.shape[dim] > 1]
    firsts = {dim: _first_index(param, dim) for dim in dims}
    # From the innermost dimension on: how many elements, how far apart in the full parameter.
    runs = [(1, 1)]
    offset, local_numel, full_numel = 0, 1, 1
    for dim in sorted(dims, key=param.stride):
        first, size, stride = firsts[dim], order.shape[dim], param.stride(dim)
        in_order = stride == full_numel and (size == 1 or order.stride(dim) == local_numel)
        if first is None or not in_order:
            return ShardLayout()
        offset += first * stride
        local_numel, full_numel = local_numel * size, full_numel * param.shape[dim]
        length, apart = runs[-1]
        if size > 1 and stride == length * apart:
            runs[-1] = (length * size, apart)
        elif size > 1:
            runs.append((size, stride))
    if len(runs) == 1:
        return ShardLayout(offset)
    return ShardLayout(offset, runs[0][0], runs[1][1]) if len(runs) == 2 else ShardLayout()


def _first_index(param: Tensor, dim: int) -> int | None:
    """Return the first index that this process has along a dimension; None if there are gaps."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    spec: Any = param
    cut = [_is_cut(placement) and placement.dim == dim for placement in spec.placements]
    if not any(cut):
        return 0
    placements = [
        _moved(placement, -placement.dim) if of_this else Replicate()
        for placement, of_this in zip(spec.placements, cut, strict=True)
    ]
    # Without a source rank every process takes its own part, and nothing is sent.
    indices = torch.arange(param.shape[dim], device="cpu")
    indices = local(distribute_tensor(indices, spec.device_mesh, placements, src_data_rank=None))
    first, last = int(indices[0]), int(indices[-1])
    return first if last - first + 1 == len(indices) else None


class Processes:
    """The processes among which the parameters of an optimizer are sharded."""

    def __init__(self, params: list[Tensor]) -> None:
        mesh = _common_mesh([param.device_mesh for param in params if is_sharded(param)])  # type: ignore[attr-defined]
        self._groups = _groups(mesh)
        self.device = _device_of(mesh)
        # For every parameter 1.0 where this process counts its local tensor, and 0.0 where another
        # process with the same one does.
        counted = [float(_counts(param, mesh)) for param in params]
        self.counted = torch.tensor(counted, dtype=torch.float64, device=self.device)

    def start_sum(self, values: Tensor) -> Any:
        """Start to sum a tensor on `device` over the processes, in place; return the work.

        The sum is there after its `wait()`, for which an accelerator's stream waits, not the host.
        """
        *first, last = self._groups
        for group in first:
            _start_sum(values, group).wait()
        return _start_sum(values, last)


def _start_sum(values: Tensor, group: Any) -> Any:
    if values.device.type == "cpu":
        return _GatheredSum(values, group)
    return dist.all_reduce(values, group=group, async_op=True)


class _GatheredSum:
    """A sum of what gloo gathers: a ring of half as many messages as its all_reduce.

    A step's few numbers cost their latency: 24 of them on 2 processes of 2 cores 110 microseconds
    instead of 230, of a step of 400.
    """

    def __init__(self, values: Tensor, group: Any) -> None:
        self._values = values
        self._all = values.new_empty((group.size(), *values.shape))
        self._work = dist.all_gather(list(self._all), values, group=group, async_op=True)
        hold(self._work)

    def wait(self) -> None:
        self._work.wait()
        torch.sum(self._all, 0, out=self._values)


def processes(params: list[Tensor]) -> Processes | None:
    """Return the processes that parameters are sharded among; None where they are not."""
    return Processes(params) if any(map(is_sharded, params)) else None


def _common_mesh(meshes: list[Any]) -> Any:
    """Return a mesh with the processes of all meshes: the largest, if it has them, else the root.

    The root mesh may have processes with other parameters: those of other stages of a pipeline.
    """
    largest = max(meshes, key=lambda mesh: mesh.size())
    for candidate in (largest, largest._get_root_mesh()):
        if all(_ranks(mesh) <= _ranks(candidate) for mesh in meshes):
            return candidate
    raise RuntimeError(
        "the parameters of an optimizer must be sharded within one device mesh, got the meshes "
        f"{list(dict.fromkeys(map(str, meshes)))}; give each an optimizer of its own"
    )


def _ranks(mesh: Any) -> set[int]:
    return set(mesh.mesh.flatten().tolist())


def _groups(mesh: Any) -> list[Any]:
    """Return the process groups whose sums, one after the other, make the sum over a mesh."""
    if mesh.size() == dist.get_world_size():
        return [dist.group.WORLD]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]


def _device_of(mesh: Any) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(mesh.device_type)
    return torch.device(mesh.device_type, module.current_device())


def _counts(param: Tensor, mesh: Any) -> bool:
    """Return whether this process is a mesh's first of those with the same part of a parameter."""
    first = int(mesh.mesh.flatten()[0])
    if not is_sharded(param):
        return dist.get_rank() == first
    spec: Any = param
    if any(placement.is_partial() for placement in spec.placements):
        raise RuntimeError(
            f"a parameter must be sharded or replicated, got placements {spec.placements}"
        )
    # Meshes cut along the same dimensions have the same parts; one of them has the first process.
    if first not in _ranks(spec.device_mesh):
        return False
    pairs = zip(spec.device_mesh.get_coordinate(), spec.placements, strict=True)
    return not any(coordinate for coordinate, placement in pairs if not _is_cut(placement))


def _is_cut(placement: Any) -> bool:
    """Return whether a placement is a sharding; FSDP over tensor parallelism has its own kind."""
    return hasattr(placement, "dim")


# Code that makes an optimizer of a part of the parameters, by its module. It does not tell the
# optimizer of the others, so that the optimizer can only look for its caller.
_PARTITIONERS = {
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
    "torch.distributed.optim.optimizer": "DistributedOptimizer",
    "torch.distributed.optim.apply_optimizer_in_backward": "_apply_optimizer_in_backward",
    "torch.distributed._shard.sharded_optim.api": "ShardedOptimizer",
}


def partitioner() -> str | None:
    """Return the name of the code that makes an optimizer of a part of the parameters, or None."""
    if _PARTITIONERS.keys().isdisjoint(sys.modules):
        return None
    frames = traceback.walk_stack(sys._getframe())
    names = (_PARTITIONERS.get(frame.f_globals.get("__name__", "")) for frame, _ in frames)
    return next(filter(None, names), None)


def is_flattened(param: Tensor) -> bool:
    """Return whether FSDP1 (`FullyShardedDataParallel`) may have cut a parameter into shards.

    FSDP1 marks every parameter that it manages: its flat ones and, with `use_orig_params=True`, the
    model's own. It shards none where there is one process. With several, the model's own parameters
    do not show whether it shards them (`NO_SHARD`).
    """
    if not getattr(param, "_fsdp_flattened", False):
        return False
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
