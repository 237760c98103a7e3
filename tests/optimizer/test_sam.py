"""SAM: where its gradients are taken, what it restores, and that it passes for an optimizer."""

import copy
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler

from cm_fused import SAM, AdamCM
from tests.support.oracle import Array
from tests.support.release import values

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


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


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
        assert _same(values(models[0]), values(models[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_parameters_are_restored_to_the_bit(dtype: torch.dtype, adaptive: bool) -> None:
    """Between the half-steps the parameters are elsewhere; the base steps from where they were."""
    model = _model(dtype)
    optimizer = SAM(SGD(model.parameters(), lr=0.0), rho=0.7, adaptive=adaptive)
    closure = _closure(model, optimizer)
    before = values(model)
    closure()
    optimizer.first_step()
    distance = sum(
        float((a.double() - b.double()).square().sum())
        for a, b in zip(values(model), before, strict=True)
    )
    if not adaptive:
        # Rounded to 8 bits, the many small moves do not add up to rho exactly.
        assert distance**0.5 == pytest.approx(0.7, rel=1e-5 if dtype is torch.float32 else 0.05)
    assert distance > 0
    closure()
    optimizer.second_step()
    assert _same(values(model), before)


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
        assert _same(values(model), values(resumed_model))


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
    return SAM(make(model.parameters()), rho=0.3, adaptive=base == "adamw")


@on_each_copy
@on_each_wrapped
@pytest.mark.parametrize("of_wrapped", [False, True])
def test_copies_under_a_scheduler_train_alone_and_equally(
    of_wrapped: bool, base: str, make_copy: Callable[[Any], Any]
) -> None:
    """Users copy what they train: the copy's steps are its own, and the original's bits.

    A scheduler sets a `step` on the instance that steps the original, and cannot be pickled; older
    tests copied without one.
    """
    model = _model()
    optimizer = _wrapped(base, model)
    scheduler = lr_scheduler.ExponentialLR(optimizer.optimizer if of_wrapped else optimizer, 0.9)
    for t in range(3):
        optimizer.step(_closure(model, optimizer, t))
        scheduler.step()
    copied = make_copy((model, optimizer, scheduler))
    assert copied[2].optimizer is (copied[1].optimizer if of_wrapped else copied[1])
    assert (copied[1].rho, copied[1].adaptive) == (optimizer.rho, optimizer.adaptive)
    before = values(model)
    for t in range(3, 6):
        copied[1].step(_closure(copied[0], copied[1], t))
        copied[2].step()
    assert _same(values(model), before)
    for t in range(3, 6):
        optimizer.step(_closure(model, optimizer, t))
        scheduler.step()
    assert _same(values(copied[0]), values(model))
    assert not _same(values(model), before)
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
    perturbed = values(model)
    twin, copied = make_copy((model, optimizer))
    _closure(twin, copied, 1)()
    copied.second_step()
    assert _same(values(model), perturbed)
    _closure(model, optimizer, 1)()
    optimizer.second_step()
    assert _same(values(twin), values(model))
    assert not _same(values(twin), perturbed)


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
    before, twins = values(model), values(twin)
    copied.step(_closure(twin, copied))
    scheduler.step()
    assert seen == ["copy"]
    assert _same(values(model), before)
    assert not _same(values(twin), twins)
    assert copied.param_groups[0]["lr"] == 0.5 * optimizer.param_groups[0]["lr"]


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


@pytest.mark.parametrize("rho", ["0.05", None, True, (0.1,)], ids=repr)
def test_rho_that_is_no_number(rho: Any) -> None:
    """It is a ValueError as others are. Older tests gave only numbers: these were TypeErrors."""
    with pytest.raises(
        ValueError, match=f"rho must be finite and >= 0, got {re.escape(repr(rho))}"
    ):
        SAM(Adam(_model().parameters()), rho=rho)


@pytest.mark.parametrize("rho", [0, 1, np.float32(0.5), np.int64(1)], ids=repr)
def test_rho_of_other_numbers(rho: Any) -> None:
    """Ints and NumPy's numbers are taken, as they were before `rho` was checked as options are."""
    model = _model()
    optimizer = SAM(Adam(model.parameters()), rho=rho)
    assert optimizer.rho == rho
    optimizer.step(_closure(model, optimizer))


@pytest.mark.parametrize("has_scheduler", [False, True])
def test_an_optimizer_whose_step_needs_a_closure(has_scheduler: bool) -> None:
    """The constructor refuses it; older tests wrap optimizers that step without one.

    A scheduler wraps the optimizer's `step`.
    """
    base = LBFGS(_model().parameters())
    if has_scheduler:
        lr_scheduler.ConstantLR(base)
    with pytest.raises(TypeError, match=r"optimizer must step without a closure.* got LBFGS"):
        SAM(base)


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
    assert _same(values(model), values(twin))


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


# Gradients that are there before the closure is called


class _Run:
    """A model, SAM around an optimizer that counts its steps, and the calls of its closures."""

    def __init__(self, base: str = "sgd", **options: Any) -> None:
        self.model = _model()
        self.params = list(self.model.parameters())
        self.optimizer = SAM(BASES[base](self.params), rho=0.3, **options)
        self.steps = 0
        self.calls = 0
        self.factor = 1.0
        self.optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.steps += 1

    def loss(self, t: int) -> Tensor:
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(t))
        loss: Tensor = (self.model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        return self.factor * loss

    def step(self, t: int, backward: Callable[["_Run", int], Any]) -> None:
        """Step with a closure that only does what is given."""

        def closure() -> Any:
            self.calls += 1
            return backward(self, t)

        self.optimizer.step(closure)

    def check_refused(self, t: int, backward: Callable[["_Run", int], Any]) -> None:
        """Check that a closure is refused, nothing is changed and a right one is served."""
        before, steps = values(self.model), self.steps
        with pytest.raises(RuntimeError, match="closure must zero the gradients before it adds"):
            self.step(t, backward)
        assert _same(values(self.model), before)
        assert self.steps == steps
        assert all(param.grad is None or not param.grad.any() for param in self.params)
        assert not any(param._backward_hooks for param in self.params)
        twin = _Run()
        twin.model.load_state_dict(self.model.state_dict())
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for run in (self, twin):
            run.step(t + 1, _zeroing)
        assert _same(values(self.model), values(twin.model))


def _adding(run: _Run, t: int) -> Tensor:
    loss = run.loss(t)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def _zeroing(run: _Run, t: int) -> Tensor:
    run.optimizer.zero_grad()
    return _adding(run, t)


def _zeroing_in_place(run: _Run, t: int) -> Tensor:
    run.optimizer.zero_grad(set_to_none=False)
    return _adding(run, t)


def _zeroing_data(run: _Run, t: int) -> Tensor:
    for param in run.params:
        if param.grad is not None:
            param.grad.data.zero_()  # which no version counter sees
    return _adding(run, t)


def _zeroing_after_a_look(run: _Run, t: int) -> Tensor:
    run.loss(t + 50).backward()  # type: ignore[no-untyped-call]
    return _zeroing_in_place(run, t)


def _copying(run: _Run, t: int) -> Tensor:
    """Compute gradients elsewhere and write them into the tensors that are there."""
    loss = run.loss(t)
    for param, grad in zip(run.params, torch.autograd.grad(loss, run.params), strict=True):
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.data.copy_(grad)
    return loss


def _with_graph(run: _Run, t: int) -> Tensor:
    run.optimizer.zero_grad()
    return _adding_with_graph(run, t)


def _adding_with_graph(run: _Run, t: int) -> Tensor:
    loss = run.loss(t)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward")
        loss.backward(create_graph=True)  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize(
    "backward",
    [_zeroing_in_place, _zeroing_data, _zeroing_after_a_look, _copying, _with_graph],
)
def test_closures_that_zero_in_their_own_way(backward: Callable[[_Run, int], Any]) -> None:
    """However a closure gets rid of old gradients, it is called twice and served as it was.

    Closures in the tests all set gradients to None; telling the others from those that accumulate
    is new.
    """
    run, expected = _Run(), _Run()
    for t in range(4):
        run.step(t, backward)
        expected.step(t, _zeroing)
    assert _same(values(run.model), values(expected.model))
    assert (run.calls, run.steps) == (8, 4)
    assert not any(param._backward_hooks for param in run.params)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_closure_that_does_not_zero(set_to_none: bool) -> None:
    """A closure may leave zeroing to who calls it: the second call adds to nothing, too.

    It silently added to the first call's gradients.
    """
    run, expected = _Run(), _Run()
    for t in range(4):
        run.optimizer.zero_grad(set_to_none)
        run.step(t, _adding)
        expected.step(t, _zeroing)
    assert _same(values(run.model), values(expected.model))
    assert run.calls == 8


def test_static_gradients_stay_the_same_tensors() -> None:
    """Captured graphs need the gradients where they are: those of in-place zeroing stay there."""
    run = _Run()
    run.step(0, _zeroing_in_place)
    grads = [param.grad for param in run.params]
    for t in range(1, 4):
        run.step(t, _zeroing_in_place)
        assert all(param.grad is grad for param, grad in zip(run.params, grads, strict=True))


def _clipped(backward: Callable[[_Run, int], Any], how: str) -> Callable[[_Run, int], Any]:
    def closure(run: _Run, t: int) -> Any:
        loss = backward(run, t)
        if how == "norm":
            nn.utils.clip_grad_norm_(run.params, 0.1)
        elif how == "value":
            nn.utils.clip_grad_value_(run.params, 0.01)
        else:
            for param in run.params:
                assert param.grad is not None
                param.grad.nan_to_num_()
        return loss

    return closure


@pytest.mark.parametrize("how", ["norm", "value", "sanitized"])
def test_closures_that_change_gradients(how: str) -> None:
    """Clipping in the closure hides nothing: what zeroes is served, what accumulates is refused."""
    run, expected = _Run(), _Run()
    for t in range(4):
        run.step(t, _clipped(_zeroing_in_place, how))
        expected.step(t, _clipped(_zeroing, how))
    assert _same(values(run.model), values(expected.model))
    assert run.calls == 8
    run.check_refused(5, _clipped(_adding, how))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("warm_up", [0, 1, 3])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_over_calls_is_refused(
    micro_batches: int, warm_up: int, set_to_none: bool
) -> None:
    """Lightning calls `step` at the last micro-batch, with a closure of that one alone.

    The gradient at the perturbed parameters would be that of one micro-batch and the old sum. It
    was taken as it was, in silence. An accumulation scheduler may begin with it at any step.
    """
    run = _Run()
    for t in range(warm_up):
        run.step(t, _zeroing if set_to_none else _zeroing_in_place)
    run.optimizer.zero_grad(set_to_none)
    for t in range(micro_batches):
        _adding(run, t)
    run.check_refused(9, _adding)


@pytest.mark.parametrize(
    "backward",
    [
        _adding,
        _adding_with_graph,
        lambda run, t: [_adding(run, t), _adding(run, t + 1)],
        lambda run, t: [param.grad.mul_(0.9) for param in run.params] and _adding(run, t),
        lambda run, t: run.loss(t),  # Lightning's manual optimization: a closure that does nothing
        lambda run, t: [p.grad.zero_() for p in run.params[:2]] and _adding(run, t),
    ],
    ids=["once", "with graph", "twice", "decayed", "nothing", "zeroes some"],
)
def test_closures_that_never_zero_are_refused(backward: Callable[[_Run, int], Any]) -> None:
    """Where nobody zeroes, the first step is right and the second one is refused."""
    run = _Run()
    run.step(0, _adding)
    run.check_refused(1, backward)


def test_accumulation_as_documented() -> None:
    """Both ways that the docstring gives to accumulate are SAM of the whole batch."""
    whole, in_closure, by_hand = _Run(), _Run(), _Run()
    batch = range(3)

    def all_at_once(run: _Run, t: int) -> Any:
        run.optimizer.zero_grad()
        torch.stack([run.loss(10 * t + i) for i in batch]).sum().backward()  # type: ignore[no-untyped-call]

    def one_by_one(run: _Run, t: int) -> None:
        for i in batch:
            _adding(run, 10 * t + i)

    def zero_then_one_by_one(run: _Run, t: int) -> None:
        run.optimizer.zero_grad(set_to_none=t % 2 == 0)
        one_by_one(run, t)

    for t in range(4):
        whole.step(t, all_at_once)
        in_closure.step(t, zero_then_one_by_one)
        one_by_one(by_hand, t)
        by_hand.optimizer.first_step(zero_grad=True)
        one_by_one(by_hand, t)
        by_hand.optimizer.second_step(zero_grad=True)
        assert _same(values(in_closure.model), values(by_hand.model))
        torch.testing.assert_close(values(whole.model), values(by_hand.model))


@pytest.mark.parametrize("first", [1, 2], ids=["both calls", "second call"])
@pytest.mark.parametrize(
    ("backward", "value", "calls"),
    [
        (_zeroing_in_place, float("nan"), 2),
        (_zeroing_in_place, float("inf"), 2),
        (_copying, float("nan"), 3),
        (_copying, float("inf"), 3),
    ],
)
def test_gradients_that_are_not_finite(
    backward: Callable[[_Run, int], Any], value: float, calls: int, first: int
) -> None:
    """NaN of the closure's own is no sign of accumulation, whoever writes the gradients.

    `skip_nonfinite` must be able to skip such a step, and training goes on.
    """
    run = _Run()
    run.optimizer = SAM(AdamCM(run.params, skip_nonfinite=True), rho=0.3)
    for t in range(2):
        run.step(t, backward)
    before, run.calls = values(run.model), 0

    def overflowing(run: _Run, t: int) -> Any:
        run.factor = value if run.calls >= first else 1.0
        return backward(run, t)

    run.step(2, overflowing)
    assert run.calls == calls
    assert _same(values(run.model), before)
    assert run.optimizer.param_groups[0]["skipped_steps"] == 1
    run.factor = 1.0
    run.step(3, backward)
    assert not _same(values(run.model), before)


def test_old_gradients_are_not_kept_alive() -> None:
    """The memory of the last step's gradients is free once the closure has dropped them."""
    run = _Run()
    run.step(0, _zeroing)
    refs = [weakref.ref(param.grad) for param in run.params]

    def closure(run: _Run, t: int) -> Any:
        run.optimizer.zero_grad()
        assert all(ref() is None for ref in refs)
        return _adding(run, t)

    run.step(1, closure)


@pytest.mark.parametrize("fails_at", [5, 6])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_closure_that_raises_before_it_zeroes(error: type[BaseException], fails_at: int) -> None:
    """Whichever call raises, parameters are where they were, no mark or hook of ours stays."""
    run = _Run()
    for t in range(2):
        run.step(t, _zeroing_in_place)
    before = values(run.model)

    def closure(run: _Run, t: int) -> Any:
        if run.calls == fails_at:
            raise error
        return _zeroing_in_place(run, t)

    with pytest.raises(error):
        run.step(2, closure)
    assert _same(values(run.model), before)
    # The last step's are still there at the first call.
    assert fails_at == 5 or not any(param.grad.any() for param in run.params)  # type: ignore[union-attr]
    assert not any(param._backward_hooks for param in run.params)
    run.step(3, closure)
    assert not _same(values(run.model), before)
