"""The paper's optimizers on many independent starts at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused import AdamCG, AdamCM
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM

SYSTEMS = ("Adam", "Adam+SAM", "Adam+CG", "Adam+CM", "Adam+SAM+CM")
# The systems with a buffer, by the paper's equations and by the rules of the research package.
_PAPER_RULES: dict[str, type[Optimizer]] = {
    "Adam+CG": AdamCG,
    "Adam+CM": AdamCM,
    "Adam+SAM+CM": AdamCM,
}
_PACKAGE_RULES: dict[str, type[Optimizer]] = {
    "Adam+CG": Adam_C,
    "Adam+CM": Adam_CM,
    "Adam+SAM+CM": Adam_CM,
}
BUFFERED = tuple(_PAPER_RULES)
# More rows at once do not fit into the processor's cache, and take longer in all.
_ROWS = 400

Surface = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A system and its hyperparameters.

    Args:
        system: One of ``SYSTEMS``.
        lr: Learning rate, > 0.
        capacity: C of the buffer, >= 1; of the systems with a buffer.
        priority_decay: Lambda, in [0, 1]; likewise.
        rho: Radius of SAM's neighbourhood, >= 0; of the systems with SAM.
        betas: Decay rates of momentum and second moment.
        package_rules: The buffer follows the research package (`cm_fused.compat`): mean over the
            filled slots, eps outside of the root, a first step that only stores.
        drop: The step from which on the learning rate is a tenth; None: never.
    """

    system: str
    lr: float
    capacity: int = 5
    priority_decay: float = 0.7
    rho: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    package_rules: bool = False
    drop: int | None = 250

    @property
    def has_buffer(self) -> bool:
        """Whether it has critical momenta or gradients."""
        return self.system in BUFFERED

    @property
    def has_sam(self) -> bool:
        """Whether its gradients are those of the neighbourhood's worst point."""
        return "SAM" in self.system


class PaperAdam(Optimizer):
    """Adam with eps inside of the root, eq. (1) and (2), which torch's does not have."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step of every parameter."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state, g = self.state[param], param.grad
                if not state:
                    state.update(step=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
                state["step"] += 1
                m = state["m"].mul_(beta1).add_(g, alpha=1 - beta1)
                v = state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
                corrected = m / (1 - beta1 ** state["step"])
                root = (v / (1 - beta2 ** state["step"]) + group["eps"]).sqrt()
                param.sub_(group["lr"] * corrected / root)


class Batch:
    """Runs of several settings from the same starts, all independent of each other.

    The optimizers with a buffer take each run as a parameter, with the priority scope "tensor", so
    that each has its own buffer; Adam is elementwise and takes all runs of a setting as one. Each
    setting is a param group.

    Args:
        surface: What is minimized: (settings, N, D) to (settings, N).
        starts: (N, D), floating; not changed.
        settings: All with SAM or none, and of one optimizer.

    Attributes:
        points: Where the runs are, (settings, N, D); changed by `step`.
        gradients: Of the last step, likewise; with SAM those that the optimizer used.
        optimizer: The optimizer.
    """

    def __init__(self, surface: Surface, starts: Tensor, settings: Sequence[Setting]) -> None:
        self._surface, self._settings = surface, settings
        self.points = starts.repeat(len(settings), 1, 1)
        self.gradients = torch.empty_like(self.points)
        radii = [setting.rho for setting in settings]
        self._rho = torch.tensor(radii, dtype=starts.dtype)[:, None, None]
        groups = []
        for setting, points, gradients in zip(settings, self.points, self.gradients, strict=True):
            params = points.unbind() if setting.has_buffer else (points,)
            grads = gradients.unbind() if setting.has_buffer else (gradients,)
            for param, grad in zip(params, grads, strict=True):
                param.requires_grad_().grad = grad
            groups.append({"params": list(params), **_options(setting)})
        self.optimizer = _optimizer_class(settings[0])(groups)
        self._steps = 0

    def step(self) -> Tensor:
        """Take one step of every run; return the losses before it, (settings, N)."""
        for group, setting in zip(self.optimizer.param_groups, self._settings, strict=True):
            if setting.drop == self._steps:
                group["lr"] = setting.lr / 10
        points = self.points.detach()
        losses, gradients = self._evaluate(points)
        if self._settings[0].has_sam:
            norms = torch.linalg.vector_norm(gradients, dim=-1, keepdim=True)
            _, gradients = self._evaluate(points + gradients * (self._rho / (norms + 1e-12)))
        self.gradients.copy_(gradients)
        self.optimizer.step()
        self._steps += 1
        return losses

    def losses(self) -> Tensor:
        """Return the losses where the runs are, (settings, N)."""
        with torch.no_grad():
            return self._surface(self.points.detach())

    def _evaluate(self, points: Tensor) -> tuple[Tensor, Tensor]:
        points = points.clone().requires_grad_()
        losses = self._surface(points)
        (gradients,) = torch.autograd.grad(losses.sum(), points)
        return losses.detach(), gradients


def _options(setting: Setting) -> dict[str, object]:
    options: dict[str, object] = {"lr": setting.lr, "betas": setting.betas}
    if not setting.has_buffer:
        return options
    if setting.package_rules:
        names = {"topC": setting.capacity, "decay": setting.priority_decay, "synced": False}
        return {**options, **names}
    return {
        **options,
        "capacity": setting.capacity,
        "priority_decay": setting.priority_decay,
        "priority_scope": "tensor",
    }


def _optimizer_class(setting: Setting) -> Any:
    if not setting.has_buffer:
        return PaperAdam
    return (_PACKAGE_RULES if setting.package_rules else _PAPER_RULES)[setting.system]


@dataclass(frozen=True)
class Run:
    """The results of the runs of a setting.

    Args:
        losses: Before every step and at the end, (steps + 1, N).
        path: Where they were then, (steps + 1, N, D); unless it was asked for, the end alone,
            (1, N, D).
        length: How far they went in all, (N,).
    """

    losses: Tensor
    path: Tensor
    length: Tensor

    @property
    def ends(self) -> Tensor:
        """The last points, (N, D)."""
        return self.path[-1]


def run(
    surface: Surface,
    starts: Tensor,
    settings: Sequence[Setting],
    steps: int,
    *,
    with_path: bool = False,
) -> dict[Setting, Run]:
    """Run every setting from every start.

    Args:
        surface: Points (..., N, D) to values (..., N).
        starts: (N, D), floating; not changed.
        settings: Any.
        steps: How many, >= 1.
        with_path: Keep every point.
    """
    found: dict[Setting, Run] = {}
    # Duplicates run once.
    ordered = sorted(dict.fromkeys(settings), key=_kind)
    at_once = max(1, _ROWS // len(starts))
    for _, group in groupby(ordered, key=_kind):
        alike = list(group)
        for first in range(0, len(alike), at_once):
            chosen = alike[first : first + at_once]
            found |= _run_batch(Batch(surface, starts, chosen), chosen, steps, with_path)
    return found


def _kind(setting: Setting) -> tuple[bool, bool, str]:
    """The part that the settings of a batch share."""
    optimizer = _optimizer_class(setting).__name__
    return setting.has_sam, setting.package_rules, optimizer


def _run_batch(
    batch: Batch, settings: Sequence[Setting], steps: int, with_path: bool
) -> dict[Setting, Run]:
    losses, points = [], [batch.points.detach().clone()]
    length = torch.zeros(batch.points.shape[:-1], dtype=batch.points.dtype)
    for _ in range(steps):
        losses.append(batch.step())
        points.append(batch.points.detach().clone())
        length += torch.linalg.vector_norm(points[-1] - points[-2], dim=-1)
        if not with_path:
            del points[:-1]
    losses.append(batch.losses())
    kept, values = torch.stack(points), torch.stack(losses)
    return {s: Run(values[:, i], kept[:, i], length[i]) for i, s in enumerate(settings)}
