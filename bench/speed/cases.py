"""Which provider is measured on which workload, in which regime."""

from dataclasses import dataclass
from importlib.util import find_spec

from bench import machine
from bench.speed.providers import BASELINE, Provider, Regime, providers
from bench.speed.workloads import Workload, workloads

# What a machine can be asked to give to a benchmark.
_MEMORY_SHARE = 0.8
_FLOAT = 4
_MIN_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """One measurement."""

    workload: Workload
    provider: Provider
    regime: Regime
    left_out: str | None

    @property
    def name(self) -> str:
        """The name of the case."""
        return f"{self.workload.name} | {self.provider.name} | {self.regime.name}"

    @property
    def rounds(self) -> int:
        """The number of timed steps."""
        rounds = round(self.provider.rounds_share * self.workload.rounds)
        return max(rounds, min(_MIN_ROUNDS, self.workload.rounds))


def reason_left_out(workload: Workload, provider: Provider, device: str) -> str | None:
    """Return why a provider is not measured on a workload, or None."""
    if provider.package is not None and find_spec(provider.package) is None:
        return f"{provider.package} is not installed: make bench installs it"
    if provider.limit is not None and len(workload.shapes) > provider.limit.tensors:
        return provider.limit.reason
    # Beside the state: parameters and gradients of both.
    copies = provider.state_copies + BASELINE.state_copies + 4
    needed = copies * _FLOAT * workload.numel
    available = _MEMORY_SHARE * machine.memory_bytes(device)
    if needed > available:
        return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are allowed"
    return None


def cases(device: str, smoke: bool) -> list[Case]:
    """Return all cases, the left-out ones included, the slowest providers' last.

    Args:
        device: "cpu" or "cuda".
        smoke: Shrink the workloads to nothing.
    """
    of_device = workloads(device)
    if smoke:
        of_device = tuple(workload.for_smoke() for workload in of_device)
    return [
        Case(workload, provider, regime, reason_left_out(workload, provider, device))
        for provider in providers(device)
        for workload in of_device
        for regime in provider.regimes
    ]
