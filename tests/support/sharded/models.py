"""Models that torch shards, cuts or copies: FSDP2, tensor parallelism, DDP, ZeRO."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from cm_fused import AdamCG, AdamCM, AdamWCM, param_groups_weight_decay
from tests.support.sharded.common import (
    OPTIONS,
    STEPS,
    assert_equal,
    case,
    compare,
    counted_sums,
    fsdp,
    make_mesh,
    make_model,
    parallelized,
    square,
    train,
    trained_alone,
)


@case(2)
def fsdp2_with_cpu_offload(_: Path) -> None:
    """Parameters that stay on the CPU are stepped there: the bits of a run without offload.

    With state of low precision and two param groups, as a large model would have them.
    """
    trained = []
    for policy in (OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)):
        model = fsdp(make_mesh(), offload_policy=policy)
        groups = param_groups_weight_decay(model, 0.1)
        options = {"buffer_dtype": "int8", "moment_dtype": "bfloat16", "fused": True, **OPTIONS}
        optimizer = AdamWCM(groups, **options)
        train(model, optimizer, range(STEPS), 2, dist.get_rank())
        assert optimizer.grad_norm().isfinite()
        trained.append([param.full_tensor() for param in model.parameters()])
    assert_equal(*trained)


@case(2, 4)
def fsdp2(_: Path) -> None:
    """fully_shard trains as one process does."""
    for cls in (AdamCM, AdamWCM, AdamCG):
        for scope in ("group", "tensor"):
            model = fsdp(make_mesh())
            optimizer = cls(model.parameters(), priority_scope=scope, **OPTIONS)
            world, rank = dist.get_world_size(), dist.get_rank()
            train(model, optimizer, range(STEPS), world, rank)
            compare(model, trained_alone(cls, priority_scope=scope))


@case(2)
def tensor_parallel(_: Path) -> None:
    """Tensor parallelism, beside layers that are not."""
    for scope in ("group", "tensor"):
        model = parallelized(make_mesh())
        optimizer = AdamCM(model.parameters(), priority_scope=scope, **OPTIONS)
        train(model, optimizer, range(STEPS))
        compare(model, trained_alone(AdamCM, priority_scope=scope))


@case(4)
def fsdp2_over_tensor_parallel(_: Path) -> None:
    """Both, on a mesh of two dimensions; some layers are on one of them alone."""
    for scope in ("group", "tensor"):
        mesh = square("dp", "tp")
        model = fsdp(mesh["dp"], parallelized(mesh["tp"]))
        optimizer = AdamCM(model.parameters(), priority_scope=scope, **OPTIONS)
        train(model, optimizer, range(STEPS), 2, mesh["dp"].get_local_rank())
        compare(model, trained_alone(AdamCM, priority_scope=scope))


@case(2, 4)
def ddp(_: Path) -> None:
    """DistributedDataParallel: every process steps alike, without a sum of ours."""
    model = DistributedDataParallel(make_model())
    optimizer = AdamCM(model.parameters(), **OPTIONS)
    with counted_sums() as calls:
        train(model, optimizer, range(STEPS), dist.get_world_size(), dist.get_rank())
    assert not calls
    compare(model.module, trained_alone(AdamCM))


@case(2)
def zero_redundancy(_: Path) -> None:
    """ZeRO: scope "tensor" is right, and scope "group" is refused, as no process has the group."""
    # Its import warns of what torch does itself.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = make_model()
    options = {**OPTIONS, "priority_scope": "tensor"}
    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamCM, **options)
    train(model, optimizer, range(STEPS))
    compare(model, trained_alone(AdamCM, priority_scope="tensor"))
    for cls in (AdamCM, AdamWCM):
        with pytest.raises(ValueError, match="priority_scope='tensor'"):
            ZeroRedundancyOptimizer(model.parameters(), cls, **OPTIONS)
    # Groups that are added later are checked as the first ones are.
    added = {"params": [nn.Parameter(torch.ones(3))], "priority_scope": "group"}
    with pytest.raises(ValueError, match="priority_scope must be 'tensor' under ZeroRedundancy"):
        optimizer.add_param_group(added)
