"""Draw what a `Recorder` wrote: ``python -m cm_fused.diagnostics buffer.csv --out buffer.png``."""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from cm_fused.diagnostics._recorder import ALL

_COLUMNS = 3
_PANEL = (4.0, 2.6)  # inches

# By quantity and parameter: the steps and the values.
Curves = Mapping[str, Mapping[str, tuple[list[int], list[float]]]]


def read_curves(path: Path, names: Sequence[str]) -> Curves:
    """Return the curves of some parameters, without rows that are incomplete.

    Args:
        path: A CSV file that a `Recorder` wrote.
        names: Of parameters, or "all" for all together.

    Raises:
        ValueError: The file is not a `Recorder`'s, or lacks a parameter.
    """
    curves: dict[str, dict[str, tuple[list[int], list[float]]]] = defaultdict(dict)
    found = set()
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if (rows.fieldnames or [])[:2] != ["step", "parameter"]:
            raise ValueError(
                "path must be a Recorder's CSV file, with the columns step and parameter, "
                f"got {path}"
            )
        for row in rows:
            if None in row or None in row.values():
                continue  # it has more values than the header, or fewer
            step, name = int(row.pop("step")), row.pop("parameter")
            found.add(name)
            if name in names:
                for quantity, value in row.items():
                    steps, values = curves[quantity].setdefault(name, ([], []))
                    steps.append(step)
                    values.append(float(value))
    if missing := [name for name in names if name not in found]:
        known = ", ".join(sorted(found)) or "no complete row"
        raise ValueError(f"{path} has no parameter {missing[0]!r}, it has {known}")
    return curves


def draw(curves: Curves, out: Path) -> None:
    """Draw a panel for each quantity.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the picture needs matplotlib: pip install matplotlib") from error
    rows = math.ceil(len(curves) / _COLUMNS)
    figure = Figure(figsize=(_PANEL[0] * _COLUMNS, _PANEL[1] * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
    for axes, (quantity, by_name) in zip(panels, curves.items(), strict=False):
        for name, (steps, values) in by_name.items():
            axes.plot(steps, values, label=name)
        axes.set(title=quantity.replace("_", " "), xlabel="step")
        axes.grid(color="0.9")
    for axes in figure.axes[len(curves) :]:
        axes.remove()
    figure.axes[0].legend(fontsize="small")
    figure.savefig(out, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m cm_fused.diagnostics", description=__doc__)
    parser.add_argument("path", type=Path, help="CSV file of a Recorder")
    parser.add_argument("--parameters", nargs="+", default=[ALL], metavar="NAME")
    parser.add_argument("--out", type=Path, help="picture to write, default beside the CSV file")
    parsed = parser.parse_args(arguments)
    out = parsed.out or parsed.path.with_suffix(".png")
    try:
        draw(read_curves(parsed.path, parsed.parameters), out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    print(f"Written to {out}")


if __name__ == "__main__":
    main()
