"""Mutants of compiled code: each has one instruction changed, and other bits or an error show it.

The launches of a run are recorded with the memory before and after; a mutant's are replayed.
"""

import ctypes
import re
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from tests.support.ptx import machine
from tests.support.ptx.compiler import Compiled
from tests.support.ptx.driver import Driver
from tests.support.ptx.machine import Launch
from tests.support.ptx.memory import Allocation
from tests.support.ptx.parser import PtxError, parse

# The basic blocks that a launch here may take; a mutant's loop may be endless.
_ENDLESS = 500
# What an instruction is changed to: the first rule that fits its text.
_RULES: tuple[tuple[str, str], ...] = (
    (r"^@!(%p\d+)", r"@\1"),
    (r"^@(%p\d+)", r"@!\1"),
    (r"^add\.(rn\.f|s)", r"sub.\1"),
    (r"^sub\.(rn\.f|s)", r"add.\1"),
    (r"^mul\.rn\.f", "add.rn.f"),
    (r"^div\.rn\.f", "mul.rn.f"),
    (r"^sqrt\.rn\.f(32|64)", r"mov.b\1"),
    (r"^setp\.ne", "setp.eq"),
    (r"^setp\.eq", "setp.ne"),
    (r"^setp\.lt", "setp.le"),
    (r"^setp\.(gt|ge|neu)", "setp.lt"),
    (r"^(selp\.\w+) (\S+), (\S+), (\S+), (\S+);", r"\1 \2, \4, \3, \5;"),
    (r"^and\.", "or."),
    (r"^or\.", "and."),
    (r"^max\.", "min."),
    (r"^min\.", "max."),
    (r"^mul\.lo\.", "add."),
    (r"^(shfl\.sync\.bfly\.b32 .*), (\d+), 31,", r"\1, 0, 31,"),
    (r"^(shl|shr)(\.\w+ .*), (\d+);", r"\1\2, 9;"),
    (r"^(mul|mad)\.wide(.*?), (\d+)([,;])", r"\1.wide\2, 12\4"),
    (r"^(cvt\.rn\.f32\.f64 \S+), (\S+);", r"\1, 0d3FE0000000000001;"),
    (r"^cvt\.(rzi\.\w+\.\w+) (\S+), (\S+);", r"cvt.\1 \2, 0f41200000;"),
    (r"^cvt\.(u64|s64)\.(s32|u32) (\S+), (\S+);", r"cvt.\1.\2 \3, 2;"),
    (r"^cvt\.u32\.u64 (\S+), (\S+);", r"cvt.u32.u64 \1, 3;"),
    (r"^cvt\.rn\.f64\.s32 (\S+), (\S+);", r"cvt.rn.f64.s32 \1, 9;"),
    (r"^cvt\.f64\.f32 (\S+), (\S+);", r"cvt.f64.f32 \1, 0f3F000000;"),
    (r"^rem\.(\w+) (\S+), (\S+), (\S+);", r"add.\1 \2, \3, \4;"),
    (r"^(ld\.global\S*b)(\d+)(.*) \+ 0 \]", r"\1\2\3 + 32 ]"),
    (r"^(st\.global\S*b)(\d+)(.*) \+ 0 \]", r"\1\2\3 + 32 ]"),
    (r"^(ld|st)(\.shared\S* .*)\[(%r\d+)\]", r"\1\2[\3+64]"),
    (r"^bar\.sync .*", ""),
    # Not what a load's result is before it, which is 0x0.
    (r"^(mov\.b\d+) (%r\S+), -?\d+;", r"\1 \2, 1065353216;"),
    (r"^(mov\.\w+) (%r\S+), 0d[0-9A-F]+;", r"\1 \2, 0d3FB0000000000000;"),
    (r"^mov\.u32 (\S+), %(tid|ctaid)\.x;", r"mov.u32 \1, 1;"),
    (r"^ld\.param\.b(\d+) (\S+), \[(\w+)_\d+\];", r"ld.param.b\1 \2, [\3_11];"),
)


class Mutant(NamedTuple):
    """A PTX module with one instruction changed; `line` is the source's, as file:line."""

    line: str
    before: str
    after: str
    ptx: str


class Recorded(NamedTuple):
    """A launch, and its memory before and after."""

    compiled: Compiled
    how: Launch
    allocations: list[Allocation]
    before: list[bytes]
    after: list[bytes]


def mutants(ptx: str) -> Iterator[Mutant]:
    """Yield one mutant for every instruction that a rule fits."""
    lines = ptx.splitlines()
    files = dict(re.findall(r'\.file\s+(\d+) ".*?([^/"]*)"', ptx))
    source = ""
    for i, line in enumerate(lines):
        text = " ".join(line.partition("//")[0].split())
        if place := re.match(r"\.loc (\d+) (\d+)", text):
            source = f"{files[place[1]]}:{place[2]}"
        changed = _changed(text)
        if changed is not None:
            mutant = [*lines[:i], changed, *lines[i + 1 :]]
            yield Mutant(source, text, changed, "\n".join(mutant))


def _changed(text: str) -> str | None:
    """Return what an instruction is changed to, or None."""
    for pattern, replacement in _RULES:
        changed, count = re.subn(pattern, replacement, text)
        if count and changed != text:
            return changed
    return None


class Recorder:
    """Records the launches of one kernel."""

    def __init__(self, driver: Driver, kernel: str) -> None:
        self._driver, self._kernel = driver, kernel
        self.launches: list[Recorded] = []

    def recording(self) -> Any:
        """Return what records the launches while it is entered."""
        run = self._driver.launch

        def launch(
            compiled: Compiled, how: Launch, kernel: str, tensors: dict[str, Tensor]
        ) -> None:
            allocations = self._driver.find(kernel, tensors)
            before = [_bytes(each) for each in allocations]
            run(compiled, how, kernel, tensors)
            if kernel == self._kernel:
                after = [_bytes(each) for each in allocations]
                self.launches.append(Recorded(compiled, how, allocations, before, after))

        return mock.patch.object(self._driver, "launch", launch)


def is_noticed(recorded: list[Recorded], mutant: Mutant) -> bool:
    """Return whether a mutant raises, or leaves other bits, in one of the launches."""
    try:
        (kernel,) = parse(mutant.ptx).values()
        compiled = Compiled(kernel)
        with mock.patch.object(machine, "_ENDLESS", _ENDLESS):
            return any(_differs(each, compiled) for each in recorded)
    except PtxError:
        return True


def _differs(recorded: Recorded, compiled: Compiled) -> bool:
    for allocation, before in zip(recorded.allocations, recorded.before, strict=True):
        ctypes.memmove(allocation.address, before, len(before))
    machine.launch(compiled, recorded.how, recorded.allocations)
    return [_bytes(each) for each in recorded.allocations] != recorded.after


def _bytes(allocation: Allocation) -> bytes:
    return ctypes.string_at(allocation.address, allocation.size)
