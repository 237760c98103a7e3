"""Memory that a kernel may access, and the races between its threads.

The threads of a block are ordered by barriers, those of different blocks by nothing. Whether two
accesses collide is found out after a launch, from a log of all: it does not depend on the order in
which they happened here.
"""

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import UNSIGNED, Array
from tests.support.ptx.parser import Instruction, PtxError

# Allocations lie at least this far apart, and as they do to this alignment.
_GAP = 64


class Allocation(NamedTuple):
    """Memory of this process that a kernel may read, and may write or not; its owner frees it."""

    address: int
    size: int
    writable: bool
    owner: object = None


@dataclass
class _Access:
    """The accesses of one instruction at one time: units of a space, and who accessed them."""

    instruction: Instruction
    writes: bool
    units: Array
    threads: Array
    phases: Array  # the barriers that each thread's block has passed


class Log:
    """The accesses of a launch to one space, in units of bytes that are accessed together."""

    def __init__(self, num_bytes: int, unit: int, block_size: int, copies: bool = False) -> None:
        self._num_units = -(-num_bytes // unit)
        self._unit, self._block_size, self._copies = unit, block_size, copies
        self._accesses: list[_Access] = []

    def add(self, instruction: Instruction, writes: bool, span: "Span", phases: Array) -> None:
        """Log an access of `span.size` bytes by each thread."""
        first, count = span.offsets // self._unit, span.size // self._unit
        units = (first[:, None] + np.arange(count)).ravel() if count > 1 else first
        threads, phases = (
            np.repeat(each, count) if count > 1 else each for each in (span.threads, phases)
        )
        if writes and self._copies:
            # Triton lets every thread of a block that has a copy of a value store it.
            _, kept = np.unique(units, return_index=True)
            units, threads, phases = units[kept], threads[kept], phases[kept]
        self._accesses.append(_Access(instruction, writes, units, threads, phases))

    def check(self) -> None:
        """Raise where two threads collide: at the same unit in one phase, or of two blocks."""
        owner = np.full(self._num_units, -1, np.int64)
        for each in self._accesses:
            if each.writes:
                owner[each.units] = each.threads
        shared = np.zeros(self._num_units, bool)
        for each in self._accesses:
            owners = owner[each.units]
            shared[each.units[(owners >= 0) & (owners != each.threads)]] = True
        if shared.any():
            self._check_units(shared)

    def _check_units(self, shared: Array) -> None:
        """Look at the phases of units that one thread writes and another one accesses."""
        rows = []
        for i, each in enumerate(self._accesses):
            at = shared[each.units]
            units, threads, phases = each.units[at], each.threads[at], each.phases[at]
            rows.append(
                np.stack(
                    [
                        units,
                        threads // self._block_size,
                        phases,
                        threads,
                        np.full_like(units, each.writes),
                        np.full_like(units, i),
                    ]
                )
            )
        table = np.concatenate(rows, axis=1)
        for keys in ((0,), (0, 1, 2)):
            # Of a unit every block but one, of a phase every thread but one, must not write.
            self._check_groups(table, keys, 1 if keys == (0,) else 3)

    def _check_groups(self, table: Array, keys: tuple[int, ...], member: int) -> None:
        table = table[:, np.lexsort(table[list(keys)])]
        starts = np.flatnonzero(np.r_[True, (np.diff(table[list(keys)]) != 0).any(0)])
        low, high = (each.reduceat(table[member], starts) for each in (np.minimum, np.maximum))
        race = (low != high) & np.logical_or.reduceat(table[4] != 0, starts)
        if race.any():
            group = int(np.flatnonzero(race)[0])
            end = starts[group + 1] if group + 1 < len(starts) else table.shape[1]
            rows = table[:, starts[group] : end]
            writer = rows[:, np.flatnonzero(rows[4])[0]]
            other = rows[:, np.flatnonzero(rows[member] != writer[member])[0]]
            said = "; ".join(
                f"thread {row[3]}: {self._accesses[row[5]].instruction}" for row in (writer, other)
            )
            raise PtxError(f"race at unit {writer[0]}: {said}")


class Span(NamedTuple):
    """Bytes that threads access: `size` from each offset."""

    offsets: Array
    size: int
    threads: Array


class GlobalMemory:
    """A copy of the allocations for a launch, at offsets with the addresses' alignment."""

    def __init__(self, allocations: list[Allocation]) -> None:
        merged: list[tuple[int, int]] = []
        for address, size in sorted(each[:2] for each in allocations if each.size):
            if merged and address < merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], address + size)
            else:
                merged.append((address, address + size))
        self._segments = merged
        self._starts = np.array([start for start, _ in merged], np.uint64)
        self._ends = np.array([end for _, end in merged], np.uint64)
        offsets, total = [], 0
        for start, end in merged:
            offset = total + _GAP - total % _GAP + start % _GAP
            offsets.append(offset)
            total = offset + end - start
        self._offsets = np.array(offsets, np.int64)
        self.size = total + _GAP - total % _GAP
        self.bytes = np.zeros(self.size, np.uint8)
        self._writable = np.zeros(self.size, bool)
        for (start, end), offset in zip(merged, offsets, strict=True):
            self.bytes[offset : offset + end - start] = _of_process(start, end - start)
        for address, size, writable, _ in allocations:
            if size:
                at = int(self.offsets(np.array([address], np.uint64), size)[0])
                self._writable[at : at + size] |= writable

    def offsets(self, addresses: Array, size: int) -> Array:
        """Return the offsets of accesses of `size` bytes; raise where they are out of bounds."""
        which = np.searchsorted(self._starts, addresses, "right") - 1
        inside = which >= 0
        within = addresses - self._starts[which]
        inside &= within + np.uint64(size) <= (self._ends - self._starts)[which]
        if not inside.all():
            raise PtxError(f"out of bounds: {size} bytes at {int(addresses[~inside][0]):#x}")
        return self._offsets[which] + within.astype(np.int64)

    def check_writable(self, span: Span) -> None:
        """Raise where a span is read-only."""
        # Neighbours of one access lie in one allocation, so its ends speak for it.
        last = span.offsets + (span.size - 1)
        if not (self._writable[span.offsets] & self._writable[last]).all():
            raise PtxError("write to read-only memory")

    def write_back(self) -> None:
        """Store what the launch wrote in the allocations."""
        for (start, end), offset in zip(self._segments, self._offsets, strict=True):
            size = end - start
            writable = self._writable[offset : offset + size]
            memory = _of_process(start, size)
            np.copyto(memory, self.bytes[offset : offset + size], where=writable)


def _of_process(address: int, size: int) -> Array:
    memory: Array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
    return memory


def gather(memory: Array, offsets: Array, size: int) -> Array:
    """Return the numbers of `size` bytes at aligned offsets of bytes."""
    return memory.view(UNSIGNED[size])[offsets // size]


def scatter(memory: Array, offsets: Array, values: Array) -> None:
    """Store numbers at aligned offsets of bytes; raise where one is given two values."""
    memory.view(UNSIGNED[values.itemsize])[offsets // values.itemsize] = values
    if (gather(memory, offsets, values.itemsize) != values).any():
        raise PtxError("race: threads store different values at one address")
