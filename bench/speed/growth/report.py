"""The tables and the picture of how a step grows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench import markdown
from bench.speed.growth.curves import BASELINE

Exponent = tuple[float, float, float]
Quartiles = tuple[float, float, float]


@dataclass(frozen=True)
class Grown:
    """The results of a curve, by optimizer.

    Attributes:
        name: Of the axis.
        values: The points on it.
        seconds: The quartiles of a step's time at each point, the median in the middle.
        exponents: The p of time ~ value^p, and the ends of its 95 % interval.
    """

    name: str
    values: tuple[int, ...]
    seconds: dict[str, list[Quartiles]]
    exponents: dict[str, Exponent]


@dataclass(frozen=True)
class Results:
    """All that `python -m bench.speed.growth` measures.

    Attributes:
        machine: What it was measured on.
        versions: And with.
        curves: Times.
        threads: The quartiles of one thread's time over two threads', by case and optimizer.
        memory: Bytes by which the process's memory peaks in a step of 30 M elements, by precision.
    """

    machine: dict[str, Any]
    versions: dict[str, Any]
    curves: list[Grown]
    threads: dict[str, dict[str, Quartiles]]
    memory: dict[str, int]


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the three quartiles."""
    low, middle, high = (float(each) for each in np.quantile(values, (0.25, 0.5, 0.75)))
    return low, middle, high


def grown(
    name: str,
    values: tuple[int, ...],
    seconds: Mapping[str, Sequence[Sequence[float]]],
    fit: Callable[[Sequence[int], Sequence[Sequence[float]]], Exponent],
) -> Grown:
    """Return what is kept of a curve's rounds."""
    return Grown(
        name,
        values,
        {key: [quartiles(rounds) for rounds in points] for key, points in seconds.items()},
        {key: fit(values, points) for key, points in seconds.items()},
    )


def tables(results: Results) -> str:
    """Return the tables in Markdown: exponents, threads, memory; and what they were measured on."""
    names = list(results.curves[0].exponents)
    exponents = [
        [name, *(_interval(curve.exponents[name]) for curve in results.curves)] for name in names
    ]
    others = [
        [
            name,
            *(f"{by_name[name][1]:.2f}" for by_name in results.threads.values()),
            f"{results.memory[name] / 2**20:.1f}" if name in results.memory else "",
        ]
        for name in names
    ]
    of_threads = [f"2 threads, {case}: times as fast" for case in results.threads]
    axes = [
        f"{curve.name}, {curve.values[0]:,} to {curve.values[-1]:,}" for curve in results.curves
    ]
    return "\n\n".join(
        (
            "The exponent p of the best fit time ~ x^p with its 95 % interval; 1 is linear, 0 is "
            "constant:",
            markdown.table(["x", *axes], exponents),
            "Two threads beside one, and the memory that a step takes while it runs:",
            markdown.table(["", *of_threads, "MiB of 30 M elements"], others),
            _measured_on(results),
        )
    )


def _interval(found: Exponent) -> str:
    middle, low, high = found
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _measured_on(results: Results) -> str:
    device, versions = results.machine, results.versions
    return (
        f"{device['model']}, {device['threads']} threads, {device['instructions']}; torch "
        f"{versions['torch']}, commit {versions['commit']}."
    )


def save_figure(results: Results, path: Path) -> None:
    """Draw every curve: medians, with the quartiles as bands."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    for axes, curve in zip(figure.subplots(2, 2).ravel(), results.curves, strict=True):
        _draw(axes, curve)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=90)


def _draw(axes: Axes, curve: Grown) -> None:
    for name, points in curve.seconds.items():
        low, middle, high = (1e3 * np.array(points).T).tolist()
        (line,) = axes.plot(curve.values, middle, "o-", markersize=3, label=name)
        if name == BASELINE:  # what all are compared with, above them
            line.set(color="black", zorder=3)
        axes.fill_between(curve.values, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel=curve.name, ylabel="milliseconds a step")
    if curve.name.startswith("slots"):
        axes.set_ylim(bottom=0)  # flat or not is seen from 0 only
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(curve.values, [_short(value) for value in curve.values])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")


def _short(value: int) -> str:
    return f"{value // 1_000_000} M" if value >= 1_000_000 else f"{value:,}"
