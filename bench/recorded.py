"""Draw what a `Recorder` has written: ``python -m bench.recorded FILE.csv``."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from cm_fused.diagnostics import ALL

QUANTITIES = ("agreement", "admission_rate", "mean_age", "variance", "update_rms", "distance")
# Quantities that change by orders of magnitude.
_LOGARITHMIC = ("variance", "update_rms")
_COLUMNS = 2

Series = dict[str, list[tuple[float, float]]]


def read_series(path: Path, quantity: str, parameters: Sequence[str]) -> Series:
    """Return a quantity's pairs of step and value, by parameter.

    Raises:
        ValueError: The file has no such quantity or parameter.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{path} must have a record at least; did the run take `every` steps?")
    _check("quantity", quantity, list(rows[0])[2:])
    for parameter in parameters:
        _check("parameter", parameter, list(dict.fromkeys(row["parameter"] for row in rows)))
    return {
        parameter: [
            (float(row["step"]), float(row[quantity]))
            for row in rows
            if row["parameter"] == parameter
        ]
        for parameter in parameters
    }


def _check(role: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"{role} must be one of {', '.join(known)}, got {name!r}")


def save_figure(
    path: Path, out: Path, quantities: Sequence[str], parameters: Sequence[str]
) -> None:
    """Draw quantities over the steps, a panel for each, a line for each parameter."""
    lines = -(-len(quantities) // _COLUMNS)
    figure = Figure(figsize=(9, 2.6 * lines), layout="constrained")
    panels = list(figure.subplots(lines, min(_COLUMNS, len(quantities)), squeeze=False).flat)
    for panel, quantity in zip(panels, quantities, strict=False):
        for parameter, pairs in read_series(path, quantity, parameters).items():
            panel.plot(*zip(*pairs, strict=True), label=parameter)
        panel.set(xlabel="step", ylabel=quantity.replace("_", " "))
        if quantity in _LOGARITHMIC:
            panel.set_yscale("log")
    for panel in panels[len(quantities) :]:
        panel.remove()
    if len(parameters) > 1:
        figure.legend(parameters, loc="outside lower center", ncols=4)
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the file and draw it."""
    parser = argparse.ArgumentParser(prog="python -m bench.recorded", description=__doc__)
    parser.add_argument("file", type=Path, help="what Recorder(optimizer, FILE) wrote")
    parser.add_argument("--out", type=Path, help="the picture; FILE with .png otherwise")
    parser.add_argument("--quantities", nargs="+", default=QUANTITIES)
    parser.add_argument("--parameters", nargs="+", default=[ALL])
    parsed = parser.parse_args(arguments)
    out = parsed.out or parsed.file.with_suffix(".png")
    save_figure(parsed.file, out, parsed.quantities, parsed.parameters)
    print(f"Written to {out}")


if __name__ == "__main__":
    main()
