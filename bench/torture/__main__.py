"""Run the reliability campaign; write bench/RELIABILITY.md."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.machine import describe
from bench.torture import damage, drift, endurance, fuzz, kill, numbers, operators, scale
from bench.torture.finding import Finding

REPORT = Path(__file__).parents[1] / "RELIABILITY.md"
# Forks come before anything that starts threads.
CAMPAIGNS: tuple[Callable[[bool], Finding], ...] = (
    kill.run,
    damage.run,
    damage.files,
    numbers.run,
    operators.run,
    fuzz.run,
    drift.run,
    scale.many,
    scale.large,
    endurance.leak,
    endurance.threads,
    endurance.forks,
)


def main() -> None:
    """Run every campaign, which raises at the first fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small part, written nowhere")
    quick = parser.parse_args().quick
    findings = []
    for campaign in CAMPAIGNS:
        start = time.monotonic()
        finding = campaign(quick)
        seconds = time.monotonic() - start
        print(
            f"{finding.campaign}: {finding.cases:,} {finding.what}: {finding.result} "
            f"({seconds:.0f} s)",
            flush=True,
        )
        findings.append(finding)
    if not quick:
        REPORT.write_text(_report(findings))


def _report(findings: list[Finding]) -> str:
    machine = describe("cpu")
    rows = [f"| {f.campaign} | {f.cases:,} | {f.what} | {f.result} |" for f in findings]
    return "\n".join(
        (
            "# Reliability",
            "",
            "Written by `make torture`, which ends at the first fault: every case below ended as",
            f"the last column says. {machine['model']}, {machine['cores']} cores, torch "
            f"{torch.__version__}, on the CPU; nothing here was run on a GPU.",
            "",
            "| campaign | cases | of | result of every one |",
            "| --- | ---: | --- | --- |",
            *rows,
            "",
            "`tests/test_faults.py` injects faults into steps.",
            "",
        )
    )


if __name__ == "__main__":
    main()
