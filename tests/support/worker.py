"""A process in which Triton's kernels are compiled: see `tests.support.compiled`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.cases import ROOT


class Worker:
    """The process for one architecture. It runs each task once: answers are cached."""

    def __init__(self, arch: int, kernels: Path) -> None:
        """Start it.

        Args:
            arch: The compute capability without the dot.
            kernels: Where Triton keeps what it has compiled.
        """
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.support.compiled", "--arch", str(arch)],
            cwd=ROOT,
            # Tensors are the CPU's where there is a GPU too.
            env={**environment, "TRITON_CACHE_DIR": str(kernels), "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answers: dict[str, Any] = {}

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return a task's result; AssertionError has the traceback of one that raised."""
        line = json.dumps([name, *arguments])
        if line not in self._answers or not arguments:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            assert answer, f"the process ended with {line}"
            self._answers[line] = json.loads(answer)
        result, error = self._answers[line]
        assert not error, error
        return result

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
