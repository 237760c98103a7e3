"""Recording an optimizer of sharded parameters."""

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from cm_fused import AdamCG, AdamCM
from cm_fused.diagnostics import Recorder
from tests.support.sharded.common import STEPS, case, make_mesh

# The first one's rows are not as many in each of two processes.
_SHAPES = ((7, 3), (4,))


@case(2)
def what_is_recorded(_: Path) -> None:
    """It is what is recorded of the whole parameters, also of the step that has just been taken.

    The copies of the parameters were lists of DTensors, which torch has no multi-tensor copy for,
    and the keys were noted before the sum over the processes that they wait for: ages and rates
    were those of the step before. Older tests read sharded buffers at one time, and recorded none.
    """
    mesh = make_mesh()
    for cls, every in ((AdamCM, 1), (AdamCM, 3), (AdamCG, 1)):
        generator = torch.Generator().manual_seed(3)
        wholes = [torch.randn(shape, generator=generator) for shape in _SHAPES]
        shards = [distribute_tensor(whole.clone(), mesh, [Shard(0)]) for whole in wholes]
        options = {"lr": 0.1, "capacity": 2}
        optimizers = [
            cls([param.requires_grad_() for param in params], **options)  # type: ignore[arg-type]
            for params in (wholes, shards)
        ]
        recorders: list[Recorder] = []
        for t in range(STEPS):
            for whole, shard in zip(wholes, shards, strict=True):
                whole.grad = torch.randn(whole.shape, generator=generator)
                shard.grad = distribute_tensor(whole.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
            if t == 0:
                recorders = [Recorder(optimizer, every=every) for optimizer in optimizers]
            expected, found = (recorder.last for recorder in recorders)
            assert found.keys() == expected.keys()
            for name, row in expected.items():
                close = pytest.approx(row, rel=1e-4, abs=1e-5, nan_ok=True)
                assert found[name] == close, f"{cls.__name__} {every=} {name}"
