"""Long runs, threads and forks."""

import copy
import multiprocessing
import os
import threading
from pathlib import Path

import torch
from torch import Tensor

from bench.torture.finding import Finding, require
from cm_fused import AdamCG, AdamCM, AdamWCM
from cm_fused._critical_adam import CriticalAdam

MIB = 2**20


def leak(quick: bool) -> Finding:
    """Take steps and look at the resident memory."""
    steps = 2_000 if quick else 10_000
    for kind in (AdamCM, AdamCG):
        params, optimizer = _made(kind)
        _take(params, optimizer, 0, 1000)
        before = _resident_bytes()
        _take(params, optimizer, 1000, steps)
        grown = _resident_bytes() - before
        require(grown <= MIB, f"{kind.__name__} grew by {grown / MIB:.2f} MiB in {steps} steps")
    return Finding("memory", 2 * steps, "steps", "resident memory within 1 MiB")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _made(kind: type[CriticalAdam]) -> tuple[list[Tensor], CriticalAdam]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in (5000, 17, 333)]
    return params, kind(params, lr=1e-3)


def _take(params: list[Tensor], optimizer: CriticalAdam, first: int, steps: int) -> None:
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def threads(quick: bool) -> Finding:
    """Step two optimizers in two threads at a time."""
    steps = 200 if quick else 2_000
    kinds = (AdamCM, AdamWCM)
    together = [_made(kind) for kind in kinds]
    workers = [threading.Thread(target=_take, args=(*made, 0, steps)) for made in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for kind, (params, _) in zip(kinds, together, strict=True):
        expected, optimizer = _made(kind)
        _take(expected, optimizer, 0, steps)
        require(all(map(torch.equal, params, expected)), "two threads changed each other's bits")
    return Finding("threads", 2 * steps, "steps in two threads", "the bits of one after the other")


def forks(quick: bool) -> Finding:
    """Step in forked processes, which have one thread as a DataLoader's workers have."""
    count = 3 if quick else 20
    params, optimizer = _made(AdamCM)
    _take(params, optimizer, 0, 3)
    expected, twin = copy.deepcopy((params, optimizer))
    _take(expected, twin, 3, 5)
    context = multiprocessing.get_context("fork")
    for _ in range(count):
        worker = context.Process(target=_step_in_fork, args=(params, optimizer, expected))
        worker.start()
        worker.join(60)
        if worker.is_alive():
            worker.kill()
        require(worker.exitcode == 0, f"a step in a fork ended with {worker.exitcode}")
    return Finding("forks", count, "forked processes that step", "the bits of the parent's steps")


def _step_in_fork(params: list[Tensor], optimizer: CriticalAdam, expected: list[Tensor]) -> None:
    torch.set_num_threads(1)
    _take(params, optimizer, 3, 5)
    require(all(map(torch.equal, params, expected)), "a fork has other bits")
