"""What can be trained: a model with its data, and how long."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from bench.demo.data import digits, stdlib_text
from bench.paper import datasets, models
from bench.paper.datasets import Data


@dataclass(frozen=True)
class Task:
    """One model with its data.

    Args:
        load: Reads the data from the folder of ``--data``.
        build: Returns a freshly initialised model for a number of classes or tokens.
        batch_size: Examples a step.
        steps: Optimizer steps of a run.
        text: Whether it is a language model, scored by perplexity instead of accuracy.
        needs_data: Whether ``load`` reads a folder; the others have their data here.
    """

    load: Callable[[Path], Data]
    build: Callable[[int], nn.Module]
    batch_size: int
    steps: int
    text: bool = False
    needs_data: bool = True


def _cifar(classes: int, build: Callable[[int], nn.Module]) -> Task:
    return Task(partial(datasets.cifar, classes=classes), build, 128, 78_000)


_WRN_40_1 = partial(models.wide_resnet, 40, 1)

# Two cores train these in under a minute: a small WRN on 8x8 images, and bytes of
# Python's standard library.
TASKS = {
    "lstm-python": Task(
        lambda _: datasets.from_split(stdlib_text(), 256),
        partial(models.LanguageModel, width=128),
        batch_size=16,
        steps=400,
        text=True,
        needs_data=False,
    ),
    "wrn-digits": Task(
        lambda _: datasets.from_split(digits(), 10),
        partial(models.wide_resnet, 10, 1, channels=1),
        batch_size=64,
        steps=300,
        needs_data=False,
    ),
    "lstm-ptb": Task(datasets.penn_treebank, models.LanguageModel, 20, 66_000, text=True),
    "wrn-cifar10": _cifar(10, _WRN_40_1),
    "wrn-cifar100": _cifar(100, _WRN_40_1),
    "resnet34-cifar10": _cifar(10, models.resnet34),
    "resnet34-cifar100": _cifar(100, models.resnet34),
    "efficientnet-folder": Task(datasets.image_folder, models.efficientnet_b0, 256, 450_000),
}
