"""Hooks of the throughput benchmarks."""

import pytest

from bench import machine
from bench.cases import Case, cases


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `bench.run`."""
    parser.addoption("--smoke", action="store_true", help="tiny workloads, two rounds")
    parser.addoption(
        "--device",
        choices=machine.DEVICES,
        default=machine.default_device(),
        help="what is measured; a GPU where there is one",
    )
    parser.addoption("--deadline", type=float, help="time.time() from which cases are left out")
    parser.addoption("--record", help="file to which each case adds a line of JSON")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of every case."""
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        of_device = cases(config.getoption("--device"), config.getoption("--smoke"))
        metafunc.parametrize("case", [_param(case) for case in of_device])


def _param(case: Case) -> object:
    marks = [] if case.left_out is None else [pytest.mark.skip(reason=case.left_out)]
    return pytest.param(case, id=case.name, marks=marks)


# pytest-benchmark's own descriptions hold the host's name and the working tree's path.


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> machine.Description:
    """Describe the machine in place of pytest-benchmark."""
    return machine.describe(config.getoption("--device"))


def pytest_benchmark_generate_commit_info() -> dict[str, str]:
    """Name the commit in place of pytest-benchmark."""
    return {"id": machine.versions()["commit"]}
