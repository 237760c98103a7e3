"""A step needs no memory beside the state."""

import subprocess
import sys

import pytest

from tests.support.cases import ROOT, Kind, needs_cpu_backend, needs_proc

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


NUMEL = 8 * MIB


@needs_proc
@pytest.mark.parametrize(("kind", "amsgrad"), [("cm", False), ("cg", True)])
def test_step_takes_no_memory(kind: Kind, amsgrad: bool) -> None:
    """The peak of a step grows by less than 1 MiB and 1 % of the state."""
    growth = _growth(kind, "cpu", amsgrad=amsgrad, numel=NUMEL)
    # Five slots, two moments, a running sum, and amsgrad's maximum.
    state_bytes = 4 * NUMEL * (5 + 3 + amsgrad)
    assert growth < MIB + state_bytes // 100


@needs_proc
def test_the_measure_sees_a_copy() -> None:
    """The eager step, which makes temporary tensors, grows by at least one of them."""
    assert _growth("cm", "eager", amsgrad=False, numel=NUMEL) > 4 * NUMEL
