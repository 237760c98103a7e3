"""Sharpness-aware minimization around any optimizer."""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused._checks import check_not_flattened

# Keeps the perturbation of a zero gradient zero.
_TINY = 1e-12


class SAM(Optimizer):
    r"""Sharpness-aware minimization: the gradient a step uses is taken where the loss is worst.

    The wrapped optimizer steps from :math:`\theta` with the gradient at :math:`\theta + \epsilon`,

    .. math::
        \epsilon = \rho \, g / \lVert g \rVert, \qquad
        \epsilon = \rho \, \theta^2 g / \lVert \theta g \rVert \text{ if adaptive},

    where the norm is over all gradients of all param groups. The parameters are put back exactly,
    to the bit, before the wrapped optimizer steps. Nothing waits for a device, unless parameters
    are on several.

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
        for i, group in enumerate(optimizer.param_groups):
            check_not_flattened(i, group, ValueError)
        self.optimizer = optimizer
        self.rho = rho
        self.adaptive = adaptive
        # The perturbed parameters and what they were; None but between the two half-steps.
        self._originals: tuple[list[Tensor], list[Tensor]] | None = None

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
                loss. Called twice, with gradients enabled.

        Returns:
            What the first call returned: the loss where the parameters were.

        Raises:
            RuntimeError: There is no closure.
        """
        if closure is None:
            raise RuntimeError(
                "SAM.step needs a closure, which computes the gradients twice; without one call "
                "first_step and second_step, each after a backward pass"
            )
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        try:
            with torch.enable_grad():
                closure()
        except BaseException:
            self._restore()
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move the parameters to where the loss is worst.

        Args:
            zero_grad: Reset the gradients afterwards.

        Raises:
            RuntimeError: The parameters are there already, a gradient is sparse, or a parameter
                is a shard of FSDP1. Nothing has been changed then.
        """
        if self._originals is not None:
            raise RuntimeError("first_step was called twice; call second_step before the next one")
        for i, group in enumerate(self.param_groups):
            # A model may have been wrapped since the optimizer was built.
            check_not_flattened(i, group)
        params = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        for i, param in enumerate(params):
            if param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"SAM needs dense gradients, got layout {param.grad.layout} for the gradient "
                    f"of parameter {i}"
                )
        originals = [torch.empty_like(param) for param in params]
        _copy_(originals, params)
        self._originals = params, originals
        try:
            self._perturb([param.detach() for param in params], [param.grad for param in params])
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
        self.optimizer.step()
        self._opt_called = True  # what a scheduler looks for, where `step` was not called
        if zero_grad:
            self.zero_grad()

    def _perturb(self, params: list[Tensor], grads: list[Tensor]) -> None:
        alike = _alike([_as_real(param) for param in params], [_as_real(grad) for grad in grads])
        norm = _norm([_products(*lists) if self.adaptive else lists[1] for lists in alike])
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
            _copy_(params, originals)

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
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"SAM(rho={self.rho}, adaptive={self.adaptive}) of {self.optimizer!r}"


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    # To the CPU only a copy that is waited for can be read.
    return tensor.to(device, non_blocking=device.type != "cpu")


def _copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _alike(params: list[Tensor], grads: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Return parameters and gradients by device and dtype, which multi-tensor kernels need."""
    lists: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for param, grad in zip(params, grads, strict=True):
        of_kind = lists.setdefault((param.device, param.dtype), ([], []))
        of_kind[0].append(param)
        of_kind[1].append(grad)
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
