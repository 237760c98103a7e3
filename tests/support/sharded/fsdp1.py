"""FSDP1, whose shards are plain tensors."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from cm_fused import SAM, AdamCG, AdamCM, AdamWCM, enable_gradient_release
from cm_fused.compat.cmoptimizer import Adam_CM
from tests.support.sharded.common import (
    OPTIONS,
    STEPS,
    batch,
    case,
    compare,
    loss_of,
    make_model,
    train,
    trained_alone,
)


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
            model = _fsdp1(
                make_model(), use_orig_params=use_orig_params, sharding_strategy=strategy
            )
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
            model = make_model()
            optimizer = AdamCM(model.parameters(), **OPTIONS, backend=backend)
            sam = SAM(torch.optim.Adam(model.parameters()))
            released = AdamCM(model.parameters(), priority_scope="tensor")
            train(model, optimizer, range(steps_before))
            optimizer.zero_grad()
            wrapped = _fsdp1(model, use_orig_params=True)
            loss_of(wrapped, batch(0)).backward()
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
        model = _fsdp1(make_model(), use_orig_params=True)
        optimizer = AdamCM(model.parameters(), priority_scope=scope, **OPTIONS)
        train(model, optimizer, range(STEPS))
        compare(model, trained_alone(AdamCM, priority_scope=scope))
