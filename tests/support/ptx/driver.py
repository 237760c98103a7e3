"""A stand-in driver: Triton binds, specializes and compiles as for a GPU, and launches run here.

For a process in which kernels are not interpreted: TRITON_INTERPRET is not set. Instead of machine
code the compiler's last stage returns its PTX.
"""

import struct
from collections.abc import Callable
from functools import partial
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from tests.support.ptx.compiler import Compiled
from tests.support.ptx.machine import Launch, launch
from tests.support.ptx.memory import Allocation
from tests.support.ptx.parser import PtxError, parse

_FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
# The grid, stream, function, its metadata, the launch's and two hooks.
_BEFORE_ARGUMENTS = 9
_SCRATCH_POINTERS = 2  # of global memory that no kernel here asks for
# Given the kernel's name and its tensors by name, returns what it may access.
Tensors = dict[str, Tensor]
Find = Callable[[str, Tensors], list[Allocation]]


class Driver:
    """What triton.runtime.driver.set_active takes.

    Attributes:
        programs: What was launched, by PTX and name.
    """

    def __init__(self, arch: int, find: Find) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self.find = find
        self.programs: dict[tuple[str, str], Compiled] = {}
        self.launcher_cls = lambda *of_kernel: partial(self._launch_specialized, *of_kernel)
        self.utils = self

    def activate(self) -> None:
        """Make Triton launch here, in this process and from now on."""
        triton.knobs.runtime.add_stages_inspection_hook = _return_ptx
        triton.runtime.driver.set_active(self)

    def get_current_device(self) -> int:
        """Return the only device's number."""
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self._target

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what launches are checked against."""
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        """Return module, function, registers, spills and the largest block of compiled code."""
        return None, kernel.decode(), 0, 0, 1024

    def program(self, ptx: str, name: str) -> Compiled:
        """Return a kernel of a PTX module, whose name contains another."""
        if (ptx, name) not in self.programs:
            (kernel,) = (kernel for full, kernel in parse(ptx).items() if name in full)
            self.programs[ptx, name] = Compiled(kernel)
        return self.programs[ptx, name]

    def _launch_specialized(self, src: Any, metadata: Any, *of_launch: Any) -> None:
        """Bind the arguments, which come after nine values about the launch, and run it."""
        grid_x, grid_y, grid_z, _, function = of_launch[:5]
        if (grid_y, grid_z) != (1, 1) or metadata.global_scratch_size:
            raise PtxError("a grid of one dimension and no scratch memory are known")
        packed = b""
        tensors: Tensors = {}
        arguments = zip(src.signature.items(), of_launch[_BEFORE_ARGUMENTS:], strict=True)
        for (argument, kind), value in arguments:
            if kind.startswith("*"):
                tensors[argument] = value
                packed = pack(packed, "q", value.data_ptr())
            elif kind != "constexpr":
                packed = pack(packed, _FORMATS[kind], value)
        for _ in range(_SCRATCH_POINTERS):
            packed = pack(packed, "q", 0)
        how = Launch(grid_x, 32 * metadata.num_warps, packed, metadata.shared)
        self.launch(self.program(function, metadata.name), how, metadata.name, tensors)

    def launch(self, compiled: Compiled, how: Launch, kernel: str, tensors: Tensors) -> None:
        """Run a kernel on tensors and what they name."""
        launch(compiled, how, self.find(kernel, tensors))


def _return_ptx(backend: Any = None, stages: Any = None, *_: Any) -> Any:
    """Replace the last stage of the compiler; without arguments return the cache's key for that."""
    if stages is None:
        return "ptx", "ptx"
    stages["cubin"] = lambda src, metadata: src.encode()
    return None


def pack(packed: bytes, kind: str, value: Any) -> bytes:
    """Append a parameter at its alignment."""
    number = struct.pack(kind, value)
    return packed.ljust(-(-len(packed) // len(number)) * len(number), b"\0") + number


def allocation(tensor: Tensor, writable: bool) -> Allocation:
    """Return the memory of a tensor without gaps."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    if tensor.numel() and 1 + sum((n - 1) * stride for n, stride in strides) != tensor.numel():
        raise PtxError("a tensor has gaps")
    return Allocation(tensor.data_ptr(), tensor.numel() * tensor.itemsize, writable, tensor)
