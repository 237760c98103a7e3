"""How cases save a training at its half, load it, and check that it goes on."""

import copy
import warnings
from pathlib import Path
from typing import Any

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

from cm_fused._optimizer.state_dict import AS_VALUES
from cm_fused.rounding import INT4
from tests.support.sharded.common import SCALED, STEPS, assert_close, draw, train

HALF = STEPS // 2
# What checkpoints are saved and resumed with; "plain" has no scales.
SAVED: dict[str, dict[str, Any]] = {"plain": {}, **SCALED}
# Half of the distance from a dtype's largest code to the next, in parts of it, and its rounding.
HALF_CODE = {
    "torch.int4": 0.5 / 7 + 1e-6,
    "torch.int8": 0.5 / 127 + 1e-6,
    "torch.float8_e4m3fn": 16 / 448 + 1e-6,
}
# As much of an int8 moment, whose mantissa has 3 bits.
HALF_MOMENT_CODE = {"torch.int8": 1 / 16}


def make_wide_model() -> Any:
    """Return a model whose weights have several blocks of 256, which shards cut in two."""
    return draw(nn.Sequential(nn.Linear(6, 130), nn.Tanh(), nn.Linear(130, 11)), 0.3, 4)


def both(model: Any, optimizer: Any, **options: Any) -> dict[str, Any]:
    """Return the state dicts of both, by names."""
    chosen = StateDictOptions(**options)
    return {
        "model": get_model_state_dict(model, options=chosen),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=chosen),
    }


def set_both(model: Any, optimizer: Any, state: dict[str, Any], **options: Any) -> None:
    """Load the state dicts of both, which is no conversion that is warned of."""
    chosen = StateDictOptions(**options)
    set_model_state_dict(model, state["model"], options=chosen)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the state of group")
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=chosen)


def tensors_of(state: dict[str, Any]) -> dict[tuple[str, str], Tensor]:
    """Return parameters and an optimizer's state, except what follows from it."""
    params = {(name, "param"): value for name, value in state["model"].items()}
    keys = ("exp_avg", "exp_avg_sq", "critical_buffer", "priorities", "step")
    states = state["optimizer"]["state"]
    return params | {(name, key): values[key] for name, values in states.items() for key in keys}


def keep_half_and_end(
    model: Any, optimizer: Any, path: Path, world: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Train the second half; save the state before it and after it whole; return the latter."""
    half = copy.deepcopy(both(model, optimizer, full_state_dict=True))
    train(model, optimizer, range(HALF, STEPS), world, dist.get_rank(), dtype)
    end = both(model, optimizer, full_state_dict=True)
    if dist.get_rank() == 0:
        torch.save({"half": half, "end": end}, path)
    return end


def check_same(state: dict[str, Any], saved: dict[str, Any], name: str) -> None:
    """Check that all tensors have the bits of what was saved."""
    for which, value in tensors_of(saved).items():
        assert torch.equal(tensors_of(state)[which], value), (name, which)


def check_rounded_once(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    """Check that blocks of another mesh hold what was saved, each rounded to the nearest code."""
    (group,) = saved["optimizer"]["param_groups"]
    moment_dtype, buffer_dtype = (
        str(group[option]).removesuffix(AS_VALUES) for option in ("moment_dtype", "buffer_dtype")
    )
    bounds = dict.fromkeys(("exp_avg", "exp_avg_sq"), HALF_MOMENT_CODE.get(moment_dtype, 0))
    bounds["critical_buffer"] = HALF_CODE.get(buffer_dtype, 0)
    for (name, key), value in tensors_of(saved).items():
        actual, bound = tensors_of(loaded)[name, key], bounds.get(key, 0)
        if bound == 0:
            assert torch.equal(actual, value), (name, key)
        else:
            assert (actual - value).abs().max() <= bound * value.abs().max(), (name, key)


def check_goes_on(
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
    train(model, optimizer, range(HALF, STEPS), world, dist.get_rank(), dtype)
    end = tensors_of(both(model, optimizer, full_state_dict=True))
    for (name, key), value in tensors_of(kept["end"]).items():
        if close:
            assert_close(end[name, key], value, f"{key} of {name}")
        elif key == "param":
            moved = (value - kept["half"]["model"][name]).norm()
            assert (end[name, key] - value).norm() <= bound * moved, name
