"""SAM, whose norm is one over all processes."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cm_fused import SAM, AdamCM
from tests.support.sharded.common import (
    OPTIONS,
    STEPS,
    assert_close,
    assert_equal,
    batch,
    case,
    compare,
    counted_sums,
    fsdp,
    loss_of,
    make_mesh,
    make_model,
    parallelized,
    square,
    summand,
    whole_tensors,
)

# The bases in which a gradient's size matters and does not, and ours.
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.03, eps=1e-3),
    "adamcm": lambda params: AdamCM(params, **OPTIONS),
}


def _closure(model: Any, optimizer: Any, part: Tensor) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, part)
        loss.backward()
        return loss

    return closure


def _train_sam(model: Any, optimizer: Any, steps: range, share: int = 1, index: int = 0) -> None:
    """As `train`, with a closure."""
    for t in steps:
        optimizer.step(_closure(model, optimizer, batch(t).chunk(share)[index]))


def _trains_with_sam(make: Callable[[], Any], share: int = 1, index: int = 0) -> None:
    """Check that a sharded model trains with SAM as a whole one does."""
    for base in BASES.values():
        for adaptive in (False, True):
            model, expected = make(), make_model()
            for each, *part in ((model, share, index), (expected, 1, 0)):
                optimizer = SAM(base(each.parameters()), 0.3, adaptive)
                _train_sam(each, optimizer, range(STEPS), *part)
            compare(model, expected)


@case(1, 2, 4)
def sam_fsdp2(_: Path) -> None:
    """Whoever shards a model trains it with SAM as one process does: one norm over the mesh.

    SAM was tested with plain tensors alone, and its multi-tensor operators have no DTensor form.
    """
    _trains_with_sam(lambda: fsdp(make_mesh()), dist.get_world_size(), dist.get_rank())


@case(1, 2, 4)
def sam_with_ignored_parameters(_: Path) -> None:
    """Parameters that FSDP2 ignores are plain tensors beside DTensors; each counts once."""

    def make() -> Any:
        model: Any = make_model()
        ignored = {model[0].bias, *model[3].parameters()}
        fully_shard(model, mesh=make_mesh(), ignored_params=ignored)
        kinds = {type(param.data) for param in model.parameters()}
        assert kinds == {Tensor, DTensor}
        return model

    # All processes have the whole batch, since nothing adds up the gradients of plain tensors.
    _trains_with_sam(make)


@case(1, 2, 4)
def sam_tensor_parallel(_: Path) -> None:
    """Layers that are cut and layers that every process has whole have one norm."""
    _trains_with_sam(lambda: parallelized(make_mesh()))


@case(4)
def sam_on_two_dimensions(_: Path) -> None:
    """The sum goes over both of a mesh's dimensions; what two processes hold counts once."""
    hybrid = square("replicate", "shard")
    _trains_with_sam(lambda: fsdp(hybrid), 4, dist.get_rank())
    mesh = square("dp", "tp")
    dp = mesh["dp"]
    _trains_with_sam(lambda: fsdp(dp, parallelized(mesh["tp"])), 2, dp.get_local_rank())


@case(1, 2, 4)
def sam_restores_shards_to_the_bit(_: Path) -> None:
    """Between the half-steps the whole model is rho away; then it is where it was, to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        model = fsdp(make_mesh(), make_model().to(dtype))
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.7)
        closure = _closure(model, optimizer, batch(0).to(dtype))
        before = [param.full_tensor().detach().clone() for param in model.parameters()]
        with counted_sums() as calls:
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
    mesh = make_mesh()
    whole = [nn.Parameter(param) for param in whole_tensors(0)]
    sharded = [
        nn.Parameter(distribute_tensor(param, mesh, [Shard(0)])) for param in whole_tensors(0)
    ]
    optimizers = [SAM(AdamCM(params, **OPTIONS), 0.5) for params in (whole, sharded)]
    # The third has one row: one of the processes has none of it.
    for participants in ([2], [0, 2, 4], []):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for i in participants:
            grad = whole_tensors(1)[i]
            whole[i].grad = grad
            sharded[i].grad = summand(grad, mesh)
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
    model = fsdp(make_mesh())
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
    part = batch(0).chunk(dist.get_world_size())[rank]
    model = fsdp(make_mesh())
    optimizer = SAM(AdamCM(model.parameters(), **OPTIONS, skip_nonfinite=True), 0.3)
    factors: list[float] = []

    def closure(zeroes: bool = True) -> Any:
        if zeroes:
            optimizer.zero_grad(set_to_none=False)
        for _ in range(2):
            loss = factors[-1] * loss_of(model, part)
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
    expected = make_model()
    twin = SAM(AdamCM(expected.parameters(), **OPTIONS), 0.3)
    for _step in range(4):
        for half in (twin.first_step, twin.second_step):
            (2 * loss_of(expected, batch(0))).backward()
            half(zero_grad=True)
    compare(model, expected)


@case(2)
def sam_ddp(_: Path) -> None:
    """DDP may own the gradients: they are the same tensors once they are zeroed and made anew."""
    for as_view in (False, True):
        model = DistributedDataParallel(make_model(), gradient_as_bucket_view=as_view)
        expected = make_model()
        for each, *part in ((model, 2, dist.get_rank()), (expected, 1, 0)):
            optimizer = SAM(AdamCM(each.parameters(), **OPTIONS), 0.3)
            _train_sam(each, optimizer, range(STEPS), *part)
        compare(model.module, expected)
        optimizer = SAM(AdamCM(model.parameters(), **OPTIONS), 0.3)
        before = [param.detach().clone() for param in model.parameters()]

        def accumulates(model: Any = model) -> Any:
            loss = loss_of(model, batch(0))
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match="closure must zero"):
            optimizer.step(accumulates)
        assert all(map(torch.equal, model.parameters(), before))


@case(1, 2)
def sam_in_distributed_checkpoints(_: Path) -> None:
    """Torch's helpers take SAM for an optimizer, also before its first step, sharded and whole.

    They step it without a closure to make its state, which no test did.
    """
    world, rank = dist.get_world_size(), dist.get_rank()

    def make(wrap: Any = SAM) -> tuple[Any, Any]:
        model = fsdp(make_mesh())
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
        assert_equal(fresh, plain)
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
