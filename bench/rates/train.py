"""One run of a task: from the same weights and on the same batches for every optimizer."""

from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LinearLR

from bench.demo.tasks import cross_entropy
from bench.rates.setups import SETTINGS, SYSTEMS, TASKS

_DIGITS = 6


@dataclass(frozen=True)
class Job:
    """What a run is made from.

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
    # As in the demo: without the decay the noise of the last steps hides the differences.
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=task.steps)
    batches = torch.Generator().manual_seed(job.seed)
    for _ in range(task.steps):
        examples = torch.randint(len(data.train_inputs), (task.batch_size,), generator=batches)
        loss = cross_entropy(model(data.train_inputs[examples]), data.train_targets[examples])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        loss = cross_entropy(model(data.val_inputs), data.val_targets)
    return float(f"{loss.item():.{_DIGITS}g}")
