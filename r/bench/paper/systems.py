"""The paper's optimizers on many independent starts at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from cm_fused import SAM, AdamCG, AdamCM

SYSTEMS = ("Adam", "Adam+SAM", "Adam+CG", "Adam+CM")
BUFFERED = {"Adam+CG": AdamCG, "Adam+CM": AdamCM}

Surface = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A system and its hyperparameters; betas are (0.9, 0.99) for all.

    Args:
        system: One of ``SYSTEMS``.
        lr: Learning rate, > 0.
        capacity: C of the buffer, >= 1; Adam and Adam+SAM have none.
        priority_decay: Lambda, in [0, 1]; likewise.
        rho: Radius of SAM's neighbourhood, >= 0; only Adam+SAM has it.
    """

    system: str
    lr: float
    capacity: int = 5
    priority_decay: float = 0.7
    rho: float = 0.05


class RowwiseSAM(SAM):
    """`SAM` whose every row of a parameter (N, D) has a neighbourhood of its own.

    `SAM` takes one norm over all gradients; here each row is another run, which must not know of
    the others.
    """

    @staticmethod
    def _ascend_(
        pairs: list[tuple[Tensor, Tensor]], rho: float, adaptive: bool, sums: object
    ) -> None:
        for param, grad in pairs:
            norm = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)
            param.add_(grad * (rho / (norm + 1e-12)))


class Batch:
    """N runs, independent of each other, one row of ``points`` each.

    The optimizers with a buffer take each row as a parameter, with the priority scope "tensor", so
    that each run has its own buffer; the others are elementwise and take all rows of a setting as
    one. Each setting is a param group.

    Args:
        surface: What is minimized: (N, D) to (N,).
        starts: (N, D), floating; not changed.
        settings: Of one system; each has an equal share of the rows, in order.

    Attributes:
        points: Where the runs are, (N, D); changed by `step`.
        optimizer: The optimizer.
    """

    def __init__(self, surface: Surface, starts: Tensor, *settings: Setting) -> None:
        self._surface = surface
        self.points = starts.clone()
        self._gradients = torch.empty_like(starts)
        self._params: list[Tensor] = []
        self._param_gradients: list[Tensor] = []
        groups = []
        for setting, points, gradients in zip(
            settings,
            self.points.chunk(len(settings)),
            self._gradients.chunk(len(settings)),
            strict=True,
        ):
            rowwise = setting.system in BUFFERED
            params = [row.requires_grad_() for row in (points.unbind() if rowwise else [points])]
            self._params += params
            self._param_gradients += gradients.unbind() if rowwise else [gradients]
            groups.append({"params": params, **_options(setting)})
        self.optimizer = _optimizer(groups, settings[0])

    def step(self) -> None:
        """Take one step of every run."""
        self.optimizer.step(self._closure)  # type: ignore[arg-type]

    def _closure(self) -> None:
        points = self.points.detach().requires_grad_()
        with torch.enable_grad():
            total = self._surface(points).sum()
        (gradients,) = torch.autograd.grad(total, points)
        self._gradients.copy_(gradients)
        for param, gradient in zip(self._params, self._param_gradients, strict=True):
            param.grad = gradient


def _options(setting: Setting) -> dict[str, object]:
    options: dict[str, object] = {"lr": setting.lr, "betas": (0.9, 0.99)}
    if setting.system in BUFFERED:
        options["capacity"] = setting.capacity
        options["priority_decay"] = setting.priority_decay
        options["priority_scope"] = "tensor"
    return options


def _optimizer(groups: list[dict[str, Any]], setting: Setting) -> Optimizer:
    if setting.system in BUFFERED:
        return BUFFERED[setting.system](groups)
    adam = Adam(groups)
    return RowwiseSAM(adam, setting.rho) if setting.system == "Adam+SAM" else adam


def trajectory(surface: Surface, starts: Tensor, setting: Setting, steps: int) -> Tensor:
    """Return where the runs are after every step, (steps + 1, N, D); the first are the starts."""
    batch = Batch(surface, starts, setting)
    path = [starts]
    for _ in range(steps):
        batch.step()
        path.append(batch.points.detach().clone())
    return torch.stack(path)
