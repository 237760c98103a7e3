"""The cases of `bench.speed.throughput` under pytest-benchmark.

`python -m pytest bench/speed/test_throughput.py -k "ResNet and AdamCM"`, with any of its options.
"""

from functools import partial

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.speed import throughput
from bench.speed.cases import Case, cases
from bench.timing import MIN_ROUNDS, Step, Timed, by_host_clock, interleave

# As in a user's process: warnings inside a library are no errors, deprecations are not shown.
pytestmark = pytest.mark.filterwarnings("default", "ignore::DeprecationWarning")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every case that the machine can measure."""
    option = metafunc.config.getoption
    measured = [c for c in cases(option("--device"), option("--smoke")) if c.left_out is None]
    metafunc.parametrize("case", measured, ids=[case.name for case in measured])


def test_step(case: Case, benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> None:
    """Time the steps of a case; `extra_info` has the rest of what `bench.speed` reports."""
    device, smoke = map(pytestconfig.getoption, ("--device", "--smoke"))
    benchmark.group = case.workload.name
    bandwidth = throughput.copy_bytes_per_second(device, smoke)
    info = throughput.measure(case, device, bandwidth, partial(_interleave, benchmark))
    benchmark.extra_info.update(info)
    throughput.free_memory(device)


def _interleave(
    benchmark: BenchmarkFixture,
    steps: dict[str, Step],
    rounds: int,
    *,
    warm_up: int,
    before_round: Step,
    most_seconds: float,
) -> Timed:
    """Do what `bench.timing.interleave` does, but have pytest-benchmark time the own step."""
    # Two rounds tell how many fit into the time: pytest-benchmark has to know before.
    first = interleave(steps, 2, warm_up=warm_up, before_round=before_round)
    fitting = most_seconds / sum(first.median(name) for name in steps)
    rounds = min(rounds, max(MIN_ROUNDS, int(min(rounds, fitting))))
    baseline = {"baseline": steps["baseline"]}
    seconds: list[float] = []

    def take_baseline() -> None:
        before_round()
        seconds.extend(by_host_clock(baseline).values())

    benchmark.pedantic(steps["own"], setup=take_baseline, rounds=rounds)  # type: ignore[no-untyped-call]
    if benchmark.stats is None:  # --benchmark-disable
        return first
    # --benchmark-cprofile adds a round that is not timed.
    return Timed({"baseline": seconds[:rounds], "own": list(benchmark.stats.stats.data)})
