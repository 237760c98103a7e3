"""The toy surfaces have their published values and minima, and the batch runs what it says."""

import math

import pytest
import torch
from torch import Tensor

from bench.paper import surfaces
from bench.paper.systems import BUFFERED, SYSTEMS, Batch, Setting, Surface, trajectory
from cm_fused import SAM


def _point(*coordinates: float) -> Tensor:
    return torch.tensor(coordinates, dtype=torch.float64)


# Values written down from the definitions with a calculator, minima from the literature.
@pytest.mark.parametrize(
    ("surface", "point", "value"),
    [
        (surfaces.ackley, (0.0, 0.0), 0.0),
        (surfaces.ackley, (1.0, 1.0), 20 - 20 * math.exp(-0.2)),
        (surfaces.ackley, (0.5,), 20 - 20 * math.exp(-0.1) + math.e - math.exp(-1)),
        (surfaces.goldstein_price, (0.5, 0.25), (math.log(3) - 8.693) / 2.427),
        # The original's published local minima: 30, 84 and 840.
        (surfaces.goldstein_price, (0.35, 0.4), (math.log(30) - 8.693) / 2.427),
        (surfaces.goldstein_price, (0.95, 0.55), (math.log(84) - 8.693) / 2.427),
        (surfaces.goldstein_price, (0.8, 0.7), (math.log(840) - 8.693) / 2.427),
        (surfaces.levy, (1.0, 1.0), 0.0),
        (surfaces.levy, (5.0, 1.0), 1 + 10 * math.sin(2 * math.pi + 1) ** 2),
        (surfaces.levy, (1.0, 5.0, 3.0), 1 + 10 * math.sin(1) ** 2 + 0.25),
        (surfaces.rosenbrock, (1.0, 1.0), 0.0),
        (surfaces.rosenbrock, (-1.0, 2.0), 104.0),
        (surfaces.ackley_rosenbrock, (1.0, 1.0), 20 - 20 * math.exp(-0.2)),
    ],
)
def test_value(surface: Surface, point: tuple[float, ...], value: float) -> None:
    """A surface has its published value at a point."""
    torch.testing.assert_close(surface(_point(*point)), _point(value)[0], atol=1e-12, rtol=1e-12)


def test_goldstein_price_minimum() -> None:
    """The log-scaled form's minimum is the published -3.129, lower than a grid around it."""
    lowest = surfaces.goldstein_price(_point(0.5, 0.25))
    assert round(lowest.item(), 3) == -3.129
    axis = torch.linspace(0, 1, 201, dtype=torch.float64)
    assert surfaces.goldstein_price(torch.cartesian_prod(axis, axis)).min() >= lowest


@pytest.mark.parametrize(
    ("surface", "minimum", "box"),
    [(surfaces.ackley, (0.0, 0.0), 5.0), (surfaces.levy, (1.0, 1.0), 10.0)],
)
def test_global_minimum(surface: Surface, minimum: tuple[float, float], box: float) -> None:
    """Nowhere on a grid is a surface below its published minimum."""
    axis = torch.linspace(-box, box, 401, dtype=torch.float64)
    assert surface(torch.cartesian_prod(axis, axis)).min() >= surface(_point(*minimum)) - 1e-12


def test_ackley_has_a_gradient_at_the_origin() -> None:
    """A run that hits the minimum stays there, where autograd of the root alone gives NaN."""
    origin = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(surfaces.ackley(origin).sum(), origin)
    assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dimension", [1, 10])
def test_flat_sharp(dimension: int) -> None:
    """Both minima have value 0, and curvatures 2 and 2s, each point with a sharpness of its own."""
    flat = torch.zeros(2, dimension, dtype=torch.float64, requires_grad=True)
    sharp = torch.ones(2, dimension, dtype=torch.float64, requires_grad=True)
    s = _point(3.0, 7.0)
    assert surfaces.flat_sharp(flat, s).tolist() == [0, 0]
    assert surfaces.flat_sharp(sharp, s).tolist() == [0, 0]
    assert surfaces.sharpness(surfaces.flat_sharp(flat, s), flat).tolist() == [2, 2]
    assert surfaces.sharpness(surfaces.flat_sharp(sharp, s), sharp).tolist() == [6, 14]


def test_sharpness_of_a_quadratic() -> None:
    """The largest eigenvalue of a known Hessian, whose off-diagonal counts."""
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    values = x[:, 0].square() + x[:, 1].square() + x[:, 0] * x[:, 1]
    torch.testing.assert_close(surfaces.sharpness(values, x), _point(3.0, 3.0, 3.0))


@pytest.mark.parametrize("system", SYSTEMS)
def test_batch_is_its_runs(system: str) -> None:
    """A run in a batch of three has the path it has alone."""
    starts = torch.tensor([[0.3, -1.2], [2.0, 4.0], [-3.0, 0.1]], dtype=torch.float64)
    setting = Setting(system, lr=0.05, capacity=2)
    together = trajectory(surfaces.ackley, starts, setting, 40)
    for i in range(3):
        alone = trajectory(surfaces.ackley, starts[i : i + 1], setting, 40)
        torch.testing.assert_close(together[:, i], alone[:, 0], rtol=1e-12, atol=1e-12)
    assert (together[-1] != together[-2]).all()


@pytest.mark.parametrize("system", SYSTEMS)
def test_batch_is_the_public_optimizer(system: str) -> None:
    """A run has the path of the optimizer used as a user would, with its default scope."""
    start = torch.tensor([0.3, -1.2], dtype=torch.float64)
    path = trajectory(surfaces.ackley, start[None], Setting(system, lr=0.05), 40)
    param = start.clone().requires_grad_()
    if system in BUFFERED:
        optimizer: torch.optim.Optimizer = BUFFERED[system]([param], lr=0.05)
    else:
        optimizer = torch.optim.Adam([param], lr=0.05, betas=(0.9, 0.99))
        optimizer = SAM(optimizer) if system == "Adam+SAM" else optimizer

    def closure() -> float:
        optimizer.zero_grad()
        loss = surfaces.ackley(param)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    for _ in range(40):
        optimizer.step(closure)
    torch.testing.assert_close(path[-1, 0], param.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("system", SYSTEMS)
def test_batch_of_settings_is_its_settings(system: str) -> None:
    """Settings that share a batch have the paths they have alone."""
    starts = torch.tensor([[0.3, -1.2], [2.0, 4.0]], dtype=torch.float64)
    settings = [Setting(system, 0.05, 2, 0.7), Setting(system, 0.01, 5, 0.99)]
    batch = Batch(surfaces.ackley, starts.repeat(2, 1), *settings)
    for _ in range(40):
        batch.step()
    for setting, points in zip(settings, batch.points.detach().chunk(2), strict=True):
        torch.testing.assert_close(points, trajectory(surfaces.ackley, starts, setting, 40)[-1])
