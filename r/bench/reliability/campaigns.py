"""All campaigns, and one of them run: what a new process imports."""

import time
from collections.abc import Callable
from functools import partial

from bench.reliability import damage, drift, kill, more_cases, scale
from bench.reliability.finding import Finding

Campaign = Callable[[], Finding]

# Those that take longest come first.
_OWN = (kill.run, drift.run, scale.many, scale.large, damage.run, damage.files)
# `make test` is the quick run of these.
_OF_TESTS = (
    more_cases.random_use,
    more_cases.magnitudes,
    more_cases.memory,
    more_cases.threads,
    more_cases.forks,
)


def campaigns(quick: bool) -> list[Campaign]:
    """Return the campaigns of a whole or of a quick run."""
    own: list[Campaign] = [partial(campaign, quick) for campaign in _OWN]
    return own if quick else [*own[:2], *_OF_TESTS, *own[2:]]


def run(index: int, quick: bool) -> Finding:
    """Run a campaign, and print its finding and how long it took."""
    start = time.monotonic()
    finding = campaigns(quick)[index]()
    seconds = time.monotonic() - start
    print(f"{finding.line()} ({seconds:.0f} s)", flush=True)
    return finding
