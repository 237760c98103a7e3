"""Stepping inside backward, so that gradients need not be there all at once."""

import sys
import weakref
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from cm_fused._distributed import is_sharded
from cm_fused._optimizer.backward_pass import BackwardPasses, is_outermost_forward
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.sam import SAM

_DDP_REMEDY = (
    "DistributedDataParallel averages gradients only after the hooks that step here, and its "
    "buckets keep all gradients anyway; call optimizer.step() after backward, or use "
    "torch.distributed.optim._apply_optimizer_in_backward, which it supports"
)
_FSDP = "torch.distributed.fsdp"


class GradientRelease:
    """A model whose parameters are stepped inside backward; `enable_gradient_release` makes it."""

    def __init__(self, model: nn.Module, optimizer: CriticalAdam) -> None:
        self._model = model
        self._optimizer = optimizer
        self._passes = BackwardPasses(self._step)
        # The optimizer's parameters, in order, and for each its group and its place in the group.
        self._params: list[Tensor] = []
        self._places: dict[int, tuple[int, int]] = {}
        # The hooks of parameters, by id, and those of the model.
        self._handles: dict[int, RemovableHandle] = {}
        self._model_handles: list[RemovableHandle] = []
        try:
            self._follow_groups()
            self._hook_model()
            optimizer._release = self
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Go back to stepping by `optimizer.step()`."""
        for handle in [*self._model_handles, *self._handles.values()]:
            handle.remove()
        self._model_handles = []
        self._handles = {}
        self._passes.forget()
        if self._optimizer._release is self:
            self._optimizer._release = None
            self._optimizer._single_plans = {}

    def _check_groups(self, groups: list[dict[str, Any]]) -> None:
        """Check that these groups, which are to be the optimizer's, can be stepped in backward.

        Raises:
            ValueError: An option needs all gradients at once.
        """
        _check_options(groups)

    def _follow_groups(self) -> None:
        """Serve the parameters that the optimizer has now, and no others.

        Raises:
            ValueError: An option needs all gradients at once. Nothing has been changed then.
            RuntimeError: A parameter cannot be stepped in backward. Nothing has been changed then.
        """
        groups = self._optimizer.param_groups
        params = list(chain.from_iterable(group["params"] for group in groups))
        if len(params) == len(self._params) and all(map(is_, params, self._params)):
            return
        _check_options(groups)
        _check_model(self._model)
        _check_params(self._model, groups, self._handles)
        self._hook_params(params)
        self._params = params
        self._places = {
            id(param): (index, position)
            for index, group in enumerate(groups)
            for position, param in enumerate(group["params"])
        }

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _before_forward(self) -> None:
        """See, before anything is changed, what has changed since the last forward pass.

        Raises:
            ValueError: An option needs all gradients at once.
            RuntimeError: DDP reduces gradients, or a parameter cannot be stepped in backward.
        """
        if not is_outermost_forward():
            return
        if dist.is_available() and dist.is_initialized():
            _check_model(self._model)
            self._check_ddp()
        _check_options(self._optimizer.param_groups)
        self._follow_groups()

    def _after_forward(self, outputs: Any) -> None:
        """Have the backward pass noticed that begins at these outputs of the model."""
        if not is_outermost_forward():
            return
        self._check_ddp()  # `replicate` may become active after the hook before forward
        self._passes.watch(outputs)

    def _check_ddp(self) -> None:
        """Check that the forward pass is not one of DDP, which reduces the gradients."""
        ddp = _ddp()
        if ddp is None:
            return
        reduced = {id(param) for param in getattr(ddp, "_module_parameters", ddp.parameters())}
        if not reduced.isdisjoint(map(id, self._params)):
            raise RuntimeError(f"gradient release does not work under DDP: {_DDP_REMEDY}")

    def _hook_params(self, params: list[Tensor]) -> None:
        """Have hooks on the parameters that can have a gradient, all of them or none."""
        added: dict[int, RemovableHandle] = {}
        try:
            for param in params:
                if id(param) not in self._handles and _can_have_gradient(param):
                    added[id(param)] = _hooked(param, _GradientHook(self))
        except BaseException:
            for handle in added.values():
                handle.remove()
            raise
        for gone in self._handles.keys() - set(map(id, params)):
            self._handles.pop(gone).remove()
        self._handles |= added

    def _hook_model(self) -> None:
        for module in _called_modules(self._model):
            handles = self._model_handles
            handles.append(module.register_forward_pre_hook(_BeforeForward(self)))
            handles.append(module.register_forward_hook(_AfterForward(self)))

    def _step_or_wait(self, param: Tensor) -> None:
        try:
            if self._passes.may_step(param):
                self._step(param)
        except BaseException:
            param.grad = None  # which the next backward pass would add to
            raise

    def _step(self, param: Tensor) -> None:
        """Step a parameter with the options of the group it is in now, and free its gradient."""
        place = self._place(param)
        if place is None:  # `optimizer.step()` would pass over it too
            return
        try:
            _check_options(self._optimizer.param_groups[place[0] : place[0] + 1], place[0])
            self._optimizer._step_alone(*place)
        finally:
            param.grad = None

    def _place(self, param: Tensor) -> tuple[int, int] | None:
        """Return the group of a parameter and its place there; None if it is in no group."""
        groups = self._optimizer.param_groups
        place = self._places.get(id(param))
        if place is not None and _is_at(groups, place, param):
            return place
        for index, group in enumerate(groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    self._places[id(param)] = index, position
                    return index, position
        return None


class _GradientHook:
    """Steps a parameter whose gradient is there.

    The garbage collector does not see what a parameter's hooks refer to, so this refers weakly.
    """

    def __init__(self, release: GradientRelease) -> None:
        self._release = weakref.ref(release)

    # Compiled, it would be compiled anew for every parameter.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release._step_or_wait(param)


class _ModelHook:
    """A hook of the model. A copy of the model gets one that does nothing."""

    def __init__(self, release: GradientRelease | None = None) -> None:
        self.release = release

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class _BeforeForward(_ModelHook):
    """Looks, before anything is changed, for what has changed since the last forward pass."""

    def __call__(self, *_: Any) -> None:
        # A compiled forward is left as it is, unless it is to be refused.
        if self.release is not None and not (torch.compiler.is_compiling() and _ddp() is None):
            self.release._before_forward()


class _AfterForward(_ModelHook):
    """Has the backward pass noticed that begins at the outputs."""

    def __call__(self, _: nn.Module, __: Any, outputs: Any) -> None:
        if self.release is not None and not torch.compiler.is_compiling():
            self.release._after_forward(outputs)


def enable_gradient_release(model: nn.Module, optimizer: CriticalAdam) -> GradientRelease:
    """Step each parameter inside backward as soon as its gradient is there, and free the gradient.

    There are never more gradients than autograd itself holds. Parameters and state are those of
    `optimizer.step()` after backward. From then on `optimizer.step()` only calls its closure, if
    any, and `zero_grad` finds nothing; schedulers and checkpoints work as ever, and param groups
    may be changed and added. Accumulating gradients over several backward passes is not possible:
    each of them steps. A parameter is not stepped while it is frozen.

    Reentrant checkpointing (`torch.utils.checkpoint` with `use_reentrant=True`) keeps the gradients
    until backward ends, and needs a loss that is computed from what `model(...)` returns.

    Args:
        model: Its parameters that the optimizer has are stepped in backward.
        optimizer: With `priority_scope="tensor"` in all groups; of `cm_fused.compat`, with
            `synced=False`.

    Returns:
        A handle whose `remove` ends it.

    Raises:
        TypeError: `model` is not a module, or `optimizer` is `SAM` or not of this package.
        ValueError: A group has priority_scope="group", max_grad_norm, skip_nonfinite or
            amp_scaling, which need all gradients at once.
        RuntimeError: It is enabled already, the model is or has a `DistributedDataParallel` or
            `FullyShardedDataParallel`, or a parameter of the optimizer is not the model's, is
            stepped in backward by another optimizer, or is a DTensor, whose norm is a sum over
            processes. Nothing has been changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(optimizer, SAM):
        raise TypeError(
            "optimizer must step with one gradient, got SAM, which needs two backward passes a "
            "step; call its step(closure) without gradient release"
        )
    if not isinstance(optimizer, CriticalAdam):
        raise TypeError(
            f"optimizer must be an AdamCM or AdamCG of cm_fused, got {type(optimizer).__name__}; "
            "pass the optimizer itself if this one wraps it, or call step() after backward "
            "without gradient release"
        )
    if optimizer._release is not None:
        raise RuntimeError("gradient release is enabled already; call remove() of what it returned")
    return GradientRelease(model, optimizer)


def _check_options(groups: list[dict[str, Any]], first: int = 0) -> None:
    """Check that the groups, the first of which has this index, need no norm over gradients."""
    for i, group in enumerate(groups, first):
        if (
            group["priority_scope"] != "tensor"
            or group["max_grad_norm"] is not None
            or group["skip_nonfinite"]
            or group["amp_scaling"]
        ):
            _refuse_options(i, group)


def _refuse_options(index: int, group: dict[str, Any]) -> None:
    needs_all: dict[str, tuple[Any, str]] = {
        "priority_scope": ("tensor", "the norm over a group is known when all its gradients are"),
        "max_grad_norm": (None, "the norm is known when all gradients are"),
        "skip_nonfinite": (False, "the norm is known when all gradients are"),
        "amp_scaling": (False, "whether one is not finite is known when all gradients are"),
    }
    for name, (required, reason) in needs_all.items():
        if group[name] != required:
            raise ValueError(
                f"gradient release needs {name}={required!r}, got {group[name]!r} in group "
                f"{index}: {reason}, but each is freed within backward"
            )


def _check_model(model: nn.Module) -> None:
    fsdp = getattr(sys.modules.get(_FSDP), "FullyShardedDataParallel", ())
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise RuntimeError(f"model must not be or have a DDP module: {_DDP_REMEDY}")
        if isinstance(module, fsdp):
            _refuse_fsdp()
    if any(getattr(param, "_fsdp_flattened", False) for param in model.parameters()):
        _refuse_fsdp()


def _ddp() -> Any:
    """Return the `DistributedDataParallel` whose forward pass this is, or None."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def _refuse_fsdp() -> None:
    raise RuntimeError(
        "model must not be or have a FullyShardedDataParallel module, which shards gradients only "
        "after the hooks that step here; call optimizer.step() after backward"
    )


def _check_params(
    model: nn.Module, groups: list[dict[str, Any]], served: dict[int, RemovableHandle]
) -> None:
    """Check that backward through the model may step the parameters of the groups.

    Args:
        model: The model.
        groups: The optimizer's.
        served: The ids of the parameters that the optimizer's own release steps are its keys.
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
        isinstance(hook, _GradientHook) for hook in hooks.values()
    )


def _can_have_gradient(param: Tensor) -> bool:
    """Return whether a parameter can have a gradient, now or when it is no longer frozen."""
    if param.requires_grad:
        return True
    return (param.is_floating_point() or param.is_complex()) and not param.is_inference()


def _hooked(param: Tensor, hook: _GradientHook) -> RemovableHandle:
    """Add a hook to a parameter, which may be frozen: torch adds none to such a one."""
    frozen = not param.requires_grad
    if frozen:
        param.requires_grad_(True)
    try:
        handle: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        if frozen:
            param.requires_grad_(False)
    return handle


def _called_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model, or instead of a container that cannot be called what it contains."""
    if not isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        yield model
        return
    children: Iterable[nn.Module] = model.children()
    yield from chain.from_iterable(map(_called_modules, children))


def _is_at(groups: list[dict[str, Any]], place: tuple[int, int], param: Tensor) -> bool:
    index, position = place
    if index >= len(groups):
        return False
    params = groups[index]["params"]
    return position < len(params) and params[position] is param
