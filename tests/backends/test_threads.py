"""Steps in threads and in forked processes, and what steps keep: parts of the campaign."""

import copy
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.native import steps
from bench.torture import endurance
from cm_fused import AdamCG, AdamCM
from tests.support.cases import needs_cpu_backend, needs_proc
from tests.support.training import assert_same

pytestmark = needs_cpu_backend


def test_threads_step_their_own_optimizers() -> None:
    """Torch calls operators without Python's lock: four threads are in the library at once."""
    endurance.threads(quick=True)


def test_forked_processes_step() -> None:
    """Forks of a process that has stepped in several threads have its parent's bits."""
    torch.set_num_threads(2)
    endurance.forks(quick=True)


@pytest.mark.parametrize(
    "run", [steps.every_kernel, steps.optimizers_in_threads, steps.one_state_in_threads]
)
def test_runs_of_the_sanitizers(run: Callable[[], None]) -> None:
    """What ThreadSanitizer and valgrind look at still runs.

    No older test ran these: one passed an operator too few arguments since its schema had grown.
    """
    run()


def _params() -> list[Tensor]:
    return [torch.ones(n, requires_grad=True) for n in (50, 3)]


@pytest.mark.parametrize("kind", [AdamCM, AdamCG])
def test_saving_while_another_thread_steps(kind: type[AdamCM | AdamCG]) -> None:
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
@pytest.mark.parametrize("use", endurance.USES)
def test_steps_keep_no_memory(use: str) -> None:
    """Of 300 more steps no more objects are left than of the first, nor 1 MiB of memory."""
    torch.set_num_threads(1)
    params, optimizer = endurance.made(AdamCM)
    endurance.step_as(params, optimizer, use, 0, 300)
    before, blocks = endurance.resident_bytes(), sys.getallocatedblocks()
    endurance.step_as(params, optimizer, use, 300, 300)
    assert endurance.resident_bytes() - before <= endurance.MIB
    assert sys.getallocatedblocks() - blocks < 300
