"""The decoupled forms' defaults."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from cm_fused._optimizer.base import CriticalAdam


class DecoupledCriticalAdam(CriticalAdam):
    """The defaults of the decoupled forms, as AdamW's to Adam. See `AdamCM` for the arguments."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        capacity: int = 5,
        priority_decay: float = 0.7,
        priority_scope: str = "group",
        buffer_mean: str = "capacity",
        eps_inside_sqrt: bool = True,
        buffer_dtype: torch.dtype | None = None,
        moment_dtype: torch.dtype | None = None,
        low_precision_update: str = "nearest",
        seed: int = 0,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        amp_scaling: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        decoupled_weight_decay: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            capacity=capacity,
            priority_decay=priority_decay,
            priority_scope=priority_scope,
            buffer_mean=buffer_mean,
            eps_inside_sqrt=eps_inside_sqrt,
            buffer_dtype=buffer_dtype,
            moment_dtype=moment_dtype,
            low_precision_update=low_precision_update,
            seed=seed,
            max_grad_norm=max_grad_norm,
            skip_nonfinite=skip_nonfinite,
            amp_scaling=amp_scaling,
            maximize=maximize,
            capturable=capturable,
            decoupled_weight_decay=decoupled_weight_decay,
            backend=backend,
        )
