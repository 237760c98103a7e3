"""One training run, epoch by epoch, which goes on where it was stopped."""

import hashlib
import json
import math
import os
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.demo.tasks import accuracy, cross_entropy
from bench.demo.train import state_bytes_per_parameter
from bench.paper.contenders import SYSTEMS
from bench.paper.datasets import Data
from bench.paper.measures import Measure, measure, rounded
from bench.paper.sweep import Config, Run
from bench.paper.tasks import TASKS

_EVAL_BATCH = 256
# The sharpness is that of the loss on the first of the training examples.
_SHARPNESS_EXAMPLES = 128
CHECKPOINT_SECONDS = 60.0


@cache
def load_data(task: str, folder: str) -> Data:
    """Return a task's data, read once a process."""
    return TASKS[task].load(Path(folder))


def train(
    config: Config, checkpoints: Path | None = None, every: float = CHECKPOINT_SECONDS
) -> Run:
    """Train one model with one optimizer.

    Args:
        config: What to train.
        checkpoints: A folder. A run that takes longer than ``every`` leaves a checkpoint there
            after an epoch, goes on from it when it is started again, and removes it in the end.
            None for none.
        every: Seconds between two checkpoints.
    """
    training = _Training(config)
    path = None if checkpoints is None else checkpoints / f"{_digest(config)}.pt"
    if path is not None and path.exists():
        training.load(path)
    saved = time.monotonic()
    while not training.finished:
        training.take_epoch()
        if path is not None and time.monotonic() - saved >= every:
            training.save(path)
            saved = time.monotonic()
    if path is not None:
        path.unlink(missing_ok=True)
    return training.run()


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(asdict(config)).encode()).hexdigest()[:16]


class _Training:
    """The model, the optimizer and the results so far.

    Args:
        config: What to train; its seed alone decides the initial weights and the batches.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.data = load_data(config.task, config.data)
        torch.manual_seed(config.seed)
        self.model = TASKS[config.task].build(self.data.classes).to(config.device)
        self.params = list(self.model.parameters())
        self.initial = [param.detach().clone() for param in self.params]
        self.optimizer = SYSTEMS[config.system](self.params, config.hyperparameters)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.train_losses: list[float] = []
        self.val_losses: list[float] = []
        self.scores: list[float] = []
        self.measures: list[Measure] = []
        self.diverged = False
        self.seconds = 0.0

    @property
    def finished(self) -> bool:
        return self.diverged or len(self.val_losses) == self.config.epochs

    def run(self) -> Run:
        return Run(
            self.config,
            self.train_losses,
            self.val_losses,
            self.scores,
            self.measures,
            rounded(state_bytes_per_parameter(self.optimizer)),
            round(self.seconds, 1),
        )

    def take_epoch(self) -> None:
        """Train for one epoch and evaluate; append the results, or note that it diverged."""
        began = time.monotonic()
        config, epoch = self.config, len(self.val_losses)
        for group in self.optimizer.param_groups:
            dropped = sum(drop <= epoch for drop in config.drops)
            group["lr"] = config.hyperparameters.lr / 10**dropped
        train_loss = self._take_steps()
        val_loss, percent = evaluate(self.model, self.data, config)
        reading = self._measure(epoch + 1)
        self.diverged = not all(map(math.isfinite, (train_loss, val_loss, reading.distance)))
        if not self.diverged:
            # No float holds the perplexity of a loss above 709.
            perplexity = math.exp(min(val_loss, 700))
            self.train_losses.append(rounded(train_loss))
            self.val_losses.append(rounded(val_loss))
            self.scores.append(rounded(perplexity if TASKS[config.task].text else percent))
            self.measures.append(reading)
        self.seconds += time.monotonic() - began

    def _take_steps(self) -> float:
        config, size = self.config, self.data.train_size
        batch_size = min(TASKS[config.task].batch_size, size)
        order = torch.randperm(size, generator=self.generator)
        total = torch.zeros((), device=config.device)
        # The last examples of an epoch's order may be too few for a batch: they are left out.
        batches = order[: size - size % batch_size].split(batch_size)  # type: ignore[no-untyped-call]
        for examples in batches:
            inputs, targets = (part.to(config.device) for part in self.data.train(examples))
            total += _step(self.model, self.optimizer, inputs, targets, config)
        return total.item() / len(batches)

    def _measure(self, epoch: int) -> Measure:
        every = self.config.sharpness_every
        sharp = every > 0 and (epoch % every == 0 or epoch == self.config.epochs)
        self.model.eval()
        reading = measure(
            epoch,
            self.params,
            self.initial,
            self.optimizer,
            self._fixed_loss if sharp else None,
        )
        self.model.train()
        return reading

    def _fixed_loss(self) -> Tensor:
        examples = torch.arange(min(_SHARPNESS_EXAMPLES, self.data.train_size))
        inputs, targets = (part.to(self.config.device) for part in self.data.train(examples))
        return cross_entropy(self.model(inputs), targets)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "batches": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "results": {
                "train_losses": self.train_losses,
                "val_losses": self.val_losses,
                "scores": self.scores,
                "measures": [asdict(reading) for reading in self.measures],
            },
            "seconds": self.seconds,
        }
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint of the same config."""
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["batches"])
        torch.set_rng_state(content["random"])
        results = content["results"]
        self.train_losses, self.val_losses = results["train_losses"], results["val_losses"]
        self.scores = results["scores"]
        self.measures = [Measure(**reading) for reading in results["measures"]]
        self.seconds = content["seconds"]


def _step(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor, targets: Tensor, config: Config
) -> Tensor:
    """Take one step; return the batch's loss before it, detached."""
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(_logits(model, inputs, config), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        return loss

    # SAM calls it twice, all others once.
    optimizer.step(closure)  # type: ignore[arg-type]
    return losses[0]


def _logits(model: nn.Module, inputs: Tensor, config: Config) -> Tensor:
    device = torch.device(config.device).type
    with torch.autocast(device, torch.bfloat16, enabled=config.amp):
        logits: Tensor = model(inputs)
    return logits.float()


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, config: Config) -> tuple[float, float]:
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
