"""What users and other libraries hand to an optimizer, and how errors and warnings name it."""

import copy
import io
import re
from collections import UserList
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map_only, tree_map_with_path

from cm_fused import AdamCG, AdamCM, AdamWCG, AdamWCM, _install
from cm_fused._backends import cpu
from cm_fused._backends import select as _backend
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.support.training import (
    BACKENDS,
    CLASSES,
    assert_same,
    give_gradients,
    new_optimizer,
    new_params,
    params_of,
    snapshot,
    train,
    trained,
)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _read_back(state_dict: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Forms of options


class _Indexed:
    """A pair that has items and a length alone, as some configurations' lists."""

    def __init__(self, values: Any) -> None:
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        return self.values[i]


class _Sequence(Sequence[Any]):
    """What Hydra's ListConfig is: a sequence that is neither a list nor a tuple."""

    def __init__(self, values: Any) -> None:
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]


def _list_config(values: Any) -> Any:
    from omegaconf import ListConfig

    return ListConfig(list(values))


needs_omegaconf = pytest.mark.skipif(
    find_spec("omegaconf") is None, reason="omegaconf is not installed"
)


@pytest.mark.parametrize(
    "form",
    [
        *(list, np.array, UserList, _Indexed, _Sequence),
        pytest.param(_list_config, marks=needs_omegaconf),
    ],
)
@pytest.mark.parametrize("cls", [*CLASSES, Adam_CM])
def test_any_pair_of_betas(cls: Any, form: Callable[[Any], Any]) -> None:
    """A list, an array or a configuration's list is a pair as a tuple is.

    Situation: Hydra gives a ListConfig, JSON a list. The older test lists bad betas alone.
    """
    betas = form((0.9, 0.95))
    optimizer, twin = cls(new_params(), betas=betas), cls(new_params(), betas=(0.9, 0.95))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    for each in (optimizer, twin):
        train(each, range(3))
    assert_same(trained(optimizer), trained(twin))
    optimizer.param_groups[0]["betas"] = betas
    assert _read_back(optimizer.state_dict())["param_groups"][0]["betas"] == (0.9, 0.95)
    other = cls(new_params(), betas=betas)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["betas"] = betas
    other.load_state_dict(state_dict)
    assert other.param_groups[0]["betas"] == (0.9, 0.95)


def test_scalars_of_numpy() -> None:
    """They are numbers, and Python's from then on, which every checkpoint reader takes.

    Situation: np.linspace and np.random give learning rates, sweeps np.int64: refused, or saved so
    that weights_only=True fails. Older tests give Python's numbers.
    """
    options: dict[str, Any] = {
        "lr": np.float32(0.01),
        "eps": np.float64(1e-8),
        "weight_decay": np.float32(0.5),
        "amsgrad": np.bool_(True),
        "capacity": np.int64(3),
        "priority_decay": np.float16(0.5),
        "seed": np.int32(7),
        "skip_nonfinite": np.bool_(True),
        "max_grad_norm": np.float64(2.0),
    }
    optimizer = AdamCM([{"params": new_params()}], **options)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": np.float64(0.5)})
    for group in optimizer.param_groups:
        for name in options:
            assert type(group[name]) in (float, int, bool), name
            if group is optimizer.param_groups[0]:
                assert group[name] == options[name]
    scheduler = LambdaLR(optimizer, lambda epoch: np.float64(0.5))
    train(optimizer, range(3))
    scheduler.step()
    optimizer.param_groups[0].update(weight_decay=np.float32(0.25), seed=np.int64(8))
    train(optimizer, range(3, 4))
    (group, _) = _read_back(optimizer.state_dict())["param_groups"]
    assert type(group["lr"]) is float
    optimizer.resize_buffer(np.int64(2))  # type: ignore[arg-type]
    bad: dict[str, Any] = {"capacity": np.float32(3), "lr": np.float32(-1), "seed": np.int64(-1)}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            AdamCM(new_params(), **{name: value})


NAMED = [
    {"buffer_dtype": "int8", "moment_dtype": "bfloat16"},
    {"buffer_dtype": "float8_e4m3fn", "moment_dtype": "int8"},
    {"buffer_dtype": "torch.float16", "moment_dtype": "float32"},
]


@pytest.mark.sampled
@pytest.mark.parametrize("names", NAMED, ids=str)
@pytest.mark.parametrize("how", ["constructor", "group", "added", "live"])
@on_each_backend
def test_dtypes_by_name(backend: str, how: str, names: dict[str, str]) -> None:
    """A name is the dtype, wherever an option can be given, and saved as the dtype is.

    Situation: YAML, JSON and command lines have no dtypes.
    """
    dtypes = {name: getattr(torch, value.split(".")[-1]) for name, value in names.items()}
    optimizers = []
    for options in (names, dtypes):
        others: dict[str, Any] = {"backend": backend, "capacity": 3}
        first, second = new_params()[:2], new_params()[2:]
        if how == "constructor":
            optimizer = AdamCM([*first, *second], **options, **others)
        elif how == "group":
            optimizer = AdamCM([{"params": [*first, *second], **options}], **others)
        elif how == "added":
            optimizer = AdamCM(first, **others)
            optimizer.add_param_group({"params": second, **options})
        else:
            optimizer = AdamCM([*first, *second], **others)
            optimizer.param_groups[0].update(options)
        train(optimizer, range(4))
        optimizers.append(optimizer)
    optimizer, twin = optimizers
    assert_same(trained(optimizer), trained(twin))
    saved, expected = (each.state_dict() for each in optimizers)
    assert saved["param_groups"] == expected["param_groups"]
    if how != "live":
        group = optimizer.param_groups[-1]
        assert {name: group[name] for name in names} == dtypes
    for each in optimizers:
        each.load_state_dict(_read_back(saved))
        train(each, range(4, 6))
    assert_same(trained(optimizer), trained(twin))


def test_dtypes_by_name_in_compat() -> None:
    """The research package's classes take names too."""
    optimizer = Adam_CM(new_params(), buffer_dtype="bfloat16")
    train(optimizer, range(3))
    assert optimizer.state[params_of(optimizer)[0]]["critical_buffer"].dtype == torch.bfloat16


# Torch's choice of an implementation


def test_fused_asks_for_a_fused_backend() -> None:
    """It is met, or an error that says why not; no slower backend takes its place.

    Situation: scripts pass fused=True to every optimizer.
    """
    optimizer = AdamCM(new_params(), fused=True, foreach=False)
    assert "cpu on cpu" in repr(optimizer)
    train(optimizer, range(2))
    loaded = AdamCM(new_params())
    loaded.load_state_dict(optimizer.state_dict())
    assert [(group["fused"], group["foreach"]) for group in loaded.param_groups] == [(None, None)]
    AdamCM(new_params(), fused=True, backend="cpu")
    with pytest.raises(RuntimeError, match=r"fused=True is not available .*meta: this version"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, device="meta"))]})
    with mock.patch.object(cpu, "unavailable_reason", "it was not built"):
        message = f"fused=True .* on cpu: it was not built. {re.escape(_install.remedy())}"
        with pytest.raises(RuntimeError, match=message):
            AdamCM(new_params(), fused=True)
        lazily = AdamCM(new_params())
        lazily.param_groups[0]["fused"] = True
        assert "none on cpu, where fused=True cannot serve" in repr(lazily)
        give_gradients(lazily, 0)
        before = snapshot(lazily)
        with pytest.raises(RuntimeError, match=message):
            lazily.step()
        assert_same(snapshot(lazily), before)


def test_torchs_implementation_is_not_loaded() -> None:
    """What torch's optimizer was told of its implementation is no option of this process.

    Situation: a run of AdamW(fused=True) goes on with AdamCM.
    """
    adam = torch.optim.AdamW(new_params(), fused=True, lr=1e-3)
    train(adam, range(2))
    optimizer = AdamWCM(new_params(), betas=(0.9, 0.999))
    optimizer.load_state_dict(adam.state_dict())
    assert (optimizer.param_groups[0]["fused"], optimizer.param_groups[0]["foreach"]) == (
        None,
        None,
    )
    train(optimizer, range(2, 4))


@on_each_backend
def test_a_frozen_parameter_of_any_dtype(backend: str) -> None:
    """A parameter that is not trained is not held to the precision of the state.

    Situation: QLoRA passes all parameters, the uint8 ones among them. Once one takes part, the
    error names it. Older tests have no parameter that takes no part and could not.
    """
    frozen = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    trained_one = nn.Parameter(torch.ones(5))
    options: dict[str, Any] = {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16}
    optimizer = AdamCM([packed, trained_one, frozen], backend=backend, **options)
    trained_one.grad = torch.ones(5)
    optimizer.step()
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
    frozen.requires_grad_()
    frozen.grad = torch.ones(3, dtype=torch.float64)
    before = snapshot(optimizer)
    message = "parameter 2 of group 0: buffer_dtype must be None .*float64.*group of its own"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    with pytest.raises(ValueError, match="buffer_dtype must be None"):
        AdamCM([frozen], **options)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@on_each_backend
def test_what_a_scheduler_made_negative(name: str, backend: str) -> None:
    """A checkpoint of a run that trains can be loaded, and its buffers resized.

    Situation: a linear schedule stepped past its end. Older tests load what the constructor takes.
    """
    optimizer = new_optimizer(AdamWCM, backend=backend)
    train(optimizer, range(2))
    for group in optimizer.param_groups:
        group[name] = -1e-4
    train(optimizer, range(2, 4))
    other = new_optimizer(AdamWCM, backend=backend)
    for mine, theirs in zip(params_of(other), params_of(optimizer), strict=True):
        mine.data.copy_(theirs.data)
    other.load_state_dict(_read_back(optimizer.state_dict()))
    for each in (optimizer, other):
        each.resize_buffer(3)
        train(each, range(4, 7))
    assert_same(trained(other), trained(optimizer))
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0][name] = float("nan")
    with pytest.raises(ValueError, match=f"{name} must be finite, got nan"):
        other.load_state_dict(state_dict)


# Surgery on the state


def _grow(optimizer: CriticalAdam, keys: tuple[str, ...]) -> None:
    """Replace the first parameter by one of more rows, and these tensors of its state with it."""
    group = optimizer.param_groups[0]
    old = group["params"][0]
    state = optimizer.state.pop(old)
    for key in keys:
        rows = state[key].ndim - old.ndim
        more = torch.zeros_like(state[key].narrow(rows, 0, 1))
        state[key] = torch.cat([state[key], more], dim=rows)
    new = nn.Parameter(torch.cat([old.detach(), torch.zeros_like(old[:1])]))
    group["params"][0] = new
    optimizer.state[new] = state


MOMENTS = ("exp_avg", "exp_avg_sq")


@on_each_backend
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
@pytest.mark.parametrize("forgets", ["critical_buffer", "all"])
def test_surgery_that_forgets_the_buffer(
    cls: type[CriticalAdam], backend: str, forgets: str
) -> None:
    """The error names the parameter, what does not fit it and what to do, and that does help.

    Situation: 3D Gaussian splatting grows the two moments alone. Older tests replace data only.
    """
    optimizer = cls([{"params": new_params()[:2], "name": "xyz"}], backend=backend)
    train(optimizer, range(6))
    _grow(optimizer, MOMENTS if forgets == "critical_buffer" else ())
    give_gradients(optimizer, 6)
    before = snapshot(optimizer)
    key = "critical_buffer" if forgets == "critical_buffer" else "exp_avg"
    with pytest.raises(
        RuntimeError, match=rf"parameter 0 of group 0 \('xyz'\): .*'{key}' must have"
    ):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    state = optimizer.state[params_of(optimizer)[0]]
    if forgets == "all":
        state.clear()
    else:
        del state["critical_buffer"]
        optimizer.state_dict()
    twin = copy.deepcopy(optimizer)
    for name in ("priorities", "critical_sum", "pending_slot"):
        # What is left of a buffer that was deleted counts for nothing.
        twin.state[params_of(twin)[0]].pop(name, None)
    for each in (optimizer, twin):
        train(each, range(6, 12))
    assert_same(trained(optimizer), trained(twin))


@on_each_backend
@pytest.mark.parametrize("key", ["step", "priorities"])
def test_surgery_that_leaves_no_tensor(backend: str, key: str) -> None:
    """The error says what must be a tensor and what to do, and that does help.

    Situation: `optimizer.state[param]["step"] = 0`, as early torch stored it, to begin the bias
    corrections anew. Older tests replace tensors by tensors; Python's AttributeError was raised.
    """
    optimizer = AdamCM(new_params()[:2], backend=backend)
    train(optimizer, range(6))
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    kept, state[key] = state[key], 0
    give_gradients(optimizer, 6)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=rf"parameter 1 of group 0: .*'{key}' must be a tensor, got int.*fill_"
    ):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    state[key] = kept.fill_(0)
    optimizer.step()


@on_each_backend
def test_surgery_that_is_complete(backend: str) -> None:
    """A parameter whose whole state grows with it trains on; so do all others.

    Situation and older tests: as above.
    """
    optimizer = AdamCM(new_params(), capacity=2, backend=backend)
    train(optimizer, range(6))
    before = copy.deepcopy(optimizer)
    before.state_dict()
    _grow(optimizer, (*MOMENTS, "critical_buffer"))
    params = params_of(optimizer), params_of(before)
    for t in range(6, 9):
        for one, other in zip(*params, strict=True):
            other.grad = torch.full_like(other, 1.0 + t)
            one.grad = torch.full_like(one, 1.0 + t)
            if one is params[0][0]:
                one.grad[-1] = 0.0
        optimizer.step()
        before.step()
    assert_same(params[0][0][:-1].detach(), params[1][0].detach())
    assert_same([p.detach() for p in params[0][1:]], [p.detach() for p in params[1][1:]])


@pytest.mark.parametrize("how", ["set", "update", "pop", "del", "after_buffer"])
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
def test_moments_that_are_replaced_between_steps(cls: type[CriticalAdam], how: str) -> None:
    """The last step's momentum gets its slot, not what replaces it: backends agree.

    Situation: 3D Gaussian splatting resets moments; the momentum that waits in `exp_avg` was lost.
    Older tests compare surgery within one backend.
    """
    results = []
    for backend in BACKENDS:
        optimizer = cls(new_params(), backend=backend)
        train(optimizer, range(5))  # the last of which a slot waits for
        for param in params_of(optimizer):
            state = optimizer.state[param]
            zeros = torch.zeros_like(state["exp_avg"])
            if how == "after_buffer":
                state["critical_buffer"] = state["critical_buffer"].clone()
            if how in ("set", "after_buffer"):
                state["exp_avg"] = zeros
            elif how == "update":
                state.update(exp_avg=zeros)
            elif how == "pop":
                state.pop("exp_avg")
            else:
                del state["exp_avg"]
        train(optimizer, range(5, 7))
        state_dict = optimizer.state_dict()["state"]
        keys = ("exp_avg", "critical_buffer", "priorities")
        results.append(
            [
                [param.detach() for param in params_of(optimizer)],
                [[state[key] for key in keys] for state in state_dict.values()],
            ]
        )
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-6)


@on_each_backend
@pytest.mark.parametrize("use", ["state_dict", "deepcopy", "resize_buffer"])
def test_surgery_seen_outside_a_step(backend: str, use: str) -> None:
    """What commits before it reads the state names the parameter too.

    Situation: a checkpoint after surgery, before a step. The error had names of internal lists.
    """
    optimizer = AdamCM([{"params": new_params()[:2], "name": "xyz"}], backend=backend)
    train(optimizer, range(6))
    _grow(optimizer, ("critical_buffer",))
    if backend == "eager":  # which has nothing to commit
        give_gradients(optimizer, 6)
        uses: dict[str, Callable[[], Any]] = dict.fromkeys([use], optimizer.step)
    else:
        uses = {
            "state_dict": optimizer.state_dict,
            "deepcopy": lambda: copy.deepcopy(optimizer),
            "resize_buffer": lambda: optimizer.resize_buffer(2),
        }
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 \('xyz'\): .* must have"):
        uses[use]()


class _WithAverages(AdamWCM):
    """A subclass that keeps a state of its own, by parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        state: Any = self.state
        state["averages"] = {param: torch.zeros_like(param) for param in params_of(self)}


def test_state_that_a_subclass_keeps_by_parameter() -> None:
    """It is the optimizer's own parameters that it goes by after loading.

    Situation: an average for each parameter, as in Lookahead: its keys were copied with it.
    """
    optimizer = _WithAverages(new_params())
    train(optimizer, range(2))
    state_dict = optimizer.state_dict()
    optimizer.load_state_dict(state_dict)
    state: Any = optimizer.state
    averages = state["averages"]
    for param in params_of(optimizer):
        assert averages[param] is not state_dict["state"]["averages"][param]
        assert_same(averages[param], state_dict["state"]["averages"][param])
    train(optimizer, range(2, 4))


# Libraries that walk the state


def _copy_by_accelerate(state: Any) -> Any:
    from accelerate.utils.operations import recursively_apply, send_to_device

    return recursively_apply(torch.clone, send_to_device(state, "cpu"))


def _copy_by_lightning(state: Any) -> Any:
    from lightning_utilities.core.apply_func import apply_to_collection

    return apply_to_collection(state, Tensor, torch.clone)


def _copy_by_pytree(state: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, state)


def _copy_by_paths(state: Any) -> Any:
    return tree_map_with_path(lambda _, x: x.clone() if isinstance(x, Tensor) else x, state)


def _copy_by_pairs(state: Any) -> Any:
    if isinstance(state, dict):
        return type(state)((key, _copy_by_pairs(value)) for key, value in state.items())
    return state.clone()


COPIES = [
    *(_copy_by_accelerate, _copy_by_lightning, _copy_by_pytree),
    *(_copy_by_paths, _copy_by_pairs),
]


@pytest.mark.parametrize("copied", COPIES)
@on_each_backend
def test_the_state_can_be_walked(copied: Callable[[Any], Any], backend: str) -> None:
    """What moves or copies nested data does so with the whole state and with each parameter's.

    Situation: Lightning, Accelerate and torch's pytree do. Our dicts could not be made from a
    mapping, and were leaves. Older tests read the state as a dict.
    """
    optimizer = new_optimizer(AdamCM, backend=backend)
    train(optimizer, range(5))
    optimizer.state_dict()
    twin = copy.deepcopy(optimizer)
    whole = copied(optimizer.state)
    assert type(whole) is type(optimizer.state)
    for copies, values in zip(whole.values(), optimizer.state.values(), strict=True):
        assert_same(dict(copies), dict(values))
        assert all(copies[key] is not value for key, value in values.items())
    for param, values in list(optimizer.state.items()):
        optimizer.state[param] = copied(values)
    train(optimizer, range(5, 7))
    for param, values in list(optimizer.state.items()):
        assert type(values) is type(whole[param])
        # What replaces an entry is seen although a plan of the step was made.
        optimizer.state[param] = copied(values)
        optimizer.state[param]["exp_avg_sq"] = 2 * values["exp_avg_sq"]
    train(twin, range(5, 7))
    for values in twin.state.values():
        values["exp_avg_sq"] = 2 * values["exp_avg_sq"]
    for each in (optimizer, twin):
        train(each, range(7, 9))
    assert_same(trained(optimizer), trained(twin))


@on_each_backend
def test_two_optimizers_with_one_parameters_state(backend: str) -> None:
    """A state that is put into another optimizer as well is seen by both when it changes.

    A dict counted its changes for one optimizer alone. Older tests move no state by hand.
    """
    first = AdamCM([torch.ones(4)], backend=backend)
    second = AdamCM([torch.ones(4)], backend=backend)
    train(first, range(3))
    (one,), (other,) = params_of(first), params_of(second)
    second.state[other] = first.state[one]
    train(second, range(3, 5))
    first.state[one]["exp_avg"] = torch.zeros(4)
    train(second, range(5, 6))
    assert (first.state[one]["exp_avg"] != 0).all()


# Names in errors and warnings


@pytest.mark.parametrize("cls", [AdamCM, AdamWCM, AdamCG, AdamWCG, Adam_CM, Adam_C])
def test_errors_name_the_public_class(cls: Any) -> None:
    """A misspelt option's error names the class that the user wrote, also a class of theirs.

    Situation: a typo in a configuration; the error named a private base, and no older test looked.
    """

    class Own(cls):  # type: ignore[misc]
        pass

    for public in (cls, Own):
        with pytest.raises(TypeError, match=rf"{public.__qualname__}\.__init__\(\) got .*'lrr'"):
            public(new_params(), lrr=0.1)


def _lines_of(warned: Any) -> set[str]:
    return {warning.filename for warning in warned}


def test_warnings_show_the_users_line() -> None:
    """They point at this file, whatever wraps our methods.

    Situation: `python -W error` and logs showed a line of ours. Older tests read messages alone.
    """
    adam = torch.optim.AdamW(new_params(), lr=0.5)
    train(adam, range(2))
    optimizer = AdamCM(new_params(), moment_dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="is converted to|is of another optimizer") as warned:
        optimizer.load_state_dict(adam.state_dict())
    assert len(warned) == 2
    assert _lines_of(warned) == {__file__}
    _backend._warn_of_fallback.cache_clear()
    give_gradients(optimizer, 0)
    with mock.patch.object(cpu, "unavailable_reason", "it was not built"):
        optimizer.state.clear()
        with pytest.warns(UserWarning, match="slow eager backend") as warned:
            optimizer.step()
    _backend._warn_of_fallback.cache_clear()
    assert _lines_of(warned) == {__file__}


def test_options_of_another_optimizer_are_named() -> None:
    """Once a load, with old and new values, only those that change, and not for our own.

    Situation: a run is switched from AdamW and resumed; its options came along in silence.
    """
    adam = torch.optim.AdamW(new_params(), lr=0.5, betas=(0.9, 0.99), maximize=True)
    train(adam, range(2))
    optimizer = AdamWCM(new_params(), lr=torch.tensor(0.25))
    with pytest.warns(UserWarning, match="of another optimizer") as warned:
        optimizer.load_state_dict(adam.state_dict())
    (warning,) = warned
    message = str(warning.message)
    assert "(group 0: lr=0.5 instead of 0.25, maximize=True instead of False)" in message
    assert "delete them from the groups of state_dict['param_groups']" in message
    assert "With adjust_lr_fn='match_rms_adamw' a learning rate and weight decay" in message
    adjusted = AdamWCM(new_params(), lr=0.25, maximize=True, adjust_lr_fn="match_rms_adamw")
    # None of these warns, or it would be an error here.
    adjusted.load_state_dict(adam.state_dict())
    assert adjusted.param_groups[0]["lr"] == 0.5
    optimizer.load_state_dict(adam.state_dict())
    AdamWCM(new_params(), lr=0.1).load_state_dict(optimizer.state_dict())
    state_dict = adam.state_dict()
    for group in state_dict["param_groups"]:
        del group["lr"], group["maximize"]
    own = AdamWCM(new_params(), lr=0.25)
    own.load_state_dict(state_dict)
    assert own.param_groups[0]["lr"] == 0.25
