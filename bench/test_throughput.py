"""The time of a step, paired with one of torch's fused AdamW.

Run by `python -m bench.run`, or alone: `python -m pytest bench/test_throughput.py -k "ResNet"`.
"""

import gc
from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import bytes as byte_model
from bench import launches, machine
from bench.cases import Case
from bench.providers import BASELINE, NO_BUFFER, parameters
from bench.timer import Timer

# As in a user's process, where a deprecation inside a library shows and costs nothing.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# A provider's second step still prepares: cm_fused hands its tensors to the library, a compiled
# step is compiled. From the third on all steps are alike.
_WARM_UP = 3
# Far beyond any cache, and long beside what launching a copy takes.
_COPY_ELEMENTS = {"cpu": 2**26, "cuda": 2**30}
_COPY_ROUNDS = 15


@pytest.fixture(scope="session")
def device_type(request: pytest.FixtureRequest) -> str:
    """The type of device that is measured."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def copy_bandwidth(request: pytest.FixtureRequest, device_type: str) -> float:
    """Bytes per second that a large copy reads and writes.

    The target's lines, which a processor may read before it overwrites them, are not counted; a
    step reads what it writes, so it can move more than a copy by this count.
    """
    elements = 2**16 if request.config.getoption("--smoke") else _COPY_ELEMENTS[device_type]
    source = torch.ones(elements, device=device_type)
    target = torch.zeros_like(source)
    copy = Timer(lambda: target.copy_(source), device_type)
    for _ in range(_COPY_ROUNDS):
        copy()
    return 2 * source.nbytes / median(copy.seconds)


@pytest.fixture(autouse=True)
def _freed() -> Iterator[None]:
    """Release one case's gigabytes before the next needs them; cycles hold some."""
    yield
    gc.collect()
    torch.cuda.empty_cache()  # nothing where no device was used


def test_step(
    benchmark: BenchmarkFixture, case: Case, device_type: str, copy_bandwidth: float
) -> None:
    """Time steps of the case, each right after a step of the baseline on tensors of its own."""
    torch.manual_seed(0)
    shapes = case.workload.shapes
    contestant = case.provider.make(parameters(shapes, device_type), case.regime)
    contestant.set_keys(case.regime)
    step = Timer(contestant.step, device_type)
    baseline = Timer(BASELINE.make(parameters(shapes, device_type), NO_BUFFER).step, device_type)

    def step_baseline() -> None:
        if case.regime.every_round:
            contestant.set_keys(case.regime)
        baseline()

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        step, setup=step_baseline, rounds=case.rounds, warmup_rounds=_WARM_UP
    )
    assert contestant.follows(case.regime)
    benchmark.extra_info.update(_result(case, step, baseline))
    if device_type == "cuda":
        benchmark.extra_info.update(launches.of_a_step(contestant.step))
    seconds = benchmark.extra_info["seconds"]
    benchmark.extra_info.update(_byte_model(case, seconds, copy_bandwidth))
    benchmark.extra_info.update(device=machine.device(device_type), versions=machine.versions())


def _result(case: Case, step: Timer, baseline: Timer) -> dict[str, Any]:
    own, other = (timer.seconds[-case.rounds :] for timer in (step, baseline))
    ratios = [mine / its for mine, its in zip(own, other, strict=True)]
    first, second, third = quantiles(ratios, n=4, method="inclusive")
    return {
        "workload": case.workload.name,
        "tensors": len(case.workload.shapes),
        "elements": case.workload.numel,
        "provider": case.provider.name,
        "what": case.provider.what,
        "regime": case.regime.name,
        "rounds": len(ratios),
        "seconds": median(own),
        "baseline_seconds": median(other),
        "host_seconds": median(step.host_seconds[-case.rounds :]),
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
