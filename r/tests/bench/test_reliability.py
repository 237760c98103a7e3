"""What the sanitizers run still runs, and what they name is there."""

from collections.abc import Callable

import pytest

from bench.reliability.native import steps, suite
from tests.support.cases import ROOT, needs_cpu_backend


@needs_cpu_backend
@pytest.mark.parametrize("run", steps.SOUND)
def test_runs_of_the_sanitizers(run: Callable[[], None]) -> None:
    """What ThreadSanitizer and valgrind look at."""
    run()


def test_suite_of_the_sanitizers() -> None:
    """Every file that the suite names is there, and the tests of the operators are run."""
    named = [*suite.LEFT_OUT, *suite.DESELECTED, *suite.UNDER_THREAD, *suite.FIRST]
    missing = [name for name in named if not (ROOT / name.split("::")[0]).exists()]
    assert not missing
    files = {file for part in suite.parts(ROOT) for file in part}
    assert files > set(suite.FIRST)
    assert not files & set(suite.LEFT_OUT)
