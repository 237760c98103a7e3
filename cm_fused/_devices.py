"""Copies between devices."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, itself where it is there; the host waits where it is to read it.

    A copy to the host that is not waited for is read before it has come.
    """
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
