"""The tasks: a model with its data, and how long it is trained."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from bench.paper import contenders, datasets, models, packaged
from bench.paper.datasets import Data

_TRAINED = (*contenders.PAPERS, *contenders.BASELINES)


@dataclass(frozen=True)
class Task:
    """One model with its data.

    Args:
        load: Reads the data from the folder of ``--data``.
        build: Returns a freshly initialised model for a number of classes or tokens.
        batch_size: Examples a step.
        epochs: Passes over the training data.
        drops: The learning rate is divided by ten after these epochs.
        text: Whether it is a language model, scored by perplexity instead of accuracy.
        needs_data: Whether ``load`` reads a folder; the others' data is in a package.
        beta2: Of every system where it is not searched.
        tuned_like: Data set and model in Tables 6 to 8; None where the paper tuned nothing.
        fixed: The learning rate and the weight decay where the paper searched none.
        sharpness_every: Epochs between two readings of the sharpness; 0 for none.
        systems: The systems that are trained.
    """

    load: Callable[[Path], Data]
    build: Callable[[int], nn.Module]
    batch_size: int
    epochs: int
    drops: tuple[int, ...]
    text: bool = False
    needs_data: bool = True
    beta2: float = 0.99
    tuned_like: tuple[str, str] | None = None
    fixed: tuple[float, float] | None = None
    sharpness_every: int = 0
    systems: tuple[str, ...] = _TRAINED


# The paper's: 50 epochs in one sentence and 40 in the next; batch and width are not given.
_PTB = Task(
    datasets.penn_treebank,
    models.LanguageModel,
    batch_size=20,
    epochs=40,
    drops=(25,),
    text=True,
    tuned_like=("PTB", "LSTM"),
)


def _cifar(classes: int, name: str, build: Callable[[int], nn.Module]) -> Task:
    return Task(
        partial(datasets.cifar, classes=classes),
        build,
        batch_size=128,
        epochs=100,
        drops=(50,),
        beta2=0.999,
        tuned_like=(f"CIFAR-{classes}", name),
        sharpness_every=10,
    )


_WRN_40_1 = partial(models.wide_resnet, 40, 1)
_WRN_CIFAR10 = _cifar(10, "WRN-1", _WRN_40_1)

TASKS = {
    # One core trains a run of these two in ten seconds: the first 20 thousand words, and 500 images
    # of 14x14 pixels, with as many held out.
    "lstm-kjv-small": replace(
        _PTB,
        load=lambda _: packaged.king_james(1000, words=20_000, every=5),
        build=partial(models.LanguageModel, width=64),
        batch_size=10,
        needs_data=False,
    ),
    "wrn-mnist-small": replace(
        _WRN_CIFAR10,
        load=lambda _: packaged.mnist_5k(1000, share=0.5, pooled=True),
        build=partial(models.wide_resnet, 10, 1, channels=1),
        batch_size=32,
        epochs=20,
        drops=(10,),
        needs_data=False,
    ),
    # One core trains a run of this in a minute with --amp: a tenth of the text.
    "lstm-kjv-medium": replace(
        _PTB,
        load=lambda _: packaged.king_james(2000, words=80_000),
        build=partial(models.LanguageModel, width=128),
        needs_data=False,
    ),
    # One core trains a run of this in a minute with --amp: all 4,000 images at their full size.
    "wrn-mnist-medium": replace(
        _WRN_CIFAR10,
        load=lambda _: packaged.mnist_5k(),
        build=partial(models.wide_resnet, 10, 1, channels=1),
        epochs=20,
        drops=(10,),
        needs_data=False,
    ),
    # The same at the paper's sizes: a vocabulary of 10,000 words as of Penn Treebank, WRN-40-1.
    "lstm-kjv": replace(_PTB, load=lambda _: packaged.king_james(10_000), needs_data=False),
    "wrn-mnist": replace(
        _WRN_CIFAR10,
        load=lambda _: packaged.mnist_5k(),
        build=partial(models.wide_resnet, 40, 1, channels=1),
        needs_data=False,
    ),
    # The paper's own, of files that --data names.
    "lstm-ptb": _PTB,
    "wrn-cifar10": _WRN_CIFAR10,
    "wrn-cifar100": _cifar(100, "WRN-1", _WRN_40_1),
    "resnet34-cifar10": _cifar(10, "ResNet34", models.resnet34),
    "resnet34-cifar100": _cifar(100, "ResNet34", models.resnet34),
    # The number of epochs is not given; 90 has three periods of its schedule.
    "efficientnet-folder": Task(
        datasets.image_folder,
        models.efficientnet_b0,
        batch_size=256,
        epochs=90,
        drops=(30, 60),
        fixed=(1e-4, 1e-4),
        systems=contenders.DECOUPLED,
    ),
}
