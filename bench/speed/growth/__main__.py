"""Measure how a step grows: `python -m bench.speed.growth`.

Writes bench/results/growth.json and growth.png; with --readme bench/RELIABILITY.md its tables too.
Every point is the median time of steps taken in turns with torch's fused AdamW's, whose growth is
the machine's.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from bench import machine, markdown
from bench.speed import memory
from bench.speed.growth import report
from bench.speed.growth.curves import (
    CURVES,
    THREADED,
    TIMED,
    Size,
    exponent,
    measure,
    speedups,
)

_FOLDER = Path(__file__).parents[2]


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speed.growth", description=__doc__)
    parser.add_argument("--out", type=Path, default=_FOLDER / "results", help="folder")
    parser.add_argument("--readme", type=Path, help="file whose tables to replace")
    parser.add_argument(
        "--rounds", type=int, help="timed steps of a point, instead of each curve's own number"
    )
    return parser.parse_args(arguments)


def _curves(rounds: int | None) -> list[report.Grown]:
    grown = []
    for curve in CURVES:
        seconds = measure(replace(curve, rounds=rounds or curve.rounds))
        grown.append(report.grown(curve.name, curve.values, seconds, exponent))
    return grown


def _speedups(size: Size, rounds: int | None) -> dict[str, report.Quartiles]:
    found = speedups(size, rounds or 25)
    return {name: report.quartiles(ratios) for name, ratios in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parsed = _parse_arguments(arguments)
    parsed.out.mkdir(parents=True, exist_ok=True)
    results = report.Results(
        machine=machine.describe("cpu"),
        versions=machine.versions(),
        curves=_curves(parsed.rounds),
        threads={case: _speedups(size, parsed.rounds) for case, size in THREADED.items()},
        memory={name: memory.growth_in_step(name) for name in tqdm(TIMED, "memory", disable=None)},
    )
    (parsed.out / "growth.json").write_text(json.dumps(asdict(results), indent=1) + "\n")
    report.save_figure(results, parsed.out / "growth.png")
    tables = report.tables(results)
    print(tables)
    if parsed.readme is not None:
        markdown.replace_section(parsed.readme, "growth", tables)


if __name__ == "__main__":
    main()
