"""Readers of the standard files: Penn Treebank, CIFAR-10 and CIFAR-100, a folder of images."""

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.demo.data import Split

TIME_STEPS = 35
_SIDE = 32
_IMAGE_SUFFIXES = {".jpeg", ".jpg", ".png"}


@dataclass(frozen=True)
class Data:
    """The examples that a run reads, by index, so that a data set need not fit into memory.

    Args:
        train_size: Number of training examples.
        val_size: Number of held-out ones.
        classes: Number of classes or tokens.
        train: From int64 indices (n,) to inputs and int64 targets.
        val: Likewise for the held-out examples.
    """

    train_size: int
    val_size: int
    classes: int
    train: Callable[[Tensor], tuple[Tensor, Tensor]]
    val: Callable[[Tensor], tuple[Tensor, Tensor]]


def from_split(split: Split, classes: int) -> Data:
    """Return data that lies in memory."""
    return Data(
        len(split.train_inputs),
        len(split.val_inputs),
        classes,
        lambda i: (split.train_inputs[i], split.train_targets[i]),
        lambda i: (split.val_inputs[i], split.val_targets[i]),
    )


def penn_treebank(folder: Path) -> Data:
    """Read ``ptb.train.txt`` and ``ptb.valid.txt``: words by spaces, a sentence a line.

    The vocabulary is the training text's, with ``<eos>`` at every line's end; a held-out word that
    is not in it is ``<unk>``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file has fewer than 36 words, or the held-out text needs an ``<unk>`` that the
            training text lacks.
    """
    train, val = (_words(_existing(folder / f"ptb.{part}.txt")) for part in ("train", "valid"))
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(train))}
    unknown = [word for word in val if word not in vocabulary]
    if unknown and "<unk>" not in vocabulary:
        raise ValueError(
            "words of ptb.valid.txt must be in ptb.train.txt, which has no <unk>, got "
            f"{unknown[0]!r}"
        )
    return from_words(train, val, vocabulary)


def from_words(train: Sequence[str], val: Sequence[str], vocabulary: Mapping[str, int]) -> Data:
    """Return texts as examples: 35 words each, and the 35 that follow each of them.

    Examples do not overlap, so that an epoch reads every word once.

    Args:
        train: At least 36 words, like ``val``.
        val: The held-out text.
        vocabulary: From words to tokens; a word that is not in it is its ``<unk>``.
    """
    unknown = vocabulary.get("<unk>", 0)
    windows = (
        torch.tensor([vocabulary.get(word, unknown) for word in text]).unfold(
            0, TIME_STEPS + 1, TIME_STEPS
        )
        for text in (train, val)
    )
    (train_inputs, train_targets), (val_inputs, val_targets) = (
        (examples[:, :-1], examples[:, 1:]) for examples in windows
    )
    split = Split(train_inputs, train_targets, val_inputs, val_targets)
    return from_split(split, len(vocabulary))


def held_out(inputs: Tensor, targets: Tensor, share: float, classes: int) -> Data:
    """Return data whose held-out examples are a share of the given ones, drawn with a fixed seed.

    The inputs are normalized by the channels of the training part.

    Args:
        inputs: Images (n, channels, rows, columns), floating.
        targets: int64 classes (n,).
        share: Of the examples that are held out, in (0, 1).
        classes: Number of classes.
    """
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    val_size = round(share * len(order))
    train, val = order[:-val_size], order[-val_size:]
    dims = (0, 2, 3)
    images = inputs[train]
    mean, std = images.mean(dims, keepdim=True), images.std(dims, keepdim=True)
    split = Split((images - mean) / std, targets[train], (inputs[val] - mean) / std, targets[val])
    return from_split(split, classes)


def _words(path: Path) -> list[str]:
    words = path.read_text(encoding="utf-8").replace("\n", " <eos> ").split()
    if len(words) <= TIME_STEPS:
        raise ValueError(f"{path.name} must have more than {TIME_STEPS} words, got {len(words)}")
    return words


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is not in {path.parent}: download the data set, unpack it, and name the "
            "folder with --data"
        )
    return path


class _ArraysOnly(pickle.Unpickler):
    """Reads numpy arrays and plain values; refuses whatever else a pickle could run."""

    _ALLOWED = frozenset(
        (module, name)
        for module, names in {
            "numpy": ("dtype", "ndarray"),
            "numpy.core.multiarray": ("_reconstruct", "scalar"),
            "numpy._core.multiarray": ("_reconstruct", "scalar"),
            "_codecs": ("encode",),
        }.items()
        for name in names
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not an array")
        return super().find_class(module, name)


def cifar(folder: Path, classes: int) -> Data:
    """Read the python batches of CIFAR-10 or CIFAR-100; images are normalized by channel.

    A fifth of the training images is held out, 10,000 of 50,000, as in the paper. The test images
    are not read.

    Args:
        folder: With ``data_batch_1`` to ``data_batch_5`` for 10 classes, ``train`` for 100.
        classes: 10 or 100.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or not of the format.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    key = b"labels" if classes == 10 else b"fine_labels"
    batches = [_cifar_batch(_existing(folder / name), key, classes) for name in names]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return held_out(images, labels, 0.2, classes)


def _cifar_batch(path: Path, key: bytes, classes: int) -> tuple[Tensor, Tensor]:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[key])
    except Exception as error:
        raise ValueError(f"{path.name} is not a CIFAR python batch: {error}") from error
    columns = 3 * _SIDE * _SIDE
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), columns) or not len(labels):
        raise ValueError(
            f"{path.name} must have a row of {columns} uint8 pixels for each of its labels, got "
            f"{pixels.dtype} {pixels.shape} for {len(labels)} labels"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels of {path.name} must be in [0, {classes}), got {labels.min()} to {labels.max()}"
        )
    images = torch.from_numpy(pixels.copy()).view(-1, 3, _SIDE, _SIDE).float().div_(255)
    return images, torch.from_numpy(labels.copy()).long()


def image_folder(folder: Path, side: int = 224) -> Data:
    """Read images of ``folder/train/CLASS/`` and ``folder/val/CLASS/`` when they are asked for.

    Images (JPEG, PNG) are scaled to side x side pixels in [0, 1]; classes are the sorted names of
    the training folders.

    Raises:
        FileNotFoundError: A folder is missing or has no images.
        ValueError: A held-out class has no training images.
    """
    train, val = (_image_files(folder / part) for part in ("train", "val"))
    names = sorted({path.parent.name for path in train})
    unknown = {path.parent.name for path in val} - set(names)
    if unknown:
        raise ValueError(f"classes of val must be among those of train, got {sorted(unknown)[0]!r}")
    classes = {name: i for i, name in enumerate(names)}
    return Data(
        len(train),
        len(val),
        len(classes),
        lambda i: _decode([train[j] for j in i.tolist()], classes, side),
        lambda i: _decode([val[j] for j in i.tolist()], classes, side),
    )


def _image_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.glob("*/*") if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(
            f"no {folder.name}/CLASS/*.jpg or *.png in {folder.parent}: name the folder that has "
            "train and val with --data"
        )
    return files


def _decode(paths: Sequence[Path], classes: dict[str, int], side: int) -> tuple[Tensor, Tensor]:
    images = []
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((side, side)))
        images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    targets = torch.tensor([classes[path.parent.name] for path in paths])
    return torch.stack(images).float().div_(255), targets
