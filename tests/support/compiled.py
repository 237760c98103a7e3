"""Compiled kernels on CPU tensors: the tasks of a process that does not interpret kernels.

    env -u TRITON_INTERPRET python -m tests.support.compiled --arch 90

reads tasks from its input, a JSON list [name, argument, ...] on each line, and answers each with a
line: [result, error]. `tests.support.worker` is the other side.
"""

import argparse
import ast
import contextlib
import gc
import json
import struct
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from cm_fused._backends.triton import kernels, launch, tables
from cm_fused._backends.triton import norms as triton_norms
from cm_fused._backends.triton import priorities as triton_priorities
from cm_fused._state.table import KEYS
from tests.support import frozen
from tests.support.cases import ROOT
from tests.support.compiled_cases import CASES, MUTATED_CASES
from tests.support.mutants import Recorder, is_noticed, mutants
from tests.support.priority_rows import Rows
from tests.support.ptx.driver import Driver, allocation
from tests.support.ptx.machine import Launch
from tests.support.ptx.memory import Allocation
from tests.support.ptx.parser import PtxError
from tests.support.same_bits import check_bits, run

# What each kernel may write, by the names of arguments and of the table's columns.
_PRIORITIES = {"priorities", "pending_slot", "step", "filled"}
_WRITABLE = {
    "critical_adam_kernel": {"param", *KEYS, "chunk_sq_norms_ptr"} - _PRIORITIES,
    "sq_norm_kernel": {"chunk_sq_norms_ptr"},
    "tensor_sq_norms_kernel": {"sq_norms_ptr"},
    "update_priorities_kernel": _PRIORITIES,
    "count_steps_kernel": {"step"},
    "update_group_kernel": _PRIORITIES,
    "update_tensors_kernel": _PRIORITIES,
}
_NVCC = ("nvcc", "-ptx", "-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_CUDA_THREADS = 256


class Process:
    """This process's stand-in driver, and what its kernels may access."""

    def __init__(self, arch: int) -> None:
        self.driver = Driver(arch, self._allocations)
        self._arch = arch
        # By the address of a table: the tensors it names, by its columns.
        self._tables: dict[int, dict[str, list[Tensor]]] = {}
        self._install()

    def _install(self) -> None:
        """Let Triton's backend take CPU tensors as a GPU's."""
        self.driver.activate()
        register, refresh = self.register, tables.Tables.refresh

        def refresh_and_register(
            self: Any, params: list[Tensor], grads: list[Tensor]
        ) -> Tensor | None:
            table = refresh(self, params, grads)
            if table is not None:
                # The slots of critical gradients and the filled ones.
                scratch = [] if self._scratch is None else [self._scratch]
                state = {**self._bucket.state, "filled": scratch}
                register(table, {"param": params, "grad": grads, **state})
            return table

        replaced: tuple[tuple[Any, str, Any], ...] = (
            (tables.Tables, "refresh", refresh_and_register),
            (launch, "_compiles_ptx", lambda device: True),
            (launch, "unavailable_reason", lambda device: None),
            (triton_priorities, "priority_kernel", lambda device: "Triton"),
        )
        for owner, name, value in replaced:
            setattr(owner, name, value)
        self.update_in_triton = triton_priorities.update_priorities_of_table_

    def use_priority_kernel(self, name: str) -> None:
        """Update priorities by Triton's kernel or by the one that nvcc compiles, "CUDA"."""
        kernels = {"Triton": self.update_in_triton, "CUDA": self.update_in_cuda}
        setattr(triton_priorities, "update_priorities_of_table_", kernels[name])  # noqa: B010

    def register(self, table: Tensor, named: dict[str, list[Tensor]]) -> None:
        """Let kernels access what a table names, by its columns."""
        self._tables[table.data_ptr()] = {key: list(tensors) for key, tensors in named.items()}

    def _allocations(self, kernel: str, arguments: dict[str, Tensor]) -> list[Allocation]:
        """Return what a launch may access: its arguments and what its table names."""
        named = self._tables[arguments["table_ptr"].data_ptr()]
        pairs = [(key, tensor) for key, tensors in named.items() for tensor in tensors]
        return [
            allocation(tensor, key in _WRITABLE[kernel])
            for key, tensor in (*pairs, *arguments.items())
        ]

    def clear(self) -> None:
        """Forget the tensors of tasks before."""
        self._tables.clear()

    @cache  # noqa: B019
    def _cuda_ptx(self) -> str:
        with tempfile.TemporaryDirectory() as directory:
            result = Path(directory) / "kernel.ptx"
            includes = (flag for path in include_paths() for flag in ("-isystem", path))
            source = ROOT / "csrc" / "cuda" / "update_priorities.cu"
            command = [*_NVCC, f"-arch=sm_{self._arch}", *includes]
            subprocess.run([*command, str(source), "-o", str(result)], check=True)
            return result.read_text()

    def update_in_cuda(
        self,
        table: Tensor,
        chunk_sq_norms: Tensor,
        sq_norm: Tensor | None,
        found_inf: Tensor | None,
        *,
        capacity: int,
        priority_decay: float,
        group_scope: bool,
        calls: object = None,
    ) -> None:
        """Launch the CUDA kernel as csrc/cuda/update_priorities.cu does."""
        if not len(table):
            return
        sums_rows = not group_scope and sq_norm is None
        name = "update_tensors_kernel" if sums_rows else "update_group_kernel"
        rows = len(table)
        for_each_row = sq_norm is not None and sq_norm.numel() != 1
        addresses = [0 if each is None else each.data_ptr() for each in (sq_norm, found_inf)]
        params = struct.pack(
            "<8qf4x",
            *(table.data_ptr(), rows, chunk_sq_norms.data_ptr(), len(chunk_sq_norms)),
            *(addresses[0], int(for_each_row), addresses[1], capacity, priority_decay),
        )
        grid = rows if sums_rows else -(-rows // _CUDA_THREADS)
        tensors = {"table_ptr": table, "chunk_sq_norms_ptr": chunk_sq_norms}
        given = {"sq_norm_ptr": sq_norm, "found_inf_ptr": found_inf}
        tensors.update({key: value for key, value in given.items() if value is not None})
        program = self.driver.program(self._cuda_ptx(), name)
        self.driver.launch(program, Launch(grid, _CUDA_THREADS, params), name, tensors)


# Tasks


def same_bits(process: Process, name: str, kernel: str) -> None:
    """Run a case of `CASES`, with priorities from a kernel, beside the C++ step."""
    process.use_priority_kernel(kernel)
    run(CASES[name])


def same_as_stored(process: Process, name: str) -> list[str]:
    """Return the parts whose bits are not those of the interpreted kernels."""
    process.use_priority_kernel("Triton")
    (case,) = (case for case in frozen.CASES if str(case) == name)
    actual = frozen.Run(case, "triton").hashes()
    expected = frozen.stored()["bits"]["triton"][name]
    parts = zip(frozen.PARTS, actual, expected, strict=True)
    return [part for part, ours, theirs in parts if ours != theirs]


def priorities(
    process: Process, kernel: str, num_chunks: list[int], capacity: int, group_scope: bool
) -> None:
    """Update priorities in every way by a compiled kernel and by C++, and compare all bits."""
    update = {"Triton": process.update_in_triton, "CUDA": process.update_in_cuda}[kernel]
    for filled in (False, True):
        rows = [Rows(num_chunks, capacity, each, filled=filled) for each in (update, "operator")]
        process.register(rows[0].table, {key: [each] for key, each in rows[0].named().items()})
        for norms, sq_norm, found_inf in _updates(num_chunks, capacity):
            for each in rows:
                options = {"capacity": capacity, "priority_decay": 0.7, "group_scope": group_scope}
                each.update(norms, sq_norm, found_inf, **options)
            actual, expected = (iter(each.named().items()) for each in rows)
            check_bits(actual, expected)


def _updates(
    num_chunks: list[int], capacity: int
) -> Iterator[tuple[list[float], float | list[float] | None, float | None]]:
    """Yield chunks' norms, given norms and found_inf: keys that fill, tie, and are not finite."""
    count = sum(num_chunks)
    # Sums of whole numbers do not depend on their order.
    several = ((1.0, 4.0, 9.0), (1.0,), (1e300, 1.0), (torch.inf, 4.0), (torch.nan, 1.0))
    for turn, values in enumerate(several):
        norms = [values[i % len(values)] for i in range(count)]
        for_each = [values[i % len(values)] for i in range(len(num_chunks))]
        for i, sq_norm in enumerate((None, values[0], for_each)):
            yield norms, sq_norm, (None, 0.0, 1.0)[(turn + i) % 3]
    for key in range(1, capacity + 3):
        yield [float(key)] * count, None, None


def never_ran(process: Process) -> dict[str, int]:
    """Return how many programs have a basic block that no thread came to, by what is in it."""
    found: Counter[str] = Counter()
    for (_, name), program in process.driver.programs.items():
        for i, block in enumerate(program.kernel.blocks):
            if not program.ran[i]:
                functions = dict.fromkeys(_function_of(each.line) for each in block.instructions)
                opcodes = sorted({each.opcode for each in block.instructions})
                found[f"{name}: {' '.join(functions)}: {' '.join(opcodes)}"] += 1
    return dict(found)


def _function_of(line: str) -> str:
    """Return the name of the kernels' function at a line, or an empty one."""
    file, _, number = line.partition(":")
    return next((name for name, lines in _functions(file) if int(number) in lines), "")


@cache
def _functions(file: str) -> list[tuple[str, range]]:
    source = Path(kernels.__file__).parent / file
    if not source.is_file():
        return []
    nodes = ast.walk(ast.parse(source.read_text()))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef))
    return [(node.name, range(node.lineno, (node.end_lineno or 0) + 1)) for node in functions]


def surviving_mutants(process: Process, every: int) -> tuple[int, list[str]]:
    """Return how many of the default pass's mutants were tried, one in `every`, and the unnoticed.

    Their names are the source's function, the instruction, and what it was changed to.
    """
    process.use_priority_kernel("Triton")
    recorder = Recorder(process.driver, "critical_adam_kernel")
    with recorder.recording():
        for case in MUTATED_CASES:
            run(case)
    (program,) = {id(each.compiled): each.compiled for each in recorder.launches}.values()
    (ptx,) = (key[0] for key, each in process.driver.programs.items() if each is program)
    # One that fills the buffer, one that rebuilds the sum, one that replaces a slot come first.
    launches = [recorder.launches[i] for i in (7, 4, 1)] + recorder.launches
    tried = list(mutants(ptx))[::every]
    unnoticed = [each for each in tried if not is_noticed(launches, each)]
    names = [f"{_function_of(each.line)}: {each.before} -> {each.after}" for each in unnoticed]
    return len(tried), names


def opcodes(process: Process) -> list[str]:
    """Return the opcodes of all programs that were launched, each with a function that has it."""
    kernels_run = (program.kernel for program in process.driver.programs.values())
    blocks = (block for kernel in kernels_run for block in kernel.blocks)
    found = {(each.opcode, each.line) for block in blocks for each in block.instructions}
    return sorted({f"{opcode} {_function_of(line)}" for opcode, line in found})


def constants(process: Process) -> dict[str, list[str]]:
    """Return the names of the constants by which Triton finds each kernel among what it keeps."""
    found = {}
    for name, kernel in {**vars(kernels), **vars(triton_norms)}.items():
        if name.endswith("_kernel"):
            assert kernel.cache_key  # which looks for them
            found[name] = sorted({constant for constant, _ in kernel.used_global_vals})
    return found


_TASKS: dict[str, Callable[..., Any]] = {
    "constants": constants,
    "same bits": same_bits,
    "same as stored": same_as_stored,
    "priorities": priorities,
    "surviving mutants": surviving_mutants,
    "never ran": never_ran,
    "opcodes": opcodes,
}


def main() -> None:
    """Answer tasks until there are no more."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.compiled")
    parser.add_argument("--arch", type=int, required=True)
    process = Process(parser.parse_args().arch)
    if triton.knobs.runtime.interpret:
        sys.exit("tests.support.compiled: TRITON_INTERPRET=1 is set, so nothing is compiled")
    torch.set_num_threads(1)
    # What is imported stays, and what is made is much: garbage is looked for seldom.
    gc.freeze()
    gc.set_threshold(100_000)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        result, error = None, ""
        try:
            # What Triton prints is no answer.
            with contextlib.redirect_stdout(sys.stderr):
                result = _TASKS[name](process, *arguments)
        except (AssertionError, PtxError, RuntimeError):
            error = traceback.format_exc()
        process.clear()
        print(json.dumps([result, error]), flush=True)
    # At exit nanobind names what is not freed.
    gc.unfreeze()


if __name__ == "__main__":
    main()
