"""What only a CUDA device can show: graphs, synchronizations, launches, memory, two devices."""

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from operator import eq
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from cm_fused import SAM, AdamCM
from cm_fused._backends import library
from cm_fused._backends.triton.columns import CHUNK_SIZE
from cm_fused._optimizer.base import CriticalAdam
from tests.support.cases import (
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
from tests.support.compare import saved
from tests.support.oracle import Options
from tests.support.training import assert_same

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


@pytest.mark.parametrize(
    "others",
    [{}, CLIPPING, {"adjust_lr_fn": "match_rms_adamw"}],
    ids=["plain", "clipping", "adjusted"],
)
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
    for t, grads in enumerate(_gradients()):
        _give(grads, *optimizers)
        if lr_on_device:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"].fill_(0.05 / (1 + t))
        eager.step()
        if t == 0:
            captured.step()
            graph = _captured_step(captured)
        else:
            graph.replay()
            assert torch.equal(captured.grad_norm(), eager.grad_norm())
    _assert_same_training(captured, eager)


@pytest.fixture(scope="module")
def _cublas() -> None:
    """Leave out what multiplies matrices where torch cannot."""
    try:
        torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
    except RuntimeError as error:
        if "CUBLAS" not in str(error):
            raise
        pytest.skip(f"cuBLAS does not work here: {error}")


@pytest.mark.usefixtures("_cublas")
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


def test_a_learning_rate_on_the_cpu_is_not_captured() -> None:
    """Replays would go on with its value of the capture.

    Older tests captured numbers, which nobody can change in place, and tensors on the device.
    """
    params = _cuda_params()
    optimizer = _optimizer(params, Options(), capturable=True, lr=torch.tensor(0.1))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.clone() for param in params]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        params[0].mul(2)  # an empty graph is a warning
        with pytest.raises(RuntimeError, match="needs a tensor lr on the parameters' device"):
            optimizer.step()
    assert all(map(torch.equal, params, before))


def _give(grads: list[Tensor], *optimizers: CriticalAdam) -> None:
    """Write gradients where those of the last step are, which is where a graph reads them."""
    for optimizer in optimizers:
        for param, grad in zip(optimizer.param_groups[0]["params"], grads, strict=True):
            if param.grad is None:
                param.grad = torch.empty_like(param)
            param.grad.copy_(grad)


def _captured_step(optimizer: CriticalAdam) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


def _with_options_on_the_device(options: Options, backend: str, lr: float) -> CriticalAdam:
    """Return an optimizer whose learning rate and count of skipped steps are on the device."""
    optimizer = make_optimizer(_cuda_params(), options, backend)
    (group,) = optimizer.param_groups
    group.update(capturable=True, skip_nonfinite=True, lr=torch.tensor(lr, device="cuda"))
    return optimizer


def _addresses(optimizer: CriticalAdam) -> dict[Any, int]:
    """Return where the state and the options are."""
    (group,) = optimizer.param_groups
    named = {key: value for key, value in group.items() if isinstance(value, Tensor)}
    for i, param in enumerate(group["params"]):
        named |= {f"{i}: {key}": value for key, value in optimizer.state[param].items()}
    return {key: value.data_ptr() for key, value in named.items()}


def _untouched(state_dict: dict[str, Any]) -> Callable[[], None]:
    """Return a check that a state dict is still what it is now."""
    expected = copy.deepcopy(state_dict)
    return lambda: assert_same(state_dict, expected)


def _loaded_twin(optimizer: CriticalAdam, options: Options, state_dict: Any) -> CriticalAdam:
    """Return an optimizer without a graph at the same parameters that loaded a state dict."""
    twin = _with_options_on_the_device(options, "triton", 0.0)
    groups = twin.param_groups[0], optimizer.param_groups[0]
    for mine, theirs in zip(*(group["params"] for group in groups), strict=True):
        mine.copy_(theirs)
    twin.load_state_dict(state_dict)
    return twin


@pytest.mark.parametrize("source", ["triton", "eager", "untrained"])
@pytest.mark.parametrize("capacity", [3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_go_on_from_a_loaded_state(kind: Kind, capacity: int, source: str) -> None:
    """They have the bits of an eager optimizer that loaded the same, and no state dict changes.

    Situation: a captured run goes back to a checkpoint, with a commit that is pending; the state
    dict of another backend has no running sum, that of a new optimizer no state at all. Graphs were
    tested without loads, and loads with a stand-in for the graph.
    """
    options = Options(kind, capacity=capacity)
    captured = _with_options_on_the_device(options, "triton", 0.05)
    other = _with_options_on_the_device(options, "eager" if source == "eager" else "triton", 0.02)
    gradients = list(_gradients())
    _give(gradients[0], captured)
    captured.step()
    graph = _captured_step(captured)
    backup = captured.state_dict()
    checks = [_untouched(backup)]
    graph.replay()
    steps = () if source == "untrained" else (gradients[3], [grad / 0 for grad in gradients[4]])
    for grads in steps:
        _give(grads, other)
        other.step()
    addresses = _addresses(captured)
    for state_dict in (other.state_dict(), backup):
        twin = _loaded_twin(captured, options, state_dict)
        captured.load_state_dict(state_dict)
        assert _addresses(captured) == addresses
        checks.append(_untouched(captured.state_dict()))
        for t, grads in enumerate(gradients[5:]):
            _give(grads, captured, twin)
            twin.step()
            # An eager step between replays leaves its commit to the next replay.
            if t == 2:
                captured.step()
            else:
                graph.replay()
        _assert_same_training(captured, twin)
        for name in ("lr", "skipped_steps"):
            assert torch.equal(captured.param_groups[0][name], twin.param_groups[0][name])
    for check in checks:
        check()


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("tied_after", [0, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_with_memory_in_common(
    kind: Kind, transposed: bool, tied_after: int, in_graph: bool
) -> None:
    """The bits are those of an optimizer for each parameter, stepped in their order.

    Situation: weights tied by `b.data = a.data`, whose old memory the allocator hands out again.
    As test_overlap.py, with a real allocator and graphs.
    """
    options = Options(
        kind, lr=0.05, capacity=3, priority_scope="tensor", weight_decay=0.1,
        decoupled_weight_decay=True,
    )  # fmt: skip
    shapes: list[tuple[int, ...]] = [(24, 70), (70, 24) if transposed else (24, 70)]
    params, twins = ([param.cuda() for param in make_params(shapes)] for _ in range(2))
    together = _optimizer(params, options, capturable=True)
    alone = [_optimizer([param], options) for param in twins]
    graph = None

    def tie(first: Tensor, second: Tensor) -> None:
        second.data = first.data.t() if transposed else first.data

    for t, made in enumerate(make_gradients(make_params(shapes), EVENTS[:8])):
        grads = [grad.cuda() for grad in made if grad is not None]
        _give(grads, together)
        for optimizer, grad in zip(alone, grads, strict=True):
            _give([grad], optimizer)
        if t == tied_after:
            tie(*params)
        if in_graph and t > tied_after:
            graph = graph or _captured_step(together)
            graph.replay()
        else:
            together.step()
        if t == tied_after:
            tie(*twins)
        for optimizer in alone:
            optimizer.step()
        assert_same(params, twins)


def _set_sync_debug_mode(mode: str) -> None:
    """Set what torch does at a synchronization; it warns, once it is set, of a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def _no_synchronizations() -> Iterator[None]:
    torch.cuda.synchronize()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode("default")


# SAM


def _sam(
    adaptive: bool, dtype: torch.dtype = torch.float32, capturable: bool = False
) -> tuple[SAM, Callable[[], Any]]:
    """Return an optimizer, and a closure that sets gradients to None before it computes them."""
    params = [param.to(dtype).requires_grad_() for param in _cuda_params()]
    optimizer = SAM(AdamCM(params, lr=0.01, capturable=capturable), rho=0.5, adaptive=adaptive)

    def closure() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.stack([(param.float() - 0.5).square().sum() for param in params]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return optimizer, closure


def _values(optimizer: SAM) -> list[Tensor]:
    return [param.detach().clone() for param in optimizer.param_groups[0]["params"]]


with_and_without_adaptive = pytest.mark.parametrize("adaptive", [False, True])


@with_and_without_adaptive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sam_does_not_synchronize(dtype: torch.dtype, adaptive: bool) -> None:
    """No step with a closure that sets gradients to None waits for the device, nor the first."""
    optimizer, closure = _sam(adaptive, dtype)
    with _no_synchronizations():
        for _ in range(3):
            optimizer.step(closure)


@with_and_without_adaptive
def test_sam_restores_and_copies(adaptive: bool) -> None:
    """Parameters are put back to the bit; a copy between the half-steps goes on as its original."""
    optimizer, closure = _sam(adaptive)
    optimizer.step(closure)
    closure()
    before = _values(optimizer)
    optimizer.first_step()
    perturbed = _values(optimizer)
    assert not any(map(torch.equal, perturbed, before))
    copied = copy.deepcopy(optimizer)
    assert_same(_values(copied), perturbed)
    for each in (optimizer, copied):
        for param in each.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        each.second_step()
    assert_same(_values(copied), _values(optimizer))
    still = SAM(SGD(optimizer.param_groups[0]["params"], lr=0.0), rho=0.5, adaptive=adaptive)
    before = _values(still)
    still.step(closure)
    assert_same(_values(still), before)


@with_and_without_adaptive
def test_sam_in_a_graph(adaptive: bool) -> None:
    """Replays of both half-steps have the bits of eager ones."""
    optimizer, closure = _sam(adaptive, capturable=True)
    twin, its_closure = _sam(adaptive, capturable=True)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step(closure)
    torch.cuda.current_stream().wait_stream(stream)
    twin.step(its_closure)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        optimizer.step(closure)
    for _ in range(5):
        graph.replay()
        twin.step(its_closure)
    assert_same(_values(optimizer), _values(twin))


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
    with _no_synchronizations():
        for of_step in [grads[0], *grads]:
            for param, grad in zip(params, of_step, strict=True):
                param.grad = grad
            optimizer.step()
            norm = optimizer.grad_norm()
    assert norm.device == params[0].device
    assert norm.item() == pytest.approx(sum(param.numel() for param in params) ** 0.5)


def _device_work(step: Callable[[], object]) -> Counter[str]:
    """Return what a step does on the device, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # torch 2.11 warns of events that it drops without.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize()
    events = profile.events()
    assert events is not None
    on_device = (event for event in events if event.device_type.name == "CUDA")
    # Not the name that torch gives to the step, which spans it on the device too.
    return Counter(event.name for event in on_device if not event.is_user_annotation)


@pytest.fixture(scope="module")
def _profiler() -> None:
    """Leave out what the profiler counts where it does not see a device's fill."""
    if not _device_work(lambda: torch.ones(1, device="cuda")):
        pytest.skip("torch's profiler does not see the device: CUPTI does not work here")


def _steady(kind: Kind, num_tensors: int) -> CriticalAdam:
    """Return an optimizer that has taken a few steps."""
    params = [param.cuda() for param in make_params([(37,)] * num_tensors)]
    optimizer = _optimizer(params, Options(kind, capacity=5))
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    return optimizer


@pytest.mark.parametrize("num_tensors", [1, 1000])
@pytest.mark.parametrize("kind", ["cm", "cg"])
def test_allocations(kind: Kind, num_tensors: int) -> None:
    """In steady state a step allocates nothing."""
    optimizer = _steady(kind, num_tensors)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.skipif(library.cuda_unavailable_reason is not None, reason="the CUDA kernel's launch")
@pytest.mark.usefixtures("_profiler")
@pytest.mark.parametrize("num_tensors", [1, 1000])
@pytest.mark.parametrize(("kind", "launches"), [("cm", 2), ("cg", 3)])
def test_launches(kind: Kind, launches: int, num_tensors: int) -> None:
    """In steady state a step is its launches: no copy, no memset."""
    work = _device_work(_steady(kind, num_tensors).step)
    assert work.total() == launches, work


def test_repr_names_the_priority_kernel() -> None:
    """The repr says which kernel updates the priorities."""
    kernel = "CUDA" if library.cuda_unavailable_reason is None else "Triton"
    optimizer = _optimizer(_cuda_params(), Options())
    assert f"triton on cuda with the {kernel} priority kernel" in repr(optimizer)


# Where and how large


@with_and_without_clipping
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_on_cpu_and_cuda(kind: Kind, others: dict[str, Any]) -> None:
    """A group with parameters on both is stepped as it would be on the CPU, with one norm.

    The norm was read before its copy to the host had come: a fault that shows where copies take
    long, and older tests had few bytes to copy.
    """
    made = make_params([(40,), (3, 5), (7,)])
    params = [made[0].cuda(), made[1].clone(), made[2].cuda()]
    expected = [param.clone() for param in made]
    options = Options(kind, lr=0.05, capacity=3)
    mixed = make_optimizer(params, options, None)
    on_cpu = make_optimizer(expected, options, "eager")
    for optimizer in (mixed, on_cpu):
        optimizer.param_groups[0].update(others)
    for grads in make_gradients(made, MIXED.events(3)):
        for tensors, optimizer in ((params, mixed), (expected, on_cpu)):
            for param, grad in zip(tensors, grads, strict=True):
                param.grad = None if grad is None else grad.to(param.device)
            optimizer.step()
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param.cpu(), other, rtol=1e-5, atol=1e-5)


def test_a_stream_of_its_own() -> None:
    """The step is queued on the current stream, also where that is not the last step's."""
    params, others = _cuda_params(), _cuda_params()
    on_stream, on_default = (_optimizer(each, Options(lr=0.05)) for each in (params, others))
    streams = [torch.cuda.Stream() for _ in range(2)]  # type: ignore[no-untyped-call]
    for step, grads in enumerate(_gradients()):
        for param, other, grad in zip(params, others, grads, strict=True):
            param.grad, other.grad = grad, grad
        stream = streams[step % 2]
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
