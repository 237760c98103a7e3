"""Other wrappers of torch's, of optimizers and of training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from cm_fused import AdamCM
from tests.support.sharded.common import (
    OPTIONS,
    STEPS,
    assert_same_on_both,
    batch,
    case,
    compare,
    loss_of,
    make_model,
    train,
)


@case(1)
def optimizers_in_backward(_: Path) -> None:
    """`_apply_optimizer_in_backward` makes an optimizer a parameter: scope "tensor" is right.

    Scope "group" silently was scope "tensor", and `max_grad_norm` bounded each parameter's norm.
    """
    from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

    model, twin = make_model(), make_model()
    options = {**OPTIONS, "priority_scope": "tensor"}
    _apply_optimizer_in_backward(AdamCM, model.parameters(), options)
    optimizer = AdamCM(twin.parameters(), **options)
    for t in range(STEPS):
        loss_of(model, batch(t)).backward()
    train(twin, optimizer, range(STEPS))
    compare(model, twin)
    for options, name in (
        ({}, "priority_scope"),
        ({"priority_scope": "tensor", "max_grad_norm": 1.0}, "max_grad_norm"),
        ({"priority_scope": "tensor", "skip_nonfinite": True}, "skip_nonfinite"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be .* _apply_optimizer_in_backward"):
            _apply_optimizer_in_backward(AdamCM, make_model().parameters(), options)


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
            ShardedOptimizer(dict(make_model().named_parameters()), AdamCM, priority_scope=scope)


@case(2)
def local_sgd(_: Path) -> None:
    """PostLocalSGDOptimizer: each process trains a model of its own between averages."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    models = [make_model() for _ in range(3)]
    optimizers: list[Any] = [AdamCM(model.parameters(), **OPTIONS) for model in models]
    world, rank = dist.get_world_size(), dist.get_rank()
    averager = PeriodicModelAverager(period=2, warmup_steps=0)
    train(models[2], PostLocalSGDOptimizer(optimizers[2], averager), range(5), world, rank)
    # The same in one process.
    for t in range(5):
        for i in range(world):
            train(models[i], optimizers[i], range(t, t + 1), world, i)
        if t % 2 == 0:
            for pair in zip(*(model.parameters() for model in models[:2]), strict=True):
                mean = (pair[0] + pair[1]).detach() / 2
                for param in pair:
                    param.data.copy_(mean)
    compare(models[2], models[rank])


@case(2)
def uneven_inputs(_: Path) -> None:
    """`Join` lets processes have fewer batches; DDP then gives all the parameters of the last."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for zero in (False, True):
        model = DistributedDataParallel(make_model())
        params: Any = list(model.parameters())
        optimizer: Any = AdamCM(params, **OPTIONS, priority_scope="tensor")
        joined: list[Any] = [model]
        if zero:
            optimizer = ZeroRedundancyOptimizer(params, AdamCM, **OPTIONS, priority_scope="tensor")
            joined.append(optimizer)
        with Join(joined):
            train(model, optimizer, range(3 + 2 * dist.get_rank()), 2, dist.get_rank())
        for param in model.parameters():
            assert_same_on_both(param)
