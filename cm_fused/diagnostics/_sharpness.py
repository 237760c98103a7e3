"""How sharp the loss is."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of a Hessian.

    Attributes:
        eigenvalue: The largest one, with its sign.
        converged: Whether two estimates in a row differed by at most the tolerance.
        iterations: Hessian-vector products that were made.
    """

    eigenvalue: float
    converged: bool
    iterations: int


def sharpness(
    loss: Tensor,
    params: Iterable[Tensor],
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    seed: int = 0,
) -> Sharpness:
    """Return the largest eigenvalue of the Hessian of a loss, by power iteration.

    Power iteration finds the eigenvalue of largest magnitude; if that is negative, a second one, on
    the Hessian shifted by it, finds the largest. Estimates are Rayleigh quotients. The result
    does not depend on torch's global generators and leaves them alone; `.grad` is not touched.

    Source: Yao et al., "PyHessian: Neural Networks Through the Lens of the Hessian" (2020).

    Args:
        loss: A scalar with its graph, which is kept; not changed.
        params: Real tensors that the loss depends on; not changed.
        tolerance: Relative change of the estimate at which it stops, > 0.
        max_iterations: Hessian-vector products of each of the two, >= 1.
        seed: Of the vector that it starts from.

    Raises:
        ValueError: There are no parameters, or a number is out of its range.
    """
    params = list(params)
    if not params:
        raise ValueError("params must have at least one tensor, got none")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations!r}")
    slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    start = _random_unit(params, seed)

    def hessian_times(vectors: Sequence[Tensor]) -> list[Tensor]:
        dependent = [(s, v) for s, v in zip(slopes, vectors, strict=True) if s.requires_grad]
        if not dependent:  # the loss is linear
            return [torch.zeros_like(vector) for vector in vectors]
        of, along = zip(*dependent, strict=True)
        products = torch.autograd.grad(of, params, along, retain_graph=True, materialize_grads=True)
        return list(products)

    largest = _power_iteration(hessian_times, start, tolerance, max_iterations)
    if largest.eigenvalue >= 0:
        return largest
    shift = largest.eigenvalue

    def shifted(vectors: Sequence[Tensor]) -> list[Tensor]:
        products = hessian_times(vectors)
        torch._foreach_sub_(products, torch._foreach_mul(list(vectors), shift))
        return products

    above = _power_iteration(shifted, start, tolerance, max_iterations)
    return Sharpness(
        above.eigenvalue + shift,
        above.converged and largest.converged,
        above.iterations + largest.iterations,
    )


def _random_unit(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(seed)
    vectors = [
        torch.randn(param.shape, generator=generator, dtype=torch.float64, device="cpu").to(param)
        for param in params
    ]
    return _normalized(vectors)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    products = [(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack(products).sum()


def _normalized(vectors: Sequence[Tensor]) -> list[Tensor]:
    norm = _dot(vectors, vectors).sqrt()
    return [(vector.double() / norm).to(vector.dtype) for vector in vectors]


def _power_iteration(
    apply: Callable[[Sequence[Tensor]], list[Tensor]],
    vectors: list[Tensor],
    tolerance: float,
    max_iterations: int,
) -> Sharpness:
    estimate = 0.0
    for iteration in range(1, max_iterations + 1):
        products = apply(vectors)
        before, estimate = estimate, _dot(vectors, products).item()
        if not any(product.any() for product in products):
            return Sharpness(0.0, True, iteration)
        if iteration > 1 and abs(estimate - before) <= tolerance * abs(estimate):
            return Sharpness(estimate, True, iteration)
        vectors = _normalized(products)
    return Sharpness(estimate, False, max_iterations)
