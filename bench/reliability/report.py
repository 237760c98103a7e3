"""The campaign's figures as Markdown."""

import json
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe
from bench.reliability.finding import Finding

RESULTS = Path(__file__).parents[1] / "results"


def report(findings: list[Finding]) -> str:
    """Return bench/RELIABILITY.md: a table of the findings, and what the sanitizers found."""
    machine = describe("cpu")
    rows = [f"| {f.campaign} | {f.cases:,} | {f.what} | {f.result} |" for f in findings]
    return "\n".join(
        (
            "# What the reliability campaigns found",
            "",
            "Written by `make torture`. A campaign ends at the first fault, so every case had the",
            f"result in the last column. {machine['model']}, {machine['cores']} cores, torch "
            f"{torch.__version__}, on the CPU. Nothing here was run on a GPU.",
            "",
            "| campaign | cases | of | result of every one |",
            "| --- | ---: | --- | --- |",
            *rows,
            "",
            "`tests/backends/test_faults.py` makes a step fail at every operator call (every",
            "eleventh of the reference, every third of the research package) and at every",
            "allocation within the C++ operator. Nothing is changed then.",
            "",
            *_sanitizers(),
            *_growth(),
        )
    )


def _sanitizers() -> list[str]:
    """Return what `make sanitize` last wrote."""
    found = json.loads((RESULTS / "sanitizers.json").read_text())
    rows = [
        f"| {run['tool']} | {run['what']} | {run['passed']} | {_outcome(run)} | {run['commit']} |"
        for run in found["runs"]
    ]
    return [
        "## Sanitizers",
        "",
        f"Written by `make sanitize` with {found['compiler']}.",
        "[Its list](reliability/native/suite.py) says what is left out, and why.",
        "",
        "| tool | ran | passed | findings | commit |",
        "| --- | --- | ---: | --- | --- |",
        *rows,
        "",
    ]


def _outcome(run: dict[str, Any]) -> str:
    count = len(run["findings"])
    if run["expected"]:
        return f"{count}, planted"
    return "failed" if run["failed"] else str(count)


def _growth() -> list[str]:
    """Return what `python -m bench.speed.growth` last wrote."""
    found = json.loads((RESULTS / "growth.json").read_text())
    rows = [
        f"| {curve['curve']['name']} | {curve['curve']['values'][0]:,} to "
        f"{curve['curve']['values'][-1]:,} | {curve['exponents']['AdamCM']:.2f} | "
        f"{curve['exponents']['AdamW']:.2f} |"
        for curve in found["curves"]
    ]
    return [
        "## Growth of a step's time",
        "",
        "Written by `python -m bench.speed.growth`: the exponent p of the best fit time ~ x^p.",
        "1 is linear, 0 is constant.",
        f"{found['machine']['model']}, {found['machine']['threads']} threads.",
        "",
        "| x | values | AdamCM | fused AdamW |",
        "| --- | --- | ---: | ---: |",
        *rows,
        "",
        "![growth](results/growth.png)",
        "",
    ]
