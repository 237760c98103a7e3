"""Steps inside backward are the steps after it, without the gradients."""

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused import SAM, AdamCG, AdamCM, AdamWCM, enable_gradient_release
from cm_fused._optimizer.base import CriticalAdam
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM
from tests.support.release import (
    Step,
    assert_steps_are_those_after_backward,
    backward,
    inputs,
    loss_of,
    new_model,
    two_groups,
    values,
)
from tests.support.training import BACKENDS, KINDS, assert_same, snapshot, trained

pytestmark = pytest.mark.sampled


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "precision", [{}, {"buffer_dtype": torch.int8, "seed": 3}, {"buffer_dtype": "int4"}], ids=str
)
@pytest.mark.parametrize("cls", [AdamCM, AdamWCM, AdamCG])
def test_steps_are_those_after_backward(
    cls: type[CriticalAdam], precision: dict[str, Any], backend: str
) -> None:
    """The same bits in parameters and state, a scheduler in between; no gradient is left."""

    def make() -> tuple[nn.Module, CriticalAdam]:
        model = new_model()
        options = {"priority_scope": "tensor", "backend": backend, **precision}
        return model, cls(two_groups(model), lr=0.01, **options)

    def train(_: nn.Module, optimizer: CriticalAdam, step: Step) -> None:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for t in range(8):
            step(t)
            scheduler.step()

    assert_steps_are_those_after_backward(make, train)


def test_a_scheduler_after_backward_does_not_warn() -> None:
    """It warns only where no backward pass has stepped before it, as it does without release.

    Older tests with a scheduler call `optimizer.step()`, which does nothing then.
    """
    model = new_model()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    handle = enable_gradient_release(model, optimizer)
    early = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        early.step()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    backward(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    handle.remove()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"critical_test": 0.5}, {"kappa": 0}, {"weight_decay": 0.1}], ids=str
)
@pytest.mark.parametrize("cls", [Adam_CM, Adam_C])
def test_steps_of_the_research_packages_optimizers(
    cls: type[CriticalAdam], options: dict[str, Any], backend: str
) -> None:
    """Theirs too are those after backward, the first one, which only stores, included.

    The older test had the four classes of the paper: these raised, or took no step.
    """

    def make() -> tuple[nn.Module, Any]:
        model = new_model()
        groups = [{**group, "backend": backend} for group in two_groups(model)]
        return model, cls(groups, lr=0.01, synced=False, **options)  # type: ignore[call-arg]

    assert_steps_are_those_after_backward(make)


@pytest.mark.parametrize("cls", KINDS)
def test_removal(cls: type[CriticalAdam]) -> None:
    """After remove() the optimizer steps as ever, and it may be enabled again."""
    model = new_model()
    optimizer = cls(model.parameters(), priority_scope="tensor")
    for _ in range(2):
        release = enable_gradient_release(model, optimizer)
        with pytest.raises(RuntimeError, match="enabled already"):
            enable_gradient_release(model, optimizer)
        backward(model, 0)
        release.remove()
        before = [param.clone() for param in model.parameters()]
        backward(model, 1)
        assert_same([param.detach() for param in model.parameters()], before)
        optimizer.step()
        optimizer.zero_grad()
        for param, old in zip(model.parameters(), before, strict=True):
            assert not torch.equal(param, old)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority_scope": "tensor", "max_grad_norm": 1.0},
        {"priority_scope": "tensor", "skip_nonfinite": True},
        {"priority_scope": "tensor", "amp_scaling": True},
    ],
    ids=str,
)
def test_what_needs_all_gradients_is_refused(options: dict[str, Any]) -> None:
    """Scope "group" and all that needs the norm of all raise, and say why."""
    model = new_model()
    with pytest.raises(ValueError, match=r"gradient release needs .* known when all"):
        enable_gradient_release(model, AdamCM(model.parameters(), **options))


def test_a_parameter_of_another_model_is_refused() -> None:
    """A parameter that no backward of the model reaches would never be stepped."""
    optimizer = AdamCM(new_model().parameters(), priority_scope="tensor")
    with pytest.raises(RuntimeError, match=r"params\[0\] of group 0 must be a parameter of the"):
        enable_gradient_release(new_model(), optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda params: SAM(AdamCM(params, priority_scope="tensor")),
            r"got SAM, .*step\(closure\)",
        ),
        (torch.optim.AdamW, r"got AdamW; pass the optimizer itself .* step\(\) after backward"),
    ],
    ids=["SAM", "AdamW"],
)
def test_another_optimizer_is_refused(make: Callable[[Any], Any], message: str) -> None:
    """SAM has all that its AdamCM has, and took two plain steps for one: nobody looked at it."""
    model = new_model()
    optimizer = make(model.parameters())
    with pytest.raises(TypeError, match=message):
        enable_gradient_release(model, optimizer)
    before = values(model)
    backward(model, 0)
    assert_same(values(model), before)


def test_what_is_no_module_is_refused() -> None:
    """The parameters themselves are passed, say."""
    model = new_model()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got generator"):
        enable_gradient_release(model.parameters(), optimizer)


class _Frozen(nn.Module):
    """Has a frozen layer and integers, which torch adds no hook to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = new_model()
        self.layers[0].requires_grad_(False)
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_frozen_parameters_are_stepped_once_they_are_not() -> None:
    """A user fine-tunes the head first. The older tests froze nothing; enabling raised."""

    def make() -> tuple[nn.Module, CriticalAdam]:
        model = _Frozen()
        return model, AdamCM(model.parameters(), lr=0.02, priority_scope="tensor")

    def train(model: Any, optimizer: CriticalAdam, step: Step) -> None:
        frozen = values(model.layers[0])
        for t in range(3):
            step(t)
        assert_same(values(model.layers[0]), frozen)
        assert not any(param.requires_grad for param in model.layers[0].parameters())
        model.layers[0].requires_grad_(True)
        model.layers[2].requires_grad_(False)
        for t in range(3, 6):
            step(t)
        assert all(map(torch.ne, map(torch.sum, values(model.layers[0])), map(torch.sum, frozen)))

    assert_steps_are_those_after_backward(make, train)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("hook", ["param", "model"])
def test_enabling_that_fails_leaves_nothing(
    hook: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook stays, nothing is unfrozen, and the optimizer steps as ever.

    A frozen parameter raised torch's error and left the hooks of those before it, which stepped.
    """
    model: Any = _Frozen()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    owner: type[Any]
    owner, name = {
        "param": (Tensor, "register_post_accumulate_grad_hook"),
        "model": (nn.Module, f"register_forward_{'pre_' if number % 2 else ''}hook"),
    }[hook]
    register, calls = getattr(owner, name), []

    def fail_at(self: Any, *arguments: Any, **kwargs: Any) -> Any:
        calls.append(self)
        if len(calls) > (number if hook == "param" else 0):
            raise MemoryError("of the test")
        return register(self, *arguments, **kwargs)

    flags = [param.requires_grad for param in model.parameters()]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, fail_at)
        with pytest.raises(MemoryError):
            enable_gradient_release(model, optimizer)
    assert [param.requires_grad for param in model.parameters()] == flags
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    before = values(model)
    backward(model, 0)
    assert_same(values(model), before)
    optimizer.step()
    assert len(optimizer.state) == 4
    enable_gradient_release(model, optimizer)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_a_graph_of_the_gradients() -> None:
    """backward(create_graph=True) runs hooks with gradients enabled: no step is recorded."""

    def with_graph(model: Any, t: int) -> None:
        loss_of(model(inputs(t)), t).backward(create_graph=True)  # type: ignore[no-untyped-call]

    def train(_: nn.Module, optimizer: CriticalAdam, step: Step) -> None:
        for t in range(4):
            step(t)
        tensors = [v for state in optimizer.state.values() for v in state.values()]
        assert not any(tensor.requires_grad for tensor in tensors)

    assert_steps_are_those_after_backward(_plain, train, with_graph)


def _plain() -> tuple[Any, CriticalAdam]:
    model = new_model()
    return model, AdamCM(model.parameters(), lr=0.02, priority_scope="tensor")


def test_gradients_that_are_only_asked_for_take_no_step() -> None:
    """A gradient penalty: torch.autograd.grad before the backward pass of the sum."""

    def penalty(model: Any, t: int) -> None:
        x = inputs(t).requires_grad_()
        outputs = model(x)
        (slope,) = torch.autograd.grad(outputs.sum(), x, create_graph=True)
        torch.autograd.grad(outputs.sum(), model[0].weight, retain_graph=True)
        (loss_of(outputs, t) + slope.square().sum()).backward()  # type: ignore[no-untyped-call]

    assert_steps_are_those_after_backward(_plain, backward=penalty)


def test_a_tied_parameter_takes_one_step() -> None:
    """It has two names and two uses, and one gradient."""

    def make() -> tuple[nn.Module, CriticalAdam]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        torch.manual_seed(1)
        nn.init.normal_(model[0].weight)  # type: ignore[arg-type]
        for param in (model[0].bias, model[2].bias):
            nn.init.zeros_(param)  # type: ignore[arg-type]
        model[2].weight = model[0].weight
        return model, AdamCM(model.parameters(), lr=0.02, priority_scope="tensor")

    assert_steps_are_those_after_backward(make)


def test_a_retained_graph_is_stepped_by_each_backward() -> None:
    """Two backward passes of one graph, none of which the steps change: two steps."""

    def twice(model: Any, _: int) -> None:
        loss = model(torch.ones(1, 4)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    model = nn.Linear(4, 1)
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    enable_gradient_release(model, optimizer)
    twice(model, 0)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_each_parameter_is_stepped_by_one_optimizer() -> None:
    """A second one would find no gradient: it was enabled and never trained."""
    model = new_model()
    first = AdamCM(model.parameters(), priority_scope="tensor")
    second = AdamCM(model[2].parameters(), priority_scope="tensor")
    release = enable_gradient_release(model, first)
    with pytest.raises(
        RuntimeError, match=r"params\[0\] of group 0 must not be stepped in backward"
    ):
        enable_gradient_release(model, second)
    before = snapshot(second)
    release.remove()
    enable_gradient_release(model, second)
    backward(model, 0)
    assert len(second.state) == 2
    assert not first.state
    assert before["members"] == snapshot(second)["members"]


def test_two_optimizers_share_a_model() -> None:
    """Each steps its own parameters in the same backward pass."""
    model = new_model()
    optimizers = [AdamCM(model[i].parameters(), priority_scope="tensor") for i in (0, 2)]
    releases = [enable_gradient_release(model, optimizer) for optimizer in optimizers]
    backward(model, 0)
    assert [len(optimizer.state) for optimizer in optimizers] == [2, 2]
    releases[0].remove()
    backward(model, 1)
    steps = [{int(state["step"]) for state in o.state.values()} for o in optimizers]
    assert steps == [{1}, {2}]
    assert model[0].weight.grad is not None


def test_an_optimizer_serves_one_model() -> None:
    """What another model's release has is not taken from it by an attempt that fails."""
    model, other = new_model(), new_model()
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    enable_gradient_release(model, optimizer)
    with pytest.raises(RuntimeError, match="enabled already"):
        enable_gradient_release(other, optimizer)
    backward(model, 0)
    assert len(optimizer.state) == 6


def test_an_old_handle_ends_nothing_new() -> None:
    """remove() of a handle whose release has ended leaves the next one: it turned step() on."""
    model, optimizer = _plain()
    old = enable_gradient_release(model, optimizer)
    old.remove()
    enable_gradient_release(model, optimizer)
    old.remove()
    backward(model, 0)
    before = trained(optimizer)
    optimizer.step()
    assert_same(trained(optimizer), before)
    with pytest.raises(RuntimeError, match="enabled already"):
        enable_gradient_release(model, optimizer)


def _pickled(both: Any) -> Any:
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled])
def test_copies_of_both_train_by_step(copied: Callable[[Any], Any]) -> None:
    """Model and optimizer are copied while it is enabled; the older test copied one of them."""
    model, optimizer = _plain()
    enable_gradient_release(model, optimizer)
    backward(model, 0)
    copies = [copied((model, optimizer)) for _ in range(2)]
    other, plain = copies[0]
    for t in range(1, 4):
        backward(other, t)
        assert all(param.grad is not None for param in other.parameters())
        plain.step()
        plain.zero_grad()
        backward(model, t)
    assert_same(trained(plain), trained(optimizer))
    enable_gradient_release(*copies[1])
    for t in range(1, 4):
        backward(copies[1][0], t)
    assert_same(trained(copies[1][1]), trained(optimizer))


def test_what_is_no_longer_used_is_freed() -> None:
    """The parameters' hooks kept the optimizer and the parameters alive for ever."""
    model, optimizer = _plain()
    release = enable_gradient_release(model, optimizer)
    model.output = model(inputs(0))
    backward(model, 1)
    alive = [weakref.ref(thing) for thing in (model, optimizer, model[0].weight, release)]
    del model, optimizer, release
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 4


def test_the_model_goes_on_without_the_handle_and_the_optimizer() -> None:
    """The model alone keeps what steps it."""
    model, optimizer = _plain()
    enable_gradient_release(model, optimizer)
    del optimizer
    gc.collect()
    before = values(model)
    backward(model, 0)
    for param, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(param, old)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("order", ["compiled", "wrapper", "enabled", "run"])
def test_compiled_models(order: str) -> None:
    """torch.compile takes the model whole, whatever comes first, and its steps are the same."""
    runs = []
    for release in (True, False):
        torch._dynamo.reset()
        model, optimizer = _plain()
        called: Any = model
        if order != "enabled":
            called = torch.compile(model, backend="aot_eager", fullgraph=True)
        if order == "run":
            called(inputs(0))
        if release:
            enable_gradient_release(called if order == "wrapper" else model, optimizer)
        if order == "enabled":
            called = torch.compile(model, backend="aot_eager", fullgraph=True)
        for t in range(4):
            backward(called, t)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(trained(optimizer))
    assert_same(runs[0], runs[1])


@pytest.mark.parametrize("released", ["before", "after"])
def test_sam_around_a_released_optimizer(released: str) -> None:
    """SAM refuses it, whichever comes first: both backward passes of a step would step.

    The test of `enable_gradient_release(model, SAM(...))` passes the SAM itself.
    """
    model = nn.Linear(2, 1)
    optimizer = AdamCM(model.parameters(), priority_scope="tensor")
    message = "SAM needs an optimizer that steps in step"
    if released == "before":
        handle = enable_gradient_release(model, optimizer)
        with pytest.raises(RuntimeError, match=message):
            SAM(optimizer)
        handle.remove()
    sam = SAM(optimizer)
    handle = enable_gradient_release(model, optimizer)

    def closure() -> float:
        sam.zero_grad()
        loss = model(torch.ones(2)).sum()
        loss.backward()
        return float(loss.detach())

    before = model.weight.detach().clone()
    for call in (lambda: sam.step(closure), sam.first_step):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert torch.equal(model.weight, before)
    handle.remove()
    sam.step(closure)
    assert optimizer.state[model.weight]["step"] == 1
