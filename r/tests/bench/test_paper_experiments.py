"""The paper's experiments measure what they say, and verdicts follow the rule."""

import csv
from pathlib import Path

import pytest
import torch

from bench.paper import report, surfaces
from bench.paper.claims import claims
from bench.paper.experiments import (
    GOLDSTEIN_PRICE,
    GOLDSTEIN_PRICE_MINIMA,
    LEVY,
    WIDE_GOLDSTEIN_PRICE,
    Landscape,
    Outcome,
    cancellation,
    escapes,
    loss_and_sharpness,
    slot_paths,
    uniform,
)
from bench.paper.results import (
    BUFFER_RATES,
    DECAYS,
    DIMENSIONS,
    LANDSCAPES,
    TABLE_CAPACITIES,
    Results,
)
from bench.paper.statistics import (
    Claim,
    Interval,
    mean_interval,
    proportion_interval,
    seed_interval,
)
from bench.paper.systems import BUFFERED, SYSTEMS, Setting

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.1, 0.3, "reproduced in direction"),
        (-0.1, 0.3, "not reproduced"),
        (0.0, 0.3, "not reproduced"),
        (-0.3, -0.1, "contradicted"),
    ],
)
def test_verdict(low: float, high: float, verdict: str) -> None:
    """The interval alone decides."""
    assert Claim("Fig. 0", "", "", Interval(0.1, low, high)).verdict == verdict


def test_mean_interval() -> None:
    """Near the normal interval for many samples, a point for equal ones, the same every time."""
    samples = torch.randn(400, generator=torch.Generator().manual_seed(0))
    interval = mean_interval(samples)
    half = 1.96 * samples.std().item() / 20
    assert interval.value == pytest.approx(samples.mean().item())
    assert interval.low == pytest.approx(interval.value - half, abs=0.15 * half)
    assert interval.high == pytest.approx(interval.value + half, abs=0.15 * half)
    assert mean_interval(samples) == interval
    assert mean_interval(torch.ones(5)) == Interval(1.0, 1.0, 1.0)


def test_proportion_interval() -> None:
    """Wilson's interval of 1 in 10, from its formula."""
    interval = proportion_interval(torch.arange(10) == 0)
    assert interval.value == 0.1
    assert interval.low == pytest.approx(0.01788, abs=1e-5)
    assert interval.high == pytest.approx(0.40415, abs=1e-5)


def test_seed_interval() -> None:
    """Student's t with two degrees of freedom: 4.303 standard errors."""
    interval = seed_interval(torch.tensor([1.0, 2.0, 3.0]))
    assert interval.value == 2
    assert interval.high - 2 == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    assert 2 - interval.low == pytest.approx(4.30265 / 3**0.5, rel=1e-5)


def test_cancellation() -> None:
    """Parallel slots keep all, opposite ones nothing, orthogonal ones 1/sqrt(2)."""
    slots = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [-1, 0]], [[1, 0], [0, 1]]])
    torch.testing.assert_close(cancellation(slots), torch.tensor([0, 1, 1 - 2**-0.5]))


@pytest.mark.parametrize("system", BUFFERED)
def test_slots_of_the_first_steps(system: str) -> None:
    """Slots are filled one a step, the first with the first gradient, or a tenth of it."""
    starts = uniform((3, 2), (-5, 5), seed=0)
    slots = slot_paths(Setting(system, 0.05, capacity=4), starts)
    assert [s.shape for s in slots[:6]] == [(3, min(i, 4), 2) for i in range(1, 7)]
    points = starts.clone().requires_grad_()
    share = 1.0 if system == "Adam+CG" else 0.1
    (gradient,) = torch.autograd.grad(surfaces.ackley(points).sum(), points)
    torch.testing.assert_close(slots[0][:, 0], share * gradient)


def test_escapes_counts_coordinates() -> None:
    """Without a step the shares are those of the starts; every sharpness has the same starts."""
    shares = escapes(Setting("Adam", 0.05), 4, sharpness=(2.0, 3.0), steps=0)
    assert shares.shape == (2, 50)
    assert (shares[0] == shares[1]).all()
    assert 0.4 < shares.mean() < 0.7
    assert set(shares.flatten().tolist()) <= {0, 0.25, 0.5, 0.75, 1}


@pytest.mark.parametrize("landscape", [GOLDSTEIN_PRICE, WIDE_GOLDSTEIN_PRICE, LEVY])
def test_landscape_minimum(landscape: Landscape) -> None:
    """The gradient vanishes at the stated minimum, the curvature is positive."""
    points = torch.tensor([landscape.minimum], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(landscape.surface(points).sum(), points)
    assert gradient.abs().max() < 1e-9
    assert loss_and_sharpness(landscape, points)[1] > 0


def test_goldstein_price_minima() -> None:
    """All four listed are stationary."""
    points = torch.tensor(GOLDSTEIN_PRICE_MINIMA, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(GOLDSTEIN_PRICE.surface(points).sum(), points)
    assert gradient.abs().max() < 1e-9


def _made_up_results() -> Results:
    """Results in which Adam+CM is better by one in everything."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(50, generator=generator)

    def better(system: str) -> torch.Tensor:
        return noise + (system == "Adam+CM")

    def outcome(system: str) -> Outcome:
        return Outcome(Setting(system, 0.1), -better(system), -better(system))

    names = [landscape.name for landscape in LANDSCAPES]
    ramp = torch.arange(8.0)[:, None]
    return Results(
        escape={(s, d): better(s) + ramp for s in SYSTEMS for d in DIMENSIONS},
        escape_capacity={
            (s, c): better(s) + c + 0 * ramp for s in BUFFERED for c in (1, 2, 5, 10, 20, 50)
        },
        escape_variants={("none", s): better(s) + ramp for s in SYSTEMS},
        cancelled={(s, lr): -better(s) for s in BUFFERED for lr in BUFFER_RATES},
        best={(n, s): outcome(s) for n in names for s in SYSTEMS},
        grid={
            (n, s, c, d): outcome(s)
            for n in names
            for s in BUFFERED
            for c in TABLE_CAPACITIES
            for d in DECAYS
        },
        distances={(n, s): -better(s) for n in names for s in SYSTEMS},
    )


def test_claims_have_the_paper_s_sign(tmp_path: Path) -> None:
    """Where Adam+CM is better in everything every claim is reproduced, and the report says so."""
    results = _made_up_results()
    assert {claim.verdict for claim in claims(results)} == {"reproduced in direction"}
    report.save_all(results, ["figure.png"], tmp_path)
    with (tmp_path / "claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(claims(results))
    text = (tmp_path / "REPORT.md").read_text()
    assert f"Of {len(rows)}: {len(rows)} reproduced in direction." in text
    assert "![figure](figure.png)" in text
