"""The "triton" backend where parity does not look: bits, tables, offsets, kernels of priorities.

Kernels run on a GPU where there is one, else under the interpreter.
"""

import contextlib
import mmap
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCG, AdamCM
from cm_fused._backends import cpu, library
from cm_fused._backends import select as _backend
from cm_fused._backends.triton.columns import CHUNK_SIZE, COLUMNS, WIDTH
from cm_fused._bucket import Batch, Bucket
from cm_fused._optimizer.base import CriticalAdam
from cm_fused._optimizer.plan import Member
from cm_fused._state.table import fused_keys
from tests.support.cases import (
    KINDS,
    MIXED,
    ROOT,
    Event,
    Kind,
    device_of,
    make_gradients,
    make_optimizer,
    make_params,
    needs_cpu_backend,
    needs_triton,
    step_options,
)
from tests.support.compare import saved
from tests.support.lockstep import Lockstep, maker
from tests.support.oracle import Options
from tests.support.samples import SAMPLES

triton = pytest.importorskip("cm_fused._backends.triton.launch", reason="triton is not installed")
placed = pytest.importorskip("cm_fused._backends.triton.placed")
tables = pytest.importorskip("cm_fused._backends.triton.tables")

DEVICE = device_of("triton")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
# Here both kernels keep a running sum, so both add the same numbers in the same order.
CAPACITY = 5
EVENTS = MIXED.events(CAPACITY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["param", "grad"])
def test_memory_that_is_not_aligned(which: str, kind: Kind) -> None:
    """A tensor that starts 4 bytes after a boundary is stepped to the bits of one that does not."""
    options = Options(kind, lr=0.05, capacity=CAPACITY)
    (made,) = make_params([(CHUNK_SIZE,)])
    results = []
    for shifted in (False, True):
        moved = {"param": False, "grad": False, which: shifted}
        param = _shifted(made, moved["param"])
        optimizer = make_optimizer([param], options, "triton")
        for (grad,) in make_gradients([made], EVENTS[:6]):
            assert grad is not None
            param.grad = _shifted(grad, moved["grad"])
            optimizer.step()
        results.append(param)
    assert results[0].data_ptr() % 16 == 0
    assert torch.equal(results[1], results[0]), which


def _shifted(tensor: Tensor, shifted: bool) -> Tensor:
    memory = torch.empty(tensor.numel() + 4, dtype=tensor.dtype, device=DEVICE)
    return memory[shifted : shifted + tensor.numel()].copy_(tensor)


# The table


@needs_cpu_backend
def test_columns_are_those_of_csrc() -> None:
    """Python's columns and csrc/priority/table.h's are the same ones, in one order."""
    header = (ROOT / "csrc" / "priority" / "table.h").read_text()
    assert torch.ops.cm_fused.table_columns().split(",") == list(COLUMNS)
    assert re.search(rf"kTableWidth = {WIDTH};", header)


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Record what is copied to the device."""
    recorded: list[Tensor] = []
    upload = tables._upload

    def recording(host: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        recorded.append(host)
        return upload(host, device)  # type: ignore[no-any-return]

    monkeypatch.setattr(tables, "_upload", recording)
    return recorded


@pytest.mark.parametrize("extension", [pytest.param(True, marks=needs_cpu_backend), False])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied_when_nothing_changed(
    kind: Kind, extension: bool, uploads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is copied to the device when an address changed, and never else."""
    if not extension:
        monkeypatch.setattr(library, "unavailable_reason", "not built")
    params = [param.to(DEVICE) for param in make_params([(7,), (2, 3)])]
    optimizer = make_optimizer(params, Options(kind), "triton")

    def copied() -> int:
        uploads.clear()
        optimizer.step()
        return len(uploads)

    for param in params:
        param.grad = torch.ones_like(param)
    copied()  # makes state and chunks
    copied()  # makes the plan
    assert [copied() for _ in range(3)] == [0, 0, 0]
    for group in optimizer.param_groups:
        group.update(lr=0.5, betas=(0.5, 0.5), weight_decay=0.1, maximize=True, eps=1e-3)
    assert copied() == 0
    params[0].grad = torch.ones_like(params[0])
    assert [copied(), copied()] == [1, 0]
    params[1].data = params[1].data.clone()
    assert [copied(), copied()] == [1, 0]
    params[1].grad = None
    assert copied() > 0
    assert copied() == 0


@needs_cpu_backend
@pytest.mark.parametrize("name", SAMPLES)
def test_table_without_the_extension(name: str) -> None:
    """Python fills a table as cm_fused::refresh_table_ does."""
    case = SAMPLES[name]()
    layouts = list(range(3, 3 + 3 * len(case.params))) if name == "int8" else []
    bucket = Bucket(case.params, case.grads, case.state, shard_layouts=layouts)
    registered = library.RegisteredState(case.state, shard_layouts=layouts)
    rows, expected = (torch.zeros((len(case.params), WIDTH), dtype=torch.int64) for _ in range(2))
    for _ in range(2):
        result = tables._refresh_in_python(case.params, case.grads, bucket, rows)
        assert result == torch.ops.cm_fused.refresh_table_(
            registered.id, case.params, case.grads, expected
        )
        if result != tables._NEEDS_COPIES:
            assert torch.equal(rows, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_without_the_extension(kind: Kind, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was built, triton's own kernel updates priorities, and repr says so."""
    monkeypatch.setattr(library, "unavailable_reason", "not built")
    monkeypatch.setattr(library, "cuda_unavailable_reason", "not built")
    options = Options(kind, lr=0.05, capacity=3, priority_scope=scope)  # type: ignore[arg-type]
    params = [*make_params([(9, 4), (33,)]), make_params([(5, 8)])[0].t()]
    lockstep = Lockstep(params, maker(options), "triton")
    for grads in make_gradients(params, MIXED.events(3)):
        lockstep.step(grads)
    expected = f"Active backends: triton on {DEVICE.type} with the Triton priority kernel\n)"
    assert repr(lockstep.optimizer).endswith(expected)


@pytest.mark.parametrize("extension", [pytest.param(True, marks=needs_cpu_backend), False])
def test_tables_and_graph_capture(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture uploads is its graph's alone, and stays; what was there is shared.

    tests/backends/test_gpu.py replays graphs; here a capture is only said to be going on.
    """
    if not extension:
        monkeypatch.setattr(library, "unavailable_reason", "not built")
    bucket = _bucket_in_training(Options(capacity=3), 9, torch.zeros)
    made = tables.Tables(bucket)
    before = made.refresh(bucket.params, bucket.grads)
    kept = before.clone()
    others = [grad.clone() for grad in bucket.grads]
    with monkeypatch.context() as capturing:
        for module in (tables, placed):
            capturing.setattr(module, "is_capturing", lambda device: True)
        assert made.refresh(bucket.params, bucket.grads) is before
        captured = made.refresh(bucket.params, others)
        in_capture = tables.Tables(bucket)
    assert captured is not before
    assert captured[0, COLUMNS["grad"]] == others[0].data_ptr()
    # Eager steps have the table that has been uploaded, and never write what a graph reads.
    assert made.refresh(bucket.params, bucket.grads) is before
    assert torch.equal(before, kept)
    # A graph's tables live on: the one that it shares, when eager steps have left it for another.
    made.refresh(bucket.params, [grad.clone() for grad in bucket.grads])
    assert [kept_tables[0] for kept_tables in made._of_captures] == [before, captured]
    # Tables that a capture has made are not there yet for a step outside: it makes its own.
    bucket.registered = in_capture
    assert in_capture.made_in_capture
    own = placed.tables_of(bucket)
    assert own is not in_capture
    assert not own.made_in_capture
    assert own._replaced is in_capture


def test_memory_that_another_stream_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is freed when that stream is done with it, not the one on which it was made.

    Older tests had a stream to themselves; what is freed too early is rarely overwritten in time.
    """
    stream, used = "first", []
    monkeypatch.setattr(tables, "_stream", lambda device: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda *recorded: used.append(recorded))
    bucket = _bucket_in_training(Options(capacity=3), 9, torch.zeros)
    made = tables.Tables(bucket)
    made.refresh(bucket.params, bucket.grads)
    assert not used
    stream = "second"
    table = made.refresh(bucket.params, bucket.grads)
    used_by_kernels = [table, made.chunk_sq_norms, made.launches[0].chunks]
    pointers = {tensor.data_ptr() for tensor, on in used if on == "second"}
    assert {tensor.data_ptr() for tensor in used_by_kernels} <= pointers


@pytest.mark.parametrize("fails", [False, True])
def test_what_clipping_has_placed_goes_with_the_gradients(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm's pass leaves the step's tensors to the next one, which an error may prevent."""
    (param,) = make_params([(9, 4)])
    optimizer = AdamCM([param.to(DEVICE)], backend="triton", max_grad_norm=1.0)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones_like(param)
    optimizer.step()
    param.grad = torch.ones_like(param)
    with monkeypatch.context() as patch:
        if fails:
            patch.setattr(triton, "_launchers", lambda buckets: 1 / 0)
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            optimizer.step()
    grad = weakref.ref(param.grad)
    optimizer.zero_grad()
    assert grad() is None


# Offsets of more than 31 bits


def _unbacked(*shape: int) -> Tensor:
    """Return zeros of any size: what is never written takes no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    numel = torch.Size(shape).numel()
    memory = mmap.mmap(-1, 4 * numel, flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32, count=numel).view(shape)


@needs_triton
@needs_cpu_backend
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tests/backends/test_gpu.py has such tensors")
@pytest.mark.parametrize(("capacity", "numel"), [(1, 2**31 + 100), (CAPACITY, 2**29 + 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_offsets_beyond_31_bits(kind: Kind, capacity: int, numel: int) -> None:
    """The last elements of a huge tensor, and of its last slot, are those of a small one.

    Only the last two chunks are stepped: one that is full, and a tail.
    """
    options = Options(kind, lr=0.05, capacity=capacity)
    begin = (numel // CHUNK_SIZE - 1) * CHUNK_SIZE
    small = _bucket_in_training(options, numel - begin, torch.zeros)
    huge = _bucket_in_training(options, numel, _unbacked, begin)
    made = tables.Tables(huge)
    chunks = made.launches[0]
    dtypes = chunks.param_dtype, chunks.grad_dtype
    made.launches = [tables.Chunks(*dtypes, chunks.chunks[-2:], chunks.sq_norms[-2:])]
    made.chunk_sq_norms.zero_()
    huge.registered = made
    batches = [Batch([bucket], bucket.params, bucket.grads) for bucket in (huge, small)]
    cpu.register(batches[1])
    for _ in range(2):
        for backend, batch in zip((triton, cpu), batches, strict=True):
            batch.grads = batch.buckets[0].grads
            backend.prepare(batch)()
    torch.testing.assert_close(huge.params[0][begin:], small.params[0])
    for key in ("exp_avg", "exp_avg_sq", "critical_buffer", "critical_sum"):
        for actual, expected in zip(huge[key], small[key], strict=True):
            torch.testing.assert_close(actual[..., begin:], expected, msg=key)
    assert torch.equal(huge["priorities"][0], small["priorities"][0])


def _bucket_in_training(options: Options, numel: int, make: Any, begin: int = 0) -> Bucket:
    """Return a bucket of one tensor; from `begin` on it has the same values whatever its size.

    The buffer is full, and its last slot is the next to be replaced.
    """
    capacity = options.capacity
    values = [tensor.abs() for tensor in make_params([(numel - begin,)] * (4 + capacity))]
    param, grad, exp_avg, exp_avg_sq = (make(numel) for _ in range(4))
    buffer = make(capacity, numel)
    for i, tensor in enumerate((param, grad, exp_avg, exp_avg_sq, *buffer)):
        tensor[begin:] = values[i]
    group = {"capacity": capacity, "buffer_dtype": None}
    keys = fused_keys(group, critical_gradients=options.kind == "cg")
    sums = [make(numel)] if "critical_sum" in keys else []
    for total in sums:
        total[begin:] = buffer[:, begin:].sum(0)
    state = {
        "exp_avg": [exp_avg],
        "exp_avg_sq": [exp_avg_sq],
        "critical_buffer": [buffer],
        "critical_sum": sums,
        "priorities": [torch.tensor([2.0] * (capacity - 1) + [1.0])],
        "pending_slot": [torch.tensor(capacity - 1)] if "pending_slot" in keys else [],
        "step": [torch.tensor(float(capacity))],
    }
    return Bucket(
        [param],
        [grad],
        {key: tensors for key, tensors in state.items() if tensors},
        critical_gradients=options.kind == "cg",
        options=step_options(options),
    )


# A group on several devices


@needs_cpu_backend
@pytest.mark.skipif(DEVICE.type != "cpu", reason="tests/backends/test_gpu.py has two devices")
@pytest.mark.parametrize("kind", KINDS)
def test_group_of_several_buckets(kind: Kind) -> None:
    """A group that two backends share has one norm: it is stepped as by one of them.

    Two buckets of CPU tensors stand for two devices' where there is no second one.
    """
    options = Options(kind, lr=0.05, capacity=2)  # without running sums both keep the same state
    made = make_params([(40,), (3, 5), (7,)])
    shared, whole = ([param.clone() for param in made] for _ in range(2))
    optimizers = [make_optimizer(params, options, "cpu") for params in (shared, whole)]
    for t, grads in enumerate(make_gradients(made, [Event(scale) for scale in (1, 3, 0.1, 5, 2)])):
        for params in (shared, whole):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
        if t == 1:
            _share(optimizers[0])
        plans = list(optimizers[0]._plans._plans.values())
        for optimizer in optimizers:
            optimizer.step()
        assert t == 0 or plans == list(optimizers[0]._plans._plans.values())
        assert t == 0 or len(plans[0].buckets) == 2
        torch.testing.assert_close(shared, whole)
        for i in range(len(made)):
            assert torch.equal(*(saved(optimizer, i).priorities for optimizer in optimizers))


def _share(optimizer: CriticalAdam) -> None:
    """Give the first parameter a bucket and a backend of its own."""
    (group,) = optimizer.param_groups
    params, plans = group["params"], optimizer._plans
    plans.find(optimizer.param_groups, optimizer.state)
    backends = _backend.select("cpu", DEVICE), _backend.select("triton", DEVICE)
    members = [Member(0, backends[0], params[:1], [0]), Member(0, backends[1], params[1:], [1, 2])]
    buckets = [optimizer._bucket(member, group) for member in members]
    plan = plans.new_plan(members, buckets, optimizer.param_groups)
    plans.add(plan, optimizer.state)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that Triton does not serve is an error that names it."""
    monkeypatch.setattr(triton.triton_common, "INTERPRETED", False)
    for cls in (AdamCM, AdamCG):
        with pytest.raises(RuntimeError, match=r"Triton compiles for CUDA, ROCm and XPU .* cpu"):
            cls([torch.nn.Parameter(torch.ones(1))], backend="triton")


def test_default_of_cuda_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA parameters are stepped by triton; without it by the reference, said once."""
    device = torch.device("cuda")
    with monkeypatch.context() as compiled:
        compiled.setattr(triton.triton_common, "INTERPRETED", False)
        assert _backend.select(None, device).name == "triton"
    monkeypatch.setattr(_backend, "find_spec", lambda name: None)
    _backend._found.clear()
    _backend._warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match="slow eager .* cuda .* triton is not installed") as warned:
        assert [_backend.select(None, device).name for _ in range(2)] == ["eager", "eager"]
    assert len(warned) == 1
    _backend._found.clear()
