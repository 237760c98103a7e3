"""Parameters that have memory in common, which no pass may change at once."""

from collections.abc import Iterable
from itertools import pairwise

from torch import Tensor


def have_overlap(params: Iterable[Tensor]) -> bool:
    """Return whether two tensors have memory in common, or lie between each other's elements."""
    extents = sorted(_extent(param) for param in params if param.numel())
    return any(start < end for (_, end), (start, _) in pairwise(extents))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the byte behind its last."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()
