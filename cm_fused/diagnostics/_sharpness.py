"""The sharpness of the loss."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

Vector = list[Tensor]


@dataclass(frozen=True)
class Sharpness:
    """The largest eigenvalue of a Hessian.

    Attributes:
        eigenvalue: The largest one, with its sign.
        converged: Whether the residual is at most the tolerance. The distance of the estimate to an
            eigenvalue is then at most that; it is the largest one for almost every start.
        iterations: The number of Hessian-vector products.
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
    r"""Return the largest eigenvalue of the Hessian of a loss, by conjugate gradients.

    Each iteration makes one Hessian-vector product. It takes the vector of the largest Rayleigh
    quotient :math:`\lambda` among the combinations of the last vector :math:`x`, its residual
    :math:`Hx - \lambda x` and the last direction. It stops where the residual's norm is at most the
    tolerance times the largest :math:`\lVert Hx \rVert` of the unit vectors so far, and a new
    product confirms it.

    About ten vectors of the parameters' size are in memory, in float32 or wider. Products are
    computed in the parameters' dtype, without autocast; a tolerance below their rounding is not
    reached. The result does not depend on torch's global generators and does not change them or
    `.grad`.

    Source: Knyazev, "Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block
    Preconditioned Conjugate Gradient Method" (2001), for one vector and without a preconditioner;
    Hessian-vector products as in Yao et al., "PyHessian: Neural Networks Through the Lens of the
    Hessian" (2020).

    Args:
        loss: A scalar with its graph, which is not freed; not changed.
        params: Real tensors that require grad and that the loss depends on; not changed.
        tolerance: The tolerance of the residual, relative to the largest product, > 0.
        max_iterations: The largest number of Hessian-vector products, >= 1.
        seed: The seed of the vector that it starts from.

    Raises:
        TypeError: The loss is not a tensor.
        ValueError: There are no parameters or elements, a parameter is complex or does not require
            grad, or a number is out of its range.
    """
    # A parameter that two modules share counts once.
    params = list({id(param): param for param in params}.values())
    _check(loss, params, tolerance, max_iterations)
    with _without_autocast([loss, *params]):
        slopes = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)

        def hessian_times(vectors: Sequence[Tensor]) -> Vector:
            dependent = [
                (slope, vector.to(slope.dtype))
                for slope, vector in zip(slopes, vectors, strict=True)
                if slope.requires_grad
            ]
            if not dependent:  # the loss is linear
                return [torch.zeros_like(vector) for vector in vectors]
            of, along = zip(*dependent, strict=True)
            products = torch.autograd.grad(
                of, params, along, retain_graph=True, materialize_grads=True
            )
            return [p.to(vector.dtype) for p, vector in zip(products, vectors, strict=True)]

        with torch.no_grad():
            return _search(hessian_times, _random_unit(params, seed), tolerance, max_iterations)


def _check(loss: object, params: Sequence[Tensor], tolerance: float, max_iterations: int) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss must be a tensor with its graph, got {type(loss).__name__}; call a closure "
            "before, and let it run no backward pass"
        )
    if not params:
        raise ValueError("params must have at least one tensor, got none")
    if not any(param.numel() for param in params):
        raise ValueError("params must have at least one element, got none")
    for i, param in enumerate(params):
        if param.is_complex():
            raise ValueError(
                f"params must be real, got {param.dtype} for params[{i}]; compute the loss of "
                "torch.view_as_real of it and pass that"
            )
        if not param.requires_grad:
            raise ValueError(
                f"params must require grad, got params[{i}] that does not (a frozen one?); pass "
                "[p for p in model.parameters() if p.requires_grad]"
            )
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be >= 1, got {max_iterations!r}")


def _without_autocast(tensors: Sequence[Tensor]) -> ExitStack:
    stack = ExitStack()
    for kind in sorted({tensor.device.type for tensor in tensors}):
        if torch.amp.is_autocast_available(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def _search(
    apply: Callable[[Sequence[Tensor]], Vector],
    start: Vector,
    tolerance: float,
    max_iterations: int,
) -> Sharpness:
    """Iterate until the result has converged, or it can get no better.

    `apply` returns the product of the Hessian and a vector; `start` is a unit vector.
    """
    norms: list[float] = []  # those of the products so far

    def product_of(vector: Vector) -> Vector:
        product = apply(vector)
        norms.append(_norm(product))
        return product

    # Orthonormal: x, and the last direction from the second iteration on.
    vectors, products = [start], [product_of(start)]
    # Whether the product of x was computed, not combined from others.
    is_exact = True
    while True:
        eigenvalue = _dot(vectors[0], products[0])
        residual = _combined([1.0, -eigenvalue], [products[0], vectors[0]])
        norm = _norm(residual)
        has_converged = math.isfinite(norm) and norm <= tolerance * max(0.0, *norms)
        is_last = len(norms) == max_iterations or not math.isfinite(norm)
        if has_converged and not (is_exact or is_last):
            # A new product of x confirms it: rounding errors add up in the combined one.
            x = _scaled(vectors[0], 1 / _norm(vectors[0]))
            vectors, products, is_exact = [x], [product_of(x)], True
            continue
        direction = None
        if not (has_converged or is_last):
            residual = _scaled(residual, 1 / norm)
            direction = _orthonormalized(residual, vectors)
            if direction is None and len(vectors) > 1:  # the residual lies along the last one
                del vectors[1:], products[1:]
                direction = _orthonormalized(residual, vectors)
        if direction is None:
            return Sharpness(eigenvalue + 0.0, has_converged and is_exact, len(norms))  # no -0.0
        vectors, products = _improved([*vectors, direction], [*products, product_of(direction)])
        is_exact = False


def _improved(vectors: list[Vector], products: list[Vector]) -> tuple[list[Vector], list[Vector]]:
    """Move x to where the Rayleigh quotient is largest in the span of all vectors."""
    rows = [[_dot(v, p) for p in products] for v in vectors]
    gram = torch.tensor(rows, dtype=torch.float64, device="cpu")
    if not gram.isfinite().all():  # no vector is best: the next residual is not finite
        best = torch.full((len(rows),), math.nan, dtype=torch.float64, device="cpu")
    else:
        best = torch.linalg.eigh((gram + gram.T) / 2).eigenvectors[:, -1]
    # The part that is added to x, orthogonal to the new x.
    along = best.clone()
    along[0] = 0.0
    along -= along.dot(best) * best
    length = torch.linalg.vector_norm(along)
    new = [best.tolist(), (along / length).tolist()] if length > 0 else [best.tolist()]
    return [_combined(c, vectors) for c in new], [_combined(c, products) for c in new]


def _combined(coefficients: list[float], vectors: list[Vector]) -> Vector:
    result = _scaled(vectors[0], coefficients[0])
    for coefficient, vector in zip(coefficients[1:], vectors[1:], strict=True):
        torch._foreach_add_(result, torch._foreach_mul(vector, coefficient))
    return result


def _scaled(vector: Vector, factor: float) -> Vector:
    return list(torch._foreach_mul(vector, factor))


# A part of a unit vector with a smaller norm is rounding errors.
_NOTHING = 1e-3


def _orthonormalized(unit: Vector, basis: list[Vector]) -> Vector | None:
    """Return a unit vector's part orthogonal to a basis, of norm 1, or None if it is nothing."""
    for attempt in range(2):  # the second removes rounding errors of the first
        for vector in basis:
            unit = _combined([1.0, -_dot(unit, vector)], [unit, vector])
        norm = _norm(unit)
        if not norm > (_NOTHING if attempt == 0 else 0.5):
            return None
        unit = _scaled(unit, 1 / norm)
    return unit


def _random_unit(params: Sequence[Tensor], seed: int) -> Vector:
    generator = torch.Generator("cpu").manual_seed(seed)
    vectors = [
        torch.randn(param.shape, generator=generator, dtype=torch.float64, device="cpu").to(
            param.device, torch.promote_types(param.dtype, torch.float32)
        )
        for param in params
    ]
    return _scaled(vectors, 1 / _norm(vectors))


def _norm(vector: Vector) -> float:
    return math.sqrt(_dot(vector, vector))


def _dot(left: Vector, right: Vector) -> float:
    """Return the dot product, summed in float64; waits for the device."""
    products = [(a.double() * b.double()).sum() for a, b in zip(left, right, strict=True)]
    return torch.stack([product.to(products[0].device) for product in products]).sum().item()
