"""Checkpoints: an interrupted run is the uninterrupted one, on every backend and across them."""

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
from cm_fused._optimizer import state_dict as checkpoint
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.table import RUNNING_SUM_MIN_CAPACITY
from tests.support.training import (
    BACKENDS,
    KINDS,
    ROUNDING,
    SHAPES,
    assert_close,
    assert_same,
    gradient,
    new_optimizer,
    new_params,
    params_of,
    snapshot,
    train,
    trained,
)

pytestmark = pytest.mark.sampled

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
CAPACITIES = (RUNNING_SUM_MIN_CAPACITY[4] - 1, 3, 5, 20)
# With capacity 3: before the first step, filling (a commit pending from 1 on), just full,
# replacing, in the middle of skips.
SAVE_AT = (0, 1, 2, 3, 5, 7)
TOTAL = 12


def _save_at(*backends: str) -> tuple[int, ...]:
    """Return when to save: once, full, replaced and a commit pending, where steps take long."""
    return (5,) if "triton" in backends else SAVE_AT


# torch's optimizers get these: loading other betas than ours warns.
BETAS = (0.9, 0.99)
STATE_KEYS = {"step", "exp_avg", "exp_avg_sq", "critical_buffer", "priorities"}

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_pair_of_backends = pytest.mark.parametrize(
    ("backend", "other"), list(itertools.permutations(BACKENDS, 2))
)
of_each_kind = pytest.mark.parametrize("cls", KINDS)
of_each_capacity = pytest.mark.parametrize("capacity", CAPACITIES)


def _through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch.load reads of what torch.save wrote, allowing plain values and tensors only."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _resumed(
    optimizer: CriticalAdam, fresh: CriticalAdam, change: Callable[[Any], Any] = _through_file
) -> CriticalAdam:
    """Load an optimizer's checkpoint and its parameters into a fresh optimizer."""
    for mine, theirs in zip(params_of(fresh), params_of(optimizer), strict=True):
        mine.data.copy_(theirs.data)
    fresh.load_state_dict(change(optimizer.state_dict()))
    return fresh


# Interrupted and uninterrupted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_each_backend
@of_each_kind
@of_each_capacity
def test_interrupted_run_is_the_uninterrupted_one(
    cls: type[CriticalAdam], backend: str, capacity: int, dtype: torch.dtype
) -> None:
    """Saved and resumed at any step, training goes on to the very bits it would have reached."""
    options: dict[str, Any] = {"capacity": capacity, "amsgrad": True, "backend": backend}
    uninterrupted = new_optimizer(cls, dtype, **options)
    train(uninterrupted, range(TOTAL))
    for save_at in _save_at(backend):
        interrupted = new_optimizer(cls, dtype, **options)
        train(interrupted, range(save_at))
        resumed = _resumed(interrupted, new_optimizer(cls, dtype, **options, lr=0.5))
        train(resumed, range(save_at, TOTAL))
        assert_same(trained(resumed), trained(uninterrupted), f"saved after {save_at} steps: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@of_each_pair_of_backends
@of_each_kind
@of_each_capacity
def test_checkpoint_of_another_backend(
    cls: type[CriticalAdam], capacity: int, backend: str, other: str, dtype: torch.dtype
) -> None:
    """Saved by one backend and resumed by another, training differs in roundings alone."""
    uninterrupted = new_optimizer(cls, dtype, capacity=capacity, backend=backend)
    train(uninterrupted, range(TOTAL))
    for save_at in _save_at(backend, other):
        interrupted = new_optimizer(cls, dtype, capacity=capacity, backend=backend)
        train(interrupted, range(save_at))
        resumed = _resumed(interrupted, new_optimizer(cls, dtype, capacity=capacity, backend=other))
        train(resumed, range(save_at, TOTAL))
        assert_close(trained(resumed), trained(uninterrupted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@of_each_pair_of_backends
@of_each_kind
def test_half_precision_checkpoint_of_another_backend(
    cls: type[CriticalAdam], backend: str, other: str, dtype: torch.dtype
) -> None:
    """The float32 state of half parameters passes between backends; the next step agrees."""
    optimizer = new_optimizer(cls, dtype, backend=backend)
    train(optimizer, range(8))
    resumed = _resumed(optimizer, new_optimizer(cls, dtype, backend=other))
    train(optimizer, [8])
    train(resumed, [8])
    got, expected = trained(resumed), trained(optimizer)
    # One rounding of the parameter may fall to the other side.
    torch.testing.assert_close(
        got["params"], expected["params"], rtol=torch.finfo(dtype).eps, atol=1e-6
    )
    for i, state in expected["state"].items():
        for key in STATE_KEYS:
            torch.testing.assert_close(got["state"][i][key], state[key], **ROUNDING)


@of_each_pair_of_backends
@of_each_kind
@of_each_capacity
def test_a_state_dict_is_saved_after_later_steps(
    cls: type[CriticalAdam], capacity: int, backend: str, other: str
) -> None:
    """One that is taken once and saved again and again resumes from the step it is saved at.

    It refers to the state's tensors, as torch's do. What was pending then was not in it, so that a
    slot did not belong to its key. Older tests saved each state dict as soon as they had it.
    """

    def resume(uninterrupted: CriticalAdam, saved: Any) -> CriticalAdam:
        fresh = new_optimizer(cls, capacity=capacity, backend=other)
        return _resumed(uninterrupted, fresh, lambda _: saved)

    optimizer = new_optimizer(cls, capacity=capacity, backend=backend)
    train(optimizer, range(3))
    state_dict = optimizer.state_dict()
    for save_at in range(4, TOTAL - 1):
        train(optimizer, [save_at - 1])
        saved, uninterrupted = _through_file(state_dict), copy.deepcopy(optimizer)
        resumed = resume(uninterrupted, saved)
        for each in (resumed, uninterrupted):
            train(each, range(save_at, save_at + 2))
        compare = assert_same if other == backend else assert_close
        compare(trained(resumed), trained(uninterrupted))


@on_each_backend
@of_each_kind
def test_slots_of_the_other_kind(cls: type[CriticalAdam], backend: str) -> None:
    """Momenta that are taken for gradients, or the reverse, are warned of; so a mix-up is seen.

    Older tests loaded into the class that saved.
    """
    other = AdamCG if cls is AdamCM else AdamCM
    optimizer = new_optimizer(cls, backend=backend)
    train(optimizer, range(6))
    state_dict = optimizer.state_dict()
    slots = "momenta" if cls is AdamCM else "gradients"
    with pytest.warns(UserWarning, match=f"has slots of critical {slots}, and .*'priorities'"):
        new_optimizer(other, backend=backend).load_state_dict(state_dict)
    for state in state_dict["state"].values():
        del state["critical_buffer"], state["priorities"]
    # As the warning says. It would be an error here.
    resumed = _resumed(optimizer, new_optimizer(other, backend=backend), lambda _: state_dict)
    train(resumed, range(6, 8))
    empty = new_optimizer(cls, backend=backend, capacity=0)
    new_optimizer(other, backend=backend, capacity=0).load_state_dict(empty.state_dict())


# What a state dict holds


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@on_each_backend
@of_each_kind
@of_each_capacity
def test_state_dict_holds_what_is_specified(
    cls: type[CriticalAdam], backend: str, capacity: int, amsgrad: bool, dtype: torch.dtype
) -> None:
    """Keys, shapes and dtypes are the specification's; a fused backend's sum and a slot beside.

    No tensor has more memory than it needs.
    """
    optimizer = new_optimizer(cls, dtype, capacity=capacity, amsgrad=amsgrad, backend=backend)
    train(optimizer, range(2))
    state_dict = optimizer.state_dict()
    state_dtype = {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(dtype, dtype)
    shaped = {"exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    if backend != "eager" and capacity >= RUNNING_SUM_MIN_CAPACITY[4]:
        shaped.add("critical_sum")
    assert list(state_dict["state"]) == list(range(len(SHAPES)))
    for i, shape in enumerate(SHAPES):
        state = state_dict["state"][i]
        assert state.pop("pending_slot", None) == (-1 if cls is AdamCM else None)
        assert set(state) == {"step", "critical_buffer", "priorities", *shaped}
        for key in shaped:
            assert (state[key].shape, state[key].dtype) == (shape, state_dtype), key
        buffer = state["critical_buffer"]
        assert (buffer.shape, buffer.dtype) == ((capacity, *shape), state_dtype)
        assert (state["step"].shape, state["step"].item()) == ((), 2)
        keys = state["priorities"]
        assert (keys.shape, keys.dtype) == ((capacity,), torch.float32)
        assert (keys > -torch.inf).tolist() == [slot < 2 for slot in range(capacity)]
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())
    for group in state_dict["param_groups"]:
        assert set(group) == {*optimizer.param_groups[0], "skipped_steps", "critical_gradients"}
        assert (group["backend"], group["amp_scaling"]) == (None, False)
    assert [group["params"] for group in state_dict["param_groups"]] == [[0, 1, 2], [3, 4]]


# Loading


@on_each_backend
@of_each_kind
@of_each_capacity
def test_loading_copies(cls: type[CriticalAdam], backend: str, capacity: int) -> None:
    """Loading neither changes the state dict nor shares memory with it."""
    source = new_optimizer(cls, capacity=capacity, backend=backend)
    train(source, range(6))
    state_dict = copy.deepcopy(source.state_dict())
    pristine = copy.deepcopy(state_dict)
    optimizer = _resumed(
        source, new_optimizer(cls, capacity=capacity, backend=backend), lambda _: state_dict
    )
    assert_same(state_dict, pristine)
    train(optimizer, range(6, 9))
    assert_same(state_dict, pristine)
    for state in state_dict["state"].values():
        for value in state.values():
            value.fill_(99.0)
    for group in state_dict["param_groups"]:
        group["lr"] = 99.0
    train(optimizer, range(9, TOTAL))
    train(source, range(6, TOTAL))
    assert_same(trained(optimizer), trained(source))


@pytest.mark.parametrize(
    "convert",
    [int, float, Tensor.double, Tensor.long, lambda step: step.reshape(1)],
    ids=["int", "float", "float64", "int64", "one-element"],
)
@on_each_backend
@of_each_kind
def test_step_in_other_forms(
    cls: type[CriticalAdam], backend: str, convert: Callable[[Tensor], Any]
) -> None:
    """`step` may arrive as a number or a tensor of another dtype; training goes on the same."""
    source = new_optimizer(cls, backend=backend)
    train(source, range(5))

    def converted(state_dict: dict[str, Any]) -> dict[str, Any]:
        states = {
            i: {**state, "step": convert(state["step"])} for i, state in state_dict["state"].items()
        }
        return {**state_dict, "state": states}

    optimizer = _resumed(source, new_optimizer(cls, backend=backend), converted)
    train(optimizer, range(5, TOTAL))
    train(source, range(5, TOTAL))
    assert_same(trained(optimizer), trained(source))


@pytest.mark.parametrize(
    "torch_options",
    [
        {"fused": True},
        {"foreach": False, "fused": False},
        {"amsgrad": True, "foreach": True},
        {"capturable": False, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("torch_cls", [torch.optim.Adam, torch.optim.AdamW])
@on_each_backend
@of_each_kind
def test_torch_adams_state_dict_loads(
    cls: type[CriticalAdam],
    backend: str,
    torch_cls: type[torch.optim.Adam],
    torch_options: dict[str, Any],
) -> None:
    """An Adam checkpoint gives moments, step and options; the buffer starts empty."""
    adam = torch_cls(new_params(), lr=0.02, betas=(0.8, 0.95), **torch_options)
    train(adam, range(4))
    state_dict = _through_file(adam.state_dict())

    optimizer = cls([param.detach().clone() for param in params_of(adam)], backend=backend)
    twin = cls([param.detach().clone() for param in params_of(adam)], backend="eager")
    with pytest.warns(UserWarning, match=r"lr=0.02 .*betas=\(0.8, 0.95\) "):
        optimizer.load_state_dict(state_dict)
    (group,) = optimizer.param_groups
    (adam_group,) = adam.param_groups
    shared = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
    assert {name: group[name] for name in shared} == {name: adam_group[name] for name in shared}
    assert (group["capacity"], group["priority_decay"], group["backend"]) == (5, 0.7, backend)

    # The twin: the same written by hand into a reference optimizer that never loads.
    twin.param_groups[0].update({name: adam_group[name] for name in shared})
    for i, (mine, theirs) in enumerate(zip(params_of(twin), params_of(adam), strict=True)):
        state = {key: value.clone().to(torch.float32) for key, value in adam.state[theirs].items()}
        state["critical_buffer"] = torch.zeros(5, *mine.shape)
        state["priorities"] = torch.full((5,), -torch.inf)
        twin.state[mine] = state
        pending = {"pending_slot": torch.tensor(-1)} if cls is AdamCM else {}
        assert_same(optimizer.state_dict()["state"][i], state | pending)
    train(optimizer, range(4, TOTAL))
    train(twin, range(4, TOTAL))
    assert_close(trained(optimizer), trained(twin))
    assert all(state["step"] == TOTAL for state in trained(optimizer)["state"].values())


@on_each_backend
@of_each_kind
@of_each_capacity
def test_adams_state_dict_replaces_a_filled_buffer(
    cls: type[CriticalAdam], backend: str, capacity: int
) -> None:
    """Loading an Adam checkpoint into an optimizer in training empties its buffer."""
    adam = torch.optim.Adam(new_params(), betas=BETAS)
    train(adam, range(2))
    runs = []
    for steps_before in (0, 7):
        optimizer = cls(new_params(), capacity=capacity, backend=backend)
        train(optimizer, range(steps_before))
        for mine, theirs in zip(params_of(optimizer), params_of(adam), strict=True):
            mine.data.copy_(theirs.data)
        optimizer.load_state_dict(adam.state_dict())
        train(optimizer, range(2, TOTAL))
        runs.append(trained(optimizer))
    assert_same(runs[1], runs[0])


@on_each_backend
@of_each_kind
def test_groups_that_lack_newer_options(cls: type[CriticalAdam], backend: str) -> None:
    """Options a checkpoint's groups lack keep the values of the optimizer's own groups."""
    source = new_optimizer(cls, capacity=3, backend=backend)
    train(source, range(5))
    state_dict = copy.deepcopy(source.state_dict())
    for group in state_dict["param_groups"]:
        for name in ("priority_decay", "priority_scope", "buffer_mean", "capacity", "maximize"):
            del group[name]
        for name in ("backend", "amp_scaling", "skipped_steps", "adjust_lr_fn"):
            del group[name]
    options: dict[str, Any] = {"priority_decay": 0.3, "priority_scope": "tensor", "maximize": True}
    options["adjust_lr_fn"] = "match_rms_adamw"
    options["amp_scaling"] = True
    optimizer = new_optimizer(cls, capacity=3, backend=backend, **options)
    optimizer.load_state_dict(state_dict)
    for group in optimizer.param_groups:
        assert {name: group[name] for name in options} == options
        assert (group["buffer_mean"], group["capacity"]) == ("capacity", 3)
        assert group["backend"] == backend
    train(optimizer, range(5, 7))


@of_each_kind
def test_a_pickle_of_an_earlier_version(cls: type[CriticalAdam]) -> None:
    """An optimizer that was pickled before an option existed steps as it did then."""
    optimizer = new_optimizer(cls)
    train(optimizer, range(3))
    state = optimizer.__getstate__()
    for options in (state["defaults"], *state["param_groups"]):
        for name in checkpoint.NEWER_OPTIONS:
            del options[name]
    unpickled = cls.__new__(cls)
    unpickled.__setstate__(copy.deepcopy(state))
    twin = new_optimizer(cls)
    train(twin, range(3))
    for each in (unpickled, twin):
        train(each, range(3, 6))
    assert_same(trained(unpickled), trained(twin))
    unpickled.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@on_each_backend
def test_adjusted_lr_is_saved_and_loaded(backend: str) -> None:
    """It is the run's, not the process's."""
    source = new_optimizer(AdamCM, adjust_lr_fn="match_rms_adamw", backend=backend)
    train(source, range(3))
    saved = _through_file(source.state_dict())
    optimizer = new_optimizer(AdamCM, backend=backend)
    for mine, theirs in zip(params_of(optimizer), params_of(source), strict=True):
        mine.data.copy_(theirs.data)
    optimizer.load_state_dict(saved)
    assert [group["adjust_lr_fn"] for group in optimizer.param_groups] == ["match_rms_adamw"] * 2
    for each in (source, optimizer):
        train(each, range(3, 6))
    assert_same(trained(optimizer), trained(source))


@pytest.mark.parametrize(("saved_on", "loaded_on"), [("eager", "cpu"), ("cpu", "eager")])
def test_backend_is_that_of_the_process(saved_on: str, loaded_on: str) -> None:
    """The choice of a backend is not loaded, even from a state dict that holds one."""
    source = new_optimizer(AdamCM, backend=saved_on)
    train(source, range(3))
    state_dict = copy.deepcopy(source.state_dict())
    for group in state_dict["param_groups"]:
        group["backend"] = saved_on
    optimizer = new_optimizer(AdamCM, backend=loaded_on)
    optimizer.load_state_dict(state_dict)
    assert [group["backend"] for group in optimizer.param_groups] == [loaded_on, loaded_on]
    assert f"{loaded_on} on cpu" in repr(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_each_backend
@of_each_kind
def test_unknown_keys_survive(cls: type[CriticalAdam], backend: str, dtype: torch.dtype) -> None:
    """Keys that users put beside ours come through a checkpoint, whatever their values."""
    optimizer = new_optimizer(cls, dtype, backend=backend)
    train(optimizer, range(3))
    mine: dict[str, Any] = {
        "my_tensor": torch.arange(3, dtype=torch.int32),
        "my_list": [1, "two", torch.ones(1, dtype=torch.float64)],
        "my_none": None,
    }
    optimizer.state[params_of(optimizer)[0]].update(copy.deepcopy(mine))
    own: dict[str, Any] = {"mine": copy.deepcopy(mine), "n": 3, "text": "text", "list": [1, 2]}
    optimizer.state.update(own)  # type: ignore[arg-type]
    resumed = _resumed(optimizer, new_optimizer(cls, dtype, backend=backend))
    copied: Any = copy.deepcopy(resumed).state
    assert_same({key: copied[key] for key in own}, own)
    for t in range(3, 6):
        train(resumed, [t])
        state_dict = resumed.state_dict()
        assert_same({key: state_dict["state"][0][key] for key in mine}, mine)
        assert_same({key: state_dict["state"][key] for key in own}, own)


@on_each_backend
@of_each_kind
def test_state_of_some_parameters(cls: type[CriticalAdam], backend: str) -> None:
    """A checkpoint made while some parameters had never taken part resumes as it was."""
    runs = []
    for interrupt in (False, True):
        optimizer = new_optimizer(cls, backend=backend)
        for t in range(8):
            if interrupt and t == 4:
                optimizer = _resumed(optimizer, new_optimizer(cls, backend=backend))
                assert set(optimizer.state_dict()["state"]) == {0, 2, 4}
            for i, param in enumerate(params_of(optimizer)):
                param.grad = gradient(t, i, param) if t >= 4 or i % 2 == 0 else None
            optimizer.step()
        runs.append(trained(optimizer))
    assert_same(runs[1], runs[0])


@on_each_backend
@of_each_kind
@of_each_capacity
def test_loading_into_channels_last(cls: type[CriticalAdam], backend: str, capacity: int) -> None:
    """A checkpoint of contiguous parameters loads into channels_last ones, and trains on."""
    source = new_optimizer(cls, capacity=capacity, amsgrad=True, backend=backend)
    train(source, range(5))
    fresh = new_optimizer(cls, capacity=capacity, backend=backend)
    for param in params_of(fresh):
        if param.ndim == 4:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
    optimizer = _resumed(source, fresh)
    assert_same(trained(optimizer)["state"], trained(source)["state"])
    train(optimizer, range(5, TOTAL))
    train(source, range(5, TOTAL))
    assert_close(trained(optimizer), trained(source), derived=())


@pytest.mark.parametrize("amsgrad", [False, True])
@on_each_backend
@of_each_kind
@of_each_capacity
def test_layout_changed_after_loading(
    cls: type[CriticalAdam], backend: str, capacity: int, amsgrad: bool
) -> None:
    """`model.to(memory_format=torch.channels_last)` may come after the checkpoint was loaded."""
    adam = torch.optim.Adam(new_params(), betas=BETAS)
    train(adam, range(3))
    runs = []
    for channels_last in (False, True):
        params = [param.detach().clone() for param in params_of(adam)]
        optimizer = cls(params, capacity=capacity, backend=backend)
        optimizer.load_state_dict(adam.state_dict())
        optimizer.param_groups[0]["amsgrad"] = amsgrad
        for param in params:
            if channels_last and param.ndim == 4:
                param.data = param.data.contiguous(memory_format=torch.channels_last)
        train(optimizer, range(3, TOTAL))
        runs.append(trained(optimizer))
    assert_close(runs[1], runs[0], derived=())


# Memory, and buffers of another capacity


@pytest.mark.parametrize("loads_again", [False, True])
def test_peak_of_loading(loads_again: bool) -> None:
    """Loading needs one parameter's memory besides the state; not a second copy.

    Torch's allocations are counted by its profiler: the process's peak would count the sources.
    """
    shapes = [(64, 1024)] * 8
    source, optimizer = (AdamCM([torch.zeros(shape) for shape in shapes]) for _ in range(2))
    for param in params_of(source) + params_of(optimizer):
        param.grad = torch.ones_like(param)
    source.step()
    state_dict = source.state_dict()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        optimizer.load_state_dict(state_dict)
        if loads_again:
            # What is prepared for the next step has the tensors that loading gives up.
            optimizer.step()
            optimizer.load_state_dict(state_dict)
    allocated = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    one = 4 * 64 * 1024 * (2 + 5 + 1)
    assert len(shapes) * one <= peak <= (len(shapes) + 1.3) * one


@pytest.mark.parametrize(
    "precision",
    [{}, {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.int8}],
    ids=["float32", "low"],
)
@pytest.mark.parametrize("capacity", [1, 2, 4, 7])
@of_each_kind
@on_each_backend
def test_resize_buffer(
    cls: type[CriticalAdam], capacity: int, precision: dict[str, Any], backend: str
) -> None:
    """The slots of the highest keys stay, in order; training goes on as with such a state."""
    optimizer = new_optimizer(cls, backend=backend, capacity=4, **precision)
    train(optimizer, range(6))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.resize_buffer(capacity)
    after = optimizer.state_dict()["state"]
    for old, new in zip(before.values(), after.values(), strict=True):
        keys = old["priorities"].tolist()
        best = sorted(sorted(range(4), key=lambda slot: -keys[slot])[:capacity])
        count = len(best)
        assert new["priorities"].tolist() == [keys[i] for i in best] + [-torch.inf] * (
            capacity - count
        )
        slots = [old["critical_buffer"].float()[i] for i in best]
        assert_same(list(new["critical_buffer"].float()[:count]), slots)
        assert not new["critical_buffer"].float()[count:].any()
    other = new_optimizer(cls, backend=backend, capacity=capacity, **precision)
    with torch.no_grad():
        for mine, theirs in zip(params_of(other), params_of(optimizer), strict=True):
            mine.copy_(theirs)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        train(each, range(6, 10))
    assert_same(trained(other), trained(optimizer))


def test_resize_buffer_refuses_no_capacity() -> None:
    """A capacity that is none is an error, and nothing has changed."""
    optimizer = new_optimizer(AdamCM)
    train(optimizer, range(3))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="capacity must be an int >= 0, got -1"):
        optimizer.resize_buffer(-1)
    assert_same(snapshot(optimizer), before)


def test_a_running_sum_without_its_buffer_starts_anew() -> None:
    """A state with the sum of slots that it does not have gets an empty buffer and its sum.

    Situation: the buffer is deleted from a state dict, to go on without it. Loading raised
    KeyError, as the sum was compared with its slots.
    """
    source, optimizer = new_optimizer(AdamCM), new_optimizer(AdamCM)
    train(source, range(4))
    state_dict = copy.deepcopy(source.state_dict())
    for state in state_dict["state"].values():
        state["critical_sum"] = torch.ones_like(state["exp_avg"])
        del state["critical_buffer"], state["priorities"]
    optimizer.load_state_dict(state_dict)
    for state in optimizer.state.values():
        assert not state["critical_sum"].any()
        assert not state["critical_buffer"].any()
        assert (state["priorities"] == -torch.inf).all()


def test_a_load_checks_the_parameters_first() -> None:
    """A parameter that a step would refuse is found before any state has been replaced.

    Situation: the last parameter is a lazy conjugate. The parameters before it had been loaded.
    """
    params = [torch.randn(3, dtype=torch.complex64) for _ in range(2)]
    optimizer = AdamCM(params, backend="eager")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    before = snapshot(optimizer)
    params[1].data = params[1].data.conj()
    with pytest.raises(ValueError, match=r"parameter 1 does not fit it: .* lazy conjugate"):
        optimizer.load_state_dict(state_dict)
    params[1].data = params[1].data.conj()
    assert_same(snapshot(optimizer), before)
