"""Masters of split parameters."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from cm_fused import AdamWCM, get_master_param, set_master_param
from cm_fused.rounding import split_master
from tests.support.sharded.common import Twins, case, gathered, make_mesh, to_exact_norms


@case(2)
def masters(_: Path) -> None:
    """Masters of DTensors have the bits of one process, and are set from full tensors or shards."""
    options: dict[str, Any] = {"low_precision_update": "split", "dtype": torch.bfloat16}
    twins = Twins(AdamWCM, make_mesh(), [Shard(0)], **options).train(to_exact_norms)
    twins.check_bits()
    for param, twin in zip(twins.sharded, twins.whole, strict=True):
        master, expected = (
            get_master_param(optimizer, each)
            for optimizer, each in ((twins.optimizer, param), (twins.expected, twin))
        )
        assert isinstance(master, DTensor)
        assert torch.equal(gathered(master), expected)
        for given in (expected + 1e-3, twins.shard(expected + 2e-3)):
            set_master_param(twins.optimizer, param, given)
            master = get_master_param(twins.optimizer, param)
            assert torch.equal(gathered(master), gathered(given))
            assert torch.equal(gathered(param.detach()), split_master(gathered(given))[0])
