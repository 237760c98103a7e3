"""Run the C++ code under sanitizers and valgrind; write bench/results/sanitizers.json.

`python -m bench.reliability.native [address] [thread] [valgrind]`, all of them where none is named;
`--only tests/operators/test_ops.py` runs that file alone under the two sanitizers. What is run
replaces what the file says of it. Needs g++ with its sanitizers' libraries, and valgrind.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import machine
from bench.reliability.native import steps, suite

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "native"
RESULT = ROOT / "bench" / "results" / "sanitizers.json"
HERE = Path(__file__).parent
# Optimized little: the compiler hides less of what the code does.
FLAGS = "-O1 -g1 -fno-omit-frame-pointer"
FINDING = re.compile(
    r"ERROR: AddressSanitizer|WARNING: ThreadSanitizer|runtime error:|ERROR SUMMARY: [1-9]"
)


@dataclass(frozen=True)
class Run:
    """One command under one tool.

    Attributes:
        tool: What looked.
        what: What it looked at.
        passed: Tests passed; 1 for a run that is no test.
        findings: Lines in which the tool says that it found something.
        expected: How many findings the run is to have; -1 for any but 0: a control.
        failed: Whether the command itself failed.
    """

    tool: str
    what: str
    passed: int
    findings: list[str]
    failed: bool
    expected: int = 0

    @property
    def is_right(self) -> bool:
        """Whether the run ended as it was to."""
        found = len(self.findings)
        return found > 0 if self.expected < 0 else found == self.expected and not self.failed


def main() -> None:
    """Run what is named; exit with 1 where a run did not end as it was to."""
    parser = argparse.ArgumentParser(prog="python -m bench.reliability.native", description=__doc__)
    parser.add_argument("tools", nargs="*", help="address, thread, valgrind")
    parser.add_argument("--only", help="one file of tests, under the sanitizers")
    arguments = parser.parse_args()
    wrong = []
    for run in _runs(arguments.tools or list(TOOLS), arguments.only):
        _record(run)
        if not run.is_right:
            wrong.append(f"{run.tool}: {run.what}")
    sys.exit("not as it was to end: " + ", ".join(wrong) if wrong else None)


def _runs(tools: list[str], only: str | None) -> Iterator[Run]:
    for tool in tools:
        if only is None:
            yield from TOOLS[tool](None)
        elif tool != "valgrind":
            yield from TOOLS[tool]([[only]])


def _record(run: Run) -> None:
    """Write what a run found in the place of what the file said of it."""
    known = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    named = {file for part in suite.parts(ROOT) for file in part}
    named |= {each.__name__ for each in (*steps.SOUND, *steps.RACES)}
    others = [
        each
        for each in known
        if (each["tool"], each["what"]) != (run.tool, run.what) and each["what"].split()[0] in named
    ]
    # Each run has its own commit: not all are of one day.
    now = {**asdict(run), "commit": machine.versions()["commit"]}
    RESULT.write_text(json.dumps(_report([*others, now]), indent=1) + "\n")


def _report(runs: list[dict[str, object]]) -> dict[str, object]:
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True)
    return {
        "machine": machine.describe("cpu"),
        "versions": machine.versions(),
        "compiler": compiler.stdout.splitlines()[0],
        "flags": {"address": f"{FLAGS} {_ADDRESS}", "thread": f"{FLAGS} {_THREAD}"},
        "left_out": suite.LEFT_OUT,
        "deselected": {**suite.DESELECTED, **suite.UNDER_THREAD},
        "runs": runs,
    }


_ADDRESS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
_THREAD = "-fsanitize=thread"


def _address(parts: list[list[str]] | None = None) -> Iterator[Run]:
    tree = _build("address", _ADDRESS)
    environment = {
        # Python's arenas would hide the bounds of what torch is given.
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": _libraries("libasan.so", "libubsan.so", "libstdc++.so"),
        # Python itself leaks, which would drown everything: see the campaign "memory".
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    for files in parts or suite.parts(tree):
        yield _pytest("AddressSanitizer, UndefinedBehaviorSanitizer", tree, environment, files)


def _thread(parts: list[list[str]] | None = None) -> Iterator[Run]:
    tree = _build("thread", _THREAD)
    library = BUILD / "thread" / "threads.so"
    subprocess.run(
        [
            "g++",
            "-shared",
            "-fPIC",
            "-std=c++20",
            *FLAGS.split(),
            _THREAD,
            str(HERE / "threads.cpp"),
            "-o",
            str(library),
        ],
        check=True,
    )
    environment = {
        # torch's own loops in the calling thread; those of cm_fused in threads.cpp's.
        "OMP_NUM_THREADS": "1",
        "LD_PRELOAD": _libraries("libtsan.so", "libstdc++.so") + f" {library}",
        "TSAN_OPTIONS": "halt_on_error=0",
    }
    tool = "ThreadSanitizer"
    if parts is None:
        for run in steps.SOUND:
            yield _steps(tool, tree, environment, run.__name__, 0)
        for race in steps.RACES:
            yield _steps(tool, tree, environment, race.__name__, -1)
    for files in parts or suite.parts(tree):
        if not suite.UNDER_THREAD.keys() & {*files}:
            deselected = {**suite.DESELECTED, **suite.UNDER_THREAD}
            yield _pytest(tool, tree, environment, files, deselected)


def _valgrind(_: list[list[str]] | None = None) -> Iterator[Run]:
    # It has no AVX-512, neither for this library, the one that users have, nor for torch.
    environment = {
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
    }
    for capability in ("avx2", "default"):
        yield _steps(
            "valgrind memcheck",
            ROOT,
            {**environment, "CM_FUSED_CPU_CAPABILITY": capability},
            "every_kernel",
            0,
            [
                *("valgrind", "--error-exitcode=9", "--num-callers=30"),
                f"--suppressions={HERE / 'valgrind.supp'}",
            ],
        )


TOOLS: dict[str, Callable[[list[list[str]] | None], Iterator[Run]]] = {
    "address": _address,
    "thread": _thread,
    "valgrind": _valgrind,
}


def _build(name: str, flags: str) -> Path:
    """Build the CPU library with a sanitizer; return a copy of the tree that has it."""
    folder = BUILD / name
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "--quiet",
            "build_ext",
            "--build-temp",
            str(folder / "objects"),
            "--build-lib",
            str(folder / "library"),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "CM_FUSED_BUILD": "cpu",
            "CM_FUSED_CXXFLAGS": f"{FLAGS} {flags}",
            "LDFLAGS": flags,
        },
        stdout=subprocess.DEVNULL,
        check=True,
    )
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    for part in ("cm_fused", "tests", "bench", "csrc"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / part, tree / part, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    for library in (folder / "library" / "cm_fused").glob("*.so"):
        shutil.copy(library, tree / "cm_fused")
    return tree


def _libraries(*names: str) -> str:
    return " ".join(
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    )


def _pytest(
    tool: str,
    tree: Path,
    environment: dict[str, str],
    files: list[str],
    deselected: dict[str, str] = suite.DESELECTED,
) -> Run:
    # Without output capture: a sanitizer's last words go to the process's own stderr.
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-k", suite.SELECTED, *suite.options(deselected), *files]
    what = ", ".join(files)
    code, output = _output(tool, what, command, tree, environment)
    passed = re.search(r"(\d+) passed", output)
    return Run(
        tool,
        what,
        int(passed[1]) if passed else 0,
        _findings(output),
        failed=code != 0,
    )


def _steps(
    tool: str,
    tree: Path,
    environment: dict[str, str],
    run: str,
    expected: int,
    wrapper: list[str] | None = None,
) -> Run:
    command = [*(wrapper or []), sys.executable, "-m", "bench.reliability.native.steps", run]
    what = " ".join(filter(None, (run, environment.get("CM_FUSED_CPU_CAPABILITY"))))
    code, output = _output(tool, what, command, tree, environment)
    return Run(tool, what, 1, _findings(output), failed=code != 0, expected=expected)


def _output(
    tool: str, what: str, command: list[str], folder: Path, environment: dict[str, str]
) -> tuple[int, str]:
    finished = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    output = finished.stdout
    findings = len(_findings(output))
    print(f"{tool}: {what}: {findings} findings, exit status {finished.returncode}", flush=True)
    if finished.returncode or findings:
        print(output[-6000:], flush=True)
    return finished.returncode, output


def _findings(output: str) -> list[str]:
    """Return what a tool says it found, with no address and no path of this machine."""
    lines = [line for line in output.splitlines() if FINDING.search(line)]
    return [re.sub(r"\(pid=\d+\)|==\d+==|\S*/", "", line).strip() for line in lines]


if __name__ == "__main__":
    main()
