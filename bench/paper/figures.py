"""The figures; each function returns one."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from bench.paper.experiments import (
    ACKLEY_BOX,
    ACKLEY_ROSENBROCK,
    BOXES,
    BUFFER_STEPS,
    CAPACITIES,
    CAPACITY,
    DECAY,
    DECAYS,
    DEFAULT_BUFFER,
    ESCAPES,
    FIGURE_STARTS,
    GOLDSTEIN_PRICE,
    LEVY,
    LINE_CAPACITIES,
    LINE_SHARPNESS,
    LINE_STARTS,
    LR,
    MORE_STARTS,
    OPPOSITION_STEPS,
    OURS,
    PAIR,
    PAPER,
    SHARPNESS,
    STARTS,
    STEPS,
    USUAL_ACKLEY,
    WIDE,
    Buffers,
    Landscape,
    at_flat,
    at_zero,
    buffers,
    opposed_slots,
    paths,
    uniform,
)
from bench.paper.results import Results
from bench.paper.statistics import Interval, mean_interval, proportion_interval
from bench.paper.systems import SYSTEMS, Setting

# The Okabe-Ito palette, which colour-blind readers tell apart. The first are drawn below the later
# ones, which often lie on them, and so are wider.
_COLORS = dict(zip(SYSTEMS, ("#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"), strict=True))
_WIDTHS = dict(zip(SYSTEMS, (8.0, 4.0, 2.6, 1.6, 0.9), strict=True))
_MARKERS = dict(zip(SYSTEMS, "sD^ov", strict=True))
_FLAT, _NEAR, _SHARP = "#a9dba4", "#e6f3cf", "#f6c8c2"
_POINTS = 250
_TICKS = (2, 5, 10, 20, 40, 100)


def save_all(results: Results, folder: Path) -> list[str]:
    """Write every figure as a PNG; return their file names."""
    usual = GOLDSTEIN_PRICE[BOXES.index(2)]
    figures = {
        "f1_f14_goldstein_price": _trajectories(
            "F1, F14", usual, FIGURE_STARTS, "only Adam+CM should end at the star"
        ),
        "f2_buffers": _first_buffers(results),
        "f3_ackley_loss": _ackley_loss(results),
        "f13_ackley": _trajectories(
            "F3, F13", USUAL_ACKLEY, FIGURE_STARTS, "only CM should end near the star"
        ),
        "levy": _trajectories(
            "F5", LEVY[BOXES.index(10)], 2, "does CM end nearer to the star, in wider valleys?"
        ),
        "f4_escapes": _escapes(results),
        "f5_boxes": _boxes(results),
        "f6_lines": _lines(results),
        "f11_slots": _opposed(),
        "f11_trajectories": _trajectories(
            "F11",
            ACKLEY_ROSENBROCK,
            2,
            "Adam+CG should stay near its start; the star is the paper's minimum",
        ),
        "f12_escapes": _capacity_escapes(results),
        "f17_lines": _line_grids(results, "F17", DECAYS[0]),
        "f18_lines": _line_grids(results, "F18", DECAYS[1]),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=100)
    return [f"{name}.png" for name in figures]


def _trajectories(part: str, place: Landscape, count: int, look: str) -> Figure:
    """Draw the first ``count`` starts of a box, a panel each."""
    figure = Figure(figsize=(12, 5.4 * ((count + 1) // 2) + 0.8), layout="constrained")
    panels = figure.subplots((count + 1) // 2, 2).flat
    starts = uniform((count, 2), place.box, 0)
    all_paths = paths(place, starts)
    for i, (axes, start) in enumerate(zip(panels, starts, strict=True)):
        found = {system: path[:, i] for system, path in all_paths.items()}
        _draw_contours(axes, place, found)
        for system, path in found.items():
            axes.plot(*path.T.numpy(), color=_COLORS[system], linewidth=_WIDTHS[system], alpha=0.9)
        for rank, (system, path) in enumerate(found.items()):
            # Ends lie on each other too: the first are the larger.
            axes.plot(*path[-1].numpy(), markersize=15 - 2.2 * rank, zorder=6, **_end(system))
        axes.plot(*start.numpy(), **_START)
        axes.plot(*place.minimum, **_MINIMUM)
    handles = [Line2D([], [], linewidth=_WIDTHS[s], label=s, **_end(s)) for s in SYSTEMS]
    handles += [
        Line2D([], [], label="start", **_START),
        Line2D([], [], label="minimum", **_MINIMUM),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.suptitle(
        f"{part}: {place.name}, lr {LR}, C = 5, λ = 0.7, {STEPS} steps; the large marks are ends\n"
        f"Look: {look}"
    )
    return figure


_START: dict[str, Any] = {
    "marker": "o",
    "color": "black",
    "markeredgecolor": "white",
    "linestyle": "none",
    "markersize": 9,
    "zorder": 7,
}
_MINIMUM: dict[str, Any] = {
    **_START,
    "marker": "*",
    "color": "white",
    "markeredgecolor": "black",
    "markersize": 24,
    "zorder": 5,
}


def _end(system: str) -> dict[str, Any]:
    return {"marker": _MARKERS[system], "color": _COLORS[system], "markeredgecolor": "black"}


def _draw_contours(axes: Axes, place: Landscape, found: Mapping[str, Tensor]) -> None:
    points = torch.cat([*found.values(), torch.tensor([place.minimum])])
    low, high = points.min(0).values, points.max(0).values
    margin = 0.08 * (high - low).max()
    x, y = (
        torch.linspace(a, b, _POINTS, dtype=torch.float64)
        for a, b in zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
    )
    values = place.surface(torch.cartesian_prod(x, y)).view(_POINTS, _POINTS).T
    # Above the lowest value, so that the floor of each valley can be told.
    above = (values - values.min() + 0.01 * (values.max() - values.min())).numpy()
    levels = torch.logspace(math.log10(above.min()), math.log10(above.max()), 30)
    axes.contourf(
        x.numpy(), y.numpy(), above, levels=levels.tolist(), cmap="Greys_r", norm=LogNorm(),
        alpha=0.65, extend="both",
    )  # fmt: skip


def _band(
    axes: Axes, x: Sequence[float], intervals: Sequence[Interval], system: str, **style: object
) -> None:
    """Draw estimates with their intervals."""
    look: dict[str, Any] = {
        "color": _COLORS[system],
        "marker": _MARKERS[system],
        "label": system,
        **style,
    }
    axes.plot(x, [interval.value for interval in intervals], **look)
    low, high = ([getattr(i, end) for i in intervals] for end in ("low", "high"))
    axes.fill_between(x, low, high, color=_COLORS[system], alpha=0.15, linewidth=0)


def _plain_ticks(axes: Axes, values: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


_BUFFER_MEASURES: dict[str, Callable[[Buffers], Tensor]] = {
    "1 − |mean of the slots| / mean |slot|": Buffers.cancellation,
    "cosine of new item and buffer mean": Buffers.cosine,
    "length of the update": Buffers.update_length,
}


def _first_buffers(results: Results) -> Figure:
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(5, 4), squeeze=False)[:, 0]
    for axes, system in zip(top.subplots(2, 1), PAIR, strict=True):
        _draw_slots(axes, results.first_buffers[system], system)
    for axes, (name, of) in zip(
        bottom.subplots(1, len(_BUFFER_MEASURES)), _BUFFER_MEASURES.items(), strict=True
    ):
        for system in PAIR:
            values = of(results.first_buffers[system])
            steps = range(BUFFER_STEPS + 1 - len(values), BUFFER_STEPS + 1)
            _band(axes, list(steps), [mean_interval(row) for row in values], system)
        axes.set(title=name, xlabel="step")
        axes.legend()
    bottom.suptitle(f"mean of {STARTS} starts in ±{ACKLEY_BOX}, 95 % bands")
    figure.suptitle(
        f"F2: Ackley, first {BUFFER_STEPS} steps, lr {LR}, C = 5, λ = 0.7\n"
        "Look: slots of Adam+CG should point in opposite directions and cancel in their mean"
    )
    return figure


def _draw_slots(axes: Axes, found: Buffers, system: str) -> None:
    """Draw the slots of the first start after each step (thin), and their mean (black)."""
    for step, slots in enumerate(found.slots, start=1):
        # Relative to the longest slot: directions are what is to be seen.
        longest = slots[0].norm(dim=-1).max()
        _draw_arrows(axes, step, slots[0] / longest, _COLORS[system], 0.003)
        _draw_arrows(axes, step, slots[0].mean(0, keepdim=True) / longest, "black", 0.006)
    axes.set(xlim=(0.3, BUFFER_STEPS + 0.7), ylim=(-0.6, 0.6), yticks=[])
    axes.set_xticks(range(1, BUFFER_STEPS + 1))
    axes.set_aspect("equal")
    axes.set_title(f"{system}, first start: slots after each step, black: their mean", fontsize=10)


def _draw_arrows(axes: Axes, x: float, vectors: Tensor, color: str, width: float) -> None:
    # Half a unit is the longest: none leaves its step's place.
    u, v = (0.48 * vectors).T.numpy()
    axes.quiver(
        [x] * len(u), [0] * len(u), u, v, color=color, width=width, angles="xy",
        scale_units="xy", scale=1,
    )  # fmt: skip


def _ackley_loss(results: Results) -> Figure:
    figure = Figure(figsize=(15, 5), layout="constrained")
    titles = {
        PAPER: "best of Table 5's grid",
        DEFAULT_BUFFER: f"no search: lr {LR}, C = 5, λ = 0.7",
        WIDE: f"C = 5, λ = 0.7, {WIDE}",
    }
    found = results.ackley[USUAL_ACKLEY.starts]
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for system in SYSTEMS:
            mean, half = found[name, system].curve.numpy()
            steps = range(len(mean))
            axes.plot(steps, mean, color=_COLORS[system], label=system, linewidth=2)
            axes.fill_between(
                steps, mean - half, mean + half, color=_COLORS[system], alpha=0.2, linewidth=0
            )
        axes.axvline(STEPS // 2, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="step (dotted: lr ÷ 10)", ylim=(0, None))
    axes.legend()
    figure.supylabel("loss")
    figure.suptitle(
        f"F3: Ackley, mean loss of {STARTS} starts in ±{ACKLEY_BOX}, 95 % bands\n"
        "Look: only Adam+CM and Adam+SAM+CM should end near 0"
    )
    return figure


def _escapes(results: Results) -> Figure:
    settings = list(dict.fromkeys(name for name, _ in results.escapes))
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    panels = figure.subplots(2, 4, sharey=True).flatten()
    for axes, name in zip(panels, settings, strict=False):
        for system in SYSTEMS:
            _, ends = results.escapes[name, system]
            _draw_shares(axes, at_flat(ends), system)
        axes.set(title=name, xlabel="sharpness s")
    panels[-1].axis("off")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
    figure.supylabel("share of runs")
    figure.suptitle(
        f"F4: runs of {ESCAPES} that end wholly in the flat minimum, D = 10, 95 % bands\n"
        "Look: Adam+CM should be above Adam, Adam+SAM and Adam+CG, and rise with s"
    )
    return figure


def _draw_shares(axes: Axes, hits: Tensor, system: str) -> None:
    intervals = [proportion_interval(row) for row in hits]
    _band(axes, SHARPNESS, intervals, system, linewidth=_WIDTHS[system] / 2 + 1)
    _plain_ticks(axes, _TICKS)
    axes.set_ylim(-0.03, 1.03)


def _boxes(results: Results) -> Figure:
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    grid = figure.subplots(2, 2)
    for row, surface in zip(grid, ("Goldstein-Price", "Levy"), strict=True):
        for axes, name in zip(row, ("losses", "sharpness"), strict=True):
            found = {
                (system, box): getattr(
                    results.scans[surface, f"±{box}"][(MORE_STARTS, system, CAPACITY, DECAY)], name
                )
                for system in SYSTEMS
                for box in BOXES
            }
            axes.axhline(0, color=_COLORS["Adam"], linewidth=2, label="Adam")
            for system in SYSTEMS[1:]:
                gaps = [found[system, box] - found["Adam", box] for box in BOXES]
                _band(axes, BOXES, [mean_interval(gap) for gap in gaps], system, linewidth=2)
            _plain_ticks(axes, BOXES)
            title = f"{surface}: final {name.replace('losses', 'loss')} − that of Adam"
            axes.set(title=title, xlabel="starts uniform in ± this")
    grid[0][0].legend()
    figure.suptitle(
        f"F5: the table inside Fig. 5, C = {CAPACITY}, λ = {DECAY}, mean of {STARTS} starts, "
        "95 % bands\nLook: Adam+CM should be lowest; the box of starts decides it"
    )
    return figure


def _draw_cells(figure: Figure, results: Results, key: tuple[str, int, float]) -> None:
    """Draw x against steps for each (s, x0): green where it ends at 0, pale near it, red at 1."""
    found = results.lines[key]
    grid = figure.subplots(len(LINE_SHARPNESS), len(LINE_STARTS), sharex=True, sharey=True)
    for i, s in enumerate(LINE_SHARPNESS):
        for j, start in enumerate(LINE_STARTS):
            axes, path = grid[i][j], found[:, i, j]
            is_near = path[-1] < 0.5
            axes.set_facecolor(_FLAT if abs(path[-1]) < 0.1 else _NEAR if is_near else _SHARP)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
            axes.plot(path.numpy(), color=_COLORS[key[0]], linewidth=1.5)
            axes.set(xticks=[0, STEPS // 2], ylim=(-3, 4))
            axes.tick_params(labelsize=7)
            if i == 0:
                axes.set_title(f"x0 = {start:g}", fontsize=8)
            if j == 0:
                axes.set_ylabel(f"s = {s:g}", fontsize=8)


_CELLS_CAPTION = "x against steps; solid line: flat minimum 0, dotted: sharp minimum 1"


def _lines(results: Results) -> Figure:
    figure = Figure(figsize=(18, 4.6), layout="constrained")
    for part, system in zip(
        figure.subfigures(1, len(SYSTEMS), squeeze=False)[0], SYSTEMS, strict=True
    ):
        _draw_cells(part, results, (system, LINE_CAPACITIES[0], DECAYS[0]))
        part.suptitle(system, fontsize=10)
    figure.suptitle(
        f"F6: one dimension, C = 5, λ = 0.7. {_CELLS_CAPTION}\n"
        "Look: Adam+CM should have more green cells (ends within 0.1 of 0; pale: nearer to 0; "
        "red: at 1) than Adam+CG"
    )
    return figure


def _line_grids(results: Results, part: str, decay: float) -> Figure:
    figure = Figure(figsize=(13, 9), layout="constrained")
    grid = figure.subfigures(len(PAIR), len(LINE_CAPACITIES), squeeze=False)
    for row, system in zip(grid, PAIR, strict=True):
        for panel, capacity in zip(row, LINE_CAPACITIES, strict=True):
            _draw_cells(panel, results, (system, capacity, decay))
            panel.suptitle(f"{system}, C = {capacity}", fontsize=10)
    figure.suptitle(
        f"{part}: one dimension, λ = {decay}. {_CELLS_CAPTION}\n"
        "Look: Adam+CM should have more green cells (ends within 0.1 of 0; pale: nearer to 0; "
        "red: at 1) than Adam+CG"
    )
    return figure


def _opposed() -> Figure:
    """Draw the three consecutive steps of the start whose slots oppose each other most."""
    setting = Setting("Adam+CG", LR)
    starts = uniform((STARTS, 2), ACKLEY_ROSENBROCK.box, 0)
    found = buffers(ACKLEY_ROSENBROCK.surface, setting, starts, OPPOSITION_STEPS)
    counts = torch.stack([opposed_slots(slots) for slots in found.slots[4:]]).unfold(0, 3, 1)
    step, start = divmod(int(counts.sum(-1).flatten().argmax()), STARTS)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    for index, axes in zip(range(step + 4, step + 7), figure.subplots(1, 3), strict=True):
        slots = found.slots[index][start]
        longest = slots.norm(dim=-1).max()
        _draw_arrows(axes, 0, slots / longest, _COLORS["Adam+CG"], 0.012)
        _draw_arrows(axes, 0, slots.mean(0, keepdim=True) / longest, "black", 0.02)
        update = found.updates[index][start]
        axes.set(xlim=(-0.55, 0.55), ylim=(-0.55, 0.55), xticks=[], yticks=[])
        axes.set_aspect("equal")
        opposed = int(counts[step, start, index - step - 4])
        axes.set_title(
            f"step {index + 1}: {opposed} of 5 opposed, step of {update.norm():.2g}", fontsize=10
        )
    figure.suptitle(
        "F11: slots of Adam+CG on equation 12, C = 5 (orange), and their mean (black), of the "
        f"start of {STARTS} with most opposition\n"
        "Look: four of five arrows should have an opposite, so that the mean is short"
    )
    return figure


def _capacity_escapes(results: Results) -> Figure:
    figure = Figure(figsize=(16, 9), layout="constrained")
    criteria = {"ends within 0.1 of 0": at_zero, "ends nearer to 0": at_flat}
    for row, decay in zip(figure.subplots(2, 3), DECAYS, strict=True):
        for axes, (name, at) in zip(row[:2], criteria.items(), strict=True):
            for system in SYSTEMS:
                has_decay = system not in ("Adam", "Adam+SAM")
                key = (1, system, 10, decay if has_decay else DECAYS[0])
                _draw_shares(axes, at(results.capacity_escapes[key]), system)
            axes.set(title=f"left: C = 10, λ = {decay}, {name}", xlabel="sharpness s")
            axes.legend(fontsize=8)
        for capacity, alpha in zip(
            CAPACITIES, torch.linspace(0.25, 1, len(CAPACITIES)), strict=True
        ):
            hits = at_zero(results.capacity_escapes[1, OURS, capacity, decay])
            shares = hits.double().mean(1).numpy()
            row[2].plot(
                SHARPNESS, shares, "o-", color=_COLORS[OURS], alpha=alpha.item(),
                linewidth=0.6 + 3 * alpha.item(), label=f"C = {capacity}",
            )  # fmt: skip
        _plain_ticks(row[2], _TICKS)
        row[2].set(
            title=f"right: {OURS}, λ = {decay}, within 0.1 of 0", xlabel="sharpness s",
            ylim=(-0.03, 1.03),
        )  # fmt: skip
        row[2].legend(fontsize=8)
    figure.supylabel(f"share of {ESCAPES} runs")
    figure.suptitle(
        "F12: one dimension, 95 % bands\nLook: left, Adam+CM should be highest for s > 2 and "
        "Adam+CG fall below Adam; right, a larger C (darker) should be higher"
    )
    return figure
