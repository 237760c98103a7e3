"""Which tests run under a sanitizer, and why the others do not."""

from pathlib import Path

# Test ids with these words never reach C++: interpreted Triton kernels, the reference.
SELECTED = "not triton and not eager"

_NO_CPP = "does not call the library, or not beyond what other files do"
_PAPER = "experiments in plain Python that step as test_contract.py does, for minutes"
LEFT_OUT = {
    "tests/packaging/test_build.py": "builds packages in subprocesses",
    "tests/optimizer/test_compile.py": "inductor compiles, under the preloaded sanitizer, with another g++",
    "tests/backends/test_cuda_sources.py": _NO_CPP,
    "tests/packaging/test_diagnosis.py": "subprocesses of `python -m cm_fused` without the preload",
    "tests/distributed/test_exits.py": "starts processes that end while gloo's threads, which are not "
    "instrumented, go on",
    "tests/backends/test_gpu.py": "needs a GPU",
    "tests/backends/test_launch.py": _NO_CPP,
    "tests/optimizer/test_memory.py": "measures memory, of which a sanitizer takes as much again",
    "tests/bench/test_paper_data.py": _PAPER,
    "tests/bench/test_paper_experiments.py": _PAPER,
    "tests/bench/test_paper_surfaces.py": _PAPER,
    "tests/bench/test_paper_train.py": _PAPER,
    "tests/bench/test_precision_bench.py": _NO_CPP,
    "tests/packaging/test_readme.py": _NO_CPP,
    "tests/optimizer/test_reference.py": _NO_CPP,
    "tests/optimizer/test_rounding.py": _NO_CPP,
    "tests/bench/test_sass.py": _NO_CPP,
    "tests/packaging/test_supply_chain.py": "reads the sources and packs them",
    "tests/optimizer/test_trainers.py": "imports trainers, whose processes and threads are not ours",
    "tests/backends/test_triton.py": _NO_CPP,
}
DESELECTED = {
    "tests/operators/test_ops.py::test_opcheck": "traces for minutes what the other tests call",
    "tests/backends/test_threads.py::test_steps_keep_no_memory": "resident memory has what AddressSanitizer "
    "keeps of freed blocks",
}
# Under ThreadSanitizer only; AddressSanitizer runs them.
UNDER_THREAD = {
    "tests/backends/test_threads.py::test_forked_processes_step": "ThreadSanitizer dies in a fork that "
    "starts threads",
    "tests/backends/test_determinism.py::test_threads[2]": "torch's own copies in libgomp's threads, "
    "neither of which is instrumented, are races to it",
    "tests/checkpoint/test_flattened_state_dict.py": "as tests/distributed/test_sharding.py",
    "tests/distributed/test_sharding.py": "gloo's threads, which are not instrumented, are races to it; the "
    "library is called from one thread of each process",
}
# Each in a process of its own, so that a fault of one leaves the others' results: first those that
# call the operators most.
FIRST = [
    f"tests/test_{name}.py"
    for name in ("ops", "op_arguments", "threads", "low_precision", "table", "faults", "parity")
]


def options(deselected: dict[str, str]) -> list[str]:
    """Return pytest's options."""
    return [option for test in deselected for option in ("--deselect", test)]


def parts(tree: Path) -> list[list[str]]:
    """Return the files to run, one process for each list."""
    files = sorted(f"tests/{path.name}" for path in (tree / "tests").glob("test_*.py"))
    others = [file for file in files if file not in FIRST and file not in LEFT_OUT]
    return [[file] for file in [*FIRST, *others]]
