"""Triton's interpreter, mended: kernels run on CPU tensors as they would on a device.

Imported before the kernels are. TRITON_INTERPRET=1 has to be set then, see `tests/conftest.py`.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_convert_float = interpreter._convert_float
_patch_lang = interpreter._patch_lang
_patched: list[Any] = []


def _convert_float_as_devices_do(
    values: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any
) -> Any:
    """Round float32 to bfloat16 to nearest even, as every device does; theirs cuts it off."""
    if (from_dtype, to_dtype) != (tl.float32, tl.bfloat16):
        return _convert_float(values, from_dtype, to_dtype, rounding_mode)
    rounded = torch.from_numpy(np.array(values, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy()


class _NothingToRestore:
    def restore(self) -> None:
        """Leave triton.language as it is: this process compiles nothing."""


def _patch_once(function: Any) -> Any:
    """Patch triton.language for this process; theirs does it for each launch and each call."""
    if not _patched:
        _patched.append(_patch_lang(_language))
        # Triton 3.6 converts an array of one element as a whole, which numpy no longer does.
        tl.tensor.__index__ = lambda self: self.handle.data.item()
    return _NothingToRestore()


def _language() -> tuple[Any, Any]:
    """Stand for a kernel whose globals name every module that is to be patched."""
    return tl, core


def mend() -> None:
    """Correct and speed up the interpreter of this process."""
    interpreter._convert_float = _convert_float_as_devices_do
    interpreter._patch_lang = _patch_once
