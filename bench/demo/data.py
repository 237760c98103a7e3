"""The two data sets, both from files that an installed Python already has."""

import functools
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WINDOW = 64
_HELD_OUT_EVERY = 5
_BYTES_PER_FILE = 16 * 1024
_CORPUS_BYTES = 2 * 1024 * 1024
_HELD_OUT_BYTES = 64 * 1024
_VALIDATION_WINDOWS = 128


@dataclass(frozen=True)
class Split:
    """Training and validation examples; dimension 0 counts examples.

    Args:
        train_inputs: What the model reads, float images or int64 bytes.
        train_targets: int64 classes, one per image or one per byte.
        val_inputs: As ``train_inputs``, held out.
        val_targets: As ``train_targets``, held out.
    """

    train_inputs: Tensor
    train_targets: Tensor
    val_inputs: Tensor
    val_targets: Tensor


@functools.cache
def digits() -> Split:
    """Return scikit-learn's 1797 scanned digits, 8x8 pixels scaled to [0, 1].

    Every fifth image of each class is held out, so the split is stratified and the same
    for every seed.
    """
    # Not at the top: machines that train on text alone, or are lent for a GPU, may lack it.
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().div_(16).view(-1, 1, 8, 8)
    labels = torch.from_numpy(classes).long()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero().flatten()[::_HELD_OUT_EVERY]] = True
    return Split(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


@functools.cache
def stdlib_text() -> Split:
    """Return windows over the bytes of the standard library's license and sources.

    The files stand in the order of their names and the last ones are held out. Each file
    gives its first 16 KiB, so that no long module fills the corpus. The text, and so the
    losses, depend on the version of Python.

    Raises:
        FileNotFoundError: If the standard library has too few source files on disk.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("LICENSE*")), *sorted(library.glob("*.py"))]
    corpus = b"".join(path.read_bytes()[:_BYTES_PER_FILE] for path in files)[:_CORPUS_BYTES]
    if len(corpus) < 4 * _HELD_OUT_BYTES:
        raise FileNotFoundError(
            f"the standard library must have {4 * _HELD_OUT_BYTES} bytes of .py files on disk, "
            f"got {len(corpus)}"
        )
    text = torch.frombuffer(bytearray(corpus), dtype=torch.uint8).long()
    # A window has one byte more than the model reads: the target of its last byte.
    train = text[:-_HELD_OUT_BYTES].unfold(0, WINDOW + 1, 1)
    val = text[-_HELD_OUT_BYTES:].unfold(0, WINDOW + 1, _HELD_OUT_BYTES // _VALIDATION_WINDOWS)
    return Split(train[:, :-1], train[:, 1:], val[:, :-1], val[:, 1:])
