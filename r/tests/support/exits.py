"""Sharded trainings whose processes exit at once: what `tests/distributed/test_exits.py` runs.

Run as a module it forks two processes for each run, which train, destroy the process group and end
as a script does, their interpreter finalized. Prints what was run and the exit codes.
"""

import atexit
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which fully_shard imports
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cm_fused import AdamWCG, AdamWCM

WORLD = 2
STEPS = 3
# How long one process waits with its last step, at most, for the other one to end.
LATENESS_SECONDS = 1.0
# An optimizer, the scope of its norms, whether it is still there when the process ends, and whether
# one process is late, so that the last sum ends as the other one does, if that does not wait.
RUNS: tuple[tuple[Any, str, bool, bool], ...] = (
    *[(AdamWCM, "group", False, True)] * 3,
    *[(AdamWCM, "group", True, True)] * 3,
    *[(AdamWCM, "tensor", False, True)] * 2,
    *[(AdamWCM, "group", False, False)] * 4,
    *[(AdamWCM, "tensor", True, False)] * 2,
    *[(AdamWCG, "group", False, False)] * 3,
    *[(AdamWCG, "group", True, False)] * 3,
)
# What is still there when the interpreter is finalized.
_alive: list[Any] = []


def _hold_the_interpreter(file: Path) -> None:
    """Let the late process step, and have its sum end while this one runs Python to the end."""
    file.touch()
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass


def _train(cls: Any, scope: str, keep: bool, ending: Path | None) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    model: Any = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    optimizer = cls(model.parameters(), priority_scope=scope)
    for t in range(STEPS):
        optimizer.zero_grad()
        model(torch.ones(8, 16)).pow(2).mean().backward()
        if t == STEPS - 1 and ending is not None:
            _be_late(ending)
        optimizer.step()
    if keep:
        _alive.append(optimizer)


def _be_late(ending: Path) -> None:
    if dist.get_rank() == 0:
        return
    until = time.monotonic() + LATENESS_SECONDS
    while time.monotonic() < until and not ending.exists():
        time.sleep(0.005)


def _run(rank: int, name: Path, cls: Any, scope: str, keep: bool, late: bool) -> None:
    warnings.simplefilter("ignore")
    # No thread gets the interpreter lock unless another one gives it up by itself.
    sys.setswitchinterval(60.0)
    ending = name.with_suffix(".ending") if late else None
    if ending is not None and rank == 0:
        # The first to be registered is the last to be called.
        atexit.register(_hold_the_interpreter, ending)
    dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=WORLD)
    _train(cls, scope, keep, ending)
    dist.destroy_process_group()


def _fork_all(folder: Path) -> Iterator[str | None]:
    """Fork the processes of every run; yield what became of it, and None in the processes."""
    for i, (cls, scope, keep, late) in enumerate(RUNS):
        children = []
        for rank in range(WORLD):
            child = os.fork()
            if not child:
                _run(rank, folder / str(i), cls, scope, keep, late)
                yield None
                return
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        yield f"{cls.__name__} {scope} {keep=} {late=}: {codes}"


def main(folder: Path) -> None:
    """Run all; returns in each of the processes."""
    torch.set_num_threads(1)
    for text in _fork_all(folder):
        if text is None:
            return
        print(text, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
