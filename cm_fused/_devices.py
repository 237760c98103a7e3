"""Copies between devices."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device: itself if it is there.

    A copy to the CPU blocks: the host could otherwise read it before it has arrived.
    """
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
