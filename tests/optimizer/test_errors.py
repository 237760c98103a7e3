"""Bad input: a clear error that names the argument or the parameter, and nothing changed."""

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from cm_fused._backends import select as _backend
from cm_fused._optimizer import checks
from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import (
    BACKENDS,
    CLASSES,
    KINDS,
    assert_same,
    give_gradients,
    new_optimizer,
    new_params,
    params_of,
    snapshot,
    train,
    trained,
)

pytestmark = pytest.mark.sampled

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class BadOption:
    """An option that must be refused wherever options are given."""

    name: str
    value: Any
    message: str

    def __str__(self) -> str:
        return f"{self.name}={self.value!r}"


BAD_OPTIONS = [
    BadOption("lr", NAN, "lr must be .*got nan"),
    BadOption("lr", -1e-3, r"lr must be .*got -0\.001"),
    BadOption("lr", INF, "lr must be .*got inf"),
    BadOption("lr", "fast", "lr must be .*got 'fast'"),
    BadOption("lr", None, "lr must be .*got None"),
    BadOption("lr", torch.tensor(NAN), "lr must be .*nan"),
    BadOption("lr", torch.tensor(-1.0), "lr must be .*-1"),
    BadOption("lr", torch.ones(2), "lr must be 1-element"),
    BadOption("betas", (-0.1, 0.9), r"betas\[0\] must be .*got -0\.1"),
    BadOption("betas", (1.0, 0.9), r"betas\[0\] must be .*got 1\.0"),
    BadOption("betas", (NAN, 0.9), r"betas\[0\] must be .*got nan"),
    BadOption("betas", (0.9, -0.1), r"betas\[1\] must be .*got -0\.1"),
    BadOption("betas", (0.9, 1.0), r"betas\[1\] must be .*got 1\.0"),
    BadOption("betas", (0.9, NAN), r"betas\[1\] must be .*got nan"),
    BadOption("betas", (0.9,), "betas must be a pair"),
    BadOption("betas", (0.9, 0.99, 0.999), "betas must be a pair"),
    BadOption("betas", 0.9, "betas must be a pair"),
    BadOption("eps", -1e-8, "eps must be .*got -1e-08"),
    BadOption("eps", NAN, "eps must be .*got nan"),
    BadOption("eps", INF, "eps must be .*got inf"),
    BadOption("weight_decay", -0.1, r"weight_decay must be .*got -0\.1"),
    BadOption("weight_decay", NAN, "weight_decay must be .*got nan"),
    BadOption("weight_decay", INF, "weight_decay must be .*got inf"),
    BadOption("capacity", -1, "capacity must be an int >= 0, got -1"),
    BadOption("capacity", -5, "capacity must be an int >= 0, got -5"),
    BadOption("capacity", 2.0, r"capacity must be an int >= 0, got 2\.0"),
    BadOption("capacity", True, "capacity must be an int >= 0, got True"),
    BadOption("capacity", "5", "capacity must be an int >= 0, got '5'"),
    BadOption("capacity", None, "capacity must be an int >= 0, got None"),
    BadOption("priority_decay", -0.1, r"priority_decay must be in \[0, 1\], got -0\.1"),
    BadOption("priority_decay", 1.1, r"priority_decay must be in \[0, 1\], got 1\.1"),
    BadOption("priority_decay", NAN, r"priority_decay must be in \[0, 1\], got nan"),
    BadOption("priority_scope", "layer", "priority_scope must be one of .*'tensor'.*got 'layer'"),
    BadOption("priority_scope", None, "priority_scope must be one of .*got None"),
    BadOption("buffer_mean", "filled", "buffer_mean must be one of .*'size'.*got 'filled'"),
    BadOption("backend", "cuda", "backend must be one of .*'eager'.*'triton'.*got 'cuda'"),
    BadOption("backend", "", "backend must be one of .*got ''"),
    BadOption("buffer_dtype", torch.int64, r"buffer_dtype must be .*got torch\.int64"),
    BadOption("buffer_dtype", "float8", "buffer_dtype must be .*got 'float8'"),
    BadOption("moment_dtype", torch.int64, r"moment_dtype must be .*got torch\.int64"),
    BadOption("moment_dtype", "half", "moment_dtype must be .*got 'half'"),
    BadOption("buffer_dtype", torch.float64, "buffer_dtype must be one of .*float64"),
    BadOption("buffer_dtype", torch.float8_e5m2, "buffer_dtype must be one of"),
    # What int4 is stored as.
    BadOption("buffer_dtype", torch.uint8, r"buffer_dtype must be one of .*got torch\.uint8"),
    BadOption("moment_dtype", torch.float16, "moment_dtype must be one of .*got torch.float16"),
    BadOption("low_precision_update", "up", "low_precision_update must be one of .*got 'up'"),
    BadOption(
        "adjust_lr_fn", "original", "adjust_lr_fn must be one of None, 'match.*got 'original'"
    ),
    BadOption("adjust_lr_fn", True, "adjust_lr_fn must be one of .*got True"),
    BadOption("foreach", True, "foreach must be None or False: the fused backends .*got True"),
    BadOption("fused", False, "fused must be None or True: .*backend='eager'.*got False"),
    BadOption("fused", "yes", "fused must be None or True: .*got 'yes'"),
    # Older rows have no number and no tensor: 1 was taken for True, and a tensor raised within.
    BadOption("fused", 1, "fused must be None or True: .*got 1"),
    BadOption("foreach", torch.ones(2), "foreach must be None or False: .*got tensor"),
    BadOption("seed", -1, r"seed must be an int in \[0, 2\^63\), got -1"),
    BadOption("seed", 1.5, r"seed must be an int in \[0, 2\^63\), got 1.5"),
    # Older rows have no flags: 'True' was False for amsgrad, and others raised at the first step.
    BadOption("amsgrad", "True", "amsgrad must be True or False, got 'True'"),
    BadOption("amsgrad", None, "amsgrad must be True or False, got None"),
    BadOption("amsgrad", 2, "amsgrad must be True or False, got 2"),
    BadOption("capturable", "False", "capturable must be True or False, got 'False'"),
    BadOption("eps_inside_sqrt", "False", "eps_inside_sqrt must be True or False, got 'False'"),
    BadOption("maximize", "False", "maximize must be True or False, got 'False'"),
    BadOption("maximize", torch.tensor(True), r"maximize must be True or False, got tensor\("),
    BadOption(
        "decoupled_weight_decay", "no", "decoupled_weight_decay must be True or False, got 'no'"
    ),
    BadOption("skip_nonfinite", "False", "skip_nonfinite must be a bool, got 'False'"),
]

bad_options = pytest.mark.parametrize("bad", BAD_OPTIONS, ids=str)


# Options


@bad_options
@pytest.mark.parametrize("cls", CLASSES)
def test_constructor_refuses(cls: type[CriticalAdam], bad: BadOption) -> None:
    """An option out of its range is a ValueError that names it and shows its value."""
    with pytest.raises(ValueError, match=bad.message):
        cls(new_params(), **{bad.name: bad.value})


@bad_options
def test_add_param_group_refuses(bad: BadOption) -> None:
    """A group with a bad option is not added, and the optimizer stays as it was."""
    optimizer = new_optimizer(CLASSES[0])
    train(optimizer, range(2))
    before = snapshot(optimizer)
    extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=bad.message):
        optimizer.add_param_group({"params": [extra], bad.name: bad.value})
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("name", checks.FLAGS)
@pytest.mark.parametrize("flag", [0, 1, np.False_, np.True_], ids=repr)
def test_flags_that_are_no_bools(name: str, flag: Any) -> None:
    """0, 1 and NumPy's bools are taken for flags, as they were when flags were not checked."""
    optimizer = new_optimizer(CLASSES[0], **{name: flag})
    assert optimizer.param_groups[0][name] == bool(flag)
    assert type(optimizer.param_groups[0][name]) in (int, bool)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], name: flag})
    optimizer.load_state_dict(optimizer.state_dict())
    if name != "capturable":
        optimizer.param_groups[0][name] = flag
        train(optimizer, range(2))


@pytest.mark.parametrize("name", [*checks.FLAGS, "skipped_steps"])
@pytest.mark.parametrize("value", ["abc", None, -1, 1.5, torch.tensor([1, 1])], ids=str)
def test_a_loaded_group_with_a_bad_flag_or_count(name: str, value: Any) -> None:
    """It is refused and nothing changes. Older state dicts had only numbers out of their range."""
    optimizer = new_optimizer(CLASSES[0])
    train(optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][1][name] = value
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{name} must be .*, got "):
        optimizer.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("count", [3, torch.tensor(3), torch.tensor([3], dtype=torch.int32)])
def test_loaded_counts_of_skipped_steps(count: Any) -> None:
    """What a group may have as its count still loads. Only state dicts of `state_dict` did."""
    optimizer = new_optimizer(CLASSES[0])
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["skipped_steps"] = count
    optimizer.load_state_dict(state_dict)
    assert int(optimizer.param_groups[0]["skipped_steps"]) == 3


# Backends


@pytest.mark.parametrize("cls", CLASSES)
def test_a_fused_backend_that_is_the_reference(cls: type[CriticalAdam]) -> None:
    """Two options that contradict each other are refused, wherever they are given."""
    message = "backend must be None, 'cpu' or 'triton' with fused=True, got 'eager'"
    with pytest.raises(ValueError, match=message):
        cls(new_params(), fused=True, backend="eager")
    optimizer = cls(new_params(), backend="eager")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "fused": True})


def test_cpu_backend_refuses_added_group_of_other_device() -> None:
    """A group the requested backend cannot serve is not added."""
    optimizer = new_optimizer(CLASSES[0], backend="cpu")
    train(optimizer, range(2))
    before = snapshot(optimizer)
    param = torch.nn.Parameter(torch.empty(2, device="meta"))
    with pytest.raises(RuntimeError, match=r"backend='cpu'.*CPU.*meta"):
        optimizer.add_param_group({"params": [param]})
    assert_same(snapshot(optimizer), before)


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make triton one that is not installed."""
    _backend._found.clear()
    monkeypatch.setattr(_backend, "find_spec", lambda name: None)
    yield
    _backend._found.clear()


@pytest.mark.usefixtures("_without_triton")
def test_triton_backend_says_why_not() -> None:
    """A backend that cannot be had is an error that says so; no other takes its place."""
    reason = "backend='triton' is not available: triton is not installed; pip install triton"
    with pytest.raises(RuntimeError, match=reason):
        CLASSES[0](new_params(), backend="triton")


@pytest.mark.usefixtures("_without_triton")
def test_backend_unmet_in_the_middle_of_training_changes_nothing() -> None:
    """A group's backend that cannot be had stops the step before any group is touched."""
    optimizer = new_optimizer(CLASSES[0])
    train(optimizer, range(2))
    optimizer.param_groups[-1]["backend"] = "triton"
    give_gradients(optimizer, 2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="backend='triton'"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# Gradients and parameters


class _ForeignGrad(torch.nn.Parameter):
    """A parameter whose gradient may be anything, as torch's own setter would not allow."""

    foreign: torch.Tensor | None = None

    @property
    def grad(self) -> torch.Tensor | None:
        """Whatever was set."""
        return self.foreign

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        self.foreign = value


def _sparse(param: torch.Tensor) -> None:
    param.grad = torch.ones_like(param.data).to_sparse()


def _data_of_other_dtype(param: torch.Tensor) -> None:
    param.grad = torch.ones_like(param.data)
    param.data = param.data.to(torch.float64)


def _data_of_other_shape(param: torch.Tensor) -> None:
    param.grad = torch.ones_like(param.data)
    param.data = torch.ones(7)


def _integer(param: torch.Tensor) -> None:
    param.grad = torch.ones(param.shape, dtype=torch.int64)


def _higher_precision(param: torch.Tensor) -> None:
    param.grad = torch.ones(param.shape, dtype=torch.float64)


def _eight_bits(param: torch.Tensor) -> None:
    param.grad = torch.ones(param.shape, dtype=torch.float8_e4m3fn)


def _broadcastable(param: torch.Tensor) -> None:
    param.grad = torch.ones(1)


def _on_meta(param: torch.Tensor) -> None:
    param.grad = torch.ones(param.shape, device="meta")


@dataclass(frozen=True)
class BadGradient:
    """A gradient no step can use.

    Attributes:
        set_: Gives it to a parameter.
        message: What the error says after the parameter's name.
        foreign: Whether torch's own setter refuses it.
    """

    set_: Callable[[torch.Tensor], None]
    message: str
    foreign: bool = True

    def __str__(self) -> str:
        return self.set_.__name__.removeprefix("_")


_OF_FLOAT32 = "dtype torch.float32 of its parameter, or torch.bfloat16 or torch.float16; convert"
BAD_GRADIENTS = [
    BadGradient(_sparse, "must be dense.*sparse_coo", foreign=False),
    BadGradient(_data_of_other_dtype, "dtype torch.float64.*got torch.float32", foreign=False),
    BadGradient(_data_of_other_shape, r"shape \(7,\).*got \(5,\)", foreign=False),
    BadGradient(_integer, f"{_OF_FLOAT32}.*got torch.int64"),
    BadGradient(_higher_precision, f"{_OF_FLOAT32}.*got torch.float64"),
    BadGradient(_eight_bits, f"{_OF_FLOAT32}.*got torch.float8_e4m3fn"),
    BadGradient(_broadcastable, r"shape \(5,\).*got \(1,\)"),
    BadGradient(_on_meta, "device cpu.*got meta"),
]


@pytest.mark.parametrize("steps_before", [0, 1, 4])
@pytest.mark.parametrize("bad", BAD_GRADIENTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_bad_gradient_changes_nothing(
    cls: type[CriticalAdam], backend: str, bad: BadGradient, steps_before: int
) -> None:
    """A bad gradient of the last parameter is found before any parameter or state is touched."""
    optimizer = new_optimizer(cls, backend=backend)
    last = _ForeignGrad(torch.ones(5)) if bad.foreign else torch.nn.Parameter(torch.ones(5))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2)), last]})
    train(optimizer, range(steps_before))
    give_gradients(optimizer, steps_before)
    bad.set_(last)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"gradient of parameter 1 of group 2.*{bad.message}"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_integer_parameter_and_gradient_change_nothing(
    cls: type[CriticalAdam], backend: str, dtype: torch.dtype
) -> None:
    """An integer gradient is refused also where its parameter has the same dtype."""
    optimizer = new_optimizer(cls, backend=backend)
    integers = torch.ones(3, dtype=dtype)
    optimizer.add_param_group({"params": [integers]})
    give_gradients(optimizer, 0, without=[len(params_of(optimizer)) - 1])
    integers.grad = torch.ones(3, dtype=dtype)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"{re.escape(str(dtype))}|integer"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_expanded_parameter_changes_nothing(cls: type[CriticalAdam], backend: str) -> None:
    """A parameter that holds several elements in one place cannot be stepped, and says so."""
    optimizer = new_optimizer(cls, backend=backend)
    expanded = torch.nn.Parameter(torch.ones(1).expand(4))
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2)), expanded]})
    give_gradients(optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter.*expanded.*\(4,\).*\(0,\)"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def _expand_data(param: torch.Tensor) -> None:
    param.data = torch.ones(1).expand(param.shape)


def _reshape_data(param: torch.Tensor) -> None:
    param.data = torch.ones(7)


def _reshape_data_to_one_element(param: torch.Tensor) -> None:
    param.data = torch.ones(1)


@pytest.mark.parametrize("replace", [_expand_data, _reshape_data, _reshape_data_to_one_element])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_impossible_replaced_data_changes_nothing(
    cls: type[CriticalAdam], backend: str, replace: Callable[[torch.Tensor], None]
) -> None:
    """Replaced `p.data` that the state does not fit is found before any group is stepped."""
    optimizer = new_optimizer(cls, backend=backend)
    train(optimizer, range(3))
    last = params_of(optimizer)[-1]
    replace(last)
    give_gradients(optimizer, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"param|exp_avg|shape|size"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(("capacity", "other"), [(3, 4), (3, 6), (6, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_changed_capacity_changes_nothing(
    cls: type[CriticalAdam], backend: str, capacity: int, other: int
) -> None:
    """A group's capacity cannot change while it trains; once put back, training goes on."""
    optimizer = new_optimizer(cls, capacity=capacity, backend=backend)
    twin = new_optimizer(cls, capacity=capacity, backend=backend)
    train(optimizer, range(4))
    train(twin, range(4))
    optimizer.param_groups[-1]["capacity"] = other
    give_gradients(optimizer, 4)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"capacity must stay .*{capacity}, got {other}"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    optimizer.param_groups[-1]["capacity"] = capacity
    train(optimizer, range(4, 8))
    train(twin, range(4, 8))
    assert_same(trained(optimizer), trained(twin))


BY_HAND = [
    BadOption("adjust_lr_fn", "foo", "adjust_lr_fn must be one of None, 'match.*got 'foo'"),
    BadOption("priority_scope", "foo", "priority_scope must be one of .*'tensor'.*got 'foo'"),
    BadOption("buffer_mean", "foo", "buffer_mean must be one of .*'size'.*got 'foo'"),
    BadOption("backend", "foo", "backend must be one of .*'eager'.*got 'foo'"),
    BadOption("low_precision_update", "foo", "low_precision_update must be one of .*got 'foo'"),
    BadOption("capacity", -1, "capacity must be an int >= 0, got -1"),
    BadOption("capacity", "5", "capacity must be an int >= 0, got '5'"),
    BadOption("capacity", 2.5, r"capacity must be an int >= 0, got 2\.5"),
    BadOption("betas", (1.0, 0.99), r"betas\[0\] must be in \[0, 1\), got 1\.0"),
    BadOption("betas", (0.9, 1.0), r"betas\[1\] must be in \[0, 1\), got 1\.0"),
    BadOption("betas", (-0.5, 1.0), r"betas\[0\] must be in \[0, 1\), got -0\.5"),
    BadOption("betas", (0.9,), r"betas must be a pair of floats, got \(0\.9,\)"),
    BadOption("betas", None, "betas must be a pair of floats, got None"),
    BadOption("buffer_dtype", "foo", "buffer_dtype must be one of .*got 'foo'"),
    BadOption("buffer_dtype", torch.int16, r"buffer_dtype must be one of .*got torch\.int16"),
    BadOption("moment_dtype", "float16", r"moment_dtype must be one of .*got torch\.float16"),
    BadOption("lr", torch.ones(2), r"Tensor lr must be 1-element, got \(2,\)"),
    BadOption("lr", INF, "lr must be finite, got inf"),
    BadOption("lr", "fast", "lr must be finite, got 'fast'"),
    BadOption("eps", -1e-8, "eps must be finite and >= 0, got -1e-08"),
    BadOption("eps", None, "eps must be finite and >= 0, got None"),
    BadOption("weight_decay", INF, "weight_decay must be finite, got inf"),
    BadOption("weight_decay", "0.1", r"weight_decay must be finite, got '0\.1'"),
    BadOption("priority_decay", 1.5, r"priority_decay must be in \[0, 1\], got 1\.5"),
    BadOption("max_grad_norm", 0.0, r"max_grad_norm must be None or finite and > 0, got 0\.0"),
    BadOption("seed", -1, r"seed must be an int in \[0, 2\^63\), got -1"),
    BadOption("seed", 1.5, r"seed must be an int in \[0, 2\^63\), got 1\.5"),
    BadOption("amsgrad", "True", "amsgrad must be True or False, got 'True'"),
    BadOption("eps_inside_sqrt", "False", "eps_inside_sqrt must be True or False, got 'False'"),
    BadOption("maximize", None, "maximize must be True or False, got None"),
    BadOption("decoupled_weight_decay", 2, "decoupled_weight_decay must be True or False, got 2"),
    BadOption("skip_nonfinite", "False", "skip_nonfinite must be a bool, got 'False'"),
    BadOption("betas", ("0.9", "0.99"), r"betas must be a pair of floats, got \('0\.9', '0\.99'\)"),
]


@pytest.mark.parametrize("bad", BY_HAND, ids=str)
@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_option_set_by_hand_changes_nothing(
    cls: type[CriticalAdam], backend: str, adjust_lr_fn: str | None, bad: BadOption
) -> None:
    """A value that a step cannot have is refused; once put back, training goes on.

    Older tests set such values by hand only where the state does not fit them: others were taken
    for another choice, and a beta of 1 with `adjust_lr_fn` raised ZeroDivisionError. They set no
    capacity but other ints >= 1: what no constructor takes raised torch's TypeErrors. Of the
    numbers they set only betas: a step took a NaN, or a seed of 1.5 with one backend. They set only
    numbers for betas, only a number for lr, and no dtype: Python's, torch's and C++ errors named
    neither option nor rule. They set no flags: a text was taken for True or False. They set no
    texts for betas, nor for `skip_nonfinite`: a step took them, and no checkpoint loaded.
    """
    optimizer = new_optimizer(cls, backend=backend, adjust_lr_fn=adjust_lr_fn)
    twin = new_optimizer(cls, backend=backend, adjust_lr_fn=adjust_lr_fn)
    train(optimizer, range(2))
    train(twin, range(2))
    group = optimizer.param_groups[-1]
    good, group[bad.name] = group[bad.name], bad.value
    give_gradients(optimizer, 2)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=bad.message):
            optimizer.step()
        assert_same(snapshot(optimizer), before)
    group[bad.name] = good
    train(optimizer, range(2, 4))
    train(twin, range(2, 4))
    assert_same(trained(optimizer), trained(twin))


@pytest.mark.parametrize("bad", [bad for bad in BY_HAND if "dtype" in bad.name], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtype_set_by_hand_before_the_first_step(backend: str, bad: BadOption) -> None:
    """A dtype that state cannot have is refused before there is state, and none is made.

    Slots were made of it: the reference trained with slots of int16, all of them 0. Older tests
    change a dtype once there is state, whose own is then another one.
    """
    optimizer = new_optimizer(CLASSES[0], backend=backend)
    optimizer.param_groups[-1][bad.name] = bad.value
    give_gradients(optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=bad.message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_capturable_needs_cuda() -> None:
    """A step that no CUDA graph could hold is refused when it is asked to be one."""
    optimizer = new_optimizer(CLASSES[0], capturable=True)
    give_gradients(optimizer, 0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"capturable=True .*CUDA.*params\[0\] on cpu"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


# State dicts

StateDict = dict[str, Any]


def _fewer_groups(state_dict: StateDict) -> None:
    state_dict["param_groups"].pop()


def _more_groups(state_dict: StateDict) -> None:
    state_dict["param_groups"].append({**state_dict["param_groups"][0], "params": []})


def _fewer_params(state_dict: StateDict) -> None:
    state_dict["param_groups"][-1]["params"].pop()


def _more_params(state_dict: StateDict) -> None:
    state_dict["param_groups"][-1]["params"].append(99)


def _other_capacity(state_dict: StateDict) -> None:
    state_dict["param_groups"][-1]["capacity"] = 7


def _other_capacity_of_buffer(state_dict: StateDict) -> None:
    last = state_dict["state"][4]
    last["critical_buffer"] = torch.zeros(7, 5)
    last["priorities"] = torch.zeros(7)


def _other_capacity_of_keys(state_dict: StateDict) -> None:
    state_dict["state"][4]["priorities"] = torch.zeros(7)


def _without_key(key: str) -> Callable[[StateDict], None]:
    def remove(state_dict: StateDict) -> None:
        del state_dict["state"][4][key]

    remove.__name__ = f"without_{key}"
    return remove


def _misshapen(key: str) -> Callable[[StateDict], None]:
    def reshape(state_dict: StateDict) -> None:
        value = state_dict["state"][4][key]
        state_dict["state"][4][key] = torch.cat([value.flatten(), value.flatten()])

    reshape.__name__ = f"misshapen_{key}"
    return reshape


def _transposed(state_dict: StateDict) -> None:
    state = state_dict["state"][0]
    state["exp_avg_sq"] = state["exp_avg_sq"].t().contiguous()


def _broadcastable_moment(state_dict: StateDict) -> None:
    state_dict["state"][4]["exp_avg"] = torch.ones(1)


def _of_dtype(key: str, dtype: torch.dtype) -> Callable[[StateDict], None]:
    def convert(state_dict: StateDict) -> None:
        state_dict["state"][4][key] = state_dict["state"][4][key].to(dtype)

    convert.__name__ = f"{key}_of_{str(dtype).removeprefix('torch.')}"
    return convert


def _of_form(key: str, form: str) -> Callable[[StateDict], None]:
    def convert(state_dict: StateDict) -> None:
        state = state_dict["state"][4]
        state[key] = state[key].to("meta") if form == "meta" else state[key].to_sparse()

    convert.__name__ = f"{form}_{key}"
    return convert


def _with_key(priority: float) -> Callable[[StateDict], None]:
    def replace(state_dict: StateDict) -> None:
        state_dict["state"][4]["priorities"][1] = priority

    replace.__name__ = f"key_{priority}"
    return replace


def _bad_option(state_dict: StateDict) -> None:
    state_dict["param_groups"][-1]["priority_decay"] = 2.0


BAD_STATE_DICTS: list[tuple[Callable[[StateDict], None], str]] = [
    (_fewer_groups, "2 param groups, got 1"),
    (_more_groups, "2 param groups, got 3"),
    (_fewer_params, "group 1.*2 parameters, got 1"),
    (_more_params, "group 1.*2 parameters, got 3"),
    (_other_capacity, "capacity 3 of group 1, got 7.*resize_buffer"),
    (_other_capacity_of_buffer, r"parameter 4.*shape.*\(capacity 3\)"),
    (_other_capacity_of_keys, r"'priorities'.*parameter 4.*shape \(3,\).*got \(7,\)"),
    (_without_key("step"), "parameter 4 must have 'step'"),
    (_without_key("exp_avg"), "parameter 4 must have 'exp_avg'"),
    (_without_key("exp_avg_sq"), "parameter 4 must have 'exp_avg_sq'"),
    (_without_key("priorities"), "parameter 4 .*'priorities'"),
    (_without_key("critical_buffer"), "parameter 4 .*'critical_buffer'"),
    (_misshapen("step"), r"'step'.*parameter 4.*shape \(\).*got \(2,\)"),
    (_misshapen("exp_avg"), r"'exp_avg'.*parameter 4.*shape \(5,\).*got \(10,\)"),
    (_misshapen("exp_avg_sq"), r"'exp_avg_sq'.*parameter 4.*shape \(5,\).*got \(10,\)"),
    (_misshapen("max_exp_avg_sq"), r"'max_exp_avg_sq'.*parameter 4.*shape \(5,\).*got \(10,\)"),
    (_misshapen("priorities"), r"'priorities'.*parameter 4.*shape \(3,\).*got \(6,\)"),
    (_misshapen("critical_buffer"), r"'critical_buffer'.*parameter 4.*shape \(3, 5\).*got \(30,\)"),
    (_transposed, r"'exp_avg_sq'.*parameter 0.*shape \(3, 4\).*got \(4, 3\)"),
    (_broadcastable_moment, r"'exp_avg'.*parameter 4.*shape \(5,\).*got \(1,\)"),
    (_of_dtype("exp_avg", torch.int64), "'exp_avg'.*parameter 4.*float or torch.int8, got .*int64"),
    (_of_dtype("exp_avg_sq", torch.bool), "'exp_avg_sq'.*4.*float or torch.int8, got torch.bool"),
    (_of_dtype("exp_avg_sq", torch.complex64), "'exp_avg_sq'.*4.*float or .*, got .*complex64"),
    (_of_dtype("max_exp_avg_sq", torch.int8), "'max_exp_avg_sq'.*4.*dtype float, got torch.int8"),
    (_of_dtype("critical_buffer", torch.int32), "'critical_buffer'.*4.*float or .*, got .*int32"),
    (_of_dtype("priorities", torch.complex64), "'priorities'.*4.*dtype float, got .*complex64"),
    (_of_form("exp_avg", "meta"), "'exp_avg'.*parameter 4.*dense .*, got one of the meta device"),
    (_of_form("step", "meta"), "'step'.*parameter 4.*dense .*, got one of the meta device"),
    (_of_form("exp_avg_sq", "sparse"), "'exp_avg_sq'.*4.*dense .*, got one of torch.sparse_coo"),
    (_with_key(math.nan), "'priorities'.*parameter 4.*finite and >= 0, or -inf .*, got nan"),
    (_with_key(math.inf), "'priorities'.*parameter 4.*finite and >= 0, or -inf .*, got inf"),
    (_with_key(-1.0), r"'priorities'.*parameter 4.*finite and >= 0, or -inf .*, got -1\.0"),
    (_bad_option, r"priority_decay must be in \[0, 1\], got 2\.0"),
]


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "running"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    BAD_STATE_DICTS,
    ids=[spoil.__name__.lstrip("_") for spoil, _ in BAD_STATE_DICTS],
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", KINDS)
def test_bad_state_dict_changes_nothing(
    cls: type[CriticalAdam],
    backend: str,
    spoil: Callable[[StateDict], None],
    message: str,
    fresh: bool,
) -> None:
    """A state dict that does not fit is a ValueError, and the optimizer is as it was before.

    Dtypes and keys were not damaged in earlier versions of this test, and so they loaded: integers
    without a moment's fractions, NaN as the key of a slot. Nor did a tensor fail to be copied: half
    of the parameters then had the loaded state.
    """
    source = new_optimizer(cls, capacity=3, amsgrad=True, backend=backend)
    train(source, range(5))
    state_dict = copy.deepcopy(source.state_dict())
    spoil(state_dict)

    optimizer, twin = (
        new_optimizer(cls, capacity=3, amsgrad=True, backend=backend, lr=1e-3) for _ in range(2)
    )
    steps = 0 if fresh else 4
    train(optimizer, range(steps))
    train(twin, range(steps))
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert_same(snapshot(optimizer), before)
    train(optimizer, range(steps, steps + 3))
    train(twin, range(steps, steps + 3))
    assert_same(trained(optimizer), trained(twin))
