"""Parameters that have memory in common are stepped one after the other, on every backend."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
from cm_fused._backends.triton.tables import lies_as
from cm_fused._bucket import Bucket
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import CHUNK, backend_params, device_of, generator
from tests.support.training import assert_same

# Two chunks of the C++ step for each of two threads.
NUMEL = 4 * CHUNK
STEPS = 5


def _same(memory: Tensor) -> list[Tensor]:
    return [memory.view(4, -1), memory.view(4, -1)]


def _transposed(memory: Tensor) -> list[Tensor]:
    return [memory.view(4, -1), memory.view(4, -1).t()]


def _partly(memory: Tensor) -> list[Tensor]:
    return [memory[:-100], memory[100:], memory[:5]]


def _interleaved(memory: Tensor) -> list[Tensor]:
    return [memory[::2], memory[1::2]]


def _side_by_side(memory: Tensor) -> list[Tensor]:
    return [memory[:100], memory[100:]]


Layout = Callable[[Tensor], list[Tensor]]
LAYOUTS = (_same, _transposed, _partly, _interleaved, _side_by_side)


def _give_gradients(params: list[Tensor], t: int) -> None:
    source = generator(t)
    for param in params:
        grad = (1 + t) * torch.randn(param.shape, generator=source)
        param.grad = grad.to(param.device)


def _memory(backend: str) -> Tensor:
    # Only the C++ step has threads that could race.
    memory = torch.randn(NUMEL if backend == "cpu" else 600, generator=generator(99))
    return memory.to(device_of(backend))


def _optimizer(cls: type[CriticalAdam], params: Any, backend: str) -> CriticalAdam:
    options: dict[str, Any] = {"capacity": 3, "priority_scope": "tensor", "weight_decay": 0.1}
    return cls(params, lr=0.05, decoupled_weight_decay=True, backend=backend, **options)


@pytest.mark.parametrize(("in_groups", "tied_after"), [(False, 0), (False, 2), (True, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
def test_a_step_is_that_of_one_after_the_other(
    cls: type[CriticalAdam], backend: str, layout: Layout, tied_after: int, in_groups: bool
) -> None:
    """The bits are those of an optimizer for each parameter, stepped in their order.

    Situation: weights tied by `a.data = b.data`, which leaves two parameters. Two threads of the
    C++ step changed them at once. Older tests tie weights by one parameter.
    """
    torch.set_num_threads(2)
    memory, twin = _memory(backend), _memory(backend)
    params, twins = layout(memory), layout(twin)
    if tied_after:
        for each in (params, twins):
            for param in each:
                param.data = param.clone()
    groups: Any = [{"params": [param]} for param in params] if in_groups else params
    optimizer = _optimizer(cls, groups, backend)
    alone = [_optimizer(cls, [param], backend) for param in twins]
    for t in range(STEPS):
        if t == tied_after:
            for each, shared in ((params, memory), (twins, twin)):
                for param, view in zip(each, layout(shared), strict=True):
                    param.data = view
        _give_gradients(params, t)
        _give_gradients(twins, t)
        optimizer.step()
        for one in alone:
            one.step()
    assert_same(memory, twin)
    for param, other, one in zip(params, twins, alone, strict=True):
        expected = dict(one.state[other])
        assert_same(dict(optimizer.state[param]), expected)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"max_grad_norm": 0.1}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backend_params(("cpu", "triton")))
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
@pytest.mark.slow
def test_as_in_the_reference(
    cls: type[CriticalAdam], backend: str, layout: Layout, options: dict[str, Any]
) -> None:
    """With a norm over both, and an L2 term that the second takes of what the first has changed.

    Situation and older tests: as above.
    """
    torch.set_num_threads(2)
    results = []
    for name in (backend, "eager"):
        memory = _memory(backend)
        params = layout(memory)
        optimizer = cls(params, lr=0.05, capacity=3, backend=name, **options)
        for t in range(STEPS):
            _give_gradients(params, t)
            optimizer.step()
        results.append(memory)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backend_params(("triton",)))
@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
def test_a_copy_where_the_parameter_was(
    cls: type[CriticalAdam], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter that has moved is noticed where the copy of it gets the memory that it left.

    Situation: `b.data = a.data.t()` gives up b's memory, which the allocator hands out for a copy:
    no address changed. Older tests move both parameters, or have memory that stays.
    """
    made = [torch.randn(shape, generator=generator(3)) for shape in ((4, 150), (150, 4))]
    params, twins = ([param.to(device_of(backend), copy=True) for param in made] for _ in range(2))
    # Gradients that stay where they are: the optimizer's copies are all that could have moved.
    _give_gradients(params, 0)
    _give_gradients(twins, 0)
    left = params[1].data

    def laid_out(tensors: list[Tensor], bucket: Bucket) -> list[Tensor]:
        pairs = zip(tensors, bucket["exp_avg"], strict=True)
        return [
            tensor if lies_as(tensor, exp_avg) else left.copy_(tensor) for tensor, exp_avg in pairs
        ]

    optimizer = _optimizer(cls, params, backend)
    alone = [_optimizer(cls, [param], backend) for param in twins]
    for t in range(STEPS):
        if t == 2:
            for first, second in (params, twins):
                second.data = first.data.t()
        with monkeypatch.context() as patch:
            patch.setattr("cm_fused._backends.triton.placed.laid_out", laid_out)
            optimizer.step()
        for one in alone:
            one.step()
    assert_same(params, twins)


@pytest.mark.parametrize("cls", [AdamCM, AdamCG])
def test_found_after_a_step_that_failed(cls: type[CriticalAdam]) -> None:
    """What a step that failed has seen of the parameters is not taken for looked through.

    Situation: weights are tied, and the first step after that fails in another group. At the next
    one no parameter had moved since the last look at it.
    """
    torch.set_num_threads(2)
    memory, twin = _memory("cpu"), _memory("cpu")
    params, twins = _same(memory), _same(twin)
    for each in (params, twins):
        for param in each:
            param.data = param.clone()
    last = torch.ones(3)
    optimizer = _optimizer(cls, [{"params": params}, {"params": [last]}], "cpu")
    alone = [_optimizer(cls, [param], "cpu") for param in twins]
    for t in range(STEPS):
        _give_gradients(params, t)
        _give_gradients(twins, t)
        if t == 2:
            for each, shared in ((params, memory), (twins, twin)):
                for param, view in zip(each, _same(shared), strict=True):
                    param.data = view
            last.grad, data, last.data = torch.ones(3), last.data, torch.ones(4)
            with pytest.raises(RuntimeError):
                optimizer.step()
            last.data = data
        last.grad = torch.ones(3)
        optimizer.step()
        for one in alone:
            one.step()
    assert_same(memory, twin)


@pytest.mark.parametrize("backend", backend_params(("triton",)))
def test_found_where_norms_come_first(backend: str) -> None:
    """The pass over the norms, which looks at the addresses first, does not hide that they moved.

    Situation: tied weights and clipping. Interpreted, launches cannot race: the older tests see
    their results alone.
    """
    params = _same(_memory(backend))
    optimizer = AdamCM(params, max_grad_norm=1.0, backend=backend)
    _give_gradients(params, 0)
    optimizer.step()
    _give_gradients(params, 1)
    optimizer.step()
    (plan,) = optimizer._plans._plans.values()
    tables: Any = plan.buckets[0].registered
    assert tables.one_by_one
