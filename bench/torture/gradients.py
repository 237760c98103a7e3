"""Random parameters and gradients: missing, zero, spiky, strided, expanded, plain, bad."""

import torch
from torch import Tensor


def new_param(shape: tuple[int, ...], dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """Return a parameter of normal values."""
    return _normal(torch.Size(shape), dtype, source).requires_grad_()


def gradient(param: Tensor, source: torch.Generator) -> Tensor | None:
    """Return a gradient of one kind or another, or None.

    It is small enough that nothing overflows in float16, and is drawn in float32: every dtype from
    float32 up gets the same values.
    """
    kind = int(torch.randint(8, (), generator=source))
    values = _normal(param.shape, param.dtype, source)
    if kind == 0:
        return None
    if kind == 1:
        return torch.zeros_like(values)
    if kind == 2:
        return values * 1e3
    if kind == 3 and param.ndim > 1:
        return values.mT.contiguous().mT
    if kind == 4 and param.ndim > 0:
        return torch.stack([values, values], -1)[..., 0]  # gaps
    if kind == 5:
        return _normal(torch.Size(()), param.dtype, source).expand(param.shape)
    return values


def poison(params: list[Tensor], value: float, source: torch.Generator) -> bool:
    """Put a value somewhere into one of the gradients; return whether there was a place."""
    places = [param for param in params if param.grad is not None and param.numel()]
    if not places:
        return False
    chosen = places[int(torch.randint(len(places), (), generator=source))]
    spoilt = chosen.grad.clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]
    spoilt.view(-1)[int(torch.randint(spoilt.numel(), (), generator=source))] = value
    chosen.grad = spoilt
    return True


def _normal(shape: torch.Size, dtype: torch.dtype, source: torch.Generator) -> Tensor:
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    return torch.randn(shape, generator=source, dtype=drawn).to(dtype)
