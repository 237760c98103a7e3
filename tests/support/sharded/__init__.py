"""What the processes of `tests/distributed/test_sharding.py` run: cases over 1, 2 or 4 of them.

Run as a module it starts the processes, and writes what became of every case as JSON.
"""

from tests.support.sharded import (
    checkpoints,
    dtensors,
    fsdp1,
    low_precision,
    masters,
    models,
    recording,
    release,
    sam,
    state_dicts,
    wrappers,
)
from tests.support.sharded.common import Case

WORLDS = (4, 2, 1)
# Every process runs its cases in this order: what saves comes before what loads.
FILES = (
    *(dtensors, low_precision, models, sam, fsdp1, wrappers),
    *(checkpoints, masters, state_dicts, release, recording),
)
CASES: dict[str, Case] = {
    name: value for file in FILES for name, value in vars(file).items() if isinstance(value, Case)
}

# Four processes save what these load.
_LOADS = ("resume", "resume_whole", "flattened_on_fewer", "flattened_on_more")
# Products whose factors another case has.
_PRODUCTS = ("flattened_in_ddp", "every_way_to_set_every_state_dict")


def is_slow(name: str, world: int) -> bool:
    """Return whether a case is left out of the quick tests: it needs four processes, or long."""
    return world == 4 or name in (*_LOADS, *_PRODUCTS)
