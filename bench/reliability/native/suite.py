"""Which tests run under a sanitizer, and why the others do not."""

from pathlib import Path

# Test ids with these words never reach C++: interpreted Triton kernels, the reference.
SELECTED = "not triton and not eager"

_NO_CPP = "does not call the library, or not beyond what other files do"
LEFT_OUT = {
    "tests/bench/": "the benches, in plain Python that steps as test_contract.py does, for minutes",
    "tests/packaging/test_build.py": "builds packages in subprocesses",
    "tests/optimizer/test_compile.py": "inductor compiles with another g++",
    "tests/backends/test_cuda_sources.py": _NO_CPP,
    "tests/backends/test_compiled.py": "runs in processes without the preload",
    "tests/backends/test_ptx.py": _NO_CPP,
    "tests/packaging/test_diagnosis.py": "subprocesses of `python -m cm_fused` without the preload",
    "tests/distributed/test_exits.py": "gloo's threads, not instrumented, outlive the main one",
    "tests/backends/test_gpu.py": "needs a GPU",
    "tests/backends/test_launch.py": _NO_CPP,
    "tests/backends/test_same_bits.py": "hours of interpreted Triton kernels; test_parity.py takes "
    "the C++ steps",
    "tests/optimizer/test_memory.py": "measures memory, of which a sanitizer takes as much again",
    "tests/packaging/test_readme.py": _NO_CPP,
    "tests/optimizer/test_properties.py": _NO_CPP,
    "tests/optimizer/test_reference.py": _NO_CPP,
    "tests/optimizer/test_rounding.py": _NO_CPP,
    "tests/packaging/test_supply_chain.py": "reads the sources and packs them",
    "tests/optimizer/test_trainers.py": "trainers' processes and threads are not ours",
    "tests/backends/test_triton.py": _NO_CPP,
}
DESELECTED = {
    "tests/operators/test_ops.py::test_opcheck": "traces for minutes what the other tests call",
    "tests/backends/test_threads.py::test_steps_keep_no_memory": "AddressSanitizer keeps memory",
}
# Under ThreadSanitizer only; AddressSanitizer runs them.
UNDER_THREAD = {
    "tests/backends/test_threads.py::test_forked_processes_step": "it dies in forks with threads",
    "tests/backends/test_determinism.py::test_threads[2]": "torch's copies in libgomp are races",
    "tests/checkpoint/test_flattened_state_dict.py": "as tests/distributed/test_sharding.py",
    "tests/distributed/test_sharding.py": "gloo's threads are races to it; ours is one a process",
}
# Each in a process of its own, so that a fault of one leaves the others' results: first those that
# call the operators most.
FIRST = (
    "tests/operators/test_ops.py",
    "tests/operators/test_op_arguments.py",
    "tests/backends/test_threads.py",
    "tests/optimizer/test_low_precision.py",
    "tests/operators/test_table.py",
    "tests/backends/test_faults.py",
    "tests/backends/test_parity.py",
)


def options(deselected: dict[str, str]) -> list[str]:
    """Return pytest's options."""
    return [option for test in deselected for option in ("--deselect", test)]


def parts(tree: Path) -> list[list[str]]:
    """Return the files to run, one process for each list."""
    files = sorted(str(path.relative_to(tree)) for path in (tree / "tests").rglob("test_*.py"))
    first = [file for file in FIRST if file in files]
    others = [file for file in files if not file.startswith((*FIRST, *LEFT_OUT))]
    return [[file] for file in [*first, *others]]
