"""Options of the pytest-benchmark cases, and what their saved results say of the machine."""

import pytest

from bench import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that `bench.speed` has too."""
    parser.addoption("--smoke", action="store_true", help="tiny workloads, two rounds")
    parser.addoption("--device", choices=machine.DEVICES, default=machine.default_device())


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> machine.Description:
    """Describe the machine; pytest-benchmark's own description holds the host's name."""
    return machine.describe(config.getoption("--device"))


def pytest_benchmark_generate_commit_info() -> dict[str, str]:
    """Name the commit; pytest-benchmark's own description holds the tree's path."""
    return {"id": machine.versions()["commit"]}
