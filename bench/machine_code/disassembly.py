"""Which instructions access tensors, and how many bytes of an element, by the disassembler."""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench.speed.bytes import Bytes
from cm_fused._backends.triton import kernels as triton_kernels
from cm_fused._backends.triton import scales as triton_scales


class Instruction(NamedTuple):
    """One instruction and the source lines it comes from, the innermost call's first.

    Those of the codes' file are negative, those of other files 0. `labels` stand before it, and
    a branch goes to the label `target`, always where it is not `guarded` by a predicate.
    """

    opcode: str
    lines: tuple[int, ...]
    guarded: bool = False
    labels: tuple[str, ...] = ()
    target: str | None = None

    @property
    def width(self) -> int:
        """The bits a thread loads or stores."""
        suffixes = [int(part) for part in self.opcode.split(".") if part.isdecimal()]
        return suffixes[0] if suffixes else _NARROW.get(self.opcode.split(".")[-1], 32)


_OF_SCALES = ("load_scales", "load_scales_of_slots", "store_scales")
_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")
_LABEL = re.compile(r"^(\.L\w+):")
# A second predicate may stand before the label that a branch goes to.
_TARGET = re.compile(r"(!?U?P\w+, )?`\((\.L\w+)\)")
_SIGNS = {
    Path(inspect.getfile(module)).name: sign
    for module, sign in ((triton_kernels, 1), (triton_scales, -1))
}
_LINE = re.compile(r'^\s*//## File "(.*?)", line (\d+)')


def instructions(listing: str) -> Iterator[Instruction]:
    """Yield the instructions of what `nvdisasm -gi` printed."""
    lines: list[int] = []
    labels: list[str] = []
    complete = False
    for text in listing.splitlines():
        line = _LINE.match(text)
        if line:
            if complete:
                lines, complete = [], False
            lines.append(_SIGNS.get(Path(line[1]).name, 0) * int(line[2]))
            continue
        label = _LABEL.match(text)
        if label:
            labels.append(label[1])
        instruction = _INSTRUCTION.match(text)
        if instruction:
            complete = True
            guard, opcode, operands = instruction.groups()
            target = _TARGET.match(operands) if opcode.split(".")[0] == "BRA" else None
            guarded = bool(guard or (target and target[1]))
            yield Instruction(
                opcode, tuple(lines), guarded, tuple(labels), target[2] if target else None
            )
            labels = []


@dataclass(frozen=True)
class SourceLines:
    """The lines of the kernels' source that decide what an access is.

    Attributes:
        full: The call for full chunks whose slots are aligned too.
        unaligned_slots: The call for full chunks whose slots alone are not.
        tail: The call for all others.
        param_store: The one store of each element's parameter.
        scales: The functions that access scales, a 64th of a byte an element, negative.
    """

    full: range
    unaligned_slots: range
    tail: range
    param_store: range
    scales: frozenset[int]


def _lines_of(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


@cache
def source_lines() -> SourceLines:
    """Find the lines in the kernels' source."""
    tree = ast.parse(inspect.getsource(triton_kernels))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [
        node
        for node in ast.walk(functions["critical_adam_kernel"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_update_chunk"
    ]
    by_form = {tuple(map(ast.unparse, call.args[-2:])): _lines_of(call) for call in calls}
    (store,) = [
        node
        for node in ast.walk(functions["_store_param"])
        if isinstance(node, ast.Call) and ast.unparse(node).startswith("tl.store(tensors.param ")
    ]
    scales = frozenset(
        -line
        for node in ast.parse(inspect.getsource(triton_scales)).body
        if isinstance(node, ast.FunctionDef) and node.name in _OF_SCALES
        for line in _lines_of(node)
    )
    return SourceLines(
        full=by_form["True", "True"],
        unaligned_slots=by_form["True", "False"],
        tail=by_form["False", "False"],
        param_store=_lines_of(store),
        scales=scales,
    )


def places_of(code: list[Instruction]) -> dict[str, int]:
    """Return before which instruction each label stands."""
    return {label: place for place, line in enumerate(code) for label in line.labels}


def loop_of(code: list[Instruction], call: range) -> range:
    """Return where one of the calls has its loop over the elements.

    It is the smallest loop around that call's stores of the parameter. Other instructions in it may
    be said to come from another call.
    """
    places = places_of(code)
    store = next(place for place, line in enumerate(code) if stores_param(line, call))
    loops = (
        range(places[line.target], place + 1)
        for place, line in enumerate(code)
        if line.target and places[line.target] <= place
    )
    return min((loop for loop in loops if store in loop), key=len)


def stores_param(instruction: Instruction, call: range) -> bool:
    """Return whether it stores a parameter's elements for one of the two calls."""
    return (
        instruction.opcode.startswith("STG")
        and instruction.lines[0] in source_lines().param_store
        and any(line in call for line in instruction.lines)
    )


def accesses(listing: str, call: range) -> list[Instruction]:
    """Return the accesses of tensors by one of the calls, in its loop over the elements.

    There are none where the variant does without the call.
    """
    code, scales = list(instructions(listing)), source_lines().scales
    if not any(stores_param(line, call) for line in code):
        return []
    return [
        code[place]
        for place in loop_of(code, call)
        if code[place].opcode.startswith(("LDG", "STG"))
        and not scales.intersection(code[place].lines)
    ]


def bytes_per_element(accesses: Iterable[Instruction], param_bytes: int) -> Bytes:
    """Count what is read and written for each parameter that is stored."""
    accesses = list(accesses)
    param_store = source_lines().param_store
    stores = [access for access in accesses if access.opcode.startswith("STG")]
    stored = sum(access.width for access in stores if access.lines[0] in param_store)
    elements = stored / 8 / param_bytes
    written = sum(access.width for access in stores) / 8
    read = sum(access.width for access in accesses) / 8 - written
    return Bytes(read / elements, written / elements)
