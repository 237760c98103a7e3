"""Turns a parsed kernel into Python functions, one for each instruction."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import UNSIGNED, Array
from tests.support.ptx.memory import Span, gather, scatter
from tests.support.ptx.operations import dtype_of, operation_of
from tests.support.ptx.parser import Instruction, Kernel, PtxError

Step = Callable[[Any, "Array | None"], None]
Read = Callable[[Any, "Array | None"], Array]
_ACCESS = re.compile(r"(ld|st)(?:\.(param|global|shared))?(?:\.v([24]))?\.([bsuf](?:8|16|32|64))")
_SHUFFLE = re.compile(r"shfl\.sync\.(bfly|down|idx)\.b32")
_REDUX = re.compile(r"redux\.sync\.(min|max)\.([su]32|f32)")
_MOVE = re.compile(r"mov\.(pred|[bsuf](?:16|32|64))")
_MATRICES = re.compile(r"stmatrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
_ADDRESS = re.compile(r"\[([%\w$@]+)(?:\+(-?\d+))?\]")
_ALL_LANES = "-1"


class Branch(NamedTuple):
    """Threads for which a guard holds go to a basic block, or end where there is none."""

    guard: str
    negated: bool
    target: int | None


class Wait(NamedTuple):
    """Threads wait for all of their block."""


@dataclass
class CompiledBlock:
    """The steps of a basic block, and where its threads go; to the next one where `end` is None."""

    steps: list[Step]
    end: Branch | Wait | None


class Compiled:
    """A kernel that can be run: a list of steps for each basic block."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ran: Counter[int] = Counter()  # how often threads came to each basic block
        self._labels = {block.label: i for i, block in enumerate(kernel.blocks)}
        self._symbols: dict[str, int] = {}
        self.shared_bytes = 0
        for name, (align, size) in kernel.shared.items():
            self._symbols[name] = -(-self.shared_bytes // align) * align
            self.shared_bytes = self._symbols[name] + size
        # The bytes that are the smallest access of a space.
        self.units = {"global": 8, "shared": 8}
        _check_contraction(kernel)
        self.blocks = [self._block(block.instructions) for block in kernel.blocks]

    def _block(self, instructions: list[Instruction]) -> CompiledBlock:
        end: Branch | Wait | None = None
        last = instructions[-1]
        if last.opcode in ("bra", "bra.uni"):
            end = Branch(last.guard, last.negated, self._labels[last.operands[0]])
        elif last.opcode in ("ret", "exit"):
            end = Branch(last.guard, last.negated, None)
        elif last.opcode.startswith("bar."):
            if last.opcode != "bar.sync" or last.operands != ("0",) or last.guard:
                raise PtxError(f"unknown barrier: {last}")
            end = Wait()
        body = instructions if end is None else instructions[:-1]
        return CompiledBlock([self._guarded(instruction) for instruction in body], end)

    def _guarded(self, instruction: Instruction) -> Step:
        """Return a step that runs an instruction where its guard holds, and names it in errors."""
        step = self._step(instruction)
        guard, negated = instruction.guard, instruction.negated

        def run(frame: Any, mask: Array | None) -> None:
            try:
                if guard:
                    chosen = frame.read(guard, mask)
                    chosen = ~chosen if negated else chosen
                    mask = chosen if mask is None else chosen & mask
                    if not mask.any():
                        return
                step(frame, mask)
            except PtxError as error:
                raise PtxError(f"{error}, in {instruction}") from None

        return run

    def _step(self, instruction: Instruction) -> Step:
        opcode = instruction.opcode
        if found := _ACCESS.fullmatch(opcode):
            return self._access(instruction, *found.groups())
        if found := _SHUFFLE.fullmatch(opcode):
            return self._shuffle(instruction, found[1])
        if found := _REDUX.fullmatch(opcode):
            return self._reduce(instruction, found[1], found[2])
        if found := _MATRICES.fullmatch(opcode):
            return self._store_matrices(instruction, int(found[1]))
        if found := _MOVE.fullmatch(opcode):
            return self._move(instruction, found[1])
        return self._operation(instruction)

    def _operation(self, instruction: Instruction) -> Step:
        operation = operation_of(instruction.opcode)
        target, *sources = instruction.operands
        more = len(sources) - len(operation.operands)
        if not 0 <= more <= operation.more:
            raise PtxError(f"{len(operation.operands)} operands expected: {instruction}")
        pairs = list(
            zip(sources, (*operation.operands, *operation.operands[-1:] * more), strict=True)
        )
        if instruction.opcode == "prmt.b32":
            reads = [self._part_reader(source, kind) for source, kind in pairs]
        else:
            reads = [self._reader(source, kind, operation.widens) for source, kind in pairs]
        write = self._writer(target, operation.result, operation.widens)
        function = operation.function
        divides = re.match(r"(?:div|rem)\.[su]", instruction.opcode)

        def step(frame: Any, mask: Array | None) -> None:
            values = [read(frame, mask) for read in reads]
            if divides and ((values[1] == 0) & (True if mask is None else mask)).any():
                raise PtxError("division by zero")
            write(frame, function(*values), mask)

        return step

    def _size_of(self, register: str) -> int:
        if register not in self.kernel.registers:
            raise PtxError(f"unknown register {register}")
        return self.kernel.registers[register]

    def _reader(self, text: str, kind: str, widens: bool = False) -> Read:
        """Return what reads an operand as a type."""
        dtype = dtype_of(kind)
        if text in self.kernel.registers:
            size = self._size_of(text)
            _check_size(text, size, kind, widens)
            if size == 0:
                return lambda frame, mask: frame.read(text, mask)
            if size == dtype.itemsize:
                return lambda frame, mask: frame.read(text, mask).view(dtype)
            unsigned = UNSIGNED[dtype.itemsize]
            return lambda frame, mask: frame.read(text, mask).astype(unsigned).view(dtype)
        if text.startswith("%"):
            _check_size(text, 4, kind, False)
            return lambda frame, mask: frame.special[text].view(dtype)
        value = np.array([self._literal(text, dtype)])
        return lambda frame, mask: value

    def _literal(self, text: str, dtype: np.dtype[Any]) -> Any:
        if found := re.fullmatch(r"0([fd])([0-9A-F]+)", text):
            bits: Any = UNSIGNED[4 if found[1] == "f" else 8](int(found[2], 16))
            if bits.itemsize != dtype.itemsize:
                raise PtxError(f"{text} as {dtype}")
            return bits.view(dtype)
        number = self._symbols.get(text)
        if number is None:
            if not re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+U?", text):
                raise PtxError(f"unknown operand {text}")
            number = int(text.rstrip("U"), 16 if text.startswith("0x") else 10)
        if dtype.kind == "b":
            return bool(number)
        width = 8 * dtype.itemsize
        if not -(1 << (width - 1)) <= number < 1 << width:
            raise PtxError(f"{text} as {dtype}")
        value: Any = UNSIGNED[dtype.itemsize](number % (1 << width))
        return value.view(dtype)

    def _writer(self, register: str, kind: str, widens: bool = False) -> Any:
        """Return what writes values of a type to a register; `_` takes nothing."""
        if register == "_":
            return lambda frame, values, mask: None
        size = self._size_of(register)
        _check_size(register, size, kind, widens)
        if size == 0:
            return lambda frame, values, mask: frame.write(register, values, mask)
        unsigned = UNSIGNED[size]
        dtype = dtype_of(kind)
        wide = np.dtype(f"int{8 * size}" if kind[0] == "s" else f"uint{8 * size}")
        if size == dtype.itemsize:
            return lambda frame, values, mask: frame.write(register, values.view(unsigned), mask)
        return lambda frame, values, mask: frame.write(
            register, values.view(dtype).astype(wide).view(unsigned), mask
        )

    def _move(self, instruction: Instruction, kind: str) -> Step:
        """Return a step that moves, packs or unpacks."""
        target, source = instruction.operands
        if source.startswith("{"):
            return self._pack(target, _parts(source), kind)
        read = self._reader(source, kind)
        if not target.startswith("{"):
            write = self._writer(target, kind)
            return lambda frame, mask: write(frame, read(frame, mask), mask)
        parts = _parts(target)
        part = f"b{8 * dtype_of(kind).itemsize // len(parts)}"
        writes = [self._writer(each, part) for each in parts]
        dtype = dtype_of(part)

        def unpack(frame: Any, mask: Array | None) -> None:
            values = np.ascontiguousarray(read(frame, mask)).view(dtype).reshape(-1, len(parts))
            for i, write in enumerate(writes):
                write(frame, np.ascontiguousarray(values[:, i]), mask)

        return unpack

    def _pack(self, target: str, parts: list[str], kind: str) -> Step:
        dtype = dtype_of(kind)
        part = f"b{8 * dtype.itemsize // len(parts)}"
        reads = [self._part_reader(each, part) for each in parts]
        write = self._writer(target, kind)

        def pack(frame: Any, mask: Array | None) -> None:
            values = np.broadcast_arrays(*[read(frame, mask) for read in reads])
            write(frame, np.stack(values, axis=1).view(dtype)[:, 0], mask)

        return pack

    def _part_reader(self, text: str, kind: str) -> Read:
        """Return what reads a part of a pair or of what bytes are chosen from.

        The compiler leaves out what nothing depends on; it is read as what shows where it is used.
        """
        read = self._reader(text, kind)
        poison = np.array([0xDEADBEEF]).astype(dtype_of(kind))
        return lambda frame, mask: (
            poison
            if text in self.kernel.registers and text not in frame.registers
            else read(frame, mask)
        )

    def _shuffle(self, instruction: Instruction, how: str) -> Step:
        target, source, lane, clamp, members = instruction.operands
        value, other = self._reader(source, "b32"), self._reader(lane, "u32")
        checks = [self._reader(text, "s32") for text in (clamp, members)]
        register, _, found = target.partition("|")
        write = self._writer(register, "b32")
        write_found = self._writer(found or "_", "pred")

        def step(frame: Any, mask: Array | None) -> None:
            check_whole_warps(mask)
            if any(
                (read(frame, mask) != n).any() for read, n in zip(checks, (31, -1), strict=True)
            ):
                raise PtxError("a shuffle of a part of a warp is not known")
            own = frame.special["%laneid"].astype(np.int64)
            count = other(frame, mask).astype(np.int64)
            lanes = {"bfly": own ^ count, "down": own + count, "idx": own * 0 + (count & 31)}[how]
            valid = lanes < 32
            places = np.arange(frame.num_threads) - own + np.where(valid, lanes, own)
            # The read checks all lanes: one from which another takes is active too.
            values = value(frame, mask)
            shuffled = np.broadcast_to(values, frame.num_threads)[places]
            write(frame, shuffled, mask)
            write_found(frame, valid, mask)

        return step

    def _reduce(self, instruction: Instruction, name: str, kind: str) -> Step:
        target, source, members = instruction.operands
        operation = operation_of(f"{name}.{kind}").function
        value, member = self._reader(source, kind), self._reader(members, "s32")
        write = self._writer(target, kind)

        def step(frame: Any, mask: Array | None) -> None:
            check_whole_warps(mask)
            if (member(frame, mask) != -1).any():
                raise PtxError("a reduction of a part of a warp is not known")
            values = np.broadcast_to(value(frame, mask), frame.num_threads)
            while len(values) > frame.num_threads // 32:
                values = operation(*(np.ascontiguousarray(values[i::2]) for i in (0, 1)))
            write(frame, np.repeat(values, 32), mask)

        return step

    def _access(
        self, instruction: Instruction, kind: str, space: str | None, vector: str | None, type_: str
    ) -> Step:
        """Return a step that loads or stores; an address of no space is global."""
        first, second = instruction.operands[:: 1 if kind == "ld" else -1]
        parts = _parts(first) if first.startswith("{") else [first]
        if len(parts) != int(vector or 1):
            raise PtxError(f"{vector or 1} registers expected: {instruction}")
        address = _ADDRESS.fullmatch(second)
        if not address:
            raise PtxError(f"unknown address {second}")
        if space == "param":
            return self._load_param(parts[0], address[1], int(address[2] or 0), type_)
        size = dtype_of(type_).itemsize
        where = self._addresses(address[1], int(address[2] or 0), space or "global")
        space = space or "global"
        self.units[space] = min(self.units[space], size)
        log = _accessed(instruction, space, size, len(parts), where)
        if kind == "ld":
            writes = [self._writer(part, type_, widens=True) for part in parts]
            return _load(space, size, log, writes)
        return _store(space, log, [self._reader(part, type_, widens=True) for part in parts])

    def _store_matrices(self, instruction: Instruction, count: int) -> Step:
        """Return a step in which each warp stores 8 rows of 16 bytes for each of its registers.

        Of register i four neighbours have a row's parts, and thread 8 i + row has its address.
        """
        target, source = instruction.operands
        address = _ADDRESS.fullmatch(target)
        parts = _parts(source)
        if not address or len(parts) != count:
            raise PtxError(f"not understood: {instruction}")
        where = self._addresses(address[1], int(address[2] or 0), "shared")
        self.units["shared"] = min(self.units["shared"], 4)

        def addresses_of(i: int) -> Read:
            def addresses(frame: Any, mask: Array | None) -> Array:
                rows = where(frame, mask)
                lanes = frame.special["%laneid"].astype(np.int64)
                given = (lanes // 8 == i) & (True if mask is None else mask)
                if (rows[given] % 16).any():
                    raise PtxError("not aligned to 16 bytes")
                row = np.arange(frame.num_threads) - lanes + 8 * i + lanes // 4
                parts_of_rows: Array = rows[row] + (4 * (lanes % 4)).astype(np.uint32)
                return parts_of_rows

            return addresses

        stores = [
            _store("shared", _accessed(instruction, "shared", 4, 1, addresses_of(i)), [read])
            for i, read in enumerate(self._reader(part, "b32") for part in parts)
        ]

        def step(frame: Any, mask: Array | None) -> None:
            check_whole_warps(mask)
            for store in stores:
                store(frame, mask)

        return step

    def _addresses(self, base: str, offset: int, space: str) -> Read:
        kind = "u64" if space == "global" else "u32"
        read = self._reader(base, kind)
        added = np.array([offset]).astype(dtype_of(kind))
        return lambda frame, mask: np.broadcast_to(read(frame, mask) + added, frame.num_threads)

    def _load_param(self, target: str, name: str, offset: int, type_: str) -> Step:
        if name not in self.kernel.params:
            raise PtxError(f"unknown parameter {name}")
        size, begin = self.kernel.params[name]
        dtype = dtype_of(type_)
        if not 0 <= offset <= size - dtype.itemsize or (begin + offset) % dtype.itemsize:
            raise PtxError(f"{name}+{offset} is not a {type_}")
        write = self._writer(target, type_, widens=True)

        def step(frame: Any, mask: Array | None) -> None:
            begin_at = begin + offset
            write(frame, frame.params[begin_at : begin_at + dtype.itemsize].view(dtype), mask)

        return step


def _check_size(register: str, size: int, kind: str, widens: bool) -> None:
    wanted = 0 if kind == "pred" else dtype_of(kind).itemsize
    if size != wanted and not (widens and size > wanted and wanted):
        raise PtxError(f"{register} of {size} bytes as {kind}")


def _check_contraction(kernel: Kernel) -> None:
    """Raise where a product may be contracted into a sum: where neither says how it is rounded."""
    instructions = [each for block in kernel.blocks for each in block.instructions]
    products = {each.operands[0] for each in instructions if each.opcode in ("mul.f32", "mul.f64")}
    for each in instructions:
        if re.fullmatch(r"(add|sub)\.f(32|64)", each.opcode) and products & {*each.operands[1:]}:
            raise PtxError(f"may be contracted: {each}")


def check_whole_warps(mask: Array | None) -> None:
    """Raise where a part of a warp executes what all of it has to execute together."""
    if mask is not None:
        warps = mask.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise PtxError("executed by a part of a warp")


def _parts(text: str) -> list[str]:
    return text.strip("{}").split(",")


def _accessed(
    instruction: Instruction, space: str, size: int, count: int, addresses: Read
) -> Callable[[Any, "Array | None"], Span]:
    """Return what checks and logs an instruction's access, and returns its bytes."""
    writes = instruction.opcode.startswith("st")
    total = size * count

    def accessed(frame: Any, mask: Array | None) -> Span:
        every = addresses(frame, mask)
        at, threads, blocks = (
            each if mask is None else each[mask] for each in (every, frame.threads, frame.blocks)
        )
        if (at % at.dtype.type(total)).any():
            raise PtxError(f"not aligned to {total} bytes")
        if space == "global":
            offsets = frame.memory.offsets(at, total)
        else:
            if (at.astype(np.int64) + total > frame.shared_bytes).any():
                raise PtxError(f"out of the {frame.shared_bytes} bytes of shared memory")
            offsets = blocks * frame.shared_stride + at
        span = Span(offsets, total, threads)
        frame.logs[space].add(instruction, writes, span, frame.phases[blocks])
        if writes and space == "global":
            frame.memory.check_writable(span)
        return span

    return accessed


def _load(space: str, size: int, accessed: Any, writes: list[Any]) -> Step:
    def step(frame: Any, mask: Array | None) -> None:
        span = accessed(frame, mask)
        memory = frame.memory.bytes
        if space == "shared":
            memory = frame.shared
            for i in range(span.size):
                if not frame.shared_written[span.offsets + i].all():
                    raise PtxError("shared memory is read but not written")
        for i, write in enumerate(writes):
            values = gather(memory, span.offsets + i * size, size)
            if mask is not None:
                every = np.zeros(frame.num_threads, values.dtype)
                every[mask] = values
                values = every
            write(frame, values, mask)

    return step


def _store(space: str, accessed: Any, reads: list[Read]) -> Step:
    def step(frame: Any, mask: Array | None) -> None:
        span = accessed(frame, mask)
        memory = frame.memory.bytes if space == "global" else frame.shared
        for i, read in enumerate(reads):
            values = read(frame, mask)
            values = values.view(UNSIGNED[values.itemsize])
            values = np.broadcast_to(values, frame.num_threads)
            scatter(
                memory,
                span.offsets + i * values.itemsize,
                values if mask is None else values[mask],
            )
        if space == "shared":
            for i in range(span.size):
                frame.shared_written[span.offsets + i] = True

    return step
