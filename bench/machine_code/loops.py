"""How many instructions a warp issues in an iteration of the loop over full chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.machine_code.disassembly import (
    Instruction,
    instructions,
    loop_of,
    places_of,
    source_lines,
    stores_param,
)

# The machine that shares of the issue slots are of: an H200 at its highest clock, moving nine
# tenths of its 4.8 TB/s (NVIDIA's data sheet), as a copy does. An H100 SXM, 3.0 of 3.35 TB/s at
# 1.755 GHz, has 0.79 times these shares.
MULTIPROCESSORS = 132
CLOCK = 1.98e9
# Warp instructions a cycle: one for each of a multiprocessor's four schedulers.
ISSUED_PER_CYCLE = 4
BYTES_PER_SECOND = 4.3e12
WARP = 32


@dataclass(frozen=True)
class Loop:
    """One iteration of the loop over full chunks.

    Attributes:
        issued: Instructions that a warp issues where no quotient or root takes its slow path.
        barriers: Those of them that wait for the program's other warps.
        elements: Of one thread.
    """

    issued: int
    barriers: int
    elements: float

    @property
    def per_element(self) -> float:
        """The instructions that a thread issues for each of its elements."""
        return self.issued / self.elements

    def issue_share(self, moved: float) -> float:
        """Return the part of the issue slots it takes while `moved` bytes an element are moved."""
        slots = MULTIPROCESSORS * ISSUED_PER_CYCLE * CLOCK * moved / BYTES_PER_SECOND
        return self.per_element / WARP / slots


def full_chunk_loop(listing: str, param_bytes: int) -> Loop:
    """Return the loop over full chunks of what `nvdisasm -gi` printed."""
    code, call = list(instructions(listing)), source_lines().full
    body = loop_of(code, call)
    issued = list(_usual_path(code, body))
    stored = sum(code[place].width for place in body if stores_param(code[place], call))
    return Loop(
        issued=len(issued),
        barriers=sum(line.opcode.startswith("BAR") for line in issued),
        elements=stored / 8 / param_bytes,
    )


def _usual_path(code: list[Instruction], body: range) -> Iterator[Instruction]:
    """Yield what a warp issues of a loop's body.

    Its guarded branches are taken as falling through, except those around the call of a quotient's
    or root's slow path: straight code, for numbers near the ends of the range.
    """
    places = places_of(code)
    place = body.start
    while place in body:
        yield code[place]
        label = code[place].target
        target = places[label] if label else place
        passed = code[place + 1 : target]
        calls = any(line.opcode.startswith("CALL") for line in passed)
        straight = not any(line.labels for line in passed)
        leaps = target > place and (not code[place].guarded or (calls and straight))
        place = target if leaps else place + 1
