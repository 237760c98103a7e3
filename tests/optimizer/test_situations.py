"""Situations in which an optimizer went silently wrong, taken from public issue threads.

Every test names its thread. Those that hold what was right already are here since a silent fault
would be easy to bring back.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer, lr_scheduler

from cm_fused import SAM, AdamCG, AdamCM, AdamWCM
from cm_fused._optimizer.base import CriticalAdam
from tests.support.training import (
    BACKENDS,
    KINDS,
    ROUNDING,
    assert_same,
    give_gradients,
    new_optimizer,
    params_of,
    snapshot,
    train,
    trained,
)

on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
of_each_kind = pytest.mark.parametrize("cls", KINDS)


# Gradients and parameters in other forms


@on_each_backend
@of_each_kind
def test_conjugated_gradient(cls: type[CriticalAdam], backend: str) -> None:
    """A complex gradient that autograd left conjugated is read as the values that it has.

    Thread: pytorch/pytorch#59998. `p.conj()` in a loss gives such a gradient, which was refused;
    older tests made complex gradients without autograd.
    """
    params = [nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.complex64)) for _ in range(2)]
    optimizers = [cls([param], lr=1e-2, backend=backend) for param in params]
    weights = torch.linspace(1, 2, 6, dtype=torch.complex64)
    for _ in range(4):
        for i, param in enumerate(params):
            param.grad = None
            loss: Any = (param.conj() * weights).real.square().sum()
            loss.backward()
            assert param.grad is not None
            assert param.grad.is_conj()
            if i:
                param.grad = param.grad.resolve_conj()
            optimizers[i].step()
    assert_same(params[0].detach(), params[1].detach())


@on_each_backend
@of_each_kind
def test_negated_gradient(cls: type[CriticalAdam], backend: str) -> None:
    """A real gradient that is negated lazily is read as the values that it has.

    Thread: pytorch/pytorch#59998. The Triton tables kept the address of a copy that had ended,
    right for as long as nothing else took its memory.
    """
    optimizer, twin = (new_optimizer(cls, backend=backend) for _ in range(2))
    for t in range(4):
        give_gradients(twin, t)
        for mine, theirs in zip(params_of(optimizer), params_of(twin), strict=True):
            grad = theirs.grad
            assert grad is not None
            mine.grad = torch.complex(grad, -grad).conj().imag
            assert mine.grad.is_neg()
        optimizer.step()
        twin.step()
    assert_same(trained(optimizer), trained(twin))


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("lazy", ["conjugate", "negative"])
@on_each_backend
def test_lazy_parameter(backend: str, lazy: str, steps_before: int) -> None:
    """A parameter that is a lazy conjugate or negative is refused by name, and nothing changed.

    Thread: pytorch/pytorch#59998, as above. The C++ step told of a "fallback" that "doesn't
    support mutable TensorLists"; the older tests replaced a parameter's data by plain tensors.
    """
    dtype = torch.complex64 if lazy == "conjugate" else torch.float32
    param = nn.Parameter(torch.ones(6, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = AdamCM([param], backend=backend)
    for _ in range(steps_before):
        optimizer.step()
    # The memory is the same: no address tells of a change.
    param.data = param.data.conj() if lazy == "conjugate" else torch._neg_view(param.data)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"got a lazy {lazy}; set param.data = .*resolve_neg"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("options", [{}, {"moment_dtype": torch.int8}], ids=str)
@on_each_backend
@of_each_kind
def test_model_turned_to_double(
    cls: type[CriticalAdam], backend: str, options: dict[str, Any]
) -> None:
    """A parameter turned to float64 after a step is refused, and the remedy that is named works.

    Thread: plenoptic-org/plenoptic#404. The reference went on with float32 state; older tests
    turned parameters to half precision, whose state is float32 too.
    """
    optimizer = new_optimizer(cls, backend=backend, **options)
    train(optimizer, range(3))
    for param in params_of(optimizer):
        param.data = param.data.double()
    give_gradients(optimizer, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"fits its state of torch.float32, got torch.float64"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    if not options:
        successor = cls(copy.copy(optimizer.param_groups), backend=backend)
        successor.load_state_dict(optimizer.state_dict())
        train(successor, range(3, 5))
        assert all(state["step"] == 5 for state in successor.state_dict()["state"].values())


@pytest.mark.filterwarnings("ignore")  # what torch says of itself while it compiles
@pytest.mark.parametrize(
    ("cls", "backend"),
    [
        # Traced operator by operator, as the eager step is, a step takes long: one class of it.
        pytest.param(cls, name, marks=[pytest.mark.slow] * (cls is not AdamCM and name == "eager"))
        for cls in KINDS
        for name in BACKENDS
    ],
)
def test_compiled_step_of_complex_parameters(cls: type[CriticalAdam], backend: str) -> None:
    """A compiled step of complex parameters beside real ones is the plain one.

    Thread: pytorch/pytorch#110706. The fused steps raised "setStorage"; older tests compiled real
    parameters alone.
    """
    torch._dynamo.reset()
    runs = []
    for compiles in (False, True):
        params = [nn.Parameter(torch.ones(5, dtype=torch.complex64)), nn.Parameter(torch.ones(3))]
        optimizer = cls(params, lr=1e-2, backend=backend)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiles else optimizer.step
        for t in range(3):
            give_gradients(optimizer, t)
            step()
        runs.append(trained(optimizer))
    torch._dynamo.reset()
    if backend == "eager" and torch.__version__ < "2.13":
        # Older torch traces `add_` with alpha as two operations, each of which rounds.
        torch.testing.assert_close(runs[1], runs[0], **ROUNDING)
    else:
        assert_same(runs[1], runs[0])


# What was right already


@on_each_backend
def test_swapped_by_conversion(backend: str) -> None:
    """A model converted by swapping its parameters goes on as one converted in place.

    Thread: pytorch/pytorch#117167 (`set_swap_module_params_on_conversion`). The swap needs that
    nothing else holds the tensor, as a library's table of parameters would.
    """
    trained_models = []
    for swaps in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(5, 4)
        optimizer = AdamWCM(model.parameters(), lr=1e-2, backend=backend)
        _train_model(model, optimizer, 3, torch.float32)
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        try:
            model.to(torch.bfloat16)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        _train_model(model, optimizer, 3, torch.bfloat16)
        trained_models.append((model.state_dict(), optimizer.state_dict()["state"]))
    assert_same(trained_models[1], trained_models[0])


def _train_model(model: nn.Module, optimizer: Optimizer, steps: int, dtype: torch.dtype) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 5, dtype=dtype)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01, 9.0])[:1]], ids=str)
@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.2), lr_scheduler.CosineAnnealingLR(optimizer, 8)],
            [4],
        ),
        partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=12),
    ],
    ids=["sequential", "restarts", "one_cycle"],
)
@on_each_backend
def test_scheduled_learning_rates(
    backend: str, make_scheduler: Callable[[Optimizer], Any], lr: float | Tensor
) -> None:
    """Schedulers that write a tensor lr in place follow the schedule that AdamW sees.

    Threads: pytorch/pytorch#162359 and #195984 (SequentialLR, and an lr that is a view). An
    optimizer that copied the tensor, or kept its value, would go on with another rate.
    """
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [
        AdamWCM(params[:1], lr=copy.deepcopy(lr), backend=backend),
        torch.optim.AdamW(params[1:], lr=copy.deepcopy(lr)),
    ]
    schedulers = [make_scheduler(optimizer) for optimizer in optimizers]
    for _ in range(10):
        for param, optimizer, scheduler in zip(params, optimizers, schedulers, strict=True):
            param.grad = torch.ones(3)
            optimizer.step()
            scheduler.step()
        rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
        assert rates[0] == rates[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_each_backend
def test_step_counts_under_a_half_default_dtype(backend: str, dtype: torch.dtype) -> None:
    """The count of steps passes 256 and 2048 under a default dtype of half precision.

    Threads: pytorch/ao#4915 and deepspeedai/DeepSpeed#8496, where it stood still.
    """
    param = nn.Parameter(torch.ones(2, dtype=torch.float32))
    param.grad = torch.ones_like(param)
    torch.set_default_dtype(dtype)
    try:
        optimizer = AdamCM([param], backend=backend)
        optimizer.step()
        optimizer.state[param]["step"].fill_(2048)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[param]["step"] == 2049


class _Cast(Tensor):
    """A tensor around another that hands every operator on, as weights gathered in float8 do."""

    weights: Tensor

    @staticmethod
    def __new__(cls, weights: Tensor) -> "_Cast":
        made: _Cast = Tensor._make_wrapper_subclass(
            cls, weights.size(), strides=weights.stride(), dtype=weights.dtype
        )
        made.weights = weights
        return made

    def __init__(self, weights: Tensor) -> None: ...

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        unwrapped = pytree.tree_map_only(cls, lambda tensor: tensor.weights, (args, kwargs or {}))
        result = func(*unwrapped[0], **unwrapped[1])
        keeps = func in (torch.ops.aten.detach.default, torch.ops.aten.empty_like.default)
        return cls(result) if keeps else result


@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5}, {"moment_dtype": torch.bfloat16}], ids=str
)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
@of_each_kind
def test_wrapped_weights(cls: type[CriticalAdam], backend: str, options: dict[str, Any]) -> None:
    """A parameter that wraps its weights and hands operators on trains as the weights do.

    Thread: pytorch/ao#590 (`WeightWithDynamicFloat8CastTensor`). Such a tensor has no memory of its
    own: a step that read addresses past the dispatcher would write to nowhere.
    """
    weights = [torch.linspace(-1, 1, 300) for _ in range(2)]
    params = [nn.Parameter(_Cast(weights[0])), nn.Parameter(weights[1])]
    optimizers = [cls([param], lr=1e-2, backend=backend, **options) for param in params]
    for t in range(6):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.linspace(-1, 2, 300) * (t % 3 + 1)
            optimizer.step()
    assert not torch.equal(weights[0], torch.linspace(-1, 1, 300))
    assert_same(weights[0], weights[1])


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@of_each_kind
def test_fake_tensors(cls: type[CriticalAdam], backend: str) -> None:
    """Estimating memory with fake tensors takes steps, in one group and in two.

    Threads: pytorch/torchtitan#410 and pytorch/pytorch#93654. A fake tensor has no memory either.
    """
    with FakeTensorMode():
        optimizer = new_optimizer(cls, backend=backend, max_grad_norm=1.0)
        for _ in range(3):
            for param in params_of(optimizer):
                param.grad = torch.ones_like(param)
            optimizer.step()
        shapes = [param.shape for param in params_of(optimizer)]
        states = optimizer.state_dict()["state"]
    assert [states[i]["exp_avg"].shape for i in range(len(shapes))] == shapes


class _Lookahead:
    """The wrapper of timm and pytorch_optimizer: slow weights in the wrapped optimizer's state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group.setdefault("lookahead_step", 0)

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % 3:
                continue
            for param in group["params"]:
                slow = self.optimizer.state[param].setdefault("slow", param.detach().clone())
                param.copy_(slow.lerp_(param, 0.5))


@pytest.mark.sampled
@on_each_backend
@of_each_kind
def test_lookahead_is_resumed(cls: type[CriticalAdam], backend: str) -> None:
    """A wrapper's entries in the state and in the groups come through a checkpoint, at any step.

    Thread: kozistr/pytorch_optimizer#237 and #310 (Lookahead lost its state). Entries added to the
    state in the middle of training also end what is kept for the next step.
    """
    for interrupted in range(1, 8):
        whole, first, second = (new_optimizer(cls, backend=backend) for _ in range(3))
        _take_steps(_Lookahead(whole), range(10))
        _take_steps(_Lookahead(first), range(interrupted))
        for target, source in zip(params_of(second), params_of(first), strict=True):
            target.data = source.data.clone()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        _take_steps(_Lookahead(second), range(interrupted, 10))
        assert_same(trained(second), trained(whole))


def _take_steps(lookahead: _Lookahead, steps: range) -> None:
    for t in steps:
        give_gradients(lookahead.optimizer, t)
        lookahead.step()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@on_each_backend
def test_hooks_that_change_a_step(backend: str, options: dict[str, Any]) -> None:
    """A step pre-hook that replaces gradients and sets the learning rate counts for that step.

    Thread: pytorch/torchtitan#2732 (a pre-hook prepares the optimizer). What is kept from the last
    step must be looked at after the hooks.
    """
    optimizer, twin = (new_optimizer(AdamCG, backend=backend, **options) for _ in range(2))

    def halve(hooked: Optimizer, *_: Any) -> None:
        for group in hooked.param_groups:
            group["lr"] = 0.02
            for param in group["params"]:
                param.grad = param.grad * 0.5

    optimizer.register_step_pre_hook(halve)
    for t in range(5):
        give_gradients(optimizer, t)
        optimizer.step()
        give_gradients(twin, t)
        halve(twin)
        twin.step()
    assert_same(trained(optimizer), trained(twin))


# Groups and checkpoints


@pytest.mark.parametrize("place", ["2 of group 0", "1 of group 1"])
@on_each_backend
@of_each_kind
def test_a_parameter_twice(cls: type[CriticalAdam], backend: str, place: str) -> None:
    """A parameter twice in a group, or put into a second one's list by hand, is refused unchanged.

    Thread: pytorch/pytorch#40967; fine-tuning moves parameters between groups. The C++ step changed
    one state from two places; older tests look at torch's warning alone.
    """
    params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    if place == "2 of group 0":
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = cls([params[0], params[1], params[0]], backend=backend)
    else:
        groups = [{"params": [param]} for param in params[:2]]
        optimizer = cls(groups, backend=backend)
        train(optimizer, range(2))
        optimizer.param_groups[1]["params"].append(params[0])
    give_gradients(optimizer, 2)
    before = snapshot(optimizer)
    message = f"every parameter once, got parameter 0 of group 0 again as parameter {place}"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_step_as_a_number_under_a_half_default_dtype() -> None:
    """A count of steps that a checkpoint has as a number is loaded as that number.

    Thread: pytorch/ao#4915. 1001 became the default dtype's 1000; older tests only step there.
    """
    optimizer = new_optimizer(AdamCM)
    train(optimizer, range(1))
    state_dict = optimizer.state_dict()
    for state in state_dict["state"].values():
        state["step"] = 1001.0
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer.load_state_dict(state_dict)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(state["step"] == 1001 for state in optimizer.state.values())


@pytest.mark.filterwarnings("ignore:cm_fused steps with the slow eager backend for meta")
@pytest.mark.parametrize("mode", [partial(torch.device, "meta"), FakeTensorMode])
def test_loading_without_memory(mode: Callable[[], Any]) -> None:
    """A state dict of tensors without values loads, so that a resumed run can be estimated.

    Thread: pytorch/torchtitan#410. The check of the step count read its value.
    """
    with mode():
        model = nn.Linear(3, 3)
        optimizer = AdamCM(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


def test_sam_and_conjugated_gradients() -> None:
    """SAM reads a conjugated gradient as the optimizers do.

    Thread: pytorch/pytorch#59998. The older tests made complex gradients without autograd.
    """
    params = [nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.complex64)) for _ in range(2)]
    weights = torch.linspace(1, 2, 6, dtype=torch.complex64)
    for i, param in enumerate(params):
        optimizer = SAM(AdamCM([param]))

        def closure(param: Tensor = param, resolves: bool = bool(i)) -> float:
            param.grad = None
            loss: Any = (param.conj() * weights).real.square().sum()
            loss.backward()
            assert param.grad is not None
            if resolves:
                param.grad = param.grad.resolve_conj()
            return float(loss.detach())

        for _ in range(3):
            optimizer.step(closure)
    assert torch.equal(*params)
