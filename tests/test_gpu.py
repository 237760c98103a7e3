"""What only a CUDA device can show: graphs, synchronizations, launches, memory, two devices."""

from collections import Counter
from collections.abc import Iterator
from operator import eq
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cm_fused._critical_adam import CriticalAdam
from cm_fused.ops import library
from cm_fused.ops.table import CHUNK_SIZE
from tests.cases import (
    KINDS,
    MIXED,
    Event,
    Kind,
    make_gradients,
    make_optimizer,
    make_params,
    skip_if,
    skip_reason,
)
from tests.compare import saved
from tests.oracle import Options

pytestmark = [pytest.mark.gpu, skip_if(skip_reason(gpu=True))]

SHAPES: list[tuple[int, ...]] = [(3 * CHUNK_SIZE,), (70, 33), (5,), ()]
# A buffer of three is filled, replaced and skipped.
SCALES = (1.0, 4.0, 0.25, 2.0, 8.0, 0.01, 0.01, 3.0, 0.5, 20.0, 1.0, 30.0)
EVENTS = [Event(scale) for scale in SCALES]
GIBIBYTE = 2**30


def _cuda_params() -> list[Tensor]:
    return [param.cuda() for param in make_params(SHAPES)]


def _optimizer(params: list[Tensor], options: Options, **others: Any) -> CriticalAdam:
    """Return an optimizer of "triton" whose groups have these options besides."""
    optimizer = make_optimizer(params, options, "triton")
    for group in optimizer.param_groups:
        group.update(others)
    return optimizer


def _gradients() -> Iterator[list[Tensor]]:
    for grads in make_gradients(make_params(SHAPES), EVENTS):
        yield [grad.cuda() for grad in grads if grad is not None]


def _assert_same_training(first: CriticalAdam, second: CriticalAdam) -> None:
    for a, b in zip(first.param_groups[0]["params"], second.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)
    for i in range(len(SHAPES)):
        mine, theirs = vars(saved(first, i)), vars(saved(second, i))
        for key, value in mine.items():
            same = torch.equal if isinstance(value, Tensor) else eq
            assert same(value, theirs[key]), f"{i}: {key}"


# CUDA graphs


# Options whose steps take the gradients' norm first.
CLIPPING: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True}
with_and_without_clipping = pytest.mark.parametrize(
    "others", [{}, CLIPPING], ids=["plain", "clipping"]
)


@with_and_without_clipping
@pytest.mark.parametrize("lr_on_device", [False, True])
@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("capacity", [3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_are_eager_steps(
    kind: Kind, capacity: int, scope: Any, lr_on_device: bool, others: dict[str, Any]
) -> None:
    """A captured step, replayed, has the bits of eager steps; a learning rate may change."""
    options = Options(kind, lr=0.05, capacity=capacity, amsgrad=True, priority_scope=scope)
    optimizers = [_optimizer(_cuda_params(), options, capturable=True, **others) for _ in range(2)]
    captured, eager = optimizers
    if lr_on_device:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.05, device="cuda")
    graph = torch.cuda.CUDAGraph()
    for t, grads in enumerate(_gradients()):
        for optimizer in optimizers:
            for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
                if param.grad is None:
                    param.grad = torch.empty_like(param)
                param.grad.copy_(grad)
            if lr_on_device:
                optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + t))
        eager.step()
        if t == 0:
            captured.step()
            with torch.cuda.graph(graph):
                captured.step()
        else:
            graph.replay()
    _assert_same_training(captured, eager)


def test_backward_and_step_in_one_graph() -> None:
    """Gradients that the capture itself makes are those its replays read."""
    model, twin = (nn.Linear(64, 64, bias=False).cuda() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    batch = torch.randn(8, 64, device="cuda")
    captured = _optimizer(list(model.parameters()), Options(lr=0.01), capturable=True)
    eager = _optimizer(list(twin.parameters()), Options(lr=0.01), capturable=True)

    def step(net: nn.Module, optimizer: CriticalAdam) -> None:
        optimizer.zero_grad(set_to_none=True)
        net(batch).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(model, captured)
    torch.cuda.current_stream().wait_stream(stream)
    step(twin, eager)
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step(model, captured)
    for _ in range(10):
        graph.replay()
        step(twin, eager)
    torch.testing.assert_close(model.weight, twin.weight)
    # Eager steps go on from where the graph left off.
    step(model, captured)
    step(twin, eager)
    torch.testing.assert_close(model.weight, twin.weight)


def test_state_is_not_made_in_a_graph() -> None:
    """A capture before the first step is an error that says what to do."""
    params = _cuda_params()
    optimizer = _optimizer(params, Options(), capturable=True)
    for param in params:
        param.grad = torch.ones_like(param)
    with (
        pytest.raises(RuntimeError, match="take a step before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


# What a step costs


@with_and_without_clipping
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scope", ["group", "tensor"])
@pytest.mark.parametrize("capacity", [3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_no_synchronization(
    kind: Kind, capacity: int, scope: Any, capturable: bool, others: dict[str, Any]
) -> None:
    """No step waits for the device: neither the first nor one with new gradients."""
    params = [*_cuda_params(), make_params([(9, 7)])[0].cuda().t()]
    options = Options(kind, capacity=capacity, priority_scope=scope, buffer_mean="size")
    optimizer = _optimizer(params, options, capturable=capturable, **others)
    grads = [[torch.ones_like(param) for param in params] for _ in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for of_step in [grads[0], *grads]:
            for param, grad in zip(params, of_step, strict=True):
                param.grad = grad
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _device_work(optimizer: CriticalAdam) -> Counter[str]:
    """Return what one step does on the device, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    events = profile.events()
    assert events is not None
    return Counter(event.name for event in events if event.device_type.name == "CUDA")


@pytest.mark.skipif(library.cuda_unavailable_reason is not None, reason="the CUDA kernel's launch")
@pytest.mark.parametrize("num_tensors", [1, 1000])
@pytest.mark.parametrize(("kind", "launches"), [("cm", 2), ("cg", 3)])
def test_launches_and_allocations(kind: Kind, launches: int, num_tensors: int) -> None:
    """In steady state a step is its launches: no copy, no memset, no allocation."""
    params = [param.cuda() for param in make_params([(37,)] * num_tensors)]
    optimizer = _optimizer(params, Options(kind, capacity=5))
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    work = _device_work(optimizer)
    assert work.total() == launches, work


def test_repr_names_the_priority_kernel() -> None:
    """The repr says which kernel keeps the books."""
    kernel = "CUDA" if library.cuda_unavailable_reason is None else "Triton"
    optimizer = _optimizer(_cuda_params(), Options())
    assert f"triton on cuda with the {kernel} priority kernel" in repr(optimizer)


# Where and how large


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_on_cpu_and_cuda(kind: Kind) -> None:
    """A group with parameters on both is stepped as it would be on the CPU, with one norm."""
    made = make_params([(40,), (3, 5), (7,)])
    params = [made[0].cuda(), made[1].clone(), made[2].cuda()]
    expected = [param.clone() for param in made]
    options = Options(kind, lr=0.05, capacity=3)
    mixed = make_optimizer(params, options, None)
    on_cpu = make_optimizer(expected, options, "eager")
    for grads in make_gradients(made, MIXED.events(3)):
        for tensors, optimizer in ((params, mixed), (expected, on_cpu)):
            for param, grad in zip(tensors, grads, strict=True):
                param.grad = None if grad is None else grad.to(param.device)
            optimizer.step()
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param.cpu(), other, rtol=1e-5, atol=1e-5)


def test_a_stream_of_its_own() -> None:
    """The step is queued on the current stream, also where that is not the default one."""
    params, others = _cuda_params(), _cuda_params()
    on_stream, on_default = (_optimizer(each, Options(lr=0.05)) for each in (params, others))
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for grads in _gradients():
        for param, other, grad in zip(params, others, grads, strict=True):
            param.grad, other.grad = grad, grad
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_stream.step()
        torch.cuda.current_stream().wait_stream(stream)
        on_default.step()
    _assert_same_training(on_stream, on_default)


@pytest.mark.parametrize(("capacity", "numel"), [(1, 2**31 + 100), (5, 2**29 + 100)])
def test_offsets_beyond_31_bits(capacity: int, numel: int) -> None:
    """The last elements of a huge tensor, and of its last slot, are those of a small one."""
    needed = 4 * numel * (5 + capacity) + GIBIBYTE
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / GIBIBYTE:.0f} GiB of free device memory")
    count = CHUNK_SIZE + 100
    options = Options("cm", lr=0.05, capacity=capacity, priority_scope="tensor")
    small = torch.ones(count)
    huge = torch.ones(numel, device="cuda")
    optimizers = [_optimizer([huge], options), make_optimizer([small], options, "eager")]
    for t in range(capacity + 2):
        # Only the end has a gradient: both have the same norm.
        small.grad = torch.linspace(-1.0, 1.0 + t, count)
        if huge.grad is None:
            huge.grad = torch.zeros_like(huge)
        huge.grad[-count:] = small.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(huge[-count:].cpu(), small, rtol=1e-5, atol=1e-5)
    slots = [optimizer.state_dict()["state"][0]["critical_buffer"] for optimizer in optimizers]
    torch.testing.assert_close(slots[0][:, -count:].cpu(), slots[1])


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_that_of_float32(kind: Kind) -> None:
    """After 100 steps the error against float64 is at most twice that of eager float32."""
    options = Options(kind, lr=0.01, capacity=5)
    made = make_params([(300, 70), (CHUNK_SIZE + 9,)])
    runs = {}
    for name, backend, dtype in (
        ("exact", "eager", torch.float64),
        ("eager", "eager", torch.float32),
        ("triton", "triton", torch.float32),
    ):
        runs[name] = params = [param.to("cuda", dtype) for param in made]
        optimizer = make_optimizer(params, options, backend)
        for grads in make_gradients(made, [Event(1 + t % 7) for t in range(100)]):
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else grad.to(param)
            optimizer.step()
    errors = {
        name: max(
            float((a.double() - b).abs().max()) for a, b in zip(params, runs["exact"], strict=True)
        )
        for name, params in runs.items()
    }
    assert errors["triton"] <= 2 * errors["eager"], errors
