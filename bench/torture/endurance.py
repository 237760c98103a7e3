"""Long runs, threads and forks."""

import copy
import gc
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.torture.finding import Finding, require
from cm_fused import AdamCG, AdamCM, AdamWCM
from cm_fused._optimizer.base import CriticalAdam

MIB = 2**20
# Of the parameters; the first is several chunks, which threads share.
SIZES = (40_000, 17, 333)


# Besides steps: what an optimizer makes anew, and could keep.
USES = ("plain", "saving", "rebuilding")


def leak(quick: bool) -> Finding:
    """Take steps and look at the resident memory, also while saving and rebuilding plans.

    Each in a process of its own: what another use left free would hide growth.
    """
    steps = 1_000 if quick else 10_000
    kinds = (AdamCM, AdamCG)
    context = multiprocessing.get_context("spawn")
    most = context.Value("q", 0)
    for kind in kinds:
        for use in USES:
            worker = context.Process(target=_look_at_memory, args=(kind, use, steps, most))
            worker.start()
            worker.join()
            require(worker.exitcode == 0, f"{kind.__name__}, {use}: exit status {worker.exitcode}")
    return Finding(
        "memory",
        len(kinds) * len(USES) * steps,
        "steps: plain, with state dicts saved, with gradients that come and go",
        f"resident memory within 1 MiB (grown by {most.value / MIB:.2f} at most)",
    )


def _look_at_memory(kind: type[CriticalAdam], use: str, steps: int, most: Any) -> None:
    torch.set_num_threads(1)
    params, optimizer = made(kind)
    step_as(params, optimizer, use, 0, 1000)
    before = resident_bytes()
    step_as(params, optimizer, use, 1000, steps)
    grown = resident_bytes() - before
    require(grown <= MIB, f"{kind.__name__}, {use}: {grown / MIB:.2f} MiB in {steps} steps")
    most.value = max(most.value, grown)


def step_as(
    params: list[Tensor], optimizer: CriticalAdam, use: str, first: int, steps: int
) -> None:
    """Take steps, with what a use does besides."""
    for t in range(first, first + steps):
        _take(params, optimizer, t, 1)
        if use == "saving":
            optimizer.state_dict()
        elif use == "rebuilding":
            params[t % len(params)].grad = None
            optimizer.step()


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def made(kind: type[CriticalAdam]) -> tuple[list[Tensor], CriticalAdam]:
    """Return parameters and their optimizer."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in SIZES]
    return params, kind(params, lr=1e-3)


def _take(params: list[Tensor], optimizer: CriticalAdam, first: int, steps: int) -> None:
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def threads(quick: bool) -> Finding:
    """Step optimizers in threads, which run in the library at the same time.

    Torch calls operators without Python's lock: no free-threaded Python is needed for that.
    """
    steps = 50 if quick else 1_000
    kinds = (AdamCM, AdamWCM, AdamCG, AdamCM)
    together = [made(kind) for kind in kinds]
    start = threading.Barrier(len(kinds))
    failures: list[BaseException] = []

    def work(params: list[Tensor], optimizer: CriticalAdam) -> None:
        try:
            start.wait()
            _take(params, optimizer, 0, steps)
        except BaseException as error:  # which a thread would only print
            failures.append(error)

    workers = [threading.Thread(target=work, args=made) for made in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    require(not failures, f"a thread failed: {failures}")
    for kind, (params, optimizer) in zip(kinds, together, strict=True):
        expected, twin = made(kind)
        _take(expected, twin, 0, steps)
        require(_same(params, optimizer, expected, twin), "threads changed each other's bits")
    return Finding(
        "threads",
        len(kinds) * steps,
        f"steps in {len(kinds)} threads",
        "the bits of one after the other, of parameters and state",
    )


def _same(
    params: list[Tensor], optimizer: CriticalAdam, expected: list[Tensor], twin: CriticalAdam
) -> bool:
    states = [o.state_dict()["state"] for o in (optimizer, twin)]
    return all(map(torch.equal, params, expected)) and all(
        torch.equal(value, states[1][i][key])
        for i, state in states[0].items()
        for key, value in state.items()
    )


def forks(quick: bool) -> Finding:
    """Step in forked processes, which have one thread as a DataLoader's workers have.

    The parent has stepped in several threads before it forks, and steps on while they do.
    """
    count = 3 if quick else 20
    params, optimizer = made(AdamCM)
    _take(params, optimizer, 0, 3)
    context = multiprocessing.get_context("fork")
    for i in range(count):
        expected, twin = copy.deepcopy((params, optimizer))
        first = 3 + 5 * i
        _take(expected, twin, first, 5)
        worker = context.Process(
            target=_step_in_fork, args=(params, optimizer, first, expected, twin)
        )
        worker.start()
        _take(params, optimizer, first, 5)
        worker.join(60)
        if worker.is_alive():
            worker.kill()
        require(worker.exitcode == 0, f"a step in a fork ended with {worker.exitcode}")
        require(_same(params, optimizer, expected, twin), "a fork changed its parent's bits")
    return Finding("forks", count, "forked processes that step", "the bits of the parent's steps")


def _step_in_fork(
    params: list[Tensor],
    optimizer: CriticalAdam,
    first: int,
    expected: list[Tensor],
    twin: CriticalAdam,
) -> None:
    torch.set_num_threads(1)
    _take(params, optimizer, first, 5)
    require(_same(params, optimizer, expected, twin), "a fork has other bits")
