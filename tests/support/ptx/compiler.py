"""Turns a parsed kernel into Python functions, one for each instruction."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.support.ptx.arithmetic import UNSIGNED, Array, from_bfloat16
from tests.support.ptx.memory import Memory
from tests.support.ptx.operations import PAIRS, Operation, dtype_of, operation_of
from tests.support.ptx.parser import Block, Instruction, Kernel, PtxError

# Runs on a frame, of the threads of a mask, or of all where it is None.
Step = Callable[[Any, "Array | None"], None]
Arrays = list[Array]
# Reads an operand of registers' values or undefined bits.
Read = Callable[[dict[str, Array]], Array]
# Writes values and, if there are any, undefined bits.
Write = Callable[[Any, Arrays, "Array | None"], None]
# Returns an address for each thread.
Addresses = Callable[[Any, "Array | None"], Array]
# Logs an access, and returns the memory and the offsets of active threads.
Access = Callable[[Any, "Array | None"], tuple[Memory, Array]]
_ACCESS = re.compile(r"(ld|st)(?:\.(param|global|shared))?(?:\.v([24]))?\.([bsuf](?:8|16|32|64))")
_MATRICES = re.compile(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])\.shared\.b16")
_ADDRESS = re.compile(r"\[([%\w$@.]+)(?:\+(-?\d+))?\]")
_NUMBER = re.compile(r"0[fd]([0-9A-F]+)|(-?\d+|0x[0-9a-fA-F]+)U?")
_SPECIAL = ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x", "%laneid")


class CompiledBlock(NamedTuple):
    """The steps of a basic block; behind it threads go to `target`, those without guard to next.

    With `waits` they wait for all of their block before.
    """

    steps: list[Step]
    target: int
    guard: str = ""
    negated: bool = False
    waits: bool = False


class Compiled:
    """A kernel that can be run: a list of steps for each basic block."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.ran: Counter[int] = Counter()  # how often threads came to each basic block
        # The bytes that are the smallest access of a space.
        self.units = {"global": 8, "shared": 8, "param": 8}
        self._labels = {block.label: i for i, block in enumerate(kernel.blocks)}
        self._symbols = {name: offset for name, (offset, _) in kernel.params.items()}
        self.shared_bytes = 0
        for name, (align, size) in kernel.shared.items():
            self._symbols[name] = -(-self.shared_bytes // align) * align
            self.shared_bytes = self._symbols[name] + size
        self._kinds = {**kernel.registers, **dict.fromkeys(_SPECIAL, "b32")}
        # What registers are before a launch, literals among them.
        bits = {kind: np.full(1, -1).astype(dtype_of(kind)) for kind in self._kinds.values()}
        self.undefined = dict.fromkeys(kernel.registers, np.ones(1, bool))
        self.values = {name: bits[kind] for name, kind in kernel.registers.items()}
        _check_contraction(kernel)
        self.blocks = [self._block(i, block) for i, block in enumerate(kernel.blocks, 1)]

    def _block(self, after: int, block: Block) -> CompiledBlock:
        *steps, last = block.instructions
        target, waits = after, last.opcode == "bar.sync"
        if last.opcode in ("bra", "bra.uni"):
            target = self._labels[last.operands[0]]
        elif last.opcode in ("ret", "exit"):
            target = len(self.kernel.blocks)
        elif not waits:
            steps, last = block.instructions, last._replace(guard="")
        elif last.operands != ("0",) or last.guard:
            raise PtxError(f"unknown barrier: {last}")
        compiled = [self._guarded(each) for each in steps]
        return CompiledBlock(compiled, target, last.guard, last.negated, waits)

    def _guarded(self, instruction: Instruction) -> Step:
        """Return a step that runs an instruction where its guard holds, and names it in errors."""
        steps = self._steps(instruction)
        guard, negated = instruction.guard, instruction.negated

        def run(frame: Any, mask: Array | None) -> None:
            try:
                if guard:
                    mask = frame.holds(guard, negated, mask)
                    if not mask.any():
                        return
                    mask = None if mask.all() else mask
                for step in steps:
                    step(frame, mask)
            except PtxError as error:
                raise PtxError(f"{error}, in {instruction}") from None

        return run

    def _steps(self, instruction: Instruction) -> list[Step]:
        opcode, operands = instruction.opcode, instruction.operands
        if found := _ACCESS.fullmatch(opcode):
            return [self._access(instruction, found)]
        if found := _MATRICES.fullmatch(opcode):
            return self._matrices(instruction, found)
        if opcode.startswith(("shfl.", "redux.")):
            # They need the threads' numbers, and shfl may have a second result.
            first, _, second = operands[0].partition("|")
            more = (*operands[2:], "%laneid")
            finds = [self._operation(f"{opcode}|", (second, "0", *more))] if second else []
            takes = self._operation(opcode, (first, operands[1], *more))
            return [check_whole_warps, *finds, takes]
        return [self._operation(opcode, operands)]

    def _operation(self, opcode: str, operands: tuple[str, ...]) -> Step:
        operation = operation_of(opcode)
        types = list(operation.sources)
        sources = operands[1:]
        if types[-1].endswith("*"):
            types[-1] = types[-1][:-1]
            types += types[-1:] * (len(sources) - len(types))
        if len(types) != len(sources):
            raise PtxError(f"{len(types)} operands expected of {opcode} {', '.join(operands)}")
        widens = opcode.startswith("cvt.")
        kinds = [kind.lstrip("~!") for kind in types]
        reads = [self._reader(*each, widens) for each in zip(sources, kinds, strict=True)]
        write = self._writer(operands[0], operation.result, widens)
        registers = self._registers(sources)
        required = [each for each, kind in zip(sources, types, strict=True) if kind[0] == "!"]
        divides = opcode.startswith(("div.s", "div.u", "rem."))

        def step(frame: Any, mask: Array | None) -> None:
            values = [read(frame.values) for read in reads]
            if divides and ((values[1] == 0) & (True if mask is None else mask)).any():
                raise PtxError("division by zero")
            results = [operation.compute(*values)]
            if registers and frame.undefined_of(registers, mask):
                frame.require(self._registers(required), mask)
                bank = frame.undefined_bits(registers)
                results.append(_undefined(operation, types, values, [read(bank) for read in reads]))
            write(frame, results, mask)

        return step

    def _registers(self, operands: tuple[str, ...] | list[str]) -> list[str]:
        """Return the registers that are in operands."""
        names = ",".join(operands).replace("{", "").replace("}", "").split(",")
        return [name for name in names if name in self.kernel.registers]

    def _fits(self, register: str, kind: str, widens: bool) -> np.dtype[Any]:
        """Return a register's dtype; it has a type's size, or is wider where that may be."""
        if register not in self._kinds:
            raise PtxError(f"unknown register {register}")
        have, wanted = dtype_of(self._kinds[register]), dtype_of(kind)
        sizes = range(1, have.itemsize + 1) if widens else [have.itemsize]
        if wanted.itemsize not in sizes or (have.kind == "b") != (wanted.kind == "b"):
            raise PtxError(f"{register} of {have.itemsize} bytes as {kind}")
        return have

    def _reader(self, text: str, kind: str, widens: bool = False) -> Read:
        """Return what reads an operand as a type; one in braces is packed, bfloat16 widened."""
        dtype = dtype_of(kind)
        if kind == "bf16":
            bits = self._reader(text, "b16")
            return lambda bank: from_bfloat16(bits(bank))
        if text.startswith("{"):
            parts = text.strip("{}").split(",")
            part = f"b{8 * dtype.itemsize // len(parts)}"
            reads = [self._reader(each, part) for each in parts]
            return lambda bank: np.stack(
                np.broadcast_arrays(*[read(bank) for read in reads]), axis=1
            ).view(dtype)[:, 0]
        if text.startswith("%") or text in self._kinds:
            have = self._fits(text, kind, widens)
        else:
            value = self._literal(text, dtype)
            have, text = dtype, f"{text} {kind}"
            self.values[text] = np.array([value])
        zero = np.zeros(1, have)
        if have.itemsize == dtype.itemsize:
            return lambda bank: bank.get(text, zero).view(dtype)
        unsigned = UNSIGNED[dtype.itemsize]
        return lambda bank: bank.get(text, zero).astype(unsigned).view(dtype)

    def _literal(self, text: str, dtype: np.dtype[Any]) -> Any:
        width, number = 8 * dtype.itemsize, self._symbols.get(text)
        if number is None:
            found = _NUMBER.fullmatch(text)
            if not found or (found[1] and 4 * len(found[1]) != width):
                raise PtxError(f"unknown operand {text} as {dtype}")
            number = int(found[1] or found[2], 16 if found[1] else 0)
        if dtype.kind == "b":
            return bool(number)
        if not -(1 << (width - 1)) <= number < 1 << width:
            raise PtxError(f"{text} as {dtype}")
        return UNSIGNED[dtype.itemsize](number % (1 << width)).view(dtype)

    def _writer(self, text: str, kind: str, widens: bool = False) -> Write:
        """Return what writes an operand of a type; one in braces is unpacked, `_` takes nothing."""
        dtype = dtype_of(kind)
        if text == "_":
            return lambda frame, results, mask: None
        if text.startswith("{"):
            return self._unpacker(text.strip("{}").split(","), dtype)
        have = self._fits(text, kind, widens)

        def fitted(values: Array) -> Array:
            if have.itemsize == dtype.itemsize:
                return values.view(have)
            unsigned, signed = np.dtype(UNSIGNED[dtype.itemsize]), dtype.kind == "i"
            source, wide = (dtype, f"i{have.itemsize}") if signed else (unsigned, have)
            return values.view(source).astype(wide).view(have)

        return lambda frame, results, mask: frame.write(text, list(map(fitted, results)), mask)

    def _unpacker(self, parts: list[str], dtype: np.dtype[Any]) -> Write:
        part = f"b{8 * dtype.itemsize // len(parts)}"
        writes = [self._writer(each, part) for each in parts]

        def unpack(frame: Any, results: Arrays, mask: Array | None) -> None:
            each = [
                np.ascontiguousarray(values).view(dtype_of(part)).reshape(-1, len(parts))
                for values in results
            ]
            for i, write in enumerate(writes):
                write(frame, [np.ascontiguousarray(values[:, i]) for values in each], mask)

        return unpack

    def _access(self, instruction: Instruction, found: re.Match[str]) -> Step:
        """Return a step that loads or stores; an address of no space is global."""
        direction, space, vector, kind = found.groups()
        registers, address = instruction.operands[:: 1 if direction == "ld" else -1]
        space = space or "global"
        parts = _parts(registers, int(vector or 1))
        return self._transfer(instruction, space, kind, parts, self._addresses(address, space))

    def _addresses(self, text: str, space: str) -> Addresses:
        found = _ADDRESS.fullmatch(text)
        if not found:
            raise PtxError(f"unknown address {text}")
        kind = "u32" if space == "shared" else "u64"
        read, required = self._reader(found[1], kind), self._registers([found[1]])
        added = np.array([int(found[2] or 0)]).astype(dtype_of(kind))

        def addresses(frame: Any, mask: Array | None) -> Array:
            frame.require(required, mask)
            return (read(frame.values) + added).astype(np.uint64)

        return addresses

    def _transfer(
        self, instruction: Instruction, space: str, kind: str, parts: list[str], where: Addresses
    ) -> Step:
        """Return a step that loads or stores neighbours of a type."""
        size = dtype_of(kind).itemsize
        self.units[space] = min(self.units[space], size)
        total = size * len(parts)

        def access(frame: Any, mask: Array | None) -> tuple[Memory, Array]:
            memory = frame.memories[space]
            return memory, memory.access(instruction, where(frame, mask), total, frame, mask)

        if instruction.opcode.startswith("ld"):
            return _load(access, size, [self._writer(part, kind, widens=True) for part in parts])
        reads = [self._reader(part, kind, widens=True) for part in parts]
        return _store(access, size, reads, self._registers(parts))

    def _matrices(self, instruction: Instruction, found: re.Match[str]) -> list[Step]:
        """Return steps in which each warp loads or stores 8 rows of 16 bytes for each register.

        Of register i four neighbours have a row's parts, and thread 8 i + row has its address.
        """
        registers, address = instruction.operands[:: 1 if found[1] == "ld" else -1]
        given = self._addresses(address, "shared")

        def addresses_of(i: int) -> Addresses:
            def addresses(frame: Any, mask: Array | None) -> Array:
                lanes = frame.values["%laneid"].astype(np.int64)
                every = np.broadcast_to(given(frame, mask), len(lanes))
                rows = every[np.arange(len(lanes)) - lanes + 8 * i + lanes // 4]
                if (rows % np.uint64(16))[slice(None) if mask is None else mask].any():
                    raise PtxError("not aligned to 16 bytes")
                return rows + (4 * (lanes % 4)).astype(np.uint64)

            return addresses

        steps = [
            self._transfer(instruction, "shared", "b32", [part], addresses_of(i))
            for i, part in enumerate(_parts(registers, int(found[2])))
        ]
        return [check_whole_warps, *steps]


def _undefined(operation: Operation, types: list[str], values: Arrays, bits: Arrays) -> Array:
    """Return a result's undefined bits: those that move with it, or all of them."""
    if operation.function in (np.bitwise_and, np.bitwise_or):
        return _undefined_logic(operation, values, bits)
    if operation.function in PAIRS.values():
        return _undefined_pairs(bits)
    moved, spoiled = [], np.zeros(1, bool)
    for kind, value, each in zip(types, values, bits, strict=True):
        moved.append(each if kind[0] == "~" else value)
        if kind[0] != "~":
            spoiled = spoiled | (each.view(UNSIGNED[each.itemsize]) != 0)
    dtype = dtype_of(operation.result)
    unsigned = dtype if dtype.kind == "b" else np.dtype(UNSIGNED[dtype.itemsize])
    result = operation.compute(*moved).view(unsigned) if types[0][0] == "~" else unsigned.type(0)
    return np.where(spoiled, np.full(1, -1).astype(unsigned), result)


def _undefined_pairs(bits: Arrays) -> Array:
    """Return the undefined bits of two float32 results, each of its own operands."""
    spoiled = (bits[0] | bits[1]).view(np.uint32) != 0
    return np.where(spoiled, -1, 0).astype(np.int32).view(np.uint64)


def _undefined_logic(operation: Operation, values: Arrays, bits: Arrays) -> Array:
    """Return the undefined bits of "and" or "or": a written 0, or 1, decides by itself."""
    a, b = values if operation.function is np.bitwise_and else [~value for value in values]
    return np.asarray(bits[0] & (b | bits[1]) | bits[1] & (a | bits[0]))


def _parts(text: str, count: int) -> list[str]:
    """Return the parts of a vector, or one operand."""
    parts = text.strip("{}").split(",")
    if len(parts) != count:
        raise PtxError(f"{count} registers expected, got {text}")
    return parts


def _check_contraction(kernel: Kernel) -> None:
    """Raise where a product may be contracted into a sum: where neither says how it is rounded."""
    instructions = [each for block in kernel.blocks for each in block.instructions]
    products = {each.operands[0] for each in instructions if each.opcode in ("mul.f32", "mul.f64")}
    for each in instructions:
        if re.fullmatch(r"(add|sub)\.f(32|64)", each.opcode) and products & {*each.operands[1:]}:
            raise PtxError(f"may be contracted: {each}")


def check_whole_warps(_: Any, mask: Array | None) -> None:
    """Raise where a part of a warp executes what all of it has to execute together."""
    if mask is not None and np.diff(mask.reshape(-1, 32), axis=1).any():
        raise PtxError("executed by a part of a warp")


def _load(access: Access, size: int, writes: list[Write]) -> Step:
    def load(frame: Any, mask: Array | None) -> None:
        memory, offsets = access(frame, mask)
        for i, write in enumerate(writes):
            values = memory.load(offsets + i * size, size)
            if mask is not None and len(values) > 1:
                every = np.zeros(len(mask), values.dtype)
                every[mask], values = values, every
            write(frame, [values], mask)

    return load


def _store(access: Access, size: int, reads: list[Read], registers: list[str]) -> Step:
    def store(frame: Any, mask: Array | None) -> None:
        memory, offsets = access(frame, mask)
        active = slice(None) if mask is None else mask
        banks = [frame.values]
        if frame.undefined_of(registers, mask):
            banks.append(frame.undefined_bits(registers))
        for i, read in enumerate(reads):
            values, *undefined = (
                np.broadcast_to(read(bank).view(UNSIGNED[size]), len(frame.threads))[active]
                for bank in banks
            )
            if any(bits.any() for bits in undefined):
                raise PtxError("what is stored is not written")
            memory.store(offsets + i * size, values)

    return store
