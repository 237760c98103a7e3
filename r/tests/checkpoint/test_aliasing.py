"""Whose tensors are whose: a state dict that was taken stays what it is, whatever is loaded."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused import SAM, AdamCG, AdamCM
from cm_fused._optimizer import state_dict as _checkpoint
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state import loading as _loading
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.support.training import BACKENDS, assert_same, new_optimizer, params_of, train, trained

LOW: dict[str, Any] = {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16}


def _compat(cls: Any) -> Callable[[], Any]:
    return lambda: cls([torch.linspace(-1, 1, 12).reshape(3, 4), torch.ones(5)], topC=3)


MAKERS: dict[str, Callable[[], Any]] = {
    "cm": lambda: new_optimizer(AdamCM),
    "cg": lambda: new_optimizer(AdamCG, amsgrad=True),
    "low": lambda: new_optimizer(AdamCM, **LOW),
    "eager": lambda: new_optimizer(AdamCM, backend="eager"),
    "compat-cm": _compat(Adam_CM),
    "compat-cg": _compat(Adam_C),
}
if "triton" in BACKENDS:
    MAKERS["triton"] = lambda: new_optimizer(AdamCM, backend="triton")
of_each_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def _pair(make: Callable[[], Any]) -> tuple[Any, Any]:
    """Return two optimizers of equal parameters whose state differs."""
    first, second = make(), make()
    train(first, range(6))
    train(second, range(10, 14))
    with torch.no_grad():
        for mine, theirs in zip(params_of(second), params_of(first), strict=True):
            mine.copy_(theirs)
    return first, second


@of_each_optimizer
def test_swapping_two_optimizers(make: Callable[[], Any]) -> None:
    """Each goes on with the other's state.

    Situation: population-based training and GANs. The first load wrote into the second state dict;
    older tests load copies.
    """
    first, second = _pair(make)
    expected = [copy.deepcopy(each.state_dict()) for each in (second, first)]
    ours, theirs = first.state_dict(), second.state_dict()
    first.load_state_dict(theirs)
    second.load_state_dict(ours)
    for each, state_dict in zip((first, second), expected, strict=True):
        assert_same(each.state_dict(), state_dict)
    twins = [make(), make()]
    for twin, each, state_dict in zip(twins, (first, second), expected, strict=True):
        with torch.no_grad():
            for mine, value in zip(params_of(twin), params_of(each), strict=True):
                mine.copy_(value)
        twin.load_state_dict(state_dict)
        for one in (twin, each):
            train(one, range(20, 25))
        assert_same(trained(twin), trained(each))


@of_each_optimizer
@pytest.mark.parametrize("wraps", [lambda optimizer: optimizer, SAM], ids=["plain", "SAM"])
def test_a_candidate_and_the_backup(
    make: Callable[[], Any], wraps: Callable[[Optimizer], Optimizer]
) -> None:
    """A backup that was taken before another state was loaded restores what was there.

    Situation: a search restores its backup. Older tests have one state dict at a time.
    """
    base, other = _pair(make)
    optimizer = wraps(base)
    expected = copy.deepcopy(optimizer.state_dict())
    backup = optimizer.state_dict()
    optimizer.load_state_dict(other.state_dict())
    assert_same(backup, expected)
    train(base, range(20, 23))
    assert_same(backup, expected)
    optimizer.load_state_dict(backup)
    assert_same(optimizer.state_dict(), expected)
    train(base, range(20, 23))
    assert_same(backup, expected)


@of_each_optimizer
def test_resizing_leaves_a_state_dict(make: Callable[[], Any]) -> None:
    """A state dict that was taken before the buffers were resized is not changed."""
    optimizer = make()
    train(optimizer, range(6))
    expected = copy.deepcopy(optimizer.state_dict())
    backup = optimizer.state_dict()
    optimizer.resize_buffer(2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same(backup, expected)


def test_a_captured_step_finds_what_was_loaded() -> None:
    """Once a graph was captured, loading writes into its tensors, which no state dict has.

    A graph goes on with its addresses: state, a learning rate on the device, the count of skipped
    steps. Without a device the capture is a stand-in.
    """
    optimizer, other = (
        new_optimizer(AdamCM, lr=torch.tensor(0.01), skip_nonfinite=True) for _ in range(2)
    )
    train(optimizer, range(6))
    train(other, range(10, 14))
    for group in other.param_groups:
        group["lr"] = torch.tensor(0.5)
    optimizer._captured_plans.append(mock.Mock())
    expected = copy.deepcopy(optimizer.state_dict())
    backup = optimizer.state_dict()
    tensors = [dict(optimizer.state[param]) for param in params_of(optimizer)]
    options = [
        {key: value for key, value in group.items() if isinstance(value, Tensor)}
        for group in optimizer.param_groups
    ]
    assert all({"lr", "skipped_steps"} <= group.keys() for group in options)
    for state_dict, wanted in ((other.state_dict(), other), (backup, None)):
        optimizer.load_state_dict(state_dict)
        assert_same(optimizer.state_dict(), wanted.state_dict() if wanted else expected)
        for param, old in zip(params_of(optimizer), tensors, strict=True):
            assert all(optimizer.state[param][key] is old[key] for key in optimizer.state[param])
        for group, old in zip(optimizer.param_groups, options, strict=True):
            assert all(group[key] is value for key, value in old.items())
    assert_same(backup, expected)


@pytest.mark.parametrize("source", ["same", "eager", "untrained"])
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
@pytest.mark.parametrize("capacity", [3, 5])
def test_loading_under_a_graph_leaves_none_of_its_tensors(
    cls: type[CriticalAdam], capacity: int, source: str
) -> None:
    """All that a graph has is written to, what the state dict lacks too.

    Situation: a captured run goes back to a checkpoint. A pending commit went into the loaded
    slots, an old running sum stayed. The older test takes a state dict first, which commits.
    """
    optimizer = new_optimizer(cls, capacity=capacity)
    other = new_optimizer(cls, capacity=capacity, backend="eager" if source == "eager" else None)
    train(optimizer, range(6))
    if source != "untrained":
        train(other, range(10, 14))
    optimizer._captured_plans.append(mock.Mock())
    tensors = [dict(optimizer.state[param]) for param in params_of(optimizer)]
    state_dict = other.state_dict()
    optimizer.load_state_dict(state_dict)
    for param, of_graph in zip(params_of(optimizer), tensors, strict=True):
        state = optimizer.state[param]
        assert state.keys() == of_graph.keys()
        assert all(state[key] is tensor for key, tensor in of_graph.items())
    twin = new_optimizer(cls, capacity=capacity)
    twin.load_state_dict(state_dict)
    with torch.no_grad():
        for mine, theirs in zip(params_of(twin), params_of(optimizer), strict=True):
            mine.copy_(theirs)
    for each in (optimizer, twin):
        train(each, range(20, 25))
    assert_same(trained(optimizer), trained(twin))


def test_a_load_that_fails_leaves_whole_states() -> None:
    """Where memory runs out while a state is loaded, each parameter has the old or the new state.

    All else that can be wrong is found before anything is given up.
    """
    optimizer, other = _pair(MAKERS["cm"])
    state_dict, before = other.state_dict(), copy.deepcopy(optimizer.state_dict())
    calls = 0
    load = _loading.loaded_state_of

    def fail_at_the_third(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        return load(*arguments)

    with (
        mock.patch.object(_checkpoint, "loaded_state_of", fail_at_the_third),
        pytest.raises(MemoryError),
    ):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    for index in range(len(params_of(optimizer))):
        assert_same(after["state"][index], (state_dict if index < 2 else before)["state"][index])
    assert_same(after["param_groups"], before["param_groups"])
    train(optimizer, range(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_put_before_others(backend: str) -> None:
    """Parameters that move among the optimizer's get the random bits of their new places.

    Situation: a frozen parameter is put into the first group by hand; the second group's plan kept
    the old places. Older tests add groups at the end.
    """
    optimizer = new_optimizer(AdamCM, moment_dtype=torch.bfloat16, backend=backend)
    train(optimizer, range(3))
    frozen = torch.zeros(2)
    optimizer.param_groups[0]["params"].insert(0, frozen)
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        params = params_of(each)[1:]
        for t in range(3, 6):
            for i, param in enumerate(params):
                param.grad = torch.full_like(param, 1.0 + i + t)
            each.step()
    assert_same(trained(twin), trained(optimizer))
