"""What PTX says: kernels of basic blocks of instructions. Unknown directives are errors."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_SECTIONS = ("abbrev", "info", "macinfo", "str", "loc", "line", "ranges")
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_STATEMENT = re.compile(r"[^;{}]*?(?:\{[^{};]*\}[^;{}]*)*;|[{}]")
_LABEL = re.compile(r"\s*(\$\w+):")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_SHARED = re.compile(r"(?:\.extern )?\.shared \.align (\d+) \.\w+ ([\w$]+)(?:\[(\d*)\])?;")
_REG = re.compile(r"\.reg \.(pred|[bsuf](?:8|16|32|64)) +(.*);")
_PARAM = re.compile(
    r"\.param(?: \.align (\d+))? \.([bsuf])(\d+)(?: \.ptr[\w. ]*?)? ([\w$]+)(?:\[(\d+)\])?"
)
_ENTRY = re.compile(r"(?:\.visible )?\.entry ([\w$]+)\(")
_LIMITS = re.compile(r"\.(?:reqntid \d+|maxntid \d+, 1, 1|maxnreg \d+|pragma \"nounroll\";)$")
# Directives of a module that say nothing about what is computed.
_MODULE = re.compile(
    r"\.(?:version \d+\.\d+|target sm_\d+a?|address_size 64|file\s.*|global \.align 1 \.b8 .*;)$"
)


class PtxError(Exception):
    """PTX that is not understood, or a kernel that does what it must not."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `@guard opcode operands`; `line` is the source's, as file:line."""

    opcode: str
    operands: tuple[str, ...]
    guard: str
    negated: bool
    line: str

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)} ({self.line})"


@dataclass
class Block:
    """A basic block: its last instruction alone may branch, end threads or wait at a barrier."""

    label: str
    instructions: list[Instruction] = field(default_factory=list)

    def __str__(self) -> str:
        lines = dict.fromkeys(instruction.line for instruction in self.instructions)
        return f"{self.label} ({', '.join(lines)})"


@dataclass
class Kernel:
    """An entry: parameters as (size, offset), registers' sizes (0: predicate), shared variables."""

    name: str
    params: dict[str, tuple[int, int]] = field(default_factory=dict)
    param_bytes: int = 0
    registers: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # alignment, size
    blocks: list[Block] = field(default_factory=list)


def parse(text: str) -> dict[str, Kernel]:
    """Return a module's kernels by name."""
    text = re.sub(r"//.*", "", text)
    shared: dict[str, tuple[int, int]] = {}
    files: dict[str, str] = {}
    kernels: dict[str, Kernel] = {}
    lines = iter(text.splitlines())
    for line in lines:
        stripped = " ".join(line.split())
        if entry := _ENTRY.match(stripped):
            kernel = kernels[entry[1]] = Kernel(entry[1], shared=dict(shared))
            _Body(kernel, files).read(_signature(kernel, lines), lines)
        elif found := _SHARED.fullmatch(stripped):
            shared[found[2]] = int(found[1]), _shared_size(stripped, found[3])
        elif stripped.startswith(".section"):
            _skip_section(stripped, lines)
        elif stripped and not _MODULE.fullmatch(stripped):
            raise PtxError(f"unknown directive: {stripped}")
        elif found := re.match(r'\.file (\d+) "(.*)"', stripped):
            files[found[1]] = found[2].rpartition("/")[2]
    # Triton names the files after the code.
    for kernel in kernels.values():
        for block in kernel.blocks:
            block.instructions = [_named(each, files) for each in block.instructions]
    return kernels


def _named(instruction: Instruction, files: dict[str, str]) -> Instruction:
    number, _, line = instruction.line.partition(":")
    name = f"{files[number]}:{line}" if line else ""
    return Instruction(
        instruction.opcode, instruction.operands, instruction.guard, instruction.negated, name
    )


def _shared_size(declaration: str, count: str | None) -> int:
    """Return a shared variable's bytes; 0 where the launch says how many."""
    found = re.search(r"\.[bsuf](\d+) ", declaration)
    assert found is not None
    return int(count or (0 if count == "" else 1)) * _SIZES[found[1]]


def _skip_section(line: str, lines: Iterator[str]) -> None:
    """Skip debugging information, which is all that sections hold."""
    found = re.match(r"\.section \.debug_(\w+)", line)
    if not found or found[1] not in _SECTIONS:
        raise PtxError(f"unknown section: {line}")
    while "}" not in line:
        line = next(lines)


def _signature(kernel: Kernel, lines: Iterator[str]) -> str:
    """Read the parameters and limits of an entry; return the line that opens its body."""
    for line in lines:
        stripped = " ".join(line.split())
        if found := _PARAM.fullmatch(stripped.rstrip(",")):
            size = _SIZES[found[3]] * int(found[5] or 1)
            align = int(found[1] or _SIZES[found[3]])
            offset = -(-kernel.param_bytes // align) * align
            kernel.params[found[4]] = size, offset
            kernel.param_bytes = offset + size
        elif stripped.startswith("{"):
            return stripped
        elif stripped not in ("", ")") and not _LIMITS.fullmatch(stripped):
            raise PtxError(f"unknown directive of {kernel.name}: {stripped}")
    raise PtxError(f"{kernel.name} has no body")


class _Body:
    """Reads the body of a kernel."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self._kernel = kernel
        self._scopes: list[dict[str, str]] = []  # of each open brace: its registers' unique names
        self._line = ""
        self._block = Block("entry")

    def read(self, line: str, lines: Iterator[str]) -> None:
        """Read all lines up to the brace that closes the body."""
        self._kernel.blocks.append(self._block)
        rest = line
        while True:
            rest = self._statements(rest)
            if not self._scopes:
                break
            rest += " " + next(lines)
        if rest.strip():
            raise PtxError(f"{self._kernel.name}: {rest.strip()!r} after the body")
        self._kernel.blocks = [block for block in self._kernel.blocks if block.instructions]

    def _statements(self, text: str) -> str:
        """Take all complete statements from a text, and return the rest."""
        while True:
            text = text.lstrip()
            if label := _LABEL.match(text):
                self._open_block(label[1])
                text = text[label.end() :]
            elif text.startswith(".loc"):
                found = _LOC.match(text)
                assert found is not None
                self._line = f"{found[1]}:{found[2]}"
                text = ""
            elif not (statement := _STATEMENT.match(text)):
                return text
            else:
                self._statement(" ".join(statement[0].split()))
                text = text[statement.end() :]
                if not self._scopes:
                    return text

    def _open_block(self, label: str) -> None:
        # The labels of debugging information are in the middle of blocks.
        if not label.startswith("$L__tmp"):
            self._block = Block(label)
            self._kernel.blocks.append(self._block)

    def _statement(self, text: str) -> None:
        if text == "{":
            self._scopes.append({})
        elif text == "}":
            self._scopes.pop()
        elif found := _REG.fullmatch(text):
            self._declare(found[1], found[2])
        elif found := _SHARED.fullmatch(text):
            self._kernel.shared[found[2]] = int(found[1]), _shared_size(text, found[3])
        elif text.startswith("."):
            if not _LIMITS.fullmatch(text):
                raise PtxError(f"unknown directive in {self._kernel.name}: {text}")
        else:
            self._instruction(text.rstrip("; "))

    def _declare(self, kind: str, names: str) -> None:
        size = 0 if kind == "pred" else _SIZES[kind[1:]]
        for name in names.replace(" ", "").split(","):
            many = re.fullmatch(r"([%\w]+)<(\d+)>", name)
            each = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for one in each:
                # An inner scope's register hides an outer one's.
                unique = one if len(self._scopes) == 1 else f"{one}@{len(self._kernel.registers)}"
                self._scopes[-1][one] = unique
                self._kernel.registers[unique] = size

    def _resolve(self, name: str) -> str:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), name)

    def _instruction(self, text: str) -> None:
        found = re.fullmatch(r"(?:@(!?)([%\w]+) )?([\w.]+)(?: (.*))?", text)
        if not found:
            raise PtxError(f"not understood in {self._kernel.name}: {text}")
        negated, guard, opcode, operands = found.groups()
        # Between the parts of an address and of a pair there is nothing, so that commas separate.
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands or "")
        resolved = tuple(
            re.sub(r"[%$\w]+", lambda name: self._resolve(name[0]), part.replace(" ", ""))
            for part in parts
        )
        instruction = Instruction(
            opcode, resolved, self._resolve(guard or ""), bool(negated), self._line
        )
        self._block.instructions.append(instruction)
        if opcode.startswith(("bra", "ret", "exit", "bar.")):
            self._open_block(f"{self._block.label}+")
