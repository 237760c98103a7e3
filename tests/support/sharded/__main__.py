"""Start the processes, and write what became of every case as JSON."""

import faulthandler
import gc
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo.backends.debugging  # which torch.compile imports
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from tests.support.sharded import CASES, WORLDS, is_slow

# A hang is a failure within this time, which leaves room for a machine that stands still for a
# minute; before that, every process that hangs says where.
TIMEOUT = timedelta(seconds=180)
STACKS_SECONDS = 100


def _failures_of_all(name: str, failure: str) -> str:
    failures: list[str] = [""] * dist.get_world_size()
    try:
        dist.all_gather_object(failures, failure)
    except RuntimeError as error:
        raise RuntimeError(f"{name} hung in another process; in this one: {failure}") from error
    return "\n".join(filter(None, failures))


def _run(rank: int, world: int, names: list[str], store: str, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    results = {}
    for name in names:
        faulthandler.dump_traceback_later(STACKS_SECONDS)
        try:
            torch.manual_seed(0)
            CASES[name].function(folder)
            failure = ""
        except (Exception, pytest.fail.Exception):
            failure = traceback.format_exc()
        results[name] = _failures_of_all(name, failure)
    faulthandler.cancel_dump_traceback_later()
    if rank == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


def main(folder: Path, all_worlds: bool) -> None:
    """Run the cases of all numbers of processes; four processes save what fewer load.

    They are forks: this process, which has run nothing in threads, has imported everything. They
    look for garbage only among what they make.
    """
    gc.freeze()
    for world in WORLDS:
        served = [name for name, this in CASES.items() if world in this.worlds]
        names = [name for name in served if all_worlds or not is_slow(name, world)]
        store, out = str(folder / f"store{world}"), folder / f"{world}.json"
        if not names:
            # Processes with nothing to run end while others still connect to them, and fail.
            out.write_text("{}")
            continue
        arguments = (world, names, store, folder, out)
        start_processes(_run, arguments, nprocs=world, start_method="fork")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(Path(sys.argv[1]), all_worlds=sys.argv[2] == "all")
