"""`python -m bench.speed.precision`, as its README section says, on tiny sizes."""

import json
from pathlib import Path

import pytest

from bench.speed.precision.__main__ import main
from bench.speed.precision.report import deviation
from bench.speed.precision.setups import BASELINE, PRECISIONS, TIMED
from bench.speed.precision.train import Run
from tests.support.cases import needs_cpu_backend

SECTIONS = ("precision", "timed")


@needs_cpu_backend
def test_whole(tmp_path: Path) -> None:
    """Trains, times, draws, fills the table in; a second call trains only what is new."""
    readme = tmp_path / "README.md"
    sections = (f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in SECTIONS)
    readme.write_text("\n".join(["before", *sections, "after\n"]))
    call = ["--tasks", "digits conv", "--steps", "3", "--numel", "5000", "--rounds", "2"]
    main([*call, "--seeds", "2", "--out", str(tmp_path), "--readme", str(readme)])
    runs = (tmp_path / "runs.jsonl").read_text()
    assert len(runs.splitlines()) == 2 * len(PRECISIONS)
    for line in runs.splitlines():
        run = Run(**json.loads(line))
        assert len(run.distances) == 3
        assert (run.precision == BASELINE) == (max(run.distances) == 0)
    assert (tmp_path / "distances.png").stat().st_size > 10_000
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for name in (*PRECISIONS, *TIMED):
        assert f"| {name} | " in text
    main([*call, "--seeds", "3", "--out", str(tmp_path)])
    again = (tmp_path / "runs.jsonl").read_text()
    assert again.startswith(runs)
    assert len(again.splitlines()) == 3 * len(PRECISIONS)


def test_deviation() -> None:
    """In standard deviations of float32's losses over the seeds."""

    def run(precision: str, loss: float) -> Run:
        return Run("digits conv", precision, 0, 0.0, loss, [])

    runs = [run(BASELINE, 1.0), run(BASELINE, 3.0), run("int8 slots", 3.0), run("int8 slots", 5.0)]
    assert deviation(runs, "digits conv", "int8 slots") == pytest.approx(2 / 2**0.5)
