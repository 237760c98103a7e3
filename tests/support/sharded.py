"""What the processes of `tests/distributed/test_sharding.py` run: cases over 1, 2 or 4 of them.

Run as a module it starts the processes, and writes what became of every case as JSON.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    OffloadPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from cm_fused import (
    SAM,
    AdamCG,
    AdamCM,
    AdamWCM,
    diagnostics,
    enable_gradient_release,
    get_master_param,
    param_groups_weight_decay,
    set_master_param,
)
from cm_fused._distributed import local
from cm_fused._state.making import dequantized, unscaled
from cm_fused.compat.cmoptimizer import Adam_CM
from cm_fused.rounding import INT4, split_master
from tests.support.training import set_gradient

# A hang is a failure within this time.
TIMEOUT = timedelta(seconds=60)
# Rounding of a reduction may differ by a few last bits, which small roots enlarge.
OPTIONS: dict[str, Any] = {"lr": 0.03, "eps": 1e-3, "capacity": 3}
# Of a few elements more than processes, of fewer, of none to spare; a scalar's is never cut.
SHAPES = ((7, 3), (3, 2), (1,), (8,), (5, 1, 2))
STEPS = 8
WORLDS = (4, 2, 1)


class Case:
    """A case: what every process runs, and the numbers of processes it is run on."""

    def __init__(self, function: Callable[[Path], None], worlds: tuple[int, ...]) -> None:
        self.function = function
        self.worlds = worlds


CASES: dict[str, Case] = {}


def case(*worlds: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Register a case for these numbers of processes, in the order of the file."""

    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[function.__name__] = Case(function, worlds)
        return function

    return register


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Compare, to the rounding of a reduction, what may be sharded."""
    whole = actual.full_tensor() if isinstance(actual, DTensor) else actual
    torch.testing.assert_close(whole, expected, rtol=3e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


# Parameters that are sharded, with given gradients


def _whole(
    seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


class Twins:
    """Sharded parameters and whole ones, stepped with the same gradients."""

    def __init__(
        self,
        cls: type[Any],
        mesh: DeviceMesh,
        placements: list[Any],
        shapes: tuple[tuple[int, ...], ...] = SHAPES,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        self.mesh = mesh
        self.placements = placements
        self.kind = shapes, dtype
        self.whole = [nn.Parameter(param) for param in _whole(0, *self.kind)]
        self.sharded = [nn.Parameter(self.shard(param)) for param in _whole(0, *self.kind)]
        self.optimizer = cls(self.sharded, **{**OPTIONS, **options})
        self.expected = cls(self.whole, **{**OPTIONS, **options})

    def shard(self, tensor: Tensor) -> Tensor:
        """Return a tensor as the parameters are placed."""
        return distribute_tensor(tensor, self.mesh, self.placements)

    def step(self, t: int, change: Callable[[list[Tensor]], None] | None = None) -> None:
        """Step both."""
        grads = [(1 + t % 3) * grad for grad in _whole(t + 1, *self.kind)]
        if change is not None:
            change(grads)
        for param, twin, grad in zip(self.sharded, self.whole, grads, strict=True):
            param.grad, twin.grad = self.shard(grad), grad
        self.optimizer.step()
        self.expected.step()

    def train(self, change: Callable[[list[Tensor]], None] | None = None) -> "Twins":
        """Take `STEPS` steps; return self."""
        for t in range(STEPS):
            self.step(t, change)
        return self

    def check_state(self) -> None:
        """Compare all state."""
        states = self.optimizer.state_dict()["state"]
        for i, expected in self.expected.state_dict()["state"].items():
            assert states[i].keys() == expected.keys()
            for key, value in expected.items():
                assert_close(states[i][key], value, f"{key} of {i}")

    def check(self) -> None:
        """Compare parameters and all state."""
        self.check_state()
        for i, (param, twin) in enumerate(zip(self.sharded, self.whole, strict=True)):
            assert_close(param, twin.detach(), f"param {i}")

    def check_bits(self) -> None:
        """Compare parameters and moments bit by bit."""
        states, others = (o.state_dict()["state"] for o in (self.optimizer, self.expected))
        for i, (param, twin) in enumerate(zip(self.sharded, self.whole, strict=True)):
            assert torch.equal(_gathered(param.detach()), twin), f"param {i}"
            for key in ("exp_avg", "exp_avg_sq", "critical_buffer"):
                assert torch.equal(_gathered(states[i][key]), others[i][key]), f"{key} of {i}"


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


def _square(*names: str) -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


def _in_both_scopes(mesh: DeviceMesh, placements: list[Any], **options: Any) -> None:
    for cls in (AdamCM, AdamCG):
        for scope in ("group", "tensor"):
            Twins(cls, mesh, placements, priority_scope=scope, **options).train().check()


@case(2, 4)
def one_dimension(_: Path) -> None:
    """Sharded along the first dimension, some processes with nothing."""
    _in_both_scopes(_mesh(), [Shard(0)])


@case(2)
def eager_backend(_: Path) -> None:
    """The reference too, with options that take other paths."""
    _in_both_scopes(
        _mesh(), [Shard(0)], backend="eager", amsgrad=True, weight_decay=0.1, maximize=True
    )


@case(2)
def bfloat16_slots(_: Path) -> None:
    """State without scales may have low precision."""
    Twins(AdamCM, _mesh(), [Shard(0)], buffer_dtype=torch.bfloat16, capacity=7).train().check()


@case(4)
def two_dimensions(_: Path) -> None:
    """Sharded twice along one dimension, and hybrid: what two processes hold counts once."""
    _in_both_scopes(_square("dp", "tp"), [Shard(0), Shard(0)])
    _in_both_scopes(_square("replicate", "shard"), [Replicate(), Shard(0)])


@case(2)
def gradients_in_summands(_: Path) -> None:
    """A gradient of which the processes hold summands is that of their sum."""
    twins = Twins(AdamCM, _mesh(), [Shard(0)])
    from torch.distributed.tensor import Partial

    for t in range(3):
        for param, twin, grad in zip(twins.sharded, twins.whole, _whole(t + 1), strict=True):
            part = grad * (0.25 if dist.get_rank() == 0 else 0.75)
            param.grad = DTensor.from_local(part, twins.mesh, [Partial()], run_check=False)
            twin.grad = grad
        twins.optimizer.step()
        twins.expected.step()
    twins.check()


@case(2)
def missing_gradients_and_plain_parameters(_: Path) -> None:
    """Parameters without a gradient, and beside them plain ones, which are the same everywhere."""
    twins = Twins(AdamCM, _mesh(), [Shard(0)])
    plain = [nn.Parameter(torch.ones(6)) for _ in range(2)]
    twins.optimizer.add_param_group({"params": plain[:1], "lr": 0.1})
    twins.expected.add_param_group({"params": plain[1:], "lr": 0.1})
    for t in range(STEPS):
        for param in plain:
            param.grad = torch.linspace(-1, t, 6)

        def without_one(grads: list[Tensor], t: int = t) -> None:
            grads[t % 2] *= 1.5

        twins.step(t, without_one)
        for optimizer in (twins.optimizer, twins.expected):
            optimizer.param_groups[0]["params"][t % len(SHAPES)].grad = None
    twins.check()
    assert_close(plain[0].detach(), plain[1].detach())


@case(2)
def no_gradients_at_all(_: Path) -> None:
    """A step without gradients takes its part in the sum."""
    twins = Twins(AdamCM, _mesh(), [Shard(0)])
    twins.optimizer.step()
    twins.step(0)
    twins.check()


@contextlib.contextmanager
def _counted_sums() -> Iterator[list[Any]]:
    """Record the sums over processes that are started."""
    calls: list[Any] = []
    original = dist.all_gather

    def all_gather(every: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((tensor.numel(), kwargs.get("async_op", False)))
        return original(every, tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_gather", all_gather):
        yield calls


@case(2, 4)
def one_small_sum_a_step(_: Path) -> None:
    """A float64 for each parameter once a step, in both scopes, not waited for by the step."""
    for scope in ("group", "tensor"):
        for cls in (AdamCM, AdamCG):
            twins = Twins(cls, _mesh(), [Shard(0)], priority_scope=scope)
            for t in range(3):
                with _counted_sums() as calls:
                    twins.step(t)
                assert calls == [(len(SHAPES), True)], calls
            pending = twins.optimizer._pending is not None
            assert pending == (cls is AdamCM)
            twins.check()
            assert twins.optimizer._pending is None


@case(2)
def half_precision_gradients(_: Path) -> None:
    """DTensors take bfloat16 gradients as what they are in float32."""

    def rounded(grads: list[Tensor]) -> None:
        for grad in grads:
            grad.copy_(grad.bfloat16())

    for cls in (AdamCM, AdamCG):
        twins = Twins(cls, _mesh(), [Shard(0)])
        for t in range(STEPS):
            twins.step(t, rounded)
        twins.check()
        lower = Twins(cls, _mesh(), [Shard(0)])
        for t in range(STEPS):
            for param, grad in zip(lower.sharded, _whole(t + 1), strict=True):
                set_gradient(param, lower.shard(((1 + t % 3) * grad).bfloat16()))
            lower.optimizer.step()
        for param, twin in zip(lower.sharded, twins.sharded, strict=True):
            assert torch.equal(_gathered(param.detach()), _gathered(twin.detach()))


@case(2)
def no_buffer(_: Path) -> None:
    """Without keys nothing is summed over processes, unless clipping asks for it."""
    for cls in (AdamCM, AdamCG):
        twins = Twins(cls, _mesh(), [Shard(0)], capacity=0)
        with _counted_sums() as calls:
            twins.train()
        assert not calls
        assert math.isnan(twins.optimizer.grad_norm())
        twins.check()
        Twins(cls, _mesh(), [Shard(0)], capacity=0, max_grad_norm=0.7).train().check()


@case(2)
def clipping(_: Path) -> None:
    """The global norm is that of all processes; the sum for it is one more."""
    for cls in (AdamCM, AdamCG):
        Twins(cls, _mesh(), [Shard(0)], max_grad_norm=0.7).train().check()


@case(2)
def norms_of_gradients(_: Path) -> None:
    """`grad_norm` is that of the whole gradients on every process, clipped or not."""
    for cls in (AdamCM, AdamCG):
        for options in ({}, {"priority_scope": "tensor"}, {"max_grad_norm": 0.7}):
            twins = Twins(cls, _mesh(), [Shard(0)], **options)
            for t in range(3):
                twins.step(t)
                grads = [param.grad for param in twins.whole if param.grad is not None]
                for optimizer in (twins.optimizer, twins.expected):
                    norm = optimizer.grad_norm().float()
                    assert_close(norm, nn.utils.get_total_norm(grads))
            twins.check()


@case(2)
def one_process_is_not_finite(_: Path) -> None:
    """What one process holds keeps all of them from stepping."""
    twins = Twins(AdamCM, _mesh(), [Shard(0)], skip_nonfinite=True)
    twins.step(0)
    before = [param.full_tensor().clone() for param in twins.sharded]  # type: ignore[attr-defined]

    def overflow(grads: list[Tensor]) -> None:
        grads[0][0, 0] = torch.inf

    twins.step(1, overflow)
    for param, kept in zip(twins.sharded, before, strict=True):
        assert torch.equal(param.full_tensor(), kept)  # type: ignore[attr-defined]
    assert twins.optimizer.param_groups[0]["skipped_steps"].item() == 1
    twins.step(2)
    twins.check()


def _readings(twins: Twins) -> Iterator[tuple[float, float]]:
    """Train, and yield what diagnostics read of the sharded buffers beside the whole ones'."""
    twins.train()
    readings = [diagnostics.read(o).values() for o in (twins.optimizer, twins.expected)]
    for mine, theirs in zip(*readings, strict=True):
        for field in ("filled", "momentum_norm", "mean_norm", "variance"):
            yield getattr(mine, field), getattr(theirs, field)


@case(2)
def diagnostics_of_shards(_: Path) -> None:
    """What the buffers hold is read of whole tensors, after the step that is under way."""
    for value, expected in _readings(Twins(AdamCM, _mesh(), [Shard(0)])):
        assert_close(torch.tensor(value), torch.tensor(expected))


# Stochastic rounding

ROUNDED: tuple[dict[str, Any], ...] = (
    {"moment_dtype": torch.bfloat16},
    {"dtype": torch.bfloat16, "low_precision_update": "stochastic"},
    {
        "dtype": torch.bfloat16,
        "low_precision_update": "stochastic",
        "moment_dtype": torch.bfloat16,
        "buffer_dtype": torch.bfloat16,
    },
)
# Rows that are no multiple of the four elements of a counter, of more than a block of elements.
CUT_ANYWHERE = ((7, 3), (30, 41), (5, 1, 2), (6, 9, 4))


def _to_exact_norms(grads: list[Tensor]) -> None:
    """Round gradients so that the sums of their squares are exact, in any order."""
    for grad in grads:
        grad.copy_((grad * 4).round() / 4)


def _has_the_bits_of_one_process(
    mesh: DeviceMesh, placements: list[Any], shapes: tuple[tuple[int, ...], ...]
) -> None:
    for options in ROUNDED:
        for cls, scope in ((AdamCM, "group"), (AdamCG, "tensor")):
            twins = Twins(cls, mesh, placements, shapes, **options, priority_scope=scope)
            twins.train(_to_exact_norms).check_bits()


@case(1, 2, 4)
def random_words_of_rows(_: Path) -> None:
    """Stochastic rounding has the bits of one process: an element's words are its place's."""
    _has_the_bits_of_one_process(_mesh(), [Shard(0)], (*SHAPES, *CUT_ANYWHERE))


@case(2, 4)
def random_words_of_columns(_: Path) -> None:
    """So it has where every process holds a piece of every row, and on meshes of two dimensions."""
    _has_the_bits_of_one_process(_mesh(), [Shard(1)], CUT_ANYWHERE)
    if dist.get_world_size() == 4:
        pairs = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(0))]
        for placements in (*pairs, (Replicate(), Shard(0))):
            _has_the_bits_of_one_process(_square("dp", "tp"), [*placements], CUT_ANYWHERE)


@case(4)
def random_words_under_fsdp_and_tensor_parallelism(_: Path) -> None:
    """A layer that both cut along one dimension is placed in an order of its own."""
    mesh = _square("dp", "tp")
    model = _fsdp(mesh["dp"], _tensor_parallel(mesh["tp"]))
    strided = [p for p in model.parameters() if type(p.placements[0]).__name__ == "_StridedShard"]
    assert strided
    options = {**OPTIONS, "moment_dtype": torch.bfloat16}
    optimizer = AdamCM(model.parameters(), **options)
    twin = _model()
    expected = AdamCM(twin.parameters(), **options)
    for t in range(STEPS):
        for i, (param, other) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            grads = [torch.randn(other.shape, generator=torch.Generator().manual_seed(9 * t + i))]
            _to_exact_norms(grads)
            other.grad = grads[0]
            param.grad = distribute_tensor(grads[0], param.device_mesh, param.placements)
        optimizer.step()
        expected.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param.full_tensor(), other)


@case(2)
def random_words_of_the_reference(_: Path) -> None:
    """The eager backend rounds to the same neighbours, all but those that its arithmetic moves."""
    for placements in ([Shard(0)], [Shard(1)]):
        options: dict[str, Any] = {"moment_dtype": torch.bfloat16, "backend": "eager", "lr": 0.0}
        twins = Twins(AdamCM, _mesh(), placements, CUT_ANYWHERE, **options)
        twins.step(0, _to_exact_norms)
        twins.check_bits()


# State with scales

SCALED: dict[str, Any] = {
    "slots": {"buffer_dtype": torch.int8},
    "float8": {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.bfloat16},
    "int4": {"buffer_dtype": INT4, "moment_dtype": torch.bfloat16},
    # With a running sum.
    "all": {"buffer_dtype": torch.int8, "moment_dtype": torch.int8, "capacity": 12},
}


@case(2, 4)
def scaled_state_is_that_of_what_is_held(_: Path) -> None:
    """Each process quantizes blocks of its own, as if what it holds were all there is."""
    for backend, buffer_dtype in itertools.product(("cpu", "eager"), (torch.int8, INT4)):
        options = {**OPTIONS, "buffer_dtype": buffer_dtype, "backend": backend}
        whole = _whole(0, CUT_ANYWHERE)
        mesh = _mesh()
        sharded = [nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])) for param in whole]
        alone = [nn.Parameter(param.to_local().clone()) for param in sharded]  # type: ignore[attr-defined]
        optimizer = AdamCM(sharded, priority_scope="tensor", **options)
        expected = AdamCM(alone, priority_scope="tensor", **options)
        for t in range(STEPS):
            # The norms of all parts are in the order of the steps' factors.
            grads = [(1 + t * 3 % 8) * grad for grad in _whole(1, CUT_ANYWHERE)]
            for param, other, grad in zip(sharded, alone, grads, strict=True):
                param.grad = distribute_tensor(grad, mesh, [Shard(0)])
                other.grad = param.grad.to_local().clone()
            optimizer.step()
            expected.step()
        optimizer.state_dict()  # makes the commits
        expected.state_dict()
        for param, other in zip(sharded, alone, strict=True):
            held, state = optimizer.state[param], expected.state[other]
            assert torch.equal(param.to_local(), other)  # type: ignore[attr-defined]
            assert torch.equal(local(held["critical_buffer"]), state["critical_buffer"])
            assert torch.equal(held["critical_scales"], state["critical_scales"])


@case(2)
def diagnostics_of_scaled_shards(_: Path) -> None:
    """What is read of quantized shards is what is read of the values they stand for."""
    twins = Twins(AdamCM, _mesh(), [Shard(0)], CUT_ANYWHERE, **SCALED["all"])
    for value, expected in _readings(twins):
        assert abs(value - expected) <= 0.05 * abs(expected)


@case(2)
def resized_scaled_shards(_: Path) -> None:
    """Slots with the highest keys stay, with their scales."""
    twins = Twins(AdamCM, _mesh(), [Shard(0)], CUT_ANYWHERE, **SCALED["slots"]).train()
    before = twins.optimizer.state_dict()["state"]
    twins.optimizer.resize_buffer(2)
    after = twins.optimizer.state_dict()["state"]
    for i in before:
        kept = before[i]["priorities"].topk(2).indices.sort().values
        slots = before[i]["critical_buffer"].full_tensor()[kept]
        assert torch.equal(after[i]["critical_buffer"].full_tensor(), slots)
    twins.step(STEPS)


# Models


def _model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4))
    for param in model.parameters():
        nn.init.normal_(param, std=0.5, generator=generator)
    return model


def _batch(t: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 + t)) * (1 + t % 3)


def _train(
    model: nn.Module,
    optimizer: Any,
    steps: range,
    share: int = 1,
    index: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Take steps on this process's share of every batch."""
    for t in steps:
        optimizer.zero_grad()
        part = _batch(t).chunk(share)[index].to(dtype)
        (model(part) - 1).pow(2).mean().backward()
        optimizer.step()


def _expected(cls: type[Any], steps: int, **options: Any) -> tuple[nn.Module, Any]:
    model = _model()
    optimizer = cls(model.parameters(), **{**OPTIONS, **options})
    _train(model, optimizer, range(steps))
    return model, optimizer


def _compare(model: nn.Module, expected: nn.Module) -> None:
    for (name, param), twin in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(param.detach(), twin.detach(), name)


def _fsdp(mesh: DeviceMesh, module: Any = None) -> Any:
    model: Any = _model() if module is None else module
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@case(2)
def fsdp2_with_cpu_offload(_: Path) -> None:
    """Parameters that stay on the CPU are stepped there: the bits of a run without offload.

    With state of low precision and two param groups, as a large model would have them.
    """
    trained = []
    for policy in (OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)):
        model: Any = _model()
        for module in (model[0], model[2], model):
            fully_shard(module, mesh=_mesh(), offload_policy=policy)
        groups = param_groups_weight_decay(model, 0.1)
        options = {"buffer_dtype": "int8", "moment_dtype": "bfloat16", "fused": True, **OPTIONS}
        optimizer = AdamWCM(groups, **options)
        _train(model, optimizer, range(STEPS), 2, dist.get_rank())
        assert optimizer.grad_norm().isfinite()
        trained.append([param.full_tensor() for param in model.parameters()])
    _assert_equal(*trained)


@case(2, 4)
def fsdp2(_: Path) -> None:
    """fully_shard trains as one process does."""
    for cls in (AdamCM, AdamWCM, AdamCG):
        for scope in ("group", "tensor"):
            model = _fsdp(_mesh())
            optimizer = cls(model.parameters(), priority_scope=scope, **OPTIONS)
            world, rank = dist.get_world_size(), dist.get_rank()
            _train(model, optimizer, range(STEPS), world, rank)
            _compare(model, _expected(cls, STEPS, priority_scope=scope)[0])


def _tensor_parallel(mesh: DeviceMesh) -> Any:
    return parallelize_module(_model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@case(2)
def tensor_parallel(_: Path) -> None:
    """Tensor parallelism, beside layers that are not."""
    for scope in ("group", "tensor"):
        model = _tensor_parallel(_mesh())
        optimizer = AdamCM(model.parameters(), priority_scope=scope, **OPTIONS)
        _train(model, optimizer, range(STEPS))
        _compare(model, _expected(AdamCM, STEPS, priority_scope=scope)[0])


@case(4)
def fsdp2_over_tensor_parallel(_: Path) -> None:
    """Both, on a mesh of two dimensions; some layers are on one of them alone."""
    for scope in ("group", "tensor"):
        mesh = _square("dp", "tp")
        model = _fsdp(mesh["dp"], _tensor_parallel(mesh["tp"]))
        optimizer = AdamCM(model.parameters(), priority_scope=scope, **OPTIONS)
        _train(model, optimizer, range(STEPS), 2, mesh["dp"].get_local_rank())
        _compare(model, _expected(AdamCM, STEPS, priority_scope=scope)[0])


@case(2, 4)
def ddp(_: Path) -> None:
    """DistributedDataParallel: every process steps alike, without a sum of ours."""
    model = DistributedDataParallel(_model())
    optimizer = AdamCM(model.parameters(), **OPTIONS)
    with _counted_sums() as calls:
        _train(model, optimizer, range(STEPS), dist.get_world_size(), dist.get_rank())
    assert not calls
    _compare(model.module, _expected(AdamCM, STEPS)[0])


@case(2)
def zero_redundancy(_: Path) -> None:
    """ZeRO: scope "tensor" is right, and scope "group" is refused, as no process has the group."""
    # Its import warns of what torch does itself.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = _model()
    options = {**OPTIONS, "priority_scope": "tensor"}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamCM, **options)
    _train(model, optimizer, range(STEPS))
    _compare(model, _expected(AdamCM, STEPS, priority_scope="tensor")[0])
    for cls in (AdamCM, AdamWCM):
        with pytest.raises(ValueError, match="priority_scope='tensor'"):
            ZeroRedundancyOptimizer(model.parameters(), cls, **OPTIONS)
    # Groups that are added later are checked as the first ones are.
    added = {"params": [nn.Parameter(torch.ones(3))], "priority_scope": "group"}
    with pytest.raises(ValueError, match="priority_scope must be 'tensor' under ZeroRedundancy"):
        optimizer.add_param_group(added)


# SAM

# The bases in which a gradient's size matters and does not, and ours.
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.03, eps=1e-3),
    "adamcm": lambda params: AdamCM(params, **OPTIONS),
}


def _loss(model: Any, part: Tensor) -> Any:
    return (model(part) - 1).pow(2).mean()


def _closure(model: Any, optimizer: Any, part: Tensor) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = _loss(model, part)
        loss.backward()
        return loss

    return closure


def _train_sam(model: Any, optimizer: Any, steps: range, share: int = 1, index: int = 0) -> None:
    """As `_train`, with a closure."""
    for t in steps:
        optimizer.step(_closure(model, optimizer, _batch(t).chunk(share)[index]))


def _trains_with_sam(make: Callable[[], Any], share: int = 1, index: int = 0) -> None:
    """Check that a sharded model trains with SAM as a whole one does."""
    for base in BASES.values():
        for adaptive in (False, True):
            model, expected = make(), _model()
            for each, *part in ((model, share, index), (expected, 1, 0)):
                optimizer = SAM(base(each.parameters()), 0.3, adaptive)
                _train_sam(each, optimizer, range(STEPS), *part)
            _compare(model, expected)


@case(1, 2, 4)
def sam_fsdp2(_: Path) -> None:
    """Whoever shards a model trains it with SAM as one process does: one norm over the mesh.

    SAM was tested with plain tensors alone, and its multi-tensor operators have no DTensor form.
    """
    _trains_with_sam(lambda: _fsdp(_mesh()), dist.get_world_size(), dist.get_rank())


@case(1, 2, 4)
def sam_with_ignored_parameters(_: Path) -> None:
    """Parameters that FSDP2 ignores are plain tensors beside DTensors; each counts once."""

    def make() -> Any:
        model: Any = _model()
        ignored = {model[0].bias, *model[3].parameters()}
        fully_shard(model, mesh=_mesh(), ignored_params=ignored)
        kinds = {type(param.data) for param in model.parameters()}
        assert kinds == {Tensor, DTensor}
        return model

    # All processes have the whole batch, since nothing adds up the gradients of plain tensors.
    _trains_with_sam(make)


@case(1, 2, 4)
def sam_tensor_parallel(_: Path) -> None:
    """Layers that are cut and layers that every process has whole have one norm."""
    _trains_with_sam(lambda: _tensor_parallel(_mesh()))


@case(4)
def sam_on_two_dimensions(_: Path) -> None:
    """The sum goes over both of a mesh's dimensions; what two processes hold counts once."""
    hybrid = _square("replicate", "shard")
    _trains_with_sam(lambda: _fsdp(hybrid), 4, dist.get_rank())
    mesh = _square("dp", "tp")
    dp = mesh["dp"]
    _trains_with_sam(lambda: _fsdp(dp, _tensor_parallel(mesh["tp"])), 2, dp.get_local_rank())


@case(1, 2, 4)
def sam_restores_shards_to_the_bit(_: Path) -> None:
    """Between the half-steps the whole model is rho away; then it is where it was, to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        model = _fsdp(_mesh(), _model().to(dtype))
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.7)
        closure = _closure(model, optimizer, _batch(0).to(dtype))
        before = [param.full_tensor().detach().clone() for param in model.parameters()]
        with _counted_sums() as calls:
            closure()
            optimizer.first_step()
        assert calls == [(1, True)], calls
        apart = [
            (param.full_tensor().detach().double() - old.double()).square().sum()
            for param, old in zip(model.parameters(), before, strict=True)
        ]
        distance = torch.stack(apart).sum().sqrt().item()
        assert abs(distance - 0.7) <= (1e-5 if dtype is torch.float32 else 0.03), distance
        closure()
        optimizer.second_step()
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param.full_tensor(), old)


@case(2)
def sam_with_few_gradients(_: Path) -> None:
    """Gradients in summands, and parameters without one, on processes that hold nothing of them."""
    from torch.distributed.tensor import Partial

    mesh = _mesh()
    whole = [nn.Parameter(param) for param in _whole(0)]
    sharded = [nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])) for param in _whole(0)]
    optimizers = [SAM(AdamCM(params, **OPTIONS), 0.5) for params in (whole, sharded)]
    # The third has one row: one of the processes has none of it.
    for participants in ([2], [0, 2, 4], []):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for i in participants:
            grad = _whole(1)[i]
            part = grad * (0.25 if dist.get_rank() == 0 else 0.75)
            whole[i].grad = grad
            sharded[i].grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
        for optimizer in optimizers:
            optimizer.first_step()
        for param, twin in zip(sharded, whole, strict=True):
            assert_close(param.detach(), twin.detach())
        for optimizer in optimizers:
            optimizer.second_step()
        for param, twin in zip(sharded, whole, strict=True):
            assert_close(param.detach(), twin.detach())


@case(2)
def sam_without_a_closure(_: Path) -> None:
    """A gradient that is not zero on one process alone is an error on every one, not a hang."""
    model = _fsdp(_mesh())
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local().fill_(1e-30)
    before = [param.to_local().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="needs a closure"):
        optimizer.step()
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.to_local(), old)


@case(1, 2, 4)
def sam_closures_on_shards(_: Path) -> None:
    """FSDP2 adds to gradients itself: zeroing in place is served, accumulation refused by all.

    So is NaN of the closure's own, for which the closure is called once more.
    """
    rank = dist.get_rank()
    part = _batch(0).chunk(dist.get_world_size())[rank]
    model = _fsdp(_mesh())
    optimizer = SAM(AdamCM(model.parameters(), **OPTIONS, skip_nonfinite=True), 0.3)
    factors: list[float] = []

    def closure(zeroes: bool = True) -> Any:
        if zeroes:
            optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            loss = factors[-1] * _loss(model, part)
            loss.backward()
        factors.append(factors[0])
        return loss

    def parts() -> list[Tensor]:
        return [param.to_local().clone() for param in model.parameters()]

    for factor in (1.0, 1.0, torch.nan, 1.0):
        before, factors = parts(), [factor if rank == 0 else 1.0]
        optimizer.step(closure)
        assert len(factors) == (4 if math.isnan(factor) else 3), (factor, factors)
        skipped = all(map(torch.equal, parts(), before))
        assert skipped == math.isnan(factor)
    before = parts()
    with pytest.raises(RuntimeError, match="closure must zero"):
        optimizer.step(lambda: closure(zeroes=False))
    assert all(map(torch.equal, parts(), before))
    optimizer.step(closure)
    expected = _model()
    twin = SAM(AdamCM(expected.parameters(), **OPTIONS), 0.3)
    for _step in range(4):
        for half in (twin.first_step, twin.second_step):
            (2 * _loss(expected, _batch(0))).backward()
            half(zero_grad=True)
    _compare(model, expected)


@case(2)
def sam_ddp(_: Path) -> None:
    """DDP may own the gradients: they are the same tensors once they are zeroed and made anew."""
    for as_view in (False, True):
        model = DistributedDataParallel(_model(), gradient_as_bucket_view=as_view)
        expected = _model()
        for each, *part in ((model, 2, dist.get_rank()), (expected, 1, 0)):
            optimizer = SAM(AdamCM(each.parameters(), **OPTIONS), 0.3)
            _train_sam(each, optimizer, range(STEPS), *part)
        _compare(model.module, expected)
        optimizer = SAM(AdamCM(model.parameters(), **OPTIONS), 0.3)
        before = [param.detach().clone() for param in model.parameters()]

        def accumulates(model: Any = model) -> Any:
            loss = _loss(model, _batch(0))
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match="closure must zero"):
            optimizer.step(accumulates)
        assert all(map(torch.equal, model.parameters(), before))


def _assert_equal(mine: Any, expected: Any) -> None:
    """Compare nested dicts, in which there are tensors, bit by bit."""
    if isinstance(expected, dict):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            _assert_equal(mine[key], value)
    elif isinstance(expected, list):
        for value, other in zip(mine, expected, strict=True):
            _assert_equal(value, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(_gathered(mine), _gathered(expected))
    else:
        assert mine == expected


@case(1, 2)
def sam_in_distributed_checkpoints(_: Path) -> None:
    """Torch's helpers take SAM for an optimizer, also before its first step, sharded and whole.

    They step it without a closure to make its state, which no test did.
    """
    world, rank = dist.get_world_size(), dist.get_rank()

    def make(wrap: Any = SAM) -> tuple[Any, Any]:
        model = _fsdp(_mesh())
        return model, wrap(torch.optim.AdamW(model.parameters(), lr=0.03, eps=1e-3))

    expected, optimizer = make()
    _train_sam(expected, optimizer, range(STEPS), world, rank)
    half, optimizer = make()
    _train_sam(half, optimizer, range(STEPS // 2), world, rank)
    forms: tuple[dict[str, Any], ...] = (
        {},
        {"full_state_dict": True},
        {"flatten_optimizer_state_dict": True},
    )
    for form in forms:
        options = StateDictOptions(**form)
        fresh = get_optimizer_state_dict(*make(), options=options)
        plain = get_optimizer_state_dict(*make(lambda base: base), options=options)
        _assert_equal(fresh, plain)
        saved = copy.deepcopy(get_optimizer_state_dict(half, optimizer, options=options))
        resumed = make()
        weights = StateDictOptions(full_state_dict=True)
        set_model_state_dict(
            resumed[0], get_model_state_dict(half, options=weights), options=weights
        )
        set_optimizer_state_dict(*resumed, saved, options=options)
        _train_sam(*resumed, range(STEPS // 2, STEPS), world, rank)
        for param, twin in zip(resumed[0].parameters(), expected.parameters(), strict=True):
            assert torch.equal(param.full_tensor(), twin.full_tensor()), form


# FSDP1, whose shards are plain tensors


def _fsdp1(module: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        # That it is deprecated, and that it shards nothing with one process or NO_SHARD.
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


FSDP1_OPTIMIZERS: tuple[Callable[[Any], Any], ...] = (
    AdamCM,
    lambda params: AdamWCM(params, priority_scope="tensor"),
    AdamCG,
    lambda params: Adam_CM(params, synced=False),
    lambda params: SAM(torch.optim.Adam(params)),
)


@case(2)
def fsdp1_is_refused(_: Path) -> None:
    """FSDP1's shards are refused in every scope: norms over them are those of one process.

    It trained, with keys that differed between processes; no older test had FSDP1.
    """
    for use_orig_params in (True, False):
        for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.NO_SHARD):
            model = _fsdp1(_model(), use_orig_params=use_orig_params, sharding_strategy=strategy)
            for make in FSDP1_OPTIMIZERS:
                with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*fully_shard"):
                    make(model.parameters())
            name = "0.weight" if use_orig_params else "_flat_param"
            with pytest.raises(ValueError, match=rf"{name} of group 0 .*\(FSDP1\)"):
                AdamCM(model.named_parameters())
            optimizer = AdamCM([nn.Parameter(torch.ones(2))])
            with pytest.raises(ValueError, match="parameter 0 of group 1"):
                optimizer.add_param_group({"params": list(model.parameters())})
            assert len(optimizer.param_groups) == 1


@case(2)
def fsdp1_around_a_model_in_training(_: Path) -> None:
    """A model that is wrapped after the optimizer was built is refused at the step, unchanged.

    Its parameters become shards in place, so that nothing was added that could be checked.
    """
    for steps_before in (0, 2):
        for backend in ("cpu", "eager"):
            model = _model()
            optimizer = AdamCM(model.parameters(), **OPTIONS, backend=backend)
            sam = SAM(torch.optim.Adam(model.parameters()))
            released = AdamCM(model.parameters(), priority_scope="tensor")
            _train(model, optimizer, range(steps_before))
            optimizer.zero_grad()
            wrapped = _fsdp1(model, use_orig_params=True)
            (wrapped(_batch(0)) - 1).pow(2).mean().backward()
            kept = [param.detach().clone() for param in model.parameters()]
            state = copy.deepcopy(optimizer.state_dict()["state"])
            for step in (optimizer.step, sam.first_step, optimizer.step):
                with pytest.raises(RuntimeError, match=r"parameter \d of group 0 .*\(FSDP1\)"):
                    step()
            for root in (model, wrapped):
                with pytest.raises(RuntimeError, match="FullyShardedDataParallel"):
                    enable_gradient_release(root, released)
            assert released._release is None
            assert all(map(torch.equal, kept, model.parameters()))
            after = optimizer.state_dict()["state"]
            assert after.keys() == state.keys()
            for i, values in state.items():
                assert all(torch.equal(after[i][key], value) for key, value in values.items())


@case(1)
def fsdp1_of_one_process(_: Path) -> None:
    """FSDP1 shards nothing among one process, and trains as the model alone does."""
    for scope in ("group", "tensor"):
        model = _fsdp1(_model(), use_orig_params=True)
        optimizer = AdamCM(model.parameters(), priority_scope=scope, **OPTIONS)
        _train(model, optimizer, range(STEPS))
        _compare(model, _expected(AdamCM, STEPS, priority_scope=scope)[0])


# Other wrappers of torch's


@case(1)
def optimizers_in_backward(_: Path) -> None:
    """`_apply_optimizer_in_backward` makes an optimizer a parameter: scope "tensor" is right.

    Scope "group" silently was scope "tensor", and `max_grad_norm` bounded each parameter's norm.
    """
    from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

    model, twin = _model(), _model()
    options = {**OPTIONS, "priority_scope": "tensor"}
    _apply_optimizer_in_backward(AdamCM, model.parameters(), options)
    optimizer = AdamCM(twin.parameters(), **options)
    for t in range(STEPS):
        (model(_batch(t)) - 1).pow(2).mean().backward()
    _train(twin, optimizer, range(STEPS))
    _compare(model, twin)
    for options, name in (
        ({}, "priority_scope"),
        ({"priority_scope": "tensor", "max_grad_norm": 1.0}, "max_grad_norm"),
        ({"priority_scope": "tensor", "skip_nonfinite": True}, "skip_nonfinite"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .* _apply_optimizer_in_backward"):
            _apply_optimizer_in_backward(AdamCM, _model().parameters(), options)


@case(1)
def optimizers_of_shares(_: Path) -> None:
    """What gives an optimizer one worker's parameters, or local shards, is told from others."""
    from torch.distributed._shard.sharded_optim.api import ShardedOptimizer
    from torch.distributed.optim import optimizer

    local_optimizer: Any = optimizer._LocalOptimizer

    class Reference:
        def local_value(self) -> Tensor:
            return nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match="priority_scope must be 'tensor' under Distributed"):
        local_optimizer(AdamCM, [Reference()])
    local_optimizer(AdamCM, [Reference()], priority_scope="tensor")
    for scope in ("group", "tensor"):
        with pytest.raises(ValueError, match="local shards of ShardedOptimizer"):
            ShardedOptimizer(dict(_model().named_parameters()), AdamCM, priority_scope=scope)


@case(2)
def local_sgd(_: Path) -> None:
    """PostLocalSGDOptimizer: each process trains a model of its own between averages."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    models = [_model() for _ in range(3)]
    optimizers: list[Any] = [AdamCM(model.parameters(), **OPTIONS) for model in models]
    world, rank = dist.get_world_size(), dist.get_rank()
    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    _train(models[2], PostLocalSGDOptimizer(optimizers[2], averager), range(5), world, rank)
    # The same in one process.
    for t in range(5):
        for i in range(world):
            _train(models[i], optimizers[i], range(t, t + 1), world, i)
        if t % 2 == 0:
            for pair in zip(*(model.parameters() for model in models[:2]), strict=True):
                mean = (pair[0] + pair[1]).detach() / 2
                for param in pair:
                    param.data.copy_(mean)
    _compare(models[2], models[rank])


@case(2)
def uneven_inputs(_: Path) -> None:
    """`Join` lets processes have fewer batches; DDP then gives all the parameters of the last."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for zero in (False, True):
        model = DistributedDataParallel(_model())
        params: Any = list(model.parameters())
        optimizer: Any = AdamCM(params, **OPTIONS, priority_scope="tensor")
        joined: list[Any] = [model]
        if zero:
            optimizer = ZeroRedundancyOptimizer(params, AdamCM, **OPTIONS, priority_scope="tensor")
            joined.append(optimizer)
        with Join(joined):
            _train(model, optimizer, range(3 + 2 * dist.get_rank()), 2, dist.get_rank())
        for param in model.parameters():
            parts = [torch.empty_like(param) for _ in range(2)]
            dist.all_gather(parts, param.detach())
            assert torch.equal(*parts)


# Checkpoints

HALF = STEPS // 2


# What checkpoints are saved and resumed with; "plain" has no scales.
SAVED: dict[str, dict[str, Any]] = {"plain": {}, **SCALED}


def _wide_model() -> Any:
    """Return a model whose weights have several blocks of 256, which shards cut in two."""
    generator = torch.Generator().manual_seed(4)
    model = nn.Sequential(nn.Linear(6, 130), nn.Tanh(), nn.Linear(130, 11))
    for param in model.parameters():
        nn.init.normal_(param, std=0.3, generator=generator)
    return model


def _scaled(name: str, *, sharded: bool = True) -> tuple[Any, Any]:
    model = _fsdp(_mesh(), _wide_model()) if sharded else _wide_model()
    return model, AdamCM(model.parameters(), **{**OPTIONS, **SAVED[name]})


def _both(model: Any, optimizer: Any, **options: Any) -> dict[str, Any]:
    """Return the state dicts of both, by names."""
    chosen = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=chosen),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=chosen),
    }


def _set_both(model: Any, optimizer: Any, state: dict[str, Any], **options: Any) -> None:
    """Load the state dicts of both, which is no conversion that is warned of."""
    chosen = StateDictOptions(**options)
    set_model_state_dict(model, state["model"], options=chosen)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the state of group")
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=chosen)


@case(4)
def save(folder: Path) -> None:
    """Half of a training, saved sharded and whole, which changes nothing, and how it went on."""
    for name in SAVED:
        model, optimizer = _scaled(name)
        _train(model, optimizer, range(HALF), 4, dist.get_rank())
        save_checkpoint(_both(model, optimizer), checkpoint_id=folder / name)
        half = copy.deepcopy(_both(model, optimizer, full_state_dict=True))
        _train(model, optimizer, range(HALF, STEPS), 4, dist.get_rank())
        end = _both(model, optimizer, full_state_dict=True)
        if dist.get_rank() == 0:
            torch.save({"half": half, "end": end}, folder / f"{name}.pt")
        if name == "plain":
            twin, expected = _scaled(name, sharded=False)
            _train(twin, expected, range(STEPS))
            _compare(model, twin)


# Half of the distance from a dtype's largest code to the next, in parts of it, and its rounding.
HALF_CODE = {
    "torch.int4": 0.5 / 7 + 1e-6,
    "torch.int8": 0.5 / 127 + 1e-6,
    "torch.float8_e4m3fn": 16 / 448 + 1e-6,
}
# As much of an int8 moment, whose mantissa has 3 bits.
HALF_MOMENT_CODE = {"torch.int8": 1 / 16}


def _tensors(state: dict[str, Any]) -> dict[tuple[str, str], Tensor]:
    """Return parameters and an optimizer's state, except what follows from it."""
    params = {(name, "param"): value for name, value in state["model"].items()}
    keys = ("exp_avg", "exp_avg_sq", "critical_buffer", "priorities", "step")
    states = state["optimizer"]["state"]
    return params | {(name, key): values[key] for name, values in states.items() for key in keys}


def _check_rounded_once(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    """Check that blocks of another mesh hold what was saved, each rounded to the nearest code."""
    (group,) = saved["optimizer"]["param_groups"]
    of_moment = HALF_MOMENT_CODE.get(group["moment_dtype"], 0)
    bounds = dict.fromkeys(("exp_avg", "exp_avg_sq"), of_moment)
    bounds["critical_buffer"] = HALF_CODE.get(group["buffer_dtype"], 0)
    for (name, key), value in _tensors(saved).items():
        actual, bound = _tensors(loaded)[name, key], bounds.get(key, 0)
        if bound == 0:
            assert torch.equal(actual, value), (name, key)
        else:
            assert (actual - value).abs().max() <= bound * value.abs().max(), (name, key)


def _check_goes_on(
    model: Any,
    optimizer: Any,
    kept: dict[str, Any],
    world: int,
    dtype: torch.dtype = torch.float32,
    *,
    close: bool = False,
) -> None:
    """Check that the rest of a training gets where it got without an interruption.

    To the rounding of reductions if `close`, else as near as other blocks' scales allow: of int4 to
    its rounding.
    """
    has_int4 = optimizer.param_groups[0]["buffer_dtype"] is INT4
    bound = HALF_CODE["torch.int4"] if has_int4 else 0.02
    _train(model, optimizer, range(HALF, STEPS), world, dist.get_rank(), dtype)
    end = _tensors(_both(model, optimizer, full_state_dict=True))
    for (name, key), value in _tensors(kept["end"]).items():
        if close:
            assert_close(end[name, key], value, f"{key} of {name}")
        elif key == "param":
            moved = (value - kept["half"]["model"][name]).norm()
            assert (end[name, key] - value).norm() <= bound * moved, name


@case(4, 2, 1)
def resume(folder: Path) -> None:
    """A sharded checkpoint goes on on any number of processes, on as many with the same bits."""
    world = dist.get_world_size()
    for name in SAVED:
        kept = torch.load(folder / f"{name}.pt", weights_only=True)
        model, optimizer = _scaled(name)
        state = _both(model, optimizer)
        load_checkpoint(state, checkpoint_id=folder / name)
        _set_both(model, optimizer, state)
        loaded = copy.deepcopy(_both(model, optimizer, full_state_dict=True))
        if world != 4:
            _check_rounded_once(loaded, kept["half"])
            _check_goes_on(model, optimizer, kept, world, close=name == "plain")
            continue
        _train(model, optimizer, range(HALF, STEPS), world, dist.get_rank())
        end = _both(model, optimizer, full_state_dict=True)
        for mine, saved in ((loaded, kept["half"]), (end, kept["end"])):
            for which, value in _tensors(saved).items():
                assert torch.equal(_tensors(mine)[which], value), (name, which)


@case(2, 1)
def resume_whole(folder: Path) -> None:
    """A whole state dict, with values in place of codes, goes on, sharded and not."""
    world = dist.get_world_size()
    for name in SAVED:
        kept = torch.load(folder / f"{name}.pt", weights_only=True)
        model, optimizer = _scaled(name, sharded=world > 1)
        _set_both(model, optimizer, copy.deepcopy(kept["half"]), full_state_dict=True)
        if world > 1:
            _check_rounded_once(_both(model, optimizer, full_state_dict=True), kept["half"])
        _check_goes_on(model, optimizer, kept, world, close=name == "plain")


@case(1)
def codes_are_not_taken_for_values(folder: Path) -> None:
    """A sharded checkpoint of plain tensors has codes: DCP, which casts, must not load them."""
    model, optimizer = _scaled("slots", sharded=False)
    _train(model, optimizer, range(2))
    for pair in ((model, optimizer), _scaled("slots")):
        save_checkpoint(_both(*pair), checkpoint_id=folder / "codes")
        for sharded in (True, False):
            if sharded == isinstance(next(pair[0].parameters()), DTensor):
                continue
            state = _both(*_scaled("slots", sharded=sharded))
            with pytest.raises(CheckpointException, match="Size mismatch"):
                load_checkpoint(state, checkpoint_id=folder / "codes")


@case(2)
def masters(_: Path) -> None:
    """Masters of DTensors have the bits of one process, and are set from full tensors or shards."""
    options: dict[str, Any] = {"low_precision_update": "split", "dtype": torch.bfloat16}
    twins = Twins(AdamWCM, _mesh(), [Shard(0)], **options).train(_to_exact_norms)
    twins.check_bits()
    for param, twin in zip(twins.sharded, twins.whole, strict=True):
        master, expected = (
            get_master_param(optimizer, each)
            for optimizer, each in ((twins.optimizer, param), (twins.expected, twin))
        )
        assert isinstance(master, DTensor)
        assert torch.equal(_gathered(master), expected)
        for given in (expected + 1e-3, twins.shard(expected + 2e-3)):
            set_master_param(twins.optimizer, param, given)
            master = get_master_param(twins.optimizer, param)
            assert torch.equal(_gathered(master), _gathered(given))
            assert torch.equal(_gathered(param.detach()), split_master(_gathered(given))[0])


# Flattened state dicts: options, and the dtype of the parameters.
FLATTENED: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "float32": ({}, torch.float32),
    "amsgrad": ({"amsgrad": True, "skip_nonfinite": True, "max_grad_norm": 1.0}, torch.float32),
    "bfloat16 slots": ({"buffer_dtype": torch.bfloat16}, torch.float32),
    "kahan": ({"low_precision_update": "kahan"}, torch.bfloat16),
    "split": ({"low_precision_update": "split"}, torch.bfloat16),
    "stochastic": ({"low_precision_update": "stochastic", "seed": 5}, torch.bfloat16),
    **{name: (options, torch.float32) for name, options in SCALED.items()},
}


def _flattenable(name: str, mesh: DeviceMesh, form: str = "fsdp") -> tuple[Any, Any]:
    options, dtype = FLATTENED[name]
    model = _wide_model().to(dtype)
    if form == "fsdp":
        model = _fsdp(mesh, model)
    elif form == "ddp":
        model = DistributedDataParallel(model)
    return model, AdamCM(model.parameters(), **{**OPTIONS, **options})


def _save_flattened(model: Any, optimizer: Any, path: Path, **how: Any) -> None:
    state = _both(model, optimizer, flatten_optimizer_state_dict=True)
    save_checkpoint(state, checkpoint_id=path, **how)


def _load_flattened(model: Any, optimizer: Any, path: Path) -> None:
    state = _both(model, optimizer, flatten_optimizer_state_dict=True)
    load_checkpoint(state, checkpoint_id=path)
    _set_both(model, optimizer, state, flatten_optimizer_state_dict=True)


@case(2, 1)
def flattened(folder: Path) -> None:
    """A flattened checkpoint goes on with the same bits, sharded and not, in every precision.

    Older tests saved by groups alone: torch reads flattened state dicts by the loader's own keys.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    for name, form in itertools.product(FLATTENED, ("fsdp", "ddp") if world > 1 else ("plain",)):
        dtype, path = FLATTENED[name][1], folder / f"flattened {name} {form}"
        model, optimizer = _flattenable(name, _mesh(), form)
        _train(model, optimizer, range(HALF), world, rank, dtype)
        _save_flattened(model, optimizer, path)
        half = copy.deepcopy(_both(model, optimizer, full_state_dict=True))
        _train(model, optimizer, range(HALF, STEPS), world, rank, dtype)
        end = _both(model, optimizer, full_state_dict=True)
        if rank == 0:
            torch.save({"half": half, "end": end}, path.with_suffix(".pt"))
        other, resumed = _flattenable(name, _mesh(), form)
        _train(other, resumed, range(1), world, rank, dtype)
        _load_flattened(other, resumed, path)
        _train(other, resumed, range(HALF, STEPS), world, rank, dtype)
        mine = _tensors(_both(other, resumed, full_state_dict=True))
        for which, value in _tensors(end).items():
            assert torch.equal(mine[which], value), (name, which)


@case(1)
def flattened_on_fewer(folder: Path) -> None:
    """What two processes saved flattened goes on on one."""
    for name in FLATTENED:
        path = folder / f"flattened {name} fsdp"
        kept = torch.load(path.with_suffix(".pt"), weights_only=True)
        model, optimizer = _flattenable(name, _mesh())
        _load_flattened(model, optimizer, path)
        _check_rounded_once(_both(model, optimizer, full_state_dict=True), kept["half"])
        _check_goes_on(model, optimizer, kept, 1, FLATTENED[name][1])


@case(4)
def flattened_on_more(folder: Path) -> None:
    """What two processes saved flattened goes on on four."""
    half = DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",))
    for name, (_, dtype) in FLATTENED.items():
        path, rank = folder / f"flattened {name} of two", dist.get_rank()
        if rank < 2:
            model, optimizer = _flattenable(name, half)
            _train(model, optimizer, range(HALF), 2, rank, dtype)
            kept = copy.deepcopy(_both(model, optimizer, full_state_dict=True))
            _save_flattened(model, optimizer, path, process_group=half.get_group())
            _train(model, optimizer, range(HALF, STEPS), 2, rank, dtype)
            end = _both(model, optimizer, full_state_dict=True)
            if rank == 0:
                torch.save({"half": kept, "end": end}, path.with_suffix(".pt"))
        dist.barrier()
        saved = torch.load(path.with_suffix(".pt"), weights_only=True)
        model, optimizer = _flattenable(name, _mesh())
        _load_flattened(model, optimizer, path)
        _check_rounded_once(_both(model, optimizer, full_state_dict=True), saved["half"])
        _check_goes_on(model, optimizer, saved, 4, dtype)


def _full_tensors_are_contiguous(mesh: DeviceMesh) -> bool:
    """Return whether this torch gathers a tensor that is cut along its second dimension whole."""
    cut = distribute_tensor(torch.zeros(3, mesh.size() + 1), mesh, [Shard(1)])
    return bool(cut.full_tensor().is_contiguous())


@case(2)
def every_way_to_set_a_state_dict(_: Path) -> None:
    """Whole, broadcast and offloaded state dicts go on with the same bits, by groups."""
    ways: list[dict[str, bool]] = [{"cpu_offload": True}, {"full_state_dict": True}]
    # What torch 2.11 gathers of slots that are cut unevenly has gaps, and it broadcasts the gaps.
    if _full_tensors_are_contiguous(_mesh()):
        broadcast = {"full_state_dict": True, "broadcast_from_rank0": True}
        ways += [broadcast, {**broadcast, "cpu_offload": True}]
    rank = dist.get_rank()
    for name, way in itertools.product(FLATTENED, ways):
        dtype = FLATTENED[name][1]
        model, optimizer = _flattenable(name, _mesh())
        _train(model, optimizer, range(HALF), 2, rank, dtype)
        how = {key: value for key, value in way.items() if key != "broadcast_from_rank0"}
        state: Any = copy.deepcopy(_both(model, optimizer, **how))
        if way.get("broadcast_from_rank0") and rank > 0:
            state = {"model": {}, "optimizer": {}}
        _train(model, optimizer, range(HALF, STEPS), 2, rank, dtype)
        other, resumed = _flattenable(name, _mesh())
        _set_both(other, resumed, state, **way)
        _train(other, resumed, range(HALF, STEPS), 2, rank, dtype)
        for param, twin in zip(other.parameters(), model.parameters(), strict=True):
            assert torch.equal(param.full_tensor(), twin.full_tensor()), (name, way)


@case(2)
def load_whole_without_help(_: Path) -> None:
    """load_state_dict itself takes whole tensors, or codes and scales, for DTensors and back."""
    for name in ("plain", "all"):
        twins, fresh = (
            Twins(AdamCM, _mesh(), [Shard(0)], CUT_ANYWHERE, **SAVED[name]) for _ in range(2)
        )
        for t in range(3):
            twins.step(t)
        fresh.optimizer.load_state_dict(twins.expected.state_dict())
        fresh.expected.load_state_dict(twins.optimizer.state_dict())
        if name == "plain":
            fresh.check_state()
        for new, old, params, others in (
            (fresh.optimizer, twins.expected, fresh.sharded, twins.whole),
            (fresh.expected, twins.optimizer, fresh.whole, twins.sharded),
        ):
            for param, other in zip(params, others, strict=True):
                _check_loaded(new.state[param], old.state[other], scaled=name != "plain")
        fresh.step(3)


def _check_loaded(state: dict[str, Tensor], source: dict[str, Tensor], *, scaled: bool) -> None:
    for key in ("exp_avg", "exp_avg_sq", "critical_buffer"):
        mine, saved = (_gathered(dequantized(unscaled(each), key)) for each in (state, source))
        half_codes = HALF_MOMENT_CODE if "exp_avg" in key else HALF_CODE
        bound = half_codes["torch.int8"] * scaled
        assert (mine - saved).abs().max() <= bound * saved.abs().max(), key


# Gradient release


def _release_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def _released_in_ddp(
    when: str, wrap: Callable[[nn.Module], nn.Module]
) -> tuple[Callable[[], nn.Module], nn.Module, AdamCM]:
    """Return what enables gradient release and returns what is called, the model, the optimizer."""
    model = _release_model()
    optimizer = AdamCM(model.parameters(), lr=0.03, priority_scope="tensor")

    def called() -> nn.Module:
        wrapped: nn.Module = model
        if when in ("the wrapper", "before"):
            wrapped = wrap(model)
        elif when == "a submodule":
            model[2] = wrap(model[2])
        enable_gradient_release(wrapped if when == "the wrapper" else model, optimizer)
        if when == "after":
            wrapped = wrap(model)
        elif when == "a submodule after":
            model[2] = wrap(model[2])
        elif when == "a larger one after":
            wrapped = wrap(nn.Sequential(model, nn.Linear(1, 1)))
        return wrapped

    return called, model, optimizer


@case(2, 1)
def gradient_release_refuses_ddp(_: Path) -> None:
    """Each rank stepped with its own gradients: the older tests ran it on one process alone.

    The user enables it for the wrapper, for what it wraps, or wraps later, compiled or not.
    """
    times = ("the wrapper", "before", "a submodule", "after", "a submodule after")
    wraps: dict[str, Callable[[Any], Any]] = {
        "ddp": DistributedDataParallel,
        "of compiled": lambda m: DistributedDataParallel(torch.compile(m, backend="aot_eager")),
        "compiled": lambda m: torch.compile(DistributedDataParallel(m), backend="aot_eager"),
    }
    cases = [(when, "ddp") for when in (*times, "a larger one after")]
    cases += [("before", name) for name in wraps] + [("after", name) for name in wraps]
    for when, name in cases:
        torch._dynamo.reset()
        enable, model, optimizer = _released_in_ddp(when, wraps[name])
        before = [param.detach().clone() for param in model.parameters()]
        with pytest.raises(RuntimeError, match="_apply_optimizer_in_backward"):
            enable()(torch.ones(3, 4)).sum().backward()
        assert not optimizer.state, (when, name)
        assert all(map(torch.equal, model.parameters(), before)), (when, name)
    torch._dynamo.reset()


@case(2)
def gradient_release_beside_ddp(_: Path) -> None:
    """A model that DDP only calls, whose parameters it does not reduce, is served."""
    own, reduced = _release_model(), nn.Linear(4, 4)
    optimizer = AdamCM(own.parameters(), priority_scope="tensor")
    enable_gradient_release(own, optimizer)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduced = reduced

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = own(self.reduced(x))
            return out

    DistributedDataParallel(Calls())(torch.ones(3, 4)).sum().backward()
    assert len(optimizer.state) == 4
    assert reduced.weight.grad is not None


@case(2)
def torchs_optimizer_in_backward_under_ddp(_: Path) -> None:
    """The way of torch itself steps with the averaged gradients: the bits of steps after backward.

    It steps in a stream of the accelerator, which has nothing to do where the model is on the CPU.
    """
    from torch.distributed.optim.apply_optimizer_in_backward import (
        _apply_optimizer_in_backward,
    )

    options = {"lr": 0.03, "priority_scope": "tensor"}
    trained = []
    for in_backward in (True, False):
        model = _release_model()
        optimizer: AdamCM | None = None
        if in_backward:
            _apply_optimizer_in_backward(AdamCM, model.parameters(), options)
        else:
            optimizer = AdamCM(model.parameters(), **options)  # type: ignore[arg-type]
        ddp = DistributedDataParallel(model)
        streams = mock.patch("torch.accelerator.current_stream"), mock.patch("torch.Stream")
        with streams[0], streams[1] as stream:
            stream.return_value = contextlib.nullcontext()
            for t in range(6):
                torch.manual_seed(10 * t + dist.get_rank())
                ddp(torch.randn(8, 4)).square().mean().backward()
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
        trained.append([param.detach().clone() for param in model.parameters()])
    for mine, expected in zip(*trained, strict=True):
        assert torch.equal(mine, expected)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
        assert torch.equal(*ranks)


# Running them

# Four processes save what these load.
_LOADS = ("resume", "resume_whole", "flattened_on_fewer", "flattened_on_more")


def is_slow(name: str, world: int) -> bool:
    """Return whether a case is left out of the quick tests: it needs four processes."""
    return world == 4 or name in _LOADS


def _run(rank: int, world: int, names: list[str], store: str, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    results = {}
    for name, this in CASES.items():
        if world not in this.worlds or name not in names:
            continue
        try:
            torch.manual_seed(0)
            this.function(folder)
            failure = ""
        except (Exception, pytest.fail.Exception):
            failure = traceback.format_exc()
        failures: list[str] = [""] * world
        dist.all_gather_object(failures, failure)
        results[name] = "\n".join(filter(None, failures))
    if rank == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


def main(folder: Path, all_worlds: bool) -> None:
    """Run the cases of all numbers of processes; four processes save what fewer load.

    They are forks: this process, which has run nothing in threads, has imported everything.
    """
    for world in WORLDS:
        names = [name for name in CASES if all_worlds or not is_slow(name, world)]
        store = str(folder / f"store{world}")
        arguments = (world, names, store, folder, folder / f"{world}.json")
        start_processes(_run, arguments, nprocs=world, start_method="fork")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(Path(sys.argv[1]), all_worlds=sys.argv[2] == "all")
