"""A bfloat16 parameter and 16 more bits are trained as the float32 parameter, to the last bit."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cm_fused import (
    SAM,
    AdamCG,
    AdamCM,
    AdamWCG,
    AdamWCM,
    enable_gradient_release,
    get_master_param,
    set_master_param,
)
from cm_fused._backends.select import select
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused._bucket import Bucket, step_options
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.making import missing_state
from cm_fused._state.table import fused_keys, required_keys
from cm_fused.rounding import join_master, split_master
from tests.support.cases import backend_params, copy_of, device_of, generator, normal_like
from tests.support.same_bits import Case, bits_of

SPLIT: dict[str, Any] = {"low_precision_update": "split"}
CLASSES = (AdamCM, AdamCG, AdamWCM, AdamWCG)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"amsgrad": True, "maximize": True},
    {"max_grad_norm": 0.5, "weight_decay": 0.1},
    {"skip_nonfinite": True, "buffer_mean": "size"},
    {"priority_scope": "tensor", "weight_decay": 0.1, "capacity": 1},
    {"lr": torch.tensor(0.03), "adjust_lr_fn": "match_rms_adamw", "eps_inside_sqrt": False},
    {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16, "betas": (0.5, 0.8)},
    {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.int8},
)
# A tail, whole blocks and a part of one, and whole chunks of the Triton pass.
LENGTHS = ((5, 256, 700), (2 * CHUNK_SIZE + 3,))


def _cases() -> Iterator[Case]:
    for cls, options in itertools.product(CLASSES, OPTIONS):
        yield Case(cls, options, torch.bfloat16, LENGTHS[0])
    for cls, layout in itertools.product(CLASSES[:2], ("shifted", "transposed", "gaps")):
        yield Case(cls, {"weight_decay": 0.1}, torch.bfloat16, LENGTHS[0], layout)
    for cls in CLASSES[:2]:
        yield Case(cls, {}, torch.bfloat16, LENGTHS[0], amp=True)
        yield Case(cls, {"weight_decay": 0.1}, torch.bfloat16, LENGTHS[1])


def _in_float32(tensor: Tensor) -> Tensor:
    """Return a copy in float32 with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), device=tensor.device).copy_(tensor)


def _masters(optimizer: CriticalAdam) -> list[Tensor]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [get_master_param(optimizer, param) for param in params]


def _check_same(split: CriticalAdam, full: CriticalAdam, where: str) -> None:
    """Check that masters and all state are those of the float32 training; NaNs are one."""
    halves, fulls = ([p for g in o.param_groups for p in g["params"]] for o in (split, full))
    for half, master, param in zip(halves, _masters(split), fulls, strict=True):
        assert torch.equal(bits_of(master), bits_of(param)), f"{where}: a master"
        assert torch.equal(bits_of(half), bits_of(split_master(param)[0])), f"{where}: a parameter"
        expected = full.state[param]
        assert split.state[half].keys() == {*expected, "master_remainder"}
        for key, value in expected.items():
            assert torch.equal(bits_of(split.state[half][key]), bits_of(value)), f"{where}: {key}"


@pytest.mark.sampled
@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: case.name)
@pytest.mark.parametrize("backend", backend_params())
def test_the_bits_of_float32_training(backend: str, case: Case) -> None:
    """Every master, parameter and state, after every step, also once some are not finite."""
    halves = [copy_of(param, device_of(backend)) for param in case.make_params()]
    fulls = [_in_float32(param) for param in halves]
    split = replace(case, options={**case.options, **SPLIT}).make(halves, backend)
    full = case.make(fulls, backend)
    for step, grads in enumerate(case.gradients()):
        case.take_step(split, halves, grads, step)
        case.take_step(full, fulls, [grad.to(torch.float32) for grad in grads], step)
        _check_same(split, full, f"step {step}")


@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
def test_the_bits_of_a_long_training(backend: str, cls: type[CriticalAdam]) -> None:
    """Hundreds of steps of a model, in two groups, one of which has float32 parameters."""
    source = generator(1)
    shapes = ((7, 30), (33,), ())
    halves = [torch.randn(shape, generator=source).to(torch.bfloat16) for shape in shapes]
    wide = torch.randn(9, generator=source)
    twins = [*map(_in_float32, halves), wide.clone()]
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01, "backend": backend}
    split = cls([{"params": [halves[0], wide]}, {"params": halves[1:]}], **options, **SPLIT)
    full = cls([{"params": [twins[0], twins[3]]}, {"params": twins[1:3]}], **options)
    for _ in range(300):
        for param, twin in zip((*halves, wide), twins, strict=True):
            param.grad = normal_like(param, 1.0, source)
            twin.grad = param.grad.to(torch.float32)
        split.step()
        full.step()
    for master, twin in zip(_masters(split), (twins[0], twins[3], *twins[1:3]), strict=True):
        assert torch.equal(bits_of(master), bits_of(twin))
    assert split.state[wide]["master_remainder"].shape == (0,)


# The two halves


def _of_bits(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


# Zeros, the smallest numbers, ties to the neighbours of an even and an odd number, the largest
# numbers, of which some round to infinity, and infinities.
MAGNITUDES = _of_bits(
    [
        *(0, 1, 0x7FFF, 0x8000, 0x8001, 0x00807FFF),
        *(0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F818001),
        *(0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000),
    ]
)
MASTERS = torch.cat([MAGNITUDES, -MAGNITUDES])
# Quiet and signalling, with payloads whose rounding would carry, or leave infinity.
NANS = _of_bits([0x7FC00000, 0x7F800001, 0x7FFF8000, 0x7FFFFFFF, -1, -0x7FFFFF, -0x400000])


def test_masters_are_rounded_to_nearest() -> None:
    """Away from 0 where two numbers are as near; nothing is lost."""
    masters = torch.cat([MASTERS, torch.randn(1000, generator=generator(0))])
    rounded, remainder = split_master(masters)
    assert torch.equal(bits_of(join_master(rounded, remainder)), bits_of(masters))
    finite = rounded.isfinite()
    exact, nearest = masters[finite].double(), rounded[finite].double()
    for towards in (torch.inf, -torch.inf):
        bits = rounded[finite].view(torch.int16)
        away = (nearest > 0) == (towards > 0)
        other = torch.where(nearest == 0, 1, torch.where(away, bits + 1, bits - 1))
        neighbour = other.to(torch.int16).view(torch.bfloat16).double()
        distance, further = (nearest - exact).abs(), (neighbour - exact).abs()
        assert (distance <= further).all()
        ties = distance == further
        assert (nearest.abs() >= neighbour.abs())[ties].all()
    limit = float(torch.finfo(torch.bfloat16).max) + 2.0**119  # by half of the last place
    assert torch.equal(finite, masters.abs() < limit)


def test_a_nan_is_one_nan() -> None:
    """Whatever its bits were, so that no carry makes it a number."""
    rounded, remainder = split_master(NANS)
    assert (rounded.view(torch.int16) == 0x7FC0).all()
    assert not remainder.any()
    assert join_master(rounded, remainder).isnan().all()


@pytest.mark.parametrize("backend", backend_params())
def test_every_master_survives_a_step(backend: str) -> None:
    """A step of length 0 changes no master but NaNs, which become one, in any place of a block."""
    masters = torch.cat([MASTERS, NANS]).repeat(20)[:511].to(device_of(backend))
    param = torch.zeros(len(masters), dtype=torch.bfloat16, device=masters.device)
    param.grad = torch.zeros_like(param)
    optimizer = AdamCM([param], lr=0.0, backend=backend, **SPLIT)
    set_master_param(optimizer, param, masters)
    for _ in range(3):
        assert torch.equal(bits_of(get_master_param(optimizer, param)), bits_of(masters))
        assert torch.equal(bits_of(param), bits_of(split_master(masters)[0]))
        optimizer.step()


@pytest.mark.parametrize("backend", backend_params())
def test_a_parameter_set_by_hand_stays(backend: str) -> None:
    """Whatever remainder it meets, its master rounds to it: 0 and infinity do not become NaN."""
    values = torch.arange(-(2**15), 2**15, 7 if backend == "triton" else 1, dtype=torch.int16)
    param = torch.zeros(len(values), dtype=torch.bfloat16, device=device_of(backend))
    param.grad = torch.zeros_like(param)
    optimizer = AdamCM([param], lr=0.0, backend=backend, **SPLIT)
    optimizer.step()
    for remainder in (1, -1, 0x7FFF, -0x8000):
        param.copy_(values.view(torch.bfloat16))
        optimizer.state[param]["master_remainder"].fill_(remainder)
        optimizer.step()
        assert torch.equal(bits_of(param), bits_of(values.view(torch.bfloat16)))


# What goes with a step


@pytest.mark.parametrize("l2_in_aggregate", [False, True])
@pytest.mark.parametrize("backend", backend_params())
def test_norms_have_the_masters_weight_decay(backend: str, l2_in_aggregate: bool) -> None:
    """Norms that are taken before a step, of groups on several devices, are float32's."""
    device = device_of(backend)
    halves = [torch.randn(size, device=device).to(torch.bfloat16) for size in (300, 5)]
    group = {**AdamCG(halves, weight_decay=0.3, **SPLIT).param_groups[0]}
    keys = (*required_keys(group), *fused_keys(group, critical_gradients=True))
    states = [missing_state(param, {}, keys, group) for param in halves]
    for state in states:
        state["master_remainder"].random_(-(2**15), 2**15)
    masters = [join_master(p, s["master_remainder"]) for p, s in zip(halves, states, strict=True)]
    sums = []
    for params, update in ((halves, "split"), (masters, "nearest")):
        options = step_options({**group, "low_precision_update": update})
        options = options._replace(l2_in_aggregate=l2_in_aggregate)
        state = {key: [s[key] for s in states] for key in keys if key != "master_remainder"}
        if update == "split":
            state["master_remainder"] = [s["master_remainder"] for s in states]
        grads = [torch.full_like(param, 0.5) for param in params]
        bucket = Bucket(params, grads, state, [0, 1], critical_gradients=True, options=options)
        sums.append(select(backend, device).sq_norms(bucket, options))
    assert torch.equal(*sums)


Twin = tuple[nn.Module, AdamWCM]


def _twins(backend: str | None = None, **options: Any) -> list[Twin]:
    """Return two equal bfloat16 models with their optimizers."""
    made: list[Twin] = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(30, 20).to(torch.bfloat16)
        made.append((model, AdamWCM(model.parameters(), backend=backend, **SPLIT, **options)))
    return made


def _lose(model: nn.Module, step: int) -> Tensor:
    """Return a loss whose new gradients do not depend on the parameters."""
    model.zero_grad()
    inputs = torch.randn(8, 30, generator=generator(step)).to(torch.bfloat16)
    loss: Tensor = model(inputs).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def _check_equal(twins: list[Twin]) -> None:
    ours, theirs = (_masters(optimizer) for _, optimizer in twins)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(bits_of(mine), bits_of(other))
        assert not torch.equal(mine, mine.to(torch.bfloat16).to(torch.float32))


def test_sam_keeps_the_masters() -> None:
    """It moves the parameter and puts it back, while the remainder waits."""
    twins = (model, optimizer), (other, plain) = _twins()
    sam = SAM(optimizer, rho=0.5)
    for step in range(6):
        sam.step(partial(_lose, model, step))  # type: ignore[arg-type]
        _lose(other, step)
        plain.step()
    _check_equal(list(twins))


def test_gradient_release() -> None:
    """Stepping inside backward has the bits of steps after it."""
    twins = (model, optimizer), (other, plain) = _twins(priority_scope="tensor")
    enable_gradient_release(model, optimizer)
    for step in range(6):
        _lose(model, step)
        _lose(other, step)
        plain.step()
    _check_equal(list(twins))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_compiled_steps(backend: str) -> None:
    """torch.compile takes the step whole, with the same bits."""
    twins = (model, optimizer), (other, plain) = _twins(backend)
    torch._dynamo.reset()
    step_ = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for step in range(4):
        for each in (model, other):
            _lose(each, step)
        step_()
        plain.step()
    torch._dynamo.reset()
    _check_equal(list(twins))


# Options, checkpoints and casts


def _stepped(update: str = "split", **options: Any) -> tuple[Tensor, AdamCM]:
    param = torch.linspace(-2, 2, 300).to(torch.bfloat16)
    optimizer = AdamCM([param], low_precision_update=update, **options)
    _step(optimizer, param)
    return param, optimizer


def _step(optimizer: CriticalAdam, param: Tensor, steps: int = 3) -> None:
    for step in range(steps):
        param.grad = normal_like(param, 1.0, generator(step))
        optimizer.step()


@pytest.mark.parametrize("saving", ["eager", "cpu"])
@pytest.mark.parametrize("loading", ["eager", "cpu"])
def test_a_checkpoint_has_the_masters(saving: str, loading: str) -> None:
    """A state dict and the parameters go on with the same bits, on another backend too."""
    param, optimizer = _stepped(backend=saving)
    other = param.clone()
    resumed = AdamCM([other], backend=loading)
    resumed.load_state_dict(optimizer.state_dict())
    masters = get_master_param(optimizer, param), get_master_param(resumed, other)
    assert torch.equal(*map(bits_of, masters))
    if saving == loading:
        for each, of in ((optimizer, param), (resumed, other)):
            _step(each, of)
        masters = get_master_param(optimizer, param), get_master_param(resumed, other)
        assert torch.equal(*map(bits_of, masters))


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
@pytest.mark.parametrize("update", ["nearest", "stochastic", "kahan"])
def test_another_rounding_in_between(update: str, backend: str) -> None:
    """What the last rounding left is stale after a step with another one: it starts anew."""
    param, optimizer = _stepped(backend=backend)
    group = optimizer.param_groups[0]
    group["low_precision_update"] = update
    _step(optimizer, param)
    assert "master_remainder" not in optimizer.state[param]
    assert ("compensation" in optimizer.state[param]) == (update == "kahan")
    group["low_precision_update"] = "split"
    assert torch.equal(get_master_param(optimizer, param), param.to(torch.float32))
    _step(optimizer, param)
    assert "compensation" not in optimizer.state[param]
    assert optimizer.state[param]["master_remainder"].any()


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
def test_a_model_that_is_cast(backend: str) -> None:
    """A parameter has a remainder while it is of bfloat16; float16 is refused, with no change."""
    param = torch.ones(300, requires_grad=True)
    optimizer = AdamCM([param], backend=backend, **SPLIT)
    for dtype, shape in ((torch.float32, (0,)), (torch.bfloat16, (300,)), (torch.float32, (0,))):
        param.grad = None
        param.data = param.data.to(dtype)
        assert torch.equal(get_master_param(optimizer, param), param.to(torch.float32))
        _step(optimizer, param)
        assert optimizer.state[param]["master_remainder"].shape == shape
    param.grad = None
    param.data = param.data.to(torch.float16)
    before = param.clone()
    with pytest.raises(RuntimeError, match=r"'kahan' for float16 parameters.*got 'split'"):
        _step(optimizer, param)
    assert torch.equal(param, before)


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
@pytest.mark.parametrize("update", ["split", "kahan"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_a_model_that_is_cast(
    saved: torch.dtype, update: str, backend: str
) -> None:
    """A state dict loads after a cast in either direction; what rounding left starts anew.

    Loading refused it. Older tests loaded float32 state that had been saved without the option,
    went back to float32 by the masters alone, and cast models without a checkpoint.
    """
    key = {"split": "master_remainder", "kahan": "compensation"}[update]
    param = torch.linspace(-2, 2, 300).to(saved)
    optimizer = AdamCM([param], low_precision_update=update, backend=backend)
    _step(optimizer, param)
    other = param.to(torch.bfloat16 if saved is torch.float32 else torch.float32)
    resumed = AdamCM([other], backend=backend)
    resumed.load_state_dict(optimizer.state_dict())
    state = resumed.state[other]
    assert state[key].shape == ((0,) if other.dtype is torch.float32 else other.shape)
    assert not state[key].any()
    assert torch.equal(state["critical_buffer"], optimizer.state[param]["critical_buffer"])
    _step(resumed, other)
    damaged = optimizer.state_dict()
    damaged["state"][0][key] = torch.zeros(2, dtype=torch.int16)
    with pytest.raises(ValueError, match=rf"'{key}' .* must have shape \(300,\)"):
        resumed.load_state_dict(damaged)


def test_float16_is_refused() -> None:
    """A float16 parameter has no part of a float32's bits; the message says what to take."""
    param = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    message = (
        r"low_precision_update must be .*'kahan' for float16 .*group of their own: params\[0\]"
    )
    with pytest.raises(ValueError, match=message):
        AdamCM([param], **SPLIT)
    optimizer = AdamCM([torch.zeros(3, dtype=torch.bfloat16)], **SPLIT)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param]})
    optimizer.add_param_group({"params": [param], "low_precision_update": "kahan"})


# Masters in and out


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
def test_training_goes_on_from_a_master(backend: str) -> None:
    """From float32 to bfloat16 in the middle of a training, state and all, and back."""
    full = torch.randn(300, generator=generator(0))
    training = AdamCM([full], backend=backend)
    _step(training, full)
    half = full.to(torch.bfloat16)
    split = AdamCM([half], backend=backend)
    split.load_state_dict(training.state_dict())
    split.param_groups[0]["low_precision_update"] = "split"
    set_master_param(split, half, full)
    for step in range(3):
        half.grad = normal_like(half, 1.0, generator(step))
        full.grad = half.grad.to(torch.float32)
        split.step()
        training.step()
    _check_same(split, training, "the end")
    back = get_master_param(split, half)
    assert torch.equal(back, full)
    assert back.data_ptr() != half.data_ptr()


def test_a_master_that_is_set_before_the_first_step_is_saved() -> None:
    """It needs no step for a checkpoint to have it."""
    param = torch.zeros(3, dtype=torch.bfloat16)
    optimizer = AdamCM([param], **SPLIT)
    assert torch.equal(get_master_param(optimizer, param), torch.zeros(3))
    set_master_param(optimizer, param, torch.tensor([math.pi, 1e-30, -2.0], dtype=torch.float64))
    other = param.clone()
    resumed = AdamCM([other])
    resumed.load_state_dict(optimizer.state_dict())
    expected = torch.tensor([math.pi, 1e-30, -2.0])
    assert torch.equal(get_master_param(resumed, other), expected)
    for each, of in ((optimizer, param), (resumed, other)):
        _step(each, of)
    assert torch.equal(get_master_param(optimizer, param), get_master_param(resumed, other))


def test_masters_of_other_parameters() -> None:
    """A float32 or float64 parameter is its own master, whatever the group's rounding."""
    for dtype, options in itertools.product((torch.float32, torch.float64), (SPLIT, {})):
        param = torch.ones(3, dtype=dtype)
        optimizer = AdamCM([param], **options)
        set_master_param(optimizer, param, torch.tensor([1.0, 0.1, -3.0]))
        master = get_master_param(optimizer, param)
        assert master.dtype == dtype
        assert torch.equal(master, param)
        assert torch.equal(param, torch.tensor([1.0, 0.1, -3.0]).to(dtype))


def test_what_has_no_master() -> None:
    """Errors name the argument, and nothing is changed."""
    param, optimizer = _stepped("kahan")
    before = param.clone()
    message = "low_precision_update must be 'split' for a torch.bfloat16 parameter .*got 'kahan'"
    with pytest.raises(ValueError, match=message):
        get_master_param(optimizer, param)
    with pytest.raises(ValueError, match=message):
        set_master_param(optimizer, param, torch.zeros(300))
    with pytest.raises(ValueError, match=r"one of the optimizer's, got another of shape \(2,\)"):
        get_master_param(optimizer, torch.zeros(2))
    param, optimizer = _stepped()
    with pytest.raises(ValueError, match=r"shape \(300,\), got \(1,\)"):
        set_master_param(optimizer, param, torch.zeros(1))
    assert torch.equal(param, _stepped()[0])
    assert before.isfinite().all()


def test_masters_of_another_kind() -> None:
    """Another optimizer, and a master that is no real tensor, are refused with no change.

    The first raised a KeyError, an array an AttributeError after it had made the state, and
    imaginary parts were dropped. Older tests passed tensors of real numbers to this package's
    optimizers.
    """
    param = torch.ones(3, dtype=torch.bfloat16)
    optimizer = AdamCM([param], **SPLIT)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (np.zeros(3), TypeError, "master must be a tensor, got ndarray"),
        (torch.zeros(3, dtype=torch.complex64), ValueError, "must be real .*got torch.complex64"),
    ]
    for master, error, message in wrong:
        with pytest.raises(error, match=message):
            set_master_param(optimizer, param, master)
    adam = torch.optim.Adam([param])
    for wrapped in (adam, SAM(adam)):
        with pytest.raises(TypeError, match="optimizer must be one of cm_fused's"):
            get_master_param(wrapped, param)
    assert torch.equal(param, torch.ones_like(param))
    assert not optimizer.state
    assert get_master_param(SAM(optimizer), param).dtype is torch.float32
