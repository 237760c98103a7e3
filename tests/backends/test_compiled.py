"""The kernels as a GPU's compiler gets them: their PTX leaves the bits of the C++ step.

`tests.support.ptx` runs it, on CPU tensors. Argument binding, specialization and compilation are
Triton's own, and nvcc's for the CUDA priority kernel; what turns PTX into machine code is not here.
What runs is in a process of its own, as kernels are not interpreted there.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cases import needs_cpu_backend, needs_nvcc, needs_triton
from tests.support.compiled_cases import QUICK_CASES, SLOW_CASES
from tests.support.frozen import CASES as FROZEN
from tests.support.same_bits import Case
from tests.support.worker import Worker

pytestmark = [needs_triton, needs_cpu_backend]

QUICK_ARCH = 90
ARCHITECTURES = (80, 90, 100)
TRITON = pytest.param("Triton")
CUDA = pytest.param("CUDA", marks=needs_nvcc)
# The numbers of chunks of each row, and the capacity: every way through the unrolled loops.
ROWS: tuple[tuple[str, list[int], int], ...] = (
    ("Triton", [0, 1, 2, 3], 2),
    ("Triton", [1, 2, 600], 3),
    ("Triton", [1, 2], 0),
    ("CUDA", [0, 300, 600, 900, 1100, 1400, 1700, 2000, 2500], 1),
    ("CUDA", [i % 3 for i in range(300)], 2),
    *(("CUDA", [1, 600], capacity) for capacity in (0, 3, 4, 7, 9)),
)
# Basic blocks that nothing here comes to, and why.
NEVER_RUN = {
    r"critical_adam_kernel: _power: .*": "the number of a step is 1 or more",
    r"critical_adam_kernel: critical_adam_kernel: bra.uni rem.s64": "nor is it beyond 32 bits",
}

# Mutants that compute the same, by the function in the source, and why.
EQUIVALENT = {
    r"is_aligned: ld\..*": "where one column's address is aligned, another's is",
    r"(_mean_divisor|rebuild_sum): (setp\.lt\.s32|mov\.b32) \S+ (\S+ )?1; .*": (
        "a buffer has a slot"
    ),
    r"_power: (mul|add)\.rn\.f64 .*": "the number of a step is 1 or more",
    r"critical_adam_kernel: (shr|add)\.[su]32 .*": "no chunk starts before 0",
    r"critical_adam_kernel: (or|and)\.b64 .*": "remainders of 32 and of 64 bits are the same",
    r"critical_adam_kernel: (setp\.(ne|eq)\.b64|@!?%p\d+ bra) .*": "likewise",
    r"critical_adam_kernel: rem\.s64 .*": "not run, see above",
    r": and\.b64 \S+ \S+ 3; .*": "slots that are aligned may be taken for others",
    r"(_load_slot|load_moment): mov\.b32 .*": "where nothing is loaded nothing is used",
    r": mov\.b64 \S+ 0d0000000000000000; .*": "a chunk has an element",
    r"(_update_chunk|rebuild_sum): setp\.lt\.s32 \S+ %r\d+, %r\d+; .*": "a turn more is empty",
}
# The quick test tries one in so many mutants of the default pass.
SOME = 43


class Workers:
    """The process of each architecture, started when it is asked."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._workers: dict[int, Worker] = {}

    def ask(self, arch: int, name: str, *arguments: Any) -> Any:
        """Return what the process answers."""
        if arch not in self._workers:
            self._workers[arch] = Worker(arch, self._kernels)
        return self._workers[arch].ask(name, *arguments)

    def close(self) -> None:
        """End all of them."""
        for worker in self._workers.values():
            worker.close()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Return the processes, which share what is compiled."""
    started = Workers(tmp_path_factory.mktemp("kernels"))
    yield started
    started.close()


@pytest.fixture
def arch() -> int:
    """Return the only architecture of what is quick."""
    return QUICK_ARCH


def slowly(function: Any) -> Any:
    """Run some of a test's cases where there is time, all with --every-case: for half an hour."""
    return pytest.mark.slow(pytest.mark.sampled(function))


def _of_name(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", QUICK_CASES, ids=_of_name)
def test_same_bits(workers: Workers, arch: int, case: Case) -> None:
    """Each kind of kernel leaves the bits of the C++ step in parameters and state."""
    workers.ask(arch, "same bits", case.name, "Triton")


@slowly
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != QUICK_ARCH])
@pytest.mark.parametrize("case", QUICK_CASES, ids=_of_name)
def test_same_bits_on_others(workers: Workers, arch: int, case: Case) -> None:
    """So they do as other GPUs have them."""
    workers.ask(arch, "same bits", case.name, "Triton")


@slowly
@pytest.mark.parametrize("case", SLOW_CASES, ids=_of_name)
def test_same_bits_of_all(workers: Workers, case: Case) -> None:
    """Every class, dtype, capacity and way to store the state."""
    workers.ask(QUICK_ARCH, "same bits", case.name, "Triton")


@slowly
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_frozen_bits(workers: Workers, arch: int, case: Any) -> None:
    """Every option leaves the bits that interpreted kernels were stored with."""
    differing = workers.ask(arch, "same as stored", str(case))
    assert not differing, f"{case}: other bits in {', '.join(differing)}"


@needs_nvcc
@pytest.mark.parametrize("case", QUICK_CASES[:2], ids=_of_name)
def test_steps_with_the_cuda_kernel(workers: Workers, arch: int, case: Case) -> None:
    """A run whose priorities nvcc's kernel updates has the same bits."""
    workers.ask(arch, "same bits", case.name, "CUDA")


def _rows(kernel: str) -> list[Any]:
    return [
        pytest.param(num_chunks, capacity, id=f"{len(num_chunks)}-{capacity}")
        for name, num_chunks, capacity in ROWS
        if name == kernel
    ]


@pytest.mark.parametrize("group_scope", [False, True])
@pytest.mark.parametrize(("num_chunks", "capacity"), _rows("Triton"))
def test_priorities_by_triton(
    workers: Workers, arch: int, num_chunks: list[int], capacity: int, group_scope: bool
) -> None:
    """Keys, slots, steps and fill are C++'s: ties, norms that are not finite, skipped steps."""
    workers.ask(arch, "priorities", "Triton", num_chunks, capacity, group_scope)


@needs_nvcc
@pytest.mark.parametrize("group_scope", [False, True])
@pytest.mark.parametrize(("num_chunks", "capacity"), _rows("CUDA"))
def test_priorities_by_cuda(
    workers: Workers, arch: int, num_chunks: list[int], capacity: int, group_scope: bool
) -> None:
    """Likewise those of the kernel that nvcc compiles."""
    workers.ask(arch, "priorities", "CUDA", num_chunks, capacity, group_scope)


@needs_nvcc
def test_every_basic_block_ran(workers: Workers, arch: int) -> None:
    """The cases run every basic block of the kernels they compile, except those with a reason."""
    _run_all(workers, arch)
    left = workers.ask(arch, "never ran")
    unexplained = [name for name in left if not _reasons(name)]
    assert not unexplained
    assert {reason for name in left for reason in _reasons(name)} == set(NEVER_RUN)


def _run_all(workers: Workers, arch: int) -> None:
    """Run what has not been run yet; what has is cached."""
    for case in QUICK_CASES:
        workers.ask(arch, "same bits", case.name, "Triton")
    for kernel, num_chunks, capacity in ROWS:
        for group_scope in (False, True):
            workers.ask(arch, "priorities", kernel, num_chunks, capacity, group_scope)


def _reasons(name: str) -> list[str]:
    return [pattern for pattern in NEVER_RUN if re.fullmatch(pattern, name)]


def _check_mutants(workers: Workers, arch: int, every: int, at_least: int) -> None:
    tried, unnoticed = workers.ask(arch, "surviving mutants", every)
    assert tried >= at_least
    assert not [name for name in unnoticed if not any(re.fullmatch(e, name) for e in EQUIVALENT)]


def test_some_mutants(workers: Workers, arch: int) -> None:
    """A comparison of bits notices an instruction that is wrong."""
    _check_mutants(workers, arch, SOME, 10)


@pytest.mark.slow
def test_all_mutants(workers: Workers, arch: int) -> None:
    """Whatever instruction of the default pass is wrong, the bits or an error show it."""
    _check_mutants(workers, arch, 1, 400)


def test_a_kernel_of_other_sources_is_not_taken(workers: Workers, arch: int) -> None:
    """What an earlier version compiled stays on disk, and Triton does not see all that has changed.

    With another size of blocks every test passed: by the kernels of the old size. With columns of
    tables in another order the kernels of norms and priorities were still the old ones, as only the
    pass was asked for.
    """
    found = workers.ask(arch, "constants")
    assert len(found) == 5
    assert [name for name, constants in found.items() if "SOURCE" not in constants] == []


def test_nothing_is_contracted_or_approximated(workers: Workers, arch: int) -> None:
    """No multiply-add is fused but of exact products; no quotient or root is approximate.

    Those of Eq. (7) and of scales are made from approximate ones and rounded correctly, see
    test_quotient.py and test_scales.py.
    """
    _run_all(workers, arch)
    opcodes = workers.ask(arch, "opcodes")
    assert "mul.rn.f32 _update_moments" in opcodes
    corrected = (" divide_by_root", " _quotient", " _inverse")
    others = [opcode for opcode in opcodes if not opcode.endswith(corrected)]
    fused = ["fma.rn.f32 add_slot", "fma.rn.f64 _sum_squares_of_fours"]
    assert [opcode for opcode in others if "fma" in opcode] == fused
    assert not [opcode for opcode in others if re.search(r"approx|ftz|full", opcode)]
    assert {"rcp.approx.ftz.f32 divide_by_root", "rsqrt.approx.ftz.f32 _inverse"} <= set(opcodes)
