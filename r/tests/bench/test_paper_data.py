"""The readers of standard files, on tiny files of the same formats."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.paper.datasets import TIME_STEPS, cifar, image_folder, penn_treebank


def _write_ptb(folder: Path, train: str, valid: str) -> None:
    (folder / "ptb.train.txt").write_text(train)
    (folder / "ptb.valid.txt").write_text(valid)


def test_penn_treebank(tmp_path: Path) -> None:
    """Windows of 35 words and their successors, with <eos> for a line's end and <unk>."""
    _write_ptb(tmp_path, " a b <unk> \n c \n" * 20, " c b new \n" * 20)
    data = penn_treebank(tmp_path)
    assert data.classes == 5  # a b <unk> <eos> c
    assert data.train_size == 6 * 20 - TIME_STEPS
    inputs, targets = data.train(torch.tensor([0, 7]))
    assert inputs.shape == targets.shape == (2, TIME_STEPS)
    assert inputs[0, :7].tolist() == [0, 1, 2, 3, 4, 3, 0]
    assert targets[0, :6].tolist() == [1, 2, 3, 4, 3, 0]
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    val_inputs, val_targets = data.val(torch.arange(data.val_size))
    assert data.val_size == 2
    assert val_inputs[0, :5].tolist() == [4, 1, 2, 3, 4]
    # The second window starts with the first one's last target: no word is skipped or repeated.
    assert val_inputs[1, 0] == val_targets[0, -1]


@pytest.mark.parametrize(
    ("train", "valid", "error", "message"),
    [
        ("a b\n" * 40, None, FileNotFoundError, "ptb.valid.txt is not in"),
        ("a b\n", "a\n" * 40, ValueError, "ptb.train.txt must have more than 35 words, got 3"),
        ("a b\n" * 40, "c\n" * 40, ValueError, "no <unk>, got 'c'"),
    ],
)
def test_penn_treebank_errors(
    tmp_path: Path, train: str, valid: str | None, error: type[Exception], message: str
) -> None:
    """A missing or useless file is named."""
    _write_ptb(tmp_path, train, valid or "")
    if valid is None:
        (tmp_path / "ptb.valid.txt").unlink()
    with pytest.raises(error, match=message):
        penn_treebank(tmp_path)


def _write_cifar(folder: Path, classes: int, **changes: Any) -> None:
    random = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name in names if classes == 10 else ["train", "test"]:
        batch = {
            b"data": random.integers(0, 256, (4, 3072), dtype=np.uint8),
            b"labels" if classes == 10 else b"fine_labels": [0, 1, 2, classes - 1],
            **{key.encode(): value for key, value in changes.items()},
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    """All batches in order, channels first, normalized by the training set's channels."""
    _write_cifar(tmp_path, classes)
    data = cifar(tmp_path, classes)
    assert (data.train_size, data.val_size) == (20 if classes == 10 else 4, 4)
    images, labels = data.train(torch.arange(data.train_size))
    assert images.shape == (data.train_size, 3, 32, 32)
    assert labels[:4].tolist() == [0, 1, 2, classes - 1]
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    # The first 1024 bytes of a row are the red channel, row by row.
    row = pickle.loads((tmp_path / ("data_batch_1" if classes == 10 else "train")).read_bytes())
    red = torch.from_numpy(row[b"data"][0, :1024]).float().view(32, 32)
    assert torch.corrcoef(torch.stack([red.flatten(), images[0, 0].flatten()]))[0, 1] > 0.9999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((4, 3071), np.uint8)}, "a row of 3072 uint8 pixels"),
        ({"data": np.zeros((3, 3072), np.uint8)}, "got uint8 \\(3, 3072\\) for 4 labels"),
        ({"data": np.zeros((4, 3072), np.float32)}, "got float32"),
        ({"labels": [0, 1, 2, 10]}, "must be in \\[0, 10\\), got 0 to 10"),
        ({"labels": [-1, 1, 2, 3]}, "got -1 to 3"),
    ],
)
def test_cifar_refuses_wrong_batches(tmp_path: Path, changes: Any, message: str) -> None:
    """What does not fit the format is named."""
    _write_cifar(tmp_path, 10, **changes)
    with pytest.raises(ValueError, match=message):
        cifar(tmp_path, 10)


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made by a pickle",)


def test_cifar_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that would run something is refused, and does not run it."""
    monkeypatch.chdir(tmp_path)
    _write_cifar(tmp_path, 100, data=_Runs())
    with pytest.raises(ValueError, match="mkdir, which is not an array"):
        cifar(tmp_path, 100)
    assert not Path("made by a pickle").exists()


def test_cifar_truncated_or_missing(tmp_path: Path) -> None:
    """A cut file and a missing one are told apart."""
    _write_cifar(tmp_path, 100)
    train = tmp_path / "train"
    train.write_bytes(train.read_bytes()[:5000])
    with pytest.raises(ValueError, match="train is not a CIFAR python batch"):
        cifar(tmp_path, 100)
    train.unlink()
    with pytest.raises(FileNotFoundError, match=r"train is not in .*--data"):
        cifar(tmp_path, 100)


def _write_images(folder: Path, *names: str) -> None:
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5 + i, 4), (255, 0, 51 * i)).save(path)


def test_image_folder(tmp_path: Path) -> None:
    """Classes are the sorted folders of train; images are decoded and scaled when asked for."""
    _write_images(
        tmp_path, "train/dog/1.png", "train/cat/1.png", "train/cat/2.JPG", "val/dog/9.png"
    )
    data = image_folder(tmp_path, side=8)
    assert (data.train_size, data.val_size, data.classes) == (3, 1, 2)
    images, targets = data.train(torch.tensor([2, 0]))
    assert images.shape == (2, 3, 8, 8)
    assert targets.tolist() == [1, 0]
    torch.testing.assert_close(images[0], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8))
    torch.testing.assert_close(images[1, 2], torch.full((8, 8), 0.2))
    assert data.val(torch.tensor([0]))[1].tolist() == [1]


def test_image_folder_errors(tmp_path: Path) -> None:
    """No images, and a held-out class that was never trained."""
    with pytest.raises(FileNotFoundError, match=r"no train/CLASS.*--data"):
        image_folder(tmp_path)
    _write_images(tmp_path, "train/cat/1.png", "val/dog/1.png")
    with pytest.raises(ValueError, match="got 'dog'"):
        image_folder(tmp_path)
