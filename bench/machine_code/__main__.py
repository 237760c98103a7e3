"""The Triton pass as machine code, without a GPU: `python -m bench.machine_code`.

Every variant is compiled as a launch compiles it and disassembled. Its accesses of tensors are told
apart by the source lines that the disassembler names for each instruction, its elements by their
stores: each element's parameter is stored once. So the bytes an element are counted, not believed,
and beside them the instructions issued while they are moved.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import triton

from bench.machine_code.disassembly import accesses, bytes_per_element, instructions, source_lines
from bench.machine_code.loops import full_chunk_loop
from bench.machine_code.variants import WARP, Variant, compile_variant, variants
from cm_fused._backends.triton import common as triton_common

ARCHITECTURES = (80, 90, 100)

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Every architecture here has these: registers of a multiprocessor's quarter, how many a warp is
# given at a time, and the warps a quarter holds.
_QUARTERS = 4
_QUARTER_REGISTERS = 16384
_REGISTER_UNIT = 256
_QUARTER_WARPS = 16

NO_INLINE_INFO = 3


class NoInlineInfoError(Exception):
    """The line tables do not say from which call an instruction comes, as triton 3.6's do not."""


@dataclass(frozen=True)
class Report:
    """One variant on one architecture.

    Attributes:
        arch: Of the compute capability, without the dot.
        name: The variant's.
        registers: Of a thread.
        local_bytes: What a thread needs of local memory: stack and spills.
        occupancy: Of a multiprocessor's warps, the part that its registers let run at a time.
        full_widths: Accesses of full chunks' tensors by width in bits.
        unaligned_slots_widths: The same where the slots alone are not aligned.
        tail_widths: The same where elements are not aligned or not all there.
        read: Bytes an element on full chunks where a slot is replaced.
        written: Likewise.
        expected: What the byte model says of these two.
        instructions: That a thread issues for each element of full chunks.
        issue_share: Of the issue slots, the part they take while the expected bytes move at the
            speed of `bench.machine_code.loops`.
        barriers: Waits for the program's other warps in an iteration over full chunks.
        shared_bytes: Of shared memory, a program's.
        conversions: Layout conversions in the compiler's intermediate form.
        fused_multiply_adds: Of float32, written as such in the PTX by the compiler: contracted, or
            `tl.fma`.
    """

    arch: int
    name: str
    registers: int
    local_bytes: int
    occupancy: float
    full_widths: dict[int, int]
    unaligned_slots_widths: dict[int, int]
    tail_widths: dict[int, int]
    read: float
    written: float
    expected: tuple[float, float]
    instructions: float
    issue_share: float
    barriers: int
    shared_bytes: int
    conversions: int
    fused_multiply_adds: int

    def row(self) -> str:
        """Return its line of the table."""
        counted = (self.read, self.written)
        verdict = "" if counted == self.expected else " NOT {:g} + {:g}".format(*self.expected)
        return (
            f"sm_{self.arch:<4}{self.name:<60}{self.registers:>4}{self.local_bytes:>7}"
            f"{self.occupancy:>6.0%}{_widths(self.full_widths):>22}{_widths(self.tail_widths):>22}"
            f"{self.read:>6g}{self.written:>6g}{self.instructions:>7.1f}{self.issue_share:>7.0%}"
            f"{self.barriers:>5}{self.shared_bytes:>7}{verdict}"
        )


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items()))


HEADER = (
    f"{'arch':<7}{'variant':<60}{'regs':>4}{'local':>7}{'occ':>6}{'full chunks, bits':>22}"
    f"{'tails, bits':>22}{'read':>6}{'write':>6}{'instr':>7}{'issue':>7}{'bar':>5}{'shared':>7}"
)


def _run_tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def occupancy(registers: int) -> float:
    """Return the part of a multiprocessor's warps that fit into its registers."""
    per_warp = -(-registers * WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    warps = _QUARTERS * min(_QUARTER_REGISTERS // per_warp, _QUARTER_WARPS)
    # A program's warps run together or not at all.
    per_program: int = triton_common.LAUNCH_OPTIONS["num_warps"]
    return warps // per_program * per_program / (_QUARTERS * _QUARTER_WARPS)


def report(variant: Variant, arch: int) -> Report:
    """Compile and disassemble a variant."""
    compiled = compile_variant(variant, arch)
    cubin = compiled.asm["cubin"]
    usage = _run_tool("cuobjdump", "-res-usage", cubin=cubin)
    used = {name: int(value) for name, value in re.findall(r"\b(\w+):(\d+)", usage)}
    listing = _run_tool("nvdisasm", "-gi", cubin=cubin)
    if not any(len(instruction.lines) > 1 for instruction in instructions(listing)):
        raise NoInlineInfoError
    lines = source_lines()
    calls = (lines.full, lines.unaligned_slots, lines.tail)
    full, unaligned_slots, tail = (accesses(listing, call) for call in calls)
    counted = bytes_per_element(full, variant.param_dtype.itemsize)
    loop = full_chunk_loop(listing, variant.param_dtype.itemsize)
    model = variant.model()
    return Report(
        arch=arch,
        name=variant.name,
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        occupancy=occupancy(used["REG"]),
        full_widths=dict(Counter(access.width for access in full)),
        unaligned_slots_widths=dict(Counter(access.width for access in unaligned_slots)),
        tail_widths=dict(Counter(access.width for access in tail)),
        read=counted.read,
        written=counted.written,
        expected=(model.read, model.written),
        instructions=loop.per_element,
        issue_share=loop.issue_share(model.read + model.written),
        barriers=loop.barriers,
        shared_bytes=compiled.metadata.shared,
        conversions=compiled.asm["ttgir"].count("convert_layout"),
        fused_multiply_adds=_fused_multiply_adds(compiled.asm["ptx"]),
    )


def _fused_multiply_adds(ptx: str) -> int:
    compiled = re.sub(r"// begin inline asm.*?// end inline asm", "", ptx, flags=re.DOTALL)
    return len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", compiled))


def main() -> None:
    """Print a line for every variant and architecture."""
    parser = argparse.ArgumentParser(prog="python -m bench.machine_code", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument(
        "--only", nargs="+", default=("",), help="variants whose name starts with one of these"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as JSON lines")
    parser.add_argument("--compile", action="store_true", help="compile only, and print how many")
    arguments = parser.parse_args()
    if triton_common.INTERPRETED:
        sys.exit("bench.machine_code: TRITON_INTERPRET=1 is set, so nothing is compiled; unset it")
    chosen = [each for each in variants() if each.name.startswith(tuple(arguments.only))]
    pairs = list(itertools.product(arguments.arch, chosen))
    if arguments.compile:
        for arch, variant in pairs:
            compile_variant(variant, arch)
        print(f"triton {triton.__version__} compiles {len(pairs)} variants of the pass")
        return
    if not arguments.json:
        print(HEADER)
    for arch, variant in pairs:
        try:
            result = report(variant, arch)
        except NoInlineInfoError as error:
            print(f"bench.machine_code: {error.__doc__} Use triton 3.9.", file=sys.stderr)
            sys.exit(NO_INLINE_INFO)
        print(json.dumps(asdict(result)) if arguments.json else result.row(), flush=True)


if __name__ == "__main__":
    main()
