"""What cases share: parameters and models with their gradients, and how they are compared."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from cm_fused import diagnostics
from cm_fused.rounding import INT4


class Case:
    """What every process runs, and the numbers of processes it is run on."""

    def __init__(self, function: Callable[[Path], None], worlds: tuple[int, ...]) -> None:
        self.function = function
        self.worlds = worlds


def case(*worlds: int) -> Callable[[Callable[[Path], None]], Case]:
    """Make a function a case for these numbers of processes."""
    return lambda function: Case(function, worlds)


# Rounding of a reduction may differ by a few last bits, which small roots enlarge.
OPTIONS: dict[str, Any] = {"lr": 0.03, "eps": 1e-3, "capacity": 3}
# More elements than processes, fewer, or as many; a scalar is never cut.
SHAPES = ((7, 3), (3, 2), (1,), (8,), (5, 1, 2))
# Rows that are no multiple of the four elements of a counter, of more than a block of elements.
CUT_ANYWHERE = ((7, 3), (30, 41), (5, 1, 2), (6, 9, 4))
STEPS = 8
# State with scales.
SCALED: dict[str, Any] = {
    "slots": {"buffer_dtype": torch.int8},
    "float8": {"buffer_dtype": torch.float8_e4m3fn, "moment_dtype": torch.bfloat16},
    "int4": {"buffer_dtype": INT4, "moment_dtype": torch.bfloat16},
    # With a running sum.
    "all": {"buffer_dtype": torch.int8, "moment_dtype": torch.int8, "capacity": 12},
}


def assert_close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Compare, to the rounding of a reduction, what may be sharded."""
    torch.testing.assert_close(
        gathered(actual), expected, rtol=3e-5, atol=1e-6, msg=lambda m: f"{what}: {m}"
    )


def assert_same_on_both(tensor: Tensor) -> None:
    """Check that two processes have the same bits."""
    parts = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor.detach())
    assert torch.equal(*parts)


def assert_equal(mine: Any, expected: Any) -> None:
    """Compare nested dicts, in which there are tensors, bit by bit."""
    if isinstance(expected, dict):
        assert mine.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(mine[key], value)
    elif isinstance(expected, list):
        for value, other in zip(mine, expected, strict=True):
            assert_equal(value, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(gathered(mine), gathered(expected))
    else:
        assert mine == expected


def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def make_mesh() -> DeviceMesh:
    """Return the mesh of all processes."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))


def square(*names: str) -> DeviceMesh:
    """Return the mesh of two dimensions of four processes."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=names)


@contextlib.contextmanager
def counted_sums() -> Iterator[list[Any]]:
    """Record the sums over processes that are started."""
    calls: list[Any] = []
    original = dist.all_gather

    def all_gather(every: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((tensor.numel(), kwargs.get("async_op", False)))
        return original(every, tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_gather", all_gather):
        yield calls


def whole_tensors(
    seed: int, shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return parameters, or their gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def summand(grad: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return a gradient of which each of two processes holds a summand."""
    part = grad * (0.25 if dist.get_rank() == 0 else 0.75)
    return DTensor.from_local(part, mesh, [Partial()], run_check=False)


def to_exact_norms(grads: list[Tensor]) -> None:
    """Round gradients so that the sums of their squares are exact, in any order."""
    for grad in grads:
        grad.copy_((grad * 4).round() / 4)


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
        self.whole = [nn.Parameter(param) for param in whole_tensors(0, *self.kind)]
        self.sharded = [nn.Parameter(self.shard(param)) for param in whole_tensors(0, *self.kind)]
        self.optimizer = cls(self.sharded, **{**OPTIONS, **options})
        self.expected = cls(self.whole, **{**OPTIONS, **options})

    def shard(self, tensor: Tensor) -> Tensor:
        """Return a tensor as the parameters are placed."""
        return distribute_tensor(tensor, self.mesh, self.placements)

    def gradients(self, t: int) -> list[Tensor]:
        """Return the whole gradients of a step."""
        return [(1 + t % 3) * grad for grad in whole_tensors(t + 1, *self.kind)]

    def step(self, t: int, change: Callable[[list[Tensor]], None] | None = None) -> None:
        """Step both."""
        grads = self.gradients(t)
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
            assert torch.equal(gathered(param.detach()), twin), f"param {i}"
            for key in ("exp_avg", "exp_avg_sq", "critical_buffer"):
                assert torch.equal(gathered(states[i][key]), others[i][key]), f"{key} of {i}"


def readings(twins: Twins) -> Iterator[tuple[float, float]]:
    """Train, and yield what diagnostics read of the sharded buffers beside the whole ones'."""
    twins.train()
    read = [diagnostics.read(o).values() for o in (twins.optimizer, twins.expected)]
    for mine, theirs in zip(*read, strict=True):
        for field in ("filled", "momentum_norm", "mean_norm", "variance"):
            yield getattr(mine, field), getattr(theirs, field)


def draw(model: nn.Sequential, std: float, seed: int) -> nn.Sequential:
    """Draw a model's parameters anew; return it."""
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        nn.init.normal_(param, std=std, generator=generator)
    return model


def make_model() -> nn.Sequential:
    """Return a model of two linear layers, the first and the third."""
    layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4)
    return draw(nn.Sequential(*layers), 0.5, 3)


def batch(t: int) -> Tensor:
    """Return the inputs of a step of all processes."""
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 + t)) * (1 + t % 3)


def loss_of(model: Any, part: Tensor) -> Any:
    """Return the loss of a model for its part of a batch."""
    return (model(part) - 1).pow(2).mean()


def train(
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
        loss_of(model, batch(t).chunk(share)[index].to(dtype)).backward()
        optimizer.step()


def trained_alone(cls: type[Any], **options: Any) -> nn.Module:
    """Return the model as one process trains it."""
    model = make_model()
    train(model, cls(model.parameters(), **{**OPTIONS, **options}), range(STEPS))
    return model


def compare(model: nn.Module, expected: nn.Module) -> None:
    """Compare the parameters of two models."""
    for (name, param), twin in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert_close(param.detach(), twin.detach(), name)


def fsdp(mesh: DeviceMesh, module: Any = None, **options: Any) -> Any:
    """Return a model that FSDP2 shards, and each of its linear layers."""
    model: Any = make_model() if module is None else module
    for each in (model[0], model[2], model):
        fully_shard(each, mesh=mesh, **options)
    return model


def parallelized(mesh: DeviceMesh) -> Any:
    """Return a model whose linear layers are cut, by columns and by rows."""
    return parallelize_module(make_model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
