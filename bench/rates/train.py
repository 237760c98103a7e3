"""One run of a task: from the same weights and on the same batches for every optimizer."""

from dataclasses import dataclass

import torch

from bench.demo.tasks import cross_entropy
from bench.demo.train import batch_losses
from bench.rates.setups import SETTINGS, SYSTEMS, TASKS

_DIGITS = 6


@dataclass(frozen=True)
class Job:
    """The settings of a run.

    Args:
        task: A key of ``TASKS``.
        system: A key of ``SYSTEMS`` or of ``SETTINGS``.
        lr: Learning rate of the first step, > 0; it falls linearly to zero.
        seed: Of the initial weights and of the batches.
    """

    task: str
    system: str
    lr: float
    seed: int


def held_out_loss(job: Job) -> float:
    """Train, and return the held-out loss at the end: not a number where training diverged."""
    task = TASKS[job.task]
    data = task.load()
    torch.manual_seed(job.seed)
    model = task.build()
    optimizer = {**SYSTEMS, **SETTINGS}[job.system](model.parameters(), lr=job.lr)
    for _ in batch_losses(task, model, optimizer, task.steps, job.seed):
        pass
    with torch.no_grad():
        loss = cross_entropy(model(data.val_inputs), data.val_targets)
    return float(f"{loss.item():.{_DIGITS}g}")
