"""Situations in which an optimizer went silently wrong, taken from public issue threads.

Every test names its thread. Those that hold what was right already are here since a silent fault
would be easy to bring back.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from cm_fused import AdamCM
from cm_fused._critical_adam import CriticalAdam
from tests.training import (
    BACKENDS,
    KINDS,
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

    Thread: pytorch/pytorch#59998 (Adam and complex parameters). `p.conj()` in a loss gives such a
    gradient, and the step said that view_as_real "doesn't work on unresolved conjugated tensors",
    as torch's own still does. The older tests made complex gradients without autograd.
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

    Thread: pytorch/pytorch#59998, as above; the imaginary part of a conjugate is such a tensor. The
    tables of the Triton step kept the address of a copy that ended with the operator's call, which
    gave the right values for as long as nothing else took its memory.
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
    optimizer = AdamCM([param], backend=backend)
    for _ in range(steps_before):
        param.grad = torch.ones_like(param)
        optimizer.step()
    conjugate = torch.linspace(1, 2, 6, dtype=torch.complex64).conj()
    param.data = conjugate if lazy == "conjugate" else conjugate.imag
    param.grad = torch.ones(6, dtype=dtype)
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

    Thread: plenoptic-org/plenoptic#404 (after `.to(dtype)` the optimizer no longer moves anything).
    The reference went on with float32 state, and the C++ step named an internal list; the older
    tests turned parameters to half precision, whose state is float32 too.
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
@on_each_backend
@of_each_kind
def test_compiled_step_of_complex_parameters(cls: type[CriticalAdam], backend: str) -> None:
    """A compiled step of complex parameters beside real ones is the plain one.

    Thread: pytorch/pytorch#110706, where Dynamo failed on torch's optimizers of complex parameters.
    The fused steps raised "setStorage: sizes ... are out of bounds"; the older tests compiled real
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
    assert_same(runs[1], runs[0])
