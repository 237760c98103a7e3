"""The time of a step, paired with one of torch's fused AdamW; `bench.speed` runs this.

Each case is a line of JSON in the record file, so that what was measured stays when a later case
hangs or ends the process.
"""

import argparse
import gc
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench import machine
from bench.speed import bytes as byte_model
from bench.speed import cuda
from bench.speed.cases import Case, cases
from bench.speed.providers import BASELINE, NO_BUFFER, parameters
from bench.timing import Step, Timed, interleave

# A provider's second step still prepares: cm_fused hands its tensors to the library, a compiled
# step is compiled. From the third on all steps are alike.
_WARM_UP = 3
_COPY_ELEMENTS = 2**26
_COPY_ROUNDS = 15
# On a GPU the rounds that the host's clock times take no longer than this: they are the lesser
# ones there.
_MOST_WALL_SECONDS = 1.0


def main() -> None:
    """Measure all cases of a device; exit with 1 where one failed or the time was up."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed.throughput", description=__doc__)
    parser.add_argument("record", type=Path, help="file to which each case adds a line")
    parser.add_argument("--device", choices=machine.DEVICES, default=machine.default_device())
    parser.add_argument("--smoke", action="store_true", help="tiny workloads, two rounds")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--deadline", type=float, help="time.time() from which cases are left out")
    arguments = parser.parse_args()
    # A user does not see them either.
    warnings.simplefilter("ignore", DeprecationWarning)
    bandwidth = copy_bytes_per_second(arguments.device, arguments.smoke)
    complete = True
    for case in cases(arguments.device, arguments.smoke):
        if case.left_out is not None or arguments.only not in case.name:
            continue
        if arguments.deadline is not None and time.time() > arguments.deadline:
            break
        info = _record(case, arguments.device, bandwidth, arguments.record)
        if info is not None:
            ratio = f"{info['ratio_to_fused_adamw']['median']:.2f}"
            print(f"{case.name}: {'ran' if arguments.smoke else ratio}", flush=True)
        complete &= info is not None
        free_memory(arguments.device)
    sys.exit(not complete)


def _record(case: Case, device: str, bandwidth: float, path: Path) -> dict[str, Any] | None:
    """Measure a case, write it down and return it; None where it failed."""
    try:
        info = measure(case, device, bandwidth)
    except Exception:
        print(f"{case.name}: FAILED", flush=True)
        traceback.print_exc()
        return None
    with path.open("a") as lines:
        lines.write(json.dumps(info) + "\n")
    return info


def free_memory(device: str) -> None:
    """Free one case's gigabytes before the next case needs them; reference cycles hold some."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@cache
def copy_bytes_per_second(device: str, smoke: bool) -> float:
    """Return the bytes per second that a large copy reads and writes, measured once.

    The target's lines, which a processor may read before it overwrites them, are not counted; a
    step reads what it writes, so it can move more than a copy by this count.
    """
    if device == "cuda":
        return cuda.copy_bytes_per_second(smoke)
    elements = 2**16 if smoke else _COPY_ELEMENTS
    source, target = torch.ones(elements), torch.zeros(elements)
    timed = interleave({"copy": lambda: target.copy_(source)}, _COPY_ROUNDS)
    return 2 * source.nbytes / timed.median("copy")


def measure(
    case: Case, device: str, bandwidth: float, loop: Callable[..., Timed] = interleave
) -> dict[str, Any]:
    """Time steps of a case, each right after a step of the baseline on tensors of its own.

    Args:
        case: What is measured.
        device: "cpu" or "cuda".
        bandwidth: Bytes per second of a copy.
        loop: Takes the rounds on the host's clock; called as `interleave` is.

    Raises:
        RuntimeError: The buffers were not in the case's regime.
    """
    torch.manual_seed(0)
    baseline = BASELINE.make(parameters(case.workload.shapes, device), NO_BUFFER)
    contestant = case.provider.make(parameters(case.workload.shapes, device), case.regime)
    contestant.set_keys(case.regime)

    def prepare() -> None:
        if case.regime.every_round:
            contestant.set_keys(case.regime)
        machine.synchronize(device)

    steps = {"baseline": baseline.step, "own": contestant.step}
    waiting = steps if device == "cpu" else {k: _and_wait(step) for k, step in steps.items()}
    timed = loop(
        waiting,
        case.rounds,
        warm_up=_WARM_UP,
        before_round=prepare,
        most_seconds=math.inf if device == "cpu" else _MOST_WALL_SECONDS,
    )
    info: dict[str, Any] = {}
    if device == "cuda":
        info = {"wall_seconds": timed.median("own")}
        timed, queued = cuda.paired_rounds(steps, case.rounds)
        info |= {"queued": queued, **_only_on_cuda(case, contestant.step)}
    if not contestant.follows(case.regime):
        raise RuntimeError(f"{case.name}: the buffers did not do what the regime says")
    info |= _result(case, timed)
    info |= _byte_model(case, timed.median("own"), bandwidth)
    return info | {"device": machine.describe(device), "versions": machine.versions()}


def _and_wait(step: Step) -> Step:
    def step_and_wait() -> None:
        step()
        torch.cuda.synchronize()

    return step_and_wait


def _only_on_cuda(case: Case, step: Step) -> dict[str, Any]:
    """Return what only a GPU's cases have. The profiler comes last: it may leave something."""
    state = case.provider.state_copies + 2
    return {
        "host_seconds": cuda.host_seconds(step, case.rounds),
        **cuda.allocations(step),
        # Then the L2, which a step finds as the one before left it, is what is measured.
        "fits_in_cache": 4 * state * case.workload.numel < machine.cache_bytes("cuda"),
        "launches": cuda.launches(step),
    }


def _result(case: Case, timed: Timed) -> dict[str, Any]:
    ratios = timed.ratios("own", "baseline")
    first, _, third = quantiles(ratios, n=4, method="inclusive")
    return {
        "workload": case.workload.name,
        "tensors": len(case.workload.shapes),
        "elements": case.workload.numel,
        "provider": case.provider.name,
        "what": case.provider.what,
        "regime": case.regime.name,
        "rounds": len(ratios),
        "seconds": timed.median("own"),
        "baseline_seconds": timed.median("baseline"),
        "ratio_to_fused_adamw": {"median": median(ratios), "quartiles": [first, third]},
    }


def _byte_model(case: Case, seconds: float, bandwidth: float) -> dict[str, Any]:
    """Return the model's prediction and what the measured time says by it, where it applies."""
    info: dict[str, Any] = {"copy_gb_per_s": bandwidth / 1e9}
    if case.provider.bytes is None:
        return info
    moved = case.provider.bytes(case.regime.admits)
    info |= {"bytes_read": moved.read, "bytes_written": moved.written}
    if case.workload.memory_bound:
        own = moved.total * case.workload.numel / seconds
        info |= {
            "predicted_ratio": moved.total / byte_model.adamw_fused().total,
            "gb_per_s": own / 1e9,
            "share_of_copy": own / bandwidth,
        }
    return info


if __name__ == "__main__":
    main()
