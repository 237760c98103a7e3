"""All precisions in step, from the same weights and on the same batches."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from bench.demo.tasks import Task, cross_entropy
from bench.demo.train import state_bytes_per_parameter
from bench.speed.precision.setups import BASELINE, PRECISIONS, TASKS, Precision
from cm_fused import AdamCM


@dataclass
class Run:
    """The results of one run.

    Attributes:
        task: A key of ``TASKS``.
        precision: A key of ``PRECISIONS``.
        seed: Of the initial weights and of the batches.
        state_bytes: Optimizer state in a checkpoint, bytes per parameter.
        val_loss: Held-out loss at the end.
        distances: After each step, the distance of the parameters to float32's, as a part of the
            distance that float32's have gone from their initial values.
    """

    task: str
    precision: str
    seed: int
    state_bytes: float
    val_loss: float
    distances: list[float]


class _Contestant:
    def __init__(self, task: Task, precision: Precision, seed: int, steps: int) -> None:
        torch.manual_seed(seed)
        self.model = task.build()
        self.optimizer = AdamCM(
            self.model.parameters(),
            task.learning_rates["AdamCM"],
            buffer_dtype=precision.buffer_dtype,
            moment_dtype=precision.moment_dtype,
            backend=precision.backend,
            seed=seed,
        )
        # As in the demo: without the decay the noise of the last steps hides the differences.
        self.schedule = LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
        self.distances: list[float] = []

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.schedule.step()

    def flat(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.model.parameters()).detach()


def train(name: str, seed: int, steps: int | None) -> list[Run]:
    """Train a task in every precision.

    Args:
        name: A key of ``TASKS``.
        seed: Of the initial weights, the batches and the stochastic rounding.
        steps: Instead of the task's own number.
    """
    task = TASKS[name]
    data = task.load()
    steps = steps or task.steps
    contestants = {key: _Contestant(task, p, seed, steps) for key, p in PRECISIONS.items()}
    baseline = contestants[BASELINE]
    start = baseline.flat()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        examples = torch.randint(len(data.train_inputs), (task.batch_size,), generator=generator)
        for contestant in contestants.values():
            contestant.step(data.train_inputs[examples], data.train_targets[examples])
        reached = baseline.flat()
        gone = torch.linalg.vector_norm(reached - start)
        for contestant in contestants.values():
            apart = torch.linalg.vector_norm(contestant.flat() - reached)
            # Four digits: the results are kept in the repository.
            contestant.distances.append(float(f"{apart / gone:.4g}"))
    runs = []
    for key, contestant in contestants.items():
        with torch.no_grad():
            loss = float(cross_entropy(contestant.model(data.val_inputs), data.val_targets))
        if not math.isfinite(loss):
            raise ArithmeticError(f"{name} in {key} diverged with seed {seed}: loss {loss}")
        state_bytes = state_bytes_per_parameter(contestant.optimizer)
        runs.append(Run(name, key, seed, state_bytes, loss, contestant.distances))
    return runs
