"""Training runs, each finished one a JSON line, so that an interrupted sweep goes on."""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.paper.contenders import Hyperparameters
from bench.paper.measures import Measure
from bench.paper.tasks import TASKS


@dataclass(frozen=True)
class Config:
    """The settings of one run; two runs of the same config are the same run.

    Args:
        task: A key of ``TASKS``.
        system: A key of ``SYSTEMS``.
        hyperparameters: The optimizer's.
        seed: Of the initial weights and the batches, which the system does not influence.
        epochs: Passes over the training data.
        drops: The learning rate is divided by ten after these epochs.
        sharpness_every: Epochs between two readings of the sharpness; 0 for none.
        data: The data's folder, or empty.
        device: Where it trains.
        amp: Whether the model runs under bfloat16 autocast. Bfloat16 has float32's range, so
            gradients need no scaling.
    """

    task: str
    system: str
    hyperparameters: Hyperparameters
    seed: int
    epochs: int
    drops: tuple[int, ...] = ()
    sharpness_every: int = 0
    data: str = ""
    device: str = "cpu"
    amp: bool = False


@dataclass(frozen=True)
class Run:
    """The results of one run; the lists have an element for each finished epoch.

    Args:
        config: What it was made from.
        train_losses: Mean loss of the epoch's batches, nats.
        val_losses: Held-out loss after the epoch, nats. A run ends where it is not finite, and the
            lists are shorter than the number of epochs then.
        scores: Perplexity, or accuracy in percent, of the held-out examples.
        measures: See `Measure`.
        state_bytes: Optimizer state, bytes a parameter.
        seconds: How long it took, with the readings.
    """

    config: Config
    train_losses: list[float]
    val_losses: list[float]
    scores: list[float]
    measures: list[Measure]
    state_bytes: float
    seconds: float = field(compare=False)

    @property
    def diverged(self) -> bool:
        """Whether it ended with a loss that is not finite."""
        return len(self.val_losses) < self.config.epochs

    @property
    def rank(self) -> tuple[float, float]:
        """How good its best epoch is, the lower the better: its score, and its loss for ties."""
        if self.diverged:
            return math.inf, math.inf
        return self._ranks()[self.best_epoch - 1]

    @property
    def best_epoch(self) -> int:
        """The number of epochs after which the score was best; of equals, the loss decides."""
        ranks = self._ranks()
        return 1 + ranks.index(min(ranks))

    def _ranks(self) -> list[tuple[float, float]]:
        sign = 1 if TASKS[self.config.task].text else -1
        return [(sign * s, loss) for s, loss in zip(self.scores, self.val_losses, strict=True)]


def to_line(run: Run) -> str:
    """Return a run as its line in a results file."""
    line = asdict(run)
    # Most systems have no buffer, and most epochs no sharpness.
    line["measures"] = [
        {name: value for name, value in reading.items() if value is not None}
        for reading in line["measures"]
    ]
    return json.dumps(line, allow_nan=False) + "\n"


def _from_line(line: str) -> Run:
    fields: dict[str, Any] = json.loads(line)
    config = fields.pop("config")
    hyperparameters = Hyperparameters(**config.pop("hyperparameters"))
    drops = tuple(config.pop("drops"))
    measures = [Measure(**reading) for reading in fields.pop("measures")]
    made_from = Config(hyperparameters=hyperparameters, drops=drops, **config)
    return Run(config=made_from, measures=measures, **fields)


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
    train_one: Callable[[Config], Run],
    others: Sequence[Path] = (),
) -> list[Run]:
    """Train every config that no results file has yet, with a progress bar.

    Args:
        configs: The runs.
        path: One JSON line is appended, and on disk, when a run has finished.
        workers: Processes, each with one thread.
        train_one: What trains.
        others: More results files; runs that they have are copied.

    Returns:
        The runs in the order of ``configs``.
    """
    known = {config: run for other in others for config, run in finished(other).items()}
    runs = finished(path)
    todo = [config for config in dict.fromkeys(configs) if config not in runs]
    context = multiprocessing.get_context("spawn")
    with (
        path.open("a") as file,
        ProcessPoolExecutor(workers, context, _start_worker) as pool,
        tqdm(
            total=len(configs), initial=len(configs) - len(todo), desc=path.stem, disable=None
        ) as bar,
    ):

        def add(run: Run) -> None:
            runs[run.config] = run
            file.write(to_line(run))
            file.flush()
            os.fsync(file.fileno())
            bar.update()

        for config in [config for config in todo if config in known]:
            add(known[config])
        try:
            futures = [pool.submit(train_one, config) for config in todo if config not in known]
            for future in as_completed(futures):
                add(future.result())
        finally:
            pool.shutdown(cancel_futures=True)
    return [runs[config] for config in configs]
