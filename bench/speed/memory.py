"""Memory of an optimizer's state, and what a step needs besides: `python -m bench.speed.memory`.

On the CPU each figure comes from a process of its own, since a process's peak never falls. Given a
results file, the figures are written into it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench import machine
from bench.speed import cuda
from bench.speed.precision.setups import BASELINE, PRECISIONS, Precision
from bench.speed.providers import BACKENDS
from bench.speed.workloads import LARGE
from cm_fused import AdamCM

_CAPACITIES = (5, 20)
_ELEMENTS = LARGE.numel
# After these steps its threads and the library's tables are there.
_WARM_UP = 3
_STEPS = 3


def _measure_here(
    capacity: int, elements: int, device: str, precision: Precision
) -> dict[str, float]:
    param = Parameter(torch.randn(elements, device=device))
    param.grad = torch.randn(elements, device=device)
    # The keys decay, so every step replaces a slot.
    optimizer = AdamCM(
        [param],
        capacity=capacity,
        buffer_dtype=precision.buffer_dtype,
        moment_dtype=precision.moment_dtype,
        backend=BACKENDS[device],
    )
    for _ in range(_WARM_UP):
        optimizer.step()
    growth = _peak_growth_on_cpu if device == "cpu" else cuda.peak_growth
    peak_growth = growth(lambda: [optimizer.step() for _ in range(_STEPS)])
    state = [value for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    return {
        "capacity": capacity,
        "elements": elements,
        "state_bytes_per_element": sum(tensor.nbytes for tensor in state) / elements,
        "peak_growth_bytes": peak_growth,
    }


def _peak_growth_on_cpu(run: Callable[[], object]) -> int:
    resident = _memory("VmRSS")
    run()
    # Not `getrusage`, whose peak a process has from the one that started it.
    return _memory("VmHWM") - resident


def _memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) * 1024


def measure(device: str, elements: int = _ELEMENTS) -> list[dict[str, float]]:
    """Return the memory of one tensor's state and step for each capacity.

    Args:
        device: "cpu" or "cuda".
        elements: Of the tensor, float32.
    """
    if device == "cuda":
        precision = PRECISIONS[BASELINE]
        return [_measure_here(capacity, elements, device, precision) for capacity in _CAPACITIES]
    return [_measure_apart(capacity, elements, BASELINE) for capacity in _CAPACITIES]


def growth_in_step(precision: str) -> int:
    """Return the bytes by which a process's memory peaks in a step on the CPU.

    Args:
        precision: A key of `PRECISIONS`.
    """
    return int(_measure_apart(_CAPACITIES[0], _ELEMENTS, precision)["peak_growth_bytes"])


def _measure_apart(capacity: int, elements: int, precision: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.speed.memory", "--device", "cpu"]
    command += ["--here", str(capacity), str(elements), precision]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(child.stdout)
    return measured


def main() -> None:
    """Measure, print, and write into a results file if one is given."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.memory", description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="results file to update")
    parser.add_argument("--device", choices=machine.DEVICES, default=machine.default_device())
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        capacity, elements, name = arguments.here
        here = _measure_here(int(capacity), int(elements), arguments.device, PRECISIONS[name])
        print(json.dumps(here))
        return
    measured = measure(arguments.device)
    print(json.dumps(measured, indent=1))
    if arguments.results:
        results: dict[str, Any] = json.loads(arguments.results.read_text())
        results["memory"] = measured
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
