"""Steps in threads and in forked processes, and what steps keep; a campaign takes more of them."""

import copy
import gc
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM, AdamWCM
from tests.support.cases import needs_cpu_backend, needs_proc
from tests.support.effort import effort, record_cases
from tests.support.training import assert_same, trained

pytestmark = needs_cpu_backend

Kind = type[AdamCM | AdamCG]
Made = tuple[list[Tensor], AdamCM | AdamCG]
# The parameters' shapes; the first is several chunks, which threads share.
SIZES = (40_000, 17, 333)
MIB = 2**20


def _made(kind: Kind) -> Made:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).requires_grad_() for n in SIZES]
    return params, kind(params, lr=1e-3)


def _take(made: Made, first: int, steps: int) -> None:
    params, optimizer = made
    for t in range(first, first + steps):
        generator = torch.Generator().manual_seed(t)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def test_threads_step_their_own_optimizers() -> None:
    """Torch calls operators without Python's lock: four threads are in the library at once.

    No free-threaded Python is needed for that. The bits are those of one after the other.
    """
    steps = effort(50, 1000)
    kinds: tuple[Kind, ...] = (AdamCM, AdamWCM, AdamCG, AdamCM)
    together = [_made(kind) for kind in kinds]
    start = threading.Barrier(len(kinds))
    failures: list[BaseException] = []

    def work(made: Made) -> None:
        try:
            start.wait()
            _take(made, 0, steps)
        except BaseException as error:  # which a thread would only print
            failures.append(error)

    workers = [threading.Thread(target=work, args=(made,)) for made in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for kind, made in zip(kinds, together, strict=True):
        twin = _made(kind)
        _take(twin, 0, steps)
        assert_same(trained(made[1]), trained(twin[1]))
    record_cases(len(kinds) * steps)


def test_forked_processes_step() -> None:
    """A forked process that steps has its parent's bits.

    It has one thread, as a DataLoader's workers have. The parent has stepped in several before it
    forks, and steps on meanwhile.
    """
    torch.set_num_threads(2)
    forks = effort(3, 20)
    made = _made(AdamCM)
    _take(made, 0, 3)
    context = multiprocessing.get_context("fork")
    for first in range(3, 3 + 5 * forks, 5):
        twin = copy.deepcopy(made)
        _take(twin, first, 5)
        worker = context.Process(target=_step_in_fork, args=(made, first, twin))
        worker.start()
        _take(made, first, 5)
        worker.join(60)
        if worker.is_alive():
            worker.kill()
        assert worker.exitcode == 0
        assert_same(trained(made[1]), trained(twin[1]))
    record_cases(forks)


def _step_in_fork(made: Made, first: int, twin: Made) -> None:
    torch.set_num_threads(1)
    _take(made, first, 5)
    assert_same(trained(made[1]), trained(twin[1]))


def _params() -> list[Tensor]:
    return [torch.ones(n, requires_grad=True) for n in (50, 3)]


@pytest.mark.parametrize("kind", [AdamCM, AdamCG])
def test_saving_while_another_thread_steps(kind: Kind) -> None:
    """A copy of another optimizer's state dict, taken while one steps, has none of its bits."""
    params, others = _params(), _params()
    optimizer, other = kind(params), kind(others)
    for param in (*params, *others):
        param.grad = torch.ones_like(param)
    other.step()
    expected = copy.deepcopy(other.state_dict())
    thread = threading.Thread(target=lambda: [optimizer.step() for _ in range(200)])
    thread.start()
    seen = [copy.deepcopy(other.state_dict()) for _ in range(20)]
    thread.join()
    assert_same(seen, [expected] * 20)


@needs_proc
@pytest.mark.parametrize("use", ["plain", "saving", "rebuilding"])
@pytest.mark.parametrize("kind", [AdamCM, AdamCG])
def test_steps_keep_no_memory(kind: Kind, use: str) -> None:
    """Steps leave no more objects and less than 1 MiB, also while saving and rebuilding plans."""
    torch.set_num_threads(1)
    made, warm_up, steps = _made(kind), effort(300, 1000), effort(300, 10_000)
    _use(made, use, 0, warm_up)
    before, blocks = _resident_bytes(), sys.getallocatedblocks()
    _use(made, use, warm_up, steps)
    assert _resident_bytes() - before <= MIB
    assert sys.getallocatedblocks() - blocks < 300
    record_cases(steps)


def _use(made: Made, use: str, first: int, steps: int) -> None:
    """Take steps, with what makes an optimizer make something anew, which it could keep."""
    params, optimizer = made
    for t in range(first, first + steps):
        _take(made, t, 1)
        if use == "saving":
            optimizer.state_dict()
        elif use == "rebuilding":
            params[t % len(params)].grad = None
            optimizer.step()


def _resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
