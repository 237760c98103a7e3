"""The time of a step, paired with one of torch's fused AdamW.

Run by `python -m bench.run`, or alone: `python -m pytest bench/test_throughput.py -k "ResNet"`.
"""

import gc
from collections.abc import Iterator
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import bytes as byte_model
from bench import machine
from bench.cases import Case
from bench.providers import BASELINE, NO_BUFFER, parameters

# As in a user's process, where a deprecation inside a library shows and costs nothing.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# A provider's second step still prepares: cm_fused hands its tensors to the library, a compiled
# step is compiled. From the third on all steps are alike.
_WARM_UP = 3
_COPY_ELEMENTS = 2**26
_COPY_ROUNDS = 15


@pytest.fixture(scope="session")
def copy_bandwidth(request: pytest.FixtureRequest) -> float:
    """Bytes per second that a large copy reads and writes.

    The target's lines, which a processor may read before it overwrites them, are not counted; a
    step reads what it writes, so it can move more than a copy by this count.
    """
    elements = 2**16 if request.config.getoption("--smoke") else _COPY_ELEMENTS
    source, target = torch.ones(elements), torch.zeros(elements)
    seconds = []
    for _ in range(_COPY_ROUNDS):
        start = perf_counter()
        target.copy_(source)
        seconds.append(perf_counter() - start)
    return 2 * source.nbytes / median(seconds)


@pytest.fixture(autouse=True)
def _freed() -> Iterator[None]:
    """Release one case's gigabytes before the next needs them; cycles hold some."""
    yield
    gc.collect()


def test_step(benchmark: BenchmarkFixture, case: Case, copy_bandwidth: float) -> None:
    """Time steps of the case, each right after a step of the baseline on tensors of its own."""
    torch.manual_seed(0)
    baseline = BASELINE.make(parameters(case.workload.shapes), NO_BUFFER)
    contestant = case.provider.make(parameters(case.workload.shapes), case.regime)
    contestant.set_keys(case.regime)
    baseline_seconds: list[float] = []

    def step_baseline() -> None:
        if case.regime.every_round:
            contestant.set_keys(case.regime)
        start = perf_counter()
        baseline.step()
        baseline_seconds.append(perf_counter() - start)

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        contestant.step, setup=step_baseline, rounds=case.rounds, warmup_rounds=_WARM_UP
    )
    assert contestant.follows(case.regime)
    assert benchmark.stats is not None
    seconds = benchmark.stats.stats.data
    benchmark.extra_info.update(_result(case, seconds, baseline_seconds[-len(seconds) :]))
    benchmark.extra_info.update(_byte_model(case, median(seconds), copy_bandwidth))
    benchmark.extra_info.update(device=machine.device(), versions=machine.versions())


def _result(case: Case, seconds: list[float], baseline_seconds: list[float]) -> dict[str, Any]:
    pairs = zip(seconds, baseline_seconds, strict=True)
    ratios = [own / baseline for own, baseline in pairs]
    first, second, third = quantiles(ratios, n=4, method="inclusive")
    return {
        "workload": case.workload.name,
        "tensors": len(case.workload.shapes),
        "elements": case.workload.numel,
        "provider": case.provider.name,
        "what": case.provider.what,
        "regime": case.regime.name,
        "rounds": len(ratios),
        "seconds": median(seconds),
        "baseline_seconds": median(baseline_seconds),
        "ratio_to_fused_adamw": {"median": second, "quartiles": [first, third]},
    }


def _byte_model(case: Case, seconds: float, copy_bandwidth: float) -> dict[str, Any]:
    """Return the model's prediction and what the measured time says by it, where it applies."""
    moved = case.provider.bytes(case.regime.admits)
    info: dict[str, Any] = {
        "bytes_read": moved.read,
        "bytes_written": moved.written,
        "copy_gb_per_s": copy_bandwidth / 1e9,
    }
    if case.workload.memory_bound:
        bandwidth = moved.total * case.workload.numel / seconds
        info |= {
            "predicted_ratio": moved.total / byte_model.adamw_fused().total,
            "gb_per_s": bandwidth / 1e9,
            "share_of_copy": bandwidth / copy_bandwidth,
        }
    return info
