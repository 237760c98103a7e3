"""The time of a step, paired with one of torch's fused AdamW.

Run by `python -m bench.run`, or alone: `python -m pytest bench/test_throughput.py -k "ResNet"`.
"""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, time
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import bytes as byte_model
from bench import cuda, machine
from bench.cases import Case
from bench.providers import BASELINE, NO_BUFFER, Contestant, parameters

# As in a user's process, where a warning from inside a library shows and a deprecation does not.
pytestmark = pytest.mark.filterwarnings("default", "ignore::DeprecationWarning")

# A provider's second step still prepares: cm_fused hands its tensors to the library, a compiled
# step is compiled. From the third on all steps are alike.
_WARM_UP = 3
_COPY_ELEMENTS = 2**26
_COPY_ROUNDS = 15
# On a GPU the rounds that the host's clock times take no longer than this: they are the lesser
# ones there.
_MOST_WALL_SECONDS = 1.0


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device that is measured."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def copy_bandwidth(request: pytest.FixtureRequest, device: str) -> float:
    """Bytes per second that a large copy reads and writes.

    The target's lines, which a processor may read before it overwrites them, are not counted; a
    step reads what it writes, so it can move more than a copy by this count.
    """
    smoke = request.config.getoption("--smoke")
    if device == "cuda":
        return cuda.copy_bytes_per_second(smoke)
    elements = 2**16 if smoke else _COPY_ELEMENTS
    source, target = torch.ones(elements), torch.zeros(elements)
    seconds = []
    for _ in range(_COPY_ROUNDS):
        start = perf_counter()
        target.copy_(source)
        seconds.append(perf_counter() - start)
    return 2 * source.nbytes / median(seconds)


@pytest.fixture(autouse=True)
def _in_time(request: pytest.FixtureRequest) -> None:
    """Leave a case out when the time of all is up."""
    deadline = request.config.getoption("--deadline")
    if deadline is not None and time() > deadline:
        pytest.skip("the time was up")


@pytest.fixture(autouse=True)
def _freed(device: str) -> Iterator[None]:
    """Release one case's gigabytes before the next needs them; cycles hold some."""
    yield
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def test_step(
    request: pytest.FixtureRequest,
    benchmark: BenchmarkFixture,
    case: Case,
    device: str,
    copy_bandwidth: float,
) -> None:
    """Time steps of the case, each right after a step of the baseline on tensors of its own."""
    torch.manual_seed(0)
    baseline = BASELINE.make(parameters(case.workload.shapes, device), NO_BUFFER)
    contestant = case.provider.make(parameters(case.workload.shapes, device), case.regime)
    contestant.set_keys(case.regime)
    baseline_seconds: list[float] = []

    def step_baseline() -> None:
        if case.regime.every_round:
            contestant.set_keys(case.regime)
        machine.synchronize(device)
        start = perf_counter()
        baseline.step()
        machine.synchronize(device)
        baseline_seconds.append(perf_counter() - start)

    def step_and_wait() -> None:
        contestant.step()
        torch.cuda.synchronize()

    benchmark.pedantic(  # type: ignore[no-untyped-call]
        contestant.step if device == "cpu" else step_and_wait,
        setup=step_baseline,
        rounds=_wall_rounds(case, contestant, device),
        warmup_rounds=_WARM_UP,
    )
    assert benchmark.stats is not None
    seconds = benchmark.stats.stats.data
    baseline_seconds = baseline_seconds[-len(seconds) :]
    info: dict[str, Any] = {}
    if device == "cuda":
        info = {"wall_seconds": median(seconds)}
        rounds = cuda.paired_rounds(baseline.step, contestant.step, case.rounds)
        seconds, baseline_seconds = rounds.seconds, rounds.baseline_seconds
        info |= _only_on_cuda(case, contestant, rounds)
    assert contestant.follows(case.regime)
    info |= _result(case, seconds, baseline_seconds)
    info |= _byte_model(case, median(seconds), copy_bandwidth)
    info |= {"device": machine.describe(device), "versions": machine.versions()}
    benchmark.extra_info.update(info)
    record = request.config.getoption("--record")
    if record is not None:
        with Path(record).open("a") as lines:
            lines.write(json.dumps(info) + "\n")


def _wall_rounds(case: Case, contestant: Contestant, device: str) -> int:
    """Return the number of steps that the host's clock times."""
    if device == "cpu":
        return case.rounds
    contestant.step()
    torch.cuda.synchronize()
    start = perf_counter()
    contestant.step()
    torch.cuda.synchronize()
    return max(2, min(case.rounds, int(_MOST_WALL_SECONDS / (perf_counter() - start))))


def _only_on_cuda(case: Case, contestant: Contestant, rounds: cuda.Rounds) -> dict[str, Any]:
    """Return what only a GPU's cases have. The profiler comes last: it may leave something."""
    state = case.provider.state_copies + 2
    host_seconds = cuda.host_seconds(contestant.step, case.rounds)
    allocations = cuda.allocations(contestant.step)
    return {
        "queued": rounds.queued,
        "host_seconds": host_seconds,
        **allocations,
        # Then the L2, which a step finds as the one before left it, is what is measured.
        "fits_in_cache": 4 * state * case.workload.numel < machine.cache_bytes("cuda"),
        "launches": cuda.launches(contestant.step),
    }


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
