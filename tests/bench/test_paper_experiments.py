"""The paper's experiments measure what they say, and verdicts follow the rule."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bench.paper import experiments, figures, report, surfaces
from bench.paper.claims import claims, not_run
from bench.paper.experiments import (
    ACKLEY,
    ACKLEY_BOX,
    ACKLEY_ROSENBROCK,
    BUFFER_STEPS,
    CAPACITIES,
    CELLS,
    DECAYS,
    LANDSCAPES,
    LINE_CAPACITIES,
    PAIR,
    SHARPNESS,
    Buffers,
    Landscape,
    Opposition,
    Outcome,
    at_flat,
    at_zero,
    buffers,
    cancellation,
    flat_sharp_ends,
    loss_and_sharpness,
    opposed_slots,
    outcomes,
    scan,
    table_5_grid,
    uniform,
)
from bench.paper.paper_numbers import FIGURE_5, TABLE_1, TABLE_2, TABLE_5, TABLES_6_TO_8
from bench.paper.results import Results
from bench.paper.statistics import (
    CONTRADICTED,
    HOLDS,
    NOT_RUN,
    UNDECIDED,
    Claim,
    Estimate,
    Interval,
    counted,
    equivalent,
    holm,
    mean_interval,
    paired,
    proportion_interval,
    seed_interval,
    verdicts,
)
from bench.paper.systems import SYSTEMS, Setting

pytestmark = pytest.mark.slow

# Those of the paper's claims, in its order.
_IDS = (
    *("F1-i", "F1-ii", "F1-iii", "F1-iv", "F2", "F3", "F4", "F5-loss", "F5-sharp", "F5-sam", "F6"),
    *("F7-a", "F7-b", "F7-c", "T1-a", "T1-b", "T1-c", "T2-a", "T2-b", "F8L", "F8R", "F9"),
    *("F10a", "F10b", "F10c", "F10d", "F11", "F12i", "F12ii", "F13", "F14", "F15", "F16"),
    *("F17", "F18"),
)


def _claim(estimate: Estimate | None) -> Claim:
    return Claim("F0", "paper", "", "", "—", estimate)


def _estimate(value: float, p: float | None) -> Estimate:
    return Estimate(Interval(value, value - 1, value + 1), p, 20)


def test_verdicts() -> None:
    """P and the sign decide; Holm's correction is over all rows with a p."""
    rows = [
        (_estimate(0.1, 0.001), HOLDS, HOLDS),
        (_estimate(-0.1, 0.01), CONTRADICTED, CONTRADICTED),
        (_estimate(0.1, 0.05), HOLDS, UNDECIDED),
        (_estimate(0.1, 0.06), UNDECIDED, UNDECIDED),
        (counted(3, 9), HOLDS, HOLDS),
        (counted(-1, 9), CONTRADICTED, CONTRADICTED),
        (counted(0, 9), UNDECIDED, UNDECIDED),
        (None, NOT_RUN, NOT_RUN),
    ]
    found = verdicts([_claim(estimate) for estimate, _, _ in rows])
    assert found == [(raw, corrected) for _, raw, corrected in rows]


def test_holm() -> None:
    """The example worked by hand: factors 4, 3, 2, 1, then never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_sign_flip_p_is_exact_for_few_samples() -> None:
    """The p of scipy's permutation test of all sign flips; zeros change nothing."""
    values = np.random.default_rng(0).normal(0.5, 1, 12)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert paired(torch.tensor(values)).p == pytest.approx(expected)
    with_zeros = torch.tensor([*values, 0.0, 0.0])
    assert paired(with_zeros).p == pytest.approx(expected)
    assert paired(torch.zeros(12)) == Estimate(Interval(0, 0, 0), 1.0, 12)


def test_sign_flip_p_of_many_samples() -> None:
    """Drawn flips agree with the t test of normal samples, and have a small floor."""
    values = 0.2 + torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = stats.ttest_1samp(values.numpy(), 0).pvalue
    assert paired(values).p == pytest.approx(expected, rel=0.1)
    assert paired(values + 100).p == pytest.approx(1e-5, rel=0.01)


def test_few_samples_take_the_t_test() -> None:
    """Three seeds: Student's t, whose p the sign flips could not reach."""
    samples = torch.tensor([1.0, 1.1, 1.2])
    found = paired(samples)
    assert found.p == pytest.approx(stats.ttest_1samp(samples.numpy(), 0).pvalue, rel=1e-5)
    assert found.interval == seed_interval(samples)
    # If all samples are equal, two of the eight flips are as large.
    assert paired(torch.ones(3)) == Estimate(Interval(1, 1, 1), 0.25, 3)


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, HOLDS), (0.2, UNDECIDED), (0.5, CONTRADICTED)]
)
def test_equivalent(shift: float, verdict: str) -> None:
    """A mean is zero in effect when it lies within the margin for certain."""
    samples = shift + 0.3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    estimate = equivalent(samples, 0.2)
    assert verdicts([_claim(estimate)])[0][0] == verdict
    assert estimate.interval.low <= estimate.interval.value <= estimate.interval.high <= 0.2
    assert equivalent(torch.zeros(5), 0.2).p == 0


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


def test_opposed_slots() -> None:
    """A slot counts when another one points away from it, whatever their lengths."""
    slots = torch.tensor([[[1.0, 0], [-3, 0.1], [2, 0], [0, 1]], [[1, 0], [0, 1], [1, 1], [2, 0]]])
    assert opposed_slots(slots).tolist() == [3, 0]


@pytest.mark.parametrize("system", PAIR)
def test_buffers_of_the_first_steps(system: str) -> None:
    """Slots are filled one a step, the first with the first gradient, or a tenth of it."""
    starts = uniform((3, 2), (-5, 5), seed=0)
    found = buffers(surfaces.ackley, Setting(system, 0.05, capacity=4), starts, BUFFER_STEPS)
    assert [s.shape for s in found.slots[:6]] == [(3, min(i, 4), 2) for i in range(1, 7)]
    points = starts.clone().requires_grad_()
    share = 1.0 if system == "Adam+CG" else 0.1
    (gradient,) = torch.autograd.grad(surfaces.ackley(points).sum(), points)
    torch.testing.assert_close(found.slots[0][:, 0], share * gradient)
    torch.testing.assert_close(found.items[0], share * gradient)
    late = buffers(surfaces.ackley, Setting(system, 0.05, capacity=4), starts, 2, after=8)
    torch.testing.assert_close(late.slots[-1], found.slots[-1])
    torch.testing.assert_close(late.update_length(), found.update_length()[8:])
    assert found.cosine().shape == (BUFFER_STEPS - 1, 3)


def test_escapes_count_whole_runs() -> None:
    """Every sharpness has the same starts; a run counts when all its coordinates do."""
    setting = Setting("Adam", 0.0)
    ends = flat_sharp_ends([setting], 4, count=50, steps=1)[setting]
    assert ends.shape == (len(SHARPNESS), 50, 4)
    assert (ends == ends[0]).all()
    points = torch.tensor([[[0.05, -0.05], [0.05, -3], [0.6, 0]]])
    assert at_flat(points).tolist() == [[True, True, False]]
    assert at_zero(points).tolist() == [[True, False, False]]


@pytest.mark.parametrize("landscape", [*LANDSCAPES, *ACKLEY], ids=lambda p: f"{p.name} {p.starts}")
def test_landscape_minimum(landscape: Landscape) -> None:
    """No point of a grid around it is lower than the stated minimum."""
    minimum = torch.tensor([landscape.minimum], dtype=torch.float64)
    axis = torch.linspace(-0.3, 0.3, 31, dtype=torch.float64) / landscape.scale
    around = landscape.surface(minimum + torch.cartesian_prod(axis, axis))
    assert around.min() >= landscape.surface(minimum) - 1e-12


def test_equation_12_has_a_minimum_near_the_stated_one() -> None:
    """(2.0, 4.0) is a local minimum of value 0.369 within 0.15 of what the paper states."""
    near = torch.tensor([[2.0, 4.0]], dtype=torch.float64)
    losses, sharpness = loss_and_sharpness(ACKLEY_ROSENBROCK.surface, near)
    assert losses.item() == pytest.approx(0.369, abs=5e-4)
    assert sharpness > 0
    stated = torch.tensor([ACKLEY_ROSENBROCK.minimum], dtype=torch.float64)
    assert (near - stated).norm() < 0.15


def test_outcomes_of_a_step_of_nothing() -> None:
    """Lengths, ends and curves are those of the starts when the learning rate is zero."""
    setting = Setting("Adam+CM", 0.0)
    found = outcomes(ACKLEY[0], [setting], count=5)[setting]
    starts = uniform((5, 2), ACKLEY[0].box, 0)
    torch.testing.assert_close(found.losses, surfaces.ackley(starts))
    torch.testing.assert_close(found.distance, starts.norm(dim=-1))
    assert not found.length.any()
    assert not found.moved.any()
    assert found.curve.shape == (2, experiments.STEPS + 1)
    assert (found.first(2).losses == found.losses[:2]).all()


def test_grid_is_table_5() -> None:
    """Each system has the hyperparameters it has, all combinations once."""
    sizes = {system: len(set(table_5_grid(system))) for system in SYSTEMS}
    assert sizes == {
        "Adam": 36, "Adam+SAM": 108, "Adam+CG": 144, "Adam+CM": 144, "Adam+SAM+CM": 432,
    }  # fmt: skip


def test_scan_has_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan has Table 2's cells of both buffers, and all systems at the large buffer."""
    monkeypatch.setattr(experiments, "STEPS", 2)
    found = scan(LANDSCAPES[0])
    large = {key[1] for key in found if key[2:] == (20, 0.99)}
    assert large == set(SYSTEMS)
    for key in TABLE_2:
        assert (experiments.PACKAGE, *key) in found
        assert found[(experiments.PACKAGE, *key)].setting.package_rules
    assert found[(experiments.CONSTANT, "Adam", 20, 0.99)].setting.drop is None
    assert found[(experiments.BEST, "Adam", 20, 0.99)].setting.lr in TABLE_5["lr"]


def test_paper_numbers() -> None:
    """Tables are whole, and bold cells are the best of their columns."""
    assert len(FIGURE_5) == 8
    assert len(TABLE_1) == 40
    assert len(TABLES_6_TO_8) == 25
    for searched in (False, True):
        column = {key[1]: v.mean for key, v in TABLE_1.items() if key[0] is searched
                  and key[2:] == ("CIFAR-100", "WRN-1")}  # fmt: skip
        assert max(column, key=column.__getitem__) == ("Adam+CM" if searched else "Adam+SAM+CM")


def _made_up_results() -> Results:
    """Results in which systems with momenta are better by one in all, and larger buffers more."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.rand(100, generator=generator)

    def outcome(setting: Setting) -> Outcome:
        # SAM is flatter and higher than Adam.
        own = 0.01 * torch.rand(100, generator=generator)
        bad = noise + own + 5 + 0.1 * ("SAM" in setting.system)
        good = float("CM" in setting.system) + setting.capacity / 100
        sharp = bad - good - 0.3 * ("SAM" in setting.system)
        near = bad - good - 4 * ("CM" in setting.system)
        curve = torch.ones(2, experiments.STEPS + 1)
        return Outcome(setting, bad - good, sharp, good + noise, good + noise, near, curve)

    large = {s: Setting(s, 0.1, *CELLS[-1]) for s in SYSTEMS}
    names = (experiments.MORE_STARTS, experiments.CONSTANT, experiments.BEST, experiments.WIDE)
    settings = {
        (name, system, *cell): replace(large[system], capacity=cell[0], priority_decay=cell[1])
        for name in (*names, experiments.PACKAGE)
        for system in SYSTEMS
        for cell in CELLS
    }
    names = (experiments.PAPER, experiments.DEFAULT_BUFFER, experiments.CONSTANT, experiments.WIDE)
    ackley = {
        (name, system): outcome(setting)
        for name in (*names, experiments.PACKAGE)
        for system, setting in large.items()
    }
    ends = torch.where(torch.arange(8.0)[:, None, None] > 0, 0.0, 1.0).expand(8, 50, 1)
    escaped = {s: ends if "CM" in s else torch.ones(8, 50, 1) for s in SYSTEMS}
    line = torch.tensor([0.0, 1, 1]).expand(2, 3, 3)
    slots = [torch.randn(100, min(i, 5), 2, generator=generator) for i in range(1, 11)]
    found = Buffers(slots, [s[:, -1] for s in slots], [s[:, -1] for s in slots])
    return Results(
        scans={
            (place.name, place.starts): {key: outcome(s) for key, s in settings.items()}
            for place in LANDSCAPES
        },
        ackley={place.starts: ackley for place in ACKLEY},
        escapes={(experiments.PAPER, s): (large[s], escaped[s]) for s in SYSTEMS},
        capacity_escapes={
            (d, s, c, decay): escaped[s]
            for d in (1, 10)
            for s in SYSTEMS
            for c in CAPACITIES
            for decay in DECAYS
        },
        lines={
            (s, c, decay): 0 * line if "CM" in s else line
            for s in SYSTEMS
            for c in LINE_CAPACITIES
            for decay in DECAYS
        },
        first_buffers=dict.fromkeys(PAIR, found),
        opposition=Opposition(torch.full((96, 100), 4.0), {s: outcome(large[s]) for s in SYSTEMS}),
        admission={("Ackley", 5, 0.7): 1.0},
        update_rms={("Ackley", s): 1.0 for s in SYSTEMS},
    )


@pytest.fixture(scope="module")
def made_up() -> Results:
    """Results in which the paper is right."""
    return _made_up_results()


_SAY_BETTER = (
    *("F1-ii", "F1-iii", "F1-iv", "F3", "F4", "F5-loss", "F5-sharp", "F6", "T2-a", "T2-b", "F11"),
    "F13",
)


def test_claims_have_the_paper_s_sign(made_up: Results) -> None:
    """Where critical momenta are better in everything, a claim that says so holds."""
    # The rows of F1-iii on critical gradients do not hold: those are made up as Adam is.
    rows = [
        claim
        for claim in claims(made_up)
        if claim.id in _SAY_BETTER and not claim.measure.startswith("path length, Adam+CG")
    ]
    found = zip(rows, verdicts(rows), strict=True)
    assert {claim.id for claim in rows} == set(_SAY_BETTER)
    assert [claim for claim, (raw, _) in found if raw != HOLDS] == []


def test_report_has_every_claim(made_up: Results, tmp_path: Path) -> None:
    """Each id has a row in the CSV and a section; what needs data says which and how."""
    report.save_all(made_up, ["figure.png"], tmp_path)
    with (tmp_path / "claims.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["id"] for row in rows} == set(_IDS)
    text = (tmp_path / "REPORT.md").read_text()
    for part in _IDS:
        assert f"### {part}\n" in text
        assert f"| {part} |" in text
    assert "![figure](figure.png)" in text
    missing = [row for row in rows if row["verdict"] == NOT_RUN]
    assert all("python -m bench.paper.train" in row["needs"] for row in missing)
    assert {row["setting"] for row in missing} == {"paper"}


def test_a_claim_that_was_decided_is_not_missing() -> None:
    """A row at the paper's own setting replaces "not run"; a stand-in does not."""
    everything = {claim.id for claim in not_run([])}
    decided = replace(_claim(_estimate(1, 0.01)), id="F7-a")
    assert {claim.id for claim in not_run([decided])} == everything - {"F7-a"}
    stand_in = replace(decided, setting="stand-in")
    assert {claim.id for claim in not_run([stand_in])} == everything


def test_figures(made_up: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is written."""
    monkeypatch.setattr(experiments, "STEPS", 3)
    monkeypatch.setattr(figures, "_POINTS", 20)
    monkeypatch.setattr(figures, "OPPOSITION_STEPS", 8)
    names = figures.save_all(made_up, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_uniform_is_its_seed_s() -> None:
    """Starts are in the box, the same every time, and torch's generator is not touched."""
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draw = partial(uniform, (20, 2), (-ACKLEY_BOX, ACKLEY_BOX))
    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()
    assert draw(0).abs().max() <= ACKLEY_BOX
    assert (torch.get_rng_state() == state).all()
