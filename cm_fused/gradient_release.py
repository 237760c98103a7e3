"""Stepping inside backward, so that gradients need not be there all at once."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cm_fused._checks import check_not_flattened
from cm_fused._critical_adam import CriticalAdam
from cm_fused._sharding import is_sharded


class GradientRelease:
    """A model whose parameters are stepped inside backward; `enable_gradient_release` makes it."""

    def __init__(self, handles: list[RemovableHandle], undo: Callable[[], None]) -> None:
        self._handles = handles
        self._undo = undo

    def remove(self) -> None:
        """Go back to stepping by `optimizer.step()`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._undo()


def enable_gradient_release(model: nn.Module, optimizer: CriticalAdam) -> GradientRelease:
    """Step each parameter inside backward as soon as its gradient is there, and free the gradient.

    There are never more gradients than autograd itself holds. Parameters and state are those of
    `optimizer.step()` after backward. From then on `optimizer.step()` only calls its closure, if
    any, and `zero_grad` finds nothing; schedulers and checkpoints work as ever. Accumulating
    gradients over several backward passes is not possible: each of them steps.

    Args:
        model: Its parameters that the optimizer has are stepped in backward.
        optimizer: With `priority_scope="tensor"` in all groups; of `cm_fused.compat`, with
            `synced=False`.

    Returns:
        A handle whose `remove` ends it.

    Raises:
        ValueError: A group has priority_scope="group", max_grad_norm, skip_nonfinite or
            amp_scaling, which need all gradients at once.
        RuntimeError: It is enabled already, or a parameter of the optimizer is not the model's, or
            is a DTensor, whose norm is a sum over processes, or a shard of FSDP1.
    """
    _check(model, optimizer)
    members = {
        id(param): (index, group)
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
    }

    def step_one(param: Tensor) -> None:
        index, group = members[id(param)]
        optimizer._step_alone(index, group, param)
        param.grad = None

    handles = [
        param.register_post_accumulate_grad_hook(step_one)  # type: ignore[no-untyped-call]
        for param in model.parameters()
        if id(param) in members
    ]
    optimizer._steps_in_backward = True

    def undo() -> None:
        optimizer._steps_in_backward = False

    return GradientRelease(handles, undo)


def _check(model: nn.Module, optimizer: CriticalAdam) -> None:
    needs_all: dict[str, tuple[Any, str]] = {
        "priority_scope": ("tensor", "the norm over a group is known when all its gradients are"),
        "max_grad_norm": (None, "the norm is known when all gradients are"),
        "skip_nonfinite": (False, "the norm is known when all gradients are"),
        "amp_scaling": (False, "whether one is not finite is known when all gradients are"),
    }
    for i, group in enumerate(optimizer.param_groups):
        for name, (required, reason) in needs_all.items():
            if group[name] != required:
                raise ValueError(
                    f"gradient release needs {name}={required!r}, got {group[name]!r} in group "
                    f"{i}: {reason}, but each is freed within backward"
                )
    if optimizer._steps_in_backward:
        raise RuntimeError("gradient release is enabled already; call remove() of what it returned")
    own = {id(param) for param in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        check_not_flattened(i, group)
        for j, param in enumerate(group["params"]):
            if id(param) not in own:
                raise RuntimeError(
                    f"params[{j}] of group {i} must be a parameter of the model, got one of shape "
                    f"{tuple(param.shape)} that is not"
                )
            if is_sharded(param):
                raise RuntimeError(
                    f"params[{j}] of group {i} must not be a DTensor: its norm is a sum over "
                    "processes, which reach its gradient at different times"
                )
