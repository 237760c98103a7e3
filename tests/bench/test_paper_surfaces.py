"""The toy surfaces have their published values and minima, and the batch runs what it says."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.paper import surfaces
from bench.paper.systems import BUFFERED, SYSTEMS, PaperAdam, Setting, Surface, run
from cm_fused import SAM, AdamCG, AdamCM
from cm_fused.compat.cmoptimizer import Adam_C, Adam_CM


def _point(*coordinates: float) -> Tensor:
    return torch.tensor(coordinates, dtype=torch.float64)


# Values written down from the definitions with a calculator, minima from the literature.
@pytest.mark.parametrize(
    ("surface", "point", "value"),
    [
        (surfaces.ackley, (0.0, 0.0), 0.0),
        (surfaces.ackley, (1.0, 1.0), 20 - 20 * math.exp(-0.2)),
        (surfaces.ackley, (0.5,), 20 - 20 * math.exp(-0.1) + math.e - math.exp(-1)),
        (surfaces.goldstein_price, (0.0, -1.0), (math.log(3) - 8.693) / 2.427),
        # The original's published local minima: 30, 84 and 840.
        (surfaces.goldstein_price, (-0.6, -0.4), (math.log(30) - 8.693) / 2.427),
        (surfaces.goldstein_price, (1.8, 0.2), (math.log(84) - 8.693) / 2.427),
        (surfaces.goldstein_price, (1.2, 0.8), (math.log(840) - 8.693) / 2.427),
        (surfaces.levy, (1.0, 1.0), 0.0),
        (surfaces.levy, (5.0, 1.0), 1 + 10 * math.sin(2 * math.pi + 1) ** 2),
        (surfaces.levy, (1.0, 5.0, 3.0), 1 + 10 * math.sin(1) ** 2 + 0.25),
        (surfaces.ackley_rosenbrock, (1.0, 1.0), 0.6 * math.exp(-0.2)),
        (surfaces.ackley_rosenbrock, (0.0, 0.0), 0.05 + 0.6),
        (surfaces.ackley_rosenbrock, (2.0, 4.0), 0.05 + 0.6 * math.exp(-0.2 * math.sqrt(10))),
    ],
)
def test_value(surface: Surface, point: tuple[float, ...], value: float) -> None:
    """A surface has its published value at a point."""
    torch.testing.assert_close(surface(_point(*point)), _point(value)[0], atol=1e-12, rtol=1e-12)


def test_goldstein_price_minimum() -> None:
    """The log-scaled form's minimum is the published -3.129, lower than a grid around it."""
    lowest = surfaces.goldstein_price(_point(0.0, -1.0))
    assert round(lowest.item(), 3) == -3.129
    axis = torch.linspace(-2, 2, 201, dtype=torch.float64)
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


_STARTS = torch.tensor([[0.3, -1.2], [2.0, 4.0], [-3.0, 0.1]], dtype=torch.float64)
_STEPS = 20
_SETTINGS = [
    *(Setting(system, 0.05, 2, drop=_STEPS // 2) for system in SYSTEMS),
    *(Setting(system, 0.05, 2, drop=_STEPS // 2, package_rules=True) for system in BUFFERED),
]


def _name(setting: Setting) -> str:
    return f"{setting.system}, package" if setting.package_rules else setting.system


def _ends(setting: Setting, starts: Tensor = _STARTS) -> Tensor:
    return run(surfaces.ackley, starts, [setting], _STEPS)[setting].ends


@pytest.mark.parametrize("setting", _SETTINGS, ids=_name)
def test_a_run_does_not_know_of_the_others(setting: Setting) -> None:
    """A run among three starts and several settings ends where it ends alone."""
    others = [
        replace(setting, lr=0.01),
        replace(setting, betas=(0.8, 0.99)),
        replace(setting, drop=None),
    ]
    found = run(surfaces.ackley, _STARTS, [*others, setting], _STEPS)
    for i in range(len(_STARTS)):
        alone = _ends(setting, _STARTS[i : i + 1])
        torch.testing.assert_close(found[setting].ends[i], alone[0], rtol=1e-12, atol=1e-12)
    assert len({tuple(r.ends.flatten().tolist()) for r in found.values()}) == len(found)


def _public(setting: Setting, param: Tensor) -> torch.optim.Optimizer:
    """Return the optimizer as a user would make it, with its default priority scope."""
    groups = [{"params": [param], "lr": setting.lr, "betas": setting.betas}]
    if not setting.has_buffer:
        optimizer: torch.optim.Optimizer = PaperAdam(groups)
    elif setting.package_rules:
        of_package = Adam_C if setting.system == "Adam+CG" else Adam_CM
        optimizer = of_package(groups, topC=setting.capacity, decay=setting.priority_decay)
    else:
        ours = AdamCG if setting.system == "Adam+CG" else AdamCM
        optimizer = ours(groups, capacity=setting.capacity)
    return SAM(optimizer, setting.rho) if setting.has_sam else optimizer


@pytest.mark.parametrize("setting", _SETTINGS, ids=_name)
def test_batch_is_the_public_optimizer(setting: Setting) -> None:
    """A run ends where the optimizer, used as a user would, takes it; the schedule included."""
    param = _STARTS[0].clone().requires_grad_()
    optimizer = _public(setting, param)

    def closure() -> float:
        optimizer.zero_grad()
        loss = surfaces.ackley(param)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = setting.lr / (10 if step >= _STEPS // 2 else 1)
        closure()  # PaperAdam takes no closure
        optimizer.step(closure if setting.has_sam else None)
    torch.testing.assert_close(_ends(setting)[0], param.detach(), rtol=1e-10, atol=1e-10)


def test_adam_has_eps_inside_of_the_root() -> None:
    """Two steps of Adam by hand, where eps counts."""
    surface: Surface = lambda x: 1e-4 * x.square().sum(-1)  # noqa: E731
    setting = Setting("Adam", 0.1)
    x, m, v = 1.0, 0.0, 0.0
    for t in (1, 2):
        g = 2e-4 * x
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x -= 0.1 * m / (1 - 0.9**t) / math.sqrt(v / (1 - 0.99**t) + 1e-8)
    end = run(surface, torch.ones(1, 1, dtype=torch.float64), [setting], 2)[setting].ends
    torch.testing.assert_close(end.item(), x, rtol=1e-12, atol=0)


def test_run_records() -> None:
    """Losses stand before every step and at the end; the length is that of the path."""
    setting = Setting("Adam+CM", 0.05)
    found = run(surfaces.ackley, _STARTS, [setting], 7, with_path=True)[setting]
    assert found.path.shape == (8, 3, 2)
    assert (found.path[0] == _STARTS).all()
    torch.testing.assert_close(found.losses, surfaces.ackley(found.path))
    torch.testing.assert_close(found.length, found.path.diff(dim=0).norm(dim=-1).sum(0))
