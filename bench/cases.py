"""Which provider is measured on which workload, in which regime."""

from dataclasses import dataclass, replace

from bench import machine
from bench.providers import BASELINE, Provider, Regime, providers
from bench.workloads import WORKLOADS, Workload

# What a machine can be asked to give to a benchmark.
_MEMORY_SHARE = 0.8
_FLOAT = 4
_MIN_ROUNDS = 3
# A GPU's times scatter little, and the session that lends one is short.
_MAX_ROUNDS = {"cpu": 1000, "cuda": 20}


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


def reason_left_out(workload: Workload, provider: Provider, device_type: str) -> str | None:
    """Return why a provider is not measured on a workload, or None."""
    if provider.max_tensors is not None and len(workload.shapes) > provider.max_tensors:
        return provider.too_many.format(len(workload.shapes))
    # Beside the state: parameters and gradients of both.
    copies = provider.state_copies + BASELINE.state_copies + 4
    needed = copies * _FLOAT * workload.numel
    available = _MEMORY_SHARE * machine.memory_bytes(device_type)
    if needed > available:
        return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are allowed"
    return None


def cases(smoke: bool, device_type: str) -> list[Case]:
    """Return all cases, the left-out ones included.

    Args:
        smoke: Shrink the workloads to nothing.
        device_type: "cpu" or "cuda".
    """
    workloads = [
        replace(workload, rounds=min(workload.rounds, _MAX_ROUNDS[device_type]))
        for workload in WORKLOADS
        if device_type in workload.device_types
    ]
    if smoke:
        workloads = [workload.for_smoke() for workload in workloads]
    return [
        Case(workload, provider, regime, reason_left_out(workload, provider, device_type))
        for workload in workloads
        for provider in providers(device_type)
        for regime in provider.regimes
    ]
