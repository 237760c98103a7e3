"""The figures; each function writes one PNG."""

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bench.paper.experiments import (
    ACKLEY,
    ACKLEY_ROSENBROCK,
    BUFFER_STEPS,
    CAPACITIES,
    GOLDSTEIN_PRICE,
    LEARNING_RATE,
    LEVY,
    SHARPNESS,
    STEPS,
    Landscape,
    line_paths,
    slot_paths,
    trajectories,
)
from bench.paper.results import BUFFER_RATES, DIMENSIONS, Results
from bench.paper.statistics import mean_interval
from bench.paper.systems import BUFFERED, SYSTEMS, Setting

# The Okabe-Ito palette, which colour-blind readers tell apart. The first are drawn below the later
# ones, which often lie on them, and so are wider.
_COLORS = dict(zip(SYSTEMS, ("#0072B2", "#009E73", "#E69F00", "#D55E00"), strict=True))
_WIDTHS = dict(zip(SYSTEMS, (3.5, 1.5, 2.0, 1.0), strict=True))
_TRAJECTORIES = {
    "goldstein_price": (GOLDSTEIN_PRICE, (0.85, 0.9)),
    "ackley": (ACKLEY, (2.4, -3.3)),
    "levy": (LEVY, (-6.5, 5.0)),
    "ackley_rosenbrock": (ACKLEY_ROSENBROCK, (-1.6, -0.8)),
}
_LINE_STARTS = (-2.0, 1.1, 3.0)
_LINE_SHARPNESS = (2.0, 10.0, 40.0, 100.0)
_BUFFER_START = (2.4, -3.3)
_GRID = 250


def save_all(results: Results, folder: Path) -> list[str]:
    """Write every figure; return their file names."""
    figures = {
        **{f"trajectory_{name}": _trajectory(*case) for name, case in _TRAJECTORIES.items()},
        "buffers_ackley": _buffers(),
        "escape_sharpness": _escape_sharpness(results),
        "escape_capacity": _escape_capacity(results),
        "lines_1d": _lines(),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return [f"{name}.png" for name in figures]


def _trajectory(landscape: Landscape, start: tuple[float, float]) -> Figure:
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    paths = trajectories(landscape, start)
    _draw_contours(axes, landscape, paths)
    for system, path in paths.items():
        x, y = path.T.numpy()
        axes.plot(x, y, label=system, color=_COLORS[system], linewidth=_WIDTHS[system])
        axes.plot(*path[-1].numpy(), "s", color=_COLORS[system], markeredgecolor="black")
    axes.plot(*start, "o", color="black", label="start")
    axes.plot(*landscape.minimum, "*", color="white", markeredgecolor="black", markersize=15)
    axes.set_title(f"{landscape.name}, lr {LEARNING_RATE}, {STEPS} steps (■ end, ☆ minimum)")
    axes.legend(loc="upper right", fontsize=8)
    return figure


def _draw_contours(axes: Axes, landscape: Landscape, paths: Mapping[str, Tensor]) -> None:
    points = torch.cat([*paths.values(), torch.tensor([landscape.minimum])])
    margin = 0.08 * (points.max(0).values - points.min(0).values)
    low, high = points.min(0).values - margin, points.max(0).values + margin
    x, y = (
        torch.linspace(low[i].item(), high[i].item(), _GRID, dtype=torch.float64) for i in (0, 1)
    )
    values = landscape.surface(torch.cartesian_prod(x, y)).view(_GRID, _GRID).T
    axes.contourf(x.numpy(), y.numpy(), values.numpy(), levels=40, cmap="Greys_r", alpha=0.7)


def _buffers() -> Figure:
    figure = Figure(figsize=(11, 3 * len(BUFFER_RATES)), layout="constrained")
    grid = figure.subplots(len(BUFFER_RATES), len(BUFFERED), squeeze=False)
    for row, lr in zip(grid, BUFFER_RATES, strict=True):
        for axes, system in zip(row, BUFFERED, strict=True):
            _draw_slots(axes, Setting(system, lr))
            axes.set_title(f"{system}, lr {lr:g}")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.suptitle(
        f"Ackley from {_BUFFER_START}: the slots (thin) and their mean (bold) after each step"
    )
    return figure


def _draw_slots(axes: Axes, setting: Setting) -> None:
    start = torch.tensor([_BUFFER_START], dtype=torch.float64)
    for step, slots in enumerate(slot_paths(setting, start), start=1):
        # Relative to the longest slot: directions are what is to be seen.
        longest = slots.norm(dim=-1).max()
        for vectors, color, width in (
            (slots[0], _COLORS[setting.system], 0.004),
            (slots.mean(1), "black", 0.009),
        ):
            u, v = (vectors / longest).T.numpy()
            axes.quiver(
                [step] * len(u),
                [0] * len(u),
                u,
                v,
                color=color,
                width=width,
                scale=9,
                scale_units="width",
            )
    axes.set_xlim(0, BUFFER_STEPS + 1)
    axes.set_ylim(-0.8, 0.8)
    axes.set_yticks([])


def _draw_share(axes: Axes, x: list[float], shares: list[Tensor], system: str) -> None:
    """Draw the mean of each (start,) tensor with its interval."""
    intervals = [mean_interval(share) for share in shares]
    color = _COLORS[system]
    axes.plot(x, [interval.value for interval in intervals], "o-", color=color, label=system)
    axes.fill_between(
        x,
        [interval.low for interval in intervals],
        [interval.high for interval in intervals],
        color=color,
        alpha=0.15,
    )


def _escape_sharpness(results: Results) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, dimension in zip(figure.subplots(1, 2), DIMENSIONS, strict=True):
        for system in SYSTEMS:
            _draw_share(axes, list(SHARPNESS), list(results.escape[system, dimension]), system)
        axes.set(title=f"D = {dimension}", xlabel="sharpness s", ylabel="share at the flat minimum")
        axes.legend()
    return figure


def _escape_capacity(results: Results) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for system in BUFFERED:
        shares = [results.escape_capacity[system, c].mean(0) for c in CAPACITIES]
        _draw_share(axes, list(CAPACITIES), shares, system)
    axes.set_xscale("log")
    axes.set_xticks(CAPACITIES, [str(c) for c in CAPACITIES])
    axes.set(xlabel="capacity C", ylabel="share at the flat minimum, mean over s")
    axes.legend()
    return figure


def _lines() -> Figure:
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, len(_LINE_SHARPNESS), sharex=True, sharey="row")
    shown = (SYSTEMS[:2], SYSTEMS[2:])
    for row, systems in zip(grid, shown, strict=True):
        for axes, sharpness in zip(row, _LINE_SHARPNESS, strict=True):
            for system in systems:
                paths = line_paths(system, sharpness, _LINE_STARTS, STEPS)
                color, width = _COLORS[system], _WIDTHS[system]
                lines = axes.plot(paths.numpy(), color=color, linewidth=width)
                lines[0].set_label(system)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
            axes.set_title(f"s = {sharpness:g}")
        row[0].legend()
        row[0].set_ylabel("x (flat minimum 0, sharp 1)")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    return figure
