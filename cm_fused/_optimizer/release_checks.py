"""Refusals of gradient release: options that need all gradients at once, and wrapped models."""

import sys
from collections.abc import Container
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cm_fused._distributed import is_sharded

_DDP_REMEDY = (
    "DistributedDataParallel averages gradients only after the hooks that step here, and its "
    "buckets keep all gradients anyway; call optimizer.step() after backward, or use "
    "torch.distributed.optim._apply_optimizer_in_backward, which it supports"
)
# For each option the value that needs no other gradients, and why others do.
_NEEDED: dict[str, tuple[Any, str]] = {
    "priority_scope": ("tensor", "the norm over a group is known when all its gradients are"),
    "max_grad_norm": (None, "the norm is known when all gradients are"),
    "skip_nonfinite": (False, "the norm is known when all gradients are"),
    "amp_scaling": (False, "whether one is not finite is known when all gradients are"),
}


def check_options(groups: list[dict[str, Any]], first: int = 0) -> None:
    """Check that groups, the first of which has this index, need no norm over gradients."""
    for i, group in enumerate(groups, first):
        for name, (required, reason) in _NEEDED.items():
            if group[name] != required:
                raise ValueError(
                    f"gradient release needs {name}={required!r}, got {group[name]!r} in group "
                    f"{i}: {reason}, but each is freed within backward"
                )


def check_model(model: nn.Module) -> None:
    """Check that no DDP or FSDP in a model reduces or shards gradients after the hooks."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise RuntimeError(f"model must not be or have a DDP module: {_DDP_REMEDY}")
    has_fsdp = any(isinstance(module, fsdp) for module in model.modules())
    if has_fsdp or any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()):
        raise RuntimeError(
            "model must not be or have a FullyShardedDataParallel module, which shards gradients "
            "only after the hooks that step here; call optimizer.step() after backward"
        )


def active_ddp() -> Any:
    """Return the `DistributedDataParallel` whose forward pass this is, or None."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def check_ddp(params: list[Tensor]) -> None:
    """Check that no DDP, which would reduce these parameters' gradients, is in its forward pass."""
    ddp = active_ddp()
    if ddp is None:
        return
    reduced = {id(param) for param in getattr(ddp, "_module_parameters", ddp.parameters())}
    if not reduced.isdisjoint(map(id, params)):
        raise RuntimeError(f"gradient release does not work under DDP: {_DDP_REMEDY}")


def check_params(model: nn.Module, groups: list[dict[str, Any]], served: Container[int]) -> None:
    """Check that backward through a model may step the parameters of an optimizer.

    It already steps those whose ids are `served`.
    """
    own = {id(param) for param in model.parameters()}
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            if id(param) not in own:
                raise RuntimeError(
                    f"params[{j}] of group {i} must be a parameter of the model, got one of shape "
                    f"{tuple(param.shape)} that is not"
                )
            if is_sharded(param):
                raise RuntimeError(
                    f"params[{j}] of group {i} must not be a DTensor: its norm is a sum over "
                    "processes, which reach its gradient at different times; call "
                    "optimizer.step() after backward"
                )
            if id(param) not in served and _is_stepped_in_backward(param):
                raise RuntimeError(
                    f"params[{j}] of group {i} must not be stepped in backward by another "
                    "optimizer, which frees its gradient; give each parameter to one of them"
                )


def _is_stepped_in_backward(param: Tensor) -> bool:
    hooks: dict[int, Any] = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    return hasattr(param, "_in_backward_optimizers") or any(
        getattr(hook, "frees_gradient", False) for hook in hooks.values()
    )
