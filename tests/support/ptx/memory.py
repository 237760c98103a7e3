"""Memory that a kernel may access, and the races between its threads.

The threads of a block are ordered by barriers, those of different blocks by nothing. Whether two
accesses collide is found out after a launch, from a log of all: it does not depend on the order in
which they happened here.
"""

import ctypes
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import UNSIGNED, Array
from tests.support.ptx.parser import Instruction, PtxError

# Allocations lie as they do to this alignment.
_ALIGNMENT = 64


class Allocation(NamedTuple):
    """Memory of this process that a kernel may read, and may write or not; its owner frees it."""

    address: int
    size: int
    writable: bool
    owner: object = None


class Log:
    """The accesses of a launch to one space, in units of bytes that are accessed together."""

    def __init__(self, num_bytes: int, unit: int, block_size: int, copies: bool = False) -> None:
        self._num_units = num_bytes // unit
        self._unit, self._block_size, self._copies = unit, block_size, copies
        # Each access has its instruction, whether it writes, its units, threads and phases.
        self._accesses: list[tuple[Instruction, bool, Array, Array, Array]] = []

    def add(
        self, instruction: Instruction, offsets: Array, size: int, threads: Array, phases: Array
    ) -> None:
        """Log an access of `size` bytes by each thread, and the barriers its block has passed."""
        count, writes = size // self._unit, instruction.opcode.startswith("st")
        units = ((offsets // self._unit)[:, None] + np.arange(count)).ravel()
        threads, phases = np.repeat(threads, count), np.repeat(phases, count)
        if writes and self._copies:
            # Triton lets every thread of a block that has a copy of a value store it.
            _, kept = np.unique(units, return_index=True)
            units, threads, phases = units[kept], threads[kept], phases[kept]
        self._accesses.append((instruction, writes, units, threads, phases))

    def check(self) -> None:
        """Raise where two threads collide: at the same unit in one phase, or of two blocks."""
        owner = np.full(self._num_units, -1, np.int64)
        for _, writes, units, threads, _ in self._accesses:
            if writes:
                owner[units] = threads
        shared = np.zeros(self._num_units, bool)
        for _, _, units, threads, _ in self._accesses:
            shared[units[(owner[units] >= 0) & (owner[units] != threads)]] = True
        if not shared.any():
            return
        # Units that one thread writes and another one accesses.
        rows = []
        for i, (_, writes, *columns) in enumerate(self._accesses):
            units, threads, phases = (each[shared[columns[0]]] for each in columns)
            same = (np.full_like(units, each) for each in (writes, i))
            rows.append(np.stack([units, threads // self._block_size, phases, threads, *same]))
        table = np.concatenate(rows, axis=1)
        # A unit that is written is one block's alone, and within a phase one thread's.
        self._check_groups(table, [0], 1)
        self._check_groups(table, [0, 1, 2], 3)

    def _check_groups(self, table: Array, keys: list[int], member: int) -> None:
        """Raise where members differ in rows of the same keys, one of which writes."""
        table = table[:, np.lexsort(table[keys])]
        starts = np.flatnonzero(np.r_[True, (np.diff(table[keys]) != 0).any(0)])
        low, high = (each.reduceat(table[member], starts) for each in (np.minimum, np.maximum))
        races = np.flatnonzero((low != high) & (np.maximum.reduceat(table[4], starts) != 0))
        for race in races:
            rows = table[:, (table[keys] == table[keys][:, starts[[race]]]).all(0)]
            writer = rows[:, rows[4] != 0][:, 0]
            other = rows[:, rows[member] != writer[member]][:, 0]
            said = (f"thread {row[3]}: {self._accesses[row[5]][0]}" for row in (writer, other))
            raise PtxError(f"race at unit {writer[0]}: {'; '.join(said)}")


class Memory:
    """A space of segments, (address, size) in order, of bytes that may be read or written or not.

    The address of a thread is relative to its base.
    """

    def __init__(self, name: str, segments: list[tuple[int, int]], base: Array | None = None):
        self._name = name
        self._base = np.zeros(1, np.uint64) if base is None else base
        self._starts, self._sizes = np.array(segments, np.uint64).reshape(-1, 2).T.copy()
        self.slices, self.size = [], 0
        for address, size in segments:
            at = self.size + address % _ALIGNMENT
            self.slices.append(slice(at, at + size))
            self.size = -(-(at + size) // _ALIGNMENT) * _ALIGNMENT
        self._offsets = np.array([part.start for part in self.slices], np.int64)
        # A flag's byte has all bits set or none.
        self.bytes, self.writable = np.zeros((2, self.size), np.uint8)
        self.readable: Array | None = None  # where it is not all
        self.log: Log | None = None

    def access(
        self, instruction: Instruction, addresses: Array, size: int, frame: Any, mask: Array | None
    ) -> Array:
        """Log an access of `size` bytes by threads; return where they are, if all are in bounds."""
        addresses = addresses + self._base
        if self.log is None:
            return self._offsets_of(addresses, size)
        threads, phases = frame.threads, frame.phases[frame.blocks]
        addresses = np.broadcast_to(addresses, len(threads))
        if mask is not None:
            addresses, threads, phases = addresses[mask], threads[mask], phases[mask]
        offsets = self._offsets_of(addresses, size)
        self.log.add(instruction, offsets, size, threads, phases)
        return offsets

    def _offsets_of(self, addresses: Array, size: int) -> Array:
        if np.count_nonzero(addresses & np.uint64(size - 1)):
            raise PtxError(f"not aligned to {size} bytes")
        which = np.searchsorted(self._starts, addresses, "right") - 1
        within = addresses - self._starts[which]
        outside = (which < 0) | (within + np.uint64(size) > self._sizes[which])
        if np.count_nonzero(outside):
            where = f"{size} bytes at {int(addresses[outside][0]):#x}"
            raise PtxError(f"out of bounds of {self._name} memory: {where}")
        return self._offsets[which] + within.astype(np.int64)

    def load(self, offsets: Array, size: int) -> Array:
        """Return the numbers of `size` bytes at aligned offsets."""
        if self.readable is not None and not _all_set(self.readable, offsets, size):
            raise PtxError(f"{self._name} memory is read but not written")
        return self.bytes.view(UNSIGNED[size])[offsets // size]

    def store(self, offsets: Array, values: Array) -> None:
        """Store unsigned numbers at aligned offsets; raise where one is given two values."""
        size = values.itemsize
        if not _all_set(self.writable, offsets, size):
            raise PtxError(f"write to read-only {self._name} memory")
        numbers, at = self.bytes.view(values.dtype), offsets // size
        numbers[at] = values
        if (numbers[at] != values).any():
            raise PtxError("race: threads store different values at one address")
        if self.readable is not None:
            self.readable.view(values.dtype)[at] = ~values.dtype.type(0)


def _all_set(flags: Array, offsets: Array, size: int) -> bool:
    return not np.count_nonzero(~flags.view(UNSIGNED[size])[offsets // size])


class GlobalMemory(Memory):
    """A copy of allocations for a launch."""

    def __init__(self, allocations: list[Allocation]) -> None:
        merged: list[tuple[int, int]] = []
        for address, size in sorted(each[:2] for each in allocations if each.size):
            if merged and address < sum(merged[-1]):
                start = merged[-1][0]
                merged[-1] = start, max(sum(merged[-1]), address + size) - start
            else:
                merged.append((address, size))
        super().__init__("global", merged)
        self._memory = [
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
            for address, size in merged
        ]
        for part, memory in zip(self.slices, self._memory, strict=True):
            self.bytes[part] = memory
        for address, size, writable, _ in allocations:
            if size and writable:
                (at,) = self._offsets_of(np.array([address], np.uint64), 1)
                self.writable[at : at + size] = 255

    def write_back(self) -> None:
        """Store what the launch wrote in the allocations."""
        for part, memory in zip(self.slices, self._memory, strict=True):
            np.copyto(memory, self.bytes[part], where=self.writable[part] != 0)
