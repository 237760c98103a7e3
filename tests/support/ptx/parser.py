"""What PTX says: kernels of basic blocks of instructions. Unknown directives are errors."""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
# Debugging information is all that sections hold.
_SECTION = re.compile(
    r"\.section\s+\.debug_(?:abbrev|info|macinfo|str|loc|line|ranges)\s*\{[^}]*\}"
)
_FILE = re.compile(r'\.file\s+(\d+) "(?:.*/)?(.*)"')
_ENTRY = re.compile(r"(?:\.visible\s+)?\.entry\s+([\w$]+)\(([^)]*)\)([^{]*)(?=\{)")
_PARAM = re.compile(
    r"\.param(?: \.align (\d+))? \.[bsuf](\d+)(?: \.ptr[\w. ]*?)? ([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(r"(?:\.extern )?\.shared \.align (\d+) \.[bsuf](\d+) ([\w$]+)(?:\[(\d*)\])?;")
_LIMIT = re.compile(r"\.(?:reqntid \d+|maxntid \d+, 1, 1|maxnreg \d+|pragma \"nounroll\";)|")
# Directives of a module that say nothing about what is computed.
_MODULE = re.compile(
    r"\.(?:version \d+\.\d+|target sm_\d+a?|address_size 64|file .*|global \.align 1 \.b8 .*;)|"
)
_TOKEN = re.compile(
    r"\s*(?:(\$\w+):|\.loc\s+(\d+)\s+(\d+).*|([^;{}]*?(?:\{[^{};]*\}[^;{}]*)*;)|([{}]))"
)
_REGISTERS = re.compile(r"\.reg \.(?:(pred)|[bsuf](8|16|32|64)) +(.*);")
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+) )?(\w[\w.]*)(?: (.*))?;")


class PtxError(Exception):
    """PTX that is not understood, or a kernel that does what it must not."""


class Instruction(NamedTuple):
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


@dataclass
class Kernel:
    """An entry: its parameters as (offset, size), registers' types, shared variables and code."""

    name: str
    params: dict[str, tuple[int, int]] = field(default_factory=dict)
    param_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # pred or the bits, as b32
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # alignment, size
    blocks: list[Block] = field(default_factory=list)


def parse(text: str) -> dict[str, Kernel]:
    """Return a module's kernels by name."""
    text = _SECTION.sub("", re.sub(r"//.*", "", text))
    files = dict(_FILE.findall(text))
    shared: dict[str, tuple[int, int]] = {}
    kernels: dict[str, Kernel] = {}
    while entry := _ENTRY.search(text):
        _declare(text[: entry.start()], shared)
        kernel = kernels[entry[1]] = Kernel(entry[1], shared=dict(shared))
        _sign(kernel, entry[2], entry[3])
        text = _Body(kernel, files).read(text[entry.end() :])
    _declare(text, shared)
    return kernels


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def _declare(text: str, shared: dict[str, tuple[int, int]]) -> None:
    """Read what a module says outside of its kernels."""
    for line in _lines(text):
        if not _declares_shared(line, shared) and not _MODULE.fullmatch(line):
            raise PtxError(f"unknown directive: {line}")


def _declares_shared(text: str, shared: dict[str, tuple[int, int]]) -> bool:
    """Read a shared variable, if a text declares one; the launch says how large an empty [] is."""
    found = _SHARED.fullmatch(text)
    if found:
        count = int(found[4] or 0) if "[" in text else 1
        shared[found[3]] = int(found[1]), count * _BYTES[found[2]]
    return found is not None


def _sign(kernel: Kernel, params: str, limits: str) -> None:
    """Read a kernel's parameters and limits."""
    for text in _lines(params.replace("\n", " ").replace(",", "\n")):
        if found := _PARAM.fullmatch(text):
            size = _BYTES[found[2]] * int(found[4] or 1)
            align = int(found[1] or size)
            offset = -(-kernel.param_bytes // align) * align
            kernel.params[found[3]] = offset, size
            kernel.param_bytes = offset + size
        elif text:
            raise PtxError(f"unknown parameter of {kernel.name}: {text}")
    for text in _lines(limits):
        if not _LIMIT.fullmatch(text):
            raise PtxError(f"unknown directive of {kernel.name}: {text}")


class _Body:
    """Reads the body of a kernel."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self._kernel, self._files = kernel, files
        self._scopes: list[dict[str, str]] = []  # of each open brace: its registers' unique names
        self._line = ""
        self._open_block("entry")

    def read(self, text: str) -> str:
        """Read up to the brace that closes the body, and return what is behind it."""
        position = 0
        while not position or self._scopes:
            token = _TOKEN.match(text, position)
            if not token:
                raise PtxError(f"not understood in {self._kernel.name}: {text[position:][:80]!r}")
            position = token.end()
            label, file, line, statement, _ = token.groups()
            if label and not label.startswith("$L__tmp"):  # debugging information's, in blocks
                self._open_block(label)
            elif file:
                self._line = f"{self._files[file]}:{line}"
            elif statement:
                self._statement(" ".join(statement.split()))
            elif token[5] == "{":
                self._scopes.append({})
            elif token[5] == "}":
                self._scopes.pop()
        self._kernel.blocks = [block for block in self._kernel.blocks if block.instructions]
        return text[position:]

    def _open_block(self, label: str) -> None:
        self._kernel.blocks.append(Block(label))

    def _statement(self, text: str) -> None:
        if found := _REGISTERS.fullmatch(text):
            self._registers(found[1] or f"b{found[2]}", found[3])
        elif found := _INSTRUCTION.fullmatch(text):
            self._instruction(*found.groups())
        elif not _declares_shared(text, self._kernel.shared) and not _LIMIT.fullmatch(text):
            raise PtxError(f"unknown directive in {self._kernel.name}: {text}")

    def _registers(self, kind: str, names: str) -> None:
        for name in names.replace(" ", "").split(","):
            many = re.fullmatch(r"([%\w]+)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                # An inner scope's register hides an outer one's.
                unique = one if len(self._scopes) == 1 else f"{one}@{len(self._kernel.registers)}"
                self._scopes[-1][one] = unique
                self._kernel.registers[unique] = kind

    def _resolve(self, text: str) -> str:
        """Return a text with the unique names of its registers."""
        names = {name: unique for scope in self._scopes[1:] for name, unique in scope.items()}
        return re.sub(r"[%$\w]+", lambda name: names.get(name[0], name[0]), text) if names else text

    def _instruction(self, negated: str, guard: str, opcode: str, operands: str) -> None:
        # Between the parts of an address and of a vector there is nothing, so that commas separate.
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands or "")
        resolved = tuple(self._resolve(part.replace(" ", "")) for part in parts)
        block = self._kernel.blocks[-1]
        guard = self._resolve(guard or "")
        block.instructions.append(Instruction(opcode, resolved, guard, bool(negated), self._line))
        if opcode.startswith(("bra", "ret", "exit", "bar.")):
            self._open_block(f"{block.label}+")
