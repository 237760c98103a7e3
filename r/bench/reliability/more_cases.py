"""Tests of the suite with as many cases as a campaign has time for, run by pytest."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.reliability.finding import Finding, require

ROOT = Path(__file__).parents[2]


def random_use() -> Finding:
    """Use the API at random."""
    return Finding(
        "random use",
        _cases("tests/optimizer/test_fuzz.py::test_random_use"),
        "transitions of state machines",
        "the reference's parameters and state, and the bits of a run that is not disturbed",
    )


def magnitudes() -> Finding:
    """Try powers of two from the smallest denormal on, in each position."""
    return Finding(
        "magnitudes",
        _cases("tests/optimizer/test_numbers.py::test_any_magnitude_in_any_position"),
        "gradients of 2^-149 to 2^127 in each position",
        "the key is the norm, parameters are finite",
    )


def memory() -> Finding:
    """Look at the resident memory."""
    return Finding(
        "memory",
        _cases("tests/backends/test_threads.py::test_steps_keep_no_memory"),
        "steps: plain, with state dicts saved, with gradients that come and go",
        "resident memory within 1 MiB, no object kept",
    )


def threads() -> Finding:
    """Step in threads."""
    return Finding(
        "threads",
        _cases("tests/backends/test_threads.py::test_threads_step_their_own_optimizers"),
        "steps in 4 threads",
        "the bits of one after the other, of parameters and state",
    )


def forks() -> Finding:
    """Step in forked processes."""
    return Finding(
        "forks",
        _cases("tests/backends/test_threads.py::test_forked_processes_step"),
        "forked processes that step",
        "the bits of the parent's steps",
    )


def _cases(test: str) -> int:
    """Run a test and return how many cases its parts recorded.

    Raises:
        AssertionError: It failed, or nothing was run.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "cases")
        record.touch()
        # What is interpreted of Triton would take days of this.
        options = ["-q", "-p", "no:cacheprovider", "-k", "not triton"]
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", *options, test],
            cwd=ROOT,
            env={**os.environ, "CM_FUSED_CAMPAIGN": str(record)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        require(finished.returncode == 0, finished.stdout)
        cases = sum(map(int, record.read_text().split()))
    require(cases > 0, f"{test} recorded no case: is its backend there?\n{finished.stdout}")
    return cases
