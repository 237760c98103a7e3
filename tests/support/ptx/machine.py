"""Runs a kernel: all threads of some blocks at a time, a numpy array for each register.

Threads that diverge wait for each other at the first basic block, in the order of the code, where
any of them is. A barrier ends a basic block: a thread goes on when all of its block are there.
"""

from typing import NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import Array
from tests.support.ptx.compiler import Branch, Compiled, Wait, check_whole_warps
from tests.support.ptx.memory import Allocation, GlobalMemory, Log
from tests.support.ptx.parser import PtxError

# Blocks that run at a time: numpy's time an operation is then not Python's.
_TOGETHER = 32
# No kernel here takes a thread through as many basic blocks.
_ENDLESS = 20_000


class Launch(NamedTuple):
    """How a kernel is launched: blocks, threads of each, parameters' bytes and shared memory's."""

    grid: int
    block_size: int
    params: bytes
    shared_bytes: int = 0


class Frame:
    """The registers and memories of the threads that run together."""

    def __init__(self, launch: Launch, first: int, count: int, memory: GlobalMemory) -> None:
        size = launch.block_size
        self.num_threads = count * size
        self.registers: dict[str, Array] = {}
        self.defined: dict[str, Array] = {}  # of a register that not all threads have written
        lanes = np.arange(self.num_threads)
        self.threads = lanes + first * size
        self.blocks = lanes // size
        self.special = {
            "%tid.x": (lanes % size).astype(np.uint32),
            "%ctaid.x": (self.threads // size).astype(np.uint32),
            "%ntid.x": np.full(self.num_threads, size, np.uint32),
            "%nctaid.x": np.full(self.num_threads, launch.grid, np.uint32),
            "%laneid": (lanes % 32).astype(np.uint32),
        }
        self.params = np.frombuffer(launch.params, np.uint8)
        self.memory = memory
        self.logs: dict[str, Log] = {}
        self.shared_bytes = launch.shared_bytes
        self.shared_stride = -(-launch.shared_bytes // 16) * 16
        self.shared = np.zeros(count * self.shared_stride, np.uint8)
        self.shared_written = np.zeros(count * self.shared_stride, bool)
        self.phases = np.zeros(count, np.int64)  # the barriers that each block has passed

    def read(self, register: str, mask: Array | None) -> Array:
        """Return a register's bits."""
        if register not in self.registers:
            raise PtxError(f"{register} is read but not written")
        if register in self.defined:
            undefined = ~self.defined[register]
            if (undefined if mask is None else undefined & mask).any():
                raise PtxError(f"{register} is read by threads that have not written it")
        return self.registers[register]

    def write(self, register: str, bits: Array, mask: Array | None) -> None:
        """Set a register where a mask is set."""
        if len(bits) != self.num_threads:
            bits = np.repeat(bits, self.num_threads)
        if mask is None:
            self.defined.pop(register, None)
        elif register not in self.registers:
            self.defined[register] = mask
        else:
            bits = np.where(mask, bits, self.registers[register])
            if register in self.defined:
                self.defined[register] = self.defined[register] | mask
        self.registers[register] = bits


class _Schedule:
    """Where the threads of a frame are: at a basic block, at a barrier or at their end."""

    def __init__(self, frame: Frame, block_size: int) -> None:
        self._frame, self._block_size = frame, block_size
        self._ready: dict[int, Array] = {0: np.ones(frame.num_threads, bool)}
        self._waiting: dict[int, Array] = {}  # by where they go on

    def next(self) -> tuple[int, Array] | None:
        """Return the first basic block where threads are, and which; None at the end of all."""
        if not self._ready:
            if self._waiting:
                raise PtxError("a barrier is not reached by all threads of a block")
            return None
        block = min(self._ready)
        return block, self._ready.pop(block)

    def go(self, block: int, mask: Array) -> None:
        """Send threads to a basic block."""
        if mask.any():
            self._ready[block] = self._ready[block] | mask if block in self._ready else mask

    def wait(self, block: int, mask: Array) -> None:
        """Let threads wait for all of their block, to go on at a basic block."""
        check_whole_warps(mask)
        waiting = self._waiting.pop(block, np.zeros_like(mask)) | mask
        arrived = waiting.reshape(-1, self._block_size)
        # Those that have ended never come: PTX leaves open what happens then.
        complete = arrived.all(1)
        self._frame.phases[complete] += 1
        released = waiting & np.repeat(complete, self._block_size)
        self.go(block, released)
        if (waiting & ~released).any():
            self._waiting[block] = waiting & ~released


def launch(compiled: Compiled, how: Launch, allocations: list[Allocation]) -> None:
    """Run a kernel on allocations."""
    if how.block_size % 32:
        raise PtxError(f"blocks of {how.block_size} threads are not whole warps")
    if len(how.params) != compiled.kernel.param_bytes:
        raise PtxError(f"{compiled.kernel.param_bytes} bytes of parameters, got {len(how.params)}")
    how = how._replace(shared_bytes=compiled.shared_bytes + how.shared_bytes)
    memory = GlobalMemory(allocations)
    log = Log(memory.size, compiled.units["global"], how.block_size)
    for first in range(0, how.grid, _TOGETHER):
        count = min(_TOGETHER, how.grid - first)
        frame = Frame(how, first, count, memory)
        shared = Log(len(frame.shared), compiled.units["shared"], how.block_size, True)
        frame.logs = {"global": log, "shared": shared}
        with np.errstate(all="ignore"):
            _run(compiled, frame, how.block_size)
        shared.check()
    log.check()
    memory.write_back()


def _run(compiled: Compiled, frame: Frame, block_size: int) -> None:
    schedule = _Schedule(frame, block_size)
    for _ in range(_ENDLESS):
        found = schedule.next()
        if found is None:
            return
        index, mask = found
        compiled.ran[index] += 1
        block = compiled.blocks[index]
        active = None if mask.all() else mask
        for step in block.steps:
            step(frame, active)
        _leave(schedule, block.end, index, frame, mask)
    raise PtxError(f"{compiled.kernel.name} does not end")


def _leave(
    schedule: _Schedule, end: Branch | Wait | None, index: int, frame: Frame, mask: Array
) -> None:
    """Send the threads of a basic block to where its last instruction says."""
    if isinstance(end, Wait):
        schedule.wait(index + 1, mask)
    elif end is None:
        schedule.go(index + 1, mask)
    else:
        taken = mask
        if end.guard:
            taken = mask & (frame.read(end.guard, mask) != end.negated)
            schedule.go(index + 1, mask & ~taken)
        if end.target is not None:
            schedule.go(end.target, taken)
