"""A step needs no memory beside the state, and the state no more than its formula."""

import subprocess
import sys

import pytest
import torch

from tests.support.cases import (
    KINDS,
    ROOT,
    Event,
    Kind,
    make_gradients,
    make_optimizer,
    make_params,
    needs_cpu_backend,
    needs_proc,
)
from tests.support.oracle import Options

pytestmark = needs_cpu_backend

MIB = 2**20

# Prints by how many bytes the process's peak in some steps exceeds what it held before them. The
# first step makes the state; its peak counts too, since a peak cannot be taken back.
_MEASURE = """
import sys
import torch
from cm_fused import AdamCG, AdamCM

kind, backend, amsgrad, numel = sys.argv[1], sys.argv[2], sys.argv[3] == "True", int(sys.argv[4])
param = torch.empty(numel).fill_(1.0)
param.grad = torch.empty(numel).fill_(0.1)
optimizer = {"cm": AdamCM, "cg": AdamCG}[kind]([param], amsgrad=amsgrad, backend=backend)
optimizer.step()

def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

before = status("VmRSS:")
for _ in range(3):
    param.grad.mul_(1.5)
    optimizer.step()
# Not getrusage: its peak is inherited from the process that started this one.
print(status("VmHWM:") - before)
"""


def _growth(kind: Kind, backend: str, *, amsgrad: bool, numel: int) -> int:
    arguments = [kind, backend, str(amsgrad), str(numel)]
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def _state_bytes(capacity: int, numel: int, *, amsgrad: bool) -> int:
    return 4 * numel * (capacity + 3 + amsgrad)


NUMEL = 8 * MIB


@needs_proc
@pytest.mark.parametrize(("kind", "amsgrad"), [("cm", False), ("cg", True)])
def test_step_takes_no_memory(kind: Kind, amsgrad: bool) -> None:
    """The peak of a step grows by less than 1 MiB and 1 % of the state."""
    growth = _growth(kind, "cpu", amsgrad=amsgrad, numel=NUMEL)
    assert growth < MIB + _state_bytes(5, NUMEL, amsgrad=amsgrad) // 100


@needs_proc
def test_the_measure_sees_a_copy() -> None:
    """The eager step, which makes temporary tensors, grows by at least one of them."""
    assert _growth("cm", "eager", amsgrad=False, numel=NUMEL) > 4 * NUMEL


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("capacity", [1, 4, 5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_state_bytes(kind: Kind, capacity: int, amsgrad: bool) -> None:
    """The state is C slots, two moments and at most one sum, and amsgrad's maximum, in float32.

    Beside them a key for each slot and the step, 4 bytes each.
    """
    numel = 1000
    params = make_params([(numel,)])
    optimizer = make_optimizer(params, Options(kind, capacity=capacity, amsgrad=amsgrad), "cpu")
    for grads in make_gradients(params, [Event()] * 2):
        params[0].grad = grads[0]
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == len(state)
    size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert size <= _state_bytes(capacity, numel, amsgrad=amsgrad) + 4 * capacity + 4
