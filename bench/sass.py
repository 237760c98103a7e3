"""What the Triton pass is as machine code; needs no GPU: `python -m bench.sass [--arch 90]`.

Every variant is compiled as a launch compiles it and disassembled. Its accesses of tensors are told
apart by the source lines that the disassembler names for each instruction, its elements by their
stores: each element's parameter is stored once. So the bytes an element are counted, not believed.
"""

import argparse
import ast
import inspect
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import bytes as byte_model
from bench.bytes import Bytes
from cm_fused._backends.triton import common as triton_common
from cm_fused._backends.triton import kernels as triton_kernels
from cm_fused._backends.triton import launch as backend
from cm_fused._backends.triton import rounding as triton_rounding
from cm_fused._backends.triton.columns import running_sum_min_capacity

ARCHITECTURES = (80, 90, 100)

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    "table_ptr": "*i64",
    "chunks_ptr": "*i32",
    "chunk_sq_norms_ptr": "*fp64",
}

# Of every architecture here: registers of a multiprocessor's quarter, how many a warp is given at a
# time, and the warps a quarter holds.
_QUARTERS = 4
_QUARTER_REGISTERS = 16384
_REGISTER_UNIT = 256
_QUARTER_WARPS = 16
_WARP = 32


NO_INLINE_INFO = 3


class NoInlineInfoError(Exception):
    """The line tables do not say from which call an instruction comes, as triton 3.6's do not."""


@dataclass(frozen=True)
class Variant:
    """One specialization of `critical_adam_kernel`; the attributes are its constexprs."""

    param_dtype: torch.dtype
    critical_gradients: bool
    amsgrad: bool
    summed_slots: int
    moment_dtype: torch.dtype | None = None
    slot_dtype: torch.dtype | None = None
    update: str = "nearest"

    @property
    def state_dtype(self) -> torch.dtype:
        """Of the arithmetic, and of state that no option rounds."""
        return torch.float64 if self.param_dtype is torch.float64 else torch.float32

    @property
    def name(self) -> str:
        """Its name in the table."""
        kind = "CG" if self.critical_gradients else "CM"
        buffer = f"{self.summed_slots} slots" if self.summed_slots else "running sum"
        words = ["rounded"] if self.moment_dtype or self.slot_dtype else []
        words += [_short(self.param_dtype), kind, buffer]
        words += [_short(self.slot_dtype)] if self.slot_dtype else []
        words += [f"{_short(self.moment_dtype)} moments"] if self.moment_dtype else []
        words += ["amsgrad"] if self.amsgrad else []
        return " ".join(words + ([self.update] if self.update != "nearest" else []))

    def precision(self) -> dict[str, Any]:
        """Return those of them that say how state and parameters are stored."""
        return backend.precision(
            self.param_dtype,
            self.moment_dtype or self.state_dtype,
            self.slot_dtype or self.state_dtype,
            self.update,
        )

    def constexprs(self) -> dict[str, Any]:
        """Return the kernel's compile-time arguments."""
        return {
            "lr_ptr": None,
            "grad_factor_ptr": None,
            "found_inf_ptr": None,
            "PARAM_DTYPE": backend.TRITON_DTYPES[self.param_dtype],
            "STATE_DTYPE": backend.TRITON_DTYPES[self.state_dtype],
            **self.precision(),
            "CRITICAL_GRADIENTS": self.critical_gradients,
            "AMSGRAD": self.amsgrad,
            "SUMMED_SLOTS": self.summed_slots,
            "BY_FOURS": True,
        }

    def model(self) -> Bytes:
        """Return what the byte model says the pass accesses where it replaces a slot."""
        return byte_model.triton_pass(
            self.amsgrad,
            self.summed_slots,
            param_bytes=self.param_dtype.itemsize,
            state_bytes=self.state_dtype.itemsize,
            moment_bytes=(self.moment_dtype or self.state_dtype).itemsize,
            slot_bytes=(self.slot_dtype or self.state_dtype).itemsize,
            kahan=self.update == "kahan",
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_variants() -> list[Variant]:
    """Return variants with state of low precision at C = 5, and a running sum: every rounding."""
    int8, half = torch.int8, torch.bfloat16
    states: list[tuple[torch.dtype | None, torch.dtype]]
    states = [(None, slot) for slot in (half, torch.float16, torch.float8_e4m3fn, int8)]
    states += [(half, int8), (int8, int8)]
    of_float32 = [
        Variant(torch.float32, gradients, False, slots, moment, slot)
        for gradients in (False, True)
        for slots in (5, 0)
        for moment, slot in states
    ]
    of_halves = [
        Variant(dtype, False, False, 5, half, int8, update)
        for dtype in (torch.bfloat16, torch.float16)
        for update in ("nearest", "stochastic", "kahan")
    ]
    return of_float32 + of_halves


def variants() -> list[Variant]:
    """Return every variant of unrounded state, with a number as learning rate, and rounded ones."""
    unrounded = [
        Variant(dtype, critical_gradients, amsgrad, slots)
        for dtype, critical_gradients, amsgrad in itertools.product(
            backend.TRITON_DTYPES, (False, True), (False, True)
        )
        for slots in range(running_sum_min_capacity(critical_gradients, 4))
    ]
    return unrounded + rounded_variants()


@dataclass(frozen=True)
class Report:
    """What one variant is on one architecture.

    Attributes:
        arch: Of the compute capability, without the dot.
        name: The variant's.
        registers: Of a thread.
        local_bytes: What a thread needs of local memory: stack and spills.
        occupancy: Of a multiprocessor's warps, the part that its registers let run at a time.
        full_widths: Accesses of full chunks' tensors by width in bits.
        tail_widths: The same where elements are not aligned or not all there.
        read: Bytes an element on full chunks where a slot is replaced.
        written: Likewise.
        expected: What the byte model says of these two.
        conversions: Layout conversions in the compiler's intermediate form.
        fused_multiply_adds: Of float32, written as such in the PTX: contracted.
    """

    arch: int
    name: str
    registers: int
    local_bytes: int
    occupancy: float
    full_widths: dict[int, int]
    tail_widths: dict[int, int]
    read: float
    written: float
    expected: tuple[float, float]
    conversions: int
    fused_multiply_adds: int

    def row(self) -> str:
        """Return its line of the table."""
        counted = (self.read, self.written)
        verdict = "" if counted == self.expected else " NOT {:g} + {:g}".format(*self.expected)
        return (
            f"sm_{self.arch:<4}{self.name:<60}{self.registers:>4}{self.local_bytes:>7}"
            f"{self.occupancy:>6.0%}{_widths(self.full_widths):>22}{_widths(self.tail_widths):>22}"
            f"{self.read:>6g}{self.written:>6g}{verdict}"
        )


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{count}x{width}" for width, count in sorted(widths.items()))


HEADER = (
    f"{'arch':<7}{'variant':<60}{'regs':>4}{'local':>7}{'occ':>6}{'full chunks, bits':>22}"
    f"{'tails, bits':>22}{'read':>6}{'write':>6}"
)


# Compiling


def compile_variant(variant: Variant, arch: int) -> Any:
    """Compile a variant with the signature, alignment and options of a launch."""
    kernel = triton_kernels.critical_adam_kernel
    constexprs = variant.constexprs()
    signature = {
        param.name: "constexpr"
        if param.name in constexprs
        else _POINTERS.get(param.name) or param.annotation_type
        for param in kernel.params
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constexprs,
        # The only pointer whose alignment launches specialize on; torch allocates at 16 and more.
        attrs={(list(signature).index("table_ptr"),): [["tt.divisibility", 16]]},
    )
    options = triton_kernels.launch_options(
        backend.TRITON_DTYPES[variant.param_dtype],
        variant.precision()["MOMENT_DTYPE"],
        variant.precision()["SLOT_DTYPE"],
        variant.amsgrad,
        variant.summed_slots,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, _WARP), options=options)


def _run_tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# Disassembly


class Instruction(NamedTuple):
    """One instruction and the source lines it comes from, the innermost call's first.

    Those of `triton_rounding` are negative, those of other files 0.
    """

    opcode: str
    lines: tuple[int, ...]

    @property
    def width(self) -> int:
        """The bits a thread loads or stores."""
        suffixes = [int(part) for part in self.opcode.split(".") if part.isdecimal()]
        return suffixes[0] if suffixes else _NARROW.get(self.opcode.split(".")[-1], 32)


_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_SIGNS = {"kernels.py": 1, "rounding.py": -1}
_LINE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')


def instructions(listing: str) -> Iterator[Instruction]:
    """Yield the instructions of what `nvdisasm -gi` printed."""
    lines: list[int] = []
    complete = False
    for text in listing.splitlines():
        line = _LINE.match(text)
        if line:
            if complete:
                lines, complete = [], False
            lines.append(_SIGNS.get(Path(line[1]).name, 0) * int(line[2]))
            continue
        instruction = _INSTRUCTION.match(text)
        if instruction:
            complete = True
            yield Instruction(instruction[1], tuple(lines))


@dataclass(frozen=True)
class _Places:
    """The lines of the kernels' source that decide what an access is.

    Attributes:
        full: The call for full chunks.
        tail: The call for all others.
        loop: The loop over a chunk's elements.
        param_store: The one store of each element's parameter.
        scales: The functions that access scales, a 64th of a byte an element, negative.
    """

    full: range
    tail: range
    loop: range
    param_store: range
    scales: frozenset[int]


def _lines_of(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


@cache
def _places() -> _Places:
    tree = ast.parse(inspect.getsource(triton_kernels))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [
        node
        for node in ast.walk(functions["critical_adam_kernel"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_update_chunk"
    ]
    by_last = {ast.unparse(call.args[-1]): _lines_of(call) for call in calls}
    update = functions["_update_chunk"]
    (loop,) = [node for node in update.body if isinstance(node, ast.For)]
    (store,) = [
        node
        for node in ast.walk(functions["_store_param"])
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("tl.store(tensors.param ")
    ]
    scales = frozenset(
        -line
        for node in ast.parse(inspect.getsource(triton_rounding)).body
        if isinstance(node, ast.FunctionDef) and node.name in ("load_scales", "store_scales")
        for line in _lines_of(node)
    )
    return _Places(by_last["True"], by_last["False"], _lines_of(loop), _lines_of(store), scales)


def _accesses(listing: str, call: range) -> list[Instruction]:
    """Return the accesses of tensors by one of the two calls, in its loop over the elements."""
    loop, scales = _places().loop, _places().scales
    return [
        instruction
        for instruction in instructions(listing)
        if instruction.opcode.startswith(("LDG", "STG"))
        and any(line in call for line in instruction.lines)
        and any(line in loop for line in instruction.lines)
        and not scales.intersection(instruction.lines)
    ]


def bytes_per_element(accesses: Iterable[Instruction], param_bytes: int) -> Bytes:
    """Count what is read and written for each parameter that is stored."""
    accesses = list(accesses)
    param_store = _places().param_store
    stores = [access for access in accesses if access.opcode.startswith("STG")]
    stored = sum(access.width for access in stores if access.lines[0] in param_store)
    elements = stored / 8 / param_bytes
    written = sum(access.width for access in stores) / 8
    read = sum(access.width for access in accesses) / 8 - written
    return Bytes(read / elements, written / elements)


def occupancy(registers: int) -> float:
    """Return the part of a multiprocessor's warps that fit into its registers."""
    per_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
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
    places = _places()
    full, tail = (_accesses(listing, call) for call in (places.full, places.tail))
    counted = bytes_per_element(full, variant.param_dtype.itemsize)
    model = variant.model()
    return Report(
        arch=arch,
        name=variant.name,
        registers=used["REG"],
        local_bytes=used["STACK"] + used["LOCAL"],
        occupancy=occupancy(used["REG"]),
        full_widths=dict(Counter(access.width for access in full)),
        tail_widths=dict(Counter(access.width for access in tail)),
        read=counted.read,
        written=counted.written,
        expected=(model.read, model.written),
        conversions=compiled.asm["ttgir"].count("convert_layout"),
        fused_multiply_adds=len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", compiled.asm["ptx"])),
    )


def main() -> None:
    """Print a line for every variant and architecture."""
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument(
        "--only", nargs="+", default=("",), help="variants whose name starts with one of these"
    )
    parser.add_argument("--json", action="store_true", help="print the reports as JSON lines")
    arguments = parser.parse_args()
    if triton_common.INTERPRETED:
        sys.exit("bench.sass: TRITON_INTERPRET=1 is set, so nothing is compiled; unset it")
    if not arguments.json:
        print(HEADER)
    for arch, variant in itertools.product(arguments.arch, variants()):
        if not variant.name.startswith(tuple(arguments.only)):
            continue
        try:
            result = report(variant, arch)
        except NoInlineInfoError as error:
            print(f"bench.sass: {error.__doc__} Use triton 3.9.", file=sys.stderr)
            sys.exit(NO_INLINE_INFO)
        print(json.dumps(asdict(result)) if arguments.json else result.row(), flush=True)


if __name__ == "__main__":
    main()
