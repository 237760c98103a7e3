"""Flattened optimizer state dicts, torchtitan's form, in one process; others in support/sharded.

torch reads a flattened state dict by the keys of the optimizer that is to load it, of its groups
and of its states: a key that was not saved is a KeyError of torch's, or an empty dict.
"""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cm_fused import AdamCG, AdamCM
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_CM
from tests.support.training import (
    BACKENDS,
    KINDS,
    NUM_FIRST_GROUP,
    assert_same,
    give_gradients,
    new_params,
    params_of,
    train,
    trained,
)

pytestmark = pytest.mark.sampled

FLATTENED = StateDictOptions(flatten_optimizer_state_dict=True)
HALF, TOTAL = 5, 9
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 slots": {"buffer_dtype": torch.bfloat16},
    "int8": {"buffer_dtype": torch.int8, "moment_dtype": torch.int8, "capacity": 12},
    "int4": {"buffer_dtype": "int4", "moment_dtype": torch.bfloat16},
    "float8": {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.bfloat16},
    "kahan": {"dtype": torch.bfloat16, "low_precision_update": "kahan"},
    "split": {"dtype": torch.bfloat16, "low_precision_update": "split"},
    "stochastic": {"dtype": torch.bfloat16, "low_precision_update": "stochastic", "seed": 7},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.1},
    "clipped": {"skip_nonfinite": True, "max_grad_norm": 1.0},
    "tensor lr": {"lr": torch.tensor(0.03), "amp_scaling": True},
}


class _Model(nn.Module):
    """The parameters of `tests.support.training` under names, in two groups."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.params = nn.ParameterList(new_params(dtype))

    def groups(self) -> list[dict[str, Any]]:
        """Return param groups that differ in an option."""
        params = list(self.params)
        return [
            {"params": params[:NUM_FIRST_GROUP]},
            {"params": params[NUM_FIRST_GROUP:], "priority_scope": "tensor"},
        ]


def _new(cls: type[CriticalAdam], **options: Any) -> tuple[_Model, CriticalAdam]:
    model = _Model(options.pop("dtype", torch.float32))
    return model, cls(model.groups(), **{"lr": 0.02, "capacity": 3, **copy.deepcopy(options)})


def _saved(model: nn.Module, optimizer: CriticalAdam) -> dict[str, Any]:
    state: Any = get_optimizer_state_dict(model, optimizer, options=FLATTENED)
    assert all("." in key for key in state)
    return copy.deepcopy(state)


def _load(model: nn.Module, optimizer: CriticalAdam, source: nn.Module, state: Any) -> None:
    model.load_state_dict(source.state_dict())
    set_optimizer_state_dict(model, optimizer, state, options=FLATTENED)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_a_flattened_state_dict_resumes(cls: type[CriticalAdam], backend: str, name: str) -> None:
    """A resumed run is the uninterrupted one; loading was a KeyError of torch's.

    Older tests loaded state dicts by groups, where torch does not look for the loader's keys.
    """
    options = {**PRECISIONS[name], "backend": backend}
    model, optimizer = _new(cls, **options)
    train(optimizer, range(HALF))
    state, at_half = _saved(model, optimizer), copy.deepcopy(model)
    train(optimizer, range(HALF, TOTAL))
    for steps_before in (0, 2):
        other, resumed = _new(cls, **options)
        train(resumed, range(steps_before))
        _load(other, resumed, at_half, copy.deepcopy(state))
        train(resumed, range(HALF, TOTAL))
        assert_same(trained(resumed), trained(optimizer))
        assert [group["backend"] for group in resumed.param_groups] == [backend, backend]


@pytest.mark.parametrize(("backend", "other"), list(itertools.permutations(BACKENDS, 2)))
def test_another_backend_loads_a_flattened_state_dict(backend: str, other: str) -> None:
    """Keys that only one backend's state has are made anew; torch gives an empty dict for them."""
    source, optimizer = _new(AdamCM, backend=backend, capacity=5)
    train(optimizer, range(HALF))
    flattened, by_groups = (_new(AdamCM, backend=other, capacity=5) for _ in range(2))
    for _, each in (flattened, by_groups):
        train(each, range(2))
    by_groups[0].load_state_dict(source.state_dict())
    by_groups[1].load_state_dict(optimizer.state_dict())
    _load(*flattened, source, _saved(source, optimizer))
    for key in ("exp_avg", "critical_buffer", "priorities"):
        for i, expected in by_groups[1].state_dict()["state"].items():
            assert_same(flattened[1].state_dict()["state"][i][key], expected[key])
    train(flattened[1], range(HALF, TOTAL))


@pytest.mark.parametrize("saved_with", [False, True])
@pytest.mark.parametrize("loaded_with", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_skipped_steps_in_any_order(
    saved_with: bool, loaded_with: bool, steps: int, steps_before: int
) -> None:
    """A count is saved and loaded whoever has one: a group has it only after a step that counts.

    Older tests saved and loaded with the same options, after as many kinds of steps.
    """
    source, optimizer = _new(AdamCM, skip_nonfinite=saved_with)
    train(optimizer, range(steps))
    if saved_with:
        give_gradients(optimizer, 0)
        params_of(optimizer)[0].grad = torch.full_like(params_of(optimizer)[0], torch.nan)
        optimizer.step()
    model, other = _new(AdamCM, skip_nonfinite=loaded_with)
    train(other, range(steps_before))
    _load(model, other, source, _saved(source, optimizer))
    for group in other.param_groups:
        assert group["skip_nonfinite"] == saved_with
        if loaded_with:
            assert group["skipped_steps"] == saved_with
    train(other, range(3))


@pytest.mark.parametrize("cls", [AdamCM, AdamCG, Adam_CM])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_saved_group_has_every_key_of_a_live_one(cls: Any, steps: int) -> None:
    """What a live group has is saved, the options of the process by neutral values."""
    model = _Model()
    optimizer = cls(model.groups(), lr=0.01)
    optimizer.param_groups[0]["backend"] = "eager"
    train(optimizer, range(steps))
    for live, saved in zip(
        optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True
    ):
        assert live.keys() <= saved.keys()
        assert (saved["backend"], saved["amp_scaling"]) == (None, False)
