"""Warnings that show the user's line."""

import sys
import warnings

import torch

_OURS = ("cm_fused", "torch")


def warn(message: str) -> None:
    """Warn at the line of the user's code that called this package, past torch's wrappers."""
    if torch.compiler.is_compiling():  # it cannot trace frames
        warnings.warn(message, UserWarning, stacklevel=2)
        return
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def _package(module: dict[str, object]) -> str:
    return str(module.get("__name__", "")).partition(".")[0]
