"""Hooks of the throughput benchmarks."""

import pytest

from bench import machine
from bench.cases import Case, cases


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for a run that only shows that everything runs, and the device's."""
    parser.addoption("--smoke", action="store_true", help="tiny workloads, two rounds")
    parser.addoption("--device", choices=("cpu", "cuda"), default=machine.default_device())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every case."""
    if "case" in metafunc.fixturenames:
        options = (metafunc.config.getoption(name) for name in ("--smoke", "--device"))
        metafunc.parametrize("case", [_param(case) for case in cases(*options)])


def _param(case: Case) -> object:
    marks = [] if case.left_out is None else [pytest.mark.skip(reason=case.left_out)]
    return pytest.param(case, id=case.name, marks=marks)


# pytest-benchmark's own descriptions hold the host's name and the working tree's path.


def pytest_benchmark_generate_machine_info(
    config: pytest.Config,
) -> dict[str, str | int | float]:
    """Describe the machine in place of pytest-benchmark."""
    return machine.device(config.getoption("--device"))


def pytest_benchmark_generate_commit_info() -> dict[str, str]:
    """Name the commit in place of pytest-benchmark."""
    return {"id": machine.versions()["commit"]}
