"""Numbers at the ends of float32, and large step counts, against the float64 oracle.

NOTE: [What holds at the ends of float32]
Let F = 3.4e38 be the largest float32 and d = 1.4e-45 the smallest above 0.

- Keys: norms are added up in float64, where no float32's square overflows or underflows. A key is
  finite where the norm, rounded to float32, is; a larger one is infinite and admits nothing.
- A key below d / (2 (1 - lambda)) no longer decays: its product with lambda rounds to itself.
- State is float32, as torch.optim's. (1 - beta2) a^2 is right while a^2 <= F, |a| <= 1.8e19; above,
  v is infinite, and the element stands still from then on, as with torch.optim.Adam. The slots' sum
  must be at most F: |m|, of critical gradients |g|, at most F / C.
- Below 2^-126 a float32 has fewer bits: a moment is off by half a d for each rounding.
- Of eps = 0, an aggregate whose (1 - beta2) a^2 rounds to 0 divides by 0, as with torch.optim.Adam.
- Steps are counted in float32, exactly up to 2^24.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM, AdamWCM
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import (
    FUSED_BACKENDS,
    KINDS,
    ROOT,
    Kind,
    backend_params,
    device_of,
    make_optimizer,
    to_array,
)
from tests.support.compare import OracleRun, see
from tests.support.effort import effort, record_cases
from tests.support.oracle import Options

F = float(torch.finfo(torch.float32).max)
DENORMAL = 2.0**-149
EPS = 2.0**-24  # the most that a rounding changes a normal number by
# A whole vector and a tail of every instruction set.
NUMEL = 37
POSITIONS = effort((0, 18, NUMEL - 1), tuple(range(NUMEL)))
EXPONENTS = effort(
    (-149, -140, -127, -126, -100, -75, -64, 0, 62, 64, 100, 127), tuple(range(-149, 128))
)

any_backend = pytest.mark.parametrize("backend", backend_params())
any_kind = pytest.mark.parametrize("kind", KINDS)


def _param(values: Tensor, backend: str) -> Tensor:
    return values.to(device_of(backend)).requires_grad_()


def _stepped(backend: str, options: Options, grads: list[Tensor]) -> tuple[Tensor, CriticalAdam]:
    """Return a parameter of ones and its optimizer after steps with these gradients."""
    param = _param(torch.ones_like(grads[0]), backend)
    optimizer = make_optimizer([param], options, backend)
    for grad in grads:
        param.grad = grad.to(param.device)
        optimizer.step()
    return param, optimizer


def _keys(param: Tensor, optimizer: CriticalAdam) -> list[float]:
    keys: list[float] = see(optimizer.state[param]).priorities.tolist()
    return keys


@any_backend
@any_kind
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_any_magnitude_in_any_position(backend: str, kind: Kind, exponent: int) -> None:
    """The key of one number among zeros is its magnitude; what may be finite is.

    Older tests have gradients of 1e-3 to 1e3, and single spikes.
    """
    value = 2.0**exponent
    for position in POSITIONS:
        grad = torch.zeros(NUMEL)
        grad[position] = -value
        options = Options(kind, capacity=2, priority_decay=1.0)
        param, optimizer = _stepped(backend, options, [grad])
        assert _keys(param, optimizer) == [value, -math.inf]
        assert param.isfinite().all()
    record_cases(len(POSITIONS))


@pytest.mark.parametrize("backend", backend_params(FUSED_BACKENDS))
@any_kind
@pytest.mark.parametrize("capacity", [0, 1, 3, 5])
@pytest.mark.parametrize("maximize", [False, True])
def test_the_sign_of_zero(backend: str, kind: Kind, capacity: int, maximize: bool) -> None:
    """Zeros keep their sign in moments, slots and sums, as in the reference.

    Situation: gradients of -0, of a ReLU or a mask. Older tests compare values, by which -0 equals
    +0. A running sum starts at +0 and is not compared.
    """
    zeros = torch.tensor([0.0, -0.0]).repeat(NUMEL)
    options = Options(kind, capacity=capacity, maximize=maximize)
    runs = []
    for name in (backend, "eager"):
        param = _param(torch.zeros(len(zeros) + 1), name)
        optimizer = make_optimizer([param], options, name)
        for step in range(capacity + 2):
            # The last element makes every key larger than those before.
            param.grad = torch.cat([zeros, torch.tensor([2.0**step])]).to(param.device)
            optimizer.step()
        runs.append((param.detach().cpu(), see(optimizer.state[param])))
    (param, seen), (expected_param, expected) = runs
    pairs = [
        (param, expected_param),
        (seen.exp_avg, expected.exp_avg),
        (seen.critical_buffer, expected.critical_buffer),
    ]
    assert (expected.critical_buffer[:, :-1] == 0).all()
    for actual, wanted in pairs:
        assert torch.equal(actual[..., :-1].signbit(), wanted[..., :-1].signbit())


@any_backend
@any_kind
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite(backend: str, kind: Kind, value: float) -> None:
    """It admits nothing, wherever it is, and leaves all other elements what they would be."""
    options = Options(kind, capacity=2)
    grads = torch.linspace(-1, 1, NUMEL)
    spared, _ = _stepped(backend, options, [grads])
    for position in POSITIONS:
        spoilt = grads.clone()
        spoilt[position] = value
        param, optimizer = _stepped(backend, options, [spoilt])
        assert _keys(param, optimizer) == [-math.inf, -math.inf]
        others = torch.arange(NUMEL) != position
        assert torch.equal(param[others], spared[others])


@any_backend
@any_kind
def test_the_largest_key(backend: str, kind: Kind) -> None:
    """A norm that rounds to the largest float32 is admitted; one that rounds beyond it is not.

    F and e have the norm F + e^2 / 2F: half of F's last place is 2^103, so e = 2^116 decides.
    """
    options = Options(kind, capacity=2, priority_decay=1.0)
    for e, key in ((2.0**115, F), (2.0**117, -math.inf)):
        param, optimizer = _stepped(backend, options, [torch.tensor([F, e])])
        assert _keys(param, optimizer) == [key, -math.inf]
    for numel, key in ((9, 3e38), (16, -math.inf)):
        param, optimizer = _stepped(backend, options, [torch.full((numel,), 1e38)])
        found = _keys(param, optimizer)[0]
        assert found == key if key < 0 else abs(found / key - 1) < 1e-7


@any_backend
@any_kind
def test_a_norm_of_denormals(backend: str, kind: Kind) -> None:
    """Gradients of nothing but denormals have the key of their norm: none is flushed to 0."""
    options = Options(kind, capacity=1, priority_decay=1.0)
    param, optimizer = _stepped(backend, options, [torch.full((10_000,), DENORMAL)])
    assert _keys(param, optimizer) == [100 * DENORMAL]


@any_backend
@any_kind
def test_keys_decay_into_denormals(backend: str, kind: Kind) -> None:
    """Keys decay to the smallest float32 and stay there; what is larger takes the first such slot.

    Zero gradients are not admitted: 0 is not greater.
    """
    options = Options(kind, lr=0.0, capacity=2, priority_decay=0.3)
    grads = [torch.ones(1), torch.full((1,), 2.0), *[torch.zeros(1)] * 90]
    param, optimizer = _stepped(backend, options, grads)
    oracle = OracleRun([torch.ones(1)])
    for grad in grads:
        oracle.step([grad], options)
    # Of 0.3 the smallest rounds to 0, of 0.7 to itself.
    assert _keys(param, optimizer) == list(oracle.states[0].priorities(2)) == [0.0, 0.0]
    optimizer.param_groups[0]["priority_decay"] = 1.0
    for value, keys in ((0.0, [0.0, 0.0]), (DENORMAL, [DENORMAL, 0.0])):
        param.grad = torch.full((1,), value, device=param.device)
        optimizer.step()
        assert _keys(param, optimizer) == keys
    optimizer.param_groups[0]["priority_decay"] = 0.7
    param.grad = torch.zeros(1, device=param.device)
    optimizer.step()
    assert _keys(param, optimizer) == [DENORMAL, 0.0]


def _require_moments(param: Tensor, optimizer: CriticalAdam, run: OracleRun, taken: int) -> None:
    """Check both moments against the oracle's.

    Each of a step's roundings, at most C + 8 of which are in the aggregate, changes a moment by
    EPS of the largest value or half a denormal; a square doubles that.
    """
    seen, expected = see(optimizer.state[param]), run.states[0]
    capacity = len(seen.priorities)
    roundings = (capacity + 8) * taken
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        wanted = getattr(expected, name)
        bound = power * roundings * EPS * np.abs(wanted).max() + roundings * DENORMAL
        error = np.abs(to_array(getattr(seen, name)) - wanted)
        assert (error <= bound).all(), f"{name}: off by {error.max()}, at most {bound}"


@any_backend
@any_kind
@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-22, 1e-21, 1e-19, 1e-10, 1e10, 1e18])
def test_moments_of_any_scale(backend: str, kind: Kind, eps_inside: bool, scale: float) -> None:
    """Both moments follow the oracle through denormals and up to the bound; so do parameters.

    1e-22 and 1e-21 make v denormal.
    """
    options = Options(kind, lr=1e-2, capacity=2, eps_inside_sqrt=eps_inside)
    draws = torch.tensor([[0.5, -1.0, 1.0], [1.5, -0.25, 1.0], [2.0, -1.0, 0.5], [0.1, -1, 0.7]])
    grads = [scale * draw for draw in draws]
    param, optimizer = _stepped(backend, options, grads)
    run = OracleRun([torch.ones(3)])
    for grad in grads:
        run.step([grad], options)
    _require_moments(param, optimizer, run, len(grads))
    # Each change is at most lr (1 + C) / (1 - beta1), to the roundings of numerator and root.
    error = np.abs(to_array(param) - run.params[0])
    assert (error <= len(grads) * 20 * EPS * 1.3).all(), error.max()


@any_backend
@any_kind
def test_a_denormal_second_moment_without_eps(backend: str, kind: Kind) -> None:
    """Divided by a root of a v that has few bits: right to what those bits are worth.

    Without momentum v is 1024 denormals at least, each rounding of it half of one: 2^-11 a step, of
    the root half.
    """
    options = Options(kind, lr=1e-2, betas=(0.0, 0.99), eps=0.0, capacity=2)
    grads = [torch.full((3,), math.sqrt(2**10 * DENORMAL / 0.01))] * 4
    param, optimizer = _stepped(backend, options, grads)
    run = OracleRun([torch.ones(3)])
    for grad in grads:
        run.step([grad], options)
    assert see(optimizer.state[param]).exp_avg_sq.max() < 2.0**-126
    moved = np.abs(1 - run.params[0])
    assert (np.abs(to_array(param) - run.params[0]) <= 4 * 2.0**-11 * moved + 8 * EPS).all()


@any_backend
@any_kind
def test_beyond_the_second_moment(backend: str, kind: Kind) -> None:
    """Where v overflows an element stands still, and its neighbours do not: as torch's Adam."""
    options = Options(kind, capacity=5)
    grads = [torch.tensor([1e30, 1.0])] * 4
    param, optimizer = _stepped(backend, options, grads)
    assert see(optimizer.state[param]).exp_avg_sq[0] == math.inf
    assert param[0] == 1
    assert 0.9 < param[1] < 1
    theirs = torch.ones(2, requires_grad=True)
    adam = torch.optim.Adam([theirs], betas=options.betas)
    for grad in grads:
        theirs.grad = grad
        adam.step()
    assert theirs[0] == 1


@any_backend
@any_kind
@pytest.mark.parametrize("decoupled", [True, False])
def test_lr_0(backend: str, kind: Kind, decoupled: bool) -> None:
    """It leaves parameters bit-equal while the state moves."""
    options = Options(kind, lr=0.0, weight_decay=0.1, decoupled_weight_decay=decoupled)
    start = torch.tensor([1.0, -3e38, 1e-45, 0.0, math.pi])
    param = _param(start.clone(), backend)
    optimizer = make_optimizer([param], options, backend)
    for _ in range(7):
        param.grad = torch.tensor([1.0, -2.0, 1e-3, 0.0, 1e10], device=param.device)
        optimizer.step()
    assert torch.equal(param.cpu(), start)
    seen = see(optimizer.state[param])
    assert seen.step == 7
    assert seen.filled == 5 if decoupled else seen.filled >= 0
    assert seen.exp_avg.any()


def _started_at(
    step: int, backend: str, options: Options, param: Tensor
) -> tuple[CriticalAdam, OracleRun]:
    """Return an optimizer and the oracle that have taken `step` steps, by a state dict."""
    first = make_optimizer([param], options, backend)
    run = OracleRun([param.detach()])
    grad = torch.tensor([1.0, -0.5, 0.25])
    param.grad = grad.to(param.device)
    first.step()
    run.step([grad], options)
    saved: dict[str, Any] = first.state_dict()
    saved["state"][0]["step"] = torch.tensor(float(step))
    run.states[0].step = step
    optimizer = make_optimizer([param], options, backend)
    optimizer.load_state_dict(saved)
    return optimizer, run


@any_backend
@any_kind
@pytest.mark.parametrize(
    "betas", [(0.9, 0.99), (0.0, 0.0), (0.9, 0.999), (0.9, 0.9999999), (0.9999999, 0.9999999)]
)
@pytest.mark.parametrize("step", [1, 1000, 10**7 - 1, 2**24 - 8])
def test_large_step_counts(backend: str, kind: Kind, betas: tuple[float, float], step: int) -> None:
    """Bias corrections are those of the step, to 10^7 and on to 2^24, and steps are counted.

    Betas are float32 in a float32 step, whose distance to 1 is then off by 2^-25: for 0.9999999, by
    a third. That is in the moments, of which few steps are taken here: less than EPS of them. 1 -
    beta^t in float64 is right to 1e-16 / 1e-7.
    """
    options = Options(kind, lr=1e-2, betas=betas, capacity=2)
    param = _param(torch.ones(3), backend)
    optimizer, run = _started_at(step, backend, options, param)
    for _ in range(4):
        grad = torch.tensor([0.5, 1.0, -1.0])
        param.grad = grad.to(param.device)
        optimizer.step()
        run.step([grad], options)
    assert see(optimizer.state[param]).step == step + 4
    moved = np.abs(run.params[0] - 1).max() + 1
    error = np.abs(to_array(param) - run.params[0])
    assert (error <= 5 * 40 * EPS * moved).all(), error.max()


@any_backend
def test_steps_beyond_what_float32_counts(backend: str) -> None:
    """After 2^24 steps the count stands still, as torch.optim's, and steps go on."""
    param = _param(torch.ones(3), backend)
    optimizer, _ = _started_at(2**24, backend, replace(Options(), capacity=2), param)
    before = param.detach().clone()
    param.grad = torch.ones(3, device=param.device)
    optimizer.step()
    assert see(optimizer.state[param]).step == 2**24
    assert param.isfinite().all()
    assert (param != before).all()


@any_backend
def test_norms_of_a_group(backend: str) -> None:
    """A group's norm of 1e-45 and of 3e38 beside each other is right, and what is small is kept."""
    params = [_param(torch.ones(1), backend) for _ in range(2)]
    for scope, keys in (("group", [3e38, 3e38]), ("tensor", [3e38, DENORMAL])):
        for kind in (AdamCM, AdamCG):
            optimizer = kind(
                params, capacity=1, priority_decay=1.0, priority_scope=scope, backend=backend
            )
            for param, value in zip(params, (3e38, DENORMAL), strict=True):
                param.grad = torch.full((1,), value, device=param.device)
            optimizer.step()
            found = [_keys(param, optimizer)[0] for param in params]
            assert found == [float(np.float32(key)) for key in keys]


def _table_of_eps() -> list[list[str]]:
    """Return the rows of docs/options.md: the gradients' RMS, and each optimizer's updates'."""
    _, _, section = (ROOT / "docs/options.md").read_text().partition("## eps\n")
    lines = [line for line in section.splitlines() if line.startswith("|")][2:7]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.mark.parametrize("row", _table_of_eps(), ids=str)
def test_updates_of_small_gradients(row: list[str]) -> None:
    """The documented size of an update: inside the root, eps shrinks those of small gradients."""
    scale, *documented = map(float, row)
    adjusted: dict[str, Any] = {"weight_decay": 0.0, "backend": "eager"}
    adjusted["adjust_lr_fn"] = "match_rms_adamw"
    of_cases = (
        (torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.9, 0.99)}),
        (AdamWCM, adjusted),
        (AdamWCM, {**adjusted, "eps_inside_sqrt": False}),
    )
    for (cls, options), expected in zip(of_cases, documented, strict=True):
        assert _rms_of_updates(cls, scale, **options) == pytest.approx(expected, rel=0.02, abs=6e-4)


@pytest.mark.parametrize(("capacity", "documented"), [(0, 0.23), (5, 0.37)])
def test_updates_of_critical_gradients(capacity: int, documented: float) -> None:
    """The documented size of AdamCG's updates, which `adjust_lr_fn` is not for."""
    rms = _rms_of_updates(AdamCG, 1.0, capacity=capacity, backend="eager")
    assert rms == pytest.approx(documented, abs=0.005)


def _rms_of_updates(cls: Any, scale: float, **options: Any) -> float:
    """Return the root mean square of updates at a learning rate of 1, of gradients of noise."""
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(5000))
    optimizer = cls([param], lr=1.0, **options)
    mean_squares = []
    for _ in range(200):
        param.grad = scale * torch.randn(5000)
        before = param.detach().clone()
        optimizer.step()
        mean_squares.append((param.detach() - before).square().mean())
    return torch.stack(mean_squares[150:]).mean().sqrt().item()
