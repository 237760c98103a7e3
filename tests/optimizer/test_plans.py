"""A step by a cached plan is that of a step without one.

The older tests change an option, a parameter or its state by replacing it. These change them in
place, or after a step that was refused: what was compared with itself was found unchanged.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cm_fused import AdamCM
from cm_fused.compat.cmoptimizer import Adam_CM
from tests.support.training import assert_same


def _refused(optimizer: Any) -> None:
    betas = optimizer.param_groups[0]["betas"]
    for _ in range(2):
        optimizer.param_groups[0]["betas"] = 0.9
        with pytest.raises(ValueError, match=r"betas must be a pair of floats, got 0\.9"):
            optimizer.step()
    optimizer.param_groups[0]["betas"] = (betas[0], 0.5)


def _set(name: str, value: Any) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[0].__setitem__(name, copy.deepcopy(value))


def _transposed(optimizer: Any) -> None:
    param = optimizer.param_groups[0]["params"][0]
    param.data = param.data.t()


LISTED = [0.9, 0.99]
DECAY = torch.tensor(0.1)
SITUATIONS: dict[str, tuple[type[Any], torch.dtype, list[Callable[[Any], object]]]] = {
    "refused options": (AdamCM, torch.float32, [_refused]),
    "a list of betas": (
        AdamCM,
        torch.float32,
        [_set("betas", LISTED), lambda o: o.param_groups[0]["betas"].__setitem__(0, 0.5)],
    ),
    "a weight decay in a tensor": (
        AdamCM,
        torch.float32,
        [_set("weight_decay", DECAY), lambda o: o.param_groups[0]["weight_decay"].fill_(0.5)],
    ),
    "a transposed complex parameter": (AdamCM, torch.complex64, [_transposed]),
    "kappa": (Adam_CM, torch.float32, [_set("kappa", 0.0)]),
    "a state that begins anew": (
        Adam_CM,
        torch.float32,
        [lambda o: o.state.__setitem__(o.param_groups[0]["params"][0], {})],
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_changes_in_place_is_seen(situation: str) -> None:
    """The twin forgets its plans before every step."""
    cls, dtype, changes = SITUATIONS[situation]
    results: list[list[Tensor]] = []
    for forgets in (False, True):
        param = torch.randn(3, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
        optimizer = cls([param], lr=0.1)
        for change in (None, *changes):
            if change is not None:
                change(optimizer)
            for t in range(4):
                source = torch.Generator().manual_seed(t)
                param.grad = torch.randn(3, 3, dtype=dtype, generator=source)
                if forgets:
                    optimizer._forget_plans()
                optimizer.step()
        results.append([param, optimizer.state[param]["exp_avg"]])
    assert_same(results[0], results[1])
