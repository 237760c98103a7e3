"""What a step asks of a CUDA device: launches, copies, allocations, memory."""

from collections.abc import Callable
from typing import Any

import torch

# What the CUDA runtime and driver call handing work to the device.
_CALLS = ("Launch", "Memcpy", "Memset")


def of_a_step(step: Callable[[], object]) -> dict[str, Any]:
    """Profile one step in steady state.

    Returns:
        `device_operations`: kernels, copies and memsets on the device, by name and number;
        `host_launches`: calls that hand work to it, a graph's replay being one;
        `allocations`, and `peak_growth_bytes` beyond what was allocated before.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()
    step()
    after = torch.cuda.memory_stats()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    operations: dict[str, int] = {}
    host_launches = 0
    for event in profile.events() or []:
        if event.device_type.name == "CUDA":
            operations[event.name] = operations.get(event.name, 0) + 1
        elif event.name.startswith("cu") and any(call in event.name for call in _CALLS):
            host_launches += 1
    return {
        "device_operations": sum(operations.values()),
        "device_operation_names": dict(list(operations.items())[:8]),
        "host_launches": host_launches,
        "allocations": after["allocation.all.allocated"] - before["allocation.all.allocated"],
        "peak_growth_bytes": after["allocated_bytes.all.peak"]
        - before["allocated_bytes.all.current"],
    }
