"""Stepping inside backward, so that the gradients are never in memory all at once."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cm_fused._optimizer import release_checks
from cm_fused._optimizer.backward_pass import BackwardPasses, is_outermost_forward
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.sam import SAM


class GradientRelease:
    """A model whose parameters are stepped inside backward; `enable_gradient_release` makes it."""

    def __init__(self, model: nn.Module, optimizer: CriticalAdam) -> None:
        self._model = model
        self._optimizer = optimizer
        self._passes = BackwardPasses(self._step)
        # The optimizer's parameters, in order, and for each its group's index and its own in it.
        self._params: list[Tensor] = []
        self._indices: dict[int, tuple[int, int]] = {}
        # The hooks of parameters, by id, and those of the model.
        self._handles: dict[int, RemovableHandle] = {}
        self._model_handles: list[RemovableHandle] = []
        try:
            self._follow_groups()
            for module in _called_modules(model):
                before, after = _ModelHook(self._before_forward), _ModelHook(self._after_forward)
                self._model_handles.append(module.register_forward_pre_hook(before))
                self._model_handles.append(module.register_forward_hook(after))
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

    def _follow_groups(self) -> None:
        """Serve the parameters that the optimizer has now, and no others, or change nothing."""
        groups = self._optimizer.param_groups
        params = list(chain.from_iterable(group["params"] for group in groups))
        if len(params) == len(self._params) and all(map(is_, params, self._params)):
            return
        release_checks.check_options(groups)
        release_checks.check_model(self._model)
        release_checks.check_params(self._model, groups, self._handles)
        self._hook_params(params)
        self._params = params
        self._indices = {
            id(param): (index, position)
            for index, group in enumerate(groups)
            for position, param in enumerate(group["params"])
        }

    def _before_forward(self, *_: Any) -> None:
        """Follow or refuse what has changed since the last forward pass, before a step."""
        # A compiled forward pass is left as it is, unless it has to be refused.
        if not torch.compiler.is_compiling() or release_checks.active_ddp() is not None:
            self._follow_or_refuse()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _follow_or_refuse(self) -> None:
        if not is_outermost_forward():
            return
        if dist.is_available() and dist.is_initialized():
            release_checks.check_model(self._model)
            release_checks.check_ddp(self._params)
        release_checks.check_options(self._optimizer.param_groups)
        self._follow_groups()

    def _after_forward(self, _: nn.Module, __: Any, outputs: Any) -> None:
        """Watch for the backward pass that begins at these outputs of the model."""
        if torch.compiler.is_compiling() or not is_outermost_forward():
            return
        # `replicate` may become active after the hook before forward.
        release_checks.check_ddp(self._params)
        self._passes.watch(outputs)

    def _hook_params(self, params: list[Tensor]) -> None:
        """Add hooks to the parameters that can have a gradient, to all of them or none."""
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

    def _step_or_wait(self, param: Tensor) -> None:
        try:
            if self._passes.may_step(param):
                self._step(param)
        except BaseException:
            param.grad = None  # which the next backward pass would add to
            if self._indices_of(param) is not None:
                self._optimizer._forget_norm(param)
            raise

    def _step(self, param: Tensor) -> None:
        """Step a parameter with the options of the group it is in now, and free its gradient."""
        indices = self._indices_of(param)
        if indices is None:  # `optimizer.step()` would pass over it too
            return
        try:
            self._optimizer._forget_norm(param)  # until this step has been taken
            group = self._optimizer.param_groups[indices[0]]
            release_checks.check_options([group], indices[0])
            self._optimizer._step_one(*indices)
            # By which a scheduler knows that it comes after the first step: nobody calls `step`.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]
        finally:
            param.grad = None

    def _indices_of(self, param: Tensor) -> tuple[int, int] | None:
        """Return the index of a parameter's group and its own in it; None if it is in no group."""
        groups = self._optimizer.param_groups
        index, position = self._indices.get(id(param), (0, 0))
        params = groups[index]["params"] if index < len(groups) else []
        if position < len(params) and params[position] is param:
            return index, position
        for index, group in enumerate(groups):
            for position, other in enumerate(group["params"]):
                if other is param:
                    self._indices[id(param)] = index, position
                    return index, position
        return None


class _GradientHook:
    """Steps a parameter as soon as it has its gradient.

    The garbage collector does not see what a parameter's hooks refer to, so this refers weakly.
    """

    # By which another optimizer's release knows it.
    frees_gradient = True

    def __init__(self, release: GradientRelease) -> None:
        self._release = weakref.ref(release)

    # torch.compile would compile it anew for every parameter.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release._step_or_wait(param)


class _ModelHook:
    """A hook of the model. A copy of the model gets one that does nothing."""

    def __init__(self, call: Callable[..., None] = lambda *_: None) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def enable_gradient_release(model: nn.Module, optimizer: CriticalAdam) -> GradientRelease:
    """Step each parameter inside backward as soon as it has its gradient, and free the gradient.

    Memory never has more gradients than autograd itself needs. Parameters and state are those of
    `optimizer.step()` after backward. From then on `optimizer.step()` only calls its closure, if
    any, and `zero_grad` finds nothing; schedulers and checkpoints work as ever, and param groups
    may be changed and added. Accumulating gradients over several backward passes is not possible:
    each of them steps. A parameter is not stepped while it is frozen.

    Reentrant checkpointing (`torch.utils.checkpoint` with `use_reentrant=True`) keeps the gradients
    until backward ends, and needs a loss that is computed from what `model(...)` returns.

    Args:
        model: The parameters that it shares with the optimizer are stepped in backward.
        optimizer: An optimizer with `priority_scope="tensor"` in all groups; those of
            `cm_fused.compat` with `synced=False`.

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


def _can_have_gradient(param: Tensor) -> bool:
    """Return whether a parameter can have a gradient, now or when it is no longer frozen."""
    can_require = param.is_floating_point() or param.is_complex()
    return param.requires_grad or (can_require and not param.is_inference())


def _hooked(param: Tensor, hook: _GradientHook) -> RemovableHandle:
    """Add a hook to a parameter, which may be frozen, though torch adds none to a frozen one."""
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
    """Yield the model, or the contents of a container that cannot be called."""
    if not isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        yield model
        return
    children: Iterable[nn.Module] = model.children()
    yield from chain.from_iterable(map(_called_modules, children))
