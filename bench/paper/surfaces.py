"""The toy surfaces: functions of points ``(..., D)``, one value for each point.

All are in any floating dtype, differentiable by autograd, and change nothing. Numbers of equations
are the paper's (Malviya et al., "Promoting Exploration in Memory-Augmented Adam using Critical
Momenta").
"""

import math

import torch
from torch import Tensor


def flat_sharp(x: Tensor, sharpness: float | Tensor) -> Tensor:
    """Return the sum over coordinates of min(x², s·(x − 1)²), eq. (8).

    Two global minima of value 0 with equal coordinates: a flat one at the origin, curvature 2, and
    a sharp one at (1, ..., 1), curvature 2s.

    Args:
        x: Points, (..., D) for any D.
        sharpness: s > 0; a tensor is broadcast against the points, so that each may have its own.
    """
    s = torch.as_tensor(sharpness, dtype=x.dtype, device=x.device).unsqueeze(-1)
    return torch.minimum(x.square(), s * (x - 1).square()).sum(-1)


def ackley(x: Tensor) -> Tensor:
    """Return Ackley's function in any dimension, eq. (9); its minimum is 0 at the origin.

    Source: Ackley, "A Connectionist Machine for Genetic Hillclimbing" (1987), with the usual
    constants 20, 0.2 and 2π. Its gradient at the origin itself is not defined; 0 is given there.
    """
    return -20 * torch.exp(-0.2 * _root_mean_square(x)) - _waves(x) + math.e + 20


def goldstein_price(x: Tensor) -> Tensor:
    """Return the log-scaled Goldstein-Price function of points (..., 2), eq. (10).

    (log(product) − 8.693) / 2.427; its minimum is −3.129 at (0, −1). Picheny et al. have it on
    [0, 1]², as this function of 4x − 2. The paper prints the constant within a factor and the
    second factor outside the logarithm, which has no value or another minimum.

    Source: Picheny, Wagner and Ginsbourger, "A benchmark of kriging-based infill criteria for noisy
    optimization" (2013).
    """
    x1, x2 = x.unbind(-1)
    first = 1 + (x1 + x2 + 1).square() * (
        19 - 14 * x1 + 3 * x1.square() - 14 * x2 + 6 * x1 * x2 + 3 * x2.square()
    )
    second = 30 + (2 * x1 - 3 * x2).square() * (
        18 - 32 * x1 + 12 * x1.square() + 48 * x2 - 36 * x1 * x2 + 27 * x2.square()
    )
    return (torch.log(first * second) - 8.693) / 2.427


def levy(x: Tensor) -> Tensor:
    """Return Levy's function in any dimension, eq. (11); its minimum is 0 at (1, ..., 1).

    Source: Laguna and Martí, "Experimental testing of advanced scatter search designs for global
    optimization of multimodal functions" (2005).
    """
    w = 1 + (x - 1) / 4
    inner, last = w[..., :-1], w[..., -1]
    middle = (inner - 1).square() * (1 + 10 * torch.sin(math.pi * inner + 1).square())
    end = (last - 1).square() * (1 + torch.sin(2 * math.pi * last).square())
    return torch.sin(math.pi * w[..., 0]).square() + middle.sum(-1) + end


def ackley_rosenbrock(x: Tensor) -> Tensor:
    """Return the mix of Ackley's and Rosenbrock's functions of points (..., 2), eq. (12).

    0.05 (1 − x)² + 0.05 (y − x²)² + 0.6 [exp(−0.2 r) − exp(mean of the waves) + e], as printed: the
    first exponential's sign is not Ackley's. The paper states the minimum (2.1, 3.9); near it is
    the local minimum (2.0, 4.0), of value 0.369.
    """
    x1, x2 = x.unbind(-1)
    valley = 0.05 * (1 - x1).square() + 0.05 * (x2 - x1.square()).square()
    return valley + 0.6 * (torch.exp(-0.2 * _root_mean_square(x)) - _waves(x) + math.e)


def _root_mean_square(x: Tensor) -> Tensor:
    square = x.square().mean(-1)
    # The root's slope at 0 is infinite, and 0 times infinity would be NaN.
    return torch.where(square > 0, square, 1).sqrt() * (square > 0)


def _waves(x: Tensor) -> Tensor:
    return torch.exp(torch.cos(2 * math.pi * x).mean(-1))


def sharpness(values: Tensor, x: Tensor) -> Tensor:
    """Return the largest Hessian eigenvalue at each point, float64 (...,).

    Args:
        values: A surface's values at ``x``, (...,), with the graph that autograd made.
        x: Points, (..., D), that require gradients.
    """
    (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    # Points do not influence each other, so a sum over them keeps their Hessians apart.
    rows = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in slope.unbind(-1)]
    eigenvalues: Tensor = torch.linalg.eigvalsh(torch.stack(rows, -1).double())
    return eigenvalues[..., -1]
