"""One training run, and many of them in parallel."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from bench.demo.contenders import CONTENDERS
from bench.demo.tasks import TASKS, Task, cross_entropy

_CURVE_POINTS = 25
_REFRESH_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """The settings of one run; plain values, so that it can be sent to a worker.

    Args:
        task: A key of ``TASKS``.
        contender: A key of ``CONTENDERS``.
        lr: Learning rate of the first step; it falls linearly to zero.
        seed: Of the initial weights and of the batches.
        steps: Optimizer steps.
    """

    task: str
    contender: str
    lr: float
    seed: int
    steps: int


@dataclass(frozen=True)
class Run:
    """The results of one run.

    Args:
        job: What it was made from.
        eval_steps: Steps after which the validation loss was taken.
        val_losses: The validation loss at each of them.
        train_loss: Mean over the batches since the last but one of them.
        score: The task's score on the validation examples, at the end.
        state_bytes: Optimizer state, bytes per parameter.
    """

    job: Job
    eval_steps: list[int]
    val_losses: list[float]
    train_loss: float
    score: float
    state_bytes: float


def state_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Return the bytes of all state tensors that a checkpoint holds, per parameter."""
    parameters = sum(param.numel() for group in optimizer.param_groups for param in group["params"])
    state = optimizer.state_dict()["state"]
    tensors = (value for entry in state.values() for value in entry.values())
    size = sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
    return float(size / parameters)


def batch_losses(
    task: Task, model: nn.Module, optimizer: Optimizer, steps: int, seed: int
) -> Iterator[float]:
    """Train; yield the loss of each batch after its step.

    Args:
        task: Whose data and batch size.
        model: Changed.
        optimizer: Its learning rate falls linearly to zero.
        steps: How many.
        seed: Of the batches.
    """
    data = task.load()
    # Decayed to zero, else the noise of the last steps hides the differences.
    schedule = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)
    batches = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        examples = torch.randint(len(data.train_inputs), (task.batch_size,), generator=batches)
        loss = cross_entropy(model(data.train_inputs[examples]), data.train_targets[examples])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        yield loss.item()


def train(job: Job, on_step: Callable[[], None]) -> Run:
    """Train one model with one optimizer.

    The seed alone decides the initial weights and the batches, so the runs of one seed
    differ in the optimizer only.

    Args:
        job: What to train.
        on_step: Called after every step.
    """
    task = TASKS[job.task]
    data = task.load()
    torch.manual_seed(job.seed)
    model = task.build()
    optimizer = CONTENDERS[job.contender].make(model.parameters(), lr=job.lr)
    losses = batch_losses(task, model, optimizer, job.steps, job.seed)
    eval_every = max(1, job.steps // _CURVE_POINTS)
    eval_steps: list[int] = []
    val_losses: list[float] = []
    recent_losses: list[float] = []
    train_loss = score = float("nan")
    for step in range(job.steps + 1):
        if step % eval_every == 0 or step == job.steps:
            with torch.no_grad():
                logits = model(data.val_inputs)
                val_losses.append(cross_entropy(logits, data.val_targets).item())
                score = task.score(logits, data.val_targets)
            eval_steps.append(step)
            if recent_losses:
                train_loss = sum(recent_losses) / len(recent_losses)
                recent_losses.clear()
        if step == job.steps:
            break
        recent_losses.append(next(losses))
        on_step()
    return Run(job, eval_steps, val_losses, train_loss, score, state_bytes_per_parameter(optimizer))


class _Worker:
    """The objects that a worker process keeps between jobs."""

    steps_done: "Synchronized[int]"


def _start_worker(steps_done: "Synchronized[int]") -> None:
    # One thread each: models this small gain more from a second run than from a second
    # thread, and the results do not depend on the number of cores.
    torch.set_num_threads(1)
    _Worker.steps_done = steps_done


def _count_step() -> None:
    with _Worker.steps_done.get_lock():
        _Worker.steps_done.value += 1


def _train_in_worker(job: Job) -> Run:
    return train(job, _count_step)


def train_all(jobs: Sequence[Job], workers: int) -> list[Run]:
    """Train every job, with one progress bar over the steps of all.

    Args:
        jobs: The runs; the longest should come first.
        workers: Processes to use, each with one thread.

    Returns:
        The runs in the order of ``jobs``.
    """
    # A forked child would inherit torch's thread pool in an unusable state.
    context = multiprocessing.get_context("spawn")
    steps_done = context.Value("q", 0)
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (steps_done,)) as pool,
        tqdm(
            total=sum(job.steps for job in jobs), desc="training", unit="step", disable=None
        ) as bar,
    ):
        futures = [pool.submit(_train_in_worker, job) for job in jobs]
        pending = set(futures)
        try:
            while pending:
                done, pending = wait(pending, _REFRESH_SECONDS)
                bar.update(steps_done.value - bar.n)
                for future in done:
                    # Raises what the worker raised, before the other runs have ended.
                    future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]
