"""Runs a kernel: all threads of some blocks at a time, a numpy array for each register.

Threads that diverge wait for each other at the first basic block, in the order of the code, where
any of them is. A barrier ends a basic block: a thread goes on when all of its block are there.
"""

from typing import NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import Array
from tests.support.ptx.compiler import Compiled, check_whole_warps
from tests.support.ptx.memory import Allocation, GlobalMemory, Log, Memory
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
    """The registers and memories of the threads that run together.

    A register is an array of its bits for each thread, or of one element for all. `undefined` has
    those that are not defined: the threads of which they are not, or the bits.
    """

    def __init__(self, compiled: Compiled, how: Launch, first: int, count: int) -> None:
        size = how.block_size
        lanes = np.arange(count * size)
        self.threads = lanes + first * size
        self.blocks = lanes // size
        self.phases = np.zeros(count, np.int64)  # the barriers that each block has passed
        self.values: dict[str, Array] = {
            **compiled.values,
            "%tid.x": (lanes % size).astype(np.uint32),
            "%ctaid.x": (self.threads // size).astype(np.uint32),
            "%ntid.x": np.array([size], np.uint32),
            "%nctaid.x": np.array([how.grid], np.uint32),
            "%laneid": (lanes % 32).astype(np.uint32),
        }
        self.undefined: dict[str, Array] = dict(compiled.undefined)
        self.memories: dict[str, Memory] = {}

    def undefined_of(self, registers: list[str], mask: Array | None) -> str | None:
        """Return the first of registers that threads have undefined bits of, or None."""
        for register in registers:
            threads = self.undefined.get(register)
            if threads is not None and (
                mask is None or np.count_nonzero(np.logical_and(threads, mask))
            ):
                return register
        return None

    def require(self, registers: list[str], mask: Array | None) -> None:
        """Raise where threads have undefined bits of registers that may have none."""
        register = self.undefined_of(registers, mask)
        if register:
            raise PtxError(f"{register} is used where it is not written")

    def holds(self, guard: str, negated: bool, mask: Array | None) -> Array:
        """Return the threads of a mask for which a guard holds."""
        self.require([guard], mask)
        chosen = self.values[guard] != negated
        return chosen if mask is None else chosen & mask

    def undefined_bits(self, registers: list[str]) -> dict[str, Array]:
        """Return the bits that are undefined of each register."""
        bits = {}
        for register in registers:
            dtype = self.values[register].dtype
            each = self.undefined.get(register, np.zeros(1, dtype))
            bits[register] = (
                each if each.dtype == dtype else np.where(each, ~dtype.type(0), dtype.type(0))
            )
        return bits

    def write(self, register: str, results: list[Array], mask: Array | None) -> None:
        """Set a register where a mask is set, to bits and to which of them are undefined."""
        if mask is None and len(results) == 1:
            self.values[register] = results[0]
            self.undefined.pop(register, None)
            return
        bits, undefined = results if len(results) == 2 else (results[0], None)
        if mask is not None:
            bits = np.where(mask, bits, self.values[register])
            if undefined is not None:
                undefined = np.where(mask, undefined, self.undefined_bits([register])[register])
            elif register in self.undefined:
                undefined = self.undefined[register] * ~mask
        self.values[register] = bits
        if undefined is not None and np.count_nonzero(undefined):
            self.undefined[register] = undefined
        else:
            self.undefined.pop(register, None)


def launch(compiled: Compiled, how: Launch, allocations: list[Allocation]) -> None:
    """Run a kernel on allocations."""
    if how.block_size % 32:
        raise PtxError(f"blocks of {how.block_size} threads are not whole warps")
    if len(how.params) != compiled.kernel.param_bytes:
        raise PtxError(f"{compiled.kernel.param_bytes} bytes of parameters, got {len(how.params)}")
    memory, units, params = GlobalMemory(allocations), compiled.units, _params(compiled, how)
    log = memory.log = Log(memory.size, units["global"], how.block_size)
    for first in range(0, how.grid, _TOGETHER):
        frame = Frame(compiled, how, first, min(_TOGETHER, how.grid - first))
        shared = _shared(compiled, how, frame.blocks)
        shared_log = shared.log = Log(shared.size, units["shared"], how.block_size, copies=True)
        frame.memories = {"global": memory, "shared": shared, "param": params}
        with np.errstate(all="ignore"):
            _run(compiled, frame, how.block_size)
        shared_log.check()
    log.check()
    memory.write_back()


def _params(compiled: Compiled, how: Launch) -> Memory:
    segments = list(compiled.kernel.params.values())
    memory = Memory("param", segments)
    for part, (offset, size) in zip(memory.slices, segments, strict=True):
        memory.bytes[part] = np.frombuffer(how.params[offset : offset + size], np.uint8)
    return memory


def _shared(compiled: Compiled, how: Launch, blocks: Array) -> Memory:
    """Return memory in which each block's addresses begin at another one."""
    size = compiled.shared_bytes + how.shared_bytes
    segments = [(int(block) << 32, size) for block in range(blocks[-1] + 1)]
    memory = Memory("shared", segments, blocks.astype(np.uint64) << np.uint64(32))
    memory.writable[:], memory.readable = 255, np.zeros_like(memory.bytes)
    return memory


def _run(compiled: Compiled, frame: Frame, block_size: int) -> None:
    end = len(compiled.blocks)
    at = np.zeros_like(frame.threads)  # each thread's basic block
    waiting = np.zeros(len(at), bool)
    for _ in range(_ENDLESS):
        index = int(np.where(waiting, end, at).min())
        if index == end:
            if waiting.any():
                raise PtxError("a barrier is not reached by all threads of a block")
            return
        mask = (at == index) & ~waiting
        active = None if mask.all() else mask
        block = compiled.blocks[index]
        compiled.ran[index] += 1
        for step in block.steps:
            step(frame, active)
        at[mask] = index + 1
        taken = frame.holds(block.guard, block.negated, mask) if block.guard else mask
        at[taken] = block.target
        if block.waits:
            check_whole_warps(frame, mask)
            waiting |= mask
            # Those that have ended never come: PTX leaves open what happens then.
            together = (waiting & (at == index + 1)).reshape(-1, block_size).all(1)
            frame.phases[together] += 1
            waiting &= ~np.repeat(together, block_size)
    raise PtxError(f"{compiled.kernel.name} does not end")
