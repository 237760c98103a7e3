"""Sharpness-aware minimization around any optimizer."""

import inspect
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused._distributed import local, local_grad
from cm_fused._optimizer.ascent import Sums, ascend_, count_nonzero
from cm_fused._optimizer.checks import NOT_NEGATIVE, check_number, plain_options
from cm_fused._optimizer.closures import TwoCalls
from cm_fused._optimizer.tensor_checks import check_not_flattened, check_placement

# The attributes of a copy; between the half-steps `_originals` has the unperturbed parameters.
_COPIED = ("optimizer", "rho", "adaptive", "_originals")


class SAM(Optimizer):
    r"""Sharpness-aware minimization: a step uses the gradient from where the loss is worst.

    The wrapped optimizer steps from :math:`\theta` with the gradient at :math:`\theta + \epsilon`,

    .. math::
        \epsilon = \rho \, g / \lVert g \rVert, \qquad
        \epsilon = \rho \, \theta^2 g / \lVert \theta g \rVert \text{ if adaptive},

    where the norm is over all gradients of all param groups. The parameters get back every bit
    before the wrapped optimizer steps. Nothing waits for a device, with three exceptions:
    parameters on several devices, a closure that does not set the gradients to None, and `step`
    without a closure, which reads whether all gradients are zero.

    Parameters may be DTensors (FSDP2, tensor parallelism), and plain tensors beside them: the norm
    is that of the full tensors, by one sum of a float64 over the processes.

    Gradients accumulate over micro-batches in a closure that zeroes them and then runs all backward
    passes, or by hand: all backward passes, ``first_step(zero_grad=True)``, the same passes again,
    ``second_step(zero_grad=True)``. A closure that computes only the last micro-batch, as
    Lightning's ``accumulate_grad_batches`` passes, is refused.

    Groups, state, hooks, `zero_grad` and checkpoints are the wrapped optimizer's: a checkpoint of
    one loads into the other. Step hooks run once a step, around the wrapped optimizer's. Between
    `first_step` and `second_step` there is one more copy of the parameters with gradients.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization";
    adaptive: Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization".

    Args:
        optimizer: The optimizer that steps. `step()` changes it and its parameters.
        rho: Radius of the neighbourhood, >= 0.
        adaptive: Scale the neighbourhood by each parameter's magnitude (ASAM).

    Attributes:
        optimizer: The wrapped optimizer.
        rho: May be changed between steps. Not saved in checkpoints.
        adaptive: Likewise.

    Raises:
        TypeError: `optimizer` is not a `torch.optim.Optimizer`, or its step needs a closure, as
            that of `torch.optim.LBFGS` does.
        ValueError: `rho` is negative, not finite or no number, or a parameter is a shard of FSDP1.
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

    _ascend_ = staticmethod(ascend_)

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False) -> None:
        # Optimizer's own constructor would make groups and state: SAM's are the wrapped one's.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        _check_takes_no_closure(optimizer)
        rho = plain_options({"rho": rho})["rho"]
        check_number("rho", rho, *NOT_NEGATIVE)
        _check_not_released(optimizer)
        for i, group in enumerate(optimizer.param_groups):
            check_not_flattened(i, group, ValueError)
        self.optimizer = optimizer
        self.rho = rho
        self.adaptive = adaptive
        # The perturbed parameters and copies of their local tensors; None except between the two
        # half-steps.
        self._originals: tuple[list[Tensor], list[Tensor]] | None = None
        self._forget()

    def _forget(self) -> None:
        """Forget the results of earlier steps on the parameters and the closure."""
        self._sums = Sums()
        # Whether the closure of the last step that found gradients zeroed them.
        self._closure_zeroes = False

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped optimizer's attribute: its hooks, for one."""
        if name == "optimizer":  # of a copy that is not complete yet
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
                optimizer's. `torch.distributed.checkpoint` steps so to get an optimizer's state.

        Returns:
            The loss of the first call, at the unperturbed parameters.

        Raises:
            RuntimeError: There is no closure, and a gradient is not zero; or the closure adds to
                gradients that were there before, which its second call would not compute again.
                The parameters are then what they were, and the wrapped optimizer did not step.
        """
        _check_not_released(self.optimizer)
        if closure is None:
            self._step_of_zero_gradients()
            return None
        calls = TwoCalls(closure, self._params(), self._total, self._closure_zeroes)
        loss = calls.first()
        self.first_step()
        try:
            calls.second()
        except BaseException:
            self._restore()
            raise
        finally:
            self._closure_zeroes = calls.zeroes
        self.second_step()
        return loss

    @torch.no_grad()
    def _step_of_zero_gradients(self) -> None:
        if self._originals is not None or self._total(count_nonzero(self._params())).item():
            raise RuntimeError(
                "SAM.step needs a closure, which computes the gradients twice; without one call "
                "first_step and second_step, each after a backward pass"
            )
        self._step_wrapped()

    def _step_wrapped(self) -> None:
        self.optimizer.step()
        self._opt_called = True  # a scheduler looks for it, where `step` was not called

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the parameters to where the loss is worst.

        Args:
            zero_grad: Reset the gradients afterwards.

        Raises:
            RuntimeError: The parameters have been moved already, a gradient is sparse, or a plain
                tensor for a DTensor or the reverse, or a parameter is a shard of FSDP1. Nothing has
                been changed then.
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
            self._sums.follow(self._params())
            pairs = list(zip(params, grads, strict=True))
            self._ascend_(pairs, self.rho, self.adaptive, self._sums)
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
        """Return the parameters that have a gradient; RuntimeError where one does not fit."""
        pairs = [(param, param.grad) for param in self._params() if param.grad is not None]
        for i, (param, grad) in enumerate(pairs):
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"SAM needs dense gradients, got layout {grad.layout} for the gradient of "
                    f"parameter {i}; for an embedding, use sparse=False"
                )
            check_placement(f"the gradient of parameter {i}", param, grad)
        return [param for param, _ in pairs]

    def _total(self, value: Tensor) -> Tensor:
        """Return the sum of a value over the processes that the parameters are sharded among."""
        self._sums.follow(self._params())
        return self._sums.total(value)

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
        return {name: getattr(self, name) for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _COPIED:
            setattr(self, name, state[name])
        self._forget()

    def __repr__(self) -> str:
        return f"SAM(rho={self.rho}, adaptive={self.adaptive}) of {self.optimizer!r}"


def _check_takes_no_closure(optimizer: Optimizer) -> None:
    """Check that the wrapped optimizer steps without a closure, as `second_step` calls it."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            "optimizer must step without a closure, with the gradients there are, got "
            f"{type(optimizer).__name__}, whose step(closure) computes more of them"
        )


def _check_not_released(optimizer: Optimizer) -> None:
    if getattr(optimizer, "_release", None) is not None:
        raise RuntimeError(
            "SAM needs an optimizer that steps in step(), got one with gradient release, which "
            "steps in each of the two backward passes; call remove() of what "
            "enable_gradient_release returned"
        )


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
