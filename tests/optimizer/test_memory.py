"""A step needs no memory beside the state."""

import json
import subprocess
import sys
from functools import cache

import pytest

from tests.support.cases import ROOT, Kind, needs_cpu_backend, needs_proc

pytestmark = needs_cpu_backend

MIB = 2**20

NUMEL = 8 * MIB
# The kind, the backend, amsgrad.
RUNS: tuple[tuple[Kind, str, bool], ...] = (
    ("cm", "cpu", False),
    ("cg", "cpu", True),
    ("cm", "eager", False),
)

# Prints by how many bytes the peak in some steps exceeds what the process held before them, each
# run in a fork. The first step makes the state; its peak counts too, as it cannot be taken back.
_MEASURE = """
import json
import os
import sys
import torch
from cm_fused import AdamCG, AdamCM

numel, runs = json.loads(sys.argv[1])


def status(name):
    with open("/proc/self/status") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def growth(kind, backend, amsgrad):
    param = torch.empty(numel).fill_(1.0)
    param.grad = torch.empty(numel).fill_(0.1)
    optimizer = {"cm": AdamCM, "cg": AdamCG}[kind]([param], amsgrad=amsgrad, backend=backend)
    optimizer.step()
    before = status("VmRSS:")
    for _ in range(3):
        param.grad.mul_(1.5)
        optimizer.step()
    # Not getrusage: its peak is inherited from the process that started this one.
    return status("VmHWM:") - before


for run in runs:
    child = os.fork()
    if not child:
        print(growth(*run), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@cache
def _growths() -> dict[tuple[Kind, str, bool], int]:
    command = [sys.executable, "-c", _MEASURE, json.dumps([NUMEL, RUNS])]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(RUNS, map(int, result.stdout.split()), strict=True))


@needs_proc
@pytest.mark.parametrize(("kind", "amsgrad"), [("cm", False), ("cg", True)])
def test_step_takes_no_memory(kind: Kind, amsgrad: bool) -> None:
    """The peak of a step grows by less than 1 MiB and 1 % of the state."""
    growth = _growths()[kind, "cpu", amsgrad]
    # Five slots, two moments, a running sum, and amsgrad's maximum.
    state_bytes = 4 * NUMEL * (5 + 3 + amsgrad)
    assert growth < MIB + state_bytes // 100


@needs_proc
def test_the_measure_sees_a_copy() -> None:
    """The eager step, which makes temporary tensors, grows by at least one of them."""
    assert _growths()["cm", "eager", False] > 4 * NUMEL
