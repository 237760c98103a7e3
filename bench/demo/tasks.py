"""The tasks: a model, its data, and how long it is trained at which learning rate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from bench.demo.data import Split, digits, stdlib_text
from bench.demo.models import ByteLSTM, digit_net


@dataclass(frozen=True)
class Task:
    """One model with its data.

    Args:
        name: Its name in the table.
        title: Its name in the figure.
        loss_unit: What the loss is counted per.
        load: Returns the data.
        build: Returns a freshly initialised model.
        batch_size: Examples per step.
        steps: Optimizer steps of a full run.
        learning_rates: The rate each algorithm starts from.
        score: Validation score from ``(logits, targets)``.
        score_name: Its name and unit.
    """

    name: str
    title: str
    loss_unit: str
    load: Callable[[], Split]
    build: Callable[[], nn.Module]
    batch_size: int
    steps: int
    learning_rates: Mapping[str, float]
    score: Callable[[Tensor, Tensor], float]
    score_name: str


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats over all examples and positions.

    Args:
        logits: (..., classes).
        targets: int64 classes, (...).
    """
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Return the percentage of targets whose logit is the largest."""
    return 100 * (logits.argmax(-1) == targets).float().mean().item()


def perplexity(logits: Tensor, targets: Tensor) -> float:
    """Return the exponential of the cross-entropy."""
    return cross_entropy(logits, targets).exp().item()


# The grid of `python -m bench.demo --search`, the same for every algorithm and task.
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

# `learning_rates` are the lowest final validation loss of that grid on one seed, decided between
# neighbours on three (seeds from 1000 up, none of them reported).
TASKS = {
    task.name: task
    for task in (
        Task(
            name="bytes LSTM",
            title="Byte LSTM on the standard library's sources",
            loss_unit="nats per byte",
            load=stdlib_text,
            build=ByteLSTM,
            batch_size=16,
            steps=400,
            learning_rates={"AdamW": 3e-2, "AdamCM": 3e-3},
            score=perplexity,
            score_name="perplexity",
        ),
        Task(
            name="digits conv",
            title="Convolutional net on handwritten digits",
            loss_unit="nats per image",
            load=digits,
            build=digit_net,
            batch_size=64,
            steps=400,
            learning_rates={"AdamW": 3e-3, "AdamCM": 1e-3},
            score=accuracy,
            score_name="accuracy %",
        ),
    )
}
