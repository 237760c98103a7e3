"""CUDA graph capture."""

import torch


def is_capturing(device: torch.device) -> bool:
    """Return whether what is done on a device's current stream now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device) -> None:
    """Check that state is not made inside a graph, whose every replay would make it anew."""
    if is_capturing(device):
        raise RuntimeError(
            "the state of every parameter must be there before a CUDA graph is captured; take a "
            "step before"
        )


def check_not_captured_sharded(device: torch.device) -> None:
    """Check that no step of DTensors goes into a graph: it ends in the next, by the norms' sum."""
    if is_capturing(device):
        raise RuntimeError(
            "a step of DTensor parameters cannot be captured in a CUDA graph: its norms are waited "
            "for at the next step; capture forward and backward alone"
        )
