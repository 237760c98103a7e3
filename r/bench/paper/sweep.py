"""Training runs, each finished one a JSON line, so that an interrupted sweep goes on."""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR
from tqdm import tqdm

from bench.demo.tasks import accuracy, cross_entropy
from bench.demo.train import state_bytes_per_parameter
from bench.paper.contenders import SYSTEMS, Hyperparameters
from bench.paper.datasets import Data
from bench.paper.tasks import TASKS

_CURVE_POINTS = 20
_EVAL_BATCH = 256


@dataclass(frozen=True)
class Config:
    """What one run is made from; two runs of the same config are the same run.

    Args:
        task: A key of ``TASKS``.
        system: A key of ``SYSTEMS``.
        hyperparameters: The optimizer's.
        seed: Of the initial weights and the batches, which the system does not influence.
        steps: Optimizer steps; the learning rate falls linearly to zero over them.
        data: The data's folder, or empty.
        device: Where it trains.
        amp: Whether the model runs under bfloat16 autocast. Bfloat16 has float32's range, so
            gradients need no scaling.
    """

    task: str
    system: str
    hyperparameters: Hyperparameters
    seed: int
    steps: int
    data: str = ""
    device: str = "cpu"
    amp: bool = False


@dataclass(frozen=True)
class Run:
    """What one run gave.

    Args:
        config: What it was made from.
        eval_steps: Steps after which the held-out loss was taken.
        val_losses: The held-out loss at each of them, nats; NaN where it diverged.
        score: Perplexity, or accuracy in percent, at the end.
        state_bytes: Optimizer state, bytes a parameter.
    """

    config: Config
    eval_steps: list[int]
    val_losses: list[float]
    score: float
    state_bytes: float

    @property
    def loss(self) -> float:
        """The last held-out loss; infinite where it diverged, so that it compares."""
        return self.val_losses[-1] if math.isfinite(self.val_losses[-1]) else math.inf


@cache
def _data(task: str, folder: str) -> Data:
    return TASKS[task].load(Path(folder))


Watch = Callable[[Optimizer], AbstractContextManager[object]]


def train(config: Config, watch: Watch = nullcontext) -> Run:
    """Train one model with one optimizer.

    Args:
        config: What to train.
        watch: Called with the optimizer; what it returns is entered for the length of the run.
    """
    data = _data(config.task, config.data)
    torch.manual_seed(config.seed)
    model = TASKS[config.task].build(data.classes).to(config.device)
    optimizer = SYSTEMS[config.system](model.parameters(), config.hyperparameters)
    with watch(optimizer):
        evaluations = list(_evaluations(config, model, optimizer, data))
    steps, losses, accuracies = zip(*evaluations, strict=True)
    # No float holds the perplexity of a loss above 709.
    score = math.exp(min(losses[-1], 700)) if TASKS[config.task].text else accuracies[-1]
    return Run(config, list(steps), list(losses), score, state_bytes_per_parameter(optimizer))


def _evaluations(
    config: Config, model: nn.Module, optimizer: Optimizer, data: Data
) -> Iterator[tuple[int, float, float]]:
    """Take the steps; yield step, held-out loss and accuracy now and then, and at the end."""
    schedule = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    batch_size = TASKS[config.task].batch_size
    eval_every = max(1, config.steps // _CURVE_POINTS)
    for step in range(1, config.steps + 1):
        examples = torch.randint(data.train_size, (batch_size,), generator=generator)
        inputs, targets = (part.to(config.device) for part in data.train(examples))

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model, inputs, targets, config)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        # SAM calls it twice, all others once.
        optimizer.step(closure)  # type: ignore[arg-type]
        schedule.step()
        if step % eval_every == 0 or step == config.steps:
            loss, score = _evaluate(model, data, config)
            yield step, loss, score
            if not math.isfinite(loss):
                break


def _logits(model: nn.Module, inputs: Tensor, config: Config) -> Tensor:
    device = torch.device(config.device).type
    with torch.autocast(device, torch.bfloat16, enabled=config.amp):
        logits: Tensor = model(inputs)
    return logits.float()


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, config: Config) -> Tensor:
    return cross_entropy(_logits(model, inputs, config), targets)


@torch.no_grad()
def _evaluate(model: nn.Module, data: Data, config: Config) -> tuple[float, float]:
    """Return the mean held-out loss and the accuracy in percent."""
    model.eval()
    loss = score = 0.0
    for part in torch.arange(data.val_size).split(_EVAL_BATCH):  # type: ignore[no-untyped-call]
        inputs, targets = (half.to(config.device) for half in data.val(part))
        logits = _logits(model, inputs, config)
        share = len(part) / data.val_size
        loss += share * cross_entropy(logits, targets).item()
        score += share * accuracy(logits, targets)
    model.train()
    return loss, score


def to_line(run: Run) -> str:
    """Return a run as its line in a results file."""
    return json.dumps(asdict(run)) + "\n"


def _from_line(line: str) -> Run:
    fields: dict[str, Any] = json.loads(line)
    config = fields.pop("config")
    hyperparameters = Hyperparameters(**config.pop("hyperparameters"))
    return Run(Config(hyperparameters=hyperparameters, **config), **fields)


def finished(path: Path) -> dict[Config, Run]:
    """Return the runs of a results file, by config; an unfinished last line is cut off the file.

    Raises:
        ValueError: A line that is not the last is damaged.
    """
    if not path.exists():
        return {}
    *lines, rest = path.read_text().split("\n")
    if rest:  # the process died while it wrote
        path.write_text("".join(f"{line}\n" for line in lines))
    runs = []
    for number, line in enumerate(lines, start=1):
        try:
            runs.append(_from_line(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path.name} must be one run a line, line {number} is not") from error
    return {run.config: run for run in runs}


def _start_worker() -> None:
    # Models this small gain more from a second run than from a second thread.
    torch.set_num_threads(1)


def run_all(
    configs: Sequence[Config],
    path: Path,
    workers: int,
    train_one: Callable[[Config], Run] = train,
) -> list[Run]:
    """Train every config that is not in the results file yet, with a progress bar.

    Args:
        configs: The runs.
        path: One JSON line is appended, and on disk, when a run has finished.
        workers: Processes, each with one thread.
        train_one: What trains.

    Returns:
        The runs in the order of ``configs``.
    """
    runs = finished(path)
    todo = [config for config in dict.fromkeys(configs) if config not in runs]
    context = multiprocessing.get_context("spawn")
    with (
        path.open("a") as file,
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        tqdm(total=len(configs), initial=len(configs) - len(todo), desc="runs") as bar,
    ):
        try:
            for future in as_completed([pool.submit(train_one, config) for config in todo]):
                run = future.result()
                runs[run.config] = run
                file.write(to_line(run))
                file.flush()
                os.fsync(file.fileno())
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return [runs[config] for config in configs]
