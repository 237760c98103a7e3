"""What the tensors of a step must be: checks of parameters and gradients, which name them.

`cm_fused._optimizer.checks` checks options.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cm_fused._distributed import is_flattened, is_sharded, is_wrapper, local
from cm_fused._state.making import refused_precision
from cm_fused.rounding import HALF_DTYPES


def check_not_flattened(
    index: int, group: Mapping[str, Any], error: type[Exception] = RuntimeError
) -> None:
    """Check that no parameter of a group is a shard of FSDP1, whose norm is not the parameter's."""
    for i, param in enumerate(group["params"]):
        if is_flattened(param):
            raise error(
                f"{_name_of(index, group, i)} must be a whole parameter or a DTensor, got one of "
                f"FullyShardedDataParallel (FSDP1) of shape {tuple(param.shape)}: norms over its "
                "shards would be those of one process; use fully_shard (FSDP2), or "
                "DistributedDataParallel in place of NO_SHARD"
            )


def check_wrappers(index: int, group: Mapping[str, Any]) -> None:
    """Check that a group that asks for a fused backend has no wrapper subclass as a parameter."""
    if group["backend"] in (None, "eager") and not group["fused"]:
        return
    for i, param in enumerate(group["params"]):
        if is_wrapper(param):
            asked = "fused=True" if group["backend"] is None else f"backend={group['backend']!r}"
            raise RuntimeError(
                f"{_name_of(index, group, i)} must be a plain tensor for {asked}, got a "
                f"{type(local(param)).__name__}, which holds its values in tensors of its own; use "
                "backend=None or backend='eager'"
            )


def check_no_duplicates(groups: list[dict[str, Any]]) -> None:
    """Check that no parameter stands twice: two steps would change its one state.

    Torch checks it where groups are added.
    """
    indices: dict[int, tuple[int, int]] = {}
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            first = indices.setdefault(id(param), (i, j))
            if first != (i, j):
                raise RuntimeError(
                    f"the groups must have every parameter once, got parameter {first[1]} of group "
                    f"{first[0]} again as parameter {j} of group {i}; remove one of the two"
                )


def check_low_precision(group: Mapping[str, Any]) -> None:
    """Check that the parameters of a group can have the state that its options ask for.

    Frozen parameters are not checked until they take part in a step.
    """
    for i, param in enumerate(group["params"]):
        if not param.requires_grad:
            continue
        refused = refused_precision(param, group)
        if refused is not None:
            name, rule = refused
            raise ValueError(
                f"{name} must be {rule}; put them into a group of their own: params[{i}] is "
                f"{param.dtype}, got {group[name]!r}"
            )


def _name_of(index: int, group: Mapping[str, Any], i: int) -> str:
    name = group["param_names"][i] if "param_names" in group else f"parameter {i}"
    return f"{name} of group {index}"


def check_capturable(params: list[Tensor]) -> None:
    """Check that a CUDA graph could capture a step of these parameters."""
    for i, param in enumerate(params):
        if not param.is_cuda and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"capturable=True needs parameters on a CUDA device, got params[{i}] on "
                f"{param.device}; use capturable=False"
            )


def check_gradients(group_index: int, params: list[Tensor], first: int = 0) -> None:
    """Check that every gradient fits its parameter; strides may differ.

    Those of float32 parameters may be bfloat16 or float16.

    `first` is the index in the group of the first of these parameters, for messages. Those without
    a gradient are passed over.
    """
    for i, param in enumerate(params, first):
        grad = param.grad
        if grad is None:
            continue
        where = f"the gradient of parameter {i} of group {group_index}"
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{where} must be dense, got layout {grad.layout}; for an embedding, use "
                "sparse=False"
            )
        check_placement(where, param, grad)
        lower = param.dtype is torch.float32 and grad.dtype in HALF_DTYPES
        if grad.dtype != param.dtype and not lower:
            raise RuntimeError(f"{where} must have {_dtype_rule(param)}, got {grad.dtype}")
        for name in ("shape", "device"):
            value, expected = getattr(grad, name), getattr(param, name)
            if value != expected:
                raise RuntimeError(
                    f"{where} must have the {name} {_plain(expected)} of its parameter, got "
                    f"{_plain(value)}"
                )
        if not (grad.is_floating_point() or grad.is_complex()):
            raise RuntimeError(f"{where} must be floating point or complex, got {grad.dtype}")


def _dtype_rule(param: Tensor) -> str:
    """Return which dtypes a parameter's gradient may have, and what to do with another."""
    own = f"the dtype {param.dtype} of its parameter"
    lower = " or ".join(map(str, HALF_DTYPES))
    if param.dtype is torch.float32:
        return f"{own}, or {lower}; convert the gradient to one of them"
    return f"{own}; convert the gradient to it, only those of float32 parameters may be {lower}"


def check_placement(where: str, param: Tensor, grad: Tensor) -> None:
    """Check that a gradient and its parameter are both DTensors or both plain tensors."""
    if is_sharded(grad) != is_sharded(param):
        raise RuntimeError(
            f"{where} must be a DTensor as its parameter is, or neither, got {type(grad)} for "
            f"{type(param)}"
        )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value
