"""Float32 masters of bfloat16 parameters, to save and to load."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from cm_fused._distributed import is_sharded, local, local_as, sharded_as
from cm_fused._state.making import missing_state_of
from cm_fused._state.table import Group, State, required_keys
from cm_fused.rounding import HALF_DTYPES, join_master, split_master


@torch.no_grad()
def get_master_param(optimizer: Optimizer, param: Tensor) -> Tensor:
    """Return a copy of a parameter as `low_precision_update="split"` trains it.

    Args:
        optimizer: One of this package's, or `SAM` around one.
        param: One of its parameters.

    Returns:
        The master, float32, of a bfloat16 parameter; before its first step the parameter's values.
        Any other parameter in its own dtype. A DTensor for a DTensor.

    Raises:
        TypeError: The optimizer is not of this package.
        ValueError: The parameter is not the optimizer's, or is rounded in another way.

    Example:
        >>> import torch
        >>> from cm_fused import AdamCM, get_master_param
        >>> model = torch.nn.Linear(2, 1).to(torch.bfloat16)
        >>> optimizer = AdamCM(model.parameters(), low_precision_update="split")
        >>> masters = {name: get_master_param(optimizer, p) for name, p in model.named_parameters()}
        >>> masters["weight"].dtype
        torch.float32
    """
    _checked_group(optimizer, param)
    master = master_of(param, optimizer.state.get(param, {}))
    if master is not None:
        return master
    dtype = torch.float32 if param.dtype is torch.bfloat16 else param.dtype
    return param.detach().to(dtype, copy=True)


def master_of(param: Tensor, state: State) -> Tensor | None:
    """Return a copy of the master whose halves are a parameter and its state, or None."""
    remainder = state.get("master_remainder")
    if param.dtype is not torch.bfloat16 or remainder is None:
        return None
    if remainder.shape != param.shape:  # of the model before it was cast
        return None
    master = join_master(local(param.detach()), local(remainder))
    return sharded_as(master, param) if is_sharded(param) else master


@torch.no_grad()
def set_master_param(optimizer: Optimizer, param: Tensor, master: Tensor) -> None:
    """Set a parameter to a float32 master, from which `low_precision_update="split"` goes on.

    Args:
        optimizer: One of this package's, or `SAM` around one. The parameter's state is changed, or
            made if missing.
        param: One of its parameters. Changed: a bfloat16 one becomes the master rounded to nearest,
            ties away from zero; any other one is set to the master's values.
        master: Of the parameter's shape, any dtype that is real unless the parameter is complex;
            for a bfloat16 one read as float32. A DTensor or a full tensor for a DTensor.

    Raises:
        TypeError: The master is no tensor, or as of `get_master_param`.
        ValueError: The shape is not the parameter's, the master is complex for a real parameter, or
            as of `get_master_param`. Nothing has been changed then.

    Example:
        >>> import torch
        >>> from cm_fused import AdamCM, get_master_param, set_master_param
        >>> param = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
        >>> optimizer = AdamCM([param], low_precision_update="split")
        >>> set_master_param(optimizer, param, torch.tensor([1.0001]))
        >>> param.item(), get_master_param(optimizer, param)
        (1.0, tensor([1.0001]))
    """
    group = _checked_group(optimizer, param)
    if not isinstance(master, Tensor):
        raise TypeError(f"master must be a tensor, got {type(master).__name__}")
    if master.is_complex() and not param.is_complex():
        raise ValueError(f"master must be real for a {param.dtype} parameter, got {master.dtype}")
    if master.shape != param.shape:
        raise ValueError(
            f"master must have the parameter's shape {tuple(param.shape)}, got "
            f"{tuple(master.shape)}"
        )
    values = local_as(master, param)
    if param.dtype is not torch.bfloat16:
        local(param).copy_(values)
        return
    missing = missing_state_of(param, optimizer.state.get(param, {}), required_keys(group), group)
    optimizer.state[param].update(missing)
    rounded, remainder = split_master(values.to(param.device, torch.float32))
    local(param).copy_(rounded)
    local(optimizer.state[param]["master_remainder"]).copy_(remainder)


def _checked_group(optimizer: Optimizer, param: Tensor) -> Group:
    """Return the group of a parameter that is not rounded, or has a master."""
    for group in optimizer.param_groups:
        if any(member is param for member in group["params"]):
            break
    else:
        raise ValueError(
            f"param must be one of the optimizer's, got another of shape {tuple(param.shape)}"
        )
    if "low_precision_update" not in group:
        name = type(optimizer).__name__
        raise TypeError(f"optimizer must be one of cm_fused's, or SAM around one, got {name}")
    update = group["low_precision_update"]
    if param.dtype in HALF_DTYPES and update != "split":
        raise ValueError(
            f"low_precision_update must be 'split' for a {param.dtype} parameter to have a master, "
            f"got {update!r}"
        )
    return group
