"""State and parameters of low precision: backends against the reference, and what users see."""

import copy
import itertools
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM, AdamWCM, diagnostics, rounding
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused._optimizer import planned
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._state.making import dequantized, dtype_of
from cm_fused.philox import ShardLayout
from cm_fused.rounding import HALF_DTYPES, INT4, LARGEST, dequantize_moment, num_blocks
from tests.support.cases import (
    CHUNK,
    FUSED_BACKENDS,
    KINDS,
    Grads,
    Kind,
    backend_params,
    copy_of,
    device_of,
    generator,
    normal_like,
    skip_if,
    skip_reason,
)
from tests.support.compare import committed_copy

BUFFER_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, INT4)
MOMENT_DTYPES = (torch.bfloat16, torch.int8)
UPDATES = ("nearest", "stochastic", "kahan")
# Parts of a block of 256; one not contiguous. `_params` adds a chunk and a part of one.
SHAPES: tuple[tuple[int, ...], ...] = ((3,), (256,), (6, 5, 4, 9))
SEED = 2**40 + 17

Precision = dict[str, Any]


def _precisions() -> list[tuple[torch.dtype, Precision]]:
    """Return dtypes of parameters with every pair of dtypes of the state, updates in turn."""
    pairs = [
        pair
        for pair in itertools.product((None, *BUFFER_DTYPES), (None, *MOMENT_DTYPES))
        if pair != (None, None)
    ]
    cases: list[tuple[torch.dtype, Precision]] = []
    for number, (buffer_dtype, moment_dtype) in enumerate(pairs):
        precision = {"buffer_dtype": buffer_dtype, "moment_dtype": moment_dtype}
        cases.append((torch.float32, precision))
        half = {**precision, "low_precision_update": UPDATES[number % 3]}
        cases.append((HALF_DTYPES[number % 2], half))
    cases += [
        (dtype, {"low_precision_update": update}) for dtype in HALF_DTYPES for update in UPDATES[1:]
    ]
    return cases


def _name(case: tuple[torch.dtype, Precision]) -> str:
    dtype, precision = case
    words = [str(value).removeprefix("torch.") for value in precision.values() if value]
    return "-".join([str(dtype).removeprefix("torch."), *words])


PRECISIONS = [pytest.param(*case, id=_name(case)) for case in _precisions()]


def _class(kind: Kind) -> type[CriticalAdam]:
    return AdamCM if kind == "cm" else AdamCG


def _params(
    dtype: torch.dtype, device: torch.device | str = "cpu", backend: str = "cpu"
) -> list[Tensor]:
    source = generator(0)
    chunk = CHUNK_SIZE if backend == "triton" else CHUNK
    shapes = (*SHAPES, (chunk + 300,))
    params = [normal_like(torch.empty(shape, dtype=dtype), 1.0, source) for shape in shapes]
    params[2] = params[2].to(memory_format=torch.channels_last)
    return [param.to(device) for param in params]


def _gradients(params: list[Tensor], step: int) -> Grads:
    source = generator(100 + step)
    scale = (1.0, 0.5, 2.0, 8.0, 0.01)[step % 5]
    return [normal_like(param, scale, source) for param in params]


def _take_step(optimizer: CriticalAdam, params: list[Tensor], step: int) -> None:
    for param, grad in zip(params, _gradients([p.cpu() for p in params], step), strict=True):
        assert grad is not None
        param.grad = grad.to(param.device)
    optimizer.step()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _codes_and_values(stored: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return integers in the order of a tensor's values, neighbours one apart, and the values.

    Scales are left out: values are parts of what a block's largest value is stored as.
    """
    if stored.dtype is rounding.PACKED:
        stored = torch.stack([stored.view(torch.int8) << 4 >> 4, stored.view(torch.int8) >> 4])
    bits = 8 * stored.itemsize
    raw = stored.view(torch.int8 if bits == 8 else torch.int16).to(torch.int32)
    magnitude = raw & (2 ** (bits - 1) - 1)
    if stored.dtype is torch.int8 and "exp_avg" in what:
        signed = not what.endswith("exp_avg_sq")
        flat = stored.contiguous().reshape(-1)
        values = dequantize_moment(flat, torch.ones(num_blocks(len(flat))), signed=signed)
        codes = torch.where(raw < 0, -magnitude, magnitude) if signed else raw & 255
        return codes, values.reshape(stored.shape)
    if stored.dtype is torch.int8:
        return raw, raw.float()
    return torch.where(raw < 0, -magnitude, magnitude), stored.float()


def _check(actual: Tensor, expected: Tensor, what: str) -> None:
    """Check that stored values are equal, except a few that are neighbours; float32's nearly."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.dtype == expected.dtype, what
    if actual.dtype in (torch.float32, torch.int64):
        finite = expected[expected.isfinite()]
        atol = 4e-6 * float(finite.abs().max()) if finite.numel() else 0.0
        torch.testing.assert_close(
            actual, expected, rtol=2e-6, atol=atol, msg=lambda m: f"{what}: {m}"
        )
        return
    (codes, values), (wanted_codes, wanted) = (
        _codes_and_values(tensor, what) for tensor in (actual, expected)
    )
    size = float(wanted.abs().max()) if wanted.numel() else 0.0
    # A value that is what is left of larger ones has the roundings of those.
    apart = (codes - wanted_codes).abs()
    apart[(values - wanted).abs() <= 4e-6 * size] = 0
    assert apart.max() <= 1, f"{what}: {int(apart.max())} codes apart"
    differing = int((apart > 0).sum())
    assert differing <= 2 + 0.01 * apart.numel(), f"{what}: {differing} codes differ"


def _synchronize(state: dict[str, Any], expected: dict[str, Any]) -> None:
    """Give a state another's values; a commit that is pending stays so, for the next step."""
    pending = int(state.get("pending_slot", -1))
    for key, value in expected.items():
        kept = state[key][pending].clone() if pending >= 0 and key in _OF_SLOTS else None
        state[key].copy_(value)
        if kept is not None:
            state[key][pending] = kept
    if "critical_sum" in state:
        torch.sum(dequantized(state, "critical_buffer"), 0, out=state["critical_sum"])


_OF_SLOTS = ("critical_buffer", "critical_scales")


@pytest.mark.sampled
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
@pytest.mark.parametrize("capacity", [2, 6])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_params(FUSED_BACKENDS))
def test_lockstep(
    backend: str, kind: Kind, capacity: int, dtype: torch.dtype, precision: Precision
) -> None:
    """Step by step from the same state a fused backend stores what the reference does.

    torch's kernels contract some products and sums of float32, so that a value may be rounded to
    the other neighbour: at most one code apart, and seldom.
    """
    device = device_of(backend)
    options = {"capacity": capacity, "lr": 0.05, "seed": SEED, **precision}
    params, expected = (_params(dtype, device, backend) for _ in range(2))
    fused = _class(kind)(params, backend=backend, **options)
    eager = _class(kind)(expected, backend="eager", **options)
    for step in range(capacity + 4):
        _take_step(fused, params, step)
        _take_step(eager, expected, step)
        for i, (param, other) in enumerate(zip(params, expected, strict=True)):
            where, wanted = f"step {step}, params[{i}]", eager.state[other]
            # Slots are compared as they are of the same momenta: these may be a code apart.
            momenta = {key: wanted[key] for key in ("exp_avg", "exp_avg_scales") if key in wanted}
            seen = committed_copy({**fused.state[param], **momenta})
            for key in momenta:
                _check(fused.state[param][key], wanted[key], f"{where}, {key}")
            for key in wanted.keys() - {"compensation"}:
                _check(seen[key], wanted[key], f"{where}, {key}")
            _check(param, other, where)
            if wanted.get("compensation", torch.empty(0)).numel():
                running, exact = (
                    p.float().cpu() + state["compensation"].float().cpu()
                    for p, state in ((param, seen), (other, wanted))
                )
                spacing = float(torch.finfo(dtype).eps) * wanted["compensation"].abs().max()
                bound = float(spacing) + 4e-6 * float(exact.abs().max())
                torch.testing.assert_close(running, exact, rtol=0, atol=bound)
            param.copy_(other)
            _synchronize(fused.state[param], wanted)


@pytest.mark.parametrize("dtype", BUFFER_DTYPES)
@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
def test_every_code_of_a_slot_is_read(backend: str, dtype: torch.dtype) -> None:
    """Subnormal and infinite ones too, in whole vectors and in what they leave over.

    Runs store few of them, and how a vector of codes is read differs between instruction sets.
    Triton's interpreter is left out: it takes subnormal bfloat16 for other numbers.
    """
    device = device_of(backend)
    integer = torch.int8 if dtype.itemsize == 1 else torch.int16
    codes = torch.arange(torch.iinfo(integer).min, 1 + torch.iinfo(integer).max, dtype=integer)
    if dtype != INT4:
        codes = torch.cat([codes, codes[1:]]).view(dtype)
    if dtype == torch.float8_e4m3fn:
        codes = codes[~codes.isnan()]  # which is never stored
    stored = codes
    if dtype == INT4:
        # Every byte, so that each half is read beside all others; and a block of 81.
        stored = torch.cat([codes, codes[:81]]).view(torch.uint8)
        codes = rounding.unpack(stored, 2 * len(codes) + 81)
    param = torch.zeros(len(codes), device=device)
    param.grad = torch.zeros_like(param)
    optimizer = AdamCG([param], capacity=1, betas=(0.0, 0.99), buffer_dtype=dtype, backend=backend)
    optimizer.step()  # which makes the state
    state = optimizer.state[param]
    state["critical_buffer"][0].copy_(stored)
    scale = torch.tensor(0.37 if "critical_scales" in state else 1.0)
    if "critical_scales" in state:
        state["critical_scales"].copy_(scale)
    optimizer.step()
    # The gradient is 0 and so is beta1: the first moment is what was read.
    torch.testing.assert_close(
        state["exp_avg"].cpu(), codes.float() * scale, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("moment_dtype", MOMENT_DTYPES)
@pytest.mark.parametrize("backend", backend_params())
def test_a_nan_of_32_ones_stays(backend: str, moment_dtype: torch.dtype) -> None:
    """Random bits make no number of it.

    Interpreted, moments in bfloat16 became 0 by a carry. Older tests have torch's own NaN.
    """
    param = torch.ones(7, device=device_of(backend))
    param.grad = torch.full_like(param, -1, dtype=torch.int32).view(torch.float32)
    optimizer = AdamCM([param], moment_dtype=moment_dtype, backend=backend)
    optimizer.step()
    moments = [dequantized(optimizer.state[param], key) for key in ("exp_avg", "exp_avg_sq")]
    assert [value.isnan().all().item() for value in (param, *moments)] == [True] * 3


@skip_if(skip_reason(backend="cpu"))
@pytest.mark.parametrize("capacity", [5, 12])
@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
def test_commit_of_a_state_dict(dtype: torch.dtype, precision: Precision, capacity: int) -> None:
    """A state dict's commits, made by the C++ operator, have the reference's bits.

    It went through the reference, in copies; older tests look at what the next step commits.
    """
    params = _params(dtype)
    optimizer = AdamCM(params, capacity=capacity, lr=0.05, seed=SEED, backend="cpu", **precision)
    for step in range(4):
        _take_step(optimizer, params, step)
    states = [optimizer.state[param] for param in params]
    assert all(state["pending_slot"] >= 0 for state in states)
    expected = [committed_copy(state) for state in states]
    with mock.patch("cm_fused._backends.flush.flush_", side_effect=AssertionError):
        optimizer.state_dict()
    for state, values in zip(states, expected, strict=True):
        for key, value in values.items():
            assert torch.equal(_bits(state[key]), _bits(value)), key


@pytest.mark.parametrize("buffer_dtype", [torch.float8_e4m3fn, torch.int8, INT4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", backend_params(FUSED_BACKENDS))
def test_a_block_without_a_usable_scale(
    backend: str, kind: Kind, buffer_dtype: torch.dtype
) -> None:
    """Values too small for a scale are stored as 0 without a sign, in the reference too.

    The reference kept the sign in float8; older tests compare codes, of which -0 is 0.
    """
    stored = []
    for name in ("eager", backend):
        param = torch.zeros(300, device=device_of(name))
        optimizer = _class(kind)([param], capacity=1, backend=name, buffer_dtype=buffer_dtype)
        for _ in range(2):
            param.grad = torch.full_like(param, -1e-35)
            optimizer.step()
        optimizer.state_dict()
        stored.append(optimizer.state[param]["critical_buffer"].cpu())
    assert not stored[0].view(torch.int8).any()
    assert torch.equal(*map(_bits, stored))


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
def test_interrupted_by_another_backend(backend: str) -> None:
    """A state dict of low precision loads into every backend, which takes over its random words."""
    precision: Precision = {"buffer_dtype": torch.int8, "moment_dtype": torch.bfloat16}
    params = _params(torch.float32)
    optimizer = AdamCM(params, seed=SEED, backend=backend, **precision)
    for step in range(8):
        _take_step(optimizer, params, step)
    others = [copy_of(param) for param in params]
    other_backend = "eager" if backend == "cpu" else None
    other = AdamCM(others, backend=other_backend, **precision)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["seed"] == SEED
    for step in range(8, 10):
        _take_step(optimizer, params, step)
        _take_step(other, others, step)
    for param, twin in zip(params, others, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-4, atol=1e-4)


def _options_of_state() -> list[Precision]:
    return [
        {"buffer_dtype": buffer_dtype, "moment_dtype": moment_dtype}
        for buffer_dtype in (None, *BUFFER_DTYPES)
        for moment_dtype in (None, *MOMENT_DTYPES)
    ]


@pytest.mark.parametrize("saved", _options_of_state(), ids=str)
def test_conversion(saved: Precision) -> None:
    """A state dict of another precision is rounded to the optimizer's, which says so."""
    params = _params(torch.float32)
    optimizer = AdamCM(params, **saved)
    for step in range(7):
        _take_step(optimizer, params, step)
    state_dict = optimizer.state_dict()
    before = copy.deepcopy(state_dict)
    for own in _options_of_state():
        other = AdamCM([copy_of(param) for param in params], **own)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other.load_state_dict(state_dict)
        changed = [name for name in own if own[name] != saved[name]]
        assert len(caught) == len(changed)
        for name, warning in zip(changed, caught, strict=True):
            assert name in str(warning.message)
        group = other.param_groups[0]
        assert {name: group[name] for name in own} == own
        for param, twin in zip(params, group["params"], strict=True):
            loaded, original = other.state[twin], optimizer.state[param]
            # Half a code of 7.
            of_slots = 0.072 if own["buffer_dtype"] is INT4 else 0.05
            bounds = {"exp_avg": 0.05, "exp_avg_sq": 0.05, "critical_buffer": of_slots}
            for key, bound in bounds.items():
                assert loaded[key].dtype == dtype_of(key, twin, group)
                values = dequantized(loaded, key)
                expected = dequantized(original, key)
                apart = (values - expected).abs().max() / expected.abs().max()
                assert apart <= (0 if loaded[key].dtype == original[key].dtype else bound), key
            assert ("critical_scales" in loaded) == (loaded["critical_buffer"].dtype in LARGEST)
            assert ("exp_avg_scales" in loaded) == (own["moment_dtype"] in LARGEST)
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(_bits(value), _bits(state_dict["state"][index][key]))


def test_packed_slots_lie_as_the_momentum() -> None:
    """Loaded into another memory order they are rounded anew; bytes of another size are refused."""
    shape = (4, 5, 9, 7)
    optimizers = []
    for memory_format in (torch.channels_last, torch.channels_last, torch.contiguous_format):
        params = [torch.zeros(shape).to(memory_format=memory_format)]
        optimizers.append(AdamCM(params, buffer_dtype="int4"))
    first = optimizers[0]
    for step in range(7):
        _take_step(first, first.param_groups[0]["params"], step)
    state_dict = first.state_dict()
    saved = state_dict["state"][0]
    assert saved["critical_buffer"].shape == (5, 640)
    slots = dequantized(saved, "critical_buffer")
    for other, bound in zip(optimizers[1:], (0.0, 0.072), strict=True):
        other.load_state_dict(state_dict)
        (param,) = other.param_groups[0]["params"]
        loaded = dequantized(other.state[param], "critical_buffer")
        assert loaded[0].stride() == param.stride()
        assert (loaded - slots).abs().max() <= bound * slots.abs().max()
    for wrong in (saved["critical_buffer"][:, 1:], slots.to(torch.uint8)):
        damaged = {**state_dict, "state": {0: {**saved, "critical_buffer": wrong}}}
        with pytest.raises(ValueError, match=r"'critical_buffer' .* must have shape \(5, 640\)"):
            first.load_state_dict(damaged)


def test_conversion_of_adams_moments() -> None:
    """A torch Adam checkpoint is rounded too, with the warning, and the buffer starts empty."""
    params = _params(torch.float32)
    adam = torch.optim.Adam(params, betas=(0.9, 0.99))
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator(1))
    adam.step()
    optimizer = AdamCM(params, moment_dtype=torch.int8, buffer_dtype=torch.int8)
    with pytest.warns(UserWarning, match="moment_dtype=torch.float32 and is converted"):
        optimizer.load_state_dict(adam.state_dict())
    optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].dtype is torch.int8 for p in params)


def test_missing_scales_are_named() -> None:
    """Quantized state without its scales cannot be read; nothing is changed."""
    params = _params(torch.float32)
    optimizer = AdamCM(params, buffer_dtype=torch.int8)
    _take_step(optimizer, params, 0)
    state_dict = optimizer.state_dict()
    del state_dict["state"][1]["critical_scales"]
    with pytest.raises(ValueError, match="'critical_scales' in the state of parameter 1"):
        optimizer.load_state_dict(state_dict)
    assert "critical_scales" in optimizer.state[params[1]]


BYTES = [
    (None, None, 28.0),
    (torch.bfloat16, None, 18.0),
    (torch.float16, None, 18.0),
    (torch.float8_e4m3fn, None, 13 + 5 / 64),
    (torch.int8, None, 13 + 5 / 64),
    (torch.int8, torch.bfloat16, 9 + 5 / 64),
    (torch.int8, torch.int8, 7 + 7 / 64),
    (INT4, None, 10.5 + 5 / 64),
    (INT4, torch.bfloat16, 6.5 + 5 / 64),
]


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
@pytest.mark.parametrize(("buffer_dtype", "moment_dtype", "expected"), BYTES)
def test_state_bytes(
    backend: str,
    buffer_dtype: torch.dtype | None,
    moment_dtype: torch.dtype | None,
    expected: float,
) -> None:
    """State is what the README says, bytes a parameter; a float32 running sum is 4 more."""
    param = torch.randn(2**14)
    precision: Precision = {"buffer_dtype": buffer_dtype, "moment_dtype": moment_dtype}
    optimizer = AdamCM([param], backend=backend, **precision)
    _take_step(optimizer, [param], 0)
    state = optimizer.state[param]
    large = sum(value.nbytes for value in state.values() if value.numel() > 8)
    if backend == "cpu" and buffer_dtype is None:
        assert "critical_sum" in state
        expected += 4
    assert large / param.numel() == expected


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_small_updates_of_large_parameters(backend: str, dtype: torch.dtype) -> None:
    """At 1.0, updates of 1e-3 are lost to nearest rounding, and to no other.

    Stochastic rounding follows the float32 twin in the mean over the elements, a compensated sum in
    every element's running value, parameter and compensation.
    """
    steps, lr = 40, 1e-3 if dtype is torch.bfloat16 else 1e-4
    twin = torch.ones(4096)
    optimizers = {}
    params = {}
    for update in UPDATES:
        params[update] = torch.ones(4096, dtype=dtype)
        optimizers[update] = AdamCM(
            [params[update]], lr=lr, backend=backend, low_precision_update=update
        )
    exact = AdamCM([twin], lr=lr, backend=backend)
    grad = torch.full((4096,), 0.25)
    for _ in range(steps):
        twin.grad = grad
        exact.step()
        for update in UPDATES:
            params[update].grad = grad.to(dtype)
            optimizers[update].step()
        state = optimizers["kahan"].state[params["kahan"]]
        running = params["kahan"].float() + state["compensation"].float()
        torch.testing.assert_close(running, twin, rtol=0, atol=0.02 * steps * lr * 2**-4)
    moved = 1 - float(twin[0])
    assert moved > 0.5 * steps * lr
    # A parameter's rounding has a standard deviation of at most half a spacing a step.
    spacing = float(torch.finfo(dtype).eps) / 2
    mean = float(params["stochastic"].double().mean())
    assert abs(mean - float(twin[0])) < 4 * 0.5 * spacing * (steps / 4096) ** 0.5
    assert abs(float(params["nearest"][0]) - float(twin[0])) > 0.3 * moved


@pytest.mark.parametrize("backend", backend_params(["eager", "cpu"]))
@pytest.mark.parametrize("moment_dtype", MOMENT_DTYPES)
def test_slow_averages_are_not_stuck(backend: str, moment_dtype: torch.dtype) -> None:
    """A second moment that changes by a thousandth a step falls as float32's does, in the mean.

    Rounded to nearest, bfloat16 would keep it where it is: half its spacing is 2^-9 of a value.
    """
    params = [torch.zeros(4096), torch.zeros(4096)]
    options: dict[str, Any] = {"betas": (0.9, 0.999), "lr": 0.0, "backend": backend}
    rounded = AdamCM(params[:1], moment_dtype=moment_dtype, **options)
    exact = AdamCM(params[1:], **options)
    draws = 1 + 0.5 * torch.rand(4096, generator=generator(4))
    for step in range(400):
        for param, optimizer in zip(params, (rounded, exact), strict=True):
            param.grad = draws * (1.0 if step < 30 else 0.01)
            optimizer.step()
    for key in ("exp_avg", "exp_avg_sq"):
        values = dequantized(rounded.state[params[0]], key)
        expected = exact.state[params[1]][key]
        ratio = float(values.double().sum() / expected.double().sum())
        assert abs(ratio - 1) < 0.02, key


def test_no_generator_is_touched() -> None:
    """Rounding draws from no generator of torch's, and does not depend on one."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        params = _params(torch.bfloat16)
        optimizer = AdamCM(params, moment_dtype=torch.bfloat16, low_precision_update="stochastic")
        for step in range(3):
            _take_step(optimizer, params, step)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", backend_params())
def test_tensor_lr_of_a_scalar_parameter(backend: str, dtype: torch.dtype) -> None:
    """A learning rate in a tensor is the number it holds, for a parameter without dimensions too.

    Without dimensions, which older tests have, torch promoted the reference's update to float64.
    """
    params = []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        param = torch.tensor(1.7, dtype=dtype, device=device_of(backend))
        update = "stochastic" if dtype is torch.bfloat16 else "nearest"
        optimizer = AdamWCM(
            [param], lr=lr, weight_decay=0.3, low_precision_update=update, backend=backend
        )
        for step in range(6):
            param.grad = torch.full_like(param, 0.3 - 0.2 * step)
            optimizer.step()
        params.append(param)
    assert torch.equal(*params)


@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
@pytest.mark.parametrize("backend", backend_params(FUSED_BACKENDS))
@pytest.mark.parametrize(
    "layout",
    [
        *(ShardLayout(13 * 211), ShardLayout(13 * 211 + 7, 204, 211)),
        *(ShardLayout(2**34 - 300), ShardLayout(2**34 - 512), ShardLayout(2**40 + 6, 100, 2**33)),
    ],
)
def test_words_far_into_a_parameter(
    cls: type[CriticalAdam], backend: str, layout: ShardLayout
) -> None:
    """A shard's bits are those of its place, for counters of more than 32 bits too.

    Several processes are in support/sharded; their backend is the C++ step or the reference.
    """
    results = []
    for name in ("eager", backend):
        param = torch.zeros(700, dtype=torch.bfloat16, device=device_of(name))
        options: Precision = {"moment_dtype": torch.bfloat16, "low_precision_update": "stochastic"}
        optimizer = cls([param], backend=name, **options)
        param.grad = normal_like(param.cpu(), 1.0, generator(0)).to(param.device)
        with mock.patch.object(planned, "_shard_layouts", return_value=[*layout]):
            optimizer.step()
        moments = [optimizer.state[param][key].cpu() for key in ("exp_avg", "exp_avg_sq")]
        results.append([param.cpu(), *moments])
    # From a state of zeros the first step has no sum that could be contracted.
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)


def test_options_that_no_longer_fit_the_state_are_refused() -> None:
    """An option changed by hand is refused, with its state named, before anything changes."""
    params = _params(torch.float32)
    optimizer = AdamCM(params, buffer_dtype=torch.int8)
    _take_step(optimizer, params, 0)
    optimizer.param_groups[0]["buffer_dtype"] = torch.bfloat16
    before = [param.clone() for param in params]
    with pytest.raises(RuntimeError, match=r"'critical_buffer' is torch\.int8"):
        _take_step(optimizer, params, 1)
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("name", ["buffer_dtype", "moment_dtype"])
def test_wide_parameters_are_refused(name: str, dtype: torch.dtype) -> None:
    """float64 and complex parameters have no state of low precision; the message says where to."""
    param = torch.zeros(3, dtype=dtype, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{name} must be None .*group of their own.*params\[0\]"):
        AdamCM([param], **dict[str, Any]({name: torch.bfloat16}))
    optimizer = AdamCM([torch.zeros(3)], buffer_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="buffer_dtype must be None"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [param], "buffer_dtype": None})


def test_update_of_mixed_groups() -> None:
    """Parameters of float32 have nothing to round, in a group that rounds the others."""
    for update in UPDATES:
        params = [torch.zeros(300), torch.zeros(300, dtype=torch.bfloat16)]
        exact = [torch.zeros(300)]
        optimizers = AdamCM(params, low_precision_update=update), AdamCM(exact)
        for step in range(3):
            source = generator(step)
            grad = torch.randn(300, generator=source)
            params[0].grad = exact[0].grad = grad
            params[1].grad = torch.zeros(300, dtype=torch.bfloat16)
            for optimizer in optimizers:
                optimizer.step()
        assert torch.equal(params[0], exact[0])


def test_a_cast_model_gets_a_compensation() -> None:
    """A model turned to half precision between steps is compensated from then on."""
    param = torch.ones(300, requires_grad=True)
    optimizer = AdamCM([param], low_precision_update="kahan")
    param.grad = torch.ones(300)
    optimizer.step()
    assert optimizer.state[param]["compensation"].numel() == 0
    param.grad = None
    param.data = param.data.to(torch.bfloat16)
    param.grad = torch.ones(300, dtype=torch.bfloat16)
    optimizer.step()
    assert optimizer.state[param]["compensation"].shape == param.shape


def test_diagnostics_read_rounded_buffers() -> None:
    """What diagnostics say of a quantized buffer is what they say of the values it stands for."""
    readings = []
    for buffer_dtype in (None, torch.int8):
        params = _params(torch.float32)
        optimizer = AdamCM(params, buffer_dtype=buffer_dtype)
        for step in range(7):
            _take_step(optimizer, params, step)
        readings.append(diagnostics.combine(diagnostics.read(optimizer)))
    for a, b in zip(*(vars(reading).values() for reading in readings), strict=True):
        assert a == pytest.approx(b, rel=0.05)


def test_scales_of_empty_parameters() -> None:
    """A parameter without elements has no blocks, and does not disturb the others."""
    assert num_blocks(0) == 0
    params = [torch.zeros(0, 3), torch.zeros(5)]
    optimizer = AdamCM(params, buffer_dtype=torch.int8, moment_dtype=torch.int8)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
