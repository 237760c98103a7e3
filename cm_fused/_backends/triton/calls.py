"""Launches of kernels that Triton has compiled, without looking for them anew.

`kernel[grid](...)` binds and specializes the arguments and compares every global that the kernel
uses, at each launch: 40 microseconds of the host, of which the launch itself takes 6.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Pointers = tuple[Tensor | None, ...]


class Calls:
    """The kernels of launches that differ in no compile-time argument, as compiled for a device.

    Besides those only pointers decide what is compiled: whether they are there, their dtype and
    alignment.
    """

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}

    def launch(
        self,
        kernel: Any,
        programs: int,
        pointers: Pointers,
        scalars: tuple[float, ...],
        compile_time: Callable[[], dict[str, Any]],
    ) -> None:
        """Launch a kernel; `compile_time` returns its constexprs and the launch options."""
        key = id(kernel), *map(_specialization, pointers)
        if key in self._compiled:
            compiled, constexprs = self._compiled[key]
            compiled[(programs, 1, 1)](*pointers, *scalars, *constexprs)
            return
        options = compile_time()
        compiled = kernel[(programs,)](*pointers, *scalars, **options)
        # Nothing is compiled where kernels are interpreted. ROCm looks at more of the arguments.
        if compiled is not None and torch.version.hip is None:
            names = kernel.arg_names[len(pointers) + len(scalars) :]
            self._compiled[key] = compiled, [options[name] for name in names]


def _specialization(pointer: Tensor | None) -> Any:
    return None if pointer is None else (pointer.dtype, pointer.data_ptr() % 16 == 0)
