"""How much a test does of what could go on for hours."""

import os
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# `python -m bench.reliability` names the file here to which tests write how many cases they had.
_RECORD = os.environ.get("CM_FUSED_CAMPAIGN")


def effort(few: T, many: T) -> T:
    """Return `few`, or `many` where the reliability campaign runs the test."""
    return few if _RECORD is None else many


def record_cases(count: int) -> None:
    """Tell the reliability campaign how many cases a test had, where one runs."""
    if _RECORD is not None:
        with Path(_RECORD).open("a") as record:
            record.write(f"{count}\n")
