"""A small part of the campaign's random use of the API, whose machines are `bench.torture.fuzz`.

`test_properties.py` draws runs of steps; here an optimizer is also saved, loaded into another
backend, copied, pickled, resized, moved, and asked for what it must refuse.
"""

import pytest

from bench.torture.fuzz import ReferenceMachine, UndisturbedMachine, use_at_random
from bench.torture.machine import ApiMachine
from tests.cases import needs_cpu_backend


@needs_cpu_backend
@pytest.mark.parametrize("machine", [ReferenceMachine, UndisturbedMachine])
def test_random_use(machine: type[ApiMachine]) -> None:
    """The whole state stays the model's, whatever is done in between."""
    use_at_random(machine, 8)
