"""State of low precision, with given gradients: random bits, and blocks with scales."""

import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cm_fused import AdamCG, AdamCM
from cm_fused._distributed import local
from cm_fused.rounding import INT4
from tests.support.sharded.common import (
    CUT_ANYWHERE,
    OPTIONS,
    SCALED,
    SHAPES,
    STEPS,
    Twins,
    case,
    fsdp,
    make_mesh,
    make_model,
    parallelized,
    readings,
    square,
    to_exact_norms,
    whole_tensors,
)

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


def _has_the_bits_of_one_process(
    mesh: DeviceMesh, placements: list[Any], shapes: tuple[tuple[int, ...], ...]
) -> None:
    for options in ROUNDED:
        for cls, scope in ((AdamCM, "group"), (AdamCG, "tensor")):
            twins = Twins(cls, mesh, placements, shapes, **options, priority_scope=scope)
            twins.train(to_exact_norms).check_bits()


@case(1, 2, 4)
def random_words_of_rows(_: Path) -> None:
    """Stochastic rounding has the bits of one process: an element's words are its place's."""
    _has_the_bits_of_one_process(make_mesh(), [Shard(0)], (*SHAPES, *CUT_ANYWHERE))


@case(2, 4)
def random_words_of_columns(_: Path) -> None:
    """So it has where every process holds a piece of every row, and on meshes of two dimensions."""
    _has_the_bits_of_one_process(make_mesh(), [Shard(1)], CUT_ANYWHERE)
    if dist.get_world_size() == 4:
        pairs = [(Shard(0), Shard(0)), (Shard(0), Shard(1)), (Shard(1), Shard(0))]
        for placements in (*pairs, (Replicate(), Shard(0))):
            _has_the_bits_of_one_process(square("dp", "tp"), [*placements], CUT_ANYWHERE)


@case(4)
def random_words_under_fsdp_and_tensor_parallelism(_: Path) -> None:
    """A layer that both cut along one dimension is placed in an order of its own."""
    mesh = square("dp", "tp")
    model = fsdp(mesh["dp"], parallelized(mesh["tp"]))
    strided = [p for p in model.parameters() if type(p.placements[0]).__name__ == "_StridedShard"]
    assert strided
    options = {**OPTIONS, "moment_dtype": torch.bfloat16}
    optimizer = AdamCM(model.parameters(), **options)
    twin = make_model()
    expected = AdamCM(twin.parameters(), **options)
    for t in range(STEPS):
        for i, (param, other) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
            grads = [torch.randn(other.shape, generator=torch.Generator().manual_seed(9 * t + i))]
            to_exact_norms(grads)
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
        twins = Twins(AdamCM, make_mesh(), placements, CUT_ANYWHERE, **options)
        twins.step(0, to_exact_norms)
        twins.check_bits()


@case(2, 4)
def scaled_state_is_that_of_what_is_held(_: Path) -> None:
    """Each process quantizes blocks of its own, as if what it holds were all there is."""
    for backend, buffer_dtype in itertools.product(("cpu", "eager"), (torch.int8, INT4)):
        options = {**OPTIONS, "buffer_dtype": buffer_dtype, "backend": backend}
        whole = whole_tensors(0, CUT_ANYWHERE)
        mesh = make_mesh()
        sharded = [nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])) for param in whole]
        alone = [nn.Parameter(param.to_local().clone()) for param in sharded]  # type: ignore[attr-defined]
        optimizer = AdamCM(sharded, priority_scope="tensor", **options)
        expected = AdamCM(alone, priority_scope="tensor", **options)
        for t in range(STEPS):
            # The norms of all parts are in the order of the steps' factors.
            grads = [(1 + t * 3 % 8) * grad for grad in whole_tensors(1, CUT_ANYWHERE)]
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
    twins = Twins(AdamCM, make_mesh(), [Shard(0)], CUT_ANYWHERE, **SCALED["all"])
    for value, expected in readings(twins):
        assert abs(value - expected) <= 0.05 * abs(expected)


@case(2)
def resized_scaled_shards(_: Path) -> None:
    """Slots with the highest keys stay, with their scales."""
    twins = Twins(AdamCM, make_mesh(), [Shard(0)], CUT_ANYWHERE, **SCALED["slots"]).train()
    before = twins.optimizer.state_dict()["state"]
    twins.optimizer.resize_buffer(2)
    after = twins.optimizer.state_dict()["state"]
    for i in before:
        kept = before[i]["priorities"].topk(2).indices.sort().values
        slots = before[i]["critical_buffer"].full_tensor()[kept]
        assert torch.equal(after[i]["critical_buffer"].full_tensor(), slots)
    twins.step(STEPS)
