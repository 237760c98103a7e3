"""Files of torch.distributed.checkpoint, in one process; others in support/sharded.

torch reads a file into the tensors of the optimizer that is to load it, and casts what it reads.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cm_fused import AdamCG, AdamCM
from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Saved and loading options: those of codes that fit the other's tensors, so that torch reads them.
CONVERSIONS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"moment_dtype": "int8"}, {}),
    ({"moment_dtype": "int8"}, {"moment_dtype": "bfloat16"}),
    ({"buffer_dtype": "int8", "capacity": 2}, {"capacity": 2}),
    ({"buffer_dtype": "int8"}, {"buffer_dtype": "float16"}),
    ({"buffer_dtype": "float8_e4m3fn"}, {"buffer_dtype": "bfloat16"}),
    ({"buffer_dtype": "float8_e4m3fn"}, {"buffer_dtype": "int8"}),
)


def _new(cls: type[CriticalAdam], options: dict[str, Any]) -> tuple[nn.Module, CriticalAdam]:
    torch.manual_seed(0)
    model = nn.Linear(5, 6)
    return model, cls(model.parameters(), **{"lr": 1e-2, **options})


def _train(model: nn.Module, optimizer: CriticalAdam, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()


def _read(
    folder: Path, model: nn.Module, optimizer: CriticalAdam, options: StateDictOptions
) -> None:
    """Load a file as torch's documentation says."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


def _saved(
    folder: Path, cls: type[CriticalAdam], saved: dict[str, Any], options: StateDictOptions
) -> tuple[nn.Module, CriticalAdam]:
    model, optimizer = _new(cls, saved)
    _train(model, optimizer, range(8))
    state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    save(state, checkpoint_id=folder, no_dist=True)
    return model, optimizer


on_both_forms = pytest.mark.parametrize("flatten", [False, True])


@on_both_forms
@pytest.mark.parametrize("saved", [{}, *(saved for saved, _ in CONVERSIONS)], ids=str)
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
def test_a_file_resumes(
    tmp_path: Path, cls: type[CriticalAdam], saved: dict[str, Any], flatten: bool
) -> None:
    """An optimizer of the same dtypes goes on with the bits of the run that was not interrupted."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = _saved(tmp_path, cls, saved, options)
    other, resumed = _new(cls, saved)
    other.load_state_dict(model.state_dict())
    _read(tmp_path, other, resumed, options)
    for each in ((model, optimizer), (other, resumed)):
        _train(*each, range(8, 12))
    assert_same(list(other.parameters()), list(model.parameters()))


@on_both_forms
@pytest.mark.parametrize(("saved", "loading"), CONVERSIONS, ids=str)
def test_codes_are_not_taken_for_values(
    tmp_path: Path, saved: dict[str, Any], loading: dict[str, Any], flatten: bool
) -> None:
    """A file of codes is refused by an optimizer of other dtypes, whose tensors hold the codes.

    It loaded, with a warning that it was converted, and the next steps made parameters NaN. Older
    tests converted state dicts, whose tensors are those that were saved.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = _saved(tmp_path, AdamCM, saved, options)
    other, resumed = _new(AdamCM, loading)
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="copies codes without their scales"):
        _read(tmp_path, other, resumed, options)
    # The remedy that the message names.
    reading = _new(AdamCM, saved)
    _read(tmp_path, *reading, options)
    with pytest.warns(UserWarning, match="is converted to"):
        resumed.load_state_dict(reading[1].state_dict())
    for each in ((model, optimizer), (other, resumed)):
        _train(*each, range(8, 12))
    for own, expected in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=0.0, atol=1e-2)
