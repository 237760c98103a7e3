"""The timing loop, the tables of results, and what stands in the README."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from bench.speed import cases, predict, report
from bench.speed.precision import report as precision_report
from bench.speed.precision.timing import Cost
from bench.speed.precision.train import Run
from bench.timing import MIN_ROUNDS, Step, Timed, interleave
from tests.support.cases import ROOT, needs_proc, needs_triton

RESULTS = ROOT / "bench" / "results" / "cpu-amd-epyc-2core-torch2.13.0.json"
PRECISION = ROOT / "bench" / "speed" / "precision" / "results"


def test_steps_take_turns() -> None:
    """Every round takes each step once, in order, after what is not timed."""
    taken: list[str] = []
    steps: dict[str, Step] = {name: lambda name=name: taken.append(name) for name in "ab"}  # type: ignore[misc]
    timed = interleave(steps, 2, warm_up=1, before_round=lambda: taken.append("-"))
    assert "".join(taken) == "-ab-ab-ab"
    assert {name: len(seconds) for name, seconds in timed.seconds.items()} == {"a": 2, "b": 2}


def test_rounds_that_take_long_end_early() -> None:
    """At the earliest after so many that a median says something."""
    timed = interleave({"a": lambda: None}, 100, most_seconds=0.0)
    assert len(timed.seconds["a"]) == MIN_ROUNDS


def test_ratios_are_those_of_a_round() -> None:
    """The median of the ratios, not the ratio of the medians."""
    timed = Timed({"own": [2.0, 9.0, 4.0], "baseline": [1.0, 3.0, 8.0]})
    assert timed.ratios("own", "baseline") == [2.0, 3.0, 0.5]
    assert timed.ratio("own", "baseline") == 2.0
    assert timed.median("own") == 4.0


def test_another_clock() -> None:
    """What takes a round says how long each step took."""

    def take(steps: Mapping[str, Step]) -> dict[str, float]:
        return dict.fromkeys(steps, 3.0)

    assert interleave({"a": lambda: None}, 2, take_round=take).seconds == {"a": [3.0, 3.0]}


def test_readme_has_the_committed_results() -> None:
    """The tables of README and docs are those that the committed results give."""
    pages = (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    readme = "".join(page.read_text() for page in pages)
    measured = [json.loads(path.read_text()) for path in RESULTS.parent.glob("cpu-*.json")]
    assert all(report.main_table(results) in readme for results in measured)
    assert any(report.summary_table(results) in readme for results in measured)
    runs = [Run(**json.loads(line)) for line in (PRECISION / "runs.jsonl").read_text().splitlines()]
    found = json.loads((PRECISION / "costs.json").read_text())
    costs = [Cost(**cost) for cost in found["costs"]]
    assert precision_report.table(runs, costs, found["machine"]) in readme
    assert precision_report.timed_table(costs, found["machine"]) in readme


def test_report_says_what_was_left_out_and_missed() -> None:
    """A target that was not measured is not one that was met."""
    results = json.loads(RESULTS.read_text())
    of_target = ("one 30 M tensor", "AdamCM C=5", "replacing")
    (case,) = (
        each
        for each in results["cases"]
        if (each["workload"], each["provider"], each["regime"]) == of_target
    )
    case["ratio_to_fused_adamw"]["median"] = 1.56
    text = report.markdown_report(results)
    assert "- 1000 tensors of 256, AdamCM C=5 compiled: unrolled over" in text
    target = "| time ratio, one 30 M tensor, C=5, replacing |"
    assert f"{target} 1.560 | 1.650 | met |" in text
    results["cases"] = [c for c in results["cases"] if c["workload"] != "one 30 M tensor"]
    assert f"{target} not measured | 1.650 | - |" in report.targets_table(results)


@pytest.mark.parametrize(
    ("regimes", "empty_tables"), [((), 2), (("filling",), 1), (("no buffer",), 1)]
)
def test_report_of_few_cases(regimes: tuple[str, ...], empty_tables: int) -> None:
    """Where the time was up before any case of a table was measured, the table says so."""
    results = json.loads(RESULTS.read_text())
    results["cases"] = [case for case in results["cases"] if case["regime"] in regimes]
    text = report.markdown_report(results)
    assert ("(no pairs)" in text) == ("no buffer" not in regimes)
    assert text.count("Nothing was measured.") == empty_tables


def test_smoke_results_stay_out_of_the_readme(tmp_path: Path) -> None:
    """Tiny sizes prove nothing; a file without the table's place is named."""
    results = json.loads(RESULTS.read_text())
    with pytest.raises(ValueError, match="those of a full run"):
        report.update_readme({**results, "smoke": True}, tmp_path / "README.md", RESULTS.stem)
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(
        ValueError, match=r"README.md must have the lines <!-- cpu-amd-.*:begin -->"
    ):
        report.update_readme(results, tmp_path / "README.md", RESULTS.stem)


def test_cuda_page_has_the_predictions() -> None:
    """The page's table is what the model of a GPU gives, or was measured beside it."""
    page = (ROOT / "docs" / "cuda.md").read_text()
    measured = [json.loads(path.read_text()) for path in RESULTS.parent.glob("*-torch*.json")]
    on_gpu = [results for results in measured if results["device"]["type"] == "cuda"]
    assert predict.assumptions() in page
    assert any(predict.table(results) in page for results in (None, *on_gpu))


def test_predictions_take_the_measured_times() -> None:
    """Each case stands in its row; what was not measured stays empty."""
    case = json.loads(RESULTS.read_text())["cases"][0]
    ratio = {"median": 1.58, "quartiles": [1.5, 1.6]}
    case |= {"workload": "one 30 M tensor", "provider": "AdamCM C=5", "regime": "replacing"}
    case |= {"seconds": 3e-4, "baseline_seconds": 1.9e-4, "ratio_to_fused_adamw": ratio}
    lines = predict.table({"cases": [case]}).splitlines()
    assert lines[2].startswith("| one 30 M tensor, AdamW fused |")
    assert "| 190 | 1.00 | 1.00 |" in lines[2]
    assert lines[3].startswith("| one 30 M tensor, AdamCM C=5 |")
    assert lines[3].endswith("| 1.58 |")
    assert lines[4].endswith("|  |")


@needs_triton
def test_predictions_have_the_registers_of_launches() -> None:
    """The waves are those of the registers that the pass is compiled for."""
    variants = importlib.import_module("cm_fused._backends.triton.variants")
    tl = importlib.import_module("triton.language")
    single, half, byte = tl.float32, tl.bfloat16, tl.int8
    options = variants.launch_options(single, single, single, False, 0)
    assert options["maxnreg"] == predict.PASS_REGISTERS["float32"]
    for moments, slots in ((single, half), (single, byte), (half, byte)):
        options = variants.launch_options(single, moments, slots, False, 5)
        state = "scaled" if slots is byte else "rounded"
        assert options["maxnreg"] == predict.PASS_REGISTERS[state]


@pytest.mark.slow
@needs_proc
def test_what_was_measured_is_written_down(tmp_path: Path) -> None:
    """A run that is asked to end writes the cases it has, and says why the others are missing."""
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "bench.speed", "--smoke", "--device=cpu", f"--out={out}"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, text=True) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if " | " in line)
        run.terminate()
        run.stdout.read()
    assert run.returncode != 0
    results = json.loads(out.read_text())
    assert results["cases"]
    assert results["memory"] == []
    assert any("cut off" in entry["reason"] for entry in results["left_out"])


def test_rivals_are_left_out_where_they_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library to compare with need not be there; the results say which was not."""
    monkeypatch.setattr(cases, "find_spec", lambda package: None)
    left_out = {case.left_out for case in cases.cases("cpu", True) if "8bit" in case.provider.name}
    assert left_out == {
        f"{package} is not installed: make bench installs it"
        for package in ("bitsandbytes", "torchao")
    }
