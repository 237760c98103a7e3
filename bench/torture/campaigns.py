"""All campaigns, and one of them run: what a new process imports."""

import time
from collections.abc import Callable

from bench.torture import damage, drift, endurance, fuzz, kill, numbers, operators, scale
from bench.torture.finding import Finding

# Those that take longest come first.
CAMPAIGNS: tuple[Callable[[bool], Finding], ...] = (
    kill.run,
    fuzz.run,
    drift.run,
    operators.run,
    scale.many,
    scale.large,
    numbers.run,
    endurance.leak,
    damage.run,
    damage.files,
    endurance.threads,
    endurance.forks,
)


def run(index: int, quick: bool) -> Finding:
    """Run a campaign, and print its finding and how long it took."""
    start = time.monotonic()
    finding = CAMPAIGNS[index](quick)
    seconds = time.monotonic() - start
    print(f"{finding.line()} ({seconds:.0f} s)", flush=True)
    return finding
