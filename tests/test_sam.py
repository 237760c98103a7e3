"""SAM: where its gradients are taken, what it restores, and that it passes for an optimizer."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, lr_scheduler

from cm_fused import SAM, AdamCM
from tests.oracle import Array

BASES: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: Adam(params, lr=0.01),
    "adamcm": lambda params: AdamCM(params, lr=0.01),
}
on_each_base = pytest.mark.parametrize("base", BASES)


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def _closure(model: nn.Module, optimizer: Optimizer, t: int = 0) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(t)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(16, 4, generator=generator).to(dtype)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    return closure


def _values(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


@pytest.mark.parametrize("adaptive", [False, True])
def test_against_numpy(adaptive: bool) -> None:
    """Three steps of SAM with SGD on a quartic are those of the papers' equations in float64."""
    rho, lr = 0.3, 0.05
    starts: list[Array] = [np.array([1.0, -2.0]), np.array([[0.5, 3.0, -1.0]])]
    params = [nn.Parameter(torch.from_numpy(start.copy())) for start in starts]
    optimizer = SAM(SGD([{"params": [p]} for p in params], lr=lr), rho, adaptive)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.stack([(param**4).sum() for param in params]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    expected = starts
    for _ in range(3):
        loss: Any = optimizer.step(closure)
        assert loss.item() == pytest.approx(sum(float((x**4).sum()) for x in expected))
        grads = [4 * x**3 for x in expected]
        scaled = [x * g if adaptive else g for x, g in zip(expected, grads, strict=True)]
        norm = np.sqrt(sum(float((s**2).sum()) for s in scaled))
        moved = [
            x + rho * (x**2 * g if adaptive else g) / norm
            for x, g in zip(expected, grads, strict=True)
        ]
        expected = [x - lr * 4 * y**3 for x, y in zip(expected, moved, strict=True)]
    for param, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@on_each_base
def test_half_steps_are_a_step(base: str, dtype: torch.dtype) -> None:
    """`first_step` and `second_step` between backward passes are `step` with a closure."""
    models = [_model(dtype) for _ in range(2)]
    whole, halves = (SAM(BASES[base](model.parameters())) for model in models)
    for t in range(4):
        whole.step(_closure(models[0], whole, t))
        closure = _closure(models[1], halves, t)
        closure()
        halves.first_step(zero_grad=True)
        closure()
        halves.second_step(zero_grad=True)
        assert _same(_values(models[0]), _values(models[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_parameters_are_restored_to_the_bit(dtype: torch.dtype, adaptive: bool) -> None:
    """Between the half-steps the parameters are elsewhere; the base steps from where they were."""
    model = _model(dtype)
    optimizer = SAM(SGD(model.parameters(), lr=0.0), rho=0.7, adaptive=adaptive)
    closure = _closure(model, optimizer)
    before = _values(model)
    closure()
    optimizer.first_step()
    distance = sum(
        float((a.double() - b.double()).square().sum())
        for a, b in zip(_values(model), before, strict=True)
    )
    if not adaptive:
        # Rounded to 8 bits, the many small moves do not add up to rho exactly.
        assert distance**0.5 == pytest.approx(0.7, rel=1e-5 if dtype is torch.float32 else 0.05)
    assert distance > 0
    closure()
    optimizer.second_step()
    assert _same(_values(model), before)


def test_closure_that_raises() -> None:
    """Whichever call of the closure raises, the parameters are where they were, and all goes on."""
    model = _model()
    optimizer = SAM(Adam(model.parameters()), rho=0.5)
    good = _closure(model, optimizer)
    for fails_at in (1, 2):
        before = _values(model)
        calls = itertools.count(1)

        def closure(fails_at: int = fails_at, calls: Any = calls) -> Any:
            if next(calls) == fails_at:
                raise KeyboardInterrupt
            return good()

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert _same(_values(model), before)
        optimizer.step(good)
        assert not _same(_values(model), before)


def test_one_norm_over_all_groups() -> None:
    """A parameter moves by its share of one norm, whatever its group and dtype."""
    shapes = [(3,), (2, 2), (4,), (0,)]
    dtypes = [torch.float32, torch.float64, torch.complex64, torch.float32]
    params = [nn.Parameter(torch.ones(s, dtype=d)) for s, d in zip(shapes, dtypes, strict=True)]
    lonely = nn.Parameter(torch.ones(2))
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer = SAM(SGD([{"params": params[:2]}, {"params": [*params[2:], lonely]}], lr=0.1), 1.0)
    optimizer.first_step()
    for param in params:
        # 11 elements of 2: the norm is 2 sqrt(11).
        expected = torch.full_like(param, 1 + 11**-0.5)
        torch.testing.assert_close(param.detach(), expected.detach())
    assert torch.equal(lonely.detach(), torch.ones(2))


def test_zero_gradient_moves_nothing() -> None:
    """Where the gradient is 0 there is no direction, and no NaN."""
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    optimizer = SAM(SGD([param], lr=0.1))
    optimizer.first_step()
    assert torch.equal(param.detach(), torch.ones(3))


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: lr_scheduler.StepLR(optimizer, 2),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20),
    ],
)
@pytest.mark.parametrize("halves", [False, True])
def test_schedulers(make: Callable[[Optimizer], lr_scheduler.LRScheduler], halves: bool) -> None:
    """A scheduler takes it for an optimizer and sets the wrapped one's options, without warning."""
    model, twin = _model(), _model()
    optimizer, plain = SAM(AdamW(model.parameters())), AdamW(twin.parameters())
    schedulers = make(optimizer), make(plain)
    for t in range(6):
        closure = _closure(model, optimizer, t)
        if halves:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        else:
            optimizer.step(closure)
        plain.step()
        for scheduler in schedulers:
            scheduler.step()
        for key in ("lr", "betas"):
            assert optimizer.param_groups[0][key] == plain.param_groups[0][key]
            assert optimizer.optimizer.param_groups[0][key] == plain.param_groups[0][key]


@on_each_base
def test_checkpoint_is_the_wrapped_ones(base: str) -> None:
    """A resumed training has the same bits, and the base loads SAM's checkpoint."""
    model = _model()
    optimizer = SAM(BASES[base](model.parameters()))
    for t in range(3):
        optimizer.step(_closure(model, optimizer, t))
    resumed_model = copy.deepcopy(model)
    resumed = SAM(BASES[base](resumed_model.parameters()))
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    BASES[base](_model().parameters()).load_state_dict(optimizer.state_dict())
    for t in range(3, 6):
        for each, net in ((optimizer, model), (resumed, resumed_model)):
            each.step(_closure(net, each, t))
        assert _same(_values(model), _values(resumed_model))


def test_hooks_run_once_a_step() -> None:
    """Step hooks registered on SAM run around the wrapped optimizer's step."""
    model = _model()
    optimizer = SAM(Adam(model.parameters()))
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.step(_closure(model, optimizer))
    optimizer.state_dict()
    assert seen == ["pre", "post", "saved"]


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))]
)
def test_copies(make_copy: Callable[[SAM], SAM]) -> None:
    """A copy has its own wrapped optimizer, and the same options."""
    model = _model()
    optimizer = SAM(AdamCM(model.parameters()), rho=0.2, adaptive=True)
    optimizer.step(_closure(model, optimizer))
    copied = make_copy(optimizer)
    assert (copied.rho, copied.adaptive) == (0.2, True)
    assert copied.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert copied.optimizer is not optimizer.optimizer
    assert len(copied.state) == len(optimizer.state)


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": _saved,
}
on_each_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
on_each_wrapped = pytest.mark.parametrize("base", [*BASES, "adamw"])


def _wrapped(base: str, model: nn.Module) -> SAM:
    make = BASES.get(base, lambda params: AdamW(params, lr=0.01))
    return SAM(make(model.parameters()), rho=0.3)


@on_each_copy
@on_each_wrapped
def test_copies_under_a_scheduler_train_alone_and_equally(
    base: str, make_copy: Callable[[Any], Any]
) -> None:
    """Users copy what they train: the copy's steps are its own, and the original's bits.

    `test_copies` took copies without a scheduler, and no step of them. A scheduler sets a `step` on
    the instance that steps the original, and cannot be pickled.
    """
    model = _model()
    optimizer = _wrapped(base, model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    for t in range(3):
        optimizer.step(_closure(model, optimizer, t))
        scheduler.step()
    copied = make_copy((model, optimizer, scheduler))
    assert copied[2].optimizer is copied[1]
    before = _values(model)
    for t in range(3, 6):
        copied[1].step(_closure(copied[0], copied[1], t))
        copied[2].step()
    assert _same(_values(model), before)
    for t in range(3, 6):
        optimizer.step(_closure(model, optimizer, t))
        scheduler.step()
    assert _same(_values(copied[0]), _values(model))
    assert not _same(_values(model), before)
    assert copied[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@on_each_copy
@on_each_wrapped
def test_copies_between_the_half_steps(base: str, make_copy: Callable[[Any], Any]) -> None:
    """A copy taken where the parameters are perturbed puts back its own, and steps from there.

    No test took a copy there.
    """
    model = _model()
    optimizer = _wrapped(base, model)
    lr_scheduler.StepLR(optimizer, 2)
    optimizer.step(_closure(model, optimizer))
    _closure(model, optimizer, 1)()
    optimizer.first_step(zero_grad=True)
    perturbed = _values(model)
    twin, copied = make_copy((model, optimizer))
    _closure(twin, copied, 1)()
    copied.second_step()
    assert _same(_values(model), perturbed)
    _closure(model, optimizer, 1)()
    optimizer.second_step()
    assert _same(_values(twin), _values(model))
    assert not _same(_values(twin), perturbed)


@on_each_copy
def test_scheduler_and_hooks_of_a_copy(make_copy: Callable[[Any], Any]) -> None:
    """A copy has no hooks, as with torch's optimizers, and takes its own hooks and scheduler.

    A scheduler on a copy found the original's patched `step`, and did not patch the copy's.
    """
    model = _model()
    optimizer = SAM(Adam(model.parameters()))
    lr_scheduler.StepLR(optimizer, 1)
    seen: list[str] = []
    optimizer.register_step_post_hook(lambda *_: seen.append("original"))
    twin, copied = make_copy((model, optimizer))
    scheduler = lr_scheduler.StepLR(copied, 1, gamma=0.5)
    copied.register_step_post_hook(lambda *_: seen.append("copy"))
    before, twins = _values(model), _values(twin)
    copied.step(_closure(twin, copied))
    scheduler.step()
    assert seen == ["copy"]
    assert _same(_values(model), before)
    assert not _same(_values(twin), twins)
    assert copied.param_groups[0]["lr"] == 0.5 * optimizer.param_groups[0]["lr"]


def test_copies_of_a_scheduler_on_the_wrapped_optimizer() -> None:
    """A scheduler may be the wrapped optimizer's; a copy of all three goes on with its own."""
    model = _model()
    optimizer = SAM(SGD(model.parameters(), lr=0.1))
    scheduler = lr_scheduler.ExponentialLR(optimizer.optimizer, 0.5)
    optimizer.step(_closure(model, optimizer))
    scheduler.step()
    twin, copied, copied_scheduler = copy.deepcopy((model, optimizer, scheduler))
    before = _values(model)
    copied.step(_closure(twin, copied))
    copied_scheduler.step()
    assert _same(_values(model), before)
    assert (copied.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (0.025, 0.05)


def test_passes_for_an_optimizer() -> None:
    """Groups, defaults and state are the wrapped optimizer's own objects."""
    model = _model()
    base = Adam(model.parameters(), lr=0.5)
    optimizer = SAM(base)
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.defaults is base.defaults
    assert optimizer.state is base.state
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(base.param_groups) == 2
    assert "SAM(rho=0.05, adaptive=False) of Adam" in repr(optimizer)


def test_errors() -> None:
    """What cannot be done is refused by name, with nothing changed."""
    model = _model()
    base = Adam(model.parameters())
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got list"):
        SAM([])  # type: ignore[arg-type]
    for rho in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho must be finite and >= 0"):
            SAM(base, rho=rho)
    optimizer = SAM(base)
    with pytest.raises(RuntimeError, match="needs a first_step"):
        optimizer.second_step()
    _closure(model, optimizer)()
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="called twice"):
        optimizer.first_step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()


@on_each_wrapped
def test_step_of_zero_gradients(base: str) -> None:
    """Without a closure gradients of zero make state, as torch's checkpoint helpers do it.

    Every call without a closure was an error.
    """
    model, twin = _model(), _model()
    optimizer, plain = _wrapped(base, model), _wrapped(base, twin).optimizer
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()  # there are no gradients at all
    assert not optimizer.state
    for param in (*model.parameters(), *twin.parameters()):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    scheduler.step()  # does not warn of a missing step
    plain.step()
    torch.testing.assert_close(
        optimizer.state_dict()["state"], plain.state_dict()["state"], rtol=0, atol=0
    )
    assert _same(_values(model), _values(twin))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e-45, torch.float32),
        (1e-300, torch.float64),
        (6e-8, torch.float16),
        (float("nan"), torch.float32),
        (float("-inf"), torch.float32),
        (1e-30j, torch.complex64),
    ],
)
def test_step_without_a_closure_sees_any_gradient(value: Any, dtype: torch.dtype) -> None:
    """However small a gradient, and where it is not finite, SAM needs the closure."""
    params = [nn.Parameter(torch.ones(n, dtype=d)) for n, d in ((0, dtype), (3, dtype))]
    optimizer = SAM(SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.zeros_like(param)
    params[1].grad[2] = value  # type: ignore[index]
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()


def test_sparse_gradient_is_refused() -> None:
    """A sparse gradient is an error before any parameter has moved."""
    embedding = nn.Embedding(5, 2, sparse=True)
    dense = nn.Parameter(torch.ones(2))
    optimizer = SAM(SGD([dense, embedding.weight], lr=0.1))
    (embedding(torch.tensor([1])).sum() + dense.sum()).backward()
    before = dense.detach().clone()
    with pytest.raises(RuntimeError, match=r"dense gradients, got layout torch\.sparse_coo"):
        optimizer.first_step()
    assert torch.equal(dense.detach(), before)
