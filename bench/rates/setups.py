"""The optimizers that are compared, and what is trained with them."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.demo.data import Split, digits
from bench.demo.tasks import Task, accuracy, perplexity
from bench.paper.models import LanguageModel
from bench.paper.packaged import king_james
from bench.speed.precision.setups import TASKS as PRECISION_TASKS
from cm_fused import AdamWCM

# Each of them twice the one before.
LEARNING_RATES = tuple(2.5e-4 * 2**k for k in range(9))
SEEDS = 5

ADAMW, PLAIN, MATCHED = "AdamW", "AdamWCM", "AdamWCM, match_rms_adamw"
_matched = partial(AdamWCM, adjust_lr_fn="match_rms_adamw")
# Each at its own defaults, as for a person who replaces one by the other: betas (0.9, 0.999) of
# AdamW and (0.9, 0.99), decoupled weight decay 1e-2 of both.
SYSTEMS: dict[str, Callable[..., Optimizer]] = {
    ADAMW: AdamW,
    PLAIN: AdamWCM,
    MATCHED: _matched,
}
# Capacity C and priority decay λ, besides the defaults 5 and 0.7.
SETTINGS: dict[str, Callable[..., Optimizer]] = {
    f"{MATCHED}, C={capacity}, λ={decay:g}": partial(
        _matched, capacity=capacity, priority_decay=decay
    )
    for capacity, decay in ((5, 0.99), (20, 0.7), (20, 0.99))
}
_WORDS = 1000


@cache
def _words() -> Split:
    """Return the windows of the text that the paper's LSTM is trained on, all of them."""
    data = king_james(_WORDS, words=20_000, every=5)
    return Split(*data.train(torch.arange(data.train_size)), *data.val(torch.arange(data.val_size)))


# Those of `make demo` and of `bench.speed.precision`, and two more.
TASKS = {
    **PRECISION_TASKS,
    "digits MLP": Task(
        name="digits MLP",
        title="Multilayer perceptron on handwritten digits",
        loss_unit="nats per image",
        load=digits,
        build=lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)
        ),
        batch_size=64,
        steps=400,
        learning_rates={},
        score=accuracy,
        score_name="accuracy %",
    ),
    "words LSTM": Task(
        name="words LSTM",
        title="Word LSTM on the King James Bible",
        loss_unit="nats per word",
        load=_words,
        build=lambda: LanguageModel(_WORDS, width=64),
        batch_size=10,
        steps=400,
        learning_rates={},
        score=perplexity,
        score_name="perplexity",
    ),
}
