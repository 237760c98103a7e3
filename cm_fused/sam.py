"""Sharpness-aware minimization around any optimizer."""

from collections.abc import Callable
from operator import is_
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused._backends.capture import is_capturing
from cm_fused._distributed import Processes, is_sharded, local, local_grad
from cm_fused._optimizer.checks import check_not_flattened
from cm_fused._optimizer.closures import Found, Marks, any_of, are_nan, reset

# Keeps the perturbation of a zero gradient zero.
_TINY = 1e-12
# The attributes of a copy; between the half-steps `_originals` has the unperturbed parameters.
_TRAVELS = ("optimizer", "rho", "adaptive", "_originals")


_ACCUMULATES = (
    "closure must zero the gradients before it adds to them, as SAM.step calls it twice, at other "
    "parameters; got one that adds to the gradients it finds, or computes none. To accumulate, let "
    "the closure zero the gradients and then run the backward passes of all micro-batches; or run "
    "these, call first_step(zero_grad=True), run them again, call second_step(zero_grad=True). The "
    "parameters are what they were, the gradients are reset"
)


class SAM(Optimizer):
    r"""Sharpness-aware minimization: the gradient a step uses is taken where the loss is worst.

    The wrapped optimizer steps from :math:`\theta` with the gradient at :math:`\theta + \epsilon`,

    .. math::
        \epsilon = \rho \, g / \lVert g \rVert, \qquad
        \epsilon = \rho \, \theta^2 g / \lVert \theta g \rVert \text{ if adaptive},

    where the norm is over all gradients of all param groups. The parameters are put back exactly,
    to the bit, before the wrapped optimizer steps. Nothing waits for a device, with two exceptions:
    parameters on several devices, and a closure that does not set the gradients to None.

    Parameters may be DTensors (FSDP2, tensor parallelism), and plain tensors beside them: the norm
    is that of the whole tensors, by one sum of a float64 over the processes.

    Gradients accumulate over micro-batches in a closure that zeroes them and then runs all backward
    passes, or by hand: all backward passes, ``first_step(zero_grad=True)``, the same passes again,
    ``second_step(zero_grad=True)``. A closure of the last micro-batch alone, as Lightning's
    ``accumulate_grad_batches`` passes, is refused.

    Groups, state, hooks, `zero_grad` and checkpoints are the wrapped optimizer's: a checkpoint of
    one loads into the other. Step hooks run once a step, around the wrapped optimizer's. Between
    `first_step` and `second_step` one more copy of the parameters with gradients is kept.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization";
    adaptive: Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization".

    Args:
        optimizer: The optimizer that steps. Changed by `step()`, and its parameters.
        rho: Radius of the neighbourhood, >= 0.
        adaptive: Scale the neighbourhood by each parameter's magnitude (ASAM).

    Attributes:
        optimizer: The wrapped optimizer.
        rho: May be changed between steps. Not saved in checkpoints.
        adaptive: Likewise.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`.
        ValueError: `rho` is negative or not finite, or a parameter is a shard of FSDP1.
        RuntimeError: Gradient release is enabled for `optimizer`; steps raise it too.

    Example:
        >>> import torch
        >>> from cm_fused import SAM, AdamCM
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SAM(AdamCM(model.parameters(), lr=1e-2))
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(2)).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure)
    """

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        # Optimizer's own constructor would make groups and state, which are the wrapped one's.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not 0.0 <= rho < float("inf"):
            raise ValueError(f"rho must be finite and >= 0, got {rho}")
        _check_not_released(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            check_not_flattened(i, group, ValueError)
        self.optimizer = optimizer
        self.rho = rho
        self.adaptive = adaptive
        # The perturbed parameters and what this process has of them in their place; None except
        # between the two half-steps.
        self._originals: tuple[list[Tensor], list[Tensor]] | None = None
        self._forget()

    def _forget(self) -> None:
        """Forget what earlier steps found out about the parameters and the closure."""
        self._shards: _Shards | None = None
        # Whether the closure of the last step that found gradients zeroed them.
        self._closure_zeroes = False

    def __getattr__(self, name: str) -> Any:
        """Find what Optimizer keeps of itself, hooks for one, where it is: in the wrapped one."""
        if name == "optimizer":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take both half-steps.

        Args:
            closure: Zeroes the gradients, computes the loss and its gradients, and returns the
                loss. Called twice, with gradients enabled. It need not zero gradients that are
                None or zero before the step, as SAM resets them before the second call. It is
                called a third time if its gradients are NaN, it zeroes in place and autograd does
                not accumulate them (FSDP2 does, and a closure may copy them).

                None is allowed if every gradient is zero or None. The step is then the wrapped
                optimizer's. `torch.distributed.checkpoint` makes an optimizer's state so.

        Returns:
            What the first call returned: the loss where the parameters were.

        Raises:
            RuntimeError: There is no closure, and a gradient is not zero; or the closure adds to
                gradients that were there before, which its second call would not compute again.
                The parameters are then what they were, and the wrapped optimizer did not step.
        """
        _check_not_released(self.optimizer)
        if closure is None:
            self._step_of_zero_gradients()
            return None
        found = Found(self._params())
        nonzero = self._nonzero_to_ask_for(found)
        with torch.enable_grad():
            loss = closure()
        kept = found.kept()
        must_zero = self._must_zero(kept, nonzero)
        self.first_step()
        try:
            self._call_again(closure, kept, must_zero)
        except BaseException:
            self._restore()
            raise
        if found and not kept:
            self._closure_zeroes = True
        self.second_step()
        return loss

    def _nonzero_to_ask_for(self, found: Found) -> Tensor | None:
        """Return how many gradients are not zero if that may decide about the closure, else None.

        All gradients are read for it, so it is not done for a closure that zeroed the last ones. A
        CUDA graph captures no check: the steps before have made it.
        """
        is_known = not found or self._closure_zeroes or self._is_captured()
        return None if is_known else self._nonzero_gradients()

    def _must_zero(self, kept: list[Tensor], nonzero: Tensor | None) -> bool:
        """Return whether a closure that does not zero the gradients would be wrong.

        Args:
            kept: The parameters whose gradients its first call did not replace.
            nonzero: How many gradients were not zero before; None if that is unknown.
        """
        if not kept or self._is_captured():
            return False
        return nonzero is None or bool(self._summed(nonzero).item())

    def _is_captured(self) -> bool:
        return any(map(is_capturing, {param.device for param in self._params()}))

    def _call_again(
        self, closure: Callable[[], float], kept: list[Tensor], must_zero: bool
    ) -> None:
        """Call the closure again, on gradients of zero.

        Args:
            closure: That of `step`.
            kept: The parameters whose gradients the first call did not replace.
            must_zero: Whether to check that it zeroes these.

        Raises:
            RuntimeError: It does not. The gradients are reset then.
        """
        params = self._params()
        reset(params, kept)
        if not must_zero:
            with torch.enable_grad():
                closure()
            return
        # One parameter shows whether a closure that zeroed all of them still does.
        filled = [param for param in kept if param.numel()]
        marked = filled[:1] if self._closure_zeroes else filled
        self._closure_zeroes = False
        try:
            with Marks(marked) as marks, torch.enable_grad():
                closure()
            if self._adds(closure, kept, marks):
                raise RuntimeError(_ACCUMULATES)
        except BaseException:
            reset(params, kept)  # no mark stays
            raise
        self._closure_zeroes = True

    def _adds(self, closure: Callable[[], float], kept: list[Tensor], marks: Marks) -> bool:
        """Return whether a closure has added to marked gradients; may call it once more."""
        unsure = marks.unsure()
        flags = any_of(marks.added_to()), any_of(are_nan(unsure))
        added, is_unsure = self._summed(torch.stack([flag.cpu() for flag in flags])).tolist()
        if added or not is_unsure:
            return bool(added)
        # NaN may be the mark or the closure's own gradient, which is NaN again without a mark.
        reset(self._params(), kept)
        with torch.enable_grad():
            closure()
        finite = any_of([~flag for flag in are_nan(unsure)])
        return bool(self._summed(finite).item())

    @torch.no_grad()
    def _step_of_zero_gradients(self) -> None:
        if self._originals is not None or self._summed(self._nonzero_gradients()).item():
            raise RuntimeError(
                "SAM.step needs a closure, which computes the gradients twice; without one call "
                "first_step and second_step, each after a backward pass"
            )
        self._step_wrapped()

    def _step_wrapped(self) -> None:
        self.optimizer.step()
        self._opt_called = True  # what a scheduler looks for, where `step` was not called

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the parameters to where the loss is worst.

        Args:
            zero_grad: Reset the gradients afterwards.

        Raises:
            RuntimeError: The parameters are there already, a gradient is sparse, or a plain tensor
                for a DTensor or the reverse, or a parameter is a shard of FSDP1. Nothing has been
                changed then.
        """
        if self._originals is not None:
            raise RuntimeError("first_step was called twice; call second_step before the next one")
        _check_not_released(self.optimizer)
        for i, group in enumerate(self.param_groups):
            # A model may have been wrapped since the optimizer was built.
            check_not_flattened(i, group)
        params = self._participants()
        grads = [local_grad(param) for param in params]
        targets = [local(param) for param in params]
        originals = [torch.empty_like(target) for target in targets]
        _copy_(originals, targets)
        self._originals = params, originals
        try:
            self._perturb(params, grads)
        except BaseException:
            self._restore()
            raise
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Put the parameters back and let the wrapped optimizer step with the new gradients.

        Args:
            zero_grad: Reset the gradients afterwards.

        Raises:
            RuntimeError: There was no `first_step`.
        """
        if self._originals is None:
            raise RuntimeError("second_step needs a first_step before it")
        self._restore()
        self._step_wrapped()
        if zero_grad:
            self.zero_grad()

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _participants(self) -> list[Tensor]:
        """Return the parameters that have a gradient, which must be dense and placed as they are.

        Raises:
            RuntimeError: A gradient is neither.
        """
        params = [param for param in self._params() if param.grad is not None]
        for i, param in enumerate(params):
            _check_gradient(i, param)
        return params

    def _sharded_among(self) -> "_Shards | None":
        """Return how the parameters are sharded; None where they are not."""
        params = self._params()
        if not any(map(is_sharded, params)):
            return None
        if self._shards is None or not self._shards.are_of(params):
            self._shards = _Shards(params)
        return self._shards

    @torch.no_grad()
    def _nonzero_gradients(self) -> Tensor:
        """Return how many gradients are not zero in what this process has of them, float64 ()."""
        return _nonzero([local(param.grad) for param in self._params() if param.grad is not None])

    def _summed(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the processes that the parameters are sharded among."""
        shards = self._sharded_among()
        return value if shards is None else shards.total(value)

    def _perturb(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """Add the perturbation to parameters.

        Args:
            params: All that have a gradient; changed.
            grads: Those of what this process has of each.
        """
        alike = _alike(params, grads)
        shards = self._sharded_among()
        counted = alike if shards is None else _alike(*shards.counted(params, grads))
        norm = _norm([_products(*lists) if self.adaptive else lists[1] for lists in counted])
        if shards is not None:
            norm = shards.total(norm.square()).sqrt()
        for these, directions in alike:
            scale = _on(these[0].device, self.rho / (norm + _TINY))
            if self.adaptive:
                directions = _products(these, _products(these, directions))
            elif these[0].dtype in (torch.bfloat16, torch.float16):
                # What is added is computed in float32, and rounded once: to the parameter.
                directions = [direction.float() for direction in directions]
            moves = torch._foreach_mul(directions, scale.to(directions[0].dtype))
            torch._foreach_add_(these, moves)

    def _restore(self) -> None:
        params, originals = self._originals or ([], [])
        self._originals = None
        with torch.no_grad():
            _copy_([local(param) for param in params], originals)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state dict."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the wrapped optimizer, with or without SAM."""
        self.optimizer.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs.

        Hooks are not copied, as torch's optimizers do not copy them. Nor is the `step` that a
        scheduler sets on the instance: it steps this optimizer, not the copy.
        """
        return {name: getattr(self, name) for name in _TRAVELS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _TRAVELS:
            setattr(self, name, state[name])
        self._forget()

    def __repr__(self) -> str:
        return f"SAM(rho={self.rho}, adaptive={self.adaptive}) of {self.optimizer!r}"


def _check_not_released(optimizer: Optimizer) -> None:
    if getattr(optimizer, "_release", None) is not None:
        raise RuntimeError(
            "SAM needs an optimizer that steps in step(), got one with gradient release, which "
            "steps in each of the two backward passes; call remove() of what "
            "enable_gradient_release returned"
        )


def _as_real(tensor: Tensor) -> Tensor:
    # Autograd leaves the conjugation of a complex gradient to whoever reads it.
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    # To the CPU only a copy that is waited for can be read.
    return tensor.to(device, non_blocking=device.type != "cpu")


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _alike(params: list[Tensor], grads: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return what this process has of parameters, and its gradients, by device and dtype.

    Multi-tensor kernels need them so. Complex tensors become real ones.
    """
    lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for param, grad in zip(params, grads, strict=True):
        target = _as_real(local(param))
        of_kind = lists.setdefault((target.device, target.dtype), ([], []))
        of_kind[0].append(target)
        of_kind[1].append(_as_real(grad))
    return list(lists.values())


def _products(params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Return theta * g, in float32 or wider."""
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    return list(torch._foreach_mul([param.to(dtype) for param in params], grads))


def _norm(alike: list[list[Tensor]]) -> Tensor:
    """Return the norm over all tensors, float64 (), on the first one's device."""
    if not alike:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    norms = [
        _on(alike[0][0].device, norm)
        for tensors in alike
        for norm in torch._foreach_norm(tensors, dtype=torch.float64)
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def _nonzero(tensors: list[Tensor]) -> Tensor:
    """Return how many tensors are not all zeros, float64 (), on the first one's device."""
    dense = [tensor if tensor.layout == torch.strided else tensor.to_dense() for tensor in tensors]
    filled = [_as_real(tensor) for tensor in dense if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    # Not the Euclidean norm: squares of small values are 0.
    norms = torch._foreach_norm(filled, 1)
    flags = [_on(filled[0].device, (norm != 0).double()) for norm in norms]
    return torch.stack(flags).sum()


def _check_gradient(index: int, param: Tensor) -> None:
    grad = param.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"SAM needs dense gradients, got layout {grad.layout} for the gradient of parameter "
            f"{index}; for an embedding, use sparse=False"
        )
    if is_sharded(grad) != is_sharded(param):
        raise RuntimeError(
            f"the gradient of parameter {index} must be a DTensor as its parameter is, or neither, "
            f"got {type(grad)} for {type(param)}"
        )


class _Shards:
    """How parameters are sharded among processes."""

    def __init__(self, params: list[Tensor]) -> None:
        self._params = params
        self._processes = Processes(params)
        counted = self._processes.counted.tolist()
        # The parameters are kept, so that no other has the address of one.
        self._counted = {id(param) for param, share in zip(params, counted, strict=True) if share}

    def are_of(self, params: list[Tensor]) -> bool:
        """Return whether these are the parameters."""
        return len(params) == len(self._params) and all(map(is_, params, self._params))

    def counted(
        self, params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return those of parameters, and their gradients, that this process counts in a sum.

        Where several processes have the same part of a parameter, one of them counts it.
        """
        pairs = [
            (param, grad)
            for param, grad in zip(params, grads, strict=True)
            if id(param) in self._counted
        ]
        return [param for param, _ in pairs], [grad for _, grad in pairs]

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the processes, all of which must call this."""
        total = value.to(self._processes.device, copy=True)
        self._processes.start_sum(total).wait()
        return total
