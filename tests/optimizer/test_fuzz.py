"""A small part of the campaign's random use of the API, whose machines are `bench.torture.fuzz`.

`test_properties.py` draws runs of steps; here an optimizer is also saved, loaded into another
backend, copied, pickled, resized, moved, and asked for what it must refuse.
"""

import copy
import pickle

import pytest
import torch

from bench.torture.fuzz import ReferenceMachine, UndisturbedMachine, use_at_random
from bench.torture.machine import ApiMachine
from cm_fused import AdamCM
from tests.support.cases import needs_cpu_backend


@needs_cpu_backend
@pytest.mark.parametrize("machine", [ReferenceMachine, UndisturbedMachine])
def test_random_use(machine: type[ApiMachine]) -> None:
    """The whole state stays the model's, whatever is done in between."""
    use_at_random(machine, 8)


def test_float8_slots_are_pickled() -> None:
    """An optimizer with 8-bit float slots comes back from pickle and goes on with the same bits.

    torch pickles no tensor of 8-bit floats. Older tests pickled float32 state only;
    `torch.save` and `copy.deepcopy` of such a state were right.
    """
    param = torch.ones(3, requires_grad=True)
    optimizer = AdamCM([param], buffer_dtype=torch.float8_e4m3fn)
    param.grad = torch.ones(3)
    optimizer.step()
    for copied in (
        pickle.loads(pickle.dumps((param, optimizer))),
        copy.deepcopy((param, optimizer)),
    ):
        other, theirs = copied
        assert theirs.state[other]["critical_buffer"].dtype == torch.float8_e4m3fn
        other.grad = torch.ones(3)
        theirs.step()
        assert theirs.state[other]["step"] == 2
        assert torch.equal(
            theirs.state_dict()["state"][0]["critical_buffer"][0].float(),
            optimizer.state_dict()["state"][0]["critical_buffer"][0].float(),
        )


def test_decoupled_decay_by_a_float32_learning_rate() -> None:
    """The reference decays float64 parameters by 1 - lr * weight_decay of float64.

    Older tests gave a tensor `lr` to float32 parameters, in which the loss does not show.
    """
    lr = torch.tensor(0.1)
    param = torch.ones(1, dtype=torch.float64, requires_grad=True)
    param.grad = torch.zeros_like(param)
    AdamCM([param], lr=lr, weight_decay=0.1, decoupled_weight_decay=True, backend="eager").step()
    assert abs(param.item() - (1 - lr.item() * 0.1)) < 1e-15
