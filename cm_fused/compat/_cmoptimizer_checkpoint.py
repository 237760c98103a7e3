"""Checkpoints of the research package."""

from collections.abc import Mapping
from os import PathLike
from typing import IO, Any

import torch
from torch import Tensor

# The package's options whose names differ here.
_NAMES = {"topC": "capacity", "decay": "priority_decay"}
# Its options that mean the same here, with a scheduler's. Others have no meaning.
_OPTIONS = (
    *("lr", "initial_lr", "betas", "eps", "weight_decay", "amsgrad", "synced", "buffer_dtype"),
    *_NAMES,
)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class _TensorList(dict[Any, Any]):
    """Stands for the package's buffer, whose attributes it takes."""


def read_checkpoint(file: str | PathLike[str] | IO[bytes]) -> Any:
    """Read a file that was saved with the research package, which need not be installed.

    Args:
        file: As `torch.load` takes it.

    Returns:
        The saved object, on the CPU; `convert_state_dict` takes an optimizer's state dict of it.
        Only tensors, plain values and the package's buffers are read
        (`torch.load(weights_only=True)`).
    """
    names: list[Any] = [(_TensorList, "cmoptimizer.prioritydict.TensorList")]
    with torch.serialization.safe_globals(names):
        return torch.load(file, map_location="cpu", weights_only=True)


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of the research package's Adam_CM or Adam_C as one of cm_fused's.

    `cm_fused.compat.cmoptimizer.Adam_CM` and `Adam_C` go on from it as the package would have;
    `cm_fused.AdamCM` and `AdamCG` load it too and go on by their own rules.

    Args:
        state_dict: A state dict, as the package's `optimizer.state_dict()` returns it; not changed.

    Returns:
        A state dict whose moments are references, which a load copies.

    Raises:
        ValueError: A parameter's state has no buffer of the package's.
    """
    return {
        "state": {
            index: _param_state(index, state) for index, state in state_dict["state"].items()
        },
        "param_groups": [_group(group) for group in state_dict["param_groups"]],
    }


def translated(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a param group under cm_fused's names."""
    result = {_NAMES.get(name, name): value for name, value in options.items()}
    if "synced" in result:
        result["priority_scope"] = "group" if result.pop("synced") else "tensor"
    return result


def _group(saved: Mapping[str, Any]) -> dict[str, Any]:
    group = translated({name: value for name, value in saved.items() if name in _OPTIONS})
    for name in ("kappa", "critical_test"):
        group[name] = float(saved[name])
    group["params"] = list(saved["params"])
    return group


def _param_state(index: Any, saved: Mapping[str, Any]) -> dict[str, Any]:
    buffer: Any = saved.get("critical gradients")
    if not hasattr(buffer, "_heap_key"):
        raise ValueError(
            f"the state of parameter {index} must have 'critical gradients' of the research "
            f"package, got {type(buffer).__name__} of {sorted(saved)}; a state dict that its own "
            "load_state_dict has seen has lost them"
        )
    keys: Tensor = buffer._heap_key.to(torch.float32)
    filled = torch.arange(buffer.k, device=keys.device) < buffer.curr_k
    state = {key: saved[key] for key in _MOMENTS if key in saved}
    state["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32, device="cpu")
    state["critical_buffer"] = buffer._heap
    state["priorities"] = torch.where(filled, keys, -torch.inf)
    state["smallest"] = torch.tensor(int(buffer.smallest), dtype=torch.int64, device="cpu")
    return state
