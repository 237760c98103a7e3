"""`python -m bench.speed.growth` on tiny sizes, and its fits."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.speed import memory
from bench.speed.growth import __main__ as command
from bench.speed.growth.curves import BASELINE, CURVES, TIMED, Curve, Size, exponent
from tests.support.cases import needs_cpu_backend


@needs_cpu_backend
def test_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times every precision along every curve, draws, and fills the tables in."""
    tiny = [Curve(curve.name, curve.grows, (1, 2)) for curve in CURVES]
    monkeypatch.setattr(command, "CURVES", tiny)
    monkeypatch.setattr(command, "THREADED", {"one tensor": Size()})
    monkeypatch.setattr(memory, "growth_in_step", lambda name: 2**20)
    readme = tmp_path / "RELIABILITY.md"
    readme.write_text("before\n<!-- growth:begin -->\nold\n<!-- growth:end -->\nafter\n")
    command.main(["--rounds", "2", "--out", str(tmp_path), "--readme", str(readme)])
    results = json.loads((tmp_path / "growth.json").read_text())
    assert [len(curve["values"]) for curve in results["curves"]] == [2] * len(CURVES)
    for curve in results["curves"]:
        assert list(curve["seconds"]) == [BASELINE, *TIMED]
        for low, middle, high in curve["seconds"][BASELINE]:
            assert 0 < low <= middle <= high
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    text = readme.read_text()
    assert "old" not in text
    for name in (BASELINE, *TIMED):
        assert text.count(f"| {name} | ") == 2


def test_curves_make_what_they_name() -> None:
    """A point's size differs from the curve's in what grows alone."""
    for curve in CURVES:
        sizes = [curve.at(value) for value in curve.values]
        assert [getattr(size, curve.grows) for size in sizes] == list(curve.values)
        assert len(curve.values) >= 6


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_exponent(power: float) -> None:
    """The fit finds a power, and its interval holds it and shrinks with the noise."""
    values = (1, 10, 100, 1000)
    generator = np.random.default_rng(3)
    widths = []
    for noise in (0.01, 0.1):
        rounds = [
            list(value**power * np.exp(noise * generator.standard_normal(30))) for value in values
        ]
        found, low, high = exponent(values, rounds, resamples=200)
        assert low <= found <= high
        assert found == pytest.approx(power, abs=noise)
        widths.append(high - low)
    assert widths[0] < widths[1] / 3
